"""What connects the parts: from the disk to the step, from the step to weights, rates and the log.

Beside test_whole.py and test_networks.py: independence of the random decisions, which view belongs
to which picture, quality by hand, the optimisers and the moving average in a run.
"""
import json
import math
import shutil
from itertools import combinations
from pathlib import Path

import coded
import numpy as np
import pytest
import torch
from coded import COUNT, decoded, pixels_of, record
from PIL import Image
from running import call, json_lines
from torch import nn

import genview
import shapes
import train_byol
import train_moco
import train_swav
from quality_loss import fit_foreground, pair_quality
from support.augment import normalise

V2 = ["--queue=16", "--start-batches=0"]
HIDDEN = ["--hidden=10", "--dim=7", "--optimizer=sgd"]
V3 = ["--method=mocov3", *HIDDEN]
SIMSIAM = ["--method=simsiam", *HIDDEN]
SWAV = [*HIDDEN, "--prototypes=4", "--small-size=16", "--small-crops=0"]
WHOLE = "--crop-min=1"                             # then a view shows the whole picture


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Coded pictures and their views, and pictures of one colour, by (flat, side)."""
    folder = tmp_path_factory.mktemp("step")
    return {(flat, size): coded.save(folder / f"{flat}{size}", size, flat=flat)
            for flat in (False, True) for size in (32, 80)}


@pytest.fixture(params=[32, 80], ids=["memory", "files"])
def size(request):
    return request.param


def flags_of(folder, output, size, *more):
    return coded.flags_of(folder, output, size, "--arch=resnet10_narrow", "--precision=float32",
                          *more)


def told(steps, size, views=(0, 1)):
    """For each sample of the steps, what each of its views tells."""
    return [tuple(decoded(step.views[v][i], size) for v in views)
            for step in steps for i in range(len(step.views[0]))]


def same_box(one, other):
    return max(abs(a - b) for a, b in zip(one.box, other.box, strict=True)) < 0.5


# ----------------------------------------------------------------- random decisions of the views
def test_the_decisions_of_a_pair_are_independent(folders, size, tmp_path):
    """Side of the generated view, flips, places and areas: of each other, of those of the next
    pair, and of those of the same place in the next batch."""
    folder = folders[False, size]
    steps = record(train_moco, *flags_of(
        folder, tmp_path, size, *V2, "--views-dir", folder / "views", "--quality=off",
        "--epochs=8", "--crop-min=0.3"))
    rows = []
    for one, two in told(steps, size):
        assert one.generated != two.generated
        rows.append([one.generated])
        for view in (one, two):
            across, down, width, height = view.box
            rows[-1] += [view.mirrored, across, down, view.area, width / height]
    table = np.array(rows, float)
    count = table.shape[1]
    bound = 4.5 / len(table) ** 0.5
    among = np.corrcoef(table.T) - np.eye(count)
    assert np.abs(among).max() < bound
    for lag in (1, 8):
        both = np.corrcoef(table[:-lag].T, table[lag:].T)
        assert np.abs(both[:count, count:]).max() < bound


def test_seed_epoch_and_step_are_not_exchanged(folders, size, tmp_path):
    """Seed 0 in epoch 1 is not seed 1 in epoch 0; step 1 of epoch 0 is not step 0 of epoch 1."""
    folder = folders[False, size]
    boxes, decisions, orders = [], [], []
    for seed in (0, 1, 2):
        steps = record(train_moco, *flags_of(
            folder, tmp_path / str(seed), size, *V2, "--views-dir", folder / "views",
            "--quality=off", "--crop-min=0.2", "--epochs=3", "--seed", seed))
        for epoch in range(3):
            found = told(steps[3 * epoch:][:3], size)
            orders.append(tuple(a.picture for a, _ in found))
            boxes.append({a.picture: a for a, _ in found})
            batches = np.array([(a.mirrored, b.mirrored, a.generated) for a, b in found])
            decisions += list(batches.reshape(3, 8, 3))
    assert len(set(orders)) == len(orders)
    for one, other in combinations(boxes, 2):
        assert sum(same_box(one[key], other[key]) for key in one) < 0.2 * COUNT
    for column in range(3):                        # flips of view 1, of view 2, the generated side
        different = {tuple(batch[:, column]) for batch in decisions}
        assert len(different) > 0.75 * len(decisions)


def test_colours_are_new_for_each_view_picture_step_epoch_and_seed(folders, size, tmp_path):
    """Of pictures of one and the same colour; a fifth of the views keeps it, or is grey instead."""
    folder = shutil.copytree(folders[True, size], tmp_path / "data")
    for path in (folder / "images").rglob("*.png"):
        Image.new("RGB", (size, size), (180, 60, 90)).save(path)
    found = []
    for seed in (0, 1):
        steps = record(train_moco, *flags_of(folder, tmp_path / str(seed), size, *V2, WHOLE,
                                             "--colour=1", "--blur=0", "--seed", seed))
        for step in steps:
            found.append(torch.stack([torch.stack([pixels_of(x).mean((1, 2)) for x in views])
                                      for views in step.views]))
    x = torch.stack(found).unflatten(0, (2, 2, 3))           # seed, epoch, step, view, place, 3
    kept = (x - torch.tensor([180.0, 60, 90])).abs().amax(-1) < 1
    assert 0.08 < kept.float().mean() < 0.3
    some = kept.any(-1) & ~kept.all(-1)
    assert some.float().mean() > 0.4               # within one batch, too
    for axis in range(5):
        change = (x - x.roll(1, axis)).abs().amax(-1)
        assert (change < 1).float().mean() < 0.15, axis


def test_flips_blur_grey_and_brightness_are_independent(folders, tmp_path):
    """Of each other and of those of the other view: of pictures that are bright on the left."""
    folder = shutil.copytree(folders[True, 32], tmp_path / "data")
    for path in (folder / "images").rglob("*.png"):
        picture = Image.new("RGB", (32, 32), (110, 70, 50))
        picture.paste((40, 50, 80), (16, 0, 32, 32))
        picture.save(path)
    steps = record(train_moco, *flags_of(folder, tmp_path / "run", 32, *V2, WHOLE, "--colour=1",
                                         "--blur=0.5", "--epochs=12"))
    columns = []
    for v in (0, 1):
        x = torch.stack([pixels_of(view).mean(1) for step in steps for view in step.views[v]])
        luma = torch.einsum("ncx,c->nx", x, torch.tensor([0.2989, 0.587, 0.114]))
        step = luma.diff(dim=1).abs().amax(1) / (luma[:, 0] - luma[:, -1]).abs()
        grey = (x.amax(1) - x.amin(1)).amax(1) < 2
        columns += [luma[:, 0] < luma[:, -1], step < 0.95, grey, luma.mean(1)]
    table = np.stack([np.asarray(column, float) for column in columns])
    assert all(0.1 < share < 0.6 for share in table[[0, 1, 2, 4, 5, 6]].mean(1))
    assert np.abs(np.corrcoef(table) - np.eye(8)).max() < 4.5 / table.shape[1] ** 0.5


# ------------------------------------------------------------------ which view is whose picture's
def own_views(steps, size):
    """All pairs are a picture and its own view; returns the pictures."""
    pairs = told(steps, size)
    assert all(a.picture == b.picture and a.generated != b.generated for a, b in pairs)
    return {a.picture for a, _ in pairs}


def test_with_a_limit_each_picture_has_its_own_view(folders, size, tmp_path):
    folder = folders[False, size]
    steps = record(train_moco, *flags_of(folder, tmp_path, size, *V2, WHOLE, "--limit=16",
                                         "--views-dir", folder / "views", "--quality=off"))
    pictures = own_views(steps, size)
    assert len(pictures) == 16 and len(steps) == 4
    assert min(pictures) <= 1 and max(pictures) >= COUNT - 2     # spread over the set


def test_with_a_bad_picture_each_other_has_its_own_view(folders, size, tmp_path):
    folder = shutil.copytree(folders[False, size], tmp_path / "data")
    next((folder / "images/train").rglob("*08.png")).write_bytes(b"no picture")
    steps = record(train_moco, *flags_of(folder, tmp_path / "run", size, *V2, WHOLE, "--skip-bad",
                                         "--views-dir", folder / "views", "--quality=off",
                                         "--epochs=3", "--batch-size=4", "--queue=16"))
    assert own_views(steps, size) == set(range(COUNT)) - {8}


def test_pictures_of_one_name_in_two_classes_have_views_of_their_own(folders, size, tmp_path):
    """a/00.png and b/00.png."""
    folder = shutil.copytree(folders[False, size], tmp_path / "data")
    for split in ("images/train", "images/test", "views/train"):
        for kind in "ab":
            for number, path in enumerate(sorted((folder / split / kind).iterdir())):
                path.rename(path.with_name(f"{number:02d}.png"))
    steps = record(train_moco, *flags_of(folder, tmp_path / "run", size, *V2, WHOLE, "--views-dir",
                                         folder / "views", "--quality=off"))
    assert own_views(steps, size) == set(range(COUNT))


def test_further_samples_of_a_folder_of_views_are_those_of_the_pictures(folders, size, tmp_path):
    """A folder that generate_views.py made may hold other pictures, too: of any other folder all
    are samples."""
    folder = shutil.copytree(folders[False, size], tmp_path / "data")
    for path in (folder / "images/test").rglob("*.png"):
        Image.new("RGB", (size, size), (0, 0, 255)).save(folder / f"views/{path.name}")
    strange = {}
    for made in (False, True):
        if made:
            (folder / "views/settings.json").write_text(json.dumps({"dataset": "folder"}))
        steps = record(train_moco, *flags_of(
            folder, tmp_path / str(made), size, *V2, WHOLE, "--views=extra", "--views-dir",
            folder / "views", "--epochs=4"))
        blue = [pixels_of(view)[2].mean() for step in steps for view in step.views[0]]
        strange[made] = sum(x > 250 for x in blue)
        assert sum(125 < x < 250 for x in blue) > 20
    assert strange[False] > 0 and strange[True] == 0


def test_small_crops_come_in_turn_from_the_two_large_views(folders, size, tmp_path):
    """View 3 of the picture of view 1, view 4 of that of view 2, view 5 of that of view 1."""
    folder = folders[False, size]
    steps = record(train_swav, *flags_of(
        folder, tmp_path, size, *SWAV, "--small-crops=3", "--small-min=0.3", "--crop-min=0.5",
        "--views-dir", folder / "views", "--quality=off"))
    assert {len(step.views) for step in steps} == {5}
    for one, two, *more in told(steps, size, range(5)):
        assert one.generated != two.generated
        assert [x.generated for x in more] == [one.generated, two.generated, one.generated]
        assert {x.picture for x in more} <= {one.picture}


# ------------------------------------------------------------------------------------ the shapes
@pytest.fixture(scope="module")
def of_shapes(shapes_encoder, tmp_path_factory):
    """Pairs (64, 2, 3, 32, 32) of runs on 64 of 128 scenes, by the run's name."""
    split, found = shapes.split, {}
    runs = {"none": ["--views-dir=none", "--quality=off"],
            "weighted": ["--views-dir=none", "--quality=exact"],
            "seed 1": ["--noise=400", "--quality=off", "--seed=1"]}
    runs |= {noise: ["--noise", noise, "--quality=off"] for noise in ("0", "400", "adaptive")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "train_encoder", lambda **options: shapes_encoder)
        patch.setattr(shapes, "split", lambda name: shapes.Scene(*(x[:128] for x in split(name))))
        for name, flags in runs.items():
            steps = record(train_moco, "--dataset=shapes", "--limit=64", "--batch-size=64",
                           "--queue=64", "--epochs=1", "--warmup-epochs=0", "--knn-every=0",
                           WHOLE, "--colour=0", "--output-dir",
                           tmp_path_factory.mktemp("shapes") / "run", *flags)
            found[name] = torch.stack([torch.stack([pixels_of(x) for x in view])
                                       for view in steps[0].views], 1)
    return found


