"""A scene with known depth, and fake networks that answer with the truth in the conventions of the real packages.

Every fake finds the photos in the images that it is given by itself (what is not white), checks that they show what they should,
and works out its answer from the true surface: nothing is shared with the adapters' own arithmetic.

Truth: the box in a room of `tiny_scene`, three photos, one of them upright, all with their own intrinsics.
"""

from types import SimpleNamespace

import numpy as np
import torch
from scipy.spatial.transform import Rotation
from tiny_scene import cameras as tiny_cameras
from tiny_scene import cast, render, texture

from s2d.alignment import Sim3
from s2d.cameras import Cameras
from s2d.geometry import invert_rigid, pixel_grid
from s2d.guidance.matches import SparsePoints
from s2d.lenses import Lens

EXTENT = 8.0  # side of the room
MEAN = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
STD = torch.tensor([0.229, 0.224, 0.225])[:, None, None]


class Truth:
    """Photos, cameras, and the true surface under every pixel of every canvas."""

    def __init__(self, centered: bool = False, same_size: bool = False):
        sizes = [(96, 72)] * 3 if same_size else [(96, 72), (72, 96), (90, 72)]
        viewmats = tiny_cameras()[0][[1, 3, 6]]
        offset = 0.0 if centered else 1.0
        lenses = [
            Lens("PINHOLE", w, h, (85.0, 88.0, w / 2 + 2.2 * offset, h / 2 - 1.7 * offset))
            for w, h in sizes
        ]
        self.photos = [render(v, lens) for v, lens in zip(viewmats, lenses, strict=True)]
        Ks = torch.tensor(
            [
                [[fx, 0, cx], [0, fy, cy], [0, 0, 1]]
                for fx, fy, cx, cy in (lens.params for lens in lenses)
            ]
        )
        self.cameras = Cameras(viewmats.float(), Ks, sizes, [f"p{i}.png" for i in range(3)])
        rotation = Rotation.random(rng=np.random.default_rng(4)).as_matrix()
        # From the scene's frame to the one that the fake networks answer in.
        self.frame = Sim3(0.37, torch.from_numpy(rotation), torch.tensor([0.4, -1.0, 2.0]).double())

    def surface(self, row: int, K: torch.Tensor, width: int, height: int) -> torch.Tensor:
        """True world points under the pixel centres of a picture with intrinsics K. [H, W, 3] float64"""
        rays = torch.nn.functional.pad(
            pixel_grid(width, height, dtype=torch.float64), (0, 1), value=1.0
        )
        c2w = invert_rigid(self.cameras.viewmats[row].double())
        directions = rays @ torch.linalg.inv(K.double()).T @ c2w[:3, :3].T
        return cast(c2w[:3, 3].expand_as(directions), directions)

    def photo_surface(self, row: int, width: int, height: int) -> torch.Tensor:
        """The same for the whole photo resized to width x height."""
        K = self.cameras[row].scaled((width, height)).Ks[0]
        return self.surface(row, K, width, height)

    def answer(self, images: torch.Tensor) -> "Answer":
        """The truth for images [N, 3, H, W] in [0, 1], with padding around the photos or without."""
        height, width = images.shape[-2:]
        Ks, locals_, worlds, w2cs = [], [], [], []
        moved = self.frame.cameras(self.cameras)
        for row, image in enumerate(images):
            shown = (image < 0.999).all(0)
            lines, columns = shown.any(1).nonzero()[:, 0], shown.any(0).nonzero()[:, 0]
            left, top = int(columns[0]), int(lines[0])
            across, down = int(columns[-1]) + 1 - left, int(lines[-1]) + 1 - top
            photo_width, photo_height = self.cameras.sizes[row]
            to_canvas = torch.tensor(
                [[across / photo_width, 0, left], [0, down / photo_height, top], [0, 0, 1]]
            ).double()
            K = to_canvas @ self.cameras.Ks[row].double()
            surface = self.surface(row, K, width, height)
            inside = (slice(top, top + down), slice(left, left + across))
            difference = (
                texture(surface).permute(2, 0, 1)[:, inside[0], inside[1]]
                - image[:, inside[0], inside[1]]
            )
            # A flipped, shifted, wrongly normalised or blue-for-red photo differs by 0.1 or more.
            assert float(difference.abs().mean()) < 0.03, "this is not the photo"
            world = self.frame.points(surface)
            w2c = moved.viewmats[row].double()
            Ks.append(K)
            w2cs.append(w2c)
            worlds.append(world)
            locals_.append(world @ w2c[:3, :3].T + w2c[:3, 3])
        return Answer(*(torch.stack(rows) for rows in (Ks, w2cs, worlds, locals_)))

    def sparse(self, count: int = 60) -> SparsePoints:
        """Surface points and two cameras that see them; a tenth of them is wrong."""
        generator = torch.Generator().manual_seed(0)
        points, pairs = [], []
        for row in range(3):
            width, height = self.cameras.sizes[row]
            surface = self.photo_surface(row, width, height).reshape(-1, 3)
            points.append(surface[torch.randperm(len(surface), generator=generator)[:count]])
            pairs.append(torch.tensor([[row, row]]).expand(count, 2))
        points = torch.cat(points)
        points[::10] *= 1.3
        return SparsePoints(points.numpy(), torch.cat(pairs).numpy())


