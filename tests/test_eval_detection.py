"""eval_detection.py on a small set in COCO's format: squares on noise."""
import builtins
import copy
import functools
import json
import math
import os
import re
import shutil
import time
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from running import CPU, before_call, call, end, fail, held, json_lines, refusal, start_two
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

import eval_detection
import train_moco
from support.coco import box_of_runs
from support.command_line import UserError
from support.networks import make_backbone
from support.pretrained import load_checkpoint


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder with train2017, val2017 and annotations: one square and one crowd in each picture,
    the last one empty."""
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (folder / "annotations").mkdir()
    categories = [dict(id=1, name="a"), dict(id=3, name="b")]
    for split, count in (("train", 7), ("val", 3)):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            picture = rng.integers(0, 90, (96, 120, 3), dtype=np.uint8)
            x, y, side = (int(n) for n in rng.integers(8, 40, 3))
            if i < count - 1:
                picture[y:y + side, x:x + side] = (255, 255 * (i % 2), 0)
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                crowd = {"size": [96, 120], "counts": [0, 4, 96 * 120 - 4]}
                annotations += [
                    dict(id=3 * i + 1, image_id=10 + i, category_id=1 + 2 * (i % 2), iscrowd=0,
                         area=side * side, bbox=[x, y, side, side], segmentation=[outline]),
                    dict(id=3 * i + 2, image_id=10 + i, category_id=1, iscrowd=1, area=4,
                         bbox=[0, 0, 2, 2], segmentation=crowd)]
            Image.fromarray(picture).save(folder / f"{split}2017/{i}.png")
            images.append(dict(id=10 + i, file_name=f"{i}.png", height=96, width=120))
        text = json.dumps(dict(images=images, annotations=annotations, categories=categories))
        (folder / f"annotations/instances_{split}2017.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The backbone.pt of a run of ours on pictures of 72 pixels."""
    folder = tmp_path_factory.mktemp("run")
    data = tiny.save_images(folder / "data", size=72)
    args = train_moco.parse_args(argv=[
        "--dataset=folder", f"--data-dir={data}", "--views-dir=none", "--image-size=72",
        "--arch=resnet18", "--batch-size=8", "--queue=16", "--epochs=1", "--start-batches=0",
        "--knn-every=0", "--workers=0", f"--output-dir={folder / 'run'}", "--device=cpu"])
    train_moco.train(args, CPU)
    return folder / "run/backbone.pt"


FEW = dict(rpn_pre_nms_top_n_train=60, rpn_post_nms_top_n_train=60, rpn_pre_nms_top_n_test=60,
           rpn_post_nms_top_n_test=60, box_detections_per_img=10,
           box_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 2, 2),
           mask_roi_pool=MultiScaleRoIAlign(["0", "1", "2", "3"], 4, 2))     # much less to compute


def flags_of(coco, backbone, folder, steps, *more):
    return ["--backbone", backbone, "--data-dir", coco, "--steps", steps, "--batch-size", 2, "--lr",
            0.016, "--output-dir", folder, "--workers", 0, "--device", "cpu", *more]


def detect(monkeypatch, *flags):
    monkeypatch.setattr(eval_detection, "MaskRCNN", functools.partial(MaskRCNN, **FEW))
    call(eval_detection, *flags)


