"""What this machine has for S2D and what is missing; and whether a set of photos will do, before anything is trained on it.

Reads   nothing, or (photos) the photos of a folder or a scene
Writes  a table to stdout, with --json the same as JSON. Exit code 0: all is well. 1: S2D cannot run, or the photos should be better.

Example
    python tools/doctor.py
    python tools/doctor.py photos my_photos
"""

from __future__ import annotations

import json
import operator
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # run from anywhere: the library is not installed

CURE = f"Run: bash {ROOT / 'tools' / 'setup_env.sh'}; then use {ROOT / '.venv' / 'bin' / 'python'}."

try:
    import native_build
    import torch
    import tyro
    from native_build import cache, compilers
    from native_build.cuda import device
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from s2d.cameras import Cameras
    from s2d.capture import check_capture, find_photos
    from s2d.capture.table import print_report
    from s2d.config import describe_error
    from s2d.fixer.choice import SHIPPED_WEIGHTS
    from s2d.gaussians import gaussians_from_points
    from s2d.guidance.cloud import SurfaceCloud
    from s2d.guidance.render import render_cloud
    from s2d.log import describe_machine, logger, setup_logging
    from s2d.losses import photometric_loss
    from s2d.metrics import LpipsUnavailable, load_lpips
    from s2d.rasterize import rasterize
except (ImportError, OSError) as problem:  # OSError: a library that torch needs does not load
    sys.exit(
        f"S2D cannot run with {sys.executable} (Python {platform.python_version()}): {problem}. {CURE}"
    )

State = Literal["ok", "missing", "broken"]

# Where requirements are, and what to do where one is not met.
REQUIREMENTS = {
    "requirements.txt": CURE,
    "requirements-cuda.txt": f"For CUDA kernels. {CURE}",
    "requirements-dev.txt": f"For the tests alone. Run: bash {ROOT / 'tools' / 'setup_env.sh'} --dev",
}
# Without these a network cannot be the fixer; everything else works.
FIXER_PACKAGES = {"diffusers", "transformers", "peft", "accelerate"}
ENOUGH_DISK_GB, ENOUGH_MEMORY_GB = 2.0, 4.0
# Of the Hugging Face hub: what for, and under which terms.
HUB_MODELS = {
    "nvidia/difix_ref": "fixer difix (non-commercial licence)",
    "stabilityai/sd-turbo": "base to train a fixer on (Stability AI's community licence)",
    "yyfz233/Pi3": "point guidance by Pi3 (non-commercial licence)",
}


@dataclass(frozen=True)
class Check:
    """One line of the table."""

    name: str
    found: str
    state: State = "ok"
    """broken: S2D cannot run. missing: something works only with it."""
    advice: str = ""


@dataclass(frozen=True)
class Machine:
    """What this machine has, which kernels are used and why, which weights are found."""

    json: bool = False
    """Print JSON instead of a table."""


@dataclass(frozen=True)
class Photos:
    """Check photos before training: blur, exposure, overlap, parallax, duplicates."""

    source: tyro.conf.Positional[Path]
    """Folder of photos, or a scene."""
    json: bool = False
    """Print JSON instead of a table."""


