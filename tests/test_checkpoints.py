"""support/checkpoints.py: other people's layouts give the features that their own networks give,
and what cannot be read is refused in one line.

The layouts are written here by hand, from what the origin's code saves; weights are random.
"""
import argparse
import json
import pickle
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


def under(prefix, state):
    return {prefix + key: x for key, x in state.items()}


def renamed(state, *pairs):
    for old, new in pairs:
        state = {re.sub(old, new, key): x for key, x in state.items()}
    return state


def history():
    """What mmengine saves beside the weights: objects with NumPy arrays in them."""
    buffer = sys.modules["mmengine.logging.history_buffer"].HistoryBuffer()
    buffer.history, buffer.current = np.arange(3.0), np.float64(2)
    return {"log_scalars": {"loss": buffer}, "info": defaultdict(int, step=3), "get": getattr}


@pytest.fixture(autouse=True)
def mmengine(monkeypatch):
    """A module of that name to write files with."""
    name = "mmengine.logging.history_buffer"
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = type("HistoryBuffer", (), {"__module__": name})


def randomised(network, seed):
    """Random weights that float16 holds: biases, statistics and positions, too. Small files."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for key, x in network.state_dict().items():
            if x.is_floating_point():
                scale = 0.1 if x.ndim < 2 or "pos" in key or "token" in key else (
                    1.5 * x[0].numel() ** -0.5)
                noise = torch.randn_like(x) * scale
                x.copy_((noise.abs() + 0.8 if "var" in key else noise + (
                    x.ndim == 1 and key.endswith("weight"))).half())
    return network.eval()


def features(backbone, mean, std):
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    with torch.no_grad():
        return backbone((x - mean) / std)


# --------------------------------------------------------------------------------------- ResNet-50

def linear(name, rows=2):
    return {f"{name}.weight": torch.ones(rows, 3), f"{name}.bias": torch.ones(rows)}


def sequential(state):
    return renamed(state, (r"^conv1\.", "0."), (r"^bn1\.", "1."), (r"^layer1\.", "4."),
                   (r"^layer2\.", "5."), (r"^layer3\.", "6."), (r"^layer4\.", "7."))


LIGHTNING = {"pytorch-lightning_version": "2.1", "epoch": 3, "hyper_parameters": {"lr": 0.1}}
# s: the branch that is evaluated; o: the other one, tensors of zeros. Origin: layout, mean and std.
RESNETS = {
    "torchvision": (lambda s, o: s | linear("fc"), "imagenet"),
    "MoCo v2": (lambda s, o: {"arch": "resnet50", "state_dict": under("module.encoder_q.", s | linear(
        "fc.0")) | under("module.encoder_k.", o) | {"module.queue": torch.ones(128, 8)},
        "optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}}}, "imagenet"),
    "moco-v3": (lambda s, o: {"state_dict": under("module.momentum_encoder.", o) | under(
        "module.base_encoder.", s | linear("fc.0")) | linear("module.predictor.0")}, "imagenet"),
    "DINO": (lambda s, o: {"student": under("module.backbone.", o), "teacher": under(
        "backbone.", s) | linear("head.mlp.0"), "args": argparse.Namespace(arch="resnet50"),
        "dino_loss": {"center": torch.ones(1, 4)}}, "imagenet"),
    "SwAV": (lambda s, o: under("module.", s | linear("projection_head.0") | linear(
        "prototypes")), "imagenet"),
    "SimSiam": (lambda s, o: {"state_dict": under("module.encoder.", s | linear("fc.0")) | linear(
        "module.predictor.0")}, "imagenet"),
    "BYOL (byol-pytorch)": (lambda s, o: under("net.", s) | under("online_encoder.net.", s) | under(
        "target_encoder.net.", o) | linear("online_predictor.0"), "imagenet"),
    "lightly": (lambda s, o: LIGHTNING | {"state_dict": under("backbone.", sequential(s)) | under(
        "backbone_momentum.", sequential(o)) | linear("projection_head.layers.0")}, "imagenet"),
    "solo-learn": (lambda s, o: LIGHTNING | {"state_dict": under("momentum_backbone.", o) | under(
        "backbone.", s) | linear("classifier")}, "imagenet"),
    "compiled in Lightning": (lambda s, o: LIGHTNING | {"state_dict": under(
        "model._orig_mod.", s)}, "imagenet"),
    "VICReg": (lambda s, o: {"epoch": 1, "model": under("module.backbone.", s) | linear(
        "module.projector.0")}, "imagenet"),
    "mmengine, the release": (lambda s, o: {"meta": {"epoch": 200}, "state_dict": under(
        "backbone.", s) | under("momentum_encoder.module.0.", o) | linear("neck.fc0"),
        "message_hub": history()}, "clip"),
    "timm": (lambda s, o: s | linear("fc"), "imagenet")}


@pytest.fixture(scope="module")
def resnet():
    network = randomised(torchvision.models.resnet50(), 0)
    network.fc = torch.nn.Identity()
    return network


def saved(layout, network, path):
    """Writes a checkpoint in float16, where the other branch has zeros of one stored number."""
    state = OrderedDict((key, x.half() if x.is_floating_point() else x)
                        for key, x in network.state_dict().items() if not key.startswith("fc"))
    other = {key: torch.zeros((), dtype=x.dtype).expand(x.shape) for key, x in state.items()}
    content = layout(dict(state), other)
    save_file(content, path) if path.suffix == ".safetensors" else torch.save(content, path)
    return path


def compare(path, network, origin, capsys, heads=None):
    backbone, dim, settings = load_backbone(path)
    ours = features(backbone.eval(), settings["mean"], settings["std"])
    theirs = features(network, *MEAN_STD[origin])
    difference = (ours - theirs).abs().max().item()
    assert ours.std(0).max() > 0.01 and ours.shape == (2, dim) and difference < 1e-4
    assert settings["mean_std"] == origin and settings["heads"] == heads
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and origin in said and settings["arch"] in said
    return difference, said


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet50_of_each_origin(name, resnet, tmp_path, capsys):
    layout, origin = RESNETS[name]
    path = saved(layout, resnet, tmp_path / ("x.safetensors" if name == "timm" else "x.pth"))
    _, said = compare(path, resnet, origin, capsys)
    assert ("also there" in said) == (name in (
        "MoCo v2", "moco-v3", "DINO", "BYOL (byol-pytorch)", "lightly", "solo-learn",
        "mmengine, the release"))


# ------------------------------------------------------------------------------------------- ViT-S

def mmpretrain(state):
    return renamed(state, ("^blocks", "layers"), (r"\.norm(\d)", r".ln\1"), ("^norm", "ln1"), (
        "mlp.fc1", "ffn.layers.0.0"), ("mlp.fc2", "ffn.layers.1"), ("embed.proj", "embed.projection"))


def of_torchvision(state):
    return renamed(state, ("cls_token", "class_token"), ("pos_embed", "encoder.pos_embedding"), (
        "patch_embed.proj", "conv_proj"), (r"^blocks\.", "encoder.layers.encoder_layer_"), (
        "^norm", "encoder.ln"), (r"\.norm(\d)", r".ln_\1"), (r"attn\.qkv\.", "self_attention.in_proj_"),
        ("attn.proj", "self_attention.out_proj"), ("mlp.fc1", "mlp.0"), ("mlp.fc2", "mlp.3"))


def transformers(state):
    """Query, key and value apart, in the alphabet's order, as safetensors lists them."""
    state = renamed(state, ("^blocks", "encoder.layer"), ("^(cls|patch|pos)", r"embeddings.\1"), (
        "patch_embed.proj", "patch_embeddings.projection"), ("pos_embed", "position_embeddings"), (
        "norm1", "layernorm_before"), ("norm2", "layernorm_after"), ("^norm", "layernorm"), (
        "attn.proj", "attention.output.dense"), ("mlp.fc1", "intermediate.dense"), (
        "mlp.fc2", "output.dense"))
    for key in [key for key in state if "attn.qkv" in key]:
        for part, x in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
            state[key.replace("attn.qkv", f"attention.attention.{part}")] = x.clone()
    return dict(sorted(state.items()))


