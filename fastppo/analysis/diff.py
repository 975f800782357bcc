"""`fastppo diff`: what two runs have in common, and where they part."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable
from typing import Any

import numpy as np

from fastppo.analysis.run_data import RunData

_Array = np.ndarray[Any, Any]
Row = tuple[str, str, str]  # what, in the one, in the other

# measured times, and what only iterations have that a setting chose
_ASIDE = ("time/", "charts/SPS", "charts/sps_", "samples/", "eval/")
_HARDWARE = ("device_name", "device", "cpu_count", "platform", "processes", "git_commit", "git_dirty")
_APART = 0.1  # of the range of both runs' returns
_POINTS = 400


@dataclasses.dataclass(frozen=True)
class Difference:
    """Two runs beside each other.

    Attributes:
        settings: those that differ.
        surroundings: machine, versions and commit, where they differ.
        results: steps, returns, speed; equal ones too.
        numbers: where logged figures stop being the same to the last digit.
        returns: where mean returns part, and stay apart.
    """

    settings: list[Row]
    surroundings: list[Row]
    results: list[Row]
    numbers: str
    returns: str


def difference(a: RunData, b: RunData) -> Difference:
    """Compare two runs."""
    settings = _differing(a.config, b.config, (a.config.keys() | b.config.keys()) - {"run_dir"})
    versions = [_dict(r.about.get("versions")) for r in (a, b)]
    surroundings = _differing(a.about, b.about, _HARDWARE)
    surroundings += _differing(versions[0], versions[1], versions[0].keys() | versions[1].keys())
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
    return Difference(settings, surroundings, results, _numbers(a, b), _returns(a, b))


def _differing(a: dict[str, Any], b: dict[str, Any], names: Iterable[str]) -> list[Row]:
    return [(name, _shown(a.get(name)), _shown(b.get(name))) for name in sorted(names) if a.get(name) != b.get(name)]


def _shown(value: object) -> str:
    return "-" if value is None else value if isinstance(value, str) else json.dumps(value)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _last(r: RunData, tag: str, form: str) -> str:
    row = r.column(tag)
    return format(row[-1], form) if len(row) and np.isfinite(row[-1]) else "-"


def _numbers(a: RunData, b: RunData) -> str:
    """The first iteration in which a figure that both log, and that isn't a time, differs at all."""
    _, at_a, at_b = np.intersect1d(a.column("iteration"), b.column("iteration"), return_indices=True)
    if not len(at_a):
        return "they have no iteration in common"
    tags = sorted(t for t in a.columns.keys() & b.columns.keys() if t != "seconds" and not t.startswith(_ASIDE))
    left, right = (np.stack([r.column(t)[at] for t in tags]) for r, at in ((a, at_a), (b, at_b)))
    same = (left == right) | (np.isnan(left) & np.isnan(right))
    if same.all():
        return f"the same in all {len(at_a):,} iterations that both have, to the last digit of every logged figure"
    k = int((~same.all(0)).argmax())
    names = [t for t, equal in zip(tags, same[:, k], strict=True) if not equal]
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    i, step = a.column("iteration")[at_a[k]], a.column("global_step")[at_a[k]]
    return f"the same until iteration {i:,.0f} (step {step:,.0f}), where {', '.join(names[:3])}{more} differ"


def _returns(a: RunData, b: RunData) -> str:
    """The first step from which mean returns stay further apart than a tenth of all their range."""
    curves = []
    for r in (a, b):
        steps, mean = r.column("global_step"), r.column("mean_return")
        known = np.isfinite(mean) & np.isfinite(steps)
        curves.append((steps[known], mean[known]))
    if not all(len(x) for x, _ in curves):
        return "no episode has ended in one of them"
    (xa, ya), (xb, yb) = curves
    begin, end = max(xa[0], xb[0]), min(xa[-1], xb[-1])
    if begin > end:
        return "they have no steps in common"
    grid = np.linspace(begin, end, _POINTS)
    gap = np.interp(grid, xa, ya) - np.interp(grid, xb, yb)
    spread = float(max(ya.max(), yb.max()) - min(ya.min(), yb.min()))
    near = np.abs(gap) <= _APART * spread
    if not gap.any():
        return f"the same to step {end:,.0f}"
    if near[-1]:
        widest = int(np.abs(gap).argmax())
        return (
            f"together at step {end:,.0f} (within a tenth of their range); "
            f"furthest apart at step {grid[widest]:,.0f}, by {abs(gap[widest]):.2f}"
        )
    part = int(len(near) - near[::-1].argmax()) if near.any() else 0
    return f"apart for good from step {grid[part]:,.0f}, by {abs(gap[-1]):.2f} at step {end:,.0f}"
