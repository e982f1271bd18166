"""quality_loss.py against plain loops in NumPy, written from the paper (sections on quality and on
the base losses)."""
import doctest
import importlib
import inspect
import itertools
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

import quality_loss as ql

ROOT = Path(__file__).resolve().parents[1]


# --------------------------------------------------------------------------- the formulas, as loops
def dot(x, y):
    return sum(float(a) * float(b) for a, b in zip(x, y, strict=True))


def cos(x, y):
    return dot(x, y) / math.sqrt(dot(x, x) * dot(y, y))


def attention_oracle(features, v1):
    fg, bg = [], []
    for view in features:
        a = [dot(position, v1) for position in view]
        low, high = min(a), max(a)
        a = [(x - low) / (high - low) for x in a]
        fg.append([x / sum(a) for x in a])
        bg.append([(1 - x) / sum(1 - y for y in a) for x in a])
    return np.array(fg), np.array(bg)


def pool_oracle(attention, view):
    return [sum(attention[t] * float(view[t][k]) for t in range(len(view)))
            for k in range(len(view[0]))]


def quality_oracle(features1, features2, v1):
    maps1, maps2 = attention_oracle(features1, v1), attention_oracle(features2, v1)
    s_f, s_b = (np.array([cos(pool_oracle(m1[i], features1[i]), pool_oracle(m2[i], features2[i]))
                          for i in range(len(features1))])
                for m1, m2 in zip(maps1, maps2, strict=True))
    return s_f - s_b, s_f, s_b


def weights_oracle(q, gamma):
    total = sum(math.exp(gamma * x) for x in q)
    return np.array([len(q) * math.exp(gamma * x) / total for x in q])


def info_nce_oracle(query, key, negatives, t, w):
    total = 0.0
    for i in range(len(query)):
        positive = math.exp(dot(query[i], key[i]) / t)
        negative = sum(math.exp(dot(query[i], n) / t) for n in negatives)
        total += w[i] * -math.log(positive / (positive + negative))
    return total / len(query)


def in_batch_oracle(query, keys, t, w, offset):
    total = 0.0
    for i in range(len(query)):
        against = sum(math.exp(dot(query[i], k) / t) for k in keys)
        total += w[i] * -math.log(math.exp(dot(query[i], keys[offset + i]) / t) / against)
    return total / len(query)


def cosine_oracle(p, z, w):
    return sum(w[i] * -cos(p[i], z[i]) for i in range(len(p))) / len(p)


def sinkhorn_oracle(scores, epsilon, iterations=3):
    """SwAV, section 3.1 and its pseudocode: columns to 1/P and rows to 1/N, alternately."""
    n, p = len(scores), len(scores[0])
    q = [[math.exp(x / epsilon) for x in row] for row in scores]
    for _ in range(iterations):
        columns = [sum(q[i][j] for i in range(n)) for j in range(p)]
        q = [[q[i][j] / columns[j] / p for j in range(p)] for i in range(n)]
        q = [[x / sum(row) / n for x in row] for row in q]
    return np.array([[x * n for x in row] for row in q])


def swapped_oracle(scores, codes, t, w):
    total, (a_count, n, p) = 0.0, codes.shape
    for i in range(n):
        losses = []
        for a, v in itertools.product(range(a_count), range(len(scores))):
            if v != a:
                against = sum(math.exp(x / t) for x in scores[v][i])
                log_p = [math.log(math.exp(x / t) / against) for x in scores[v][i]]
                losses.append(-sum(codes[a][i][j] * log_p[j] for j in range(p)))
        total += w[i] * sum(losses) / len(losses)
    return total / n


# --------------------------------------------------------------------------------------------- data
def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def maps(n=5, t=9, k=6):
    """Feature maps of two views and a component."""
    return random(n, t, k), random(n, t + 3, k, seed=1), random(k, seed=2)


def unit(n, d=8, seed=0):
    return torch.nn.functional.normalize(random(n, d, seed=seed), dim=1)


def views_of(x):
    """Scores of three views against six prototypes, of which the first depends on x."""
    return torch.stack([x, unit(5, seed=5).to(x), unit(5, seed=6).to(x)]) @ unit(6, seed=7).to(x).T


