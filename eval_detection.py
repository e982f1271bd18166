"""Transfer to detection and segmentation: Mask R-CNN with FPN on COCO (section "experiments").

    python eval_detection.py --backbone runs/<name>/backbone.pt --batch-size 8
    torchrun --nproc_per_node=8 eval_detection.py --backbone runs/<name>/backbone.pt   # 1x schedule

The network is torchvision's and all of it is trained. Pictures are normalised as in pretraining.
pycocotools reads the annotations and computes COCO's average precision.
"""
import contextlib
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from support.checkpoint import Checkpoint, SaveTimes, digest, identity_of
from support.coco import read_annotations
from support.command_line import Parser, UserError, progress, real, say, script, whole
from support.data import IN_MEMORY_SIZE, SAME_FILES, count_and_digest
from support.files import Log, claimed, digest_of_file
from support.pictures import open_image, to_tensor
from support.pretrained import MEAN_STD, load_backbone
from support.processes import compare, cores_of_process, setup, start_worker
from support.schedules import linear_warmup, step_decay
from support.seeds import epoch_order, step_generator

# The customary 1x schedule: 90,000 steps of 16 pictures, lr drops to a tenth after 2/3 and 8/9.
# Other batches have as many pictures in all and in the warm-up, and a rate that grows linearly.
STEPS = 90_000
BATCH = 16
WARMUP_STEPS = 500
DROPS = (2 / 3, 8 / 9)
LEAST_FOR_NORM = 8       # pictures that batch norm needs; where it sees fewer it is frozen
SHORT_SIDES = (640, 672, 704, 736, 768, 800)    # one is drawn; evaluation: 800
LONG_SIDE = 1333
STREAM_FLIPS = 1         # streams of random numbers beside that of the order
STREAM_MODEL = 2

# Flags that may differ when a training goes on. Digests of the backbone and of the annotations
# take the place of the first four.
FREE = {"backbone", "arch", "branch", "data_dir", "output_dir", "save_minutes", "log_every",
        "device", "workers"}


class Coco(Dataset):
    """A split of COCO as cocodataset.org packs it. UserError where it is missing or damaged."""
    def __init__(self, data_dir, split, limit=None):
        try:
            from pycocotools.coco import COCO
        except ImportError:
            raise UserError("COCO's format needs pycocotools: pip install pycocotools") from None
        self.folder = Path(data_dir, f"{split}2017")
        path = Path(data_dir, "annotations", f"instances_{split}2017.json")
        self.annotations = path
        if not (path.is_file() and self.folder.is_dir()):
            raise UserError(f"{path} or {self.folder}/ is missing: download {split}2017.zip and "
                            "annotations_trainval2017.zip from cocodataset.org and unpack them")
        with contextlib.redirect_stdout(None):     # COCO prints its progress
            self.coco = COCO()
            self.coco.dataset.update(read_annotations(path))
            self.coco.createIndex()
        ids = sorted(self.coco.getImgIds())
        self.ids = [i for i in ids if self.objects(i) or split == "val"][:limit]
        count = sum(len(self.objects(i)) for i in self.ids)
        if not count:
            limited = f" (--limit {limit})" if limit else ""
            raise UserError(f"{path}: its pictures{limited} hold no object to find; crowds and "
                            f"objects of at most a pixel do not count")
        self._check_pictures(path)
        self.categories = {key: self.coco.cats[key]["name"] for key in sorted(self.coco.cats)}
        self.labels = {key: label for label, key in enumerate(self.categories, 1)}
        self.num_classes = 1 + len(self.categories)                # 0 is the background
        self._say_what_it_holds(path, count)

    def _say_what_it_holds(self, path, count):
        others = sum(len(self.coco.imgToAnns[i]) for i in self.ids) - count
        also = f" (and {others} crowds or without extent)" if others else ""
        names = list(self.categories.values())
        more = ", ..." if len(names) > 10 else ""
        say(f"{path}: {len(self.ids)} pictures, {count} objects{also}, {len(names)} categories: "
            f"{', '.join(names[:10])}{more}")

    def _check_pictures(self, path):
        """UserError where pictures are missing or empty: unread, by their size on the disk."""
        paths = [self.path_of(i) for i in self.ids]
        bad = [p for p in paths if not (p.is_file() and p.stat().st_size)]
        if bad:
            raise UserError(f"{len(bad)} of the {len(paths)} pictures that {path} names are "
                            f"missing or empty, such as {bad[0]}: unpack the pictures there, or "
                            f"remove their entries from it")

    def objects(self, image_id):
        """Annotations of single objects (no crowds) that have an extent."""
        return [a for a in self.coco.imgToAnns[image_id]
                if not a["iscrowd"] and a["area"] > 0 and min(a["bbox"][2:]) > 1]

    def path_of(self, image_id):
        return self.folder / self.coco.imgs[image_id]["file_name"]

    def picture(self, image_id):
        """The PIL picture: upright, or as stored where only that is of the size in the file."""
        image = self.coco.imgs[image_id]
        size = (image["width"], image["height"])
        path = self.path_of(image_id)
        picture = open_image(path)
        if picture.size != size:
            picture = open_image(path, upright=False)
        if picture.size != size:
            raise UserError(f"{path} has {picture.width} x {picture.height} pixels, its entry in "
                            f"the annotations says {size[0]} x {size[1]}: boxes and masks would "
                            f"lie beside the objects; take the pictures that were annotated")
        return picture

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        """Picture (3, H, W) in [0, 1]; its objects' boxes (B, 4), labels (B,), masks (B, H, W)."""
        image_id = self.ids[index]
        objects = self.objects(image_id)
        picture = to_tensor(self.picture(image_id)) / 255
        boxes = torch.tensor([a["bbox"] for a in objects], dtype=torch.float32).view(-1, 4)
        boxes[:, 2:] += boxes[:, :2]               # x1, y1, x2, y2 in pixels
        labels = torch.tensor([self.labels[a["category_id"]] for a in objects], dtype=torch.long)
        masks = torch.zeros(len(objects), *picture.shape[1:], dtype=torch.uint8)
        for mask, annotation in zip(masks, objects, strict=True):
            mask.copy_(torch.from_numpy(self.coco.annToMask(annotation)))
        return picture, {"boxes": boxes, "labels": labels, "masks": masks, "image_id": image_id}


