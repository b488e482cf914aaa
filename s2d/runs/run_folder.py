"""The folder of one training: what it was started with, where it stands, and whether it may go on.

OUT/config.yaml          all settings; `--preset OUT/config.yaml` gives them back
OUT/training.json        what the result depends on, and how far it has come
OUT/history.json         losses and scores by step
OUT/checkpoints/         state.pth: everything that a step reads or changes; model_<step>: weights as the result's
OUT/eval/                step_<step>.png: what is made of samples that nothing is trained on
OUT/model_final.*        the result; the last file to be written
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from s2d.config import config_to_dict, config_to_yaml
from s2d.files import atomic_write_json, atomic_write_text, content_hash, locked, remove
from s2d.log import describe_machine, versions

FORMAT = 1
DESCRIPTION = "training.json"
RESULTS = ("config.yaml", DESCRIPTION, "history.json", "checkpoints", "eval", "tensorboard")


@dataclass(frozen=True)
class RunFolder:
    """Where a training writes."""

    dir: Path
    suffix: str  # of weights

    @property
    def state(self) -> Path:
        return self.dir / "checkpoints" / "state.pth"

    @property
    def final(self) -> Path:
        return self.dir / f"model_final{self.suffix}"

    def model(self, step: int) -> Path:
        return self.dir / "checkpoints" / f"model_{step}{self.suffix}"

    def sheet(self, step: int) -> Path:
        return self.dir / "eval" / f"step_{step:06d}.png"

    def prune_models(self, keep: int) -> None:
        """Delete all but the newest `keep` models in checkpoints/; 0 keeps all."""
        models = sorted(
            (self.dir / "checkpoints").glob(f"model_*{self.suffix}"),
            key=lambda path: int(path.stem.rpartition("_")[2]),
        )
        for path in models[:-keep] if keep else []:
            path.unlink()


def training_key(
    cfg: Any, samples_per_step: int, init_weights: Path | None, endless: bool, **seen: Any
) -> dict[str, Any]:
    """What the weights after a number of steps depend on.

    Args:
        cfg: The script's config.
        samples_per_step: Over all processes.
        init_weights: File of the weights to start from, if any.
        endless: The steps do not depend on how many there will be, so that their number may be raised later.
        seen: What else they depend on, such as the data; for JSON.
    """
    config = config_to_dict(cfg, only_hashed=True)
    for name in ("max_train_steps", "num_training_epochs") if endless else ():
        config.pop(name, None)
    return {
        "format": FORMAT,
        **config,
        "samples_per_step": samples_per_step,
        "init_weights": content_hash(init_weights) if init_weights else "none",
        **seen,
    }


@contextmanager
def open_run_folder(
    folder: Path, suffix: str, cfg: Any, key: dict[str, Any], overwrite: bool
) -> Iterator[RunFolder]:
    """Lock a folder for a training, new or to go on with; the main process alone does this.

    Raises:
        ValueError: Another process works in it, or it holds a training with other settings; names them.
    """
    run_folder = RunFolder(folder, suffix)
    with locked(folder, "--output-dir"):
        key = json.loads(json.dumps(key))  # as it will be read back
        known = _read_key(folder / DESCRIPTION)
        if known is not None and not overwrite:
            changes = [
                f"{name}: {known.get(name)}, now {key.get(name)}"
                for name in dict.fromkeys([*known, *key])
                if known.get(name) != key.get(name)
            ]
            if changes:
                raise ValueError(
                    f"{folder} holds a training with other settings or data ({'; '.join(changes)}). Pass --overwrite to "
                    "start it again, or another --output-dir to keep both."
                )
        elif overwrite:
            for path in [*folder.glob("model_final.*"), *(folder / name for name in RESULTS)]:
                if path.exists():
                    remove(path)
        if known is None or overwrite:
            description = {"key": key, "versions": versions(), "machine": describe_machine()}
            atomic_write_json(folder / DESCRIPTION, description)
        atomic_write_text(folder / "config.yaml", config_to_yaml(cfg))
        yield run_folder


def _read_key(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        return dict(json.loads(path.read_text())["key"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{path} is damaged. Pass --overwrite to start the training again, or another --output-dir."
        ) from None
