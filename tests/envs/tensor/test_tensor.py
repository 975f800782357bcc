"""Tensor environments: steps equal to Gymnasium's from the same states, time limits, seeds and compilation."""

import math

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo.envs.make_envs import TASKS, inspect_env, make_vec_env
from fastppo.envs.tensor.task import uniforms
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import Transitions, env_seeds, stepper
from fastppo.errors import ConfigError
from fastppo.runtime.compile import compile_graph
from tests.worlds import step

CPU = torch.device("cpu")


def state_of(env):
    return np.asarray(env.unwrapped.state, np.float64)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCarContinuous-v0"])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-9), (torch.float32, 2e-5)])
def test_a_step_from_the_same_state_matches_gymnasium(env_id, dtype, bound):
    env, task = gym.make(env_id), TASKS[env_id]()
    env.action_space.seed(0)
    rng = np.random.default_rng(0)
    ends = seen = 0
    for episode in range(12):
        env.reset(seed=episode)
        if env_id == "MountainCarContinuous-v0":
            # float32, like Gymnasium's state after the first step; starts near the goal let some episodes end there
            x = rng.uniform(0.2, 0.44) if episode % 3 == 0 else rng.uniform(-1.2, 0.4)
            env.unwrapped.state = np.array([x, rng.uniform(-0.07, 0.07)], np.float32)
        elif episode % 3 == 0:  # high speeds reach the bounds and wrap the angles
            env.unwrapped.state = state_of(env) + rng.normal(
                0, 3.0 if env_id != "CartPole-v1" else 0.3, len(state_of(env))
            )
        for _ in range(60):
            before, action = state_of(env), env.action_space.sample()
            if rng.random() < 0.1 and env.action_space.shape == (1,):
                action = np.sign(action)
            if dtype == torch.float64 and env_id == "Pendulum-v1":
                action = action.astype(np.float64)  # Gymnasium computes in the action's dtype
            obs, reward, terminated, _, _ = env.unwrapped.step(action)
            columns = tuple(torch.tensor([x], dtype=dtype) for x in before)
            after, r, ended = task.step(columns, torch.as_tensor(action).unsqueeze(0))
            # Gymnasium rounds MountainCarContinuous to float32 inside the step
            near = 3e-7 if env_id.startswith("Mountain") and dtype == torch.float64 else bound
            assert torch.cat(after).numpy() == pytest.approx(state_of(env), abs=near * max(1, np.abs(before).max()))
            assert r.item() == pytest.approx(reward, abs=near * max(1, abs(reward)))
            assert task.observe(after)[0].numpy() == pytest.approx(obs, abs=max(near, 3e-6))
            assert bool(ended) == terminated
            assert all(x.dtype == dtype for x in (*after, r))
            ends, seen = ends + terminated, seen + 1
            if terminated:
                break
    assert seen > 100
    assert ends > 0 or env_id == "Pendulum-v1"


def test_keyword_arguments_work_as_in_gymnasium():
    state, left = (
        (torch.tensor([0.0]), torch.tensor([0.0]), torch.tensor([0.5]), torch.tensor([0.0])),
        torch.tensor([0]),
    )
    assert TASKS["CartPole-v1"](sutton_barto_reward=True).step(state, left)[1].item() == -1
    light = TASKS["Pendulum-v1"](g=0.0).step((torch.tensor([1.0]), torch.tensor([0.0])), torch.tensor([[0.0]]))[0]
    assert [x.item() for x in light] == [1, 0]


class PlainCatch:
    """Catch in plain Python."""

    def __init__(self, column):
        self.ball, self.paddle = [0, column], 6

    def step(self, action):
        self.paddle = min(max(self.paddle + action - 1, 0), 11)
        self.ball[0] += 1
        down = self.ball[0] == 11
        return (1 if self.ball[1] == self.paddle else -1) if down else 0, down

    def image(self):
        out = [[0] * 84 for _ in range(84)]
        for row, column in (self.ball, (11, self.paddle)):
            for y in range(7):
                for x in range(7):
                    out[7 * row + y][7 * column + x] = 255
        return out


