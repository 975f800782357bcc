"""Random streams, all derived from a run's seed; and the global random states that user code may draw from."""

from __future__ import annotations

import contextlib
import hashlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch

from fastppo.errors import ConfigError, kind_of

# One stream per purpose, so that drawing more from one never shifts another
_STREAMS = ("envs", "weights", "noise", "shuffle", "eval", "rnd")


def seed_stream(seed: int, use: str, rank: int = 0, offset: int = 0) -> np.random.SeedSequence:
    """Return the seed sequence of one purpose in one process.

    Args:
        seed: of the run.
        use: "envs", "weights", "noise", "shuffle", "eval" or "rnd".
        rank: of the process.
        offset: iteration from which a resumed run draws from new streams; 0 for the original ones.

    Raises:
        ConfigError: a negative seed, or one that is no whole number.
        ValueError: unknown `use`.
    """
    if not isinstance(seed, (int, np.integer)):
        raise ConfigError(f"seed is {kind_of(seed)}; give a whole number, at least 0.")
    if seed < 0:
        raise ConfigError(f"seed={seed} must be at least 0; nearest valid value: 0.")
    key = (rank, offset) if offset else (rank,) if rank else ()
    return np.random.SeedSequence(seed, spawn_key=(_STREAMS.index(use), *key))


def generator(seed: int, use: str, device: torch.device, rank: int = 0, offset: int = 0) -> torch.Generator:
    """Return a torch generator on `device`, seeded from `seed_stream`."""
    state = int(seed_stream(seed, use, rank, offset).generate_state(1, np.uint64)[0])
    return torch.Generator(device).manual_seed(state >> 1)


def restore_generator(generator: torch.Generator, state: torch.Tensor) -> None:
    """Restore a generator from its `get_state()`.

    A CPU's state and a GPU's differ in size. One of the other kind of device seeds a new stream with its hash.
    """
    state = state.cpu()
    if len(state) == len(generator.get_state()):
        generator.set_state(state)
    else:
        digest = hashlib.blake2b(state.numpy().tobytes(), digest_size=8).digest()
        generator.manual_seed(int.from_bytes(digest) >> 1)


def global_states() -> dict[str, bytes]:
    """Return the state of each module's global random stream, to find out whether code draws from it."""
    _, words, *rest = np.random.get_state()  # noqa: NPY002 - the global state is meant
    return {
        "numpy": np.asarray(words).tobytes() + repr(rest).encode(),
        "random": repr(random.getstate()).encode(),
        "torch": torch.get_rng_state().numpy().tobytes(),
    }


class GlobalRandomState:
    """The global random states of torch, numpy and Python. Training draws from none of them; user code may."""

    def state_dict(self) -> dict[str, Any]:
        """Return the states of torch on the CPU and, once CUDA is initialised, on each GPU; of numpy; of Python."""
        name, words, *rest = np.random.get_state()  # noqa: NPY002 - the global state is meant
        version, numbers, gauss = random.getstate()
        return {
            "torch": torch.get_rng_state(),
            **{f"cuda{k}": torch.cuda.get_rng_state(k) for k in _gpus()},
            "numpy": torch.from_numpy(np.asarray(words).astype(np.int64)),
            "numpy_rest": [name, *rest],
            "python": [version, list(numbers), gauss],
        }

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore the states from `state_dict()`.

        Raises:
            ValueError: invalid numpy state.
        """
        name, position, *rest = saved["numpy_rest"]
        words = saved["numpy"].numpy().astype(np.uint32)
        # numpy doesn't check: a position outside the array would read foreign memory
        if name != "MT19937" or not 0 <= position <= len(words) == 624:
            raise ValueError(f"invalid numpy random state: {name}, {len(words)} words, position {position}")
        np.random.set_state((name, words, position, *rest))  # noqa: NPY002
        version, numbers, gauss = saved["python"]
        random.setstate((version, tuple(numbers), gauss))
        torch.set_rng_state(saved["torch"])
        for k in _gpus():
            if f"cuda{k}" in saved:
                torch.cuda.set_rng_state(saved[f"cuda{k}"], k)


@contextlib.contextmanager
def preserve_global_random_state() -> Iterator[None]:
    """Restore the global random states on exit, whatever the body draws."""
    states = GlobalRandomState()
    before = states.state_dict()
    try:
        yield
    finally:
        states.load_state_dict(before)


def _gpus() -> range:
    return range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)  # type: ignore[no-untyped-call]
