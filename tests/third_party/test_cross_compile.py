"""Every native source compiles for other CPUs and systems without a warning, and an emulator runs the result.

`ziglang` is the cross compiler. By default every source is compiled for 64-bit ARM, the target that shares the least with the
machines that tests usually run on; S2D_CROSS_COMPILE=all compiles them for all of TARGETS (minutes).
"""

import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import native_build
import oracles
import pytest
import torch
from diff_gaussian_rasterization import _native, rasterize_gaussians_raw
from native_build import compilers

ROOT = Path(__file__).resolve().parents[2]
DRIVER = Path(__file__).with_name("portable_render.cpp")
SUFFIXES = (".c", ".cc", ".cpp", ".cxx")

# name: (target, CPU). musl instead of gnu: its programs link without a system's libraries, so an emulator can run them.
TARGETS = {
    "ARM Linux": ("aarch64-linux-musl", "generic"),
    "ARM macOS": ("aarch64-macos", "apple_m1"),
    "x86-64 Linux": ("x86_64-linux-gnu", "x86_64"),
    "x86-64-v2 Linux": ("x86_64-linux-gnu", "x86_64_v2"),
    "x86-64-v3 Linux": ("x86_64-linux-gnu", "x86_64_v3"),
    "x86-64-v4 Linux": ("x86_64-linux-gnu", "x86_64_v4"),
    "x86-64-v3 Windows": ("x86_64-windows-gnu", "x86_64_v3"),
}
DEFAULT = "ARM Linux"
ZIG = compilers.Compiler((sys.executable, "-m", "ziglang", "c++"), "zig", "", "")
FLAGS = [flag for flag in compilers.FLAGS if flag != "-march=native"] + ["-Wextra", "-Werror"]


def native_sources() -> list[Path]:
    """Every C or C++ file of the project, wherever it lies."""
    found = []
    for folder, folders, files in os.walk(ROOT):
        # Environments (.venv), version control, and what scripts write.
        folders[:] = sorted(
            f
            for f in folders
            if not f.startswith(".") and f not in ("out", "build", "node_modules")
        )
        found += [Path(folder) / f for f in sorted(files) if f.endswith(SUFFIXES)]
    return found


def include_flags(source: Path) -> list[str]:
    """What the source's loader passes: the shared headers, and those of its own package."""
    csrc = next((parent for parent in source.parents if parent.name == "csrc"), _native.CSRC)
    folders = {header.parent for header in csrc.rglob("*.h")}
    return [f"-I{folder}" for folder in (native_build.include_dir(), *sorted(folders))]


@pytest.fixture(autouse=True)
def has_zig() -> None:
    pytest.importorskip("ziglang", reason="the pip package ziglang is the cross compiler")


def test_no_source_is_forgotten() -> None:
    sources = native_sources()
    assert {f"{name}.cpp" for name in (*_native.SOURCES, "knn", "ssim", "patchmatch")} <= {
        source.name for source in sources
    }
    assert DRIVER in sources


def _compile_all(command: list[str], sources: list[Path], folder: Path) -> dict[Path, str]:
    """Compile each source to FOLDER/<name>.o; return what the compiler said where it said anything."""

    def compile_one(source: Path) -> str | None:
        output = folder / f"{source.stem}.o"
        flags = [*FLAGS, *include_flags(source), "-c", str(source), "-o", str(output)]
        return compilers.run([*command, *flags], ZIG)

    with ThreadPoolExecutor(2) as executor:
        complaints = list(executor.map(compile_one, sources))
    return {s: words for s, words in zip(sources, complaints, strict=True) if words is not None}


def _zig_for(name: str) -> list[str]:
    target, cpu = TARGETS[name]
    return [*ZIG.command, "-target", target, f"-mcpu={cpu}"]


@pytest.fixture(scope="module")
def arm(tmp_path_factory) -> tuple[Path, dict[Path, str]]:
    """All sources compiled for ARM: the folder of the objects, and the compiler's complaints."""
    folder = tmp_path_factory.mktemp("arm")
    return folder, _compile_all(_zig_for(DEFAULT), native_sources(), folder)


@pytest.mark.parametrize("name", TARGETS)
def test_compiles_without_a_warning(name: str, tmp_path: Path, request) -> None:
    if name == DEFAULT:
        _, complaints = request.getfixturevalue("arm")
    elif os.environ.get("S2D_CROSS_COMPILE") == "all":
        complaints = _compile_all(_zig_for(name), native_sources(), tmp_path)
    else:
        pytest.skip("S2D_CROSS_COMPILE=all compiles for this target too")
    report = [f"{s.relative_to(ROOT)}:\n{words[:1500]}" for s, words in complaints.items()]
    assert not report, "\n".join(report)


