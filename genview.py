"""What the scripts of this project share: data sets by name, pairs of views, the frozen encoder.

Legend of the shapes: N images, n of a batch, V views of each, S side of a view in pixels,
T tokens (positions of a feature map), K features of a token.
"""
import hashlib
import itertools
import math
import weakref
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset

import shapes
from quality_loss import fit_foreground, foreground_threshold, orient_foreground, pair_quality
from support import augment, data
from support.augment import Augmentation, Draws, normalise, recolour, renormalise
from support.data import IN_MEMORY_SIZE, Files, Images, spaced, to_tensor
from support.files import read_component
from support.world import UserError, progress, say, start_worker, step_generator

FIT_IMAGES = 10_000           # images that the foreground component is fitted on (release)
FRACTION = 0.4                # share of all tokens that is foreground; sets alpha, Eq. 7 (release)
MINI = Path(__file__).with_name("weights") / "mini-unclip"    # by studies/train_generator.py
DATA_DIRS = {"shapes": "data", "cifar10": "data", "cifar100": "data", "imagenet": "data/imagenet",
             "folder": None}                       # where they lie by default


# ---------------------------------------------------------------------------------------- data sets
def load_images(dataset, data_dir, split, image_size, limit=None, skip_bad=False):
    """Reads one of the data sets: shapes, cifar10, cifar100, imagenet or folder.

    Args:
        data_dir: where it lies. CIFAR is downloaded there, unless it has a train/ folder: then it
            is read as a folder.
        split: "train" or "test" (of a folder, val/ or test/).
        image_size: S; folders of images are read into memory up to IN_MEMORY_SIZE.
        limit: use at most so many images, evenly spaced over the set.
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
    digest = hashlib.sha256("\n".join(images.names).encode(errors="surrogateescape")).hexdigest()
    images = images._replace(source=f"{len(images.names)} images, names {digest[:12]}")
    if limit is not None and limit < len(images.names):
        images = images.take(spaced(len(images.names), limit))
    in_memory = images.pixels is not None or image_size > IN_MEMORY_SIZE
    return images if in_memory else data.into_memory(images, image_size, skip_bad)


def data_dir_of(dataset, given):
    """Where a data set lies: as --data-dir says, else by default."""
    if dataset == "folder" and not given:
        raise UserError("--dataset folder needs --data-dir, a folder with train/ and val/ or test/")
    return given or DATA_DIRS[dataset]


def default_views_dir(dataset, data_dir):
    """Where generate_views.py puts the views and training looks for them."""
    return f"views/{Path(data_dir).resolve().name if dataset == 'folder' else dataset}"


# ----------------------------------------------------------------------------------- pairs of views
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
    def __init__(self, images, views, augmentations, image_size, batch_size, seed, world, workers=4,
                 skip_bad=False):
        """
        Args:
            images: Images, the X_i.
            views: the X_i^+: (N, 3, S, S) for images in memory, a list of paths for files, or None
                for plain pairs of one image.
            augmentations: t_1 ... t_V, two or more.
            batch_size: of all processes together.
        """
        self.images, self.views, self.augmentations = images, views, augmentations
        self.image_size, self.batch_size, self.seed = image_size, batch_size, seed
        self.world, self.workers, self.skip_bad = world, workers, skip_bad
        self.steps = len(images.names) // batch_size
        n = batch_size // world.size
        self.share = slice(world.rank * n, (world.rank + 1) * n)       # of this process
        self.in_memory, self.place = images.pixels is not None, None
        if self.in_memory:                         # small enough for the device's own memory
            self.pixels = images.pixels.to(world.device)
            self.others = self.pixels if views is None else views.to(world.device)

    def epoch(self, epoch, start=0):
        """Yields V views, each (n, 3, S, S): this process's share of each batch from step start."""
        batches = self._batches if self.in_memory else self._crops_of_files
        for step, batch in enumerate(batches(epoch, start), start):
            draw, orders = self._draw(epoch, step)
            views = self._crops_in_memory(*batch, draw) if self.in_memory else batch
            views = (x.to(self.world.device, non_blocking=True).float() / 255 for x in views)
            yield [recolour(x, draw.of_view(v), orders[v], self.augmentations[v])     # normalises
                   .contiguous(memory_format=torch.channels_last) for v, x in enumerate(views)]

    def _batches(self, epoch, start):
        """Yields this process's share of each batch: indices of images (n,), and for each pair: is
        view 1 the generated one? (n,) bool. Else view 2 is."""
        order = torch.randperm(len(self.images.names), generator=step_generator(self.seed, epoch))
        for step in range(start, self.steps):
            generator = step_generator(self.seed, epoch, step, 1)   # 1: a stream of its own
            swap = torch.rand(self.batch_size, generator=generator) < 0.5
            yield order[step * self.batch_size:][:self.batch_size][self.share], swap[self.share]

    def _draw(self, epoch, step):
        """All other random numbers of a step, the same in every process: Draws of (n, V) of this
        one's share, and the orders of the colour jitters."""
        generator, count = step_generator(self.seed, epoch, step), len(self.augmentations)
        orders = [torch.randperm(4, generator=generator).tolist() for _ in range(count)]
        u = torch.rand(self.batch_size, count, Draws.COLUMNS, generator=generator)[self.share]
        return Draws.split(u.to(self.world.device, non_blocking=True)), orders

    def _crops_in_memory(self, index, swap, draw):
        index, swap = (x.to(self.pixels.device, non_blocking=True) for x in (index, swap))
        image, other = self.pixels[index], self.others[index]                       # X_i, X_i^+
        swap = swap[:, None, None, None]
        pair = torch.where(swap, other, image), torch.where(swap, image, other)
        for v, t in enumerate(self.augmentations):
            boxes = augment.crop_boxes(draw.crop[:, v], *image.shape[2:], t.scale)
            yield augment.crop(pair[v % 2], boxes, t.size or self.image_size)

    def _crops_of_files(self, epoch, start):
        """Yields the V crops of each batch. The workers live on: they read the next epoch's batches
        while this one ends and while kNN runs."""
        if self.place != (epoch, start):           # no workers yet, or they are elsewhere
            pairs = CropPairs(self.images, self.views, self.augmentations, self.image_size,
                              self.seed, self.skip_bad)
            keys = PairLoader._keys(weakref.proxy(self), epoch, start)
            self.stream = iter(DataLoader(
                pairs, batch_sampler=keys, num_workers=self.workers,
                worker_init_fn=start_worker, pin_memory=self.world.device.type == "cuda"))
        for step in range(start, self.steps):
            last = step + 1 == self.steps
            self.place = (epoch + 1, 0) if last else (epoch, step + 1)
            yield next(self.stream)

    def _keys(self, epoch, start):
        """Yields the keys of CropPairs of each batch, without end. self: a proxy; the stream holds
        this generator, and a cycle of references would be collected before its workers end."""
        for now in itertools.count(epoch):
            for index, swap in PairLoader._batches(self, now, start if now == epoch else 0):
                yield [(now, *key) for key in zip(index.tolist(), swap.tolist(), strict=True)]


