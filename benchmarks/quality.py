"""What is each part worth: stages 1 to 3 with named variants of their settings, over scenes, numbers of kept views and seeds.

Every variant runs on the same stage 0 and with the same seeds, and is compared with the variant `default` of the same scene, so that what is easy
or hard about a scene cancels out; one that changes nothing of stage 1, or of stages 1 and 2, goes on from the default's. What is finished is not run again; the tables
hold every run that is there.

Reads   $S2D_DATA/scenes/<scene> (or --data-dir), configs/quality/<variants>.yaml
Writes  OUT_DIR/<scene>_<kept>_s<seed>/base, …/<variant>: model folders, and scores.json in each; prints tables (--table FILE: Markdown)

Example
    python tools/benchmark.py quality                                             # days on 2 cores: all scenes, 3 6 9 kept, 2 seeds
    python tools/benchmark.py quality --scale 0.25 --max-side 320 --last-stage 1 --scenes fern fox --keep 3 --only dropout_strong depth
"""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_type_hints

import yaml

import stage0_point_guidance as stage0
import stage1_3dgs_init as stage1
import stage2_artifact_fix as stage2
import stage3_3dgs_mixed_opt as stage3
from benchmarks.fixer import AS_SHIPPED, weights_for
from benchmarks.quality_tables import DEFAULT, Scores, tables
from benchmarks.results import Setting, find_scenes
from s2d.checks import check_range
from s2d.config import CONFIG_DIR, parse_config
from s2d.files import atomic_write_json, atomic_write_text
from s2d.gaussians import Gaussians
from s2d.images import read_image
from s2d.layers.score import score_views
from s2d.log import logger
from s2d.metrics import Lpips, Metrics, load_lpips, score
from s2d.model_folder import point_cloud_name, render_name
from s2d.optim import stage1_steps
from s2d.scene import Scene, load_scene
from s2d.scoring import mean_metrics
from s2d.split import Split
from s2d.stage_io import Manifest, require_stage

SCORES = "scores.json"
STAGES: dict[str, Any] = {"stage1": stage1, "stage2": stage2, "stage3": stage3}
NOVEL_PICTURES = {"stage1": "stage1/renders", "stage2": "stage2/fixed", "stage3": "stage3/renders"}


@dataclass(frozen=True)
class Quality:
    """Run variants of the stages' settings over scenes, view counts and seeds, and compare each with the defaults."""

    variants: str = "strategies"
    """A name in configs/quality/, or a file of your own: variant → flags of stages 1, 2 and 3; those of one alone below its name, as {stage3: {alpha: 1}}."""
    only: tuple[str, ...] = ()
    """Only these variants (and the default). Without: all of the file."""
    scenes: tuple[str, ...] = ("all",)
    """Names of scene folders; "all" is every folder."""
    keep: tuple[int, ...] = (3, 6, 9)
    """Numbers of kept views."""
    seeds: tuple[int, ...] = (0, 1)
    """Seeds of all stages."""
    last_stage: Literal[1, 3] = 3
    """1: score stage 1. 3: go on through stage 2 and score stage 3 and all pictures of novel views, too."""
    weights: tuple[str, ...] = ()
    """Compact weights and the scenes that they never saw, FILE:SCENE,SCENE: stage 2 repairs with them, and tries them as it does those that come with S2D. Without: the analytic mix, without trials."""
    scale: float = 1.0
    """Share of the default numbers of steps and of Gaussians: smaller is faster, and says less about the defaults."""
    max_side: int = 640
    """As in stage 0."""
    lpips: Literal["vgg", "alex", "none"] = "vgg"
    """Network of the perceptual score."""
    data_dir: Path | None = None
    """Folder with the scenes; $S2D_DATA/scenes if not given."""
    out_dir: Path = Path("out/quality")
    """Folder for the runs."""
    table: Path | None = None
    """Also write the tables here, as Markdown."""


def main(cfg: Quality) -> str:
    """Run what is missing, print the tables; returns them."""
    check_range("scale", cfg.scale, above=0, high=1)
    variants = read_variants(cfg)
    scenes = {path.name: path for path in find_scenes(cfg.data_dir, cfg.scenes)}
    settings = [Setting(name, keep) for keep in cfg.keep for name in scenes]
    network = None if cfg.lpips == "none" else load_lpips(cfg.lpips)
    scores: Scores = {}
    for seed in cfg.seeds:
        for setting in settings:
            for variant, flags in variants.items():
                found = run_variant(
                    cfg, scenes[setting.scene], setting, seed, variant, flags, network
                )
                scores.setdefault(setting, {}).setdefault(variant, {})[seed] = found
            if cfg.table is not None:
                atomic_write_text(cfg.table, tables(scores))
    text = tables(scores)
    print(text)
    return text


# -------------------------------------------------------------------------------------------------------------- variants


