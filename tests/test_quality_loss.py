"""quality_loss.py against plain loops in NumPy, written from the paper (sections on quality and on
the base losses)."""

import doctest
import importlib
import math
import os
import shutil
import socket
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
    return [
        sum(attention[t] * float(view[t][k]) for t in range(len(view))) for k in range(len(view[0]))
    ]


def quality_oracle(features1, features2, v1):
    (fg1, bg1), (fg2, bg2) = attention_oracle(features1, v1), attention_oracle(features2, v1)
    s_f = [
        cos(pool_oracle(fg1[i], features1[i]), pool_oracle(fg2[i], features2[i]))
        for i in range(len(features1))
    ]
    s_b = [
        cos(pool_oracle(bg1[i], features1[i]), pool_oracle(bg2[i], features2[i]))
        for i in range(len(features1))
    ]
    return np.array([f - b for f, b in zip(s_f, s_b, strict=True)]), np.array(s_f), np.array(s_b)


def weights_oracle(q, gamma):
    total = sum(math.exp(gamma * x) for x in q)
    return np.array([len(q) * math.exp(gamma * x) / total for x in q])


def info_nce_oracle(query, key, negatives, t, w):
    total = 0.0
    for i in range(len(query)):
        positive = math.exp(dot(query[i], key[i]) / t)
        total += w[i] * -math.log(
            positive / (positive + sum(math.exp(dot(query[i], n) / t) for n in negatives))
        )
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
    """SwAV, section 3.1 and its pseudocode: columns to 1/P, rows to 1/N, by turns."""
    n, p = len(scores), len(scores[0])
    q = [[math.exp(x / epsilon) for x in row] for row in scores]
    for _ in range(iterations):
        columns = [sum(q[i][j] for i in range(n)) for j in range(p)]
        q = [[q[i][j] / columns[j] / p for j in range(p)] for i in range(n)]
        q = [[x / sum(row) / n for x in row] for row in q]
    return np.array([[x * n for x in row] for row in q])


def swapped_oracle(scores, codes, t, w):
    total, views, (a_count, n, p) = 0.0, len(scores), codes.shape
    for i in range(n):
        losses = []
        for a in range(a_count):
            for v in range(views):
                if v != a:
                    against = sum(math.exp(x / t) for x in scores[v][i])
                    losses.append(
                        -sum(
                            codes[a][i][j] * math.log(math.exp(scores[v][i][j] / t) / against)
                            for j in range(p)
                        )
                    )
        total += w[i] * sum(losses) / len(losses)
    return total / n


# --------------------------------------------------------------------------------------------- data


def maps(n=5, t=9, k=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (
        torch.randn(n, t, k, generator=generator),
        torch.randn(n, t + 3, k, generator=generator),
        torch.randn(k, generator=generator),
    )


def unit(n, d=8, seed=0):
    return torch.nn.functional.normalize(
        torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1
    )


def views_of(x):
    """Scores of three views against six prototypes, of which the first depends on x."""
    return torch.stack([x, unit(5, seed=5).to(x), unit(5, seed=6).to(x)]) @ unit(6, seed=7).to(x).T


CODES = torch.stack([unit(5, d=6, seed=s).softmax(1) for s in (8, 9)])  # of the first two views
W = torch.tensor([0.2, 1.8, 1.0, 0.5, 1.5])
# Every loss as a function of (its 5 query rows, weights).
LOSSES = {
    "info_nce": lambda x, w=None: ql.info_nce(
        x, unit(5, seed=1), unit(7, seed=2), temperature=0.2, weights=w
    ),
    "info_nce_in_batch": lambda x, w=None: ql.info_nce_in_batch(
        x, unit(11, seed=3), temperature=0.5, weights=w, offset=4
    ),
    "negative_cosine": lambda x, w=None: ql.negative_cosine(x, unit(5, seed=4), weights=w),
    "swapped_prediction": lambda x, w=None: ql.swapped_prediction(
        views_of(x), CODES, temperature=0.3, weights=w
    ),
}
ORACLES = {
    "info_nce": lambda x, w: info_nce_oracle(x, unit(5, seed=1), unit(7, seed=2), 0.2, w),
    "info_nce_in_batch": lambda x, w: in_batch_oracle(x, unit(11, seed=3), 0.5, w, 4),
    "negative_cosine": lambda x, w: cosine_oracle(x, unit(5, seed=4), w),
    "swapped_prediction": lambda x, w: swapped_oracle(views_of(x).tolist(), CODES.numpy(), 0.3, w),
}
each_loss = pytest.mark.parametrize("name", LOSSES)


# -------------------------------------------------------------------------------- against the loops


def test_attention_matches_the_loop():
    features, _, v1 = maps()
    for ours, theirs in zip(
        ql.foreground_attention(features, v1),
        attention_oracle(features.numpy(), v1.numpy()),
        strict=True,
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-5)
        np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)


