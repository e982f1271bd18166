"""MoCo v2 and MoCo v3 with GenView: the models, the step and the whole training loop.

    python train_moco.py --dataset shapes                  # no download, any laptop: two minutes
    python train_moco.py --dataset cifar10                 # finds the views of generate_views.py
    torchrun --nproc_per_node=8 train_moco.py --dataset imagenet --data-dir /data/imagenet \\
        --views-dir /data/imagenet-views

Read train_step first: it is the method. To follow it, read also quality_loss.py and genview.py.

Legend of the shapes: N pairs of this process (n: of all), S side of a view, T positions and K
features of the frozen encoder's map, D size of an embedding, M keys in the queue.
"""
import copy
import itertools
import math
import sys
import warnings
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import update_bn

import genview
import recipes
import shapes
from eval_linear import knn_of
from generate_views import foreground_proportion, noise_level
from quality_loss import fit_foreground, info_nce, info_nce_in_batch, quality_weights
from support import runs
from support.augment import normalise
from support.data import spaced
from support.networks import LARS, make_backbone
from support.world import UserError, fast_dtype, say, script, setup, step_generator


# ------------------------------------------------------------------------------------------- models
def mlp(sizes, norm=False, last_norm=False):
    """Linear layers from sizes[0] to sizes[-1] features with ReLUs between them; norm: batch norm
    before each ReLU; last_norm: batch norm without scale and shift at the end."""
    layers = []
    for a, b in itertools.pairwise(sizes):
        layers.append(nn.Linear(a, b, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(b))
        layers.append(nn.ReLU())
    layers = layers[:-2] if norm else layers[:-1]                     # nothing after the last layer
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """A backbone and its projector: views (N, 3, S, S) -> embeddings (N, D)."""
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone, self.head = backbone, head

    def forward(self, views):
        return self.head(self.backbone(views))


class Momentum(nn.Module):
    """Shared by v2, v3, BYOL: a query encoder that learns and a key encoder, its moving average."""
    def __init__(self, args, head, zero_init_residual=True):
        """head: feature size of the backbone -> projector."""
        super().__init__()
        backbone, features = make_backbone(args.arch, args.image_size, zero_init_residual)
        self.query = Encoder(backbone, head(features))
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.momentum = args.momentum

    @torch.no_grad()
    def update(self, fraction):
        """theta_k <- m theta_k + (1 - m) theta_q, batch-norm statistics like weights; fraction: of
        the training done."""
        m = self.momentum_at(fraction)
        pairs = [(k, q) for k, q in zip(self.key.state_dict().values(),
                                        self.query.state_dict().values(), strict=True)
                 if k.is_floating_point()]
        keys, queries = map(list, zip(*pairs, strict=True))
        torch._foreach_lerp_(keys, queries, 1 - m)

    def momentum_at(self, fraction):
        return 1 - (1 - self.momentum) * (1 + math.cos(math.pi * fraction)) / 2   # a cosine up to 1

    def start(self, batches):
        """Sets batch norm's running statistics to their mean over a few batches. Otherwise the keys
        of the first 1 / (1 - m) steps are computed with wrong statistics: long enough to drive all
        embeddings to one side."""
        update_bn(batches, self.query)             # of the first view of each batch
        self.key.load_state_dict(self.query.state_dict())


class MoCoV2(Momentum):
    """MoCo v2 (Chen et al. 2020): negatives from a queue of the keys of the last batches.

    Batch norm leaks: within a batch, statistics shared by query and key give the positive away.
    MoCo shuffles keys between GPUs, which one device cannot do. Here keys are computed with running
    statistics, averaged by the same momentum as the weights (EMAN, Cai et al. 2021): nothing of the
    batch enters a key, on one device or on many, and it is faster.
    """
    def __init__(self, args):
        super().__init__(args, lambda features: mlp([features, features, args.dim]),
                         zero_init_residual=False)
        self.temperature = args.temperature
        self.register_buffer("queue", F.normalize(torch.randn(args.queue, args.dim)))  # (M, D)
        self.register_buffer("pointer", torch.zeros((), dtype=torch.long))
        self.chance = math.log(1 + args.queue)     # the loss of a guess among 1 + M keys

    def train(self, mode=True):
        super().train(mode)
        self.key.eval()                            # EMAN
        return self

    def momentum_at(self, fraction):
        return self.momentum

    def forward(self, views, weights, world):
        view1, view2 = views
        q = F.normalize(self.query(view1).float(), dim=1)                       # (N, D)
        with torch.no_grad():
            k = F.normalize(self.key(view2).float(), dim=1)                     # (N, D)
        negatives = self.queue.clone()             # enqueue changes it before the backward pass
        loss = info_nce(q, k, negatives, temperature=self.temperature, weights=weights)
        self.enqueue(world.gather(k))
        return loss, similarities(q, k, negatives)

    @torch.no_grad()
    def enqueue(self, keys):
        """The newest keys (of all processes) take the place of the oldest."""
        at = (self.pointer + torch.arange(len(keys), device=keys.device)) % len(self.queue)
        self.queue[at] = keys
        self.pointer.add_(len(keys)).remainder_(len(self.queue))


class MoCoV3(Momentum):
    """MoCo v3 (Chen et al. 2021): negatives from the batch, a predictor, both directions."""
    def __init__(self, args):
        vit = args.arch.startswith("vit")          # one layer more, and a norm after the predictor
        hidden = [args.hidden] * (2 if vit else 1)
        super().__init__(args, lambda features: mlp([features, *hidden, args.dim], norm=True,
                                                    last_norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True, last_norm=vit)
        self.temperature = args.temperature
        self.chance = 4 * args.temperature * math.log(args.batch_size)    # two directions, times 2t

    def forward(self, views, weights, world):
        q1, q2 = (F.normalize(self.predictor(self.query(v)).float()) for v in views)        # (N, D)
        with torch.no_grad():                                                         # (all N, D)
            k1, k2 = (world.gather(F.normalize(self.key(v).float())) for v in views)
        t, offset = self.temperature, world.rank * len(q1)      # where this process's keys begin
        # Both directions carry the same w. 2t, as in MoCo v3, keeps the gradient's size for any t.
        loss = 2 * t * (
            info_nce_in_batch(q1, k2, temperature=t, weights=weights, offset=offset)
            + info_nce_in_batch(q2, k1, temperature=t, weights=weights, offset=offset))
        return loss, similarities(q1, k2[offset:][:len(q1)], k2, positives=1)


METHODS = {"mocov2": MoCoV2, "mocov3": MoCoV3}
NAMES = dict(mocov2="MoCo v2", mocov3="MoCo v3", byol="BYOL", simsiam="SimSiam", swav="SwAV")


@torch.no_grad()
def similarities(q, k, negatives, positives=0):
    """Health read-outs: spread, and the mean cosine of positive pairs (should rise) and of others
    (should stay near 0). positives: how many of the negatives of a query are its own positive."""
    pos, all_pairs = (q * k).sum(1).mean(), (q.mean(0) * negatives.mean(0)).sum()
    neg = (len(negatives) * all_pairs - positives * pos) / (len(negatives) - positives)
    return {"pos": pos, "neg": neg, "std": spread(q)}


def spread(z):
    """Spread of unit embeddings (N, D): std times sqrt(D); 1: they point everywhere, 0: one way."""
    return z.std(0).mean() * z.shape[1] ** 0.5


# ----------------------------------------------------------------------------------------- the step
def train_step(method, optimizer, views, quality_of, gamma, fraction, world):
    """One step of GenView.

    Args:
        method: MoCoV2 or another, or its DistributedDataParallel wrapper.
        views: P_1, P_2 (SwAV: more), each (N, 3, S, S).
        quality_of: P_1, P_2 -> q, s^f, s^b of each pair, or None: equal weights.
        fraction: share of the training that is done, 0 to 1.
    Returns:
        The loss and the read-outs, {name: scalar on the device}.
    """
    with world.autocast():
        weights = None
        if quality_of is not None:
            quality, s_f, s_b = quality_of(*views[:2])        # q_i = s_i^f - s_i^b          (N,)
            weights = quality_weights(quality, gamma, world.group)  # w_i = n exp(gamma q_i) / sum
        getattr(method, "module", method).update(fraction)    # theta_k <- m theta_k + (1-m) theta_q
        loss, readouts = method(views, weights, world)        # L = (1/n) sum_i w_i l_i
    optimizer.zero_grad()
    world.scaler.scale(loss).backward()    # float16 alone: gradients of a larger loss do not vanish
    world.scaler.step(optimizer)           # divides them again; no step where one is not finite
    world.scaler.update()
    if weights is not None:    # ess: effective sample size over N: 1 if all weights are equal
        readouts |= {"ess": weights.sum() ** 2 / weights.square().sum() / len(weights),
                     "s_f": s_f.mean(), "s_b": s_b.mean()}
    return {"loss": loss.detach(), **readouts}


OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW,
              "lars": LARS}


def make_optimizer(args, method):
    """The recipe's. method.constant_lr: modules kept at the peak rate (SimSiam's predictor)."""
    constant = {p for module in getattr(method, "constant_lr", []) for p in module.parameters()}
    learning = [p for p in method.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learning if p not in constant]},
              {"params": [p for p in learning if p in constant], "constant_lr": True}]
    groups = [group for group in groups if group["params"]]
    return OPTIMIZERS[args.optimizer](groups, lr=0.0, weight_decay=args.weight_decay)


