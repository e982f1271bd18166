"""What the scripts of this project share: data sets by name, pairs of views, the frozen encoder.

A view is P_i, augmented; generated is X_i^+, the picture that a view may be made of.

Legend of the shapes: N images, n pairs of a batch in this process (N in the training scripts), V
views of each, S side of a view in pixels, T tokens (positions of a feature map), K features of a
token.
"""
import math
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset

import shapes
from quality_loss import fit_foreground, foreground_threshold, orient_foreground, pair_quality
from support import augment, data
from support.augment import (
    CLIP_MEAN,
    CLIP_STD,
    Augmentation,
    Draws,
    augment_crops,
    normalise,
    renormalise,
)
from support.command_line import UserError, in_short, progress, say
from support.data import IN_MEMORY_SIZE, SAME_FILES, Images, count_and_digest, spaced
from support.encoders import RGB, feature_map, load_vision_model, patches_of, preprocessing_of
from support.files import read_component, write_png
from support.pictures import sheet, to_image
from support.processes import compare, dtype_name, start_worker
from support.seeds import epoch_order, step_generator
from support.views import content_of_files, find_views, identity_of_views, views_into_memory

FIT_IMAGES = 10_000           # images that the foreground component is fitted on (release)
FRACTION = 0.4                # of all tokens that is foreground; sets alpha, Eq. 7 (release)
MINI = Path(__file__).with_name("weights") / "mini-unclip"    # by studies/train_generator.py
CIFAR_CLASSES = {"cifar10": 10, "cifar100": 100}
DATA_DIRS = {"shapes": "data", "cifar10": "data", "cifar100": "data", "imagenet": "data/imagenet",
             "folder": None}                       # where they lie by default


# ---------------------------------------------------------------------------------------- data sets
def load_images(dataset, data_dir, split, image_size, limit=None, skip_bad=None, workers=0):
    """Reads one of the data sets: shapes, cifar10, cifar100, imagenet or folder.

    Args:
        data_dir: where it lies. CIFAR is downloaded there, unless it has a train/ folder: then it
            is read as a folder.
        split: "train" or "test" (of a folder, val/ or test/).
        image_size: S; folders of images are read into memory up to IN_MEMORY_SIZE.
        limit: use at most so many images, evenly spaced over the set.
        skip_bad: leave out the files that cannot be read; else the first stops the program, at the
            latest when it is needed. None: as False, in a script that has no such flag to advise.
        workers: processes that read many files.
    Returns:
        Images.
    Raises:
        UserError: the data is not there or cannot be read.
    """
    if dataset == "shapes":
        scenes = shapes.split(split)
        names = [f"{split}/{i:05d}" for i in range(len(scenes.shape))]
        images = Images(names, scenes.shape, len(shapes.CLASSES), shapes.render(scenes))
    elif dataset.startswith("cifar") and not (Path(data_dir) / "train").is_dir():
        images = data.read_cifar(dataset, data_dir, split)
    else:
        images = data.find_files(Path(data_dir), split)
    wanted = CIFAR_CLASSES.get(dataset, images.num_classes)
    if images.num_classes != wanted and split == "train":
        say(f"*** {data_dir}/train is read as {dataset}, which has {wanted} classes, not "
            f"{images.num_classes}: --dataset folder is for other pictures, another --data-dir "
            f"for the download")
    images = images._replace(source=count_and_digest(images.names))
    if limit is not None:
        images = images.at_most(limit)
    compare(f"in {split}", f"{images.source}, {len(images.names)} used", SAME_FILES)
    if images.pixels is not None:
        return images
    if image_size <= IN_MEMORY_SIZE:
        return data.into_memory(images, image_size, skip_bad, workers)
    return data.without_unreadable(images, workers) if skip_bad else images


def data_dir_of(dataset, given):
    """Where a data set lies: as --data-dir says, else by default."""
    if dataset == "folder" and not given:
        raise UserError("--dataset folder needs --data-dir, a folder with train/ and val/ or test/")
    return given or DATA_DIRS[dataset]


