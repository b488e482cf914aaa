"""The rasteriser's package as users call it, with tensors on an emulated GPU, and on a real one where there is one, against the kernels for CPUs.

Kernel by kernel the other files here go deeper; this is about what lies between a call and the launches.
"""

import contextlib

import oracles
import pytest
import test_training_view as training
import torch
from diff_gaussian_rasterization import (
    GaussianRasterizationSettings,
    GaussianRasterizer,
    SparseGaussianAdam,
    TrainingView,
    rasterize_gaussians_raw,
)
from diff_gaussian_rasterization._cuda import kernels
from emulated_driver import emulated_gpu

GPUS = ["emulated"] + (["cuda"] if torch.cuda.is_available() else [])


@contextlib.contextmanager
def on(where):
    """The device to put tensors on, and the driver where it is emulated."""
    if where == "emulated":
        with emulated_gpu() as driver:
            yield "cpu", driver
    else:
        yield where, None


RENDER = ["project_forward", "emit_instances_16", "tile_ranges_16", "rasterize_forward"]
BACKWARD = ["rasterize_backward_depth", "project_backward", "finish_cameras"]


def assert_close(value, truth, tolerance):
    """Relative L2; the same zeros where the truth is all zero."""
    assert value.shape == truth.shape and value.dtype == truth.dtype
    assert torch.isfinite(value).all()
    assert oracles.relative_l2(value, truth) <= tolerance


SCENES = {
    "two cameras": {"num_cameras": 2, "num_gaussians": 40},
    "degree 0": {"degree": 0, "num_gaussians": 20, "width": 17, "height": 9},
    "segments": {"num_gaussians": 700, "opacity_logit": (-4.0, 0.5), "width": 16, "height": 16},
}


@pytest.mark.parametrize("name", SCENES)
def test_images_and_all_gradients_through_autograd(name):
    scene = oracles.cast(oracles.make_scene(**SCENES[name]), torch.float32)
    images, grads = {}, {}
    for where in ("cpu", "emulated"):  # test_rasterizer.py does this on a real GPU too
        with on(where) as (_, driver):
            images[where] = rasterize_gaussians_raw(**scene)
            if driver:
                assert driver.order == RENDER
            grads[where] = oracles.gradients(rasterize_gaussians_raw, scene)
            if driver:
                assert driver.order == [*RENDER, *RENDER, *BACKWARD]
    for ours, truth in zip(images["emulated"][:3], images["cpu"][:3], strict=True):
        assert_close(ours, truth, 1e-6)  # measured below it
    assert (images["emulated"].radii - images["cpu"].radii).abs().max() <= 1
    oracles.assert_gradients_close(grads["emulated"], grads["cpu"], 1e-5)  # measured 1.9e-6


@pytest.mark.parametrize("where", GPUS)
def test_rows_of_a_larger_tensor_may_begin_anywhere(where):
    """A vector is read from multiples of 16 bytes alone, which the 180 of a row are not."""
    scene = oracles.cast(oracles.make_scene(num_gaussians=20), torch.float32)
    with on(where) as (device, driver):
        here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in scene.items()}
        parts = {**here}
        for name in oracles.PARAMETERS:
            parts[name] = torch.cat([here[name][:1], here[name]])[1:]
        assert parts["shN"].is_contiguous() and parts["shN"].data_ptr() % 16
        images = [rasterize_gaussians_raw(**one) for one in (here, parts)]
        gradients = [oracles.gradients(rasterize_gaussians_raw, one) for one in (here, parts)]
        if driver:
            for launch in driver.launches:
                if launch.kernel in ("project_forward", "project_backward"):
                    at = [p.name for p in kernels().parameters[launch.kernel]].index("shN")
                    assert launch.arguments[at] % 16 == 0
    for value, truth in zip(*images, strict=True):
        assert torch.equal(value, truth)
    oracles.assert_gradients_close(*gradients, 1e-6)  # the same to the bit where it is emulated


def test_without_gradients_nothing_is_kept_for_them():
    scene = oracles.cast(oracles.make_scene(num_gaussians=20), torch.float32)
    leaf = {**scene, "means": scene["means"].clone().requires_grad_()}
    with emulated_gpu() as driver, torch.no_grad():
        rasterize_gaussians_raw(**leaf)
        assert driver.launches[-1].arguments[-4:] == [None] * 4
    with emulated_gpu() as driver:
        rasterize_gaussians_raw(**leaf)
        assert None not in driver.launches[-1].arguments[-4:]


