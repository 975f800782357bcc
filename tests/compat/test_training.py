"""Training, callbacks, schedules, normalisation, masks and memory through the classes of fastppo.compat."""

import json
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import ConfigError
from fastppo.compat import PPO, PPO1, PPO2, MaskablePPO, RecurrentPPO, make_vec_env
from fastppo.compat.envs import VecEnv
from tests.compat.test_keywords import FAST, Choosing

SMALL = FAST | {"n_steps": 32, "batch_size": 16, "n_epochs": 2, "seed": 3}


def weights(model):
    return {name: x.clone() for name, x in model.policy.state_dict().items()}


def equal(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


class Recorder:
    """A callback with the methods of stable-baselines3's, that notes its calls."""

    def __init__(self, stop_at=None):
        self.calls, self.steps, self.stop_at = [], [], stop_at

    def init_callback(self, model):
        self.model = model

    def on_training_start(self, locals_, globals_):
        assert locals_["self"] is self.model
        assert locals_["total_timesteps"] > self.model.num_timesteps
        self.calls.append("start")

    def on_rollout_start(self):
        self.calls.append("rollout start")

    def on_step(self):
        self.steps.append(self.model.num_timesteps)
        return self.model.num_timesteps != self.stop_at

    def on_rollout_end(self):
        self.calls.append("rollout end")

    def on_training_end(self):
        self.calls.append("end")


def test_steps_are_rounded_up_and_learn_returns_the_model():
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    before = weights(model)
    assert model.learn(70) is model
    assert model.num_timesteps == model.result.global_step == 96
    assert not equal(before, weights(model))


def test_a_seed_repeats_a_training_of_the_scripts_own_environment():
    first, again, other = (
        PPO("MlpPolicy", gym.make("CartPole-v1"), **SMALL | {"seed": seed}).learn(64) for seed in (3, 3, 4)
    )
    assert equal(weights(first), weights(again))
    assert not equal(weights(first), weights(other))


def test_training_equals_that_of_a_trainer_with_the_same_settings():
    """The layer adds nothing: the same config, trained by Trainer, gives the same weights bit for bit."""
    from fastppo import Trainer

    model = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    start = weights(model)
    model.learn(96)
    trainer = Trainer(model.config.__class__(**model.config.to_dict() | {"total_timesteps": 96}), progress=False)
    assert equal(start, {name: x.clone() for name, x in trainer.policy.state_dict().items()})
    trainer.run()
    assert equal(weights(model), dict(trainer.policy.state_dict()))


def test_callbacks_are_called_for_every_step_and_stop_the_training():
    recorder = Recorder()
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL | {"n_steps": 16}).learn(64, recorder)
    assert recorder.steps == list(range(2, 65, 2))
    assert recorder.calls == ["start", *["rollout start", "rollout end"] * 2, "end"]
    stopping = Recorder(stop_at=40)
    model.learn(96, [Recorder(), stopping])
    assert (model.num_timesteps, stopping.steps[-1], model.result.ended) == (64, 40, "interrupted")


def test_a_function_is_called_once_per_iteration():
    seen = []

    def callback(locals_, globals_):
        seen.append(locals_["self"].num_timesteps)
        return False if len(seen) == 2 else None

    model = PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(320, callback)
    assert (len(seen), model.num_timesteps) == (2, 64)
    with pytest.raises(ConfigError, match="callback is an int; give a function"):
        model.learn(32, 3)


def test_figures_of_callbacks_reach_the_log(tmp_path):
    class Logging(Recorder):
        def on_rollout_end(self):
            self.model.logger.record("custom/steps", self.model.num_timesteps)
            self.model.logger.record("custom/hidden", 1.0, exclude="tensorboard")
            self.model.logger.dump(self.model.num_timesteps)

    model = PPO("MlpPolicy", "CartPole-v1", **SMALL, tensorboard_log=tmp_path)
    for _ in range(2):
        model.learn(64, Logging(), tb_log_name="a")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a_1", "a_2"]
    lines = [json.loads(line) for line in (tmp_path / "a_1" / "metrics.jsonl").read_text().splitlines()]
    assert [line["custom/steps"] for line in lines if "custom/steps" in line] == [32.0, 64.0]
    assert not any("custom/hidden" in line for line in lines)
    with pytest.raises(ConfigError, match="fastppo logs numbers, not a str"):
        model.logger.record("custom/text", "many")