KEY, NEGATIVES, KEYS, TARGET = unit(5, seed=1), unit(7, seed=2), unit(11, seed=3), unit(5, seed=4)
CODES = torch.stack([unit(5, d=6, seed=s).softmax(1) for s in (8, 9)])    # of the first two views
W = torch.tensor([0.2, 1.8, 1.0, 0.5, 1.5])
# Every loss as a function of (its 5 query rows, weights).
LOSSES = {
    "info_nce": lambda x, w=None: ql.info_nce(x, KEY, NEGATIVES, temperature=0.2, weights=w),
    "info_nce_in_batch": lambda x, w=None: ql.info_nce_in_batch(
        x, KEYS, temperature=0.5, weights=w, offset=4),
    "negative_cosine": lambda x, w=None: ql.negative_cosine(x, TARGET, weights=w),
    "swapped_prediction": lambda x, w=None: ql.swapped_prediction(
        views_of(x), CODES, temperature=0.3, weights=w)}
ORACLES = {
    "info_nce": lambda x, w: info_nce_oracle(x, KEY, NEGATIVES, 0.2, w),
    "info_nce_in_batch": lambda x, w: in_batch_oracle(x, KEYS, 0.5, w, 4),
    "negative_cosine": lambda x, w: cosine_oracle(x, TARGET, w),
    "swapped_prediction": lambda x, w: swapped_oracle(
        views_of(x).tolist(), CODES.double().numpy(), 0.3, w)}
each_loss = pytest.mark.parametrize("name", LOSSES)


# -------------------------------------------------------------------------------- against the loops
def test_attention_and_quality_match_the_loops():
    features, _, v1 = maps()
    oracle = attention_oracle(features.numpy(), v1.numpy())
    for ours, theirs in zip(ql.foreground_attention(features, v1), oracle, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)
    oracle = quality_oracle(*(x.numpy() for x in maps()))
    for ours, theirs in zip(ql.pair_quality(*maps()), oracle, strict=True):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_weights_match_the_loop(gamma):
    q = torch.linspace(-1, 1.5, 7)
    oracle = weights_oracle(q.tolist(), gamma)
    np.testing.assert_allclose(ql.quality_weights(q, gamma), oracle, rtol=1e-5)


@each_loss
def test_loss_matches_the_loop(name):
    x = unit(5, seed=9)
    for w in (W, torch.tensor([0.0, 0, 5, 0, 0])):           # the latter: the third pair alone
        assert LOSSES[name](x, w).item() == pytest.approx(ORACLES[name](x, w.tolist()), abs=1e-5)
    assert LOSSES[name](x).item() == pytest.approx(ORACLES[name](x, [1.0] * 5), abs=1e-5)


