"""From a flag to its effect: each flag of the training scripts, with what another value changes.

A row names a flag, the methods that it is tried with, a function that measures a tiny run, and what
this function must find for each value: a number, a text, or a range (low, high).
"""
import contextlib
import io
import math
import multiprocessing
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import coded
import numpy as np
import pytest
import tiny
import torch
from coded import COUNT, decoded, pixels_of
from PIL import Image
from running import call, json_lines, refusal
from torch import nn

import shapes
import train_byol
import train_moco
import train_swav
from quality_loss import quality_weights
from support.command_line import UserError

HERE = Path(__file__).parent
SCRIPTS = {train_moco: "mocov2 mocov3", train_byol: "byol simsiam", train_swav: "swav"}
SCRIPT_OF = {method: script for script, text in SCRIPTS.items() for method in text.split()}
EACH = "mocov2 byol swav"                          # one method of each script
ALL = "mocov2 mocov3 byol simsiam swav"
HIDDEN = ["--hidden=10", "--optimizer=sgd"]
SIZES = {"mocov2": ["--queue=16", "--start-batches=0"], "mocov3": HIDDEN, "byol": HIDDEN,
         "simsiam": HIDDEN,
         "swav": [*HIDDEN, "--prototypes=4", "--small-size=16", "--small-crops=0"]}
QUALITY = "--quality=exact --encoder={clip} --precision=float32"


# ----------------------------------------------------------------------------------- the tiny runs
@pytest.fixture(scope="module")
def places(tmp_path_factory, encoder_folder):
    """Folders of pictures by name, which stand in braces in the flags, and two encoders."""
    folder = tmp_path_factory.mktemp("flags")
    for name, flat in (("coded", False), ("flat", True), ("edged", True), ("bright", True),
                       ("broken", False)):
        coded.save(folder / name, flat=flat)
    coded.save(folder / "large", size=72)
    for name, left, right in (("edged", 60, 90), ("bright", 235, 235)):
        for path in (folder / name / "images").rglob("*.png"):
            picture = Image.new("RGB", (32, 32), (left,) * 3)
            picture.paste((right,) * 3, (16, 0, 32, 32))
            picture.save(path)
    (folder / "broken/images/train/a/06.png").write_bytes(b"no picture")
    tiny.clip_vision_model(seed=1).save_pretrained(folder / "clip2")
    component = torch.randn(32, generator=torch.Generator().manual_seed(5))
    np.savez(folder / "component.npz", component=component / component.norm(), threshold=0.0)
    names = ("coded", "flat", "edged", "bright", "broken", "large", "clip2", "component.npz")
    return {name.split(".")[0]: folder / name for name in names} | {"clip": encoder_folder}


@pytest.fixture(scope="module", autouse=True)
def small_world():
    """Shapes of 64 scenes in each split, and their encoder after 2 steps of training."""
    encoder = shapes.train_encoder(steps=2, batch=16)
    split = shapes.split
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shapes, "split", lambda name: shapes.Scene(*(x[:64] for x in split(name))))
        patch.setattr(shapes, "train_encoder", lambda **more: encoder)
        yield


class Runs:
    """Makes each run once: what arrived in its steps, its log, its folder, what it printed."""
    def __init__(self, places, folder):
        self.places, self.folder, self.made = places, folder, {}

    def __call__(self, method, flags, learn=False):
        key = method, flags, learn
        if key not in self.made:
            output = self.folder / str(len(self.made))
            self.made[key] = self.make(method, flags.format(**self.places).split(), output, learn)
            self.made[key].flags, self.made[key].again = flags, self
        return self.made[key]

    def make(self, method, flags, output, learn):
        flags = coded.flags_of(self.places["coded"], output, 32, "--epochs=1", f"--method={method}",
                               *SIZES[method], *flags)
        if "--dataset=shapes" in flags:            # which has neither
            flags = [flag for flag in flags if "start-batches" not in str(flag)]
        notes, said = [], io.StringIO()
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
            patch.setattr(train_moco, "train_step", noting(notes, output, learn))
            patch.setattr(torch, "save", lambda _, file: Path(file).touch())     # read by nobody
            patch.setattr(os, "fsync", lambda _: None)
            steps = coded.record(SCRIPT_OF[method], *flags, learn=True)
        for step, note in zip(steps, notes, strict=True):
            vars(step).update(note)
        return SimpleNamespace(
            steps=steps, method=steps[0].method if steps else None, folder=output,
            said=said.getvalue(), log=json_lines(output / "log.jsonl"))


