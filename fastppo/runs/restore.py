"""From a checkpoint back into a trainer's parts: bit for bit where that can be had, and said aloud where not."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn

from fastppo.config import Config
from fastppo.envs.vec_env import VecEnv, env_seeds
from fastppo.errors import CheckpointError, EnvError
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.checkpoint import StateSnapshot, load_model, read_spec, read_state
from fastppo.runtime.device import generator, seed_stream
from fastppo.runtime.distributed import World

# Settings that may be others in a resumed run: none of them changes what an iteration computes
_FREE = {"total_timesteps", "target_return", "run_dir", "name", "resume", "init_from", "preset", "exact_resume"}
_FREE |= {"checkpoint_every", "checkpoint_minutes", "keep_checkpoints", "eval_every", "eval_episodes"}
_FREE |= {"on_env_error", "env_restarts", "env_timeout", "max_skipped"}
_FREE |= {"record_ratios", "log_histograms", "video_every", "track"}  # what is only looked at


class Part(Protocol):
    """What is saved and loaded."""

    def state_dict(self) -> Mapping[str, Any]:
        """Its state."""

    def load_state_dict(self, saved: Any) -> Any:  # noqa: ANN401 - a mapping; modules return something
        """Take it back."""


@dataclasses.dataclass
class Progress:
    """How far a run has come, as a part of it.

    Attributes:
        iteration: iterations done.
        seconds: of training.
        best: the best mean return of an evaluation; None: none yet.
    """

    iteration: int = 0
    seconds: float = 0.0
    best: float | None = None

    def state_dict(self) -> dict[str, Any]:
        """The fields."""
        return dataclasses.asdict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Set them."""
        self.iteration, self.seconds = int(saved["iteration"]), float(saved["seconds"])
        self.best = None if saved["best"] is None else float(saved["best"])


def about_run(c: Config, env: VecEnv, world: World, versions: Mapping[str, str], machine: str) -> dict[str, Any]:
    """What a checkpoint says of its run, for `restore` to compare."""
    return {
        "config": c.to_dict(),
        "world_size": world.size,
        "way": env.resume_support.way,
        "versions": dict(versions),
        "machine": machine,
    }


def restore(
    path: Path,
    about: Mapping[str, Any],
    *,
    spec: PolicySpec,
    models: dict[str, nn.Module],
    parts: Mapping[str, Part],
    env: VecEnv,
    obs: torch.Tensor,
    world: World,
) -> tuple[bool, list[str]]:
    """Bring a trainer's parts to where the checkpoint `path` found them.

    Where the environments can't go on, or other processes train now, they are reset by seeds of their own; everything
    that is learned is exact all the same.

    Args:
        path: a verified checkpoint.
        about: what this run would say of itself, as `about_run` does.
        spec: of this run's policy.
        models: policy, and reward moments.
        parts: all others; "update", "progress" and "metrics" are common to all processes, the rest is each one's own.
        env: the environments, reset already.
        obs: [N, *obs] row of the rollout where the next one begins.
        world: the processes that train now.

    Returns:
        whether the environments go on too, and notes about what goes on how.

    Raises:
        CheckpointError: it can't be read, or holds another kind of run.
    """
    config = Config.from_dict(about["config"])
    first = read_state(path, 0)
    assert first is not None, "verified"
    shared, saved = first
    notes = _compare(path, saved, about, spec)
    load_model(path, models, optional=("rewards",))
    try:
        for name in ("update", "progress", "metrics"):
            parts[name].load_state_dict(shared.part(name))
        progress = dict(parts["progress"].state_dict())
        # an iteration is one rollout of every process
        iteration = progress["iteration"] = round(progress["iteration"] * int(saved["world_size"]) / world.size)
        parts["progress"].load_state_dict(progress)
        mine = read_state(path, world.rank) if saved["world_size"] == world.size else None
        if mine is not None:
            own = mine[0]
            # each process has its own order of rows and its own open episodes
            parts["update"].load_state_dict(own.part("update"))
            parts["metrics"].load_state_dict(_own_episodes(shared, own))
            parts["randomness"].load_state_dict(own.part("randomness"))
            if (reason := _go_on(own, saved, parts, env)) is None:
                way = env.resume_support.way
                how = "exact" if way == "exact" else "exact, its open episodes played again"
                return True, [f"resumed from {path.name} at iteration {iteration:,}: {how}.", *notes]
        else:
            reason = f"{saved['world_size']} processes trained before, {world.size} now"
        _restart(config, iteration, parts, env, obs, world)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} doesn't fit this run ({type(error).__name__}: {error}).") from None
    return False, [
        f"resumed from {path.name} at iteration {iteration:,}: network, optimiser, normalisers, schedules are exact; "
        f"the environments start new episodes with new seeds ({reason}).",
        *notes,
    ]


