"""The rasteriser as other machines would compile it: narrower vectors, and the compiler that pip brings. Same results."""

import platform

import oracles
import pytest
import torch
from diff_gaussian_rasterization import _native, rasterize_gaussians_raw
from native_build import compilers

# name: (flags, compiler, lanes)
BUILDS = {
    "SSE2": (("-march=x86-64",), "system", 4),
    "AVX2": (("-march=x86-64-v3",), "system", 8),
    "ziglang": ((), "zig", None),
}


@pytest.fixture(params=BUILDS)
def build(request, monkeypatch):
    flags, compiler, lanes = BUILDS[request.param]
    if compiler == "system" and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("the flags are for x86-64")
    monkeypatch.setenv("S2D_COMPILER", compiler)
    if not list(compilers.candidates([])):
        pytest.skip(f"no {compiler} compiler here")
    library = _native.load_library(flags)
    assert lanes is None or library.s2d_lanes() == lanes
    return library


def test_other_builds_agree_with_this_machines(build, monkeypatch):
    scene = oracles.make_scene(num_gaussians=150, width=83, height=51, num_cameras=2, seed=2)
    scene = oracles.cast(scene, torch.float32)
    here = rasterize_gaussians_raw(**scene)
    here_gradients = oracles.gradients(rasterize_gaussians_raw, scene)
    monkeypatch.setattr(_native, "library", lambda: build)
    monkeypatch.setattr(_native.Frame, "_idle", [])
    there = rasterize_gaussians_raw(**scene)
    there_gradients = oracles.gradients(rasterize_gaussians_raw, scene)
    assert torch.equal(here.radii, there.radii)
    for name in ("rgb", "alpha", "depth"):
        # Measured 1e-6: another order of the same operations.
        assert oracles.relative_l2(getattr(there, name), getattr(here, name)) < 1e-5, name
    # Measured 3e-6.
    oracles.assert_gradients_close(there_gradients, here_gradients, max_relative_l2=3e-5)
