"""What each flag of generate_views.py changes: in the calls of the pipeline, in the files written,
in the preview. And what train_moco.py's own frozen encoder sees."""
import contextlib
import json
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from running import call, json_lines, refusal

import generate_views
import genview
import train_moco
from support.augment import CLIP_MEAN, CLIP_STD

COUNT = 24                                         # training pictures of image_folder
LEVELS = (0, 100, 200, 300, 400)


# ---------------------------------------------------------------------------------- runs, watched
@contextlib.contextmanager
def watched_pipeline():
    """Yields the list of all calls of Stable unCLIP meanwhile: its keyword arguments, the pipeline
    and the images that it returned (n, 3, H, W)."""
    import diffusers
    kind, calls = diffusers.StableUnCLIPImg2ImgPipeline, []
    real = kind.__call__

    def watched(self, *images, **options):
        seeds = [generator.initial_seed() for generator in options["generator"]]
        result = real(self, *images, **options)
        calls.append(SimpleNamespace(pipe=self, seeds=seeds, images=result.images.float(),
                                     **{k: x for k, x in options.items() if k != "generator"}))
        return result
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "__call__", watched)
        yield calls


def generate(folder, *flags):
    """A run of generate_views.py into this folder: its calls, lines and pictures."""
    with watched_pipeline() as calls:
        call(generate_views, *flags, "--views-dir", folder)
    lines = json_lines(folder / "manifest.jsonl")
    views = {line["source"]: view_of(folder, line["source"]) for line in lines}
    with np.load(folder / "foreground.npz") as saved:
        v1, alpha = torch.from_numpy(saved["component"]), float(saved["threshold"])
    return SimpleNamespace(
        calls=calls, lines={line["source"]: line for line in lines}, views=views, v1=v1,
        alpha=alpha, folder=folder, settings=json.loads((folder / "settings.json").read_text()))


def view_of(folder, source):
    [path] = Path(folder, source).parent.glob(Path(source).stem + ".*")
    return Image.open(path)


@pytest.fixture(scope="module")
def run(tmp_path_factory, image_folder, pipeline_folder):
    """A run with these flags, after the usual ones; each is done once."""
    done = {}
    usual = ["--dataset=folder", "--data-dir", image_folder, "--model", pipeline_folder,
             "--steps=2", "--guidance=3", "--device=cpu"]

    def run(*flags):
        if flags not in done:
            done[flags] = generate(tmp_path_factory.mktemp("views"), *usual, *flags)
        return done[flags]
    run.usual = usual
    return run


@pytest.fixture(scope="module")
def by_hand(run, image_folder):
    """{source: (tokens (64, 32), embedding (16,))} of the training pictures, by CLIP alone."""
    clip, known = run("--batch-size=4"), {}
    pipe = clip.calls[0].pipe
    for path in sorted(Path(image_folder, "train").rglob("*.png")):
        pixels = pipe.feature_extractor(images=Image.open(path), return_tensors="pt")
        with torch.no_grad():
            out = pipe.image_encoder(**pixels)
            tokens = pipe.image_encoder.vision_model.post_layernorm(out.last_hidden_state[0, 1:])
        known[str(path.relative_to(image_folder))] = tokens, out.image_embeds[0]
    return known


def arrived(made):
    """(call, place in it, line of the manifest) of each image that was generated."""
    by_seed = {line["seed"]: line for line in made.lines.values()}
    return [(one, i, by_seed[seed]) for one in made.calls for i, seed in enumerate(one.seeds)]


def option(name):
    """What reads this option of the calls, which must be the same in all of them."""
    def read(made):
        [value] = {getattr(one, name) for one in made.calls}
        return value
    return read


# ------------------------------------------------------------------------------ what the model gets
def test_each_call_is_of_one_level_that_of_the_manifest(run):
    made = run("--batch-size=4")
    assert len(made.lines) == COUNT == sum(len(one.seeds) for one in made.calls)
    assert len({one.noise_level for one in made.calls}) >= 3
    assert all(one.noise_level == line["noise_level"] for one, _, line in arrived(made))
    assert max(len(one.seeds) for one in made.calls) == 4


