"""Layers of every projector and predictor, the read-outs by hand, formulas at their edges."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import CPU
from torch import nn

import generate_views
import genview
import shapes
import train_byol
import train_moco
import train_swav
from quality_loss import fit_foreground, foreground_attention, quality_weights
from support.augment import Augmentation, normalise
from support.data import Images

METHODS = train_moco.METHODS | train_byol.METHODS | train_swav.METHODS
FEATURES = 128                                     # of resnet10_narrow; vit_narrow has 96


def make(name, *flags):
    """A method as the command line makes it, with D = 7 and hidden layers of 10."""
    script = next(x for x in (train_moco, train_byol, train_swav) if name in x.METHODS)
    sizes = {"mocov2": ["--queue=16"], "swav": ["--prototypes=5", "--hidden=10"]}
    flags = ["--dataset=cifar10", f"--method={name}", "--views-dir=none", "--dim=7",
             "--batch-size=8", *sizes.get(name, ["--hidden=10"]), *flags]
    if not any("--arch" in flag for flag in flags):
        flags.append("--arch=resnet10_narrow")
    torch.manual_seed(0)
    return METHODS[name](train_moco.parse_args(script.METHODS, argv=flags)).train()


def layers(net):
    """Its layers in words: 3>4 linear, +b with bias, bn, bn- without scale and shift, relu."""
    words = []
    for layer in net:
        if isinstance(layer, nn.Linear):
            bias = "+b" if layer.bias is not None else ""
            words.append(f"{layer.in_features}>{layer.out_features}{bias}")
        elif isinstance(layer, nn.BatchNorm1d):
            words.append("bn" if layer.affine else "bn-")
        else:
            words.append(type(layer).__name__.lower())
    return " ".join(words)


@pytest.mark.parametrize("name, flags, projector, predictor", [
    ("mocov2", [], "128>128+b relu 128>7+b", None),
    ("mocov3", [], "128>10 bn relu 10>7 bn-", "7>10 bn relu 10>7"),
    ("mocov3", ["--arch=vit_narrow"], "96>10 bn relu 10>10 bn relu 10>7 bn-",
     "7>10 bn relu 10>7 bn-"),
    ("byol", [], "128>10 bn relu 10>7", "7>10 bn relu 10>7"),
    ("simsiam", [], "128>7 bn relu 7>7 bn-", "7>10 bn relu 10>7"),
    ("simsiam", ["--image-size=96", "--arch=resnet18"], "512>7 bn relu 7>7 bn relu 7>7 bn-",
     "7>10 bn relu 10>7"),
    ("swav", ["--small-crops=0"], "128>10 bn relu 10>7", None)])
def test_projectors_and_predictors(name, flags, projector, predictor):
    method = make(name, *flags)
    assert layers(method.query.head) == projector
    if hasattr(method, "key"):
        assert layers(method.key.head) == projector
    if predictor:
        assert layers(method.predictor) == predictor
    if name == "swav":
        assert layers([method.prototypes]) == "7>5"


# -------------------------------------------------------------------------------------- read-outs
def quality_of(view1, view2):
    q = torch.linspace(-1, 1, len(view1))
    return q, q / 2 + 0.5, 0.5 - q / 2


def unit(x):
    return F.normalize(x.float(), dim=1).detach().double().numpy()


def mean_of_others(a, b):
    """Mean cosine of each row of a with all rows of b but its own, in plain loops."""
    n = len(a)
    return np.mean([a[i] @ b[j] for i in range(n) for j in range(n) if i != j])


def embeddings(name, method, views):
    """By name: query, its positives, the others it is compared with, and what std looks at."""
    view1, view2 = views
    if name == "mocov2":
        q, k = unit(method.query(view1)), unit(method.key(view2))
        return q, k, method.queue.double().numpy(), q
    if name == "mocov3":
        q, k = unit(method.predictor(method.query(view1))), unit(method.key(view2))
        return q, k, None, q
    if name == "swav":
        z = unit(method.query(torch.cat(views)))
        return z[:8], z[8:], None, z[:8]
    target = method.key if name == "byol" else method.query
    z1, z2 = unit(target(view1)), unit(target(view2))
    return unit(method.predictor(method.query(view1))), z2, None, z1


@pytest.mark.parametrize("name", METHODS)
def test_readouts_by_hand(name):
    flags = ["--small-crops=0", "--epsilon=0.05"] if name == "swav" else []
    method = make(name, *flags)
    views = list(torch.randn(2, 8, 3, 32, 32, generator=torch.Generator().manual_seed(1)))
    twin = make(name, *flags)
    twin.update(0.0)
    q, k, negatives, z = embeddings(name, twin, views)
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.0)
    got = train_moco.train_step(method, optimizer, views, quality_of, 2.0, 0.0, CPU)
    assert got["pos"].item() == pytest.approx(np.mean([a @ b for a, b in zip(q, k, strict=True)]),
                                              abs=1e-3)
    neg = np.mean(q @ negatives.T) if negatives is not None else mean_of_others(q, k)
    assert got["neg"].item() == pytest.approx(neg, abs=1e-3)
    std = z.std(0, ddof=1).mean() * 7 ** 0.5
    assert got["std"].item() == pytest.approx(std, abs=1e-3)
    w = np.exp(2.0 * np.linspace(-1, 1, 8))
    assert got["ess"].item() == pytest.approx(w.sum() ** 2 / (w ** 2).sum() / 8, abs=1e-4)
    assert got["s_f"].item() == pytest.approx(0.5) and got["s_b"].item() == pytest.approx(0.5)


def test_foreground_and_background_similarity_are_not_swapped():
    method = make("mocov2")
    views = list(torch.randn(2, 8, 3, 32, 32))
    optimizer = torch.optim.SGD([p for p in method.parameters() if p.requires_grad], lr=0.0)
    similar = torch.full((8,), 0.75)
    got = train_moco.train_step(method, optimizer, views, lambda *_: (similar, similar, -similar),
                                1.0, 0.0, CPU)
    assert got["s_f"] == 0.75 and got["s_b"] == -0.75 and got["ess"] == pytest.approx(1)


class Product(nn.Module):
    """A method whose loss is p times the mean of view 1."""
    def __init__(self):
        super().__init__()
        self.p = nn.Parameter(torch.ones(()))
        self.fractions = []

    def update(self, fraction):
        self.fractions.append(fraction)

    def forward(self, views, weights, world):
        return self.p * (views[0].mean((1, 2, 3)) * weights).mean(), {}


def test_a_step_passes_on_what_it_gets():
    """quality_of sees both views, gamma reaches the weights, update the fraction; the gradient is
    that of the second batch alone."""
    method = Product()
    optimizer = torch.optim.SGD(method.parameters(), lr=0.0)
    seen = []

    def watch(view1, view2):
        seen.append((view1, view2))
        return quality_of(view1, view2)
    batches = torch.randn(2, 2, 8, 3, 4, 4)
    for number, views in enumerate(batches):
        train_moco.train_step(method, optimizer, list(views), watch, 3.0, number / 4, CPU)
    assert torch.equal(seen[0][0], batches[0, 0]) and torch.equal(seen[0][1], batches[0, 1])
    assert method.fractions == [0.0, 0.25]
    w = np.exp(3.0 * np.linspace(-1, 1, 8))
    means = batches[1, 0].mean((1, 2, 3)).double().numpy()
    assert method.p.grad.item() == pytest.approx((w * means).sum() / w.sum(), abs=1e-5)


# ------------------------------------------------------------------------------ formulas at edges
@pytest.mark.parametrize("contrast, constant", [(1e-3, False), (1e-7, True)])
def test_a_map_of_low_contrast_is_not_constant(contrast, constant):
    features = 1 + contrast * torch.tensor([0.0, 1.0, 3.0, 4.0]).view(1, 4, 1)
    fg, bg = foreground_attention(features, torch.ones(1))
    wanted = [0.25] * 4 if constant else [0, 1 / 8, 3 / 8, 4 / 8]
    assert fg[0].tolist() == pytest.approx(wanted, abs=2e-3)
    assert bg[0].tolist() == pytest.approx([0.25] * 4 if constant else [4 / 8, 3 / 8, 1 / 8, 0],
                                           abs=2e-3)


def test_the_covariance_is_centred_where_the_mean_shifts():
    """After the first 256 images another mean: v1 is NumPy's of the whole set."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(600, 16, 6, generator=generator) * torch.tensor([1, 1, 1, 1, 1, 4.0])
    tokens[256:] += torch.tensor([3.0, 3, 0, 0, 0, 0])
    v1, _ = fit_foreground(tokens, (4, 4))
    covariance = np.cov(tokens.flatten(0, 1).double().numpy().T)
    expected = np.linalg.eigh(covariance)[1][:, -1]
    assert abs(v1.double().numpy() @ expected) == pytest.approx(1, abs=1e-6)


