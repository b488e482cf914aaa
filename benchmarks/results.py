"""Run the whole pipeline over scenes × kept counts × seeds with `--eval`, and write docs/results.md from what it scored.

What is finished is not run again, so the command can be stopped and repeated; the table holds every setting that was asked for and is there.

Reads   $S2D_DATA/scenes/<scene> (or --data-dir), benchmarks/results_notes.md (what people saw in the pictures)
Writes  OUT_DIR/<scene>_<kept>_s<seed>/ (a model folder each), OUT_DIR/sheets/*.png with --sheets; docs/results.md

Example
    python benchmarks/results.py --sheets                                    # fern, fox, kitchen, sceaux; 3 and 6 kept; hours on 2 cores
    python benchmarks/results.py --scenes all --keep 3 --seeds 0 1 2
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(
    0, str(Path(__file__).resolve().parent.parent)
)  # run from anywhere: the library is not installed

from benchmarks.fixer import AS_SHIPPED, weights_for
from s2d.config import no_effect, run_script
from s2d.files import atomic_write_json, atomic_write_text
from s2d.log import describe_machine, logger, versions
from s2d.report.charts import megabytes_text, seconds_text

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    "stage0_point_guidance",
    "stage1_3dgs_init",
    "stage2_artifact_fix",
    "stage3_3dgs_mixed_opt",
)
METRICS = (
    ("psnr", "PSNR", 2),
    ("ssim", "SSIM", 3),
    ("lpips_vgg", "LPIPS VGG", 3),
    ("lpips_alex", "LPIPS Alex", 3),
)
STAGE_NAMES = {"stage1": "stage 1", "stage2": "fixed", "stage3": "final"}
NOTES = ROOT / "benchmarks" / "results_notes.md"


@dataclass(frozen=True)
class Config:
    """Run scenes × kept counts × seeds with --eval and write the results table."""

    scenes: tuple[str, ...] = ("fern", "fox", "kitchen", "sceaux")
    """Names of scene folders; "all" is every folder."""
    keep: tuple[int, ...] = (3, 6)
    """Numbers of kept views."""
    seeds: tuple[int, ...] = (0,)
    """Seeds; with more than one the table shows mean ± standard deviation."""
    weights: tuple[str, ...] = ()
    """Compact weights and the scenes that they never saw, FILE:SCENE,SCENE, of which as much is expected as of those that come with S2D. Without: the analytic mix, since the shipped weights were trained on the example scenes."""
    stage_preset: str | None = None
    """Preset of every stage that has one by this name."""
    data_dir: Path | None = no_effect(None)
    """Folder with the scenes; $S2D_DATA/scenes if not given."""
    out_dir: Path = no_effect(ROOT / "out" / "results")
    """Folder for the model folders."""
    table: Path = no_effect(ROOT / "docs" / "results.md")
    """The table to write."""
    sheets: bool = False
    """Also write a contact sheet per run."""
    overwrite: bool = False
    """Run everything anew."""


@dataclass(frozen=True)
class Setting:
    """A scene with a number of kept views, over all seeds."""

    scene: str
    keep: int

    def folder(self, out_dir: Path, seed: int) -> Path:
        return out_dir / f"{self.scene}_{self.keep}_s{seed}"

    def __str__(self) -> str:
        return f"{self.scene} {self.keep}"


def main(cfg: Config) -> Path:
    """Run what is missing; returns the table's path."""
    scenes = {path.name: path for path in find_scenes(cfg.data_dir, cfg.scenes)}
    settings = [Setting(name, keep) for name in scenes for keep in cfg.keep]
    for name in scenes:
        weights_for(cfg.weights, name)  # none for a scene: better said now than hours from now
    failed = []
    for seed in cfg.seeds:
        for setting in settings:
            folder = setting.folder(cfg.out_dir, seed)
            try:
                run_pipeline(cfg, scenes[setting.scene], folder, setting.keep, seed)
            except subprocess.CalledProcessError as error:
                logger.error("%s failed: %s", folder.name, shlex.join(map(str, error.cmd)))
                failed.append(folder.name)
            atomic_write_text(cfg.table, table_page(cfg, settings))
    if failed:
        raise ValueError(
            f"{len(failed)} of {len(settings) * len(cfg.seeds)} runs failed: {', '.join(failed)}. See the messages above."
        )
    logger.info("results: %s", cfg.table)
    return cfg.table


def find_scenes(data_dir: Path | None, scenes: Sequence[str]) -> list[Path]:
    """Find the scenes' folders.

    Args:
        data_dir: The folder that holds them; None: $S2D_DATA/scenes.
        scenes: Their names; "all" among them stands for every folder.

    Raises:
        ValueError: Neither data_dir nor S2D_DATA names the folder.
        FileNotFoundError: It, or one of the scenes, is not there.
    """
    if data_dir is None and "S2D_DATA" not in os.environ:
        raise ValueError(
            "No scenes: S2D_DATA is not set. Set it to the folder that holds scenes/, or pass --data-dir."
        )
    folder = data_dir or Path(os.environ["S2D_DATA"]) / "scenes"
    missing = [name for name in scenes if name != "all" and not (folder / name).is_dir()]
    if missing or not folder.is_dir():
        raise FileNotFoundError(
            f"No scene {', '.join(missing)} in {folder}. Check --scenes and --data-dir."
        )
    if "all" in scenes:
        return sorted(path for path in folder.iterdir() if path.is_dir())
    return [folder / name for name in scenes]


