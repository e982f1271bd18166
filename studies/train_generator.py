r"""Trains a miniature of Stable unCLIP for 32 x 32 pictures from scratch, in the same format.

    python -m studies.train_generator --data-dir data/tinyimagenet32 --steps 5000
    python generate_views.py --dataset cifar10 --model runs/generator --steps 2 --guidance 1.25

Trained in turn: an autoencoder; a teacher, which only the next part needs; the image encoder C
(also the paper's E); the U-Net, which with the decoder is the generator G.

Shapes: N pictures, n of a batch, pixels (n, 3, 32, 32) uint8, x the same in [-1, 1], embeddings c
of D numbers, latents z, 64 = 8 x 8 places of a picture, K = 128 channels of the teacher's maps.
"""
import copy
import json
import math
import sys
import time
from functools import partial
from pathlib import Path

if not __package__:
    sys.stderr.write("error: call it from the root: python -m studies.train_generator\n")
    sys.exit(2)

import diffusers
import torch
import torch.nn.functional as F
import torchvision
import transformers
from torch import nn

from generate_views import load_pipeline, quieten
from genview import clip_tokens, data_dir_of, load_images
from recipes import GENERATION
from studies.eval_generator import draw_samples
from support import augment
from support.checkpoint import Checkpoint, SaveTimes, identity_of
from support.command_line import Parser, UserError, progress, say, script, whole
from support.data import check_classes, spaced
from support.files import Log
from support.processes import setup
from support.schedules import cosine, linear_warmup
from support.seeds import step_generator

SIZE = 32                # side of the pictures
EMBEDDING = 256          # D
LATENT_CHANNELS = 48     # of 4 x 4 latents: a quarter of the picture's numbers on a small grid
# Part: its share of --steps, its share of --batch-size, its highest learning rate.
PARTS = {"autoencoder": [0.8, 0.25, 2e-3], "teacher": [0.1, 1.0, 4e-3],
         "encoder": [0.4, 0.5, 1.5e-3], "generator": [0.55, 1.0, 2e-3]}
FREE = {"output_dir", "device", "log_every", "save_minutes"}    # may differ when a training goes on


class Autoencoder(nn.Module):
    """Part 1, a small AutoencoderKL: x <-> z (n, LATENT_CHANNELS, 4, 4)."""
    def __init__(self):
        super().__init__()
        self.vae = diffusers.AutoencoderKL(
            block_out_channels=(16, 32, 64, 64), latent_channels=LATENT_CHANNELS, norm_num_groups=8,
            sample_size=SIZE, mid_block_add_attention=False,
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4)

    def forward(self, random, pixels):
        x = pixels / 127.5 - 1
        q = self.vae.encode(x).latent_dist
        z = q.mean + q.std * torch.randn(q.mean.shape, **random)
        # KL(N(mean, var) || N(0, 1)): its small weight keeps the latents near unit scale
        kl = 0.5 * (q.mean ** 2 + q.var - 1 - q.logvar).float().mean()
        return {"error": F.mse_loss(self.vae.decode(z).sample.float(), x), "kl": 1e-5 * kl}


