"""One frozen dataclass per script is its Python API, its command line and its preset file.

Precedence: defaults in the dataclass < `configs/<script>/<preset>.yaml` < flags. `<script>` is the script's name without `.py`.
A field's docstring (or the comment above it) is its help text; hyphens and underscores are alike in flags and in YAML keys.

A field that cannot change the result (`overwrite`, `device`, a path whose content is hashed as an input) is declared with
`no_effect(...)` and stays out of `config_hash`.

A field may be a group of settings that several scripts share: a frozen dataclass without __post_init__, `Annotated[Group, OmitArgPrefixes]`.
Its fields are flags and YAML keys like all others, without the group's name.
"""

from __future__ import annotations

import argparse
import dataclasses
import errno
import hashlib
import json
import os
import re
import signal
import sys
import threading
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import tyro
import yaml

from s2d.log import logger, setup_logging

CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"

ConfigT = TypeVar("ConfigT")


def no_effect(default: Any = dataclasses.MISSING) -> Any:
    """A dataclass field that does not change the result and therefore not the config's hash; required without a default."""
    return dataclasses.field(default=default, metadata={"affects_result": False})


def parse_config(cls: type[ConfigT], script: str, argv: Sequence[str] | None = None) -> ConfigT:
    """Build the dataclass from its defaults, a preset and the command line.

    Args:
        cls: Frozen dataclass. Fields: bool, int, float, str, Path, Literal, None, and tuples, lists or unions of these.
        script: Name of the script without `.py`; its presets are `configs/<script>/*.yaml`.
        argv: Arguments after the script's name; those of the process if None. `--preset NAME` or `--preset FILE.yaml` names a preset.

    Raises:
        FileNotFoundError: The preset does not exist.
        ValueError: The preset has an unknown key or a value of the wrong type, or the dataclass refused a value.
        SystemExit: `--help` (0), or flags that do not parse (2); tyro has printed why.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    preset_parser = argparse.ArgumentParser(prog=f"{script}.py", add_help=False, allow_abbrev=False)
    preset_parser.add_argument("--preset")
    chosen, argv = preset_parser.parse_known_args(argv)
    argv = _split_commas(cls, argv)
    values = {} if chosen.preset is None else _load_preset(cls, script, chosen.preset)

    # tyro reads defaults from an instance. It is made without __post_init__, which may reject what flags will still change.
    default = object.__new__(cls)
    for field in dataclasses.fields(cls):
        if field.name in values:
            value = values[field.name]
        elif field.default is not dataclasses.MISSING:
            value = field.default
        elif field.default_factory is not dataclasses.MISSING:
            value = field.default_factory()
        else:
            value = tyro.MISSING
        object.__setattr__(default, field.name, value)
    presets = ", ".join(_preset_names(script)) or "none yet"
    description = (cls.__doc__ or "").strip()
    return tyro.cli(
        cls,
        prog=f"{script}.py",
        description=f"{description}\n\n--preset NAME or FILE.yaml starts from a preset; flags win over it. Presets: {presets}.",
        args=argv,
        default=default,
    )


def run_script(
    main: Callable[[ConfigT], object],
    cls: type[ConfigT],
    script: str,
    argv: Sequence[str] | None = None,
) -> None:
    """Run a script's `main` on its parsed config, and end the process the way a command should.

    What a user can cause (ValueError, OSError) becomes one message and exit code 2; Ctrl-C and a plain `kill` say how to go on, exit code
    130. Any other exception is a defect of ours and keeps its traceback, as everything does with S2D_DEBUG=1.
    """
    setup_logging()
    if threading.current_thread() is threading.main_thread():
        # pycolmap answers SIGTERM with a screenful of stack trace; to us it is another Ctrl-C.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        main(parse_config(cls, script, argv))
    except KeyboardInterrupt:
        logger.error("Stopped. Run the same command again to go on from where it was.")
        sys.exit(130)
    except (ValueError, OSError) as error:
        if os.environ.get("S2D_DEBUG", "0") not in ("", "0"):
            raise
        logger.error("%s", describe_error(error))
        sys.exit(2)


def describe_error(error: Exception) -> str:
    """The message of an error for a user: ours as it is, the operating system's with what to do."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error) or type(error).__name__
    where = f": {error.filename}" if error.filename else ""
    cures = {
        errno.ENOSPC: "Free some space, or choose another output folder with -m.",
        errno.EDQUOT: "Free some space, or choose another output folder with -m.",
        errno.EFBIG: "Raise the limit on file sizes (ulimit -f), or choose another output folder with -m.",
        errno.EROFS: "Choose an output folder that can be written to with -m.",
        errno.EACCES: "Check who owns it, or choose another folder.",
        errno.EPERM: "Check who owns it, or choose another folder.",
        errno.ENOTDIR: "A part of this path is a file, not a folder. Check the path.",
        errno.ENOENT: "Check the path.",
    }
    cure = cures.get(error.errno or 0, "Set S2D_DEBUG=1 to see where it happened.")
    return f"{error.strerror}{where}. {cure}"