def default_views_dir(dataset, data_dir):
    """Where generate_views.py puts the views and training looks for them."""
    return f"views/{Path(data_dir).resolve().name if dataset == 'folder' else dataset}"


# ----------------------------------------------------------------------------------- pairs of views
# Streams of random numbers beside that of the augmentations, which has no number of its own.
STREAM_GENERATED = 1  # is view 1 or view 2 the generated one?
STREAM_CROPS = 2      # boxes of crops from files: drawn in the workers, an image at a time


def augmentations(args):
    """t1, t2. MoCo v3 blurs and solarises the two views unequally, as BYOL does, and jitters
    saturation less. SwAV jitters twice as strongly and adds small crops."""
    usual = Augmentation((args.crop_min, 1.0), blur=args.blur, colour=args.colour)
    if args.method in ("mocov2", "simsiam"):
        return [usual] * 2
    if args.method == "swav":
        large = usual._replace(jitter=(0.8, 0.8, 0.8, 0.2))
        small = large._replace(scale=(args.small_min, args.crop_min), size=args.small_size)
        return [large] * 2 + [small] * args.small_crops
    usual = usual._replace(jitter=(0.4, 0.4, 0.2, 0.1))
    return [usual._replace(blur=2 * args.blur),                # probabilities: 1.0 and 0.1
            usual._replace(blur=0.2 * args.blur, solarise=0.2)]


class PairLoader:
    """The positive pairs P_i1 = t1(X_i), P_i2 = t2(X_i^+), in batches (section "framework").

    Which of the two views is the generated one is drawn for each sample. With more augmentations
    than two (SwAV's small crops), further views come from image and generated view in turn. Every
    random number depends only on seed, epoch, step and place in the batch (crops of files: seed,
    epoch and image), not on the number of processes or interruptions.
    """
    def __init__(self, images, generated, augmentations, image_size, batch_size, seed, world,
                 workers=4, steps=None):
        """
        Args:
            images: Images, the X_i.
            generated: the X_i^+: (N, 3, S, S) for images in memory, a list of paths for files, or
                None for plain pairs of one image.
            augmentations: t_1 ... t_V, two or more.
            batch_size: of all processes together.
            workers: processes that read files; they live as long as this loader.
            steps: of an epoch; None: as many as there are batches.
        """
        count = len(images.names)
        self.steps = steps or count // batch_size
        n = batch_size // world.size
        part = slice(world.rank * n, (world.rank + 1) * n)
        self.plan = BatchPlan(count, batch_size, part, self.steps, len(augmentations), seed)
        self.augmentations = augmentations
        self.sizes = [t.size or image_size for t in augmentations]
        self.device = world.device
        self.in_memory = images.pixels is not None     # small enough for the device's own memory
        if self.in_memory:
            self.pixels = images.pixels.to(self.device)
            self.generated = self.pixels if generated is None else generated.to(self.device)
        else:
            self.sampler = PairSampler(self.plan)
            self.reader = DataLoader(
                CropsOfFiles(images, generated, augmentations, self.sizes, seed),
                batch_sampler=self.sampler, num_workers=workers, worker_init_fn=start_worker,
                persistent_workers=workers > 0, pin_memory=self.device.type == "cuda")

    def epoch(self, epoch, start=0):
        """Yields V views, each (n, 3, S, S), from step start on: this process's part of a batch."""
        if self.in_memory:
            batches = self.plan.batches(epoch, start)
        else:
            self.sampler.set_epoch(epoch, start)
            batches = self.reader
        for step, batch in enumerate(batches, start):
            draws, orders = self.plan.draws(epoch, step, self.device)
            crops = self.crop(*batch, draws) if self.in_memory else batch
            views = []
            for v, t in enumerate(self.augmentations):
                x = crops[v].to(self.device, non_blocking=True).float() / 255
                views.append(augment_crops(x, draws[v], orders[v], t))
            yield views

    def crop(self, index, generated_first, draws):
        """V crops (n, 3, S, S) of images in memory; see BatchPlan."""
        index = index.to(self.device, non_blocking=True)
        generated_first = generated_first.to(self.device, non_blocking=True)[:, None, None, None]
        image = self.pixels[index]                                                  # X_i
        generated = self.generated[index]                                           # X_i^+
        pair = (torch.where(generated_first, generated, image),
                torch.where(generated_first, image, generated))
        height, width = image.shape[2:]
        crops = []
        for v, t in enumerate(self.augmentations):
            boxes = augment.crop_boxes(draws[v].crop, height, width, t.scale)
            crops.append(augment.crop(pair[v % 2], boxes, self.sizes[v]))
        return crops


