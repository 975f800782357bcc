"""Build the parts that a trainer owns from a resolved config. Choices along the way are added to `notes`."""

from __future__ import annotations

import copy
import functools
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import nn

from fastppo.builders.resolve import schedule_of
from fastppo.config import SCHEDULED, Config, known, parse_adaptive_rate
from fastppo.envs.backends import backend_of
from fastppo.envs.factory import seed_global_streams
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.make_envs import EnvInfo, make_vec_env, probe_resume
from fastppo.envs.pool import count_workers
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.envs.vec_env import VecEnv, env_seeds
from fastppo.errors import CheckpointError, ConfigError, EnvError
from fastppo.functional.adam import adam
from fastppo.functional.adaptation import Adaptation, adapted_kl_coef, adapted_learning_rate
from fastppo.functional.gae import gae_doubling
from fastppo.functional.losses import PPOLoss
from fastppo.functional.muon import muon
from fastppo.functional.optimizer import Optimizer
from fastppo.monitoring.stats import Statistics
from fastppo.monitoring.update_samples import UpdateSampler
from fastppo.policies.actors import choose_act_device
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import hidden_matrices
from fastppo.policies.native_mlp import not_covered
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec
from fastppo.policies.rnd import RandomNetworkDistillation
from fastppo.ppo import kernel_gradient
from fastppo.ppo.acting_copy import ActingCopy
from fastppo.ppo.collector import Collector
from fastppo.ppo.curiosity import Curiosity
from fastppo.ppo.learner import Learner
from fastppo.ppo.memory_plan import MemoryPlan, Shape, check_memory, plan_memory
from fastppo.ppo.metrics import Metrics
from fastppo.ppo.minibatches import Shuffle
from fastppo.ppo.rollout import Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.runs.model_files import load_model, read_spec
from fastppo.runtime.clock import Clock
from fastppo.runtime.cores import local_processes
from fastppo.runtime.distributed import World
from fastppo.runtime.resources import check_descriptors, free_memory
from fastppo.runtime.seeding import generator, preserve_global_random_state, seed_stream
from fastppo.runtime.threads import set_threads

_FEWEST_ITERATIONS_BETWEEN_SAMPLES = 30  # a sample takes up to a quarter of an iteration; keeps it under 1 %


class Models(NamedTuple):
    """The policy and the normalisers.

    Attributes:
        spec: description that rebuilds the policy.
        policy: encoder, network, distribution.
        reward_normalizer: None: rewards are not normalised.
        parameters: the network's parameters, as one vector.
        rnd: random network distillation, and its trained parameters as one vector; None without it.
    """

    spec: PolicySpec
    policy: Policy
    reward_normalizer: RewardNormalizer | None
    parameters: FlatParameters
    rnd: tuple[RandomNetworkDistillation, FlatParameters] | None = None

    def saved(self) -> dict[str, nn.Module]:
        """Return the modules of a model file by name."""
        parts = {"policy": self.policy, "rewards": self.reward_normalizer, "rnd": self.rnd and self.rnd[0]}
        return {name: part for name, part in parts.items() if part is not None}


def policy_spec(c: Config, env_info: EnvInfo, *, custom: bool) -> PolicySpec:
    """Return the spec of the policy in `c`; `custom`: it wraps the user's network."""
    return PolicySpec(
        obs=env_info.obs_spec,
        action=env_info.action_spec,
        network="custom" if custom else "cnn" if c.network == "cnn" else "mlp",
        hidden_sizes=c.hidden_sizes,
        activation=c.activation,
        shared_trunk=c.shared_trunk,
        normalize_obs=bool(c.normalize_obs),
        obs_clip=c.obs_clip,
        memory="none" if custom else c.memory,
        memory_size=c.memory_size,
        state_dependent_std=c.state_dependent_std,
    )


