"""Learning on tasks that need memory, masks, Dict observations or exploration: steps to a goal, over seeds.

    scripts/third-party --steps 2000 --only MiniGrid   # once, for the virtual environments
    python -m benchmarks.memory_and_masks --task cartpole-no-velocity t-maze --seeds 5 --jobs 1

Each (task, variant, seed) trains in a fresh process with one thread, and leaves a JSON file in `--folder`. A command
that was cut short continues: a file whose settings are still those of the table is not trained again. The table of
`TASKS` holds all settings. A run is as expected if it meets its variant's goal; a task passes if enough of its runs do.

The mean return is that of the last 100 training episodes. A run with a goal to reach stops there; a run that must stay
under a bound trains to the end, and its best mean return counts. The success rate is that of 100 episodes after
training, with the most probable actions.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import tyro

from benchmarks import report, run_task

ROOT = Path(__file__).parents[1]
_WINDOW = 100  # episodes of a mean return, and of a success rate


class WithoutVelocities(gym.ObservationWrapper[Any, Any, Any]):
    """CartPole that shows the position of the cart and the angle of the pole alone."""

    _SHOWN = (0, 2)

    def __init__(self, env: gym.Env[Any, Any]) -> None:
        super().__init__(env)
        low, high = (getattr(env.observation_space, name)[[*self._SHOWN]] for name in ("low", "high"))
        self.observation_space = gym.spaces.Box(low, high, dtype=np.float32)

    def observation(self, observation: Any) -> Any:
        return observation[[*self._SHOWN]]


class TMaze(gym.Env[Any, Any]):
    """A corridor with a sign at its start, which tells the right turn at its end.

    The observation is (sign, whether this is the junction): the sign is -1 for left, 1 for right, and 0 after the first
    cell. Actions: 0 walks on, 1 turns left, 2 turns right; in the corridor a turn stays in place. A turn at the
    junction ends the episode with reward 1 if it is right, else 0, so that a guess returns 0.5 in the mean. Episodes
    are cut after four times the length.
    """

    observation_space = gym.spaces.Box(-1.0, 1.0, (2,), np.float32)
    action_space = gym.spaces.Discrete(3)

    def __init__(self, length: int = 5) -> None:
        self._length = length

    def _obs(self) -> Any:
        return np.array([self._sign * (self._cell == 0), self._cell == self._length], np.float32)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self._cell = self._steps = 0
        self._sign = int(self.np_random.choice((-1, 1)))
        return self._obs(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._steps += 1
        turns = self._cell == self._length and action != 0
        right = turns and action == (1 if self._sign < 0 else 2)
        self._cell = min(self._cell + int(action == 0), self._length)
        return self._obs(), float(right), turns, self._steps >= 4 * self._length and not turns, {}


def cartpole_without_velocities() -> gym.Env[Any, Any]:
    return WithoutVelocities(gym.make("CartPole-v1"))


@dataclasses.dataclass(frozen=True)
class Variant:
    """One way to train on a task, and its goal; without one the run is shown for comparison.

    Attributes:
        settings: beside the task's.
        at_least: the mean return or success rate to reach.
        below: a bound that the best mean return stays under.
    """

    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    at_least: float | None = None
    below: float | None = None


@dataclasses.dataclass(frozen=True)
class Task:
    """A task, with the settings that all its variants share.

    Attributes:
        settings: of `fastppo.Config`.
        variants: by name.
        make_env: makes the environment instead of settings["env_id"].
        venv: virtual environment with the packages it needs, made by scripts/third-party; "": the running one.
        measure: what `at_least` is about: "return", which ends the run, or "success", the success rate.
        needed: share of a variant's seeds that meet its goal.
    """

    settings: Mapping[str, Any]
    variants: Mapping[str, Variant]
    make_env: Callable[[], gym.Env[Any, Any]] | None = None
    venv: str = ""
    measure: str = "return"
    needed: float = 0.8


_FIXED = {"threads": 1, "device": "cpu", "vectorization": "sync", "compile": "off"}
_MINIGRID = {
    "obs_keys": ("image", "direction"),
    "total_timesteps": 200_000,
    "n_envs": 16,
    "n_steps": 128,
    "n_minibatches": 8,
    "learning_rate": 1e-3,
    "value_clip": "off",
    "ent_coef": 0.01,
    "normalize_obs": True,
}
TASKS = {
    "cartpole-no-velocity": Task(
        {
            "total_timesteps": 300_000,
            "n_envs": 16,
            "n_steps": 64,
            "update_epochs": 5,
            "gamma": 0.98,
            "gae_lambda": 0.95,
            "learning_rate": 1e-3,
            "anneal_clip": True,
            "value_clip": "off",
            "ent_coef": 0.0,
            "normalize_obs": True,
        },
        {
            "lstm": Variant({"memory": "lstm"}, at_least=475.0),
            "gru": Variant({"memory": "gru"}, at_least=475.0),
            "mingru": Variant({"memory": "mingru"}, at_least=475.0),
            "mlp": Variant(below=200.0),
        },
        cartpole_without_velocities,
    ),
    "t-maze": Task(
        {
            "total_timesteps": 200_000,
            "n_envs": 16,
            "n_steps": 64,
            "learning_rate": 1e-3,
            "value_clip": "off",
            "ent_coef": 0.01,
        },
        {
            "lstm": Variant({"memory": "lstm"}, at_least=0.95),
            "gru": Variant({"memory": "gru"}, at_least=0.95),
            "mingru": Variant({"memory": "mingru"}, at_least=0.95),
            "mlp": Variant(
                below=0.75
            ),  # a guess is right in 50 of 100 episodes; 75 would be five standard deviations more
        },
        TMaze,
    ),
    "doorkey": Task(
        {"env_id": "minigrid:MiniGrid-DoorKey-5x5-v0", **_MINIGRID},
        {"mlp": Variant(at_least=0.9)},
        venv=".venv-third-party",
    ),
    "multiroom": Task(  # four rooms in a row, the same in each episode; the best return is 0.73
        {
            "env_id": "minigrid:MiniGrid-MultiRoom-N4-S5-v1",
            "wrappers": ("minigrid.wrappers:ReseedWrapper",),
            **_MINIGRID,
        },
        {"rnd": Variant({"rnd": True}, at_least=0.6), "plain": Variant(below=0.1)},
        venv=".venv-third-party",
    ),
    "taxi": Task(
        {
            "env_id": "Taxi-v4",
            "total_timesteps": 1_000_000,
            "n_envs": 32,
            "n_steps": 128,
            "n_minibatches": 8,
            "learning_rate": 1e-3,
            "value_clip": "off",
            "ent_coef": "linear:0.1:0",  # at 0.04 a policy without masks stops picking passengers up, and stays at -200
            "normalize_rewards": True,
        },
        {
            "masks": Variant(at_least=7.0),
            "no masks": Variant({"action_masks": "off"}, at_least=7.0),
        },
    ),
    "fetch-reach": Task(
        {
            "env_id": "gymnasium_robotics:FetchReachDense-v4",
            "total_timesteps": 100_000,
            "n_envs": 8,
            "n_steps": 256,
            "n_minibatches": 16,
            "learning_rate": 1e-3,
            "gamma": 0.95,
        },
        {"mlp": Variant(at_least=0.9)},
        venv=".venv-robotics",
        measure="success",
    ),
}


@dataclasses.dataclass
class Options:
    """Learning on tasks that need memory, masks of allowed actions, Dict observations or exploration."""

    task: tuple[str, ...] = tuple(TASKS)
    """Tasks to train."""
    variant: tuple[str, ...] = ()
    """Variants to train; none: all."""
    seeds: int = 5
    """Number of seeds; they are 1 to `seeds`."""
    jobs: int = 1
    """Runs trained at the same time; more than one makes speeds wrong."""
    folder: Path = ROOT / "runs" / "memory-and-masks"
    """Folder of the runs' JSON files."""
    output: Path | None = None
    """JSON file for the results."""
    one: str | None = None
    """Internal: do one run in this process, [task, variant, seed] as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(train(*json.loads(options.one))))
        return
    if unknown := [name for name in options.task if name not in TASKS]:
        sys.exit(f"no task {unknown[0]}; there are {', '.join(TASKS)}.")
    options.folder.mkdir(parents=True, exist_ok=True)
    cells = [
        (task, variant)
        for task in options.task
        for variant in TASKS[task].variants
        if not options.variant or variant in options.variant
    ]
    if not cells:
        sys.exit(f"no variant {' or '.join(options.variant)} in {', '.join(options.task)}.")
    # all variants of a seed before the next seed: a campaign that is cut short has something of each
    jobs = [
        (task, variant, seed)
        for task, of_task in itertools.groupby(cells, lambda cell: cell[0])
        for seed, (_, variant) in itertools.product(range(1, options.seeds + 1), list(of_task))
    ]
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = list(pool.map(lambda job: run_once(options.folder, *job), jobs))
    rows = [summary(task, name, [r for r in runs if (r["task"], r["variant"]) == (task, name)]) for task, name in cells]
    report(rows, options.output, runs=runs)


def settings_of(task: str, variant: str) -> dict[str, Any]:
    """Return the settings of a run, without its seed and folder."""
    own = TASKS[task].variants[variant]
    stop = {} if own.at_least is None or TASKS[task].measure != "return" else {"target_return": own.at_least}
    return {**_FIXED, **TASKS[task].settings, **own.settings, **stop}


def run_once(folder: Path, task: str, variant: str, seed: int) -> dict[str, Any]:
    """Return the result of a run: from its file in `folder`, or by training it."""
    path = folder / f"{task}_{variant.replace(' ', '-')}_{seed}.json"
    if path.exists():
        done: dict[str, Any] = json.loads(path.read_text())
        if done["settings"] == json.loads(json.dumps(settings_of(task, variant))):
            return done
    result: dict[str, Any] = run_task("benchmarks.memory_and_masks", (task, variant, seed), python_of(TASKS[task].venv))
    part = path.with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(path)
    print({k: v for k, v in result.items() if k not in ("settings", "about")}, flush=True)
    return result


def python_of(venv: str) -> str:
    """Return the Python of a virtual environment at the root of the checkout; "": the running one."""
    if not venv:
        return sys.executable
    python = ROOT / venv / "bin" / "python"
    if not python.exists():
        sys.exit(f"{venv} is missing; scripts/third-party makes it.")
    return str(python)


def train(task: str, variant: str, seed: int) -> dict[str, Any]:
    """Train one run in this process; return its result."""
    from fastppo import Config, Trainer

    settings = settings_of(task, variant)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(Config(**settings, seed=seed, run_dir=Path(folder) / "run"), TASKS[task].make_env)
        means = [stats.mean_return for stats in trainer.iterations() if stats.episodes >= _WINDOW]
        result = trainer.result
        row: dict[str, Any] = {
            "task": task,
            "variant": variant,
            "seed": seed,
            "ended": result.ended,
            "steps": result.global_step,
            "mean_return": round(result.mean_return, 3),
            "best_mean_return": round(max(means, default=result.mean_return), 3),
            "sps": round(result.sps_steady),
            "seconds": round(result.seconds, 1),
        }
        if TASKS[task].measure == "success":
            row["success_rate"] = success_rate(result.run_dir, settings["env_id"])
        about = json.loads((result.run_dir / "run.json").read_text())
    kept = ("versions", "device_name", "cpu_count", "git_commit")
    return row | {"settings": settings, "about": {name: about[name] for name in kept}}


def success_rate(run: Path, env_id: str) -> float:
    """Return the share of episodes at whose last step `info["is_success"]` is true, with the most probable actions."""
    from fastppo.evaluation.saved_policy import load_policy

    policy, env, successes = load_policy(run), gym.make(env_id), 0
    for episode in range(_WINDOW):
        obs, info = env.reset(seed=10_000 + episode)
        state, start, over = None, np.ones(1, bool), False
        while not over:
            action, state = policy.predict(obs, state, start)
            obs, _, terminated, truncated, info = env.step(action)
            start, over = np.zeros(1, bool), terminated or truncated
        successes += bool(info["is_success"])
    env.close()
    return successes / _WINDOW


def as_expected(run: Mapping[str, Any]) -> bool | None:
    """Return whether a run meets its goal; None: it has none."""
    task = TASKS[run["task"]]
    variant = task.variants[run["variant"]]
    if variant.at_least is not None:
        reached = run["success_rate"] if task.measure == "success" else run["mean_return"]
        return bool(reached >= variant.at_least)
    return None if variant.below is None else bool(run["best_mean_return"] < variant.below)


def summary(task: str, variant: str, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the row of one variant: its goal, how many seeds meet it, and steps and returns by seed."""
    own = TASKS[task].variants[variant]
    what = "success rate" if TASKS[task].measure == "success" else "mean return"
    goal = "-"
    if own.at_least is not None:
        goal = f"{what} at least {own.at_least:g}"
    elif own.below is not None:
        goal = f"best mean return under {own.below:g}"
    met = sum(bool(as_expected(run)) for run in runs)
    figures = "success_rate" if TASKS[task].measure == "success" else "mean_return"
    if own.below is not None:
        figures = "best_mean_return"
    return {
        "task": task,
        "variant": variant,
        "goal": f"{goal} within {settings_of(task, variant)['total_timesteps']:,} steps",
        "seeds as expected": f"{met} of {len(runs)}",
        "passed": "yes" if met >= TASKS[task].needed * len(runs) else "no",
        "by seed": " ".join(f"{run[figures]:.3g}" for run in runs),
        "steps by seed": " ".join(f"{run['steps']:,}" for run in runs),
        "median steps": f"{statistics.median(run['steps'] for run in runs):,.0f}",
        "steps/s": f"{statistics.median(run['sps'] for run in runs):,.0f}",
        "median seconds": f"{statistics.median(run['seconds'] for run in runs):,.0f}",
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before the processes load torch
    main(tyro.cli(Options))
