"""generate_views.py, on a tiny pipeline of the real classes with random weights: formulas, files,
restarts, errors."""
import json
import re
import shutil
import signal
import subprocess
import sys
from argparse import Namespace
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import torch
from PIL import Image
from running import CPU, before_call, call, die, end, refusal, start
from torch.backends.cuda import flash_sdp_enabled
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader

import generate_views as gv
from genview import FRACTION, load_images
from support import data
from support.command_line import UserError
from support.data import Images, spaced
from support.files import read_component
from support.views import find_views

WHOLE = re.compile("}$")                           # a line of a manifest that was not cut short


@pytest.fixture(scope="module")
def world(tmp_path_factory, image_folder, pipeline_folder):
    """A tiny pipeline, 24 images, and their views made in one go with batches of four."""
    folder = tmp_path_factory.mktemp("world")
    (folder / "model").symlink_to(pipeline_folder)
    (folder / "images").symlink_to(image_folder)
    run(folder, "views", "--batch-size", 4)
    return folder


@pytest.fixture(scope="module", autouse=True)
def by_torchrun(world, tmp_path_factory):
    """torchrun's two processes, which need ten seconds: they work while the tests go on. And the
    folder of their views."""
    views = tmp_path_factory.mktemp("ranks")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
               gv.__file__, *flags_of(world, views), "--batch-size=3"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:
        yield process, views
        process.terminate()                        # where its test was not chosen


@pytest.fixture(scope="module")
def pipe(world):
    return gv.load_pipeline(str(world / "model"), torch.float32, "cpu")


@pytest.fixture(scope="module")
def images(world):
    return load_images("folder", world / "images", "train", 999)


def flags_of(world, views, images="images"):
    return ["--dataset=folder", f"--data-dir={world / images}", f"--views-dir={world / views}",
            f"--model={world / 'model'}", "--steps=4", "--device=cpu"]


def run(world, views, *more, **options):
    """A flag in `more` overrides the same one before it."""
    call(gv, *flags_of(world, views, **options), *more)


def read_manifest(folder):
    """{source: its line}, of the whole lines."""
    lines = (folder / "manifest.jsonl").read_text().splitlines()
    return {line["source"]: line for line in map(json.loads, filter(WHOLE.search, lines))}


def pictures(folder):
    """{name: pixels}."""
    return {str(path.relative_to(folder)): np.array(Image.open(path)).astype(int)
            for path in sorted(folder.rglob("*.png"))}


def assert_same_views(folder, reference, names=None):
    """The same pictures, every pixel within 1 of 255 (rounding), and the same lines in the
    manifest, in any order."""
    ours, theirs = pictures(folder), pictures(reference)
    names = theirs.keys() if names is None else names
    assert sorted(ours) == sorted(names)
    assert max(np.abs(ours[name] - theirs[name]).max() for name in names) <= 1
    ours, theirs = read_manifest(folder), read_manifest(reference)
    assert all(ours[source] == theirs[source] for source in ours) and len(ours) == len(names)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def only_line(text):
    """The one line beside that which counts the images."""
    _, line = [line for line in text.splitlines() if line.strip()]
    return line


