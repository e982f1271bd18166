"""What do generated views add, and how many of the hand-made transformations do they replace?

    python -m studies.ablation --preset gain --data-dir data/cifar10-jpeg --jobs 2   # a CPU, hours
    python -m studies.ablation --dataset shapes --methods all --rows plain quality --jobs 2
    python -m studies.ablation --table                                               # what is there

Runs of one seed see the same images in the same order and steps. Each finished run is one line of
<output-dir>/results.jsonl; the same command goes on after an interruption. The lines behind
docs/RESULTS.md were written with --results docs/results.jsonl.
"""
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.ablation\n")
    sys.exit(2)

import torch
import torch.nn.functional as F

from generate_views import load_pipeline
from genview import load_images
from recipes import GENERATION
from studies.eval_generator import markdown, reconstruct
from support.command_line import Parser, UserError, as_flag, say, script, whole
from support.files import append, log_lines, write_png
from support.pictures import to_image
from support.processes import fast_dtype, setup
from support.seeds import step_generator
from support.views import find_views, views_into_memory


class Method(NamedTuple):
    name: str                                      # in the table
    script: str
    flags: dict


class Row(NamedTuple):
    name: str                                      # in the table
    kind: str | None                               # of its views: noise level, control, None
    views: str                                     # --views
    quality: str                                   # --quality
    gamma: float = 1.0                             # --gamma


METHODS = {
    "mocov2": Method("MoCo v2", "train_moco.py", {}),
    "mocov3": Method("MoCo v3", "train_moco.py", {"method": "mocov3"}),
    "vit": Method("MoCo v3, small ViT", "train_moco.py",
                  {"method": "mocov3", "arch": "vit_narrow"}),
    "byol": Method("BYOL", "train_byol.py", {}),
    "simsiam": Method("SimSiam", "train_byol.py", {"method": "simsiam"}),
    "swav": Method("SwAV", "train_swav.py", {}),
}
# Controls: the image after the autoencoder, which is softer; this with smooth noise, as far from
# the image as the generated view: the same change without the generator's knowledge; another image
# of the same class, the most that a generator could know; and real images of another data set.
CONTROLS = ("copies", "smooth", "class", "real")
ROWS = {
    "plain": Row("plain", None, "pair", "off"),
    "copies": Row("the autoencoder's copies", "copies", "pair", "off"),
    "smooth": Row("copies with smooth noise", "smooth", "pair", "off"),
    "noise0": Row("generated views, noise 0", "0", "pair", "off"),
    "noise200": Row("generated views, noise 200", "200", "pair", "off"),
    "noise400": Row("generated views, noise 400", "400", "pair", "off"),
    "adaptive": Row("generated views, adaptive noise", "adaptive", "pair", "off"),
    "quality": Row("... and quality weights", "adaptive", "pair", "exact"),
    "quality10": Row("... and quality weights, gamma 10", "adaptive", "pair", "exact", 10.0),
    "opposite10": Row("... and opposite weights, gamma -10", "adaptive", "pair", "exact", -10.0),
    "class": Row("another image of the same class", "class", "pair", "off"),
    "extra": Row("the same images as extra samples", "adaptive", "extra", "off"),
    "real": Row("real images as extra samples", "real", "extra", "off"),
}
CONTROLLED = ("plain", "copies", "smooth", "noise0", "adaptive")
TRANSFORMATIONS = {"flips": {"crop_min": 1, "colour": 0}, "flips+crops": {"colour": 0}, "all": {}}
EPOCHS = {"cifar10": 20, "shapes": 30}
SCORES = {"knn": "kNN", "linear": "linear", "finetune-10": "10% of labels",
          "finetune-1": "1% of labels"}            # of a line: title in the table
ACCURACY = re.compile(r"(\w+) top-1 ([\d.]+)%")
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)    # Student's t, 1 to 9 degrees


