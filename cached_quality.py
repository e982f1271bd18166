r"""--quality cached: the quality q of the pairs without running the frozen encoder E at every step.

E's feature map of a picture X lies like the picture: what E sees at a place stands at that place of the map. So cropping and
mirroring commute with E, nearly, and what remains of an augmentation is colour, which E is trained to look through:

    E(colours(mirror(crop(X)))) ~ mirror(crop(E(X)))

The right-hand side needs E once for each image and each generated view, and not even the mirror: q pools over the positions,
whatever their order. What is lost: the colours, the border (E saw beyond the crop) and E's finer look at a small crop, which
is enlarged before E sees it. quality_study.py measures how much that is.

Legend of the shapes: N images, R pictures (N images, then their N generated views), G side of a feature map, T = G G its
positions, K features of E at a position, C numbers kept of them, n pairs of a batch.
"""
import hashlib
import json
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import genview
from quality_loss import pair_quality

GRID = 7                                           # larger maps are averaged down to the paper's 7 x 7
BATCH = 64                                         # pictures that E sees at once


class CachedQuality:
    """q, s^f and s^b of the pairs of a batch, as train_moco.PairQuality, from the stored features of whole pictures."""

    def __init__(self, maps, device):
        """maps: (R, G, G, C), see features_file; their first numbers are <F, v1>, so that v1 is (1, 0, ..., 0) here."""
        self.maps, self.device = maps, device
        self.component = torch.eye(maps.shape[3], device=device)[0]

    @torch.no_grad()
    def __call__(self, view1, view2, places):
        """places: which parts of which pictures the two views are (genview.Place); their pixels are not looked at."""
        return pair_quality(*map(self.features, places), self.component)

    def features(self, place):
        """crop(E(X)), (n, T, C)."""
        maps = torch.from_numpy(self.maps[place.row.numpy()]).to(self.device, non_blocking=True)        # (n, G, G, C)
        side = maps.shape[1]
        return genview.crop(maps.permute(0, 3, 1, 2), place.box * side, side).flatten(2).mT


def fit_projection(tokens, component, count):
    """An orthonormal basis of what is kept of the features: v1 itself, so that the attention stays what it is, then the
    principal components of the rest. Those are of the features as they are, mean included: the cosines are, too.

    Args:
        tokens: (N, T, K), features of some pictures.
        component: v1, (K,).
        count: C.
    Returns:
        (K, C) float32 with orthonormal columns, and the share of the features' variance that they keep.
    """
    mean, covariance = (x.cpu() for x in genview.moments(tokens))
    v1 = F.normalize(component.cpu().double(), dim=0)                              # MPS has no float64
    rest = torch.eye(len(v1), dtype=torch.double) - torch.outer(v1, v1)
    second = rest @ (covariance + torch.outer(mean, mean)) @ rest - torch.outer(v1, v1)                 # v1 comes last
    others = torch.linalg.eigh(second)[1].flip(1)
    basis = torch.cat([v1[:, None], others[:, :min(count, len(v1)) - 1]], 1)                            # (K, C)
    return basis.float(), ((basis.T @ covariance @ basis).trace() / covariance.trace()).item()


def features_file(encoder, images, views, component, args, world):
    """E's features of all pictures, made unless they are there: a memory-mapped array (R, G, G, C), float16.

    It lies beside the views (without such a folder: in the run's), under a name that tells encoder, component and pictures.
    All processes make it together. Returns the array.
    """
    there = args.views_dir != "none" and args.dataset != "shapes"
    path = Path(args.views_dir if there else args.output_dir) / f"features-{fingerprint(images, views, component, args)}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    total = len(images.names) * (1 if views is None else 2)
    if not world.gather_objects(path.exists())[0]:                                 # another run may be about to make it
        make_features(path, encoder, images, views, component, total, args, world)
    try:
        maps = np.load(path, mmap_mode="r")
    except (OSError, ValueError):                  # cut short, or no array
        maps = np.zeros(0)
    if maps.ndim != 4 or len(maps) != total or maps.dtype != np.float16:
        raise genview.Trouble(f"{path} is damaged: remove it, and it will be made again")
    return maps


