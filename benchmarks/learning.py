"""Learning curves over environments and seeds: a campaign that can be stopped at any time and continued.

    nice python -m benchmarks.learning --hours 2
    python -m benchmarks.learning --hours 0 --output benchmarks/results/learning_2core-cpu_2026-11-28.json

benchmarks/learning.toml is the table of rows: settings, environments, steps and seeds. Each seed of a row is a run of
its own, in a process with one torch thread and in the folder that `fastppo train --seeds` would give it. The same
command continues: runs that have ended are kept, and a run that was interrupted resumes from its last checkpoint, at
most a minute before. After `--hours`, and at SIGTERM, the runs in progress end with a checkpoint each; one of
stable-baselines3 has none and begins again.

Measured of each run: the mean return of the last 100 training episodes, for which actions are sampled; the mean return
of 20 evaluation episodes with the most probable actions and other seeds; and the curve of the mean return of the last
100 episodes, thinned to 60 points. `--output` collects all runs that have ended; benchmarks.results_page makes
docs/results.md of it. `--known` begins with the runs of such a file, so that another machine continues.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import machine, run_task
from fastppo.analysis.seeds import begin_seeds, plan_seeds
from fastppo.analysis.training_processes import ended, run_each
from fastppo.config import Config, fill_defaults
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.files import replace_file, write_json

ROOT = Path(__file__).parents[1]
TABLE = Path(__file__).with_suffix(".toml")
EVALUATIONS = 20  # episodes
POINTS = 60  # of a curve
_WRITTEN = {"stage", "column", "env_id", "total_timesteps", "seed", "mean_return", "evaluation", "seconds", "sps"}
_WRITTEN |= {"curve", "machine"}
_FIXED = {"threads": 1, "checkpoint_minutes": 1.0}  # in every run


@dataclasses.dataclass
class Options:
    """Learning curves over environments and seeds."""

    table: Path = TABLE
    """TOML file of the rows."""
    folder: Path = ROOT / "runs" / "learning"
    """Folder of the runs."""
    hours: float = 1.0
    """Time for training; 0: none, only collect."""
    jobs: int | None = None
    """Concurrent runs; none: one per core. stable-baselines3 runs one at a time."""
    only: tuple[str, ...] = ()
    """Stages, columns and environments to train; none: all. With several kinds of names a row must have one of each."""
    seeds: int | None = None
    """Train at most this many seeds of each row."""
    known: Path | None = None
    """JSON file of earlier runs, which are not trained again."""
    output: Path | None = None
    """JSON file for all runs of the table that have ended."""
    one: str | None = None
    """Internal: train one run of stable-baselines3 in this process; its settings as JSON."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One environment with one column's settings.

    Attributes:
        stage: part of the campaign.
        column: name of the settings.
        program: the trainer, "fastppo" or "stable-baselines3".
        settings: of `fastppo.Config`.
        env_id: environment.
        steps: environment steps of a run.
        seeds: planned seeds.
    """

    stage: str
    column: str
    program: str
    settings: Mapping[str, Any]
    env_id: str
    steps: int
    seeds: range

    @property
    def name(self) -> str:
        """Name of its folder."""
        env = self.env_id.rpartition(":")[2].replace("/", "-")
        return f"{self.column}_{env}_{self.steps}"

    @property
    def config(self) -> Config:
        """Settings of its first seed."""
        own = {"env_id": self.env_id, "total_timesteps": self.steps, "seed": self.seeds.start}
        return Config.from_dict({**self.settings, **own, **_FIXED})

    def configs(self, folder: Path) -> list[Config]:
        """Return the settings of each of its runs."""
        return plan_seeds(self.config, len(self.seeds), folder / self.name)


class TimeIsUp(Exception):
    """`--hours` are over, or the campaign was asked to end."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(train_stable_baselines3(json.loads(options.one))))
        return
    counts = [count for count in (options.jobs, options.seeds) if count is not None]
    if min(counts, default=1) < 1 or not 0 <= options.hours < 10_000:
        sys.exit("--jobs and --seeds must be at least 1, --hours from 0 to 10,000.")
    if options.output is not None and not options.output.parent.is_dir():
        sys.exit(f"--output {options.output}: there is no folder {options.output.parent}.")
    rows = read_table(options.table)
    chosen = choose(rows, options.only)
    if options.seeds is not None:
        chosen = [dataclasses.replace(row, seeds=row.seeds[: options.seeds]) for row in chosen]
    if options.known is not None:
        copy_runs(options.known, rows, options.folder)
    if options.hours > 0:
        train(chosen, options.folder, options.hours, options.jobs or usable_cores())
    if options.output is not None:
        runs = collect(rows, options.folder)
        if not runs:
            sys.exit(f"--folder {options.folder} holds no run that has ended; {options.output} is as before.")
        write_runs(options.output, runs)
        print(f"{len(runs)} runs in {options.output}")