def build_models(c: Config, env_info: EnvInfo, network: nn.Module | None, device: torch.device, world: World) -> Models:
    """Build policy, normalisers and RND around `network` (None: the config's), new or with the state of `init_from`.

    Raises:
        ConfigError: the network doesn't fit the spaces or the free memory.
        CheckpointError: `init_from` holds a different policy.
    """
    spec = policy_spec(c, env_info, custom=network is not None)
    needed, free = 4 * 4 * spec.least_weights(), free_memory(device)  # weights, gradients, Adam's two moments
    if needed > free:
        memory = "" if spec.memory == "none" else f" and memory_size={c.memory_size:,}"
        raise ConfigError(
            f"hidden_sizes={list(c.hidden_sizes)}{memory} on observations {spec.obs.shape} need "
            f"{needed / 2**30:,.1f} GiB for weights, gradients and Adam; {free / 2**30:,.1f} GiB are free: make the "
            "network smaller."
        )
    set_threads(1)  # initial weights must not depend on earlier work of this process
    with torch.random.fork_rng(devices=[]):  # leave the caller's random state alone
        torch.default_generator.manual_seed(int(seed_stream(c.seed, "weights").generate_state(1)[0]))
        policy = spec.build(network).to(device)
    policy.bf16 = c.precision == "bf16"
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")
    reward_normalizer = RewardNormalizer(known(c.n_envs), c.reward_clip).to(device) if c.normalize_rewards else None
    rnd = build_rnd(c, spec).to(device) if c.rnd else None
    learned = None if rnd is None else (rnd, FlatParameters(rnd))
    models = Models(spec, policy, reward_normalizer, FlatParameters(policy.network), learned)
    if c.init_from is not None:
        saved, about = read_spec(c.init_from)
        if differing := spec.differences(saved):
            name = f"{c.init_from} (trained on {about.get('env')})"
            raise CheckpointError(f"init_from: {name} holds another policy: {'; '.join(differing)}.")
        load_model(c.init_from, models.saved(), optional=("rewards", "rnd"))
    for tensor in (models.parameters.vector, *policy.state_dict().values()):  # frozen parameters too
        world.from_main_(tensor)
    for tensor in () if rnd is None else rnd.state_dict().values():
        world.from_main_(tensor)
    own = () if rnd is None else (rnd.observations, rnd.rewards)
    for moments in (reward_normalizer, policy.encoder.normalizer, *own):
        if moments is not None:
            moments.pool = world.pool
    return models