@pytest.mark.parametrize("gpu", GPUS)
def test_lengths_of_pixels_gradients_by_autograd(gpu):
    scene = oracles.cast(oracles.make_scene(num_gaussians=30, num_cameras=2), torch.float32)
    found = {}
    for where in ("cpu", gpu):
        with on(where) as (device, _):
            here = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in scene.items()}
            probe = torch.zeros(2, 30, device=device, requires_grad=True)
            rasterize_gaussians_raw(**here, lengths_probe=probe).rgb.square().sum().backward()
            found[where] = probe.grad.cpu()
    oracles.assert_gradients_close({"lengths": found[gpu]}, {"lengths": found["cpu"]}, 1e-5)


def test_only_what_is_wanted_is_computed():
    """A loss on the colours alone takes the kernel without depth, and no sums for the cameras."""
    scene = oracles.cast(oracles.make_scene(num_gaussians=20), torch.float32)
    with emulated_gpu() as driver:
        scene["sh0"].requires_grad_()
        rasterize_gaussians_raw(**scene).rgb.sum().backward()
    assert driver.order == [*RENDER, "rasterize_backward", "project_backward"]
    assert driver.launches[-1].arguments[-2:] == [None, None]  # d_means2d, camera_sums


@pytest.mark.parametrize(("n", "c"), [(0, 1), (0, 0), (5, 0)])
def test_nothing_to_draw_is_legal(n, c):
    scene = oracles.cast(oracles.make_scene(num_gaussians=n, num_cameras=max(c, 1)), torch.float32)
    for name in ("viewmats", "Ks", "means2d_probe"):
        scene[name] = scene[name][:c]
    with emulated_gpu():
        out = rasterize_gaussians_raw(**scene)
        grads = oracles.gradients(rasterize_gaussians_raw, scene)
    assert torch.equal(out.rgb, scene["background"].expand(c, scene["height"], scene["width"], 3))
    assert all(not grads[name].any() for name in grads if name != "background")


def test_what_a_user_changes_in_place_is_noticed():
    scene = oracles.cast(oracles.make_scene(num_gaussians=5), torch.float32)
    with emulated_gpu():
        scene["means"].requires_grad_()
        out = rasterize_gaussians_raw(**scene)
        out.rgb.data.zero_()  # hidden from autograd: allowed
        loss = out.rgb.sum()
        with torch.no_grad():
            out.alpha.mul_(2)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            loss.backward()


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    ("camera_learns", "draws", "lengths"),
    [(False, False, False), (True, False, False), (False, True, True)],
)
def test_training_steps_as_on_the_cpu(camera_learns, draws, lengths, gpu):
    """TrainingView and the optimiser: same parameters, moments, statistics and camera gradients after three steps."""
    ends = {}
    for where in ("cpu", gpu):
        with on(where) as (device, driver):
            tensors = training.leaves({k: v.to(device) for k, v in training.scene(60).items()})
            optimizer = training.optimizer_of(tensors)
            statistics = (torch.zeros(60, device=device), torch.zeros(60, device=device))
            cameras = []
            for step in range(3):
                viewmat, K = training.viewmat(step), training.K.clone()
                if camera_learns:
                    cameras += [viewmat.requires_grad_(), K.requires_grad_()]
                drawn = training.drawn_opacity(tensors["opacity_logits"].detach())
                options = {"drawn_opacity": drawn} if draws else {}
                size = (training.WIDTH, training.HEIGHT)
                view = TrainingView(tensors, viewmat, K, *size, **options)
                training.loss_of(view.rgb, view.alpha, view.depth, step).backward()
                counts = {"statistics": statistics, "lengths": lengths}
                view.update(optimizer, opacity_penalty=0.01 * step, **counts)
            if driver:
                steps = ["rasterize_backward_depth" + "_lengths" * lengths, "project_update"]
                steps += ["finish_cameras"] * camera_learns
                assert driver.order == 3 * [*RENDER, *steps]
            end = {
                **{name: tensor.detach() for name, tensor in tensors.items()},
                **{f"v {n}": optimizer.state[t]["exp_avg_sq"] for n, t in tensors.items()},
                "grad_sum": statistics[0],
                "num_views": statistics[1],
                **{f"camera {i}": tensor.grad for i, tensor in enumerate(cameras)},
            }
            ends[where] = {name: tensor.cpu() for name, tensor in end.items()}
    for name, truth in ends["cpu"].items():
        assert_close(ends[gpu][name], truth, 1e-5)  # measured 1.7e-6


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("visible", [None, torch.int32, torch.bool])
def test_the_optimiser_alone(visible, gpu):
    ends = {}
    for where in ("cpu", gpu):
        g = torch.Generator().manual_seed(3)
        with on(where) as (device, _):
            tensors = training.leaves({k: v.to(device) for k, v in training.scene(37).items()})
            optimizer = training.optimizer_of(tensors, bias_correction=False)
            for tensor in tensors.values():
                tensor.grad = torch.randn(tensor.shape, generator=g).to(device)
            seen = None
            if visible is not None:
                seen = (torch.arange(37, device=device) % 3 - 1).clamp(0).to(visible)
            optimizer.step(seen, 37)
            ends[where] = {name: tensor.detach().cpu() for name, tensor in tensors.items()}
    for name, truth in ends["cpu"].items():
        assert_close(ends[gpu][name], truth, 1e-6)  # measured 0
        if visible is not None:
            assert torch.equal(ends[gpu][name][0], training.scene(37)[name][0])


