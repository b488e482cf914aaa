"""What is exported and looked at: a model's Gaussians, whole or one level of its layers, and the cameras of its kept photos."""

from pathlib import Path

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians
from s2d.model_folder import kept_views
from s2d.split import Split
from s2d.stage_io import require_stage


def newest_ply(model_dir: Path) -> Path:
    """Find the Gaussians of a model folder that were trained longest.

    Raises:
        FileNotFoundError: there are none.
    """
    found = {
        int(path.parent.name.split("_")[1]): path
        for path in Path(model_dir).glob("point_cloud/iteration_*/point_cloud.ply")
        if path.parent.name.split("_")[1].isdigit()
    }
    if not found:
        raise FileNotFoundError(
            f"No Gaussians in {model_dir}: no point_cloud/iteration_<it>/point_cloud.ply. "
            f"Run: python stage3_3dgs_mixed_opt.py -m {model_dir}, or give a .ply file."
        )
    return found[max(found)]


def load_model(source: Path) -> Gaussians:
    """Load the Gaussians of a model folder (the newest) or of a .ply file."""
    source = Path(source)
    return Gaussians.load_ply(source if source.suffix == ".ply" else newest_ply(source))


def kept_cameras(model_dir: Path) -> Cameras:
    """The kept photos' cameras in the frame of the final Gaussians: as the last stage refined them, else as the scene has them.

    Raises:
        FileNotFoundError: stage 0 is not finished, or the scene is not where it was.
    """
    model_dir = Path(model_dir)
    for stage in ("stage3", "stage1"):
        path = model_dir / stage / "kept_cameras.json"
        if path.is_file():
            return Cameras.from_json(path)
    stage0 = require_stage(model_dir, "stage0")
    split = Split.load(stage0.dir / "split.json")
    return kept_views(Path(stage0.config["source"]), stage0.dir, split).cameras
