"""Kills: training and generation stopped at any instant go on to the result of a run that nobody stopped.

Two random instants of each by default; pytest tests/test_kill.py --instants 20 for more. The processes are forks, so that
the instants are of the work and not of the imports.
"""
import errno
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import sys
import time
import traceback
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import generate_views
import genview
import support.checkpoints
import support.files
import support.world
import train_moco

CASES = {"v2": ["--method", "mocov2", "--queue", "16"], "v3": ["--method", "mocov3", "--hidden", "16"]}


def start(work):
    """Forks a process that does the work; returns its id. Its exit status: 0, support.world.run's, or 99 after a traceback."""
    pid = os.fork()
    if pid:
        return pid
    status = 99
    try:
        sys.stdout = sys.stderr = open(os.devnull, "w")
        torch.set_num_threads(1)
        support.world.script(work)
        status = 0
    except SystemExit as stop:
        status = stop.code
    except BaseException:
        traceback.print_exc(file=sys.__stderr__)
    sys.stderr.flush()
    os._exit(status)


def end(pid):
    """Waits; the exit status, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def seconds(work):
    began = time.time()
    assert end(start(work)) == 0
    return time.time() - began


def kill_at_random(work, folder, draw, duration):
    """Starts the work and kills it at an instant drawn from (0, duration). One that had ended by then is done again, with a
    shorter duration (the first run warms what the later find warm). Returns the duration."""
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


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images, views, a tiny encoder."""
    import tiny
    folder = tmp_path_factory.mktemp("kill")
    data = tiny.save_images(folder / "images", per_class=24)
    for path in sorted((folder / "images/train").rglob("*.png")):
        target = folder / "views" / path.relative_to(folder / "images")
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    tiny.save_clip(folder / "clip")
    tiny.save_pipeline(folder / "pipeline")
    return folder


def training(world, output, *flags):
    flags = ["--dataset", "folder", "--data-dir", world / "images", "--views-dir", world / "views", "--encoder", world / "clip",
             "--image-size", 32, "--arch", "resnet10_narrow", "--batch-size", 8, "--epochs", 2, "--output-dir", output,
             "--save-minutes", 0, "--log-every", 1, "--device", "cpu", *flags]
    return lambda: train_moco.train(train_moco.parse_args(argv=list(map(str, flags))), support.world.setup("cpu"))


def same_run(a, b):
    """Parameters, statistics, queue and optimizer bit for bit; the same loss at every step of the log."""
    a, b = Path(a), Path(b)
    states = [support.checkpoints.load_checkpoint(folder / "last.pt") for folder in (a, b)]
    for one, other in zip(*(torch.utils._pytree.tree_leaves([s["model"], s["optimizer"]]) for s in states)):
        assert torch.equal(one, other) if torch.is_tensor(one) else one == other
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()] for folder in (a, b)]
    key = lambda lines: [(line["epoch"], line.get("step"), line.get("loss"), line.get("knn")) for line in lines]
    assert key(logs[0]) == key(logs[1])


@pytest.mark.parametrize("case", CASES)
def test_training_killed_at_random(case, world, tmp_path, instants):
    whole = training(world, tmp_path / "whole", *CASES[case])
    duration = seconds(whole)
    draw = random.Random(0 if case == "v2" else 1)
    for instant in range(instants):
        broken = training(world, tmp_path / f"broken-{instant}", *CASES[case], "--resume")
        duration = kill_at_random(broken, tmp_path / f"broken-{instant}", draw, duration)
        assert end(start(broken)) == 0             # --resume begins anew where nothing was saved yet
        same_run(tmp_path / "whole", tmp_path / f"broken-{instant}")


class Killer:
    """Kills this process at the nth call of a function, before it or after it has done half of its work."""

    def __init__(self, function, call, half=None):
        self.function, self.left, self.half = function, call, half

    def __call__(self, *arguments, **options):
        self.left -= 1
        if self.left == 0:
            if self.half:
                self.half(*arguments)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.function(*arguments, **options)