def run_pipeline(cfg: Config, scene: Path, folder: Path, keep: int, seed: int) -> None:
    """Run stages 0 to 3 and the evaluation, unless this very run is finished."""
    views = ["--keep-count", keep, "--eval"]
    scoring = ["--sheet"] if cfg.sheets else []
    weights = weights_for(cfg.weights, scene.name)
    repair: list[object] = ["--fixer", "analytic"]
    if weights is not None:
        repair = ["--weights", weights]
        for flag, value in AS_SHIPPED.items():
            repair += [f"--{flag.replace('_', '-')}", value]
    run_stages(scene, folder, seed, views, scoring, repair, cfg.stage_preset, cfg.overwrite)
    if cfg.sheets:
        (cfg.out_dir / "sheets").mkdir(exist_ok=True)
        shutil.copyfile(
            folder / "test" / "sheet.png", cfg.out_dir / "sheets" / f"{folder.name}.png"
        )


def run_stages(
    scene: Path,
    folder: Path,
    seed: int,
    views: Sequence[object],
    scoring: Sequence[object],
    repair: Sequence[object],
    preset: str | None,
    overwrite: bool = False,
) -> None:
    """Run stages 0 to 3 and the evaluation, unless this very run is finished.

    Args:
        scene: Its folder.
        folder: OUT.
        seed: Of stages 1 and 3.
        views: Flags of stage 0.
        scoring: Flags of the evaluation.
        repair: Flags of stage 2: which fixer.
        preset: Of every stage that has one by this name.
        overwrite: Run it anew.

    Raises:
        subprocess.CalledProcessError: One of them failed; it has said why.
    """
    stamp = folder / "benchmark.json"
    key = {"scene": str(scene), "seed": seed, "preset": preset}
    flags = {"views": views, "scoring": scoring, "repair": repair}
    key |= {name: [str(flag) for flag in given] for name, given in flags.items()}
    if not overwrite and stamp.is_file() and json.loads(stamp.read_text("utf-8")) == key:
        logger.info("%s is finished", folder.name)
        return
    logger.info("== %s", folder.name)
    own = {
        "stage0_point_guidance": ["-s", scene, *views],
        "stage1_3dgs_init": ["-s", scene, "--seed", seed],
        "stage2_artifact_fix": repair,
        "stage3_3dgs_mixed_opt": ["-s", scene, "--seed", seed],
    }
    for stage in STAGES:
        arguments = ["-m", folder, *own[stage]]
        if preset and (ROOT / "configs" / stage / f"{preset}.yaml").is_file():
            arguments += ["--preset", preset]
        run(ROOT / f"{stage}.py", *arguments, *(["--overwrite"] if overwrite else []))
    run(ROOT / "tools" / "evaluate.py", "-m", folder, *scoring)
    atomic_write_json(stamp, key)


def run(script: Path, *arguments) -> None:
    subprocess.run([sys.executable, str(script), *map(str, arguments)], check=True)


# ----------------------------------------------------------------------------------------------------------------- table


def table_page(cfg: Config, settings: Sequence[Setting]) -> str:
    """Build docs/results.md from the results.json of every finished run."""
    found = {setting: runs for setting in settings if (runs := load_runs(cfg, setting))}
    machine, version = describe_machine(), versions()
    seeds = (
        ""
        if len(cfg.seeds) == 1
        else f", mean ± standard deviation over the seeds {', '.join(map(str, cfg.seeds))}"
    )
    parts = [
        "# Results",
        f"Made by one command, which runs the four stages and the evaluation of every setting:\n\n    {command_line()}",
        f"Machine: {machine['cpu']}, {machine['cores']} cores, {machine['memory_gb']} GB, no GPU. "
        + f"{', '.join(f'{name} {number}' for name, number in version.items())}.",
        "Protocol `--eval`: test views are every 8th photo in name order and are used for scoring alone; the kept views are evenly spaced "
        f"in the rest; novel views are what is left{seeds}. PSNR and SSIM as in 3DGS, on 8-bit images; LPIPS 0.1; means over views. "
        "Times are of stages 0 to 3 without the evaluation; memory is the largest of any stage.",
        "## Test views\n\n" + test_table(found),
        "## Novel views\n\nThe views that stage 2 repairs and stage 3 is trained on; their photos are used for scoring alone.\n\n"
        + novel_table(found),
        "## Point guidance at the test views\n\nShare of pixels that the points of stage 0 cover, and PSNR on those pixels.\n\n"
        + guidance_table(found),
    ]
    if NOTES.is_file():
        parts.append(NOTES.read_text("utf-8").strip())
    return "\n\n".join(parts) + "\n"


def command_line() -> str:
    """The command that is running, as a user types it in the checkout."""
    return shlex.join(["python", "benchmarks/results.py", *sys.argv[1:]])


