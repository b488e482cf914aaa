"""Training with the kernels and with the float64 twin: the first steps stay together, and both learn.

`benchmarks/twin_training.py` trains for 1000 steps and compares the PSNR with the spread over seeds.
"""

import pytest
import torch

from benchmarks.twin_training import (
    KERNELS,
    NUM_GAUSSIANS,
    TWIN,
    held_out_psnr,
    make_views,
    random_gaussians,
    ssim_twin,
    train,
)

STEPS = 40


@pytest.fixture(scope="module")
def views():
    return make_views()


def test_trained_parameters_stay_beside_the_twins(views) -> None:
    start = random_gaussians(NUM_GAUSSIANS, seed=0)
    kernels, twin = train(KERNELS, views, 0, STEPS), train(TWIN, views, 0, STEPS)
    report = []
    for name, before in start.items():
        moved = (twin[name] - before).norm()
        apart = (kernels[name].double() - twin[name]).norm()
        report.append((float(apart / moved), name))
    # Of the way that each tensor went: measured 1.3e-5.
    assert max(report)[0] < 1e-4, report
    scores = [held_out_psnr(gaussians, views) for gaussians in (start, kernels, twin)]
    assert scores[2] > scores[0] + 1.5  # measured 2.07
    assert abs(scores[1] - scores[2]) < 1e-4  # measured 3e-7


def test_the_twins_ssim_is_the_kernels() -> None:
    """With float64 images, next to float32's: another implementation of the same mean."""
    g = torch.Generator().manual_seed(0)
    image, target = (torch.rand(1, 3, 30, 40, generator=g, dtype=torch.float64) for _ in range(2))
    difference = KERNELS.ssim(image.float(), target.float()) - ssim_twin(image, target)
    assert abs(float(difference)) < 1e-6
