"""Measure speed."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import tyro

from fastppo.commands.console import open_console, print_checks
from fastppo.commands.training import Train
from fastppo.config import Config, TargetReturn
from fastppo.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.analysis.bench import Point


_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--num-envs",), metavar="INT [INT ...]")]
_Vectorizations = Annotated[
    tuple[Literal["sync", "async", "pool", "native", "envpool", "tensor"], ...],
    tyro.conf.arg(metavar="{sync,async,pool,native,envpool,tensor} [...]"),
]


@dataclasses.dataclass(frozen=True)
class Bench(Train):
    """Measure training speed at several n_envs, and what limits it. Takes the settings of train beside its own."""

    n_envs: _Sizes = (1, 8, 64, 512)  # type: ignore[assignment]
    """Numbers of environments, each measured with each vectorisation."""
    vectorization: _Vectorizations = ("sync", "pool", "native")  # type: ignore[assignment]
    """Vectorisations."""
    seconds: float = 5.0
    """Seconds of training that are timed at each point, after warm-up and compilation."""
    save: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the fastest vectorisation for each n_envs, for `train --vectorization auto` on this machine."""
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
        """The settings of each point, checked."""
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be more than 0; 5 is enough on a quiet machine.")
        pool = {"workers": self.workers, "half_batches": self.half_batches}
        for name, value in pool.items():
            if value and "pool" not in self.vectorization:
                raise ConfigError(f"{name} is for the pool; add pool to --vectorization, or leave --{name} out.")
        no_pool = {"workers": None, "half_batches": False}

        def _pool(n: int) -> dict[str, Any]:
            return pool | {"half_batches": self.half_batches and n > 1}

        return [
            self.settings(n_envs=n, vectorization=v, name="bench", **(_pool(n) if v == "pool" else no_pool))
            for n in dict.fromkeys(self.n_envs)
            for v in dict.fromkeys(self.vectorization)
        ]

    def __call__(self) -> int:
        """Measure every point, print tables, write files."""
        configs = self.points()
        from fastppo.analysis import bench, bench_report
        from fastppo.envs.auto_vectorization import env_key, remember
        from fastppo.envs.registry import inspect_env
        from fastppo.runs.run_dir import create_run_dir, surroundings
        from fastppo.runtime.device import choose_device, machine_name

        env_name = inspect_env(self.env_id, self.env_kwargs).name  # mistakes answer here, not once for each point
        about = surroundings(choose_device(self.device))
        folder = create_run_dir(self.run_dir, env_name, self.name, self.seed)
        console, points = open_console(), list[bench.Point]()
        try:
            for point in _measured(configs, self.seconds, console):
                points.append(point)
                # after each, so that Ctrl-C leaves what was measured
                page = bench_report.write_files(folder, env_name, points, about)
        finally:
            if not points:
                folder.rmdir()
        for table in bench_report.tables(points):
            console.print(table)
        for point in points:
            console.print(
                f"n_envs {point.n_envs}, {point.vectorization}: {bench.verdict(point, points)}", highlight=False
            )
        best = bench.best_by_n_envs(points)
        if not best:
            return 1
        fastest = max(best.values(), key=lambda p: p.sps)
        console.print(
            f"\nfastest: n_envs {fastest.n_envs}, {fastest.vectorization}: {fastest.sps:,.0f} steps/s. More "
            "environments also mean fewer updates for the same steps: compare returns before you take the largest.",
            highlight=False,
        )
        if self.save:
            for point in best.values():
                saved = remember(env_key(env_name, self.env_kwargs), machine_name(), point.n_envs, point.choice())
            console.print(f"saved:   {saved}, for train --vectorization auto", highlight=False, soft_wrap=True)
        console.print(f"page:    {page}", highlight=False, soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine has and what auto chooses on it, and try whether training works here."""

    env_id: str = "CartPole-v1"
    """What is trained for some seconds."""
    seconds: float = 5.0
    """For how long."""

    def __call__(self) -> int:
        """Print findings; exit status 1 if one is bad."""
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be more than 0; 5 is enough.")
        from fastppo.analysis.doctor import examine

        return print_checks(examine(self.env_id, self.seconds), "everything essential works here")


@dataclasses.dataclass(frozen=True)
class Study(Train):
    """Train at several n_envs and seeds until a return is reached, and say which n_envs to take."""

    n_envs: _Sizes = (4, 16, 64, 256)  # type: ignore[assignment]
    """Numbers of environments to compare."""
    seeds: int = 5
    """Seeds 1 to this, for each n_envs."""
    hold: Literal["batch", "n_steps"] = "batch"
    """What stays the same: the batch (n_steps follows from n_envs), or n_steps (the batch grows with n_envs)."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: from the cores)")] = None
    """Runs at the same time; more than the cores allow would slow each other."""
    target_return: TargetReturn = "threshold"
    """The return to reach, as the mean of the last 100 episodes; `threshold`: the env's own, where it has one."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/...)")] = None
    """Folder of the study; one that was interrupted goes on."""
    checkpoint_minutes: float = 1.0
    """Save a checkpoint after so many minutes, for a study that is killed."""
    seed: Annotated[int, tyro.conf.Suppress] = 1
    name: Annotated[str, tyro.conf.Suppress] = "study"
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "auto"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False

    def __call__(self) -> int:
        """Run what hasn't run, print a table and a recommendation, write files."""
        base = self.settings(n_envs=None, run_dir=None)
        if self.jobs is not None and self.jobs < 1:
            raise ConfigError(f"jobs={self.jobs} must be at least 1.")
        from fastppo.analysis import study, study_report

        folder = self.run_dir or Path("runs") / f"study-{self.env_id.replace('/', '_').replace(':', '_')}"
        plan = study.plan_study(base, self.n_envs, self.seeds, self.hold, folder)
        study.begin_study(plan, base, folder)
        jobs, console, failures = self.jobs or study.choose_jobs(plan), open_console(), dict[Path, str]()
        done = sum(map(study.ended, plan.configs))
        again = f", {done} of them ended before" if done else ""
        console.print(f"{len(plan.configs)} runs{again}; {jobs} at a time; folder {folder}", highlight=False)
        for config, trouble in study.run_study(plan, jobs):
            assert config.run_dir is not None
            done += 1
            if trouble is not None:
                failures[config.run_dir] = trouble
            settings = study.summarize(plan, failures)
            study.write_study(folder, plan, settings)
            said = trouble or study.outcome(config)
            text = f"{done} of {len(plan.configs)}: n_envs {config.n_envs}, seed {config.seed}: {said}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        settings = study.summarize(plan, failures)
        study.write_study(folder, plan, settings)
        page = study_report.write_page(folder, self.env_id, plan, settings)
        console.print(study_report.terminal_table(settings))
        console.print(study.recommend(settings, plan.target), highlight=False, soft_wrap=True)
        console.print(f"page:    {page}", highlight=False, soft_wrap=True)
        return 1 if failures else 0


def _measured(configs: Sequence[Config], seconds: float, console: Console) -> Iterator[Point]:
    """Each point as it is measured, with a line of progress."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fastppo.analysis.bench import run_points

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for i, config in enumerate(configs):
            if i == 0 and not console.is_terminal:
                console.print(f"{len(configs)} points to measure; a line for each as it ends", highlight=False)
            which = f"{i + 1} of {len(configs)}: n_envs {config.n_envs}, {config.vectorization}"
            progress.update(task, description=f"{which}; about {seconds * 1.5 + 12:.0f} s")
            (point,) = run_points([config], seconds)
            result = f"failed: {point.failure}" if point.failure else f"{point.sps:,.0f} steps/s"
            progress.console.print(f"{which}: {result}", highlight=False, soft_wrap=True)
            yield point
