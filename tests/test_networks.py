"""Layers of every projector and predictor, the read-outs by hand, what a step passes on."""
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from running import CPU
from torch import nn

import train_byol
import train_moco
import train_swav
from support.networks import LARS

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


def test_lars_where_weights_or_gradients_are_zero():
    w, v = nn.Parameter(torch.zeros(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = LARS([w, v], lr=1.0, weight_decay=0.0)
    w.grad, v.grad = torch.ones(2, 2), torch.zeros(2, 2)
    optimizer.step()
    assert (w == -1).all() and (v == 1).all()
