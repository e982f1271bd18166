r"""Trains a miniature of Stable unCLIP for 32 x 32 pictures from scratch, in the very same format.

    python train_generator.py --data-dir data/tinyimagenet32 --steps 5000        # writes runs/generator, a pipeline's folder
    python generate_views.py --dataset cifar10 --model runs/generator --steps 2 --guidance 1.25 --preview 8      # look first

Train it on other pictures than those of the self-supervised run: any image folder, or CIFAR-100. Four parts are trained one
after the other, by one loop (fit): the autoencoder; a teacher, needed only to train the next; the image encoder C (and E of
the paper); and the denoising U-Net, which with the decoder is the generator G. The text side of the pipeline is fixed and says
nothing: GenView's prompt is empty.

Legend of the shapes: N pictures of the data, n of a batch, D size of an image embedding, z latents (channels, side, side),
64 = 8 x 8 places of a picture, K = 128 channels of the teacher's maps.
"""
import argparse
import copy
import json
import math
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import nn

import genview
from generate_views import LEVELS, MINI, quieten
from genview import Trouble, say

SIZE = 32                              # side of the pictures
EMBEDDING = 256                        # D
LATENT_CHANNELS = 48                   # of 4 x 4 latents: a quarter of the picture's numbers, on a grid that a CPU can afford


class Recipe(NamedTuple):
    steps: float                       # share of --steps
    batch: float                       # share of --batch-size
    rate: float                        # highest learning rate


PARTS = dict(autoencoder=Recipe(0.8, 0.25, 2e-3), teacher=Recipe(0.1, 1.0, 4e-3), encoder=Recipe(0.4, 0.5, 1.5e-3),
             generator=Recipe(0.55, 1.0, 2e-3))


class Data(NamedTuple):
    """N pictures on the device; with mirrored, an index from N on is the mirror image of picture index - N."""
    pixels: torch.Tensor               # (N, 3, 32, 32) uint8
    labels: torch.Tensor               # (N,)
    mirrored: bool

    @property
    def size(self):
        return len(self.pixels) * (2 if self.mirrored else 1)

    def pictures(self, index):
        """(n,) -> (n, 3, 32, 32) in [-1, 1]."""
        x = self.pixels[index % len(self.pixels)].float() / 127.5 - 1
        return torch.where((index >= len(self.pixels))[:, None, None, None], x.flip(3), x)


# ------------------------------------------------------------------------------------------- part 1: latents of a picture

class Autoencoder(nn.Module):
    """A small AutoencoderKL: pictures x (n, 3, 32, 32) in [-1, 1] <-> latents z (n, LATENT_CHANNELS, 4, 4)."""

    def __init__(self):
        from diffusers import AutoencoderKL
        super().__init__()
        self.vae = AutoencoderKL(block_out_channels=(16, 32, 64, 64), latent_channels=LATENT_CHANNELS, norm_num_groups=8,
                                 sample_size=SIZE, mid_block_add_attention=False,
                                 down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)

    def forward(self, data, index, generator):
        x = data.pictures(index)
        posterior = self.vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator, device=x.device)
        error = F.mse_loss(self.vae.decode(posterior.mean + posterior.std * noise).sample.float(), x)
        # KL(N(mean, var) || N(0, 1)), weighted just enough to keep the latents near unit scale.
        kl = 0.5 * (posterior.mean ** 2 + posterior.var - 1 - posterior.logvar).float().mean()
        return {"error": error, "kl": 1e-5 * kl}


# --------------------------------------------------------------------- part 2: a teacher, which knows objects by their names

class Teacher(nn.Module):
    """A small convolutional classifier: pictures -> feature maps m (n, 64, K), row by row.

    CLIP contrasts pictures with captions. Here a caption is a class name, and there are few of them, so each has a learned
    embedding (a row of classes) in the place of a text encoder's, and the contrast is with all classes: it needs no large
    batch. The image encoder below, a transformer, would need far more pictures to learn objects so; it learns from this.
    """

    def __init__(self, num_classes):
        from torchvision.models.resnet import BasicBlock
        super().__init__()

        def block(before, after, stride):
            shortcut = None if before == after else nn.Sequential(nn.Conv2d(before, after, 1, stride, bias=False),
                                                                  nn.BatchNorm2d(after))
            return BasicBlock(before, after, stride, shortcut)
        self.features = nn.Sequential(nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
                                      block(32, 64, 1), block(64, 128, 2), block(128, 128, 1))
        self.classes = nn.Linear(128, num_classes)

    def maps(self, x):
        x = x.contiguous(memory_format=torch.channels_last)            # CPUs are faster so
        return self.features(x).flatten(2).mT.float()

    def forward(self, data, index, generator):
        # captions = -log(exp(<f, t_y> + b_y) / sum_k exp(<f, t_k> + b_k)),  f the mean of the map; t_k, b_k of class k
        scores = self.classes(self.maps(data.pictures(index)).mean(1))                                  # (n, classes)
        return {"captions": F.cross_entropy(scores.float(), data.labels[index % len(data.labels)])}