def test_trains_and_evaluates(coco, backbone, tmp_path, monkeypatch, capsys):
    """From our backbone.pt: the loss falls, average precision is computed; again: goes on, here to
    its end."""
    monkeypatch.setattr(eval_detection, "SHORT_SIDES", (64,))
    flags = flags_of(coco, backbone, tmp_path, 6, "--log-every", 2)
    detect(monkeypatch, *flags)
    said = capsys.readouterr().out.strip().splitlines()[-1]
    log = json_lines(tmp_path / "log.jsonl")
    assert log[-2]["loss"] < 0.8 * log[0]["loss"] and log[-2]["step"] == 6
    assert said.startswith(f"box AP {log[-1]['box'][0]:.1f}%, AP50") and "; mask AP " in said
    state = torch.load(tmp_path / "last.pt")
    torch.save(state | {"processes": 2}, tmp_path / "last.pt")
    before = (tmp_path / "last.pt").read_bytes()
    detect(monkeypatch, *flags)
    said_again = capsys.readouterr().out
    assert (tmp_path / "last.pt").read_bytes() == before and said in said_again
    assert "2 processes, here are 1: other random draws" in said_again
    assert json_lines(tmp_path / "log.jsonl") == log
    assert sorted(file.name for file in tmp_path.iterdir()) == ["last.pt", "log.jsonl"]
    with pytest.raises(UserError, match="another run: --mean-std is None there and clip here"):
        detect(monkeypatch, *flags, "--mean-std", "clip")
    other = torch.load(backbone, weights_only=True)
    other["conv1.weight"] *= 2
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is of another run"):       # not another backbone's figures
        detect(monkeypatch, *flags, "--backbone", tmp_path / "other.pt")
    moved = shutil.copytree(coco, tmp_path / "moved")
    flags[3] = moved
    detect(monkeypatch, *flags)                    # goes on elsewhere, not with other annotations
    path = moved / "annotations/instances_train2017.json"
    path.write_text(path.read_text() + " ")
    with pytest.raises(UserError, match="is of another run: annotations is"):
        detect(monkeypatch, *flags)


def test_a_picture_that_one_machine_lacks_is_named(coco, backbone, tmp_path, monkeypatch):
    works = []
    for rank in (0, 1):
        copy = shutil.copytree(coco, tmp_path / f"machine-{rank}")
        flags = flags_of(copy, backbone, tmp_path / "run", 2)
        works.append(lambda flags=flags: detect(monkeypatch, *flags))
    path = tmp_path / "machine-1/annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    lost = content["images"].pop()["id"]
    content["annotations"] = [a for a in content["annotations"] if a["image_id"] != lost]
    path.write_text(json.dumps(content))
    assert end(*start_two(works, tmp_path)) == [2, 2]
    assert re.search("process 1 finds in val: 2 images.*process 0: 3", (tmp_path / "0").read_text())


def test_the_others_end_with_a_process_that_fails(coco, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_detection, "SHORT_SIDES", (64,))
    flags = flags_of(coco, backbone, tmp_path / "run", 2)

    def work():
        detect(monkeypatch, *flags)
    broken = before_call(2, fail, work, eval_detection, "detection_step")
    began = time.monotonic()
    assert end(*start_two([broken, work], tmp_path)) == [2, 1]
    assert time.monotonic() - began < 20
    assert "process 1 stops because another one ended" in (tmp_path / "1").read_text()