@each_loss
def test_gradient_matches_differences_of_the_loop(name):
    x, step = unit(5, seed=9).requires_grad_(), 1e-4
    LOSSES[name](x, W).backward()
    expected = torch.zeros_like(x)
    for place in itertools.product(range(5), range(8)):
        change = torch.zeros(5, 8, dtype=torch.double)
        change[place] = step
        above, below = (ORACLES[name](x.detach().double() + c, W.tolist())
                        for c in (change, -change))
        expected[place] = (above - below) / (2 * step)
    torch.testing.assert_close(x.grad, expected.detach(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_matches_the_loop(iterations):
    scores = unit(7) @ unit(4, seed=1).T
    ours = ql.sinkhorn(scores, epsilon=0.3, iterations=iterations)
    np.testing.assert_allclose(ours, sinkhorn_oracle(scores.tolist(), 0.3, iterations), atol=1e-5)
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)
    if iterations == 10:                           # the prototypes are shared out equally
        np.testing.assert_allclose(ours.sum(0), 7 / 4, atol=1e-2)


# ---------------------------------------------------------------------------- properties of weights
@each_loss
def test_weights_of_one_and_gamma_zero_are_the_base_loss_exactly(name):
    ones = ql.quality_weights(torch.randn(5), gamma=0.0)
    assert (ones == 1).all()
    x = unit(5, seed=9)
    assert LOSSES[name](x, ones) == LOSSES[name](x) == LOSSES[name](x, torch.ones(5))


def test_no_gradient_through_weights_or_into_the_target_of_the_cosine():
    w = ql.quality_weights(torch.randn(5, requires_grad=True))
    assert not w.requires_grad and w.mean().item() == pytest.approx(1, abs=1e-6)
    p, z = unit(5, seed=1).requires_grad_(), unit(5, seed=2).requires_grad_()
    ql.negative_cosine(p, z).backward()
    assert p.grad is not None and z.grad is None


def test_constant_maps_are_uniform():
    constant = torch.ones(3, 4, 6)
    for features in (constant * torch.randn(1, 1, 6), constant * 0, constant * 1e4):
        for attention in ql.foreground_attention(features, torch.randn(6)):
            torch.testing.assert_close(attention, torch.full((3, 4), 0.25))
        quality = ql.pair_quality(features, features, torch.randn(6))
        assert all(x.isfinite().all() for x in quality)


# ---------------------------------------------------------------------- precision, extremes, errors
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32_whatever_the_input(dtype, autocast):
    f1, f2, v1 = (x.to(dtype) for x in maps())
    x, key, negatives, keys = (y.to(dtype) for y in (unit(5), KEY, NEGATIVES, KEYS))
    calls = [
        (ql.foreground_attention, (f1, v1), {}), (ql.pair_quality, (f1, f2, v1), {}),
        (ql.quality_weights, (x[:, 0],), {}), (ql.negative_cosine, (x, key), {}),
        (ql.info_nce, (x, key, negatives), dict(temperature=0.1, weights=W)),
        (ql.info_nce_in_batch, (x, keys), dict(temperature=0.1, offset=2)), (ql.sinkhorn, (x,), {}),
        (ql.swapped_prediction, (torch.stack([x, key]), x[None].abs()), dict(temperature=0.1))]
    for function, tensors, options in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = function(*tensors, **options)
        exact = function(*(t.float() for t in tensors), **options)
        pairs = [(ours, exact)] if torch.is_tensor(ours) else zip(ours, exact, strict=True)
        for a, b in pairs:
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, atol=0, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_component_is_fitted_without_autocast(dtype):
    tokens = random(300, 16, 8) * torch.linspace(200, 1, 8)
    expected, alpha = ql.fit_foreground(tokens, (4, 4))
    with torch.autocast("cpu", dtype=dtype):
        for v1, threshold in (ql.fit_foreground(tokens, (4, 4)),
                              ql.orient_foreground(-expected, tokens, (4, 4))):
            torch.testing.assert_close(v1, expected, atol=1e-6, rtol=0)
            assert threshold == pytest.approx(alpha, abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.int32])
def test_the_threshold_of_any_dtype(dtype):
    a = (10 * random(30, 16)).to(dtype)
    assert ql.foreground_threshold(a) == ql.foreground_threshold(a.float())


@pytest.mark.parametrize("factor", [1e300, 1e-300])
def test_a_component_beyond_float32(factor):
    tokens, v1 = random(30, 16, 8), random(8, seed=1).double()
    expected, alpha = ql.orient_foreground(v1, tokens, (4, 4))
    ours, threshold = ql.orient_foreground(factor * v1, tokens, (4, 4))
    torch.testing.assert_close(ours, expected)
    assert threshold == pytest.approx(alpha, abs=1e-5)


def test_shapes_on_the_meta_device():
    x, keys = torch.empty(5, 8, device="meta"), torch.empty(11, 8, device="meta")
    t = torch.tensor(0.2, device="meta")
    assert ql.info_nce_in_batch(x, keys, temperature=t).shape == ()
    with pytest.raises(RuntimeError, match="device"):          # PyTorch's own
        ql.negative_cosine(unit(5), x)


