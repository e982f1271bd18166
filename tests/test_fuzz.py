"""What users get wrong: 80 seeded bad command lines, 60 bad files and folders.

No traceback, no hang: exit status 2 and one line that helps, or what the README promises
(unreadable images are named and left out). pytest -s tests/test_fuzz.py shows the messages.
"""
import contextlib
import io
import json
import pickle
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import eval_linear
import generate_views
import train_byol
import train_moco
import train_swav
from support import command_line
from support.data import open_image
from support.networks import make_backbone
from support.views import ViewFolder

TEXTS = ["", " ", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "abc", "None", "--", "é",
         "\U0001f600", "a b", "../..", "9" * 30, "0x10", "True", "[1]", "*", "~", "%s", "{}"]
NUMBERS = ["-1", "0", "0.5", "1.5", "3", "7", "100", "-0.1", "nan", "inf", "-inf", "1e-30", "1e30",
           "1e400", "9" * 30]
THINGS = ["empty", "nothing.pt", "noise.pt", "text.json", "other.pt", "list.pt", "odd.pt", "zip.pt",
          "short.npy", "odd.npz", "clip", "pipeline", "images", "nowhere",
          "images/train/cat/0001.png"]
SCRIPTS = {"train_moco": train_moco, "train_byol": train_byol, "train_swav": train_swav,
           "eval_linear": eval_linear, "generate_views": generate_views}
SECONDS = 60                                       # a call that takes longer hangs


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, pipeline_folder):
    """A small valid world, and things that are not what they should be."""
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "a/b/c").mkdir(parents=True)         # work happens here: "../.." leads nowhere
    tiny.save_images(folder / "images", per_class=8)
    (folder / "clip").symlink_to(encoder_folder)
    (folder / "pipeline").symlink_to(pipeline_folder)
    np.save(folder / "component.npy", np.ones((32, 1), np.float32))
    (folder / "empty").mkdir()
    (folder / "nothing.pt").write_bytes(b"")
    (folder / "noise.pt").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "text.json").write_text('{"dataset": "imagenet"}')
    (folder / "images/train/cat/notes.txt").write_text("not a picture")
    torch.save({"model": {"x": torch.ones(2)}, "args": {"arch": "resnet18"}}, folder / "other.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"model": 3, "epoch": "x"}, folder / "odd.pt")
    torch.save(make_backbone("vit_narrow", 32)[0].state_dict(), folder / "vit.pt")
    with zipfile.ZipFile(folder / "zip.pt", "w") as file:
        file.writestr("a/data.pkl", "nothing")
    np.save(folder / "short.npy", np.ones(3, np.float32))
    np.savez(folder / "odd.npz", something=np.ones(3))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder / "a/b/c")
        patch.setenv("HOME", str(folder / "a"))
        status, said = call("train_moco", good("train_moco", folder, folder / "run"))
        assert status == 0, said
        yield folder


def good(name, world, output):
    """A command line that works, as {flag: value}."""
    data = {"--dataset": "folder", "--data-dir": world / "images", "--device": "cpu", "--seed": 0}
    small = {"--image-size": 32, "--arch": "resnet10_narrow", "--workers": 0, "--limit": 16,
             "--epochs": 1}
    training = data | small | {
        "--batch-size": 8, "--views-dir": "none", "--output-dir": output, "--quality": "exact",
        "--encoder": world / "clip", "--component": world / "component.npy", "--gamma": 1,
        "--lr": 0.01, "--weight-decay": 0, "--warmup-epochs": 0, "--optimizer": "sgd",
        "--knn-every": 1, "--log-every": 1, "--save-minutes": 1, "--dim": 8}
    more = {
        "train_moco": training | {
            "--queue": 16, "--temperature": 0.2, "--momentum": 0.9, "--method": "mocov2",
            "--crop-min": 0.2, "--blur": 0, "--start-batches": 1, "--views": "pair",
            "--noise": "adaptive"},
        "train_byol": training | {"--hidden": 8, "--method": "simsiam"},
        "train_swav": training | {
            "--hidden": 8, "--prototypes": 4, "--epsilon": 0.05, "--small-crops": 1,
            "--small-size": 16, "--small-min": 0.1, "--freeze-epochs": 0, "--crop-min": 0.2},
        "eval_linear": data | small | {
            "--checkpoint": world / "run/last.pt", "--protocol": "finetune", "--labels": 0.5,
            "--batch-size": 4, "--lr": 0.1, "--backbone-lr": 0.1, "--k": 3},
        "generate_views": data | {
            "--model": world / "pipeline", "--views-dir": output, "--steps": 1, "--guidance": 1,
            "--size": 32, "--save-size": 32, "--noise": 100, "--fit-images": 4, "--limit": 2,
            "--batch-size": 2, "--precision": "float32", "--solver": "own",
            "--component": world / "component.npy"}}
    return more[name]


