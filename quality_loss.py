r"""GenView's quality-driven contrastive loss (ECCV 2024, arXiv 2403.12003), pure functions.

This file needs nothing but PyTorch, 2.6 or newer: copy it. Three lines turn a contrastive loss into
GenView's:

    with torch.no_grad():                                             # E: any frozen encoder
        quality, _, _ = pair_quality(E(view1), E(view2), component)   # feature maps (N, T, K)
    loss = info_nce(q, k, queue, temperature=0.2, weights=quality_weights(quality))

`component` comes from fit_foreground, once, on E's feature maps of some thousand images. Weights
and losses are computed in float32 on any device, whatever the dtype or autocast around them; an
argument that is no tensor or has the wrong shape raises a ValueError that names it; finite input
gives no NaN. GenView is cited by the names of its sections, "adaptive view generation" and
"quality-driven loss"; the weights of the latter are for all losses.

Shapes: N pairs, T positions of a feature map, K features at a position, D size of an embedding, M
keys, V views, P prototypes. v1, F, M^f, z^f, s^f, q, w, l, L are the paper's symbols; in the losses
q is the query.
"""
import functools
import inspect
import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


def without_autocast(function):
    """Decorator: no autocast. ValueError where an argument that is annotated as Tensor is none."""
    # eval_str: with `from __future__ import annotations` above a copy they are text.
    parameters = inspect.signature(function, eval_str=True).parameters
    names = list(parameters)
    tensors = [name for name in names if parameters[name].annotation is Tensor]

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        given = dict(zip(names, args, strict=False)) | kwargs
        device = "cpu"
        for name in tensors:
            if name in given:                      # else Python says what is missing
                _check(torch.is_tensor(given[name]), f"{name} must be a tensor", given[name])
                device = given[name].device.type
        if not torch.amp.is_autocast_available(device):      # meta
            device = "cpu"
        with torch.autocast(device, enabled=False):
            return function(*args, **kwargs)
    return wrapper


def in_float32(function):
    """Decorator: without_autocast, and all tensors as _clamped."""
    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        args = [_clamped(x) for x in args]
        kwargs = {name: _clamped(x) for name, x in kwargs.items()}
        return function(*args, **kwargs)
    return without_autocast(wrapper)


def _clamped(x):
    """A tensor in float32 and in +-1e15, so that products do not overflow; else x itself."""
    return x.float().clamp(-1e15, 1e15) if torch.is_tensor(x) else x


def _check(condition, wanted, *got):
    if not condition:
        raise ValueError(f"{wanted}, got {', '.join(map(_seen, got))}")


def _seen(x):
    """The shape of a tensor, a number itself, the type of anything else."""
    if torch.is_tensor(x):
        return str(tuple(x.shape)) if x.ndim else str(x.item())
    return str(x) if isinstance(x, (int, float, tuple)) else type(x).__name__


def _is_number(x):
    return hasattr(x, "__float__")


def _positive(temperature):
    """A number above 0, or a learnable one: a tensor that holds one number."""
    if not torch.is_tensor(temperature):
        return _is_number(temperature) and temperature > 0
    if temperature.numel() != 1 or torch.compiler.is_compiling():
        return temperature.numel() == 1
    try:
        return temperature.item() > 0
    except RuntimeError:                           # vmap and meta do not tell its value
        return True


def _reduce(x, group, operation="SUM"):
    """x reduced over all ranks of a process group, in place; None: this process alone. operation:
    a name of ReduceOp, which some builds of PyTorch lack."""
    if group is not None:
        dist.all_reduce(x, getattr(dist.ReduceOp, operation), group=group)
    return x


