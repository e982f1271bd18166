"""Evaluates a backbone (section "experiments"): weighted kNN, linear probe, fine-tuning.

    python eval_linear.py --checkpoint runs/<name>/last.pt                  # kNN and linear probe
    python eval_linear.py --checkpoint runs/<name>/last.pt --protocol finetune --labels 0.01

Reads checkpoints of this project, the authors' release and others. Runs under torchrun, too.
Writes into linear/, knn/ or finetune-<percent>/ beside the checkpoint: result.json, log.jsonl,
head.pt (a linear layer for the backbone's features; not of kNN) and, where the training sees
pictures, last.pt. The linear probe of ImageNet does, and comes without kNN.

Legend of the shapes: N images, S side of a picture in pixels, D features of an image, C classes.
"""
import argparse
import math
import os
from collections import OrderedDict
from contextlib import nullcontext

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import genview
import recipes
from support import augment
from support.command_line import Parser, UserError, progress, real, say, script, whole
from support.data import balanced_subset, check_classes, listed_subset, read_picture
from support.evaluations import Evaluation, folder_of
from support.files import claimed
from support.networks import LARS
from support.pretrained import MEAN_STD, load_backbone
from support.processes import cores_of_process, setup, start_worker
from support.schedules import cosine, scaled_rate, step_decay
from support.seeds import epoch_order, step_generator

CROP_SCALE = (0.08, 1.0)      # part of the image's area in a crop: torchvision's default


class Crops(Dataset):
    """Image files cut to S x S: a random crop where draw = (seed, epoch), else the central square,
    without the outer eighth (256 pixels to 224)."""
    def __init__(self, images, image_size, draw=None):
        # An array of bytes, not a list: see genview.CropsOfFiles.
        self.files = np.array([os.fsencode(images.root / name) for name in images.names])
        self.size = image_size
        self.draw = draw

    def __getitem__(self, index):
        image = read_picture(os.fsdecode(self.files[index]))
        height, width = image.shape[1:]
        if self.draw:
            u = torch.rand(augment.CROP_TRIES, 4, generator=step_generator(*self.draw, index))
            box = augment.crop_box(u.tolist(), height, width, CROP_SCALE)
        else:
            side = round(min(height, width) * 224 / 256)
            box = augment.central_box(side, height, width)
        return augment.crop_file(image, box, self.size)


def pictures(images, order, image_size, world, batch_size, workers=4, draw=None):
    """Yields the images in the given order, (n, 3, S, S), normalised, on the device. draw: (seed,
    epoch) of random crops and flips; None: the central square, of pictures in memory the whole."""
    batches = [part for part in order.split(batch_size) if len(part)]
    in_memory = images.pixels is not None
    if in_memory:
        source = (images.pixels[index] for index in batches)
    else:
        source = DataLoader(
            Crops(images, image_size, draw), batch_sampler=[b.tolist() for b in batches],
            num_workers=workers, worker_init_fn=start_worker,
            pin_memory=world.device.type == "cuda")
    for step, x in enumerate(source):
        x = x.to(world.device).float()
        if draw:
            generator = step_generator(*draw, step, world.rank)
            x = flip_and_crop(x, generator, image_size if in_memory else None)
        if x.shape[-1] != image_size:
            x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
        yield augment.normalise(x / 255).contiguous(memory_format=torch.channels_last)


def flip_and_crop(x, generator, crop_size=None):
    """Pictures (n, 3, H, W), some flipped. crop_size: cut at random to this side, too."""
    u = torch.rand(len(x), augment.CROP_TRIES + 1, 4, generator=generator)
    crop, flip = u.split([augment.CROP_TRIES, 1], dim=1)
    mirrored = flip[:, :, :1, None] < 0.5                                       # (n, 1, 1, 1)
    x = torch.where(mirrored.to(x.device), x.flip(3), x)
    if crop_size is None:
        return x
    boxes = augment.crop_boxes(crop, *x.shape[2:], CROP_SCALE).to(x.device)
    return augment.crop(x, boxes, crop_size)


@torch.no_grad()
def feature_batches(backbone, images, order, image_size, world, batch_size, workers):
    """Yields the features of the images in the given order, (n, D), in evaluation mode."""
    was_training = backbone.training
    backbone.eval()
    batches = pictures(images, order, image_size, world, batch_size, workers)
    for x in progress(batches, "features", "batch", total=math.ceil(len(order) / batch_size)):
        with world.autocast():
            features = backbone(x).float()
        yield features
    backbone.train(was_training)


