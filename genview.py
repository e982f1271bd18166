"""What the scripts of this project share: pictures and their generated views, the two augmentations, the frozen encoder,
the foreground component, and helpers for devices, processes and checkpoints.

Legend of the shapes: N images, S side of a view in pixels, T tokens (positions of a feature map), K features of a token.
"""
import argparse
import atexit
import contextlib
import ctypes
import datetime
import errno
import functools
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import sys
import time
import warnings
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import torchvision
from PIL import Image, ImageOps
from torchvision.ops import roi_align

# Views are normalised with CLIP's numbers throughout, so that one tensor feeds the frozen encoder and the trained one.
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
IN_MEMORY_SIZE = 64           # pictures up to this side are kept in memory as one uint8 tensor and augmented in batches
FIT_IMAGES = 10_000           # images the foreground component is fitted on (release)
MINI = Path(__file__).with_name("weights") / "mini-unclip"           # the miniature of Stable unCLIP, by train_generator.py
NO_MEMORY = "the memory does not suffice: lower --batch-size or the size of the pictures; a run goes on with --resume"
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".tif", ".tiff"}


class Trouble(Exception):
    """Something that the user can put right: shown as one line, exit status 2."""


class Terminated(Exception):
    """SIGTERM came and what is needed to go on has been saved: its text says where."""


def run(main):
    """Runs a script's main function and turns trouble into one line on stderr."""
    try:
        main()
    except Trouble as trouble:                     # a loader's worker hands over its whole traceback: keep the last line
        sys.exit(_report(str(trouble).strip().splitlines()[-1].removeprefix("genview.Trouble: "), 2))
    except OSError as error:                       # a disk that is full, a folder that may not be written, a file that is gone
        sys.exit(_report(f"{error.strerror or error}{f': {error.filename}' if error.filename else ''}", 2))
    except MemoryError:
        sys.exit(_report(NO_MEMORY, 2))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit(_report(NO_MEMORY, 2))
        if "DataLoader worker (pid" in str(error):
            sys.exit(_report("a process that reads images was killed, perhaps for its memory: lower --workers", 1))
        if not dist.is_initialized() or not re.search("peer|gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error)):
            raise
        sys.exit(_report_lost())
    except Terminated as terminated:
        sys.exit(_report(str(terminated), 128 + signal.SIGTERM))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted; the same command goes on from the last finished file, training with --resume", 130))
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def _report_lost():
    """Says which processes are gone: those that do not raise their hand within some seconds."""
    rank, size, lost = dist.get_rank(), dist.get_world_size(), []
    try:
        _store[0].set(f"alive {rank}", "yes")
        time.sleep(5)
        lost = [r for r in range(size) if not _store[0].check([f"alive {r}"])]
    except (RuntimeError, dist.DistError):         # the first process keeps the store
        lost = [0]
    print(f"error: process {rank} stops, since process {', '.join(map(str, lost)) or '?'} of {size} ended or does not answer; "
          f"its own message says why; --resume goes on from the last checkpoint", file=sys.stderr, flush=True)
    os._exit(1)                                    # the lost one would be waited for


_store = []                                        # where the processes meet, set by setup


def _report(message, status):
    if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:          # before, all of a machine have the same
        print(f"error: {message}", file=sys.stderr)
    return status


# ---------------------------------------------------------------------------------------------------- pictures and views

class Images(NamedTuple):
    """A labelled set of N pictures: small ones in memory, large ones as files."""
    names: list          # relative to the data folder: "train/cat/0001.jpg"; CIFAR's own files: "train/00001"
    labels: torch.Tensor                           # (N,)
    num_classes: int
    pixels: torch.Tensor = None                    # (N, 3, S, S) uint8, or None: read the files below root
    root: Path = None

    def pil(self, index):
        """The picture as PIL's RGB image; Trouble where it cannot be read."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())
        return open_image(self.root / self.names[index])


def open_image(path):
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)          # far too large: named like the others
            with Image.open(path) as image:
                image = ImageOps.exif_transpose(image)                              # upright
                if image.mode.startswith("I"):     # 16 bits
                    image = Image.fromarray((np.asarray(image) / 257).clip(0, 255).astype(np.uint8))
                return image.convert("RGB")
    except Exception as error:                     # PIL raises OSError, SyntaxError, ValueError, DecompressionBombError
        raise Trouble(f"{path} cannot be read as an image ({' '.join(str(error).split())}); "
                      f"mend or remove it, or leave such images out with --skip-bad") from None


def square(image, size):
    """The central square of a PIL image, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    return image.resize((size, size), Image.Resampling.BICUBIC, box=(left, top, left + side, top + side))


def to_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)                       # (3, H, W) uint8