# ------------------------------------------------------------------------------------- the formulas
def test_foreground_proportion_matches_a_plain_loop():
    rng, alpha = np.random.default_rng(0), 0.4
    tokens, v1 = rng.normal(size=(5, 9, 7)).astype("float32"), rng.normal(size=7).astype("float32")
    expected = [sum(sum(x * y for x, y in zip(token, v1, strict=True)) > alpha for token in image)
                / 9 for image in tokens.tolist()]
    p = gv.foreground_proportion(torch.tensor(tokens), torch.tensor(v1), alpha)
    assert p.tolist() == pytest.approx(expected) and p.dtype == torch.float32
    equal = gv.foreground_proportion(torch.ones(2, 3, 1), torch.ones(1), 1.0)         # > , not >=
    assert equal.tolist() == [0, 0]
    with pytest.raises(ValueError, match=r"\(5, 9, 7\), \(6,\)"):
        gv.foreground_proportion(torch.tensor(tokens), torch.ones(6), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_level_is_exact_for_every_count_of_tokens(dtype):
    for T in (1, 5, 10, 25, 49, 50, 64, 100, 196, 256, 1000):
        counts = range(T + 1)                      # whole numbers have no rounding
        expected = [next(100 * i for i in range(5) if 5 * n <= (i + 1) * T) for n in counts]
        level = gv.noise_level(torch.tensor(counts, dtype=dtype) / T)
        assert level.tolist() == expected and not level.is_floating_point()
    borders = torch.tensor([51.2 / 256, 0.4, 0.6, 0.8], dtype=dtype)
    assert gv.noise_level(borders).tolist() == [0, 100, 200, 300]


@pytest.mark.parametrize("wrong, text", [([0.5, 1.5], "1.5"), ([-0.1], "-0.1"),
                                         ([float("nan")], "nan"), ([[0.5]], r"\(1, 1\)")])
def test_noise_level_names_what_is_wrong(wrong, text):
    with pytest.raises(ValueError, match=text):
        gv.noise_level(torch.tensor(wrong))


def test_embedding_noise_follows_the_equation_for_each_image_alone(world, monkeypatch):
    pipe = gv.load_pipeline(str(world / "model"), torch.float32, "cpu")          # to be changed
    settings = dict(steps=1, guidance=2.0, size=32)
    mean, std = torch.randn(1, 16), torch.rand(1, 16) + 0.5
    pipe.image_normalizer.mean.data, pipe.image_normalizer.std.data = mean, std
    noisy, original = [], pipe.noise_image_embeddings
    monkeypatch.setattr(pipe, "noise_image_embeddings",
                        lambda **options: noisy.append(original(**options)) or noisy[-1])
    c, seeds, level = torch.randn(3, 16), [5, 6, 7], 300
    for part in (slice(3), slice(2, 3), slice(1)):
        gv.generate(pipe, level, c[part], seeds[part], **settings)
    assert torch.equal(noisy[0][2], noisy[1][0]) and torch.equal(noisy[0][0], noisy[2][0])
    t = np.arange(level + 2) / 1000                # the squared-cosine schedule
    bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
    abar = np.prod(1 - np.minimum(1 - bar[1:] / bar[:-1], 0.999))
    e = torch.cat([torch.randn(1, 16, generator=torch.Generator().manual_seed(s)) for s in seeds])
    z = abar ** 0.5 * (c - mean) / std + (1 - abar) ** 0.5 * e
    assert torch.allclose(noisy[0][:3, :16], (z * std + mean).float(), atol=1e-4)


@pytest.mark.parametrize("dtype, advice", [
    (torch.bfloat16, "in bfloat16; --precision float32 helps"),
    (torch.float32, "in float32; the model is damaged")])
def test_numbers_that_are_not_finite_are_named_with_what_can_help(world, dtype, advice):
    pipe = gv.load_pipeline(str(world / "model"), dtype, "cpu")
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))         # as half precision can do
    with pytest.raises(UserError, match=advice):
        gv.generate(pipe, 300, torch.randn(1, 16, dtype=dtype), [5], steps=1, guidance=2.0, size=32)


