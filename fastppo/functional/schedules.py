"""Schedules of a coefficient over the progress of a run. Each gives its end value at and past the end."""

from __future__ import annotations

import math


def scheduled(shape: str, start: float, end: float, progress: float) -> float:
    """The value of a schedule.

        constant: start
        linear:   start + (end - start) p
        cosine:   end + (start - end) (1 + cos(pi p)) / 2

    Args:
        shape: "constant", "linear" or "cosine".
        start: value at progress 0.
        end: value at progress 1.
        progress: p, iterations done / iterations planned; clamped to [0, 1].

    Raises:
        ValueError: another shape.
    """
    p = min(max(progress, 0.0), 1.0)
    if shape == "constant":
        return start
    if shape == "linear":
        # the weighted form hits both ends exactly and never leaves them, which start + (end - start) p may by rounding
        return start * (1 - p) + end * p
    if shape == "cosine":
        weight = (1 + math.cos(math.pi * p)) / 2
        return start * weight + end * (1 - weight)
    raise ValueError(f"unknown schedule shape {shape!r}")
