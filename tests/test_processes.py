"""Several processes, signals and folders: no process waits for one that is gone, no run mixes with
another."""
import datetime
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from types import SimpleNamespace

import pytest
import tiny
import torch
from PIL import Image
from running import (
    CPU,
    before_call,
    call,
    end,
    fail,
    held,
    json_lines,
    refusal,
    start,
    start_two,
    training_flags,
)

import eval_detection
import eval_linear
import generate_views
import genview
import recipes
import train_moco
from support import checkpoint, command_line, evaluations, processes, runs
from support.checkpoint import Checkpoint
from support.command_line import Terminated, UserError, progress, script
from support.files import write_json
from support.processes import setup


@pytest.fixture(scope="module")
def world(tmp_path_factory, encoder_folder, pipeline_folder):
    """Images, views, a tiny encoder and a tiny pipeline, a checkpoint."""
    folder = tmp_path_factory.mktemp("world")
    tiny.save_images(folder / "images", per_class=16)
    tiny.save_views(folder / "images", folder / "views")
    (folder / "clip").symlink_to(encoder_folder)
    (folder / "pipeline").symlink_to(pipeline_folder)
    training(folder, folder / "run")()
    return folder


def training(world, output, *flags):
    flags = training_flags(world, output, "--epochs", 1, "--queue", 16, "--start-batches", 0,
                           "--knn-every", 1, *flags)
    return lambda: train_moco.train(train_moco.parse_args(argv=flags), setup("cpu"))


def generation(world, output):
    return lambda: call(
        generate_views, "--dataset", "folder", "--data-dir", world / "images", "--model",
        world / "pipeline", "--views-dir", output, "--steps", 1, "--size", 32, "--save-size", 32,
        "--device", "cpu", "--batch-size", 4)


def evaluation(world, output, *more):
    return lambda: call(
        eval_linear, "--checkpoint", world / "run/last.pt", "--dataset", "folder", "--data-dir",
        world / "images", "--protocol", "finetune", "--labels", 1, "--batch-size", 8, "--epochs", 2,
        "--output-dir", output, "--device", "cpu", "--workers", 0, *more)


# ------------------------------------------------------------------------------ one fails, all end
PLACES = {
    "reading": (training, genview.data, "open_image"),
    "the foreground": (training, genview, "fit_foreground"),
    "a step": (training, train_moco, "train_step"),
    "a checkpoint": (training, torch, "save"),
    "kNN": (training, train_moco, "knn_of"),
    "generation": (generation, generate_views, "generate"),
    "evaluation": (evaluation, eval_linear, "fit_classifier")}


@pytest.mark.parametrize("place, act", [
    *((place, fail) for place in PLACES), ("a step", lambda *_: 1 / 0)])
def test_the_others_end_with_a_process_that_fails(place, act, world, tmp_path):
    """With an error that a user can cause, or a bug."""
    make, owner, name = PLACES[place]
    work = make(world, tmp_path / "out")
    broken = before_call(1, act, work, owner, name)
    began = time.monotonic()
    statuses = end(*start_two([broken, work], tmp_path))
    assert time.monotonic() - began < 20
    assert statuses == [2 if act is fail else 1, 1]
    assert "process 1 stops because another one ended" in (tmp_path / "1").read_text()
    said = (tmp_path / "0").read_text()
    assert ("the third batch is no good" if act is fail else "ZeroDivisionError") in said


@pytest.mark.parametrize("stop, status, cleaned", [
    (None, None, True), (Terminated("saved", signal.SIGHUP), 129, True),
    (UserError("a bad picture"), 2, False), (ZeroDivisionError(), 1, False),
    (KeyboardInterrupt(), 130, False)])
def test_the_group_of_processes_is_destroyed_only_by_all_together(stop, status, cleaned,
                                                                  monkeypatch, capsys):
    """NCCL would wait for the others where only one process ends."""
    done = []

    def leave(number):
        raise SystemExit(number)
    monkeypatch.setattr(os, "_exit", leave)
    monkeypatch.setattr(command_line, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_backend=lambda: "nccl", get_rank=lambda: 0,
        destroy_process_group=lambda: done.append(1)))

    def main():
        if stop:
            raise stop
    if status:
        with pytest.raises(SystemExit) as ended:
            script(main)
        assert ended.value.code == status
    else:
        script(main)
    assert bool(done) == cleaned


