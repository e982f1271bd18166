"""A training run: its runtime flags, its folder, its log, saving, resuming, stopping.

The folder holds last.pt (everything to resume), backbone.pt, log.jsonl, args.json and what the
script draws or keeps there.
"""
import datetime
import math
import textwrap
import time
from pathlib import Path

import torch

from support.checkpoint import Checkpoint, SaveTimes, identity_of
from support.command_line import (
    UserError,
    duration,
    from_environment,
    progress,
    real,
    say,
    say_above,
    whole,
)
from support.data import IN_MEMORY_SIZE, SAME_FILES
from support.files import Log, write_json, write_whole
from support.processes import compare, compare_each, cores_of_process, dtype_name
from support.views import content_of_images

# Flags that may differ when a run is resumed: they do not change its result, or digests of what
# they name take their place.
FREE = {"data_dir", "output_dir", "resume", "device", "compile", "workers", "skip_bad", "knn_every",
        "knn_images", "log_every", "save_minutes", "encoder", "component"}
HEALTHY_NEG = 0.25    # mean cosine of negatives above which a run is warned
TIMED_STEPS = 10      # whose time tells how long a run will take, after the first, which is slow
LONG = 2 * 3600       # seconds from which on a smaller run is named, of small images on a CPU
SMALLER = ("--limit 10000 --arch resnet10_narrow --epochs 60 --crop-min 1 --colour 0 "
           "--quality off")          # README's small run
SMALLER_SIZE = 10_000 * 60    # images in all of its epochs


# -------------------------------------------------------------------------------------------- flags
def add_runtime_flags(parser):
    """The runtime flags of a training script."""
    add = parser.add_argument_group("runtime").add_argument
    add("--output-dir", help="default: runs/<dataset>-<method>-<genview, plain or extra>-<time>")
    add("--resume", nargs="?", const="last", metavar="PATH",
        help="go on from a last.pt; without PATH from the newest of such a run")
    add("--seed", type=whole(), default=0, help="of all random numbers")
    add("--device", help="cuda, mps or cpu; default: the first that is available")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 where it is fast, float16 on other GPUs, else float32")
    add("--compile", action="store_true", help="torch.compile: a slow start, faster steps on GPUs")
    add("--workers", type=whole(), default=cores_of_process(),
        help="processes that read large images")
    add("--knn-images", type=whole(1), help="train images that kNN looks at while training; "
        "default: all small ones; of large ones a tenth, at least 10,000")
    add("--save-minutes", type=real(0, 1e6), default=15, help="between checkpoints in an epoch")
    add("--log-every", type=whole(1), default=10, help="steps between lines of log.jsonl")


def check_batch(batch_size):
    """UserError where the processes cannot divide the batch or it is too small for batch norm."""
    processes = max(1, from_environment("WORLD_SIZE", 1))
    if batch_size % processes:
        raise UserError(f"--batch-size {batch_size} cannot be divided among {processes} "
                        f"processes: give a multiple")
    if batch_size < 2 * processes:
        raise UserError(f"--batch-size {batch_size}: batch normalisation needs two images in each "
                        f"process")


def begins_new(output_dir, resume):
    """Do the flags begin a new run? --resume does, too, where the folder holds none yet."""
    if resume == "last" and output_dir:
        return not Path(output_dir, "last.pt").exists()
    return not resume


def choose_folder(output_dir, resume, name):
    """The run's folder and the checkpoint it goes on from (None: a new run), both as text.

    output_dir, resume: as the flags say. name: how the folders of such runs begin, before the time.
    """
    if resume and begins_new(output_dir, resume):
        say(f"nothing to resume in {output_dir}: a new run")
        resume = None
    elif resume == "last":
        resume = _newest_checkpoint(output_dir, name)
    if output_dir:
        folder = Path(output_dir)
    elif resume:
        folder = Path(resume).parent
    else:
        moment = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
        folder = Path("runs", f"{name}-{moment}")
    refuse_taken(folder, resume)
    return str(folder), resume


def refuse_taken(folder, resume):
    """UserError where the folder holds another run than the one that is resumed."""
    last = folder / "last.pt"
    goes_on = resume and Path(resume).resolve() == last.resolve()
    if last.exists() and not goes_on:
        way = f"--resume {last}" if resume else "--resume"
        raise UserError(f"{folder} holds a run already: go on with {way}, or name another "
                        f"--output-dir")


def _newest_checkpoint(output_dir, name):
    """For --resume without a path: the last.pt in output_dir, else the newest of such runs."""
    if output_dir:
        return str(Path(output_dir, "last.pt"))
    found = list(Path("runs").glob(f"{name}-*/last.pt"))
    if not found:
        raise UserError(f"no runs/{name}-*/last.pt to resume: name one by --resume PATH, or begin "
                        f"a new run without --resume")
    newest = max(found, key=lambda path: path.stat().st_mtime)
    if len(found) > 1:
        say(f"--resume {newest}: the newest of {len(found)} such runs")
    return str(newest)


