"""Complete runs: the files they write, reproducibility, and how they end."""

import json
import math
import os
import re
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from fastppo import Config, Trainer, evaluate, load_policy, resume
from fastppo.errors import CheckpointError, ConfigError, EnvError, FastPPOError
from fastppo.evaluation.episodes import EpisodePlayer
from fastppo.functional.losses import PPOLoss
from fastppo.runtime import compile as compiling
from tests import PATIENCE
from tests.envs.worlds import Counter
from tests.worlds import Spaces, short

TIMES = ("time/", "charts/SPS", "charts/sps", "seconds")


def rows_of(run_dir):
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def timeless(rows):
    return [{k: v for k, v in row.items() if not k.startswith(TIMES)} for row in rows]


def test_a_run_writes_config_metrics_result_and_events(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", total_timesteps=400)
    trainer = Trainer(config)
    result = trainer.run()
    run = tmp_path / "run"
    stored = json.loads((run / "config.json").read_text())
    assert Config.from_dict(stored) == trainer.config
    about = json.loads((run / "run.json").read_text())
    assert {"torch", "gymnasium", "numpy", "python", "fastppo"} <= about["versions"].keys()
    assert about["device"] == "cpu"
    ended = json.loads((run / "result.json").read_text())
    assert ended["global_step"] == result.global_step == 400
    rows = rows_of(run)
    assert [row["global_step"] for row in rows] == list(range(16, 401, 16))
    events = EventAccumulator(str(run))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {f"losses/{name}" for name in PPOLoss.diagnostics} <= tags
    assert {"charts/SPS", "charts/sps_window", "charts/sps_steady", "charts/learning_rate", "charts/clip_coef"} <= tags
    assert {"charts/episodic_return", "charts/episodic_length", "losses/explained_variance"} <= tags
    assert {"losses/grad_norm", "losses/epochs_run"} <= tags
    assert {"time/rollout", "time/env", "time/act", "time/advantages", "time/update"} <= tags
    assert "config/text_summary" in events.Tags()["tensors"] or "config" in events.Tags()["tensors"]
    points = events.Scalars("losses/value_loss")
    assert [p.step for p in points] == [row["global_step"] for row in rows]
    assert [p.value for p in points] == pytest.approx([row["losses/value_loss"] for row in rows])
    rates = [p.value for p in events.Scalars("charts/learning_rate")]
    assert rates == pytest.approx([2.5e-4 * (1 - i / 25) for i in range(25)])


@pytest.mark.parametrize("vectorization", ["sync", "async", "native"])
def test_equal_seeds_give_bit_identical_runs_and_sync_matches_async(tmp_path, vectorization):
    seen = []
    for name, how in (("a", vectorization), ("b", "sync" if vectorization == "async" else vectorization)):
        changes = {"vectorization": how, "run_dir": tmp_path / name, "total_timesteps": 256, "normalize_obs": True}
        Trainer(short(tmp_path, **changes)).run()
        seen.append((load_file(tmp_path / name / "model.safetensors"), timeless(rows_of(tmp_path / name))))
    (weights, rows), (others, other_rows) = seen
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[k], others[k]) for k in weights)
    assert rows == other_rows


def test_different_seeds_give_different_weights(tmp_path):
    runs = [tmp_path / str(seed) for seed in (1, 2)]
    for seed, run in enumerate(runs, 1):
        Trainer(short(tmp_path, seed=seed, run_dir=run)).run()
    a, b = (load_file(run / "model.safetensors") for run in runs)
    assert not torch.equal(a["policy.network.critic.weight"], b["policy.network.critic.weight"])


def test_a_run_does_not_change_the_global_random_state(tmp_path):
    torch.manual_seed(5)
    np.random.seed(5)
    expected = torch.rand(1, generator=torch.Generator().manual_seed(5))
    state = np.random.get_state()[1].copy()
    Trainer(short(tmp_path)).run()
    assert torch.equal(torch.rand(1), expected)
    assert np.array_equal(np.random.get_state()[1], state)


