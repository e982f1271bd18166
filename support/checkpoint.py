"""One checkpoint mechanism for every training: saved whole, gone on from, refused where it is of
another run."""
import contextlib
import hashlib
import signal
import threading
import time
from pathlib import Path

import torch

from support.command_line import Terminated, UserError, as_flag, in_short, say
from support.files import write_whole
from support.pretrained import load_checkpoint
from support.processes import STOP_SIGNALS, compare


def identity_of(settings, free):
    """{flag: value} of all settings but the free ones: what a run and its continuation share."""
    return {as_flag(name): value for name, value in vars(settings).items() if name not in free}


def digest(network):
    """A short hash that identifies the weights of a network."""
    weights = hashlib.sha256()
    for x in network.state_dict().values():
        weights.update(x.cpu().numpy().tobytes())
    return weights.hexdigest()[:12]


class Checkpoint:
    """The file from which a training goes on. All processes call the same methods.

    path: the file.
    identity: {name: value}, what a run and its continuation have in common: flags by the name that
        is typed, digests of what the flags name.
    regrouped: in words, what changes where a training goes on in another number of processes.
    """
    def __init__(self, path, identity, world,
                 regrouped="the same batches, but not the same result to the last bit"):
        self.path = Path(path)
        self.identity = identity
        self.world = world
        self.regrouped = regrouped
        self.loaded_path = self.path               # of the last load
        self.loaded_identity = {}

    def load(self, path=None):
        """The state that was saved, {} where there is none. path: another file than this one's.

        Raises UserError where the file is damaged or of another run, or where the processes do not
        find the same one.
        """
        path = Path(path or self.path)
        state = {}
        found = "none"
        if path.exists():
            state = load_checkpoint(path)
            if not isinstance(state, dict) or not isinstance(state.get("identity"), dict):
                raise UserError(f"{path} is no checkpoint of such a run: name another --output-dir")
            self.loaded_path = path
            self.loaded_identity = state["identity"]
            self.refuse_other(path, self.loaded_identity)
            self._compare_processes(path, state.get("processes", self.world.size))
            found = f"epoch {state.get('epoch')}, step {state.get('step')}"
        compare(f"the checkpoint {path}", found, "it must lie in one folder for all machines")
        return state

    @contextlib.contextmanager
    def restoring(self):
        """In this block what was loaded enters networks and optimisers. UserError where it does not
        fit them."""
        try:
            yield
        except torch.OutOfMemoryError:
            raise
        except (AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{self.loaded_path} does not fit this training ({in_short(error)}): "
                            f"it is damaged, or of another version of this code; go on with that "
                            f"one, or begin a new run in another --output-dir") from None

    def _compare_processes(self, path, before):
        if before != self.world.size:
            say(f"*** {path} is of a run of {before} processes, here are {self.world.size}: "
                f"{self.regrouped}")

    def extend_identity(self, more):
        """Adds what is known only after load. UserError where what was loaded has other values."""
        self.identity = self.identity | more
        self.refuse_other(self.loaded_path, self.loaded_identity)

    def refuse_other(self, path, saved):
        """UserError where the file at path, with the identity saved, is of another run."""
        for name, now in self.identity.items():
            then = saved.get(name, now)            # the checkpoint of another version may lack it
            if then != now:
                raise UserError(f"{path} is of another run: {name} is {then} there and {now} here; "
                                f"give what that run had, or name another --output-dir")

    def save(self, **state):
        """Writes the state with this identity, by the first process alone."""
        if self.world.rank == 0:
            state["identity"] = self.identity
            state["processes"] = self.world.size
            write_whole(self.path, lambda temporary: torch.save(state, temporary), sync=True)


class SaveTimes:
    """When a training saves: every so many minutes, and when a signal asks it to stop, which
    clusters and terminals send before they kill. All processes call the same methods."""
    def __init__(self, minutes, world):
        self.minutes = minutes
        self.world = world
        self.last = time.monotonic()
        self.stop = 0                              # the number of the signal that came
        self.handlers = {}                         # those that were there before
        if threading.current_thread() is not threading.main_thread():  # no other thread may
            return
        for number in STOP_SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:             # nohup ignores SIGHUP
                self.handlers[number] = signal.signal(number, self._note)

    def _note(self, number, _):
        self.stop = number

    def due(self):
        late = self.world.rank == 0 and time.monotonic() - self.last > 60 * self.minutes
        return self.world.any(self.stop or late)

    def saved(self, path, command):
        """Notes the time; raises Terminated after a signal. command: in words, what goes on."""
        self.last = time.monotonic()
        if self.world.any(self.stop):
            self.world.wait()                      # for the first process's files
            raise Terminated(f"terminated after saving {path}; {command} goes on",
                             self.stop or signal.SIGTERM)

    def end(self):
        """After the training a signal ends the process at once."""
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
