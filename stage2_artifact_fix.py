"""Stage 2: turn each novel render (with artifacts) into a clean pseudo view, helped by the point guidance and the nearest kept photo.

Reads   OUT/stage1/members, each model's renders, or where there is one model OUT/stage1/renders (from the second round on those of the round before); OUT/stage0/ guidance, coverage, novel_cameras.json; SCENE kept photos; the fixer's weights
Writes  OUT/stage2/ fixed/<name>.png, mask/<name>.png (255 where a point supports the pixel), confidence/<name>.png
        trials.json, trials/<name>_{truth,render,guidance,coverage,fixed,calibrated}.png

First the fixer is tried on kept photos that a fit has not seen: how much of its change is kept, down to none, and how far a pixel
is to be trusted, is learned there. A view whose three pictures are complete is not computed again after an interruption. On a GPU several
views pass through a network at once. With several processes each takes a share of the views; the files are the same.

Example
    python stage2_artifact_fix.py -m out/fern
    python stage2_artifact_fix.py -m out/fern --fixer analytic --guidance-share 0.3 --trial-views 0 --overwrite
    accelerate launch stage2_artifact_fix.py -m out/fern --fixer difix --stage2-checkpoint model_final.pkl
"""

import dataclasses
import hashlib
import json
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import arg

from s2d.cameras import Cameras
from s2d.checks import check_range
from s2d.config import no_effect, run_script
from s2d.device import Precision
from s2d.ensemble import mean_pictures, member_folders
from s2d.fixer.adaptation import AdaptSettings, check_adaptation
from s2d.fixer.analytic import MixMode
from s2d.fixer.calibration import Expectation
from s2d.fixer.choice import DEFAULTS, FixerChoice, FixerName, choose_fixer, recorded_precision
from s2d.fixer.guidance_check import GuidanceCheck
from s2d.fixer.judge import Verdict, judge, publish
from s2d.fixer.near_views import distance_shares, write_faded
from s2d.fixer.novel_views import (
    RESULTS,
    Plan,
    ViewFiles,
    fix_views,
    of_each_model,
    unfinished_views,
)
from s2d.fixer.processes import Processes, join_processes
from s2d.fixer.references import photos_by_camera, photos_by_index
from s2d.images import list_images
from s2d.log import logger
from s2d.model_folder import copy_results, kept_views, render_name
from s2d.novel.rounds import (
    Reach,
    Round,
    is_left_out,
    previous_stage,
    reach_of,
    take_over_trials,
)
from s2d.pairs.trials import MIN_KEPT, TrialSettings
from s2d.scene import Scene
from s2d.split import Split
from s2d.stage_io import Stage, open_stage, require_stage


