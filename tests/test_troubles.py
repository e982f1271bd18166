"""Troubles that users of comparable software reported: what happens here instead."""
import io
import json
import re
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny
import torch
import transformers
from running import call, refusal

import generate_views
import genview
import train_moco
from support import augment, command_line, data
from support.command_line import UserError
from support.data import find_files
from support.processes import setup

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def flags(folder, data_dir, *more):
    return ["--dataset=folder", "--image-size=32", "--arch=resnet10_narrow", "--batch-size=8",
            "--queue=32", "--views-dir=none", "--device=cpu", "--epochs=1", "--data-dir", data_dir,
            "--output-dir", folder, "--workers=0", *more]


@pytest.mark.parametrize("error, text", [
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size 8g"),
    (RuntimeError("No working C++ compiler found in torch._inductor"), "needs a C++ compiler"),
    (UserError("Traceback of a worker\n  file\nsupport.command_line.UserError: x.png is broken"),
     "x.png is broken")])
def test_what_went_wrong_is_one_line(error, text, capsys):
    def work():
        raise error
    assert text in refusal(capsys, work)


def test_half_a_distributed_environment_is_named(monkeypatch):
    """Otherwise each process would train alone, and none but the first would write."""
    monkeypatch.setenv("RANK", "1")
    for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match="process 1 of 1, but not WORLD_SIZE, .* torchrun"):
        setup("cpu")


def test_the_old_launcher_is_named(capsys):
    line = refusal(capsys, lambda: train_moco.parse_args(argv=["--local-rank=0"]))
    assert "torchrun" in line


def test_a_console_without_a_letter(monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, "ascii"))
    command_line.script(lambda: print("50.0 \xb1 1", flush=True))
    assert raw.getvalue() == b"50.0 \\xb1 1\n"


def test_data_may_move_before_a_resume(tmp_path, capsys):
    """Names and number of the images must be the same, their place need not."""
    images = tiny.save_images(tmp_path / "here")
    call(train_moco, *flags(tmp_path / "run", images))
    moved = shutil.move(images, tmp_path / "there")
    call(train_moco, *flags(tmp_path / "run", moved, "--resume"))
    first = next(tmp_path.glob("there/train/*/*.png"))
    first.rename(first.with_name("other.png"))
    with pytest.raises(UserError, match="another run: images is 24 images"):
        call(train_moco, *flags(tmp_path / "run", moved, "--resume"))


def test_training_without_labels(tmp_path, capsys):
    """Images that lie in train/ itself train, without a test split, which kNN would need."""
    images = Path(tiny.save_images(tmp_path / "data"))
    for path in images.glob("train/*/*.png"):
        path.rename(images / "train" / f"{path.parent.name}-{path.name}")
    for path in [*images.glob("train/*/")]:
        shutil.rmtree(path)
    with pytest.raises(UserError, match="no class folders in train/, kNN needs two|classes that"):
        call(train_moco, *flags(tmp_path / "other", images, "--knn-every=1"))
    shutil.rmtree(images / "test")
    call(train_moco, *flags(tmp_path / "run", images, "--knn-every=0"))
    assert "24 images without class folders" in capsys.readouterr().out
    with pytest.raises(UserError, match="--knn-every 0 needs no test"):
        call(train_moco, *flags(tmp_path / "other", images, "--knn-every=1"))


def test_knn_while_training_looks_at_a_part(image_folder, tmp_path, capsys):
    """A tenth of images in files, but 10,000; as many small ones as there are, or as told."""
    def looked_at(count, pixels, asked=None):
        names = [f"train/{i:06d}" for i in range(count)]
        images = data.Images(names, torch.arange(count), 2, pixels and torch.zeros(count, 1))
        return len(train_moco.knn_images(images, asked).names)
    assert looked_at(200_000, None) == 20_000 and looked_at(50_000, None) == 10_000
    assert looked_at(900, None) == 900 and looked_at(50_000, True) == 50_000
    assert looked_at(50_000, True, 100) == 100
    call(train_moco, *flags(tmp_path / "run", image_folder, "--knn-images=10"))
    assert re.search(r"kNN top-1 [\d.]+% by 10 of 24 images", capsys.readouterr().out)


