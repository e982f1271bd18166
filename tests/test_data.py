"""What belongs to a data set and what does not: files that are no pictures, damaged ones, strange
pixels, views of pictures that have changed."""
import json
import os
import re
import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from running import call, end, json_lines, refusal, start_two

import eval_linear
import generate_views
import train_moco
from genview import load_images
from support import data, pictures
from support import views as views_on_disk
from support.command_line import Parser, UserError
from support.data import find_files, open_image
from support.views import find_views

SMALL = ["--dataset=folder", "--batch-size=4", "--queue=8", "--device=cpu", "--epochs=1",
         "--workers=0", "--start-batches=1"]


@pytest.fixture
def folder(tmp_path):
    """Twelve training pictures of cats and dogs, and as many to test on."""
    return Path(tiny.save_images(tmp_path / "data", per_class=6))


def train(folder, output, *flags, size=32):
    """A run of train_moco.py; its label."""
    arch = "resnet10_narrow" if size <= 64 else "resnet18"
    call(train_moco, *SMALL, "--data-dir", folder, "--image-size", size, "--arch", arch,
         "--output-dir", output, "--quality=off", *flags)
    return json.loads((output / "args.json").read_text())["label"]


def generate(folder, views, *flags):
    call(generate_views, "--dataset=folder", "--data-dir", folder, "--model=mini", "--views-dir",
         views, "--fit-images=8", "--device=cpu", *flags)


# ---------------------------------------------------------------------- what is part of a data set
def test_what_is_no_picture_is_left_out_at_any_depth_and_counted(folder, capsys):
    pixels = (folder / "train/cat/0000.png").read_bytes()
    strange = ["._0000.png", "cat/._0000.png", "cat/@eaDir/0000.png", "@eaDir/a/0000.png",
               "__MACOSX/cat/0000.png", "cat/deep/__MACOSX/0.png", "lost+found/0.png",
               "dog/.trash/deep/0.png", ".DS_Store", "0000.png"]
    for name in strange:
        path = folder / "train" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pixels)
    (folder / "train/cat/deep/1.png").write_bytes(pixels)
    images = find_files(folder, "train")
    assert len(images.names) == 13 and images.names[6] == "train/cat/deep/1.png"
    assert images.labels.tolist() == [0] * 7 + [1] * 6
    assert "13 images, 2 of 2 classes; 10 other files are left out" in capsys.readouterr().out
    for path in (folder / "train").glob("[cd]*/*"):
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert find_files(folder, "train").names == ["train/0000.png"]   # without labels
    assert "; 5 other files are left out" in capsys.readouterr().out


def test_views_are_not_looked_for_among_what_is_no_picture(folder, tmp_path):
    views = tiny.save_views(folder, tmp_path / "views")
    for name in ("train/cat/._0000.png", "train/cat/@eaDir/0001.png"):
        (views / name).parent.mkdir(exist_ok=True)
        (views / name).write_bytes(b"\0\5\x16\7")
    images = load_images("folder", folder, "train", 32)
    assert all("@" not in str(path) for path in find_views(images, views, "folder"))
    assert len(data.image_files(views)) == 12


def test_an_empty_class_is_named_and_refused_in_train(folder, capsys):
    for split in ("train", "test"):
        (folder / split / "eel").mkdir()
    (folder / "train/eel/0.gif").touch()
    with pytest.raises(UserError, match=r"no images in eel \(1 files such as eel/0.gif are not"):
        find_files(folder, "train")
    shutil.copy(folder / "train/cat/0000.png", folder / "train/eel")
    find_files(folder, "train")
    capsys.readouterr()
    find_files(folder, "test")
    assert "12 images, 2 of 3 classes, none in eel\n" in capsys.readouterr().out


def test_one_class_gives_no_accuracy(folder, tmp_path, capsys):
    for split in ("train", "test"):
        shutil.rmtree(folder / split / "dog")
    line = refusal(capsys, train, folder, tmp_path / "run", "--views-dir=none")
    assert "one class folder in train/, kNN needs two: add --knn-every 0" in line
    train(folder, tmp_path / "run", "--views-dir=none", "--knn-every=0")
    line = refusal(capsys, call, eval_linear, "--checkpoint", tmp_path / "run/last.pt", "--device",
                   "cpu")
    assert "one class folder in train/" in line


