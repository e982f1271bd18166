"""Evaluates a backbone: weighted kNN, linear probe, semi-supervised fine-tuning (section "experiments").

    python eval_linear.py --checkpoint runs/<name>/last.pt                                        # kNN and linear probe
    python eval_linear.py --checkpoint runs/<name>/last.pt --protocol finetune --labels 0.01      # 1% of the labels

Reads this project's last.pt and backbone.pt, torchvision's state dicts, and the checkpoints of the authors' release. Runs
under torchrun too: the processes share the images. Views are normalised with CLIP's numbers, as in training.

Legend of the shapes: N images, S side of a view in pixels, D features of an image, C classes.
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
from genview import Trouble, progress

# Recipes, by protocol and data set; every entry is a flag too. `augment`: random crops and flips in every epoch; without,
# the features are computed once and standardised to unit length on average, so that one learning rate suits all checkpoints.
SMALL = dict(epochs=100, batch_size=256, lr=1.0, augment=False)                                 # ours
PRESETS = {
    "linear": {
        "shapes": SMALL, "cifar10": SMALL, "cifar100": SMALL, "folder": SMALL,
        # release, for MoCo v3's ResNet-50; its ViTs: --lr 12. Customary for MoCo v2: --epochs 100 --batch-size 256 --lr 30
        "imagenet": dict(epochs=90, batch_size=1024, lr=0.4, augment=True),
    },
    "finetune": {  # lr: of the new classifier; backbone_lr: of the rest
        "shapes": (small := dict(epochs=30, batch_size=64, lr=0.1, backbone_lr=0.01)),          # ours
        "cifar10": small, "cifar100": small, "folder": small,
        # SwAV's for 10% of the labels but for the cosine schedule, since GenView's is not known here
        "imagenet": dict(epochs=20, batch_size=256, lr=0.2, backbone_lr=0.01),
    },
}
PRESETS["finetune few"] = PRESETS["finetune"] | {   # less than 5% of the labels: SwAV's for 1%
    "imagenet": dict(epochs=20, batch_size=256, lr=5.0, backbone_lr=0.02)}
CROP_SCALE = (0.08, 1.0)      # share of the image's area in a random crop: the usual for supervised training
FEATURE_BATCH = 256           # images at a time where no gradient is needed


# ------------------------------------------------------------------------------------------------- checkpoint and images

# A backbone's names begin with one of these: this project's last.pt, the authors' release, torchvision and backbone.pt.
PREFIXES = ("query.backbone.", "backbone.", "")
GUESSES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2", "resnext50_32x4d", *genview.VITS)


def load_backbone(path, arch=None):
    """The backbone of a checkpoint.

    Args:
        path: a last.pt or backbone.pt of train_moco.py, a torchvision state dict, or a checkpoint of the authors' release.
        arch: its architecture in torchvision; None: as the checkpoint says, or the ResNet that its tensors fit.
    Returns:
        backbone, D, the settings it was trained with (a dict of those known, "arch" always).
    Raises:
        Trouble: it cannot be loaded, or is of another architecture.
    """
    checkpoint = genview.load_checkpoint(path)
    beside = Path(path).with_name("args.json")     # of a run's backbone.pt
    args = checkpoint.get("args", {}) if isinstance(checkpoint, dict) else {}
    if Path(path).name == "backbone.pt" and beside.exists():
        args = genview.read_settings(beside)
    state = strip_prefix(checkpoint)
    image_size = guess_size(state)
    theirs = args.get("arch") or next((name for name in GUESSES if not misfit(state, name, image_size)), None)
    if not (arch or theirs):
        raise Trouble(f"{path} does not say its architecture and fits no common ResNet; name it by --arch")
    arch = arch or theirs
    problem = misfit(state, arch, image_size)
    if problem:
        raise Trouble(f"{path} is a checkpoint of another architecture: {problem} {arch}; "
                      f"it was made with {theirs or 'an architecture not known here'} (--arch)")
    backbone, dim = genview.make_backbone(arch, image_size)
    backbone.load_state_dict(state, strict=False)  # not strict: num_batches_tracked may be missing
    return backbone, dim, args | {"arch": arch}


def strip_prefix(checkpoint):
    """The backbone's part of a checkpoint, under torchvision's names, without the classifier."""
    state = checkpoint
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    prefix = next(p for p in PREFIXES if any(key.startswith(p) for key in state) or p == "")
    names = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    return {key: value for key, value in names.items() if not key.startswith(("fc.", "heads."))}


def guess_size(state):
    """The side of the pictures that a backbone is made for, as far as its tensors tell."""
    if "encoder.pos_embedding" in state:           # a vision transformer's, one position a patch and one for the class token
        return math.isqrt(state["encoder.pos_embedding"].shape[1] - 1) * state["conv_proj.weight"].shape[-1]
    return 32 if "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3 else 224


def misfit(state, arch, image_size):
    """The first tensor that does not fit the architecture, in words; None where all do."""
    with torch.device("meta"):                     # shapes alone, no memory
        expected = genview.make_backbone(arch, image_size)[0].state_dict()
    for key in [*expected, *state]:
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            return f"it has no {key}, which is in"
        if key not in expected:
            return f"its {key} is not in"
        if state[key].shape != expected[key].shape:
            return f"its {key} is {tuple(state[key].shape)}, not {tuple(expected[key].shape)} as in"
    return None


class Crops(Dataset):
    """Image files cut to S x S: a random crop where `draw` = (seed, epoch) is given, else the central square.

    The central one leaves out the outer eighth: the usual 256 to 224 pixels. skip_bad: an unreadable file is a grey picture.
    """

    def __init__(self, images, image_size, draw=None, skip_bad=False):
        self.images, self.image_size, self.draw, self.skip_bad = images, image_size, draw, skip_bad

    def __getitem__(self, index):
        size = (self.image_size, self.image_size)
        try:
            image = self.images.pil(index)
        except Trouble:
            if not self.skip_bad:
                raise
            image = Image.new("RGB", size, (128, 128, 128))
        if self.draw:
            u = torch.rand(1, genview.CROP_TRIES, 4, generator=genview.step_generator(*self.draw, index))
            box = genview.crop_boxes(u, image.height, image.width, CROP_SCALE)[0].tolist()
        else:
            side = min(image.size) * 224 / 256
            left, top = (image.width - side) / 2, (image.height - side) / 2
            box = (left, top, left + side, top + side)
        return genview.to_tensor(image.resize(size, Image.Resampling.BILINEAR, box=tuple(box)))


def pictures(images, order, image_size, world, batch_size, workers=4, draw=None, skip_bad=False):
    """Yields the images in the given order, (n, 3, S, S), normalised, on the device; draw: (seed, epoch) of random crops
    and flips, or None for the central square (pictures in memory: all of it)."""
    batches = order.split(batch_size)
    if images.pixels is None:
        loader = iter(DataLoader(Crops(images, image_size, draw, skip_bad), batch_sampler=[b.tolist() for b in batches],
                                 num_workers=workers, pin_memory=world.device.type == "cuda",
                                 worker_init_fn=genview.ignore_sigterm))
    for step, index in enumerate(batches):
        x = (next(loader) if images.pixels is None else images.pixels[index]).to(world.device).float()
        if draw:
            u = torch.rand(len(x), genview.CROP_TRIES + 1, 4, generator=genview.step_generator(*draw, step, world.rank))
            x = torch.where((u[:, -1, 0] < 0.5).to(x.device)[:, None, None, None], x.flip(3), x)
        if draw and images.pixels is not None:
            x = genview.crop(x, genview.crop_boxes(u[:, :-1], *x.shape[2:], CROP_SCALE).to(x.device), image_size)
        elif x.shape[-1] != image_size:
            x = F.interpolate(x, size=(image_size, image_size), mode="bilinear", antialias=True)
        yield genview.normalise(x / 255).contiguous(memory_format=torch.channels_last)


@torch.no_grad()
def extract_features(backbone, images, image_size, world, batch_size=FEATURE_BATCH, workers=4, skip_bad=False,
                     dtype=torch.float):
    """The features of all images in evaluation mode, central crops: (N, D) of dtype on the device, not normalised.

    With several processes all must call this: each computes its share, and all get the whole.
    """
    n, was_training = len(images.names), backbone.training
    share = math.ceil(n / world.size)
    order = torch.arange(world.rank * share, (world.rank + 1) * share) % n          # the same number in every process
    backbone.eval()
    features = []
    batches = pictures(images, order, image_size, world, batch_size, workers, skip_bad=skip_bad)
    for x in progress(batches, "features", "batch", total=math.ceil(share / batch_size)):
        with world.autocast():
            features.append(backbone(x).to(dtype))
    backbone.train(was_training)
    return world.gather(torch.cat(features))[:n]


# -------------------------------------------------------------------------------------------------------------- protocols

@torch.no_grad()
def knn_accuracy(train_features, train_labels, test_features, test_labels, num_classes, k=200, temperature=0.1):
    """Top-1 accuracy in percent of the weighted kNN classifier.

    The k training images of greatest cosine similarity s vote for their class with weight exp(s / t).

    Args:
        train_features, test_features: (N, D), (N', D), of any length, in float32 or, for half of the memory, less.
        train_labels, test_labels: (N,), (N',).
        k: cut to N.
        temperature: t.
    Source: Wu et al. 2018 (instance discrimination), section 3.4; k and t as is usual for MoCo.

    >>> knn_accuracy(torch.eye(2), torch.tensor([0, 1]), torch.tensor([[3., 1.], [2., 1.]]), torch.tensor([0, 1]), 2)
    50.0
    """
    train, test = F.normalize(train_features, dim=1), F.normalize(test_features, dim=1)
    train_labels, test_labels = train_labels.to(train.device), test_labels.to(train.device)
    correct = 0
    for part, truth in zip(test.split(512), test_labels.split(512)):
        s, nearest = (part @ train.T).float().topk(min(k, len(train)))              # (n, k)
        votes = s.new_zeros(len(part), num_classes)
        votes.scatter_add_(1, train_labels[nearest], ((s - s[:, :1]) / temperature).exp())  # no overflow
        correct += (votes.argmax(1) == truth).sum().item()
    return 100 * correct / len(test)


def balanced_subset(labels, fraction, generator):
    """A random share of the images of each class, at least one: sorted indices into labels (N,)."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        count = max(1, round(fraction * len(members)))
        chosen.append(members[torch.randperm(len(members), generator=generator)[:count]])
    return torch.cat(chosen).sort().values


def listed_subset(names, path):
    """The images that a text file lists, a name a line, with or without folders: sorted indices into names (N,).

    Raises Trouble where it lists none of them, or where a name without its folder fits several; says how many are missing.
    """
    try:
        wanted = {line.strip() for line in Path(path).read_text().splitlines()} - {""}
    except (OSError, UnicodeDecodeError) as error:
        raise Trouble(f"--labels-file {path} cannot be read as a list of names ({error})") from None
    fits = [wanted & {name, name.removeprefix("train/"), Path(name).name} for name in names]
    chosen, found = [i for i, fit in enumerate(fits) if fit], set().union(*fits)
    if not chosen or len(chosen) > len(found):
        raise Trouble(f"--labels-file {path} lists {len(wanted)} names, of which {len(found)} fit {len(chosen)} images: it must "
                      f"name images of the data set, with their folders where the names alone are not unique")
    if len(found) < len(wanted):
        genview.say(f"*** {path}: {len(wanted) - len(found)} of its {len(wanted)} names are not in the data set")
    return torch.tensor(chosen)


def fit(model, groups, batches, steps, epochs, autocast=nullcontext):
    """Trains a classifier by SGD with momentum 0.9, a cosine schedule and no weight decay.

    Args:
        groups: SGD's parameter groups, each with its learning rate.
        batches: function of the epoch that yields (input of model, labels), `steps` times.
    """
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
            raise Trouble(f"the loss is not finite after epoch {epoch + 1}: take a smaller --lr")
        bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)


def augmented(images, settings, world):
    """For fit: a function of the epoch that yields this process's share of pictures and labels; the steps of an epoch."""
    n = len(images.names)
    batch_size = max(1, min(settings.batch_size, n) // world.size)                  # of one process
    steps = n // (batch_size * world.size)
    if steps == 0:
        raise Trouble(f"{n} labelled images are too few for {world.size} processes")

    def batches(epoch):
        order = torch.randperm(n, generator=genview.step_generator(settings.seed, epoch))
        order = order[:steps * batch_size * world.size].view(steps, world.size, batch_size)[:, world.rank].flatten()
        xs = pictures(images, order, settings.image_size, world, batch_size, settings.workers, (settings.seed, epoch),
                      settings.skip_bad)
        yield from zip(xs, images.labels[order].split(batch_size))
    return batches, steps


def linear_on_features(features, labels, num_classes, settings, world):
    """A linear classifier on features computed once (N, D). Returns a function: features -> logits (N, C).

    The features are standardised and divided by sqrt(D): length about 1 whatever the network. Every process computes the
    same on its own.
    """
    mean, std = features.mean(0), features.std(0)
    std = std.clamp_min(1e-2 * std.mean().item() + 1e-12)                           # of features that hardly vary
    rescale = lambda x: (x - mean) / (std * features.shape[1] ** 0.5)
    x, labels = rescale(features), labels.to(features.device)
    head = zero_linear(features.shape[1], num_classes).to(features.device)
    batch_size = min(settings.batch_size, len(x))
    steps = len(x) // batch_size

    def batches(epoch):
        order = torch.randperm(len(x), generator=genview.step_generator(settings.seed, epoch)).to(x.device)
        for index in order[:steps * batch_size].split(batch_size):
            yield x[index], labels[index]
    fit(head, [{"params": head.parameters(), "lr": settings.lr}], batches, steps, settings.epochs)
    return lambda features: head(rescale(features))


def linear_on_pictures(backbone, dim, images, settings, world):
    """A linear classifier on features of randomly cropped and flipped pictures, the usual protocol on ImageNet."""
    backbone.eval().requires_grad_(False)
    head = zero_linear(dim, images.num_classes).to(world.device)
    model = DistributedDataParallel(head) if world.size > 1 else head
    batches, steps = augmented(images, settings, world)

    def features(epoch):
        for x, labels in batches(epoch):
            with torch.no_grad(), world.autocast():
                z = backbone(x).float()
            yield z, labels
    fit(model, [{"params": head.parameters(), "lr": settings.lr}], features, steps, settings.epochs)
    return head


def finetune(backbone, dim, images, settings, world):
    """Trains backbone and classifier on a share of the labels (semi-supervised). Changes the backbone; returns the head."""
    index = (listed_subset(images.names, settings.labels_file) if settings.labels_file else
             balanced_subset(images.labels, settings.labels, genview.step_generator(settings.seed)))
    labels = images.labels
    images = images._replace(names=[images.names[i] for i in index.tolist()], labels=labels[index],
                             pixels=None if images.pixels is None else images.pixels[index])
    genview.say(f"fine-tuning on {len(index)} labelled images")
    backbone.requires_grad_(True)                  # also what MoCo v3 keeps fixed, but for the positions
    if settings.labels_file and (len(index) < 0.05 * len(labels)) != (settings.labels < 0.05):
        genview.say(f"*** the list holds {100 * len(index) / len(labels):.1f}% of the images, but the recipe is that of "
                    f"--labels {settings.labels:g}")
    if hasattr(backbone, "encoder"):
        backbone.encoder.pos_embedding.requires_grad_(False)
    head = zero_linear(dim, images.num_classes).to(world.device)
    groups = [{"params": [p for p in backbone.parameters() if p.requires_grad], "lr": settings.backbone_lr},
              {"params": head.parameters(), "lr": settings.lr}]
    model = torch.nn.Sequential(backbone, head).train()
    if world.size > 1:
        if world.device.type == "cuda":            # PyTorch's is for GPUs only
            model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
        model = DistributedDataParallel(model)
    batches, steps = augmented(images, settings, world)
    fit(model, groups, batches, steps, settings.epochs, world.autocast)
    if world.size > 1:                             # one network for all: batch-norm statistics, too
        for buffer in backbone.buffers():
            torch.distributed.broadcast(buffer, 0)
    return head


def zero_linear(dim, num_classes):
    """A classifier that starts at 0, hence at chance: no seed to choose."""
    head = torch.nn.Linear(dim, num_classes)
    for parameter in head.parameters():
        torch.nn.init.zeros_(parameter)
    return head


@torch.no_grad()
def accuracy(logits, labels):
    return 100 * (logits.argmax(1) == labels.to(logits.device)).float().mean().item()


# ------------------------------------------------------------------------------------------------------------ command line

def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument_group("data and model (default: as the checkpoint was trained)").add_argument
    add("--checkpoint", required=True, help="last.pt, backbone.pt, a torchvision state dict, or one of the authors' release")
    add("--arch", help="torchvision's name of the network, e.g. resnet50")
    add("--dataset", choices=list(PRESETS["linear"]))
    add("--data-dir", help="CIFAR's files, or a folder with train/ and val/ or test/ below it")
    add("--image-size", type=genview.at_least(1), help="side of the pictures in pixels")
    add("--limit", type=genview.at_least(1), help="use so many images of either split")
    add("--skip-bad", action="store_true", help="go on where an image cannot be read (above 64 pixels it counts, as grey)")
    add = parser.add_argument_group("protocol").add_argument
    add("--protocol", choices=["linear", "knn", "finetune"], default="linear", help="linear gives kNN as well")
    add("--labels", type=float, default=0.01, help="finetune: share of the labels, such as 0.01, 0.1, 1.0")
    add("--labels-file", help="finetune: a text file that names the labelled images instead, such as the public lists of "
                              "1%% and 10%% of ImageNet (give --labels too: the recipe depends on it)")
    add("--k", type=genview.at_least(1), default=200, help="neighbours of kNN")
    add("--knn-temperature", type=float, default=0.1)
    add = parser.add_argument_group("optimisation (default: the preset of the data set)").add_argument
    add("--epochs", type=genview.at_least(1))
    add("--batch-size", type=genview.at_least(1), help="of all processes together")
    add("--lr", type=float, help="of the classifier")
    add("--backbone-lr", type=float, help="finetune: of the backbone")
    add("--augment", action=argparse.BooleanOptionalAction,
        help="linear: crops and flips in every epoch, features as they are (then --lr too)")
    add = parser.add_argument_group("runtime").add_argument
    add("--device", help="cuda, mps or cpu")
    add("--workers", type=genview.at_least(0), default=4, help="processes that read image files")
    add("--seed", type=genview.at_least(0), default=0)
    return parser.parse_args(argv)


def resolve(settings, trained_with):
    """Fills in what no flag says: from the checkpoint, then from the preset."""
    settings.dataset = settings.dataset or trained_with.get("dataset")
    if settings.dataset not in PRESETS["linear"]:
        raise Trouble("the checkpoint does not say its data set: name one by --dataset")
    if not 0 < settings.labels <= 1:
        raise Trouble(f"--labels {settings.labels:g} is no share of the labels: it must be above 0 and at most 1")
    same = settings.dataset == trained_with.get("dataset")
    known = same and trained_with.get("data_dir")
    settings.data_dir = settings.data_dir or known or genview.default_data_dir(settings.dataset)
    usual = 32 if settings.dataset in ("shapes", "cifar10", "cifar100") else 224
    settings.image_size = settings.image_size or (same and trained_with.get("image_size")) or usual
    protocol = settings.protocol if settings.protocol == "finetune" else "linear"
    preset = PRESETS["finetune few" if protocol == "finetune" and settings.labels < 0.05 else protocol][settings.dataset]
    for name, value in preset.items():
        if getattr(settings, name) is None:
            setattr(settings, name, value)


def evaluate(settings, backbone, dim, world):
    """Yields (name of the protocol, top-1 in percent)."""
    train, test = (genview.load_images(settings.dataset, settings.data_dir, split, settings.image_size, settings.limit,
                                       settings.skip_bad) for split in ("train", "test"))
    features = lambda images: extract_features(backbone, images, settings.image_size, world, FEATURE_BATCH,
                                               settings.workers, settings.skip_bad)
    if settings.protocol == "finetune":
        head = finetune(backbone, dim, train, settings, world)
        yield "finetune", accuracy(head(features(test)), test.labels)
        return
    train_x, test_x = features(train), features(test)
    yield "kNN", knn_accuracy(train_x, train.labels, test_x, test.labels, train.num_classes, settings.k,
                              settings.knn_temperature)
    if settings.protocol == "linear":
        classify = (linear_on_pictures(backbone, dim, train, settings, world) if settings.augment else
                    linear_on_features(train_x, train.labels, train.num_classes, settings, world))
        yield "linear", accuracy(classify(test_x), test.labels)


def main():
    settings = parse()
    world = genview.setup(settings.device)
    backbone, dim, trained_with = load_backbone(settings.checkpoint, settings.arch)
    made_for = getattr(backbone, "image_size", None)                                # a vision transformer's positions
    settings.image_size = settings.image_size or made_for
    resolve(settings, trained_with)
    if made_for not in (None, settings.image_size):
        raise Trouble(f"{settings.checkpoint} is a vision transformer for pictures of {made_for} pixels: leave --image-size out")
    torch.manual_seed(settings.seed)
    genview.say(f"settings: {json.dumps(vars(settings))}")
    backbone = backbone.to(world.device, memory_format=torch.channels_last)
    for protocol, top1 in evaluate(settings, backbone, dim, world):
        if world.rank == 0:
            genview.say(f"{protocol} top-1 {top1:.1f}%")
            record = {"protocol": protocol, "top1": round(top1, 3), "settings": vars(settings)}
            genview.append(Path(settings.checkpoint).with_name("eval.jsonl"), json.dumps(record) + "\n")


if __name__ == "__main__":
    genview.run(main)
