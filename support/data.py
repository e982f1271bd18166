"""Image folders, CIFAR and generated views on the disk -> Images."""
import io
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torchvision
from PIL import Image, ImageOps

from support.command_line import UserError, progress, say
from support.files import append, read_settings, sweep, write_json, write_whole

IN_MEMORY_SIZE = 64   # images up to this side are kept in memory, as one uint8 tensor
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}


class Images(NamedTuple):
    """A labelled set of N images: small ones in memory, large ones as files."""
    names: list                     # relative to the data folder: "train/cat/0001.jpg"
    labels: torch.Tensor            # (N,)
    num_classes: int
    pixels: torch.Tensor = None     # (N, 3, S, S) uint8, or None: read the files below root
    root: Path = None
    source: str = ""                # number and digest of all names of the set, before a limit

    def pil(self, index):
        """The image as PIL's RGB image; UserError where it cannot be read."""
        if self.pixels is not None:
            return Image.fromarray(self.pixels[index].permute(1, 2, 0).numpy())
        return open_image(self.root / self.names[index])

    def spaced(self, count):
        """So many of the images at most, evenly spaced over the set."""
        return self if count >= len(self.names) else self.take(spaced(len(self.names), count))

    def take(self, index):
        """The images of index (n,), as Images."""
        pixels = None if self.pixels is None else self.pixels[index]
        names = [self.names[i] for i in index.tolist()]
        return self._replace(names=names, labels=self.labels[index], pixels=pixels)


def open_image(path, upright=True):
    """An image file as PIL's RGB image, upright (or as it is stored); UserError where it cannot be
    read."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)   # a far too large image
            with Image.open(path) as image:
                if upright:
                    image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):     # 16 bits
                    scaled = (np.asarray(image) / 257).clip(0, 255)
                    image = Image.fromarray(scaled.astype(np.uint8))
                return image.convert("RGB")
    except Exception as error:                     # PIL raises many kinds
        raise UserError(f"{path} cannot be read as an image ({' '.join(str(error).split())}); "
                        f"repair or remove it") from None


def advise_skip_bad(error):
    """The error of open_image with a further way out, where the script has this flag."""
    return UserError(f"{error}, or leave such images out with --skip-bad")


def square(image, size):
    """The central square of a PIL image, resized to size x size."""
    side = min(image.size)
    left, top = (image.width - side) / 2, (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_tensor(image):
    """PIL's RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def spaced(n, count=None):
    """count places spread evenly over n, or all n, (count,)."""
    places = torch.linspace(0, n - 1, min(n, count or n), dtype=torch.double)   # float repeats some
    return places.round().long()


def read_cifar(dataset, data_dir, split):
    """CIFAR by torchvision; one process of each machine downloads it, then the others read it."""
    kinds = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    reader = kinds[dataset]
    downloads = int(os.environ.get("LOCAL_RANK", 0)) == 0
    if dist.is_initialized() and not downloads:
        dist.barrier()
    try:
        data = reader(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        archive = Path(data_dir, reader.filename)
        if archive.exists():
            raise UserError(f"{archive} is damaged: remove it to have it downloaded") from None
        raise UserError(f"{dataset} is not in {data_dir} and could not be downloaded "
                        f"({type(error).__name__}): put its {reader.filename} there, or name an "
                        f"image folder with train/ and test/ by --data-dir; --dataset shapes "
                        f"needs no download") from None
    if dist.is_initialized() and downloads:
        dist.barrier()
    names = [f"{split}/{i:05d}" for i in range(len(data))]
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(names, torch.tensor(data.targets), len(data.classes), pixels)


def find_files(root, split):
    """The image files of a split, a folder a class: train/, or val/ or test/ below root. Classes
    are numbered by the folders of train/: a split that lacks some has the same labels."""
    folder = folder_of_split(root, split)
    here = class_folders(folder)
    train = root / "train"
    classes = class_folders(train) if train.is_dir() else here
    unknown = sorted(set(here) - set(classes))
    if unknown:
        raise UserError(f"{folder} holds classes that {train} does not: {', '.join(unknown[:5])}")
    names = []
    labels = []
    others = []                                    # files that are no images
    for label, name in enumerate(classes):
        for file in sorted(files_below(folder / name)):
            if file.suffix.lower() in SUFFIXES:
                names.append(str(file.relative_to(root)))
                labels.append(label)
            else:
                others.append(file)
    if not names:
        return unlabelled(root, folder, split, others)
    text = f"{folder}: {len(names)} images, {len(here)} of {len(classes)} classes"
    if others:
        text += f"; {len(others)} other files are left out, such as {others[0].name}"
    say(text)
    return Images(names, torch.tensor(labels), len(classes), root=root)


def folder_of_split(root, split):
    """train/, or val/ or test/ below root; UserError where it is not there."""
    for name in ["train"] if split == "train" else ["val", "test"]:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no images for the {split} split: {root} needs train/ and val/ or test/ below "
                    f"it, a folder a class (--data-dir; --knn-every 0 needs no test)")