@pytest.mark.parametrize("dtype, atol", [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_tokens_do_not_depend_on_the_other_images_of_a_batch(world, images, dtype, atol):
    pipe = gv.load_pipeline(str(world / "model"), dtype, "cpu")
    batch = [images.pil(i) for i in range(8)]
    seen = [gv.clip_pixels(picture, pipe.feature_extractor) for picture in batch]
    tokens, c = gv.encode(pipe, seen)
    assert tokens.shape == (8, 64, 32) and c.shape == (8, 16)
    some, c_some = gv.encode(pipe, seen[3:6])
    assert torch.equal(some, tokens[3:6]) and torch.equal(c_some, c[3:6])
    pixels, clip = pipe.feature_extractor(images=batch, return_tensors="pt"), pipe.image_encoder
    hidden = clip.float()(**pixels).last_hidden_state                # (8, 1 + 64, 32), before norm
    expected = clip.vision_model.post_layernorm(hidden)[:, 1:]
    assert torch.allclose(expected, tokens.float(), atol=atol)


def test_workers_read_what_one_process_reads(world, pipe, tmp_path, monkeypatch):
    """Pictures of several sizes, one of them damaged: the same numbers in the same order."""
    folder = tmp_path / "images"
    shutil.copytree(world / "images", folder)
    paths = sorted((folder / "train").rglob("*.png"))
    Image.open(paths[1]).resize((50, 41)).save(paths[1])
    paths[4].write_bytes(b"no picture")
    images = load_images("folder", folder, "train", 999)
    alone_errors, errors = [], []
    alone = list(gv.encode_all(pipe, images, range(0, 24, 2), alone_errors.append))
    loaders = []
    monkeypatch.setattr(data, "FEW", 3)
    monkeypatch.setattr(gv, "cores_of_process", lambda: 2)
    monkeypatch.setattr(data, "DataLoader", lambda files, **options: loaders.append(options) or
                        DataLoader(files, **options))
    parts = list(gv.encode_all(pipe, images, range(0, 24, 2), errors.append))
    assert len(loaders) == 1 and loaders[0]["num_workers"] == 2
    assert [part[0] for part in parts] == [[0, 2, 6, 8, 10, 12, 14], [16, 18, 20, 22]]
    assert errors == alone_errors and len(errors) == 1 and str(paths[4]) in errors[0]
    for part, expected in zip(parts, alone, strict=True):
        assert part[0] == expected[0]
        assert torch.equal(part[1], expected[1]) and torch.equal(part[2], expected[2])


def test_small_pictures_are_decoded_at_once_and_large_ones_one_by_one(world, pipe, tmp_path):
    """The same pictures both ways. Large: of a model for 2 * 40 pixels."""
    shutil.copytree(world / "model", tmp_path / "large")
    config = tmp_path / "large/unet/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": 40}))
    large = gv.load_pipeline(str(tmp_path / "large"), torch.float32, "cpu")
    c = torch.randn(5, 16)
    made = []
    for model, batches in [(pipe, [5]), (large, [1] * 5)]:
        seen = []
        hook = model.vae.decoder.register_forward_pre_hook(lambda _, z, seen=seen: seen.append(z))
        made.append(gv.generate(model, 100, c, range(5), steps=2, guidance=2.0, size=32))
        hook.remove()
        assert [len(z) for z, in seen] == batches
    assert (made[0].int() - made[1].int()).abs().max() <= 1


def test_attention_is_fused_meanwhile(pipe, images):
    """setup turns this off for training, which stays as it is."""
    seen = []
    hooks = [model.register_forward_pre_hook(lambda *_: seen.append(flash_sdp_enabled()))
             for model in (pipe.image_encoder, pipe.unet)]
    with sdpa_kernel(SDPBackend.MATH):             # as setup has it
        _, c = gv.encode(pipe, [gv.clip_pixels(images.pil(0), pipe.feature_extractor)])
        gv.generate(pipe, 0, c, [0], steps=1, guidance=1.0, size=32)
        assert not flash_sdp_enabled()
    for hook in hooks:
        hook.remove()
    assert seen == [True, True]


# ------------------------------------------------------------------------------------------ the set
def test_files_settings_and_levels(world, images):
    views = world / "views"
    found = find_views(images, views, "folder")
    assert None not in found and all(Image.open(path).size == (32, 32) for path in found)
    manifest = read_manifest(views)
    assert sorted(manifest) == sorted(images.names)
    proportions, levels = (torch.tensor([manifest[name][key] for name in images.names])
                           for key in ("proportion", "noise_level"))
    assert torch.equal(gv.noise_level(proportions), levels) and len(levels.unique()) > 2
    assert len({line["seed"] for line in manifest.values()}) == 24
    assert proportions.mean().item() == pytest.approx(FRACTION, abs=0.01)   # by alpha's definition
    with np.load(views / "foreground.npz", allow_pickle=False) as saved:
        assert saved["component"].shape == (32,) and str(saved["encoder"]) == str(world / "model")
    assert json.loads((views / "settings.json").read_text())["dataset"] == "folder"
    assert not list(views.rglob("*.tmp"))


