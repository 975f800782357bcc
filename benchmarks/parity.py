"""Final returns of fastppo, fused and eager, and of stable-baselines3 at equal steps and settings, over seeds.

    python -m benchmarks.parity --output benchmarks/results/parity_2core-cpu_2026-11-27.json

Compared: mean return of the last 100 training episodes at the end of each run, for CartPole, Acrobot and Pendulum with
settings like those of rl-baselines3-zoo (same networks, initial scales, minibatches, epochs and coefficients, without
normalisation). fastppo runs with compile=fused and with compile=off, with sync environments. Expected: its mean over
seeds is at least that of stable-baselines3 minus one standard error, and the 95 % interval (Welch) of the difference
between fused and eager contains 0. stable-baselines3 does not halve the value loss, so its vf_coef is half of ours. Its
initial weights come from another random stream.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

import tyro

from benchmarks import report, run_task
from benchmarks.compat import welch

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"n_envs": 8, "n_steps": 128, "minibatches": 4, "epochs": 4, "lr": 1e-3, "ent": 0.0, "gamma": 0.98},
    "Acrobot-v1": {"n_envs": 16, "n_steps": 128, "minibatches": 4, "epochs": 4, "lr": 1e-3, "ent": 0.0, "gamma": 0.99},
    "Pendulum-v1": {
        "n_envs": 4,
        "n_steps": 1024,
        "minibatches": 64,
        "epochs": 10,
        "lr": 1e-3,
        "ent": 0.0,
        "gamma": 0.9,
    },
}
PROGRAMS = ("fastppo", "fastppo, eager", "stable-baselines3")
STEPS = {"CartPole-v1": 100_352, "Acrobot-v1": 102_400, "Pendulum-v1": 102_400}


@dataclasses.dataclass
class Options:
    """Final returns of fastppo, fused and eager, and of stable-baselines3."""

    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    env_id: tuple[str, ...] = tuple(SETTINGS)
    """Environment ids."""
    programs: tuple[str, ...] = PROGRAMS
    """Programs to run."""
    at_once: int = 2
    """Concurrent runs; nothing is timed."""
    output: Path | None = None
    """JSON file for the results."""
    one: str | None = None
    """Internal: do one run in this process, [program, env id, seed] as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(train(*json.loads(options.one))))
        return
    jobs = [
        (program, env_id, seed)
        for env_id in options.env_id
        for seed in range(1, options.seeds + 1)
        for program in options.programs
    ]
    with ThreadPoolExecutor(options.at_once) as pool:
        runs = list(pool.map(_in_fresh_process, jobs))
    rows = []
    for env_id in options.env_id:
        row: dict[str, Any] = {"env": env_id, "steps": STEPS[env_id]}
        found = {
            program: [run["mean_return"] for run in runs if (run["program"], run["env_id"]) == (program, env_id)]
            for program in options.programs
        }
        for program, returns in found.items():
            row[program] = round(statistics.mean(returns), 1)
            row[f"{program}, standard error"] = round(statistics.stdev(returns) / len(returns) ** 0.5, 1)
        for other in options.programs[1:]:
            ours, theirs = found[options.programs[0]], found[other]
            half, difference = welch(ours, theirs), statistics.mean(ours) - statistics.mean(theirs)
            row[f"less {other}, 95 %"] = f"{difference - half:.1f} to {difference + half:.1f}"
        rows.append(row)
    report(rows, options.output, runs=runs, settings=SETTINGS)


def _in_fresh_process(job: tuple[str, str, int]) -> dict[str, Any]:
    run: dict[str, Any] = run_task("benchmarks.parity", job)
    print(run, flush=True)
    return run


def train(program: str, env_id: str, seed: int) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)
    settings = SETTINGS[env_id], STEPS[env_id]
    if program == "stable-baselines3":
        mean_return = _stable_baselines3(env_id, seed, *settings)
    else:
        mean_return = _fastppo(env_id, seed, *settings, compiled="off" if "eager" in program else "fused")
    return {"program": program, "env_id": env_id, "seed": seed, "mean_return": mean_return}


def _fastppo(env_id: str, seed: int, s: dict[str, Any], steps: int, compiled: Literal["off", "fused"]) -> float:
    from fastppo import Config, Trainer

    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            env_id=env_id,
            seed=seed,
            total_timesteps=steps,
            n_envs=s["n_envs"],
            n_steps=s["n_steps"],
            n_minibatches=s["minibatches"],
            update_epochs=s["epochs"],
            learning_rate=s["lr"],
            anneal_lr=True,
            ent_coef=s["ent"],
            gamma=s["gamma"],
            vf_coef=1.0,
            value_clip="off",
            normalize_obs=False,
            normalize_rewards=False,
            compile=compiled,
            threads=1,
            run_dir=Path(folder) / "run",
        )
        return Trainer(config).run().mean_return


def _stable_baselines3(env_id: str, seed: int, s: dict[str, Any], steps: int) -> float:
    import numpy as np
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.env_util import make_vec_env

    model = PPO(
        "MlpPolicy",
        make_vec_env(env_id, n_envs=s["n_envs"], seed=seed),
        n_steps=s["n_steps"],
        batch_size=s["n_envs"] * s["n_steps"] // s["minibatches"],
        n_epochs=s["epochs"],
        learning_rate=lambda left: s["lr"] * left,
        ent_coef=s["ent"],
        gamma=s["gamma"],
        policy_kwargs={"optimizer_kwargs": {"eps": 1e-5}, "activation_fn": torch.nn.Tanh},
        seed=seed,
        device="cpu",
    )
    model.learn(steps)
    return float(np.mean([episode["r"] for episode in model.ep_info_buffer or ()]))


if __name__ == "__main__":
    main(tyro.cli(Options))
