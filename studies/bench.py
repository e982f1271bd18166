"""How fast is this project on your machine, and against what? Prints one table.

    python -m studies.bench                     # everything; about 10 minutes on 2 CPU cores
    python -m studies.bench steps augmentation  # some of it

Random pixels and weights, on which time does not depend. Nothing is kept.
"""
import functools
import importlib.util
import itertools
import re
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

if not __package__:
    sys.stderr.write("error: call it from the root of the repository: python -m studies.bench\n")
    sys.exit(2)

import torch
import torch.nn.functional as F
import transformers
from PIL import Image
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms import v2

from eval_linear import knn_accuracy
from generate_views import encode_all, generate, load_pipeline
from genview import CropsOfFiles, FrozenEncoder, PairLoader, PairQuality, augmentations
from support.augment import CLIP_MEAN, CLIP_STD, Augmentation
from support.command_line import Parser, UserError, say, script, whole
from support.data import Images
from support.processes import setup
from support.seeds import step_generator
from train_moco import MoCoV2, make_optimizer, parse_args, train_step


# Two kinds of rows of the table.
class Timed(NamedTuple):
    """A function whose calls are timed, in turn with those of the other rows of its part."""
    name: str
    function: Callable
    images: int                                    # of one call


class Measured(NamedTuple):
    """A value that its part has measured itself."""
    name: str
    value: str


def seconds_per_image(rows, windows, synchronize):
    """Calls the functions of Timed rows in turn. Returns {name: median over the windows}."""
    times = {row.name: [] for row in rows}
    for window in range(windows + 1):
        for row in rows:
            synchronize()
            start = time.perf_counter()
            row.function()
            synchronize()
            seconds = time.perf_counter() - start
            if window > 0:                         # the first warms up
                times[row.name].append(seconds / row.images)
    return {name: statistics.median(values) for name, values in times.items()}


def random_images(count, size=32):
    pixels = torch.randint(256, (count, 3, size, size), dtype=torch.uint8,
                           generator=step_generator(0))
    names = [f"train/{i:05d}" for i in range(count)]
    return Images(names, torch.arange(count) % 10, 10, pixels)


class Training:
    """MoCo v2 on random images, each with another one as its generated view."""
    def __init__(self, world, batch=256, count=50_000, size=32, arch="resnet18", quality_of=None):
        args = parse_args(argv=[
            "--dataset=cifar10", "--views-dir=none", "--queue=4096", f"--image-size={size}",
            f"--arch={arch}", f"--batch-size={batch}", "--output-dir=runs/bench"])
        self.world = world
        self.quality_of = quality_of
        self.method = MoCoV2(args).to(world.device, memory_format=torch.channels_last).train()
        self.optimizer = make_optimizer(self.method, args.optimizer, args.weight_decay)
        self.images = random_images(count, size)
        views = self.images.pixels.flip(0)
        self.loader = PairLoader(self.images, views, augmentations(args), size, batch, 0, world)
        self.batches = self.endless()

    def endless(self):
        for epoch in itertools.count():
            yield from self.loader.epoch(epoch)

    def load(self):
        return next(self.batches)

    def step(self, views=None):
        """views: of the batch; None: the loader's next."""
        views = views or self.load()
        train_step(self.method, self.optimizer, views, self.quality_of, 1.0, 0.0, self.world)


def quality_by(encoder_name, world):
    """q by E, mini or clip; the latter's weights are random: no download."""
    encoder = FrozenEncoder("mini")
    if encoder_name == "clip":
        config = transformers.CLIPVisionConfig(patch_size=32)
        encoder.model = transformers.CLIPVisionModel(config)
        encoder.size = 224
    encoder.to(world.device, memory_format=torch.channels_last)
    v1 = torch.randn(encoder.model.config.hidden_size, device=world.device)
    return PairQuality(encoder, v1)


# -------------------------------------------------------------------------------------- the others
def elsewhere(function, *arguments):
    """A function that calls this one in a process of its own, always the same and without the
    settings that setup makes in this one, and returns its result."""
    pool = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"))
    return lambda: pool.submit(function, *arguments).result()


@functools.cache
def begun(loop, *arguments):
    """A loop that this process has begun; each next is one step."""
    return loop(*arguments)


def next_step(loop, *arguments):
    return next(begun(loop, *arguments))


def plain_loop(world, batch=256, count=4096, arch="resnet18"):
    """Steps that are not optimised for speed: torchvision's transforms image by image, float32,
    channels first, parameters averaged one by one, the loss read at each. Yields the losses."""
    training = Training(world, batch, count, arch=arch)
    method = training.method.to(memory_format=torch.contiguous_format)
    transform = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    while True:
        sources = [training.images.pil(i) for i in torch.randperm(count)[:batch]]
        views = [torch.stack([transform(x) for x in sources]).to(world.device) for _ in range(2)]
        for key, query in zip(method.key.parameters(), method.query.parameters(), strict=True):
            key.data = 0.99 * key.data + 0.01 * query.data
        loss, _ = method(views, None, world)
        training.optimizer.zero_grad()
        loss.backward()
        training.optimizer.step()
        yield loss.item()


