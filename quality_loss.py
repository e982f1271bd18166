r"""The quality-driven contrastive loss of GenView (ECCV 2024, arXiv 2403.12003; section "quality-driven contrastive loss").

This file needs PyTorch and nothing else: copy it. Three lines turn a contrastive loss into GenView's:

    with torch.no_grad():                                             # E: any frozen encoder with a feature map
        quality, _, _ = pair_quality(E(view1), E(view2), component)   # component: its first principal component
    loss = info_nce(q, k, queue, temperature=0.2, weights=quality_weights(quality))

All functions compute in float32 whatever the dtype or autocast state around them, on any device, raise ValueError for
shapes that do not fit, and return no NaN for finite input.

Legend of the shapes: N pairs, T positions of a feature map, K features at a position, D size of an embedding, M keys.
"""
import torch
import torch.distributed as dist
import torch.nn.functional as F


def foreground_attention(features, component):
    r"""Where in a view the foreground is, and where the background, as two distributions over its positions.

    a = <F, v1>, min-max normalised over the positions of each view to [0, 1]
    M^f = a / sum(a),    M^b = (1 - a) / sum(1 - a)

    Args:
        features: F, (N, T, K), a frozen encoder's feature map of each view.
        component: v1, (K,), the first principal component of such features, pointing to the foreground.
    Returns:
        M^f (N, T), M^b (N, T): no entry negative, each row sums to 1. A constant map gives uniform rows.
    Raises:
        ValueError: the shapes do not fit.
    Source: GenView, section "quality-driven contrastive loss"; the min-max normalisation is the authors' release's.

    >>> fg, bg = foreground_attention(torch.tensor([[[0.], [1.], [3.]]]), torch.ones(1))
    >>> fg.tolist()[0][:2], bg.tolist()[0][2]
    ([0.0, 0.25], 0.0)
    """
    _check(features.ndim == 3 and features.numel() > 0, f"features must be (N, T, K), got {tuple(features.shape)}")
    _check(component.shape == features.shape[2:],
           f"component must be ({features.shape[2]},) for features {tuple(features.shape)}, got {tuple(component.shape)}")
    with _no_autocast(features):
        features, component = _bounded(features), _bounded(component)
        a = features @ component                                                # <F, v1>                       (N, T)
        low, high = a.amin(1, keepdim=True), a.amax(1, keepdim=True)
        # A contrast of less than 1e-5 of what the features could show is rounding, not foreground: call it constant.
        scale = features.norm(dim=2).amax(1, keepdim=True) * component.norm()   # the largest |a| possible      (N, 1)
        constant = high - low <= 1e-5 * scale
        a = torch.where(constant, 0.5, (a - low) / (high - low).masked_fill(constant, 1))   # in [0, 1]         (N, T)
        return a / a.sum(1, keepdim=True), (1 - a) / (1 - a).sum(1, keepdim=True)           # M^f, M^b


def pair_quality(features1, features2, component):
    r"""Quality of positive pairs: the same subject is good, the same surroundings are not.

    z^f = sum_hw M^f_hw F_hw,    s_i^f = cos(z_i1^f, z_i2^f);    likewise z^b and s_i^b with M^b
    q_i = s_i^f - s_i^b

    Args:
        features1, features2: F_i1 (N, T, K), F_i2 (N, T', K), feature maps of the two *augmented* views of each pair.
        component: v1, (K,), see foreground_attention.
    Returns:
        q (N,) in [-2, 2], s^f (N,) and s^b (N,) in [-1, 1].
    Raises:
        ValueError: the shapes do not fit.
    Source: GenView, section "quality-driven contrastive loss".

    >>> subject, sky, sea = torch.eye(3)
    >>> view1, view2 = torch.stack([subject, sky])[None], torch.stack([subject, sea])[None]
    >>> [round(x.item(), 3) for x in pair_quality(view1, view2, subject)]    # same subject, new surroundings
    [1.0, 1.0, 0.0]
    """
    _check(features1.ndim == 3 and features2.ndim == 3 and features1.shape[::2] == features2.shape[::2],
           f"features of the two views must be (N, T, K) with equal N and K, "
           f"got {tuple(features1.shape)} and {tuple(features2.shape)}")
    fg1, bg1 = foreground_attention(features1, component)
    fg2, bg2 = foreground_attention(features2, component)
    with _no_autocast(features1):
        pool = lambda attention, features: torch.einsum("nt,ntk->nk", attention, _bounded(features))
        s_f = F.cosine_similarity(pool(fg1, features1), pool(fg2, features2))   # same subject?        (N,)
        s_b = F.cosine_similarity(pool(bg1, features1), pool(bg2, features2))   # same surroundings?   (N,)
        return s_f - s_b, s_f, s_b                                              # q = s^f - s^b


