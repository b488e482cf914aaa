# SPDX-License-Identifier: Apache-2.0
"""The optimiser that 3DGS training scripts import: Adam that touches only the Gaussians that a view saw.

Notation: N Gaussians, one row each in every parameter; g a gradient, m and v Adam's first and second moment (`exp_avg`, `exp_avg_sq`),
b1, b2 its decay rates. A row that is visible gets

    m = b1 m + (1 - b1) g,   v = b2 v + (1 - b2) g²,   p = p - lr m / (√v + eps)

and one that is not keeps p, m and v to the bit. There is no bias correction, as 3DGS scripts know it: after its first gradient a row moves
by (1 - b1) / √(1 - b2) = 3.2 learning rates, and by up to 6.6 in the next steps. With `bias_correction` it is torch.optim.Adam's rule on
the visible rows: with t the calls so far, lr (1 - b2^t)^½ / (1 - b1^t) takes the place of lr, and eps (1 - b2^t)^½ that of eps.
"""

import ctypes
import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import native_build
import torch
from native_build import cuda
from torch import Tensor

from diff_gaussian_rasterization import _native

_ALIGNMENT = 16  # bytes: what a GPU loads at once
_STEP = "SparseGaussianAdam.step"


class AdamRule(NamedTuple):
    """One parameter, checked, and what a step does with it: tensors of one shape on one device, numbers of the formula."""

    param: Tensor
    grad: Tensor | None  # None where the kernel makes it itself
    exp_avg: Tensor
    exp_avg_sq: Tensor
    lr: float
    beta1: float
    beta2: float
    eps: float


def adam_tensors(rules: Sequence[AdamRule]) -> ctypes.Array:
    """Describe parameters for a kernel on the CPU: a ctypes array of `AdamTensor`."""
    tensors = (_native.AdamTensor * len(rules))()
    for entry, rule in zip(tensors, rules, strict=True):
        for field in ("param", "grad", "exp_avg", "exp_avg_sq"):
            setattr(entry, field, _native.pointer(getattr(rule, field)))
        entry.width = rule.param.numel() // max(len(rule.param), 1)
        entry.lr, entry.beta1, entry.beta2, entry.eps = rule[4:]
    return tensors


