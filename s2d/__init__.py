"""S2D: from a few photos to a clean 3D Gaussian Splatting scene."""

__version__ = "0.1.0"
