"""Generated views on the disk: found by training, written by generate_views.py."""
import io
import json
import os
import zlib
from pathlib import Path
from typing import NamedTuple

from support.command_line import UserError, say
from support.data import SAME_FILES, count_and_digest, is_ours, read_squares_into, sort_out, spaced
from support.files import append, read_settings, sweep, write_json, write_whole
from support.processes import compare_each

COMPARED = 500        # pictures that are compared with those that views were made of, at most
FILE_PART = 1 << 16   # bytes of a file that enter its checksum

# Settings of a folder that may change: other spellings of a model and a component, whose digests
# are settings, too, and the set of images that was last there, which is compared by its files.
FREE = {"model", "component", "source", "dataset"}


def find_views(images, views_dir, dataset):
    """The generated view of each image: a list of N paths, None where an image has none.

    A view lies in views_dir under the relative path of its source with a suffix of its own, with or
    without "train/" (the authors' release mirrors ImageNet's train folder), or all views lie there
    side by side under the name alone. Names the images that are no longer those that their views
    were made of. Raises UserError where the folder is missing, was made for another data set, holds
    a view of none of the images, or a name alone fits several.
    """
    views_dir = Path(views_dir)
    if not views_dir.is_dir():
        raise UserError(f"no generated views: {views_dir} is no folder; generate_views.py "
                        f"makes them, --views-dir none trains without")
    files = {str(path.with_suffix("")): views_dir / path for path in sort_out(views_dir)[0]}
    if any(os.sep in name for name in files):
        keys = [str(Path(name).with_suffix("")) for name in images.names]
    else:                                                      # side by side
        keys = [Path(name).stem for name in images.names]
    keys = [key if key in files else key.removeprefix("train/") for key in keys]
    check_unique(keys, images.names, files)
    settings = views_dir / "settings.json"         # a folder of the release has none
    if settings.exists():
        made_for = read_settings(settings)
        compared, changed = check_same_set(views_dir, made_for, images, dataset)
        if changed:
            say(f"*** {len(changed)} of {compared} images that were compared, such as {changed[0]},"
                f" are not those that the views in {views_dir} were made of: generate_views.py "
                f"makes these again")
    paths = [files.get(key) for key in keys]
    if images.root and views_dir.resolve() in {images.root.resolve(),
                                               (images.root / "train").resolve()}:
        raise UserError(f"{views_dir} holds the images themselves, not views of them: name the "
                        f"folder that generate_views.py made, or --views-dir none")
    if not any(paths):
        raise UserError(f"{views_dir} holds no views of these images: none of its {len(files)} "
                        f"images has the name of one of {len(keys)} such as {images.names[0]}")
    return paths


def identity_of_views(folder):
    """What distinguishes the views in a folder, {name: value}: the settings they were made
    with; {} where the folder has none, as of the release."""
    path = Path(folder, "settings.json")
    settings = read_settings(path) if path.exists() else {}
    return {f"{name} of the views": value for name, value in settings.items() if name not in FREE}


def content_of_files(names, paths):
    """What distinguishes these pictures, in words: how many there are, the names of their
    images, marks of some of the files. paths: of each image's picture, or None."""
    found = [i for i, path in enumerate(paths) if path]
    compared = [found[i] for i in spaced(len(found), COMPARED)]
    return names_and_marks([names[i] for i in found], [mark_of(paths[i]) for i in compared])


def content_of_images(images):
    """The same of the images themselves; of those that are no files their names alone."""
    if images.root is None:
        return count_and_digest(images.names)
    compared = [images.names[i] for i in spaced(len(images.names), COMPARED)]
    return names_and_marks(images.names, [file_mark(images, name) for name in compared])


def names_and_marks(names, marks):
    return f"{count_and_digest(names)}, content of {count_and_digest(marks).split()[-1]}"


