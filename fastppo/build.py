"""What a trainer is made of, built from a settled config. What is chosen on the way is told in `notes`."""

from __future__ import annotations

import copy
import dataclasses
import time
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fastppo.config import Config, parse_schedule, resolve
from fastppo.envs.auto_vectorization import env_key, recall
from fastppo.envs.backends import backend_of
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.registry import EnvInfo, choose_vectorization, make_vec_env
from fastppo.envs.sync import FaultPolicy
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv, env_seeds
from fastppo.errors import CaptureError, CheckpointError, ConfigError, EnvError
from fastppo.functional.gae import gae_doubling
from fastppo.policies.actors import choose_act_device
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec, default_network
from fastppo.ppo.learner import Learner
from fastppo.ppo.memory_plan import MemoryPlan, Shape, check_memory, plan_memory
from fastppo.ppo.rollout import Collector, Handover, Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.presets import TUNED
from fastppo.runs.checkpoint import load_model, read_spec
from fastppo.runtime import compile as compiling
from fastppo.runtime.clock import Clock
from fastppo.runtime.compile import CompileError, compile_graph, worth_compiling
from fastppo.runtime.cores import local_processes, usable_cores
from fastppo.runtime.device import generator, machine_name, seed_stream, set_threads
from fastppo.runtime.distributed import World
from fastppo.runtime.preflight import check_descriptors, free_memory


def settle(config: Config, found: EnvInfo, device: torch.device, *, custom_policy: bool) -> tuple[Config, list[str]]:
    """The config with every choice made that comes before anything is built, and notes about them.

    Raises:
        ConfigError: settings that don't go together.
    """
    if found.vector is not None and config.n_envs is None:
        config = dataclasses.replace(config, n_envs=found.vector.num_envs)
    resolved = resolve(config, found.kind, atari=found.atari, reward_threshold=found.reward_threshold)
    changes: dict[str, Any] = {"device": str(device)}
    if config.network == "auto" and not custom_policy:
        changes["network"] = default_network(found.obs_spec)
    if custom_policy and config.network != "auto":
        raise ConfigError(f"network={config.network} and a policy module are both given; leave network at auto.")
    if found.obs_spec.kind != "vector" and config.normalize_obs is None:
        changes["normalize_obs"] = False
    if config.eval_every is not None and found.vector is not None:
        raise ConfigError(
            "eval_every needs environments of its own, but make_env returned a vector environment; "
            "return a single environment from make_env, or leave eval_every out."
        )
    c = dataclasses.replace(resolved, **changes)
    notes = []
    if config.target_return == "threshold" and c.target_return is None:
        notes.append(f"target_return threshold: {found.name} has none, so all steps are run.")
    if config.preset == "tuned" and config.env_id not in TUNED:
        notes.append(f"preset tuned: there is no measured setting for {found.name}; CleanRL's is taken.")
    if c.vectorization != "auto":
        return c, notes
    n_envs = c.n_envs
    assert n_envs is not None, "resolved"
    key = env_key(found.name, c.env_kwargs)
    # what `fastppo bench --save` found on this machine, or else what a short measurement says
    saved = None if found.factory is None or found.factory.make else recall(key, machine_name(), n_envs)
    if saved is not None:
        kept: dict[str, Any] = {name: saved.get(name) for name in ("vectorization", "workers")}
        c = dataclasses.replace(c, **kept, half_batches=bool(saved.get("half_batches")))
        return c, [*notes, f"vectorization {saved['vectorization']}: {saved['reason']}"]
    vectorization, why = choose_vectorization(found, n_envs)
    return dataclasses.replace(c, vectorization=vectorization), [*notes, why]


def schedule_of(c: Config, name: str) -> tuple[str, float, float]:
    """The coefficient `name` as shape, start and end."""
    value = c.schedule(name)
    return parse_schedule(value, name) if isinstance(value, str) else ("constant", value, value)


def target_of(c: Config) -> float | None:
    """The mean return that ends the run, once "threshold" has become a number."""
    return c.target_return if isinstance(c.target_return, (int, float)) else None


class Models(NamedTuple):
    """What is learned, and what follows the data.

    Attributes:
        spec: how the policy is built anew.
        policy: encoder, network, distribution.
        rewards: their normaliser, if they have one.
        parameters: the network's, on one vector.
    """

    spec: PolicySpec
    policy: Policy
    rewards: RewardNormalizer | None
    parameters: FlatParameters

    def saved(self) -> dict[str, nn.Module]:
        """What a model file holds, by name."""
        return _saved(self.policy, self.rewards)