def test_without_a_folder_nothing_is_left_and_verbose_decides_what_is_printed(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(32)
    assert capsys.readouterr().out == ""
    assert not list(tmp_path.iterdir())
    assert not model.result.run_dir.exists()
    PPO("MlpPolicy", "CartPole-v1", **SMALL, verbose=1).learn(32)
    assert "32/32 steps" in capsys.readouterr().out


def rates(model, steps, **arguments):
    """The learning rate of each iteration, clip range and value clip."""
    seen = []

    class Reading(Recorder):
        def on_rollout_end(self):
            schedules = self.model.trainer.learner.coef_values
            seen.append((schedules["learning_rate"], schedules["clip_coef"], schedules["value_clip_coef"]))

    model.learn(steps, Reading(), **arguments)
    return seen


def test_functions_get_the_remaining_progress():
    """stable-baselines3 updates the progress after a rollout, PPO2 before it."""
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL, learning_rate=lambda left: 1e-3 * left, clip_range=lambda x: x)
    assert [a for a, *_ in rates(model, 128)] == pytest.approx([0.75e-3, 0.5e-3, 0.25e-3, 0.0])
    assert [b for _, b, _ in rates(model, 100)] == pytest.approx([0.68, 0.36, 0.04, 0.0])
    went_on = rates(model, 100, reset_num_timesteps=False)  # 128 steps of 228 are done
    assert [b for _, b, _ in went_on] == pytest.approx([1 - x / 228 for x in (160, 192, 224)] + [0.0])
    small = FAST | {"n_steps": 32, "noptepochs": 1}
    model = PPO2(
        "MlpPolicy", "CartPole-v1", **small, learning_rate=lambda left: 1e-3 * left, cliprange=lambda x: 0.2 * x
    )
    expected = [(1e-3 * x, 0.2 * x, 0.2 * x) for x in (1, 0.75, 0.5, 0.25)]
    assert np.allclose(rates(model, 128), expected), "value clipping follows cliprange"


def test_the_schedule_of_ppo1_moves_learning_rate_and_clip_range():
    small = FAST | {"timesteps_per_actorbatch": 32, "optim_batchsize": 16, "optim_epochs": 1}
    seen = rates(PPO1("MlpPolicy", "CartPole-v1", **small), 128)
    assert np.allclose([x[:2] for x in seen], [(1e-3 * x, 0.2 * x) for x in (1, 0.75, 0.5, 0.25)])
    seen = rates(PPO1("MlpPolicy", "CartPole-v1", **small, schedule="constant"), 64)
    assert np.allclose([x[:2] for x in seen], [(1e-3, 0.2)] * 2)


def test_training_goes_on_with_optimiser_and_normalisers():
    model = PPO("MlpPolicy", "Pendulum-v1", **SMALL, normalize_obs=True, normalize_rewards=True)
    model.learn(64)
    moments, state = model.policy.encoder.normalizer, model.trainer.update.state_dict()
    assert (float(moments.count), model.num_timesteps) == (64, 64)
    before = weights(model)
    model.learn(32, reset_num_timesteps=False)
    assert (float(model.policy.encoder.normalizer.count), model.num_timesteps) == (96, 96)
    after = model.trainer.update.state_dict()
    steps = [np.log(float(part["left1"])) / np.log(0.9) for part in (state, after)]
    assert steps == pytest.approx([8, 12]), "Adam's steps go on: 2 epochs of 2 minibatches"
    assert not equal(before, weights(model))
    model.learn(32)
    assert model.num_timesteps == 32


def test_masks_are_obeyed_in_training_and_predictions():
    model = MaskablePPO("MlpPolicy", Choosing(), **SMALL).learn(64)  # which asserts that no action is forbidden
    for masks, allowed in (([True, False, False], {0}), ([False, True, False], {1}), ([True, True, False], {0, 1})):
        taken = {int(model.predict(np.zeros(2), action_masks=masks)[0]) for _ in range(30)}
        assert taken <= allowed
    batch, _ = model.predict(np.zeros((2, 2)), action_masks=[[True, False, False], [False, False, True]])
    assert batch.tolist() == [0, 2]
    with pytest.raises(ConfigError, match="use_masking=False can't be honoured"):
        model.learn(32, use_masking=False)


def test_masks_from_a_vec_env_of_stable_baselines3():
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    model = MaskablePPO("MlpPolicy", vec_env.DummyVecEnv([Choosing, Choosing]), **SMALL)
    assert model.learn(64).num_timesteps == 64


