"""Being asked to stop: Ctrl-C, SIGTERM from a scheduler, SIGUSR1 from Slurm ahead of a time limit."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType, TracebackType
from typing import Any

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")


class StopSignals:
    """While open, the first signal is only remembered; whoever loops looks for it where nothing is half done.

    The second signal does what it did before: it ends the process at once (Ctrl-C: KeyboardInterrupt). Outside the main
    thread, where Python allows no handlers, nothing is remembered.

    Attributes:
        received: the first signal; None: none yet.
        on_first: called when it comes; must only set or print something.
    """

    def __init__(self) -> None:
        """Not open yet."""
        self.received: signal.Signals | None = None
        self.on_first: Callable[[], None] | None = None
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        """Take the signals over."""
        if threading.current_thread() is threading.main_thread():
            for name in _NAMES:
                if number := getattr(signal, name, None):  # Windows has fewer
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Give them back."""
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
        """What a shell expects of a process that was ended so; 0 without a signal."""
        return 0 if self.received is None else 128 + self.received
