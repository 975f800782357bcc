"""Progress in the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from fastppo.monitoring.stats import Stats
from fastppo.runtime.console import print_line

_PLAIN_SECONDS = 5.0


class ConsoleSink:
    """A live progress line; without a terminal, a plain line every five seconds."""

    def __init__(self, console: Console, n_iterations: int) -> None:
        """Show progress towards `n_iterations` on `console`."""
        self._console = console
        self._next_time = 0.0
        self._unprinted: Stats | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[head]}"), BarColumn(20), TextColumn("{task.fields[tail]}"), console=console
            )
            self._task = self._progress.add_task("", total=n_iterations, head="starting", tail="")
            self._progress.start()

    def write(self, stats: Stats) -> None:
        """Show one iteration."""
        if self._progress is not None:
            head, tail = _progress_texts(stats)
            self._progress.update(self._task, completed=stats.iteration, head=head, tail=tail)
        elif time.monotonic() >= self._next_time:
            self._next_time = time.monotonic() + _PLAIN_SECONDS
            self._print(stats)
            self._unprinted = None
        else:
            self._unprinted = stats

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Show nothing: the line has no room."""

    def close(self) -> None:
        """Leave the last iteration on the screen."""
        if self._progress is not None:
            self._progress.stop()
        elif self._unprinted is not None:
            self._print(self._unprinted)

    def _print(self, stats: Stats) -> None:
        print_line(self._console, "  ".join(_progress_texts(stats)))


def _progress_texts(stats: Stats) -> tuple[str, str]:
    """Return the texts before and after the bar."""
    left = stats.seconds / stats.iteration * (stats.n_iterations - stats.iteration)
    eta = f"{left / 3600:.1f}h" if left >= 3600 else f"{left / 60:.0f}m" if left >= 100 else f"{left:.0f}s"
    mean = "-" if math.isnan(stats.mean_return) else f"{stats.mean_return:.1f}"
    head = f"{stats.global_step:>9,}/{stats.total_timesteps:,} steps"
    tail = f"{stats.sps:,.0f} sps  ETA {eta}  return {mean}  KL {stats.kl:.2g}"
    if stats.findings:
        more = f" +{len(stats.findings) - 1}" if len(stats.findings) > 1 else ""
        tail += f"  ! {stats.findings[0].name}{more}"
    return head, f"{tail}  {stats.stop}" if stats.stop else tail