def test_a_training_within_the_warm_up_is_named(coco, backbone, tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt
    monkeypatch.setattr(eval_detection, "train_detector", stop)
    for steps, named in ((4000, True), (4001, False)):         # 500 for a batch of 16, here 2
        with pytest.raises(KeyboardInterrupt):
            detect(monkeypatch, *flags_of(coco, backbone, tmp_path / "run", steps))
        assert ("ends within the usual warm-up of 4000 steps" in capsys.readouterr().out) == named


def test_a_training_that_cannot_begin_writes_nothing(coco, backbone, tmp_path, monkeypatch, capsys):
    flags = flags_of(coco, backbone, tmp_path / "run", 2)
    line = refusal(capsys, detect, monkeypatch, *flags, "--batch-size", 8)
    assert line.startswith("6 pictures with objects do not fill one batch of 8")
    assert not (tmp_path / "run").exists()
    with held(tmp_path / "run"):
        line = refusal(capsys, detect, monkeypatch, *flags)
        assert "another process works in" in line and "--output-dir" in line
        assert [file.name for file in (tmp_path / "run").iterdir()] == [".lock"]


def test_two_processes_share_the_work(coco, backbone, tmp_path, monkeypatch):
    """Both end well, with one checkpoint and one line of figures."""
    monkeypatch.setattr(eval_detection, "SHORT_SIDES", (64,))

    def work():
        with open(tmp_path / f"out-{os.environ['RANK']}", "w") as said, redirect_stdout(said):
            detect(monkeypatch, *flags_of(coco, backbone, tmp_path / "run", 2))
    assert end(*start_two([work] * 2, tmp_path)) == [0, 0]
    said = [(tmp_path / f"out-{rank}").read_text() for rank in range(2)]
    assert "box AP" in said[0] and "batch norm frozen" in said[0] and not said[1]
    assert load_checkpoint(tmp_path / "run/last.pt")["step"] == 2


def edited(coco, folder, edit, split="val"):
    """A folder with the split's pictures and its annotations as edit(content) changes them."""
    name = f"annotations/instances_{split}2017.json"
    content = json.loads((coco / name).read_text())
    edit(content)
    (folder / "annotations").mkdir()
    (folder / name).write_text(json.dumps(content))
    (folder / f"{split}2017").symlink_to(coco / f"{split}2017")
    return folder


def truth_of(data):
    """The objects of a split as detections."""
    from pycocotools import mask as coder
    found, keys = [], list(data.categories)
    for _, target in (data[i] for i in range(len(data))):
        objects = (target["boxes"], target["labels"], target["masks"])
        for box, label, mask in zip(*objects, strict=True):
            x1, y1, x2, y2 = box.tolist()
            found.append({"image_id": target["image_id"], "category_id": keys[label - 1],
                          "score": 1.0, "bbox": [x1, y1, x2 - x1, y2 - y1],
                          "segmentation": coder.encode(np.asfortranarray(mask.numpy()))})
    return found


PERFECT = {name: pytest.approx((100, 100, 100)) for name in ("box", "mask")}


def test_the_truth_scores_100(coco):
    """Boxes and masks survive the way through our targets to COCO's format; crowds and pictures
    without objects are left out."""
    data = eval_detection.Coco(coco, "val")
    assert len(eval_detection.Coco(coco, "train")) == 6 and len(data) == 3
    assert data.num_classes == 3 and data.categories == {1: "a", 3: "b"}
    for picture, target in (data[i] for i in range(3)):
        assert picture.shape == (3, 96, 120) and target["masks"].shape[1:] == (96, 120)
        for box, mask in zip(target["boxes"], target["masks"], strict=True):
            x1, y1, x2, y2 = map(int, box.tolist())
            assert mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)
    found = truth_of(data)
    assert len(found) == 2 and eval_detection.average_precision(data, found) == PERFECT
    assert eval_detection.average_precision(data, []) == {"box": (0, 0, 0), "mask": (0, 0, 0)}


# ------------------------------------------------------------------- what is put right on reading
def all_of(kind, **changes):
    """An edit of all entries of a kind; a change is a value, or what makes one of entry and place;
    None removes the field."""
    def edit(content):
        for place, entry in enumerate(content[kind]):
            for name, change in changes.items():
                entry[name] = change(entry, place) if callable(change) else change
                if entry[name] is None:
                    del entry[name]
    return edit


def as_text(content):
    for kind, names in (("images", ["id", "height", "width"]), ("categories", ["id"]),
                        ("annotations", ["id", "image_id", "category_id", "iscrowd", "area"])):
        for entry in content[kind]:
            entry |= {name: str(entry[name]) for name in names}
    for entry in content["annotations"]:
        entry["bbox"] = [str(x) for x in entry["bbox"]]


def mask_runs(mask):
    """Lengths of the runs of zeros and ones, column by column, zeros first."""
    runs, value = [0], 0
    for x in mask.T.flatten().tolist():
        if x != value:
            runs.append(0)
            value = x
        runs[-1] += 1
    return runs


def run_length_encoded(packed):
    """An edit: masks as run lengths, which pycocotools may pack into text."""
    def edit(content):
        from pycocotools import mask as coder
        for entry in content["annotations"]:
            mask = np.zeros((96, 120), dtype=np.uint8)
            x, y, w, h = entry["bbox"]
            mask[y:y + h, x:x + w] = 1
            code = {"size": [96, 120], "counts": mask_runs(mask)}
            if packed:
                code["counts"] = coder.encode(np.asfortranarray(mask))["counts"].decode()
            entry["segmentation"] = code
    return edit


