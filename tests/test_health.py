"""Each health rule, on synthetic histories that do and don't trigger it."""

import math

import numpy as np
import pytest

from fastppo.monitoring.health import POINTS, RULES, History, check_health

N = 200
HEALTHY = {
    "losses/clipfrac": 0.12,
    "losses/approx_kl": 0.008,
    "charts/kl_limit": 0.02,
    "losses/entropy": np.linspace(0.69, 0.4, N),
    "losses/explained_variance": 0.9 - 0.9 * np.exp(-np.arange(N) / 15),
    "losses/value_loss": np.linspace(10, 5, N),
    "losses/grad_norm": 0.8,
    "charts/max_grad_norm": 0.5,
    "charts/learning_rate": np.linspace(2.5e-4, 0, N),
    "charts/clipped_actions": 0.1,
    "charts/episodic_return": np.linspace(20, 400, N),
    "charts/sps_window": 30_000.0,
    "samples/first_ratio_error": 5e-7,
}
# By rule name: changes to the healthy history that must not trigger the rule, and changes that must
CASES = {
    "clip fraction high": ({"losses/clipfrac": 0.29}, {"losses/clipfrac": 0.31}),
    "clip fraction low": (
        # small steps at the end of annealing are intended
        {"losses/clipfrac": np.where(np.arange(N) < 100, 0.1, 0.0)},
        {"losses/clipfrac": 0.01, "charts/learning_rate": 2.5e-4},
    ),
    "KL above target": ({"losses/approx_kl": 0.029}, {"losses/approx_kl": 0.031}),
    "entropy collapsed": (
        {"losses/entropy": np.geomspace(0.69, 0.05, N)},
        {"losses/entropy": np.geomspace(0.69, 0.001, N)},
    ),
    "explained variance negative": (
        # the returns no longer vary, so there is nothing to explain
        {"losses/explained_variance": -3.0, "losses/value_loss": np.geomspace(10, 1e-4, N)},
        {"losses/explained_variance": -0.2},
    ),
    "explained variance low": ({"losses/explained_variance": 0.6}, {"losses/explained_variance": 0.3}),
    "value loss exploding": (
        {"losses/value_loss": np.geomspace(1, 30, N)},
        {"losses/value_loss": np.where(np.arange(N) < 180, 1.0, 50.0)},
    ),
    "actions at bounds": ({"charts/clipped_actions": 0.55}, {"charts/clipped_actions": 0.9}),
    "gradient always clipped": (
        {"losses/grad_norm": np.where(np.arange(N) % 5, 50.0, 0.4)},
        {"losses/grad_norm": 50.0},
    ),
    "returns flat": (
        {"charts/episodic_return": np.linspace(20, 60, N) + 5 * np.sin(np.arange(N))},
        {"charts/episodic_return": 20 + 5 * np.sin(np.arange(N))},
    ),
    "first ratio not 1": (
        {"samples/first_ratio_error": 1e-4},
        # logged in few iterations; the last value counts
        {"samples/first_ratio_error": np.where(np.arange(N) % 50, math.nan, 0.05)},
    ),
    "speed dropped": (
        {"charts/sps_window": np.linspace(30_000, 24_000, N)},
        {"charts/sps_window": np.linspace(30_000, 15_000, N)},
    ),
}


def history(changes=(), n=N):
    h = History()
    columns = {tag: np.broadcast_to(value, N) for tag, value in (HEALTHY | dict(changes)).items()}
    for i in range(n):
        h.add({tag: float(column[i]) for tag, column in columns.items()})
    return h


def names(h, **kwargs):
    return [finding.name for finding in check_health(h, **kwargs)]


def test_every_rule_has_a_case():
    assert set(CASES) == {rule.name for rule in RULES}
    assert len({rule.name for rule in RULES}) == len(RULES)


def test_a_healthy_run_has_no_findings_at_any_length():
    for n in range(1, N + 1):
        assert names(history(n=n)) == [], n


@pytest.mark.parametrize("rule", CASES)
def test_each_rule_triggers_on_its_own_problem_only(rule):
    healthy, problem = CASES[rule]
    assert names(history(healthy)) == []
    (finding,) = check_health(history(problem))
    assert finding.name == rule
    text = str(finding)
    assert text.startswith(rule)
    assert "{" not in text
    assert finding.remedy.endswith(".")


@pytest.mark.parametrize(("solved", "n"), [(20, 400), (60, 2000), (200, 5000), (2000, 30_000)])
def test_fast_learning_is_not_reported_as_flat_returns(solved, n):
    h = History()
    rng = np.random.default_rng(0)
    for i in range(n):
        h.add({"charts/episodic_return": min(500, 20 + 480 * i / solved) + rng.normal(0, 3)})
    assert names(h) == []


def test_an_early_entropy_collapse_in_a_long_run_is_found():
    h = History()
    for i in range(30_000):
        h.add({"losses/entropy": 0.69 * max(0.001, 1 - i / 300)})
    assert names(h) == ["entropy collapsed"]


def test_the_entropy_of_a_gaussian_counts_per_dimension():
    # two dimensions that lose log(30) each; a Gaussian's entropy may be negative
    falls = {"losses/entropy": np.linspace(2.8, 2.8 - 2 * math.log(30), N)}
    assert names(history(falls), action_size=2) == ["entropy collapsed"]
    assert names(history({"losses/entropy": np.linspace(2.8, 2.8 - 2 * math.log(10), N)}), action_size=2) == []


def test_without_target_kl_the_kl_is_not_checked():
    h = History()
    for _ in range(N):
        h.add({"losses/approx_kl": 5.0})
    assert check_health(h) == []


def test_an_empty_history_and_one_of_nan_have_no_findings():
    assert check_health(History()) == []
    h = History()
    for _ in range(N):
        h.add(dict.fromkeys(HEALTHY, math.nan))
    assert check_health(h) == []
    assert np.isnan(h["losses/clipfrac"]).all()


@pytest.mark.parametrize("n", [1, 7, POINTS, POINTS + 1, 5 * POINTS + 3])
def test_history_points_are_means_of_equally_many_iterations(n):
    h, values = History(), np.arange(n, dtype=float)
    for i, value in enumerate(values):
        h.add({"a": value} | ({"late": value} if i % 3 == 2 else {}))
    assert len(h["a"]) <= POINTS
    groups = [values[i : i + h.stride] for i in range(0, n, h.stride)]
    np.testing.assert_allclose(h["a"], [group.mean() for group in groups])
    late = [group[group % 3 == 2] for group in groups]
    np.testing.assert_allclose(
        h["late"] if n > 2 else [], [g.mean() if len(g) else math.nan for g in late][: n if n > 2 else 0]
    )
    assert len(h["never"]) == 0
