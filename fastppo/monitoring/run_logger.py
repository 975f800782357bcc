"""The run logger: statistics to every sink, health findings and messages to the terminal."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from functools import partial

from rich.console import Console

from fastppo.errors import first_line
from fastppo.monitoring.health import HealthMonitor
from fastppo.monitoring.health_rules import RunTraits
from fastppo.monitoring.log_interval import LogInterval
from fastppo.monitoring.sinks.sink import Sink
from fastppo.monitoring.stats import Stats
from fastppo.runtime.console import print_log

_GROUPS = ("charts", "losses", "time", "samples", "eval", "video", "info")  # of the run's own tags


class RunLogger:
    """Passes statistics to sinks and checks the run's health; a sink that fails is removed, and training continues.

    Attributes:
        console: prints messages; None: none are printed.
        interval: merges iterations into rows.
        health: the run's scalars and health findings.
        sinks: the open sinks.
    """

    def __init__(self, console: Console | None, traits: RunTraits, log_every: int = 1) -> None:
        """Log to `console`.

        Args:
            console: see above.
            traits: as for HealthMonitor.
            log_every: iterations per row.
        """
        self.console, self.health, self.interval = console, HealthMonitor(traits), LogInterval(log_every)
        self.sinks: list[Sink] = []
        self._live: list[Sink] = []  # those of `sinks` that receive every iteration
        self._printed: set[str] = set()  # names of findings
        self._latest: Stats | None = None

    def open(self, *sinks: Sink) -> None:
        """Add sinks that receive rows."""
        self.sinks += sinks

    def open_live(self, sink: Sink) -> None:
        """Add a sink that receives every iteration."""
        self.sinks.append(sink)
        self._live.append(sink)

    def say(self, text: str) -> None:
        """Print a line in the terminal."""
        print_log(self.console, text)

    def write(self, stats: Stats) -> Stats:
        """Write one iteration to live sinks and a completed row to the others; return it with the health findings."""
        self._latest = stats
        if not self.sinks:  # not the main process, or all sinks have failed
            return stats
        self.health.add(stats.global_step, stats.scalars)
        for record in self.health.records:
            if record.lasts and record.latest.name not in self._printed:
                self._printed.add(record.latest.name)
                self.say(f"health at {record.latest_step:,} steps: {record.latest}")
        stats = dataclasses.replace(stats, findings=self.health.findings)
        row = self.interval.add(stats)
        for sink in list(self.sinks):
            if (due := stats if sink in self._live else row) is not None:
                self._send(sink, partial(_write, due))
        return stats

    def log(self, tag: str, value: float) -> None:
        """Write a figure of the user's own to all sinks, at the latest iteration.

        Raises:
            ValueError: `tag` has no group, or one of the run's own.
            RuntimeError: there is no iteration yet, or the logger is closed.
        """
        group, _, name = tag.partition("/")
        if not name or group in _GROUPS:
            other = f"custom/{(name or tag).replace('/', '_')}"
            raise ValueError(
                f"tag {tag!r} must be GROUP/NAME, with another group than {', '.join(_GROUPS)}: {other!r}."
            )
        if (latest := self._latest) is None:
            raise RuntimeError("trainer.log works in the loop over trainer.iterations(): it logs at its steps.")
        for sink in list(self.sinks):
            self._send(sink, lambda sink: sink.log(latest.iteration, latest.global_step, {tag: value}))

    def close(self) -> None:
        """Write the open row, and close all sinks."""
        if (row := self.interval.row()) is not None:
            for sink in list(self.sinks):
                if sink not in self._live:
                    self._send(sink, partial(_write, row))
        for sink in self.sinks:
            _close(sink)
        self.sinks, self._latest = [], None

    def _send(self, sink: Sink, write: Callable[[Sink], None]) -> None:
        """Write to a sink; remove it if that fails."""
        try:
            write(sink)
        except Exception as error:  # no error of a library may stop the training
            self.sinks.remove(sink)
            _close(sink)
            reason = getattr(error, "strerror", None) or first_line(error)
            self.say(f"{type(sink).__name__} can't write ({reason}); its log ends here, training continues.")


def _write(stats: Stats, sink: Sink) -> None:
    sink.write(stats)


def _close(sink: Sink) -> None:
    """Close a sink, ignoring errors: a failed write has reported them, or they cost only the last lines."""
    with contextlib.suppress(Exception):
        sink.close()