# ------------------------------------------------------------------------------------------ the run
class Run:
    """One training run. Only the first process writes; all processes call the same methods."""
    def __init__(self, args, world, method, optimizer, images):
        """images: what it trains on."""
        self.args = args
        self.world = world
        self.method = method
        self.optimizer = optimizer
        self.num_images = len(images.names)
        self.content = {"images": content_of_images(images)}
        self.content_before = {}                   # of the run that is resumed
        self.main = world.rank == 0
        self.folder = Path(world.gather_objects(args.output_dir)[0])     # its name holds the time
        if self.main:
            refuse_taken(self.folder, args.resume)     # by a run that was faster
        self.checkpoint = Checkpoint(self.folder / "last.pt", self._identity(images), world)
        self.start_epoch = 0                       # where the run goes on
        self.start_step = 0

    def _identity(self, images):
        settings = identity_of(self.args, FREE)
        views_dir = settings.pop("--views-dir", "none")                  # views may move, too
        identity = {"with views": views_dir != "none"} | settings        # the cause comes first
        # Their names, not their place: data may move. With those that cannot be read: a run may go
        # on without a picture that broke.
        identity["images"] = images.source
        return identity

    @property
    def is_new(self):
        return self.start_epoch == self.start_step == 0

    def resume(self):
        """Loads --resume's checkpoint into method and optimizer."""
        path = self.args.resume
        compare("a checkpoint to resume", bool(path), "it must lie in one folder for all machines")
        if path and not Path(path).exists():
            raise UserError(f"{path} cannot be loaded as a checkpoint (it is missing); name a "
                            f"last.pt by its path")
        state = self.checkpoint.load(path) if path else {}
        if not state:
            return
        with self.checkpoint.restoring():
            statistics = state["statistics"]
            if len(statistics) == self.world.size:
                state["model"] |= statistics[self.world.rank]
            self.method.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if state["scaler"]:
                self.world.scaler.load_state_dict(state["scaler"])
            self.start_epoch = int(state["epoch"])
            self.start_step = int(state["step"])
        self.content_before = state.get("content", {})

    def begin(self, steps, label, loaded, views):
        """Opens the folder once all is loaded.

        Args:
            steps: of an epoch.
            label: the run in words.
            loaded: {name: value}, what else all processes, a run and its continuation share.
            views: what tells the generated views from others; a run may go on with others.
        """
        compare_each(loaded, SAME_FILES)
        self.checkpoint.extend_identity(loaded)
        self.content["generated views"] = views
        for name, now in self.content.items():
            before = self.content_before.get(name, now)
            if before != now:
                say(f"*** {name}: the run that goes on had {before}, here are {now}: not the same "
                    f"result as without the interruption")
        self.steps = steps
        self.label = label
        self.save_times = SaveTimes(self.args.save_minutes, self.world)
        self.pending = []                          # read-outs that are not yet in the log
        self.summary = ""
        self.neg = 0.0
        self.log = Log(self.folder, self.world)
        done = self.start_epoch * steps + self.start_step

        def is_done(line):
            return line["epoch"] <= self.start_epoch if "knn" in line else line["step"] <= done
        self.log.keep(is_done)
        if not self.main:
            return
        write_json(self.folder / "args.json", vars(self.args) | {"label": self.label})
        say(f"{self.label} on {self.args.dataset}, {steps} steps an epoch, {self.world.size} x "
            f"{self.world.device.type}, {dtype_name(self.world.dtype)}")
        settings = "  ".join(f"{name}={value}" for name, value in vars(self.args).items())
        say(textwrap.fill(settings, 100))

    def begin_epoch(self, epoch):
        """Starts the progress bar. Returns the first step to do."""
        first = self.start_step if epoch == self.start_epoch else 0
        self.epoch = epoch
        self.first_step = first
        self.began = time.monotonic()
        self.bar = progress(None, f"epoch {epoch + 1}/{self.args.epochs}", "batch",
                            total=self.steps, initial=first)
        return first

    def after_step(self, step, readouts):
        """Logs the means of the read-outs, refuses a loss that is not finite, saves when it is
        time, stops when a signal asks for it."""
        self.bar.update(1)
        if self.main and self.epoch == self.start_epoch:
            self._say_how_long(step, readouts["loss"])
        self.pending.append(torch.stack(list(readouts.values())).float())
        last = step + 1 == self.steps
        if last or (step + 1) % self.args.log_every == 0:
            self._log_means(step, list(readouts))
            if not last and self.save_times.due():
                self.save(self.epoch, step + 1)

    def _say_how_long(self, step, loss):
        """One line early in a new or resumed run, after TIMED_STEPS steps."""
        timed = step - self.first_step             # steps after the first
        if timed == 0:
            loss.item()                            # a GPU works on: wait for it
            self.timed_from = time.monotonic()
        if timed != TIMED_STEPS:
            return
        loss.item()
        seconds_a_step = (time.monotonic() - self.timed_from) / timed
        done = self.start_epoch * self.steps + self.first_step
        seconds = (self.args.epochs * self.steps - done) * seconds_a_step
        what = "this run" if self.is_new else "the rest of this run"
        text = f"{what} will take about {duration(seconds)} on this machine"
        on_cpu = self.world.device.type == "cpu"
        is_larger = self.num_images * self.args.epochs > SMALLER_SIZE
        if on_cpu and is_larger and seconds > LONG and self.args.image_size <= IN_MEMORY_SIZE:
            text += f"; a smaller one: {SMALLER}"
        say_above(self.bar, text)

    def _log_means(self, step, names):
        number = self.epoch * self.steps + step + 1
        table = self.world.mean(torch.stack(self.pending))                 # (steps, read-outs)
        self.pending.clear()
        self._refuse_not_finite(table[:, 0], number)
        means = dict(zip(names, table.mean(0).tolist(), strict=True))
        self.neg = means.get("neg", 0.0)
        seconds = time.monotonic() - self.began
        speed = (step + 1 - self.first_step) * self.args.batch_size / seconds
        left = (self.args.epochs * self.steps - number) * self.args.batch_size / speed
        chance = self.method.chance
        self.log.write(epoch=round(number / self.steps, 4), step=number, **means, chance=chance,
                       lr=self.optimizer.param_groups[0]["lr"], images_per_s=speed)
        loss = f"loss {means.pop('loss'):.3f} (chance {chance:.2f})"
        others = "".join(f"{name} {value:.3f}  " for name, value in means.items())
        self.bar.set_postfix_str(f"{loss}, {speed:.0f} images/s", refresh=False)
        self.summary = f"{loss}  {others}{speed:.0f} images/s  {duration(left)} left"

    def end_epoch(self):
        """Closes the bar, says how the epoch was, and saves."""
        self.bar.close()
        if self.summary:                           # else resumed after the epoch's last step
            say(f"epoch {self.epoch + 1}/{self.args.epochs}  {self.summary}")
            self.summary = ""
        judged = max(2, math.ceil(self.args.epochs / 5))           # epochs, once
        is_time = self.epoch + 1 == judged
        if is_time and self.args.method == "mocov2" and self.neg > HEALTHY_NEG:
            say(f"*** neg is {self.neg:.2f}, where 0 is healthy: keys drift, and age tells the "
                f"positive: use a smaller --queue, a higher --temperature or --lr")
        self.save(self.epoch, self.steps)

    def save(self, epoch, step):
        """last.pt and backbone.pt after so many epochs and further steps; stops when a signal asks
        for it."""
        state = self.method.state_dict()
        if not all(x.isfinite().all() for x in state.values()):  # queue, batch-norm statistics, too
            raise UserError(self._not_finite("network", epoch * self.steps + step))
        # Without SyncBatchNorm each process has batch-norm statistics of its own.
        own = {name: x.cpu() for name, x in state.items() if ".running_" in name}
        statistics = self.world.gather_objects(own)
        if self.main:
            backbone = {key: x.cpu() for key, x in self.method.query.backbone.state_dict().items()}
            write_whole(self.folder / "backbone.pt", lambda path: torch.save(backbone, path))
        self.checkpoint.save(
            model=state, optimizer=self.optimizer.state_dict(), epoch=epoch, step=step,
            statistics=statistics, scaler=self.world.scaler.state_dict(), content=self.content,
            args=vars(self.args))
        self.save_times.saved(self.checkpoint.path, "the same command with --resume")

    def end(self):
        """After the last epoch: a signal ends the process at once."""
        self.save_times.end()

    def log_knn(self, accuracy, count):
        """count: of the training images that it looked at."""
        few = count < self.num_images
        part = f" by {count} of {self.num_images} images" if few else ""
        say(f"epoch {self.epoch + 1}/{self.args.epochs}  kNN top-1 {accuracy:.1f}%{part}")
        self.log.write(epoch=self.epoch + 1, knn=accuracy, label=self.label)

    def _refuse_not_finite(self, losses, number):
        """losses: of the steps up to this number, the last."""
        bad = (~losses.isfinite()).nonzero()
        if len(bad):
            first = number - len(losses) + 1 + bad[0].item()
            raise UserError(self._not_finite("loss", first))

    def _not_finite(self, what, step):
        path = self.checkpoint.path
        good = f"; the last good checkpoint: {path}" if path.exists() else ""
        rate = self.optimizer.param_groups[0]["lr"]
        ways = ["lower --lr"]
        if self.args.temperature:
            ways.append("raise --temperature")
        if self.world.dtype == torch.float16:
            ways.insert(0, "--precision float32")
        return (f"the {what} is not finite at step {step}: {' or '.join(ways)} (learning rate "
                f"{rate:.3g}){good}")
