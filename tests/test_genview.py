"""genview.py and what it uses of support/: augmentations against torchvision's, pairs, images and
views, the frozen encoder, files, checkpoints, networks."""
import math
import multiprocessing
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import torchvision.transforms.v2.functional as tv
from PIL import Image
from running import CPU
from torch import nn
from torch.testing import assert_close

import genview
import support.augment
from genview import FrozenEncoder, PairLoader, PairQuality, load_images
from quality_loss import pair_quality
from support.augment import CLIP_MEAN, CLIP_STD, CROP_TRIES, Augmentation, Draws, normalise
from support.command_line import UserError
from support.data import Images, find_files, to_tensor
from support.files import read_component, write_json
from support.networks import make_backbone, sine_positions
from support.seeds import step_generator
from support.views import find_views, views_into_memory

PLAIN = Augmentation(jitter=(0, 0, 0, 0), blur=0)
STRONG = Augmentation(jitter=(0.4, 0.4, 0.4, 0.1), blur=0)
FULL = Augmentation(solarise=0.3)


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def random_pixels(n=6, size=16, seed=0):
    return torch.randint(0, 256, (n, 3, size, size), generator=seeded(seed), dtype=torch.uint8)


def in_memory(pixels=None):
    names, labels = [f"train/{i:05d}" for i in range(12)], torch.arange(12) % 3
    return Images(names, labels, 3, random_pixels(12) if pixels is None else pixels)


def picture(path, size=8, colour="white"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (size, size), colour).save(path)
    return path


# ------------------------------------------------------------------------------------ augmentations
FACTORS = ("brightness", "contrast", "saturation", "hue")
X = random_pixels() / 255


def recoloured(x, augmentation=PLAIN, order=(0, 1, 2, 3), **numbers):
    """augment_crops of x with given random numbers; without them nothing is changed. Undoes the
    normalisation."""
    draws = Draws.split(torch.full((len(x), Draws.COLUMNS), 0.999))
    for name, value in numbers.items():
        factor = name in FACTORS
        column = draws.strength[:, FACTORS.index(name)] if factor else getattr(draws, name)
        column.fill_(value)
    out = support.augment.augment_crops(x.clone(), draws, list(order), augmentation)
    return out * torch.tensor(CLIP_STD).view(3, 1, 1) + torch.tensor(CLIP_MEAN).view(3, 1, 1)


@pytest.mark.parametrize("u", [0.0, 0.3, 0.9])
@pytest.mark.parametrize("name", FACTORS)
def test_jitter_matches_torchvision(name, u):
    others = {other: 0.5 for other in FACTORS if other != name}             # 0.5: factor 1, turn 0
    ours = recoloured(X, STRONG, jitter=0.0, **{name: u}, **others)
    factor = (2 * u - 1) * 0.1 if name == "hue" else 1 + (2 * u - 1) * 0.4
    assert_close(ours, getattr(tv, f"adjust_{name}")(X, factor), atol=1e-3, rtol=0)


def test_jitters_in_another_order_match_torchvision():
    numbers = dict(jitter=0.0, brightness=0.9, contrast=0.1, saturation=0.2, hue=0.7)
    ours = recoloured(X, STRONG, (3, 1, 0, 2), **numbers)
    theirs = tv.adjust_contrast(tv.adjust_hue(X, 0.04), 1 - 0.8 * 0.4)
    theirs = tv.adjust_saturation(tv.adjust_brightness(theirs, 1 + 0.8 * 0.4), 1 - 0.6 * 0.4)
    assert_close(ours, theirs, atol=1e-3, rtol=0)


def test_hue_of_grey_and_of_primary_colours():
    colours = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0.5, 0.5, 0.5], [1, 0, 0], [0, 1, 0],
                            [0, 0, 1], [1, 1, 0]])[..., None, None]
    for turn in (-0.5, -0.1, 0.0, 0.1, 1 / 3, 0.5):
        ours = support.augment.shift_hue(colours, torch.full((len(colours), 1, 1, 1), turn))
        assert_close(ours, tv.adjust_hue(colours, turn), atol=1e-3, rtol=0)


