"""Train a policy, go on with it, play it, and hand it on."""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from fastppo.commands.console import open_console, program
from fastppo.config import Config
from fastppo.errors import CheckpointError, ConfigError, FinishedError

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.runs.result import Result
    from fastppo.trainer import Trainer


@dataclasses.dataclass(frozen=True)
class Train(Config):
    """Train a policy. Settings that are not given come from the environment's kind: see --preset."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """TOML file of settings, by the names of these flags; the flags win over it."""

    def __post_init__(self) -> None:
        """Nothing: Config checks, once tyro is done, which would draw a box around each message."""

    def settings(self, **changes: Any) -> Config:  # noqa: ANN401 - values of settings
        """The settings with `changes`, checked."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**given | changes)

    def __call__(self) -> int:
        """Train; exit status 0, or that of the signal that ended it."""
        config = self.settings()  # before torch is imported: mistakes answer at once
        from fastppo.resume_run import continue_run, resumable_run
        from fastppo.trainer import Trainer

        run = resumable_run(config) if config.resume == "auto" else None
        if run is not None:
            try:
                return _run(lambda console: continue_run(config, run, console))
            except CheckpointError as error:
                hint = f"--resume auto chose {run}; name another --run-dir to begin there."
                raise CheckpointError(f"{error} ({hint})") from None
        return _run(lambda console: Trainer(config, console=console))


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    total_timesteps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as planned)")] = (
        None
    )
    """Environment steps in all, to go on beyond what was planned."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the run's env id import its module (ids of the form module:Env-v0)."""

    def __call__(self) -> int:
        """Go on; exit status as of train."""
        if self.total_timesteps is not None and self.total_timesteps < 1:
            raise ConfigError(f"total_timesteps={self.total_timesteps} must be at least 1.")
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
    """Play whole episodes with the policy of a run folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    episodes: int = 20
    """How many episodes."""
    sampled: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """UpdateSample actions instead of taking the most probable ones."""
    seed: int = 0
    """Seed of the environments and of sampling."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the run's env id import its module (ids of the form module:Env-v0)."""
    best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the checkpoint that evaluated best while it trained, not the last model."""
    video: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Video one episode more into this .mp4, .webm or .gif (extra `video`); a .gif where there is no ffmpeg."""

    def __call__(self) -> int:
        """Play, and print one line."""
        if self.episodes < 1:
            raise ConfigError(f"episodes={self.episodes} must be at least 1.")
        from fastppo.evaluation.saved_policy import evaluate, record_video
        from fastppo.evaluation.video import check_video_name

        if self.video is not None:
            check_video_name(self.video)
        which: dict[str, Any] = {"seed": self.seed, "allow_import": self.allow_import, "best": self.best}
        which["deterministic"] = not self.sampled
        played = evaluate(self.run, self.episodes, **which)
        console = open_console()
        how = "sampled" if self.sampled else "greedy"
        lengths = played.lengths
        episodes = f"{len(lengths)} episode{'s' if len(lengths) > 1 else ''}"
        console.print(
            f"{episodes}, {how}: return {played.mean:.2f} +- {played.std:.2f} "
            f"(min {min(played.returns):.2f}, max {max(played.returns):.2f}), "
            f"length {sum(lengths) / len(lengths):.1f} (min {min(lengths)}, max {max(lengths)}){played.remark}",
            highlight=False,
            soft_wrap=True,
        )
        if self.video is not None:
            path, shot = record_video(self.run, self.video, **which)
            if path != self.video:
                console.print("no ffmpeg here: a GIF instead (pip install 'fastppo[video]' brings one)")
            frames = f"one episode more, return {shot.episode_return:.2f}, {len(shot.frames):,} frames"
            frames += "" if shot.whole else ", cut before its end"
            console.print(f"video:   {path} ({frames})", highlight=False, markup=False, soft_wrap=True)
        return 0


def _run(make: Callable[[Console], Trainer]) -> int:
    """Make a trainer and run it, under signals that stop it at the end of an iteration."""
    from fastppo.runtime.distributed import is_main_process
    from fastppo.runtime.signals import StopSignals

    console = open_console()
    console.quiet = not is_main_process()
    with StopSignals() as signals:
        try:
            trainer = make(console)
        except FinishedError as error:
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
            return 0
        settings = "  ".join(f"{key}={value}" for key, value in trainer.config.to_dict().items() if value is not None)
        console.print(f"{settings}\n", highlight=False, markup=False)
        result = trainer.run(signals)
    _print_result(console, result, trainer.config)
    if result.unsaved is not None:
        print(f"error: {result.unsaved}", file=sys.stderr)
        return 1
    return signals.exit_status if result.ended == "interrupted" else 0


def _print_result(console: Console, result: Result, config: Config) -> None:
    from rich.table import Table
    from rich.text import Text

    saved = "all is saved" if result.unsaved is None else "not all is saved"
    endings = {"target": f"target of {config.target_return} reached", "interrupted": f"interrupted; {saved}"}
    table = Table(
        title=f"{config.env_id}: {endings.get(result.ended, result.ended)}", title_justify="left", show_header=False
    )
    mean = f"{result.mean_return:.2f} (last 100 of {result.episodes:,} episodes)"
    table.add_row("mean return", mean if result.episodes else "- (no episode has ended)")
    table.add_row("steps", f"{result.global_step:,} in {result.seconds:.1f} s, {result.iterations:,} iterations")
    table.add_row("steps per second", f"{result.sps_steady:,.0f} steady, {result.sps_total:,.0f} total")
    whole = sum(result.phases.values()) or 1.0
    shares = sorted(((name, s / whole) for name, s in result.phases.items()), key=lambda item: -item[1])
    table.add_row("time went to", "  ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005))
    compiled = (
        f"{result.compilations} functions in {result.compile_seconds:.1f} s" if result.compilations else "nothing"
    )
    table.add_row("threads", f"{config.threads} of torch; compiled {compiled}")
    table.add_row("run folder", Text(str(result.run_dir)))
    console.print(table)
    run = shlex.quote(str(result.run_dir))
    lines = [
        f"curves:  {program('tensorboard')} --logdir {run}",
        f"play:    {program('fastppo')} eval {run} --episodes 20",
    ]
    lines.append(f"look:    {program('fastppo')} report {run}")
    if result.ended == "interrupted":
        lines.insert(0, f"go on:   {program('fastppo')} resume {run}")
    for line in lines:
        console.print(line, highlight=False, markup=False, soft_wrap=True)
