"""Troubles that users of comparable software reported: what happens here instead."""
import io
import json
import os
import re
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import diffusers
import numpy as np
import pytest
import tiny
import torch
import transformers
from running import CPU, call, end, refusal, start_two
from safetensors.torch import load_file, save_file
from torch._dynamo.exc import TorchDynamoException

import generate_views
import genview
import train_moco
from support import augment, command_line, data
from support.command_line import UserError
from support.data import find_files
from support.processes import setup
from support.views import find_views

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)


def flags(folder, data_dir, *more):
    return ["--dataset=folder", "--image-size=32", "--arch=resnet10_narrow", "--batch-size=8",
            "--queue=32", "--views-dir=none", "--device=cpu", "--epochs=1", "--data-dir", data_dir,
            "--output-dir", folder, "--workers=0", *more]


@pytest.mark.parametrize("error, text", [
    (RuntimeError("unable to allocate shared memory(shm) for file </torch_1>"), "--shm-size 8g"),
    (RuntimeError("No working C++ compiler found in torch._inductor"), "needs a C++ compiler"),
    (RuntimeError("unable to open shared memory object </torch_1>: Too many open files (24)"),
     "ulimit -n"),
    (RuntimeError("received 0 items of ancdata"), "ulimit -n"),
    (RuntimeError("CUDA error: out of memory"), "lower --batch-size"),
    (RuntimeError("CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
     "lower --batch-size"),
    (ModuleNotFoundError("No module named 'diffusers'"), "pip install -r requirements.txt"),
    (RuntimeError("Failed to import diffusers.pipelines because\nno cached_download"),
     "no cached_download: pip install -r requirements.txt"),
    (TorchDynamoException("fatal error: Python.h: No such file"), "train without --compile"),
    (UserError("Traceback of a worker\n  file\nsupport.command_line.UserError: x.png is broken"),
     "x.png is broken")])
def test_what_went_wrong_is_one_line(error, text, capsys):
    def work():
        raise error
    assert text in refusal(capsys, work)


def test_what_went_wrong_in_several_processes(monkeypatch):
    """NCCL names a cause of any process so: what it says is shown."""
    monkeypatch.setattr(command_line.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(command_line.dist, "get_rank", lambda: 1)
    error = RuntimeError("NCCL error in: x.cpp:1\nLast error:\nDuplicate GPU detected : rank 1")
    line, status = command_line._explain(error)
    assert "process 1 stops" in line and "(Duplicate GPU detected : rank 1)" in line and status == 1


def test_long_errors_of_libraries_keep_their_end():
    """Where the reason often stands."""
    line = command_line.in_short(RuntimeError("Failed to import\n" + "x " * 200 + "the cause"))
    assert line.startswith("RuntimeError: Failed to import x") and line.endswith(" the cause")
    assert len(line) < 200


@pytest.mark.parametrize("device, processes, reason", [
    ("cuda:0", 2, "1 GPUs for 2 processes"), ("cuda", 3, "2 GPUs for 3 processes"),
    ("cuda", 2, "CUDA error: no kernel image is available")])
def test_gpus_that_cannot_be_used(device, processes, reason, monkeypatch):
    """A GPU that this PyTorch has no code for gives memory and fails at the first operation."""
    class OnGPU:
        def add(self, _):
            if "kernel" in reason:
                raise RuntimeError(reason + "\nCompile with ...")
            return torch.zeros(1)
    monkeypatch.setattr(torch, "zeros", lambda *_, zeros=torch.zeros, device=None:
                        OnGPU() if device else zeros(1))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    with pytest.raises(UserError) as error:
        setup(device)
    assert f"--device {device} is not available ({reason}): use" in str(error.value)


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
    assert "not the same result" not in capsys.readouterr().out
    first = next(tmp_path.glob("there/train/*/*.png"))
    pixels = first.read_bytes()
    shutil.copy(max(first.parent.glob("*.png")), first)        # another picture of its name
    call(train_moco, *flags(tmp_path / "run", moved, "--resume"))
    assert "*** images: the run that goes on had 24 images" in capsys.readouterr().out
    first.write_bytes(pixels)
    first.rename(first.with_name("other.png"))
    with pytest.raises(UserError, match="another run: images is 24 images"):
        call(train_moco, *flags(tmp_path / "run", moved, "--resume"))


def test_pictures_in_the_place_of_cifar_are_named(tmp_path, capsys):
    """Any that lie in data/train are taken for it."""
    images = tiny.save_images(tmp_path)
    for split in ("train", "test"):
        genview.load_images("cifar100", images, split, 32)
    said = capsys.readouterr().out
    assert said.count("train is read as cifar100, which has 100 classes, not 2") == 1


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


def test_two_machines_do_not_download_into_one_folder_at_once(tmp_path, monkeypatch):
    """Into the folder that they share one does, into folders of their own each."""
    class Reader:
        filename = "archive"

        def __init__(self, folder, train, download):
            archive = Path(folder, self.filename)
            if not archive.exists():
                archive.touch()                    # as torchvision: it is filled in place
                time.sleep(0.2)
                archive.write_text("whole")
                Path(folder, f"by-{os.environ['RANK']}").touch()
            assert archive.read_text() == "whole"
            self.data = np.zeros((4, 32, 32, 3), np.uint8)
            self.targets = self.classes = [0, 1, 2, 3]

        def __len__(self):
            return 4
    monkeypatch.setattr(data.torchvision.datasets, "CIFAR10", Reader)
    for name in ("shared", "0", "1"):
        (tmp_path / name).mkdir()

    def work():
        os.environ["LOCAL_RANK"] = "0"             # the one process of its machine
        torch.distributed.init_process_group("gloo")
        for folder in ("shared", os.environ["RANK"]):
            assert len(data.read_cifar("cifar10", tmp_path / folder, "train").names) == 4
    (tmp_path / "said").mkdir()
    assert end(*start_two([work, work], tmp_path / "said")) == [0, 0]
    found = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/by-*"))
    assert found == ["0/by-0", "1/by-1", "shared/by-0"]


def test_skip_bad_is_advised_where_it_is_offered(tmp_path):
    (tmp_path / "bad.png").write_bytes(b"x")
    images = data.Images(["bad.png"], torch.zeros(1), 1, root=tmp_path)
    with pytest.raises(UserError) as error:        # generate_views.py leaves them out by itself
        images.pil(0)
    assert "--skip-bad" not in str(error.value)
    with pytest.raises(UserError, match="or leave such images out with --skip-bad"):
        data.into_memory(images, 32, skip_bad=False)
    with pytest.raises(UserError) as error:        # studies have no such flag
        data.into_memory(images, 32, skip_bad=None)
    assert "repair or remove it" in str(error.value) and "--skip-bad" not in str(error.value)


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
    paths = find_views(images, tmp_path / "views", "folder")
    assert paths[0] is None and [p.stem for p in paths[1:]] == [Path(n).stem for n in names[1:]]
    images.names.append(f"train/other/{Path(names[1]).name}")
    with pytest.raises(UserError, match=f"could be the view of {names[1]} and of train/other"):
        find_views(images, tmp_path / "views", "folder")


def test_one_view_in_a_folder_for_two_images_is_named(tmp_path):
    folder = Path(tiny.save_images(tmp_path / "data", per_class=2))
    views = tiny.save_views(folder, tmp_path / "views")
    images = genview.load_images("folder", folder, "train", 32)
    for prefix in ("train/", ""):                  # as the images lie, and as the release does
        both = images._replace(names=[*images.names, "train/cat/0000.jpg"])
        with pytest.raises(UserError, match="of train/cat/0000.png and of train/cat/0000.jpg: re"):
            find_views(both, views if prefix else views / "train", "folder")


def test_the_component_is_fitted_once(image_folder, encoder_folder, tmp_path, monkeypatch):
    """By the first process alone, and not again by a run that is resumed, turned or not."""
    more = ["--quality=exact", f"--encoder={encoder_folder}", "--knn-every=0", "--flip-foreground"]
    call(train_moco, *flags(tmp_path / "run", image_folder, *more))
    first, fits = np.load(tmp_path / "run/component.npy"), []
    monkeypatch.setattr(genview, "load_or_fit_foreground", lambda *_: fits.append(1))
    call(train_moco, *flags(tmp_path / "run", image_folder, *more, "--resume"))
    moved = ["--resume", tmp_path / "run/last.pt"]
    call(train_moco, *flags(tmp_path / "moved", image_folder, *more, *moved))
    assert not fits
    for run in ("run", "moved"):
        assert np.array_equal(np.load(tmp_path / run / "component.npy"), first)
    sent = []
    second = SimpleNamespace(rank=1, device=torch.device("cpu"), autocast=CPU.autocast,
                             gather_objects=lambda x: sent.append(x) or [first, x])
    images = genview.load_images("folder", image_folder, "train", 32)
    encoder = genview.FrozenEncoder(str(encoder_folder))
    assert genview.component_of_encoder(encoder, images, 32, second) is first
    assert sent == [None] and not fits


# ------------------------------------------------------------------------ pipelines and encoders
@pytest.mark.parametrize("steps", [1000, 2000])
def test_more_steps_than_the_schedule_has(steps, image_folder, pipeline_folder, tmp_path):
    """Before anything is written."""
    with pytest.raises(UserError, match=f"--steps {steps} does not suit .*1000"):
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


def test_a_noise_schedule_that_ends_too_early_is_named(pipeline_folder):
    pipe = generate_views.load_pipeline(str(pipeline_folder), torch.float32, "cpu")
    pipe.image_noising_scheduler = diffusers.DDPMScheduler(num_train_timesteps=100)
    with pytest.raises(UserError, match="the noise on embeddings ends at 99, 400 is needed"):
        generate_views.check(pipe, 20)


def test_a_scheduler_of_another_range_is_told_what_it_does(pipeline_folder):
    pipe = generate_views.load_pipeline(str(pipeline_folder), torch.float32, "cpu")
    pipe.scheduler = diffusers.FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="it starts at step 1000 of a schedule of 1000"):
        generate_views.check(pipe, 5)


def test_a_pipeline_of_which_a_part_lies_elsewhere(pipeline_folder, tmp_path):
    """Without a tokenizer: one line. A U-Net's size may be written as height and width."""
    folder = shutil.copytree(pipeline_folder, tmp_path / "model")
    path = folder / "unet/config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"sample_size": [16, 16]}))
    pipe = generate_views.load_pipeline(str(folder), torch.float32, "cpu")
    assert generate_views.own_size(pipe) == 32
    shutil.rmtree(folder / "tokenizer")
    with pytest.raises(UserError, match="model could not be loaded as a StableUnCLIPImg2Img"):
        generate_views.load_pipeline(str(folder), torch.float32, "cpu")


def test_a_pipeline_in_half_precision_files_is_read(pipeline_folder, tmp_path):
    folder = shutil.copytree(pipeline_folder, tmp_path / "half")
    for path in folder.rglob("*.safetensors"):
        path.rename(path.with_name(path.name.replace(".safetensors", ".fp16.safetensors")))
    pipe = generate_views.load_pipeline(str(folder), torch.float32, "cpu")
    whole = generate_views.load_pipeline(str(pipeline_folder), torch.float32, "cpu")
    for one, other in zip(pipe.unet.parameters(), whole.unet.parameters(), strict=True):
        assert torch.equal(one, other)


def test_a_pipeline_whose_encoder_lacks_weights_is_refused(pipeline_folder, tmp_path):
    model = shutil.copytree(pipeline_folder, tmp_path / "model")
    without(Path(model, "image_encoder"), "visual_projection")
    with pytest.raises(UserError, match="its image encoder lacks 1 weights.*: it must be a folder"):
        generate_views.load_pipeline(str(model), torch.float32, torch.device("cpu"))


def test_a_model_that_is_not_there_is_named(pipeline_folder, tmp_path):
    (tmp_path / "one.safetensors").touch()
    for name in ("generatr", "one.safetensors"):
        with pytest.raises(UserError, match="it must be a folder that save_pretrained"):
            generate_views.load_pipeline(str(tmp_path / name), torch.float32, "cpu")
    folder = shutil.copytree(pipeline_folder, tmp_path / "part")
    next((folder / "vae").glob("*.safetensors")).unlink()
    with pytest.raises(UserError, match="diffusion_pytorch_model.safetensors"):
        generate_views.load_pipeline(str(folder), torch.float32, "cpu")


def timm_model(architecture, size, **arguments):
    """A model of timm in transformers' wrapper, with its own size, mean and std."""
    own = dict(input_size=[3, size, size], mean=[0.3] * 3, std=[0.4, 0.5, 0.6], crop_pct=1.0)
    return transformers.TimmWrapperModel(transformers.TimmWrapperConfig(
        architecture=architecture, num_classes=0, model_args=arguments | dict(img_size=size),
        pretrained_cfg=own))


def tokens_after(others):
    """A map of tokens, of which so many are none of a place."""
    return lambda model, hidden: hidden[:, others:]


def rows_of_channels_last(model, hidden):
    return hidden.flatten(1, 2)


def rows_of_channels_first(model, hidden):
    places = [hidden[:, :, row, column] for row in range(hidden.shape[2])
              for column in range(hidden.shape[3])]
    return torch.stack(places, 1)


def normed_patches(model, hidden):
    return model.vision_model.post_layernorm(hidden)[:, 1:]


def kind(name):
    """A model with random weights, its image processor (None: timm's) and the function that makes
    a map (N, T, K) of its last hidden state."""
    t = transformers

    def square(size, **values):
        return t.ViTImageProcessor(size=dict(height=size, width=size), **values)
    vit = SMALL | dict(image_size=48, patch_size=16)
    dino = SMALL | dict(image_size=28, patch_size=14)      # 4 places; with registers, 9 tokens
    stages = dict(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1])
    blocks = dict(embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1])
    if name == "clip":
        return tiny.clip_vision_model(), t.CLIPImageProcessor(size=32, crop_size=32), normed_patches
    if name == "siglip":
        config = t.SiglipConfig(text_config=SMALL | dict(vocab_size=99, pad_token_id=1),
                                vision_config=SMALL | dict(image_size=32, patch_size=4))
        processor = t.SiglipImageProcessor(size=dict(height=32, width=32))
        return t.SiglipModel(config), processor, tokens_after(0)
    if name == "vit":
        return t.ViTModel(t.ViTConfig(**vit)), square(48, image_mean=[0.3] * 3), tokens_after(1)
    if name == "mae":
        return t.ViTMAEModel(t.ViTMAEConfig(**vit)), square(48), tokens_after(1)
    if name == "dino":
        processor = t.BitImageProcessor(size=28, crop_size=28)
        return t.Dinov2Model(t.Dinov2Config(**dino)), processor, tokens_after(1)
    if name == "registers":
        model = t.Dinov2WithRegistersModel(t.Dinov2WithRegistersConfig(**dino))
        return model, t.BitImageProcessor(size=28, crop_size=28), tokens_after(5)
    if name == "convnext":
        processor = t.ConvNextImageProcessor(size=dict(shortest_edge=64))
        return t.ConvNextModel(t.ConvNextConfig(**stages)), processor, rows_of_channels_first
    if name == "resnet":                           # values in [0, 2]
        processor = square(64, do_normalize=False, rescale_factor=1 / 127.5)
        model = t.ResNetModel(t.ResNetConfig(embedding_size=8, **stages))
        return model, processor, rows_of_channels_first
    if name == "swin":                             # mean and std of values in [0, 255]
        processor = square(64, do_rescale=False, image_mean=[120.0] * 3, image_std=[60.0] * 3)
        model = t.SwinModel(t.SwinConfig(**blocks, image_size=64, window_size=2))
        return model, processor, tokens_after(0)
    if name == "bgr":
        processor = t.MobileViTImageProcessor(size=48, crop_size=dict(height=48, width=48))
        return t.ViTModel(t.ViTConfig(**vit)), processor, tokens_after(1)
    if name == "timm registers":                   # 4 places and 5 more tokens, which is 3 x 3
        return timm_model("vit_small_patch14_reg4_dinov2", 28, depth=1), None, tokens_after(5)
    if name == "timm vit":
        return timm_model("vit_tiny_patch16_224", 48, depth=1), None, tokens_after(1)
    model = timm_model("swin_tiny_patch4_window7_224", 64, **blocks)
    return model, None, rows_of_channels_last


