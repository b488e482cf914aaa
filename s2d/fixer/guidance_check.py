"""Stage 2 looks over its guidance: points that the kept photos do not show where the render does (`s2d.guidance.hidden`) are left out of what the fixer is given."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from s2d.cameras import Cameras
from s2d.depth_io import depth_path, known_depths
from s2d.fixer.novel_views import ViewFiles, read_view
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.hidden import hidden_points, witnesses_of
from s2d.guidance.render import render_cloud
from s2d.images import image_writer
from s2d.log import logger, progress
from s2d.model_folder import render_name
from s2d.scene import Scene

FOLDER = "coverage"  # of the scratch folder: what is left of stage 0's


@dataclass(frozen=True)
class GuidanceCheck:
    """What the check looks at, all of it made by stage 0."""

    kept: Scene
    novel: Cameras
    stage0_dir: Path

    @property
    def files(self) -> list[Path]:
        """All that is read besides photos, cameras and the views' own pictures."""
        depths = [depth_path(self.stage0_dir, name) for name in self.kept.names]
        return [self.stage0_dir / "surface.npz", *(path for path in depths if path.is_file())]

    def run(
        self, views: Mapping[str, ViewFiles], scratch: Path
    ) -> tuple[dict[str, ViewFiles], float]:
        """Write the coverage that is left of each view; views that an earlier run has looked over are not looked over again.

        Returns:
            The views with that coverage instead of stage 0's, and the share of what was covered that is left out.

        Raises:
            OSError: A picture could not be written.
            ValueError: Pictures of one view differ in size.
        """
        cameras = {render_name(name): name for name in self.novel.names}
        targets = {name: scratch / FOLDER / name for name in views}
        todo = [name for name, path in targets.items() if not path.is_file()]
        if todo:
            cloud = SurfaceCloud.load(self.stage0_dir / "surface.npz")
            witnesses = witnesses_of(self.kept, known_depths(self.stage0_dir, self.kept.names))
            with image_writer() as write, progress(len(todo), "check guidance") as bar:
                for row, name in enumerate(todo):
                    camera = self.novel.select([cameras[name]])
                    guidance = render_cloud(cloud, camera)
                    rendered = read_view(views[name]).rendered
                    hidden = hidden_points(rendered, guidance, camera, witnesses)
                    write(targets[name], (guidance.coverage & ~hidden).float())
                    bar.update(row + 1)
        checked = {name: replace(view, coverage=targets[name]) for name, view in views.items()}
        before, after = (
            sum(float(read_view(view).coverage_mask.sum()) for view in group.values())
            for group in (views, checked)
        )
        share = 1 - after / max(before, 1)
        logger.info(
            "guidance: %.1f %% is left out, points behind something that has none", 100 * share
        )
        return checked, share