@dataclass(frozen=True)
class Config:
    """Stage 2: clean pseudo views from novel renders and point guidance."""

    model_dir: Annotated[Path | None, arg(aliases=["-m"])] = no_effect(None)
    """Output folder OUT with stages 0 and 1. If left out, all folders below must be given and OUT is the one that holds --fixed-dir."""
    source: Annotated[Path | None, arg(aliases=["-s"])] = no_effect(None)
    """The scene; default: the one that stage 0 was run on."""

    # What the fixer is resolved to is hashed as an input, with all its settings and the content of its weights.
    fixer: FixerName | None = no_effect(None)
    """analytic: mix the guidance into the render, no network. compact: the small network. difix: a diffusion base. Default: what the weights below are for, else compact if its weights come with this copy of S2D, else analytic."""
    weights: Path | None = no_effect(None)
    """compact: its safetensors file. Default: the one that comes with S2D."""
    base_model_path: str | None = no_effect(None)
    """difix: folder of nvidia/difix_ref or stabilityai/sd-turbo, or such a name if `hf download` has fetched it. Default: nvidia/difix_ref."""
    stage2_checkpoint: Path | None = no_effect(None)
    """difix: trained weights (.pkl of S2D, Difix, img2img-turbo or train_artifact_fixer.py). Default: the base model as it is."""
    num_references: int | None = no_effect(None)
    """compact, difix: how many of the nearest kept photos the network looks at. Default: 1."""
    precision: Precision | None = no_effect(None)
    """compact, difix: number format of the network. Default: bf16 on a GPU that computes in it, else fp32; where this stage was made or begun before, that of then."""
    tile_size: int | None = no_effect(None)
    """compact, difix: longest side in pixels that runs in one piece; smaller takes less memory. Default: 1536, difix 1024."""
    compile: bool = no_effect(False)
    """compact, difix: compile the network with torch.compile, on a GPU alone; it takes long before the first view, so it is for very many. Where it does not work, a warning says so."""
    network_size: int | None = no_effect(None)
    """difix: run at this square size and resize back; S2D's released weights were trained at 512. Default: the image's size."""
    guidance_share: float | None = no_effect(None)
    """analytic: share of the guidance in the mix where points project; 0 keeps the render. Default: 0.5."""
    mode: MixMode | None = no_effect(None)
    """analytic: mask mixes where points project, global everywhere, holes are black. Default: mask."""
    feather: float | None = no_effect(None)
    """analytic: softness of the mask's edge in pixels; 0 is hard. Default: 1.5."""
    match_gain: bool = no_effect(False)
    """analytic: match the guidance's brightness to the render's before mixing."""

    # Hashed by what it reads.
    check_guidance: bool = no_effect(True)
    """Leave out guidance whose points are behind something that has none, as kept photos and the render show. Of stage 0's own guidance alone."""

    fix_models: Literal["auto", "each", "mean"] = no_effect("auto")
    """Where stage 1 has several models. each: fix every model's renders, and take the mean. mean: fix the mean of the renders, as much work as for one model, and not as good. auto: each, but with difix, which takes long, mean."""

    # Where trials can be made, these are hashed as an input.
    trial_views: int = no_effect(3)
    """Try the fixer on so many kept photos, each left out of a fit: what helps there is kept, the rest is not. 0: use the fixer as it is."""
    trial_steps: int = no_effect(600)
    """Optimisation steps of each trial's fit."""
    fade_near: bool = no_effect(True)
    """Keep less of the change in novel views that are nearer to a kept photo than trials are, where stage 1's models agree."""
    adapt_steps: int = no_effect(0)
    """compact: train the network for so many steps on the trials, if that helps on those it is not trained on. 0: leave it as it is."""
    expected_gain: float | None = no_effect(None)
    """dB that the fixer gains on scenes its weights never saw, as you have measured it: the trials, few, are weighed against that. Default: what is known of the weights that come with S2D; 0 for others."""
    expected_spread: float | None = no_effect(None)
    """Standard deviation of that gain over scenes, dB: the smaller, the less the trials count. Only with --expected-gain. Default: 0.5."""

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
    round: str = no_effect("1/1")
    """Work outward in rounds, 1/2 and then 2/2, each with stages 2 and 3 (docs/stage0.md): 1/2 takes the novel views next to the kept ones."""
    seed: int = no_effect(0)
    """Seed of the trials' fits and of the adaptation; no fixer draws anything at random."""
    device: str = no_effect("auto")
    """Where the network and the trials' fits run: auto (a GPU if one can be used, else the CPU), cpu, cuda, cuda:1 ... The analytic fixer takes milliseconds and always runs on the CPU."""
    overwrite: bool = no_effect(False)
    """Rebuild a finished stage 2."""


def main(cfg: Config) -> Path:
    """Run stage 2; returns OUT/stage2, of a round before the last OUT/stage2_round<number>."""
    model_dir = output_folder(cfg)
    at = Round.parse(cfg.round)
    at.refuse(
        stage1_novel_render_dir=cfg.stage1_novel_render_dir,
        point_guidance_dir=cfg.point_guidance_dir,
    )
    with join_processes() as processes:
        if processes.is_first:
            run_stage(cfg, model_dir, processes, at)
        else:
            logger.setLevel(logging.ERROR)  # the first one speaks for all
            plan = processes.share_plan()
            if plan is not None:
                fix_views(plan, processes, cfg.device)
    return model_dir / f"stage2{at.suffix}"


