r"""Makes the generated views X_i^+ = G(z_i^l), once, before training (section "adaptive view
generation").

    python generate_views.py --dataset cifar10                     # writes views/cifar10; resumable
    python generate_views.py --dataset imagenet --data-dir /data/imagenet --preview 8   # look first
    torchrun --nproc_per_node=8 generate_views.py --dataset imagenet --data-dir /data/imagenet

A frozen CLIP encoder tells how much of an image is foreground; the more, the stronger the noise on
the image's embedding, from which a frozen diffusion model (Stable unCLIP) draws a variation of it:
see make_view_set.

Legend of the shapes: N images, n of a batch, T patch tokens of an image, K features of a token, D
size of an image embedding.
"""
import datetime
import functools
import hashlib
import math
import os
import sys
import time
from collections import Counter, defaultdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

import genview
import recipes
from genview import FRACTION
from support.command_line import (
    Parser,
    UserError,
    duration,
    either,
    in_short,
    progress,
    real,
    say,
    script,
    whole,
)
from support.data import IN_MEMORY_SIZE, read_images, spaced
from support.encoders import side_of
from support.files import digest_of_file, read_component, write_component, write_png
from support.pictures import sheet, square, to_image
from support.processes import cores_of_process, dtype_name, fast_dtype, setup
from support.views import ViewFolder, file_mark

LEVELS = (0, 100, 200, 300, 400)  # of the 1,000 noising steps (release)
STABLE = "sd2-community/stable-diffusion-2-1-unclip"
LARGEST_BATCH = 1024              # images generated at once; a GPU is busy long before
ENCODER_BATCH = 8                 # fixed: rounding depends on it and can decide on a level
MINI_RATE = 150                   # images/s of the miniature on two cores: docs/RESULTS.md
MINI_START = 20                   # seconds there to load it and to fit the foreground
ATTENTION = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION,
             SDPBackend.CUDNN_ATTENTION, SDPBackend.MATH]   # setup turns the first off: training


# --------------------------------------------------------------------------------- the two formulas
def foreground_proportion(tokens, component, threshold):
    r"""How much of each image is foreground.

    a_ij = <token_ij, v1>,    p_i = (number of j with a_ij > alpha) / T

    Args:
        tokens: (N, T, K), CLIP's patch tokens of each image.
        component, threshold: v1 (K,) and alpha, a float, see quality_loss.fit_foreground.
    Returns p (N,), float32, in [0, 1]. ValueError: the shapes do not fit.
    Source: GenView, section "adaptive view generation", steps 3 and 4; Eq. 7 for alpha.
    >>> tokens = torch.tensor([[[1., 0.], [3., 0.], [0., 9.], [2., 5.]]])
    >>> foreground_proportion(tokens, torch.tensor([1., 0.]), threshold=1.5)
    tensor([0.5000])
    """
    if tokens.ndim != 3 or not tokens.shape[1] or component.shape != tokens.shape[2:]:
        raise ValueError(f"tokens must be (N, T, K) and component (K,), got {tuple(tokens.shape)}, "
                         f"{tuple(component.shape)}")
    a = tokens.float() @ component.float()                   # a_ij = <token_ij, v1>          (N, T)
    return (a > threshold).float().sum(1) / tokens.shape[1]  # p_i = foreground tokens / tokens (N,)


def noise_level(proportion):
    r"""The noise level an image can bear: five equal intervals of the foreground proportion.

    p in [0, 0.2] -> 0   (0.2, 0.4] -> 100   (0.4, 0.6] -> 200   (0.6, 0.8] -> 300   (0.8, 1] -> 400

    Args: proportion: p, (N,), in [0, 1].
    Returns l (N,), integers, in steps of the 1,000 of the noise schedule. ValueError: not a vector,
    or a number outside [0, 1].
    Source: GenView, section "adaptive view generation", step 5; the levels are the release's.
    >>> noise_level(torch.tensor([0.0, 0.2, 0.21, 0.5, 1.0]))
    tensor([  0,   0, 100, 200, 400])
    """
    p = proportion if proportion.is_floating_point() else proportion.float()
    if p.ndim != 1:
        raise ValueError(f"proportion must be (N,), got {tuple(p.shape)}")
    outside = ~((p >= 0) & (p <= 1))                          # true for NaN, too
    if outside.any():
        raise ValueError(f"proportion must be in [0, 1], got {p[outside][0].item()}")
    borders = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=p.dtype, device=p.device)  # rounded as p is
    return 100 * torch.bucketize(p, borders)                  # a border is of the interval below


