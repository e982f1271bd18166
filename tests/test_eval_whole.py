"""eval_linear.py as a whole: which pictures, labels, crops, rates and statistics count."""
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from running import call, json_lines

import eval_linear
from support.networks import make_backbone

PROTOCOLS = {"linear": ["--protocol=linear", "--epochs=20"],
             "augment": ["--protocol=linear", "--augment", "--epochs=20", "--lr=30"],
             "knn": ["--protocol=knn", "--k=5"],
             "finetune": ["--protocol=finetune", "--labels=1", "--epochs=10", "--lr=10",
                          "--backbone-lr=0.1"]}


def save_pictures(folder, swapped=False, size=32):
    """Bright and dark pictures, 12 of each in train/ and in test/; swapped: in test/ the names of
    the classes are exchanged."""
    rng = np.random.default_rng(0)
    for split in ("train", "test"):
        for number in range(24):
            bright = number % 2
            name = "dark bright".split()[bright ^ (swapped and split == "test")]
            pixels = rng.integers(0, 60, (size, size, 3)) + 150 * bright
            path = Path(folder, split, name, f"{number:02d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """agree/ and swapped/ pictures, and a run's checkpoint."""
    folder = tmp_path_factory.mktemp("whole")
    save_pictures(folder / "agree")
    save_pictures(folder / "swapped", swapped=True)
    torch.manual_seed(0)
    state = make_backbone("resnet10_narrow", 32)[0].state_dict()
    args = {"dataset": "folder", "arch": "resnet10_narrow", "image_size": 32}
    model = {f"query.backbone.{name}": x for name, x in state.items()}
    torch.save({"model": model, "args": args, "epoch": 1}, folder / "last.pt")
    return folder


def evaluate(world, output, *flags, data="agree"):
    """The result of an evaluation, {protocol: {top1: ...}}."""
    batch = [] if "--protocol=knn" in flags else ["--batch-size=8"]
    call(eval_linear, "--checkpoint", world / "last.pt", "--data-dir", world / data, "--device=cpu",
         "--workers=0", "--output-dir", output, *batch, *flags)
    return json.loads((Path(output) / "result.json").read_text())["results"]


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_fitted_on_the_training_and_scored_on_the_test_pictures(protocol, world, tmp_path):
    """Where both splits give the same look other names, what was learned is wrong in every case."""
    for data, low, high in (("agree", 95, 100), ("swapped", 0, 5)):
        results = evaluate(world, tmp_path / data, *PROTOCOLS[protocol], data=data)
        assert all(low <= result["top1"] <= high for result in results.values()), results


def test_the_vote_of_one_query():
    """One neighbour of cosine 1 against two of cosine 0.8: exp((1 - 0.8) / t) is 7.4 at 0.1, 1.2
    at 1; with k = 1 the nearest decides. By default k is 200 and t 0.1."""
    query = torch.tensor([[1.0, 0.0]])
    far = [0.8, 0.6]
    for count, options, wanted in ((2, {}, 0), (2, {"temperature": 1.0}, 1), (9, {}, 1),
                                   (9, {"k": 1}, 0), (9, {"k": 5}, 0), (9, {"k": 10}, 1)):
        train = torch.tensor([[1.0, 0.0]] + [far] * count)
        labels = torch.tensor([0] + [1] * count)
        right = eval_linear.knn_accuracy([(train, labels)], query, torch.tensor([wanted]), 2,
                                         **options)
        assert right == 100, (count, options)
    train = torch.tensor([[1.0, 0.0]] * 200 + [far] * 9000)          # the 201st does not vote
    labels = torch.tensor([0] * 200 + [1] * 9000)
    assert eval_linear.knn_accuracy([(train, labels)], query, torch.tensor([0]), 2) == 100


# ----------------------------------------------------------- what the backbone sees while fitting
def save_coded(folder, size):
    """Pictures whose red grows with x and green with y; blue is the class."""
    y, x = np.mgrid[0:size, 0:size] * (240 // size)
    for split in ("train", "test"):
        for number in range(16):
            pixels = np.stack([x, y, np.full_like(x, 200 * (number % 2))], 2)
            path = Path(folder, split, "ab"[number % 2], f"{number:02d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def seen_while_fitting(world, tmp_path, size, *flags):
    """Red of all pictures (n, S, S), in units of their sides, that the backbone sees."""
    data = tmp_path / f"coded{size}"
    if not data.exists():
        save_coded(data, size)
    seen = []
    step = 240 // size

    def watch(module, inputs):
        x = inputs[0] if inputs[0].ndim == 4 else None
        if x is not None and x.shape[1] == 3:
            seen.append(((x[:, 0] * 0.26862954 + 0.48145466) * 255 / step / size).detach())
    real = eval_linear.load_backbone

    def load_backbone(*arguments, **options):
        backbone, *rest = real(*arguments, **options)
        backbone.register_forward_pre_hook(watch)
        return backbone, *rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_linear, "load_backbone", load_backbone)
        call(eval_linear, "--checkpoint", world / "last.pt", "--dataset=folder", "--data-dir", data,
             "--device=cpu", "--workers=0", "--batch-size=8", "--image-size", size, *flags)
    return seen


@pytest.mark.parametrize("protocol", [["--protocol=linear", "--augment", "--lr=0.1"],
                                      ["--protocol=finetune", "--labels=1"]])
@pytest.mark.parametrize("size", [32, 80])
def test_crops_and_flips_are_random_and_new_in_each_epoch(size, protocol, world, tmp_path):
    runs = []
    for seed in (0, 1):
        seen = seen_while_fitting(world, tmp_path, size, *protocol, "--epochs=4", f"--seed={seed}",
                                  "--output-dir", tmp_path / f"out{seed}")
        widths = torch.cat([(x[:, :, -1] - x[:, :, 0]).mean(1) for x in seen])
        whole = 1.0 if size == 32 else 0.875       # of test pictures: the centre of large ones
        test = (widths - whole * (1 - 1 / size)).abs() < 0.02
        assert 16 <= test.sum() < 40
        runs.append(widths[~test])
    widths = runs[0]
    assert len(widths) >= 40 and widths.abs().min() < 0.6
    assert 0.2 < (widths < 0).float().mean() < 0.8           # mirrored
    epochs = widths[:len(widths) // 4 * 4].view(4, -1).sort(1).values
    assert all(not torch.equal(epochs[i], epochs[j]) for i in range(4) for j in range(i))
    assert not torch.equal(epochs[0], runs[1][:epochs.shape[1]].sort().values)


# ---------------------------------------------------------------------------- rates and statistics
@pytest.mark.parametrize("protocol", ["linear", "augment", "finetune"])
def test_the_rate_is_a_cosine_and_grows_with_the_batch(protocol, world, tmp_path):
    """As logged: of the last step of each epoch. --drops: a tenth from there on."""
    flags = [flag for flag in PROTOCOLS[protocol] if "epochs" not in flag and "--lr" not in flag]
    evaluate(world, tmp_path / "cosine", *flags, "--epochs=4", "--lr=3.2")
    rates = [line["lr"] for line in json_lines(tmp_path / "cosine/log.jsonl")]
    last = [(3 * epoch - 1) / 12 for epoch in (1, 2, 3, 4)]
    assert rates == pytest.approx([0.1 * (1 + math.cos(math.pi * x)) / 2 for x in last])
    evaluate(world, tmp_path / "drops", *flags, "--epochs=4", "--lr=3.2", "--drops", 0.5)
    rates = [line["lr"] for line in json_lines(tmp_path / "drops/log.jsonl")]
    assert rates == pytest.approx([0.1, 0.1, 0.01, 0.01])


def test_both_rates_of_fine_tuning_and_its_batch_norm(world, tmp_path):
    """--backbone-lr 0: only running statistics change; --lr 0: the head stays 0."""
    before = torch.load(world / "last.pt")["model"]
    for name, rates in (("head", ["--lr=1", "--backbone-lr=0"]),
                        ("body", ["--lr=0", "--backbone-lr=1"]), ("both", ["--lr=1"])):
        more = ["--backbone-lr=1"] if name == "both" else []
        evaluate(world, tmp_path / name, "--protocol=finetune", "--labels=1", "--epochs=2", *rates,
                 *more)
        after = torch.load(tmp_path / name / "last.pt")["model"]
        head = torch.load(tmp_path / name / "head.pt")
        changed = [key for key in before if not torch.equal(before[key], after[key])
                   and "num_batches" not in key]
        assert any("running_mean" in key for key in changed)
        learned = any("running" not in key for key in changed)
        assert learned == (name == "both")         # a head of zeros sends no gradient
        assert head["weight"].any().item() == (name != "body")


def spy_on_sgd(monkeypatch):
    """The settings of each torch.optim.SGD that is made."""
    made, real = [], torch.optim.SGD

    def sgd(*arguments, **options):
        made.append(real(*arguments, **options))
        return made[-1]
    monkeypatch.setattr(torch.optim, "SGD", sgd)
    return made


@pytest.mark.parametrize("protocol", ["linear", "augment", "finetune"])
def test_momentum_without_weight_decay(protocol, world, tmp_path, monkeypatch):
    made = spy_on_sgd(monkeypatch)
    evaluate(world, tmp_path / "out", *PROTOCOLS[protocol][:2], "--epochs=1", "--lr=0.1")
    assert made and all(group["momentum"] == 0.9 and group["weight_decay"] == 0
                        for optimizer in made for group in optimizer.param_groups)


def test_the_probe_leaves_the_backbone_alone(world, tmp_path):
    before = (world / "last.pt").read_bytes()
    statistics = {}
    real = eval_linear.load_backbone

    def load_backbone(*arguments, **options):
        backbone, *rest = real(*arguments, **options)
        statistics["backbone"] = backbone
        statistics["before"] = {key: x.clone() for key, x in backbone.state_dict().items()}
        return backbone, *rest
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eval_linear, "load_backbone", load_backbone)
        evaluate(world, tmp_path / "out", *PROTOCOLS["augment"])
    after = statistics["backbone"].state_dict()
    assert all(torch.equal(x, after[key].cpu()) for key, x in statistics["before"].items())
    assert (world / "last.pt").read_bytes() == before


def test_features_are_standardised():
    """One of them a thousand times as large gives the same scores."""
    from types import SimpleNamespace
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(64, 6, generator=generator)
    labels = (features[:, 0] > 0).long()
    settings = SimpleNamespace(lr=8.0, epochs=5, batch_size=32, seed=0, optimizer="sgd", drops=[])
    scores = []
    for factor in (1.0, 30.0):
        x = features * torch.tensor([1, factor, 1, 1, 1, 1])
        head = eval_linear.linear_on_features(x, labels, 2, settings)
        scores.append(head(x))
    torch.testing.assert_close(scores[0], scores[1], atol=1e-3, rtol=1e-3)
