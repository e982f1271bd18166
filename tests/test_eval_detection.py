"""eval_detection.py on a small set in COCO's format: discs and squares on noise."""
import builtins
import functools
import importlib.util
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.models.detection import MaskRCNN

import eval_detection
import genview
import support.checkpoints
import support.files
import support.networks
import support.world
import train_moco
from support.world import UserError

needs_coco = pytest.mark.skipif(importlib.util.find_spec("pycocotools") is None, reason="pycocotools is optional")


@pytest.fixture(scope="module")
def coco(tmp_path_factory):
    """A folder with train2017, val2017 and annotations: one square and one crowd in each picture, the last one empty."""
    folder, rng = tmp_path_factory.mktemp("coco"), np.random.default_rng(0)
    (folder / "annotations").mkdir()
    for split, count in (("train", 7), ("val", 3)):
        (folder / f"{split}2017").mkdir()
        images, annotations = [], []
        for i in range(count):
            picture = rng.integers(0, 90, (96, 120, 3), dtype=np.uint8)
            x, y, side = (int(n) for n in rng.integers(8, 40, 3))
            if i < count - 1:
                picture[y:y + side, x:x + side] = (255, 255 * (i % 2), 0)
                outline = [x, y, x + side, y, x + side, y + side, x, y + side]
                annotations += [dict(id=3 * i + 1, image_id=10 + i, category_id=1 + 2 * (i % 2), iscrowd=0, area=side * side,
                                     bbox=[x, y, side, side], segmentation=[outline]),
                                dict(id=3 * i + 2, image_id=10 + i, category_id=1, iscrowd=1, area=4, bbox=[0, 0, 2, 2],
                                     segmentation={"size": [96, 120], "counts": [0, 4, 96 * 120 - 4]})]
            Image.fromarray(picture).save(folder / f"{split}2017/{i}.png")
            images.append(dict(id=10 + i, file_name=f"{i}.png", height=96, width=120))
        text = json.dumps(dict(images=images, annotations=annotations, categories=[dict(id=1, name="a"), dict(id=3, name="b")]))
        (folder / f"annotations/instances_{split}2017.json").write_text(text)
    return folder


@pytest.fixture(scope="module")
def backbone(tmp_path_factory):
    """The backbone.pt of a run of ours on pictures of 72 pixels."""
    import tiny
    folder = tmp_path_factory.mktemp("run")
    data = tiny.save_images(folder / "data", size=72)
    args = train_moco.parse_args(argv=["--dataset", "folder", "--data-dir", data, "--views-dir", "none", "--image-size", "72", "--arch",
                                       "resnet18", "--batch-size", "8", "--queue", "16", "--epochs", "1", "--workers", "0",
                                       "--output-dir", str(folder / "run"), "--device", "cpu"])
    train_moco.train(args, support.world.setup("cpu"))
    return folder / "run/backbone.pt"


FEW = dict(rpn_pre_nms_top_n_train=60, rpn_post_nms_top_n_train=60, rpn_pre_nms_top_n_test=60, rpn_post_nms_top_n_test=60,
           box_detections_per_img=10)                  # proposals and detections: a small part of the time


def detect(monkeypatch, *flags):
    monkeypatch.setattr(eval_detection, "MaskRCNN", functools.partial(MaskRCNN, **FEW))
    monkeypatch.setattr(sys, "argv", ["eval_detection.py", *map(str, flags)])
    eval_detection.main()