def noting(notes, output, learn):
    """A training step that first notes what stands around it."""
    real = train_moco.train_step

    def train_step(method, *rest):
        notes.append({"children": len(multiprocessing.active_children()),
                      "saved": (output / "last.pt").exists(),
                      "weights": {name: p.detach().clone() for name, p in method.named_parameters()
                                  if learn}})
        return real(method, *rest) if learn else {"loss": torch.zeros(())}
    return train_step


@pytest.fixture(scope="module")
def runs(places, tmp_path_factory):
    return Runs(places, tmp_path_factory.mktemp("runs"))


# ------------------------------------------------------------------------- measures: of the views
def told(run):
    """What the views of each pair tell."""
    return [[decoded(view) for view in pair] for step in run.steps
            for pair in zip(*step.views[:2], strict=True)]


def smallest_area(run):
    return min(view.area for pair in told(run) for view in pair)


def generated(run):
    """The share of the views that are generated."""
    return sum(view.generated for pair in told(run) for view in pair) / len(told(run)) / 2


def of_both_kinds(run):
    """The share of the pairs of a picture and a generated view."""
    return sum(one.generated != two.generated for one, two in told(run)) / len(told(run))


def pictures(run):
    return len({one.picture for one, _ in told(run)})


def view_side(run):
    return run.steps[0].views[0].shape[-1]


def batch(run):
    return len(run.steps[0].views[0])


def small_crops(run):
    return len(run.steps[0].views) - 2


def small_side(run):
    return run.steps[0].views[2].shape[-1] if len(run.steps[0].views) > 2 else 0


def areas_of_small_crops(run):
    return [decoded(x).area for step in run.steps for views in step.views[2:] for x in views]


def smallest_small_area(run):
    return min(areas_of_small_crops(run), default=0)


def largest_small_area(run):
    return max(areas_of_small_crops(run), default=0.5)


def colours(run, view=0):
    """Mean colours (n, 3) of the views of one side; of flat pictures red is 180, green 60."""
    return torch.stack([pixels_of(x).mean((1, 2)) for step in run.steps for x in step.views[view]])


def recoloured(run):
    """The share of the views with another red."""
    return ((colours(run)[:, 0] - 180).abs() > 1).float().mean().item()


def strength_of_colours(run):
    """How far red moves where it does."""
    change = (colours(run)[:, 0] - 180).abs()
    return change[change > 1].median().item()


def dark(run, view):
    """The share of dark views of pictures of grey 235: 0.6 of it is 141. What solarisation turns is
    dark, and what SwAV's stronger jitter makes so."""
    return (colours(run, view).amax(1) < 128).float().mean().item()


def dark_1(run):
    return dark(run, 0)


def dark_2(run):
    return dark(run, 1)


def blurred(run, view):
    """The share of the views whose edge has values between its sides."""
    soft = []
    for step in run.steps:
        for x in step.views[view]:
            line = pixels_of(x)[0].mean(0)
            share = (line - line.min()) / (line.max() - line.min())
            soft.append(((share > 0.03) & (share < 0.97)).any().item())
    return sum(soft) / len(soft)


def blurred_1(run):
    return blurred(run, 0)


def blurred_2(run):
    return blurred(run, 1)


# ----------------------------------------------------------------- measures: of network and loss
def embedding(run):
    with torch.no_grad():
        return run.method.query.forward(run.steps[0].views[0]).shape[1]        # not compiled


def features(run):
    with torch.no_grad():
        return run.method.query.backbone(run.steps[0].views[0]).shape[1]


