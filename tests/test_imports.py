"""The layers of docs/architecture.md, read from the source with `ast`, and imports on a bare machine."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

LAYERS = [
    {"log", "checks", "files", "device"},
    {
        "geometry",
        "sh",
        "images",
        "config",
        "stage_folders",
        "stage_io",
        "losses",
        "metrics",
        "memory_plan",
        "runs",
    },
    {
        "cameras",
        "lenses",
        "plain_photos",
        "triangulation",
        "ply_io",
        "depth_io",
        "colmap_io",
        "transforms_io",
    },
    {"scene", "split", "sampling", "trajectories", "gaussians", "alignment", "capture", "poses"},
    {
        "rasterize",
        "densify",
        "optim",
        "refinement",
        "model_folder",
        "views",
        "completion",
        "renders",
        "ensemble",
    },
    {
        "guidance",
        "fixer",
        "training",
        "saved_runs",
        "pairs",
        "scored_cameras",
        "fixed_views",
        "backdrop",
        "layers",
        "novel",
        "hier",
        "strategies",
    },
    {"scoring", "hier_evaluation", "report", "export", "viewer"},
]
LAYER = {module: number for number, modules in enumerate(LAYERS) for module in modules}

# Packages that one place alone may import, so that what they stand for can be exchanged there.
ONLY_IMPORTERS = {
    "simple_knn": {"gaussians"},
    "diff_gaussian_rasterization": {"rasterize", "optim"},
    "fused_ssim": {"losses"},
    "native_build": {"guidance", "device"},
    "diffusers": {"fixer"},
    "peft": {"fixer"},
    "transformers": {"fixer", "guidance", "hier"},
    "pi3": {"guidance"},  # visual geometry models: not in the requirements, docs/providers.md
    "vggt": {"guidance"},
    "mapanything": {"guidance"},
    "depth_anything_3": {"guidance"},
    "huggingface_hub": {"fixer"},  # comes with diffusers
    "yaml": {"config"},
    "tyro": {"config"},
    "plyfile": {"ply_io"},
    "starlette": {"layers"},
    "uvicorn": {"layers"},
    "viser": {"viewer"},
    "zstandard": {"layers"},
}
NEVER = {
    "torchvision",
    "lpips",
}  # torchvision does not load beside a CPU build of torch, and lpips imports it

# The networks subclass diffusers' modules, so these files alone need it to be imported; everything else imports them inside
# functions, which the test of a bare machine proves.
NEEDS_DIFFUSERS = ROOT / "s2d" / "fixer" / "network"

# What `import NAME` needs to have installed, where the names differ.
DISTRIBUTIONS = {"cv2": "opencv-python-headless", "PIL": "pillow", "yaml": "pyyaml"}
OURS = {"s2d", "simple_knn", "diff_gaussian_rasterization", "fused_ssim", "native_build"}


def sources():
    return sorted((ROOT / "s2d").rglob("*.py"))


def scripts():
    return sorted(ROOT.glob("*.py"))


def imports(path):
    """Dotted names that a file imports, at any depth; `from s2d import x` counts as s2d.x."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; say `from s2d...`"
            names |= (
                {f"{node.module}.{alias.name}" for alias in node.names}
                if node.module == "s2d"
                else {node.module}
            )
    return names


def module_of(path):
    """The entry of the table that a file belongs to: `s2d/guidance/mvs.py` is `guidance`."""
    first = path.relative_to(ROOT / "s2d").parts[0]
    return first.removesuffix(".py")


def library_imports(path):
    modules = {name.split(".")[1] for name in imports(path) if name.startswith("s2d.")}
    return modules - {"__version__"}


def test_every_module_has_a_layer():
    modules = {module_of(path) for path in sources()} - {"__init__"}
    assert modules <= LAYER.keys(), (
        f"not in the table of docs/architecture.md: {sorted(modules - LAYER.keys())}"
    )


def test_the_table_in_the_documentation_is_this_one():
    rows = re.findall(
        r"^\| (\d) \| (.*?) \|", (ROOT / "docs/architecture.md").read_text(), re.MULTILINE
    )
    documented = [{name.strip("`/") for name in cell.split(", ")} for _, cell in rows]
    assert documented == LAYERS


