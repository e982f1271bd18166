"""MoCo v2 and MoCo v3 with GenView: the models, the step and the whole training loop.

    python train_moco.py --dataset shapes                  # no download, any laptop: the whole method in two minutes
    python train_moco.py --dataset cifar10                 # uses the views of generate_views.py where it finds them
    torchrun --nproc_per_node=8 train_moco.py --dataset imagenet --data-dir /data/imagenet --views-dir /data/imagenet-views

Read train_step first: it is the method. It needs two other files, quality_loss.py and genview.py.

Legend of the shapes: N pairs of this process, S side of a view, T positions and K features of the frozen encoder's map,
D size of an embedding, M keys in the queue.
"""
import argparse
import copy
import itertools
import json
import math
import os
import signal
import textwrap
import threading
import time
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw
from torch import nn

import genview
from cached_quality import CachedQuality, features_file
from eval_linear import extract_features, knn_accuracy
from genview import Augmentation, PairLoader, Trouble
from quality_loss import info_nce, info_nce_in_batch, pair_quality, quality_weights

# A recipe for each data set and method; every entry is also a flag. lr is for 256 images and grows with the batch (the
# linear scaling rule of all these papers). Sources: [v2] MoCo v2 and its CIFAR-10 notebook, [v3] MoCo v3, [rel] GenView's
# release, the rest is ours.
PRESETS = {
    ("cifar10", "mocov2"): dict(
        arch="resnet18", image_size=32, epochs=200, batch_size=256,               # [v2] the notebook's (batches of 512)
        optimizer="sgd", lr=0.03, weight_decay=5e-4, warmup_epochs=1,             # [v2] but for the warm-up
        dim=128, queue=4096, temperature=0.1, momentum=0.99, start_batches=10,    # [v2] but for the start
        crop_min=0.2, blur=0.0, knn_every=10),                                    # [v2] but crops from 0.08 there
    ("cifar10", "mocov3"): dict(
        arch="resnet18", image_size=32, epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=5e-4,
        warmup_epochs=5, dim=256, hidden=2048, temperature=0.2, momentum=0.99, start_batches=0,
        crop_min=0.2, blur=0.0, knn_every=10),
    ("imagenet", "mocov2"): dict(
        arch="resnet50", image_size=224, epochs=200, batch_size=256, optimizer="sgd", lr=0.03, weight_decay=1e-4,  # [v2] [rel]
        warmup_epochs=0, dim=128, queue=65536, temperature=0.2, momentum=0.999,   # [v2]
        start_batches=10,
        crop_min=0.2, blur=0.5, knn_every=20),                                    # [v2] [rel]
    ("imagenet", "mocov3"): dict(
        arch="resnet50", image_size=224, epochs=100, batch_size=4096, optimizer="lars", lr=0.6, weight_decay=1e-6,  # [rel]: 9.6
        warmup_epochs=10, dim=256, hidden=4096, temperature=1.0, momentum=0.99,   # [v3] [rel]
        start_batches=0,
        crop_min=0.2, blur=0.5, knn_every=20),                                    # [v3]
}
PRESETS["imagenet", "mocov3-vit"] = dict(                                         # [v3] [rel], with --arch vit_small or vit_base
    arch="vit_base", image_size=224, epochs=300, batch_size=4096, optimizer="adamw", lr=1.5e-4, weight_decay=0.1,
    warmup_epochs=40, dim=256, hidden=4096, temperature=0.2, momentum=0.99, start_batches=0,
    crop_min=0.08, blur=0.5, knn_every=20)
PRESETS["cifar10", "mocov3-vit"] = PRESETS["imagenet", "mocov3-vit"] | dict(      # patches of 4 pixels
    arch="vit_small", image_size=32, batch_size=512, lr=3e-4, hidden=1024, crop_min=0.2, blur=0.0, knn_every=10)
PRESETS["shapes", "mocov2"] = dict(                                               # small and quick: two minutes on a laptop
    arch="resnet10_narrow", image_size=32, epochs=30, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
    warmup_epochs=1, dim=128, queue=2048, temperature=0.2, momentum=0.99, start_batches=0,
    crop_min=0.3, blur=0.0, knn_every=5)
PRESETS["shapes", "mocov3"] = {k: v for k, v in PRESETS["shapes", "mocov2"].items() if k != "queue"} | dict(hidden=512)
PRESETS["shapes", "mocov3-vit"] = PRESETS["shapes", "mocov3"] | dict(arch="vit_narrow", lr=1e-3)
for method in ("mocov2", "mocov3", "mocov3-vit"):
    PRESETS["cifar100", method] = PRESETS["cifar10", method]
    PRESETS["folder", method] = PRESETS["imagenet", method]

RANGES = dict(lr=(0, 1e4), weight_decay=(0, 1e4), temperature=(1e-4, 1e4), epsilon=(1e-4, 1e4), momentum=(0, 1), blur=(0, 1),
              crop_min=(1e-3, 1), small_min=(1e-3, 1), gamma=(-1e3, 1e3), save_minutes=(0, 1e6))   # of flags that are no whole numbers


# --------------------------------------------------------------------------------------------------------------- models

