"""What a run left in its folder, read back for reports."""

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

from fastppo.config import CHANGES_RESULTS
from fastppo.errors import CheckpointError
from fastppo.monitoring.health import HealthFinding, History, check_health
from fastppo.monitoring.sinks.jsonl import read_rows
from fastppo.monitoring.update_samples import UpdateSample, read_samples

_Array = np.ndarray[Any, Any]

PLACES = ("global_step", "seconds", "episodes", "iteration")  # what curves can be drawn over


@dataclasses.dataclass(frozen=True)
class RunData:
    """A run, finished or not.

    Attributes:
        run_dir: its folder.
        label: what to call it beside others.
        config: its settings.
        about: what it ran on, and notes.
        result: how it ended; empty where it hasn't.
        columns: [I] figures of each iteration by tag, NaN where there was none; PLACES and `mean_return` among them.
        returns: of episodes, as many as were logged.
        return_places: about where each ended, by PLACES: its global step, second of training, number and iteration.
        samples: updates that were looked into.
        damaged: lines and samples that could not be read.
    """

    run_dir: Path
    label: str
    config: dict[str, Any]
    about: dict[str, Any]
    result: dict[str, Any]
    columns: dict[str, _Array]
    returns: _Array
    return_places: dict[str, _Array]
    samples: list[UpdateSample]
    damaged: list[str] = dataclasses.field(default_factory=list)

    def column(self, tag: str) -> _Array:
        """[I] the figure of each iteration, all NaN where it was never logged."""
        return self.columns.get(tag, np.full(len(self), np.nan))

    def __len__(self) -> int:
        """Iterations."""
        return len(self.columns["iteration"])

    @property
    def setting(self) -> str:
        """Equal in runs that differ by their seed alone."""
        rest = {name: value for name, value in self.config.items() if name in CHANGES_RESULTS}
        return json.dumps(rest, sort_keys=True)

    @property
    def action_size(self) -> int:
        """Dimensions of a continuous action; 0: discrete, or unknown."""
        size = self.about.get("action_size")
        return size if isinstance(size, int) else 0

    def troubles(self) -> list[str]:
        """What is missing or broken in it, in sentences."""
        found = list(self.damaged)
        if not len(self):
            said = "the run ended before its first update, or has just begun"
            return [*found, f"No iteration was logged{'' if found else f': {said}'}."]
        planned = self.result.get("iterations")
        if isinstance(planned, int) and planned > len(self):
            found.append(f"Only {len(self):,} of {planned:,} iterations are in metrics.jsonl: it was cut.")
        if len(self) == 1:
            found.append("One update only: there are no curves yet.")
        if not np.nanmax(self.column("episodes"), initial=0):
            found.append("No episode has ended: there are no returns.")
        losses = np.stack([self.column(f"losses/{name}") for name in ("policy_loss", "value_loss", "grad_norm")])
        bad = ~np.isfinite(losses).all(0)
        if bad.any():
            first, n = self.column("global_step")[bad.argmax()], int(bad.sum())
            found.append(f"Losses are not finite in {n:,} of {len(self):,} iterations, the first at step {first:,.0f}.")
        if not self.result:
            found.append("There is no result.json: the run goes on, or was killed.")
        return found

    def lasted(self, first: float, latest: float) -> str:
        """When a finding was seen, in words."""
        at_end = latest == self.column("global_step")[-1]
        return f"from step {first:,.0f} to {'the end' if at_end else f'{latest:,.0f}'}"

    @functools.cached_property
    def findings(self) -> list[tuple[HealthFinding, float, float]]:
        """What health found as the run went on, with the global steps of its first and its latest sight.

        Left out is what came and went within a twentieth of the run.
        """
        history, seen = History(), dict[str, tuple[HealthFinding, float, float]]()
        steps, looks = self.column("global_step"), max(1, len(self) // 64)
        tags = [tag for tag in self.columns if "/" in tag]
        table = np.stack([self.columns[tag] for tag in tags], 1).tolist() if tags else []
        for i, row in enumerate(table):
            history.add(dict(zip(tags, row, strict=True)))
            if (i + 1) % looks == 0 or i + 1 == len(table):
                for finding in check_health(history, self.action_size):
                    first = seen[finding.name][1] if finding.name in seen else float(steps[i])
                    seen[finding.name] = finding, first, float(steps[i])
        brief = 0.05 * (steps[-1] if len(steps) else 0.0)
        return [s for s in seen.values() if s[2] == steps[-1] or s[2] - s[1] >= brief]


def read_runs(run_dirs: Sequence[Path]) -> list[RunData]:
    """Read several runs, each under a label of its own: the folder's name, or as much of its path as tells them apart.

    Raises:
        CheckpointError: one of them is no run folder.
    """
    records = [read_run(run_dir) for run_dir in run_dirs]
    parts = [r.run_dir.resolve().parts for r in records]
    n = 1
    while len({p[-n:] for p in parts}) < len({*parts}):
        n += 1
    return [dataclasses.replace(r, label="/".join(p[-n:])) for r, p in zip(records, parts, strict=True)]


def read_run(run_dir: Path) -> RunData:
    """Read a run folder, of a broken run too.

    Raises:
        CheckpointError: it is no run folder.
    """
    config = _json(run_dir / "config.json")
    if not config:
        there = "" if run_dir.is_dir() else " (there is no such folder)"
        inside = next(run_dir.glob("runs/*/config.json"), None) if run_dir.is_dir() else None
        hint = f" Its runs lie in {run_dir / 'runs'}." if inside else ""
        raise CheckpointError(f"{run_dir} is no run folder{there}: it holds no config.json that can be read.{hint}")
    columns, returns, places, damaged = _read_figures(run_dir)
    samples = read_samples(run_dir / "samples")
    if lost := len(list((run_dir / "samples").glob("*.safetensors"))) - len(samples):
        damaged.append(f"{lost} of its samples are damaged and left out.")
    return RunData(
        run_dir,
        run_dir.resolve().name,
        config,
        _json(run_dir / "run.json"),
        _json(run_dir / "result.json"),
        columns,
        returns,
        places,
        samples,
        damaged,
    )


def _read_figures(run_dir: Path) -> tuple[dict[str, _Array], _Array, dict[str, _Array], list[str]]:
    """Columns, returns of episodes, about where between two iterations they lie, and what was damaged."""
    columns: dict[str, array[float]] = {tag: array("d") for tag in (*PLACES, "mean_return")}
    values, places = array("d"), {name: array("d") for name in PLACES}
    before, n, bad = dict.fromkeys(PLACES, 0.0), 0, 0
    for row in read_rows(run_dir):
        if not isinstance(row.get("iteration"), int) or not isinstance(row.get("global_step"), int):
            bad += 1
            continue
        for tag in row.keys() - columns.keys() - {"returns", "stop"}:
            columns[tag] = array("d", [math.nan]) * n
        for tag, column in columns.items():
            column.append(_number(row.get(tag)))
        n += 1
        now = {name: columns[name][-1] for name in PLACES}
        found = row.get("returns")
        returns = [x for x in map(_number, found if isinstance(found, list) else ()) if math.isfinite(x)]
        values.extend(returns)
        for k in range(len(returns)):
            share = (k + 1) / len(returns)
            for name, place in places.items():
                place.append(before[name] + share * (now[name] - before[name]))
        before = now
    damaged = [f"{bad:,} lines of metrics.jsonl are damaged and left out."] if bad else []
    return (
        {tag: np.array(column) for tag, column in columns.items()},
        np.array(values),
        {name: np.array(place) for name, place in places.items()},
        damaged,
    )


def _number(value: object) -> float:
    try:
        return float(value) if isinstance(value, (int, float)) else math.nan
    except OverflowError:
        return math.nan


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def thin(values: _Array, points: int = 800) -> _Array:
    """Means of equally many neighbours, so that at most `points` are left; NaN where a whole group is."""
    size = -(-len(values) // points) if len(values) else 1
    padded = np.concatenate((values, np.full(-len(values) % size, np.nan))).reshape(-1, size)
    counts = np.isfinite(padded).sum(1)
    sums = np.where(np.isfinite(padded), padded, 0.0).sum(1)
    means: _Array = np.divide(sums, counts, out=np.full(len(padded), np.nan), where=counts > 0)
    return means
