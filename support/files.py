"""Files that appear whole or not at all, settings, and component files."""
import contextlib
import hashlib
import json
import os
import re
import time
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch

from support.command_line import UserError

try:
    import fcntl
except ImportError:                                # Windows
    fcntl = None


def write_whole(path, write, sync=False):
    """Calls write(temporary path) and renames the result: the file appears whole or not at all.

    sync: the new file is on the disk before it replaces the old one, even if the power fails.
    Raises UserError where the file cannot be written; the file that was there stays.
    """
    path = Path(path)
    digest = zlib.crc32(os.fsencode(path.name))    # a name may be as long as the disk allows
    temporary = path.with_name(f"{path.name[:40]}.{digest:08x}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.unlink(missing_ok=True)          # a symbolic link of this name is not followed
        write(temporary)
        if sync:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise not_written(path, error.strerror) from None
    except RuntimeError as error:                  # torch.save's
        if not re.search("writ|iostream|inline_con", str(error)):
            raise
        raise not_written(path, "the disk is full?") from None
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_json(path, content):
    write_whole(path, lambda temporary: temporary.write_text(json.dumps(content, indent=1) + "\n"))


def write_png(path, picture):
    """A PIL image as PNG, whatever the name's suffix."""
    write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))


def digest_of_file(path):
    """A short hash of a file's content; path None: of nothing."""
    content = Path(path).read_bytes() if path else b""
    return hashlib.sha256(content).hexdigest()[:12]


def not_written(path, why):
    return UserError(f"{path} cannot be written ({why}): make room there, or name another folder")


def append(path, text):
    """One write to the end of a file: lines of several processes do not mix. A symbolic link is not
    followed. UserError where the text does not fit."""
    content = text.encode()
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
    try:
        file = os.open(path, flags, 0o644)
        try:
            written = os.write(file, content)
            if written < len(content):             # a part would spoil the next line, too
                os.ftruncate(file, os.lseek(file, 0, os.SEEK_CUR) - written)
        finally:
            os.close(file)
    except OSError as error:
        raise not_written(path, error.strerror) from None
    if written < len(content):
        raise not_written(path, "the disk is full")


def claim(folder):
    """Makes a folder of --output-dir and locks it until this process ends or the returned file is
    closed. UserError where another process has it."""
    path = Path(folder, ".lock")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = open(path, "w")
    except OSError as error:
        raise UserError(f"{folder} cannot be written ({error.strerror}): name another "
                        f"--output-dir") from None
    try:
        if fcntl:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise UserError(f"another process works in {folder}: name another --output-dir") from None
    except OSError:
        return lock                                # a file system without locks
    if path.exists() and os.path.samestat(os.fstat(lock.fileno()), path.stat()):
        return lock
    return claim(folder)                           # its last holder removed the file meanwhile


def release(lock):
    """Unlocks what claim has locked."""
    Path(lock.name).unlink(missing_ok=True)
    lock.close()


@contextlib.contextmanager
def claimed(folder, world):
    """In this block the folder belongs to the processes of this world alone."""
    lock = claim(folder) if world.rank == 0 else None
    try:
        if lock:
            sweep(Path(folder).glob("*.tmp"), seconds=0)
        yield
    finally:
        if lock:
            release(lock)
            with contextlib.suppress(OSError):     # where nothing was written into it
                Path(folder).rmdir()


def log_lines(path):
    """Yields text and object of the lines of a log of objects. Lines that a kill cut short or that
    are not ours are left out."""
    for line in Path(path).read_text(errors="replace").splitlines(keepends=True):
        try:
            content = json.loads(line)
        except ValueError:
            continue
        if isinstance(content, dict):
            yield line, content


class Log:
    """A folder's log.jsonl, an object a line. The first process alone writes."""
    def __init__(self, folder, world):
        self.path = Path(folder, "log.jsonl")
        self.main = world.rank == 0

    def keep(self, is_done):
        """Keeps the objects for which is_done(object) is true: the others will be written again."""
        if not self.main:
            return
        kept = []
        for line, content in log_lines(self.path) if self.path.exists() else ():
            with contextlib.suppress(TypeError, KeyError):             # not ours
                if is_done(content) and line.endswith("\n"):
                    kept.append(line)
        write_whole(self.path, lambda temporary: temporary.write_text("".join(kept)))

    def write(self, **values):
        if self.main:
            append(self.path, json.dumps(values) + "\n")


def sweep(paths, seconds=3600):
    """Removes temporary files that a killed process left, where they are older than so many
    seconds: a running process may still write the newer ones."""
    for path in paths:
        with contextlib.suppress(OSError):
            if time.time() - path.lstat().st_mtime >= seconds:
                path.unlink()


def refuse_placeholder(path):
    """UserError where a download left something else in the place of a file."""
    with open(path, "rb") as file:
        begin = file.read(100).lstrip()
    if begin.startswith(b"version https://git-lfs"):
        raise UserError(f"{path} is a git-lfs pointer, not the file itself: fetch it with git lfs "
                        f"pull")
    if begin.startswith(b"<"):
        raise UserError(f"{path} is a web page, not the file itself: download it again")


def read_settings(path, advice="put a copy of it back, or move it away"):
    """A settings file, a dict; UserError with this advice where the file is damaged."""
    try:
        settings = json.loads(Path(path).read_text())
        if not isinstance(settings, dict):
            raise ValueError("no settings in it")
        return settings
    except ValueError as error:
        raise UserError(f"{path} is damaged or not by this project ({error}): {advice}") from None


def write_component(path, **content):
    """foreground.npz: component (K,), threshold, and what they were fitted with."""
    _write_numpy(path, np.savez, **content)


def write_array(path, x):
    """A tensor as .npy."""
    _write_numpy(path, np.save, x.cpu().numpy())


def _write_numpy(path, save, *arrays, **named):
    def write(temporary):
        with open(temporary, "wb") as file:        # save would add a suffix to a name
            save(file, *arrays, **named)
    write_whole(path, write)


def read_component(path, size=None):
    """A component: foreground.npz, or the release's pca_vectors.npy, which has no threshold.

    Returns component (K,) and threshold or None. Raises UserError where file or size is wrong.
    """
    try:
        refuse_placeholder(path)
        data = np.load(path, allow_pickle=False)
        is_npz = isinstance(data, np.lib.npyio.NpzFile)
        component = torch.from_numpy(np.asarray(data["component"] if is_npz else data))
        component = component.float().flatten()
        threshold = float(data["threshold"]) if is_npz else None
    except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
        raise UserError(f"{path} is no component file ({error}); it must be a foreground.npz or a "
                        f"pca_vectors.npy") from None
    if not (component.isfinite().all() and component.any()):
        raise UserError(f"{path} holds no usable component: it is all zeros or not finite")
    if size is not None and len(component) != size:
        raise UserError(f"{path} has a component of {len(component)} numbers, the encoder's "
                        f"features have {size}: it was fitted on another encoder")
    return component, threshold