def with_a_line(entry, _):
    """Its polygons and one of two points; run lengths stay."""
    mask = entry["segmentation"]
    return [[5, 5, 9, 9], *mask] if isinstance(mask, list) else mask


@pytest.mark.parametrize("edit", [
    all_of("annotations", id=lambda _, i: i), all_of("annotations", id=7),
    all_of("annotations", id=None), all_of("annotations", id=lambda _, i: f"a{i}"),
    all_of("annotations", area=None), all_of("annotations", area=-1),
    all_of("annotations", iscrowd=lambda entry, _: entry["iscrowd"] or None), as_text,
    run_length_encoded(False), run_length_encoded(True),
    all_of("annotations", segmentation=with_a_line)], ids=[
        "ids from 0", "one id for all", "no ids", "words as ids", "no area", "areas below 0",
        "iscrowd of crowds alone", "numbers as text", "run lengths", "packed run lengths",
        "two-point parts"])
def test_the_truth_scores_100_however_it_is_written(coco, tmp_path, edit):
    data = eval_detection.Coco(edited(coco, tmp_path, edit), "val")
    found = truth_of(data)
    assert len(found) == 2 and eval_detection.average_precision(data, found) == PERFECT
    plain = eval_detection.Coco(coco, "val")
    for (_, target), (_, other) in ((data[i], plain[i]) for i in range(3)):
        assert all(torch.equal(target[key], other[key]) for key in ("boxes", "labels", "masks"))


# -------------------------------------------------------------------- what is refused on reading
def first_of(kind, **changes):
    """An edit of the first entry of a kind; None removes the field."""
    def edit(content):
        entry = content[kind][0]
        entry.update(changes)
        for name in [name for name in changes if changes[name] is None]:
            del entry[name]
    return edit


def run_lengths(size, counts):
    return first_of("annotations", segmentation={"size": size, "counts": counts})


DAMAGED = {
    "the image id 11 is not unique": first_of("images", id=11),
    "the category id 3 is not unique": first_of("categories", id="3"),
    "image 10 has no width: correct": first_of("images", width=None),
    "image 10 has 0 as height, not a number of pixels": first_of("images", height=0),
    "image 10 has 7 as file_name, not the name of a file": first_of("images", file_name=7),
    "image number 1 has no id": first_of("images", id=None),
    "annotation number 1 has no image_id": first_of("annotations", id=None, image_id=None),
    "annotation 1 is of image 99, which the file's images": first_of("annotations", image_id=99),
    'annotation 1 has "ten" as image_id, not a whole': first_of("annotations", image_id="ten"),
    "annotation 1 has 10.5 as image_id, not a whole": first_of("annotations", image_id=10.5),
    "annotation 1 is of category 5, which the file's": first_of("annotations", category_id=5),
    "annotation 1 has a box but no segmentation": first_of("annotations", segmentation=[]),
    "[[20, 20, 60, 60]] as segmentation, not polygons": first_of(
        "annotations", segmentation=[[20, 20, 60, 60]]),
    "annotation 1 has [[]] as segmentation, not": first_of("annotations", segmentation=[[]]),
    "60] as segmentation, not polygons of three or more": first_of(
        "annotations", segmentation=[20, 20, 60, 20, 60, 60]),
    "NaN, 20, 60, 20, 60, 60]] as segmentation": first_of(
        "annotations", segmentation=[[math.nan, 20, 60, 20, 60, 60]]),
    "000000.0, 20, 60, 20, 60, 60]] as segmentation": first_of(
        "annotations", segmentation=[[1e15, 20, 60, 20, 60, 60]]),
    "[120, 96], .* run lengths within 120 x 96 pixels": run_lengths([120, 96], [0, 4, 11516]),
    "[0, 4, 100]} as segmentation": run_lengths([96, 120], [0, 4, 100]),
    '"counts": "041M0"} as segmentation': run_lengths([96, 120], "041M0"),
    "annotation 1 has no bbox": first_of("annotations", bbox=None),
    "annotation 1 has [1, 2, 3] as bbox, not left, top": first_of("annotations", bbox=[1, 2, 3]),
    "[9, 9, -5, 5] as bbox": first_of("annotations", bbox=[9, 9, -5, 5]),
    "[200, 9, 5, 5] as bbox, .* within 120 x 96 pixels": first_of(
        "annotations", bbox=[200, 9, 5, 5]),
    "annotation 1 has 2 as iscrowd, not 0 or 1": first_of("annotations", iscrowd=2),
    "annotation number 1 is 5, not an object": lambda c: c["annotations"].insert(0, 5),
    "its pictures hold no object to find": all_of("annotations", iscrowd=1),
    "1 of the 3 pictures that .* are missing or empty, such as .*none.png": first_of(
        "images", file_name="none.png")}


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_annotations_are_named_in_one_line(coco, tmp_path, capsys, message):
    folder = edited(coco, tmp_path, DAMAGED[message])
    line = refusal(capsys, eval_detection.Coco, folder, "val")
    assert re.search(message.replace("[", r"\["), line)
    assert str(folder / "annotations/instances_val2017.json") in line