def test_two_classes_of_which_one_cannot_be_read_are_one(folder, tmp_path):
    for path in folder.glob("*/dog/*"):
        path.write_bytes(b"no picture")
    with pytest.raises(UserError, match="images of one class alone in train/, kNN needs two"):
        train(folder, tmp_path / "run", "--views-dir=none", "--skip-bad", "--batch-size=4",
              "--queue=4")


# ---------------------------------------------------------------------------------- damaged files
@pytest.mark.parametrize("size", [32, 72])
def test_skip_bad_leaves_out_names_once_and_counts(folder, size, tmp_path, capsys):
    """In training, evaluation and among the views: no figure knows of the damaged files, and many
    of them are no deeper than one."""
    views = tiny.save_views(folder, tmp_path / "views")
    (views / "train/dog/0003.png").write_bytes(b"no view")
    bad = [folder / f"train/cat/x{i}.png" for i in range(3)] + [folder / "test/cat/x.png"]
    for path in bad:
        path.write_bytes(b"no picture")
    label = train(folder, tmp_path / "run", "--views-dir", views, "--skip-bad", size=size)
    assert label == ("MoCo v2 + GenView's views of 11 of 12 images, 4 unreadable images left out")
    said = capsys.readouterr()
    assert all(said.err.count(f"left out: {path} cannot") == 1 for path in bad)
    assert said.err.count("left out: ") == 5 and f"({label})" in said.out
    call(eval_linear, "--checkpoint", tmp_path / "run/last.pt", "--protocol=knn", "--k=3",
         "--skip-bad", "--device=cpu", "--workers=0")
    assert "(fitted on 12 labelled images, 4 unreadable images left out)" in capsys.readouterr().out


def test_a_class_of_which_nothing_can_be_read_is_named(folder, capsys):
    for path in folder.glob("train/cat/*"):
        path.write_bytes(b"no picture")
    images = load_images("folder", folder, "train", 32, skip_bad=True)
    assert images.labels.tolist() == [1] * 6 and images.left_out == 6
    [again] = data.read_squares(images._replace(pixels=None), range(6), 32)
    assert torch.equal(images.pixels, again)
    assert "*** no image of cat can be read" in capsys.readouterr().out
    with pytest.raises(UserError, match="none of the 1 images .* can be read"):
        load_images("folder", folder, "train", 99, limit=1, skip_bad=True)


def test_a_run_may_go_on_without_a_picture_that_broke(folder, tmp_path, capsys):
    """And with it again; both are said."""
    flags = ["--views-dir=none", "--knn-every=0"]
    train(folder, tmp_path / "run", *flags)
    broken = folder / "train/cat/0002.png"
    whole = broken.read_bytes()
    broken.write_bytes(b"no picture")
    label = train(folder, tmp_path / "run", *flags, "--resume", "--skip-bad")
    assert label.endswith(", 1 unreadable images left out")
    count = len(list((folder / "train").rglob("*.png")))
    assert f"*** images: the run that goes on had {count} images" in capsys.readouterr().out
    broken.write_bytes(whole)
    train(folder, tmp_path / "run", *flags, "--resume", "--skip-bad")
    assert f"images: the run that goes on had {count - 1} images" in capsys.readouterr().out


def test_processes_leave_out_the_same(folder, tmp_path):
    """Each opens its share; a file that only one of them cannot read is left out by both."""
    for number in (1, 4):
        (folder / f"train/dog/000{number}.png").write_bytes(b"no picture")

    def work():
        rank = int(os.environ["RANK"])
        torch.distributed.init_process_group("gloo")
        images = find_files(folder, "train")
        seen = [data.without_unreadable(images).names]
        if rank == 1:
            lost = tmp_path / "copy/train/cat/0000.png"
            shutil.copytree(folder, tmp_path / "copy")
            lost.unlink()
            images = images._replace(root=tmp_path / "copy")
        small = data.into_memory(images, 32, skip_bad=True)
        seen += [small.names, int(small.pixels.double().sum())]
        (tmp_path / f"seen-{rank}").write_text(json.dumps(seen))
    assert end(*start_two([work, work], tmp_path)) == [0, 0]
    first, second = (json.loads((tmp_path / f"seen-{rank}").read_text()) for rank in (0, 1))
    large = [f"train/cat/000{i}.png" for i in range(6)]
    large += [f"train/dog/000{i}.png" for i in (0, 2, 3, 5)]
    assert first == second and first[:2] == [large, large[1:]]
    assert (tmp_path / "0").read_text().count("dog/0001.png cannot") == 2       # once a reading
    assert not (tmp_path / "1").read_text()