def test_grey_solarise_and_flip_match_torchvision():
    solarise = PLAIN._replace(solarise=0.2)
    for ours, theirs, atol in [
            (recoloured(X, STRONG), X, 1e-5),                        # nothing is drawn
            (recoloured(X, grey=0.1), tv.rgb_to_grayscale(X, 3), 1e-3),
            (recoloured(X, flip=0.1), tv.horizontal_flip(X), 1e-5),
            (recoloured(X, solarise, solarise=0.1), tv.solarize(X, 0.5), 1e-3),
            (recoloured(X, solarise, solarise=0.3), X, 1e-5)]:
        assert_close(ours, theirs, atol=atol, rtol=0)


@pytest.mark.parametrize("u", [0.0, 0.4, 1.0])
def test_blur_matches_torchvision_in_the_interior(u):
    x, sigma = random_pixels(2, 48) / 255, 0.1 + 1.9 * u
    ours = recoloured(x, PLAIN._replace(blur=0.5), blur=0.1, sigma=u)
    theirs = tv.gaussian_blur(x, kernel_size=[17, 17], sigma=[sigma, sigma])
    assert_close(ours[..., 9:-9, 9:-9], theirs[..., 9:-9, 9:-9], atol=1e-3, rtol=0)


def test_every_image_has_its_own_numbers():
    def recolour(x, u):
        return support.augment.augment_crops(x.clone(), Draws.split(u), [2, 0, 3, 1], FULL)
    u = torch.rand(6, Draws.COLUMNS, generator=seeded(1))
    together = recolour(X, u)
    alone = torch.cat([recolour(X[i:i + 1], u[i:i + 1]) for i in range(6)])
    assert_close(together, alone, atol=1e-5, rtol=0)
    assert together.isfinite().all()


@pytest.mark.parametrize("box, size", [((4, 6, 20, 22), 16), ((4, 6, 12, 14), 16),
                                       ((2, 4, 26, 28), 24), ((8, 4, 16, 20), 16)])
def test_crop_matches_torchvision(box, size):
    """torchvision cuts first and repeats the border of the cut; ours sees what lies beyond it: in
    an enlarged crop the rim of one pixel differs."""
    pixels, (x1, y1, x2, y2) = random_pixels(2, 32), box
    ours = support.augment.crop(pixels, torch.tensor([box, box]).float(), size)
    theirs = tv.resized_crop(pixels.float(), y1, x1, y2 - y1, x2 - x1, [size] * 2, antialias=False)
    side = min(x2 - x1, y2 - y1)
    rim = math.ceil(size / side / 2) if size > side else 0
    inside = (..., slice(rim, size - rim), slice(rim, size - rim))
    assert_close(ours[inside] / 255, theirs[inside] / 255, atol=1e-2, rtol=0)


@pytest.mark.parametrize("height, width", [(32, 32), (20, 60), (300, 40)])
def test_crop_boxes_are_inside_and_within_bounds(height, width):
    u = torch.rand(5000, CROP_TRIES, 4, generator=seeded(0))
    boxes = support.augment.crop_boxes(u, height, width, (0.2, 1.0))
    x1, y1, x2, y2 = boxes.unbind(1)
    assert (boxes >= -1e-3).all() and (x2 <= width + 1e-3).all() and (y2 <= height + 1e-3).all()
    w, h = x2 - x1, y2 - y1
    ratio, area = w / h, w * h / (height * width)
    assert ratio.min() >= 0.749 and ratio.max() <= 1.334
    central = ((ratio - 1).abs() < 1e-5) & ((w - min(height, width)).abs() < 1e-3)  # no try fitted
    assert (area[~central] >= 0.199).all() and area.max() <= 1.001
    if height == width:                            # the area is near uniform, all places occur
        assert central.float().mean() < 0.01
        assert area.min() < 0.21 and 0.50 < area.mean() < 0.6 and abs(ratio.log().mean()) < 0.02
        assert x1.max() > 0.3 * width and x1.min() < 0.02 * width
        assert abs((x1 + x2).mean() - width) < 0.02 * width


def test_crop_boxes_without_a_fit_is_the_central_square():
    boxes = support.augment.crop_boxes(torch.rand(3, CROP_TRIES, 4), 10, 100, (0.9, 1.0))
    assert_close(boxes, torch.tensor([[45.0, 0, 55, 10]]).expand(3, 4))


