"""cached_quality.py against E on the views themselves, for encoders that see one place at a time: there both must agree."""
import argparse
import errno
import os
import socket
import subprocess
import sys
from pathlib import Path

import cached_quality
import genview
import numpy as np
import pytest
import quality_study
import torch
import torch.multiprocessing as mp
import train_moco
from genview import Augmentation, Images, PairLoader, Trouble, World
from quality_loss import pair_quality
from train_moco import PairQuality

CPU = World(0, 1, torch.device("cpu"), torch.float32)
GEOMETRY = Augmentation(scale=(0.3, 1.0), jitter=(0, 0, 0, 0), blur=0.0)


class Patches(torch.nn.Module):
    """An encoder that sees each patch by itself: features are a random linear map of its mean colour, plus a constant."""

    def __init__(self, patch=4, features=6):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.patch, self.map = patch, torch.randn(3, features, generator=generator)
        self.constant = torch.randn(features, generator=generator)

    def forward(self, views):
        return torch.nn.functional.avg_pool2d(views, self.patch).flatten(2).mT @ self.map + self.constant


def smooth_pictures(n, size, seed=0):
    """Random blobs of colour."""
    noise = torch.rand(n, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
    return (torch.nn.functional.interpolate(noise, size=(size, size), mode="bilinear") * 255).round().byte()


def set_up(tmp_path, components=6, **more):
    images = Images([f"train/{i}" for i in range(40)], torch.zeros(40), 1, smooth_pictures(40, 28))
    args = argparse.Namespace(views_dir=str(tmp_path), dataset="cifar10", encoder="patches", image_size=28, skip_bad=False,
                              cached_components=components, output_dir=str(tmp_path / "run"), **more)
    return images, smooth_pictures(40, 28, seed=1), args


def test_cached_is_exact_where_the_encoder_sees_one_place_at_a_time(tmp_path, monkeypatch):
    """A linear map of each pixel commutes with crop and mirror: without colours both must agree, but for half precision."""
    monkeypatch.setattr(cached_quality, "GRID", 28)
    images, views, args = set_up(tmp_path)
    encoder, component = Patches(patch=1), torch.randn(6, generator=torch.Generator().manual_seed(2))
    maps = cached_quality.features_file(encoder, images, views, component, args, CPU)
    assert maps.shape == (80, 28, 28, 6) and maps.dtype == np.float16
    cached, exact = cached_quality.CachedQuality(maps, "cpu"), PairQuality(encoder, component)
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (genview.CLIP_MEAN, genview.CLIP_STD))
    seen = 0
    for _, (view1, view2), (place1, place2) in PairLoader(images, views, [GEOMETRY] * 2, 28, 40, 0, CPU).epoch(0):
        spread = [(v * std).sub(-mean).std(1).amax((1, 2)) for v in (view1, view2)]
        colourful = (spread[0] > 0.01) & (spread[1] > 0.01)        # a fifth is made grey
        seen += colourful.sum().item()
        wrong = cached(view1, view2, (place1._replace(box=place2.box), place2._replace(box=place1.box)))
        for a, b, c in zip(exact(view1, view2, None), cached(view1, view2, (place1, place2)), wrong):
            torch.testing.assert_close(a[colourful], b[colourful], atol=0.01, rtol=0)
            assert (a - c)[colourful].abs().max() > 0.1            # with the boxes of the other view it would be noticed
    assert seen > 15


