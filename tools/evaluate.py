"""Score a run against the photos that its stages did not see, and write the report.

Reads   OUT/stage0 … stage3 (as far as they are finished), the point_cloud.ply of stages 1 and 3;
        SCENE: all photos. This is the only place that reads the photos of views that were not kept.
Writes  OUT/test/ours_<it>/{renders,gt}/ for stage 1 and the final model, test/guidance, test/coverage;
        OUT/results.json, per_view.json, report.html, with --sheet also test/sheet.png
        test/support, where the Gaussians know what holds them up (--support of stages 1 and 3)

Example
    python tools/evaluate.py -m out/fern
    python tools/evaluate.py -m out/fern --lpips alex            # VGG is most of the time on a CPU
    python tools/evaluate.py hier --help                         # hierarchical feed-forward Gaussians: s2d/hier_evaluation.py
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

import torch
from tyro.conf import arg

from s2d import hier_evaluation
from s2d.cameras import Cameras
from s2d.config import no_effect, run_script
from s2d.device import choose_device, run_on
from s2d.files import atomic_write_json
from s2d.gaussians import Gaussians
from s2d.guidance.cloud import SurfaceCloud
from s2d.guidance.render import render_cloud
from s2d.hier_evaluation import HierEvaluation
from s2d.images import image_writer
from s2d.log import logger, progress
from s2d.metrics import Lpips, LpipsUnavailable, load_lpips
from s2d.model_folder import render_name
from s2d.ply_io import read_support
from s2d.rasterize import cpus_for_kernels, keep_freed_memory, rasterize
from s2d.report import (
    ReportContent,
    StageRecord,
    TrialsRecord,
    ViewRecord,
    print_results,
    run_facts,
    write_report,
    write_sheet,
)
from s2d.report.support import support_overlay
from s2d.scene import load_scene
from s2d.scored_cameras import carried_cameras, load_truth, registered_cameras
from s2d.scoring import SCORED, Run, find_masks, score_views, scored_views, summarise
from s2d.split import Split
from s2d.stage_io import STAGE_SCRIPTS, Manifest, require_stage

STAGE_TITLES = {
    "stage0": "Stage 0: points, guidance",
    "stage1": "Stage 1: 3DGS",
    "stage2": "Stage 2: fix",
    "stage3": "Stage 3: mixed 3DGS",
}


@dataclass(frozen=True)
class Config:
    """Score a run on its test and novel views; write results.json, per_view.json and report.html."""

    model_dir: Annotated[Path, arg(aliases=["-m"])] = no_effect()
    """Output folder OUT of the run; at least stages 0 and 1 must have finished."""
    source: Annotated[Path | None, arg(aliases=["-s"])] = no_effect(None)
    """The scene, if it has moved since stage 0."""
    truth: Path | None = None
    """Score with the photos and cameras of this scene instead: for runs whose own cameras were estimated or made worse."""
    refine_test_cameras: bool = False
    """Also move each test camera to where its photo fits best before scoring: shows what a model lacks apart from its frame."""
    lpips: tuple[Literal["vgg", "alex"], ...] = ("vgg", "alex")
    """Networks to compute LPIPS with; their weights are looked for, then downloaded once (see docs/evaluation.md)."""
    sheet: bool = False
    """Also write OUT/test/sheet.png, a contact sheet of all views."""
    mask_dir: Path | None = None
    """Folder with a picture per scored view that is black where nothing is scored (docs/evaluation.md)."""
    max_report_mb: float = 14.0
    """Largest report.html in megabytes: where the pictures of all views do not fit, some are left out."""
    device: str = "auto"
    """Where to draw and to compute LPIPS: auto (a GPU if one can be used, else the CPU), cpu, cuda or cuda:N."""


def main(cfg: Config) -> Path:
    """Evaluate; returns OUT/report.html."""
    return run_on(choose_device(cfg.device), partial(evaluate, cfg))


def evaluate(cfg: Config, device: torch.device) -> Path:
    """Do all of it on a device."""
    run = open_run(cfg)
    nets, notes = load_networks(cfg.lpips, device)
    render_test_views(run, cfg.refine_test_cameras, device)
    collect_novel_views(run)
    draw_support_overlays(run, device)
    if cfg.mask_dir is not None:
        run.masks = find_masks(cfg.mask_dir, scored_views(run))
    per_view = score_views(run, nets)
    results = summarise(run, per_view)
    atomic_write_json(cfg.model_dir / "per_view.json", per_view)
    atomic_write_json(cfg.model_dir / "results.json", results)
    content = report_content(run, results, per_view, notes)
    if cfg.sheet:
        write_sheet(cfg.model_dir / "test" / "sheet.png", content.views)
    print_results(results)
    return write_report(cfg.model_dir / "report.html", content, cfg.max_report_mb)


# ------------------------------------------------------------------------------------------------------------ what there is


def open_run(cfg: Config) -> Run:
    """Read the manifests, the split and all photos of the scene."""
    manifests = {name: require_stage(cfg.model_dir, name) for name in ("stage0", "stage1")}
    for name in ("stage2", "stage3"):
        try:
            manifests[name] = require_stage(cfg.model_dir, name)
        except FileNotFoundError:
            logger.warning("evaluate: %s is not finished; the results end before it", name)
            break
    stage0 = manifests["stage0"]
    prepared = stage0.dir / "scene"
    source = prepared if prepared.is_dir() else cfg.source or Path(stage0.config["source"])
    original = Path(stage0.config["source"]).resolve()
    scene = load_scene(source)
    scene = replace(scene, name=(original.parent if original.suffix == ".json" else original).name)
    split = Split.load(stage0.dir / "split.json")
    missing = [name for name in (*split.kept, *split.test) if name not in scene.names]
    if missing:
        raise ValueError(
            f"{len(missing)} of the views that {stage0.dir} was made with are not in {source} (first: {missing[0]}). "
            "Expected the same scene. Pass it with -s, or run stage 0 again."
        )
    given = scene.cameras.select(split.kept)
    if cfg.truth is not None:
        scene, split = load_truth(cfg.truth, split)
    novel_cameras = Cameras.from_json(stage0.dir / "novel_cameras.json")
    return Run(cfg.model_dir, manifests, split, scene, given, novel_cameras)


def load_networks(names: Sequence[str], device: torch.device) -> tuple[dict[str, Lpips], list[str]]:
    """Load the LPIPS networks that can be had onto a device; a note says what is missing."""
    networks, notes = {}, []
    for name in names:
        try:
            networks[f"lpips_{name}"] = load_lpips(name).to(device)
        except LpipsUnavailable as error:
            logger.warning("%s", error)
            notes.append(str(error))
    return networks, notes


# -------------------------------------------------------------------------------------------------------------- pictures


def render_test_views(run: Run, refine_cameras: bool, device: torch.device) -> None:
    """Render the test cameras from the splats of stages 1 and 3, beside the photos at 8 bits."""
    models = {"stage1": load_splat(run.manifests["stage1"])}
    if "stage3" in run.manifests:
        models["stage3"] = load_splat(run.manifests["stage3"])
    run.test = {name: {} for name in run.split.test}
    for stage, model in models.items():
        gaussians = model.to(device)
        cameras = test_cameras(run, stage)
        if refine_cameras:
            cameras = registered_cameras(gaussians, cameras, run.scene.image, run.given)
            run.placements[stage] = "each moved to where its photo fits best"
        folder = run.model_dir / "test" / f"ours_{run.manifests[stage].info['iteration']}"
        keep_freed_memory()  # scoring asks for one large block after the other
        with (
            cpus_for_kernels(),
            image_writer() as write,
            progress(len(cameras), f"test views, {stage}") as bar,
        ):
            for done, camera in enumerate(cameras, start=1):
                name = camera.names[0]
                photo = folder / "gt" / render_name(name)
                picture = folder / "renders" / render_name(name)
                write(photo, run.truth(name))
                write(picture, rasterize(gaussians, camera).rgb[0].cpu())
                run.test[name] |= {"truth": photo, stage: picture}
                bar.update(done)
    add_test_guidance(run, test_cameras(run, "stage0"))


def test_cameras(run: Run, stage: str) -> Cameras:
    """Return the test cameras in the frame of what a stage has made."""
    test = run.scene.cameras.select(run.split.test)
    cameras, fit = carried_cameras(test, run.scene.cameras, kept_cameras(run, stage))
    if fit is not None:
        run.placements[stage] = f"aligned to the run's by its kept photos ({fit})"
        logger.info("evaluate: %s: test cameras %s", stage, run.placements[stage])
    return cameras


def kept_cameras(run: Run, stage: str) -> Cameras:
    """Return the kept cameras that what a stage has made belongs to."""
    path = run.manifests[stage].dir / "kept_cameras.json"
    return Cameras.from_json(path) if path.is_file() else run.given


def load_splat(manifest: Manifest) -> Gaussians:
    """Read what a stage leaves for viewers: what is scored is what people see, the backdrop too."""
    return Gaussians.load_ply(splat_path(manifest))


def splat_path(manifest: Manifest) -> Path:
    return next(path for path in manifest.extras if path.name == "point_cloud.ply")


def add_test_guidance(run: Run, cameras: Cameras) -> None:
    """Find the point guidance at the test cameras; where stage 0 had no business to render it, render it here."""
    stage0, stage2 = run.manifests["stage0"], run.manifests.get("stage2")
    unseen = [name for name in cameras.names if name not in run.novel_cameras.names]
    guidance_dir = run.model_dir / "test" / "guidance"
    coverage_dir = run.model_dir / "test" / "coverage"
    if unseen:
        cloud = SurfaceCloud.load(stage0.dir / "surface.npz")
    with image_writer() as write:
        for camera in cameras.select(unseen):
            guidance = render_cloud(cloud, camera)
            write(guidance_dir / render_name(camera.names[0]), guidance.rgb)
            write(coverage_dir / render_name(camera.names[0]), guidance.coverage.float())
    for name in cameras.names:
        picture = render_name(name)
        if name in unseen:
            run.test[name]["guidance"] = guidance_dir / picture
            run.coverage[name] = coverage_dir / picture
            continue
        run.test[name]["guidance"] = stage0.dir / "guidance" / picture
        run.coverage[name] = stage0.dir / "coverage" / picture
        if stage2 is not None and (fixed := stage2.dir / "fixed" / picture).is_file():
            run.test[name]["fixed"] = fixed  # else the rounds did not reach it


def collect_novel_views(run: Run) -> None:
    """Gather what the stages made at the novel cameras."""
    folders = {
        "stage1": ("stage1", "renders"),
        "guidance": ("stage0", "guidance"),
        "fixed": ("stage2", "fixed"),
        "stage3": ("stage3", "renders"),
    }
    for name in run.novel_cameras.names:
        columns = {}
        if name in run.scene.names:
            columns["truth"] = run.scene.image_paths[run.scene.names.index(name)]
        for column, (stage, folder) in folders.items():
            if stage in run.manifests:
                columns[column] = run.manifests[stage].dir / folder / render_name(name)
        if "fixed" in columns and not columns["fixed"].is_file():  # the rounds did not reach it
            del columns["fixed"]
        run.novel[name] = columns
        run.coverage[name] = run.manifests["stage0"].dir / "coverage" / render_name(name)


def draw_support_overlays(run: Run, device: torch.device) -> None:
    """Paint every view of the last model by what holds it up, where its splat says so."""
    stage = "stage3" if "stage3" in run.manifests else "stage1"
    splat = splat_path(run.manifests[stage])
    support = read_support(splat)
    if support is None:
        return
    gaussians, support = Gaussians.load_ply(splat).to(device), support.to(device)
    novel, _ = carried_cameras(run.novel_cameras, run.given, kept_cameras(run, stage))
    test = test_cameras(run, stage)
    cameras = Cameras.cat([test, novel.select([n for n in novel.names if n not in test.names])])
    with cpus_for_kernels(), image_writer() as write:
        for camera in cameras:
            name = camera.names[0]
            picture = run.model_dir / "test" / "support" / render_name(name)
            write(picture, support_overlay(gaussians, support, camera))
            for views in (run.test, run.novel):
                if name in views:
                    views[name]["support"] = picture


# ------------------------------------------------------------------------------------------------------------ for people


def report_content(run: Run, results: dict, per_view: dict, notes: Sequence[str]) -> ReportContent:
    """Gather what the report shows."""
    missing = [stage for stage in STAGE_SCRIPTS if stage not in run.manifests]
    if missing:
        notes = [
            f"This run is not finished: {missing[0]} is missing. Next: python {STAGE_SCRIPTS[missing[0]]} -m {run.model_dir}",
            *notes,
        ]
    notes = [*notes, *(f"Test cameras of {stage}: {how}." for stage, how in run.placements.items())]
    last = run.manifests.get("stage3", run.manifests["stage1"])
    ply = splat_path(last)
    top_view = run.manifests["stage0"].dir / "cameras.png"
    kept = {name: run.scene.image_paths[run.scene.names.index(name)] for name in run.split.kept}
    return ReportContent(
        results=results,
        kept=kept,
        views=[view_record(run, per_view, name) for name in sorted({*run.test, *run.novel})],
        stages=[
            StageRecord.of_manifest(stage, STAGE_TITLES[stage], manifest)
            for stage, manifest in run.manifests.items()
        ],
        facts=run_facts(run.manifests),
        notes=notes,
        top_view=top_view if top_view.is_file() else None,
        trials=TrialsRecord.of_manifest(run.manifests["stage2"])
        if "stage2" in run.manifests
        else None,
        ply_path=ply.relative_to(run.model_dir).as_posix(),
    )


def view_record(run: Run, per_view: dict, name: str) -> ViewRecord:
    groups = {"test": run.test, "novel": run.novel}
    roles = tuple(group for group, views in groups.items() if name in views)
    metrics = {}
    for group in roles:
        for stage, column in (*SCORED.items(), ("guidance", "guidance")):
            if name in per_view[stage][group]:
                metrics[column] = per_view[stage][group][name]
    return ViewRecord(name, roles, groups[roles[0]][name], run.coverage.get(name), metrics)


if __name__ == "__main__":
    if sys.argv[1:2] == ["hier"]:
        run_script(hier_evaluation.main, HierEvaluation, "evaluate_hier", sys.argv[2:])
    else:
        run_script(main, Config, "evaluate")