def policy_spec(c: Config, found: EnvInfo, *, custom: bool) -> PolicySpec:
    """The policy that `c` asks for, or one around a `custom` network."""
    return PolicySpec(
        obs=found.obs_spec,
        action=found.action_spec,
        network="custom" if custom else "cnn" if c.network == "cnn" else "mlp",
        hidden_sizes=c.hidden_sizes,
        activation=c.activation,
        shared_trunk=c.shared_trunk,
        normalize_obs=bool(c.normalize_obs),
        obs_clip=c.obs_clip,
    )


def build_models(c: Config, found: EnvInfo, network: nn.Module | None, device: torch.device, world: World) -> Models:
    """The policy around `network` (None: the config's) with its first weights, or those of `init_from`."""
    spec = policy_spec(c, found, custom=network is not None)
    needed, free = 4 * 4 * spec.least_weights(), free_memory(device)  # weights, gradients, Adam's two moments
    if needed > free:
        raise ConfigError(
            f"hidden_sizes={list(c.hidden_sizes)} on observations {spec.obs.shape} needs {needed / 2**30:,.1f} GiB for "
            f"weights, gradients and Adam; {free / 2**30:,.1f} GiB are free: make the network smaller."
        )
    set_threads(1)  # initial weights must not depend on what ran in this process before
    with torch.random.fork_rng(devices=[]):  # the caller's random state is none of our business
        torch.default_generator.manual_seed(int(seed_stream(c.seed, "weights").generate_state(1)[0]))
        policy = spec.build(network).to(device)
    policy.bf16 = c.precision == "bf16"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    rewards = RewardNormalizer(resolved(c.n_envs), c.reward_clip).to(device) if c.normalize_rewards else None
    if c.init_from is not None:
        saved, about = read_spec(c.init_from)
        if differing := spec.differences(saved):
            name = f"{c.init_from} (trained on {about.get('env')})"
            raise CheckpointError(f"init_from: {name} holds another policy: {'; '.join(differing)}.")
        load_model(c.init_from, _saved(policy, rewards), optional=("rewards",))
    parameters = FlatParameters(policy.network)
    for tensor in (parameters.vector, *policy.state_dict().values()):  # frozen parameters too
        world.from_main_(tensor)
    for moments in (rewards, policy.encoder.normalizer):
        if moments is not None:
            moments.pool = world.pool
    return Models(spec, policy, rewards, parameters)


def build_update(c: Config, models: Models, device: torch.device, world: World) -> PPOUpdate:
    """The epochs of minibatches."""
    return PPOUpdate(
        policy=models.policy,
        parameters=models.parameters,
        generator=generator(c.seed, "shuffle", device, world.rank),
        update_epochs=resolved(c.update_epochs),
        n_minibatches=resolved(c.n_minibatches),
        adam_eps=c.adam_eps,
        value_clip=c.value_clip or "off",
        normalize=c.normalize_advantages,
        kl_stop=c.kl_stop,
        world=world,
    )


def plan_run(
    c: Config, found: EnvInfo, models: Models, device: torch.device, world: World, notes: list[str]
) -> MemoryPlan:
    """Bytes of storage, staging and update; raises ConfigError where they don't fit."""

    def plan_for(n_envs: int) -> MemoryPlan:
        # a simulator may cut at any step
        max_steps = 1 if isinstance(found.vector, SimulatorEnv) else None
        if c.vectorization == "tensor":
            max_steps = found.max_steps
        shape = Shape(n_envs, found.obs_spec, found.action_spec, max_steps=max_steps)
        return plan_memory(resolved(c.n_steps), shape, lambda: build_update(c, models, device, world), gae_doubling)

    free = free_memory(device)
    if device.type == "cpu":  # shared by all processes here
        free //= local_processes()
    try:
        return check_memory(plan_for, resolved(c.n_envs), resolved(c.n_steps), free)
    except ConfigError:
        raise
    except Exception as error:  # a network whose forward looks at values, which a plan doesn't have
        notes.append(f"memory is not planned: the network can't be run on shapes alone ({type(error).__name__}).")
        return MemoryPlan(0, 0, 0)


def build_envs(
    c: Config, found: EnvInfo, device: torch.device, world: World, notes: list[str], *, times_begun: int
) -> VecEnv:
    """Make the environments; `times_begun` gives each start of a run (first or resumed) its own random stream."""
    n_envs = resolved(c.n_envs)
    assert c.vectorization != "auto", "settled"
    backend = backend_of(found, c.vectorization)
    if backend.workers is not None:
        n_workers = n_envs if backend.workers == "n_envs" else c.workers or usable_cores()
        check_descriptors(backend.descriptors, n_workers, backend.workers)
    how = backend.probe_resume(found, n_envs)
    notes.append(f"resume: {how.way} ({how.why}).")
    if c.exact_resume and how.way == "restart":
        raise ConfigError(f"exact_resume, but a resumed run would restart its environments: {how.why}.")
    restarts = c.env_restarts if c.on_env_error == "restart" and backend.restarts_envs else 0
    return make_vec_env(
        found,
        n_envs,
        c.vectorization,
        # for backends that take a seed only when they are made; a resumed run gets another stream
        seed=int(seed_stream(c.seed, "envs", world.rank, times_begun).generate_state(1)[0] >> 1),
        n_workers=c.workers,
        half_batches=c.half_batches,
        device=device,
        fault_policy=FaultPolicy(how.way, restarts, c.env_timeout if backend.has_timeout else None),
        resume_support=how,
    )


