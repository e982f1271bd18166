"""Shapes: a procedural world in which the truth about GenView is known. It needs no download.

Each picture shows one of ten silhouettes (its label) of random size, place and colour over a random texture. Three parts:
the renderer (`sample_scenes`, `render`, `foreground`); `perturb`, which stands for Stable unCLIP on a noised CLIP embedding;
and `train_encoder`, a small frozen network that stands for CLIP. `python shapes.py` draws some of it into shapes.png.

Shapes of tensors: n pictures, T = 64 tokens (8x8, row by row), K = 64 features. Lengths: the picture spans [-1, 1].
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import genview

SIZE = 32  # pixels along a side, as CIFAR
CLASSES = ("disc", "square", "triangle", "heart", "star", "plus", "ring", "crescent", "hourglass", "bar")


class Scene(NamedTuple):
    """All that is needed to draw n pictures; every field has the n pictures in front."""
    shape: Tensor   # (n,) integers, index into CLASSES
    centre: Tensor  # (n, 2) x to the right and y down, in [-1, 1]
    size: Tensor    # (n,) about the radius of the figure: 0.3 covers 5% of the picture, 1.05 up to 70%
    angle: Tensor   # (n,) radians
    colour: Tensor  # (n, 3) of the figure, RGB in [0, 1]
    ground: Tensor  # (n, 2, 3) the two colours of the background
    waves: Tensor   # (n, 3, 2) wave vectors (x, y) of the texture, radians per unit length
    phases: Tensor  # (n, 3) of these waves, radians
    kind: Tensor    # (n, 3) how much the texture is a grating, a checker, blobs; the greatest dominates


def sample_scenes(n: int, generator: torch.Generator) -> Scene:
    """Draws n random scenes."""
    def uniform(low, high, *dims):
        return low + (high - low) * torch.rand(n, *dims, generator=generator)

    size = uniform(0.3, 1.05)
    centre = uniform(-1, 1, 2) * (1 - size).clamp(min=0.15)[:, None]  # small figures anywhere, large ones near the middle
    base, delta = uniform(0, 0.45, 3), torch.randn(n, 3, generator=generator)
    # Two shades around a dark base; 0.22 apart from it, the texture is plain to see and yet no match for the figure.
    delta = 0.22 * delta / delta.norm(dim=1, keepdim=True)
    ground = torch.stack((base - delta, base + delta), dim=1).clamp(0, 1)
    colour = uniform(0.55, 1, 3)  # brighter than the background: silhouettes are clear, so that two minutes are enough
    direction, cycles = uniform(0, 2 * math.pi, 3), uniform(1.5, 5, 3)  # cycles: periods across the picture
    waves = math.pi * cycles[..., None] * torch.stack((direction.cos(), direction.sin()), dim=-1)
    return Scene(torch.randint(len(CLASSES), (n,), generator=generator), centre, size, uniform(-0.2, 0.2), colour, ground,
                 waves, uniform(-math.pi, math.pi, 3), torch.randn(n, 3, generator=generator))


def split(name: str) -> Scene:
    """The data sets: "train", 4,096 scenes, and "test", 1,024 others; always the same."""
    n, seed = {"train": (4096, 0), "test": (1024, 1)}[name]
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def signed_distances():
    """One function per silhouette, in the order of CLASSES: roughly the distance to its edge, negative inside (y down)."""
    def star(x, y):  # fold the plane into a tenth: there the edge is the line from the tip to the inner corner
        turn = torch.atan2(x, -y).abs() % (2 * math.pi / 5)
        turn, r = torch.minimum(turn, 2 * math.pi / 5 - turn), torch.hypot(x, y)
        (tip, corner), a = (1.2, 0.5), math.pi / 5
        nx, ny = corner * math.sin(a), tip - corner * math.cos(a)
        return (nx * (r * turn.cos() - tip) + ny * r * turn.sin()) / math.hypot(nx, ny)

    return (
        lambda x, y: torch.hypot(x, y) - 0.97,
        lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
        lambda x, y: torch.maximum(y - 0.75, (2 * x.abs() - y - 1.15) / math.sqrt(5)),
        lambda x, y: torch.hypot(x, y - 0.12 + 0.75 * x.abs().clamp(min=1e-6).sqrt()) - 0.9,
        star,
        lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.34, y.abs() - 1), torch.maximum(x.abs() - 1, y.abs() - 0.34)),
        lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.27,
        lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.78 - torch.hypot(x - 0.5, y)),
        lambda x, y: torch.maximum(y.abs() - 1, (x.abs() - 0.12 - 0.8 * y.abs()) / 1.28),
        lambda x, y: torch.maximum(x.abs() - 0.33, y.abs() - 1.15),
    )


def foreground(scene: Scene) -> Tensor:
    """How much of each pixel the figure covers, (n, 32, 32) in [0, 1]: the true mask, antialiased."""
    x, y = pixel_grid()
    x, y = x - scene.centre[:, 0, None, None], y - scene.centre[:, 1, None, None]  # (n, 32, 32)
    cos, sin, size = (v[:, None, None] for v in (scene.angle.cos(), scene.angle.sin(), scene.size))
    x, y = (cos * x + sin * y) / size, (cos * y - sin * x) / size  # in the figure's own frame
    distance = torch.empty_like(x)
    for index, silhouette in enumerate(signed_distances()):
        chosen = scene.shape == index
        distance[chosen] = silhouette(x[chosen], y[chosen])
    return (0.5 - distance * size * SIZE / 2).clamp(0, 1)  # the edge is one pixel wide


def pixel_grid():
    """Coordinates x (1, 32) and y (32, 1) of the pixel centres."""
    line = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    return line[None, :], line[:, None]


def render(scene: Scene) -> Tensor:
    """Draws the scenes: uint8 (n, 3, 32, 32)."""
    x, y = pixel_grid()
    waves = scene.waves[..., None, None]  # (n, 3, 2, 1, 1)
    u, v, w = (waves[:, :, 0] * x + waves[:, :, 1] * y + scene.phases[..., None, None]).cos().unbind(dim=1)  # (n, 32, 32)
    grating, checker, blobs = (3 * scene.kind).softmax(dim=1)[..., None, None].unbind(dim=1)
    pattern = grating * u + checker * u * v * 1.5 + blobs * (u + v + w) / 1.5  # the factors give them about equal contrast
    texture = torch.sigmoid(6 * pattern)[:, None]  # 6: fairly hard edges
    first, second = scene.ground[..., None, None].unbind(dim=1)  # (n, 3, 1, 1) each
    mask = foreground(scene)[:, None]
    picture = mask * scene.colour[..., None, None] + (1 - mask) * (texture * first + (1 - texture) * second)
    return (picture * 255).round().to(torch.uint8)


def loss_of_identity(noise_level: Tensor, area: Tensor) -> Tensor:
    """Chance that a figure turns into another silhouette; level (n,), share of the picture that it covers (n,) -> (n,)."""
    bearable = 50 + 900 * area  # the level at which half of such figures are lost: 80 for the smallest, 600 for large ones
    return torch.sigmoid((noise_level - bearable) / 30)


def perturb(scene: Scene, noise_level, generator: torch.Generator) -> Scene:
    """What Stable unCLIP makes of the scenes at a noise level, an integer or (n,) integers in 0..999.

    As an unCLIP embedding is mixed with noise, each parameter is mixed with a fresh one: x -> sqrt(1 - s^2) x + s x',
    with s growing with the level. Level 0 changes a little too: a diffusion model invents the details anew. Small figures
    cannot bear strong noise and turn into another silhouette (Fig. 3 of the paper).
    """
    n = len(scene.shape)
    level = torch.as_tensor(noise_level).expand(n).float()
    fresh = sample_scenes(n, generator)
    lost = torch.rand(n, generator=generator) < loss_of_identity(level, foreground(scene).mean(dim=(1, 2)))
    other = (scene.shape + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    strength = 0.5 + 0.5 * torch.sin(math.pi / 2 * (level / 400).clamp(max=1))  # 0.5 at level 0, 0.69 at 100, 1 from 400

    def mix(old, new, middle=0.0, share=1.0):
        s = (share * strength).view(-1, *[1] * (old.dim() - 1))
        return middle + (1 - s ** 2).sqrt() * (old - middle) + s * (new - middle)

    # Colours are mixed around the middle of their ranges; place, angle and size change less: the picture stays alike.
    return Scene(torch.where(lost, other, scene.shape), mix(scene.centre, fresh.centre, share=0.5),
                 mix(scene.size, fresh.size, scene.size, share=0.2).clamp(0.2, 1), mix(scene.angle, fresh.angle, share=0.5),
                 mix(scene.colour, fresh.colour, 0.78).clamp(0, 1), mix(scene.ground, fresh.ground, 0.22).clamp(0, 1),
                 mix(scene.waves, fresh.waves), mix(scene.phases, fresh.phases), mix(scene.kind, fresh.kind))


class Encoder(nn.Module):
    """(n, 3, 32, 32) -> tokens (n, 64, 64): a small U, fine features of 8x8 cells joined by coarse ones of the whole."""

    def __init__(self, width: int = 64):
        super().__init__()
        def block(c_in, c_out, stride=1):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        self.fine = nn.Sequential(block(3, 32, 2), block(32, width, 2), block(width, width))  # 8x8
        self.coarse = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))  # 4x4
        self.whole = nn.Linear(2 * width * 16, 2 * width)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.mix = nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.LayerNorm(width)  # as CLIP's post_layernorm

    def forward(self, x: Tensor) -> Tensor:
        fine = self.fine(x)
        coarse = self.coarse(fine)
        coarse = coarse + self.whole(coarse.flatten(1))[..., None, None].relu()
        fine = fine + F.interpolate(self.up(coarse), scale_factor=2)
        return self.norm(self.mix(fine.relu()).flatten(2).transpose(1, 2))


def train_encoder(seed: int = 0, device="cpu", steps: int = 150, batch: int = 256, amp: bool = False) -> nn.Module:
    """Trains the stand-in for CLIP on its own stream of pictures and freezes it; about 20 s on two CPU cores; amp: bfloat16."""
    generator = torch.Generator().manual_seed(1_000_003 + seed)  # a stream apart from the data sets, which use small seeds
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000_003 + seed)
        encoder = Encoder().to(device, memory_format=torch.channels_last)
        heads = nn.Linear(64, len(CLASSES) + 1 + 3 + 6).to(device)  # silhouette or none, colours of figure and ground
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimiser = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 4e-3, total_steps=steps)
    for _ in range(steps):
        scene = sample_scenes(batch, generator)
        pictures, mask = genview.normalise(render(scene) / 255).to(device), foreground(scene).to(device)
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=amp):
            tokens = encoder(pictures.contiguous(memory_format=torch.channels_last))
            outputs = heads(tokens)
        loss = dense_loss(tokens.float(), outputs.float(), F.avg_pool2d(mask[:, None], SIZE // 8).flatten(1), scene)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return encoder.eval().requires_grad_(False)


def dense_loss(tokens: Tensor, outputs: Tensor, mask: Tensor, scene: Scene) -> Tensor:
    """What the tokens (n, 64, 64) must tell: how much figure there is at and around their place, along one fixed direction,
    so strongly that it becomes the first principal component, as with CLIP; the silhouette they lie in, or none; the colour
    of the figure there and those of the background elsewhere. outputs (n, 64, 20) of the linear heads, mask (n, 64)."""
    around = F.avg_pool2d(mask.view(-1, 1, 8, 8), 5, 1, 2).flatten(1)  # CLIP's tokens know their neighbourhood too
    direction = torch.ones(tokens.shape[2], device=tokens.device) / 8
    direction[::2] *= -1  # of unit length; LayerNorm leaves no room along a constant vector
    figureness = (tokens @ direction / 5 - (mask + around - 1)).square()  # 5 of at most 8, the length of a token
    what, colour, ground = outputs.split((len(CLASSES) + 1, 3, 6), dim=2)
    log_p = what.log_softmax(dim=2)
    shape = scene.shape.to(outputs.device)[:, None, None].expand(-1, mask.shape[1], 1)
    segmentation = -(mask * log_p.gather(2, shape)[..., 0] + (1 - mask) * log_p[..., -1])  # (n, 64)
    figure_error = (colour - scene.colour.to(outputs)[:, None]).square().sum(dim=2)
    ground_error = (ground - scene.ground.flatten(1).to(outputs)[:, None]).square().sum(dim=2)
    return (2 * figureness + segmentation + mask * figure_error + (1 - mask) * ground_error).mean()


def main(rows: int = 12, levels=(0, 100, 200, 300, 400), path: str = "shapes.png"):
    """Draws original, mask and perturbed versions of some scenes into a PNG, four times enlarged."""
    from torchvision.utils import save_image
    generator = torch.Generator().manual_seed(0)
    scene = sample_scenes(rows, generator)._replace(shape=torch.arange(rows) % len(CLASSES))
    columns = [render(scene), (foreground(scene) * 255).to(torch.uint8)[:, None].expand(-1, 3, -1, -1)]
    columns += [render(perturb(scene, level, generator)) for level in levels]
    grid = torch.stack(columns, dim=1).flatten(0, 1).float() / 255
    save_image(F.interpolate(grid, scale_factor=4), path, nrow=len(columns), padding=8, pad_value=1.0)
    print(f"{path}: {rows} scenes; original, figure, perturbed at noise levels {', '.join(map(str, levels))}")


if __name__ == "__main__":
    main()
