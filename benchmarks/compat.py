"""Learning of one script with stable-baselines3's PPO and with fastppo.compat's: only the import differs.

    python -m benchmarks.compat --output benchmarks/results/compat_2core-cpu_2026-11-27.json

Compared: mean return of 20 evaluation episodes with the most probable actions after training, by stable-baselines3's
`evaluate_policy`, over seeds. The table shows the means, and the difference of the means (fastppo minus
stable-baselines3) with its 95 % interval, by Welch's t. An interval that holds 0 finds no difference. Nothing is timed.
Settings are like those of rl-baselines3-zoo, with schedules as functions.
"""

from __future__ import annotations

import dataclasses
import json
import math
import statistics
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import tyro
from scipy import stats

from benchmarks import run_task, table, write

SETTINGS: dict[str, dict[str, Any]] = {
    "CartPole-v1": {"n_steps": 32, "batch_size": 256, "n_epochs": 20, "gamma": 0.98, "gae_lambda": 0.8},
    "Pendulum-v1": {"n_steps": 256, "batch_size": 64, "n_epochs": 10, "gamma": 0.9, "learning_rate": 1e-3},
}
ANNEALED: dict[str, dict[str, float]] = {"CartPole-v1": {"learning_rate": 1e-3, "clip_range": 0.2}, "Pendulum-v1": {}}
N_ENVS, EPISODES = 8, 20
PROGRAMS = ("fastppo", "stable-baselines3")


@dataclasses.dataclass
class Options:
    """Returns of one script with fastppo.compat and with stable-baselines3."""

    env_id: tuple[str, ...] = tuple(SETTINGS)
    """Environment ids."""
    steps: int = 50_000
    """Environment steps of each training."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    at_once: int = 1
    """Concurrent trainings, 1 or 2."""
    output: Path | None = None
    """JSON file for the results."""
    one: str | None = None
    """Internal: do one training in this process, [program, env id, steps, seed] as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(train(*json.loads(options.one))))
        return
    rows: dict[str, dict[str, Any]] = {}
    runs: dict[str, list[dict[str, Any]]] = {env_id: [] for env_id in options.env_id}
    for env_id in options.env_id:
        for seed in range(1, options.seeds + 1):
            jobs = [(program, env_id, options.steps, seed) for program in PROGRAMS]
            with ThreadPoolExecutor(options.at_once) as pool:
                runs[env_id] += pool.map(lambda job: run_task("benchmarks.compat", job), jobs)
            rows[env_id] = {"env": env_id, "steps": options.steps, "seeds": seed, **compare(runs[env_id])}
            settings = {"settings": SETTINGS, "annealed": ANNEALED, "n_envs": N_ENVS}
            write(list(rows.values()), options.output, returns=runs, **settings)
            print(rows[env_id], flush=True)
    print("\n".join(table([row]) for row in rows.values()))


def compare(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the mean returns of both programs, and their difference with its interval."""
    ours, theirs = ([run["return"] for run in runs if run["program"] == program] for program in PROGRAMS)
    row: dict[str, Any] = {PROGRAMS[0]: statistics.mean(ours), PROGRAMS[1]: statistics.mean(theirs)}
    row["difference"] = row[PROGRAMS[0]] - row[PROGRAMS[1]]
    if len(ours) > 1:
        half = welch(ours, theirs)
        row["95 % interval"] = f"{row['difference'] - half:.1f} to {row['difference'] + half:.1f}"
    return row


def welch(a: Sequence[float], b: Sequence[float]) -> float:
    """Return half the width of the 95 % interval of mean(a) - mean(b), by Welch's t with its degrees of freedom."""
    va, vb = (statistics.variance(x) / len(x) for x in (a, b))
    if va + vb == 0:
        return 0.0
    freedom = (va + vb) ** 2 / (va**2 / (len(a) - 1) + vb**2 / (len(b) - 1))
    return float(stats.t.ppf(0.975, freedom)) * math.sqrt(va + vb)


def train(program: str, env_id: str, steps: int, seed: int) -> dict[str, Any]:
    """Train and evaluate; the script is the same for both programs."""
    import torch
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy

    PPO: Any
    if program == "fastppo":
        from fastppo.compat import PPO
    else:
        from stable_baselines3 import PPO

    torch.set_num_threads(1)
    schedules = {name: _annealed(value) for name, value in ANNEALED[env_id].items()}
    env = make_vec_env(env_id, n_envs=N_ENVS, seed=seed)
    model = PPO("MlpPolicy", env, **SETTINGS[env_id], **schedules, seed=seed, device="cpu")
    model.learn(steps)
    evaluation = make_vec_env(env_id, n_envs=4, seed=10_000 + seed)
    mean, std = evaluate_policy(model, evaluation, n_eval_episodes=EPISODES)
    return {"program": program, "env_id": env_id, "seed": seed, "return": float(mean), "std": float(std)}


def _annealed(start: float) -> Any:
    return lambda remaining: start * remaining


if __name__ == "__main__":
    main(tyro.cli(Options))