@pytest.mark.parametrize("name", ["clip", "siglip", "vit", "mae", "dino", "registers", "convnext",
                                  "resnet", "swin", "bgr", "timm vit", "timm registers",
                                  "timm swin"])
def test_encoders_get_pictures_as_their_own_processor_makes_them(name, tmp_path):
    """Size, values and order of the channels, and the map of the features row by row."""
    if name.startswith("timm"):
        pytest.importorskip("timm")
    torch.manual_seed(0)
    model, processor, to_map = kind(name)
    model.eval().save_pretrained(tmp_path)
    if processor:
        processor.save_pretrained(tmp_path)
    processor = processor or transformers.AutoImageProcessor.from_pretrained(tmp_path)
    encoder = genview.FrozenEncoder(str(tmp_path))
    pictures = torch.randint(0, 256, (2, 3, encoder.size, encoder.size), dtype=torch.uint8)
    values = dict(do_resize=False, do_center_crop=False)
    if name.startswith("timm"):                    # it cannot be told, but has nothing to crop
        values = {}
    own = processor(list(pictures), return_tensors="pt", **values)["pixel_values"]
    assert own.shape[-1] == encoder.size
    options = {}
    if name == "mae":                              # sees all patches, in their order
        model.config.mask_ratio = 0.0
        options["noise"] = torch.arange(9.0).expand(2, 9)
    with torch.no_grad():
        hidden = getattr(model, "vision_model", model)(own, **options).last_hidden_state
        expected = to_map(model, hidden)
    assert expected.std() > 0.1                    # else any picture would do
    got = encoder(augment.normalise(pictures / 255))
    assert got.shape == expected.shape
    print(f"{name}: largest difference {(got - expected).abs().max():.1e} of "
          f"{expected.abs().max():.2g}")
    torch.testing.assert_close(got, expected, atol=1e-3, rtol=1e-3)


