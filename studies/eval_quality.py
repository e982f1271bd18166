"""What q sees: does the quality of a pair tell an image's own view from another image's?

    python -m studies.eval_quality --data-dir data/cifar10-jpeg        # the miniature on CIFAR-10
"""
import sys

if not __package__:
    sys.stderr.write("error: call it from the root: python -m studies.eval_quality\n")
    sys.exit(2)

import torch

import generate_views as gv
from genview import FRACTION, FrozenEncoder, load_images
from quality_loss import fit_foreground, pair_quality
from recipes import GENERATION
from studies.eval_generator import markdown, views_of
from support.augment import normalise
from support.command_line import Parser, UserError, say, script, whole
from support.processes import setup
from support.seeds import step_generator


def area_under_curve(positive, negative):
    """The probability that a random positive value is above a random negative one."""
    order = negative.sort().values
    below = torch.searchsorted(order, positive, right=False).double()
    up_to = torch.searchsorted(order, positive, right=True).double()
    return ((below + up_to) / 2).mean().item() / len(negative)           # equal ones count half


def partners(labels, same_class, generator):
    """For each image another one, of the same class or of another, (N,)."""
    order = torch.randperm(len(labels), generator=generator)
    others = torch.arange(len(labels))
    fits = (labels[:, None] == labels[order]) == same_class                     # (N, N)
    fits &= others[:, None] != order
    alone = (~fits.any(1)).sum().item()
    if alone:
        raise UserError(f"{alone} of the {len(labels)} images have no other one of "
                        f"{'the same' if same_class else 'another'} class: more --images, or data "
                        f"with classes")
    start = torch.randint(len(labels), (len(labels), 1), generator=generator)
    rank = (others - start) % len(labels)                                       # a random first
    return order[rank.masked_fill(~fits, len(labels)).argmin(1)]


def row_of(name, image, view, v1, labels, generator):
    """A row of the table. image, view: tokens of images and of their own views (N, 64, K)."""
    quality, s_f, s_b = pair_quality(image, view, v1)
    areas = []
    for same_class in (False, True):
        other = partners(labels, same_class, generator)
        others = pair_quality(image, view[other], v1)
        areas += map(area_under_curve, (quality, s_f, s_b), others)
    return (name, f"{quality.mean():.3f}", f"{quality.std():.3f}",
            *(f"{area:.3f}" for area in areas))


def quality_text(args, world):
    """The text with its table, Markdown."""
    generator = step_generator(args.seed)
    pipe = gv.load_pipeline("mini", torch.float32, world.device)
    images = load_images("cifar10", args.data_dir, "train", 32, args.images)
    n = len(images.names)
    for same_class in (False, True):               # too few are refused before the work
        partners(images.labels, same_class, step_generator(args.seed))
    encoder = FrozenEncoder("mini").to(world.device)                            # E

    def features(pixels):
        parts = pixels.to(world.device).split(250)
        return torch.cat([encoder(normalise(part / 255)).cpu() for part in parts])
    image = features(images.pixels)                                             # (N, 64, K)
    v1, alpha = fit_foreground(image, (8, 8), FRACTION)
    level = gv.noise_level(gv.foreground_proportion(image, v1, alpha))
    seeds = [gv.image_seed(args.seed, name) for name in images.names]
    c = torch.cat([c for _, _, c in gv.encode_all(pipe, images, range(n))])
    pixels = views_of(pipe, c, seeds, **GENERATION["mini"])
    views = {key: features(x) for key, x in pixels.items()}
    adaptive = torch.stack([views[key][i] for i, key in enumerate(level.tolist())])
    named = {f"noise level {key}": view for key, view in views.items()}
    named["adaptive noise"] = adaptive
    header = ("views", "mean q", "spread of q", "another class: q", "s_f", "s_b",
              "the same class: q", "s_f", "s_b")
    rows = [row_of(name, image, view, v1, images.labels, generator) for name, view in named.items()]
    return (f"{n} pairs; area under the curve, own view against the view of an image of\n\n"
            + markdown(header, *rows))


def main():
    parser = Parser("Measures what the quality of a pair tells.")
    add = parser.add_argument
    add("--data-dir", default="data", help="CIFAR-10, or a folder with train/ and test/ in it")
    add("--images", type=whole(100), default=5000, help="images, a pair each")
    add("--seed", type=whole(), default=0, help="of the views and of the pairs")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    args = parser.parse_args()
    say(quality_text(args, setup(args.device)))


if __name__ == "__main__":
    script(main)
