"""Judges a 32 x 32 generator by its views and its foreground maps: the paper's Fig. 3 in numbers.

    python -m studies.eval_generator --data-dir data/cifar10-jpeg      # writes runs/eval-generator

The judge is a small classifier, trained with all labels of the training images. It looks at n test
images, at their views, and at their foregrounds alone. D: its features.
"""
import json
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: "
                     "python -m studies.eval_generator\n")
    sys.exit(2)

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import generate_views
from eval_linear import extract_features, finetune, zero_linear
from generate_views import LEVELS, encode_all, foreground_proportion, image_seed, noise_level
from genview import FRACTION, load_images
from quality_loss import fit_foreground
from recipes import DATA_DIRS, GENERATION
from support.augment import normalise
from support.checkpoints import load_checkpoint
from support.data import Images, spaced, to_tensor
from support.files import write_whole
from support.networks import make_backbone
from support.world import Parser, UserError, progress, real, say, script, setup, whole


def train_judge(args, num_classes, world):
    """A classifier, Sequential(backbone, head); a file keeps it for the next call."""
    backbone, dim = make_backbone("resnet10_narrow", 32)
    judge = torch.nn.Sequential(backbone, zero_linear(dim, num_classes))
    judge.to(world.device, memory_format=torch.channels_last)
    name = f"judge-{args.dataset}-{Path(args.data_dir).name}-{args.epochs}-{args.seed}.pt"
    if (args.output_dir / name).exists():
        judge.load_state_dict(load_checkpoint(args.output_dir / name))
        return judge.eval()
    settings = SimpleNamespace(labels=1.0, labels_file=None, seed=args.seed, lr=0.1, backbone_lr=0.1,
                               batch_size=128, epochs=args.epochs, image_size=32, workers=0,
                               skip_bad=False)
    images = load_images(args.dataset, args.data_dir, "train", 32)
    judge[1] = finetune(backbone, dim, images, settings, world)
    write_whole(args.output_dir / name, partial(torch.save, judge.state_dict()))
    return judge.eval()


@torch.inference_mode()
def look(judge, pixels, world):
    """Unit features (n, D) and labels (n,) that the judge gives pixels (n, 3, 32, 32) uint8."""
    images = Images([""] * len(pixels), torch.zeros(len(pixels)), 0, pixels)
    features = extract_features(judge[0], images, 32, world)
    return F.normalize(features, dim=1), judge[1](features).argmax(1).cpu()


def views_of(pipe, c, seeds, steps, guidance):
    """{level: (n, 3, 32, 32) uint8}, a view of each image at each noise level; c (n, embedding)."""
    settings = SimpleNamespace(steps=steps, guidance=guidance, size=32, save_size=32, dtype="float32",
                               batch_size=100, largest=100)
    generate = partial(generate_views.generate_all, pipe, settings, embeddings=c, seeds=seeds)
    return {level: torch.stack([to_tensor(view) for view in generate(level=level)])
            for level in progress(LEVELS, "views", "level")}


@torch.inference_mode()
def reconstruct(pipe, pixels):
    """What the autoencoder keeps of pixels (n, 3, 32, 32) uint8."""
    parts = (pixels.float() / 127.5 - 1).split(100)
    kept = [pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in parts]
    return ((torch.cat(kept).clamp(-1, 1) + 1) * 127.5).round().byte()


@torch.inference_mode()
def draw_samples(pipe, pixels, path, steps, guidance):
    """A PNG; its rows: pixels (n, 3, 32, 32) uint8, what the autoencoder keeps, views by level."""
    c = pipe.image_encoder(normalise(pixels / 255)).image_embeds
    views = views_of(pipe, c, range(len(pixels)), steps, guidance)
    grid = torch.cat([pixels.cpu(), reconstruct(pipe, pixels).cpu(), *views.values()]) / 255
    write_whole(path, partial(save_image, grid, nrow=len(pixels), format="png"))


def percent(hits):
    return f"{100 * hits.float().mean():.1f}"