# --------------------------------------------------------------------------------- weights of pairs
@in_float32
def foreground_attention(features: Tensor, component: Tensor):
    r"""Where in a view the foreground is, and where the background: distributions over positions.

    Args:
        features: F, (N, T, K), a frozen encoder's feature map of each view.
        component: v1, (K,), their first principal component, pointing to the foreground.
    Returns M^f, M^b, (N, T): no entry negative, rows sum to 1; uniform for a constant map.
    Source: quality-driven loss; the min-max normalisation: the authors' release.
    >>> fg, bg = foreground_attention(torch.tensor([[[0.], [1.], [3.]]]), torch.ones(1))
    >>> fg.tolist()[0][:2], bg.tolist()[0][2]
    ([0.0, 0.25], 0.0)
    """
    _check(features.ndim == 3 and features.numel() and component.shape == features.shape[2:],
           "features must be (N, T, K) and component (K,)", features, component)
    a = features @ component                                    # a = <F, v1>                 (N, T)
    low = a.amin(1, keepdim=True)
    high = a.amax(1, keepdim=True)
    # A contrast below 1e-5 of the largest possible |a| is rounding, not foreground: a constant map.
    constant = high - low <= 1e-5 * features.norm(dim=2).amax(1, keepdim=True) * component.norm()
    contrast = (high - low).masked_fill(constant, 1)
    a = torch.where(constant, 0.5, (a - low) / contrast)        # in [0, 1]
    b = 1 - a
    foreground = a / a.sum(1, keepdim=True)                     # M^f = a / sum(a)
    background = b / b.sum(1, keepdim=True)                     # M^b = (1 - a) / sum(1 - a)
    return foreground, background


@in_float32
def pair_quality(features1: Tensor, features2: Tensor, component: Tensor):
    r"""Quality of positive pairs: the same subject is good, the same surroundings are not.

    Args:
        features1, features2: F_i1 (N, T, K), F_i2 (N, T', K), of the two *augmented* views.
        component: v1, (K,), see foreground_attention.
    Returns q in [-2, 2], s^f and s^b in [-1, 1], (N,). Source: quality-driven loss.
    >>> subject, sky, sea = torch.eye(3)
    >>> view1, view2 = torch.stack([subject, sky])[None], torch.stack([subject, sea])[None]
    >>> [round(x.item(), 3) for x in pair_quality(view1, view2, subject)]    # new surroundings
    [1.0, 1.0, 0.0]
    """
    _check(features1.ndim == features2.ndim == 3 and features1.shape[::2] == features2.shape[::2],
           "features of the views must be (N, T, K) with equal N and K", features1, features2)
    fg1, bg1 = foreground_attention(features1, component)
    fg2, bg2 = foreground_attention(features2, component)
    # z^f = sum_hw M^f_hw F_hw,    z^b = sum_hw M^b_hw F_hw
    z_f1 = torch.einsum("nt,ntk->nk", fg1, features1)                                   # (N, K)
    z_f2 = torch.einsum("nt,ntk->nk", fg2, features2)
    z_b1 = torch.einsum("nt,ntk->nk", bg1, features1)
    z_b2 = torch.einsum("nt,ntk->nk", bg2, features2)
    s_f = F.cosine_similarity(z_f1, z_f2)                       # s_i^f: same subject?          (N,)
    s_b = F.cosine_similarity(z_b1, z_b2)                       # s_i^b: same surroundings?     (N,)
    q = s_f - s_b                                               # q_i = s_i^f - s_i^b           (N,)
    return q, s_f, s_b


@torch.no_grad()
@in_float32
def quality_weights(quality: Tensor, gamma=1.0, group=None):
    r"""Weights of the pairs in the loss: a softmax of quality over the batch, scaled to mean 1.

    Args:
        quality: q, (N,).
        gamma: how strongly quality counts; 0 gives weights of 1 (the release uses 1).
        group: a torch.distributed process group: normalises over the pairs of all its ranks, so
            that many processes weight like one. None: over this batch alone, as in the release.
    Returns w (N,), detached. Source: quality-driven loss; n and gamma: the authors' release.
    >>> quality_weights(torch.tensor([0.0, 0.6931472]))                      # exp(q) = 1, 2
    tensor([0.6667, 1.3333])
    """
    _check(quality.ndim == 1 and len(quality) and _is_number(gamma),
           "quality must be (N,), gamma a number", quality, gamma)
    largest = _reduce((gamma * quality).max(), group, "MAX")    # against overflow
    w = torch.exp(gamma * quality - largest)                                    # (N,)
    n, total = _reduce(torch.stack([torch.full_like(largest, len(w)), w.sum()]), group)
    return n * w / total                       # w_i = n exp(gamma q_i) / sum_j exp(gamma q_j)


