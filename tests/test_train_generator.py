"""studies/train_generator.py and its judge eval_generator.py, and the miniature in weights/."""
import math
import os
import re
import signal
from types import SimpleNamespace

import pytest
import tiny
import torch
from running import call, json_lines, refusal

import generate_views
import genview
from quality_loss import fit_foreground
from recipes import GENERATION
from studies import eval_generator, train_generator
from support import checkpoint
from support.augment import normalise
from support.command_line import Terminated, UserError
from support.data import Images, open_image, to_tensor
from support.files import write_whole
from support.pretrained import load_checkpoint

FLAGS = ["--limit", 16, "--batch-size", 4, "--steps", 2, "--log-every", 1, "--device", "cpu"]
STEPS = {"autoencoder": 1, "teacher": 2, "encoder": 1, "generator": 2}


def train(image_folder, folder, *flags):
    parts = {part: [STEPS[part] / 2, *others]
             for part, (_, *others) in train_generator.PARTS.items()}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_generator, "PARTS", parts)
        patch.setitem(GENERATION, "mini", {"steps": 1, "guidance": 1})         # of samples.png
        call(train_generator, "--data-dir", image_folder, "--output-dir", folder, *FLAGS, *flags)


def random_data(n, classes):
    pixels = torch.randint(256, (n, 3, 32, 32), dtype=torch.uint8)
    return pixels, torch.arange(n) % classes


@pytest.fixture(scope="module")
def trained(image_folder, tmp_path_factory):
    """A generator trained for STEPS, never interrupted."""
    folder = tmp_path_factory.mktemp("generator")
    train(image_folder, folder)
    return folder


@pytest.fixture(scope="module")
def pipe(trained):
    return generate_views.load_pipeline(str(trained), torch.float32, "cpu")


# ---------------------------------------------------------------------------------------- formulas
def test_noised_is_what_the_pipeline_tells_the_unet(pipe):
    """For the pipeline against the equation see test_generate_views.py."""
    c, noise = torch.randn(2, 5, train_generator.EMBEDDING)
    level = torch.tensor([0, 100, 200, 300, 400])
    ours = train_generator.noised(c, level, noise, pipe.image_normalizer,
                                  pipe.image_noising_scheduler)
    for i in range(5):
        theirs = pipe.noise_image_embeddings(c[i:i + 1], noise_level=level[i].item(),
                                             noise=noise[i:i + 1])
        torch.testing.assert_close(ours[i:i + 1], theirs, atol=1e-5, rtol=1e-5)


def test_pictures_seen_often_are_also_mirrored():
    """From 30 samples a picture on, each with its label."""
    pixels, labels = random_data(4, 3)
    seldom, _ = train_generator.with_mirrored(pixels, labels, samples=120)
    assert seldom is pixels
    often, twice = train_generator.with_mirrored(pixels, labels, samples=121)
    assert torch.equal(often, torch.cat([pixels, pixels.flip(3)]))
    assert twice.tolist() == [0, 1, 2, 0] * 2


def test_what_the_encoder_learns_from():
    """The formula of targets, number by number."""
    pixels, teacher = random_data(5, 5)[0], train_generator.Teacher(5).eval()
    maps = teacher.maps(pixels).detach()
    assert maps.shape == (5, 64, 128)
    got = train_generator.targets(pixels, teacher)(pixels[3:4]).detach()[0]
    means = maps.double().mean((0, 1)).tolist()
    std = math.sqrt((maps - torch.tensor(means)).square().sum().item() / maps.numel())
    for t, k in [(0, 0), (9, 5), (36, 127), (63, 64)]:
        place = sum(maps[i, t, k].item() for i in range(5)) / 5
        expected = (maps[3, t, k].item() - means[k] - (place - means[k]) / 4) / std
        assert got[t, k].item() == pytest.approx(expected, abs=1e-3)


def test_the_moving_average_has_the_statistics_of_batch_norm():
    net, ema, data = train_generator.Teacher(3), train_generator.Teacher(3), random_data(4, 3)
    loss = sum(net(None, *data).values())
    train_generator.descend(net, ema, torch.optim.SGD(net.parameters(), lr=0.1), loss, step=0)
    mine, its = (dict(module.named_buffers()) for module in (ema, net))
    assert len(its) == 27 and its["features.1.running_mean"].any()
    assert all(torch.equal(mine[key], its[key]) for key in its)