def main(argv: list[str] | None = None) -> int:
    """Parse the command line, check, print; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not argv or argv[0] not in ("machine", "photos", "-h", "--help"):
        argv.insert(0, "machine")
    cfg = tyro.extras.subcommand_cli_from_dict(
        {"machine": Machine, "photos": Photos}, prog="doctor.py", description=__doc__, args=argv
    )
    setup_logging()
    try:
        return check_photos(cfg) if isinstance(cfg, Photos) else check_machine(cfg)
    except (ValueError, OSError) as error:  # what a user can cause, as in s2d.config.run_script
        logger.error("%s", describe_error(error))
        return 2
    except KeyboardInterrupt:
        logger.error("Stopped.")
        return 130


def check_photos(cfg: Photos) -> int:
    report = check_capture(find_photos(cfg.source))
    if cfg.json:
        print(json.dumps(report.to_json(), indent=1))
    else:
        print_report(report)
    return 0 if report.good else 1


def check_machine(cfg: Machine) -> int:
    groups = {
        "machine": [*machine()],
        "packages": [*packages()],
        "kernels": [*kernels()],
        "weights": [*weights()],
    }
    can_run = not any(check.state == "broken" for checks in groups.values() for check in checks)
    if cfg.json:
        plain = {name: [asdict(check) for check in checks] for name, checks in groups.items()}
        print(json.dumps({"can_run": can_run, **plain}, indent=1))
    else:
        print_checks(groups, can_run)
    return 0 if can_run else 1


def print_checks(groups: dict[str, list[Check]], can_run: bool) -> None:
    """Print one table, a section per group."""
    table = Table(show_header=False, title="S2D on this machine", title_style="bold")
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    marks = {"ok": "[green]ok[/green]", "missing": "[yellow]–[/yellow]", "broken": "[red]NO[/red]"}
    for checks in groups.values():
        for check in checks:
            text = escape(check.found)
            if check.advice:
                text += f"\n[dim]{escape(check.advice)}[/dim]"
            table.add_row(check.name, marks[check.state], text)
        table.add_section()
    console = Console() if sys.stdout.isatty() else Console(width=120)
    console.print(table)
    verdict = (
        "[green]S2D can run here.[/green]" if can_run else "[red]S2D cannot run here yet.[/red]"
    )
    console.print(f"{verdict} – marks what some settings need and is not there.")


# ------------------------------------------------------------------------------------------------------------- the machine


def machine() -> Iterator[Check]:
    """Operating system, processor, memory, disk, Python, GPU."""
    facts = describe_machine()
    yield Check("system", str(facts["system"]))
    shown = f"{facts['cpu']}, vectors of {vector_width()}, {facts['cores']} cores"
    yield Check("processor", f"{shown}; threads for the kernels: {native_build.num_threads()}")
    memory = f"{facts['memory_gb']:g} GB"
    if facts["memory_gb"] < ENOUGH_MEMORY_GB:
        advice = "Little: keep the photos small (--max-side 400) and the Gaussians few."
        yield Check("memory", memory, "missing", advice)
    else:
        yield Check("memory", memory)
    free_gb = shutil.disk_usage(Path.cwd()).free / 1e9
    disk = f"{free_gb:.0f} GB free in {Path.cwd()}"
    if free_gb < ENOUGH_DISK_GB:
        advice = (
            f"A scene takes up to {ENOUGH_DISK_GB:g} GB: free some, or write elsewhere with -m."
        )
        yield Check("disk", disk, "missing", advice)
    else:
        yield Check("disk", disk)
    yield Check("Python", f"{platform.python_version()}, {sys.executable}")
    yield gpu()


def vector_width() -> str:
    """How many bits of numbers the processor computes at once."""
    try:
        flags = set(Path("/proc/cpuinfo").read_text().split())
    except OSError:  # not Linux
        flags = set()
    for flag, shown in (("avx512f", "512 bits (AVX-512)"), ("avx2", "256 bits (AVX2)")):
        if flag in flags:
            return shown
    return "128 bits"


def gpu() -> Check:
    """What torch can use, or an NVIDIA GPU that it cannot."""
    build = f"torch {torch.__version__}"
    found = ", ".join(f"{name} (driver {driver})" for name, driver in nvidia_gpus())
    if torch.cuda.is_available():
        found = found or torch.cuda.get_device_name(0)
        return Check("GPU", f"{found}, {build}: for the fixer's network, --device cuda")
    if not found:
        return Check("GPU", f"none found, none needed ({build})")
    advice = (
        f"{build} was built without CUDA. Install its CUDA build to run the fixer's network there."
    )
    if torch.version.cuda is not None:
        advice = f"{build} cannot use it: update the driver, or look at CUDA_VISIBLE_DEVICES."
    return Check("GPU", f"{found}: not used", "missing", advice)


def nvidia_gpus() -> list[list[str]]:
    """Name and driver version of each NVIDIA GPU; empty where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return []
    lines = done.stdout.splitlines() if done.returncode == 0 else []
    return [line.split(", ") for line in lines if line.count(", ") == 1]


# ---------------------------------------------------------------------------------------------------------------- packages


