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

import generate_views as gv
from eval_linear import extract_features, finetune
from genview import FRACTION, load_images
from quality_loss import fit_foreground
from recipes import GENERATION
from support import augment, data, files, networks
from support.command_line import Parser, UserError, progress, real, say, script, whole
from support.pictures import sheet, to_image
from support.processes import setup


def train_judge(args, world):
    """A small network trained with all labels: a function, pixels (n, 3, 32, 32) uint8 -> unit
    features (n, D), labels (n,)."""
    backbone, dim = networks.make_backbone("resnet10_narrow", 32)
    backbone.to(world.device, memory_format=torch.channels_last)
    settings = SimpleNamespace(
        epochs=args.epochs, seed=args.seed, lr=0.2, backbone_lr=0.2, drops=(), batch_size=128,
        image_size=32, workers=0)
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
    generator = gv.ViewMaker(pipe, steps, guidance, size=32, save_size=32, batch_size=100,
                             largest=100)
    views = {}
    for level in progress(gv.LEVELS, "views", "level"):
        views[level] = torch.stack([data.to_tensor(view) for view in generator(level, c, seeds)])
    return views


@torch.inference_mode()
def reconstruct(pipe, pixels):
    """What the autoencoder keeps of pixels (n, 3, 32, 32) uint8, in the same form."""
    parts = []
    for part in pixels.split(100):
        x = part.to(pipe.device) / 127.5 - 1
        z = pipe.vae.encode(x).latent_dist.mean
        parts.append(pipe.vae.decode(z).sample)
    x = torch.cat(parts).clamp(-1, 1)
    return ((x + 1) * 127.5).round().byte().to(pixels.device)


@torch.inference_mode()
def draw_samples(pipe, pixels, path, steps, guidance):
    """Writes a PNG; its rows: pixels (n, 3, 32, 32) uint8, reconstructions, views by level."""
    c = pipe.image_encoder(augment.normalise(pixels / 255)).image_embeds
    rows = {"original": pixels, "autoencoder": reconstruct(pipe, pixels)}
    for level, views in views_of(pipe, c, range(len(pixels)), steps, guidance).items():
        rows[f"level {level}"] = views
    columns = [[to_image(row[i]) for row in rows.values()] for i in range(len(pixels))]
    canvas = sheet(columns, [""] * len(columns), {}, 64, list(rows))
    files.write_png(path, canvas)


def percent(hits):
    return f"{100 * hits.float().mean():.1f}"


def markdown(header, *rows):
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)


def tables(truth, original, kept, error, by_level, proportion):
    """How often the judge's label is the original's, by noise level and by foreground proportion.

    truth (n,); original, kept: the judge's labels of images and of reconstructions (n,), whose mean
    squared error is error; by_level: {level: (features, labels, pixels)}, each (2 n, ...): a view
    of every image, then another of each; proportion (n,). Returns Markdown.
    """
    rows = [("originals", 100, percent(original == truth), "", ""),
            (f"the autoencoder's (mean squared error {error:.4f} on [-1, 1])",
             percent(kept == original), percent(kept == truth), "", "")]
    same = {}                                      # {level: is the label the original's? (2, n)}
    for level, (features, labels, pixels) in by_level.items():
        labels = labels.view(2, -1)
        same[level] = labels == original
        f1, f2 = features.chunk(2)
        x1, x2 = pixels.float().chunk(2)
        distance = 1 - (f1 * f2).sum(1).mean()
        difference = (x1 - x2).square().mean().sqrt()
        rows.append((f"views, noise level {level}", percent(same[level]), percent(labels == truth),
                     f"{distance:.3f}", f"{difference:.1f}"))
    header = ("pictures", "judge's label as on the original", "judge's label true",
              "two views of one image: 1 - cosine", "root mean square difference (of 255)")
    return markdown(header, *rows) + "\n" + table_of_fifths(same, proportion)


