"""Stand-ins for the packages of the visual geometry models: same import paths, constructors, weights and output format, tiny random networks.

Shapes and keys as in docs/providers.md. Each network reads every pixel, so that a wrong shape of the input is an error.
"""

import sys
from pathlib import Path

import pytest

PI3 = """
import torch
from huggingface_hub import PyTorchModelHubMixin


class {name}(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 4, 14, 14)
        self.register_buffer("image_mean", torch.zeros(1, 3, 1, 1))

    def forward(self, imgs{hints}):
        B, N, _, H, W = imgs.shape
        features = self.head(imgs.flatten(0, 1))
        features = torch.nn.functional.interpolate(features, (H, W), mode="bilinear")
        features = features.permute(0, 2, 3, 1).reshape(B, N, H, W, 4)
        y, x = torch.meshgrid(torch.linspace(-0.5, 0.5, H), torch.linspace(-0.5, 0.5, W), indexing="ij")
        z = features[..., :1].exp()
        xy = torch.stack([x, y], -1) + 0.01 * features[..., 1:3]
        poses = torch.eye(4).repeat(B, N, 1, 1)
        poses[..., 0, 3] = torch.arange(N)
        local = torch.cat([xy * z, z], -1)
        points = local + poses[..., None, None, :3, 3]
        return dict(local_points=local, points=points, camera_poses=poses, conf=features[..., 3:])
"""

VGGT = """
import torch
from huggingface_hub import PyTorchModelHubMixin


class VGGT(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, img_size=518, patch_size=14, embed_dim=8):
        super().__init__()
        self.head = torch.nn.Conv2d(3, 2, patch_size, patch_size)

    def forward(self, images, query_points=None):
        if len(images.shape) == 4:
            images = images.unsqueeze(0)
        B, S, _, H, W = images.shape
        features = self.head(images.flatten(0, 1))
        features = torch.nn.functional.interpolate(features, (H, W)).reshape(B, S, 2, H, W)
        pose = torch.tensor([0.0, 0, 0, 0, 0, 0, 1, 0.8, 1.0]).repeat(B, S, 1)
        pose[..., 0] = -torch.arange(S)
        depth = features[:, :, 0, ..., None].exp()
        conf = 1 + features[:, :, 1].exp()
        points = torch.zeros(B, S, H, W, 3)
        return dict(pose_enc=pose, pose_enc_list=[pose], depth=depth, depth_conf=conf, world_points=points,
                    world_points_conf=conf, images=images)
"""

MAPANYTHING = """
import torch
from huggingface_hub import PyTorchModelHubMixin


class MapAnything(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, width=2):
        super().__init__()
        self.head = torch.nn.Conv2d(3, width, 14, 14)

    def infer(self, views, memory_efficient_inference=False, use_amp=True, amp_dtype="bf16", apply_mask=True,
              mask_edges=True, apply_confidence_mask=False, confidence_percentile=10):
        predictions = []
        for number, view in enumerate(views):
            assert set(view) <= {"img", "data_norm_type", "intrinsics", "camera_poses", "is_metric_scale"}
            B, _, H, W = view["img"].shape
            features = torch.nn.functional.interpolate(self.head(view["img"]), (H, W))
            depth = features[:, 0, ..., None].exp()
            pose = torch.eye(4).repeat(B, 1, 1)
            pose[:, 0, 3] = number
            K = torch.tensor([[W, 0, W / 2 - 0.5], [0, W, H / 2 - 0.5], [0, 0, 1.0]]).repeat(B, 1, 1)
            predictions.append(dict(
                pts3d=depth.expand(B, H, W, 3), pts3d_cam=depth.expand(B, H, W, 3), depth_z=depth, depth_along_ray=depth,
                conf=1 + features[:, 1].exp(), mask=features[:, :1].permute(0, 2, 3, 1) > -9, camera_poses=pose,
                intrinsics=K, ray_directions=depth.expand(B, H, W, 3), metric_scaling_factor=torch.ones(B)))
        return predictions
"""

DEPTH_ANYTHING_3 = """
from dataclasses import dataclass

import numpy as np
import torch
from huggingface_hub import PyTorchModelHubMixin


@dataclass
class Prediction:
    depth: np.ndarray
    is_metric: int
    sky: np.ndarray | None = None
    conf: np.ndarray | None = None
    extrinsics: np.ndarray | None = None
    intrinsics: np.ndarray | None = None


class DepthAnything3(torch.nn.Module, PyTorchModelHubMixin):
    def __init__(self, model_name="da3-large", cameras=True):
        super().__init__()
        self.head, self.cameras = torch.nn.Conv2d(3, 1, 14, 14), cameras

    def inference(self, image, extrinsics=None, intrinsics=None, align_to_input_ext_scale=True, infer_gs=False,
                  process_res=504, process_res_method="upper_bound_resize", export_dir=None):
        images = torch.from_numpy(np.stack(image)).permute(0, 3, 1, 2) / 255
        N, _, H, W = images.shape
        depth = torch.nn.functional.interpolate(self.head(images), (H, W))[:, 0].exp().numpy()
        if not self.cameras:
            return Prediction(depth, 1)
        w2c = np.tile(np.eye(4, dtype=np.float32)[:3], (N, 1, 1))
        w2c[:, 0, 3] = -np.arange(N)
        K = np.tile(np.array([[W, 0, W / 2], [0, W, H / 2], [0, 0, 1]], np.float32), (N, 1, 1))
        sky = np.zeros_like(depth)
        sky[:, : H // 2] = 1
        return Prediction(depth, 0, sky, depth + 1, w2c, K)
"""

FILES = {
    "pi3/models/pi3.py": PI3.format(name="Pi3", hints=""),
    "pi3/models/pi3x.py": PI3.format(
        name="Pi3X", hints=", depths=None, intrinsics=None, rays=None, poses=None"
    ),
    "vggt/models/vggt.py": VGGT,
    "mapanything/models/__init__.py": MAPANYTHING,
    "depth_anything_3/api.py": DEPTH_ANYTHING_3,
}


def write_packages(folder: Path) -> Path:
    """Write them all below `folder`, ready to be put on the path."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def forget_packages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make imports start anew, and put everything back after the test."""
    tops = {name.split("/")[0] for name in FILES}
    for name in [name for name in sys.modules if name.split(".")[0] in tops]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", list(sys.path))