EXTREMES = [0.0, 1e30, -1e30, 1e-30, 65504.0, 3e38]


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("other", EXTREMES)
def test_no_nan_for_extreme_input(value, other):
    def check(*results):
        assert all(x.isfinite().all() for x in results), results
    for t in (1, 4):
        features = torch.full((2, t, 3), value)
        features[:, -1, 0] = other
        for v1 in (torch.ones(3), torch.full((3,), other), torch.tensor([1.0, -1, 0])):
            check(*ql.foreground_attention(features, v1))
            check(*ql.pair_quality(features, features.flip(1), v1))
    for n in (1, 3):
        x, y = torch.full((n, 4), value, requires_grad=True), torch.full((n, 4), other)
        codes = ql.sinkhorn(y)[None]
        losses = [ql.info_nce(x, y, y, temperature=0.2), ql.negative_cosine(x, y),
                  ql.info_nce_in_batch(x, y, temperature=0.2),
                  ql.swapped_prediction(torch.stack([x, y]), codes, temperature=0.2)]
        check(*losses, ql.sinkhorn(torch.cat([x, y]).detach()))
        sum(losses).backward()
        assert not x.grad.isnan().any()
    check(ql.quality_weights(torch.tensor([value, other])))
    half = torch.full((2, 4, 3), 65504.0, dtype=torch.float16)
    check(*ql.pair_quality(half, -half, half[0, 0]))
    tokens = torch.full((3, 4, 5), value)
    tokens[:, 1, 2:] = other
    component = torch.ones(5)
    component[2:] = other
    for v1, alpha in (ql.fit_foreground(tokens, (2, 2)),
                      ql.orient_foreground(component, tokens, (2, 2))):
        check(v1, torch.tensor(alpha))
        assert v1.norm().item() == pytest.approx(1, abs=1e-5)


# Short names: a case of the table fits on a line.
A, N, B, S = ql.foreground_attention, ql.info_nce, ql.info_nce_in_batch, ql.swapped_prediction


@pytest.mark.parametrize("function, shapes, options, named", [
    (A, [(2, 3), (3,)], {}, "(2, 3)"), (A, [(2, 0, 3), (3,)], {}, "(2, 0, 3)"),
    (A, [(2, 4, 3), (5,)], {}, "(5,)"), (A, [(2, 4, 3), (3, 1)], {}, "(3, 1)"),
    (ql.pair_quality, [(2, 4, 3), (1, 4, 3), (3,)], {}, "(1, 4, 3)"),
    (ql.pair_quality, [(2, 4, 3), (2, 3), (3,)], {}, "(2, 3)"),
    (ql.quality_weights, [(2, 1)], {}, "(2, 1)"), (ql.quality_weights, [(0,)], {}, "(0,)"),
    (N, [(2, 4), (3, 4), (5, 4)], {}, "(3, 4)"), (N, [(2, 4), (2, 4), (5, 3)], {}, "(5, 3)"),
    (N, [(2, 4), (2, 4), (4,)], {}, "(4,)"),
    (N, [(2, 4), (2, 4), (5, 4)], {"temperature": 0.0}, "0.0"),
    (N, [(2, 4), (2, 4), (5, 4)], {"weights": W[:3]}, "(3,)"),
    (B, [(2, 4), (5, 3)], {}, "(5, 3)"), (B, [(2, 4), (5, 4)], {"offset": 4}, "(5, 4)"),
    (B, [(2, 4), (5, 4)], {"offset": -1}, "(5, 4)"), (B, [(0, 4), (5, 4)], {}, "(0, 4)"),
    (B, [(2, 4), (5, 4)], {"offset": None}, "NoneType"),
    (B, [(2, 4), (5, 4)], {"temperature": -1.0}, "-1.0"),
    (B, [(2, 4), (5, 4)], {"weights": W[:2, None]}, "(2, 1)"),
    (ql.negative_cosine, [(2, 4), (2, 5)], {}, "(2, 5)"),
    (ql.negative_cosine, [(0, 4), (0, 4)], {}, "(0, 4)"),
    (ql.negative_cosine, [(2, 4), (2, 4)], {"weights": W[:1]}, "(1,)"),
    (ql.sinkhorn, [(4,)], {}, "(4,)"), (ql.sinkhorn, [(4, 2)], {"epsilon": 0.0}, "0.0"),
    (S, [(2, 4), (2, 4)], {}, "(2, 4)"), (S, [(2, 4, 3), (3, 4, 3)], {}, "(3, 4, 3)"),
    (S, [(2, 4, 3), (2, 4, 5)], {}, "(2, 4, 5)"), (S, [(1, 4, 3), (1, 4, 3)], {}, "(1, 4, 3)"),
    (S, [(2, 4, 3), (2, 4, 3)], {"temperature": 0.0}, "0.0"),
    (S, [(2, 4, 3), (2, 4, 3)], {"weights": W[:3]}, "(3,)"),
    (N, [(2, 4), (2, 4), (5, 4)], {"temperature": torch.tensor(0.0)}, "0.0"),
    (N, [(2, 4), (2, 4), (5, 4)], {"temperature": torch.ones(2)}, "(2,)"),
    (ql.orient_foreground, [(3,), (2, 4, 3)], {"grid": (2, 2)}, "not zero"),
    (ql.orient_foreground, [(5,), (2, 4, 3)], {"grid": (2, 2)}, "(5,)"),
    (ql.orient_foreground, [(3,), (0, 4, 3)], {"grid": (2, 2)}, "(0, 4, 3)"),
    (ql.orient_foreground, [(3,), (2, 4, 3)], {"grid": (3, 2)}, "(2, 4, 3), (3, 2)"),
    (ql.fit_foreground, [(0, 4, 3)], {"grid": (2, 2)}, "(0, 4, 3)"),
    (ql.fit_foreground, [(2, 4, 3)], {"grid": (-2, -2)}, "(-2, -2)"),
    (ql.fit_foreground, [(2, 4, 3)], {"grid": 4}, "(2, 4, 3), 4"),
    (ql.fit_foreground, [(2, 4, 3)], {"grid": (2, 2), "fraction": 1.5}, "[0, 1], got (2, 4), 1.5"),
    (ql.foreground_threshold, [(0, 4)], {}, "(0, 4)")])
