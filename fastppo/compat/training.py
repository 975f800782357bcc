"""One training of an algorithm: its folder, what it learned before, its schedules, and the calls of callbacks."""

from __future__ import annotations

import contextlib
import functools
import tempfile
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol, cast

import torch
from torch import nn

from fastppo.compat.callbacks import Hooks, Logger
from fastppo.compat.keywords import Schedule
from fastppo.monitoring.stats import Stats
from fastppo.runs.state_files import StateSnapshot
from fastppo.trainer import Trainer


class Model(Protocol):
    """What callbacks read of an algorithm while it trains.

    Attributes:
        num_timesteps: environment steps so far.
        logger: takes their figures.
    """

    num_timesteps: int
    logger: Logger


@contextlib.contextmanager
def run_folder(log: Path | None, name: str) -> Iterator[Path]:
    """Give the folder of a training: the next one in `log`; without it, one that is removed afterwards."""
    if log is None:
        with tempfile.TemporaryDirectory(prefix="fastppo-") as folder:
            yield Path(folder) / "run"
        return
    number = 1
    while (log / f"{name}_{number}").exists():
        number += 1
    yield log / f"{name}_{number}"


def hand_over(
    trainer: Trainer, learned: Mapping[str, nn.Module], optimizer: StateSnapshot | None
) -> dict[str, nn.Module]:
    """Copy what was learned so far into the modules of a new trainer, and return these.

    Args:
        trainer: before its first iteration.
        learned: the policy and, if rewards are normalised, their normaliser.
        optimizer: state of the optimiser; None: a new optimiser.
    """
    models: dict[str, nn.Module] = {"policy": trainer.policy}
    if trainer.reward_normalizer is not None:
        models["rewards"] = trainer.reward_normalizer
    for name, module in models.items():
        with torch.no_grad():
            saved = learned[name].state_dict()
            for key, value in module.state_dict().items():
                value.copy_(saved[key])
    if optimizer is not None:
        trainer.update.load_state_dict(optimizer.part("update"))
    return models


def follow_steps(
    trainer: Trainer, functions: Mapping[str, Schedule], steps_counted: Callable[[int], int], planned: int
) -> None:
    """Let coefficients follow the remaining progress of the program, 1 - steps / planned, instead of the trainer's.

    Args:
        trainer: before its first iteration.
        functions: of the remaining progress, from 1 to 0, by setting; the other settings keep their schedules.
        steps_counted: the steps that count for the schedules of iteration 0, 1, ...
        planned: environment steps, those of earlier trainings included.
    """
    schedules = trainer.learner.schedules

    def remaining(progress: float) -> float:
        return max(0.0, 1 - steps_counted(round(progress * trainer.n_iterations)) / planned)

    for name, schedule in list(schedules.items()):
        if (own := functions.get(name)) is not None:
            schedules[name] = functools.partial(_by_remaining, own, remaining)
        else:
            schedules[name] = functools.partial(_by_progress, schedule, remaining)


def _by_remaining(schedule: Schedule, remaining: Callable[[float], float], progress: float) -> float:
    return float(schedule(remaining(progress)))


def _by_progress(schedule: Schedule, remaining: Callable[[float], float], progress: float) -> float:
    return float(schedule(1 - remaining(progress)))


def train(trainer: Trainer, model: Model, hooks: Sequence[Hooks]) -> None:
    """Run the trainer, count the model's steps and call the hooks, until the end or until one of them stops it."""
    before, (n_steps, n_envs) = model.num_timesteps, trainer.rollout.rewards.shape
    with contextlib.closing(cast("Generator[Stats]", trainer.iterations())) as iterations:
        for stats in iterations:
            for hook in hooks:
                hook.rollout_start()
            answers = [True]
            for t in range(1, n_steps + 1 if hooks else 0):
                model.num_timesteps = before + stats.global_step - (n_steps - t) * n_envs
                answers = [hook.step() for hook in hooks]  # each is called, whatever the others return
                if not all(answers):
                    break
            model.num_timesteps = before + stats.global_step
            answers += [hook.rollout_end() for hook in hooks]
            model.logger.write(trainer.log)
            if not all(answers):
                return
