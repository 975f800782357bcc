"""Figures as files in the run folder: a line for each iteration, and what was seen of single updates."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastppo.monitoring.stats import Stats
from fastppo.monitoring.update_samples import forget_samples


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
        row["returns"] = [float(f"{r:.6g}") for r in stats.returns]
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SampleSink:
    """samples/: a file for each update that was looked into."""

    def __init__(self, run_dir: Path, resumed_after: int | None = None) -> None:
        """Write RUN/samples; a run resumed after an iteration forgets those of later ones."""
        self._folder = run_dir / "samples"
        if resumed_after is not None:
            forget_samples(self._folder, resumed_after)

    def write(self, stats: Stats) -> None:
        """The sample, if this iteration has one."""
        if stats.sample is not None:
            stats.sample.write(self._folder)

    def close(self) -> None:
        """Nothing is open."""


def read_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    """The lines of RUN/metrics.jsonl, None where a figure wasn't finite; a line that can't be read is empty."""
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    with path.open(errors="replace") as file:
        for line in file:
            try:
                row = json.loads(line)
            except (ValueError, RecursionError):
                row = None
            yield row if isinstance(row, dict) else {}


def _step_of(line: str) -> float:
    """The global step of a line; infinite where the line was cut."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
