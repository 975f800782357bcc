"""Environments with Dict and Tuple observations and action masks. Imports no torch, so that workers start fast."""

import functools

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv

CHOICES = {1: spaces.Discrete(4, start=2), 2: spaces.MultiDiscrete([3, 2])}


class Illegal(ValueError):
    """An action that the mask forbids."""


class Scene(gym.Env):
    """Random observations of several kinds, and a random mask; an action that it forbids is an error.

    Episode k since the last seed has 3 + k % 3 steps and ends by time limit if k is odd. The last observation of an
    episode has a mask of zeros. The reward depends on observation and action, so that misplaced rows show.

    Args:
        masks: where the mask is given: "key", "method", "info", "sometimes" (in every second info) or "none".
        camera: whether observations hold an image.
        components: of an action.
        stuck_at: step of the environment at which the mask allows nothing, though the episode goes on.
        shared: whether all observations are one dict of the same arrays.
    """

    def __init__(self, masks="key", camera=True, components=1, stuck_at=None, shared=False):
        self.masks, self.stuck_at, self.shared = masks, stuck_at, shared
        self.action_space = CHOICES[components]
        self.nvec = [4] if components == 1 else [3, 2]
        parts = {
            "place": spaces.Box(-np.inf, np.inf, (3,), np.float64),
            "direction": spaces.Discrete(4, start=1),
            "pair": spaces.Tuple((spaces.MultiBinary(2), spaces.Box(-1, 1, (), np.float32))),
        }
        if camera:
            parts["camera"] = spaces.Box(0, 255, (37, 37, 1), np.uint8)
        if masks == "key":
            parts["action_mask"] = spaces.MultiBinary(sum(self.nvec))
        self.observation_space = spaces.Dict(parts)
        self.episode, self.total, self.kept = -1, 0, None
        self.mask = np.ones(sum(self.nvec), np.int8)

    def _obs(self, over=False):
        draw = self.np_random.random
        self.mask = np.concatenate([self._draw_mask(n) for n in self.nvec]).astype(np.int8)
        if over or self.total == self.stuck_at:
            self.mask[:] = 0
        self.told = self.masks != "none" and not (self.masks == "sometimes" and self.total % 2)
        obs = {
            "place": np.array([self.steps, self.episode, draw()]),
            "direction": int(draw() * 4) + 1,
            "pair": ((self.np_random.random(2) < 0.5).astype(np.int8), np.float32(draw())),
        }
        if "camera" in self.observation_space.spaces:
            obs["camera"] = self.np_random.integers(0, 256, (37, 37, 1), np.uint8)
        if self.masks == "key":
            obs["action_mask"] = self.mask.copy()
        self.last = obs
        if self.shared:
            if self.kept is None:
                self.kept = obs
            np.copyto(self.kept["place"], obs["place"])
            return self.kept
        return obs

    def _draw_mask(self, n):
        mask = self.np_random.random(n) < 0.5
        mask[self.np_random.integers(n)] = True
        return mask

    def _info(self):
        return {"action_mask": self.mask.copy()} if self.masks in ("info", "sometimes") and self.told else {}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        if seed is not None:
            self.episode, self.total = -1, 0
        self.episode, self.steps = self.episode + 1, 0
        return self._obs(), self._info()

    def step(self, action):
        chosen = np.reshape(action - (self.action_space.start if len(self.nvec) == 1 else 0), -1)
        starts = np.cumsum([0, *self.nvec])[:-1]
        if self.told and not self.mask[starts + chosen].all():
            raise Illegal(f"{action} under {self.mask}")
        reward = float(self.last["place"][2] * chosen.sum() + self.last["direction"])
        self.steps, self.total = self.steps + 1, self.total + 1
        over = self.steps >= 3 + self.episode % 3
        obs = self._obs(over)
        limit = self.episode % 2 == 1
        return obs, reward, over and not limit, over and limit, self._info()


class Asked(Scene):
    """Gives its mask by a method."""

    def action_masks(self):
        return self.mask.copy()


def scene(masks="key", **settings):
    return (Asked if masks == "method" else Scene)(masks, **settings)


class Sliced(gym.ObservationWrapper):
    """CartPole's four numbers under three keys."""

    def __init__(self, env):
        super().__init__(env)
        low, high = env.observation_space.low, env.observation_space.high
        self.observation_space = spaces.Dict(
            {key: spaces.Box(low[at], high[at], dtype=np.float32) for key, at in self.parts.items()}
        )

    parts = {"a": slice(0, 1), "b": slice(1, 2), "c": slice(2, 4)}  # noqa: RUF012 - constant

    def observation(self, obs):
        return {key: obs[at] for key, at in self.parts.items()}


def cartpole(sliced):
    env = gym.make("CartPole-v1")
    return Sliced(env) if sliced else env


class Legal(gym.Wrapper):
    """Refuses actions that the mask in the latest info forbids."""

    def reset(self, **kwargs):
        obs, info = self.env.reset(**kwargs)
        self.allowed = info["action_mask"]
        return obs, info

    def step(self, action):
        if not self.allowed[action]:
            raise Illegal(f"{action} under {self.allowed}")
        obs, reward, terminated, truncated, info = self.env.step(action)
        self.allowed = info["action_mask"]
        return obs, reward, terminated, truncated, info


def taxi():
    return gym.make("Taxi-v4", max_episode_steps=20)


def legal_taxi():
    return Legal(taxi())


def scenes(num_envs=4, mode=AutoresetMode.SAME_STEP, **settings):
    return SyncVectorEnv([functools.partial(scene, **settings)] * num_envs, autoreset_mode=mode)


gym.register(
    "fastppo-tests/Scene-v0",
    scene,
    vector_entry_point=scenes,
    disable_env_checker=True,  # it warns about the shape () of a part
)


class WrongMask(Scene):
    """Declares or tells a mask of three actions, of which there are four."""

    def __init__(self, masks="key"):
        super().__init__(masks)
        if masks == "key":
            self.observation_space = spaces.Dict(
                {**self.observation_space.spaces, "action_mask": spaces.MultiBinary(3)}
            )

    def _obs(self, over=False):
        obs = super()._obs(over)
        self.mask = self.mask[:3]
        return obs


class Told(gym.Env):
    """Observes a number and a text."""

    observation_space = spaces.Dict(number=spaces.Discrete(3), mission=spaces.Text(9))
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"number": 1, "mission": "go"}, {}

    def step(self, action):
        return *self.reset()[:1], 0.0, True, False, {}


class Nothing(Told):
    observation_space = spaces.Dict()


for _name, _kind in {"WrongMask": WrongMask, "Told": Told, "Nothing": Nothing}.items():
    gym.register(f"fastppo-tests/{_name}-v0", _kind, disable_env_checker=True)
