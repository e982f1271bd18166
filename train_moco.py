"""MoCo v2 and MoCo v3 with GenView: the models, the step and the whole training loop.

    python train_moco.py --dataset shapes                  # no download, any laptop: two minutes
    python train_moco.py --dataset cifar10                 # makes the missing views first, minutes
    torchrun --nproc_per_node=8 train_moco.py --dataset imagenet --data-dir /data/imagenet \\
        --views-dir /data/imagenet-views

One step, from the images to the queue; read train_step first, it is the method:

    PairLoader.epoch      P_1 = t1(X), P_2 = t2(X^+): crops, colours, one view generated  genview
    train_step            all of the following                                          here
      PairQuality         F_1, F_2 of the frozen E, then                                genview
        pair_quality      M^f, M^b -> z^f, z^b -> s^f, s^b -> q = s^f - s^b             quality_loss
      quality_weights     w_i = n exp(gamma q_i) / sum_j exp(gamma q_j)                 quality_loss
      method.update       theta_k <- m theta_k + (1 - m) theta_q                        here
      method.forward      q = f(P_1), k = f_k(P_2), then                                here
        info_nce          L = (1/n) sum_i w_i l_i                                       quality_loss
        queue             the newest keys in front, the oldest fall out                 here
      backward, step      the optimiser                                                 here

Legend of the shapes: N pairs of this process (all N: of all processes, n in the equations), S side
of a view, T positions and K features of the frozen encoder's map, D size of an embedding, M keys in
the queue.
"""
import argparse
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
from generate_views import default_model, foreground_proportion, make_missing, noise_level
from quality_loss import fit_foreground, info_nce, info_nce_in_batch, quality_weights
from support import runs
from support.augment import normalise
from support.checkpoint import digest
from support.command_line import Parser, UserError, either, real, say, script, whole
from support.data import check_classes, spaced
from support.files import claimed, digest_of_file, write_array
from support.networks import LARS, VITS, make_backbone
from support.processes import fast_dtype, setup
from support.schedules import cosine, linear_warmup, scaled_rate
from support.seeds import step_generator


# ------------------------------------------------------------------------------------------- models
def mlp(sizes, norm=False, last_norm=False):
    """Linear layers from sizes[0] to sizes[-1] features with ReLUs between them; norm: batch norm
    before each ReLU; last_norm: batch norm without scale and shift at the end."""
    layers = []
    *hidden, last = itertools.pairwise(sizes)
    for a, b in hidden:
        layers.append(nn.Linear(a, b, bias=not norm))
        if norm:
            layers.append(nn.BatchNorm1d(b))
        layers.append(nn.ReLU())
    layers.append(nn.Linear(*last, bias=not norm))
    if last_norm:
        layers.append(nn.BatchNorm1d(sizes[-1], affine=False))
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """A backbone and its projector: views (N, 3, S, S) -> embeddings (N, D)."""
    def __init__(self, backbone, head):
        super().__init__()
        self.backbone = backbone
        self.head = head

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
        keys = [x for x in self.key.state_dict().values() if x.is_floating_point()]
        queries = [x for x in self.query.state_dict().values() if x.is_floating_point()]
        torch._foreach_lerp_(keys, queries, 1 - self.momentum_at(fraction))

    def momentum_at(self, fraction):
        return 1 - (1 - self.momentum) * cosine(fraction)                     # a cosine up to 1

    def init_batch_norm(self, batches):
        """Sets batch norm's running statistics to their mean over a few batches. Otherwise the keys
        of the first 1 / (1 - m) steps are computed with wrong statistics: long enough to drive all
        embeddings to one side."""
        update_bn(batches, self.query)             # it takes view 1, the first of each batch
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
        self.chance = math.log(1 + args.queue)     # the loss of a guess among 1 + M keys

    def train(self, mode=True):
        super().train(mode)
        self.key.eval()                            # EMAN
        return self

    def momentum_at(self, fraction):
        return self.momentum

    def forward(self, views, weights, world):
        view1, view2 = views
        q = unit(self.query(view1))                                             # (N, D)
        with torch.no_grad():
            k = unit(self.key(view2))                                           # (N, D)
        negatives = self.queue
        loss = info_nce(q, k, negatives, temperature=self.temperature, weights=weights)
        # The newest keys (of all processes) in front; as many of the oldest fall out. A new tensor:
        # the backward pass needs the old one.
        keys = world.gather(k)
        self.queue = torch.cat([keys, negatives[:-len(keys)]])
        return loss, health(q, k, negatives, embeddings=q)