def test_modules_import_from_layers_above_or_beside_them():
    wrong = [
        f"{path.relative_to(ROOT)} (layer {LAYER[module_of(path)]}) imports {other} (layer {LAYER[other]})"
        for path in sources()
        for other in library_imports(path)
        if module_of(path) in LAYER and LAYER.get(other, 0) > LAYER[module_of(path)]
    ]
    assert not wrong, "\n".join(wrong)


def test_no_module_imports_itself_through_others():
    graph = {}
    for path in sources():
        graph.setdefault(module_of(path), set()).update(library_imports(path))
    done, stack = set(), []

    def visit(module):
        assert module not in stack, f"cycle: {' -> '.join([*stack, module])}"
        if module not in done:
            stack.append(module)
            for other in sorted(
                graph.get(module, set()) - {module}
            ):  # files of one folder may know each other
                visit(other)
            done.add(stack.pop())

    for module in sorted(graph):
        visit(module)


def test_some_packages_have_one_importer():
    wrong = [
        f"{path.relative_to(ROOT)} imports {name}"
        for path in sources()
        for name in {full.split(".")[0] for full in imports(path)}
        if name in NEVER or module_of(path) not in ONLY_IMPORTERS.get(name, {module_of(path)})
    ]
    assert not wrong, "\n".join(wrong)


def test_the_library_does_not_know_the_scripts_and_scripts_not_each_other():
    names = {path.stem for path in scripts()} | {"tools"}
    for path in [*sources(), *scripts(), *(ROOT / "tools").glob("*.py")]:
        known = {name.split(".")[0] for name in imports(path)} & names
        assert not known, f"{path.relative_to(ROOT)} imports {known}"


def test_every_imported_package_is_in_the_requirements():
    listed = {
        re.split(r"[=<>]", line)[0].lower()
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if line and not line.startswith("#")
    }
    files = [
        *sources(),
        *scripts(),
        *(ROOT / "tools").glob("*.py"),
        *(ROOT / "third_party").rglob("*.py"),
    ]
    local = OURS | {path.stem for path in files} | {"benchmarks"}
    missing = {
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        for name in {full.split(".")[0] for full in imports(path) if full}
        if name not in sys.stdlib_module_names
        and name not in local
        and DISTRIBUTIONS.get(name, name).lower() not in listed
        and name not in ONLY_IMPORTERS  # optional, and confined above
    }
    assert not missing, "\n".join(sorted(missing))


def test_every_line_of_the_requirements_says_why():
    for path in ROOT.glob("requirements*.txt"):
        for line in path.read_text().splitlines():
            assert not line or "#" in line, f"{path.name}: {line}"


BARE_MACHINE = """
import importlib, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}} (taken away by the test)", name=name)

sys.meta_path.insert(0, Absent())
sys.path.insert(0, {root!r})

import subprocess
def no_compiler(*arguments, **options):
    raise AssertionError(f"a process was started by an import: {{arguments}}")
subprocess.Popen.__init__ = no_compiler

for name in {modules!r}:
    importlib.import_module(name)
import torch
assert not torch.cuda.is_initialized()
"""


def test_everything_imports_without_gpu_diffusers_and_compiler(tmp_path):
    """An empty kernel cache stays empty, and no process (a compiler) is started."""
    modules = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        for path in [*sources(), *scripts()]
        if NEEDS_DIFFUSERS not in path.parents
    ]
    absent = {"diffusers", "peft", "transformers", "huggingface_hub", "accelerate"} | NEVER
    code = BARE_MACHINE.format(absent=absent, root=str(ROOT), modules=modules)
    environment = {
        "PATH": "",
        "HOME": str(tmp_path),
        "XDG_CACHE_HOME": str(tmp_path),
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.rglob("*.so"))


@pytest.mark.parametrize("path", scripts(), ids=lambda path: path.stem)
def test_a_script_reads_top_to_bottom(path):
    """Docstring with Reads, Writes and Example; Config; main; a guarded last line."""
    tree = ast.parse(path.read_text())
    docstring = ast.get_docstring(tree)
    for word in ("Reads", "Writes", "Example"):
        assert word in docstring
    assert any(isinstance(node, ast.ClassDef) and node.name == "Config" for node in tree.body)
    main = next(
        node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "main"
    )
    assert ast.unparse(main.returns) == "Path"
    assert ast.unparse(tree.body[-1]).startswith("if __name__ == '__main__':")