def extract_features(backbone, images, image_size, world, batch_size=256, workers=4):
    """The features of all images: (N, D) on the device, not normalised. All processes must call
    this: each computes its part, and all get all of them."""
    n = len(images.names)
    part = math.ceil(n / world.size)               # the same in every process: some images repeat
    order = torch.arange(world.rank * part, (world.rank + 1) * part) % n
    features = feature_batches(backbone, images, order, image_size, world, batch_size, workers)
    return world.gather(torch.cat(list(features)))[:n]


def knn_accuracy(chunks, queries, truth, num_classes, k=200, temperature=0.1, world=None):
    """Top-1 accuracy in percent of the weighted kNN classifier: the k training images of greatest
    cosine similarity s vote for their class with weight exp(s / t).

    Args:
        chunks: yields features (n, D) of any length and labels (n,) of training images. They
            need not fit into memory together: 10 GB for ImageNet and ResNet-50.
        queries, truth: features (N', D) and labels (N',) of the test images.
        k, temperature: t. The defaults are usual for MoCo.
        world: where each process sees other chunks.
    Source: Wu et al. 2018 (instance discrimination), section 3.4.
    >>> labels = torch.tensor([0, 1])
    >>> knn_accuracy([(torch.eye(2), labels)], torch.tensor([[3., 1.], [2., 1.]]), labels, 2)
    50.0
    """
    queries = F.normalize(queries, dim=1)
    s = queries.new_full((len(queries), k), -math.inf)          # (N', k), the nearest so far
    classes = torch.zeros_like(s, dtype=torch.long)             # (N', k), theirs
    for features, labels in chunks:
        train = F.normalize(features, dim=1).T
        labels = labels.to(s.device)
        for i in range(0, len(queries), 512):
            rows = slice(i, i + 512)
            found = torch.cat([s[rows], queries[rows] @ train], 1)                  # (512, k + n)
            both = torch.cat([classes[rows], labels.expand(len(found), -1)], 1)
            s[rows], place = found.topk(k)
            classes[rows] = both.gather(1, place)
    if world and world.size > 1:                   # the nearest of all processes' nearest
        s = torch.cat(world.gather(s).chunk(world.size), 1)
        classes = torch.cat(world.gather(classes).chunk(world.size), 1)
        s, place = s.topk(k)
        classes = classes.gather(1, place)
    weights = ((s - s[:, :1]) / temperature).exp()              # of the greatest 1: no overflow
    votes = s.new_zeros(len(s), num_classes).scatter_add_(1, classes, weights)
    return 100 * (votes.argmax(1) == truth.to(s.device)).float().mean().item()


def knn_of(backbone, train, test, image_size, world, workers, k=200):
    """kNN accuracy in percent of a backbone's features of train and test, Images. All processes
    must call this."""
    options = dict(image_size=image_size, world=world, batch_size=512, workers=workers)
    order = torch.arange(world.rank, len(train.names), world.size)
    labels = [part for part in train.labels[order].split(512) if len(part)]
    chunks = zip(feature_batches(backbone, train, order, **options), labels, strict=True)
    return knn_accuracy(chunks, extract_features(backbone, test, **options), test.labels,
                        train.num_classes, k, world=world)


def fit_classifier(model, optimizer, batches, steps, settings, autocast=nullcontext, run=None,
                   score=None):
    """Trains a classifier.

    Args:
        model: input -> logits; wrapped where several processes train it together.
        optimizer: its learning rates are the peaks: a cosine to 0, or the drops of settings.
        batches: function of the epoch that yields (input, labels) `steps` times.
        run: Evaluation, or None.
        score: called after each epoch; the accuracies that it returns go into the log.
    """
    own = getattr(model, "module", model)          # without the wrapper
    epochs = settings.epochs
    peaks = [group["lr"] for group in optimizer.param_groups]
    first = run.resume(own, optimizer) if run else 0
    bar = progress(range(first, epochs), "training", "epoch", total=epochs, initial=first)
    for epoch in bar:
        losses = []
        for step, (x, labels) in enumerate(batches(epoch), epoch * steps):
            done = step / (epochs * steps)
            factor = step_decay(settings.drops, done) if settings.drops else cosine(done)
            for group, peak in zip(optimizer.param_groups, peaks, strict=True):
                group["lr"] = peak * factor
            with autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        mean = torch.stack(losses).mean()
        if not mean.isfinite():
            raise UserError(f"the loss is not finite after epoch {epoch + 1}: use a smaller --lr")
        bar.set_postfix(loss=f"{mean.item():.3f}", refresh=False)
        accuracies = score() if score else {}
        if run:
            run.after_epoch(epoch + 1, own, optimizer, mean, accuracies)


