"""Checkpoints of any origin: ours, the release's, and the layouts in ANCHORS. A backbone is where
an anchor is among the tensors' dotted names, under a prefix such as state_dict.module.encoder_q.
"""
import re
import zipfile
from collections import OrderedDict
from pathlib import Path

import torch

from support.augment import CLIP_MEAN, CLIP_STD
from support.command_line import UserError, say
from support.files import read_settings
from support.networks import VITS, make_backbone, vision_transformer

MEAN_STD = {"imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
            "clip": (CLIP_MEAN, CLIP_STD), "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))}
RESNETS = [*(f"resnet{n}" for n in (18, 34, 50, 101, 152)), "wide_resnet50_2", "resnext50_32x4d"]
SIZES = VITS | {"vit_tiny": (192, 12, 3), "vit_large": (1024, 24, 16), "vit_huge": (1280, 32, 16)}
ANCHORS = {"layer1.0.conv1.weight": "torchvision", "4.0.conv1.weight": "positions",     # lightly's
           "conv_proj.weight": "torchvision", "patch_embed.proj.weight": "timm",
           "patch_embed.projection.weight": "mmpretrain",
           "embeddings.patch_embeddings.projection.weight": "transformers"}
NO_ANCHOR = ("model.query.backbone.", "state_dict.backbone.", "backbone.", "state_dict.", "")
POSITIONS = [("^0", "conv1"), ("^1", "bn1"), *((f"^{i}", f"layer{i - 3}") for i in range(4, 8))]
VIT_NAMES = [                 # patterns of all layouts and torchvision's names, applied in turn
    (r"^embeddings\.", ""), (r"^cls_token$", "class_token"),
    (r"^(pos_embed|position_embeddings)$", "encoder.pos_embedding"),
    (r"^(patch_embed\.proj(ection)?|patch_embeddings\.projection)\.", "conv_proj."),
    (r"^(blocks|layers|encoder\.layer)\.(\d+)\.", r"encoder.layers.encoder_layer_\2."),
    (r"^(norm|ln1|layernorm)\.", "encoder.ln."),
    (r"\.(norm1|ln1|layernorm_before)\.", ".ln_1."), (r"\.(norm2|ln2|layernorm_after)\.", ".ln_2."),
    (r"\.(attn\.qkv|attention\.(attention\.\w+|[qkv]_proj))\.", ".self_attention.in_proj_"),
    (r"\.(attn\.proj|attention\.(output\.dense|o_proj))\.", ".self_attention.out_proj."),
    (r"\.(mlp\.fc1|mlp\.linear_1|ffn\.layers\.0\.0|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(mlp\.fc2|mlp\.linear_2|ffn\.layers\.1|output\.dense)\.", ".mlp.3.")]
# Heads and decoders, which may stand under a backbone's prefix.
OTHER_PARTS = r"((pro|pred|queue|decoder|mask|head_)\w*|fc|heads?|classifier|pooler)(\.|$)"
# Words in a prefix: of several backbones the lowest is taken, the one that its authors evaluate.
ROLES = {"teacher": 1, "student": 2, "k": 3, "key": 3, "momentum": 3, "target": 3, "ema": 3}
HARMLESS = (                  # objects that mmengine, Lightning, DINO and timm save beside weights
    r"(mmengine|mmcv|numpy|omegaconf|pytorch_lightning|lightning\w*|pathlib)\..+|typing\.Any|"
    r"(argparse\.Name|collections\.default)\w+|builtins\.(getattr|dict|list|bool|int|float|str)")


class StandIn:
    """Takes the place of an object of another program: none of its code runs."""
    def __new__(cls, *args):                       # PyTorch fills no other mapping
        return OrderedDict() if cls.__name__.lower().endswith("dict") else object.__new__(cls)

    def __setstate__(self, state):
        pass


def load_checkpoint(path):
    """What torch.save or safetensors wrote to path, on the CPU. It never runs code of the file.
    Raises UserError where that is missing, damaged or holds objects that are not HARMLESS."""
    stand_ins = {}
    try:
        if str(path).endswith(".safetensors"):
            from safetensors.torch import load_file
            return load_file(path)
        if zipfile.is_zipfile(path) and (bad := zipfile.ZipFile(path).testzip()):
            raise ValueError(f"{bad} is damaged")              # torch.load reads no checksums
        checkpoint = read(path, stand_ins)
    except Exception as error:      # OSError, UnpicklingError, RuntimeError, EOFError, KeyError
        line = re.search(".*GLOBAL.*", str(error)) or re.search(".*Unpickler.*|.+", str(error))
        why = line[0].strip() if line else "empty"
        raise UserError(f"{path} cannot be loaded as a checkpoint ({why}); "
                        f"name a last.pt or backbone.pt by its path") from None
    if refused := [name for name in stand_ins if not re.fullmatch(HARMLESS, name)]:
        parts = checkpoint if isinstance(checkpoint, dict) else {}
        keys = [key for key in parts if any(name in repr(parts[key]) for name in refused)]
        strip = "".join(f"del c[{key!r}]; " for key in keys) or "c = c.state_dict(); "
        raise UserError(f"{path} holds {', '.join(refused)} under {keys or 'no key'}, which is not "
                        f"read. If you trust it, strip that: python -c \"import torch; c = torch."
                        f"load('{path}', weights_only=False); {strip}torch.save(c, 'new.pth')\"")
    return checkpoint


def read(path, stand_ins):
    """Fills stand_ins, {name: class}, with every object that PyTorch itself does not read."""
    try:
        with torch.serialization.safe_globals(list(stand_ins.values())):
            return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        name = re.search(r"GLOBAL (\S+) was not", str(error))
        name = name and (name[1] if "." in name[1] else f"builtins.{name[1]}")
        if not name or name in stand_ins:
            raise
        module, _, last = name.rpartition(".")
        stand_ins[name] = type(last, (StandIn,), {"__module__": module})
    return read(path, stand_ins)


def load_backbone(path, arch=None, heads=None, branch=None, mean_std=None):
    """The backbone of a checkpoint; prints what was found. UserError where nothing fits.

    Args:
        path: a last.pt or backbone.pt of a training run, or another's checkpoint.
        arch, heads, mean_std: None: what the checkpoint says, or what its names and shapes fit.
        branch: part of the prefix to take, where there are several backbones: "student".
    Returns:
        backbone, D, settings: "arch", "heads" (None: a ResNet), "mean" and "std" (three numbers
        each), "mean_std" (their name in MEAN_STD), and those of a training run of ours.
    """
    checkpoint, beside = load_checkpoint(path), Path(path).with_name("args.json")
    tensors, meta = dict(flatten(checkpoint)), checkpoint if isinstance(checkpoint, dict) else {}
    bare = Path(path).name == "backbone.pt"        # without settings in itself
    ours = bare or any("query.backbone." in key for key in tensors)
    args = read_settings(beside) if bare and beside.exists() else ours and meta.get("args") or {}
    prefix, layout, notes = find(path, tensors, branch)
    state = convert(tensors, prefix, layout)
    is_vit, lightning = "conv_proj.weight" in state, "pytorch-lightning_version" in meta
    known = SIZES if is_vit else RESNETS
    theirs = args.get("arch") or next((x for x in known if not misfits(state, x)), None)
    arch = arch or theirs or min(known, key=lambda name: len(misfits(state, name)))
    if problems := misfits(state, arch):
        raise UserError(f"{path} is a checkpoint of another architecture: {problems[0]} {arch}; "
                        f"it was made with {theirs or 'an unknown architecture'} (--arch); its "
                        f"first tensor is {next(iter(tensors), 'missing')}")
    heads = heads or (usual_heads(state, arch, prefix, layout) if is_vit else None)
    if heads and (not is_vit or SIZES[arch][0] % heads):
        raise UserError(f"{path}: --heads {heads} does not fit the architecture {arch}")
    backbone, dim = build(state, arch, heads)
    backbone.load_state_dict(state, strict=False)       # num_batches_tracked may be missing
    release = layout == "mmpretrain" or prefix == "state_dict.backbone." and not lightning
    mean, std = (MEAN_STD[mean_std] if mean_std else own_mean_std(path, meta)
                 or MEAN_STD["clip" if ours or release else "imagenet"])
    name = next((name for name in MEAN_STD if MEAN_STD[name] == (mean, std)), "its own")
    notes.append(f"mean and std: {name} (--mean-std)")
    stem = state.get("conv1.weight", torch.empty(0)).shape[2:]
    if lightning and "state_dict.classifier.weight" in tensors and stem == (3, 3):
        backbone.conv1.padding = (2, 2)
        notes.append("first convolution padded by 2, as solo-learn's for CIFAR")
    with_heads = f" with {heads} heads (--heads)" if heads else ""
    say(f"{path}: {arch}{with_heads} under '{prefix}'; {'; '.join(notes)}")
    settings = {"arch": arch, "heads": heads, "mean": mean, "std": std, "mean_std": name}
    return backbone, dim, args | settings


def flatten(value, name="", depth=6):
    """Yields (dotted name, tensor) of nested dicts."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key), depth - 1)


def find(path, tensors, branch):
    """Prefix and layout of the backbone to take, and a list of notes on the choice."""
    found = {key.removesuffix(anchor): layout for key in tensors
             for anchor, layout in ANCHORS.items() if f".{key}".endswith(f".{anchor}")}
    prefix = next((p for p in NO_ANCHOR if any(k.startswith(p) for k in tensors)), "")
    found = found or {prefix: "torchvision"}
    words = {p: {*re.split(r"[._]", p), *p.split("."), p.strip(".")} for p in found}
    fits = [p for p in found if branch is None or branch.strip(".") in words[p]]
    if not fits:
        raise UserError(f"{path} has no branch {branch}: --branch is a part of one of {[*found]}")
    prefix = min(fits, key=lambda p: (max(ROLES.get(word, 0) for word in words[p]), len(p)))
    others = ", ".join(f"'{p}'" for p in found if p != prefix)
    return prefix, found[prefix], [f"also there: {others} (--branch)"] if others else []


def convert(tensors, prefix, layout):
    """A backbone's tensors under torchvision's names, which stack query, key and value."""
    state = {}
    for key in sorted(tensors, key=lambda key: not re.search(r"\.q(uery|_proj)\.", key)):
        name = key.removeprefix(prefix)
        if key.startswith(prefix) and not re.match(OTHER_PARTS, name):
            for pattern, replacement in POSITIONS if layout == "positions" else VIT_NAMES:
                name = re.sub(pattern, replacement, name)
            state.setdefault(name, []).append(tensors[key])
    return {name: torch.cat(stack) if stack[1:] else stack[0] for name, stack in state.items()}


def usual_heads(state, arch, prefix, layout):
    """A ViT-S has 6 heads in timm, DINO, DeiT and MAE, 12 in moco-v3, the release and here."""
    positions = state["encoder.pos_embedding"][0]
    # moco-v3's fixed positions: none of the class token, then the row in the first half.
    fixed = not (positions[:1].any() or positions[2:3, :positions.shape[1] // 4].any())
    six = layout in ("timm", "transformers") and not re.search("(base|momentum)_encoder", prefix)
    return 6 if arch == "vit_small" and six and not fixed else SIZES[arch][2]


def own_mean_std(path, meta):
    """Mean and std in mmengine's configuration inside the file or the hub's beside it, or None."""
    text = str(meta.get("meta", "")).replace("\\n", " ")
    if Path(path).name in ("model.safetensors", "pytorch_model.bin"):
        for file in Path(path).parent.glob("*config.json"):
            text += file.read_text(errors="replace")
    found = [re.search(name + 3 * r"\W+(\d+\.?\d*)", text) for name in ("mean", "std")]
    if None not in found:
        mean, std = ([float(x) for x in match.groups()] for match in found)
        scale = 255 if max(mean) > 1 else 1
        return tuple(tuple(round(x / scale, 8) for x in numbers) for numbers in (mean, std))


def build(state, arch, heads=None):
    """An untrained network for pictures of the size that the tensors show, and D."""
    def kernel(name, default):
        return state[name].shape[-1] if name in state and state[name].ndim == 4 else default
    if arch not in SIZES:
        return make_backbone(arch, 32 if kernel("conv1.weight", 7) == 3 else 224)
    (width, layers, usual), patch = SIZES[arch], kernel("conv_proj.weight", 16)
    numbers = state["encoder.pos_embedding"].numel() if "encoder.pos_embedding" in state else 0
    side = int(max(numbers // width - 1, 1) ** 0.5) * patch
    return vision_transformer(width, layers, heads or usual, patch, side), width


def misfits(state, arch):
    """The tensors that do not fit the architecture, in words."""
    with torch.device("meta"):              # shapes without memory
        expected = build(state, arch)[0].state_dict()
    wanted, found = ({key: tuple(x.shape) for key, x in tensors.items() if not key.endswith(
        "num_batches_tracked")} for tensors in (expected, state))
    return [f"it has no {key}, which is in" if key not in found else f"its {key} is not in"
            if key not in wanted else f"its {key} is {found[key]}, not {wanted[key]} as in"
            for key in wanted | found if found.get(key) != wanted.get(key)]
