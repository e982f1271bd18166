"""Image folders and CIFAR on the disk -> Images."""
import errno
import functools
import hashlib
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torchvision
from torch.utils.data import DataLoader, Dataset

from support.command_line import UserError, from_environment, progress, say
from support.pictures import open_image, square, to_image, to_tensor
from support.processes import gather_objects, place_of_process, start_worker, wait

IN_MEMORY_SIZE = 64   # images up to this side are kept in memory, as one uint8 tensor
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".ppm", ".pgm", ".tif", ".tiff"}
NOT_OURS = {"@eaDir", "__MACOSX", "lost+found"}    # what systems put beside the pictures
FEW = 500             # files that one process has read before others have started
READ_AT_ONCE = 64     # files: what a worker hands over at a time
SAME_FILES = "all machines must hold the same files"


class Images(NamedTuple):
    """A labelled set of N images: small ones in memory, large ones as files."""
    names: list                     # relative to the data folder: "train/cat/0001.jpg"
    labels: torch.Tensor            # (N,)
    num_classes: int
    pixels: torch.Tensor = None     # (N, 3, S, S) uint8, or None: read the files below root
    root: Path = None
    source: str = ""                # number and digest of all names of the set, before a limit
    left_out: int = 0               # files that cannot be read: they are not among the N

    def pil(self, index):
        """The image as PIL's RGB image; UserError where it cannot be read."""
        if self.pixels is not None:
            return to_image(self.pixels[index])
        return open_image(self.root / self.names[index])

    def at_most(self, count):
        """So many of the images at most, evenly spaced over the set."""
        return self if count >= len(self.names) else self.take(spaced(len(self.names), count))

    def take(self, index):
        """The images of index (n,), as Images."""
        pixels = None if self.pixels is None else self.pixels[index]
        names = [self.names[i] for i in index.tolist()]
        return self._replace(names=names, labels=self.labels[index], pixels=pixels)


def count_and_digest(names):
    """Tells sets of images apart, in words: how many there are, and a hash of their names."""
    digest = hashlib.sha256("\n".join(names).encode(errors="surrogateescape")).hexdigest()
    return f"{len(names)} images, names {digest[:12]}"


def advise_skip_bad(error):
    """The error of open_image with a further way out, where the script has this flag."""
    return UserError(f"{error}, or leave such images out with --skip-bad")


def read_picture(path):
    """An image file -> (3, H, W) uint8, in scripts that have --skip-bad."""
    try:
        return to_tensor(open_image(path))
    except UserError as error:
        raise advise_skip_bad(error) from None


def spaced(n, count=None):
    """count places spread evenly over n, or all n, (count,)."""
    places = torch.linspace(0, n - 1, min(n, count or n), dtype=torch.double)   # float repeats some
    return places.round().long()


def read_cifar(dataset, data_dir, split):
    """CIFAR by torchvision, which downloads what is missing."""
    kinds = {"cifar10": torchvision.datasets.CIFAR10, "cifar100": torchvision.datasets.CIFAR100}
    reader = kinds[dataset]
    # It writes in place: no two processes may download into one folder. The first one of all does;
    # then one of each machine, which finds the files there or has a disk of its own; then the rest.
    rank, _ = place_of_process()
    turn = 2
    if rank == 0:
        turn = 0
    elif from_environment("LOCAL_RANK", 0) == 0:
        turn = 1
    for now in range(3):
        if now == turn:
            data = download(reader, dataset, data_dir, split)
        wait()
    names = [f"{split}/{i:05d}" for i in range(len(data))]
    pixels = torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous()
    return Images(names, torch.tensor(data.targets), len(data.classes), pixels)


