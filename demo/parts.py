"""What the scene is made of: a part is a mesh and a material; numpy only."""

from dataclasses import dataclass, field

import numpy as np
from shapes import Mesh


@dataclass(frozen=True)
class Material:
    """How a surface looks; make_demo.py turns it into a BSDF.

    finish: matt | glazed (a clear coat over the colour) | metal | thin (light shines through) | glow (a lamp).
    """

    # linear reflectance, tint of a metal, or radiance of a lamp
    colour: tuple[float, float, float] = (0.5, 0.5, 0.5)
    # sRGB uint8 [H, W, 3], instead of the colour
    texture: np.ndarray | None = field(default=None, compare=False)
    finish: str = "matt"
    roughness: float = 0.3
    specular: float = 0.5  # strength of the clear coat; 0.5 is a refractive index of 1.5


@dataclass(frozen=True)
class Part:
    """A mesh and what it is made of."""

    name: str
    mesh: Mesh
    material: Material


BLACK = Material((0.02, 0.02, 0.022), finish="glazed", roughness=0.3)
BRASS = Material((0.83, 0.61, 0.30), finish="metal", roughness=0.28)
WHITE = Material((0.78, 0.76, 0.71), finish="glazed", roughness=0.35)