def test_a_test_split_without_class_folders_is_named(tmp_path):
    images = Path(tiny.save_images(tmp_path / "data"))
    for path in images.glob("test/*/*.png"):
        path.rename(images / "test" / f"{path.parent.name}-{path.name}")
    with pytest.raises(UserError, match="the 24 in it need a folder for each class"):
        find_files(images, "test")
    for path in images.glob("train/*/*.png"):
        path.rename(path.with_suffix(".jfif"))
    with pytest.raises(UserError, match="24 files such as cat/0000.jfif are not read"):
        find_files(images, "train")


def test_a_damaged_archive_is_named(tmp_path):
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"x" * 1000)
    with pytest.raises(UserError, match="cifar-10-python.tar.gz is damaged: remove it"):
        data.read_cifar("cifar10", tmp_path, "train")


def test_skip_bad_is_advised_where_it_is_offered(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    images = data.Images(["bad.png"], torch.zeros(1), 1, root=tmp_path)
    with pytest.raises(UserError) as error:        # generate_views.py leaves them out by itself
        images.pil(0)
    assert "--skip-bad" not in str(error.value)
    with pytest.raises(UserError, match="or leave such images out with --skip-bad"):
        data.into_memory(images, 32, skip_bad=False)


def test_views_side_by_side(tmp_path):
    """Without folders the name decides; one that two sources have is refused with both."""
    folder = Path(tiny.save_images(tmp_path / "data"))
    for path in folder.glob("train/*/*.png"):
        path.rename(path.with_name(f"{path.parent.name}-{path.name}"))
    names = sorted(str(path.relative_to(folder)) for path in folder.glob("train/*/*.png"))
    images = data.Images(names, torch.zeros(24), 2)
    for name in names[1:]:
        (tmp_path / "views").mkdir(exist_ok=True)
        (tmp_path / "views" / Path(name).with_suffix(".jpg").name).touch()
    paths = data.find_views(images, tmp_path / "views", "folder")
    assert paths[0] is None and [p.stem for p in paths[1:]] == [Path(n).stem for n in names[1:]]
    images.names.append(f"train/other/{Path(names[1]).name}")
    with pytest.raises(UserError, match=f"could be the view of {names[1]} and of train/other"):
        data.find_views(images, tmp_path / "views", "folder")


def test_the_component_is_fitted_once(image_folder, encoder_folder, tmp_path, monkeypatch):
    """By the first process alone, and not again by a run that is resumed, turned or not."""
    more = ["--quality=exact", f"--encoder={encoder_folder}", "--knn-every=0", "--flip-foreground"]
    call(train_moco, *flags(tmp_path / "run", image_folder, *more))
    first, fits = np.load(tmp_path / "run/component.npy"), []
    monkeypatch.setattr(genview, "load_or_fit_foreground", lambda *_: fits.append(1))
    call(train_moco, *flags(tmp_path / "run", image_folder, *more, "--resume"))
    assert not fits and np.array_equal(np.load(tmp_path / "run/component.npy"), first)
    sent = []
    second = SimpleNamespace(rank=1, device=torch.device("cpu"),
                             gather_objects=lambda x: sent.append(x) or [first, x])
    images = genview.load_images("folder", image_folder, "train", 32)
    encoder = genview.FrozenEncoder(str(encoder_folder))
    assert genview.component_of_encoder(encoder, images, 32, second) is first
    assert sent == [None] and not fits


# ------------------------------------------------------------------------ pipelines and encoders
@pytest.mark.parametrize("steps", [1000, 2000])
def test_more_steps_than_the_schedule_has(steps, image_folder, pipeline_folder, tmp_path):
    """Before anything is written."""
    with pytest.raises(UserError, match=f"--steps {steps} is too many .* of 1000 steps"):
        call(generate_views, "--dataset=folder", "--data-dir", image_folder, "--model",
             pipeline_folder, "--size=32", "--views-dir", tmp_path / "v", "--steps", steps,
             "--device=cpu")
    assert not (tmp_path / "v").exists()


def test_parts_that_do_not_fit_are_named(pipeline_folder):
    pipe = generate_views.load_pipeline(str(pipeline_folder), torch.float32, "cpu")
    generate_views.check(pipe, 20)
    pipe.image_encoder.config.projection_dim += 1
    with pytest.raises(UserError, match="do not fit: the normalizer's size is"):
        generate_views.check(pipe, 20)


def test_a_pipeline_in_half_precision_files_is_read(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "half")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    pipe = generate_views.load_pipeline(str(folder), torch.float32, "cpu")
    whole = generate_views.load_pipeline(str(pipeline_folder), torch.float32, "cpu")
    for one, other in zip(pipe.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_model_that_is_not_there_is_named(pipeline_folder, tmp_path):
    (tmp_path / "one.safetensors").touch()
    for name in ("generatr", "one.safetensors"):
        with pytest.raises(UserError, match="it must be a folder that save_pretrained"):
            generate_views.load_pipeline(str(tmp_path / name), torch.float32, "cpu")
    folder = shutil.copytree(pipeline_folder, tmp_path / "part")
    next((folder / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors"):
        generate_views.load_pipeline(str(folder), torch.float32, "cpu")


def test_encoders_have_their_own_size_mean_and_std(tmp_path):
    """A ViT for 48 pixels and SigLIP's image tower, beside transformers' own processing."""
    transformers.ViTModel(transformers.ViTConfig(
        **SMALL, image_size=48, patch_size=16)).save_pretrained(tmp_path / "vit")
    transformers.SiglipModel(transformers.SiglipConfig(
        text_config=SMALL | dict(vocab_size=99, pad_token_id=1),
        vision_config=SMALL | dict(image_size=32, patch_size=4))).save_pretrained(
        tmp_path / "siglip")
    for name, size, tokens in (("vit", 48, 9), ("siglip", 32, 64)):
        (tmp_path / name / "preprocessor_config.json").write_text(json.dumps(
            dict(image_mean=[0.5] * 3, image_std=[0.5] * 3, size=dict(height=size, width=size))))
        encoder, x = genview.FrozenEncoder(str(tmp_path / name)), torch.rand(2, 3, size, size)
        got = encoder(augment.normalise(x))
        model = transformers.AutoModel.from_pretrained(tmp_path / name).eval()
        expected = getattr(model, "vision_model", model)(pixel_values=2 * x - 1).last_hidden_state
        assert encoder.size == size and got.shape == (2, tokens, 32)
        torch.testing.assert_close(got, expected[:, -tokens:], atol=1e-5, rtol=1e-4)


def test_the_encoder_of_the_release(tmp_path, monkeypatch):
    """Its architecture by timm, with random weights and a block a stage: timm's own map, row by
    row, of views of any size at 224 pixels. Without timm: how to install it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(
        architecture="convnext_base", num_classes=0, model_args=dict(depths=[1, 1, 1, 1])))
    model.save_pretrained(tmp_path)
    assert genview.FrozenEncoder.NAMES["release"].endswith("/convnext_base.clip_laion2b_augreg")
    monkeypatch.setitem(genview.FrozenEncoder.NAMES, "release", str(tmp_path))
    encoder, x = genview.FrozenEncoder("release"), torch.randn(1, 3, 224, 224)
    depths = [len(stage.blocks) for stage in model.timm_model.stages]       # 4.48 keeps the usual
    own = timm.create_model("convnext_base", num_classes=0, depths=depths).eval()
    own.load_state_dict(model.timm_model.state_dict())
    with torch.no_grad():
        expected = own.forward_features(x)
    assert expected.shape == (1, 1024, 7, 7) and encoder(x[..., :99, :99]).shape == (1, 49, 1024)
    torch.testing.assert_close(encoder(x)[0, 8], expected[0, :, 1, 1], atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="pip install timm"):
        genview.FrozenEncoder("release")
