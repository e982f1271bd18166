"""train_generator.py, its judge and the ablation: formulas, a run to the end, resume, troubles."""
import argparse
import importlib
import json
import math
import sys
from pathlib import Path

import pytest
import torch

from studies import ablation
from studies import eval_generator
import generate_views
import genview
from studies import train_generator
import train_moco
from support.world import UserError

FLAGS = ["--limit", "16", "--batch-size", "4", "--steps", "6", "--log-every", "1", "--device", "cpu"]


def call(module, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [module.__name__, *map(str, flags)])
        module.main()


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A generator trained for six steps, never interrupted."""
    folder = tmp_path_factory.mktemp("generator")
    call(train_generator, "--data-dir", image_folder, "--output-dir", folder, *FLAGS)
    return folder


@pytest.fixture(scope="module")
def pipe(trained):
    return generate_views.load_pipeline(str(trained), torch.float32, "cpu")


# ------------------------------------------------------------------------------------------------------------- formulas

def test_noised_is_what_the_pipeline_tells_the_unet(pipe):
    c, noise = torch.randn(5, train_generator.EMBEDDING), torch.randn(5, train_generator.EMBEDDING)
    level = torch.tensor([0, 100, 200, 300, 400])
    ours = train_generator.noised(c, level, noise, pipe.image_normalizer, pipe.image_noising_scheduler)
    for i in range(5):
        theirs = pipe.noise_image_embeddings(c[i:i + 1], noise_level=level[i].item(), noise=noise[i:i + 1])
        torch.testing.assert_close(ours[i:i + 1], theirs, atol=1e-5, rtol=1e-5)


def test_noised_matches_a_plain_loop(pipe):
    """abar_l = product over i <= l of (1 - beta_i) of the squared-cosine schedule (Nichol and Dhariwal 2021)."""
    f = lambda t: math.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2
    c, noise = torch.randn(train_generator.EMBEDDING), torch.randn(train_generator.EMBEDDING)
    mean, std = (x[0].tolist() for x in (pipe.image_normalizer.mean, pipe.image_normalizer.std))
    for level in (0, 100, 400):
        abar = 1.0
        for i in range(level + 1):
            abar *= 1 - min(1 - f((i + 1) / 1000) / f(i / 1000), 0.999)
        got = train_generator.noised(c[None], torch.tensor([level]), noise[None], pipe.image_normalizer,
                                     pipe.image_noising_scheduler)[0]
        for k in range(train_generator.EMBEDDING):
            z = math.sqrt(abar) * (c[k].item() - mean[k]) / std[k] + math.sqrt(1 - abar) * noise[k].item()
            assert got[k].item() == pytest.approx(z * std[k] + mean[k], abs=1e-4)


def test_pictures_and_mirror_images():
    pixels = torch.randint(256, (3, 3, 32, 32), dtype=torch.uint8)
    data = train_generator.Data(pixels, torch.arange(3), mirrored=True)
    x = data.pictures(torch.tensor([1, 4]))
    assert data.size == 6 and x.min() >= -1 and x.max() <= 1
    assert torch.equal(x[0], x[1].flip(2)) and not torch.equal(x[0], x[1])
    assert x[0, 0, 0, 0].item() == pytest.approx(pixels[1, 0, 0, 0].item() / 127.5 - 1)


def test_what_the_encoder_learns_from():
    """The formula of targets, number by number."""
    data = train_generator.Data(torch.randint(256, (5, 3, 32, 32), dtype=torch.uint8), torch.arange(5), mirrored=False)
    teacher = train_generator.Teacher(5).eval()
    maps = teacher.maps(data.pictures(torch.arange(5))).detach()
    assert maps.shape == (5, 64, 128)
    got = train_generator.targets(data, teacher)(data.pictures(torch.tensor([3]))).detach()[0]
    means = [sum(maps[i, t, k].item() for i in range(5) for t in range(64)) / 320 for k in range(128)]
    std = math.sqrt((maps - torch.tensor(means)).square().sum().item() / maps.numel())
    for t, k in [(0, 0), (9, 5), (36, 127), (63, 64)]:
        place = sum(maps[i, t, k].item() for i in range(5)) / 5
        assert got[t, k].item() == pytest.approx((maps[3, t, k].item() - 0.75 * means[k] - 0.25 * place) / std, abs=1e-3)


def test_the_moving_average_has_the_statistics_of_batch_norm():
    net, ema = train_generator.Teacher(3), train_generator.Teacher(3)
    data = train_generator.Data(torch.randint(256, (4, 3, 32, 32), dtype=torch.uint8), torch.tensor([0, 1, 2, 0]), mirrored=False)
    loss = sum(net(data, torch.arange(4), None).values())
    train_generator.descend(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), loss, step=0)
    mine, its = (dict(module.named_buffers()) for module in (ema, net))
    assert len(its) == 27 and its["features.1.running_mean"].any() and all(torch.equal(mine[key], its[key]) for key in its)


def test_spread_of_the_embeddings(pipe):
    """The turned encoder gives what is returned; covariance: 0 off the diagonal, on it the root of the old eigenvalues."""
    x = torch.rand(600, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        before = train_generator.embed(pipe.image_encoder, x)
    encoder, after = train_generator.spread(pipe.image_encoder, before)
    with torch.inference_mode():
        torch.testing.assert_close(train_generator.embed(encoder, x), after, atol=1e-3 * after.std().item(), rtol=1e-3)
    old = torch.linalg.eigvalsh(torch.cov(before.T.double()))
    least, new = 1e-4 * old[-1].item(), torch.cov(after.T.double())
    expected = [value ** 0.5 if value > least else value / least ** 0.5 for value in old.tolist()]
    torch.testing.assert_close(new, torch.diag(torch.tensor(expected, dtype=torch.double)), atol=1e-3 * new.max().item(),
                               rtol=1e-2)


# ------------------------------------------------------------------------------------------------------------------ runs

def test_the_folder_is_a_pipeline_that_generate_views_uses(trained, image_folder, tmp_path, capsys):
    call(generate_views, "--dataset", "folder", "--data-dir", image_folder, "--model", trained, "--steps", 2, "--guidance", 1,
         "--views-dir", tmp_path, "--fit-images", 24, "--device", "cpu")
    assert "24 views made" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 24
    assert (trained / "samples.png").stat().st_size > 1000
    lines = [json.loads(line) for line in (trained / "log.jsonl").read_text().splitlines()]
    assert [line["part"] for line in lines if line["step"] == 1] == list(train_generator.PARTS)


def test_half_precision_on_disk_and_small(trained):
    from safetensors import safe_open
    files = list(trained.rglob("*.safetensors"))
    assert sum(file.stat().st_size for file in files) < 25e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            assert all(tensors.get_tensor(key).dtype in (torch.float16, torch.int64) for key in tensors.keys())


def test_latents_and_normaliser(trained, pipe, image_folder):
    """Scaled latents have variance 1, scaled embeddings mean 0 and a mean variance of 1."""
    pixels = genview.load_images("folder", image_folder, "train", 32, 16).pixels
    x = pixels.float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
        c = pipe.image_normalizer.scale(pipe.image_encoder(genview.normalise(x / 2 + 0.5)).image_embeds)
    assert latents.std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(c.mean(0), torch.zeros(c.shape[1]), atol=0.1, rtol=0)
    assert c.var(0).mean().item() == pytest.approx(1, abs=0.1)          # half precision on the way


@pytest.mark.parametrize("stop_at", [2, 7, 10])
def test_interrupted_run_ends_as_an_uninterrupted_one(trained, image_folder, tmp_path, monkeypatch, stop_at):
    """Stopped at a checkpoint in the autoencoder, the encoder, the U-Net (5, 2 and 3 steps; 1 of the teacher)."""
    flags = ["--data-dir", image_folder, "--output-dir", tmp_path, "--save-minutes", "0", *FLAGS]
    write, count = genview.write_whole, [0]

    def stopping(path, function):
        write(path, function)
        count[0] += Path(path).name == "last.pt"
        if count[0] == stop_at:
            raise KeyboardInterrupt
    monkeypatch.setattr(genview, "write_whole", stopping)
    with pytest.raises(KeyboardInterrupt):
        call(train_generator, *flags)
    monkeypatch.setattr(genview, "write_whole", write)
    call(train_generator, *flags)
    whole, ours = (torch.load(folder / "last.pt", weights_only=True) for folder in (trained, tmp_path))
    for part in train_generator.PARTS:
        assert ours[part]["step"] == whole[part]["step"]
        for key, value in whole[part]["ema"].items():
            assert torch.equal(value, ours[part]["ema"][key]), (part, key)


def test_batch_norm_goes_on_after_an_interruption(tmp_path, monkeypatch):
    """The teacher's four steps in one go, and interrupted after two."""
    args = argparse.Namespace(steps=40, batch_size=4, seed=0, log_every=1, save_minutes=0, output_dir=tmp_path)
    data = train_generator.Data(torch.randint(256, (16, 3, 32, 32), dtype=torch.uint8), torch.arange(16) % 2, mirrored=False)

    def fit(state):
        torch.manual_seed(0)
        return train_generator.fit("teacher", train_generator.Teacher(2), data, 16, args, genview.setup("cpu"), state)
    whole, descend, count = fit({"teacher": {}}).state_dict(), train_generator.descend, [0]

    def stopping(*everything):
        count[0] += 1
        if count[0] == 3:
            raise KeyboardInterrupt
        descend(*everything)
    (tmp_path / "last.pt").unlink()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train_generator, "descend", stopping)
        fit({"teacher": {}})
    state = genview.load_checkpoint(tmp_path / "last.pt")
    assert state["teacher"]["step"] == 2
    ours = fit(state).state_dict()
    assert ours.keys() == whole.keys() and all(torch.equal(ours[key], whole[key]) for key in whole)


