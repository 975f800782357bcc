"""Restore a trainer's parts from a checkpoint: bit for bit where possible, else with a note of the reason."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastppo.config import FIXED, NOTED, Config, shown
from fastppo.envs.vec_env import VecEnv, env_seeds
from fastppo.errors import CheckpointError, EnvError
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.model_files import load_model, read_spec
from fastppo.runs.open_run import saved_config
from fastppo.runs.run_state import Part, RunState
from fastppo.runs.state_files import StateSnapshot, read_state
from fastppo.runtime.distributed import World
from fastppo.runtime.seeding import generator, seed_stream


def restore(path: Path, state: RunState, obs: torch.Tensor, world: World) -> tuple[bool, list[str]]:
    """Restore `state` in place from the checkpoint `path`.

    Policy, optimiser, normalisers and schedules are always exact. If the environments can't continue their episodes, or
    the number of processes has changed, they are reset with new seeds.

    Args:
        path: a verified checkpoint.
        state: of this run, whose environments are reset.
        obs: [N, *obs] first observations of the next rollout; overwritten if the environments are reset.
        world: the ranks that train together.

    Returns:
        Whether the environments continue too, and notes for the user on what is exact.

    Raises:
        CheckpointError: the checkpoint can't be read, or belongs to another run.
    """
    config = Config.from_dict(state.metadata["config"])
    first = read_state(path, 0)
    assert first is not None, "verified"
    shared, saved = first
    notes = _compare(path, saved, state.metadata, state.spec)
    load_model(path, state.models, optional=("rewards",))
    try:
        if int(shared.part("progress")["iteration"]) == 0:  # new parts with the run's seed are in that state already
            return True, [f"resumed from {path.name}, before the first iteration.", *notes]
        iteration = _restore_shared(shared, saved, state.parts, config, world)
        before, same_envs = saved["config"]["n_envs"], int(saved["config"]["n_envs"]) == config.n_envs
        own_state = read_state(path, world.rank) if same_envs and saved["world_size"] == world.size else None
        if own_state is not None:
            if (reason := _restore_own(own_state[0], shared, saved, state, config.vectorization)) is None:
                how = "exact" if state.env.resume_support.way == "exact" else "exact, with open episodes replayed"
                return True, [f"resumed from {path.name} at iteration {iteration:,}: {how}.", *notes]
        elif same_envs:
            reason = f"{saved['world_size']} processes trained before, {world.size} now"
        else:
            reason = f"n_envs was {before}, is {config.n_envs}"
        try:
            source = shared if own_state is None else own_state[0]
            state.env.load_moments(source.part("env") if "env" in source.values else {})
        except EnvError as error:
            reason = f"{reason}; {error}"
        _begin_new_episodes(config, iteration, state.parts, state.env, obs, world)
    except (LookupError, TypeError, ValueError, RuntimeError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path} doesn't fit this run ({type(error).__name__}: {error}).") from None
    return False, [
        f"resumed from {path.name} at iteration {iteration:,}: network, optimiser, normalisers and schedules are "
        f"exact; the environments start new episodes with new seeds ({reason}).",
        *notes,
    ]


def _restore_shared(
    shared: StateSnapshot, saved: Mapping[str, Any], parts: Mapping[str, Part], config: Config, world: World
) -> int:
    """Restore what all processes share, and return the iteration, counted in iterations of this run."""
    for name in ("update", "progress", *(["curiosity"] if "curiosity" in parts else [])):
        parts[name].load_state_dict(shared.part(name))
    before = {name: int(saved["config"][name]) for name in ("n_envs", "n_steps")}
    metrics = shared.part("metrics")
    if before["n_envs"] != config.n_envs:  # no episode stays open
        metrics["open"] = torch.zeros_like(parts["metrics"].state_dict()["open"])
    parts["metrics"].load_state_dict(metrics)
    # older checkpoints have no open row, but a row needs the number of episodes before it
    log = shared.part("log") if "log" in shared.values else {"episodes": metrics["episodes"]}
    parts["log"].load_state_dict({**parts["log"].state_dict(), **log})
    progress = dict(parts["progress"].state_dict())
    # an iteration is one rollout of every process
    rows = before["n_envs"] * before["n_steps"] * int(saved["world_size"])
    iteration: int = round(progress["iteration"] * rows / (config.batch_size * world.size))
    parts["progress"].load_state_dict(progress | {"iteration": iteration})
    return iteration


def _restore_own(
    own: StateSnapshot, shared: StateSnapshot, saved: Mapping[str, Any], state: RunState, vectorization: str
) -> str | None:
    """Restore what belongs to one process: its random streams, open episodes and environments.

    Returns:
        Why the environments can't continue their episodes; None if they do.
    """
    parts = state.parts
    parts["update"].load_state_dict(own.part("update"))
    parts["metrics"].load_state_dict(shared.part("metrics") | {"open": own.part("metrics")["open"]})
    parts["randomness"].load_state_dict(own.part("randomness"))
    return _restore_envs(own, saved, parts, state.env, vectorization)


def _compare(path: Path, saved: Mapping[str, Any], metadata: Mapping[str, Any], spec: PolicySpec) -> list[str]:
    """Refuse a checkpoint of another run; return notes on differences that may change numbers."""
    saved_spec, about = read_spec(path)
    if differing := spec.differences(saved_spec):
        raise CheckpointError(f"{path} holds another policy: {'; '.join(differing)}.")
    try:
        before, now = saved_config(saved["config"]).to_dict(), metadata["config"]
        if about.get("make_env"):  # env_id has no effect, and earlier versions saved the default one
            before["env_id"] = now["env_id"]
        before["action_masks"] = now["action_masks"]  # the specs agree, so both use masks or neither does
        if "clip" in (before["objective"], now["objective"]):  # a run without a penalty has no use for its coefficient
            before["kl_coef"] = now["kl_coef"]
        changes = {
            name: f"{name} was {shown(before[name])}, is {shown(now[name])}"
            for name in now
            if name in FIXED | NOTED and _meaning(name, before[name]) != _meaning(name, now[name])
        }
        if refused := [change for name, change in changes.items() if name in FIXED]:
            raise CheckpointError(
                f"{path} is of a run with other settings: {'; '.join(refused)}. A resumed run keeps them; to train its "
                f"policy with others, start a new run: --init-from {path.parents[1]} --run-dir NEW."
            )
        if changes and now["exact_resume"]:
            raise CheckpointError(f"exact_resume: the run can't continue bit for bit: {'; '.join(changes.values())}.")
        others = [
            f"{name} {version}, now {metadata['versions'].get(name)}"
            for name, version in saved["versions"].items()
            if metadata["versions"].get(name) != version
        ]
        if saved["machine"] != metadata["machine"]:
            others.append(f"{saved['machine']}, now {metadata['machine']}")
        if missing := {"world_size", "way"} - saved.keys():
            raise KeyError(min(missing))
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise CheckpointError(f"{path}/state-0.json can't be understood ({type(error).__name__}: {error}).") from None
    notes = [f"settings changed, in effect from here on: {'; '.join(changes.values())}."] if changes else []
    if others:
        notes.append(f"bit-identical results are not guaranteed: the checkpoint has {'; '.join(others)}.")
    return notes


def _meaning(name: str, value: object) -> object:
    """Return the part of a setting that must not change: of a device only its type, as indices differ by rank."""
    return str(value).partition(":")[0] if name == "device" else value


def _restore_envs(
    own: StateSnapshot, saved: Mapping[str, Any], parts: Mapping[str, Part], env: VecEnv, vectorization: str
) -> str | None:
    """Restore the environments and the open episodes; return the reason if that fails, else None."""
    if env.resume_support.way == "restart":
        return env.resume_support.why
    before = saved["config"]["vectorization"]
    if before != vectorization and not {before, vectorization} <= {"sync", "pool"}:  # these two share their states
        return f"vectorization was {before}, is {vectorization}"
    if saved["way"] != env.resume_support.way or not own.part("env"):
        return "the checkpoint has no state of the environments"
    collector = own.part("collector")
    try:
        env.load_state_dict(own.part("env"), collector["obs"])
    except EnvError as error:
        return str(error)
    for name in ("collector", "learner"):
        parts[name].load_state_dict(own.part(name))
    return None


def _begin_new_episodes(
    c: Config, iteration: int, parts: Mapping[str, Part], env: VecEnv, obs: torch.Tensor, world: World
) -> None:
    """Start new episodes, with seeds and random streams derived from the run's seed and the iteration."""
    seeds = env_seeds(seed_stream(c.seed, "envs", 0, iteration + 1), env.n_envs, world.rank, world.size)
    obs.copy_(env.reset(seeds))
    noise = generator(c.seed, "noise", obs.device, world.rank, iteration + 1).get_state()
    # the memory of a policy, if it has one, is that of new episodes already
    parts["collector"].load_state_dict({**parts["collector"].state_dict(), "obs": obs.clone(), "noise": noise})
    metrics = dict(parts["metrics"].state_dict())
    metrics["open"] = torch.zeros_like(metrics["open"])
    parts["metrics"].load_state_dict(metrics)
    learner = {name: torch.zeros_like(x) for name, x in parts["learner"].state_dict().items()}
    parts["learner"].load_state_dict(learner)
    update = dict(parts["update"].state_dict())
    device = update["streak"].device  # the optimiser's own fields depend on which it is
    update["shuffles"] = generator(c.seed, "shuffle", device, world.rank, iteration + 1).get_state()
    parts["update"].load_state_dict(update)
