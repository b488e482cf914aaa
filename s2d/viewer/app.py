"""The viewer: Gaussians in the browser (viser), cameras with their photos, levels, and the fixer's pictures before and after."""

import logging
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from s2d.gaussians import Gaussians
from s2d.geometry import invert_rigid, quat_to_rotation, rotation_to_quat, up_axis
from s2d.images import read_image, resize_image
from s2d.scene import Scene
from s2d.sh import sh0_to_rgb
from s2d.strategies.support import LEVELS, support_colours
from s2d.viewer.folder import NEWEST, ModelFolder

if TYPE_CHECKING:
    import viser

logger = logging.getLogger("s2d.viewer")

KEPT_COLOUR, NOVEL_COLOUR = (40, 120, 255), (160, 160, 160)
THUMBNAIL_WIDTH, PICTURE_WIDTH = 160, 480  # photos in the scene, pictures in the panel
MAX_GAUSSIANS = 400_000  # what a browser sorts smoothly; of more, those that cover most are sent
PHOTO, SUPPORT = "as photographed", "by support"
LEGEND = "  \n".join(
    f'<span style="color: rgb({", ".join(f"{255 * c:.0f}" for c in colour)})">■</span> {name}'
    for name, colour in LEVELS
)
NO_PICTURE = np.zeros((2, 2, 3), np.uint8)


