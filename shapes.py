"""Shapes: a procedural world in which the truth about GenView is known. It needs no download.

Each picture shows one of ten silhouettes (its label) of random size, place and colour over a
random texture. Three parts: the renderer (`sample_scenes`, `render`, `foreground`); `perturb`, the
stand-in for Stable unCLIP; and `train_encoder`, whose small network is the stand-in for CLIP.
`python shapes.py` draws examples into shapes.png.

Shapes of tensors: n pictures, T = 64 tokens (8x8, row by row), K = 64 features.
"""
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from support.augment import normalise
from support.pictures import sheet, to_image

SIZE = 32  # pixels along a side, as CIFAR
ENCODER_SEED = 1_000_003  # of the stand-in for CLIP; the data sets use small seeds
CLASSES = ("disc", "square", "triangle", "heart", "star", "plus", "ring", "crescent", "hourglass",
           "bar")
OUTPUTS = len(CLASSES) + 1, 3, 6  # of the heads: silhouette or none, colours of figure and ground


class Scene(NamedTuple):
    """All that is needed to draw n pictures; the first dimension of every field is n."""
    shape: Tensor   # (n,) integers, index into CLASSES
    centre: Tensor  # (n, 2) x to the right and y down; the picture spans [-1, 1]
    size: Tensor    # (n,) about the figure's radius: 0.3 covers 5% of the picture, 1.05 up to 70%
    angle: Tensor   # (n,) radians
    colour: Tensor  # (n, 3) of the figure, RGB in [0, 1]
    ground: Tensor  # (n, 2, 3) the two colours of the background
    waves: Tensor   # (n, 3, 2) wave vectors (x, y) of the texture, radians per unit length
    phases: Tensor  # (n, 3) of these waves, radians
    kind: Tensor    # (n, 3) weight of grating, checker and blobs in the texture, before a softmax


def sample_scenes(n: int, generator: torch.Generator) -> Scene:
    """Draws n random scenes."""
    def uniform(low, high, *dims):
        return low + (high - low) * torch.rand(n, *dims, generator=generator)

    size = uniform(0.3, 1.05)
    # Small figures lie anywhere, large ones near the middle.
    centre = uniform(-1, 1, 2) * (1 - size).clamp(min=0.15)[:, None]
    base = uniform(0, 0.45, 3)
    delta = torch.randn(n, 3, generator=generator)
    # Two shades, 0.22 from a dark base: the texture is visible but weaker than the figure.
    delta = 0.22 * delta / delta.norm(dim=1, keepdim=True)
    ground = torch.stack((base - delta, base + delta), dim=1).clamp(0, 1)
    colour = uniform(0.55, 1, 3)  # brighter than the background, so that two minutes are enough
    direction = uniform(0, 2 * math.pi, 3)
    cycles = uniform(1.5, 5, 3)  # periods across the picture
    along = torch.stack((direction.cos(), direction.sin()), dim=-1)
    waves = math.pi * cycles[..., None] * along
    shape = torch.randint(len(CLASSES), (n,), generator=generator)
    angle = uniform(-0.2, 0.2)
    phases = uniform(-math.pi, math.pi, 3)
    kind = torch.randn(n, 3, generator=generator)
    return Scene(shape, centre, size, angle, colour, ground, waves, phases, kind)


def split(name: str) -> Scene:
    """The data sets: "train", 4,096 scenes, and "test", 1,024 others; always the same."""
    n, seed = {"train": (4096, 0), "test": (1024, 1)}[name]
    return sample_scenes(n, torch.Generator().manual_seed(seed))


def star(x, y):
    """Folds the plane into a tenth: there the edge is the line from the tip to the inner corner."""
    turn = torch.atan2(x, -y).abs() % (2 * math.pi / 5)
    turn = torch.minimum(turn, 2 * math.pi / 5 - turn)
    r = torch.hypot(x, y)
    tip = 1.2
    corner = 0.5
    nx = corner * math.sin(math.pi / 5)
    ny = tip - corner * math.cos(math.pi / 5)
    return (nx * (r * turn.cos() - tip) + ny * r * turn.sin()) / math.hypot(nx, ny)


# One function per silhouette, in the order of CLASSES: roughly the distance to its edge, negative
# inside; y points down.
SIGNED_DISTANCES = (
    lambda x, y: torch.hypot(x, y) - 0.97,
    lambda x, y: torch.maximum(x.abs(), y.abs()) - 0.85,
    lambda x, y: torch.maximum(y - 0.75, (2 * x.abs() - y - 1.15) / math.sqrt(5)),
    lambda x, y: torch.hypot(x, y - 0.12 + 0.75 * x.abs().clamp(min=1e-6).sqrt()) - 0.9,
    star,
    lambda x, y: torch.minimum(torch.maximum(x.abs() - 0.34, y.abs() - 1),
                               torch.maximum(x.abs() - 1, y.abs() - 0.34)),
    lambda x, y: (torch.hypot(x, y) - 0.75).abs() - 0.27,
    lambda x, y: torch.maximum(torch.hypot(x, y) - 1, 0.78 - torch.hypot(x - 0.5, y)),
    lambda x, y: torch.maximum(y.abs() - 1, (x.abs() - 0.12 - 0.8 * y.abs()) / 1.28),
    lambda x, y: torch.maximum(x.abs() - 0.33, y.abs() - 1.15),
)