def test_features_of_a_view_by_hand():
    """The whole of a picture's 2 x 2 map, and a crop of its right half."""
    maps = np.arange(8, dtype=np.float16).reshape(1, 2, 2, 2)                           # row by row, two numbers a place
    quality = cached_quality.CachedQuality(maps, "cpu")
    look = lambda *box: quality.features(genview.Place(torch.tensor([0]), torch.tensor([box])))[0].tolist()
    assert look(0.0, 0.0, 1.0, 1.0) == [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert look(0.5, 0.0, 1.0, 1.0) == [[1.5, 2.5], [2, 3], [5.5, 6.5], [6, 7]]         # at 0.625 and 0.875 of the width


def test_projection_keeps_the_attention_and_the_cosines():
    tokens = torch.randn(50, 9, 12, generator=torch.Generator().manual_seed(0)) @ torch.diag(torch.arange(12.0, 0, -1)) + 3
    v1 = torch.linalg.eigh(genview.moments(tokens)[1])[1][:, -1].float()
    basis, kept = cached_quality.fit_projection(tokens, v1 * 5, 12)
    torch.testing.assert_close(basis.T @ basis, torch.eye(12), atol=1e-5, rtol=0)
    torch.testing.assert_close(basis[:, 0], v1, atol=1e-5, rtol=0)
    assert kept == pytest.approx(1)
    exact = pair_quality(tokens[:25], tokens[25:], v1)
    for a, b in zip(exact, pair_quality(tokens[:25] @ basis, tokens[25:] @ basis, torch.eye(12)[0])):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)
    fewer, part = cached_quality.fit_projection(tokens, v1, 4)
    torch.testing.assert_close(fewer[:, 0], v1, atol=1e-5, rtol=0)
    flat = tokens.flatten(0, 1) - tokens.mean((0, 1))
    assert part == pytest.approx(((flat @ fewer).square().sum() / flat.square().sum()).item(), abs=1e-4) and 0.4 < part < 0.9


def test_the_file_is_used_again_and_tells_what_it_is_of(tmp_path):
    images, views, args = set_up(tmp_path)
    calls = []

    class Counting(Patches):
        def forward(self, x):
            calls.append(len(x))
            return super().forward(x)
    first = cached_quality.features_file(Counting(), images, views, torch.eye(6)[0], args, CPU)
    assert sum(calls) == 160                       # 80 for the projection, 80 to be kept
    assert np.array_equal(first, cached_quality.features_file(Counting(), images, views, torch.eye(6)[0], args, CPU))
    assert sum(calls) == 160 and len(list(tmp_path.glob("features-*"))) == 1
    args.encoder = "another"
    cached_quality.features_file(Counting(), images, views, torch.eye(6)[0], args, CPU)
    cached_quality.features_file(Counting(), images, views, torch.eye(6)[1], args, CPU)
    cached_quality.features_file(Counting(), images, None, torch.eye(6)[1], args, CPU)
    assert len(list(tmp_path.glob("features-*.npy"))) == 4
    more = views.clone()
    more[7] = 0                                    # a view that was made since
    cached_quality.features_file(Counting(), images, more, torch.eye(6)[1], args, CPU)
    assert len(files := list(tmp_path.glob("features-*.npy"))) == 5 and not list(tmp_path.glob("*.tmp*"))
    for file in files:
        os.truncate(file, 200)
    with pytest.raises(Trouble, match="damaged: remove it"):
        cached_quality.features_file(Counting(), images, more, torch.eye(6)[1], args, CPU)


def test_a_full_disk_is_noticed_before_the_features_are_made(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full)
    images, views, args = set_up(tmp_path)
    with pytest.raises(Trouble, match=r"No space left on device\): .* MB are free in .*, about 0.05 MB are needed"):
        cached_quality.features_file(Patches(), images, views, torch.eye(6)[0], args, CPU)
    assert not list(tmp_path.glob("features-*"))


def test_large_maps_are_averaged_down(tmp_path):
    images, views, args = set_up(tmp_path)
    maps = cached_quality.features_file(Patches(patch=2), images, views, torch.eye(6)[0], args, CPU)   # 14 x 14
    assert maps.shape == (80, 7, 7, 6)
    exact = Patches(patch=4)(genview.normalise(images.pixels[:1] / 255))[0, :, 0]
    np.testing.assert_allclose(maps[0, ..., 0].flatten(), exact.numpy(), atol=0.05)


def half(rank, port, folder):
    os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    images, views, args = set_up(Path(folder))
    cached_quality.BATCH = 8
    cached_quality.features_file(Patches(), images, views, torch.eye(6)[0], args, genview.setup("cpu")._replace(dtype=torch.float32))
    torch.distributed.destroy_process_group()


