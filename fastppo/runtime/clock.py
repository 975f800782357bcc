"""Where wall time goes: phases, and steps per second with warm-up told apart."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# `rollout` is env, act and store where they are one graph and can't be told apart
PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log", "save")
WINDOW = 10


class _Phase:
    """A reusable timer; a plain class as a generator-based one costs several times more, and it runs every step."""

    __slots__ = ("_begin", "_clock", "total")

    def __init__(self, clock: Clock) -> None:
        self.total = 0.0
        self._begin = 0.0
        self._clock = clock

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        if self._clock.wait is not None:
            self._clock.wait()
        self.total += time.perf_counter() - self._begin


class Clock:
    """Times of a run. An iteration runs from tick to tick: its rollout, its update, and the logging of the one before.

    All four figures count real environment steps over wall seconds, rollout and update and logging together:
    cumulative (since `start`), window (last 10 iterations), steady (without the first iteration, in which warm-up and
    compilation lie) and total (since this object was made, so that setting up counts too).

    Attributes:
        wait: called at the end of each phase, so that it holds what the GPU did in it; None: phases are the host's
            time, and what the GPU does late counts where the host waits for it. For measurements: waiting costs speed.
    """

    def __init__(self) -> None:
        """Begin with setting up."""
        self.wait: Callable[[], None] | None = None
        self._phases = {name: _Phase(self) for name in PHASES}
        self._made = time.perf_counter()
        self._begun = self._made
        self._paused = 0.0
        # (seconds, steps) at the ends of the last iterations
        self._ticks: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=WINDOW + 1)
        self._start = (0.0, 0)
        self._first: tuple[float, int] | None = None

    def start(self, seconds: float = 0.0, steps: int = 0) -> None:
        """Setting up is over, with whatever phases were run in it to compile or record them.

        A resumed run had `seconds` and `steps` behind it: the cumulative rate counts them, the others don't.
        """
        self._start = (seconds, steps)
        self._ticks.append(self._start)
        self._ticks.popleft()
        self._begun = time.perf_counter() - seconds
        for phase in self._phases.values():
            phase.total = 0.0

    def phase(self, name: str) -> _Phase:
        """A context manager that adds to the phase `name`."""
        return self._phases[name]

    def tick(self, steps: int) -> None:
        """An iteration's update is done; `steps` real environment steps so far."""
        self._ticks.append((time.perf_counter() - self._begun - self._paused, steps))
        if self._first is None:
            self._first = self._ticks[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Around what is not training: the caller's own code between iterations."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """Wall seconds from `start` to the last tick, pauses left out."""
        return self._ticks[-1][0]

    @property
    def sps_cumulative(self) -> float:
        """Steps per second since `start`."""
        return _rate((0.0, 0), self._ticks[-1])

    @property
    def sps_window(self) -> float:
        """Steps per second over the last iterations."""
        return _rate(self._ticks[0], self._ticks[-1])

    @property
    def sps_steady(self) -> float:
        """Steps per second without the first iteration; with it, as long as there is no other."""
        last = self._ticks[-1]
        return _rate(self._start if self._first is None or last == self._first else self._first, last)

    @property
    def sps_total(self) -> float:
        """Steps per second, setting up included."""
        return _rate((self._made - self._begun, self._start[1]), self._ticks[-1])

    def phase_seconds(self) -> dict[str, float]:
        """Seconds in each phase so far."""
        return {name: phase.total for name, phase in self._phases.items()}


def _rate(a: tuple[float, int], b: tuple[float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else 0.0
