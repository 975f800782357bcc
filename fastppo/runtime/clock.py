"""Wall time of a run: seconds per phase, and steps per second with and without set-up and warm-up."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

# `rollout` stands for env, act and store where they are captured as one graph and can't be timed apart
PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log", "save")
BETWEEN = ("evaluation", "video")  # between iterations: in no rate, but in the wall time
WINDOW = 10  # iterations in `sps_window`


class _Phase:
    """A reusable timer. It runs every step, and a generator-based context manager would cost several times more."""

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
    """Measures a run. An iteration lasts from tick to tick: its rollout, its update and the previous one's logging.

    Four rates count real environment steps per wall second, over rollout, update and logging:
    cumulative (since `start`), window (last 10 iterations), steady (without the first iteration, which includes warm-up
    and compilation) and total (since construction, so including set-up). None counts pauses.

    Attributes:
        wait: called at the end of each phase, such as torch.cuda.synchronize, to count GPU work in the phase that
            started it; this costs speed. None: a phase counts host time, and GPU work counts where the host waits for
            it.
        setup_seconds: wall seconds from construction to `start`; 0 before it.
    """

    def __init__(self) -> None:
        """Start counting set-up time."""
        self.wait: Callable[[], None] | None = None
        self.setup_seconds = 0.0
        self._phases = {name: _Phase(self) for name in (*PHASES, *BETWEEN)}
        self._lapped = 0.0
        self._made = time.perf_counter()
        self._begun = self._made
        self._paused = self._paused_before = 0.0
        # (seconds, steps) at the end of each of the last iterations
        self._ticks: deque[tuple[float, int]] = deque([(0.0, 0)], maxlen=WINDOW + 1)
        self._start = (0.0, 0)
        self._first: tuple[float, int] | None = None

    def start(self, seconds: float = 0.0, steps: int = 0, paused: float = 0.0) -> None:
        """End set-up, and reset the phases that ran in it for compilation or capture.

        Args:
            seconds: training time before a resume; the cumulative rate alone counts it.
            steps: environment steps before a resume; likewise.
            paused: seconds of pauses before a resume.
        """
        self._start, self._paused_before = (seconds, steps), paused
        self._ticks.append(self._start)
        self._ticks.popleft()
        now = time.perf_counter()
        self.setup_seconds, self._begun = now - self._made, now - seconds
        for phase in self._phases.values():
            phase.total = 0.0

    def phase(self, name: str) -> _Phase:
        """Return a context manager that adds its time to the phase `name`, one of PHASES or BETWEEN."""
        return self._phases[name]

    def begin_laps(self) -> None:
        """Begin the first of several laps, which follow one another without a gap."""
        self._lapped = time.perf_counter()

    def lap(self, phase: _Phase) -> None:
        """Add the time since the last lap to `phase`; for work of microseconds, as it costs half a context manager."""
        if self.wait is not None:
            self.wait()
        now = time.perf_counter()
        phase.total += now - self._lapped
        self._lapped = now

    def tick(self, steps: int) -> None:
        """End an iteration, after `steps` real environment steps in all."""
        self._ticks.append((time.perf_counter() - self._begun - self._paused, steps))
        if self._first is None:
            self._first = self._ticks[-1]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Exclude the body from all rates: evaluations, videos and the caller's own code between iterations."""
        begin = time.perf_counter()
        try:
            yield
        finally:
            self._paused += time.perf_counter() - begin

    @property
    def seconds(self) -> float:
        """Wall seconds from `start` to the last tick, without pauses."""
        return self._ticks[-1][0]

    @property
    def paused_seconds(self) -> float:
        """Wall seconds of the pauses so far, with those before a resume."""
        return self._paused_before + self._paused

    @property
    def wall_seconds(self) -> float:
        """Wall seconds since construction, with set-up and pauses."""
        return time.perf_counter() - self._made

    @property
    def sps_cumulative(self) -> float:
        """Steps per second since `start`."""
        return _rate((0.0, 0), self._ticks[-1])

    @property
    def sps_window(self) -> float:
        """Steps per second over the last 10 iterations."""
        return _rate(self._ticks[0], self._ticks[-1])

    @property
    def sps_steady(self) -> float:
        """Steps per second without the first iteration, or over it while it is the only one."""
        last = self._ticks[-1]
        return _rate(self._start if self._first is None or last == self._first else self._first, last)

    @property
    def sps_total(self) -> float:
        """Steps per second since construction."""
        return _rate((self._made - self._begun, self._start[1]), self._ticks[-1])

    def phase_seconds(self) -> dict[str, float]:
        """Return the seconds spent in each phase so far."""
        return {name: phase.total for name, phase in self._phases.items()}


def _rate(a: tuple[float, int], b: tuple[float, int]) -> float:
    return (b[1] - a[1]) / (b[0] - a[0]) if b[0] > a[0] else 0.0
