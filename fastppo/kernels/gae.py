"""Generalised advantage estimation as one Triton kernel for CUDA; `fastppo.functional.gae` defines the contract.

Each program owns BLOCK_N environments and goes from the end of the rollout to its start in tiles of BLOCK_T steps: a
reverse scan composes the affine maps of a tile, and the advantage of its first row is carried into the tile before.
Every input is read once and every result written once, 22 bytes per cell; memory bandwidth bounds the speed. Import
this module only on CUDA: Triton comes with torch's CUDA builds.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

# Tiles of 2,048 cells, narrow enough that few environments still make many programs
_BLOCK_T, _BLOCK_N = 64, 32


@triton.jit
def _compose(later_decay, later_x, decay, x):
    """Compose the affine map y -> x + decay * y with the map of later rows."""
    return decay * later_decay, x + decay * later_x


@triton.jit
def _kernel(
    rewards,
    values,
    next_values,
    terminated,
    done,
    gamma_at,
    lambda_at,
    advantages,
    returns,
    n_steps,
    n_envs,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = tl.arange(0, BLOCK_T)
    gamma, gae_lambda = tl.load(gamma_at), tl.load(lambda_at)
    carry = tl.zeros([BLOCK_N], dtype=tl.float32)
    for block in range(tl.cdiv(n_steps, BLOCK_T)):
        # negative for the rows of the last tile that lie before the rollout; they are masked
        t = n_steps - (block + 1) * BLOCK_T + rows
        at = t[:, None].to(tl.int64) * n_envs + n[None, :]
        inside = (t[:, None] >= 0) & (n[None, :] < n_envs)
        value = tl.load(values + at, mask=inside, other=0.0)
        future = tl.load(next_values + at, mask=inside, other=0.0)
        # where, not a product with the mask: the next value of a terminal row may be NaN
        future = tl.where(tl.load(terminated + at, mask=inside, other=1) != 0, 0.0, future)
        delta = tl.load(rewards + at, mask=inside, other=0.0) + gamma * future - value
        decay = tl.where(tl.load(done + at, mask=inside, other=1) != 0, 0.0, gamma * gae_lambda)
        decay, x = tl.associative_scan((decay, delta), 0, _compose, reverse=True)
        advantage = x + decay * carry[None, :]
        tl.store(advantages + at, advantage, mask=inside)
        tl.store(returns + at, advantage + value, mask=inside)
        carry = tl.sum(tl.where(rows[:, None] == 0, advantage, 0.0), 0)


def gae_triton(trajectory: Sequence[Tensor], gamma: Tensor, gae_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GAE of the tensors of a `functional.gae.Trajectory`, contiguous, on CUDA, numbers in float32."""
    rewards, values, next_values, terminated, done = trajectory
    n_steps, n_envs = rewards.shape
    assert all(x.is_contiguous() for x in trajectory)
    advantages, returns = torch.empty_like(rewards), torch.empty_like(rewards)
    grid = (triton.cdiv(n_envs, _BLOCK_N),)
    flags = terminated.view(torch.uint8), done.view(torch.uint8)
    scalars = gamma, gae_lambda
    _kernel[grid](
        rewards, values, next_values, *flags, *scalars, advantages, returns, n_steps, n_envs, _BLOCK_T, _BLOCK_N
    )
    return advantages, returns
