"""Schedules of a coefficient over the progress of a run."""

from __future__ import annotations

import math


def scheduled(shape: str, start: float, end: float, progress: float) -> float:
    """Return the value of a schedule at `progress`.

        constant: start
        linear:   start + (end - start) p
        cosine:   end + (start - end) (1 + cos(pi p)) / 2

    Args:
        shape: "constant", "linear" or "cosine".
        start: value at progress 0.
        end: value at progress 1.
        progress: p, iterations done / iterations planned; clamped to [0, 1], so the end value holds past the end.

    Raises:
        ValueError: unknown `shape`.
    """
    p = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "linear":
        # unlike start + (end - start) p, this form is exact at both ends and rounding never takes it past them
        return start * (1 - p) + end * p
    if shape == "cosine":
        weight = (1 + math.cos(math.pi * p)) / 2
        return start * weight + end * (1 - weight)
    raise ValueError(f"unknown schedule shape {shape!r}")