def markdown(header, *rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def tables(truth, original, kept, pixels_kept, pixels, by_level, proportion):
    """Agreement with the judge's label of the original, by noise level and by foreground proportion.

    original, kept: the judge's (features, labels); by_level: {level: (those of two views, pixels of
    two views (2, n, 3, 32, 32))}; proportion (n,). Returns Markdown.
    """
    error = ((pixels_kept.float() - pixels.float()) / 127.5).square().mean()
    rows = [("originals", 100, percent(original[1] == truth), "", ""),
            (f"the autoencoder's (mean squared error {error:.4f} on [-1, 1])",
             percent(kept[1] == original[1]), percent(kept[1] == truth), "", "")]
    same = {}
    for level, (((f1, labels1), (f2, labels2)), (view1, view2)) in by_level.items():
        labels = torch.stack([labels1, labels2])
        same[level] = labels == original[1]                                             # (2, n)
        difference = (view1.float() - view2.float()).square().mean().sqrt()
        rows.append((f"views, noise level {level}", percent(same[level]), percent(labels == truth),
                     f"{1 - (f1 * f2).sum(1).mean():.3f}", f"{difference:.1f}"))
    groups = []
    for level in LEVELS:                           # each stands for a fifth of the proportions
        inside = noise_level(proportion) == level
        groups.append((f"{level / 500:g} to {(level + 100) / 500:g}", int(inside.sum()),
                       *(percent(s[:, inside]) if inside.any() else "-" for s in same.values())))
    header = ("pictures", "judge's label as on the original", "judge's label true",
              "two views of one image: 1 - cosine", "root mean square difference (of 255)")
    columns = (f"level {level}" for level in same)
    return (markdown(header, *rows) + "\n"
            + markdown(("foreground proportion", "images", *columns), *groups))


def foreground_table(judge, pixels, a, label, world):
    """Does the judge recognise images by their foreground? How often its label stays label (n,).

    Of each image the FRACTION of its 64 places with the largest a = <token, v1> (n, 64) is left, or
    all the others; the rest has the image's mean colour. Every image keeps as much (unlike Eq. 7),
    so that the mean map's places, equal in all images, and random ones can be compared. Markdown.
    """
    count, rows = round(FRACTION * a.shape[1]), []
    random = torch.rand(a.shape, generator=torch.Generator().manual_seed(0))
    maps = {"the map's foreground": a, "the mean map's": a.mean(0).expand_as(a), "random": random}
    mean = pixels.float().mean((2, 3), keepdim=True)
    for name, score in maps.items():
        rank = score.argsort(1, descending=True).argsort(1)
        keep = F.interpolate((rank < count).view(-1, 1, 8, 8).float(), size=32)
        parts = [torch.lerp(mean, pixels.float(), k).round().byte() for k in (keep, 1 - keep)]
        rows.append((name, *(percent(look(judge, part, world)[1] == label) for part in parts)))
    return markdown((f"{count} of the 64 places of each picture",
                     "judge's label as on the original: only these left", "only the others left"), *rows)


def main():
    parser = Parser("Measures what a 32 x 32 generator's views keep, by noise level.")
    add = parser.add_argument
    add("--dataset", choices=["cifar10", "cifar100", "folder"], default="cifar10", help="images")
    add("--data-dir", help="where they lie, in a folder with train/ and test/ in it")
    add("--model", default="mini", help="mini, or a folder of a StableUnCLIPImg2ImgPipeline")
    add("--images", type=whole(2), default=1000, help="test images that are judged")
    add("--epochs", type=whole(1), default=20, help="of the judge")
    add("--steps", type=whole(1), default=GENERATION["mini"]["steps"], help="of denoising")
    add("--guidance", type=real(0, 1e4), default=GENERATION["mini"]["guidance"], help="its scale")
    add("--output-dir", type=Path, default=Path("runs/eval-generator"), help="tables and judge")
    add("--seed", type=whole(), default=0, help="of the judge and the views")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    args = parser.parse_args()
    args.data_dir = args.data_dir or DATA_DIRS[args.dataset]
    if args.data_dir is None:
        raise UserError("--dataset folder needs --data-dir, a folder with train/ and test/ in it")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    text = evaluate(args, setup(args.device))
    write_whole(args.output_dir / "tables.md", lambda temporary: temporary.write_text(text))
    settings = json.dumps(vars(args), default=str)
    say(f"{text}\n{settings}\n{args.output_dir}: tables.md, samples.png, the judge")


def evaluate(args, world):
    """Writes samples.png. Returns the tables."""
    torch.manual_seed(args.seed)                   # of the judge's initial weights
    pipe = generate_views.load_pipeline(args.model, torch.float32, world.device)
    images = load_images(args.dataset, args.data_dir, "test", 32, args.images)
    pixels, n, how = images.pixels, len(images.pixels), (args.steps, args.guidance)
    some = pixels[spaced(n, 16)].to(world.device)
    draw_samples(pipe, some, args.output_dir / "samples.png", *how)
    judge = train_judge(args, images.num_classes, world)
    _, tokens, c = zip(*encode_all(pipe, images, range(n)), strict=True)
    tokens, c = torch.cat(tokens).cpu(), torch.cat(c)
    v1, alpha = fit_foreground(tokens, (8, 8), FRACTION)
    proportion = foreground_proportion(tokens, v1, alpha)
    seeds = [[image_seed(seed, name) for name in images.names] for seed in (args.seed, args.seed + 1)]
    first, second = (views_of(pipe, c, s, *how) for s in seeds)
    by_level = {level: ([look(judge, view[level], world) for view in (first, second)],
                        (first[level], second[level])) for level in LEVELS}
    kept = reconstruct(pipe, pixels.to(world.device)).cpu()
    original, judged = look(judge, pixels, world), look(judge, kept, world)
    a = tokens.float() @ v1
    return (tables(images.labels, original, judged, kept, pixels, by_level, proportion) + "\n"
            + foreground_table(judge, pixels, a, original[1], world))


if __name__ == "__main__":
    script(main)
