"""Check that what is promised holds: for an environment, for resuming, for numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console, print_checks
from fastppo.commands.training import Train
from fastppo.config import EnvKwargs
from fastppo.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class VerifyEnv:
    """Step an environment and say what it really does: dtypes, autoreset, seeds, speed, and how it can be resumed."""

    env_id: str = "CartPole-v1"
    """What to look at."""
    env_kwargs: EnvKwargs = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, as a JSON object."""
    steps: int = 300
    """How many steps of four environments to compare."""

    def __call__(self) -> int:
        """Print findings; exit status 1 if one is bad."""
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1.")
        from fastppo.analysis.verify_env import verify_env

        return print_checks(verify_env(self.env_id, self.env_kwargs, self.steps), "this environment keeps its promises")


@dataclasses.dataclass(frozen=True)
class VerifyResume(Train):
    """Train a little with these settings, once in one go and once interrupted and resumed, and compare every bit."""

    iterations: int = 6
    """How many; the interruption comes after half of them."""
    # what the verification itself decides
    total_timesteps: Annotated[int | None, tyro.conf.Suppress] = None
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    run_dir: Annotated[Path | None, tyro.conf.Suppress] = None
    checkpoint_every: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_minutes: Annotated[float, tyro.conf.Suppress] = 0.0
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "never"

    def __call__(self) -> int:
        """Print findings; exit status 1 if one is bad."""
        if self.iterations < 2:
            raise ConfigError(f"iterations={self.iterations} must be at least 2, to be interrupted between.")
        config = self.settings()
        from fastppo.analysis.verify_resume import verify_resume

        return print_checks(verify_resume(config, self.iterations), "a resumed run is the same run")


@dataclasses.dataclass(frozen=True)
class Replay:
    """Run again, on the CPU, what a capsule holds, and name the first tensor that is not finite."""

    capsule: Annotated[Path, tyro.conf.Positional]
    """The folder that a run left when its gradients were not finite."""

    def __call__(self) -> int:
        """Print where numbers stop being finite; exit status 1 if they do."""
        from fastppo.analysis.nan_replay import replay

        found, console = replay(self.capsule), open_console()
        bad = found.first_bad
        if bad is None:
            console.print(
                f"all numbers of all {found.minibatches} minibatches are finite here, on the CPU", highlight=False
            )
            return 0
        where = f"epoch {found.epoch}, minibatch {found.minibatch}"
        console.print(
            f"first not finite: {bad.name} {list(bad.shape)}, {bad.bad} numbers of it, first at {list(bad.first)}; "
            f"{where}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        for finding in found.tensors:
            state = f"{finding.bad} not finite" if finding.bad else "finite"
            text = f"{finding.name:<48} {state:<18} largest {finding.largest:.3g}"
            console.print(text, highlight=False, markup=False, soft_wrap=True)
        return 1
