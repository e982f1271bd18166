"""From the disk and from the flags to the step: what arrives in train_step, and what it changes."""
import math
import re

import coded
import pytest
import torch
from coded import COUNT, decoded, flags_of, pixels_of, record
from PIL import Image

import train_byol
import train_moco
import train_swav

V2 = ["--queue=16", "--start-batches=0"]
SWAV = ["--hidden=16", "--prototypes=4", "--small-size=16", "--small-crops=0", "--optimizer=sgd"]


@pytest.fixture(scope="module", params=[32, 80], ids=["memory", "files"])
def world(request, tmp_path_factory):
    """Coded pictures and their views, of a size that is kept in memory or read from files."""
    folder = tmp_path_factory.mktemp(f"coded{request.param}")
    return coded.save(folder, request.param, leave_out=4), request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return coded.save(tmp_path_factory.mktemp("small"))


@pytest.fixture(scope="module")
def flat(tmp_path_factory):
    """Pictures of one colour each."""
    return coded.save(tmp_path_factory.mktemp("flat"), flat=True)


def steps_of(world, output, *flags):
    folder, size = world
    return record(train_moco, *flags_of(folder, output, size, *V2, *flags))


def pairs_of(steps, size=32):
    """[(what view 1 tells, what view 2 tells), ...] of all pairs of some steps."""
    found = []
    for step in steps:
        for view1, view2 in zip(*step.views[:2], strict=True):
            found.append((decoded(view1, size), decoded(view2, size)))
    return found


# --------------------------------------------------------------------------- from disk to step
def test_a_generated_view_is_one_of_the_two(world, tmp_path):
    """Of the same picture; on either side; a picture without one makes both views."""
    folder, size = world
    steps = steps_of(world, tmp_path, "--views-dir", folder / "views", "--quality=off",
                     "--crop-min=1")
    pairs = pairs_of(steps, size)
    assert len(pairs) == 2 * COUNT
    assert all(a.picture == b.picture for a, b in pairs)
    for a, b in pairs:
        assert a.generated + b.generated == (a.picture >= 4)
    first = sum(a.generated for a, _ in pairs)
    assert 10 <= first <= 30                       # of 40
    sides = [{a.picture: a.generated for a, _ in pairs_of(part, size)}
             for part in (steps[:3], steps[3:])]
    assert sides[0] != sides[1]                    # drawn anew in each epoch
    by_place = [[a.generated for a, _ in pairs_of([step], size)] for step in steps]
    assert len(set(map(tuple, by_place))) > 3      # and in each step


def test_without_views_none_is_generated(world, tmp_path):
    pairs = pairs_of(steps_of(world, tmp_path), world[1])
    assert not any(a.generated or b.generated for a, b in pairs)
    assert all(a.picture == b.picture for a, b in pairs)


def test_extra_pictures_are_samples_of_their_own(world, tmp_path):
    """Both views of such a sample are generated; the number of steps stays."""
    folder, size = world
    steps = steps_of(world, tmp_path, "--views=extra", "--views-dir", folder / "views",
                     "--crop-min=1")
    pairs = pairs_of(steps, size)
    assert len(steps) == 6 and all(a.generated == b.generated for a, b in pairs)
    assert 8 < sum(a.generated for a, _ in pairs) < 40


def test_two_views_have_boxes_and_flips_of_their_own(world, tmp_path):
    steps = steps_of(world, tmp_path / "0")
    pairs = pairs_of(steps, world[1])
    assert sum(a.box != b.box for a, b in pairs) == len(pairs)
    far = [max(abs(x - y) for x, y in zip(a.box, b.box, strict=True)) for a, b in pairs]
    assert sum(x > 1.5 for x in far) > 0.7 * len(far)
    for view in (0, 1):
        assert 0.25 < sum(pair[view].mirrored for pair in pairs) / len(pairs) < 0.75
    assert 0.2 < sum(a.mirrored == b.mirrored for a, b in pairs) / len(pairs) < 0.8