def table_of_fifths(same, proportion):
    """Agreement by foreground proportion (n,). same: {level: (2, n)}."""
    header = ("foreground proportion", "images", *(f"level {level}" for level in same))
    rows = []
    for level in gv.LEVELS:                        # each stands for a fifth of the proportions
        inside = gv.noise_level(proportion) == level
        agreement = [percent(s[:, inside]) if inside.any() else "-" for s in same.values()]
        name = f"{level / 500:g} to {(level + 100) / 500:g}"
        rows.append((name, int(inside.sum()), *agreement))
    return markdown(header, *rows)


def foreground_table(judge, pixels, a, label):
    """How often the judge's label stays label (n,) where only the foreground is left, or the rest.

    Foreground: the FRACTION of the 64 places with the largest a = <token, v1> (n, 64), equally many
    in each image (unlike Eq. 7), compared with the places of the mean map, the same in all images,
    and with random ones. The other places get the image's mean colour. Returns Markdown.
    """
    count = round(FRACTION * 64)
    x = pixels.float()
    colour = x.mean((2, 3), keepdim=True)
    scores = {"the map's foreground": a, "the mean map's": a.mean(0).expand_as(a),
              "random": torch.rand(a.shape, generator=torch.Generator().manual_seed(0))}
    rows = [(f"{count} of the 64 places of each picture",
             "judge's label as on the original: only these left", "only the others left")]
    for name, score in scores.items():
        rank = score.argsort(1, descending=True).argsort(1)
        foreground = (rank < count).float().view(-1, 1, 8, 8)
        agreement = []
        for places in (foreground, 1 - foreground):
            kept = F.interpolate(places, size=32)
            _, seen = judge(torch.lerp(colour, x, kept).round().byte())
            agreement.append(percent(seen == label))
        rows.append((name, *agreement))
    return markdown(*rows)


def refuse_other_sizes(pipe, name):
    """UserError where the generator is not for small pictures, see train_generator."""
    config = pipe.image_encoder.config
    grid = config.image_size // config.patch_size
    if (gv.own_size(pipe), config.image_size, grid) != (32, 32, 8):
        raise UserError(f"--model {name} makes {gv.own_size(pipe)} pixels and looks at "
                        f"{config.image_size} in {grid} x {grid} patches: this study judges "
                        f"generators of 32 x 32 pixels and 8 x 8 patches")


def judge_views(args, world):
    """Writes samples.png. Returns the tables, Markdown."""
    how = {"steps": args.steps, "guidance": args.guidance}
    pipe = gv.load_pipeline(args.model, torch.float32, world.device)
    refuse_other_sizes(pipe, args.model)
    images = load_images("cifar10", args.data_dir, "test", 32, args.images)
    n = len(images.names)
    pixels = images.pixels.to(world.device)
    draw_samples(pipe, pixels[data.spaced(n, 16)], args.output_dir / "samples.png", **how)
    judge = train_judge(args, world)
    encoded = list(gv.encode_all(pipe, images, range(n)))
    tokens = torch.cat([tokens for _, tokens, _ in encoded]).cpu()
    c = torch.cat([c for _, _, c in encoded])
    v1, alpha = fit_foreground(tokens, (8, 8), FRACTION)
    proportion = gv.foreground_proportion(tokens, v1, alpha)
    seeds = []                                     # two views of each image
    for seed in (args.seed, args.seed + 1):
        seeds += [gv.image_seed(seed, name) for name in images.names]
    views = views_of(pipe, c.repeat(2, 1), seeds, **how)
    by_level = {level: (*judge(x), x) for level, x in views.items()}
    copies = reconstruct(pipe, pixels)
    error = ((copies.float() - pixels.float()) / 127.5).square().mean()
    _, original = judge(pixels)
    _, kept = judge(copies)
    return "\n".join([
        tables(images.labels, original, kept, error, by_level, proportion),
        foreground_table(judge, images.pixels, tokens.float() @ v1, original)])


def main():
    usual = GENERATION["mini"]
    parser = Parser("Measures what a 32 x 32 generator's views keep, by noise level.")
    add = parser.add_argument
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
    world = setup(args.device)
    torch.manual_seed(args.seed)                   # of the judge's initial weights
    text = judge_views(args, world)
    files.write_whole(args.output_dir / "tables.md", lambda path: path.write_text(text))
    say(f"{text}\n{args.output_dir}: tables.md, samples.png")


if __name__ == "__main__":
    script(main)
