"""BYOL, SimSiam and SwAV with GenView: steps by hand, runs as a user makes them. Two processes: test_train_moco.py."""
import json
import math
import re
import types

import pytest
import torch

import eval_linear
import genview
import support.checkpoints
import support.world
import train_byol
import train_moco
import train_swav
from quality_loss import sinkhorn, swapped_prediction

CPU = support.world.World(0, 1, torch.device("cpu"), torch.float32)


def settings(**changes):
    args = dict(arch="resnet10_narrow", image_size=32, dim=12, hidden=10, momentum=0.9, temperature=0.1, prototypes=5, epsilon=0.05,
                freeze_epochs=1, epochs=4, optimizer="sgd", weight_decay=0.0)
    return types.SimpleNamespace(**args | changes)


def cosine(a, b):
    return sum(x * y for x, y in zip(a, b)) / (sum(x * x for x in a) * sum(x * x for x in b)) ** 0.5


@torch.no_grad()
def shake(encoder):
    """Other weights, so that a key encoder and a query encoder cannot be mistaken for each other."""
    for p in encoder.parameters():
        p.add_(torch.randn_like(p) * p.std())


def one_step(method, views, quality_of=None):
    """A step of SGD with learning rate 0.1; returns the loss and each parameter's change."""
    optimizer = train_moco.make_optimizer(settings(), method)
    for group in optimizer.param_groups:
        group["lr"] = 0.1
    before = {name: p.detach().clone() for name, p in method.named_parameters()}
    loss = train_moco.train_step(method, optimizer, views, (None,) * len(views), quality_of, 1.0, 0.0, CPU)["loss"]
    return loss, {name: p.detach() - before[name] for name, p in method.named_parameters()}


@pytest.mark.parametrize("name", train_byol.METHODS)
def test_a_step_on_two_images_by_hand(name):
    """The loss in plain loops over two images with their weights; the parameters move by -0.1 its gradient, in which the
    target is a constant."""
    torch.manual_seed(0)
    method = train_byol.METHODS[name](settings()).train()
    views = list(torch.randn(2, 2, 3, 32, 32))
    if name == "byol":
        shake(method.key)
    twin = train_byol.METHODS[name](settings()).train()
    twin.load_state_dict(method.state_dict())
    twin.update(0.0)                               # comes before the forward pass
    quality_of = lambda a, b: (torch.tensor([0.0, math.log(3)]), torch.zeros(2), torch.zeros(2))        # w: 0.5, 1.5
    loss, change = one_step(method, views, quality_of)
    p1, p2 = (twin.predictor(twin.query(v)) for v in views)
    if name == "byol":
        target, factor = twin.key, 2.0                                            # |p - z|^2 = 2 - 2 cos
    else:
        target, factor = twin.query, 0.5
    z1, z2 = (target(v).detach() for v in views)
    expected = 0.0
    for i, w in enumerate((0.5, 1.5)):
        expected += -w * factor * (cosine(p1[i], z2[i]) + cosine(p2[i], z1[i])) / 2
    expected.backward()
    assert loss.item() == pytest.approx(expected.item(), abs=1e-4)
    old = {key: p.detach() for key, p in twin.named_parameters()}
    for parameter, p in twin.named_parameters():
        if parameter.startswith("key."):           # twin's key is 0.1 of the way towards the query from where it was
            wanted = (old[parameter.replace("key.", "query.")] - p) * 0.1 / 0.9
        else:
            wanted = -0.1 * p.grad
        torch.testing.assert_close(change[parameter], wanted, atol=2e-4, rtol=1e-2)
    assert max(c.abs().max() for c in change.values()) > 1e-3


def test_the_target_of_byol_follows_and_its_momentum_rises():
    method = train_byol.BYOL(settings())
    assert method.momentum_at(0) == pytest.approx(0.9) and method.momentum_at(1) == 1
    with torch.no_grad():
        for p in method.query.parameters():
            p.add_(1.0)
    before = method.key.backbone[0].weight.clone()
    method.update(0.0)
    torch.testing.assert_close(method.key.backbone[0].weight, before + 0.1)
    assert not any(p.requires_grad for p in method.key.parameters())


def test_the_learning_rate_of_simsiams_predictor_is_constant(monkeypatch, image_folder, tmp_path):
    rates = []
    step = train_moco.train_step
    monkeypatch.setattr(train_moco, "train_step", lambda method, optimizer, *rest: rates.append(
        [group["lr"] for group in optimizer.param_groups]) or step(method, optimizer, *rest))
    run(train_byol, image_folder, tmp_path / "run", "--method", "simsiam", "--epochs", 2, "--lr", 0.8)
    encoder, predictor = zip(*rates)
    assert len(rates) == 6 and set(predictor) == {0.8 * 8 / 256}
    assert encoder[0] == predictor[0] and list(encoder) == sorted(encoder, reverse=True) and encoder[-1] < 0.2 * encoder[0]