def _compare(path: Path, saved: Mapping[str, Any], about: Mapping[str, Any], spec: PolicySpec) -> list[str]:
    """Refuse a checkpoint of another run; note what may cost exactness."""
    saved_spec, _ = read_spec(path)
    if differing := spec.differences(saved_spec):
        raise CheckpointError(f"{path} holds another policy: {'; '.join(differing)}.")
    try:
        before, now = dict(saved["config"]), about["config"]
        differing = [
            f"{name} was {before.get(name)!r}, is {now[name]!r}"
            for name in now
            if name not in _FREE and before.get(name) != now[name]
        ]
        if differing:
            raise CheckpointError(f"{path} is of a run with other settings: {'; '.join(differing)}.")
        others = [
            f"{name} {version}, now {about['versions'].get(name)}"
            for name, version in saved["versions"].items()
            if about["versions"].get(name) != version
        ]
        if saved["machine"] != about["machine"]:
            others.append(f"{saved['machine']}, now {about['machine']}")
        saved["world_size"], saved["way"]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}/state-0.json can't be understood ({type(error).__name__}: {error}).") from None
    return [f"equal bits are not promised: the checkpoint was written with {'; '.join(others)}."] if others else []


def _own_episodes(shared: StateSnapshot, own: StateSnapshot) -> dict[str, Any]:
    return shared.part("metrics") | {"open": own.part("metrics")["open"]}


def _go_on(own: StateSnapshot, saved: Mapping[str, Any], parts: Mapping[str, Part], env: VecEnv) -> str | None:
    """Let the environments go on where they were; returns why they can't."""
    if env.resume_support.way == "restart":
        return env.resume_support.why
    if saved["way"] != env.resume_support.way or not own.part("env"):
        return "the checkpoint holds no state of theirs"
    place = own.part("collector")
    try:
        env.load_state_dict(own.part("env"), place["obs"])
    except EnvError as error:
        return str(error)
    for name in ("collector", "learner"):
        parts[name].load_state_dict(own.part(name))
    return None


def _restart(
    c: Config, iteration: int, parts: Mapping[str, Part], env: VecEnv, obs: torch.Tensor, world: World
) -> None:
    """New episodes, with seeds and random streams that follow from the run's seed and the iteration."""
    seeds = env_seeds(seed_stream(c.seed, "envs", 0, iteration + 1), env.n_envs, world.rank, world.size)
    obs.copy_(env.reset(seeds))
    noise = generator(c.seed, "noise", obs.device, world.rank, iteration + 1).get_state()
    parts["collector"].load_state_dict({"obs": obs.clone(), "noise": noise})
    metrics = dict(parts["metrics"].state_dict())
    metrics["open"] = torch.zeros_like(metrics["open"])
    parts["metrics"].load_state_dict(metrics)
    learner = {name: torch.zeros_like(x) for name, x in parts["learner"].state_dict().items()}
    parts["learner"].load_state_dict(learner)
    update = dict(parts["update"].state_dict())
    learning_on = update["mean"].device
    update["shuffles"] = generator(c.seed, "shuffle", learning_on, world.rank, iteration + 1).get_state()
    parts["update"].load_state_dict(update)