def learning_rate(args, epoch):
    """Linear warm-up, then cosine; epoch may be fractional. Peak and end grow with the batch."""
    peak, end = (lr * args.batch_size / 256 for lr in (args.lr, args.final_lr or 0))
    if epoch < args.warmup_epochs:
        return peak * epoch / args.warmup_epochs
    rest = max(args.epochs - args.warmup_epochs, 1)
    return end + (peak - end) * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup_epochs) / rest))


def set_learning_rate(optimizer, args, epoch):
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(args, args.warmup_epochs if "constant_lr" in group else epoch)


# ----------------------------------------------------------------------------------------- the loop
def train(args, world, methods=METHODS):
    """Trains, evaluates, writes the run's folder. methods: {name: class}; class(args) is a module
    with .query, .chance, update(fraction) and forward(views, weights, world)."""
    run = runs.Run(args, world, label(args))
    images, test = (genview.load_images(args.dataset, args.data_dir, split, args.image_size,
                                        args.limit, args.skip_bad)
                    if split == "train" or args.knn_every else None for split in ("train", "test"))
    if test and not images.num_classes:
        raise UserError(f"{args.data_dir} has no class folders in train/, which kNN needs: add "
                        f"--knn-every 0")
    runs.limit_queue(args, len(images.names))
    torch.manual_seed(args.seed)
    method = methods[args.method](args).to(world.device, memory_format=torch.channels_last)
    optimizer = make_optimizer(args, method)
    run.resume(method, optimizer, len(images.names), images.source)
    loader, quality_of = prepare(args, images, world)
    known = runs.for_knn(args, images, test) if test else None
    trained = distribute(method, loader, args, world, fresh=run.epoch == run.step == 0)
    run.begin(loader.steps, method.chance)
    if quality_of:
        run.keep(component=quality_of.component * (-1 if args.flip_foreground else 1))
    for epoch in range(run.epoch, args.epochs):
        train_epoch(epoch, loader, trained, optimizer, quality_of, run)
        run.save(epoch, loader.steps)              # first: a crash in kNN must not lose the epoch
        if args.knn_every and ((epoch + 1) % args.knn_every == 0 or epoch + 1 == args.epochs):
            accuracy = knn_of(method.query.backbone, *known, args.image_size, world, args.workers,
                              args.skip_bad)
            run.log_knn(epoch + 1, accuracy, len(known[0].names))
    say(f"{run.folder}: last.pt, backbone.pt, log.jsonl, args.json, pairs.png")
    score = f"kNN top-1 {accuracy:.1f}%" if args.knn_every else "no kNN"
    say(f"{score} ({run.label})")


