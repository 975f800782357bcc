"""Environment steps per second of each vectorization alone.

    python -m benchmarks.vectorizers --env-id CartPole-v1

Timed: `step` of the vector environment, resets included, with actions drawn beforehand, after 8 warm-up steps. Only
real steps count, not the reset steps of next-step autoreset. A measurement takes a second; rounds are interleaved over
the vectorizations, and the table shows medians over rounds. `gymnasium sync` is Gymnasium's SyncVectorEnv.
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
from fastppo.envs.make_envs import inspect_env, make_vectorized


@dataclasses.dataclass
class Options:
    """Speed of vectorizations."""

    env_id: str = "CartPole-v1"
    """Environment id."""
    n_envs: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of environments."""
    vectorization: tuple[str, ...] = ("gymnasium sync", "sync", "pool", "native", "async")
    """Vectorizations."""
    rounds: int = 5
    """Measurements per vectorization."""
    output: Path | None = None
    """JSON file for the results."""


def main(options: Options) -> None:
    env_info = inspect_env(options.env_id, {})
    factory = env_info.factory
    assert factory is not None
    rows = []
    for n in options.n_envs:
        makers: dict[str, Any] = {}
        for name in options.vectorization:
            if name == "gymnasium sync":
                makers[name] = functools.partial(
                    SyncVectorEnv, [factory] * n, copy=False, autoreset_mode=AutoresetMode.SAME_STEP
                )
            elif name != "async" or n <= 64:  # a process per environment
                makers[name] = functools.partial(make_vectorized, env_info, n, name)
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