def mask_rcnn(path, arch, num_classes, world, branch=None, mean_std=None, frozen=False):
    """Mask R-CNN on a checkpoint's backbone (see load_backbone), a ResNet for large pictures, else
    UserError; batch norm is trained, on GPUs over all processes, or frozen."""
    network, _, args = load_backbone(path, arch, branch=branch, mean_std=mean_std)
    state = network.state_dict()
    if "layer4.0.conv1.weight" not in state or state["conv1.weight"].shape[-1] != 7:
        raise UserError(f"{path} is no ResNet for large pictures, which detection needs: "
                        f"train it at more than {IN_MEMORY_SIZE} pixels")
    backbone = resnet_fpn_backbone(backbone_name=args["arch"], weights=None,
                                   norm_layer=FrozenBatchNorm2d if frozen else torch.nn.BatchNorm2d,
                                   trainable_layers=5)
    backbone.body.load_state_dict(state)
    # In bfloat16 where that is fast. The rest is float32: torchvision would round the boxes too.
    backbone.forward = world.autocast()(backbone.forward)
    backbone.register_forward_hook(lambda _, inputs, maps: {k: x.float() for k, x in maps.items()})
    model = MaskRCNN(backbone, num_classes, min_size=SHORT_SIDES, max_size=LONG_SIDE,
                     image_mean=args["mean"], image_std=args["std"])
    return world.synchronised(model).to(world.device)


def mirrored(picture, target):
    width = picture.shape[2]
    boxes = target["boxes"].clone()
    boxes[:, [0, 2]] = width - boxes[:, [2, 0]]
    return picture.flip(2), target | {"boxes": boxes, "masks": target["masks"].flip(2)}


def warmup_steps(batch_size):
    """As many pictures as in the customary warm-up."""
    return WARMUP_STEPS * BATCH / batch_size


def detection_rate(args, step):
    """Linear warm-up, then two drops to a tenth."""
    relative = args.batch_size / BATCH
    warmup = linear_warmup(1.0, step + 1, min(warmup_steps(args.batch_size), args.steps))
    return args.lr * relative * warmup * step_decay([d * args.steps for d in DROPS], step)


def batches(count, args, world, start):
    """This process's part of each batch from step start on: yields lists of indices < count."""
    steps_of_epoch = count // args.batch_size
    n = args.batch_size // world.size
    for step in range(start, args.steps):
        epoch, i = divmod(step, steps_of_epoch)
        if i == 0 or step == start:
            order = epoch_order(count, args.seed, epoch).tolist()
        first = i * args.batch_size + world.rank * n
        yield order[first:first + n]