def build_rollout(c: Config, env: VecEnv, models: Models, device: torch.device, world: World) -> Rollout:
    """Storage of one iteration, with the first observations in it."""
    if env.obs_spec.shape != models.spec.obs.shape:
        raise EnvError(
            f"vectorization={c.vectorization}: its observations are {env.obs_spec.shape}, "
            f"those of one environment {models.spec.obs.shape}; use sync or pool."
        )
    rollout = Rollout.allocate(resolved(c.n_steps), env, models.policy, device)
    seeds = env_seeds(seed_stream(c.seed, "envs"), resolved(c.n_envs), world.rank, world.size)
    rollout.obs[-1].copy_(env.reset(seeds))
    return rollout


def build_collector(
    c: Config, env: VecEnv, policy: Policy, rollout: Rollout, clock: Clock, world: World, notes: list[str]
) -> tuple[Collector, Literal["auto", "cpu", "cuda"]]:
    """What fills the rollout, and where it acts ("auto" where there is but one place)."""
    acting, here, handover, place = policy, rollout, None, c.act_device
    device = rollout.rewards.device
    if device.type == "cuda" and isinstance(env, GymnasiumVecEnv):
        place, why = choose_act_device(c.act_device, policy, env.obs_spec, env.n_envs, device)
        notes.append(f"act_device {place}: {why}.")
        if place == "cpu":
            acting = copy.deepcopy(policy).cpu()
            here = Rollout.allocate(resolved(c.n_steps), env, acting, torch.device("cpu"))
            handover = Handover(acting, here, policy, rollout)
            here.obs[-1].copy_(rollout.obs[-1])
    noise = generator(c.seed, "noise", here.rewards.device, world.rank)
    whole = c.compile == "graph" and env.capturable_state is not None
    return Collector(env, acting, here, noise, clock, torch_only=whole, handover=handover), place


def compile_work(
    wanted: str,
    minibatches: int,
    learner: Learner,
    collect: Collector,
    env: VecEnv,
    world: World,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[Any, float]:
    """Compile or record rollout and update, if that is `wanted` or ("auto") pays for the `minibatches` ahead.

    Returns:
        The mode that came of it, and the seconds that it took.
    """
    mode, why = wanted, "asked for"
    device = learner.device
    compiled_before = compiling.compilations
    if wanted == "auto":
        pays, why = worth_compiling(minibatches)
        mode = "on" if pays else "off"
        if device.type != "cpu":
            mode, why = "graph", "on CUDA launches cost more than small kernels do"
    if mode != "off":
        say("compiling: 10-20 s, the next time 5")
    begin, seconds = time.perf_counter(), 0.0
    if mode == "on" or (mode == "graph" and device.type == "cuda"):
        try:
            learner.compile()
            # the update is most of the work, so it is compiled whatever becomes of these
            for name, compiled in (("acting", collect.compile), ("stepping", lambda: _compile_env(env))):
                try:
                    compiled()
                except CompileError as error:
                    notes.append(f"{name} is eager: it can't be compiled: {error}.")
        except CompileError as error:
            if mode == "on":
                mode, why = "off", f"it can't be compiled: {error}"
            else:
                notes.append(f"kernels are eager: they can't be compiled: {error}.")
    if mode == "graph":
        try:
            if world.size > 1 and device.type == "cpu":
                raise CaptureError("several processes on the CPU can't be recorded; use compile on or off.")
            learner.capture()
            collect.capture()
        except CaptureError as error:
            if wanted == "graph":
                raise
            mode, why = "on" if compiling.compilations > compiled_before else "off", str(error)
    if mode != "off":
        seconds = time.perf_counter() - begin
        why = f"{why}; took {seconds:.1f} s"
    if wanted != "off":
        notes.append(f"compile {mode}: {why}.")
    return mode, seconds


def _compile_env(env: VecEnv) -> None:
    if isinstance(env, TensorEnv):
        env.compile(compile_graph)


def resolved(value: int | None) -> int:
    """A number that `settle` has filled in."""
    assert value is not None, "the config is resolved"
    return value


def _saved(policy: Policy, rewards: RewardNormalizer | None) -> dict[str, nn.Module]:
    return {"policy": policy} if rewards is None else {"policy": policy, "rewards": rewards}