def corners(entry, _):
    x, y, w, h = entry["bbox"]
    return [x, y, x + w, y + h]


def centre(entry, _):
    x, y, w, h = entry["bbox"]
    return [x + w / 2, y + h / 2, w, h]


def in_parts_of_the_picture(entry, _):
    return [x / 100 for x in entry["bbox"]]


def square_at(left, side, packed):
    """An edit: the first object is a square in a picture of 400 pixels."""
    def edit(content):
        all_of("images", height=400, width=400)(content)
        entry = content["annotations"][0]
        entry["bbox"] = [left, left, side, side]
        right = left + side
        entry["segmentation"] = [[left, left, right, left, right, right, left, right]]
        if packed:
            mask = np.zeros((400, 400), dtype=np.uint8)
            mask[left:right, left:right] = 1
            entry["segmentation"] = {"size": [400, 400], "counts": mask_runs(mask)}
        content["annotations"] = [entry]
    return edit


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("bbox", [corners, centre, in_parts_of_the_picture, None])
def test_a_box_beside_its_mask_is_named(coco, tmp_path, bbox, packed):
    """Boxes of another kind would be learnt and scored as they are."""
    def edit(content):
        square_at(200, 40, packed)(content)
        if bbox:
            all_of("annotations", bbox=bbox)(content)
    folder = edited(coco, tmp_path, edit)
    if bbox is None:
        assert len(eval_detection.Coco(folder, "val").objects(10)) == 1
        return
    message = r"annotation number 1 has \[.*\] as bbox .* but a mask in \[200(.0)?, 200.*: correct"
    if bbox == in_parts_of_the_picture:            # of at most a pixel: left out, as in COCO
        message = "hold no object"
    with pytest.raises(UserError, match=message):
        eval_detection.Coco(folder, "val")


def test_corners_of_large_central_objects_are_named_but_not_one_odd_box(coco, tmp_path):
    def edit(content):
        square_at(60, 280, packed=False)(content)
        content["annotations"] = [dict(content["annotations"][0], id=i) for i in range(5)]
    folder = edited(coco, tmp_path, edit)
    path = folder / "annotations/instances_val2017.json"
    content = json.loads(path.read_text())
    content["annotations"][2]["bbox"] = [10, 10, 20, 20]
    path.write_text(json.dumps(content))
    assert len(eval_detection.Coco(folder, "val").objects(10)) == 5
    for entry in content["annotations"]:
        entry["bbox"] = [60, 60, 340, 340]
    path.write_text(json.dumps(content))
    with pytest.raises(UserError, match="and so have others: correct the boxes"):
        eval_detection.Coco(folder, "val")


def test_a_mask_of_whole_columns_and_its_box():
    mask = np.zeros((6, 5), dtype=np.uint8)
    mask[2:4, 1:3] = 1
    assert box_of_runs(mask_runs(mask), 6) == [1, 2, 2, 2]
    mask[:, 3] = 1
    assert box_of_runs(mask_runs(mask), 6) == [1, 0, 3, 6]
    assert box_of_runs(mask_runs(0 * mask), 6) == [0, 0, 0, 0]