@pytest.mark.parametrize("compiled", ["off", "fused"])
def test_the_first_ratio_of_every_update_is_1_with_normalised_observations(tmp_path, compiled):
    trainer = Trainer(short(tmp_path, env_id="Pendulum-v1", n_steps=64, total_timesteps=640, compile=compiled))
    run_epochs, worst = trainer.update.run_epochs, []

    def watch(*arguments, **options):
        batch = trainer.collect.rollout.batch()
        with torch.no_grad():
            logprobs = trainer.policy.evaluate_actions(trainer.policy(batch.obs), batch.actions, batch.params).logprobs
        worst.append((logprobs - batch.logprobs).abs().max().item())
        run_epochs(*arguments, **options)

    trainer.update.run_epochs = watch
    for _ in trainer.iterations():
        pass
    assert len(worst) == 5
    assert max(worst) < 2e-6
    assert trainer.policy.encoder.normalizer.count == 640


def test_iterations_yield_stats_and_a_break_saves_the_model(tmp_path):
    trainer = Trainer(short(tmp_path))
    for stats in trainer.iterations():
        assert stats.scalars["losses/epochs_run"] == 2
        assert stats.n_iterations == 3
        if stats.iteration == 2:
            break
    assert (trainer.result.ended, trainer.result.iterations) == ("interrupted", 2)
    assert (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(RuntimeError, match="has run already"):
        trainer.run()


def test_a_second_loop_beside_the_first_is_refused_and_leaves_it_unharmed(tmp_path):
    trainer = Trainer(short(tmp_path))
    first = trainer.iterations()
    next(first)
    for again in (lambda: next(trainer.iterations()), trainer.run):
        with pytest.raises(FastPPOError, match="has begun already"):
            again()
    assert [stats.iteration for stats in first] == [2, 3]
    assert trainer.result.ended == "finished"


def test_run_time_excludes_the_callers_work_between_iterations(tmp_path, monkeypatch):
    worked, now = [0.0], time.perf_counter
    monkeypatch.setattr(time, "perf_counter", lambda: now() + worked[0])
    trainer = Trainer(short(tmp_path))
    for _ in trainer.iterations():
        worked[0] += 1e6
    assert trainer.result.seconds < 1e5


def test_evaluations_count_in_the_wall_time_and_in_no_rate_also_after_a_resume(tmp_path, monkeypatch):
    played, now, play = [0], time.perf_counter, EpisodePlayer.__call__

    def play_slowly(player, episodes):
        played[0] += 1
        return play(player, episodes)

    monkeypatch.setattr(EpisodePlayer, "__call__", play_slowly)
    monkeypatch.setattr(time, "perf_counter", lambda: now() + 1e6 * played[0])
    config = short(tmp_path, eval_every=2 * 16, eval_episodes=1)  # after the second of three iterations
    trainer = Trainer(config)
    paused = [stats.paused_seconds for stats in trainer.iterations()]
    result = trainer.result
    assert [round(seconds / 1e6) for seconds in paused] == [0, 1, 1]
    assert result.phases["evaluation"] == pytest.approx(1e6, rel=0.01)
    assert result.phases["video"] == 0
    assert result.seconds < 1e5
    assert sum(result.phases.values()) + result.setup_seconds <= result.wall_seconds < 2e6
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    for tag in ("time/evaluation", "eval/return_mean"):
        assert [tag in row for row in rows] == [False, True, False]
    assert rows[1]["time/evaluation"] == pytest.approx(1e6, rel=0.01)
    played[0] = 0
    again = resume(tmp_path / "run", total_timesteps=4 * 16)
    (paused,) = [stats.paused_seconds for stats in again.iterations()]
    assert round(paused / 1e6) == 2
    assert again.result.wall_seconds < 2e6


def test_episode_stats_use_raw_rewards_and_span_rollouts(tmp_path):
    # episodes of 5 steps, each worth 1.1 + ... + 1.5 = 6.5, in rollouts of 8
    trainer = Trainer(short(tmp_path, sign_rewards=True), make_env=Counter)
    result = trainer.run()
    assert result.mean_return == pytest.approx(6.5, abs=1e-6)
    assert (result.mean_length, result.episodes) == (5, 2 * (24 // 5))


def test_filler_rows_do_not_count_in_steps_or_episodes(tmp_path):
    def make():
        return SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)

    trainer = Trainer(short(tmp_path, n_envs=None), make_env=make)
    assert trainer.config.n_envs == 2
    result = trainer.run()
    # 24 rows per environment: 5 steps, then one row for the reset
    assert result.global_step == 2 * 20
    assert result.mean_return == pytest.approx(6.5, abs=1e-6)
    assert result.mean_length == 5


def test_filler_rows_do_not_count_in_the_moments_of_observations(tmp_path):
    def make():
        return SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)

    trainer = Trainer(short(tmp_path, n_envs=None, normalize_obs=True), make_env=make)
    normalizer = trainer.policy.encoder.normalizer
    start = normalizer.count.item()
    result = trainer.run()
    assert normalizer.count.item() - start == result.global_step == 2 * 20


def test_the_target_return_ends_a_run_only_after_100_episodes(tmp_path):
    config = short(tmp_path, total_timesteps=16 * 200, target_return=6.4)
    trainer = Trainer(config, make_env=Counter)
    result = trainer.run()
    assert result.ended == "target"
    assert 100 <= result.episodes <= 110
    assert json.loads((tmp_path / "run" / "result.json").read_text())["ended"] == "target"


def test_a_time_limit_bootstraps_and_a_termination_does_not(tmp_path):
    """The only state pays 1 per step, and episodes last 5 steps. A time limit gives V = 1 / (1 - 0.9) = 10. A
    termination gives the mean over the 5 steps of an episode: sum over k = 1..5 of (1 - 0.9^k) / (1 - 0.9) / 5 = 2.63.
    """

    class Endless(gym.Env):
        observation_space = spaces.Box(-1, 1, (1,), np.float32)
        action_space = spaces.Discrete(2)
        really = False

        def reset(self, *, seed=None, options=None):
            self.steps = 0
            return np.ones(1, np.float32), {}

        def step(self, action):
            self.steps += 1
            over = self.steps == 5
            return np.ones(1, np.float32), 1.0, over and self.really, over and not self.really, {}

    values = {}
    for really in (False, True):
        Endless.really = really
        changes = {"n_envs": 4, "n_steps": 32, "total_timesteps": 128 * 80, "gamma": 0.9, "gae_lambda": 0.95}
        changes |= {"learning_rate": 1e-2, "value_clip": "off", "update_epochs": 8, "run_dir": tmp_path / str(really)}
        trainer = Trainer(short(tmp_path, **changes), make_env=Endless)
        trainer.run()
        values[really] = trainer.policy.value(torch.ones(1, 1)).item()
    assert values[False] == pytest.approx(10, abs=0.5)
    assert values[True] == pytest.approx(2.63, abs=0.5)


class Own(nn.Module):
    def __init__(self, width=3, outputs=2):
        super().__init__()
        self.body, self.actor, self.critic = nn.Linear(width, 8), nn.Linear(8, outputs), nn.Linear(8, 1)

    def forward(self, x):
        x = torch.relu(self.body(x.flatten(1)))
        return self.actor(x), self.critic(x).squeeze(-1)


def test_a_custom_environment_and_network_train_load_and_fine_tune(tmp_path):
    def make():
        return Spaces(spaces.Box(-1, 1, (3,), np.float32), spaces.Box(-1, 1, (2,), np.float32))

    network = Own(3, 4)
    Trainer(short(tmp_path, normalize_rewards=True), make_env=make, policy=network).run()
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="pass it as policy="):
        load_policy(run)
    loaded = load_policy(run, policy=Own(3, 4))
    obs = np.random.default_rng(0).uniform(-1, 1, (5, 3)).astype(np.float32)
    assert loaded.predict(obs)[0].shape == (5, 2)
    assert np.allclose(loaded.predict(obs)[0][2], loaded.predict(obs[2])[0], atol=1e-6)  # a batch rounds otherwise
    assert np.abs(loaded.predict(100 * obs, deterministic=False)[0]).max() <= 1
    assert len(evaluate(run, 3, make_env=make, policy=Own(3, 4)).returns) == 3
    config = short(tmp_path, init_from=run, run_dir=tmp_path / "second", normalize_rewards=True, learning_rate=0.0)
    second = Trainer(config, make_env=make, policy=Own(3, 4))
    second.run()
    first = load_file(run / "model.safetensors")
    again = load_file(tmp_path / "second" / "model.safetensors")
    assert torch.equal(first["policy.network.body.weight"], again["policy.network.body.weight"])
    assert again["rewards.count"] == 2 * first["rewards.count"] > 0
    with pytest.raises(CheckpointError, match="network custom there, mlp here"):
        Trainer(short(tmp_path, init_from=run, run_dir=tmp_path / "third"), make_env=make)