class CropPairs(Dataset):
    """Crops of large images: workers decode and crop; colours and normalisation follow."""
    def __init__(self, images, views, augmentations, image_size, seed, skip_bad):
        self.images = Files(images.root / name for name in images.names)
        self.views = Files(views or [None] * len(images.names))
        self.augmentations, self.image_size = augmentations, image_size
        self.seed, self.skip_bad = seed, skip_bad

    def __getitem__(self, key):
        """key: epoch, index of the image, is view 1 the generated one? -> V crops (3, S, S)."""
        epoch, index, swap = key
        generator = step_generator(self.seed, epoch, index, 2)      # 2: a stream of its own
        draws = Draws.split(torch.rand(len(self.augmentations), Draws.COLUMNS, generator=generator))
        try:
            image = other = to_tensor(data.open_image(self.images[index]))
            if view := self.views[index]:
                other = to_tensor(data.open_image(view))
        except UserError:
            if not self.skip_bad:
                raise
            return self[epoch, (index + 1) % len(self.images), swap]
        pair = (other, image) if swap else (image, other)
        tries = draws.crop.tolist()
        views = []
        for v, t in enumerate(self.augmentations):
            box = augment.crop_box(tries[v], *pair[v % 2].shape[1:], t.scale)
            views.append(augment.crop_file(pair[v % 2], box, t.size or self.image_size))
        return views