def test_quality_matches_the_loop():
    ours, theirs = ql.pair_quality(*maps()), quality_oracle(*(x.numpy() for x in maps()))
    for a, b in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("gamma", [0.5, 1.0, 3.0])
def test_weights_match_the_loop(gamma):
    q = torch.linspace(-1, 1.5, 7)
    np.testing.assert_allclose(
        ql.quality_weights(q, gamma), weights_oracle(q.tolist(), gamma), rtol=1e-5
    )


@each_loss
def test_loss_matches_the_loop(name):
    x = unit(5, seed=9)
    assert LOSSES[name](x, W).item() == pytest.approx(ORACLES[name](x, W.tolist()), abs=1e-5)
    assert LOSSES[name](x).item() == pytest.approx(ORACLES[name](x, [1.0] * 5), abs=1e-5)


def reference(name, x, w):
    """The same losses written otherwise, in float64, for autograd."""
    key, negatives, keys, target = (
        unit(n, seed=i + 1).double() for i, n in enumerate((5, 7, 11, 5))
    )
    if name == "info_nce":
        positive, negative = (x * key).sum(1) / 0.2, x @ negatives.T / 0.2
        losses = -(positive.exp() / (positive.exp() + negative.exp().sum(1))).log()
    elif name == "info_nce_in_batch":
        p = (x @ keys.T / 0.5).exp()
        losses = torch.stack([-(p[i, 4 + i] / p[i].sum()).log() for i in range(5)])
    elif name == "swapped_prediction":
        log_p = (views_of(x) / 0.3).log_softmax(2)
        pairs = [
            -(CODES[a].double() * log_p[v]).sum(1) for a in (0, 1) for v in (0, 1, 2) if v != a
        ]
        losses = torch.stack(pairs).mean(0)
    else:
        losses = -(x * target).sum(1) / (x.norm(dim=1) * target.norm(dim=1))
    return (w.double() * losses).sum() / 5


