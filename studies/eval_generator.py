"""Judges a generator: do its views keep the label and differ from each other, by noise level, and do
its foreground maps show the foreground? The paper's Fig. 3 in numbers.

    python -m studies.eval_generator --data-dir data/cifar10-jpeg      # writes runs/eval-generator

The judge is a small classifier trained on the training images; test images are judged.
Shapes: n images, D features of the judge.
"""
import sys

if not __package__:
    print("error: call it from the root: python -m studies.eval_generator", file=sys.stderr)
    sys.exit(2)

import json
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import eval_linear
import generate_views
from generate_views import LEVELS
from genview import FRACTION, load_images
from quality_loss import fit_foreground
from recipes import DATA_DIRS, GENERATION
from support.checkpoints import load_checkpoint
from support.data import Images, spaced, to_tensor
from support.files import write_whole
from support.networks import make_backbone
from support.world import Parser, progress, say, script, setup, whole


def train_judge(args, num_classes, world):
    """A classifier (backbone, head) trained with all labels, kept in a file."""
    backbone, dim = make_backbone("resnet10_narrow", 32)
    backbone.to(world.device, memory_format=torch.channels_last)
    path = args.output_dir / f"judge-{args.dataset}-{args.epochs}-{args.seed}.pt"
    if path.exists():
        state = load_checkpoint(path)
        head = eval_linear.zero_linear(dim, num_classes).to(world.device)
        backbone.load_state_dict(state["backbone"])
        head.load_state_dict(state["head"])
    else:
        settings = SimpleNamespace(labels=1.0, labels_file=None, seed=args.seed, lr=0.1, backbone_lr=0.1, batch_size=128,
                                   epochs=args.epochs, image_size=32, workers=0, skip_bad=False)
        images = load_images(args.dataset, args.data_dir, "train", 32)
        head = eval_linear.finetune(backbone, dim, images, settings, world)
        write_whole(path, lambda temporary: torch.save(
            {"backbone": backbone.state_dict(), "head": head.state_dict()}, temporary))
    return backbone.eval(), head


@torch.inference_mode()
def look(judge, pixels, world):
    """Features (n, D) of unit length and labels (n,) that the judge gives pixels (n, 3, 32, 32) uint8."""
    images = Images([""] * len(pixels), torch.zeros(len(pixels)), 0, pixels)
    features = eval_linear.extract_features(judge[0], images, 32, world)
    return F.normalize(features, dim=1), judge[1](features).argmax(1).cpu()


@torch.inference_mode()
def views_of(pipe, args, c, names):
    """{level: (2, n, 3, 32, 32) uint8}, two views of each image and level, of different seeds."""
    settings = SimpleNamespace(steps=args.steps, guidance=args.guidance, size=32, save_size=32, dtype="float32", batch_size=100,
                               largest=100)
    views = {}
    for level in progress(LEVELS, "views", "level"):
        both = []
        for seed in (args.seed, args.seed + 1):
            seeds = [generate_views.image_seed(seed, name) for name in names]
            both.append(torch.stack([to_tensor(view) for view in
                                     generate_views.generate_all(pipe, settings, level, c, seeds)]))
        views[level] = torch.stack(both)
    return views


@torch.inference_mode()
def reconstruct(pipe, pixels):
    """What the autoencoder keeps of pixels (n, 3, 32, 32) uint8."""
    x = pixels.float() / 127.5 - 1
    kept = torch.cat([pipe.vae.decode(pipe.vae.encode(part).latent_dist.mean).sample for part in x.split(100)])
    return ((kept.clamp(-1, 1) + 1) * 127.5).round().byte()


def foreground_table(judge, pixels, a, label, world):
    """Does the judge recognise pictures by what the map calls foreground? A table in Markdown: how often its label stays label.

    Left of each picture are the FRACTION of its 64 places with the largest a = <token, v1> (n, 64), or all but these; the rest
    has the picture's mean colour. Not Eq. 7's one threshold: as much of every picture, so that the rows can be compared with
    the places of the mean map, the same in all pictures, and with random ones.
    """
    count = round(FRACTION * a.shape[1])
    draw = torch.rand(a.shape, generator=torch.Generator().manual_seed(0))
    mean = pixels.float().mean((2, 3), keepdim=True)
    lines = [f"| {count} of the 64 places of each picture | judge's label as on the original: only these left | "
             "only the others left |", "| --- | --- | --- |"]
    for name, score in {"the map's foreground": a, "the mean map's": a.mean(0).expand_as(a), "random": draw}.items():
        rank = score.argsort(1, descending=True).argsort(1)
        keep = F.interpolate((rank < count).view(-1, 1, 8, 8).float(), size=32)
        agree = [100 * (look(judge, torch.lerp(mean, pixels.float(), part).round().byte(), world)[1] == label).float().mean()
                 for part in (keep, 1 - keep)]
        lines.append(f"| {name} | {agree[0]:.1f} | {agree[1]:.1f} |")
    return "\n".join(lines) + "\n"