def vit_folder(folder, **config):
    """A ViT for pictures of 48 pixels, 3 x 3 patches, without a processor."""
    model = transformers.ViTModel(transformers.ViTConfig(
        **SMALL | dict(image_size=[48, 48], patch_size=16) | config))
    model.save_pretrained(folder)
    return model, str(folder)


def test_a_clip_folder_needs_no_name_of_its_processor(tmp_path):
    folder = tiny.save_clip(tmp_path)
    settings = '{"size": 32, "crop_size": 32, "image_mean": [0.2, 0.3, 0.4]}'
    (tmp_path / "preprocessor_config.json").write_text(settings)
    encoder = genview.FrozenEncoder(folder)
    assert encoder.size == 32 and encoder.mean == pytest.approx((0.2, 0.3, 0.4), abs=1e-5)
    assert encoder.std == pytest.approx(augment.CLIP_STD, abs=1e-5)


def test_an_encoder_without_a_processor_is_told_so(tmp_path, capsys):
    _, folder = vit_folder(tmp_path)
    assert genview.FrozenEncoder(folder).size == 48
    assert "no readable preprocessor_config.json" in capsys.readouterr().out


@pytest.mark.parametrize("hidden, said", [
    (lambda x: torch.rand(1, 49, 8), "two calls with one picture give features that differ by"),
    (lambda x: torch.full((1, 49, 8), torch.nan), "features of a picture of noise are not finite"),
    (lambda x: torch.ones(1, 297, 8), "297 tokens are no map of 14 x 14 places"),
    (lambda x: torch.ones(1, 8), r"\(1, 8\) is no square map"),
    (lambda x: torch.ones(1, 8, 7, 6), r"\(1, 8, 7, 6\) is no square map")])
