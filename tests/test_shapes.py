"""The world of shapes: pictures, perturbations and the frozen encoder are what their truth says."""
import pytest
import torch
from PIL import Image

import shapes
import train_moco
from generate_views import foreground_proportion
from quality_loss import fit_foreground
from support.augment import normalise
from support.data import spaced


@pytest.fixture(scope="module")
def scenes():
    return shapes.sample_scenes(600, torch.Generator().manual_seed(5))


def perturbed(scenes, level):
    return shapes.perturb(scenes, level, torch.Generator().manual_seed(1))


def test_pictures(scenes):
    """Where the figure covers a pixel wholly, it has the figure's colour; the same generator gives
    the same scenes."""
    pixels, mask = shapes.render(scenes), shapes.foreground(scenes)
    assert pixels.shape == (600, 3, 32, 32) and pixels.dtype == torch.uint8
    assert mask.shape == (600, 32, 32)
    inside = (mask == 1)[:, None].expand_as(pixels)
    colour = (scenes.colour * 255).round().byte()[:, :, None, None].expand_as(pixels)
    assert inside.sum() > 10_000 and torch.equal(pixels[inside], colour[inside])
    area = mask.mean((1, 2))
    assert area.min() < 0.1 and area.max() > 0.5                     # small figures and large ones
    again = shapes.sample_scenes(600, torch.Generator().manual_seed(5))
    assert all(torch.equal(a, b) for a, b in zip(scenes, again, strict=True))
    assert (scenes.shape.bincount(minlength=10) > 30).all()


def test_strong_noise_costs_small_figures_their_identity(scenes):
    """As in the paper's Fig. 3: none is lost at level 0, the small ones at 400, few large ones."""
    area = shapes.foreground(scenes).mean((1, 2))
    small, large = area < 0.2, area > 0.45
    assert small.sum() > 100 and large.sum() > 50
    lost = [(perturbed(scenes, level).shape != scenes.shape).float() for level in (0, 200, 400)]
    assert lost[0].mean() < 0.03 and lost[2][small].mean() > 0.9 and lost[2][large].mean() < 0.2
    assert lost[0][small].mean() < lost[1][small].mean() < lost[2][small].mean()


def test_surroundings_change_with_the_level(scenes):
    grounds = [perturbed(scenes, level).ground for level in (0, 200, 400)]
    change = [(ground - scenes.ground).abs().mean() for ground in grounds]
    assert 0.05 < change[0] < change[1] < change[2]
    mixed = perturbed(scenes, torch.tensor([0, 400]).repeat(300)).ground     # one level a picture
    assert torch.equal(mixed[1::2], grounds[2][1::2])
    assert not torch.equal(mixed[::2], grounds[2][::2])


def test_views_are_drawn_apart_from_the_pictures(monkeypatch):
    """With any seed: a view at the strongest level differs from its picture as much as that of
    another picture with the same figure would."""
    def views(seed, count):
        return train_moco.shapes_views(encoder, 400, seed, count)[0]

    def encoder(x):
        return torch.randn(len(x), 64, 8, generator=torch.Generator().manual_seed(0))
    scenes = shapes.Scene(*(x[:1024] for x in shapes.split("train")))
    monkeypatch.setattr(shapes, "split", lambda name: scenes)
    pixels = shapes.render(scenes)[:500].float()
    another = (pixels.roll(1, 0) - pixels).abs().mean()
    for seed in (0, 1):                            # those of the pictures, too
        everything = views(seed, 1024)
        assert (everything[:500] - pixels).abs().mean() > 0.7 * another
    assert torch.equal(views(1, 512), everything[spaced(1024, 512)])


def test_the_encoder_sees_the_foreground(scenes, shapes_encoder):
    """Its first principal component is the figure; the proportion found follows the true one."""
    encoder = shapes_encoder
    with torch.no_grad():
        tokens = encoder(normalise(shapes.render(scenes) / 255))
    assert tokens.shape == (600, 64, 64) and not any(p.requires_grad for p in encoder.parameters())
    component, threshold = fit_foreground(tokens, (8, 8))
    mask = shapes.foreground(scenes)
    cells = mask.view(600, 8, 4, 8, 4).mean((2, 4)).flatten()
    p = foreground_proportion(tokens, component, threshold)
    for found, truth in (((tokens @ component).flatten(), cells), (p, mask.mean((1, 2)))):
        assert torch.corrcoef(torch.stack([found, truth]))[0, 1] > 0.8
    assert (p.mean() - 0.4).abs() < 0.01


def test_the_picture_it_draws(tmp_path, capsys):
    shapes.main(count=3, path=str(tmp_path / "shapes.png"))
    assert len(Image.open(tmp_path / "shapes.png").convert("RGB").getcolors(10 ** 6)) > 50
    assert "3 scenes" in capsys.readouterr().out


def test_the_frozen_encoder_of_shapes_looks_at_each_picture_alone():
    encoder = shapes.train_encoder(steps=2, batch=16)
    x = torch.randn(4, 3, 32, 32)
    torch.testing.assert_close(encoder(x)[:1], encoder(x[:1]), atol=1e-4, rtol=1e-4)