def test_wrong_shapes_are_named(function, shapes, options, named):
    if function in (N, B, S):
        options = {"temperature": 1.0} | options
    with pytest.raises(ValueError) as error:
        function(*(torch.zeros(shape) for shape in shapes), **options)
    assert named in str(error.value)


@pytest.mark.parametrize("function, count, options", [
    (A, 2, {}), (ql.pair_quality, 3, {}), (ql.quality_weights, 1, {}),
    (N, 3, {"temperature": 1.0}), (B, 2, {"temperature": 1.0}), (S, 2, {"temperature": 1.0}),
    (ql.negative_cosine, 2, {}), (ql.sinkhorn, 1, {}), (ql.foreground_threshold, 1, {}),
    (ql.fit_foreground, 1, {"grid": (2, 2)}), (ql.orient_foreground, 2, {"grid": (2, 2)})])
def test_what_is_no_tensor_is_named(function, count, options):
    """By its argument, whether that is given by place or by name."""
    names = list(inspect.signature(function).parameters)[:count]
    for wrong in names:
        for x in (np.zeros((2, 4)), [0.1, 0.4], None):
            given = {name: torch.zeros(2, 4) for name in names} | {wrong: x}
            for places, by_name in ((given.values(), {}), ((), given)):
                with pytest.raises(ValueError, match=f"^{wrong} must be a tensor, got"):
                    function(*places, **by_name, **options)


@pytest.mark.parametrize("function, count, name", [
    (ql.quality_weights, 1, "gamma"), (ql.sinkhorn, 1, "epsilon"), (N, 3, "temperature"),
    (B, 2, "temperature"), (S, 2, "temperature")])
def test_what_is_no_number_is_named(function, count, name):
    shape = (4,) if count == 1 else (4, 2)
    shape = {S: (2, 4, 3), ql.sinkhorn: (4, 2)}.get(function, shape)
    for wrong in (None, "0.1"):
        with pytest.raises(ValueError, match=f"{name}.*, got .*{type(wrong).__name__}$"):
            function(*[torch.zeros(shape)] * count, **{name: wrong})


