"""Transfer to detection and segmentation: Mask R-CNN with FPN on COCO from a trained backbone (section "experiments").

    python eval_detection.py --backbone runs/<name>/backbone.pt --data-dir /data/coco --batch-size 2 --lr 0.0025
    torchrun --nproc_per_node=8 eval_detection.py --backbone runs/<name>/backbone.pt --data-dir /data/coco      # 1x schedule

The network is torchvision's, all of it is trained, pictures are normalised with CLIP's numbers as in our training. pycocotools
reads the annotations and computes COCO's average precision: pip install pycocotools.

Legend of the shapes: n pictures of a batch, H and W of a picture in pixels, B objects in it.
"""
import argparse
import contextlib
import hashlib
import itertools
import json
import operator
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone

import genview
from eval_linear import load_backbone
from genview import Trouble, say

# The customary 1x schedule, e.g. of MoCo's transfer: 90,000 steps of 16 pictures, learning rate a tenth after 2/3 and 8/9.
SHORT_SIDES = (640, 672, 704, 736, 768, 800)      # drawn in training, the last in evaluation
LONG_SIDE, WARMUP_STEPS, DROPS = 1333, 500, (2 / 3, 8 / 9)


class Coco(Dataset):
    """Pictures and objects in COCO's format: <data>/<split>2017/*.jpg and <data>/annotations/instances_<split>2017.json."""

    def __init__(self, data_dir, split, limit=None):
        try:
            from pycocotools.coco import COCO
        except ImportError:
            raise Trouble("COCO's format and metrics need pycocotools: pip install pycocotools") from None
        self.folder = Path(data_dir, f"{split}2017")
        annotations = Path(data_dir, "annotations", f"instances_{split}2017.json")
        if not (annotations.is_file() and self.folder.is_dir()):
            raise Trouble(f"COCO is not in {data_dir}: download {split}2017.zip and annotations_trainval2017.zip from "
                          f"cocodataset.org and unpack them there ({annotations} and {self.folder}/ are looked for)")
        try:
            with contextlib.redirect_stdout(None):                                  # it tells how it builds its index
                self.coco = COCO(annotations)
            ids = sorted(self.coco.getImgIds())
            self.ids = [i for i in ids if self.objects(i) or split == "val"][:limit]
            self.num_classes = 1 + max(self.coco.getCatIds())                       # 0 is the background
        except (ValueError, KeyError, IndexError, TypeError, AssertionError) as error:          # pycocotools checks nothing
            raise Trouble(f"{annotations} is damaged or not in COCO's format ({type(error).__name__}: {error})") from None

    def objects(self, image_id):
        """Annotations of single objects that have an area."""
        found = self.coco.loadAnns(self.coco.getAnnIds(imgIds=image_id, iscrowd=False))
        return [a for a in found if a["bbox"][2] > 1 and a["bbox"][3] > 1]

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        """Picture (3, H, W) in [0, 1]; boxes (B, 4) x1, y1, x2, y2 in pixels, labels (B,), masks (B, H, W); its id."""
        image_id, objects = self.ids[index], self.objects(self.ids[index])
        picture = genview.to_tensor(genview.open_image(self.folder / self.coco.loadImgs(image_id)[0]["file_name"])) / 255
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        masks = [torch.from_numpy(self.coco.annToMask(a)) for a in objects]
        return picture, {"boxes": boxes, "labels": torch.tensor([a["category_id"] for a in objects], dtype=torch.long),
                         "masks": torch.stack(masks) if masks else torch.zeros(0, *picture.shape[1:], dtype=torch.uint8),
                         "image_id": image_id}


def mask_rcnn(path, arch, num_classes, world):
    """Mask R-CNN whose backbone is a checkpoint's; batch norm is trained, over all processes on GPUs."""
    network, _, args = load_backbone(path, arch)
    state = network.state_dict()
    if "layer4.0.conv1.weight" not in state or state["conv1.weight"].shape[-1] != 7:
        raise Trouble(f"{path} is no ResNet for large pictures, which detection needs: train it at more than "
                      f"{genview.IN_MEMORY_SIZE} pixels")
    backbone = resnet_fpn_backbone(backbone_name=args["arch"], weights=None, norm_layer=torch.nn.BatchNorm2d, trainable_layers=5)
    backbone.body.load_state_dict(state)
    backbone.forward = in_half_precision(backbone.forward, world)
    model = MaskRCNN(backbone, num_classes, min_size=SHORT_SIDES, max_size=LONG_SIDE, image_mean=genview.CLIP_MEAN,
                     image_std=genview.CLIP_STD)
    if world.size > 1 and world.device.type == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    return model.to(world.device)


