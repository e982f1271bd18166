"""How the tests run scripts: in this process, where no time goes into imports, and in forks, which
can be killed."""
import contextlib
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback

import pytest
import torch
from tqdm import tqdm

from support import command_line
from support.command_line import UserError
from support.files import claim
from support.processes import World

CPU = World(0, 1, torch.device("cpu"), torch.float32)


def call(module, *flags):
    """The main function of a script or study, with this command line."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()


def refusal(capsys, work, *arguments):
    """The work ends with exit status 2 and one line on stderr; returns it without "error: "."""
    with pytest.raises(SystemExit) as stop:
        command_line.script(lambda: work(*arguments))
    said = re.fullmatch("error: (.{10,})\n", capsys.readouterr().err)
    assert stop.value.code == 2 and said
    return said[1]


def training_flags(world, output, *more):
    """A small GenView training on the images, views and clip of a folder."""
    return [str(flag) for flag in [
        "--dataset", "folder", "--data-dir", world / "images", "--views-dir", world / "views",
        "--encoder", world / "clip", "--image-size", 32, "--arch", "resnet10_narrow",
        "--batch-size", 8, "--output-dir", output, "--log-every", 1, "--device", "cpu", *more]]


def json_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------------------------------------- forks
def start(work, said=os.devnull):
    """Forks a process that does the work, its stderr in the file said; returns its id. Exit status:
    0, that of support.command_line.script, or 99 after a traceback."""
    if torch.cuda.is_available():
        pytest.skip("a process that uses a GPU cannot be forked")
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        sys.stdout, sys.stderr = open(os.devnull, "w"), open(said, "w")
        torch.set_num_threads(1)
        tqdm.set_lock(threading.RLock())           # a killed fork holds the one that all share
        command_line.script(work)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    sys.stderr.flush()
    os._exit(status)


def end(*pids):
    """Waits; the exit status of each, or minus the signal."""
    statuses = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
    return statuses if len(pids) > 1 else statuses[0]


@contextlib.contextmanager
def held(folder):
    """Another process works in the folder. It is killed in the end."""
    holds, told = os.pipe()
    pid = start(lambda: (claim(folder), os.write(told, b"1"), time.sleep(60)))
    os.read(holds, 1)
    try:
        yield
    finally:
        os.kill(pid, signal.SIGKILL)
        end(pid)


def start_two(works, log):
    """Forks two processes that work together, as torchrun does; their stderr in log/0 and log/1."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]

    def one(rank, work):
        os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank),
                           MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        work()
    return [start(lambda rank=rank, work=work: one(rank, work), log / str(rank))
            for rank, work in enumerate(works)]


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(*_):
    raise UserError("the third batch is no good")


def before_call(number, act, work, owner, name, when=lambda *_: True):
    """The work, with act(*arguments) before the call of that number of a function of owner; only
    calls for which when(*arguments) is true count."""
    def wrapped():
        function, calls = getattr(owner, name), []

        def counting(*arguments, **options):
            if when(*arguments):
                calls.append(1)
                if len(calls) == number:
                    act(*arguments)
            return function(*arguments, **options)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, counting)
            work()
    return wrapped