def test_states_of_a_policy_with_memory():
    model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", **SMALL, policy_kwargs={"lstm_hidden_size": 8}).learn(64)
    obs = np.random.default_rng(0).normal(size=(3, 2, 4)).astype(np.float32)
    _, state = model.predict(obs[0], deterministic=True)
    assert all(isinstance(part, np.ndarray) and part.shape == (2, 8) for part in state)
    _, second = model.predict(obs[1], state, episode_start=[False, True])
    _, fresh = model.predict(obs[1])
    _, kept = model.predict(obs[1], state)
    for part, new, old in zip(second, fresh, kept, strict=True):
        assert np.array_equal(part[1], new[1])
        assert np.array_equal(part[0], old[0])
        assert not np.array_equal(part[0], new[0])
    assert PPO("MlpPolicy", "CartPole-v1", **SMALL).predict(obs[0])[1] is None


def test_set_env_changes_the_environments_and_refuses_other_spaces():
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    model.set_env(make_vec_env("CartPole-v1", 4))
    assert (model.n_envs, model.config.n_minibatches) == (4, 8)
    assert model.learn(128).num_timesteps == 128
    with pytest.raises(ConfigError, match="set_env: the policy is for another environment: observations"):
        model.set_env("Pendulum-v1")
    assert model.get_env().num_envs == 4
    with pytest.raises(ConfigError, match="force_reset=False can't be honoured"):
        model.set_env("CartPole-v1", force_reset=False)


def test_the_environments_stay_open_and_step_as_in_stable_baselines3():
    env = gym.make("CartPole-v1", max_episode_steps=3)
    model = PPO("MlpPolicy", env, **SMALL).learn(32)
    venv = model.get_env()
    venv.seed(5)
    obs = venv.reset()
    assert (obs.shape, obs.dtype, venv.num_envs) == ((1, 4), np.float32, 1)
    assert np.array_equal(obs[0], gym.make("CartPole-v1").reset(seed=5)[0])
    for t in range(3):
        action, _ = model.predict(obs)
        obs, rewards, dones, infos = venv.step(action)
        assert (rewards.tolist(), dones.tolist()) == ([1.0], [t == 2])
    assert infos[0]["TimeLimit.truncated"]
    assert not np.array_equal(infos[0]["terminal_observation"], obs[0])
    assert venv.get_attr("spec")[0].id == "CartPole-v1"
    assert venv.env_is_wrapped(gym.wrappers.TimeLimit) == [True]
    venv.set_attr("gravity", 1.0)
    assert env.unwrapped.gravity == venv.get_attr("gravity")[0] == 1.0


class Cut(gym.Env):
    """Observes the number of steps taken; the first environment terminates after two, the second is cut after three."""

    observation_space, action_space = gym.spaces.Box(0, 9, (1,)), gym.spaces.Discrete(2)

    def __init__(self, terminates):
        self.terminates = terminates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.t += 1
        ends = self.t == (2 if self.terminates else 3)
        return np.full(1, self.t, np.float32), float(self.t), self.terminates and ends, not self.terminates and ends, {}


def test_what_the_trainer_sees_of_terminations_and_time_limits():
    """Against the definition: the trainer's rollout of environments whose every value is known."""
    seen = []

    class Reading(Recorder):
        def on_rollout_end(self):
            r = self.model.trainer.rollout
            seen.append((r.obs[:, :, 0].clone(), r.rewards.clone(), r.terminated.clone(), r.done.clone()))

    model = PPO("MlpPolicy", VecEnv([Cut(True), Cut(False)]), **SMALL | {"n_steps": 8})
    model.learn(16, Reading())
    ((obs, rewards, terminated, done),) = seen
    assert obs.T.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1, 0], [0, 1, 2, 0, 1, 2, 0, 1, 2]]
    assert rewards.T.tolist() == [[1, 2, 1, 2, 1, 2, 1, 2], [1, 2, 3, 1, 2, 3, 1, 2]]
    assert terminated.int().T.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1], [0] * 8]
    assert done.int().T.tolist() == [[0, 1, 0, 1, 0, 1, 0, 1], [0, 0, 1, 0, 0, 1, 0, 0]]


def test_our_vec_env_steps_as_stable_baselines3s(recwarn):
    theirs = pytest.importorskip("stable_baselines3.common.vec_env").DummyVecEnv
    a, b = (kind([lambda: gym.make("CartPole-v1") for _ in range(2)]) for kind in (_ours, theirs))
    assert isinstance(a, theirs.__mro__[1])
    a.seed(3), b.seed(3)
    assert np.array_equal(a.reset(), b.reset())
    rng = np.random.default_rng(0)
    for _ in range(60):
        actions = rng.integers(2, size=2)
        x, y = a.step(actions), b.step(actions)
        for ours, other in zip(x[:3], y[:3], strict=True):
            assert np.array_equal(ours, other)
            assert ours.dtype == other.dtype
        for mine, other in zip(x[3], y[3], strict=True):
            assert mine.keys() == other.keys()
            assert mine["TimeLimit.truncated"] == other["TimeLimit.truncated"]


