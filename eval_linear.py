"""Evaluates a backbone (section "experiments"): weighted kNN, linear probe, fine-tuning.

    python eval_linear.py --checkpoint runs/<name>/last.pt                  # kNN and linear probe
    python eval_linear.py --checkpoint runs/<name>/last.pt --protocol finetune --labels 0.01

Reads checkpoints of this project, torchvision and the authors' release. Runs under torchrun, too.

Legend of the shapes: N images, S side of a picture in pixels, D features of an image, C classes.
"""
import argparse
import json
import math
from contextlib import nullcontext
from pathlib import Path

import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset

import genview
import recipes
from support.augment import CROP_TRIES, crop, crop_boxes, normalise
from support.checkpoints import load_backbone
from support.data import to_tensor
from support.files import append
from support.world import (
    Parser,
    UserError,
    ignore_sigterm,
    progress,
    real,
    say,
    script,
    setup,
    step_generator,
    whole,
)

CROP_SCALE = (0.08, 1.0)      # share of the image's area in a crop, usual for supervised training


class Crops(Dataset):
    """Image files cut to S x S: a random crop where draw = (seed, epoch), else the central square,
    without the outer eighth (256 pixels to 224). skip_bad: an unreadable file is a grey picture."""
    def __init__(self, images, image_size, draw=None, skip_bad=False):
        self.images, self.size = images, (image_size, image_size)
        self.draw, self.skip_bad = draw, skip_bad

    def __getitem__(self, index):
        try:
            image = self.images.pil(index)
        except UserError:
            if not self.skip_bad:
                raise
            image = Image.new("RGB", self.size, (128, 128, 128))
        if self.draw:
            u = torch.rand(1, CROP_TRIES, 4, generator=step_generator(*self.draw, index))
            box = crop_boxes(u, image.height, image.width, CROP_SCALE)[0].tolist()
        else:
            side = min(image.size) * 224 / 256
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
        return to_tensor(image.resize(self.size, Image.Resampling.BILINEAR, box=tuple(box)))


