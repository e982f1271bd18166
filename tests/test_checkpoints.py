"""support/checkpoints.py: other people's layouts give the features that their own networks give,
and what cannot be read is refused in one line.

The layouts are written by hand, as the origin's code saves them; the weights are random.
"""
import argparse
import json
import re
import sys
import types
from collections import OrderedDict, defaultdict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from support.checkpoints import MEAN_STD, load_backbone, load_checkpoint
from support.networks import make_backbone
from support.world import UserError

timm = pytest.importorskip("timm")
SIZE = 32                                              # two by two patches of 16 pixels
LIGHTNING = {"pytorch-lightning_version": "2.1", "epoch": 3, "hyper_parameters": {"lr": 0.1}}
CFG = "dict(\n    mean=[\n        123.675,\n        116.28,\n        103.53,\n    ],\n    std=[\n" \
      "        58.395,\n        57.12,\n        57.375,\n    ], to_rgb=True)"


def under(prefix, state):
    return {prefix + key: x for key, x in state.items()}


def linear(*names):
    return {f"{name}.{x}": torch.ones(2, 3) for name in names for x in ("weight", "bias")}


def renamed(state, *pairs):
    for old, new in zip(pairs[::2], pairs[1::2], strict=True):
        state = {re.sub(old, new, key): x for key, x in state.items()}
    return state


def sequential(state):
    layers = [pair for i in (1, 2, 3, 4) for pair in (rf"^layer{i}\.", f"{i + 3}.")]
    return renamed(state, r"^conv1\.", "0.", r"^bn1\.", "1.", *layers)


def mmpretrain(state):
    return renamed(state, "^blocks", "layers", r"\.norm(\d)", r".ln\1", "^norm", "ln1", "mlp.fc1",
                   "ffn.layers.0.0", "mlp.fc2", "ffn.layers.1", "embed.proj", "embed.projection")


def of_torchvision(state):
    return renamed(state, "cls_token", "class_token", "pos_embed", "encoder.pos_embedding",
                   "patch_embed.proj", "conv_proj", r"^blocks\.", "encoder.layers.encoder_layer_",
                   "^norm", "encoder.ln", r"\.norm(\d)", r".ln_\1", r"attn\.qkv\.",
                   "self_attention.in_proj_", "attn.proj", "self_attention.out_proj", "mlp.fc1",
                   "mlp.0", "mlp.fc2", "mlp.3")


def transformers(state):
    """Query, key and value apart, in the alphabet's order, as safetensors lists them."""
    state = renamed(state, "^blocks", "encoder.layer", "^(cls|patch|pos)", r"embeddings.\1",
                    "patch_embed.proj", "patch_embeddings.projection", "pos_embed",
                    "position_embeddings", "norm1", "layernorm_before", "norm2", "layernorm_after",
                    "^norm", "layernorm", "attn.proj", "attention.output.dense", "mlp.fc1",
                    "intermediate.dense", "mlp.fc2", "output.dense")
    for key in [key for key in state if "attn.qkv" in key]:
        for part, x in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
            state[key.replace("attn.qkv", f"attention.attention.{part}")] = x.clone()
    return dict(sorted(state.items()))


def mmengine(state, **meta):
    """With what a run saves beside the weights: objects, and NumPy arrays in them."""
    buffer = sys.modules["mmengine.logging.history_buffer"].HistoryBuffer()
    buffer.history, buffer.current = np.arange(3.0), np.float64(2)
    hub = {"loss": buffer, "info": defaultdict(int, step=3), "get": getattr}
    return {"meta": meta, "state_dict": state | linear("neck.fc0"), "message_hub": hub}


# s: the branch that is evaluated; o: the other, all zeros; fc: the classifier's name.
LAYOUTS = {
    "torchvision": lambda s, o, fc: s | linear("fc"),
    "timm": lambda s, o, fc: s | linear(fc),
    "MoCo v2": lambda s, o, fc: {"arch": "resnet50", "state_dict": under(
        "module.encoder_q.", s | linear("fc.0")) | under("module.encoder_k.", o) | {
            "module.queue": torch.ones(128, 8)}, "optimizer": {"state": {0: {"m": torch.ones(2)}}}},
    "moco-v3": lambda s, o, fc: {"state_dict": under("module.momentum_encoder.", o) | under(
        "module.base_encoder.", s | linear(f"{fc}.0")) | linear("module.predictor.0")},
    "DINO": lambda s, o, fc: {
        "student": under("module.backbone.", o), "teacher": under("backbone.", s) | linear(
            "head.mlp.0"), "args": argparse.Namespace(), "dino_loss": {"center": torch.ones(1, 4)}},
    "SwAV": lambda s, o, fc: under("module.", s | linear("projection_head.0", "prototypes")),
    "SimSiam": lambda s, o, fc: {"state_dict": under("module.encoder.", s | linear("fc.0"))},
    "BYOL": lambda s, o, fc: under("net.", s) | under("online_encoder.net.", s) | under(
        "target_encoder.net.", o) | linear("online_predictor.net.0"),
    "lightly": lambda s, o, fc: LIGHTNING | {"state_dict": under("backbone.", sequential(
        s)) | under("backbone_momentum.", sequential(o)) | linear("projection_head.layers.0")},
    "lightly ViT": lambda s, o, fc: LIGHTNING | {"state_dict": under(
        "backbone.vit.", s) | under("student_backbone.vit.", o)},
    "solo-learn": lambda s, o, fc: LIGHTNING | {"state_dict": under(
        "momentum_backbone.", o) | under("backbone.", s) | linear("classifier")},
    "Lightning": lambda s, o, fc: LIGHTNING | {"state_dict": under("model._orig_mod.", s)},
    "VICReg": lambda s, o, fc: {"model": under("module.backbone.", s) | linear("projector.0")},
    "DeiT": lambda s, o, fc: {"model": s | linear(fc)},
    "MAE": lambda s, o, fc: {"model": s | linear("decoder_embed") | {
        "mask_token": torch.ones(1, 1, 384), "decoder_pos_embed": torch.ones(1, 5, 8)}},
    "moco-v3 for DeiT": lambda s, o, fc: {"model": s},                  # with fixed positions
    "release": lambda s, o, fc: mmengine(
        under("backbone.", s) | under("momentum_encoder.module.0.", o)),
    "release ViT": lambda s, o, fc: {"meta": {}, "state_dict": under("backbone.", mmpretrain(s))},
    "mmpretrain": lambda s, o, fc: mmengine(under("backbone.", mmpretrain(s)), cfg=CFG),
    "torchvision ViT": lambda s, o, fc: of_torchvision(s) | linear("heads.head"),
    "hub": lambda s, o, fc: s | linear(fc),                             # with a config.json
    "transformers": lambda s, o, fc: transformers(s) | linear("pooler.dense")}