def augmented(images, batch_size, settings, world):
    """For fit_classifier: a function of the epoch that yields this process's part of randomly
    cropped and flipped pictures and labels; the steps of an epoch. batch_size: see batch_of."""
    n = len(images.names)
    own = batch_size // world.size                 # of this process
    steps = n // batch_size

    def batches(epoch):
        order = epoch_order(n, settings.seed, epoch)[:steps * batch_size]
        order = order.view(steps, world.size, own)[:, world.rank].flatten()
        xs = pictures(images, order, settings.image_size, world, own, settings.workers,
                      (settings.seed, epoch))
        yield from zip(xs, images.labels[order].split(own), strict=True)
    return batches, steps


def batch_of(batch_size, n, processes=1):
    """The images in a step, of all processes together: at most all n labelled ones."""
    if n < max(2, processes):
        raise UserError(f"{n} labelled images are too few to fit a classifier (in {processes} "
                        f"processes)")
    return max(1, min(batch_size, n) // processes) * processes


def rate_of_classifier(lr, batch_size):
    """The classifier's learning rate; prints it."""
    rate = scaled_rate(lr, batch_size)
    say(f"learning rate of the classifier: {rate:g} ({lr:g} for 256 images, the batch is "
        f"{batch_size})")
    return rate


def probe(dim, num_classes, settings, batch_size, device):
    """A linear classifier and its optimiser."""
    head = zero_linear(dim, num_classes)
    rate = rate_of_classifier(settings.lr, batch_size)
    if settings.optimizer == "lars":    # its steps are 0.001 |w| long: weights of 0 would not do
        torch.nn.init.normal_(head.weight, std=0.01, generator=step_generator(settings.seed))
        return head.to(device), LARS(head.parameters(), rate, weight_decay=0.0)
    return head.to(device), torch.optim.SGD(head.parameters(), rate, momentum=0.9)


def linear_on_features(features, labels, num_classes, settings, run=None):
    """A linear classifier of features computed once (N, D), standardised for the training and
    divided by sqrt(D), which makes them about unit length: one learning rate suits all checkpoints.
    Every process computes the same on its own."""
    batch_size = batch_of(settings.batch_size, len(features))
    mean = features.mean(0)
    std = features.std(0)
    std = std.clamp_min(1e-2 * std.mean().item() + 1e-12)    # of features that hardly vary
    scale = 1 / (std * features.shape[1] ** 0.5)

    x = (features - mean) * scale
    labels = labels.to(features.device)
    steps = len(x) // batch_size

    def batches(epoch):
        order = epoch_order(len(x), settings.seed, epoch).to(x.device)
        for index in order[:steps * batch_size].split(batch_size):
            yield x[index], labels[index]
    head, optimizer = probe(features.shape[1], num_classes, settings, batch_size, features.device)
    fit_classifier(head, optimizer, batches, steps, settings, run=run)
    with torch.no_grad():                          # W (z - mean) scale + b = W' z + b'
        head.weight.mul_(scale)
        head.bias.sub_(head.weight @ mean)
    return head


def linear_on_pictures(backbone, dim, images, settings, world, validation, run=None):
    """A linear classifier on augmented pictures, as usual on ImageNet. Freezes the backbone.
    validation: features and labels to score after each epoch."""
    batch_size = batch_of(settings.batch_size, len(images.names), world.size)
    batches, steps = augmented(images, batch_size, settings, world)

    def features(epoch):
        for x, labels in batches(epoch):
            with torch.no_grad(), world.autocast():
                z = backbone(x).float()
            yield z, labels

    @torch.no_grad()
    def score():
        z, labels = validation
        return top(head(z), labels)
    backbone.eval().requires_grad_(False)
    head, optimizer = probe(dim, images.num_classes, settings, batch_size, world.device)
    fit_classifier(world.distributed(head), optimizer, features, steps, settings, run=run,
                   score=score)
    return head


def finetune(backbone, dim, images, settings, world, run=None):
    """Trains backbone and classifier (semi-supervised: on part of the labels). Returns the head."""
    backbone.requires_grad_(True)                  # MoCo v3's fixed patch projection learns here
    if hasattr(backbone, "encoder"):               # a vision transformer
        backbone.encoder.pos_embedding.requires_grad_(False)
    head = zero_linear(dim, images.num_classes).to(world.device)
    batch_size = batch_of(settings.batch_size, len(images.names), world.size)
    backbone_rate = scaled_rate(settings.backbone_lr, batch_size)
    optimizer = torch.optim.SGD(                   # what gets no gradient is left alone
        [{"params": backbone.parameters(), "lr": backbone_rate},
         {"params": head.parameters(), "lr": rate_of_classifier(settings.lr, batch_size)}],
        momentum=0.9)
    query = torch.nn.Sequential(OrderedDict(backbone=backbone))    # last.pt's names in training
    model = torch.nn.Sequential(OrderedDict(query=query, head=head)).train()
    batches, steps = augmented(images, batch_size, settings, world)
    model = world.distributed(world.synchronised(model))
    fit_classifier(model, optimizer, batches, steps, settings, world.autocast, run)
    if world.size > 1:                             # without SyncBatchNorm each has its own
        for buffer in backbone.buffers():
            torch.distributed.broadcast(buffer, 0)
    return head


def labelled(images, settings):
    """The images whose labels fine-tuning may use: those listed, or a part of each class."""
    n = len(images.names)
    if settings.labels_file:
        index = listed_subset(images, settings.labels_file)
    else:
        index = balanced_subset(images.labels, settings.labels, step_generator(settings.seed))
    say(f"fine-tuning on {len(index)} labelled images")
    if settings.labels_file and (len(index) < 0.05 * n) != (settings.labels < 0.05):
        say(f"*** the list holds {100 * len(index) / n:.1f}% of the images, but the recipe is that "
            f"of --labels {settings.labels:g}")    # 0.05: where recipes.evaluation changes
    return images.take(index)


def zero_linear(dim, num_classes):
    """A classifier whose weights start at 0: it begins at chance level, whatever the seed."""
    head = torch.nn.Linear(dim, num_classes)
    head.load_state_dict({name: torch.zeros_like(x) for name, x in head.state_dict().items()})
    return head


@torch.no_grad()
def top(logits, labels):
    """Accuracies in percent of logits (N, C) for labels (N,): the class is the first, or among the
    first five."""
    best = logits.topk(min(5, logits.shape[1]), dim=1).indices                  # (N, 5)
    right = (best == labels.to(best.device)[:, None]).float().sum(0)            # (5,)
    return {"top1": 100 * right[0].item() / len(best), "top5": 100 * right.sum().item() / len(best)}


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument_group("model and data (default: the checkpoint's)").add_argument
    add("--checkpoint", required=True, help="last.pt, backbone.pt, or another file of weights")
    add("--arch", help="torchvision's name of the network, e.g. resnet50")
    add("--heads", type=whole(1), help="of a vision transformer; default: its layout's")
    add("--branch", help="which backbone of several, a part of its prefix, such as student")
    add("--mean-std", choices=list(MEAN_STD), help="of its pictures; default: its layout's")
    add("--dataset", choices=list(genview.DATA_DIRS), help="data set to evaluate on")
    add("--data-dir", help="CIFAR's files, or a folder with train/ and val/ or test/ below it")
    add("--image-size", type=whole(1), help="side of the pictures in pixels")
    add("--limit", type=whole(1), help="use so many images of each split")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=["linear", "knn", "finetune"], default="linear", help="what to fit")
    add("--labels", type=real(1e-6, 1), default=0.01, help="finetune: part of the labels")
    add("--labels-file", help="finetune: a text file that names the labelled images instead")
    add("--k", type=whole(1), default=200, help="neighbours of kNN")
    add = parser.add_argument_group("optimisation (default: the data set's recipe)").add_argument
    add("--epochs", type=whole(1), help="passes over the labelled images")
    add("--batch-size", type=whole(1), help="of all processes together")
    add("--optimizer", choices=["sgd", "lars"], help="linear: what trains the classifier")
    add("--lr", type=real(0, 1e4), help="learning rate for 256 images; grows with the batch")
    add("--backbone-lr", type=real(0, 1e4), help="finetune: the same of the backbone")
    add("--drops", type=real(0, 1), nargs="*",
        help="when lr falls to a tenth, 0 to 1 of the training; none: a cosine to 0")
    add("--augment", action=argparse.BooleanOptionalAction, help="linear: crops and flips in every "
        "epoch, features not standardised: set --lr too")
    add = parser.add_argument_group("runtime").add_argument
    add("--output-dir", help="default: <folder of the checkpoint>/<protocol>, such as finetune-10")
    add("--resume", action="store_true", help="go on from the output folder's last.pt")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    add("--workers", type=whole(), default=cores_of_process(), help="that read files")
    add("--seed", type=whole(), default=0, help="of the choice and order of images")
    return parser.parse_args(argv)


