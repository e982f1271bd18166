"""generate_views.py, on a tiny pipeline of the real classes with random weights: formulas, files,
restarts, trouble."""

import argparse
import doctest
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image

import generate_views
import genview
import support.data
import support.files
import support.world
from support.world import UserError

ROOT = Path(__file__).resolve().parents[1]

STEPS = 4


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """So small a model loses a factor of ten to threads that wait for each other on a busy
    machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A tiny pipeline, 24 images, and their views made in one go with batches of four."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_pipeline(folder / "model")
    tiny.save_images(folder / "images")
    assert run(folder, "views", "--batch-size", "4") == 0
    return folder


def command(world, views, *more, images="images"):
    """The arguments of a run; a flag in `more` overrides the same one before it."""
    return [
        "--dataset",
        "folder",
        "--data-dir",
        str(world / images),
        "--views-dir",
        str(world / views),
        "--model",
        str(world / "model"),
        "--steps",
        str(STEPS),
        "--device",
        "cpu",
        *more,
    ]


def run(world, views, *more, **options):
    """Runs main in this process, as the command line does. Returns the exit status."""
    argv, sys.argv = sys.argv, ["generate_views.py", *command(world, views, *more, **options)]
    try:
        support.world.script(generate_views.main)
        return 0
    except SystemExit as end:
        return end.code
    finally:
        sys.argv = argv


def environment():
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def read_manifest(folder):
    """{source: its line}, of the whole lines."""
    text = (folder / "manifest.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines() if line.endswith("}")]
    return {line["source"]: line for line in lines}


def pictures(folder):
    return {
        str(p.relative_to(folder)): np.array(Image.open(p)).astype(int)
        for p in sorted(folder.rglob("*.png"))
    }


def assert_same_views(folder, reference, names=None):
    """The same pictures, every pixel within 2 of 255 (rounding), and the same lines in the
    manifest, in any order."""
    ours, theirs = pictures(folder), pictures(reference)
    names = theirs.keys() if names is None else names
    assert sorted(ours) == sorted(names)
    assert max(np.abs(ours[name] - theirs[name]).max() for name in names) <= 2
    ours, theirs = read_manifest(folder), read_manifest(reference)
    assert all(ours[source] == theirs[source] for source in ours) and len(ours) == len(names)


def snapshot(folder):
    return {p: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.rglob("*") if p.is_file()}


def only_line(text):
    lines = [line for line in text.splitlines() if line.strip()]
    assert len(lines) == 1, text
    return lines[0]


# ------------------------------------------------------------------------------------- the formulas


def test_doctests():
    assert doctest.testmod(generate_views).failed == 0


def test_foreground_proportion_matches_a_plain_loop():
    rng = np.random.default_rng(0)
    tokens, v1, alpha = (
        rng.normal(size=(5, 9, 7)).astype(np.float32),
        rng.normal(size=7).astype(np.float32),
        0.4,
    )
    expected = [
        sum(sum(x * y for x, y in zip(token, v1, strict=True)) > alpha for token in image) / 9
        for image in tokens.tolist()
    ]
    p = generate_views.foreground_proportion(torch.tensor(tokens), torch.tensor(v1), alpha)
    assert p.tolist() == pytest.approx(expected) and p.dtype == torch.float32
    assert generate_views.foreground_proportion(
        torch.ones(2, 3, 1), torch.ones(1), 1.0
    ).tolist() == [0, 0]  # > , not >=
    with pytest.raises(ValueError, match=r"\(5, 9, 7\), \(6,\)"):
        generate_views.foreground_proportion(torch.tensor(tokens), torch.ones(6), alpha)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_noise_level_is_exact_for_every_count_of_tokens(dtype):
    for T in (1, 5, 10, 25, 49, 50, 64, 100, 196, 256, 1000):
        counts = range(T + 1)
        expected = [
            next(100 * i for i in range(5) if 5 * count <= (i + 1) * T) for count in counts
        ]  # whole numbers
        level = generate_views.noise_level(torch.tensor(counts, dtype=dtype) / T)
        assert level.tolist() == expected and not level.is_floating_point()
    assert generate_views.noise_level(
        torch.tensor([51.2 / 256, 0.4, 0.6, 0.8], dtype=dtype)
    ).tolist() == [0, 100, 200, 300]


@pytest.mark.parametrize(
    "wrong, text",
    [([0.5, 1.5], "1.5"), ([-0.1], "-0.1"), ([float("nan")], "nan"), ([[0.5]], r"\(1, 1\)")],
)
def test_noise_level_names_what_is_wrong(wrong, text):
    with pytest.raises(ValueError, match=text):
        generate_views.noise_level(torch.tensor(wrong))


def test_embedding_noise_follows_the_equation_for_each_image_alone(world, monkeypatch):
    pipe = generate_views.load_pipeline(str(world / "model"), torch.float32, "cpu")
    args = argparse.Namespace(steps=1, guidance=2.0, size=32, save_size=32, dtype="float32")
    mean, std = torch.randn(1, 16), torch.rand(1, 16) + 0.5
    pipe.image_normalizer.mean.data, pipe.image_normalizer.std.data = mean, std
    noisy, original = [], pipe.noise_image_embeddings
    monkeypatch.setattr(
        pipe, "noise_image_embeddings", lambda **k: noisy.append(original(**k)) or noisy[-1]
    )
    c, seeds, level = torch.randn(3, 16), [5, 6, 7], 300
    generate_views.generate(pipe, args, level, c, seeds)
    for i in (2, 0):
        generate_views.generate(pipe, args, level, c[i : i + 1], seeds[i : i + 1])
    assert torch.equal(noisy[0][2], noisy[1][0]) and torch.equal(noisy[0][0], noisy[2][0])

    def bar(t):
        return np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2  # the squared-cosine schedule

    abar = np.prod(
        [1 - min(1 - bar((t + 1) / 1000) / bar(t / 1000), 0.999) for t in range(level + 1)]
    )
    for i, seed in enumerate(seeds):
        e = torch.randn(1, 16, generator=torch.Generator().manual_seed(seed))
        z = abar**0.5 * (c[i : i + 1] - mean) / std + (1 - abar) ** 0.5 * e
        assert torch.allclose(noisy[0][i : i + 1, :16], z * std + mean, atol=1e-4)
    pipe.vae.post_quant_conv.weight.data.fill_(float("nan"))  # as half precision can do
    with pytest.raises(UserError, match="--dtype float32"):
        generate_views.generate(pipe, args, level, c, seeds)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_do_not_depend_on_the_other_images_of_a_batch(world, dtype):
    pipe = generate_views.load_pipeline(str(world / "model"), dtype, "cpu")
    images = [Image.open(p) for p in sorted((world / "images").rglob("train/*/*.png"))[:8]]
    tokens, c = generate_views.encode(pipe, images)
    assert tokens.shape == (8, 64, 32) and c.shape == (8, 16)
    some, c_some = generate_views.encode(pipe, images[3:6])
    assert torch.equal(some, tokens[3:6]) and torch.equal(c_some, c[3:6])
    clip, pixels = (
        pipe.image_encoder.float(),
        pipe.feature_extractor(images=images, return_tensors="pt").pixel_values,
    )
    hidden = clip(pixels).last_hidden_state  # (8, 1 + 64, 32), not normalised
    assert torch.allclose(
        clip.vision_model.post_layernorm(hidden)[:, 1:],
        tokens.float(),
        atol=1e-5 if dtype == torch.float32 else 0.1,
    )


# ------------------------------------------------------------------------------------------ the set


def test_files_settings_and_levels(world):
    views, images = world / "views", genview.load_images("folder", world / "images", "train", 999)
    found = support.data.find_views(images, views, "folder")
    assert None not in found and all(Image.open(path).size == (32, 32) for path in found)
    manifest = read_manifest(views)
    assert sorted(manifest) == sorted(images.names)
    proportions = torch.tensor([manifest[name]["proportion"] for name in images.names])
    assert generate_views.noise_level(proportions).tolist() == [
        manifest[name]["noise_level"] for name in images.names
    ]
    assert len(set(line["noise_level"] for line in manifest.values())) > 2
    assert len(set(line["seed"] for line in manifest.values())) == 24
    assert proportions.mean().item() == pytest.approx(
        genview.FRACTION, abs=0.01
    )  # by alpha's definition
    with np.load(views / "foreground.npz", allow_pickle=False) as saved:
        assert saved["component"].shape == (32,) and str(saved["encoder"]) == str(world / "model")
    assert json.loads((views / "settings.json").read_text())["dataset"] == "folder"
    assert not list(views.rglob("*.tmp"))


def test_killed_run_goes_on_to_the_same_views(world, capsys):
    process = subprocess.Popen(
        [
            sys.executable,
            str(ROOT / "generate_views.py"),
            *command(world, "killed", "--batch-size", "1"),
        ],
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    manifest, end = world / "killed" / "manifest.jsonl", time.time() + 60
    while (
        not (manifest.exists() and manifest.read_text().count("\n") >= 2)
        and time.time() < end
        and process.poll() is None
    ):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, process.stderr.read()
    process.communicate()
    done = {
        source: (world / "killed" / source).read_bytes()
        for source in read_manifest(world / "killed")
    }
    assert 2 <= len(done) < 24
    with open(manifest, "a") as file:
        file.write('{"source": "train/cat/00')  # a line cut short
    assert run(world, "killed", "--batch-size", "5") == 0
    assert f"{24 - len(done)} views made, {len(done)} there already" in only_line(
        capsys.readouterr().out
    )
    assert all(
        (world / "killed" / source).read_bytes() == content for source, content in done.items()
    )
    assert_same_views(world / "killed", world / "views")
    lines = manifest.read_text().splitlines()
    assert sum(line.endswith("}") for line in lines) == 24 and len(lines) == 25


def test_two_ranks_make_the_same_views(world):
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc_per_node=2",
            str(ROOT / "generate_views.py"),
            *command(world, "ranks", "--batch-size", "3"),
        ],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "24 views made, 0 there already, 0 skipped" in only_line(result.stdout)
    assert_same_views(world / "ranks", world / "views")


def test_limit_and_batch_size_do_not_change_a_view(world):
    assert run(world, "few", "--limit", "5", "--batch-size", "2") == 0
    places = torch.linspace(0, 23, 5).round().long().tolist()
    names = sorted(pictures(world / "views"))
    assert_same_views(world / "few", world / "views", [names[i] for i in places])


def test_a_second_run_makes_nothing_and_a_lost_view_is_made_again(world, capsys):
    before = snapshot(world / "views")
    assert run(world, "views") == 0
    assert "0 views made, 24 there already, 0 skipped" in only_line(capsys.readouterr().out)
    assert snapshot(world / "views") == before
    shutil.copytree(world / "views", world / "lost")
    (world / "lost" / "train" / "cat" / "0003.png").unlink()
    assert run(world, "lost", "--batch-size", "2") == 0
    assert "1 views made, 23 there already" in only_line(capsys.readouterr().out)
    assert_same_views(world / "lost", world / "views")


def test_release_component_fixed_noise_and_larger_views(world):
    vector = np.random.default_rng(1).normal(size=(32, 1)).astype(np.float32)
    np.save(world / "pca_vectors.npy", vector)
    more = [
        "--component",
        str(world / "pca_vectors.npy"),
        "--noise",
        "250",
        "--save-size",
        "96",
        "--limit",
        "3",
    ]
    assert run(world, "release", *more) == 0
    component, _ = support.files.read_component(world / "release" / "foreground.npz")
    unit = torch.tensor(vector[:, 0] / np.linalg.norm(vector))
    assert torch.allclose(component, unit, atol=1e-5) or torch.allclose(component, -unit, atol=1e-5)
    lines = read_manifest(world / "release")
    assert {line["noise_level"] for line in lines.values()} == {250}
    assert all(
        Image.open((world / "release" / name).with_suffix(".jpg")).size == (96, 96)
        for name in lines
    )


def test_flip_takes_the_other_side(world):
    pipe = generate_views.load_pipeline(str(world / "model"), torch.float32, "cpu")
    images = genview.load_images("folder", world / "images", "train", 999)
    args = argparse.Namespace(component=None, flip_foreground=False, fit_images=10, data_dir="")
    v1, _ = generate_views.find_foreground(args, pipe, images)
    flipped, alpha = generate_views.find_foreground(
        argparse.Namespace(**vars(args) | {"flip_foreground": True}), pipe, images
    )
    assert torch.equal(flipped, -v1)
    tokens = torch.cat(
        [
            t
            for _, t, _ in generate_views.encode_all(
                pipe, images, support.data.spaced(24, 10).tolist()
            )
        ]
    )
    assert generate_views.foreground_proportion(
        tokens, flipped, alpha
    ).mean().item() == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("place, warned", [(3.0, True), (0.0, False)])
def test_maps_that_show_only_the_place_are_named(monkeypatch, capsys, place, warned):
    tokens = place * torch.randn(1, 16, 8) + torch.randn(40, 16, 8)
    monkeypatch.setattr(
        generate_views, "encode_all", lambda *_: [(None, part, None) for part in tokens.split(8)]
    )
    pipe = argparse.Namespace(
        image_encoder=argparse.Namespace(config=argparse.Namespace(hidden_size=8))
    )
    images = support.data.Images(["x"] * 40, torch.zeros(40), 1)
    args = argparse.Namespace(component=None, flip_foreground=False, fit_images=40, data_dir="")
    generate_views.find_foreground(args, pipe, images)
    assert ("depend on the place" in capsys.readouterr().out) == warned


def test_preview_draws_one_picture_and_nothing_else(world, capsys):
    assert run(world, "looked", "--preview", "3", "--batch-size", "2") == 0
    path = world / "looked" / "preview.png"
    assert str(path) in only_line(capsys.readouterr().out)
    assert [p.name for p in (world / "looked").iterdir()] == ["preview.png"]
    assert Image.open(path).size == (76 + 3 * (128 + 6), 7 * (128 + 6) + 34)
    assert run(world, "looked", "--limit", "2") == 0  # and the real run may follow


# ------------------------------------------------------------------------------------------ trouble


def test_a_truncated_image_is_named_skipped_and_counted(world, capsys):
    shutil.copytree(world / "images", world / "broken")
    victim = world / "broken" / "train" / "dog" / "0004.png"
    victim.write_bytes(victim.read_bytes()[:200])
    assert run(world, "mended", "--limit", "24", images="broken") == 0
    out, err = capsys.readouterr()
    assert "23 views made, 0 there already, 1 skipped" in only_line(out)
    assert [line for line in err.splitlines() if "skipped" in line][0].count(str(victim)) == 1
    assert "--skip-bad" not in err and len(pictures(world / "mended")) == 23


@pytest.mark.parametrize(
    "more, texts",
    [
        (["--steps", "3"], ["steps is 4 there and 3 here", "--views-dir"]),
        (["--noise", "7"], ["noise is adaptive there and 7 here"]),
        (
            ["--model", "no/such/model/anywhere"],
            ["--model no/such/model/anywhere", "hf download", "--dataset shapes"],
        ),
        (["--model", "{world}/images"], ["--model", "StableUnCLIPImg2ImgPipeline"]),
        (
            ["--component", "{world}/wrong.npy", "--views-dir", "{world}/new"],
            ["wrong.npy", "31", "32"],
        ),
        (["--views-dir", "{world}/images"], ["is not empty", "--views-dir"]),
        (["--size", "33"], ["--size 33"]),
        (["--data-dir", "{world}/nowhere"], ["nowhere", "train/"]),
    ],
)
def test_trouble_is_one_line_and_changes_nothing(world, capsys, monkeypatch, more, texts):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    np.save(world / "wrong.npy", np.ones((31, 1), np.float32))
    before = snapshot(world)
    assert run(world, "views", *[text.format(world=world) for text in more]) == 2
    line = only_line(capsys.readouterr().err)
    assert line.startswith("error: ") and all(text in line for text in texts), line
    assert snapshot(world) == before


def test_two_sources_of_one_view_are_refused(world, capsys):
    shutil.copytree(world / "images", world / "twins")
    Image.open(world / "twins" / "train" / "cat" / "0001.png").save(
        world / "twins" / "train" / "cat" / "0001.jpg"
    )
    assert run(world, "twins-views", images="twins") == 2
    line = only_line(capsys.readouterr().err)
    assert (
        "train/cat/0001.jpg" in line
        and "train/cat/0001.png" in line
        and not (world / "twins-views").exists()
    )


def room_for(most, monkeypatch):
    """Generation with memory for so many images at once. Returns the sizes of its batches, as they
    come."""
    sizes = []

    def generate(pipe, args, level, embeddings, seeds):
        sizes.append(len(seeds))
        if len(seeds) > most:
            raise torch.OutOfMemoryError("no")
        return [(c.item(), s) for c, s in zip(embeddings, seeds, strict=True)]

    monkeypatch.setattr(generate_views, "generate", generate)
    return sizes


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, capsys):
    sizes = room_for(2, monkeypatch)
    args = argparse.Namespace(batch_size=8, largest=8)
    assert generate_views.generate_all(None, args, 0, torch.arange(7), list(range(7))) == [
        (i, i) for i in range(7)
    ]
    assert sizes == [7, 4, 2, 2, 2, 1] and args.batch_size == 2
    assert "at most 2 images" in capsys.readouterr().out
    monkeypatch.setattr(
        generate_views,
        "generate",
        lambda *_: sizes[0] and (_ for _ in ()).throw(torch.OutOfMemoryError("no")),
    )
    with pytest.raises(UserError, match="--size"):
        generate_views.generate_all(None, args, 0, torch.arange(7), list(range(7)))


def test_the_largest_batch_that_fits_is_found(monkeypatch, capsys):
    sizes = room_for(9, monkeypatch)
    args = argparse.Namespace(batch_size=2, largest=64)
    assert generate_views.generate_all(None, args, 0, torch.arange(40), list(range(40))) == [
        (i, i) for i in range(40)
    ]
    assert sizes == [2, 4, 8, 16, 8, 8, 8, 2] and (args.batch_size, args.largest) == (8, 8)
    assert "at most 8 images" in capsys.readouterr().out


def test_another_solver_draws_other_pictures_of_the_same_noise(world, capsys):
    assert run(world, "dpm", "--solver", "dpm", "--limit", "4") == 0
    theirs = {
        p.name: np.asarray(Image.open(p)).astype(int) for p in (world / "views").rglob("*.png")
    }
    ours = [
        (np.asarray(Image.open(p)).astype(int), theirs[p.name])
        for p in (world / "dpm").rglob("*.png")
    ]
    assert len(ours) == 4 and all((a != b).any() for a, b in ours)
    assert run(world, "dpm", "--limit", "4") == 2 and "solver is dpm" in capsys.readouterr().err


def test_trouble_of_the_writing_thread_ends_the_run(world, monkeypatch, capsys):
    def full(*_, **__):
        raise UserError("no space left")

    monkeypatch.setattr(generate_views.ViewFolder, "write", full)
    assert run(world, "full", "--limit", "9", "--batch-size", "2") == 2
    assert "no space left" in capsys.readouterr().err
