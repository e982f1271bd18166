"""SwAV with GenView: views predict each other's assignment to prototypes. The step, loop and command line are train_moco.py's.

    python train_swav.py --dataset shapes                                # no download
    python train_swav.py --dataset cifar10                               # uses the views of generate_views.py
    torchrun --nproc_per_node=8 train_swav.py --dataset imagenet --data-dir /data/imagenet --views-dir /data/imagenet-views

Legend of the shapes: N images of this process, V views of each (two large ones, then small crops taken in turn from the image
and its generated variation), S side of a view, D size of an embedding, P prototypes.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

import genview
from quality_loss import sinkhorn, swapped_prediction
from train_moco import Encoder, mlp, parse_args, similarities, train

# Recipes as in train_moco.py. [swav] the authors' for 200 epochs with large batches; else ours. With batches much smaller than
# the prototypes are many, take fewer prototypes: SwAV's queue of older embeddings is left out. At epsilon 0.05
# small runs stayed at uniform assignments, loss at log P; at 0.01 they learn.
PRESETS = {
    ("imagenet", "swav"): dict(
        arch="resnet50", image_size=224, epochs=200, batch_size=4096,             # [swav]
        optimizer="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=0,             # [swav] 4.8 for 4096; the paper warms up for 10
        dim=128, hidden=2048, prototypes=3000, temperature=0.1, epsilon=0.05, freeze_epochs=1,     # [swav]
        crop_min=0.14, small_crops=6, small_size=96, small_min=0.05, blur=0.5, knn_every=20),      # [swav]
    ("cifar10", "swav"): dict(
        arch="resnet18", image_size=32, epochs=200, batch_size=256, optimizer="sgd", lr=0.06, weight_decay=5e-4,
        warmup_epochs=5, dim=128, hidden=512, prototypes=128, temperature=0.1, epsilon=0.01, freeze_epochs=1,
        crop_min=0.2, small_crops=2, small_size=16, small_min=0.08, blur=0.0, knn_every=10),
    ("shapes", "swav"): dict(
        arch="resnet10_narrow", image_size=32, epochs=30, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1, dim=128, hidden=512, prototypes=64, temperature=0.1, epsilon=0.01, freeze_epochs=1,
        crop_min=0.3, small_crops=2, small_size=16, small_min=0.15, blur=0.0, knn_every=5),
}
PRESETS["cifar100", "swav"] = PRESETS["cifar10", "swav"]
PRESETS["folder", "swav"] = PRESETS["imagenet", "swav"]


class SwAV(nn.Module):
    """SwAV (Caron et al. 2020): an encoder and prototypes of unit length."""

    def __init__(self, args):
        super().__init__()
        backbone, features = genview.make_backbone(args.arch, args.image_size)
        self.query = Encoder(backbone, mlp([features, args.hidden, args.dim], norm=True))
        self.prototypes = nn.Linear(args.dim, args.prototypes, bias=False)        # rows: prototypes (P, D)
        self.temperature, self.epsilon = args.temperature, args.epsilon
        self.chance = math.log(args.prototypes)
        self.frozen, self.frozen_until = False, args.freeze_epochs / args.epochs
        self.prototypes.weight.register_hook(lambda gradient: gradient * (not self.frozen))

    @torch.no_grad()
    def update(self, progress):
        """Before each step: prototypes to unit length; they do not learn in the first epoch."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self.frozen = progress < self.frozen_until

    def forward(self, views, weights, world):
        sizes = sorted({v.shape[-1] for v in views}, reverse=True)                # views of one size go together; large first
        z = torch.cat([self.query(torch.cat([v for v in views if v.shape[-1] == size])) for size in sizes])
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)                                     # (V N, D)
            scores = F.linear(z, self.prototypes.weight.float()).unflatten(0, (len(views), -1))        # (V, N, P)
        codes = torch.stack([sinkhorn(s, self.epsilon, group=world.group) for s in scores[:2].detach()])
        loss = swapped_prediction(scores, codes, self.temperature, weights)
        z1, z2 = z.detach().chunk(len(views))[:2]
        return loss, similarities(z1, z2, z2, positives=1)


def main():
    args = parse_args(PRESETS)
    if args.small_size > args.image_size:
        raise genview.Trouble(f"--small-size {args.small_size} must be at most --image-size {args.image_size}")
    if args.arch in genview.VITS and args.small_crops and args.small_size != args.image_size:
        raise genview.Trouble(f"{args.arch} takes views of one size: --small-crops 0")
    train(args, genview.setup(args.device), {"swav": SwAV}.get)


if __name__ == "__main__":
    genview.run(main)