def half_a_file(state, path):
    torch.save(state, path)
    os.truncate(path, path.stat().st_size // 2)


@pytest.mark.parametrize("instant", ["in the write", "before fsync", "between the renames", "without hard links", "after the rename"])
def test_training_killed_in_a_checkpoint(instant, world, tmp_path):
    """last.pt of the fourth step: half written; whole but not on the disk; with the old one kept already, or even moved away;
    before the next backbone.pt."""
    module, name, call, half = {"in the write": (torch, "save", 8, half_a_file), "before fsync": (os, "fsync", 4, None),
                                "after the rename": (torch, "save", 9, None)}.get(instant, (os, "replace", None, None))

    def no_links(*_):
        raise PermissionError

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            if instant == "without hard links":
                patch.setattr(os, "link", no_links)
            if call is None:
                replace = os.replace
                patch.setattr(os, "replace", lambda a, b: os.kill(os.getpid(), signal.SIGKILL) if Path(b).name == "last.pt" and
                              (tmp_path / "broken/previous.pt").exists() else replace(a, b))
            else:
                patch.setattr(module, name, Killer(getattr(module, name), call, half))
            training(world, tmp_path / "broken", *CASES["v2"])()
    assert end(start(training(world, tmp_path / "whole", *CASES["v2"]))) == 0
    assert end(start(killed)) == -signal.SIGKILL
    assert (tmp_path / "broken/last.pt").exists() != (instant == "without hard links")
    assert end(start(training(world, tmp_path / "broken", *CASES["v2"], "--resume"))) == 0
    same_run(tmp_path / "whole", tmp_path / "broken")


def test_a_damaged_checkpoint_gives_way_to_the_one_before(world, tmp_path, capsys):
    assert end(start(training(world, tmp_path / "whole", *CASES["v2"]))) == 0
    assert end(start(training(world, tmp_path / "run", *CASES["v2"]))) == 0
    content = bytearray((tmp_path / "run/last.pt").read_bytes())
    content[len(content) // 2] ^= 1                # one bit
    (tmp_path / "run/last.pt").write_bytes(content)
    training(world, tmp_path / "run", *CASES["v2"], "--resume")()
    assert "is damaged" in (said := capsys.readouterr().out) and "going on from" in said
    same_run(tmp_path / "whole", tmp_path / "run")
    assert support.checkpoints.load_checkpoint(tmp_path / "run/previous.pt")       # the damaged one did not take its place
    (tmp_path / "run/previous.pt").unlink()
    (tmp_path / "run/last.pt").write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        training(world, tmp_path / "run", *CASES["v2"], "--resume")()


def test_sigterm_saves_and_says_so(world, tmp_path):
    assert end(start(training(world, tmp_path / "whole", *CASES["v3"]))) == 0
    flags = [*CASES["v3"], "--save-minutes", 60]

    def terminated():
        step, calls = train_moco.train_step, []

        def stop_at_third(*arguments):
            calls.append(1)
            if len(calls) == 3:
                os.kill(os.getpid(), signal.SIGTERM)
            return step(*arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_moco, "train_step", stop_at_third)
            training(world, tmp_path / "run", *flags)()
    assert end(start(terminated)) == 128 + signal.SIGTERM
    assert support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] == 3
    assert end(start(training(world, tmp_path / "run", *flags, "--resume"))) == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_sigterm_to_the_readers_of_files_too(world, tmp_path):
    """As clusters send it, to all processes; at a step at which no line of the log is due."""
    import tiny
    tiny.save_images(tmp_path / "images", per_class=24, size=80)
    work = lambda output, *flags: training(world, output, *CASES["v2"], "--data-dir", tmp_path / "images", "--views-dir", "none",
                                           "--quality", "off", "--image-size", 80, "--workers", 2, "--log-every", 2,
                                           "--save-minutes", 60, *flags)
    terminated = at_step(3, lambda: os.killpg(0, signal.SIGTERM), work(tmp_path / "run"))
    assert end(start(work(tmp_path / "whole"))) == 0
    assert end(start(lambda: (os.setpgrp(), terminated()))) == 128 + signal.SIGTERM
    assert support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["step"] == 4
    assert end(start(work(tmp_path / "run", "--resume"))) == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_a_failing_knn_costs_no_training(world, tmp_path):
    """--resume does it and goes on, but not with another number of images."""
    import tiny
    tiny.save_images(tmp_path / "images", per_class=24)
    work = lambda output, *flags: training(world, output, *CASES["v2"], "--data-dir", tmp_path / "images", "--views-dir", "none",
                                           "--quality", "off", *flags)

    def failing():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_moco, "evaluate", lambda *_: fail())
            work(tmp_path / "run")()
    assert end(start(work(tmp_path / "whole"))) == 0
    assert end(start(failing)) == 2
    state = support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")
    assert (state["epoch"], state["step"]) == (0, 6)
    picture = next((tmp_path / "images/train").rglob("*.png"))
    picture.rename(tmp_path / "away.png")
    with pytest.raises(UserError, match="is of a run on 48 images, here are 47"):
        work(tmp_path / "run", "--resume")()
    (tmp_path / "away.png").rename(picture)
    assert end(start(work(tmp_path / "run", "--resume", "--skip-bad"))) == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def generation(world, output, *more):
    def work():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "argv", ["generate_views.py", "--dataset", "folder", "--data-dir", str(world / "images"), "--model",
                                        str(world / "pipeline"), "--views-dir", str(output), "--steps", "2", "--guidance", "2",
                                        "--size", "32", "--save-size", "32", "--device", "cpu", "--batch-size", "4", *more])
            generate_views.main()
    return work


