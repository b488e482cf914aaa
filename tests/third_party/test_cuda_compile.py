"""Every CUDA source compiles for every architecture without a warning, and takes no more of a GPU than was known. Needs no GPU."""

import json
import struct

import cuda_usage
import pytest
from native_build.cuda import compile, nvrtc, signature

pytestmark = pytest.mark.skipif(
    not nvrtc.available(), reason="no NVRTC: pip install -r requirements-dev.txt"
)

# Eight registers are one step of how many threads fit into a multiprocessor.
MORE_REGISTERS = 8
SIZES = {"float": 4, "int": 4, "long long": 8, "double": 8, "bool": 1}


@pytest.mark.parametrize("arch", cuda_usage.ARCHS)
def test_every_source_compiles_without_a_warning(arch):
    for source in cuda_usage.sources():
        assert cuda_usage.compiled(source, arch).warnings == [], source


@pytest.mark.parametrize("arch", cuda_usage.ARCHS)
def test_no_kernel_takes_more_than_was_known(arch):
    expected = json.loads(cuda_usage.EXPECTED.read_text())
    if expected["nvrtc"] != ".".join(map(str, nvrtc.choose().version)):
        pytest.skip(f"the table was made with NVRTC {expected['nvrtc']}")
    known = {name: by_arch[f"sm_{arch}"] for name, by_arch in expected["kernels"].items()}
    found = dict(cuda_usage.usage(arch))
    cure = f"If that is meant: python {cuda_usage.__file__}"
    assert found.keys() == known.keys(), f"other kernels than in {cuda_usage.EXPECTED.name}. {cure}"
    more = []
    for name, taken in found.items():
        registers, shared, stack, spill = known[name]
        limits = compile.Usage(registers + MORE_REGISTERS, shared, stack, spill)
        for field in cuda_usage.FIELDS:
            if getattr(taken, field) > getattr(limits, field):
                more.append(f"{name}: {field} {getattr(taken, field)}, known {known[name]}")
    assert not more, f"sm_{arch}: {more}. {cure}"


def test_signatures_that_launches_are_checked_with_are_those_of_the_machine_code():
    """The oracle is the machine code itself, which says how long each parameter is (EIATTR_KPARAM_INFO of .nv.info.*)."""
    for source in cuda_usage.sources():
        sizes = parameter_sizes(cuda_usage.compiled(source, 90).code)
        parsed = {
            kernel: [8 if p.pointer else SIZES[p.type] for p in parameters]
            for kernel, parameters in signature.kernels_in(source.read_text()).items()
        }
        assert parsed == sizes, source


def parameter_sizes(cubin: bytes) -> dict[str, list[int]]:
    """Bytes of each parameter of each kernel of an ELF file."""
    table, count, names_at = (
        struct.unpack_from("<Q", cubin, 40)[0],
        *struct.unpack_from("<HH", cubin, 60),
    )
    headers = [struct.unpack_from("<IIQQQQIIQQ", cubin, table + 64 * i) for i in range(count)]
    names = headers[names_at]
    found = {}
    for header in headers:
        start = names[4] + header[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if name.startswith(".nv.info."):
            info = cubin[header[4] : header[4] + header[5]]
            found[name.removeprefix(".nv.info.")] = _sizes(info)
    return found


def _sizes(info: bytes) -> list[int]:
    sizes, at = {}, 0
    while at < len(info):
        form, attribute, length = struct.unpack_from("<BBH", info, at)
        at += 4
        if form != 4:  # the value is in the place of the length
            continue
        if attribute == 0x17:  # index, ordinal, offset, then the size in the upper bits
            _, ordinal, _, packed = struct.unpack_from("<IHHI", info, at)
            sizes[ordinal] = packed >> 18
        at += length
    return [sizes[i] for i in range(len(sizes))]


def test_a_spill_and_a_warning_are_noticed(tmp_path):
    """The check itself: a kernel that indexes registers at run time has a stack frame, and an unused variable warns."""
    source = tmp_path / "bad.cu"
    source.write_text(
        'extern "C" __global__ void indexes(const float* a, float* b) {\n  float v[64];\n  int unused;\n'
        "  for (int k = 0; k < 64; ++k) v[k] = a[k];\n"
        "  for (int k = 0; k < 64; ++k) b[k] = v[(int)a[k] & 63];\n}\n"
    )
    compiled = compile.compile_source(source, [], "sm_90", nvrtc.choose())
    assert compiled.usage["indexes"].stack_bytes == 64 * 4
    assert any("unused" in line for line in compiled.warnings)


def test_an_error_has_the_compilers_words(tmp_path):
    source = tmp_path / "broken.cu"
    source.write_text('extern "C" __global__ void f() { g(); }\n')
    with pytest.raises(nvrtc.CompileError, match=r"(?s)broken.cu.*identifier \"g\" is undefined"):
        compile.compile_source(source, [], "sm_90", nvrtc.choose())
