"""One dataclass is the API, the command line and the preset: they agree, and mistakes are named."""

import dataclasses
import errno
import importlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import pytest
from tyro.conf import arg

from s2d import config
from s2d.checks import check_range
from s2d.config import (
    config_hash,
    config_to_yaml,
    describe_error,
    no_effect,
    parse_config,
    run_script,
)

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Config:
    """A stage for tests."""

    source: Annotated[Path, arg(aliases=["-s"])] = no_effect()
    """The scene."""
    num_steps: int = 4000
    """Number of steps."""
    lr_means: float = 1.6e-4
    """Step size of the centres."""
    keep_indices: tuple[int, ...] | None = None
    """Positions of the kept photos."""
    size: tuple[int, int] = (32, 24)
    """Width and height."""
    mode: Literal["auto", "given"] = "auto"
    """How."""
    points: Path | None = None
    """A cloud."""
    densify: bool = True
    """Grow."""
    overwrite: bool = no_effect(False)
    """Rebuild."""

    def __post_init__(self):
        check_range("num_steps", self.num_steps, above=0, hint="Pass --num-steps 1 or more.")


@pytest.fixture
def presets(tmp_path, monkeypatch):
    """Writes configs/stage_x/NAME.yaml."""
    monkeypatch.setattr(config, "CONFIG_DIR", tmp_path / "configs")

    def write(name, text):
        path = tmp_path / "configs" / "stage_x" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        return path

    return write


def parse(*argv):
    return parse_config(Config, "stage_x", argv)


def refusal(*argv):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        parse("-s", "data", *argv)
    return str(caught.value)


def test_without_flags_the_command_line_is_the_dataclass(presets):
    assert parse("-s", "data") == Config(source=Path("data"))


def test_hyphens_and_underscores_are_alike(presets):
    assert parse("--source", "data", "--num_steps", "7", "--lr-means", "1e-3") == Config(
        source=Path("data"), num_steps=7, lr_means=1e-3
    )


def test_flags_win_over_the_preset_and_the_preset_over_the_defaults(presets):
    presets("fast", "num-steps: 300\nlr_means: 0.01\n")
    assert parse("-s", "data", "--preset", "fast", "--num-steps", "20") == Config(
        source=Path("data"), num_steps=20, lr_means=0.01
    )
    assert parse("--num-steps=20", "--preset=fast", "-s", "data").num_steps == 20


def test_a_preset_may_hold_required_fields_and_every_type(presets):
    presets(
        "all",
        "source: data\nlr_means: 1e-3\nkeep_indices: [0, 5]\nsize: [4, 3]\nmode: given\npoints: a.ply\ndensify: false\n",
    )
    assert parse("--preset", "all") == Config(
        source=Path("data"),
        lr_means=1e-3,
        keep_indices=(0, 5),
        size=(4, 3),
        mode="given",
        points=Path("a.ply"),
        densify=False,
    )


def test_a_preset_of_comments_changes_nothing(presets):
    presets("empty", "# nothing yet\n")
    assert parse("-s", "data", "--preset", "empty") == Config(source=Path("data"))


def test_a_preset_may_be_invalid_until_the_flags_repair_it(presets):
    presets("broken", "num_steps: -1\n")
    assert parse("-s", "data", "--preset", "broken", "--num-steps", "3").num_steps == 3


def test_a_preset_may_be_a_file_anywhere(presets, tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("num_steps: 11\n")
    assert parse("-s", "data", "--preset", str(path)).num_steps == 11


def test_yaml_of_a_config_is_a_preset_that_gives_it_back(presets, tmp_path):
    cfg = Config(source=Path("data"), keep_indices=(1, 2), points=Path("p.ply"), lr_means=1e-5)
    path = tmp_path / "config.yaml"
    path.write_text(config_to_yaml(cfg))
    assert parse("--preset", str(path)) == cfg


@pytest.mark.parametrize("flags", [("0,50,130",), ("0", "50", "130"), ("0,", "50,130")])
def test_lists_with_commas_or_spaces(presets, flags):
    assert parse("--keep-indices", *flags, "-s", "a,b") == Config(
        source=Path("a,b"), keep_indices=(0, 50, 130)
    )
    assert parse("-s", "d", "--keep_indices=0,50,130").keep_indices == (0, 50, 130)
    assert parse("-s", "d", "--keep-indices", "-1,2").keep_indices == (-1, 2)


def test_an_unknown_key_is_refused_with_the_known_ones(presets):
    path = presets("typo", "num_stepz: 3\n")
    known = "source, num_steps, lr_means, keep_indices, size, mode, points, densify, overwrite"
    assert refusal("--preset", "typo") == f"{path}: unknown key num_stepz. Known keys: {known}."


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("num_steps: many", "num_steps must be a whole number, got 'many'."),
        ("num_steps: 3.5", "num_steps must be a whole number, got 3.5."),
        ("num_steps: true", "num_steps must be a whole number, got True."),
        ("lr_means: fast", "lr_means must be a number, got 'fast'."),
        ("densify: 1", "densify must be true or false, got 1."),
        ("mode: best", "mode must be one of 'auto', 'given', got 'best'."),
        (
            "keep_indices: [0, x]",
            "keep_indices must be a list of a whole number or null, got [0, 'x'].",
        ),
        ("keep_indices: 3", "keep_indices must be a list of a whole number or null, got 3."),
        ("size: [1, 2, 3]", "size must be a list of a whole number, got [1, 2, 3]."),
        ("points: 3", "points must be a path or null, got 3."),
    ],
)
def test_a_wrong_type_names_file_and_key(presets, line, words):
    path = presets("wrong", line + "\n")
    assert refusal("--preset", "wrong") == f"{path}: {words}"


