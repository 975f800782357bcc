"""Progress in the terminal."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from rich.table import Column

from fastppo.monitoring.stats import Stats
from fastppo.runtime.console import print_log

_PLAIN_SECONDS = 5.0
_MOST_INFO = 3  # figures of the user's own in the line
_WIDE = 100  # columns from which the bar is long


class ConsoleSink:
    """A live progress line; without a terminal, a line with date and time every five seconds."""

    def __init__(self, console: Console, n_iterations: int) -> None:
        """Show progress towards `n_iterations` on `console`."""
        self._console = console
        self._next_time = 0.0
        self._unprinted: Stats | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[head]}"),
                BarColumn(20 if console.width >= _WIDE else 10),
                # the only column that may wrap, so that a narrow terminal cuts no number
                TextColumn("{task.fields[tail]}", table_column=Column(no_wrap=False)),
                console=console,
            )
            self._task = self._progress.add_task("", total=n_iterations, head="starting", tail="")
            self._progress.start()

    def write(self, stats: Stats) -> None:
        """Show one iteration."""
        if self._progress is not None:
            head = f"{compact(stats.global_step)}/{compact(stats.total_timesteps)}"
            tail = _progress_text(stats, compact(round(stats.sps)))
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
        steps = f"{stats.global_step:,}/{stats.total_timesteps:,} steps"
        print_log(self._console, f"{steps}  {_progress_text(stats, f'{stats.sps:,.0f}')}")


def compact(number: int) -> str:
    """Return a number >= 0 in at most five characters, below 10^18: 999, 1.5k, 105k, 3.0M."""
    scaled, units = float(number), iter(("", "k", "M", "G", "T", "P"))
    unit = next(units)
    while round(scaled) >= 1000:
        scaled, unit = scaled / 1000, next(units)
    return f"{scaled:.{int(bool(unit) and scaled < 99.95)}f}{unit}"


def _progress_text(stats: Stats, sps: str) -> str:
    """Return speed, time left and learning figures."""
    spent = stats.seconds + stats.paused_seconds  # evaluations and videos also take the time that is left
    left = spent / stats.iteration * (stats.n_iterations - stats.iteration)
    eta = f"{left / 3600:.1f}h" if left >= 3600 else f"{left / 60:.0f}m" if left >= 100 else f"{left:.0f}s"
    mean = f"return {stats.mean_return:.1f}"
    if math.isnan(stats.mean_return):  # no episode has ended, and perhaps none ever will
        mean = f"reward/step {stats.scalars['charts/reward_per_step']:.3g}"
    text = f"{sps} steps/s  ETA {eta}  {mean}  KL {stats.kl:.2g}"
    info = [(tag, value) for tag, value in stats.scalars.items() if tag.startswith("info/")]
    for tag, value in info[:_MOST_INFO]:
        text += f"  {tag.removeprefix('info/')} {value:.3g}"
    if stats.findings:
        more = f" +{len(stats.findings) - 1}" if len(stats.findings) > 1 else ""
        text += f"  ! {stats.findings[0].name}{more}"
    return f"{text}  {stats.stop}" if stats.stop else text
