"""A training run: its flags, its folder, its log, saving, resuming, stopping, and pairs.png.

The folder holds last.pt (everything to resume), backbone.pt, log.jsonl, args.json and pairs.png.
"""
import io
import json
import math
import os
import signal
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from support import world as flags
from support.augment import renormalise
from support.checkpoints import load_checkpoint
from support.data import spaced
from support.files import append, sweep, write_json, write_whole
from support.pictures import sheet
from support.world import Parser, Terminated, UserError, either, progress, real, say, whole

# Flags that may differ when a run is resumed: they do not change its result.
FREE = {"data_dir", "output_dir", "resume", "device", "compile", "workers", "skip_bad", "knn_every",
        "knn_images", "log_every", "save_minutes"}


# -------------------------------------------------------------------------------------------- flags
def parser_of(description, datasets, methods, recipe_flags):
    """The flags of the training scripts. recipe_flags: {name: (type, help)}, see recipes.py."""
    parser = Parser(description)
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=sorted(datasets), default="cifar10", help="picks the recipe")
    add("--data-dir", help="where the data lies; for folders the one with train/ and val/ or test/")
    add("--limit", type=whole(1), help="use so many images of each split")
    add("--skip-bad", action="store_true", help="leave out images that cannot be read")
    add = parser.add_argument_group("GenView").add_argument
    add("--method", choices=sorted(methods), default=next(iter(methods)), help="picks the recipe")
    add("--views-dir", help="folder of generated views, or none; default: where generate_views.py "
                            "puts them")
    add("--views", choices=["pair", "extra"], default="pair",
        help="pair: a generated view in each pair; extra: the paper's comparison, the images of "
             "--views-dir (any folder) as further training samples")
    add("--quality", choices=["exact", "off"], help="weights by quality; default: exact with views")
    add("--gamma", type=real(-1e3, 1e3), default=1.0, help="how much quality counts (release: 1)")
    add("--encoder", help="frozen encoder E: mini (weights/), clip, release (the authors', by "
                          "timm), a hub id or a folder; default: mini for 32 pixels, else clip")
    add("--component", help="its component, foreground.npz or pca_vectors.npy; default: fit one")
    add("--flip-foreground", action="store_true", help="turn the component to the other side")
    add("--noise", type=either("adaptive", whole(0, 999)), default="adaptive",
        help="shapes only (views made here): adaptive or 0..999")
    add = parser.add_argument_group("runtime").add_argument
    add("--print-recipe", action="store_true", help="print flags, values, sources; nothing else")
    add("--output-dir", help="default: runs/<dataset>-<method>-<time>")
    add("--resume", nargs="?", const="last", metavar="PATH",
        help="go on from a last.pt; without PATH from the newest of such a run")
    add("--seed", type=whole(), default=0, help="of all random numbers")
    add("--device", help="cuda, mps or cpu; default: the first that is available")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 where it is fast, float16 on other GPUs, else float32")
    add("--compile", action="store_true", help="torch.compile: a slow start, faster steps on GPUs")
    add("--workers", type=whole(), default=flags.share_of_cores(),
        help="processes that read large images")
    add("--knn-images", type=whole(1), help="train images that kNN looks at while training; "
        "default: a tenth of large images, but 10,000, or all small ones")
    add("--save-minutes", type=real(0, 1e6), default=15, help="between checkpoints in an epoch")
    add("--log-every", type=whole(1), default=10, help="steps between lines of log.jsonl")
    add = parser.add_argument_group("recipe; default: that of --dataset and --method").add_argument
    add("--colour", type=real(0, 1), default=1.0, help="factor of strength and probability of "
        "jitter, grey, blur and solarise; 0: crops and flips alone")
    for name, (kind, text) in recipe_flags.items():
        choices = ["sgd", "adamw", "lars"] if name == "optimizer" else None
        add(f"--{name.replace('_', '-')}", type=kind, help=text, choices=choices)
    return parser


def apply_recipe(args, recipe, recipe_flags):
    """Fills in what no flag says; UserError for a flag that the method does not have."""
    Parser.last.set_defaults(**recipe)
    for name in recipe_flags:
        if getattr(args, name) is None:
            setattr(args, name, recipe.get(name))
        elif name not in recipe:
            raise UserError(f"--{name.replace('_', '-')} is not a setting of {args.method}")


