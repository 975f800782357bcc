"""Figures that only runs with action masks or memory have: measured values, logs, reports, health."""

import dataclasses
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer
from fastppo.analysis.bench import Point, ceilings
from fastppo.analysis.bench_report import write_files
from fastppo.analysis.diff import difference
from fastppo.analysis.report import report
from fastppo.analysis.run_data import read_run, read_runs
from fastppo.analysis.study import plan_study
from fastppo.builders import parts
from fastppo.monitoring.health_rules import RULES
from fastppo.ppo.metrics import MASKED, MEASURED, merge_ranks
from fastppo.runs.system_info import system_info

SMALL = Config(n_envs=2, n_steps=32, total_timesteps=64 * 6, n_minibatches=2, update_epochs=2, compile="off", threads=1)
MEMORY = {"memory": "lstm", "segment_length": 8, "record_ratios": 2}


class Doors(gym.Env):
    """Step t of an episode of 4 steps allows actions 0 to t, so 3 of 8 choices are forbidden on average.

    If `strict`, an action that is not allowed raises. The reward is 1 for the highest allowed action.
    """

    observation_space = spaces.Dict(
        {
            "steps": spaces.Box(0, 4, (1,), np.float32),
            "colour": spaces.Discrete(3),
            "action_mask": spaces.MultiBinary(4),
        }
    )
    action_space = spaces.Discrete(4)

    def __init__(self, strict=True):
        self.strict = strict

    def _obs(self):
        mask = np.arange(4) <= self.steps
        return {
            "steps": np.array([self.steps], np.float32),
            "colour": self.steps % 3,
            "action_mask": mask.astype(np.int8),
        }

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        assert action <= self.steps or not self.strict, f"action {action} is forbidden at step {self.steps}"
        reward = float(action == self.steps)
        self.steps += 1
        return self._obs(), reward, self.steps == 4, False, {}


