"""Final returns on tensor environments and on Gymnasium's environments, which should agree.

    python -m benchmarks.tensor_returns

Not timed. Each environment runs with equal settings under `sync` and `tensor`, seeds 1-5, two concurrent runs. Shown:
mean return of the last 100 episodes, as mean over seeds with its standard error.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report

_SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"profile": "tuned", "total_timesteps": 50_000},
    "Pendulum-v1": {"profile": "tuned", "total_timesteps": 40_000},
    "Acrobot-v1": {"n_envs": 16, "n_steps": 128, "learning_rate": 1e-3, "total_timesteps": 60_000},
    "MountainCarContinuous-v0": {"n_envs": 8, "n_steps": 256, "n_minibatches": 8, "total_timesteps": 40_000},
    "fastppo/Catch-v0": {"n_envs": 32, "n_steps": 22, "learning_rate": 1e-3, "total_timesteps": 7_040},
}


@dataclasses.dataclass
class Options:
    """Final returns on tensor and Gymnasium environments."""

    env_id: tuple[str, ...] = tuple(_SETTINGS)
    """Environment ids."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    output: Path | None = None
    """JSON file for the results."""


def train(job: tuple[str, str, int]) -> float:
    from fastppo import Config, Trainer

    env_id, vectorization, seed = job
    with tempfile.TemporaryDirectory() as folder:
        placement = {"env_id": env_id, "vectorization": vectorization, "run_dir": Path(folder) / "run"}
        return Trainer(Config(seed=seed, threads=1, compile="off", **placement, **_SETTINGS[env_id])).run().mean_return


def main(options: Options) -> None:
    rows = []
    with ProcessPoolExecutor(2, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for env_id in options.env_id:
            row: dict[str, Any] = {"env_id": env_id, "steps": _SETTINGS[env_id]["total_timesteps"]}
            for vectorization in ("sync", "tensor"):
                jobs = [(env_id, vectorization, seed) for seed in range(1, options.seeds + 1)]
                returns = list(pool.map(train, jobs))
                row[vectorization] = statistics.mean(returns)
                row[f"{vectorization} s.e."] = statistics.stdev(returns) / len(returns) ** 0.5
                row[f"{vectorization} by seed"] = " ".join(f"{x:.4g}" for x in returns)
            rows.append(row)
            print(row, flush=True)
    report(rows, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