def lightly_loop(world, batch=256, count=4096):
    """Steps of lightly's MoCo example with the network of Training."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import update_momentum
    from lightly.transforms import MoCoV2Transform
    training = Training(world, batch, count)
    method = training.method.to(memory_format=torch.contiguous_format)
    optimizer = training.optimizer
    optimizer.param_groups[0]["lr"] = 0.06
    transform = MoCoV2Transform(input_size=32, gaussian_blur=0.0)
    samples = [(transform, training.images.pil(i)) for i in range(count)]
    loader = DataLoader(samples, batch, shuffle=True, drop_last=True, num_workers=2,
                        persistent_workers=True, collate_fn=transformed)
    criterion = NTXentLoss(0.1, memory_bank_size=(4096, 128))
    while True:
        for views in loader:
            query = views[0].to(world.device)
            key = views[1].to(world.device)
            update_momentum(method.query, method.key, 0.99)
            with torch.no_grad():
                key = method.key(key)
            loss = criterion(method.query(query), key)
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            yield


def transformed(samples):
    """Two views of each sample (transform, picture), as a batch; in a loader's process."""
    pairs = [transform(picture) for transform, picture in samples]
    return [torch.stack(views) for views in zip(*pairs, strict=True)]


# --------------------------------------------------------------------------------------- the parts
# Each yields rows.
def steps(world):
    """ResNet-18, CIFAR-10's sizes."""
    training = Training(world)
    batch = training.load()
    yield Timed("step without quality, loader included", training.step, 256)
    yield Timed("... compute alone, the same batch again", lambda: training.step(batch), 256)
    with FlopCounterMode(display=False) as counter:
        training.step(batch)
    a = torch.randn(4096, 4096, device=world.device, dtype=world.dtype)
    products = round(counter.get_total_flops() / 2 / 4096 ** 3)

    def multiply():
        for _ in range(products):
            a @ a
    yield Timed("... its multiplications as matrix products", multiply, 256)
    with_quality = Training(world, quality_of=quality_by("mini", world))
    yield Timed("... with exact quality (mini)", with_quality.step, 256)
    single = world._replace(dtype=torch.float32)
    yield Timed("a plain float32 loop", elsewhere(next_step, plain_loop, single), 256)
    if importlib.util.find_spec("lightly"):
        yield Timed("lightly's MoCo, float32, 2 workers",
                    elsewhere(next_step, lightly_loop, single), 256)


def large_steps(world, batch=32):
    """ImageNet's size: ResNet-50 and 224 pixels, CLIP's ViT-B/32 as E."""
    options = dict(batch=batch, count=2 * batch, size=224, arch="resnet50")
    plain = Training(world, **options)
    yield Timed("ResNet-50, 224 pixels, without quality", plain.step, batch)
    with_quality = Training(world, **options, quality_of=quality_by("clip", world))
    yield Timed("... with exact quality (CLIP)", with_quality.step, batch)


def augmentation(world, count=10_000):
    training = Training(world, count=count)
    yield Timed("augmentation, two views of an image each", training.load, 256)


def size(world):
    """The speed should not depend on these."""
    for batch, count in [(256, 1000), (256, 2000), (256, 4000), (256, 8000),
                         (64, 8000), (128, 8000), (512, 8000), (1024, 8000)]:
        training = Training(world, batch, count)
        yield Timed(f"step, {count:,} images, batch {batch}", training.step, batch)


def write_jpegs(folder, count):
    """Writes images of 500 x 375 and views of 512 x 512. Returns Images and the views' paths."""
    generator = step_generator(0)
    for i in range(count):
        coarse = torch.rand(1, 3, 48, 64, generator=generator)
        image = F.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 1)
        view = F.interpolate(image, size=(512, 512))
        for kind, x in (("image", image), ("view", view)):
            v2.functional.to_pil_image(x[0]).save(f"{folder}/{kind}-{i}.jpg", quality=90)
    names = [f"image-{i}.jpg" for i in range(count)]
    images = Images(names, torch.zeros(count), 1, None, Path(folder))
    return images, [Path(folder, f"view-{i}.jpg") for i in range(count)]


def files(world, count=64):
    """Two crops of 224 pixels of each of some JPEG files, in one thread."""
    folder = tempfile.TemporaryDirectory()         # removed when no row needs it
    images, views = write_jpegs(folder.name, count)
    usual = v2.Compose([v2.RandomResizedCrop(224, (0.2, 1)), v2.PILToTensor()])

    def here(views):
        pairs = CropsOfFiles(images, views, [Augmentation()] * 2, [224, 224], 0)
        for i in range(count):
            pairs[0, i, False]

    def decode(kind, i):
        return Image.open(f"{folder.name}/{kind}-{i}.jpg").convert("RGB")

    def image_twice():
        for i in range(count):
            picture = decode("image", i)
            usual(picture)
            usual(picture)

    def image_and_view():
        for i in range(count):
            usual(decode("image", i))
            usual(decode("view", i))

    def decode_images():
        for i in range(count):
            decode("image", i)
    torch.set_num_threads(1)
    yield Timed("files: torchvision's transforms of Pillow, image twice", image_twice, count)
    yield Timed("... here", lambda: here(None), count)
    yield Timed("torchvision's, image and view of 512 x 512", image_and_view, count)
    yield Timed("... here, image and view", lambda: here(views), count)
    yield Timed("decoding one image alone", decode_images, count)