def load_images(dataset, data_dir, split, image_size, limit=None, skip_bad=False):
    """Reads one of the data sets: shapes, cifar10, cifar100, imagenet or folder.

    Args:
        data_dir: where it lies. CIFAR is downloaded there, unless it has a train/ folder: then it is read as a folder.
        split: "train" or "test" (val/ is looked for as well).
        image_size: S; folders of pictures are read into memory up to IN_MEMORY_SIZE.
        limit: use so many images, evenly spaced over the set.
    Returns:
        Images.
    Raises:
        Trouble: the data is not there or cannot be read.
    """
    if dataset == "shapes":
        import shapes
        scenes = shapes.split(split)
        images = Images([f"{split}/{i:05d}" for i in range(len(scenes.shape))], scenes.shape, 10, shapes.render(scenes))
    elif dataset.startswith("cifar") and not (Path(data_dir) / "train").is_dir():
        images = _read_cifar(dataset, data_dir, split)
    else:
        images = _find_files(Path(data_dir), split)
    if limit is not None and limit < len(images.names):
        keep = spaced(len(images.names), limit)
        images = images._replace(names=[images.names[i] for i in keep.tolist()], labels=images.labels[keep],
                                 pixels=None if images.pixels is None else images.pixels[keep])
    return into_memory(images, image_size, skip_bad) if images.pixels is None and image_size <= IN_MEMORY_SIZE else images


def spaced(n, count=None):
    """count places spread evenly over n, or all n, (count,)."""
    return torch.linspace(0, n - 1, min(n, count or n), dtype=torch.double).round().long()     # in floats some would come twice


def _read_cifar(dataset, data_dir, split):
    reader = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}[dataset]
    downloads = int(os.environ.get("LOCAL_RANK", 0)) == 0                  # one process of each machine, then the others
    if dist.is_initialized() and not downloads:
        dist.barrier()
    try:
        data = reader(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        raise Trouble(f"{dataset} is not in {data_dir} and could not be downloaded ({type(error).__name__}): put its "
                      f"{reader.filename} there, or name an image folder with train/ and test/ by --data-dir; "
                      f"--dataset shapes needs no download") from None
    if dist.is_initialized() and downloads:
        dist.barrier()
    return Images([f"{split}/{i:05d}" for i in range(len(data))], torch.tensor(data.targets), len(data.classes),
                  torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous())


def _find_files(root, split):
    folder = next((root / s for s in ([split] if split == "train" else ["val", "test"]) if (root / s).is_dir()), None)
    if folder is None:
        raise Trouble(f"no images for the {split} split: {root} needs train/ and val/ or test/ below it, "
                      f"a folder a class (--data-dir)")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir())
    names, labels = [], []
    for label, name in enumerate(classes):
        files = sorted(Path(base, file) for base, _, found in os.walk(folder / name) for file in found)
        names += [str(f.relative_to(root)) for f in files if f.suffix.lower() in SUFFIXES]
        labels += [label] * (len(names) - len(labels))
    if not names:
        raise Trouble(f"{folder} holds no images in class folders")
    return Images(names, torch.tensor(labels), len(classes), root=root)


def into_memory(images, image_size, skip_bad):
    good, pixels = [], []
    for i in progress(range(len(images.names)), "reading", "image"):
        try:
            pixels.append(to_tensor(square(images.pil(i), image_size)))
            good.append(i)
        except Trouble as trouble:
            if not skip_bad:
                raise
            print(f"left out: {trouble}", file=sys.stderr)
    if not good:
        raise Trouble(f"none of the {len(images.names)} images below {images.root} can be read")
    return images._replace(names=[images.names[i] for i in good], labels=images.labels[good], pixels=torch.stack(pixels))


def default_data_dir(dataset):
    """Where a data set is looked for without --data-dir."""
    if dataset == "folder":
        raise Trouble("--dataset folder needs --data-dir, a folder with train/ and val/ or test/ below it")
    return "data/imagenet" if dataset == "imagenet" else "data"


def default_views_dir(dataset, data_dir):
    """Where generate_views.py puts the views and train_moco.py looks for them: views/<data set>, for a folder its name."""
    return f"views/{Path(data_dir).resolve().name if dataset == 'folder' else dataset}"


def find_views(images, views_dir, dataset):
    """The generated view of each image: a list of N paths, None where an image has none.

    A view lies in views_dir under the relative path of its source with a suffix of its own, with or without "train/"
    (the authors' release mirrors ImageNet's train folder).

    Raises:
        Trouble: the folder is missing, was made for another data set, or holds a view of none of the images.
    """
    views_dir = Path(views_dir)
    if not views_dir.is_dir():
        raise Trouble(f"there are no generated views: {views_dir} is no folder; generate_views.py makes them, "
                      f"--views-dir none trains without")
    settings = views_dir / "settings.json"         # not in a folder of the release
    made_for = read_settings(settings) if settings.exists() else {}
    same = made_for.get("dataset", dataset) == dataset and made_for.get("classes", images.num_classes) == images.num_classes
    files = {}
    for base, _, found in os.walk(views_dir):
        for file in found:
            if Path(file).suffix.lower() in SUFFIXES:
                files[str((Path(base) / file).relative_to(views_dir).with_suffix(""))] = Path(base, file)
    keys = [str(Path(name).with_suffix("")) for name in images.names]
    paths = [files.get(key) or files.get(key.removeprefix("train/")) for key in keys]
    if not same or not any(paths):
        raise Trouble(f"{views_dir} holds no views of these images: the data set is {dataset} with {images.num_classes} "
                      f"classes, the folder has {len(files)} pictures, made for {made_for.get('dataset', 'what is not known')} "
                      f"with {made_for.get('classes', 'unknown')} classes")
    return paths


