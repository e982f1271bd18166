"""support/checkpoints.py: other people's layouts give the features that their own networks give,
and what cannot be read is refused in one line.

The layouts are written by hand, as the origin's code saves them; the weights are random.
"""
import argparse
import json
import re
import sys
import types
from collections import defaultdict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file

from support.checkpoints import MEAN_STD, load_backbone, load_checkpoint
from support.networks import make_backbone, sine_positions
from support.world import UserError

timm = pytest.importorskip("timm")
SIZE = 32                                              # two by two patches of 16 pixels
CFG = "dict(mean=[\n  123.675,\n  116.28,\n  103.53,\n],\n std=[58.395, 57.12, 57.375])"


def under(prefix, state):
    return {prefix + key: x for key, x in state.items()}


def linear(*names):
    return {f"{name}.{x}": torch.ones(2, 3) for name in names for x in ("weight", "bias")}


def renamed(state, pairs):
    for old, new in (pair.split("=") for pair in pairs.split()):
        state = {re.sub(old, new, key): x for key, x in state.items()}
    return state


POSITIONS = r"^conv1=0 ^bn1=1 ^layer1=4 ^layer2=5 ^layer3=6 ^layer4=7"
MMPRETRAIN = (r"^blocks=layers \.norm(\d)=.ln\1 ^norm=ln1 mlp.fc1=ffn.layers.0.0 "
              r"mlp.fc2=ffn.layers.1 embed.proj=embed.projection")
TORCHVISION = (r"cls_token=class_token pos_embed=encoder.pos_embedding patch_embed.proj=conv_proj "
               r"^blocks\.=encoder.layers.encoder_layer_ ^norm=encoder.ln \.norm(\d)=.ln_\1 "
               r"attn\.qkv\.=self_attention.in_proj_ attn.proj=self_attention.out_proj "
               r"mlp.fc1=mlp.0 mlp.fc2=mlp.3")
TRANSFORMERS = (r"^blocks=encoder.layer ^(cls|patch|pos)=embeddings.\1 norm1=layernorm_before "
                r"patch_embed.proj=patch_embeddings.projection pos_embed=position_embeddings "
                r"norm2=layernorm_after ^norm=layernorm attn.proj=attention.output.dense "
                r"mlp.fc1=intermediate.dense mlp.fc2=output.dense")


def transformers(state):
    """Query, key and value apart, in the alphabet's order, as safetensors lists them."""
    state = renamed(state, TRANSFORMERS)
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


def layouts(s, o, fc):
    """{origin: file}. s: the branch that is evaluated; o: the other; fc: the classifier's name."""
    lightning = {"pytorch-lightning_version": "2.1", "epoch": 3, "hyper_parameters": {"lr": 0.1}}
    return {
        "torchvision": s | linear("fc"), "timm": s | linear(fc), "hub": s | linear(fc),
        "MoCo v2": {"arch": "resnet50", "optimizer": {"state": {0: {"m": torch.ones(2)}}},
                    "state_dict": under("module.encoder_q.", s | linear("fc.0")) | under(
                        "module.encoder_k.", o) | {"module.queue": torch.ones(128, 8)}},
        "moco-v3": {"state_dict": under("module.momentum_encoder.", o) | under(
            "module.base_encoder.", s | linear(f"{fc}.0")) | linear("module.predictor.0")},
        "DINO": {"student": under("module.backbone.", o), "args": argparse.Namespace(lr=1),
                 "teacher": under("backbone.", s) | linear("head.mlp.0")},
        "SwAV": under("module.", s | linear("projection_head.0", "prototypes")),
        "SimSiam": {"state_dict": under("module.encoder.", s | linear("fc.0"))},
        "BYOL": under("net.", s) | under("online_encoder.net.", s) | under(
            "target_encoder.net.", o) | linear("online_predictor.net.0"),
        "lightly": lightning | {"state_dict": under("backbone.", renamed(s, POSITIONS)) | under(
            "backbone_momentum.", renamed(o, POSITIONS)) | linear("projection_head.layers.0")},
        "lightly ViT": lightning | {"state_dict": under("backbone.vit.", s) | under(
            "student_backbone.vit.", o)},
        "solo-learn": lightning | {"state_dict": under("momentum_backbone.", o) | under(
            "backbone.", s) | linear("classifier")},
        "Lightning": lightning | {"state_dict": under("model._orig_mod.", s)},
        "VICReg": {"model": under("module.backbone.", s) | linear("module.projector.0")},
        "DeiT": {"model": s | linear(fc)}, "moco-v3 for DeiT": {"model": s},
        "MAE": {"model": s | linear("decoder_embed") | {
            "mask_token": torch.ones(1, 1, 384), "decoder_pos_embed": torch.ones(1, 5, 8)}},
        "release": mmengine(under("backbone.", s) | under("momentum_encoder.module.0.", o)),
        "release ViT": {"meta": {}, "state_dict": under("backbone.", renamed(s, MMPRETRAIN))},
        "mmpretrain": mmengine(under("backbone.", renamed(s, MMPRETRAIN)), cfg=CFG),
        "torchvision ViT": renamed(s, TORCHVISION) | linear("heads.head"),
        "transformers": transformers(s) | linear("pooler.dense")}


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
                scale = x.ndim == 1 and key.endswith(("weight", "var"))
                x.copy_((x.abs() + 0.9 if scale else x).half())
    fixed = sine_positions(384, 2)[:, [0, 1, 3, 2, 4]]           # moco-v3: row, then column
    made["fixed"].pos_embed.data.copy_(fixed.half())
    return made


