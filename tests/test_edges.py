"""Formulas at their edges, and the shares and sizes of random augmentations, as views show them."""
import colorsys
import math

import numpy as np
import pytest
import torch
from PIL import Image
from running import call

import shapes
import train_moco
from generate_views import foreground_proportion, noise_level
from quality_loss import (
    fit_foreground,
    foreground_attention,
    info_nce_in_batch,
    pair_quality,
    quality_weights,
    sinkhorn,
)
from support.augment import CLIP_MEAN, CLIP_STD


# ------------------------------------------------------------------------------ attention, quality
@pytest.mark.parametrize("contrast, constant", [(1e-3, False), (1e-4, False), (1e-7, True)])
def test_a_map_of_low_contrast_is_no_constant_map(contrast, constant):
    share = [0.0, 0.25, 0.5, 1.0]
    features = torch.tensor([[[1 + contrast * s, 0.5] for s in share]], dtype=torch.float64)
    fg, bg = foreground_attention(features, torch.tensor([1.0, 0.0]))
    if constant:
        assert fg.tolist() == bg.tolist() == [[0.25] * 4]
    else:
        assert fg[0].tolist() == pytest.approx([s / 1.75 for s in share], abs=0.005)
        assert bg[0].tolist() == pytest.approx([(1 - s) / 2.25 for s in share], abs=0.005)


def test_one_constant_map_of_a_batch_changes_no_other():
    features = torch.randn(3, 9, 4, generator=torch.Generator().manual_seed(0))
    v1 = torch.ones(4)
    alone = foreground_attention(features[1:], v1)
    features[0] = 2.0
    for together, expected in zip(foreground_attention(features, v1), alone, strict=True):
        assert torch.equal(together[1:], expected)
        assert together[0].tolist() == pytest.approx([1 / 9] * 9)


def test_quality_of_a_view_with_itself_and_with_its_opposite():
    """s^f = s^b = 1 and q = 0, whatever the scale of the second and the order of its places; with
    the opposite of a view foreground and background change their roles."""
    F = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(1))
    v1 = torch.randn(4, generator=torch.Generator().manual_seed(2))
    for other in (F, 7 * F, F.flip(1)):
        q, s_f, s_b = pair_quality(F, other, v1)
        assert torch.allclose(s_f, torch.ones(2)) and torch.allclose(s_b, torch.ones(2))
        assert torch.allclose(q, torch.zeros(2), atol=1e-5)
    _, s_f, s_b = pair_quality(F, F, -v1)          # both sides change: still the same view
    assert torch.allclose(s_f, torch.ones(2)) and torch.allclose(s_b, torch.ones(2))
    q, s_f, s_b = pair_quality(F, F.roll(1, 0), v1)
    minus_q, minus_f, minus_b = pair_quality(F, F.roll(1, 0), -v1)
    assert torch.allclose(minus_q, -q, atol=1e-5)  # a wrong sign swaps them
    assert torch.allclose(minus_f, s_b, atol=1e-5) and torch.allclose(minus_b, s_f, atol=1e-5)


def test_quality_reaches_its_extremes():
    """The same subject on opposite grounds: 2; opposite subjects on the same ground: -2."""
    subject, ground = torch.tensor([1.0, 0, 0]), torch.tensor([0.0, 1, 0])
    view = torch.stack([subject, ground])[None]
    q, s_f, s_b = pair_quality(view, torch.stack([subject, -ground])[None], subject)
    assert [q.item(), s_f.item(), s_b.item()] == pytest.approx([2, 1, -1])
    lifted = torch.tensor([0.0, 0, 1])             # what the component measures, in both
    view, other = (torch.stack([sign * 100 * subject + lifted, ground])[None] for sign in (1, -1))
    q, s_f, s_b = pair_quality(view, other, lifted)
    assert [q.item(), s_f.item(), s_b.item()] == pytest.approx([-2, -1, 1], abs=1e-3)


@pytest.mark.parametrize("gamma, expected", [
    (0.0, [1, 1, 1]), (1.0, [3 / 7, 6 / 7, 12 / 7]), (-1.0, [12 / 7, 6 / 7, 3 / 7]),
    (2.0, [3 / 21, 12 / 21, 48 / 21]), (1e4, [0, 0, 3]), (-1e4, [3, 0, 0])])
