"""On one GPU, in one run: our training step and rendering against gsplat's, each kernel against what the GPU allows, the fixer per frame.

Reads   nothing; gsplat and diffusers where they are installed. No network is used
Writes  OUT/gpu.json after every measurement, and OUT/gpu.md, the tables

Everybody gets the same Gaussians, views, photos, loss (ours), learning rates and kind of optimiser (visible rows alone), and the images
are compared first. Times are medians by the GPU's own events after warming up; memory is the peak of torch's allocator, from
the Gaussians on.

Where wheels have to be carried along, make the folder on a machine with a network, take it to the GPU with the checkout, and install from it:
    python -m pip download --no-deps --only-binary=:all: -d wheels gsplat==1.5.3 jaxtyping wadler-lindig "diffusers>=0.41,<0.43" importlib-metadata zipp
    python -m pip install --no-index --no-deps --target site wheels/*.whl

Example
    PYTHONPATH=site python benchmarks/gpu.py --output-dir out/gpu                                 # all: some minutes
    python benchmarks/gpu.py --output-dir out/gpu --only step --gaussians 1000000 --sizes 1920x1080
    python benchmarks/gpu.py --output-dir out/dry --device cpu --gaussians 2000 --sizes 160x120   # without a GPU: whether it runs
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
# Run from anywhere, and without an installation: a GPU's machine may have torch alone.
sys.path[:0] = [str(ROOT), *(str(path.parent) for path in (ROOT / "third_party").glob("*/pyproject.toml"))]  # fmt: skip

import torch  # noqa: E402
from native_build.cuda import device as devices  # noqa: E402

from benchmarks import gpu_contestants, gpu_fixer, gpu_kernels  # noqa: E402
from benchmarks.gpu_contestants import Contestant, Task  # noqa: E402
from benchmarks.gpu_report import tables  # noqa: E402

PARTS = ("step", "kernels", "fixer")
NUM_VIEWS = 4
WARM_UP = 20
SAME_IMAGE = (
    1e-3  # relative L2 by which two libraries may differ: another way to round, another cut-off
)


def main(argv: list[str] | None = None) -> Path:
    """Measure what is asked for; returns OUT."""
    args = parse(argv)
    choice = devices.choose_device(args.device)
    args.output_dir.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {"machine": describe(choice), "steps": [], "kernels": [], "fixer": []}
    for kind, row in measurements(args, choice.device):
        results[kind].append(row)
        print(json.dumps({kind: row}), flush=True)
        # After each: a machine that is lent can be taken back.
        (args.output_dir / "gpu.json").write_text(json.dumps(results, indent=1))
        (args.output_dir / "gpu.md").write_text(tables(results))
    print(tables(results))
    return args.output_dir


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output-dir", type=Path, required=True, help="OUT")
    parser.add_argument("--gaussians", type=int, nargs="+", default=[100_000, 1_000_000, 3_000_000])
    parser.add_argument(
        "--sizes",
        type=size,
        nargs="+",
        default=[(1184, 888), (1920, 1080), (2368, 1776)],
        metavar="WIDTHxHEIGHT",
        help="images of 1, 2 and 4 megapixels",
    )
    parser.add_argument(
        "--repeats", type=int, default=60, help="steps, and renders, that are timed"
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--contestants", nargs="+", default=None, help="names; all that can be imported by default"
    )
    parser.add_argument("--frame", type=size, default=(1024, 576), help="of the fixer")
    parser.add_argument("--device", default="cuda", help="cuda, or cpu to try the script")
    return parser.parse_args(argv)


def size(text: str) -> tuple[int, int]:
    """Parse 1920x1080."""
    found = re.fullmatch(r"(\d+)x(\d+)", text)
    if not found:
        raise argparse.ArgumentTypeError(f"expected WIDTHxHEIGHT such as 1920x1080, got {text!r}")
    return int(found.group(1)), int(found.group(2))


def measurements(
    args: argparse.Namespace, device: torch.device
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield each row as soon as it is measured."""
    wanted = args.contestants
    found, missing = gpu_contestants.usable(lambda name: wanted is None or name in wanted)
    limits = None
    for reason in missing:
        yield "steps", {"contestant": reason.split(":")[0], "missing": reason}
    for num in args.gaussians if {"step", "kernels"} & {*args.only} else ():
        for width, height in args.sizes:
            task = gpu_contestants.made_up_task(num, width, height, device, NUM_VIEWS)
            setting = {"gaussians": num, "width": width, "height": height}
            if "step" in args.only:
                truth = gpu_contestants.Ours(task).render(0)
                for contestant in found:
                    row = attempt(race, contestant, task, truth, args.repeats, device)
                    yield "steps", {**setting, "contestant": contestant.name, **row}
            if "kernels" in args.only and device.type == "cuda":
                limits = limits or gpu_kernels.measure_limits(device)
                row = attempt(kernel_row, task, limits, args.repeats)
                yield "kernels", {**setting, **row}
    if "fixer" in args.only:
        for network in gpu_fixer.NETWORKS:
            row = attempt(gpu_fixer.measure, network, args.frame, args.repeats, device)
            yield "fixer", {"network": network, "frame": list(args.frame), **row}