def check_same_set(folder, made_for, images, dataset):
    """UserError where the views in a folder are of another data set than these images. The same
    set may have lost or got images.

    made_for: the folder's settings. Returns how many images were compared with those that the views
    were made of, and the names of those that differ.
    """
    names_differ = made_for.get("source", images.source) != images.source
    names = images.names
    if not names_differ:                           # most of a large manifest need not be parsed
        names = [names[i] for i in spaced(len(names), COMPARED)]
    lines = read_manifest(folder, None if names_differ else names)
    known = [name for name in names if name in lines]
    recorded = [name for name in known if lines[name].file]
    sample = [recorded[i] for i in spaced(len(recorded), COMPARED)]
    changed = [name for name in sample if lines[name].file != file_mark(images, name)]
    if sample:
        same = 2 * len(changed) <= len(sample)
    else:                                          # an old manifest: by the names
        same = known and len(known) >= 0.9 * min(len(lines), len(names))
    other_set = images.root is None and made_for.get("dataset", dataset) != dataset
    if other_set or (names_differ and not same):
        raise UserError(f"{folder} holds no views of these images: it is made for "
                        f"{made_for.get('dataset')}, {made_for.get('source')}, here is {dataset}, "
                        f"{images.source}; name another --views-dir")
    return len(sample), changed


def file_mark(images, name):
    """What distinguishes an image file from another of its name: its size in bytes and a checksum
    of its middle. "": it cannot be read; None: images that are no files."""
    return None if images.root is None else mark_of(images.root / name)