def test_predict_rejects_the_wrong_observation_shape(tmp_path):
    Trainer(short(tmp_path)).run()
    with pytest.raises(ValueError, match=r"shape \(2, 3\); this policy takes \(4,\)"):
        load_policy(tmp_path / "run").predict(np.zeros((2, 3)))


def test_evaluation_runs_complete_episodes_and_is_repeatable(tmp_path):
    Trainer(short(tmp_path)).run()
    a, b = (evaluate(tmp_path / "run", 11, deterministic=False, seed=3) for _ in range(2))
    assert len(a.returns) == 11
    assert a == b
    assert a.returns == a.lengths, "CartPole pays 1 per step"
    assert evaluate(tmp_path / "run", 11, seed=4) != a


def test_evaluation_truncates_an_endless_episode(tmp_path):
    """A deterministic policy may stand still for ever, and training would wait for its evaluation."""

    class Endless(Counter):
        def step(self, action):
            obs, reward, _, _, info = super().step(action)
            return obs, reward, False, False, info

    trainer = Trainer(short(tmp_path, eval_every=16, eval_episodes=11, eval_max_steps=50), make_env=Endless)
    rows = [stats.scalars for stats in trainer.iterations()]
    assert {row["eval/length_mean"] for row in rows} == {50}
    assert [row["charts/reward_per_step"] for row in rows] == pytest.approx([1.45, 2.25, 3.05]), "no episode ends"
    played = evaluate(tmp_path / "run", 11, make_env=Endless)
    assert evaluate(tmp_path / "run", 3, make_env=Endless, max_steps=7).lengths == [7] * 3
    assert played.lengths == [50] * 8, "the second episodes of three environments are dropped"
    assert played.remark == "; 8 of 8 episodes were cut after 50 steps"


