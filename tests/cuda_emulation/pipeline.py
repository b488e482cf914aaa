"""A render and its backward pass by emulated kernels: the launches and the torch operations that project.cu lists, in their order."""

from typing import Any, NamedTuple

import emulation
import torch
from diff_gaussian_rasterization.general import RenderOptions, SceneTensors
from torch import Tensor

TILE, SEGMENT = 16, 256
PARAMETERS = ("means", "log_scales", "quats", "opacity_logits", "sh0", "shN")


def blocks(count: int, size: int) -> int:
    return -(-count // size)


class Images(NamedTuple):
    rgb: Tensor  # [C, H, W, 3]
    alpha: Tensor  # [C, H, W, 1]
    depth: Tensor  # [C, H, W, 1]
    radii: Tensor  # [C, N]


class EmulatedRender:
    """One forward pass, and the backward passes that start from it.

    Args:
        scene, viewmats, Ks, background, offset, options: As `diff_gaussian_rasterization.general.forward` takes them.
        backwards: The order in which threads take their turns.
        wide_tiles: Tile numbers of 32 bits even where 16 suffice.
        training: False renders without what a backward pass needs.
    """

    def __init__(
        self,
        scene: SceneTensors,
        viewmats: Tensor,  # [C, 4, 4]
        Ks: Tensor,  # [C, 3, 3]
        background: Tensor,  # [3]
        offset: Tensor | None,  # [C, N, 2]
        options: RenderOptions,
        *,
        backwards: bool = False,
        wide_tiles: bool = False,
        training: bool = True,
    ) -> None:
        self.memory = emulation.Memory()
        self.backwards, self.options = backwards, options
        copy = self.memory.copy
        self.scene = SceneTensors(*map(copy, scene))
        self.viewmats, self.Ks, self.background = map(copy, (viewmats, Ks, background))
        self.size = (options.width, options.height)
        self.tiles = tuple(blocks(side, TILE) for side in self.size)
        self.num_coeffs = 1 if scene.shN is None else 1 + scene.shN.shape[1]
        self._project(copy(offset))
        self._bin(wide_tiles)
        self._rasterize(training)
        self.images = Images(self.rgb, self.alpha, self.depth, self.radii)

    def launch(self, name: str, grid: int | tuple[int, ...], threads: int, *arguments: Any) -> None:
        emulation.launch(name, grid, threads, *arguments, backwards=self.backwards)
        self.memory.check()

    def _empty(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.memory.empty(*shape, dtype=dtype)

    def _project(self, offset: Tensor | None) -> None:
        o = self.options
        c, n = len(self.viewmats), len(self.scene.means)
        self.splats = self._empty(c, n, 12)
        depth_keys, tile_counts, self.radii = (
            self._empty(c, n, dtype=torch.int32) for _ in range(3)
        )
        self._numbers = (n, self.num_coeffs, o.degree, o.activated, o.scale_modifier, *self.size)
        self._numbers += (o.inverse_depth, o.antialiasing)
        if c and n:
            self.launch(
                "project_forward",
                (blocks(n, 128), c),
                128,
                *self._numbers,
                *self.scene,
                self.viewmats,
                self.Ks,
                offset,
                self.splats,
                depth_keys,
                tile_counts,
                self.radii,
            )
        order = depth_keys.sort(dim=1, stable=True).indices
        ends = tile_counts.gather(1, order).flatten().cumsum(0, dtype=torch.int64)
        self.num_instances = int(ends[-1]) if len(ends) else 0
        self._order, self._ends = self.memory.copy(order), self.memory.copy(ends)

    def _bin(self, wide_tiles: bool) -> None:
        c, n = self.radii.shape
        count, num_tiles = self.num_instances, c * self.tiles[0] * self.tiles[1]
        bits, dtype = (32, torch.int32) if wide_tiles else (16, torch.int16)
        tiles, gaussians = self._empty(count, dtype=dtype), self._empty(count, dtype=torch.int32)
        if count:
            arguments = (c * n, n, *self.tiles, self._order, self._ends, self.splats)
            self.launch(
                f"emit_instances_{bits}", blocks(c * n, 256), 256, *arguments, tiles, gaussians
            )
        tiles, permutation = map(self.memory.copy, tiles.sort(stable=True))
        self.instances = self._empty(count, dtype=torch.int32)
        self.tile_begin = self._empty(num_tiles + 1, dtype=torch.int64)
        arguments = (
            count,
            num_tiles,
            tiles,
            permutation,
            gaussians,
            self.instances,
            self.tile_begin,
        )
        self.launch(f"tile_ranges_{bits}", blocks(count + 1, 256), 256, *arguments)

    def _rasterize(self, training: bool) -> None:
        c = len(self.viewmats)
        width, height = self.size
        num_tiles = c * self.tiles[0] * self.tiles[1]
        self.rgb = self._empty(c, height, width, 3)
        self.alpha, self.depth = (self._empty(c, height, width, 1) for _ in range(2))
        self.num_segments = self.num_instances // SEGMENT + num_tiles + 1
        self._saved: tuple[Tensor | None, ...] = (None,) * 4
        if training:
            final_T, stop = (
                self._empty(c, height, width),
                self._empty(c, height, width, dtype=torch.int32),
            )
            states = self._empty(self.num_instances // SEGMENT + 1, 6, SEGMENT)
            segment_tile = self.memory.full(self.num_segments, value=-1, dtype=torch.int32)
            self._saved = (final_T, stop, states, segment_tile)
        self._drawn = (*self.size, *self.tiles, self.options.inverse_depth, self.background)
        self._drawn += (self.splats, self.instances, self.tile_begin)
        images = (self.rgb, self.alpha, self.depth)
        if num_tiles:
            self.launch("rasterize_forward", num_tiles, 256, *self._drawn, *images, *self._saved)

    def splat_gradients(
        self,
        v_rgb: Tensor | None,
        v_alpha: Tensor | None,
        v_depth: Tensor | None,
        lengths: bool = False,
    ) -> Tensor:
        """The ten sums of each splat [C, N, 10]; `self.lengths` [C, N] on request, else None."""
        c, n = self.radii.shape
        sums = self.memory.full(c, n, 10, value=0.0)
        self.lengths = self.memory.full(c, n, value=0.0) if lengths else None
        name = "rasterize_backward" if v_depth is None else "rasterize_backward_depth"
        name += "_lengths" if lengths else ""
        cotangents = map(self.memory.copy, (v_rgb, v_alpha, v_depth))
        images = (self.rgb, self.alpha, self.depth, *self._saved)
        outputs = (*cotangents, sums, self.lengths)
        self.launch(name, self.num_segments, 128, *self._drawn, *images, *outputs)
        return sums

    def gradients(
        self, v_rgb: Tensor | None, v_alpha: Tensor | None, v_depth: Tensor | None
    ) -> dict[str, Tensor]:
        """Gradients by every argument of the render, under the names of `oracles.DIFFERENTIABLE` and of `SceneTensors`."""
        c, n = self.radii.shape
        sums = self.splat_gradients(v_rgb, v_alpha, v_depth)
        scene = self.scene
        d = {k: None if t is None else self._empty(*t.shape) for k, t in scene._asdict().items()}
        d_means2d = self._empty(c, n, 2)
        camera_sums = self.memory.full(c, 19, value=0.0, dtype=torch.float64)
        if n:
            self.launch(
                "project_backward",
                blocks(n, 128),
                128,
                *self._numbers,
                v_depth is not None,
                c,
                *scene,
                self.viewmats,
                self.Ks,
                self.radii,
                sums,
                *(d[name] for name in scene._fields),
                d_means2d,
                camera_sums,
            )
        found = {k: v for k, v in d.items() if v is not None}
        d_viewmats, d_Ks = self._camera_gradients(camera_sums)
        final_T = self._saved[0]
        d_background = (final_T[..., None] * (0 if v_rgb is None else v_rgb)).sum((0, 1, 2))
        found |= {"viewmats": d_viewmats, "Ks": d_Ks, "background": d_background}
        return found | {"means2d_probe": d_means2d}

    def _camera_gradients(self, camera_sums: Tensor) -> tuple[Tensor, Tensor]:
        c = len(camera_sums)
        d_viewmats, d_intrinsics = self._empty(c, 4, 4), self._empty(c, 4)
        self.launch("finish_cameras", c, 32, self.viewmats, camera_sums, d_viewmats, d_intrinsics)
        d_Ks = torch.zeros(c, 3, 3)
        d_Ks[:, 0, 0], d_Ks[:, 1, 1], d_Ks[:, :2, 2] = (
            d_intrinsics[:, 0],
            d_intrinsics[:, 1],
            d_intrinsics[:, 2:],
        )
        return d_viewmats, d_Ks

    def update(
        self,
        cotangents: tuple[Tensor | None, Tensor | None, Tensor | None],
        moments: list[Tensor],
        rates: Tensor,  # [6, 6]
        opacity_penalty: float = 0.0,
        statistics: tuple[Tensor, Tensor] | None = None,
        lengths: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Take Adam's step on `scene` in place; `moments` are six first ones, then six second ones. Returns the camera's gradients."""
        o, n = self.options, len(self.scene.means)
        sums = self.splat_gradients(*cotangents, lengths)
        camera_sums = self.memory.full(1, 19, value=0.0, dtype=torch.float64)
        self.launch(
            "project_update",
            blocks(n, 128),
            128,
            *(n, self.num_coeffs, o.degree, *self.size, cotangents[2] is not None),
            *(self.viewmats, self.Ks, self.radii, sums),
            *(getattr(self.scene, name) for name in PARAMETERS),
            *moments,
            self.memory.copy(rates),
            *(None, None),  # no other opacities than the scene's own
            opacity_penalty,
            0.5 * o.width,
            0.5 * o.height,
            *(statistics or (None, None)),
            self.lengths,
            camera_sums,
        )
        return self._camera_gradients(camera_sums)


def render(scene: dict, **options: Any) -> EmulatedRender:
    """Render a scene of `oracles.make_scene`."""
    scene = {k: v.float() if isinstance(v, Tensor) else v for k, v in scene.items()}
    shN = scene["shN"]
    degree = scene.get("sh_degree")
    if degree is None:
        degree = {0: 0, 3: 1, 8: 2, 15: 3}[shN.shape[1]]
    tensors = SceneTensors(*(scene[name] for name in PARAMETERS))
    choices = RenderOptions(scene["width"], scene["height"], degree)
    cameras = (scene["viewmats"], scene["Ks"], scene["background"], scene["means2d_probe"])
    return EmulatedRender(tensors, *cameras, choices, **options)