# ------------------------------------------------------------------------------------------- losses
@in_float32
def info_nce(query: Tensor, key: Tensor, negatives: Tensor, *, temperature, weights=None):
    r"""InfoNCE against given negatives, such as MoCo v2's queue.

    l_i = -log( exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_m exp(q_i.n_m / t)) )

    Args:
        query, key: q, k, (N, D), the positive pairs; of unit length by convention (not enforced).
        negatives: n, (M, D).    temperature: t > 0, a number or a tensor.
        weights: w, (N,), of mean 1 (quality_weights); None is exactly the unweighted loss.
    Returns L, a scalar, log(1 + M) at chance level. Source: MoCo (He et al. 2020), Eq. 1.
    >>> q = torch.tensor([[1., 0.]])
    >>> info_nce(q, q, torch.tensor([[0., 1.]]), temperature=1.0)                # log(1 + e^-1)
    tensor(0.3133)
    """
    _check(query.ndim == 2 and len(query) and query.shape == key.shape
           and negatives.shape[1:] == query.shape[1:] and _positive(temperature),
           "wanted query and key (N, D), negatives (M, D), temperature > 0",
           query, key, negatives, temperature)
    positive = (query * key).sum(1, keepdim=True)                               # q_i.k_i   (N, 1)
    logits = torch.cat([positive, query @ negatives.T], 1) / temperature        # (N, 1 + M)
    target = torch.zeros(len(query), dtype=torch.long, device=query.device)     # column 0
    return _weighted_mean(F.cross_entropy(logits, target, reduction="none"), weights)


@in_float32
def info_nce_in_batch(query: Tensor, keys: Tensor, *, temperature, weights=None, offset=0):
    r"""InfoNCE with the other keys of the (gathered) batch as negatives, as in MoCo v3.

    l_i = -log( exp(q_i.k_(offset+i) / t) / sum_m exp(q_i.k_m / t) )

    Args:
        query: q, (N, D), of unit length by convention (not enforced).
        keys: k, (M, D), the keys of all ranks; the positive of row i is keys[offset + i].
        offset: where this rank's keys start, rank * N. The others: see info_nce.
    Returns L, a scalar, log(M) at chance level. Source: MoCo v3 (Chen et al. 2021), Algorithm 1.
    >>> info_nce_in_batch(torch.eye(2), torch.eye(2), temperature=1.0)           # log(1 + e^-1)
    tensor(0.3133)
    """
    _check(query.ndim == keys.ndim == 2 and query.shape[1] == keys.shape[1] and len(query)
           and _is_number(offset) and 0 <= offset <= len(keys) - len(query)
           and _positive(temperature),
           "wanted query (N, D), keys (M, D), offset with offset + N <= M, temperature > 0",
           query, keys, offset, temperature)
    logits = query @ keys.T / temperature                                       # (N, M)
    target = torch.arange(len(query), device=query.device) + offset
    return _weighted_mean(F.cross_entropy(logits, target, reduction="none"), weights)


@in_float32
def negative_cosine(prediction: Tensor, target: Tensor, weights=None):
    r"""The loss of BYOL and SimSiam, one direction of the two. No gradient flows into the target.

    l_i = -cos(p_i, stopgrad(z_i))

    Args: prediction, target: p, z, (N, D); weights: see info_nce.
    Returns L, a scalar, -1 at best. Source: SimSiam (Chen and He 2021), Eq. 1.
    >>> negative_cosine(torch.tensor([[2., 0.], [0., 1.]]), torch.tensor([[1., 0.], [1., 0.]]))
    tensor(-0.5000)
    """
    _check(prediction.ndim == 2 and len(prediction) and prediction.shape == target.shape,
           "prediction and target must be (N, D)", prediction, target)
    return _weighted_mean(-F.cosine_similarity(prediction, target.detach()), weights)


