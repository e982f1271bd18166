"""support/pretrained.py: other people's layouts give the features that their own networks give.
The layouts are written by hand, as the origin's code saves them; the weights are random."""
import argparse
import collections
import gzip
import os
import re
import sys
import types
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torchvision.transforms.functional import normalize

from support.command_line import UserError
from support.networks import make_backbone, sine_positions
from support.pretrained import MEAN_STD, SIZES, check_kinds, load_backbone, shapes_of_arch

timm, SIZE = pytest.importorskip("timm"), 32           # two by two patches of 16 pixels
WIDTH = 48                                             # of vit_small here, with its 12 layers
CFG = "dict(mean=[\n  123.675,\n  116.28,\n  103.53,\n],\n std=[58.395, 57.12, 57.375])"
HUB = types.ModuleType("mmengine.logging.history_buffer")
HUB.HistoryBuffer = type("HistoryBuffer", (), {"__module__": HUB.__name__})
ORIGIN = {"release": "clip", "release ViT": "clip", "hub": "half"}      # the others: imagenet
TWO = {"MoCo v2", "moco-v3", "DINO", "BYOL", "lightly", "lightly ViT", "solo-learn", "release"}
RESNETS = dict.fromkeys(("torchvision", "timm", "MoCo v2", "moco-v3", "DINO", "SwAV", "SimSiam",
                         "BYOL", "lightly", "MoCo for CIFAR", "solo-learn", "Lightning",
                         "release"))
VITS = {"timm": 6, "moco-v3": 12, "DINO": 6, "lightly ViT": 6, "solo-learn": 6, "Lightning": 6,
        "DeiT": 6, "MAE": 6, "moco-v3 for DeiT": 12, "release ViT": 12, "mmpretrain": 6,
        "torchvision ViT": 12, "hub": 6, "transformers": 6}
POSITIONS = "^conv1=0 ^bn1=1 ^layer1=4 ^layer2=5 ^layer3=6 ^layer4=7"
WITHOUT_POOLING = "^conv1=0 ^bn1=1 ^layer1=3 ^layer2=4 ^layer3=5 ^layer4=6"
MMPRETRAIN = r"""^blocks=layers \.norm(\d)=.ln\1 ^norm=ln1 embed.proj=embed.projection
    mlp.fc1=ffn.layers.0.0 mlp.fc2=ffn.layers.1"""
TORCHVISION = r"""cls_token=class_token pos_embed=encoder.pos_embedding patch_embed.proj=conv_proj
    ^blocks\.=encoder.layers.encoder_layer_ ^norm=encoder.ln \.norm(\d)=.ln_\1 mlp.fc1=mlp.0
    mlp.fc2=mlp.3 attn\.qkv\.=self_attention.in_proj_ attn.proj=self_attention.out_proj"""
TRANSFORMERS = r"""^blocks=encoder.layer ^(cls|patch|pos)=embeddings.\1 norm1=layernorm_before
    patch_embed.proj=patch_embeddings.projection pos_embed=position_embeddings ^norm=layernorm
    norm2=layernorm_after attn.proj=attention.output.dense mlp.fc1=intermediate.dense
    mlp.fc2=output.dense"""


def under(prefix, state):
    return {prefix + key: x for key, x in state.items()}


def without(state, name):
    return {key: x for key, x in state.items() if key != name}


def linear(*names):
    return {f"{name}.{x}": torch.ones(2, 3) for name in names for x in ("weight", "bias")}


def renamed(state, pairs):
    for old, new in (pair.split("=") for pair in pairs.split()):
        state = {re.sub(old, new, key): x for key, x in state.items()}
    return state


def transformers(state):
    state = renamed(state, TRANSFORMERS)               # query, key and value stand apart
    for key in [key for key in state if "attn.qkv" in key]:
        for part, x in zip(("query", "key", "value"), state.pop(key).chunk(3), strict=True):
            state[key.replace("attn.qkv", f"attention.attention.{part}")] = x.clone()
    return dict(sorted(state.items()))                 # as safetensors lists them


