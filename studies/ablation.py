"""What do generated views add, and how many of the hand-made transformations do they replace?

    python -m studies.ablation --preset gain --data-dir data/cifar10-jpeg --jobs 2   # a CPU, hours
    python -m studies.ablation --preset gpu --data-dir data/cifar10-jpeg --generator-data data/tiny
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
from functools import partial
from itertools import product
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.ablation\n")
    sys.exit(2)

import torch
import torch.nn.functional as F
from PIL import Image

from generate_views import load_pipeline
from genview import load_images
from recipes import GENERATION
from studies.eval_generator import reconstruct
from support.command_line import Parser, UserError, say, script, whole
from support.data import find_views, views_into_memory
from support.files import append, write_whole
from support.processes import fast_dtype, setup
from support.seeds import step_generator

# method: (name in the table, training script, its flags)
METHODS = {
    "mocov2": ("MoCo v2", "train_moco.py", {}),
    "mocov3": ("MoCo v3", "train_moco.py", {"method": "mocov3"}),
    "vit": ("MoCo v3, small ViT", "train_moco.py", {"method": "mocov3", "arch": "vit_narrow"}),
    "byol": ("BYOL", "train_byol.py", {}),
    "simsiam": ("SimSiam", "train_byol.py", {"method": "simsiam"}),
    "swav": ("SwAV", "train_swav.py", {}),
}
# row: (name in the table, its views, --views, --quality)
ROWS = {
    "plain": ("plain", None, "pair", "off"),
    # Controls: the image after the autoencoder, which is softer; this with smooth noise, as far
    # from the image as the generated view: the same change without the generator's knowledge.
    "copies": ("the autoencoder's copies", "copies", "pair", "off"),
    "smooth": ("copies with smooth noise", "smooth", "pair", "off"),
    **{f"noise{level}": (f"generated views, noise {level}", str(level), "pair", "off")
       for level in (0, 200, 400)},
    "adaptive": ("generated views, adaptive noise", "adaptive", "pair", "off"),
    "quality": ("... and quality weights", "adaptive", "pair", "exact"),
    "extra": ("the same images as extra samples", "adaptive", "extra", "off"),
}
TRANSFORMATIONS = {"flips": {"crop_min": 1, "colour": 0}, "flips+crops": {"colour": 0}, "all": {}}
CONTROLLED = ("plain", "copies", "smooth", "noise0", "adaptive")
PRESETS = {                                        # [(transformations, epochs, rows, seeds)]
    "gain": [(("flips", "flips+crops"), 60, CONTROLLED, 5), ("all", 60, ("plain", "adaptive"), 5),
             ("flips+crops", 150, ("plain", "adaptive"), 5),
             ("flips+crops", 60, ("extra", "noise200"), 5), ("flips+crops", 60, ("quality",), 3)],
    "gpu": [(name, 200, (*CONTROLLED, "quality"), 3) for name in TRANSFORMATIONS],
}
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)    # Student's t, 1 to 9 degrees


class Run(NamedTuple):
    """What makes a run; the same names in a line of the results."""
    dataset: str
    method: str
    transformations: str
    row: str
    epochs: int
    images: int
    arch: str
    model: str                                     # mini, or the name of the generator's folder
    seed: int


def call(jobs, *command, **flags):
    """Runs a script beside jobs - 1 others and returns its output; UserError where it fails."""
    command = [*command, *(f"--{key.replace('_', '-')}={flags[key]}" for key in flags)]
    env = os.environ | {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // jobs or 1)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: {last}")
    return done.stdout


# -------------------------------------------------------------------------------------- the views
def make_views(args, kind):
    """Writes the views of one noise level, or a control's, into <output-dir>/views-<kind>."""
    folder = args.output_dir / f"views-{kind}"
    if kind not in ("copies", "smooth"):
        text = call(1, "generate_views.py", dataset="cifar10", data_dir=args.data_dir, noise=kind,
                    views_dir=folder, model=args.model, limit=args.limit, **GENERATION["mini"])
        say(f"views, noise {kind}: {text.strip().splitlines()[-1]}")
    elif len(list(folder.rglob("*.png"))) < args.limit:
        images = load_images("cifar10", args.data_dir, "train", 32, args.limit)
        pipe = load_pipeline(args.model, torch.float32, setup().device)
        views = reconstruct(pipe, images.pixels)
        if kind == "smooth":
            paths = find_views(images, make_views(args, "adaptive"), "cifar10")
            generated, _ = views_into_memory(images, paths)
            views = smooth(images.pixels, views, generated)
        for name, view in zip(images.names, views, strict=True):
            save = partial(Image.fromarray(view.permute(1, 2, 0).numpy()).save, format="PNG")
            write_whole((folder / name).with_suffix(".png"), save)
    return folder


