"""Time and memory of the report of a run of days, whose metrics.jsonl has hundreds of thousands of rows.

    python -m benchmarks.long_report --rows 300_000 --output benchmarks/results/long-report_2core-cpu_2026-11-25.json

The rows are those of a short real run, repeated with noise and 20 episode returns each; the time is that of a fresh
process that imports fastppo, reads the run and writes the page.
"""

from __future__ import annotations

import dataclasses
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report
from fastppo import Config, Trainer

_RETURNS = 20  # per row
_CHILD = """
import resource, sys
from pathlib import Path
from fastppo.analysis.report import report
report([Path(sys.argv[1])], Path(sys.argv[2]))
used = resource.getrusage(resource.RUSAGE_SELF)
print(used.ru_utime + used.ru_stime, used.ru_maxrss / 2**10)
"""


def write_run(folder: Path, rows: int, seed: int = 0) -> None:
    """Write a run folder with `rows` rows of metrics, evaluations in every thousandth."""
    config = Config(n_envs=8, n_steps=64, total_timesteps=512 * 40, compile="off", threads=1, run_dir=folder)
    Trainer(dataclasses.replace(config, eval_every=512 * 20, eval_episodes=2)).run()
    path = folder / "metrics.jsonl"
    templates = [json.loads(line) for line in path.read_text().splitlines()]
    evaluation = {tag: x for row in templates for tag, x in row.items() if tag.startswith("eval/")}
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(1, rows + 1):
            row: dict[str, Any] = dict(templates[i % len(templates)])
            for tag, x in row.items():
                if isinstance(x, float):
                    row[tag] = x * rng.uniform(0.9, 1.1)
            row |= {"iteration": i, "global_step": 512 * i, "episodes": _RETURNS * i, "seconds": round(i / 9, 4)}
            row |= evaluation if i % 1000 == 0 else {}
            row["returns"] = [float(round(rng.gauss(300, 99))) for _ in range(_RETURNS)]
            file.write(json.dumps(row) + "\n")


def measure(rows: int) -> dict[str, Any]:
    """Return seconds and peak memory of the report of a run with `rows` rows."""
    with tempfile.TemporaryDirectory(prefix="fastppo-long-report-") as name:
        run, page = Path(name) / "run", Path(name) / "report.html"
        write_run(run, rows)
        begin = time.perf_counter()
        command = [sys.executable, "-c", _CHILD, str(run), str(page)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=Path(__file__).parents[1])
        cpu_seconds, memory = map(float, done.stdout.split()[-2:])
        return {
            "rows": rows,
            "metrics.jsonl, MB": (run / "metrics.jsonl").stat().st_size / 1e6,
            "seconds": time.perf_counter() - begin,
            "CPU seconds": cpu_seconds,
            "peak memory, MiB": memory,
            "page, MB": page.stat().st_size / 1e6,
        }


def main(rows: tuple[int, ...] = (10_000, 300_000), output: Path | None = None) -> None:
    """Measure the report of a run of each number of `rows`."""
    report([measure(n) for n in rows], output)


if __name__ == "__main__":
    tyro.cli(main)
