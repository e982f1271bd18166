"""`train_moco.py --dataset cifar10` is GenView: it makes the views that are missing, then trains.

With a tiny pipeline in the miniature's place.
"""
import gc
import re
import signal
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from running import CPU, before_call, call, die, end, json_lines, refusal, start, start_two
from test_generate_views import assert_same_views, read_manifest, snapshot

import generate_views
import genview
import train_moco
import train_swav
from support import command_line, runs
from support.data import spaced
from support.processes import World

VIEWS = Path("views/cifar10")


@pytest.fixture(autouse=True)
def place(pipeline_folder, tmp_path, monkeypatch):
    """An empty working directory, and the tiny pipeline as the miniature."""
    monkeypatch.setattr(genview, "MINI", Path(pipeline_folder))
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def train(image_folder):
    """Trains on the 24 images as if they were CIFAR-10; a flag given twice: the last one counts."""
    def work(*flags, script=train_moco):
        call(script, "--dataset=cifar10", f"--data-dir={image_folder}", "--arch=resnet10_narrow",
             "--batch-size=8", "--epochs=1", "--knn-every=0", "--device=cpu", "--workers=0",
             *(["--queue=8", "--start-batches=0"] if script is train_moco else []), *flags)
    return work


def make(image_folder, *flags):
    """generate_views.py for the same images."""
    call(generate_views, "--dataset=cifar10", f"--data-dir={image_folder}", "--device=cpu", *flags)


@pytest.fixture(scope="module")
def reference(image_folder, pipeline_folder, tmp_path_factory):
    """All views, made by generate_views.py."""
    folder = tmp_path_factory.mktemp("reference") / "views"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genview, "MINI", Path(pipeline_folder))
        make(image_folder, f"--views-dir={folder}")
    return folder


def assert_views_of(count, reference):
    """The views of so many images, evenly spaced, are those of the reference, and no others."""
    names = sorted(str(path.relative_to(reference)) for path in reference.rglob("*.png"))
    assert_same_views(VIEWS, reference, [names[i] for i in spaced(len(names), count)])


def kinds_of_runs():
    folders = [path.parent.name for path in Path("runs").glob("*/last.pt")]
    return sorted(re.sub(r"-[\d-]+$", "", name) for name in folders)


@pytest.mark.parametrize("script, name, method", [
    (train_moco, "mocov2", "MoCo v2"), (train_swav, "swav", "SwAV")])
def test_missing_views_are_made_and_trained_with(script, name, method, train, reference, capsys):
    """The same views as generate_views.py's, and all about the run says GenView."""
    train("--limit=8", script=script)
    said = capsys.readouterr().out
    assert "8 of 8 images have none in views/cifar10" in said and "--views-dir none" in said
    assert "8 views made, 0 there already" in said and "generated views of 8 of 8" in said
    assert said.splitlines()[-1] == f"no kNN ({method} + GenView's views + quality weights)"
    assert kinds_of_runs() == [f"cifar10-{name}-genview"]
    assert_views_of(8, reference)


def test_a_run_that_makes_its_views_equals_one_that_finds_them(train, capsys, monkeypatch):
    """And that one loads no pipeline; the first has freed it before its first step."""
    pipes, alive = [], []
    load, step = generate_views.load_pipeline, train_moco.train_step

    def load_pipeline(*arguments):
        pipe = load(*arguments)
        pipes.append(weakref.ref(pipe.unet))
        return pipe

    def train_step(*arguments):
        alive.append(pipes[0]() is not None)
        return step(*arguments)
    monkeypatch.setattr(generate_views, "load_pipeline", load_pipeline)
    monkeypatch.setattr(train_moco, "train_step", train_step)
    gc.disable()                                   # nothing is freed by chance
    try:
        train("--output-dir=makes", "--log-every=1", "--limit=8")
    finally:
        gc.enable()
    before = snapshot(VIEWS)
    capsys.readouterr()
    train("--output-dir=finds", "--log-every=1", "--limit=8")
    assert len(pipes) == 1 and not any(alive) and snapshot(VIEWS) == before
    assert "GenView needs" not in capsys.readouterr().out
    makes, finds = ([line["loss"] for line in json_lines(Path(folder, "log.jsonl"))]
                    for folder in ("makes", "finds"))
    assert makes == finds


