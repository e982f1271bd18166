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
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

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
def pictures(n, size=32):
    shape, draw = (n, 3, size, size), step_generator(0)
    pixels = torch.randint(256, shape, dtype=torch.uint8, generator=draw)
    return Images([f"train/{i:05d}" for i in range(n)], torch.arange(n) % 10, 10, pixels)


def training(world, batch=256, n=50_000, quality_of=None, size=32, arch="resnet18"):
    """MoCo v2 on n images. Returns method, optimizer, batches and a function, its training step."""
    args = parse_args(argv=["--dataset=cifar10", "--views-dir=none", "--queue=4096",
                            f"--image-size={size}", f"--arch={arch}", f"--batch-size={batch}",
                            "--output-dir=runs/bench"])
    method = MoCoV2(args).to(world.device, memory_format=torch.channels_last).train()
    optimizer = make_optimizer(method, args.optimizer, args.weight_decay)
    images = pictures(n, size)
    loader = PairLoader(images, images.pixels.flip(0), augmentations(args), size, batch, 0, world)
    batches = (views for epoch in itertools.count() for views in loader.epoch(epoch))

    def step(views=None):
        train_step(method, optimizer, views or next(batches), quality_of, 1.0, 0.0, world)
    return method, optimizer, batches, step


kept_training = functools.cache(training)


def plain_step(world, batch=256, n=4096):
    """A step that is not optimised for speed: torchvision's transforms image by image, float32,
    channels first, parameters averaged one by one, loss read at every step. Returns the loss."""
    method, optimizer, *_ = kept_training(world, batch, n)
    images = pictures(n)
    method.to(memory_format=torch.contiguous_format)
    transform = v2.Compose([
        v2.RandomResizedCrop(32, (0.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.4, 0.1)], 0.8), v2.RandomGrayscale(0.2),
        v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(CLIP_MEAN, CLIP_STD)])
    sources = [images.pil(i) for i in torch.randperm(n)[:batch]]
    views = [torch.stack([transform(x) for x in sources]).to(world.device) for _ in range(2)]
    for key, query in zip(method.key.parameters(), method.query.parameters(), strict=True):
        key.data = 0.99 * key.data + 0.01 * query.data
    loss, _ = method(views, None, world)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return loss.item()


def lightly_step(world):
    """A step of lightly's MoCo example with the network that training makes."""
    next(lightly_steps(world))


@functools.cache
def lightly_steps(world, batch=256, n=4096):
    """Makes a step each time that next is called."""
    from lightly.loss import NTXentLoss
    from lightly.models.utils import update_momentum
    from lightly.transforms import MoCoV2Transform
    method, optimizer, *_ = training(world, batch, n)
    method.to(memory_format=torch.contiguous_format)
    images = pictures(n)
    optimizer.param_groups[0]["lr"] = 0.06
    transform = MoCoV2Transform(input_size=32, gaussian_blur=0.0)
    samples = [(transform, images.pil(i)) for i in range(n)]
    loader = DataLoader(samples, batch, shuffle=True, drop_last=True, num_workers=2,
                        persistent_workers=True, collate_fn=transformed)
    criterion = NTXentLoss(0.1, memory_bank_size=(4096, 128))
    for views in (views for _ in itertools.count() for views in loader):
        query, key = (view.to(world.device) for view in views)
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
    return [torch.stack(views) for views in zip(*(t(x) for t, x in samples), strict=True)]


def with_quality(world, name, batch=256, **options):
    """The step with exact quality. name: mini or clip, whose weights are random: no download."""
    encoder = FrozenEncoder("mini")
    if name == "clip":
        config = transformers.CLIPVisionConfig(patch_size=32)
        encoder.model, encoder.size = transformers.CLIPVisionModel(config), 224
    encoder.to(world.device, memory_format=torch.channels_last)
    v1 = torch.randn(encoder.model.config.hidden_size, device=world.device)
    return training(world, batch, quality_of=PairQuality(encoder, v1), **options)[-1]