def attempt(measure: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """Measure; what one cannot do is a row too, and the others go on."""
    try:
        return measure(*arguments)
    except (RuntimeError, ValueError, ImportError, OSError) as error:
        text = " ".join(str(error).split())
        return {"failed": f"{type(error).__name__}: {text[:300]}"}
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def race(
    contestant: type[Contestant],
    task: Task,
    truth: torch.Tensor,
    repeats: int,
    device: torch.device,
) -> dict[str, Any]:
    """Train and render one contestant; milliseconds, frames a second, bytes."""
    gpu = device.type == "cuda"
    before = 0
    if gpu:
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    one = contestant(task)
    difference = float((one.render(0) - truth).norm() / truth.norm())
    if difference > SAME_IMAGE:
        raise ValueError(f"the image differs by {difference:.1e} (relative L2) from ours")
    turn = iter(range(10**9))
    warm_up = WARM_UP if gpu else 1
    steps = gpu_kernels.milliseconds(
        lambda: one.step(next(turn) % NUM_VIEWS), device, repeats, warm_up
    )
    peak = torch.cuda.max_memory_allocated(device) - before if gpu else None
    renders = gpu_kernels.milliseconds(
        lambda: one.render(next(turn) % NUM_VIEWS), device, repeats, warm_up
    )
    return {
        "step_ms": median(steps),
        "step_best_ms": min(steps),
        "render_fps": 1e3 / median(renders),
        "peak_bytes": peak,
        "image_difference": difference,
    }


def kernel_row(task: Task, limits: gpu_kernels.Limits, repeats: int) -> dict[str, Any]:
    """Each kernel's milliseconds, and the least that memory and arithmetic allow."""
    times = gpu_kernels.kernel_times(gpu_contestants.Ours(task), NUM_VIEWS, repeats)
    work = gpu_kernels.kernel_work(gpu_kernels.count(task))
    rows = {}
    for kernel, taken in times.items():
        least = next((w for name, w in work.items() if kernel.startswith(name)), None)
        rows[kernel] = {"ms": taken}
        if least is not None:
            rows[kernel] |= {
                "memory_floor_ms": 1e3 * least.bytes / limits.bytes,
                "arithmetic_floor_ms": 1e3 * least.flop / limits.flops,
            }
    rates = {"tflops": limits.flops / 1e12, "gb_per_s": limits.bytes / 1e9}
    return {"limits": rates, "kernels": rows}


def describe(choice: devices.Choice) -> dict[str, Any]:
    """What the numbers are of."""
    about = {
        "device": str(choice.device),
        "reason": choice.reason,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
    if choice.device.type == "cuda":
        properties = torch.cuda.get_device_properties(choice.device)
        about |= {"gpu": properties.name, "memory_gb": properties.total_memory / 1e9}
    return about


if __name__ == "__main__":
    main()