def test_encoders_whose_features_are_no_use_are_refused(hidden, said, tmp_path, monkeypatch):
    model, folder = vit_folder(tmp_path, image_size=224)
    monkeypatch.setattr(type(model), "forward", lambda self, pixel_values: SimpleNamespace(
        last_hidden_state=hidden(pixel_values)))
    with pytest.raises(UserError, match=f"cannot be used.*{said}.*--encoder"):
        genview.FrozenEncoder(folder)


def test_an_encoder_whose_file_lacks_weights_is_refused(tmp_path):
    """transformers would draw them at random; the pooler, which gives no feature, may be missing.
    """
    model, folder = vit_folder(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    settings = json.dumps(config | {"num_hidden_layers": config["num_hidden_layers"] + 1})
    (tmp_path / "config.json").write_text(settings)
    with pytest.raises(UserError, match=r"cannot be used \(its file lacks 16 weights, such as "):
        genview.FrozenEncoder(folder)
    transformers.ViTModel(model.config, add_pooling_layer=False).save_pretrained(folder)
    assert genview.FrozenEncoder(folder).size == 48


def without(folder, word):
    """Takes the tensors whose names hold the word out of a folder's model.safetensors."""
    path = folder / "model.safetensors"
    state = {name: x for name, x in load_file(path).items() if word not in name}
    save_file(state, path, metadata={"format": "pt"})


def test_an_encoder_without_queries_or_statistics_is_refused(tmp_path):
    """The fast kernel of attention hides NaN in queries; batch norm's statistics are no parameters.
    """
    (tmp_path / "vit").mkdir()
    _, folder = vit_folder(tmp_path / "vit")
    without(tmp_path / "vit", "query")
    with pytest.raises(UserError, match="its file lacks 4 weights, such as .*q_proj"):
        genview.FrozenEncoder(folder)
    config = transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1])
    transformers.ResNetModel(config).save_pretrained(tmp_path / "resnet")
    without(tmp_path / "resnet", "running_")
    with pytest.raises(UserError, match="its file lacks .* weights, such as .*running_"):
        genview.FrozenEncoder(str(tmp_path / "resnet"))