def call(name, flags, *more):
    """Runs a script in this process; returns its exit status and the last line on stderr. flags: a
    dict or a list. A traceback is an exception that leaves support.command_line.script."""
    flags = [x for pair in flags.items() for x in pair] if isinstance(flags, dict) else flags

    def hang(*_):
        pytest.fail(f"it hangs: {name} {flags}")
    said, before = io.StringIO(), signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with (contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said),
              pytest.MonkeyPatch.context() as patch):
            patch.setattr(sys, "argv", [f"{name}.py", *map(str, flags), *more])
            try:
                command_line.script(SCRIPTS[name].main)
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [line for line in re.split(r"[\r\n]+", said.getvalue()) if line.strip()]
    return status, lines[-1] if lines else ""


def refused(name, world, output, **flags):
    """The line that a script says when it refuses its good flags, changed so."""
    status, said = call(name, good(name, world, output) | {
        f"--{flag.replace('_', '-')}": value for flag, value in flags.items()})
    assert status == 2 and re.match("error: .{10}", said), (name, flags, status, said)
    return said


# ---------------------------------------------------------------------------------- command lines
def bad_lines(world, count, seed=0):
    """Seeded command lines, each with one or two values replaced by what does not belong there."""
    draw, things = random.Random(seed), [str(world / name) for name in THINGS]
    for number in range(count):
        name = draw.choice(list(SCRIPTS))
        flags = good(name, world, world / f"out-{number}")
        for flag in draw.sample(list(flags), draw.choice([1, 1, 2])):
            likely = {Path: things, type(world): things, str: TEXTS}.get(type(flags[flag]), NUMBERS)
            flags[flag] = draw.choice(likely if draw.random() < 0.8 else TEXTS + things)
        line = [str(x) for pair in flags.items() for x in pair]
        if draw.random() < 0.1:
            line[draw.randrange(len(line))] = draw.choice([*TEXTS, "--resume", "--resum"])
        yield name, line


def test_the_good_lines_work(world, tmp_path):
    for name in SCRIPTS:
        status, said = call(name, good(name, world, tmp_path / name))
        assert status == 0, said


def test_80_bad_command_lines(world):
    messages = []
    for name, line in bad_lines(world, 1000):      # some replaced values happen to be right
        status, said = call(name, line)
        assert status in (0, 2), (name, line, said)
        if status:
            assert re.match("error: .{10}", said), (name, line, said)
            messages.append(said.replace(str(world), "..."))
        if len(messages) == 80:
            break
    assert len(messages) == 80
    print(*messages, sep="\n")


@pytest.mark.parametrize("name, flags, text", [
    ("train_moco", dict(optimizer="adam"), "invalid choice: 'adam'"),
    ("train_moco", dict(device="meta"), "--device meta is not available"),
    ("train_moco", dict(image_size=80, arch="googlenet"), "--arch googlenet is not supported"),
    ("train_swav", dict(arch="vit_narrow"), "vit_narrow takes views of one size: --small-crops 0"),
    ("train_swav", dict(small_size=64), "must be at most --image-size 32"),
    ("train_swav", dict(hidden=10 ** 12), "error: out of memory"),               # petabytes
    ("eval_linear", dict(checkpoint="vit.pt", arch="vit_narrow", image_size=64),
     "for pictures of 32 pixels")])
def test_what_is_wrong_is_named(name, flags, text, world, tmp_path):
    if "checkpoint" in flags:
        flags = flags | {"checkpoint": world / flags["checkpoint"]}
    assert text in refused(name, world, tmp_path / "run", **flags)


# --------------------------------------------------------------------------------------- pictures
def png(side):
    """A PNG file that promises side x side pixels and holds none."""
    def chunk(kind, data):
        length, checksum = (struct.pack(">I", x) for x in (len(data), zlib.crc32(kind + data)))
        return length + kind + data + checksum
    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    chunks = (b"IHDR", header), (b"IDAT", zlib.compress(b"0")), (b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*c) for c in chunks)