def read_variants(cfg: Quality) -> dict[str, dict[str, Any]]:
    """Read the variants that are asked for, the default first.

    Raises:
        FileNotFoundError: No such file.
        ValueError: Not a mapping of mappings, an unknown variant, or a flag that neither stage has.
    """
    path = Path(cfg.variants)
    if path.suffix not in (".yaml", ".yml"):
        path = CONFIG_DIR / "quality" / f"{cfg.variants}.yaml"
    if not path.is_file():
        raise FileNotFoundError(f"--variants: no file {path}. Give one of configs/quality/.")
    content = yaml.safe_load(path.read_text("utf-8"))
    is_nested = isinstance(content, dict) and all(
        isinstance(flags, dict) and all(isinstance(flags.get(name, {}), dict) for name in STAGES)
        for flags in content.values()
    )
    if not is_nested:
        raise ValueError(f"{path}: expected lines `variant: {{flag: value}}`.")
    known = set().union(*(flags_of(script.Config) for script in STAGES.values()))
    for variant, flags in content.items():
        unknown = [key for key in flags if key not in STAGES and key not in known]
        unknown += [
            f"{key} for {name}"
            for name in STAGES
            for key in flags.get(name, {})
            if key not in flags_of(STAGES[name].Config)
        ]
        if unknown:
            raise ValueError(
                f"{path}: {variant}: none of stages 1, 2 and 3 has a flag {unknown[0]}. See docs/strategies.md."
            )
    missing = [name for name in cfg.only if name not in content]
    if missing:
        raise ValueError(f"{path} has no variant {missing[0]}. Expected: {', '.join(content)}.")
    chosen = cfg.only or tuple(content)
    return {DEFAULT: {}} | {name: content[name] for name in content if name in chosen}


