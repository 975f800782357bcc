"""Train a policy, resume its run, evaluate it."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastppo.commands.console import open_console, program
from fastppo.commands.settings import SettingsCommand, default_folder
from fastppo.config import Config, differences_from_defaults
from fastppo.errors import CheckpointError, ConfigError, FinishedError
from fastppo.runs.run_dir import RunLock, check_run_folder
from fastppo.runtime.console import print_line

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.runs.result import Result
    from fastppo.trainer import Trainer

RunFolder = Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="RUN")]


@dataclasses.dataclass(frozen=True)
class Train(SettingsCommand):
    """Train a policy. Defaults depend on the kind of environment; see --profile."""

    seeds: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: one run)")] = None
    """Train this many seeds, from --seed on, in processes of their own, and summarise them. The same command continues
    in --run-dir, by default runs/seeds-<env>."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: by cores)")] = None
    """Concurrent runs of --seeds."""

    def __call__(self) -> int:
        """Train, and return 0, 1 if the end of the run could not be saved, or 128 + the signal that ended it."""
        from fastppo.builders.early_checks import check_early

        if self.seeds is not None:
            return self._train_seeds(self.seeds)
        if self.jobs is not None:
            raise ConfigError(f"jobs={self.jobs} needs --seeds, as a single run is one process; or leave it out.")
        config = self.settings()
        check_early(config)  # before the import of torch, so that mistakes are reported at once
        from fastppo.resume_run import continue_run, resumable_run
        from fastppo.trainer import Trainer

        run = resumable_run(config) if config.resume == "auto" else None
        if run is not None:
            try:
                return _run(lambda console: continue_run(config, run, console))
            except CheckpointError as error:
                hint = f"--resume auto chose {run}; give another --run-dir to start a new run."
                raise CheckpointError(f"{error} ({hint})") from None
        return _run(lambda console: Trainer(config, console=console))

    def _train_seeds(self, seeds: int) -> int:
        """Train the seeds that are left, print a summary and write files; return 1 if a run failed, else 0."""
        from fastppo.builders.early_checks import check_early

        base = self.settings(run_dir=None)
        for name, value in (("seeds", seeds), ("jobs", self.jobs)):
            if value is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; nearest valid value: 1.")
        check_early(base)
        from fastppo.analysis import seeds as several
        from fastppo.analysis import seeds_report
        from fastppo.analysis.training_processes import check_single_process, ended, run_each

        check_single_process("train --seeds")
        folder = self.run_dir or default_folder("seeds", self.env_id)
        configs, console, failures = several.plan_seeds(base, seeds, folder), open_console(), dict[int, str]()
        jobs = self.jobs or several.choose_jobs(base, seeds)
        several.begin_seeds(base, folder)
        lock, done = RunLock(folder), sum(map(ended, configs))
        again = f", {done} of them complete" if done else ""
        print_line(console, f"{seeds} seeds{again}; {jobs} at a time; folder {folder}")
        with closing(run_each(configs, jobs)) as runs:
            for config, trouble in runs:
                done += 1
                if trouble is not None:
                    failures[config.seed] = trouble
                several.write_summary(folder, several.summarize(configs, failures))
                print_line(console, f"{done} of {seeds}: seed {config.seed}: {trouble or several.outcome(config)}")
        summary = several.summarize(configs, failures)
        several.write_summary(folder, summary)
        page = seeds_report.write_page(folder, self.env_id, summary)
        lock.release()
        console.print(seeds_report.terminal_table(summary))
        print_line(console, several.in_words(summary))
        print_line(console, f"page:        {page}", wrap=False)
        print_line(
            console, f"report:      {program('fastppo')} report {shlex.quote(str(folder))}/runs/seed*", wrap=False
        )
        return 1 if failures else 0


@dataclasses.dataclass(frozen=True)
class Resume:
    """Resume a run from its newest checkpoint."""

    run: RunFolder
    """Run folder."""
    total_timesteps: Annotated[
        int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: as planned)")
    ] = None
    """Environment steps in total, to extend the run."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow the run's settings to import code: env_id of the form module:Env-v0, and wrappers."""

    def __call__(self) -> int:
        """Resume, and return the exit status, as `train` does."""
        check_run_folder(self.run)
        from fastppo.resume_run import resume

        return _run(
            lambda console: resume(
                self.run,
                total_timesteps=self.total_timesteps,
                console=console,
                allow_import=self.allow_import,
            )
        )