# -------------------------------------------------------------------------------------------- pairs
def batches(images, views, epoch=0, world=CPU, seed=3, batch_size=4, augmentations=(FULL, FULL),
            **options):
    loader = PairLoader(images, views, augmentations, 16, batch_size, seed, world,
                        workers=0, **options)
    return list(loader.epoch(epoch))


def same(a, b):
    return len(a) == len(b) and all(torch.equal(x, y) for left, right in zip(a, b, strict=True)
                                    for x, y in zip(left, right, strict=True))


def is_white(views):
    """Which of the views (n, 3, S, S) show a white picture: (n,)."""
    return (views - normalise(torch.ones(3, 1, 1))).abs().amax((1, 2, 3)) < 1e-3


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """12 images that stay on the disk, and a list of their views: white pictures; the third image
    has none."""
    folder = tmp_path_factory.mktemp("files")
    tiny.save_images(folder, per_class=6, size=80)
    white = picture(folder / "white.png", 80)
    images = load_images("folder", folder, "train", 80)
    return images, [white if i != 2 else None for i in range(12)]


@pytest.fixture(params=["memory", "files"])
def pairs(request, files):
    """Images and views."""
    return files if request.param == "files" else (in_memory(), random_pixels(12, seed=1))


@pytest.fixture(params=["memory", "files"])
def white_views(request, files):
    """Images, none of which is white, and a white view of each."""
    black = torch.zeros(12, 3, 16, 16, dtype=torch.uint8)
    return (in_memory(black), black + 255) if request.param == "memory" else (
        files[0], [files[1][0]] * 12)


def test_the_same_numbers_again(pairs):
    assert same(batches(*pairs), batches(*pairs))
    assert not same(batches(*pairs), batches(*pairs, epoch=1))
    assert not same(batches(*pairs), batches(*pairs, seed=4))


def test_two_processes_make_one_batch(pairs):
    halves = zip(*(batches(*pairs, world=CPU._replace(rank=rank, size=2)) for rank in (0, 1)),
                 strict=True)
    joined = [[torch.cat(part) for part in zip(*half, strict=True)] for half in halves]
    assert same(batches(*pairs), joined)


def test_workers_live_on_and_change_no_pixel(files):
    """Two epochs from the middle of the first, one more, and an epoch that does not follow."""
    def loader(workers):
        return PairLoader(*files, (FULL, FULL), 16, 4, 3, CPU, workers)
    alone, ahead = loader(0), loader(2)
    workers = set()
    for epoch, start in ((1, 2), (2, 0), (0, 0), (1, 0)):
        assert same(list(ahead.epoch(epoch, start)), list(alone.epoch(epoch))[start:])
        workers |= {child.pid for child in multiprocessing.active_children()}
    assert len(workers) == 2
    del ahead                                      # its workers end at once, not when collected
    assert not multiprocessing.active_children()


def test_half_of_the_generated_ones_are_view_1(files):
    black = torch.zeros(400, 3, 8, 8, dtype=torch.uint8)
    images, first = Images([str(i) for i in range(400)], torch.zeros(400), 1, black), 0
    for view1, view2 in batches(images, black + 255, batch_size=100, augmentations=(PLAIN, PLAIN)):
        generated = is_white(view1)
        assert torch.equal(generated, ~is_white(view2))
        original = torch.where(generated[:, None, None, None], view2, view1)
        assert (original - normalise(torch.zeros(3, 1, 1))).abs().max() < 1e-3
        first += generated.sum().item()
    assert 160 < first < 240
    counts = torch.zeros(2)                        # how often view 1 and view 2 are generated
    for epoch in range(20):
        for pair in batches(*files, epoch=epoch, augmentations=(PLAIN, PLAIN)):
            counts += torch.tensor([is_white(x).sum() for x in pair])
    assert counts.sum() == 20 * 11 and 80 < counts[0] < 140  # one image has no view: its own pair


def test_files_and_memory_agree_on_which_view_is_generated(files):
    """The same seed draws the same choice for images in memory and for image files."""
    def generated(images, views):
        return torch.cat([is_white(view1) for view1, _ in
                          batches(images, views, augmentations=(PLAIN, PLAIN))])
    black = torch.zeros(12, 3, 16, 16, dtype=torch.uint8)
    of_files = generated(files[0], [files[1][0]] * 12)
    assert torch.equal(generated(in_memory(black), black + 255), of_files)
    assert 0 < of_files.sum() < 12