def unreadable_pictures(whole, jpeg):
    """{name: content} of files that hold no picture; whole: a PNG's bytes, jpeg: a JPEG's."""
    rng = np.random.default_rng(0)
    made = {"zero.png": b"", "text.jpg": b"hello, this is no picture",
            "page.png": b"<html>404</html>", "zip.png": b"PK\x03\x04" + rng.bytes(100),
            "pickle.png": b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.",
            "bomb.png": png(60_000), "large.png": png(11_000)}
    cuts = (1, 8, 30, 100, len(whole) // 2, len(whole) - 60)
    made |= {f"cut-{k}.png": whole[:k] for k in cuts}
    made |= {f"cut-{k}.jpg": jpeg[:k] for k in (2, 20, 200, len(jpeg) // 2)}
    return made | {f"noise-{kind}.{kind}": rng.bytes(500)
                   for kind in ("png", "jpg", "bmp", "webp", "ppm", "tif")}


def save_strange_pictures(folder, picture, jpeg):
    """Writes pictures that are strange but can be read; returns their names."""
    made = []

    def save(name, image, **options):
        made.append(name)
        image.save(folder / name, **options)
    save("tiny.png", Image.new("RGB", (1, 1), "red"))
    save("line.png", Image.new("RGB", (500, 1), "red"))
    save("column.jpg", Image.new("RGB", (1, 300), "red"))
    grey = picture.convert("L")
    for mode in ("L", "LA", "P", "1", "RGBA", "I", "F"):
        save(f"mode-{mode}.{'tif' if mode in 'FI' else 'png'}", grey.convert(mode))
    save("mode-I16.png", Image.fromarray(np.asarray(grey).astype(np.uint16) * 257))
    for mode, suffix in (("CMYK", "jpg"), ("YCbCr", "jpg"), ("LAB", "tif")):
        save(f"{mode}.{suffix}", picture.convert(mode))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", picture, exif=exif)
    save("frames.webp", picture, save_all=True, append_images=[picture.rotate(90)])
    for name in ("é ü.png", " blank.png", "a'b\"c.png", "$(touch hacked).png", "%s{}.png",
                 "\U0001f600.png", "-flag.png", "x" * 200 + ".png",
                 "new\nline.png", "UPPER.PNG"):
        save(name, picture, format="PNG")
    broken = jpeg[:2] + b"\xff\xe1\x00\x10Exif\x00\x00MM\x00*\xff\xff" + jpeg[2:]
    (folder / "broken-exif.jpg").write_bytes(broken)
    return [*made, "broken-exif.jpg"]


def test_60_bad_images(world, tmp_path, monkeypatch):
    """Generation leaves out what cannot be read and makes a view of all the rest; training, in
    memory and (above 64 pixels) in a loader's process, names the first and stops, with --skip-bad
    it goes on, also where the foreground is fitted; 16-bit and turned pictures are read right."""
    monkeypatch.setattr(torch.utils.data._utils, "MP_STATUS_CHECK_INTERVAL", 0.5)     # not 5 s
    shutil.copytree(world / "images", tmp_path / "images")
    cats = tmp_path / "images/train/cat"
    picture, jpeg = Image.open(cats / "0000.png").convert("RGB"), io.BytesIO()
    picture.save(jpeg, "JPEG")
    bad = unreadable_pictures((cats / "0000.png").read_bytes(), jpeg.getvalue())
    for name, content in bad.items():
        (cats / name).write_bytes(content)
    usable = save_strange_pictures(cats, picture, jpeg.getvalue())
    assert len(bad) + len(usable) >= 50 and len(usable) >= 20
    data = {"--data-dir": tmp_path / "images", "--limit": 1000}
    status, said = call("generate_views", good("generate_views", world, tmp_path / "views") | data)
    assert status == 0, said
    made = ViewFolder(tmp_path / "views", ".png").made()             # only those that exist
    pictures = {f"train/{kind}/{i:04d}.png" for kind in ("cat", "dog") for i in range(8)}
    assert made.keys() == pictures | {f"train/cat/{name}" for name in usable}
    assert not list(Path().glob("hacked*"))
    for size in (32, 72):
        flags = good("train_moco", world, tmp_path / f"run-{size}") | data | {
            "--image-size": size, "--views-dir": tmp_path / "views", "--workers": 1}
        flags.pop("--component")
        status, said = call("train_moco", flags)
        named = re.search(r"/cat/(\S+) cannot be read as an image.*--skip-bad", said)
        assert status == 2 and named[1] in bad, said
        status, said = call("train_moco", flags, "--skip-bad")
        assert status == 0, said
    deep, flat, turned, upright = (np.asarray(image).astype(int) for image in (
        open_image(cats / "mode-I16.png"), open_image(cats / "mode-L.png"),
        open_image(cats / "turned.jpg"), picture.rotate(-90)))
    assert abs(deep - flat).max() <= 1 and abs(turned - upright).mean() < 15


# ---------------------------------------------------------------------------------------- folders
@pytest.mark.parametrize("change, trains, generates", [
    ("rm -r train", False, False), ("rm -r test", False, True),      # generation needs train/ only
    ("rm -r $PWD; touch $PWD", False, False), ("rm train/*/*.png", False, False),
    ("for f in train/*/*; do mv $f train/$(echo $f | tr / -); done", False, True),
    ("for f in train/cat/*; do ln -sf gone.png $f; done", False, True),        # left out
    ("ln -s $PWD/train train/cat/loop", True, True), ("mkdir train/cat/0099.png", True, True)])
def test_bad_folders(change, trains, generates, world, tmp_path):
    shutil.copytree(world / "images", tmp_path / "images")
    subprocess.run(change, shell=True, cwd=tmp_path / "images", check=True)
    flags = {"--data-dir": tmp_path / "images", "--limit": 1000}
    for name, works in (("train_moco", trains), ("generate_views", generates)):
        if works:
            status, said = call(name, good(name, world, tmp_path / name) | flags)
            assert status == 0, (name, said)
        else:
            refused(name, world, tmp_path / name, data_dir=tmp_path / "images", limit=1000)


@pytest.mark.parametrize("text", ["[]", "{", '{"noise": 3}', "\x00"])
def test_bad_settings_of_a_views_folder(text, world, tmp_path):
    (tmp_path / "settings.json").write_text(text)
    for name in ("train_moco", "generate_views"):
        refused(name, world, tmp_path / "run", views_dir=tmp_path)


def test_bad_records_of_a_views_folder(world, tmp_path):
    """Lines that another program wrote are ignored; nothing is written through symbolic links."""
    folder = tmp_path / "views"
    flags = good("generate_views", world, folder)
    assert call("generate_views", flags)[0] == 0
    manifest = folder / "manifest.jsonl"
    count = len(manifest.read_text().splitlines())
    escape = json.dumps({"source": "../../../escape.png", "noise_level": 0})
    manifest.write_text(f"{manifest.read_text()}{escape}\n[]\n3\nnull\n{{}}\n\x00\n")
    before = manifest.read_bytes()
    assert call("generate_views", flags)[0] == 0 and manifest.read_bytes() == before
    damaged = before.replace(b'"noise_level": 100', b'"noise_level": "x"') + b"\xff\n"
    manifest.write_bytes(damaged)
    assert call("generate_views", flags)[0] == 0                     # they are made again
    added = manifest.read_bytes().removeprefix(damaged).splitlines()
    assert len(added) == count and all(json.loads(x)["noise_level"] == 100 for x in added)

    elsewhere, outside = tmp_path / "elsewhere", tmp_path / "outside"
    manifest.rename(elsewhere)
    manifest.symlink_to(elsewhere)
    before = elsewhere.read_bytes()
    shutil.rmtree(folder / "train/dog")
    assert "manifest.jsonl" in refused("generate_views", world, folder)
    assert elsewhere.read_bytes() == before
    manifest.unlink()
    outside.mkdir()
    shutil.rmtree(folder / "train/cat")
    (folder / "train/cat").symlink_to(outside)
    assert "remove that symbolic link" in refused("generate_views", world, folder)
    assert not list(outside.iterdir())


class Bomb:
    """Its pickle opens a file for writing when it is read."""
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_a_pickle_that_would_write_a_file_is_refused_everywhere(world, tmp_path):
    """As checkpoint, component, frozen encoder and pipeline: one line, no file."""
    target = tmp_path / "hacked"
    bomb = Bomb(str(target))
    for name in ("last.pt", "component.npy", "foreground.npz"):
        (tmp_path / name).write_bytes(pickle.dumps({"model": bomb, "component": bomb}))
    np.save(tmp_path / "object.npy", np.array([bomb], dtype=object), allow_pickle=True)
    np.savez(tmp_path / "object.npz", component=np.array([bomb], dtype=object), threshold=0.0)
    torch.save({"model": bomb}, tmp_path / "zip.pt")
    for name in ("clip", "pipeline"):
        shutil.copytree(world / name, tmp_path / name)
    for weights in sorted(tmp_path.rglob("*.safetensors")):
        kind = "pytorch" if weights.name == "model.safetensors" else "diffusion_pytorch"
        torch.save({"weight": bomb}, weights.with_name(f"{kind}_model.bin"))
        weights.unlink()
    assert not target.exists()
    cases = [("train_moco", "resume", "last.pt"), ("train_moco", "resume", "zip.pt"),
             ("eval_linear", "checkpoint", "last.pt"), ("eval_linear", "checkpoint", "zip.pt"),
             ("train_moco", "encoder", "clip"), ("generate_views", "model", "pipeline"),
             ("generate_views", "model", "clip")]
    cases += [(script, "component", name) for script in ("train_moco", "generate_views")
              for name in ("component.npy", "foreground.npz", "object.npy", "object.npz")]
    for number, (script, flag, name) in enumerate(cases):
        refused(script, world, tmp_path / f"out-{number}", **{flag: tmp_path / name})
        assert not target.exists(), (script, flag, name)
