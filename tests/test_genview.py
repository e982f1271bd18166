"""genview.py: augmentations against torchvision's, pairs, the foreground component, files and
checkpoints."""

import math
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image

import genview
import quality_loss
import support.augment
import support.checkpoints
import support.data
import support.files
import support.networks
import support.world
from genview import PairLoader
from support.augment import Augmentation
from support.data import Images
from support.world import UserError, World

torch.set_num_threads(1)  # small tensors: threads would only wait for each other
CPU = torch.device("cpu")
PLAIN = Augmentation(jitter=(0, 0, 0, 0), blur=0)
FULL = Augmentation(solarise=0.3)


def one_process(rank=0, size=1):
    return World(rank, size, CPU, torch.float32)


def random_pixels(n=6, size=16, seed=0):
    return torch.randint(
        0, 256, (n, 3, size, size), generator=torch.Generator().manual_seed(seed), dtype=torch.uint8
    )


def in_memory(n=12, size=16, seed=0):
    return Images(
        [f"train/{i:05d}" for i in range(n)], torch.arange(n) % 3, 3, random_pixels(n, size, seed)
    )


# ------------------------------------------------------------------------------------ augmentations


def recoloured(x, augmentation=PLAIN, order=(0, 1, 2, 3), **numbers):
    """support.augment.recolour of x with given random numbers; without them nothing is changed.
    Undoes the normalisation."""
    draws = support.augment.Draws.split(torch.full((len(x), support.augment.Draws.COLUMNS), 0.999))
    factors = ("brightness", "contrast", "saturation", "hue")
    for name, value in numbers.items():
        column = draws.strength[:, factors.index(name)] if name in factors else getattr(draws, name)
        column.fill_(value)
    out = support.augment.recolour(x.clone(), draws, list(order), augmentation)
    mean, std = (
        torch.tensor(v).view(3, 1, 1) for v in (support.augment.CLIP_MEAN, support.augment.CLIP_STD)
    )
    return out * std + mean


X = random_pixels() / 255
STRONG = Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), blur=0)


def test_nothing_drawn_changes_nothing():
    torch.testing.assert_close(recoloured(X, STRONG), X, atol=1e-5, rtol=0)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    "name, theirs",
    [
        ("brightness", tv.adjust_brightness),
        ("contrast", tv.adjust_contrast),
        ("saturation", tv.adjust_saturation),
        ("hue", tv.adjust_hue),
    ],
)
def test_jitter_matches_torchvision(name, theirs, u):
    others = {
        n: 0.5 for n in ("brightness", "contrast", "saturation", "hue") if n != name
    }  # 0.5: factor 1, turn 0
    ours = recoloured(X, STRONG, jitter=0.0, **{name: u}, **others)
    factor = (2 * u - 1) * 0.1 if name == "hue" else 1 + (2 * u - 1) * 0.4
    torch.testing.assert_close(ours, theirs(X, factor), atol=1e-3, rtol=0)


def test_jitters_in_another_order_match_torchvision():
    ours = recoloured(
        X,
        STRONG,
        order=(3, 1, 0, 2),
        jitter=0.0,
        brightness=0.9,
        contrast=0.1,
        saturation=0.2,
        hue=0.7,
    )
    theirs = tv.adjust_contrast(tv.adjust_hue(X, 0.04), 1 - 0.8 * 0.4)
    theirs = tv.adjust_saturation(tv.adjust_brightness(theirs, 1 + 0.8 * 0.4), 1 - 0.6 * 0.4)
    torch.testing.assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_hue_of_grey_and_of_primary_colours():
    colours = torch.tensor(
        [[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0]]
    )
    colours = colours[..., None, None]
    for turn in (-0.5, -0.1, 0.0, 0.1, 1 / 3, 0.5):
        ours = support.augment.shift_hue(colours, torch.full((len(colours), 1, 1, 1), turn))
        torch.testing.assert_close(ours, tv.adjust_hue(colours, turn), atol=1e-3, rtol=0)


