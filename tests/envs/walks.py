"""A walk whose next observation follows from the last one, with short episodes of both endings.

Imports no torch, so that workers start fast.
"""

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

LIMIT = 5  # steps
LOW = 0.3  # an episode terminates below


def following(x):
    """Return the place after x in [0, 1], by the logistic map, which is chaotic."""
    x = float(x)
    return np.float32(3.9 * x * (1 - x))


class Walk(gym.Env):
    """Observes (place, steps / LIMIT). The reward depends on the action, the place and the first place."""

    observation_space, action_space = spaces.Box(0, 1, (2,), np.float32), spaces.Discrete(3)

    def __init__(self, limit=LIMIT, inexact=False):
        self.limit = limit
        if inexact:
            self.lock = object()  # which no resume can save

    def _obs(self):
        return np.array([self.place, self.steps / LIMIT], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.first = self.place = np.float32(self.np_random.uniform(LOW, 0.95))
        self.steps = 0
        return self._obs(), {}

    def step(self, action):
        self.place, self.steps = following(self.place), self.steps + 1
        reward = float(self.place if action == 0 else action * (1 - self.first))
        return self._obs(), reward, bool(self.place < LOW), self.steps >= self.limit, {}


class Seen(gym.ObservationWrapper):
    """A walk seen as an image (`kind` "image"), or as an image, a vector and a mask ("tree")."""

    def __init__(self, kind):
        super().__init__(Walk())
        self.kind = kind
        image = spaces.Box(0, 255, (36, 36, 1), np.uint8)
        parts = {"camera": image, "vector": Walk.observation_space, "action_mask": spaces.MultiBinary(3)}
        self.observation_space = image if kind == "image" else spaces.Dict(parts)

    def observation(self, observation):
        image = np.zeros((36, 36, 1), np.uint8)
        image[: int(36 * observation[0]), : 7 * int(1 + 4 * observation[1])] = 255
        if self.kind == "image":
            return image
        mask = np.ones(3, np.int8)
        mask[int(100 * observation[0]) % 3] = 0
        return {"camera": image, "vector": observation, "action_mask": mask}


def walks(num_envs=4, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([Walk] * num_envs, autoreset_mode=mode)


gym.register("fastppo-tests/Walk-v0", Walk, max_episode_steps=LIMIT)