def unlabelled(root, folder, split, others):
    """Training images that lie in the folder itself, without labels; UserError where there are
    none. others: files in class folders that are no images."""
    loose = sorted(entry.name for entry in os.scandir(folder)
                   if Path(entry.name).suffix.lower() in SUFFIXES)
    if loose and split == "train":
        say(f"{folder}: {len(loose)} images without class folders, hence without labels")
        names = [f"{split}/{name}" for name in loose]
        return Images(names, torch.full((len(loose),), -1), 0, root=root)
    found = ""
    if loose:
        found = f"; the {len(loose)} in it need a folder for each class, named as in train/"
    elif others:
        found = f"; {len(others)} files such as {others[0].name} are not read"
    raise UserError(f"{folder} holds no images in class folders{found} "
                    f"(--knn-every 0 trains without labels)")


def files_below(folder):
    """All files in a folder and below it, behind links to folders, too, in no fixed order."""
    for base, folders, found in os.walk(folder, followlinks=True):
        here = Path(base).resolve()                # a link to a folder above would not end
        folders[:] = [name for name in folders if not here.is_relative_to((here / name).resolve())]
        yield from (Path(base, file) for file in found)


def image_files(folder):
    """The image files among these."""
    return (path for path in files_below(folder) if path.suffix.lower() in SUFFIXES)


