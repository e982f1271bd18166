"""BYOL and SimSiam with GenView: no negatives. The step, loop and command line are train_moco.py's.

    python train_byol.py --dataset shapes                                # no download; BYOL
    python train_byol.py --dataset cifar10 --method simsiam              # makes missing views first
    torchrun --nproc_per_node=8 train_byol.py --dataset imagenet --data-dir /data/imagenet \\
        --views-dir /data/imagenet-views

Legend of the shapes: N pairs of this process, S side of a view, D size of an embedding.
"""
import torch
from torch import nn

from quality_loss import negative_cosine
from support.command_line import script
from support.data import IN_MEMORY_SIZE
from support.networks import make_backbone
from support.processes import setup
from train_moco import Encoder, Momentum, health, mlp, parse_args, train, unit


class BYOL(Momentum):
    """BYOL (Grill et al. 2020): the online encoder (query) and a predictor predict the target
    encoder's (key's) embedding of the other view."""

    chance = 0.0                                   # of a cosine; the smallest loss is -4

    def __init__(self, args):
        super().__init__(args, lambda features: mlp([features, args.hidden, args.dim], norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True)

    def forward(self, views, weights, world):
        view1, view2 = views
        p1 = self.predictor(self.query(view1))                                  # (N, D)
        p2 = self.predictor(self.query(view2))
        with torch.no_grad():
            z1 = self.key(view1)                                                # (N, D)
            z2 = self.key(view2)
        # |p - z|^2 = 2 - 2 cos for unit vectors: the paper's loss up to a constant. Both directions
        # carry the same w.
        loss = 2 * (negative_cosine(p1, z2, weights) + negative_cosine(p2, z1, weights))
        targets = unit(z2)
        return loss, health(unit(p1), targets, targets, embeddings=unit(z1), positives=1)


class SimSiam(nn.Module):
    """SimSiam (Chen and He 2021): BYOL without the moving average; stopping the gradient is enough.
    The predictor's learning rate stays constant, so that it keeps up with the embeddings."""

    chance = 0.0                                   # the smallest loss is -1

    def __init__(self, args):
        super().__init__()
        backbone, features = make_backbone(args.arch, args.image_size, zero_init_residual=True)
        between = [args.dim] * (1 if args.image_size <= IN_MEMORY_SIZE else 2)  # CIFAR: one less
        head = mlp([features, *between, args.dim], norm=True, last_norm=True)
        self.query = Encoder(backbone, head)
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True)
        self.constant_lr = [self.predictor]

    def update(self, fraction):
        """There is no moving average to update."""

    def forward(self, views, weights, world):
        view1, view2 = views
        z1 = self.query(view1)                                                  # (N, D)
        z2 = self.query(view2)
        p1 = self.predictor(z1)                                                 # (N, D)
        p2 = self.predictor(z2)
        loss = 0.5 * (negative_cosine(p1, z2, weights) + negative_cosine(p2, z1, weights))
        targets = unit(z2)
        return loss, health(unit(p1), targets, targets, embeddings=unit(z1), positives=1)


METHODS = {"byol": BYOL, "simsiam": SimSiam}


def main():
    args = parse_args(METHODS, __doc__.split("\n")[0])
    train(args, setup(args.device, precision=args.precision, args=args), METHODS)


if __name__ == "__main__":
    script(main)
