"""The ablation: what do views, adaptive noise and quality weights each add to MoCo v2, on CIFAR-10? Or to every method?

    python ablation.py --data-dir data/cifar10-jpeg --jobs 2              # 2 CPU cores; writes runs/ablation/table.md
    python ablation.py --arch resnet18 --limit 50000 --epochs 200         # a GPU
    python ablation.py --dataset shapes --methods all --rows plain quality --jobs 2 --output-dir runs/methods

Every row is one command line of generate_views.py, a training script and eval_linear.py, run as a user would; what is finished
stays finished, so the same command goes on after an interruption. Equal images, epochs, steps and seeds in all rows.
"""
import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

import genview
from eval_generator import reconstruct
from generate_views import MINI, load_pipeline
from genview import Trouble, say

# method: (name in the table, training script, its flags)
METHODS = {
    "mocov2": ("MoCo v2", "train_moco.py", []),
    "mocov3": ("MoCo v3", "train_moco.py", ["--method", "mocov3"]),
    "vit": ("MoCo v3, small ViT", "train_moco.py", ["--method", "mocov3", "--arch", "vit_narrow"]),
    "byol": ("BYOL", "train_byol.py", []),
    "simsiam": ("SimSiam", "train_byol.py", ["--method", "simsiam"]),
    "swav": ("SwAV", "train_swav.py", []),
}
# row: (name in the table, noise of its views, further flags of the training script)
ROWS = {
    "plain": ("plain", None, ["--quality", "off"]),
    "noise0": ("+ views, constant noise 0", 0, ["--quality", "off"]),
    "noise200": ("+ views, constant noise 200", 200, ["--quality", "off"]),
    "noise400": ("+ views, constant noise 400", 400, ["--quality", "off"]),
    "adaptive": ("+ views, adaptive noise", "adaptive", ["--quality", "off"]),
    "quality": ("+ views, adaptive noise, quality weights", "adaptive", ["--quality", "exact"]),
    "cached": ("+ views, adaptive noise, cached quality weights", "adaptive", ["--quality", "cached"]),
    "extra": ("the same images as extra samples", "adaptive", ["--views", "extra", "--quality", "off"]),
}
# Controls, run only where --rows names them: what of a generated view makes the difference?
# copies: the image itself, as soft as the generator's autoencoder makes it. class: a ceiling for any generator, a picture of the
# image's class in so many of 100 cases, else of any class; it uses the labels, so it is no result.
CONTROLS = {"copies": ("the autoencoder's copies for views", "copies", ["--quality", "off"])} | {
    f"class{share}": (f"a picture of the class, in {share}% of the cases", f"class{share}", ["--quality", "off"])
    for share in (100, 60)}


