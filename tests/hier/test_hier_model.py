"""The network: sizes, symmetry, fading, gradients; and that a short training makes every level better than the one before."""

import dataclasses
import json
from itertools import pairwise

import pytest
import torch
from diff_gaussian_rasterization.reference import rasterize_reference
from hier_scenes import random_views, wall
from torch.nn.utils import parameters_to_vector, vector_to_parameters

import s2d.hier.gaussians
from s2d.hier.attention import CrossViewTransformer
from s2d.hier.config import HierConfig
from s2d.hier.fusion import Fading
from s2d.hier.gaussians import render
from s2d.hier.model import HierModel
from s2d.hier.pyramid import ImagePyramid

NAMES = ("means", "log_scales", "quats", "opacities", "sh")


def lively(config, seed=0):
    """A model whose last layers are not zero, so that every part has a say."""
    torch.manual_seed(seed)
    model = HierModel(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if float(parameter.abs().max()) == 0:
                parameter.normal_(0, 0.05)
    return model


def test_sizes_are_as_promised(capsys):
    for name in ("compact", "paper", "tiny"):
        with torch.device("meta"):
            model = HierModel(HierConfig.named(name))
        count = sum(p.numel() for p in model.parameters())
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        with capsys.disabled():
            print(f"\nhier {name}: {count:,} parameters, {trained:,} of them trained")
            for part, module in model.named_children():
                print(f"  {part}: {sum(p.numel() for p in module.parameters()):,}")
        if name == "compact":
            assert count <= 2_000_000
        if name == "paper":
            # UniMatch's six blocks: 4 · 128² + 256 for attention within, the same and 1536 · 128 · … for attention across, as published 3.15 M.
            assert sum(p.numel() for p in model.transformer.parameters()) == 3_150_336
            assert sum(p.numel() for p in model.dino.vit.parameters()) == 86_580_480


def test_config_survives_json_and_refuses_strangers():
    for name in ("compact", "paper", "tiny"):
        config = HierConfig.named(name)
        assert HierConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    with pytest.raises(ValueError, match="another version"):
        HierConfig.from_dict({**config.to_dict(), "depth": 3})
    with pytest.raises(ValueError, match="compact, paper, tiny"):
        HierConfig.named("large")
    with pytest.raises(ValueError, match="gaussian_levels"):
        dataclasses.replace(config, gaussian_levels=(2, 1))


def test_any_order_of_any_number_of_views_of_any_shape(generator):
    """Rows move with their views, and nothing else changes; sides are no multiple of anything."""
    views = random_views(generator, 2, 3, 22, 37)
    model = lively(HierConfig.named("tiny"))
    order = [2, 0, 1]
    with torch.no_grad():
        straight, turned = model(views), model(views.select(order))
    rows = 0
    for level, (one, other) in enumerate(zip(straight, turned, strict=True)):
        assert one.levels.bincount().shape == (level + 1,)
        assert torch.equal(one.levels, other.levels)
        start = 0
        for count in one.levels.bincount().tolist():
            for name in NAMES:
                a, b = (
                    getattr(x, name)[:, start : start + count].unflatten(1, (3, -1))
                    for x in (one, other)
                )
                # measured 2e-6 (means, of 4 units), 7e-7 (log_scales): sums over views in another order
                assert torch.allclose(a[:, order], b, rtol=1e-5, atol=1e-5), (level, name)
            start += count
        rows = start
    assert rows == 3 * (5 * 9 + 11 * 18 + 22 * 37)


def test_rows_are_what_they_claim(generator):
    views = random_views(generator, 1, 2, 32, 16)
    found = lively(HierConfig.named("tiny"))(views)
    for before, after in pairwise(found):
        # The older rows are the same but for their opacity, which only falls.
        assert torch.equal(before.means, after.means[:, : before.num])
        weights = after.opacities[:, : before.num] / before.opacities
        assert weights.min() > 0
        assert weights.max() < 1
    last = found[-1]
    assert last.num == 2 * (8 * 4 + 16 * 8 + 32 * 16)
    assert last.sh.shape == (1, last.num, 4, 3)
    assert torch.allclose(last.quats.norm(dim=-1), torch.ones(1, last.num), atol=1e-6)
    scene = last.scene(0)
    assert scene.sh_degree == 1
    assert torch.allclose(scene.opacity_logits.sigmoid(), last.opacities[0], atol=1e-6)


def test_fading_weights_lie_between_0_and_1_and_depend_on_nothing_where_nothing_is_wrong(generator):
    fading = Fading(5)
    old = 30 * torch.randn(2, 3, 5, 4, 6, generator=generator)
    new = 30 * torch.randn(2, 3, 5, 8, 12, generator=generator)
    error = torch.rand(2, 3, 3, 16, 24, generator=generator)
    weights = fading(old, new, error)
    assert weights.shape == (2, 3, 4, 6)
    assert weights.min() > 0
    assert weights.max() < 1
    assert weights.std() > 0
    assert fading(old, new, 0 * error).std() < 1e-6


def test_windows_cover_the_picture_and_shifted_ones_do_not_wrap_around():
    """What a token can see, read from gradients: its window; in the second block the middle sees all, the corner not the far side."""
    torch.manual_seed(0)
    for blocks, token, seen in ((1, 0, 4), (1, 3, 4), (2, 0, 4), (2, 3, 8)):
        transformer = CrossViewTransformer(8, blocks).double()
        features = torch.randn(1, 2, 8, 8, 8, dtype=torch.float64, requires_grad=True)
        transformer(features)[0, 0, :, token, token].square().sum().backward()
        for view in range(2):
            reach = features.grad[0, view].abs().sum(0) > 0  # [8, 8]
            assert reach[:seen, :seen].all(), (blocks, token)
            assert int(reach.sum()) == seen**2, (blocks, token)


def test_levels_without_gaussians_only_refine_depth(generator):
    config = dataclasses.replace(HierConfig.named("tiny"), gaussian_levels=(2,))
    (only,) = HierModel(config)(random_views(generator, 1, 2, 16, 16))
    assert only.levels.tolist() == [2] * (2 * 16 * 16)


def test_the_published_layout_works_at_full_resolution(generator):
    """Convolutions at every stride, no descriptors, harmonics of degree 3, context added to the pyramid: `paper`, made narrow."""
    config = dataclasses.replace(
        HierConfig.named("tiny"), stem_stride=1, photometric=False, sh_degree=3, attention_stride=4
    )
    last = lively(config)(random_views(generator, 1, 2, 20, 16))[-1]
    assert last.num == 2 * (5 * 4 + 10 * 8 + 20 * 16)
    assert last.sh.shape[2] == 16
    pyramid = ImagePyramid(config, context_width=6)
    images = torch.rand(2, 3, 16, 32, generator=generator)
    contexts = [torch.zeros(2, 6, 1, 2), torch.ones(2, 6, 1, 2)]
    for width, stride, one, other in zip(
        config.widths, (4, 2, 1), *(pyramid(images, context) for context in contexts), strict=True
    ):
        assert one.shape == (2, width, 16 // stride, 32 // stride)
        assert (one - other).abs().max() > 1e-3


def test_one_view_is_refused(generator):
    with pytest.raises(ValueError, match="at least 2 context views"):
        HierModel(HierConfig.named("tiny"))(random_views(generator, 1, 1, 16, 16))


def twin(gaussians, cameras):
    """The rasteriser in plain PyTorch, in the precision of what it gets."""
    return rasterize_reference(
        gaussians.means,
        gaussians.log_scales,
        gaussians.quats,
        gaussians.opacity_logits,
        gaussians.sh0,
        gaussians.shN,
        cameras.viewmats.to(gaussians.means.dtype),
        cameras.Ks.to(gaussians.means.dtype),
        cameras.width,
        cameras.height,
    )


def loss_of(model, views):
    return sum((render(level, views) - views.images).square().mean() for level in model(views))


def gradient(model, views):
    model.zero_grad()
    loss_of(model, views).backward()
    return parameters_to_vector(p.grad for p in model.parameters()).double()


def test_gradients_are_those_of_finite_differences(monkeypatch):
    """Through everything: sweep, three levels, error fed back through the rasteriser, fading. Float64, with the rasteriser's twin."""
    views, _ = wall((-0.2, 0.2), 16, 16, dtype=torch.float64)
    model = lively(HierConfig.named("tiny")).double()
    single = lively(HierConfig.named("tiny"))
    ours = gradient(single, wall((-0.2, 0.2), 16, 16)[0])

    monkeypatch.setattr(s2d.hier.gaussians, "rasterize", twin)
    exact = gradient(model, views)
    # The kernel in float32 against the twin in float64; measured 1e-6, and 1 - 5e-13
    assert float((ours - exact).norm() / exact.norm()) < 1e-4
    assert float(torch.cosine_similarity(ours, exact, dim=0)) > 1 - 1e-8

    generator = torch.Generator().manual_seed(1)
    start = parameters_to_vector(model.parameters()).detach()
    owners = [name.split(".")[0] for name, p in model.named_parameters() for _ in range(p.numel())]
    slopes, differences, step = [], [], 1e-6
    for part in sorted(set(owners)):
        # Along the part's own gradient, and as far along anything else in it.
        direction = torch.tensor([owner == part for owner in owners]) * torch.stack(
            [exact, torch.randn(len(exact), generator=generator, dtype=torch.float64)]
        )
        direction = (direction / direction.norm(dim=1, keepdim=True)).sum(0)
        slopes.append(float(exact @ direction))
        values = []
        for sign in (1, -1):
            vector_to_parameters(start + sign * step * direction, model.parameters())
            with torch.no_grad():
                values.append(float(loss_of(model, views)))
        differences.append((values[0] - values[1]) / (2 * step))
    slopes, differences = torch.tensor([slopes, differences], dtype=torch.float64)
    # measured 5e-10 in float64
    assert float((slopes - differences).norm() / slopes.norm()) < 1e-6
    assert float(torch.cosine_similarity(slopes, differences, dim=0)) > 1 - 1e-10


def test_a_short_training_makes_each_level_better_than_the_one_before():
    views, _ = wall((-0.2, 0.2), 32, 32)
    torch.manual_seed(0)
    model = HierModel(HierConfig.named("tiny"))
    optimizer = torch.optim.Adam(model.parameters(), 5e-3)
    before = float(loss_of(model, views).detach())
    for _ in range(12):
        optimizer.zero_grad()
        loss_of(model, views).backward()
        optimizer.step()
    with torch.no_grad():
        errors = [
            float((render(level, views) - views.images).abs().mean()) for level in model(views)
        ]
        after = float(loss_of(model, views))
    # measured 0.153, 0.079, 0.043, and 0.085 → 0.047
    assert errors[0] > errors[1] > errors[2]
    assert after < 0.8 * before