def test_catch_matches_its_plain_python_version():
    env = gym.make("fastppo/Catch-v0", render_mode="rgb_array")
    rng = np.random.default_rng(1)
    rewards = []
    for episode in range(6):
        obs, _ = env.reset(seed=episode)
        plain = PlainCatch(int(obs[0, 0].argmax()) // 7)
        down = False
        while not down:
            assert obs[0].tolist() == plain.image()
            action = rng.integers(3)
            obs, reward, terminated, _, _ = env.step(action)
            expected, down = plain.step(action)
            assert (reward, terminated) == (expected, down)
        rewards.append(reward)
    assert set(rewards) == {-1.0, 1.0}
    assert env.render().shape == (84, 84, 3)


def make(env_id="CartPole-v1", n=6, seed=3, **kwargs):
    env = make_vec_env(inspect_env(env_id, kwargs), n, "tensor")
    return env, env.reset(env_seeds(np.random.SeedSequence(seed), env.n_envs)).clone()


def test_a_rollout_matches_single_gymnasium_environments_from_the_same_starts():
    env, obs = make("CartPole-v1", max_episode_steps=30)
    singles = [gym.make("CartPole-v1", max_episode_steps=30) for _ in range(env.n_envs)]
    for i, single in enumerate(singles):
        single.reset(seed=0)
        single.unwrapped.state = obs[i].double().numpy()
    rng = np.random.default_rng(0)
    take, ended, cut = stepper(env, CPU), 0, 0
    for _ in range(200):
        leans = obs[:, 2] + obs[:, 3] > 0  # a balancing policy, so that some episodes reach the time limit
        actions = torch.where(torch.from_numpy(rng.random(env.n_envs) < 0.5), leans.long(), 0)
        env.final_obs_buffer.clear(1)
        out = take(actions)
        obs = out.obs.clone()
        for i, single in enumerate(singles):
            last, reward, terminated, truncated, _ = single.step(int(actions[i]))
            assert (reward, terminated, truncated) == (out.rewards[i], out.terminated[i], out.truncated[i])
            if truncated and not terminated:
                assert env.final_obs_buffer.end_steps[0, i] == 0
                assert env.final_obs_buffer.obs[0, i].numpy() == pytest.approx(last, abs=1e-4)
            else:
                assert env.final_obs_buffer.end_steps[0, i] == 1, "T marks an unused row"
            if terminated or truncated:
                assert obs[i].abs().max() <= 0.05, "the next episode starts in the same step"
                single.reset()
                single.unwrapped.state = obs[i].double().numpy()
            else:
                assert obs[i].numpy() == pytest.approx(last, abs=1e-4)
                single.unwrapped.state = obs[i].double().numpy()  # keeps rounding errors from adding up
            ended, cut = ended + int(terminated), cut + int(truncated)
    assert ended > 10
    assert cut > 5


def test_a_rollout_keeps_the_final_observation_of_every_truncation():
    env, _ = make("Pendulum-v1", n=3, max_episode_steps=4)
    to = Transitions.allocate(10, env, CPU)
    env.attach(to)
    # different episode lengths so far, so that the environments reach the time limit at different steps
    env.capturable_state["steps"].copy_(torch.tensor([0, 1, 3]))
    assert len(env.final_obs_buffer.end_steps) == 3
    env.final_obs_buffer.clear(10)
    for t in range(10):
        env.send(t, 0)
    assert env.final_obs_buffer.end_steps.T.tolist() == [[3, 7, 10], [2, 6, 10], [0, 4, 8]]
    assert env.final_obs_buffer.counts.tolist() == [2, 2, 3]
    for n in range(3):
        for k in range(int(env.final_obs_buffer.counts[n])):
            t = int(env.final_obs_buffer.end_steps[k, n])
            assert to.truncated[t, n]
            # the final observation is one step after the previous one, not the start of the next episode
            speed = env.final_obs_buffer.obs[k, n, 2] - to.obs[t, n, 2] if t else torch.tensor(0.0)
            assert speed.abs() <= 0.05 * (15 + 6) + 1e-5
            assert not torch.equal(env.final_obs_buffer.obs[k, n], to.obs[t + 1, n])


def test_the_seed_determines_the_rollout_and_every_environment_starts_differently():
    def run(seed, n=4):
        env, obs = make(n=n, seed=seed)
        return torch.stack([obs, *(step(env, torch.ones(n, dtype=torch.int64)).obs for _ in range(40))])

    assert torch.equal(run(0), run(0))
    assert not torch.equal(run(0), run(1))
    first = run(0)[0]
    assert len({tuple(row.tolist()) for row in first}) == 4


def test_uniforms_are_uniform_and_match_splitmix64():
    seed, episode = torch.tensor([0, 5, -7]), torch.tensor([0, 3, 2**40])

    def plain(seed, k):
        mask = 2**64 - 1
        z = (seed + k * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        return z ^ (z >> 31)

    got = uniforms(seed, episode, 2, torch.float64)
    for i in range(3):
        for row in range(2):
            expected = plain(int(seed[i]), int(episode[i]) * 2 + row + 1)
            assert got[row, i].item() == (expected >> 11) * 2.0**-53
    assert plain(0, 1) == 0xE220A8397B1DCDAF, "published first output of SplitMix64 with seed 0"
    many = uniforms(torch.arange(100_000), torch.zeros(100_000, dtype=torch.int64), 1, torch.float32)[0]
    assert 0 <= many.min() < 1e-3 < 0.999 < many.max() < 1
    counts = torch.histc(many, 20, 0, 1)
    assert ((counts - 5000).square() / 5000).sum() < 43.8, "99.9 % quantile of chi-squared with 19 degrees of freedom"
    assert abs(torch.corrcoef(torch.stack((many[:-1], many[1:])))[0, 1]) < 0.02


SLOW_TO_COMPILE = ("Acrobot-v1", "MountainCarContinuous-v0", "fastppo/Catch-v0")


@pytest.mark.parametrize(
    "env_id", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW_TO_COMPILE else x for x in TASKS]
)
def test_a_compiled_environment_matches_the_eager_one(env_id):
    runs = []
    for compiled in (False, True):
        env, _ = make(env_id, n=5)
        to = Transitions.allocate(50, env, CPU)
        env.attach(to)
        if compiled:
            env.compile(compile_graph)
        g = torch.Generator().manual_seed(0)
        if to.actions.is_floating_point():
            to.actions.normal_(generator=g)
        else:
            to.actions.copy_(torch.randint(0, env.action_spec.nvec[0], to.actions.shape, generator=g))
        env.final_obs_buffer.clear(50)
        for t in range(50):
            env.send(t, 0)
        runs.append((to, env))
    (a, one), (b, two) = runs
    for name in ("seed", "episode", "steps"):
        assert torch.equal(one.capturable_state[name], two.capturable_state[name])
    tolerance = 0.05 if env_id == "Acrobot-v1" else 1e-4  # chaotic: a rounding error doubles every few steps
    torch.testing.assert_close(a.obs.float(), b.obs.float(), atol=tolerance, rtol=tolerance)
    assert torch.equal(a.terminated, b.terminated)
    assert torch.equal(one.final_obs_buffer.end_steps, two.final_obs_buffer.end_steps)


def test_an_environment_without_a_tensor_version_is_refused():
    with pytest.raises(ConfigError, match=r"vectorization=tensor knows Acrobot-v1, .*, not MountainCar-v0; use native"):
        make_vec_env(inspect_env("MountainCar-v0", {}), 4, "tensor")


def test_a_tensor_environment_supports_float64():
    env_info = inspect_env("Pendulum-v1", {})
    env = TensorEnv(
        TASKS["Pendulum-v1"](),
        2,
        env_info.obs_spec,
        env_info.action_spec,
        max_steps=200,
        device=CPU,
        dtype=torch.float64,
    )
    obs = env.reset(env_seeds(np.random.SeedSequence(0), env.n_envs))
    assert obs.dtype == torch.float64
    assert math.hypot(*obs[0, :2].tolist()) == pytest.approx(1, abs=1e-15)