def blank(network):
    """Zeros that take no space in a file."""
    return {key: torch.zeros((), dtype=x.dtype).expand(x.shape)
            for key, x in network.state_dict().items()}


def features(backbone, mean, std):
    x = torch.rand(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (mean, std))
    with torch.no_grad():
        return backbone.eval()((x - mean) / std)


@pytest.mark.parametrize("name, heads", [*((name, None) for name in RESNETS), *VITS.items()])
def test_the_features_are_the_origins(name, heads, networks, tmp_path, capsys):
    network = networks["fixed" if "for DeiT" in name else heads or "resnet"]
    state = {key: x.half() if x.is_floating_point() else x
             for key, x in network.state_dict().items()}
    content = layouts(state, blank(network), "head" if heads else "fc")[name]
    path = tmp_path / "model.safetensors"
    (tmp_path / "config.json").write_text(json.dumps({"mean": [0.5] * 3, "std": [0.5] * 3}))
    if name in ("timm", "hub", "transformers"):        # with the hub's name a config.json is read
        path = path.with_stem("model" if name == "hub" else "other")
        save_file(content, path)
    else:
        torch.save(content, path := path.with_suffix(".pth"))
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


# --------------------------------------------------------------------------- flags, other files

@pytest.fixture(scope="module")
def small():
    """Files that hold zeros alone: a ResNet-18 and a ViT-S."""
    vit = timm.models.VisionTransformer(SIZE, embed_dim=384, num_heads=6, num_classes=0)
    return blank(make_backbone("resnet18", 224)[0]), blank(vit)


def test_flags_decide_against_the_layout(small, tmp_path, capsys):
    resnet, vit = small
    two = {"student": {key: x + 1 for key, x in vit.items()}, "teacher": vit}
    torch.save(two, tmp_path / "vit.pth")
    for branch, value in ((None, 0), ("teacher", 0), ("student", 1)):
        backbone, _, settings = load_backbone(
            tmp_path / "vit.pth", heads=12, branch=branch, mean_std="half")
        assert (backbone.class_token == value).all() and settings["heads"] == 12
        assert backbone.encoder.layers[0].self_attention.num_heads == 12
        assert settings["std"] == (0.5, 0.5, 0.5) and "half" in capsys.readouterr().out
    ours = {"model": under("query.backbone.", resnet) | under("key.backbone.", resnet),
            "args": {"arch": "resnet18", "dataset": "imagenet"}}
    for name, content in (("last.pt", ours), ("backbone.pt", resnet)):
        torch.save(content, tmp_path / name)
        _, _, settings = load_backbone(tmp_path / name)
        assert settings["mean_std"] == "clip" and settings["mean"] == MEAN_STD["clip"][0]
        assert settings.get("dataset") == ("imagenet" if name == "last.pt" else None)


def test_solo_learns_stem_for_cifar_and_the_oldest_format(tmp_path):
    """Their padding of 2 is in no tensor. Files of PyTorch before 1.6 are no zip files."""
    state = blank(make_backbone("resnet18", 32)[0])
    content = layouts(state, {}, "fc")["solo-learn"] | {"args": argparse.Namespace(lr=1)}
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    assert load_backbone(tmp_path / "x.ckpt")[0].conv1.padding == (2, 2)


class Bomb:
    def __init__(self, path="hacked"):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


@pytest.mark.parametrize("content, flags, message", [
    (lambda r, v: linear("encoder.a"), {}, "no conv1.weight, .* first tensor in it is encoder.a"),
    (lambda r, v: linear("a"), {"arch": "vit_small"}, "no class_token, .* first tensor in it is a"),
    (lambda r, v: {}, {}, "no conv1.weight, which is in resnet18.* first tensor in it is missing"),
    (lambda r, v: layouts(r, r, "fc")["MoCo v2"], {"branch": "teacher"},
     r"no branch teacher.*encoder_q.*encoder_k"),
    (lambda r, v: r, {"heads": 6}, "--heads 6 does not fit .* resnet18"),
    (lambda r, v: v, {"heads": 5}, "--heads 5 does not fit .* vit_small"),
    (lambda r, v: v | linear("dist_token"), {}, "its dist_token.weight is not in vit_small"),
    (lambda r, v: v | {"pos_embed": torch.ones(3)}, {}, r"pos_embedding is \(3,\), not"),
    (lambda r, v: {"state_dict": r, "hook": [Bomb()]}, {}, r"\['hook'\].*del c\['hook'\]; torch"),
    (lambda r, v: torch.nn.ReLU(), {}, r"ReLU.* under no key.*c = c.state_dict\(\); torch.save")])
def test_refusals_are_one_line(content, flags, message, small, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(*small), "x.pth")
    with pytest.raises(UserError, match=f"^x.pth.*{message}") as error:
        load_backbone("x.pth", **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "hacked").exists()


def test_damaged_safetensors_are_refused(tmp_path):
    for content in (b"", b"\x08" + bytes(7) + b"{}      ", bytes(100)):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(UserError, match="x.safetensors"):
            load_checkpoint(tmp_path / "x.safetensors") and None
            load_backbone(tmp_path / "x.safetensors")
