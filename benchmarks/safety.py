"""Cost of checks, update samples and checkpoints, toggled at random between the iterations of one run.

    python -m benchmarks.safety --output benchmarks/results/safety_2core-cpu_2026-11-21.json

checks: observations within their space, shapes and types of every step's results, finite observations and rewards; on,
or replaced by functions that do nothing. With the pool only the checks of the trainer's process are toggled; the
workers run the same code as sync. The gradient check is part of the compiled update and always on. `by a clock` is the
share of an iteration spent in the checks themselves, below the noise of whole iterations; it leaves out the comparison
of each observation's shape, an inline expression of 0.1 us per step.
sample: sampling one update (`--record-ratios`), here about every 20 iterations; `share` is its share of the time at the
default rate of 20 samples in a run of 1,000 iterations. `histograms` adds `--log-histograms`.
save: share of the time that saving takes with a checkpoint every 10 s, far more often than the default.

Each ratio is the median over pairs of neighbouring iterations, one with and one without, with a 95 % interval from
resampling the pairs: consecutive runs differ by 15 % on a shared machine, neighbouring iterations by less.
"""

from __future__ import annotations

import inspect
import itertools
import tempfile
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import tyro

from benchmarks import report
from fastppo import Config, Trainer
from fastppo.envs import env_group
from fastppo.envs.env_group import EnvGroup
from fastppo.ppo.metrics import Metrics

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole, 4 sync": {"env_id": "CartPole-v1", "n_envs": 4, "vectorization": "sync"},
    "CartPole, 64 sync": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "sync"},
    "CartPole, 64 pool": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "pool"},
    "CartPole, 512 native": {"env_id": "CartPole-v1", "n_envs": 512, "vectorization": "native"},
    "HalfCheetah, 8 sync": {"env_id": "HalfCheetah-v5", "n_envs": 8, "vectorization": "sync", "n_steps": 128},
}


class _Timed:
    """Total time of wrapped calls, minus the time of the timing itself."""

    def __init__(self) -> None:
        self._seconds, self._calls, self._own = 0.0, 0, 0.0
        nothing = self(lambda: None)
        for _ in range(10_000):
            nothing()
        self._own = self.taken() / 10_000

    def taken(self) -> float:
        """Return the seconds since the last call of this method."""
        seconds = self._seconds - self._calls * self._own
        self._seconds, self._calls = 0.0, 0
        return seconds

    def __call__(self, check: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any) -> Any:
            begin = time.perf_counter()
            try:
                return check(*args)
            finally:
                self._seconds += time.perf_counter() - begin
                self._calls += 1

        return timed


def _step_without_comparing_shapes() -> Any:
    """Return `EnvGroup._step_on` without its shape check, two inline lines that no function holds."""
    source = textwrap.dedent(inspect.getsource(EnvGroup._step_on))
    lines = [line for line in source.splitlines() if '"shape"' not in line and "_check_shape" not in line]
    assert len(lines) == len(source.splitlines()) - 2, "EnvGroup._step_on has changed"
    namespace: dict[str, Any] = {}
    exec("from __future__ import annotations\n" + "\n".join(lines), vars(env_group), namespace)
    return namespace["_step_on"]


def measure(name: str, seconds: float) -> dict[str, Any]:
    """Measure one setting in one run; return its row."""
    rng = np.random.default_rng(1)
    nothing, anything, clock = torch.zeros(1), SimpleNamespace(issuperset=lambda types: True), _Timed()
    bools, numbers = (SimpleNamespace(issuperset=clock(x.issuperset)) for x in (env_group._BOOLS, env_group._NUMBERS))
    checks = (Metrics._broken, Metrics._outside, EnvGroup._check_shape)
    unchecked = (lambda self: nothing, lambda self: nothing, lambda self, where, obs: None)
    ways: dict[str, Any] = {
        "on": (*checks, env_group._BOOLS, env_group._NUMBERS, EnvGroup._step_on),
        "off": (*unchecked, anything, anything, _step_without_comparing_shapes()),
        "timed": (*map(clock, checks), bools, numbers, EnvGroup._step_on),
    }

    def put(way: str) -> None:
        Metrics._broken, Metrics._outside, EnvGroup._check_shape, *others = ways[way]
        env_group._BOOLS, env_group._NUMBERS, EnvGroup._step_on = others

    kinds = ("none", "sample", "histograms")
    seen: list[tuple[str, str, float]] = []  # of each iteration: checks, kind of sample, seconds
    shares: list[float] = []  # of each timed iteration: share of the checks
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
        put(way := "on")
        for stats in trainer.iterations():
            took, before = trainer.clock.seconds - before, trainer.clock.seconds
            saves = stats.scalars["time/save"] > 0.01 * took  # saving has a row of its own
            if stats.iteration > 5 and took > 0 and not saves:
                seen.append((way, kind, took))
                if way == "timed":
                    shares.append(clock.taken() / took)
            clock.taken()
            if time.monotonic() - began > seconds:
                break
            kind = str(rng.choice(kinds, p=[0.7, 0.15, 0.15]))
            sampler._histograms = kind == "histograms"
            put(way := "on" if kind != "none" else str(rng.choice(("on", "off", "timed"), p=[0.4, 0.4, 0.2])))
        spent = trainer.clock.phase_seconds()
    put("on")
    saving = spent["save"] / sum(spent.values())
    return {"setting": name, **_row(rng, seen, shares), "save: share, each 10 s": f"{saving:.2%}"}


def _row(rng: np.random.Generator, seen: list[tuple[str, str, float]], shares: list[float]) -> dict[str, Any]:
    """Return ratios and shares of the checks and of samples, from the iterations of `measure`."""
    out: dict[str, Any] = {
        "iterations": len(seen),
        "iteration ms": float(np.median([took for _, _, took in seen])) * 1e3,
    }
    plain = ("on", "none")
    out["checks: on / off"] = "{:.3f} ({:.3f}-{:.3f})".format(*_ratio(rng, seen, plain, ("off", "none")))
    out["checks: by a clock"] = f"{np.median(shares):.2%}"
    for what in ("sample", "histograms"):
        ratio, low, high = _ratio(rng, seen, ("on", what), plain)
        out[f"{what}: an iteration's worth"] = f"{ratio - 1:.2f} ({low - 1:.2f}-{high - 1:.2f})"
        out[f"{what}: share, 20 in 1,000"] = f"{(ratio - 1) * 20 / 1000:.2%}"
    return out


def _ratio(
    rng: np.random.Generator, seen: list[tuple[str, str, float]], one: tuple[str, str], other: tuple[str, str]
) -> tuple[float, float, float]:
    """Return median and 95 % interval of the time ratio of `one` to `other` over neighbouring iterations."""
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
    """Measure each setting for `seconds`."""
    rows = []
    for name in settings:
        rows.append(measure(name, seconds))
        print(rows[-1], flush=True)
    report(rows, output)


if __name__ == "__main__":
    tyro.cli(main)