def test_a_killed_run_goes_on_to_the_same_views(world, capsys):
    """With batches of another size, and after a line of the manifest that was cut short."""
    killed = world / "killed"
    work = before_call(5, die, lambda: run(world, "killed", "--batch-size", 1), gv,
                       "generate")
    assert end(start(work)) == -signal.SIGKILL
    done = {source: (killed / source).read_bytes() for source in read_manifest(killed)}
    assert 2 <= len(done) < 24
    with open(killed / "manifest.jsonl", "a") as file:
        file.write('{"source": "train/cat/00')
    run(world, "killed", "--batch-size", "5")
    said = only_line(capsys.readouterr().out)
    assert f"{24 - len(done)} views made, {len(done)} there already" in said
    assert all((killed / source).read_bytes() == content for source, content in done.items())
    assert_same_views(killed, world / "views")
    lines = (killed / "manifest.jsonl").read_text().splitlines()
    assert len(list(filter(WHOLE.search, lines))) == 24 and len(lines) == 25


def test_damaged_settings_are_put_back_and_no_view_is_lost(world, capsys):
    """As the message says."""
    views = world / "damaged"
    shutil.copytree(world / "views", views)
    (views / "settings.json").write_text("")       # as after a power failure
    line = refusal(capsys, run, world, "damaged")
    assert "settings.json is damaged" in line and "put a copy of it back" in line
    run(world, "one", "--limit", 1)
    shutil.copy(world / "one/settings.json", views)
    run(world, "damaged")
    assert "0 views made, 24 there already" in capsys.readouterr().out
    assert_same_views(views, world / "views")


def test_a_folder_without_views_takes_other_settings(world, monkeypatch):
    """After an attempt that failed: its message may have advised them."""
    def not_finite(*_, **__):
        raise UserError("not finite")
    with monkeypatch.context() as patch:
        patch.setattr(gv, "generate", not_finite)
        with pytest.raises(UserError, match="not finite"):
            run(world, "failed", "--flip-foreground")
    assert (world / "failed/foreground.npz").exists()
    run(world, "failed")
    assert_same_views(world / "failed", world / "views")
    with pytest.raises(UserError, match="holds views of other settings: seed is 0 there and 1"):
        run(world, "failed", "--seed", 1)
    with pytest.raises(UserError, match="settings: flip_foreground is False there and True here"):
        run(world, "failed", "--flip-foreground")


