"""Other people's weights, and ours: the backbone of a checkpoint of any origin.

A checkpoint is a nest of dicts; its tensors get dotted names. A backbone is found by its anchor, a
tensor that every network of a layout has: what stands before the anchor is the backbone's prefix,
such as state_dict.module.encoder_q.
"""
import functools
import re
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import NamedTuple

import torch

from support.augment import CLIP_MEAN, CLIP_STD
from support.command_line import UserError, say
from support.files import read_settings, refuse_placeholder
from support.networks import VITS, make_backbone, vision_transformer

MEAN_STD = {
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (CLIP_MEAN, CLIP_STD),
    "half": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
}
RESNETS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152", "wide_resnet50_2",
           "resnext50_32x4d")
SIZES = VITS | {                                   # width, layers, heads
    "vit_tiny": (192, 12, 3),
    "vit_large": (1024, 24, 16),
    "vit_huge": (1280, 32, 16),
}
FIRST_STAGES = (2, 3, 4)      # where layer1 may stand in a Sequential: torchvision's at 4
ANCHORS = {                                        # anchor: layout
    "layer1.0.conv1.weight": "torchvision",
    **{f"{place}.0.conv1.weight": "positions" for place in FIRST_STAGES},
    "conv_proj.weight": "torchvision",
    "patch_embed.proj.weight": "timm",
    "patch_embed.projection.weight": "mmpretrain",
    "embeddings.patch_embeddings.projection.weight": "transformers",
}
# Prefixes to try where there is no anchor (a small network of ours).
NO_ANCHOR = ("model.query.backbone.", "state_dict.backbone.", "backbone.", "state_dict.", "")
VIT_NAMES = [                                      # of all layouts, applied in turn
    (r"^embeddings\.", ""),
    (r"^cls_token$", "class_token"),
    (r"^(pos_embed|position_embeddings)$", "encoder.pos_embedding"),
    (r"^(patch_embed\.proj(ection)?|patch_embeddings\.projection)\.", "conv_proj."),
    (r"^(blocks|layers|encoder\.layer)\.(\d+)\.", r"encoder.layers.encoder_layer_\2."),
    (r"^(norm|ln1|layernorm)\.", "encoder.ln."),
    (r"\.(norm1|ln1|layernorm_before)\.", ".ln_1."),
    (r"\.(norm2|ln2|layernorm_after)\.", ".ln_2."),
    (r"\.(attn\.qkv|attention\.(attention\.\w+|[qkv]_proj))\.", ".self_attention.in_proj_"),
    (r"\.(attn\.proj|attention\.(output\.dense|o_proj))\.", ".self_attention.out_proj."),
    (r"\.(mlp\.fc1|mlp\.linear_1|ffn\.layers\.0\.0|intermediate\.dense)\.", ".mlp.0."),
    (r"\.(mlp\.fc2|mlp\.linear_2|ffn\.layers\.1|output\.dense)\.", ".mlp.3."),
]
# Heads and decoders, which may stand under a backbone's prefix.
OTHER_PARTS = r"((pro|pred|queue|decoder|mask|head_)\w*|fc|heads?|classifier|pooler)(\.|$)"
# What torch.compile, FSDP and activation checkpointing add to names, and DataParallel to a block's.
WRAPPERS = (r"\b(_orig_mod|_fsdp_wrapped_module|_fpw_module|_checkpoint_wrapped_module)\.|"
            r"(?<=\d\.)module\.")
# Words in a prefix: of several backbones the lowest is taken, the one that its authors evaluate.
ROLES = {"teacher": 1, "student": 2, "k": 3, "key": 3, "momentum": 3, "target": 3, "ema": 3}
HARMLESS = (                  # objects that mmengine, Lightning, DINO and timm save beside weights
    r"(mmengine|mmcv|numpy|omegaconf|pytorch_lightning|lightning\w*|pathlib)\..+|typing\.Any|"
    r"(argparse\.Name|collections\.default)\w+|builtins\.(getattr|dict|list|bool|int|float|str)")


# ------------------------------------------------------------------------------- reading, safely
class StandIn:
    """Takes the place of an object of another program: none of its code runs. Mappings, such as
    configurations, become dicts: PyTorch fills no others."""
    is_dict = False

    def __new__(cls, *args):
        return OrderedDict() if cls.is_dict else object.__new__(cls)

    def __setstate__(self, state):
        self.is_network = isinstance(state, dict) and "_parameters" in state


