"""How fast is this project on your machine, and against what? Prints one table.

    python -m studies.bench                     # everything; about 15 minutes on 2 CPU cores
    python -m studies.bench steps augmentation  # some of it

CIFAR-10's sizes with random pixels and weights, on which time does not depend. Nothing is kept.
"""
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from types import SimpleNamespace

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.bench\n")
    sys.exit(2)

import torch
from torch.utils.data import DataLoader
from torchvision.transforms import v2
from transformers import CLIPVisionConfig, CLIPVisionModel

import train_moco
from generate_views import encode, generate, load_pipeline
from genview import FrozenEncoder, PairLoader, PairQuality
from support.augment import CLIP_MEAN, CLIP_STD
from support.data import Images
from support.world import Parser, UserError, World, say, script, setup, whole


def take_turns(steps, windows, sync):
    """Median seconds of the steps {name: function}: called in turn, a first round to warm up."""
    times = {name: [] for name in steps}
    for name, step in [*steps.items()] * (windows + 1):
        sync()
        start = time.perf_counter()
        step()
        sync()
        times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def pictures(n):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    return Images([f"train/{i:05d}" for i in range(n)], torch.arange(n) % 10, 10, pixels)


def training(world, batch_size=256, n=50_000, quality_of=None):
    """MoCo v2 on n images, by train_moco.py's functions. Returns method, optimizer, a generator of
    batches, and a function that trains on the next batch, or on a given one."""
    args = train_moco.parse_args(argv=["--dataset=cifar10", "--views-dir=none", "--queue=4096",
                                       f"--batch-size={batch_size}", "--output-dir=runs/bench"])
    torch.manual_seed(0)
    method = train_moco.MoCoV2(args).to(world.device, memory_format=torch.channels_last).train()
    optimizer, images = train_moco.make_optimizer(args, method), pictures(n)
    loader = PairLoader(images, images.pixels.flip(0), train_moco.augmentations(args), 32,
                        batch_size, 0, world)
    batches = itertools.chain.from_iterable(map(loader.epoch, itertools.count()))

    def step(views=None):
        views = views or next(batches)
        train_moco.train_step(method, optimizer, views, quality_of, 1.0, 0.0, world)
    return method, optimizer, batches, step


@functools.cache
def plain_loop(device, batch_size=256, n=4096):
    """What one writes without a thought for speed: torchvision's transforms for each image, float32,
    channels first, parameters averaged one by one, the loss read at every step. The rest is the
    same. Yields the loss of each step."""
    world, images = World(0, 1, torch.device(device), torch.float32), pictures(n)
    method, optimizer, *_ = training(world, batch_size, n)
    method.to(memory_format=torch.contiguous_format)
    transform = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    loader = DataLoader(range(n), batch_size, shuffle=True, drop_last=True, collate_fn=lambda part: [
        torch.stack([transform(images.pil(i)) for i in part]).to(device) for _ in range(2)])
    for views in itertools.chain.from_iterable(itertools.repeat(loader)):
        for key, query in zip(method.key.parameters(), method.query.parameters(), strict=True):
            key.data = 0.99 * key.data + 0.01 * query.data
        loss, _ = method(views, None, world)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        yield loss.item()


def plain_step(device):
    return next(plain_loop(device))


# --------------------------------------- what is measured: {row: (function, images of one call)}

def steps(world):
    """Training without and with exact quality, and a plain loop."""
    *_, batches, step = training(world)
    views = next(batches)
    rows = {"step without quality, loader included": step,
            "... compute alone: the same batch again": lambda: step(views)}
    for name in ("mini", "CLIP ViT-B/32"):
        encoder = FrozenEncoder("mini")
        if name != "mini":                         # random weights: nothing is downloaded
            encoder.model, encoder.size = CLIPVisionModel(CLIPVisionConfig(patch_size=32)), 224
            encoder.eval().requires_grad_(False)
        encoder.to(world.device, memory_format=torch.channels_last)
        v1 = torch.randn(encoder.model.config.hidden_size, device=world.device)
        rows[f"... with exact quality ({name})"] = training(
            world, quality_of=PairQuality(encoder, v1))[-1]
    # In a process of its own, without what setup changes in this one.
    pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
    rows["a plain float32 channels-first loop"] = lambda: pool.submit(
        plain_step, str(world.device)).result()
    return {row: (function, 256) for row, function in rows.items()}


def augmentation(world):
    *_, batches, _ = training(world, n=10_000)
    return {"augmentation, two views of an image each": (lambda: next(batches), 256)}


def size(world):
    """Speed should not depend on the number of images or on the batch."""
    counts = (1000, 2000, 4000, 8000)
    rows = {f"step, {n:,} images": (training(world, n=n)[-1], 256) for n in counts}
    return rows | {f"step, batch {batch}": (training(world, batch, 8000)[-1], batch)
                   for batch in (64, 128, 512, 1024)}


def generation(world, n=32):
    """Views in a batch, and one at a time with an encoder pass each for tokens and embedding."""
    pipe = load_pipeline("mini", torch.float32, world.device)
    images = [pictures(n).pil(i) for i in range(n)]
    args = SimpleNamespace(steps=20, guidance=2.0, size=32, save_size=32, dtype="float32")

    def batched():
        c = torch.cat([encode(pipe, images[k:k + 8])[1] for k in range(0, n, 8)])
        generate(pipe, args, 100, c, list(range(n)))

    def single():
        for i, image in enumerate(images):
            x = pipe.feature_extractor(images=image, return_tensors="pt").pixel_values
            with torch.inference_mode():
                pipe.image_encoder(x.to(world.device))
            pipe(image=image, noise_level=100, prompt="", num_inference_steps=20, guidance_scale=2.0,
                 generator=torch.Generator().manual_seed(i))
    return {f"generation, the 32 x 32 miniature, 20 steps, guidance 2, batch {n}": (batched, n),
            "... one image at a time with two encoder passes": (single, n)}


PARTS = {part.__name__: part for part in (steps, augmentation, size, generation)}


def main():
    parser = Parser("Measures this machine.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--windows", type=whole(3), default=3, help="calls; their median counts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    world = setup(args.device)
    say(f"ResNet-18, 32 x 32, batch 256; {world.device}, {torch.get_num_threads()} CPU threads, "
        f"{world.dtype}, PyTorch {torch.__version__}; medians of {args.windows}\n\n"
        f"| what | images/s | time per image over the first row's |\n| --- | --- | --- |")
    for part in args.parts or PARTS:
        rows = PARTS[part](world)
        functions = {row: function for row, (function, _) in rows.items()}
        t = take_turns(functions, args.windows, getattr(torch, world.device.type).synchronize)
        times = [t[row] / n for row, (_, n) in rows.items()]
        for row, seconds in zip(rows, times, strict=True):
            say(f"| {row} | {1 / seconds:,.1f} | {seconds / times[0]:.2f} |")


if __name__ == "__main__":
    script(main)
