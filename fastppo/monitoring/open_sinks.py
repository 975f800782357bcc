"""Open the sinks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.sinks.console import ConsoleSink
from fastppo.monitoring.sinks.jsonl import JsonlSink, SampleSink, read_rows
from fastppo.monitoring.sinks.tensorboard import TensorBoardSink
from fastppo.monitoring.sinks.trackers import Tracker, open_tracker


def open_sinks(
    logger: RunLogger,
    run_dir: Path,
    settings: Mapping[str, Any],
    track: Sequence[Tracker],
    *,
    n_iterations: int,
    resumed_at: tuple[int, int] | None,
) -> None:
    """Open sinks of `logger`: TensorBoard, JSON lines, samples, trackers and, if it has one, its console.

    Args:
        logger: the run's logger.
        run_dir: the run folder.
        settings: the run's settings by name.
        track: names of trackers.
        n_iterations: planned number of iterations.
        resumed_at: global step and iteration of the checkpoint; later rows in the folder are dropped. None: a new run.
    """
    step, iteration = resumed_at or (None, None)
    jsonl = JsonlSink(run_dir, step)
    for row in read_rows(run_dir) if resumed_at is not None else ():
        if isinstance(row.get("global_step"), int):
            scalars = {tag: x for tag, x in row.items() if "/" in tag and isinstance(x, (int, float))}
            logger.health.add(row["global_step"], scalars)
    logger.open(TensorBoardSink(run_dir, dict(settings), step), jsonl, SampleSink(run_dir, iteration))
    for name in track:
        logger.open(open_tracker(name, run_dir, dict(settings)))
    if logger.console is not None:
        logger.open(ConsoleSink(logger.console, n_iterations))
