"""Which device, how many threads, and every random stream from one seed."""

from __future__ import annotations

import contextlib
import ctypes
import platform
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import threadpoolctl
import torch

from fastppo.errors import ConfigError
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.distributed import local_rank, processes

_CORES = min(torch.get_num_threads(), usable_cores())  # torch's: the machine's, or OMP_NUM_THREADS
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
# Each use of randomness has a stream of its own, so that more of one never shifts another
_STREAMS = ("envs", "weights", "noise", "shuffle", "eval")


def cpu_name() -> str:
    """The processor's model."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def machine_name() -> str:
    """What measurements on this machine may be kept under: the processor and how many cores this process may use."""
    return f"{cpu_name()} x {_CORES}"


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:K` as a device.

    Raises:
        ConfigError: CUDA was asked for and there is none, or not that many.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    # under torchrun each process of a machine takes a GPU of its own
    device = torch.device(f"cuda:{local_rank()}" if name == "cuda" and local_rank() else name)
    if device.index is not None and name != "cuda" and processes() > 1:
        raise ConfigError(f"device={name} under torchrun: each process takes a GPU of its own; use device=cuda.")
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            raise ConfigError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu.")
        if (device.index or 0) >= n:
            raise ConfigError(f"device={name}: there are {n} CUDA devices; the last is cuda:{n - 1}.")
    return device


def choose_threads(work: int) -> int:
    """CPU threads for minibatches of `work` = rows x parameters: one where sharing costs more than it gains.

    Measured on two cores with 9k parameters (benchmarks/update.py): 512 rows 0.87 ms with one thread, 0.80 with two;
    1024 rows 1.45 and 1.14; 2048 rows 3.0 and 2.0; 16384 rows 25 and 15.
    """
    return _CORES if work >= 9_000_000 else 1


def set_threads(torch_threads: int) -> None:
    """Give torch that many threads, and numpy's BLAS one.

    Products of acting are too small to share, and a BLAS helper that waits for its next part spins, taking a core from
    environments and from torch: with two cores and n_envs=512, training is 1.3 times as fast without it
    (vectorization native; pool 1.7).
    """
    torch.set_num_threads(torch_threads)
    threadpoolctl.threadpool_limits(1, user_api="blas")


def keep_freed_memory() -> None:
    """Have the C library keep large blocks that are freed, instead of handing them back and asking for them again.

    An update allocates and frees the same activations in every minibatch. With glibc's defaults each of them is fresh
    from the kernel, zeroed page by page: on two cores a minibatch of 16384 rows takes 19 ms, and 15 without that
    (benchmarks/update.py). Where there is no glibc nothing is done.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that glibc takes
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def seed_stream(seed: int, use: str, rank: int = 0, restart: int = 0) -> np.random.SeedSequence:
    """The random stream of one use ("envs", "weights", "noise", "shuffle", "eval") in a process, from a run's seed.

    `restart`: the iteration from which a run goes on with other streams than it began with.
    """
    key = (rank, restart) if restart else (rank,) if rank else ()
    return np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(use), *key))


def generator(seed: int, use: str, device: torch.device, rank: int = 0, restart: int = 0) -> torch.Generator:
    """A torch generator on `device` for one use in one process."""
    state = int(seed_stream(seed, use, rank, restart).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


@contextlib.contextmanager
def untouched_randomness() -> Iterator[None]:
    """Around what may draw from the process's own random states: they come out as they went in."""
    states = GlobalRandomness()
    before = states.state_dict()
    try:
        yield
    finally:
        states.load_state_dict(before)


class GlobalRandomness:
    """The random states that a process has anyway: training draws from none of them, but a user's code may."""

    def state_dict(self) -> dict[str, Any]:
        """Of torch on the CPU and on each GPU that is in use, numpy and Python."""
        name, words, *rest = np.random.get_state()  # noqa: NPY002 - that one is meant
        version, numbers, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            **{f"cuda{k}": torch.cuda.get_rng_state(k) for k in _gpus()},
            "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
            "numpy_rest": [name, *rest],
            "python": [version, list(numbers), gauss],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set them."""
        name, position, *rest = saved["numpy_rest"]
        words = saved["numpy"].numpy().astype(np.uint32)
        if name != "MT19937" or not 0 <= position <= len(words) == 624:  # numpy doesn't look, and reads what lies there
            raise ValueError("no random state of numpy")
        np.random.set_state((name, words, position, *rest))  # noqa: NPY002
        version, numbers, gauss = saved["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(saved["torch"])
        for k in _gpus():
            if f"cuda{k}" in saved:
                torch.cuda.set_rng_state(saved[f"cuda{k}"], k)


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