def load_checkpoint(path):
    """What torch.save or safetensors wrote to path, on the CPU. It never runs code of the file.
    Raises UserError where that is missing, damaged or holds objects that are not HARMLESS."""
    try:
        refuse_placeholder(path)
        with open(path, "rb") as file:
            begin = file.read(9)
        if begin[8:] == b"{":                      # after eight bytes, the length of the names
            from safetensors.torch import load_file
            return load_file(path)
        check_archive(path, begin)
        checkpoint, foreign = read(path)
    except UserError:
        raise
    except Exception as error:      # OSError, UnpicklingError, RuntimeError, EOFError, KeyError
        raise UserError(f"{path} cannot be loaded as a checkpoint ({reason_of(error)}); "
                        f"name a last.pt or backbone.pt by its path") from None
    refused = [name for name, kind in foreign.items()
               if not (re.fullmatch(HARMLESS, name) or kind.is_dict)]
    if refused:
        raise UserError(how_to_strip(path, checkpoint, refused))
    return checkpoint


def check_archive(path, begin):
    """ValueError where a file that begins so is packed in another way than torch.save does it, or
    damaged."""
    if begin[:2] == b"\x1f\x8b":
        raise ValueError("it is compressed: unpack it with gunzip")
    if begin[:1] == b"{":
        raise ValueError("it is text, such as the index of a model in several files")
    if begin[:2] != b"PK":                         # torch.save's old format, or nothing of it
        return
    if not zipfile.is_zipfile(path):
        raise ValueError("its end is missing: download it again")
    archive = zipfile.ZipFile(path)
    names = archive.namelist()
    if any("/code/" in name for name in names):
        raise ValueError("it is TorchScript: keep its weights by torch.save(torch.jit.load(path)."
                         "state_dict(), 'new.pth')")
    if names and all(name.endswith(".npy") for name in names):
        raise ValueError("it is NumPy's archive of arrays, such as JAX's weights")
    if not any(name.endswith("/data.pkl") for name in names):
        raise ValueError("it is an archive of other files: unpack it")
    damaged = archive.testzip()                    # torch.load reads no checksums
    if damaged:
        raise ValueError(f"{damaged} in it is damaged")


def reason_of(error):
    """Why a file cannot be loaded, in short."""
    if isinstance(error, (OSError, ValueError)):   # the system's reasons and check_archive's
        return error
    foreign = re.search(".*GLOBAL.*", str(error))
    if foreign:
        return foreign[0].strip()
    if "deserializing header" in str(error):       # safetensors'
        return error
    unpickler = re.search(r"WeightsUnpickler error:\s*(\S.*)", str(error))
    if unpickler:
        return unpickler[1]
    return "torch.save did not write it, or it is damaged"


def read(path):
    """What torch.save wrote, and {name: class} of the objects that PyTorch itself does not read: in
    their places are stand-ins. Each try names one more."""
    stand_ins = {}
    while True:
        try:
            with torch.serialization.safe_globals(list(stand_ins.values())):
                return torch.load(path, map_location="cpu", weights_only=True), stand_ins
        except Exception as error:
            name = foreign_object(error)
            if name is None or name in stand_ins:
                raise
        module, _, last = name.rpartition(".")
        kind = {"__module__": module, "is_dict": bool(re.search("(dict|CfgNode)$", last, re.I))}
        stand_ins[name] = type(last, (StandIn,), kind)


def foreign_object(error):
    """The full name of the object that PyTorch refuses to read, None where it has another reason.
    """
    found = re.search(r"GLOBAL (\S+) was not", str(error))
    if not found:
        return None
    return found[1] if "." in found[1] else f"builtins.{found[1]}"


def how_to_strip(path, checkpoint, refused):
    """What the file holds that is not read, and the command that takes it out."""
    parts = checkpoint if isinstance(checkpoint, dict) else {}
    keys = []
    strip = ""
    for key, part in parts.items():
        if getattr(part, "is_network", False):
            keys.append(key)
            strip += f"c[{key!r}] = c[{key!r}].state_dict(); "
        elif any(name.removeprefix("builtins.") in repr(part) for name in refused):
            keys.append(key)
            strip += f"del c[{key!r}]; "
    strip = strip or "c = c.state_dict(); "
    quoted = str(path).replace("'", "\\'")
    return (f"{path} holds {', '.join(refused)} under {keys or 'no key'}, which is not read. If "
            f"you trust it, strip that where its program is installed: python -c \"import torch; "
            f"c = torch.load('{quoted}', weights_only=False); {strip}torch.save(c, 'new.pth')\"")


