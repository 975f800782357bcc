"""Training speed of one, two and four trainings at the same time on one machine.

    python -m benchmarks.side_by_side

Trainings of one go start together, as a user starts several seeds. Once all have taken a few iterations, steps per
second of each are measured over the same seconds; then all are stopped. Goes of one, two and four alternate. A share is
the mean speed of a go's trainings, divided by the speed of the one that ran alone in the same round. On c cores,
k trainings share at best c / k of what each reaches alone with all cores.

`--against FOLDER` also runs one alone from another checkout, and gives the ratio of the speeds.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report

CASES = {
    "CartPole-v1 n_envs 64 native": ("--env-id", "CartPole-v1", "--n-envs", "64", "--vectorization", "native"),
    "Hopper-v5 n_envs 1": ("--env-id", "Hopper-v5", "--n-envs", "1", "--vectorization", "sync"),
}
_HERE = Path(__file__).parents[1]
_WARM_UP = 5  # iterations before measuring
_PATIENCE = 180.0  # seconds for start and compilation


@dataclasses.dataclass
class Options:
    """Training speed of one, two and four trainings at the same time."""

    seconds: float = 10.0
    """Seconds of training that are measured per go."""
    rounds: int = 3
    """Rounds of one, two and four."""
    counts: tuple[int, ...] = (1, 2, 4)
    """Numbers of trainings at the same time; 1 is among them."""
    against: Path | None = None
    """Another checkout, run alone in each round."""
    output: Path | None = None
    """JSON file for the results."""


@dataclasses.dataclass(frozen=True)
class Go:
    """Trainings that ran at the same time.

    Attributes:
        speeds: steps per second of each.
        threads: torch threads that each chose.
    """

    speeds: list[float]
    threads: list[int]


def run_together(arguments: tuple[str, ...], count: int, seconds: float, checkout: Path = _HERE) -> Go:
    """Start `count` trainings at once, measure them over the same `seconds`, and stop them."""
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stop:
        runs = [Path(folder) / f"run{k}" for k in range(count)]
        for seed, run in enumerate(runs, start=1):
            command = [sys.executable, "-m", "fastppo", "train", *arguments, "--total-timesteps", "1000000000"]
            command += ["--seed", str(seed), "--run-dir", str(run)]
            with run.with_suffix(".log").open("wb") as log:
                process = subprocess.Popen(
                    command, stdout=log, stderr=log, cwd=folder, env=os.environ | {"PYTHONPATH": str(checkout)}
                )
            stop.callback(process.wait)
            stop.callback(process.send_signal, signal.SIGTERM)
        deadline = time.monotonic() + _PATIENCE
        while any(len(_rows(run)) < _WARM_UP for run in runs):
            if time.monotonic() > deadline:
                raise RuntimeError("\n".join(run.with_suffix(".log").read_text() for run in runs))
            time.sleep(0.2)
        before = [_rows(run)[-1] for run in runs]
        time.sleep(seconds)
        after = [_rows(run)[-1] for run in runs]
        pairs = zip(before, after, strict=True)
        speeds = [(b["global_step"] - a["global_step"]) / max(b["seconds"] - a["seconds"], 1e-9) for a, b in pairs]
        threads = [json.loads((run / "config.json").read_text())["threads"] for run in runs]
    return Go(speeds, threads)


def _rows(run: Path) -> list[dict[str, Any]]:
    """Return the whole rows of a run's metrics so far."""
    try:
        text = (run / "metrics.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines()]


def main(options: Options) -> None:
    rows = []
    for case, arguments in CASES.items():
        goes: dict[int, list[Go]] = {count: [] for count in options.counts}
        ratios = []
        for _ in range(options.rounds):
            for count in options.counts:
                goes[count].append(run_together(arguments, count, options.seconds))
            if options.against is not None:
                (theirs,) = run_together(arguments, 1, options.seconds, options.against).speeds
                ratios.append(goes[1][-1].speeds[0] / theirs)
        alone = [go.speeds[0] for go in goes[1]]
        for count, those in goes.items():
            means = [statistics.mean(go.speeds) for go in those]
            shares = [mean / one for mean, one in zip(means, alone, strict=True)]
            row: dict[str, Any] = {"case": case, "trainings": count, "steps/s each": round(statistics.median(means))}
            row |= {"slowest": round(min(min(go.speeds) for go in those))}
            row |= {"share of alone": f"{statistics.median(shares):.2f} ({min(shares):.2f}-{max(shares):.2f})"}
            row |= {"threads": sorted({n for go in those for n in go.threads})}
            against = count == 1 and ratios
            row["against"] = (
                f"{statistics.median(ratios):.2f} ({min(ratios):.2f}-{max(ratios):.2f})" if against else "-"
            )
            rows.append(row)
            print(row, flush=True)
    report(rows, options.output, load=os.getloadavg())


if __name__ == "__main__":
    main(tyro.cli(Options))