def read_settings(path):
    """The settings of a views folder, a dict; Trouble where the file is not generate_views.py's."""
    try:
        settings = json.loads(path.read_text())
        if not isinstance(settings, dict):
            raise ValueError("no settings in it")
        return settings
    except ValueError as error:
        raise Trouble(f"{path} is damaged or not by generate_views.py ({error}): remove that folder or name another") from None


def load_views(images, paths, skip_bad=False):
    """The generated views of small images as a tensor like images.pixels; an image without one is its own view."""
    views = images.pixels.clone()
    for i, path in enumerate(progress(paths, "reading views", "view")):
        try:
            if path is not None:
                views[i] = to_tensor(square(open_image(path), views.shape[-1]))
        except Trouble:
            if not skip_bad:
                raise
    return views                                                                    # (N, 3, S, S) uint8


# --------------------------------------------------------------------------------------------------------- augmentation

class Augmentation(NamedTuple):
    """A random augmentation t of MoCo: crop and flip always, the rest with the given probabilities and strengths."""
    scale: tuple = (0.2, 1.0)                      # share of the image's area in the crop
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)           # brightness, contrast, saturation, hue; with probability 0.8
    blur: float = 0.5                              # probability; sigma in [0.1, 2] pixels
    solarise: float = 0.0                          # probability
    size: int = None                               # side of the view in pixels; None: the loader's


CROP_TRIES = 10                                    # of torchvision's RandomResizedCrop; then the central square (there one of
                                                   # ratio 3/4 or 4/3: it matters for very long pictures alone)
COLUMNS = 4 * CROP_TRIES + 11                      # random numbers a view takes: crop, which is generated, the rest


def crop_boxes(u, height, width, scale):
    """Random crops: aspect ratio 3/4 to 4/3, the first of ten tries that fits, else the central square.

    Args:
        u: (N, CROP_TRIES, 4) uniform in [0, 1).
        scale: (smallest, largest) share of the image's area.
    Returns:
        (N, 4) boxes x1, y1, x2, y2 in pixels, not rounded to whole ones.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])          # (N, tries)
    ratio = torch.exp((2 * u[..., 1] - 1) * np.log(4 / 3))
    w, h = (area * ratio).sqrt(), (area / ratio).sqrt()
    fits = (w <= width) & (h <= height)
    pick = torch.arange(len(u), device=u.device), fits.int().argmax(1)              # the first that fits
    side = torch.full((), float(min(height, width)), device=u.device)
    any_fits = fits.any(1)
    w, h = torch.where(any_fits, w[pick], side), torch.where(any_fits, h[pick], side)
    left = (width - w) * torch.where(any_fits, u[..., 2][pick], 0.5)
    top = (height - h) * torch.where(any_fits, u[..., 3][pick], 0.5)
    return torch.stack([left, top, left + w, top + h], 1)


def crop(pixels, boxes, size):
    """Crops boxes (N, 4) out of pixels (N, 3, H, W), each resized to size x size by bilinear interpolation."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    return roi_align(pixels.float(), torch.cat([index, boxes], 1), size, sampling_ratio=1, aligned=True)


def recolour(x, u, order, augmentation):
    """All of an augmentation but the crop, for a batch: every image has its own random numbers.

    Args:
        x: (N, 3, S, S) in [0, 1], changed in place.
        u: (N, 10) uniform in [0, 1).
        order: a permutation of 0..3, the order of the four jitters (one a batch; torchvision draws one an image).
    Returns:
        (N, 3, S, S), normalised with CLIP's mean and standard deviation.
    """
    strength = constant(augmentation.jitter, x.device) * (u[:, :1] < 0.8)           # (N, 4), 0: leaves the image alone
    factor = (2 * u[:, 1:5] - 1) * strength                                         # (N, 4)
    for jitter in order:
        f = factor[:, jitter, None, None, None]
        if jitter == 0:
            x = x.mul_(1 + f).clamp_(0, 1)                                          # brightness
        elif jitter == 1:
            x = x.lerp_(grey(x).mean((2, 3), keepdim=True), -f).clamp_(0, 1)        # contrast
        elif jitter == 2:
            x = x.lerp_(grey(x), -f).clamp_(0, 1)                                   # saturation
        elif augmentation.jitter[3]:
            x = shift_hue(x, f)
    x = x.lerp_(grey(x), (u[:, 5] < 0.2).to(x.dtype)[:, None, None, None])          # grey, probability 0.2
    if augmentation.blur:
        x = torch.where((u[:, 6] < augmentation.blur)[:, None, None, None], blur(x, 0.1 + 1.9 * u[:, 7]), x)
    if augmentation.solarise:
        x = torch.where((u[:, 8] < augmentation.solarise)[:, None, None, None] & (x >= 0.5), 1 - x, x)
    x = torch.where((u[:, 9] < 0.5)[:, None, None, None], x.flip(3), x)             # mirrored, probability 0.5
    return normalise(x)


def grey(x):
    """ITU-R 601 luma, (N, 3, H, W) -> (N, 1, H, W)."""
    return x[:, :1] * 0.2989 + x[:, 1:2] * 0.587 + x[:, 2:] * 0.114