def packages() -> Iterator[Check]:
    """What requirements*.txt ask for: one line where all is there, else one for each that is not."""
    for file, cure in REQUIREMENTS.items():
        if file == "requirements-cuda.txt" and not nvidia_gpus():
            continue  # of no use here
        wanted = [*requirements(ROOT / file)]
        wrong = [(name, bounds, why) for name, bounds, why in wanted if not fits(name, bounds)]
        if not wrong:
            yield Check(file, f"all {len(wanted)} packages")
        for name, bounds, why in wrong:
            optional = file != "requirements.txt" or name in FIXER_PACKAGES
            found = f"{version(name) or 'not installed'}, wanted {bounds} ({why})"
            yield Check(name, found, "missing" if optional else "broken", cure)


def requirements(path: Path) -> Iterator[tuple[str, str, str]]:
    """Name, version bounds and comment of each line."""
    for line in path.read_text().splitlines():
        if found := re.match(r"([\w.-]+)([<>=]=?[^#]*?)\s*#\s*(.*)", line):
            yield found.group(1), found.group(2), found.group(3)


def version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(name: str, bounds: str) -> bool:
    """Whether the installed version is within `==`, `>=` and `<`, which are all that our files use."""
    installed = version(name)
    if installed is None:
        return False

    def numbers(text: str) -> list[int]:
        found = [int(part) for part in re.findall(r"\d+", re.match(r"[\d.]*", text).group())]
        return found + [0] * (4 - len(found))

    tests = {"==": operator.eq, ">=": operator.ge, "<": operator.lt}
    parts = (re.fullmatch(r"(==|>=|<)(.+)", bound.strip()).groups() for bound in bounds.split(","))
    return all(tests[sign](numbers(installed), numbers(wanted)) for sign, wanted in parts)


# ----------------------------------------------------------------------------------------------------------------- kernels


def kernels() -> Iterator[Check]:
    """Which compiler makes the kernels, where they are kept, and whether each gives a known answer."""
    yield back_end()
    yield compiler()
    yield kernel_cache()
    for name, test in KERNEL_TESTS.items():
        try:
            right = test()
        except (RuntimeError, OSError) as error:
            advice = "Look at the compiler above; if there is one, try S2D_COMPILER=zig or system, and report this."
            yield Check(name, str(error).strip().splitlines()[0], "broken", advice)
            continue
        if right:
            yield Check(name, "works: gives the known answer of a small case")
        else:
            advice = f"Empty {cache.cache_dir()} and run this again; if it stays, report it."
            yield Check(name, "gives a wrong answer", "broken", advice)


def back_end() -> Check:
    """Whether the CUDA kernels can be used, as `--device auto` decides it, or why not."""
    problem = device.cuda_problem()
    if problem is None:
        return Check("back end", f"CUDA: {device.describe_gpu(0)}; and C++ on the CPU")
    found = "C++ on the CPU"
    if not nvidia_gpus():
        return Check("back end", found)
    return Check("back end", f"{found}, not the GPU", "missing", problem)


def compiler() -> Check:
    """The first compiler that compiles, as `native_build.load` takes it."""
    problems: list[str] = []
    for candidate in compilers.candidates(problems):
        problem = compilers.probe(candidate)
        if problem is None:
            passed_over = f"; not usable: {'; '.join(problems)}" if problems else ""
            return Check("compiler", f"{candidate.label}, {candidate.reason}{passed_over}")
        problems.append(f"{candidate.label}: {problem.strip().splitlines()[0]}")
    advice = f"Run: {sys.executable} -m pip install ziglang; or install g++."
    # Not broken by itself: kernels may be in the cache. Their tests say.
    return Check("compiler", "; ".join(problems), "missing", advice)


def kernel_cache() -> Check:
    folder = cache.cache_dir()
    asked = os.environ.get("S2D_CACHE_DIR")
    wanted = Path(asked or Path.home() / ".cache" / "s2d") / "native"
    if folder == wanted:
        return Check("kernel cache", str(folder))
    advice = "It may be gone after a restart. Set S2D_CACHE_DIR to a folder that stays."
    return Check("kernel cache", f"{folder}: cannot write to {wanted}", "missing", advice)


