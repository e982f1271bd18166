r"""Trains a miniature of Stable unCLIP for 32 x 32 pictures from scratch, in the same format.

    python -m studies.train_generator --data-dir data/tinyimagenet32 --steps 5000
    python generate_views.py --dataset cifar10 --model runs/generator --steps 2 --guidance 1.25

Four parts are trained in turn (fit): the autoencoder; a teacher, which only the next part needs;
the
image encoder C (also the paper's E); the U-Net, which with the decoder is the generator G.

Shapes: N pictures, n of a batch x (n, 3, 32, 32) in [-1, 1], embeddings c of D numbers, latents z,
64 = 8 x 8 places of a picture, K = 128 channels of the teacher's maps.
"""
import copy
import json
import math
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

if not __package__:
    print("error: call it from the root: python -m studies.train_generator", file=sys.stderr)
    sys.exit(2)

import diffusers
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn

from generate_views import LEVELS, generate, load_pipeline, quieten
from genview import clip_tokens, load_images
from recipes import DATA_DIRS, GENERATION
from support.augment import normalise
from support.checkpoints import load_checkpoint
from support.data import spaced, to_tensor
from support.files import append, write_whole
from support.world import Parser, UserError, progress, say, script, setup, step_generator, whole

SIZE = 32                # side of the pictures
EMBEDDING = 256          # D
LATENT_CHANNELS = 48     # of 4 x 4 latents: a quarter of the picture's numbers on a small grid
# Part: its share of --steps, its share of --batch-size, its highest learning rate.
PARTS = {"autoencoder": (0.8, 0.25, 2e-3), "teacher": (0.1, 1.0, 4e-3),
         "encoder": (0.4, 0.5, 1.5e-3), "generator": (0.55, 1.0, 2e-3)}


class Data(NamedTuple):
    pixels: torch.Tensor     # (N, 3, 32, 32) uint8
    labels: torch.Tensor     # (N,)

    def pictures(self, index):
        """(n,) -> x (n, 3, 32, 32) in [-1, 1]."""
        return self.pixels[index].float() / 127.5 - 1


class Autoencoder(nn.Module):
    """Part 1, a small AutoencoderKL: x <-> z (n, LATENT_CHANNELS, 4, 4)."""
    def __init__(self):
        super().__init__()
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 64, 64), latent_channels=LATENT_CHANNELS, norm_num_groups=8,
            sample_size=SIZE, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)

    def forward(self, data, index, draw):
        x = data.pictures(index)
        q = self.vae.encode(x).latent_dist
        z = q.mean + q.std * torch.randn(q.mean.shape, **draw)
        # KL(N(mean, var) || N(0, 1)): its small weight keeps the latents near unit scale
        kl = 0.5 * (q.mean ** 2 + q.var - 1 - q.logvar).float().mean()
        return {"error": F.mse_loss(self.vae.decode(z).sample.float(), x), "kl": 1e-5 * kl}


class Teacher(nn.Module):
    """Part 2, a small convolutional classifier: x -> feature maps m (n, 64, K), row by row.

    CLIP contrasts pictures with captions. Here captions are class names, so few that each has a
    learned embedding instead of a text encoder's, and all are contrasted without a large batch.
    The transformer of part 3 would need far more pictures for this; it learns from these maps.
    """
    def __init__(self, num_classes):
        super().__init__()

        def block(before, after, stride):
            shortcut = None if before == after else nn.Sequential(
                nn.Conv2d(before, after, 1, stride, bias=False), nn.BatchNorm2d(after))
            return torchvision.models.resnet.BasicBlock(before, after, stride, shortcut)
        self.features = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            block(32, 64, 1), block(64, 128, 2), block(128, 128, 1))
        self.classes = nn.Linear(128, num_classes)

    def maps(self, x):
        x = x.contiguous(memory_format=torch.channels_last)            # faster on a CPU
        return self.features(x).flatten(2).mT.float()

    def forward(self, data, index, draw):
        # captions = -log(exp(<f, t_y> + b_y) / sum_k exp(<f, t_k> + b_k)), f = mean of m, k a class
        scores = self.classes(self.maps(data.pictures(index)).mean(1))  # (n, classes)
        return {"captions": F.cross_entropy(scores.float(), data.labels[index])}


