"""A model in a browser, while it is trained and afterwards (`tools/view.py`, docs/viewing.md)."""

from s2d.viewer.app import Viewer
from s2d.viewer.folder import ModelFolder

__all__ = ["ModelFolder", "Viewer"]