def square() -> tuple[torch.Tensor, Cameras]:
    """The corners of a unit square, and a camera that has the first in the middle of its 16 × 16 pixels."""
    points = torch.tensor([[0.0, 0, 2], [1, 0, 2], [0, 1, 2], [1, 1, 2]])
    K = torch.tensor([[[16.0, 0, 8], [0, 16, 8], [0, 0, 1]]])
    return points, Cameras(torch.eye(4)[None], K, ((16, 16),), ("doctor",))


def rasteriser_works() -> bool:
    """A red Gaussian in the middle is seen there, and gets a gradient."""
    points, camera = square()
    red = torch.tensor([[1.0, 0, 0]]).expand(4, 3)
    gaussians = gaussians_from_points(points, red, sh_degree=0, init_opacity=0.9)
    gaussians.means.requires_grad_()
    rgb = rasterize(gaussians, camera).rgb[0]
    rgb.sum().backward()
    middle = rgb[8, 8].detach()
    seen = middle[0] > 0.5 and middle[1:].max() < 0.05
    return bool(seen and gaussians.means.grad.abs().sum() > 0)


def loss_works() -> bool:
    """An image is itself, and not black."""
    image = torch.rand(16, 16, 3, generator=torch.Generator().manual_seed(0))
    same, other = (float(photometric_loss(image, target)) for target in (image, image * 0))
    return same < 1e-4 and other > 0.3


def neighbours_work() -> bool:
    from simple_knn import knn

    _, distances2 = knn(square()[0], 3)
    return bool((distances2 == torch.tensor([1.0, 1, 2])).all())


def guidance_works() -> bool:
    """A patch in the middle covers the middle and not the corner."""
    points, camera = square()
    cloud = SurfaceCloud.without_orientation(points, torch.ones(4, 3), torch.full((4,), 0.5))
    coverage = render_cloud(cloud, camera).coverage
    return bool(coverage[8, 8] and not coverage[1, 1])


KERNEL_TESTS = {
    "rasteriser": rasteriser_works,
    "loss": loss_works,
    "neighbours": neighbours_work,
    "guidance": guidance_works,
}


# ----------------------------------------------------------------------------------------------------------------- weights


def weights() -> Iterator[Check]:
    """LPIPS, the fixers' and the point guidance's networks."""
    for net in ("vgg", "alex"):
        try:
            load_lpips(net, download=False)
            yield Check(f"LPIPS {net}", "found")
        except LpipsUnavailable as error:
            said = str(error).removeprefix("LPIPS: not available: ")
            found = (
                "not here: the evaluation tries to download it once, or does without this number"
            )
            yield Check(f"LPIPS {net}", found, "missing", said)
    if SHIPPED_WEIGHTS.is_file():
        yield Check("fixer compact", str(SHIPPED_WEIGHTS))
    else:
        advice = "Give stage 2 --weights FILE.safetensors; train_artifact_fixer.py writes one (docs/fixer.md)."
        found = "no weights come with this copy: stage 2 takes the analytic fixer"
        yield Check("fixer compact", found, "missing", advice)
    cached = hub_cache()
    for model, purpose in HUB_MODELS.items():
        if model in cached:
            yield Check(model, f"{purpose}: {cached[model]}")
        else:
            advice = f"Where you want it, run: hf download {model}"
            yield Check(model, f"{purpose}: not in the Hugging Face cache", "missing", advice)
    pi3 = Path(os.environ.get("S2D_PI3_ROOT") or ROOT / "third_party" / "Pi3")
    if (pi3 / "pi3").is_dir():
        yield Check("Pi3 checkout", str(pi3))
    else:
        advice = (
            "For point guidance by Pi3, clone its repository there, or name it with S2D_PI3_ROOT."
        )
        yield Check("Pi3 checkout", f"none in {pi3}", "missing", advice)


def hub_cache() -> dict[str, str]:
    """Models that are in the Hugging Face cache, and where."""
    try:
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound
    except ImportError:  # comes with diffusers
        return {}
    try:
        return {repo.repo_id: str(repo.repo_path) for repo in scan_cache_dir().repos}
    except CacheNotFound:
        return {}


if __name__ == "__main__":
    sys.exit(main())