def targets(data, teacher):
    r"""What the image encoder imitates. Returns a function: x -> t (n, 64, K).

    t_ijk = (m_ijk - mean_k - (mean_jk - mean_k) / 4) / std,    picture i, place j, channel k

    A quarter of what the place alone predicts is subtracted: the encoder learns places sooner than
    objects, and otherwise the first component of its tokens would show little but the place.
    """
    some = spaced(len(data.pixels), 2000).to(data.pixels.device).split(500)
    maps = torch.cat([teacher.maps(data.pictures(part)) for part in some])      # (<= 2000, 64, K)
    mean = maps.mean((0, 1))                                                    # (K,)
    offset, std = mean.lerp(maps.mean(0), 0.25), (maps - mean).square().mean().sqrt()
    return lambda x: (teacher.maps(x) - offset) / std


class ImageEncoder(nn.Module):
    """Part 3, C, a small CLIP vision model: x -> c (n, D) and 8 x 8 patch tokens.

    Half of each token learns the target t of its place; a head predicts the mean of t from c. This
    alone would leave only objects in c. CLIP's c also tells colour and layout, without which unCLIP
    could not draw variations: another head predicts a thumbnail from c.
    """
    def __init__(self):
        super().__init__()
        self.model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            image_size=SIZE, patch_size=4, projection_dim=EMBEDDING, hidden_act="gelu"))
        self.objects, self.layout = nn.Linear(EMBEDDING, 128), nn.Linear(EMBEDDING, 3 * 16 * 16)

    def forward(self, data, index, draw):
        data, target = data
        x = data.pictures(index)
        t, thumbnail = target(x), F.avg_pool2d(x, 2).flatten(1)        # (n, 64, K), (n, 768)
        output = self.model(normalise(x / 2 + 0.5))
        tokens = clip_tokens(self.model.vision_model, output.last_hidden_state).float()
        c = output.image_embeds                                        # (n, 64, 2 K), (n, D)
        # Tokens learn 2 t: so their first component lies in this half, not in the untrained one.
        # The weights bring the losses to a similar size at the end: 2.3, 0.7, 2.9.
        return {"tokens": 10 * F.mse_loss(tokens[..., :t.shape[2]] / 2, t),
                "objects": 10 * F.mse_loss(self.objects(c).float(), t.mean(1)),
                "layout": 400 * F.mse_loss(self.layout(c).float(), thumbnail)}


def embed(model, x):
    """C: x -> c (n, D)."""
    return model(normalise(x / 2 + 0.5)).image_embeds


@torch.no_grad()
def spread(encoder, c):
    """Makes the principal components of c more equal: the U-Net ignores small ones. Not in the
    paper.

    c' = c U diag(lambda)^(-1/4),  Cov(c) = U diag(lambda) U^T: uncorrelated, variances sqrt(lambda)

    Takes C and its embeddings c (N, D) of N > 1 pictures. Returns a copy of C whose last linear
    layer gives c', and c' (N, D), float32.
    """
    encoder, c = copy.deepcopy(encoder), c.float()
    variance, axes = torch.linalg.eigh(torch.cov(c.T.cpu().double()))           # MPS has no float64
    variance = variance.clamp_min(1e-4 * variance.max())                # the smallest are uncertain
    turn = (axes * variance ** -0.25).to(c)                             # (D, D)
    encoder.visual_projection.weight.copy_(turn.T @ encoder.visual_projection.weight)
    return encoder, c @ turn