class BatchPlan(NamedTuple):
    """Which images are in a batch, and its random numbers: the same in all processes, of which each
    takes its part."""
    count: int                                     # of the images
    batch_size: int
    part: slice                                    # of a batch: this process's
    steps: int                                     # of an epoch
    num_views: int                                 # V, of an image
    seed: int

    def batches(self, epoch, start):
        """Yields, for each pair of this process, the index of its image (n,) and whether view 1 is
        the generated one, (n,) bool; else view 2 is."""
        order = epoch_order(self.count, self.seed, epoch)
        for step in range(start, self.steps):
            batch = order[step * self.batch_size:(step + 1) * self.batch_size]
            generator = step_generator(self.seed, epoch, step, STREAM_GENERATED)
            generated_first = torch.rand(self.batch_size, generator=generator) < 0.5
            yield batch[self.part], generated_first[self.part]

    def draws(self, epoch, step, device):
        """The random numbers of a step's augmentations, for each view: Draws of (n,), and the order
        of its colour jitters."""
        generator = step_generator(self.seed, epoch, step)
        orders = [torch.randperm(4, generator=generator).tolist() for _ in range(self.num_views)]
        u = torch.rand(self.batch_size, self.num_views, Draws.COLUMNS, generator=generator)
        u = u[self.part].to(device, non_blocking=True)
        return [Draws.split(u[:, v]) for v in range(self.num_views)], orders


class PairSampler:
    """Yields the keys of CropsOfFiles of each batch of an epoch."""
    def __init__(self, plan):
        self.plan = plan
        self.set_epoch(0, 0)

    def set_epoch(self, epoch, start):
        self.epoch = epoch
        self.start = start

    def __len__(self):
        return self.plan.steps - self.start

    def __iter__(self):
        for index, generated_first in self.plan.batches(self.epoch, self.start):
            pairs = zip(index.tolist(), generated_first.tolist(), strict=True)
            yield [(self.epoch, *pair) for pair in pairs]


class CropsOfFiles(Dataset):
    """Crops of large images: workers decode and crop; the rest of the augmentation follows."""
    def __init__(self, images, generated, augmentations, sizes, seed):
        # Arrays of bytes: reading a list of strings counts references to them, which writes, and
        # each forked worker would copy it.
        self.images = np.array([os.fsencode(images.root / name) for name in images.names])
        generated = generated or [None] * len(images.names)    # b"": the image itself
        self.generated = np.array([os.fsencode(path or "") for path in generated])
        self.augmentations = augmentations
        self.sizes = sizes
        self.seed = seed

    def __getitem__(self, key):
        """key: epoch, index of the image, is view 1 the generated one? -> V crops (3, S, S)."""
        epoch, index, generated_first = key
        image = data.read_picture(os.fsdecode(self.images[index]))
        generated = image
        if self.generated[index]:
            generated = data.read_picture(os.fsdecode(self.generated[index]))
        pair = (generated, image) if generated_first else (image, generated)
        generator = step_generator(self.seed, epoch, index, STREAM_CROPS)
        u = torch.rand(len(self.augmentations), Draws.COLUMNS, generator=generator)
        tries = Draws.split(u).crop.tolist()                                # V x CROP_TRIES x 4
        crops = []
        for v, t in enumerate(self.augmentations):
            height, width = pair[v % 2].shape[1:]
            box = augment.crop_box(tries[v], height, width, t.scale)
            crops.append(augment.crop_file(pair[v % 2], box, self.sizes[v]))
        return crops