def test_whatever_a_field_holds(coco, tmp_path):
    """The file is refused, or all goes well to the average precision."""
    outcomes = set()
    original = json.loads((coco / "annotations/instances_val2017.json").read_text())
    path = edited(coco, tmp_path, lambda _: None) / "annotations/instances_val2017.json"
    odd = [None, -1, math.inf, "x", [[]], [None] * 4, [1e9] * 6, {"size": 1}]
    for kind, entries in original.items():
        for name in entries[0]:
            for value in odd:
                content = copy.deepcopy(original)
                content[kind][0][name] = value
                path.write_text(json.dumps(content))
                try:
                    data = eval_detection.Coco(tmp_path, "val")
                except UserError:
                    outcomes.add("refused")
                    continue
                outcomes.add(len(truth_of(data)))
                scores = eval_detection.average_precision(data, truth_of(data))
                assert scores == PERFECT, (kind, name, value)
    assert outcomes == {"refused", 2}


@pytest.mark.parametrize("changes", [
    dict(segmentation=[[20, 20, 40, 40, 60, 60]]), dict(segmentation=[[20, 20] * 3]),
    dict(bbox=[20, 20, 0, 40])])
def test_objects_without_extent_are_left_out_and_counted(coco, tmp_path, capsys, changes):
    data = eval_detection.Coco(edited(coco, tmp_path, first_of("annotations", **changes)), "val")
    assert [len(data[i][1]["labels"]) for i in range(3)] == [0, 1, 0]
    said = capsys.readouterr().out
    assert "3 pictures, 1 objects (and 3 crowds or without extent), 2 categories: a, b" in said


def test_a_training_split_of_crowds_holds_nothing_to_find(coco, tmp_path):
    folder = edited(coco, tmp_path, all_of("annotations", iscrowd=1), "train")
    with pytest.raises(UserError, match="its pictures hold no object to find"):
        eval_detection.Coco(folder, "train")


def test_a_limit_that_leaves_nothing_to_find_is_named(coco, tmp_path):
    def last_first(content):                       # the picture without objects
        content["images"][2]["id"] = 1
    folder = edited(coco, tmp_path, last_first)
    with pytest.raises(UserError, match=r"its pictures \(--limit 1\) hold no object to find"):
        eval_detection.Coco(folder, "val", limit=1)


def test_an_empty_picture_is_named_before_the_training(coco, tmp_path):
    edited(coco, tmp_path, lambda _: None)
    (tmp_path / "val2017").unlink()
    shutil.copytree(coco / "val2017", tmp_path / "val2017")
    (tmp_path / "val2017/1.png").write_bytes(b"")
    with pytest.raises(UserError, match="1 of the 3 pictures .* such as .*val2017/1.png"):
        eval_detection.Coco(tmp_path, "val")


@pytest.mark.parametrize("stored, size, orientation, seen", [
    ((120, 96), (120, 96), 6, "stored"), ((120, 96), (96, 120), 6, "upright"),
    ((120, 96), (120, 96), 3, "upright"), ((120, 96), (120, 96), None, "stored"),
    ((60, 48), (120, 96), None, None), ((120, 96), (96, 120), None, None)])