def decoder():
    return linear("decoder_embed") | {"mask_token": torch.ones(1, 1, 384),
                                      "decoder_pos_embed": torch.ones(1, 5, 8)}


CFG = "data_preprocessor = dict(\n    mean=[\n        123.675,\n        116.28,\n        103.53,\n" \
      "    ],\n    std=[58.395, 57.12, 57.375], to_rgb=True)"
VITS = {                                               # layout, heads, mean and std
    "timm": (lambda s, o: s | linear("head"), 6, "imagenet"),
    "timm from the hub": (lambda s, o: s | linear("head"), 6, "half"),
    "DINO": (lambda s, o: {"student": under("module.backbone.", o), "teacher": under(
        "backbone.", s) | linear("head.mlp.0"), "args": argparse.Namespace()}, 6, "imagenet"),
    "DeiT": (lambda s, o: {"model": s | linear("head")}, 6, "imagenet"),
    "MAE": (lambda s, o: {"model": s | decoder()}, 6, "imagenet"),
    "moco-v3": (lambda s, o: {"state_dict": under("module.momentum_encoder.", o) | under(
        "module.base_encoder.", s | linear("head.0")) | linear("module.predictor.0")}, 12,
        "imagenet"),
    "moco-v3 for DeiT": (lambda s, o: {"model": s}, 12, "imagenet"),
    "the release": (lambda s, o: {"meta": {}, "state_dict": under("backbone.", mmpretrain(
        s))}, 12, "clip"),
    "mmpretrain": (lambda s, o: {"meta": {"cfg": CFG}, "state_dict": under("backbone.", mmpretrain(
        s)) | linear("head.layers.head"), "message_hub": history()}, 12, "imagenet"),
    "torchvision": (lambda s, o: of_torchvision(s) | linear("heads.head"), 12, "imagenet"),
    "solo-learn": (lambda s, o: LIGHTNING | {"state_dict": under("momentum_backbone.", o) | under(
        "backbone.", s) | linear("classifier")}, 6, "imagenet"),
    "lightly": (lambda s, o: LIGHTNING | {"state_dict": under("backbone.vit.", s) | under(
        "student_backbone.vit.", o)}, 6, "imagenet"),
    "torch.compile": (lambda s, o: under("_orig_mod.", s), 6, "imagenet"),
    "transformers": (lambda s, o: transformers(s) | linear("pooler.dense"), 6, "imagenet")}