def test_killed_while_the_views_are_made_the_same_command_goes_on(train, reference, capsys):
    work = before_call(2, die, train, generate_views, "generate")
    assert end(start(work)) == -signal.SIGKILL
    done = len(read_manifest(VIEWS))
    assert 0 < done < 24
    train()
    said = capsys.readouterr().out
    assert f"{24 - done} of 24 images have none" in said
    assert f"{24 - done} views made, {done} there already" in said
    assert kinds_of_runs() == ["cifar10-mocov2-genview"]
    assert_views_of(24, reference)


def test_two_processes_make_the_same_views(train, reference, tmp_path):
    works = [lambda: train("--limit=9")] * 2       # 5 and 4
    assert end(*start_two(works, tmp_path)) == [0, 0], (tmp_path / "0").read_text()
    assert kinds_of_runs() == ["cifar10-mocov2-genview"]
    assert_views_of(9, reference)


def test_limit_makes_so_many_and_a_longer_run_the_others(train, capsys):
    for flags, made, there in ((["--limit=8"], 8, 0), ([], 16, 8)):
        train(*flags)
        said = capsys.readouterr().out
        assert f"{made} views made, {there} there already" in said
        assert "GenView's views + quality weights" in said.splitlines()[-1]
        assert len(list(VIEWS.rglob("*.png"))) == made + there


def test_extra_samples_are_made_too(train, capsys):
    train("--views=extra", "--limit=8")
    said = capsys.readouterr().out
    assert "8 views made" in said and "8 further training samples from views/cifar10" in said
    assert kinds_of_runs() == ["cifar10-mocov2-extra"]


def test_plain_stays_plain(train, capsys):
    """With --views-dir none, and in a plain run that is resumed without this flag."""
    train("--views-dir=none", "--output-dir=run")
    train("--output-dir=run", "--resume")
    assert not VIEWS.exists()
    last = "no kNN (plain MoCo v2, no generated views)"
    assert capsys.readouterr().out.count(last) == 2


def test_a_resumed_run_makes_no_views(train, capsys):
    """Not even the one that was lost; but --resume that finds nothing begins a run, and makes."""
    flags = ["--output-dir=run", "--limit=8", "--resume"]
    train(*flags)
    assert "8 views made" in capsys.readouterr().out
    next(VIEWS.rglob("*.png")).unlink()
    train(*flags)
    said = capsys.readouterr().out
    assert "generated views of 7 of 8" in said
    assert "*** generated views: the run that goes on had 8 images" in said
    assert len(list(VIEWS.rglob("*.png"))) == 7


def test_views_of_other_settings_are_not_mixed(image_folder, train, capsys):
    """The message's way out trains with those that are there."""
    make(image_folder, "--noise=100", "--limit=8")
    before = snapshot(VIEWS)
    line = refusal(capsys, train)
    way_out = "--views-dir views/cifar10"
    assert "noise is 100 there and adaptive here" in line and way_out in line
    assert snapshot(VIEWS) == before and not any(Path("runs").iterdir())
    train(*way_out.split())
    assert "GenView's views of 8 of 24 images" in capsys.readouterr().out.splitlines()[-1]


def test_a_wrong_encoder_is_refused_before_views_are_made(train, capsys):
    assert "nowhere could not be loaded" in refusal(capsys, train, "--encoder=nowhere")
    assert not VIEWS.exists()


def test_full_size_models_are_left_to_generate_views(image_folder, train, capsys, monkeypatch):
    """They take hours: the banner names the command. So it is without the miniature's folder."""
    for flags in (["--dataset=folder", "--image-size=32", "--lr=0.01"], []):
        train(*flags)
        said = capsys.readouterr().out
        assert "this is plain MoCo v2" in said and "python generate_views.py --dataset" in said
        assert "(plain MoCo v2, no generated views)" in said.splitlines()[-1]
        monkeypatch.setattr(genview, "MINI", Path("nowhere"))
    assert not Path("views").exists()