class Generated(NamedTuple):
    """What was loaded from --views-dir, or made by the world of shapes."""
    pictures: object = None         # the X_i^+ as PairLoader takes them, or load_extra's samples
    coverage: str = ""              # where not all images have one: how many, in words
    identity: dict = {}             # the settings they were made with, {name: value}
    content: str = ""               # what tells these files from others


def load_generated(images, views_dir, dataset, skip_bad=False, workers=0):
    """The generated views of a folder -> Generated."""
    paths = find_views(images, views_dir, dataset)
    content = content_of_files(images.names, paths)
    compare("generated views", content, SAME_FILES)
    if images.pixels is not None:
        generated, bad = views_into_memory(images, paths, skip_bad, workers)
    else:
        bad = data.unreadable(paths, workers) if skip_bad else {}
        generated = [None if i in bad else path for i, path in enumerate(paths)]
    missing = len(bad) + paths.count(None)
    of = f" of {len(paths) - missing} of {len(paths)} images"
    text = f"generated views{of} from {views_dir}"
    if missing:
        text = f"*** {text}; the other {missing} use themselves"
    say(text)
    identity = identity_of_views(views_dir)
    return Generated(generated, of if missing else "", identity, content)


def load_extra(images, views_dir, dataset, skip_bad=False, workers=0):
    """--views extra -> Generated, further images, (M, 3, H, H) uint8 or M paths: the views of these
    images in a folder of generate_views.py, all the images of any other folder."""
    if Path(views_dir, "settings.json").exists():
        paths = [path for path in find_views(images, views_dir, dataset) if path]
    else:
        paths = data.image_files(views_dir)
    if not paths:
        raise UserError(f"{views_dir} holds no images for --views extra")
    content = content_of_files([path.name for path in paths], paths)
    compare("extra images", content, SAME_FILES)
    # Absolute: images.root / name is then the name itself.
    names = [str(path.resolve()) for path in paths]
    extra = Images(names, torch.zeros(len(paths)), 0, root=Path())
    if images.pixels is not None:
        extra = data.into_memory(extra, images.pixels.shape[-1], skip_bad, workers)
    elif skip_bad:
        extra = data.without_unreadable(extra, workers)
    say(f"{len(extra.names)} further training samples from {views_dir}")
    left_out = f" ({extra.left_out} unreadable ones left out)" if extra.left_out else ""
    views = extra.names if images.pixels is None else extra.pixels
    return Generated(views, left_out, identity_of_views(views_dir), content)


def expand(images, extra):
    """The paper's comparison, naive expansion: further training samples instead of views. extra:
    see load_extra. Their label is -1; the training uses no labels."""
    labels = F.pad(images.labels, (0, len(extra)), value=-1)
    if images.pixels is None:
        return images._replace(names=images.names + extra, labels=labels)
    names = [f"extra/{i}" for i in range(len(extra))]
    pixels = torch.cat([images.pixels, extra])
    return images._replace(names=images.names + names, labels=labels, pixels=pixels)


def draw_pairs(path, views, quality_of, world, count=12):
    """pairs.png: pairs of a batch from best to worst quality, scores below (cf. Fig. 5)."""
    order = torch.arange(len(views[0]))
    captions = [""] * len(order)
    frames = {}
    if quality_of:
        with world.autocast():
            scores = torch.stack(quality_of(*views)).T.cpu()               # (N, 3): q, s^f, s^b
        order = scores[:, 0].argsort(descending=True)
        captions = ["q = {:.2f} =\n{:.2f} - {:.2f}".format(*row) for row in scores.tolist()]
        last = min(count, len(order)) - 1
        frames = {(0, 0): "green", (0, 1): "green", (last, 0): "red", (last, 1): "red"}
    chosen = order[spaced(len(order), count)].tolist()
    pixels = [(renormalise(view.float()) * 255).round().clamp(0, 255).byte() for view in views]
    columns = [[to_image(view[i]) for view in pixels] for i in chosen]
    canvas = sheet(columns, [captions[i] for i in chosen], frames, 96, ("view 1", "view 2"))
    write_png(path, canvas)