def resolve_settings(args, trained_with, made_for=None):
    """The settings: flags, then what the checkpoint says, then the recipe.

    made_for: the side of the pictures that the backbone takes, where it takes no other.
    """
    settings = argparse.Namespace(**vars(args))
    settings.dataset = args.dataset or trained_with.get("dataset")
    if settings.dataset not in genview.DATA_DIRS:
        raise UserError("the checkpoint does not say its data set: name one with --dataset")
    same = settings.dataset == trained_with.get("dataset")
    of_run = trained_with if same else {}
    settings.data_dir = genview.data_dir_of(settings.dataset,
                                            args.data_dir or of_run.get("data_dir"))
    # The network decides, not the data: one for large pictures sees small ones enlarged.
    settings.image_size = args.image_size or made_for or trained_with["image_size"]
    if made_for not in (None, settings.image_size):
        raise UserError(f"{args.checkpoint} is a vision transformer for pictures of {made_for} "
                        f"pixels: leave --image-size out")
    settings.limit = args.limit or of_run.get("limit")
    settings.arch = trained_with["arch"]
    settings.method = trained_with.get("method")
    settings.mean_std = trained_with["mean_std"]
    use_recipe(settings)
    settings.output_dir = args.output_dir or folder_of(settings)
    return settings


def use_recipe(settings):
    """Fills in the recipe's values."""
    recipe = recipes.evaluation(settings.protocol, settings.dataset, settings.labels,
                                settings.method, settings.arch)
    names = ("optimizer", "lr", "backbone_lr", "drops", "epochs", "batch_size", "augment")
    recipes.apply(settings, recipe, f"--protocol {settings.protocol}", names)
    if recipe.get("augment") and settings.method not in recipes.LINEAR:
        say(f"*** the checkpoint does not say its method: MoCo v3's probe for {settings.arch}")