def distance(x, others):
    """The mean distance per pixel of a picture to the nearest of others, mirrored or not."""
    return min((x - y).abs().mean((1, 2, 3)).min().item() for y in (others, others.flip(3)))


def test_shapes_have_views_of_their_own(of_shapes):
    plain = of_shapes["none"]
    for name in ("none", "weighted"):              # plain pairs stay plain when they are weighted
        for one, two in of_shapes[name]:
            assert distance(one, two[None]) < 1
    for noise in ("0", "400", "adaptive"):
        sides = []
        for one, two in of_shapes[noise]:
            known = [distance(x, plain[:, 0]) < 1 for x in (one, two)]
            assert sum(known) == 1                 # exactly one is a picture of the set
            sides.append(known[0])
        assert 16 < sum(sides) < 48


def test_another_seed_draws_other_views_of_shapes(of_shapes):
    pictures = of_shapes["none"][:, 0]
    views = {}
    for name in ("400", "seed 1"):
        both = of_shapes[name].flatten(0, 1)
        views[name] = [x for x in both if distance(x, pictures) >= 1]
    known = torch.stack(views["400"])
    assert len(known) == len(views["seed 1"]) == 64
    assert sum(distance(x, known) < 1 for x in views["seed 1"]) == 0


def test_noise_carries_the_views_of_shapes_away(of_shapes):
    """400 farther than adaptive, adaptive farther than 0; and a view at noise 0 is nearer to its
    picture than to the other pictures."""
    far = {}
    for noise in ("0", "adaptive", "400"):
        far[noise] = sum(distance(one, two[None]) for one, two in of_shapes[noise]) / 64
    assert 1 < far["0"] < 0.97 * far["adaptive"] and far["adaptive"] < 0.97 * far["400"]
    one, two = of_shapes["0"].unbind(1)
    others = sum(distance(x, y[None]) for x, y in zip(one, two.roll(1, 0), strict=True)) / 64
    assert far["0"] < 0.8 * others