def _write_scene(scene: dict, cotangents: list[torch.Tensor], path: Path) -> None:
    K = scene["Ks"][0]
    n, rest = scene["shN"].shape[:2]
    header = [n, rest + 1, 3, scene["width"], scene["height"]]
    camera = [scene["viewmats"][0], K[0, 0], K[1, 1], K[0, 2], K[1, 2], scene["background"]]
    arrays = [*camera, *(scene[name] for name in oracles.PARAMETERS), *cotangents]
    data = torch.cat([array.flatten() for array in arrays])
    path.write_bytes(
        torch.tensor(header, dtype=torch.int32).numpy().tobytes() + data.numpy().tobytes()
    )


def _read_result(scene: dict, path: Path) -> dict[str, torch.Tensor]:
    n, pixels = len(scene["means"]), scene["width"] * scene["height"]
    sizes = {"rgb": 3 * pixels, "alpha": pixels, "depth": pixels}
    sizes |= {name: scene[name].numel() for name in oracles.PARAMETERS}
    sizes |= {"means2d_probe": 2 * n, "viewmats": 16, "radii": n}
    raw = torch.frombuffer(bytearray(path.read_bytes()), dtype=torch.float32)
    parts = dict(zip(sizes, raw.split(list(sizes.values())), strict=True))
    parts["radii"] = parts["radii"].view(torch.int32)
    return parts


def _need(program: str, package: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"{program} is not installed (Debian: apt-get install {package})")


def _build_for_arm(request, program: Path) -> list[str]:
    """Link the program with the rasteriser, both for ARM; return the command prefix that runs it."""
    _need("qemu-aarch64", "qemu-user")
    objects, complaints = request.getfixturevalue("arm")
    assert not complaints
    linked = [str(objects / f"{name}.o") for name in (DRIVER.stem, *_native.SOURCES)]
    link = [*_zig_for(DEFAULT), "-static", "-pthread", *linked, "-o", str(program)]
    assert (problem := compilers.run(link, ZIG)) is None, problem
    return ["qemu-aarch64"]


def _build_for_old_x86(monkeypatch, program: Path) -> list[str]:
    """Link the program with the library that test_instruction_sets.py tests natively."""
    if platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the system's compiler builds for another machine")
    _need("qemu-x86_64", "qemu-user")
    _need("g++", "g++")
    monkeypatch.setenv("S2D_COMPILER", "system")
    march = "-march=x86-64"
    library = Path(_native.load_library((march,))._name)
    flags = [march, *FLAGS, *include_flags(DRIVER), f"-Wl,-rpath,{library.parent}"]
    build = ["g++", *flags, str(DRIVER), str(library), "-o", str(program)]
    assert (problem := compilers.run(build, ZIG)) is None, problem
    # A Core 2 knows nothing beyond SSSE3: an instruction of AVX kills the program.
    return ["qemu-x86_64", "-cpu", "core2duo"]


@pytest.mark.parametrize("target", ["ARM", "x86-64"])
def test_an_emulated_machine_draws_the_same(target: str, tmp_path, request, monkeypatch) -> None:
    program = tmp_path / "portable_render"
    if target == "ARM":
        emulator = _build_for_arm(request, program)
    else:
        emulator = _build_for_old_x86(monkeypatch, program)
    scene = oracles.make_scene(num_gaussians=150, width=83, height=51, seed=2)
    scene = oracles.cast(scene, torch.float32)
    shape = (1, scene["height"], scene["width"])
    g = torch.Generator().manual_seed(7)
    cotangents = [torch.randn(*shape, c, generator=g) for c in (3, 1, 1)]
    _write_scene(scene, cotangents, tmp_path / "scene")
    command = [*emulator, str(program), str(tmp_path / "scene"), str(tmp_path / "result")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"exit code {done.returncode}\n{done.stderr}"
    there = _read_result(scene, tmp_path / "result")

    names = (*oracles.PARAMETERS, "viewmats", "means2d_probe")
    leaves = {name: scene[name].clone().requires_grad_() for name in names}
    here = rasterize_gaussians_raw(**{**scene, **leaves})
    images = (here.rgb, here.alpha, here.depth)
    loss = sum((v * image).sum() for v, image in zip(cotangents, images, strict=True))
    gradients = dict(
        zip(names, torch.autograd.grad(loss, [leaves[name] for name in names]), strict=True)
    )
    assert torch.equal(there["radii"], here.radii[0])
    # Measured 1.7e-7 for images, 1.8e-6 for gradients: another order of the same operations.
    for name, image in zip(("rgb", "alpha", "depth"), images, strict=True):
        assert oracles.relative_l2(there[name], image.detach().flatten()) < 2e-6, name
    there = {name: there[name].reshape(gradients[name].shape) for name in names}
    oracles.assert_gradients_close(there, gradients, max_relative_l2=2e-5)