def tables(truth, original, kept, pixels_kept, pixels, by_level, proportion):
    """Two tables in Markdown. original, kept: (features, labels) that the judge gives; by_level: {level: (two views'
    (features, labels), pixels (2, n, ...))}; proportion: of foreground, (n,)."""
    percent = lambda hits: f"{100 * hits.float().mean():.1f}"
    error = ((pixels_kept.float() - pixels.float()) / 127.5).square().mean()
    lines = ["| pictures | judge's label as on the original | judge's label true | two views of one image: 1 - cosine | "
             "root mean square difference (of 255) |", "| --- | --- | --- | --- | --- |",
             f"| originals | 100 | {percent(original[1] == truth)} | | |",
             f"| the autoencoder's (mean squared error {error:.4f} on [-1, 1]) | {percent(kept[1] == original[1])} | "
             f"{percent(kept[1] == truth)} | | |"]
    for level, (looks, views) in by_level.items():
        labels = torch.stack([labels for _, labels in looks])
        distance = 1 - (looks[0][0] * looks[1][0]).sum(1).mean()
        pixel = (views[0].float() - views[1].float()).square().mean().sqrt()
        lines.append(f"| views, noise level {level} | {percent(labels == original[1])} | {percent(labels == truth)} | "
                     f"{distance:.3f} | {pixel:.1f} |")
    borders = [0, 0.2, 0.4, 0.6, 0.8, 1.01]
    lines += ["", "| foreground proportion | images | " + " | ".join(f"level {level}" for level in LEVELS) + " |",
              "| --- | --- |" + " --- |" * len(LEVELS)]
    for low, high in zip(borders, borders[1:]):
        inside = (proportion > low) & (proportion <= high) if low else proportion <= high
        same = [percent((torch.stack([l for _, l in looks]) == original[1])[:, inside]) if inside.any() else "-"
                for looks, _ in by_level.values()]
        lines.append(f"| {low:g} to {min(high, 1):g} | {int(inside.sum())} | " + " | ".join(same) + " |")
    return "\n".join(lines) + "\n"


def parse_args():
    parser = Parser("Measures what a 32 x 32 generator's views keep, by noise level.")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100", "folder"], default="cifar10")
    parser.add_argument("--data-dir")
    parser.add_argument("--model", default="mini", help="mini, or a folder of a StableUnCLIPImg2ImgPipeline")
    parser.add_argument("--images", type=whole(2), default=1000, help="test images that are judged")
    parser.add_argument("--epochs", type=whole(1), default=20, help="of the judge")
    parser.add_argument("--steps", type=whole(1), default=GENERATION["mini"]["steps"])
    parser.add_argument("--guidance", type=float, default=GENERATION["mini"]["guidance"])
    parser.add_argument("--output-dir", type=Path, default=Path("runs/eval-generator"))
    parser.add_argument("--seed", type=whole(0), default=0)
    parser.add_argument("--device")
    args = parser.parse_args()
    args.data_dir = args.data_dir or DATA_DIRS[args.dataset]
    return args


def main():
    from studies.train_generator import Data, draw_samples
    args = parse_args()
    world = setup(args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    pipe = generate_views.load_pipeline(args.model, torch.float32, world.device)
    images = load_images(args.dataset, args.data_dir, "test", 32, args.images)
    x = Data(images.pixels.to(world.device), images.labels).pictures(spaced(len(images.names), 16))
    draw_samples(pipe, x, args.output_dir / "samples.png", args.steps, args.guidance)
    judge = train_judge(args, images.num_classes, world)
    encoded = list(generate_views.encode_all(pipe, images, range(len(images.names))))
    tokens, c = torch.cat([part[1] for part in encoded]).cpu(), torch.cat([part[2] for part in encoded])
    v1, alpha = fit_foreground(tokens, (8, 8), FRACTION)
    proportion = generate_views.foreground_proportion(tokens, v1, alpha)
    views = views_of(pipe, args, c, images.names)
    kept = reconstruct(pipe, images.pixels.to(world.device)).cpu()
    by_level = {level: ([look(judge, part, world) for part in both], both) for level, both in views.items()}
    original = look(judge, images.pixels, world)
    text = tables(images.labels, original, look(judge, kept, world), kept, images.pixels, by_level, proportion)
    text += "\n" + foreground_table(judge, images.pixels, tokens.float() @ v1, original[1], world)
    write_whole(args.output_dir / "tables.md", lambda temporary: temporary.write_text(text))
    say(f"{text}\n{json.dumps(vars(args), default=str)}\n{args.output_dir}: tables.md, samples.png, the judge")


if __name__ == "__main__":
    script(main)