def run_stage(cfg: Config, model_dir: Path, processes: Processes, at: Round) -> None:
    """Plan the stage, do this process's share, put everything in its place."""
    reach = None
    if at.count > 1:
        reach = reach_of(model_dir, at, cfg.source)
        if is_left_out(at, reach):
            return
    choice = choose_fixer(
        cfg.fixer, {flag: getattr(cfg, flag) for known in DEFAULTS.values() for flag in known}
    )
    recorded = recorded_precision(model_dir / f"stage2{at.suffix}", choice.name, cfg.overwrite)
    choice = choice.with_precision(recorded, cfg.device)
    choice = choice.with_expectation(cfg.expected_gain, cfg.expected_spread)
    stage0 = Stage0.of(cfg, model_dir)
    views = collect_views(cfg, model_dir, stage0, choice.num_references, at, reach)
    models = models_to_fix(cfg, choice.name, model_dir, reach) if views else []
    tried = bool(views) and has_trials(cfg, stage0)
    check = guidance_check(cfg, stage0) if views else None
    check_adaptation(cfg.adapt_steps, choice.name, has_trials=tried)
    if views and not tried and choice.known is not None:
        raise ValueError(
            "--expected-gain: no effect without trials, which are weighed against it. Leave it out."
        )
    inputs = choice.inputs() | view_inputs(views)
    near = near_shares(cfg, stage0) if models and tried else {}
    if models:
        inputs["models"] = [model / name for model in models for name in views]
        inputs["near views faded"] = bool(near)
    if tried:
        inputs |= trial_inputs(cfg, stage0.kept, choice.known)
    if check is not None:
        inputs["guidance check"] = check.files
    if tried or check is not None:
        inputs["kept photos"] = list(stage0.kept.image_paths)
    if reach is not None:
        inputs["round"] = cfg.round
    with open_stage(model_dir, f"stage2{at.suffix}", cfg, inputs, cfg.overwrite) as stage:
        if not stage.up_to_date:
            logger.info("fixer: %s", choice.describe())
            verdict = Verdict(choice)
            if tried:
                take_over_trials(model_dir, at, stage.scratch)
                with stage.timer("trials"):
                    verdict = try_fixer(cfg, choice, stage0, stage, check is not None)
            if check is not None:
                with stage.timer("check"):
                    views, stage.info["hidden_share"] = check.run(views, stage.scratch)
            with stage.timer("fix"):
                renders = of_each_model(views, models) if models else views
                todo = unfinished_views(renders, stage.scratch)
                plan = Plan(verdict, todo, len(renders) - len(todo), stage.scratch)
                fix_views(processes.share_plan(plan), processes, cfg.device)
            gather_results(stage, models, near)
            publish(verdict, stage.scratch, stage.dir)
            stage.info |= {"num_views": len(views), "fixer": choice.name}
            if verdict.summary is not None:
                stage.info["decision"] = verdict.summary["decision"]
                stage.info["calibrated"] = verdict.calibration is not None
    copy_results(stage.dir / "fixed", cfg.fixed_dir)
    copy_results(stage.dir / "mask", cfg.fixed_mask_dir)


def try_fixer(
    cfg: Config, choice: FixerChoice, stage0: "Stage0", stage: Stage, check_guidance: bool
) -> Verdict:
    """Try the fixer on kept photos that are left out, adapted to them first where that is asked for."""
    settings = TrialSettings(cfg.trial_views, cfg.trial_steps, cfg.seed, check_guidance)
    adapting = AdaptSettings(cfg.adapt_steps, cfg.seed) if cfg.adapt_steps else None
    return judge(choice, stage0.kept, stage0.source, settings, adapting, stage.scratch, cfg.device)


