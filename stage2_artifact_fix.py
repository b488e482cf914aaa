"""Stage 2: turn each novel render (with artifacts) into a clean pseudo view, helped by the point guidance.

Reads   OUT/stage1/renders; OUT/stage0/ guidance, coverage, novel_cameras.json; SCENE kept photos
Writes  OUT/stage2/ fixed/<name>.png, mask/<name>.png (255 where a point supports the pixel), confidence/<name>.png

Example
    python stage2_artifact_fix.py -m out/fern
    python stage2_artifact_fix.py -m out/fern --guidance-share 0.3 --overwrite
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from torch import Tensor
from tyro.conf import arg

from s2d.cameras import Cameras
from s2d.config import no_effect, run_script
from s2d.fixer.analytic import AnalyticFixer, MixMode
from s2d.images import image_writer, list_images, read_image
from s2d.log import logger, progress
from s2d.model_folder import copy_results, kept_views, render_name
from s2d.split import Split
from s2d.stage_io import Stage, open_stage, require_stage

RESULTS = ("fixed", "mask", "confidence")


@dataclass(frozen=True)
class Config:
    """Stage 2: clean pseudo views from novel renders and point guidance."""

    model_dir: Annotated[Path | None, arg(aliases=["-m"])] = no_effect(None)
    """Output folder OUT with stages 0 and 1. If left out, all folders below must be given and OUT is the one that holds --fixed-dir."""
    source: Annotated[Path | None, arg(aliases=["-s"])] = no_effect(None)
    """The scene; default: the one that stage 0 was run on."""
    fixer: Literal["analytic"] = "analytic"
    """analytic: mix the guidance into the render, no network."""
    guidance_share: float = 0.5
    """Share of the guidance in the mix where points project: 0 keeps the render."""
    mode: MixMode = "mask"
    """mask: mix where points project; global: everywhere, holes are black."""
    feather: float = 1.5
    """Softness of the mask's edge in pixels. 0 is hard."""
    match_gain: bool = False
    """Match the guidance's brightness to the render's before mixing."""
    base_model_path: str | None = None
    """Diffusion base model: not supported yet."""
    stage2_checkpoint: Path | None = None
    """Weights of the diffusion fixer: not supported yet."""
    stage1_meta_dir: Path | None = no_effect(None)
    """Folder of stage 1's index files; default OUT/stage1."""
    input_image_dir: Path | None = no_effect(None)
    """Folder of the input photos; default: those of the scene."""
    stage1_novel_render_dir: Path | None = no_effect(None)
    """Folder of the renders to fix; default OUT/stage1/renders."""
    point_guidance_dir: Path | None = no_effect(None)
    """Folder of the point guidance; default OUT/stage0/guidance. Coverage masks are looked for in `coverage` beside it."""
    fixed_dir: Path | None = no_effect(None)
    """Also copy the fixed views here."""
    fixed_mask_dir: Path | None = no_effect(None)
    """Also copy the masks here."""
    seed: int = no_effect(0)
    """The analytic fixer draws nothing at random; accepted because every stage is given one."""
    device: str = no_effect("cpu")
    """The analytic fixer takes milliseconds and always runs on the CPU."""
    overwrite: bool = no_effect(False)
    """Rebuild a finished stage 2."""


@dataclass(frozen=True)
class ViewFiles:
    """What the fixer reads for one novel view."""

    rendered: Path
    guidance: Path
    coverage: Path | None
    reference: Path


def main(cfg: Config) -> Path:
    """Run stage 2; returns OUT/stage2."""
    refuse_network(cfg)
    model_dir = output_folder(cfg)
    views = collect_views(cfg, model_dir)
    inputs = {
        part: [path for view in views.values() if (path := getattr(view, part)) is not None]
        for part in ("rendered", "guidance", "coverage")
    }
    inputs["references"] = sorted({view.reference for view in views.values()})
    inputs["pairs"] = {name: view.reference.name for name, view in views.items()}
    with open_stage(model_dir, "stage2", cfg, inputs, cfg.overwrite) as stage:
        if not stage.up_to_date:
            with stage.timer("fix"):
                fix_views(cfg, stage, views)
            stage.info["num_views"] = len(views)
    copy_results(stage.dir / "fixed", cfg.fixed_dir)
    copy_results(stage.dir / "mask", cfg.fixed_mask_dir)
    return model_dir / "stage2"