@pytest.mark.parametrize("text", ["- a\n- b\n", "just text\n"])
def test_a_preset_that_is_no_mapping(presets, text):
    presets("list", text)
    assert "expected lines `key: value`" in refusal("--preset", "list")


def test_a_preset_that_is_no_yaml(presets):
    presets("bad", "a: [1\n")
    assert "not valid YAML" in refusal("--preset", "bad")


def test_a_missing_preset_lists_what_there_is(presets):
    presets("fast", "")
    presets("fine", "")
    assert "Known presets: fast, fine." in refusal("--preset", "fats")
    with pytest.raises(FileNotFoundError, match=r"no file nowhere/x\.yaml"):
        parse("-s", "d", "--preset", "nowhere/x.yaml")


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (("-s", "d", "--num-stepz", "3"), "--num-stepz"),
        (("-s", "d", "--num-steps", "many"), "many"),
        ((), "--source"),
        (
            ("-s", "d", "--num-steps", "0"),
            "num_steps must be > 0, got 0. Pass --num-steps 1 or more.",
        ),
        (("-s", "d", "--preset"), "--preset"),
    ],
)
def test_flags_that_do_not_parse_end_with_code_2_and_words(presets, capsys, argv, words):
    with pytest.raises(SystemExit) as caught:
        parse(*argv)
    assert caught.value.code == 2
    shown = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert words in shown


def test_help_names_the_presets_and_the_fields(presets, capsys):
    presets("fast", "")
    with pytest.raises(SystemExit) as caught:
        parse("--help")
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    for words in ("Presets: fast.", "Number of steps.", "-s PATH"):
        assert words in shown


def test_hash_depends_on_what_changes_the_result_only():
    base = config_hash(Config(source=Path("a")))
    assert base == config_hash(Config(source=Path("b"), overwrite=True))
    others = [
        Config(source=Path("a"), num_steps=4001),
        Config(source=Path("a"), keep_indices=()),
        Config(source=Path("a"), points=Path("p")),
    ]
    assert len({base, *map(config_hash, others)}) == 4


@pytest.mark.parametrize(
    "path",
    sorted((ROOT / "configs").glob("*_*/*.yaml")),  # the folders named like a script
    ids=lambda path: f"{path.parent.name}/{path.stem}",
)
def test_every_preset_in_the_repository_fits_its_script(path, monkeypatch):
    for folder in (ROOT, ROOT / "tools"):
        monkeypatch.syspath_prepend(str(folder))
    script = importlib.import_module(path.parent.name)
    preset = config._load_preset(script.Config, path.parent.name, str(path))
    defaults = {field.name: field.default for field in dataclasses.fields(script.Config)}
    assert preset, f"{path} changes nothing"
    same = [key for key, value in preset.items() if value == defaults[key]]
    assert not same, f"{path}: {same} are the defaults already"


# --- run_script --------------------------------------------------------------------------------------------------------


def run(error=None):
    def main(cfg):
        if error is not None:
            raise error

    run_script(main, Config, "stage_x", ["-s", "data"])


def ending(capsys, error):
    with pytest.raises(SystemExit) as caught:
        run(error)
    return caught.value.code, capsys.readouterr().err.strip().splitlines()


def test_a_good_run_ends_normally(presets):
    run()


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (ValueError("keep_count must be 2"), 2, "keep_count must be 2"),
        (FileNotFoundError("stage0 is not finished: …"), 2, "stage0 is not finished: …"),
        (
            OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "out/x"),
            2,
            "No space left on device: out/x. Free some space, or choose another output folder with -m.",
        ),
        (
            PermissionError(errno.EACCES, os.strerror(errno.EACCES), "out"),
            2,
            "Permission denied: out. Check who owns it, or choose another folder.",
        ),
        (KeyboardInterrupt(), 130, "Run the same command again"),
    ],
)
def test_what_a_user_can_cause_is_one_line(presets, capsys, monkeypatch, error, code, words):
    monkeypatch.delenv("S2D_DEBUG", raising=False)
    got, lines = ending(capsys, error)
    assert got == code
    assert len(lines) == 1
    assert words in lines[0]


def test_a_defect_of_ours_keeps_its_traceback(presets):
    with pytest.raises(KeyError):
        run(KeyError("means"))


def test_debug_shows_the_traceback(presets, monkeypatch):
    monkeypatch.setenv("S2D_DEBUG", "1")
    with pytest.raises(ValueError, match="bad"):
        run(ValueError("bad"))


def test_an_error_without_words_is_named():
    assert describe_error(ValueError()) == "ValueError"
    assert describe_error(OSError(errno.EIO, "Input/output error", "f")).startswith(
        "Input/output error: f. "
    )
