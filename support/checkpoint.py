"""One checkpoint mechanism for every training: saved whole, gone on from, refused where it is of
another run."""
from pathlib import Path

import torch

from support.command_line import UserError
from support.files import write_whole
from support.pretrained import load_checkpoint
from support.processes import compare


class Checkpoint:
    """The file from which a training goes on. All processes call the same methods.

    path: the file.
    identity: {name: value}, what a run and its continuation have in common: flags by the name that
        is typed, digests of what the flags name.
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
        found = f"epoch {state.get('epoch')}, step {state.get('step')}" if state else "none"
        compare(f"the checkpoint {path}", found, "it must lie in one folder for all machines")
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