def mlp(sizes, norm=False, last_norm=False):
    """Linear layers from sizes[0] to sizes[-1] numbers, ReLUs between; norm: batch norm before these; last_norm: one without
    scale and shift at the end."""
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers += [nn.Linear(a, b, bias=not norm), *[nn.BatchNorm1d(b)] * norm, nn.ReLU()]
    return nn.Sequential(*layers[:-1 - norm], *[nn.BatchNorm1d(sizes[-1], affine=False)] * last_norm)


class Encoder(nn.Module):
    """A backbone and its projection head: views (N, 3, S, S) -> embeddings (N, D)."""

    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views):
        return self.head(self.backbone(views))


class Momentum(nn.Module):
    """What v2, v3 and BYOL share: a query encoder that learns, and a key encoder that is its moving average."""

    def __init__(self, args, head, zero_init_residual=True):
        """head: feature size of the backbone -> projection head."""
        super().__init__()
        backbone, features = genview.make_backbone(args.arch, args.image_size, zero_init_residual)
        self.query = Encoder(backbone, head(features))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.momentum = args.momentum

    @torch.no_grad()
    def update(self, progress):
        """theta_k <- m theta_k + (1 - m) theta_q, batch-norm statistics like weights; progress: share of training done."""
        m = self.momentum_at(progress)
        pairs = [(k, q) for k, q in zip(self.key.state_dict().values(), self.query.state_dict().values())
                 if k.is_floating_point()]
        keys, queries = map(list, zip(*pairs))
        torch._foreach_lerp_(keys, queries, 1 - m)

    def momentum_at(self, progress):
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * progress)) / 2   # rises to 1 by a cosine

    @torch.no_grad()
    def start(self, views):
        """Fills batch norm's running statistics from a few batches of views and copies them to the keys, which would else be
        computed with wrong ones for the first 1 / (1 - m) steps: long enough to drive all embeddings to one side."""
        norms = [m for m in self.query.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        usual = [m.momentum for m in norms]
        for m in norms:
            m.momentum = None                      # the mean over these batches
        self.train()
        for view in views:
            self.query(view)
        for m, momentum in zip(norms, usual):
            m.momentum = momentum
        self.key.load_state_dict(self.query.state_dict())


class MoCoV2(Momentum):
    """MoCo v2 (Chen et al. 2020): negatives from a queue of the keys of the last batches.

    Batch norm leaks: within a batch, statistics shared by query and key give the positive away. MoCo shuffles the keys
    between GPUs, which one device cannot. Here keys are computed with running statistics, averaged by the same momentum as
    the weights (EMAN, Cai et al. 2021): nothing of the batch enters a key, on one device or on many, and it is faster.
    """

    def __init__(self, args):
        super().__init__(args, lambda features: mlp([features, features, args.dim]), zero_init_residual=False)
        self.temperature = args.temperature
        self.register_buffer("queue", F.normalize(torch.randn(args.queue, args.dim), dim=1))     # (M, D)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.chance = math.log(1 + args.queue)     # the loss of a guess among 1 + M keys

    def train(self, mode=True):
        super().train(mode)
        self.key.eval()                            # EMAN
        return self

    def momentum_at(self, progress):
        return self.momentum

    def forward(self, views, weights, world):
        view1, view2 = views
        q = F.normalize(self.query(view1).float(), dim=1)                         # (N, D)
        with torch.no_grad():
            k = F.normalize(self.key(view2).float(), dim=1)                       # (N, D)
        negatives = self.queue.clone()             # the queue moves on below, before the backward pass needs it
        loss = info_nce(q, k, negatives, self.temperature, weights)
        self.enqueue(world.gather(k))
        return loss, similarities(q, k, negatives)

    @torch.no_grad()
    def enqueue(self, keys):
        """The newest keys (of all processes) take the place of the oldest."""
        at = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[at] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


class MoCoV3(Momentum):
    """MoCo v3 (Chen et al. 2021): negatives from the batch, a predictor on the query, both directions."""

    def __init__(self, args):
        vit = args.arch.startswith("vit")          # one layer more, and a norm after the predictor
        hidden = [args.hidden] * (1 + vit)
        super().__init__(args, lambda features: mlp([features, *hidden, args.dim], norm=True, last_norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True, last_norm=vit)
        self.temperature = args.temperature
        self.chance = 4 * args.temperature * math.log(args.batch_size)            # two directions, each times 2t

    def forward(self, views, weights, world):
        q1, q2 = (F.normalize(self.predictor(self.query(v)).float(), dim=1) for v in views)              # (N, D)
        with torch.no_grad():
            k1, k2 = (world.gather(F.normalize(self.key(v).float(), dim=1)) for v in views)              # (all N, D)
        offset = world.rank * len(q1)              # where this process's keys stand among all
        # Both directions carry the same w. The factor 2t keeps the size of the gradient when the temperature changes.
        loss = 2 * self.temperature * (info_nce_in_batch(q1, k2, self.temperature, weights, offset)
                                       + info_nce_in_batch(q2, k1, self.temperature, weights, offset))
        return loss, similarities(q1, k2[offset:][:len(q1)], k2, positives=1)


METHODS = {"mocov2": MoCoV2, "mocov3": MoCoV3}
NAMES = {"mocov2": "MoCo v2", "mocov3": "MoCo v3", "byol": "BYOL", "simsiam": "SimSiam", "swav": "SwAV"}


def compile_method(method):
    """torch.compile for the networks alone: the loss and the queue are cheap, and stay what one reads."""
    for network in method.children():
        network.compile()


@torch.no_grad()
def similarities(q, k, negatives, positives=0):
    """Health read-outs: the mean cosine of positive pairs (should rise) and of others (should stay near 0).
    positives: how many of the negatives of each query are its own positive, to be taken out of the mean."""
    pos, all_pairs = (q * k).sum(1).mean(), (q.mean(0) * negatives.mean(0)).sum()
    return {"pos": pos, "neg": (len(negatives) * all_pairs - positives * pos) / (len(negatives) - positives),
            "std": spread(q)}


def spread(z):
    """Standard deviation of embeddings (N, D) of unit length, times sqrt(D): 1 where they point everywhere, 0 in a collapse."""
    return z.std(0).mean() * z.shape[1] ** 0.5


# ------------------------------------------------------------------------------------------------------------- the step

def train_step(method, optimizer, views, places, quality_of, gamma, progress, world):
    """One step of GenView. method: MoCo, wrapped for several processes or not; progress: share of training done.
    views: P_1, P_2 (of SwAV more), each (N, 3, S, S); places: of what they are crops, for --quality cached. quality_of:
    P_1, P_2, places -> q, s^f, s^b of each pair (section "quality-driven contrastive loss"), or None: equal weights.
    Returns the loss and read-outs, scalars on the device."""
    with world.autocast():
        weights = None
        if quality_of is not None:
            quality, s_f, s_b = quality_of(*views[:2], places[:2])                # q_i = s_i^f - s_i^b           (N,)
            weights = quality_weights(quality, gamma, world.group)                # w_i = n exp(gamma q_i) / sum  (N,)
        getattr(method, "module", method).update(progress)                        # theta_k <- m theta_k + (1 - m) theta_q
        loss, readouts = method(views, weights, world)                            # L = (1/n) sum_i w_i l_i
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    if weights is not None:  # effective sample size: the share of the batch that would count as much if weighted equally
        readouts |= {"ess": weights.sum() ** 2 / weights.square().sum() / len(weights),
                     "s_f": s_f.mean(), "s_b": s_b.mean()}
    return {"loss": loss.detach(), **readouts}


class PairQuality:
    """q, s^f and s^b of the pairs of a batch, by a frozen encoder E and the first principal component of its features."""

    def __init__(self, encoder, component):
        self.encoder, self.component = encoder, component

    @torch.no_grad()
    def __call__(self, view1, view2, places):
        return pair_quality(self.encoder(view1), self.encoder(view2), self.component)


class LARS(torch.optim.Optimizer):
    """SGD with momentum, the step of each matrix scaled by trust |w| / |gradient| (You et al. 2017; as in MoCo v3, biases
    and batch-norm weights get neither this nor weight decay)."""

    def __init__(self, parameters, lr, weight_decay, momentum=0.9, trust=0.001):
        super().__init__(parameters, dict(lr=lr, weight_decay=weight_decay, momentum=momentum, trust=trust))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in (p for p in group["params"] if p.grad is not None):
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm, update_norm = p.norm(), update.norm()
                    ratio = torch.where((p_norm > 0) & (update_norm > 0), group["trust"] * p_norm / update_norm, 1.0)
                    update = update * ratio
                state = self.state[p]
                if not state:
                    state["mu"] = torch.zeros_like(p)
                p.add_(state["mu"].mul_(group["momentum"]).add_(update), alpha=-group["lr"])


def make_optimizer(args, method):
    """method.constant_lr, where there is one: modules whose learning rate stays at its peak (SimSiam's predictor)."""
    constant = [p for module in getattr(method, "constant_lr", []) for p in module.parameters()]
    chosen = set(constant)
    groups = [{"params": [p for p in method.parameters() if p.requires_grad and p not in chosen]}]
    if constant:
        groups.append({"params": constant, "constant_lr": True})
    if args.optimizer == "lars":
        return LARS(groups, lr=0.0, weight_decay=args.weight_decay)
    if args.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=0.0, weight_decay=args.weight_decay)
    return torch.optim.SGD(groups, lr=0.0, momentum=0.9, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Linear warm-up, then a cosine to 0; epoch may be a fraction."""
    peak = args.lr * args.batch_size / 256
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    return peak * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup_epochs) / max(args.epochs - args.warmup_epochs, 1)))


# ----------------------------------------------------------------------------------------------------- what to train on

def augmentations(args):
    """t1, t2. MoCo v3 blurs and solarises the two views unequally, as BYOL does, and jitters saturation less. SwAV jitters
    twice as strongly and adds small crops."""
    scale = (args.crop_min, 1.0)
    if args.method in ("mocov2", "simsiam"):
        return [Augmentation(scale, blur=args.blur)] * 2
    if args.method == "swav":
        large = Augmentation(scale, (0.8, 0.8, 0.8, 0.2), args.blur)
        small = large._replace(scale=(args.small_min, args.crop_min), size=args.small_size)
        return [large] * 2 + [small] * args.small_crops
    jitter = (0.4, 0.4, 0.2, 0.1)
    return [Augmentation(scale, jitter, blur=2 * args.blur), Augmentation(scale, jitter, blur=0.2 * args.blur, solarise=0.2)]


def shapes_views(encoder, args, count):
    """Adaptive view generation in the world of shapes: tokens -> foreground proportion -> noise level -> perturbed scene.
    Returns the views of count pictures, uint8 like these, and the component of the encoder's features."""
    import shapes
    from generate_views import foreground_proportion, noise_level
    scenes = shapes.split("train")
    with torch.no_grad():
        tokens = torch.cat([encoder(genview.normalise(x / 255)) for x in shapes.render(scenes).split(512)])
    component, threshold = genview.fit_foreground(tokens, (8, 8))
    adaptive = noise_level(foreground_proportion(tokens, component, threshold))                      # (N,)
    level = adaptive if args.noise == "adaptive" else int(args.noise)
    views = shapes.render(shapes.perturb(scenes, level, genview.step_generator(args.seed)))
    return views[genview.spaced(len(views), count)], component


def load_views(args, images):
    """The generated views as PairLoader wants them, or None for plain pairs."""
    if args.views_dir == "none":
        return None
    paths = genview.find_views(images, args.views_dir, args.dataset)
    missing = sum(path is None for path in paths)
    genview.say(f"generated views of {len(paths) - missing} of {len(paths)} images from {args.views_dir}"
                + (f"; the other {missing} use themselves" if missing else ""))
    return paths if images.pixels is None else genview.load_views(images, paths, args.skip_bad)


def load_extra(args, images):
    """--views extra: pictures as images are, (M, 3, S, S) uint8 or M paths: the views of these images from a folder of
    generate_views.py, all the pictures of any other folder."""
    if Path(args.views_dir, "settings.json").exists():
        paths = [path for path in genview.find_views(images, args.views_dir, args.dataset) if path is not None]
    else:
        paths = sorted(path for path in Path(args.views_dir).rglob("*") if path.suffix.lower() in genview.SUFFIXES)
    if not paths:
        raise Trouble(f"{args.views_dir} holds no pictures for --views extra")
    genview.say(f"{len(paths)} further training samples from {args.views_dir}")
    extra = genview.Images([str(path.resolve()) for path in paths], torch.zeros(len(paths)), 0, root=Path())
    return extra.names if images.pixels is None else genview.into_memory(extra, args.image_size, args.skip_bad).pixels


@torch.no_grad()
def find_component(encoder, images, args, world):
    """v1 of the frozen encoder's features, from up to 10,000 images (the release's number), or that of --component, whose
    sign these images decide where the file is the release's."""
    given, threshold = None, None
    if args.component:
        size = encoder(torch.zeros(1, 3, args.image_size, args.image_size, device=world.device)).shape[2]
        given, threshold = genview.load_component(args.component, size)
    if threshold is not None:                      # a foreground.npz knows its side
        return given
    tokens = []
    for part in genview.progress(genview.spaced(len(images.names), genview.FIT_IMAGES).split(64), "foreground", "batch"):
        views = []
        for i in part.tolist():
            try:
                views.append(genview.to_tensor(genview.square(images.pil(i), args.image_size)))
            except Trouble:
                if not args.skip_bad:
                    raise
        if views:
            with world.autocast():
                tokens.append(encoder(genview.normalise(torch.stack(views).to(world.device) / 255)).half().cpu())
    if not tokens:
        raise Trouble("none of the images that the foreground would be fitted on can be read")
    tokens = torch.cat(tokens)
    grid = (math.isqrt(tokens.shape[1]),) * 2
    return (genview.fit_foreground(tokens, grid) if given is None else genview.orient_foreground(given, tokens, grid))[0]


def prepare(args, images, world):
    """Returns the generated views of the images (or None), and quality_of (or None), see train_step."""
    views = encoder = component = None
    if args.dataset != "shapes":
        views = (load_extra if args.views == "extra" else load_views)(args, images)
        encoder = genview.FrozenEncoder(args.encoder) if args.quality != "off" else None
    elif args.views_dir != "none" or args.quality != "off":
        import shapes                              # its encoder stands in for CLIP, its pictures for Stable unCLIP's
        encoder = shapes.train_encoder(amp=genview.fast_dtype(torch.device("cpu")) == torch.bfloat16)
        views, component = shapes_views(encoder, args, len(images.names))
        views = None if args.views_dir == "none" else views
    if args.quality == "off":
        return views, None
    encoder = encoder.to(world.device, memory_format=torch.channels_last)
    if component is None:
        component = world.gather_objects(find_component(encoder, images, args, world).cpu())[0]   # one for all processes
    component = (-component if args.flip_foreground else component).to(world.device)
    if args.quality == "cached":
        return views, CachedQuality(features_file(encoder, images, views, component, args, world), world.device)
    return views, PairQuality(encoder, component)


def expand(images, extra):
    """The paper's comparison, naive expansion: generated or any other pictures as further training samples instead of views.
    extra: see load_extra. Their label is -1: the training looks at none."""
    in_memory = images.pixels is not None
    return images._replace(names=images.names + [f"extra/{i}" for i in range(len(extra))] if in_memory else images.names + extra,
                           labels=F.pad(images.labels, (0, len(extra)), value=-1),
                           pixels=torch.cat([images.pixels, extra]) if in_memory else None)


# ----------------------------------------------------------------------------------------------------------- the run

def train(args, world, make_method=METHODS.get):
    """Trains, evaluates, writes the run's folder. make_method: name of a method -> its class (args -> module with .query,
    .chance, update and a forward as MoCo's)."""
    args.output_dir = world.gather_objects(args.output_dir)[0]                      # its name may tell the time
    images, test = (genview.load_images(args.dataset, args.data_dir, split, args.image_size, args.limit, args.skip_bad)
                    for split in ("train", "test"))
    if len(images.names) < args.batch_size:
        raise Trouble(f"{len(images.names)} images do not fill one batch of {args.batch_size}: lower --batch-size")
    torch.manual_seed(args.seed)
    method = make_method(args.method)(args).to(world.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args, method)
    first, step = resume(args, method, optimizer, len(images.names), world) if args.resume else (0, 0)
    if len(set(world.gather_objects((first, step)))) > 1:
        raise Trouble(f"the processes do not find the same checkpoint: {args.output_dir} must be one folder for all machines")
    views, quality_of = prepare(args, images, world)
    pool, views = (expand(images, views), None) if args.views == "extra" else (images, views)
    loader = PairLoader(pool, views, augmentations(args), args.image_size, args.batch_size, args.seed, world, args.workers,
                        args.skip_bad)
    loader.steps = len(images.names) // args.batch_size                # as many with extra samples: the same work
    if world.size > 1 and world.device.type == "cuda":                           # PyTorch's is for GPUs only
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    if first == step == 0 and getattr(args, "start_batches", 0):
        with world.autocast():
            method.start(views[0] for _, views, _ in itertools.islice(loader.epoch(0), args.start_batches))
    if args.compile:
        compile_method(method)
    wrapped = method
    if world.size > 1:
        warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")    # its successor is only in newer versions
        wrapped = nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)
    run = Run(args, world, len(images.names), loader.steps, first, step)
    accuracy = None
    for epoch in range(first, args.epochs):
        train_epoch(args, world, epoch, step if epoch == first else 0, loader, wrapped, optimizer, quality_of, run)
        if args.knn_every and (epoch + 1 in (1, args.epochs) or (epoch + 1) % args.knn_every == 0):
            run.save(method, optimizer, epoch, loader.steps)                        # lest kNN cost what was trained
            run.stop_if_asked()
            accuracy = evaluate(method, images, test, args, world)
            run.log(epoch=epoch + 1, knn=accuracy, label=label(args))
        run.save(method, optimizer, epoch + 1)
        run.stop_if_asked()
    if accuracy is None and args.knn_every:        # resumed after its end
        accuracy = evaluate(method, images, test, args, world)
    genview.say(f"{run.folder}: last.pt, backbone.pt, log.jsonl, args.json, pairs.png")
    genview.say(f"kNN top-1 {accuracy:.1f}% ({label(args)})" if args.knn_every else f"no kNN ({label(args)})")


def train_epoch(args, world, epoch, start, loader, method, optimizer, quality_of, run):
    """One epoch from step start on."""
    if start == loader.steps:                      # resumed before its kNN
        return
    method.train()
    bar = genview.progress(loader.epoch(epoch, start), f"epoch {epoch + 1}/{args.epochs}", "batch", total=loader.steps,
                           initial=start)
    began, pending, bare = time.time(), [], getattr(method, "module", method)
    for step, (_, views, places) in enumerate(bar, start):
        views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        if epoch == step == 0:
            draw_pairs(run, *views[:2], places[:2], quality_of)
        done = epoch + step / loader.steps
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, args.warmup_epochs if group.get("constant_lr") else done)
        pending.append(train_step(method, optimizer, views, places, quality_of, args.gamma, done / args.epochs, world))
        last = step + 1 == loader.steps
        if (step + 1) % args.log_every == 0 or last:
            number = epoch * loader.steps + step + 1
            means = average(pending, number, optimizer, world, run)
            speed = (step + 1 - start) * args.batch_size / (time.time() - began)
            left = (args.epochs * loader.steps - number) * args.batch_size / speed
            run.log(epoch=round(number / loader.steps, 4), step=number, **means, chance=bare.chance, lr=learning_rate(args, done),
                    images_per_s=speed)
            bar.set_postfix_str(f"loss {means['loss']:.3f} (chance {bare.chance:.2f}), {speed:.0f} images/s", refresh=False)
            pending.clear()
            if not last and (run.asked_to_stop() or run.save_is_due()):
                run.save(bare, optimizer, epoch, step + 1)
                run.stop_if_asked()
    genview.say(f"epoch {epoch + 1}/{args.epochs}  loss {means.pop('loss'):.3f} (chance {bare.chance:.2f})  "
            + "".join(f"{name} {value:.3f}  " for name, value in means.items())
            + f"{speed:.0f} images/s  {duration(left)} left")


