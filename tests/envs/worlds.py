"""Environments as users write them, mistakes included. Imports no torch, so that workers start fast."""

import os
import random

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Counter(gym.Env):
    """The observation is (steps since the reset, number of the episode).

    `ends[k]` is (length, truncated) of episode k; the last entry repeats. An episode ends by time limit if `truncated`,
    else by termination. The reward is 1 + step / 10, so that a misplaced row shows.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, ends=((5, False),)):
        self.ends, self.episode = ends, -1

    def _obs(self):
        return np.array([self.steps, self.episode], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.steps = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        length, truncated = self.ends[min(self.episode, len(self.ends) - 1)]
        over = self.steps >= length
        return self._obs(), 1 + self.steps / 10, over and not truncated, over and truncated, {}


class Table(Counter):
    """Walks through `rows` numbers that the constructor makes; `scribbles` changes them in each step."""

    def __init__(self, rows=200_000, scribbles=False, plain=True):
        super().__init__(((5, False), (9, True)))
        self.prices, self.scribbles = np.arange(rows, dtype=np.float64), scribbles
        self.nested = {"low": [np.zeros(rows)], "name": "prices"}
        if not plain:
            self.helper = object()

    def step(self, action):
        if self.scribbles:
            self.prices[self.steps] += 1.5
        obs, reward, *rest = super().step(action)
        return obs, reward + self.prices[self.steps], *rest


class GlobalDice(Counter):
    """Observes a number of numpy's and one of Python's global stream."""

    def _obs(self):
        return np.array([np.random.random(), random.random()], np.float32)


class FixedDice(Counter):
    """Draws from a generator that the constructor makes."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)

    def _obs(self):
        return np.array([self.steps, self.rng.random()], np.float32)


class Helper:
    def __init__(self):
        self.dice = random.Random(3)


class HelperDice(Counter):
    """As FixedDice, with the generator in another object."""

    def __init__(self):
        super().__init__()
        self.helper = Helper()

    def _obs(self):
        return np.array([self.steps, self.helper.dice.random()], np.float32)


class IgnoresSeed(Counter):
    """Seeds Gymnasium's own generator with one number."""

    def reset(self, *, seed=None, options=None):
        super().reset(seed=5)
        return np.array([0, self.np_random.random()], np.float32), {}


class FixedMap(Counter):
    """Draws a map in the constructor, and nothing later; episodes are the same under every seed, as they should be."""

    def __init__(self):
        super().__init__()
        self.rng = np.random.default_rng(0)
        self.map = self.rng.random(5)


class Unrepeatable(Counter):
    """Can be resumed neither exactly nor by a replay."""

    def _obs(self):
        return np.array([self.steps, np.random.default_rng().random()], np.float32)


class OwnArray(Counter):
    """Returns its own array from a step, and a copy from a reset, which overwrites the array."""

    def __init__(self):
        super().__init__(((4, True),))
        self.array = np.zeros(2, np.float32)

    def reset(self, *, seed=None, options=None):
        obs, info = super().reset(seed=seed)
        self.array[:] = obs
        return self.array.copy(), info

    def step(self, action):
        obs, *rest = super().step(action)
        self.array[:] = obs
        return self.array, *rest


class LateArray(OwnArray):
    """As OwnArray, in a way that the start-up check can't see: only the last step of an episode returns it."""

    def step(self, action):
        obs, reward, terminated, truncated, info = super().step(action)
        return (obs if truncated else obs.copy()), reward, terminated, truncated, info


class Level(Counter):
    """A world with a level, which the third number of an observation shows, and methods that fail in several ways."""

    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    level = 1
    number = 0

    def _obs(self):
        return np.array([self.steps, self.episode, self.level], np.float32)

    def harder(self, by=1, *, name="level"):
        setattr(self, name, getattr(self, name) + by)
        return self.level

    def fail_in(self, number):
        if self.number == number:
            raise ValueError(f"no such level\nin environment {number}")
        return self.number

    def exit_in(self, number):
        if self.number == number:
            os._exit(3)

    def leave(self):
        raise SystemExit(7)

    def unpicklable(self):
        return (step for step in range(3))

    @property
    def broken(self):
        raise RuntimeError("a property of its own")

    @property
    def fixed(self):
        return 7


class OldReset(Counter):
    def reset(self):
        return super().reset()[0]


class OldStep(Counter):
    def step(self, action):
        obs, reward, terminated, _, info = super().step(action)
        return obs, reward, terminated, info


class OldResult(Counter):
    def reset(self, *, seed=None, options=None):
        return super().reset(seed=seed)[0]


class BrokenStep(Counter):
    def step(self, action):
        return {}["speed"]


class NoSingleSpaces(gym.vector.VectorEnv):
    """As SuperSuit's vector environments: spaces of one environment, under other names."""

    num_envs = 2
    observation_space, action_space = spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(2)


class Scored(Counter):
    """Gives `terms/even` and `terms/deep/steps` in each step, `success` in the last, and other values at a reset."""

    def __init__(self, ends=((3, False), (5, True)), odd=False):
        super().__init__(ends)
        self.odd = odd

    def reset(self, *, seed=None, options=None):
        if seed is not None:  # which a run gives; its first look at a vector environment must not count
            self.episode = -1
        return super().reset(seed=seed)[0], {"success": 50.0, "terms": {"even": 70.0}, "only_reset": 1.0}

    def step(self, action):
        obs, reward, terminated, truncated, _ = super().step(action)
        info = {"terms": {"even": self.steps % 2 == 0, "deep": {"steps": np.float32(self.steps / 3)}}}
        if terminated or truncated:
            info["success"] = float(self.episode % 3 == 0)
        if self.odd:
            info |= {"name": "seven", "vector": np.arange(3.0), "nothing": None, "number": np.array(2.5)}
        return obs, reward, terminated, truncated, info
