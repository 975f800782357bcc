"""Build the observers of a run from a resolved config: the logger, evaluation, the environment monitor, the saver."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console

from fastppo.config import Config
from fastppo.envs.make_envs import EnvInfo
from fastppo.envs.vec_env import VecEnv
from fastppo.evaluation.periodic import PeriodicEvaluation
from fastppo.monitoring.env_monitor import EnvMonitor
from fastppo.monitoring.health_rules import RunTraits, rounding_of
from fastppo.monitoring.run_logger import RunLogger
from fastppo.policies.policy import Policy
from fastppo.ppo.metrics import Metrics
from fastppo.runs.checkpoint_writer import CheckpointWriter
from fastppo.runs.run_saver import RunSaver
from fastppo.runs.run_state import RunState
from fastppo.runtime.clock import Clock
from fastppo.runtime.distributed import World


def build_logger(c: Config, env_info: EnvInfo, device: torch.device, console: Console | None) -> RunLogger:
    """Build the logger, with the rules of health that suit the run; `console` None: it prints nothing."""
    rounding = rounding_of(c.precision, device.type)
    return RunLogger(
        console, RunTraits(env_info.action_spec.dimensions, rounding, c.init_from is not None), c.log_every
    )


def build_evaluation(
    c: Config,
    env_info: EnvInfo,
    policy: Policy,
    device: torch.device,
    clock: Clock,
    world: World,
    say: Callable[[str], None],
) -> PeriodicEvaluation:
    """Build the periodic evaluation, with environments of its own."""
    return PeriodicEvaluation(
        env_info,
        policy,
        device,
        seed=c.seed,
        eval_every=c.eval_every,
        eval_episodes=c.eval_episodes,
        eval_max_steps=c.eval_max_steps,
        video_every=c.video_every,
        clock=clock,
        world=world,
        say=say,
    )


def build_env_monitor(
    c: Config, env: VecEnv, metrics: Metrics, world: World, device: torch.device, say: Callable[[str], None]
) -> EnvMonitor:
    """Build the monitor that reports failing environments."""
    max_restarts = c.env_restarts if c.on_env_error == "restart" else None
    return EnvMonitor(env, metrics, world, device, strict_obs=c.strict_obs, max_restarts=max_restarts, say=say)


def build_saver(
    c: Config,
    run_dir: Path,
    state: RunState,
    world: World,
    device: torch.device,
    say: Callable[[str], None],
    *,
    env_name: str,
    custom_env: bool,
) -> RunSaver:
    """Build the saver of `state` into `run_dir`; `custom_env`: the environment comes from the user's `make_env`."""
    writer = CheckpointWriter(
        run_dir,
        keep=c.keep_checkpoints,
        every_steps=c.checkpoint_every,
        every_minutes=c.checkpoint_minutes,
        world=world,
        device=device,
        say=say,
    )
    described = {"env": env_name, "make_env": custom_env}
    return RunSaver(run_dir, writer, state, model_metadata=described, world=world, device=device)
