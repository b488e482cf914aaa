"""Cameras that are learned with the Gaussians: a small motion of each kept camera, focal lengths, and each photo's exposure.

Notation: C kept cameras with centres c_i and mean centre c. A motion is (w_i, d_i): the camera turns about its own centre by the rotation
vector w_i, in world axes, and its centre moves by L d_i. L is the scene's extent, so that a turn of one thousandth and a shift of one thousandth
change the picture about alike, and one rate serves both.

Gauge: photos do not tell where the world is. Moving all cameras and all Gaussians together, or growing both, changes no picture. To
first order these common motions are w_i = u, d_i = (u x (c_i - c)) / L + v + s (c_i - c) / L for any u, v, s: seven directions among 6 C.
`register_cameras` ties the rig to the points before the first step; afterwards it drifts slowly with the Gaussians, `summary` tells how
far, and whoever renders from cameras of the given frame carries them along (`s2d.scored_cameras`). (Projecting the common motions out after each step
was tried: it moves every camera for the sake of one, and cost 0.4 dB and more: docs/cameras.md.) The mean logarithm of the gains is kept at
zero: brighter photos and darker Gaussians are the same pictures.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.device import to_device
from s2d.files import atomic_write_json
from s2d.gaussians import Checkpoint
from s2d.geometry import invert_rigid, quat_to_rotation, rigid, rotation_angle
from s2d.images import resize_image
from s2d.log import logger, progress
from s2d.losses import photometric_loss
from s2d.optim import decayed_rate
from s2d.rasterize import RawGaussians, rasterize

# Singular values of the common motions below this share of the largest: cameras in one place do not show a change of scale.
NO_MOTION = 1e-6
# Rates of the stages. Radians and scene extents: a pixel or two of a photo of 500. Logarithms.
POSE_RATE, FOCAL_RATE, EXPOSURE_RATE = 3e-3, 1e-3, 1e-3
FINAL_SHARE = 0.01  # of each rate, at the last step
# Registration: rounds over all cameras at a part of the resolution. A camera that is off by 1 degree misses by some pixels, more
# than a detail is wide: coarse pictures first.
REGISTER_ROUNDS = ((4, 15), (2, 15), (1, 15))  # (pixels of the photo per pixel, rounds)
# Radians and scene extents at first: 45 rounds with falling steps reach about 2 degrees.
REGISTER_RATE = 4e-3
MIN_ALPHA = 0.05  # where a picture is fainter, the points do not say what is to be seen


@dataclass(frozen=True)
class RefinementRates:
    """Adam step sizes at the first step; 0 does not learn. They fall to a hundredth at the last step."""

    pose: float = 0.0
    """Turns in radians, shifts of the centres in scene extents."""
    focal: float = 0.0
    """Logarithm of the focal lengths."""
    exposure: float = 0.0
    """Logarithm of the gains."""

    @property
    def any(self) -> bool:
        return max(self.pose, self.focal, self.exposure) > 0

    @staticmethod
    def of_flags(pose: bool, focal: bool, exposure: bool) -> "RefinementRates":
        """The rates that the stages use for what is to be learned."""
        return RefinementRates(POSE_RATE * pose, FOCAL_RATE * focal, EXPOSURE_RATE * exposure)


class RefinedView(NamedTuple):
    """One camera as it is now; what is learned requires grad."""

    viewmat: Tensor  # [4, 4]
    K: Tensor  # [3, 3]
    gain: Tensor | None  # [3] photo = gain x render; None where no gains are in use


class Refinement:
    """Learned corrections of the kept cameras and photos, and their optimiser.

    Focal lengths: one factor for fx and fy per set of given intrinsics, because few photos with small baselines do not tell each
    photo's own from its distance.

    Exposure: one gain per channel. Exposure and white balance multiply linear light, and a gain before a power-law tone curve is a
    gain after it. An offset, which an affine model would add, has no such cause: black stays black; it would learn haze and floaters.
    """

    def __init__(
        self,
        base: Cameras,
        scene_extent: float,
        rates: RefinementRates,
    ) -> None:
        """Start from no correction.

        Args:
            base: The kept cameras; what is learned lives where they are.
            scene_extent: L, world units.
            rates: What is learned and how fast.
        """
        self.base = base
        self.rates = rates
        self.scene_extent = scene_extent
        self._row = {name: row for row, name in enumerate(base.names)}
        lenses = [(size, K.tolist()) for size, K in zip(base.sizes, base.Ks, strict=True)]
        distinct = [lens for row, lens in enumerate(lenses) if lens not in lenses[:row]]
        self._lens = [distinct.index(lens) for lens in lenses]

        def zeros(count: int, width: int, rate: float) -> list[Tensor]:
            return [
                torch.zeros(
                    width, dtype=torch.float64, device=base.viewmats.device, requires_grad=rate > 0
                )
                for _ in range(count)
            ]

        # One tensor per camera: Adam leaves those alone that have no gradient, and counts the steps of each.
        self._motions = zeros(len(base), 6, rates.pose)
        self._log_focals = zeros(len(distinct), 1, rates.focal)
        self._log_gains = zeros(len(base), 3, rates.exposure)
        groups = [
            {"name": name, "params": params} for name, rate, params in self._table() if rate > 0
        ]
        self._optimizer = torch.optim.Adam(groups, lr=0.0) if groups else None
        # Views whose gain is in use though it is not learned: looked up once, because a training step may not ask a GPU.
        self._gained = [False] * len(base)

    def __contains__(self, name: str) -> bool:
        return name in self._row

    def view(self, name: str) -> RefinedView:
        """Return a kept camera as it is now; its gradient goes to what is learned."""
        row = self._row[name]
        viewmat = moved_camera(
            self.base.viewmats[row].double(), self._motions[row], self.scene_extent
        )
        log_focal = self._log_focals[self._lens[row]]
        # exp(0) = 1 off the diagonal: the principal point stays.
        factors = torch.cat([log_focal, log_focal, log_focal.new_zeros(1)]).diag().exp()
        K = self.base.Ks[row].double() * factors
        gain = self._log_gains[row]
        used = gain.requires_grad or self._gained[row]
        return RefinedView(viewmat.float(), K.float(), gain.exp().float() if used else None)

    def view_of(self, camera: Cameras) -> RefinedView | None:
        """A kept camera as it is now, at the resolution of `camera`, which has its name; None where no such camera is learned."""
        name = camera.names[0]
        if name not in self:
            return None
        found = self.view(name)
        width, height = self.base.sizes[self._row[name]]
        if camera.sizes[0] == (width, height):
            return found
        factors = torch.tensor([[camera.width / width], [camera.height / height], [1.0]])
        return found._replace(K=found.K * to_device(factors, found.K.device))

    def step(self, progress: float) -> None:
        """Take the optimiser's step with the gradients that there are, at the rates of this share of the schedule."""
        if self._optimizer is None:
            return
        for group in self._optimizer.param_groups:
            rate = getattr(self.rates, group["name"])
            group["lr"] = decayed_rate(rate, FINAL_SHARE * rate, progress)
        self._optimizer.step()
        self._optimizer.zero_grad()
        if self.rates.exposure > 0:
            with torch.no_grad():
                mean = torch.stack(self._log_gains).mean(0)
                for own in self._log_gains:
                    own.sub_(mean)

    @torch.no_grad()
    def common_motion(self) -> tuple[float, float]:
        """How far all cameras have moved in common from `base`: mean turn in degrees, mean shift in scene extents."""
        basis = common_motions(self.base.to("cpu"), self.scene_extent)
        common = (basis @ (basis.T @ torch.cat(self._motions).cpu())).reshape(-1, 6)
        turned, moved = common[:, :3].norm(dim=1).mean(), common[:, 3:].norm(dim=1).mean()
        return float(torch.rad2deg(turned)), float(moved)

    @torch.no_grad()
    def cameras(self) -> Cameras:
        """The kept cameras as they are now, on the CPU."""
        views = [self.view(name) for name in self.base.names]
        return Cameras(
            torch.stack([view.viewmat for view in views]).cpu(),
            torch.stack([view.K for view in views]).cpu(),
            self.base.sizes,
            self.base.names,
        )

    def gains(self) -> dict[str, list[float]]:
        """The factor from render to photo, R, G, B, of each kept view."""
        return {
            name: gain.detach().exp().tolist()
            for name, gain in zip(self.base.names, self._log_gains, strict=True)
        }

    def summary(self, given: Cameras) -> str:
        """Say how far the cameras are from the given ones, for the log."""
        now = self.cameras()
        turned = torch.rad2deg(
            rotation_angle(now.viewmats[:, :3, :3].double(), given.viewmats[:, :3, :3].double())
        )
        moved = 100 * (now.centers - given.centers).norm(dim=1) / self.scene_extent
        zoomed = (now.Ks[:, 0, 0] / given.Ks[:, 0, 0] - 1).abs()
        gains = torch.stack(self._log_gains).detach().exp()
        common_turn, common_shift = self.common_motion()
        return (
            f"cameras turned by {float(turned.mean()):.3f} degrees (max {float(turned.max()):.3f}) and moved by "
            f"{float(moved.mean()):.3f} % of the scene's extent (max {float(moved.max()):.3f}; last in common by {common_turn:.3f} "
            f"degrees and {100 * common_shift:.3f} %), focal lengths changed by at most "
            f"{100 * float(zoomed.max()):.2f} %, gains {float(gains.min()):.3f} to {float(gains.max()):.3f}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Everything, as text, numbers and tensors."""
        return {
            "base": self.base.to_json(),
            "scene_extent": self.scene_extent,
            "params": {name: [p.detach() for p in params] for name, _, params in self._table()},
            "optimizer": None if self._optimizer is None else self._optimizer.state_dict(),
        }

    @staticmethod
    def from_state(
        state: dict[str, Any],
        rates: RefinementRates,
        with_optimizer: bool,
        device: torch.device | str = "cpu",
    ) -> "Refinement":
        """Go on from a saved state: with its optimiser to the same bits, or with a new one at other rates."""
        base = Cameras.from_json(state["base"]).to(device)
        refinement = Refinement(base, state["scene_extent"], rates)
        refinement._gained = [bool(gain.any()) for gain in state["params"]["exposure"]]
        with torch.no_grad():
            for name, _, params in refinement._table():
                for own, saved in zip(params, state["params"][name], strict=True):
                    own.copy_(saved)
        if with_optimizer and refinement._optimizer is not None:
            refinement._optimizer.load_state_dict(state["optimizer"])
        return refinement

    def _table(self) -> list[tuple[str, float, list[Tensor]]]:
        """Name, rate and tensors of what can be learned."""
        return [
            ("pose", self.rates.pose, self._motions),
            ("focal", self.rates.focal, self._log_focals),
            ("exposure", self.rates.exposure, self._log_gains),
        ]


def start_refinement(
    first: Checkpoint | None,
    given: Cameras,
    rates: RefinementRates,
    device: torch.device | str = "cpu",
) -> Refinement | None:
    """Take over the cameras that a checkpoint's Gaussians belong to, and learn on if asked to.

    Args:
        first: What to go on from; None has no cameras of its own.
        given: The kept cameras as stage 0 has them.
        rates: What is learned from here on.
        device: Where.

    Raises:
        ValueError: The checkpoint's cameras are of other views.
    """
    if first is None:
        return None
    state = (first.run_state or {}).get("refinement")
    if state is None:
        return Refinement(given.to(device), first.scene_extent, rates) if rates.any else None
    refinement = Refinement.from_state(state, rates, with_optimizer=False, device=device)
    if refinement.base.names != given.names:
        raise ValueError(
            f"The start checkpoint has refined cameras of {len(refinement.base)} views (first: {refinement.base.names[0]}). "
            f"Expected the {len(given)} kept views of stage 0. Run stage 1 again, or give another --start-checkpoint."
        )
    return refinement


def register_cameras(
    gaussians: RawGaussians,
    cameras: Cameras,
    photo: Callable[[str], Tensor],
    scene_extent: float,
    rounds: tuple[tuple[int, int], ...] = REGISTER_ROUNDS,
) -> Cameras:
    """Move each camera to where fixed Gaussians look most like its photo, from coarse to fine.

    Args:
        gaussians: As they are, on the device to compute on; not changed.
        cameras: C cameras, not further off than some pixels of the coarsest resolution.
        photo: View name -> [H, W, 3] in [0, 1].
        scene_extent: World units; sets the size of the steps.
        rounds: (pixels of the photo per pixel, rounds over all cameras).

    Returns:
        The moved cameras; one whose full picture fits no better than before stays where it was.
    """
    device = gaussians.means.device
    loose = Refinement(cameras.to(device), scene_extent, RefinementRates(pose=REGISTER_RATE))
    total, done = sum(count for _, count in rounds), 0

    def loss_of(camera: Cameras, viewmat: Tensor, target: Tensor) -> Tensor:
        render = rasterize(gaussians, camera, viewmats=viewmat[None])
        rgb, alpha = render.rgb[0], render.alpha[0]
        # The colour of what is there, however faint: else a camera would come closer to see less of the black behind it.
        colour = rgb / alpha.clamp(min=MIN_ALPHA)
        return photometric_loss(torch.where(alpha > MIN_ALPHA, colour, target), target)

    with progress(total, "cameras to points") as bar:
        for factor, count in rounds:
            small = cameras.scaled(1 / factor)
            targets = [
                (photo(name) if factor == 1 else resize_image(photo(name), *size)).to(device)
                for name, size in zip(small.names, small.sizes, strict=True)
            ]
            for _ in range(count):
                for camera, target in zip(small, targets, strict=True):
                    loss_of(camera, loose.view(camera.names[0]).viewmat, target).backward()
                loose.step(done / total)
                done += 1
                bar.update(done)
    moved = loose.cameras()
    viewmats = []
    with torch.no_grad():
        for before, after in zip(cameras, moved, strict=True):
            target = photo(before.names[0]).to(device)
            losses = [loss_of(c, c.viewmats[0], target) for c in (before, after)]
            viewmats.append((after if losses[1] < losses[0] else before).viewmats[0])
    logger.info("registered to the points: %s", loose.summary(cameras))
    return Cameras(torch.stack(viewmats), cameras.Ks, cameras.sizes, cameras.names)


def moved_camera(
    viewmat: Tensor,  # [4, 4]
    motion: Tensor,  # [6]
    unit: float,
) -> Tensor:
    """Turn a camera about its centre and shift it, both in world axes. [4, 4]

    Args:
        viewmat: World-to-camera.
        motion: Rotation vector w, to first order (the angle is 2 atan(|w| / 2), smooth at zero); then the shift in units. [6]
        unit: World units.
    """
    one = motion.new_ones(1)
    turn = quat_to_rotation(torch.cat([one, 0.5 * motion[:3]]))
    rotation = viewmat[:3, :3] @ turn.mT
    center = invert_rigid(viewmat)[:3, 3] + unit * motion[3:]
    return rigid(rotation, -(rotation @ center))


def common_motions(cameras: Cameras, unit: float) -> Tensor:
    """Orthonormal basis of the motions that all cameras can make together with the scene, to first order. [6 C, at most 7]"""
    centers = invert_rigid(cameras.viewmats.double())[:, :3, 3]
    offsets = (centers - centers.mean(0)) / unit  # [C, 3]
    axes = torch.eye(3, dtype=torch.float64)
    still = torch.zeros_like(offsets)
    columns = [
        torch.cat(
            [axis.expand_as(offsets), torch.linalg.cross(axis.expand_as(offsets), offsets)], 1
        )
        for axis in axes
    ]
    columns += [torch.cat([still, axis.expand_as(offsets)], 1) for axis in axes]
    columns.append(torch.cat([still, offsets], 1))
    basis = torch.stack([column.flatten() for column in columns], 1)  # [6 C, 7]
    left, values, _ = torch.linalg.svd(basis, full_matrices=False)
    return left[:, values > NO_MOTION * values[0]]


def write_refinement(folder: Path, refinement: Refinement | None, given: Cameras) -> Cameras:
    """Write `kept_cameras.json`, the cameras that a stage's Gaussians belong to, and `exposures.json` where gains are in use.

    Returns:
        The cameras that were written: the refined ones, or the given ones where there is no refinement.
    """
    cameras = given
    if refinement is not None:
        cameras = refinement.cameras()
        logger.info("refinement: %s", refinement.summary(given))
        if any(gain != 1.0 for gains in refinement.gains().values() for gain in gains):
            atomic_write_json(folder / "exposures.json", {"format": 1, "gains": refinement.gains()})
    cameras.to_json(folder / "kept_cameras.json")
    return cameras