def hidden(run):
    """The widths of linear layers behind the backbone that are not embeddings' or prototypes'."""
    widths = {layer.out_features for name, layer in run.method.named_modules()
              if isinstance(layer, nn.Linear) and "backbone" not in name}
    return str(sorted(widths - {7, 9, 4, 6}))


def chance(run):
    return run.log[0]["chance"]


def loss_over_chance(run):
    return run.log[0]["loss"] / run.log[0]["chance"]


def first_other_loss(run):
    """The first step, from 0, whose loss is not that of a run whose queue is never filled."""
    flags = re.sub("--queue-after=\\d+", "--queue-after=99", run.flags)
    never = [line["loss"] for line in run.again("swav", flags, learn=True).log]
    losses = [line["loss"] for line in run.log]
    return next(i for i, loss in enumerate(losses) if loss != never[i])


def from_uniform_codes(run):
    """How far the loss is from the one whose codes are the same for all prototypes."""
    step, method = run.steps[0], run.method
    method.update(0.0)
    with torch.no_grad():
        loss = method(step.views, None, step.world)[0]
        z = nn.functional.normalize(method.query(torch.cat(step.views)), dim=1)
        rows = next(p for p in method.parameters() if p.shape == (4, 5))
        uniform = -(z @ rows.T / 0.1).log_softmax(1).mean()
    return (loss / uniform - 1).abs().item()


def moving_average(run):
    """m, by where weights of 0 move in a step if the learning ones are 1."""
    followers = [p for p in run.method.parameters() if not p.requires_grad]
    with torch.no_grad():
        for p in run.method.parameters():
            p.fill_(float(p.requires_grad))
    run.method.update(0.0)
    return 1 - max(p.mean().item() for p in followers)


def started(run):
    """Do batch norm's statistics at the first step come from pictures?"""
    means = [x for name, x in run.method.state_dict().items() if name.endswith("running_mean")]
    return str(any(x.any() for x in means))


def first_step_of_the_prototypes(run):
    """The first step, from 1, after which the prototypes are others; 0: none."""
    name = next(name for name, p in run.method.named_parameters() if p.shape == (4, 5))
    rows = [nn.functional.normalize(step.weights[name], dim=1) for step in run.steps]
    moved = [i for i, row in enumerate(rows) if not torch.allclose(row, rows[0], atol=1e-5)]
    return min(moved, default=0)


def compiled(run):
    return str(any(net._compiled_call_impl is not None for net in run.method.modules()))


# ------------------------------------------------------------ measures: of optimiser and schedule
def optimiser(run):
    return type(run.steps[0].optimizer).__name__


def decay(run):
    return run.steps[0].groups[0]["weight_decay"]


def first_rate(run):
    return run.steps[0].groups[0]["lr"]


def highest_rate(run):
    return max(step.groups[0]["lr"] for step in run.steps)


def last_rate(run):
    return run.steps[-1].groups[0]["lr"]


def highest_at(run):
    """The step, from 0, of the highest rate."""
    rates = [step.groups[0]["lr"] for step in run.steps]
    return rates.index(max(rates))


def steps(run):
    return len(run.steps)


def last_fraction(run):
    return run.steps[-1].fraction


# ------------------------------------------------------------------------ measures: of the quality
def has_quality(run):
    return str(run.steps[0].quality_of is not None)


def gamma(run):
    return run.steps[0].gamma


def ess(run):
    return run.log[0]["ess"]


def ess_over_that_by_hand(run):
    """ess of the log over that of weights by the recorded quality and gamma."""
    quality, _, _ = run.steps[0].quality_of(*run.steps[0].views[:2])
    w = quality_weights(quality, run.steps[0].gamma)
    by_hand = w.sum() ** 2 / w.square().sum() / len(w)
    return run.log[0]["ess"] / by_hand.item()


def features_of_quality(run):
    """The length of the component that the run keeps; 0: it keeps none."""
    file = run.folder / "component.npy"
    return len(np.load(file)) if file.exists() else 0


def along_the_file(run):
    """The cosine of the run's component and of the file's, of 32 numbers."""
    if features_of_quality(run) != 32:
        return 0
    kept = torch.from_numpy(np.load(run.folder / "component.npy"))
    wanted = torch.randn(32, generator=torch.Generator().manual_seed(5))
    return nn.functional.cosine_similarity(kept, wanted, dim=0).item()


