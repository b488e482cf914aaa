"""A camera and random blobs before it: what strategies are tried on."""

import torch

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.geometry import look_at

WIDTH, HEIGHT, FOCAL = 32, 24, 30.0


def camera(name="a", center=(0.0, 0.0, -4.0)):
    center = torch.tensor([center])
    up = torch.tensor([0.0, -1.0, 0.0])
    K = torch.tensor([[FOCAL, 0, WIDTH / 2], [0, FOCAL, HEIGHT / 2], [0, 0, 1]])
    viewmat = look_at(center, torch.zeros(1, 3), up)
    return Cameras(viewmat, K[None], ((WIDTH, HEIGHT),), (name,))


def blobs(generator, num=30):
    return Gaussians(
        means=torch.randn(num, 3, generator=generator) * 0.7,
        log_scales=torch.randn(num, 3, generator=generator) * 0.3 - 1.8,
        quats=torch.randn(num, 4, generator=generator),
        opacity_logits=torch.randn(num, generator=generator),
        sh0=torch.randn(num, 1, 3, generator=generator) * 0.5,
        shN=torch.randn(num, 3, 3, generator=generator) * 0.1,
    )
