"""What looking after a run costs: training speed with every check on against every check off.

    python -m benchmarks.safety --output benchmarks/results/safety_2core-cpu_2026-11-21.json

On: a checkpoint every 10 s (far more often than the default of ten minutes), the state of environments kept for it,
restarts of failed environments, a time limit for workers, observations held against their space, results of every step
checked, gradients and rewards looked at. Off: no checkpoints, and the checks replaced by nothing. `stall` is the share
of training's time that saving took. Interleaved pairs of fresh processes in alternating order; the median of the
ratios with their range.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro

from benchmarks import report

SETTINGS = {
    "CartPole, 4 sync": {"env_id": "CartPole-v1", "n_envs": 4, "vectorization": "sync"},
    "CartPole, 64 sync": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "sync"},
    "CartPole, 64 pool": {"env_id": "CartPole-v1", "n_envs": 64, "vectorization": "pool"},
    "CartPole, 512 native": {"env_id": "CartPole-v1", "n_envs": 512, "vectorization": "native"},
    "HalfCheetah, 8 pool": {"env_id": "HalfCheetah-v5", "n_envs": 8, "vectorization": "pool", "n_steps": 256},
}


def train(settings: dict[str, Any], seconds: float, *, safe: bool) -> dict[str, float]:
    """Steps per second after the first iterations, and the share of saving."""
    import torch

    from fastppo import Config, Trainer
    from fastppo.envs.serial import Share
    from fastppo.metrics import Metrics

    changes: dict[str, Any] = {"checkpoint_minutes": 10 / 60, "keep_checkpoints": 2}
    if safe and settings["vectorization"] in ("sync", "pool"):
        changes["on_env_error"] = "restart"
    if safe and settings["vectorization"] == "pool":
        changes["env_timeout"] = 60.0
    if not safe:
        changes = {"checkpoint_minutes": 0.0}
        nothing = torch.zeros(1)
        unchecked: Any = Metrics
        unchecked._broken = unchecked._outside = lambda self: nothing
        share: Any = Share
        share._checked = lambda self, what, values: values
        share._check_shape = lambda self, where, obs: None
    with tempfile.TemporaryDirectory() as folder:
        config = Config(**settings, **changes, total_timesteps=10**9, compile="on", run_dir=Path(folder) / "run")
        trainer, first = Trainer(config), None
        for stats in trainer.iterations():
            if first is None and stats.iteration >= 3:
                first = stats
                saved = trainer.clock.phase_seconds()["save"]
            if first is not None and stats.seconds - first.seconds > seconds:
                break
        assert first is not None
        spent = stats.seconds - first.seconds
        stall = (trainer.clock.phase_seconds()["save"] - saved) / spent
        return {"sps": (stats.global_step - first.global_step) / spent, "stall": stall}


def main(
    rounds: int = 5,
    seconds: float = 25.0,
    settings: tuple[str, ...] = tuple(SETTINGS),
    output: Path | None = None,
    one: tuple[str, str] | None = None,
) -> None:
    """Measure each setting so many times, each time for so long."""
    if one is not None:
        print(json.dumps(train(SETTINGS[one[0]], seconds, safe=one[1] == "on")))
        return
    rows = []
    for name in settings:
        pairs = []
        for k in range(rounds):
            pair = {}
            for way in ("on", "off") if k % 2 else ("off", "on"):
                command = [sys.executable, "-m", "benchmarks.safety", "--seconds", str(seconds), "--one", name, way]
                done = subprocess.run(command, capture_output=True, text=True, check=True)
                pair[way] = json.loads(done.stdout.splitlines()[-1])
            pairs.append(pair)
        ratios = [pair["on"]["sps"] / pair["off"]["sps"] for pair in pairs]
        rows.append(
            {
                "setting": name,
                "steps/s off": statistics.median(pair["off"]["sps"] for pair in pairs),
                "steps/s on": statistics.median(pair["on"]["sps"] for pair in pairs),
                "on / off": statistics.median(ratios),
                "from": min(ratios),
                "to": max(ratios),
                "stall": statistics.median(pair["on"]["stall"] for pair in pairs),
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    report(rows, output)


if __name__ == "__main__":
    tyro.cli(main)