@pytest.mark.parametrize("fast", [torch.bfloat16, torch.float32])
def test_the_precision_of_a_training_is_not_that_of_its_views(fast, monkeypatch):
    """On a GPU: else another --precision would be refused while views are missing."""
    monkeypatch.setattr(generate_views, "fast_dtype", lambda device: fast)
    found = generate_views.precision_of("auto", torch.device("cuda"))
    assert found == (torch.bfloat16 if fast == torch.bfloat16 else torch.float16)


# ------------------------------------------------------------------------ how long a run will take
def begin(folder, seconds_a_step, monkeypatch, **changes):
    """A run of 20 steps an epoch whose clock goes on by so much a step; and its clock."""
    settings = dict(output_dir=str(folder), resume=None, epochs=10, batch_size=4000,
                    image_size=32, save_minutes=1e6, log_every=10, dataset="cifar10",
                    views_dir="none")
    settings |= changes
    method = torch.nn.Module()
    method.chance = 0.0
    method.query = torch.nn.ModuleDict({"backbone": torch.nn.Linear(1, 1)})
    method.query.backbone = method.query["backbone"]
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    images = SimpleNamespace(names=[""] * 80_000, left_out=0, source="", root=None)
    run = runs.Run(SimpleNamespace(**settings), CPU, method, optimizer, images)
    clock = SimpleNamespace(now=0.0, monotonic=lambda: clock.now, time=lambda: clock.now)
    monkeypatch.setattr(runs, "time", clock)
    run.start_epoch = settings.get("epoch", 0)
    run.begin(20, "a run", {}, "")

    def steps(epoch, count, **readouts):
        first = run.begin_epoch(epoch)
        clock.now += 1000                          # the first step is slow
        for step in range(first, first + count):
            run.after_step(step, {"loss": torch.zeros(())} | readouts)
            clock.now += seconds_a_step
    steps.run = run
    return steps


@pytest.mark.parametrize("seconds, changes, line", [
    (1, {}, "this run will take about 3 min on this machine"),
    (60, {}, f"this run will take about 3.3 h on this machine; a smaller one: {runs.SMALLER}"),
    (1800, dict(epochs=7), "this run will take about 70.0 h on this machine"),
    (60, dict(image_size=224), "this run will take about 3.3 h on this machine"),
    (60, dict(epoch=5), "the rest of this run will take about 1.7 h on this machine")])
def test_a_run_says_early_how_long_it_will_take(seconds, changes, line, tmp_path, monkeypatch,
                                                capsys):
    """After the eleventh step, once."""
    steps = begin(tmp_path, seconds, monkeypatch, **changes)
    epoch = changes.get("epoch", 0)
    capsys.readouterr()
    steps(epoch, 10)
    assert capsys.readouterr().out == ""
    steps(epoch, 20)
    assert capsys.readouterr().out == f"{line}\n"
    steps(epoch + 1, 20)
    assert capsys.readouterr().out == ""


def test_the_smaller_run_that_is_named_parses(train):
    args = train_moco.parse_args(argv=["--dataset=cifar10", *runs.SMALLER.split()])
    assert args.arch == "resnet10_narrow" and args.limit * args.epochs == runs.SMALLER_SIZE
    assert command_line.duration(runs.LONG) == "2.0 h"


@pytest.mark.parametrize("epochs, judged", [(60, 12), (5, 2), (2, 2), (1, None)])
def test_drifting_keys_are_named_after_a_fifth_of_the_epochs(epochs, judged, tmp_path, monkeypatch,
                                                             capsys):
    """But at least two; once, whatever comes later."""
    steps = begin(tmp_path, 1, monkeypatch, epochs=epochs, method="mocov2", temperature=0.2)
    warned = []
    for epoch in range(epochs):
        steps(epoch, 20, neg=torch.tensor(0.3))
        steps.run.end_epoch()
        if "neg is 0.30, where 0 is healthy" in capsys.readouterr().out:
            warned.append(epoch + 1)
    assert warned == [judged] * (judged is not None)


def test_the_log_has_the_mean_over_processes(tmp_path, monkeypatch):
    class Two(World):
        def mean(self, x):
            return x + 1
    monkeypatch.setitem(globals(), "CPU", Two(*CPU))
    steps = begin(tmp_path, 1, monkeypatch)
    steps(0, 20)
    assert {line["loss"] for line in json_lines(tmp_path / "log.jsonl")} == {1.0}
