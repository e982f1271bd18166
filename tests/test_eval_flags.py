"""eval_linear.py and eval_detection.py from the flags to the result: each flag has its effect,
and what the optimisers do is computed by hand.

Most tests evaluate a network whose features are a picture's mean colour, on pictures of one colour
each: crops and flips leave them as they are, and every number can be predicted.
"""
import ast
import contextlib
import functools
import json
import math
import os
import re
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from running import call, end, json_lines, refusal, start_two

import eval_detection
import eval_linear
from support.augment import CLIP_MEAN, CLIP_STD
from support.command_line import Terminated, UserError
from support.networks import make_backbone
from support.pretrained import MEAN_STD, load_backbone
from support.processes import setup

MEAN, STD = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
COUNT, TESTS = 24, 4                               # coded pictures of the splits
AUGMENT = ["--augment", "--optimizer=sgd"]
FINETUNE = ["--protocol=finetune", "--labels=1"]


@pytest.fixture(scope="module", autouse=True)
def exact():
    """Single precision on every machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
        yield


# ---------------------------------------------------------------------------- networks and pictures
def colour_network():
    """The weights of a resnet10_narrow whose first six features are the positive and the negative
    parts of a picture's mean colour, normalised."""
    state = make_backbone("resnet10_narrow", 32)[0].state_dict()
    for name, weight in state.items():
        if weight.ndim != 4:                       # batch norm: the identity, as at the start
            continue
        weight.zero_()
        if name == "0.weight":
            for channel in range(3):
                weight[channel, channel, 1, 1] = 1.0
                weight[3 + channel, channel, 1, 1] = -1.0
        elif weight.shape[-1] == 1:                # shortcuts
            weight[range(16), range(16), 0, 0] = 1.0
    return state


def save_network(path, state, arch="resnet10_narrow"):
    """A last.pt as of a training run."""
    path.parent.mkdir(parents=True, exist_ok=True)
    args = {"arch": arch, "dataset": "folder", "image_size": 32}
    model = {f"query.backbone.{name}": x for name, x in state.items()}
    torch.save({"model": model, "args": args}, path)
    return path


def random_network(path, arch="resnet10_narrow", size=32):
    torch.manual_seed(0)
    return save_network(path, make_backbone(arch, size)[0].state_dict(), arch)


@pytest.fixture(scope="module")
def colours(tmp_path_factory):
    return save_network(tmp_path_factory.mktemp("colours") / "last.pt", colour_network())


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    return random_network(tmp_path_factory.mktemp("vit") / "last.pt", "vit_narrow")


@pytest.fixture(scope="module")
def resnet(tmp_path_factory):
    return random_network(tmp_path_factory.mktemp("resnet") / "last.pt")


def pixel(colour):
    """The pixel of a normalised colour, three numbers."""
    x = (torch.tensor(colour).view(3, 1, 1) * STD + MEAN) * 255
    return [round(v) for v in x.clamp(0, 255).flatten().tolist()]


def feature(value):
    """The features that colour_network gives a pixel: six numbers that may differ from 0."""
    x = ((torch.tensor(value).view(3, 1, 1) / 255 - MEAN) / STD).flatten()
    return torch.cat([x.relu(), (-x).relu()])


def save_flat(folder, **splits):
    """Writes pictures of one colour: split=[(class, pixel), ...]. Returns the folder."""
    for split, pictures in splits.items():
        for number, (name, value) in enumerate(pictures):
            path = Path(folder, split, name, f"{number:03d}.png")
            path.parent.mkdir(parents=True, exist_ok=True)
            content = np.full((8, 8, 3), value, dtype=np.uint8)
            Image.fromarray(content).save(path)
    return folder


def shades(bright, dark, count=6):
    """Pictures of a bright and of a dark class."""
    found = []
    for i in range(count):
        found += [(bright, [200 + 5 * i, 210, 190 + 4 * i]), (dark, [60 - 5 * i, 50, 70 - 4 * i])]
    return found


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    """Two folders with the same training pictures: the test labels agree, or are the other way
    round."""
    folder = tmp_path_factory.mktemp("sets")
    save_flat(folder / "agree", train=shades("cat", "dog"), test=shades("cat", "dog", 3))
    save_flat(folder / "other", train=shades("cat", "dog"), test=shades("dog", "cat", 3))
    return folder


