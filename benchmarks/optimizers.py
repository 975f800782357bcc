"""Returns at equal steps with Adam and with Muon, each over the same grid of learning rates.

    python -m benchmarks.optimizers

Not timed. Tensor environments with the tuned settings, seeds 1 to 5, `--jobs` concurrent runs of one thread. The grid
multiplies the learning rate that was tuned for Adam. Shown: mean over seeds of the mean return of the last 40 training
episodes, with a 95 % bootstrap interval over seeds; then, at each optimiser's best rate, Muon's minus Adam's.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import tempfile
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import report, write

_STEPS = {"CartPole-v1": 25_000, "Pendulum-v1": 20_000}
_OPTIMIZERS = ("adam", "muon")
_EPISODES = 40


@dataclasses.dataclass
class Options:
    """Returns at equal steps with Adam and with Muon."""

    env_id: tuple[str, ...] = tuple(_STEPS)
    """Environment ids."""
    factors: tuple[float, ...] = (0.5, 1.0, 2.0)
    """Factors on the tuned learning rate."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    jobs: int = 2
    """Concurrent runs."""
    output: Path | None = None
    """JSON file for the results, written after each row."""


def train(job: tuple[str, str, float, int]) -> float:
    """Return the mean return of the last episodes of one run."""
    from fastppo import Config, Trainer
    from fastppo.profiles import TUNED

    env_id, optimizer, factor, seed = job
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            env_id=env_id,
            vectorization="tensor",
            profile="tuned",
            optimizer=optimizer,  # type: ignore[arg-type]
            learning_rate=factor * TUNED[env_id]["learning_rate"],
            total_timesteps=_STEPS[env_id],
            seed=seed,
            threads=1,
            compile="off",
            record_ratios=0,
            run_dir=Path(folder) / "run",
        )
        trainer = Trainer(config)
        trainer.run()
        return float(np.mean(trainer.metrics.episodes.latest(_EPISODES)))


def main(options: Options) -> None:
    """Train every combination and print a table."""
    from fastppo.analysis.seeds import bootstrap, mean

    rows: list[dict[str, Any]] = []
    with ProcessPoolExecutor(options.jobs, mp_context=multiprocessing.get_context("forkserver")) as pool:
        for env_id in options.env_id:
            found: dict[str, list[list[float]]] = {name: [] for name in _OPTIMIZERS}
            for optimizer in _OPTIMIZERS:
                for factor in options.factors:
                    jobs = [(env_id, optimizer, factor, seed) for seed in range(1, options.seeds + 1)]
                    returns = list(pool.map(train, jobs))
                    found[optimizer].append(returns)
                    row = {"env_id": env_id, "steps": _STEPS[env_id], "optimizer": optimizer, "rate": factor}
                    rows.append(row | _summary(bootstrap(mean, returns)) | {"seeds": _text(returns)})
                    print(rows[-1], flush=True)
                    write(rows, options.output)
            best = {name: max(found[name], key=np.mean) for name in _OPTIMIZERS}
            gain = [muon - adam for adam, muon in zip(*(best[name] for name in _OPTIMIZERS), strict=True)]
            row = {"env_id": env_id, "steps": _STEPS[env_id], "optimizer": "muon - adam", "rate": "best of each"}
            rows.append(row | _summary(bootstrap(mean, gain)) | {"seeds": _text(gain)})
            write(rows, options.output)
    report(rows, options.output)


def _summary(interval: Any) -> dict[str, str]:
    return {"mean": f"{interval.value:.4g}", "interval": f"{interval.low:.4g} to {interval.high:.4g}"}


def _text(values: list[float]) -> str:
    return " ".join(f"{x:.4g}" for x in values)


if __name__ == "__main__":
    main(tyro.cli(Options))