@pytest.mark.parametrize("world", [32], ids=["memory"], indirect=True)     # files: test_step.py
def test_every_random_stream_is_new_in_each_epoch_for_each_picture_and_with_the_seed(
        world, tmp_path):
    """Order, boxes and flips."""
    runs = [steps_of(world, tmp_path / str(seed), "--seed", seed) for seed in (0, 1)]
    again = steps_of(world, tmp_path / "again", "--seed", 0)
    for one, other in zip(runs[0], again, strict=True):
        assert all(map(torch.equal, one.views, other.views))
    told = [pairs_of(steps, world[1]) for steps in runs]
    told += [told[0][:COUNT], told[0][COUNT:]]
    for one, other in ((told[0], told[1]), (told[2], told[3])):
        assert [a.picture for a, _ in one] != [a.picture for a, _ in other]
        places = [a for a, _ in one], [a for a, _ in other]
        same = sum(max(abs(x - y) for x, y in zip(a.box, b.box, strict=True)) < 0.5
                   for a, b in zip(*places, strict=True))
        assert same < 0.2 * len(places[0])         # by place in the batch
        boxes = [{a.picture: a.box for a in part} for part in places]
        same = sum(max(abs(x - y) for x, y in zip(box, boxes[1][key], strict=True)) < 0.5
                   for key, box in boxes[0].items())
        assert same < 0.2 * COUNT                  # and by picture
        assert [a.mirrored for a in places[0]] != [a.mirrored for a in places[1]]
    assert sorted(a.picture for a, _ in told[2]) == list(range(COUNT))
    boxes = [tuple(round(x, 1) for x in a.box) for a, _ in told[2]]
    assert len(set(boxes)) > 0.9 * COUNT           # each picture of an epoch has its own
    steps = [boxes[8 * i:8 * i + 8] for i in range(3)]
    assert steps[0] != steps[1]


@pytest.mark.parametrize("world, least, low, high", [
    (32, 0.05, 0.02, 0.3), (32, 0.6, 0.5, 0.8), (80, 0.6, 0.5, 0.8)], indirect=["world"])
def test_crop_min_is_the_smallest_area(least, low, high, world, tmp_path):
    pairs = pairs_of(steps_of(world, tmp_path, "--crop-min", least), world[1])
    areas = [x.area for pair in pairs for x in pair]
    assert low < min(areas) < high and max(areas) > 0.8


# -------------------------------------------------------------------------------------- colours
def run_flat(flat, output, script, *flags):
    flags = ["--colour=1", "--crop-min=1", "--batch-size=24", "--epochs=4", *flags]
    if script is train_moco and "--method=mocov3" not in flags:
        flags += ["--queue=24", "--start-batches=0"]
    return record(script, *flags_of(flat, output, 32, *flags))


def colours(steps, view):
    """Mean colours (n, 3) of all views of one side."""
    return torch.stack([pixels_of(x).mean((1, 2)) for step in steps for x in step.views[view]])


def test_the_two_views_have_colours_of_their_own(flat, tmp_path):
    steps = run_flat(flat, tmp_path, train_moco)
    one, two = colours(steps, 0), colours(steps, 1)
    assert ((one - two).abs().amax(1) > 2).float().mean() > 0.7
    assert ((one[:24] - one[24:48]).abs().amax(1) > 2).float().mean() > 0.7       # two epochs
    assert not torch.equal(one[0], one[1])


@pytest.fixture(scope="module")
def pale(tmp_path_factory):
    """Pictures of one pale colour: no factor drives a value out of its range."""
    folder = tmp_path_factory.mktemp("pale")
    coded.save(folder, flat=True)
    for path in (folder / "images").rglob("*.png"):
        Image.new("RGB", (32, 32), (110, 90, 100)).save(path)
    return folder


def test_strength_of_the_jitters_of_swav_and_byol(pale, tmp_path):
    """Brightness: SwAV's varies twice as much. Chroma over luma is multiplied by contrast (of a
    picture of one colour) and saturation: from 0.6 * 0.6 to 1.4 * 1.4 for MoCo v2, from 0.6 * 0.8
    to 1.4 * 1.2 for BYOL."""
    bright, ratios = {}, {}
    for name, script, flags in (("v2", train_moco, []), ("byol", train_byol, ["--hidden=16"]),
                                ("v3", train_moco, ["--method=mocov3", "--hidden=16"]),
                                ("swav", train_swav, SWAV)):
        more = [] if name == "v2" else ["--optimizer=sgd"]
        steps = run_flat(pale, tmp_path / name, script, *flags, *more, "--blur=0", "--epochs=16")
        found = colours(steps, 0)                  # the second view may be solarised
        luma = found @ torch.tensor([0.2989, 0.587, 0.114])
        chroma = (found.amax(1) - found.amin(1)) / luma
        chroma = chroma[chroma > 0.02]             # the others are grey
        bright[name] = luma.std().item()
        ratios[name] = (chroma.max() / chroma.min()).item()
    assert 1.6 < bright["swav"] / bright["v2"] < 2.4
    assert 3.9 < ratios["v2"] < 6
    assert 2.5 < ratios["byol"] < 3.8 and 2.5 < ratios["v3"] < 3.8


