"""Generalised advantage estimation (GAE): one contract, several kernels.

A kernel maps (trajectory, gamma [], lambda []) to advantages A and returns R, [T, N] each, in reward units:

    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    A_t     = delta_t + gamma lambda (1 - done_t) A_{t+1},   A_T = 0
    R_t     = A_t + V(s_t)

s'_t is the true successor of row t: at a time limit the last observation of the cut episode, not the first of the next
one. Termination removes the bootstrap value; any end of an episode, terminated or truncated, stops the trace.

Source: Schulman et al. 2016, eq. 11 and 16 (arXiv:1506.02438); Pardo et al. 2018 for the two kinds of ending
(arXiv:1712.00378).
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor


class Trajectory(NamedTuple):
    """The tensors [T, N] that GAE reads.

    Attributes:
        rewards: float, in reward units (after reward normalisation, if any).
        values: V(s_t), in reward units.
        next_values: V of the true successor of each row; any value, also NaN, where terminated.
        terminated: bool, the task ended.
        done: bool, the episode ended: terminated or truncated.
    """

    rewards: Tensor
    values: Tensor
    next_values: Tensor
    terminated: Tensor
    done: Tensor


# (trajectory, gamma [], lambda []) -> advantages, returns
Gae = Callable[[Trajectory, Tensor, Tensor], tuple[Tensor, Tensor]]


def gae_loop(trajectory: Trajectory, gamma: Tensor, gae_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GAE by the backward recursion, one time step at a time: the eager kernel for large rollouts."""
    delta, decay = _deltas_and_decays(trajectory, gamma, gae_lambda)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        running = torch.addcmul(delta[t], decay[t], running, out=advantages[t])
    return advantages, advantages + trajectory.values


def gae_doubling(trajectory: Trajectory, gamma: Tensor, gae_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Compute GAE in ceil(log2 T) whole-array rounds: the kernel to compile, and the eager one for small rollouts.

    Equal to `gae_loop` up to rounding.
    """
    delta, decay = _deltas_and_decays(trajectory, gamma, gae_lambda)
    advantages = linear_scan(delta, decay)
    return advantages, advantages + trajectory.values


def choose_gae(n_steps: int, n_envs: int, device: torch.device) -> Gae:
    """Return the fastest kernel that needs no torch.compile.

    On CUDA the Triton kernel, if it works (`triton_failure`); else doubling or the loop. Doubling moves the whole
    array log2 T times, the loop moves it once but in T small pieces. On two CPU cores the loop is faster from about
    2^18 elements (128 x 4096: 10 ms, doubling 20 ms), doubling is faster below (128 x 8: 0.5 ms, the loop 2.1 ms).
    """
    if device.type == "cuda" and triton_failure(device) is None:
        from fastppo.kernels.gae import gae_triton

        return gae_triton
    return gae_loop if n_steps * n_envs >= 2**18 else gae_doubling


@functools.cache
def triton_failure(device: torch.device) -> Exception | None:
    """Return why the Triton kernel can't be used on `device`; None if it matches doubling on a small rollout.

    Triton compiles C code at the first call, so that a missing compiler, missing headers of Python or an unsupported
    GPU show only when the kernel runs.
    """
    # 67 steps need two tiles; both kinds of ending, and a NaN that termination must remove
    n_steps, n_envs = 67, 3
    cell = torch.arange(n_steps * n_envs, device=device).view(n_steps, n_envs)
    terminated, truncated = cell % 11 == 5, cell % 7 == 3
    x = cell.float()
    next_values = torch.where(terminated, torch.nan, x.cos())
    trajectory = Trajectory(x.sin(), (x / 3).cos(), next_values, terminated, terminated | truncated)
    gamma, gae_lambda = (torch.full((), value, device=device) for value in (0.99, 0.95))
    try:
        from fastppo.kernels.gae import gae_triton

        exact = gae_doubling(trajectory, gamma, gae_lambda)
        pairs = zip(gae_triton(trajectory, gamma, gae_lambda), exact, strict=True)
        same = all(torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4) for ours, theirs in pairs)
    except Exception as error:
        return error.with_traceback(None)  # its frames hold tensors
    return None if same else ArithmeticError("its results differ from those of doubling")


def linear_scan(inputs: Tensor, decay: Tensor) -> Tensor:
    """Solve y_t = x_t + c_t y_{t+1} backwards along the first dimension, with y_T = 0.

    By recursive doubling: before round k, row t holds the affine map y_{t+2^k} -> y_t as the pair (c, x); the round
    composes it with the map of row t + 2^k: (c_t c_{t+2^k}, x_t + c_t x_{t+2^k}).

    Args:
        inputs: x, [T, ...].
        decay: c, [T, ...].

    Returns:
        y, [T, ...].

    Source: Hillis and Steele 1986, "Data parallel algorithms".
    """
    step = 1
    while step < len(inputs):
        # a row whose partner lies past the end is finished, as y is 0 there
        inputs = torch.cat((inputs[:-step] + decay[:-step] * inputs[step:], inputs[-step:]))
        decay = torch.cat((decay[:-step] * decay[step:], decay[-step:]))
        step *= 2
    return inputs


def _deltas_and_decays(trajectory: Trajectory, gamma: Tensor, gae_lambda: Tensor) -> tuple[Tensor, Tensor]:
    # where, not a product with the mask: the next value of a terminal row may be NaN
    future = torch.where(trajectory.terminated, 0.0, trajectory.next_values)
    delta = trajectory.rewards + gamma * future - trajectory.values
    return delta, torch.where(trajectory.done, 0.0, gamma * gae_lambda)
