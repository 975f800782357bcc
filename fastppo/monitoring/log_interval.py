"""One row of statistics for several iterations (`--log-every`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from fastppo.monitoring.stats import MAX_RETURNS, Stats

# Measured in each iteration, so that a row holds their mean; of other tags it holds the latest value
_MEANS = (
    *("losses/", "time/", "eval/", "samples/", "memory/", "info/"),
    *("charts/clipped_actions", "charts/action_range", "charts/action_std", "charts/masked_actions"),
    *("charts/obs_outside_space", "charts/reward_per_step", "charts/intrinsic_reward"),
)
_PER_EPISODE = ("charts/episodic_return", "charts/episodic_length")


class LogInterval:
    """Merges the statistics of `every` iterations into one row.

    Measured figures are means over the iterations that have them; one that is not finite makes the mean so. Episode
    returns and lengths are means over all episodes of the row. Counters, schedules and speeds are the latest. A row
    ends early at an iteration with an evaluation, a sample or a video, which therefore keeps its step.

    Attributes:
        last_step: global step of the last row; None before the first row of a run, and in checkpoints without it.
        iterations: iterations of the open row.
    """

    def __init__(self, every: int) -> None:
        """Merge `every` iterations; rows end at its multiples."""
        self._every = every
        self.last_step: int | None = None
        self.iterations = 0
        self._episodes = 0  # at the last iteration
        self._totals: dict[str, tuple[float, float]] = {}  # sum and weight by tag
        self._returns: list[float] = []
        self._stop = ""
        self._latest: Stats | None = None

    def add(self, stats: Stats) -> Stats | None:
        """Add an iteration; return the row if this iteration completes it."""
        ended, self._episodes = stats.episodes - self._episodes, stats.episodes
        for tag, value in stats.scalars.items():
            if tag.startswith(_MEANS) or tag in _PER_EPISODE:
                weight = float(ended) if tag in _PER_EPISODE else 1.0
                total, weights = self._totals.get(tag, (0.0, 0.0))
                self._totals[tag] = total + weight * value, weights + weight
            else:
                self._totals[tag] = value, 1.0
        self._returns = [*self._returns, *stats.returns][-MAX_RETURNS:]
        self._stop = stats.stop or self._stop
        self.iterations += 1
        self._latest = stats
        has_more = stats.sample is not None or stats.images or any(tag.startswith("eval/") for tag in stats.scalars)
        if stats.iteration % self._every and not has_more:
            return None
        row = self.row() if self.iterations > 1 else stats
        self.last_step = stats.global_step
        self._clear()
        return row

    def row(self) -> Stats | None:
        """Return the open row; None if it is empty, or was restored and nothing was added."""
        if self._latest is None:
            return None
        return dataclasses.replace(self._latest, scalars=self.scalars(), returns=self._returns, stop=self._stop)

    def scalars(self) -> dict[str, float]:
        """Return the scalars of the open row by tag."""
        return {tag: total / weights for tag, (total, weights) in self._totals.items() if weights}

    def state_dict(self) -> dict[str, Any]:
        """Return the open row, so that a resumed run completes it."""
        return {
            "last_step": self.last_step,
            "iterations": self.iterations,
            "episodes": self._episodes,
            "totals": {tag: list(pair) for tag, pair in self._totals.items()},
            "returns": self._returns,
            "stop": self._stop,
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore in place from `state_dict()`."""
        last_step = saved["last_step"]
        self.last_step = None if last_step is None else int(last_step)
        self.iterations, self._episodes = int(saved["iterations"]), int(saved["episodes"])
        self._totals = {tag: (float(total), float(weights)) for tag, (total, weights) in saved["totals"].items()}
        self._returns, self._stop = [float(x) for x in saved["returns"]], str(saved["stop"])

    def _clear(self) -> None:
        self.iterations, self._totals, self._returns, self._stop, self._latest = 0, {}, [], "", None
