r"""Makes the generated views X_i^+ = G(z_i^l), once, before training (GenView, section "adaptive view generation").

    python generate_views.py --dataset cifar10                                  # writes views/cifar10; resumable
    python generate_views.py --dataset imagenet --data-dir /data/imagenet --preview 8      # one picture to look at first
    torchrun --nproc_per_node=8 generate_views.py --dataset imagenet --data-dir /data/imagenet

A frozen CLIP encoder tells how much of an image is foreground; the more, the stronger the noise on the image's embedding,
from which a frozen diffusion model (Stable unCLIP) draws a variation of it. Read make_view_set first.

Legend of the shapes: N images, T patch tokens of an image, K features of a token, D size of an image embedding.
"""
import argparse
import datetime
import hashlib
import io
import json
import math
import os
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw

import genview
from genview import Trouble

LEVELS = (0, 100, 200, 300, 400)  # of the 1,000 noising steps (release)
MINI = dict(steps=2, guidance=1.25)            # for train_generator.py's, 32 x 32
STABLE = dict(model="sd2-community/stable-diffusion-2-1-unclip", steps=20, guidance=10.0)      # (release)
FRACTION = 0.4                    # share of all tokens that is foreground; sets the threshold alpha, Eq. 7 (release)
LARGEST_BATCH = 1024              # images that are generated at once; a GPU has long been busy by then
ENCODER_BATCH = 8                 # always: the shape of a batch decides about rounding, and rounding can decide on a level


# -------------------------------------------------------------------------------------------------------- the two formulas

def foreground_proportion(tokens, component, threshold):
    r"""How much of each image is foreground.

    a_ij = <token_ij, v1>,    p_i = (number of j with a_ij > alpha) / T

    Args:
        tokens: (N, T, K), CLIP's patch tokens of each image.
        component: v1, (K,), see genview.fit_foreground.
        threshold: alpha, a float.
    Returns:
        p (N,), float32, in [0, 1].
    Raises:
        ValueError: the shapes do not fit.
    Source: GenView, section "adaptive view generation", steps 3 and 4; Eq. 7 for alpha.

    >>> tokens = torch.tensor([[[1., 0.], [3., 0.], [0., 9.], [2., 5.]]])
    >>> foreground_proportion(tokens, torch.tensor([1., 0.]), threshold=1.5)
    tensor([0.5000])
    """
    if tokens.ndim != 3 or not tokens.shape[1] or component.shape != tokens.shape[2:]:
        raise ValueError(f"tokens must be (N, T, K) and component (K,), got {tuple(tokens.shape)}, {tuple(component.shape)}")
    a = tokens.float() @ component.float()                                  # a_ij = <token_ij, v1>            (N, T)
    return (a > threshold).float().sum(1) / tokens.shape[1]                 # p_i = foreground tokens / tokens  (N,)


def noise_level(proportion):
    r"""The noise level an image can bear: five equal intervals of the foreground proportion.

    p in [0, 0.2] -> 0    (0.2, 0.4] -> 100    (0.4, 0.6] -> 200    (0.6, 0.8] -> 300    (0.8, 1] -> 400

    Args:
        proportion: p, (N,), in [0, 1].
    Returns:
        l (N,), integers, in steps of the 1,000 of the noise schedule.
    Raises:
        ValueError: not a vector, or a number outside [0, 1].
    Source: GenView, section "adaptive view generation", step 5; the levels are the authors' release's.

    >>> noise_level(torch.tensor([0.0, 0.2, 0.21, 0.5, 1.0]))
    tensor([  0,   0, 100, 200, 400])
    """
    p = torch.as_tensor(proportion)
    p = p if p.is_floating_point() else p.float()
    if p.ndim != 1:
        raise ValueError(f"proportion must be (N,), got {tuple(p.shape)}")
    outside = ~((p >= 0) & (p <= 1))                                        # true for NaN, too
    if outside.any():
        raise ValueError(f"proportion must be in [0, 1], got {p[outside][0].item()}")
    borders = torch.tensor([0.2, 0.4, 0.6, 0.8], dtype=p.dtype, device=p.device)    # rounded as p is: 0.2 is still 0.2
    return 100 * torch.bucketize(p, borders)                                # a border belongs to the interval below it