@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Box(-1, 1, (2, 3), np.float64),
        spaces.Box(0, 255, (36, 40, 3), np.uint8),
        spaces.Box(0, 255, (9, 9), np.uint8),
        spaces.Discrete(5, start=7),
        spaces.Box(-1, 1, (), np.float32),
        spaces.MultiDiscrete([2, 3]),
        spaces.MultiBinary(4),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(3, start=2),
        spaces.MultiDiscrete([2, 4]),
        spaces.MultiBinary((2, 2)),
        spaces.Box(-1, 1, (2, 2), np.float32),
        spaces.Box(-np.inf, np.inf, (1,), np.float64),
    ],
    ids=str,
)
def test_every_pair_of_spaces_trains(tmp_path, observation_space, action_space):
    trainer = Trainer(short(tmp_path), make_env=lambda: Spaces(observation_space, action_space))
    result = trainer.run()
    assert trainer.rollout.obs.dtype == trainer.env.obs_spec.dtype
    losses = [row[f"losses/{name}"] for row in rows_of(result.run_dir) for name in PPOLoss.diagnostics]
    assert len(losses) == 3 * len(PPOLoss.diagnostics)
    assert all(math.isfinite(loss) for loss in losses)
    assert ("charts/clipped_actions" in rows_of(result.run_dir)[0]) is isinstance(action_space, spaces.Box)
    obs = np.asarray(observation_space.sample())
    action, _ = load_policy(result.run_dir).predict(obs)
    assert action_space.contains(action if action_space.shape else action[()])


