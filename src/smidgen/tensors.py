"""The tensors of a safetensors file: their shapes from its header, and their numbers, none of them infinite or NaN."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from smidgen.errors import UserError

Shapes = dict[str, tuple[int, ...]]


def read_shapes(path: Path) -> Shapes:
    """The shapes by name; no number is read.

    Raises:
        UserError: the file is damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors by name, on the CPU.

    Raises:
        UserError: the file is damaged.
        ValueError: a tensor holds something else than finite floating-point numbers.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        # copied, since the file's own places are not aligned, and kernels then sum in another order
        tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    except SafetensorError as error:
        raise UserError(f"{path} is damaged: {error}") from error
    for name, tensor in tensors.items():
        if not tensor.is_floating_point() or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{name} holds numbers that are not finite, or are not floating-point")
    return tensors