def test_workers_read_what_one_process_reads(folder, monkeypatch, capsys):
    (folder / "train/dog/0001.png").write_bytes(b"no picture")
    alone = load_images("folder", folder, "train", 16, skip_bad=True)
    monkeypatch.setattr(data, "FEW", 3)
    monkeypatch.setattr(data, "READ_AT_ONCE", 5)
    before = torch.get_rng_state()
    shared = load_images("folder", folder, "train", 16, skip_bad=True, workers=2)
    assert torch.equal(alone.pixels, shared.pixels) and alone.names == shared.names
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(UserError, match="dog/0001.png cannot .* with --skip-bad"):
        load_images("folder", folder, "train", 16, skip_bad=False, workers=2)
    assert load_images("folder", folder, "train", 99, skip_bad=True, workers=2).left_out == 1


# ------------------------------------------------------------------------------------------ pixels
@pytest.mark.parametrize("values, top", [
    (np.float32, 1), (np.float32, 255), (np.float32, 65535), (np.int32, 255), (np.int32, 65535),
    (np.uint16, 65535), (np.uint16, 255), (np.uint8, 255)])
def test_pixels_of_any_depth_are_the_same_picture(values, top, tmp_path):
    grey = np.linspace(0, 255, 64).round().reshape(8, 8)
    content = grey * top / 255 if values is np.float32 else (grey * top / 255).round()
    Image.fromarray(content.astype(values)).save(tmp_path / "x.tif")
    got = np.asarray(open_image(tmp_path / "x.tif"))[..., 0].astype(int)
    assert abs(got - grey).max() <= 1
    Image.fromarray(np.zeros((8, 8), values)).save(tmp_path / "x.tif")          # black is black
    assert not np.asarray(open_image(tmp_path / "x.tif")).any()


@pytest.mark.parametrize("values", [[-1, 1], [0, 5], [0, 1e6], [0, 4095], [0, np.nan], [0, np.inf]])
def test_values_of_no_known_scale_are_refused(values, tmp_path):
    Image.fromarray(np.array([values] * 2, np.float32)).save(tmp_path / "x.tif")
    with pytest.raises(UserError, match="x.tif cannot be read .*fit neither 0 to 1"):
        open_image(tmp_path / "x.tif")