class Generator(nn.Module):
    """Part 4, unCLIP's U-Net: denoises z, given c with noise of level l, and l.

    No attention, which would triple its time on a CPU; so the (empty) prompt has no influence.
    normalizer: scales embeddings to mean 0 and, averaged over the D numbers, variance 1.
    """
    def __init__(self, normalizer):
        super().__init__()
        self.normalizer = normalizer
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=4, in_channels=LATENT_CHANNELS, out_channels=LATENT_CHANNELS,
            block_out_channels=(160, 192), layers_per_block=1, mid_block_type="UNetMidBlock2D",
            down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2,
            cross_attention_dim=16, resnet_time_scale_shift="scale_shift", time_embedding_dim=768,
            class_embed_type="projection", projection_class_embeddings_input_dim=2 * EMBEDDING)
        self.image_noise = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2")   # of c
        self.scheduler = diffusers.DDIMScheduler(                                       # of z
            beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", clip_sample=False,
            set_alpha_to_one=True, timestep_spacing="trailing")

    def forward(self, data, index, draw):
        z, c = (numbers[index].float() for numbers in data)
        n = len(z)
        # Half of the levels l are 0, where there is most to learn; the others uniform in [0, 500).
        level = torch.randint(500, (n,), **draw) * (torch.rand(n, **draw) < 0.5)
        e = torch.randn(c.shape, **draw)
        condition = noised(c, level, e, self.normalizer, self.image_noise)
        # Classifier-free guidance: a tenth learns without a condition.
        condition = condition * (torch.rand(n, 1, **draw) >= 0.1)
        # Steps t: the larger of two draws, because c matters most at the late ones.
        e, t = torch.randn(z.shape, **draw), torch.randint(1000, (2, n), **draw).amax(0)
        # z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e,  target v = sqrt(abar_t) e - sqrt(1 - abar_t) z
        z_t, v = self.scheduler.add_noise(z, e, t), self.scheduler.get_velocity(z, e, t)
        predicted = self.unet(z_t, t, z.new_zeros(n, 1, 16), class_labels=condition).sample
        return {"v": F.mse_loss(predicted.float(), v)}


def noised(c, level, noise, normalizer, scheduler):
    r"""The U-Net's condition (n, 2 D), equal to unCLIP's (diffusers' noise_image_embeddings).

    z^l = mean + std (sqrt(abar_l) (c - mean) / std + sqrt(1 - abar_l) e);  condition = (z^l, sin l)

    c and noise e ~ N(0, I): (n, D). level: l (n,), of 1,000 steps. normalizer: has mean and std of
    c.
    scheduler: has abar. Source: GenView, section "framework"; Ramesh et al. 2022.
    """
    z = normalizer.unscale(scheduler.add_noise(normalizer.scale(c), noise, level))
    return torch.cat([z, diffusers.models.embeddings.get_timestep_embedding(
        level, c.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)], 1)