def test_a_map_over_arrays_does_not_end_in_silence():
    with pytest.raises(ValueError, match="quality must be a tensor, got ndarray"):
        list(map(ql.quality_weights, [np.zeros(2)]))
    with pytest.raises(ValueError, match=r"weights must be a tensor \(2,\), got list"):
        ql.negative_cosine(unit(2), unit(2), weights=[1.0, 1.0])


X = unit(5, seed=9)
SCORES_OF_X = views_of(X)


def all_losses(t):
    """The sum of all losses that have a temperature."""
    return (ql.info_nce(X, KEY, NEGATIVES, temperature=t, weights=W)
            + ql.info_nce_in_batch(X, KEYS, temperature=t)
            + ql.swapped_prediction(SCORES_OF_X, CODES, temperature=t))


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("shape", [(), (1,)])
def test_a_learnable_temperature(compiled, shape):
    """Its gradient is that of differences; compiled, in one graph without a break."""
    t = torch.nn.Parameter(torch.full(shape, 0.4))
    loss_of = all_losses
    if compiled:
        loss_of = torch.compile(all_losses, fullgraph=True, backend="eager")
    loss = loss_of(t)
    loss.backward()
    assert loss.shape == () and loss.item() == pytest.approx(all_losses(0.4).item(), abs=1e-5)
    slope = (all_losses(0.41) - all_losses(0.39)).item() / 0.02
    assert t.grad.item() == pytest.approx(slope, rel=1e-2)


def test_many_temperatures_at_once():
    temperatures = torch.tensor([0.2, 0.4])
    expected = torch.stack([all_losses(t) for t in temperatures])
    torch.testing.assert_close(torch.func.vmap(all_losses)(temperatures), expected)


@pytest.mark.parametrize("function, count", [(N, 3), (B, 2), (S, 2)])
def test_temperature_must_be_given_by_name(function, count):
    for more in ((), (0.2,)):
        with pytest.raises(TypeError):
            function(*[unit(2)] * count, *more)


# ---------------------------------------------------------------------- the foreground component v1
def planted(n=40, side=7, k=12, sign=1):
    """Tokens with one strong direction, stronger at the centre of the images. Returns tokens and
    the direction."""
    rng = np.random.default_rng(0)
    direction = rng.normal(size=k)
    direction /= np.linalg.norm(direction)
    y, x = np.mgrid[-1:1:side * 1j, -1:1:side * 1j]
    strength = sign * 5 * np.exp(-3 * (x ** 2 + y ** 2)).ravel() * rng.uniform(0.5, 1.5, (n, 1))
    tokens = strength[..., None] * direction + rng.normal(size=(n, side * side, k)) * 0.3
    return torch.tensor(tokens + rng.normal(size=k)).float(), torch.tensor(sign * direction).float()


def component_oracle(tokens, rows, columns, fraction):
    """Centre, SVD, threshold and sign, by loops in float64."""
    tokens = np.asarray(tokens, dtype=np.float64)
    flat = tokens.reshape(-1, tokens.shape[2])
    v1 = np.linalg.svd(flat - sum(flat) / len(flat), full_matrices=False)[2][0]
    found = []
    for v in (v1, -v1):
        a = [[np.dot(token, v) for token in image] for image in tokens]
        alpha = np.quantile(a, 1 - fraction)
        centre, border = [], []
        for image in a:
            for place, value in enumerate(image):
                r, c = divmod(place, columns)
                outside = r in (0, rows - 1) or c in (0, columns - 1)
                (border if outside else centre).append(value > alpha)
        found.append((np.mean(centre) - np.mean(border), v, alpha))
    return max(found, key=lambda score_v_alpha: score_v_alpha[0])[1:]


