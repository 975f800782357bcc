"""Statistics as files in the run folder: metrics.jsonl, one line per row, and samples/, one file per sample."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fastppo.monitoring.update_samples import remove_samples
from fastppo.runtime.files import replace_file

if TYPE_CHECKING:  # reports read these files without the modules of training, which take 150 MB
    from fastppo.monitoring.stats import Stats


_FIRST = 32  # lines that thinning keeps: health rules compare later ones with them


class JsonlSink:
    """Writes RUN/metrics.jsonl, one line per row; a value that isn't finite is null.

    The user's own figures are on lines of their own, after that of their iteration.
    """

    def __init__(self, run_dir: Path, resumed_at: int | None = None, last_row: int | None = None) -> None:
        """Open the file.

        Args:
            run_dir: the run folder.
            resumed_at: global step of the checkpoint; later lines are dropped. None: a new run.
            last_row: global step of the last complete row, if the checkpoint holds an open one, which is dropped here.
        """
        path = run_dir / "metrics.jsonl"
        if resumed_at is not None and path.exists():
            last = resumed_at if last_row is None else last_row
            replace_file(path, lambda temporary: _copy_lines(path, temporary, last, resumed_at))
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


def read_rows(run_dir: Path, max_rows: int | None = None) -> Iterator[dict[str, Any] | None]:
    """Yield the lines of RUN/metrics.jsonl; None where a value wasn't finite, {} for a line that can't be read.

    Args:
        run_dir: the run folder.
        max_rows: thin a longer file to about as many lines, evenly spaced. The others are None, except the first
            iterations, the last one, and those with an evaluation or a figure that isn't finite.
    """
    path = run_dir / "metrics.jsonl"
    if not path.exists():
        return
    stride = 1 if max_rows is None else _stride(path, max_rows)
    with path.open("rb") as file:
        line, k = file.readline(), 0
        while line:
            following = file.readline()
            own = b'"episodes"' not in line  # figures of the user's own
            wanted = k % stride == 0 or k < _FIRST or not following or own or b'"eval/' in line or b": null" in line
            if wanted or not (line.startswith(b"{") and line.endswith(b"}\n")):
                yield _parse(line)
            else:
                yield None
            line, k = following, k + 1


def _stride(path: Path, max_rows: int) -> int:
    """Return the distance of the lines to read, so that they are about `max_rows`."""
    with path.open("rb") as file:
        n = sum(block.count(b"\n") for block in iter(lambda: file.read(2**20), b""))
    return max(1, -(-n // max_rows))


def _parse(line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        row = None
    return row if isinstance(row, dict) else {}


def own_figures(run_dir: Path, after: int) -> Iterator[tuple[int, int, dict[str, float]]]:
    """Yield iteration, global step and values of the lines of the user's own figures after the step `after`."""
    for row in read_rows(run_dir):
        if row and "episodes" not in row and (step := row["global_step"]) > after:
            values = {tag: x for tag, x in row.items() if "/" in tag and isinstance(x, (int, float))}
            yield row.get("iteration", 0), step, values


def _copy_lines(source: Path, target: Path, last_row: int, last_own: int) -> None:
    """Copy the rows up to the global step `last_row`, and the user's own figures up to `last_own`."""
    with source.open(errors="replace") as lines, target.open("w") as file:
        file.writelines(line for line in lines if _is_within(line, last_row, last_own))


def _is_within(line: str, last_row: int, last_own: int) -> bool:
    """Return whether a line is not truncated and lies within the limits of `_copy_lines`."""
    try:
        row = json.loads(line)
        return int(row["global_step"]) <= (last_row if "episodes" in row else last_own)
    except (ValueError, KeyError, TypeError, OverflowError, RecursionError):
        return False