class MoCoV3(Momentum):
    """MoCo v3 (Chen et al. 2021): negatives from the batch, a predictor, both directions."""
    def __init__(self, args):
        vit = args.arch in VITS                    # one layer more, and a norm after the predictor
        hidden = [args.hidden] * (2 if vit else 1)
        super().__init__(args, lambda features: mlp([features, *hidden, args.dim], norm=True,
                                                    last_norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True, last_norm=vit)
        self.temperature = args.temperature
        self.chance = 4 * args.temperature * math.log(args.batch_size)    # two directions, times 2t

    def forward(self, views, weights, world):
        view1, view2 = views
        q1 = unit(self.predictor(self.query(view1)))                                     # (N, D)
        q2 = unit(self.predictor(self.query(view2)))
        with torch.no_grad():
            k1 = world.gather(unit(self.key(view1)))                                 # (all N, D)
            k2 = world.gather(unit(self.key(view2)))
        t = self.temperature
        offset = world.rank * len(q1)              # where this process's keys begin
        # Both directions carry the same w. 2t, as in MoCo v3, keeps the gradient's size for any t.
        loss = 2 * t * (
            info_nce_in_batch(q1, k2, temperature=t, weights=weights, offset=offset)
            + info_nce_in_batch(q2, k1, temperature=t, weights=weights, offset=offset))
        own_keys = k2[offset:offset + len(q1)]
        return loss, health(q1, own_keys, k2, embeddings=q1, positives=1)


METHODS = {"mocov2": MoCoV2, "mocov3": MoCoV3}
METHOD_NAMES = dict(mocov2="MoCo v2", mocov3="MoCo v3", byol="BYOL", simsiam="SimSiam", swav="SwAV")


def unit(z):
    """Embeddings (N, D) at length 1, in float32."""
    return F.normalize(z.float(), dim=1)


@torch.no_grad()
def health(q, k, keys, embeddings, positives=0):
    """Health read-outs of unit embeddings.

    Args:
        q, k: the two of each pair, (N, D); pos, their mean cosine, should rise.
        keys: all that q is compared with; neg, the mean cosine with those of other pairs, should
            stay near 0.
        embeddings: of one view, (N, D); std, their spread, is 1 where they point everywhere and 0
            after a collapse.
        positives: how many of the keys are of the query's own pair.
    """
    pos = (q * k).sum(1).mean()
    all_pairs = (q.mean(0) * keys.mean(0)).sum()               # mean cosine of all queries and keys
    neg = (len(keys) * all_pairs - positives * pos) / (len(keys) - positives)
    std = embeddings.std(0).mean() * embeddings.shape[1] ** 0.5
    return {"pos": pos, "neg": neg, "std": std}


# ----------------------------------------------------------------------------------------- the step
def train_step(method, optimizer, views, quality_of, gamma, fraction, world):
    """One step of GenView.

    Args:
        method: MoCoV2 or another, or its DistributedDataParallel wrapper.
        views: P_1, P_2 (SwAV: more), each (N, 3, S, S).
        quality_of: P_1, P_2 -> q, s^f, s^b of each pair, or None: equal weights.
        fraction: of the training that is done, 0 to 1.
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


KNN_QUERIES = 10_000    # test images that kNN labels while training, at most
OPTIMIZERS = {"sgd": partial(torch.optim.SGD, momentum=0.9), "adamw": torch.optim.AdamW,
              "lars": LARS}


def make_optimizer(method, name, weight_decay):
    """name: a key of OPTIMIZERS."""
    constant = set()
    for module in getattr(method, "constant_lr", []):
        constant |= set(module.parameters())
    learning = [p for p in method.parameters() if p.requires_grad]
    groups = [{"params": [p for p in learning if p not in constant]}]
    if constant:
        groups.append({"params": [p for p in learning if p in constant], "constant_lr": True})
    return OPTIMIZERS[name](groups, lr=0.0, weight_decay=weight_decay)


def learning_rate(epoch, epochs, warmup, peak, end=0.0):
    """Linear warm-up to the peak, then a cosine down to the end; epoch may be fractional."""
    if epoch < warmup:
        return linear_warmup(peak, epoch, warmup)
    return end + (peak - end) * cosine(epoch - warmup, epochs - warmup)


# ----------------------------------------------------------------------------------------- the loop
def train(args, world, methods=METHODS):
    """Trains, evaluates, writes the run's folder, which is claimed before the work.

    methods: {name: class}; class(args) is a module with .query, .chance, update(fraction) and
    forward(views, weights, world); it may have .constant_lr, modules that stay at the peak rate.
    A new one also needs a row in recipes.py and a name in METHOD_NAMES.
    """
    with claimed(args.output_dir, world):
        images, test = load_data(args)
        args = limit_queue(args, len(images.names))
        check_schedule(args)
        torch.manual_seed(args.seed)
        method = methods[args.method](args).to(world.device, memory_format=torch.channels_last)
        optimizer = make_optimizer(method, args.optimizer, args.weight_decay)
        run = runs.Run(args, world, method, optimizer, images)
        run.resume()
        encoder = load_encoder(args)       # an unusable one is refused before views are made
        generated, component = prepare_generated(args, images, world, encoder)
        quality_of = None
        if args.quality != "off":
            encoder.to(world.device, memory_format=torch.channels_last)
            component = find_component(args, images, world, encoder, component)
            quality_of = make_quality(args, encoder, component, world)
        loader = make_loader(args, images, generated.pictures, world)
        trained = make_ready(method, loader, args, world, fresh=run.is_new)
        left_out = images.left_out + (test.left_out if test else 0)
        run.begin(loader.steps, label(args, generated.coverage, left_out),
                  identity_of_loaded(args, generated, encoder), generated.content)
        if quality_of and run.main:
            write_array(run.folder / "component.npy", component)
        accuracy = None
        for epoch in range(run.start_epoch, args.epochs):
            train_epoch(epoch, loader, trained, optimizer, quality_of, run)
            last = epoch + 1 == args.epochs
            if args.knn_every and ((epoch + 1) % args.knn_every == 0 or last):
                accuracy = evaluate_knn(images, test, run)
        run.end()
        say(f"{run.folder}: last.pt, backbone.pt, log.jsonl, args.json, pairs.png")
        score = "no kNN" if accuracy is None else f"kNN top-1 {accuracy:.1f}%"
        say(f"{score} ({run.label})")


def train_epoch(epoch, loader, method, optimizer, quality_of, run):
    """One epoch, from where the run goes on."""
    args = run.args
    peak_rate = scaled_rate(args.lr, args.batch_size)
    end_rate = scaled_rate(args.final_lr or 0, args.batch_size)
    method.train()
    start = run.begin_epoch(epoch)
    for step, views in enumerate(loader.epoch(epoch, start), start):
        if epoch == step == 0 and run.main:
            genview.draw_pairs(run.folder / "pairs.png", views[:2], quality_of, run.world)
        epochs_done = epoch + step / loader.steps
        rate = learning_rate(epochs_done, args.epochs, args.warmup_epochs, peak_rate, end_rate)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate if "constant_lr" in group else rate
        readouts = train_step(method, optimizer, views, quality_of, args.gamma,
                              epochs_done / args.epochs, run.world)
        run.after_step(step, readouts)             # logs, saves, stops
    run.end_epoch()                                # saves before kNN: a crash there loses nothing


def evaluate_knn(images, test, run):
    """kNN accuracy in percent while training."""
    args = run.args
    images = knn_images(images, args.knn_images)
    accuracy = knn_of(run.method.query.backbone, images, test.at_most(KNN_QUERIES),
                      args.image_size, run.world, args.workers)
    run.log_knn(accuracy, len(images.names))
    return accuracy


def knn_images(images, count=None):
    """The training images that kNN looks at while training: so many, else a tenth of large images,
    but at least 10,000, or all small ones."""
    n = len(images.names)
    if not count:
        count = max(n // 10, 10_000) if images.pixels is None else n
    return images.at_most(count)


def make_ready(method, loader, args, world, fresh):
    """Batch norm's initial statistics, torch.compile, and the wrapper for several processes."""
    method = world.synchronised(method)
    if fresh and args.start_batches:
        with world.autocast():
            method.init_batch_norm(itertools.islice(loader.epoch(0), args.start_batches))
    if args.compile:               # the networks alone: the loss and the queue are cheap
        for network in method.children():
            network.compile()
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated")    # old versions need it
    return world.distributed(method, broadcast_buffers=False)


# --------------------------------------------------------------------------------- what to train on
def load_data(args):
    """Training and test images; no test images (None) where there is no kNN."""
    def load(split):
        return genview.load_images(args.dataset, args.data_dir, split, args.image_size, args.limit,
                                   args.skip_bad, args.workers)
    images = load("train")
    if len(images.names) < args.batch_size:
        raise UserError(f"{len(images.names)} images do not fill one batch of {args.batch_size}: "
                        f"lower --batch-size")
    if not args.knn_every:
        return images, None
    test = load("test")
    check_classes(images, args.data_dir, ", kNN needs two: add --knn-every 0")
    return images, test


def limit_queue(args, count):
    """Returns the flags; with --dataset folder the queue of ImageNet's recipe is cut to a tenth of
    the images. Warns about any other queue that is larger."""
    for_all_shapes = args.dataset == "shapes" and not args.limit   # its recipe is for all of them
    tolerated = math.ceil(count / 10 / args.batch_size) * args.batch_size
    if not args.queue or for_all_shapes or args.queue <= tolerated:
        return args
    most = max(count // 10 // args.batch_size, 1) * args.batch_size
    usual = recipes.training(args.dataset, args.method, args.arch, args.epochs, args.batch_size)
    if args.dataset == "folder" and args.queue == usual.get("queue"):
        say(f"--queue {most}: at most a tenth of the {count} images")
        return argparse.Namespace(**vars(args) | {"queue": most})
    say(f"*** --queue {args.queue} for {count} images: it holds older features of the same images; "
        f"use --queue {most}")
    return args


def check_schedule(args):
    """Warns where a part of the schedule is longer than the training."""
    if args.warmup_epochs >= args.epochs:
        say(f"*** --epochs {args.epochs} ends within the warm-up (--warmup-epochs "
            f"{args.warmup_epochs}): the rate rises to the end")
    if args.freeze_epochs and args.freeze_epochs >= args.epochs:
        say(f"*** --freeze-epochs {args.freeze_epochs}: in {args.epochs} epochs the prototypes "
            f"never learn")
    if args.queue and args.queue_after and args.queue_after >= args.epochs:
        say(f"*** --queue-after {args.queue_after}: in {args.epochs} epochs the queue is never "
            f"used")


def load_encoder(args):
    """The frozen encoder E, or None where nothing needs it. That of shapes stands for CLIP: it also
    decides on the noise of the views."""
    if args.quality == "off" and (args.dataset != "shapes" or args.views_dir == "none"):
        return None
    if args.dataset == "shapes":
        return shapes.train_encoder(amp=fast_dtype(torch.device("cpu")) == torch.bfloat16)
    return genview.FrozenEncoder(args.encoder)


def prepare_generated(args, images, world, encoder):
    """Returns Generated, empty for plain pairs; and v1, for shapes alone, on which the noise of its
    views depends."""
    if args.dataset == "shapes" and encoder:
        views, component = shapes_views(encoder, args.noise, args.seed, len(images.names))
        if args.views_dir == "none":               # the quality of plain pairs
            views = None
        return genview.Generated(views), component
    return generated_from_disk(args, images, world), None


def generated_from_disk(args, images, world):
    """Generated, see prepare_generated. Makes the views that are missing, where this run is to."""
    if args.views_dir == "none":
        return genview.Generated()
    if args.views_dir == "auto":
        make_missing(args.dataset, args.data_dir, args.limit, images, world)
        views_dir = genview.default_views_dir(args.dataset, args.data_dir)
    else:
        views_dir = args.views_dir
    if args.views == "extra":
        return genview.load_extra(images, views_dir, args.dataset, args.skip_bad, args.workers)
    return genview.load_generated(images, views_dir, args.dataset, args.skip_bad, args.workers)


def shapes_views(encoder, noise, seed, count):
    """Adaptive view generation in the world of shapes: tokens -> foreground proportion -> noise
    level -> perturbed scene, which stands for Stable unCLIP's image. noise: "adaptive" or a level.
    Returns views of count images (count, 3, 32, 32) uint8, and v1."""
    scenes = shapes.split("train")
    with torch.no_grad():
        pictures = shapes.render(scenes).split(512)
        tokens = torch.cat([encoder(normalise(x / 255)) for x in pictures])             # (N, 64, K)
    component, threshold = fit_foreground(tokens, (8, 8))
    adaptive = noise_level(foreground_proportion(tokens, component, threshold))           # (N,)
    level = adaptive if noise == "adaptive" else noise
    views = shapes.render(shapes.perturb(scenes, level, step_generator(seed)))
    return views[spaced(len(views), count)], component


def find_component(args, images, world, encoder, component):
    """v1 of the encoder's features, before --flip-foreground. component: v1 where it is known; else
    a resumed run has it in a file, or it is that of --component, or fitted."""
    if component is not None:
        return component
    kept = Path(args.resume).with_name("component.npy") if args.resume else None
    return genview.component_of_encoder(encoder, images, args.image_size, world, args.component,
                                        kept, args.workers)


def make_quality(args, encoder, component, world):
    """quality_of, see train_step."""
    if args.compile:
        encoder.compile()
    component = -component if args.flip_foreground else component
    return genview.PairQuality(encoder, component.to(world.device))


def identity_of_loaded(args, generated, encoder):
    """What tells these views and this encoder from others, {name: value}: their content, as flags
    can spell one folder in several ways."""
    if args.dataset == "shapes" or not encoder:    # that of shapes is trained at each start
        return generated.identity
    return generated.identity | {
        "weights of --encoder": f"{digest(encoder)}, pictures of {encoder.size} pixels",
        "content of --component": digest_of_file(args.component)}


def make_loader(args, images, generated, world):
    """The pairs to train on. generated: Generated.pictures."""
    steps = len(images.names) // args.batch_size   # extra samples add no steps
    if args.views == "extra":
        images = genview.expand(images, generated)
        generated = None
    return genview.PairLoader(
        images, generated, genview.augmentations(args), args.image_size, args.batch_size,
        args.seed, world, args.workers, steps)


# ------------------------------------------------------------------------------------- command line
def make_parser(methods, description):
    """The flags of the training scripts."""
    parser = Parser(description)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=sorted(genview.DATA_DIRS), default="cifar10", help="picks the recipe")
    add("--data-dir", help="where the data lies; for folders the one with train/ and val/ or test/")
    add("--limit", type=whole(1), help="use so many images of each split")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add = parser.add_argument_group("GenView").add_argument
    add("--method", choices=sorted(methods), default=next(iter(methods)), help="picks the recipe")
    add("--views-dir", default="auto",
        help="folder of generated views, or none; auto: where generate_views.py puts them; for "
             "CIFAR those that are missing there are made first")
    add("--views", choices=["pair", "extra"], default="pair",
        help="pair: a generated view in each pair; extra: the paper's comparison, the images of "
             "--views-dir (any folder) as further training samples")
    add("--quality", choices=["exact", "off"],
        help="weights by quality, computed from the views of each step; default: exact with "
             "generated views, else off")
    add("--gamma", type=real(-1e3, 1e3), default=1.0, help="how much quality counts (release: 1)")
    add("--encoder", help="frozen encoder E: mini (weights/), clip, release (the authors', by "
                          "timm), a hub id or a folder; default: mini for 32 pixels, else clip")
    add("--component", help="its component, foreground.npz or pca_vectors.npy; default: fit one")
    add("--flip-foreground", action="store_true", help="turn the component to the other side")
    add("--noise", type=either("adaptive", whole(0, 999)), default="adaptive",
        help="shapes only (views made here): adaptive or 0..999")
    runs.add_runtime_flags(parser)
    recipes.add_flags(parser)
    return parser


def parse_args(methods=METHODS, description=None, argv=None):
    """The flags, with the recipe's values where a flag is not given; UserError where they
    contradict each other."""
    args = make_parser(methods, description or __doc__.split("\n")[0]).parse_args(argv)
    key = args.dataset, args.method, args.arch, args.epochs, args.batch_size
    if vars(args).pop("print_recipe"):
        say("\n".join("{:16}{!s:18}{}".format(*row) for row in recipes.table(*key)))
        sys.exit()
    recipes.apply(args, recipes.training(*key), f"{args.method} with --dataset {args.dataset}")
    args.data_dir = genview.data_dir_of(args.dataset, args.data_dir)
    resolve_views(args)
    with_views = args.views_dir != "none" and args.views == "pair"
    args.quality = args.quality or ("exact" if with_views else "off")
    if args.dataset != "shapes":
        args.encoder = args.encoder or ("mini" if args.image_size <= 32 else "clip")
    runs.check_batch(args.batch_size)
    if args.queue and args.queue % args.batch_size:
        fits = max(1, args.queue // args.batch_size) * args.batch_size
        raise UserError(f"--queue {args.queue} is no multiple of --batch-size {args.batch_size} "
                        f"(all processes together): take {fits}")
    kind = "genview" if with_views else "plain"
    if args.views == "extra":
        kind = "extra"
    name = f"{args.dataset}-{args.method}-{kind}"
    args.output_dir, args.resume = runs.choose_folder(args.output_dir, args.resume, name)
    return args


def resolve_views(args):
    """UserError where the flags about views do not fit. --views-dir auto stays where this run makes
    views: all in the world of shapes, of CIFAR those that are missing. Else it becomes the folder
    where they are, or none."""
    if args.dataset == "shapes" and args.views_dir not in ("auto", "none"):
        raise UserError("--dataset shapes makes its views itself: --views-dir can only be none")
    if args.dataset == "shapes" and (args.encoder or args.component):
        raise UserError("--dataset shapes trains an encoder of its own: leave --encoder and "
                        "--component out")
    if args.noise != "adaptive" and args.dataset != "shapes":
        raise UserError("--noise is for --dataset shapes; for other data generate_views.py sets it")
    is_new = runs.begins_new(args.output_dir, args.resume)
    makes_views = args.dataset == "shapes" or (is_new and default_model(args.dataset) == "mini")
    if args.views_dir == "auto" and not makes_views:
        args.views_dir = genview.default_views_dir(args.dataset, args.data_dir)
        if not Path(args.views_dir, "manifest.jsonl").exists():
            name = METHOD_NAMES[args.method]
            say(f"*** No generated views in {args.views_dir}: this is plain {name}, not GenView. "
                f"They are made by\n***   python generate_views.py --dataset {args.dataset} "
                f"--data-dir {args.data_dir}")
            args.views_dir = "none"
    if args.views == "extra" and args.views_dir == "none":
        raise UserError("--views extra needs images: name any folder of them by --views-dir, or "
                        "make views with generate_views.py")


def label(args, coverage="", left_out=0):
    """What a run is, in words. coverage: see Generated; left_out: images that cannot be read."""
    name = METHOD_NAMES[args.method]
    if args.views_dir == "none":
        name = f"plain {name}, no generated views"
    elif args.views == "pair":
        name += f" + GenView's views{coverage}"
    else:
        name += f", extra images as samples{coverage}"
    if args.quality != "off":
        name += " + quality weights"
    return f"{name}, {left_out} unreadable images left out" if left_out else name


def main():
    args = parse_args()
    train(args, setup(args.device, precision=args.precision, args=args))


if __name__ == "__main__":
    script(main)