def mmengine(state, **meta):
    buffer = HUB.HistoryBuffer()                       # a run saves such objects beside the weights
    buffer.history, buffer.current = np.arange(3.0), np.float64(2)
    return {"meta": meta, "state_dict": state | linear("neck.fc0"), "message_hub": {
        "loss": buffer, "info": defaultdict(int, step=3), "get": getattr}}


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
        "MoCo for CIFAR": {"epoch": 200, "state_dict": under(
            "encoder_q.net.", renamed(s, WITHOUT_POOLING) | linear("9"))},
        "lightly ViT": lightning | {"state_dict": under("backbone.vit.", s) | under(
            "student_backbone.vit.", o)},
        "solo-learn": lightning | {"state_dict": under("momentum_backbone.", o) | under(
            "backbone.", s) | linear("classifier")},
        "Lightning": lightning | {"state_dict": under("model._orig_mod.", s)},
        "DeiT": {"model": s | linear(fc)}, "moco-v3 for DeiT": {"model": s},
        "MAE": {"model": s | linear("decoder_embed") | {
            "mask_token": torch.ones(1, 1, WIDTH), "decoder_pos_embed": torch.ones(1, 5, 8)}},
        "release": mmengine(under("backbone.", s) | under("momentum_encoder.module.0.", o)),
        "release ViT": {"meta": {}, "state_dict": under("backbone.", renamed(s, MMPRETRAIN))},
        "mmpretrain": mmengine(under("backbone.", renamed(s, MMPRETRAIN)), cfg=CFG),
        "torchvision ViT": renamed(s, TORCHVISION) | linear("heads.head"),
        "transformers": transformers(s) | linear("pooler.dense")}