def test_weights_for_any_gamma(gamma, expected):
    """Qualities 0, log 2 and log 4: w is proportional to 1, 2^gamma, 4^gamma."""
    q = torch.tensor([0, math.log(2), math.log(4)])
    assert quality_weights(q, gamma).tolist() == pytest.approx(expected, rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("gamma", [-1e4, 0.0, 1.0, 1e4])
def test_weights_of_one_pair_and_of_equal_pairs_are_one(gamma):
    assert quality_weights(torch.tensor([-1.7]), gamma).tolist() == [1]
    assert quality_weights(torch.full((5,), 0.3), gamma).tolist() == pytest.approx([1] * 5)
    two = quality_weights(torch.tensor([2.0, 2.0, -2.0]), 1e4)
    assert two.tolist() == pytest.approx([1.5, 1.5, 0])


# ------------------------------------------------------------------------------------------- losses
@pytest.mark.parametrize("offset", [0, 1, 2, 4])
def test_offset_says_where_the_positives_are(offset):
    rng = np.random.default_rng(0)
    q, k, t = rng.normal(size=(2, 3)), rng.normal(size=(6, 3)), 0.7
    expected = 0.0
    for i in range(2):
        total = sum(math.exp(q[i] @ key / t) for key in k)
        expected -= math.log(math.exp(q[i] @ k[offset + i] / t) / total) / 2
    loss = info_nce_in_batch(torch.tensor(q), torch.tensor(k), temperature=t, offset=offset)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("offset", [-1, 5])
def test_an_offset_outside_the_keys_is_refused(offset):
    with pytest.raises(ValueError, match=str(offset)):
        info_nce_in_batch(torch.ones(2, 3), torch.ones(6, 3), temperature=1.0, offset=offset)


@pytest.mark.parametrize("iterations", [1, 2])
def test_sinkhorn_after_few_iterations(iterations):
    """Columns first, then rows, by plain loops."""
    scores = np.random.default_rng(1).uniform(-1, 1, (4, 3))
    Q = np.exp(scores / 0.2)
    for _ in range(iterations):
        for p in range(3):
            Q[:, p] /= sum(Q[i, p] for i in range(4))
        for i in range(4):
            Q[i] /= sum(Q[i, p] for p in range(3))
    codes = sinkhorn(torch.tensor(scores), epsilon=0.2, iterations=iterations)
    assert np.allclose(codes.numpy(), Q, atol=1e-5)


# --------------------------------------------------------------------------------------- foreground
def first_eigenvector(tokens):
    flat = tokens.double().flatten(0, 1).numpy()
    values, vectors = np.linalg.eigh(np.cov(flat.T))
    assert values[-1] > 1.2 * values[-2]           # else the question has no answer
    return vectors[:, -1]


@pytest.mark.parametrize("mean, shift", [(0.0, 0.0), (500.0, 0.0), (500.0, 2.5), (500.0, 5.0),
                                         (0.0, 2.5)])
def test_the_component_is_of_the_centred_covariance(mean, shift):
    """Of tokens far from zero, and of those whose mean is another after some hundred images. Around
    the first mean the shift of 2.5 would count most: 4.2, against 2.6; around their own 1.7."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.tensor([1.0, 1.6, 0.5, 0.5, 1.0])
    tokens = torch.randn(700, 9, 5, generator=generator) * scale + mean
    tokens[256:] += shift * torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0])
    v1, _ = fit_foreground(tokens, (3, 3))
    assert abs(v1.numpy() @ first_eigenvector(tokens)) == pytest.approx(1, abs=1e-4)
    assert v1.norm().item() == pytest.approx(1, abs=1e-5)
    assert v1.abs().argmax() == (2 if shift > 4 else 1)


@pytest.mark.parametrize("images", [255, 256, 257, 513])
def test_every_image_counts_once(images):
    """The last ones, too: they alone vary."""
    generator = torch.Generator().manual_seed(1)
    tokens = 0.01 * torch.randn(images, 4, 3, generator=generator)
    tokens[-1] += torch.tensor([[-5.0, 1, 0], [5.0, -1, 0], [5.0, -1, 0], [-5.0, 1, 0]])
    v1, _ = fit_foreground(tokens, (2, 2))
    assert abs(v1.numpy() @ first_eigenvector(tokens)) == pytest.approx(1, abs=1e-4)


def test_the_border_is_one_token_wide():
    """A figure that fills all but the outermost ring of 6 x 6 tokens is at the centre."""
    a = torch.zeros(6, 6)
    a[1:-1, 1:-1] = 1.0
    a[2:-2, 2:-2] = -0.5                           # a ring: the innermost tokens alone mislead
    noise = 0.01 * torch.randn(50, 36, 3, generator=torch.Generator().manual_seed(0))
    tokens = a.flatten()[None, :, None] * torch.tensor([1.0, 0, 0]) + noise
    v1, _ = fit_foreground(tokens, (6, 6), fraction=0.3)
    assert v1[0] > 0.9


@pytest.mark.parametrize("fraction", [0.1, 0.4, 0.75])
def test_the_fraction_is_the_share_of_tokens_above_the_threshold(fraction):
    """Of all tokens together, not of each image."""
    generator = torch.Generator().manual_seed(2)
    level = torch.randn(50, 1, 1, generator=generator) * torch.tensor([3.0, 0, 0])
    tokens = torch.randn(50, 16, 3, generator=generator) + level
    v1, alpha = fit_foreground(tokens, (4, 4), fraction)
    p = foreground_proportion(tokens, v1, alpha)
    assert p.mean().item() == pytest.approx(fraction, abs=0.005) and p.std() > 0.1
    assert isinstance(alpha, float)


def test_borders_of_proportions_and_levels():
    border = torch.tensor([0.2, 0.4, 0.6, 0.8])
    one = torch.ones(())
    assert noise_level(border).tolist() == [0, 100, 200, 300]
    assert noise_level(torch.nextafter(border, one)).tolist() == [100, 200, 300, 400]
    assert noise_level(torch.nextafter(border, -one)).tolist() == [0, 100, 200, 300]
    assert noise_level(torch.tensor([0.0, 1e-9, 1.0])).tolist() == [0, 0, 400]
    assert noise_level(torch.tensor([])).tolist() == []
    tokens = torch.tensor([[[-2.0], [-1.0]], [[0.0], [3.0]]])
    for threshold, expected in [(-3, [1, 1]), (-2, [0.5, 1]), (-1, [0, 1]), (0, [0, 0.5]),
                                (3, [0, 0])]:
        assert foreground_proportion(tokens, torch.ones(1), threshold).tolist() == expected


# ---------------------------------------------------------------------------------- world of shapes
@pytest.fixture(scope="module")
def seen(shapes_encoder):
    """Scenes and the tokens of a briefly trained encoder."""
    scenes = shapes.sample_scenes(500, torch.Generator().manual_seed(3))
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    with torch.no_grad():
        return scenes, shapes_encoder((shapes.render(scenes) / 255 - mean) / std)


def test_adaptive_levels_of_shapes_are_spread_and_follow_the_truth(seen):
    scenes, tokens = seen
    p = foreground_proportion(tokens, *fit_foreground(tokens, (8, 8)))
    counts = (noise_level(p) // 100).bincount(minlength=5)
    assert (counts >= 15).sum() >= 4 and counts.max() < 300          # of 500
    area = shapes.foreground(scenes).mean((1, 2))
    assert np.corrcoef(p, area)[0, 1] > 0.93       # measured: 0.967
    level = noise_level(p)
    assert area[level == 0].mean() + 0.1 < area[level >= 300].mean()


@pytest.mark.parametrize("field", ["centre", "size", "angle", "colour", "ground", "waves", "phases",
                                   "kind"])
def test_stronger_noise_changes_every_part_of_a_scene_more(field):
    scenes = shapes.sample_scenes(800, torch.Generator().manual_seed(4))
    old, change = getattr(scenes, field), []
    for level in (0, 100, 200, 300, 400):
        other = shapes.perturb(scenes, level, torch.Generator().manual_seed(5))
        change.append((getattr(other, field) - old).abs().mean().item())
    rise = np.diff(change)
    assert change[0] > 0 and (rise > 0.02 * change[0]).all()
    most = shapes.perturb(scenes, 999, torch.Generator().manual_seed(5))
    assert torch.equal(getattr(most, field), getattr(other, field))  # all of it is new from 400 on


# ------------------------------------------------------------------------- augmentations, by shares
SIDE = 16


def views_of(folder, picture, *flags):
    """The views of 2,048 pairs of one picture, uncropped: two tensors (2048, 3, 16, 16) in [0, 1],
    recorded from a training whose steps do nothing. The folder holds 512 copies, in memory."""
    for number in range(512):
        path = folder / f"images/train/all/{number:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        if number:
            path.symlink_to(folder / "images/train/all/000.png")
        else:
            Image.fromarray(picture).save(path)
    steps = []

    def train_step(method, optimizer, views, *rest):
        steps.append([view.clone() for view in views])
        return {"loss": torch.zeros(())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_moco, "train_step", train_step)
        call(train_moco, "--dataset=folder", "--data-dir", folder / "images", "--views-dir=none",
             f"--image-size={SIDE}", "--arch=resnet10_narrow", "--batch-size=512", "--epochs=4",
             "--knn-every=0", "--workers=0", "--device=cpu", "--crop-min=1", "--output-dir",
             folder / "run", "--dim=8", *flags)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    assert len(steps) == 4
    return [torch.cat(views) * std + mean for views in zip(*steps, strict=True)]


def coloured_picture():
    """A light grey one; dark grey on the left; a small coloured patch in the middle of the top."""
    picture = np.full((SIDE, SIDE, 3), 153, np.uint8)
    picture[:, :4] = 77
    picture[:2, 7:9] = COLOUR
    return picture


COLOUR = (128, 102, 77)                            # hue 0.0817, chroma 0.2


def luma(x):
    return 0.2989 * x[..., 0] + 0.587 * x[..., 1] + 0.114 * x[..., 2]


def what_was_done(views):
    """{name: (n,)} of the views (n, 3, 16, 16) of the coloured picture: is it mirrored, grey,
    jittered; by what factors of brightness, contrast, saturation, and turn of hue?

    Contrast and brightness scale the difference of the two greys, brightness alone the mean;
    saturation scales the chroma beyond that. The greys show no hue.
    """
    pixels = views.permute(0, 2, 3, 1).double()
    left, right, patch = pixels[:, 8, 1], pixels[:, 8, 14], pixels[:, 0, 8]         # (n, 3)
    mirrored = left[:, 1] > right[:, 1]
    dark, light = torch.minimum(left, right)[:, 1], torch.maximum(left, right)[:, 1]
    chroma = patch.amax(1) - patch.amin(1)
    before = torch.tensor(coloured_picture() / 255)
    brightness = luma(pixels).mean((1, 2)) / luma(before).mean()
    spread = (light - dark) * 255 / (153 - 77)     # brightness x contrast
    hue = [colorsys.rgb_to_hsv(*colour)[0] for colour in patch.tolist()]
    hue = torch.tensor(hue) - colorsys.rgb_to_hsv(*(x / 255 for x in COLOUR))[0]
    unjittered = ((spread - 1).abs() < 1e-3) & ((brightness - 1).abs() < 1e-3)
    return dict(mirrored=mirrored, grey=chroma < 1e-3, jittered=~unjittered, brightness=brightness,
                contrast=spread / brightness, saturation=chroma * 255 / 51 / spread,
                hue=(hue + 0.5) % 1 - 0.5)


@pytest.fixture(scope="module")
def v2(tmp_path_factory):
    """Both views of MoCo v2."""
    views = views_of(tmp_path_factory.mktemp("v2"), coloured_picture(), "--queue=512", "--blur=0",
                     "--start-batches=0")
    return [what_was_done(view) for view in views]


@pytest.fixture(scope="module")
def v3(tmp_path_factory):
    views = views_of(tmp_path_factory.mktemp("v3"), coloured_picture(), "--method=mocov3",
                     "--hidden=16", "--blur=0")
    return [what_was_done(view) for view in views]


def assert_share(chosen, probability):
    """Within four standard deviations."""
    n = len(chosen)
    bound = 4 * math.sqrt(probability * (1 - probability) / n)
    assert chosen.double().mean().item() == pytest.approx(probability, abs=bound)


@pytest.mark.parametrize("what, probability", [("mirrored", 0.5), ("grey", 0.2), ("jittered", 0.8)])
def test_shares_of_views(v2, v3, what, probability):
    for done in v2:
        assert_share(done[what], probability)
    assert_share(v3[0][what], probability)
    if what != "grey":                             # v3 solarises the second view, which hides it
        return
    assert_share(v3[1][what], probability)


@pytest.mark.parametrize("what, least, most", [
    ("brightness", 0.6, 1.4), ("contrast", 0.6, 1.4), ("saturation", 0.6, 1.4),
    ("hue", -0.1, 0.1)])
def test_factors_of_the_jitter_fill_their_range(v2, what, least, most):
    """Uniformly: quarters of the range, its ends, and no more."""
    for done in v2:
        factor = done[what][done["jittered"] & ~done["grey"]]
        share = (factor - least) / (most - least)  # uniform in [0, 1]
        assert len(share) > 1200 and share.min() > -0.02 and share.max() < 1.02
        assert share.min() < 0.03 and share.max() > 0.97
        for quarter in (0.25, 0.5, 0.75):
            assert_share(share < quarter, quarter)
        still = done[what][~done["jittered"] & ~done["grey"]]
        assert (still - (0 if what == "hue" else 1)).abs().max() < 0.01


def test_moco_v3_jitters_saturation_less(v3):
    done = v3[0]
    chosen = done["jittered"] & ~done["grey"]
    for what, least, most in [("saturation", 0.8, 1.2), ("contrast", 0.6, 1.4), ("hue", -0.1, 0.1)]:
        share = (done[what][chosen] - least) / (most - least)
        assert -0.02 < share.min() < 0.03 and 0.97 < share.max() < 1.02


def test_what_is_drawn_is_drawn_apart(v2):
    """No two of the decisions and factors go together, within a view or across the two."""
    chosen = torch.ones(2048, dtype=torch.bool)
    for done in v2:
        chosen &= done["jittered"] & ~done["grey"]
    columns = [done[what][chosen].double() for done in v2
               for what in ("mirrored", "contrast", "saturation", "hue")]
    assert chosen.sum() > 600
    between = torch.corrcoef(torch.stack(columns)) - torch.eye(len(columns))
    assert between.abs().max() < 4.5 / math.sqrt(chosen.sum())
    columns = [done[what].double() for done in v2 for what in ("mirrored", "grey", "jittered")]
    between = torch.corrcoef(torch.stack(columns)) - torch.eye(6)
    assert between.abs().max() < 4.5 / math.sqrt(2048)


@pytest.fixture(scope="module")
def blurred(tmp_path_factory):
    """MoCo v3's views of a white picture with a black stripe on the left, and for each view how far
    the black leaks into the white beside it, whether white is dark, and what else was done. However
    it is jittered, white stays above 0.5 and black below."""
    picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
    picture[:, :4] = 0
    picture[:2, 7:9] = (60, 0, 0)                  # shows whether a view is grey
    views = views_of(tmp_path_factory.mktemp("blur"), picture, "--method=mocov3", "--hidden=16",
                     "--blur=0.5")
    found = []
    for view in views:
        rows = view[:, 1, 12].double()             # green of one row                     (n, 16)
        # The white side is the longer one: its middle pixel is the picture's.
        mirrored = (rows[:, 9] - rows[:, 15]).abs() > (rows[:, 6] - rows[:, 0]).abs()
        rows = torch.where(mirrored[:, None], rows.flip(1), rows)
        white, beside, black = rows[:, 15], rows[:, 4], rows[:, 0]
        leak = (white - beside) / (white - black)
        patch = view[:, :, 0, 8]
        found.append(dict(leak=leak, dark=white < 0.5, mirrored=mirrored,
                          grey=patch.amax(1) - patch.amin(1) < 1e-4))
    return found


def leak_of(sigma):
    """By a Gaussian of this standard deviation, in pixels; there is nothing beyond the picture."""
    place = np.arange(SIDE)
    kernel = np.exp(-(place[:, None] - place) ** 2 / (2 * sigma ** 2))
    row = (kernel / kernel.sum(1, keepdims=True)) @ (place >= 4)
    return (row[15] - row[4]) / (row[15] - row[0])


def test_solarised_and_blurred_shares_of_moco_v3(blurred):
    """Blur of probability 1 and 0.1, solarisation of 0 and 0.2. A blur of less than 0.25 pixels
    shows nothing: 8 of 100."""
    one, two = blurred
    assert not one["dark"].any()
    assert_share(two["dark"], 0.2)
    shows = 1 - (0.25 - 0.1) / 1.9
    assert_share(one["leak"].abs() > leak_of(0.25), shows)
    assert_share(two["leak"][~two["dark"]].abs() > leak_of(0.25), 0.1 * shows)


def test_solarisation_and_blur_are_drawn_apart_from_the_rest(blurred):
    two = blurred[1]
    assert_share(two["grey"], 0.2)
    chosen = two["leak"].isfinite()                # solarised, white can be as black as black
    columns = [two["dark"], two["leak"].abs() > leak_of(0.25), two["mirrored"], two["grey"],
               blurred[0]["leak"] > leak_of(1.0)]
    columns = torch.stack(columns)[:, chosen].double()
    between = torch.corrcoef(columns) - torch.eye(5)
    assert between.abs().max() < 4.5 / math.sqrt(chosen.sum()) and chosen.sum() > 1500


def test_sigma_of_the_blur_is_uniform_from_a_tenth_to_two_pixels(blurred):
    for sigma in (0.4, 0.7, 1.0, 1.3, 1.6):
        assert_share(blurred[0]["leak"] < leak_of(sigma), (sigma - 0.1) / 1.9)