# ---------------------------------------------------------------------------- the same data in all
@pytest.mark.parametrize("lack, text", [
    ("train/cat/0003.png", "process 1 finds in train: 31 images.*process 0: 32 images"),
    ("test/dog/0003.png", "process 1 finds in test: 31 images.*process 0: 32 images"),
    ("views", "process 1 finds generated views: 31 images.*process 0: 32 images")])
def test_a_file_that_one_machine_lacks_is_named_before_the_first_step(lack, text, world, tmp_path):
    works = []
    for rank in (0, 1):
        copy = tmp_path / f"machine-{rank}"
        tiny.save_images(copy / "images", per_class=16)
        tiny.save_views(copy / "images", copy / "views")
        (copy / "clip").symlink_to(world / "clip")
        works.append(training(copy, tmp_path / "run"))
    lost = next((tmp_path / "machine-1/views").rglob("*.png")) if lack == "views" else (
        tmp_path / "machine-1/images" / lack)
    lost.unlink()
    assert end(*start_two(works, tmp_path)) == [2, 2]
    assert re.search(text, (tmp_path / "0").read_text())
    assert not (tmp_path / "run/log.jsonl").exists()


def test_processes_that_find_other_checkpoints_are_named(tmp_path, monkeypatch):
    def gather(values, mine):
        values[:] = [mine, "epoch 1, step 0"]
    monkeypatch.setattr(processes, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=gather))
    with pytest.raises(UserError, match="process 1 finds the checkpoint .*last.pt: epoch 1, step 0,"
                                        " process 0: none; it must lie in one folder"):
        Checkpoint(tmp_path / "last.pt", {}, None).load()


def test_a_checkpoint_that_one_machine_does_not_see_is_named(world, tmp_path):
    """With --resume alone, which starts anew where nothing is there."""
    works = [training(world, tmp_path / name, "--resume", "--knn-every", 0) for name in "ab"]
    training(world, tmp_path / "a", "--knn-every", 0)()
    assert end(*start_two(works, tmp_path)) == [2, 2]
    assert "finds a checkpoint to resume: False, process 0: True" in (tmp_path / "0").read_text()


def test_further_samples_that_one_machine_lacks_are_named(world, tmp_path):
    works = []
    for rank, count in ((0, 3), (1, 2)):
        folder = tmp_path / f"extra-{rank}"
        folder.mkdir()
        for i in range(count):
            Image.new("RGB", (32, 32)).save(folder / f"{i}.png")
        works.append(training(world, tmp_path / "run", "--views", "extra", "--views-dir", folder))
    assert end(*start_two(works, tmp_path)) == [2, 2]
    assert re.search("finds extra images: 2 images.*process 0: 3", (tmp_path / "0").read_text())


# ------------------------------------------------------------------------------ one run, one folder
@pytest.mark.parametrize("kind", [training, evaluation])
def test_a_second_run_in_a_folder_is_refused(kind, world, tmp_path, capsys):
    work = kind(world, tmp_path)
    with held(tmp_path):
        said = refusal(capsys, work)
        assert said == f"another process works in {tmp_path}: name another --output-dir"
        assert [file.name for file in tmp_path.iterdir()] == [".lock"]
    work()                                         # a lock does not outlive its process
    assert (tmp_path / "last.pt").exists() and not (tmp_path / ".lock").exists()


def test_an_evaluation_that_fails_leaves_its_folder_to_others(world, tmp_path, capsys):
    """And removes what a kill left there."""
    (tmp_path / "last.pt.7.tmp").touch()
    refusal(capsys, before_call(1, fail, evaluation(world, tmp_path), eval_linear, "pictures"))
    assert [file.name for file in tmp_path.iterdir()] == ["log.jsonl"]


def test_an_evaluation_in_another_number_of_processes_is_named(world, tmp_path, capsys):
    evaluation(world, tmp_path)()
    state = torch.load(tmp_path / "last.pt")
    torch.save(state | {"processes": 2}, tmp_path / "last.pt")
    capsys.readouterr()
    evaluation(world, tmp_path, "--resume")()
    text = "last.pt is of a run of 2 processes, here are 1: other random draws"
    assert text in capsys.readouterr().out


