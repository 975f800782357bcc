"""Training speed by N, T and width of the network.

    python -m benchmarks.scaling

Timed: real training iterations as in `fastppo bench` (a fresh process per point, native CartPole, 4 epochs,
4 minibatches, compiled). One of N, T and width varies, the others stay at 64, 128 and 64. Steps per second are those of
the median iteration; shares are shares of the time.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import tyro

from benchmarks import report
from fastppo import Config
from fastppo.analysis.bench import run_points


@dataclasses.dataclass
class Options:
    """Training speed by N, T and width."""

    seconds: float = 3.0
    """Seconds of training per point."""
    output: Path | None = None
    """JSON file for the results."""


def main(options: Options) -> None:
    base = {"n_envs": 64, "n_steps": 128, "hidden_sizes": (64, 64), "vectorization": "native"}
    changes = [{"n_envs": n} for n in (4, 16, 64, 256, 1024, 4096)]
    changes += [{"n_steps": t} for t in (32, 512, 2048)]
    changes += [{"hidden_sizes": (width, width)} for width in (32, 128, 256, 512)]
    rows = []
    for change in changes:
        (point,) = run_points([Config(**(base | change))], options.seconds)  # type: ignore[arg-type]
        config = base | change
        row = {"n_envs": config["n_envs"], "n_steps": config["n_steps"], "width": config["hidden_sizes"][0]}
        row |= {"steps/s": point.sps, **{f"{name} share": round(x, 3) for name, x in point.phases.items()}}
        row |= {"peak MB": point.peak_mb, "planned MB": point.planned_mb}
        rows.append(row)
        print(row if not point.failure else point.failure, flush=True)
    report(rows, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