def loader(world, count=256, batch=32):
    """Two epochs of MoCo v2 on JPEG files at 224 pixels, by ResNet-18."""
    training = Training(world, batch, batch, size=224)
    workers = torch.get_num_threads()
    waits = []
    times = []
    with tempfile.TemporaryDirectory() as folder:
        images, views = write_jpegs(folder, count)
        loader = PairLoader(images, views, [Augmentation()] * 2, 224, batch, 0, world, workers)
        for epoch in range(2):
            batches = loader.epoch(epoch)
            for _ in range(loader.steps):
                start = time.perf_counter()
                pair = next(batches)
                waits.append(time.perf_counter() - start)
                training.step(pair)
                times.append(time.perf_counter() - start)
    share = sum(waits[2:]) / sum(times[2:])        # in the first two steps the workers start
    yield Measured(f"loader of files, {workers} workers: share of a step spent waiting",
                   f"{100 * share:.1f}%")
    gap = waits[loader.steps] / statistics.median(times)
    yield Measured("... gap between two epochs, in steps", f"{gap:.2f}")


def knn(world, count=1_280_000, dim=2048):
    seconds, peak = elsewhere(knn_of_stream, world.device, count, dim)()
    yield Measured(f"kNN, {count:,} features of {dim:,}, 1,000 queries", f"{seconds:.0f} s")
    yield Measured("... peak memory above the framework's", f"{peak:.0f} MiB")


def knn_of_stream(device, count, dim, chunk=512):
    """kNN of 1,000 queries among made features that nobody holds: seconds, peak in MiB."""
    made = torch.randn(2 * chunk, dim, device=device)
    labels = torch.arange(chunk) % 1000
    chunks = ((made[i % chunk:][:chunk], labels) for i in range(count // chunk))
    queries = torch.randn(1000, dim, device=device)
    before = memory(device, peak=False)
    start = time.perf_counter()
    knn_accuracy(chunks, queries, labels[:1].expand(1000), 1000)
    return time.perf_counter() - start, memory(device, peak=True) - before


def memory(device, peak):
    """MiB that this process holds, or has held at most: of the GPU, else what Linux counts."""
    if device.type == "cuda":
        used = torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
        return used / 2 ** 20
    name = "VmHWM" if peak else "VmRSS"
    status = Path("/proc/self/status").read_text()     # getrusage would count the parent's peak
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024


def generation(world, count=32, steps=20):
    pipe = load_pipeline("mini", torch.float32, world.device)
    images = random_images(count)

    def batched():
        c = torch.cat([c for _, _, c in encode_all(pipe, images, range(count))])
        generate(pipe, 100, c, range(count), steps=steps, guidance=2.0, size=32)

    def single():
        for i in range(count):
            pipe(image=images.pil(i), noise_level=100, prompt="", num_inference_steps=steps,
                 guidance_scale=2.0, generator=torch.Generator().manual_seed(i))
    yield Timed(f"generation, the 32 x 32 miniature, {steps} steps, guidance 2, batch {count}",
                batched, count)
    yield Timed("... one image at a time", single, count)


PARTS = {part.__name__: part for part in (
    steps, large_steps, augmentation, files, loader, knn, size, generation)}


# -------------------------------------------------------------------------------------------- main
def print_rows(rows, windows, synchronize):
    rows = list(rows)
    for row in rows:
        if isinstance(row, Measured):
            say(f"| {row.name} | {row.value} | |")
    timed = [row for row in rows if isinstance(row, Timed)]
    seconds = seconds_per_image(timed, windows, synchronize)
    for row in timed:
        one = seconds[row.name]
        say(f"| {row.name} | {1 / one:,.1f} | {one / seconds[timed[0].name]:.2f} |")


def main():
    parser = Parser("Measures this machine.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(PARTS)} (default: all)")
    parser.add_argument("--windows", type=whole(3), default=3, help="calls; their median counts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    args = parser.parse_args()
    unknown = sorted(set(args.parts) - PARTS.keys())
    if unknown:
        raise UserError(f"{', '.join(unknown)}: the parts are {', '.join(PARTS)}")
    world = setup(args.device)
    threads = torch.get_num_threads()
    say(f"{world.device}, {threads} threads, {world.dtype}, PyTorch {torch.__version__}; "
        f"medians of {args.windows}\n")
    say("| what | images/s | time per image over the first row's |\n| --- | --- | --- |")
    synchronize = getattr(torch, world.device.type).synchronize
    for name in args.parts or PARTS:
        torch.set_num_threads(threads)             # files takes one
        print_rows(PARTS[name](world), args.windows, synchronize)


if __name__ == "__main__":
    script(main)