def in_half_precision(forward, world):
    """A backbone's forward in bfloat16 where it is fast. What follows stays in float32: torchvision would round the boxes, too."""
    def run(pictures):
        with world.autocast():
            features = forward(pictures)
        return {name: x.float() for name, x in features.items()}
    return run


def mirrored(picture, target):
    width, boxes = picture.shape[2], target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return picture.flip(2), target | {"boxes": boxes, "masks": target["masks"].flip(2)}


def learning_rate(args, step):
    """Linear warm-up, then two drops to a tenth."""
    return args.lr * min(1, (step + 1) / min(WARMUP_STEPS, args.steps)) * 0.1 ** sum(step >= d * args.steps for d in DROPS)


def batches(count, args, world, start):
    """This process's share of each batch from step start on: lists of indices, shuffled anew in each pass over the data."""
    per_epoch = count // args.batch_size
    if per_epoch == 0:
        raise Trouble(f"{count} pictures with objects do not fill one batch of {args.batch_size}: lower --batch-size")
    share = args.batch_size // world.size
    for epoch in itertools.count(start // per_epoch):
        order = torch.randperm(count, generator=genview.step_generator(args.seed, epoch)).tolist()
        for i in range(per_epoch):
            if start <= epoch * per_epoch + i < args.steps:
                yield order[i * args.batch_size + world.rank * share:][:share]
        if (epoch + 1) * per_epoch >= args.steps:
            return


def run_of(model, args):
    """What must not change between a run and its resumption: some flags, and the weights the backbone starts with."""
    weights = b"".join(x.cpu().numpy().tobytes() for x in model.backbone.body.state_dict().values())
    return {name: getattr(args, name) for name in ("data_dir", "limit", "steps", "batch_size", "lr", "seed")} | {
        "backbone": hashlib.sha256(weights).hexdigest()[:16]}


def train(model, data, args, world):
    """Fine-tunes the model for --steps steps; goes on from --output-dir's last.pt."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    path, start, this_run = Path(args.output_dir, "last.pt"), 0, run_of(model, args)
    if path.exists():
        state = genview.load_checkpoint(path)
        its_run = state.get("run") if isinstance(state, dict) else None
        if its_run != this_run:
            raise Trouble(f"{path} is of another run ({its_run}, now {this_run}): name another --output-dir")
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        start = state["step"]
    wrapped = torch.nn.parallel.DistributedDataParallel(model) if world.size > 1 else model
    loader = DataLoader(data, batch_sampler=list(batches(len(data), args, world, start)), num_workers=args.workers,
                        collate_fn=list, pin_memory=world.device.type == "cuda",
                        worker_init_fn=genview.ignore_sigterm)
    bar, saved, parts = genview.progress(loader, "training", "step", total=args.steps - start), time.time(), []
    model.train()
    for step, pairs in enumerate(bar, start):
        torch.manual_seed(genview.step_generator(args.seed, 2, step, world.rank).initial_seed())        # torchvision's draws
        mirror = torch.rand(len(pairs), generator=genview.step_generator(args.seed, 1, step, world.rank)) < 0.5
        pairs = [mirrored(*pair) if m else pair for pair, m in zip(pairs, mirror)]
        pictures = [picture.to(world.device, non_blocking=True) for picture, _ in pairs]
        targets = [{key: target[key].to(world.device, non_blocking=True) for key in ("boxes", "labels", "masks")}
                   for _, target in pairs]
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(args, step)
        losses = wrapped(pictures, targets)        # of proposals and heads, five terms
        loss = sum(losses.values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        parts.append(torch.stack([loss, *losses.values()]).detach())
        last = step + 1 == args.steps
        if (step + 1) % args.log_every == 0 or last:
            means = dict(zip(["loss", *losses], torch.stack(parts).mean(0).tolist()))
            if not torch.tensor(means["loss"]).isfinite():
                raise Trouble(f"the loss is not finite before step {step + 1}: lower --lr")
            log(args, world, step=step + 1, lr=learning_rate(args, step), **means)
            bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)
            parts.clear()
        if world.rank == 0 and (last or time.time() - saved > 60 * args.save_minutes):
            state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1,
                     "run": this_run}
            genview.write_whole(path, lambda temporary: torch.save(state, temporary))
            saved = time.time()


def log(args, world, **values):
    if world.rank == 0:
        Path(args.output_dir).mkdir(parents=True, exist_ok=True)
        genview.append(Path(args.output_dir, "log.jsonl"), json.dumps(values) + "\n")


@torch.no_grad()
def detect(model, data, args, world):
    """All detections in COCO's format, masks run-length encoded; every process does its share, the first gets all."""
    from pycocotools import mask as coder
    model.eval()
    found = []
    share = torch.utils.data.Subset(data, range(world.rank, len(data), world.size))
    loader = DataLoader(share, num_workers=args.workers, collate_fn=operator.itemgetter(0))
    for picture, target in genview.progress(loader, "detecting", "image"):
        result = {key: value.cpu() for key, value in model([picture.to(world.device)])[0].items()}
        result["boxes"][:, 2:] -= result["boxes"][:, :2]
        for box, label, score, mask in zip(*(result[key] for key in ("boxes", "labels", "scores", "masks"))):
            code = coder.encode((mask[0] > 0.5).numpy().astype("uint8", order="F"))
            found.append({"image_id": target["image_id"], "category_id": label.item(), "bbox": box.tolist(),
                          "score": score.item(), "segmentation": code})
    if world.size == 1:
        return found
    everywhere = [None] * world.size
    dist.all_gather_object(everywhere, found)
    return sum(everywhere, [])


def average_precision(data, found):
    """COCO's AP, AP50 and AP75 of boxes and masks in percent: {"box": (AP, AP50, AP75), "mask": ...}."""
    from pycocotools.cocoeval import COCOeval
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        if not found:
            scores[name] = (0.0, 0.0, 0.0)
            continue
        with contextlib.redirect_stdout(None):
            judge = COCOeval(data.coco, data.coco.loadRes([dict(f) for f in found]), kind)
            judge.params.imgIds = data.ids
            judge.evaluate(), judge.accumulate(), judge.summarize()
        scores[name] = tuple(100 * float(x) for x in judge.stats[:3])
    return scores


def parse_args(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--backbone", required=True, help="a backbone.pt or last.pt, or what else eval_linear.py reads")
    parser.add_argument("--arch", help="torchvision's name of the network, where the checkpoint does not tell")
    parser.add_argument("--data-dir", default="data/coco", help="holds train2017/, val2017/ and annotations/")
    parser.add_argument("--limit", type=genview.at_least(1), help="use so many pictures of each split")
    parser.add_argument("--steps", type=genview.at_least(1), default=90_000, help="1x: 90000; 2x: 180000")
    parser.add_argument("--batch-size", type=genview.at_least(1), default=16, help="of all processes together")
    parser.add_argument("--lr", type=float, default=0.02, help="for 16 pictures; scale it with the batch")
    parser.add_argument("--output-dir", default="runs/detection", help="goes on from the last.pt there")
    parser.add_argument("--save-minutes", type=float, default=30)
    parser.add_argument("--log-every", type=genview.at_least(1), default=20, help="steps")
    parser.add_argument("--seed", type=genview.at_least(0), default=0)
    parser.add_argument("--device", help="cuda or cpu (default: the first there is)")
    parser.add_argument("--workers", type=genview.at_least(0), default=4, help="processes that read pictures")
    return parser.parse_args(argv)


def main():
    args = parse_args()
    world = genview.setup(args.device)
    if args.batch_size % world.size:
        raise Trouble(f"--batch-size {args.batch_size} cannot be shared by {world.size} processes: give a multiple")
    data, test = (Coco(args.data_dir, split, args.limit) for split in ("train", "val"))
    torch.manual_seed(args.seed)
    model = mask_rcnn(args.backbone, args.arch, data.num_classes, world)
    train(model, data, args, world)
    found = detect(model, test, args, world)
    if world.rank == 0:
        scores = average_precision(test, found)
        log(args, world, step=args.steps, **scores)
        say("; ".join(f"{name} AP {ap:.1f}%, AP50 {ap50:.1f}%, AP75 {ap75:.1f}%" for name, (ap, ap50, ap75) in scores.items()))


if __name__ == "__main__":
    genview.run(main)
