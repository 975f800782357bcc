"""Sums of numbers in the infos of environments, for figures of the user's own (`--log-info`).

A figure is the mean of a key over those steps of an iteration whose info holds it. So a key of every step is averaged
over steps, and a key that only the last step of an episode has is averaged over the episodes that ended. Infos of
resets don't count. Imports no torch, so that workers start fast.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple, TypeGuard

import numpy as np

_Array = np.ndarray[Any, Any]

_KNOWN_KEYS = 1024  # whose choice is remembered; environments may make up keys without end
MOST_SEEN = 50  # keys that a note may name
_NUMBERS = frozenset((float, int, bool, np.float64, np.float32, np.int64, np.int32, np.bool_))


class InfoTotals(NamedTuple):
    """Sums over the infos of N environments since the last reading.

    Attributes:
        n_envs: N.
        totals: [2, N] float64 of each chosen key: sum of its values, and their number.
        seen: keys that were met, chosen or not; at most MOST_SEEN.
        refused: chosen keys with values other than numbers, and a description of one.
    """

    n_envs: int
    totals: dict[str, _Array]
    seen: tuple[str, ...]
    refused: dict[str, str]


NO_INFO = InfoTotals(0, {}, (), {})


def join_totals(parts: Sequence[InfoTotals]) -> InfoTotals:
    """Join the totals of several groups of environments, in their order."""
    names = dict.fromkeys(name for part in parts for name in part.totals)
    totals = {
        name: np.concatenate([part.totals.get(name, np.zeros((2, part.n_envs))) for part in parts], axis=1)
        for name in names
    }
    seen = dict.fromkeys(name for part in parts for name in part.seen)
    refused = {name: text for part in parts for name, text in part.refused.items()}
    return InfoTotals(sum(part.n_envs for part in parts), totals, tuple(seen)[:MOST_SEEN], refused)


def place_among(patterns: Sequence[str], name: str) -> int:
    """Return the index of the first pattern that chooses a key, their number if none does; `*` stands for any text."""
    places = (k for k, pattern in enumerate(patterns) if name == pattern or fnmatchcase(name, pattern))
    return next(places, len(patterns))


class Selection:
    """Chooses keys of infos by patterns, and notes what it met.

    Attributes:
        chooses: whether a key is chosen.
        refused: see `InfoTotals`.
    """

    def __init__(self, patterns: Sequence[str]) -> None:
        """Choose the keys that match one of `patterns`."""
        self._patterns = tuple(patterns)
        self._seen: dict[str, None] = {}
        self.chooses = functools.lru_cache(_KNOWN_KEYS)(self._meet)
        self.refused: dict[str, str] = {}

    def refuse(self, name: str, value: Any) -> None:  # noqa: ANN401 - any value
        """Note that the value of a chosen key is not a number."""
        if name not in self.refused:
            shape = getattr(value, "shape", None)
            what = f"{value!r:.40}" if isinstance(value, str) or value is None else type(value).__name__
            self.refused[name] = f"an array of shape {tuple(shape)}" if shape else what

    def take(self) -> tuple[tuple[str, ...], dict[str, str]]:
        """Return the new keys and the refused ones, and forget them."""
        seen, refused = tuple(self._seen), self.refused
        self._seen, self.refused = {}, {}
        return seen, refused

    def _meet(self, name: str) -> bool:
        if len(self._seen) < MOST_SEEN:
            self._seen[name] = None
        return place_among(self._patterns, name) < len(self._patterns)


class InfoSums:
    """Sums the chosen numbers in the infos of N environments, each environment's on its own."""

    def __init__(self, patterns: Sequence[str], n_envs: int) -> None:
        """Start without sums.

        Args:
            patterns: of the keys to choose; the keys of nested dicts are joined by "/".
            n_envs: N.
        """
        self._n_envs, self._selection = n_envs, Selection(patterns)
        self._totals: dict[str, _Array] = {}

    def take(self) -> InfoTotals:
        """Return the totals since the last call."""
        totals, self._totals = self._totals, {}
        return InfoTotals(self._n_envs, totals, *self._selection.take())

    def add(self, i: int, info: Any, prefix: str = "") -> None:  # noqa: ANN401 - a dict, of well-behaved environments
        """Add the info of a step of environment i; `prefix` belongs before its keys."""
        if isinstance(info, dict):
            for key, value in info.items():
                name = f"{prefix}{key}"
                if isinstance(value, dict):
                    self.add(i, value, f"{name}/")
                elif self._selection.chooses(name):
                    self._add_one(i, name, value)

    def add_batch(self, infos: dict[str, Any], ended: _Array, real: _Array | None = None) -> None:
        """Add the infos of a step of a vector environment.

        Where they hold `final_info`, as under same-step autoreset, those of ended episodes are read there: the others
        are of the reset. A single number counts once, as a figure of the step.

        Args:
            infos: arrays [N] by key, `_key` saying which environments have it; nested like theirs.
            ended: [N] bool, environments whose episode ended.
            real: [N] bool, False where the step only reset; None: all True.
        """
        rows = np.ones(self._n_envs, bool) if real is None else real
        own, final = dict(infos), infos.get("final_info")
        for key in ("final_obs", "final_info"):
            own.pop(key, None)
            own.pop(f"_{key}", None)
        if final is not None:
            self._add_tree(final, rows & ended, "")
            rows = rows & ~ended
        self._add_tree(own, rows, "")

    def _add_tree(self, value: Any, rows: _Array, name: str) -> None:  # noqa: ANN401 - arrays [N], nested
        """Add the value under `name` of the environments `rows` [N] bool."""
        if isinstance(value, dict):
            for key, part in value.items():
                has = value.get(f"_{key}")
                present = rows & has if _is_mask(has, rows) else rows
                if not (str(key).startswith("_") and str(key)[1:] in value and _is_mask(part, rows)):
                    self._add_tree(part, present, f"{name}/{key}" if name else str(key))
        elif _has_objects(value) and len(value) == self._n_envs:  # dicts, or what fits no other array
            for i in np.flatnonzero(rows).tolist():
                if isinstance(value[i], dict):
                    self.add(i, value[i], f"{name}/" if name else "")
                elif self._selection.chooses(name):
                    self._add_one(i, name, value[i])
        elif self._selection.chooses(name):
            if isinstance(value, np.ndarray) and value.shape == rows.shape and value.dtype.kind in "biuf":
                total = self._total(name)
                np.add(total[0], value, out=total[0], where=rows)
                total[1] += rows
            else:
                self._add_one(0, name, value)

    def _add_one(self, i: int, name: str, value: Any) -> None:  # noqa: ANN401 - a number, hopefully
        number = number_of(value)
        if number is None:
            self._selection.refuse(name, value)
            return
        total = self._total(name)
        total[0, i] += number
        total[1, i] += 1

    def _total(self, name: str) -> _Array:
        if name not in self._totals:
            self._totals[name] = np.zeros((2, self._n_envs))
        return self._totals[name]


def number_of(value: Any) -> float | None:  # noqa: ANN401 - any value
    """Return a number, also of an array without dimensions, as a float; None for anything else."""
    if type(value) in _NUMBERS:
        return float(value)
    if isinstance(value, (str, bytes)) or getattr(value, "ndim", None):
        return None
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        return None


def _is_mask(value: Any, rows: _Array) -> TypeGuard[_Array]:  # noqa: ANN401 - any value
    return isinstance(value, np.ndarray) and value.dtype == bool and value.shape == rows.shape


def _has_objects(value: Any) -> bool:  # noqa: ANN401 - any value
    """Whether a value is a list, or an array [N] whose elements are any objects."""
    if isinstance(value, np.ndarray):
        return value.dtype == object and value.ndim == 1
    return isinstance(value, (list, tuple))
