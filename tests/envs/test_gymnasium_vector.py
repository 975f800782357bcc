"""The adapter for Gymnasium vector environments: autoreset modes, seeds, and checks of each transition."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from fastppo.envs import factory
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.envs.vec_env import env_seeds
from fastppo.envs.vector_adapters import AsyncVecEnv
from fastppo.errors import ConfigError, EnvError
from tests.envs.worlds import Counter
from tests.worlds import Spaces, step

SEED = np.random.SeedSequence(7)


def counter_env(mode, ends=((3, True),), n=2, vectoriser=SyncVectorEnv):
    return GymnasiumVecEnv(vectoriser([lambda: Counter(ends)] * n, autoreset_mode=mode))


def zero_actions(n=2):
    return torch.zeros(n, dtype=torch.int64)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_an_ended_episode_resets_in_the_same_step_and_its_final_observation_is_kept(mode):
    env = counter_env(mode)
    env.reset(env_seeds(SEED, env.n_envs))
    for _ in range(2):
        out = step(env, zero_actions())
        assert (list(out.with_final_obs), out.valid) == ([], None)
    out = step(env, zero_actions())
    assert out.obs.tolist() == [[0, 1], [0, 1]]
    assert out.truncated.all()
    assert not out.terminated.any()
    assert list(out.with_final_obs) == [0, 1]
    assert out.final_obs.tolist() == [[3, 0], [3, 0]]
    assert step(env, zero_actions()).obs.tolist() == [[1, 1], [1, 1]]


def test_next_step_mode_marks_the_reset_step_as_filler():
    env = counter_env(AutoresetMode.NEXT_STEP)
    env.reset(env_seeds(SEED, env.n_envs))
    steps = [step(env, zero_actions()) for _ in range(5)]
    assert [bool(s.valid[0]) for s in steps] == [True, True, True, False, True]
    assert [s.obs[0].tolist() for s in steps] == [[1, 0], [2, 0], [3, 0], [0, 1], [1, 1]]
    assert all(not list(s.with_final_obs) for s in steps)


@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.DISABLED])
def test_only_truncated_episodes_keep_their_final_observation(mode):
    envs = [lambda: Counter(((2, True),)), lambda: Counter(((2, False),)), lambda: Counter(((9, True),))]
    env = GymnasiumVecEnv(SyncVectorEnv(envs, autoreset_mode=mode))
    env.reset(env_seeds(SEED, env.n_envs))
    step(env, zero_actions(3))
    out = step(env, zero_actions(3))
    assert list(out.with_final_obs) == [0]
    assert out.terminated.tolist() == [False, True, False]
    assert out.obs.tolist() == [[0, 1], [0, 1], [2, 0]]


def test_sync_and_async_give_bit_identical_rollouts():
    env_info = inspect_env("CartPole-v1", {})
    rng = np.random.default_rng(0)
    actions = torch.as_tensor(rng.integers(0, 2, (300, 3)))
    seen = []
    for vectorization in ("sync", "async"):
        env = make_vec_env(env_info, 3, vectorization)
        rows = [env.reset(env_seeds(SEED, env.n_envs)).clone()]
        for row in actions:
            out = step(env, row)
            rows += [out.obs.clone(), out.rewards.clone(), out.terminated.clone(), out.truncated.clone()]
        env.close()
        seen.append(rows)
    assert any(row.dtype == torch.bool and row.any() for row in seen[0])
    assert all(torch.equal(a, b) for a, b in zip(*seen, strict=True))


def test_every_environment_has_its_own_seed():
    env = make_vec_env(inspect_env("CartPole-v1", {}), 8, "sync")
    first = env.reset(env_seeds(SEED, env.n_envs)).clone()
    assert len({tuple(row) for row in first.tolist()}) == 8
    # runs with neighbouring seeds must not share environment seeds, as they would with seed + i
    second = env.reset(env_seeds(np.random.SeedSequence(8), env.n_envs)).clone()
    assert not {tuple(row) for row in first.tolist()} & {tuple(row) for row in second.tolist()}
    assert torch.equal(env.reset(env_seeds(np.random.SeedSequence(7), env.n_envs)), first)
    env.close()


def test_the_native_cartpole_notes_that_its_environments_share_a_random_stream():
    env = make_vec_env(inspect_env("CartPole-v1", {}), 4, "native")
    env.reset(env_seeds(SEED, env.n_envs))
    assert env.fillers
    assert any("one random stream" in note for note in env.notes)
    env.close()


def test_a_missing_native_version_is_refused():
    with pytest.raises(ConfigError, match="Pendulum-v1 has no vector version of its own; use sync or async"):
        make_vec_env(inspect_env("Pendulum-v1", {}), 2, "native")


def test_an_undeclared_autoreset_mode_is_refused():
    venv = SyncVectorEnv([Counter])
    del venv.metadata["autoreset_mode"]
    with pytest.raises(EnvError, match="does not declare its autoreset mode"):
        GymnasiumVecEnv(venv)


def test_missing_or_overwritten_final_observations_are_refused():
    class Omitting(SyncVectorEnv):
        def step(self, actions):
            *rest, infos = super().step(actions)
            infos.pop("final_obs", None)
            return *rest, infos

    class Overwriting(SyncVectorEnv):
        def step(self, actions):
            obs, *rest, infos = super().step(actions)
            if "final_obs" in infos:
                infos["final_obs"] = obs
            return obs, *rest, infos

    for vectoriser, message in ((Omitting, "does not hold its final"), (Overwriting, "overwritten")):
        env = counter_env(AutoresetMode.SAME_STEP, ((1, True),), vectoriser=vectoriser)
        env.reset(env_seeds(SEED, env.n_envs))
        with pytest.raises(EnvError, match=message):
            step(env, zero_actions())


@pytest.mark.parametrize(
    ("column", "wrong", "message"),
    [
        (1, lambda x: x[:, None], r"rewards of shape \(2, 1\), not \(2,\)"),
        (1, lambda x: x[:1], r"rewards of shape \(1,\), not \(2,\)"),
        (2, lambda x: x.astype(np.float32), "terminated as float32; it must be bool"),
        (0, lambda x: x[:, :1], r"observations of shape \(2, 1\)"),
    ],
)
def test_wrong_shapes_and_dtypes_are_refused(column, wrong, message):
    class Broken(SyncVectorEnv):
        def step(self, actions):
            out = list(super().step(actions))
            out[column] = wrong(out[column])
            return tuple(out)

    env = counter_env(AutoresetMode.SAME_STEP, vectoriser=Broken)
    env.reset(env_seeds(SEED, env.n_envs))
    with pytest.raises(EnvError, match=message):
        step(env, zero_actions())


def test_observations_are_copied_when_an_environment_reuses_its_buffer():
    space, actions = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)
    finals = []
    for reuse in (False, True):
        env_info = inspect_env("custom", {}, lambda reuse=reuse: Spaces(space, actions, reuse))
        assert env_info.factory.copy_obs is reuse
        env = make_vec_env(env_info, 2, "sync")
        env.reset(env_seeds(SEED, env.n_envs))
        steps = [step(env, zero_actions()) for _ in range(6)]
        finals.append(steps[-1].final_obs.clone())
    assert torch.equal(*finals)


def test_a_vector_environment_is_refused_when_its_environments_reuse_their_buffer():
    space = spaces.Box(-1, 1, (3,), np.float32)
    venv = SyncVectorEnv([lambda: Spaces(space, spaces.Discrete(2), True)], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(EnvError, match="overwrite observations that they returned before"):
        make_vec_env(inspect_env("custom", {}, lambda: venv), 1, "sync")


def test_an_error_in_reset_is_raised_unchanged():
    class Broken(Counter):
        def reset(self, *, seed=None, options=None):
            raise ValueError("my reset is broken")

    env = GymnasiumVecEnv(SyncVectorEnv([Broken], autoreset_mode=AutoresetMode.SAME_STEP))
    with pytest.raises(ValueError, match="my reset is broken"):
        env.reset(env_seeds(SEED, env.n_envs))


def test_float64_observations_give_a_note():
    env_info = inspect_env("custom", {}, lambda: Spaces(spaces.Box(-1, 1, (3,), np.float64), spaces.Discrete(2)))
    assert make_vec_env(env_info, 2, "sync").notes == ["observations are float64; stored as float32, cast once."]


def test_atari_preprocessing_is_the_same_in_sync_and_native(monkeypatch):
    """Without random no-ops and sticky actions, both play the same game, pixel for pixel."""
    monkeypatch.setattr(factory, "ATARI_NOOP_MAX", 0)
    env_info = inspect_env("ALE/Breakout-v5", {"repeat_action_probability": 0.0})
    envs = [make_vec_env(env_info, 2, vectorization) for vectorization in ("sync", "native")]
    assert len({(env.obs_spec, env.action_spec.nvec, env.fillers) for env in envs}) == 1
    assert envs[0].obs_spec.shape == (4, 84, 84)
    frames = [env.reset(env_seeds(SEED, env.n_envs)).clone() for env in envs]
    assert torch.equal(*frames)
    rng = np.random.default_rng(0)
    ended = 0
    for _ in range(400):
        actions = torch.as_tensor(rng.integers(0, 4, 2))
        ours, theirs = (step(env, actions) for env in envs)
        assert torch.equal(ours.obs, theirs.obs)
        assert ours.rewards.tolist() == theirs.rewards.tolist()
        assert torch.equal(ours.terminated, theirs.terminated)
        ended += int(ours.terminated.sum())
    assert ended
    for env in envs:
        env.close()


def test_discrete_actions_begin_at_the_start_of_their_space():
    space = spaces.Discrete(3, start=5)
    env = make_vec_env(inspect_env("custom", {}, lambda: Spaces(spaces.Discrete(4), space)), 2, "sync")
    env.reset(env_seeds(SEED, env.n_envs))
    assert step(env, torch.tensor([0, 2])).rewards.tolist() == [5, 7]


def test_make_env_may_return_a_vector_environment():
    env_info = inspect_env("custom", {}, lambda: gym.make_vec("CartPole-v1", 3, vectorization_mode="sync"))
    assert make_vec_env(env_info, 3, "sync").n_envs == 3
    with pytest.raises(ConfigError, match="n_envs=4, but make_env returned a vector environment of 3"):
        make_vec_env(env_info, 4, "sync")
    with pytest.raises(ConfigError, match="make_env returned int"):
        inspect_env("custom", {}, lambda: 3)


def test_async_workers_start_from_a_fork_server():
    env = make_vec_env(inspect_env("CartPole-v1", {}), 2, "async")
    assert isinstance(env.venv, AsyncVectorEnv)
    assert env.venv.context == "forkserver"
    env.close()


class Breaks(Counter):
    """Fails in its fifth step."""

    def step(self, action):
        if self.steps == 4:
            raise ValueError("the wheel fell off")
        return super().step(action)


@pytest.mark.parametrize(
    ("vectoriser", "adapter", "who"),
    [(SyncVectorEnv, GymnasiumVecEnv, "SyncVectorEnv"), (AsyncVectorEnv, AsyncVecEnv, "environment 1")],
)
@pytest.mark.filterwarnings("ignore::UserWarning")  # in which Gymnasium prints a worker's traceback
def test_an_error_in_a_vector_environment_names_the_step(vectoriser, adapter, who):
    venv = vectoriser(
        [lambda: Counter(((9, False),)), lambda: Breaks(((9, False),))], autoreset_mode=AutoresetMode.SAME_STEP
    )
    env = adapter(venv)
    env.reset(env_seeds(SEED, 2))
    for _ in range(4):
        step(env, zero_actions())
    with pytest.raises(EnvError, match=f"^{who} failed in step 5: ValueError: the wheel fell off") as error:
        step(env, zero_actions())
    assert "\n" not in str(error.value)
    assert error.value.__cause__ is not None
    env.close()
