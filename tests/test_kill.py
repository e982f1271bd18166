"""Training and generation that are killed, or run out of disk, end as if nothing had happened.

At given instants; pytest tests/test_kill.py --instants 20 adds random ones. The processes are
forks, so that the instants are of the work and not of the imports.
"""
import errno
import os
import random
import re
import resource
import shutil
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import tiny
import torch
from PIL import Image
from running import (
    before_call,
    call,
    die,
    end,
    fail,
    json_lines,
    refusal,
    start,
    start_two,
    training_flags,
)

import generate_views
import train_moco
from support import files
from support.command_line import UserError
from support.pretrained import load_checkpoint
from support.processes import setup

V2 = ["--method", "mocov2", "--queue", 16]
DISK = r" cannot be written \(.*\): make room there"


# ----------------------------------------------------------------------------------- what they do
@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, pipeline_folder):
    """Images, views, a tiny encoder and a tiny pipeline."""
    folder = tmp_path_factory.mktemp("kill")
    tiny.save_images(folder / "images", per_class=16)
    tiny.save_views(folder / "images", folder / "views")
    (folder / "clip").symlink_to(encoder_folder)
    (folder / "pipeline").symlink_to(pipeline_folder)
    return folder


def training(world, output, *flags):
    """Two epochs of 4 steps, saved after each step."""
    flags = training_flags(world, output, "--epochs", 2, "--save-minutes", 0, *flags)
    half = "float16" in flags
    return lambda: train_moco.train(train_moco.parse_args(argv=flags),
                                    setup("cpu", precision="float16" if half else None))


def at_step(number, act, work):
    return before_call(number, act, work, train_moco, "train_step")


@pytest.fixture(scope="module")
def whole(world):
    """Uninterrupted runs: whole(*flags of training) is the folder of one; each is made once."""
    made = {}

    def folder(*flags):
        if flags not in made:
            made[flags] = world / f"whole-{len(made)}"
            assert end(start(training(world, made[flags], *flags))) == 0
        return made[flags]
    return folder


def same_run(a, b):
    """Parameters, statistics, queue and optimizer bit for bit; the same numbers in the log."""
    states = [load_checkpoint(folder / "last.pt") for folder in (a, b)]
    leaves = [torch.utils._pytree.tree_leaves([s["model"], s["optimizer"], s["scaler"]])
              for s in states]
    for one, other in zip(*leaves, strict=True):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    keys = ("epoch", "step", "loss", "knn")
    logs = [[[line.get(key) for key in keys] for line in json_lines(folder / "log.jsonl")]
            for folder in (a, b)]
    assert logs[0] == logs[1] and len(logs[0]) > 2


def at(folder):
    """Where the folder's last checkpoint stands: epoch and step in it."""
    state = load_checkpoint(folder / "last.pt")
    return state["epoch"], state["step"]


def generation(world, output, *more):
    return lambda: call(
        generate_views, "--dataset", "folder", "--data-dir", world / "images", "--model",
        world / "pipeline", "--views-dir", output, "--steps", 2, "--guidance", 2, "--size", 32,
        "--save-size", 32, "--device", "cpu", "--batch-size", 4, *more)


def same_views(a, b, count):
    views = [{p.relative_to(folder): np.asarray(Image.open(p)).astype(int)
              for p in folder.rglob("*.png")} for folder in (a, b)]
    assert len(views[0]) == count and views[0].keys() == views[1].keys()
    assert max(abs(views[0][name] - views[1][name]).max() for name in views[0]) <= 1


# ------------------------------------------------------------------------------------------ kills
def kill_at_random(work, folder, draw, duration):
    """Starts the work and kills it at an instant drawn from (0, duration). One that has ended by
    then is done again, with a shorter duration: later runs are faster. Returns the duration."""
    while True:
        pid = start(work)
        time.sleep(draw.uniform(0, duration))
        os.kill(pid, signal.SIGKILL)
        status = end(pid)
        if status == -signal.SIGKILL:
            return duration
        assert status == 0
        shutil.rmtree(folder)
        duration *= 0.8


def test_training_killed_at_random(world, whole, tmp_path, instants):
    """Only where --instants asks for it."""
    if not instants:
        pytest.skip("--instants 20 kills at 20 random instants")
    began = time.monotonic()
    flags = [*V2, "--precision", "float16"]
    whole(*flags)
    duration = time.monotonic() - began
    draw = random.Random(0)
    for instant in range(instants):
        folder = tmp_path / str(instant)
        broken = training(world, folder, *flags, "--resume")
        duration = kill_at_random(broken, folder, draw, duration)
        assert end(start(broken)) == 0             # --resume starts anew where nothing was saved
        same_run(whole(*flags), folder)