def test_swav_by_hand():
    """Codes by Sinkhorn from the two large views, without gradient; every view predicts them but for its own."""
    torch.manual_seed(0)
    method = train_swav.SwAV(settings()).train()
    large, small = torch.randn(2, 4, 3, 32, 32), torch.randn(2, 4, 3, 16, 16)
    w = torch.tensor([0.4, 1.6, 1.0, 1.0])
    method.update(0.5)
    torch.testing.assert_close(method.prototypes.weight.norm(dim=1), torch.ones(5))
    loss, readouts = method([*large, *small], w, CPU)
    embed = lambda views: torch.nn.functional.normalize(method.query(views.flatten(0, 1)), dim=1).unflatten(0, (2, 4))
    scores = torch.cat([embed(large), embed(small)]) @ method.prototypes.weight.T                 # statistics of each size apart
    codes = torch.stack([sinkhorn(s, 0.05) for s in scores[:2]])
    torch.testing.assert_close(loss, swapped_prediction(scores, codes, 0.1, w), atol=1e-4, rtol=1e-4)
    assert 0 < readouts["std"] and method.chance == math.log(5)


def test_prototypes_do_not_learn_in_the_first_epoch():
    torch.manual_seed(0)
    for progress, learns in ((0.0, False), (0.24, False), (0.25, True), (1.0, True)):
        method = train_swav.SwAV(settings())
        method.update(progress)
        method(torch.randn(2, 4, 3, 32, 32), None, CPU)[0].backward()
        assert method.prototypes.weight.grad.any() == learns and method.query.head[0].weight.grad.any()


# -------------------------------------------------------------------------------------------------------- as a user runs it

def run(script, data, folder, *flags):
    flags = ["--dataset", "folder", "--data-dir", data, "--image-size", 32, "--arch", "resnet10_narrow", "--batch-size", 8,
             "--output-dir", folder, "--device", "cpu", "--dim", 12, "--hidden", 10, *flags]
    args = train_moco.parse_args(script.PRESETS, list(map(str, flags)))
    methods = script.METHODS if script is train_byol else {"swav": train_swav.SwAV}
    train_moco.train(args, support.world.setup("cpu"), methods.get)


@pytest.mark.parametrize("script, method, more", [
    (train_byol, "byol", []), (train_byol, "simsiam", []),
    (train_swav, "swav", ["--prototypes", 6, "--small-size", 16, "--small-crops", 2])])
def test_with_views_and_quality(script, method, more, image_folder, encoder_folder, tmp_path, capsys):
    """Generated views, quality weights, checkpoint, resumption, evaluation: all of it is the loop's."""
    views = tmp_path / "views/train"
    for path in sorted((tmp_path.__class__(image_folder) / "train").rglob("*.png")):
        target = views / path.relative_to(f"{image_folder}/train")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    flags = ["--method", method, "--views-dir", views.parent, "--encoder", encoder_folder, "--epochs", 2, "--lr", 0.01,
             "--optimizer", "sgd", *more]
    run(script, image_folder, tmp_path / "run", *flags)
    said = capsys.readouterr().out
    assert re.search(rf"kNN top-1 \d+\.\d% \({train_moco.NAMES[method]} \+ GenView's views \+ quality weights\)$", said.strip())
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert {"loss", "pos", "neg", "std", "ess"} <= log[0].keys() and 0 < log[0]["ess"] <= 1 and log[0]["std"] > 0
    backbone, dim, _ = support.checkpoints.load_backbone(tmp_path / "run/last.pt")
    assert dim == 128
    run(script, image_folder, tmp_path / "run", *flags, "--resume")                 # nothing left to do
    assert "kNN top-1" in capsys.readouterr().out


def test_a_recipe_for_each_data_set():
    for script, method in ((train_byol, "byol"), (train_byol, "simsiam"), (train_swav, "swav")):
        for dataset in ("shapes", "cifar10", "cifar100", "imagenet", "folder"):
            args = train_moco.parse_args(script.PRESETS, ["--dataset", dataset, "--method", method, "--views-dir", "none",
                                                          "--data-dir", "x"])
            ours = {"byol": train_byol.BYOL, "simsiam": train_byol.SimSiam, "swav": train_swav.SwAV}[method]
            with torch.device("meta"):
                ours(args)                                                        # it can be built
            assert len(train_moco.augmentations(args)) == (2 + args.small_crops if method == "swav" else 2)