def test_other_settings_are_refused(trained, image_folder):
    with pytest.raises(UserError, match="other settings.*another --output-dir"):
        call(train_generator, "--data-dir", image_folder, "--output-dir", trained, *FLAGS, "--seed", "1")


def test_loss_not_finite_is_named(image_folder, tmp_path, monkeypatch):
    monkeypatch.setattr(train_generator.Autoencoder, "forward",
                        lambda self, *_: {"error": next(self.parameters()).sum() * float("nan")})
    with pytest.raises(UserError, match="autoencoder is not finite at step 1"):
        call(train_generator, "--data-dir", image_folder, "--output-dir", tmp_path, *FLAGS)
    assert not (tmp_path / "last.pt").exists()


# ------------------------------------------------------------------------------------------------- defaults, judge, table

@pytest.mark.parametrize("dataset, there, model, steps, guidance", [
    ("cifar10", True, "mini", 2, 1.25), ("cifar10", False, generate_views.STABLE["model"], 20, 10.0),
    ("imagenet", True, generate_views.STABLE["model"], 20, 10.0)])
def test_the_generator_of_each_data_set(monkeypatch, tmp_path, dataset, there, model, steps, guidance):
    monkeypatch.setattr(genview, "MINI", tmp_path if there else tmp_path / "nothing")
    monkeypatch.setattr(sys, "argv", ["generate_views", "--dataset", dataset])
    args = generate_views.parse_args()
    assert (args.model, args.steps, args.guidance) == (model, steps, guidance)


