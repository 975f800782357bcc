"""Every benchmark imports; the comparison of two versions finds differences."""

import ast
import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compat, distributions, gpu, learning, recurrent
from benchmarks.identical import compare, run_case
from benchmarks.identical_case import CASES, SETTINGS
from fastppo import Config

ROOT = Path(__file__).parents[1]
T_TABLE = {1: 12.706, 4: 2.776, 8: 2.306, 30: 2.042}  # Student's t at 0.975, as printed tables have it
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_and_has_a_main(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_benchmark_imports_of_fastppo_exists(name):
    """Within functions too, where an import only runs with its benchmark."""
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastppo":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("distribution", distributions.DISTRIBUTIONS)
@pytest.mark.parametrize("env_id", distributions.SETTINGS)
def test_the_settings_of_each_distribution_are_valid(env_id, distribution):
    config = Config(**distributions.settings_of(env_id, distribution, 2.0))
    assert config.learning_rate == 2 * distributions.SETTINGS[env_id]["learning_rate"]


def test_the_interval_of_a_difference_is_welchs():
    assert {freedom: round(compat.t_quantile(freedom), 3) for freedom in T_TABLE} == T_TABLE
    assert compat.welch([1, 2, 3, 4, 5], [2, 3, 4, 5, 6]) == pytest.approx(2.306 * 1, abs=1e-3), "equal variances 2.5"
    assert compat.welch([1, 1], [2, 2]) == 0
    row = compat.compare([{"program": p, "return": x} for p, x in (("fastppo", 3.0), ("stable-baselines3", 1.0))])
    assert row == {"fastppo": 3.0, "stable-baselines3": 1.0, "difference": 2.0}


@pytest.mark.parametrize("name", CASES)
def test_the_settings_of_each_case_are_valid(name):
    Config(**SETTINGS | CASES[name].settings)


def test_the_gpu_benchmark_writes_each_row_as_it_comes(tmp_path, monkeypatch):
    output, written = tmp_path / "rows.json", []

    def part(options):
        for k in range(2):
            yield {"what": "part", "k": k}
            written.append(json.loads(output.read_text())["rows"])
        raise RuntimeError("no memory")

    def last(options):
        raise KeyboardInterrupt  # what a time-out does
        yield

    for name in ("updates", "tensor_training", "host_training"):
        monkeypatch.setattr(gpu, name, lambda _: iter(()))
    monkeypatch.setattr(gpu, "advantages", part)
    monkeypatch.setattr(gpu, "solving", last)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(gpu.Options(device="cpu", output=output))
    assert [len(rows) for rows in written] == [1, 2]
    rows = json.loads(output.read_text())["rows"]
    assert [row.get("k") for row in rows] == [0, 1, None]
    assert rows[2] == {"what": "part", "failed": "RuntimeError: no memory"}


WEIGHT, SCALAR = "model.safetensors: weight", "iteration 1: losses/value_loss"
RUN = {SCALAR: 0.5, WEIGHT: torch.ones(3), "result.json: ended": "finished"}


@pytest.mark.parametrize(
    ("changes", "plain", "compiled", "largest"),
    [
        ({}, "equal", "equal", 0),
        ({SCALAR: float("nan")}, "differs", "differs", float("inf")),
        ({SCALAR: 0.75}, "differs", "within 1e-06", 0.25),
        ({WEIGHT: torch.ones(3) + 5e-7}, "differs", "within 1e-06", pytest.approx(5e-7, rel=0.1)),
        ({WEIGHT: torch.ones(3) + 1e-5}, "differs", "differs", pytest.approx(1e-5, rel=0.1)),
        ({WEIGHT: torch.ones(3).double()}, "differs", "within 1e-06", 0),
        ({WEIGHT: torch.ones(1, 3)}, "differs", "differs", float("inf")),
        ({"result.json: ended": "target"}, "differs", "differs", float("inf")),
        ({"new": 1}, "equal", "equal", 0),
    ],
)
def test_two_versions_are_compared(changes, plain, compiled, largest):
    found = compare(RUN, RUN | changes)
    assert (found.verdict(compiled=False), found.verdict(compiled=True)) == (plain, compiled)
    assert found.largest == largest
    assert found.extra == [name for name in changes if name not in RUN]


def test_a_value_that_the_new_version_lacks_is_an_error():
    found = compare(RUN, {SCALAR: 0.5, WEIGHT: RUN[WEIGHT]})
    assert found.missing == ["result.json: ended"]
    assert found.verdict(compiled=True) == "missing values"


def test_a_tree_equals_itself(tmp_path):
    for side in ("base", "here"):
        (tmp_path / side).mkdir()
    row = run_case("sync", {"base": ROOT, "here": ROOT}, tmp_path)
    assert (row["result"], row["missing"], row["extra"]) == ("equal", [], [])
    assert row["values"] > 100


def play(env, actions):
    """Return the observations, rewards and endings of an episode of these actions."""
    rows = [(env.reset(seed=1)[0], 0.0, False, False)]
    rows += [env.step(action)[:4] for action in actions]
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_the_sign_of_the_t_maze_shows_in_its_first_cell_only_and_tells_the_turn():
    env = learning.TMaze(length=3)
    obs, rewards, terminated, _ = play(env, [0, 0, 0])
    sign = obs[0, 0]
    assert sign in (-1, 1)
    assert obs[1:, 0].tolist() == [0, 0, 0]
    assert obs[:, 1].tolist() == [0, 0, 0, 1], "the junction shows"
    assert not rewards.any()
    assert not terminated.any()
    right = 1 if sign < 0 else 2
    assert env.step(right)[1:4] == (1.0, True, False)
    play(env, [0, 0, 0])
    assert env.step(3 - right)[1:4] == (0.0, True, False)


def test_an_episode_of_the_t_maze_is_cut_and_turns_in_its_corridor_stay_in_place():
    obs, rewards, terminated, truncated = play(learning.TMaze(length=3), [1, 2] * 6)
    assert (obs[:, 0] == obs[0, 0]).all()
    assert not rewards.any()
    assert not terminated.any()
    assert np.flatnonzero(truncated).tolist() == [12]


def test_cartpole_without_velocities_shows_position_and_angle():
    env = learning.cartpole_without_velocities()
    obs, _ = env.reset(seed=3)
    assert obs.tolist() == env.unwrapped.state[[0, 2]].astype(np.float32).tolist()
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize(("task", "variant"), [(task, v) for task, t in learning.TASKS.items() for v in t.variants])
def test_the_settings_of_each_learning_task_are_valid(task, variant):
    settings = learning.settings_of(task, variant)
    config = Config(**settings)
    assert ("target_return" in settings) == (config.target_return is not None)


def test_a_learning_campaign_trains_only_what_is_missing_or_has_other_settings(tmp_path, monkeypatch):
    trained = []

    def run_task(module, job, python):
        trained.append(job)
        task, variant, seed = job
        settings = learning.settings_of(task, variant)
        return {"task": task, "variant": variant, "seed": seed, "settings": json.loads(json.dumps(settings))}

    monkeypatch.setattr(learning, "run_task", run_task)
    jobs = [("t-maze", "lstm", 1), ("taxi", "no masks", 2)]
    first = [learning.run_once(tmp_path, *job) for job in jobs]
    assert [learning.run_once(tmp_path, *job) for job in jobs] == first
    assert trained == jobs
    monkeypatch.setitem(learning._FIXED, "threads", 2)
    learning.run_once(tmp_path, *jobs[0])
    assert trained == [*jobs, jobs[0]]


def test_a_learning_run_is_as_expected_by_the_goal_of_its_variant():
    def expected(task, variant, **figures):
        return learning.as_expected({"task": task, "variant": variant, **figures})

    assert expected("t-maze", "lstm", mean_return=0.96, best_mean_return=0.96)
    assert not expected("t-maze", "lstm", mean_return=0.94, best_mean_return=0.99)
    assert expected("t-maze", "mlp", mean_return=0.5, best_mean_return=0.6)
    assert not expected("t-maze", "mlp", mean_return=0.5, best_mean_return=0.8), "the best mean counts"
    assert expected("fetch-reach", "mlp", mean_return=-2.0, best_mean_return=-1.0, success_rate=0.9)


def test_a_ratio_of_recurrent_speeds_is_taken_within_its_round():
    speeds = {"LSTM, sync": (10, 30), "MLP, sync": (20, 90), recurrent.PEER: (5, 10)}
    runs = [
        {"name": name, "round": i, "sps": sps} for name, by_round in speeds.items() for i, sps in enumerate(by_round)
    ]
    row = recurrent.rows({"runs": runs})[0]
    assert row["vs MLP"] == "0.42 (0.33-0.50)"
    assert row["vs RecurrentPPO"] == "2.50 (2.00-3.00)"
    assert row["vs MLP, shared trunk"] == "", "not measured"