def test_twelve_bits_in_sixteen_are_refused_and_not_black(tmp_path):
    Image.fromarray(np.array([[0, 4000]] * 2, np.uint16)).save(tmp_path / "x.png")
    with pytest.raises(UserError, match="x.png cannot be read .*fit neither 0 to 1"):
        open_image(tmp_path / "x.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_a_picture_is_turned_as_exif_says_or_left_where_it_is_damaged(suffix, tmp_path):
    path = tmp_path / f"x.{suffix}"
    picture = Image.new("RGB", (80, 60), "grey")
    picture.paste("red", (0, 0, 80, 20))
    exif = Image.Exif()
    for turn, side in [(1, "top"), (3, "bottom"), (6, "right"), (8, "left")]:
        exif[0x0112] = turn
        picture.save(path, exif=exif)
        got = open_image(path)
        assert got.size == ((60, 80) if turn in (6, 8) else (80, 60))
        width, height = got.size
        x = {"right": width - 5, "left": 5}.get(side, width // 2)
        y = {"top": 5, "bottom": height - 5}.get(side, height // 2)
        assert got.getpixel((x, y))[0] > 200 and got.getpixel((x, y))[1] < 60, turn
    if suffix == "tif":
        return                                     # its tags are the file: no block of their own
    picture.save(path)
    if suffix == "png":                            # PIL itself writes no damaged block
        body, whole = b"no EXIF at all", path.read_bytes()
        chunk = struct.pack(">I", len(body)) + b"eXIf" + body
        chunk += struct.pack(">I", zlib.crc32(b"eXIf" + body))
        path.write_bytes(whole[:33] + chunk + whole[33:])
    else:
        picture.save(path, exif=b"Exif\0\0nothing of the kind")
    assert open_image(path).size == (80, 60)


def test_a_warning_of_pillow_comes_once_for_all_files(tmp_path, capfd, monkeypatch):
    """By one process and by the workers of a loader."""
    pictures.show_warning.cache_clear()
    palette = Image.new("P", (8, 8))
    palette.putpalette([0, 0, 0, 255, 255, 255])
    for number in range(5):
        palette.save(tmp_path / f"{number}.png", transparency=b"\x10\x20")
    names = [f"{number}.png" for number in range(5)]
    for name in names:
        open_image(tmp_path / name)
    pictures.show_warning.cache_clear()
    images = data.Images(names, torch.zeros(5), 1, root=tmp_path)
    monkeypatch.setattr(data, "FEW", 3)
    monkeypatch.setattr(data, "READ_AT_ONCE", 2)
    data.into_memory(images, 8, False, workers=2)
    said = capfd.readouterr()
    assert said.out.count("*** images that can be read, but Pillow says: Palette images") == 2
    assert said.out.count("\n") == 2 and not said.err


def test_what_is_no_file_is_refused_in_one_line(tmp_path):
    """A pipe is not waited for; a line break in a name does not break the message."""
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "a\nb.jpg").write_bytes(b"no picture")
    for name, reason in [("pipe.jpg", "it is no regular file"), ("a\nb.jpg", "cannot identify")]:
        with pytest.raises(UserError) as error:
            open_image(tmp_path / name)
        assert reason in str(error.value) and "\n" not in str(error.value)
    images = data.Images(["pipe.jpg"], torch.zeros(1), 1, root=tmp_path)
    assert views_on_disk.file_mark(images, "pipe.jpg") == ""


def test_a_folder_that_cannot_be_listed_is_named(folder, monkeypatch, capsys):
    scandir = os.scandir

    def refuse(path):
        if str(path).endswith(("dog", "lost+found")):
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)
    monkeypatch.setattr(os, "scandir", refuse)
    line = refusal(capsys, data.sort_out, folder)
    assert re.fullmatch("Permission denied: .*dog", line)
    (folder / "train/cat/lost+found").mkdir()      # of the system, which alone may look into it
    assert len(data.sort_out(folder / "train/cat")[0]) == 6


def test_a_name_as_long_as_a_disk_allows(folder, tmp_path):
    name = 251 * "x"
    (folder / "train/cat/0000.png").rename(folder / f"train/cat/{name}.png")
    generate(folder, tmp_path / "views")
    assert (tmp_path / f"views/train/cat/{name}.png").exists()


def test_links_that_lead_back_are_not_followed(folder, tmp_path):
    """To a folder around the link, and to each other; a link to another folder is followed."""
    os.symlink("../dog", folder / "train/cat/x")
    os.symlink("../cat", folder / "train/dog/x")
    os.symlink("..", folder / "train/cat/up")
    os.symlink(folder / "train", tmp_path / "train")
    names = find_files(tmp_path, "train").names
    assert len(names) == 24 and "train/cat/x/0000.png" in names
    assert len([name for name in names if name.count("/x/") > 1]) == 0


def test_a_far_too_large_picture_is_refused(tmp_path, monkeypatch):
    Image.new("L", (30, 30)).save(tmp_path / "x.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 800)
    with pytest.raises(UserError, match="exceeds limit"):
        open_image(tmp_path / "x.png")


# ------------------------------------------------------------------- views of pictures that change
@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Pictures and their views by the miniature."""
    folder = tmp_path_factory.mktemp("made")
    tiny.save_images(folder / "data", per_class=6)
    generate(folder / "data", folder / "views")
    return folder


@pytest.fixture
def copy(made, tmp_path):
    return shutil.copytree(made, tmp_path / "made")


def make_again(copy, capsys):
    """What another run of generate_views.py says."""
    capsys.readouterr()
    generate(copy / "data", copy / "views")
    return capsys.readouterr().out


def test_a_removed_or_added_picture_keeps_the_other_views(copy, tmp_path, capsys):
    (copy / "data/train/cat/0002.png").unlink()
    flags = ["--views-dir", copy / "views", "--knn-every=0"]
    assert train(copy / "data", tmp_path / "1", *flags) == "MoCo v2 + GenView's views"
    shutil.copy(copy / "data/test/cat/0000.png", copy / "data/train/cat/new.png")
    (copy / "data/train/owl").mkdir()
    shutil.copy(copy / "data/test/cat/0001.png", copy / "data/train/owl")
    part = "MoCo v2 + GenView's views of 11 of 13 images"
    assert train(copy / "data", tmp_path / "2", *flags) == part
    assert "2 views made, 11 there already, 0 skipped" in make_again(copy, capsys)
    assert train(copy / "data", tmp_path / "3", *flags) == "MoCo v2 + GenView's views"


def test_views_of_a_part_are_labelled(made, tmp_path):
    generate(made / "data", tmp_path / "views", "--limit=4")
    label = train(made / "data", tmp_path / "run", "--views-dir", tmp_path / "views",
                  "--knn-every=0", "--quality=exact", "--encoder=mini")
    assert label == "MoCo v2 + GenView's views of 4 of 12 images + quality weights"


@pytest.mark.parametrize("kind", ["bmp"])              # all of one size
def test_views_of_replaced_pictures_are_named_and_made_again(kind, tmp_path, capsys):
    folder = Path(tiny.save_images(tmp_path / "data", per_class=3, classes=("cat", "dog")))
    for path in folder.rglob("*.png") if kind == "bmp" else []:
        Image.open(path).save(path.with_suffix(".bmp"))
        path.unlink()
    generate(folder, tmp_path / "views")
    before = {path: path.read_bytes() for path in (tmp_path / "views").rglob("*.png")}
    (folder / "train/cat").rename(folder / "x")
    (folder / "train/dog").rename(folder / "train/cat")
    (folder / "x").rename(folder / "train/dog")
    capsys.readouterr()
    flags = ["--views-dir", tmp_path / "views", "--knn-every=0"]
    train(folder, tmp_path / "1", *flags)
    said = capsys.readouterr().out
    assert f"*** 6 of 6 images that were compared, such as train/cat/0000.{kind}, are not" in said
    generate(folder, tmp_path / "views")
    said = capsys.readouterr().out
    assert "*** 6 images are not those that their views" in said and "6 views made, 0 there" in said
    assert all(path.read_bytes() != content for path, content in before.items())
    generate(folder, tmp_path / "views")
    said = capsys.readouterr().out
    assert "***" not in said and "0 views made, 6 there already" in said


def test_views_of_another_set_are_refused(copy, tmp_path, capsys):
    """Its pictures have the same names, but for one more."""
    other = tiny.save_images(tmp_path / "other", per_class=7, seed=1)
    views = {path: path.read_bytes() for path in (copy / "views").rglob("*") if path.is_file()}
    for work in (lambda: train(other, tmp_path / "run", "--views-dir", copy / "views"),
                 lambda: generate(other, copy / "views")):
        line = refusal(capsys, work)
        assert "made for folder, 12 images" in line and "here is folder, 14 images" in line
        assert "name another --views-dir" in line and "remove" not in line
    assert all(path.read_bytes() == content for path, content in views.items())


def test_views_of_a_folder_are_those_of_imagenet_in_it(copy, tmp_path, capsys):
    """As long as the files are the same; others' disks have folders of their own in them."""
    (tmp_path / "new/lost+found").mkdir(parents=True)
    generate(copy / "data", tmp_path / "new", "--limit=2", "--dataset=imagenet")
    generate(copy / "data", tmp_path / "new")
    capsys.readouterr()
    (copy / "data/test").rename(copy / "data/val")
    label = train(copy / "data", tmp_path / "run", "--views-dir", copy / "views", "--knn-every=0",
                  "--dataset=imagenet", "--quality=off")
    assert label == "MoCo v2 + GenView's views"


def test_the_images_are_no_views_of_themselves(folder, tmp_path, capsys):
    for views in (folder, folder / "train"):
        assert "holds the images themselves" in refusal(
            capsys, train, folder, tmp_path / "run", "--views-dir", views)


def test_an_old_manifest_is_accepted(copy, tmp_path, capsys):
    """Without marks of the files; as long as the names are mostly the same."""
    lines = json_lines(copy / "views/manifest.jsonl")
    text = "".join(json.dumps({k: x for k, x in line.items() if k != "file"}) + "\n"
                   for line in lines)
    (copy / "views/manifest.jsonl").write_text(text)
    settings = json.loads((copy / "views/settings.json").read_text())
    assert settings.pop("weights") and settings.pop("component_file")
    (copy / "views/settings.json").write_text(json.dumps(settings | {"classes": 2}))
    assert "0 views made, 12 there already" in make_again(copy, capsys)
    (copy / "data/train/cat/0002.png").unlink()
    train(copy / "data", tmp_path / "run", "--views-dir", copy / "views", "--knn-every=0")
    assert "0 views made, 11 there already" in make_again(copy, capsys)


def test_the_comparison_is_a_sample(copy, monkeypatch, capsys):
    """Of the pictures of a large set some are looked at, spread over it."""
    monkeypatch.setattr(views_on_disk, "COMPARED", 3)
    looked = []
    real = views_on_disk.file_mark
    monkeypatch.setattr(views_on_disk, "file_mark", lambda images, name: looked.append(name) or
                        real(images, name))
    images = find_files(copy / "data", "train")
    find_views(images, copy / "views", "folder")
    assert looked == [images.names[i] for i in (0, 6, 11)]


# -------------------------------------------------------------------- one generator, several names
def test_a_generator_is_known_by_its_weights(pipeline_folder, folder, tmp_path, monkeypatch,
                                             capsys):
    """A slash, another place, the name on the hub and its folder in the cache."""
    hub = tmp_path / "hub"
    cached = hub / "models--someone--unclip/snapshots/0123"
    shutil.copytree(pipeline_folder, cached)
    (hub / "models--someone--unclip/refs").mkdir()
    (hub / "models--someone--unclip/refs/main").write_text("0123")
    for module in ("constants", "file_download"):              # where it is read
        monkeypatch.setattr(f"huggingface_hub.{module}.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.setattr("diffusers.pipelines.pipeline_utils.HF_HUB_CACHE", str(hub), raising=False)
    monkeypatch.chdir(Path(pipeline_folder).parent)
    name = Path(pipeline_folder).name

    def make(model, *flags):
        generate(folder, tmp_path / "views", "--model", model, "--steps=1", "--limit=2", *flags)
        return capsys.readouterr().out
    assert "2 views made" in make(name)
    for other in (f"{name}/", f"./{name}", pipeline_folder, cached, "someone/unclip"):
        assert "0 views made, 2 there already" in make(other), other
    other = shutil.copytree(pipeline_folder, tmp_path / "other")
    from safetensors.torch import load_file, save_file
    weights = load_file(other / "unet/diffusion_pytorch_model.safetensors")
    weights["conv_out.weight"] += 1
    save_file(weights, other / "unet/diffusion_pytorch_model.safetensors")
    line = refusal(capsys, make, other)
    assert f"model is {name} there and {other} here; name another --views-dir" in line
    assert "remove" not in line


def test_the_miniature_and_its_folder_are_one():
    """Their steps and guidance, too."""
    from genview import MINI
    for model in ("mini", MINI, f"{MINI}/", os.path.relpath(MINI)):
        args = generate_views.parse_args(["--dataset=folder", "--data-dir=x", f"--model={model}"])
        assert (args.steps, args.guidance) == (2, 1.25)


def test_a_component_is_known_by_its_content(folder, tmp_path, capsys):
    """One file under two names, and another file."""
    from genview import MINI
    size = json.loads((MINI / "image_encoder/config.json").read_text())["hidden_size"]
    np.save(tmp_path / "one.npy", np.ones((size, 1), np.float32))
    shutil.copy(tmp_path / "one.npy", tmp_path / "same.npy")
    np.save(tmp_path / "other.npy", np.arange(size, dtype=np.float32))
    for name in ("one", "same"):
        generate(folder, tmp_path / "views", "--limit=1", f"--component={tmp_path}/{name}.npy")
    line = refusal(capsys, generate, folder, tmp_path / "views", "--limit=1",
                   f"--component={tmp_path}/other.npy")
    assert "component is " in line


def test_home_is_where_a_tilde_says(monkeypatch):
    monkeypatch.setenv("HOME", "/home/someone")
    parser = Parser("x")
    parser.add_argument("--data-dir")
    parser.add_argument("--component")
    parser.add_argument("--model")
    args = parser.parse_args(["--data-dir=~/data", "--component", "~", "--model=a~b"])
    assert (args.data_dir, args.component, args.model) == ("/home/someone/data", "/home/someone",
                                                           "a~b")


def test_workers_read_the_pictures_of_the_foreground_in_order(folder, monkeypatch):
    """In memory, from files and by workers: the same squares in the same parts."""
    monkeypatch.setattr(data, "FEW", 3)
    monkeypatch.setattr(data, "READ_AT_ONCE", 4)
    images = load_images("folder", folder, "train", 65)
    indices = torch.tensor([0, 2, 3, 5, 7, 11])
    parts = {workers: list(data.read_squares(images, indices, 65, workers)) for workers in (0, 2)}
    assert [len(part) for part in parts[0]] == [4, 2]
    whole = torch.cat(parts[0])
    assert torch.equal(whole, torch.cat(parts[2]))
    small = load_images("folder", folder, "train", 32)
    expected = torch.stack([data.to_tensor(data.square(small.pil(i), 32)) for i in indices])
    assert torch.equal(torch.cat(list(data.read_squares(small, indices, 32))), expected)
    (folder / "train/cat/0002.png").write_bytes(b"no picture")
    for workers in (0, 2):
        with pytest.raises(UserError, match="0002.png cannot be read.*--skip-bad"):
            list(data.read_squares(images, indices, 65, workers))


def test_cifars_splits_and_pixels(tmp_path, monkeypatch):
    class Reader:
        """torchvision's; of its pictures the last is red in row 1, column 5."""
        filename = "archive"
        classes = ["a", "b"]

        def __init__(self, folder, train, download):
            self.data = np.zeros((4 if train else 2, 32, 32, 3), np.uint8)
            self.data[-1, 1, 5, 0] = 255
            self.targets = [0, 1, 0, 1][:len(self.data)]

        def __len__(self):
            return len(self.data)
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR100", Reader)
    for split, count in (("train", 4), ("test", 2)):
        images = data.read_cifar("cifar100", tmp_path, split)
        assert images.names == [f"{split}/{i:05d}" for i in range(count)]
        assert images.labels.tolist() == [0, 1, 0, 1][:count]
        assert (images.pixels > 0).nonzero().tolist() == [[count - 1, 0, 1, 5]]


def test_the_suffixes_of_pictures(tmp_path):
    names = ["a.JPEG", "b.jpeg", "c.jpg", "d.PNG", "e.bmp", "f.webp", "g.tif", "h.tiff", "i.ppm"]
    for name in [*names, "notes.txt", "list.csv"]:
        (tmp_path / name).touch()
    found, others = data.sort_out(tmp_path)
    assert [path.name for path in found] == names
    assert [path.name for path in others] == ["list.csv", "notes.txt"]


@pytest.mark.parametrize("size", [(96, 32), (32, 96)])
def test_the_square_is_the_centre(size):
    """Of a picture in thirds of red, green and blue."""
    picture = Image.new("RGB", size, "red")
    across = size[0] > size[1]
    picture.paste("lime", (32 * across, 32 * (not across), *size))
    picture.paste("blue", (64 * across, 64 * (not across), *size))
    centre = pictures.to_tensor(pictures.square(picture, 32))
    assert (centre[:, 3:-3, 3:-3] == torch.tensor([0, 255, 0])[:, None, None]).all()


def test_views_are_jpegs_of_quality_95(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    view = Image.fromarray(noise)
    folder = views_on_disk.ViewFolder(tmp_path / "views", ".jpg")
    folder.write(view, source="a/b.png", noise_level=0)
    view.save(tmp_path / "wanted.jpg", quality=95)
    assert folder.path("a/b.png").read_bytes() == (tmp_path / "wanted.jpg").read_bytes()
