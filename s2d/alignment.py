"""Similarity transforms between two frames of the same cameras: `Sim3`, and `align_cameras`, which finds one.

Notation: a Sim(3) takes a source point to x_target = s R x_source + t. C cameras, P pairs of points. D is the target rig's extent, the
unit of the errors of centres; errors of rotations are in radians while they are fitted, so that one radian weighs as much as D (as in
`Cameras.pose_distances`).

Each camera gives the rotation by itself (R = target rotation⁻¹ · source rotation), two centres or two points give the scale. So two
views are enough, in a line or not; only where all centres coincide (pure rotation) do the cameras say nothing about the scale.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_finite, check_shape
from s2d.geometry import rigid, rotation_angle

ScaleSource = Literal["centres", "points", "depths", "nothing"]

MAX_PAIRS = 500  # of cameras tried for a first guess: all of them up to 32 cameras
MAX_POINTS = 2000  # used in the fit; more cost time and say nothing new
NUM_STEPS = 50  # of Gauss-Newton with weights; 5 to 15 are usual
OUTLIER = 5.0  # times the typical error: a camera beyond this is named
FLOAT32 = 1e-6  # relative rounding error of a centre computed from a float32 viewmat
MAX_SCALE_ERROR = 0.2  # relative: centres that leave more doubt than this do not tell the scale


@dataclass(frozen=True)
class Sim3:
    """x -> s R x + t. float64 inside; results have the type of what is transformed."""

    scale: float
    rotation: Tensor  # [3, 3] float64
    translation: Tensor  # [3] float64

    @staticmethod
    def identity() -> "Sim3":
        return Sim3(1.0, torch.eye(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64))

    def points(self, points: Tensor) -> Tensor:
        """Move points. [..., 3]"""
        moved = self.scale * (points.double() @ self.rotation.T) + self.translation
        return moved.to(points.dtype)

    def cameras(self, cameras: Cameras) -> Cameras:
        """Move cameras with the points: they see the same pixels, at depths `scale` times as large."""
        viewmats = cameras.viewmats.double()
        rotation = viewmats[:, :3, :3] @ self.rotation.T
        shift = self.scale * viewmats[:, :3, 3] - rotation @ self.translation
        return Cameras(rigid(rotation, shift).float(), cameras.Ks, cameras.sizes, cameras.names)

    def depth(self, depth: Tensor) -> Tensor:
        """Change the unit of depths. [...]"""
        return depth * self.scale

    def inverse(self) -> "Sim3":
        rotation = self.rotation.T
        return Sim3(1 / self.scale, rotation, -(rotation @ self.translation) / self.scale)


class Alignment(NamedTuple):
    """A Sim(3) and how well it fits."""

    sim3: Sim3  # source -> target
    scale_from: ScaleSource  # what decided the scale; "nothing": it is 1 and has no meaning
    rotation_errors: Tensor  # [C] degrees
    center_errors: Tensor  # [C] % of the target rig's extent; of the points' distance where all centres coincide
    inliers: Tensor  # [C] bool: cameras that agree with the others
    point_error: (
        float  # median over the pairs of points, % of their distance to the rig; NaN without points
    )

    def summary(self) -> str:
        """One line for the log."""
        turned, moved = self.rotation_errors[self.inliers], self.center_errors[self.inliers]
        text = (
            f"scale {self.sim3.scale:.4g} from {self.scale_from}, {int(self.inliers.sum())} of {len(self.inliers)} cameras agree: "
            f"rotation {float(turned.median()):.2f} (max {float(turned.max()):.2f}) degrees, "
            f"centres {float(moved.median()):.2f} (max {float(moved.max()):.2f}) % of the rig"
        )
        return (
            text
            if self.point_error != self.point_error
            else f"{text}, points {self.point_error:.2f} %"
        )


def align_cameras(
    source: Cameras,
    target: Cameras,
    source_points: Tensor | None = None,  # [P, 3]
    target_points: Tensor | None = None,  # [P, 3]
    depth_ratios: Tensor | None = None,  # [M]
) -> Alignment:
    """Find the Sim(3) that takes one set of cameras to another, from orientations and centres together, robustly.

    First guesses come from single cameras (rotation) and pairs of them (scale), the best one by the sum of all errors is refined by
    Gauss-Newton with Cauchy weights. Up to almost half of the cameras may be wrong. Points, if given, weigh together as much as
    all cameras; their errors count relative to their distance.

    Args:
        source, target: The same cameras in the same order; intrinsics and names are not looked at.
        source_points, target_points: The same points in both frames, wrong pairs among them. [P, 3]
        depth_ratios: Target depth / source depth of the same pixels: fixes the scale where centres and points do not. [M]

    Raises:
        ValueError: no cameras, different numbers of them, or numbers that are not finite.
    """
    data = _prepare(source, target, source_points, target_points)
    scale_from: ScaleSource = "centres"
    guess = _first_guess(data)
    if guess is None or _scale_doubt(data, guess) > MAX_SCALE_ERROR:
        ratios = torch.empty(0) if depth_ratios is None else depth_ratios.double()
        ratios = ratios[ratios.isfinite() & (ratios > 0)]
        if len(data.source_points) >= 2:
            scale_from = "points"
            guess = _guess_from_points(data)
        else:
            scale_from = "depths" if len(ratios) else "nothing"
            scale = float(ratios.log().median().exp()) if len(ratios) else 1.0
            guess = _guess_at_scale(data, scale)
    sim3 = _refine(data, guess, fit_scale=scale_from in ("centres", "points"))
    return _measure(data, sim3, scale_from)


class _Data(NamedTuple):
    rotations: Tensor  # [C, 3, 3] what each camera says R is
    source_centers: Tensor  # [C, 3]
    target_centers: Tensor  # [C, 3]
    source_points: Tensor  # [P, 3]
    target_points: Tensor  # [P, 3]
    distances: Tensor  # [P] of the target points from the rig's middle
    unit: float  # D, or the points' median distance where D is 0


def _prepare(
    source: Cameras, target: Cameras, source_points: Tensor | None, target_points: Tensor | None
) -> _Data:
    if len(source) != len(target) or len(source) == 0:
        raise ValueError(
            f"align_cameras: expected the same cameras twice, got {len(source)} and {len(target)}. Select the common ones by name."
        )
    if (source_points is None) != (target_points is None):
        raise ValueError(
            "align_cameras: source_points and target_points are pairs. Give both or none."
        )
    if source_points is None:
        source_points = target_points = torch.empty(0, 3)
    dims = check_shape("source_points", source_points, ("P", 3))
    check_shape("target_points", target_points, ("P", 3), dims)
    for name, points in (("source_points", source_points), ("target_points", target_points)):
        check_finite(name, points, rows="point")
    step = max(1, -(-len(source_points) // MAX_POINTS))
    source_points, target_points = source_points[::step].double(), target_points[::step].double()
    of_source, of_target = source.viewmats.double(), target.viewmats.double()
    centers = [
        -(viewmats[:, :3, :3].mT @ viewmats[:, :3, 3:])[..., 0]
        for viewmats in (of_source, of_target)
    ]
    rotations = of_target[:, :3, :3].mT @ of_source[:, :3, :3]
    middle = centers[1].mean(0)
    extent = float((centers[1] - middle).norm(dim=-1).max())
    distances = (target_points - middle).norm(dim=-1)
    if extent <= FLOAT32 * float(centers[1].abs().max()) + 1e-12:
        extent = float(distances.median()) if len(distances) else 1.0
    # A point in the middle of the rig would weigh without bound.
    distances = distances.clamp(min=1e-3 * extent)
    return _Data(rotations, *centers, source_points, target_points, distances, extent)


def _middle_rotation(rotations: Tensor) -> Tensor:
    """The one with the smallest sum of angles to the others: an L1 median among the given ones. [3, 3]"""
    return rotations[rotation_angle(rotations[:, None], rotations[None]).sum(1).argmin()]


def _errors(data: _Data, sim3: Sim3) -> tuple[Tensor, Tensor, Tensor]:
    """Radians [C], centres in units [C], points relative to their distance [P]."""
    turned = rotation_angle(data.rotations, sim3.rotation)
    moved = (sim3.points(data.source_centers) - data.target_centers).norm(dim=-1) / data.unit
    points = (sim3.points(data.source_points) - data.target_points).norm(dim=-1) / data.distances
    return turned, moved, points


def _cost(data: _Data, sim3: Sim3) -> float:
    """Sum of errors, each counted as at most 1: what is entirely wrong must not choose among guesses."""
    turned, moved, points = (error.clamp(max=1) for error in _errors(data, sim3))
    of_points = float(points.mean()) * len(turned) if len(points) else 0.0
    return float(turned.sum() + moved.sum()) + of_points


def _first_guess(data: _Data) -> Sim3 | None:
    """The best of many; None where no pair of centres gives a scale."""
    count = len(data.rotations)
    pairs = list(combinations(range(count), 2))
    pairs = pairs[:: max(1, -(-len(pairs) // MAX_PAIRS))]
    rotation = _middle_rotation(data.rotations)
    best, best_cost = None, float("inf")
    for i, j in pairs:
        source = rotation @ (data.source_centers[j] - data.source_centers[i])
        target = data.target_centers[j] - data.target_centers[i]
        length, product = float(source.square().sum()), float(source @ target)
        if length <= 0 or product <= 0:  # the same place twice, or the opposite direction
            continue
        guess = Sim3(
            product / length,
            rotation,
            (
                data.target_centers[[i, j]]
                - product / length * data.source_centers[[i, j]] @ rotation.T
            ).mean(0),
        )
        cost = _cost(data, guess)
        if cost < best_cost:
            best, best_cost = guess, cost
    return best


def _scale_doubt(data: _Data, sim3: Sim3) -> float:
    """Relative standard error of a scale that the centres alone give: their noise over their spread."""
    moved = sim3.scale * (data.source_centers - data.source_centers.median(0).values)
    spread = float(moved.square().sum().sqrt())
    noise = float(_errors(data, sim3)[1].median()) * data.unit
    rounding = FLOAT32 * float(data.target_centers.abs().max() + moved.abs().max())
    rounding += FLOAT32 * sim3.scale * float(data.source_centers.abs().max())
    return max(noise, 3 * rounding) / max(spread, 1e-300)


def _guess_from_points(data: _Data) -> Sim3:
    """Median over pairs of points of the ratio of their lengths; the rotation from the cameras."""
    order = torch.randperm(len(data.source_points), generator=torch.Generator().manual_seed(0))
    source = (data.source_points - data.source_points[order]).norm(dim=-1)
    target = (data.target_points - data.target_points[order]).norm(dim=-1)
    good = (source > 0) & (target > 0)
    ratios = (target[good] / source[good]).log() if bool(good.any()) else torch.zeros(1).double()
    scale = float(ratios.median().exp())
    rotation = _middle_rotation(data.rotations)
    moved = data.target_points - scale * data.source_points @ rotation.T
    return Sim3(scale, rotation, moved.median(0).values)


def _guess_at_scale(data: _Data, scale: float) -> Sim3:
    rotation = _middle_rotation(data.rotations)
    moved = data.target_centers - scale * data.source_centers @ rotation.T
    return Sim3(scale, rotation, moved.median(0).values)


def _rotation_vector(rotation: Tensor) -> Tensor:
    """Axis times angle. [..., 3, 3] -> [..., 3]"""
    skew = rotation - rotation.mT
    axis = torch.stack([skew[..., 2, 1], skew[..., 0, 2], skew[..., 1, 0]], -1)
    sine = axis.norm(dim=-1, keepdim=True)
    angle = rotation_angle(rotation, torch.eye(3, dtype=rotation.dtype))[..., None]
    # angle / |axis| -> 1/2 at no turn. At a half turn the axis vanishes: such a camera is an outlier, its weight about 0.
    return axis * torch.where(sine > 1e-9, angle / sine.clamp(min=1e-9), 0.5)


def _cross(vectors: Tensor) -> Tensor:
    """Matrices with [v]x w = v x w. [..., 3] -> [..., 3, 3]"""
    x, y, z = vectors.unbind(-1)
    zero = torch.zeros_like(x)
    rows = [[zero, -z, y], [z, zero, -x], [-y, x, zero]]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def _weights(errors: Tensor, share: float) -> Tensor:
    """Cauchy weights whose width is the typical error; they sum to at most `share`. [K]"""
    if len(errors) == 0:
        return errors
    width = (1.4826 * errors.median()).clamp(min=1e-9)
    return share / len(errors) / (1 + (errors / (2 * width)).square())


def _refine(data: _Data, sim3: Sim3, fit_scale: bool) -> Sim3:
    """Gauss-Newton on the turn, the shift and the logarithm of the scale, with weights from the errors before each step.

    A step is halved until it does not raise the weighted cost.
    """
    count = len(data.rotations)
    identity = torch.eye(3, dtype=torch.float64)
    for _ in range(NUM_STEPS):
        turned, moved, points = _errors(data, sim3)
        # A camera is right or wrong as a whole: where its orientation is off its centre is not to be trusted either.
        of_camera = _weights((turned.square() + moved.square()).sqrt(), count)
        weights = torch.cat([of_camera, of_camera, _weights(points, count)])

        def residuals(at: Sim3) -> Tensor:
            turn = _rotation_vector(data.rotations @ at.rotation.T)
            shift = (data.target_centers - at.points(data.source_centers)) / data.unit
            miss = (data.target_points - at.points(data.source_points)) / data.distances[:, None]
            return torch.cat([turn, shift, miss])  # [2 C + P, 3]

        scales = torch.cat([torch.full((count,), data.unit).double(), data.distances])[
            :, None, None
        ]
        placed = sim3.scale * torch.cat([data.source_centers, data.source_points]) @ sim3.rotation.T
        # d residual / d (turn, shift in units, log scale), with the sign turned: the step solves J step = residual.
        of_position = torch.cat(
            [
                -_cross(placed) / scales,
                identity * data.unit / scales,
                placed[..., None] / scales,
            ],
            -1,
        )
        of_turn = torch.cat([identity, torch.zeros(3, 4, dtype=torch.float64)], -1)
        jacobian = torch.cat([of_turn.expand(count, 3, 7), of_position])
        if not fit_scale:
            jacobian = jacobian[..., :6]
        now = residuals(sim3)
        root = weights.sqrt()[:, None, None]
        # Minimum norm: what nothing determines stays as it is.
        step = torch.linalg.lstsq(
            (root * jacobian).flatten(0, 1), (root[..., 0] * now).flatten()[:, None], driver="gelsd"
        ).solution[:, 0]
        before = float((weights * now.square().sum(-1)).sum())
        taken = None
        for halving in range(8):
            trial = _stepped(sim3, step * 0.5**halving, data.unit)
            if float((weights * residuals(trial).square().sum(-1)).sum()) <= before:
                taken = trial
                break
        if taken is None:
            break
        sim3 = taken
        if float(step.norm()) < 1e-12:
            break
    return sim3


def _stepped(sim3: Sim3, step: Tensor, unit: float) -> Sim3:
    turn = torch.linalg.matrix_exp(_cross(step[:3]))
    factor = float(step[6].exp()) if len(step) == 7 else 1.0
    u, _, vh = torch.linalg.svd(turn @ sim3.rotation)  # rounding must not add up over the steps
    return Sim3(sim3.scale * factor, u @ vh, sim3.translation + step[3:6] * unit)


def _measure(data: _Data, sim3: Sim3, scale_from: ScaleSource) -> Alignment:
    turned, moved, points = _errors(data, sim3)
    errors = (turned.square() + moved.square()).sqrt()
    inliers = errors <= max(OUTLIER * 1.4826 * float(errors.median()), 1e-4)
    point_error = float(points.median()) * 100 if len(points) else float("nan")
    degrees = torch.rad2deg(turned)
    return Alignment(sim3, scale_from, degrees, moved * 100, inliers, point_error)