def fit(part, net, data, size, args, world, state):
    """Trains a part from its last checkpoint on. Returns the moving average of its weights, frozen.

    net(data, index, draw) returns losses by name, index drawn below size, draw the arguments of
    random functions. state: content of last.pt, updated. UserError if a loss is not finite.
    """
    (steps, batch, rate), saved = PARTS[part], state[part]
    steps, batch = max(1, round(steps * args.steps)), max(1, round(batch * args.batch_size))
    layout = torch.channels_last if world.device.type == "cuda" else torch.contiguous_format
    net = net.to(world.device, memory_format=layout)                   # the faster of the two
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(net.parameters(), rate, (0.9, 0.98), weight_decay=0.01,
                                  fused=True)
    modules = {"ema": ema, "net": net, "optimizer": optimizer}
    for name in modules.keys() & saved.keys():
        modules[name].load_state_dict(saved[name])
    start, save_time, window = saved.get("step", 0), time.time(), []
    bar = progress(range(start, steps), part, "step", total=steps, initial=start)
    for step in bar:
        seed = step_generator(args.seed, list(PARTS).index(part), step).initial_seed()
        generator = torch.Generator(world.device).manual_seed(seed)
        draw = {"generator": generator, "device": world.device}
        lr = rate * min(1, (step + 1) / min(200, 0.1 * steps))          # warm-up, cosine
        lr = optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        index = torch.randint(size, (batch,), **draw)
        with world.autocast():
            losses = net(data, index, draw)
        descend(net, ema, optimizer, sum(losses.values()), step)
        window.append(torch.stack([value.detach() for value in losses.values()]))
        done = step + 1 == steps
        save = done or time.time() - save_time > 60 * args.save_minutes
        if save or (step + 1) % args.log_every == 0:
            means = dict(zip(losses, torch.stack(window).mean(0).tolist(), strict=True))
            if not all(map(math.isfinite, means.values())):
                raise UserError(f"the loss of the {part} is not finite at step {step + 1}: "
                                f"{means}; the same command continues from the last checkpoint")
            line = {"part": part, "step": step + 1, "lr": lr, "time": round(time.time(), 1)} | means
            append(args.output_dir / "log.jsonl", json.dumps(line) + "\n")
            bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)
            window = []
        if save:
            kept = {"ema": ema} if done else modules
            state[part] = {name: module.state_dict() for name, module in kept.items()}
            state[part]["step"] = step + 1
            write_whole(args.output_dir / "last.pt", partial(torch.save, state))
            save_time = time.time()
    return ema


def descend(net, ema, optimizer, loss, step):
    """A step of the optimizer, then of the moving average."""
    optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
    optimizer.step()
    decay = min(0.999, (1 + step) / (10 + step))   # short at first: forgets the initial weights
    with torch.no_grad():
        torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - decay)
        for mine, its in zip(ema.buffers(), net.buffers(), strict=True):
            mine.copy_(its)                        # batch norm's, which are running averages


def load_state(args):
    """The content of last.pt, or of a new run: {"settings": ..., part: its state}."""
    names = ("dataset", "data_dir", "limit", "steps", "batch_size", "seed")
    path = args.output_dir / "last.pt"
    settings = {name: getattr(args, name) for name in names}
    settings["parts"] = {part: list(recipe) for part, recipe in PARTS.items()}
    if not path.exists():
        return {"settings": settings} | {part: {} for part in PARTS}
    state = load_checkpoint(path)
    if state.get("settings") != settings:
        raise UserError(f"{path} is of other settings ({state.get('settings')}): name another "
                        f"--output-dir or remove it")
    return state


def text_side(folder):
    """The pipeline's text model and tokenizer: three words, random weights, without influence."""
    words, merges = Path(folder, "vocabulary.json"), Path(folder, "merges.txt")
    words.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    merges.write_text("#version: 0.2\n")
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, projection_dim=16,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1,
        pad_token_id=1))
    return model, transformers.CLIPTokenizer(str(words), str(merges), model_max_length=8)


def assemble(vae, encoder, generator):
    """Autoencoder, image encoder and U-Net as a StableUnCLIPImg2ImgPipeline, float32."""
    with tempfile.TemporaryDirectory() as folder:
        text_encoder, tokenizer = text_side(folder)
    return diffusers.StableUnCLIPImg2ImgPipeline(
        transformers.CLIPImageProcessor(size={"shortest_edge": SIZE}, crop_size=SIZE),
        encoder, generator.normalizer, generator.image_noise, tokenizer, text_encoder,
        generator.unet, generator.scheduler, vae)