def test_levels_are_those_of_the_tokens(run, by_hand):
    """Of the shares of tokens above alpha, counted by hand; about FRACTION of all the tokens."""
    made = run("--batch-size=4")
    shares = []
    for source, line in made.lines.items():
        share = (by_hand[source][0] @ made.v1 > made.alpha).float().mean().item()
        assert line["proportion"] == pytest.approx(share, abs=0.02)          # a token at the border
        assert line["noise_level"] == 100 * min(int(max(line["proportion"] - 1e-6, 0) / 0.2), 4)
        shares.append(share)
    assert np.mean(shares) == pytest.approx(0.4, abs=0.01)


@pytest.mark.parametrize("flag", ["--batch-size=4", "--limit=5"])    # 5 do not fill CLIP's batch
def test_the_embedding_is_that_of_the_picture_named(run, by_hand, flag):
    made, others = run(flag), torch.stack([c for _, c in by_hand.values()])
    for one, i, line in arrived(made):
        c = one.image_embeds[i]
        assert torch.allclose(c, by_hand[line["source"]][1], atol=1e-3)
        nearest = (others - c).square().sum(1).argmin()
        assert list(by_hand)[nearest] == line["source"]


def test_what_the_model_returns_is_written_under_the_source(run):
    made = run("--batch-size=4")
    for one, i, line in arrived(made):
        pixels = (one.images[i].permute(1, 2, 0) * 255).round().numpy()
        assert np.array_equal(np.asarray(made.views[line["source"]]), pixels)


def test_the_prompt_is_empty_for_all(run):
    for one in run("--batch-size=4").calls:
        empty = one.pipe.encode_prompt("", torch.device("cpu"), 1, False)[0]
        for prompt in (one.prompt_embeds, one.negative_prompt_embeds):
            assert torch.equal(prompt, empty.repeat(len(one.seeds), 1, 1))


@pytest.mark.parametrize("flags, values", [
    (["--limit=2"], dict(guidance_scale=3, num_inference_steps=2, height=32, width=32)),
    (["--limit=2", "--guidance=1.5", "--steps=3", "--size=40", "--noise=250"],
     dict(guidance_scale=1.5, num_inference_steps=3, height=40, width=40, noise_level=250)),
    (["--limit=2", "--noise=0"], dict(noise_level=0)),
    (["--limit=2", "--noise=999"], dict(noise_level=999))])
def test_numbers_arrive(run, flags, values):
    made = run(*flags)
    assert {name: option(name)(made) for name in values} == values
    if "noise_level" in values:
        assert {x["noise_level"] for x in made.lines.values()} == {values["noise_level"]}


def test_more_steps_are_taken(run):
    """By the U-Net: one call a step."""
    counts = []
    for steps in (2, 5):
        made = run("--limit=2", f"--steps={steps}")
        counts.append(len(made.calls[0].pipe.scheduler.timesteps))
    assert counts == [2, 5]


def test_defaults_are_the_releases_and_the_miniatures_own(run, tmp_path, image_folder):
    """Stable unCLIP: 20 steps, guidance 10. For CIFAR the miniature: 2 steps, guidance 1.25."""
    stable = generate(tmp_path / "stable", *run.usual[:5], "--limit=1", "--device=cpu")
    mini = generate(tmp_path / "mini", "--dataset=cifar10", "--data-dir", image_folder, "--limit=1",
                    "--device=cpu", "--fit-images=8")
    for made, steps, guidance in [(stable, 20, 10), (mini, 2, 1.25)]:
        assert option("num_inference_steps")(made) == steps
        assert option("guidance_scale")(made) == guidance
        assert made.settings["precision"] == "float32" and made.settings["noise"] == "adaptive"
    assert stable.settings["fit_images"] == genview.FIT_IMAGES == 10_000
    assert (mini.settings["model"], mini.settings["save_size"]) == ("mini", 32)
    assert mini.settings["dataset"] == "cifar10" and stable.settings["dataset"] == "folder"


# ------------------------------------------------------------------------------------ single flags
def test_another_seed_gives_every_picture_another(run):
    one, other, again = (run("--limit=6", f"--seed={seed}", f"--batch-size={n}")
                         for seed, n in [(0, 6), (1, 6), (0, 2)])
    for source, line in one.lines.items():
        assert line["seed"] not in {x["seed"] for x in other.lines.values()}
        assert not np.array_equal(one.views[source], other.views[source])
        assert line["seed"] == again.lines[source]["seed"]
        assert line["proportion"] == other.lines[source]["proportion"]
    assert len({line["seed"] for line in one.lines.values()}) == 6


