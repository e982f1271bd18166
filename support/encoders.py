"""Vision models of transformers and timm, whatever they expect of a picture and make of it.

Legend of the shapes: N images, T tokens (places of a feature map, row by row), K features of a
token, S side of a picture in pixels.
"""
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from support.augment import CLIP_MEAN, CLIP_STD
from support.command_line import UserError, say
from support.files import refuse_placeholder

OTHER_TOKENS = 20             # class and register tokens at most: DINOv2 has 5, timm up to 17
RGB = (0, 1, 2)               # the order of the channels of views


class Preprocessing(NamedTuple):
    """What a vision model expects of its pictures."""
    size: int                                      # height and width in pixels
    mean: tuple                                    # of red, green and blue in [0, 1]
    std: tuple
    order: tuple                                   # its channels: 0 is red, 1 green, 2 blue


def preprocessing_of(name, config, is_clip):
    """Preprocessing by a model's own image processor, of transformers or of timm; where the model
    has none, that of the views."""
    from transformers import AutoImageProcessor, CLIPImageProcessor
    side = side_of(config, "image_size", 224)
    kind = CLIPImageProcessor if is_clip else AutoImageProcessor
    try:
        processor = kind.from_pretrained(name, trust_remote_code=False)
    except OSError:
        if not is_clip:
            say(f"*** {name} has no readable preprocessor_config.json (timm: pretrained_cfg): its "
                f"pictures get CLIP's mean and std")
        return Preprocessing(side, CLIP_MEAN, CLIP_STD, RGB)
    return measured(processor, side)


def measured(processor, side):
    """Preprocessing, read off what the processor makes of a black, a red, a green and a blue
    picture of this side: no matter which of its settings does what."""
    pictures = np.zeros((4, side, side, 3), dtype=np.uint8)
    for colour in range(3):
        pictures[1 + colour, :, :, colour] = 255
    pixels = processor(list(pictures), return_tensors="pt")["pixel_values"]     # (4, 3, S, S)
    shape = tuple(pixels.shape)
    if shape[:2] != (4, 3) or shape[2] != shape[-1]:
        raise UserError(f"its image processor makes {shape} of four square pictures")
    size = shape[2]
    black, *colours = pixels[:, :, size // 2, size // 2].double()
    slopes = torch.stack(colours) - black                                       # (colour, channel)
    counts = slopes.abs() > 1e-4 * slopes.abs().max()
    if (counts.sum(0) != 1).any() or (counts.sum(1) != 1).any():
        raise UserError("its image processor mixes red, green and blue")
    order = slopes.abs().argmax(0)                                 # the colour of each channel
    channels = order.argsort()                                     # the channel of each colour
    slope = slopes[torch.arange(3), channels]
    # channel = slope * colour + black = (colour - mean) / std
    mean = -black[channels] / slope
    std = 1 / slope
    return Preprocessing(size, tuple(mean.tolist()), tuple(std.tolist()), tuple(order.tolist()))


def side_of(config, name, default):
    """A size that a configuration has as one number or as height and width."""
    return int(np.ravel(getattr(config, name, None) or default)[0])


def load_vision_model(name):
    """A vision model of transformers or, by its wrapper, of timm; in float32, in evaluation mode.
    Returns the model; is it a CLIP model?; the weights that its file lacks."""
    from transformers import AutoConfig, AutoModel, CLIPVisionModel, ViTModel, logging
    logging.set_verbosity_error()                  # it would report parts left out on purpose
    logging.disable_progress_bar()
    kinds = {
        "clip": CLIPVisionModel,
        "clip_vision_model": CLIPVisionModel,
        # The class of masked autoencoders hides 3/4 of the patches in evaluation mode, too. Its
        # encoder is a ViT, which sees all.
        "vit_mae": ViTModel,
    }
    for file in [*Path(name).glob("*.safetensors"), *Path(name).glob("*.bin")]:
        refuse_placeholder(file)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    if config.is_encoder_decoder:                  # a detector's last hidden state is its queries'
        raise UserError("it is an encoder with a decoder, whose output is no map of the picture")
    kind = kinds.get(config.model_type, AutoModel)
    model, report = kind.from_pretrained(name, trust_remote_code=False, output_loading_info=True)
    model = model.float().eval()
    missing = missing_weights(model, report["missing_keys"])
    is_clip = kind is CLIPVisionModel
    return model if is_clip else getattr(model, "vision_model", model), is_clip, missing


def missing_weights(model, names):
    """The numbers that the model's file lacks, by name. They are set to NaN instead of
    transformers' defaults: whether the features depend on them will be seen in the features."""
    tensors = {name: x for name, x in model.state_dict().items() if x.is_floating_point()}
    missing = sorted(tensors.keys() & set(names))
    for name in missing:
        tensors[name].fill_(math.nan)
    return missing


def patches_of(model, size):
    """How many patches stand side by side in a picture of this size; 1: the model does not say."""
    timm_model = getattr(model, "timm_model", None)
    if timm_model is None:
        return size // side_of(model.config, "patch_size", size)
    patch = getattr(getattr(timm_model, "patch_embed", None), "patch_size", None)
    return size // patch[0] if patch else 1


def feature_map(hidden, patches_across):
    """The last hidden state of any vision model -> features (N, T, K), T places row by row.

    patches_across: of a vision transformer, how many patches stand side by side; its class and
    register tokens stand before the patches. Convolutional and later layers have fewer places, and
    some models do not say (1): then the largest square of tokens is taken.
    """
    if hidden.ndim == 4 and hidden.shape[2] == hidden.shape[3]:                 # (N, K, H, W)
        return hidden.flatten(2).mT
    if hidden.ndim == 4 and hidden.shape[1] == hidden.shape[2]:                 # (N, H, W, K)
        return hidden.flatten(1, 2)
    if hidden.ndim != 3:
        raise UserError(f"its last hidden state {tuple(hidden.shape)} is no square map")
    tokens = hidden.shape[1]
    side = patches_across if 1 < patches_across ** 2 <= tokens else math.isqrt(tokens)
    others = tokens - side ** 2
    if others > OTHER_TOKENS:
        raise UserError(f"its {tokens} tokens are no map of {side} x {side} places")
    return hidden[:, others:]
