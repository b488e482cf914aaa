"""Photos of a lower resolution with exactly the cameras that would have taken them.

Pixels average the area that they cover, as a coarser sensor's would: without that, an eighth of the size shows what the other 63 of 64 pixels were
not asked about. The principal point scales with the picture (`Cameras.scaled`); nothing is centred.
"""

from s2d.images import resize_image
from s2d.views import View, ViewSource


def reduced(view: View, factor: float) -> View:
    """Make a view `factor` times smaller; sizes are rounded to whole pixels and the intrinsics follow the rounded ones."""
    if factor == 1:
        return view
    camera = view.camera.scaled(1 / factor)
    size = (camera.width, camera.height)
    weight = None if view.weight is None else resize_image(view.weight, *size)
    return View(camera, resize_image(view.target, *size), weight)


class Pyramid:
    """Views of one layer's resolution, each made once."""

    def __init__(self, source: ViewSource, factor: float) -> None:
        self._source, self.factor = source, factor
        self._made: dict[tuple[bool, str], View] = {}

    def __call__(self, is_kept: bool, name: str) -> View:
        if self.factor == 1:  # the source knows how much it can hold
            return self._source(is_kept, name)
        key = (is_kept, name)
        if key not in self._made:
            self._made[key] = reduced(self._source(is_kept, name), self.factor)
        return self._made[key]
