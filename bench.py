"""How fast is this on your machine, and against what? Prints one table; medians of windows taken in turn, in one run.

    python bench.py                     # everything; about 15 minutes on 2 CPU cores
    python bench.py steps augmentation  # some of it

CIFAR-10's sizes with random pixels and random weights: time does not depend on them. The frozen encoder is CLIP ViT-B/32's
architecture. Nothing is trained, downloaded or left behind.
"""
import argparse
import contextlib
import itertools
import multiprocessing
import resource
import statistics
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
import torchvision
from torch import nn
from torchvision.transforms import v2

import genview
import train_moco
from cached_quality import CachedQuality
from genview import PairLoader, say


def take_turns(steps, windows, sync):
    """Median seconds of each of the steps {name: function}, one call a window, in turn; after one call of each to warm up."""
    times = {name: [] for name in steps}
    for window in range(windows + 1):
        for name, step in steps.items():
            sync()
            start = time.perf_counter()
            step()
            sync()
            if window:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def pictures(n):
    pixels = torch.randint(256, (n, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    return genview.Images([f"train/{i:05d}" for i in range(n)], torch.arange(n) % 10, 10, pixels)


class Training:
    """MoCo v2 on CIFAR-10's sizes as train_moco.py trains it: .step() takes a batch from the loader, .bare() the same again."""

    def __init__(self, world, batch_size=256, n=50_000, quality_of=None, compiled=False):
        argv = f"--dataset cifar10 --views-dir none --batch-size {batch_size} --queue 4096 --output-dir runs/bench".split()
        self.args, self.world, self.quality_of = train_moco.parse_args(argv=argv), world, quality_of
        torch.manual_seed(0)
        self.method = train_moco.MoCoV2(self.args).to(world.device, memory_format=torch.channels_last).train()
        if compiled:
            train_moco.compile_method(self.method)
        self.optimizer = train_moco.make_optimizer(self.args, self.method)
        images = pictures(n)
        self.loader = PairLoader(images, images.pixels.flip(0), train_moco.augmentations(self.args), 32, batch_size, 0, world)
        self.batches = itertools.chain.from_iterable(map(self.loader.epoch, itertools.count()))
        self.batch = next(self.batches)

    def bare(self):
        _, views, places = self.batch
        views = [v.contiguous(memory_format=torch.channels_last) for v in views]
        train_moco.train_step(self.method, self.optimizer, views, places, self.quality_of, 1.0, 0.0, self.world)

    def step(self):
        self.batch = next(self.batches)
        self.bare()


class PlainLoop:
    """What one writes without thinking of speed: torchvision's transforms image by image, float32, channels first, the moving
    average parameter by parameter, the loss read at every step. The same network, queue, loss and optimizer."""

    def __init__(self, world, batch_size=256):
        training = Training(world, batch_size, n=4096)
        self.method = training.method.to(memory_format=torch.contiguous_format)
        self.optimizer, self.world = training.optimizer, world
        transform = v2.Compose([
            v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
            v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(genview.CLIP_MEAN, genview.CLIP_STD)])
        images = training.loader.images

        class Pairs(torch.utils.data.Dataset):
            def __len__(self):
                return len(images.names)

            def __getitem__(self, i):
                return transform(images.pil(i)), transform(images.pil(i))
        loader = torch.utils.data.DataLoader(Pairs(), batch_size, shuffle=True, drop_last=True)
        self.batches = itertools.chain.from_iterable(loader for _ in itertools.count())

    def step(self):
        views = [v.to(self.world.device) for v in next(self.batches)]
        for key, query in zip(self.method.key.parameters(), self.method.query.parameters()):
            key.data = 0.99 * key.data + 0.01 * query.data
        loss, _ = self.method(views, None, self.world)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return loss.item()


def plain_steps(pipe, device):
    """Runs a plain loop in a process of its own, which has nothing of genview.setup: a step for each message."""
    loop = PlainLoop(genview.World(0, 1, torch.device(device), torch.float32))
    while True:
        pipe.send("ready")
        if pipe.recv() is None:
            return
        loop.step()


@contextlib.contextmanager
def plain_loop(world):
    """Yields a function that makes one step of a plain loop."""
    pipe, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=plain_steps, args=(theirs, str(world.device)))
    process.start()
    pipe.recv()
    yield lambda: (pipe.send("step"), pipe.recv())
    pipe.send(None)
    process.join()


def exact_quality(world):
    from transformers import CLIPVisionConfig, CLIPVisionModel
    encoder = genview.FrozenEncoder.__new__(genview.FrozenEncoder)     # its architecture, without a download
    nn.Module.__init__(encoder)
    encoder.model = CLIPVisionModel(CLIPVisionConfig(patch_size=32)).to(world.device).eval().requires_grad_(False)
    encoder.size, encoder.is_clip = 224, True
    return train_moco.PairQuality(encoder, torch.randn(768, device=world.device))


def cached_quality(world, folder, pictures=100_000):
    file = np.lib.format.open_memmap(Path(folder, f"{pictures}.npy"), "w+", np.float16, (pictures, 7, 7, 64))
    for part in np.array_split(file, 100):
        part[:] = np.random.default_rng(0).standard_normal(part.shape, np.float32)
    return CachedQuality(np.load(file.filename, mmap_mode="r"), world.device)


# --------------------------------------------------------------------------------------------------------- the measurements

def steps(world, sync, windows):
    """A step without, with cached and with exact quality; end to end; against a plain loop."""
    with tempfile.TemporaryDirectory() as folder, plain_loop(world) as plain:
        runs = {"off": Training(world), "cached": Training(world, quality_of=cached_quality(world, folder)),
                "exact": Training(world, quality_of=exact_quality(world))}
        functions = {"bare": runs["off"].bare} | {name: run.step for name, run in runs.items()}
        functions["plain"] = plain
        if world.device.type == "cuda":
            functions["compiled"] = Training(world, compiled=True).step
        t = take_turns(functions, windows, sync)
        rate = lambda name: f"{256 / t[name]:,.0f} images/s"
        yield "step without quality, loader included", rate("off")
        yield "... of the bare compute step's speed", f"{t['bare'] / t['off']:.3f}"
        yield "... cached quality: time over the step without", f"{t['cached'] / t['off']:.3f}"
        yield "... exact quality (CLIP ViT-B/32): time over the step without", f"{t['exact'] / t['off']:.2f}"
        yield "... speed over a plain float32 channels-first loop", f"{t['plain'] / t['off']:.2f} ({rate('plain')})"
        if "compiled" in t:
            yield "... with --compile", rate("compiled")


def augmentation(world, sync, windows):
    """Two views of each image, nothing else."""
    training = Training(world, n=10_000)
    t = take_turns({"two views": lambda: [next(training.batches) for _ in range(10)]}, windows, sync)
    yield "augmentation, two views of an image each", f"{2560 / t['two views']:,.0f} images/s"


def size(world, sync, windows):
    """Speed must not depend on the number of images or on the batch."""
    runs = {f"{n:,} images": Training(world, n=n).step for n in (1000, 2000, 4000, 8000)}
    runs |= {f"batch {b}": Training(world, b, n=8000).step for b in (64, 128, 512, 1024)}
    t = take_turns(runs, windows, sync)
    batch = lambda name: int(name.split()[1]) if name.startswith("batch") else 256
    for name in runs:
        yield f"step, {name}", f"{batch(name) / t[name]:,.0f} images/s"


def memory(world, sync, windows):
    """The peak of a process that trains on 50,000 images and views with cached quality, over that of the bare framework."""
    with tempfile.TemporaryDirectory() as folder, multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        cached_quality(world, folder)
        frame = pool.apply(peak, (str(world.device), None))
        ours = pool.apply(peak, (str(world.device), folder))
    yield "memory of training on CIFAR-10, over the framework's own", f"{(ours - frame) / 2 ** 30:.2f} GiB"
    yield "cached features of CIFAR-10 and its views", f"{100_000 * 49 * 64 * 2 / 1e6:.0f} MB; linear: ImageNet " \
                                                       f"{2 * 1_281_167 * 49 * 64 * 2 / 1e9:.1f} GB"


def peak(device, folder):
    """Peak memory in bytes of this process after three steps and a look at all features; folder None: after a convolution."""
    world = genview.setup(device)
    if folder is None:
        with world.autocast():
            torchvision.models.resnet18().to(world.device)(torch.zeros(2, 3, 32, 32, device=world.device)).sum().backward()
    else:
        maps = np.load(next(Path(folder).glob("*.npy")), mmap_mode="r")
        training = Training(world, quality_of=CachedQuality(maps, world.device))
        for _ in range(3):
            training.step()
        for part in np.array_split(maps, 100):     # as an epoch does; the system may take these pages back at any time
            part.max()
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def generation(world, sync, windows, n=32):
    """Views in batches against one at a time with an encoder pass each for tokens and embedding, on a small pipeline."""
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer

    import generate_views
    from train_generator import EMBEDDING, Autoencoder, Generator, ImageEncoder, assemble
    torch.manual_seed(0)
    pipe = assemble(Autoencoder().vae, ImageEncoder().model, Generator(StableUnCLIPImageNormalizer(EMBEDDING)))
    with tempfile.TemporaryDirectory() as folder:
        pipe.save_pretrained(folder)
        pipe = generate_views.load_pipeline(folder, torch.float32, world.device)
    images = [pictures(n).pil(i) for i in range(n)]
    args = SimpleNamespace(steps=20, guidance=2.0, size=32, save_size=32, dtype="float32")

    def batched():
        c = torch.cat([generate_views.encode(pipe, images[k:k + 8])[1] for k in range(0, n, 8)])
        generate_views.generate(pipe, args, 100, c, list(range(n)))

    def one_at_a_time():
        for i, image in enumerate(images):
            x = pipe.feature_extractor(images=image, return_tensors="pt").pixel_values.to(world.device)
            with torch.inference_mode():
                pipe.image_encoder(x).last_hidden_state
            pipe(image=image, noise_level=100, prompt="", num_inference_steps=20, guidance_scale=2.0,
                 generator=torch.Generator().manual_seed(i))
    t = take_turns({"batched": batched, "single": one_at_a_time}, windows, sync)
    yield f"generation, the 32 x 32 miniature, 20 steps, guidance 2, batch {n}", f"{n / t['batched']:.1f} images/s"
    yield "... over one image at a time with two encoder passes", f"{t['single'] / t['batched']:.1f}"


PARTS = {"steps": steps, "augmentation": augmentation, "size": size, "memory": memory, "generation": generation}


def parse_args():
    parser = argparse.ArgumentParser(description="Measures this machine; one table.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--windows", type=genview.at_least(3), default=3, help="calls of each, whose median counts")
    parser.add_argument("--device")
    args = parser.parse_args()
    if unknown := set(args.parts) - PARTS.keys():
        raise genview.Trouble(f"{', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
    return args


def main():
    args = parse_args()
    world = genview.setup(args.device)
    sync = torch.cuda.synchronize if world.device.type == "cuda" else lambda: None
    device = torch.cuda.get_device_name() if world.device.type == "cuda" else f"{torch.get_num_threads()} CPU threads"
    say(f"ResNet-18, 32 x 32, batch 256; {device}, {str(world.dtype).removeprefix('torch.')}; PyTorch {torch.__version__}; "
        f"medians of {args.windows}\n\n| what | measured |\n| --- | --- |")
    for name in args.parts or PARTS:
        for what, value in PARTS[name](world, sync, args.windows):
            say(f"| {what} | {value} |")


if __name__ == "__main__":
    genview.run(main)