def load_views(args, images):
    """The generated views as PairLoader takes them, or None for plain pairs."""
    if args.views_dir == "none":
        return None
    paths = data.find_views(images, args.views_dir, args.dataset)
    missing = sum(path is None for path in paths)
    say(("*** " if missing else "") +
        f"generated views of {len(paths) - missing} of {len(paths)} images from {args.views_dir}"
        + (f"; the other {missing} use themselves" if missing else ""))
    return paths if images.pixels is None else data.views_into_memory(images, paths, args.skip_bad)


def load_extra(args, images):
    """--views extra: further images, (M, 3, S, S) uint8 or M paths: the views of these images in a
    folder of generate_views.py, all the images of any other folder."""
    if Path(args.views_dir, "settings.json").exists():
        paths = [p for p in data.find_views(images, args.views_dir, args.dataset) if p]
    else:
        paths = sorted(data.image_files(args.views_dir))
    if not paths:
        raise UserError(f"{args.views_dir} holds no images for --views extra")
    say(f"{len(paths)} further training samples from {args.views_dir}")
    names = [str(path.resolve()) for path in paths]
    extra = Images(names, torch.zeros(len(paths)), 0, root=Path())
    if images.pixels is None:
        return names
    return data.into_memory(extra, args.image_size, args.skip_bad).pixels


def expand(images, extra):
    """The paper's comparison, naive expansion: further training samples instead of views. extra:
    see load_extra. Their label is -1; the training uses no labels."""
    in_memory = images.pixels is not None
    names = [f"extra/{i}" for i in range(len(extra))] if in_memory else extra
    return images._replace(names=images.names + names,
                           labels=F.pad(images.labels, (0, len(extra)), value=-1),
                           pixels=torch.cat([images.pixels, extra]) if in_memory else None)


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


def preprocessing(name):
    """The model's preprocessor_config.json, {} where it has none: mean, std and size it expects."""
    from transformers import ImageProcessingMixin
    try:
        own, _ = ImageProcessingMixin.get_image_processor_dict(name)
    except OSError:
        return {}
    crop = own.get("crop_size")
    return own | {"crop_size": {"height": crop} if isinstance(crop, int) else crop or {}}


class FrozenEncoder(torch.nn.Module):
    """E: a frozen vision model of transformers, views (N, 3, S, S) -> features (N, T, K).

    Views of another size than the model's are resized to it.
    """

    # release: the image tower of OpenCLIP's ConvNeXt-Base-wide at 224 pixels, maps of 7 x 7 x 1024
    NAMES = {"clip": "openai/clip-vit-base-patch32",
             "release": "timm/convnext_base.clip_laion2b_augreg"}

    def __init__(self, name):
        """name: mini, clip, release, a hub id or a folder. UserError where it cannot be loaded."""
        super().__init__()
        from transformers import AutoConfig, AutoModel, CLIPVisionModel, logging
        logging.set_verbosity_error()              # it would report parts left out on purpose
        logging.disable_progress_bar()
        name = mini() / "image_encoder" if name == "mini" else self.NAMES.get(name, name)
        try:
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
            self.is_clip = config.model_type in ("clip", "clip_vision_model")
            kind = CLIPVisionModel if self.is_clip else AutoModel
            model = kind.from_pretrained(name, trust_remote_code=False).float()
            self.model = model if self.is_clip else getattr(model, "vision_model", model)
            own = preprocessing(name)
            vision = getattr(config, "vision_config", config)
            self.size = own.get("crop_size", {}).get("height")
            self.size = self.size or getattr(vision, "image_size", 224)
            self.mean, self.std = own.get("image_mean"), own.get("image_std")
            self(torch.zeros(1, 3, self.size, self.size))                # does it take images?
        except Exception as error:                 # of several libraries
            first = " ".join(str(error).split())[:150]
            raise UserError(f"the encoder {name} could not be loaded ({type(error).__name__}: "
                            f"{first}): download it where there is a network and name its folder "
                            f"by --encoder (timm's, such as release, need pip install timm), or "
                            f"train with --quality off; --dataset shapes needs no download"
                            ) from None
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def forward(self, views):
        if self.mean:                              # views are normalised with CLIP's numbers
            views = renormalise(views, self.mean, self.std)
        if views.shape[-1] != self.size:
            size = (self.size, self.size)
            views = F.interpolate(views, size=size, mode="bilinear", antialias=True)
        hidden = self.model(pixel_values=views).last_hidden_state
        if self.is_clip:
            return clip_tokens(getattr(self.model, "vision_model", self.model), hidden)
        if hidden.ndim == 4:                       # a convnet's map (N, K, H, W)
            return hidden.flatten(2).mT
        patches = math.isqrt(hidden.shape[1]) ** 2             # without class and register tokens
        return hidden[:, hidden.shape[1] - patches:]