def class_folders(folder):
    """The names of the folders in a folder, but hidden ones such as .ipynb_checkpoints."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and not e.name.startswith("."))


def into_memory(images, image_size, skip_bad):
    """Reads files into one tensor of squares; skip_bad: leaves out and names what is unreadable."""
    bar = progress(range(len(images.names)), "reading", "image")
    good, pixels = read_squares(images, bar, image_size, skip_bad)
    if not good:
        raise UserError(f"none of the {len(images.names)} images below {images.root} can be read")
    return images.take(torch.tensor(good))._replace(pixels=torch.stack(pixels))


def read_squares(images, indices, image_size, skip_bad):
    """The squares (3, S, S) of the images at indices, with their indices; skip_bad: without those
    that cannot be read."""
    good = []
    pixels = []
    for i in indices:
        try:
            pixels.append(to_tensor(square(images.pil(i), image_size)))
            good.append(i)
        except UserError as error:
            if not skip_bad:
                raise advise_skip_bad(error) from None
            print(f"left out: {error}", file=sys.stderr)
    return good, pixels


def balanced_subset(labels, fraction, generator):
    """A random part of the images of each class, at least one: sorted indices into labels (N,)."""
    chosen = []
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        members = members[torch.randperm(len(members), generator=generator)]
        chosen.append(members[:max(1, round(fraction * len(members)))])
    return torch.cat(chosen).sort().values


def listed_subset(images, path):
    """The images that a text file lists: sorted indices. A line holds a name, with or without
    folders, and perhaps the number of its class, as OpenSelfSup's and mmselfsup's lists do."""
    wanted = read_list(path)                       # {name: number or None}
    chosen = []
    found = set()
    for i, name in enumerate(images.names):
        spellings = wanted.keys() & {name, name.removeprefix("train/"), Path(name).name}
        if not spellings:
            continue
        label = str(images.labels[i].item())
        if any(wanted[spelling] not in (None, label) for spelling in spellings):
            raise UserError(f"--labels-file {path}: {name} is of another class there than {label}, "
                            f"its folder's place in train/")
        chosen.append(i)
        found |= spellings
    if not chosen or len(chosen) > len(found):
        raise UserError(f"--labels-file {path} lists {len(wanted)} names, of which {len(found)} "
                        f"fit {len(chosen)} images: it must name images of the data set, with "
                        f"their folders where the names alone are not unique")
    missing = len(wanted) - len(found)
    if missing:
        say(f"*** {path}: {missing} of its {len(wanted)} names are not in the data set")
    return torch.tensor(chosen)


def read_list(path):
    """{name: number of its class, as text, or None} of the lines of a text file."""
    try:
        lines = Path(path).read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--labels-file {path} cannot be read as a list ({error})") from None
    wanted = {}
    for line in lines:
        parts = re.fullmatch(r"\s*(.*?\S)(?:\s+(\d+))?\s*", line)
        if parts:
            wanted[parts[1]] = parts[2]
    return wanted


# ---------------------------------------------------------------------- generated views on the disk
def find_views(images, views_dir, dataset):
    """The generated view of each image: a list of N paths, None where an image has none.

    A view lies in views_dir under the relative path of its source with a suffix of its own, with or
    without "train/" (the authors' release mirrors ImageNet's train folder), or all views lie there
    side by side under the name alone. Raises UserError where the folder is missing, was made for
    another data set, holds a view of none of the images, or a name alone fits several.
    """
    views_dir = Path(views_dir)
    if not views_dir.is_dir():
        raise UserError(f"no generated views: {views_dir} is no folder; generate_views.py "
                        f"makes them, --views-dir none trains without")
    files = {str(p.relative_to(views_dir).with_suffix("")): p for p in image_files(views_dir)}
    if any(os.sep in name for name in files):
        keys = [str(Path(name).with_suffix("")) for name in images.names]
    else:                                                      # side by side
        keys = [Path(name).stem for name in images.names]
        check_unique(keys, images.names, files)
    paths = [files.get(key) or files.get(key.removeprefix("train/")) for key in keys]
    settings = views_dir / "settings.json"         # a folder of the release has none
    made_for = read_settings(settings) if settings.exists() else {}
    here = {"dataset": dataset, "classes": images.num_classes, "source": images.source}
    if not all(made_for.get(key, value) == value for key, value in here.items()) or not any(paths):
        theirs = ", ".join(f"{made_for.get(key, 'unknown')}" for key in here)
        raise UserError(f"{views_dir} holds no views of these images: its {len(files)} images are "
                        f"made for {theirs} (data set, classes, source), here is {dataset}, "
                        f"{images.num_classes}, {images.source}")
    return paths


def check_unique(keys, names, files):
    """UserError where one of the files {key: path} belongs to several names by their keys."""
    first = {}
    for key, name in zip(keys, names, strict=True):
        other = first.setdefault(key, name)
        if key in files and other != name:
            raise UserError(f"{files[key]} could be the view of {other} and of {name}: put views "
                            f"in their sources' folders")


def views_into_memory(images, paths, skip_bad=False):
    """Views of small images as a tensor like images.pixels; an image without is its own view."""
    views = images.pixels.clone()
    for i, path in enumerate(progress(paths, "reading views", "view")):
        try:
            if path is not None:
                views[i] = to_tensor(square(open_image(path), views.shape[-1]))
        except UserError as error:
            if not skip_bad:
                raise advise_skip_bad(error) from None
    return views                                                                    # (N, 3, S, S)


class ViewFolder:
    """The folder that generate_views.py writes: the views, manifest.jsonl, settings.json."""
    def __init__(self, folder, suffix):
        """suffix: of the views' files, .png or .jpg."""
        self.folder = Path(folder)
        self.suffix = suffix
        self.manifest = self.folder / "manifest.jsonl"

    def path(self, name):
        return self.folder / Path(name).with_suffix(self.suffix)

    def prepare(self, settings, names, world):
        """Starts the folder or goes on with it; UserError where it holds anything else."""
        seen = {}
        for name in names:                         # a.jpg and a.png of one class would share a view
            other = seen.setdefault(Path(name).with_suffix(""), name)
            if other != name:
                raise UserError(f"{other} and {name} would have the same view: rename one of them")
        path = self.folder / "settings.json"
        advice = "name another --views-dir or remove this one"
        if path.exists():
            before = read_settings(path)
            for key in settings:
                if before.get(key, settings[key]) != settings[key]:
                    raise UserError(f"{self.folder} holds views of other settings: {key} is "
                                    f"{before.get(key)} there and {settings[key]} here; {advice}")
        elif self.folder.exists():
            others = [entry.name for entry in os.scandir(self.folder)
                      if entry.name != "preview.png" and not entry.name.endswith(".tmp")]
            if others:
                raise UserError(f"{self.folder} is not empty ({others[0]}) and no views folder of "
                                f"this script; {advice}")
        world.wait()                               # all processes look before one writes
        if world.rank == 0:
            if not path.exists():
                write_json(path, settings)
            sweep(self.folder.rglob("*.tmp"))
            if self.manifest.exists() and not self.manifest.read_bytes().endswith(b"\n"):
                append(self.manifest, "\n")        # a kill cut the last line short
        world.wait()

    def made(self):
        """{source: its noise level} of the views that are there."""
        levels = {}
        text = self.manifest.read_text(errors="replace") if self.manifest.exists() else ""
        for line in text.splitlines():
            try:
                entry = json.loads(line)
                name = entry["source"]
                level = entry["noise_level"]
                if type(level) is int and 0 <= level < 1000 and self.path(name).exists():
                    levels[name] = level
            except (ValueError, TypeError, KeyError):
                continue                           # a line that a kill cut short
        return levels

    def write(self, view, **line):
        """Writes a view (PIL image), then its line in the manifest."""
        path = self.path(line["source"])
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{path.parent} leads out of {self.folder}: remove that symbolic link")
        content = io.BytesIO()
        view.save(content, "PNG" if self.suffix == ".png" else "JPEG", quality=95)  # of JPEG only
        write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()))
        append(self.manifest, json.dumps(line) + "\n")
