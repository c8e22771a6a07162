"""How much memory this process has taken: resident memory on a CPU, allocated memory on a GPU."""

from __future__ import annotations

import contextlib
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from smidgen.errors import UserError


def peak_memory(device: torch.device) -> int:
    """The most bytes held at once since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = _resident("VmHWM")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in kilobytes, except on a Mac
    # where there is nothing better: it begins at what the process that started this one held
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def used_memory(device: torch.device) -> int:
    """The bytes held now; on a CPU without /proc, the most so far."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    now = _resident("VmRSS")
    return peak_memory(device) if now is None else now


def _resident(field: str) -> int | None:
    """Bytes of this process's memory as Linux counts them under that name; None elsewhere."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    found = next((line for line in lines if line.startswith(f"{field}:")), None)
    return None if found is None else int(found.split()[1]) * 1024


@contextlib.contextmanager
def told_when_it_runs_out() -> Iterator[None]:
    """Inside, a lack of memory is a UserError that says what to lower."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError)
        if not known and not re.search("(not enough|can't allocate) memory", str(error)):  # a CPU's allocator's words
            raise
        raise UserError(
            "The memory does not suffice. Lower training.micro_batch_size (the result stays the same), set "
            "training.gradient_checkpointing=true, or lower data.max_length."
        ) from error
