"""Whole training steps of stages 1 and 3 on emulated kernels, against the same steps on the CPU."""

import contextlib
from types import SimpleNamespace

import oracles
import pytest
import torch
from emulated_driver import emulated_gpu

from s2d import training
from s2d.cameras import Cameras
from s2d.densify import DensifyPolicy
from s2d.gaussians import gaussians_from_points
from s2d.geometry import look_at
from s2d.optim import LearningRates
from s2d.refinement import Refinement, RefinementRates
from s2d.sampling import ViewSampler
from s2d.strategies.active import ActiveStrategies
from s2d.strategies.settings import Strategy
from s2d.training import (
    control_density,
    finish_run,
    optimise_view,
    record,
    refine_cameras,
    start_run,
)

WIDTH, HEIGHT, NUM = 20, 15, 40
NAMES = ("a", "b", "novel")
ON = {"cpu": contextlib.nullcontext, "gpu": emulated_gpu}


def rig():
    centers = torch.tensor([[-0.6, -4.0, 0.4], [0.5, -4.0, 0.2], [0.0, -4.2, 0.5]])
    viewmats = look_at(centers, torch.zeros(3, 3), torch.tensor([0.0, 0.0, 1.0]))
    K = torch.tensor([[1.2 * WIDTH, 0, WIDTH / 2], [0, 1.2 * WIDTH, HEIGHT / 2], [0, 0, 1]])
    return Cameras(viewmats, K.expand(3, 3, 3).clone(), ((WIDTH, HEIGHT),) * 3, NAMES)


class Known:
    """`Evidence` of depths that need no files."""

    def __init__(self):
        self.kept, self.novel = SimpleNamespace(cameras=rig()[:2]), rig()[2:]
        x = torch.arange(WIDTH) / WIDTH
        picture = (3.8 + 0.4 * x).expand(HEIGHT, WIDTH), (0.5 + 0.5 * x).expand(HEIGHT, WIDTH)
        self.depths = {name: picture for name in NAMES[:2]}
        self.points = torch.randn(200, 3, generator=torch.Generator().manual_seed(6))

    def __contains__(self, name):
        return name in NAMES[:2]


def started(strategy=None, rates=None):
    g = torch.Generator().manual_seed(5)
    gaussians = gaussians_from_points(
        torch.randn(NUM, 3, generator=g), torch.rand(NUM, 3, generator=g), 2, 0.3
    )
    # Round ones look alike from all sides: what is left of their rotations' gradients is rounding, which Adam makes steps of full length of.
    gaussians.log_scales += 0.4 * torch.randn(NUM, 3, generator=g)
    gaussians.quats = torch.randn(NUM, 4, generator=g)
    run = start_run(gaussians, LearningRates(means=1e-3), 3.0, ViewSampler(NAMES, seed=0), 0)
    if rates is not None:
        run.refinement = Refinement(rig()[:2], 3.0, rates)
    if strategy is not None:
        run.strategies = ActiveStrategies(strategy, Known(), gaussians, 3.0, 10, 0)
    return run


def pictures():
    g = torch.Generator().manual_seed(6)
    coarse = torch.rand(3, 3, 4, 5, generator=g)
    size = {"size": (HEIGHT, WIDTH), "mode": "bilinear"}
    return torch.nn.functional.interpolate(coarse, **size).permute(0, 2, 3, 1).contiguous()


def trained(run, steps):
    cameras, targets = rig(), pictures()
    weight = (torch.arange(WIDTH) % 3 / 2).expand(HEIGHT, WIDTH)[..., None].contiguous()
    policy = DensifyPolicy(start_step=3, every=3, grad_threshold=1e-3, max_gaussians=NUM + 20)
    losses = []
    for step in range(steps):
        row = step % 3
        losses.append(
            optimise_view(
                run,
                cameras[row],
                targets[row],
                ssim_weight=0.2,
                sh_degree=2,
                gradient_weight=weight if row == 2 else None,
                opacity_weight=0.01,
            )
        )
        refine_cameras(run, step / steps)
        control_density(run, policy, 0, 2 * steps)
        record(run, losses[-1])
    finish_run(run)
    return torch.stack(losses)


STRATEGIES = Strategy(
    dropout=0.2, opacity_decay=0.999, binocular_weight=0.3, binocular_from=0.0, depth_weight=0.1, normal_weight=0.05,
    smooth_weight=0.05, max_scale=0.5, max_elongation=5, smoothing=True, support=True, scale_weight=0.01,
)  # fmt: skip
CASES = {
    "stage 1": (None, None),
    "dropout alone": (Strategy(dropout=0.9), None),
    "stage 3 with all": (STRATEGIES, RefinementRates(1e-3, 1e-3, 1e-3)),
}


@pytest.mark.parametrize("case", CASES)
def test_steps_end_where_they_end_on_the_cpu(case):
    ends = {}
    for where, place in ON.items():
        with place() as driver:
            run = started(*CASES[case])
            losses = trained(run, 4)  # with a round of density control after the third
            values = {"losses": losses, **run.gaussians.detached().tensors()}
            for group in run.optimizer.param_groups:
                values["v " + group["name"]] = run.optimizer.state[group["params"][0]]["exp_avg_sq"]
            values |= {
                "gradients": run.densify_state.grad_sum,
                "views": run.densify_state.num_views,
            }
            if run.refinement is not None:
                values |= {"viewmats": run.refinement.cameras().viewmats, "support": run.support}
            ends[where] = values
    assert len(ends["cpu"]["means"]) > NUM  # some were cloned
    assert {"search", "project_forward", "rasterize_forward", "ssim_gradient"} <= set(driver.order)
    assert driver.order.count("project_update") == (0 if case == "stage 3 with all" else 4)
    for name, truth in ends["cpu"].items():
        assert ends["gpu"][name].shape == truth.shape, name
        error = oracles.relative_l2(ends["gpu"][name], truth)
        print(f"{case}: {name} {error:.1e}")
        assert error <= 1e-5, name  # measured 2.9e-6


def test_a_loss_that_is_not_a_number_is_named_when_it_is_read(monkeypatch):
    monkeypatch.setattr(training, "HISTORY_EVERY", 3)
    camera, good = rig()[0], pictures()[0]
    with emulated_gpu():
        run = started()
        for target in (good, torch.full_like(good, torch.nan)):
            optimise_view(run, camera, target, ssim_weight=0.2, sh_degree=0)
        assert len(run.unread) == 2
        with pytest.raises(ValueError, match=r"the loss is not finite after step 1 \(view a\)"):
            optimise_view(run, camera, good, ssim_weight=0.2, sh_degree=0)
