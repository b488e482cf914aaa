"""Which kept photos a fixer looks at beside a novel view: the nearest."""

from pathlib import Path

from s2d.cameras import Cameras
from s2d.model_folder import render_name
from s2d.scene import Scene


def photos_by_camera(novel: Cameras, kept: Scene, count: int) -> dict[str, tuple[Path, ...]]:
    """The kept photos whose cameras are nearest to each novel one, nearest first, by the render's name."""
    nearest = novel.pose_distances(kept.cameras).argsort(dim=1, stable=True)[:, :count]
    return {
        render_name(name): tuple(kept.image_paths[row] for row in rows)
        for name, rows in zip(novel.names, nearest.tolist(), strict=True)
    }


def photos_by_index(meta_dir: Path, photo_dir: Path, count: int) -> dict[str, tuple[Path, ...]]:
    """The same without cameras: near is near in the order of names.

    Args:
        meta_dir: Has stage 1's image_names.txt and train_indices.txt.
        photo_dir: The input photos.
        count: Photos per view at most.
    """
    names = (meta_dir / "image_names.txt").read_text().splitlines()
    kept_rows = [int(row) for row in (meta_dir / "train_indices.txt").read_text().split()]
    return {
        render_name(name): tuple(
            photo_dir / names[kept_row]
            for kept_row in sorted(kept_rows, key=lambda kept_row: abs(kept_row - row))[:count]
        )
        for row, name in enumerate(names)
    }