def test_the_border_is_one_token_wide():
    """A figure that fills all but the outermost ring of 6 x 6 tokens is at the centre."""
    a = torch.zeros(6, 6)
    a[1:-1, 1:-1] = 1.0
    a[2:-2, 2:-2] = -0.5                           # a ring: the innermost tokens alone mislead
    noise = 0.01 * torch.randn(50, 36, 3, generator=torch.Generator().manual_seed(0))
    tokens = a.flatten()[None, :, None] * torch.tensor([1.0, 0, 0]) + noise
    v1, _ = fit_foreground(tokens, (6, 6), fraction=0.3)
    assert v1[0] > 0.9


def test_weights_at_their_edges():
    q = torch.tensor([-1.0, 0.5, 2.0])
    for gamma in (-3.0, 0.0, 0.5, 10.0):
        w = np.exp(gamma * q.double().numpy())
        assert quality_weights(q, gamma).tolist() == pytest.approx((3 * w / w.sum()).tolist(),
                                                                   rel=1e-4)
    assert quality_weights(q[:1], 5.0).tolist() == [1.0]


# ------------------------------------------------------------------- probabilities of augmentation
N = 2000


def augmented(pixels, augmentation):
    """One view of each of N pictures (N, 3, 8, 8), in [0, 1]."""
    names = [str(i) for i in range(N)]
    images = Images(names, torch.zeros(N), 1, pixels)
    loader = genview.PairLoader(images, None, [augmentation] * 2, 8, N, 0, CPU, workers=0)
    view, _ = next(iter(loader.epoch(0)))
    zero, one = (normalise(torch.full((3, 1, 1), x)) for x in (0.0, 1.0))
    return (view - zero) / (one - zero)