class SparseGaussianAdam(torch.optim.Adam):
    """Adam on the visible rows of tensors that all have one row per Gaussian; the module's docstring has the formula.

    State of a parameter: `exp_avg`, `exp_avg_sq` and `step` (calls so far), as `torch.optim.Adam` names them. So code that
    edits them by row works, and so do the state_dicts of a `torch.optim.Adam` with the same groups.

    Args:
        params: Groups (dicts) of one tensor each, as for torch.optim.Adam: float32, contiguous, [N, ...] of any trailing shape,
            on the CPU or on one GPU.
        lr: Learning rate of groups that have none of their own.
        eps: Added to √v.
        bias_correction: See the module's docstring.

    Raises:
        ValueError: A group has not exactly one tensor.
    """

    def __init__(
        self, params: Iterable[Any], lr: float, eps: float, *, bias_correction: bool = False
    ) -> None:
        super().__init__(params, lr=lr, eps=eps)
        self.bias_correction = bias_correction
        for number, group in enumerate(self.param_groups):
            if len(group["params"]) != 1:
                raise ValueError(
                    f"SparseGaussianAdam: expected one tensor in every parameter group, got {len(group['params'])} in group "
                    f"{number}. Give a list of dicts, one per tensor."
                )

    @torch.no_grad()
    def step(self, visibility: Tensor | None = None, N: int | None = None) -> None:
        """Update the visible rows of every parameter that has a gradient, in place, in one call of the kernel.

        Args:
            visibility: True, or a radius > 0, where a Gaussian was seen; all were where None. [N] bool or int32
            N: Number of Gaussians; only checked.

        Raises:
            ValueError: visibility, a parameter, a gradient or a moment has another shape, type or device.
        """
        groups = [group for group in self.param_groups if group["params"][0].grad is not None]
        if not groups:
            return
        num = len(groups[0]["params"][0])
        if N not in (None, num):
            raise ValueError(
                f"SparseGaussianAdam.step: expected N={num}, the rows of the first parameter, got {N}."
            )
        device = groups[0]["params"][0].device
        if visibility is not None:
            dtypes = (torch.bool, torch.int32)
            _check(_STEP, "visibility", visibility, (num,), device, dtypes)
        # The gradients are held until the kernel is done: one with strides is a copy that nobody else holds.
        rules = [
            self._rule(group, num, device, group["params"][0].grad.contiguous()) for group in groups
        ]
        if cuda.on_gpu(groups[0]["params"][0]):
            from diff_gaussian_rasterization import _cuda

            _cuda.adam(rules, visibility)
        else:
            tensors = adam_tensors(rules)
            args = _native.AdamArgs(num, len(groups), ctypes.addressof(tensors))
            if visibility is not None:
                args.visible, args.visible_bytes = visibility.data_ptr(), visibility.element_size()
            _call("s2d_adam", ctypes.byref(args))
        for group in groups:
            self.state[group["params"][0]]["step"] += 1

    @contextmanager
    def lent(self, params: Sequence[Tensor]) -> Iterator[list[AdamRule]]:
        """Lend parameters, moments and rates to a kernel that makes the gradients itself; then the step counts.

        Args:
            params: Exactly what the groups hold, in any order.

        Yields:
            What a step does with each, in the order of `params`, without gradients.

        Raises:
            ValueError: The groups hold other tensors, or a tensor has another shape, type or device.
        """
        group_of = {group["params"][0]: group for group in self.param_groups}
        if group_of.keys() != set(params):
            raise ValueError(
                f"SparseGaussianAdam: expected an optimiser of exactly the {len(params)} tensors that were rendered, got one of "
                f"{len(group_of)} tensors, not all the same. Make the optimiser anew when the tensors change."
            )
        device = params[0].device
        yield [self._rule(group_of[param], len(param), device, None) for param in params]
        for param in params:
            self.state[param]["step"] += 1

    def _rule(
        self, group: dict[str, Any], num: int, device: torch.device, gradient: Tensor | None
    ) -> AdamRule:
        """Check one parameter for the kernel and work out its rates; zero moments where it has none."""
        param = group["params"][0]
        state = self.state[param]
        if not state:
            state["step"] = torch.tensor(0.0)
            state["exp_avg"] = torch.zeros_like(param)
            state["exp_avg_sq"] = torch.zeros_like(param)
        name, shape = group.get("name", "parameter"), (num, *param.shape[1:])
        tensors = (param, gradient, state["exp_avg"], state["exp_avg_sq"])
        labels = (name, f"gradient of {name}", f"exp_avg of {name}", f"exp_avg_sq of {name}")
        for label, tensor in zip(labels, tensors, strict=True):
            if tensor is not None:
                _check(_STEP, label, tensor, shape, device)
        lr, eps = group["lr"], group["eps"]
        beta1, beta2 = group["betas"]
        if self.bias_correction:
            calls = float(state["step"]) + 1.0
            root = math.sqrt(1.0 - beta2**calls)
            lr *= root / (1.0 - beta1**calls)
            eps *= root
        return AdamRule(*tensors, lr, beta1, beta2, eps)


def _check(
    where: str,
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    device: torch.device,
    dtypes: tuple[torch.dtype, ...] = (torch.float32,),
) -> None:
    """Raise unless the kernel can read (or write) this tensor in place, on a device that has kernels."""
    if tensor.shape != shape:
        raise ValueError(f"{where}: {name} must be {list(shape)}, got {list(tensor.shape)}.")
    usable = tensor.device == device and (device.type == "cpu" or cuda.on_gpu(tensor))
    if tensor.dtype not in dtypes or not usable:
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        place = device if device.type == "cuda" else "the CPU"
        raise ValueError(
            f"{where}: {name} must be {wanted} on {place}, got {tensor.dtype} on {tensor.device}. Convert it first."
        )
    if not tensor.is_contiguous():
        raise ValueError(
            f"{where}: {name} must be contiguous, got strides {tensor.stride()}. Pass .contiguous()."
        )
    if device.type != "cpu" and tensor.data_ptr() % _ALIGNMENT:
        raise ValueError(
            f"{where}: {name} must start at a multiple of {_ALIGNMENT} bytes, as tensors of their own do. Pass .clone()."
        )


def _call(function: str, *args: Any) -> None:
    """Run a function of the core; its errors become exceptions."""
    lib = _native.library()
    if getattr(lib, function)(*args, ctypes.c_int32(native_build.num_threads())):
        raise RuntimeError(f"{function}: {lib.s2d_last_error().decode()}")