def steps(world):
    """ResNet-18, CIFAR-10's sizes. Like the other parts: yields name, function and images of one
    call, or name and value."""
    method, _, batches, step = training(world)
    batch = next(batches)
    yield "step without quality, loader included", step, 256
    yield "... compute alone, the same batch again", functools.partial(step, batch), 256
    with FlopCounterMode(display=False) as counter:
        step(batch)
    a = torch.randn(4096, 4096, device=world.device, dtype=world.dtype)
    repeats = range(round(counter.get_total_flops() / 2 / 4096 ** 3))
    yield "... its multiplications as matrix products", lambda: [a @ a for _ in repeats], 256
    yield "... with exact quality (mini)", with_quality(world, "mini"), 256
    if world.device.type == "cuda":
        compiled, *_, step = training(world)
        for network in compiled.children():
            network.compile()
        yield "... compiled", step, 256
    single = world._replace(dtype=torch.float32)
    yield "a plain float32 loop", elsewhere(plain_step, single), 256
    if importlib.util.find_spec("lightly"):
        yield "lightly's MoCo, float32, 2 workers", elsewhere(lightly_step, single), 256


def elsewhere(function, *arguments):
    """A function that calls this one in a process of its own, always the same and without the
    settings that setup makes in this one, and returns its result."""
    pool = ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn"))
    return lambda: pool.submit(function, *arguments).result()


def large_steps(world, batch=32):
    """ImageNet's size: ResNet-50 and 224 pixels, CLIP's ViT-B/32 as E."""
    options = dict(n=2 * batch, size=224, arch="resnet50")
    yield "ResNet-50, 224 pixels, without quality", training(world, batch, **options)[-1], batch
    yield "... with exact quality (CLIP)", with_quality(world, "clip", batch, **options), batch


def augmentation(world):
    *_, batches, _ = training(world, n=10_000)
    yield "augmentation, two views of an image each", lambda: next(batches), 256


def jpegs(n):
    """A temporary folder with n images of 500 x 375 and n views of 512 x 512."""
    folder, draw = tempfile.TemporaryDirectory(), step_generator(0)
    for i in range(n):
        coarse = torch.rand(1, 3, 48, 64, generator=draw)
        x = F.interpolate(coarse, size=(375, 500), mode="bicubic").clamp(0, 1)[0]
        for kind, y in (("image", x), ("view", F.interpolate(x[None], size=(512, 512))[0])):
            v2.functional.to_pil_image(y).save(f"{folder.name}/{kind}-{i}.jpg", quality=90)
    names = [f"image-{i}.jpg" for i in range(n)]
    images = Images(names, torch.zeros(n), 1, None, Path(folder.name))
    return folder, images, [Path(folder.name, f"view-{i}.jpg") for i in range(n)]


def files(world, n=64):
    """Two crops of 224 pixels of each of n JPEG files, in one thread."""
    folder, images, views = jpegs(n)
    usual = v2.Compose([v2.RandomResizedCrop(224, (0.2, 1)), v2.PILToTensor()])

    def here(views):
        pairs = CropsOfFiles(images, views, [Augmentation()] * 2, [224, 224], 0)
        return lambda: [pairs[0, i, False] for i in range(n)]

    def decode(kind, i):
        return Image.open(f"{folder.name}/{kind}-{i}.jpg").convert("RGB")

    def pillow(*kinds):
        for i in range(n):
            both = [decode(kind, i) for kind in kinds]
            [usual(picture) for picture in (both * 2)[:2]]
    torch.set_num_threads(1)
    yield "files: torchvision's transforms of Pillow, image twice", lambda: pillow("image"), n
    yield "... here", here(None), n
    yield "torchvision's, image and view of 512 x 512", lambda: pillow("image", "view"), n
    yield "... here, image and view", here(views), n
    yield "decoding one image alone", lambda: [decode("image", i) for i in range(n)], n


def loader(world, n=256, batch=32):
    """Values of two epochs of MoCo v2 on JPEG files at 224 pixels, by ResNet-18."""
    folder, images, views = jpegs(n)
    method, optimizer, *_ = training(world, batch, n=batch, size=224)
    workers = torch.get_num_threads()
    loader = PairLoader(images, views, [Augmentation()] * 2, 224, batch, 0, world, workers)
    waits, times = [], []
    for epoch in range(2):
        batches = loader.epoch(epoch)
        for _ in range(loader.steps):
            start = time.perf_counter()
            pair = next(batches)
            waits.append(time.perf_counter() - start)
            train_step(method, optimizer, pair, None, 1.0, 0.0, world)
            times.append(time.perf_counter() - start)
    once = statistics.median(times)
    kept = slice(2, None)                          # in the first two the workers start
    yield (f"loader of files, {workers} workers: share of a step spent waiting",
           f"{100 * sum(waits[kept]) / sum(times[kept]):.1f}%")
    yield "... gap between two epochs, in steps", f"{waits[loader.steps] / once:.2f}"