# ------------------------------------------------------------------------- measures: of the runtime
def last_line(run):
    return run.said.splitlines()[-1]


def dtype(run):
    world = run.steps[0].world
    return f"{str(world.dtype).removeprefix('torch.')} {world.scaler.is_enabled()}"


def children(run):
    return max(step.children for step in run.steps)


def saved_after_a_step(run):
    return str(run.steps[1].saved)


def log_lines(run):
    return len([line for line in run.log if "step" in line])


def knn_lines(run):
    return str([line["epoch"] for line in run.log if "knn" in line])


def known_to_knn(run):
    """How many pictures the lines of kNN speak of."""
    found = re.search(r"epoch .*kNN top-1 [\d.]+%(?: by (.*) images)?", run.said)
    return (found[1] or "all") if found else "none"


# -------------------------------------------------------------------------------------- the table
class Row(NamedTuple):
    """cases: {value: what the measure must find}; None: without the flag, True: the flag alone.
    more: further flags, the same for all values; learn: the steps are taken."""
    flag: str
    methods: str
    measure: object
    cases: dict
    more: str = ""
    learn: bool = False


def cosine(peak, end, done):
    return end + (peak - end) * (1 + math.cos(math.pi * done)) / 2


PLAIN = "no kNN (plain {}, no generated views)"

# The first case of all these rows is one run, the second another, the third the last. A row of two
# cases begins again. So: 2 epochs of 4 steps of 4 pictures, 3 steps of 8, and the first again.
TOGETHER = [
    # data
    Row("--data-dir", ALL, generated,
        {"{coded}/images": 0.5, "{coded}/views": 1, "{coded}/images/": (0.2, 0.8)}),
    Row("--limit", ALL, pictures, {16: 16, None: 24, 17: (16, 24)}),
    # GenView: views, none, extra samples
    Row("--views-dir", ALL, of_both_kinds, {"{coded}/views": 1, "none": 0, "{coded}/views/": 0}),
    Row("--views", ALL, of_both_kinds, {None: 1, "pair": 0, "extra": 0}),
    Row("--quality", ALL, has_quality, {None: "True", "exact": "True", "off": "False"}),
    Row("--gamma", ALL, gamma, {None: 1, 2.5: 2.5, -1: -1}),
    Row("--encoder", ALL, features_of_quality, {"mini": 256, "{clip}": 32, None: 0}),
    Row("--component", ALL, along_the_file, {None: 0, "{component}": 1, False: 0}),
    # runtime
    Row("--precision", ALL, dtype, {"bfloat16": "bfloat16 False", "float16": "float16 True",
                                    "float32": "float32 False"}),
    Row("--compile", ALL, compiled, {None: "False", False: "False", True: "True"}),
    Row("--knn-every", ALL, knn_lines, {1: "[1, 2]", 0: "[]", 2: "[2]"}),
    Row("--knn-images", ALL, known_to_knn, {None: "all", False: "none", 10: "10 of 17"}),
    Row("--save-minutes", ALL, saved_after_a_step, {0: "True", 15: "False"}),
    Row("--log-every", ALL, log_lines, {1: 8, 2: 2}),
    # recipe: views
    Row("--crop-min", ALL, smallest_area, {0.6: (0.5, 0.75), 0.1: (0.06, 0.3)}),
    Row("--image-size", ALL, view_side, {24: 24, 32: 32}),
    Row("--batch-size", ALL, batch, {4: 4, 8: 8}),
    Row("--small-crops", "swav", small_crops, {1: 1, 3: 3, 0: 0}),
    Row("--small-size", "swav", small_side, {16: 16, 24: 24, 20: 0}),
    Row("--small-min", "swav", smallest_small_area,
        {0.3: (0.25, 0.45), 0.05: (0.03, 0.08), 0.2: 0}),
    Row("--crop-min", "swav", largest_small_area, {0.6: (0.42, 0.65), 0.1: (0.06, 0.15)}),
    # recipe: networks
    Row("--arch", "mocov2 mocov3 byol simsiam", features, {"vit_narrow": 96,
                                                           "resnet10_narrow": 128}),
    Row("--dim", ALL, embedding, {7: 7, 9: 9}),
    Row("--hidden", "mocov3 byol simsiam swav", hidden, {10: "[10]", 11: "[11]"}),
    Row("--queue", "mocov2", chance, {16: math.log(17), 24: math.log(25)}),
    Row("--prototypes", "swav", chance, {4: math.log(4), 6: math.log(6)}),
    Row("--temperature", "mocov3", chance, {0.5: 2 * math.log(4), 1: 4 * math.log(8)}),
    Row("--momentum", "mocov2 mocov3 byol", moving_average, {0.5: 0.5, 0.9: 0.9}),
    Row("--start-batches", "mocov2", started, {0: "False", 1: "True"}),
    # recipe: optimisation
    Row("--optimizer", ALL, optimiser, {"lars": "LARS", "adamw": "AdamW", "sgd": "SGD"}),
    Row("--lr", ALL, highest_rate, {0.32: 0.32 * 4 / 256, 0.64: 0.64 * 8 / 256}),
    Row("--final-lr", "swav", last_rate, {0.16: cosine(0.32 / 64, 0.16 / 64, 0.75),
                                          0: cosine(0.64 / 32, 0, 2 / 3)}),
    Row("--weight-decay", ALL, decay, {0.125: 0.125, 0.25: 0.25}),
    Row("--warmup-epochs", ALL, highest_at, {1: 4, 0: 0}),
    Row("--epochs", ALL, steps, {2: 8, 1: 3}),
    Row("--epochs", ALL, last_fraction, {2: 7 / 8, 1: 2 / 3})]

