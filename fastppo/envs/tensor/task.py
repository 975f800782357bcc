"""What a task is, and random numbers that need no generator."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

State = tuple[Tensor, ...]


class Task(Protocol):
    """Physics of one environment, for N of them at once: pure functions of tensors, no host reads, no randomness.

    Floats are of the dtype that `reset`'s uniforms have.

    Attributes:
        n_uniforms: random numbers that a start takes.
    """

    n_uniforms: int

    def reset(self, u: Tensor) -> State:
        """The first state of an episode from uniforms u [n_uniforms, N] in [0, 1): columns, [N] each."""

    def step(self, state: State, actions: Tensor) -> tuple[State, Tensor, Tensor]:
        """The next state, rewards [N], and terminated [N] bool.

        Args:
            state: columns, [N] each.
            actions: [N] int64 counted from 0, or [N, D] within the bounds of the action space.
        """

    def observe(self, state: State) -> Tensor:
        """Observations [N, *obs] of a state."""


# Odd constants of SplitMix64 as signed 64-bit numbers; source: Steele, Lea and Flood 2014, "Fast splittable
# pseudorandom number generators"
_GAMMA, _MIX1, _MIX2 = (x - 2**64 for x in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


def uniforms(seed: Tensor, episode: Tensor, n: int, dtype: torch.dtype) -> Tensor:
    """Numbers [n, N] in [0, 1), the same on every device for the same (seed, episode).

    The state of a generator would have to be kept and could not be masked by environment; these are a hash, the k-th
    output of SplitMix64 seeded by the environment's seed, with k = n * episode + row. 24 bits of each for float32, 53
    for float64.

    Args:
        seed: [N] int64, any.
        episode: [N] int64, counted from 0.
        n: how many for each environment.
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
    """Shift right with zeros coming in, which torch does for unsigned numbers only."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