def test_mini_names_the_folder_in_the_repository(monkeypatch, trained):
    monkeypatch.setattr(genview, "MINI", trained)
    pipe = generate_views.load_pipeline("mini", torch.float32, "cpu")
    encoder = genview.FrozenEncoder("mini")
    x = torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        hidden = pipe.image_encoder(x).last_hidden_state
        torch.testing.assert_close(encoder(x), genview.clip_tokens(pipe.image_encoder.vision_model, hidden),
                                   atol=1e-3, rtol=1e-3)


def test_the_miniature_in_the_repository():
    """On the 16 photographs in the first row of docs/generator.png: maps differ, views resemble their own picture, and less so
    the higher the noise level."""
    assert sum(file.stat().st_size for file in genview.MINI.rglob("*") if file.is_file()) < 25e6
    pipe = generate_views.load_pipeline("mini", torch.float32, "cpu")
    row = genview.to_tensor(genview.open_image(Path(train_generator.__file__).with_name("docs") / "generator.png"))[:, 2:34, 2:]
    pixels = torch.stack([row[:, :, 34 * i:34 * i + 32] for i in range(16)])
    images = genview.Images([f"{i}" for i in range(16)], torch.zeros(16), 1, pixels)
    encoded = list(generate_views.encode_all(pipe, images, range(16)))
    tokens, c = (torch.cat([part[k] for part in encoded]).float() for k in (1, 2))
    v1, _ = genview.fit_foreground(tokens, (8, 8))
    a = tokens @ v1
    assert a.mean(0).var() < 0.8 * a.var() and a.view(16, 8, 8)[:, 2:6, 2:6].mean() > a.mean()
    settings = argparse.Namespace(**generate_views.MINI, size=32, save_size=32, dtype="float32", batch_size=16, largest=16)
    error = {}
    for level in (0, 400):
        views = torch.stack([genview.to_tensor(view) for view in generate_views.generate_all(pipe, settings, level, c, range(16))])
        distance = ((views[:, None].float() - pixels.float()) / 127.5).square().mean((2, 3, 4))         # of view i and picture j
        error[level] = distance.diagonal().mean().item()
        assert level or distance.argmin(1).tolist() == list(range(16))
    assert error[0] < 0.05 and error[0] < 0.75 * error[400]