def average(pending, step, optimizer, world, run):
    """Means of the read-outs of the last steps over all processes; stops the run at the first loss that is not finite."""
    table = torch.stack([torch.stack(list(readouts.values())).float() for readouts in pending])      # (steps, read-outs)
    if world.size > 1:
        dist.all_reduce(table)
        table /= world.size
    bad = (~table[:, 0].isfinite()).nonzero()
    if len(bad):
        raise Trouble(run.not_finite("loss", step - len(pending) + 1 + bad[0].item(), optimizer))
    return dict(zip(pending[0], table.mean(0).tolist()))


def evaluate(method, train_images, test_images, args, world):
    """kNN on the backbone's features, which the training never saw the labels of."""
    dtype = torch.half if world.device.type == "cuda" else torch.float             # ImageNet's take 5 GB in half precision
    features = [extract_features(method.query.backbone, images, args.image_size, world, 512, args.workers, args.skip_bad, dtype)
                for images in (train_images, test_images)]
    return knn_accuracy(features[0], train_images.labels, features[1], test_images.labels,
                        num_classes=train_images.num_classes)


def label(args):
    name = NAMES[args.method]
    if args.views_dir == "none":
        name = f"plain {name}, no generated views"
    else:
        name += " + GenView's views" if args.views == "pair" else ", generated images as extra samples"
    return name + (" + quality weights" if args.quality != "off" else "")