def test_clipped_actions_is_the_share_of_components_outside_the_box(tmp_path):
    trainer = Trainer(short(tmp_path, n_steps=256, total_timesteps=512), make_env=lambda: Spaces(
        spaces.Box(-1, 1, (3,), np.float32), spaces.Box(np.float32([0, -9]), np.float32([np.inf, 9]))
    ))  # fmt: skip
    trainer.run()
    # a standard normal is below 0 half the time and never beyond 9: half of one of the two components
    row = rows_of(tmp_path / "run")[0]
    assert row["charts/clipped_actions"] == pytest.approx(0.25, abs=0.04)
    # the first component has no range; the mean of |a| is 0.8 of the second's 9
    assert row["charts/action_range"] == pytest.approx(0.8 / 9, abs=0.01)


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_an_update_stops_at_the_target_kl_times_its_factor(tmp_path, kl_stop):
    ends = {}
    for target_kl, factor in ((4e-4, 1.0), (2e-4, 2.0), (2e-4, 1.0)):
        run_dir, changes = tmp_path / f"{target_kl}-{factor}", {"target_kl": target_kl, "kl_stop_factor": factor}
        trainer = Trainer(
            short(tmp_path, run_dir=run_dir, **changes, kl_stop=kl_stop, learning_rate=1e-3, update_epochs=8)
        )
        trainer.run()
        ends[target_kl, factor] = trainer.update.parameters.vector
    assert ends[4e-4, 1.0].equal(ends[2e-4, 2.0])
    assert not ends[4e-4, 1.0].equal(ends[2e-4, 1.0])


def test_schedules_set_the_coefficients_of_every_update(tmp_path):
    changes = {"learning_rate": "cosine:1e-3:0", "clip_coef": 0.3, "anneal_clip": True, "ent_coef": "linear:0.1:0.0"}
    trainer = Trainer(short(tmp_path, **changes, gamma="linear:0.9:0.99", target_kl="linear:0.5:0.1"))
    seen = []
    for _ in trainer.iterations():
        c = trainer.learner.coefs
        seen.append([x.item() for x in (c.learning_rate, c.clip_coef, c.ent_coef, c.gamma, c.value_clip_coef)])
        assert trainer.learner.coef_values["target_kl"] == pytest.approx(0.5 - 0.4 * (len(seen) - 1) / 3)
    assert seen[0] == pytest.approx([1e-3, 0.3, 0.1, 0.9, 0.3])
    assert seen[1] == pytest.approx([0.75e-3, 0.2, 0.1 * 2 / 3, 0.93, 0.2])


def test_an_environment_error_saves_the_model(tmp_path):
    class Breaks(Counter):
        def step(self, action):
            if self.episode == 3:
                raise RuntimeError("the simulator is gone")
            return super().step(action)

    trainer = Trainer(short(tmp_path, total_timesteps=1600), make_env=Breaks)
    with pytest.raises(EnvError, match="environment 0 .* failed in step 16: RuntimeError: the simulator is gone"):
        trainer.run()
    assert trainer.result.iterations == 1
    assert load_policy(tmp_path / "run").predict(np.zeros(2, np.float32))[0] in (0, 1)


