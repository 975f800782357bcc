"""Returns at equal steps with a Gaussian, a squashed Gaussian and a Beta, each over the same learning rates.

    python -m benchmarks.distributions

Not timed. Pendulum has the tuned settings and tensor environments, HalfCheetah CleanRL's settings. The factors multiply
the learning rate, which was chosen for the Gaussian. Shown: mean over seeds of the mean return of the last 20 training
episodes; then, at each distribution's best factor, its difference to the Gaussian's with a 95 % interval, by Welch's t.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import statistics
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report, write
from benchmarks.compat import welch

SETTINGS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {"profile": "tuned", "learning_rate": 1e-3, "vectorization": "tensor"},
    "HalfCheetah-v5": {"learning_rate": 3e-4},
}
DISTRIBUTIONS = ("gaussian", "squashed", "beta")
_EPISODES = 20


@dataclasses.dataclass
class Options:
    """Returns at equal steps by distribution."""

    env_id: tuple[str, ...] = tuple(SETTINGS)
    """Environment ids."""
    factors: tuple[float, ...] = (1.0, 2.0)
    """Factors on the learning rate."""
    steps: int = 300_000
    """Environment steps of each run."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    jobs: int = 1
    """Concurrent runs, of one thread each."""
    output: Path | None = None
    """JSON file for the results, written after each row."""


def settings_of(env_id: str, distribution: str, factor: float) -> dict[str, Any]:
    """Return the settings of a run, without its steps, seed and folder."""
    settings = SETTINGS[env_id] | {"env_id": env_id, "action_distribution": distribution, "threads": 1}
    return settings | {"learning_rate": factor * settings["learning_rate"], "record_ratios": 0}


def train(job: tuple[dict[str, Any], int, int]) -> float:
    """Return the mean return of the last episodes of one run."""
    from fastppo import Config, Trainer

    settings, steps, seed = job
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Config(**settings, total_timesteps=steps, seed=seed, run_dir=Path(folder) / "run"))
        trainer.run()
        return statistics.fmean(trainer.metrics.episodes.latest(_EPISODES))


def main(options: Options) -> None:
    """Train every combination and print a table."""
    if unknown := [name for name in options.env_id if name not in SETTINGS]:
        sys.exit(f"--env-id {unknown[0]}: there are settings for {', '.join(SETTINGS)}.")
    if min(options.seeds, options.jobs, len(options.env_id), len(options.factors)) < 1:
        sys.exit("--seeds, --jobs, --env-id and --factors: at least one of each.")
    rows: list[dict[str, Any]] = []
    seeds = range(1, options.seeds + 1)
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for env_id in options.env_id:
            best: dict[str, list[float]] = {}
            for distribution in DISTRIBUTIONS:
                for factor in options.factors:
                    settings = settings_of(env_id, distribution, factor)
                    returns = list(pool.map(train, [(settings, options.steps, seed) for seed in seeds]))
                    best[distribution] = max(best.get(distribution, returns), returns, key=statistics.fmean)
                    rows.append(_row(env_id, options.steps, distribution, factor, statistics.fmean(returns)))
                    rows[-1]["seeds"] = " ".join(f"{x:.4g}" for x in returns)
                    print(rows[-1], flush=True)
                    write(rows, options.output, settings=SETTINGS)
            for distribution in DISTRIBUTIONS[1:] if options.seeds > 1 else ():
                ours, gaussian = best[distribution], best["gaussian"]
                difference, half = statistics.fmean(ours) - statistics.fmean(gaussian), welch(ours, gaussian)
                rows.append(_row(env_id, options.steps, f"{distribution} - gaussian", "best of each", difference))
                rows[-1]["95 % interval"] = f"{difference - half:.4g} to {difference + half:.4g}"
    report(rows, options.output, settings=SETTINGS)


def _row(env_id: str, steps: int, distribution: str, rate: float | str, mean: float) -> dict[str, Any]:
    row = {"env_id": env_id, "steps": steps, "distribution": distribution, "rate": rate, "mean": f"{mean:.4g}"}
    return row | {"95 % interval": "", "seeds": ""}


if __name__ == "__main__":
    main(tyro.cli(Options))
