"""Isolation: what stands alone, far from every surface that stage 0 knows or guesses, goes.

What one photo alone shows may be explained at any depth, and a few Gaussians in the open do it as well as a wall behind them. From elsewhere they are haze, curtains
and leaves in the air. Stage 0's points and the smooth continuation of its depth (`s2d.completion`) say for every pixel of every kept photo about where its surface is:
Gaussians may leave it by a share of their distance from the camera, not more. Floaters by visibility (`floaters.py`) need two photos that contradict each other; these are
seen by one only.
"""

from collections.abc import Mapping

import torch
from scipy.spatial import KDTree
from torch import Tensor

from s2d.completion import MIN_KNOWN, hole_points
from s2d.gaussians import Gaussians
from s2d.geometry import in_picture, project
from s2d.scene import Scene

MOST_POINTS = 50_000  # far denser than a share of the distance to the camera has to be
SEARCH_ERROR = 0.5  # relative, of the nearest distance at most: exact search takes ten times as long, and finds nearly the same


class Surfaces:
    """Where surfaces are, as far as it is known or guessed."""

    def __init__(
        self,
        kept: Scene,
        points: Tensor,  # [P, 3]
        depths: Mapping[str, tuple[Tensor, Tensor]],
    ) -> None:
        """Gather the points.

        Args:
            kept: The kept views alone.
            points: Of stage 0, world. [P, 3]
            depths: Depth [H, W] (camera z, <= 0: none) and its confidence [H, W] of kept views, by name, as far as there are any.
        """
        guessed, _ = hole_points(kept, depths if len(depths) == len(kept) else {})
        surfaces = torch.cat([points.cpu(), guessed])
        self.tree = KDTree(surfaces[:: -(-len(surfaces) // MOST_POINTS)].numpy())
        self.centers = kept.cameras.centers.cpu()
        # Without depth there is no guess of what they show beside the points.
        self.blind = [
            camera
            for camera in kept.cameras
            if camera.names[0] not in depths
            or int((depths[camera.names[0]][0] > 0).sum()) < MIN_KNOWN
        ]

    @torch.no_grad()
    def isolated(self, gaussians: Gaussians, share: float) -> Tensor:
        """Find the Gaussians farther from all surfaces than a share of the distance to the nearest kept camera.

        Args:
            gaussians: N Gaussians.
            share: > 0.

        Returns:
            True where isolated, and not in the picture of a photo that stage 0 has no depth of. [N] bool
        """
        means = gaussians.means.cpu().nan_to_num()  # training names what is no number itself
        distances = torch.from_numpy(self.tree.query(means.numpy(), eps=SEARCH_ERROR)[0])
        found = distances > share * torch.cdist(means, self.centers).amin(1)
        for camera in self.blind:
            xy, z = project(means, camera.Ks[0], camera.viewmats[0])
            found &= ~in_picture(xy, z, camera.sizes[0])
        return found.to(gaussians.means.device)
