"""The counts of a render's work against what a loop over all pixels and Gaussians finds."""

import oracles
import pytest
import torch
from diff_gaussian_rasterization import _native, rasterize_gaussians_raw, reference


def counted(scene):
    """Pairs and memory of one render of a float32 copy of the scene, and the render."""
    scene = oracles.cast(scene, torch.float32)
    scene["means"].requires_grad_()
    out = rasterize_gaussians_raw(**scene)
    frame = out.rgb.grad_fn.frames[0]
    return frame.pairs(), frame.memory(), frame.stats(), out


def brute_force(scene):
    """Alphas of all pixels and visible Gaussians, nearest first, in float64: which are blended, and which Gaussian finishes a pixel.

    Returns:
        reached [H, W, M]: alpha >= 1/255; stop [H, W]: index of the Gaussian that finishes the pixel, M where none does.
    """
    coeffs = torch.cat([scene["sh0"], scene["shN"]], dim=1)
    gaussians = [scene[k] for k in ("means", "log_scales", "quats", "opacity_logits")]
    camera = (scene["viewmats"][0], scene["Ks"][0], scene["width"], scene["height"], 0)
    splats = reference._project(*gaussians, coeffs, *camera)
    order = splats.depths.argsort()
    order = order[splats.depths[order] > reference.NEAR]
    rows, columns = torch.meshgrid(
        torch.arange(scene["height"]) + 0.5, torch.arange(scene["width"]) + 0.5, indexing="ij"
    )
    offsets = torch.stack([columns, rows], -1)[:, :, None].double() - splats.means2d[order]
    conics = torch.linalg.inv(splats.covs2d[order])
    distance2 = torch.einsum("hwmi,mij,hwmj->hwm", offsets, conics, offsets)
    alphas = (splats.opacities[order] * torch.exp(-0.5 * distance2)).clamp_max(reference.ALPHA_MAX)
    reached = alphas >= reference.ALPHA_MIN
    finished = (1 - alphas * reached).cumprod(-1) < reference.T_MIN
    count = len(order)
    stop = torch.where(finished.any(-1), finished.int().argmax(-1), count)
    return reached, stop


@pytest.mark.parametrize("opacity", [-1.0, 6.0], ids=["translucent", "opaque"])
def test_blended_pairs_are_those_of_a_loop_over_all_pixels(opacity):
    # 83 x 51: tiles and blocks that the edge cuts.
    scene = oracles.make_scene(150, degree=0, width=83, height=51, opacity_logit=(opacity, 1.0))
    pairs, *_ = counted(scene)
    reached, stop = brute_force(scene)
    blended = reached & (torch.arange(reached.shape[2]) < stop[..., None])
    assert (stop < reached.shape[2]).any() == (
        opacity == 6.0
    )  # the scene has what the case is about
    # Measured equal; a pair on the very edge of an ellipse may fall to either side in float32.
    assert abs(pairs["blended"] - int(blended.sum())) <= 3


@pytest.mark.parametrize("opacity", [-1.0, 6.0], ids=["translucent", "opaque"])
def test_visited_pairs_are_whole_blocks_up_to_the_last_that_counts(opacity):
    scene = oracles.make_scene(400, degree=0, width=96, height=48, opacity_logit=(opacity, 1.0))
    pairs, *_ = counted(scene)
    reached, stop = brute_force(scene)
    lanes = _native.library().s2d_lanes()
    width = 2 if lanes == 4 else 4
    height = lanes // width
    blocks = reached.reshape(48 // height, height, 96 // width, width, -1)
    touched = blocks.any(3).any(1)  # some pixel centre is inside the ellipse
    last = stop.reshape(48 // height, height, 96 // width, width).amax(3).amax(1)[..., None]
    index = torch.arange(reached.shape[2])
    # The ellipse is tested against the hull of a block's centres, so a few blocks are visited that hold no centre inside it:
    # measured 0 to 0.04 % more.
    for name, needed in (
        ("listed", touched),
        ("forward", touched & (index <= last)),
        ("backward", touched & (index < last)),
    ):
        least = lanes * int(needed.sum())
        assert least <= pairs[name] <= 1.002 * least, name
        assert pairs[name] % lanes == 0
    assert pairs["blended"] < pairs["backward"] < pairs["forward"] < pairs["listed"]
    if opacity == 6.0:
        assert pairs["forward"] < 0.6 * pairs["listed"]  # early termination is worth counting


def test_one_gaussian_in_the_middle_of_the_image():
    """A disc whose area is known: pi r^2 with alpha = 1/255 at radius r."""
    scene = oracles.make_scene(1, degree=0, width=200, height=200)
    scene["means"] = torch.zeros(1, 3, dtype=torch.float64)
    scene["log_scales"] = torch.full((1, 3), 0.1, dtype=torch.float64).log()
    scene["opacity_logits"] = torch.zeros(1, dtype=torch.float64)
    scene["viewmats"] = torch.eye(4, dtype=torch.float64)[None]
    scene["viewmats"][0, 2, 3] = 4.0
    scene["Ks"] = torch.tensor([[[400.0, 0, 100], [0, 400.0, 100], [0, 0, 1]]], dtype=torch.float64)
    pairs, _, stats, _ = counted(scene)
    variance = (400 * 0.1 / 4) ** 2 + reference.BLUR
    area = torch.pi * 2 * variance * torch.log(torch.tensor(0.5 / reference.ALPHA_MIN)).item()
    assert stats["visible"] == 1
    # Pixel centres inside a disc of radius 31: measured 0.2 % off.
    assert pairs["blended"] == pytest.approx(area, rel=0.01)


def test_memory_covers_what_the_render_needs():
    scene = oracles.make_scene(3000, degree=0, width=320, height=240)
    _, memory, stats, _ = counted(scene)
    lower = {"gaussians": 3000 * 64, "instances": stats["instances"] * 64, "image": 320 * 240 * 16}
    for name, least in lower.items():
        # Room to grow, and a 2 MB page at most for each of the few buffers.
        assert least <= memory[name] <= 8 * least + 8 * (2 << 20), name