class Trial(NamedTuple):
    """One training with its evaluation; the same names in a line of the results."""
    dataset: str
    method: str
    transformations: str
    row: str
    epochs: int
    images: int | None                             # None: all
    arch: str
    model: str                                     # mini, or the name of the generator's folder
    seed: int


class Setting(NamedTuple):
    """What the lines of one table share; the same names in a line of the results."""
    dataset: str
    method: str
    transformations: str
    epochs: int
    images: int | None
    arch: str
    model: str
    hardware: str


class Comparison(NamedTuple):
    """Trials: each row with each of the transformations and seeds."""
    transformations: list
    epochs: int
    rows: list
    seeds: list


GAIN = [                                           # --preset gain
    Comparison(["flips", "flips+crops"], 60, CONTROLLED, range(5)),
    Comparison(["all"], 60, ["plain", "adaptive"], range(5)),
    Comparison(["flips+crops"], 150, ["plain", "adaptive"], range(5)),
    Comparison(["flips+crops"], 60, ["extra", "noise200"], range(5)),
    Comparison(["flips+crops"], 60, ["quality"], range(3)),
]


def call(jobs, *command, **flags):
    """Runs a script beside jobs - 1 others and returns its output; UserError where it fails.

    They share the cores, unless OMP_NUM_THREADS says how many threads each may use.
    """
    command = [*command] + [f"{as_flag(name)}={value}" for name, value in flags.items()]
    threads = max(1, (os.cpu_count() or 1) // jobs)
    env = {"OMP_NUM_THREADS": str(threads)} | os.environ
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    if done.returncode:
        said = done.stderr.strip().splitlines() or ["no message"]
        raise UserError(f"{' '.join(command)}: {said[-1]}")
    return done.stdout


# -------------------------------------------------------------------------------------- the views
def write_views(args, kind):
    """Writes the views of one noise level, or a control's, into <output-dir>/views-<kind>."""
    folder = args.output_dir / f"views-{kind}"
    if kind not in CONTROLS:
        text = call(1, "generate_views.py", dataset="cifar10", data_dir=args.data_dir, noise=kind,
                    views_dir=folder, model=args.model, limit=args.limit, **GENERATION["mini"])
        say(f"views, noise {kind}: {text.strip().splitlines()[-1]}")
    elif len(list(folder.rglob("*.png"))) < args.limit:
        images = load_images("cifar10", args.data_dir, "train", 32, args.limit)
        pictures = make_control(args, kind, images)
        for name, picture in zip(images.names, pictures, strict=True):
            write_png((folder / name).with_suffix(".png"), to_image(picture))
    return folder


def make_control(args, kind, images):
    """The control of each image, (N, 3, 32, 32) uint8."""
    if kind == "class":
        return images.pixels[of_same_class(images.labels)]
    if kind == "real":
        return real_images(args).pixels
    pipe = load_pipeline(args.model, torch.float32, setup().device)
    copies = reconstruct(pipe, images.pixels)
    if kind == "copies":
        return copies
    paths = find_views(images, write_views(args, "adaptive"), "cifar10")
    views, _ = views_into_memory(images, paths)
    return smooth(images.pixels, copies, views)


def real_images(args):
    """As many further images as there are training images."""
    images = load_images("folder", args.real_dir, "train", 32, args.limit)
    if len(images.names) < args.limit:
        raise UserError(f"--real-dir {args.real_dir} has {len(images.names)} images, {args.limit} "
                        f"are needed (--limit)")
    return images


def of_same_class(labels):
    """For each of the labels (N,) the place of another one that is equal: (N,), each place once."""
    order = torch.randperm(len(labels), generator=step_generator(0))
    partner = torch.empty_like(order)
    for label in labels.unique():
        members = order[labels[order] == label]
        partner[members] = members.roll(1)
    return partner


def smooth(images, copies, views):
    """Copies with smooth noise, as far from the images as the views: all (N, 3, S, S) uint8.

    |copy + a noise - image| = |view - image| is solved for a >= 0; noise: 8 x 8 normal numbers a
    channel, enlarged bilinearly. A copy that is already further away stays as it is.
    """
    x = images.float()
    offset = copies.float() - x
    noise = torch.randn(len(x), 3, 8, 8, generator=step_generator(0))
    noise = F.interpolate(noise, size=x.shape[-2:], mode="bilinear")
    square = noise.square().sum((1, 2, 3))                                               # (N,)
    along = (noise * offset).sum((1, 2, 3))
    missing = ((views.float() - x).square() - offset.square()).sum((1, 2, 3)).clamp_min(0)
    a = ((along.square() + square * missing).sqrt() - along) / square
    a = torch.where(missing > 0, a, 0)[:, None, None, None]
    return (copies.float() + a * noise).round().clamp(0, 255).byte()


# ------------------------------------------------------------------------------------- the trials
def plan(args):
    """The trials that the flags ask for; those of one seed follow each other."""
    comparisons = [Comparison(args.transformations, EPOCHS[args.dataset], args.rows, args.seeds)]
    if args.preset:
        comparisons = GAIN
    trials = []
    for part in comparisons:
        for seed, transformations, method, row in product(
                part.seeds, part.transformations, args.methods, part.rows):
            trials.append(Trial(
                args.dataset, method, transformations, row, args.epochs or part.epochs, args.limit,
                args.arch, Path(args.model).name, seed))
    return trials


def trial_of(line):
    """The trial of a line of the results."""
    return Trial(*[line[name] for name in Trial._fields])


def training_flags(args, trial, folder):
    """The flags of its training script, as keywords."""
    row = ROWS[trial.row]
    flags = dict(dataset=trial.dataset, epochs=trial.epochs, knn_every=0, views=row.views,
                 quality=row.quality, gamma=row.gamma, seed=trial.seed, output_dir=folder)
    flags |= TRANSFORMATIONS[trial.transformations]
    if row.kind is None:
        flags["views_dir"] = "none"
    elif trial.dataset == "shapes":                # the training makes the views
        flags["noise"] = row.kind
    else:
        flags["views_dir"] = args.output_dir / f"views-{row.kind}"
    if trial.dataset == "cifar10":
        flags |= dict(data_dir=args.data_dir, limit=trial.images, arch=trial.arch)
        if row.quality == "exact":                 # E is the generator's encoder, fitted already
            flags["encoder"] = "mini" if args.model == "mini" else f"{args.model}/image_encoder"
            flags["component"] = flags["views_dir"] / "foreground.npz"
    return flags | METHODS[trial.method].flags


def run_trial(args, trial):
    """Trains and evaluates; one line more in the results."""
    start = time.time()
    folder = args.output_dir / "-".join(map(str, trial))
    program = METHODS[trial.method].script
    call(args.jobs, program, "--resume", **training_flags(args, trial, folder))
    line = trial._asdict() | score_run(args, trial, folder)
    line["neg"] = mean_neg(folder / "log.jsonl", trial.epochs)
    line["commit"] = commit()
    line["seconds"] = round(time.time() - start)
    line["date"] = time.strftime("%Y-%m-%d")
    line["hardware"] = hardware()
    append(args.results, json.dumps(line) + "\n")
    say(f"{trial.transformations}, {trial.epochs} epochs, {trial.method}, {trial.row}, "
        f"seed {trial.seed}: kNN {line['knn']}, linear {line['linear']}, neg {line['neg']} "
        f"({line['seconds']} s)")


def score_run(args, trial, folder):
    """{name in SCORES: accuracy} of a training; fine-tuned on each share of args.labels, too."""
    flags = dict(checkpoint=folder / "last.pt", seed=trial.seed)
    if trial.images is not None:
        flags["limit"] = trial.images
    text = call(args.jobs, "eval_linear.py", **flags)
    scores = {name.lower(): float(score) for name, score in ACCURACY.findall(text)}
    for share in args.labels:
        text = call(args.jobs, "eval_linear.py", "--resume", protocol="finetune", labels=share,
                    **flags)
        scores[finetuned(share)] = float(dict(ACCURACY.findall(text))["finetune"])
    return scores


def finetuned(share):
    """The score's name in a line of the results. share: of the labels, 0 to 1."""
    return f"finetune-{100 * share:g}"


def mean_neg(path, epochs):
    """The mean cosine of negatives in the last epoch of a log, None where the method has none."""
    log = map(json.loads, path.read_text().splitlines())
    neg = [line["neg"] for line in log if "neg" in line and line["epoch"] > epochs - 1]
    return round(statistics.mean(neg), 4) if neg else None


def commit():
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def hardware():
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    names = re.findall("model name.*: (.*)", info.read_text()) if info.exists() else []
    name = names[0] if names else platform.processor()
    return f"{name}, {str(fast_dtype(torch.device('cpu'))).removeprefix('torch.')}"


# -------------------------------------------------------------------------------------- the table
def read_results(path):
    """Finished trials, as dicts. A further line of the same trial and machine adds its scores.
    UserError where the file holds anything else."""
    found = {}
    for _, line in log_lines(path) if path.exists() else ():
        try:
            key = trial_of(line), line["hardware"]
        except KeyError as missing:
            raise UserError(f"{path} has a line without {missing}: it holds no trials of "
                            f"studies.ablation") from None
        found[key] = line | found.get(key, {})
    return list(found.values())


def values_of(lines, row, score):
    """{seed: score} of a row, where it was measured. lines: of one setting."""
    return {line["seed"]: line[score] for line in lines if line["row"] == row and score in line}


def gains(lines, row, score):
    """Differences of a row to plain, paired by seed. lines: of one setting."""
    plain = values_of(lines, "plain", score)
    return [value - plain[seed] for seed, value in values_of(lines, row, score).items()
            if seed in plain]


def half_interval(values):
    """Half of the 95% interval of the mean of two values or more."""
    return student_t95(len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))