def shift_hue(x, turn):
    """Turns the hue of x (N, 3, H, W) in [0, 1] by turn (N, 1, 1, 1) full circles, in HSV space."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp_min(1e-8)
    hue = torch.where(value == r, (g - b) / safe, torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe))
    k = (constant((5.0, 3.0, 1.0), x.device).view(1, 3, 1, 1) + (hue[:, None] + 6 * turn)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(x, sigma):
    """Gaussian blur of x (N, 3, S, S), sigma (N,) in pixels: rows and columns are each one small matrix product."""
    position = torch.arange(x.shape[-1], device=x.device)
    kernel = torch.exp(-(position[:, None] - position).square() / (2 * sigma.square()[:, None, None]))
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]                        # (N, 1, S, S), each row sums to 1
    return kernel @ x @ kernel.mT


def normalise(x):
    mean, std = (constant(values, x.device).to(x.dtype).view(3, 1, 1) for values in (CLIP_MEAN, CLIP_STD))
    return (x - mean) / std


@functools.lru_cache
@torch.inference_mode(False)                       # else of no use where gradients are wanted
def constant(values, device):
    """A few numbers on the device, copied there once: each copy makes a GPU finish its work before it gets more."""
    return torch.tensor(values, dtype=torch.float32, device=device)


def step_generator(*numbers):
    """A generator that depends on the given whole numbers (seed, epoch, step, ...) alone."""
    seed = int.from_bytes(np.random.SeedSequence(numbers).generate_state(2).tobytes(), "little")
    return torch.Generator().manual_seed(seed & (2 ** 63 - 1))


class Place(NamedTuple):
    """Which parts of which pictures the views of a batch are: all that --quality cached needs to know."""
    row: torch.Tensor                              # (n,) i for image X_i, N + i for its generated view
    box: torch.Tensor                              # (n, 4) x1, y1, x2, y2 of the crop, as shares of width and height


class PairLoader:
    """The positive pairs P_i1 = t1(X_i), P_i2 = t2(X_i^+) of the paper (section "framework"), in batches.

    Which of the two views is the generated one is drawn for each sample. With more augmentations than two (SwAV's small
    crops), further views are taken in turn from the pictures of the first and the second. Every random number depends on
    seed, epoch, step and place in the batch alone (for files: crops on the image instead): not on processes or
    interruptions.
    """

    def __init__(self, images, views, augmentations, image_size, batch_size, seed, world, workers=4, skip_bad=False):
        """views: (N, 3, S, S) for images in memory, a list of paths for files, or None for plain pairs of one image.
        batch_size: of all processes together."""
        self.images, self.views, self.augmentations, self.image_size = images, views, augmentations, image_size
        self.batch_size, self.seed, self.world, self.workers = batch_size, seed, world, workers
        self.skip_bad = skip_bad
        self.steps = len(images.names) // batch_size
        if images.pixels is not None:              # small enough for the device's own memory
            self.pixels = images.pixels.to(world.device)
            self.others = self.pixels if views is None else views.to(world.device)

    def epoch(self, epoch, start=0):
        """Yields index (n,), the views, each (n, 3, S, S), and their Places: this process's share of each batch from step
        start on."""
        for index, crops, u, orders, places in self.crops(epoch, start):
            yield index, [recolour(x, u[:, v], orders[v], self.augmentations[v]) for v, x in enumerate(crops)], places

    def crops(self, epoch, start=0):
        """The same before the colours: index (n,), V crops (n, 3, S, S) in [0, 1], and for recolour u (n, V, 10) and V
        orders; the V Places."""
        order = torch.randperm(len(self.images.names), generator=step_generator(self.seed, epoch))
        n = self.batch_size // self.world.size
        share = slice(self.world.rank * n, (self.world.rank + 1) * n)
        batches = [order[i * self.batch_size:][:self.batch_size][share] for i in range(start, self.steps)]
        crops = self._crops_in_memory if self.images.pixels is not None else self._crops_of_files
        draws = (self._draw(epoch, step, share) for step in range(start, self.steps))
        for index, (_, u, orders), views, boxes, generated in crops(batches, draws, epoch):
            rows = index[:, None] + len(self.images.names) * generated              # (n, V)
            yield index, views, u[:, :, -10:], orders, [Place(rows[:, v], boxes[:, v]) for v in range(len(views))]

    def _draw(self, epoch, step, share):
        """All random numbers of a step, the same in every process: (n, V views, COLUMNS) of this one's share."""
        generator = step_generator(self.seed, epoch, step)
        orders = [torch.randperm(4, generator=generator).tolist() for _ in self.augmentations]
        u = torch.rand(self.batch_size, len(self.augmentations), COLUMNS, generator=generator)[share]
        first = u[:, 0, -11] < 0.5                 # pictures in memory: the generated one is view 1
        return first, u.to(self.world.device, non_blocking=True), orders

    def _crops_in_memory(self, batches, draws, epoch):
        for index, (first, u, orders) in zip(batches, draws):
            on_device, swap = (x.to(self.pixels.device, non_blocking=True) for x in (index, first[:, None, None, None]))
            image, other = self.pixels[on_device], self.others[on_device]           # X_i, X_i^+
            pair = torch.where(swap, other, image), torch.where(swap, image, other)
            boxes = [crop_boxes(u[:, v, :-11].unflatten(1, (CROP_TRIES, 4)), *image.shape[2:], t.scale)
                     for v, t in enumerate(self.augmentations)]
            views = [crop(pair[v % 2], boxes[v], t.size or self.image_size) / 255 for v, t in enumerate(self.augmentations)]
            shares = torch.stack(boxes, 1) / constant((float(image.shape[3]), float(image.shape[2])) * 2, image.device)
            generated = torch.stack([~first if v % 2 else first for v in range(len(views))], 1)
            yield index, (first, u, orders), views, shares, generated & (self.others is not self.pixels)

    def _crops_of_files(self, batches, draws, epoch):
        dataset = CropPairs(self.images, self.views, self.augmentations, self.image_size, self.seed, epoch, self.skip_bad)
        loader = torch.utils.data.DataLoader(dataset, batch_sampler=[b.tolist() for b in batches], num_workers=self.workers,
                                             pin_memory=self.world.device.type == "cuda", worker_init_fn=ignore_sigterm)
        for (index, *views, boxes, generated), draw in zip(loader, draws):
            views = [x.to(self.world.device, non_blocking=True).float() / 255 for x in views]
            yield index, draw, views, boxes.to(self.world.device, non_blocking=True), generated


