"""One checkpoint mechanism for every training: saved whole, gone on from, refused where it is of
another run."""
import signal
import threading
import time
from pathlib import Path

import torch

from support.command_line import Terminated, UserError
from support.files import write_whole
from support.pretrained import load_checkpoint


class Checkpoint:
    """The file from which a training goes on. All processes call the same methods.

    path: the file.
    identity: {name: value}, what a run and its continuation share: flags by the name that is typed,
        digests of what the flags name.
    """
    def __init__(self, path, identity, world):
        self.path = Path(path)
        self.identity = identity
        self.world = world

    def load(self, path=None):
        """The state that was saved, {} where there is none. path: another file than this one's.

        Raises UserError where the file is damaged or of another run, or where the processes do not
        find the same one.
        """
        path = Path(path or self.path)
        state = load_checkpoint(path) if path.exists() else {}
        if state:
            self._compare(path, state)
        places = self.world.gather_objects([state.get("epoch"), state.get("step")])
        if any(place != places[0] for place in places):
            raise UserError(f"the processes do not find the same checkpoint: {path.parent} must be "
                            f"one folder for all machines")
        return state

    def _compare(self, path, state):
        if not isinstance(state, dict) or "identity" not in state:
            raise UserError(f"{path} is no checkpoint of such a run: name another --output-dir")
        saved = state["identity"]
        for name, now in self.identity.items():
            then = saved.get(name, now)            # the checkpoint of another version may lack it
            if then != now:
                raise UserError(f"{path} is of another run: {name} is {then} there and {now} here; "
                                f"give what that run had, or name another --output-dir")

    def save(self, **state):
        """Writes the state with this identity, by the first process alone."""
        if self.world.rank == 0:
            state["identity"] = self.identity
            write_whole(self.path, lambda temporary: torch.save(state, temporary), sync=True)


class SaveTimes:
    """When a training saves: every so many minutes, and when SIGTERM comes, which clusters send
    before they kill; then it stops. All processes call the same methods."""
    def __init__(self, minutes, world):
        self.minutes = minutes
        self.world = world
        self.last = time.time()
        self.terminated = False
        self._on_sigterm(self._terminate)

    def _on_sigterm(self, act):
        if threading.current_thread() is threading.main_thread():      # no other thread may
            signal.signal(signal.SIGTERM, act)

    def _terminate(self, *_):
        self.terminated = True

    def due(self):
        late = self.world.rank == 0 and time.time() - self.last > 60 * self.minutes
        return self.world.any(self.terminated or late)

    def saved(self, path, command):
        """Notes the time; raises Terminated after SIGTERM. command: in words, what goes on."""
        self.last = time.time()
        if self.world.any(self.terminated):
            self.world.wait()                      # for the first process's files
            raise Terminated(f"terminated after saving {path}; {command} goes on")

    def end(self):
        """After the training SIGTERM ends the process at once."""
        self._on_sigterm(signal.SIG_DFL)
