"""Small environments with known results, and settings for short runs."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

from fastppo import Config
from fastppo.envs.vec_env import stepper

SHORT = {
    "n_envs": 2,
    "n_steps": 8,
    "n_minibatches": 2,
    "update_epochs": 2,
    "total_timesteps": 48,
    "vectorization": "sync",
}


def short(tmp_path, **changes):
    """Return the config of a very short run in `tmp_path / "run"`, with `changes` to its settings."""
    settings = SHORT | {"run_dir": tmp_path / "run"} | changes
    if "total_timesteps" not in changes:  # at least one iteration
        settings["total_timesteps"] = max(48, (settings["n_envs"] or 1) * settings["n_steps"])
    return Config(**settings)


def step(env, actions):
    """Step a VecEnv once, outside a rollout, and return a copy of the transition."""
    if not hasattr(env, "take_step"):
        env.take_step = stepper(env, torch.device("cpu"))
    out = env.take_step(actions)
    return out._replace(**{k: v.clone() for k, v in out._asdict().items() if isinstance(v, torch.Tensor)})


class Bandit(gym.Env):
    """Episodes of one step; the reward is the share of action components that match `secret`."""

    observation_space = spaces.Box(0, 1, (1,), np.float32)

    def __init__(self, action_space, secret):
        self.action_space, self.secret = action_space, np.asarray(secret)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.ones(1, np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        reward = float(np.mean(np.asarray(action) == self.secret))
        return np.ones(1, np.float32), reward, True, False, {}


class BrightSide(gym.Env):
    """An image with one bright half; the right action is its side (left 0, right 1). Episodes of one step."""

    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)
    action_space = spaces.Discrete(2)

    def _obs(self):
        self.side = int(self.np_random.integers(2))
        image = np.zeros((36, 36, 1), np.uint8)
        image[:, 18 * self.side : 18 * self.side + 18] = 255
        return image

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self._obs(), {}

    def step(self, action):
        reward = float(action == self.side)
        return self._obs(), reward, True, False, {}


class Spaces(gym.Env):
    """Random observations of any space; checks every action; truncates after 6 steps.

    The reward is the sum of the action. With `reuse`, all observations share one buffer.
    """

    def __init__(self, observation_space, action_space, reuse=False):
        self.observation_space, self.action_space, self.reuse = observation_space, action_space, reuse
        self.buffer = None

    def _obs(self):
        self.observation_space.seed(int(self.np_random.integers(2**31)))
        obs = self.observation_space.sample()
        if not self.reuse:
            return obs
        self.buffer = obs if self.buffer is None else self.buffer
        np.copyto(self.buffer, obs)
        return self.buffer

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        assert self.action_space.contains(action), f"{action!r} is outside {self.action_space}"
        self.steps += 1
        return self._obs(), float(np.sum(action)), False, self.steps == 6, {}


class SumTask:
    """Walk by the sum of the action, which is the reward; of several choices or bits, in tensors."""

    n_uniforms = 3

    def reset(self, u):
        return tuple(u)

    def step(self, state, actions):
        total = actions.to(state[0].dtype).flatten(1).sum(1)
        x, y, z = state
        return (y, z, (x + total) / 4), total, z > 2

    def observe(self, state):
        return torch.stack(state, 1)


ACTIONS = {
    "fastppo-tests/Choices-v0": spaces.MultiDiscrete([2, 3]),
    "fastppo-tests/Bits-v0": spaces.MultiBinary(3),
}
for name, actions in ACTIONS.items():
    gym.register(
        name, lambda actions=actions: Spaces(spaces.Box(-1, 1, (3,), np.float32), actions), max_episode_steps=6
    )


class Turns(gym.Env):
    """Ends at the third action that isn't 0, is cut after 7 steps, and draws no random numbers."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def _obs(self):
        return np.array([self.turns, self.steps], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.turns = self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.turns += int(action != 0)
        self.steps += 1
        return self._obs(), 1.0 + self.turns, self.turns == 3, self.steps == 7, {}


class Endings(gym.Env):
    """Random observations, and episodes of 1 to 6 steps that end both ways."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Discrete(3)

    def _obs(self):
        return self.np_random.normal(size=3).astype(np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 7))
        return self._obs(), {}

    def step(self, action):
        self.left -= 1
        over, by_limit = self.left == 0, bool(self.np_random.random() < 0.5)
        return self._obs(), float(self.np_random.normal()), over and not by_limit, over and by_limit, {}


class Masked(Spaces):
    """As `Spaces`, but also checks that each action is allowed: the first, and each other one with probability 1/2.

    `source` is where the masks are given: "method", "info" or "key"; None: nowhere.
    """

    def __init__(self, observation_space, action_space, source="method"):
        self.inner, self.source = observation_space, source
        n = int(np.sum(action_space.nvec if isinstance(action_space, spaces.MultiDiscrete) else action_space.n))
        self.mask = np.ones(n, bool)
        if source == "key":
            own = {"action_mask": spaces.MultiBinary(n)}
            observation_space = spaces.Dict({**observation_space.spaces, **own})
        super().__init__(observation_space, action_space)
        if source == "method":
            self.action_masks = lambda: self.mask

    def _obs(self):
        obs = super()._obs()
        if self.source is not None:
            nvec = np.ravel(getattr(self.action_space, "nvec", len(self.mask)))
            self.mask = self.np_random.random(len(self.mask)) < 0.5
            self.mask[np.cumsum(nvec) - nvec] = True
        return obs | {"action_mask": self.mask.astype(np.int8)} if self.source == "key" else obs

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        return obs, info | self._info()

    def step(self, action):
        nvec = np.ravel(getattr(self.action_space, "nvec", len(self.mask)))
        starts = np.ravel(self.action_space.start)
        assert self.mask[np.cumsum(nvec) - nvec + np.ravel(action) - starts].all(), f"{action} is forbidden"
        obs, reward, terminated, truncated, info = super().step(action)
        return obs, reward, terminated, truncated, info | self._info()

    def _info(self):
        return {"action_mask": self.mask} if self.source == "info" else {}


class Lock(gym.Env):
    """A lock with `n` dials: the right one of two choices turns to the next dial, the wrong one back to the first.

    The observation is the dial. The only reward, 1, comes with the last dial and ends the episode; a time limit cuts it
    after 2 n steps. Random choices open a lock of 24 dials once in 2^24 attempts.
    """

    action_space = spaces.Discrete(2)

    def __init__(self, n=24):
        self.secret = np.random.default_rng(7).integers(2, size=n)
        self.observation_space = spaces.Discrete(n)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.dial = self.steps = 0
        return self.dial, {}

    def step(self, action):
        self.steps += 1
        self.dial = self.dial + 1 if action == self.secret[self.dial] else 0
        opened = self.dial == len(self.secret)
        return min(self.dial, len(self.secret) - 1), float(opened), opened, self.steps == 2 * len(self.secret), {}
