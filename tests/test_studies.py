"""The studies as modules; bench.py's table (not how fast things are); ablation.py's rows;
plot.py's curves."""
import functools
import importlib
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import tiny
import torch
from running import CPU, call, json_lines, refusal

import eval_linear
import generate_views
import genview
import recipes
import train_moco
from studies import ablation, bench, eval_quality, plot
from support.command_line import UserError, as_flag
from support.data import Images, open_image, to_tensor
from support.views import find_views


@pytest.mark.parametrize("name", ["ablation", "bench", "eval_generator", "eval_quality", "plot",
                                  "train_generator"])
def test_a_study_called_as_a_file_says_how_to_call_it(name):
    path = Path(ablation.__file__).with_name(f"{name}.py")
    done = subprocess.run([sys.executable, path], capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(f"error: call it from the root.*: python -m studies.{name}\n", done.stderr)


@pytest.mark.parametrize("module, flags, message", [
    (bench, ["speed"], "speed: the parts are steps"),
    (bench, ["--windows=2"], "--windows: 2 must be from 3"),
    (ablation, ["--dataset=shapes", "--rows", "copies"], "presets and the controls .* cifar10"),
    (ablation, ["--limit=100"], "--limit: 100 must be from 256"),
    (ablation, ["--methods", "dino"], "--methods: invalid choice: 'dino'")])
def test_refusals_are_one_line(module, flags, message, capsys):
    assert re.search(message, refusal(capsys, call, module, *flags))


# ------------------------------------------------------------------------------------------- bench
def test_times_are_medians_of_windows_in_turn(monkeypatch):
    """After a round to warm up, three windows: a takes 1, 3 and 2 s, b takes 5, 10 and 2 s."""
    calls, clock = [], iter([0, 90, 90, 99, 0, 1, 1, 6, 0, 3, 3, 13, 0, 2, 2, 4])
    monkeypatch.setattr(bench.time, "perf_counter", lambda: next(clock))
    rows = [bench.Timed("a", lambda: calls.append("a"), 1),
            bench.Timed("b", lambda: calls.append("b"), 10)]
    seconds = bench.seconds_per_image(rows, 3, lambda: None)
    assert "".join(calls) == "ab" * 4 and seconds == {"a": 2, "b": 0.5}          # of an image


def test_the_loops_train_the_same_network(monkeypatch):
    made = []

    class Recorded(bench.MoCoV2):
        def __init__(self, args):
            super().__init__(args)
            self.first_queue = self.queue
            made.append(self)
    monkeypatch.setattr(bench, "MoCoV2", Recorded)
    few = {"batch": 8, "count": 64, "arch": "resnet10_narrow"}
    bench.Training(CPU, **few).step()
    assert 0 < next(bench.plain_loop(CPU, **few)) < 20
    ours, plain = made
    assert [p.shape for p in ours.parameters()] == [p.shape for p in plain.parameters()]
    for method in made:                            # a gradient reached every weight
        assert all(p.grad.any() for p in method.query.parameters() if p.ndim > 1)
        assert torch.equal(method.queue[8:], method.first_queue[:-8])        # keys came into it


def test_a_loop_goes_on_where_it_is():
    assert [bench.next_step(itertools.count, 5) for _ in range(3)] == [5, 6, 7]


def test_generation_is_timed_both_ways():
    rows = list(bench.generation(CPU, count=2, steps=1))
    assert [row.name.split(",")[0] for row in rows] == ["generation", "... one image at a time"]
    for row in rows:
        row.function()
        assert row.images == 2


def test_the_table(capsys, monkeypatch):
    """Rows of time, which take turns, and rows of one value."""
    few = {"augmentation": {"count": 256}, "loader": {"count": 4, "batch": 2}}
    for name, options in few.items():
        monkeypatch.setitem(bench.PARTS, name, functools.partial(bench.PARTS[name], **options))
    call(bench, *few, "--device", "cpu")
    said = capsys.readouterr().out
    assert re.search(r"\| augmentation, two views of an image each \| [\d,.]+ \| 1\.00 \|", said)
    assert re.search(r"share of a step spent waiting \| \d+\.\d% \| \|\n", said)
    assert re.search(r"gap between two epochs, in steps \| \d+\.\d\d \| \|\n", said)
    assert all(value >= 0 for value in bench.knn_of_stream(torch.device("cpu"), 1024, 8))


def test_files_are_read_by_each_of_its_rows():
    rows = list(bench.files(CPU, count=1))
    for row in rows:
        row.function()
    assert len({row.name for row in rows}) == 5


# ---------------------------------------------------------------------------------------- ablation
@pytest.fixture
def runs(monkeypatch):
    """The ablation's commands are parsed by the scripts themselves; only their work is left out.
    Collects the parsed flags of the trainings."""
    trainings = []

    def run(command, **options):
        _, name, *flags = command
        stdout = "9 views made\n"
        if command[0] == "git":
            return SimpleNamespace(stdout="abc1234\n")
        script = importlib.import_module(name.removesuffix(".py"))
        if name == "eval_linear.py":
            args = eval_linear.parse_args(flags)
            assert args.limit == 10_000
            gain = 1.5 if "adaptive" in args.checkpoint else 0
            stdout = f"kNN top-1 {40 + args.seed + gain}%\nlinear top-1 50.0%, top-5 90.0%\n"
            if args.protocol == "finetune":
                assert args.resume                 # a killed one has left its last.pt
                stdout = f"finetune top-1 {100 * args.labels + gain}%, top-5 90.0%\n"
        elif name == "generate_views.py":
            args = generate_views.parse_args(flags)
            usual = recipes.GENERATION["mini"]
            assert (args.steps, args.guidance) == (usual["steps"], usual["guidance"])
        else:
            args = train_moco.parse_args(script.METHODS, argv=flags)
            trainings.append(args)
            Path(args.output_dir).mkdir(parents=True, exist_ok=True)
            log = [{"epoch": 1.0, "neg": 0.5}, {"epoch": args.epochs, "neg": 0.05}]
            Path(args.output_dir, "log.jsonl").write_text("\n".join(map(json.dumps, log)))
        return SimpleNamespace(returncode=0, stdout=stdout, stderr="")
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    return trainings


def test_ablation_runs_each_row_once_and_prints_the_gains(tmp_path, runs, capsys):
    flags = ["--rows", "plain", "adaptive", "extra", "quality", "--transformations", "flips",
             "flips+crops", "--output-dir", tmp_path, "--results", tmp_path / "results.jsonl"]
    for _ in range(2):                             # the second time nothing is left to do
        call(ablation, *flags, "--jobs", 2)
    assert len(runs) == len({args.output_dir for args in runs}) == 24
    rows = {args.output_dir.split("-")[-6]: (
        args.views_dir.rpartition("views-")[2], args.views, args.quality) for args in runs}
    assert rows == {
        "plain": ("none", "pair", "off"), "adaptive": ("adaptive", "pair", "off"),
        "quality": ("adaptive", "pair", "exact"), "extra": ("adaptive", "extra", "off")}
    assert {(args.crop_min, args.colour) for args in runs} == {(1, 0), (0.2, 0)}
    weighted = next(args for args in runs if args.quality == "exact")
    assert weighted.encoder == "mini"
    assert weighted.component == str(tmp_path / "views-adaptive/foreground.npz")
    lines = ablation.read_results(tmp_path / "results.jsonl")
    assert len(lines) == 24 and {line["neg"] for line in lines} == {0.05}
    capsys.readouterr()
    call(ablation, "--table", "--results", tmp_path / "results.jsonl")
    said = capsys.readouterr().out
    row = "| generated views, adaptive noise | 3 | 42.5 ± 1.0 | +1.5 ± 0.0 | 50.0 ± 0.0 | "
    assert said.count(row + "+0.0 ± 0.0 | 0.05 |\n") == 2


def test_scores_of_fine_tuning_are_added_to_trials_that_are_there(tmp_path, runs, capsys):
    """The training of a trial is resumed, which takes no time; its line is not written again."""
    results = tmp_path / "results.jsonl"
    flags = ["--rows", "plain", "adaptive", "--transformations", "flips", "--seeds", 0, 1,
             "--output-dir", tmp_path]
    call(ablation, *flags)
    first = ablation.read_results(results)
    for _ in range(2):                             # the second time nothing is left to do
        call(ablation, *flags, "--labels", 0.1, 0.01)
    lines = ablation.read_results(results)
    assert len(runs) == 8 and len(results.read_text().splitlines()) == 8
    assert [line["finetune-1"] for line in lines] == [1.0, 2.5, 1.0, 2.5]
    assert [line["finetune-10"] for line in lines] == [10.0, 11.5, 10.0, 11.5]
    for line, old in zip(lines, first, strict=True):
        assert {name: line[name] for name in old} == old
    capsys.readouterr()
    call(ablation, "--table", "--results", results)
    said = capsys.readouterr().out
    assert "| linear | gain | 10% of labels | gain | 1% of labels | gain | neg |\n" in said
    assert "| 11.5 ± 0.0 | +1.5 ± 0.0 | 2.5 ± 0.0 | +1.5 ± 0.0 | 0.05 |\n" in said


def test_jobs_share_the_cores_unless_the_user_says_how_many_threads(monkeypatch):
    monkeypatch.setattr(ablation.os, "cpu_count", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS")
    threads = ["-c", "import os; print(os.environ['OMP_NUM_THREADS'])"]
    assert ablation.call(2, *threads) == "4\n"
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert ablation.call(2, *threads) == "1\n"


def test_gains_are_paired_by_seed_within_one_machine_and_generator():
    """A run without a plain one of its seed does not count; 95%: t 4.30 of 3 values."""
    setting = dict.fromkeys(ablation.Trial._fields, "") | {"method": "mocov2"}
    lines = [setting | dict(row=row, seed=seed, hardware=machine, model=model, knn=knn)
             for row, seed, machine, model, knn in [
                 ("plain", 0, "a", "m", 40), ("plain", 1, "b", "m", 41),
                 ("copies", 0, "a", "m", 43), ("copies", 1, "a", "m", 9),
                 ("copies", 1, "b", "m", 43), ("copies", 1, "b", "n", 9)]]
    found = [ablation.gains(group, "copies", "knn")
             for group in ablation.by_setting(lines).values()]
    assert found == [[3], [2], []]
    assert ablation.half_interval([1, 2, 3]) == pytest.approx(4.30 / 3 ** 0.5)


@pytest.mark.parametrize("degrees, t", [(1, 12.71), (9, 2.26), (10, 2.228), (20, 2.086),
                                        (100, 1.984)])
def test_student_t_of_any_number_of_seeds(degrees, t):
    assert ablation.student_t95(degrees) == pytest.approx(t, abs=0.003)


def test_lines_of_the_results_that_are_torn_or_of_another_file(tmp_path):
    path = tmp_path / "results.jsonl"
    line = dict.fromkeys(ablation.Trial._fields, "") | {"hardware": "a", "knn": 1}
    path.write_text(json.dumps(line) + '\n{"dataset": "cif')
    assert ablation.read_results(path) == [line]
    path.write_text('{"epoch": 1}\n')
    with pytest.raises(UserError, match="without 'dataset': it holds no trials"):
        ablation.read_results(path)


def test_the_view_of_another_image_needs_one(monkeypatch):
    """Of its class, or of another one."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.tensor([0, 0, 1, 1, 1])
    for same_class in (True, False):
        other = eval_quality.partners(labels, same_class, generator)
        assert (other != torch.arange(5)).all()
        assert ((labels[other] == labels) == same_class).all()
    with pytest.raises(UserError, match="1 of the 4 images have no other one of the same class"):
        eval_quality.partners(labels[:3].repeat(2)[[0, 1, 2, 3]], True, generator)
    with pytest.raises(UserError, match="2 of the 2 images have no other one of another class"):
        eval_quality.partners(labels[:2], False, generator)


def test_the_preset_is_what_the_results_hold(capsys, tmp_path):
    """The command in docs/RESULTS.md has nothing left to do there; its table has no other runs."""
    results = Path(ablation.__file__).parents[1] / "docs/results.jsonl"
    call(ablation, "--preset", "gain", "--results", results, "--output-dir", tmp_path)
    said = capsys.readouterr().out
    assert said.count("flips+crops, 60 epochs") >= 2 and "generator longer" not in said
    assert said.count("| plain | 5 |") >= 4 and "| ... and quality weights | 3 |" in said


def test_a_tiny_ablation_on_shapes(tmp_path, monkeypatch, capsys):
    """The scripts themselves, in this process and on few images."""
    def run(command, **options):
        if command[0] == "git":
            return SimpleNamespace(stdout="")
        script = importlib.import_module(command[1].removesuffix(".py"))
        few = ["--batch-size=64"] if script is train_moco else ["--epochs=2"]
        capsys.readouterr()
        call(script, *command[2:], "--limit=256", *few)
        return SimpleNamespace(returncode=0, stdout=capsys.readouterr().out, stderr="")
    monkeypatch.setattr(ablation, "subprocess", SimpleNamespace(run=run))
    call(ablation, "--dataset", "shapes", "--rows", "plain", "--epochs", 1, "--seeds", 0,
         "--output-dir", tmp_path, "--results", tmp_path / "results.jsonl")
    line, = ablation.read_results(tmp_path / "results.jsonl")
    assert 0 < line["knn"] < 100 and 0 < line["linear"] < 100 and line["commit"] == "unknown"
    assert f"| plain | 1 | {line['knn']:.1f} |  | {line['linear']:.1f} |  |" in (
        capsys.readouterr().out)


def test_the_copies_are_what_the_autoencoder_keeps(tmp_path):
    """Each beside its own image: nearer to it than to any other, yet not the image itself."""
    data = tiny.save_images(tmp_path / "data", per_class=20)
    ablation.write_views(SimpleNamespace(data_dir=data, limit=10, output_dir=tmp_path / "runs",
                                        model="mini"), "copies")
    images = genview.load_images("cifar10", data, "train", 32)
    paths = find_views(images, tmp_path / "runs/views-copies", "cifar10")
    copies = {index: to_tensor(open_image(path)) for index, path in enumerate(paths) if path}
    assert len(copies) == 10
    for index, copy in copies.items():
        error = (copy.float() - images.pixels.float()).square().mean((1, 2, 3))
        assert error.argmin() == index and error.min() > 0


def test_real_images_as_extra_samples_are_those_of_the_other_data_set(tmp_path):
    data = tiny.save_images(tmp_path / "data", per_class=20)
    other = tiny.save_images(tmp_path / "other", per_class=30)
    args = SimpleNamespace(data_dir=data, limit=10, output_dir=tmp_path / "runs", real_dir=other)
    folder = ablation.write_views(args, "real")
    images = genview.load_images("cifar10", data, "train", 32)
    extra = genview.load_extra(images, folder, "cifar10")[0]
    assert torch.equal(extra, genview.load_images("folder", other, "train", 32, 10).pixels)


def test_too_few_real_images_are_named(tmp_path):
    data = tiny.save_images(tmp_path / "data")
    args = SimpleNamespace(data_dir=data, limit=24, output_dir=tmp_path / "runs",
                           real_dir=tiny.save_images(tmp_path / "other", per_class=5))
    with pytest.raises(UserError, match="--real-dir .*other has 10 images, 24 are needed"):
        ablation.write_views(args, "real")
    assert not (tmp_path / "runs").exists()


def test_another_image_of_the_same_class_is_never_the_image_itself():
    labels = torch.tensor([2, 0, 1, 0, 2, 2, 1, 0, 0, 2])
    partner = ablation.of_same_class(labels)
    assert sorted(partner.tolist()) == list(range(10))                 # each is a partner once
    for image, other in enumerate(partner.tolist()):
        assert other != image
        assert labels[other] == labels[image]


def test_smooth_noise_goes_as_far_as_the_view():
    """As far from the image as the view; a copy that is already further away is not changed."""
    image, copy, view = (torch.full((2, 3, 32, 32), value).byte() for value in (128, 130, 150))
    copy[1] = 190
    noisy = ablation.smooth(image, copy, view).float()
    distance = (noisy - 128).square().mean((1, 2, 3)).sqrt()
    assert distance[0].item() == pytest.approx(22, abs=0.5) and noisy[1].eq(190).all()
    assert noisy[0].std() > 10


def test_a_failing_row_is_named(tmp_path, monkeypatch):
    not_a_script = ablation.Method("MoCo v2", ablation.__file__, {})
    monkeypatch.setitem(ablation.METHODS, "mocov2", not_a_script)
    with pytest.raises(UserError, match="ablation.py .*--dataset=shapes .*--seed=0.*: error: call"):
        call(ablation, "--dataset", "shapes", "--rows", "plain", "--output-dir", tmp_path,
             "--results", tmp_path / "results.jsonl")
    assert not (tmp_path / "results.jsonl").exists()


# -------------------------------------------------------------------------------------------- plot
def test_gains_of_the_picture_are_of_the_machine_with_most_pairs():
    def line(machine, row, seed, knn, **other):
        setting = dict.fromkeys(ablation.Trial._fields, 0)
        setting |= dict(dataset="cifar10", method="mocov2", model="mini", transformations="all",
                        epochs=60)
        return setting | dict(hardware=machine, row=row, seed=seed, knn=knn) | other
    lines = [line("a", "plain", 0, 40), line("a", "adaptive", 0, 41),
             line("b", "plain", 0, 40), line("b", "adaptive", 0, 42),
             line("b", "plain", 1, 40), line("b", "adaptive", 1, 43),
             line("b", "adaptive", 2, 99), line("c", "adaptive", 0, 50, epochs=150),
             line("b", "plain", 0, 40, method="byol"), line("b", "smooth", 0, 40, method="byol")]
    assert plot.gains_of(lines) == {("all", 60, "adaptive"): [2, 3]}


def write_run(folder, label, *lines):
    folder.mkdir()
    (folder / "args.json").write_text(json.dumps({"label": label}))
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def drawn(figure):
    """{first word of a panel's title: {label: (epochs, values)}}."""
    return {panel.get_title().split(":")[0].split()[0]: {
        line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in panel.lines}
        for panel in figure.axes if panel.get_title()}


def test_curves_of_runs(tmp_path):
    """A run that went on from a checkpoint is one line, in order, with the last values."""
    pytest.importorskip("matplotlib")
    step = {"step": 2, "epoch": 0.5, "loss": 8.0, "chance": 7.5, "neg": 0.4, "lr": 0.1}
    later = step | {"step": 4, "epoch": 1.0, "loss": 6.0}
    a = write_run(tmp_path / "a", "MoCo v2", step, later, {"epoch": 1, "knn": 40.0},
                  step | {"step": 1, "epoch": 0.25, "loss": 9.0}, step | {"loss": 7.0},
                  later | {"loss": 5.0})
    b = write_run(tmp_path / "b", "BYOL", step | {"chance": 0.0, "loss": -1.0})
    with open(a / "log.jsonl", "a") as log:
        log.write('{"step": 3, "epo')              # a kill cut it short
    runs = [(plot.name_of(folder), plot.read_log(folder)) for folder in (a, b)]
    panels = drawn(plot.draw_runs(runs))
    assert panels.keys() == {"loss", "kNN", "neg", "learning"}         # none has pos or std
    assert panels["loss"]["a: MoCo v2"] == ([0.25, 0.5, 1.0], [9.0, 7.0, 5.0])
    assert panels["loss"]["b: BYOL"] == ([0.5], [-1.0])
    chance = [values for label, values in panels["loss"].items() if ": " not in label]
    assert chance == [([0.25, 0.5, 1.0], [7.5, 7.5, 7.5]), ([0.5], [0.0])]
    assert panels["kNN"] == {"a: MoCo v2": ([1], [40.0]), "b: BYOL": ([], [])}
    assert panels["neg"]["b: BYOL"] == ([0.5], [0.4])


@pytest.mark.parametrize("flags", [[], ["--runs", "{folder}/run", "{folder}/run"]])
def test_a_picture_as_a_user(tmp_path, flags):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "run", "MoCo v2", {"epoch": 1.0, "step": 1, "loss": 8.0})
    output = tmp_path / "new/picture.png"
    call(plot, "--output", output, *(flag.format(folder=tmp_path) for flag in flags))
    assert open_image(output).width > 400


@pytest.mark.parametrize("flags, message", [
    (["--runs", "{folder}/other"], "other holds no log.jsonl"),
    (["--runs", "{folder}/run"], "run/log.jsonl holds no epochs yet"),
    (["--results", "{folder}/none.jsonl"], "none.jsonl holds no trials to compare"),
    (["--output", "{folder}/gain.pdf"], "gain.pdf: the picture is a PNG"),
    ([], "this picture needs matplotlib: pip install matplotlib")])
def test_pictures_that_cannot_be_drawn(tmp_path, monkeypatch, capsys, flags, message):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)        # not installed
    write_run(tmp_path / "run", "MoCo v2")
    flags = [flag.format(folder=tmp_path) for flag in flags]
    assert message in refusal(capsys, call, plot, *flags)


# ----------------------------------------------------------------------- the row of extra samples
def test_originals_and_further_samples_are_one_pool(image_folder, tmp_path):
    """In memory as pixels, from files by their paths; from any folder of pictures."""
    images = genview.load_images("folder", image_folder, "train", 32)
    views = 255 - images.pixels
    pool = genview.expand(images, views)
    assert len(pool.names) == 48 and pool.labels[24:].eq(-1).all()
    assert torch.equal(pool.pixels, torch.cat([images.pixels, views]))
    of = f"{image_folder}/test/cat", "folder"
    files = Images(images.names, images.labels, 2, root=Path(image_folder))
    pool = genview.expand(files, genview.load_extra(files, *of)[0])
    assert len(pool.names) == len(pool.labels) == 36 and pool.pixels is None
    assert pool.root / pool.names[24] == Path(image_folder).resolve() / "test/cat/0000.png"
    cats = genview.load_images("folder", image_folder, "test", 32).pixels[:12]
    assert torch.equal(genview.load_extra(images, *of)[0], cats)
    larger = images._replace(pixels=torch.zeros(24, 3, 48, 48, dtype=torch.uint8))     # as stored
    assert genview.expand(larger, genview.load_extra(larger, *of)[0]).pixels.shape[2:] == (48, 48)
    with pytest.raises(UserError, match="holds no images for --views extra"):
        genview.load_extra(images, tmp_path, "folder")


def test_extra_samples_keep_the_number_of_steps(image_folder, views_folder, tmp_path):
    """As many steps as without, whatever the size of the pool; plain pairs, equal weights."""
    call(train_moco, "--dataset=folder", "--data-dir", image_folder, "--views-dir", views_folder,
         "--views=extra", "--image-size=32", "--arch=resnet10_narrow", "--batch-size=8",
         "--queue=16", "--epochs=2", "--output-dir", tmp_path, "--device=cpu")
    *_, last, knn = json_lines(tmp_path / "log.jsonl")
    assert last["step"] == 6 and "extra images" in knn["label"]      # 24 in batches of 8, twice
    assert json.loads((tmp_path / "args.json").read_text())["quality"] == "off"
    args = train_moco.parse_args(argv=["--dataset=cifar10", "--views=extra", "--views-dir=x"])
    assert args.output_dir.startswith("runs/cifar10-mocov2-extra-")


def test_damaged_lines_of_a_log_draw_nothing(tmp_path):
    """Those that a full disk, a kill or another program left in it."""
    good = b'{"epoch": 0.5, "loss": 2.0}\n'
    junk = b'\xff\xfe{"a"\n{x}\n["epoch"}\n[1]\n{"epoch": "x"}\n{"epoch": 1, "loss": "a"}\n'
    (tmp_path / "log.jsonl").write_bytes(good + junk + b'{"epoch": 1.5, "loss": 1.0}')
    assert plot.curve(plot.read_log(tmp_path), "loss") == ([0.5, 1.5], [2.0, 1.0])


@pytest.mark.parametrize("name, method, arch", [
    ("mocov2", "mocov2", "resnet10_narrow"), ("mocov3", "mocov3", "resnet10_narrow"),
    ("vit", "mocov3", "vit_narrow"), ("byol", "byol", "resnet10_narrow"),
    ("simsiam", "simsiam", "resnet10_narrow"), ("swav", "swav", "resnet10_narrow")])
def test_a_trial_is_what_its_line_says(name, method, arch, tmp_path):
    args = SimpleNamespace(output_dir=tmp_path, data_dir="d", model="mini")
    script = importlib.import_module(ablation.METHODS[name].script.removesuffix(".py"))
    for row in ("plain", "quality10", "opposite10"):
        trial = ablation.Trial("cifar10", name, "flips", row, 7, 512, "resnet10_narrow", "mini", 3)
        flags = ablation.training_flags(args, trial, tmp_path / "run")
        got = train_moco.parse_args(script.METHODS,
                                    argv=[f"{as_flag(k)}={x}" for k, x in flags.items()])
        assert (got.method, got.arch) == (method, arch)
        assert (got.epochs, got.limit, got.seed) == (7, 512, 3)
        assert got.gamma == {"plain": 1, "quality10": 10, "opposite10": -10}[row]


def test_a_trial_of_shapes_has_the_noise_of_its_row(tmp_path):
    for row, noise in (("noise0", 0), ("noise400", 400), ("adaptive", "adaptive")):
        trial = ablation.Trial("shapes", "mocov2", "all", row, 2, None, "", "mini", 0)
        flags = ablation.training_flags(SimpleNamespace(output_dir=tmp_path), trial, tmp_path / "r")
        argv = [f"{as_flag(k)}={x}" for k, x in flags.items()]
        assert train_moco.parse_args(argv=argv).noise == noise


def test_the_views_of_a_row_are_of_its_noise_and_generator(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(ablation, "call", lambda jobs, name, **flags: made.append(flags) or "x")
    args = SimpleNamespace(output_dir=tmp_path, data_dir="d", model="other", limit=300)
    for kind in ("0", "400", "adaptive"):
        ablation.write_views(args, kind)
        wanted = dict(noise=kind, views_dir=tmp_path / f"views-{kind}", model="other", limit=300)
        assert made[-1] | wanted == made[-1]


def test_the_control_with_smooth_noise_is_made_of_the_copies(monkeypatch):
    images = Images(["a", "b"], torch.zeros(2), 1, torch.full((2, 3, 32, 32), 128).byte())
    for name, stand_in in dict(
            load_pipeline=lambda *_: None, setup=lambda: CPU, reconstruct=lambda _, x: x + 2,
            write_views=lambda args, kind: kind, find_views=lambda images, folder, _: folder,
            views_into_memory=lambda images, folder: (images.pixels + 22, {})).items():
        monkeypatch.setattr(ablation, name, stand_in)
    noisy = ablation.make_control(SimpleNamespace(model="mini"), "smooth", images).float()
    distance = (noisy - 128).square().mean((1, 2, 3)).sqrt()
    assert distance.tolist() == pytest.approx([22, 22], abs=0.7) and noisy[0].std() > 10


def test_neg_is_of_the_last_epoch_alone(tmp_path):
    lines = [{"epoch": 19.0, "neg": 0.9}, {"epoch": 19.5, "neg": 0.1}, {"epoch": 20.0, "neg": 0.3},
             {"epoch": 20, "knn": 50.0}]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, lines)))
    assert ablation.mean_neg(tmp_path / "log.jsonl", 20) == 0.2
