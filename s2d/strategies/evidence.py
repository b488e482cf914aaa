"""What strategies may know beside the view of a step: the kept photos, their cameras, stage 0's points and its depth of the photos, and the novel cameras."""

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.scene import Scene

# Name of a kept view -> its depth [H, W] and confidence [H, W], as `s2d.depth_io.read_depth` returns them.
ReadDepth = Callable[[str], tuple[Tensor, Tensor]]


class Evidence:
    """The kept views of a run."""

    def __init__(
        self,
        kept: Scene,
        points: Tensor,  # [P, 3]
        read_depth: ReadDepth,
        device: torch.device | str = "cpu",
        novel: Cameras | None = None,
    ) -> None:
        self.kept = kept
        self.novel = novel
        self.points = points
        self._read_depth = read_depth
        self.device = device
        self._names = set(kept.cameras.names)

    def __contains__(self, name: str) -> bool:
        """Whether this is a kept view."""
        return name in self._names

    def photos(self) -> list[tuple[Cameras, Tensor]]:
        """Camera and photo [H, W, 3] of each kept view."""
        return [(camera, self.kept.image(camera.names[0])) for camera in self.kept.cameras]

    @cached_property
    def depths(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Depth [H, W] (camera z, <= 0: none) and confidence [H, W] in [0, 1] of each kept view, by name, on the device.

        Raises:
            FileNotFoundError: stage 0 has written none for a view.
            ValueError: a file is damaged, or of another size than the photo.
        """
        return {camera.names[0]: self._depth(camera) for camera in self.kept.cameras}

    def known_depths(self) -> dict[str, tuple[Tensor, Tensor]]:
        """The same of those kept views that stage 0 has written one for, on the CPU."""
        known = {}
        for camera in self.kept.cameras:
            with suppress(FileNotFoundError):
                known[camera.names[0]] = tuple(part.cpu() for part in self._depth(camera))
        return known

    def _depth(self, camera: Cameras) -> tuple[Tensor, Tensor]:
        name = camera.names[0]
        depth, confidence = self._read_depth(name)
        if depth.shape != (camera.height, camera.width):
            raise ValueError(
                f"Stage 0's depth of {name} is {depth.shape[1]}x{depth.shape[0]}. Expected {camera.width}x{camera.height}, the size of the photo. Run stage 0 "
                "again with --overwrite."
            )
        return depth.to(self.device), confidence.to(self.device)