def _ours(makers):
    return VecEnv([make() for make in makers])


def test_make_vec_env_takes_what_it_can_honour():
    venv = make_vec_env(
        "Pendulum-v1",
        2,
        seed=1,
        env_kwargs={"g": 5.0},
        wrapper_class=gym.wrappers.ClipReward,
        wrapper_kwargs={"min_reward": -1},
    )
    assert venv.get_attr("g") == [5.0, 5.0]
    assert np.array_equal(venv.reset()[1], gym.make("Pendulum-v1").reset(seed=2)[0])
    assert make_vec_env(lambda: Choosing(), 3).num_envs == 3
    for name in ("monitor_dir", "vec_env_cls", "vec_env_kwargs", "monitor_kwargs"):
        with pytest.raises(ConfigError, match=f"{name}='x' can't be used here: "):
            make_vec_env("CartPole-v1", **{name: "x"})


def test_dict_observations():
    class Two(gym.ObservationWrapper):
        def __init__(self, env):
            super().__init__(env)
            box = env.observation_space
            self.observation_space = gym.spaces.Dict({"a": box, "b": box})

        def observation(self, obs):
            return {"a": obs, "b": -obs}

    for env in (Two(gym.make("CartPole-v1")), make_vec_env(lambda: Two(gym.make("CartPole-v1")), 2)):
        model = PPO("MultiInputPolicy", env, **SMALL).learn(64)
        obs = model.get_env().reset()
        assert model.predict(obs)[0].shape == (model.n_envs,)


class Picture(gym.Env):
    """Images that show the time."""

    observation_space, action_space = gym.spaces.Box(0, 255, (36, 36, 3), np.uint8), gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.zeros((36, 36, 3), np.uint8), {}

    def step(self, action):
        self.t += 1
        return np.full((36, 36, 3), self.t, np.uint8), float(action), False, self.t == 9, {}


def test_images():
    model = PPO("CnnPolicy", Picture(), **SMALL).learn(32)
    assert model.config.network == "cnn"
    assert model.predict(model.env.reset())[0].shape == (1,)


def test_masks_of_a_registered_environment():
    model = MaskablePPO("MlpPolicy", "Taxi-v4", **SMALL).learn(32)
    obs, info = gym.make("Taxi-v4").reset(seed=0)
    assert info["action_mask"][int(model.predict(obs, action_masks=info["action_mask"])[0])]


def test_worker_processes_step_environments_of_make_vec_env():
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 4), **SMALL, vectorization="pool", workers=2).learn(128)
    assert model.trainer.config.vectorization == "pool"
    assert model.num_timesteps == 128


def test_vec_normalize_stays_the_scripts_own():
    vec_env = pytest.importorskip("stable_baselines3.common.vec_env")
    venv = vec_env.VecNormalize(vec_env.DummyVecEnv([lambda: gym.make("Pendulum-v1", max_episode_steps=5)] * 1))
    model = PPO("MlpPolicy", venv, **SMALL).learn(64)
    assert venv.obs_rms.count == pytest.approx(65, abs=2), "64 steps, and a reset or two"
    assert model.get_vec_normalize_env() is venv
    assert model.get_env() is venv
    assert model.policy.encoder.normalizer is None


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_callbacks_of_stable_baselines3(tmp_path):
    callbacks = pytest.importorskip("stable_baselines3.common.callbacks")
    stop = callbacks.StopTrainingOnRewardThreshold(5.0)
    evaluate = callbacks.EvalCallback(
        gym.make("CartPole-v1"),
        stop,
        n_eval_episodes=2,
        eval_freq=16,
        log_path=str(tmp_path),
        best_model_save_path=str(tmp_path),
        verbose=0,
    )
    checkpoint = callbacks.CheckpointCallback(24, str(tmp_path), name_prefix="m")
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(320, [checkpoint, evaluate])
    assert evaluate.evaluations_timesteps == [16]
    assert model.num_timesteps == 32, "the threshold stops the training after its iteration"
    best = PPO.load(tmp_path / "best_model")
    assert equal(weights(best), weights(model))


def test_evaluate_policy_of_stable_baselines3():
    evaluation = pytest.importorskip("stable_baselines3.common.evaluation")
    model = PPO("MlpPolicy", make_vec_env("CartPole-v1", 2), **SMALL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for env in (model.get_env(), gym.make("CartPole-v1")):
            returns, lengths = evaluation.evaluate_policy(model, env, 4, return_episode_rewards=True)
            assert returns == lengths
            assert len(returns) == 4
