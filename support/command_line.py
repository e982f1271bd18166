"""A script's command line: errors as one line, flags, messages, progress bars."""
import argparse
import os
import re
import signal
import sys

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
        sys.exit(_report(text.removeprefix(f"{__name__}.UserError: "), 2))
    except OSError as error:                       # a full disk, a folder without write permission
        where = f": {error.filename}" if error.filename else ""
        sys.exit(_report(f"{error.strerror or error}{where}", 2))
    except MemoryError:
        sys.exit(_report(OUT_OF_MEMORY, 2))
    except RuntimeError as error:
        sys.exit(_report(*_explain(error)))
    except Terminated as terminated:
        sys.exit(_report(str(terminated), 128 + signal.SIGTERM))
    except KeyboardInterrupt:
        sys.exit(_report("interrupted; the same command goes on from the last finished file, "
                         "training with --resume", 130))
    finally:
        if dist.is_initialized() and dist.get_backend() == "nccl":     # torch 2.6's gloo may hang
            dist.destroy_process_group()


def _explain(error):
    """One line and exit status for PyTorch's errors that a user can cause; raises the others."""
    text = str(error)
    if isinstance(error, torch.OutOfMemoryError) or "allocate memory" in text:
        return OUT_OF_MEMORY, 2
    if "shared memory" in text:
        return ("the shared memory of the processes that read images (/dev/shm) is too small: "
                "enlarge it (docker run --shm-size 8g), or --workers 0"), 2
    if re.search(r"No working C\+\+ compiler|Failed to find C compiler", text):
        return ("torch.compile needs a C++ compiler: install one (g++), or train without "
                "--compile"), 2
    if "DataLoader worker (pid" in text:
        return ("a process that reads images was killed, perhaps because memory ran out: lower "
                "--workers"), 1
    lost = re.search("peer|gloo|NCCL|[Cc]onnection|[Tt]imed out", text)
    if not (dist.is_initialized() and lost):
        raise error
    _report(f"process {dist.get_rank()} stops because another one ended or does not answer: its "
            f"own message says why; --resume goes on from the last checkpoint", 1)
    sys.stderr.flush()
    os._exit(1)                                    # a clean exit would wait for the lost process


def _report(message, status):
    if dist.is_initialized() or int(os.environ.get("LOCAL_RANK", 0)) == 0:   # once a machine
        print(f"error: {message}", file=sys.stderr)
    return status


# --------------------------------------------------------------------------- messages and progress
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