# Rows whose cases are runs of their own.
FLAT = "--data-dir={flat}/images --crop-min=1 --blur=0 --epochs=2"
EDGED = "--data-dir={edged}/images --crop-min=1 --colour=1 --epochs=2"
BRIGHT = "--data-dir={bright}/images --crop-min=1 --colour=1 --blur=0 --epochs=2"
NEVER, ALWAYS = (0, 1e-9), (0.7, 1)                # a blur of a third of a pixel is not seen
ROWS = [
    Row("--dataset", "mocov2", first_rate,
        {"folder": 0.03 / 32, "cifar10": 0.06 / 32, "shapes": 0.004 / 32}, "--warmup-epochs=0"),
    Row("--dataset", "byol", first_rate, {"folder": 0.3 / 32, "cifar10": 0.06 / 32},
        "--warmup-epochs=0"),
    Row("--dataset", "swav", first_rate, {"folder": 0.6 / 32, "cifar10": 0.06 / 32},
        "--warmup-epochs=0"),
    Row("--method", "mocov2", last_line, {"mocov2": PLAIN.format("MoCo v2"),
                                          "mocov3": PLAIN.format("MoCo v3")}),
    Row("--method", "byol", last_line, {"byol": PLAIN.format("BYOL"),
                                        "simsiam": PLAIN.format("SimSiam")}),
    Row("--method", "swav", last_line, {"swav": PLAIN.format("SwAV")}),
    Row("--gamma", EACH, ess, {0: 1, 20: (0, 0.999)}, QUALITY, learn=True),
    Row("--gamma", EACH, ess_over_that_by_hand, {0: 1, 20: 1}, QUALITY, learn=True),
    Row("--workers", EACH, children, {0: 0, 2: 2},
        "--data-dir={large}/images --image-size=72 --limit=8"),
    Row("--colour", EACH, recoloured, {0: NEVER, 0.4: (0.15, 0.5), 1: (0.7, 1)}, FLAT),
    Row("--colour", "mocov2 byol", strength_of_colours, {0.4: (2, 22), 1: (22, 60)}, FLAT),
    Row("--colour", "swav", strength_of_colours, {0.4: (5, 40), 1: (40, 90)}, FLAT),
    Row("--colour", "mocov3 byol", dark_2, {0: NEVER, 1: (0.04, 0.45)}, BRIGHT),
    Row("--method", "mocov2", dark_2, {"mocov2": NEVER, "mocov3": (0.04, 0.45)}, BRIGHT),
    Row("--method", "byol", dark_2, {"simsiam": NEVER, "byol": (0.04, 0.45)}, BRIGHT),
    Row("--method", "mocov2", dark_1, {"mocov2": NEVER, "mocov3": NEVER}, BRIGHT),
    Row("--method", "byol", dark_1, {"simsiam": NEVER, "byol": NEVER}, BRIGHT),
    Row("--method", "swav", dark_1, {"swav": (0.04, 0.45)}, BRIGHT),
    Row("--blur", "mocov2 simsiam swav", blurred_1, {0: NEVER, 1: ALWAYS}, EDGED),
    Row("--blur", "mocov2 simsiam swav", blurred_2, {0: NEVER, 1: ALWAYS}, EDGED),
    Row("--blur", "mocov3 byol", blurred_1, {0: NEVER, 0.2: (0.1, 0.6), 0.5: ALWAYS}, EDGED),
    Row("--blur", "mocov3 byol", blurred_2, {0: NEVER, 0.2: (0, 0.2), 1: (0.04, 0.4)}, EDGED),
    Row("--arch", "swav", features, {"resnet10_narrow": 128, "vit_narrow": 96}),
    Row("--queue", "swav", first_other_loss, {8: 1, 16: 2}, "--queue-after=0", learn=True),
    Row("--queue-after", "swav", first_other_loss, {0: 1, 1: 4}, "--queue=8 --epochs=2",
        learn=True),
    Row("--temperature", "mocov2", loss_over_chance, {0.02: (0, 0.5), 1000: (0.99, 1.01)},
        learn=True),
    Row("--temperature", "mocov3 swav", loss_over_chance, {0.02: (1.2, 99), 1000: (0.99, 1.01)},
        learn=True),
    Row("--epsilon", "swav", from_uniform_codes, {100: (0, 0.003), 0.01: (0.01, 9)}, "--dim=5"),
    Row("--freeze-epochs", "swav", first_step_of_the_prototypes, {0: 1, 1: 4},
        "--dim=5 --warmup-epochs=0 --epochs=2 --lr=3", learn=True)]

