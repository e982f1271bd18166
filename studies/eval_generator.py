"""Judges a 32 x 32 generator by its views and its foreground maps: the paper's Fig. 3 in numbers.

    python -m studies.eval_generator --data-dir data/cifar10-jpeg      # writes runs/eval-generator

The judge, a classifier trained on the training images, labels n test images, two views of each and
their foregrounds alone.
"""
import sys
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    sys.stderr.write("error: call it from the root: python -m studies.eval_generator\n")
    sys.exit(2)

import torch
import torch.nn.functional as F
from torchvision.utils import save_image

import generate_views as gv
from eval_linear import extract_features, finetune
from genview import FRACTION, load_images
from quality_loss import fit_foreground
from recipes import GENERATION
from support import augment, data, files, networks
from support.command_line import Parser, progress, real, say, script, whole
from support.processes import setup


def train_judge(args, world):
    """A small network trained with all labels: a function, pixels (n, 3, 32, 32) uint8 -> unit
    features (n, D), labels (n,)."""
    backbone, dim = networks.make_backbone("resnet10_narrow", 32)
    backbone.to(world.device, memory_format=torch.channels_last)
    settings = SimpleNamespace(
        labels=1.0, labels_file=None, lr=0.2, backbone_lr=0.2, drops=(), batch_size=128,
        image_size=32, workers=0, skip_bad=False, **vars(args))
    images = load_images("cifar10", args.data_dir, "train", 32)
    head = finetune(backbone, dim, images, settings, world)

    @torch.inference_mode()
    def judge(pixels):
        images = data.Images([""] * len(pixels), torch.zeros(len(pixels)), 0, pixels)
        features = extract_features(backbone, images, 32, world)
        return F.normalize(features, dim=1), head(features).argmax(1).cpu()
    return judge


def views_of(pipe, c, seeds, steps, guidance):
    """{level: (n, 3, 32, 32) uint8}, a view for each embedding of c (n, D), at each noise level."""
    generator = gv.Generator(pipe, steps, guidance, size=32, save_size=32, batch_size=100,
                             largest=100)
    views = {}
    for level in progress(gv.LEVELS, "views", "level"):
        views[level] = torch.stack([data.to_tensor(view) for view in generator(level, c, seeds)])
    return views


@torch.inference_mode()
def reconstruct(pipe, pixels):
    """What the autoencoder keeps of pixels (n, 3, 32, 32) uint8, in the same form."""
    parts = (part.to(pipe.device) / 127.5 - 1 for part in pixels.split(100))
    kept = torch.cat([pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample for x in parts])
    return ((kept.clamp(-1, 1) + 1) * 127.5).round().byte().to(pixels.device)


@torch.inference_mode()
def draw_samples(pipe, pixels, path, steps, guidance):
    """Writes a PNG; its rows: pixels (n, 3, 32, 32) uint8, reconstructions, views by level."""
    c = pipe.image_encoder(augment.normalise(pixels / 255)).image_embeds
    views = views_of(pipe, c, range(len(pixels)), steps, guidance).values()
    grid = torch.cat([x.cpu() for x in (pixels, reconstruct(pipe, pixels), *views)]) / 255
    files.write_whole(path, lambda p: save_image(grid, p, nrow=len(pixels), format="png"))


def percent(hits):
    return f"{100 * hits.float().mean():.1f}"


def markdown(header, *rows):
    rows = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, row))} |\n" for row in rows)


def tables(truth, original, kept, error, by_level, proportion):
    """How often the judge's label is the original's, by noise level and by foreground proportion.

    truth (n,); original, kept: the judge's labels of images and of reconstructions (n,), whose mean
    squared error is error; by_level: {level: (features, labels, pixels)}, each (2 n, ...): a view
    of every image, then another of each; proportion (n,). Returns Markdown.
    """
    same, rows = {}, [("originals", 100, percent(original == truth), "", ""), (
        f"the autoencoder's (mean squared error {error:.4f} on [-1, 1])",
        percent(kept == original), percent(kept == truth), "", "")]
    for level, (features, labels, pixels) in by_level.items():
        labels, (f1, f2), (x1, x2) = labels.view(2, -1), features.chunk(2), pixels.float().chunk(2)
        same[level] = labels == original                                                # (2, n)
        distance, difference = 1 - (f1 * f2).sum(1).mean(), (x1 - x2).square().mean().sqrt()
        rows.append((f"views, noise level {level}", percent(same[level]), percent(labels == truth),
                     f"{distance:.3f}", f"{difference:.1f}"))
    groups = []
    for level in gv.LEVELS:                        # each stands for a fifth of the proportions
        inside = gv.noise_level(proportion) == level
        agree = [percent(s[:, inside]) if inside.any() else "-" for s in same.values()]
        groups.append((f"{level / 500:g} to {(level + 100) / 500:g}", int(inside.sum()), *agree))
    header = ("pictures", "judge's label as on the original", "judge's label true",
              "two views of one image: 1 - cosine", "root mean square difference (of 255)")
    fifths = ("foreground proportion", "images", *(f"level {level}" for level in same))
    return markdown(header, *rows) + "\n" + markdown(fifths, *groups)


