"""BYOL and SimSiam with GenView: no negatives. The step, the loop and the command line are train_moco.py's.

    python train_byol.py --dataset shapes                                # no download; BYOL
    python train_byol.py --dataset cifar10 --method simsiam              # uses the views of generate_views.py
    torchrun --nproc_per_node=8 train_byol.py --dataset imagenet --data-dir /data/imagenet --views-dir /data/imagenet-views

Legend of the shapes: N pairs of this process, S side of a view, D size of an embedding.
"""
import torch
import torch.nn.functional as F
from torch import nn

import genview
from quality_loss import negative_cosine
from train_moco import Encoder, Momentum, mlp, parse_args, spread, train

# Recipes as in train_moco.py. [byol] the paper's for 300 epochs, [simsiam] the paper's, [rel] GenView's release; else ours.
PRESETS = {
    ("imagenet", "byol"): dict(
        arch="resnet50", image_size=224, epochs=200, batch_size=4096,             # [byol] but 300 epochs there
        optimizer="lars", lr=0.3, weight_decay=1e-6, warmup_epochs=10,            # [byol]
        dim=256, hidden=4096, momentum=0.99, crop_min=0.08, blur=0.5, knn_every=20),               # [byol]
    ("imagenet", "simsiam"): dict(
        arch="resnet50", image_size=224, epochs=200, batch_size=256,              # [rel]
        optimizer="sgd", lr=0.05, weight_decay=1e-4, warmup_epochs=0,             # [rel] [simsiam]
        dim=2048, hidden=512, crop_min=0.2, blur=0.5, knn_every=20),              # [simsiam]
    ("cifar10", "byol"): dict(
        arch="resnet18", image_size=32, epochs=200, batch_size=256, optimizer="sgd", lr=0.06, weight_decay=5e-4,
        warmup_epochs=5, dim=256, hidden=1024, momentum=0.99, crop_min=0.2, blur=0.0, knn_every=10),
    ("cifar10", "simsiam"): dict(
        arch="resnet18", image_size=32, epochs=200, batch_size=512,               # [simsiam] but 800 epochs there
        optimizer="sgd", lr=0.03, weight_decay=5e-4, warmup_epochs=0,             # [simsiam]
        dim=2048, hidden=512, crop_min=0.2, blur=0.0, knn_every=10),              # [simsiam]
    ("shapes", "byol"): dict(
        arch="resnet10_narrow", image_size=32, epochs=30, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1, dim=128, hidden=512, momentum=0.98, crop_min=0.3, blur=0.0, knn_every=5),
    ("shapes", "simsiam"): dict(
        arch="resnet10_narrow", image_size=32, epochs=30, batch_size=128, optimizer="adamw", lr=4e-3, weight_decay=1e-4,
        warmup_epochs=1, dim=512, hidden=128, crop_min=0.3, blur=0.0, knn_every=5),
}
for name in ("byol", "simsiam"):
    PRESETS["cifar100", name] = PRESETS["cifar10", name]
    PRESETS["folder", name] = PRESETS["imagenet", name]


class BYOL(Momentum):
    """BYOL (Grill et al. 2020): the query encoder and a predictor foretell the key encoder's embedding of the other view."""

    chance = 0.0                                   # of a cosine; the least is -4

    def __init__(self, args):
        super().__init__(args, lambda features: mlp([features, args.hidden, args.dim], norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True)

    def forward(self, views, weights, world):
        p1, p2 = (self.predictor(self.query(v)) for v in views)                   # (N, D)
        with torch.no_grad():
            z1, z2 = (self.key(v) for v in views)                                 # (N, D)
        # |p - z|^2 = 2 - 2 cos for unit vectors: the paper's loss but for the constant. Both directions carry the same w.
        loss = 2 * (negative_cosine(p1, z2, weights) + negative_cosine(p2, z1, weights))
        return loss, readouts(p1, z2, z1)


class SimSiam(nn.Module):
    """SimSiam (Chen and He 2021): BYOL without the moving average; stopping the gradient is enough. The predictor's learning
    rate stays constant, lest it fall behind the embeddings."""

    chance = 0.0                                   # the least is -1

    def __init__(self, args):
        super().__init__()
        backbone, features = genview.make_backbone(args.arch, args.image_size, zero_init_residual=True)
        between = [args.dim] * (1 if args.image_size <= genview.IN_MEMORY_SIZE else 2)            # two layers on CIFAR, else three
        self.query = Encoder(backbone, mlp([features, *between, args.dim], norm=True, last_norm=True))
        self.predictor = mlp([args.dim, args.hidden, args.dim], norm=True)
        self.constant_lr = [self.predictor]

    def update(self, progress):
        """There is no moving average to update."""

    def forward(self, views, weights, world):
        z1, z2 = (self.query(v) for v in views)                                   # (N, D)
        p1, p2 = self.predictor(z1), self.predictor(z2)                           # (N, D)
        loss = 0.5 * (negative_cosine(p1, z2, weights) + negative_cosine(p2, z1, weights))
        return loss, readouts(p1, z2, z1)


@torch.no_grad()
def readouts(prediction, target, other):
    """Mean cosine of a prediction with its target (rises) and with those of other pairs; the spread of the embeddings."""
    p, z = F.normalize(prediction.float(), dim=1), F.normalize(target.float(), dim=1)
    n, pos = len(p), (p * z).sum(1).mean()
    neg = (n * p.mean(0) @ z.mean(0) - pos) / max(n - 1, 1)
    return {"pos": pos, "neg": neg, "std": spread(F.normalize(other.float(), dim=1))}


METHODS = {"byol": BYOL, "simsiam": SimSiam}


def main():
    args = parse_args(PRESETS)
    train(args, genview.setup(args.device), METHODS.get)


if __name__ == "__main__":
    genview.run(main)
