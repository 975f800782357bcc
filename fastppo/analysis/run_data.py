"""Run folders read back for reports: settings, logged figures, episode returns, update samples."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.config import CHANGES_RESULTS, Config
from fastppo.errors import CheckpointError
from fastppo.monitoring.health import HealthMonitor, HealthRecord
from fastppo.monitoring.health_rules import RunTraits, rounding_of
from fastppo.monitoring.sinks.jsonl import read_rows
from fastppo.monitoring.update_samples import UpdateSample, read_samples
from fastppo.runs.run_dir import check_run_folder

_Array = np.ndarray[Any, Any]

_MAX_ROWS = 30_000  # rows of a longer metrics.jsonl are thinned to about as many

AXES = ("global_step", "seconds", "episodes", "iteration")  # columns that curves can be drawn over


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run, finished or not.

    Attributes:
        run_dir: folder of the run.
        label: name of the run in tables and legends.
        config: resolved settings.
        about: machine, versions and notes of run.json.
        result: result.json; empty while the run has no result.
        rows: rows of metrics.jsonl.
        columns: [I] figures of each row that was read, by tag, NaN where not logged; includes AXES and `mean_return`.
        returns: [K] returns of the logged episodes.
        return_axes: [K] approximate end of each episode, by AXES.
        samples: sampled updates.
        damaged: descriptions of unreadable lines and samples.
    """

    run_dir: Path
    label: str
    config: dict[str, Any]
    about: dict[str, Any]
    result: dict[str, Any]
    rows: int
    columns: dict[str, _Array]
    returns: _Array
    return_axes: dict[str, _Array]
    samples: list[UpdateSample]
    damaged: list[str] = dataclasses.field(default_factory=list)

    def __len__(self) -> int:
        """Return the number of rows that were read, I."""
        return len(self.columns["iteration"])

    def column(self, tag: str) -> _Array:
        """Return [I] the figure of each row; all NaN if it was never logged."""
        return self.columns.get(tag, np.full(len(self), np.nan))

    def last(self, tag: str) -> float:
        """Return the figure of the last row; NaN if there is none."""
        column = self.column(tag)
        return float(column[-1]) if len(column) else math.nan

    @property
    def group_key(self) -> str:
        """Text that is equal for runs that differ only in their seed."""
        return json.dumps({k: v for k, v in self.config.items() if k in CHANGES_RESULTS}, sort_keys=True)

    @property
    def traits(self) -> RunTraits:
        """Facts about the run that health rules need."""
        size, device = self.about.get("action_size"), str(self.config.get("device"))
        rounding = rounding_of(str(self.config.get("precision")), device.partition(":")[0])
        return RunTraits(size if isinstance(size, int) else 0, rounding, self.config.get("init_from") is not None)

    def problems(self) -> list[str]:
        """Return a sentence for each missing or damaged part of the run."""
        problems = list(self.damaged)
        if not len(self):
            reason = "" if problems else ": the run ended before its first update, or has just started"
            return [*problems, f"No iteration was logged{reason}."]
        planned, last = self.result.get("iterations"), int(self.last("iteration"))
        if isinstance(planned, int) and planned > last:
            problems.append(f"metrics.jsonl is truncated: it ends at iteration {last:,} of {planned:,}.")
        if len(self) == 1:
            problems.append("Only one row was logged, so there are no curves yet.")
        if not np.nanmax(self.column("episodes"), initial=0):
            problems.append("No episode has ended, so there are no returns.")
        losses = np.stack([self.column(f"losses/{name}") for name in ("policy_loss", "value_loss", "grad_norm")])
        bad = ~np.isfinite(losses).all(0)
        if bad.any():
            first, n = self.column("global_step")[bad.argmax()], int(bad.sum())
            unit = "iterations" if self.rows == last else "rows"
            problems.append(f"Losses are NaN or infinite in {n:,} of {self.rows:,} {unit}, first at step {first:,.0f}.")
        if not self.result:
            problems.append("result.json is missing: the run is still going, or was killed.")
        return problems

    @property
    def thinning(self) -> str:
        """Sentence on the rows that were read, if metrics.jsonl has more; else ""."""
        if self.rows == len(self):
            return ""
        return f"Curves and findings are drawn from {len(self):,} of {self.rows:,} logged rows, evenly spaced."

    @functools.cached_property
    def findings(self) -> list[HealthRecord]:
        """Findings of the health rules, as the run's terminal printed them."""
        monitor, tags = HealthMonitor(self.traits), [tag for tag in self.columns if "/" in tag]
        rows = np.stack([self.columns[tag] for tag in tags], 1).tolist() if tags else []
        each = np.diff(self.column("iteration"), prepend=0).clip(min=1).astype(int).tolist()
        for step, row, times in zip(self.column("global_step").tolist(), rows, each, strict=False):
            monitor.add(int(step), dict(zip(tags, row, strict=True)), times)
        return monitor.records


