"""What a model folder has to show right now: Gaussians of any stage or level, cameras, pictures. Nothing of it needs a finished stage."""

from pathlib import Path

from torch import Tensor

from s2d.cameras import Cameras
from s2d.gaussians import Gaussians, load_checkpoint
from s2d.layers.levels import gaussians_of_level
from s2d.layers.manifest import MANIFEST, load_levels
from s2d.layers.show import widened
from s2d.model_folder import point_cloud_name, render_name
from s2d.ply_io import read_support
from s2d.stage_folders import SCRATCH, partial_dir

NEWEST = "newest"
# Folders of pictures by view: what the fixer gets, what it makes of it, and what becomes of that.
PICTURES = {
    "before: stage 1": "stage1/renders",
    "guidance": "stage0/guidance",
    "after: fixed": "stage2/fixed",
    "confidence": "stage2/confidence",
    "final": "stage3/renders",
}


class ModelFolder:
    """OUT of a run, a folder of levels, or a .ply file."""

    def __init__(self, source: Path) -> None:
        """Raise FileNotFoundError where there is no such file or folder."""
        self.source = Path(source)
        if not self.source.exists():
            raise FileNotFoundError(
                f"No model: {source} does not exist. Expected OUT of a run, layers, or a .ply file."
            )

    def choices(self) -> dict[str, Path]:
        """What can be shown by name → the file that it is read from; `newest` first, it follows a running training."""
        if self.source.is_file():
            return {NEWEST: self.source}
        found: dict[str, Path] = {}
        for stage in ("stage1", "stage3"):
            running = partial_dir(self.source / stage) / SCRATCH / "run.pth"
            if running.is_file():
                found[f"{stage}, in training"] = running
        found |= {path.stem: path for path in self.source.glob("chkpnt*.pth")}
        for folder in (self.source, self.source / "stage3" / "layers"):
            if (folder / MANIFEST).is_file():
                levels = range(len(load_levels(folder)))
                found |= {f"level {k}": folder / MANIFEST for k in reversed(levels)}
        newest = max(found, key=lambda name: found[name].stat().st_mtime, default=None)
        return {NEWEST: found[newest], **found} if newest else {}

    def load(self, name: str) -> tuple[Gaussians, str]:
        """Read one of `choices`, as it is to be shown, and say what it is. FileNotFoundError, ValueError: a training is just replacing it, or it is damaged."""
        path = self.choices()[name]
        if path.name == MANIFEST:
            levels = load_levels(path.parent)
            last = len(levels) - 1
            k = last if name == NEWEST else int(name.split()[1])
            gaussians = gaussians_of_level(levels, k, visible_only=True)
            if (known := self.cameras()) is not None:
                # The browser's renderer blurs by 0.3 pixels² of the screen: a coarse level would be needles.
                cameras, num_kept = known
                rescale = levels.levels[k].rescale
                gaussians = widened(gaussians, cameras[:num_kept], rescale)
            return gaussians, f"level {k} of {last}"
        if path.suffix == ".ply":
            return Gaussians.load_ply(path), path.name
        checkpoint = load_checkpoint(path)
        return checkpoint.gaussians.detached(), f"step {checkpoint.step:,}"

    def support(self, name: str, num: int) -> Tensor | None:
        """What holds up each of the `num` Gaussians of one of `choices`; None where no splat tells (training, or made without --support). [N]"""
        path = self.choices()[name]
        if (
            path.suffix == ".pth"
        ):  # of a finished stage: the splat of the same step has the same rows
            step = path.stem.removeprefix("chkpnt").removeprefix("_stage1_")
            path = self.source / point_cloud_name(step)
        if path.suffix != ".ply" or not path.is_file():
            return None
        found = read_support(path)
        # A splat may have a backdrop behind the checkpoint's rows.
        return found[:num] if found is not None and len(found) >= num else None

    def cameras(self) -> tuple[Cameras, int] | None:
        """Kept and novel cameras, and how many are kept; None until stage 1 knows them."""
        parts = []
        for folder in (self.source / "stage3", self.source / "stage1", self.source.parent):
            if (folder / "kept_cameras.json").is_file():
                parts.append(Cameras.from_json(folder / "kept_cameras.json"))
                break
        else:
            return None
        path = self.source / "stage0" / "novel_cameras.json"
        if path.is_file():
            novel = Cameras.from_json(path)
            parts.append(novel.select([n for n in novel.names if n not in parts[0].names]))
        return Cameras.cat(parts), len(parts[0])

    def pictures(self, view: str) -> dict[str, Path]:
        """The pictures that the stages have made of a novel view."""
        found = {title: self.source / folder / render_name(view) for title, folder in PICTURES.items()}  # fmt: skip
        return {title: path for title, path in found.items() if path.is_file()}
