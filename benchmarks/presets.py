"""Steps and seconds of a tuned preset to its target return, over seeds, in a fresh process per seed.

    python -m benchmarks.presets --env-id CartPole-v1 --target-return 475 --seeds 5

Timed: from the construction of the trainer to the end of the iteration in which the mean of the last 100 episodes
reaches the target, without imports.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any, Literal

import tyro


@dataclasses.dataclass
class Options:
    """Steps and seconds of a preset to a target return."""

    env_id: str = "CartPole-v1"
    """Environment id."""
    profile: Literal["tuned", "tuned_penalty"] = "tuned"
    """The profile that is measured."""
    target_return: float = 475.0
    """Target mean return of the last 100 episodes."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    output: Path | None = None
    """JSON file for the results."""


def run(job: tuple[str, Any, float, int]) -> dict[str, Any]:
    from fastppo import Config, Trainer

    env_id, profile, target, seed = job
    with tempfile.TemporaryDirectory() as folder:
        begin = time.perf_counter()
        config = Config(env_id=env_id, profile=profile, seed=seed, target_return=target, run_dir=Path(folder) / "run")
        trainer = Trainer(config)
        result = trainer.run()
        seconds = time.perf_counter() - begin
        about = json.loads((Path(folder) / "run" / "run.json").read_text())
    row = {"seed": seed, "ended": result.ended, "steps": result.global_step, "seconds": round(seconds, 2)}
    row |= {"mean_return": round(result.mean_return, 2), "sps_steady": round(result.sps_steady)}
    return row | {"about": about, "config": trainer.config.to_dict()}


def main(options: Options) -> None:
    rows = []
    for seed in range(1, options.seeds + 1):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            rows.append(pool.apply(run, ((options.env_id, options.profile, options.target_return, seed),)))
        print({k: v for k, v in rows[-1].items() if k not in ("about", "config")}, flush=True)
    about, config = rows[0]["about"], rows[0]["config"]
    reached = [row for row in rows if row["ended"] == "target"]
    summary = {
        "env_id": options.env_id,
        "target_return": options.target_return,
        "reached": f"{len(reached)} of {len(rows)}",
        "steps": sorted(row["steps"] for row in reached),
        "median_steps": statistics.median(row["steps"] for row in reached) if reached else None,
        "median_seconds": statistics.median(row["seconds"] for row in reached) if reached else None,
        "rows": [{k: v for k, v in row.items() if k not in ("about", "config")} for row in rows],
        "config": {k: v for k, v in config.items() if k not in ("seed", "run_dir")},
        "versions": about["versions"],
        "device": about["device_name"],
        "cpu_count": about["cpu_count"],
        "commit": about["git_commit"],
    }
    print(json.dumps(summary))
    if options.output:
        options.output.write_text(json.dumps(summary, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Options))
