"""Stop requests: Ctrl-C, SIGTERM from a scheduler, SIGUSR1 from Slurm ahead of its time limit."""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopSignals:
    """A context that records the first stop signal, for the training loop to act on between iterations.

    The previous handlers return after the first signal, so a second one ends the process at once (Ctrl-C:
    KeyboardInterrupt). Outside the main thread, where Python allows no handlers, the context does nothing.

    Attributes:
        received: the first signal, or None.
        on_first: called by the handler of the first signal; must only set or print something.
    """

    def __init__(self) -> None:
        """Create the context; handlers are installed on entry."""
        self.received: signal.Signals | None = None
        self.on_first: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Install the handlers."""
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if number := getattr(signal, name, None):  # Windows has fewer
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Restore the previous handlers."""
        self._restore()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._restore()
        self.received = signal.Signals(number)
        if self.on_first is not None:
            self.on_first()

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    @property
    def exit_status(self) -> int:
        """The exit status by a shell's convention: 128 + the signal's number, or 0 without a signal."""
        return 0 if self.received is None else 128 + self.received


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Let SIGTERM raise SystemExit in the block, as Ctrl-C raises KeyboardInterrupt, so that `finally` clauses run.

    Outside the main thread, where Python allows no handlers, it does nothing.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