@in_float32
def swapped_prediction(scores: Tensor, codes: Tensor, *, temperature, weights=None):
    r"""The loss of SwAV: each view predicts the codes of the others.

    l_i = -mean over a, v != a of  sum_p codes_aip log softmax_p(scores_vip / t)

    Args:
        scores: (V, N, P), cosines of the embeddings of V views of N images with P prototypes.
        codes: (A, N, P), codes (sinkhorn) of the first A views; no gradient. Others: see info_nce.
    Returns L, a scalar, log(P) at chance level. Source: SwAV (Caron et al. 2020), Eq. 2, Sec. 3.2.
    >>> swapped_prediction(torch.zeros(2, 1, 4), torch.eye(4)[:2, None], temperature=0.1)   # log(4)
    tensor(1.3863)
    """
    _check(scores.ndim == codes.ndim == 3 and scores.shape[1:] == codes.shape[1:]
           and scores.numel() and 0 < len(codes) <= len(scores) > 1 and _positive(temperature),
           "wanted scores (V, N, P), codes (A, N, P), A <= V > 1, temperature > 0",
           scores, codes, temperature)
    log_p = (scores / temperature).log_softmax(2)                               # (V, N, P)
    losses = -torch.einsum("anp,vnp->avn", codes.detach(), log_p)     # cross-entropies (A, V, N)
    own = torch.eye(len(codes), len(scores), dtype=scores.dtype, device=scores.device)   # (A, V)
    own = own[:, :, None]                                                       # (A, V, 1)
    return _weighted_mean((losses * (1 - own)).sum((0, 1)) / (1 - own).sum(), weights)


@torch.no_grad()
@in_float32
def sinkhorn(scores: Tensor, epsilon=0.05, iterations=3, group=None):
    r"""SwAV's codes: soft assignments of images to prototypes, each prototype used equally.

    Q = exp(scores / epsilon), columns and rows alternately normalised to a sum of 1.

    Args:
        scores: (N, P), cosines of N embeddings with P prototypes; epsilon: smaller is harder.
        group: a torch.distributed process group whose images are assigned together; None: these.
    Returns codes (N, P): each row sums to 1, each column to about N / P. No gradient.
    Source: SwAV, Sec. 3.1; with logarithms, which do not overflow.
    >>> sinkhorn(torch.tensor([[1., 0.], [0.9, 0.]]), epsilon=1.0).sum(0).round(decimals=2)
    tensor([1., 1.])
    """
    _check(scores.ndim == 2 and scores.numel() and _positive(epsilon),
           "wanted scores (N, P), epsilon > 0", scores, epsilon)
    log_q = scores / epsilon                                                    # (N, P)
    for _ in range(iterations):
        largest = _reduce(log_q.amax(0), group, "MAX")    # log-sum-exp of the columns
        total = _reduce(torch.exp(log_q - largest).sum(0), group)
        log_q = log_q - largest - total.log()                                   # columns
        log_q = log_q.log_softmax(1)                                            # rows
    return log_q.softmax(1)


def _weighted_mean(losses, weights):
    """L = (1/N) sum_i w_i l_i: the weights reach each pair's loss before the mean."""
    if weights is None:
        return losses.mean()
    _check(torch.is_tensor(weights) and weights.shape == losses.shape,
           f"weights must be a tensor ({len(losses)},)", weights)
    return (weights * losses).mean()


