"""The run logger: statistics to every sink, health findings and messages to the terminal."""

from __future__ import annotations

import contextlib
import dataclasses

from rich.console import Console

from fastppo.errors import first_line
from fastppo.monitoring.health import HealthMonitor, RunTraits
from fastppo.monitoring.sinks.sink import Sink
from fastppo.monitoring.stats import Stats
from fastppo.runtime.console import print_line


class RunLogger:
    """Passes statistics to sinks and checks the run's health; a sink that fails is removed, and training continues.

    Attributes:
        console: prints messages; None: none are printed.
        health: the run's scalars and health findings.
        sinks: the open sinks.
    """

    def __init__(self, console: Console | None, traits: RunTraits) -> None:
        """Print to `console`; `traits` as for HealthMonitor."""
        self.console, self.health = console, HealthMonitor(traits)
        self.sinks: list[Sink] = []
        self._printed: set[str] = set()  # names of findings

    def open(self, *sinks: Sink) -> None:
        """Add sinks."""
        self.sinks += sinks

    def say(self, text: str) -> None:
        """Print a line in the terminal."""
        print_line(self.console, text)

    def write(self, stats: Stats) -> Stats:
        """Write one iteration to all sinks; return it with the current health findings."""
        if not self.sinks:  # not the main process, or all sinks have failed
            return stats
        self.health.add(stats.global_step, stats.scalars)
        for record in self.health.records:
            if record.lasts and record.latest.name not in self._printed:
                self._printed.add(record.latest.name)
                self.say(f"health at {record.latest_step:,} steps: {record.latest}")
        stats = dataclasses.replace(stats, findings=self.health.findings)
        for sink in list(self.sinks):
            try:
                sink.write(stats)
            except Exception as error:  # no error of a library may stop the training
                self.sinks.remove(sink)
                _close(sink)
                reason = getattr(error, "strerror", None) or first_line(error)
                self.say(f"{type(sink).__name__} can't write ({reason}); its log ends here, training continues.")
        return stats

    def close(self) -> None:
        """Close all sinks."""
        for sink in self.sinks:
            _close(sink)
        self.sinks = []


def _close(sink: Sink) -> None:
    """Close a sink, ignoring errors: a failed write has reported them, or they cost only the last lines."""
    with contextlib.suppress(Exception):
        sink.close()
