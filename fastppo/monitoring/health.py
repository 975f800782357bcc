"""Health of a run in words: rules over its history, each with its threshold, its evidence and what helps.

A rule looks at figures under the names they are logged by. Most of them look at the latest tenth of the run, so that
one odd update says nothing; thresholds are rules of thumb, and lie where healthy runs of our presets don't come.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
_Value = float | None

POINTS = 512  # of a history, an even number
_FIRST = 20  # iterations that later ones are held against


class History:
    """Figures of a run by tag, thinned as it grows: at most so many points, each a mean over as many iterations.

    Attributes:
        stride: iterations in a point.
        iterations: taken in so far.
    """

    def __init__(self, points: int = POINTS) -> None:
        """Keep at most `points`, an even number."""
        self._points = points
        self._at: dict[str, int] = {}  # row of each tag in the tables
        self._sums, self._counts = np.zeros((2, 0, points))
        self._first: dict[str, list[float]] = {}
        self.stride, self.iterations = 1, 0

    def add(self, scalars: Mapping[str, float]) -> None:
        """One iteration's figures; those that are missing or not finite leave no trace."""
        if new := scalars.keys() - self._at.keys():
            self._at |= {tag: len(self._at) + k for k, tag in enumerate(sorted(new))}
            room = np.zeros((len(new), self._points))
            self._sums, self._counts = np.concatenate((self._sums, room)), np.concatenate((self._counts, room))
        at = self.iterations // self.stride
        if at == self._points:
            self._sums, self._counts = _halved(self._sums), _halved(self._counts)
            self.stride *= 2
            at //= 2
        values = np.array([scalars.get(tag, np.nan) for tag in self._at])
        finite = np.isfinite(values)
        self._sums[:, at] += np.where(finite, values, 0.0)
        self._counts[:, at] += finite
        if self.iterations < _FIRST:
            for tag, value, known in zip(self._at, values.tolist(), finite.tolist(), strict=True):
                if known:
                    self._first.setdefault(tag, []).append(value)
        self.iterations += 1

    def __getitem__(self, tag: str) -> _Array:
        """The figure's points, NaN where it was never finite; empty where it was never logged."""
        if tag not in self._at:
            return np.zeros(0)
        n = -(-self.iterations // self.stride)
        sums, counts = self._sums[self._at[tag], :n], self._counts[self._at[tag], :n]
        means: _Array = np.divide(sums, counts, out=np.full(n, np.nan), where=counts > 0)
        return means

    def recent(self, tag: str) -> _Array:
        """Finite points of the latest tenth, of the latest five at least."""
        row = self[tag]
        return _finite(row[-max(5, len(row) // 10) :])

    def first(self, tag: str) -> _Array:
        """Finite values of the very first iterations, however long the run has become."""
        return np.array(self._first.get(tag, []))


def _halved(table: _Array) -> _Array:
    """Every two points become one, and as many are free."""
    pairs = table.reshape(len(table), -1, 2).sum(2)
    return np.concatenate((pairs, np.zeros_like(pairs)), axis=1)


def _finite(row: _Array) -> _Array:
    finite: _Array = row[np.isfinite(row)]
    return finite


@dataclasses.dataclass(frozen=True)
class Rule:
    """One thing that may be wrong.

    Attributes:
        name: a few words, for the progress line.
        threshold: what its `value` is held against, for its text.
        value: what is wrong as a number, from a history and the size of a continuous action (0: discrete); None: all
            is well, or nothing can be said yet.
        evidence: a sentence with {value} and {threshold}.
        remedy: what to try, the likeliest first.
        after: iterations before which it says nothing.
    """

    name: str
    threshold: float
    value: Callable[[History, float, int], _Value]
    evidence: str
    remedy: str
    after: int = 20


@dataclasses.dataclass(frozen=True)
class HealthFinding:
    """A rule that fired.

    Attributes:
        name: of the rule.
        evidence: what was seen, with numbers.
        remedy: what to try.
    """

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        """All of it in one line."""
        return f"{self.name}: {self.evidence} {self.remedy}"


def check_health(history: History, action_size: int = 0) -> list[HealthFinding]:
    """What is wrong with a run, by RULES, as far as `history` shows it.

    Args:
        history: its figures.
        action_size: dimensions of a continuous action; 0: actions are discrete.
    """
    found = []
    for rule in RULES:
        value = rule.value(history, rule.threshold, action_size) if history.iterations >= rule.after else None
        if value is not None:
            evidence = rule.evidence.format(value=value, threshold=rule.threshold)
            found.append(HealthFinding(rule.name, evidence, rule.remedy))
    return found


def _recent_above(tag: str) -> Callable[[History, float, int], _Value]:
    """The latest mean of a figure, where it lies above the threshold."""

    def value(history: History, threshold: float, _: int) -> _Value:
        recent = history.recent(tag)
        return float(np.median(recent)) if len(recent) and np.median(recent) > threshold else None

    return value


def _clipped_too_little(history: History, threshold: float, _: int) -> _Value:
    row, rate = history["losses/clipfrac"], history["charts/learning_rate"]
    recent = _finite(row[len(row) // 2 :])
    if not len(recent) or not len(rate) or rate[-1] < rate[0] / 2:  # small steps at the end are what annealing is for
        return None
    return float(np.median(recent)) if np.median(recent) < threshold else None


def _kl_over_target(history: History, threshold: float, _: int) -> _Value:
    limit, kl = history.recent("charts/kl_limit"), history.recent("losses/approx_kl")
    if not len(limit) or not len(kl):
        return None
    times = float(np.median(kl) / max(np.median(limit), 1e-12))
    return times if times > threshold else None


def _entropy_lost(history: History, threshold: float, action_size: int) -> _Value:
    first, recent = history.first("losses/entropy"), history.recent("losses/entropy")
    if not len(first) or not len(recent):
        return None
    if action_size:  # of a Gaussian it may be negative; what it loses per dimension is the log of the scale
        left = float(np.exp((np.median(recent) - first[0]) / action_size))
    else:
        left = float(np.median(recent) / first[0]) if first[0] > 0 else 1.0
    return left if left < threshold else None


def _explained_below(low: float) -> Callable[[History, float, int], _Value]:
    def value(history: History, threshold: float, _: int) -> _Value:
        recent, loss = history.recent("losses/explained_variance"), _finite(history["losses/value_loss"])
        # returns that hardly vary any longer, as those of a perfect policy, leave nothing to explain
        now = history.recent("losses/value_loss")
        if len(now) and np.median(now) < 0.01 * loss.max():
            return None
        return float(np.median(recent)) if len(recent) and low <= np.median(recent) < threshold else None

    return value


def _value_loss_jumped(history: History, threshold: float, _: int) -> _Value:
    row = _finite(history["losses/value_loss"])
    n = max(5, len(row) // 10)
    if len(row) < 2 * n:
        return None
    times = float(row[-n:].mean() / max(row[:-n].max(), 1e-12))
    return times if times > threshold else None


def _gradient_always_clipped(history: History, threshold: float, _: int) -> _Value:
    row, limit = history["losses/grad_norm"], history.recent("charts/max_grad_norm")
    norm = _finite(row[len(row) // 2 :])
    if not len(norm) or not len(limit):
        return None
    times = float(norm.min() / max(np.median(limit), 1e-12))
    return times if times > threshold else None


def _returns_flat(history: History, threshold: float, _: int) -> _Value:
    """How far the returns ever came from where they began, in standard deviations of the first iterations."""
    first, row = history.first("charts/episodic_return"), _finite(history["charts/episodic_return"])
    if len(first) < 5 or len(row) < 10:
        return None
    n = max(5, len(row) // 10)
    best = max(float(np.median(row[k : k + n])) for k in range(0, len(row), n))
    moved = (best - float(np.median(first))) / max(float(first.std()), abs(float(np.median(first))) * 1e-3, 1e-12)
    return moved if moved < threshold else None


def _last_above(tag: str) -> Callable[[History, float, int], _Value]:
    """The latest value of a figure that few iterations have, where it lies above the threshold."""

    def value(history: History, threshold: float, _: int) -> _Value:
        row = _finite(history[tag])
        return float(row[-1]) if len(row) and row[-1] > threshold else None

    return value


def _speed_lost(history: History, threshold: float, _: int) -> _Value:
    row = _finite(history["charts/sps_window"])
    n = max(5, len(row) // 10)
    if len(row) < 4 * n:
        return None
    share = float(np.median(row[-n:]) / np.median(row[n : 2 * n]))  # the first tenth is warming up
    return share if share < threshold else None


RULES = (
    Rule(
        "clip fraction high",
        0.3,
        _recent_above("losses/clipfrac"),
        "{value:.0%} of the ratios lie outside the clip range (over {threshold:.0%}).",
        "The policy wants to move further than it may: lower learning_rate or update_epochs, or set target_kl.",
    ),
    Rule(
        "clip fraction low",
        0.05,
        _clipped_too_little,
        "{value:.1%} of the ratios lie outside the clip range (under {threshold:.0%}).",
        "Each update moves the policy little: raise learning_rate or update_epochs, or make minibatches smaller.",
        after=50,
    ),
    Rule(
        "KL over its target",
        1.5,
        _kl_over_target,
        "the mean KL of updates is {value:.1f} times its limit (over {threshold:g}).",
        "Lower learning_rate, or stop within the epoch with kl_stop=minibatch.",
    ),
    Rule(
        "entropy collapsed",
        0.05,
        _entropy_lost,
        "the policy keeps {value:.1%} of the spread it began with (under {threshold:.0%}).",
        "It has stopped exploring: raise ent_coef, lower learning_rate.",
    ),
    Rule(
        "explained variance negative",
        0.0,
        _explained_below(-np.inf),
        "explained variance is {value:.2f}: the critic is worse than a constant.",
        "Raise vf_coef or update_epochs, switch value_clip off, normalize_rewards.",
        after=50,
    ),
    Rule(
        "explained variance low",
        0.5,
        _explained_below(0.0),
        "explained variance is {value:.2f} (under {threshold:g}): the critic explains little of the returns.",
        "Longer n_steps, more update_epochs, a larger network, normalize_obs.",
        after=50,
    ),
    Rule(
        "value loss exploding",
        10.0,
        _value_loss_jumped,
        "the value loss is {value:.0f} times its highest before (over {threshold:g}).",
        "Rewards have grown or the critic diverges: normalize_rewards, lower learning_rate or vf_coef.",
    ),
    Rule(
        "actions at bounds",
        0.6,
        _recent_above("charts/clipped_actions"),
        "{value:.0%} of action values lie outside the bounds and were clipped (over {threshold:.0%}).",
        "Wrap the environment with RescaleAction to [-1, 1], lower learning_rate, or train on smaller rewards.",
    ),
    Rule(
        "gradient always clipped",
        10.0,
        _gradient_always_clipped,
        "mean gradient norms stay over {value:.0f} times max_grad_norm (over {threshold:g}).",
        "Its length is lost, only its direction counts: lower vf_coef, normalize_rewards, or raise max_grad_norm.",
        after=50,
    ),
    Rule(
        "returns flat",
        1.0,
        _returns_flat,
        "returns never came further than {value:.1f} standard deviations from their first (under {threshold:g}).",
        "Look at the other findings first; then more exploration (ent_coef), normalize_rewards, another seed.",
        after=100,
    ),
    Rule(
        "first ratio not 1",
        0.01,
        _last_above("samples/first_ratio_error"),
        "before the first step of an update a ratio lies {value:.2g} from 1 (over {threshold:g}).",
        "The policy that learns is not the one that acted: look for dropout, batch norm, or memory in the network.",
        after=1,
    ),
    Rule(
        "speed drifting",
        0.7,
        _speed_lost,
        "steps per second are {value:.0%} of what they were early in the run (under {threshold:.0%}).",
        "Look for other work on the machine, longer episodes or a slowing environment: fastppo bench, time/env.",
        after=100,
    ),
)
