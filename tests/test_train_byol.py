"""BYOL, SimSiam and SwAV: steps by hand, runs as a user makes them, recipes.

Two processes and the moving average: test_train_moco.py.
"""
import math
import re
import types

import pytest
import torch
from running import CPU, json_lines

import genview
import train_byol
import train_moco
import train_swav
from support.pretrained import load_backbone


def settings(**changes):
    args = dict(arch="resnet10_narrow", image_size=32, dim=12, hidden=10, momentum=0.9,
                temperature=0.1, prototypes=5, epsilon=0.05, freeze_epochs=1, epochs=4,
                optimizer="sgd", weight_decay=0.0, queue=None)
    return types.SimpleNamespace(**args | changes)


def cosine(a, b):
    dots = [sum(x * y for x, y in zip(*pair, strict=True)) for pair in ((a, b), (a, a), (b, b))]
    return dots[0] / (dots[1] * dots[2]) ** 0.5


def quality_of(view1, view2):
    """Quality whose weights are 0.5 and 1.5."""
    return torch.tensor([0.0, math.log(3)]), torch.zeros(2), torch.zeros(2)


@pytest.mark.parametrize("name", train_byol.METHODS)
def test_a_step_on_two_images_by_hand(name):
    """The loss in plain loops over two images with their weights; the parameters move by -0.1 its
    gradient, in which the target is a constant."""
    torch.manual_seed(0)
    method, twin = (train_byol.METHODS[name](settings()).train() for _ in range(2))
    views = list(torch.randn(2, 2, 3, 32, 32))
    if name == "byol":
        with torch.no_grad():
            for p in method.key.parameters():                # unlike the query encoder's
                p.add_(torch.randn_like(p) * p.std())
    twin.load_state_dict(method.state_dict())
    twin.update(0.0)                                         # comes before the forward pass
    optimizer = train_moco.make_optimizer(method, "sgd", 1e-4)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {key: p.detach().clone() for key, p in method.named_parameters()}
    loss = train_moco.train_step(method, optimizer, views, quality_of, 1.0, 0.0, CPU)["loss"]

    p1, p2 = (twin.predictor(twin.query(v)) for v in views)
    # |p - z|^2 = 2 - 2 cos, in both directions
    target, factor = (twin.key, 2.0) if name == "byol" else (twin.query, 0.5)
    z1, z2 = (target(v).detach() for v in views)
    expected = 0.0
    for i, w in enumerate((0.5, 1.5)):
        expected += -w * factor * (cosine(p1[i], z2[i]) + cosine(p2[i], z1[i])) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    old = {key: p.detach() for key, p in twin.named_parameters()}
    changes = {key: p.detach() - before[key] for key, p in method.named_parameters()}
    for key, p in twin.named_parameters():
        if key.startswith("key."):           # the twin's key has moved 0.1 of the way to the query
            wanted = (old[key.replace("key.", "query.")] - p) * 0.1 / 0.9
        else:
            wanted = -0.1 * p.grad
        torch.testing.assert_close(changes[key], wanted, atol=2e-4, rtol=1e-2)
    assert max(change.abs().max() for change in changes.values()) > 1e-3


def test_the_learning_rate_of_simsiams_predictor_is_constant(monkeypatch, image_folder, tmp_path):
    rates, step = [], train_moco.train_step

    def train_step(method, optimizer, *rest):
        rates.append([group["lr"] for group in optimizer.param_groups])
        return step(method, optimizer, *rest)
    monkeypatch.setattr(train_moco, "train_step", train_step)
    run(train_byol, image_folder, tmp_path, "--method", "simsiam", "--epochs", 2, "--lr", 0.8)
    encoder, predictor = zip(*rates, strict=True)
    assert len(rates) == 6 and set(predictor) == {0.8 * 8 / 256}
    assert encoder[0] == predictor[0] and encoder[-1] < 0.2 * encoder[0]
    assert list(encoder) == sorted(encoder, reverse=True)


def test_prototypes_do_not_learn_in_the_first_epoch():
    torch.manual_seed(0)
    for fraction, learns in ((0.0, False), (0.24, False), (0.25, True), (1.0, True)):
        method = train_swav.SwAV(settings())
        method.update(fraction)
        method(torch.randn(2, 4, 3, 32, 32), None, CPU)[0].backward()
        assert method.prototypes.weight.grad.any() == learns
        assert method.query.head[0].weight.grad.any()


# ------------------------------------------------------------------------------ runs, as a user
def run(script, data, folder, *flags):
    flags = ["--dataset", "folder", "--data-dir", data, "--image-size", 32, "--arch",
             "resnet10_narrow", "--batch-size", 8, "--output-dir", folder, "--device", "cpu",
             "--dim", 12, "--hidden", 10, *flags]
    args = train_moco.parse_args(script.METHODS, argv=[str(flag) for flag in flags])
    train_moco.train(args, CPU, script.METHODS)


@pytest.mark.parametrize("script, method, more", [
    (train_byol, "byol", []), (train_byol, "simsiam", []), (train_moco, "mocov3", []),
    (train_swav, "swav", ["--prototypes", 6, "--small-size", 16, "--small-crops", 2])])
def test_with_views_and_quality(script, method, more, image_folder, views_folder, encoder_folder,
                                tmp_path, capsys):
    """Views, quality weights, checkpoint, resumption: the loop serves every method."""
    flags = ["--method", method, "--views-dir", views_folder, "--encoder", encoder_folder,
             "--epochs", 2, "--lr", 0.01, "--optimizer", "sgd", *more]
    run(script, image_folder, tmp_path / "run", *flags)
    name = train_moco.METHOD_NAMES[method]
    parts = r"GenView's views of 20 of 24 images \+ quality weights"
    last = rf"kNN top-1 \d+\.\d% \({name} \+ {parts}\)"
    assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])
    line, *_ = json_lines(tmp_path / "run/log.jsonl")
    assert {"loss", "pos", "neg", "std", "ess"} <= line.keys()
    assert 0 < line["ess"] <= 1 and line["std"] > 0
    assert load_backbone(tmp_path / "run/last.pt")[1] == 128
    run(script, image_folder, tmp_path / "run", *flags, "--resume")      # nothing left to do
    assert re.fullmatch(last, capsys.readouterr().out.splitlines()[-1])


@pytest.mark.parametrize("script", [train_byol, train_moco, train_swav])
def test_a_recipe_for_each_data_set(script):
    """The network can be built, and there is an augmentation for each view."""
    for dataset in genview.DATA_DIRS:
        for method, network in script.METHODS.items():
            args = train_moco.parse_args(script.METHODS, argv=[
                "--dataset", dataset, "--method", method, "--views-dir", "none", "--data-dir", "x"])
            with torch.device("meta"):
                network(args)
            views = 2 + args.small_crops if method == "swav" else 2
            assert len(genview.augmentations(args)) == views