def test_without_views_both_are_of_the_image():
    grey = torch.arange(12, dtype=torch.uint8).view(12, 1, 1, 1).expand(12, 3, 8, 8).contiguous()
    seen = []
    for view1, view2 in batches(in_memory(grey), None, augmentations=(PLAIN, PLAIN)):
        assert_close(view1, view2, atol=1e-3, rtol=0)   # the weights of grey sum to 0.9999
        mean = view1[:, 0].mean((1, 2)) * CLIP_STD[0] + CLIP_MEAN[0]
        seen += (mean * 255).round().tolist()
    assert sorted(seen) == list(range(12))         # each image once


def test_crops_of_files_are_crops_of_the_picture(files):
    dataset = genview.CropsOfFiles(files[0], None, [PLAIN] * 2, [16] * 2, seed=3)
    view1, view2 = dataset[0, 5, False]
    assert view1.shape == view2.shape == (3, 16, 16) and view1.dtype == torch.uint8
    assert not torch.equal(view1, view2)
    u = torch.rand(2, Draws.COLUMNS, generator=step_generator(3, 0, 5, 2))
    tries = Draws.split(u).crop[1]                                   # view 2's box, cut by Pillow
    box = support.augment.crop_box(tries.tolist(), 80, 80, PLAIN.scale)
    theirs = files[0].pil(5).crop(box).resize((16, 16), Image.Resampling.BILINEAR)
    assert (view2.int() - to_tensor(theirs).int()).abs().max() <= 3


@pytest.mark.parametrize("height, width", [(32, 32), (20, 60), (300, 40)])
def test_boxes_of_files_are_those_of_memory_in_whole_pixels(height, width):
    """Sides within half a pixel, inside the image; where a side just fits after rounding, or no
    longer, another try is taken."""
    u = torch.rand(500, CROP_TRIES, 4, generator=seeded(1))
    exact = support.augment.crop_boxes(u, height, width, (0.2, 1.0))
    boxes = torch.tensor([support.augment.crop_box(x, height, width, (0.2, 1.0))
                          for x in u.tolist()])
    x1, y1, x2, y2 = boxes.unbind(1)
    assert (boxes >= 0).all() and (x1 < x2).all() and (x2 <= width).all() and (y2 <= height).all()
    close = ((boxes - exact).abs().amax(1) <= 1.01).float().mean()
    assert close > 0.85


def test_further_views_come_in_turn_from_both_pictures(white_views):
    """Views 3, 5, ... of the picture of view 1, views 4, 6, ... of that of view 2."""
    small = PLAIN._replace(size=8)
    for crops in batches(*white_views, augmentations=[PLAIN, PLAIN, small, small, small]):
        assert [x.shape[-1] for x in crops] == [16, 16, 8, 8, 8]
        view1, view2, *further = map(is_white, crops)
        assert torch.equal(view1, ~view2)
        for generated, of_the_first in zip(further, [view1, view2, view1], strict=True):
            assert torch.equal(generated, of_the_first)


def test_step_generators_of_different_numbers_differ():
    tuples = [(0,), (0, 0), (0, 0, 0), (1,), (1, 0), (0, 1), (2 ** 32,), (2 ** 32, 5),
              (0, 1 + 5 * 2 ** 32)]
    assert len({step_generator(*numbers).initial_seed() for numbers in tuples}) == len(tuples)
    seed = step_generator(3, 7).initial_seed()
    assert seed == step_generator(3, np.int64(7)).initial_seed()