def test_a_run_does_not_go_on_with_other_views_or_another_encoder(world, tmp_path, capsys):
    """Under the same path; a model may be spelled in another way."""
    shutil.copytree(world / "views", tmp_path / "views")
    settings = {"dataset": "folder", "noise": "adaptive", "model": "a"}
    write_json(tmp_path / "views/settings.json", settings)
    clip = tmp_path / "clip"
    tiny.save_clip(clip)
    flags = ["--views-dir", tmp_path / "views", "--encoder", clip, "--knn-every", 0]
    training(world, tmp_path / "run", *flags)()
    resumed = training(world, tmp_path / "run", *flags, "--resume")
    write_json(tmp_path / "views/settings.json", settings | {"noise": 100})
    assert "noise of the views is adaptive there and 100 here" in refusal(capsys, resumed)
    write_json(tmp_path / "views/settings.json", settings | {"model": "b"})
    (tmp_path / "views").rename(tmp_path / "moved")
    flags[1] = tmp_path / "moved"
    flags[3] = f"{clip}/"
    resumed = training(world, tmp_path / "run", *flags, "--resume")
    resumed()
    assert "the run that goes on had" not in capsys.readouterr().out
    view = next((tmp_path / "moved").rglob("*.png"))
    shutil.copy(world / "images/train/cat/0000.png", view)
    resumed()
    assert "*** generated views: the run that goes on had 32 images" in capsys.readouterr().out
    before = (tmp_path / "run/last.pt").read_bytes()
    tiny.clip_vision_model(seed=1).save_pretrained(clip)
    assert "weights of --encoder is" in refusal(capsys, resumed)
    assert (tmp_path / "run/last.pt").read_bytes() == before


def test_an_evaluation_does_not_go_on_with_other_labels_or_test_images(world, tmp_path, capsys):
    data = shutil.copytree(world / "images", tmp_path / "images")
    names = [f"train/{kind}/000{i}.png" for kind in ("cat", "dog") for i in range(6)]
    (tmp_path / "labels").write_text("\n".join(names))
    flags = ["--data-dir", data, "--labels-file", tmp_path / "labels"]
    evaluation(world, tmp_path / "run", *flags)()
    (tmp_path / "labels").rename(tmp_path / "moved")
    flags[3] = tmp_path / "moved"
    again = evaluation(world, tmp_path / "run", *flags, "--resume")
    again()
    (tmp_path / "moved").write_text("\n".join(names[:-1]))
    assert "images is 12 images" in refusal(capsys, again)
    (tmp_path / "moved").write_text("\n".join(names))
    next(data.glob("test/*/*")).unlink()
    assert "test images is 32 images" in refusal(capsys, again)


def test_a_run_that_was_faster_is_not_overwritten(world, tmp_path, capsys, monkeypatch):
    work = training(world, tmp_path / "run")

    def other(*_):
        (tmp_path / "run").mkdir()
        (tmp_path / "run/last.pt").touch()
    late = before_call(1, other, work, train_moco, "claimed")
    assert "holds a run already" in refusal(capsys, late)


def test_runs_of_the_same_second_have_names_of_their_own():
    names = {runs.choose_folder(None, None, "cifar10-mocov2-plain")[0] for _ in range(3)}
    assert len(names) == 3
    assert all(re.fullmatch(r"runs/cifar10-mocov2-plain-\d{8}-\d{6}-\d{6}", x) for x in names)


def test_a_run_does_not_go_on_in_the_folder_of_another(world, tmp_path, capsys):
    training(world, tmp_path / "other", "--seed", 1, "--knn-every", 0)()
    before = (tmp_path / "other/last.pt").read_bytes()
    work = training(world, tmp_path / "other", "--resume", world / "run/last.pt")
    assert "other holds a run already" in refusal(capsys, work)
    assert (tmp_path / "other/last.pt").read_bytes() == before
    moved = training(world, tmp_path / "new", "--resume", world / "run/last.pt")
    moved()                                        # into a folder of its own it may
    assert (tmp_path / "new/args.json").exists()