@torch.no_grad()
def quality_weights(quality, gamma=1.0, group=None):
    r"""Weights of the pairs in the loss: a softmax of their quality over the batch, scaled to mean 1, without gradient.

    w_i = n exp(gamma q_i) / sum_j exp(gamma q_j)

    Args:
        quality: q, (N,).
        gamma: how strongly quality counts; 0 gives weights of 1 (the release uses 1).
        group: a torch.distributed process group; the sum then runs over the pairs of all its ranks and n is their
            number, so that many processes weight like one. None: over this batch alone, as in the release.
    Returns:
        w (N,), float32, detached.
    Raises:
        ValueError: quality is not a vector.
    Source: GenView, section "quality-driven contrastive loss"; n and gamma from the authors' release.

    >>> quality_weights(torch.tensor([0.0, 0.6931472]))                      # exp(q) = 1, 2
    tensor([0.6667, 1.3333])
    """
    _check(quality.ndim == 1 and len(quality) > 0, f"quality must be (N,), got {tuple(quality.shape)}")
    exponent = gamma * _bounded(quality)
    largest = exponent.max()              # softmax is unchanged by a constant in the exponent; this one avoids overflow
    if group is not None:
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
    w = torch.exp(exponent - largest)                                           # (N,)
    n_and_sum = torch.stack([torch.full_like(largest, len(w)), w.sum()])
    if group is not None:
        dist.all_reduce(n_and_sum, group=group)
    n, total = n_and_sum
    return n * w / total


def info_nce(query, key, negatives, temperature, weights=None):
    r"""InfoNCE against given negatives, such as MoCo v2's queue.

    l_i = -log( exp(q_i.k_i / t) / (exp(q_i.k_i / t) + sum_m exp(q_i.n_m / t)) ),    L = (1/N) sum_i w_i l_i

    Args:
        query, key: q, k, (N, D), the positive pairs; of unit length by convention (not enforced).
        negatives: n, (M, D).
        temperature: t > 0; no default on purpose, it matters too much to be forgotten.
        weights: w, (N,), of mean 1 over the batch (quality_weights); None is exactly the unweighted loss.
    Returns:
        The scalar L; at chance level it is log(1 + M).
    Raises:
        ValueError: the shapes do not fit, or temperature is not positive.
    Source: MoCo (He et al. 2020), Eq. 1; weighting: GenView, section "quality-driven contrastive loss".

    >>> q = torch.tensor([[1., 0.]])
    >>> info_nce(q, q, negatives=torch.tensor([[0., 1.]]), temperature=1.0)      # log(1 + e^-1)
    tensor(0.3133)
    """
    _check_pairs(query, key)
    _check(negatives.ndim == 2 and negatives.shape[1] == query.shape[1],
           f"negatives must be (M, {query.shape[1]}), got {tuple(negatives.shape)}")
    _check(temperature > 0, f"temperature must be positive, got {temperature}")
    with _no_autocast(query):
        query, key, negatives = _bounded(query), _bounded(key), _bounded(negatives)
        positive = (query * key).sum(1, keepdim=True)                           # q_i.k_i   (N, 1)
        logits = torch.cat([positive, query @ negatives.T], 1) / temperature    # (N, 1 + M), the positive in column 0
        target = torch.zeros(len(query), dtype=torch.long, device=query.device)
        return _weighted_mean(F.cross_entropy(logits, target, reduction="none"), weights)