def smooth(images, copies, views):
    """Copies with smooth noise, as far from the images as the views: all (N, 3, S, S) uint8.

    |copy + a noise - image| = |view - image| is solved for a >= 0; noise: 8 x 8 normal numbers a
    channel, enlarged bilinearly. A copy that is already further away stays as it is.
    """
    x, offset = images.float(), copies.float() - images.float()
    noise = torch.randn(len(x), 3, 8, 8, generator=step_generator(0))
    noise = F.interpolate(noise, size=x.shape[-2:], mode="bilinear")
    square, along = noise.square().sum((1, 2, 3)), (noise * offset).sum((1, 2, 3))
    missing = ((views.float() - x).square() - offset.square()).sum((1, 2, 3)).clamp_min(0)
    a = ((along.square() + square * missing).sqrt() - along) / square
    a = torch.where(missing > 0, a, 0)[:, None, None, None]
    return (x + offset + a * noise).round().clamp(0, 255).byte()


# --------------------------------------------------------------------------------------- the runs
def plan(args):
    """The runs that the flags ask for; those of one seed follow each other."""
    parts = PRESETS.get(args.preset) or [(args.transformations, args.epochs, args.rows, args.seeds)]
    runs = []
    for names, epochs, rows, seeds in parts:
        seeds = range(seeds) if isinstance(seeds, int) else seeds
        names = [names] if isinstance(names, str) else names
        runs += [Run(args.dataset, method, name, row, args.epochs or epochs, args.limit, args.arch,
                     Path(args.model).name, seed)
                 for seed, name, method, row in product(seeds, names, args.methods, rows)]
    return runs


