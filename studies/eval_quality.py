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
from support.command_line import Parser, say, script, whole
from support.processes import setup
from support.seeds import step_generator


def area_under_curve(positive, negative):
    """The probability that a random positive value is above a random negative one."""
    order = negative.sort().values
    below, up_to = (torch.searchsorted(order, positive, right=r).double() for r in (False, True))
    return ((below + up_to) / 2).mean().item() / len(negative)


def partners(labels, same_class, generator):
    """For each image another one, of the same class or of another, (N,)."""
    order = torch.randperm(len(labels), generator=generator)
    others = torch.arange(len(labels))
    fits = (labels[:, None] == labels[order]) == same_class                     # (N, N)
    fits &= others[:, None] != order
    start = torch.randint(len(labels), (len(labels), 1), generator=generator)
    rank = (others - start) % len(labels)                                       # a random first
    return order[rank.masked_fill(~fits, len(labels)).argmin(1)]


def main():
    add = (parser := Parser("Measures what the quality of a pair tells.")).add_argument
    add("--data-dir", default="data", help="CIFAR-10, or a folder with train/ and test/ in it")
    add("--images", type=whole(100), default=5000, help="images, a pair each")
    add("--seed", type=whole(), default=0, help="of the views and of the pairs")
    add("--device", help="cuda, mps or cpu (default: the first that is available)")
    args = parser.parse_args()
    world, generator = setup(args.device), step_generator(args.seed)
    pipe = gv.load_pipeline("mini", torch.float32, world.device)
    images = load_images("cifar10", args.data_dir, "train", 32, args.images)
    n = len(images.names)
    encoder = FrozenEncoder("mini").to(world.device)                            # E

    def features(pixels):
        parts = pixels.to(world.device).split(250)
        return torch.cat([encoder(normalise(part / 255)).cpu() for part in parts])
    image = features(images.pixels)                                             # (N, 64, K)
    v1, alpha = fit_foreground(image, (8, 8), FRACTION)
    level = gv.noise_level(gv.foreground_proportion(image, v1, alpha))
    seeds = [gv.image_seed(args.seed, name) for name in images.names]
    c = torch.cat([c for _, _, c in gv.encode_all(pipe, images, range(n))])
    views = views_of(pipe, c, seeds, **GENERATION["mini"])
    view = {key: features(pixels) for key, pixels in views.items()}
    rows = [("views", "mean q", "spread of q", "another class: q", "s_f", "s_b",
             "the same class: q", "s_f", "s_b")]
    adaptive = torch.stack([view[x][i] for i, x in enumerate(level.tolist())])
    for name, x in [*((f"noise level {key}", x) for key, x in view.items()),
                    ("adaptive noise", adaptive)]:
        own = pair_quality(image, x, v1)                                        # q, s^f, s^b
        areas = []
        for same_class in (False, True):
            other = partners(images.labels, same_class, generator)
            areas += map(area_under_curve, own, pair_quality(image, x[other], v1))
        rows.append((name, f"{own[0].mean():.3f}", f"{own[0].std():.3f}",
                     *(f"{area:.3f}" for area in areas)))
    say(f"{n} pairs; area under the curve, own view against the view of an image of\n\n"
        + markdown(*rows))


if __name__ == "__main__":
    script(main)