def train_epoch(epoch, loader, method, optimizer, quality_of, run):
    """One epoch, from where the run goes on."""
    args = run.args
    method.train()
    for step, views in run.batches(epoch, loader):
        if epoch == step == 0:
            run.draw_pairs(views[:2], quality_of)
        done = epoch + step / loader.steps
        set_learning_rate(optimizer, args, done)
        readouts = train_step(method, optimizer, views, quality_of, args.gamma, done / args.epochs,
                              run.world)
        run.after_step(epoch, step, readouts)


def distribute(method, loader, args, world, fresh):
    """Batch norm's initial statistics, torch.compile, and the wrapper for several processes."""
    if world.size > 1 and world.device.type == "cuda":                # SyncBatchNorm needs GPUs
        method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
    if fresh and args.start_batches:
        with world.autocast():
            method.start(itertools.islice(loader.epoch(0), args.start_batches))
    if args.compile:               # the networks alone: the loss and the queue are cheap
        for network in method.children():
            network.compile()
    if world.size == 1:
        return method
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")    # old versions need it
    return nn.parallel.DistributedDataParallel(method, broadcast_buffers=False)


# --------------------------------------------------------------------------------- what to train on
def prepare(args, images, world):
    """The pairs to train on: PairLoader and quality_of (or None), see train_step."""
    views = encoder = component = None
    if args.dataset == "shapes" and (args.views_dir != "none" or args.quality != "off"):
        # Its encoder stands for CLIP, its perturbed scenes for Stable unCLIP's images.
        encoder = shapes.train_encoder(amp=fast_dtype(torch.device("cpu")) == torch.bfloat16)
        views, component = shapes_views(encoder, args, len(images.names))
        views = None if args.views_dir == "none" else views
    elif args.dataset != "shapes":
        load = genview.load_extra if args.views == "extra" else genview.load_views
        views = load(args, images)
        encoder = genview.FrozenEncoder(args.encoder) if args.quality != "off" else None
    quality_of = None
    if args.quality != "off":
        encoder = encoder.to(world.device, memory_format=torch.channels_last)
        if component is None:
            component = genview.find_component(encoder, images, args, world)
        component = -component if args.flip_foreground else component
        quality_of = genview.PairQuality(encoder, component.to(world.device))
        if args.compile:
            encoder.compile()
    pool = images
    if args.views == "extra":
        pool, views = genview.expand(images, views), None
    if len(images.names) < args.batch_size:
        raise UserError(f"{len(images.names)} images do not fill one batch of {args.batch_size}: "
                        f"lower --batch-size")
    loader = genview.PairLoader(pool, views, genview.augmentations(args), args.image_size,
                                args.batch_size, args.seed, world, args.workers, args.skip_bad)
    loader.steps = len(images.names) // args.batch_size      # extra samples add no steps
    return loader, quality_of


