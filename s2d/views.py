"""What training steps aim at: views, where they come from, and where they are held."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from s2d.cameras import Cameras
from s2d.checks import check_finite
from s2d.device import to_device


class View(NamedTuple):
    """What one training step aims at."""

    camera: Cameras  # one camera
    target: Tensor  # [H, W, 3] in [0, 1]
    weight: Tensor | None  # [H, W, 1] of the gradient; None is 1


ViewSource = Callable[[bool, str], View]  # (is it a kept view, its name)


def views_on(source: ViewSource, device: torch.device, resident: bool) -> ViewSource:
    """Hand out the views of a source on a device.

    Cameras are moved there once. Pictures are too where they are `resident`; else they are pinned on the host and copied for every step,
    without anyone waiting for it. On the CPU it is the source itself, which knows how much it can hold.
    """
    if device.type == "cpu":
        return source
    held: dict[tuple[bool, str], View] = {}

    def view(is_kept: bool, name: str) -> View:
        if (is_kept, name) not in held:
            camera, *pictures = source(is_kept, name)
            # Here, because training on a GPU does not look at each picture's loss.
            check_finite("target", pictures[0], context=f"(view {name})", hint="Check that photo.")
            held[is_kept, name] = View(
                camera.to(device),
                *(p if p is None else _held(p, device, resident) for p in pictures),
            )
        camera, *pictures = held[is_kept, name]
        return View(camera, *(p if p is None else to_device(p, device) for p in pictures))

    return view


def _held(picture: Tensor, device: torch.device, resident: bool) -> Tensor:
    if resident:
        return to_device(picture, device)
    return picture.pin_memory() if device.type == "cuda" else picture