def info_nce_in_batch(query, keys, temperature, weights=None, offset=0):
    r"""InfoNCE with the other keys of the (gathered) batch as negatives, as in MoCo v3.

    l_i = -log( exp(q_i.k_(offset+i) / t) / sum_m exp(q_i.k_m / t) ),    L = (1/N) sum_i w_i l_i

    Args:
        query: q, (N, D), of unit length by convention (not enforced).
        keys: k, (M, D), the keys of all ranks; the positive of row i is keys[offset + i].
        temperature: t > 0, no default.
        weights: w, (N,), or None for the unweighted loss.
        offset: where this rank's keys start, rank * N.
    Returns:
        The scalar L; at chance level it is log(M).
    Raises:
        ValueError: the shapes do not fit, or temperature is not positive.
    Source: MoCo v3 (Chen et al. 2021), Algorithm 1; weighting: GenView, section "quality-driven contrastive loss".

    >>> info_nce_in_batch(torch.eye(2), torch.eye(2), temperature=1.0)           # log(1 + e^-1)
    tensor(0.3133)
    """
    _check(query.ndim == 2 and keys.ndim == 2 and query.shape[1] == keys.shape[1] and len(query) > 0,
           f"query and keys must be (N, D) and (M, D), got {tuple(query.shape)} and {tuple(keys.shape)}")
    _check(0 <= offset and offset + len(query) <= len(keys),
           f"rows {offset} to {offset + len(query)} are not among the keys {tuple(keys.shape)}")
    _check(temperature > 0, f"temperature must be positive, got {temperature}")
    with _no_autocast(query):
        logits = _bounded(query) @ _bounded(keys).T / temperature               # (N, M)
        target = torch.arange(len(query), device=query.device) + offset
        return _weighted_mean(F.cross_entropy(logits, target, reduction="none"), weights)


def negative_cosine(prediction, target, weights=None):
    r"""The loss of BYOL and SimSiam, one direction of the two. No gradient flows into the target.

    l_i = -cos(p_i, stopgrad(z_i)),    L = (1/N) sum_i w_i l_i

    Args:
        prediction, target: p, z, (N, D).
        weights: w, (N,), or None for the unweighted loss.
    Returns:
        The scalar L, in [-1, 1] for unweighted pairs.
    Raises:
        ValueError: the shapes do not fit.
    Source: SimSiam (Chen and He 2021), Eq. 1; weighting: GenView, section "quality-driven contrastive loss".

    >>> negative_cosine(torch.tensor([[2., 0.], [0., 1.]]), torch.tensor([[1., 0.], [1., 0.]]))
    tensor(-0.5000)
    """
    _check_pairs(prediction, target)
    with _no_autocast(prediction):
        return _weighted_mean(-F.cosine_similarity(_bounded(prediction), _bounded(target).detach()), weights)


@torch.no_grad()
def sinkhorn(scores, epsilon=0.05, iterations=3, group=None):
    r"""Soft assignments of images to prototypes that share the prototypes out equally: SwAV's codes, without gradient.

    Q = exp(scores / epsilon), its columns and rows scaled by turns to sums of 1/P and 1/N; each row times N is a code.

    Args:
        scores: (N, P), cosines of N embeddings with P prototypes.
        epsilon: smaller is harder.
        iterations: turns.
        group: a torch.distributed process group, over whose images the columns are shared out; None: these alone.
    Returns:
        codes (N, P), float32: each row sums to 1, each column to about N / P.
    Raises:
        ValueError: scores is no matrix, or epsilon not positive.
    Source: SwAV (Caron et al. 2020), section 3.1; here with logarithms, which do not overflow.

    >>> sinkhorn(torch.tensor([[1., 0.], [0.9, 0.]]), epsilon=1.0).sum(0).round(decimals=2)      # one prototype each
    tensor([1., 1.])
    """
    _check(scores.ndim == 2 and scores.numel() > 0, f"scores must be (N, P), got {tuple(scores.shape)}")
    _check(epsilon > 0, f"epsilon must be positive, got {epsilon}")
    log_q = _bounded(scores) / epsilon                                          # (N, P)
    for _ in range(iterations):
        largest = log_q.amax(0)                                                 # log of the sums of the columns, all ranks'
        if group is not None:
            dist.all_reduce(largest, dist.ReduceOp.MAX, group=group)
        total = torch.exp(log_q - largest).sum(0)
        if group is not None:
            dist.all_reduce(total, group=group)
        log_q = log_q - largest - total.log()                                   # columns: equal shares (a constant aside)
        log_q = log_q.log_softmax(1)                                            # rows: each image once
    return log_q.softmax(1)