@each_loss
def test_gradient_matches_autograd_of_the_formula(name):
    x, y = unit(5, seed=9).requires_grad_(), unit(5, seed=9).double().requires_grad_()
    LOSSES[name](x, W).backward()
    reference(name, y, W).backward()
    torch.testing.assert_close(x.grad, y.grad.float(), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("iterations", [1, 3, 10])
def test_sinkhorn_matches_the_loop(iterations):
    scores = unit(7) @ unit(4, seed=1).T
    ours = ql.sinkhorn(scores, epsilon=0.3, iterations=iterations)
    np.testing.assert_allclose(ours, sinkhorn_oracle(scores.tolist(), 0.3, iterations), atol=1e-5)
    np.testing.assert_allclose(ours.sum(1), 1, atol=1e-6)
    if iterations == 10:
        np.testing.assert_allclose(
            ours.sum(0), 7 / 4, atol=1e-2
        )  # the prototypes are shared out equally


# ---------------------------------------------------------------------------- properties of weights


@each_loss
def test_weights_of_one_and_gamma_zero_are_the_base_loss_exactly(name):
    ones = ql.quality_weights(torch.randn(5), gamma=0.0)
    assert (ones == 1).all()
    x = unit(5, seed=9)
    assert LOSSES[name](x, ones) == LOSSES[name](x) == LOSSES[name](x, torch.ones(5))


def test_one_pair_with_all_the_weight():
    w = torch.tensor([0.0, 0, 5, 0, 0])
    x, key, negatives = unit(5, seed=9), unit(5, seed=1), unit(7, seed=2)
    alone = ql.info_nce(x[2:3], key[2:3], negatives, temperature=0.2)
    assert ql.info_nce(x, key, negatives, temperature=0.2, weights=w).item() == pytest.approx(
        alone.item(), abs=1e-6
    )
    alone = ql.negative_cosine(x[2:3], unit(5, seed=4)[2:3])
    assert LOSSES["negative_cosine"](x, w).item() == pytest.approx(alone.item(), abs=1e-6)
    alone = ql.info_nce_in_batch(x[2:3], unit(11, seed=3), temperature=0.5, offset=6)
    assert LOSSES["info_nce_in_batch"](x, w).item() == pytest.approx(alone.item(), abs=1e-6)
    alone = ql.swapped_prediction(views_of(x)[:, 2:3], CODES[:, 2:3], temperature=0.3)
    assert LOSSES["swapped_prediction"](x, w).item() == pytest.approx(alone.item(), abs=1e-6)


def test_no_gradient_through_weights():
    q = torch.randn(5, requires_grad=True)
    w = ql.quality_weights(q)
    assert not w.requires_grad and w.mean().item() == pytest.approx(1, abs=1e-6)


def test_no_gradient_into_the_target_of_the_cosine():
    p, z = unit(5, seed=1).requires_grad_(), unit(5, seed=2).requires_grad_()
    ql.negative_cosine(p, z).backward()
    assert p.grad is not None and z.grad is None


def test_constant_maps_are_uniform():
    for features in (
        torch.ones(3, 4, 6) * torch.randn(1, 1, 6),
        torch.zeros(3, 4, 6),
        torch.full((3, 4, 6), 1e4),
    ):
        for attention in ql.foreground_attention(features, torch.randn(6)):
            torch.testing.assert_close(attention, torch.full((3, 4), 0.25))
        assert all(x.isfinite().all() for x in ql.pair_quality(features, features, torch.randn(6)))


# ---------------------------------------------------------------------- precision, extremes, errors


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("autocast", [False, True])
def test_computes_in_float32_whatever_the_input(dtype, autocast):
    f1, f2, v1 = (x.to(dtype) for x in maps())
    x, key, negatives, keys = (
        y.to(dtype) for y in (unit(5), unit(5, seed=1), unit(7, seed=2), unit(9, seed=3))
    )
    calls = [
        (ql.foreground_attention, (f1, v1), {}),
        (ql.pair_quality, (f1, f2, v1), {}),
        (ql.quality_weights, (x[:, 0],), {}),
        (ql.info_nce, (x, key, negatives), dict(temperature=0.1, weights=W)),
        (ql.info_nce_in_batch, (x, keys), dict(temperature=0.1, offset=2)),
        (ql.negative_cosine, (x, key), {}),
        (ql.sinkhorn, (x,), {}),
        (ql.swapped_prediction, (torch.stack([x, key]), x[None].abs()), dict(temperature=0.1)),
    ]
    for function, tensors, options in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            ours = function(*tensors, **options)
        exact = function(*(t.float() for t in tensors), **options)
        for a, b in zip(
            [ours] if torch.is_tensor(ours) else ours,
            [exact] if torch.is_tensor(exact) else exact,
            strict=True,
        ):
            assert a.dtype == torch.float32
            torch.testing.assert_close(a, b, atol=0, rtol=0)


EXTREMES = [0.0, 1e30, -1e30, 1e-30, 65504.0, 3e38]


@pytest.mark.parametrize("value", EXTREMES)
@pytest.mark.parametrize("other", EXTREMES)
def test_no_nan_for_extreme_input(value, other):
    def check(result):
        for x in result if isinstance(result, tuple) else [result]:
            assert x.isfinite().all(), (value, other, result)

    for t in (1, 4):
        features = torch.full((2, t, 3), value)
        features[:, -1, 0] = other
        for v1 in (torch.ones(3), torch.full((3,), other), torch.tensor([1.0, -1, 0])):
            check(ql.foreground_attention(features, v1))
            check(ql.pair_quality(features, features.flip(1), v1))
    for n in (1, 3):
        x, y = torch.full((n, 4), value), torch.full((n, 4), other)
        x.requires_grad_()
        losses = [
            ql.info_nce(x, y, y, temperature=0.2),
            ql.info_nce_in_batch(x, y, temperature=0.2),
            ql.negative_cosine(x, y),
            ql.swapped_prediction(torch.stack([x, y]), ql.sinkhorn(y)[None], temperature=0.2),
        ]
        check(tuple(losses))
        sum(losses).backward()
        assert not x.grad.isnan().any()
        check(ql.sinkhorn(torch.cat([x, y]).detach()))
    check(ql.quality_weights(torch.tensor([value, other])))
    half = torch.full((2, 4, 3), 65504.0, dtype=torch.float16)
    check(ql.pair_quality(half, -half, half[0, 0]))


X = torch.zeros


@pytest.mark.parametrize(
    "call, shape",
    [
        (lambda: ql.foreground_attention(X(2, 3), X(3)), "(2, 3)"),
        (lambda: ql.foreground_attention(X(2, 0, 3), X(3)), "(2, 0, 3)"),
        (lambda: ql.foreground_attention(X(2, 4, 3), X(5)), "(5,)"),
        (lambda: ql.foreground_attention(X(2, 4, 3), X(3, 1)), "(3, 1)"),
        (lambda: ql.pair_quality(X(2, 4, 3), X(1, 4, 3), X(3)), "(1, 4, 3)"),
        (lambda: ql.pair_quality(X(2, 4, 3), X(2, 3), X(3)), "(2, 3)"),
        (lambda: ql.quality_weights(X(2, 1)), "(2, 1)"),
        (lambda: ql.quality_weights(X(0)), "(0,)"),
        (lambda: ql.info_nce(X(2, 4), X(3, 4), X(5, 4), temperature=1.0), "(3, 4)"),
        (lambda: ql.info_nce(X(2, 4), X(2, 4), X(5, 3), temperature=1.0), "(5, 3)"),
        (lambda: ql.info_nce(X(2, 4), X(2, 4), X(4), temperature=1.0), "(4,)"),
        (lambda: ql.info_nce(X(2, 4), X(2, 4), X(5, 4), temperature=0.0), "0.0"),
        (lambda: ql.info_nce(X(2, 4), X(2, 4), X(5, 4), temperature=1.0, weights=X(3)), "(3,)"),
        (lambda: ql.info_nce_in_batch(X(2, 4), X(5, 3), temperature=1.0), "(5, 3)"),
        (lambda: ql.info_nce_in_batch(X(2, 4), X(5, 4), temperature=1.0, offset=4), "(5, 4)"),
        (lambda: ql.info_nce_in_batch(X(2, 4), X(5, 4), temperature=1.0, offset=-1), "(5, 4)"),
        (lambda: ql.info_nce_in_batch(X(2, 4), X(5, 4), temperature=-1.0), "-1.0"),
        (
            lambda: ql.info_nce_in_batch(X(2, 4), X(5, 4), temperature=1.0, weights=X(2, 1)),
            "(2, 1)",
        ),
        (lambda: ql.negative_cosine(X(2, 4), X(2, 5)), "(2, 5)"),
        (lambda: ql.negative_cosine(X(0, 4), X(0, 4)), "(0, 4)"),
        (lambda: ql.negative_cosine(X(2, 4), X(2, 4), weights=X(1)), "(1,)"),
        (lambda: ql.info_nce_in_batch(X(0, 4), X(5, 4), temperature=1.0), "(0, 4)"),
        (lambda: ql.sinkhorn(X(4)), "(4,)"),
        (lambda: ql.sinkhorn(X(4, 2), epsilon=0.0), "0.0"),
        (lambda: ql.swapped_prediction(X(2, 4), X(2, 4), temperature=1.0), "(2, 4)"),
        (lambda: ql.swapped_prediction(X(2, 4, 3), X(3, 4, 3), temperature=1.0), "(3, 4, 3)"),
        (lambda: ql.swapped_prediction(X(2, 4, 3), X(2, 4, 5), temperature=1.0), "(2, 4, 5)"),
        (lambda: ql.swapped_prediction(X(1, 4, 3), X(1, 4, 3), temperature=1.0), "(1, 4, 3)"),
        (lambda: ql.swapped_prediction(X(2, 4, 3), X(2, 4, 3), temperature=0.0), "0.0"),
        (
            lambda: ql.swapped_prediction(X(2, 4, 3), X(2, 4, 3), temperature=1.0, weights=X(3)),
            "(3,)",
        ),
    ],
)
def test_wrong_shapes_are_named(call, shape):
    with pytest.raises(ValueError) as error:
        call()
    assert shape in str(error.value)


def test_temperature_must_be_given():
    with pytest.raises(TypeError):
        ql.info_nce(unit(2), unit(2), unit(3))
    with pytest.raises(TypeError):
        ql.info_nce_in_batch(unit(2), unit(2))


# ------------------------------------------------------------------------------------ two processes


def _weights_of_a_half(rank, port, q, cuts, results):
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    for name, cut in cuts.items():
        part = q[:cut] if rank == 0 else q[cut:]
        torch.save(
            ql.quality_weights(part, gamma=2.0, group=dist.group.WORLD),
            f"{results}/{name}-{rank}.pt",
        )
        scores = torch.outer(q, torch.tensor([1.0, -1.0, 0.3])).sin()
        part = scores[:cut] if rank == 0 else scores[cut:]
        torch.save(ql.sinkhorn(part, group=dist.group.WORLD), f"{results}/codes-{name}-{rank}.pt")
    dist.destroy_process_group()


def test_two_processes_weight_like_one(tmp_path):
    q, cuts = torch.linspace(-2, 2, 8), {"even": 4, "uneven": 3}
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(_weights_of_a_half, (port, q, cuts, str(tmp_path)), nprocs=2)
    for name in cuts:
        ours = torch.cat([torch.load(tmp_path / f"{name}-{rank}.pt") for rank in (0, 1)])
        torch.testing.assert_close(ours, ql.quality_weights(q, gamma=2.0))
        codes = torch.cat([torch.load(tmp_path / f"codes-{name}-{rank}.pt") for rank in (0, 1)])
        torch.testing.assert_close(
            codes, ql.sinkhorn(torch.outer(q, torch.tensor([1.0, -1.0, 0.3])).sin())
        )


# ------------------------------------------------------------------------------- the file by itself


def test_the_file_copied_alone_works(tmp_path):
    shutil.copy(ROOT / "quality_loss.py", tmp_path)
    code = (
        "import runpy, sys; import torch, torch.distributed; known = set(sys.modules); "
        "runpy.run_path('quality_loss.py', run_name='__main__'); "
        "new = {m.split('.')[0] for m in set(sys.modules) - known} - {'torch'}; "
        "assert new <= set(sys.stdlib_module_names), new"
    )
    done = subprocess.run(
        [sys.executable, "-I", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={k: v for k, v in os.environ.items() if k != "PYTHONPATH"},
    )
    assert done.returncode == 0, done.stderr
    assert "subject lost" in done.stdout and "nan" not in done.stdout


@pytest.mark.parametrize(
    "name",
    [
        "quality_loss",
        "genview",
        "generate_views",
        "eval_linear",
        "train_moco",
        "shapes",
        "train_byol",
        "train_swav",
    ],
)
def test_doctests(name):
    if not (ROOT / f"{name}.py").exists():
        pytest.skip("not written yet")
    failed, _ = doctest.testmod(importlib.import_module(name))
    assert failed == 0
