"""GAE in C (`gae.c`), for contiguous float32 and bool tensors on a CPU."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

from torch import Tensor

from fastppo.native.library import load


def gae(trajectory: Sequence[Tensor], gamma: Tensor, gae_lambda: Tensor) -> tuple[Tensor, Tensor]:
    """Compute advantages and returns of the tensors of a `functional.gae.Trajectory`, in their order.

    Raises:
        NativeError: it can't be compiled here.
    """
    rewards = trajectory[0]
    results = rewards.new_empty(rewards.shape), rewards.new_empty(rewards.shape)
    given = [x.contiguous() for x in (*trajectory, gamma, gae_lambda)]  # kept alive until the call returns
    pointers = [ctypes.c_void_p(x.data_ptr()) for x in (*given, *results)]
    load("gae").gae(*(ctypes.c_long(size) for size in rewards.shape), *pointers)
    return results
