"""The ablation: what do generated views, adaptive noise and quality weights each add?

    python -m studies.ablation --data-dir data/cifar10-jpeg --jobs 2        # MoCo v2, 2 CPU cores
    python -m studies.ablation --dataset shapes --methods all --rows plain quality --jobs 2

Rows have equal images, steps and seeds. The same command goes on after an interruption.
"""
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.ablation\n")
    sys.exit(2)

import torch
from PIL import Image

from generate_views import load_pipeline
from genview import load_images
from recipes import GENERATION
from studies.eval_generator import reconstruct
from support.files import read_settings, write_json, write_whole
from support.world import Parser, UserError, say, script, whole

# method: (name in the table, training script, its flags)
METHODS = {
    "mocov2": ("MoCo v2", "train_moco.py", {}),
    "mocov3": ("MoCo v3", "train_moco.py", {"method": "mocov3"}),
    "vit": ("MoCo v3, small ViT", "train_moco.py", {"method": "mocov3", "arch": "vit_narrow"}),
    "byol": ("BYOL", "train_byol.py", {}),
    "simsiam": ("SimSiam", "train_byol.py", {"method": "simsiam"}),
    "swav": ("SwAV", "train_swav.py", {}),
}
# row: (name in the table, noise of its views, --views, --quality)
ROWS = {
    "plain": ("plain", None, "pair", "off"),
    **{f"noise{level}": (f"+ views, constant noise {level}", level, "pair", "off")
       for level in (0, 200, 400)},
    "adaptive": ("+ views, adaptive noise", "adaptive", "pair", "off"),
    "quality": ("+ views, adaptive noise, quality weights", "adaptive", "pair", "exact"),
    "extra": ("the same images as extra samples", "adaptive", "extra", "off"),
    # A control, run only where --rows names it: the image itself, softened by the autoencoder.
    "copies": ("the autoencoder's copies for views", "copies", "pair", "off"),
}