# --------------------------------------------------------------------------------- images and views
def test_unreadable_images_are_named_or_left_out(tmp_path, capsys):
    tiny.save_images(tmp_path, per_class=3)
    cats = tmp_path / "train/cat"
    (cats / "zz.png").write_bytes((cats / "0000.png").read_bytes()[:60])
    with pytest.raises(UserError, match="zz.png cannot be read as an image"):
        load_images("folder", tmp_path, "train", 32)
    images = load_images("folder", tmp_path, "train", 32, skip_bad=True)
    assert len(images.names) == len(images.labels) == len(images.pixels) == 6
    assert "zz.png" in capsys.readouterr().err
    large = load_images("folder", tmp_path, "train", 100)            # stays on the disk
    assert large.pixels is None and len(large.names) == 7
    with pytest.raises(UserError, match="zz.png"):
        batches(large, None, batch_size=7)
    good = load_images("folder", tmp_path, "train", 100, skip_bad=True)
    assert good.names == images.names and good.left_out == images.left_out == 1
    assert torch.equal(good.labels, images.labels)


def test_limit_is_spread_over_the_classes(tmp_path):
    tiny.save_images(tmp_path, per_class=6)
    images = load_images("folder", tmp_path, "train", 32, limit=4)
    assert images.labels.tolist() == [0, 0, 1, 1] and len(images.names) == len(images.pixels) == 4
    with pytest.raises(UserError, match="train/ and val/"):
        load_images("folder", tmp_path / "train", "train", 32)


@pytest.fixture
def six(tmp_path):
    """Six images in memory."""
    return load_images("folder", tiny.save_images(tmp_path / "data", per_class=3), "train", 32)


@pytest.mark.parametrize("strip", ["", "train/"])  # our layout, and that of the authors' release
def test_views_are_found(strip, six, tmp_path):
    for name in six.names[1:]:
        path = tmp_path / "views" / name.removeprefix(strip)
        picture(path.with_suffix(".jpg"), 48, "red")
    found = find_views(six, tmp_path / "views", "folder")
    assert found[0] is None
    assert [str(path.relative_to(tmp_path / "views").with_suffix("")) for path in found[1:]] == [
        str(Path(name.removeprefix(strip)).with_suffix("")) for name in six.names[1:]]
    pixels, bad = views_into_memory(six, found)
    assert torch.equal(pixels[0], six.pixels[0]) and pixels.shape == six.pixels.shape and not bad
    assert (pixels[1:, 0] > 250).all() and (pixels[1:, 1:] < 5).all()


def test_views_of_another_set_of_the_same_name_are_refused(six, tmp_path):
    """Two folders called data with the same number of classes and the same first names."""
    picture(tmp_path / "views/train/cat/0000.png")
    write_json(tmp_path / "views/settings.json",
               {"dataset": "folder", "classes": 2, "source": six.source})
    assert find_views(six, tmp_path / "views", "folder")[0]
    limited = load_images("folder", tmp_path / "data", "train", 32, limit=2)
    assert find_views(limited, tmp_path / "views", "folder")[0]      # a limit: the same data set
    tiny.save_images(tmp_path / "other/data", per_class=4)
    other = load_images("folder", tmp_path / "other/data", "train", 32)
    message = "made for folder, 6 images.*here is folder, 8 images"
    with pytest.raises(UserError, match=message):
        find_views(other, tmp_path / "views", "folder")


# ------------------------------------------------------------------------------- the frozen encoder
def test_frozen_encoder_on_a_clip_folder(encoder_folder):
    encoder = FrozenEncoder(encoder_folder)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    views = torch.randn(3, 3, 32, 32, generator=seeded(0))
    tokens = encoder(views)
    assert tokens.shape == (3, 64, 32)             # 8 x 8 patches of 4 pixels
    clip = tiny.clip_vision_model().vision_model
    with torch.no_grad():
        hidden = clip(pixel_values=views).last_hidden_state
        theirs = [torch.stack([clip.post_layernorm(h) for h in image[1:]]) for image in hidden]
    assert_close(tokens, torch.stack(theirs), atol=1e-5, rtol=1e-4)
    for size in (16, 64):                          # another size than the model's
        resized = tv.resize(views, [size, size])
        expected = encoder(tv.resize(resized, [32, 32]))
        assert_close(encoder(resized), expected, atol=1e-4, rtol=1e-4)


def test_pair_quality_is_that_of_the_encoders_features(encoder_folder):
    encoder, component = FrozenEncoder(encoder_folder), torch.randn(32, generator=seeded(1))
    view1, view2 = torch.randn(2, 3, 3, 32, 32, generator=seeded(0))
    ours = PairQuality(encoder, component)(view1.requires_grad_(), view2)
    theirs = pair_quality(encoder(view1), encoder(view2), component)
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == (3,) and torch.equal(a, b) and not a.requires_grad
    assert ours[0].std() > 0