def fingerprint(images, views, component, args):
    """Eight characters that change with anything the features depend on."""
    settings = Path(args.views_dir, "settings.json")
    without = [path is None for path in views] if isinstance(views, list) else views is None
    content = [hashlib.sha256(x.numpy()).hexdigest() for x in (images.pixels, views) if torch.is_tensor(x)]
    facts = [content, args.dataset, args.encoder, args.image_size, args.cached_components, [round(x, 4) for x in component.tolist()],
             images.names, without, settings.read_text() if settings.exists() else ""]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:8]


def make_features(path, encoder, images, views, component, total, args, world):
    @torch.no_grad()
    def features(rows):
        """E(X) of pictures, (n, T, K)."""
        pixels = torch.stack([picture(images, views, row, args) for row in rows.tolist()]).to(world.device)
        with world.autocast():
            return encoder(genview.normalise(pixels / 255)).float()

    temporary = path.with_suffix(f".{world.gather_objects(os.getpid())[0]}.tmp.npy")    # another run may make the same
    sample = torch.cat([features(rows).cpu() for rows in genview.spaced(total, 2000).split(BATCH)])           # in all processes alike
    basis, kept = fit_projection(sample, component, args.cached_components)
    basis = world.gather_objects(basis)[0].to(world.device)                        # not rounded by each GPU in its own way
    side = round(sample.shape[1] ** 0.5)
    grid = min(side, GRID)
    if world.rank == 0:
        temporary.unlink(missing_ok=True)
        genview.sweep(path.parent, "features-*.tmp.npy")
        shape = (total, grid, grid, basis.shape[1])
        try:
            np.lib.format.open_memmap(temporary, "w+", np.float16, shape)
            reserve(temporary)
        except OSError as error:
            temporary.unlink(missing_ok=True)
            raise genview.full_disk(path, error.strerror, 2 * math.prod(shape)) from None
    world.wait()
    file = np.lib.format.open_memmap(temporary, "r+")
    for rows in genview.progress(torch.arange(total).split(BATCH)[world.rank::world.size], "features of E", "batch"):
        maps = (features(rows) @ basis).mT.unflatten(2, (side, side))                                   # (n, C, side, side)
        file[rows.numpy()] = F.adaptive_avg_pool2d(maps, grid).permute(0, 2, 3, 1).half().cpu().numpy()
    file.flush()
    world.wait()
    if world.rank == 0:
        os.replace(temporary, path)
        genview.say(f"{path}: features of {total} pictures, {basis.shape[1]} numbers at {grid} x {grid} positions, "
                    f"{100 * kept:.1f}% of the variance, {path.stat().st_size / 1e6:.0f} MB")
    world.wait()


def reserve(path):
    """Takes the file's space on the disk now: a full disk is an OSError here, a crash in the middle of a memory-mapped write."""
    if hasattr(os, "posix_fallocate"):
        with open(path, "r+b") as file:
            os.posix_fallocate(file.fileno(), 0, path.stat().st_size)


def picture(images, views, row, args):
    """The whole picture of a row, (3, S, S) uint8; one that cannot be read is black with --skip-bad."""
    index, generated = row % len(images.names), row >= len(images.names)
    if images.pixels is not None:
        return (views if generated else images.pixels)[index]
    try:
        image = genview.open_image(views[index]) if generated and views[index] is not None else images.pil(index)
    except genview.Trouble:
        if not args.skip_bad:
            raise
        return torch.zeros(3, args.image_size, args.image_size, dtype=torch.uint8)
    return genview.to_tensor(image.resize((args.image_size, args.image_size), genview.Image.Resampling.BICUBIC))