def build_rnd(c: Config, spec: PolicySpec) -> RandomNetworkDistillation:
    """Build the networks that reward new observations, with weights that no other choice shifts."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(int(seed_stream(c.seed, "rnd").generate_state(1)[0]))
        return RandomNetworkDistillation(spec, known(c.n_envs))


def build_update(c: Config, models: Models, device: torch.device, world: World, n_envs: int | None = None) -> PPOUpdate:
    """Build the PPO update, for `n_envs` environments (None: the config's)."""
    loss = _loss(c)
    adaptive_rate = adaptive_kl_coef = None
    if rates := parse_adaptive_rate(c.learning_rate):
        start, lowest, highest = rates
        rule = functools.partial(adapted_learning_rate, target=c.adaptive_kl, lowest=lowest, highest=highest)
        adaptive_rate = Adaptation(start, rule)
    if loss.penalizes_kl:
        adaptive_kl_coef = Adaptation(c.kl_coef, functools.partial(adapted_kl_coef, target=c.penalty_kl))
    shuffle = Shuffle(
        generator(c.seed, "shuffle", device, world.rank),
        device,
        update_epochs=known(c.update_epochs),
        n_minibatches=known(c.n_minibatches),
        segment_length=(c.segment_length or known(c.n_steps)) if models.policy.has_memory else 1,
        n_envs=n_envs or known(c.n_envs),
    )
    return PPOUpdate(
        models.policy,
        models.parameters,
        loss,
        build_optimizer(c, models),
        shuffle,
        normalize=c.normalize_advantages,
        kl_stop=c.kl_stop,
        world=world,
        adaptive_rate=adaptive_rate,
        adaptive_kl_coef=adaptive_kl_coef,
    )


def build_optimizer(c: Config, models: Models) -> Optimizer:
    """Build the optimiser.

    Raises:
        ConfigError: Muon, for a network without hidden matrices, or one of the user's own.
    """
    if c.optimizer == "adam":
        return adam(c.adam_eps)
    if models.spec.network == "custom":
        raise ConfigError(
            "optimizer=muon with a network of your own: which of its matrices belong to hidden layers is not known; "
            "use adam."
        )
    places = models.parameters.places(hidden_matrices(models.policy.network))
    if not places:
        raise ConfigError(
            f"optimizer=muon with hidden_sizes={list(c.hidden_sizes)}: the first layer and the heads are Adam's, so "
            "nothing is left for Muon; give at least two hidden layers, or use adam."
        )
    return muon(places, c.adam_eps)


def _loss(c: Config) -> PPOLoss:
    return PPOLoss(c.value_clip or "off", c.objective)


def build_curiosity(c: Config, models: Models, rollout: Rollout, world: World) -> Curiosity | None:
    """Build the part that adds intrinsic advantages to `rollout`; None without RND."""
    if models.rnd is None:
        return None
    return Curiosity(
        *models.rnd,
        rollout,
        adam(c.adam_eps),
        coef=c.rnd_coef,
        gamma=c.rnd_gamma,
        proportion=c.rnd_proportion,
        minibatch_size=rollout.rewards.numel() // known(c.n_minibatches),
        world=world,
    )


def may_update_in_c(c: Config, policy: Policy, device: torch.device) -> bool:
    """Return whether the settings allow C for the update and it covers `policy`; `auto` may still choose torch."""
    asked = device.type == "cpu" and c.compile in ("auto", "fused") and c.optimizer == "adam"
    return asked and not_covered(policy) is None


def plan_run(
    c: Config, env_info: EnvInfo, models: Models, device: torch.device, world: World, notes: list[str]
) -> MemoryPlan:
    """Plan the memory of the run; a network that can't run on fake tensors gives a zero plan and a note.

    Raises:
        ConfigError: the plan doesn't fit; the message names an n_envs that does.
    """
    fused, programs = may_update_in_c(c, models.policy, device), 0
    if device.type == "cuda" and c.compile in ("auto", "fused"):
        fused = kernel_gradient.not_fused(models.policy, _loss(c)) is None
        programs = torch.cuda.get_device_properties(device).multi_processor_count if fused else 0

    def plan_for(n_envs: int) -> MemoryPlan:
        # a simulator may truncate at any step
        max_steps = 1 if isinstance(env_info.vector, SimulatorEnv) else None
        if c.vectorization == "tensor":
            max_steps = env_info.max_steps
        shape = Shape(n_envs, env_info.obs_spec, env_info.action_spec, max_steps=max_steps)
        return plan_memory(
            known(c.n_steps),
            shape,
            lambda: build_update(c, models, device, world, n_envs),
            gae_doubling,
            graphs=device.type == "cuda" and c.compile in ("auto", "fused", "graph"),
            gradients=c.log_histograms or (c.record_ratios != 0 and len(models.policy.recurrences()) > 0),
            fused=fused,
            programs=programs,
            curiosity=lambda rollout: build_curiosity(c, models, rollout, world),
        )

    free = free_memory(device)
    if device.type == "cpu":  # shared by the ranks on this machine
        free //= local_processes()
    try:
        return check_memory(plan_for, known(c.n_envs), known(c.n_steps), free)
    except ConfigError:
        raise
    except Exception as error:  # e.g. a forward pass that reads values, which fake tensors lack
        notes.append(f"memory is not planned: the network can't run on shapes alone ({type(error).__name__}).")
        return MemoryPlan(0, 0, 0)


def build_envs(
    c: Config, env_info: EnvInfo, device: torch.device, world: World, notes: list[str], *, stream_offset: int
) -> VecEnv:
    """Make the environments; `stream_offset` gives each start of a run its own random stream."""
    n_envs = known(c.n_envs)
    assert c.vectorization != "auto", "the config is resolved"
    backend = backend_of(env_info, c.vectorization)
    if backend.workers is not None:
        n_groups = 2 if c.half_batches else 1
        n_workers = n_envs if backend.workers == "n_envs" else count_workers(n_envs, c.workers, n_groups)
        check_descriptors(backend.descriptors, n_workers, backend.workers)
    # probes must not shift the global random streams, from which some environments draw
    with preserve_global_random_state():
        how = probe_resume(env_info, n_envs, c.vectorization, c.resume_envs)
    notes.append(f"resume: {how.way} ({how.why}).")
    notes += how.notes if n_envs > 1 else ()
    # for backends that are seeded only at construction, and for global streams; a resumed run gets another stream
    seed = int(seed_stream(c.seed, "envs", world.rank, stream_offset).generate_state(1)[0] >> 1)
    if env_info.global_streams:
        seed_global_streams(seed)
        streams = " and ".join(f"{name}'s" for name in env_info.global_streams)
        notes.append(
            f"{env_info.name} draws from {streams} global random stream, seeded here from seed={c.seed}; all of a "
            "process's code shares it, so other draws or another vectorization change a run. Use self.np_random."
        )
    if env_info.normalizers:
        notes.append(_note_on_normalizers(env_info.normalizers, kept=backend.resumes_moments))
    if c.exact_resume and how.way == "restart":
        raise ConfigError(f"exact_resume, but a resumed run would restart its environments: {how.why}.")
    restarts = c.env_restarts if c.on_env_error == "restart" and backend.restarts_envs else 0
    env = make_vec_env(
        env_info,
        n_envs,
        c.vectorization,
        seed=seed,
        n_workers=c.workers,
        half_batches=c.half_batches,
        device=device,
        fault_policy=FaultPolicy(how.way, restarts, c.env_timeout if backend.has_timeout else None),
        resume_support=how,
    )
    if c.log_info:
        env.log_info(c.log_info)
    return env


def _note_on_normalizers(names: Sequence[str], *, kept: bool) -> str:
    flags = {"NormalizeObservation": "--normalize-obs", "NormalizeReward": "--normalize-rewards"}
    instead = " and ".join(dict.fromkeys(flags.get(name, "--normalize-obs") for name in names))
    resumed = "a resume restores them" if kept else "a resume with this vectorization starts new ones"
    return (
        f"{' and '.join(names)} in the environment keeps running statistics in each environment; {resumed}, "
        f"but the saved policy doesn't hold them, and evaluation starts from fresh ones. Use {instead} instead."
    )


def build_rollout(c: Config, env: VecEnv, models: Models, device: torch.device, world: World) -> Rollout:
    """Allocate the storage of an iteration and reset the environments into it."""
    if env.obs_spec.shape != models.spec.obs.shape:
        raise EnvError(
            f"vectorization={c.vectorization} gives observations of shape {env.obs_spec.shape}, "
            f"a single environment {models.spec.obs.shape}; use sync or pool."
        )
    rollout = Rollout.allocate(known(c.n_steps), env, models.policy, device)
    seeds = env_seeds(seed_stream(c.seed, "envs"), known(c.n_envs), world.rank, world.size)
    rollout.obs[-1].copy_(env.reset(seeds))
    return rollout


def build_collector(
    c: Config, env: VecEnv, policy: Policy, rollout: Rollout, clock: Clock, world: World, *, notes: list[str]
) -> tuple[Collector, Literal["auto", "cpu", "cuda"]]:
    """Build the collector and choose the device to act on ("auto" if there is only one)."""
    acting, here, acting_copy, place = policy, rollout, None, c.act_device
    device = rollout.rewards.device
    if device.type == "cuda" and isinstance(env, GymnasiumVecEnv):
        place, why = world.shared(lambda: choose_act_device(c.act_device, policy, env.obs_spec, env.n_envs, device))
        notes.append(f"act_device {place}: {why}.")
        if place == "cpu":
            acting = copy.deepcopy(policy).cpu()
            here = Rollout.allocate(known(c.n_steps), env, acting, torch.device("cpu"))
            acting_copy = ActingCopy(acting, here, policy, rollout)
            here.obs[-1].copy_(rollout.obs[-1])  # states and starts of a new rollout are equal already
    noise = generator(c.seed, "noise", here.rewards.device, world.rank)
    whole = c.compile == "graph" and env.capturable_state is not None
    return Collector(env, acting, here, noise, clock, torch_only=whole, acting_copy=acting_copy), place


class Learning(NamedTuple):
    """The parts that learn from a rollout and measure it."""

    update: PPOUpdate
    metrics: Metrics
    statistics: Statistics
    learner: Learner
    sampler: UpdateSampler


def build_learning(
    c: Config, env: VecEnv, models: Models, rollout: Rollout, clock: Clock, world: World, *, n_iterations: int
) -> Learning:
    """Build the parts that learn from `rollout`, for a run of `n_iterations`."""
    device = rollout.rewards.device
    update, curiosity = build_update(c, models, device, world), build_curiosity(c, models, rollout, world)
    report_names = (*update.report_names, *(() if curiosity is None else curiosity.report_names))
    metrics = Metrics(rollout, env.obs_spec, env.action_spec, report_names, world=world, obs_bounds=env.obs_bounds)
    statistics = Statistics(
        metrics,
        clock,
        n_iterations=n_iterations,
        steps_per_iteration=c.batch_size * world.size,
        box_actions=env.action_spec.kind == "box",
    )
    learner = Learner(
        rollout,
        update,
        metrics,
        clock,
        reward_normalizer=models.reward_normalizer,
        sign_rewards=bool(c.sign_rewards),
        schedules={name: schedule_of(c, name) for name in SCHEDULED if name not in update.adapted},
        kl_stop_factor=c.kl_stop_factor,
        curiosity=curiosity,
    )
    every = c.record_ratios
    if every is None:
        every = max(_FEWEST_ITERATIONS_BETWEEN_SAMPLES, -(-n_iterations // 20))
    return Learning(
        update, metrics, statistics, learner, UpdateSampler(rollout, update, every=every, histograms=c.log_histograms)
    )