@pytest.fixture(scope="module", autouse=True)
def narrow_vit():
    """The names of vit_small's tensors are all there, with a 64th of the numbers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SIZES, "vit_small", (WIDTH, 12, 12))
        shapes_of_arch.cache_clear()
        yield
    shapes_of_arch.cache_clear()


@pytest.fixture(scope="module")
def networks():
    """Random ones that float16 holds. Keys: heads (None: ResNet-18), or who has fixed positions."""
    def vit(heads):
        return timm.models.VisionTransformer(SIZE, embed_dim=WIDTH, num_heads=heads, num_classes=0)
    made = {None: torchvision.models.resnet18(), "torchvision": torchvision.models.resnet50(),
            6: vit(6), 12: vit(12), "MAE": vit(6), "moco-v3 for DeiT": vit(12)}
    for name in (None, "torchvision"):
        made[name].fc = torch.nn.Identity()
    for network in made.values():
        torch.manual_seed(0)
        for key, x in network.eval().state_dict().items():
            if x.is_floating_point():
                x.normal_(std=0.1 if x.ndim < 2 or len(x) == 1 else 1.5 * x[0].numel() ** -0.5)
                positive = x.ndim == 1 and key.endswith(("weight", "var"))
                x.copy_((x.abs() + 0.9 if positive else x).half())
    fixed = sine_positions(WIDTH, 2).half()              # MAE: column, then row
    made["MAE"].pos_embed.data.copy_(fixed)
    made["moco-v3 for DeiT"].pos_embed.data.copy_(fixed[:, [0, 1, 3, 2, 4]])
    made["release ViT"] = made["moco-v3 for DeiT"]
    return made


def blank(network):                                    # zeros that take no space in a file
    return {key: torch.zeros((), dtype=x.dtype).expand(x.shape)
            for key, x in network.state_dict().items()}


@pytest.mark.parametrize("name, heads", [*RESNETS.items(), *VITS.items()])
def test_the_features_are_the_origins(name, heads, networks, tmp_path, capsys, monkeypatch):
    network, origin = networks.get(name, networks[heads]), ORIGIN.get(name, "imagenet")
    state = {key: x.half() for key, x in network.state_dict().items()}
    content = layouts(state, blank(network), "head" if heads else "fc")[name]
    (tmp_path / "config.json").write_text('{"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}')
    file = {"hub": "model.safetensors", "timm": "x.safetensors", "transformers": "y.safetensors"}
    for module in ("mmengine", "mmengine.logging", HUB.__name__):
        monkeypatch.setitem(sys.modules, module, HUB)
    path = tmp_path / file.get(name, "x.pth")          # a config.json belongs to the hub's name
    save_file(content, path) if name in file else torch.save(content, path)
    backbone, dim, settings = load_backbone(path)
    said = capsys.readouterr().out
    x = torch.rand(4, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = backbone.eval()(normalize(x, settings["mean"], settings["std"]))
        theirs = network(normalize(x, *MEAN_STD[origin]))
    print(f"largest difference {(ours - theirs).abs().max():.1e}")
    assert ours.shape == (4, dim) and (ours - theirs).abs().max() < 1e-4 < ours.std(0).mean()
    assert (settings["mean_std"], settings["heads"]) == (origin, heads)
    assert settings["image_size"] == (SIZE if heads else 224)
    arch = ": resnet50 under" if name == "torchvision" else ": resnet18 under"
    if heads:
        arch = f": vit_small with {heads} heads"
    assert re.fullmatch(f"[^\n]*{arch}[^\n]*mean and std: {origin}[^\n]*\n", said)
    assert ("also there" in said) == (name in TWO)


def test_flags_decide_against_the_layout(networks, tmp_path):
    vit, resnet = blank(networks[6]), blank(make_backbone("resnet18", 224)[0])
    two = {"student": {key: x + 1 for key, x in vit.items()}, "teacher": vit}
    torch.save(two, tmp_path / "vit.pth")
    for branch, value in ((None, 0), ("teacher", 0), ("student", 1)):
        backbone, _, settings = load_backbone(tmp_path / "vit.pth", None, 12, branch, "half")
        assert settings["heads"] == backbone.encoder.layers[0].self_attention.num_heads == 12
        assert (backbone.class_token == value).all() and settings["std"] == (0.5, 0.5, 0.5)
    ours = {"model": under("query.backbone.", resnet) | under("key.backbone.", resnet),
            "args": {"arch": "resnet18", "dataset": "imagenet"}}
    for name, content in (("last.pt", ours), ("backbone.pt", resnet)):
        torch.save(content, tmp_path / name)
        settings = load_backbone(tmp_path / name)[2]
        assert (settings["mean_std"], settings["mean"]) == ("clip", MEAN_STD["clip"][0])
        assert settings.get("dataset") == ("imagenet" if name == "last.pt" else None)


def test_solo_learns_stem_for_cifar_and_other_formats(tmp_path):
    """Their padding of 2 is in no tensor. Files of PyTorch before 1.6 are no zip files."""
    content = layouts(blank(make_backbone("resnet18", 32)[0]), {}, "fc")["solo-learn"]
    content["args"] = argparse.Namespace(lr=1)
    torch.save(content, tmp_path / "x.ckpt", _use_new_zipfile_serialization=False)
    backbone, _, settings = load_backbone(tmp_path / "x.ckpt")
    assert backbone.conv1.padding == (2, 2) and settings["image_size"] == 32
    (tmp_path / "x.safetensors").write_bytes(bytes(100))
    with pytest.raises(UserError, match="x.safetensors cannot be loaded as a checkpoint"):
        load_backbone(tmp_path / "x.safetensors")


@pytest.mark.parametrize("content, flags, message", [
    (lambda r, v: linear("encoder.a"), {}, "no conv1.weight, .* first tensor is encoder.a"),
    (lambda r, v: without(r, "layer2.0.bn1.running_var"), {"arch": "resnet18"},
     "no layer2.0.bn1.running_var"),
    (lambda r, v: r, {"arch": "resnet34"}, "another architecture.*layer1.2.conv1.weight.*resnet34"),
    (lambda r, v: [1, 2], {"arch": "resnet18"}, ""),
    (lambda r, v: {}, {"arch": "vit_tiny"}, "no class_token, which is in vit_tiny.* missing"),
    (lambda r, v: layouts(r, r, "fc")["MoCo v2"], {"branch": "key"}, r"no branch key.*encoder_k"),
    (lambda r, v: r, {"heads": 6}, "--heads 6 does not fit .* resnet18"),
    (lambda r, v: v, {"heads": 5}, "--heads 5 does not fit .* vit_small"),
    (lambda r, v: v | linear("dist_token"), {}, "its dist_token.weight is not in vit_small"),
    (lambda r, v: v | {"pos_embed": torch.ones(3)}, {}, r"pos_embedding is \(3,\), not"),
    (lambda r, v: {"state_dict": r, "hook": [re.compile("a")]}, {}, r"del c\['hook'\]; torch.save"),
    (lambda r, v: torch.nn.ReLU(), {}, r"ReLU under no key.*c = c.state_dict\(\); torch.save"),
    (lambda r, v: os.getcwd, {}, "cannot be loaded .*posix.getcwd")])
def test_refusals_are_one_line(content, flags, message, networks, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content(blank(make_backbone("resnet18", 224)[0]), blank(networks[6])), "x.pth")
    with pytest.raises(UserError, match=f"^x.pth:? [^\n]*{message}[^\n]*$"):
        load_backbone("x.pth", **flags)


@pytest.mark.parametrize("name", ["x.pth", "x.safetensors"])
@pytest.mark.parametrize("content, message", [
    ("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "is a git-lfs pointer"),
    ("\n<html>404</html>", "is a web page"), ("anything else", "cannot be loaded as a checkpoint")])
def test_what_a_download_left_instead_is_named(name, content, message, tmp_path):
    """And nobody is told to load it unsafely."""
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=message) as error:
        load_backbone(tmp_path / name)
    assert "weights_only" not in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("word", [
    "_orig_mod.", "_fsdp_wrapped_module.", "_fpw_module.", "_checkpoint_wrapped_module.",
    "module._orig_mod."])
def test_wrappers_inside_a_name_are_taken_out(word, tmp_path):
    state = blank(make_backbone("resnet18", 224)[0])
    state["conv1.weight"] = torch.ones(64, 3, 7, 7)
    wrapped = {key.replace("layer1.0.", f"layer1.0.{word}"): x for key, x in state.items()}
    torch.save({"model": {f"{word}{key}": x for key, x in wrapped.items()}}, tmp_path / "x.pth")
    backbone, _, settings = load_backbone(tmp_path / "x.pth")
    assert settings["arch"] == "resnet18" and (backbone.conv1.weight == 1).all()


def test_wrapped_blocks_of_two_digits_are_read(tmp_path):
    state = blank(make_backbone("resnet101", 224)[0])
    wrapped = {re.sub(r"(layer\d\.\d+\.)", r"\1module.", key): x for key, x in state.items()}
    torch.save(wrapped, tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth")[2]["arch"] == "resnet101"


@pytest.mark.parametrize("change, kind", [
    (lambda x: x.to(torch.int8), "int8"), (lambda x: x.to("meta"), "on meta"),
    (lambda x: x.clone().to_sparse(), "sparse_coo"), (lambda x: x.to(torch.complex64), "complex64"),
    (lambda x: torch.quantize_per_tensor(x.contiguous(), 0.1, 0, torch.qint8), "qint8")])
@pytest.mark.filterwarnings("ignore")
def test_what_is_no_plain_tensor_is_named(change, kind, tmp_path):
    state = blank(make_backbone("resnet18", 224)[0])
    state["conv1.weight"] = change(state["conv1.weight"])
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"x.pth holds conv1.weight as .*{kind}.*: save the full"):
        load_backbone(tmp_path / "x.pth")


def test_eight_bits_of_a_real_number_are_read(tmp_path):
    state = blank(make_backbone("resnet18", 224)[0])
    state["conv1.weight"] = torch.ones(64, 3, 7, 7).to(torch.float8_e4m3fn)
    torch.save(state, tmp_path / "x.pth")
    assert (load_backbone(tmp_path / "x.pth")[0].conv1.weight == 1).all()


def test_safetensors_is_known_by_its_content(tmp_path):
    save_file({key: x.contiguous() for key, x in blank(make_backbone("resnet18", 224)[0]).items()},
              tmp_path / "x.pth")
    assert load_backbone(tmp_path / "x.pth")[2]["arch"] == "resnet18"


def test_a_part_of_a_tensor_is_named():
    """FSDP saves DTensors, of which each process may hold a part."""
    part = type("DTensor", (torch.Tensor,), {})
    found = types.SimpleNamespace(path="x.pth", state={"a": torch.ones(2).as_subclass(part)})
    with pytest.raises(UserError, match="x.pth holds a as DTensor of float32"):
        check_kinds(found)


def in_archive(path):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("model/x.pth", b"anything")


@pytest.mark.filterwarnings("ignore:.*torch.jit:FutureWarning")
@pytest.mark.parametrize("write, message", [
    (lambda path: path.write_bytes(gzip.compress(b"anything")), "compressed: .* gunzip"),
    (lambda path: path.write_text('{"weight_map": {}}'), "text, such as the index"),
    (in_archive, "archive of other files: unpack"),
    (lambda path: np.savez(open(path, "wb"), a=np.ones(2)), "NumPy's archive of arrays"),
    (lambda path: torch.jit.script(torch.nn.Linear(2, 2)).save(path), "TorchScript: .*state_dict"),
    (lambda path: (torch.save([1], path), os.truncate(path, 300)), "its end is missing"),
    (lambda path: path.write_text("hello"), "torch.save did not write it"),
    (lambda path: path.mkdir(), "Is a directory"), (lambda path: path.touch(), "torch.save did")])
def test_other_files_are_called_what_they_are(write, message, tmp_path):
    write(tmp_path / "x.pth")
    with pytest.raises(UserError, match=f"^[^\n]*cannot be loaded [^\n]*{message}[^\n]*$"):
        load_backbone(tmp_path / "x.pth")


def test_the_command_that_strips_keeps_the_weights(tmp_path):
    """Of a whole network in the place of its weights, and of an object beside them."""
    network = make_backbone("resnet18", 224)[0]
    torch.save({"model": network, "x": slice(3)}, tmp_path / "it's.pth")
    with pytest.raises(UserError, match="holds .* under .'model', 'x'., which") as error:
        load_backbone(tmp_path / "it's.pth")
    command = re.search('-c "(.*)"', str(error.value))[1]
    exec(command.replace("new.pth", str(tmp_path / "new.pth")))
    assert load_backbone(tmp_path / "new.pth")[2]["arch"] == "resnet18"


@pytest.mark.parametrize("name", ["EasyDict", "ConfigDict", "CfgNode"])
def test_a_mapping_of_another_program_beside_the_weights_is_read(name, tmp_path, monkeypatch):
    """It holds no more than a dict; its class is not needed."""
    module = types.ModuleType("configurations")
    kind = type(name, (dict,), {"__module__": module.__name__})
    setattr(module, name, kind)
    monkeypatch.setitem(sys.modules, module.__name__, module)
    state = blank(make_backbone("resnet18", 224)[0])
    torch.save({"model": state, "cfg": kind(lr=1, inner=kind(a=2))}, tmp_path / "it's.pth")
    monkeypatch.delitem(sys.modules, module.__name__)
    assert load_backbone(tmp_path / "it's.pth")[2]["arch"] == "resnet18"


def test_torchs_own_reason_is_given(tmp_path):
    torch.save({"x": collections.deque([1])}, tmp_path / "x.pth")
    with pytest.raises(UserError, match="Can only append to lists, but got .*deque"):
        load_backbone(tmp_path / "x.pth")


def test_a_diverged_checkpoint_is_refused(tmp_path):
    state = make_backbone("resnet18", 224)[0].state_dict()
    state["layer4.1.bn2.running_var"].fill_(float("nan"))
    torch.save(state, tmp_path / "x.pth")
    with pytest.raises(UserError, match="not finite, in layer4.1.bn2.running_var"):
        load_backbone(tmp_path / "x.pth")
