"""Curves for TensorBoard, where it is installed; `history.json` has the same numbers everywhere."""

import importlib.util
from pathlib import Path
from types import TracebackType


class ScalarWriter:
    """Writes rows of named numbers to `folder/tensorboard`; does nothing without a folder or without TensorBoard."""

    def __init__(self, folder: Path | None) -> None:
        self._writer = None
        if folder is not None and importlib.util.find_spec("tensorboard") is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(folder / "tensorboard"))

    def write(self, group: str, row: dict[str, float]) -> None:
        """Add a row of the history: every column becomes the curve `group/column` over `step`."""
        if self._writer is not None:
            for name, value in row.items():
                if name != "step":
                    self._writer.add_scalar(f"{group}/{name}", value, row["step"])

    def __enter__(self) -> "ScalarWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._writer is not None:
            self._writer.close()
