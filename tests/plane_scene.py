"""A tiny COLMAP scene made in code: photos of a textured wall, by a camera that slides along it. Written as text, by hand.

Axes are OpenCV's: x right, y down, z forward. The wall is the plane z = 4, the cameras stand on z = 0 without rotation, so the pixel
(u, v) of a camera at x sees the wall at ((u - cx) / f * 4 + x, (v - cy) / f * 4).
"""

from pathlib import Path

import cv2
import numpy as np

WIDTH, HEIGHT, FOCAL, DEPTH = 48, 36, 40.0, 4.0


def wall_colour(x, y):
    """Colour of the wall at [...] world positions, [..., 3] in 0..255: waves of unlike lengths, so that every patch is its own."""
    waves = [
        np.sin(5.1 * x + 1.3 * y) + np.sin(2.3 * x - 7.7 * y + 1.0),
        np.sin(3.7 * x + 6.1 * y + 2.0) + np.sin(8.9 * x + 0.7),
        np.sin(6.3 * x - 2.9 * y) + np.sin(4.3 * y + 0.5),
    ]
    return np.stack([127.5 + 60 * wave for wave in waves], axis=-1)


def write_plane_scene(folder: Path, num_views: int = 6) -> Path:
    """Write `images/view_<i>.png` and `sparse/0/*.txt`; returns the folder."""
    (folder / "images").mkdir(parents=True)
    (folder / "sparse/0").mkdir(parents=True)
    centres = np.linspace(-0.5, 0.5, num_views)
    u, v = np.meshgrid(np.arange(WIDTH) + 0.5, np.arange(HEIGHT) + 0.5)
    y = (v - HEIGHT / 2) / FOCAL * DEPTH
    for view, centre in enumerate(centres):
        x = (u - WIDTH / 2) / FOCAL * DEPTH + centre
        rgb = np.rint(wall_colour(x, y)).astype(np.uint8)
        cv2.imwrite(str(folder / f"images/view_{view}.png"), rgb[..., ::-1])

    points = [(x, y) for x in np.linspace(-1.7, 1.7, 9) for y in np.linspace(-1.5, 1.5, 7)]
    observations = [[] for _ in centres]  # per view: (u, v, point)
    tracks = []
    for point, (x, y) in enumerate(points):
        track = []
        for view, centre in enumerate(centres):
            column, row = (x - centre) * FOCAL / DEPTH + WIDTH / 2, y * FOCAL / DEPTH + HEIGHT / 2
            if 0 <= column < WIDTH and 0 <= row < HEIGHT:
                track.append((view + 1, len(observations[view])))
                observations[view].append((column, row, point + 1))
        tracks.append(track)
    model = folder / "sparse/0"
    model.joinpath("cameras.txt").write_text(
        f"1 PINHOLE {WIDTH} {HEIGHT} {FOCAL} {FOCAL} {WIDTH / 2} {HEIGHT / 2}\n"
    )
    model.joinpath("images.txt").write_text(
        "".join(
            f"{view + 1} 1 0 0 0 {-centre} 0 0 1 view_{view}.png\n"
            + " ".join(f"{u} {v} {point}" for u, v, point in observations[view])
            + "\n"
            for view, centre in enumerate(centres)
        )
    )
    model.joinpath("points3D.txt").write_text(
        "".join(
            f"{point + 1} {x} {y} {DEPTH} {' '.join(str(round(c)) for c in wall_colour(x, y))} 0.1 "
            + " ".join(f"{view} {slot}" for view, slot in track)
            + "\n"
            for point, ((x, y), track) in enumerate(zip(points, tracks, strict=True))
            if track
        )
    )
    return folder
