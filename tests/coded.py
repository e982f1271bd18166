"""Pictures that tell in their pixels what was done to them, and a recorder of the training steps.

Red grows with x, green with y, blue names the picture; generated views have 128 more of blue. With
crops and flips alone, each view in a step tells its picture, its box and whether it is mirrored.
"""
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from running import call

import train_moco
from support.augment import CLIP_MEAN, CLIP_STD

COUNT = 24                                         # training pictures; blue is 5 times the number


def save(folder, size=32, flat=False, leave_out=0):
    """Writes COUNT training and 4 test pictures of two classes into folder/images, and views of all
    but the first ones into folder/views. flat: one colour each."""
    y, x = np.mgrid[0:size, 0:size] * (248 // (size - 1))
    for number in range(COUNT + 4):
        split = "train" if number < COUNT else "test"
        name = f"{split}/{'ab'[number % 2]}/{number:02d}.png"
        generated = [0, 128] if leave_out <= number < COUNT else [0]
        for more in generated:
            red, green = (np.full_like(x, 180), np.full_like(x, 60)) if flat else (x, y)
            pixels = np.stack([red, green, np.full_like(x, 5 * number % 120 + more)], 2)
            path = Path(folder, "views" if more else "images", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path)
    return folder


def pixels_of(view):
    """A view (3, S, S) as it was before its normalisation, 0 to 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (CLIP_MEAN, CLIP_STD))
    return (view.float().cpu() * std + mean) * 255


def decoded(view, size=32):
    """What a view of a coded picture tells."""
    red, green, blue = pixels_of(view)
    step = 248 // (size - 1)
    number = blue.mean().item()
    side = view.shape[1]
    across = (red[:, -1] - red[:, 0]).mean().item() / step * side / (side - 1)
    down = (green[-1] - green[0]).mean().item() / step * side / (side - 1)
    return SimpleNamespace(
        picture=round(number % 128 / 5), generated=number > 125, mirrored=across < 0,
        area=abs(across) * abs(down) / size ** 2,
        box=(red.mean().item() / step, green.mean().item() / step, abs(across), abs(down)))


def record(module, *flags, learn=False):
    """The training steps of a run, as they arrive in train_step: views, rates, fraction, ..."""
    steps, real = [], train_moco.train_step

    def train_step(method, optimizer, views, quality_of, gamma, fraction, world):
        groups = [{key: x for key, x in group.items() if key != "params"}
                  for group in optimizer.param_groups]
        steps.append(SimpleNamespace(
            method=method, optimizer=optimizer, groups=groups, views=[v.clone() for v in views],
            quality_of=quality_of, gamma=gamma, fraction=fraction, world=world))
        if learn:
            steps[-1].readouts = real(method, optimizer, views, quality_of, gamma, fraction, world)
            return steps[-1].readouts
        return {"loss": torch.zeros(())}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_moco, "train_step", train_step)
        call(module, *flags)
    return steps


def flags_of(folder, output, size=32, *more):
    """A run of plain pairs, two epochs of three steps, crops and flips alone."""
    return ["--dataset=folder", "--data-dir", folder / "images", "--image-size", size,
            "--arch", "resnet10_narrow" if size <= 64 else "resnet18", "--batch-size=8",
            "--epochs=2", "--knn-every=0", "--views-dir=none", "--colour=0", "--device=cpu",
            "--workers=0", "--output-dir", output, "--log-every=1", *more]
