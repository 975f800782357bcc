"""Comparison of two runs for `fastppo diff`: settings, machines, results, and where their curves diverge."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastppo.analysis.run_data import RunData

_Array = np.ndarray[Any, Any]
Row = tuple[str, str, str]  # name, value of the first run, value of the second

# Prefixes of tags that are not compared: measured times, and figures of sampled or evaluated iterations only
_NOT_COMPARED = ("time/", "charts/SPS", "charts/sps_", "samples/", "memory/", "eval/")
_HARDWARE = ("device_name", "device", "cpu_count", "platform", "processes", "git_commit", "git_dirty")
_TOLERANCE = 0.1  # of the range of both runs' returns
_POINTS = 400  # of the common axis on which mean returns are compared


@dataclasses.dataclass(frozen=True)
class Difference:
    """Differences between two runs.

    Attributes:
        settings: settings that differ.
        surroundings: machine, versions and commit, where they differ.
        results: steps, returns and speed of both runs.
        numbers: first iteration with different logged figures, as text.
        returns: first step from which mean returns stay apart, as text. Neither is compared between environments.
    """

    settings: list[Row]
    surroundings: list[Row]
    results: list[Row]
    numbers: str
    returns: str


def difference(a: RunData, b: RunData) -> Difference:
    """Return the differences between two runs."""
    settings = _differing(a.config, b.config, (a.config.keys() | b.config.keys()) - {"run_dir"})
    versions_a, versions_b = (_dict(run.about.get("versions")) for run in (a, b))
    surroundings = _differing(a.about, b.about, _HARDWARE)
    surroundings += _differing(versions_a, versions_b, versions_a.keys() | versions_b.keys())
    results = [
        (name, _last(a, tag, form), _last(b, tag, form))
        for name, tag, form in (
            ("steps", "global_step", ",.0f"),
            ("iterations", "iteration", ",.0f"),
            ("episodes", "episodes", ",.0f"),
            ("mean return", "mean_return", ".2f"),
            ("steps/s, steady", "charts/sps_steady", ",.0f"),
            ("seconds", "seconds", ".1f"),
        )
    ]
    results.append(("ended", str(a.result.get("ended", "-")), str(b.result.get("ended", "-"))))
    env_a, env_b = (run.config.get("env_id") for run in (a, b))
    if env_a != env_b:
        apart = f"not compared: {env_a} and {env_b} are different environments"
        return Difference(settings, surroundings, results, apart, apart)
    return Difference(settings, surroundings, results, _numbers(a, b), _returns(a, b))


def _differing(a: dict[str, Any], b: dict[str, Any], names: Iterable[str]) -> list[Row]:
    return [(name, _shown(a.get(name)), _shown(b.get(name))) for name in sorted(names) if a.get(name) != b.get(name)]


def _shown(value: object) -> str:
    return "none" if value is None else value if isinstance(value, str) else json.dumps(value)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last(run: RunData, tag: str, form: str) -> str:
    value = run.last(tag)
    return format(value, form) if np.isfinite(value) else "-"


def _numbers(a: RunData, b: RunData) -> str:
    """Return the first iteration in which a compared figure differs in any digit, as text."""
    _, at_a, at_b = np.intersect1d(a.column("iteration"), b.column("iteration"), return_indices=True)
    if not len(at_a):
        return "no common iterations"
    tags = sorted(t for t in a.columns.keys() & b.columns.keys() if t != "seconds" and not t.startswith(_NOT_COMPARED))
    values_a, values_b = (np.stack([run.column(t)[at] for t in tags]) for run, at in ((a, at_a), (b, at_b)))
    same = (values_a == values_b) | (np.isnan(values_a) & np.isnan(values_b))
    if same.all():
        return f"every logged figure is equal in all {len(at_a):,} common iterations"
    k = int((~same.all(0)).argmax())
    names = [t for t, equal in zip(tags, same[:, k], strict=True) if not equal]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    iteration, step = a.column("iteration")[at_a[k]], a.column("global_step")[at_a[k]]
    return f"figures differ from iteration {iteration:,.0f} on (step {step:,.0f}): {', '.join(names[:3])}{more}"


def _returns(a: RunData, b: RunData) -> str:
    """Return the first step from which mean returns stay further apart than a tenth of their range, as text."""
    (steps_a, mean_a), (steps_b, mean_b) = _mean_returns(a), _mean_returns(b)
    if not len(steps_a) or not len(steps_b):
        return "one of the runs has no finished episode"
    start, end = max(steps_a[0], steps_b[0]), min(steps_a[-1], steps_b[-1])
    if start > end:
        return "no common steps"
    grid = np.linspace(start, end, _POINTS)
    gap = np.interp(grid, steps_a, mean_a) - np.interp(grid, steps_b, mean_b)
    if not gap.any():
        return f"equal up to step {end:,.0f}"
    value_range = float(max(mean_a.max(), mean_b.max()) - min(mean_a.min(), mean_b.min()))
    near = np.abs(gap) <= _TOLERANCE * value_range
    if near[-1]:
        widest = int(np.abs(gap).argmax())
        return (
            f"within a tenth of their range at step {end:,.0f}; "
            f"largest gap {abs(gap[widest]):.2f} at step {grid[widest]:,.0f}"
        )
    apart = int(len(near) - near[::-1].argmax()) if near.any() else 0
    return f"apart from step {grid[apart]:,.0f} on; gap {abs(gap[-1]):.2f} at step {end:,.0f}"


def _mean_returns(run: RunData) -> tuple[_Array, _Array]:
    """Return steps and mean returns, without iterations before the first finished episode."""
    steps, mean = run.column("global_step"), run.column("mean_return")
    known = np.isfinite(mean) & np.isfinite(steps)
    return steps[known], mean[known]