def train_detector(model, data, args, world):
    """Fine-tunes the model for --steps steps; goes on from --output-dir's last.pt."""
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr, momentum=0.9, weight_decay=1e-4)
    identity = identity_of(args, FREE) | {"backbone": digest(model.backbone.body),
                                          "annotations": digest_of_file(data.annotations)}
    checkpoint = Checkpoint(Path(args.output_dir, "last.pt"), identity, world,
                            regrouped="other random draws of sides, proposals and flips, so "
                                      "not the same result")
    start = resume(checkpoint, model, optimizer)
    indices = list(batches(len(data), args, world, start))
    log = Log(args.output_dir, world)
    log.keep(lambda line: "loss" in line and line["step"] <= start)
    wrapped = world.distributed(model)
    loader = DataLoader(data, batch_sampler=indices, num_workers=args.workers,
                        worker_init_fn=start_worker, collate_fn=list,
                        pin_memory=world.device.type == "cuda")
    bar = progress(loader, "training", "step", total=args.steps, initial=start)
    save_times = SaveTimes(args.save_minutes, world)
    window = []
    model.train()
    for step, pairs in enumerate(bar, start):
        losses = detection_step(wrapped, optimizer, pairs, step, args, world)
        window.append(torch.stack(list(losses.values())))
        last = step + 1 == args.steps
        if last or (step + 1) % args.log_every == 0:
            log_means(log, args, step, list(losses), torch.stack(window), bar)
            window.clear()
            if last or save_times.due():
                checkpoint.save(model=model.state_dict(), optimizer=optimizer.state_dict(),
                                step=step + 1)
                save_times.saved(checkpoint.path, "the same command")
    save_times.end()


def resume(checkpoint, model, optimizer):
    """Loads the checkpoint, if there is one. Returns the number of steps done."""
    state = checkpoint.load()
    if not state:
        return 0
    with checkpoint.restoring():
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    return state["step"]


def log_means(log, args, step, names, losses, bar):
    """The means of the losses (steps, terms) since the last line; UserError: not finite."""
    means = dict(zip(names, losses.mean(0).tolist(), strict=True))
    if not torch.tensor(means["loss"]).isfinite():
        raise UserError(f"the loss is not finite before step {step + 1}: lower --lr")
    log.write(step=step + 1, lr=detection_rate(args, step), **means)
    bar.set_postfix_str(f"loss {means['loss']:.3f}", refresh=False)


def detection_step(model, optimizer, pairs, step, args, world):
    """One step on a batch of (picture, objects). Returns the loss and its terms, scalars."""
    # The seed of torchvision's own draws: sides, proposals.
    torch.manual_seed(step_generator(args.seed, STREAM_MODEL, step, world.rank).initial_seed())
    generator = step_generator(args.seed, STREAM_FLIPS, step, world.rank)
    flipped = torch.rand(len(pairs), generator=generator) < 0.5
    pictures = []
    targets = []
    for pair, flip in zip(pairs, flipped, strict=True):
        picture, target = mirrored(*pair) if flip else pair
        pictures.append(picture.to(world.device, non_blocking=True))
        targets.append({name: target[name].to(world.device, non_blocking=True)
                        for name in ("boxes", "labels", "masks")})
    optimizer.param_groups[0]["lr"] = detection_rate(args, step)
    losses = model(pictures, targets)              # of the proposals and the heads, five terms
    losses = {"loss": sum(losses.values())} | losses
    optimizer.zero_grad()
    losses["loss"].backward()
    optimizer.step()
    return {name: x.detach() for name, x in losses.items()}


@torch.no_grad()
def detect(model, data, args, world):
    """All detections in COCO's format, masks run-length encoded; each process does its part."""
    model.eval()
    keys = list(data.categories)                   # of the labels 1, 2, ...
    found = []
    mine = Subset(data, range(world.rank, len(data), world.size))
    loader = DataLoader(mine, None, num_workers=args.workers, worker_init_fn=start_worker)
    for picture, target in progress(loader, "detecting", "image"):
        result = model([picture.to(world.device)])[0]
        found += in_coco_format(result, target["image_id"], keys)
    return sum(world.gather_objects(found), [])


def in_coco_format(result, image_id, keys):
    """Mask R-CNN's result for one picture as a list of COCO's detections. keys: category ids."""
    from pycocotools import mask as coder
    result = {name: x.cpu() for name, x in result.items()}
    found = []
    for box, label, score, mask in zip(result["boxes"], result["labels"], result["scores"],
                                       result["masks"], strict=True):
        x1, y1, x2, y2 = box.tolist()
        code = coder.encode((mask[0] > 0.5).numpy().astype("uint8", order="F"))
        found.append({"image_id": image_id, "category_id": keys[label - 1],
                      "bbox": [x1, y1, x2 - x1, y2 - y1], "score": score.item(),
                      "segmentation": code})
    return found