def test_spread_of_the_embeddings(pipe):
    """The turned encoder gives what is returned; covariance: 0 off the diagonal, on it the root of
    the old eigenvalues."""
    x = torch.rand(100, 3, 32, 32) * 2 - 1
    with torch.inference_mode():
        before = pipe.image_encoder(x).image_embeds
    encoder, after = train_generator.equalise(pipe.image_encoder, before)
    with torch.inference_mode():
        again = encoder(x).image_embeds
    torch.testing.assert_close(again, after, atol=1e-3 * after.std().item(), rtol=1e-3)
    old, new = torch.linalg.eigvalsh(torch.cov(before.T.double())), torch.cov(after.T.double())
    least = 1e-4 * old[-1].item()
    expected = [value ** 0.5 if value > least else value / least ** 0.5 for value in old.tolist()]
    torch.testing.assert_close(new, torch.diag(torch.tensor(expected, dtype=torch.double)),
                               atol=1e-3 * new.max().item(), rtol=1e-2)


# -------------------------------------------------------------------------------------------- runs
def test_the_folder_is_a_pipeline_that_generate_views_uses(trained, image_folder, tmp_path, capsys):
    call(generate_views, "--dataset", "folder", "--data-dir", image_folder, "--model", trained,
         "--steps", 2, "--guidance", 1, "--views-dir", tmp_path, "--device", "cpu")
    assert "24 views made" in capsys.readouterr().out
    assert len(list(tmp_path.rglob("*.png"))) == 24
    assert (trained / "samples.png").stat().st_size > 1000
    last = {line["part"]: line["step"] for line in json_lines(trained / "log.jsonl")}
    assert last == STEPS


def test_half_precision_on_disk_and_small(trained):
    from safetensors import safe_open
    files = list(trained.rglob("*.safetensors"))
    assert files and sum(file.stat().st_size for file in files) < 25e6
    for file in files:
        with safe_open(file, "pt") as tensors:
            kinds = {tensors.get_tensor(key).dtype for key in tensors.keys()}
        assert kinds <= {torch.float16, torch.int64}


def test_tokenizer_of_transformers_4_beside_that_of_5(trained):
    """Version 4 reads the first two, version 5 (which alone writes it) the third."""
    for folder, wanted in ((trained, {"vocab.json", "merges.txt"}),
                           (genview.MINI, {"vocab.json", "merges.txt", "tokenizer.json"})):
        assert wanted <= {file.name for file in (folder / "tokenizer").iterdir()}


def test_latents_and_normaliser(pipe, image_folder):
    """Scaled latents have variance 1, scaled embeddings mean 0 and a mean variance of 1."""
    x = genview.load_images("folder", image_folder, "train", 32, 16).pixels.float() / 127.5 - 1
    with torch.no_grad():
        latents = pipe.vae.encode(x).latent_dist.mean * pipe.vae.config.scaling_factor
        embeddings = pipe.image_encoder(normalise(x / 2 + 0.5)).image_embeds
        c = pipe.image_normalizer.scale(embeddings)
    assert latents.std().item() == pytest.approx(1, abs=0.03)
    torch.testing.assert_close(c.mean(0), torch.zeros(c.shape[1]), atol=0.1, rtol=0)
    assert c.var(0).mean().item() == pytest.approx(1, abs=0.1)         # half precision on the way