# ------------------------------------------------------------ the frozen encoder and its foreground
def mini():
    """The folder that "mini" names; UserError where it is not there."""
    if not MINI.is_dir():
        raise UserError(f"no {MINI.parent.name}/{MINI.name} here: studies/train_generator.py "
                        f"trains such a generator, whose folder can be named instead of mini")
    return MINI


def clip_tokens(vision_model, hidden):
    """Patch tokens of a CLIP vision model: last hidden state (N, 1 + T, K) -> (N, T, K), the final
    layer norm on each, class token left out (section "adaptive view generation", step 1)."""
    return vision_model.post_layernorm(hidden[:, 1:])


class FrozenEncoder(torch.nn.Module):
    """E: a frozen vision model of transformers or timm, views (N, 3, S, S) -> features (N, T, K).

    Views of another size than the model's are resized to it.
    """

    # release: the image tower of OpenCLIP's ConvNeXt-Base-wide, maps of 7 x 7 x 1024
    NAMES = {"clip": "openai/clip-vit-base-patch32",
             "release": "timm/convnext_base.clip_laion2b_augreg"}
    SIZES = {"release": 224}                       # the authors' size, not the model's own 256

    def __init__(self, name):
        """name: mini, clip, release, a hub id or a folder. UserError where it cannot be loaded or
        its features are unusable."""
        super().__init__()
        path = str(mini() / "image_encoder") if name == "mini" else self.NAMES.get(name, name)
        try:
            self.model, self.is_clip, missing = load_vision_model(path)
        except Exception as error:                 # of several libraries
            way = "name another folder"
            if not Path(path).is_dir():
                way = "download it where there is a network and name its folder"
            raise UserError(f"the encoder {path} could not be loaded ({in_short(error)}): {way} by "
                            f"--encoder (timm's, such as release, need pip install timm), or "
                            f"train with --quality off; --dataset shapes needs no download"
                            ) from None
        self.eval().requires_grad_(False)
        try:
            own = preprocessing_of(path, self.model.config, self.is_clip)
            self.size = self.SIZES.get(name, own.size)
            self.mean = own.mean
            self.std = own.std
            self.order = own.order
            self.check(missing)
        except Exception as error:                 # of several libraries
            raise UserError(f"the encoder {path} cannot be used ({in_short(error)}): name another "
                            f"vision model by --encoder, or train with --quality off") from None

    def check(self, missing):
        """Raises UserError unless two calls with one picture give the same, finite features.
        missing: the names of weights that are NaN, see encoders.missing_weights."""
        generator = torch.Generator().manual_seed(0)
        picture = torch.randn(1, 3, self.size, self.size, generator=generator)
        with sdpa_kernel(SDPBackend.MATH):         # the fast kernel of CPUs makes 0 of NaN
            features = self(picture)
            again = self(picture)
        if not features.isfinite().all():
            if missing:
                raise UserError(f"its file lacks {len(missing)} weights, such as {missing[0]}")
            raise UserError("its features of a picture of noise are not finite")
        change = (again - features).abs().max()
        largest = features.abs().max()
        if change > 1e-3 * largest:
            raise UserError(f"two calls with one picture give features that differ by "
                            f"{change:.2g}; the largest is {largest:.2g}")

    @torch.no_grad()
    def forward(self, views):
        if (self.mean, self.std) != (CLIP_MEAN, CLIP_STD):     # which the views have
            views = renormalise(views, self.mean, self.std)
        if self.order != RGB:
            views = torch.stack([views[:, colour] for colour in self.order], 1)
        if views.shape[-1] != self.size:
            size = (self.size, self.size)
            views = F.interpolate(views, size=size, mode="bilinear", antialias=True)
        hidden = self.model(pixel_values=views).last_hidden_state
        if self.is_clip:
            return clip_tokens(getattr(self.model, "vision_model", self.model), hidden)
        return feature_map(hidden, patches_of(self.model, self.size))