def ignore_sigterm(_):
    """For a loader's processes: clusters send SIGTERM to all, but the main process decides when it has saved."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register
def _end_readers():
    """Those that are left, after an error: multiprocessing would send them SIGTERM and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)                               # torch's would call it an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


class CropPairs(torch.utils.data.Dataset):
    """The same pairs for large images: workers decode and crop the files, the rest follows in batches on the device."""

    def __init__(self, images, views, augmentations, image_size, seed, epoch, skip_bad):
        self.images, self.views, self.augmentations, self.image_size = images, views, augmentations, image_size
        self.seed, self.epoch, self.skip_bad = seed, epoch, skip_bad

    def __getitem__(self, index):
        u = torch.rand(len(self.augmentations), COLUMNS, generator=step_generator(self.seed, self.epoch, index, 1))
        try:
            image = other = self.images.pil(index)
            if self.views is not None and self.views[index] is not None:
                other = open_image(self.views[index])
        except Trouble:
            if not self.skip_bad:
                raise
            return self[(index + 1) % len(self.images.names)]
        first = bool(u[0, -11] < 0.5)              # the generated one is view 1
        views, boxes = [], []
        for v, t in enumerate(self.augmentations):
            x = other if (v % 2 == 0) == first else image
            box = crop_boxes(u[v, None, :-11].unflatten(1, (CROP_TRIES, 4)), x.height, x.width, t.scale)[0]
            size = (t.size or self.image_size,) * 2
            views.append(to_tensor(x.resize(size, Image.Resampling.BILINEAR, box=tuple(box.tolist()))))
            boxes.append(box / box.new_tensor([x.width, x.height, x.width, x.height]))
        generated = torch.tensor([(v % 2 == 0) == first for v in range(len(views))])
        return index, *views, torch.stack(boxes), generated & (self.views is not None)


# ----------------------------------------------------------------------------------- the frozen encoder and its foreground

def mini():
    """The folder that "mini" names; Trouble where it is not there."""
    if not MINI.is_dir():
        raise Trouble(f"there is no {MINI.parent.name}/{MINI.name} here: train_generator.py trains such a generator, whose "
                      f"folder can be named instead of mini")
    return MINI


def clip_tokens(vision_model, hidden):
    """Patch tokens of a CLIP vision model: last hidden state (N, 1 + T, K) -> (N, T, K), final layer norm applied to each,
    class token left out (section "adaptive view generation", step 1)."""
    return vision_model.post_layernorm(hidden[:, 1:])


class FrozenEncoder(torch.nn.Module):
    """E: a frozen vision model of transformers, by hub id, local folder or "mini": views (N, 3, S, S) -> features (N, T, K).

    Views of another size than the model's are resized to it.
    """

    def __init__(self, name):
        """Raises Trouble where the model is neither on this disk nor to be had."""
        super().__init__()
        from transformers import AutoConfig, AutoModel, CLIPVisionModel, logging
        logging.set_verbosity_error()              # no report on the projection that is left out on purpose
        logging.disable_progress_bar()
        name = mini() / "image_encoder" if name == "mini" else name
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)      # nor ask whether to
            is_clip = config.model_type in ("clip", "clip_vision_model")
            self.model = (CLIPVisionModel if is_clip else AutoModel).from_pretrained(name, trust_remote_code=False).float()    # halves, too
            self.size = getattr(config, "vision_config", config).image_size if is_clip else 224
            self.is_clip = is_clip
            self(torch.zeros(1, 3, self.size, self.size))                           # does it look at pictures?
        except Exception as error:                 # of several libraries, as in generate_views.load_pipeline
            raise Trouble(f"the encoder {name} could not be loaded ({type(error).__name__}): download it where there is a "
                          f"network and name its folder by --encoder (timm's models need timm), or train with --quality off; "
                          f"--dataset shapes needs no download") from None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, views):
        if views.shape[-1] != self.size:
            views = F.interpolate(views, size=(self.size, self.size), mode="bilinear", antialias=True)
        hidden = self.model(pixel_values=views).last_hidden_state
        if self.is_clip:
            return clip_tokens(getattr(self.model, "vision_model", self.model), hidden)
        if hidden.ndim == 4:                       # a convnet's map (N, K, H, W)
            return hidden.flatten(2).mT
        return hidden[:, hidden.shape[1] - math.isqrt(hidden.shape[1]) ** 2:]       # without class and register tokens


