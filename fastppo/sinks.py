"""Where figures go: TensorBoard events, a JSON-lines file, the terminal. All behind one small protocol."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXT_PLUGIN
from tensorboard.summary.writer.event_file_writer import EventFileWriter
from tensorboard.util.tensor_util import make_tensor_proto

from fastppo.metrics import Stats

_PLAIN_SECONDS = 5.0


class Sink(Protocol):
    """Takes each iteration's figures."""

    def write(self, stats: Stats) -> None:
        """One iteration ended."""

    def close(self) -> None:
        """No more will come."""


class TensorBoardSink:
    """An events file. All scalars of an iteration are one event, which costs a tenth of one event each."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        """Write into `run_dir`, beginning with the config as a table in the text tab."""
        self._writer = EventFileWriter(str(run_dir))
        table = "|setting|value|\n|-|-|\n" + "\n".join(f"|{key}|{value}|" for key, value in config.items())
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=TEXT_PLUGIN))
        value = Summary.Value(tag="config", metadata=metadata, tensor=make_tensor_proto([table.encode()]))
        self._writer.add_event(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))

    def write(self, stats: Stats) -> None:
        """Every scalar at the iteration's global step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in stats.scalars.items()]
        self._writer.add_event(Event(wall_time=time.time(), step=stats.global_step, summary=Summary(value=values)))

    def close(self) -> None:
        """Flush and close the file."""
        self._writer.close()


class JsonlSink:
    """metrics.jsonl: a line for each iteration; a figure that isn't finite is null."""

    def __init__(self, run_dir: Path) -> None:
        """Write RUN/metrics.jsonl."""
        self._file = (run_dir / "metrics.jsonl").open("w", buffering=1)

    def write(self, stats: Stats) -> None:
        """One line."""
        row: dict[str, Any] = {
            "iteration": stats.iteration,
            "global_step": stats.global_step,
            "seconds": round(stats.seconds, 4),
        }
        row |= {"episodes": stats.episodes, "mean_return": stats.mean_return, "stop": stats.stop, **stats.scalars}
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class ConsoleSink:
    """A live progress line; plain lines every few seconds where there is no terminal."""

    def __init__(self, console: Console, n_iterations: int) -> None:
        """Show progress towards `n_iterations` on `console`."""
        self._console = console
        self._next = 0.0
        self._last: Stats | None = None
        self._progress: Progress | None = None
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("{task.fields[head]}"), BarColumn(20), TextColumn("{task.fields[tail]}"), console=console
            )
            self._task = self._progress.add_task("", total=n_iterations, head="starting", tail="")
            self._progress.start()

    def write(self, stats: Stats) -> None:
        """Show one iteration."""
        self._last = stats
        if self._progress is not None:
            head, tail = _progress_texts(stats)
            self._progress.update(self._task, completed=stats.iteration, head=head, tail=tail)
        elif time.monotonic() >= self._next:
            self._next = time.monotonic() + _PLAIN_SECONDS
            self._print(stats)
            self._last = None

    def close(self) -> None:
        """Leave the last state on the screen."""
        if self._progress is not None:
            self._progress.stop()
        elif self._last is not None:
            self._print(self._last)

    def _print(self, stats: Stats) -> None:
        head, tail = _progress_texts(stats)
        self._console.print(f"{head}  {tail}", highlight=False, soft_wrap=True)


def _progress_texts(stats: Stats) -> tuple[str, str]:
    left = stats.seconds / stats.iteration * (stats.n_iterations - stats.iteration)
    eta = f"{left / 3600:.1f}h" if left >= 3600 else f"{left / 60:.0f}m" if left >= 100 else f"{left:.0f}s"
    mean = "-" if math.isnan(stats.mean_return) else f"{stats.mean_return:.1f}"
    head = f"{stats.global_step:>9,}/{stats.total_timesteps:,} steps"
    tail = f"{stats.sps:,.0f} sps  ETA {eta}  return {mean}  KL {stats.kl:.4f}"
    return head, f"{tail}  {stats.stop}" if stats.stop else tail