def call(jobs, script, *flags):
    """Runs a script of this repository beside jobs - 1 others; Trouble with its last line where it fails."""
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    command = [sys.executable, str(Path(__file__).with_name(script)), *map(str, flags)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": threads})
    if done.returncode:
        raise Trouble(f"{' '.join(command[1:])}: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def views_dir(args, noise):
    return args.output_dir / f"views-{noise}"


def copies(args, images):
    """(limit, 3, 32, 32) uint8: what the generator's autoencoder keeps of the images."""
    pipe = load_pipeline(args.model, torch.float32, torch.device("cpu"))
    return reconstruct(pipe, images.pixels[genview.spaced(len(images.names), args.limit)])


def pictures_of_the_class(args, images, share):
    """(limit, 3, 32, 32) uint8: for share of 100 images a random picture of its class, for the others any."""
    generator, every = genview.step_generator(0, share), torch.arange(len(images.names))
    of_class, others = [every[images.labels == label] for label in range(images.num_classes)], []
    for label in images.labels[genview.spaced(len(images.names), args.limit)].tolist():
        among = of_class[label] if torch.randint(100, (), generator=generator) < share else every
        others.append(among[torch.randint(len(among), (), generator=generator)])
    return images.pixels[torch.stack(others)]


def make_control_views(args, row):
    images = genview.load_images("cifar10", args.data_dir, "train", 32)
    views = copies(args, images) if row == "copies" else pictures_of_the_class(args, images, int(row.removeprefix("class")))
    for index, view in zip(genview.spaced(len(images.names), args.limit).tolist(), views):
        picture = Image.fromarray(view.permute(1, 2, 0).numpy())
        path = views_dir(args, row) / Path(images.names[index]).with_suffix(".png")
        genview.write_whole(path, lambda temporary: picture.save(temporary, format="PNG"))


def make_views(args, noise):
    if noise in CONTROLS:
        return make_control_views(args, noise)
    start = time.time()
    text = call(1, "generate_views.py", "--dataset", "cifar10", "--data-dir", args.data_dir, "--model", args.model,
                "--noise", noise, "--views-dir", views_dir(args, noise), "--limit", args.limit,
                "--steps", MINI["steps"], "--guidance", MINI["guidance"])
    say(f"views, noise {noise}: {text.strip().splitlines()[-1]} ({time.time() - start:.0f} s)")


def flags_of(args, method, row):
    """The training script's flags for a method and a row."""
    _, noise, more = (ROWS | CONTROLS)[row]
    flags = ["--dataset", args.dataset, "--epochs", args.epochs, "--knn-every", args.epochs, *more]
    if args.dataset == "shapes":                   # makes its views itself
        flags += ["--views-dir", "none"] if noise is None else ["--noise", noise]
    else:
        flags += ["--views-dir", "none" if noise is None else views_dir(args, noise), "--data-dir", args.data_dir, "--limit",
                  args.limit, "--arch", args.arch]
        if row in ("quality", "cached"):           # E is the generator's own image encoder; its component is fitted already
            encoder = "mini" if args.model == "mini" else Path(args.model) / "image_encoder"
            flags += ["--encoder", encoder, "--component", views_dir(args, noise) / "foreground.npz"]
    return flags + METHODS[method][2]


def run_one(args, method, row, seed):
    """Trains and evaluates one row of a method with one seed; its folder keeps the result."""
    folder, start = args.output_dir / f"{method}-{row}-{seed}", time.time()
    if not {"kNN", "linear"} <= result(args, method, row, seed).keys():
        call(args.jobs, METHODS[method][1], *flags_of(args, method, row), "--seed", seed, "--output-dir", folder, "--resume")
        call(args.jobs, "eval_linear.py", "--checkpoint", folder / "last.pt", "--seed", seed)
    top1 = result(args, method, row, seed)
    say(f"{method}, {row}, seed {seed}: kNN {top1['kNN']:.1f}%, linear {top1['linear']:.1f}% ({time.time() - start:.0f} s)")


def result(args, method, row, seed):
    """{protocol: top-1} as far as a run has been evaluated."""
    path = args.output_dir / f"{method}-{row}-{seed}" / "eval.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {entry["protocol"]: entry["top1"] for entry in map(json.loads, lines)}


def table(args):
    """Mean and standard deviation over the seeds, in Markdown."""
    lines = ["| method | pairs | kNN | linear | kNN, each seed |", "| --- | --- | --- | --- | --- |"]
    for method, row in itertools.product(args.methods, args.rows):
        runs = [result(args, method, row, seed) for seed in args.seeds]
        cells = []
        for protocol in ("kNN", "linear"):
            values = [run[protocol] for run in runs]
            spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
            cells.append(f"{statistics.mean(values):.1f}{spread}")
        each = ", ".join(f"{run['kNN']:.1f}" for run in runs)
        lines.append(f"| {METHODS[method][0]} | {(ROWS | CONTROLS)[row][0]} | {' | '.join(cells)} | {each} |")
    return "\n".join(lines) + "\n"


def check_settings(args):
    """Results of different settings must not share a folder."""
    path = args.output_dir / "settings.json"
    settings = {name: getattr(args, name) for name in ("dataset", "data_dir", "model", "arch", "limit", "epochs")}
    if path.exists() and genview.read_settings(path) != settings:
        raise Trouble(f"{args.output_dir} holds runs of other settings ({path.read_text().strip()}): name another --output-dir")
    genview.write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings) + "\n"))


def parse_args():
    parser = argparse.ArgumentParser(description="Contrastive learning with and without each part of GenView.")
    parser.add_argument("--dataset", choices=["cifar10", "shapes"], default="cifar10")
    parser.add_argument("--methods", nargs="+", choices=[*METHODS, "all"], default=["mocov2"], help="default: mocov2")
    parser.add_argument("--rows", nargs="+", choices=[*ROWS, *CONTROLS], default=list(ROWS),
                        help="default: all but the controls")
    parser.add_argument("--data-dir", default="data", help="CIFAR-10 (default: data)")
    parser.add_argument("--model", default="mini", help="mini, or a folder of train_generator.py (default: mini)")
    parser.add_argument("--arch", default="resnet10_narrow", help="default: resnet10_narrow, for CPUs")
    parser.add_argument("--limit", type=genview.at_least(256), default=10_000, help="training images (default: 10000)")
    parser.add_argument("--epochs", type=genview.at_least(1), help="default: 20, of shapes 30")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="default: 0 1 2")
    parser.add_argument("--jobs", type=genview.at_least(1), default=1, help="runs side by side (default: 1)")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"))
    args = parser.parse_args()
    args.methods = list(METHODS) if "all" in args.methods else args.methods
    if args.dataset == "shapes" and CONTROLS.keys() & set(args.rows):
        raise Trouble("the controls are for --dataset cifar10")
    args.epochs = args.epochs or (30 if args.dataset == "shapes" else 20)
    return args


def main():
    args = parse_args()
    check_settings(args)
    for noise in dict.fromkeys((ROWS | CONTROLS)[row][1] for row in args.rows):
        if noise is not None and args.dataset != "shapes":
            make_views(args, noise)
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(run_one, args, method, row, seed)
                for seed, method, row in itertools.product(args.seeds, args.methods, args.rows)]
        try:
            for job in jobs:
                job.result()
        finally:                                   # after a failure none is begun
            pool.shutdown(cancel_futures=True)
    text = table(args)
    genview.write_whole(args.output_dir / "table.md", lambda temporary: temporary.write_text(text))
    say(text)


if __name__ == "__main__":
    genview.run(main)