def test_class_and_register_tokens_are_left_out(tmp_path):
    from transformers import ViTConfig, ViTModel
    config = ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
                       intermediate_size=16, image_size=224, patch_size=32)
    ViTModel(config, add_pooling_layer=False).save_pretrained(tmp_path / "vit")
    encoder, views = FrozenEncoder(str(tmp_path / "vit")), torch.randn(2, 3, 224, 224)
    tokens = encoder(views)
    assert tokens.shape == (2, 49, 16)
    assert torch.equal(tokens, encoder.model(pixel_values=views).last_hidden_state[:, 1:])


def test_an_encoder_that_is_missing_or_reads_text_is_refused(tmp_path):
    from transformers import BertConfig, BertModel
    config = BertConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                        intermediate_size=8)
    BertModel(config).save_pretrained(tmp_path / "bert")
    for name, fault in (("nothing", "could not be loaded.*folder by"), ("bert", "cannot be used")):
        with pytest.raises(UserError, match=f"{name} {fault}.*--encoder"):
            FrozenEncoder(str(tmp_path / name))


def test_tokens_beyond_half_precision_are_kept_in_float32():
    small = torch.randn(4, 9, 5, generator=seeded(0))
    large = small * 1e6                                # a later batch; the first is converted, too
    assert genview.collect_tokens([small], 4).dtype == torch.half
    tokens = genview.collect_tokens([small, large], 10)
    assert tokens.dtype == torch.float32 and torch.equal(tokens[4:], large)
    assert torch.equal(tokens[:4], small.half().float())


def test_features_that_overflow_in_float16_are_named():
    """Before a component is fitted or read: training would end at a loss that is not finite."""
    def encoder(x):
        half = torch.is_autocast_enabled("cpu")
        return torch.full((len(x), 4, 5), math.inf if half else 1e5)
    with pytest.raises(UserError, match="not finite in float16: --precision float32"):
        genview.component_of_encoder(encoder, None, 8, CPU._replace(dtype=torch.float16))


def test_features_of_the_fit_keep_their_range(tmp_path):
    """As above, from the encoder to the component."""
    images = load_images("folder", tiny.save_images(tmp_path, per_class=4), "train", 8)
    direction = torch.tensor([3.0, 4, 0]) * 1e6

    def encoder(x):
        return x.mean(1).flatten(1)[:, :, None] * direction
    v1 = genview.component_of_encoder(encoder, images, 8, CPU)
    assert_close(v1.abs(), direction / 5e6, atol=1e-4, rtol=0)


# ---------------------------------------------------------------------------- files and checkpoints
def test_components_are_read_and_damaged_ones_refused(tmp_path):
    """Pickled code in them: test_fuzz.py."""
    v1 = np.arange(5, dtype=np.float32)
    np.savez(tmp_path / "foreground.npz", component=v1, threshold=0.7)
    np.save(tmp_path / "pca_vectors.npy", v1[:, None])
    for name, size, alpha in (("foreground.npz", 5, 0.7), ("pca_vectors.npy", None, None)):
        component, threshold = read_component(tmp_path / name, size)
        assert torch.equal(component, torch.tensor(v1)) and threshold == alpha
    with pytest.raises(UserError, match="5 numbers.*have 6"):
        read_component(tmp_path / "pca_vectors.npy", 6)
    np.savez(tmp_path / "other.npz", x=v1)
    (tmp_path / "text.npy").write_text("no array")
    (tmp_path / "void.npy").write_bytes(b"")
    (tmp_path / "short.npz").write_bytes((tmp_path / "foreground.npz").read_bytes()[:100])
    for name in ("other.npz", "text.npy", "void.npy", "short.npz", "missing.npz"):
        with pytest.raises(UserError, match=name):
            read_component(tmp_path / name)


# ----------------------------------------------------------------------------------------- networks
@pytest.mark.parametrize("size, stride", [(64, (1, 1)), (65, (2, 2))])
def test_make_backbone(size, stride):
    backbone, features = make_backbone("resnet18", size)
    assert features == 512 and backbone.eval()(torch.zeros(2, 3, 32, 32)).shape == (2, 512)
    assert backbone.conv1.stride == stride and backbone.conv1.bias is None