@pytest.fixture(scope="module")
def vits():
    """The same weights with 6 and with 12 heads, and with moco-v3's fixed positions (key "fixed").
    These give row and column in the opposite order of support/networks.py."""
    networks = {heads: randomised(timm.models.VisionTransformer(
        img_size=SIZE, embed_dim=384, num_heads=min(heads, 12), num_classes=0), 1)
        for heads in (6, 12, 13)}
    frequency = 10_000.0 ** -(np.arange(96) / 96)
    rows = [np.concatenate([f(x * frequency) for x in (row, column) for f in (np.sin, np.cos)])
            for row in (0, 1) for column in (0, 1)]
    fixed = torch.from_numpy(np.stack([np.zeros(384), *rows])).half()
    networks[13].pos_embed.data.copy_(fixed)
    return networks


@pytest.mark.parametrize("name", VITS)
def test_a_vit_of_each_origin(name, vits, tmp_path, capsys):
    layout, heads, origin = VITS[name]
    file = "model.safetensors" if name in ("transformers", "timm from the hub") else "x.pth"
    if origin == "half":
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": {
            "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}}, indent=2))
    network = vits[13 if name == "moco-v3 for DeiT" else heads]
    _, said = compare(saved(layout, network, tmp_path / file), network, origin, capsys, heads)
    assert f"{heads} heads" in said and "vit_small" in said