def test_a_file_that_is_no_checkpoint_of_a_run_is_named(world, tmp_path, capsys):
    torch.save(torch.ones(2), tmp_path / "last.pt")
    work = training(world, tmp_path / "run", "--resume", tmp_path / "last.pt")
    assert "last.pt is no checkpoint of such a run" in refusal(capsys, work)


def test_tasks_of_srun_without_torchrun_are_named(monkeypatch, capsys):
    for name, value in dict(SLURM_NTASKS="4", SLURM_PROCID="1").items():
        monkeypatch.setenv(name, value)
    assert "starts 4 tasks, each of which would train alone" in refusal(capsys, setup, "cpu")
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "1")          # of this step, of a job of four
    assert setup("cpu").size == 1
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")          # mpirun
    assert "starts 2 tasks, each of which would train alone" in refusal(capsys, setup, "cpu")


PORT = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "localhost"}


@pytest.mark.parametrize("environment, said", [
    ({"RANK": "x"}, "RANK=x, which is no whole number"),
    ({"WORLD_SIZE": ""}, "WORLD_SIZE=, which is no whole number"),
    ({"RANK": "1", "LOCAL_RANK": "1"}, "process 1 of 1, but not WORLD_SIZE"),
    (PORT | {"RANK": "2", "MASTER_PORT": "1"}, "process 2 of 2: start"),
    (PORT | {"MASTER_PORT": "x"}, "do not find each other by MASTER_ADDR"),
    (PORT | {"MASTER_PORT": "70000"}, "do not find each other by MASTER_ADDR")])
def test_an_environment_that_no_launcher_makes_is_named(environment, said, monkeypatch, capsys):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert said in refusal(capsys, setup, "cpu")


def test_an_error_before_the_processes_meet_is_said_once_a_machine(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        script(fail)
    assert not capsys.readouterr().err
    monkeypatch.delenv("WORLD_SIZE")               # left over in a shell
    assert "no good" in refusal(capsys, fail)


# ------------------------------------------------------------------------------ what ends a process
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1])
def test_a_closed_terminal_and_a_cluster_s_warning_save_and_stop(number, world, tmp_path):
    work = training(world, tmp_path / "run", "--knn-every", 0)
    ended = before_call(2, lambda *_: os.kill(os.getpid(), number), work, train_moco, "train_step")

    def as_usual():
        signal.signal(number, signal.SIG_DFL)      # pytest itself may run under nohup
        ended()
    assert end(start(as_usual, tmp_path / "said")) == 128 + number
    assert "terminated after saving" in (tmp_path / "said").read_text()
    assert torch.load(tmp_path / "run/last.pt")["step"] == 2


def test_a_signal_that_nohup_ignores_stays_ignored(world, tmp_path):
    work = training(world, tmp_path / "run", "--knn-every", 0)

    def under_nohup():
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before_call(2, lambda *_: os.kill(os.getpid(), signal.SIGHUP), work, train_moco,
                    "train_step")()
    assert end(start(under_nohup)) == 0
    assert torch.load(tmp_path / "run/last.pt")["step"] == 4


def test_foreign_lines_of_a_log_do_not_keep_a_run_from_being_resumed(world, tmp_path):
    flags = ["--knn-every", 0]
    training(world, tmp_path / "run", *flags)()
    log = tmp_path / "run/log.jsonl"
    before = json_lines(log)
    log.write_bytes(b"nvidia-smi: 12%\n[]\n3\n" + log.read_bytes() + b'{"a": 1}\n\xff\n{"epoch": 1')
    training(world, tmp_path / "run", "--resume", *flags)()
    assert json_lines(log) == before


def test_without_stderr_there_is_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert list(progress(range(3), "reading", "image")) == [0, 1, 2]
    script(lambda: None)


def test_an_old_python_is_named_in_one_line():
    """By whatever script: all import support."""
    code = "import sys; sys.version_info = (3, 9, 18); import recipes"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                           cwd=genview.MINI.parents[1])
    assert ended.returncode == 2
    assert ended.stderr == "error: this needs Python 3.10 or newer, here is 3.9\n"