def student_t95(degrees):
    """The t that 95% of the values of Student's distribution do not exceed in size."""
    if degrees <= len(T95):
        return T95[degrees - 1]
    # A series in 1 / degrees (Abramowitz and Stegun, 26.7.5); from 10 degrees on to two decimals.
    z = 1.96
    first = (z ** 3 + z) / 4
    second = (5 * z ** 5 + 16 * z ** 3 + 3 * z) / 96
    return z + first / degrees + second / degrees ** 2


def by_setting(lines):
    """{setting: its lines}."""
    found = defaultdict(list)
    for line in lines:
        setting = Setting(*[line[name] for name in Setting._fields])
        found[setting].append(line)
    return found


def results_table(lines):
    """Means and standard deviations over the seeds, gains with their 95% intervals, in Markdown."""
    text = ""
    for setting, group in by_setting(lines).items():
        text += (f"\n{setting.dataset}, {METHODS[setting.method].name}, {setting.transformations}, "
                 f"{setting.epochs} epochs, {setting.images or 'all'} images, {setting.arch}, "
                 f"generator {setting.model}; {setting.hardware}:\n\n")
        scores = [score for score in SCORES if any(score in line for line in group)]
        titles = ["pairs", "seeds"]
        for score in scores:
            titles += [SCORES[score], "gain"]
        titles.append("neg")
        rows = [row for row in ROWS if any(line["row"] == row for line in group)]
        text += markdown(titles, *[cells(group, row, scores) for row in rows])
    return text