class OneStep(gym.Env):
    """Episodes of a single step, in which a memory has nothing to remember."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.obs = self.np_random.uniform(-1, 1, 2).astype(np.float32)
        return self.obs, {}

    def step(self, action):
        return self.obs, float((self.obs[0] > 0) == action), True, False, {}


gym.register("tests/Doors-v0", Doors)


def train(folder, make_env=None, **changes):
    trainer = Trainer(dataclasses.replace(SMALL, run_dir=folder, **changes), make_env, progress=False)
    trainer.run()
    return trainer


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tags_of(folder):
    return {tag for row in rows_of(folder) for tag in row}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A masked run with memory, and runs with neither."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "doors", env_id="tests/Doors-v0", **MEMORY)
    train(folder / "doors-plain", env_id="tests/Doors-v0", seed=2)
    train(folder / "cartpole", record_ratios=2)
    return folder


def test_masked_actions_are_the_share_of_forbidden_choices(runs):
    for name in ("doors", "doors-plain"):
        assert [row["charts/masked_actions"] for row in rows_of(runs / name)] == [pytest.approx(3 / 8)] * 6


def test_filler_rows_do_not_count_as_masked(tmp_path):
    """With next-step autoreset, the mask of a filler row is that of the last observation of an episode."""
    make = [lambda: Doors(strict=False)] * 2
    vector = gym.vector.SyncVectorEnv(make, autoreset_mode=gym.vector.AutoresetMode.NEXT_STEP)
    trainer = train(tmp_path / "run", lambda: vector)
    assert trainer.rollout.valid is not None
    assert not trainer.rollout.valid.all()
    allowed = trainer.env.obs_spec.allowed(trainer.rollout.obs[:-1])
    expected = (~allowed[trainer.rollout.valid]).float().mean().item()
    assert rows_of(tmp_path / "run")[-1]["charts/masked_actions"] == pytest.approx(expected)
    assert (~allowed).float().mean().item() != pytest.approx(expected)


def test_processes_weigh_their_share_of_masked_actions_by_rows():
    names = ("policy_loss", MASKED, *MEASURED)
    rows = np.zeros((2, len(names) + 3))
    rows[:, names.index("steps")], rows[:, names.index(MASKED)] = (10, 30), (0.5, 0.1)
    assert merge_ranks(rows, names)[names.index(MASKED)] == pytest.approx(0.2)


def test_runs_without_masks_and_memory_log_no_figures_of_them(runs):
    assert not {tag for tag in tags_of(runs / "cartpole") if "mask" in tag or tag.startswith("memory/")}
    assert not {tag for tag in tags_of(runs / "doors-plain") if tag.startswith("memory/")}


def test_the_gradient_share_is_that_of_the_recurrent_weights(tmp_path):
    trainer = Trainer(
        dataclasses.replace(SMALL, run_dir=tmp_path / "run", n_minibatches=1, update_epochs=1, **MEMORY), progress=False
    )
    for stats in trainer.iterations():
        scalars = stats.scalars
        gradient = trainer.update.gradient(trainer.rollout.batch(), trainer.learner.coefs)
        by_name = dict(zip(trainer.update.trained, trainer.update.parameters.views(gradient), strict=True))
        break
    shares = []
    for memory, head in (("memories.0.", "body.critic."), ("memories.1.", "body.actor.")):
        whole = [
            x.flatten() for name, x in by_name.items() if name.startswith((f"network.{memory}", f"network.{head}"))
        ]
        assert len(whole) == 5, "input weight and bias, recurrent weight, weight and bias of the head"
        shares.append((by_name[f"network.{memory}recurrent"].norm() / torch.cat(whole).norm()).item())
    assert 0 < min(shares) < 1
    assert scalars["memory/gradient_share"] == pytest.approx(min(shares), rel=1e-4)
    states = torch.stack([x[:-1] for x in trainer.rollout.states])
    assert scalars["memory/state_norm"] == pytest.approx(states.square().mean().sqrt().item(), rel=1e-4)


@pytest.mark.parametrize(("memory", "shared"), [("lstm", True), ("gru", False), ("gru", True), ("mingru", False)])
def test_every_memory_logs_its_state_and_those_with_recurrent_weights_their_share(tmp_path, memory, shared):
    train(tmp_path / "run", **MEMORY | {"memory": memory}, shared_trunk=shared)
    sampled = [row for row in rows_of(tmp_path / "run") if "samples/first_ratio_error" in row]
    assert [row["iteration"] for row in sampled] == [1, 3, 5]
    assert all(row["memory/state_norm"] > 0 for row in sampled)
    assert all(("memory/gradient_share" in row) is (memory != "mingru") for row in sampled)


def test_measuring_the_memory_changes_no_number(tmp_path):
    vectors = [
        train(tmp_path / str(every), **MEMORY | {"record_ratios": every}).update.parameters.vector for every in (0, 1)
    ]
    assert torch.equal(*vectors)
    assert not {tag for tag in tags_of(tmp_path / "0") if tag.startswith("memory/")}


def test_a_run_that_samples_its_memory_plans_for_one_more_gradient(tmp_path, monkeypatch):
    asked, plan = [], parts.plan_memory
    monkeypatch.setattr(parts, "plan_memory", lambda *a, **k: (asked.append(k["gradients"]), plan(*a, **k))[1])
    for i, changes in enumerate((MEMORY, MEMORY | {"record_ratios": 0}, MEMORY | {"memory": "mingru"}, {})):
        Trainer(dataclasses.replace(SMALL, run_dir=tmp_path / str(i), **changes), progress=False).env.close()
    assert asked == [True, False, False, False]


def vanishing(trainer):
    (rule,) = (rule for rule in RULES if rule.name == "memory's gradient vanishes")
    return rule.check(trainer.logger.health.history, trainer.logger.health.traits)


LONG = {"total_timesteps": 64 * 40, "memory": "lstm", "segment_length": 16, "record_ratios": 10, "target_return": None}


def test_a_memory_without_anything_to_remember_is_found(tmp_path):
    trainer = train(tmp_path / "run", OneStep, **LONG)
    found = vanishing(trainer)
    assert found is not None
    assert "0.0e+00 of the gradient" in found.evidence
    assert "memory's gradient vanishes" in [record.first.name for record in trainer.logger.health.records]
    assert "memory's gradient vanishes" in [record.first.name for record in read_run(tmp_path / "run").findings]


def test_a_memory_that_saturates_is_found(tmp_path):
    """Steps ten thousand times too large drive the gates to where they pass no gradient."""
    trainer = train(tmp_path / "run", **LONG | {"learning_rate": 3.0, "anneal_lr": False})
    found = vanishing(trainer)
    assert found is not None
    assert trainer.update.parameters.vector.isfinite().all()


@pytest.mark.parametrize("memory", ["lstm", "gru"])
def test_a_healthy_memory_is_silent(tmp_path, memory):
    trainer = train(tmp_path / "run", **LONG | {"memory": memory})
    assert np.isfinite(trainer.logger.health.history["memory/gradient_share"]).sum() >= 2
    assert vanishing(trainer) is None


def test_the_page_has_figures_of_masks_and_memory_only_for_runs_with_them(runs, tmp_path):
    figures = ('id="masked_actions"', 'id="gradient_share"', 'id="state_norm"')
    for names, expected in (
        (["doors"], [True, True, True]),
        (["doors-plain"], [True, False, False]),
        (["cartpole"], [False, False, False]),
        (["cartpole", "doors"], [True, True, True]),
    ):
        report([runs / name for name in names], tmp_path / "report.html")
        page = (tmp_path / "report.html").read_text()
        assert [figure in page for figure in figures] == expected, names


def test_a_page_shows_the_settings_of_memory(runs, tmp_path):
    report([runs / "doors"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for name, value in (("memory", "lstm"), ("segment_length", "8"), ("memory_size", "64"), ("obs_keys", "none")):
        assert f"<td>{name}</td><td>{value}</td>" in page.replace("\n", ""), name


def test_runs_with_and_without_memory_are_compared(runs):
    found = difference(*read_runs([runs / "doors", runs / "doors-plain"], max_rows=None))
    assert ("memory", "lstm", "none") in found.settings
    assert ("segment_length", "8", "none") in found.settings
    assert found.numbers.startswith("figures differ from iteration 1 on")


@pytest.mark.parametrize("changes", [{}, MEMORY], ids=["plain", "memory"])
@pytest.mark.parametrize("vectorization", ["sync", "pool"])
def test_bench_steps_masked_environments_with_allowed_actions(tmp_path, changes, vectorization):
    # 30 steps end within an episode, so the rollout's own actions don't fit the steps after it
    settings = {"n_steps": 30, "total_timesteps": 60, "vectorization": vectorization, **changes}
    settings |= {"segment_length": 10} if changes else {}
    trainer = Trainer(
        dataclasses.replace(SMALL, env_id="tests/Doors-v0", run_dir=tmp_path / "run", **settings), progress=False
    )
    for _ in trainer.iterations():
        speeds = ceilings(trainer, 0.05)
        break
    assert speeds.keys() == {"act", "update", "env"}
    assert all(speed > 0 for speed in speeds.values())


@pytest.mark.parametrize(("changes", "named"), [({}, False), (MEMORY, True)], ids=["plain", "memory"])
def test_the_page_of_bench_names_the_memory(tmp_path, changes, named):
    shares = {"env": 0.3, "act": 0.2, "update": 0.4, "store": 0.02, "advantages": 0.02, "log": 0.02}
    config = dataclasses.replace(SMALL, **changes).to_dict()
    point = Point(2, "sync", sps=1e3, sps_low=9e2, sps_high=1.1e3, phases=shares, config=config)
    page = write_files(tmp_path, "Doors", [point], system_info(torch.device("cpu"))).read_text()
    assert ("memory lstm, memory_size 64, segment_length 8" in page) is named


def test_a_study_plans_runs_with_memory_and_observations_of_several_arrays(tmp_path):
    base = dataclasses.replace(SMALL, env_id="tests/Doors-v0", target_return=4.0, n_envs=None, **MEMORY)
    plan = plan_study(base, [2, 4], 1, "batch", tmp_path)
    assert [(c.n_envs, c.n_steps) for c in plan.configs] == [(2, 64), (4, 32)]