@pytest.fixture(scope="module", params=[32, 80], ids=["memory", "files"])
def coded(request, tmp_path_factory):
    """Pictures that tell in their pixels what was done to them: red grows with x, green with y,
    blue is eight times the number; test pictures have the last numbers."""
    folder, size = tmp_path_factory.mktemp(f"coded{request.param}"), request.param
    y, x = np.mgrid[0:size, 0:size] * (248 // (size - 1))
    for number in range(COUNT + TESTS):
        path = folder / ("train" if number < COUNT else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = np.stack([x, y, np.full_like(x, 8 * number)], 2)
        Image.fromarray(content.astype(np.uint8)).save(path)
    return SimpleNamespace(folder=folder, size=size)


def told(view, size):
    """What a coded picture (3, S, S), as the network sees it, tells."""
    red, green, blue = (view * STD + MEAN) * 255
    step, side = 248 // (size - 1), view.shape[1]
    pixels = side / (side - 1) / step              # from a difference of colours to a length
    across = (red[:, -1] - red[:, 0]).mean().item() * pixels
    down = (green[-1] - green[0]).mean().item() * pixels
    return SimpleNamespace(
        number=round(blue.mean().item() / 8), mirrored=across < 0, ratio=abs(across) / down,
        area=abs(across) * down / size ** 2,
        box=(red.mean().item() / step, green.mean().item() / step, abs(across), down))


# --------------------------------------------------------------------------------------------- runs
@contextlib.contextmanager
def watched():
    """A list of the batches that networks see, as they come; in_training: in training mode?"""
    seen = []

    def look(module, inputs):
        if isinstance(module, torch.nn.Conv2d) and module.in_channels == 3:
            seen.append(inputs[0].detach().float().clone())
            seen[-1].in_training = module.training
    hook = torch.nn.modules.module.register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def evaluate(network, data, output, *flags):
    """What eval_linear.py writes, and the batches that the network saw."""
    with watched() as seen:
        call(eval_linear, "--checkpoint", network, "--dataset=folder", "--data-dir", data,
             "--device=cpu", "--workers=0", "--output-dir", output, *flags)
    return outcome(output, seen)


def outcome(output, seen=()):
    written = json.loads((output / "result.json").read_text())
    head, last = output / "head.pt", output / "last.pt"
    return SimpleNamespace(
        seen=seen, log=json_lines(output / "log.jsonl"), settings=written["settings"],
        results=written["results"], top1={k: x["top1"] for k, x in written["results"].items()},
        head=torch.load(head) if head.exists() else None,
        last=torch.load(last)["model"] if last.exists() else None)


# --------------------------------------------------------------------------- what is fitted on what
PROTOCOLS = {
    "linear": ["--epochs=4", "--lr=10"],
    "augmented": ["--augment", "--epochs=4", "--lr=10"],
    "knn": ["--protocol=knn", "--k=3"],
    "finetune": [*FINETUNE, "--epochs=4", "--lr=10", "--backbone-lr=0.01"]}


@pytest.mark.parametrize("arch, protocol", [
    ("vit", "linear"), ("vit", "augmented"), ("vit", "knn"), ("vit", "finetune"),
    ("colours", "linear"), ("colours", "augmented")])
def test_fitted_on_the_training_pictures_scored_on_the_test_pictures(
        arch, protocol, sets, tmp_path, request):
    """Test labels that contradict the training labels give 0%, others 100%."""
    network = request.getfixturevalue(arch)
    for folder, expected in (("agree", 100), ("other", 0)):
        run = evaluate(network, sets / folder, tmp_path / folder, "--k=3", *PROTOCOLS[protocol])
        assert run.top1 and set(run.top1.values()) == {expected}
        assert all(line.get("top1", expected) == expected for line in run.log[2:])


# ---------------------------------------------------------------------------------------------- kNN
def turned(axis, other, cosine):
    """A pixel whose normalised colour has this cosine with an axis of colour."""
    colour = [0.0, 0.0, 0.0]
    colour[axis] = 1.4 * cosine
    colour[other] = 1.4 * math.sqrt(1 - cosine ** 2)
    return pixel(colour)


@pytest.fixture(scope="module")
def neighbours(tmp_path_factory):
    """Two test pictures of class a, each with the same picture in class a and four of class b.
    Their cosine is such that b outvotes a where the temperature is above 0.12 or above 0.08."""
    folder = tmp_path_factory.mktemp("neighbours")
    train, test = [], []
    for axis, temperature in ((0, 0.12), (2, 0.08)):
        alone = turned(axis, 1, 1.0)
        near = turned(axis, 1, 1 - temperature * math.log(4))
        train += [("a", alone)] + [("b", near)] * 4
        test.append(("a", alone))
    return save_flat(folder, train=train, test=test)


def test_k_neighbours_vote_with_a_temperature_of_a_tenth(colours, neighbours, tmp_path):
    """The nearest alone is right; among five the four others win once, at 0.08 and not at 0.12."""
    for protocol in ("knn", "linear"):
        for k, expected in ((1, 100), (2, 100), (5, 50)):
            run = evaluate(colours, neighbours, tmp_path / f"{protocol}{k}", "--k", k, "--protocol",
                           protocol, *([] if protocol == "knn" else ["--epochs=1"]))
            assert run.top1["kNN"] == expected and run.settings["k"] == k


def test_200_neighbours_at_0_1_are_the_default():
    """100 of one class are the nearest, 99 of the other follow, then one more."""
    def around(count, angle):
        return torch.tensor([[math.cos(angle), math.sin(angle)]]).expand(count, 2)
    query, truth = around(1, 0.0), torch.tensor([1])
    for first, second, third, expected in ((99, 99, 3, 100.0), (100, 100, 50, 0.0),
                                           (99, 101, 0, 100.0), (99, 100, 1, 100.0)):
        train = torch.cat([around(first, 0.0), around(second, 1e-3), around(third, 2e-3)])
        labels = torch.tensor([0] * first + [1] * (second + third))
        usual = eval_linear.knn_accuracy([(train, labels)], query, truth, 2)
        assert usual == expected == eval_linear.knn_accuracy(
            [(train, labels)], query, truth, 2, k=200, temperature=0.1)
    assert eval_linear.knn_accuracy([(train, labels)], query, truth, 2, k=198) == 0


# ------------------------------------------------------------------------- pictures and their draws
def epochs_of(run, size, batch=8):
    """What the training pictures of each epoch tell, in order; and the test pictures."""
    assert all(len(x) == batch for x in run.seen if told(x[0], size).number < COUNT)
    everything = [told(x, size) for batch in run.seen for x in batch]
    train = [x for x in everything if x.number < COUNT]
    parts = [train[i:i + COUNT] for i in range(0, len(train), COUNT)]
    return parts, [x for x in everything if x.number >= COUNT]


ON_PICTURES = {"augmented": [*AUGMENT, "--lr=1"],
               "finetune": [*FINETUNE, "--lr=1", "--backbone-lr=0"]}


@pytest.mark.parametrize("flags", ON_PICTURES.values(), ids=ON_PICTURES)
def test_training_pictures_are_random_crops_test_pictures_the_centre(
        flags, coded, colours, tmp_path):
    """Crops of 8% to 100% of the area, of aspect ratios of 3/4 to 4/3, half of them mirrored; of a
    file the middle seven eighths are tested on."""
    size = coded.size
    run = evaluate(colours, coded.folder, tmp_path, "--image-size", size, "--batch-size=8",
                   "--epochs=4", *flags)
    epochs, tests = epochs_of(run, size)
    crops = sum(epochs, [])
    assert len(epochs) == 4
    for epoch in epochs:
        assert sorted(x.number for x in epoch) == list(range(COUNT))
    areas = [x.area for x in crops]
    assert 0.07 < min(areas) < 0.14 and 0.88 < max(areas) < 1.01
    assert 0.4 < sum(areas) / len(areas) < 0.6
    ratios = [x.ratio for x in crops]
    assert 0.7 < min(ratios) < 0.85 and 1.2 < max(ratios) < 1.4
    assert 0.35 < sum(x.mirrored for x in crops) / len(crops) < 0.65
    for place in (0, 1):                           # centres of the boxes, on either side
        assert min(x.box[place] for x in crops) < 0.35 * size
        assert max(x.box[place] for x in crops) > 0.65 * size
    assert sorted(x.number for x in tests) == list(range(COUNT, COUNT + TESTS))
    side = size if size == 32 else size * 7 / 8
    for x in tests:
        assert not x.mirrored
        assert x.box == pytest.approx(((size - 1) / 2, (size - 1) / 2, side, side), abs=0.7)


def alike(one, other):
    """Which of two lists of crops are of nearly the same box."""
    return sum(max(abs(a - b) for a, b in zip(x.box, y.box, strict=True)) < 0.5
               for x, y in zip(one, other, strict=True))


@pytest.mark.parametrize("flags", ON_PICTURES.values(), ids=ON_PICTURES)
def test_every_random_stream_is_new_in_each_epoch_and_with_the_seed(
        flags, coded, colours, tmp_path):
    """Order, boxes and flips, by place and by picture; the same seed draws the same."""
    size, runs = coded.size, []
    for number, seed in enumerate((0, 1, 0)):
        runs.append(evaluate(colours, coded.folder, tmp_path / str(number), "--image-size", size,
                             "--batch-size=8", "--epochs=2", "--seed", seed, *flags))
    assert all(map(torch.equal, runs[0].seen, runs[2].seen))
    (first, second), _ = epochs_of(runs[0], size)
    (other, _), _ = epochs_of(runs[1], size)
    for later in (second, other):
        assert [x.number for x in first] != [x.number for x in later]
        by_number = [sorted(epoch, key=lambda x: x.number) for epoch in (first, later)]
        for one, two in ((first, later), by_number):
            assert alike(one, two) < 0.2 * COUNT
            assert [x.mirrored for x in one] != [x.mirrored for x in two]
    for start in (8, 16):                          # and in each step
        assert alike(first[:8], first[start:start + 8]) < 3
        assert [x.mirrored for x in first[:8]] != [x.mirrored for x in first[start:start + 8]]


def test_the_probe_of_features_takes_them_in_the_order_of_the_seed(coded, colours, tmp_path):
    heads = []
    for number, seed in enumerate((0, 1, 0)):
        heads.append(evaluate(colours, coded.folder, tmp_path / str(number), "--batch-size=8",
                              "--image-size", coded.size, "--epochs=1", "--seed", seed).head)
    for name, value in heads[0].items():
        assert torch.equal(value, heads[2][name])
    assert any(not torch.equal(value, heads[1][name]) for name, value in heads[0].items())


@pytest.mark.parametrize("flags", [["--epochs=1"], *([*ON_PICTURES[name], "--epochs=1"]
                                                    for name in ON_PICTURES)])
@pytest.mark.parametrize("coded", [32], ids=["memory"], indirect=True)
def test_the_rate_is_that_of_the_batch_that_is_really_used(flags, coded, colours, tmp_path, capsys):
    """24 pictures with --batch-size 256: the rate for 256 is multiplied by 24 / 256."""
    for batch, real in ((256, 24), (8, 8)):
        run = evaluate(colours, coded.folder, tmp_path / str(batch), "--image-size", coded.size,
                       *flags, "--lr=2.56", "--drops=0.99", "--batch-size", batch)
        rate = 2.56 * real / 256
        assert run.log[0]["lr"] == pytest.approx(rate)
        assert (f"learning rate of the classifier: {rate:g} (2.56 for 256 images, the batch is "
                f"{real})") in capsys.readouterr().out


@pytest.mark.parametrize("flags", [[], ["--protocol=knn"], ["--protocol=finetune", "--labels=1"]])
@pytest.mark.parametrize("coded", [32], ids=["memory"], indirect=True)
def test_a_second_evaluation_never_replaces_another_one_s_result(flags, coded, colours, tmp_path):
    """The same one may; one of other settings or data is refused."""
    more = ["--image-size", coded.size, *flags]
    if "--protocol=knn" not in flags:
        more += ["--epochs=1", "--lr=0.1"]
    first = evaluate(colours, coded.folder, tmp_path / "out", *more)
    again = evaluate(colours, coded.folder, tmp_path / "out", *more, "--resume")
    assert again.results == first.results
    before = (tmp_path / "out/result.json").read_bytes()
    for other in (["--limit=16"], ["--seed=1"]):
        with pytest.raises(UserError, match="of another run"):
            evaluate(colours, coded.folder, tmp_path / "out", *more, "--resume", *other)
    assert (tmp_path / "out/result.json").read_bytes() == before


@pytest.mark.parametrize("coded", [32], ids=["memory"], indirect=True)
def test_too_few_labels_and_a_single_value_in_batch_norm_are_named(
        coded, colours, image_folder, tmp_path, capsys):
    (tmp_path / "one.txt").write_text("cat/0000.png\n")
    line = refusal(capsys, evaluate, colours, image_folder, tmp_path / "out", "--image-size=32",
                   "--protocol=finetune", "--labels-file", tmp_path / "one.txt", "--epochs=1")
    assert "1 labelled images are too few to fit a classifier" in line
    torch.save(make_backbone("resnet18", 224)[0].state_dict(), tmp_path / "large.pt")
    line = refusal(capsys, evaluate, tmp_path / "large.pt", image_folder, tmp_path / "bn",
                   "--image-size=32", "--protocol=finetune", "--labels=1", "--batch-size=1",
                   "--epochs=1")
    assert "batch normalisation sees a single value" in line


# ------------------------------------------------------------------------------- optimisers by hand
def flat_set(folder):
    """The features and labels of the training pictures of a set, in the order of their names."""
    found = []
    for label, name in enumerate(("cat", "dog")):
        for path in sorted((folder / "train" / name).iterdir()):
            found.append((feature(np.asarray(Image.open(path))[0, 0].tolist()), label))
    x = torch.stack([x for x, _ in found]).double()
    return F.pad(x, (0, 128 - x.shape[1])), torch.tensor([label for _, label in found])


def by_hand(x, labels, rates):
    """A linear classifier from 0 on, SGD with momentum 0.9, all pictures in each step: weight, bias
    and the losses before the steps."""
    w, b = torch.zeros(2, x.shape[1]).double(), torch.zeros(2).double()
    mu_w, mu_b, losses = torch.zeros_like(w), torch.zeros_like(b), []
    for lr in rates:
        logits = x @ w.T + b
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        losses.append(-p[range(len(x)), labels].log().mean().item())
        error = (p - F.one_hot(labels, 2)) / len(x)
        mu_w = 0.9 * mu_w + error.T @ x
        mu_b = 0.9 * mu_b + error.sum(0)
        w, b = w - lr * mu_w, b - lr * mu_b
    return w, b, losses


def cosine(peak, epochs):
    return [peak * (1 + math.cos(math.pi * i / epochs)) / 2 for i in range(epochs)]


SCHEDULES = {"cosine": ([], cosine(3.0, 4)), "no drops": (["--drops"], cosine(3.0, 4)),
             "drops": (["--drops", 0.25, 0.5], [3, 0.3, 0.03, 0.03])}


@pytest.mark.parametrize("flags, rates", SCHEDULES.values(), ids=SCHEDULES)
@pytest.mark.parametrize("augment", [False, True])
def test_the_probe_by_hand(flags, rates, augment, colours, sets, tmp_path):
    """The rate is 64 for 256 images, 3 for the 12 of a batch. On features computed once these are
    standardised: what hardly varies counts as if it varied by a hundredth of the mean."""
    run = evaluate(colours, sets / "agree", tmp_path, "--epochs=4", "--lr=64", "--batch-size=512",
                   "--augment" if augment else "--no-augment", *flags)
    x, labels = flat_set(sets / "agree")
    mean, scale = torch.zeros(128).double(), torch.ones(128).double()
    if not augment:
        std = x.std(0)
        std = std.maximum(0.01 * std.mean())
        mean, scale = x.mean(0), 1 / (std * math.sqrt(128))
    w, b, losses = by_hand((x - mean) * scale, labels, rates)
    assert [line["lr"] for line in run.log] == pytest.approx(rates)
    assert [line["loss"] for line in run.log] == pytest.approx(losses, abs=1e-5)
    assert losses[0] == pytest.approx(math.log(2)) and losses[-1] < 0.9 * losses[0]
    torch.testing.assert_close(run.head["weight"].double(), w * scale, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(run.head["bias"].double(), b - (w * scale) @ mean, atol=1e-4,
                               rtol=1e-4)


def test_the_logged_loss_is_the_mean_of_the_epoch(colours, sets, tmp_path):
    """With a random classifier that learns nothing: however the pictures are split into batches."""
    flags = ["--augment", "--optimizer=lars", "--lr=0", "--epochs=2", "--batch-size"]
    small, whole = ([line["loss"] for line in evaluate(
        colours, sets / "agree", tmp_path / str(size), *flags, size).log] for size in (2, 12))
    assert small == pytest.approx(whole, abs=1e-6) and abs(whole[0] - math.log(2)) > 1e-4


def test_the_size_of_a_feature_does_not_matter(colours, sets, tmp_path):
    """To the probe on features computed once, which are standardised."""
    state = colour_network()
    state["0.weight"][0] *= 1000
    other = save_network(tmp_path / "other/last.pt", state)
    flags = ["--epochs=4", "--lr=64"]
    one, two = (evaluate(network, sets / "agree", tmp_path / name, *flags)
                for network, name in ((colours, "one"), (other, "two")))
    for a, b in zip(one.log, two.log, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], abs=1e-5)
    assert one.log[-1]["loss"] < 0.6 and one.results["linear"] == two.results["linear"]
    ratio = one.head["weight"][:, 0] / two.head["weight"][:, 0]
    assert ratio.tolist() == pytest.approx([1000, 1000], rel=1e-3)


# -------------------------------------------------------------------------------------- fine-tuning
def flat_pictures(folder, split="train"):
    """The pictures of a set of flat pictures, normalised, (n, 3, 32, 32), and their labels."""
    found = []
    for label, name in enumerate(("cat", "dog")):
        for path in sorted((folder / split / name).iterdir()):
            value = torch.tensor(np.asarray(Image.open(path))[0, 0].tolist()).view(3, 1, 1) / 255
            found.append((((value - MEAN) / STD).expand(3, 32, 32), label))
    return torch.stack([x for x, _ in found]), torch.tensor([label for _, label in found])


@pytest.fixture(scope="module")
def mixed(tmp_path_factory):
    """12 training and 28 test pictures of colours that say nothing of the class."""
    generator = torch.Generator().manual_seed(0)
    colour = torch.randint(0, 256, (40, 3), generator=generator).tolist()
    named = [(("cat", "dog")[i * 7 % 5 % 2], value) for i, value in enumerate(colour)]
    return save_flat(tmp_path_factory.mktemp("mixed"), train=named[:12], test=named[12:])


def test_finetuning_by_hand(vit, mixed, tmp_path):
    """SGD with momentum 0.9 and no decay, at the rates of the head and the rest; positions stay."""
    run = evaluate(vit, mixed, tmp_path, *FINETUNE, "--epochs=3", "--batch-size=512",
                   "--lr", 0.04 * 256 / 12, "--backbone-lr", 0.02 * 256 / 12)
    backbone, head = load_backbone(vit)[0].eval(), torch.nn.Linear(96, 2)
    torch.nn.init.zeros_(head.weight)
    torch.nn.init.zeros_(head.bias)
    x, labels = flat_pictures(mixed)
    parameters = [(p, 0.02) for name, p in backbone.named_parameters() if "pos_emb" not in name]
    parameters += [(p, 0.04) for p in head.parameters()]
    for p, _ in parameters:
        p.requires_grad_(True)
    momenta, losses = [torch.zeros_like(p) for p, _ in parameters], []
    for share in cosine(1.0, 3):
        loss = F.cross_entropy(head(backbone(x)), labels)
        losses.append(loss.item())
        gradients = torch.autograd.grad(loss, [p for p, _ in parameters])
        with torch.no_grad():
            for (p, lr), mu, gradient in zip(parameters, momenta, gradients, strict=True):
                mu.mul_(0.9).add_(gradient)
                p -= share * lr * mu
    assert [line["lr"] for line in run.log] == pytest.approx(cosine(0.04, 3))
    assert [line["loss"] for line in run.log] == pytest.approx(losses, abs=1e-4)
    torch.testing.assert_close(run.head["weight"], head.weight.data, atol=1e-4, rtol=1e-3)
    tuned, before = (load_backbone(path)[0].state_dict() for path in (tmp_path / "last.pt", vit))
    for name, p in backbone.state_dict().items():
        assert torch.equal(p, before[name]) == ("pos_emb" in name)
        torch.testing.assert_close(tuned[name], p, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("lr, backbone_lr", [(1, 0), (0, 1)])
def test_each_rate_of_finetuning_can_be_0(lr, backbone_lr, resnet, sets, tmp_path):
    """A head that stays 0 gives the rest no gradient: nothing decays."""
    run = evaluate(resnet, sets / "agree", tmp_path, *FINETUNE, "--epochs=2", "--lr", lr,
                   "--backbone-lr", backbone_lr)
    assert run.head["weight"].any() == bool(lr)
    tuned, before = (load_backbone(path)[0] for path in (tmp_path / "last.pt", resnet))
    for p, q in zip(tuned.parameters(), before.parameters(), strict=True):
        assert torch.equal(p, q)


def test_batch_norm_trains_while_finetuning_and_not_in_evaluation(resnet, mixed, tmp_path):
    """Its statistics move by a tenth of the batch's; features are those in evaluation mode."""
    run = evaluate(resnet, mixed, tmp_path / "run", *FINETUNE, "--epochs=1", "--batch-size=12",
                   "--lr=1", "--backbone-lr=0.2")
    tuned, before = (load_backbone(path)[0] for path in (tmp_path / "run/last.pt", resnet))
    x, _ = flat_pictures(mixed)
    mean = before[0](x).mean((0, 2, 3))
    torch.testing.assert_close(tuned[1].running_mean, 0.1 * mean, atol=1e-4, rtol=1e-3)
    assert [x.in_training for x in run.seen] == [True, False]
    for number, flags in enumerate((["--epochs=1"], ["--augment", "--epochs=1"],
                                    ["--protocol=knn"])):
        run = evaluate(resnet, mixed, tmp_path / str(number), *flags)
        assert len(run.seen) >= 2 and not any(x.in_training for x in run.seen)


# ---------------------------------------------------------------------------- labels of fine-tuning
def seen_training(run):
    """The training pictures that a fine-tuning on flat pictures saw: their first pixels. The test
    pictures are the last batch."""
    batches = run.seen[:-1]
    return {tuple(x[:, 0, 0].mul(100).round().tolist()) for batch in batches for x in batch}


def test_only_the_labelled_pictures_are_learned_from(vit, sets, tmp_path):
    """--labels: a share of each class, drawn by the seed. --labels-file: those of a list; the
    labels of every second pair of pictures are wrong."""
    flags = ["--protocol=finetune", "--epochs=4", "--lr=10", "--backbone-lr=0.01"]
    train = [(name if i // 2 % 2 == 0 else {"cat": "dog", "dog": "cat"}[name], value)
             for i, (name, value) in enumerate(shades("cat", "dog"))]
    data = save_flat(tmp_path / "data", train=train, test=shades("cat", "dog", 3))
    for rest, expected in ((0, 100), (1, 0)):
        listed = tmp_path / f"{rest}.txt"
        listed.write_text("\n".join(f"{i:03d}.png" for i in range(12) if i // 2 % 2 == rest))
        run = evaluate(vit, data, tmp_path / str(rest), *flags, "--labels-file", listed)
        assert run.results["finetune"]["labelled_images"] == 6
        assert run.top1["finetune"] == expected
    chosen = []
    for share, count, seed in ((0.01, 2, 0), (0.5, 6, 0), (0.5, 6, 1), (1, 12, 0)):
        run = evaluate(vit, sets / "agree", tmp_path / f"{share}-{seed}", *flags[:1], "--epochs=1",
                       "--labels", share, "--seed", seed, "--batch-size=2")
        assert run.results["finetune"]["labelled_images"] == count
        chosen.append(seen_training(run))
    assert [len(x) for x in chosen] == [2, 6, 6, 12] and chosen[1] != chosen[2]
    assert all(sum(value[0] > 0 for value in x) == len(x) / 2 for x in chosen)     # of each class


# ------------------------------------------------------------------------------------ two processes
@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Files of 80 pixels that are the same mirrored, and a vision transformer for them: two
    processes see what one sees."""
    folder = tmp_path_factory.mktemp("rows")
    for number in range(COUNT + TESTS):
        path = folder / ("train" if number < COUNT else "test") / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = np.zeros((80, 80, 3), dtype=np.uint8)
        content[:, :, 1] = np.arange(80)[:, None] * (3 if number % 2 else 2)
        content[:, :, 2] = 8 * number
        Image.fromarray(content).save(path)
    random_network(folder / "last.pt", "vit_narrow", 80)
    return folder


def numbers(run):
    """The numbers of the training pictures in each batch."""
    found = [[round(((x * STD + MEAN)[2].mean() * 255 / 8).item()) for x in batch]
             for batch in run.seen]
    return [batch for batch in found if batch[0] < COUNT]


def test_two_processes_train_like_one(rows, tmp_path):
    """The same batches, in equal shares, and the same classifier."""
    common = ["--epochs=2", "--batch-size=8", "--image-size=80", "--seed=3"]
    protocols = {"finetune": [*FINETUNE, "--lr=1", "--backbone-lr=0.1", *common],
                 "augmented": [*AUGMENT, "--lr=1", *common]}
    forks = []
    for name, flags in protocols.items():
        def work(rank, name=name, flags=flags):
            with watched() as seen:
                call(eval_linear, "--checkpoint", rows / "last.pt", "--dataset=folder",
                     "--data-dir", rows, "--device=cpu", "--workers=0", "--output-dir",
                     tmp_path / name, *flags)
            (tmp_path / f"{name}-{rank}.json").write_text(json.dumps(
                numbers(SimpleNamespace(seen=seen))))
        (tmp_path / f"log-{name}").mkdir()
        forks += start_two([lambda work=work: work(0), lambda work=work: work(1)],
                           tmp_path / f"log-{name}")
    singles = {name: evaluate(rows / "last.pt", rows, tmp_path / f"{name}-1-process", *flags)
               for name, flags in protocols.items()}
    assert end(*forks) == [0] * 4
    for name, one in singles.items():
        two = outcome(tmp_path / name)
        shares = [json.loads((tmp_path / f"{name}-{rank}.json").read_text()) for rank in (0, 1)]
        assert [len(share) for share in shares] == [6, 6]
        assert [a + b for a, b in zip(*shares, strict=True)] == numbers(one)
        assert all(len(batch) == 4 for share in shares for batch in share)
        for key, x in one.head.items():
            assert x.any()
            torch.testing.assert_close(two.head[key], x, atol=1e-4, rtol=1e-3)
        assert two.results == one.results
        for a, b in zip(one.log, two.log, strict=True):
            assert a == pytest.approx(b, abs=1e-4)
    tuned = [load_backbone(tmp_path / name / "last.pt")[0].state_dict()
             for name in ("finetune", "finetune-1-process")]
    for key, x in tuned[0].items():
        torch.testing.assert_close(x, tuned[1][key], atol=1e-4, rtol=1e-3)


# -------------------------------------------------------------------------- flags of eval_linear.py
def labelled_images(run):
    return [result["labelled_images"] for result in run.results.values()]


def side(run):
    return run.seen[0].shape[-1]


def rates(run):
    return [line["lr"] for line in run.log]


def moved(run, network):
    """How far fine-tuning moved the network's first weights."""
    tuned, before = (load_backbone(path)[0][0].weight for path in (run.output / "last.pt", network))
    return (tuned - before).abs().max().item()


# Flag: flags of both runs, flags of either, and what they say: a function of a run that gives these
# two values. Or the name of a test that mentions the flag.
PIXELS = ["--augment", "--epochs=1", "--batch-size=12"]
LINEAR_FLAGS = {
    "--checkpoint": (["--epochs=1"], ["--checkpoint={vit}"], ["--checkpoint={colours}"],
                     lambda run: run.head["weight"].shape[1], 96, 128),
    "--arch": "test_eval_linear.py::test_refusals_are_one_line",
    "--heads": "test_eval_flags.py::test_heads_branch_and_mean_std",
    "--branch": "test_eval_flags.py::test_heads_branch_and_mean_std",
    "--mean-std": "test_eval_flags.py::test_heads_branch_and_mean_std",
    "--dataset": (["--epochs=1", "--image-size=32"], ["--dataset=folder"], ["--dataset=imagenet"],
                  lambda run: run.settings["augment"], False, True),
    "--data-dir": (["--protocol=knn", "--k=3"], ["--data-dir={sets}/agree"],
                   ["--data-dir={sets}/other"], lambda run: run.top1["kNN"], 100, 0),
    "--image-size": (PIXELS, [], ["--image-size=24"], side, 32, 24),
    "--limit": (["--epochs=1"], ["--limit=4"], ["--limit=2"],
                lambda run: labelled_images(run) + [len(x) for x in run.seen],
                [4, 4, 4, 4], [2, 2, 2, 2]),
    "--skip-bad": "test_eval_flags.py::test_skip_bad",
    "--protocol": ([], ["--protocol=linear"], ["--protocol=knn"],
                   lambda run: [*run.results], ["kNN", "linear"], ["kNN"]),
    "--labels": "test_eval_flags.py::test_only_the_labelled_pictures_are_learned_from",
    "--labels-file": "test_eval_flags.py::test_only_the_labelled_pictures_are_learned_from",
    "--k": "test_eval_flags.py::test_k_neighbours_vote_with_a_temperature_of_a_tenth",
    "--epochs": (["--lr=1"], ["--epochs=2"], ["--epochs=5"], lambda run: len(run.log), 2, 5),
    "--batch-size": (["--augment", "--epochs=1"], ["--batch-size=4"], ["--batch-size=6"],
                     lambda run: [len(x) for x in run.seen[1:]], [4, 4, 4], [6, 6]),
    "--optimizer": ([*PIXELS, "--lr=0"], ["--optimizer=sgd"], ["--optimizer=lars"],
                    lambda run: round(run.head["weight"].std().item(), 3), 0.0, 0.01),
    "--lr": ([*PIXELS, "--batch-size=8"], ["--lr=32"], ["--lr=96"], rates, [1], [3]),
    "--backbone-lr": ([*FINETUNE, "--epochs=3", "--lr=1"], ["--backbone-lr=0"],
                      ["--backbone-lr=0.1"], lambda run: moved(run, run.network) > 0, False, True),
    "--drops": (["--epochs=2", "--lr=32", "--batch-size=8"], ["--drops=0.5"], ["--drops"],
                lambda run: [round(x, 9) for x in rates(run)], [1, 0.1], [1, 0.5]),
    "--augment": (["--epochs=1", "--lr=1"], [], ["--augment"], lambda run: [*run.results],
                  ["kNN", "linear"], ["linear"]),
    "--no-augment": (["--dataset=imagenet", "--epochs=1", "--image-size=32"], [], ["--no-augment"],
                     lambda run: [*run.results], ["linear"], ["kNN", "linear"]),
    "--output-dir": "test_eval_flags.py::test_output_dir_and_resume",
    "--resume": "test_eval_flags.py::test_output_dir_and_resume",
    "--device": "test_eval_flags.py::test_device_and_workers",
    "--workers": "test_eval_flags.py::test_device_and_workers",
    "--seed": "test_eval_flags.py::test_every_random_stream_is_new_in_each_epoch_and_with_the_seed"}


def names_of(table, kind):
    return [flag for flag, row in table.items() if isinstance(row, kind)]


@pytest.mark.parametrize("flag", names_of(LINEAR_FLAGS, tuple))
def test_another_value_gives_another_result(flag, vit, colours, sets, tmp_path):
    common, one, two, say, *expected = LINEAR_FLAGS[flag]
    for number, (flags, value) in enumerate(zip((one, two), expected, strict=True)):
        places = {"vit": vit, "colours": colours, "sets": sets}
        flags = [flag.format(**places) for flag in [*common, *flags]]
        output = tmp_path / str(number)
        run = evaluate(colours, sets / "agree", output, *flags)
        run.output, run.network = output, colours
        assert say(run) == value


@functools.cache
def functions_in(file):
    """{name: text with decorators} of the functions in a file of this folder."""
    text = (Path(__file__).parent / file).read_text()
    found = [node for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)]
    lines = text.splitlines()
    starts = [min(x.lineno for x in [node, *node.decorator_list]) - 1 for node in found]
    return {node.name: "\n".join(lines[start:node.end_lineno])
            for node, start in zip(found, starts, strict=True)}


def check_table(module, table, capsys):
    """Each flag of the script has a row, and each row that names a test names one that is there and
    mentions the flag."""
    with pytest.raises(SystemExit):
        call(module, "--help")
    columns = re.findall(r"(?m)^  (-.*?)(?:  |$)", capsys.readouterr().out)
    offered = set(re.findall(r"--[a-z][a-z-]*", "\n".join(columns)))
    assert offered - {"--help"} == set(table)
    for flag in names_of(table, str):
        file, _, name = table[flag].partition("::")
        text = functions_in(file)[name]
        assert re.search(rf"{flag}(?![\w-])", text), f"{table[flag]} does not mention {flag}"


def test_every_flag_has_a_row(capsys):
    check_table(eval_linear, LINEAR_FLAGS, capsys)


def test_heads_branch_and_mean_std(vit, mixed, tmp_path):
    """--heads: other features. --branch: another network of the file. --mean-std: the same
    pictures, normalised by other numbers."""
    def run(network, *flags):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        return evaluate(network, mixed, folder, "--epochs=2", "--lr=1", "--image-size=32", *flags)
    three, four = (run(vit, "--heads", heads) for heads in (3, 4))
    assert three.log[0]["loss"] == pytest.approx(math.log(2))
    assert not torch.equal(three.head["weight"], four.head["weight"])
    student = make_backbone("vit_narrow", 32)[0]
    student.load_state_dict(load_backbone(vit)[0].state_dict())
    states = {"student": student.state_dict(),
              "teacher": make_backbone("vit_narrow", 32)[0].state_dict()}
    torch.save({f"{name}.{key}": x for name, state in states.items() for key, x in state.items()},
               tmp_path / "two.pt")
    clip = run(tmp_path / "two.pt", "--branch=student", "--mean-std=clip")
    assert torch.equal(clip.head["weight"], three.head["weight"])
    other = run(tmp_path / "two.pt", "--branch=teacher", "--mean-std=clip")
    assert not torch.equal(clip.head["weight"], other.head["weight"])
    half = run(tmp_path / "two.pt", "--branch=student", "--mean-std=half")
    for a, b in zip(clip.seen, half.seen, strict=True):
        torch.testing.assert_close(a * STD + MEAN, b * 0.5 + 0.5)


@pytest.mark.parametrize("size", [32, 80])
def test_skip_bad(size, colours, sets, tmp_path, capsys):
    """An unreadable picture is left out and counted; without the flag it is named."""
    data = save_flat(tmp_path / "data", train=shades("cat", "dog"), test=shades("cat", "dog", 3))
    (data / "train/cat/000.png").write_bytes(b"no picture")
    flags = [*AUGMENT, "--epochs=1", "--lr=1", "--image-size", size]
    said = refusal(capsys, evaluate, colours, data, tmp_path / "0", *flags)
    assert "000.png cannot be read" in said and "--skip-bad" in said
    run = evaluate(colours, data, tmp_path / "1", *flags, "--skip-bad")
    assert labelled_images(run) == [11] and sum(map(len, run.seen[1:])) == 11
    assert "labelled images, 1 unreadable images left out" in capsys.readouterr().out


def test_output_dir_and_resume(colours, sets, tmp_path, capsys):
    """--output-dir, by default beside the checkpoint; --resume goes on from there."""
    network = save_network(tmp_path / "run/last.pt", colour_network())
    flags = ["--checkpoint", network, "--data-dir", sets / "agree", "--device=cpu", "--epochs=2",
             "--augment"]
    call(eval_linear, *flags)
    first = outcome(tmp_path / "run/linear")
    call(eval_linear, *flags, "--output-dir", tmp_path / "there")
    assert outcome(tmp_path / "there").log == first.log and len(first.log) == 2
    assert "--resume" in refusal(capsys, call, eval_linear, *flags)
    with watched() as seen:
        call(eval_linear, *flags, "--resume")
    assert "goes on after epoch 2" in capsys.readouterr().out
    assert len(seen) == 1 and len(seen[0]) == 6    # the test pictures alone: nothing was trained


def loaders(monkeypatch):
    """A list of the numbers of processes that the loaders from now on have."""
    found, start = [], torch.utils.data.DataLoader.__init__

    def noting(self, *arguments, num_workers=0, **options):
        found.append(num_workers)
        start(self, *arguments, num_workers=0, **options)
    monkeypatch.setattr(torch.utils.data.DataLoader, "__init__", noting)
    return found


def test_device_and_workers(colours, sets, tmp_path, monkeypatch, capsys):
    """--device that is not there is named; --workers is the number of processes that read files."""
    said = refusal(capsys, evaluate, colours, sets / "agree", tmp_path, "--device=meta")
    assert "--device meta is not available" in said
    found = loaders(monkeypatch)
    for number, flags in enumerate(
            (["--epochs=1"], PIXELS, [*FINETUNE, "--epochs=1"], ["--protocol=knn"])):
        before = len(found)
        evaluate(colours, sets / "agree", tmp_path / str(number), "--image-size=80", "--workers=3",
                 *flags)
        assert found[before:] == [3, 3]


# ----------------------------------------------------------------------- flags of eval_detection.py
class Detector(torch.nn.Module):
    """In the place of Mask R-CNN: its loss is the pictures' mean times one weight."""
    made = []

    def __init__(self, backbone, num_classes, **options):
        super().__init__()
        self.backbone, self.weight = backbone, torch.nn.Parameter(torch.tensor(1.0))
        self.options, self.seen = options, []
        backbone.requires_grad_(False)             # DDP would wait for gradients
        Detector.made.append(self)

    def forward(self, pictures, targets=None):
        if targets is None:
            return [{"boxes": torch.zeros(0, 4), "labels": torch.zeros(0), "masks": torch.zeros(0),
                     "scores": torch.zeros(0)} for _ in pictures]
        self.seen.append([(*told_by(x), t["boxes"][0].tolist())
                          for x, t in zip(pictures, targets, strict=True)])
        mean = torch.stack([x.mean() for x in pictures]).mean()
        return {"one": self.weight * mean, "two": 0.5 * self.weight * mean}


def told_by(picture):
    """The number of a picture of coco, and whether it is mirrored."""
    return round((picture[0, 0, 0].item() * 255) / 10), (picture[1, 0, 0] > 0).item()


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """8 training and 2 test pictures of 20 x 10 pixels with one object on the left: red tells their
    number, the right half is green."""
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    folder = tmp_path_factory.mktemp("coco")
    (folder / "annotations").mkdir()
    for split, count in (("train", 8), ("val", 2)):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            content = np.zeros((10, 20, 3), dtype=np.uint8)
            content[..., 0] = 10 * i
            content[:, 10:, 1] = 200
            Image.fromarray(content).save(folder / f"{split}2017/{i}.png")
            images.append(dict(id=i, file_name=f"{i}.png", height=10, width=20))
            annotations.append(dict(id=i + 1, image_id=i, category_id=1, iscrowd=0, area=15,
                                    bbox=[1, 2, 3, 5], segmentation=[[1, 2, 4, 2, 4, 7, 1, 7]]))
        text = json.dumps(dict(images=images, annotations=annotations,
                               categories=[dict(id=1, name="a")]))
        (folder / f"annotations/instances_{split}2017.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def resnets(tmp_path_factory):
    """A folder with one network and with two in one file, each a branch; their first weights."""
    folder, states = tmp_path_factory.mktemp("resnets"), {}
    for name in ("student", "teacher"):
        states[name] = make_backbone("resnet18", 224)[0].state_dict()
    torch.save(states["student"], folder / "one.pt")
    torch.save({f"{name}.{key}": x for name, state in states.items() for key, x in state.items()},
               folder / "two.pt")
    return folder, {name: state["conv1.weight"] for name, state in states.items()}


@pytest.fixture
def detect(coco, resnets, tmp_path, monkeypatch):
    """A function that runs eval_detection.py with flags."""
    monkeypatch.setattr(eval_detection, "MaskRCNN", Detector)

    def run(*flags, output=None):
        output = output or tmp_path / str(len(list(tmp_path.iterdir())))
        call(eval_detection, "--backbone", resnets[0] / "one.pt", "--data-dir", coco, "--workers=0",
             "--device=cpu", "--output-dir", output, *flags)
        return SimpleNamespace(
            log=json_lines(output / "log.jsonl")[:-1], model=Detector.made[-1], output=output,
            seen=Detector.made[-1].seen)
    return run


def test_detection_by_hand(detect, coco):
    """--steps, --lr, --batch-size: a warm-up, here over all steps, a tenth after 2/3 and 8/9; SGD
    with momentum 0.9 and decay 0.0001. --log-every: means of so many steps."""
    for batch, peak in ((2, 0.5), (4, 1.0)):
        run = detect("--steps=9", "--lr=4", "--batch-size", batch, "--log-every=2", "--seed=5")
        lr = [peak * (i + 1) / 9 * (1 if i < 6 else 0.1 if i < 8 else 0.01) for i in range(9)]
        weight, momentum, losses = 1.0, 0.0, []
        for rate, pairs in zip(lr, run.seen, strict=True):
            assert len(pairs) == batch
            mean = sum((10 * number + 100) / 255 / 3 for number, *_ in pairs) / batch
            losses.append(1.5 * weight * mean)
            momentum = 0.9 * momentum + 1.5 * mean + 1e-4 * weight
            weight -= rate * momentum
        assert run.model.weight.item() == pytest.approx(weight, abs=1e-5)
        assert [line["step"] for line in run.log] == [2, 4, 6, 8, 9]
        assert [line["lr"] for line in run.log] == pytest.approx([lr[i] for i in (1, 3, 5, 7, 8)])
        means = [(losses[i] + losses[i + 1]) / 2 for i in (0, 2, 4, 6)] + losses[8:]
        assert [line["loss"] for line in run.log] == pytest.approx(means, abs=1e-5)
        assert run.log[0]["one"] == pytest.approx(means[0] / 1.5)
        assert torch.load(run.output / "last.pt")["step"] == 9


def test_detection_sees_pictures_in_the_order_of_the_seed_and_half_mirrored(detect):
    """--seed: each picture once an epoch, order and flips new in each; boxes go with them.
    --limit: the first pictures."""
    runs = [detect("--steps=8", "--batch-size=2", "--lr=0.1", "--seed", seed).seen
            for seed in (0, 1)]
    told = [[x for pairs in seen for x in pairs] for seen in runs]
    for epoch in (told[0][:8], told[0][8:], told[1][:8]):
        assert sorted(number for number, *_ in epoch) == list(range(8))
        for _, flipped, box in epoch:
            assert box == ([16, 2, 19, 7] if flipped else [1, 2, 4, 7])
    for other in (told[0][8:], told[1][:8]):
        assert [x[0] for x in told[0][:8]] != [x[0] for x in other]
        assert [x[1] for x in told[0][:8]] != [x[1] for x in other]
        assert [x[1] for x in sorted(told[0][:8])] != [x[1] for x in sorted(other)]
    assert 8 <= sum(flipped for found in told for _, flipped, _ in found) <= 24
    limited = detect("--steps=4", "--batch-size=2", "--limit=3").seen
    assert {number for pairs in limited for number, *_ in pairs} <= {0, 1, 2}


def test_detection_saves_and_goes_on(detect, tmp_path, monkeypatch):
    """--save-minutes: a killed run has a last.pt in --output-dir where they passed, and goes on.
    SIGTERM: it saves, whatever the minutes. No line of the log is there twice."""
    flags = ["--steps=6", "--batch-size=2", "--lr=1", "--seed=2", "--log-every=1"]
    whole = detect(*flags)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL          # after the training it ends

    def stopped(act, minutes, output, ending):
        """A run in which act() is called before the third of its steps."""
        forward = Detector.forward

        def stops(self, pictures, targets=None):
            if len(self.seen) == 2:
                act()
            return forward(self, pictures, targets)
        with monkeypatch.context() as patch, pytest.raises(ending) as error:
            patch.setattr(Detector, "forward", stops)
            detect(*flags, "--save-minutes", minutes, output=output)
        return str(error.value)

    def kill():
        raise KeyboardInterrupt
    for minutes, saved in ((60, False), (0, True)):
        cut = tmp_path / f"cut{minutes}"
        stopped(kill, minutes, cut, KeyboardInterrupt)
        assert (cut / "last.pt").exists() == saved
    said = stopped(lambda: os.kill(os.getpid(), signal.SIGTERM), 60, cut, Terminated)
    assert said == f"terminated after saving {cut}/last.pt; the same command goes on"
    assert torch.load(cut / "last.pt")["step"] == 5
    with open(cut / "log.jsonl", "a") as log:      # of steps after the checkpoint, cut by a kill
        log.write('{"step": 6, "loss": 1.0}\n{"step": 7, "lo')
    run = detect(*flags, output=cut)
    assert run.seen == whole.seen[5:] and run.log == whole.log
    assert run.model.weight.item() == pytest.approx(whole.model.weight.item(), abs=1e-7)


def test_detection_has_no_search_for_algorithms(detect):
    """cuDNN would search anew for each shape of a padded batch."""
    setup("cpu")
    assert torch.backends.cudnn.benchmark
    detect("--steps=1", "--batch-size=2", "--lr=0")
    assert not torch.backends.cudnn.benchmark


def test_detection_takes_the_network_that_flags_name(detect, resnets, coco, monkeypatch, capsys):
    """--backbone, --arch, --branch, --mean-std, --workers, --data-dir, --device."""
    short = ["--steps=1", "--batch-size=2"]
    found = loaders(monkeypatch)
    for branch, mean_std in (("student", "half"), ("teacher", "clip")):
        run = detect(*short, "--backbone", resnets[0] / "two.pt", "--branch", branch, "--mean-std",
                     mean_std, "--workers=3", "--lr=0")
        weights = run.model.backbone.body.conv1.weight.data
        assert torch.equal(weights, resnets[1][branch])
        options = run.model.options
        assert (options["image_mean"], options["image_std"]) == MEAN_STD[mean_std]
        # torchvision draws one of the short sides and evaluates at the last.
        assert options["min_size"] == (640, 672, 704, 736, 768, 800)
        assert options["max_size"] == 1333
    assert found == [3] * 4
    for flags, message in ((["--arch=resnet50"], "another architecture"),
                           (["--device=meta"], "--device meta is not available"),
                           (["--backbone=none.pt"], "none.pt cannot be loaded"),
                           (["--data-dir", coco / "none"], "none/annotations.*is missing")):
        assert re.search(message, refusal(capsys, detect, *short, *flags))


def test_two_processes_detect_as_one(detect, tmp_path):
    """Their gradients are means over both, their shares halves of each batch."""
    flags = ["--steps=3", "--batch-size=4", "--lr=4", "--seed=1"]
    one = detect(*flags, output=tmp_path / "one").model

    def work():
        detect(*flags, output=tmp_path / "two")
    assert end(*start_two([work] * 2, tmp_path)) == [0, 0]
    two = torch.load(tmp_path / "two/last.pt")["model"]["weight"]
    assert two.item() == pytest.approx(one.weight.item(), abs=1e-6) and two.item() < 0.9


HAND = "test_eval_flags.py::test_detection_by_hand"
ORDER = ("test_eval_flags.py::"
         "test_detection_sees_pictures_in_the_order_of_the_seed_and_half_mirrored")
SAVES = "test_eval_flags.py::test_detection_saves_and_goes_on"
DETECTION_FLAGS = {flag: test for test, flags in {
    HAND: ["--steps", "--lr", "--batch-size", "--log-every"], ORDER: ["--seed", "--limit"],
    SAVES: ["--save-minutes", "--output-dir"],
    "test_eval_flags.py::test_detection_takes_the_network_that_flags_name": [
        "--backbone", "--arch", "--branch", "--mean-std", "--workers", "--data-dir", "--device"]
}.items() for flag in flags}


def test_every_flag_of_detection_has_a_row(capsys):
    check_table(eval_detection, DETECTION_FLAGS, capsys)
