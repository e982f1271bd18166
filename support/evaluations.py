"""The folder of an evaluation: result.json, head.pt, log.jsonl, and last.pt to resume from."""
import hashlib
import json
from pathlib import Path

import torch

from support.checkpoints import load_checkpoint
from support.files import write_json, write_whole
from support.world import UserError, say

# Settings that may differ when an evaluation is resumed. Digests of the backbone and of the images'
# names take the place of the first two.
FREE = {"checkpoint", "data_dir", "output_dir", "resume", "device", "workers", "skip_bad"}


def folder_of(settings):
    """Where an evaluation's files lie unless --output-dir says: below the run, by protocol. Several
    checkpoints of other origin may lie in one folder: theirs begin with their name."""
    path, name = Path(settings.checkpoint), settings.protocol
    name += f"-{100 * settings.labels:g}" if name == "finetune" else ""
    ours = path.name in ("last.pt", "backbone.pt")
    return str(path.with_name(name if ours else f"{path.stem}-{name}"))


class Evaluation:
    """One evaluation. Only the first process writes; all processes call the same methods."""
    def __init__(self, settings, world, backbone, images):
        """Opens the folder; UserError where it holds something else or cannot be written."""
        self.settings, self.world, self.folder = settings, world, Path(settings.output_dir)
        self.checkpoint, self.log, self.results = self.folder / "last.pt", [], {}
        self.keep = settings.protocol == "finetune" or settings.augment    # trained on pictures
        weights = b"".join(x.cpu().numpy().tobytes() for x in backbone.state_dict().values())
        self.identity = {key: x for key, x in vars(settings).items() if key not in FREE} | {
            "backbone": hashlib.sha256(weights).hexdigest()[:12], "images": images.source}
        found = self.checkpoint.exists()
        if (self.folder / "args.json").exists() or (found and not settings.resume):
            raise UserError(f"{self.folder} holds a run already: go on with --resume, or name "
                            f"another --output-dir")
        self.state = self._load() if found else {"epoch": 0}
        if len(set(world.gather_objects(self.state["epoch"]))) > 1:
            raise UserError(f"the processes do not find the same checkpoint: {self.folder} must be "
                            f"one folder for all machines")
        try:
            self._write_log()
        except UserError as error:
            raise UserError(f"{error} (--output-dir)") from None

    def _load(self):
        state = load_checkpoint(self.checkpoint)
        then = state.get("identity", {}) if isinstance(state, dict) else {}
        for key, now in self.identity.items():
            if then.get(key) != now:
                raise UserError(f"{self.checkpoint} is of another evaluation: {key} is "
                                f"{then.get(key)} there and {now} here; name another --output-dir")
        self.log = state["log"]
        return state

    def _write_log(self):
        if self.world.rank == 0:
            text = "".join(json.dumps(line) + "\n" for line in self.log)
            write_whole(self.folder / "log.jsonl", lambda path: path.write_text(text))

    def resume(self, model, optimizer):
        """Loads what there is to resume. Returns the number of epochs done."""
        if self.state["epoch"]:
            model.load_state_dict(self.state["model"])
            optimizer.load_state_dict(self.state["optimizer"])
            say(f"{self.checkpoint}: goes on after epoch {self.state['epoch']}")
        return self.state["epoch"]

    def after_epoch(self, epoch, model, optimizer, loss, accuracies):
        """Logs, and saves where pictures are trained on: other trainings take seconds."""
        loss = self.world.mean(loss).item()
        lr = optimizer.param_groups[-1]["lr"]
        self.log.append({"epoch": epoch, "loss": loss, "lr": lr, **accuracies})
        if self.keep:
            text = f"epoch {epoch}/{self.settings.epochs}  loss {loss:.3f}  {in_words(accuracies)}"
            say(text.rstrip())
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(),
                     "epoch": epoch, "identity": self.identity, "log": self.log,
                     "args": vars(self.settings)}
            if self.world.rank == 0:
                write_whole(self.checkpoint, lambda path: torch.save(state, path), sync=True)
        self._write_log()

    def report(self, protocol, count, accuracies, head=None):
        """Prints and saves a result, {name: percent}; count: of the labelled images it used."""
        self.results[protocol] = {name: round(x, 3) for name, x in accuracies.items()} | {
            "labelled_images": count}
        if self.world.rank == 0:
            if head:
                write_whole(self.folder / "head.pt", lambda p: torch.save(head.state_dict(), p))
            write_json(self.folder / "result.json",
                       {"results": self.results, "settings": vars(self.settings)})
        say(f"{protocol} {in_words(accuracies)} (fitted on {count} labelled images)")


def in_words(accuracies):
    """{"top1": 71.2} -> "top-1 71.2%"."""
    return ", ".join(f"top-{name[3:]} {x:.1f}%" for name, x in accuracies.items())