def download(reader, dataset, data_dir, split):
    """A split, as torchvision reads it."""
    try:
        return reader(data_dir, train=split == "train", download=True)
    except (OSError, RuntimeError) as error:
        archive = Path(data_dir, reader.filename)
        if isinstance(error, PermissionError) or getattr(error, "errno", None) == errno.ENOSPC:
            raise                                  # its own line names the file
        if archive.exists():
            raise UserError(f"{archive} is damaged: remove it to have it downloaded") from None
        raise UserError(f"{dataset} is not in {data_dir} and could not be downloaded "
                        f"({type(error).__name__}): put its {reader.filename} there, or name an "
                        f"image folder with train/ and test/ by --data-dir; --dataset shapes "
                        f"needs no download") from None


def find_files(root, split):
    """The image files of a split, a folder a class: train/, or val/ or test/ below root. Classes
    are numbered by the folders of train/: a split that lacks some has the same labels."""
    folder = folder_of_split(root, split)
    train = root / "train"
    here = class_folders(folder)
    classes = class_folders(train) if train.is_dir() else here
    unknown = sorted(set(here) - set(classes))
    if unknown:
        raise UserError(f"{folder} holds classes that {train} does not: {', '.join(unknown[:5])}")
    pictures, others = sort_out(folder)
    loose = [path for path in pictures if len(path.parts) == 1]
    in_classes = [path for path in pictures if len(path.parts) > 1]
    if not in_classes:
        return unlabelled(root, folder, split, loose, others)
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[path.parts[0]] for path in in_classes]
    counts = np.bincount(labels, minlength=len(classes))
    empty = [name for name, count in zip(classes, counts, strict=True) if not count]
    others = loose + others
    if empty and split == "train":
        unread = [path for path in others if path.parts[0] in empty]
        why = f" ({len(unread)} files such as {unread[0]} are not read)" if unread else ""
        raise UserError(f"{folder} holds no images in {listed(empty)}{why}: fill these class "
                        f"folders or remove them")
    none_in = f", none in {listed(empty)}" if empty else ""
    say(f"{folder}: {len(labels)} images, {len(classes) - len(empty)} of {len(classes)} "
        f"classes{none_in}{others_in_words(others)}")
    names = [f"{folder.name}/{path}" for path in in_classes]
    return Images(names, torch.tensor(labels), len(classes), root=root)