class PairQuality:
    """P_1, P_2 -> q, s^f, s^b of each pair, (N,), by a frozen encoder E and the first principal
    component v1 of its features (section "quality-driven contrastive loss")."""
    def __init__(self, encoder, component):
        self.encoder, self.component = encoder, component

    @torch.inference_mode()
    def __call__(self, view1, view2):
        features1, features2 = self.encoder(torch.cat([view1, view2])).chunk(2)     # each (N, T, K)
        return pair_quality(features1, features2, self.component)


def find_foreground(batches, count, size, path=None, flip=False):
    """The foreground component of a data set and its threshold, from a file or fitted.

    Args:
        batches: yields tokens (n, T, K) of up to count images of the data set; not read where the
            file at path says v1 and alpha.
        size: K.
        path: foreground.npz or the release's pca_vectors.npy without sign and threshold; None: fit.
        flip: take the other side as foreground.
    Returns:
        v1 (K,), alpha.
    Source: section "adaptive view generation", steps 2 and 3, Eq. 7.
    """
    v1, alpha = read_component(path, size) if path else (None, None)
    if alpha is not None and not flip:
        return v1, alpha
    tokens, filled = None, 0
    for part in batches:                           # 6.5 GB for 10,000 images and ViT-H/14
        if tokens is None:
            tokens = torch.empty(count, *part.shape[1:], dtype=torch.half)
        tokens[filled:filled + len(part)] = part
        filled += len(part)
    if not filled:
        raise UserError(f"none of the {count} images that the foreground is fitted on can be read")
    tokens, grid = tokens[:filled], (math.isqrt(tokens.shape[1]),) * 2
    if v1 is None:
        v1, alpha = fit_foreground(tokens, grid, FRACTION)
    elif alpha is None:
        v1, alpha = orient_foreground(v1, tokens, grid, FRACTION)
    a = torch.cat([part.float() @ v1 for part in tokens.split(256)])                # (n, T)
    if len(a) > 1 and a.mean(0).var(correction=0) > 0.9 * a.var(correction=0):
        say("*** the foreground maps of all images are nearly the same: the tokens of this encoder "
            "depend on the place, not on the image: noise levels and quality mean little")
    return (-v1, foreground_threshold(-a, FRACTION)) if flip else (v1, alpha)


@torch.no_grad()
def find_component(encoder, images, args, world):
    """v1 of the frozen encoder's features: fitted by the first process, or of the resumed run."""
    kept = Path(args.output_dir, "component.npy") if args.resume else None
    chosen, side = spaced(len(images.names), FIT_IMAGES), args.image_size
    size = encoder(torch.zeros(1, 3, side, side, device=world.device)).shape[2]

    def tokens():
        for part in progress(chosen.split(64), "foreground", "batch"):
            pictures = data.readable(images, part.tolist(), side, args.skip_bad)
            if pictures:
                with world.autocast():
                    x = encoder(normalise(torch.stack(pictures).to(world.device) / 255))
                yield x.half().cpu()
    component = None
    if world.rank == 0 and kept and kept.exists():
        component, _ = read_component(kept, size)
    elif world.rank == 0:
        component, _ = find_foreground(tokens(), len(chosen), size, args.component)
    return world.gather_objects(component)[0]