def fix_views(cfg: Config, stage: Stage, views: dict[str, ViewFiles]) -> None:
    """Fix every view; those that an interrupted run has finished are kept."""
    fixer = AnalyticFixer(cfg.guidance_share, cfg.mode, cfg.feather, cfg.match_gain)
    for part in RESULTS:
        (stage.scratch / part).mkdir(exist_ok=True)
    with image_writer() as write, progress(len(views), "stage 2") as bar:
        for done, (name, view) in enumerate(views.items(), start=1):
            targets = [stage.scratch / part / name for part in RESULTS]
            if not all(target.exists() for target in targets):
                guidance = read_image(view.guidance)
                coverage = read_coverage(view.coverage, guidance)
                result = fixer.fix(
                    read_image(view.rendered), guidance, coverage, read_image(view.reference)
                )
                for target, image in zip(
                    targets, (result.fixed, result.mask, result.confidence), strict=True
                ):
                    write(target, image)
            bar.update(done)
    for part in RESULTS:
        os.replace(stage.scratch / part, stage.dir / part)


def read_coverage(path: Path | None, guidance: Tensor) -> Tensor:
    """Return the coverage mask [H, W, 1]: stage 0's, else what is not black in the guidance."""
    if path is not None:
        return (read_image(path)[..., :1] > 0.5).float()
    return (guidance > 0).any(-1, keepdim=True).float()


def collect_views(cfg: Config, model_dir: Path) -> dict[str, ViewFiles]:
    """Pair every render with its guidance, coverage and reference photo, by name."""
    render_dir = cfg.stage1_novel_render_dir or require_stage(model_dir, "stage1").dir / "renders"
    guidance_dir = cfg.point_guidance_dir or require_stage(model_dir, "stage0").dir / "guidance"
    for folder in (render_dir, guidance_dir):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Folder not found: {folder}. Check the path, or give -m alone."
            )
    coverage_dir = guidance_dir.parent / "coverage"
    names = [name for name in list_images(render_dir) if name.endswith(".png")]
    missing = [name for name in names if not (guidance_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} renders in {render_dir} have no guidance in {guidance_dir} "
            f"(first: {missing[0]}). Run stages 0 and 1 on the same split."
        )
    if not names:
        logger.warning("stage2: there is nothing to fix: no render in %s", render_dir)
        return {}
    references = nearest_references(cfg, model_dir, names)
    return {
        name: ViewFiles(
            rendered=render_dir / name,
            guidance=guidance_dir / name,
            coverage=coverage_dir / name if (coverage_dir / name).is_file() else None,
            reference=references[name],
        )
        for name in names
    }


def nearest_references(cfg: Config, model_dir: Path, names: list[str]) -> dict[str, Path]:
    """Find the kept photo nearest to each novel view: by camera, or by index where there are no cameras."""
    stage0_dir = model_dir / "stage0"
    if (stage0_dir / "novel_cameras.json").is_file():
        stage0 = require_stage(model_dir, "stage0")
        source = cfg.source or Path(stage0.config["source"])
        kept = kept_views(source, stage0_dir, Split.load(stage0_dir / "split.json"))
        novel = Cameras.from_json(stage0_dir / "novel_cameras.json")
        rows = {
            render_name(name): row
            for name, row in zip(novel.names, novel.nearest(kept.cameras), strict=True)
        }
        return {name: kept.image_paths[rows[name]] for name in names}
    meta_dir = cfg.stage1_meta_dir or require_stage(model_dir, "stage1").dir
    if cfg.input_image_dir is None:
        raise ValueError(
            "The input photos are not known without stage 0. Give --input_image_dir, or -m OUT."
        )
    all_names = (meta_dir / "image_names.txt").read_text().splitlines()
    kept_rows = [int(row) for row in (meta_dir / "train_indices.txt").read_text().split()]
    row_of = {render_name(name): row for row, name in enumerate(all_names)}
    return {
        name: cfg.input_image_dir
        / all_names[min(kept_rows, key=lambda row: abs(row - row_of[name]))]
        for name in names
    }


def output_folder(cfg: Config) -> Path:
    if cfg.model_dir is not None:
        return cfg.model_dir
    if cfg.fixed_dir is None:
        raise ValueError("No output folder: neither -m nor --fixed_dir was given. Pass -m OUT.")
    return cfg.fixed_dir.absolute().parent


def refuse_network(cfg: Config) -> None:
    """Say so rather than fall back: who names a network wants its pictures, not the analytic mix."""
    given = [
        flag
        for flag, value in (
            ("--base-model-path", cfg.base_model_path),
            ("--stage2-checkpoint", cfg.stage2_checkpoint),
        )
        if value is not None
    ]
    if given:
        raise ValueError(
            f"{' and '.join(given)}: the diffusion fixer is not there yet. Leave the flag out to use --fixer analytic."
        )


if __name__ == "__main__":
    run_script(main, Config, "stage2_artifact_fix")
