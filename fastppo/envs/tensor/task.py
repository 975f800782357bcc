"""The interface of a task, and counter-based random numbers."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Task(Protocol):
    """Batched dynamics of N environments: pure functions of tensors, without host reads or random draws.

    Floats have the dtype of the uniforms passed to `reset`.

    Attributes:
        n_uniforms: random numbers per reset.
    """

    n_uniforms: int

    def reset(self, u: Tensor) -> State:
        """Return the initial state, columns of [N] each, from uniforms u [n_uniforms, N] in [0, 1)."""

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """Return the next state, rewards [N], and terminated [N] bool.

        Args:
            state: columns, [N] each.
            actions: [N] int64 counted from 0, or [N, D] within the bounds of the action space.
        """

    def observe(self, state: State) -> Any:  # noqa: ANN401 - a tree of tensors
        """Return the observations [N, *obs] of a state; a tree of tensors where the space is Dict or Tuple."""


@runtime_checkable
class MaskedTask(Task, Protocol):
    """A task in which some actions are not allowed."""

    def action_mask(self, state: State) -> Tensor:
        """Return which actions a state allows, [N, A] bool, for each action of each component."""


# Odd constants of SplitMix64 as signed 64-bit numbers; source: Steele, Lea and Flood 2014, "Fast splittable
# pseudorandom number generators"
_GAMMA, _MIX1, _MIX2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seed: Tensor, episode: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Return random numbers [n, N] in [0, 1), a pure function of (seed, episode) and equal on every device.

    Row i (from 0) is the top 24 (float32) or 53 (float64) bits of output k = n * episode + i + 1 of SplitMix64 with
    the environment's seed. A hash needs no generator state, which could not advance for some environments only.

    Args:
        seed: [N] int64, any value.
        episode: [N] int64, counted from 0.
        n: numbers per environment.
        dtype: float32 or float64.
    """
    k = episode * n + torch.arange(1, n + 1, device=seed.device).unsqueeze(1)
    z = seed + k * _GAMMA
    z = (z ^ _shift(z, 30)) * _MIX1
    z = (z ^ _shift(z, 27)) * _MIX2
    z = z ^ _shift(z, 31)
    bits = 24 if dtype == torch.float32 else 53
    return _shift(z, 64 - bits).to(dtype) * 2.0**-bits


def _shift(x: Tensor, bits: int) -> Tensor:
    """Shift right logically, filling with zeros; torch's >> on int64 repeats the sign bit."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