def test_mini_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(genview, "MINI", tmp_path / "weights" / "mini-unclip")
    for load in (lambda: generate_views.load_pipeline("mini", torch.float32, "cpu"), lambda: genview.FrozenEncoder("mini")):
        with pytest.raises(UserError, match="no weights/mini-unclip here: train_generator.py"):
            load()


def test_tables_of_the_judge():
    truth, original = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    unit = torch.eye(4)
    black = torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    first, second = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 0, 0, 3])
    by_level = {level: ([(unit, first), (unit.roll(1, 0), second)], torch.stack([black, black + 3]))
                for level in generate_views.LEVELS}
    text = eval_generator.tables(truth, (unit, original), (unit, first), black + 51, black, by_level,
                                 torch.tensor([0.0, 0.1, 0.5, 1.0]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    assert rows[2][1:3] == ["100", "75.0"]                              # the judge is right on three of four originals
    assert rows[3] == ["the autoencoder's (mean squared error 0.1600 on [-1, 1])", "75.0", "100.0", "", ""]
    assert rows[4][1:] == ["50.0", "75.0", "1.000", "3.0"]              # as on originals: 3 of 4 and 1 of 4
    assert rows[-5][1:3] == ["2", "75.0"] and rows[-4][1:3] == ["0", "-"] and rows[-1][1:3] == ["1", "0.0"]


def test_foreground_table_of_a_judge_that_looks_at_one_place(monkeypatch):
    """It answers 1 where the place at row 2, column 7 is white, and so do maps that have it first, or last."""
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, 8:12, 28:] = 255
    monkeypatch.setattr(eval_generator, "look", lambda judge, x, world: (None, (x[:, 0, 8:12, 28:] == 255).flatten(1).all(1).long()))
    a = torch.rand(3, 64)
    a[:2, 23], a[2, 23] = 4, -1                    # on average 2.3, the others less than 1
    rows = eval_generator.foreground_table(None, pixels, a, torch.ones(3), None).splitlines()[2:]
    assert rows[0] == "| the map's foreground | 66.7 | 33.3 |" and rows[1] == "| the mean map's | 100.0 | 0.0 |"


def test_judge_as_a_user(trained, image_folder, tmp_path, capsys):
    flags = ["--dataset", "folder", "--data-dir", image_folder, "--model", trained, "--images", 8, "--epochs", 1, "--steps", 2,
             "--output-dir", tmp_path, "--device", "cpu"]
    call(eval_generator, *flags)
    first = (tmp_path / "tables.md").read_text()
    assert first in capsys.readouterr().out and (tmp_path / "samples.png").exists()
    call(eval_generator, *flags)                                        # with the judge of judge.pt
    assert (tmp_path / "tables.md").read_text() == first


def test_ablation_runs_each_row_once_and_writes_the_table(tmp_path, monkeypatch, capsys):
    """Its commands are parsed by the scripts themselves; only their work is left out."""
    calls = []

    def record(jobs, script, *flags):
        flags = list(map(str, flags))
        if script.startswith("train_"):
            parsed = train_moco.parse_args(importlib.import_module(script[:-3]).PRESETS, flags)
            calls.append((Path(parsed.output_dir).name, parsed.views_dir, parsed.views, parsed.quality, parsed.seed))
            Path(parsed.output_dir).mkdir(parents=True)
            (Path(parsed.output_dir) / "last.pt").touch()
        elif script == "eval_linear.py":
            folder = Path(flags[1]).parent
            entries = [{"protocol": "kNN", "top1": 40 + 2 * int(folder.name[-1])}, {"protocol": "linear", "top1": 50}]
            (folder / "eval.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
        return "9 views made"
    monkeypatch.setattr(train_moco, "resolve", lambda args: args)
    monkeypatch.setattr(ablation, "call", record)
    for _ in range(2):                                                  # the second time nothing is left to do
        call(ablation, "--output-dir", tmp_path, "--jobs", 2)
    assert len(calls) == len(set(calls)) == 24
    views = {name.split("-")[1]: (views_dir.rsplit("-")[-1], views, quality) for name, views_dir, views, quality, _ in calls}
    assert views == {"plain": ("none", "pair", "off"), "noise0": ("0", "pair", "off"), "noise200": ("200", "pair", "off"),
                     "noise400": ("400", "pair", "off"), "adaptive": ("adaptive", "pair", "off"),
                     "quality": ("adaptive", "pair", "exact"), "cached": ("adaptive", "pair", "cached"),
                     "extra": ("adaptive", "extra", "off")}
    assert "| MoCo v2 | plain | 42.0 ± 2.0 | 50.0 ± 0.0 | 40.0, 42.0, 44.0 |" in (tmp_path / "table.md").read_text()
    with pytest.raises(UserError, match="other settings"):
        call(ablation, "--output-dir", tmp_path, "--epochs", 3)
    calls.clear()
    call(ablation, "--dataset", "shapes", "--methods", "all", "--rows", "plain", "quality", "--output-dir", tmp_path / "shapes")
    assert {call[0] for call in calls} == {f"{method}-{row}-{seed}" for method in ablation.METHODS for row in ("plain", "quality")
                                           for seed in (0, 1, 2)}
    with pytest.raises(UserError, match="the controls .* cifar10"):
        call(ablation, "--dataset", "shapes", "--rows", "class100", "--output-dir", tmp_path / "ceiling")


@pytest.mark.parametrize("share, least, most", [(100, 1, 1), (60, 0.65, 0.95)])
def test_the_views_of_the_ceiling_keep_the_class_as_often_as_said(share, least, most, tmp_path):
    """Of two classes any picture is of the right one in half of the cases: 60% keep it in 80%."""
    import tiny
    data = tiny.save_images(tmp_path / "data", per_class=60)
    args = argparse.Namespace(data_dir=data, limit=100, output_dir=tmp_path / "runs")
    ablation.make_views(args, f"class{share}")
    images = genview.load_images("cifar10", data, "train", 32)
    label = {pixels.numpy().tobytes(): label for pixels, label in zip(images.pixels, images.labels.tolist())}
    paths = genview.find_views(images, tmp_path / f"runs/views-class{share}", "cifar10")
    kept = [label[genview.to_tensor(genview.open_image(path)).numpy().tobytes()] == own
            for path, own in zip(paths, images.labels.tolist()) if path]
    assert len(kept) == 100 and least <= sum(kept) / 100 <= most


def test_the_copies_are_what_the_autoencoder_keeps(tmp_path):
    """Each beside its own image: nearer to it than to any other, yet not the image itself."""
    import tiny
    data = tiny.save_images(tmp_path / "data", per_class=20)
    ablation.make_views(argparse.Namespace(data_dir=data, limit=10, output_dir=tmp_path / "runs", model="mini"), "copies")
    images = genview.load_images("cifar10", data, "train", 32)
    paths = genview.find_views(images, tmp_path / "runs/views-copies", "cifar10")
    error = {index: (genview.to_tensor(genview.open_image(path)).float() - images.pixels.float()).square().mean((1, 2, 3))
             for index, path in enumerate(paths) if path}
    assert len(error) == 10 and all(e.argmin() == index and e.min() > 0 for index, e in error.items())


def test_a_failing_row_is_named(tmp_path):
    with pytest.raises(UserError, match="generate_views.py.*error: "):
        call(ablation, "--output-dir", tmp_path, "--data-dir", tmp_path / "nothing", "--model", tmp_path)


def test_extra_samples_keep_the_number_of_steps(image_folder, tmp_path, monkeypatch):
    """--views extra: originals and views in one pool, pairs of two crops of one picture, as many steps as without."""
    images = genview.load_images("folder", image_folder, "train", 32)
    views = 255 - images.pixels
    pool = train_moco.expand(images, views)
    assert len(pool.names) == 48 and torch.equal(pool.pixels[24:], views) and pool.labels[24:].eq(-1).all()
    files = genview.Images(images.names, images.labels, 2, root=Path(image_folder))
    any_folder = train_moco.parse_args(argv=["--dataset", "folder", "--data-dir", image_folder, "--views", "extra", "--views-dir",
                                             f"{image_folder}/test/cat", "--output-dir", str(tmp_path / "x")])
    pool = train_moco.expand(files, train_moco.load_extra(any_folder, files))
    assert len(pool.names) == 36 and len(pool.labels) == 36 and pool.pixels is None
    assert pool.root / pool.names[24] == Path(image_folder).resolve() / "test/cat/0000.png"
    any_folder.image_size = 32
    assert torch.equal(train_moco.load_extra(any_folder, images), genview.load_images("folder", image_folder, "test", 32).pixels[:12])
    any_folder.views_dir = tmp_path
    with pytest.raises(UserError, match="holds no pictures for --views extra"):
        train_moco.load_extra(any_folder, images)
    generated = tmp_path / "views"
    generated.mkdir()
    for name, view in zip(images.names, views):
        (generated / name).parent.mkdir(parents=True, exist_ok=True)
        generate_views.Image.fromarray(view.permute(1, 2, 0).numpy()).save(generated / name)
    seen = []
    step = train_moco.train_step
    monkeypatch.setattr(train_moco, "train_step", lambda *a, **k: seen.append(1) or step(*a, **k))
    train_moco.train(train_moco.parse_args(argv=[
        "--dataset", "folder", "--data-dir", image_folder, "--views-dir", str(generated), "--views", "extra", "--image-size", "32",
        "--arch", "resnet10_narrow", "--batch-size", "8", "--queue", "16", "--epochs", "2", "--output-dir",
        str(tmp_path / "run"), "--device", "cpu"]), genview.setup("cpu"))
    assert len(seen) == 6                          # of 24 images in batches of 8, whatever the size of the pool
    assert json.loads((tmp_path / "run" / "args.json").read_text())["quality"] == "off"
    assert "extra samples" in (tmp_path / "run" / "log.jsonl").read_text()


def test_extra_samples_need_views(tmp_path):
    with pytest.raises(UserError, match="--views extra needs generated views"):
        train_moco.parse_args(argv=["--dataset", "cifar10", "--views-dir", "none", "--views", "extra",
                                    "--output-dir", str(tmp_path)])
