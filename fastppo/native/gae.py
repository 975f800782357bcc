"""GAE in C (`gae.c`), for contiguous float32 and bool tensors on a CPU."""

from __future__ import annotations

import ctypes

from torch import Tensor

from fastppo.native.library import load


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    done: Tensor,
    gamma: Tensor,
    gae_lambda: Tensor,
) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns; arguments and result as for `functional.gae.gae_loop`.

    Raises:
        NativeError: it can't be compiled here.
    """
    results = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    tensors = rewards, values, next_values, terminated, done, gamma, gae_lambda
    given = [x.contiguous() for x in tensors]  # kept alive until the call returns
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*given, *results)]
    load("gae").gae(*(ctypes.c_long(size) for size in rewards.shape), *pointers)
    return results