class Run:
    """The run's folder, runs/<dataset>-<method>-<time>, and what is said to the user. Only the first process writes."""

    def __init__(self, args, world, images, steps, epoch, step):
        """The numbers of images, of steps in an epoch, of epochs and further steps that were done before."""
        self.args, self.world, self.first, self.images, self.steps = args, world, world.rank == 0, images, steps
        self.folder, self.saved, self.terminated = Path(args.output_dir), time.time(), False
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))         # what clusters send first
        if self.first:
            genview.sweep(self.folder, seconds=0)
            log = self.folder / "log.jsonl"        # lines after the checkpoint will be written again
            lines = log.read_text().splitlines(keepends=True) if log.exists() else []
            fits = lambda line: line["epoch"] <= epoch if "knn" in line else line["step"] <= epoch * steps + step
            kept = [line for line in lines if line.endswith("}\n") and fits(json.loads(line))]
            genview.write_whole(log, lambda path: path.write_text("".join(kept)))
            settings = vars(args) | {"label": label(args)}
            genview.write_whole(self.folder / "args.json", lambda path: path.write_text(json.dumps(settings, indent=1)))
            genview.say(f"{label(args)} on {args.dataset}, {steps} steps an epoch, {world.size} x {world.device.type}, "
                        f"{str(world.dtype).removeprefix('torch.')}")
            genview.say(textwrap.fill("  ".join(f"{key}={value}" for key, value in vars(args).items()), 120))

    def log(self, **values):
        if self.first:
            if "knn" in values:
                genview.say(f"epoch {values['epoch']}/{self.args.epochs}  kNN top-1 {values['knn']:.1f}%")
            genview.append(self.folder / "log.jsonl", json.dumps(values) + "\n")

    def not_finite(self, what, step, optimizer):
        checkpoint = self.folder / "last.pt"
        return (f"the {what} is not finite at step {step}, learning rate {optimizer.param_groups[0]['lr']:.3g}: lower --lr or "
                f"raise --temperature" + (f"; the last good checkpoint is {checkpoint}" if checkpoint.exists() else ""))

    def save_is_due(self):
        """Have --save-minutes passed? By the first process's clock."""
        return self.world.any(self.first and time.time() - self.saved > 60 * self.args.save_minutes)

    def asked_to_stop(self):
        """Has SIGTERM come to any process?"""
        return self.world.any(self.terminated)

    def stop_if_asked(self):
        """After a save."""
        if not self.asked_to_stop():
            return
        self.world.wait()                          # for the first process's write
        raise genview.Terminated(f"terminated after saving {self.folder / 'last.pt'}; the same command with --resume goes on")

    def save(self, method, optimizer, epoch, step=0):
        """Everything to go on after so many epochs and steps: last.pt; the one before stays as previous.pt."""
        if not all(x.isfinite().all() for x in method.state_dict().values()):         # queue and batch-norm statistics, too
            raise Trouble(self.not_finite("network", epoch * self.steps + step, optimizer))
        # Without SyncBatchNorm each process has batch-norm statistics of its own.
        statistics = self.world.gather_objects({name: x.cpu() for name, x in method.state_dict().items() if ".running_" in name})
        if self.first:
            backbone = {name: x.cpu() for name, x in method.query.backbone.state_dict().items()}       # loads anywhere
            state = {"model": method.state_dict(), "optimizer": optimizer.state_dict(), "epoch": epoch, "step": step,
                     "statistics": statistics, "images": self.images, "args": vars(self.args)}
            needed = sum(x.nbytes for part in (state["model"], *state["optimizer"]["state"].values()) for x in part.values()
                         if torch.is_tensor(x))
            genview.write_whole(self.folder / "backbone.pt", lambda path: torch.save(backbone, path), needed=needed)
            genview.write_whole(self.folder / "last.pt", lambda path: torch.save(state, path), self.folder / "previous.pt", needed)
        self.saved = time.time()


