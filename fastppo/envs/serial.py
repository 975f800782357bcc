"""Environments stepped one after the other in one process: a whole vector environment, or a pool worker's share.

Rollouts equal those of Gymnasium's SyncVectorEnv bit for bit (same-step autoreset); the loop costs a third to a half of
its overhead (benchmarks/vectorizers.py), as results go straight to their rows and no infos are merged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.errors import ConfigError, EnvError

_Array = np.ndarray[Any, Any]
Outcome = tuple[_Array, _Array, _Array, _Array, dict[str, Any]]  # obs, rewards, terminated, truncated, infos


def layout(n: int, obs: gym.Space[Any], action: gym.Space[Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Shapes and dtypes of the arrays that hold N environments' actions and results, by name.

    Raises:
        EnvError: a space whose elements are no arrays.
    """
    return {
        "obs": ((n, *_shape(obs)), obs.dtype),
        "final_obs": ((n, *_shape(obs)), obs.dtype),
        "actions": ((n, *_shape(action)), action.dtype),
        "rewards": ((n,), np.float64),
        "terminated": ((n,), np.bool_),
        "truncated": ((n,), np.bool_),
        "seeds": ((n,), np.int64),
    }


def _shape(space: gym.Space[Any]) -> tuple[int, ...]:
    if space.shape is None or space.dtype is None:
        raise EnvError(
            f"observations and actions must be arrays; {type(space).__name__} is none: wrap the environment."
        )
    return tuple(space.shape)


def outcome(arrays: Mapping[str, _Array], rows: slice) -> Outcome:
    """What Gymnasium's `step` returns, for `rows`; the arrays themselves, which the next step overwrites."""
    terminated, truncated = arrays["terminated"][rows], arrays["truncated"][rows]
    done = terminated | truncated
    infos = {"final_obs": arrays["final_obs"][rows].copy(), "_final_obs": done} if done.any() else {}
    return arrays["obs"][rows], arrays["rewards"][rows], terminated, truncated, infos


class Share:
    """Some environments and their rows of the arrays that `layout` describes.

    Attributes:
        at: the environment that is being stepped or reset, for whoever must name it, counted from 0 here.
    """

    def __init__(self, envs: Sequence[gym.Env[Any, Any]], arrays: Mapping[str, _Array], rows: slice) -> None:
        """Bind `envs` to `rows` of `arrays`."""
        self.at = 0
        self._envs = envs
        self._obs, self._final_obs, self._actions, self._rewards, self._terminated, self._truncated, self._seeds = (
            arrays[name][rows]
            for name in ("obs", "final_obs", "actions", "rewards", "terminated", "truncated", "seeds")
        )

    def reset(self) -> None:
        """Reset each, by its seed; a negative one leaves its random stream as it is."""
        shape = self._obs.shape[1:]
        for i, (env, seed) in enumerate(zip(self._envs, self._seeds.tolist(), strict=True)):
            self.at = i
            obs, _ = env.reset(seed=None if seed < 0 else seed)
            if np.shape(obs) != shape:
                raise EnvError(f"reset returned an observation of shape {np.shape(obs)}; its space says {shape}.")
            np.copyto(self._obs[i, ...], obs, "same_kind")

    def step(self) -> None:
        """Step each once by its action, and reset those that ended."""
        obs_rows, rewards, terminated, truncated = self._obs, [], [], []
        # a copy, as an environment may keep its action
        for i, (env, action) in enumerate(zip(self._envs, self._actions.copy(), strict=True)):
            self.at = i
            obs, reward, terminal, cut, _ = env.step(action)
            rewards.append(reward)
            terminated.append(terminal)
            truncated.append(cut)
            if terminal or cut:
                np.copyto(self._final_obs[i, ...], obs, "same_kind")
                obs, _ = env.reset()
            np.copyto(obs_rows[i, ...], obs, "same_kind")  # as Gymnasium: no float is cut to an integer
        try:
            self._rewards[:] = rewards
        except (TypeError, ValueError):  # rewards as arrays of one number
            self._rewards[:] = [np.asarray(reward).item() for reward in rewards]
        self._terminated[:] = terminated
        self._truncated[:] = truncated


class SerialVectorEnv(VectorEnv[_Array, _Array, _Array]):
    """Environments in this process, stepped one after the other.

    `step` returns the arrays that the next step overwrites.

    Attributes:
        envs: the environments.
    """

    def __init__(self, env_fns: Sequence[Callable[[], gym.Env[Any, Any]]]) -> None:
        """Make the environments.

        Args:
            env_fns: one maker for each.

        Raises:
            EnvError: their spaces aren't arrays.
        """
        self.envs = [make() for make in env_fns]
        first, self.num_envs = self.envs[0], len(self.envs)
        self.spec = first.spec
        self.single_observation_space, self.single_action_space = first.observation_space, first.action_space
        self.metadata = {**first.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)
        shapes = layout(self.num_envs, self.single_observation_space, self.single_action_space)
        self._arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
        self._share = Share(self.envs, self._arrays, slice(0, self.num_envs))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Array, dict[str, Any]]:
        """Reset every environment; one seed s means s, s + 1, ... as in Gymnasium."""
        self._arrays["seeds"][:] = seeds(seed, self.num_envs, options)
        try:
            self._share.reset()
        except Exception as error:
            error.add_note(f"in environment {self._share.at}'s reset")
            raise
        return self._arrays["obs"].copy(), {}

    def step(self, actions: _Array) -> Outcome:
        """Step every environment."""
        self._arrays["actions"][:] = actions
        try:
            self._share.step()
        except Exception as error:
            error.add_note(f"in environment {self._share.at}'s step")
            raise
        return outcome(self._arrays, slice(0, self.num_envs))

    def close_extras(self, **_: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """Close every environment."""
        for env in self.envs:
            env.close()


def seeds(seed: int | Sequence[int | None] | None, n: int, options: dict[str, Any] | None) -> list[int]:
    """Gymnasium's `seed` as one number for each environment, -1 for none.

    Raises:
        ConfigError: options, which can't be served.
    """
    if options:
        raise ConfigError(f"options={options}: environments here are reset whole, without options.")
    each = seed if isinstance(seed, Sequence) else [None if seed is None else seed + i for i in range(n)]
    return [-1 if s is None else s for s in each]
