"""What OUT holds for other programs: the 3DGS model folder, and copies of results in folders that a command line names."""

import shutil
from pathlib import Path

from s2d.cameras import Cameras
from s2d.files import atomic_write_bytes, atomic_write_json
from s2d.geometry import invert_rigid
from s2d.scene import Scene, load_scene
from s2d.split import Split
from s2d.stage_io import require_stage


def render_name(view_name: str) -> str:
    """Name the picture that a stage makes of a view: `dir/IMG_1.JPG` → `dir/IMG_1.png`."""
    return Path(view_name).with_suffix(".png").as_posix()


def point_cloud_name(step: int | str) -> str:
    """Where 3DGS viewers look for the Gaussians, relative to OUT."""
    return f"point_cloud/iteration_{step}/point_cloud.ply"


def stage1_checkpoint(model_dir: Path, is_needed: bool = True) -> Path | None:
    """Where stage 1 has left its Gaussians; FileNotFoundError, or None if nobody needs them, where it has not finished."""
    try:
        stage1 = require_stage(model_dir, "stage1")
    except FileNotFoundError:
        if is_needed:
            raise
        return None
    return model_dir / f"chkpnt_stage1_{stage1.info['iteration']}.pth"


def kept_views(source: Path, stage0_dir: Path, split: Split) -> Scene:
    """Load the kept views alone: from the scene that stage 0 prepared, where the source was not plain."""
    prepared = stage0_dir / "scene"
    return load_scene(prepared if prepared.is_dir() else source).subset(split.kept)


def write_cameras_json(path: Path, cameras: Cameras) -> Path:
    """Write the cameras as 3DGS viewers read them: centre and camera-to-world rotation, focal lengths in pixels.

    The format has no principal point; a viewer draws such a camera's image centred.
    """
    world_from_cam = invert_rigid(cameras.viewmats.double())
    entries = [
        {
            "id": row,
            "img_name": Path(name).with_suffix("").as_posix(),
            "width": width,
            "height": height,
            "position": c2w[:3, 3].tolist(),
            "rotation": c2w[:3, :3].tolist(),
            "fx": float(K[0, 0]),
            "fy": float(K[1, 1]),
        }
        for row, (name, (width, height), K, c2w) in enumerate(
            zip(cameras.names, cameras.sizes, cameras.Ks, world_from_cam, strict=True)
        )
    ]
    atomic_write_json(path, entries)
    return path


def write_cfg_args(
    path: Path, source: Path, model_dir: Path, sh_degree: int, with_test: bool
) -> Path:
    """Write the settings that viewers ask of a 3DGS model folder, as JSON: nothing in it needs to be evaluated."""
    settings = {
        "source_path": str(source.resolve()),
        "model_path": str(model_dir.resolve()),
        "sh_degree": sh_degree,
        "images": "images",
        "resolution": -1,
        "white_background": False,
        "eval": with_test,
    }
    atomic_write_json(path, settings)
    return path


def copy_results(source: Path, target: Path | None) -> None:
    """Copy a file, or all files of a folder, to where the command line wants them too; None wants no copy."""
    if target is None:
        return
    if source.is_file():
        if target.resolve() != source.resolve():
            atomic_write_bytes(target, source.read_bytes())
        return
    if target.resolve() == source.resolve():
        return
    for path in sorted(source.rglob("*")):
        if path.is_file():
            destination = target / path.relative_to(source)
            destination.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, destination)