def test_pictures_are_of_the_size_in_the_annotations(
        coco, tmp_path, stored, size, orientation, seen):
    """A picture whose EXIF flag turns it is upright, unless only the stored one is of this size."""
    width, height = size

    def edit(content):
        all_of("images", file_name="0.jpg", width=width, height=height)(content)
        content["annotations"] = content["annotations"][:1]            # no crowd's run lengths
    folder = edited(coco, tmp_path, edit)
    (folder / "val2017").unlink()
    (folder / "val2017").mkdir()
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    picture = Image.new("RGB", stored)
    picture.paste("red", (0, 0, stored[0] // 2, stored[1] // 2))
    picture.save(folder / "val2017/0.jpg", exif=exif, quality=95)
    data = eval_detection.Coco(folder, "val")
    if seen is None:
        message = f"{stored[0]} x {stored[1]} pixels, .* says {width} x {height}: boxes"
        with pytest.raises(UserError, match=message):
            data[2]
        return
    content = data[2][0]
    assert tuple(content.shape[1:]) == (height, width)
    assert (content[0, 5, 5] > 0.5).item() == (seen == "stored")


def test_mirrored():
    picture = torch.zeros(3, 4, 6)
    picture[:, 1:3, 0:2] = 1
    target = {"boxes": torch.tensor([[0.0, 1, 2, 3]]), "masks": picture[:1].byte()}
    flipped, turned = eval_detection.mirrored(picture, target)
    assert flipped[:, 1:3, 4:6].all() and flipped.sum() == picture.sum()
    assert turned["boxes"].tolist() == [[4, 1, 6, 3]]
    assert torch.equal(turned["masks"], flipped[:1].byte())
    assert target["boxes"].tolist() == [[0, 1, 2, 3]]                  # not changed in place


def test_the_schedule_and_the_shares():
    args = eval_detection.parse_args(["--backbone", "x"])
    steps = (0, 499, 59_999, 60_000, 79_999, 80_000)
    rates = [eval_detection.detection_rate(args, step) for step in steps]
    assert rates == pytest.approx([0.02 / 500, 0.02, 0.02, 0.002, 0.002, 0.0002])
    small = eval_detection.parse_args(["--backbone", "x", "--batch-size", "2"])
    assert small.steps == 720_000 and args.steps == 90_000      # as many pictures
    assert eval_detection.detection_rate(small, 3999) == pytest.approx(0.0025)
    assert eval_detection.detection_rate(small, 1999) == pytest.approx(0.00125)
    args.steps, args.batch_size = 7, 4

    def shares(count, rank=0, size=1, start=0):
        world = CPU._replace(rank=rank, size=size)
        return list(eval_detection.batches(count, args, world, start))
    whole = shares(10)
    halves = zip(shares(10, 0, 2), shares(10, 1, 2), strict=True)
    assert len(whole) == 7 and whole == [a + b for a, b in halves]
    assert shares(10, start=3) == whole[3:]
    assert len(set(whole[0] + whole[1])) == 8


def test_any_category_ids_are_numbered_from_one_and_back(coco, tmp_path, capsys):
    """0 is the background, whatever the file's ids; they return in the detections."""
    def edit(content):
        content["categories"] = [dict(id=9, name="late"), dict(id=0, name="first"),
                                 dict(id=7, name="second")]
        all_of("annotations", category_id=7)(content)
    data = eval_detection.Coco(edited(coco, tmp_path, edit), "val", limit=1)
    picture, target = data[0]
    assert target["labels"].tolist() == [2] and data.num_classes == 4
    assert "3 categories: first, second, late" in capsys.readouterr().out
    mask = 0.4 + 0.2 * target["masks"][:, None].float()        # of the object where above a half

    class Model(torch.nn.Module):
        def forward(self, pictures):
            return [{key: target[key] for key in ("boxes", "labels")} | {
                "scores": torch.ones(1), "masks": mask}]
    found = eval_detection.detect(Model(), data, SimpleNamespace(workers=0), CPU)
    assert [f["category_id"] for f in found] == [7]
    assert eval_detection.average_precision(data, found) == PERFECT


def test_each_process_detects_in_its_share_of_the_pictures(coco):
    data = eval_detection.Coco(coco, "val")

    class Model(torch.nn.Module):
        seen = []

        def forward(self, pictures):
            self.seen += pictures
            return [{"boxes": torch.tensor([[1.0, 2, 4, 8]]), "labels": torch.ones(1).long(),
                     "scores": torch.ones(1), "masks": torch.ones(1, 1, 96, 120)}]
    world = SimpleNamespace(rank=1, size=2, device=CPU.device,
                            gather_objects=lambda found: [["of the first"], found])
    first, second = eval_detection.detect(Model(), data, SimpleNamespace(workers=0), world)
    assert first == "of the first" and second["image_id"] == data.ids[1]
    assert second["bbox"] == [1, 2, 3, 6]          # left, top, width, height
    assert len(Model.seen) == 1 and torch.equal(Model.seen[0], data[1][0])


def test_scores_are_of_boxes_or_masks_and_a_precision(coco):
    """AP, AP50, AP75: of detections that fit in one, loosely or after a false one."""
    data = eval_detection.Coco(coco, "val", limit=1)
    truth, = truth_of(data)
    x, y, w, h = truth["bbox"]
    empty = truth_of(eval_detection.Coco(coco, "val"))[1]["segmentation"]
    aside = truth | {"segmentation": empty}
    scores = eval_detection.average_precision(data, [aside])
    assert scores["box"] == pytest.approx((100, 100, 100)) and scores["mask"][0] < 100
    loose = truth | {"bbox": [x, y, w, 0.68 * h]}              # hits at 0.5, 0.55, 0.6 and 0.65
    assert eval_detection.average_precision(data, [loose])["box"] == pytest.approx((40, 100, 0))
    false = truth | {"bbox": [0, 0, 3, 3], "score": 2.0}
    found = eval_detection.average_precision(data, [truth, false])["box"]
    assert found == pytest.approx((50, 50, 50), abs=1)         # its recall is 100


@pytest.mark.parametrize("text", [
    "\x1f\x8b\x08" + 999 * "\xff", "", "{", "[]", "{}",
    '{"images": []}', '{"images": [], "annotations": [], "categories": []}',
    '{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}], "categories": []}',
    '{"images": 1, "annotations": 1, "categories": 1}', "[" * 100_000, "\x00\xff"])
def test_missing_and_damaged_annotations_are_named(tmp_path, text):
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="download train2017.zip"):    # none so far
        eval_detection.Coco(tmp_path, "train")
    path = tmp_path / "annotations/instances_train2017.json"
    path.write_bytes(text.encode("latin1"))
    with pytest.raises(UserError, match="is damaged or not in COCO's format") as error:
        eval_detection.Coco(tmp_path, "train")
    assert len(str(error.value)) < 200 + len(str(path))            # not the file's content
    path.write_text("version https://git-lfs.github.com/spec/v1")
    with pytest.raises(UserError, match="is a git-lfs pointer"):
        eval_detection.Coco(tmp_path, "train")


def test_a_missing_pycocotools_is_named(tmp_path, monkeypatch):
    importing = builtins.__import__

    def without_coco(name, *rest):
        if name.startswith("pycocotools"):
            raise ImportError
        return importing(name, *rest)
    monkeypatch.setattr(builtins, "__import__", without_coco)
    with pytest.raises(UserError, match="pip install pycocotools"):
        eval_detection.Coco(tmp_path, "train")


@pytest.mark.parametrize("flags, message", [
    ([], "required: --backbone"),
    (["--backbone=x", "--steps=0"], "--steps: 0 must be from 1 to"),
    (["--backbone=x", "--device=cpu", "--data-dir={}"], "cocodataset.org|pip install pycocotools")])
def test_refusals_are_one_line(flags, message, tmp_path, monkeypatch, capsys):
    line = refusal(capsys, detect, monkeypatch, *(f.format(tmp_path) for f in flags))
    assert any(part in line for part in message.split("|"))


@pytest.mark.parametrize("arch, size", [("resnet18", 32), ("vit_narrow", 96)])
def test_the_backbone_must_be_for_large_pictures(tmp_path, arch, size):
    torch.save(make_backbone(arch, size)[0].state_dict(), tmp_path / "small.pt")
    with pytest.raises(UserError, match="no ResNet for large pictures"):
        eval_detection.mask_rcnn(tmp_path / "small.pt", None, 4, CPU)


@pytest.mark.parametrize("frozen", [False, True])
def test_the_whole_backbone_is_loaded_and_trained(backbone, frozen):
    """With batch norm, or without it where it would see too few pictures."""
    body = eval_detection.mask_rcnn(backbone, None, 4, CPU, frozen=frozen).backbone.body
    assert ("bn1.weight" in dict(body.named_parameters())) != frozen
    state = torch.load(backbone, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in body.state_dict().items())
    assert all(parameter.requires_grad for parameter in body.parameters())
