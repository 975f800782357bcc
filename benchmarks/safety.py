"""What looking after a run costs, toggled at random from one iteration to the next within one run.

    python -m benchmarks.safety --output benchmarks/results/safety_2core-cpu_2026-11-21.json

checks: observations held against their space, shapes and types of every step's results, finite observations and
rewards; on, or replaced by nothing. In the pool only what the trainer's process does is toggled; its workers run the
same lines as sync does. Gradients are checked within the compiled update, which always does it.
sample: one update looked into (`--record-ratios`), once in 20 iterations here and `share` of the time at the default of
20 times in a run of 1,000 iterations; with `--log-histograms` too.
save: share of the time that saving takes with a checkpoint every 10 s, far more often than the default.

Each ratio is the median over pairs of neighbouring iterations, of which one was with and one without, with a 95 %
interval from resampling the pairs: runs one after the other differ by 15 % on a shared machine, neighbours less.
"""

from __future__ import annotations

import itertools
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import report
from fastppo import Config, Trainer
from fastppo.envs import serial
from fastppo.envs.serial import Share
from fastppo.metrics import Metrics

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole, 4 sync": {"env_id": "CartPole-v1", "n_envs": 4, "vectorization": "sync"},
    "CartPole, 64 sync": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "sync"},
    "CartPole, 64 pool": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "pool"},
    "CartPole, 512 native": {"env_id": "CartPole-v1", "n_envs": 512, "vectorization": "native"},
    "HalfCheetah, 8 sync": {"env_id": "HalfCheetah-v5", "n_envs": 8, "vectorization": "sync", "n_steps": 128},
}


class _Anything:
    """Checks nothing."""

    def issuperset(self, types: object) -> bool:
        return True


def measure(name: str, seconds: float) -> dict[str, Any]:
    """One run of one setting."""
    rng = np.random.default_rng(1)
    originals = (Metrics._broken, Metrics._outside, Share._check_shape, serial._BOOLS, serial._NUMBERS)

    def toggle(on: bool) -> None:
        nothing = torch.zeros(1)
        without: Any = (
            lambda self: nothing,
            lambda self: nothing,
            lambda self, where, obs: None,
            _Anything(),
            _Anything(),
        )
        chosen: Any = originals if on else without
        Metrics._broken, Metrics._outside, Share._check_shape, serial._BOOLS, serial._NUMBERS = chosen

    kinds = ("none", "sample", "histograms")
    seen: list[tuple[bool, str, float]] = []  # of each iteration: checks on, what was looked at, seconds
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            **SETTINGS[name],
            checkpoint_minutes=10 / 60,
            total_timesteps=10**9,
            compile="on",
            log_histograms=True,
            run_dir=Path(folder) / "run",
        )
        trainer = Trainer(config)
        sampler, kind = trainer._sampler, "none"
        sampler.due = lambda iteration: kind != "none"  # type: ignore[method-assign]
        began, before = time.monotonic(), float("inf")
        toggle(on := True)
        for stats in trainer.iterations():
            took, before = trainer.clock.seconds - before, trainer.clock.seconds
            saves = stats.scalars["time/save"] > 0.01 * took  # measured by itself
            if stats.iteration > 5 and took > 0 and not saves:
                seen.append((on, kind, took))
            if time.monotonic() - began > seconds:
                break
            kind = str(rng.choice(kinds, p=[0.7, 0.15, 0.15]))
            sampler._histograms = kind == "histograms"
            toggle(on := kind != "none" or bool(rng.integers(2)))
        spent = trainer.clock.phase_seconds()
    toggle(True)
    out: dict[str, Any] = {"setting": name, "iterations": len(seen)}
    out["iteration ms"] = float(np.median([took for _, _, took in seen])) * 1e3
    plain = (True, "none")
    out["checks: on / off"] = "{:.3f} ({:.3f}-{:.3f})".format(*_ratio(rng, seen, plain, (False, "none")))
    for what in kinds[1:]:
        ratio, low, high = _ratio(rng, seen, (True, what), plain)
        out[f"{what}: an iteration's worth"] = f"{ratio - 1:.2f} ({low - 1:.2f}-{high - 1:.2f})"
        out[f"{what}: share, 20 in 1,000"] = f"{(ratio - 1) * 20 / 1000:.2%}"
    out["save: share, each 10 s"] = f"{spent['save'] / sum(spent.values()):.2%}"
    return out


def _ratio(
    rng: np.random.Generator, seen: list[tuple[bool, str, float]], one: tuple[bool, str], other: tuple[bool, str]
) -> tuple[float, float, float]:
    """Seconds of `one` to those of `other` where they follow each other, either way round: median and 95 % interval."""
    logs = []
    for (*a, before), (*b, after) in itertools.pairwise(seen):
        if (tuple(a), tuple(b)) == (one, other):
            logs.append(np.log(before / after))
        elif (tuple(a), tuple(b)) == (other, one):
            logs.append(np.log(after / before))
    draws = [np.median(rng.choice(logs, len(logs))) for _ in range(500)]
    middle, low, high = np.exp([np.median(logs), *np.quantile(draws, (0.025, 0.975))])
    return float(middle), float(low), float(high)


def main(seconds: float = 60.0, settings: tuple[str, ...] = tuple(SETTINGS), output: Path | None = None) -> None:
    """Measure each setting for so long."""
    rows = []
    for name in settings:
        rows.append(measure(name, seconds))
        print(rows[-1], flush=True)
    report(rows, output)


if __name__ == "__main__":
    tyro.cli(main)