class Teacher(nn.Module):
    """Part 2, a small convolutional classifier: pixels -> feature maps m (n, 64, K), row by row.

    CLIP contrasts pictures with captions; here captions are the class names, each with a learned
    embedding. Part 3, a transformer, would need more pictures for this: it imitates these maps.
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

    def maps(self, pixels):
        x = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)  # faster on a CPU
        return self.features(x).flatten(2).mT.float()

    def forward(self, random, pixels, labels):
        # captions = -log(exp(<f, t_y> + b_y) / sum_k exp(<f, t_k> + b_k)), f = mean of m, k a class
        scores = self.classes(self.maps(pixels).mean(1))               # (n, classes)
        return {"captions": F.cross_entropy(scores.float(), labels)}


def targets(pixels, teacher):
    """What the image encoder imitates. Returns a function: pixels -> t (n, 64, K).

    t_ijk = (m_ijk - mean_k - (mean_jk - mean_k) / 4) / std,    picture i, place j, channel k

    A quarter of what the place alone predicts is subtracted: the encoder learns places sooner than
    objects; without this the first component of its tokens would mostly show the place.
    """
    some = pixels[spaced(len(pixels), 2000)].split(500)
    maps = torch.cat([teacher.maps(part) for part in some])            # (<= 2000, 64, K)
    mean = maps.mean((0, 1))                                           # (K,)
    offset = mean.lerp(maps.mean(0), 0.25)                             # (64, K)
    std = (maps - mean).square().mean().sqrt()
    return lambda pixels: (teacher.maps(pixels) - offset) / std


class ImageEncoder(nn.Module):
    """Part 3, C, a small CLIP vision model: x -> c (n, D) and 8 x 8 patch tokens.

    Half of each token learns the target t of its place. Two heads predict from c the mean of t, for
    objects, and a thumbnail: unCLIP needs colour and layout, which CLIP's c also describes.
    """
    def __init__(self, target):
        super().__init__()
        self.model = transformers.CLIPVisionModelWithProjection(transformers.CLIPVisionConfig(
            hidden_size=256, intermediate_size=512, num_hidden_layers=3, num_attention_heads=4,
            image_size=SIZE, patch_size=4, projection_dim=EMBEDDING, hidden_act="gelu"))
        self.objects = nn.Linear(EMBEDDING, 128)
        self.layout = nn.Linear(EMBEDDING, 3 * 16 * 16)
        self.target = target

    def forward(self, random, pixels):
        x = pixels / 127.5 - 1
        t = self.target(pixels)                                        # (n, 64, K)
        output = self.model(augment.normalise(x / 2 + 0.5))
        tokens = clip_tokens(self.model.vision_model, output.last_hidden_state).float()
        half = tokens[..., :t.shape[2]]                                # (n, 64, K), of 2 K
        c = output.image_embeds                                        # (n, D)
        thumbnail = F.avg_pool2d(x, 2).flatten(1)                      # (n, 768)
        # Tokens learn 2 t: then their first component lies in this half, not in the untrained one.
        # The weights bring the losses to a similar size at the end: 2.3, 0.7, 2.9.
        return {"tokens": 10 * F.mse_loss(half / 2, t),
                "objects": 10 * F.mse_loss(self.objects(c).float(), t.mean(1)),
                "layout": 400 * F.mse_loss(self.layout(c).float(), thumbnail)}


@torch.no_grad()
def equalise(encoder, c):
    """Equalises the principal components of c: the U-Net ignores small ones. Not in the paper.

    c' = c U diag(lambda)^(-1/4),  Cov(c) = U diag(lambda) U^T: uncorrelated, variances sqrt(lambda)

    c: C's embeddings (N, D), N > 1. Returns a copy of C whose last linear layer gives c', and c'.
    """
    encoder = copy.deepcopy(encoder)
    c = c.float()
    variance, axes = torch.linalg.eigh(torch.cov(c.T.cpu().double()))           # MPS has no float64
    variance = variance.clamp_min(1e-4 * variance.max())                # the smallest are uncertain
    turn = (axes * variance ** -0.25).to(c)                             # (D, D)
    encoder.visual_projection.weight.copy_(turn.T @ encoder.visual_projection.weight)
    return encoder, c @ turn


class UNet(nn.Module):
    """Part 4, unCLIP's U-Net: denoises z, given c with noise of level l, and l.

    It has no attention, which would triple its time on a CPU: the prompt has no influence.
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
            timestep_spacing="trailing")

    def forward(self, random, z, c):
        z = z.float()
        c = c.float()
        n = len(z)
        # Half of the levels l are 0, where there is most to learn; the others uniform in [0, 500).
        level = torch.randint(500, (n,), **random) * (torch.rand(n, **random) < 0.5)
        noise = torch.randn(c.shape, **random)
        condition = noised(c, level, noise, self.normalizer, self.image_noise)
        # Classifier-free guidance: a tenth is trained without a condition.
        condition = condition * (torch.rand(n, 1, **random) >= 0.1)
        e = torch.randn(z.shape, **random)
        # Steps t: the larger of two draws, because c matters most at the late ones.
        t = torch.randint(1000, (2, n), **random).amax(0)
        # z_t = sqrt(abar_t) z + sqrt(1 - abar_t) e,  target v = sqrt(abar_t) e - sqrt(1 - abar_t) z
        z_t = self.scheduler.add_noise(z, e, t)
        v = self.scheduler.get_velocity(z, e, t)
        predicted = self.unet(z_t, t, z.new_zeros(n, 1, 16), class_labels=condition).sample
        return {"v": F.mse_loss(predicted.float(), v)}