def config_to_dict(config: Any, only_hashed: bool = False) -> dict[str, Any]:
    """Field names and plain values (paths as text, tuples as lists), ready for JSON and YAML."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            values |= config_to_dict(value, only_hashed)
        elif not only_hashed or field.metadata.get("affects_result", True):
            values[field.name] = _plain(value)
    return values


def config_to_yaml(config: Any) -> str:
    """The whole config as YAML that `--preset` reads back."""
    return yaml.safe_dump(config_to_dict(config), sort_keys=False, allow_unicode=True)


def config_hash(config: Any) -> str:
    """SHA-256 over the fields that affect the result. [64 hex digits]"""
    text = json.dumps(config_to_dict(config, only_hashed=True), sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, (tuple, list)):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value


def _split_commas(cls: type, argv: Sequence[str]) -> list[str]:
    """`--keep-indices 0,3,5` as `--keep-indices 0 3 5`, for every field that holds several values."""
    several = {
        name
        for name, hint in get_type_hints(cls).items()
        if any(get_origin(option) in (tuple, list) for option in (hint, *get_args(hint)))
    }
    result: list[str] = []
    splitting = False
    for argument in argv:
        if re.match(r"--?[A-Za-z]", argument):  # a flag, not a negative number
            flag, equals, value = argument.partition("=")
            splitting = flag.lstrip("-").replace("-", "_") in several
            result += [flag, *value.split(",")] if splitting and equals else [argument]
        else:
            result += [part for part in argument.split(",") if part] if splitting else [argument]
    return result


def _preset_names(script: str) -> list[str]:
    return sorted(path.stem for path in (CONFIG_DIR / script).glob("*.yaml"))


def _load_preset(cls: type, script: str, preset: str) -> dict[str, Any]:
    """Checked values of a preset file, by field name."""
    is_path = preset.endswith((".yaml", ".yml")) or os.sep in preset
    path = Path(preset) if is_path else CONFIG_DIR / script / f"{preset}.yaml"
    if not path.is_file():
        known = ", ".join(_preset_names(script)) or "none"
        raise FileNotFoundError(
            f"{script}: preset {preset} not found: no file {path}. Known presets: {known}. A path to a .yaml file works too."
        )
    try:
        content = yaml.safe_load(path.read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(
            f"{path}: not valid YAML: {error}. Expected lines such as `seed: 0`."
        ) from None
    if content is None:  # an empty file, or comments only: a preset that changes nothing
        return {}
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected lines `key: value`, got a {type(content).__name__}.")
    groups = {
        name: hint for name, hint in get_type_hints(cls).items() if dataclasses.is_dataclass(hint)
    }
    group_of = {
        field.name: name for name, group in groups.items() for field in dataclasses.fields(group)
    }
    hints = get_type_hints(cls)
    for group in groups.values():
        hints |= get_type_hints(group)
    own = [field.name for field in dataclasses.fields(cls) if field.name not in groups]
    known = [*own, *group_of]
    values: dict[str, Any] = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise ValueError(f"{path}: unknown key {key}. Known keys: {', '.join(known)}.")
        try:
            values[name] = _convert(value, hints[name])
        except ValueError:
            expected = _show_type(hints[name])
            raise ValueError(f"{path}: {key} must be {expected}, got {value!r}.") from None
    for name, group in groups.items():
        inside = {key: values.pop(key) for key in list(values) if group_of.get(key) == name}
        if inside:
            values[name] = group(**inside)
    return values


def _convert(value: Any, hint: Any) -> Any:
    """`value` as read from YAML, as the annotated type; ValueError where it is of another type."""
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        for option in arguments:
            try:
                return _convert(value, option)
            except ValueError:
                continue
    elif origin is Literal:
        if any(value == option and type(value) is type(option) for option in arguments):
            return value
    elif origin in (tuple, list):
        if isinstance(value, list):
            if origin is list or arguments[-1] is ...:
                return origin(_convert(item, arguments[0]) for item in value)
            if len(arguments) == len(value):
                return tuple(
                    _convert(item, kind) for item, kind in zip(value, arguments, strict=True)
                )
    elif hint is type(None):
        if value is None:
            return None
    elif hint is float:
        # YAML 1.1 reads 1e-4 (no dot) as text; float() refuses real text with the ValueError that is wanted here.
        if isinstance(value, (int, float, str)) and not isinstance(value, bool):
            return float(value)
    elif hint is Path:
        if isinstance(value, str):
            return Path(value)
    elif hint in (bool, int, str):
        if type(value) is hint:
            return value
    else:
        raise TypeError(f"a config field has type {hint}, which presets cannot hold")
    raise ValueError


def _show_type(hint: Any) -> str:
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(_show_type(option) for option in arguments)
    if origin is Literal:
        return f"one of {', '.join(map(repr, arguments))}"
    if origin in (tuple, list):
        return f"a list of {_show_type(arguments[0])}"
    names = {
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        str: "text",
        Path: "a path",
    }
    return "null" if hint is type(None) else names.get(hint, str(hint))