def test_atari_trains_and_reports_raw_returns(tmp_path):
    # long enough to finish the first game
    changes = {"n_envs": 2, "n_steps": 512, "total_timesteps": 2048, "update_epochs": 1, "n_minibatches": 8}
    trainer = Trainer(Config(env_id="ALE/Pong-v5", run_dir=tmp_path / "run", **changes))
    assert trainer.config.sign_rewards
    assert trainer.rollout.obs.shape == (513, 2, 4, 84, 84)
    assert trainer.rollout.obs.dtype == torch.uint8
    result = trainer.run()
    assert result.global_step == 2048
    assert result.episodes >= 1
    assert -21 <= result.mean_return <= -14
    assert all(math.isfinite(row["losses/value_loss"]) for row in rows_of(tmp_path / "run"))


@pytest.mark.parametrize("sign", [True, False])
def test_sign_rewards_changes_advantages_and_keeps_stored_rewards_raw(tmp_path, sign):
    trainer = Trainer(short(tmp_path, gamma=0.0, sign_rewards=sign), make_env=Counter)
    r = trainer.rollout
    r.rewards.copy_(torch.tensor([[5.0], [-7.0]]).repeat(4, 2))
    raw = r.rewards.clone()
    trainer.learner.anneal(0.0)
    trainer.learner.compute_advantages()
    assert torch.equal(r.advantages, raw.sign() if sign else raw)
    assert torch.equal(r.rewards, raw)
    trainer.request_stop()
    assert trainer.run().iterations == 0


@pytest.mark.parametrize(
    ("what", "message"),
    [("reward", "environment 1 returned a reward of nan at step 12"), ("obs", "environment 1 returned an observation")],
)
def test_a_nan_from_the_environment_stops_the_run_and_saves_finite_weights(tmp_path, what, message):
    class Sick(Counter):
        made = 0

        def __init__(self):
            super().__init__()
            Sick.made += 1
            self.index = Sick.made

        def step(self, action):
            obs, reward, *rest = super().step(action)
            self.total = getattr(self, "total", 0) + 1
            if self.total == 12 and self.index == 5:  # the first three instances are probes
                return (obs * np.nan, reward, *rest) if what == "obs" else (obs, np.nan, *rest)
            return obs, reward, *rest

    trainer = Trainer(short(tmp_path, normalize_obs=True, normalize_rewards=True, total_timesteps=160), make_env=Sick)
    with pytest.raises(EnvError, match=message):
        trainer.run()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert all(x.isfinite().all() for x in saved.values())
    assert trainer.progress.iteration == 1


def test_a_dead_worker_stops_the_run_and_the_model_is_saved(tmp_path):
    class Dies(Counter):
        def step(self, action):
            if self.episode == 3:
                os._exit(1)
            return super().step(action)

    trainer = Trainer(short(tmp_path, total_timesteps=1600, vectorization="async"), make_env=Dies)
    with pytest.raises(EnvError, match=r"worker process of environment [01] \(exit code 1\)"):
        trainer.run()
    assert load_policy(tmp_path / "run").predict(np.zeros(2, np.float32))[0] in (0, 1)
    assert json.loads((tmp_path / "run" / "result.json").read_text())["iterations"] == 1


def test_a_stored_config_runs_again_with_a_custom_network(tmp_path):
    network = Own(2)
    trainer = Trainer(short(tmp_path), make_env=Counter, policy=network)
    trainer.run()
    stored = json.loads((tmp_path / "run" / "config.json").read_text()) | {"run_dir": str(tmp_path / "again")}
    again = Trainer(Config.from_dict(stored), make_env=Counter, policy=Own(2))
    assert again.config.to_dict() == trainer.config.to_dict() | {"run_dir": str(tmp_path / "again")}
    again.run()


def test_evaluate_requires_make_env_for_a_custom_environment(tmp_path):
    make = lambda: Spaces(spaces.Box(-1, 1, (4,), np.float32), spaces.Discrete(2))  # noqa: E731
    Trainer(short(tmp_path), make_env=make).run()
    with pytest.raises(ConfigError, match=r"trained on Spaces from make_env; call resume or evaluate with make_env="):
        evaluate(tmp_path / "run")
    assert len(evaluate(tmp_path / "run", 2, make_env=make).returns) == 2


