"""Measure training speed, the machine, and which n_envs reaches a return first."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastppo.commands.console import open_console, print_checks
from fastppo.commands.flags import flag
from fastppo.commands.settings import SettingsCommand, default_folder
from fastppo.config import Config, TargetReturn
from fastppo.errors import ConfigError
from fastppo.runtime.console import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.analysis.bench import Point


_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(metavar="INT [INT ...]")]
_Vectorizations = Annotated[
    tuple[Literal["sync", "async", "pool", "native", "envpool", "tensor"], ...],
    tyro.conf.arg(metavar="{sync,async,pool,native,envpool,tensor} [...]"),
]


@dataclasses.dataclass(frozen=True)
class Bench(SettingsCommand):
    """Measure training speed at several n_envs, and what limits it."""

    n_envs: _Sizes = (1, 8, 64, 512)  # type: ignore[assignment]
    """Numbers of environments; each is measured with each vectorisation."""
    vectorization: _Vectorizations = ("sync", "pool", "native")  # type: ignore[assignment]
    """Vectorisations to measure."""
    seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 5.0
    """Timed seconds of training per point, after warm-up and compilation."""
    save: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Save the fastest vectorisation per n_envs, for `train --vectorization auto` on this machine."""
    total_timesteps: Annotated[int | None, tyro.conf.Suppress] = None
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    init_from: Annotated[Path | None, tyro.conf.Suppress] = None
    name: Annotated[str, tyro.conf.Suppress] = "bench"
    checkpoint_every: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_minutes: Annotated[float, tyro.conf.Suppress] = 0.0
    keep_checkpoints: Annotated[int, tyro.conf.Suppress] = Config.keep_checkpoints
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "never"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False
    eval_every: Annotated[int | None, tyro.conf.Suppress] = None
    eval_episodes: Annotated[int, tyro.conf.Suppress] = Config.eval_episodes

    def points(self) -> list[Config]:
        """Return the checked settings of each point."""
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be finite and greater than 0; 5 is enough when idle.")
        if not self.n_envs:
            raise ConfigError("--n-envs needs at least one value, such as 1 8 64.")
        if not self.vectorization:
            raise ConfigError("--vectorization needs at least one value, such as sync pool.")
        pool = {"workers": self.workers, "half_batches": self.half_batches}
        for name, value in pool.items():
            if value and "pool" not in self.vectorization:
                raise ConfigError(f"{name} needs the pool; add pool to --vectorization, or leave {flag(name)} out.")
        no_pool = {"workers": None, "half_batches": False}

        def _pool(n: int) -> dict[str, Any]:
            return pool | {"half_batches": self.half_batches and n > 1}

        wanted = dict.fromkeys(self.vectorization)
        if self.wrappers and self.vectorization == Bench.vectorization:
            del wanted["native"]  # takes no wrappers
        return [
            self.settings(n_envs=n, vectorization=v, name="bench", **(_pool(n) if v == "pool" else no_pool))
            for n in dict.fromkeys(self.n_envs)
            for v in wanted
        ]

    def __call__(self) -> int:
        """Measure every point, print tables and write files; return 1 if every point failed, else 0."""
        from fastppo.builders.early_checks import check_early

        configs = self.points()
        for config in configs:
            check_early(config, trains=False)  # before the import of torch, and once, not at every point
        from fastppo.analysis import bench, bench_report
        from fastppo.envs.auto_vectorization import env_key, remember
        from fastppo.runs.inspect_env import inspect_configured
        from fastppo.runs.run_dir import create_run_dir
        from fastppo.runs.system_info import system_info
        from fastppo.runtime.device import choose_device, machine_name

        # fail here once, not at every point
        env_name = inspect_configured(configs[0]).name
        about = system_info(choose_device(self.device))
        folder = create_run_dir(self.run_dir, env_name, self.name, self.seed)
        console, points = open_console(), list[bench.Point]()
        try:
            for point in _measured(configs, self.seconds, console):
                points.append(point)
                # after each point, so that Ctrl-C keeps the measured ones
                page = bench_report.write_files(folder, env_name, points, about)
        finally:
            if not points:
                folder.rmdir()
        for table in bench_report.tables(points):
            console.print(table)
        for point in points:
            print_line(console, f"n_envs {point.n_envs}, {point.vectorization}: {bench.verdict(point, points)}")
        best = bench.best_by_n_envs(points)
        if not best:
            return 1
        print_line(console, f"\n{bench.conclusion(points)}")
        if self.save:
            winners = bench.clear_winners(points)
            for n in best.keys() - winners.keys():
                print_line(console, f"not saved: n_envs {n} has no clear winner")
            for point in winners.values():
                key = env_key(env_name, self.env_kwargs, self.wrappers)
                saved = remember(key, machine_name(), point.n_envs, point.choice())
            if winners:
                print_line(console, f"saved:   {saved}, for train --vectorization auto")
        print_line(console, f"page:    {page}", wrap=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Check this machine, show what `auto` chooses on it, and try to train."""

    env_id: Annotated[str, tyro.conf.arg(metavar="ID")] = "CartPole-v1"
    """Environment id of the training test."""
    seconds: Annotated[float, tyro.conf.arg(metavar="SECONDS")] = 5.0
    """Duration of the training test, in seconds."""
    clear_cache: tyro.conf.FlagCreatePairsOff[bool] = False
    """Delete the compiled C libraries instead; the next run compiles what it needs, in a second or two."""

    def __call__(self) -> int:
        """Print the checks and return 1 if one failed, else 0."""
        if self.clear_cache:
            from fastppo.native.library import cache_folder, clear_cache

            folder = cache_folder() or "no cache folder"
            print_line(open_console(), f"{folder}: {clear_cache()} compiled libraries deleted", wrap=False)
            return 0
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be finite and greater than 0; 5 is enough.")
        from fastppo.envs.factory import find_spec

        find_spec(self.env_id)
        from fastppo.analysis.doctor import examine

        return print_checks(examine(self.env_id, self.seconds), "this machine can train")


@dataclasses.dataclass(frozen=True)
class Study(SettingsCommand):
    """Train several n_envs and seeds to a return, and recommend an n_envs."""

    n_envs: _Sizes = (4, 16, 64, 256)  # type: ignore[assignment]
    """Numbers of environments to compare."""
    seeds: int = 5
    """Seeds per n_envs: 1 to this number."""
    hold: Literal["batch", "n_steps"] = "batch"
    """Hold the batch fixed (n_steps = batch / n_envs), or n_steps (the batch grows with n_envs)."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: by cores)")] = None
    """Concurrent runs; more than the default slow each other down."""
    target_return: TargetReturn = "threshold"
    """Mean return of 100 episodes to reach; `threshold`: the environment's reward_threshold, if it has one."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/study-<env>)")] = (
        None
    )
    """Folder of the study; the same command resumes an interrupted study there."""
    checkpoint_minutes: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 1.0
    """Minutes between checkpoints of each run, from which a killed study resumes."""
    seed: Annotated[int, tyro.conf.Suppress] = 1
    name: Annotated[str, tyro.conf.Suppress] = "study"
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "auto"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False

    def __call__(self) -> int:
        """Run what is left of the study, print a recommendation and write files; return 1 if a run failed, else 0."""
        from fastppo.builders.early_checks import check_early

        base = self.settings(n_envs=None, run_dir=None)
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs={self.jobs} must be at least 1; nearest valid value: 1.")
        if self.seeds < 1:
            raise ConfigError(f"seeds={self.seeds} must be at least 1; use 5 for a useful interval.")
        if not self.n_envs:
            raise ConfigError("--n-envs needs at least one value, such as 4 16 64.")
        if (smallest := min(self.n_envs)) < 1:
            raise ConfigError(f"n_envs={smallest} must be at least 1; nearest valid value: 1.")
        check_early(base, trains=False)
        from fastppo.analysis import study, study_report
        from fastppo.analysis.training_processes import check_single_process, ended, run_each
        from fastppo.runs.run_dir import RunLock

        check_single_process("study")
        folder = self.run_dir or default_folder("study", self.env_id)
        plan = study.plan_study(base, self.n_envs, self.seeds, self.hold, folder)
        for config in plan.configs:
            check_early(config)
        study.begin_study(plan, base, folder)
        lock = RunLock(folder)
        jobs, console, failures = self.jobs or study.choose_jobs(plan), open_console(), dict[Path, str]()
        done = sum(map(ended, plan.configs))
        again = f", {done} of them complete" if done else ""
        print_line(console, f"{len(plan.configs)} runs{again}; {jobs} at a time; folder {folder}")
        with closing(run_each(plan.configs, jobs)) as runs:
            for config, trouble in runs:
                assert config.run_dir is not None
                done += 1
                if trouble is not None:
                    failures[config.run_dir] = trouble
                candidates = study.summarize(plan, failures)
                study.write_study(folder, plan, candidates)
                said = trouble or study.outcome(config)
                print_line(
                    console, f"{done} of {len(plan.configs)}: n_envs {config.n_envs}, seed {config.seed}: {said}"
                )
        candidates = study.summarize(plan, failures)
        study.write_study(folder, plan, candidates)
        page = study_report.write_page(folder, self.env_id, plan, candidates)
        lock.release()
        console.print(study_report.terminal_table(candidates))
        print_line(console, study.recommend(candidates, plan.target))
        print_line(console, f"page:    {page}", wrap=False)
        return 1 if failures else 0


def _measured(configs: Sequence[Config], seconds: float, console: Console) -> Iterator[Point]:
    """Yield each point once it is measured, and show progress."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fastppo.analysis.bench import run_points

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for i, config in enumerate(configs):
            if i == 0:
                print_line(console, _plan_text(configs, seconds))
            which = f"{i + 1} of {len(configs)}: n_envs {config.n_envs}, {config.vectorization}"
            progress.update(task, description=which)
            (point,) = run_points([config], seconds)
            result = f"failed: {point.failure}" if point.failure else f"{point.sps:,.0f} steps/s"
            for doubt in point.doubts():
                result += f"; unreliable: {doubt}"
            print_line(progress.console, f"{which}: {result}")
            yield point


def _plan_text(configs: Sequence[Config], seconds: float) -> str:
    """Return the number of points and the time they take, most of which is often compilation."""
    compiles = configs[0].compile != "off"
    start = 16 if compiles else 4
    hint = f", {start} s of it to start and compile (--compile off: 4 s)" if compiles else ""
    total = len(configs) * (start + 1.5 * seconds)
    text = f"{total:.0f} s" if total < 100 else f"{total / 60:.0f} min"
    return f"measuring {len(configs)} points: about {text} on an idle machine, {start + 1.5 * seconds:.0f} s each{hint}"