def read_table(path: Path = TABLE) -> list[Row]:
    """Return the rows of the table in their order."""
    try:
        table = tomllib.loads(path.read_text())
        stages = table["stages"]
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"--table {path} can't be read ({type(error).__name__}: {error}).")
    rows = []
    for stage in stages:
        for row in stage["rows"]:
            column, first = table["columns"][row["column"]], row.get("first_seed", 1)
            seeds = range(first, first + row["seeds"])
            program = column.get("program", "fastppo")
            rows += [
                Row(stage["name"], row["column"], program, column["settings"], env_id, row["steps"], seeds)
                for env_id in row["envs"]
            ]
    return rows


def choose(rows: Sequence[Row], names: Sequence[str]) -> list[Row]:
    """Return the rows that `--only` names."""
    kinds = ("stage", "column", "env_id")
    known = {kind: {getattr(row, kind) for row in rows} for kind in kinds}
    if unknown := set(names) - set[str]().union(*known.values()):
        sys.exit(f"--only {min(unknown)}: the table has {', '.join(sorted(set[str]().union(*known.values())))}.")
    given = {kind: known[kind] & {*names} or known[kind] for kind in kinds}
    return [row for row in rows if all(getattr(row, kind) in given[kind] for kind in kinds)]


def train(rows: Sequence[Row], folder: Path, hours: float, jobs: int) -> None:
    """Train the runs that are missing, for some hours at most, and measure those that end."""
    try:
        with alarm(hours * 3600):
            for stage in dict.fromkeys(row.stage for row in rows):
                for program in ("fastppo", "stable-baselines3"):
                    own = [row for row in rows if (row.stage, row.program) == (stage, program)]
                    for row in own:
                        begin_seeds(row.config, folder / row.name)
                    runs = _in_turn(own, folder)
                    if program == "fastppo":
                        _train_fastppo(runs, jobs)
                    else:
                        _train_peers(runs)
    except TimeIsUp:
        print("stopped; the same command continues", flush=True)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise TimeIsUp in the block after `seconds`, or when this process is asked to end."""

    def ring(number: int, frame: Any) -> None:
        raise TimeIsUp

    before = {number: signal.signal(number, ring) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in before.items():
            signal.signal(number, handler)


def _in_turn(rows: Sequence[Row], folder: Path) -> list[tuple[Row, Config]]:
    """Return the runs of several rows: the first seed of each, then the second."""
    runs = [list(enumerate(row.configs(folder))) for row in rows]
    order = sorted((k, i) for i, own in enumerate(runs) for k, _ in own)
    return [(rows[i], runs[i][k][1]) for k, i in order]


def _train_fastppo(runs: Sequence[tuple[Row, Config]], jobs: int) -> None:
    rows = {config.run_dir: row for row, config in runs}
    with closing(run_each([config for _, config in runs if not _file(config).exists()], jobs)) as results:
        for config, trouble in results:
            row = rows[config.run_dir]
            _print(row, config, trouble or figures(row, config) or "no figures")


def _train_peers(runs: Sequence[tuple[Row, Config]]) -> None:
    for row, config in runs:
        if figures(row, config) is None:
            result: dict[str, Any] = run_task("benchmarks.learning", config.to_dict())
            _write(row, config, result)
            _print(row, config, result)


def _print(row: Row, config: Config, outcome: Mapping[str, Any] | str) -> None:
    if not isinstance(outcome, str):
        returns = f"{outcome['mean_return']:,.1f}, evaluation {outcome['evaluation']:,.1f}"
        outcome = f"{returns}, {outcome['seconds']:,.0f} s"
    print(f"{row.column} {row.env_id} {row.steps:,} seed {config.seed}: {outcome}", flush=True)


def _file(config: Config) -> Path:
    """Return the file of a run's measured figures, beside its folder."""
    assert config.run_dir is not None
    return config.run_dir.with_suffix(".json")


