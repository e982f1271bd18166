"""Single pictures: read from files as they are meant to be seen, cut, and drawn on sheets."""
import functools
import os
import re
import stat
import warnings

import numpy as np
import torch
from PIL import ExifTags, Image, ImageDraw
from torch.utils.data import get_worker_info

from support.command_line import UserError, say

# What EXIF says about how to turn a picture.
TURNS = {2: Image.Transpose.FLIP_LEFT_RIGHT, 3: Image.Transpose.ROTATE_180,
         4: Image.Transpose.FLIP_TOP_BOTTOM, 5: Image.Transpose.TRANSPOSE,
         6: Image.Transpose.ROTATE_270, 7: Image.Transpose.TRANSVERSE,
         8: Image.Transpose.ROTATE_90}


def open_image(path, upright=True):
    """An image file as PIL's RGB image, upright (or as it is stored); UserError where it cannot be
    read."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            warnings.simplefilter("error", Image.DecompressionBombWarning)   # a far too large image
            if not stat.S_ISREG(os.stat(path).st_mode):        # opening a pipe would block
                raise ValueError("it is no regular file")
            with Image.open(path) as image:
                image.load()
                turn = how_to_turn(image) if upright else None
                image = eight_bits(image)
                if turn is not None:
                    image = image.transpose(turn)
                image = image.convert("RGB")
    except Exception as error:                     # PIL raises many kinds
        name = str(path).replace("\n", "\\n")      # a message is one line
        raise UserError(f"{name} cannot be read as an image ({' '.join(str(error).split())}); "
                        f"repair or remove it") from None
    worker = get_worker_info()
    if worker is None or worker.id == 0:           # the first of several speaks for all
        for warning in caught:
            show_warning(re.sub(r"\d+", "...", " ".join(str(warning.message).split())))
    return image


@functools.cache                                   # once for each kind
def show_warning(kind):
    say(f"*** images that can be read, but Pillow says: {kind}")


def how_to_turn(image):
    """What EXIF says, for PIL's transpose; None: as it is stored, as where EXIF is damaged."""
    try:
        return TURNS.get(image.getexif().get(ExifTags.Base.Orientation))
    except Exception:                              # PIL raises many kinds
        return None


def eight_bits(image):
    """A grey PIL image of 16 or 32 bits as one of 8 bits, any other as it is."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image)
    scaled = values / (scale_of(values) / 255)
    return Image.fromarray(scaled.round().clip(0, 255).astype(np.uint8))


def scale_of(values):
    """What stands for white in integers or floats of more than 8 bits: 1, 255 or 65535, the first
    that the values do not exceed. ValueError where none fits: the picture would be black or white.
    """
    least = values.min()
    most = values.max()
    for top in (1, 255, 65535):
        if -0.1 * top <= least and most <= 1.1 * top:
            if top == 1 or most >= top / 16:
                return top
            break
    raise ValueError(f"its values, {least:g} to {most:g}, fit neither 0 to 1 nor 0 to 255 nor 0 "
                     f"to 65535")


def square(image, size):
    """The central square of a PIL image, resized to size x size."""
    side = min(image.size)
    left = (image.width - side) / 2
    top = (image.height - side) / 2
    box = (left, top, left + side, top + side)
    return image.resize((size, size), Image.Resampling.BICUBIC, box=box)


def to_tensor(image):
    """PIL's RGB image -> (3, H, W) uint8."""
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def to_image(pixels):
    """(3, H, W) uint8 -> PIL's RGB image."""
    return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())


def sheet(columns, captions, frames, cell, labels):
    """One PIL image: columns of PIL images, a caption below each, a label left of each row.

    captions: "" for none; frames: {(column, row): colour}; cell: side of a picture in pixels.
    """
    gap = 6                                        # between pictures
    left = 76                                      # for the rows' labels
    foot = 34 if any(captions) else 0              # for the captions
    size = (left + len(columns) * (cell + gap), len(labels) * (cell + gap) + foot)
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for row, label in enumerate(labels):
        draw.text((6, row * (cell + gap) + cell // 2), label, fill="black")
    for column, (pictures, caption) in enumerate(zip(columns, captions, strict=True)):
        x = left + column * (cell + gap)
        for row, picture in enumerate(pictures):
            y = row * (cell + gap) + gap // 2
            if (column, row) in frames:
                draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), frames[column, row])
            sharp = picture.width < cell               # enlarged pixels stay visible
            method = Image.Resampling.NEAREST if sharp else Image.Resampling.BICUBIC
            canvas.paste(picture.resize((cell, cell), method), (x, y))
        draw.text((x, len(labels) * (cell + gap) + 2), caption, fill="black")
    return canvas