def test_batch_size_is_that_of_the_calls(run):
    def sizes(*flags):
        return [len(one.seeds) for one in run("--noise=100", *flags).calls]
    assert sizes("--limit=7", "--batch-size=3") == [3, 3, 1]
    assert sizes("--limit=7") == [7]               # on a CPU 64,
    assert sizes("--limit=2", "--size=72") == [1, 1]                 # or 1 for large pictures


@pytest.mark.parametrize("flags, size, suffix", [
    ([], 32, ".png"), (["--size=48"], 48, ".png"), (["--save-size=20"], 20, ".png"),
    (["--size=72"], 72, ".jpg"), (["--save-size=70"], 70, ".jpg")])
def test_saved_size(run, flags, size, suffix):
    made = run("--limit=2", "--noise=100", *flags)
    for one, i, line in arrived(made):
        view = made.views[line["source"]]
        assert view.size == (size, size) and view.filename.endswith(suffix)
        mean = one.images[i].mean((1, 2)) * 255    # the picture itself, not a part of it
        assert np.asarray(view).mean((0, 1)) == pytest.approx(mean.numpy(), abs=4)


def test_precision_is_that_of_all_networks(run):
    for precision in ("float32", "bfloat16"):
        made = run("--limit=2", f"--precision={precision}")
        [one, *_] = made.calls
        dtypes = {one.pipe.unet.dtype, one.pipe.vae.dtype, one.pipe.image_encoder.dtype,
                  one.image_embeds.dtype}
        assert dtypes == {getattr(torch, precision)} and made.settings["precision"] == precision
    assert run("--limit=2").settings["precision"] == "float32"       # auto, on a CPU


def test_solver_is_that_of_the_pipeline(run):
    kinds = {solver: type(run("--limit=2", f"--solver={solver}").calls[0].pipe.scheduler).__name__
             for solver in ("own", "dpm")}
    assert kinds == {"own": "DDIMScheduler", "dpm": "DPMSolverMultistepScheduler"}
    config = run("--limit=2", "--solver=dpm").calls[0].pipe.scheduler.config
    assert (config.solver_order, config.algorithm_type) == (2, "dpmsolver++")
    assert config.prediction_type == "v_prediction"                  # as the model was trained


def save_component(path, v1, alpha):
    np.savez(path, component=np.asarray(v1), threshold=alpha)
    return f"--component={path}"


def test_component_and_threshold_of_a_file_decide_on_the_levels(run, by_hand, tmp_path):
    v1 = torch.randn(32, generator=torch.Generator().manual_seed(2))
    a = torch.stack([tokens @ v1 for tokens, _ in by_hand.values()])
    for name, alpha, level in [("low", a.min() - 1, 400), ("high", a.max() + 1, 0)]:
        flag = save_component(tmp_path / f"{name}.npz", v1, alpha.item())
        made = run("--limit=3", flag)
        assert {one.noise_level for one in made.calls} == {level}
        assert {x["proportion"] for x in made.lines.values()} == {level / 400}
    made = run("--limit=12", save_component(tmp_path / "middle.npz", v1, a.median().item()))
    for source, line in made.lines.items():
        share = (by_hand[source][0] @ v1 > made.alpha).float().mean().item()
        assert line["proportion"] == pytest.approx(share, abs=0.02)
    assert torch.equal(made.v1, v1) and made.alpha == a.median().item()


def test_flip_turns_the_component_and_fits_the_threshold_anew(run, by_hand, tmp_path):
    plain, flipped = run("--limit=12"), run("--limit=12", "--flip-foreground")
    file = save_component(tmp_path / "known.npz", plain.v1, 0.123)
    known = run("--limit=12", "--flip-foreground", file)
    for made in (flipped, known):
        assert torch.equal(made.v1, -plain.v1)
        a = torch.stack([tokens @ made.v1 for tokens, _ in by_hand.values()])
        assert (a > made.alpha).float().mean().item() == pytest.approx(0.4, abs=0.01)
    p, q = ([made.lines[source]["proportion"] for source in plain.lines]
            for made in (plain, flipped))
    assert np.corrcoef(p, q)[0, 1] < -0.3          # much of the one side is little of the other


