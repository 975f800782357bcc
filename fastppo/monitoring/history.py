"""The history of a run's scalars, in a fixed amount of memory."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

POINTS = 512  # maximum length of a history; even, so that it can be halved
_FIRST = 20  # number of initial iterations that later ones are compared with


class History:
    """The scalars of a run by tag, thinned as the run grows: each point is the mean of `stride` iterations.

    Attributes:
        stride: iterations per point; doubles when the history is full.
        iterations: number of iterations so far.
    """

    def __init__(self, points: int = POINTS) -> None:
        """Keep at most `points` (even) per tag."""
        self._points = points
        self._rows: dict[str, int] = {}  # of each tag in the tables
        self._sums, self._counts = np.zeros((2, 0, points))
        self._first: dict[str, list[float]] = {}
        self.stride, self.iterations = 1, 0

    def add(self, scalars: Mapping[str, float], times: int = 1) -> None:
        """Add one iteration, or a row of `times` iterations; missing and non-finite scalars are left out of means."""
        if new := scalars.keys() - self._rows.keys():
            self._rows |= {tag: len(self._rows) + k for k, tag in enumerate(sorted(new))}
            empty = np.zeros((len(new), self._points))
            self._sums, self._counts = np.concatenate((self._sums, empty)), np.concatenate((self._counts, empty))
        values = np.array([scalars.get(tag, np.nan) for tag in self._rows])
        finite = np.isfinite(values)
        if (first := min(times, _FIRST - self.iterations)) > 0:
            for tag, value, is_finite in zip(self._rows, values.tolist(), finite.tolist(), strict=True):
                if is_finite:
                    self._first.setdefault(tag, []).extend([value] * first)
        while times:
            point = self.iterations // self.stride
            if point == self._points:
                self._sums, self._counts = _halved(self._sums), _halved(self._counts)
                self.stride *= 2
                point //= 2
            fitting = min(times, self.stride - self.iterations % self.stride)
            self._sums[:, point] += np.where(finite, values, 0.0) * fitting
            self._counts[:, point] += finite * fitting
            self.iterations += fitting
            times -= fitting

    def __getitem__(self, tag: str) -> _Array:
        """Return the points of a tag: NaN where no value was finite, empty if the tag was never logged."""
        if tag not in self._rows:
            return np.zeros(0)
        n = -(-self.iterations // self.stride)
        sums, counts = self._sums[self._rows[tag], :n], self._counts[self._rows[tag], :n]
        means: _Array = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
        return means

    def recent(self, tag: str) -> _Array:
        """Return the finite points among the latest tenth, and at least among the latest five."""
        row = self[tag]
        return finite_of(row[-max(5, len(row) // 10) :])

    def first(self, tag: str) -> _Array:
        """Return the finite values of the first 20 iterations, unthinned."""
        return np.array(self._first.get(tag, []))


def _halved(table: _Array) -> _Array:
    """Merge pairs of points, which frees the second half of each row."""
    pairs = table.reshape(len(table), table.shape[1] // 2, 2).sum(2)
    return np.concatenate((pairs, np.zeros_like(pairs)), axis=1)


def finite_of(row: _Array) -> _Array:
    """Return the finite values of a row."""
    finite: _Array = row[np.isfinite(row)]
    return finite
