"""torch.compile where it works; where it does not, one warning, and the function as it is."""

from collections.abc import Callable

import torch
from torch import Tensor

from s2d.fixer.memory import out_of_memory
from s2d.log import logger


class Compilable:
    """A function of tensors that may be compiled on its first call, once for each shape; that takes long."""

    def __init__(self, function: Callable[..., Tensor], compiled: bool) -> None:
        self.function = function
        self.compiled = compiled
        self._graph: Callable[..., Tensor] | None = None

    def __call__(self, *tensors: Tensor) -> Tensor:
        if self.compiled:
            try:
                if self._graph is None:
                    # One graph for any number of views would have to guess how large they get.
                    self._graph = torch.compile(self.function, dynamic=False)
                return self._graph(*tensors)
            # Compilers are missing or fail in many ways. What is wrong with the function itself, it will say below.
            except Exception as error:
                if out_of_memory(error):
                    raise
                reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
                logger.warning("--compile: torch.compile does not work here (%s). Going on without it.", reason)  # fmt: skip
            self.compiled, self._graph = False, None
        return self.function(*tensors)
