"""What a run says of itself: figures to every sink, health in words, lines in the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable

from rich.console import Console

from fastppo.monitoring.health import HealthFinding, History, check_health
from fastppo.monitoring.sinks.api import Sink
from fastppo.monitoring.stats import Stats

_JUDGE_SECONDS = 5.0


class RunLogger:
    """Hands figures on; a sink that fails is dropped, and training goes on.

    Attributes:
        console: where lines go; None: nowhere.
        history: of the run's figures, thinned.
        sinks: that take figures.
        findings: what health found wrong when it last looked.
    """

    def __init__(self, console: Console | None, action_size: int) -> None:
        """Speak on `console`; `action_size` as `check_health` takes it."""
        self.console, self._action_size = console, action_size
        self.sinks: list[Sink] = []
        self._judged, self._judged_at, self._step = time.monotonic(), 0, 0
        self._told: set[str] = set()
        self.history = History()
        self.findings: list[HealthFinding] = []

    def open(self, *sinks: Sink) -> None:
        """Hand figures to these too."""
        self.sinks += sinks

    def say(self, text: str) -> None:
        """A line in the terminal."""
        if self.console is not None:
            self.console.print(text, highlight=False, markup=False, soft_wrap=True)

    def write(self, stats: Stats) -> Stats:
        """One iteration; returns it with what health finds."""
        if not self.sinks:  # a process that logs nothing, or whose logs have all failed
            return stats
        self.history.add(stats.scalars)
        self._step = stats.global_step
        if time.monotonic() - self._judged > _JUDGE_SECONDS or stats.iteration == stats.n_iterations:
            self._judge()
        stats = dataclasses.replace(stats, findings=self.findings)
        for sink in list(self.sinks):
            try:
                sink.write(stats)
            except Exception as error:  # whatever a library raises, training is worth more than its log
                self.sinks.remove(sink)
                _quietly(sink.close)
                why = getattr(error, "strerror", None) or error
                self.say(f"{type(sink).__name__} can't write ({why}); its figures end here.")
        return stats

    def _judge(self) -> None:
        self.findings = check_health(self.history, self._action_size)
        self._judged, self._judged_at = time.monotonic(), self._step
        for finding in self.findings:
            if finding.name not in self._told:
                self._told.add(finding.name)
                self.say(f"health at {self._step:,} steps: {finding}")

    def close(self) -> None:
        """Say what health finds at the end, and close every sink."""
        if self.sinks and self._judged_at != self._step:  # it ended before its plan did
            self._judge()
        for sink in self.sinks:
            _quietly(sink.close)
        self.sinks = []


def _quietly(close: Callable[[], None]) -> None:
    """A file that can't be closed has been complained about already, or lost its last lines with its disk."""
    with contextlib.suppress(Exception):
        close()