def listed(names):
    """The first names, in words."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def others_in_words(others):
    """What is said of files that are no images of the set."""
    if not others:
        return ""
    return f"; {len(others)} other files are left out, such as {others[0]}"


def check_classes(images, data_dir, why):
    """UserError where the training images are of fewer than two classes: any accuracy would be
    100%. why: the rest of the sentence."""
    if len(images.labels.unique()) > 1:
        return
    found = {0: "no class folders", 1: "one class folder"}
    what = found.get(images.num_classes, "images of one class alone")
    raise UserError(f"{data_dir} has {what} in train/{why}")


def folder_of_split(root, split):
    """train/, or val/ or test/ below root; UserError where it is not there."""
    for name in ["train"] if split == "train" else ["val", "test"]:
        if (root / name).is_dir():
            return root / name
    raise UserError(f"no images for the {split} split: {root} needs train/ and val/ or test/ below "
                    f"it, a folder a class (--data-dir; a training with --knn-every 0 needs no "
                    f"test)")


def unlabelled(root, folder, split, loose, others):
    """Training images that lie in the folder itself, without labels; UserError where there are
    none. loose, others: images and other files of the folder, relative to it."""
    if loose and split == "train":
        say(f"{folder}: {len(loose)} images without class folders, hence without "
            f"labels{others_in_words(others)}")
        names = [f"{folder.name}/{path}" for path in loose]
        return Images(names, torch.full((len(loose),), -1), 0, root=root)
    found = ""
    if loose:
        found = f"; the {len(loose)} in it need a folder for each class, named as in train/"
    elif others:
        found = f"; {len(others)} files such as {others[0]} are not read"
    raise UserError(f"{folder} holds no images in class folders{found} "
                    f"(a training with --knn-every 0 needs none)")


def is_ours(name):
    """Is a file or folder of this name one of the data set?"""
    return not name.startswith(".") and name not in NOT_OURS


def sort_out(folder):
    """The image files and the other files in a folder and below it, behind links to folders, too:
    two sorted lists of paths relative to it."""
    def of_the_set(path):
        return all(is_ours(part) for part in Path(path).relative_to(folder).parts)

    def cannot_list(error):                        # os.walk itself would leave the folder out
        if of_the_set(error.filename):
            raise error
    pictures = []
    others = []
    for base, folders, found in os.walk(folder, onerror=cannot_list, followlinks=True):
        folders[:] = [name for name in folders if not leads_back(Path(base, name))]
        inside = Path(base).relative_to(folder)
        ours = of_the_set(base)
        for name in found:
            if ours and is_ours(name) and Path(name).suffix.lower() in SUFFIXES:
                pictures.append(inside / name)
            else:
                others.append(inside / name)
    return sorted(pictures), sorted(others)


def leads_back(folder):
    """Is it a symbolic link to a folder around it, by whatever way it was reached? This would not
    end."""
    if not folder.is_symlink():
        return False
    target = folder.resolve()
    return any(above.resolve().is_relative_to(target) for above in folder.absolute().parents)


def image_files(folder):
    """The paths of the image files in a folder and below it."""
    return [folder / path for path in sort_out(folder)[0]]


def class_folders(folder):
    """The names of the folders in a folder, but those that are not of the data set."""
    return sorted(e.name for e in os.scandir(folder) if e.is_dir() and is_ours(e.name))


# ----------------------------------------------------------------------------------- reading files
def into_memory(images, image_size, skip_bad, workers=0):
    """Reads files into one tensor of squares; skip_bad: leaves out and names what is unreadable."""
    pixels = torch.empty(len(images.names), 3, image_size, image_size, dtype=torch.uint8)
    paths = [images.root / name for name in images.names]
    bad = read_squares_into(pixels, paths, skip_bad, workers)
    return without(images._replace(pixels=pixels), bad)


def without_unreadable(images, workers=0):
    """The image files that can be read: each is opened once, by one of all processes."""
    return without(images, unreadable([images.root / name for name in images.names], workers))


def without(images, bad):
    """The images but those at bad {place: message}, which are named. Pixels move in place: a copy
    would need as much memory again."""
    kept = [i for i in range(len(images.names)) if i not in bad]
    if not kept:
        raise UserError(f"none of the {len(images.names)} images below {images.root} can be read")
    if not bad:
        return images
    pixels = images.pixels
    if pixels is not None:
        for place, i in enumerate(kept):
            pixels[place] = pixels[i]
        pixels = pixels[:len(kept)]
    names = [images.names[i] for i in kept]
    labels = images.labels[kept]
    lost = {Path(images.names[i]).parent.name for i in bad if images.labels[i] not in labels}
    if lost:
        say(f"*** no image of {listed(sorted(lost))} can be read")
    return images._replace(names=names, labels=labels, pixels=pixels, left_out=len(bad))


def unreadable(paths, workers=0):
    """{place: message} of the files that cannot be read, the same in all processes, each of which
    opens its share. A path may be None: no file."""
    rank, size = place_of_process()
    mine = [path if place % size == rank else None for place, path in enumerate(paths)]
    bad = {}
    for _, errors in with_bar(read_files(mine, use_nothing, READ_AT_ONCE, workers), len(mine)):
        bad |= errors
    return of_all_processes(bad)


def read_squares_into(pixels, paths, skip_bad, workers=0):
    """Reads the squares of image files into pixels (N, 3, S, S), where a place without a file
    (None) stays as it is.

    Returns {place: message} of the files that cannot be read in any of all processes, and names
    them; without skip_bad the first one is an error. skip_bad: None where the script has no such
    flag.
    """
    size = pixels.shape[-1]
    use = functools.partial(bytes_of_square, size=size)
    bad = {}
    parts = read_files(paths, use, READ_AT_ONCE, workers)
    for squares, errors in with_bar(parts, len(paths)):
        for place, content in squares.items():
            pixels.numpy()[place] = np.frombuffer(content, np.uint8).reshape(3, size, size)
        for error in errors.values():
            if skip_bad is None:
                raise UserError(error)
            if not skip_bad:
                raise advise_skip_bad(error)
        bad |= errors
    return of_all_processes(bad) if skip_bad else bad


def with_bar(parts, count):
    """The parts of read_files, of count files, with a progress bar."""
    with progress(None, "reading", "image", total=count) as bar:
        for part in parts:
            yield part
            bar.update(min(READ_AT_ONCE, count - bar.n))


def of_all_processes(bad):
    """The files that any process cannot read, {place: message}, named by the first process: all
    leave out the same."""
    together = {}
    for part in gather_objects(bad):
        together |= part
    rank, _ = place_of_process()
    if rank == 0:
        for place in sorted(together):
            print(f"left out: {together[place]}", file=sys.stderr)
    return together


def read_squares(images, indices, size, workers=0):
    """Yields the squares of the images at indices, (n, 3, S, S), READ_AT_ONCE at a time; files are
    read by workers."""
    use = functools.partial(bytes_of_square, size=size)
    for squares, errors in read_images(images, indices, use, READ_AT_ONCE, workers):
        for error in errors.values():
            raise advise_skip_bad(error)
        content = bytearray(b"".join(squares.values()))
        yield torch.frombuffer(content, dtype=torch.uint8).view(-1, 3, size, size)


def read_images(images, indices, use, at_once, workers=0):
    """Yields {index: use(image)} of the images at indices that can be read, and {index: message} of
    the others, at_once images at a time, in order. Files are read by workers, for which see
    read_files."""
    indices = torch.as_tensor(indices).tolist()
    if images.pixels is None:
        paths = [images.root / images.names[i] for i in indices]
        for done, errors in read_files(paths, use, at_once, workers):
            yield ({indices[place]: x for place, x in done.items()},
                   {indices[place]: error for place, error in errors.items()})
        return
    for first in range(0, len(indices), at_once):
        yield {i: use(images.pil(i)) for i in indices[first:first + at_once]}, {}


def read_files(paths, use, at_once, workers=0):
    """Yields {place: use(image)} of the image files that can be read, and {place: message} of the
    others, at_once files at a time, in order. A path may be None: no file.

    use: a function of a PIL image, which workers call where there are many files. What it returns
    should be bytes or an array: tensors need shared memory, of which containers have little.
    """
    files = Files(paths, use, at_once)
    if workers and len(paths) > FEW:
        return DataLoader(files, batch_size=None, num_workers=workers,
                          worker_init_fn=start_worker, generator=torch.Generator())
    return map(files.__getitem__, range(len(files)))


class Files(Dataset):
    """Image files for the processes of a loader, see read_files."""
    def __init__(self, paths, use, at_once):
        # An array of bytes, not a list: see genview.CropsOfFiles.
        self.paths = np.array([os.fsencode(path or "") for path in paths])
        self.use = use
        self.at_once = at_once

    def __len__(self):
        return -(-len(self.paths) // self.at_once)

    def __getitem__(self, part):
        done = {}
        errors = {}
        first = part * self.at_once
        for place, path in enumerate(self.paths[first:first + self.at_once], first):
            if not path:
                continue
            try:
                done[place] = self.use(open_image(os.fsdecode(path)))
            except UserError as error:
                errors[place] = str(error)
        return done, errors


def bytes_of_square(image, size):
    """(3, S, S) as bytes."""
    return to_tensor(square(image, size)).numpy().tobytes()


def use_nothing(image):
    """For read_files where all that matters is whether an image can be read."""


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