def targets(data, teacher):
    r"""What the image encoder imitates: a function, pictures (n, 3, 32, 32) -> t (n, 64, K).

    t_ijk = (m_ijk - mean_k - (mean_jk - mean_k) / 4) / std,    m_i the teacher's map of picture i, j the place, k the channel

    A quarter of what the place alone tells is subtracted: the encoder learns places sooner than objects, and the first
    component of its tokens would show little else.
    """
    some = genview.spaced(data.size, 2000).to(data.pixels.device)
    maps = torch.cat([teacher.maps(data.pictures(part)) for part in some.split(500)])                   # (up to 2000, 64, K)
    mean = maps.mean((0, 1))                                                                            # (K,)
    offset, std = mean.lerp(maps.mean(0), 0.25), (maps - mean).square().mean().sqrt()                   # (64, K), ()
    return lambda x: (teacher.maps(x) - offset) / std


# ------------------------------------------------------------------------------------------- part 3: the image encoder C

class ImageEncoder(nn.Module):
    """A small CLIP vision model: pictures -> embeddings c (n, D), with 8 x 8 patch tokens that show the foreground.

    It imitates the teacher: the first half of each token is twice the target t at that place (targets), and a linear head
    finds the mean of t in c. That alone would leave nothing but objects in c, while CLIP's c, from 400 million free captions,
    also tells colour and layout (without which unCLIP could not draw a variation): another head must find a thumbnail in c.
    """

    def __init__(self):
        from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection
        super().__init__()
        self.model = CLIPVisionModelWithProjection(CLIPVisionConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4, image_size=SIZE, patch_size=4,
            projection_dim=EMBEDDING, hidden_act="gelu"))
        self.objects = nn.Linear(EMBEDDING, 128)
        self.layout = nn.Linear(EMBEDDING, 3 * 16 * 16)

    def forward(self, data, index, generator):
        data, target = data
        x = data.pictures(index)
        t, thumbnail = target(x), F.avg_pool2d(x, 2).flatten(1)                                         # (n, 64, K), (n, 768)
        output = self.model(genview.normalise(x / 2 + 0.5))
        tokens = genview.clip_tokens(self.model.vision_model, output.last_hidden_state).float()         # (n, 64, 2 K)
        c = output.image_embeds                                                                         # (n, D)
        # Twice t, of variance 1: so the first component of the tokens lies in this half, not in the one that nothing holds.
        # The weights leave losses of like size at the end: 2.3, 0.7, 2.9.
        return {"tokens": 10 * F.mse_loss(tokens[..., :t.shape[2]] / 2, t),
                "objects": 10 * F.mse_loss(self.objects(c).float(), t.mean(1)),
                "layout": 400 * F.mse_loss(self.layout(c).float(), thumbnail)}


def embed(model, x):
    """C: pictures x (n, 3, 32, 32) in [-1, 1] -> c (n, D); the model sees them normalised as CLIP's."""
    return model(genview.normalise(x / 2 + 0.5)).image_embeds


@torch.no_grad()
def spread(encoder, c):
    """Evens out embeddings: the few large principal components no longer drown what the many small ones tell the U-Net.

    c' = c U diag(lambda)^(-1/4),  Cov(c) = U diag(lambda) U^T: uncorrelated, each variance the root of what it was

    Args:
        encoder: CLIPVisionModelWithProjection, left as it is.
        c: its embeddings (N, D), N > 1.
    Returns:
        a copy of the encoder that gives c', by another last linear layer, and c' (N, D), float32.
    Source: none; not in the paper.
    """
    encoder, c = copy.deepcopy(encoder), c.float()
    variance, axes = torch.linalg.eigh(torch.cov(c.T.cpu().double()))           # MPS has no float64
    turn = (axes * variance.clamp_min(1e-4 * variance.max()) ** -0.25).to(c)    # (D, D); of the smallest too little is known
    encoder.visual_projection.weight.copy_(turn.T @ encoder.visual_projection.weight)
    return encoder, c @ turn


# ------------------------------------------------------------------------------------------- part 4: the denoising U-Net

