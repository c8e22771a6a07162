"""Timing of several ways to do the same, so that it survives a noisy machine: no command itself."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from smidgen.process.parallel import this_process

DEVICE = this_process().device
"""Where models and batches are: a GPU, if there is one."""


def device_name() -> str:
    """The GPU's name, or the instructions that torch uses on the CPU."""
    return torch.cuda.get_device_name(DEVICE) if DEVICE.type == "cuda" else torch.backends.cpu.get_cpu_capability()


def now() -> float:
    """Seconds so far: the processor's, of which other work takes none; of a GPU the clock's, once its work is done."""
    if DEVICE.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize()
    return time.perf_counter()


def alternated(ways: Mapping[str, Callable[[int], object]], rounds: int) -> dict[str, Any]:
    """Every way once a round, in turn.

    Args:
        ways: by name; each is called with the round's number, so that all ways get the same batches. The last is the
            one that the others are compared with.
        rounds: how often; one more comes first, which does not count.

    Returns:
        See `summed_up`.
    """
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number in range(-1, rounds):
        for way, act in ways.items():
            began = now()
            act(max(number, 0))
            if number >= 0:
                seconds[way].append(now() - began)
    return summed_up(seconds)


def summed_up(seconds: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Of the seconds of each way, in the order of the rounds.

    Returns:
        `seconds`, the least and the median by way, and `ratio`, of each way's sum to the last's.
    """
    *_, last = seconds
    return {
        "seconds": {
            way: {"least": round(min(own), 5), "median": round(statistics.median(own), 5)}
            for way, own in seconds.items()
        },
        "ratio": {way: round(sum(own) / sum(seconds[last]), 3) for way, own in seconds.items()},
    }


def agreement(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """How far apart two sets of tensors of the same names are, over their size."""
    if ours.keys() != theirs.keys():
        raise SystemExit(
            f"not the same: {sorted(ours.keys() - theirs.keys())[:2]}, {sorted(theirs.keys() - ours.keys())[:2]}"
        )
    apart = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in ours)
    return float((apart / sum(float(value.double().square().sum()) for value in theirs.values())) ** 0.5)


def roof(
    rows: int = 512, inside: int = 384, outside: int = 1536, *, dtype: torch.dtype = torch.float32, times: int = 40
) -> float:
    """The best GFLOP/s of a product, by default of the size of MiniLM's widest layer."""
    inputs, weights = (torch.randn(size, inside, device=DEVICE, dtype=dtype) for size in (rows, outside))
    seconds = []
    for _ in range(times):
        began = now()
        torch.nn.functional.linear(inputs, weights)
        seconds.append(now() - began)
    return 2 * rows * inside * outside / min(seconds) / 1e9