def test_small_pictures_keep_their_resolution():
    """CIFAR's ResNet: neither its stem nor a max-pooling makes the maps smaller."""
    for size, side, pooled in ((32, 32, False), (64, 64, False), (65, 17, True)):
        backbone, _ = make_backbone("resnet18", size)
        maps = []
        backbone.layer1.register_forward_hook(lambda _, inputs, out, maps=maps: maps.append(out))
        backbone.eval()(torch.zeros(1, 3, size, size))
        assert maps[0].shape == (1, 64, side, side)
        assert isinstance(backbone.maxpool, torch.nn.MaxPool2d) == pooled


def test_augmentations_of_swav():
    """All crops are jittered twice as strongly; the small ones are of small parts."""
    args = SimpleNamespace(method="swav", crop_min=0.14, small_min=0.05, small_crops=3,
                           small_size=16, blur=0.5, colour=1.0)
    large, *others = genview.augmentations(args)
    assert large == Augmentation((0.14, 1.0), (0.8, 0.8, 0.8, 0.2), blur=0.5)
    assert others == [large] + [large._replace(scale=(0.05, 0.14), size=16)] * 3


def test_pairs_are_drawn_from_the_best_to_the_worst(monkeypatch, tmp_path):
    """The best framed green, the worst red; scores below."""
    drawn = []

    def sheet(*arguments):
        drawn.append(arguments)
        return Image.new("RGB", (1, 1))
    monkeypatch.setattr(genview, "sheet", sheet)
    colours = torch.tensor([0.2, 0.5, 0.8]).view(3, 1, 1, 1).expand(3, 3, 8, 8)
    views = (normalise(colours), normalise(1 - colours))
    q = torch.tensor([0.0, 1.0, -1.0])

    def quality_of(*_):
        return q, q + 0.25, torch.full((3,), 0.25)
    genview.draw_pairs(tmp_path / "pairs.png", views, quality_of, CPU)
    columns, captions, frames, *_ = drawn[0]
    shown = [[view.getpixel((4, 4))[0] for view in column] for column in columns]
    assert shown == [[128, 128], [51, 204], [204, 51]]
    assert [caption.split()[2] for caption in captions] == ["1.00", "0.00", "-1.00"]
    assert frames == {(0, 0): "green", (0, 1): "green", (2, 0): "red", (2, 1): "red"}


@pytest.mark.parametrize("arch, millions", [("vit_small", 21.67), ("vit_base", 85.80)])
def test_vision_transformers_of_moco_v3(arch, millions):
    """Class token, positions and last norm counted, no classifier; positions and patch projection
    do not learn."""
    with torch.device("meta"):                     # drawing 86 million weights takes seconds
        vit, _ = make_backbone(arch, 224)
    assert round(sum(p.numel() for p in vit.parameters()) / 1e6, 2) == millions
    frozen = {name for name, p in vit.named_parameters() if not p.requires_grad}
    assert frozen == {"encoder.pos_embedding", "conv_proj.weight", "conv_proj.bias"}
    assert vit.encoder.layers[0].self_attention.num_heads == 12


def test_positions_are_sines_of_row_and_column():
    positions = sine_positions(16, 5)
    assert positions.shape == (1, 26, 16) and not positions[0, 0].any()
    for place in range(25):
        row, column = divmod(place, 5)
        expected = [f(x * 10_000 ** (-k / 4)) for x in (column, row) for f in (math.sin, math.cos)
                    for k in range(4)]
        assert_close(positions[0, 1 + place], torch.tensor(expected), atol=1e-5, rtol=0)


