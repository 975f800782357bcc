"""What a run left in its folder, read back for reports."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.errors import CheckpointError
from fastppo.health import Finding, History, judge
from fastppo.samples import Sample, read_samples
from fastppo.sinks.jsonl import read_rows

_Array = np.ndarray[Any, Any]

# Settings that say where and how fast a run was, not what was learned: runs that differ in no other are seeds of one
_ASIDE: tuple[str, ...] = (
    "seed",
    "name",
    "run_dir",
    "threads",
    "compile",
    "device",
    "act_device",
    "vectorization",
    "workers",
)
_ASIDE += ("half_batches", "init_from", "resume", "exact_resume", "checkpoint_every", "checkpoint_minutes")
_ASIDE += ("keep_checkpoints", "record_ratios", "log_histograms", "video_every", "track", "eval_every", "eval_episodes")


PLACES = ("global_step", "seconds", "episodes", "iteration")  # what curves can be drawn over


@dataclasses.dataclass(frozen=True)
class Record:
    """A run, finished or not.

    Attributes:
        run_dir: its folder.
        config: its settings.
        about: what it ran on, and notes.
        result: how it ended; empty where it hasn't.
        columns: [I] figures of each iteration by tag, NaN where there was none; `iteration`, `global_step`, `seconds`,
            `episodes` and `mean_return` among them.
        returns: of episodes, as many as were logged.
        return_places: about where each ended, by PLACES: its global step, second of training, number and iteration.
        samples: updates that were looked into.
    """

    run_dir: Path
    config: dict[str, Any]
    about: dict[str, Any]
    result: dict[str, Any]
    columns: dict[str, _Array]
    returns: _Array
    return_places: dict[str, _Array]
    samples: list[Sample]

    def column(self, tag: str) -> _Array:
        """[I] the figure of each iteration, all NaN where it was never logged."""
        return self.columns.get(tag, np.full(len(self), np.nan))

    def __len__(self) -> int:
        """Iterations."""
        return len(self.columns["iteration"])

    @property
    def label(self) -> str:
        """What to call it beside others."""
        return self.run_dir.name

    @property
    def setting(self) -> str:
        """Equal in runs that differ by their seed alone."""
        rest = {k: v for k, v in self.config.items() if k not in _ASIDE}
        return json.dumps(rest, sort_keys=True)

    def troubles(self) -> list[str]:
        """What is missing or broken in it, in sentences."""
        found = []
        if not len(self):
            return ["No iteration was logged: the run ended before its first update, or has just begun."]
        if len(self) == 1:
            found.append("One update only: there are no curves yet.")
        if not np.nanmax(self.column("episodes"), initial=0):
            found.append("No episode has ended: there are no returns.")
        losses = np.stack([self.column(f"losses/{name}") for name in ("policy_loss", "value_loss", "grad_norm")])
        bad = ~np.isfinite(losses).all(0)
        if bad.any():
            first, n = int(self.column("global_step")[bad.argmax()]), int(bad.sum())
            found.append(f"Losses are not finite in {n:,} of {len(self):,} iterations, the first at step {first:,}.")
        if not self.result:
            found.append("There is no result.json: the run goes on, or was killed.")
        return found

    def findings(self) -> list[tuple[Finding, int, int]]:
        """What health found as the run went on, with the global steps of its first and its latest sight."""
        history, seen = History(), dict[str, tuple[Finding, int, int]]()
        steps, looks = self.column("global_step"), max(1, len(self) // 64)
        tags = [tag for tag in self.columns if "/" in tag]
        for i in range(len(self)):
            history.add({tag: float(self.columns[tag][i]) for tag in tags})
            if (i + 1) % looks == 0 or i + 1 == len(self):
                for finding in judge(history, int(self.about.get("action_size") or 0)):
                    first = seen[finding.name][1] if finding.name in seen else int(steps[i])
                    seen[finding.name] = finding, first, int(steps[i])
        return list(seen.values())


def read_record(run_dir: Path) -> Record:
    """Read a run folder, of a broken run too.

    Raises:
        CheckpointError: it is no run folder.
    """
    config = _json(run_dir / "config.json")
    if not config:
        raise CheckpointError(f"{run_dir} is no run folder: it holds no config.json that can be read.")
    rows = list(read_rows(run_dir))
    tags = dict.fromkeys(tag for row in rows for tag in row)
    columns = {tag: np.array([_number(row.get(tag)) for row in rows]) for tag in tags if tag not in ("returns", "stop")}
    for tag in (*PLACES, "mean_return"):
        columns.setdefault(tag, np.full(len(rows), np.nan))
    return Record(
        run_dir,
        config,
        _json(run_dir / "run.json"),
        _json(run_dir / "result.json"),
        columns,
        *_episodes(rows, columns),
        read_samples(run_dir / "samples"),
    )


def _episodes(rows: list[dict[str, Any]], columns: dict[str, _Array]) -> tuple[_Array, dict[str, _Array]]:
    """Returns of episodes, and about where between two iterations they lie."""
    values: list[float] = []
    places: dict[str, list[float]] = {name: [] for name in PLACES}
    before = dict.fromkeys(PLACES, 0.0)
    for i, row in enumerate(rows):
        now = {name: float(columns[name][i]) for name in PLACES}
        returns = [value for value in map(_number, row.get("returns") or ()) if math.isfinite(value)]
        values += returns
        for k in range(len(returns)):
            share = (k + 1) / len(returns)
            for name, place in places.items():
                place.append(before[name] + share * (now[name] - before[name]))
        before = now
    return np.array(values), {name: np.array(place) for name, place in places.items()}


def _number(value: object) -> float:
    return float(value) if isinstance(value, (int, float)) else math.nan


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