def test_a_tensor_that_a_gpu_could_not_load_at_once_is_refused():
    """Only real GPU tensors are checked for alignment; the check itself is the same code."""
    from diff_gaussian_rasterization import optimizer

    storage = torch.zeros(9, device="meta")
    with (
        emulated_gpu(),
        pytest.MonkeyPatch.context() as patch,
        pytest.raises(ValueError, match=r"must start at a multiple of 16 bytes.*\.clone\(\)"),
    ):
        patch.setattr(optimizer.cuda, "on_gpu", lambda _: True)
        patch.setattr(torch.Tensor, "data_ptr", lambda _: 20)
        optimizer._check("step", "means", storage, (9,), storage.device)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("antialiasing", [None, False, True])
@pytest.mark.parametrize("shapes", ["scales", "covariances"])
def test_the_face_that_3dgs_code_imports(antialiasing, shapes, gpu):
    g = torch.Generator().manual_seed(1)
    made = oracles.cast(oracles.make_scene(num_gaussians=25), torch.float32)
    root = 0.2 * torch.randn(25, 3, 3, generator=g)
    rows, columns = torch.triu_indices(3, 3)
    covars = (root @ root.mT)[:, rows, columns]
    weight = torch.randn(3, 24, 32, generator=g)
    results = {}
    for where in ("cpu", gpu):
        with on(where) as (device, _):
            viewmatrix = made["viewmats"][0].mT.contiguous().to(device)
            flags = {} if antialiasing is None else {"antialiasing": antialiasing}
            settings = GaussianRasterizationSettings(
                24, 32, 0.4, 0.3, made["background"].to(device), 0.9, viewmatrix, viewmatrix, 3, torch.zeros(3, device=device), False, False, **flags
            )  # fmt: skip
            leaves = {
                "means3D": made["means"],
                "means2D": torch.zeros(25, 3),
                "opacities": made["opacity_logits"].sigmoid()[:, None],
                "shs": torch.cat([made["sh0"], made["shN"]], dim=1),
            }
            if shapes == "scales":
                leaves |= {"scales": made["log_scales"].exp(), "rotations": made["quats"]}
            else:
                leaves |= {"cov3D_precomp": covars}
            leaves = {name: t.to(device).clone().requires_grad_() for name, t in leaves.items()}
            colour, radii, *depth = GaussianRasterizer(settings)(**leaves)
            loss = (weight.to(device) * colour).sum() + sum(d.sum() for d in depth)
            grads = torch.autograd.grad(loss, list(leaves.values()))
            found = [colour, *depth, *grads]
            results[where] = [tensor.detach().cpu() for tensor in found]
    for ours, truth in zip(results[gpu], results["cpu"], strict=True):
        assert_close(ours, truth, 1e-5)  # measured 1.8e-6
    assert (radii > 0).any()


def test_a_frame_used_on_another_stream_keeps_its_memory():
    with emulated_gpu() as driver:
        tensors = training.leaves(training.scene(20))
        drawn = training.drawn_opacity(tensors["opacity_logits"].detach())
        camera = (training.viewmat(0), training.K, 32, 24)
        view = TrainingView(tensors, *camera, drawn_opacity=drawn)
        view.rgb.sum().backward()
        driver.stream += 1
        view.update(training.optimizer_of(tensors))
    kept = {tensor.data_ptr() for tensor in driver.recorded}
    used = set(driver.named("rasterize_forward").arguments[5:9])  # background … tile_begin
    assert len(driver.recorded) == 13
    assert used | {tensor.data_ptr() for tensor in drawn} <= kept


def test_optimizer_of_other_devices_is_refused():
    tensors = training.leaves(training.scene(4))
    optimizer = training.optimizer_of(tensors)
    with emulated_gpu(), pytest.raises(ValueError, match="visibility must be bool or int32"):
        for tensor in tensors.values():
            tensor.grad = torch.zeros_like(tensor)
        SparseGaussianAdam.step(optimizer, torch.ones(4, dtype=torch.int32, device="meta"), 4)
