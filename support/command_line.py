"""A script's command line: errors as one line, flags, messages, progress bars."""
import argparse
import atexit
import multiprocessing
import os
import re
import signal
import sys
import traceback

import torch
import torch.distributed as dist

OUT_OF_MEMORY = "out of memory: lower --batch-size or the size of the images"
NAMES_OF_OUT_OF_MEMORY = (    # of the system and of CUDA's libraries, which find no room to begin
    "allocate memory|CUDA error: out of memory|CUBLAS_STATUS_(NOT_INITIALIZED|ALLOC_FAILED)|"
    "CUDNN_STATUS_NOT_INITIALIZED|unable to find an engine")


class UserError(Exception):
    """Something that the user can correct: shown as one line on stderr, exit status 2."""


class Terminated(Exception):
    """A signal of this number asked the run to stop, and it is saved; the text says where."""
    def __init__(self, text, number=signal.SIGTERM):
        super().__init__(text)
        self.number = number


# ------------------------------------------------------------------------------- errors as one line
def in_short(error):
    """An error on one line, of a long one begin and end, with its kind where it is another
    library's."""
    words = " ".join(str(error).split())
    if len(words) > 180:
        words = f"{words[:110]} ... {words[-65:]}"
    return words if isinstance(error, UserError) else f"{type(error).__name__}: {words}"


def script(main):
    """Runs a script's main function and turns errors that a user can cause into one line."""
    for stream in (sys.stdout, sys.stderr):        # consoles that lack a letter show its number
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
        status = 0
    except Terminated as stop:                     # in all processes
        status = _report(str(stop), 128 + stop.number)
    except (Exception, KeyboardInterrupt) as error:
        explained = _explain(error)
        if dist.is_initialized():
            _leave(error, explained)
        if not explained:
            raise
        status = _report(*explained)
    if dist.is_initialized():
        if dist.get_backend() == "gloo":           # its threads may hang or abort in a clean exit
            _end_at_once(status)
        dist.destroy_process_group()
    if status:
        sys.exit(status)


def _leave(error, explained):
    """Ends this process of several at once, after an error that the others may not have: a clean
    exit would wait for them, and they for this one. torchrun then ends them."""
    if explained:
        status = _report(*explained)
    else:
        traceback.print_exception(error)
        status = 1
    _end_at_once(status)


def _end_at_once(status):
    for stream in (sys.stdout, sys.stderr):
        if stream:
            stream.flush()
    _end_workers()
    os._exit(status)


@atexit.register
def _end_workers():
    """Ends workers that are left after an error: multiprocessing would send SIGTERM and wait."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would call it an error
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


def _explain(error):
    """One line and exit status for an error that a user can cause, None for others."""
    if isinstance(error, UserError):               # of a loader's worker: its traceback's last line
        text = str(error).strip().splitlines()[-1]
        return text.removeprefix(f"{__name__}.UserError: "), 2
    if isinstance(error, OSError):                 # a full disk, a folder without write permission
        where = f": {error.filename}" if error.filename else ""
        return f"{error.strerror or error}{where}", 2
    if isinstance(error, ImportError) or "Failed to import" in str(error):     # diffusers' own
        return f"{in_short(error)}: pip install -r requirements.txt", 2
    if isinstance(error, MemoryError):
        return OUT_OF_MEMORY, 2
    if isinstance(error, KeyboardInterrupt):
        return ("interrupted; the same command goes on from the last finished file, training with "
                "--resume"), 130
    if "more than 1 value per channel" in str(error):
        return ("batch normalisation sees a single value: use a larger --batch-size, more images "
                "or larger ones"), 2
    return _explain_torch(error) if isinstance(error, RuntimeError) else None


def _explain_torch(error):
    """One line and exit status for PyTorch's errors that a user can cause, None for others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or re.search(NAMES_OF_OUT_OF_MEMORY, text):
        return OUT_OF_MEMORY, 2
    if re.search("Too many open files|ancdata", text):
        return "too many open files: raise their number (ulimit -n), or --workers 0", 2
    if re.search(r"out of shared memory|shared memory ?(\(shm\)|file|object)", text):
        return ("the shared memory of the processes that read images (/dev/shm) is too small: "
                "enlarge it (docker run --shm-size 8g), or --workers 0"), 2
    if re.search(r"No working C\+\+ compiler|Failed to find C compiler", text):
        return ("torch.compile needs a C++ compiler: install one (g++), or train without "
                "--compile"), 2
    if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
        return f"torch.compile fails ({in_short(error)}): train without --compile", 2
    if "DataLoader worker (pid" in text:
        return ("a process that reads images was killed, perhaps because memory ran out: lower "
                "--workers"), 1
    lost = re.search("peer|gloo|NCCL|[Cc]onnection|[Tt]imed out", text)
    if dist.is_initialized() and lost:
        reason = text.strip().splitlines()[-1][:150]
        return (f"process {dist.get_rank()} stops because another one ended or does not answer "
                f"({reason}): its own message says why; the same command goes on, training with "
                f"--resume"), 1
    return None