def pictures(images, order, image_size, world, batch_size, workers=4, draw=None, skip_bad=False):
    """Yields the images in the given order, (n, 3, S, S), normalised, on the device. draw: (seed,
    epoch) of random crops and flips; None: the central square, of pictures in memory the whole."""
    batches, in_memory = order.split(batch_size), images.pixels is not None
    if not in_memory:
        loader = iter(DataLoader(
            Crops(images, image_size, draw, skip_bad), batch_sampler=[b.tolist() for b in batches],
            num_workers=workers, worker_init_fn=ignore_sigterm,
            pin_memory=world.device.type == "cuda"))
    for step, index in enumerate(batches):
        x = (images.pixels[index] if in_memory else next(loader)).to(world.device).float()
        if draw:
            generator = step_generator(*draw, step, world.rank)
            u = torch.rand(len(x), CROP_TRIES + 1, 4, generator=generator)
            tries, flip = u[:, :-1], u[:, -1, 0] < 0.5
            x = torch.where(flip.to(x.device)[:, None, None, None], x.flip(3), x)
        if draw and in_memory:
            x = crop(x, crop_boxes(tries, *x.shape[2:], CROP_SCALE).to(x.device), image_size)
        elif x.shape[-1] != image_size:
            x = F.interpolate(x, size=(image_size,) * 2, mode="bilinear", antialias=True)
        yield normalise(x / 255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract_features(backbone, images, image_size, world, batch_size=256, workers=4,
                     skip_bad=False, dtype=torch.float):
    """The features of all images in evaluation mode: (N, D) of dtype on the device, not normalised.
    All processes must call this: each computes its share, and all get the whole."""
    n, was_training = len(images.names), backbone.training
    share = math.ceil(n / world.size)              # the same in every process: some images repeat
    order = torch.arange(world.rank * share, (world.rank + 1) * share) % n
    features = []
    backbone.eval()
    batches = pictures(images, order, image_size, world, batch_size, workers, skip_bad=skip_bad)
    for x in progress(batches, "features", "batch", total=math.ceil(share / batch_size)):
        with world.autocast():
            features.append(backbone(x).to(dtype))
    backbone.train(was_training)
    return world.gather(torch.cat(features))[:n]


@torch.no_grad()
def knn_accuracy(train_features, train_labels, test_features, test_labels, num_classes, k=200,
                 temperature=0.1):
    """Top-1 accuracy in percent of the weighted kNN classifier: the k training images of greatest
    cosine similarity s vote for their class with weight exp(s / t).

    Args:
        features (N, D), (N', D), of any length, float32 or half precision; labels (N,), (N',).
        k, temperature: k is cut to N; t. The defaults are usual for MoCo.
    Source: Wu et al. 2018 (instance discrimination), section 3.4.

    >>> test, labels = torch.tensor([[3., 1.], [2., 1.]]), torch.tensor([0, 1])
    >>> knn_accuracy(torch.eye(2), labels, test, labels, num_classes=2)
    50.0
    """
    train, test = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    correct = 0
    for part, truth in zip(test.split(512), test_labels.split(512), strict=True):
        s, nearest = (part @ train.T).float().topk(min(k, len(train)))            # (n, k)
        weights = ((s - s[:, :1]) / temperature).exp()    # relative to the greatest: no overflow
        votes = s.new_zeros(len(part), num_classes).scatter_add_(1, train_labels[nearest], weights)
        correct += (votes.argmax(1) == truth).sum().item()
    return 100 * correct / len(test)


def fit(model, groups, batches, steps, epochs, autocast=nullcontext):
    """Trains a classifier by SGD (momentum 0.9, no weight decay, cosine schedule). groups: SGD's
    parameter groups. batches: function of the epoch that yields (input, labels) `steps` times."""
    optimizer = torch.optim.SGD(groups, lr=0.0, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    bar = progress(range(epochs), "training", "epoch")
    for epoch in bar:
        for x, labels in batches(epoch):
            with autocast():
                logits = model(x)
            loss = F.cross_entropy(logits.float(), labels.to(logits.device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if not loss.isfinite():
            raise UserError(f"the loss is not finite after epoch {epoch + 1}: use a smaller --lr")
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def augmented(images, settings, world):
    """For fit: a function of the epoch that yields this process's share of randomly cropped and
    flipped pictures and labels; the steps of an epoch."""
    n = len(images.names)
    batch_size = max(1, min(settings.batch_size, n) // world.size)                # of one process
    steps = n // (batch_size * world.size)
    if steps == 0:
        raise UserError(f"{n} labelled images are too few for {world.size} processes")

    def batches(epoch):
        order = torch.randperm(n, generator=step_generator(settings.seed, epoch))
        order = order[:steps * batch_size * world.size].view(steps, world.size, batch_size)
        order = order[:, world.rank].flatten()
        xs = pictures(images, order, settings.image_size, world, batch_size, settings.workers,
                      (settings.seed, epoch), settings.skip_bad)
        yield from zip(xs, images.labels[order].split(batch_size), strict=True)
    return batches, steps


def linear_on_features(features, labels, num_classes, settings, world):
    """A linear classifier on features computed once (N, D). Returns a function: features -> logits
    (N, C). The features are standardised and divided by sqrt(D), which makes them about unit
    length: one learning rate suits all checkpoints. Every process computes the same on its own."""
    mean, std = features.mean(0), features.std(0)
    std = std.clamp_min(1e-2 * std.mean().item() + 1e-12)    # of features that hardly vary

    def rescale(x):
        return (x - mean) / (std * features.shape[1] ** 0.5)

    def batches(epoch):
        order = torch.randperm(len(x), generator=step_generator(settings.seed, epoch)).to(x.device)
        for index in order[:steps * batch_size].split(batch_size):
            yield x[index], labels[index]
    x, labels = rescale(features), labels.to(features.device)
    head = zero_linear(features.shape[1], num_classes).to(features.device)
    batch_size = min(settings.batch_size, len(x))
    steps = len(x) // batch_size
    fit(head, [{"params": head.parameters(), "lr": settings.lr}], batches, steps, settings.epochs)
    return lambda features: head(rescale(features))


def linear_on_pictures(backbone, dim, images, settings, world):
    """A linear classifier on augmented pictures, as usual on ImageNet. Freezes the backbone."""
    def features(epoch):
        for x, labels in batches(epoch):
            with torch.no_grad(), world.autocast():
                z = backbone(x).float()
            yield z, labels
    backbone.eval().requires_grad_(False)
    head = zero_linear(dim, images.num_classes).to(world.device)
    model = DistributedDataParallel(head) if world.size > 1 else head
    batches, steps = augmented(images, settings, world)
    fit(model, [{"params": head.parameters(), "lr": settings.lr}], features, steps, settings.epochs)
    return head


def finetune(backbone, dim, images, settings, world):
    """Trains backbone and classifier on part of the labels (semi-supervised). Returns the head."""
    n, generator = len(images.names), step_generator(settings.seed)
    index = (listed_subset(images.names, settings.labels_file) if settings.labels_file else
             balanced_subset(images.labels, settings.labels, generator))
    say(f"fine-tuning on {len(index)} labelled images")
    if settings.labels_file and (len(index) < 0.05 * n) != (settings.labels < 0.05):
        say(f"*** the list holds {100 * len(index) / n:.1f}% of the images, but the recipe is that "
            f"of --labels {settings.labels:g}")    # 0.05: where recipes.evaluation changes
    images = images.take(index)
    backbone.requires_grad_(True)                  # MoCo v3's fixed patch projection learns here
    if hasattr(backbone, "encoder"):               # a vision transformer
        backbone.encoder.pos_embedding.requires_grad_(False)
    head = zero_linear(dim, images.num_classes).to(world.device)
    groups = [{"params": [p for p in backbone.parameters() if p.requires_grad],
               "lr": settings.backbone_lr}, {"params": head.parameters(), "lr": settings.lr}]
    model = torch.nn.Sequential(backbone, head).train()
    if world.size > 1:
        if world.device.type == "cuda":            # PyTorch has SyncBatchNorm for GPUs only
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(model)
    batches, steps = augmented(images, settings, world)
    fit(model, groups, batches, steps, settings.epochs, world.autocast)
    if world.size > 1:                             # batch-norm statistics may differ
        for buffer in backbone.buffers():
            torch.distributed.broadcast(buffer, 0)
    return head


def balanced_subset(labels, fraction, generator):
    """A random share of the images of each class, at least one: sorted indices into labels (N,)."""
    classes = [(labels == label).nonzero().flatten() for label in labels.unique()]
    shuffled = [members[torch.randperm(len(members), generator=generator)] for members in classes]
    chosen = [members[:max(1, round(fraction * len(members)))] for members in shuffled]
    return torch.cat(chosen).sort().values


def listed_subset(names, path):
    """The images that a text file lists, a name a line, with or without folders: sorted indices
    into names (N,). Raises UserError where it lists none of them or a name fits several."""
    try:
        wanted = {line.strip() for line in Path(path).read_text().splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels-file {path} cannot be read as a list ({error})") from None
    fits = [wanted & {name, name.removeprefix("train/"), Path(name).name} for name in names]
    chosen, found = [i for i, fit in enumerate(fits) if fit], set().union(*fits)
    if not chosen or len(chosen) > len(found):
        raise UserError(f"--labels-file {path} lists {len(wanted)} names, of which {len(found)} "
                        f"fit {len(chosen)} images: it must name images of the data set, with "
                        f"their folders where the names alone are not unique")
    if missing := len(wanted - found):
        say(f"*** {path}: {missing} of its {len(wanted)} names are not in the data set")
    return torch.tensor(chosen)


def zero_linear(dim, num_classes):
    """A classifier whose weights start at 0: it begins at chance level, whatever the seed."""
    head = torch.nn.Linear(dim, num_classes)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def accuracy(logits, labels):
    """Top-1 accuracy in percent of logits (N, C) for labels (N,)."""
    return 100 * (logits.argmax(1) == labels.to(logits.device)).float().mean().item()


def parse(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument_group("model and data (default: the checkpoint's)").add_argument
    add("--checkpoint", required=True, help="last.pt, backbone.pt, or another file of weights")
    add("--arch", help="torchvision's name of the network, e.g. resnet50")
    add("--dataset", choices=list(recipes.DATA_DIRS), help="data set to evaluate on")
    add("--data-dir", help="CIFAR's files, or a folder with train/ and val/ or test/ below it")
    add("--image-size", type=whole(1), help="side of the pictures in pixels")
    add("--limit", type=whole(1), help="use so many images of each split")
    add("--skip-bad", action="store_true", help="leave out unreadable images (large ones: grey)")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=["linear", "knn", "finetune"], default="linear",
        help="linear: kNN and a linear probe; finetune: semi-supervised")
    add("--labels", type=real(1e-6, 1), default=0.01, help="finetune: share of the labels")
    add("--labels-file", help="finetune: a text file that names the labelled images instead, e.g. "
        "the public lists of 1%% and 10%% of ImageNet; the recipe depends on --labels")
    add("--k", type=whole(1), default=200, help="neighbours of kNN")
    add = parser.add_argument_group("optimisation (default: the data set's recipe)").add_argument
    add("--epochs", type=whole(1), help="passes over the labelled images")
    add("--batch-size", type=whole(1), help="of all processes together")
    add("--lr", type=real(0, 1e4), help="learning rate of the classifier")
    add("--backbone-lr", type=real(0, 1e4), help="finetune: learning rate of the backbone")
    add("--augment", action=argparse.BooleanOptionalAction, help="linear: crops and flips in every "
        "epoch, features not standardised: set --lr too")
    add = parser.add_argument_group("runtime").add_argument
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    add("--workers", type=whole(), default=4, help="processes that read image files")
    add("--seed", type=whole(), default=0, help="of the labelled images and the order of batches")
    return parser.parse_args(argv)


def resolve(settings, trained_with):
    """Fills in what no flag says: from the checkpoint, then from the recipe."""
    dataset = settings.dataset = settings.dataset or trained_with.get("dataset")
    if dataset not in recipes.DATA_DIRS:
        raise UserError("the checkpoint does not say its data set: name one with --dataset")
    known = trained_with if dataset == trained_with.get("dataset") else {}
    settings.data_dir = settings.data_dir or known.get("data_dir") or recipes.DATA_DIRS[dataset]
    if settings.data_dir is None:
        raise UserError("--dataset folder needs --data-dir, a folder with train/ and val/ or test/")
    usual = 32 if dataset in ("shapes", "cifar10", "cifar100") else 224
    settings.image_size = settings.image_size or known.get("image_size") or usual
    protocol = "finetune" if settings.protocol == "finetune" else "linear"
    for name, value in recipes.evaluation(protocol, dataset, settings.labels).items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def evaluate(settings, backbone, dim, world):
    """Yields (name of the protocol, top-1 in percent)."""
    def features(images):
        return extract_features(backbone, images, settings.image_size, world,
                                workers=settings.workers, skip_bad=settings.skip_bad)
    train, test = (genview.load_images(settings.dataset, settings.data_dir, split,
                                       settings.image_size, settings.limit, settings.skip_bad)
                   for split in ("train", "test"))
    if settings.protocol == "finetune":
        head = finetune(backbone, dim, train, settings, world)
        yield "finetune", accuracy(head(features(test)), test.labels)
        return
    train_x, test_x = features(train), features(test)
    classes = train.num_classes
    yield "kNN", knn_accuracy(train_x, train.labels, test_x, test.labels, classes, settings.k)
    if settings.protocol == "linear":
        classify = (linear_on_pictures(backbone, dim, train, settings, world) if settings.augment
                    else linear_on_features(train_x, train.labels, classes, settings, world))
        yield "linear", accuracy(classify(test_x), test.labels)


def main():
    settings = parse()
    world = setup(settings.device)
    backbone, dim, trained_with = load_backbone(settings.checkpoint, settings.arch)
    made_for = getattr(backbone, "image_size", None)         # of a vision transformer's positions
    settings.image_size = settings.image_size or made_for
    resolve(settings, trained_with)
    if made_for not in (None, settings.image_size):
        raise UserError(f"{settings.checkpoint} is a vision transformer for pictures of {made_for} "
                        f"pixels: leave --image-size out")
    torch.manual_seed(settings.seed)
    say(f"settings: {json.dumps(vars(settings))}")
    backbone = backbone.to(world.device, memory_format=torch.channels_last)
    for protocol, top1 in evaluate(settings, backbone, dim, world):
        say(f"{protocol} top-1 {top1:.1f}%")
        if world.rank == 0:
            record = {"protocol": protocol, "top1": round(top1, 3), "settings": vars(settings)}
            append(Path(settings.checkpoint).with_name("eval.jsonl"), json.dumps(record) + "\n")


if __name__ == "__main__":
    script(main)
