"""Small stand-ins with random weights of fixed seeds: a Stable unCLIP pipeline, a CLIP vision
model, a folder of images.

They are of the real classes: the scripts run as with the real models, in seconds and offline.
"""
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from studies import train_generator


def clip_vision_model(seed=0):
    """A CLIP vision model for 32 x 32 pixels: 8 x 8 tokens of 32 numbers, an embedding of 16."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
    torch.manual_seed(seed)
    model = CLIPVisionModelWithProjection(CLIPVisionConfig(
        hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        image_size=32, patch_size=4, projection_dim=16))
    with torch.no_grad():    # the usual initial weights are so small that all images look alike
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
    return model.eval()


def save_clip(folder):
    """Saves the vision model alone, for genview.FrozenEncoder. Returns the folder as text."""
    clip_vision_model().save_pretrained(folder)
    return str(folder)


def save_pipeline(folder):
    """Saves a StableUnCLIPImg2ImgPipeline for 32 x 32 pixels (latents of 16 x 16 x 4). Returns the
    folder as text."""
    import diffusers
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    from transformers import CLIPImageProcessor
    folder = Path(folder)
    image_encoder = clip_vision_model()
    unet = diffusers.UNet2DConditionModel(
        sample_size=16, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=4,
        attention_head_dim=4, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"), cross_attention_dim=16,
        class_embed_type="projection", projection_class_embeddings_input_dim=2 * 16)
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 16), latent_channels=4, norm_num_groups=4, sample_size=32,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2)
    folder.mkdir(parents=True, exist_ok=True)
    text_encoder, tokenizer = train_generator.text_side(folder)
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        image_encoder=image_encoder, unet=unet, vae=vae, text_encoder=text_encoder,
        tokenizer=tokenizer, image_normalizer=StableUnCLIPImageNormalizer(embedding_dim=16),
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 32},
                                             crop_size={"height": 32, "width": 32}),
        image_noising_scheduler=diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2"),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False,
            set_alpha_to_one=False, steps_offset=1, prediction_type="v_prediction"))
    pipe.save_pretrained(folder)
    return str(folder)


def save_images(folder, per_class=12, size=32, classes=("cat", "dog"), seed=0):
    """Writes train/<class>/<number>.png and test/<class>/<number>.png: coloured gradients with
    noise and a bright square of random size. Returns the folder as text."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:1:size * 1j, 0:1:size * 1j]
    for split in ("train", "test"):
        for name in classes:
            target = Path(folder) / split / name
            target.mkdir(parents=True, exist_ok=True)
            for number in range(per_class):
                direction, colour = rng.uniform(-1, 1, 2), rng.uniform(40, 215, 3)
                figure = rng.uniform(0, 255, 3)
                picture = colour + 60 * (direction[0] * x + direction[1] * y)[..., None]
                picture += rng.normal(0, 12, (size, size, 3))
                half = int(rng.uniform(0.1, 0.5) * size)
                middle = slice(size // 2 - half, size // 2 + half)
                picture[middle, middle] = figure
                content = picture.clip(0, 255).astype(np.uint8)
                Image.fromarray(content).save(target / f"{number:04d}.png")
    return str(folder)


def save_views(images, folder, leave_out=0):
    """Writes views of the training images but the first ones: their negatives."""
    for path in sorted(Path(images, "train").rglob("*.png"))[leave_out:]:
        target = Path(folder) / path.relative_to(images)
        target.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(255 - np.asarray(Image.open(path))).save(target)
    return folder