def run_one(args, run):
    """Trains and evaluates; one line more in the results."""
    start, folder = time.time(), args.output_dir / "-".join(map(str, run))
    _, kind, views, quality = ROWS[run.row]
    flags = dict(dataset=run.dataset, epochs=run.epochs, knn_every=0, views=views, quality=quality,
                 seed=run.seed, output_dir=folder) | TRANSFORMATIONS[run.transformations]
    if run.dataset == "shapes":                    # the training makes the views
        flags |= dict(views_dir="none") if kind is None else dict(noise=kind)
    else:
        views_dir = "none" if kind is None else args.output_dir / f"views-{kind}"
        flags |= dict(views_dir=views_dir, data_dir=args.data_dir, limit=run.images, arch=run.arch)
        if quality == "exact":                     # E is the generator's encoder, fitted already
            encoder = "mini" if args.model == "mini" else f"{args.model}/image_encoder"
            flags |= dict(encoder=encoder, component=views_dir / "foreground.npz")
    _, name, own = METHODS[run.method]
    call(args.jobs, name, "--resume", **flags | own)
    limit = {} if run.dataset == "shapes" else dict(limit=run.images)
    text = call(args.jobs, "eval_linear.py", checkpoint=folder / "last.pt", seed=run.seed, **limit)
    top1 = {key.lower(): float(value) for key, value in re.findall(r"(\w+) top-1 ([\d.]+)%", text)}
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    neg = [entry["neg"] for entry in log if "neg" in entry and entry["epoch"] > run.epochs - 1]
    line = run._asdict() | top1 | {
        "neg": round(statistics.mean(neg), 4) if neg else None, "commit": commit(),
        "seconds": round(time.time() - start), "date": time.strftime("%Y-%m-%d"),
        "hardware": hardware()}
    append(args.results, json.dumps(line) + "\n")
    say(f"{run.transformations}, {run.epochs} epochs, {run.method}, {run.row}, seed {run.seed}: "
        f"kNN {top1['knn']}, linear {top1['linear']}, neg {line['neg']} ({line['seconds']} s)")


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
    """The lines of finished runs, as dicts."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def gains(lines, row, score):
    """Differences of a row to plain, paired by seed. lines: of one group."""
    plain = {line["seed"]: line[score] for line in lines if line["row"] == "plain"}
    return [line[score] - plain[line["seed"]] for line in lines
            if line["row"] == row and line["seed"] in plain]


def interval(values):
    """Half of the 95% interval of the mean of 2 to 10 values."""
    return T95[len(values) - 2] * statistics.stdev(values) / math.sqrt(len(values))


def groups(lines):
    """{(dataset, method, transformations, epochs, images, arch, model, hardware): lines}."""
    found, names = defaultdict(list), [name for name in Run._fields if name not in ("row", "seed")]
    for line in lines:
        found[tuple(line[name] for name in (*names, "hardware"))] += [line]
    return found


def table(lines):
    """Means and standard deviations over the seeds, gains with their 95% intervals, in Markdown."""
    def spread(values):
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):.1f}{deviation}"

    def gain(values):
        if not values:
            return ""
        text = f" ± {interval(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.mean(values):+.1f}{text}"
    text = ""
    for (dataset, method, transformations, epochs, images, arch, model, hardware), group in groups(
            lines).items():
        text += (f"\n{dataset}, {METHODS[method][0]}, {transformations}, {epochs} epochs, "
                 f"{images or 'all'} images, {arch}, generator {model}; {hardware}:\n\n"
                 "| pairs | seeds | kNN | gain | linear | gain | neg |\n" + "| --- " * 7 + "|\n")
        for row in (row for row in ROWS if any(line["row"] == row for line in group)):
            mine = [line for line in group if line["row"] == row]
            neg = [line["neg"] for line in mine if line["neg"] is not None]
            cells = [ROWS[row][0], len(mine)]
            for score in ("knn", "linear"):
                other = "" if row == "plain" else gain(gains(group, row, score))
                cells += [spread([line[score] for line in mine]), other]
            cells.append(f"{round(statistics.mean(neg), 2) + 0.0:.2f}" if neg else "")    # no -0
            text += f"| {' | '.join(map(str, cells))} |\n"
    return text


def parse_args():
    add = (parser := Parser("Training with and without each part of GenView.")).add_argument
    add("--preset", choices=PRESETS, help="the runs of docs/RESULTS.md: gain on a CPU, gpu")
    add("--table", action="store_true", help="only print the table of all results")
    add("--dataset", choices=["cifar10", "shapes"], default="cifar10", help="images to train on")
    add("--methods", nargs="+", choices=[*METHODS, "all"], default=["mocov2"], help="to compare")
    add("--rows", nargs="+", choices=ROWS, default=["plain", "adaptive", "quality"],
        help="rows of the table")
    add("--transformations", nargs="+", choices=TRANSFORMATIONS, default=["all"],
        help="the hand-made transformations that are kept")
    add("--data-dir", default="data", help="CIFAR-10, or its images in a folder")
    add("--model", default="mini", help="mini, or a folder of studies/train_generator.py")
    add("--generator-data", help="train the generator first, on this folder of images")
    add("--generator-steps", type=whole(1), default=50_000, help="steps of that training")
    add("--arch", help="default: resnet10_narrow, which is for CPUs; --preset gpu: resnet18")
    add("--limit", type=whole(256), help="images of cifar10; default: 10000, --preset gpu: 50000")
    add("--epochs", type=whole(1), help="of each run; default: 20, shapes 30, or the preset's")
    add("--seeds", type=whole(), nargs="+", default=[0, 1, 2], help="one run of each row for each")
    add("--jobs", type=whole(1), default=1, help="runs at the same time")
    add("--results", type=Path, help="one line a run; default: <output-dir>/results.jsonl")
    add("--output-dir", type=Path, default=Path("runs/ablation"), help="views and runs")
    args = parser.parse_args()
    args.results = args.results or args.output_dir / "results.jsonl"
    gpu, shapes = args.preset == "gpu", args.dataset == "shapes"
    args.arch = args.arch or ("resnet18" if gpu else "resnet10_narrow")
    args.limit = None if shapes else args.limit or (50_000 if gpu else 10_000)
    if not args.preset:
        args.epochs = args.epochs or (30 if shapes else 20)
    if shapes and (args.preset or {"copies", "smooth"} & set(args.rows)):
        raise UserError("presets and the controls copies and smooth are for --dataset cifar10")
    args.methods = list(METHODS) if "all" in args.methods else args.methods
    return args


def main():
    args = parse_args()
    if args.table:
        return say(table(read_results(args.results)) or f"no runs in {args.results}")
    if args.generator_data:
        args.model = args.output_dir / "generator"
        call(1, "-m", "studies.train_generator", data_dir=args.generator_data,
             output_dir=args.model, steps=args.generator_steps)
    runs = plan(args)
    done = {Run(*(line[name] for name in Run._fields)) for line in read_results(args.results)}
    left = [run for run in runs if run not in done]
    for kind in dict.fromkeys(ROWS[run.row][1] for run in left):
        if kind is not None and args.dataset != "shapes":
            make_views(args, kind)
    start, finished = time.time(), []

    def work(run):
        run_one(args, run)
        finished.append(run)
        hours = (time.time() - start) / 3600 / len(finished) * (len(left) - len(finished))
        say(f"{len(finished)} of {len(left)} runs, about {hours:.1f} h left")
    with ThreadPoolExecutor(args.jobs) as pool:    # after a failure no other run starts
        list(pool.map(work, left))
    lines = [line for line in read_results(args.results)
             if Run(*(line[name] for name in Run._fields)) in runs]
    say(table(lines))


if __name__ == "__main__":
    script(main)