# Flags that tests of their own hold, here or elsewhere.
TESTS = {
    "--skip-bad": "test_flags.py::test_skip_bad", "--seed": "test_flags.py::test_seed",
    "--flip-foreground": "test_flags.py::test_flip_foreground",
    "--device": "test_flags.py::test_device",
    "--noise": "test_flags.py::test_noise", "--output-dir": "test_flags.py::test_output_dir",
    "--resume": "test_kill.py::test_training_killed_at_random",
    "--print-recipe": "test_flags.py::test_print_recipe"}

# Flags that are settings of other methods.
REFUSED = {
    "mocov2": "final-lr hidden queue-after prototypes epsilon freeze-epochs small-crops small-size "
              "small-min",
    "mocov3": "final-lr queue queue-after prototypes epsilon freeze-epochs start-batches "
              "small-crops small-size small-min",
    "byol": "final-lr queue queue-after prototypes temperature epsilon freeze-epochs start-batches "
            "small-crops small-size small-min",
    "simsiam": "final-lr queue queue-after prototypes temperature epsilon freeze-epochs "
               "start-batches small-crops small-size small-min momentum",
    "swav": "momentum start-batches"}


def expected(wanted, found):
    if isinstance(wanted, tuple):
        return wanted[0] <= found <= wanted[1]
    if isinstance(wanted, str):
        return found == wanted
    return found == pytest.approx(wanted, rel=1e-3, abs=1e-4)


def given(flag, value):
    """The flag with this value, as it is typed."""
    if value is None or value is False:
        return ""
    return flag if value is True else f"{flag}={value}"


def together(method, number):
    """The flags of the run of this number of all the rows in TOGETHER."""
    flags = {}
    for row in TOGETHER:
        if method in row.methods.split():
            values = list(row.cases)
            flag = given(row.flag, values[number % len(values)])
            assert flags.setdefault(row.flag, flag) == flag
    return " ".join(flags.values())