def test_an_evaluation_s_files_are_not_swept(world, tmp_path):
    """A run that is resumed removes what a kill left in its own folder."""
    for name in ("last.pt.7.tmp", "linear/last.pt.8.tmp"):
        path = tmp_path / "run" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("half")
    training(world, tmp_path / "run", "--knn-every", 0)()
    assert not (tmp_path / "run/last.pt.7.tmp").exists()
    assert (tmp_path / "run/linear/last.pt.8.tmp").exists()


# ----------------------------------------------------------------- what a second look has found
@pytest.mark.parametrize("module, flags", [
    (train_moco, ["--output-dir=run"]), (eval_linear, ["--checkpoint=last.pt"]),
    (generate_views, ["--dataset=cifar10"]),
    (eval_detection, ["--backbone=last.pt", "--data-dir=.", "--output-dir=run"])])
def test_processes_with_other_flags_are_named(module, flags, monkeypatch):
    """Before the work. They hang or abort in a collective call, or train what no flags say."""
    def gather(values, mine):
        values[:] = [mine, mine | {"--seed": 7}]
    monkeypatch.setattr(processes, "dist", SimpleNamespace(
        is_initialized=lambda: True, get_world_size=lambda: 2, all_gather_object=gather))
    with pytest.raises(UserError, match="process 1 finds --seed: 7, process 0: 0; start all with"):
        call(module, "--device=cpu", *flags)


def test_files_of_processes_may_lie_elsewhere_but_none_may_lack_them(monkeypatch):
    here = dict(views_dir="/a", output_dir="/b", workers=4, epochs=3)
    compared = []
    monkeypatch.setattr(processes, "compare_each", lambda flags, _: compared.append(flags))
    for there in (dict(), dict(views_dir="/c", output_dir="/d", workers=0), dict(views_dir="none"),
                  dict(epochs=4)):
        processes.compare_flags(SimpleNamespace(**here | there))
    one, moved, without, longer = compared
    assert one == moved and one != without and one != longer


def test_a_run_claims_its_folder_before_it_works(world, tmp_path, capsys):
    """It may make views and fit a foreground for hours. A run that fails early leaves no folder."""
    work = training(world, tmp_path / "run")
    with held(tmp_path / "run"):
        said = refusal(capsys, before_call(1, fail, work, train_moco, "load_data"))
    assert said.startswith("another process works in")
    said = refusal(capsys, before_call(1, fail, work, train_moco, "load_data"))
    assert said == "the third batch is no good" and not (tmp_path / "run").exists()


@pytest.mark.parametrize("change", [
    lambda state: state["model"].update(future=torch.zeros(1)),
    lambda state: state["model"].pop("queue"), lambda state: state.pop("statistics"),
    lambda state: state["optimizer"].clear(), lambda state: state.update(epoch="one")])
def test_a_checkpoint_of_another_version_is_named(change, world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    path = tmp_path / "run/last.pt"
    state = torch.load(path)
    change(state)
    torch.save(state, path)
    said = refusal(capsys, training(world, tmp_path / "run", "--resume"))
    assert said.startswith(f"{path} does not fit this training (")
    assert "of another version of this code; go on with that one, or begin a new run" in said


def test_a_checkpoint_whose_identity_is_none_is_refused(tmp_path):
    torch.save({"identity": None}, tmp_path / "last.pt")
    with pytest.raises(UserError, match="no checkpoint of such a run"):
        Checkpoint(tmp_path / "last.pt", {"--seed": 0}, None).load()


def test_a_run_whose_views_are_gone_says_so(world, tmp_path, capsys):
    shutil.copytree(world / "run", tmp_path / "run")
    said = refusal(capsys, training(world, tmp_path / "run", "--resume", "--views-dir", "none"))
    assert "with views is True there and False here" in said


def test_without_a_folder_for_temporary_files_nothing_waits(monkeypatch):
    """A loader's processes need one to hand over what they have read."""
    monkeypatch.setattr(tempfile, "tempdir", None)
    monkeypatch.setattr(tempfile, "_candidate_tempdir_list", lambda: ["/nowhere"])
    with pytest.raises(UserError, match="set TMPDIR"):
        setup("cpu")


@pytest.mark.parametrize("kind, what", [
    (training, "weights of --encoder"), (evaluation, "backbone"), (generation, "weights")])
def test_processes_with_other_models_are_named(kind, what, world, tmp_path, monkeypatch):
    """They would train, evaluate or generate with a mixture that no result shows."""
    def gather(values):
        return [values, values | {what: "others"} if isinstance(values, dict) else values]
    monkeypatch.setattr(processes, "gather_objects", gather)
    with pytest.raises(UserError, match=f"process 1 finds {what}: others, process 0: .*; all mach"):
        kind(world, tmp_path / "new")()


def test_batch_norm_is_over_all_gpus():
    """In each script; one GPU, or CPUs, which have no SyncBatchNorm, keep their own."""
    def kinds(world):
        network = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 1), torch.nn.BatchNorm2d(4))
        return [type(layer) for layer in world.synchronised(network)]
    gpus = processes.World(0, 2, torch.device("cuda"), torch.float32)
    assert kinds(gpus) == [torch.nn.Conv2d, torch.nn.SyncBatchNorm]
    for world in (gpus._replace(size=1), gpus._replace(device=torch.device("cpu"))):
        assert kinds(world) == [torch.nn.Conv2d, torch.nn.BatchNorm2d]