def average_precision(data, found):
    """COCO's AP, AP50, AP75 in percent of all detections: {"box": three numbers, "mask": three}."""
    from pycocotools.cocoeval import COCOeval
    scores = {"box": (0.0, 0.0, 0.0), "mask": (0.0, 0.0, 0.0)}
    if not found:                                  # pycocotools needs at least one
        return scores
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        with contextlib.redirect_stdout(None):
            judge = COCOeval(data.coco, data.coco.loadRes([dict(f) for f in found]), kind)
            judge.params.imgIds = data.ids
            judge.evaluate()
            judge.accumulate()
            judge.summarize()
        scores[name] = tuple(100 * float(x) for x in judge.stats[:3])
    return scores


def ap_in_words(scores):
    """The scores of average_precision as a line of text."""
    parts = []
    for name, (ap, ap50, ap75) in scores.items():
        parts.append(f"{name} AP {ap:.1f}%, AP50 {ap50:.1f}%, AP75 {ap75:.1f}%")
    return "; ".join(parts)


def parse_args(argv=None):
    parser = Parser(__doc__.splitlines()[0])
    add = parser.add_argument
    add("--backbone", required=True, help="a checkpoint, as for eval_linear.py --checkpoint")
    add("--arch", help="torchvision's name of the network, where the checkpoint does not tell")
    add("--branch", help="which backbone of several, a part of its prefix, such as student")
    add("--mean-std", choices=list(MEAN_STD), help="of the pictures it was trained on")
    add("--data-dir", default="data/coco", help="has train2017/, val2017/ and annotations/")
    add("--limit", type=whole(1), help="use so many pictures of each split")
    add("--steps", type=whole(1), help="default: the 1x schedule, 90000 steps of 16 pictures")
    add("--batch-size", type=whole(1), default=BATCH, help="of all processes together")
    add("--lr", type=real(0, 1e4), default=0.02,
        help="for 16 pictures; it grows linearly with the batch")
    add("--output-dir", default="runs/detection", help="a last.pt there is continued")
    add("--save-minutes", type=real(0, 1e6), default=30, help="minutes between checkpoints")
    add("--log-every", type=whole(1), default=20, help="steps between lines of log.jsonl")
    add("--seed", type=whole(0), default=0, help="of all random draws")
    add("--device", help="cuda or cpu (default: cuda where available)")
    add("--workers", type=whole(0), default=cores_of_process(),
        help="processes that read pictures")
    args = parser.parse_args(argv)
    args.steps = args.steps or round(STEPS * BATCH / args.batch_size)
    return args


def load_splits(args):
    """The pictures to train on and to test with."""
    data = Coco(args.data_dir, "train", args.limit)
    test = Coco(args.data_dir, "val", args.limit)
    if data.categories != test.categories:
        raise UserError(f"the splits have other categories: train {data.categories}, "
                        f"val {test.categories}")
    for split, part in (("train", data), ("val", test)):
        names = [str(key) for key in part.ids]
        compare(f"in {split}", count_and_digest(names), SAME_FILES)
    if len(data) < args.batch_size:
        raise UserError(f"{len(data)} pictures with objects do not fill one batch of "
                        f"{args.batch_size}: lower --batch-size")
    return data, test


def main():
    args = parse_args()
    # Pictures of all sizes are padded to the largest.
    world = setup(args.device, same_shapes=False, args=args)
    if args.batch_size % world.size:
        raise UserError(f"--batch-size {args.batch_size} is no multiple of {world.size} processes")
    data, test = load_splits(args)
    if args.steps <= warmup_steps(args.batch_size):
        say(f"*** --steps {args.steps} ends within the usual warm-up of "
            f"{warmup_steps(args.batch_size):g} steps: the rate rises to the end")
    torch.manual_seed(args.seed)
    seen = args.batch_size if world.device.type == "cuda" else args.batch_size // world.size
    frozen = seen < LEAST_FOR_NORM
    note = ""
    if frozen:
        note = (f"; batch norm frozen, as it would see {seen} pictures: not comparable with the "
                f"customary {BATCH}")
    model = mask_rcnn(args.backbone, args.arch, data.num_classes, world, args.branch,
                      args.mean_std, frozen)
    rate = args.lr * args.batch_size / BATCH
    say(f"{args.steps} steps of {args.batch_size} pictures, rate {rate:g}{note}")
    with claimed(args.output_dir, world):
        train_detector(model, data, args, world)
        found = detect(model, test, args, world)
        if world.rank == 0:
            scores = average_precision(test, found)
            Log(args.output_dir, world).write(step=args.steps, **scores)
            print(ap_in_words(scores) + note)


if __name__ == "__main__":
    script(main)
