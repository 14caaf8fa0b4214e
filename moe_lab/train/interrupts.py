"""Ctrl-C between two training steps instead of in the middle of one."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class InterruptLater:
    """Inside this context the first Ctrl-C only sets ``requested``; a second one interrupts at once.

    A KeyboardInterrupt in the middle of an optimiser step would leave half of the weights updated: a state from which
    nobody can go on as if nothing had happened. Outside the main thread, where Python delivers no signals, the context
    does nothing.
    """

    def __init__(self) -> None:
        self.requested = False
        self._at_once = False
        self._before: Any = None

    def __enter__(self) -> InterruptLater:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._at_once or self.requested:
            raise KeyboardInterrupt
        self.requested = True

    def check(self) -> None:
        """Raise the KeyboardInterrupt that was put off, if any."""
        if self.requested:
            raise KeyboardInterrupt

    @contextmanager
    def at_once(self) -> Iterator[None]:
        """Inside, Ctrl-C is not put off (long code that changes no training state)."""
        self.check()
        self._at_once = True
        try:
            yield
        finally:
            self._at_once = False