def test_a_model_that_memory_does_not_hold(world, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("no")
    monkeypatch.setattr(diffusers.StableUnCLIPImg2ImgPipeline, "to", full)
    with pytest.raises(UserError, match="weights of --model .*: --precision float16, or --device"):
        gv.load_pipeline(str(world / "model"), torch.float32, "cpu")


def test_limit_and_batch_size_do_not_change_a_view(world):
    run(world, "few", "--limit", "5", "--batch-size", "2")
    names = sorted(pictures(world / "views"))
    few = [names[i] for i in torch.linspace(0, 23, 5).round().long()]
    assert_same_views(world / "few", world / "views", few)


def test_a_second_run_makes_nothing_and_a_lost_view_is_made_again(world, capsys):
    before = snapshot(world / "views")
    run(world, "views")
    assert "0 views made, 24 there already, 0 skipped" in only_line(capsys.readouterr().out)
    assert snapshot(world / "views") == before
    shutil.copytree(world / "views", world / "lost")
    (world / "lost/train/cat/0003.png").unlink()
    run(world, "lost", "--batch-size", "2")
    assert "1 views made, 23 there already" in only_line(capsys.readouterr().out)
    assert_same_views(world / "lost", world / "views")


def test_release_component_fixed_noise_and_larger_views(world, pipe, images):
    vector = np.random.default_rng(1).normal(size=(32, 1)).astype(np.float32)
    np.save(world / "pca_vectors.npy", vector)
    flags = f"--component={world}/pca_vectors.npy --noise=250 --save-size=96 --limit=3".split()
    run(world, "release", *flags)
    component, alpha = read_component(world / "release/foreground.npz")
    tokens = torch.cat([t for _, t, _ in gv.encode_all(pipe, images, list(range(24)))])
    foreground = (tokens.float() @ component > alpha).float().mean()
    assert foreground.item() == pytest.approx(FRACTION, abs=0.01)    # it brings no threshold
    unit = torch.tensor(vector[:, 0] / np.linalg.norm(vector))       # of either sign
    assert torch.allclose(component * (component @ unit).sign(), unit, atol=1e-5)
    manifest = read_manifest(world / "release")
    assert {line["noise_level"] for line in manifest.values()} == {250}
    views = [(world / "release" / name).with_suffix(".jpg") for name in manifest]
    assert [Image.open(path).size for path in views] == [(96, 96)] * 3


def test_flip_takes_the_other_side(pipe, images):
    v1, _ = gv.clip_foreground(pipe, images, 10)
    flipped, alpha = gv.clip_foreground(pipe, images, 10, flip=True)
    assert torch.equal(flipped, -v1)
    tokens = torch.cat([t for _, t, _ in gv.encode_all(pipe, images, spaced(24, 10).tolist())])
    p = gv.foreground_proportion(tokens, flipped, alpha)
    assert p.mean().item() == pytest.approx(FRACTION, abs=0.01)


@pytest.mark.parametrize("place, warned", [(3.0, True), (0.0, False)])
def test_maps_that_show_only_the_place_are_named(monkeypatch, capsys, place, warned):
    tokens = place * torch.randn(1, 16, 8) + torch.randn(40, 16, 8)
    monkeypatch.setattr(gv, "encode_all",
                        lambda *_: [(None, part, None) for part in tokens.split(8)])
    pipe = Namespace(image_encoder=Namespace(config=Namespace(hidden_size=8)))
    gv.clip_foreground(pipe, Images(["x"] * 40, torch.zeros(40), 1), 40)
    assert ("depend on the place" in capsys.readouterr().out) == warned


def test_preview_draws_one_picture_and_nothing_else(world, capsys):
    run(world, "looked", "--preview", "3", "--batch-size", "2")
    path = world / "looked/preview.png"
    assert str(path) in only_line(capsys.readouterr().out)
    assert [entry.name for entry in (world / "looked").iterdir()] == ["preview.png"]
    assert Image.open(path).size == (76 + 3 * (128 + 6), 7 * (128 + 6) + 34)
    run(world, "looked", "--limit", 2)             # and the real run may follow


def test_another_solver_draws_other_pictures_of_the_same_noise(world, capsys):
    run(world, "dpm", "--solver", "dpm", "--limit", "4")
    ours, theirs = pictures(world / "dpm"), pictures(world / "views")
    assert len(ours) == 4 and all((ours[name] != theirs[name]).any() for name in ours)
    assert "solver is dpm" in refusal(capsys, run, world, "dpm", "--limit", 4)


def test_a_pipeline_in_half_precision_and_several_files(world, tmp_path):
    """As save_pretrained(variant="fp16", max_shard_size=...) writes it."""
    import diffusers
    pipe = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(world / "model")
    pipe.save_pretrained(tmp_path / "model", variant="fp16", max_shard_size="100KB")
    assert len(list((tmp_path / "model/unet").glob("*.fp16-0*.safetensors"))) > 1
    found = gv.load_pipeline(str(tmp_path / "model"), torch.float32, "cpu")
    for one, other in zip(pipe.unet.parameters(), found.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_scheduler_says_why_it_refuses(world, monkeypatch):
    pipe = gv.load_pipeline(str(world / "model"), torch.float32, "cpu")

    def refuse(steps):
        raise ValueError(f"{steps} are not good\nfor me")
    monkeypatch.setattr(pipe.scheduler, "set_timesteps", refuse)
    with pytest.raises(UserError, match="^--steps 7 .*Scheduler: .*7 are not good for me$"):
        gv.check(pipe, 7)


# ------------------------------------------------------------------------------------------- errors
@pytest.mark.parametrize("flags, texts", [
    ("--steps=3", ["steps is 4 there and 3 here", "--views-dir"]),
    ("--noise=7", ["noise is adaptive there and 7 here"]),
    ("--model=no/such/model", ["--model no/such/model", "hf download", "--dataset shapes"]),
    ("--model={world}/images", ["--model", "StableUnCLIPImg2ImgPipeline"]),
    ("--component={world}/wrong.npy --views-dir={world}/new", ["wrong.npy", "31", "32"]),
    ("--views-dir={world}/images", ["is not empty", "--views-dir"]),
    ("--size=33", ["--size 33"]),
    ("--data-dir={world}/nowhere", ["nowhere", "train/"]),
    ("--data-dir={world}/twins --views-dir={world}/new", ["train/cat/1.jpg", "train/cat/1.png"])])
def test_refusals_are_one_line_and_change_nothing(world, capsys, flags, texts):
    """twins: two sources of one view."""
    np.save(world / "wrong.npy", np.ones((31, 1), np.float32))
    (world / "twins/train/cat").mkdir(parents=True, exist_ok=True)
    for suffix in ("jpg", "png"):
        Image.new("RGB", (32, 32)).save(world / f"twins/train/cat/1.{suffix}")
    before = snapshot(world), snapshot(world / "images")
    line = refusal(capsys, run, world, "views", *flags.format(world=world).split())
    assert all(text in line for text in texts), line
    assert (snapshot(world), snapshot(world / "images")) == before


@pytest.mark.parametrize("count, room, first, largest, sizes, kept", [
    (7, 2, 8, 8, [7, 4, 2, 2, 2, 1], 2),                             # halved until it fits
    (40, 9, 2, 64, [2, 4, 8, 16, 8, 8, 8, 2], 8)])                   # doubled while it fits
def test_the_batch_size_follows_the_memory(count, room, first, largest, sizes, kept, monkeypatch,
                                           capsys):
    """With memory for so many images at once."""
    seen = []
    generator = gv.ViewMaker(None, 1, 1.0, 8, 8, first, largest)
    monkeypatch.setattr(generator, "picture", lambda pixels: pixels)

    def generate(pipe, level, embeddings, seeds, **settings):
        seen.append(len(seeds))
        if len(seeds) > room:
            raise torch.OutOfMemoryError("no")
        return list(zip(embeddings.tolist(), seeds, strict=True))
    monkeypatch.setattr(gv, "generate", generate)
    made = generator(0, torch.arange(count), list(range(count)))
    assert made == [(i, i) for i in range(count)] and seen == sizes
    assert (generator.batch_size, generator.largest) == (kept, kept)
    assert f"at most {kept} images" in capsys.readouterr().out
    room = 0
    with pytest.raises(UserError, match="--size"):
        generator(0, torch.arange(count), list(range(count)))


def test_torchruns_two_processes_make_the_same_views(world, by_torchrun):
    """By torchrun itself, whose rendezvous forks do not have. The first one says it, for both."""
    process, views = by_torchrun
    said, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    assert "24 views made, 0 there already, 0 skipped" in only_line(said)
    assert_same_views(views, world / "views")


def test_saved_views_are_made_smaller_without_aliasing():
    maker = gv.ViewMaker(None, 1, 1.0, 64, 32, 1, 1)
    stripes = (torch.arange(64) % 2 * 255).byte().expand(3, 64, 64).contiguous()
    small = np.asarray(maker.picture(stripes)).astype(int)
    assert small.shape == (32, 32, 3) and abs(small - 127).max() < 40


@pytest.mark.parametrize("dataset, side, saved", [
    ("imagenet", 768, 512), ("folder", 256, 256), ("cifar10", 768, 32)])
def test_the_usual_size_of_saved_views(dataset, side, saved):
    pipe = SimpleNamespace(unet=SimpleNamespace(config=SimpleNamespace(sample_size=side // 8)),
                           vae_scale_factor=8)
    args = SimpleNamespace(size=None, save_size=None, dataset=dataset, batch_size=None, steps=1,
                           guidance=1.0)
    assert gv.make_view_maker(args, pipe, torch.device("cpu")).save_size == saved


def test_the_last_line_counts_the_levels_of_all_views(capsys):
    gv.report([0, 100], [400, 0], 0, 1.0, CPU)
    assert "noise levels 0: 2, 100: 1, 400: 1;" in capsys.readouterr().out
