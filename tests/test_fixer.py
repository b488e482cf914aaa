"""The analytic fixer: hand numbers for the mix, the mask's edge, the gain."""

import pytest
import torch

from s2d.fixer.analytic import AnalyticFixer, channel_gain, feathered

REFERENCE = torch.zeros(4, 4, 3)


def half_covered(height=20, width=30):
    mask = torch.zeros(height, width, 1)
    mask[:, : width // 2] = 1.0
    return mask


def test_mask_mode_mixes_where_points_project_and_keeps_the_render_elsewhere():
    rendered, guidance = torch.full((20, 30, 3), 0.2), torch.full((20, 30, 3), 0.6)
    fixer = AnalyticFixer(guidance_share=0.25, feather=0.0)
    result = fixer.fix(rendered, guidance, half_covered(), REFERENCE)
    assert torch.allclose(result.fixed[:, :15], torch.tensor(0.3))  # 0.75·0.2 + 0.25·0.6
    assert torch.equal(result.fixed[:, 15:], rendered[:, 15:])
    assert torch.equal(result.mask, half_covered())


def test_global_mode_mixes_the_holes_too():
    rendered, guidance = torch.full((20, 30, 3), 0.2), torch.zeros(20, 30, 3)
    result = AnalyticFixer(0.5, "global", 0.0).fix(rendered, guidance, half_covered(), REFERENCE)
    assert torch.allclose(result.fixed, torch.tensor(0.1))


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_the_ends_of_the_share_are_render_and_guidance(share):
    rendered, guidance = torch.rand(20, 30, 3), torch.rand(20, 30, 3)
    result = AnalyticFixer(share).fix(rendered, guidance, torch.ones(20, 30, 1), REFERENCE)
    assert torch.allclose(result.fixed, guidance if share else rendered, atol=1e-6)


def test_feather_is_zero_outside_and_rises_inside():
    soft = feathered(half_covered(), 2.0)[10, :, 0]
    assert torch.equal(soft[15:], torch.zeros(15))
    assert torch.all(soft[:14] >= soft[1:15])
    assert soft[14] < 0.3 and soft[5] == pytest.approx(1.0, abs=1e-5)
    assert soft[0] == pytest.approx(1.0, abs=1e-5)  # the image's border is not the mask's
    assert torch.equal(feathered(half_covered(), 0.0), half_covered())


def test_gain_is_found_although_a_third_of_the_pixels_is_wrong():
    generator = torch.Generator().manual_seed(0)
    guidance = torch.rand(40, 40, 3, generator=generator) * 0.5 + 0.1
    gain = torch.tensor([1.3, 0.8, 1.0])
    rendered = guidance * gain
    rendered[:13] = torch.rand(13, 40, 3, generator=generator)
    found = channel_gain(guidance, rendered, torch.ones(40, 40, 1))
    assert torch.allclose(found, gain, atol=0.03)
    # Too little to measure on: no gain.
    assert torch.equal(channel_gain(guidance, rendered, torch.zeros(40, 40, 1)), torch.ones(3))
    fixed = AnalyticFixer(1.0, feather=0.0, match_gain=True).fix(
        rendered, guidance, torch.ones(40, 40, 1), REFERENCE
    )
    assert torch.allclose(fixed.fixed[13:], rendered[13:], atol=0.03)


def test_confidence_is_low_where_render_and_guidance_disagree_and_zero_where_no_point_is():
    rendered, guidance = torch.full((20, 30, 3), 0.5), torch.full((20, 30, 3), 0.5)
    guidance[:10] = 1.0
    confidence = (
        AnalyticFixer(feather=0.0).fix(rendered, guidance, half_covered(), REFERENCE).confidence
    )
    assert torch.equal(confidence[10:, :15], torch.ones(10, 15, 1))
    assert torch.equal(confidence[:10, :15], torch.zeros(10, 15, 1))
    assert torch.equal(confidence[:, 15:], torch.zeros(20, 15, 1))


def test_shape_mismatch_names_the_image():
    images = torch.rand(20, 30, 3), torch.rand(20, 31, 3), torch.ones(20, 30, 1)
    with pytest.raises(ValueError, match="guidance must be"):
        AnalyticFixer().fix(*images, REFERENCE)
