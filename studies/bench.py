"""How fast is this project on your machine, and against what? Prints one table.

    python -m studies.bench                     # everything; about 15 minutes on 2 CPU cores
    python -m studies.bench steps augmentation  # some of it

CIFAR-10's sizes with random pixels and weights, on which time does not depend. Nothing is kept.
"""
import functools
import itertools
import statistics
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import SimpleNamespace

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.bench\n")
    sys.exit(2)

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torchvision.transforms import v2

from generate_views import encode_all, generate, load_pipeline
from genview import CropPairs, FrozenEncoder, PairLoader, PairQuality, augmentations
from support.augment import CLIP_MEAN, CLIP_STD, Augmentation
from support.data import Images
from support.world import Parser, UserError, World, say, script, setup, step_generator, whole
from train_moco import MoCoV2, make_optimizer, parse_args, train_step


def take_turns(rows, windows, sync):
    """Calls rows (name, function, images) in turn. Returns {name: median seconds per image}."""
    times = {name: [] for name, *_ in rows}
    for name, function, n in rows * (windows + 1):
        sync()
        start = time.perf_counter()
        function()
        sync()
        times[name].append((time.perf_counter() - start) / n)
    return {name: statistics.median(x[1:]) for name, x in times.items()}       # the first warms up


@functools.cache
def pictures(n):
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8, generator=step_generator(0))
    return Images([f"train/{i:05d}" for i in range(n)], torch.arange(n) % 10, 10, pixels)


def training(world, batch=256, n=50_000, quality_of=None):
    """MoCo v2 on n images. Returns method, optimizer, batches and a function, its training step."""
    args = parse_args(argv=["--dataset=cifar10", "--views-dir=none", "--queue=4096",
                            f"--batch-size={batch}", "--output-dir=runs/bench"])
    method = MoCoV2(args).to(world.device, memory_format=torch.channels_last).train()
    optimizer, images = make_optimizer(args, method), pictures(n)
    loader = PairLoader(images, images.pixels.flip(0), augmentations(args), 32, batch, 0, world)
    batches = (views for epoch in itertools.count() for views in loader.epoch(epoch))

    def step(views=None):
        train_step(method, optimizer, views or next(batches), quality_of, 1.0, 0.0, world)
    return method, optimizer, batches, step


kept_training = functools.cache(training)


def plain_step(device, batch=256, n=4096):
    """A step that is not optimised for speed: torchvision's transforms image by image, float32,
    channels first, parameters averaged one by one, loss read at every step. Returns the loss."""
    world, images = World(0, 1, device, torch.float32), pictures(n)
    method, optimizer, *_ = kept_training(world, batch, n)
    method.to(memory_format=torch.contiguous_format)
    transform = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    sources = [images.pil(i) for i in torch.randperm(n)[:batch]]
    views = [torch.stack([transform(x) for x in sources]).to(device) for _ in range(2)]
    for key, query in zip(method.key.parameters(), method.query.parameters(), strict=True):
        key.data = 0.99 * key.data + 0.01 * query.data
    loss, _ = method(views, None, world)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def steps(world):
    """Like the other parts: yields name, function, images of one call."""
    *_, batches, step = training(world)
    yield "step without quality, loader included", step, 256
    yield "... compute alone, the same batch again", functools.partial(step, next(batches)), 256
    mini, clip = FrozenEncoder("mini"), FrozenEncoder("mini")
    config = transformers.CLIPVisionConfig(patch_size=32)
    clip.model, clip.size = transformers.CLIPVisionModel(config), 224    # random: no download
    for name, encoder in (("mini", mini), ("CLIP ViT-B/32", clip)):
        encoder.to(world.device, memory_format=torch.channels_last)
        v1 = torch.randn(encoder.model.config.hidden_size, device=world.device)
        quality_of = PairQuality(encoder, v1)
        yield f"... with exact quality ({name})", training(world, quality_of=quality_of)[-1], 256
    # In its own process, without the settings that setup makes in this one.
    pool = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"))
    yield "a plain float32 loop", lambda: pool.submit(plain_step, world.device).result(), 256