def test_interrupted_run_ends_as_an_uninterrupted_one(trained, image_folder, tmp_path):
    """Stopped at the checkpoints between the two steps of the teacher, which has batch norm, and
    of the U-Net: the second and the fifth; once by SIGTERM. No line of the log is there twice."""
    saved = []

    def stopping(path, function, **options):
        write_whole(path, function, **options)
        if path.name == "last.pt":
            saved.append(path)
            if len(saved) == 2:
                raise KeyboardInterrupt
            if len(saved) == 5:
                os.kill(os.getpid(), signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", stopping)
        patch.setattr(train_generator, "draw_samples", lambda *_, **settings: None)
        for stop in (KeyboardInterrupt, Terminated):
            with pytest.raises(stop):
                train(image_folder, tmp_path, "--save-minutes", 0)
        with open(tmp_path / "log.jsonl", "a") as log:     # after the checkpoint
            log.write('{"part": "generator", "step": 9}\n')
        train(image_folder, tmp_path, "--save-minutes", 0)
    whole, ours = (load_checkpoint(folder / "last.pt")["parts"] for folder in (trained, tmp_path))
    for part in train_generator.PARTS:
        assert ours[part]["step"] == whole[part]["step"] == STEPS[part]
        for key, value in whole[part]["ema"].items():
            assert torch.equal(value, ours[part]["ema"][key]), (part, key)
    lines = [(line["part"], line["step"]) for line in json_lines(tmp_path / "log.jsonl")]
    assert len(set(lines)) == len(lines) and {part for part, _ in lines} == STEPS.keys()
    assert ("generator", 9) not in lines


@pytest.mark.parametrize("module, flags, message", [
    (train_generator, ["--output-dir={trained}", "--seed=1"],
     "--seed is 0 there and 1 here.*--output-dir"),
    (train_generator, ["--output-dir={damaged}"], "last.pt cannot be loaded as a checkpoint"),
    (train_generator, ["--output-dir={damaged}/new", "--steps=0"], "--steps: 0 must be from 1 to"),
    (train_generator, ["--output-dir={damaged}/new", "--data-dir={one}"],
     "one class folder in train/: the second part learns"),
    (eval_generator, ["--output-dir={damaged}", "--guidance=nan"], "--guidance: nan must be from"),
    (eval_generator, ["--output-dir={damaged}", "--model={damaged}"], "--model .* not be loaded")])
def test_refusals_are_one_line(trained, image_folder, tmp_path, capsys, module, flags, message):
    (tmp_path / "last.pt").write_bytes(b"torn")
    one = tiny.save_images(tmp_path / "one", classes=("cat",))
    flags = [flag.format(trained=trained, damaged=tmp_path, one=one) for flag in flags]
    usual = FLAGS if module is train_generator else ["--device", "cpu"]
    line = refusal(capsys, call, module, "--data-dir", image_folder, *usual, *flags)
    assert re.search(message, line)


@pytest.mark.parametrize("latent, size, patch", [(96, 224, 14), (4, 32, 4), (4, 32, 8)])
def test_a_generator_of_large_pictures_is_not_judged(latent, size, patch):
    pipe = SimpleNamespace(
        unet=SimpleNamespace(config=SimpleNamespace(sample_size=latent)), vae_scale_factor=8,
        image_encoder=SimpleNamespace(config=SimpleNamespace(image_size=size, patch_size=patch)))
    if (size, patch) == (32, 4):
        return eval_generator.refuse_other_sizes(pipe, "x")
    with pytest.raises(UserError, match=f"--model x makes {8 * latent} pixels and looks at {size}"):
        eval_generator.refuse_other_sizes(pipe, "x")


def test_loss_not_finite_is_named(image_folder, tmp_path, monkeypatch):
    def nan(self, *_):
        return {"error": next(self.parameters()).sum() * float("nan")}
    monkeypatch.setattr(train_generator.Autoencoder, "forward", nan)
    with pytest.raises(UserError, match="autoencoder is not finite at step 1"):
        train(image_folder, tmp_path)
    assert not (tmp_path / "last.pt").exists()


# ----------------------------------------------------------------------------------- the miniature
@pytest.mark.parametrize("dataset, there, model, steps, guidance", [
    ("cifar10", True, "mini", 2, 1.25), ("cifar10", False, generate_views.STABLE, 20, 10.0),
    ("imagenet", True, generate_views.STABLE, 20, 10.0)])
def test_the_generator_of_each_data_set(monkeypatch, tmp_path, dataset, there, model, steps,
                                        guidance):
    monkeypatch.setattr(genview, "MINI", tmp_path if there else tmp_path / "nothing")
    args = generate_views.parse_args(["--dataset", dataset])
    assert (args.model, args.steps, args.guidance) == (model, steps, guidance)


def test_mini_names_the_folder_in_the_repository(monkeypatch, trained):
    monkeypatch.setattr(genview, "MINI", trained)
    pipe = generate_views.load_pipeline("mini", torch.float32, "cpu")
    encoder, x = genview.FrozenEncoder("mini"), torch.rand(2, 3, 32, 32)
    with torch.no_grad():
        hidden = pipe.image_encoder(x).last_hidden_state
        tokens = genview.clip_tokens(pipe.image_encoder.vision_model, hidden)
        torch.testing.assert_close(encoder(x), tokens, atol=1e-3, rtol=1e-3)


def test_the_miniature_in_the_repository():
    """On the 16 photographs in the first row of docs/generator.png: maps differ, views resemble
    their own picture, and less so the higher the noise level."""
    files = [file for file in genview.MINI.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 25e6
    pipe = generate_views.load_pipeline("mini", torch.float32, "cpu")
    sheet = to_tensor(open_image(genview.MINI.parents[1] / "docs/generator.png"))
    row = sheet[:, 3:67:2, 76:]                    # every pixel stands there twice
    pixels = torch.stack([row[:, :, 70 * i:70 * i + 64:2] for i in range(16)])
    images = Images([f"{i}" for i in range(16)], torch.zeros(16), 1, pixels)
    encoded = list(generate_views.encode_all(pipe, images, range(16)))
    tokens, c = (torch.cat([part[k] for part in encoded]).float() for k in (1, 2))
    v1, _ = fit_foreground(tokens, (8, 8))
    a = tokens @ v1
    assert a.mean(0).var() < 0.8 * a.var()
    assert a.view(16, 8, 8)[:, 2:6, 2:6].mean() > a.mean()
    views = eval_generator.views_of(pipe, c, range(16), **GENERATION["mini"])
    error = {}
    for level in (0, 400):                         # distance of view i and picture j
        difference = (views[level][:, None].float() - pixels.float()) / 127.5
        distance = difference.square().mean((2, 3, 4))
        error[level] = distance.diagonal().mean().item()
        assert level or distance.argmin(1).tolist() == list(range(16))
    assert error[0] < 0.05 and error[0] < 0.75 * error[400]


def test_mini_that_is_not_there_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(genview, "MINI", tmp_path / "weights" / "mini-unclip")
    for load in (lambda: generate_views.load_pipeline("mini", torch.float32, "cpu"),
                 lambda: genview.FrozenEncoder("mini")):
        with pytest.raises(UserError, match="no weights/mini-unclip here: studies/train_generator"):
            load()


# --------------------------------------------------------------------------------------- the judge
def test_tables_of_the_judge():
    truth, original = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 1, 2, 0])
    unit, black = torch.eye(4), torch.zeros(4, 3, 32, 32, dtype=torch.uint8)
    labels = torch.tensor([0, 1, 2, 3, 0, 0, 0, 3])
    both = torch.cat([unit, unit.roll(1, 0)]), labels, torch.cat([black, black + 3])
    by_level = dict.fromkeys(generate_views.LEVELS, both)
    text = eval_generator.tables(truth, original, torch.tensor([0, 1, 2, 3]), 0.16, by_level,
                                 torch.tensor([0.0, 0.1, 0.5, 1.0]))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line]
    assert rows[2][1:3] == ["100", "75.0"]         # the judge is right on three of four originals
    assert rows[3] == ["the autoencoder's (mean squared error 0.1600 on [-1, 1])", "75.0", "100.0",
                       "", ""]
    assert rows[4][1:] == ["50.0", "75.0", "1.000", "3.0"]             # as on originals: 3 and 1
    assert rows[-5][:3] == ["0 to 0.2", "2", "75.0"] and rows[-4][1:3] == ["0", "-"]
    assert rows[-1][:3] == ["0.8 to 1", "1", "0.0"]