def noised(c, level, noise, normalizer, scheduler):
    """The U-Net's condition (n, 2 D), as diffusers' noise_image_embeddings computes it.

    z^l = mean + std (sqrt(abar_l) (c - mean) / std + sqrt(1 - abar_l) e);  condition = (z^l, s(l))

    c, noise e: (n, D). level: l (n,), of 1,000 steps. mean, std: the normalizer's; abar: the
    scheduler's; s: sinusoids. Source: GenView, section "framework"; Ramesh et al. 2022.
    """
    z = normalizer.unscale(scheduler.add_noise(normalizer.scale(c), noise, level))
    sinusoids = diffusers.models.embeddings.get_timestep_embedding(
        level, c.shape[1], flip_sin_to_cos=True, downscale_freq_shift=0)
    return torch.cat([z, sinusoids], 1)


def train_part(part, net, *data, args, world, checkpoint, state, log):
    """Trains a part from its last checkpoint on. Returns the moving average of its weights, frozen.

    data: tensors of N rows. net(random, *batch) returns losses by name; batch: random rows of each;
    random: the arguments of random functions. state: of all parts, {part: ...}, updated.
    """
    share_of_steps, share_of_batch, peak = PARTS[part]
    steps = max(1, round(share_of_steps * args.steps))
    batch = max(1, round(share_of_batch * args.batch_size))
    layout = torch.channels_last if world.device.type == "cuda" else torch.contiguous_format
    net = net.to(world.device, memory_format=layout)                   # the faster of the two
    ema = copy.deepcopy(net).requires_grad_(False).eval()
    adamw = torch.optim.AdamW(net.parameters(), peak, (0.9, 0.98), weight_decay=0.01, fused=True)
    modules = {"ema": ema, "net": net, "optimizer": adamw}
    start = restore(modules, state[part], checkpoint)
    save_times = SaveTimes(args.save_minutes, world)
    pending = []                                   # losses that are not yet in the log
    bar = progress(range(start, steps), part, "step", total=steps, initial=start)
    for step in bar:
        lr = linear_warmup(peak, step + 1, min(200, 0.1 * steps)) * cosine(step / steps)
        adamw.param_groups[0]["lr"] = lr
        random = random_of(args.seed, part, step, world.device)
        index = torch.randint(len(data[0]), (batch,), **random)
        with world.autocast():
            losses = net(random, *[rows[index] for rows in data])
        descend(net, ema, adamw, sum(losses.values()), step)
        pending.append(torch.stack([value.detach() for value in losses.values()]))
        done = step + 1 == steps
        save = done or save_times.due()
        if save or (step + 1) % args.log_every == 0:
            log_part(log, part, step + 1, lr, list(losses), torch.stack(pending), bar)
            pending.clear()
        if save:
            kept = {"ema": ema} if done else modules
            state[part] = {name: module.state_dict() for name, module in kept.items()}
            state[part]["step"] = step + 1
            checkpoint.save(parts=state)
            save_times.saved(checkpoint.path, "the same command")
    save_times.end()
    return ema


def random_of(seed, part, step, device):
    """The arguments of random functions at this step; random numbers depend on nothing else."""
    number = step_generator(seed, list(PARTS).index(part), step).initial_seed()
    return {"generator": torch.Generator(device).manual_seed(number), "device": device}


def restore(modules, saved, checkpoint):
    """Loads what was saved of a part, if anything. Returns the number of steps done."""
    with checkpoint.restoring():
        for name in modules.keys() & saved.keys():
            modules[name].load_state_dict(saved[name])
    return saved.get("step", 0)


def log_part(log, part, step, lr, names, losses, bar):
    """The means of the losses (steps, terms) since the last line; UserError: not finite."""
    means = dict(zip(names, losses.mean(0).tolist(), strict=True))
    if not all(map(math.isfinite, means.values())):
        raise UserError(f"the loss of the {part} is not finite at step {step}: {means}; the same "
                        f"command continues from the last checkpoint")
    log.write(part=part, step=step, lr=lr, time=round(time.time(), 1), **means)
    bar.set_postfix({name: f"{mean:.3f}" for name, mean in means.items()}, refresh=False)


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


def open_checkpoint(args, world):
    """The checkpoint of these settings, and the state of each part so far."""
    identity = identity_of(args, FREE) | {"parts": PARTS}
    checkpoint = Checkpoint(args.output_dir / "last.pt", identity, world)
    state = {part: {} for part in PARTS}
    state |= checkpoint.load().get("parts", {})
    return checkpoint, state