@needs_coco
def test_trains_and_evaluates(coco, backbone, tmp_path, monkeypatch, capsys):
    """From our backbone.pt: 20 steps, the loss falls, average precision is computed; again: goes on, here to its end."""
    monkeypatch.setattr(eval_detection, "SHORT_SIDES", (96,))
    flags = ["--backbone", backbone, "--data-dir", coco, "--steps", 20, "--batch-size", 2, "--lr", 0.002, "--output-dir", tmp_path,
             "--log-every", 4, "--workers", 0, "--device", "cpu"]
    detect(monkeypatch, *flags)
    said = capsys.readouterr().out.strip().splitlines()[-1]
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[-2]["loss"] < 0.8 * log[0]["loss"] and log[-2]["step"] == 20
    assert said.startswith(f"box AP {log[-1]['box'][0]:.1f}%, AP50") and "; mask AP " in said
    before = (tmp_path / "last.pt").read_bytes()
    detect(monkeypatch, *flags)
    assert (tmp_path / "last.pt").read_bytes() == before and said in capsys.readouterr().out
    other = torch.load(backbone, weights_only=True)
    other["conv1.weight"] *= 2
    torch.save(other, tmp_path / "other.pt")
    with pytest.raises(UserError, match="is of another run"):                       # never another backbone's figures
        detect(monkeypatch, *flags, "--backbone", tmp_path / "other.pt")


@needs_coco
def test_an_interrupted_run_ends_as_an_uninterrupted_one(coco, backbone, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_detection, "SHORT_SIDES", (64, 96))
    flags = ["--backbone", backbone, "--data-dir", coco, "--steps", 3, "--batch-size", 2, "--lr", 0.002, "--workers", 0,
             "--device", "cpu", "--save-minutes", 0]
    write, writes = support.files.write_whole, []

    def stop_after_two(path, function):
        write(path, function)
        writes.append(path)
        if len(writes) == 2:
            raise KeyboardInterrupt
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(genview, "write_whole", stop_after_two)
        detect(monkeypatch, *flags, "--output-dir", tmp_path / "run")
    assert support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] == 2
    for folder in ("run", "whole"):
        detect(monkeypatch, *flags, "--output-dir", tmp_path / folder)
    states = [support.checkpoints.load_checkpoint(tmp_path / folder / "last.pt")["model"] for folder in ("run", "whole")]
    assert all(torch.equal(a, b) for a, b in zip(*(state.values() for state in states)))


@needs_coco
def test_damaged_annotations_are_named(coco, tmp_path):
    (tmp_path / "train2017").mkdir()
    (tmp_path / "annotations").mkdir()
    for text in ("", "{", "[]", "{}", '{"images": []}', '{"images": [], "annotations": [], "categories": []}',
                 '{"images": [{"id": 1}], "annotations": [{"id": 1, "image_id": 1}], "categories": [{"id": 1}]}'):
        (tmp_path / "annotations/instances_train2017.json").write_text(text)
        with pytest.raises(UserError, match="is damaged or not in COCO's format"):
            eval_detection.Coco(tmp_path, "train")


@needs_coco
def test_two_processes_share_the_work(coco, backbone, tmp_path):
    """Under torchrun's environment: both end well, with one checkpoint and one line of figures."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    code = "import eval_detection as e, genview; e.SHORT_SIDES = (64,); support.world.script(e.main)"
    flags = ["--backbone", backbone, "--data-dir", coco, "--steps", 2, "--batch-size", 2, "--lr", 0.002, "--workers", 0,
             "--device", "cpu", "--output-dir", tmp_path / "run"]
    processes = [subprocess.Popen(
        [sys.executable, "-c", code, *map(str, flags)], stdout=subprocess.PIPE, text=True,
        env=os.environ | dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port),
                              PYTHONPATH=os.path.dirname(eval_detection.__file__))) for rank in (0, 1)]
    said = [process.communicate(timeout=200)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    assert "box AP" in said[0] and not said[1] and support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] == 2


@needs_coco
def test_the_truth_scores_100(coco):
    """Boxes and masks survive the way through our targets to COCO's format; crowds and pictures without objects are left out."""
    from pycocotools import mask as coder
    data = eval_detection.Coco(coco, "val")
    assert len(eval_detection.Coco(coco, "train")) == 6 and len(data) == 3 and data.num_classes == 4
    found = []
    for picture, target in (data[i] for i in range(3)):
        assert picture.shape == (3, 96, 120) and target["masks"].shape[1:] == (96, 120)
        for box, label, mask in zip(target["boxes"], target["labels"], target["masks"]):
            x1, y1, x2, y2 = box.tolist()
            assert mask[int(y1):int(y2), int(x1):int(x2)].float().mean() == 1 and mask.sum() == (x2 - x1) * (y2 - y1)
            found.append({"image_id": target["image_id"], "category_id": label.item(), "score": 1.0, "bbox": [x1, y1, x2 - x1, y2 - y1],
                          "segmentation": coder.encode(np.asfortranarray(mask.numpy()))})
    assert len(found) == 2
    scores = eval_detection.average_precision(data, found)
    assert scores["box"] == pytest.approx((100, 100, 100)) and scores["mask"] == pytest.approx((100, 100, 100))
    assert eval_detection.average_precision(data, []) == {"box": (0, 0, 0), "mask": (0, 0, 0)}