def test_half_cheetah_trains_with_normalisers(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # MuJoCo writes its warnings into the working directory
    config = Config(env_id="HalfCheetah-v5", n_envs=2, n_steps=64, total_timesteps=256, run_dir=tmp_path / "run")
    trainer = Trainer(config)
    c = trainer.config
    assert (c.normalize_obs, c.normalize_rewards, c.n_minibatches, c.update_epochs) == (True, True, 32, 10)
    assert trainer.rollout.obs.shape == (65, 2, 17)
    assert trainer.rollout.obs.dtype == torch.float32
    assert any("float64" in note for note in trainer.env.notes)
    trainer.run()
    assert all(math.isfinite(row["losses/value_loss"]) for row in rows_of(tmp_path / "run"))
    assert trainer.reward_normalizer.count == 256


def test_ctrl_c_stops_after_the_iteration_and_saves_the_model(tmp_path):
    command = [sys.executable, "-m", "fastppo", "train", "--total-timesteps", "10000000", "--compile", "off"]
    command += ["--vectorization", "async", "--n-envs", "2", "--run-dir", str(tmp_path / "run")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)
    while not (tmp_path / "run" / "metrics.jsonl").exists() or not rows_of(tmp_path / "run"):
        assert process.poll() is None, process.stdout.read()
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # like a terminal: the workers get the signal too
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 130, output
    assert "interrupted; everything is saved" in output
    assert "Traceback" not in output
    assert load_policy(tmp_path / "run").predict(np.zeros(4, np.float32))[0] in (0, 1)


@pytest.mark.parametrize("where", ["closed pipe", "full disk"])
def test_training_continues_when_its_output_cannot_be_written(tmp_path, where):
    command = f"{sys.executable} -m fastppo train --total-timesteps 1100 --run-dir {tmp_path / 'run'}"
    command += " | true" if where == "closed pipe" else " > /dev/full"
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command], stderr=subprocess.PIPE, text=True, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads((tmp_path / "run" / "result.json").read_text())["ended"] == "finished"


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda run: (run / "model.json").unlink(), "holds no saved model"),
        (lambda run: (run / "model.json").write_text("{"), "can't be understood"),
        (lambda run: (run / "model.json").write_text("[]"), "can't be understood"),
        (lambda run: replace(run / "model.json", '"tanh"', '"tan"'), "can't be understood"),
        (lambda run: replace(run / "model.json", '"discrete"', '"secret"'), "doesn't fit this policy"),
        (lambda run: replace(run / "model.json", '"format": 1', '"format": 9'), "this version reads format 1"),
        (lambda run: replace(run / "model.json", "64", "32"), r"\(4, 64\)|\(2, 64\)"),
        (lambda run: (run / "model.safetensors").write_bytes(b"x" * 50), "can't be read"),
        (lambda run: (run / "model.safetensors").unlink(), "holds no saved model"),
        (lambda run: (run / "config.json").unlink(), "can't be read"),
        (lambda run: (run / "config.json").write_text("[1]"), "can't be understood"),
    ],
)
def test_a_damaged_run_folder_is_rejected_with_a_one_line_error(tmp_path, damage, message):
    Trainer(short(tmp_path)).run()
    damage(tmp_path / "run")
    with pytest.raises(CheckpointError, match=message) as error:
        evaluate(tmp_path / "run", 1)
    assert "\n" not in str(error.value)