def call(jobs, name, *extra, **flags):
    """Runs a script beside jobs - 1 others and returns its output; UserError where it fails."""
    command = [name, *(f"--{key.replace('_', '-')}={flags[key]}" for key in flags), *extra]
    env = os.environ | {"OMP_NUM_THREADS": str((os.cpu_count() or 1) // jobs or 1)}
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, env=env)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise UserError(f"{' '.join(command)}: {last}")
    return done.stdout


def make_views(args, noise):
    """Writes views of one noise level, or the control's, into <output-dir>/views-<noise>."""
    folder = args.output_dir / f"views-{noise}"
    if noise != "copies":
        text = call(1, "generate_views.py", dataset="cifar10", data_dir=args.data_dir, noise=noise,
                    views_dir=folder, model=args.model, limit=args.limit, **GENERATION["mini"])
        return say(f"views, noise {noise}: {text.strip().splitlines()[-1]}")
    images = load_images("cifar10", args.data_dir, "train", 32, args.limit)
    pipe = load_pipeline(args.model, torch.float32, torch.device("cpu"))
    for name, view in zip(images.names, reconstruct(pipe, images.pixels), strict=True):
        save = partial(Image.fromarray(view.permute(1, 2, 0).numpy()).save, format="PNG")
        write_whole((folder / name).with_suffix(".png"), save)


def run_one(args, seed, method, row):
    """Trains and evaluates one row of a method with one seed, unless that is done."""
    start, folder = time.time(), args.output_dir / f"{method}-{row}-{seed}"
    _, noise, views, quality = ROWS[row]
    views_dir = "none" if noise is None else args.output_dir / f"views-{noise}"
    flags = dict(dataset=args.dataset, epochs=args.epochs, knn_every=args.epochs, views=views)
    if args.dataset == "shapes":                   # the training makes the views
        flags |= dict(views_dir="none") if noise is None else dict(noise=noise)
    else:
        flags |= dict(views_dir=views_dir, data_dir=args.data_dir, limit=args.limit, arch=args.arch)
        if quality == "exact":                     # E is the generator's encoder, fitted already
            encoder = "mini" if args.model == "mini" else f"{args.model}/image_encoder"
            flags |= dict(encoder=encoder, component=views_dir / "foreground.npz")
    flags |= dict(quality=quality, seed=seed, output_dir=folder) | METHODS[method][2]
    if not {"kNN", "linear"} <= result(folder).keys():
        call(args.jobs, METHODS[method][1], "--resume", **flags)
        call(args.jobs, "eval_linear.py", checkpoint=folder / "last.pt", seed=seed)
    top1 = ", ".join(f"{protocol} {top1:.1f}%" for protocol, top1 in result(folder).items())
    say(f"{method}, {row}, seed {seed}: {top1} ({time.time() - start:.0f} s)")


def result(folder):
    """{protocol: top-1} as far as the run in a folder is evaluated."""
    path = folder / "eval.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["protocol"]: entry["top1"] for entry in map(json.loads, lines)}


def table(args):
    """Means and standard deviations over the seeds, in Markdown."""
    text = "| method | pairs | kNN | linear | kNN, each seed |\n" + "| --- " * 5 + "|\n"
    for method, row in product(args.methods, args.rows):
        runs = [result(args.output_dir / f"{method}-{row}-{seed}") for seed in args.seeds]
        text += f"| {METHODS[method][0]} | {ROWS[row][0]} | "
        for values in ([run[protocol] for run in runs] for protocol in ("kNN", "linear")):
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            text += f"{statistics.mean(values):.1f}{spread} | "
        text += ", ".join(f"{run['kNN']:.1f}" for run in runs) + " |\n"
    return text


def parse_args():
    add = (parser := Parser("Training with and without each part of GenView.")).add_argument
    add("--dataset", choices=["cifar10", "shapes"], default="cifar10", help="images to train on")
    add("--methods", nargs="+", choices=[*METHODS, "all"], default=["mocov2"], help="to compare")
    add("--rows", nargs="+", choices=ROWS, default=list(ROWS)[:-1], help="rows of the table")
    add("--data-dir", default="data", help="CIFAR-10, or its images in a folder")
    add("--model", default="mini", help="mini, or a folder of studies/train_generator.py")
    add("--arch", default="resnet10_narrow", help="network for cifar10; this one is for CPUs")
    add("--limit", type=whole(256), default=10_000, help="training images of cifar10")
    add("--epochs", type=whole(1), help="of each run (default: 20, for shapes 30)")
    add("--seeds", type=whole(), nargs="+", default=[0, 1, 2], help="one run of each row for each")
    add("--jobs", type=whole(1), default=1, help="runs at the same time")
    add("--output-dir", type=Path, default=Path("runs/ablation"), help="all results")
    args = parser.parse_args()
    if args.dataset == "shapes" and "copies" in args.rows:
        raise UserError("the control copies is for --dataset cifar10")
    args.methods = list(METHODS) if "all" in args.methods else args.methods
    args.epochs = args.epochs or (30 if args.dataset == "shapes" else 20)
    return args


def main():
    args = parse_args()
    path, names = args.output_dir / "settings.json", "dataset data_dir model arch limit epochs"
    settings = {name: getattr(args, name) for name in names.split()}
    if path.exists() and read_settings(path) != settings:
        raise UserError(f"{path} is of runs with other settings: name another --output-dir")
    write_json(path, settings)
    for noise in dict.fromkeys(ROWS[row][1] for row in args.rows):
        if noise is not None and args.dataset != "shapes":
            make_views(args, noise)
    runs = product(args.seeds, args.methods, args.rows)
    with ThreadPoolExecutor(args.jobs) as pool:    # after a failure no other run starts
        list(pool.map(lambda run: run_one(args, *run), runs))
    write_whole(args.output_dir / "table.md", lambda path: path.write_text(table(args)))
    say(table(args))


if __name__ == "__main__":
    script(main)
