"""Matrix products in fp32 by oneDNN, on CPUs where it is as exact as PyTorch's own choice, and faster.

PyTorch multiplies fp32 matrices by MKL, whose kernels leave half of the vector units of other makers' CPUs than Intel's
idle; oneDNN's do not, and made a training step twice as fast on AMD's (docs/results.md). On Intel's they are as fast
for large products and slower for small ones, so that they are left alone. PyTorch uses them only if they are allowed to
round to bfloat16, and the CPU has AVX-512. They do so on CPUs with bfloat16 matrix units (AMX), and stay in fp32 on
others: which of the two this CPU is, a product shows.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_ONEDNN: Any = torch.backends.mkldnn

LARGEST_ERROR = 5e-6
"""Of a product's entries, over their typical size: fp32 makes 2e-7 to 6e-7 of it, a rounding to bfloat16 2e-3."""


@contextlib.contextmanager
def exact_onednn(device: torch.device) -> Iterator[None]:
    """Inside, fp32 products on the CPU are oneDNN's if that `pays` on this machine, forward and backward.

    Args:
        device: where the model is; elsewhere than on a CPU nothing changes, nor where they are allowed already.
    """
    if device.type != "cpu" or _ONEDNN.matmul.fp32_precision == "bf16" or not pays():
        yield
        return
    with _allowed("bf16"), _Attention():
        yield


@functools.cache
def pays() -> bool:
    """Whether oneDNN's products are as exact on this CPU as PyTorch's own, and faster."""
    return "GenuineIntel" not in _maker() and is_exact()


def _maker() -> str:
    """What the system says of the CPU's maker."""
    known = Path("/proc/cpuinfo")
    return known.read_text() if known.is_file() else platform.processor()


@functools.cache
def is_exact() -> bool:
    """Whether oneDNN, allowed to round to bfloat16, computes on this CPU and does not do so."""
    if not torch.backends.mkldnn.is_available() or not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        return False
    generator = torch.Generator().manual_seed(0)
    inputs, weights, gradients = (
        torch.randn(*size, generator=generator) for size in ((96, 256), (512, 256), (96, 512))
    )
    with _allowed("bf16"), torch.no_grad():
        return all(
            _error(first, second) < LARGEST_ERROR
            for first, second in ((inputs, weights.T), (gradients, weights), (gradients.T, inputs))
        )


def _error(first: torch.Tensor, second: torch.Tensor) -> float:
    exact = first.double() @ second.double()
    return float(((first @ second).double() - exact).pow(2).mean().sqrt() / exact.pow(2).mean().sqrt())


@contextlib.contextmanager
def _allowed(precision: str) -> Iterator[None]:
    """Inside, oneDNN may compute fp32 products in this number format; "none": PyTorch does not use it for them."""
    before = _ONEDNN.matmul.fp32_precision
    _ONEDNN.matmul.fp32_precision = precision
    try:
        yield
    finally:
        _ONEDNN.matmul.fp32_precision = before


class _Attention(TorchFunctionMode):
    """Keeps the fused attention off oneDNN: it multiplies small blocks, each of which oneDNN would prepare for anew."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.nn.functional.scaled_dot_product_attention or torch.compiler.is_compiling():
            return func(*args, **(kwargs or {}))
        with _allowed("none"):
            output = func(*args, **(kwargs or {}))
        if output.grad_fn is not None:
            off = contextlib.ExitStack()
            output.grad_fn.register_prehook(lambda *_: off.enter_context(_allowed("none")))
            output.grad_fn.register_hook(lambda *_: off.close())
        return output