def _write(row: Row, config: Config, result: Mapping[str, Any]) -> None:
    about = {"stage": row.stage, "column": row.column, "env_id": row.env_id, "total_timesteps": row.steps}
    _file(config).parent.mkdir(parents=True, exist_ok=True)
    write_json(_file(config), {**about, "seed": config.seed, **result})


def figures(row: Row, config: Config) -> dict[str, Any] | None:
    """Return the figures of a run that has ended, measured now if they were not yet; None: it has not ended."""
    if not _file(config).exists():
        if not ended(config):
            return None
        _write(row, config, measure(config))
    found: dict[str, Any] = json.loads(_file(config).read_text())
    return found


def measure(config: Config) -> dict[str, Any]:
    """Return returns, evaluation, curve, times and versions of a run of fastppo that has ended."""
    import torch

    from fastppo import evaluate
    from fastppo.analysis.run_data import read_run

    torch.set_num_threads(1)
    assert config.run_dir is not None
    run = read_run(config.run_dir, max_rows=None)
    return {
        "mean_return": run.result["mean_return"],
        "evaluation": evaluate(config.run_dir, EVALUATIONS, allow_import=True).mean,
        "episodes": run.result["episodes"],
        "steps": run.result["global_step"],
        "seconds": round(run.result["seconds"], 1),
        "sps": round(run.result["sps_steady"]),
        "curve": thinned(run.column("global_step").tolist(), run.column("mean_return").tolist()),
        "about": {name: run.about[name] for name in ("versions", "device_name", "cpu_count", "git_commit")},
    }


def thinned(steps: Sequence[float], returns: Sequence[float]) -> dict[str, list[float | None]]:
    """Return at most POINTS points of a curve, evenly spaced and with the last one; None where no episode has ended."""
    at = np.unique(np.linspace(0, len(steps) - 1, min(POINTS, len(steps))).round().astype(int)).tolist()
    kept = [returns[i] for i in at]
    return {
        "steps": [int(steps[i]) for i in at],
        "returns": [float(f"{value:.5g}") if np.isfinite(value) else None for value in kept],
    }


def collect(rows: Sequence[Row], folder: Path) -> list[dict[str, Any]]:
    """Return the figures of all runs that have ended, in the order of the rows and seeds."""
    found = [figures(row, config) for row in rows for config in row.configs(folder)]
    return [run for run in found if run is not None]


def write_runs(path: Path, runs: Sequence[Mapping[str, Any]]) -> None:
    """Write runs as JSON, a line for each; versions and machines, which many runs share, are listed once."""
    machines: list[Any] = []
    lines = []
    for run in runs:
        values = dict(run)
        about = values.pop("about")
        if about not in machines:
            machines.append(about)
        lines.append(json.dumps(values | {"machine": machines.index(about)}))
    text = f'{{"machines": {json.dumps(machines)},\n"runs": [\n' + ",\n".join(lines) + "\n]}\n"
    replace_file(path, lambda part: part.write_text(text))


def copy_runs(path: Path, rows: Sequence[Row], folder: Path) -> None:
    """Write the figures of the runs in `path`, a file of `write_runs`, to where `figures` finds them."""
    machines, listed = read_runs(path)
    runs = {(run["column"], run["env_id"], run["total_timesteps"], run["seed"]): run for run in listed}
    found = 0
    for row in rows:
        begin_seeds(row.config, folder / row.name)
        for config in row.configs(folder):
            run = runs.get((row.column, row.env_id, row.steps, config.seed))
            if run is not None and not _file(config).exists():
                values = {name: x for name, x in run.items() if name != "machine"}
                _write(row, config, {**values, "about": machines[run["machine"]]})
            found += run is not None
    print(f"{found} of the {len(listed)} runs in {path} are rows of the table", flush=True)