class Viewer:
    """One model folder in one viser server. Call `refresh` now and then: it sends what has changed in the folder."""

    def __init__(self, folder: ModelFolder, host: str, port: int, photos: Scene | None = None):
        """Start the server; ValueError where viser is not installed."""
        try:
            import viser
        except ImportError as error:
            raise ValueError(
                f"The viewer needs viser ({error}). Run: bash tools/setup_env.sh, or pip install viser."
            ) from error
        self.folder, self.photos = folder, photos
        self.cameras = None
        self._shown: tuple[str, Path, float, str] | None = None
        self._frusta: dict[str, viser.CameraFrustumHandle] = {}
        self.server = viser.ViserServer(host=host, port=port, label="S2D", verbose=False)
        gui = self.server.gui
        self.status = gui.add_markdown("Waiting for the first checkpoint …")
        self.what = gui.add_dropdown("Show", (NEWEST,))
        self.colours = gui.add_dropdown("Colours", (PHOTO, SUPPORT))
        self.legend = gui.add_markdown("")
        self.frusta = gui.add_checkbox("Cameras", True)
        self.frusta.on_update(lambda _: self._hide_frusta(None))
        self.view = gui.add_dropdown("View", ("none",))
        with gui.add_folder("Fixer, before and after"):
            self.left = gui.add_dropdown("Left", ("before: stage 1",))
            self.right = gui.add_dropdown("Right", ("after: fixed",))
            self.cut = gui.add_slider("Left | right", 0.0, 1.0, 0.01, 0.5)
            self.picture = gui.add_image(NO_PICTURE, format="jpeg")
        self.view.on_update(lambda event: self._go_to(event.client, self.view.value))
        for control in (self.view, self.left, self.right, self.cut):
            control.on_update(lambda _: self._show_pictures())
        self.server.on_client_connect(lambda client: self._go_to(client, self.view.value))

    def refresh(self) -> None:
        """Show what has changed in the folder since the last call."""
        if self.cameras is None and (found := self.folder.cameras()) is not None:
            self.cameras, self.num_kept = found
            self.server.scene.set_up_direction(up_axis(self.cameras.viewmats).tolist())
            self.view.options = self.cameras.names
            self._add_frusta()
        try:
            choices = self.folder.choices()
            if choices and tuple(choices) != tuple(self.what.options):
                self.what.options = tuple(choices)
            path = choices.get(self.what.value)
            wanted = (self.what.value, path, path and path.stat().st_mtime, self.colours.value)
            if path is None or wanted == self._shown:
                return
            self._shown = wanted
            gaussians, words = self.folder.load(self.what.value)
            support = None
            if self.colours.value == SUPPORT:
                support = self.folder.support(self.what.value, gaussians.num)
        except (FileNotFoundError, ValueError) as error:
            logger.debug("not readable just now: %s", error)  # a training is replacing it
            return
        self.status.content = f"**{self.what.value}**: {words}, {gaussians.num:,} Gaussians"
        self.legend.content = LEGEND if support is not None else ""
        if self.colours.value == SUPPORT and support is None:
            self.legend.content = "Not known here: only stages that were run with `--support` know it, once they have finished."
        self._send(gaussians, support)

    def _send(self, gaussians: Gaussians, support: Tensor | None = None) -> None:
        opacities = torch.sigmoid(gaussians.opacity_logits)
        covers = opacities.log() + gaussians.log_scales.sum(1) / 1.5  # two of three axes are seen
        chosen = covers.topk(min(gaussians.num, MAX_GAUSSIANS)).indices
        scales = gaussians.log_scales[chosen].exp()
        if support is None:
            colours = sh0_to_rgb(gaussians.sh0[:, 0]).clamp(0, 1)
        else:
            colours = support_colours(support)
        half = quat_to_rotation(gaussians.quats[chosen]) * scales[:, None, :]
        self.server.scene.add_gaussian_splats(
            "/gaussians",
            centers=gaussians.means[chosen].numpy(),
            covariances=(half @ half.mT).numpy(),
            rgbs=colours[chosen].numpy(),
            opacities=opacities[chosen, None].numpy(),
        )

    def _add_frusta(self) -> None:
        world_from_cam = invert_rigid(self.cameras.viewmats)
        for row, camera in enumerate(self.cameras):
            name, is_kept = camera.names[0], row < self.num_kept
            has_photo = is_kept and self.photos is not None and name in self.photos.names
            frustum = self.server.scene.add_camera_frustum(
                f"/cameras/{row:04d}",
                fov=2 * float(torch.atan(camera.height / 2 / camera.Ks[0, 1, 1])),
                aspect=camera.width / camera.height,
                scale=0.06 * (self.cameras.extent or 1.0),
                color=KEPT_COLOUR if is_kept else NOVEL_COLOUR,
                image=_pixels(self.photos.image(name), THUMBNAIL_WIDTH) if has_photo else None,
                wxyz=rotation_to_quat(world_from_cam[row, :3, :3]).numpy(),
                position=world_from_cam[row, :3, 3].numpy(),
                visible=self.frusta.value,
            )
            frustum.on_click(lambda event, name=name: self._go_to(event.client, name))
            self._frusta[name] = frustum

    def _hide_frusta(self, looked_through: str | None) -> None:
        """The photo of the camera that is looked through would cover what it shows."""
        for name, frustum in self._frusta.items():
            frustum.visible = self.frusta.value and name != looked_through

    def _go_to(self, client: "viser.ClientHandle | None", name: str) -> None:
        """Look through a camera: viser's has OpenCV's axes too, camera to world."""
        if client is None or self.cameras is None or name not in self.cameras.names:
            return
        self._hide_frusta(name)
        camera = self.cameras.select([name])
        world_from_cam = invert_rigid(camera.viewmats)[0]
        with client.atomic():  # else the browser turns around the old point on its way
            client.camera.wxyz = rotation_to_quat(world_from_cam[:3, :3]).numpy()
            client.camera.position = world_from_cam[:3, 3].numpy()
            client.camera.fov = 2 * float(torch.atan(camera.height / 2 / camera.Ks[0, 1, 1]))

    def _show_pictures(self) -> None:
        found = self.folder.pictures(self.view.value)
        if not found:
            self.picture.image = NO_PICTURE
            return
        for control in (self.left, self.right):
            if tuple(control.options) != tuple(found):
                before = control.value
                control.options = tuple(found)
                control.value = before if before in found else next(iter(found))
        left, right = (_pixels(read_image(found[c.value]), PICTURE_WIDTH) for c in (self.left, self.right))  # fmt: skip
        cut = round(self.cut.value * right.shape[1])
        self.picture.image = np.concatenate([left[:, :cut], right[:, cut:]], 1)


def _pixels(image: Tensor, width: int) -> np.ndarray:
    """[height, width, 3] uint8"""
    height = max(1, round(width * image.shape[0] / image.shape[1]))
    return (resize_image(image, width, height) * 255).round().to(torch.uint8).numpy()
