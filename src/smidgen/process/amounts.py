"""Amounts as a person writes them: numbers as 600k, bytes as 2GB, time as 10min."""

from __future__ import annotations

import math
import re
from typing import Literal, NamedTuple

PREFIXES = {"": 1, "k": 10**3, "K": 10**3, "M": 10**6, "G": 10**9}
SECONDS = {"s": 1, "min": 60, "h": 3600}


Unit = Literal["numbers", "bytes", "seconds"]


class Amount(NamedTuple):
    """So many numbers, bytes or seconds."""

    value: float
    unit: Unit


def amount(text: str) -> Amount:
    """What a text such as "100k", "1.5M", "400kB", "2 GB", "90s", "10 min" or "1.5h" says.

    Raises:
        ValueError: it is no such amount, or none above 0.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*(?:([kKMG]?)(B?)|(s|min|h))\s*", text)
    if found is not None and 0 < (value := float(found.group(1))) < math.inf:
        prefix, is_bytes, time = found.group(2), found.group(3), found.group(4)
        if time is not None:
            return Amount(value * SECONDS[time], "seconds")
        return Amount(value * PREFIXES[prefix], "bytes" if is_bytes else "numbers")
    raise ValueError("must be numbers, such as 100k or 1.5M, bytes, as 400kB, or time, as 10min.")
