"""Health rules: each finds one problem in a run's history and gives evidence and remedies.

Rules read the logged scalars by their tags. Most use the latest tenth of the run, so that one unusual update doesn't
trigger them. Thresholds are rules of thumb that healthy runs of the presets don't reach.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]
_Value = float | None

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
        return _finite(row[-max(5, len(row) // 10) :])

    def first(self, tag: str) -> _Array:
        """Return the finite values of the first 20 iterations, unthinned."""
        return np.array(self._first.get(tag, []))


def _halved(table: _Array) -> _Array:
    """Merge pairs of points, which frees the second half of each row."""
    pairs = table.reshape(len(table), -1, 2).sum(2)
    return np.concatenate((pairs, np.zeros_like(pairs)), axis=1)


def _finite(row: _Array) -> _Array:
    finite: _Array = row[np.isfinite(row)]
    return finite


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check for one problem.

    Attributes:
        name: a few words, for the progress line.
        threshold: passed to `value` and shown in the evidence.
        value: returns the offending number from a history, the threshold and the size of a continuous action (0:
            discrete); None if there is no problem, or not enough data yet.
        evidence: a sentence with {value} and {threshold}.
        remedy: what to try, most likely first.
        after: minimum number of iterations.
    """

    name: str
    threshold: float
    value: Callable[[History, float, int], _Value]
    evidence: str
    remedy: str
    after: int = 20


@dataclasses.dataclass(frozen=True)
class HealthFinding:
    """A problem that a rule found.

    Attributes:
        name: the rule's name.
        evidence: a sentence with the numbers.
        remedy: what to try, most likely first.
    """

    name: str
    evidence: str
    remedy: str

    def __str__(self) -> str:
        """Return name, evidence and remedy in one line."""
        return f"{self.name}: {self.evidence} {self.remedy}"


def check_health(history: History, action_size: int = 0) -> list[HealthFinding]:
    """Return the problems that RULES find in a run's history.

    Args:
        history: the scalars of the run.
        action_size: dimensions of a continuous action; 0: discrete actions.
    """
    found = []
    for rule in RULES:
        value = rule.value(history, rule.threshold, action_size) if history.iterations >= rule.after else None
        if value is not None:
            evidence = rule.evidence.format(value=value, threshold=rule.threshold)
            found.append(HealthFinding(rule.name, evidence, rule.remedy))
    return found


def _recent_above(tag: str) -> Callable[[History, float, int], _Value]:
    """Return a rule value: the recent median of a tag if it exceeds the threshold."""

    def value(history: History, threshold: float, _: int) -> _Value:
        recent = history.recent(tag)
        return float(np.median(recent)) if len(recent) and np.median(recent) > threshold else None

    return value