# ---------------------------------------------------------------------------------- the backbone
class Found(NamedTuple):
    """A backbone in a checkpoint."""
    path: str
    tensors: dict                                  # all of the checkpoint's, by dotted name
    meta: dict                                     # the checkpoint's outermost dict
    prefix: str                                    # of the backbone's tensors
    layout: str                                    # see ANCHORS
    state: dict                                    # the backbone's tensors, torchvision's names
    notes: list                                    # for the user

    @property
    def is_vit(self):
        return "conv_proj.weight" in self.state

    @property
    def is_ours(self):
        """Of a training run of this project? Its backbone.pt has no settings in itself."""
        bare = Path(self.path).name == "backbone.pt"
        return bare or any("query.backbone." in key for key in self.tensors)

    @property
    def is_lightning(self):
        return "pytorch-lightning_version" in self.meta

    @property
    def is_release(self):
        """Of GenView's authors?"""
        mmengine = self.prefix == "state_dict.backbone." and not self.is_lightning
        return self.layout == "mmpretrain" or mmengine


def load_backbone(path, arch=None, heads=None, branch=None, mean_std=None):
    """The backbone of a checkpoint; prints what was found. UserError where nothing fits.

    Args:
        path: a last.pt or backbone.pt of a training run, or another's checkpoint.
        arch, heads, mean_std: None: what the checkpoint says, or what its names and shapes fit.
        branch: part of the prefix to take, where there are several backbones: "student".
    Returns:
        backbone, D, settings: "arch", "heads" (None: a ResNet), "mean" and "std" (three numbers
        each), "mean_std" (their name in MEAN_STD), "image_size", that it was trained on or is
        usual for its layers, and those of a training run of ours.
    """
    found = find_backbone(path, load_checkpoint(path), branch)
    args = settings_of_run(found)
    arch = choose_arch(found, arch, args.get("arch"))
    heads = choose_heads(found, arch, heads)
    backbone, dim = build(found.state, arch, heads)
    check_kinds(found)
    backbone.load_state_dict(found.state, strict=False)       # num_batches_tracked may be missing
    for key, x in backbone.state_dict().items():
        if not x.isfinite().all():
            raise UserError(f"{path} holds numbers that are not finite, in {key}: its training "
                            f"diverged; take an earlier checkpoint")
    name, mean, std = choose_mean_std(found, mean_std)
    found.notes.append(f"mean and std: {name} (--mean-std)")
    if has_stem_of_solo_learn(found):
        backbone.conv1.padding = (2, 2)
        found.notes.append("first convolution padded by 2, as solo-learn's for CIFAR")
    with_heads = f" with {heads} heads (--heads)" if heads else ""
    say(f"{path}: {arch}{with_heads} under '{found.prefix}'; {'; '.join(found.notes)}")
    settings = {"arch": arch, "heads": heads, "mean": mean, "std": std, "mean_std": name}
    return backbone, dim, {"image_size": size_of(found.state, arch)[1]} | args | settings


def check_kinds(found):
    """UserError where a tensor does not hold plain real numbers, as after quantisation, or only a
    part of them, as FSDP's DTensor."""
    for key, x in found.state.items():
        plain = x.is_floating_point() and x.layout == torch.strided and not x.is_meta
        plain = plain and type(x) in (torch.Tensor, torch.nn.Parameter)
        if not plain and not key.endswith("num_batches_tracked"):
            kind = str(x.dtype).removeprefix("torch.")
            raise UserError(f"{found.path} holds {key} as {type(x).__name__} of {kind}, {x.layout} "
                            f"on {x.device}, which is no plain tensor of real numbers: save the "
                            f"full state dict, before it is quantised or converted")


def flatten(value, name="", depth=6):
    """Yields (dotted name, tensor) of nested dicts."""
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict) and depth:
        for key, inner in value.items():
            yield from flatten(inner, f"{name}.{key}" if name else str(key), depth - 1)


