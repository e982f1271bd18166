"""Backbones: torchvision's ResNets with a stem for small pictures, MoCo v3's vision transformers, a
small ResNet for the shapes; and the optimiser LARS.

Legend of the shapes: N images, S side of a picture in pixels, D features of an image.
"""
import torch
import torchvision
from torch import nn
from torchvision.models.resnet import BasicBlock

from support.command_line import UserError
from support.data import IN_MEMORY_SIZE

# Width, layers, heads. vit_small and vit_base are MoCo v3's, vit_narrow is for the shapes.
VITS = {"vit_small": (384, 12, 12), "vit_base": (768, 12, 12), "vit_narrow": (96, 4, 3)}


def make_backbone(arch, image_size, zero_init_residual=False):
    """A network without its classifier: pictures (N, 3, S, S) -> features (N, D).

    Args:
        arch: one of VITS, resnet10_narrow, or a name in torchvision whose last layer is called fc,
            such as resnet50.
        image_size: S. Up to IN_MEMORY_SIZE a ResNet has a 3x3 stride-1 first convolution and no
            max-pooling, as is usual on CIFAR, and a vision transformer has patches of 4 pixels
            instead of 16.
        zero_init_residual: each block of a torchvision ResNet starts as the identity, as in
            MoCo v3, BYOL and SimSiam.
    Returns:
        backbone, D.
    Raises:
        UserError: the architecture is unknown or does not fit the pictures.
    """
    small = image_size <= IN_MEMORY_SIZE
    if arch == "resnet10_narrow":
        return narrow_resnet(), 128
    if arch in VITS:
        width, layers, heads = VITS[arch]
        return vision_transformer(width, layers, heads, 4 if small else 16, image_size), width
    backbone = None
    if arch in torchvision.models.list_models(module=torchvision.models):       # classifiers only
        options = {"zero_init_residual": True} if zero_init_residual and "res" in arch else {}
        backbone = torchvision.models.get_model(arch, weights=None, **options)
    if small:
        fits = isinstance(backbone, torchvision.models.ResNet)
    else:
        fits = hasattr(backbone, "fc") and not getattr(backbone, "aux_logits", False)
    if not fits:
        raise UserError(f"--arch {arch} is not supported{' for small pictures' if small else ''}: "
                        f"use a ResNet of torchvision (resnet18, resnet34, resnet50, "
                        f"resnext50_32x4d, wide_resnet50_2) or {', '.join(VITS)}")
    dim = backbone.fc.in_features
    backbone.fc = nn.Identity()
    if small:
        keep_resolution(backbone)
    return backbone, dim


def keep_resolution(resnet):
    """A stem that does not make the maps of small pictures smaller."""
    resnet.conv1 = nn.Conv2d(3, resnet.conv1.out_channels, 3, padding=1, bias=False)
    init_convolution(resnet.conv1)
    resnet.maxpool = nn.Identity()


def init_convolution(layer):
    """Starts a convolution like those of torchvision's ResNets."""
    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")


def narrow_resnet(width=16):
    """A ResNet-10 of a quarter of the usual width for pictures of 32 x 32 pixels, about 20 times
    cheaper than a ResNet-18."""
    layers = [nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(width),
              nn.ReLU()]
    channels = [(width, width), (width, 2 * width), (2 * width, 4 * width), (4 * width, 8 * width)]
    for a, b in channels:
        if a == b:
            layers.append(BasicBlock(a, b))
            continue
        shortcut = nn.Sequential(nn.Conv2d(a, b, 1, stride=2, bias=False), nn.BatchNorm2d(b))
        layers.append(BasicBlock(a, b, stride=2, downsample=shortcut))
    network = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten())
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            init_convolution(module)
    return network


def vision_transformer(width, layers, heads, patch, image_size):
    """torchvision's ViT as MoCo v3 trains it (Chen et al. 2021, "An Empirical Study of Training
    Self-Supervised Vision Transformers"): fixed sine-cosine positions, and q, k and v each start as
    a matrix of their own. The patch projection stays random: its gradients make training unstable.
    """
    if image_size % patch:
        raise UserError(f"--image-size {image_size} is not a multiple of the vision transformer's "
                        f"patches of {patch} pixels")
    vit = torchvision.models.VisionTransformer(image_size, patch, layers, heads, width, 4 * width)
    vit.heads = nn.Identity()
    for layer in vit.encoder.layers:
        xavier(layer.self_attention.in_proj_weight, width)
        xavier(layer.self_attention.out_proj.weight, width)
        for linear in (layer.mlp[0], layer.mlp[3]):
            nn.init.zeros_(linear.bias)
    xavier(vit.conv_proj.weight, width)
    nn.init.normal_(vit.class_token, std=1e-6)
    vit.encoder.pos_embedding.data = sine_positions(width, image_size // patch)
    for fixed in (vit.encoder.pos_embedding, *vit.conv_proj.parameters()):
        fixed.requires_grad_(False)
    return vit


def xavier(weight, outputs):
    """Xavier's uniform start for a given number of outputs: in_proj_weight stacks q, k and v, and
    the patch projection is a convolution, so that PyTorch's own function takes other numbers."""
    bound = (6 / (weight[0].numel() + outputs)) ** 0.5
    nn.init.uniform_(weight, -bound, bound)


def sine_positions(width, side, longest=10_000.0):
    """Position embeddings of side x side patches and the class token, (1, 1 + side * side, width).

    A quarter of the numbers each: sine and cosine of the column, sine and cosine of the row, at
    frequencies from 1 to 1 / longest. The class token has zeros.
    """
    frequency = longest ** -(torch.arange(width // 4) / (width // 4))
    line = torch.arange(side)
    rows, columns = torch.meshgrid(line, line, indexing="ij")
    row = rows.flatten()[:, None] * frequency
    column = columns.flatten()[:, None] * frequency
    positions = torch.cat([column.sin(), column.cos(), row.sin(), row.cos()], 1)
    return torch.cat([torch.zeros(1, width), positions])[None]


class LARS(torch.optim.Optimizer):
    """SGD with momentum where the step of each matrix is scaled by trust |w| / |gradient|.

    Biases and batch-norm weights get neither this scale nor weight decay, as in MoCo v3.
    Source: You et al. 2017, "Large Batch Training of Convolutional Networks".
    """
    def __init__(self, parameters, lr, weight_decay, momentum=0.9, trust=0.001):
        super().__init__(parameters, {"lr": lr, "weight_decay": weight_decay,
                                      "momentum": momentum, "trust": trust})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                update = p.grad
                if p.ndim > 1:
                    update = update.add(p, alpha=group["weight_decay"])
                    p_norm = p.norm()
                    update_norm = update.norm()
                    scaled = (p_norm > 0) & (update_norm > 0)
                    update = update * torch.where(
                        scaled, group["trust"] * p_norm / update_norm, 1.0)
                state = self.state[p]
                if not state:
                    state["mu"] = torch.zeros_like(p)
                mu = state["mu"].mul_(group["momentum"]).add_(update)
                p.add_(mu, alpha=-group["lr"])