def near_shares(cfg: Config, stage0: "Stage0") -> dict[str, float]:
    """The least share of the change that is kept in each novel view, by the name of its pictures; nothing if all is kept."""
    if not cfg.fade_near:
        return {}
    shares = distance_shares(stage0.novel, stage0.kept.cameras).tolist()
    return {
        render_name(name): share for name, share in zip(stage0.novel.names, shares, strict=True)
    }


def gather_results(stage: Stage, models: Sequence[Path], near: Mapping[str, float]) -> None:
    """Put the finished pictures in their place: of several models their mean, less changed where the view is near."""
    for part in RESULTS:
        for leftover in (stage.scratch / part).rglob(".*.tmp"):  # of a run that was killed
            leftover.unlink()
        folders = [stage.scratch / part / model.name for model in models]
        if models and near and part == "fixed":
            write_faded(models, folders, near, stage.dir / part)
        elif models:
            mean_pictures(folders, stage.dir / part)
        else:
            os.replace(stage.scratch / part, stage.dir / part)


@dataclass(frozen=True)
class Stage0:
    """What a finished stage 0 knows of the views."""

    dir: Path
    provider: str
    source: Path
    """The scene that the kept views are of."""
    kept: Scene
    novel: Cameras

    @classmethod
    def of(cls, cfg: Config, model_dir: Path) -> "Stage0 | None":
        """Read it, or None where there are no cameras."""
        if not (model_dir / "stage0/novel_cameras.json").is_file():
            return None
        stage0 = require_stage(model_dir, "stage0")
        source = cfg.source or Path(stage0.config["source"])
        prepared = stage0.dir / "scene"
        return cls(
            dir=stage0.dir,
            provider=stage0.config["provider"],
            source=prepared if prepared.is_dir() else source,
            kept=kept_views(source, stage0.dir, Split.load(stage0.dir / "split.json")),
            novel=Cameras.from_json(stage0.dir / "novel_cameras.json"),
        )


def collect_views(
    cfg: Config,
    model_dir: Path,
    stage0: Stage0 | None,
    num_references: int,
    at: Round,
    reach: Reach | None,
) -> dict[str, ViewFiles]:
    """Pair every render with its guidance, coverage and reference photos, by name."""
    if reach is not None and reach.previous > 0:
        render_dir = previous_stage(model_dir, at, reach).dir / "renders"
    else:
        render_dir = (
            cfg.stage1_novel_render_dir or require_stage(model_dir, "stage1").dir / "renders"
        )
    guidance_dir = cfg.point_guidance_dir or require_stage(model_dir, "stage0").dir / "guidance"
    for folder in (render_dir, guidance_dir):
        if not folder.is_dir():
            raise FileNotFoundError(
                f"Folder not found: {folder}. Check the path, or give -m alone."
            )
    coverage_dir = guidance_dir.parent / "coverage"
    names = [name for name in list_images(render_dir) if name.endswith(".png")]
    if reach is not None:
        reached = {render_name(name) for name in reach.names}
        names = [name for name in names if name in reached]
    missing = [name for name in names if not (guidance_dir / name).is_file()]
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} of {len(names)} renders in {render_dir} have no guidance in {guidance_dir} "
            f"(first: {missing[0]}). Run stages 0 and 1 on the same split."
        )
    if not names:
        logger.warning("stage2: there is nothing to fix: no render in %s", render_dir)
        return {}
    references = nearest_references(cfg, model_dir, stage0, names, num_references)
    return {
        name: ViewFiles(
            rendered=render_dir / name,
            guidance=guidance_dir / name,
            coverage=coverage_dir / name if (coverage_dir / name).is_file() else None,
            references=references[name],
        )
        for name in names
    }


def models_to_fix(
    cfg: Config, fixer: FixerName, model_dir: Path, reach: Reach | None
) -> list[Path]:
    """Folders with the renders of each of stage 1's models, if these are what is fixed; else none."""
    wanted = cfg.fix_models
    if wanted == "auto":
        wanted = "mean" if fixer == "difix" else "each"
    if (
        wanted == "mean"
        or cfg.stage1_novel_render_dir is not None
        or (reach is not None and reach.previous > 0)
    ):
        return []
    return member_folders(require_stage(model_dir, "stage1").dir)