@pytest.mark.parametrize("sign", [1, -1])
def test_fit_foreground_finds_what_was_planted(sign):
    tokens, direction = planted(sign=sign)
    v1, alpha = ql.fit_foreground(tokens, (7, 7))
    assert v1.shape == (12,) and v1.dtype == torch.float32 and isinstance(alpha, float)
    assert v1.norm().item() == pytest.approx(1, abs=1e-5) and (v1 @ direction).item() > 0.99
    frequency = (tokens @ v1 > alpha).float().mean(0)                    # at each position
    assert frequency.mean().item() == pytest.approx(0.4, abs=2e-3)
    assert frequency[24] > 0.9 and frequency[0] < 0.2                    # centre, corner
    oracle, threshold = component_oracle(tokens.numpy(), 7, 7, 0.4)
    np.testing.assert_allclose(v1, oracle, atol=1e-4)
    assert alpha == pytest.approx(threshold, abs=1e-3)
    minus, same_alpha = ql.fit_foreground(-tokens, (7, 7))               # the same maps
    torch.testing.assert_close(v1, -minus, atol=1e-5, rtol=0)
    assert alpha == pytest.approx(same_alpha, abs=1e-4)


def test_fit_foreground_on_an_oblong_grid_half_precision_and_fraction():
    tokens = planted(n=300, side=6)[0][:, :24].half()       # four rows of six; two parts of 256
    v1, alpha = ql.fit_foreground(tokens, (4, 6), fraction=0.25)
    oracle, threshold = component_oracle(tokens.numpy(), 4, 6, 0.25)
    np.testing.assert_allclose(v1, oracle, atol=1e-3)
    assert alpha == pytest.approx(threshold, abs=1e-2)
    with pytest.raises(ValueError, match=r"\(300, 24, 12\)"):
        ql.fit_foreground(tokens, (5, 5))


class WithoutFloat64(torch.Tensor):
    """Tensors of a device that has no float64, such as MPS."""
    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        result = super().__torch_function__(function, types, args, kwargs or {})
        if torch.is_tensor(result) and result.dtype == torch.float64:
            raise TypeError("this device has no float64")
        return result.as_subclass(torch.Tensor) if function is torch.Tensor.cpu else result


def test_the_component_is_fitted_where_the_device_has_no_float64():
    tokens, _ = planted()
    there = tokens.as_subclass(WithoutFloat64)
    with pytest.raises(TypeError, match="no float64"):
        there.double()
    v1, alpha = ql.fit_foreground(there, (7, 7))
    expected, threshold = ql.fit_foreground(tokens, (7, 7))
    assert torch.equal(v1.cpu(), expected) and alpha == threshold


def test_orientation_of_a_given_component():
    tokens, direction = planted()
    v1, alpha = ql.orient_foreground(-3 * direction, tokens, (7, 7))
    torch.testing.assert_close(v1, direction, atol=1e-5, rtol=0)
    assert (tokens @ v1 > alpha).float().mean().item() == pytest.approx(0.4, abs=2e-3)


def test_the_threshold_looks_at_all_columns_of_many_tokens():
    """17 million values, every second one larger: a stride of 2 over all would see one half."""
    a = random(256).mul(0.01).repeat(66_500, 1)
    a[:, 1::2] += 1.0
    assert a.numel() > 16_000_000
    alpha = ql.foreground_threshold(a, 0.4)
    assert (a > alpha).float().mean().item() == pytest.approx(0.4, abs=0.01)


# ------------------------------------------------------------------------------------ two processes
Q, SCORES = torch.linspace(-2, 2, 8), torch.linspace(-2, 2, 24).view(8, 3).sin()
CUTS = {"even": 4, "uneven": 3}


def weights_of_a_part(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    for name, cut in CUTS.items():
        part, group = slice(cut) if rank == 0 else slice(cut, None), dist.group.WORLD
        results = ql.quality_weights(Q[part], 2.0, group), ql.sinkhorn(SCORES[part], group=group)
        torch.save(results, folder / f"{name}-{rank}.pt")


def test_two_processes_weight_like_one(tmp_path):
    mp.start_processes(weights_of_a_part, (tmp_path,), nprocs=2, start_method="fork")
    for name in CUTS:
        parts = [torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)]
        weights, codes = (torch.cat(both) for both in zip(*parts, strict=True))
        torch.testing.assert_close(weights, ql.quality_weights(Q, gamma=2.0))
        torch.testing.assert_close(codes, ql.sinkhorn(SCORES))