def test_grey_solarise_and_flip_match_torchvision():
    torch.testing.assert_close(
        recoloured(X, grey=0.1), tv.rgb_to_grayscale(X, 3), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(recoloured(X, flip=0.1), tv.horizontal_flip(X), atol=1e-5, rtol=0)
    solarise = PLAIN._replace(solarise=0.2)
    torch.testing.assert_close(
        recoloured(X, solarise, solarise=0.1), tv.solarize(X, 0.5), atol=1e-3, rtol=0
    )
    torch.testing.assert_close(recoloured(X, solarise, solarise=0.3), X, atol=1e-5, rtol=0)


@pytest.mark.parametrize("u", [0.0, 0.4, 1.0])
def test_blur_matches_torchvision_in_the_interior(u):
    x, sigma = random_pixels(2, 48) / 255, 0.1 + 1.9 * u
    ours = recoloured(x, PLAIN._replace(blur=0.5), blur=0.1, sigma=u)
    theirs = tv.gaussian_blur(x, kernel_size=[17, 17], sigma=[sigma, sigma])
    inside = (..., slice(9, -9), slice(9, -9))
    torch.testing.assert_close(ours[inside], theirs[inside], atol=1e-3, rtol=0)


def test_every_image_has_its_own_numbers():
    u = torch.rand(6, support.augment.Draws.COLUMNS, generator=torch.Generator().manual_seed(1))

    def recolour(x, u):
        return support.augment.recolour(
            x.clone(), support.augment.Draws.split(u), [2, 0, 3, 1], FULL
        )

    together = recolour(X, u)
    for i in range(6):
        alone = recolour(X[i : i + 1], u[i : i + 1])
        torch.testing.assert_close(together[i : i + 1], alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()


@pytest.mark.parametrize(
    "box, size",
    [((4, 6, 20, 22), 16), ((4, 6, 12, 14), 16), ((2, 4, 26, 28), 24), ((8, 4, 16, 20), 16)],
)
def test_crop_matches_torchvision(box, size):
    pixels = random_pixels(2, 32)
    x1, y1, x2, y2 = box
    ours = support.augment.crop(pixels, torch.tensor([box, box]).float(), size)
    # torchvision cuts first and repeats the border of the cut; ours sees what lies beyond it: in an
    # enlarged crop the rim of one pixel differs
    theirs = tv.resized_crop(
        pixels.float(), y1, x1, y2 - y1, x2 - x1, [size, size], antialias=False
    )
    rim = int(np.ceil(size / min(x2 - x1, y2 - y1) / 2)) if size > min(x2 - x1, y2 - y1) else 0
    inside = (..., slice(rim, size - rim), slice(rim, size - rim))
    torch.testing.assert_close(ours[inside] / 255, theirs[inside] / 255, atol=1e-2, rtol=0)


@pytest.mark.parametrize("height, width", [(32, 32), (20, 60), (300, 40)])
def test_crop_boxes_are_inside_and_within_bounds(height, width):
    u = torch.rand(5000, support.augment.CROP_TRIES, 4, generator=torch.Generator().manual_seed(0))
    boxes = support.augment.crop_boxes(u, height, width, (0.2, 1.0))
    x1, y1, x2, y2 = boxes.unbind(1)
    assert (boxes >= -1e-3).all() and (x2 <= width + 1e-3).all() and (y2 <= height + 1e-3).all()
    w, h = x2 - x1, y2 - y1
    ratio, area = w / h, w * h / (height * width)
    assert ratio.min() >= 0.749 and ratio.max() <= 1.334
    central = ((ratio - 1).abs() < 1e-5) & ((w - min(height, width)).abs() < 1e-3)  # no try fitted
    assert (area[~central] >= 0.199).all() and area.max() <= 1.001
    if height == width:  # the area is near uniform, all places are reached
        assert central.float().mean() < 0.01
        assert area.min() < 0.21 and 0.50 < area.mean() < 0.6 and abs(ratio.log().mean()) < 0.02
        assert (
            x1.max() > 0.3 * width
            and (x1 < 0.02 * width).any()
            and abs((x1 + x2).mean() - width) < 0.02 * width
        )


def test_crop_boxes_without_a_fit_is_the_central_square():
    u = torch.rand(3, support.augment.CROP_TRIES, 4)
    boxes = support.augment.crop_boxes(u, 10, 100, (0.9, 1.0))
    torch.testing.assert_close(boxes, torch.tensor([[45.0, 0, 55, 10]]).expand(3, 4))


# -------------------------------------------------------------------------------------------- pairs


def batches(images, views, epoch=0, world=None, seed=3, batch_size=4, augmentation=FULL, **options):
    loader = PairLoader(
        images,
        views,
        [augmentation] * 2,
        16,
        batch_size,
        seed,
        world or one_process(),
        workers=0,
        **options,
    )
    return [tuple(views) for views in loader.epoch(epoch)]


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y)
        for left, right in zip(a, b, strict=True)
        for x, y in zip(left, right, strict=True)
    )


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Images that stay on the disk, and a list of their views: white pictures; the third image has
    none."""
    folder = tmp_path_factory.mktemp("files")
    tiny.save_images(folder, per_class=6, size=80)
    images = genview.load_images("folder", folder, "train", 80)
    white = folder / "white.png"
    Image.new("RGB", (80, 80), (255, 255, 255)).save(white)
    return images, [white if i != 2 else None for i in range(12)]


def test_the_same_numbers_again(files):
    for images, views in ((in_memory(), random_pixels(12, seed=1)), files):
        assert same(batches(images, views), batches(images, views))
        assert not same(batches(images, views), batches(images, views, epoch=1))
        assert not same(batches(images, views), batches(images, views, seed=4))


def test_two_processes_make_one_batch(files):
    for images, views in ((in_memory(), random_pixels(12, seed=1)), files):
        whole = batches(images, views)
        halves = zip(
            *(batches(images, views, world=one_process(rank, 2)) for rank in (0, 1)), strict=True
        )
        assert same(
            whole, [tuple(torch.cat(part) for part in zip(*half, strict=True)) for half in halves]
        )


def test_half_of_the_generated_ones_are_view_1(files):
    n = 400
    images = Images(
        [f"train/{i:05d}" for i in range(n)],
        torch.zeros(n),
        1,
        torch.zeros(n, 3, 8, 8, dtype=torch.uint8),
    )
    white = torch.full_like(images.pixels, 255)
    black, bright = (
        support.augment.normalise(torch.full((3, 1, 1), value)) for value in (0.0, 1.0)
    )
    first = 0
    for view1, view2 in batches(images, white, batch_size=100, augmentation=PLAIN):
        is_white1, is_white2 = ((v - bright).abs().amax((1, 2, 3)) < 1e-3 for v in (view1, view2))
        assert (is_white1 ^ is_white2).all()
        assert (
            (torch.where(is_white1[:, None, None, None], view2, view1) - black).abs() < 1e-3
        ).all()
        first += is_white1.sum().item()
    assert 160 < first < 240
    images, views = files
    counts = torch.zeros(2)  # how often view 1 and view 2 are generated
    for epoch in range(20):
        for pair in batches(images, views, epoch=epoch, augmentation=PLAIN):
            counts += torch.tensor(
                [((x - bright).abs().amax((1, 2, 3)) < 1e-3).sum() for x in pair]
            )
    assert counts.sum() == 20 * 11 and 80 < counts[0] < 140  # one image has no view: its own pair


def test_without_views_both_are_of_the_image():
    images = in_memory()
    images = images._replace(
        pixels=torch.arange(12, dtype=torch.uint8)
        .view(12, 1, 1, 1)
        .expand(12, 3, 8, 8)
        .contiguous()
    )
    seen = []
    for view1, view2 in batches(images, None, augmentation=PLAIN):
        torch.testing.assert_close(
            view1, view2, atol=1e-3, rtol=0
        )  # the weights of grey sum to 0.9999
        mean, std = support.augment.CLIP_MEAN[0], support.augment.CLIP_STD[0]
        seen += ((view1[:, 0].mean((1, 2)) * std + mean) * 255).round().tolist()
    assert sorted(seen) == list(range(12))  # each image once


def test_crops_of_files_are_crops_of_the_picture(files):
    dataset = genview.CropPairs(files[0], None, [PLAIN] * 2, 16, seed=3, epoch=0, skip_bad=False)
    view1, view2 = dataset[5, False]
    assert view1.shape == view2.shape == (3, 16, 16) and view1.dtype == torch.uint8
    assert not torch.equal(view1, view2)
    u = torch.rand(
        2, support.augment.Draws.COLUMNS, generator=support.world.step_generator(3, 0, 5, 2)
    )
    crop = support.augment.Draws.split(u).crop[1, None]  # view 2's box, cut by PIL
    box = support.augment.crop_boxes(crop, 80, 80, PLAIN.scale)
    theirs = files[0].pil(5).resize((16, 16), Image.Resampling.BILINEAR, box=tuple(box[0].tolist()))
    assert torch.equal(view2, support.data.to_tensor(theirs))


def test_further_views_come_in_turn_from_both_pictures(files):
    """Views 3, 5, ... of the picture of view 1, views 4, 6, ... of that of view 2."""
    small = PLAIN._replace(size=8)
    bright = support.augment.normalise(torch.ones(3, 1, 1))
    white = torch.full((12, 3, 16, 16), 255, dtype=torch.uint8)
    for images, views in (
        (in_memory()._replace(pixels=white * 0), white),
        (files[0], [files[1][0]] * 12),
    ):
        loader = PairLoader(
            images, views, [PLAIN] * 2 + [small] * 3, 16, 4, 3, one_process(), workers=0
        )
        for crops in loader.epoch(0):
            assert [x.shape[-1] for x in crops] == [16, 16, 8, 8, 8]
            generated = torch.stack(
                [(x - bright).abs().amax((1, 2, 3)) < 1e-3 for x in crops]
            )  # (V, n)
            assert (generated[0] ^ generated[1]).all()
            assert all(torch.equal(generated[v], generated[v % 2]) for v in (2, 3, 4))


# --------------------------------------------------------------------------------- images and views


def test_unreadable_images_are_named_or_left_out(tmp_path, capsys):
    tiny.save_images(tmp_path, per_class=3)
    bad = tmp_path / "train" / "cat" / "zz.png"
    bad.write_bytes(
        (tmp_path / "train" / "cat" / os.listdir(tmp_path / "train" / "cat")[0]).read_bytes()[:60]
    )
    with pytest.raises(UserError, match="zz.png cannot be read .*--skip-bad"):
        genview.load_images("folder", tmp_path, "train", 32)
    images = genview.load_images("folder", tmp_path, "train", 32, skip_bad=True)
    assert len(images.names) == len(images.labels) == len(images.pixels) == 6
    assert "zz.png" in capsys.readouterr().err
    large = genview.load_images("folder", tmp_path, "train", 100)  # stays on the disk
    assert large.pixels is None and len(large.names) == 7
    with pytest.raises(UserError, match="zz.png"):
        batches(large, None, batch_size=7)
    ((view1, _),) = batches(large, None, batch_size=7, skip_bad=True)
    assert view1.shape[0] == 7 and view1.isfinite().all()


def test_limit_is_spread_over_the_classes(tmp_path):
    tiny.save_images(tmp_path, per_class=6)
    images = genview.load_images("folder", tmp_path, "train", 32, limit=4)
    assert images.labels.tolist() == [0, 0, 1, 1] and len(images.names) == len(images.pixels) == 4
    with pytest.raises(UserError, match="train/ and val/"):
        genview.load_images("folder", tmp_path / "train", "train", 32)


def test_views_are_found_or_refused(tmp_path):
    tiny.save_images(tmp_path / "data", per_class=3)
    images = genview.load_images("folder", tmp_path / "data", "train", 32)
    with pytest.raises(UserError, match="is no folder"):
        support.data.find_views(images, tmp_path / "missing", "folder")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds no views"):
        support.data.find_views(images, tmp_path / "empty", "folder")
    for layout, strip in (("ours", ""), ("release", "train/")):
        views = tmp_path / layout
        for name in images.names[1:]:
            target = (views / name.removeprefix(strip)).with_suffix(".jpg")
            target.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (48, 48), (255, 0, 0)).save(target)
        found = support.data.find_views(images, views, "folder")
        assert found[0] is None
        assert [str(p.relative_to(views).with_suffix("")) for p in found[1:]] == [
            str(Path(n.removeprefix(strip)).with_suffix("")) for n in images.names[1:]
        ]
        pixels = support.data.views_into_memory(images, found)
        assert torch.equal(pixels[0], images.pixels[0]) and pixels.shape == images.pixels.shape
        assert (pixels[1:, 0] > 250).all() and (pixels[1:, 1:] < 5).all()


def test_views_of_another_data_set_are_refused(tmp_path):
    tiny.save_images(tmp_path / "data", per_class=2)
    images = genview.load_images("folder", tmp_path / "data", "train", 32)
    (tmp_path / "views" / "train").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "views" / "train" / "00000.png")  # CIFAR's names
    with pytest.raises(UserError, match="holds no views of these images"):
        support.data.find_views(images, tmp_path / "views", "folder")
    (tmp_path / "views" / "train" / "cat").mkdir()
    Image.new("RGB", (8, 8)).save((tmp_path / "views" / images.names[0]).with_suffix(".png"))
    assert (
        sum(
            path is not None
            for path in support.data.find_views(images, tmp_path / "views", "folder")
        )
        == 1
    )
    (tmp_path / "views" / "settings.json").write_text('{"dataset": "cifar10"}')
    with pytest.raises(UserError, match="made for cifar10"):
        support.data.find_views(images, tmp_path / "views", "folder")


# ------------------------------------------------------------------- the foreground and the encoder


def planted(n=40, side=7, k=12, sign=1, seed=0):
    """Tokens with one strong direction, stronger at the centre of the images. Returns tokens and
    the direction."""
    rng = np.random.default_rng(seed)
    direction = rng.normal(size=k)
    direction /= np.linalg.norm(direction)
    y, x = np.mgrid[-1 : 1 : side * 1j, -1 : 1 : side * 1j]
    blob = np.exp(-3 * (x**2 + y**2)).ravel()
    strength = sign * 5 * blob * rng.uniform(0.5, 1.5, (n, 1))
    tokens = (
        strength[..., None] * direction
        + rng.normal(size=(n, side * side, k)) * 0.3
        + rng.normal(size=k)
    )
    return torch.tensor(tokens).float(), torch.tensor(sign * direction).float()


def component_oracle(tokens, rows, columns, fraction):
    """Centre, SVD, threshold and sign, by loops in float64."""
    flat = np.asarray(tokens, dtype=np.float64).reshape(-1, tokens.shape[2])
    v1 = np.linalg.svd(flat - sum(flat) / len(flat), full_matrices=False)[2][0]
    best = None
    for v in (v1, -v1):
        a = [
            [float(np.dot(token, v)) for token in image]
            for image in np.asarray(tokens, dtype=np.float64)
        ]
        alpha = np.quantile(np.array(a), 1 - fraction)
        centre, border = [], []
        for image in a:
            for place, value in enumerate(image):
                r, c = divmod(place, columns)
                (border if r in (0, rows - 1) or c in (0, columns - 1) else centre).append(
                    value > alpha
                )
        score = np.mean(centre) - np.mean(border)
        if best is None or score > best[0]:
            best = score, v, alpha
    return best[1:]


@pytest.mark.parametrize("sign", [1, -1])
def test_fit_foreground_finds_what_was_planted(sign):
    tokens, direction = planted(sign=sign)
    v1, alpha = quality_loss.fit_foreground(tokens, (7, 7))
    assert v1.shape == (12,) and v1.dtype == torch.float32 and isinstance(alpha, float)
    assert v1.norm().item() == pytest.approx(1, abs=1e-5)
    assert (v1 @ direction).item() > 0.99
    foreground = tokens @ v1 > alpha
    assert foreground.float().mean().item() == pytest.approx(0.4, abs=2e-3)
    assert (
        foreground[:, 24].float().mean() > 0.9 > 0.2 > foreground[:, 0].float().mean()
    )  # centre, corner
    oracle, threshold = component_oracle(tokens.numpy(), 7, 7, 0.4)
    np.testing.assert_allclose(v1, oracle, atol=1e-4)
    assert alpha == pytest.approx(threshold, abs=1e-3)


def test_negated_tokens_give_the_negated_component():
    tokens, _ = planted()
    (v1, alpha), (minus, minus_alpha) = (
        quality_loss.fit_foreground(tokens, (7, 7)),
        quality_loss.fit_foreground(-tokens, (7, 7)),
    )
    torch.testing.assert_close(v1, -minus, atol=1e-5, rtol=0)
    assert alpha == pytest.approx(minus_alpha, abs=1e-4)


def test_fit_foreground_on_an_oblong_grid_half_precision_and_fraction():
    tokens = planted(n=300, side=6)[0][:, :24].contiguous()  # four rows of six; two parts of 256
    v1, alpha = quality_loss.fit_foreground(tokens.half(), (4, 6), fraction=0.25)
    oracle, threshold = component_oracle(tokens.half().numpy(), 4, 6, 0.25)
    np.testing.assert_allclose(v1, oracle, atol=1e-3)
    assert alpha == pytest.approx(threshold, abs=1e-2)
    with pytest.raises(ValueError, match=r"\(300, 24, 12\)"):
        quality_loss.fit_foreground(tokens, (5, 5))


def test_orientation_of_a_given_component():
    tokens, direction = planted()
    v1, alpha = quality_loss.orient_foreground(-3 * direction, tokens, (7, 7))
    torch.testing.assert_close(v1, direction, atol=1e-5, rtol=0)
    assert (tokens @ v1 > alpha).float().mean().item() == pytest.approx(0.4, abs=2e-3)


class Malicious:
    def __init__(self, victim):
        self.victim = str(victim)

    def __reduce__(self):
        return open, (self.victim, "w")


def test_load_component(tmp_path):
    v1 = np.arange(5, dtype=np.float32)
    np.savez(tmp_path / "foreground.npz", component=v1, threshold=0.7)
    np.save(tmp_path / "pca_vectors.npy", v1[:, None])
    component, threshold = support.files.read_component(tmp_path / "foreground.npz", 5)
    assert torch.equal(component, torch.tensor(v1)) and threshold == pytest.approx(0.7)
    component, threshold = support.files.read_component(tmp_path / "pca_vectors.npy")
    assert torch.equal(component, torch.tensor(v1)) and threshold is None
    with pytest.raises(UserError, match="5 numbers.*have 6"):
        support.files.read_component(tmp_path / "pca_vectors.npy", 6)
    np.savez(tmp_path / "other.npz", x=v1)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "void.npy").write_bytes(b"")
    (tmp_path / "short.npz").write_bytes((tmp_path / "foreground.npz").read_bytes()[:100])
    for name in ("other.npz", "text.npy", "void.npy", "short.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            support.files.read_component(tmp_path / name)


def test_a_pickled_component_is_refused_and_not_run(tmp_path):
    victim = tmp_path / "victim"
    np.save(tmp_path / "object.npy", np.array([Malicious(victim)], dtype=object), allow_pickle=True)
    np.savez(
        tmp_path / "object.npz",
        component=np.array([Malicious(victim)], dtype=object),
        threshold=0.0,
    )
    (tmp_path / "pickle.npy").write_bytes(pickle.dumps(Malicious(victim)))
    for name in ("object.npy", "object.npz", "pickle.npy"):
        with pytest.raises(UserError, match=name):
            support.files.read_component(tmp_path / name)
    assert not victim.exists()


def test_frozen_encoder_on_a_clip_folder(tmp_path):
    encoder = genview.FrozenEncoder(tiny.save_clip(tmp_path / "clip"))
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    views = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    tokens = encoder(views)
    assert tokens.shape == (3, 64, 32)  # 8 x 8 patches of 4 pixels
    clip = tiny.clip_vision_model().vision_model
    with torch.no_grad():
        hidden = clip(pixel_values=views).last_hidden_state
        theirs = torch.stack(
            [torch.stack([clip.post_layernorm(h) for h in image[1:]]) for image in hidden]
        )
    torch.testing.assert_close(tokens, theirs, atol=1e-5, rtol=1e-4)
    resized = torch.nn.functional.interpolate(views, size=(32, 32), mode="bilinear", antialias=True)
    torch.testing.assert_close(encoder(resized), tokens)
    large = views.repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert encoder(large).shape == (3, 64, 32) and encoder(views[:, :, :16, :16]).shape == (
        3,
        64,
        32,
    )


def test_class_and_register_tokens_are_left_out(tmp_path):
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
        image_size=224,
        patch_size=32,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    encoder, views = genview.FrozenEncoder(str(tmp_path / "vit")), torch.randn(2, 3, 224, 224)
    tokens = encoder(views)
    assert tokens.shape == (2, 49, 16) and torch.equal(
        tokens, encoder.model(pixel_values=views).last_hidden_state[:, 1:]
    )


def test_a_missing_encoder_is_trouble(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match="--encoder"):
        genview.FrozenEncoder(str(tmp_path / "nothing"))
    from transformers import BertConfig, BertModel

    BertModel(
        BertConfig(
            vocab_size=8,
            hidden_size=8,
            num_hidden_layers=1,
            num_attention_heads=1,
            intermediate_size=8,
        )
    ).save_pretrained(tmp_path / "bert")
    with pytest.raises(UserError, match="--encoder"):  # reads text
        genview.FrozenEncoder(str(tmp_path / "bert"))


# ---------------------------------------------------------------------------- files and checkpoints


def test_write_whole_leaves_the_old_file_if_the_writer_fails(tmp_path):
    path = tmp_path / "new" / "file.txt"
    support.files.write_whole(path, lambda p: p.write_text("old"))

    def broken(temporary):
        temporary.write_text("half")
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError):
        support.files.write_whole(path, broken)
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
    support.files.write_whole(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]


def test_load_checkpoint_runs_no_code(tmp_path):
    victim = tmp_path / "victim"
    torch.save({"model": Malicious(victim)}, tmp_path / "bad.pt")
    (tmp_path / "plain.pkl").write_bytes(pickle.dumps(Malicious(victim), protocol=2))
    (tmp_path / "short.pt").write_bytes((tmp_path / "bad.pt").read_bytes()[:100])
    (tmp_path / "empty.pt").write_bytes(b"")
    for name in ("bad.pt", "plain.pkl", "short.pt", "empty.pt", "missing.pt"):
        with pytest.raises(UserError, match=name):
            support.checkpoints.load_checkpoint(tmp_path / name)
    assert not victim.exists()
    torch.save({"model": torch.ones(2)}, tmp_path / "good.pt")
    assert support.checkpoints.load_checkpoint(tmp_path / "good.pt")["model"].sum() == 2


def test_trouble_is_one_line_and_status_2(capsys):
    def main():
        raise UserError(
            "Traceback of a worker\n  somewhere\nsupport.world.UserError: x.png is broken"
        )

    with pytest.raises(SystemExit) as stop:
        support.world.script(main)
    assert stop.value.code == 2 and capsys.readouterr().err == "error: x.png is broken\n"


@pytest.mark.parametrize("arch, small, dim", [("resnet18", True, 512), ("resnet18", False, 512)])
def test_make_backbone(arch, small, dim):
    backbone, features = support.networks.make_backbone(arch, 64 if small else 65)
    assert features == dim and backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, dim)
    assert backbone.conv1.stride == ((1, 1) if small else (2, 2)) and backbone.conv1.bias is None


@pytest.mark.parametrize("arch, millions", [("vit_small", 21.67), ("vit_base", 85.80)])
def test_vision_transformers_of_moco_v3(arch, millions):
    """Class token, positions and last norm counted, no classifier; positions and patch projection
    do not learn."""
    vit, _ = support.networks.make_backbone(arch, 224)
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6, 2) == millions
    assert {name for name, p in vit.named_parameters() if not p.requires_grad} == {
        "encoder.pos_embedding",
        "conv_proj.weight",
        "conv_proj.bias",
    }
    assert vit.encoder.layers[0].self_attention.num_heads == 12


def test_positions_are_sines_of_row_and_column():
    positions = support.networks.sine_positions(16, 5)
    assert positions.shape == (1, 26, 16) and not positions[0, 0].any()
    for row in range(5):
        for column in range(5):
            expected = [
                f(x * 10_000 ** (-k / 4))
                for x in (column, row)
                for f in (math.sin, math.cos)
                for k in range(4)
            ]
            torch.testing.assert_close(
                positions[0, 1 + 5 * row + column], torch.tensor(expected), atol=1e-5, rtol=0
            )


@pytest.mark.parametrize("arch", ["vit_b_16", "nothing", "fasterrcnn_resnet50_fpn"])
def test_other_architectures_are_trouble(arch):
    with pytest.raises(UserError, match="resnet50"):
        support.networks.make_backbone(arch, 224)


# --------------------------------------------------------------------------- repairs of the rebuild


def test_step_generators_of_different_tuples_differ():
    tuples = [
        (0,),
        (0, 0),
        (0, 0, 0),
        (1,),
        (1, 0),
        (0, 1),
        (2**32,),
        (2**32, 5),
        (0, 1 + 5 * 2**32),
    ]
    seeds = {support.world.step_generator(*numbers).initial_seed() for numbers in tuples}
    assert len(seeds) == len(tuples)
    first = support.world.step_generator(3, 7)
    assert first.initial_seed() == support.world.step_generator(3, np.int64(7)).initial_seed()


def test_files_and_memory_agree_on_which_view_is_generated(files):
    """The same seed draws the same choice for images in memory and for image files."""
    bright = support.augment.normalise(torch.ones(3, 1, 1))

    def generated(images, views):
        return torch.cat(
            [
                ((view1 - bright).abs().amax((1, 2, 3)) < 1e-3)
                for view1, _ in batches(images, views, augmentation=PLAIN)
            ]
        )

    black = in_memory()._replace(pixels=torch.zeros(12, 3, 16, 16, dtype=torch.uint8))
    in_files = generated(files[0], [files[1][0]] * 12)
    assert torch.equal(generated(black, torch.full_like(black.pixels, 255)), in_files)
    assert 0 < in_files.sum() < 12


def test_views_of_another_set_of_the_same_name_are_refused(tmp_path):
    """Two folders called data with the same number of classes and the same first names."""
    for parent, count in (("a", 3), ("b", 4)):
        tiny.save_images(tmp_path / parent / "data", per_class=count)
    ours, others = (
        genview.load_images("folder", tmp_path / parent / "data", "train", 32) for parent in "ab"
    )
    views = tmp_path / "views"
    (views / "train/cat").mkdir(parents=True)
    Image.new("RGB", (8, 8)).save(views / "train/cat/0000.png")
    support.files.write_json(
        views / "settings.json", {"dataset": "folder", "classes": 2, "source": ours.source}
    )
    assert support.data.find_views(ours, views, "folder")[0]
    limited = genview.load_images("folder", tmp_path / "a/data", "train", 32, limit=2)
    assert support.data.find_views(limited, views, "folder")[0]  # a limit is the same data set
    with pytest.raises(
        UserError, match="made for folder, 2, 6 images.*here is folder, 2, 8 images"
    ):
        support.data.find_views(others, views, "folder")


def test_the_threshold_looks_at_all_columns_of_many_tokens():
    """17 million values, of which every second is larger: a stride of 2 would see only half of
    them."""
    a = torch.zeros(66_500, 256)
    a[:, 1::2] = 1.0
    a += torch.rand(256, generator=torch.Generator().manual_seed(0)) * 0.1
    assert a.numel() > 16_000_000
    alpha = quality_loss.foreground_threshold(a, 0.4)
    assert (a > alpha).float().mean().item() == pytest.approx(0.4, abs=0.01)