def cells(lines, row, scores):
    """A row of a table, as texts. lines: of one setting."""
    mine = [line for line in lines if line["row"] == row]
    texts = [ROWS[row].name, str(len(mine))]
    for score in scores:
        texts.append(mean_and_spread(list(values_of(lines, row, score).values())))
        texts.append("" if row == "plain" else mean_gain(gains(lines, row, score)))
    neg = [line["neg"] for line in mine if line["neg"] is not None]
    mean = f"{statistics.mean(neg):.2f}" if neg else ""
    texts.append(mean.replace("-0.00", "0.00"))
    return texts


def mean_and_spread(values):
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.1f}{spread}"


def mean_gain(values):
    if not values:
        return ""
    half = f" ± {half_interval(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):+.1f}{half}"


# -------------------------------------------------------------------------------------------- main
def parse_args():
    parser = Parser("Training with and without each part of GenView.")
    add = parser.add_argument
    add("--preset", choices=["gain"], help="the trials of docs/RESULTS.md: hours on a CPU")
    add("--table", action="store_true", help="only print the table of all results")
    add("--dataset", choices=["cifar10", "shapes"], default="cifar10", help="images to train on")
    add("--methods", nargs="+", choices=[*METHODS, "all"], default=["mocov2"], help="to compare")
    add("--rows", nargs="+", choices=ROWS, default=["plain", "adaptive", "quality"],
        help="rows of the table")
    add("--transformations", nargs="+", choices=TRANSFORMATIONS, default=["all"],
        help="the hand-made transformations that are kept")
    add("--data-dir", default="data", help="CIFAR-10, or its images in a folder")
    add("--model", default="mini", help="mini, or a folder of studies/train_generator.py")
    add("--arch", default="resnet10_narrow", help="of the images of cifar10")
    add("--limit", type=whole(256), help="images of cifar10; default: 10000")
    add("--labels", type=float, choices=[0.1, 0.01], nargs="+", default=[],
        help="also fine-tune on these shares of the labels")
    add("--real-dir", default="data/tinyimagenet32", help="images of the row real, in train/CLASS/")
    add("--epochs", type=whole(1), help="of each trial; default: 20, shapes 30, or the preset's")
    add("--seeds", type=whole(), nargs="+", default=[0, 1, 2], help="a trial of each row for each")
    add("--jobs", type=whole(1), default=1, help="trials at the same time")
    add("--results", type=Path, help="one line a trial; default: <output-dir>/results.jsonl")
    add("--output-dir", type=Path, default=Path("runs/ablation"), help="views and runs")
    args = parser.parse_args()
    shapes = args.dataset == "shapes"
    if shapes and (args.preset or set(CONTROLS) & set(args.rows)):
        raise UserError(f"presets and the controls {', '.join(CONTROLS)} are for --dataset cifar10")
    args.limit = None if shapes else args.limit or 10_000
    args.results = args.results or args.output_dir / "results.jsonl"
    if "all" in args.methods:
        args.methods = list(METHODS)
    return args


def main():
    args = parse_args()
    if args.table:
        return say(results_table(read_results(args.results)) or f"no runs in {args.results}")
    trials = plan(args)
    wanted = {"knn", "linear", *map(finetuned, args.labels)}
    done = {trial_of(line) for line in read_results(args.results) if wanted <= line.keys()}
    left = [trial for trial in trials if trial not in done]
    kinds = dict.fromkeys(ROWS[trial.row].kind for trial in left)      # each once, in order
    for kind in kinds:
        if kind is not None and args.dataset == "cifar10":
            write_views(args, kind)
    start = time.time()
    finished = []

    def work(trial):
        run_trial(args, trial)
        finished.append(trial)
        hours = (time.time() - start) / 3600 / len(finished) * (len(left) - len(finished))
        say(f"{len(finished)} of {len(left)} trials, about {hours:.1f} h left")
    with ThreadPoolExecutor(args.jobs) as pool:    # after a failure no other trial starts
        list(pool.map(work, left))
    say(results_table([line for line in read_results(args.results) if trial_of(line) in trials]))


if __name__ == "__main__":
    script(main)