# ------------------------------------------------------------------------------- the file by itself
ALONE = """
import runpy, sys
import torch, torch.distributed
known = set(sys.modules)
copied = runpy.run_path("quality_loss.py", run_name="__main__")
new = {name.split(".")[0] for name in set(sys.modules) - known} - {"torch"}
assert new <= set(sys.stdlib_module_names), new
torch.save(copied["fit_foreground"](torch.load("tokens.pt"), (7, 7)), "fitted.pt")
"""


def test_the_file_copied_alone_works(tmp_path):
    """It runs, imports nothing but PyTorch, and fits a component."""
    shutil.copy(ROOT / "quality_loss.py", tmp_path)
    torch.save(planted()[0], tmp_path / "tokens.pt")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run([sys.executable, "-I", "-c", ALONE], cwd=tmp_path, env=environment,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "subject lost" in done.stdout and "nan" not in done.stdout
    component, alpha = torch.load(tmp_path / "fitted.pt")
    ours, threshold = ql.fit_foreground(planted()[0], (7, 7))
    torch.testing.assert_close(component, ours)
    assert alpha == pytest.approx(threshold)


def test_a_copy_below_annotations_as_text_and_without_distributed(monkeypatch):
    """`from __future__ import annotations` keeps annotations as text; some builds of PyTorch have
    no ReduceOp."""
    monkeypatch.delattr(torch.distributed, "ReduceOp")
    copied = {"__name__": "copy_of_the_loss"}
    source = "from __future__ import annotations\n" + (ROOT / "quality_loss.py").read_text()
    exec(compile(source, "copy_of_the_loss.py", "exec"), copied)
    quality = torch.tensor([0.0, 0.6931472])
    torch.testing.assert_close(copied["quality_weights"](quality), ql.quality_weights(quality))
    with pytest.raises(ValueError, match="quality must be a tensor, got ndarray"):
        copied["quality_weights"](quality.numpy())


DOCUMENTED = sorted(path.stem for path in ROOT.glob("*.py") if ">>> " in path.read_text())


@pytest.mark.parametrize("name", DOCUMENTED)
def test_doctests(name):
    assert {"eval_linear", "generate_views", "quality_loss"} <= set(DOCUMENTED)
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert failed == 0 and attempted > 0


def test_keys_and_negatives_may_learn():
    key, negatives, keys = (unit(n, seed=n).requires_grad_() for n in (5, 7, 11))
    ql.info_nce(unit(5), key, negatives, temperature=0.2).backward()
    ql.info_nce_in_batch(unit(5), keys, temperature=0.2).backward()
    assert all(x.grad.abs().sum() > 0.01 for x in (key, negatives, keys))


def test_no_gradient_into_codes():
    codes = torch.full((1, 3, 4), 0.25, requires_grad=True)
    ql.swapped_prediction(unit(6, 4).view(2, 3, 4).requires_grad_(), codes,
                          temperature=0.1).backward()
    assert codes.grad is None


def sharp_weights(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    part = slice(4) if rank == 0 else slice(4, None)
    torch.save((ql.quality_weights(Q[part], 1e3, dist.group.WORLD),
                ql.sinkhorn(20 * SCORES[part], group=dist.group.WORLD)), folder / f"{rank}.pt")


def test_two_processes_do_not_overflow(tmp_path):
    mp.start_processes(sharp_weights, (tmp_path,), nprocs=2, start_method="fork")
    parts = [torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1)]
    weights, codes = (torch.cat(both) for both in zip(*parts, strict=True))
    torch.testing.assert_close(weights, ql.quality_weights(Q, 1e3))
    torch.testing.assert_close(codes, ql.sinkhorn(20 * SCORES), atol=1e-3, rtol=0)


def test_a_constant_map_is_one_whatever_the_components_length():
    features = torch.tensor([[[1 + 1e-7 * s, 0.5] for s in (0, 1, 2, 4)]], dtype=torch.float64)
    for attention in ql.foreground_attention(features, torch.tensor([1e3, 0.0])):
        assert attention.tolist() == [[0.25] * 4]