def find_backbone(path, checkpoint, branch):
    """Found, of the backbone that is meant: of several the one of the lowest role."""
    tensors = {re.sub(WRAPPERS, "", key): x for key, x in flatten(checkpoint)}
    layouts = {}                                   # {prefix: layout}
    for key in tensors:
        for anchor, layout in ANCHORS.items():
            if f".{key}".endswith(f".{anchor}"):
                layouts[key.removesuffix(anchor)] = layout
    if not layouts:
        layouts = {prefix_without_anchor(tensors): "torchvision"}
    meant = [prefix for prefix in layouts
             if branch is None or branch.strip(".") in words_of(prefix)]
    if not meant:
        raise UserError(f"{path} has no branch {branch}: --branch is a part of one of "
                        f"{list(layouts)}")
    prefix = min(meant, key=lambda prefix: (role_of(prefix), len(prefix)))
    layout = layouts[prefix]
    others = ", ".join(f"'{other}'" for other in layouts if other != prefix)
    notes = [f"also there: {others} (--branch)"] if others else []
    meta = checkpoint if isinstance(checkpoint, dict) else {}
    state = rename(tensors, prefix, layout)
    return Found(str(path), tensors, meta, prefix, layout, state, notes)


def prefix_without_anchor(tensors):
    for prefix in NO_ANCHOR:
        if any(key.startswith(prefix) for key in tensors):
            return prefix
    return ""


def words_of(prefix):
    """The words of a prefix, which --branch and ROLES are compared with."""
    return {*re.split(r"[._]", prefix), *prefix.split("."), prefix.strip(".")}


def role_of(prefix):
    return max(ROLES.get(word, 0) for word in words_of(prefix))


def rename(tensors, prefix, layout):
    """A backbone's tensors under torchvision's names. Query, key and value, which other layouts
    keep apart, get one name: they are stacked, in this order."""
    patterns = names_of_places(tensors, prefix) if layout == "positions" else VIT_NAMES
    keys = sorted(tensors, key=lambda key: not re.search(r"\.q(uery|_proj)\.", key))
    stacks = {}
    for key in keys:
        name = key.removeprefix(prefix)
        if not key.startswith(prefix):
            continue
        for pattern, replacement in patterns:
            name = re.sub(pattern, replacement, name)
        if re.match(OTHER_PARTS, name):
            continue
        stacks.setdefault(name, []).append(tensors[key])
    return {name: torch.cat(stack) if len(stack) > 1 else stack[0]
            for name, stack in stacks.items()}


def names_of_places(tensors, prefix):
    """The names of a ResNet's parts in a Sequential, [(pattern, name)]: lightly's has the stages at
    4 to 7, MoCo's for CIFAR, which has no max-pooling, at 3 to 6."""
    first = min(place for place in FIRST_STAGES if f"{prefix}{place}.0.conv1.weight" in tensors)
    stages = [(rf"^{first + i}\.", f"layer{i + 1}.") for i in range(4)]
    return [(r"^0\.", "conv1."), (r"^1\.", "bn1."), *stages, (r"^\d+\.", "fc.")]


# ------------------------------------------------------------------------------ its architecture
def settings_of_run(found):
    """The flags of a training run of ours, {} of other checkpoints."""
    beside = Path(found.path).with_name("args.json")
    if Path(found.path).name == "backbone.pt" and beside.exists():
        return read_settings(beside)
    args = found.meta.get("args") if found.is_ours else None
    return args if isinstance(args, dict) else {}


def choose_arch(found, given, of_run):
    """The architecture: as given, as the run says, or the first that all tensors fit."""
    candidates = SIZES if found.is_vit else RESNETS
    counts = {name: len(misfits(found.state, name)) for name in candidates}
    nearest = min(candidates, key=counts.get)
    theirs = of_run or (nearest if counts[nearest] == 0 else None)
    arch = given or theirs or nearest
    problems = misfits(found.state, arch)
    if problems:
        raise UserError(f"{found.path} is a checkpoint of another architecture: {problems[0]} "
                        f"{arch}; it was made with {theirs or 'an unknown architecture'} (--arch); "
                        f"its first tensor is {next(iter(found.tensors), 'missing')}")
    return arch


def choose_heads(found, arch, given):
    """The number of heads of a vision transformer, which no tensor tells; None: a ResNet."""
    heads = given
    if found.is_vit and not given:
        heads = usual_heads(found, arch)
    if heads and (not found.is_vit or SIZES[arch][0] % heads):
        raise UserError(f"{found.path}: --heads {heads} does not fit the architecture {arch}")
    return heads