def resume(args, method, optimizer, images, world):
    """Loads --resume's checkpoint, or where it is damaged the one before, into method and optimizer; returns the numbers of
    epochs and of further steps done."""
    previous = Path(args.resume).with_name("previous.pt")
    try:
        state = genview.load_checkpoint(args.resume)
    except Trouble as trouble:
        if not previous.exists():
            raise
        genview.say(f"*** {str(trouble).split('; ')[0]}: going on from {previous}")
        state = genview.load_checkpoint(previous)
        if world.rank == 0 and Path(args.resume).exists():                          # lest the next save make it previous.pt
            os.replace(args.resume, Path(args.resume).with_name("damaged.pt"))
    free = {"output_dir", "resume", "device", "compile", "workers", "skip_bad", "knn_every", "log_every", "save_minutes"}
    now, then = vars(args), state.get("args", {}) if isinstance(state, dict) else {}
    for key in now.keys() - free:
        if key not in then or then[key] != now[key]:
            raise Trouble(f"{args.resume} is of a run with another --{key.replace('_', '-')} ({then.get(key)}, now "
                          f"{now[key]}): resume with the flags of that run")
    if state["images"] != images:
        raise Trouble(f"{args.resume} is of a run on {state['images']} images, here are {images}: the order would be another")
    statistics = state["statistics"]
    if len(statistics) == world.size:
        state["model"] |= statistics[world.rank]
    else:
        genview.say(f"*** {args.resume} is of a run of {len(statistics)} processes, here are {world.size}: the same batches, "
                    f"but not the same result to the last bit")
    method.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])
    return state["epoch"], state["step"]


