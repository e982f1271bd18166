"""Device, precision, processes, progress bars, seeds, flags, and errors as one line."""
import argparse
import atexit
import contextlib
import ctypes
import datetime
import gc
import hashlib
import multiprocessing
import os
import re
import signal
import sys
import time
from typing import NamedTuple

import torch
import torch.distributed as dist

OUT_OF_MEMORY = ("out of memory: lower --batch-size or the size of the images; "
                 "an interrupted run goes on with --resume")


class UserError(Exception):
    """Something that the user can correct: shown as one line on stderr, exit status 2."""


class Terminated(Exception):
    """SIGTERM came and the run is saved; the text says where."""


# ------------------------------------------------------------------------------- errors as one line
def script(main):
    """Runs a script's main function and turns errors that a user can cause into one line."""
    for stream in (sys.stdout, sys.stderr):        # consoles that lack a letter show its number
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except UserError as error:                     # of a loader's worker: its traceback's last line
        text = str(error).strip().splitlines()[-1]
        sys.exit(_report(text.removeprefix("support.world.UserError: "), 2))
    except OSError as error:                       # a full disk, a folder without write permission
        where = f": {error.filename}" if error.filename else ""
        sys.exit(_report(f"{error.strerror or error}{where}", 2))
    except MemoryError:
        sys.exit(_report(OUT_OF_MEMORY, 2))
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in str(error):
            sys.exit(_report(OUT_OF_MEMORY, 2))
        if "shared memory" in str(error):
            sys.exit(_report("the shared memory of the processes that read images (/dev/shm) is "
                             "too small: enlarge it (docker run --shm-size 8g), or --workers 0", 2))
        if re.search(r"No working C\+\+ compiler|Failed to find C compiler", str(error)):
            sys.exit(_report("torch.compile needs a C++ compiler: install one (g++), or train "
                             "without --compile", 2))
        if "DataLoader worker (pid" in str(error):
            sys.exit(_report("a process that reads images was killed, perhaps because memory ran "
                             "out: lower --workers", 1))
        lost = re.search("peer|gloo|NCCL|[Cc]onnection|[Tt]imed out", str(error))
        if not (dist.is_initialized() and lost):
            raise
        _report_lost_processes()
    except Terminated as terminated:
        sys.exit(_report(str(terminated), 128 + signal.SIGTERM))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted; the same command goes on from the last finished file, "
                         "training with --resume", 130))
    finally:
        if dist.is_initialized() and dist.get_backend() == "nccl":     # torch 2.6's gloo may hang
            dist.destroy_process_group()


def _report(message, status):
    if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:   # once a machine
        print(f"error: {message}", file=sys.stderr)
    return status


_store = []                                        # where the processes meet; filled by setup


def _report_lost_processes():
    """Names the processes that do not answer within 5 seconds, and ends this one."""
    rank, size = dist.get_rank(), dist.get_world_size()
    try:
        _store[0].set(f"alive {rank}", "yes")
        time.sleep(5)
        lost = [r for r in range(size) if not _store[0].check([f"alive {r}"])]
    except (RuntimeError, dist.DistError):         # process 0 holds the store
        lost = [0]
    names = ", ".join(map(str, lost)) or "?"
    print(f"error: process {rank} stops because process {names} of {size} ended or does not "
          f"answer; its own message says why; --resume goes on from the last checkpoint",
          file=sys.stderr, flush=True)
    os._exit(1)                                    # a clean exit would wait for the lost process


def say(text):
    """Prints, flushed, in the first process only."""
    if int(os.environ.get("RANK", 0)) == 0:
        print(text, flush=True)


def progress(items, text, unit, **options):
    """A progress bar with rate and time left; in a log file one line every half minute instead."""
    from tqdm import tqdm
    if not sys.stderr.isatty():
        options |= dict(mininterval=30, maxinterval=30, delay=30,
                        bar_format="{desc}: {n_fmt}/{total_fmt} {rate_fmt} {remaining} left\n")
    return tqdm(items, desc=text, unit=unit, leave=False,
                disable=int(os.environ.get("RANK", 0)) > 0, **options)


# -------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help texts and errors as one line."""
    last = argparse.ArgumentParser()

    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help)
        Parser.last = self

    @classmethod
    def offers(cls, flag):
        """Has the script that runs this flag?"""
        return flag in cls.last._option_string_actions

    def error(self, message):
        if "--local-rank" in message:
            message = "torch.distributed.launch is the old launcher: call torchrun instead"
        self.exit(2, f"error: {message}\n")


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        known = action.default not in (None, False, argparse.SUPPRESS)
        return super()._get_help_string(action) if known else action.help


def whole(least=0, most=10 ** 12):
    """A type for argparse: whole numbers from least to most."""
    return _number(int, "whole number", least, most)


def real(least, most):
    """A type for argparse: numbers from least to most."""
    return _number(float, "number", least, most)


def either(word, kind):
    """A type for argparse: this word, or what kind reads."""
    def parse(text):
        return text if text == word else kind(text)
    parse.__name__ = f"{word} or {kind.__name__}"
    return parse