def replace(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_the_trainer_rejects_a_config_or_make_env_of_the_wrong_type(tmp_path):
    with pytest.raises(ConfigError, match="takes a Config, not a str"):
        Trainer("CartPole-v1")
    with pytest.raises(ConfigError, match="must be a function that makes an environment"):
        Trainer(short(tmp_path), make_env=Counter())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"activation": "relu"}, "activation tanh there, relu here"),
        ({"hidden_sizes": (32, 32)}, r"hidden_sizes \(64, 64\) there, \(32, 32\) here"),
        ({"normalize_obs": True}, "normalize_obs False there, True here"),
        ({"env_id": "Acrobot-v1"}, r"trained on CartPole-v1\) holds another policy: observations vector \(4,\) there"),
    ],
)
def test_init_from_rejects_a_different_policy(tmp_path, changes, message):
    Trainer(short(tmp_path)).run()
    with pytest.raises(CheckpointError, match=message):
        Trainer(short(tmp_path, init_from=tmp_path / "run", run_dir=tmp_path / "second", **changes))
    assert not (tmp_path / "second").exists()


def test_a_compiled_run_with_schedules_never_recompiles(tmp_path):
    annealed = {"learning_rate": "linear:1e-3:0", "clip_coef": "cosine:0.2:0.05", "ent_coef": "linear:0.01:0"}
    trainer = Trainer(short(tmp_path, total_timesteps=160, compile="on", target_kl=0.01, **annealed), make_env=Counter)
    before = compiling.compilations
    result = trainer.run()
    assert result.iterations == 10
    assert compiling.compilations == before
    assert result.compilations == 2, "one for the minibatch, one for the advantages"
    ended = json.loads((trainer.run_dir / "result.json").read_text())
    assert ended["compilations"] == 2
    assert ended["compile_seconds"] > 0
    assert ended["sps_total"] < ended["sps_steady"], "only the total includes compile time"


@pytest.mark.filterwarnings("ignore:.*Box (low|high)'s precision")  # EnvPool's own spaces
def test_envpool_trains_without_its_reset_rows(tmp_path):
    pytest.importorskip("envpool")
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", n_steps=64, vectorization="envpool", total_timesteps=512))
    result = trainer.run()
    assert trainer.rollout.valid is not None
    assert result.episodes > 5
    assert result.global_step == 512 - result.episodes or result.global_step < 512
    assert 8 < result.mean_return < 60, "the range of a random CartPole policy"


def test_vectorization_auto_measures_and_reports_its_choice(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", n_envs=64, vectorization="auto", n_steps=2))
    assert trainer.config.vectorization == "native"
    assert re.match(r"vectorization native: env steps/s .* sync [\d,]+, native [\d,]+", trainer.notes[0])
    trainer.run()


@pytest.mark.parametrize(
    ("env_id", "compile", "precision", "bound"),
    [
        ("CartPole-v1", "off", "fp32", 1e-8),
        ("Pendulum-v1", "off", "fp32", 1e-8),
        ("Pendulum-v1", "off", "bf16", 1e-6),
        ("CartPole-v1", "on", "bf16", 1e-6),  # in float32: with memory, in test_memory.py
    ],
)
def test_the_ratio_stays_1_at_zero_learning_rate(tmp_path, precision, bound, compile, env_id):
    settings = {"precision": precision, "compile": compile, "learning_rate": 0.0, "hidden_sizes": (32, 32)}
    trainer = Trainer(short(tmp_path, env_id=env_id, n_envs=16, **settings), policy=None)
    for stats in trainer.iterations():
        assert abs(stats.scalars["losses/approx_kl"]) < bound
        assert stats.scalars["losses/clipfrac"] == 0
    assert trainer.update.parameters.vector.dtype == trainer.rollout.logprobs.dtype == torch.float32


def test_bf16_and_fp32_move_parameters_in_the_same_direction(tmp_path):
    vectors = {}
    for precision in ("fp32", "bf16"):
        config = short(tmp_path, run_dir=tmp_path / precision, precision=precision, compile="off", learning_rate=1e-3)
        trainer = Trainer(config, make_env=Counter)
        start = trainer.update.parameters.vector.clone()
        trainer.run()
        vectors[precision] = trainer.update.parameters.vector - start
    assert not torch.equal(vectors["bf16"], vectors["fp32"]), "nothing ran in bfloat16"
    assert torch.nn.functional.cosine_similarity(vectors["bf16"], vectors["fp32"], 0) > 0.9
