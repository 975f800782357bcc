"""Predicted and measured gains of `fastppo bench`: make a part faster and measure the gain.

    python -m benchmarks.verdicts

Timed: points of `fastppo bench`. The environment is CartPole with a busy wait up to a given time per step, which is
then halved; the update is halved by half the epochs. Work around them (wrappers, layout of the batch) does not get
faster, so `times as fast` is the measured ratio of the part alone. `predicted` is the gain that the slower point
predicts for this ratio; `measured` is the ratio of steps per second minus one. Rounds are interleaved; the table shows
medians.
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
    """CartPole with steps of `seconds`."""

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
    """Predicted and measured gains of bench."""

    cases: tuple[int, ...] = (0, 1, 2, 3)
    """Indices into CASES."""
    rounds: int = 3
    """Measurements per case."""
    seconds: float = 3.0
    """Seconds of training per measurement."""
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
