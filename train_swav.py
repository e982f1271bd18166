"""SwAV with GenView: views predict each other's codes. The step and loop are train_moco.py's.

    python train_swav.py --dataset shapes                                # no download
    python train_swav.py --dataset cifar10                               # makes missing views first
    torchrun --nproc_per_node=8 train_swav.py --dataset imagenet --data-dir /data/imagenet \\
        --views-dir /data/imagenet-views

Legend of the shapes: N images of this process, V views of each (two large ones, then small crops
taken in turn from image and generated view), D size of an embedding, P prototypes, M embeddings in
a queue.
"""
import math

import torch
import torch.nn.functional as F
from torch import nn

from quality_loss import sinkhorn, swapped_prediction
from support.command_line import UserError, script
from support.networks import VITS, make_backbone
from support.processes import setup
from train_moco import Encoder, health, mlp, parse_args, train


class SwAV(nn.Module):
    """SwAV (Caron et al. 2020): an encoder and prototypes of unit length.

    A batch smaller than the number of prototypes cannot be spread over them equally. With --queue
    older embeddings of each large view get codes together with the batch (Sec. 3.1)."""
    def __init__(self, args):
        super().__init__()
        backbone, features = make_backbone(args.arch, args.image_size)
        self.query = Encoder(backbone, mlp([features, args.hidden, args.dim], norm=True))
        self.prototypes = nn.Linear(args.dim, args.prototypes, bias=False)      # rows (P, D)
        self.temperature = args.temperature
        self.epsilon = args.epsilon
        self.chance = math.log(args.prototypes)
        # The fractions of the training from which prototypes learn, and the queue fills.
        self.learn_from = args.freeze_epochs / args.epochs
        self.fill_from = args.queue_after / args.epochs if args.queue else math.inf
        self.prototypes_learn = True
        self.prototypes.weight.register_hook(lambda gradient: gradient * self.prototypes_learn)
        # The newest first, the same in all processes; zeros: not yet filled.            (2, M, D)
        self.register_buffer("queue", torch.zeros(2, args.queue, args.dim) if args.queue else None)
        self.queue_fills = False
        self.queue_is_full = False

    @torch.no_grad()
    def update(self, fraction):
        """Before each step: prototypes to unit length; they do not learn in the first epochs. The
        queue is used once its last row is filled; the device is asked for it only until then."""
        self.prototypes.weight.copy_(F.normalize(self.prototypes.weight, dim=1))
        self.prototypes_learn = fraction >= self.learn_from
        self.queue_fills = fraction >= self.fill_from
        if self.queue_fills and not self.queue_is_full:
            self.queue_is_full = bool(self.queue[:, -1].any())

    def forward(self, views, weights, world):
        sizes = sorted({v.shape[-1] for v in views}, reverse=True)     # large ones first
        z = []
        for size in sizes:
            batch = torch.cat([v for v in views if v.shape[-1] == size])
            z.append(self.query(batch))
        z = torch.cat(z)                                                        # (V N, D)
        with torch.autocast(z.device.type, enabled=False):
            z = F.normalize(z.float(), dim=1)
            scores = F.linear(z, self.prototypes.weight.float())                # cosines
            scores = scores.unflatten(0, (len(views), -1))                      # (V, N, P)
            codes = self.codes(scores[:2].detach(), world)                      # (2, N, P)
        loss = swapped_prediction(scores, codes, temperature=self.temperature, weights=weights)
        z1, z2 = z.detach().chunk(len(views))[:2]
        if self.queue_fills:
            self.enqueue(torch.stack([world.gather(z1), world.gather(z2)]))
        return loss, health(z1, z2, z2, embeddings=z1, positives=1)

    @torch.no_grad()
    def codes(self, scores, world):
        """scores (2, N, P) -> codes of the batch (2, N, P), computed over queue and batch."""
        count = scores.shape[1]
        if self.queue_is_full:                     # sinkhorn joins the processes: each has a share
            older = self.queue.chunk(world.size, dim=1)[world.rank]
            older = F.linear(older, self.prototypes.weight.float())             # (2, M / size, P)
            scores = torch.cat([older, scores], dim=1)
        return torch.stack([sinkhorn(s, self.epsilon, group=world.group)[-count:] for s in scores])

    @torch.no_grad()
    def enqueue(self, z):
        """The newest embeddings (2, all N, D) in front; the oldest fall out."""
        self.queue.copy_(torch.cat([z, self.queue], dim=1)[:, :self.queue.shape[1]])


METHODS = {"swav": SwAV}


def main():
    args = parse_args(METHODS, __doc__.split("\n")[0])
    if args.small_size > args.image_size:
        raise UserError(f"--small-size {args.small_size} must be at most --image-size "
                        f"{args.image_size}")
    if args.small_min > args.crop_min:
        raise UserError(f"--small-min {args.small_min:g} must be at most --crop-min "
                        f"{args.crop_min:g}: small crops take areas between the two")
    if args.arch in VITS and args.small_crops and args.small_size != args.image_size:
        raise UserError(f"{args.arch} takes views of one size: --small-crops 0")
    train(args, setup(args.device, precision=args.precision, args=args), METHODS)


if __name__ == "__main__":
    script(main)