# ---------------------------------------------------------------------------------------- the frozen models: CLIP, unCLIP

def quieten():
    """No warnings and progress bars of the libraries' own."""
    import diffusers
    import transformers
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


def load_pipeline(model, dtype, device, solver="own"):
    """Stable unCLIP: the generator G, its noise on embeddings, and CLIP's image encoder C. Trouble where it is not there.
    solver: of the denoising, the model's own or dpm, DPM-Solver++ of second order, which needs fewer steps."""
    import diffusers
    quieten()
    model = genview.mini() if model == "mini" else model
    new = tuple(int(part) for part in diffusers.__version__.split(".")[:2]) >= (0, 42)
    try:
        pipe = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(
            model, use_safetensors=True, **{"dtype" if new else "torch_dtype": dtype})       # safetensors: no pickled code
    except Exception as error:                     # of three libraries: OSError, ValueError, TypeError, SafetensorError, ...
        way_out = ("the folder must hold that pipeline as save_pretrained writes it, in safetensors" if Path(model).is_dir()
                   else f"where there is a network run `hf download {model} --exclude '*.ckpt'` and name the folder it "
                        f"prints by --model")
        raise Trouble(f"--model {model} could not be loaded as a StableUnCLIPImg2ImgPipeline ({type(error).__name__}): "
                      f"{way_out}; train_moco.py --dataset shapes needs no download") from None
    pipe.set_progress_bar_config(disable=True)
    if solver == "dpm":
        pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.vae.enable_slicing()                      # decodes one by one: little memory, and no rounding from the batch
    pipe.to(device)
    with torch.inference_mode():                   # the condition is the image: the prompt is empty, and encoded once
        pipe.empty_prompt = pipe.encode_prompt("", pipe.device, 1, False)[0]                    # (1, words, features)
    return pipe


@torch.inference_mode()
def encode(pipe, pictures):
    """One pass of CLIP gives both: patch tokens (n, T, K) and the embedding c (n, D) of up to ENCODER_BATCH PIL images."""
    padded = pictures + pictures[-1:] * (ENCODER_BATCH - len(pictures))
    pixels = pipe.feature_extractor(images=padded, return_tensors="pt").pixel_values
    out = pipe.image_encoder(pixels.to(pipe.device, pipe.image_encoder.dtype))
    tokens = genview.clip_tokens(pipe.image_encoder.vision_model, out.last_hidden_state)
    return tokens[:len(pictures)], out.image_embeds[:len(pictures)]


def encode_all(pipe, images, indices, on_unreadable=lambda index, trouble: None):
    """Yields indices, tokens (n, T, K) and embeddings c (n, D) of the images that can be read, ENCODER_BATCH at a time."""
    batch = {}
    for place, index in enumerate(indices):
        try:
            batch[index] = images.pil(index)
        except Trouble as trouble:
            on_unreadable(index, trouble)
        if batch and (len(batch) == ENCODER_BATCH or place == len(indices) - 1):
            yield list(batch), *encode(pipe, list(batch.values()))
            batch = {}