def evaluate(settings, backbone, dim, world):
    """Loads the images; computes and reports the accuracies of a protocol."""
    def load(split):
        return genview.load_images(settings.dataset, settings.data_dir, split, settings.image_size,
                                   settings.limit, settings.skip_bad, settings.workers)
    train = load("train")
    test = load("test")
    check_classes(train, settings.data_dir, ": a classifier needs two classes")
    left_out = train.left_out + test.left_out
    if settings.protocol == "finetune":
        train = labelled(train, settings)
    with claimed(settings.output_dir, world):
        run = Evaluation(settings, world, backbone, train, test, left_out)
        follow_protocol(settings, backbone, dim, train, test, world, run)


def follow_protocol(settings, backbone, dim, train, test, world, run):
    """Fits on the images train, all of them labelled; computes and reports the accuracies on the
    images test."""
    def features(images):
        return extract_features(backbone, images, settings.image_size, world,
                                workers=settings.workers)
    n = len(train.names)
    if settings.protocol == "finetune":
        head = finetune(backbone, dim, train, settings, world, run)
        run.report("finetune", n, top(head(features(test)), test.labels), head)
    elif settings.protocol == "linear" and not settings.augment:
        x = features(train)
        test_x = features(test)
        accuracy = knn_accuracy([(x, train.labels)], test_x, test.labels, train.num_classes,
                                settings.k)
        run.report("kNN", n, {"top1": accuracy})
        head = linear_on_features(x, train.labels, train.num_classes, settings, run)
        run.report("linear", n, top(head(test_x), test.labels), head)
    elif settings.protocol == "linear":
        check = features(test), test.labels
        head = linear_on_pictures(backbone, dim, train, settings, world, check, run)
        run.report("linear", n, top(head(check[0]), check[1]), head)
    else:
        accuracy = knn_of(backbone, train, test, settings.image_size, world, settings.workers,
                          settings.k)
        run.report("kNN", n, {"top1": accuracy})


def main():
    args = parse_args()
    world = setup(args.device, args=args)
    backbone, dim, trained_with = load_backbone(args.checkpoint, args.arch, args.heads, args.branch,
                                                args.mean_std)
    mean = trained_with["mean"]
    std = trained_with["std"]
    if trained_with["mean_std"] != "clip":         # pictures come with CLIP's numbers
        backbone.register_forward_pre_hook(lambda _, x: (augment.renormalise(x[0], mean, std),))
    # A vision transformer's positions are of one size.
    settings = resolve_settings(args, trained_with, getattr(backbone, "image_size", None))
    torch.manual_seed(settings.seed)
    say(f"settings: {vars(settings)}")
    evaluate(settings, backbone.to(world.device, memory_format=torch.channels_last), dim, world)


if __name__ == "__main__":
    script(main)