def duration(seconds):
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


def draw_pairs(run, view1, view2, places, quality_of, columns=8, rows=3, cell=96):
    """pairs.png: pairs of the first batch from best to worst quality, scores beneath, the extremes framed (cf. Fig. 5)."""
    if not run.first:
        return
    with run.world.autocast():
        scores = torch.stack(quality_of(view1, view2, places)).T.cpu() if quality_of else None       # (N, 3)
    order = scores[:, 0].argsort(descending=True) if quality_of else torch.arange(len(view1))
    order = order[torch.linspace(0, len(order) - 1, min(columns * rows, len(order))).long()]
    width, height = 2 * cell + 12, cell + 24
    canvas = Image.new("RGB", (columns * width, rows * height), "white")
    draw = ImageDraw.Draw(canvas)
    for place, i in enumerate(order.tolist()):
        left, top = place % columns * width, place // columns * height
        for v, view in enumerate((view1, view2)):
            mean, std = (torch.tensor(values).view(3, 1, 1) for values in (genview.CLIP_MEAN, genview.CLIP_STD))
            x = view[i].float().cpu() * std + mean
            picture = Image.fromarray((x * 255).round().clamp(0, 255).byte().permute(1, 2, 0).contiguous().numpy())
            canvas.paste(picture.resize((cell, cell), Image.Resampling.NEAREST), (left + 4 + v * cell, top + 4))
        if quality_of:
            draw.text((left + 6, top + cell + 8), "q {:.2f} = {:.2f} - {:.2f}".format(*scores[i].tolist()), fill="black")
            if place in (0, len(order) - 1):
                draw.rectangle((left + 1, top + 1, left + 2 * cell + 6, top + cell + 6),
                               outline="green" if place == 0 else "red", width=3)
    genview.write_whole(run.folder / "pairs.png", lambda path: canvas.save(path, format="PNG"))


