"""`fastppo train --seeds`: a run for each of several seeds, and a summary of their returns.

Every run has its own process and its own folder. Work that was killed continues: it reads the runs that have ended and
resumes the ones that were interrupted.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastppo.analysis.run_data import RunData, read_run
from fastppo.analysis.study import run_cores
from fastppo.analysis.training_processes import claim_folder, ended
from fastppo.config import Config
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.device import choose_device
from fastppo.runtime.files import write_json

_Array = np.ndarray[Any, np.dtype[np.float64]]

_RESAMPLES = 10_000


@dataclasses.dataclass(frozen=True)
class Interval:
    """A statistic over seeds with its 95 % interval, NaN where there is none."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        """Return "value (low to high)"; "-" without a value, the value alone without an interval."""
        if math.isnan(self.value):
            return "-"
        return f"{self.value:,.1f}" + ("" if math.isnan(self.low) else f" ({self.low:,.1f} to {self.high:,.1f})")


@dataclasses.dataclass(frozen=True)
class Summary:
    """Results of the seeds.

    Attributes:
        seeds: all seeds.
        runs: runs that have ended, by seed.
        failures: error of each seed that failed.
        returns: final mean return of each run that ended, without those in which no episode ended.
        mean: mean of the returns.
        iqm: interquartile mean of the returns.
    """

    seeds: list[int]
    runs: dict[int, RunData]
    failures: dict[int, str]
    returns: dict[int, float]
    mean: Interval
    iqm: Interval


def plan_seeds(base: Config, seeds: int, folder: Path) -> list[Config]:
    """Return the config of each run: seeds `base.seed` to `base.seed + seeds - 1`, in folders below `folder`."""
    return [
        dataclasses.replace(base, seed=seed, resume="auto", run_dir=folder / "runs" / f"seed{seed}")
        for seed in range(base.seed, base.seed + seeds)
    ]


def begin_seeds(base: Config, folder: Path) -> None:
    """Create the folder and record the settings in it, or check that they continue the seeds that it holds.

    Raises:
        ConfigError: the folder holds other files or seeds with other settings, or can't be created.
    """
    claim_folder(folder, "set of seeds", base)


def choose_jobs(config: Config, seeds: int) -> int:
    """Return the number of concurrent runs that do not compete for cores.

    Raises:
        ConfigError, EnvError: the environment or its settings can't be used.
    """
    cores = run_cores(config, inspect_configured(config), choose_device(config.device))
    return max(1, min(seeds, usable_cores() // cores))


def mean(values: _Array) -> _Array:
    """Return the mean over the last axis, [..., n] -> [...]."""
    result: _Array = values.mean(-1)
    return result


def interquartile_mean(values: _Array) -> _Array:
    """Return the mean of the middle half over the last axis, [..., n] -> [...].

    floor(n / 4) values are left out at each end (Agarwal et al. 2021, "Deep Reinforcement Learning at the Edge of the
    Statistical Precipice").
    """
    from scipy import stats

    result: _Array = stats.trim_mean(values, 0.25, axis=-1)
    return result


def bootstrap(statistic: Callable[..., _Array], *samples: Sequence[float]) -> Interval:
    """Return a statistic of one or several samples with its 95 % percentile bootstrap interval.

    Each sample of n values is drawn again from itself, n values with replacement, 10,000 times from a fixed seed: with
    one sample per environment, this is the stratified bootstrap of Agarwal et al. 2021. The interval reaches from the
    2.5 % to the 97.5 % quantile of the statistic over these draws. It has no bounds if a sample has fewer than two
    values, and is too narrow for fewer than about five.

    SciPy computes it: `rliable` gives the same numbers, but needs equally many seeds in each environment, and pandas,
    statsmodels and seaborn.

    Args:
        statistic: of the samples, [..., n] each -> [...].
        samples: one value per seed in each.
    """
    given = [np.array(values, dtype=np.float64) for values in samples]
    if not all(len(values) for values in given):
        return Interval(math.nan, math.nan, math.nan)
    value = float(statistic(*given))
    if any(len(values) < 2 for values in given):
        return Interval(value, math.nan, math.nan)
    from scipy import stats  # takes a second to import

    found = stats.bootstrap(
        given,
        lambda *drawn, axis: statistic(*drawn),
        n_resamples=_RESAMPLES,
        vectorized=True,
        axis=-1,
        method="percentile",
        rng=np.random.default_rng(0),
    )
    return Interval(value, float(found.confidence_interval.low), float(found.confidence_interval.high))


def summarize(configs: Sequence[Config], failures: Mapping[int, str]) -> Summary:
    """Return the results so far; `failures` holds errors by seed."""
    runs = {c.seed: read_run(c.run_dir) for c in configs if c.run_dir is not None and ended(c)}
    found = {seed: run.result["mean_return"] for seed, run in runs.items()}
    returns = {seed: float(value) for seed, value in found.items() if value is not None}
    values = list(returns.values())
    return Summary(
        seeds=[config.seed for config in configs],
        runs=runs,
        failures=dict(failures),
        returns=returns,
        mean=bootstrap(mean, values),
        iqm=bootstrap(interquartile_mean, values),
    )


def in_words(summary: Summary) -> str:
    """Return the statistics in a sentence."""
    n = len(summary.returns)
    if n < 2:
        return f"{'One seed has' if n else 'No seed has'} a mean return, so there is no interval."
    values = list(summary.returns.values())
    narrow = " Fewer than five seeds: the intervals are too narrow." if n < 5 else ""
    return (
        f"Mean return over {n} seeds: {summary.mean}; interquartile mean {summary.iqm}; "
        f"median {statistics.median(values):,.1f}; {min(values):,.1f} to {max(values):,.1f}. "
        f"In brackets: 95 % bootstrap intervals.{narrow}"
    )


def outcome(config: Config) -> str:
    """Return the outcome of a run that has ended, as text."""
    assert config.run_dir is not None
    result = json.loads((config.run_dir / "result.json").read_text())
    value = "no episode ended" if result["mean_return"] is None else f"mean return {result['mean_return']:,.1f}"
    return f"{value} in {result['global_step']:,} steps, {result['seconds']:.1f} s"


def write_summary(folder: Path, summary: Summary) -> None:
    """Write seeds.json."""
    values = {
        "seeds": summary.seeds,
        "mean": dataclasses.asdict(summary.mean),
        "iqm": dataclasses.asdict(summary.iqm),
        "failures": summary.failures,
        "runs": [{"seed": seed, "run_dir": str(run.run_dir)} | run.result for seed, run in summary.runs.items()],
    }
    # JSON has no NaN: write null instead
    write_json(folder / "seeds.json", json.loads(json.dumps(values, default=str), parse_constant=lambda _: None))