@torch.inference_mode()
def generate(pipe, args, level, embeddings, seeds):
    """Variations of images of one noise level, each from its own seed: c (n, D), n seeds -> n PIL images.

    z_i^l = sqrt(abar_l) c_i + sqrt(1 - abar_l) e,  e ~ N(0, I),    X_i^+ = G(z_i^l)
    Source: GenView, section "framework".
    """
    prompt = pipe.empty_prompt.repeat(len(seeds), 1, 1)
    # z_i^l: the pipeline normalises c_i, adds the noise of its own schedule abar and appends l. Generators of the CPU: the
    # same numbers on every device; one an image: e and the first latent do not depend on the rest of the batch.
    views = pipe(image_embeds=embeddings, noise_level=level, generator=[torch.Generator().manual_seed(s) for s in seeds],
                 prompt_embeds=prompt, negative_prompt_embeds=prompt, num_inference_steps=args.steps,
                 guidance_scale=args.guidance, height=args.size, width=args.size, output_type="pt").images  # (n, 3, H, W)
    if not views.isfinite().all():
        raise Trouble(f"the generator returned numbers that are not finite in {args.dtype}; --dtype float32 helps")
    pixels = (views.float() * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    return [Image.fromarray(x).resize((args.save_size, args.save_size), Image.Resampling.BICUBIC) for x in pixels]


def generate_all(pipe, args, level, embeddings, seeds):
    """generate in batches of at most args.batch_size, which doubles up to args.largest; where the memory does not suffice both
    are halved for good."""
    views = []
    while len(views) < len(seeds):
        part = slice(len(views), len(views) + args.batch_size)
        try:
            views += generate(pipe, args, level, embeddings[part], seeds[part])
            if len(seeds[part]) == args.batch_size:
                args.batch_size = min(2 * args.batch_size, args.largest)
        except torch.OutOfMemoryError:
            if args.batch_size == 1:
                raise Trouble("the memory does not suffice for one image; a smaller --size helps") from None
            args.batch_size = args.largest = args.batch_size // 2
            torch.cuda.empty_cache()
            genview.say(f"the memory does not suffice for more than {args.batch_size} images at once")
    return views


# ---------------------------------------------------------------------------------------------------------- the foreground

def find_foreground(args, pipe, images):
    """v1 and alpha for this data set: fitted on images spread over it, or of --component.

    Returns: component v1 (K,), threshold alpha. Source: section "adaptive view generation", step 2, and Eq. 7.
    """
    config = pipe.image_encoder.config
    v1, alpha = genview.load_component(args.component, config.hidden_size) if args.component else (None, None)
    if alpha is not None and not args.flip_foreground:
        return v1, alpha
    indices = genview.spaced(len(images.names), args.fit_images).tolist()      # of all images, whatever --limit
    kept, count = None, 0
    for _, tokens, _ in genview.progress(encode_all(pipe, images, indices), "fitting the foreground", "batch",
                                         total=math.ceil(len(indices) / ENCODER_BATCH)):
        if kept is None:                           # 6.5 GB for 10,000 images and ViT-H/14
            kept = torch.empty(len(indices), *tokens.shape[1:], dtype=torch.half)
        kept[count:count + len(tokens)] = tokens
        count += len(tokens)
    if not count:
        raise Trouble(f"none of the {len(indices)} images looked at in {args.data_dir} can be read")
    tokens = kept[:count]
    grid = (math.isqrt(tokens.shape[1]),) * 2
    if v1 is None:
        v1, alpha = genview.fit_foreground(tokens, grid, FRACTION)
    elif alpha is None:                                        # the release's file: neither sign nor threshold is known
        v1, alpha = genview.orient_foreground(v1, tokens, grid, FRACTION)
    a = torch.cat([part.float() @ v1 for part in tokens.split(256)])           # a_ij = <token_ij, v1>   (n, T)
    if len(a) > 1 and a.mean(0).var(correction=0) > 0.9 * a.var(correction=0):
        genview.say("the foreground maps of all images are nearly the same: this encoder's tokens tell their places, not what "
                    "they show, and adaptive noise levels mean nothing; --preview 8 shows it")
    if args.flip_foreground:
        v1, alpha = -v1, float(np.quantile(-a.numpy(), 1 - FRACTION))
    return v1, alpha


def shared_foreground(args, pipe, images, world):
    """The foreground of this views folder: found by the first process, once, and kept in foreground.npz."""
    path = args.views_dir / "foreground.npz"
    if world.rank == 0 and not path.exists():
        v1, alpha = find_foreground(args, pipe, images)
        content = dict(component=v1.cpu().numpy(), threshold=alpha, fraction=FRACTION, encoder=args.model)
        genview.write_whole(path, lambda temporary: _save_npz(temporary, content))
    world.wait()
    return genview.load_component(path, pipe.image_encoder.config.hidden_size)


def _save_npz(path, content):
    with open(path, "wb") as file:                 # np.savez would add a suffix to a name
        np.savez(file, **content)


# ------------------------------------------------------------------------------------------------------- the set of views

def make_view_set(args, pipe, images, world):
    """The method: encode, count the foreground, choose the noise level, generate; a batch holds images of one level."""
    prepare_folder(args, images, world)
    v1, alpha = (torch.as_tensor(x, device=pipe.device) for x in shared_foreground(args, pipe, images, world))
    mine = genview.spaced(len(images.names), args.limit).tolist()[world.rank::world.size]
    manifest = read_manifest(args.views_dir)
    todo = [i for i in mine if images.names[i] not in manifest or not view_path(args, images.names[i]).exists()]
    before, levels = [manifest[images.names[i]]["noise_level"] for i in set(mine) - set(todo)], []
    waiting, written, skipped, start = defaultdict(list), [], [], time.time()       # waiting: {level: [(index, p, c), ...]}
    bar = genview.progress(None, "views", "image", total=len(todo))

    def unreadable(index, trouble):
        skipped.append(index)
        print(f"skipped: {str(trouble).rsplit('; ', 1)[0]}", file=sys.stderr)

    def flush(level):
        """Generates the views of one batch; a thread writes them while the next batch is on its way."""
        batch = waiting.pop(level)
        seeds = [image_seed(args.seed, images.names[index]) for index, _, _ in batch]
        views = generate_all(pipe, args, level, torch.stack([c for _, _, c in batch]), seeds)
        if written:
            written.pop().result()                 # not more than one batch waits; its trouble is ours
        left = len(todo) - len(skipped) - len(levels)
        written.append(writer.submit(write_views, args, images, level, batch, seeds, views, left))
        levels.extend([level] * len(batch))
        bar.update(len(batch))

    with ThreadPoolExecutor(1) as writer:
        for indices, tokens, c in encode_all(pipe, images, todo, unreadable):
            p = foreground_proportion(tokens, v1, alpha)                                        # (n,)
            l = noise_level(p) if args.noise == "adaptive" else torch.full_like(p, args.noise).long()
            for index, proportion, level, embedding in zip(indices, p.tolist(), l.tolist(), c):
                waiting[level].append((index, proportion, embedding))
                if len(waiting[level]) >= args.batch_size:
                    flush(level)
        for level in sorted(waiting):
            flush(level)
        for last in written:
            last.result()
    bar.close()
    report(world, len(todo) - len(skipped), len(before), len(skipped), before + levels, time.time() - start)


def write_views(args, images, level, batch, seeds, views, left):
    """Writes the views of one batch: each image first, then its line in the manifest. left: how many are still to be written."""
    for (index, proportion, _), seed, view in zip(batch, seeds, views):
        name = images.names[index]
        path = view_path(args, name)
        if not path.parent.resolve().is_relative_to(args.views_dir.resolve()):                  # by a link of a stranger's
            raise Trouble(f"{path.parent} leads out of {args.views_dir}: remove that link")
        content, kind = io.BytesIO(), dict(format="PNG") if path.suffix == ".png" else dict(format="JPEG", quality=95)
        view.save(content, **kind)
        needed = left * len(content.getvalue())                                                 # by this one's size
        genview.write_whole(path, lambda temporary: temporary.write_bytes(content.getvalue()), needed=needed)
        genview.append(args.views_dir / "manifest.jsonl", json.dumps(
            {"source": name, "proportion": proportion, "noise_level": level, "seed": seed}) + "\n", needed)


def report(world, made, there, skipped, levels, seconds):
    """The last line, over all processes."""
    counts = torch.bincount(torch.tensor(levels, dtype=torch.long), minlength=1000)
    mine = torch.cat([torch.tensor([made, there, skipped]), counts]).to(world.device)
    made, there, skipped, *counts = world.gather(mine[None]).sum(0).tolist()
    if world.rank == 0:
        text = ", ".join(f"{level}: {count}" for level, count in enumerate(counts) if count)
        print(f"{made} views made, {there} there already, {skipped} skipped (unreadable); noise levels {text or 'none'}; "
              f"{seconds:.1f} s, {made / max(seconds, 1e-9):.2f} images/s")


# ------------------------------------------------------------------------------------------------------ names and records

def image_seed(seed, name):
    """A seed from the run's seed and the image's name alone: no batch, order, process, limit or restart changes a view."""
    return int.from_bytes(hashlib.sha256(f"{seed} ".encode() + os.fsencode(name)).digest()[:6], "little")


def view_path(args, name):
    return args.views_dir / Path(name).with_suffix(".png" if args.save_size <= 64 else ".jpg")    # small: without loss


def check_names(names):
    """Two sources must not share a view: a.jpg and a.png of one class would."""
    seen = {}
    for name in names:
        other = seen.setdefault(Path(name).with_suffix(""), name)
        if other != name:
            raise Trouble(f"{other} and {name} would have the same view: rename one of them")


def settings_of(args, images):
    names = "dataset model noise solver steps guidance size save_size seed dtype flip_foreground component fit_images".split()
    return {name: getattr(args, name) for name in names} | {"images": len(images.names), "classes": images.num_classes}


def prepare_folder(args, images, world):
    """Writes settings.json into a new folder; Trouble where the folder holds views of other settings, or anything else."""
    path, settings = args.views_dir / "settings.json", settings_of(args, images)
    advice = "name another --views-dir or remove the folder"
    if path.exists():
        before = genview.read_settings(path)
        for key in settings:
            if before.get(key) != settings[key]:
                raise Trouble(f"{args.views_dir} holds views of other settings: {key} is {before.get(key)} there and "
                              f"{settings[key]} here; {advice}")
    elif args.views_dir.exists():
        others = [entry.name for entry in os.scandir(args.views_dir)
                  if entry.name != "preview.png" and not entry.name.endswith(".tmp")]
        if others:
            raise Trouble(f"{args.views_dir} is not empty ({others[0]}) and no views folder of this script; {advice}")
    world.wait()                                   # all have looked before one writes
    if world.rank == 0:
        if not path.exists():
            genview.write_whole(path, lambda temporary: temporary.write_text(json.dumps(settings, indent=2) + "\n"))
        genview.sweep(args.views_dir)
        manifest = args.views_dir / "manifest.jsonl"
        if manifest.exists() and not manifest.read_bytes().endswith(b"\n"):     # a line torn by a kill: begin a new one
            genview.append(manifest, "\n")
    world.wait()


def read_manifest(folder):
    """{source: its line} of manifest.jsonl; lines that a kill cut short are left out."""
    path, lines = folder / "manifest.jsonl", {}
    for line in path.read_text(errors="replace").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
            if type(entry["noise_level"]) is int and 0 <= entry["noise_level"] < 1000:
                lines[entry["source"]] = entry
        except (ValueError, TypeError, KeyError):
            continue
    return lines


# ------------------------------------------------------------------------------------------------------------ the preview

def preview(args, pipe, images):
    """Draws preview.png, a column an image: original, foreground map, views at all levels, the adaptive choice framed
    (the paper's Fig. 3)."""
    v1, alpha = (torch.as_tensor(x, device=pipe.device) for x in find_foreground(args, pipe, images))
    cell = 128 if args.save_size <= 128 else 224
    columns = []
    for indices, tokens, c in encode_all(pipe, images, genview.spaced(len(images.names), args.preview).tolist()):
        p = foreground_proportion(tokens, v1, alpha)
        seeds = [image_seed(args.seed, images.names[i]) for i in indices]
        views = [generate_all(pipe, args, level, c, seeds)
                 for level in LEVELS]                                           # [level][image]
        for i, index in enumerate(indices):
            original = genview.square(images.pil(index), cell)
            pictures = [original, foreground_map(original, tokens[i].float() @ v1, alpha)] + [v[i] for v in views]
            columns.append((pictures, p[i].item(), noise_level(p[i:i + 1]).item()))
    path = args.views_dir / "preview.png"
    genview.write_whole(path, lambda temporary: draw_preview(columns, cell).save(temporary, format="PNG"))
    print(f"{path}: {len(columns)} images. If the coloured part is not the foreground, add --flip-foreground; "
          f"the same command without --preview {args.preview} makes the views")


def foreground_map(original, a, alpha):
    """a = <token, v1> of one image (T,) as brightness; the tokens above alpha in orange."""
    side, g = original.width, math.isqrt(len(a))
    grid = a.float().cpu().reshape(1, 1, g, g)
    smooth = F.interpolate(grid, size=(side, side), mode="bilinear")[0, 0]
    grey = (smooth - smooth.min()) / (smooth.max() - smooth.min()).clamp_min(1e-8)              # (side, side)
    inside = F.interpolate((grid > alpha.cpu()).float(), size=(side, side), mode="nearest")[0, 0, :, :, None]
    colour = inside * torch.tensor([255.0, 150.0, 0.0]) + (1 - inside) * 160.0
    return Image.fromarray((colour * (0.25 + 0.75 * grey[:, :, None])).byte().numpy())


def draw_preview(columns, cell):
    labels = ["original", "foreground"] + [f"level {level}" for level in LEVELS]
    left, gap, foot = 76, 6, 34
    sheet = Image.new("RGB", (left + len(columns) * (cell + gap), len(labels) * (cell + gap) + foot), "white")
    draw = ImageDraw.Draw(sheet)
    for row, label in enumerate(labels):
        draw.text((6, row * (cell + gap) + cell // 2), label, fill="black")
    for column, (pictures, p, level) in enumerate(columns):
        x = left + column * (cell + gap)
        for row, picture in enumerate(pictures):
            y = row * (cell + gap) + gap // 2
            if row >= 2 and LEVELS[row - 2] == level:
                draw.rectangle((x - 3, y - 3, x + cell + 2, y + cell + 2), fill="red")
            sheet.paste(picture.resize((cell, cell), Image.Resampling.NEAREST if picture.width < cell
                                       else Image.Resampling.BICUBIC), (x, y))
        draw.text((x, len(labels) * (cell + gap) + 2), f"p = {p:.2f}\nlevel {level}", fill="black")
    return sheet


# ------------------------------------------------------------------------------------------------------------ command line

def noise_argument(text):
    if text != "adaptive" and not (text.isdecimal() and int(text) < 1000):
        raise argparse.ArgumentTypeError(f"{text} is neither adaptive nor a whole number from 0 to 999")
    return text if text == "adaptive" else int(text)


def parse_args():
    parser = argparse.ArgumentParser(description="Makes one generated view of every training image, for train_moco.py.")
    data = parser.add_argument_group("data")
    data.add_argument("--dataset", choices=["cifar10", "cifar100", "imagenet", "folder"], required=True)
    data.add_argument("--data-dir", help="where the data lies (default: data, data/imagenet); CIFAR is downloaded there")
    data.add_argument("--views-dir", help="where the views go (default: views/<dataset>)")
    data.add_argument("--limit", type=genview.at_least(1), help="make views of so many images only, evenly spaced")
    data.add_argument("--save-size", type=genview.at_least(1),
                      help="side of the saved views (default: 32 for CIFAR, else up to 512)")
    method = parser.add_argument_group("GenView")
    method.add_argument("--model", help="hub id or local folder of a StableUnCLIPImg2ImgPipeline, or mini, the one in "
                        f"weights/ (default: mini for CIFAR if it is there, else {STABLE['model']})")
    method.add_argument("--noise", type=noise_argument, default="adaptive", help="adaptive, or one level, 0 to 999")
    method.add_argument("--solver", choices=["own", "dpm"], default="own",
                        help="the model's own, or DPM-Solver++, for fewer steps (default: own)")
    method.add_argument("--steps", type=genview.at_least(1), help="denoising steps (default: 20 as the release, mini: 2)")
    method.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: 10 as the release, mini: 1.25)")
    method.add_argument("--size", type=genview.at_least(1),
                        help="side of the generated image, a multiple of 8 (default: the model's)")
    method.add_argument("--seed", type=genview.at_least(0), default=0)
    method.add_argument("--component", help="foreground.npz or the release's pca_vectors.npy; default: fit one")
    method.add_argument("--flip-foreground", action="store_true", help="take the other side of the component as foreground")
    method.add_argument("--fit-images", type=genview.at_least(1), default=genview.FIT_IMAGES,
                        help="images the component is fitted on (release: 10,000)")
    runtime = parser.add_argument_group("runtime")
    runtime.add_argument("--preview", type=genview.at_least(1), metavar="N",
                         help="draw <views-dir>/preview.png of N images, no more")
    runtime.add_argument("--batch-size", type=genview.at_least(1),
                         help="images at once, at the most; halved by itself where a GPU's memory does not suffice (default: on a "
                              "GPU what fits, found from 64 on; on a CPU 64, or 1 for images above 64 pixels)")
    runtime.add_argument("--device", help="default: cuda, else mps, else cpu")
    runtime.add_argument("--dtype", choices=["auto", "float32", "bfloat16", "float16"], default="auto",
                         help="auto: bfloat16 or float16 on a GPU, else float32")
    args = parser.parse_args()
    args.data_dir = args.data_dir or genview.default_data_dir(args.dataset)
    args.views_dir = Path(args.views_dir or genview.default_views_dir(args.dataset, args.data_dir))
    args.model = args.model or ("mini" if args.dataset.startswith("cifar") and genview.MINI.is_dir() else STABLE["model"])
    usual = MINI if args.model == "mini" else STABLE
    args.steps, args.guidance = args.steps or usual["steps"], usual["guidance"] if args.guidance is None else args.guidance
    if args.size and args.size % 8:
        raise Trouble(f"--size {args.size} is no multiple of 8")
    return args


def main():
    args = parse_args()
    world = genview.setup(args.device, datetime.timedelta(days=7))         # processes may end days apart
    if args.dtype == "auto":
        args.dtype = "float32" if world.device.type != "cuda" else "bfloat16" if world.dtype == torch.bfloat16 else "float16"
    # A larger size than IN_MEMORY_SIZE: files are opened one by one, when their turn comes.
    images = genview.load_images(args.dataset, args.data_dir, "train", genview.IN_MEMORY_SIZE + 1)
    check_names(images.names)
    pipe = load_pipeline(args.model, getattr(torch, args.dtype), world.device, args.solver)
    if args.component:                             # trouble with it comes before anything is written
        genview.load_component(args.component, pipe.image_encoder.config.hidden_size)
    args.size = args.size or pipe.unet.config.sample_size * pipe.vae_scale_factor
    args.largest = args.batch_size or (LARGEST_BATCH if world.device.type == "cuda" else 64 if args.size <= 64 else 1)
    args.batch_size = min(args.largest, args.batch_size or 64)
    args.save_size = args.save_size or (32 if args.dataset.startswith("cifar") else min(512, args.size))
    if not args.preview:
        make_view_set(args, pipe, images, world)
    elif world.rank == 0:
        preview(args, pipe, images)


if __name__ == "__main__":
    genview.run(main)
