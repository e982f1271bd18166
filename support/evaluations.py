"""The folder of an evaluation: result.json, head.pt, log.jsonl, and last.pt to go on from."""
import json
from pathlib import Path

import torch

from support.checkpoint import Checkpoint, digest, identity_of
from support.command_line import UserError, say
from support.data import SAME_FILES, count_and_digest
from support.files import Log, read_settings, write_json, write_whole
from support.processes import compare_each

# Settings that may differ when an evaluation is resumed. Digests of the backbone and of the images'
# names take the place of the first three.
FREE = {"checkpoint", "data_dir", "labels_file", "output_dir", "resume", "device", "workers",
        "skip_bad"}


def folder_of(settings):
    """Where an evaluation's files lie unless --output-dir says: below the run, by protocol. Several
    checkpoints of other origin may lie in one folder: theirs begin with their name."""
    path = Path(settings.checkpoint)
    name = settings.protocol
    if name == "finetune":
        name += f"-{100 * settings.labels:g}"
    ours = path.name in ("last.pt", "backbone.pt")
    return str(path.with_name(name if ours else f"{path.stem}-{name}"))


class Evaluation:
    """One evaluation, in a folder that its process has claimed. Only the first process writes; all
    processes call the same methods."""
    def __init__(self, settings, world, backbone, train, test, left_out=0):
        """UserError where the folder holds something else. train, test: the images that it fits on
        and scores; left_out: files that could not be read."""
        self.settings = settings
        self.left_out = left_out
        self.world = world
        self.folder = Path(settings.output_dir)
        self.keep = settings.protocol == "finetune" or settings.augment    # trained on pictures
        self.results = {}
        identity = identity_of(settings, FREE)
        identity["backbone"] = digest(backbone)
        identity["images"] = count_and_digest(train.names)
        identity["test images"] = count_and_digest(test.names)
        # As JSON gives it back: tuples are lists there.
        self.identity = json.loads(json.dumps(identity))
        compare_each(self.identity, SAME_FILES)
        self.checkpoint = Checkpoint(self.folder / "last.pt", self.identity, world,
                                     regrouped="other random draws of crops and flips, so not "
                                               "the same result")
        found = self.checkpoint.path.exists()
        if (self.folder / "args.json").exists() or (found and not settings.resume):
            raise UserError(f"{self.folder} holds a run already: go on with --resume, or name "
                            f"another --output-dir")
        earlier = self.folder / "result.json"
        if earlier.exists():
            self.checkpoint.refuse_other(earlier, read_settings(earlier).get("identity", {}))
        self.state = self.checkpoint.load()
        self.log = Log(self.folder, world)
        done = self.state.get("epoch", 0)
        self.log.keep(lambda line: line["epoch"] <= done)

    def resume(self, model, optimizer):
        """Loads what there is to resume. Returns the number of epochs done."""
        if not self.state:
            return 0
        with self.checkpoint.restoring():
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
        say(f"{self.checkpoint.path}: goes on after epoch {self.state['epoch']}")
        return self.state["epoch"]

    def after_epoch(self, epoch, model, optimizer, loss, accuracies):
        """Logs, and saves where pictures are trained on: other trainings take seconds."""
        loss = self.world.mean(loss).item()
        rate = optimizer.param_groups[-1]["lr"]
        self.log.write(epoch=epoch, loss=loss, lr=rate, **accuracies)
        if self.keep:
            scores = in_percent(accuracies)
            say(f"epoch {epoch}/{self.settings.epochs}  loss {loss:.3f}  {scores}".rstrip())
            self.checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                 epoch=epoch, args=vars(self.settings))

    def report(self, protocol, count, accuracies, head=None):
        """Prints and saves a result, {name: percent}; count: of the labelled images it used."""
        result = {name: round(x, 3) for name, x in accuracies.items()}
        self.results[protocol] = result | {"labelled_images": count}
        left_out = ""
        if self.left_out:
            self.results[protocol]["left_out"] = self.left_out
            left_out = f", {self.left_out} unreadable images left out"
        if self.world.rank == 0:
            if head:
                write_whole(self.folder / "head.pt", lambda p: torch.save(head.state_dict(), p))
            write_json(self.folder / "result.json",
                       {"results": self.results, "settings": vars(self.settings),
                        "identity": self.identity})
        say(f"{protocol} {in_percent(accuracies)} (fitted on {count} labelled images{left_out})")


def in_percent(accuracies):
    """{"top1": 71.2} -> "top-1 71.2%"."""
    return ", ".join(f"top-{name[3:]} {x:.1f}%" for name, x in accuracies.items())