def stream(device, count, dim, chunk=512):
    """kNN of 1,000 queries among made features that nobody holds: seconds, peak in MiB."""
    made = torch.randn(2 * chunk, dim, device=device)
    labels = torch.arange(chunk) % 1000
    chunks = ((made[i % chunk:][:chunk], labels) for i in range(count // chunk))
    start, before = time.perf_counter(), memory(device, peak=False)
    knn_accuracy(chunks, torch.randn(1000, dim, device=device), labels[:1].expand(1000), 1000)
    return time.perf_counter() - start, memory(device, peak=True) - before


def memory(device, peak):
    """MiB that this process holds, or has held at most: of the GPU, else what Linux counts."""
    if device.type == "cuda":
        now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
        return (most if peak else now) / 2 ** 20
    status = Path("/proc/self/status").read_text()     # getrusage would count the parent's peak
    return int(re.search(rf"{'VmHWM' if peak else 'VmRSS'}:\s+(\d+)", status)[1]) / 1024


def knn(world, count=1_280_000, dim=2048):
    seconds, peak = elsewhere(stream, world.device, count, dim)()
    yield f"kNN, {count:,} features of {dim:,}, 1,000 queries", f"{seconds:.0f} s"
    yield "... peak memory above the framework's", f"{peak:.0f} MiB"


def size(world):
    sizes = [(256, n) for n in (1000, 2000, 4000, 8000)]      # the speed should not depend on these
    for batch, n in sizes + [(batch, 8000) for batch in (64, 128, 512, 1024)]:
        yield f"step, {n:,} images, batch {batch}", training(world, batch, n)[-1], batch


def generation(world, n=32):
    pipe, images = load_pipeline("mini", torch.float32, world.device), pictures(n)

    def batched():
        c = torch.cat([c for *_, c in encode_all(pipe, images, range(n))])
        generate(pipe, 100, c, range(n), steps=20, guidance=2.0, size=32)

    def single():
        for i in range(n):
            pipe(image=images.pil(i), noise_level=100, prompt="", num_inference_steps=20,
                 guidance_scale=2.0, generator=torch.Generator().manual_seed(i))
    yield f"generation, the 32 x 32 miniature, 20 steps, guidance 2, batch {n}", batched, n
    yield "... one image at a time", single, n


def main():
    parts = {part.__name__: part for part in (
        steps, large_steps, augmentation, files, loader, knn, size, generation)}
    parser = Parser("Measures this machine.")
    parser.add_argument("parts", nargs="*", help=f"of {', '.join(parts)} (default: all)")
    parser.add_argument("--windows", type=whole(3), default=3, help="calls; their median counts")
    parser.add_argument("--device", help="cuda, mps or cpu (default: the first available)")
    args = parser.parse_args()
    if unknown := set(args.parts) - parts.keys():
        raise UserError(f"{', '.join(sorted(unknown))}: the parts are {', '.join(parts)}")
    world = setup(args.device)
    threads = torch.get_num_threads()
    say(f"{world.device}, {threads} threads, {world.dtype}, "
        f"PyTorch {torch.__version__}; medians of {args.windows}\n\n"
        "| what | images/s | time per image over the first row's |\n| --- | --- | --- |")
    sync = getattr(torch, world.device.type).synchronize
    for part in args.parts or parts:
        torch.set_num_threads(threads)
        rows = list(parts[part](world))
        for name, value in (row for row in rows if len(row) == 2):
            say(f"| {name} | {value} | |")
        seconds = take_turns([row for row in rows if len(row) == 3], args.windows, sync)
        for name, value in seconds.items():
            say(f"| {name} | {1 / value:,.1f} | {value / next(iter(seconds.values())):.2f} |")


if __name__ == "__main__":
    script(main)