# ------------------------------------------------------------------------------- quality by hand
def tokens_of(encoder, pictures):
    with torch.no_grad():
        return encoder(normalise(torch.stack(pictures).float() / 255))


def test_quality_is_that_of_the_pictures_foreground(folders, encoder_folder, tmp_path):
    """The component is fitted on the training pictures; quality by hand from the views."""
    folder = folders[False, 32]
    steps = record(train_moco, *flags_of(folder, tmp_path, 32, *V2, "--views-dir",
                                         folder / "views", "--encoder", encoder_folder))
    frozen = genview.FrozenEncoder(encoder_folder)
    paths = sorted((folder / "images/train").rglob("*.png"))
    pictures = [torch.from_numpy(np.array(Image.open(x))).permute(2, 0, 1) for x in paths]
    expected, _ = fit_foreground(tokens_of(frozen, pictures), (8, 8))
    component = torch.from_numpy(np.load(tmp_path / "component.npy"))
    assert (component @ expected).item() == pytest.approx(1, abs=1e-3)
    for step in steps[:2]:
        got = step.quality_of(*step.views[:2])
        with torch.no_grad():
            wanted = pair_quality(frozen(step.views[0]), frozen(step.views[1]), component)
        for one, other in zip(got, wanted, strict=True):
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-3)
        assert got[0].std() > 1e-4