def load_runs(cfg: Config, setting: Setting) -> list[dict]:
    paths = [setting.folder(cfg.out_dir, seed) / "results.json" for seed in cfg.seeds]
    return [json.loads(path.read_text("utf-8")) for path in paths if path.is_file()]


def test_table(found: dict[Setting, list[dict]]) -> str:
    rows = []
    for setting, runs in found.items():
        for stage in ("stage1", "stage3"):
            cost = []
            if stage == "stage3":
                cost = [
                    spread(runs, lambda r: r["total_seconds"], seconds_text),
                    spread(runs, peak_memory, megabytes_text, deviation=False),
                ]
            rows.append(
                [
                    setting.scene,
                    str(setting.keep),
                    STAGE_NAMES[stage],
                    *metric_cells(runs, stage, "test"),
                    spread(
                        runs,
                        lambda r, stage=stage: (r["stages"][stage] or {}).get("num_gaussians"),
                        lambda v: f"{v:,.0f}",
                    ),
                    *(cost or ["", ""]),
                ]
            )
    rows += [
        ["**mean**", str(keep), STAGE_NAMES[stage], *metric_cells(runs, stage, "test"), "", "", ""]
        for keep, runs in runs_by_keep(found).items()
        for stage in ("stage1", "stage3")
    ]
    return markdown(
        [
            "scene",
            "kept",
            "stage",
            *(title for _, title, _ in METRICS),
            "Gaussians",
            "time",
            "memory",
        ],
        rows,
    )


def novel_table(found: dict[Setting, list[dict]]) -> str:
    groups = [(setting.scene, setting.keep, runs) for setting, runs in found.items()]
    groups += [("**mean**", keep, runs) for keep, runs in runs_by_keep(found).items()]
    rows = [
        [scene, str(keep), STAGE_NAMES[stage], *metric_cells(runs, stage, "novel")]
        for scene, keep, runs in groups
        for stage in STAGE_NAMES
    ]
    return markdown(["scene", "kept", "stage", *(title for _, title, _ in METRICS)], rows)


def guidance_table(found: dict[Setting, list[dict]]) -> str:
    rows = [
        [
            setting.scene,
            str(setting.keep),
            spread(
                runs,
                lambda r: r["guidance"]["test"] and r["guidance"]["test"]["coverage"],
                lambda v: f"{v:.3f}",
            ),
            spread(
                runs,
                lambda r: r["guidance"]["test"] and r["guidance"]["test"]["psnr_covered"],
                lambda v: f"{v:.2f}",
            ),
            spread(runs, lambda r: r["guidance"]["seconds"], seconds_text),
        ]
        for setting, runs in found.items()
    ]
    return markdown(["scene", "kept", "coverage", "PSNR on covered", "time of stage 0"], rows)


def metric_cells(runs: Sequence[dict], stage: str, group: str) -> list[str]:
    return [
        spread(
            runs,
            lambda r, key=key: ((r["stages"][stage] or {}).get(group) or {}).get(key),
            lambda v, digits=digits: f"{v:.{digits}f}",
        )
        for key, _, digits in METRICS
    ]


def runs_by_keep(found: dict[Setting, list[dict]]) -> dict[int, list[dict]]:
    """Group the runs by kept count, where several scenes have it: one averaged pseudo-run per seed position."""
    grouped: dict[int, list[list[dict]]] = {}
    for setting, runs in found.items():
        grouped.setdefault(setting.keep, []).append(runs)
    return {
        keep: [average(list(column)) for column in zip(*lists, strict=False)]
        for keep, lists in grouped.items()
        if len(lists) > 1
    }


def average(runs: Sequence[dict]) -> dict:
    """Average the metrics of one seed over scenes, in the shape of results.json."""
    stages = {}
    for stage in STAGE_NAMES:
        stages[stage] = {}
        for group in ("test", "novel"):
            metrics = [((r["stages"][stage] or {}).get(group) or {}) for r in runs]
            stages[stage][group] = {
                key: statistics.fmean(values)
                if len(values := [m[key] for m in metrics if m.get(key) is not None]) == len(runs)
                else None
                for key, _, _ in METRICS
            }
    return {"stages": stages}


def spread(
    runs: Sequence[dict], pick: Callable, form: Callable[[float], str], deviation: bool = True
) -> str:
    """Format the mean of a value over seeds, ± its standard deviation where there are several."""
    values = [value for run in runs if (value := pick(run)) is not None]
    if not values:
        return "–"
    text = form(statistics.fmean(values))
    return f"{text} ± {form(statistics.stdev(values))}" if deviation and len(values) > 1 else text


def peak_memory(results: dict) -> float:
    return max(
        [
            results["guidance"]["peak_rss_mb"],
            *(stage["peak_rss_mb"] for stage in results["stages"].values() if stage),
        ]
    )


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; the columns of names are left-aligned, those of numbers right-aligned."""
    align = ["---" if title in ("scene", "stage") else "---:" for title in head]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, align, *rows])


if __name__ == "__main__":
    run_script(main, Config, "results")
