"""Resuming a run that was interrupted, or training it for more steps."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fastppo.config import CHOSEN_AT_START, Config, as_path
from fastppo.envs.make_envs import Maker
from fastppo.errors import CheckpointError, ConfigError
from fastppo.runs.checkpoint import clean_up, list_checkpoints, newest_checkpoint
from fastppo.runs.open_run import open_run, read_config
from fastppo.runs.run_dir import RunLock, check_run_folder, find_run, is_folder
from fastppo.runs.state_files import read_json
from fastppo.runtime.console import print_line, progress_console
from fastppo.runtime.cores import processes
from fastppo.trainer import Trainer


def resume(
    run: Path | str,
    *,
    total_timesteps: int | None = None,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
    console: Console | None = None,
    allow_import: bool = False,
    progress: bool | None = None,
) -> Trainer:
    """Return a trainer that continues a run in its folder, from its newest intact checkpoint.

    Args:
        run: the run folder.
        total_timesteps: environment steps in total, at least one iteration more than the run has; None: as planned.
            Schedules stretch over the new total.
        make_env: makes one environment; needed if the run used a `make_env`.
        policy: your own network; needed if the run trained one.
        console: shows progress; None: as `progress` says.
        allow_import: allow settings that name code to import (env_id, wrappers).
        progress: show progress on standard output; None: if it is a terminal.

    Raises:
        FinishedError: the run has taken all of its steps.
        CheckpointError: no checkpoint can be used.
        ConfigError, EnvError: see their texts.
    """
    run_dir = as_path(run, "run")
    check_run_folder(run_dir)
    _clean_up_unless_locked(run_dir)
    path, problems = newest_checkpoint(run_dir)
    config = open_run(path, make_env, allow_import)
    changes: dict[str, Any] = {"run_dir": run_dir, "init_from": None}
    if total_timesteps is not None:
        if total_timesteps != config.total_timesteps:  # a command that is repeated is no mistake
            _check_total(run_dir, path, config, total_timesteps)
        changes["total_timesteps"] = total_timesteps
    console = progress_console(progress) if console is None else console
    return _resume_from(dataclasses.replace(config, **changes), path, problems, console, make_env, policy)


def resumable_run(config: Config) -> Path | None:
    """Return the run folder that `resume="auto"` continues; None if there is none, so that a new run begins."""
    run_dir = config.run_dir or find_run(config.env_id.rpartition(":")[2], config.name, config.seed)
    if run_dir is not None:
        _clean_up_unless_locked(run_dir)
    return run_dir if run_dir is not None and list_checkpoints(run_dir) else None


def continue_run(config: Config, run_dir: Path, console: Console | None = None) -> Trainer:
    """Return a trainer that continues `run_dir` with the settings `config`, keeping what was measured there.

    Raises:
        FinishedError: the run has taken all of its steps.
        CheckpointError: no checkpoint can be used, or the run has other settings.
    """
    path, problems = newest_checkpoint(run_dir)
    before = read_config(path)
    measured = {name: getattr(before, name) for name in CHOSEN_AT_START if getattr(config, name) in (None, "auto")}
    if config.action_masks == "auto":
        measured["action_masks"] = before.action_masks
    if config.vectorization == "auto":
        measured |= {"workers": before.workers, "half_batches": before.half_batches}
    config = dataclasses.replace(config, **measured, run_dir=run_dir, init_from=None)
    return _resume_from(config, path, problems, console)


def _check_total(run_dir: Path, checkpoint: Path, config: Config, total_timesteps: int) -> None:
    """Check that the new total leaves an iteration to train; an iteration is one rollout on each process.

    Raises:
        ConfigError: it is too small.
    """
    path, batch = checkpoint / "state-0.json", config.batch_size * processes()
    saved = read_json(path)
    try:
        rollouts = int(saved["values"]["progress"]["iteration"]) * int(saved["about"]["world_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None
    done = round(rollouts / processes())  # as `restore` counts them
    smallest = (done + 1) * batch
    if isinstance(total_timesteps, (int, float)) and total_timesteps < smallest:
        raise ConfigError(
            f"total_timesteps={total_timesteps:,} leaves nothing to train: {run_dir} has {done:,} iterations of "
            f"{batch:,} steps, and the total counts these; nearest valid value: {smallest:,}."
        )


def _clean_up_unless_locked(run_dir: Path) -> None:
    """Remove what a process killed during a save left behind, unless another process trains there."""
    if not is_folder(run_dir) or not (run_dir / "checkpoints").is_dir():
        return
    with contextlib.suppress(ConfigError, OSError):
        lock = RunLock(run_dir)
        try:
            clean_up(run_dir)
        finally:
            lock.release()


def _resume_from(
    config: Config,
    path: Path,
    problems: list[str],
    console: Console | None,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
) -> Trainer:
    for problem in problems:
        print_line(console, f"warning: {problem} Resuming from {path.name}.")
    return Trainer(config, make_env, policy, console, resume_from=path, progress=False)