def foreground(scene: Scene) -> Tensor:
    """The true mask, antialiased: how much of each pixel the figure covers, (n, 32, 32)."""
    x, y = pixel_grid()
    x = x - scene.centre[:, 0, None, None]  # (n, 32, 32)
    y = y - scene.centre[:, 1, None, None]
    cos = scene.angle.cos()[:, None, None]
    sin = scene.angle.sin()[:, None, None]
    size = scene.size[:, None, None]
    own_x = (cos * x + sin * y) / size  # in the figure's own frame
    own_y = (cos * y - sin * x) / size
    distance = torch.empty_like(own_x)
    for index, silhouette in enumerate(SIGNED_DISTANCES):
        chosen = scene.shape == index
        distance[chosen] = silhouette(own_x[chosen], own_y[chosen])
    return (0.5 - distance * size * SIZE / 2).clamp(0, 1)  # the edge is one pixel wide


def pixel_grid():
    """Coordinates x (1, 32) and y (32, 1) of the pixel centres."""
    line = (torch.arange(SIZE) + 0.5) * 2 / SIZE - 1
    return line[None, :], line[:, None]


def render(scene: Scene) -> Tensor:
    """Draws the scenes: uint8 (n, 3, 32, 32)."""
    x, y = pixel_grid()
    waves = scene.waves[..., None, None]  # (n, 3, 2, 1, 1)
    angles = waves[:, :, 0] * x + waves[:, :, 1] * y + scene.phases[..., None, None]
    u, v, w = angles.cos().unbind(dim=1)  # (n, 32, 32)
    grating, checker, blobs = (3 * scene.kind).softmax(dim=1)[..., None, None].unbind(dim=1)
    # The factors 1.5 give the patterns about equal contrast, 6 fairly hard edges.
    pattern = grating * u + checker * u * v * 1.5 + blobs * (u + v + w) / 1.5
    texture = torch.sigmoid(6 * pattern)[:, None]
    one, other = scene.ground[..., None, None].unbind(dim=1)  # (n, 3, 1, 1) each
    mask = foreground(scene)[:, None]
    background = texture * one + (1 - texture) * other
    picture = mask * scene.colour[..., None, None] + (1 - mask) * background
    return (picture * 255).round().to(torch.uint8)


def loss_of_identity(noise_level: Tensor, area: Tensor) -> Tensor:
    """Chance that a figure becomes another silhouette; area (n,): its part of the picture."""
    bearable = 50 + 900 * area  # half are lost at this level: 80 for the smallest, 600 for large
    return torch.sigmoid((noise_level - bearable) / 30)


def perturb(scene: Scene, noise_level, generator: torch.Generator) -> Scene:
    """What Stable unCLIP would make of the scenes at a noise level, one or (n,) integers in 0..999.

    As an unCLIP embedding is mixed with noise, each parameter is mixed with a fresh one:
    x -> sqrt(1 - s^2) x + s x', with s growing with the level. Level 0 changes a little, too: a
    diffusion model invents the details anew. Small figures do not survive strong noise and become
    another silhouette (Fig. 3 of the paper).
    """
    n = len(scene.shape)
    level = torch.as_tensor(noise_level).expand(n).float()
    fresh = sample_scenes(n, generator)
    chance = loss_of_identity(level, foreground(scene).mean(dim=(1, 2)))
    lost = torch.rand(n, generator=generator) < chance
    other = (scene.shape + torch.randint(1, len(CLASSES), (n,), generator=generator)) % len(CLASSES)
    strength = 0.5 + 0.5 * torch.sin(math.pi / 2 * (level / 400).clamp(max=1))  # 1 from level 400

    def mix(old, new, middle=0.0, weight=1.0):
        s = (weight * strength).view(-1, *[1] * (old.dim() - 1))
        return middle + (1 - s ** 2).sqrt() * (old - middle) + s * (new - middle)

    # Colours are mixed around the middle of their ranges; centre, angle and size change less.
    return Scene(
        shape=torch.where(lost, other, scene.shape),
        centre=mix(scene.centre, fresh.centre, weight=0.5),
        size=mix(scene.size, fresh.size, scene.size, weight=0.2).clamp(0.2, 1),
        angle=mix(scene.angle, fresh.angle, weight=0.5),
        colour=mix(scene.colour, fresh.colour, 0.78).clamp(0, 1),
        ground=mix(scene.ground, fresh.ground, 0.22).clamp(0, 1),
        waves=mix(scene.waves, fresh.waves),
        phases=mix(scene.phases, fresh.phases),
        kind=mix(scene.kind, fresh.kind))