def fit_foreground(tokens, grid, fraction=0.4):
    """First principal component of the tokens, turned to the foreground, and the threshold alpha (Eq. 7).

    Args:
        tokens: (N, T, K) of images drawn from the data set, laid out row by row on grid.
        grid: (rows, columns), rows * columns = T.
        fraction: alpha is the quantile that makes this share of all tokens foreground.
    Returns:
        component v1 (K,) float32 of unit length, threshold alpha, a float.
    Raises:
        ValueError: tokens and grid do not fit.
    Source: section "adaptive view generation", steps 2 and 3.
    """
    if tokens.ndim != 3 or grid[0] * grid[1] != tokens.shape[1]:
        raise ValueError(f"tokens must be (N, {grid[0] * grid[1]}, K) for the grid {tuple(grid)}, got {tuple(tokens.shape)}")
    v1 = torch.linalg.eigh(moments(tokens)[1])[1][:, -1].float()       # eigh sorts upwards: the last has the largest eigenvalue
    return orient_foreground(v1, tokens, grid, fraction)


def moments(tokens):
    """Mean (K,) and covariance (K, K) of tokens (N, T, K), in float64."""
    shift = tokens[:256].float().mean((0, 1))      # near enough to the mean to keep the sums below precise
    first, second = 0.0, 0.0
    for part in tokens.split(256):                 # in parts: the tokens may be half precision, and large
        x = part.float().flatten(0, 1) - shift                                      # (n T, K)
        first, second = first + x.double().sum(0), second + (x.T @ x).double()
    count = tokens.shape[0] * tokens.shape[1]
    return shift + first / count, second / count - torch.outer(first, first) / count ** 2


def orient_foreground(component, tokens, grid, fraction=0.4):
    """The sign of a component is arbitrary: the foreground side is the one more frequent at the centre of the images than
    along their border. Arguments and returns as in fit_foreground, with the component given, of any length."""
    v1 = component.float() / component.float().norm()
    a = torch.cat([part.float() @ v1 for part in tokens.split(256)])                # a_ij = <token_ij, v1>   (N, T)
    rows, columns = (torch.arange(n, device=a.device) for n in grid)
    border = ((rows == 0) | (rows == grid[0] - 1))[:, None] | ((columns == 0) | (columns == grid[1] - 1))
    border = border.flatten()                                                       # (T,)

    def centrality(a):
        alpha = _quantile(a, 1 - fraction)
        frequency = (a > alpha).float().mean(0)                                     # (T,)
        return (frequency[~border].mean() - frequency[border].mean()).nan_to_num(), alpha
    (plus, alpha), (minus, minus_alpha) = centrality(a), centrality(-a)
    return (v1, alpha) if plus >= minus else (-v1, minus_alpha)