class PairQuality:
    """P_1, P_2 -> q, s^f, s^b of each pair, (N,), by a frozen encoder E and the first principal
    component v1 of its features (section "quality-driven contrastive loss")."""
    def __init__(self, encoder, component):
        self.encoder = encoder
        self.component = component

    @torch.inference_mode()
    def __call__(self, view1, view2):
        features1, features2 = self.encoder(torch.cat([view1, view2])).chunk(2)     # each (N, T, K)
        return pair_quality(features1, features2, self.component)


def load_or_fit_foreground(batches, count, size, path=None, flip=False):
    """The foreground component of a data set and its threshold, from a file or fitted.

    Args:
        batches: yields tokens (n, T, K) of up to count images of the data set; not read where the
            file at path says v1 and alpha and flip is not set.
        size: K.
        path: foreground.npz or the release's pca_vectors.npy, which has neither sign nor
            threshold; None: fit.
        flip: take the other side as foreground.
    Returns:
        v1 (K,), alpha.
    Source: section "adaptive view generation", steps 2 and 3, Eq. 7.
    """
    v1, alpha = read_component(path, size) if path else (None, None)
    if alpha is not None and not flip:
        return v1, alpha
    tokens = collect_tokens(batches, count)                                        # (N, T, K)
    side = math.isqrt(tokens.shape[1])
    if v1 is None:
        v1, alpha = fit_foreground(tokens, (side, side), FRACTION)
    elif alpha is None:
        v1, alpha = orient_foreground(v1, tokens, (side, side), FRACTION)
    a = torch.cat([part.float() @ v1 for part in tokens.split(256)])                # (N, T)
    if len(a) > 1 and a.mean(0).var(correction=0) > 0.9 * a.var(correction=0):
        say("*** the foreground maps of all images are nearly the same: the tokens of this encoder "
            "depend on the place, not on the image: noise levels and quality mean little")
    if flip:
        return -v1, foreground_threshold(-a, FRACTION)
    return v1, alpha


def collect_tokens(batches, count):
    """The tokens of all batches, (N, T, K) in half precision, 6.5 GB for 10,000 images of ViT-H/14;
    in float32 where some are beyond its range. count: as many images at most."""
    tokens = None
    filled = 0
    for part in batches:
        if tokens is None:
            tokens = torch.empty(count, *part.shape[1:], dtype=torch.half)
        if not part.isfinite().all():
            raise UserError("the encoder's features of some images are not finite: --precision "
                            "float32, or another encoder")
        if tokens.dtype == torch.half and part.abs().max() > torch.finfo(torch.half).max:
            tokens = tokens.float()
        tokens[filled:filled + len(part)] = part
        filled += len(part)
    if not filled:
        raise UserError(f"none of the {count} images that the foreground is fitted on can be read")
    return tokens[:filled]


@torch.no_grad()
def component_of_encoder(encoder, images, image_size, world, path=None, kept=None, workers=0):
    """v1 of the frozen encoder's features, found by the first process for all.

    path: a component file; None: fitted on FIT_IMAGES images. kept: the file of a run that is
    resumed, which has it already.
    """
    empty = torch.zeros(1, 3, image_size, image_size, device=world.device)
    with world.autocast():
        features = encoder(empty)
    if not features.isfinite().all():
        raise UserError(f"the encoder's features are not finite in {dtype_name(world.dtype)}: "
                        f"--precision float32")
    size = features.shape[2]
    component = None
    if world.rank == 0 and kept and Path(kept).exists():
        component, _ = read_component(kept, size)
    elif world.rank == 0:
        chosen = spaced(len(images.names), FIT_IMAGES)
        tokens = tokens_of(encoder, images, chosen, image_size, world, workers)
        component, _ = load_or_fit_foreground(tokens, len(chosen), size, path)
    return world.gather_objects(component)[0]


def tokens_of(encoder, images, chosen, image_size, world, workers=0):
    """Yields the encoder's features (n, T, K) of the chosen images."""
    batches = data.read_squares(images, chosen, image_size, workers)
    total = math.ceil(len(chosen) / data.READ_AT_ONCE)
    for pictures in progress(batches, "foreground", "batch", total=total):
        with world.autocast():
            x = encoder(normalise(pictures.to(world.device) / 255))
        yield x.cpu()