def usual_heads(found, arch):
    """A ViT-S has 6 heads in timm, DINO, DeiT and MAE, 12 in moco-v3, also mmpretrain's and the
    release's, and here."""
    positions = found.state["encoder.pos_embedding"][0]
    # moco-v3's fixed positions: none of the class token, then the row in the first half.
    quarter = positions.shape[1] // 4
    fixed = not (positions[:1].any() or positions[2:3, :quarter].any())
    of_moco_v3 = fixed or re.search("(base|momentum)_encoder", found.prefix)
    if arch == "vit_small" and found.layout != "torchvision" and not of_moco_v3:
        return 6
    return SIZES[arch][2]


def choose_mean_std(found, given):
    """Name, mean and std of the pictures that the backbone was trained on: as given, as the file
    says, or usual for its origin."""
    if given:
        mean, std = MEAN_STD[given]
    else:
        usual = "clip" if found.is_ours or found.is_release else "imagenet"
        mean, std = own_mean_std(found) or MEAN_STD[usual]
    names = [name for name in MEAN_STD if MEAN_STD[name] == (mean, std)]
    return names[0] if names else "its own", mean, std


def own_mean_std(found):
    """Mean and std in mmengine's configuration inside the file or the hub's beside it, or None."""
    text = str(found.meta.get("meta", "")).replace("\\n", " ")
    path = Path(found.path)
    if path.name in ("model.safetensors", "pytorch_model.bin"):
        for file in path.parent.glob("*config.json"):
            text += file.read_text(errors="replace")
    numbers = {}
    for name in ("mean", "std"):
        match = re.search(name + 3 * r"\W+(\d+\.?\d*)", text)
        if not match:
            return None
        numbers[name] = [float(x) for x in match.groups()]
    scale = 255 if max(numbers["mean"]) > 1 else 1
    mean = tuple(round(x / scale, 8) for x in numbers["mean"])
    std = tuple(round(x / scale, 8) for x in numbers["std"])
    return mean, std


def has_stem_of_solo_learn(found):
    """solo-learn pads its first convolution for CIFAR by 2, which no tensor tells."""
    stem = found.state.get("conv1.weight", torch.empty(0)).shape[2:]
    head = "state_dict.classifier.weight" in found.tensors
    return found.is_lightning and head and stem == (3, 3)


def build(state, arch, heads=None):
    """An untrained network for pictures of the size that the tensors show, and D."""
    return network_of(arch, *size_of(state, arch), heads)


def network_of(arch, patch, side, heads=None):
    """An untrained network of an architecture, and D. patch: None: a ResNet."""
    if patch is None:
        return make_backbone(arch, side)
    width, layers, usual = SIZES[arch]
    return vision_transformer(width, layers, heads or usual, patch, side), width


@functools.cache
def shapes_of_arch(arch, patch, side):
    """{name: shape} of its tensors, without the memory for them."""
    with torch.device("meta"):
        network, _ = network_of(arch, patch, side)
    return shapes_of(network.state_dict())


def size_of(state, arch):
    """The side of a vision transformer's patches (None: a ResNet) and of the pictures in pixels, as
    the tensors show."""
    if arch not in SIZES:
        small = kernel_of(state, "conv1.weight", 7) == 3
        return None, 32 if small else 224
    patch = kernel_of(state, "conv_proj.weight", 16)
    numbers = state["encoder.pos_embedding"].numel() if "encoder.pos_embedding" in state else 0
    patches = max(numbers // SIZES[arch][0] - 1, 1)
    return patch, int(patches ** 0.5) * patch


def kernel_of(state, name, default):
    """The side of a convolution's kernel."""
    return state[name].shape[-1] if name in state and state[name].ndim == 4 else default


def misfits(state, arch):
    """The tensors that do not fit the architecture, in words."""
    wanted = shapes_of_arch(arch, *size_of(state, arch))
    found = shapes_of(state)
    problems = []
    for key in wanted | found:
        if key not in found:
            problems.append(f"it has no {key}, which is in")
        elif key not in wanted:
            problems.append(f"its {key} is not in")
        elif found[key] != wanted[key]:
            problems.append(f"its {key} is {found[key]}, not {wanted[key]} as in")
    return problems


def shapes_of(tensors):
    return {key: tuple(x.shape) for key, x in tensors.items()
            if not key.endswith("num_batches_tracked")}
