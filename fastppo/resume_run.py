"""Going on with a run that was interrupted, or that has more to do."""

from __future__ import annotations

import contextlib
import dataclasses
from pathlib import Path
from typing import Any

from rich.console import Console
from torch import nn

from fastppo.config import CHOSEN_AT_START, Config
from fastppo.envs.registry import Maker
from fastppo.errors import CheckpointError, ConfigError
from fastppo.runs.checkpoint import list_checkpoints, newest_checkpoint, read_spec, read_state, tidy
from fastppo.runs.run_dir import RunLock, find_run
from fastppo.trainer import Trainer


def resume(
    run: Path | str,
    *,
    total_timesteps: int | None = None,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
    console: Console | None = None,
    allow_import: bool = False,
) -> Trainer:
    """A trainer that goes on from the newest whole checkpoint of a run, in its folder.

    Args:
        run: the run folder.
        total_timesteps: how many in all; None: as planned. Schedules stretch over the new plan.
        make_env: makes one environment, where the run's came from Python.
        policy: your own network, where the run trained one.
        console: where progress goes; None for silence.
        allow_import: the run's env id names a module that may be imported.

    Raises:
        FinishedError: it has run all of its steps.
        CheckpointError: no checkpoint can be used.
        ConfigError, EnvError: see their texts.
    """
    run_dir = Path(run)
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is no folder; name a run folder, as train prints it.")
    _settle_folder(run_dir)
    path, problems = newest_checkpoint(run_dir)
    config = saved_config(path)
    _, about = read_spec(path)
    if ":" in config.env_id and make_env is None and not allow_import:
        raise ConfigError(f"{run_dir} trains on {config.env_id}, which imports code; repeat with --allow-import.")
    if about.get("make_env") and make_env is None:
        raise ConfigError(
            f"{run_dir} trains on {about.get('env')} from make_env; resume it with resume(..., make_env=...)."
        )
    changes: dict[str, Any] = {"run_dir": run_dir, "init_from": None}
    if total_timesteps is not None:
        changes["total_timesteps"] = total_timesteps
    return _go_on(dataclasses.replace(config, **changes), path, problems, console, make_env, policy)


def _settle_folder(run_dir: Path) -> None:
    """Put right what a process that was killed in the middle of a save left, unless another trains there."""
    if not (run_dir / "checkpoints").is_dir():
        return
    with contextlib.suppress(ConfigError, OSError):
        lock = RunLock(run_dir)
        try:
            tidy(run_dir)
        finally:
            lock.release()


def resumable_run(config: Config) -> Path | None:
    """The run folder that `resume="auto"` goes on with; None: there is none, so begin."""
    run_dir = config.run_dir or find_run(config.env_id.rpartition(":")[2], config.name, config.seed)
    if run_dir is not None:
        _settle_folder(run_dir)
    return run_dir if run_dir is not None and list_checkpoints(run_dir) else None


def continue_run(config: Config, run_dir: Path, console: Console | None = None) -> Trainer:
    """A trainer with the settings `config` that goes on with `run_dir`; what was measured there is taken from there.

    Raises:
        FinishedError: it has run all of its steps.
        CheckpointError: no checkpoint can be used, or it is of a run with other settings.
    """
    path, problems = newest_checkpoint(run_dir)
    before = saved_config(path)
    measured = {name: getattr(before, name) for name in CHOSEN_AT_START if getattr(config, name) in (None, "auto")}
    if config.vectorization == "auto":
        measured |= {"workers": before.workers, "half_batches": before.half_batches}
    return _go_on(dataclasses.replace(config, **measured, run_dir=run_dir, init_from=None), path, problems, console)


def _go_on(
    config: Config,
    path: Path,
    problems: list[str],
    console: Console | None,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
) -> Trainer:
    if console is not None:
        for problem in problems:
            text = f"warning: {problem} Going on from {path.name}."
            console.print(text, highlight=False, markup=False, soft_wrap=True)
    return Trainer(config, make_env, policy, console, resume_from=path)


def saved_config(checkpoint: Path) -> Config:
    """The settings of the run that a checkpoint is of.

    Raises:
        CheckpointError: they can't be understood.
    """
    found = read_state(checkpoint, 0)
    assert found is not None, "verified"
    try:
        return Config.from_dict(found[1]["config"], str(checkpoint))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{checkpoint} says nothing of its settings ({type(error).__name__}).") from None