def share(condition):
    return condition.float().mean().item()


def test_probabilities_and_strengths_of_the_augmentations():
    """Shares of 2,000 views within 4 standard deviations; factors within their bounds."""
    still = Augmentation(scale=(1.0, 1.0), jitter=(0, 0, 0, 0), blur=0.0)
    colour = torch.tensor([100, 60, 30], dtype=torch.uint8).view(1, 3, 1, 1).expand(N, 3, 8, 8)
    found = augmented(colour.contiguous(), still)
    grey = share((found[:, 0] - found[:, 2]).abs().amax((1, 2)) < 1e-3)
    assert abs(grey - 0.2) < 4 * (0.2 * 0.8 / N) ** 0.5
    ramp = (torch.arange(8, dtype=torch.uint8) * 30).expand(N, 3, 8, 8)
    found = augmented(ramp.contiguous(), still)
    flipped = share(found[:, 0, :, 0].mean(1) > found[:, 0, :, -1].mean(1))
    assert abs(flipped - 0.5) < 4 * (0.25 / N) ** 0.5
    level = torch.full((N, 3, 8, 8), 100, dtype=torch.uint8)
    for augmentation, probability, low, high in (
            (still._replace(jitter=(0.4, 0, 0, 0)), 0.8, 0.6, 1.4),
            (still._replace(jitter=(0.4, 0, 0, 0), colour=0.5), 0.4, 0.8, 1.2)):
        factor = augmented(level, augmentation)[:, 0, 0, 0] / (100 / 255)
        changed = share((factor - 1).abs() > 1e-3)
        assert abs(changed - probability * (1 - 1e-3 / 0.4)) < 4 * (0.25 / N) ** 0.5
        assert low - 1e-3 < factor.min() < low + 0.02 and high - 0.02 < factor.max() < high + 1e-3
    for value, turned in ((150, True), (110, False)):        # solarised from the middle on
        level = torch.full((N, 3, 8, 8), value, dtype=torch.uint8)
        found = augmented(level, still._replace(solarise=0.3))[:, 0, 0, 0]
        changed = share((found - value / 255).abs() > 0.05)
        assert abs(changed - 0.3 * turned) < 4 * (0.21 / N) ** 0.5


def test_adaptive_levels_of_shapes_are_spread():
    """Small figures bear no noise, large ones the strongest: four levels or more occur."""
    encoder = shapes.train_encoder(steps=40, batch=64)
    scenes = shapes.sample_scenes(300, torch.Generator().manual_seed(0))
    with torch.no_grad():
        tokens = encoder(normalise(shapes.render(scenes) / 255))
    p = generate_views.foreground_proportion(tokens, *fit_foreground(tokens, (8, 8)))
    levels = generate_views.noise_level(p)
    assert len(levels.unique()) >= 4
    area = shapes.foreground(scenes).mean((1, 2))
    assert levels[area > 0.4].float().mean() > levels[area < 0.1].float().mean() + 150