def resolve_batch(args):
    """UserError where the batch cannot be shared by the processes or does not fit the queue."""
    processes = int(os.environ.get("WORLD_SIZE", 1))
    if args.batch_size % processes:
        raise UserError(f"--batch-size {args.batch_size} cannot be shared by {processes} "
                        f"processes: give a multiple")
    if args.batch_size < 2 * processes:
        raise UserError(f"--batch-size {args.batch_size}: batch normalisation needs two images in "
                        f"each process")
    if args.queue and args.queue % args.batch_size:
        fits = args.queue // args.batch_size * args.batch_size or args.batch_size
        raise UserError(f"--queue {args.queue} is no multiple of --batch-size {args.batch_size} "
                        f"(all processes together): take {fits}")


def limit_queue(args, images):
    """The recipe's queue is ImageNet's: in other folders it holds at most a tenth of the images."""
    if args.dataset == "folder" and args.queue and args.queue == Parser.last.get_default("queue"):
        most = max(images // 10 // args.batch_size, 1) * args.batch_size
        if most < args.queue:
            args.queue = most
            say(f"--queue {most}: at most a tenth of the {images} images")


def for_knn(args, images, test):
    """What kNN looks at while training: --knn-images, and at most 10,000 queries."""
    count = args.knn_images or (max(len(images.names) // 10, 10_000) if images.pixels is None
                                else len(images.names))
    return [x if most >= len(x.names) else x.take(spaced(len(x.names), most))
            for x, most in ((images, count), (test, 10_000))]


def resolve_folder(args, name):
    """Sets --output-dir and --resume; name: how folders of such runs begin, without the time."""
    if args.resume == "last":
        found = [Path(args.output_dir, "last.pt")] if args.output_dir else list(
            Path("runs").glob(f"{name}-*/last.pt"))
        newest = max(found, key=lambda p: p.stat().st_mtime if p.exists() else 0, default=None)
        if newest is None:
            raise UserError(f"no runs/{name}-*/last.pt to resume: name one by --resume PATH")
        args.resume = str(newest)
        if args.output_dir and not newest.exists():
            say(f"nothing to resume in {args.output_dir}: a new run")
            args.resume = None
    usual = Path(args.resume).parent if args.resume else Path(
        "runs", f"{name}-{time.strftime('%Y%m%d-%H%M%S')}")
    args.output_dir = str(args.output_dir or usual)
    if not args.resume and Path(args.output_dir, "last.pt").exists():
        raise UserError(f"{args.output_dir} holds a run already: go on with --resume, or name "
                        f"another --output-dir")


# ------------------------------------------------------------------------------------------ the run
class Run:
    """One training run. Only the first process writes; all processes call the same methods."""
    def __init__(self, args, world, label):
        args.output_dir = world.gather_objects(args.output_dir)[0]   # its name may contain the time
        self.args, self.world, self.label, self.main = args, world, label, world.rank == 0
        self.folder, self.checkpoint = Path(args.output_dir), Path(args.output_dir, "last.pt")
        self.epoch = self.step = 0                 # where the run goes on

    def resume(self, method, optimizer, images, source=""):
        """Loads --resume's checkpoint into method and optimizer. images: how many there are;
        source: see Images."""
        self.method, self.optimizer, self.images, self.source = method, optimizer, images, source
        if self.args.resume:
            self._load(method, optimizer)
        if len(set(self.world.gather_objects((self.epoch, self.step)))) > 1:
            raise UserError(f"the processes do not find the same checkpoint: {self.folder} must be "
                            f"one folder for all machines")

    def _load(self, method, optimizer):
        state = load_checkpoint(self.args.resume)
        self._check_flags(state.get("args", {}) if isinstance(state, dict) else {})
        if state["images"] != self.images:
            raise UserError(f"{self.args.resume} is of a run on {state['images']} images, here are "
                            f"{self.images}: the order would be another")
        if state.get("source", self.source) != self.source:     # names, not places: data may move
            raise UserError(f"{self.args.resume} is of a run on images of other names: give the "
                            f"--data-dir of that run")
        statistics = state["statistics"]
        if len(statistics) == self.world.size:
            state["model"] |= statistics[self.world.rank]
        else:
            say(f"*** {self.args.resume} is of a run of {len(statistics)} processes, here are "
                f"{self.world.size}: the same batches, but not the same result to the last bit")
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if state.get("scaler"):
            self.world.scaler.load_state_dict(state["scaler"])
        self.epoch, self.step = state["epoch"], state["step"]

    def _check_flags(self, then):
        now = vars(self.args)
        for key in now.keys() - FREE:
            before = then.get(key, Parser.last.get_default(key))     # an old checkpoint lacks some
            moved = key == "views_dir" and "none" not in (before, now[key])
            if before != now[key] and not moved:
                way = ("its learning rates are of that length; start a new run with yours"
                       if key == "epochs" else "resume with the flags of that run")
                raise UserError(f"{self.args.resume} is of a run with another "
                                f"--{key.replace('_', '-')} ({before}, now {now[key]}): {way}")

    def begin(self, steps, chance):
        """Opens the folder once all is loaded. steps: of an epoch; chance: the loss of a guess."""
        self.steps, self.chance = steps, chance
        self.saved, self.terminated, self.pending = time.time(), False, []
        if threading.current_thread() is threading.main_thread():      # what clusters send first
            signal.signal(signal.SIGTERM, lambda *_: setattr(self, "terminated", True))
        if not self.main:
            return
        sweep(self.folder, seconds=0)
        self._prune_log()
        write_json(self.folder / "args.json", vars(self.args) | {"label": self.label})
        say(f"{self.label} on {self.args.dataset}, {steps} steps an epoch, {self.world.size} x "
            f"{self.world.device.type}, {str(self.world.dtype).removeprefix('torch.')}")
        say(textwrap.fill("  ".join(f"{k}={v}" for k, v in vars(self.args).items()), 100))

    def keep(self, **tensors):
        """Writes tensors as name.npy into the folder, for a run that goes on with them."""
        for name, x in tensors.items() if self.main else ():
            write_whole(self.folder / f"{name}.npy", lambda path, x=x: path.write_bytes(npy(x)))

    def _prune_log(self):
        """Removes the lines after the checkpoint: they will be written again."""
        log = self.folder / "log.jsonl"
        lines = log.read_text().splitlines(keepends=True) if log.exists() else []
        done = self.epoch * self.steps + self.step

        def fits(line):
            return line["epoch"] <= self.epoch if "knn" in line else line["step"] <= done
        kept = [line for line in lines if line.endswith("}\n") and fits(json.loads(line))]
        write_whole(log, lambda path: path.write_text("".join(kept)))

    def batches(self, epoch, loader):
        """Yields step and views of an epoch, from where the run goes on, under a progress bar."""
        start = self.step if epoch == self.epoch else 0
        if start == self.steps:                    # resumed before the kNN that ends the epoch
            return
        self.began, self.start = time.time(), start
        self.bar = progress(loader.epoch(epoch, start), f"epoch {epoch + 1}/{self.args.epochs}",
                            "batch", total=self.steps, initial=start)
        yield from enumerate(self.bar, start)
        say(f"epoch {epoch + 1}/{self.args.epochs}  " + self.summary)
        if self.neg > 0.25 and epoch == math.ceil(self.args.epochs / 5):
            say(f"*** neg is {self.neg:.2f}, where 0 is healthy: keys drift, and age tells the "
                f"positive: use a smaller --queue, a higher --temperature or --lr")

    def after_step(self, epoch, step, readouts):
        """Logs the means of the read-outs, refuses a loss that is not finite, saves when it is
        time, stops after SIGTERM."""
        self.pending.append(torch.stack(list(readouts.values())).float())
        last = step + 1 == self.steps
        if (step + 1) % self.args.log_every and not last:
            return
        number, lr = epoch * self.steps + step + 1, self.optimizer.param_groups[0]["lr"]
        table = self.world.mean(torch.stack(self.pending))                 # (steps, read-outs)
        bad = (~table[:, 0].isfinite()).nonzero()
        if len(bad):
            first = number - len(self.pending) + 1 + bad[0].item()
            raise UserError(self._not_finite("loss", first))
        means = dict(zip(readouts, table.mean(0).tolist(), strict=True))
        self.pending.clear()
        self.neg = means.get("neg", 0.0)
        speed = (step + 1 - self.start) * self.args.batch_size / (time.time() - self.began)
        left = (self.args.epochs * self.steps - number) * self.args.batch_size / speed
        self.log(epoch=round(number / self.steps, 4), step=number, **means, chance=self.chance,
                 lr=lr, images_per_s=speed)
        loss = f"loss {means.pop('loss'):.3f} (chance {self.chance:.2f})"
        self.bar.set_postfix_str(f"{loss}, {speed:.0f} images/s", refresh=False)
        others = "".join(f"{name} {value:.3f}  " for name, value in means.items())
        self.summary = f"{loss}  {others}{speed:.0f} images/s  {_duration(left)} left"
        if not last:
            terminated = self.world.any(self.terminated)
            late = time.time() - self.saved > 60 * self.args.save_minutes
            if terminated or self.world.any(self.main and late):
                self.save(epoch, step + 1)

    def save(self, epoch, step):
        """last.pt and backbone.pt after so many epochs and further steps; stops after SIGTERM."""
        state = self.method.state_dict()
        if not all(x.isfinite().all() for x in state.values()):  # queue, batch-norm statistics, too
            raise UserError(self._not_finite("network", epoch * self.steps + step))
        # Without SyncBatchNorm each process has batch-norm statistics of its own.
        statistics = self.world.gather_objects(
            {name: x.cpu() for name, x in state.items() if ".running_" in name})
        if self.main:
            backbone = {key: x.cpu() for key, x in self.method.query.backbone.state_dict().items()}
            state = {"model": state, "optimizer": self.optimizer.state_dict(), "epoch": epoch,
                     "step": step, "statistics": statistics, "images": self.images,
                     "source": self.source, "scaler": self.world.scaler.state_dict(),
                     "args": vars(self.args)}
            parts = (state["model"], *state["optimizer"]["state"].values())
            needed = sum(x.nbytes for part in parts for x in part.values() if torch.is_tensor(x))
            write_whole(self.folder / "backbone.pt", lambda p: torch.save(backbone, p), needed)
            write_whole(self.checkpoint, lambda p: torch.save(state, p), needed, sync=True)
        self.saved = time.time()
        if self.world.any(self.terminated):
            self.world.wait()                      # for the first process's files
            raise Terminated(f"terminated after saving {self.checkpoint}; the same command with "
                             f"--resume goes on")

    def log(self, **values):
        if self.main:
            append(self.folder / "log.jsonl", json.dumps(values) + "\n")

    def log_knn(self, epoch, accuracy, count):
        part = f" by {count} of {self.images} images" if count < self.images else ""
        say(f"epoch {epoch}/{self.args.epochs}  kNN top-1 {accuracy:.1f}%{part}")
        self.log(epoch=epoch, knn=accuracy, label=self.label)

    def _not_finite(self, what, step):
        good = f"; the last good checkpoint: {self.checkpoint}" if self.checkpoint.exists() else ""
        return (f"the {what} is not finite at step {step}: lower --lr or raise --temperature "
                f"(learning rate {self.optimizer.param_groups[0]['lr']:.3g}){good}")

    def draw_pairs(self, views, quality_of, count=12):
        """pairs.png: pairs of a batch from best to worst quality, scores below (cf. Fig. 5)."""
        if not self.main:
            return
        order, captions = torch.arange(len(views[0])), [""] * len(views[0])
        if quality_of:
            with self.world.autocast():
                scores = torch.stack(quality_of(*views)).T.cpu()               # (N, 3): q, s^f, s^b
            order = scores[:, 0].argsort(descending=True)
            captions = ["q = {:.2f} =\n{:.2f} - {:.2f}".format(*row) for row in scores.tolist()]
        chosen = order[spaced(len(order), count)].tolist()
        pixels = [(renormalise(view.float()) * 255).round().clamp(0, 255).byte() for view in views]
        pixels = [x.permute(0, 2, 3, 1).cpu().numpy() for x in pixels]
        columns = [[Image.fromarray(view[i]) for view in pixels] for i in chosen]
        last = len(chosen) - 1
        frames = {(0, row): "green" for row in (0, 1)} | {(last, row): "red" for row in (0, 1)}
        canvas = sheet(columns, [captions[i] for i in chosen], frames if quality_of else {}, 96,
                       ("view 1", "view 2"))
        write_whole(self.folder / "pairs.png", lambda path: canvas.save(path, format="PNG"))


def npy(x):
    """The content of a .npy file of a tensor."""
    np.save(content := io.BytesIO(), x.cpu().numpy())
    return content.getvalue()


def _duration(seconds):
    if seconds > 5400:
        return f"{seconds / 3600:.1f} h"
    return f"{seconds / 60:.0f} min" if seconds > 90 else f"{seconds:.0f} s"
