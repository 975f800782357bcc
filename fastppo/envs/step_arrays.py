"""The arrays of a step of N environments: actions and results, shared by a pool's workers and their parent.

Imports no torch, as every module that a worker imports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np

from fastppo.errors import ConfigError, EnvError

_Array = np.ndarray[Any, Any]
StepResult = tuple[_Array, _Array, _Array, _Array, dict[str, Any]]  # obs, rewards, terminated, truncated, infos


def layout(n: int, obs: gym.Space[Any], action: gym.Space[Any]) -> dict[str, tuple[tuple[int, ...], Any]]:
    """Return the shapes and dtypes of the arrays for actions and results of N environments, by name.

    Raises:
        EnvError: a space whose elements aren't arrays.
    """
    return {
        "obs": ((n, *_shape(obs)), obs.dtype),
        "final_obs": ((n, *_shape(obs)), obs.dtype),
        "actions": ((n, *_shape(action)), action.dtype),
        "rewards": ((n,), np.float64),
        "terminated": ((n,), np.bool_),
        "truncated": ((n,), np.bool_),
        "seeds": ((n,), np.int64),
        "restarts": ((n,), np.int64),  # of each environment, including those of a lost worker; part of its seed
        "failures": ((n,), np.int64),  # of each environment; a lost worker counts as one, of its first environment
    }


def _shape(space: gym.Space[Any]) -> tuple[int, ...]:
    if space.shape is None or space.dtype is None:
        raise EnvError(
            f"observations and actions must be arrays, but the space is {type(space).__name__}; wrap the environment."
        )
    return tuple(space.shape)


def check_spaces(i: int, env: gym.Env[Any, Any], obs: gym.Space[Any], action: gym.Space[Any]) -> None:
    """Refuse environment i if its spaces differ from the others.

    Raises:
        EnvError: they differ.
    """
    for name, mine, theirs in (("observation", env.observation_space, obs), ("action", env.action_space, action)):
        if mine != theirs:
            raise EnvError(f"environment {i} has {name}_space {mine}; the others have {theirs}.")


def copy_actions(place: _Array, actions: _Array) -> None:
    """Copy `actions` into `place`, without numpy's broadcasting.

    Raises:
        EnvError: their shape differs.
    """
    if np.shape(actions) != place.shape:
        raise EnvError(f"actions have shape {np.shape(actions)}; these environments take {place.shape}.")
    place[...] = actions


def step_result(arrays: Mapping[str, _Array], rows: slice) -> StepResult:
    """Return the results of Gymnasium's `step` for `rows`: views, which the next step overwrites."""
    terminated, truncated = arrays["terminated"][rows], arrays["truncated"][rows]
    done = terminated | truncated
    ended = np.count_nonzero(done)  # a tenth of the time of any() on small arrays
    infos = {"final_obs": arrays["final_obs"][rows].copy(), "_final_obs": done} if ended else {}
    return arrays["obs"][rows], arrays["rewards"][rows], terminated, truncated, infos


def write_truncation(arrays: Mapping[str, _Array], rows: slice | int) -> None:
    """Record lost episodes as truncated at their last observation, with reward 0."""
    arrays["final_obs"][rows] = arrays["obs"][rows]
    arrays["rewards"][rows], arrays["terminated"][rows], arrays["truncated"][rows] = 0.0, False, True


def seeds(seed: int | Sequence[int | None] | None, n: int, options: dict[str, Any] | None) -> list[int]:
    """Return Gymnasium's `seed` as one number per environment, -1 for none.

    Raises:
        ConfigError: options, which aren't supported.
    """
    if options:
        raise ConfigError(f"options={options} are not supported; call reset without options.")
    each = seed if isinstance(seed, Sequence) else [None if seed is None else seed + i for i in range(n)]
    return [-1 if s is None else s for s in each]