def half_a_file(state, path):
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)
    die()


@pytest.mark.parametrize("file, owner, name, act, precision", [
    ("backbone.pt", torch, "save", half_a_file, "float32"),
    ("last.pt", os, "fsync", die, "float16")])     # there the scale of the loss goes on, too
def test_training_killed_in_a_checkpoint(file, owner, name, act, precision, world, whole, tmp_path):
    """In the write, before the sync to the disk: while the third step's file is written, last.pt of
    the second is there and valid."""
    flags = [*V2, "--precision", precision]
    killed = before_call(3, act, training(world, tmp_path, *flags), owner, name,
                         lambda *arguments: file in named(arguments))
    assert end(start(killed)) == -signal.SIGKILL and at(tmp_path) == (0, 2)
    assert end(start(training(world, tmp_path, *flags, "--resume"))) == 0
    same_run(whole(*flags), tmp_path)


def named(arguments):
    """The paths among a call's arguments, as text; of a file descriptor its path."""
    paths = [os.readlink(f"/proc/self/fd/{x}") if isinstance(x, int) else x for x in arguments]
    return " ".join(str(path) for path in paths if isinstance(path, str | Path))


def test_a_damaged_checkpoint_is_refused(world, whole, tmp_path, capsys):
    """A single wrong bit, in one line; nothing is overwritten."""
    shutil.copytree(whole(*V2), tmp_path / "run")
    last = tmp_path / "run/last.pt"
    content = bytearray(last.read_bytes())
    content[len(content) // 2] ^= 1
    last.write_bytes(content)
    log = (tmp_path / "run/log.jsonl").read_bytes()
    assert "is damaged" in refusal(capsys, training(world, tmp_path / "run", *V2, "--resume"))
    assert last.read_bytes() == content and (tmp_path / "run/log.jsonl").read_bytes() == log


def test_sigterm_to_the_readers_of_files_too(world, whole, tmp_path):
    """As clusters send it, to all processes; at a step for which no line of the log is due."""
    tiny.save_images(tmp_path / "images", per_class=16, size=72)
    flags = [*V2, "--data-dir", tmp_path / "images", "--views-dir", "none", "--quality", "off",
             "--image-size", 72, "--workers", 2, "--log-every", 2, "--save-minutes", 60,
             "--epochs", 1]
    work = training(world, tmp_path / "run", *flags)
    terminated = at_step(1, lambda *_: os.killpg(0, signal.SIGTERM), work)
    pid = start(lambda: (os.setpgrp(), terminated()))
    assert end(pid) == 128 + signal.SIGTERM and at(tmp_path / "run") == (0, 2)
    assert end(start(training(world, tmp_path / "run", *flags, "--resume"))) == 0
    same_run(whole(*flags), tmp_path / "run")


def test_a_failing_knn_costs_no_training(world, whole, tmp_path):
    """--resume does it and goes on, but not with another number of images."""
    tiny.save_images(tmp_path / "images", per_class=16)
    flags = [*V2, "--data-dir", tmp_path / "images", "--views-dir", "none", "--quality", "off",
             "--knn-every", 1]
    work = training(world, tmp_path / "run", *flags)
    assert end(start(before_call(1, fail, work, train_moco, "knn_of"))) == 2
    assert at(tmp_path / "run") == (0, 4)
    picture = next((tmp_path / "images/train").rglob("*.png"))
    picture.rename(tmp_path / "away.png")
    with pytest.raises(UserError, match="images is 32 images, names .* there and 31 images, names"):
        training(world, tmp_path / "run", *flags, "--resume")()
    (tmp_path / "away.png").rename(picture)
    assert end(start(training(world, tmp_path / "run", *flags, "--resume", "--skip-bad"))) == 0
    same_run(whole(*flags), tmp_path / "run")


# ------------------------------------------------------------------------------ several processes
def test_the_others_end_with_a_process_that_is_killed(world, tmp_path):
    """For one that fails see test_processes.py."""
    work = training(world, tmp_path / "run", *V2, "--epochs", 500)
    works = [at_step(3, die, work), work]
    began = time.monotonic()
    assert end(*start_two(works, tmp_path)) == [-signal.SIGKILL, 1]
    assert time.monotonic() - began < 20
    said = (tmp_path / "1").read_text()
    message = "error: process 1 stops because another one ended"
    assert re.search(message, said) and "Traceback" not in said


def test_two_processes_killed_go_on_to_the_same_result(world, tmp_path, capsys):
    """Batch-norm statistics, which differ between processes on CPUs, included. One process can go
    on, too, and says what that means."""
    def run(folder, *flags, act=None):
        work = training(world, tmp_path / folder, *V2, *flags)
        return end(*start_two([at_step(6, act, work) if act else work] * 2, tmp_path))
    assert run("whole") == [0, 0]
    assert run("broken", act=die) == [-signal.SIGKILL] * 2
    shutil.copytree(tmp_path / "broken", tmp_path / "alone")
    assert run("broken", "--resume") == [0, 0]
    same_run(tmp_path / "whole", tmp_path / "broken")
    statistics = load_checkpoint(tmp_path / "whole/last.pt")["statistics"]
    first, second = (values["query.backbone.1.running_mean"] for values in statistics)
    assert not torch.equal(first, second)
    training(world, tmp_path / "alone", *V2, "--resume")()
    assert "is of a run of 2 processes, here are 1" in capsys.readouterr().out
    assert at(tmp_path / "alone") == (1, 4)


# --------------------------------------------------------------------------------------- the disk
def limit_files(size):
    """No file may grow beyond so many bytes: as if the disk were full."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def test_a_full_disk_keeps_the_last_good_checkpoint(world, whole, tmp_path):
    """Full from the sixth step on."""
    run, said = tmp_path / "run", tmp_path / "said"
    work = training(world, run, *V2, "--save-minutes", 60)
    assert end(start(at_step(6, lambda *_: limit_files(2_000_000), work), said)) == 2
    assert re.search(r"last\.pt" + DISK, said.read_text()) and not list(run.glob("*.tmp"))
    assert at(run) == (0, 4)
    assert end(start(training(world, run, *V2, "--resume"))) == 0
    same_run(whole(*V2), run)


def test_generation_on_a_full_disk(world, tmp_path):
    said, work = tmp_path / "said", generation(world, tmp_path / "views")
    for size, full in ((1500, r"views/train/(?:cat|dog)/\d+\.png"), (3500, r"manifest\.jsonl")):
        assert end(start(lambda size=size: (limit_files(size), work()), said)) == 2
        assert re.search(full + DISK, said.read_text())
        manifest = tmp_path / "views/manifest.jsonl"           # nothing half-written stays in it
        assert not manifest.exists() or manifest.read_bytes()[-1:] in (b"", b"\n")
        with open(tmp_path / "views/manifest.jsonl", "a") as file:
            file.write("[]\n" * 600)               # ignored; now it will be larger than a view
    assert end(start(work)) == 0
    assert len(list((tmp_path / "views").rglob("*.png"))) == 32


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_generation_into_a_read_only_folder(number, world, tmp_path, monkeypatch, capsys):
    """The system's answer is simulated: root may write everywhere."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "replace", refuse)
    line = refusal(capsys, generation(world, tmp_path / "views"))
    assert re.fullmatch(rf".*views/\S+{DISK}, or name another folder", line)
    assert not list((tmp_path / "views").rglob("*.tmp"))


def test_a_source_that_vanishes_is_named_once_left_out_and_counted(world, tmp_path, capsys):
    """Between the listing and its turn."""
    shutil.copytree(world / "images", tmp_path / "images")
    picture = tmp_path / "images/train/dog/0015.png"
    before_call(1, lambda *_: picture.unlink(),
                generation(world, tmp_path / "views", "--data-dir", tmp_path / "images"),
                generate_views, "encode")()
    said = capsys.readouterr()
    assert "31 views made, 0 there already, 1 skipped" in said.out
    line = next(line for line in said.err.splitlines() if "skipped: " in line)
    assert line.count(f"{picture} cannot be read as an image") == 1 and "--skip-bad" not in said.err
    assert len(list((tmp_path / "views").rglob("*.png"))) == 31


def test_what_a_kill_left_behind_is_removed(world, tmp_path):
    """From a run's folder all; from a views folder what is old: another process may be writing."""
    old, new = (tmp_path / f"views/train/cat/0000.png.{number}.tmp" for number in (1, 2))
    run = tmp_path / "run/last.pt.7.tmp"
    for path in (old, new, run):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    files.sweep((tmp_path / "views").rglob("*.tmp"))
    assert not old.exists() and new.exists()
    assert end(start(training(world, tmp_path / "run", *V2, "--epochs", 1))) == 0
    assert not run.exists()