@torch.inference_mode()
def draw_samples(pipe, x, path, steps, guidance):
    """Writes a PNG; its rows: x, their reconstructions, a view of each at each noise level."""
    kept = pipe.vae.decode(pipe.vae.encode(x).latent_dist.mean).sample
    args = SimpleNamespace(steps=steps, guidance=guidance, size=SIZE, save_size=SIZE,
                           dtype="float32")
    c = embed(pipe.image_encoder, x)
    views = [to_tensor(view) / 255 for level in LEVELS
             for view in generate(pipe, args, level, c, range(len(x)))]
    originals = torch.cat([x, kept.clamp(-1, 1)]).cpu() / 2 + 0.5
    grid = torchvision.utils.make_grid([*originals, *views], len(x))
    write_whole(path, partial(torchvision.utils.save_image, grid, format="png"))


def train(args, world):
    """The four parts in turn, each with the frozen earlier ones; then saves the pipeline."""
    state = load_state(args)
    images = load_images(args.dataset, args.data_dir, "train", SIZE, args.limit)
    pixels, labels = images.pixels.to(world.device), images.labels.to(world.device)
    x = Data(pixels, labels).pictures(spaced(len(pixels), 16).to(world.device))
    if args.steps * args.batch_size > 30 * len(pixels):        # seen often: worth encoding, too
        pixels, labels = torch.cat([pixels, pixels.flip(3)]), labels.repeat(2)
    data = Data(pixels, labels)
    learn = partial(fit, size=len(pixels), args=args, world=world, state=state)

    @torch.inference_mode()
    def encode(function):
        """function(x) of all pictures, in half precision."""
        parts = torch.arange(len(pixels), device=world.device).split(500)
        with world.autocast():
            return torch.cat([function(data.pictures(part)).half()
                              for part in progress(parts, "encoding", "batch")])
    torch.manual_seed(args.seed)                               # of the initial weights
    vae = learn("autoencoder", Autoencoder(), data).vae
    teacher = learn("teacher", Teacher(images.num_classes), data)
    encoder = learn("encoder", ImageEncoder(), (data, targets(data, teacher))).model
    z = encode(lambda x: vae.encode(x).latent_dist.mean)
    encoder, c = spread(encoder, encode(partial(embed, encoder)))
    vae.register_to_config(scaling_factor=1 / z.float().std().item())          # to variance 1
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(EMBEDDING)
    normalizer.requires_grad_(False).mean.copy_(c.mean(0, keepdim=True))
    normalizer.std.fill_(c.var(0).mean().sqrt())
    generator = learn("generator", Generator(normalizer), (z * vae.config.scaling_factor, c))
    assemble(vae, encoder, generator).to(torch.float16).save_pretrained(args.output_dir)
    pipe = load_pipeline(str(args.output_dir), torch.float32, world.device)
    draw_samples(pipe, x, args.output_dir / "samples.png", **GENERATION["mini"])


def main():
    parser = Parser(description="Trains a 32 x 32 Stable unCLIP for generate_views.py --model.")
    add = parser.add_argument
    add("--dataset", choices=["folder", "cifar100"], default="folder", help="training pictures")
    add("--data-dir", help="a folder with train/ below it, or that of CIFAR-100 (default: data)")
    add("--limit", type=whole(2), help="use this many pictures")
    add("--output-dir", type=Path, default=Path("runs/generator"), help="becomes the pipeline")
    add("--steps", type=whole(1), default=50_000, help="each part takes its share, see PARTS")
    add("--batch-size", type=whole(4), default=128, help="pictures; each part takes its share")
    add("--seed", type=whole(), default=0, help="of all random numbers")
    add("--device", help="cuda, mps or cpu (default: the first there is)")
    add("--log-every", type=whole(1), default=20, help="steps between lines of log.jsonl")
    add("--save-minutes", type=whole(), default=5, help="minutes between checkpoints")
    args = parser.parse_args()
    args.data_dir = args.data_dir or DATA_DIRS[args.dataset]
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quieten()
    world = setup(args.device)
    if world.size > 1:
        raise UserError("one process trains the generator: start it without torchrun")
    train(args, world)
    say(f"{args.output_dir} holds the pipeline; samples.png there shows what it draws")


if __name__ == "__main__":
    script(main)