def test_foreground_table_of_a_judge_that_looks_at_one_place():
    """It answers 1 where the place at row 2, column 7 is white; maps have it first, or last."""
    pixels = torch.zeros(3, 3, 32, 32, dtype=torch.uint8)
    pixels[:, :, 8:12, 28:] = 255

    def judge(x):
        return None, (x[:, 0, 8:12, 28:] == 255).flatten(1).all(1).long()
    a = torch.rand(3, 64)
    a[:2, 23], a[2, 23] = 4, -1                    # on average 2.3, the others less than 1
    table = eval_generator.foreground_table(judge, pixels, a, torch.ones(3))
    rows = table.splitlines()[2:]
    assert rows[0] == "| the map's foreground | 66.7 | 33.3 |"
    assert rows[1] == "| the mean map's | 100.0 | 0.0 |"


def test_judge_as_a_user(pipeline_folder, image_folder, tmp_path, capsys):
    flags = ["--data-dir", image_folder, "--model", pipeline_folder, "--images", 4, "--epochs", 1,
             "--steps", 1, "--guidance", 1, "--output-dir", tmp_path, "--device", "cpu"]
    call(eval_generator, *flags)
    first = (tmp_path / "tables.md").read_text()
    assert first in capsys.readouterr().out
    assert open_image(tmp_path / "samples.png").size == (76 + 4 * 70, 7 * 70)
    call(eval_generator, *flags)                   # the same flags, the same numbers
    assert (tmp_path / "tables.md").read_text() == first