def has_trials(cfg: Config, stage0: Stage0 | None) -> bool:
    """Whether trials are wanted, and can be made of the kept photos."""
    check_range("trial_views", cfg.trial_views, 0)
    check_range("trial_steps", cfg.trial_steps, 1)
    if cfg.trial_views == 0:
        return False
    if stage0 is None:
        logger.info("no trials: without stage 0 the cameras of the kept photos are not known")
        return False
    if stage0.provider != "mvs":
        logger.info("no trials: the points of stage 0 were not made from the kept photos")
        return False
    if len(stage0.kept) < MIN_KEPT:
        logger.info(
            "no trials: %d kept photos, and leaving one out takes %d", len(stage0.kept), MIN_KEPT
        )
        return False
    return True


def guidance_check(cfg: Config, stage0: Stage0 | None) -> GuidanceCheck | None:
    """What the guidance is checked against, or None where it is not."""
    if (
        not cfg.check_guidance
        or cfg.point_guidance_dir is not None
        or stage0 is None
        or not (stage0.dir / "surface.npz").is_file()
    ):
        return None
    return GuidanceCheck(stage0.kept, stage0.novel, stage0.dir)


def nearest_references(
    cfg: Config, model_dir: Path, stage0: Stage0 | None, names: Sequence[str], count: int
) -> dict[str, tuple[Path, ...]]:
    """Find the kept photos nearest to each novel view: by camera, or by index where there are no cameras."""
    if stage0 is not None:
        photos = photos_by_camera(stage0.novel, stage0.kept, count)
        where = stage0.dir / "novel_cameras.json"
    else:
        meta_dir = cfg.stage1_meta_dir or require_stage(model_dir, "stage1").dir
        if cfg.input_image_dir is None:
            raise ValueError(
                "The input photos are not known without stage 0. Give --input_image_dir, or -m OUT."
            )
        photos = photos_by_index(meta_dir, cfg.input_image_dir, count)
        where = meta_dir / "image_names.txt"
    if unknown := [name for name in names if name not in photos]:
        raise ValueError(
            f"{len(unknown)} of {len(names)} renders are of no view in {where} (first: {unknown[0]}). "
            "Remove them, or run stages 0 and 1 on the same split."
        )
    return photos


def view_inputs(views: Mapping[str, ViewFiles]) -> dict[str, Any]:
    """What the stage's hash has of the views: their pictures, and which photos go with which."""
    pairs = [[name, *(path.name for path in view.references)] for name, view in views.items()]
    inputs: dict[str, Any] = {
        "references": sorted({path for view in views.values() for path in view.references}),
        "pairs": hashlib.sha256(json.dumps(pairs).encode()).hexdigest(),
    }
    for part in ("rendered", "guidance", "coverage"):
        files = [getattr(view, part) for view in views.values()]
        inputs[part] = [path for path in files if path is not None]
    return inputs


def trial_inputs(cfg: Config, kept: Scene, known: Expectation | None) -> dict[str, Any]:
    """What the stage's hash has of the trials."""
    settings = {
        "views": cfg.trial_views,
        "steps": cfg.trial_steps,
        "adapt_steps": cfg.adapt_steps,
        "seed": cfg.seed,
    }
    return {
        "kept cameras": hashlib.sha256(kept.cameras.to_json().encode()).hexdigest(),
        "trials": settings if known is None else settings | {"expected": dataclasses.asdict(known)},
    }


def output_folder(cfg: Config) -> Path:
    if cfg.model_dir is not None:
        return cfg.model_dir
    if cfg.fixed_dir is None:
        raise ValueError("No output folder: neither -m nor --fixed_dir was given. Pass -m OUT.")
    return cfg.fixed_dir.absolute().parent


if __name__ == "__main__":
    run_script(main, Config, "stage2_artifact_fix")