# ---------------------------------------------------------------------------- the networks' modes
def norms(net):
    return [m.training for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


@pytest.mark.parametrize("script, flags, keys", [
    (train_moco, V2, False), (train_moco, V3, True), (train_byol, HIDDEN, True),
    (train_byol, SIMSIAM, None), (train_swav, SWAV, None)])
def test_after_knn_the_networks_train_on(script, flags, keys, folders, tmp_path, monkeypatch):
    """Batch norm by the batch in every step, but for the keys of MoCo v2."""
    modes = []

    def train_step(method, *rest):
        modes.append((norms(method.query), norms(getattr(method, "key", nn.Identity()))))
        return {"loss": torch.zeros(())}
    monkeypatch.setattr(train_moco, "train_step", train_step)
    call(script, *flags_of(folders[False, 32], tmp_path, 32, *flags, "--knn-every=1"))
    assert len(modes) == 6
    for query, key in modes:
        assert all(query) and len(query) > 5
        assert set(key) == ({keys} if keys is not None else set())


@pytest.mark.parametrize("side, layers", [(64, 2), (72, 3)])
def test_the_projector_of_simsiam_has_a_layer_less_for_small_pictures(side, layers, folders,
                                                                      tmp_path):
    step = record(train_byol, *flags_of(folders[False, 80], tmp_path, side, *SIMSIAM,
                                        "--epochs=1"))[0]
    linear = [m for m in step.method.query.head.modules() if isinstance(m, nn.Linear)]
    assert len(linear) == layers and step.views[0].shape[-1] == side
    assert step.method.chance == 0.0


# -------------------------------------------------------------------------------- the optimisers
def trained(script, folders, output, *flags):
    """The first step of a run that is not taken, with its optimiser, at a rate of 0.5."""
    step = record(script, *flags_of(folders[False, 32], output, 32, "--epochs=1", *flags))[0]
    for group in step.optimizer.param_groups:
        group["lr"] = 0.5
    return step


@pytest.mark.parametrize("script, flags", [
    (train_moco, V2), (train_moco, V3), (train_moco, [*V3, "--arch=vit_narrow"]),
    (train_byol, HIDDEN), (train_byol, SIMSIAM), (train_swav, SWAV)])
def test_the_optimiser_has_each_learning_parameter_once(script, flags, folders, tmp_path):
    """Neither the key encoder's nor the fixed ones of a vision transformer."""
    step = trained(script, folders, tmp_path, *flags)
    given = [p for group in step.optimizer.param_groups for p in group["params"]]
    wanted = {name: p for name, p in step.method.named_parameters()
              if not name.startswith("key.") and "pos_embedding" not in name
              and "conv_proj" not in name}
    assert sorted(map(id, given)) == sorted(map(id, wanted.values()))
    assert all(p.requires_grad for p in given)


def test_two_steps_of_sgd_by_hand(folders, tmp_path):
    """Weight decay is part of the gradient, momentum 0.9, neither dampening nor Nesterov; biases
    and norms decay like all."""
    step = trained(train_moco, folders, tmp_path, *V2, "--optimizer=sgd", "--weight-decay=0.1")
    for p in list(step.method.query.parameters())[-3:]:
        start = p.detach().clone()
        for g in (1.0, 3.0):
            p.grad = torch.full_like(p, g)
            step.optimizer.step()
        first = 1 + 0.1 * start
        middle = start - 0.5 * first
        second = 0.9 * first + 3 + 0.1 * middle
        torch.testing.assert_close(p.detach(), middle - 0.5 * second)
        p.grad = None


def test_two_steps_of_adamw_by_hand(folders, tmp_path):
    """Decay apart from the gradient; betas 0.9 and 0.999."""
    step = trained(train_moco, folders, tmp_path, *V2, "--optimizer=adamw", "--weight-decay=0.1")
    p = list(step.method.query.parameters())[-2]
    wanted = p.detach().clone()
    first, second = torch.zeros_like(p), torch.zeros_like(p)
    for number, g in enumerate((1.0, 3.0), 1):
        p.grad = torch.full_like(p, g)
        step.optimizer.step()
        first = 0.9 * first + 0.1 * g
        second = 0.999 * second + 0.001 * g ** 2
        mean = first / (1 - 0.9 ** number)
        square = second / (1 - 0.999 ** number)
        wanted = wanted * (1 - 0.5 * 0.1) - 0.5 * mean / (square.sqrt() + 1e-8)
    torch.testing.assert_close(p.detach(), wanted, atol=1e-5, rtol=1e-4)


def test_two_steps_of_lars_by_hand(folders, tmp_path):
    """A matrix: trust 0.001, decay; a bias: neither. Momentum 0.9 after both."""
    step = trained(train_moco, folders, tmp_path, *V2, "--optimizer=lars", "--weight-decay=0.1")
    matrix, bias = list(step.method.query.parameters())[-2:]
    assert matrix.ndim == 2 and bias.ndim == 1
    wanted = [p.detach().clone() for p in (matrix, bias)]
    speed = [torch.zeros_like(p) for p in wanted]
    for g in (1.0, 3.0):
        for p in (matrix, bias):
            p.grad = torch.full_like(p, g)
        step.optimizer.step()
        update = g + 0.1 * wanted[0]
        update = update * 0.001 * wanted[0].norm() / update.norm()
        speed = [0.9 * speed[0] + update, 0.9 * speed[1] + g]
        wanted = [w - 0.5 * v for w, v in zip(wanted, speed, strict=True)]
    torch.testing.assert_close([matrix.detach(), bias.detach()], wanted, atol=1e-6, rtol=1e-4)


def test_the_predictor_of_simsiam_learns_during_the_warm_up(folders, tmp_path, monkeypatch):
    """At the peak rate from the first step on, where the encoder's rate is 0."""
    real, changes, rates = train_moco.train_step, [], []

    def train_step(method, optimizer, *rest):
        nets = method.query, method.predictor
        before = [[p.detach().clone() for p in net.parameters()] for net in nets]
        rates.append(sorted(group["lr"] for group in optimizer.param_groups))
        readouts = real(method, optimizer, *rest)
        changes.append([max((p - q).abs().max().item()
                            for p, q in zip(net.parameters(), old, strict=True))
                        for net, old in zip(nets, before, strict=True)])
        return readouts
    monkeypatch.setattr(train_moco, "train_step", train_step)
    call(train_byol, *flags_of(folders[False, 32], tmp_path, 32, *SIMSIAM, "--lr=3.2",
                               "--warmup-epochs=1"))
    assert changes[0][0] == 0 and changes[0][1] > 1e-6 and changes[1][0] > 1e-6
    assert [max(pair) for pair in rates] == pytest.approx([0.1] * 6)
    encoder = [0, 0.1 / 3, 0.2 / 3, 0.1, 0.075, 0.025]
    assert [min(pair) for pair in rates] == pytest.approx(encoder)


# ----------------------------------------------------------------------------- the moving average
@pytest.mark.parametrize("script, flags, rises", [
    (train_moco, V2, False), (train_moco, V3, True), (train_byol, HIDDEN, True)])
def test_the_key_encoder_follows_in_a_run(script, flags, rises, folders, tmp_path, monkeypatch):
    """It starts as a copy; in each step it moves by 1 - m of the way to the query encoder as it
    was before the step, with m of the share of the training that is done."""
    real, ways = train_moco.train_step, []

    def train_step(method, optimizer, *rest):
        with torch.no_grad():
            key, query = next(method.key.parameters()), next(method.query.parameters())
            if not ways:
                assert all(map(torch.equal, method.key.parameters(), method.query.parameters()))
                key.add_(1.0)                      # that there is a way to go
            before, goal = key.detach().clone(), query.detach().clone()
        readouts = real(method, optimizer, *rest)
        ways.append(((key - before).norm() / (goal - before).norm()).item())
        return readouts
    monkeypatch.setattr(train_moco, "train_step", train_step)
    call(script, *flags_of(folders[False, 32], tmp_path, 32, *flags, "--momentum=0.6", "--lr=0.01",
                           "--optimizer=sgd"))
    shares = [(1 + math.cos(math.pi * i / 6)) / 2 if rises else 1 for i in range(6)]
    assert ways == pytest.approx([0.4 * share for share in shares], abs=1e-4)


# ---------------------------------------------------------------------------------------- the log
@pytest.mark.parametrize("script, flags, chance", [
    (train_moco, V2, math.log(17)), (train_moco, [*V3, "--temperature=0.5"], 2 * math.log(8)),
    (train_byol, HIDDEN, 0), (train_byol, SIMSIAM, 0), (train_swav, SWAV, math.log(4))])
def test_the_log_has_the_means_of_all_readouts(script, flags, chance, folders, encoder_folder,
                                               tmp_path):
    folder = folders[False, 32]
    steps = record(script, *flags_of(
        folder, tmp_path, 32, *flags, "--views-dir", folder / "views", "--encoder",
        encoder_folder,
        "--log-every=2", "--gamma=30"), learn=True)
    lines = json_lines(Path(tmp_path, "log.jsonl"))
    assert [line["step"] for line in lines] == [2, 3, 5, 6]
    assert [line["chance"] for line in lines] == pytest.approx([chance] * 4)
    parts = [steps[:2], steps[2:3], steps[3:5], steps[5:]]
    for name in ("loss", "pos", "neg", "std", "ess", "s_f", "s_b"):
        found = [line[name] for line in lines]
        means = [np.mean([step.readouts[name].item() for step in part]) for part in parts]
        assert found == pytest.approx(means, abs=1e-4)
        assert len(set(found)) > 1
    quality, s_f, s_b = (x.double().numpy() for x in steps[0].quality_of(*steps[0].views[:2]))
    assert steps[0].readouts["s_f"].item() == pytest.approx(s_f.mean(), abs=1e-4)
    assert steps[0].readouts["s_b"].item() == pytest.approx(s_b.mean(), abs=1e-4)
    assert abs(s_f.mean() - s_b.mean()) > 1e-3
    w = np.exp(30 * (quality - quality.max()))
    assert steps[0].readouts["ess"].item() == pytest.approx(w.sum() ** 2 / (w ** 2).sum() / 8,
                                                            rel=1e-2)
    assert steps[0].readouts["ess"] < 0.999