def test_classes_are_numbered_by_the_training_folders(tmp_path, capsys):
    """A split that lacks a class has the same labels; hidden folders are no classes; links are
    followed, but not upwards; what is left out is counted; unknown classes are refused."""
    for name in ("train/a", "train/b", "train/c", "val/b", "val/c", "train/.ipynb_checkpoints"):
        (tmp_path / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / name / "0.png")
    (tmp_path / "far").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "far/1.png")
    (tmp_path / "train/c/linked").symlink_to(tmp_path / "far")
    (tmp_path / "train/c/upwards").symlink_to(tmp_path / "train")
    (tmp_path / "train/a/x.gif").touch()
    train, test = (find_files(tmp_path, split) for split in ("train", "test"))
    assert train.labels.tolist() == [0, 1, 2, 2] and test.labels.tolist() == [1, 2]
    assert train.num_classes == test.num_classes == 3
    said = capsys.readouterr().out
    assert "4 images, 3 of 3 classes; 2 other files are left out, such as .ipynb_check" in said
    assert "2 images, 2 of 3 classes, none in a\n" in said
    (tmp_path / "val/dog").mkdir()
    with pytest.raises(UserError, match="classes that .*train does not: dog"):
        find_files(tmp_path, "test")


def test_colour_scales_all_colours():
    """0 leaves crops and flips alone, 1 is the method's own strength, between them less changes."""
    x, u = (torch.rand(64, *s, generator=seeded(0)) for s in ((3, 16, 16), (Draws.COLUMNS,)))
    draws = Draws.split(u)._replace(flip=torch.ones(64))             # none is mirrored

    def change(colour):
        augmentation = Augmentation(blur=0.5, solarise=0.2, colour=colour)
        changed = support.augment.augment_crops(x.clone(), draws, [0, 1, 2, 3], augmentation)
        return (changed - normalise(x)).abs().mean().item()
    assert change(0.0) < 1e-6 < change(0.3) < change(1.0)


def test_pictures_for_a_network_trained_elsewhere():
    """From CLIP's mean and std to ImageNet's, and back to [0, 1]."""
    x = torch.rand(2, 3, 4, 4)
    numbers = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    assert_close(support.augment.renormalise(normalise(x), *numbers), tv.normalize(x, *numbers))
    assert_close(support.augment.renormalise(normalise(x)), x)


def test_how_a_vision_transformer_starts():
    torch.manual_seed(0)
    vit, _ = make_backbone("vit_narrow", 32)
    assert torch.equal(vit.encoder.pos_embedding, sine_positions(96, 8))
    weights = {vit.conv_proj.weight: 3 * 16 + 96}
    for layer in vit.encoder.layers:
        weights |= {layer.self_attention.in_proj_weight: 96 + 96,
                    layer.self_attention.out_proj.weight: 96 + 96}
        assert not layer.mlp[0].bias.any() and not layer.mlp[3].bias.any()
    for weight, both in weights.items():
        assert 0.99 < weight.abs().max().item() / math.sqrt(6 / both) <= 1
    assert 0 < vit.class_token.abs().max() < 1e-5


@pytest.mark.parametrize("arch", ["resnet18", "resnet10_narrow"])
def test_how_convolutions_of_small_pictures_start(arch):
    torch.manual_seed(0)
    for layer in make_backbone(arch, 32)[0].modules():
        if isinstance(layer, nn.Conv2d):
            usual = math.sqrt(2 / (layer.out_channels * layer.kernel_size[0] ** 2))
            assert layer.weight.std().item() == pytest.approx(usual, rel=0.15)


def test_the_order_of_the_jitters_is_new_for_each_view_and_step(monkeypatch):
    orders = []
    monkeypatch.setattr(genview, "augment_crops",
                        lambda x, draws, order, t: orders.append(tuple(order)) or x)
    for epoch in range(5):
        batches(in_memory(), None, epoch=epoch)
    assert len(orders) == 30 and all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len(set(orders)) > 12
    assert sum(a != b for a, b in zip(orders[::2], orders[1::2], strict=True)) > 10


def test_half_the_colour_is_half_of_blur_and_solarise():
    x = random_pixels(2, 48) / 255
    half = PLAIN._replace(blur=1.0, solarise=0.4, colour=0.5)
    torch.testing.assert_close(recoloured(x, half, blur=0.6, solarise=0.3), x)
    ours = recoloured(x, half, blur=0.4, sigma=1.0)
    theirs = tv.gaussian_blur(x, kernel_size=[17, 17], sigma=[1.05, 1.05])
    torch.testing.assert_close(ours[..., 9:-9, 9:-9], theirs[..., 9:-9, 9:-9], atol=1e-3, rtol=0)