# ------------------------------------------------------------------------------------- schedules
def rates(script, folder, output, *flags, group=0):
    flags = flags_of(folder, output, 32, "--epochs=4", "--hidden=16", *flags)
    return [step.groups[group]["lr"] for step in record(script, *flags)]


def cosine(peak, end, done):
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


def test_the_rate_is_a_cosine_after_a_linear_warm_up(small, tmp_path):
    """12 steps: by hand at each; peak and end grow with the batch of 8."""
    found = rates(train_moco, small, tmp_path / "v3", "--method=mocov3", "--lr=0.32",
                  "--warmup-epochs=0", "--optimizer=sgd")
    assert found == pytest.approx([cosine(0.01, 0, i / 12) for i in range(12)])
    found = rates(train_moco, small, tmp_path / "warm", "--method=mocov3", "--lr=0.32",
                  "--warmup-epochs=2", "--optimizer=sgd")
    warm = [0.01 * i / 6 for i in range(6)]
    assert found == pytest.approx(warm + [cosine(0.01, 0, i / 6) for i in range(6)])
    found = rates(train_swav, small, tmp_path / "swav", "--lr=0.32", "--final-lr=0.032",
                  "--warmup-epochs=0", *SWAV)
    assert found == pytest.approx([cosine(0.01, 0.001, i / 12) for i in range(12)])


def test_the_fraction_is_of_the_whole_training(small, tmp_path):
    steps = record(train_moco, *flags_of(small, tmp_path, 32, *V2, "--epochs=4"))
    assert [step.fraction for step in steps] == pytest.approx([i / 12 for i in range(12)])


@pytest.mark.parametrize("make", [lambda: train_moco.MoCoV3, lambda: train_byol.BYOL])
def test_the_momentum_of_v3_and_byol_is_a_cosine_up_to_1(make, small, tmp_path):
    """At a quarter of the training, by how far the key encoder moves."""
    kind = make()
    script = train_moco if kind is train_moco.MoCoV3 else train_byol
    flags = ["--method=mocov3"] if script is train_moco else []
    step = record(script, *flags_of(small, tmp_path, 32, *flags, "--hidden=16", "--momentum=0.8",
                                    "--optimizer=sgd", "--epochs=1"))[0]
    method = step.method
    for fraction in (0.25, 0.5, 1.0):
        with torch.no_grad():
            for key, query in zip(method.key.parameters(), method.query.parameters(), strict=True):
                key.zero_()
                query.fill_(1.0)
        method.update(fraction)
        moved = next(method.key.parameters()).mean().item()
        wanted = 0.2 * (1 + math.cos(math.pi * fraction)) / 2
        assert moved == pytest.approx(wanted, abs=1e-6)


# ---------------------------------------------------------------- flags that arrive in the step
def one(script, small, output, *flags, **options):
    return record(script, *flags_of(small, output, 32, "--epochs=1", *flags), **options)


def test_start_batches_set_the_first_statistics(small, tmp_path):
    """Of batch norm: untouched with 0, and another mean with 1 batch than with 3."""
    means = {}
    for count in (0, 1, 3):
        step = one(train_moco, small, tmp_path / str(count), "--queue=16",
                   f"--start-batches={count}")[0]
        means[count] = next(x for name, x in step.method.query.state_dict().items()
                            if name.endswith("running_mean")).clone()
    assert not means[0].any() and means[1].any()
    assert not torch.allclose(means[1], means[3])


def test_knn_is_of_the_training_pictures_and_comes_when_asked(small, tmp_path, capsys):
    """Every so many epochs and at the end; it looks at training pictures to label test ones."""
    seen = []
    real = train_moco.knn_of

    def knn_of(backbone, train, test, *rest):
        seen.append((len(train.names), len(test.names)))
        return real(backbone, train, test, *rest)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_moco, "knn_of", knn_of)
        record(train_moco, *flags_of(small, tmp_path, 32, *V2, "--epochs=5", "--knn-every=2"))
    assert seen == [(COUNT, 4)] * 3
    epochs = re.findall(r"epoch (\d)/5  kNN top-1", capsys.readouterr().out)
    assert epochs == ["2", "4", "5"]