def _number(kind, name, least, most):
    def parse(text):
        value = kind(text)
        if not least <= value <= most:             # NaN is refused, too
            raise argparse.ArgumentTypeError(f"{text} must be from {least:g} to {most:g}")
        return value
    parse.__name__ = name                          # argparse says: invalid whole number value
    return parse


# ---------------------------------------------------------------------------- processes and devices
class World(NamedTuple):
    """This process among all: torchrun's environment, or one process alone."""
    rank: int
    size: int
    device: torch.device
    dtype: torch.dtype                             # of autocast; float32: no autocast
    scaler: torch.amp.GradScaler = torch.amp.GradScaler("cpu", enabled=False)   # for float16

    @property
    def group(self):
        return dist.group.WORLD if self.size > 1 else None

    def autocast(self):
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def gather(self, x):
        """x of all processes, concatenated in order of rank; no gradient."""
        if self.size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    def mean(self, x):
        """The mean of x over all processes."""
        if self.size > 1:
            dist.all_reduce(x)
            x /= self.size
        return x

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


def setup(device=None, patience=datetime.timedelta(minutes=30), precision=None):
    """Picks the device (cuda, else mps, else cpu) and starts the process group under torchrun.

    patience: how long processes wait for each other before they give up. precision: name of the
    dtype, or auto: float16 on GPUs without bfloat16, for code that scales its loss; None: float32
    there. Returns World.
    """
    chosen = _choose_device(device)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cudnn.benchmark = True
    elif chosen.type == "cpu":
        _keep_memory()
        torch.backends.cuda.enable_flash_sdp(False)   # also of CPUs: small ViTs train twice as fast
    rank, size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    missing = [name for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
               if name not in os.environ]
    if missing and (size > 1 or rank > 0):
        raise UserError(f"the environment says process {rank} of {size}, but not "
                        f"{', '.join(missing)}: start several processes with torchrun, or unset "
                        f"RANK and WORLD_SIZE")
    if size > 1:
        _store[:] = next(dist.rendezvous("env://", timeout=patience))[:1]
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", store=_store[0],
                                rank=rank, world_size=size, timeout=patience)
    dtype = fast_dtype(chosen)
    if precision == "auto" and chosen.type == "cuda" and dtype == torch.float32:
        dtype = torch.float16
    elif precision not in (None, "auto"):
        dtype = getattr(torch, precision)
    scaler = torch.amp.GradScaler(chosen.type, enabled=dtype == torch.float16)
    return World(rank, size, chosen, dtype, scaler)


def _choose_device(device):
    available = "mps" if torch.backends.mps.is_available() else "cpu"
    kind = device or ("cuda" if torch.cuda.is_available() else available)
    try:
        local = int(os.environ.get("LOCAL_RANK", 0))
        chosen = torch.device(kind, local) if kind == "cuda" else torch.device(kind)
        torch.empty(1, device=chosen)
        if chosen.type not in ("cuda", "mps", "cpu"):
            raise RuntimeError("not supported")
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        if chosen.type == "cuda" and torch.cuda.device_count() < processes:
            raise RuntimeError(f"{torch.cuda.device_count()} GPUs for {processes} processes")
    except (RuntimeError, AssertionError) as error:
        why = str(error).splitlines()[0].split(": ")[0]
        raise UserError(f"--device {kind} is not available ({why}): use cuda, mps or cpu") from None
    return chosen


def _keep_memory():
    """glibc returns blocks above 32 MB to the system and gets them zeroed again at the next use: a
    seventh of the time of a training step on a CPU, 40% with large batches. Keep them instead
    (mallopt's M_MMAP_THRESHOLD and M_TRIM_THRESHOLD)."""
    with contextlib.suppress(AttributeError, OSError, TypeError):      # no mallopt elsewhere
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 2 ** 30)
        libc.mallopt(-1, 2 ** 31 - 1)


def fast_dtype(device):
    """bfloat16 where it is faster: recent GPUs, CPUs with AMX or AVX512-BF16; else float32."""
    if device.type == "cuda":
        fast = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        known = device.type == "cpu" and hasattr(torch.cpu, "get_capabilities")
        features = torch.cpu.get_capabilities() if known else {}
        fast = features.get("amx_bf16") or features.get("avx512_bf16")
    return torch.bfloat16 if fast else torch.float32


def share_of_cores():
    """The cores of this process, at most 16: as many processes read its images by default."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return min(16, max(1, cores // int(os.environ.get("LOCAL_WORLD_SIZE", 1))))


def start_worker(_):
    """In each of a loader's processes. Clusters send SIGTERM to all, but the main process saves
    first. A garbage collection would write to every object of the main process, and so copy it."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    gc.freeze()


@atexit.register
def _end_workers():
    """Ends workers that are left after an error: multiprocessing would send SIGTERM and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def step_generator(*numbers):
    """A random generator that depends on the given whole numbers (seed, epoch, step, ...) alone."""
    digest = hashlib.sha256(str(tuple(map(int, numbers))).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "little") & (2 ** 63 - 1))