def rows_and_methods(rows):
    return [pytest.param(row, method, id=f"{row.flag[2:]}-{row.measure.__name__}-{method}")
            for row in rows for method in row.methods.split()]


@pytest.mark.parametrize("row, method", rows_and_methods(TOGETHER))
def test_effect_beside_others(row, method, runs):
    wanted = list(row.cases.values())
    for number in range(3):
        found = row.measure(runs(method, together(method, number)))
        assert expected(wanted[number % len(wanted)], found), (number, found)


@pytest.mark.parametrize("row, method", rows_and_methods(ROWS))
def test_effect(row, method, runs):
    for value, wanted in row.cases.items():
        kind = value if row.flag == "--method" else method
        found = row.measure(runs(kind, f"{row.more} {given(row.flag, value)}", row.learn))
        assert expected(wanted, found), (value, found)


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_each_flag_has_a_row(script, capsys):
    """Each flag of the script, and no other; a test that holds it exists and speaks of it."""
    with pytest.raises(SystemExit):
        call(script, "--help")
    usage = capsys.readouterr().out.split("\n\n")[0]
    flags = set(re.findall(r"\[(--[a-z-]+)", usage))
    methods = SCRIPTS[script].split()
    rows = {row.flag for row in TOGETHER + ROWS if set(row.methods.split()) & set(methods)}
    refused = set.intersection(*({f"--{name}" for name in REFUSED[x].split()} for x in methods))
    assert len(flags) > 40 and not rows & refused
    assert flags == rows | refused | TESTS.keys()
    for flag, place in TESTS.items():
        file, name = place.split("::")
        body = re.search(rf"^def {name}\(.*?(?=\n\n\n|\Z)", (HERE / file).read_text(), re.M | re.S)
        assert body and flag in body[0], place


@pytest.mark.parametrize("method", REFUSED)
def test_settings_of_other_methods_are_refused(method, tmp_path, capsys):
    for name in REFUSED[method].split():
        flags = [f"--method={method}", "--dataset=folder", f"--data-dir={tmp_path}",
                 "--views-dir=none", f"--output-dir={tmp_path / 'run'}", f"--{name}=1"]
        line = refusal(capsys, call, SCRIPT_OF[method], *flags)
        assert line == f"--{name} is not a setting of {method} with --dataset folder"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------- flags with own tests
def test_the_usual_encoder_depends_on_the_size():
    for size, encoder in ((32, "mini"), (64, "clip"), (224, "clip")):
        args = train_moco.parse_args(argv=["--dataset=folder", "--data-dir=x", "--views-dir=none",
                                           f"--image-size={size}"])
        assert args.encoder == encoder


each_method = pytest.mark.parametrize("method", EACH.split())


def qualities(run):
    """s_f and s_b of the first pairs."""
    step = run.steps[0]
    return step.quality_of(*step.views[:2])[1:]