class TokenEncoder(nn.Module):
    """(n, 3, S, S) -> tokens (n, 64, 64): fine features of 8x8 cells and coarse ones of all.
    Pictures of another size than SIZE are resized to it."""
    def __init__(self, width: int = 64):
        super().__init__()
        def block(c_in, c_out, stride=1):
            conv = nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False)
            return nn.Sequential(conv, nn.BatchNorm2d(c_out), nn.ReLU(inplace=True))
        self.fine = nn.Sequential(block(3, 32, 2), block(32, width, 2), block(width, width))  # 8x8
        self.coarse = nn.Sequential(block(width, 2 * width, 2), block(2 * width, 2 * width))  # 4x4
        self.everywhere = nn.Linear(2 * width * 16, 2 * width)
        self.up = nn.Conv2d(2 * width, width, 1)
        self.mix = nn.Conv2d(width, width, 3, 1, 1)
        self.norm = nn.LayerNorm(width)  # as CLIP's post_layernorm

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != SIZE:                    # as genview.FrozenEncoder does
            x = F.interpolate(x, size=(SIZE, SIZE), mode="bilinear", antialias=True)
        fine = self.fine(x)
        coarse = self.coarse(fine)
        coarse = coarse + self.everywhere(coarse.flatten(1))[..., None, None].relu()
        fine = fine + F.interpolate(self.up(coarse), scale_factor=2)
        return self.norm(self.mix(fine.relu()).flatten(2).transpose(1, 2))


def train_encoder(steps: int = 150, batch: int = 256, amp: bool = False) -> nn.Module:
    """Trains the stand-in for CLIP on its own stream of pictures and freezes it; about 20 s on two
    CPU cores. amp: in bfloat16."""
    generator = torch.Generator().manual_seed(ENCODER_SEED)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(ENCODER_SEED)
        encoder = TokenEncoder().to(memory_format=torch.channels_last)
        heads = nn.Linear(64, sum(OUTPUTS))
    parameters = [*encoder.parameters(), *heads.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=3e-3, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=steps)
    for _ in range(steps):
        scene = sample_scenes(batch, generator)
        pictures = normalise(render(scene) / 255)
        mask = foreground(scene)
        with torch.autocast("cpu", torch.bfloat16, enabled=amp):
            tokens = encoder(pictures.contiguous(memory_format=torch.channels_last))
            outputs = heads(tokens)
        cells = F.avg_pool2d(mask[:, None], SIZE // 8).flatten(1)
        loss = dense_loss(tokens.float(), outputs.float(), cells, scene)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return encoder.eval().requires_grad_(False)


def dense_loss(tokens: Tensor, outputs: Tensor, mask: Tensor, scene: Scene) -> Tensor:
    """What the tokens (n, 64, 64) must tell: how much figure there is at and around their place,
    along one fixed direction and so strongly that it becomes the first principal component, as with
    CLIP; the silhouette they lie in, or none; the colours there. outputs (n, 64, 20), mask (n, 64).
    """
    around = F.avg_pool2d(mask.view(-1, 1, 8, 8), 5, 1, 2).flatten(1)  # as CLIP's tokens know
    direction = torch.ones(tokens.shape[2], device=tokens.device) / 8
    direction[::2] *= -1  # of unit length; LayerNorm leaves no room along a constant vector
    # 5 of at most 8, the length of a token.
    figureness = (tokens @ direction / 5 - (mask + around - 1)).square()
    what, colour, ground = outputs.split(OUTPUTS, dim=2)
    log_p = what.log_softmax(dim=2)
    shape = scene.shape.to(outputs.device)[:, None, None].expand(-1, mask.shape[1], 1)
    inside = log_p.gather(2, shape)[..., 0]
    none = log_p[..., -1]
    segmentation = -(mask * inside + (1 - mask) * none)  # (n, 64)
    figure_error = (colour - scene.colour.to(outputs)[:, None]).square().sum(dim=2)
    ground_error = (ground - scene.ground.flatten(1).to(outputs)[:, None]).square().sum(dim=2)
    return (2 * figureness + segmentation + mask * figure_error + (1 - mask) * ground_error).mean()


def main(count: int = 12, levels=(0, 100, 200, 300, 400), path: str = "shapes.png"):
    """Draws original, mask and perturbed versions of scenes into a PNG."""
    generator = torch.Generator().manual_seed(0)
    scene = sample_scenes(count, generator)._replace(shape=torch.arange(count) % len(CLASSES))
    mask = (foreground(scene) * 255).byte()[:, None].expand(-1, 3, -1, -1)
    rows = {"original": render(scene), "figure": mask}
    for level in levels:
        rows[f"level {level}"] = render(perturb(scene, level, generator))
    columns = [[to_image(pictures[i]) for pictures in rows.values()] for i in range(count)]
    sheet(columns, [""] * count, {}, 4 * SIZE, list(rows)).save(path)
    print(f"{path}: {count} scenes; original, figure, perturbed at noise levels", *levels)


if __name__ == "__main__":
    main()
