"""Metrics of a rollout in C (`metrics.c`), for contiguous float32 and bool tensors on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.native.library import load

_long, _at = ctypes.c_long, ctypes.c_void_p
FIGURES = 11  # before the latest episodes


class Rollout(ctypes.Structure):
    """Sizes and addresses of the tensors of a rollout; see metrics.c."""

    _fields_ = (
        *((name, _long) for name in ("steps", "envs")),
        *((name, _at) for name in ("rewards", "values", "next_values", "returns")),
        *((name, _at) for name in ("terminated", "truncated", "done", "valid", "obs")),
        *((name, _long) for name in ("obs_size", "max_episodes")),
        ("open", _at),
    )


def measuring(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    returns: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    done: Tensor,
    valid: Tensor | None,
    obs: Tensor | None,
    open_episodes: Tensor,
    max_episodes: int,
) -> Callable[[], Tensor]:
    """Return a function that measures a rollout, whose tensors never move.

    Args:
        rewards: [T, N], like all tensors up to `valid`; `ppo.rollout.Rollout` describes them.
        values: V of each row.
        next_values: V of the true successor of each row.
        returns: targets of the critic.
        terminated: the task ended.
        truncated: the episode was cut.
        done: either.
        valid: False for filler rows; None: there are none.
        obs: [T, N, ...] float32 observations after each step, to be checked for numbers that are not finite.
        open_episodes: [2, N] float64, returns and lengths of unfinished episodes; changed by each call.
        max_episodes: K, episodes to list.

    Returns:
        A function that returns [FIGURES + 3 K] float64: explained variance, clipped actions (0), range and standard
        deviation of actions (NaN), whether a number is not finite, observations outside their space (0), rows, sum of
        their rewards, number of ended episodes, sums of their returns and lengths; then those of the latest K.

    Raises:
        NativeError: it can't be compiled here.
    """
    tensors = rewards, values, next_values, returns, terminated, truncated, done, valid, obs
    assert all(x is None or x.is_contiguous() for x in (*tensors, open_episodes))
    addresses = [None if x is None else x.data_ptr() for x in tensors]
    obs_size = 0 if obs is None else obs[0, 0].numel()
    rollout = Rollout(*rewards.shape, *addresses, obs_size, max_episodes, open_episodes.data_ptr())
    measure = load("metrics").measure
    measure.argtypes, measure.restype = (_at, _at), None

    def call() -> Tensor:
        assert tensors, "kept alive as long as this function"
        measured = torch.empty(FIGURES + 3 * max_episodes, dtype=torch.float64)
        measure(ctypes.byref(rollout), measured.data_ptr())
        return measured

    return call
