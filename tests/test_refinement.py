"""Cameras that are learned: their motions, the gauge, focal lengths, gains, what is saved, and that they find their way back."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from tiny_scene import build_tiny_scene

import stage1_3dgs_init
from s2d.alignment import Sim3
from s2d.cameras import Cameras
from s2d.gaussians import Checkpoint, Gaussians, gaussians_from_points, load_checkpoint
from s2d.geometry import invert_rigid, look_at, quat_to_rotation, rigid, rotation_angle
from s2d.optim import LearningRates
from s2d.ply_io import write_points_ply
from s2d.rasterize import rasterize
from s2d.refinement import (
    Refinement,
    RefinementRates,
    common_motions,
    moved_camera,
    register_cameras,
    start_refinement,
    write_refinement,
)
from s2d.sampling import ViewSampler
from s2d.saved_runs import load_run, save_run
from s2d.scene import load_scene
from s2d.scored_cameras import carried_cameras, load_truth
from s2d.scoring import Run
from s2d.split import Split
from s2d.stage_io import open_stage
from s2d.training import optimise_view, refine_cameras, start_run
from tools import evaluate

F64 = torch.float64
ALL = RefinementRates(pose=1e-3, focal=1e-3, exposure=1e-3)
SIZE = (48, 36)


def rig(count=5) -> Cameras:
    """Cameras on an arc that look at the origin; the last has a lens of its own."""
    angle = torch.linspace(-0.5, 0.5, count, dtype=F64)
    centers = torch.stack([4 * angle.sin(), 0.3 * (3 * angle).cos(), -4 * angle.cos()], -1)
    viewmats = look_at(
        centers, torch.zeros(count, 3).double(), torch.tensor([0.0, -1.0, 0.0]).double()
    )
    Ks = torch.tensor([[45.0, 0, 24], [0, 44, 18], [0, 0, 1]]).repeat(count, 1, 1)
    Ks[-1, 0, 0] = 50
    return Cameras(viewmats.float(), Ks, (SIZE,) * count, tuple(f"v{i}" for i in range(count)))


def random_motions(count: int, degrees: float, shift: float, seed=0) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    parts = torch.randn(count, 2, 3, generator=g, dtype=F64)
    parts = parts / parts.norm(dim=-1, keepdim=True)
    return torch.cat([math.radians(degrees) * parts[:, 0], shift * parts[:, 1]], 1)


def moved(cameras: Cameras, motions: torch.Tensor, unit=1.0) -> Cameras:
    viewmats = [
        moved_camera(v.double(), m, unit) for v, m in zip(cameras.viewmats, motions, strict=True)
    ]
    return Cameras(torch.stack(viewmats).float(), cameras.Ks, cameras.sizes, cameras.names)


def blobs(num=400, seed=1) -> Gaussians:
    g = torch.Generator().manual_seed(seed)
    points = torch.randn(num, 3, generator=g) * torch.tensor([1.0, 0.8, 0.5])
    gaussians = gaussians_from_points(points, torch.rand(num, 3, generator=g), 1, 0.8)
    return gaussians


def pixel_errors(cameras: Cameras, truth: Cameras) -> torch.Tensor:
    """How far points of the scene are from where they should be seen. [C]"""
    points = blobs().means

    def seen(these: Cameras) -> torch.Tensor:
        local = torch.einsum("cij,pj->cpi", these.viewmats[:, :3, :3], points)
        local = local + these.viewmats[:, None, :3, 3]
        return torch.einsum("cij,cpj->cpi", these.Ks, local / local[..., 2:])[..., :2]

    return (seen(cameras) - seen(truth)).norm(dim=-1).mean(1)


# ------------------------------------------------------------------------------------------------------ motions and gauge


def test_a_motion_turns_about_the_centre_and_shifts_it():
    rotation = quat_to_rotation(torch.tensor([0.9, 0.2, -0.4, 0.1], dtype=F64))
    viewmat = rigid(rotation, torch.tensor([0.3, -0.2, 4.0], dtype=F64))
    motion = torch.tensor([0.01, -0.02, 0.005, 0.3, 0.1, -0.2], dtype=F64)
    out = moved_camera(viewmat, motion, 2.0)
    center, before = invert_rigid(out)[:3, 3], invert_rigid(viewmat)[:3, 3]
    assert torch.allclose(center - before, 2.0 * motion[3:], atol=1e-12)
    assert torch.allclose(out[:3, :3] @ out[:3, :3].T, torch.eye(3, dtype=F64), atol=1e-12)
    # The angle is 2 atan(|w| / 2), the axis w in the world.
    turn = out[:3, :3].T @ viewmat[:3, :3]
    angle = rotation_angle(turn, torch.eye(3, dtype=F64))
    assert float(angle) == pytest.approx(2 * math.atan(float(motion[:3].norm()) / 2), abs=1e-9)
    assert torch.allclose(turn @ motion[:3], motion[:3], atol=1e-12)


def test_gradient_of_a_motion_equals_central_differences():
    viewmat = rig().viewmats[2].double()
    for motion in (torch.zeros(6, dtype=F64), random_motions(1, 20.0, 0.3)[0]):
        assert torch.autograd.gradcheck(
            lambda m: moved_camera(viewmat, m, 1.7), motion.requires_grad_()
        )


@pytest.mark.parametrize("kind", ["turn", "shift", "growth"])
def test_common_motions_are_those_of_a_moved_world(kind):
    """Move the world by a little, read off what each camera did, and find that the basis holds it up to second order."""
    cameras, unit, size = rig(), 3.0, 1e-4
    g = torch.Generator().manual_seed(3)
    w, v = torch.randn(2, 3, generator=g, dtype=F64)
    cross = torch.tensor([[0, -w[2], w[1]], [w[2], 0, -w[0]], [-w[1], w[0], 0]], dtype=F64)
    turn = torch.linalg.matrix_exp(size * cross) if kind == "turn" else torch.eye(3, dtype=F64)
    shift = size * v if kind == "shift" else torch.zeros(3, dtype=F64)
    growth = 1 + size if kind == "growth" else 1.0
    world_from_cam = invert_rigid(cameras.viewmats.double())
    after = growth * world_from_cam[:, :3, 3] @ turn.T + shift
    shifts = (after - world_from_cam[:, :3, 3]) / unit
    turns = size * w.expand(len(cameras), 3) if kind == "turn" else torch.zeros_like(shifts)
    motions = torch.cat([turns, shifts], 1).flatten()
    basis = common_motions(cameras, unit)
    assert basis.shape == (30, 7)
    rest = motions - basis @ (basis.T @ motions)
    assert float(rest.norm() / motions.norm()) < 5 * size  # measured at most 1e-4


def test_cameras_in_one_place_have_no_common_growth():
    cameras = rig()
    viewmats = cameras.viewmats.double().clone()
    viewmats[:, :3, 3] = -(viewmats[:, :3, :3] @ torch.tensor([1.0, 2.0, 3.0], dtype=F64)[:, None])[
        ..., 0
    ]
    same_place = Cameras(viewmats.float(), cameras.Ks, cameras.sizes, cameras.names)
    assert common_motions(same_place, 1.0).shape == (30, 6)


def noisy_steps(refinement: Refinement, steps: range, last: int):
    """Steps whose gradients are functions of the step alone."""
    for step in steps:
        name = refinement.base.names[step % 5]
        g = torch.Generator().manual_seed(step)
        view = refinement.view(name)
        parts = [view.viewmat, view.K, *([] if view.gain is None else [view.gain])]
        sum((torch.randn(x.shape, generator=g) * x).sum() for x in parts).backward()
        refinement.step(step / last)


def test_the_mean_gain_stays_and_the_common_motion_is_told():
    refinement = Refinement(rig(), 3.0, ALL)
    assert refinement.common_motion() == (0.0, 0.0)
    noisy_steps(refinement, range(30), 30)
    gains = torch.tensor(list(refinement.gains().values()), dtype=F64)
    assert float((gains - 1).abs().max()) > 1e-3
    assert float(gains.log().mean(0).abs().max()) < 1e-12
    turned, moved_by = refinement.common_motion()
    assert 0 < turned < 2
    assert 0 < moved_by < 0.03
    assert f"{turned:.3f} degrees and {100 * moved_by:.3f} %" in refinement.summary(rig())


def test_photos_of_one_lens_share_its_focal_length_and_keep_the_middle():
    refinement = Refinement(rig(), 3.0, RefinementRates(focal=1e-2))
    noisy_steps(refinement, range(4), 10)  # the fifth camera, with the other lens, had no gradient
    Ks, given = refinement.cameras().Ks, rig().Ks
    factor = Ks[:, 0, 0] / given[:, 0, 0]
    assert float((factor[:4] - 1).abs().min()) > 1e-3
    assert torch.allclose(factor[:4], factor[0].expand(4))
    assert torch.allclose(Ks[:, 1, 1] / given[:, 1, 1], factor)
    assert torch.equal(Ks[4], given[4])
    assert torch.equal(Ks[..., 2], given[..., 2])
    # float32 of the same numbers, recomposed in float64
    assert torch.allclose(refinement.cameras().viewmats, rig().viewmats, atol=1e-6)


def test_a_saved_refinement_goes_on_with_the_same_bits(tmp_path):
    whole = Refinement(rig(), 3.0, ALL)
    noisy_steps(whole, range(12), 20)
    half = Refinement(rig(), 3.0, ALL)
    noisy_steps(half, range(6), 20)
    torch.save(half.state_dict(), tmp_path / "half.pth")
    state = torch.load(tmp_path / "half.pth", weights_only=True)
    resumed = Refinement.from_state(state, ALL, with_optimizer=True)
    noisy_steps(resumed, range(6, 12), 20)
    assert torch.equal(resumed.cameras().viewmats, whole.cameras().viewmats)
    assert torch.equal(resumed.cameras().Ks, whole.cameras().Ks)
    assert resumed.gains() == whole.gains()
    # Taken over by a run that does not learn them: they stay.
    still = Refinement.from_state(state, RefinementRates(), with_optimizer=False)
    before = still.cameras()
    still.step(0.0)
    assert torch.equal(still.cameras().viewmats, before.viewmats)
    assert not still.view("v0").viewmat.requires_grad
    assert still.view("v0").gain is not None


# -------------------------------------------------------------------------------------------------------- finding the way back


def test_registration_finds_the_cameras_of_a_known_scene():
    truth, gaussians = rig(), blobs()
    with torch.no_grad():
        photos = {c.names[0]: rasterize(gaussians, c).rgb[0] for c in truth}
    start = moved(truth, random_motions(5, 2.0, 0.03))
    found = register_cameras(gaussians, start, photos.__getitem__, 3.0, ((2, 25), (1, 35)))
    before, after = pixel_errors(start, truth), pixel_errors(found, truth)
    assert float(before.mean()) > 1.0
    assert float(after.mean()) < 0.3 * float(before.mean()), (
        after
    )  # measured 0.18, blobs of 5 pixels
    # From the truth nothing can be won, so that no camera is moved.
    stays = register_cameras(gaussians, truth, photos.__getitem__, 3.0, ((1, 2),))
    assert torch.equal(stays.viewmats, truth.viewmats)


def training(refinement: Refinement | None, seed=0):
    sampler = ViewSampler(rig().names, seed=seed)
    return start_run(blobs(), LearningRates(), 3.0, sampler, seed, refinement=refinement)


def train(run, photos, steps: range, last: int, sh_degree=1):
    for step in steps:
        _, name = run.sampler.draw()
        optimise_view(run, rig().select([name]), photos[name], ssim_weight=0.2, sh_degree=sh_degree)
        refine_cameras(run, step / last)


def test_training_learns_cameras_and_gains():
    """Without view-dependent colours, which can say of five views what gains say."""
    truth = rig()
    gains = torch.tensor([0.8, 0.9, 1.0, 1.1, 1.2])
    gains = gains / gains.log().mean().exp()
    with torch.no_grad():
        photos = {
            c.names[0]: rasterize(blobs(), c).rgb[0] * gain
            for c, gain in zip(truth, gains, strict=True)
        }
    motions = random_motions(5, 3.0, 0.03)
    basis = common_motions(truth, 1.0)
    motions = (motions.flatten() - basis @ (basis.T @ motions.flatten())).reshape(5, 6)
    start = moved(truth, motions)
    rates = RefinementRates(pose=1e-2, exposure=1e-2)
    run = training(Refinement(start, 3.0, rates))
    train(run, photos, range(200), 200, sh_degree=0)
    before = pixel_errors(start, truth).mean()
    after = pixel_errors(run.refinement.cameras(), truth).mean()
    assert float(after) < 0.6 * float(before), (before, after)
    learned = torch.tensor([run.refinement.gains()[name] for name in truth.names])
    left = (learned.mean(1) / gains).log().abs().max()
    # Measured 0.60: what one or two views see takes on their brightness itself.
    assert float(left) < 0.75 * float(gains.log().abs().max()), learned


def test_an_interrupted_run_goes_on_with_the_same_bits(tmp_path):
    photos = {
        c.names[0]: rasterize(blobs(seed=2), c).rgb[0].detach() for c in rig()
    }  # another scene: everything has to move
    whole = training(Refinement(rig(), 3.0, ALL))
    train(whole, photos, range(12), 12)
    first = training(Refinement(rig(), 3.0, ALL))
    train(first, photos, range(5), 12)
    save_run(first, tmp_path / "run.pth")
    rest = load_run(tmp_path / "run.pth", LearningRates(), ViewSampler(rig().names, seed=0), ALL)
    train(rest, photos, range(5, 12), 12)
    assert torch.equal(rest.refinement.cameras().viewmats, whole.refinement.cameras().viewmats)
    assert torch.equal(rest.refinement.cameras().Ks, whole.refinement.cameras().Ks)
    assert rest.refinement.gains() == whole.refinement.gains()
    for name, tensor in whole.gaussians.tensors().items():
        assert torch.equal(tensor, rest.gaussians.tensors()[name]), name


def test_views_that_are_not_refined_are_rendered_as_given():
    """A refinement that knows other views changes no bit."""
    photos = {c.names[0]: torch.full((36, 48, 3), 0.5) for c in rig()}
    other = rig().renamed([f"other{i}" for i in range(5)])
    runs = training(None), training(Refinement(other, 3.0, ALL))
    for run in runs:
        train(run, photos, range(4), 4)
    assert torch.equal(runs[0].gaussians.means, runs[1].gaussians.means)


# ------------------------------------------------------------------------------------------------- what stages and evaluation do


def test_what_a_stage_writes(tmp_path):
    assert write_refinement(tmp_path, None, rig()) is not None
    kept = Cameras.from_json(tmp_path / "kept_cameras.json")
    assert torch.equal(kept.viewmats, rig().viewmats)
    assert not (tmp_path / "exposures.json").exists()
    refinement = Refinement(rig(), 3.0, ALL)
    noisy_steps(refinement, range(6), 6)
    written = write_refinement(tmp_path, refinement, rig())
    kept = Cameras.from_json(tmp_path / "kept_cameras.json")
    assert torch.equal(kept.viewmats, written.viewmats)
    assert torch.equal(kept.viewmats, refinement.cameras().viewmats)
    exposures = json.loads((tmp_path / "exposures.json").read_text())
    assert exposures["gains"] == refinement.gains()


def test_stage_3_takes_over_the_cameras_of_its_start():
    refinement = Refinement(rig(), 3.0, ALL)
    noisy_steps(refinement, range(6), 6)
    first = Checkpoint(blobs(), 10, 3.0, None, {"refinement": refinement.state_dict()})
    for rates in (RefinementRates(), ALL):
        taken = start_refinement(first, rig(), rates)
        assert torch.equal(taken.cameras().viewmats, refinement.cameras().viewmats)
    with pytest.raises(ValueError, match="Expected the 3 kept views of stage 0"):
        start_refinement(first, rig()[:3], ALL)
    bare = Checkpoint(blobs(), 10, 3.0)  # of 3DGS
    assert start_refinement(bare, rig(), RefinementRates()) is None
    taken = start_refinement(bare, rig(), ALL)
    assert torch.allclose(taken.cameras().viewmats, rig().viewmats, atol=1e-6)


def test_test_cameras_are_carried_along():
    cameras = rig(7)
    g = torch.Generator().manual_seed(5)
    points = torch.randn(20, 3, generator=g)
    angle, scale, shift = 0.7, 2.5, torch.tensor([3.0, -1.0, 2.0])
    turn = torch.tensor(
        [[math.cos(angle), 0, math.sin(angle)], [0, 1, 0], [-math.sin(angle), 0, math.cos(angle)]]
    )
    rotation = cameras.viewmats[:, :3, :3] @ turn.T
    elsewhere = Cameras(
        rigid(rotation, scale * cameras.viewmats[:, :3, 3] - rotation @ shift),
        cameras.Ks * torch.tensor([[1.1, 1, 1], [1, 1.1, 1], [1, 1, 1]]),
        cameras.sizes,
        cameras.names,
    )
    kept = ["v0", "v2", "v4", "v6"]
    carried, fit = carried_cameras(cameras.select(["v1", "v3"]), cameras, elsewhere.select(kept))
    expected = elsewhere.select(["v1", "v3"])
    there = scale * points @ turn.T + shift

    def seen(these: Cameras) -> torch.Tensor:
        local = torch.einsum("cij,pj->cpi", these.viewmats[:, :3, :3], there)
        local = local + these.viewmats[:, None, :3, 3]
        return torch.einsum("cij,cpj->cpi", these.Ks, local / local[..., 2:])[..., :2]

    # Pixels; measured 2e-4, float32.
    assert torch.allclose(seen(carried), seen(expected), atol=2e-3)
    assert "4 of 4 cameras agree" in fit
    test = cameras.select(["v1"])
    assert carried_cameras(test, cameras, cameras.select(kept)) == (test, None)


def test_the_evaluation_follows_each_stages_own_cameras(tiny_scene, tmp_path):
    scene = load_scene(tiny_scene)
    split = Split("eval", scene.names[1:], (), scene.names[:1])
    kept = scene.cameras.select(split.kept)
    manifests = {name: SimpleNamespace(dir=tmp_path / name) for name in ("stage0", "stage1")}
    run = Run(tmp_path, manifests, split, scene, kept, kept[:0])
    test = scene.cameras.select(split.test)
    assert torch.equal(evaluate.test_cameras(run, "stage0").viewmats, test.viewmats)
    (tmp_path / "stage1").mkdir()
    shifted = Sim3(2.0, torch.eye(3, dtype=F64), torch.tensor([1.0, 0, 0], dtype=F64))
    shifted.cameras(kept).to_json(tmp_path / "stage1/kept_cameras.json")
    carried = evaluate.test_cameras(run, "stage1")
    # A camera's centre c goes to 2 c + (1, 0, 0); float32
    expected = 2 * test.centers + torch.tensor([1.0, 0, 0])
    assert torch.allclose(carried.centers, expected, atol=1e-4)
    assert list(run.placements) == ["stage1"]
    assert "7 of 7 cameras agree" in run.placements["stage1"]


def test_a_truth_is_matched_by_name_without_suffix(tmp_path):
    scene = build_tiny_scene(tmp_path / "scene")
    split = Split("eval", ("view_0.jpg", "view_3.jpg"), (), ())
    truth, found = load_truth(scene, split)
    assert {"view_0.jpg", "view_3.jpg", "view_1.png"} < set(truth.names)
    assert truth.image("view_3.jpg").shape == load_scene(scene).image("view_3.png").shape
    assert len(found.test) == 6
    assert not set(found.test) & set(split.kept)
    with pytest.raises(ValueError, match=r"1 of the run's views are not in .* \(first: gone.png\)"):
        load_truth(scene, Split("eval", ("view_0.png", "gone.png"), (), ()))


def test_stage_1_with_everything_learned(tmp_path, tiny_scene):
    """The real script, from stage 0's files made here; 12 steps show that the parts fit together."""
    scene = load_scene(tiny_scene)
    kept = scene.names[::2]
    out = tmp_path / "out"
    g = torch.Generator().manual_seed(0)
    with open_stage(out, "stage0", RefinementRates(), {}) as stage:
        Split("s2d", kept, (), ()).save(stage.dir / "split.json")
        scene.cameras.select(scene.names[1:2]).to_json(stage.dir / "novel_cameras.json")
        points = torch.randn(300, 3, generator=g)
        write_points_ply(stage.dir / "points.ply", points, torch.rand(300, 3, generator=g))
    cfg = stage1_3dgs_init.Config(
        source=tiny_scene,
        model_dir=out,
        sample_iteration=12,
        optim_pose=True,
        optim_focal=True,
        optim_exposure=True,
    )
    stage1_3dgs_init.main(cfg)
    written = Cameras.from_json(out / "stage1/kept_cameras.json")
    assert written.names == kept
    saved = load_checkpoint(out / "chkpnt_stage1_12.pth").run_state["refinement"]
    state = Refinement.from_state(saved, RefinementRates(), with_optimizer=False)
    assert torch.equal(state.cameras().viewmats, written.viewmats)
    assert not torch.equal(written.viewmats, scene.cameras.select(kept).viewmats)
    viewer = json.loads((out / "cameras.json").read_text())
    assert viewer[0]["position"] == pytest.approx(written.centers[0].tolist(), abs=1e-5)