def _report(message, status):
    of_several = "WORLD_SIZE" in os.environ and os.environ.get("LOCAL_RANK", "0") != "0"
    if dist.is_initialized() or not of_several:    # once a machine
        print(f"error: {message}", file=sys.stderr)
    return status


# --------------------------------------------------------------------------- messages and progress
def from_environment(name, default):
    """The whole number that torchrun or another launcher has put into the environment."""
    text = os.environ.get(name, str(default))
    try:
        return int(text)
    except ValueError:
        raise UserError(f"the environment says {name}={text}, which is no whole number: unset it, "
                        f"or start the processes with torchrun") from None


def say(text):
    """Prints, flushed, in the first process only."""
    if from_environment("RANK", 0) == 0:
        print(text, flush=True)


def progress(items, text, unit, **options):
    """A progress bar with rate and time left; in a log file one line every half minute instead."""
    from tqdm import tqdm
    visible = sys.stderr is not None and from_environment("RANK", 0) == 0
    if visible and not sys.stderr.isatty():
        options |= dict(mininterval=30, maxinterval=30, delay=30,
                        bar_format="{desc}: {n_fmt}/{total_fmt} {rate_fmt} {remaining} left\n")
    return tqdm(items, desc=text, unit=unit, leave=False, disable=not visible, **options)


def say_above(bar, text):
    """Prints a line while a progress bar is on the screen; its next update draws it below."""
    if sys.stderr is not None and sys.stderr.isatty():
        bar.clear()
    say(text)


def duration(seconds):
    """Seconds in words: "40 s", "12 min", "3.5 h"."""
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"


# -------------------------------------------------------------------------------------------- flags
class Parser(argparse.ArgumentParser):
    """argparse with defaults in the help texts and errors as one line."""
    def __init__(self, description):
        super().__init__(description=description, formatter_class=_Help)

    def parse_known_args(self, args=None, namespace=None):
        """~ is the home directory after --flag=, too, where no shell looks."""
        given = sys.argv[1:] if args is None else args
        expanded = [re.sub("^(--[a-z-]+=)?(~.*)", _expand_home, text) for text in given]
        return super().parse_known_args(expanded, namespace)

    def error(self, message):
        if "--local-rank" in message:
            message = "torch.distributed.launch is the old launcher: call torchrun instead"
        self.exit(2, f"error: {message}\n")


def _expand_home(found):
    return (found[1] or "") + os.path.expanduser(found[2])


class _Help(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action):
        has_default = action.default not in (None, False, argparse.SUPPRESS)
        return super()._get_help_string(action) if has_default else action.help


def whole(least=0, most=10 ** 12):
    """A type for argparse: whole numbers from least to most."""
    return _number(int, "whole number", least, most)


def as_flag(name):
    """The flag of an argument's name: "batch_size" -> "--batch-size"."""
    return f"--{name.replace('_', '-')}"


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