@pytest.mark.parametrize("flags, count", [([], COUNT), (["--fit-images=5"], 5)])
def test_fit_images_are_what_the_component_is_fitted_on(run, by_hand, flags, count):
    """Evenly spaced over all images, whatever --limit."""
    made = run("--limit=2", *flags)
    chosen = np.linspace(0, COUNT - 1, count).round().astype(int)
    tokens = torch.stack([by_hand[sorted(by_hand)[i]][0] for i in chosen])      # (count, 64, 32)
    _, vectors = np.linalg.eigh(np.cov(tokens.flatten(0, 1).double().numpy().T))
    assert abs(made.v1.numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-4)
    share = (tokens @ made.v1 > made.alpha).float().mean().item()
    assert share == pytest.approx(0.4, abs=0.005)  # of these images, not of those made
    a = (tokens @ made.v1).flatten().numpy()
    assert made.alpha == pytest.approx(np.quantile(a, 0.6), abs=0.01)


def test_limit_is_spread_over_the_data(run, by_hand):
    for count in (2, 5):
        chosen = np.linspace(0, COUNT - 1, count).round().astype(int)
        made = run(f"--limit={count}")
        assert sorted(made.lines) == [sorted(by_hand)[i] for i in chosen]
        assert sum(len(one.seeds) for one in made.calls) == count


def test_another_model_draws_other_pictures(run, pipeline_folder, tmp_path):
    """The same in all but its decoder."""
    import diffusers
    pipe = diffusers.StableUnCLIPImg2ImgPipeline.from_pretrained(pipeline_folder)
    pipe.vae.decoder.conv_out.bias.data += 0.3
    pipe.save_pretrained(tmp_path / "brighter")
    plain, brighter = run("--limit=2"), run("--limit=2", "--model", tmp_path / "brighter")
    for source, line in plain.lines.items():
        assert brighter.lines[source] == line
        assert np.mean(brighter.views[source]) > np.mean(plain.views[source]) + 10


def test_data_dir_names_the_pictures_and_the_default_folder_of_views(run, image_folder, tmp_path,
                                                                     monkeypatch):
    (tmp_path / "birds/train/owl").mkdir(parents=True)
    source = Path(image_folder, "train/cat/0003.png")
    (tmp_path / "birds/train/owl/1.png").write_bytes(source.read_bytes())
    monkeypatch.chdir(tmp_path)
    with watched_pipeline() as calls:
        call(generate_views, *run.usual, "--data-dir=birds")
    views = tmp_path / "views/birds"
    assert [x["source"] for x in json_lines(views / "manifest.jsonl")] == ["train/owl/1.png"]
    assert (views / "train/owl/1.png").exists() and len(calls) == 1
    known = {line["source"]: one.image_embeds[i] for one, i, line in arrived(run("--batch-size=4"))}
    c = calls[0].image_embeds[0]                   # of the same picture in another folder
    assert torch.allclose(c, known["train/cat/0003.png"], atol=1e-4)


def test_device_is_where_all_lies(run, capsys):
    for one in run("--limit=2").calls:
        assert one.image_embeds.device.type == one.pipe.unet.device.type == "cpu"
    if not torch.backends.mps.is_available():
        line = refusal(capsys, call, generate_views, *run.usual, "--device=mps")
        assert "mps" in line