def read_runs(path: Path) -> tuple[list[Any], list[dict[str, Any]]]:
    """Return machines and runs of a file of `write_runs`."""
    try:
        content = json.loads(path.read_text())
        machines, runs = content["machines"], content["runs"]
        for run in runs:
            if missing := _WRITTEN - run.keys():
                raise KeyError(min(missing))
            machines[run["machine"]]
    except (OSError, ValueError, TypeError, LookupError, AttributeError) as error:
        sys.exit(f"{path} is not a file that benchmarks.learning wrote ({type(error).__name__}: {error}).")
    if not runs:
        sys.exit(f"{path} holds no runs.")
    return machines, runs


def train_stable_baselines3(settings: dict[str, Any]) -> dict[str, Any]:
    """Train stable-baselines3 with the settings of a fastppo run; return what `measure` does."""
    import statistics
    import time

    import gymnasium as gym
    import torch
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.evaluation import evaluate_policy
    from stable_baselines3.common.vec_env import VecEnv, VecNormalize

    torch.set_num_threads(1)
    given = Config.from_dict(settings)
    probe = gym.make(given.env_id)
    c = fill_defaults(given, "continuous" if isinstance(probe.action_space, gym.spaces.Box) else "discrete")
    probe.close()
    rate, batch = c.learning_rate, c.n_envs * c.n_steps  # type: ignore[operator]

    def normalized(env: VecEnv, training: bool) -> VecNormalize:
        return VecNormalize(
            env, training, bool(c.normalize_obs), bool(c.normalize_rewards) and training, 10.0, 10.0, c.gamma
        )

    points: list[tuple[int, float]] = []
    episodes = 0

    class Curve(BaseCallback):
        def _on_rollout_end(self) -> None:
            last = [episode["r"] for episode in self.model.ep_info_buffer or ()]
            points.append((self.num_timesteps, statistics.fmean(last) if last else float("nan")))

        def _on_step(self) -> bool:
            nonlocal episodes
            episodes += sum("episode" in info for info in self.locals["infos"])
            return True

    model = PPO(
        "MlpPolicy",
        env := normalized(make_vec_env(c.env_id, c.n_envs, seed=c.seed), True),
        learning_rate=lambda left: rate * left,
        n_steps=c.n_steps,
        batch_size=batch // c.n_minibatches,  # type: ignore[operator]
        n_epochs=c.update_epochs,
        gamma=c.gamma,
        gae_lambda=c.gae_lambda,
        clip_range=c.clip_coef,
        ent_coef=c.ent_coef,
        vf_coef=c.vf_coef / 2,  # its value loss is not halved
        max_grad_norm=c.max_grad_norm,
        policy_kwargs={"optimizer_kwargs": {"eps": c.adam_eps}, "activation_fn": torch.nn.Tanh},
        seed=c.seed,
        device="cpu",
    )
    began = time.perf_counter()
    model.learn(c.total_timesteps // batch * batch, callback=Curve())  # type: ignore[operator]
    seconds = time.perf_counter() - began
    test = normalized(make_vec_env(c.env_id, 1, seed=c.seed + 10_000), False)
    if c.normalize_obs:
        test.obs_rms = env.obs_rms
    evaluation, _ = evaluate_policy(model, test, EVALUATIONS, deterministic=True)
    return {
        "mean_return": points[-1][1],
        "evaluation": float(evaluation),
        "episodes": episodes,
        "steps": model.num_timesteps,
        "seconds": round(seconds, 1),
        "sps": round(model.num_timesteps / seconds),
        "curve": thinned(*zip(*points, strict=True)),
        "about": machine(),
    }


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is loaded, for the evaluations
    main(tyro.cli(Options))
