"""Generalised advantage estimation: one contract, several kernels.

Contract of every kernel here, all tensors [T, N]:

    A_t = delta_t + gamma * lambda * (1 - done_t) * A_{t+1}
    delta_t = r_t + gamma * (1 - terminated_t) * V(s'_t) - V(s_t)
    R_t = A_t + V(s_t)

with s'_t the true successor of row t, also where an episode was cut. A real end has no future value; any end, real or
cut, stops the trace. Source: Schulman et al. 2016, eq. 11 and 16 (arXiv:1506.02438); the separation of the two endings
follows Pardo et al. 2018 (arXiv:1712.00378).
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor

Gae = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def gae_loop(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
) -> tuple[Tensor, Tensor]:
    """GAE by the backward recursion, one step of T at a time: the eager kernel for large rollouts.

    Args:
        rewards: [T, N] float, in the units that the critic predicts.
        values: [T, N] V(s_t).
        next_values: [T, N] V of the true successor of each row; ignored where terminated.
        terminated: [T, N] bool, the task ended.
        done: [T, N] bool, the episode ended for either reason.
        gamma: [] in [0, 1].
        gae_lambda: [] in [0, 1].

    Returns:
        advantages and returns, [T, N] each.
    """
    delta, decay = _terms(rewards, values, next_values, terminated, done, gamma, gae_lambda)
    advantages = torch.empty_like(delta)
    running = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        running = torch.addcmul(delta[t], decay[t], running, out=advantages[t])
    return advantages, advantages + values


def gae_doubling(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
) -> tuple[Tensor, Tensor]:
    """GAE in ceil(log2 T) rounds of whole-array operations: for torch.compile on any device, eager for small rollouts.

    Arguments and result as `gae_loop`.
    """
    delta, decay = _terms(rewards, values, next_values, terminated, done, gamma, gae_lambda)
    advantages = linear_scan(delta, decay)
    return advantages, advantages + values


def choose_gae(n_steps: int, n_envs: int, device: torch.device) -> Gae:
    """The fastest kernel without torch's compiler.

    On CUDA the one in Triton, where Triton is there. Otherwise one of the two above.
    Doubling moves the whole array log2 T times, the loop moves it once but in T small pieces. On two CPU cores the
    loop wins from about 2^18 elements (128 x 4096: 10 against 20 ms), doubling below (128 x 8: 0.5 against 2.1 ms).
    """
    if device.type == "cuda" and importlib.util.find_spec("triton") is not None:
        from fastppo.functional.gae_triton import gae_triton

        return gae_triton
    return gae_loop if n_steps * n_envs >= 2**18 else gae_doubling


def linear_scan(inputs: Tensor, decay: Tensor) -> Tensor:
    """y_t = x_t + c_t * y_{t+1} along the first dimension, y past the end being 0.

    Recursive doubling: after round k each row holds the affine map of the 2^k steps from it,
    (c, x) <- (c_t * c_{t+2^k}, x_t + c_t * x_{t+2^k}). Source: Hillis and Steele 1986.

    Args:
        inputs: x, [T, ...].
        decay: c, [T, ...].
    """
    step = 1
    while step < len(inputs):
        # rows whose partner lies past the end are finished: their map meets y = 0
        inputs = torch.cat((inputs[:-step] + decay[:-step] * inputs[step:], inputs[-step:]))
        decay = torch.cat((decay[:-step] * decay[step:], decay[-step:]))
        step *= 2
    return inputs


def _terms(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
) -> tuple[Tensor, Tensor]:
    # where, not a product with the mask: a terminal row's next value may be anything, NaN too
    future = torch.where(terminated, 0.0, next_values)
    delta = rewards + gamma * future - values
    return delta, torch.where(done, 0.0, gamma * gae_lambda)