# ------------------------------------------------------------------ the frozen models: CLIP, unCLIP
def quieten():
    """No warnings and progress bars of the libraries' own."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_pipeline(model, dtype, device, solver="own"):
    """Stable unCLIP: the generator G, its noise on embeddings, and CLIP's image encoder C. solver:
    of the denoising, own or dpm (DPM-Solver++, second order). UserError where it cannot be loaded.
    """
    import diffusers
    from diffusers import StableUnCLIPImg2ImgPipeline
    from transformers import CLIPVisionModelWithProjection
    quieten()
    model = genview.mini() if model == "mini" else model
    kind = kind_of_weights(model, dtype)
    try:
        encoder, report = CLIPVisionModelWithProjection.from_pretrained(
            model, subfolder="image_encoder", output_loading_info=True, **kind)
        if report["missing_keys"]:                 # transformers would draw them at random
            raise UserError(f"its image encoder lacks {len(report['missing_keys'])} weights")
        pipe = StableUnCLIPImg2ImgPipeline.from_pretrained(model, image_encoder=encoder, **kind)
        pipe.to(device)
        with torch.inference_mode():               # the condition is the image: no words
            prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]     # (1, words, features)
    except torch.OutOfMemoryError:
        raise UserError(f"out of memory for the weights of --model {model}: --precision float16, "
                        f"or --device cpu") from None
    except Exception as error:                     # of three libraries
        is_path = str(model).startswith((".", "/", "~")) or Path(model).exists()
        way = (f"where there is a network run `hf download {model} --exclude '*.ckpt'` and name "
               f"the folder it prints by --model")
        if is_path:
            way = "it must be a folder that save_pretrained has written, in safetensors"
        raise UserError(f"--model {model} could not be loaded as a StableUnCLIPImg2ImgPipeline "
                        f"({in_short(error)}): {way}; train_moco.py --dataset shapes needs no "
                        f"download") from None
    pipe.empty_prompt = prompt
    pipe.set_progress_bar_config(disable=True)
    if solver == "dpm":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    if own_size(pipe) > IN_MEMORY_SIZE:
        pipe.vae.enable_slicing()                  # decodes one by one
    return pipe


def kind_of_weights(model, dtype):
    """Which files from_pretrained shall read, and in which dtype: its keywords."""
    import diffusers
    new = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 42)
    kind = {"dtype" if new else "torch_dtype": dtype}
    kind["use_safetensors"] = True                 # no pickled code
    weights = [file.name for file in Path(model, "unet").glob("*.safetensors")]
    if weights and all(".fp16" in name for name in weights):       # in one file or several
        kind["variant"] = "fp16"
    return kind


def own_size(pipe):
    """Side of the images that the model is made for."""
    return side_of(pipe.unet.config, "sample_size", 96) * pipe.vae_scale_factor


def check(pipe, steps):
    """UserError where the parts of the pipeline do not fit together, or its schedule is shorter."""
    dim = pipe.image_encoder.config.projection_dim
    side = pipe.image_encoder.config.image_size
    crop = getattr(pipe.feature_extractor, "crop_size", None) or {"height": side}
    condition = pipe.unet.config.projection_class_embeddings_input_dim
    for what, here, there in [("the normalizer's size", pipe.image_normalizer.mean.shape[-1], dim),
                              ("the U-Net's condition", condition, 2 * dim),
                              ("the pictures' size", crop["height"], side)]:
        if here != there:
            raise UserError(f"the model's parts do not fit: {what} is {here}, its image encoder "
                            f"needs {there}")
    noisiest = pipe.image_noising_scheduler.config.num_train_timesteps - 1
    if noisiest < max(LEVELS):
        raise UserError(f"the model's parts do not fit: the noise on embeddings ends at "
                        f"{noisiest}, {max(LEVELS)} is needed")
    length = pipe.scheduler.config.num_train_timesteps
    try:
        pipe.scheduler.set_timesteps(steps)
        first = pipe.scheduler.timesteps.max()
        if first < length:
            return
        reason = f"it starts at step {first:g} of a schedule of {length}"
    except Exception as error:                     # each scheduler refuses in its own way
        reason = in_short(error) if str(error) else f"its schedule has {length} steps"
    raise UserError(f"--steps {steps} does not suit the model's {type(pipe.scheduler).__name__}: "
                    f"{reason}")


def clip_pixels(image, feature_extractor):
    """What CLIP sees of a PIL image of any size, an array (3, S, S)."""
    return feature_extractor(images=[image], return_tensors="pt").pixel_values[0].numpy()


@torch.inference_mode()
@sdpa_kernel(ATTENTION)
def encode(pipe, pixels):
    """One pass of CLIP gives both: patch tokens (n, T, K) and the embedding c (n, D) of up to
    ENCODER_BATCH images, arrays of clip_pixels."""
    padded = pixels + pixels[-1:] * (ENCODER_BATCH - len(pixels))
    x = torch.from_numpy(np.stack(padded))
    out = pipe.image_encoder(x.to(pipe.device, pipe.image_encoder.dtype))
    tokens = genview.clip_tokens(pipe.image_encoder.vision_model, out.last_hidden_state)
    return tokens[:len(pixels)], out.image_embeds[:len(pixels)]


def encode_all(pipe, images, indices, on_unreadable=None):
    """Yields indices, tokens (n, T, K) and embeddings c (n, D) of the images that can be read, up
    to ENCODER_BATCH at a time.

    on_unreadable: called with the message of each of the others.
    """
    use = functools.partial(clip_pixels, feature_extractor=pipe.feature_extractor)
    parts = read_images(images, indices, use, ENCODER_BATCH, cores_of_process())
    for pixels, errors in parts:
        for error in errors.values():
            if on_unreadable:
                on_unreadable(error)
        if pixels:
            yield list(pixels), *encode(pipe, list(pixels.values()))


@torch.inference_mode()
@sdpa_kernel(ATTENTION)
def generate(pipe, level, embeddings, seeds, steps, guidance, size):
    """Variations of images, of one noise level, each from its own seed: c (n, D) -> (n, 3, S, S)
    uint8.

    z_i^l = sqrt(abar_l) c_i + sqrt(1 - abar_l) e,  e ~ N(0, I),    X_i^+ = G(z_i^l)
    Source: GenView, section "framework".
    """
    prompt = pipe.empty_prompt.repeat(len(seeds), 1, 1)
    # z_i^l: the pipeline normalises c_i, adds the noise of its own schedule abar and appends l.
    # Generators of the CPU give the same numbers on every device; with one an image, e and the
    # first latent do not depend on the rest of the batch.
    views = pipe(
        image_embeds=embeddings, noise_level=level,
        generator=[torch.Generator().manual_seed(seed) for seed in seeds], prompt_embeds=prompt,
        negative_prompt_embeds=prompt, num_inference_steps=steps, guidance_scale=guidance,
        height=size, width=size, output_type="pt").images                         # (n, 3, S, S)
    if not views.isfinite().all():
        dtype = dtype_name(pipe.unet.dtype)
        way = "--precision float32 helps"
        if dtype == "float32":
            way = "the model is damaged or another one is needed (--model)"
        raise UserError(f"the generator returned numbers that are not finite in {dtype}; {way}")
    return (views.float() * 255).round().byte().cpu()


class ViewMaker:
    """generate for any number of images, in batches as large as memory allows."""
    def __init__(self, pipe, steps, guidance, size, save_size, batch_size, largest):
        """save_size: side of the pictures it returns. The batch size doubles up to largest."""
        self.pipe = pipe
        self.settings = {"steps": steps, "guidance": guidance, "size": size}
        self.save_size = save_size
        self.batch_size = batch_size
        self.largest = largest

    def __call__(self, level, embeddings, seeds):
        """c (n, D) and n seeds -> n PIL images."""
        views = []
        while len(views) < len(seeds):
            part = slice(len(views), len(views) + self.batch_size)
            try:
                pixels = generate(self.pipe, level, embeddings[part], seeds[part], **self.settings)
            except torch.OutOfMemoryError:
                pixels = None                      # its traceback would keep the batch's memory
            if pixels is None:
                self.halve()
                continue
            views += [self.picture(x) for x in pixels]
            if len(pixels) == self.batch_size:
                self.batch_size = min(2 * self.batch_size, self.largest)
        return views

    def picture(self, pixels):
        image = to_image(pixels)
        return image.resize((self.save_size, self.save_size), Image.Resampling.BICUBIC)

    def halve(self):
        """After memory ran out: half as many at once, for good."""
        if self.batch_size == 1:
            raise UserError("out of memory for one image; a smaller --size helps") from None
        self.batch_size //= 2
        self.largest = self.batch_size
        torch.cuda.empty_cache()
        say(f"out of memory: at most {self.batch_size} images at once from here on")


# --------------------------------------------------------------------------------- the set of views
class Plan(NamedTuple):
    """A view that is to be made."""
    source: str                     # name of the image X_i
    proportion: float               # p_i
    level: int                      # l
    embedding: torch.Tensor         # c_i, (D,)


def make_view_set(args, pipe, view_maker, images, world):
    """The method: encode, count the foreground, choose the noise level, generate; a batch holds
    images of one level."""
    suffix = ".png" if view_maker.save_size <= IN_MEMORY_SIZE else ".jpg"         # png: lossless
    folder = ViewFolder(args.views_dir, suffix, world.rank)
    folder.prepare(settings_of(args, view_maker, pipe), args.dataset, images, world)
    v1, alpha = share_foreground(args, pipe, images, world)
    mine = spaced(len(images.names), args.limit).tolist()[world.rank::world.size]
    todo, changed, there = find_missing(folder, images, mine)
    say_changed(changed, world)
    start = time.monotonic()
    bar = progress(None, "views", "image", total=len(todo))
    skipped = []
    levels = []                                    # of the views made here

    def skip(message):
        print(f"skipped: {message.rsplit('; ', 1)[0]}", file=sys.stderr)
        skipped.append(message)
    encoded = encode_all(pipe, images, todo, skip)
    for batch in batches_of_a_level(plans(encoded, images, v1, alpha, args.noise), view_maker):
        make_views(batch, view_maker, folder, images, args.seed)
        levels += [plan.level for plan in batch]
        bar.update(len(batch))
    bar.close()
    report(levels, there, len(skipped), time.monotonic() - start, world)
    if world.rank == 0:
        folder.join_manifests()                    # all have written theirs: they have counted


def plans(encoded, images, v1, alpha, noise):
    """Yields the Plan of each image that encode_all has encoded. noise: adaptive or a level."""
    for indices, tokens, c in encoded:
        p = foreground_proportion(tokens, v1, alpha)                                          # (n,)
        levels = noise_level(p) if noise == "adaptive" else torch.full_like(p, noise).long()  # (n,)
        names = [images.names[index] for index in indices]
        yield from map(Plan, names, p.tolist(), levels.tolist(), c)


def batches_of_a_level(plans, view_maker):
    """Yields lists of plans of one level, as many as the view_maker makes at once; at the end the
    rest of each level."""
    waiting = defaultdict(list)                                                  # {level: [Plan]}
    for plan in plans:
        waiting[plan.level].append(plan)
        if len(waiting[plan.level]) >= view_maker.batch_size:
            yield waiting.pop(plan.level)
    for level in sorted(waiting):
        yield waiting[level]


def make_views(batch, view_maker, folder, images, seed):
    """Generates and writes the views of a list of plans of one level."""
    seeds = [image_seed(seed, plan.source) for plan in batch]
    embeddings = torch.stack([plan.embedding for plan in batch])
    views = view_maker(batch[0].level, embeddings, seeds)
    for view, plan, own_seed in zip(views, batch, seeds, strict=True):
        folder.write(view, source=plan.source, proportion=plan.proportion, noise_level=plan.level,
                     seed=own_seed, file=file_mark(images, plan.source))


def say_changed(changed, world):
    """Says how many views of all processes are made again."""
    changed = sum(world.gather_objects(changed))
    if changed:
        say(f"*** {changed} images are not those that their views were made of: these views are "
            f"made again")


def report(made, there, skipped, seconds, world):
    """The last line, over all processes. made, there: the noise levels of the views."""
    made = sum(world.gather_objects(Counter(made)), Counter())
    there = sum(world.gather_objects(Counter(there)), Counter())
    skipped = sum(world.gather_objects(skipped))
    levels = made + there
    text = ", ".join(f"{level}: {levels[level]}" for level in sorted(levels))
    count = made.total()
    say(f"{count} views made, {there.total()} there already, {skipped} skipped (unreadable); noise "
        f"levels {text or 'none'}; {seconds:.1f} s, {count / max(seconds, 1e-9):.2f} images/s")


def find_missing(folder, images, indices):
    """Which views are to be made: of the images at indices those without a view, and those that are
    not the ones that their views were made of. Returns their indices, how many have changed, and
    the noise levels of the views that stay."""
    made = folder.made()
    todo = []
    changed = 0
    levels = []
    for i in indices:
        name = images.names[i]
        line = made.get(name)
        if line is None:
            todo.append(i)
        elif line.file and line.file != file_mark(images, name):
            todo.append(i)
            changed += 1
        else:
            levels.append(line.noise_level)
    return todo, changed, levels


def make_missing(dataset, data_dir, limit, images, world):
    """Makes the views of CIFAR that a training lacks, with the miniature, as this script does
    without further flags. Where none is missing, no model is loaded, and the views may be of any
    settings.

    limit: of the data set, as --limit. images: what is trained on, these images or fewer.
    """
    flags = [f"--dataset={dataset}", f"--data-dir={data_dir}"]
    if limit:
        flags.append(f"--limit={limit}")
    args = parse_args(flags)
    folder = ViewFolder(args.views_dir, ".png")
    count = len(images.names)
    todo, _, _ = find_missing(folder, images, range(count))
    if not world.any(len(todo)):
        return
    seconds = MINI_START + len(todo) / MINI_RATE
    say(f"GenView needs generated views: {len(todo)} of {count} images have none in "
        f"{args.views_dir}.\nThey are made first, in about {duration(seconds)} on two free cores "
        f"of a CPU. If interrupted, the same command\ngoes on. To train without generated views: "
        f"--views-dir none.")
    run(args, world)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()                   # of the pipeline, which is freed by now


def settings_of(args, view_maker, pipe):
    """What must not change within a folder of views."""
    names = "model noise solver seed flip_foreground component fit_images".split()
    settings = {name: getattr(args, name) for name in names} | view_maker.settings
    return settings | {"save_size": view_maker.save_size,
                       "precision": dtype_name(pipe.unet.dtype),
                       "weights": digest_of_weights(pipe),
                       "component_file": digest_of_file(args.component)}


def digest_of_weights(pipe):
    """A short hash that identifies a pipeline's weights, whatever its path: of the first numbers of
    each tensor."""
    digest = hashlib.sha256()
    for name, module in sorted(pipe.components.items()):
        if isinstance(module, torch.nn.Module):
            parts = [x.flatten()[:16].float() for x in module.state_dict().values()]
            digest.update(name.encode() + torch.cat(parts).cpu().numpy().tobytes())
    return digest.hexdigest()[:12]


def image_seed(seed, name):
    """A seed from the run's seed and the image's name alone: no batch, order, process, limit or
    restart changes a view."""
    digest = hashlib.sha256(f"{seed} ".encode() + os.fsencode(name)).digest()
    return int.from_bytes(digest[:6], "little")


def clip_foreground(pipe, images, fit_images, component=None, flip=False):
    """v1 and alpha of CLIP's tokens: of the file component, or fitted on so many images spread over
    the data set, whatever --limit."""
    indices = spaced(len(images.names), fit_images).tolist()
    batches = progress(encode_all(pipe, images, indices), "fitting the foreground", "batch",
                       total=math.ceil(len(indices) / ENCODER_BATCH))
    tokens = (tokens for _, tokens, _ in batches)
    size = pipe.image_encoder.config.hidden_size
    return genview.load_or_fit_foreground(tokens, len(indices), size, component, flip)


def share_foreground(args, pipe, images, world):
    """The foreground of this folder: found by the first process, once, and kept in foreground.npz.
    Returns v1 (K,), on the device, and alpha."""
    path = args.views_dir / "foreground.npz"
    if world.rank == 0 and not path.exists():
        v1, alpha = clip_foreground(pipe, images, args.fit_images, args.component,
                                    args.flip_foreground)
        write_component(path, component=v1.cpu().numpy(), threshold=alpha, fraction=FRACTION,
                        encoder=args.model)
    world.wait()
    v1, alpha = read_component(path, pipe.image_encoder.config.hidden_size)
    return v1.to(pipe.device), alpha


# -------------------------------------------------------------------------------------- the preview
def preview(args, pipe, view_maker, images):
    """Draws preview.png, a column an image: original, foreground map, views at all levels, the
    adaptive choice framed (the paper's Fig. 3)."""
    v1, alpha = clip_foreground(pipe, images, args.fit_images, args.component,
                                args.flip_foreground)
    v1 = v1.to(pipe.device)
    cell = 128 if view_maker.save_size <= 128 else 224
    columns = []
    captions = []
    frames = {}
    chosen = spaced(len(images.names), args.preview).tolist()
    for indices, tokens, c in encode_all(pipe, images, chosen):
        p = foreground_proportion(tokens, v1, alpha)
        seeds = [image_seed(args.seed, images.names[i]) for i in indices]
        views = [view_maker(level, c, seeds) for level in LEVELS]                 # [level][image]
        for i, (index, level) in enumerate(zip(indices, noise_level(p).tolist(), strict=True)):
            original = square(images.pil(index), cell)
            shown = foreground_map(original, tokens[i].float() @ v1, alpha)
            frames[len(columns), 2 + LEVELS.index(level)] = "red"
            of_image = [of_level[i] for of_level in views]
            columns.append([original, shown, *of_image])
            captions.append(f"p = {p[i]:.2f}\nlevel {level}")
    labels = ["original", "foreground"] + [f"level {level}" for level in LEVELS]
    canvas = sheet(columns, captions, frames, cell, labels)
    path = args.views_dir / "preview.png"
    write_png(path, canvas)
    print(f"{path}: {len(columns)} images. If the bright part is not the foreground, add "
          f"--flip-foreground; the same command without --preview {args.preview} makes the views")


def foreground_map(original, a, alpha):
    """The image darkened but for the tokens with a = <token, v1> (T,) above alpha."""
    side = math.isqrt(len(a))
    mask = Image.fromarray(((a > alpha).view(side, side) * 255).byte().cpu().numpy())
    dark = original.point(lambda value: value // 5)
    return Image.composite(original, dark, mask.resize(original.size, Image.Resampling.NEAREST))


# ------------------------------------------------------------------------------------- command line
def parse_args(argv=None):
    parser = Parser("Makes one generated view of every training image, for train_moco.py.")
    add = parser.add_argument_group("data").add_argument
    add("--dataset", choices=sorted(set(genview.DATA_DIRS) - {"shapes"}), required=True,
        help="shapes makes its views while training")
    add("--data-dir", help="where the data lies; CIFAR is downloaded there")
    add("--views-dir", help="where the views go; default: views/<dataset>, or the folder's name")
    add("--limit", type=whole(1), help="make views of so many images only, evenly spaced")
    add("--save-size", type=whole(1), help="side of saved views; default: CIFAR 32, else up to 512")
    add = parser.add_argument_group("GenView").add_argument
    add("--model", help=f"hub id or folder of a StableUnCLIPImg2ImgPipeline, or mini (weights/); "
                        f"default: mini for CIFAR, else {STABLE}")
    add("--noise", type=either("adaptive", whole(0, 999)), default="adaptive",
        help="adaptive, or a level from 0 to 999 for all images")
    add("--solver", choices=["own", "dpm"], default="own", help="the model's own, or DPM-Solver++")
    add("--steps", type=whole(1), help="denoising steps; default: 20 as the release, mini: 2")
    add("--guidance", type=real(0, 1e4), help="its scale; default: 10 as the release, mini: 1.25")
    add("--size", type=whole(1), help="side of generated images, 8, 16, ...; default: the model's")
    add("--seed", type=whole(), default=0, help="of all random numbers")
    add("--component", help="foreground.npz or the release's pca_vectors.npy; default: fit one")
    add("--flip-foreground", action="store_true", help="foreground is the component's other side")
    add("--fit-images", type=whole(1), default=genview.FIT_IMAGES,
        help="images that the component is fitted on")
    add = parser.add_argument_group("runtime").add_argument
    add("--preview", type=whole(1), metavar="N", help="only <views-dir>/preview.png, of N images")
    add("--batch-size", type=whole(1),
        help="images at once; halved where a GPU's memory runs out; default: on a GPU what fits, "
             "from 64 on; on a CPU 64, or 1 for images above 64 pixels")
    add("--device", help="cuda, mps or cpu; default: the first that is available")
    add("--precision", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
        help="auto: bfloat16 or float16 on a GPU, else float32")
    return resolve(parser.parse_args(argv))


def resolve(args):
    """Fills in what no flag says and the model's name decides."""
    args.data_dir = genview.data_dir_of(args.dataset, args.data_dir)
    args.views_dir = Path(args.views_dir or genview.default_views_dir(args.dataset, args.data_dir))
    args.model = args.model or default_model(args.dataset)
    is_mini = args.model == "mini" or os.path.realpath(args.model) == os.path.realpath(genview.MINI)
    usual = recipes.GENERATION["mini" if is_mini else "stable"]
    args.steps = args.steps or usual["steps"]
    args.guidance = usual["guidance"] if args.guidance is None else args.guidance
    if args.size and args.size % 8:
        raise UserError(f"--size {args.size} is no multiple of 8")
    return args


def default_model(dataset):
    """The model that makes the views of a data set where no flag names one."""
    return "mini" if dataset.startswith("cifar") and genview.MINI.is_dir() else STABLE


def precision_of(name, device):
    """The dtype of all networks. name: --precision."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    # Not the world's dtype: a training's --precision does not change its views.
    return torch.bfloat16 if fast_dtype(device) == torch.bfloat16 else torch.float16


def make_view_maker(args, pipe, device):
    """The ViewMaker of the flags, and of the model where they say nothing."""
    size = args.size or own_size(pipe)
    save_size = args.save_size
    if not save_size:
        save_size = 32 if args.dataset.startswith("cifar") else min(512, size)
    largest = args.batch_size
    if not largest:
        on_cpu = 64 if size <= IN_MEMORY_SIZE else 1
        largest = LARGEST_BATCH if device.type == "cuda" else on_cpu
    batch_size = min(largest, args.batch_size or 64)
    return ViewMaker(pipe, args.steps, args.guidance, size, save_size, batch_size, largest)


def run(args, world):
    """Makes the views or draws the preview."""
    # Of any size: files are opened when they are needed.
    images = genview.load_images(args.dataset, args.data_dir, "train", image_size=math.inf)
    dtype = precision_of(args.precision, world.device)
    pipe = load_pipeline(args.model, dtype, world.device, args.solver)
    check(pipe, args.steps)
    if args.component:                             # an error in it comes before anything is written
        read_component(args.component, pipe.image_encoder.config.hidden_size)
    view_maker = make_view_maker(args, pipe, world.device)
    if not args.preview:
        make_view_set(args, pipe, view_maker, images, world)
    elif world.rank == 0:
        preview(args, pipe, view_maker, images)


def main():
    args = parse_args()
    patience = datetime.timedelta(days=7)          # processes may end days apart
    run(args, setup(args.device, patience, args=args))


if __name__ == "__main__":
    script(main)