def test_mirrored():
    picture = torch.zeros(3, 4, 6)
    picture[:, 1:3, 0:2] = 1
    target = {"boxes": torch.tensor([[0.0, 1, 2, 3]]), "masks": picture[:1].byte()}
    flipped, turned = eval_detection.mirrored(picture, target)
    assert turned["boxes"].tolist() == [[4, 1, 6, 3]] and flipped[:, 1:3, 4:6].all() and flipped.sum() == picture.sum()
    assert torch.equal(turned["masks"], flipped[:1].byte()) and target["boxes"].tolist() == [[0, 1, 2, 3]]


def test_the_schedule_and_the_shares(tmp_path):
    args = eval_detection.parse_args(["--backbone", "x"])
    rates = [eval_detection.learning_rate(args, step) for step in (0, 499, 59_999, 60_000, 79_999, 80_000)]
    assert rates == pytest.approx([0.02 / 500, 0.02, 0.02, 0.002, 0.002, 0.0002])
    args.steps, args.batch_size = 7, 4
    world = lambda rank, size: support.world.World(rank, size, torch.device("cpu"), torch.float32)
    whole = list(eval_detection.batches(10, args, world(0, 1), 0))
    halves = [list(eval_detection.batches(10, args, world(rank, 2), 0)) for rank in (0, 1)]
    assert len(whole) == 7 and whole == [a + b for a, b in zip(*halves)] and list(eval_detection.batches(10, args, world(0, 1), 3)) == whole[3:]
    assert len(set(whole[0] + whole[1])) == 8
    with pytest.raises(UserError, match="do not fill one batch of 4"):
        list(eval_detection.batches(3, args, world(0, 1), 0))


def test_what_is_missing_is_named(tmp_path, monkeypatch, image_folder, backbone):
    if importlib.util.find_spec("pycocotools"):
        with pytest.raises(UserError, match="download train2017.zip"):
            eval_detection.Coco(tmp_path, "train")
    importing = builtins.__import__
    monkeypatch.setattr(builtins, "__import__", lambda name, *rest: (_ for _ in ()).throw(ImportError()) if
                        name.startswith("pycocotools") else importing(name, *rest))
    with pytest.raises(UserError, match="pip install pycocotools"):
        eval_detection.Coco(tmp_path, "train")


def test_the_backbone_must_be_for_large_pictures(tmp_path, backbone):
    world = support.world.World(0, 1, torch.device("cpu"), torch.float32)
    for arch, size in (("resnet18", 32), ("vit_narrow", 96)):
        torch.save(support.networks.make_backbone(arch, size)[0].state_dict(), tmp_path / "small.pt")
        with pytest.raises(UserError, match="no ResNet for large pictures"):
            eval_detection.mask_rcnn(tmp_path / "small.pt", None, 4, world)
    model = eval_detection.mask_rcnn(backbone, None, 4, world)
    state = torch.load(backbone, weights_only=True)
    assert all(torch.equal(value, state[key]) for key, value in model.backbone.body.state_dict().items())
    assert model.backbone.body.conv1.weight.requires_grad