# -------------------------------------------------------------------------------------- the preview
@pytest.fixture(scope="module")
def preview(run, tmp_path_factory):
    """preview.png of ten pictures as rows and columns of cells, and the calls that drew it."""
    folder = tmp_path_factory.mktemp("preview")
    with watched_pipeline() as calls:
        call(generate_views, *run.usual, "--preview=10", "--seed=3", "--views-dir", folder)
    picture = np.asarray(Image.open(folder / "preview.png")).astype(int)
    red = (picture == [255, 0, 0]).all(2)
    # A frame is as high as a row of cells and their gap. Its left edge is that of a column.
    left = red.any(0).argmax()
    top = red[:, left].argmax()
    pitch = int((~red[top:, left]).argmax())
    frames, cells = [], []
    for x in range(left, picture.shape[1] - pitch + 1, pitch):
        ups = [y for y in range(0, 7 * pitch, pitch) if red[y:y + pitch, x].all()
               and red[y, x:x + pitch].all() and red[y:y + pitch, x + pitch - 1].all()
               and red[y + pitch - 1, x:x + pitch].all()]
        frames.append([y // pitch for y in ups])
        cells.append([picture[y + 3:y + pitch - 3, x + 3:x + pitch - 3]
                      for y in range(0, 7 * pitch, pitch)])
    return SimpleNamespace(calls=calls, frames=frames, cells=cells)


def previewed():
    return np.linspace(0, COUNT - 1, 10).round().astype(int)


def test_preview_frames_the_adaptive_level(run, preview, by_hand):
    lines = run("--batch-size=4").lines
    levels = [lines[sorted(by_hand)[i]]["noise_level"] for i in previewed()]
    assert preview.frames == [[2 + level // 100] for level in levels] and len(set(levels)) >= 3


def test_preview_shows_the_pictures_and_where_their_foreground_is(run, preview, by_hand,
                                                                  image_folder):
    """Bright exactly on the tokens above alpha."""
    made = run("--batch-size=4")
    for i, (original, shown, *_) in zip(previewed(), preview.cells, strict=True):
        source = sorted(by_hand)[i]
        pixels = np.asarray(Image.open(Path(image_folder, source))).astype(int)
        side = len(original) // 32
        small = original.reshape(32, side, 32, side, 3).mean((1, 3))
        assert np.abs(small - pixels).mean() < 8
        above = (by_hand[source][0] @ made.v1 > made.alpha).view(8, 8).numpy()
        bright = np.kron(above, np.ones((len(original) // 8,) * 2))[..., None] > 0
        wrong = np.where(bright, shown != original, shown != original // 5).any(2)
        assert wrong.mean() <= 1 / 64              # at most one token, by rounding


def test_preview_draws_the_views_that_the_run_will_make(run, preview, by_hand):
    """At every level, from the picture's own seed; the framed one is the one that is written."""
    made = run("--batch-size=4", "--seed=3")
    drawn = {}
    for one in preview.calls:
        for i, seed in enumerate(one.seeds):
            drawn[seed, one.noise_level] = one.images[i]
    for i, cells, [frame] in zip(previewed(), preview.cells, preview.frames, strict=True):
        source = sorted(by_hand)[i]
        seed = made.lines[source]["seed"]
        for level, cell in zip(LEVELS, cells[2:], strict=True):
            pixels = (drawn[seed, level].permute(1, 2, 0) * 255).round().numpy()
            assert np.abs(cell[2::4, 2::4] - pixels).max() <= 1
        written = np.asarray(made.views[source]).astype(int)
        assert np.abs(cells[frame][2::4, 2::4] - written).max() <= 1


# ----------------------------------------------------------------------------- no flag without test
def pixels(made):
    return [np.asarray(view).tolist() for view in made.views.values()]


def proportions(made):
    return [line["proportion"] for line in made.lines.values()]


def sources(made):
    return sorted(made.lines)


# Two values (None: no such flag) and what must differ between the runs with them; or the test that
# shows it.
TABLE = {
    "--dataset": "test_defaults_are_the_releases_and_the_miniatures_own",
    "--data-dir": "test_data_dir_names_the_pictures_and_the_default_folder_of_views",
    "--views-dir": "test_data_dir_names_the_pictures_and_the_default_folder_of_views",
    "--limit": (None, 5, sources),
    "--save-size": (None, 16, pixels),
    "--model": "test_another_model_draws_other_pictures",
    "--noise": (0, 999, pixels),
    "--solver": ("own", "dpm", pixels),
    "--steps": (2, 5, pixels),
    "--guidance": (None, 9, pixels),
    "--size": (None, 40, pixels),
    "--seed": (None, 1, pixels),
    "--component": "test_component_and_threshold_of_a_file_decide_on_the_levels",
    "--flip-foreground": "test_flip_turns_the_component_and_fits_the_threshold_anew",
    "--fit-images": (None, 5, proportions),
    "--preview": "test_generate_views.py::test_preview_draws_one_picture_and_nothing_else",
    "--batch-size": "test_batch_size_is_that_of_the_calls",
    "--device": "test_device_is_where_all_lies",
    "--precision": ("float32", "bfloat16", pixels),
}


def test_every_flag_is_in_the_table(capsys):
    with pytest.raises(SystemExit):
        call(generate_views, "--help")
    said = capsys.readouterr().out
    flags = set(re.findall("^ +(?:-., )?(--[a-z-]+)", said, re.MULTILINE)) - {"--help"}
    assert flags == set(TABLE)
    assert re.search(r"fitted\s+on\s+\(default:\s+10000\)", said)


@pytest.mark.parametrize("flag", [f for f, row in TABLE.items() if isinstance(row, tuple)])
def test_another_value_gives_another_result(run, flag):
    *values, read = TABLE[flag]
    one, other = (run("--limit=2", *([] if value is None else [f"{flag}={value}"]))
                  for value in values)
    assert read(one) != read(other)


@pytest.mark.parametrize("flag", [f for f, row in TABLE.items() if isinstance(row, str)])
def test_the_test_named_exists_and_uses_the_flag(flag):
    file, name = ("test_generation_flags.py::" + TABLE[flag]).split("::")[-2:]
    text = Path(__file__).with_name(file).read_text()
    body = re.search(rf"^def {name}\(.*?(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    assert body and flag in text


# ------------------------------------------------------------------- train_moco.py's frozen encoder
def train(folder, image_folder, encoder_folder, views_folder, *flags):
    """A run with quality weights: what the frozen encoder saw while its component was fitted, and
    in each step, and the steps' views."""
    seen, steps = [], []
    real_forward, real_step = genview.FrozenEncoder.forward, train_moco.train_step

    def forward(self, views):
        tokens = real_forward(self, views)
        seen.append((views.clone(), tokens.clone()))
        return tokens

    def train_step(method, optimizer, views, quality_of, *rest):
        before = len(seen)
        readouts = real_step(method, optimizer, views, quality_of, *rest)
        steps.append(SimpleNamespace(views=views[:2], seen=[x for x, _ in seen[before:]],
                                     v1=quality_of.component, readouts=readouts, before=before))
        return readouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(genview.FrozenEncoder, "forward", forward)
        patch.setattr(train_moco, "train_step", train_step)
        call(train_moco, "--dataset=folder", "--data-dir", image_folder, "--views-dir",
             views_folder, "--quality=exact", "--encoder", encoder_folder, "--image-size=32",
             "--arch=resnet10_narrow", "--batch-size=8", "--epochs=1", "--queue=16", "--device=cpu",
             "--start-batches=0", "--knn-every=0", "--workers=0", "--output-dir", folder, *flags)
    # Before the first step: tries with one picture, the pictures, the pairs of pairs.png.
    fitted = [(x, t) for x, t in seen[:steps[0].before] if len(x) > 1]
    return SimpleNamespace(fitted=fitted, steps=steps)


@pytest.fixture(scope="module")
def trained(tmp_path_factory, image_folder, encoder_folder, views_folder):
    return train(tmp_path_factory.mktemp("run"), image_folder, encoder_folder, views_folder)


def normalised(image_folder):
    """The training pictures (24, 3, 32, 32), with CLIP's numbers."""
    paths = sorted(Path(image_folder, "train").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(path)) for path in paths]) / 255
    mean, std = (np.array(x) for x in (CLIP_MEAN, CLIP_STD))
    return torch.tensor((pixels - mean) / std).permute(0, 3, 1, 2).float()


def test_the_component_is_fitted_on_normalised_pictures(trained, image_folder):
    known, [(seen, tokens), *_] = normalised(image_folder), trained.fitted
    assert torch.allclose(seen, known, atol=1e-4) and abs(seen.mean()) < 1
    _, vectors = np.linalg.eigh(np.cov(tokens.flatten(0, 1).double().numpy().T))
    for step in trained.steps:
        assert abs(step.v1.numpy() @ vectors[:, -1]) == pytest.approx(1, abs=1e-3)


def test_in_the_loop_the_encoder_sees_the_two_views_of_the_step(trained):
    assert len(trained.steps) == 3
    for step in trained.steps:
        seen = torch.cat(step.seen)
        assert torch.equal(seen, torch.cat(step.views)) and seen.shape == (16, 3, 32, 32)
        assert abs(seen.mean()) < 1.5 and 0.2 < seen.std() < 2.5
        assert {"s_f", "s_b", "ess"} < set(step.readouts)


def test_the_component_is_fitted_on_so_many_pictures_of_the_views_size(
        tmp_path, image_folder, encoder_folder, views_folder, monkeypatch):
    """10,000, evenly spaced; here of a limit of 10."""
    assert genview.FIT_IMAGES == 10_000
    monkeypatch.setattr(genview, "FIT_IMAGES", 10)
    made = train(tmp_path, image_folder, encoder_folder, views_folder, "--image-size=16")
    [(seen, _), *_] = made.fitted
    assert seen.shape == (10, 3, 16, 16)
    chosen = np.linspace(0, COUNT - 1, 10).round().astype(int)
    means = normalised(image_folder)[chosen].mean((2, 3))
    assert torch.allclose(seen.mean((2, 3)), means, atol=0.05)
    assert made.steps[0].seen[0].shape[1:] == (3, 16, 16)