class Generator(nn.Module):
    """The U-Net of unCLIP: denoises latents, told the noised embedding of the image and how noisy that is.

    There is no attention in it (on a CPU it would triple the time) and nothing comes from the text.
    """

    def __init__(self, normalizer):
        """normalizer: scales embeddings to mean 0 and, on average over the D numbers, variance 1."""
        from diffusers import DDIMScheduler, DDPMScheduler, UNet2DConditionModel
        super().__init__()
        self.normalizer = normalizer
        self.unet = UNet2DConditionModel(
            sample_size=4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS, block_out_channels=(160, 192),
            layers_per_block=1, down_block_types=("DownBlock2D",) * 2, mid_block_type="UNetMidBlock2D",
            up_block_types=("UpBlock2D",) * 2, cross_attention_dim=16, resnet_time_scale_shift="scale_shift",
            time_embedding_dim=768, class_embed_type="projection", projection_class_embeddings_input_dim=2 * EMBEDDING)
        self.image_noise = DDPMScheduler(beta_schedule="squaredcos_cap_v2")               # abar of the embedding
        self.scheduler = DDIMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
                                       set_alpha_to_one=True, timestep_spacing="trailing")       # abar of the latents

    def forward(self, data, index, generator):
        z, c = (numbers[index].float() for numbers in data)            # latents and embeddings of pictures
        n, device = len(z), z.device
        draw = dict(generator=generator, device=device)
        # Noise levels l: half of them 0, where there is most to learn, the others uniform in [0, 500).
        level = torch.randint(500, (n,), **draw) * (torch.rand(n, **draw) < 0.5)
        condition = noised(c, level, torch.randn(c.shape, **draw), self.normalizer, self.image_noise)   # (n, 2 D)
        condition = condition * (torch.rand(n, 1, **draw) >= 0.1)      # none for a tenth: classifier-free guidance
        # Steps t: the larger of two draws, so that there are more of the late ones, where c has the most to say.
        noise, t = torch.randn(z.shape, **draw), torch.randint(1000, (2, n), **draw).amax(0)
        # z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e;  to predict: v = sqrt(abar_t) e - sqrt(1 - abar_t) z
        z_t = self.scheduler.add_noise(z, noise, t)
        words = z.new_zeros(n, 1, 16)                                  # no attention looks at them
        v = self.unet(z_t, t, words, class_labels=condition).sample
        return {"v": F.mse_loss(v.float(), self.scheduler.get_velocity(z, noise, t))}


def noised(c, level, noise, normalizer, scheduler):
    r"""What the U-Net is told about an image: its embedding with noise of level l, and l.

    z^l = mean + std (sqrt(abar_l) (c - mean) / std + sqrt(1 - abar_l) e),  e ~ N(0, I);    condition = (z^l, sinusoids of l)

    Args:
        c: embeddings (n, D).
        level: l (n,), of the 1,000 noising steps.
        noise: e (n, D).
        normalizer: has mean (1, D) and std (1, D) of c over the data; here one std for all numbers.
        scheduler: has abar.
    Returns:
        (n, 2 D), as StableUnCLIPImg2ImgPipeline.noise_image_embeddings computes it.
    Source: GenView, section "framework"; unCLIP (Ramesh et al. 2022) for the format.
    """
    from diffusers.models.embeddings import get_timestep_embedding
    z = normalizer.unscale(scheduler.add_noise(normalizer.scale(c), noise, level))
    return torch.cat([z, get_timestep_embedding(level, c.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)], 1)


# ------------------------------------------------------------------------------------------------------ loop, checkpoints

