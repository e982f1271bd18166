"""eval_detection.py on a small set in COCO's format: squares on noise."""
import builtins
import functools
import json
import os
from contextlib import redirect_stdout
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from running import CPU, call, end, json_lines, refusal, start_two
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

import eval_detection
import train_moco
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
    flags = flags_of(coco, backbone, tmp_path, 8, "--log-every", 2)
    detect(monkeypatch, *flags)
    said = capsys.readouterr().out.strip().splitlines()[-1]
    log = json_lines(tmp_path / "log.jsonl")
    assert log[-2]["loss"] < 0.8 * log[0]["loss"] and log[-2]["step"] == 8
    assert said.startswith(f"box AP {log[-1]['box'][0]:.1f}%, AP50") and "; mask AP " in said
    before = (tmp_path / "last.pt").read_bytes()
    detect(monkeypatch, *flags)
    assert (tmp_path / "last.pt").read_bytes() == before and said in capsys.readouterr().out
    other = torch.load(backbone, weights_only=True)
    other["conv1.weight"] *= 2
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is of another run"):       # not another backbone's figures
        detect(monkeypatch, *flags, "--backbone", tmp_path / "other.pt")


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


def test_the_truth_scores_100(coco):
    """Boxes and masks survive the way through our targets to COCO's format; crowds and pictures
    without objects are left out."""
    from pycocotools import mask as coder
    data = eval_detection.Coco(coco, "val")
    assert len(eval_detection.Coco(coco, "train")) == 6 and len(data) == 3
    assert data.num_classes == 3 and data.categories == {1: "a", 3: "b"}
    found, keys = [], list(data.categories)
    for picture, target in (data[i] for i in range(3)):
        assert picture.shape == (3, 96, 120) and target["masks"].shape[1:] == (96, 120)
        objects = (target["boxes"], target["labels"], target["masks"])
        for box, label, mask in zip(*objects, strict=True):
            x1, y1, x2, y2 = map(int, box.tolist())
            assert mask[y1:y2, x1:x2].all() and mask.sum() == (x2 - x1) * (y2 - y1)
            found.append({"image_id": target["image_id"], "category_id": keys[label - 1],
                          "score": 1.0, "bbox": [x1, y1, x2 - x1, y2 - y1],
                          "segmentation": coder.encode(np.asfortranarray(mask.numpy()))})
    assert len(found) == 2
    scores = eval_detection.average_precision(data, found)
    assert scores == {name: pytest.approx((100, 100, 100)) for name in ("box", "mask")}
    assert eval_detection.average_precision(data, []) == {"box": (0, 0, 0), "mask": (0, 0, 0)}


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
    rates = [eval_detection.learning_rate(args, step) for step in steps]
    assert rates == pytest.approx([0.02 / 500, 0.02, 0.02, 0.002, 0.002, 0.0002])
    small = eval_detection.parse_args(["--backbone", "x", "--batch-size", "2"])
    assert small.steps == 720_000 and args.steps == 90_000      # as many pictures
    assert eval_detection.learning_rate(small, 3999) == pytest.approx(0.0025)
    assert eval_detection.learning_rate(small, 1999) == pytest.approx(0.00125)
    args.steps, args.batch_size = 7, 4

    def shares(count, rank=0, size=1, start=0):
        world = CPU._replace(rank=rank, size=size)
        return list(eval_detection.batches(count, args, world, start))
    whole = shares(10)
    halves = zip(shares(10, 0, 2), shares(10, 1, 2), strict=True)
    assert len(whole) == 7 and whole == [a + b for a, b in halves]
    assert shares(10, start=3) == whole[3:]
    assert len(set(whole[0] + whole[1])) == 8
    with pytest.raises(UserError, match="do not fill one batch of 4"):
        shares(3)


def made_coco(folder, **changes):
    """A split of one picture with one object of category 7, of 7 and 9."""
    for name in ("train2017", "annotations"):
        (folder / name).mkdir()
    Image.new("RGB", (120, 96)).save(folder / "train2017/0.png")
    thing = dict(id=1, image_id=1, category_id=7, iscrowd=0, area=900, bbox=[20, 20, 30, 30],
                 segmentation=[[20, 20, 50, 20, 50, 50, 20, 50]]) | changes
    categories = [dict(id=9, name="late"), dict(id=0, name="first"), dict(id=7, name="second")]
    (folder / "annotations/instances_train2017.json").write_text(json.dumps(dict(
        images=[dict(id=1, file_name="0.png", height=96, width=120)], annotations=[thing],
        categories=categories)))
    return folder


def test_any_category_ids_are_numbered_from_one_and_back(tmp_path, capsys):
    """0 is the background, whatever the file's ids; they return in the detections."""
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    data = eval_detection.Coco(made_coco(tmp_path), "train")
    picture, target = data[0]
    assert target["labels"].tolist() == [2] and data.num_classes == 4
    assert "3 categories: first, second, late" in capsys.readouterr().out
    mask = target["masks"][:, None].float()

    class Model(torch.nn.Module):
        def forward(self, pictures):
            return [{key: target[key] for key in ("boxes", "labels")} | {
                "scores": torch.ones(1), "masks": mask}]
    found = eval_detection.detect(Model(), data, SimpleNamespace(workers=0), CPU)
    assert [f["category_id"] for f in found] == [7]
    assert eval_detection.average_precision(data, found)["mask"][1] == pytest.approx(100)


@pytest.mark.parametrize("changes, message", [
    (dict(category_id=5), "annotation 1 is of category 5, which"),
    (dict(segmentation=[]), "annotation 1 has a box but no segmentation")])
def test_objects_without_category_or_mask_are_named(tmp_path, changes, message):
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    with pytest.raises(UserError, match=message):
        eval_detection.Coco(made_coco(tmp_path, **changes), "train")


@pytest.mark.parametrize("text", [
    "", "{", "[]", "{}", '{"images": []}', '{"images": [], "annotations": [], "categories": []}',
    '{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}], "categories": []}',
    '{"images": [{"id": 1}], "annotations": [{"image_id": 1, "id": 1}], "categories": [{"id": 1}]}'
])
def test_missing_and_damaged_annotations_are_named(tmp_path, text):
    pytest.importorskip("pycocotools", reason="pycocotools is optional")
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    with pytest.raises(UserError, match="download train2017.zip"):    # none so far
        eval_detection.Coco(tmp_path, "train")
    (tmp_path / "annotations/instances_train2017.json").write_text(text)
    with pytest.raises(UserError, match="is damaged or not in COCO's format"):
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