@dataclasses.dataclass(frozen=True)
class Eval:
    """Evaluate the policy of a run over whole episodes."""

    run: RunFolder
    """Run folder."""
    episodes: int = 20
    """Episodes to play."""
    sampled: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Sample actions instead of taking the most probable ones."""
    seed: int = 0
    """Seed of environments and action sampling."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Allow the run's settings to import code: env_id of the form module:Env-v0, and wrappers."""
    max_steps: Annotated[
        int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: the run's --eval-max-steps)")
    ] = None
    """Maximum steps of an episode, which is then cut."""
    best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Evaluate the checkpoint with the best evaluation during training, not the last one."""
    video: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Also record one episode to this .mp4, .webm or .gif (extra `video`); without ffmpeg a .gif is written."""

    def __call__(self) -> int:
        """Print returns and lengths of the episodes on one line; return 0."""
        if self.episodes < 1:
            raise ConfigError(f"episodes={self.episodes} must be at least 1; nearest valid value: 1.")
        check_run_folder(self.run)
        from fastppo.evaluation.saved_policy import evaluate, record_video

        which: dict[str, Any] = {"seed": self.seed, "allow_import": self.allow_import, "best": self.best}
        which["deterministic"] = not self.sampled
        if self.video is not None:  # first, because rendering may fail
            path, shot = record_video(self.run, self.video, **which)
        played = evaluate(self.run, self.episodes, max_steps=self.max_steps, **which)
        console = open_console()
        how = "sampled" if self.sampled else "greedy"
        lengths = played.lengths
        episodes = f"{len(lengths)} episode{'s' if len(lengths) > 1 else ''}"
        print_line(
            console,
            f"{episodes}, {how}: return {played.mean:.2f} +- {played.std:.2f} "
            f"(min {min(played.returns):.2f}, max {max(played.returns):.2f}), "
            f"length {sum(lengths) / len(lengths):.1f} (min {min(lengths)}, max {max(lengths)}){played.remark}",
        )
        if self.video is not None:
            if path != self.video:
                print_line(
                    console, "ffmpeg not found, so a GIF is written (pip install 'fastppo[video]' brings ffmpeg)"
                )
            frames = f"another episode, return {shot.episode_return:.2f}, {len(shot.frames):,} frames"
            frames += "" if shot.whole else ", cut before its end"
            print_line(console, f"video:   {path} ({frames})", wrap=False)
        return 0


def _run(make: Callable[[Console], Trainer]) -> int:
    """Make a trainer and run it, print its result and return the exit status.

    Signals stop the run at the end of an iteration.
    """
    from fastppo.runtime.distributed import is_main_process
    from fastppo.runtime.signals import StopSignals

    console = open_console()
    console.quiet = not is_main_process()
    with StopSignals() as signals:
        try:
            trainer = make(console)
        except FinishedError as error:
            print_line(console, str(error))
            return 0
        env = trainer.env_info
        print_line(console, differences_from_defaults(trainer.config, env.kind, atari=env.atari))
        _print_folder(console, trainer.run_dir)
        print_line(console, "")
        result = trainer.run(signals)
    _print_result(console, result, trainer.config)
    if result.unsaved is not None:
        print(f"error: {result.unsaved}", file=sys.stderr)
        return 1
    return signals.exit_status if result.ended == "interrupted" else 0


def _print_result(console: Console, result: Result, config: Config) -> None:
    from rich.table import Table

    saved = "everything is saved" if result.unsaved is None else "not everything is saved"
    endings = {"target": f"target of {config.target_return} reached", "interrupted": f"interrupted; {saved}"}
    table = Table(
        title=f"{config.env_id}: {endings.get(result.ended, result.ended)}", title_justify="left", show_header=False
    )
    of = f"last 100 of {result.episodes:,}" if result.episodes > 100 else f"{result.episodes}"
    mean = f"{result.mean_return:.2f} ({of} episode{'s' if result.episodes > 1 else ''})"
    table.add_row("mean return", mean if result.episodes else "- (no episode ended)")
    table.add_row(
        "steps", f"{result.global_step:,} in {result.seconds:.1f} s of training, {result.iterations:,} iterations"
    )
    table.add_row("steps per second", f"{result.sps_steady:,.0f} steady, {result.sps_total:,.0f} total")
    table.add_row("time spent", _time_spent(result))
    compiled = f"{result.compilations} functions in {result.compile_seconds:.1f} s" if result.compilations else "no"
    if config.compile == "fused":
        language = "C" if config.device == "cpu" else "Triton"
        compiled = f"fused: in {language}, ready in {result.compile_seconds:.1f} s"
    table.add_row("threads", str(config.threads))
    table.add_row("compiled", compiled)
    console.print(table)
    _print_folder(console, result.run_dir)
    run, allowed = shlex.quote(str(result.run_dir)), " --allow-import" if config.imported else ""
    if result.ended == "interrupted":
        print_line(console, f"resume:      {program('fastppo')} resume {run}{allowed}", wrap=False)
    print_line(console, f"evaluate:    {program('fastppo')} eval {run} --episodes 20{allowed}", wrap=False)
    print_line(console, f"report:      {program('fastppo')} report {run}", wrap=False)


def _time_spent(result: Result) -> str:
    """Return the wall time of this process from set-up on, and each phase's share of it."""
    whole, spent = result.wall_seconds, {"set-up": result.setup_seconds} | result.phases
    spent["other"] = whole - sum(spent.values())
    shares = sorted(((name, seconds / whole) for name, seconds in spent.items()), key=lambda item: -item[1])
    listed = "  ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005)
    return f"{whole:.1f} s after imports: {listed}"


def _print_folder(console: Console, run_dir: Path) -> None:
    """Print the run folder and how to look at it, for copying."""
    print_line(console, f"run folder:  {run_dir}", wrap=False)
    print_line(console, f"tensorboard: {program('tensorboard')} --logdir {shlex.quote(str(run_dir))}", wrap=False)