def read_runs(run_dirs: Sequence[Path], max_rows: int | None = _MAX_ROWS) -> list[RunData]:
    """Read several runs; a label is the folder's name, or as much of its path as makes the labels unique.

    Args:
        run_dirs: their folders.
        max_rows: rows to read of each, about; None: all.

    Raises:
        CheckpointError: one of them is not a run folder.
    """
    runs = [read_run(run_dir, max_rows) for run_dir in run_dirs]
    parts = [run.run_dir.resolve().parts for run in runs]
    n = 1
    while len({p[-n:] for p in parts}) < len({*parts}):
        n += 1
    return [dataclasses.replace(run, label="/".join(p[-n:])) for run, p in zip(runs, parts, strict=True)]


def read_run(run_dir: Path, max_rows: int | None = _MAX_ROWS) -> RunData:
    """Read a run folder; damaged lines and samples are skipped and listed.

    Args:
        run_dir: the run folder.
        max_rows: rows to read, about; None: all.

    Raises:
        CheckpointError: it is not a run folder.
    """
    check_run_folder(run_dir)
    config = _read_json(run_dir / "config.json")
    if not config:
        missing = "" if run_dir.is_dir() else " (there is no such folder)"
        nested = next(run_dir.glob("runs/*/config.json"), None) if run_dir.is_dir() else None
        hint = f" Its runs are in {run_dir / 'runs'}." if nested else ""
        raise CheckpointError(f"{run_dir} is not a run folder{missing}: it has no readable config.json.{hint}")
    n_rows, columns, returns, return_axes, damaged = _read_metrics(run_dir, max_rows)
    samples = read_samples(run_dir / "samples")
    if lost := len(list((run_dir / "samples").glob("*.safetensors"))) - len(samples):
        damaged.append(f"{lost} damaged samples of updates were skipped.")
    return RunData(
        run_dir=run_dir,
        label=run_dir.resolve().name,
        config=Config().to_dict() | config,  # older runs have fewer settings
        about=_read_json(run_dir / "run.json"),
        result=_read_json(run_dir / "result.json"),
        rows=n_rows,
        columns=columns,
        returns=returns,
        return_axes=return_axes,
        samples=samples,
        damaged=damaged,
    )


def _read_metrics(
    run_dir: Path, max_rows: int | None
) -> tuple[int, dict[str, _Array], _Array, dict[str, _Array], list[str]]:
    """Return `rows`, `columns`, `returns`, `return_axes` and `damaged` of RunData.

    The log holds the returns of a row but not where in it each episode ended: they are spread evenly.
    """
    columns: dict[str, array[float]] = {tag: array("d") for tag in (*AXES, "mean_return")}
    returns, return_axes = array("d"), {name: array("d") for name in AXES}
    own: dict[str, float] = {}  # the latest of the user's own figures, for the next row
    before, n, skipped, bad = dict.fromkeys(AXES, 0.0), 0, 0, 0
    for row in read_rows(run_dir, max_rows):
        if row is None:
            skipped += 1
            continue
        if not isinstance(row.get("iteration"), int) or not isinstance(row.get("global_step"), int):
            bad += 1
            continue
        for tag in row.keys() - columns.keys() - {"returns", "stop"}:
            columns[tag] = array("d", [math.nan]) * n
        if "episodes" not in row:  # the user's own figures, after the row of their iteration if it has one
            values = {tag: _number(row[tag]) for tag in row.keys() - AXES}
            if n and row["iteration"] <= columns["iteration"][-1]:
                for tag, value in values.items():
                    columns[tag][-1] = value
            else:
                own |= values
            continue
        for tag, column in columns.items():
            column.append(own[tag] if tag in own else _number(row.get(tag)))
        own = {}
        n += 1
        now = {name: columns[name][-1] for name in AXES}
        logged = row.get("returns")
        finite = [x for x in map(_number, logged if isinstance(logged, list) else ()) if math.isfinite(x)]
        returns.extend(finite)
        for k in range(len(finite)):
            share = (k + 1) / len(finite)
            for name, axis in return_axes.items():
                axis.append(before[name] + share * (now[name] - before[name]))
        before = now
    damaged = [f"{bad:,} damaged lines of metrics.jsonl were skipped."] if bad else []
    return (
        n + skipped,
        {tag: np.array(column) for tag, column in columns.items()},
        np.array(returns),
        {name: np.array(axis) for name, axis in return_axes.items()},
        damaged,
    )


def _number(value: object) -> float:
    """Return a JSON value as a float; NaN if it is not a number."""
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file; {} if it is missing or damaged."""
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def downsample(values: _Array, points: int = 800) -> _Array:
    """Return at most `points` values: means over equal groups of neighbours that skip NaN and infinity.

    A group without a finite value becomes NaN.
    """
    size = -(-len(values) // points) if len(values) else 1
    padded = np.concatenate((values, np.full(-len(values) % size, np.nan))).reshape(-1, size)
    counts = np.isfinite(padded).sum(1)
    sums = np.where(np.isfinite(padded), padded, 0.0).sum(1)
    means: _Array = np.divide(sums, counts, out=np.full(len(padded), np.nan), where=counts > 0)
    return means