def fit(part, net, data, size, args, world, state, show=lambda ema: None):
    """Trains one part: AdamW, warm-up and cosine, moving average of the weights. Returns that average, frozen.

    net: net(data, index, generator) returns its losses by name.
    data: whatever that net takes.
    size: indices below it are drawn.
    state: what last.pt holds, state[part] of this part; updated.
    show: called with the average whenever a checkpoint is written.
    """
    recipe, progress = PARTS[part], state[part]
    steps, batch = (max(1, round(share * n)) for share, n in ((recipe.steps, args.steps), (recipe.batch, args.batch_size)))
    gpu = world.device.type == "cuda"                                  # on a CPU it costs autoencoder and U-Net a little
    net = net.to(world.device, memory_format=torch.channels_last if gpu else torch.contiguous_format)
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), lr=recipe.rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    for name, module in dict(net=net, ema=ema, optimizer=optimizer).items():
        if name in progress:
            module.load_state_dict(progress[name])
    start, saved, window = progress.get("step", 0), time.time(), []
    bar = genview.progress(range(start, steps), part, "step", total=steps, initial=start)
    for step in bar:
        generator = torch.Generator(world.device).manual_seed(
            genview.step_generator(args.seed, list(PARTS).index(part), step).initial_seed())
        rate = recipe.rate * min(1, (step + 1) / min(200, 0.1 * steps)) * 0.5 * (1 + math.cos(math.pi * step / steps))
        for group in optimizer.param_groups:
            group["lr"] = rate
        index = torch.randint(size, (batch,), generator=generator, device=world.device)
        with world.autocast():
            losses = net(data, index, generator)
        descend(net, ema, optimizer, sum(losses.values()), step)
        window.append(torch.stack([value.detach() for value in losses.values()]))
        done = step + 1 == steps
        due = done or time.time() - saved > 60 * args.save_minutes     # a checkpoint
        if (step + 1) % args.log_every == 0 or due:
            means = dict(zip(losses, torch.stack(window).mean(0).tolist()))
            if not all(map(math.isfinite, means.values())):
                raise Trouble(f"the loss of the {part} is not finite at step {step + 1}: {means}; "
                              f"the same command goes on from the last checkpoint, which is whole")
            log(args, dict(part=part, step=step + 1, lr=rate, time=round(time.time(), 1), **means))
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
            window = []
        if due:
            show(ema)                                                  # first: once last.pt says done, nobody comes back
            progress.update(step=step + 1, ema=ema.state_dict(), net=net.state_dict(), optimizer=optimizer.state_dict())
            if done:                                                   # of a finished part the average is enough
                del progress["net"], progress["optimizer"]
            genview.write_whole(args.output_dir / "last.pt", lambda temporary: torch.save(state, temporary))
            saved = time.time()
    return ema


def descend(net, ema, optimizer, loss, step):
    """A step of the optimizer, then of the moving average."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    decay = min(0.999, (1 + step) / (10 + step))                       # a long memory only when there is something to keep
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        for mine, its in zip(ema.buffers(), net.buffers()):            # batch norm's: running averages, those of net
            mine.copy_(its)


def log(args, line):
    genview.append(args.output_dir / "log.jsonl", json.dumps(line) + "\n")


def settings_of(args):
    settings = {name: getattr(args, name) for name in "dataset data_dir limit steps batch_size seed".split()}
    return settings | {"parts": {part: list(recipe) for part, recipe in PARTS.items()}}


def load_state(args):
    """What last.pt holds, or a fresh start: {"settings": ..., part: its progress}."""
    path, settings = args.output_dir / "last.pt", settings_of(args)
    if not path.exists():
        return {"settings": settings} | {part: {} for part in PARTS}
    state = genview.load_checkpoint(path)
    if state.get("settings") != settings:
        raise Trouble(f"{path} is of other settings ({state.get('settings')}): name another --output-dir or remove it")
    return state


@torch.inference_mode()
def encode(data, world, function):
    """function (pictures -> numbers) over all of data, kept in half precision."""
    parts = torch.arange(data.size, device=world.device).split(500)
    with world.autocast():
        numbers = [function(data.pictures(part)).half() for part in genview.progress(parts, "encoding", "batch")]
    return torch.cat(numbers)


# ------------------------------------------------------------------------------------------------------------ the pipeline

def text_side(folder):
    """The pipeline's text model and tokenizer: three words, random weights, never looked at."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer
    vocabulary, merges = Path(folder, "vocabulary.json"), Path(folder, "merges.txt")
    vocabulary.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    merges.write_text("#version: 0.2\n")
    model = CLIPTextModel(CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=8, bos_token_id=0, eos_token_id=1, pad_token_id=1, projection_dim=16))
    return model, CLIPTokenizer(str(vocabulary), str(merges), model_max_length=8)


def assemble(vae, encoder, generator):
    """Autoencoder, image encoder and U-Net as a StableUnCLIPImg2ImgPipeline, float32."""
    from diffusers import StableUnCLIPImg2ImgPipeline
    from transformers import CLIPImageProcessor
    with tempfile.TemporaryDirectory() as folder:
        text_encoder, tokenizer = text_side(folder)
    processor = CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE})
    return StableUnCLIPImg2ImgPipeline(
        image_encoder=encoder, unet=generator.unet, vae=vae, text_encoder=text_encoder, tokenizer=tokenizer,
        feature_extractor=processor, image_normalizer=generator.normalizer, image_noising_scheduler=generator.image_noise,
        scheduler=generator.scheduler)