def text_side(folder):
    """The pipeline's text model and tokenizer: three words, random weights, without influence.

    Leaves vocab.json and merges.txt in folder for transformers 4: version 5 saves tokenizer.json.
    """
    folder.mkdir(parents=True, exist_ok=True)
    words = folder / "vocab.json"
    merges = folder / "merges.txt"
    words.write_text(json.dumps({"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}))
    merges.write_text("#version: 0.2\n")
    model = transformers.CLIPTextModel(transformers.CLIPTextConfig(
        vocab_size=3, hidden_size=16, intermediate_size=16, num_hidden_layers=1, projection_dim=16,
        num_attention_heads=2, max_position_embeddings=8, bos_token_id=0, eos_token_id=1))
    return model, transformers.CLIPTokenizer(str(words), str(merges), model_max_length=8)


def save_pipeline(folder, vae, encoder, unet):
    """Saves the parts as a StableUnCLIPImg2ImgPipeline in half precision."""
    text_encoder, tokenizer = text_side(folder / "tokenizer")
    pipe = diffusers.StableUnCLIPImg2ImgPipeline(
        feature_extractor=transformers.CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size=SIZE),
        image_encoder=encoder, image_normalizer=unet.normalizer,
        image_noising_scheduler=unet.image_noise, tokenizer=tokenizer, text_encoder=text_encoder,
        unet=unet.unet, scheduler=unet.scheduler, vae=vae)
    pipe.to(torch.float16).save_pretrained(folder)


def with_mirrored(pixels, labels, samples):
    """Pictures seen often, in so many samples, are also mirrored: worth encoding, too."""
    if samples <= 30 * len(pixels):
        return pixels, labels
    return torch.cat([pixels, pixels.flip(3)]), labels.repeat(2)


@torch.inference_mode()
def encoded(function, pixels, world):
    """function(x) of all pictures, in half precision."""
    parts = []
    with world.autocast():
        for part in progress(pixels.split(500), "encoding", "batch"):
            parts.append(function(part / 127.5 - 1).half())
    return torch.cat(parts)                # not under autocast, which refuses float16 on a CPU


def normalizer_of(c):
    """Brings embeddings to mean 0 and a mean variance of 1."""
    normalizer = diffusers.pipelines.stable_diffusion.StableUnCLIPImageNormalizer(EMBEDDING)
    normalizer.requires_grad_(False)
    normalizer.mean.copy_(c.mean(0, keepdim=True))
    normalizer.std.fill_(c.var(0).mean().sqrt())
    return normalizer


def train_parts(args, world):
    """The four parts in turn, each with the frozen earlier ones; then saves the pipeline."""
    checkpoint, state = open_checkpoint(args, world)
    log = Log(args.output_dir, world)
    log.keep(lambda line: line["step"] <= state[line["part"]].get("step", 0))
    learn = partial(train_part, args=args, world=world, checkpoint=checkpoint, state=state, log=log)
    images = load_images(args.dataset, args.data_dir, "train", SIZE, args.limit)
    check_classes(images, args.data_dir, ": the second part learns to tell classes")
    pixels, labels = with_mirrored(images.pixels.to(world.device), images.labels.to(world.device),
                                   args.steps * args.batch_size)
    torch.manual_seed(args.seed)                               # of the initial weights
    vae = learn("autoencoder", Autoencoder(), pixels).vae
    teacher = learn("teacher", Teacher(images.num_classes), pixels, labels)
    encoder = learn("encoder", ImageEncoder(targets(pixels, teacher)), pixels).model
    z = encoded(lambda x: vae.encode(x).latent_dist.mean, pixels, world)
    c = encoded(lambda x: encoder(augment.normalise(x / 2 + 0.5)).image_embeds, pixels, world)
    encoder, c = equalise(encoder, c)
    vae.register_to_config(scaling_factor=1 / z.float().std().item())          # to variance 1
    unet = learn("generator", UNet(normalizer_of(c)), z * vae.config.scaling_factor, c)
    save_pipeline(args.output_dir, vae, encoder, unet)
    pipe = load_pipeline(str(args.output_dir), torch.float32, world.device)
    some = images.pixels[spaced(len(images.pixels), 16)].to(world.device)
    draw_samples(pipe, some, args.output_dir / "samples.png", **GENERATION["mini"])


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
    args.data_dir = data_dir_of(args.dataset, args.data_dir)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    quieten()
    world = setup(args.device)
    if world.size > 1:
        raise UserError("one process trains the generator: start it without torchrun")
    train_parts(args, world)
    say(f"{args.output_dir} holds the pipeline; samples.png there shows what it draws")


if __name__ == "__main__":
    script(main)
