"""Checkpoints of any origin: this project's, torchvision's and those of the authors' release."""
import math
import zipfile
from pathlib import Path

import torch

from support.files import read_settings
from support.networks import VITS, make_backbone
from support.world import UserError

# A backbone's names begin with one of these: last.pt's, the authors', torchvision's.
PREFIXES = ("query.backbone.", "backbone.", "")
GUESSES = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
           "resnext50_32x4d", *VITS)


def load_checkpoint(path):
    """What torch.save wrote to path, on the CPU. It never unpickles code.

    Raises UserError where the file is missing, damaged or not a checkpoint of tensors.
    """
    try:
        # torch.save writes checksums, torch.load does not read them.
        if zipfile.is_zipfile(path) and (damaged := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{damaged} is damaged")
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:      # OSError, UnpicklingError, RuntimeError, EOFError, KeyError
        why = str(error).splitlines()[0] if str(error) else "empty"
        raise UserError(f"{path} cannot be loaded as a checkpoint ({why}); "
                        f"name a last.pt or backbone.pt by its path") from None


def load_backbone(path, arch=None):
    """The backbone of a checkpoint.

    Args:
        path: a last.pt or backbone.pt of a training run, a torchvision state dict, or a checkpoint
            of the authors' release.
        arch: its architecture; None: the one that the checkpoint names or that its tensors fit.
    Returns:
        backbone, D, and the settings it was trained with: a dict of those known, "arch" always.
    Raises:
        UserError: it cannot be loaded, or is of another architecture.
    """
    checkpoint = load_checkpoint(path)
    args = checkpoint.get("args", {}) if isinstance(checkpoint, dict) else {}
    beside = Path(path).with_name("args.json")
    if Path(path).name == "backbone.pt" and beside.exists():    # it has no settings in itself
        args = read_settings(beside)
    state = strip_prefix(checkpoint)
    image_size = guess_size(state)
    theirs = args.get("arch")
    if not theirs:
        theirs = next((name for name in GUESSES if not misfit(state, name, image_size)), None)
    arch = arch or theirs
    if not arch:
        raise UserError(f"{path} does not say its architecture and fits no common ResNet; "
                        f"name it with --arch")
    problem = misfit(state, arch, image_size)
    if problem:
        raise UserError(f"{path} is a checkpoint of another architecture: {problem} {arch}; "
                        f"it was made with {theirs or 'an unknown architecture'} (--arch)")
    backbone, dim = make_backbone(arch, image_size)
    backbone.load_state_dict(state, strict=False)       # num_batches_tracked may be missing
    return backbone, dim, args | {"arch": arch}


def strip_prefix(checkpoint):
    """The backbone's tensors of a checkpoint, under torchvision's names, without the classifier."""
    state = checkpoint
    for key in ("model", "state_dict"):
        state = state.get(key, state) if isinstance(state, dict) else {}
    state = {key: value for key, value in state.items() if isinstance(value, torch.Tensor)}
    prefix = next(p for p in PREFIXES if p == "" or any(key.startswith(p) for key in state))
    names = {key.removeprefix(prefix): value for key, value in state.items()
             if key.startswith(prefix)}
    return {key: value for key, value in names.items() if not key.startswith(("fc.", "heads."))}


def guess_size(state):
    """The side in pixels of the pictures that a backbone is made for, as its tensors show."""
    if "encoder.pos_embedding" in state:    # a ViT: a position a patch, one for the class token
        patches = state["encoder.pos_embedding"].shape[1] - 1
        return math.isqrt(patches) * state["conv_proj.weight"].shape[-1]
    return 32 if "conv1.weight" in state and state["conv1.weight"].shape[-1] == 3 else 224


def misfit(state, arch, image_size):
    """The first tensor that does not fit the architecture, in words; None where all fit."""
    with torch.device("meta"):              # shapes without memory
        expected = make_backbone(arch, image_size)[0].state_dict()
    for key in [*expected, *state]:
        if key.endswith("num_batches_tracked"):
            continue
        if key not in state:
            return f"it has no {key}, which is in"
        if key not in expected:
            return f"its {key} is not in"
        if state[key].shape != expected[key].shape:
            found, wanted = tuple(state[key].shape), tuple(expected[key].shape)
            return f"its {key} is {found}, not {wanted} as in"
    return None
