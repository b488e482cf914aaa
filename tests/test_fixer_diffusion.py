"""`DiffusionFixer`: any size of image, tiles, the cached reference; with tiny networks."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from test_fixer_network import SEES_DIFFERENCE, TINY
from tiny_fixer import randomise, save_base, tiny_unet, tiny_vae

from s2d.fixer.diffusion import (
    DiffusionFixer,
    fit_photo,
    load_compact_fixer,
    load_difix_fixer,
    to_network,
)
from s2d.fixer.network.compact import save_compact
from s2d.fixer.network.model import build_model
from s2d.fixer.tiles import pad_to_multiple, run_tiled, tile_starts


def view(height=21, width=34, seed=0):
    """Render, guidance, coverage and a reference of another size."""
    generator = torch.Generator().manual_seed(seed)
    rendered, guidance = torch.rand(2, height, width, 3, generator=generator)
    mask = (torch.rand(height, width, 1, generator=generator) > 0.5).float()
    return rendered, guidance, mask, torch.rand(30, 40, 3, generator=generator)


def random_fixer(**settings):
    return DiffusionFixer(randomise(build_model(replace(TINY, residual=False)), 0), **settings)


@pytest.mark.parametrize("size", [(21, 34), (64, 8), (5, 90), (1, 1), (150, 70)])
def test_an_untrained_correction_leaves_the_mix_at_any_size(size):
    """Padding, tiles and their blending put nothing in and take nothing away."""
    rendered, guidance, mask, reference = view(*size)
    fixer = DiffusionFixer(build_model(TINY), tile_size=64)
    result = fixer.fix(rendered, guidance, mask, reference)
    expected = torch.where(mask > 0, (rendered + guidance) / 2, rendered)
    assert torch.allclose(result.fixed, expected, atol=1e-6)
    assert torch.equal(result.mask, mask)
    assert torch.allclose(result.confidence, torch.ones(*size, 1), atol=1e-5)  # blending rounds


def test_the_same_view_gives_the_same_bits_and_the_inputs_stay():
    images = view()
    copies = [image.clone() for image in images]
    fixer = random_fixer()
    first, again = fixer.fix(*images), fixer.fix(*images)
    assert torch.equal(first.fixed, again.fixed)
    assert all(torch.equal(image, copy) for image, copy in zip(images, copies, strict=True))
    assert first.fixed.shape == (21, 34, 3) and first.confidence.shape == (21, 34, 1)
    for image in (first.fixed, first.confidence):
        assert image.dtype == torch.float32 and image.min() >= 0 and image.max() <= 1
    assert not first.fixed.requires_grad


def test_the_image_is_the_models_and_the_confidence_falls_where_it_changed_much():
    fixer = random_fixer()
    rendered, guidance, mask, reference = view(24, 32)
    images = [to_network(image) for image in (rendered, guidance)]
    photo = fit_photo(to_network(reference), 24, 32)
    with torch.no_grad():
        expected = fixer.model(*images, mask.permute(2, 0, 1)[None], photo[None])
    expected = (expected[0].permute(1, 2, 0) / 2 + 0.5).clamp(0, 1)
    result = fixer.fix(rendered, guidance, mask, reference)
    assert torch.allclose(result.fixed, expected, atol=1e-5)
    shown = rendered + 0.5 * mask * (guidance - rendered)
    change = (expected - shown).abs().mean(-1, keepdim=True)
    assert torch.allclose(result.confidence, 1 - (change / 0.25).clamp(max=1), atol=1e-4)


def test_a_reference_is_encoded_once_per_photo_and_tile(monkeypatch):
    fixer = random_fixer(tile_size=64)
    encoded = []
    encode = fixer.model.encode
    monkeypatch.setattr(
        fixer.model, "encode", lambda images: encoded.append(images.shape) or encode(images)
    )
    images = view(20, 100)
    first = fixer.fix(*images)
    # Two tiles: each encodes its part of the image and of the reference.
    assert len(encoded) == 4
    assert torch.equal(fixer.fix(*images).fixed, first.fixed)
    assert len(encoded) == 6
    fixer.fix(*images[:3], images[3].flip(0))
    assert len(encoded) == 10
    monkeypatch.setattr("s2d.fixer.diffusion.CACHE_BYTES", 0)
    assert torch.equal(fixer.fix(*images).fixed, first.fixed)


def test_the_reference_matters():
    """A random network takes little notice of it: about 1e-4."""
    fixer, images = random_fixer(), view()
    other = fixer.fix(*images[:3], 1 - images[3]).fixed
    assert not torch.allclose(fixer.fix(*images).fixed, other, atol=1e-5)


def test_a_fixed_network_size_gives_back_the_images_size():
    result = random_fixer(network_size=64).fix(*view())
    assert result.fixed.shape == (21, 34, 3)
    untrained = DiffusionFixer(build_model(TINY), network_size=64)
    smooth = torch.linspace(0, 1, 34).expand(21, 34)[..., None].expand(-1, -1, 3)
    result = untrained.fix(smooth, smooth, torch.ones(21, 34, 1), smooth)
    assert (
        result.fixed - smooth
    ).abs().mean() < 0.005  # measured: 0.0007 from resizing there and back


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_precisions(precision):
    images = view()
    expected = random_fixer().fix(*images).fixed
    got = random_fixer(precision=precision, tile_size=64).fix(*images).fixed
    assert got.dtype == torch.float32
    assert 0 < (got - expected).abs().mean() < 0.01  # measured: 2e-3 and 3e-4


def test_wrong_shapes_and_settings_are_refused():
    fixer = random_fixer()
    rendered, guidance, mask, reference = view()
    with pytest.raises(ValueError, match=r"fix_together: guidance must be \[H, W, 3\] with H=21"):
        fixer.fix(rendered, guidance[1:], mask, reference)
    with pytest.raises(ValueError, match=r"fix_together: coverage_mask must be \[H, W, 1\]"):
        fixer.fix(rendered, guidance, mask[..., 0], reference)
    for setting in ({"tile_size": 8}, {"network_size": 1}):
        with pytest.raises(ValueError, match=f"DiffusionFixer: {next(iter(setting))} must be"):
            random_fixer(**setting)


def test_both_kinds_load_into_a_fixer(tmp_path):
    model = randomise(build_model(TINY), 0)
    path = save_compact(model, tmp_path / "compact.safetensors", torch.float32)
    images = view()
    assert torch.equal(
        load_compact_fixer(path).fix(*images).fixed, DiffusionFixer(model).fix(*images).fixed
    )
    folder = save_base(tmp_path / "base", tiny_unet(), tiny_vae(skips=False), difix=False)
    fixer = load_difix_fixer(str(folder), network_size=64)
    assert fixer.fix(*images).fixed.shape == (21, 34, 3)


def test_the_fixer_alone_imports_no_diffusers():
    code = "import sys, s2d.fixer.diffusion; assert not {'diffusers', 'transformers', 'peft'} & set(sys.modules)"
    root = Path(__file__).resolve().parent.parent
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


# ------------------------------------------------------------------------------------------------------------ tiles, padding


def test_tiles_cover_everything_and_overlap_enough():
    for length in range(1, 200):
        starts = tile_starts(length, 32, 8)
        assert starts[0] == 0 and starts == sorted(set(starts))
        assert length <= 32 or starts[-1] == length - 32
        assert all(b - a <= 24 for a, b in pairwise(starts))
    assert tile_starts(56, 32, 8) == [0, 24]
    assert tile_starts(57, 32, 8) == [0, 12, 25]


def test_tiles_fade_into_each_other():
    """Tile values 0 and 1: a linear ramp over what they share, and nothing but it."""
    values = iter((0.0, 1.0))
    row = run_tiled(lambda rows, columns: torch.full((1, 1, 4, 32), next(values)), 4, 56, 32, 8)
    assert torch.equal(row[0, 0, 0], row[0, 0, 3])
    expected = torch.cat([torch.zeros(24), torch.arange(1, 9) / 9, torch.ones(24)])
    assert torch.allclose(row[0, 0, 0], expected, atol=1e-6)


def test_tiles_of_one_image_give_the_image_back(generator):
    image = torch.rand(2, 3, 75, 131, generator=generator)
    for tile, overlap in ((32, 8), (32, 0), (32, 16), (100, 10), (200, 50)):
        whole = run_tiled(lambda rows, columns: image[..., rows, columns], 75, 131, tile, overlap)
        assert torch.allclose(whole, image, atol=1e-6)


def test_padding_mirrors_and_crops_back(generator):
    image = torch.rand(1, 3, 21, 34, generator=generator)
    padded = pad_to_multiple(image, 16)
    assert padded.shape == (1, 3, 32, 48)
    assert torch.equal(padded[..., :21, :34], image)
    assert torch.equal(padded[..., 21, :34], image[..., 19, :])
    assert pad_to_multiple(padded, 16) is padded
    assert pad_to_multiple(image[..., :1, :1], 16).shape == (1, 3, 16, 16)


def test_a_photo_is_cut_not_stretched():
    photo = torch.zeros(1, 1, 40, 80)
    photo[..., 20:60] = 1  # the middle square
    assert torch.equal(fit_photo(photo, 40, 40), torch.ones(1, 1, 40, 40))
    assert fit_photo(photo, 33, 21).shape == (1, 1, 33, 21)
    assert fit_photo(photo, 100, 101).shape == (1, 1, 100, 101)


def test_a_compact_network_leaves_a_view_without_guidance_as_it_is(generator):
    """It never saw a good one of these. One that sees the mix alone cannot tell, and repairs all."""
    rendered, guidance, photo = torch.rand(3, 32, 48, 3, generator=generator)
    coverage = torch.zeros(32, 48, 1)
    coverage[:3] = 1.0  # 9 %
    compact = DiffusionFixer(randomise(build_model(SEES_DIFFERENCE), 0))
    result = compact.fix(rendered, guidance, coverage, photo)
    assert torch.equal(result.fixed, rendered)
    assert torch.equal(result.mask, coverage) and bool((result.confidence == 1).all())
    assert not torch.equal(
        DiffusionFixer(randomise(build_model(TINY), 0))
        .fix(rendered, guidance, coverage, photo)
        .fixed,
        rendered,
    )
    coverage[3] = 1.0  # 12 %
    assert not torch.equal(compact.fix(rendered, guidance, coverage, photo).fixed, rendered)