def test_generation_killed_at_random(world, tmp_path, instants):
    duration = seconds(generation(world, tmp_path / "whole"))
    names = sorted(p.relative_to(tmp_path / "whole") for p in (tmp_path / "whole").rglob("*.png"))
    assert len(names) == 48
    draw = random.Random(2)
    for instant in range(instants):
        folder = tmp_path / f"broken-{instant}"
        duration = kill_at_random(generation(world, folder), folder, draw, duration)
        assert end(start(generation(world, folder))) == 0
        assert sorted(p.relative_to(folder) for p in folder.rglob("*.png")) == names
        for name in names:
            difference = np.asarray(Image.open(tmp_path / "whole" / name)).astype(int) - np.asarray(Image.open(folder / name))
            assert abs(difference).max() <= 2


# ------------------------------------------------------------------------------------------------------ several processes

def start_two(world, output, works, log):
    """Forks two processes that train together; each has its own work, made from its flags. Returns their ids."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pids = []
    for rank, work in enumerate(works):
        def one(rank=rank, work=work):
            os.environ |= dict(RANK=str(rank), WORLD_SIZE="2", LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
            sys.stderr = open(log / f"{rank}.txt", "w")
            work()
        pids.append(start(one))
    return pids


def at_step(number, act, work):
    """The work, with act() before its training step of that number."""
    def wrapped():
        step, calls = train_moco.train_step, []

        def train_step(*arguments):
            calls.append(1)
            if len(calls) == number:
                act()
            return step(*arguments)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(train_moco, "train_step", train_step)
            work()
    return wrapped


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def fail():
    raise UserError("the third batch is no good")


@pytest.mark.parametrize("lost, how", [(0, die), (1, die), (1, fail)])
def test_the_others_end_with_a_process_and_name_it(lost, how, world, tmp_path):
    work = training(world, tmp_path / "run", *CASES["v2"], "--epochs", 500)
    pids = start_two(world, tmp_path / "run", [at_step(3, how, work) if rank == lost else work for rank in (0, 1)], tmp_path)
    began = time.time()
    statuses = [end(pid) for pid in pids]
    assert time.time() - began < 60
    assert statuses[lost] == (-signal.SIGKILL if how is die else 2) and statuses[1 - lost] == 1
    said = (tmp_path / f"{1 - lost}.txt").read_text()
    assert f"error: process {1 - lost} stops, since process {lost} of 2 ended" in said and "Traceback" not in said
    if how is fail:
        assert "error: the third batch is no good" in (tmp_path / f"{lost}.txt").read_text()


def test_two_processes_killed_go_on_to_the_same_result(world, tmp_path):
    """Batch-norm statistics, which processes on CPUs have each of its own, included."""
    def run(output, *flags, act=None):
        work = training(world, output, *CASES["v2"], *flags)
        works = [at_step(9, act, work) if act else work] * 2
        return [end(pid) for pid in start_two(world, output, works, tmp_path)]
    assert run(tmp_path / "whole") == [0, 0]
    assert run(tmp_path / "broken", act=die) == [-signal.SIGKILL] * 2
    assert run(tmp_path / "broken", "--resume") == [0, 0]
    same_run(tmp_path / "whole", tmp_path / "broken")
    statistics = support.checkpoints.load_checkpoint(tmp_path / "whole/last.pt")["statistics"]
    name = "query.backbone.1.running_mean"
    assert len(statistics) == 2 and not torch.equal(statistics[0][name], statistics[1][name])


def test_one_of_two_generating_processes_killed(world, tmp_path):
    """The other does its own share, ends and names it; a new start, of uneven shares, makes the rest: the same pictures."""
    whole, broken = (generation(world, tmp_path / folder, "--limit", "47") for folder in ("whole", "broken"))
    assert end(start(whole)) == 0

    def killed():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(generate_views, "generate", Killer(generate_views.generate, 3))
            broken()
    began = time.time()
    pids = start_two(world, tmp_path / "broken", [killed, broken], tmp_path)
    assert [end(pid) for pid in pids] == [-signal.SIGKILL, 1] and time.time() - began < 60
    assert "process 1 stops, since process 0 of 2 ended" in (tmp_path / "1.txt").read_text()
    made = len(list((tmp_path / "broken").rglob("*.png")))
    assert 23 <= made < 47                         # the other's share, and what the lost one had done
    assert [end(pid) for pid in start_two(world, tmp_path / "broken", [broken] * 2, tmp_path)] == [0, 0]
    views = [{p.relative_to(tmp_path / folder): np.asarray(Image.open(p)).astype(int) for p in (tmp_path / folder).rglob("*.png")}
             for folder in ("whole", "broken")]
    assert len(views[0]) == 47 and views[0].keys() == views[1].keys()
    assert max(abs(views[0][name] - views[1][name]).max() for name in views[0]) <= 2


@pytest.mark.parametrize("number", [errno.EACCES, errno.EROFS])
def test_generation_into_a_folder_that_may_not_be_written(number, world, tmp_path, monkeypatch, capsys):
    """Root may write everywhere: the system's answer is made up."""
    def refuse(*_):
        raise OSError(number, os.strerror(number))
    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(SystemExit) as stop:
        support.world.script(generation(world, tmp_path / "views"))
    assert stop.value.code == 2 and not list((tmp_path / "views").rglob("*.tmp"))
    assert re.fullmatch(r"error: .*views/\S+ could not be written \(.*\): name another folder\n", capsys.readouterr().err)


