"""Whether what `fastppo bench` predicts comes true: a part is made twice as fast and the gain is measured.

    python -m benchmarks.verdicts

Timed: points of `fastppo bench`. The environment is CartPole that spins until its step has taken a given time, which is
then halved; the update is halved by half the epochs. What surrounds them (wrappers, laying out the batch) doesn't get
faster with them, so `times as fast` is what the part gained when it ran alone. Predicted is what the slower point says
of itself for that; measured is the ratio of steps per second, less one. Rounds are interleaved; medians over them are
given.
"""

from __future__ import annotations

import dataclasses
import statistics
import time
from pathlib import Path
from typing import Any

import gymnasium as gym
import tyro
from gymnasium.envs.classic_control.cartpole import CartPoleEnv

from benchmarks import report
from fastppo import Config
from fastppo.analysis.bench import run_points


class Spinning(CartPoleEnv):
    """CartPole whose step takes `seconds`."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self._seconds = seconds

    def step(self, action: Any) -> Any:
        end = time.perf_counter() + self._seconds
        result = super().step(action)
        while time.perf_counter() < end:
            pass
        return result


gym.register("Spinning-v0", entry_point=Spinning, max_episode_steps=500)


@dataclasses.dataclass
class Options:
    """Predictions of bench against measurements."""

    cases: tuple[int, ...] = (0, 1, 2, 3)
    """Which of CASES, counted from 0."""
    rounds: int = 3
    """Measurements of each."""
    seconds: float = 3.0
    """Of training at each."""
    output: Path | None = None
    """JSON file for the results."""


CASES: list[dict[str, Any]] = [
    {"n_envs": 8, "vectorization": "sync"},
    {"n_envs": 64, "vectorization": "sync"},
    {"n_envs": 64, "vectorization": "pool"},
    {"n_envs": 64, "vectorization": "pool", "half_batches": True},
]


def main(options: Options) -> None:
    rows = []
    for case in (CASES[i] for i in options.cases):
        base = {"env_id": "benchmarks.verdicts:Spinning-v0", "n_steps": 128, **case}
        slow = Config(env_kwargs={"seconds": 60e-6}, **base)
        halves = {"env": Config(env_kwargs={"seconds": 30e-6}, **base)}
        halves["update"] = dataclasses.replace(slow, update_epochs=2)
        slow = dataclasses.replace(slow, update_epochs=4)
        halves["env"] = dataclasses.replace(halves["env"], update_epochs=4)
        predicted: dict[str, list[float]] = {part: [] for part in halves}
        measured: dict[str, list[float]] = {part: [] for part in halves}
        faster: dict[str, list[float]] = {part: [] for part in halves}
        for _ in range(options.rounds):
            before, *after = run_points([slow, *halves.values()], options.seconds)
            if before.failure:
                raise SystemExit(before.failure)
            for part, point in zip(halves, after, strict=True):
                faster[part].append(point.ceilings[part] / before.ceilings[part])
                predicted[part].append(before.gain(part, faster[part][-1]))
                measured[part].append(point.sps / before.sps - 1)
        for part in halves:
            row: dict[str, Any] = {"n_envs": case["n_envs"], "how": case["vectorization"]}
            row |= {"halves": case.get("half_batches", False), "part": part}
            row |= {"times as fast": statistics.median(faster[part])}
            row |= {"predicted": statistics.median(predicted[part]), "measured": statistics.median(measured[part])}
            rows.append(row)
            print(row, flush=True)
    report(rows, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