def swapped_prediction(scores, codes, temperature, weights=None):
    r"""The loss of SwAV: each view predicts the codes of the others.

    l_i = -mean over a, v != a of  sum_p codes_aip log softmax_p(scores_vip / t),    L = (1/N) sum_i w_i l_i

    Args:
        scores: (V, N, P), cosines of the embeddings of V views of N images with P prototypes.
        codes: (A, N, P), the codes (sinkhorn) of the first A of these views; no gradient flows into them.
        temperature: t > 0, no default.
        weights: w, (N,), or None for the unweighted loss.
    Returns:
        The scalar L; at chance level it is log(P).
    Raises:
        ValueError: the shapes do not fit, or temperature is not positive.
    Source: SwAV (Caron et al. 2020), Eq. 2 and section 3.2; weighting: GenView, section "quality-driven contrastive loss".

    >>> swapped_prediction(torch.zeros(2, 1, 4), torch.eye(4)[None, :1].expand(2, 1, 4), temperature=0.1)        # log(4)
    tensor(1.3863)
    """
    _check(scores.ndim == 3 and codes.ndim == 3 and scores.shape[1:] == codes.shape[1:] and scores.numel() > 0
           and 0 < len(codes) <= len(scores) > 1,
           f"scores must be (V, N, P) and codes (A, N, P) with A <= V, V > 1; got {tuple(scores.shape)}, {tuple(codes.shape)}")
    _check(temperature > 0, f"temperature must be positive, got {temperature}")
    with _no_autocast(scores):
        log_p = (_bounded(scores) / temperature).log_softmax(2)                 # (V, N, P)
        entropy = -torch.einsum("anp,vnp->avn", codes.float().detach(), log_p)  # of each code with each prediction
        own = torch.eye(len(codes), len(scores), device=scores.device)[:, :, None]                      # (A, V, 1)
        return _weighted_mean((entropy * (1 - own)).sum((0, 1)) / (len(codes) * (len(scores) - 1)), weights)


def _weighted_mean(losses, weights):
    """L = (1/n) sum_i w_i l_i: the weights reach each pair's loss before the mean."""
    if weights is None:
        return losses.mean()
    _check(weights.shape == losses.shape, f"weights must be ({len(losses)},), got {tuple(weights.shape)}")
    return (weights.float() * losses).mean()


def _bounded(x):
    """float32, and cut at +-1e15, where no product of two entries overflows: finite in, finite out."""
    return x.float().clamp(-1e15, 1e15)


def _no_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


def _check_pairs(a, b):
    _check(a.ndim == 2 and a.shape == b.shape and len(a) > 0,
           f"the two sides of the pairs must be (N, D) alike, got {tuple(a.shape)} and {tuple(b.shape)}")


def _check(condition, message):
    if not condition:
        raise ValueError(message)


if __name__ == "__main__":
    # Three pairs of views with 2 x 2 positions of 3 features: subject, grass, sky. One position shows the subject.
    subject, grass, sky = torch.eye(3)
    scene = lambda figure, ground: torch.stack([figure, ground, ground, ground])
    view1 = torch.stack([scene(subject, grass)] * 3)
    view2 = torch.stack([scene(subject, sky),        # same subject, new surroundings: the pair one wants
                         scene(subject, grass),      # same subject, same surroundings: no diversity
                         scene(grass, grass)])       # subject lost, surroundings kept: a false positive
    q, s_f, s_b = pair_quality(view1, view2, component=subject)
    w = quality_weights(q)
    print("pair                  s_f    s_b      q      w")
    for name, *row in zip(["new surroundings", "same surroundings", "subject lost"], s_f, s_b, q, w):
        print(f"{name:18}" + "".join(f"{x.item():7.2f}" for x in row))
    torch.manual_seed(0)
    query, key, queue = (F.normalize(torch.randn(n, 16), dim=1) for n in (3, 3, 64))
    print(f"InfoNCE, temperature 0.2: unweighted {info_nce(query, key, queue, 0.2):.3f}, "
          f"weighted {info_nce(query, key, queue, 0.2, w):.3f}")
