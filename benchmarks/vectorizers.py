"""Environment steps per second of each vectorisation, nothing else running.

    python -m benchmarks.vectorizers --env-id CartPole-v1

Timed: `step` of the vector environment with random actions drawn beforehand, resets within it, the first 8 left out;
real steps only (a next-step environment's resets don't count). Each measurement takes a second, rounds are interleaved
over the vectorisations, and the median of five is given. `gymnasium sync` is Gymnasium's SyncVectorEnv, `sync` ours.
"""

from __future__ import annotations

import dataclasses
import functools
import statistics
from pathlib import Path
from typing import Any

import tyro
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from benchmarks import report
from fastppo.envs.auto_vectorization import _speed
from fastppo.envs.registry import inspect_env, make_vectorized


@dataclasses.dataclass
class Options:
    """Vectorisations."""

    env_id: str = "CartPole-v1"
    """Environment."""
    n_envs: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of environments."""
    vectorization: tuple[str, ...] = ("gymnasium sync", "sync", "pool", "native", "async")
    """Which."""
    rounds: int = 5
    """Measurements of each."""
    output: Path | None = None
    """JSON file for the results."""


def main(options: Options) -> None:
    found = inspect_env(options.env_id, {})
    assert found.factory is not None
    factory = found.factory
    rows = []
    for n in options.n_envs:
        makers: dict[str, Any] = {}
        for name in options.vectorization:
            if name == "gymnasium sync":
                makers[name] = functools.partial(
                    SyncVectorEnv, [factory] * n, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
                )
            elif name != "async" or n <= 64:  # a process each
                makers[name] = functools.partial(make_vectorized, found, n, name)
        speeds: dict[str, list[float]] = {name: [] for name in makers}
        for _ in range(options.rounds):
            for name, make in makers.items():
                speeds[name].append(_speed(make(), 1.0))
        rows.append({"n_envs": n} | {name: _median(speeds.get(name)) for name in options.vectorization})
        print(rows[-1], flush=True)
    report(rows, options.output, env_id=options.env_id)


def _median(speeds: list[float] | None) -> float | str:
    return statistics.median(speeds) if speeds else "-"


if __name__ == "__main__":
    main(tyro.cli(Options))
