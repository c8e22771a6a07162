"""Ctrl-C and SIGTERM, noted for a moment in which the work can stop and be taken up again."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)

INSISTING = 2
"""Signals that the work may take to stop: one Ctrl-C comes from the terminal and from what started the process too."""


@contextlib.contextmanager
def stoppable() -> Iterator[list[int]]:
    """Inside, Ctrl-C and SIGTERM are noted in the list, so that no step is torn; insisting stops one all the same."""
    caught: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        caught.append(number)
        if len(caught) > INSISTING:
            raise KeyboardInterrupt

    if threading.current_thread() is not threading.main_thread():
        yield caught  # Python gives signals to the main thread alone
        return
    before = {number: signal.signal(number, note) for number in SIGNALS}
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)