@each_method
def test_flip_foreground(method, runs):
    """Swaps what is foreground and what is background; and the encoder decides them."""
    s_f, s_b = qualities(runs(method, QUALITY))
    assert (s_f - s_b).abs().max() > 1e-3
    turned_f, turned_b = qualities(runs(method, f"{QUALITY} --flip-foreground"))
    torch.testing.assert_close(turned_f, s_b, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(turned_b, s_f, atol=1e-5, rtol=1e-4)
    other, _ = qualities(runs(method, "--quality=exact --encoder={clip2}"))
    assert (other - s_f).abs().max() > 1e-3
    other, _ = qualities(runs(method, f"{QUALITY} --component={{component}}"))
    assert (other - s_f).abs().max() > 1e-3


@each_method
def test_seed(method, runs):
    """Sets the first weights and the first crops."""
    seeds = [runs(method, flag) for flag in ("--seed=0", "", "--seed=1")]
    first, default, other = ([next(run.method.query.parameters()), run.steps[0].views[0]]
                             for run in seeds)
    for mine, same, others in zip(first, default, other, strict=True):
        assert torch.equal(mine, same) and not torch.equal(mine, others)


@each_method
def test_skip_bad(method, runs):
    """One picture of the 24 is damaged."""
    with pytest.raises(UserError, match="cannot be read as an image.*--skip-bad"):
        runs(method, "--data-dir={broken}/images")
    run = runs(method, "--data-dir={broken}/images --skip-bad --crop-min=1 --batch-size=4")
    assert 18 < pictures(run) < COUNT and 6 not in {one.picture for one, _ in told(run)}


@each_method
def test_output_dir(method, places, tmp_path, monkeypatch, capsys):
    """Without it runs/ gets a folder named after the run, and --resume finds the newest such."""
    monkeypatch.chdir(tmp_path)
    flags = coded.flags_of(places["coded"], "given", 32, "--epochs=1", f"--method={method}",
                           *SIZES[method], "--limit=8")
    assert len(coded.record(SCRIPT_OF[method], *flags)) == 1
    assert (tmp_path / "given/last.pt").exists() and not (tmp_path / "runs").exists()
    at = flags.index("--output-dir")
    del flags[at:at + 2]
    coded.record(SCRIPT_OF[method], *flags)
    folder, = (tmp_path / "runs").iterdir()
    assert re.fullmatch(rf"folder-{method}-plain-\d+-\d+-\d+", folder.name)
    assert {path.name for path in folder.iterdir()} == {
        "last.pt", "backbone.pt", "log.jsonl", "args.json", "pairs.png"}
    assert coded.record(SCRIPT_OF[method], *flags, "--resume") == []
    assert [*(tmp_path / "runs").iterdir()] == [folder]
    assert coded.record(SCRIPT_OF[method], *flags, "--resume=given/last.pt") == []


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_print_recipe(script, tmp_path, capsys):
    """A row for each setting of the method, and nothing else happens."""
    for method in SCRIPTS[script].split():
        with pytest.raises(SystemExit) as stop:
            call(script, "--print-recipe", "--dataset=folder", f"--method={method}", "--epochs=7",
                 f"--output-dir={tmp_path / 'run'}")
        rows = dict(line.split()[:2] for line in capsys.readouterr().out.splitlines())
        assert not stop.value.code and not (tmp_path / "run").exists()
        assert rows["--epochs"] == "7" and "--lr" in rows
        assert not rows.keys() & {f"--{name}" for name in REFUSED[method].split()}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.__name__)
def test_device(script, places, runs, tmp_path, capsys):
    """The one that is named, or a refusal."""
    method = SCRIPTS[script].split()[0]
    assert runs(method, "--device=cpu").steps[0].world.device.type == "cpu"
    flags = coded.flags_of(places["coded"], tmp_path / "run", 32, "--device=meta", *SIZES[method])
    assert "--device meta is not available" in refusal(capsys, call, script, *flags)


@each_method
def test_noise(method, places, tmp_path, monkeypatch):
    """Of shapes: the level that the scenes are perturbed by; more of it changes the views more."""
    levels, far, perturb = [], [], shapes.perturb

    def noting_levels(scenes, level, generator):
        levels.append(level)
        return perturb(scenes, level, generator)
    monkeypatch.setattr(shapes, "perturb", noting_levels)
    for noise in ("adaptive", "0", "900"):
        sizes = [flag for flag in SIZES[method] if "start-batches" not in flag]
        flags = coded.flags_of(places["coded"], tmp_path / noise, 32, "--epochs=1", "--crop-min=1",
                               f"--method={method}", *sizes, "--dataset=shapes", "--limit=16",
                               "--quality=off", f"--noise={noise}")
        del flags[flags.index("--views-dir=none")]
        step = coded.record(SCRIPT_OF[method], *flags)[0]
        one, two = step.views[:2]
        plain, mirrored = ((one - x).abs().mean((1, 2, 3)) for x in (two, two.flip(3)))
        far.append(torch.minimum(plain, mirrored).mean().item())
    assert levels[1:] == [0, 900] and far[1] < 0.8 * far[2]
    assert set(levels[0].tolist()) <= {0, 100, 200, 300, 400}