# -------------------------------------------------------------------------------------------------------- command line

def parse_args(presets=PRESETS, argv=None):
    """The flags, with the preset's values where a flag is not given, and everything that depends on others resolved."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=sorted({d for d, _ in presets}), default="cifar10")
    data.add_argument("--data-dir", help="data, or for folders the one with train/ and val/ or test/ (default: data)")
    data.add_argument("--limit", type=genview.at_least(1), help="use so many images of each split")
    data.add_argument("--skip-bad", action="store_true", help="leave out images that cannot be read")
    model = parser.add_argument_group("model")
    model.add_argument("--method", choices=sorted({m.removesuffix("-vit") for _, m in presets}), default=next(iter(presets))[1])
    view = parser.add_argument_group("GenView")
    view.add_argument("--views-dir", help="folder of generated views, or none (default: where generate_views.py puts them)")
    view.add_argument("--views", choices=["pair", "extra"], default="pair",
                      help="pair: a generated view in each pair; extra: the paper's comparison, further training samples "
                           "(--views-dir may then be any folder of pictures)")
    view.add_argument("--quality", choices=["exact", "cached", "off"],
                      help="weights by quality; cached: nearly the same, for nothing (default: exact with views, else off)")
    view.add_argument("--cached-components", type=genview.at_least(1), default=64, help="numbers kept of E's features")
    view.add_argument("--gamma", type=float, default=1.0, help="how strongly quality counts (release: 1)")
    view.add_argument("--encoder", default="openai/clip-vit-base-patch32", help="frozen encoder E: hub id, folder, or mini")
    view.add_argument("--component", help="its fitted component, foreground.npz or pca_vectors.npy (default: fit one)")
    view.add_argument("--flip-foreground", action="store_true", help="turn the component to the other side")
    view.add_argument("--noise", default="adaptive", help="shapes only, whose views are made here: adaptive or 0..999")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--output-dir", help="default: runs/<dataset>-<method>-<time>")
    runtime.add_argument("--resume", nargs="?", const="last", help="a last.pt; without PATH the one in --output-dir")
    runtime.add_argument("--seed", type=genview.at_least(0), default=0)
    runtime.add_argument("--device", help="cuda, mps or cpu (default: the first there is)")
    runtime.add_argument("--compile", action="store_true", help="torch.compile: minutes at the start, faster steps on GPUs")
    runtime.add_argument("--workers", type=genview.at_least(0), default=4, help="processes that read large images")
    runtime.add_argument("--save-minutes", type=float, default=15, help="a checkpoint so often, and after each epoch")
    runtime.add_argument("--log-every", type=genview.at_least(1), default=10, help="steps")
    recipe = parser.add_argument_group("recipe (default: the preset of --dataset and --method)")
    kinds = {name: type(value) for preset in presets.values() for name, value in preset.items()}
    for name, kind in kinds.items():
        least = 0 if name in ("warmup_epochs", "start_batches", "freeze_epochs", "small_crops", "knn_every") else 1
        recipe.add_argument(f"--{name.replace('_', '-')}", type=genview.at_least(least) if kind is int else kind,
                            choices=["sgd", "adamw", "lars"] if name == "optimizer" else None)
    args = parser.parse_args(argv)
    family = args.method + "-vit" * (args.arch or "").startswith("vit")           # vision transformers have their own recipe
    preset = presets.get((args.dataset, family)) or presets[args.dataset, args.method]
    for name in kinds:
        if getattr(args, name) is None:
            setattr(args, name, preset.get(name))
        elif name not in preset:
            raise Trouble(f"--{name.replace('_', '-')} is no setting of {args.method}")
    return resolve(args)


def resolve(args):
    """Fills in what depends on other flags; Trouble where they contradict each other."""
    args.data_dir = args.data_dir or genview.default_data_dir(args.dataset)
    if args.dataset == "shapes" and args.views_dir not in (None, "none"):
        raise Trouble("--dataset shapes makes its views itself: --views-dir can only be none")
    if args.views_dir is None:
        args.views_dir = genview.default_views_dir(args.dataset, args.data_dir)
        if args.dataset != "shapes" and not (Path(args.views_dir) / "manifest.jsonl").exists():
            genview.say(f"*** No generated views in {args.views_dir}: this is plain {NAMES[args.method]}, not GenView. They are made by\n"
                        f"***   python generate_views.py --dataset {args.dataset} --data-dir {args.data_dir}")
            args.views_dir = "none"
    if args.views == "extra" and args.views_dir == "none":
        raise Trouble("--views extra needs generated views: make them with generate_views.py, or name their --views-dir")
    if args.views == "extra" and args.quality == "cached":
        raise Trouble("--views extra has pairs of one image alone: --quality cached says nothing of them, take exact or off")
    args.quality = args.quality or ("off" if args.views_dir == "none" or args.views == "extra" else "exact")
    if args.noise != "adaptive" and not (args.dataset == "shapes" and args.noise.isdecimal() and int(args.noise) < 1000):
        raise Trouble(f"--noise is adaptive or a level from 0 to 999, and for --dataset shapes alone, not {args.noise}: "
                      f"elsewhere generate_views.py decides on it")
    for name, (least, most) in RANGES.items():
        value = getattr(args, name, None)
        if value is not None and not least <= value <= most:                        # nan is not, either
            raise Trouble(f"--{name.replace('_', '-')} {value:g} must be from {least:g} to {most:g}")
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise Trouble(f"--batch-size {args.batch_size} cannot be shared by {processes} processes: give a multiple")
    if args.batch_size < 2 * processes:
        raise Trouble(f"--batch-size {args.batch_size}: batch normalisation needs two images in each process")
    if getattr(args, "queue", None) and args.queue % args.batch_size:
        raise Trouble(f"--queue {args.queue} is no multiple of --batch-size {args.batch_size} (all processes together): "
                      f"take {args.queue // args.batch_size * args.batch_size or args.batch_size}")
    run = f"runs/{args.dataset}-{args.method}-{'plain' if args.views_dir == 'none' else 'genview'}"
    if args.resume == "last":
        candidates = [Path(args.output_dir, "last.pt")] if args.output_dir else Path().glob(f"{run}-*/last.pt")
        args.resume = str(max(candidates, key=lambda p: p.stat().st_mtime if p.exists() else 0, default=f"{run}-*/last.pt"))
        if args.output_dir and not any(Path(args.output_dir, name).exists() for name in ("last.pt", "previous.pt")):
            genview.say(f"nothing to go on from in {args.output_dir}: a new run")
            args.resume = None
    default = Path(args.resume).parent if args.resume else f"{run}-{time.strftime('%Y%m%d-%H%M%S')}"
    args.output_dir = str(args.output_dir or default)
    if not args.resume and any(Path(args.output_dir, name).exists() for name in ("last.pt", "previous.pt")):
        raise Trouble(f"{args.output_dir} holds a run already: go on with --resume, or name another --output-dir")
    return args


def main():
    args = parse_args()
    train(args, genview.setup(args.device))


if __name__ == "__main__":
    genview.run(main)
