"""Open the sinks of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.sinks.console import ConsoleSink
from fastppo.monitoring.sinks.jsonl import JsonlSink, SampleSink, own_figures, read_rows
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
        resumed_at: global step and iteration of the checkpoint; later rows in the folder are dropped, and so is the row
            that the checkpoint left open. None: a new run.
    """
    step, iteration = resumed_at or (None, None)
    last_row = step if not logger.interval.iterations else logger.interval.last_step or 0
    jsonl, tensorboard = JsonlSink(run_dir, step, last_row), TensorBoardSink(run_dir, dict(settings), last_row)
    if last_row is not None:
        _restore_history(logger, run_dir)
        for own in own_figures(run_dir, last_row):  # TensorBoard drops them with the open row
            tensorboard.log(*own)
    logger.open(tensorboard, jsonl, SampleSink(run_dir, iteration))
    for name in track:
        logger.open(open_tracker(name, run_dir, dict(settings)))
    if logger.console is not None:
        logger.open_live(ConsoleSink(logger.console, n_iterations))


def _restore_history(logger: RunLogger, run_dir: Path) -> None:
    """Fill the history with the rows in the folder and with the open row, each as often as it has iterations."""
    before = 0
    for row in read_rows(run_dir):
        if row is not None and "episodes" in row and isinstance(iteration := row.get("iteration"), int):
            scalars = {tag: x for tag, x in row.items() if "/" in tag and isinstance(x, (int, float))}
            logger.health.add(row["global_step"], scalars, max(1, iteration - before))
            before = iteration
    if logger.interval.iterations:
        logger.health.add(logger.interval.last_step or 0, logger.interval.scalars(), logger.interval.iterations)
