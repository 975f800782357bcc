"""Environments that fail in a chosen way at a chosen step. Imports no torch, so that workers start fast."""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import time

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class TwoArgumentsError(Exception):
    """An error that can be pickled, but not unpickled."""

    def __init__(self, first, second):
        super().__init__(f"{first} and {second}")


class NoTextError(Exception):
    """An error whose text raises."""

    def __str__(self):
        raise RuntimeError("no text")


class FaultEnv(gym.Env):
    """Observes (10 * steps since reset + index, a random number); episodes end after 20 steps.

    The environment with index `env_index` fails as `kind` says at its `at_step`-th step, counted over episodes. `once`
    names a file that is created at the failure and prevents further ones.
    """

    observation_space = spaces.Box(-1e6, 1e6, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def __init__(self, index=0, kind="none", env_index=0, at_step=5, once=None):
        self.index, self.kind, self.at_step, self.once = index, kind, at_step, once
        self.mine = index == env_index
        self.life = self.steps = 0
        if kind == "constructor" and self.mine and _in_worker():
            raise RuntimeError("no licence for this simulator")

    def _obs(self):
        return np.array([10 * self.steps + self.index, self.np_random.random()], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        if self.kind == "reset raises" and self.mine and self.life >= self.at_step:
            raise RuntimeError("reset went wrong")
        return self._obs(), {}

    def step(self, action):
        self.life += 1
        self.steps += 1
        obs, reward, over = self._obs(), 1.0, self.steps >= 20
        if self.mine and self.life == self.at_step and not (self.once and os.path.exists(self.once)):
            if self.once:
                open(self.once, "w").close()
            broken = self._break(obs, reward, over)
            if broken is None or len(broken) == 4:
                return broken
            obs, reward, over = broken
        return obs, reward, over, False, {}

    def _break(self, obs, reward, over):
        match self.kind:
            case "raises":
                raise ValueError("the ball left the table")
            case "two arguments":
                raise TwoArgumentsError("one", "two")
            case "unpicklable":
                error = RuntimeError("holds what can't be pickled")
                error.thing = lambda: None
                raise error
            case "no text":
                raise NoTextError
            case "sleeps":
                time.sleep(1000)
            case "loops in C":
                ctypes.PyDLL(None).sleep(1000)  # PyDLL keeps the GIL, so no Python thread runs either
            case "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            case "segfault":
                os.kill(os.getpid(), signal.SIGSEGV)
            case "stopped":
                os.kill(os.getpid(), signal.SIGSTOP)
            case "nan obs":
                obs = obs * np.float32(np.nan)
            case "nan reward":
                reward = float("nan")
            case "no reward":
                reward = None
            case "wide obs":
                obs = obs.astype(np.float64)
            case "one number":
                obs = obs[:1]
            case "reward array":
                reward = np.array([reward])
            case "done as int":
                over = 1
            case "outside":
                obs = obs + np.float32(1e7)
            case "old tuple":
                return obs, reward, over, {}
            case "no result":
                return None
            case "huge reward":
                reward = 3e38
        return obs, reward, over


class Dice(FaultEnv):
    """Observations from an unseeded random stream."""

    def _obs(self):
        return np.array([np.random.default_rng().random(), 0], np.float32)


class Gravity(FaultEnv):
    """Rewards that differ in worker processes."""

    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, reward + (self.steps == 3 and _in_worker()), *rest


class Reusing(FaultEnv):
    """Returns the same array in every step."""

    buffer = np.zeros(2, np.float32)

    def _obs(self):
        self.buffer[:] = super()._obs()
        return self.buffer


class Growing(FaultEnv):
    """Adds a new key to info in each step."""

    def step(self, action):
        *rest, _ = super().step(action)
        return *rest, {f"key {self.life}": np.zeros(1000)}


class Odd(gym.Env):
    """Observations of n numbers."""

    action_space = spaces.Discrete(2)

    def __init__(self, n):
        self.observation_space = spaces.Box(-1, 1, (n,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(self.observation_space.shape, np.float32), {}

    def step(self, action):
        return np.zeros(self.observation_space.shape, np.float32), 0.0, False, False, {}


def odd(n):
    """Return a function that makes an `Odd` of n numbers."""
    return lambda: Odd(n)


def _in_worker():
    return multiprocessing.parent_process() is not None


def makers(n, **changes):
    """Return a function per environment that makes it, for n environments."""
    return [lambda i=i: FaultEnv(i, **changes) for i in range(n)]


class Numbered:
    """Makes FaultEnvs with indices 0, 1, ... in order of calls; for a Trainer's make_env."""

    def __init__(self, **changes):
        self.changes, self.made = changes, -4  # inspection makes one more, the resume probe two

    def __call__(self):
        self.made += 1
        return FaultEnv(max(self.made, 0), **self.changes)


gym.register("Fault-v0", entry_point=FaultEnv, max_episode_steps=50)