ORIGIN = {"release": "clip", "release ViT": "clip", "hub": "half"}      # the others: imagenet
TWO = {"MoCo v2", "moco-v3", "DINO", "BYOL", "lightly", "lightly ViT", "solo-learn", "release"}
RESNETS = ("torchvision", "timm", "MoCo v2", "moco-v3", "DINO", "SwAV", "SimSiam", "BYOL",
           "lightly", "solo-learn", "Lightning", "VICReg", "release")
VITS = {"timm": 6, "moco-v3": 12, "DINO": 6, "lightly ViT": 6, "solo-learn": 6, "Lightning": 6,
        "DeiT": 6, "MAE": 6, "moco-v3 for DeiT": 12, "release ViT": 12, "mmpretrain": 12,
        "torchvision ViT": 12, "hub": 6, "transformers": 6}


@pytest.fixture(autouse=True)
def module_of_mmengine(monkeypatch):
    name = "mmengine.logging.history_buffer"           # to write files with
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = type("HistoryBuffer", (), {"__module__": name})


@pytest.fixture(scope="module")
def networks():
    """A ResNet-50, a ViT-S with 6 and with 12 heads, and one with moco-v3's fixed positions, of
    random weights that float16 holds: biases, statistics and positions, too."""
    def vit(heads):
        return timm.models.VisionTransformer(SIZE, embed_dim=384, num_heads=heads, num_classes=0)
    made = {"resnet": torchvision.models.resnet50(), 6: vit(6), 12: vit(12), "fixed": vit(12)}
    made["resnet"].fc = torch.nn.Identity()
    for network in made.values():
        torch.manual_seed(0)
        for key, x in network.eval().state_dict().items():
            if x.is_floating_point():
                x.normal_(std=0.1 if x.ndim < 2 or len(x) == 1 else 1.5 * x[0].numel() ** -0.5)
                x.copy_((x.abs() + 0.8 if "var" in key or "norm" in key else x).half())
    frequency = 10_000.0 ** -(torch.arange(96) / 96)   # each half: sine and cosine
    row, column = ((i * frequency[None]) for i in (torch.tensor([[0], [0], [1], [1]]),
                                                   torch.tensor([[0], [1], [0], [1]])))
    fixed = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1).half()
    made["fixed"].pos_embed.data[0] = torch.cat([torch.zeros(1, 384), fixed])
    return made


def blank(network):
    """Zeros that take no space in a file."""
    return {key: torch.zeros((), dtype=x.dtype).expand(x.shape)
            for key, x in network.state_dict().items()}


def write(name, network, path, fc):
    state = {key: x.half() if x.is_floating_point() else x
             for key, x in network.state_dict().items()}
    content = LAYOUTS[name](state, blank(network), fc)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def features(backbone, mean, std):
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    with torch.no_grad():
        return backbone.eval()((x - mean) / std)


@pytest.mark.parametrize("name, heads", [*((name, None) for name in RESNETS), *VITS.items()])
def test_the_features_are_the_origins(name, heads, networks, tmp_path, capsys):
    safe = name in ("timm", "hub", "transformers")
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}, indent=1))
    network = networks["fixed" if "for DeiT" in name else heads or "resnet"]
    file = "model.safetensors" if name == "hub" else "x.safetensors" if safe else "x.pth"
    path = write(name, network, tmp_path / file, "head" if heads else "fc")
    backbone, dim, settings = load_backbone(path)
    origin = ORIGIN.get(name, "imagenet")
    ours = features(backbone, settings["mean"], settings["std"])
    theirs = features(network, *MEAN_STD[origin])
    print(f"largest difference {(ours - theirs).abs().max():.1e}, std {ours.std():.2f}")
    assert ours.shape == (2, dim) and ours.std(0).max() > 0.01
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)
    assert (settings["mean_std"], settings["heads"]) == (origin, heads)
    said = capsys.readouterr().out.splitlines()[0]
    assert settings["arch"] in said and origin in said and f"{heads or 'no'} heads" in said
    assert ("also there" in said) == (name in TWO)