def mark_of(path):
    """See file_mark."""
    if not path.is_file():                         # opening a pipe would block
        return ""
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            file.seek(max(0, size - FILE_PART) // 2)
            return f"{size}-{zlib.crc32(file.read(FILE_PART)):08x}"
    except OSError:
        return ""


def check_unique(keys, names, files):
    """UserError where one of the files {key: path} belongs to several names by their keys."""
    first = {}
    for key, name in zip(keys, names, strict=True):
        other = first.setdefault(key, name)
        if key in files and other != name:
            raise UserError(f"{files[key]} could be the view of {other} and of {name}: rename "
                            f"one of them, or put views in their sources' folders")


def views_into_memory(images, paths, skip_bad=False, workers=0):
    """Views of small images as a tensor like images.pixels, where an image without is its own view,
    and {place: message} of those that cannot be read."""
    views = images.pixels.clone()
    bad = read_squares_into(views, paths, skip_bad, workers)
    for place in bad:                              # this process may have read it
        views[place] = images.pixels[place]
    return views, bad                                                               # (N, 3, S, S)


class ManifestLine(NamedTuple):
    """What training and a second run need of a view's line."""
    noise_level: int
    file: str                       # file_mark of its source; None: not recorded


def read_manifest(folder, names=None):
    """{source: ManifestLine} of a views folder, the last line of each source. Lines that a kill cut
    short or another program wrote are ignored. names: only of these sources, which is faster."""
    path = Path(folder, "manifest.jsonl")
    lines = {}
    if not path.exists():
        return lines
    starts = {json.dumps({"source": name}).removesuffix("}") for name in names or []}
    with open(path, errors="replace") as file:
        for text in file:
            if starts and text.partition(', "proportion": ')[0] not in starts:
                continue
            try:
                line = json.loads(text)
                name = line["source"]
                level = line["noise_level"]
            except (ValueError, TypeError, KeyError):
                continue
            if type(name) is str and type(level) is int and 0 <= level < 1000:
                lines[name] = ManifestLine(level, line.get("file"))
    return lines


class ViewFolder:
    """The folder that generate_views.py writes: the views, manifest.jsonl, settings.json."""

    # The name of a model or file may be spelled in several ways: where the digest of its content is
    # known, that decides.
    DIGESTS = {"model": "weights", "component": "component_file"}

    def __init__(self, folder, suffix, rank=0):
        """suffix: of the views' files, .png or .jpg. rank: of the process: each writes a manifest
        of its own, as a network's file system mixes what several machines append."""
        self.folder = Path(folder)
        self.suffix = suffix
        self.manifest = self.folder / "manifest.jsonl"
        self.own_manifest = self.folder / f"manifest-{rank}.jsonl" if rank else self.manifest

    def path(self, name):
        return self.folder / Path(name).with_suffix(self.suffix)

    def prepare(self, settings, dataset, images, world):
        """Starts the folder or goes on with it; UserError where it holds anything else. settings:
        what all of its views have in common."""
        seen = {}
        for name in images.names:                  # a.jpg and a.png of one class would share a view
            other = seen.setdefault(Path(name).with_suffix(""), name)
            if other != name:
                raise UserError(f"{other} and {name} would have the same view: rename one of them")
        shared = {name: value for name, value in settings.items() if name not in FREE}
        compare_each(shared, SAME_FILES)
        before = self.check_what_is_there(settings, shared, dataset, images)
        world.wait()                               # all processes look before one writes
        if world.rank == 0:
            self.begin(before, settings, shared, dataset, images)
        world.wait()

    def check_what_is_there(self, settings, shared, dataset, images):
        """The settings of the folder, {} of a new one; UserError where it holds anything else."""
        path = self.folder / "settings.json"
        if not path.exists():
            if self.folder.is_dir():
                self.refuse_other_files()
            return {}
        before = read_settings(path, "put a copy of it back, or that which the same command "
                                     "writes with --limit 1 and an empty --views-dir")
        # An attempt that failed before the first view may be repeated with other settings.
        failed = not any(self.folder.glob("manifest*.jsonl")) and shared.keys() <= before.keys()
        if not failed:
            self.check_settings(before, settings)
        if self.manifest.exists():
            check_same_set(self.folder, before, images, dataset)
        return before

    def begin(self, before, settings, shared, dataset, images):
        """Writes the settings, removes what killed processes left; by the first process alone."""
        if any(before.get(name, value) != value for name, value in shared.items()):
            before = {}
            (self.folder / "foreground.npz").unlink(missing_ok=True)
        new = settings | before | {"source": images.source, "dataset": dataset}
        if new != before:
            write_json(self.folder / "settings.json", new)
        sweep(self.folder.rglob("*.tmp"))
        if self.manifest.exists() and not self.manifest.read_bytes().endswith(b"\n"):
            append(self.manifest, "\n")            # a kill cut the last line short
        self.join_manifests()

    def refuse_other_files(self):
        """UserError where a folder without settings is not empty."""
        others = [entry.name for entry in os.scandir(self.folder)
                  if entry.name != "preview.png" and is_ours(entry.name)
                  and not entry.name.endswith(".tmp")]
        if others:
            raise UserError(f"{self.folder} is not empty ({others[0]}) and no views folder of this "
                            f"script; name another --views-dir")

    def join_manifests(self):
        """Moves the lines of all processes into manifest.jsonl; by the first process alone."""
        for part in sorted(self.folder.glob("manifest-*.jsonl")):
            text = part.read_text(errors="replace")
            append(self.manifest, text if text.endswith("\n") else f"{text}\n")
            part.unlink()

    def check_settings(self, before, settings):
        """UserError where the settings of the views that are there differ from these."""
        for key in settings:
            digest = self.DIGESTS.get(key, key)
            key_of_value = digest if digest in before else key
            if before.get(key_of_value, settings[key_of_value]) != settings[key_of_value]:
                raise UserError(f"{self.folder} holds views of other settings: {key} is "
                                f"{before.get(key)} there and {settings[key]} here; name another "
                                f"--views-dir to generate_views.py, or train with the views that "
                                f"are there by --views-dir {self.folder}")

    def made(self):
        """{source: its ManifestLine} of the views that are there."""
        lines = read_manifest(self.folder)
        return {name: line for name, line in lines.items() if self.is_there(name)}

    def is_there(self, name):
        try:
            return self.path(name).exists()
        except ValueError:                         # no name of a file: another program's line
            return False

    def write(self, view, **line):
        """Writes a view (PIL image), then its line in the manifest."""
        path = self.path(line["source"])
        if not path.parent.resolve().is_relative_to(self.folder.resolve()):
            raise UserError(f"{path.parent} leads out of {self.folder}: remove that symbolic link")
        content = io.BytesIO()
        view.save(content, "PNG" if self.suffix == ".png" else "JPEG", quality=95)  # of JPEG only
        write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()))
        append(self.own_manifest, json.dumps(line) + "\n")