def test_the_training_synchronises_batch_norm(monkeypatch):
    class Two(processes.World):
        def distributed(self, network, **_):
            return network
    world = Two(0, 2, torch.device("cuda"), torch.float32)
    args = SimpleNamespace(start_batches=0, compile=False)
    method = torch.nn.ModuleDict({"query": torch.nn.Sequential(torch.nn.BatchNorm1d(4))})
    ready = train_moco.make_ready(method, None, args, world, fresh=True)
    assert isinstance(ready["query"][0], torch.nn.SyncBatchNorm)


def test_any_and_mean_over_processes(tmp_path):
    def work():
        world = setup("cpu")
        first = world.rank == 0
        assert world.any(first) and world.any(not first) and not world.any(False)
        assert world.mean(torch.tensor(float(world.rank))) == 0.5
    assert end(*start_two([work, work], tmp_path)) == [0, 0]


def test_when_a_training_saves(monkeypatch):
    """After so many minutes since it last did."""
    now = [0.0]
    monkeypatch.setattr(checkpoint.time, "monotonic", lambda: now[0])
    times = checkpoint.SaveTimes(15, CPU)

    def due_at(second):
        now[0] = float(second)
        return times.due()
    assert not due_at(899) and due_at(901)
    times.saved("last.pt", "the same command")
    assert not due_at(902) and not due_at(1800) and due_at(1802)
    times.end()


def test_the_newest_run_is_resumed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for number in (1, 2, 3):
        path = tmp_path / f"runs/x-{number}/last.pt"
        path.parent.mkdir(parents=True)
        path.touch()
        os.utime(path, (0, 100 if number == 2 else number))
    assert runs.choose_folder(None, "last", "x") == ("runs/x-2", "runs/x-2/last.pt")
    assert "the newest of 3 such runs" in capsys.readouterr().out


def test_how_long_processes_wait_for_each_other(monkeypatch, tmp_path):
    """Those of generate_views.py may end days apart."""
    found = {}

    def stop(*_, **options):
        found.update(options)
        raise UserError("asked")
    with monkeypatch.context() as patch:
        for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="x",
                                MASTER_PORT=1).items():
            patch.setenv(name, str(value))
        patch.setattr(processes.dist, "init_process_group", stop)
        with pytest.raises(UserError, match="asked"):
            call(generate_views, "--dataset=cifar10", "--device=cpu", "--limit=4")
        assert found["timeout"] == datetime.timedelta(days=7)
        with pytest.raises(UserError, match="asked"):
            setup("cpu")
        assert found["timeout"] == datetime.timedelta(minutes=30)


def test_what_decides_on_a_result_is_part_of_the_identity():
    training = {*recipes.FLAGS, "seed", "limit", "method", "dataset", "views", "quality", "gamma",
                "flip_foreground", "noise", "colour"} - {"knn_every"}
    assert not training & runs.FREE
    fitting = {"protocol", "labels", "k", "epochs", "batch_size", "optimizer", "lr", "backbone_lr",
               "drops", "augment", "seed", "limit", "image_size", "mean_std", "dataset", "arch"}
    assert not fitting & evaluations.FREE
