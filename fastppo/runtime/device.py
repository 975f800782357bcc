"""Which device, how many threads, and every random stream from one seed."""

from __future__ import annotations

import numpy as np
import torch

from fastppo.errors import ConfigError

_CORES = torch.get_num_threads()  # as torch found it: the machine's, or OMP_NUM_THREADS
# Each use of randomness has a stream of its own, so that more of one never shifts another
_STREAMS = ("envs", "weights", "noise", "shuffle", "eval")


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda` or `cuda:K` as a device.

    Raises:
        ConfigError: CUDA was asked for and there is none, or not that many.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        n = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if n == 0:
            raise ConfigError(f"device={name}: this torch ({torch.__version__}) sees no CUDA device; use device=cpu.")
        if (device.index or 0) >= n:
            raise ConfigError(f"device={name}: there are {n} CUDA devices; the last is cuda:{n - 1}.")
    return device


def choose_threads(work: int) -> int:
    """CPU threads for minibatches of `work` = rows x parameters: one where sharing costs more than it gains.

    Measured on two cores with 9k parameters (benchmarks/update.py): 128 rows 0.37 ms with one thread, 0.47 with two;
    512 rows 0.85 and 1.0; 2048 rows 3.2 and 2.9; 16384 rows 30 and 17.
    """
    return _CORES if work >= 10_000_000 else 1


def seed_stream(seed: int, use: str) -> np.random.SeedSequence:
    """The random stream of one use ("envs", "weights", "noise", "shuffle", "eval") under a run's seed."""
    return np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(use),))


def generator(seed: int, use: str, device: torch.device) -> torch.Generator:
    """A torch generator on `device` for one use."""
    state = int(seed_stream(seed, use).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)