# ---------------------------------------------------------------------- the foreground component v1
@torch.no_grad()
@without_autocast
def fit_foreground(tokens: Tensor, grid, fraction=0.4):
    r"""First principal component of tokens, turned to the foreground, and the threshold alpha.

    Args:
        tokens: (N, T, K) of images drawn from the data set, laid out row by row on grid.
        grid: (rows, columns), rows * columns = T.
        fraction: alpha is the quantile that makes this share of all tokens foreground.
    Returns v1 (K,) of unit length; alpha, a float. Source: adaptive view generation, Eq. 7.
    """
    _check_grid(tokens, grid)
    # v1 = first eigenvector of Cov(tokens). Sums of parts: tokens may be large and of half
    # precision. They are kept in float64 on the CPU, as some devices have none (MPS). The shift is
    # near the mean and keeps the sums precise.
    shift = _clamped(tokens[:256]).mean((0, 1))                                 # (K,)
    count = tokens.shape[0] * tokens.shape[1]                                   # N T
    sum_x = 0.0
    sum_xx = 0.0
    for part in tokens.split(256):
        x = _clamped(part).flatten(0, 1) - shift                                # (n T, K)
        sum_x = sum_x + x.cpu().double().sum(0)
        sum_xx = sum_xx + (x.T @ x).cpu().double()
    covariance = sum_xx - torch.outer(sum_x, sum_x) / count        # times N T  (K, K)
    _, vectors = torch.linalg.eigh(covariance)         # eigenvalues rise: the last is largest
    v1 = vectors[:, -1].float().to(tokens.device)
    return orient_foreground(v1, tokens, grid, fraction)


@torch.no_grad()
@without_autocast
def orient_foreground(component: Tensor, tokens: Tensor, grid, fraction=0.4):
    """The sign of a component is arbitrary: foreground is the side that is more frequent at the
    centre of the images than along their border (ours). See fit_foreground for the rest."""
    _check_grid(tokens, grid)
    _check(component.shape == tokens.shape[2:] and component.any(),
           "component must be (K,) and not zero, tokens (N, T, K)", component, tokens)
    if not 0 < component.float().norm() < math.inf:        # the squares overflow, or are all 0
        component = component / component.abs().max()
    v1 = component.float()
    v1 = v1 / v1.norm()
    a = torch.cat([_clamped(part) @ v1 for part in tokens.split(256)])      # <token_ij, v1>  (N, T)
    border = torch.ones(*grid, dtype=torch.bool, device=a.device)               # (rows, columns)
    border[1:-1, 1:-1] = False

    def centrality(a):
        alpha = foreground_threshold(a, fraction)
        frequency = (a > alpha).float().mean(0).view(*grid)
        difference = frequency[~border].mean() - frequency[border].mean()
        return difference.nan_to_num(), alpha                  # a grid may be all border

    plus, plus_alpha = centrality(a)
    minus, minus_alpha = centrality(-a)
    return (v1, plus_alpha) if plus >= minus else (-v1, minus_alpha)


def _check_grid(tokens, grid):
    is_grid = isinstance(grid, (tuple, list)) and len(grid) == 2 and all(map(_is_number, grid))
    fits = tokens.ndim == 3 and is_grid and grid[0] > 0 and grid[0] * grid[1] == tokens.shape[1]
    _check(fits and tokens.numel(), "tokens must be (N, T, K) on a grid of T = rows * columns",
           tokens, grid)


@in_float32
def foreground_threshold(a: Tensor, fraction=0.4):
    """alpha (Eq. 7): the quantile of a (N, T) above which this part of all tokens lies; of more
    numbers than torch.quantile takes, only every second (third, ...) image counts."""
    _check(a.numel() and 0 <= fraction <= 1, "a must be (N, T), fraction in [0, 1]", a, fraction)
    every = 1 + a.numel() // 16_000_000
    return torch.quantile(a[::every].flatten(), 1 - fraction).item()


if __name__ == "__main__":
    # Three pairs of views with 2 x 2 positions of 3 features; one position shows the subject.
    features = torch.eye(3)                                            # subject, grass, sky
    pairs = {"new surroundings": [0, 2, 2, 2], "same surroundings": [0, 1, 1, 1],
             "subject lost": [1, 1, 1, 1]}                             # the first is wanted
    view1 = features[torch.tensor([[0, 1, 1, 1]] * 3)]
    view2 = features[torch.tensor(list(pairs.values()))]
    q, s_f, s_b = pair_quality(view1, view2, features[0])
    print("pair                  s_f    s_b      q      w")
    for name, *row in zip(pairs, s_f, s_b, q, quality_weights(q), strict=True):
        print(f"{name:18}" + "".join(f"{x.item():7.2f}" for x in row))