def shapes_views(encoder, args, count):
    """Adaptive view generation in the world of shapes: tokens -> foreground proportion -> noise
    level -> perturbed scene. Returns views of count images (count, 3, 32, 32) uint8, and v1."""
    scenes = shapes.split("train")
    with torch.no_grad():
        pictures = shapes.render(scenes).split(512)
        tokens = torch.cat([encoder(normalise(x / 255)) for x in pictures])             # (N, 64, K)
    component, threshold = fit_foreground(tokens, (8, 8))
    adaptive = noise_level(foreground_proportion(tokens, component, threshold))           # (N,)
    level = adaptive if args.noise == "adaptive" else args.noise
    views = shapes.render(shapes.perturb(scenes, level, step_generator(args.seed)))
    return views[spaced(len(views), count)], component


# ------------------------------------------------------------------------------------- command line
def parse_args(methods=METHODS, description=None, argv=None):
    """The flags, with the recipe's values where a flag is not given; UserError where they
    contradict each other."""
    args = runs.parser_of(description or __doc__.split("\n")[0], genview.DATA_DIRS, methods,
                          recipes.FLAGS).parse_args(argv)
    key = args.dataset, args.method, args.arch, args.epochs, args.batch_size
    if vars(args).pop("print_recipe"):
        say("\n".join("{:16}{!s:18}{}".format(*row) for row in recipes.table(*key)))
        sys.exit()
    runs.apply_recipe(args, recipes.training(*key), recipes.FLAGS)
    args.data_dir = genview.data_dir_of(args.dataset, args.data_dir)
    if args.dataset == "shapes" and args.views_dir not in (None, "none"):
        raise UserError("--dataset shapes makes its views itself: --views-dir can only be none")
    if args.views_dir is None:
        args.views_dir = genview.default_views_dir(args.dataset, args.data_dir)
        if args.dataset != "shapes" and not Path(args.views_dir, "manifest.jsonl").exists():
            say(f"*** No generated views in {args.views_dir}: this is plain {NAMES[args.method]}, "
                f"not GenView. They are made by\n***   python generate_views.py "
                f"--dataset {args.dataset} --data-dir {args.data_dir}")
            args.views_dir = "none"
    if args.views == "extra" and args.views_dir == "none":
        raise UserError("--views extra needs images: name any folder of them by --views-dir, or "
                        "make views with generate_views.py")
    with_views = args.views_dir != "none" and args.views == "pair"
    args.quality = args.quality or ("exact" if with_views else "off")     # exact: of these views
    args.encoder = args.encoder or ("mini" if args.image_size <= 32 else "clip")
    if args.noise != "adaptive" and args.dataset != "shapes":
        raise UserError("--noise is for --dataset shapes; for other data generate_views.py sets it")
    runs.resolve_batch(args)
    kind = "genview" if with_views else "plain" if args.views == "pair" else "extra"
    runs.resolve_folder(args, f"{args.dataset}-{args.method}-{kind}")
    return args


def label(args):
    """What a run is, in words."""
    name, pair = NAMES[args.method], args.views == "pair"
    if args.views_dir == "none":
        name = f"plain {name}, no generated views"
    else:
        name += " + GenView's views" if pair else ", extra images as samples"
    return name + (" + quality weights" if args.quality != "off" else "")


def main():
    args = parse_args()
    train(args, setup(args.device, precision=args.precision))


if __name__ == "__main__":
    script(main)
