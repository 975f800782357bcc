"""The pool of worker processes: rollouts equal to those of a single process, and errors that name the environment."""

import os
import signal
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from fastppo import Config, Trainer
from fastppo.envs import backends
from fastppo.envs.auto_vectorization import choose
from fastppo.envs.env_group import EnvGroup
from fastppo.envs.fault_policy import NO_FAULT_POLICY
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.step_arrays import step_result
from fastppo.envs.sync import SerialVectorEnv
from fastppo.errors import ConfigError, EnvError
from tests.envs.worlds import Counter
from tests.worlds import short

MARGINS = {name: backend.auto_margin for name, backend in backends.BACKENDS.items()}


def cartpole():
    return gym.make("CartPole-v1")


class Failing(Counter):
    def step(self, action):
        if self.steps == 2:
            raise ValueError("the wheel fell off")
        return super().step(action)


def steps(pool, count):
    for _ in range(count):
        pool.step(np.zeros(pool.num_envs, np.int64))


@pytest.mark.parametrize(("n_workers", "n_groups"), [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2)])
def test_our_vector_environments_match_gymnasiums_sync_vector_env(n_workers, n_groups):
    makers = [cartpole] * 7
    pool = PoolVectorEnv(makers, n_workers=n_workers, n_groups=n_groups) if n_workers else SerialVectorEnv(makers)
    sync = SyncVectorEnv([cartpole] * 7, autoreset_mode=AutoresetMode.SAME_STEP)
    rng = np.random.default_rng(0)
    try:
        assert np.array_equal(pool.reset(seed=3)[0], sync.reset(seed=3)[0])
        ends = 0
        for _ in range(200):
            actions = rng.integers(0, 2, 7)
            ours, theirs = pool.step(actions), sync.step(actions)
            assert all(np.array_equal(a, b) for a, b in zip(ours[:4], theirs[:4], strict=True))
            for i in np.flatnonzero(ours[2] | ours[3]):
                assert np.array_equal(ours[4]["final_obs"][i], theirs[4]["final_obs"][i])
                ends += 1
        assert ends > 20
        assert not n_workers or pool.n_workers == min(n_workers, 7 // n_groups)
    finally:
        pool.close()
        sync.close()


def trained_parameters(tmp_path, name, **changes):
    config = short(tmp_path, env_id="Pendulum-v1", n_envs=4, n_steps=64, total_timesteps=1024, **changes)
    trainer = Trainer(config.__class__(**{**config.__dict__, "run_dir": tmp_path / name}))
    trainer.run()
    return trainer.update.parameters.vector.clone()


def test_training_is_bit_identical_under_sync_async_and_pool(tmp_path):
    runs = [
        trained_parameters(tmp_path, "sync"),
        trained_parameters(tmp_path, "async", vectorization="async"),
        trained_parameters(tmp_path, "pool1", vectorization="pool", workers=1),
        trained_parameters(tmp_path, "pool3", vectorization="pool", workers=3),
    ]
    assert all(torch.equal(run, runs[0]) for run in runs[1:])


def test_half_batches_give_the_same_training_for_any_number_of_workers(tmp_path):
    one, two = (
        trained_parameters(tmp_path, f"half{k}", vectorization="pool", workers=k, half_batches=True) for k in (1, 2)
    )
    assert torch.equal(one, two)


def test_the_error_of_a_failing_environment_names_it():
    pool = PoolVectorEnv([Counter, Counter, Failing, Counter], n_workers=2)
    pool.reset(seed=0)
    with pytest.raises(
        EnvError, match=r"environment 2 \(seed 2\) failed in step 3: ValueError: the wheel fell off"
    ) as info:
        steps(pool, 5)
    assert "\n" not in str(info.value)
    assert "Traceback" in str(info.value.__cause__)


def test_the_error_of_a_killed_worker_names_its_environments_and_signal():
    pool = PoolVectorEnv([Counter] * 4, n_workers=2)
    pool.reset(seed=0)
    os.kill(pool._workers[1].process.pid, signal.SIGKILL)
    with pytest.raises(EnvError, match="worker process of environments 2-3 .* was killed by SIGKILL"):
        steps(pool, 5)


def test_waiting_for_a_step_that_was_not_sent_is_an_error_and_harms_nothing():
    pool = PoolVectorEnv([cartpole] * 2, n_workers=2, n_groups=2)
    pool.reset(seed=1)
    with pytest.raises(EnvError, match=r"wait\(0\): group 0 has no step under way; call send\(0, actions\) first"):
        pool.wait(0)
    pool.send(0, np.zeros(1, np.int64))
    with pytest.raises(EnvError, match=r"wait\(1\)"):
        pool.wait(1)
    assert pool.wait(0)[0].shape == (1, 4)
    pool.close()
    with pytest.raises(EnvError, match="the pool is closed"):
        pool.wait(0)


@pytest.mark.parametrize("n_workers", [0, -2])
def test_a_pool_without_workers_is_refused(n_workers):
    with pytest.raises(ConfigError, match=f"n_workers={n_workers} must be at least 1; None is one per core"):
        PoolVectorEnv([cartpole], n_workers=n_workers)


@pytest.mark.parametrize("vectoriser", [PoolVectorEnv, SerialVectorEnv])
def test_an_environment_in_place_of_its_maker_is_refused(vectoriser):
    with pytest.raises(ConfigError, match=r"env_fns\[1\] is a TimeLimit; it must be a function that makes"):
        vectoriser([cartpole, cartpole()])


def test_close_ends_every_worker():
    pool = PoolVectorEnv([Counter] * 2, n_workers=2)
    pids = [worker.process.pid for worker in pool._workers]
    begin = time.monotonic()
    pool.close()
    assert time.monotonic() - begin < 5
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_pool_settings_need_the_pool():
    with pytest.raises(ConfigError, match="workers needs vectorization=pool, but vectorization=sync"):
        Config(workers=2)
    with pytest.raises(ConfigError, match="half_batches needs vectorization=pool"):
        Config(half_batches=True)


@pytest.mark.parametrize(
    ("speeds", "best"),
    [
        ({"sync": 100.0, "pool": 110.0}, "sync"),
        ({"sync": 100.0, "pool": 150.0}, "pool"),
        ({"sync": 100.0, "native": 140.0}, "sync"),
        ({"sync": 100.0, "native": 800.0, "pool": 190.0}, "native"),
        ({"sync": 100.0}, "sync"),
    ],
)
def test_auto_picks_the_fastest_backend_by_a_margin_and_reports_the_speeds(speeds, best):
    choice, reason = choose(8, speeds, {"pool": "too short"} if "pool" not in speeds else {}, MARGINS)
    assert choice == best
    assert f"sync {speeds['sync']:,.0f}" in reason
    assert "n_envs=8" in reason


class WrongShapes(Counter):
    """Return each reward as an array of one number, and resize the observations of a reset to `shape`."""

    shape = (2,)

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, np.array([reward]), *rest

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return np.resize(obs, self.shape), info


def test_the_error_of_a_serial_environment_names_it():
    env = SerialVectorEnv([WrongShapes, WrongShapes])
    env.reset(seed=0)
    with pytest.raises(EnvError, match=r"environment 0 .*reward array\(\[1\.1\]\) \(float64 of shape \(1,\)\)"):
        env.step(np.zeros(2, np.int64))
    env.envs[1].shape = (1,)
    with pytest.raises(EnvError, match=r"shape \(1,\); its space says \(2,\)"):
        env.reset()
    failing = SerialVectorEnv([Counter, Failing])
    failing.reset(seed=0)
    with pytest.raises(EnvError, match=r"environment 1 \(seed 1\) failed in step 3: .*the wheel fell off") as caught:
        steps(failing, 5)
    assert isinstance(caught.value.__cause__, ValueError)


class SplitSerial(PoolVectorEnv):
    """Step the groups in this process, without workers."""

    def __init__(self, factories, n_groups, **_):
        inner = self._inner = SerialVectorEnv(factories)
        n = self.num_envs = inner.num_envs
        self.groups = [slice(n * g // n_groups, n * (g + 1) // n_groups) for g in range(n_groups)]
        self.metadata, self.spec = inner.metadata, inner.spec
        self.single_observation_space, self.single_action_space = (
            inner.single_observation_space,
            inner.single_action_space,
        )
        self._shares = [EnvGroup(inner.envs[at], [], inner._arrays, at, NO_FAULT_POLICY) for at in self.groups]
        self._arrays, self.fault_policy = inner._arrays, NO_FAULT_POLICY

    def env_states(self):
        return []

    def reset(self, *, seed=None, options=None):
        return self._inner.reset(seed=seed)

    def send(self, group, actions):
        self._inner._arrays["actions"][self.groups[group]] = actions
        self._shares[group].step()

    def wait(self, group):
        return step_result(self._inner._arrays, self.groups[group])

    def close_extras(self, **_):
        self._inner.close()


def test_half_batches_match_a_single_process_with_the_same_groups(tmp_path, monkeypatch):
    settings = {"vectorization": "pool", "workers": 2, "half_batches": True}
    pool = trained_parameters(tmp_path, "pool", **settings)
    monkeypatch.setattr(backends, "PoolVectorEnv", SplitSerial)
    assert torch.equal(trained_parameters(tmp_path, "split", **settings), pool)


class Slow(Counter):
    """Each step takes 20 ms; its start and end are appended to a file."""

    def __init__(self, path):
        super().__init__(ends=((1000, False),))
        self.path = path

    def step(self, action):
        begin = time.perf_counter()  # on Linux, all processes share this clock
        time.sleep(0.02)
        with open(self.path, "a") as file:
            file.write(f"{begin} {time.perf_counter()}\n")
        return super().step(action)


def test_workers_step_one_half_while_the_policy_acts_for_the_other(tmp_path):
    makers = iter(range(99))
    config = short(tmp_path, n_envs=4, vectorization="pool", workers=2, half_batches=True, total_timesteps=32)
    trainer = Trainer(config, make_env=lambda: Slow(str(tmp_path / f"trace{next(makers)}")))
    acted = []
    for actor in trainer.collect.actors:

        def act(t, inner=actor.act):
            begin = time.perf_counter()
            inner(t)
            time.sleep(0.005)
            acted.append((begin, time.perf_counter()))

        actor.act = act
    trainer.run()
    traces = [line.split() for path in tmp_path.glob("trace*") for line in path.read_text().splitlines()]
    stepped = [(float(begin), float(end)) for begin, end in traces]
    within = [any(begin < a and b < end for begin, end in stepped) for a, b in acted]
    # the first one of each rollout overlaps with no step, and timing may cost a few more
    assert len(acted) == 16
    assert sum(within) >= len(acted) // 2, "the policy must act while the other half steps"


class FloatPixels(WrongShapes):
    """The observation space is uint8, but the observations are floats."""

    observation_space = gym.spaces.Box(0, 255, (2,), np.uint8)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed, options=options)
        return obs + 0.7, info


def test_float_observations_in_an_integer_space_are_refused():
    with pytest.raises(EnvError, match="environment 0 .*observation of float32.*uint8"):
        SerialVectorEnv([FloatPixels]).reset(seed=0)


class LongError(Counter):
    def step(self, action):
        raise ValueError("x" * 200_000)


def test_a_long_error_message_arrives_and_a_failed_pool_refuses_to_step():
    pool = PoolVectorEnv([LongError] * 2, n_workers=1)
    pool.reset(seed=0)
    with pytest.raises(EnvError, match=r"environment 0 \(seed 0\) failed in step 1: ValueError: xxx"):
        steps(pool, 1)
    with pytest.raises(EnvError, match="a worker failed before"):
        steps(pool, 1)