def test_two_processes_write_the_file_of_one(tmp_path):
    (tmp_path / "two").mkdir()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(half, (port, str(tmp_path / "two")), nprocs=2)
    images, views, args = set_up(tmp_path)
    one = cached_quality.features_file(Patches(), images, views, torch.eye(6)[0], args, CPU)
    two, = (tmp_path / "two").glob("features-*.npy")
    np.testing.assert_allclose(one, np.load(two), atol=2e-3)
    assert not list((tmp_path / "two").glob("*.tmp*"))


@pytest.mark.parametrize("size", [32, 80])
def test_training_with_cached_quality(size, tmp_path, encoder_folder, capsys):
    """Small images from memory and large ones from files, of which one has no view; a second run uses the features again."""
    import tiny
    tiny.save_images(tmp_path / "data", size=size)
    tiny.save_images(tmp_path / "views", size=size, seed=1)
    next((tmp_path / "views" / "train" / "cat").glob("*")).unlink()
    flags = f"""--dataset folder --data-dir {tmp_path}/data --views-dir {tmp_path}/views --encoder {encoder_folder} --device cpu
        --arch resnet10_narrow --quality cached --cached-components 16 --image-size {size} --batch-size 8 --queue 16 --epochs 1
        --start-batches 1 --workers 1""".split()
    for run in ("a", "b"):
        train_moco.train(train_moco.parse_args(argv=[*flags, "--output-dir", str(tmp_path / run)]), genview.setup("cpu"))
        said = capsys.readouterr().out
        assert ("of the variance" in said) == (run == "a") and "quality weights" in said
    file, = (tmp_path / "views").glob("features-*.npy")
    assert np.load(file).shape == (48, 7, 7, 16)
    lines = [(tmp_path / run / "log.jsonl").read_text().splitlines()[0] for run in "ab"]
    assert '"ess"' in lines[0] and lines[0].split('"lr"')[0] == lines[1].split('"lr"')[0]


def test_rank_correlation_by_hand():
    """Spearman's: 1 - 6 sum d^2 / (n (n^2 - 1)), the ranks of the second being 1, 0, 3, 2."""
    assert quality_study.rank_correlation(torch.tensor([1.0, 2, 3, 40]), torch.tensor([5.0, 4, 9, 8])) == pytest.approx(1 - 6 * 4 / 60)


def test_the_study_says_how_cached_and_exact_agree(image_folder, encoder_folder):
    """On 24 tiny pictures the figures mean nothing, but their places are filled, and with all components kept and no colours
    in the picture the cached value would be the exact one but for the borders."""
    done = subprocess.run([sys.executable, Path(quality_study.__file__), "--data-dir", image_folder, "--encoder", encoder_folder,
                           "--cached-components", "4", "32", "--views-dir", image_folder], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("|")]
    assert [row[0].strip() for row in rows[2:]] == ["the exact value, colours drawn again", "the cached value, 4 components",
                                                    "the cached value, 32 components"]
    assert all(-1 <= float(cell) <= 1 for row in rows[2:] for cell in row[1:])


def test_the_study_prints_its_table(monkeypatch, capsys):
    """On shapes, with an encoder that is trained there."""
    import quality_study
    import shapes

    def train_encoder(amp):
        assert torch.is_grad_enabled()
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Conv2d(3, 16, 4, 4), torch.nn.ReLU(), torch.nn.Flatten(2), Transposed()).requires_grad_(False)
    monkeypatch.setattr(shapes, "train_encoder", train_encoder)
    monkeypatch.setattr("sys.argv", ["quality_study.py", "--dataset", "shapes", "--images", "64", "--cached-components", "4", "16",
                                     "--device", "cpu"])
    quality_study.main()
    rows = [line.split("|")[1:-1] for line in capsys.readouterr().out.splitlines() if line.startswith("| the ")]
    assert [row[0].strip() for row in rows] == ["the exact value, colours drawn again", "the cached value, 4 components",
                                                "the cached value, 16 components"]
    assert all(-1 <= float(x) <= 1 for row in rows for x in row[1:])
    ranks = torch.tensor([3.0, 1, 2, 10])
    assert quality_study.rank_correlation(ranks, ranks ** 3) == 1 and quality_study.rank_correlation(ranks, -ranks) == -1


class Transposed(torch.nn.Module):
    def forward(self, x):
        return x.mT
