"""The health rules: each finds one problem in a run's history and gives evidence and remedies.

Rules read the logged scalars by their tags. Most use the median of the latest tenth of the run. The thresholds are
chosen on good and on spoilt runs by benchmarks/health.py, which also measures how often the rules are wrong.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np

from fastppo.monitoring.history import History, finite_of

_Array = np.ndarray[Any, Any]
_Value = float | None

_FLAT = 1.0  # standard deviations by which the returns of a learning run rise
_TREND = 2.0  # t-statistic of a line through the returns, above which they rise
_FALLING = 0.25  # share by which a line through the value loss of a learning critic falls

Rounding = Literal["fp32", "tf32", "bf16"]  # precision of matrix products


@dataclasses.dataclass(frozen=True)
class RunTraits:
    """Facts about a run that rules need besides its scalars.

    Attributes:
        action_size: dimensions of a continuous action; 0: discrete actions.
        rounding: precision of the network's matrix products.
        pretrained: whether the policy was trained before, so that its returns need not rise.
    """

    action_size: int = 0
    rounding: Rounding = "fp32"
    pretrained: bool = False


def rounding_of(precision: str, device_type: str) -> Rounding:
    """Return the precision of matrix products under a setting of `precision`, which allows TF32 for fp32 on CUDA."""
    if precision == "bf16":
        return "bf16"
    return "tf32" if device_type == "cuda" else "fp32"


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


# From a history, the threshold and the run's traits: the offending number; None: no problem, or not enough data yet
RuleValue = Callable[[History, float, RunTraits], _Value]


@dataclasses.dataclass(frozen=True)
class Rule:
    """A check for one problem.

    Attributes:
        name: a few words, for the progress line.
        threshold: passed to `value` and shown in the evidence; one per rounding where it depends on that.
        value: returns the offending number.
        evidence: a sentence with {value} and {threshold}.
        remedy: what to try, most likely first.
        after: minimum number of iterations.
        patience: number of checks in a row that must find the problem before it is reported.
    """

    name: str
    threshold: float | Mapping[Rounding, float]
    value: RuleValue
    evidence: str
    remedy: str
    after: int = 20
    patience: int = 3

    def check(self, history: History, traits: RunTraits) -> HealthFinding | None:
        """Return the finding if the rule fires on the history as it is, without regard to patience."""
        if history.iterations < self.after:
            return None
        threshold = self.threshold if isinstance(self.threshold, float) else self.threshold[traits.rounding]
        value = self.value(history, threshold, traits)
        if value is None:
            return None
        return HealthFinding(self.name, self.evidence.format(value=value, threshold=threshold), self.remedy)


def _recent_above(tag: str) -> RuleValue:
    """Return a rule value: the recent median of a tag if it exceeds the threshold."""

    def value(history: History, threshold: float, _: RunTraits) -> _Value:
        recent = history.recent(tag)
        return float(np.median(recent)) if len(recent) and np.median(recent) > threshold else None

    return value


def _clipped_too_little(history: History, threshold: float, traits: RunTraits) -> _Value:
    """Return the median clip fraction of the later half if it is below the threshold and returns don't rise."""
    row, rate = history["losses/clipfrac"], history["charts/learning_rate"]
    recent = finite_of(row[len(row) // 2 :])
    if not len(recent) or not len(rate) or rate[-1] < rate[0] / 2:  # annealing makes small steps on purpose
        return None
    rise = _rise_of_returns(history, traits)
    if rise is None or rise > _FLAT:  # small steps that improve the returns are no problem
        return None
    return float(np.median(recent)) if np.median(recent) < threshold else None


def _kl_high(history: History, threshold: float, traits: RunTraits) -> _Value:
    """Return the recent median of the KL if it exceeds the threshold and the run sets no limit of its own."""
    if len(history.recent("charts/kl_limit")):
        return None
    return _recent_above("losses/approx_kl")(history, threshold, traits)


def _kl_over_target(history: History, threshold: float, _: RunTraits) -> _Value:
    limit, kl = history.recent("charts/kl_limit"), history.recent("losses/approx_kl")
    if not len(limit) or not len(kl):
        return None
    ratio = float(np.median(kl) / max(np.median(limit), 1e-12))
    return ratio if ratio > threshold else None


def _entropy_lost(history: History, threshold: float, traits: RunTraits) -> _Value:
    first, recent = history.first("losses/entropy"), history.recent("losses/entropy")
    if not len(first) or not len(recent):
        return None
    if traits.action_size:
        # a Gaussian's entropy may be negative; its change per dimension is the log of the scale's ratio
        left = float(np.exp((np.median(recent) - first[0]) / traits.action_size))
    else:
        left = float(np.median(recent) / first[0]) if first[0] > 0 else 1.0
    return left if left < threshold else None


def _explained_variance_below(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the recent median of the explained variance if it is below the threshold."""
    recent, loss = history.recent("losses/explained_variance"), finite_of(history["losses/value_loss"])
    # the returns of a near-perfect policy hardly vary, which leaves nothing to explain
    now = history.recent("losses/value_loss")
    if len(now) and np.median(now) < 0.01 * loss.max():
        return None
    return float(np.median(recent)) if len(recent) and np.median(recent) < threshold else None


def _critic_stuck(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the best explained variance of any tenth of the run if it is below the threshold.

    A critic whose loss falls learns, even if it explains little so far.
    """
    explained = _medians(history["losses/explained_variance"])
    loss = finite_of(history["losses/value_loss"])
    if not explained or len(loss) < 10:
        return None
    slope, _error = _line(loss)
    rise = slope * (len(loss) - 1)
    start = float(loss.mean()) - rise / 2
    if -rise > _FALLING * start:
        return None
    return max(explained) if max(explained) < threshold else None


def _value_loss_jumped(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the recent median of the value loss over its maximum before the latest quarter, if above the threshold."""
    row, recent = finite_of(history["losses/value_loss"]), history.recent("losses/value_loss")
    before = row[: len(row) * 3 // 4]
    if len(before) < 5 or not len(recent):
        return None
    ratio = float(np.median(recent) / max(before.max(), 1e-12))
    return ratio if ratio > threshold else None


def _gradient_always_clipped(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the smallest gradient norm of the later half, in units of its limit, if above the threshold."""
    row, limit = history["losses/grad_norm"], history.recent("charts/max_grad_norm")
    norm = finite_of(row[len(row) // 2 :])
    if not len(norm) or not len(limit):
        return None
    ratio = float(norm.min() / max(np.median(limit), 1e-12))
    return ratio if ratio > threshold else None


def _actions_small(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the largest share of the bounds that the actions of any tenth of the run used, if below the threshold."""
    used = _medians(history["charts/action_range"])
    return max(used) if used and max(used) < threshold else None


def _returns_flat(history: History, threshold: float, traits: RunTraits) -> _Value:
    rise = _rise_of_returns(history, traits)
    return rise if rise is not None and rise < threshold else None


def _rise_of_returns(history: History, traits: RunTraits) -> _Value:
    """Return the largest rise of the returns above the first iterations, in standard deviations of the latter.

    Infinite if a line through all returns rises significantly: slow progress. None if too few episodes have ended, or
    the policy was trained before.
    """
    first, row = history.first("charts/episodic_return"), finite_of(history["charts/episodic_return"])
    if traits.pretrained or len(first) < 5 or len(row) < 10:
        return None
    slope, error = _line(row)
    if slope > _TREND * error:
        return math.inf
    best = max(_medians(row))
    return (best - float(np.median(first))) / max(float(first.std()), abs(float(np.median(first))) * 1e-3, 1e-12)


def _last_two_above(tag: str) -> RuleValue:
    """Return a rule value: the smaller of the last two values of a rarely logged tag if it exceeds the threshold."""

    def value(history: History, threshold: float, _: RunTraits) -> _Value:
        least = float(finite_of(history[tag])[-2:].min(initial=math.inf))
        return least if math.isfinite(least) and least > threshold else None

    return value


def _memory_idle(history: History, threshold: float, _: RunTraits) -> _Value:
    """Return the larger of the last two gradient shares of the memory if it is below the threshold."""
    latest = finite_of(history["memory/gradient_share"])[-2:]
    return float(latest.max()) if len(latest) == 2 and latest.max() < threshold else None


def _speed_lost(history: History, threshold: float, _: RunTraits) -> _Value:
    row = finite_of(history["charts/sps_window"])
    n = max(5, len(row) // 10)
    if len(row) < 4 * n:
        return None
    share = float(np.median(row[-n:]) / np.median(row[n : 2 * n]))  # the first tenth is warm-up
    return share if share < threshold else None


def _line(row: _Array) -> tuple[float, float]:
    """Return slope and its standard error of a line fitted to a row of at least three values."""
    x = np.arange(len(row)) - (len(row) - 1) / 2
    slope = float(x @ row) / float(x @ x)
    residuals = row - row.mean() - slope * x
    return slope, math.sqrt(float(residuals @ residuals) / (len(row) - 2) / float(x @ x))


def _medians(row: _Array) -> list[float]:
    """Return the medians of the finite values in each tenth of a row, of at least five points each."""
    n = max(5, len(row) // 10)
    parts = (finite_of(row[k : k + n]) for k in range(0, len(row), n))
    return [float(np.median(part)) for part in parts if len(part)]


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
        0.01,
        _clipped_too_little,
        "{value:.1%} of the ratios are outside the clip range (below {threshold:.0%}), and returns hardly rise.",
        "Each update changes the policy little: raise learning_rate or update_epochs, or use smaller minibatches.",
        after=100,
    ),
    Rule(
        "KL high",
        0.05,
        _kl_high,
        "the mean KL of an update is {value:.2g} (above {threshold:g}).",
        "Each update changes the policy too much: lower learning_rate or update_epochs, or set target_kl.",
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
        -0.2,
        _explained_variance_below,
        "explained variance is {value:.2f} (below {threshold:g}): the critic predicts returns worse than a constant.",
        "Raise vf_coef or update_epochs, turn value_clip off, or use normalize_rewards.",
        after=50,
    ),
    Rule(
        "critic not learning",
        0.1,
        _critic_stuck,
        "explained variance is {value:.2f} in the best tenth of the run (below {threshold:g}), and the value loss "
        "hardly falls.",
        "Use normalize_rewards, turn value_clip off, raise vf_coef; see whether rewards depend on the observations.",
        after=50,
    ),
    Rule(
        "value loss exploding",
        100.0,
        _value_loss_jumped,
        "the value loss is {value:,.0f} times its previous maximum (above {threshold:g}).",
        "Rewards have grown or the critic diverges: use normalize_rewards, or lower learning_rate or vf_coef.",
        patience=2,
    ),
    Rule(
        "actions at bounds",
        0.9,
        _recent_above("charts/clipped_actions"),
        "{value:.0%} of action values exceed the bounds and are clipped (above {threshold:.0%}).",
        "Wrap the environment with RescaleAction to [-1, 1], lower learning_rate, or scale rewards down.",
    ),
    Rule(
        "actions near 0",
        0.01,
        _actions_small,
        "actions use on average at most {value:.2%} of their bounds (below {threshold:.0%}).",
        "A new policy samples from about -1 to 1: wrap the environment with RescaleAction to [-1, 1].",
        patience=2,
    ),
    Rule(
        "gradient always clipped",
        1000.0,
        _gradient_always_clipped,
        "the gradient norm stays above {value:,.0f} times max_grad_norm (threshold {threshold:g}).",
        "Every step is scaled down to the same length: lower vf_coef, use normalize_rewards, or raise max_grad_norm.",
        after=50,
    ),
    Rule(
        "returns flat",
        _FLAT,
        _returns_flat,
        "returns are {value:.1f} initial standard deviations above the first ones in the best tenth of the run (below "
        "{threshold:g}), without a trend.",
        "Fix the other findings first; then try a higher ent_coef, normalize_rewards or another seed.",
        after=100,
    ),
    Rule(
        "first ratio not 1",
        # outputs differ in their last digits where acting and learning use different batch sizes
        {"fp32": 0.01, "tf32": 0.05, "bf16": 0.3},
        _last_two_above("samples/first_ratio_error"),
        "before the first optimiser step of an update, a ratio differs from 1 by {value:.2g} (above {threshold:g}).",
        "The updated policy isn't the one that acted: look for dropout, batch norm, or a state that the network keeps "
        "to itself instead of returning it.",
        after=1,
        patience=1,
    ),
    Rule(
        "memory's gradient vanishes",
        # CartPole's unscaled returns saturate the critic's memory while it learns: its share falls to 50 times this
        1e-5,
        _memory_idle,
        "the memory's recurrent weights get {value:.1e} of the gradient of memory and head (below {threshold:g}).",
        "Saturated gates learn nothing: use normalize_rewards or normalize_obs, or lower learning_rate. Nothing is "
        "remembered in episodes of one step either: check that the task needs memory.",
        patience=1,
    ),
    Rule(
        "speed dropped",
        0.5,
        _speed_lost,
        "steps per second are {value:.0%} of those early in the run (below {threshold:.0%}).",
        "Look for other load on the machine, or an environment that slows down: see time/env, fastppo bench.",
        after=100,
    ),
)
