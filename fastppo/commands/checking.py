"""Check environments, exact resume, and runs that ended on non-finite gradients."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console, print_checks
from fastppo.commands.settings import SettingsCommand
from fastppo.config import Config, EnvKwargs
from fastppo.errors import CheckpointError, ConfigError
from fastppo.runtime.console import print_line


@dataclasses.dataclass(frozen=True)
class VerifyEnv:
    """Check an environment: dtypes, autoreset, seeds, speed, resume."""

    env_id: Annotated[str, tyro.conf.arg(metavar="ID")] = "CartPole-v1"
    """Environment id to check."""
    env_kwargs: Annotated[EnvKwargs, tyro.conf.arg(help_behavior_hint="(default: none)")] = dataclasses.field(
        default_factory=dict
    )
    """Keyword arguments of the environment, as a JSON object."""
    wrappers: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[MODULE:NAME ...]", help_behavior_hint="(default: none)")
    ] = ()
    """Wrappers of the environment, the innermost first."""
    obs_keys: Annotated[tuple[str, ...], tyro.conf.arg(metavar="[KEY ...]", help_behavior_hint="(default: all)")] = ()
    """Keys of a Dict (or indices of a Tuple) observation to read."""
    critic_obs_keys: Annotated[
        tuple[str, ...], tyro.conf.arg(metavar="[KEY ...]", help_behavior_hint="(default: none)")
    ] = ()
    """Keys that only the critic reads."""
    action_masks: Literal["auto", "off"] = "auto"
    """Choose among allowed actions only, if the environment says which these are."""
    steps: Annotated[int, tyro.conf.arg(metavar="STEPS")] = 300
    """Steps to compare, of four environments."""

    def __call__(self) -> int:
        """Print the checks and return 1 if one failed, else 0."""
        if self.steps < 1:
            raise ConfigError(f"steps={self.steps} must be at least 1; nearest valid value: 1.")
        from fastppo.builders.early_checks import check_early

        c = Config(
            env_id=self.env_id,
            env_kwargs=self.env_kwargs,
            wrappers=self.wrappers,
            obs_keys=self.obs_keys,
            critic_obs_keys=self.critic_obs_keys,
            action_masks=self.action_masks,
        )
        check_early(c, trains=False)
        from fastppo.analysis.verify_env import verify_env
        from fastppo.runs.inspect_env import reading_of

        checks = verify_env(c.env_id, c.env_kwargs, self.steps, wrappers=c.wrappers, reading=reading_of(c))
        return print_checks(checks, "this environment passes all checks")


@dataclasses.dataclass(frozen=True)
class VerifyResume(SettingsCommand):
    """Check that a resumed run equals an uninterrupted one, bit for bit."""

    iterations: int = 6
    """Training iterations; the run is interrupted after half of them."""
    # the check itself sets these
    total_timesteps: Annotated[int | None, tyro.conf.Suppress] = None
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    run_dir: Annotated[Path | None, tyro.conf.Suppress] = None
    checkpoint_every: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_minutes: Annotated[float, tyro.conf.Suppress] = 0.0
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "never"

    def __call__(self) -> int:
        """Print the checks and return 1 if one failed, else 0."""
        if self.iterations < 2:
            raise ConfigError(
                f"iterations={self.iterations} leaves no iteration to interrupt after; nearest valid value: 2."
            )
        from fastppo.builders.early_checks import check_early

        config = self.settings()
        check_early(config, trains=False)
        from fastppo.analysis.verify_resume import verify_resume

        return print_checks(verify_resume(config, self.iterations), "a resumed run is the same run")


@dataclasses.dataclass(frozen=True)
class Replay:
    """Repeat a non-finite update on the CPU and name its first bad tensor."""

    capsule: Annotated[Path, tyro.conf.Positional, tyro.conf.arg(metavar="FOLDER")]
    """Folder that a run wrote when its gradients were NaN or infinite."""

    def __call__(self) -> int:
        """Print the first tensor that is not finite and return 1, or 0 if all are finite."""
        if not (self.capsule / "capsule.json").is_file():
            raise CheckpointError(
                f"{self.capsule} holds no NaN dump (capsule.json is missing); name the capsule-... folder of a run."
            )
        from fastppo.analysis.nan_replay import replay

        found, console = replay(self.capsule), open_console()
        bad = found.first_bad
        if bad is None:
            print_line(console, f"all tensors of all {found.minibatches} minibatches are finite on the CPU")
            return 0
        where = f"epoch {found.epoch}, minibatch {found.minibatch}"
        print_line(
            console,
            f"first not finite: {bad.name} {list(bad.shape)}, {bad.bad} of its numbers, the first at "
            f"{list(bad.first)}; {where}",
        )
        for finding in found.tensors:
            state = f"{finding.bad} not finite" if finding.bad else "finite"
            print_line(console, f"{finding.name:<48} {state:<18} largest {finding.largest:.3g}")
        return 1