def test_a_source_that_vanishes_is_named_and_left_out(world, tmp_path, monkeypatch, capsys):
    """Between the listing and its turn."""
    shutil.copytree(world / "images", tmp_path / "images")
    encode = generate_views.encode

    def vanish(*arguments):
        (tmp_path / "images/train/dog/0023.png").unlink(missing_ok=True)
        return encode(*arguments)
    monkeypatch.setattr(generate_views, "encode", vanish)
    generation(world, tmp_path / "views", "--data-dir", str(tmp_path / "images"))()
    said = capsys.readouterr()
    assert "47 views made, 0 there already, 1 skipped" in said.out
    assert "skipped: " in said.err and "dog/0023.png cannot be read as an image" in said.err


def test_another_number_of_processes_is_said(world, tmp_path, capsys):
    flags = [*CASES["v2"], "--epochs", 4]
    pids = start_two(world, tmp_path / "run", [at_step(9, die, training(world, tmp_path / "run", *flags))] * 2, tmp_path)
    assert [end(pid) for pid in pids] == [-signal.SIGKILL] * 2
    training(world, tmp_path / "run", *flags, "--resume")()
    assert "is of a run of 2 processes, here are 1" in capsys.readouterr().out
    assert support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 4


# -------------------------------------------------------------------------------------------------------------- the disk

