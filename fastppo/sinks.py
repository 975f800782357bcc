"""Where figures go: TensorBoard events, a JSON-lines file, the terminal. All behind one small protocol."""

from __future__ import annotations

import itertools
import json
import math
import os
import platform
import time
from pathlib import Path
from typing import Any, Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary, SummaryMetadata
from tensorboard.plugins.text.metadata import PLUGIN_NAME as TEXT_PLUGIN
from tensorboard.summary.writer.record_writer import RecordWriter
from tensorboard.util.tensor_util import make_tensor_proto

from fastppo.metrics import Stats

_PLAIN_SECONDS = 5.0
_FLUSH_SECONDS = 5.0
_number = itertools.count()  # two runs of one process may begin in one second


class Sink(Protocol):
    """Takes each iteration's figures."""

    def write(self, stats: Stats) -> None:
        """One iteration ended."""

    def close(self) -> None:
        """No more will come."""


class TensorBoardSink:
    """An events file. All scalars of an iteration are one event, which costs a tenth of one event each."""

    def __init__(self, run_dir: Path, config: dict[str, Any], resumed_at: int | None = None) -> None:
        """Write into `run_dir`, beginning with the config as a table in the text tab.

        `resumed_at`: the global step that a resumed run goes on from; TensorBoard forgets what lies behind it.
        """
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{os.getpid()}.{next(_number)}"
        # a file that stays open: TensorBoard's own writer opens it anew at each flush, and dies with its folder
        self._file = (run_dir / name).open("ab")
        self._records = RecordWriter(self._file)
        self._flushed = time.monotonic()
        self._add(Event(wall_time=time.time(), file_version="brain.Event:2"))
        if resumed_at is not None:
            start = SessionLog(status=SessionLog.START)
            self._add(Event(wall_time=time.time(), step=resumed_at + 1, session_log=start))
            return
        table = "|setting|value|\n|-|-|\n" + "\n".join(f"|{key}|{value}|" for key, value in config.items())
        metadata = SummaryMetadata(plugin_data=SummaryMetadata.PluginData(plugin_name=TEXT_PLUGIN))
        value = Summary.Value(tag="config", metadata=metadata, tensor=make_tensor_proto([table.encode()]))
        self._add(Event(wall_time=time.time(), step=0, summary=Summary(value=[value])))

    def write(self, stats: Stats) -> None:
        """Every scalar at the iteration's global step."""
        values = [Summary.Value(tag=tag, simple_value=value) for tag, value in stats.scalars.items()]
        self._add(Event(wall_time=time.time(), step=stats.global_step, summary=Summary(value=values)))
        if time.monotonic() - self._flushed > _FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()

    def close(self) -> None:
        """Flush and close the file."""
        self._file.close()

    def _add(self, event: Event) -> None:
        self._records.write(event.SerializeToString())


class JsonlSink:
    """metrics.jsonl: a line for each iteration; a figure that isn't finite is null."""

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None:
        """Write RUN/metrics.jsonl; a run resumed at a global step keeps the lines up to there."""
        path = run_dir / "metrics.jsonl"
        if resumed_at is not None and path.exists():
            with path.open(errors="replace") as before, path.with_suffix(".tmp").open("w") as kept:
                kept.writelines(line for line in before if _step_of(line) <= resumed_at)
            path.with_suffix(".tmp").replace(path)
        self._file = path.open("a" if resumed_at is not None else "w", buffering=1)

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


def _step_of(line: str) -> float:
    """The global step of a line; infinite where the line was cut."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf


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
