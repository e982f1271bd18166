"""Random augmentations of whole batches: every image has its own random numbers.

Legend of the shapes: N images, V views of each, H and W of an image, S side of a view in pixels.
"""
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

# Views are normalised with CLIP's numbers: one tensor feeds the frozen and the trained encoder.
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)
CROP_TRIES = 10      # as torchvision's RandomResizedCrop; if none fits, the central square is taken


class Augmentation(NamedTuple):
    """A random augmentation t of MoCo: crop always, flip with probability 0.5, grey
    with 0.2, the rest with the probabilities given."""
    scale: tuple = (0.2, 1.0)              # part of the image's area in the crop
    jitter: tuple = (0.4, 0.4, 0.4, 0.1)   # brightness, contrast, saturation, hue; probability 0.8
    blur: float = 0.5                      # probability; sigma in [0.1, 2] pixels
    solarise: float = 0.0                  # probability
    size: int = None                       # side of the view in pixels; None: the loader's
    colour: float = 1.0                    # factor of strength and probability of all these


class Draws(NamedTuple):
    """Uniform random numbers in [0, 1), by what they decide; (...) is (N,) of one view of each
    image, or (V,) of all views of one image."""
    crop: Tensor          # (..., CROP_TRIES, 4): area, aspect ratio, left, top of each try
    jitter: Tensor        # (...): are colours jittered?
    strength: Tensor      # (..., 4): factors of brightness, contrast, saturation, hue
    grey: Tensor          # (...): is the view grey?
    blur: Tensor          # (...): is it blurred?
    sigma: Tensor         # (...): by how much?
    solarise: Tensor      # (...): is it solarised?
    flip: Tensor          # (...): is it mirrored?

    COLUMNS = 4 * CROP_TRIES + 10

    @classmethod
    def split(cls, u):
        """Names the numbers of u (..., COLUMNS), which lie in the order of the fields."""
        crop, jitter, strength, *others = u.split([4 * CROP_TRIES, 1, 4, 1, 1, 1, 1, 1], dim=-1)
        crop = crop.unflatten(-1, (CROP_TRIES, 4))
        others = [x[..., 0] for x in others]
        return cls(crop, jitter[..., 0], strength, *others)


def crop_boxes(u, height, width, scale):
    """Random crops: aspect ratio 3/4 to 4/3, the first try that fits, else the central square.

    Args:
        u: (N, CROP_TRIES, 4) uniform in [0, 1).
        scale: (smallest, largest) part of the image's area.
    Returns:
        (N, 4) boxes x1, y1, x2, y2 in pixels, not rounded.
    """
    area = height * width * (scale[0] + (scale[1] - scale[0]) * u[..., 0])          # (N, tries)
    ratio = torch.exp((2 * u[..., 1] - 1) * math.log(4 / 3))
    w = (area * ratio).sqrt()
    h = (area / ratio).sqrt()
    fits = (w <= width) & (h <= height)
    pick = torch.arange(len(u), device=u.device), fits.int().argmax(1)              # the first
    side = torch.full((), float(min(height, width)), device=u.device)
    any_fits = fits.any(1)
    w = torch.where(any_fits, w[pick], side)
    h = torch.where(any_fits, h[pick], side)
    left = (width - w) * torch.where(any_fits, u[..., 2][pick], 0.5)
    top = (height - h) * torch.where(any_fits, u[..., 3][pick], 0.5)
    return torch.stack([left, top, left + w, top + h], 1)


def crop_box(u, height, width, scale):
    """crop_boxes for one image, in whole pixels as torchvision's: x1, y1, x2, y2. u: CROP_TRIES
    lists of four numbers. Plain numbers: tensor operations would take longer than the crop."""
    for u_area, u_ratio, u_left, u_top in u:
        area = height * width * (scale[0] + (scale[1] - scale[0]) * u_area)
        ratio = (4 / 3) ** (2 * u_ratio - 1)
        w = round(math.sqrt(area * ratio))
        h = round(math.sqrt(area / ratio))
        if 0 < w <= width and 0 < h <= height:
            left = int(u_left * (width - w + 1))
            top = int(u_top * (height - h + 1))
            return left, top, left + w, top + h
    return central_box(min(height, width), height, width)


def central_box(side, height, width):
    """The central square, in whole pixels: x1, y1, x2, y2."""
    left = (width - side) // 2
    top = (height - side) // 2
    return left, top, left + side, top + side


def crop_file(pixels, box, size):
    """A box of an image (3, H, W) uint8, resized to (3, size, size) uint8: a slice of the tensor,
    four times as fast as Pillow, from whose result it differs by at most 3."""
    x1, y1, x2, y2 = box
    part = pixels[None, :, y1:y2, x1:x2].contiguous(memory_format=torch.channels_last)   # faster
    return F.interpolate(part, size=(size, size), mode="bilinear", antialias=True)[0]