def test_features_that_are_not_finite_are_named_before_the_fit():
    part = torch.ones(2, 4, 8)
    part[1, 2, 3] = float("inf")
    with pytest.raises(UserError, match="of some images are not finite: --precision float32"):
        genview.collect_tokens([part[:1], part[1:]], 2)


@pytest.mark.parametrize("name", ["model.safetensors", "pytorch_model.bin"])
def test_a_pointer_in_the_place_of_an_encoders_weights_is_named(name, tmp_path):
    _, folder = vit_folder(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / name).write_text("version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(UserError, match="is a git-lfs pointer.*: name another folder by --enc"):
        genview.FrozenEncoder(folder)


def test_a_detector_is_no_encoder(tmp_path):
    """The last hidden state of one with a decoder tells of its queries, in no order."""
    t = transformers
    own = t.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1])
    t.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None,
                 backbone_config=own).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="it is an encoder with a decoder"):
        genview.FrozenEncoder(str(tmp_path))


def test_processors_that_do_more_than_scale_are_refused(tmp_path, monkeypatch):
    model, folder = vit_folder(tmp_path)
    oblong = dict(height=48, width=64)
    transformers.ViTImageProcessor(size=oblong).save_pretrained(folder)
    with pytest.raises(UserError, match=r"makes \(4, 3, 48, 64\) of four square pictures"):
        genview.FrozenEncoder(folder)

    def grey(pictures, return_tensors):
        x = torch.tensor(np.array(pictures)).permute(0, 3, 1, 2).float()
        return dict(pixel_values=x.mean(1, keepdim=True).expand_as(x))
    monkeypatch.setattr(transformers.AutoImageProcessor, "from_pretrained", lambda *_, **__: grey)
    with pytest.raises(UserError, match="its image processor mixes red, green and blue"):
        genview.FrozenEncoder(folder)


