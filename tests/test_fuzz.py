"""What the user gets wrong: 200 seeded bad command lines and 60 bad files and folders. No traceback, no hang: exit status 2 and
one line that helps, or what the README promises (unreadable images named and left out).

pytest tests/test_fuzz.py --messages prints the messages, to be read as a new user would.
"""
import contextlib
import io
import json
import random
import re
import shutil
import signal
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import eval_linear
import generate_views
import genview
import support.data
import support.networks
import support.world
import train_byol
import train_moco
import train_swav

TEXTS = ["", " ", "-1", "0", "1.5", "nan", "inf", "-inf", "1e400", "abc", "None", "--", "é", "\U0001f600", "a b", "../..", "9" * 30,
         "0x10", "True", "[1]", "*", "~", "%s", "{}"]
NUMBERS = ["-1", "0", "0.5", "1.5", "3", "7", "100", "-0.1", "nan", "inf", "-inf", "1e-30", "1e30", "1e400", "9" * 30]
SECONDS = 60                                       # a call that takes longer hangs


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A small valid world, and things that are not what they should be."""
    import tiny
    folder = tmp_path_factory.mktemp("fuzz")
    tiny.save_images(folder / "images", per_class=8)
    tiny.save_clip(folder / "clip")
    tiny.save_pipeline(folder / "pipeline")
    np.save(folder / "component.npy", np.ones((32, 1), np.float32))
    (folder / "empty").mkdir()
    (folder / "nothing.pt").write_bytes(b"")
    (folder / "noise.pt").write_bytes(np.random.default_rng(0).bytes(3000))
    (folder / "text.json").write_text('{"dataset": "imagenet"}')
    (folder / "images/train/cat/notes.txt").write_text("not a picture")
    torch.save({"model": {"x": torch.ones(2)}, "args": {"arch": "resnet18"}}, folder / "other.pt")
    torch.save([1, 2, 3], folder / "list.pt")
    torch.save({"model": 3, "epoch": "x"}, folder / "odd.pt")
    with zipfile.ZipFile(folder / "zip.pt", "w") as file:
        file.writestr("a/data.pkl", "nothing")
    np.save(folder / "short.npy", np.ones(3, np.float32))
    np.savez(folder / "odd.npz", something=np.ones(3))
    args = train_moco.parse_args(argv=["--dataset", "folder", "--data-dir", str(folder / "images"), *small(), "--views-dir", "none",
                                       "--output-dir", str(folder / "run")])
    with contextlib.redirect_stdout(io.StringIO()):
        train_moco.train(args, support.world.setup("cpu"))
    return folder


def small():
    return ["--image-size", "32", "--arch", "resnet10_narrow", "--batch-size", "8", "--queue", "16", "--epochs", "1", "--device", "cpu"]


def good(name, world, output):
    """A command line that works, as {flag: value}."""
    data = {"--dataset": "folder", "--data-dir": world / "images", "--device": "cpu"}
    training = data | {"--image-size": 32, "--arch": "resnet10_narrow", "--batch-size": 8, "--epochs": 1, "--views-dir": "none",
                       "--output-dir": output, "--quality": "exact", "--encoder": world / "clip", "--gamma": 1, "--seed": 0,
                       "--limit": 16, "--lr": 0.01, "--weight-decay": 0, "--warmup-epochs": 0, "--optimizer": "sgd", "--knn-every": 1,
                       "--component": world / "component.npy", "--log-every": 1, "--workers": 0, "--save-minutes": 1}
    return {"train_moco": training | {"--queue": 16, "--temperature": 0.2, "--momentum": 0.9, "--dim": 8, "--method": "mocov2",
                                      "--crop-min": 0.2, "--blur": 0, "--start-batches": 1, "--views": "pair", "--noise": "adaptive"},
            "train_byol": training | {"--dim": 8, "--hidden": 8, "--method": "simsiam"},
            "train_swav": training | {"--dim": 8, "--hidden": 8, "--prototypes": 4, "--epsilon": 0.05, "--small-crops": 1,
                                      "--small-size": 16, "--small-min": 0.1, "--freeze-epochs": 0},
            "eval_linear": data | {"--checkpoint": world / "run/last.pt", "--protocol": "finetune", "--labels": 0.5, "--epochs": 1,
                                   "--batch-size": 4, "--lr": 0.1, "--backbone-lr": 0.1, "--image-size": 32, "--arch":
                                   "resnet10_narrow", "--k": 3, "--limit": 16, "--workers": 0, "--seed": 0},
            "generate_views": data | {"--model": world / "pipeline", "--views-dir": output, "--steps": 1, "--guidance": 1, "--size": 32,
                                      "--save-size": 32, "--noise": 100, "--seed": 0, "--fit-images": 4, "--limit": 2,
                                      "--batch-size": 2, "--dtype": "float32", "--solver": "own",
                                      "--component": world / "component.npy"}}[name]


MAINS = {"train_moco": train_moco.main, "train_byol": train_byol.main, "train_swav": train_swav.main, "eval_linear": eval_linear.main,
         "generate_views": generate_views.main}


class Hang(Exception):
    pass


@pytest.fixture(scope="module", autouse=True)
def deep(tmp_path_factory):
    """Where the calls are made, so that "../.." and the like lead nowhere that matters."""
    global here
    here = tmp_path_factory.mktemp("here") / "a/b/c"
    here.mkdir(parents=True)


def call(name, flags):
    """Exit status and the last line on stderr of a script with these flags, in process; Hang after SECONDS."""
    def hang(*_):
        raise Hang(f"{name} {flags}")
    said, before = io.StringIO(), signal.signal(signal.SIGALRM, hang)
    signal.alarm(SECONDS)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", [f"{name}.py", *flags])
            patch.chdir(here)
            try:
                support.world.script(MAINS[name])
                status = 0
            except SystemExit as stop:
                status = stop.code or 0
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    lines = [line for line in re.split(r"[\r\n]+", said.getvalue()) if line.strip()]
    return status, lines[-1] if lines else ""


def bad_lines(world, count, seed=0):
    """Seeded command lines, each with one or two values replaced by what does not belong there."""
    draw = random.Random(seed)
    things = [str(world / n) for n in ("empty", "nothing.pt", "noise.pt", "text.json", "other.pt", "list.pt", "odd.pt", "zip.pt",
                                       "short.npy", "odd.npz", "clip", "pipeline", "images", "nowhere", "images/train/cat/0001.png")]
    for number in range(count):
        name = draw.choice(list(MAINS))
        flags = good(name, world, world / f"out-{number}")
        for flag in draw.sample(list(flags), draw.choice([1, 1, 2])):
            likely = things if isinstance(flags[flag], Path) else NUMBERS if not isinstance(flags[flag], str) else TEXTS
            flags[flag] = draw.choice(likely if draw.random() < 0.8 else TEXTS + things)
        line = [str(x) for pair in flags.items() for x in pair]
        if draw.random() < 0.1:
            line[draw.randrange(len(line))] = draw.choice(TEXTS + ["--resume", "--resum"])
        yield name, line


def test_the_good_lines_work(world):
    for name in MAINS:
        status, said = call(name, [str(x) for pair in good(name, world, world / f"good-{name}").items() for x in pair])
        assert status == 0, said


def test_200_bad_command_lines(world, request):
    """A traceback would be an exception that leaves support.world.run: it fails this test."""
    refused = 0
    for name, line in bad_lines(world, 1000):      # some replaced values happen to be right
        if refused == 200:
            break
        status, said = call(name, line)
        assert status in (0, 2), (name, line, said)
        if status:
            refused += 1
            assert re.match(r"(error: .{10,})", said), (name, line, said)
        if request.config.getoption("--messages") and status:
            with request.config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
                print(said.replace(str(world), "..."))
    assert refused == 200


@pytest.mark.parametrize("name, more, text", [
    ("train_moco", {"--optimizer": "adam"}, "invalid choice: 'adam'"),
    ("train_moco", {"--batch-size": 1, "--queue": 1}, "batch normalisation needs two images"),
    ("train_moco", {"--device": "meta"}, "--device meta is not available"),
    ("train_moco", {"--image-size": 80, "--arch": "googlenet"}, "--arch googlenet is not supported"),
    ("train_moco", {"--quality": "cached"}, "invalid choice: 'cached'"),
    ("train_swav", {"--arch": "vit_narrow"}, "--small-crops 0"),
    ("train_swav", {"--small-size": 64}, "must be at most --image-size 32"),
    ("eval_linear", {"--checkpoint": "vit.pt", "--arch": "vit_narrow", "--image-size": 64}, "for pictures of 32 pixels")])
def test_what_is_wrong_is_named(name, more, text, world, tmp_path):
    torch.save(support.networks.make_backbone("vit_narrow", 32)[0].state_dict(), world / "vit.pt")
    more = {flag: world / value if (world / str(value)).exists() else value for flag, value in more.items()}
    status, said = call(name, [str(x) for pair in (good(name, world, tmp_path / "run") | more).items() for x in pair])
    assert status == 2 and text in said, said


def test_too_large_is_named(world, tmp_path):
    """Petabytes, which no system grants."""
    flags = good("train_swav", world, tmp_path / "run") | {"--hidden": 10 ** 12}
    status, said = call("train_swav", [str(x) for pair in flags.items() for x in pair])
    assert status == 2 and said.startswith("error: out of memory")


def bad_pictures(folder):
    """One train folder's worth of pictures that are wrong or strange: {name: can it be used?}."""
    picture = Image.open(folder / "0000.png").convert("RGB")
    rng, made = np.random.default_rng(0), {}

    def save(name, usable, image=None, content=None, **options):
        made[name] = usable
        if content is not None:
            (folder / name).write_bytes(content)
        else:
            image.save(folder / name, **options)
    whole = (folder / "0000.png").read_bytes()
    jpeg = io.BytesIO()
    picture.save(jpeg, "JPEG")
    save("zero.png", False, content=b"")
    for k in (1, 8, 30, 100, len(whole) // 2, len(whole) - 60):
        save(f"cut-{k}.png", False, content=whole[:k])
    for k in (2, 20, 200, len(jpeg.getvalue()) // 2):
        save(f"cut-{k}.jpg", False, content=jpeg.getvalue()[:k])
    for k in range(6):
        save(f"noise-{k}.{['png', 'jpg', 'bmp', 'webp', 'ppm', 'tif'][k]}", False, content=rng.bytes(500))
    save("text.jpg", False, content=b"hello, this is no picture")
    save("page.png", False, content=b"<html>404</html>")
    save("zip.png", False, content=b"PK\x03\x04" + rng.bytes(100))
    save("pickle.png", False, content=b"\x80\x04cos\nsystem\n(S'touch hacked'\ntR.")
    header = b"\x89PNG\r\n\x1a\n"
    import struct
    import zlib
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
    bomb = header + chunk(b"IHDR", struct.pack(">IIBBBBB", 60000, 60000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    save("bomb.png", False, content=bomb)
    large = header + chunk(b"IHDR", struct.pack(">IIBBBBB", 11000, 11000, 8, 2, 0, 0, 0)) + chunk(b"IDAT", zlib.compress(b"0")) + chunk(b"IEND", b"")
    save("large.png", False, content=large)
    save("tiny.png", True, Image.new("RGB", (1, 1), "red"))
    save("line.png", True, Image.new("RGB", (500, 1), "red"))
    save("column.jpg", True, Image.new("RGB", (1, 300), "red"))
    for mode in ("L", "LA", "P", "1", "RGBA", "I;16", "I", "F"):
        image = picture.convert("L").convert(mode) if mode not in ("I;16",) else Image.fromarray(
            np.asarray(picture.convert("L")).astype(np.uint16) * 257)
        save(f"mode-{mode.replace(';', '')}.{'tif' if mode in 'FI' else 'png'}", True, image)
    save("cmyk.jpg", True, picture.convert("CMYK"))
    save("ycbcr.jpg", True, picture.convert("YCbCr"))
    save("lab.tif", True, picture.convert("LAB"))
    exif = Image.Exif()
    exif[0x0112] = 6
    save("turned.jpg", True, picture, exif=exif)
    save("broken-exif.jpg", True, content=jpeg.getvalue()[:2] + b"\xff\xe1\x00\x10Exif\x00\x00MM\x00*\xff\xff" + jpeg.getvalue()[2:])
    save("many frames.webp", True, picture, save_all=True, append_images=[picture.rotate(90)])
    for name in ("é ü.png", " blank.png", "a'b\"c.png", "$(touch hacked).png", "%s{}.png", "\U0001f600.png", "..hidden.png", "-flag.png",
                 "x" * 200 + ".png", "new\nline.png", "UPPER.PNG"):
        save(name, True, picture, format="PNG")
    return made


def test_60_bad_images(world, tmp_path):
    """Generation leaves out what cannot be read and makes a view of all the rest; training names the first and stops, with
    --skip-bad it goes on; 16-bit pictures and turned ones come out right."""
    shutil.copytree(world / "images", tmp_path / "images")
    made = bad_pictures(tmp_path / "images/train/cat")
    assert len(made) >= 50 and sum(made.values()) >= 20
    flags = good("generate_views", world, tmp_path / "views") | {"--data-dir": tmp_path / "images", "--limit": 1000}
    status, said = call("generate_views", [str(x) for pair in flags.items() for x in pair])
    assert status == 0, said
    lines = (tmp_path / "views/manifest.jsonl").read_text().splitlines()
    manifest = {json.loads(line)["source"] for line in lines}
    for name, usable in made.items():
        assert (f"train/cat/{name}" in manifest) == usable, name
        assert (tmp_path / "views/train/cat" / name).with_suffix(".png").exists() == usable or not usable
    assert len(manifest) == 16 + sum(made.values()) and not list(here.glob("hacked*"))
    for size in (32, 72):
        flags = good("train_moco", world, tmp_path / f"run-{size}") | {"--data-dir": tmp_path / "images", "--limit": 1000, "--image-size": size,
                                                                       "--views-dir": tmp_path / "views", "--quality": "off"}
        line = [str(x) for pair in flags.items() for x in pair]
        status, said = call("train_moco", line)
        assert status == 2 and "cannot be read as an image" in said and "--skip-bad" in said, said
        status, said = call("train_moco", line + ["--skip-bad"])
        assert status == 0, said
    deep, flat = (np.asarray(support.data.open_image(tmp_path / "images/train/cat" / name)).astype(int) for name in ("mode-I16.png", "mode-L.png"))
    assert abs(deep - flat).max() <= 1
    turned = np.asarray(support.data.open_image(tmp_path / "images/train/cat/turned.jpg")).astype(int)
    upright = np.asarray(support.data.open_image(tmp_path / "images/train/cat/0000.png").rotate(-90)).astype(int)
    assert abs(turned - upright).mean() < 15


def bad_folders(world, folder):
    """Data folders that are wrong in one way each: {name: path}."""
    made = {}

    def new(name, *parts):
        made[name] = folder / name
        path = folder.joinpath(name, *parts)
        path.mkdir(parents=True)
        return path
    new("empty")
    new("no test", "train", "cat")
    shutil.copytree(world / "images", folder / "classes without pictures")
    made["classes without pictures"] = folder / "classes without pictures"
    for path in (folder / "classes without pictures/train").rglob("*.png"):
        path.unlink()
    shutil.copytree(world / "images", folder / "only pictures at the top")
    made["only pictures at the top"] = folder / "only pictures at the top"
    for path in sorted((folder / "only pictures at the top/train").rglob("*.png")):
        path.rename(folder / "only pictures at the top/train" / f"{path.parent.name}{path.name}")
    (folder / "a file").write_text("")
    made["a file"] = folder / "a file"
    made["nowhere"] = folder / "nowhere"
    shutil.copytree(world / "images", folder / "train is a file")
    shutil.rmtree(folder / "train is a file/train")
    (folder / "train is a file/train").write_text("x")
    made["train is a file"] = folder / "train is a file"
    shutil.copytree(world / "images", folder / "a loop")
    (folder / "a loop/train/cat/loop").symlink_to(folder / "a loop/train")
    made["a loop"] = folder / "a loop"
    shutil.copytree(world / "images", folder / "dangling")
    for path in sorted((folder / "dangling/train/cat").iterdir()):
        path.unlink()
        path.symlink_to(folder / "gone.png")
    made["dangling"] = folder / "dangling"
    shutil.copytree(world / "images", folder / "a folder for a picture")
    (folder / "a folder for a picture/train/cat/0099.png").mkdir()
    made["a folder for a picture"] = folder / "a folder for a picture"
    return made


def test_bad_folders(world, tmp_path):
    fine = {"a loop", "a folder for a picture"}
    for name, path in bad_folders(world, tmp_path).items():
        for script in ("train_moco", "generate_views"):
            flags = good(script, world, tmp_path / f"out {script} {name}") | {"--data-dir": path, "--limit": 1000}
            status, said = call(script, [str(x) for pair in flags.items() for x in pair])
            left_out = name == "dangling" and script == "generate_views"
            generates = script == "generate_views" and name == "no test"
            assert status == (0 if name in fine or left_out else 2), (script, name, said)
            assert not status or said.startswith("error: ") or generates, said


def test_bad_views_folders(world, tmp_path):
    """Views, their settings and records from strangers: refused or ignored, and nothing is written outside."""
    settings = ["[]", "", "{", '"text"', '{"dataset": 3}', "null", "\x00"]
    for number, text in enumerate(settings):
        folder = tmp_path / f"views-{number}"
        folder.mkdir()
        (folder / "settings.json").write_text(text)
        for script in ("train_moco", "generate_views"):
            flags = good(script, world, tmp_path / f"run-{number}") | {"--views-dir": folder}
            status, said = call(script, [str(x) for pair in flags.items() for x in pair])
            assert status == 2 and said.startswith("error: "), (script, text, said)
    flags = [str(x) for pair in good("generate_views", world, tmp_path / "good").items() for x in pair]
    assert call("generate_views", flags)[0] == 0
    manifest = tmp_path / "good/manifest.jsonl"
    manifest.write_text(manifest.read_text() + json.dumps({"source": "../../../escape.png", "noise_level": 0}) + "\n[]\n3\nnull\n{}\n\x00\n")
    status, said = call("generate_views", flags)
    assert status == 0, said
    manifest.write_bytes(manifest.read_bytes().replace(b'"noise_level": 100', b'"noise_level": "x"') + b"\xff\n")     # to be made again
    assert call("generate_views", flags)[0] == 0 and manifest.read_bytes().endswith(b'"seed": ' + manifest.read_bytes().split(b": ")[-1])
    manifest.rename(tmp_path / "elsewhere")
    manifest.symlink_to(tmp_path / "elsewhere")
    before = (tmp_path / "elsewhere").read_bytes()
    shutil.rmtree(tmp_path / "good/train/dog")
    status, said = call("generate_views", flags)
    assert status == 2 and "manifest.jsonl" in said and (tmp_path / "elsewhere").read_bytes() == before, said
    manifest.unlink()
    outside = tmp_path / "outside"
    outside.mkdir()
    shutil.rmtree(tmp_path / "good/train/cat")
    (tmp_path / "good/train/cat").symlink_to(outside)                              # a way out
    status, said = call("generate_views", flags)
    assert status == 2 and "is a symbolic link out of" in said and not list(outside.iterdir()), said


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_a_pickle_that_would_write_a_file_is_refused_everywhere(world, tmp_path):
    """As checkpoint, component, frozen encoder and pipeline: one line, no file."""
    import pickle
    target = tmp_path / "hacked"
    for name in ("last.pt", "component.npy", "foreground.npz"):
        with open(tmp_path / name, "wb") as file:
            pickle.dump({"model": Bomb(str(target)), "component": Bomb(str(target))}, file)
    np.save(tmp_path / "object.npy", np.array([Bomb(str(target))], dtype=object), allow_pickle=True)
    torch.save({"model": Bomb(str(target))}, tmp_path / "zip.pt")
    clip, pipeline = tmp_path / "clip", tmp_path / "pipeline"
    shutil.copytree(world / "clip", clip)
    shutil.copytree(world / "pipeline", pipeline)
    for weights in [*clip.rglob("*.safetensors"), *pipeline.rglob("*.safetensors")]:
        torch.save({"weight": Bomb(str(target))}, weights.with_name(
            "pytorch_model.bin" if weights.name == "model.safetensors" else "diffusion_pytorch_model.bin"))
        weights.unlink()
    target.unlink(missing_ok=True)                 # nothing above may have made it
    cases = [("train_moco", {"--resume": tmp_path / "last.pt"}), ("train_moco", {"--resume": tmp_path / "zip.pt"}),
             ("eval_linear", {"--checkpoint": tmp_path / "last.pt"}), ("eval_linear", {"--checkpoint": tmp_path / "zip.pt"}),
             ("train_moco", {"--encoder": clip}), ("generate_views", {"--model": pipeline}), ("generate_views", {"--model": clip})]
    cases += [(script, {"--component": tmp_path / name}) for script in ("train_moco", "generate_views")
              for name in ("component.npy", "foreground.npz", "object.npy")]
    for number, (script, flags) in enumerate(cases):
        line = [str(x) for pair in (good(script, world, tmp_path / f"out-{number}") | flags).items() for x in pair]
        status, said = call(script, line)
        assert status == 2 and said.startswith("error: ") and not target.exists(), (script, flags, said)