def crop(pixels, boxes, size):
    """Crops boxes (N, 4) out of pixels (N, 3, H, W), resized to size x size, bilinearly."""
    index = torch.arange(len(boxes), device=boxes.device, dtype=boxes.dtype)[:, None]
    rois = torch.cat([index, boxes], 1)
    return roi_align(pixels.float(), rois, size, sampling_ratio=1, aligned=True)


def augment_crops(x, draws, order, augmentation):
    """All of an augmentation but the crop, for a batch.

    Args:
        x: (N, 3, S, S) in [0, 1], changed in place.
        draws: Draws of (N,).
        order: a permutation of 0..3, the order of the four jitters (one a batch; torchvision draws
            one an image).
    Returns:
        (N, 3, S, S), normalised with CLIP's mean and standard deviation; in memory the channels lie
        side by side, as convolutions are fastest.
    """
    def over_images(u):
        return u[:, None, None, None]
    colour = augmentation.colour
    strength = constant(augmentation.jitter, x.device) * colour
    strength = strength * (draws.jitter[:, None] < 0.8 * colour)                    # (N, 4)
    factor = (2 * draws.strength - 1) * strength                      # 0 leaves the image as it is
    for jitter in order:
        f = over_images(factor[:, jitter])
        if jitter == 0:
            x = x.mul_(1 + f).clamp_(0, 1)                                          # brightness
        elif jitter == 1:
            x = x.lerp_(grey(x).mean((2, 3), keepdim=True), -f).clamp_(0, 1)        # contrast
        elif jitter == 2:
            x = x.lerp_(grey(x), -f).clamp_(0, 1)                                   # saturation
        elif augmentation.jitter[3] * colour:
            x = shift_hue(x, f)
    x = x.lerp_(grey(x), over_images((draws.grey < 0.2 * colour).to(x.dtype)))       # grey
    if augmentation.blur * colour:
        blurred = blur(x, 0.1 + 1.9 * colour * draws.sigma)
        x = torch.where(over_images(draws.blur < augmentation.blur * colour), blurred, x)
    if augmentation.solarise * colour:
        chosen = over_images(draws.solarise < augmentation.solarise * colour)
        x = torch.where(chosen & (x >= 0.5), 1 - x, x)
    x = torch.where(over_images(draws.flip < 0.5), x.flip(3), x)                    # mirrored
    return normalise(x).contiguous(memory_format=torch.channels_last)


def grey(x):
    """ITU-R 601 luma, (N, 3, H, W) -> (N, 1, H, W)."""
    return x[:, :1] * 0.2989 + x[:, 1:2] * 0.587 + x[:, 2:] * 0.114


def shift_hue(x, turn):
    """Turns the hue of x (N, 3, H, W) in [0, 1] by turn (N, 1, 1, 1) full circles, in HSV space."""
    r, g, b = x.unbind(1)
    value = x.amax(1)
    chroma = value - x.amin(1)
    safe = chroma.clamp_min(1e-8)
    of_green_or_blue = torch.where(value == g, 2 + (b - r) / safe, 4 + (r - g) / safe)
    hue = torch.where(value == r, (g - b) / safe, of_green_or_blue)
    k = (constant((5.0, 3.0, 1.0), x.device).view(1, 3, 1, 1) + (hue[:, None] + 6 * turn)) % 6
    return value[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)


def blur(x, sigma):
    """Gaussian blur of x (N, 3, S, S), sigma (N,) pixels: rows and columns are matrix products."""
    position = torch.arange(x.shape[-1], device=x.device)
    distance = (position[:, None] - position).square()
    kernel = torch.exp(-distance / (2 * sigma.square()[:, None, None]))
    kernel = (kernel / kernel.sum(2, keepdim=True))[:, None]        # (N, 1, S, S), rows sum to 1
    return kernel @ x @ kernel.mT


def normalise(x):
    """x (N, 3, H, W) in [0, 1], with CLIP's mean and standard deviation."""
    mean = per_channel(CLIP_MEAN, x.device).to(x.dtype)
    std = per_channel(CLIP_STD, x.device).to(x.dtype)
    return (x - mean) / std


def renormalise(x, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)):
    """From CLIP's mean and standard deviation to others; without these back to [0, 1]."""
    clip_mean = per_channel(CLIP_MEAN, x.device)
    clip_std = per_channel(CLIP_STD, x.device)
    mean = per_channel(tuple(mean), x.device)
    std = per_channel(tuple(std), x.device)
    return (x * clip_std + clip_mean - mean) / std


def per_channel(values, device):
    """A number of each channel, (3, 1, 1)."""
    return constant(values, device).view(3, 1, 1)


@functools.lru_cache
@torch.inference_mode(False)                       # an inference tensor would not allow gradients
def constant(values, device):
    """A few numbers on the device, copied there once: each copy would make a GPU wait."""
    return torch.tensor(values, dtype=torch.float32, device=device)
