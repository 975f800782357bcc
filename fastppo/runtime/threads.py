"""CPU threads of torch and numpy, and the C library's allocator."""

from __future__ import annotations

import contextlib
import ctypes

import threadpoolctl
import torch

from fastppo.errors import ConfigError
from fastppo.runtime.cores import usable_cores

# read at import, before `set_threads`; torch's own limit is the machine's cores or OMP_NUM_THREADS
CORES = min(torch.get_num_threads(), usable_cores())
_MOST_PER_CORE = 8  # threads
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h


def choose_threads(work: int, *, in_c: bool = False) -> int:
    """Return the CPU threads for minibatches of `work` = rows x parameters: 1 where more would cost more than it gains.

    An update `in_c` divides a minibatch once, where torch divides each operation, so it gains from smaller ones on.

    Measured on two cores with 9k parameters (benchmarks/update.py), in ms per minibatch:

        rows          512   1024   2048   16384
        one thread   0.87   1.45    3.0      25
        two threads  0.80   1.14    2.0      15
    """
    return CORES if work >= (2_000_000 if in_c else 9_000_000) else 1


def check_threads(threads: int, *, resumed: bool) -> list[str]:
    """Return a note if `threads` exceed the cores, as they may to repeat the rounding of a larger machine.

    Raises:
        ConfigError: they exceed the cores more than eightfold, and the run is not `resumed` from another machine.
    """
    cores = usable_cores()
    if threads > _MOST_PER_CORE * cores and not resumed:
        raise ConfigError(
            f"threads={threads}, but this process may use {cores} core{'s' if cores > 1 else ''}; give at most {cores} "
            f"(up to {_MOST_PER_CORE * cores} to repeat a run of a larger machine bit for bit)."
        )
    if threads > cores:
        return [f"threads {threads}: more than the {cores} usable cores, so they wait for each other."]
    return []


def set_threads(torch_threads: int) -> None:
    """Set the number of torch's CPU threads, and limit numpy's BLAS to one.

    The matrix products of acting are too small to split. A BLAS thread that waits for its next part spins, which takes
    a core from the environments and from torch: limiting it makes training 1.3 times as fast on two cores with
    n_envs=512 (vectorization native; pool: 1.7 times).
    """
    torch.set_num_threads(torch_threads)
    threadpoolctl.threadpool_limits(1, user_api="blas")


def keep_freed_memory() -> None:
    """Make the C library keep large freed blocks for reuse instead of returning them to the kernel.

    Every minibatch allocates and frees the same activations. With glibc's defaults each of them comes fresh from the
    kernel, zeroed page by page: a minibatch of 16384 rows takes 19 ms on two cores, and 15 ms with the blocks kept
    (benchmarks/update.py). Does nothing without glibc.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # glibc's maximum
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)