def with_little_space(work, size, said):
    """The work of a process whose files must not grow beyond so many bytes; what it says on stderr goes to the file said."""
    def limited():
        sys.stderr = open(said, "w")               # small enough itself
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
        work()
    return limited


def test_a_full_disk_keeps_the_last_good_checkpoint(world, tmp_path):
    flags = [*CASES["v2"], "--save-minutes", 60]
    assert end(start(training(world, tmp_path / "whole", *flags))) == 0
    step = at_step(9, lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (2_000_000,) * 2), training(world, tmp_path / "run", *flags))
    log = tmp_path / "said.txt"

    def full():
        sys.stderr = open(log, "w")
        step()
    assert end(start(full)) == 2
    assert "last.pt could not be written" in log.read_text() and "MB are free" in log.read_text() and "are needed" in log.read_text()
    assert support.checkpoints.load_checkpoint(tmp_path / "run/last.pt")["epoch"] == 1 and not list((tmp_path / "run").glob("*.tmp"))
    assert end(start(training(world, tmp_path / "run", *flags, "--resume"))) == 0
    same_run(tmp_path / "whole", tmp_path / "run")


def test_generation_on_a_full_disk(world, tmp_path):
    said = tmp_path / "said.txt"
    for size, full in ((1500, r"views/train/(cat|dog)/\d+\.png"), (3500, r"views/manifest\.jsonl")):
        assert end(start(with_little_space(generation(world, tmp_path / "views"), size, said))) == 2
        message = re.search(full + r" could not be written \(.*\): [\d.]+ MB are free in .*, about ([\d.]+) MB are needed", said.read_text())
        assert message and 0 < float(message[message.lastindex]) <= 48 * 3500 / 1e6
    assert end(start(generation(world, tmp_path / "views"))) == 0
    assert len(list((tmp_path / "views").rglob("*.png"))) == 48


def test_features_and_first_checkpoint_on_a_full_disk(world, tmp_path):
    said = tmp_path / "said.txt"
    for flags, size, name in ((["--quality", "cached"], 50_000, r"features-\w+\.npy"), ([], 900_000, r"backbone\.pt")):
        assert end(start(with_little_space(training(world, tmp_path / "run", *CASES["v2"], *flags), size, said))) == 2
        message = re.search(name + r" could not be written \(.*\): [\d.]+ MB are free in .*, about ([\d.]+) MB are needed", said.read_text())
        assert message and size / 1e6 < float(message[1]) < 10, said.read_text()
        assert not list(world.rglob("*.tmp*"))


def test_what_a_kill_left_behind_is_removed(world, tmp_path):
    """A run's folder is its own; in a views folder another process may be at work, so only what is old goes."""
    old, new = (tmp_path / f"views/train/cat/0000.png.{number}.tmp" for number in (1, 2))
    run = tmp_path / "run/last.pt.7.tmp"
    for path in (old, new, run):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    os.utime(old, (time.time() - 4000,) * 2)
    support.files.sweep(tmp_path / "views")
    assert not old.exists() and new.exists()
    assert end(start(training(world, tmp_path / "run", *CASES["v2"]))) == 0
    assert not run.exists()