def foreground_table(judge, pixels, a, label):
    """How often the judge's label stays label (n,) where only the foreground is left, or the rest.

    Foreground: the FRACTION of the 64 places with the largest a = <token, v1> (n, 64), equally many
    in each image (unlike Eq. 7), compared with the places of the mean map, the same in all images,
    and with random ones. The other places get the image's mean colour. Returns Markdown.
    """
    count, x, mean = round(FRACTION * 64), pixels.float(), pixels.float().mean((2, 3), keepdim=True)
    scores = {"the map's foreground": a, "the mean map's": a.mean(0).expand_as(a),
              "random": torch.rand(a.shape, generator=torch.Generator().manual_seed(0))}
    rows = [(f"{count} of the 64 places of each picture",
             "judge's label as on the original: only these left", "only the others left")]
    for name, score in scores.items():
        rank = score.argsort(1, descending=True).argsort(1)
        keep = F.interpolate((rank < count).view(-1, 1, 8, 8).float(), size=32)
        parts = [torch.lerp(mean, x, part).round().byte() for part in (keep, 1 - keep)]
        rows.append((name, *(percent(judge(part)[1] == label) for part in parts)))
    return markdown(*rows)


def main():
    parser = Parser("Measures what a 32 x 32 generator's views keep, by noise level.")
    add, usual = parser.add_argument, GENERATION["mini"]
    add("--data-dir", default="data", help="CIFAR-10, or a folder with train/ and test/ in it")
    add("--model", default="mini", help="mini, or a folder of a StableUnCLIPImg2ImgPipeline")
    add("--images", type=whole(2), default=1000, help="test images that are judged")
    add("--epochs", type=whole(1), default=20, help="of the judge")
    add("--steps", type=whole(1), default=usual["steps"], help="of denoising")
    add("--guidance", type=real(0, 1e4), default=usual["guidance"], help="its scale")
    add("--output-dir", type=Path, default=Path("runs/eval-generator"), help="tables, samples.png")
    add("--seed", type=whole(), default=0, help="of the judge and the views")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    args = parser.parse_args()
    world, how = setup(args.device), (args.steps, args.guidance)
    torch.manual_seed(args.seed)                   # of the judge's initial weights
    pipe = gv.load_pipeline(args.model, torch.float32, world.device)
    images = load_images("cifar10", args.data_dir, "test", 32, args.images)
    pixels, n = images.pixels.to(world.device), len(images.pixels)
    draw_samples(pipe, pixels[data.spaced(n, 16)], args.output_dir / "samples.png", *how)
    judge = train_judge(args, world)
    _, tokens, c = zip(*gv.encode_all(pipe, images, range(n)), strict=True)
    tokens, c = torch.cat(tokens).cpu(), torch.cat(c)
    v1, alpha = fit_foreground(tokens, (8, 8), FRACTION)
    proportion = gv.foreground_proportion(tokens, v1, alpha)
    seeds = [gv.image_seed(args.seed + k, name) for k in (0, 1) for name in images.names]
    views = views_of(pipe, c.repeat(2, 1), seeds, *how)
    by_level = {level: (*judge(x), x) for level, x in views.items()}
    kept = reconstruct(pipe, pixels)
    error = ((kept.float() - pixels.float()) / 127.5).square().mean()
    original, copied = (judge(x)[1] for x in (pixels, kept))
    text = tables(images.labels, original, copied, error, by_level, proportion) + "\n"
    text += foreground_table(judge, images.pixels, tokens.float() @ v1, original)
    files.write_whole(args.output_dir / "tables.md", lambda temporary: temporary.write_text(text))
    say(f"{text}\n{args.output_dir}: tables.md, samples.png")


if __name__ == "__main__":
    script(main)