def own_flags(stage: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a variant's flags that are of one stage: what it has of them, and what stands below its name for it alone."""
    known = flags_of(STAGES[stage].Config)
    return {name: flags[name] for name in flags if name in known} | flags.get(stage, {})


def flags_of(config: type) -> set[str]:
    """Names of all flags of a script, those of its groups included."""
    names: set[str] = set()
    for name, hint in get_type_hints(config).items():
        names |= (
            {field.name for field in dataclasses.fields(hint)}
            if dataclasses.is_dataclass(hint)
            else {name}
        )
    return names


def scaled_flags(stage: str, scale: float, num_kept: int) -> dict[str, Any]:
    """A stage's schedule and budgets, scaled; nothing at scale 1."""
    if scale == 1:
        return {}
    config = STAGES[stage].Config
    default = {
        field.name: field.default
        for field in dataclasses.fields(config)
        if field.name != "strategy"
    }
    names = ("steps", "sh_degree_every", "max_init_points", "max_gaussians")
    flags = {name: round(scale * default[name]) for name in names if name in default}
    if stage == "stage1":
        flags["sample_iteration"] = round(scale * stage1_steps(num_kept))
    # Rounds closer than 25 steps apart would see too few views.
    return flags | {
        "densify_from": round(scale * 500),
        "densify_every": max(25, round(scale * 100)),
    }


def arguments(flags: Mapping[str, Any]) -> list[str]:
    """Write flags as a command line has them."""
    argv = []
    for key, value in flags.items():
        name = key.replace("_", "-")
        argv += (
            [f"--{name}" if value else f"--no-{name}"]
            if isinstance(value, bool)
            else [f"--{name}", str(value)]
        )
    return argv


# ------------------------------------------------------------------------------------------------------------------ runs


def run_variant(
    cfg: Quality,
    source: Path,
    setting: Setting,
    seed: int,
    variant: str,
    flags: Mapping[str, Any],
    network: Lpips | None,
) -> dict[str, Any]:
    """Run one variant, unless it is finished with these very settings; returns its scores, means over the test views."""
    folder = setting.folder(cfg.out_dir, seed)
    base, first, out = (folder / name for name in ("base", DEFAULT, variant))
    key = {
        "flags": dict(flags),
        "scale": cfg.scale,
        "max_side": cfg.max_side,
        "last_stage": cfg.last_stage,
        "lpips": cfg.lpips,
    }
    fixer = weights_for(cfg.weights, setting.scene)
    if fixer is not None:
        key["weights"] = str(fixer)
    path = out / SCORES
    if path.is_file():
        known = json.loads(path.read_text("utf-8"))
        if known["key"] == key:
            return known
    logger.info("== %s, seed %d: %s", setting, seed, variant)
    run_script(
        stage0,
        {
            "source": source,
            "model_dir": base,
            "eval": True,
            "keep_count": setting.keep,
            "max_side": cfg.max_side,
            "seed": seed,
        },
    )
    out.mkdir(parents=True, exist_ok=True)
    if not (out / "stage0").exists():
        (out / "stage0").symlink_to(Path("..") / "base" / "stage0")
    for name in ("stage1", "stage2"):
        if (out / name).is_symlink():  # of an earlier run with other flags
            (out / name).unlink()
    started = time.monotonic()
    common = {"source": source, "model_dir": out, "seed": seed, "overwrite": True}
    same_start = variant != DEFAULT and not own_flags("stage1", flags)
    last = (
        share_stage(first, out, "stage1")
        if same_start
        else train("stage1", cfg, common, flags, setting.keep)
    )
    found: dict[str, Any] = {"key": key}
    if cfg.last_stage == 3:
        if same_start:
            found["stage1"] = json.loads((first / SCORES).read_text("utf-8"))["stage1"]
        else:
            found["stage1"] = score_test(out, source, last.info["iteration"], network)
        if same_start and not own_flags("stage2", flags):
            share_stage(first, out, "stage2")
        else:
            repair(out, fixer, seed, flags)
        last = train("stage3", cfg, common, flags, setting.keep)
    found |= {
        "num_gaussians": last.info["num_gaussians"],
        "seconds": time.monotonic() - started,
        **score_test(out, source, last.info["iteration"], network),
        "novel": score_novel(out, source, network) if cfg.last_stage == 3 else {},
    }
    atomic_write_json(path, found)
    return found


def share_stage(first: Path, out: Path, name: str) -> Manifest:
    """Give a variant a stage of the default, of which it changes nothing."""
    shared = require_stage(first, name)
    mine = out / name
    if mine.exists():
        shutil.rmtree(mine)
    mine.symlink_to(Path("..") / first.name / name)
    for path in shared.extras:
        link = out / path.relative_to(first)
        link.parent.mkdir(parents=True, exist_ok=True)
        link.unlink(missing_ok=True)
        os.link(path, link)  # stages replace files as a whole, so that links are as good as copies
    return require_stage(out, name)


def repair(out: Path, weights: Path | None, seed: int, flags: Mapping[str, Any]) -> None:
    """Run stage 2 with those of the flags that it has; the weights are for the compact fixer."""
    mine = own_flags("stage2", flags)
    common = {"model_dir": out, "seed": seed, "overwrite": True}
    if weights is None:
        run_script(stage2, {**common, "fixer": "analytic", "trial_views": 0, **mine})
    elif mine.get("fixer", "compact") != "compact":
        run_script(stage2, {**common, **mine})
    else:
        known = {} if mine.get("trial_views") == 0 else AS_SHIPPED
        run_script(stage2, {**common, "weights": weights, **known, **mine})


def train(
    stage: str,
    cfg: Quality,
    common: Mapping[str, Any],
    flags: Mapping[str, Any],
    num_kept: int,
) -> Manifest:
    """Run stage 1 or 3 with its flags; returns its manifest."""
    scaled = scaled_flags(stage, cfg.scale, num_kept)
    folder = run_script(STAGES[stage], {**common, **scaled, **own_flags(stage, flags)})
    return require_stage(folder.parent, folder.name)


def run_script(script: Any, flags: Mapping[str, Any]) -> Path:
    """Call a stage's main with what its command line would say."""
    return script.main(parse_config(script.Config, script.__name__, arguments(flags)))


def score_test(out: Path, source: Path, step: int, network: Lpips | None) -> Metrics:
    """Score the splat at the test views; means over views."""
    scene, split = photos_of(out, source)
    gaussians = Gaussians.load_ply(out / point_cloud_name(step))
    scores = score_views(gaussians, scene.cameras.select(split.test), scene, 1.0, network)
    return {"lpips": None} | scores


def score_novel(out: Path, source: Path, network: Lpips | None) -> dict[str, Any]:
    """Score each stage's pictures of the novel views with photos that no stage has read; means over those that have one, nothing if none has."""
    scene, split = photos_of(out, source)
    networks = {} if network is None else {"lpips": network}
    views: dict[str, dict[str, Metrics]] = {stage: {} for stage in NOVEL_PICTURES}
    for name in sorted(set(split.novel) & set(scene.names)):
        photo = scene.image(name)
        for stage, folder in NOVEL_PICTURES.items():
            picture = read_image(out / folder / render_name(name))
            views[stage][name] = score(picture, photo, networks)
    means = {stage: mean_metrics(rows, ("psnr", "ssim", "lpips")) for stage, rows in views.items()}
    return {stage: mean for stage, mean in means.items() if mean is not None}


def photos_of(out: Path, source: Path) -> tuple[Scene, Split]:
    """The scene as stage 0 has prepared it, and what each of its photos is for."""
    prepared = out / "stage0" / "scene"
    scene = load_scene(prepared if prepared.is_dir() else source)
    return scene, Split.load(out / "stage0" / "split.json")