@torch.inference_mode()
def draw_samples(pipe, data, path, steps=MINI["steps"], guidance=MINI["guidance"], columns=16):
    """Rows: pictures, what the autoencoder keeps of them, a view at each noise level."""
    x = data.pictures(genview.spaced(len(data.pixels), columns).to(data.pixels.device))
    pipe.to(x.device)                              # the text model is new
    kept = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
    c = embed(pipe.image_encoder, x)
    prompt = pipe.encode_prompt("", x.device, 1, False)[0].repeat(len(x), 1, 1)
    pipe.set_progress_bar_config(disable=True)
    views = [pipe(image_embeds=c, noise_level=level, prompt_embeds=prompt,
                  negative_prompt_embeds=prompt, generator=[torch.Generator().manual_seed(i) for i in range(len(x))],
                  num_inference_steps=steps, guidance_scale=guidance, height=SIZE, width=SIZE, output_type="pt").images
             for level in LEVELS]
    grid = torchvision.utils.make_grid(torch.cat([x / 2 + 0.5, (kept / 2 + 0.5).clamp(0, 1), *views]), columns)
    genview.write_whole(path, lambda temporary: torchvision.utils.save_image(grid, temporary, format="png"))


# ------------------------------------------------------------------------------------------------------------ command line

def train(args, world):
    """The four parts, one after the other; each sees the ones before it frozen."""
    from diffusers.pipelines.stable_diffusion import StableUnCLIPImageNormalizer
    state = load_state(args)
    images = genview.load_images(args.dataset, args.data_dir, "train", SIZE, args.limit)
    seen_often = args.steps * args.batch_size > 30 * len(images.pixels)             # else mirror images are not worth encoding
    data = Data(images.pixels.to(world.device), images.labels.to(world.device), mirrored=seen_often)
    torch.manual_seed(args.seed)                                       # of the first weights
    vae = fit("autoencoder", Autoencoder(), data, data.size, args, world, state).vae
    teacher = fit("teacher", Teacher(images.num_classes), data, data.size, args, world, state)
    encoder = fit("encoder", ImageEncoder(), (data, targets(data, teacher)), data.size, args, world, state).model
    latents = encode(data, world, lambda x: vae.encode(x).latent_dist.mean)
    encoder, embeddings = spread(encoder, encode(data, world, lambda x: embed(encoder, x)))
    vae.register_to_config(scaling_factor=1 / latents.float().std().item())        # so that scaled latents have variance 1
    normalizer = StableUnCLIPImageNormalizer(EMBEDDING).requires_grad_(False)
    normalizer.mean.copy_(embeddings.mean(0, keepdim=True))
    normalizer.std.fill_(embeddings.var(0).mean().sqrt())

    def show(generator):
        pipe = assemble(vae, encoder, generator)
        copy.deepcopy(pipe).to(torch.float16).save_pretrained(args.output_dir)     # half the size; whoever loads it casts
        draw_samples(pipe, data, args.output_dir / "samples.png")

    fit("generator", Generator(normalizer), (latents * vae.config.scaling_factor, embeddings), data.size, args, world, state,
        show)


def parse_args():
    parser = argparse.ArgumentParser(description="Trains a 32 x 32 Stable unCLIP from scratch, for generate_views.py --model.")
    parser.add_argument("--dataset", choices=["folder", "cifar100"], default="folder")
    parser.add_argument("--data-dir", help="a folder with train/ below it, or where CIFAR-100 lies (default: data)")
    parser.add_argument("--limit", type=genview.at_least(2), help="use so many pictures")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/generator"), help="becomes the pipeline's folder")
    parser.add_argument("--steps", type=genview.at_least(1), default=50_000,
                        help="each part takes its multiple of them, see PARTS")
    parser.add_argument("--batch-size", type=genview.at_least(4), default=128)
    parser.add_argument("--seed", type=genview.at_least(0), default=0)
    parser.add_argument("--device", help="default: cuda, else mps, else cpu")
    parser.add_argument("--log-every", type=genview.at_least(1), default=20, help="steps")
    parser.add_argument("--save-minutes", type=float, default=5.0, help="between checkpoints")
    args = parser.parse_args()
    args.data_dir = args.data_dir or genview.default_data_dir(args.dataset)
    return args


def main():
    args = parse_args()
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quieten()
    world = genview.setup(args.device)
    if world.size > 1:
        raise Trouble("one process trains the generator: start it without torchrun")
    train(args, world)
    say(f"{args.output_dir} is a StableUnCLIPImg2ImgPipeline, {args.output_dir}/samples.png shows what it draws; next:\n"
        f"  python generate_views.py --dataset cifar10 --model {args.output_dir} --steps {MINI['steps']} "
        f"--guidance {MINI['guidance']} --preview 8")


if __name__ == "__main__":
    genview.run(main)
