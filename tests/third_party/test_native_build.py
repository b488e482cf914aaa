"""native_build: both compilers, the cache, the thread pool, and what the user reads when something is missing."""

import ctypes
import logging
import os
import subprocess
import sys
from pathlib import Path

import native_build
import pytest
from native_build import cache, compilers

SOURCE = r"""
#include <atomic>
#include <stdexcept>
#include "abi.h"
#include "parallel.h"

S2D_EXPORT int fill_squares(int64_t* out, int64_t n, int threads) {
  return s2d::guarded([&] { s2d::parallel_for(n, threads, [&](int64_t i) { out[i] += i * i; }); });
}
S2D_EXPORT int fail_at(int64_t bad, int64_t n, int threads) {
  return s2d::guarded([&] {
    s2d::parallel_for(n, threads, [&](int64_t i) { if (i == bad) throw std::runtime_error("task failed"); });
  });
}
S2D_EXPORT const char* error_text() { return s2d::last_error().c_str(); }
"""


@pytest.fixture(scope="session")
def shared_cache(tmp_path_factory):
    return tmp_path_factory.mktemp("native-cache")


@pytest.fixture
def source(tmp_path, monkeypatch, shared_cache):
    """A kernel of our own in a folder of its own, and a cache that no other test module uses.

    zig keeps its own cache where it always is: building its C++ runtime takes a minute, once on a machine.
    """
    monkeypatch.setenv("ZIG_GLOBAL_CACHE_DIR", str(cache.cache_dir() / "zig"))
    monkeypatch.setenv("ZIG_LOCAL_CACHE_DIR", str(cache.cache_dir() / "zig"))
    monkeypatch.setenv("S2D_CACHE_DIR", str(shared_cache))
    monkeypatch.delenv("S2D_COMPILER", raising=False)
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(native_build, "_loaded", {})
    path = tmp_path / "kernel.cpp"
    path.write_text(SOURCE)
    return path


def squares(library: ctypes.CDLL, n: int, threads: int) -> list[int]:
    out = (ctypes.c_int64 * n)()
    assert library.fill_squares(out, ctypes.c_int64(n), threads) == 0
    return list(out)


