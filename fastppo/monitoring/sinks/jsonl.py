"""Statistics as files in the run folder: metrics.jsonl, one line per iteration, and samples/, one file per sample."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fastppo.monitoring.stats import Stats
from fastppo.monitoring.update_samples import remove_samples
from fastppo.runtime.files import replace_file


class JsonlSink:
    """Writes RUN/metrics.jsonl, one line per iteration; a value that isn't finite is null.

    The user's own figures are on lines of their own, after that of their iteration.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None) -> None:
        """Open the file; a run resumed at the global step `resumed_at` keeps the lines up to that step."""
        path = run_dir / "metrics.jsonl"
        if resumed_at is not None and path.exists():
            replace_file(path, lambda temporary: _copy_lines(path, temporary, resumed_at))
        self._file = path.open("a" if resumed_at is not None else "w", buffering=1)

    def write(self, stats: Stats) -> None:
        """Write one line."""
        row: dict[str, Any] = {
            "iteration": stats.iteration,
            "global_step": stats.global_step,
            "seconds": round(stats.seconds, 4),
        }
        row |= {"episodes": stats.episodes, "mean_return": stats.mean_return, "stop": stats.stop, **stats.scalars}
        row["returns"] = [float(f"{r:.6g}") for r in stats.returns]
        self._write_line(row)

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write one line of the user's own figures."""
        self._write_line({"iteration": iteration, "global_step": step, **values})

    def _write_line(self, row: Mapping[str, Any]) -> None:
        plain = {key: None if isinstance(v, float) and not math.isfinite(v) else v for key, v in row.items()}
        self._file.write(json.dumps(plain) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class SampleSink:
    """Writes RUN/samples, one file per update sample."""

    def __init__(self, run_dir: Path, resumed_after: int | None = None) -> None:
        """Write into RUN/samples; a run resumed after the iteration `resumed_after` removes the later samples."""
        self._folder = run_dir / "samples"
        if resumed_after is not None:
            remove_samples(self._folder, resumed_after)

    def write(self, stats: Stats) -> None:
        """Write the sample of this iteration, if it has one."""
        if stats.sample is not None:
            stats.sample.write(self._folder)

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: these are no samples."""

    def close(self) -> None:
        """Do nothing: no file is open."""


def read_rows(run_dir: Path) -> Iterator[dict[str, Any]]:
    """Yield the lines of RUN/metrics.jsonl; None where a value wasn't finite, {} for a line that can't be read."""
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


def _copy_lines(source: Path, target: Path, last_step: int) -> None:
    with source.open(errors="replace") as lines, target.open("w") as file:
        file.writelines(line for line in lines if _step_of(line) <= last_step)


def _step_of(line: str) -> float:
    """Return the global step of a line, or infinity for a truncated line."""
    try:
        return int(json.loads(line)["global_step"])
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return math.inf