def augmentation(world):
    *_, batches, _ = training(world, n=10_000)
    yield "augmentation, two views of an image each", lambda: next(batches), 256


def files(world, n=64):
    """Two crops of 224 pixels of each of n JPEG files of 500 x 375, in one thread."""
    folder, draw = tempfile.TemporaryDirectory(), step_generator(0)
    for i in range(n):
        coarse = torch.rand(1, 3, 48, 64, generator=draw)
        x = F.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 1)[0]
        for kind, y in (("image", x), ("view", F.interpolate(x[None], size=(512, 512))[0])):
            v2.functional.to_pil_image(y).save(f"{folder.name}/{kind}-{i}.jpg", quality=90)
    usual = v2.Compose([v2.RandomResizedCrop(224, (0.2, 1)), v2.PILToTensor()])

    def here(second):
        images = Images([f"image-{i}.jpg" for i in range(n)], torch.zeros(n), 1, None,
                        Path(folder.name))
        views = [Path(folder.name, f"view-{i}.jpg") for i in range(n)] if second else None
        pairs = CropPairs(images, views, [Augmentation()] * 2, 224, 0, False)
        return lambda: [pairs[0, i, False] for i in range(n)]

    def pillow(*kinds):
        for i in range(n):
            both = [Image.open(f"{folder.name}/{kind}-{i}.jpg").convert("RGB") for kind in kinds]
            [usual(picture) for picture in (both * 2)[:2]]
    torch.set_num_threads(1)
    yield "files: torchvision's transforms of Pillow, image twice", lambda: pillow("image"), n
    yield "... here", here(False), n
    yield "torchvision's, image and view of 512 x 512", lambda: pillow("image", "view"), n
    yield "... here, image and view", here(True), n
    yield "decoding one image alone", lambda: [
        Image.open(f"{folder.name}/image-{i}.jpg").convert("RGB") for i in range(n)], n


def size(world):
    sizes = [(256, n) for n in (1000, 2000, 4000, 8000)]      # the speed should not depend on these
    for batch, n in sizes + [(batch, 8000) for batch in (64, 128, 512, 1024)]:
        yield f"step, {n:,} images, batch {batch}", training(world, batch, n)[-1], batch


def generation(world, n=32):
    pipe, images = load_pipeline("mini", torch.float32, world.device), pictures(n)
    args = SimpleNamespace(steps=20, guidance=2.0, size=32, save_size=32, precision="float32")

    def batched():
        c = torch.cat([c for *_, c in encode_all(pipe, images, range(n))])
        generate(pipe, args, 100, c, range(n))

    def single():
        for i in range(n):
            pipe(image=images.pil(i), noise_level=100, prompt="", num_inference_steps=20,
                 guidance_scale=2.0, generator=torch.Generator().manual_seed(i))
    yield f"generation, the 32 x 32 miniature, 20 steps, guidance 2, batch {n}", batched, n
    yield "... one image at a time", single, n


def main():
    parts = {part.__name__: part for part in (steps, augmentation, files, size, generation)}
    parser = Parser("Measures this machine.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--windows", type=whole(3), default=3, help="calls; their median counts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    args = parser.parse_args()
    if unknown := set(args.parts) - parts.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    world = setup(args.device)
    say(f"ResNet-18, 32 x 32; {world.device}, {torch.get_num_threads()} threads, {world.dtype}, "
        f"PyTorch {torch.__version__}; medians of {args.windows}\n\n"
        "| what | images/s | time per image over the first row's |\n| --- | --- | --- |")
    sync = getattr(torch, world.device.type).synchronize
    for part in args.parts or parts:
        seconds = take_turns(list(parts[part](world)), args.windows, sync)
        for name, value in seconds.items():
            say(f"| {name} | {1 / value:,.1f} | {value / next(iter(seconds.values())):.2f} |")


if __name__ == "__main__":
    script(main)