@pytest.mark.parametrize("compiler", ["system", "zig"])
def test_compiles_runs_in_parallel_and_reports_exceptions(source, monkeypatch, compiler):
    if compiler == "system" and not list(compilers._system_compilers([], "")):
        pytest.skip("no system compiler here")
    monkeypatch.setenv("S2D_COMPILER", compiler)
    library = native_build.load("kernel", [source])
    for n, threads in [(0, 2), (1, 2), (1000, 1), (1000, 3), (17, 64)]:
        assert squares(library, n, threads) == [i * i for i in range(n)]
    library.error_text.restype = ctypes.c_char_p
    assert library.fail_at(ctypes.c_int64(5), ctypes.c_int64(100), 2) == 1
    assert library.error_text() == b"task failed"
    assert squares(library, 50, 2) == [i * i for i in range(50)], (
        "the pool must survive an exception"
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_pool_works_in_a_forked_child(source):
    library = native_build.load("kernel", [source])
    squares(library, 100, 2)
    child = os.fork()
    if child == 0:
        ok = squares(library, 100, 2) == [i * i for i in range(100)]
        os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_cached_load_compiles_nothing_and_a_change_recompiles(source, monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    first = native_build.load("kernel", [source])
    assert native_build.load("kernel", [source]) is first
    monkeypatch.setattr(native_build, "_loaded", {})
    monkeypatch.setattr(cache, "build", lambda *args: pytest.fail("compiled although cached"))
    native_build.load("kernel", [source])

    built = []
    monkeypatch.setattr(cache, "build", lambda path, *args: built.append(path))
    (source.parent / "new_header.h").write_text("// counts for the key\n")
    with pytest.raises(RuntimeError, match="S2D_CACHE_DIR"):
        native_build.load("kernel", [source])  # the stand-in build writes nothing
    assert len(built) == 1


def test_log_names_the_compiler_and_the_reason(source, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    native_build.load("logged", [source])
    assert [r for r in caplog.records if "compiling logged with" in r.message and "(" in r.message]


@pytest.mark.parametrize("damage", ["truncated", "garbage", "empty"])
def test_damaged_library_is_compiled_again(source, monkeypatch, damage, shared_cache):
    native_build.load(f"damaged_{damage}", [source])
    (path,) = (shared_cache / "native").glob(f"damaged_{damage}-*")
    data = path.read_bytes()
    path.unlink()  # a new inode: the loaded library keeps its pages
    path.write_bytes(
        {"truncated": data[: len(data) // 2], "garbage": b"\0" + data[1:], "empty": b""}[damage]
    )
    monkeypatch.setattr(native_build, "_loaded", {})
    assert squares(native_build.load(f"damaged_{damage}", [source]), 4, 1) == [0, 1, 4, 9]
    assert path.read_bytes()[-cache.TRAILER_BYTES :].startswith(cache.TRAILER_MAGIC)


def test_two_processes_compile_at_once(source, tmp_path):
    code = (
        "import sys, ctypes, native_build; from pathlib import Path\n"
        "lib = native_build.load('race', [Path(sys.argv[1])]); out = (ctypes.c_int64 * 3)()\n"
        "lib.fill_squares(out, ctypes.c_int64(3), 2); print(list(out))"
    )
    env = {**os.environ, "S2D_CACHE_DIR": str(tmp_path / "race")}
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(source)], env=env, stdout=subprocess.PIPE, text=True
        )
        for _ in range(2)
    ]
    assert [run.communicate()[0].strip() for run in runs] == ["[0, 1, 4]"] * 2
    left = [p.name for p in (tmp_path / "race" / "native").iterdir()]
    assert len(left) == 1, f"one library and no leftovers, got {left}"


def test_compile_error_shows_the_compiler_and_a_way_out(source):
    source.write_text('#include "abi.h"\nS2D_EXPORT int broken() { return not_declared; }\n')
    with pytest.raises(RuntimeError, match=r"(?s)cannot compile .*not_declared.*S2D_COMPILER"):
        native_build.load("broken", [source])


def test_missing_source_is_named(source):
    with pytest.raises(FileNotFoundError, match=r"gone\.cpp"):
        native_build.load("kernel", [source.parent / "gone.cpp"])


def test_no_compiler_at_all_is_one_clear_error(source, monkeypatch):
    monkeypatch.setenv("PATH", str(source.parent))
    monkeypatch.setattr(compilers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RuntimeError, match=r"(?s)no C\+\+ compiler works.*pip install ziglang"):
        native_build.load("nothing", [source])


def test_unusable_system_compiler_gives_way_to_zig(source, monkeypatch, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="s2d")
    fake = tmp_path / "bin" / "c++"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "fake 1.0" && exit 0\necho no headers >&2; exit 1\n'
    )
    fake.chmod(0o755)
    for name in ("g++", "clang++"):
        (fake.parent / name).write_bytes(fake.read_bytes())
        (fake.parent / name).chmod(0o755)
    # In front of the real PATH: zig looks at its programs to know the system.
    monkeypatch.setenv("PATH", f"{fake.parent}:{os.environ['PATH']}")
    compilers._first_line.cache_clear()
    library = native_build.load("fallback", [source])
    compilers._first_line.cache_clear()
    assert squares(library, 3, 2) == [0, 1, 4]
    assert "ziglang" in caplog.text


def test_forced_compiler_must_be_known(source, monkeypatch):
    monkeypatch.setenv("S2D_COMPILER", "msvc")
    with pytest.raises(ValueError, match="expected system or zig"):
        native_build.load("kernel", [source])


def test_unwritable_cache_falls_back_to_a_temporary_folder(monkeypatch, tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    monkeypatch.setenv("S2D_CACHE_DIR", str(blocked))
    folder = cache.cache_dir()
    assert folder.is_dir() and blocked not in folder.parents


def test_num_threads_honours_settings_in_order(monkeypatch):
    monkeypatch.setattr(native_build, "_settings", {"num_threads": None})
    monkeypatch.setenv("S2D_NUM_THREADS", "3")
    assert native_build.num_threads() == 3
    native_build.set_num_threads(1)
    assert native_build.num_threads() == 1
    native_build.set_num_threads(None)
    monkeypatch.setenv("S2D_NUM_THREADS", "two")
    with pytest.raises(ValueError, match=r"S2D_NUM_THREADS.*'two'"):
        native_build.num_threads()
    monkeypatch.delenv("S2D_NUM_THREADS")
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert native_build.num_threads() == 5
    monkeypatch.setenv("OMP_NUM_THREADS", "4,2")  # legal for OpenMP: threads of nested regions
    assert 1 <= native_build.num_threads() <= (os.cpu_count() or 1)
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= native_build.num_threads() <= (os.cpu_count() or 1)
    with pytest.raises(ValueError, match=">= 1"):
        native_build.set_num_threads(0)


def test_headers_are_packaged():
    assert {p.name for p in Path(native_build.include_dir()).glob("*.h")} >= {"parallel.h", "abi.h"}