def test_the_encoder_of_the_release(tmp_path, monkeypatch):
    """Its architecture by timm, with random weights and a block a stage: timm's own map, row by
    row, of views of any size at 224 pixels. Without timm: how to install it."""
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = transformers.TimmWrapperModel(transformers.TimmWrapperConfig(
        architecture="convnext_base", num_classes=0, model_args=dict(depths=[1, 1, 1, 1]),
        pretrained_cfg=dict(input_size=[3, 256, 256], mean=augment.CLIP_MEAN,
                            std=augment.CLIP_STD)))
    model.save_pretrained(tmp_path)
    assert genview.FrozenEncoder(str(tmp_path)).size == 256        # by another name: the model's
    assert genview.FrozenEncoder.NAMES["release"].endswith("/convnext_base.clip_laion2b_augreg")
    monkeypatch.setitem(genview.FrozenEncoder.NAMES, "release", str(tmp_path))
    encoder, x = genview.FrozenEncoder("release"), torch.randn(1, 3, 224, 224)
    depths = [len(stage.blocks) for stage in model.timm_model.stages]       # 4.48 keeps the usual
    own = timm.create_model("convnext_base", num_classes=0, depths=depths).eval()
    own.load_state_dict(model.timm_model.state_dict())
    with torch.no_grad():
        expected = own.forward_features(x)
    assert expected.shape == (1, 1024, 7, 7) and encoder(x[..., :99, :99]).shape == (1, 49, 1024)
    got = encoder(x)[0]
    print(f"release: largest difference {(got - expected[0].flatten(1).T).abs().max():.1e} of "
          f"{expected.abs().max():.2g}")
    for place in (8, 48):
        there = expected[0, :, place // 7, place % 7]
        torch.testing.assert_close(got[place], there, atol=1e-4, rtol=1e-3)
    monkeypatch.setattr(transformers.AutoModel, "from_pretrained", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="pip install timm"):
        genview.FrozenEncoder("release")