def _quantile(a, q):
    """torch.quantile takes 16 million numbers at the most; 10,000 images of 256 tokens are 2.6."""
    return torch.quantile(a.flatten()[:: 1 + a.numel() // 16_000_000], q).item()


def load_component(path, size=None):
    """Reads a component: foreground.npz, or the release's pca_vectors.npy of shape (K, 1), which has no threshold.

    Returns: component (K,), threshold or None. Raises Trouble where the file or its size is wrong.
    """
    try:
        data = np.load(path, allow_pickle=False)
        is_npz = isinstance(data, np.lib.npyio.NpzFile)
        component = torch.from_numpy(np.asarray(data["component"] if is_npz else data)).float().flatten()
        threshold = float(data["threshold"]) if is_npz else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise Trouble(f"{path} is no component file ({error}); it must be a foreground.npz or a pca_vectors.npy") from None
    if not (component.isfinite().all() and component.any()):
        raise Trouble(f"{path} holds no usable component: it is all zeros or not finite")
    if size is not None and len(component) != size:
        raise Trouble(f"{path} has a component of {len(component)} numbers, the encoder's features have {size}: "
                      f"it was fitted on another encoder")
    return component, threshold


def make_backbone(arch, image_size, zero_init_residual=False):
    """A torchvision network without its classifier: pictures (N, 3, S, S) -> features (N, D).

    Args:
        arch: its name in torchvision, one with a last layer called fc, such as resnet50; resnet10_narrow, or one of VITS.
        image_size: S. Up to IN_MEMORY_SIZE a ResNet has a 3x3 stride-1 first convolution and no max-pooling, as is usual on
            CIFAR, and a vision transformer patches of 4 pixels instead of 16.
        zero_init_residual: torchvision's ResNets begin with each block doing nothing, as in MoCo v3, BYOL and SimSiam.
    Returns:
        backbone, D.
    """
    small_stem = image_size <= IN_MEMORY_SIZE
    if arch == "resnet10_narrow":
        return narrow_resnet(), 128
    if arch in VITS:
        return vision_transformer(*VITS[arch], patch=4 if small_stem else 16, image_size=image_size), VITS[arch][0]
    known = arch in torchvision.models.list_models(module=torchvision.models)       # classifiers only
    more = dict(zero_init_residual=True) if zero_init_residual and "res" in arch else {}
    backbone = torchvision.models.get_model(arch, weights=None, **more) if known else None
    fits = isinstance(backbone, torchvision.models.ResNet) if small_stem else (
        hasattr(backbone, "fc") and not getattr(backbone, "aux_logits", False))
    if not fits:
        raise Trouble(f"--arch {arch} does not work here{' with the stem for small pictures' if small_stem else ''}: "
                      f"take one of torchvision's ResNets (resnet18, resnet34, resnet50, resnext50_32x4d, wide_resnet50_2) "
                      f"or {', '.join(VITS)}")
    dim, backbone.fc = backbone.fc.in_features, torch.nn.Identity()
    if small_stem:
        backbone.conv1 = torch.nn.Conv2d(3, backbone.conv1.out_channels, 3, padding=1, bias=False)
        torch.nn.init.kaiming_normal_(backbone.conv1.weight, mode="fan_out", nonlinearity="relu")   # as torchvision's
        backbone.maxpool = torch.nn.Identity()
    return backbone, dim


VITS = {"vit_small": (384, 12, 12), "vit_base": (768, 12, 12), "vit_narrow": (96, 4, 3)}   # width, layers, heads; narrow: shapes


def vision_transformer(width, layers, heads, patch, image_size):
    """torchvision's ViT as MoCo v3 trains it (Chen et al. 2021): fixed sine-cosine positions, a patch projection that stays
    random, since its gradients are what makes the training unstable, and each of q, k, v started as a matrix of its own."""
    if image_size % patch:
        raise Trouble(f"--image-size {image_size} is no multiple of the vision transformer's patches of {patch} pixels")
    vit = torchvision.models.VisionTransformer(image_size, patch, layers, heads, width, 4 * width)
    vit.heads = torch.nn.Identity()
    xavier = lambda weight, out: torch.nn.init.uniform_(weight, -(6 / (weight[0].numel() + out)) ** 0.5,
                                                        (6 / (weight[0].numel() + out)) ** 0.5)
    for layer in vit.encoder.layers:
        xavier(layer.self_attention.in_proj_weight, width)
        xavier(layer.self_attention.out_proj.weight, width)
        for linear in (layer.mlp[0], layer.mlp[3]):
            torch.nn.init.zeros_(linear.bias)
    xavier(vit.conv_proj.weight, width)
    torch.nn.init.normal_(vit.class_token, std=1e-6)
    vit.encoder.pos_embedding.data = sine_positions(width, image_size // patch)
    for fixed in (vit.encoder.pos_embedding, *vit.conv_proj.parameters()):
        fixed.requires_grad_(False)
    return vit


def sine_positions(width, side, longest=10_000.0):
    """(1, 1 + side * side, width): a quarter of the numbers each for sine and cosine of the column, sine and cosine of the
    row, at frequencies from 1 to 1 / longest; zeros for the class token."""
    frequency = longest ** -(torch.arange(width // 4) / (width // 4))
    row, column = (x.flatten()[:, None] * frequency for x in torch.meshgrid(*[torch.arange(side)] * 2, indexing="ij"))
    positions = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    return torch.cat([torch.zeros(1, width), positions])[None]


def narrow_resnet(width=16):
    """A ResNet-10 of a quarter of the usual width for 32 x 32 pixels, some 20 times cheaper than a ResNet-18: for shapes."""
    from torchvision.models.resnet import BasicBlock
    layers = [torch.nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), torch.nn.BatchNorm2d(width), torch.nn.ReLU()]
    for i, (a, b) in enumerate([(width, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)]):
        shortcut = torch.nn.Sequential(torch.nn.Conv2d(a, b, 1, stride=2, bias=False), torch.nn.BatchNorm2d(b)) if i else None
        layers.append(BasicBlock(a, b, stride=2 if i else 1, downsample=shortcut))
    for m in (m for layer in layers for m in layer.modules() if isinstance(m, torch.nn.Conv2d)):
        torch.nn.init.kaiming_normal_(m.weight, mode="fan_out", nonlinearity="relu")                # as torchvision's
    return torch.nn.Sequential(*layers, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())


# --------------------------------------------------------------------------------- devices, processes, files and progress

class World(NamedTuple):
    """This process among all: torchrun's environment, or one process alone."""
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype                             # of autocast; float32: none

    @property
    def group(self):
        return dist.group.WORLD if self.size > 1 else None

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, x):
        """x of all processes, one after the other in order of rank; no gradient."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def any(self, x):
        """Is x true in any process?"""
        if self.size == 1:
            return bool(x)
        flag = torch.tensor(float(x), device=self.device)
        dist.all_reduce(flag, dist.ReduceOp.MAX)
        return bool(flag)

    def gather_objects(self, x):
        """A list of x of all processes."""
        everywhere = [x] * self.size
        if self.size > 1:
            dist.all_gather_object(everywhere, x)
        return everywhere

    def wait(self):
        if self.size > 1:
            dist.barrier()


def setup(device=None, patience=datetime.timedelta(minutes=30)):
    """Picks the device (cuda, else mps, else cpu), starts the process group under torchrun. Returns World.
    patience: how long processes wait for each other before they give up."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    kind = device or ("cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu")
    try:
        chosen = torch.device(kind, local_rank) if kind == "cuda" else torch.device(kind)
        torch.empty(1, device=chosen)
        if chosen.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("not tried")
        if chosen.type == "cuda" and torch.cuda.device_count() < int(os.environ.get("LOCAL_WORLD_SIZE", 1)):
            raise RuntimeError(f"{torch.cuda.device_count()} GPUs for {os.environ['LOCAL_WORLD_SIZE']} processes")
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(": ")[0]
        raise Trouble(f"--device {kind} is not to be had here ({why}): take cuda, mps or cpu") from None
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    elif chosen.type == "cpu":
        _keep_memory()
        torch.backends.cuda.enable_flash_sdp(False)            # the switch is CPUs', too: small ViTs train twice as fast without
    size = int(os.environ.get("WORLD_SIZE", 1))
    if size > 1:
        _store[:] = next(dist.rendezvous("env://", timeout=patience))[:1]
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=_store[0], rank=int(os.environ["RANK"]),
                                world_size=size, timeout=patience)
    return World(int(os.environ.get("RANK", 0)), size, chosen, fast_dtype(chosen))


def _keep_memory():
    """Linux's malloc gives blocks above 32 MB back after each use and gets them cleared again at the next: a seventh of the
    time of a training step on a CPU, with large batches 40%. This makes it keep them (mallopt's M_MMAP_THRESHOLD and
    M_TRIM_THRESHOLD)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):                   # elsewhere there is no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)
        libc.mallopt(-1, 2 ** 31 - 1)


def fast_dtype(device):
    """bfloat16 where it is faster: recent GPUs, and CPUs with AMX or AVX512-BF16; else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        features = torch.cpu.get_capabilities() if device.type == "cpu" and hasattr(torch.cpu, "get_capabilities") else {}
        fast = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def write_whole(path, write, previous=None, needed=None):
    """Calls write(temporary path) and renames the result to path: the file appears whole or not at all.

    needed: bytes, to be told where the disk is full; None: as many as the file there has.
    previous: for checkpoints, where to the file goes that was there before, once the new one is on the disk. It has both
    names for a moment, so that path never lacks a file; where there are no hard links, it does for that moment.
    Raises Trouble where the file cannot be written; what was there stays.
    """
    path = Path(path)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)          # it might be a stranger's link
        write(temporary)
        if previous:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        if previous and path.exists():
            second = previous.with_name(f"{previous.name}.{os.getpid()}.tmp")
            second.unlink(missing_ok=True)
            try:
                os.link(path, second)
            except OSError:
                second = path
            os.replace(second, previous)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:       # RuntimeError: torch.save's
        if not isinstance(error, OSError) and not re.search("writ|iostream|inline_container", str(error)):
            raise
        why, code = getattr(error, "strerror", None) or "the disk is full?", getattr(error, "errno", None)
        if code not in (None, errno.ENOSPC, errno.EFBIG, errno.EDQUOT):
            raise Trouble(f"{path} could not be written ({why}): name another folder") from None
        raise full_disk(path, why, needed or (path.stat().st_size if path.exists() else None)) from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def full_disk(path, why, needed=None):
    """Trouble: path could not be written; needed: bytes, where that is known."""
    there = next(p for p in path.absolute().parents if p.exists())
    needed = f", about {max(needed / 1e6, 0.01):.2f} MB are needed" if needed else ""
    return Trouble(f"{path} could not be written ({why}): {shutil.disk_usage(there).free / 1e6:.1f} MB are free in {there}{needed}")


def append(path, text, needed=None):
    """One write to the end of a file: lines of several processes do not mix. A link is not followed. needed: see write_whole."""
    path, content = Path(path), text.encode()
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    try:
        whole, why = os.write(file, content) == len(content), "the disk is full"
    except OSError as error:
        whole, why = False, error.strerror
    finally:
        os.close(file)
    if not whole:
        raise full_disk(path, why, needed)


def sweep(folder, pattern="*.tmp", seconds=3600):
    """Removes the temporary files in and below a folder that a kill left behind: those that nobody has touched for so long."""
    for path in Path(folder).rglob(pattern):
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime >= seconds:
                path.unlink()


def load_checkpoint(path):
    """torch.load for files from anywhere: never unpickles code; Trouble where the file is none of ours or damaged."""
    try:
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):       # torch.save writes checksums
            raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:                     # torch raises OSError, UnpicklingError, RuntimeError, EOFError, KeyError
        raise Trouble(f"{path} cannot be loaded as a checkpoint ({str(error).splitlines()[0] if str(error) else 'empty'}); "
                      f"name a last.pt or backbone.pt by its path") from None


def at_least(least):
    """A type for argparse: whole numbers from least to 10^12."""
    def number(text):
        if int(text) < least:
            raise argparse.ArgumentTypeError(f"{text} is less than {least}")
        if int(text) > 10 ** 12:
            raise argparse.ArgumentTypeError(f"{text} is too large")
        return int(text)
    number.__name__ = "whole number"               # argparse says: invalid whole number value
    return number


def say(text):
    """Prints, flushed, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def progress(items, text, unit, **options):
    """A progress bar with rate and time left; in a log file a line every half minute instead."""
    from tqdm import tqdm
    if not sys.stderr.isatty():
        options |= dict(mininterval=30, maxinterval=30, delay=30,
                        bar_format="{desc}: {n_fmt}/{total_fmt} {rate_fmt} {remaining} left\n")
    return tqdm(items, desc=text, unit=unit, leave=False, disable=int(os.environ.get("RANK", 0)) > 0, **options)