class Answer:
    def __init__(self, Ks, w2c, world, local):
        self.Ks, self.w2c, self.world, self.local = Ks, w2c, world, local
        self.c2w = torch.linalg.inv(w2c)


def distance_to_surface(points: torch.Tensor) -> torch.Tensor:
    """From world points to the nearest wall of the room or face of the box. [P]"""
    points = points.double()

    def to_box(low: list[float], high: list[float]) -> torch.Tensor:
        low, high = torch.tensor(low).double(), torch.tensor(high).double()
        beyond = torch.maximum(low - points, points - high)
        outside = beyond.clamp(min=0).norm(dim=-1)
        return outside + (-beyond.amax(-1)).clamp(min=0)

    return torch.minimum(to_box([-4, -4, 0], [4, 4, 4]), to_box([-0.7, -0.6, 0], [0.6, 0.5, 1.1]))


# -- networks ------------------------------------------------------------------------------------------------------------
# `plant` makes one mistake of convention, for the tests of the tests.


class FakePi3(torch.nn.Module):
    """Own-camera points, logits, camera to world; no intrinsics."""

    def __init__(self, truth: Truth, plant: str = ""):
        super().__init__()
        self.truth, self.plant, self.told = truth, plant, None

    def forward(self, imgs, intrinsics=None, poses=None):
        assert imgs.shape[3] % 14 == 0 and imgs.shape[4] % 14 == 0
        found = self.truth.answer(imgs[0])
        self.told = (intrinsics, poses, found)
        poses = found.w2c if self.plant == "w2c for c2w" else found.c2w
        if self.plant == "transposed rotation":
            poses = poses.clone()
            poses[:, :3, :3] = poses[:, :3, :3].mT
        local = found.local
        if self.plant == "half pixel":
            local = local.clone()
            local[..., 0] += local[..., 2] * 0.5 / found.Ks[:, 0, 0, None, None]
        world = local @ poses[:, None, :3, :3].mT + poses[:, None, None, :3, 3]
        logits = torch.full((*found.local.shape[:-1], 1), 3.0)
        return {
            "local_points": local[None].float(),
            "points": world[None].float(),
            "camera_poses": poses[None].float(),
            "conf": logits[None],
        }


class FakeVggt(torch.nn.Module):
    """Depth, 1 + exp confidence, world to camera as t, quaternion xyzw, vertical and horizontal field of view."""

    def __init__(self, truth: Truth, plant: str = ""):
        super().__init__()
        self.truth, self.plant = truth, plant

    def forward(self, images, query_points=None):
        assert images.shape[3] % 14 == 0 and images.shape[4] % 14 == 0
        height, width = images.shape[-2:]
        found = self.truth.answer(images[0])
        encodings = []
        for w2c, K in zip(found.w2c, found.Ks, strict=True):
            quat = torch.from_numpy(Rotation.from_matrix(w2c[:3, :3].numpy()).as_quat())  # xyzw
            if self.plant == "quaternion wxyz":
                quat = quat[[3, 0, 1, 2]]
            fields = [2 * torch.atan(height / 2 / K[1, 1]), 2 * torch.atan(width / 2 / K[0, 0])]
            if self.plant == "fields swapped":
                fields = fields[::-1]
            encodings.append(torch.cat([w2c[:3, 3], quat, torch.stack(fields)]))
        depth = found.local[..., 2].float()
        if self.plant == "half pixel":  # the depth at the pixels' corners
            depth = torch.nn.functional.avg_pool2d(
                torch.nn.functional.pad(depth, (1, 0, 1, 0), mode="replicate"), 2, 1
            )
        return {
            "pose_enc": torch.stack(encodings)[None].float(),
            "depth": depth[None, ..., None],
            "depth_conf": torch.full_like(depth, 21.0)[None],
        }