def _clipped_too_little(history: History, threshold: float, _: int) -> _Value:
    row, rate = history["losses/clipfrac"], history["charts/learning_rate"]
    recent = _finite(row[len(row) // 2 :])
    if not len(recent) or not len(rate) or rate[-1] < rate[0] / 2:  # annealing makes small steps on purpose
        return None
    return float(np.median(recent)) if np.median(recent) < threshold else None


def _kl_over_target(history: History, threshold: float, _: int) -> _Value:
    limit, kl = history.recent("charts/kl_limit"), history.recent("losses/approx_kl")
    if not len(limit) or not len(kl):
        return None
    ratio = float(np.median(kl) / max(np.median(limit), 1e-12))
    return ratio if ratio > threshold else None


def _entropy_lost(history: History, threshold: float, action_size: int) -> _Value:
    first, recent = history.first("losses/entropy"), history.recent("losses/entropy")
    if not len(first) or not len(recent):
        return None
    if action_size:  # a Gaussian's entropy may be negative; its change per dimension is the log of the scale's ratio
        left = float(np.exp((np.median(recent) - first[0]) / action_size))
    else:
        left = float(np.median(recent) / first[0]) if first[0] > 0 else 1.0
    return left if left < threshold else None


def _explained_variance_below(low: float) -> Callable[[History, float, int], _Value]:
    """Return a rule value: the recent median of the explained variance if it is in [low, threshold)."""

    def value(history: History, threshold: float, _: int) -> _Value:
        recent, loss = history.recent("losses/explained_variance"), _finite(history["losses/value_loss"])
        # the returns of a near-perfect policy hardly vary, which leaves nothing to explain
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
    ratio = float(row[-n:].mean() / max(row[:-n].max(), 1e-12))
    return ratio if ratio > threshold else None


def _gradient_always_clipped(history: History, threshold: float, _: int) -> _Value:
    row, limit = history["losses/grad_norm"], history.recent("charts/max_grad_norm")
    norm = _finite(row[len(row) // 2 :])
    if not len(norm) or not len(limit):
        return None
    ratio = float(norm.min() / max(np.median(limit), 1e-12))
    return ratio if ratio > threshold else None


def _returns_flat(history: History, threshold: float, _: int) -> _Value:
    """Return the largest rise of the returns above the first iterations, in standard deviations of the latter."""
    first, row = history.first("charts/episodic_return"), _finite(history["charts/episodic_return"])
    if len(first) < 5 or len(row) < 10:
        return None
    n = max(5, len(row) // 10)
    best = max(float(np.median(row[k : k + n])) for k in range(0, len(row), n))
    rise = (best - float(np.median(first))) / max(float(first.std()), abs(float(np.median(first))) * 1e-3, 1e-12)
    return rise if rise < threshold else None


def _first_ratio_error(history: History, threshold: float, _: int) -> _Value:
    """Return the last sampled error of a first ratio, unless TF32 or bf16 explain it; samples are rare."""
    errors, tolerances = (_finite(history[f"samples/first_ratio_{name}"]) for name in ("error", "tolerance"))
    if len(tolerances):
        threshold = max(threshold, float(tolerances[-1]))
    return float(errors[-1]) if len(errors) and errors[-1] > threshold else None


def _speed_lost(history: History, threshold: float, _: int) -> _Value:
    row = _finite(history["charts/sps_window"])
    n = max(5, len(row) // 10)
    if len(row) < 4 * n:
        return None
    share = float(np.median(row[-n:]) / np.median(row[n : 2 * n]))  # the first tenth is warm-up
    return share if share < threshold else None


RULES = (
    Rule(
        "clip fraction high",
        0.3,
        _recent_above("losses/clipfrac"),
        "{value:.0%} of the ratios are outside the clip range (above {threshold:.0%}).",
        "Updates push the policy beyond the clip range: lower learning_rate or update_epochs, or set target_kl.",
    ),
    Rule(
        "clip fraction low",
        0.05,
        _clipped_too_little,
        "{value:.1%} of the ratios are outside the clip range (below {threshold:.0%}).",
        "Each update changes the policy little: raise learning_rate or update_epochs, or use smaller minibatches.",
        after=50,
    ),
    Rule(
        "KL above target",
        1.5,
        _kl_over_target,
        "the mean KL of an update is {value:.1f} times its limit (above {threshold:g}).",
        "Lower learning_rate, or stop within an epoch with kl_stop=minibatch.",
    ),
    Rule(
        "entropy collapsed",
        0.05,
        _entropy_lost,
        "the policy has {value:.1%} of its initial entropy or scale left (below {threshold:.0%}).",
        "It no longer explores: raise ent_coef or lower learning_rate.",
    ),
    Rule(
        "explained variance negative",
        0.0,
        _explained_variance_below(-np.inf),
        "explained variance is {value:.2f}: the critic predicts returns worse than a constant.",
        "Raise vf_coef or update_epochs, turn value_clip off, or use normalize_rewards.",
        after=50,
    ),
    Rule(
        "explained variance low",
        0.5,
        _explained_variance_below(0.0),
        "explained variance is {value:.2f} (below {threshold:g}): the critic explains little of the returns.",
        "Raise n_steps or update_epochs, use a larger network or normalize_obs.",
        after=50,
    ),
    Rule(
        "value loss exploding",
        10.0,
        _value_loss_jumped,
        "the value loss is {value:.0f} times its previous maximum (above {threshold:g}).",
        "Rewards have grown or the critic diverges: use normalize_rewards, or lower learning_rate or vf_coef.",
    ),
    Rule(
        "actions at bounds",
        0.6,
        _recent_above("charts/clipped_actions"),
        "{value:.0%} of action values exceed the bounds and are clipped (above {threshold:.0%}).",
        "Wrap the environment with RescaleAction to [-1, 1], lower learning_rate, or scale rewards down.",
    ),
    Rule(
        "gradient always clipped",
        10.0,
        _gradient_always_clipped,
        "the gradient norm stays above {value:.0f} times max_grad_norm (threshold {threshold:g}).",
        "Every step is scaled down to the same length: lower vf_coef, use normalize_rewards, or raise max_grad_norm.",
        after=50,
    ),
    Rule(
        "returns flat",
        1.0,
        _returns_flat,
        "returns have risen by at most {value:.1f} initial standard deviations (below {threshold:g}).",
        "Fix the other findings first; then try a higher ent_coef, normalize_rewards or another seed.",
        after=100,
    ),
    Rule(
        "first ratio not 1",
        0.01,
        _first_ratio_error,
        "before the first optimiser step of an update, a ratio differs from 1 by {value:.2g} (above {threshold:g}).",
        "The updated policy isn't the one that acted: look for dropout, batch norm or memory in the network.",
        after=1,
    ),
    Rule(
        "speed dropped",
        0.7,
        _speed_lost,
        "steps per second are {value:.0%} of those early in the run (below {threshold:.0%}).",
        "Look for other load on the machine, or an environment that slows down: see time/env, fastppo bench.",
        after=100,
    ),
)