class FakeMapAnything(torch.nn.Module):
    """One dict per photo: z depth, camera to world, intrinsics that count pixels from 0 at their centres."""

    def __init__(self, truth: Truth, plant: str = ""):
        super().__init__()
        self.truth, self.plant, self.told = truth, plant, None

    def infer(self, views, **options):
        assert options.keys() <= {"use_amp", "apply_mask", "mask_edges"}
        assert all(view["data_norm_type"] == ["dinov2"] for view in views)
        images = torch.cat([view["img"] for view in views]) * STD + MEAN
        found = self.truth.answer(images)
        self.told = (views, found)
        answers = []
        for row in range(len(images)):
            K = found.Ks[row].clone()
            if self.plant != "half pixel":
                K[:2, 2] -= 0.5
            pose = found.w2c[row] if self.plant == "w2c for c2w" else found.c2w[row]
            if self.plant == "depth along the ray":
                depth = found.local[row].norm(dim=-1, keepdim=True)
            else:
                depth = found.local[row, ..., 2:]
            answers.append(
                {
                    "depth_z": depth[None].float(),
                    "pts3d": found.world[row][None].float(),
                    "conf": torch.full((1, *depth.shape[:2]), 11.0),
                    "mask": torch.ones(1, *depth.shape[:2], 1, dtype=torch.bool),
                    "camera_poses": pose[None].float(),
                    "intrinsics": K[None].float(),
                }
            )
        return answers


class FakeDepthAnything3(torch.nn.Module):
    """numpy in and out; world to camera [N, 3, 4]; given cameras take the place of its own, with depth in their unit."""

    def __init__(self, truth: Truth, plant: str = ""):
        super().__init__()
        self.truth, self.plant, self.told = truth, plant, None

    def inference(self, image, extrinsics=None, intrinsics=None, process_res=504):
        height, width = image[0].shape[:2]
        # Else the package would resize or crop on its own account.
        assert {one.shape for one in image} == {(height, width, 3)}
        assert max(width, height) == process_res and width % 14 == 0 and height % 14 == 0
        assert image[0].dtype == np.uint8
        images = torch.from_numpy(np.stack(image)).permute(0, 3, 1, 2) / 255
        found = self.truth.answer(images)
        self.told = (extrinsics, intrinsics, found)
        depth, w2c, Ks = found.local[..., 2].float(), found.w2c[:, :3].float(), found.Ks.float()
        if extrinsics is not None:
            depth = depth / self.truth.frame.scale
            w2c, Ks = torch.from_numpy(extrinsics[:, :3]), torch.from_numpy(intrinsics)
        if self.plant == "c2w for w2c":
            w2c = torch.linalg.inv(found.w2c)[:, :3].float()
        if self.plant == "half pixel":
            Ks = Ks.clone()
            Ks[:, :2, 2] -= 0.5
        return SimpleNamespace(
            depth=depth.numpy(),
            conf=np.full(depth.shape, 5.0, np.float32),
            extrinsics=w2c.numpy(),
            intrinsics=Ks.numpy(),
            sky=None,
            is_metric=0,
        )


class FakeMonocular(torch.nn.Module):
    """`predicted_depth` [1, h, w] of one photo: depth in another unit, or inverse depth with a scale and a shift of its own."""

    def __init__(self, truth: Truth, inverse: bool, shift: float = 0.0, plant: str = ""):
        super().__init__()
        self.truth, self.inverse, self.shift, self.plant, self.row = truth, inverse, shift, plant, 0

    def forward(self, pixel_values):
        image = pixel_values * STD + MEAN
        height, width = image.shape[-2:]
        surface = self.truth.photo_surface(self.row, width, height)
        difference = texture(surface).permute(2, 0, 1) - image[0]
        assert float(difference.abs().mean()) < 0.03, "this is not the photo"
        viewmat = self.truth.cameras.viewmats[self.row].double()
        depth = surface @ viewmat[2, :3] + viewmat[2, 3]
        factor = 3.0 + self.row
        self.row += 1
        if self.plant == "half pixel":
            depth = torch.roll(depth, 1, 1)
        value = factor / depth + self.shift if self.inverse else factor * depth
        return SimpleNamespace(predicted_depth=value[None].float())
