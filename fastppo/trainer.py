"""The trainer: builds the parts, owns them, runs the loop."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from torch import Tensor, nn

from fastppo.checkpoint import load_model, read_spec, save_model
from fastppo.config import SCHEDULED, Config, parse_schedule, resolve
from fastppo.envs.api import VecEnv, env_seeds
from fastppo.envs.choose import env_key, recall
from fastppo.envs.host import HostEnv
from fastppo.envs.registry import Maker, Probe, choose_vectorization, make_vec_env, probe
from fastppo.envs.tensor.driver import TensorEnv
from fastppo.envs.tensor.foreign import SimulatorEnv
from fastppo.errors import CaptureError, CheckpointError, ConfigError, EnvError
from fastppo.functional.gae import choose_gae, gae_doubling
from fastppo.functional.losses import Coefficients
from fastppo.functional.schedules import scheduled
from fastppo.memory import MemoryPlan, Shape, check_memory, plan_memory
from fastppo.metrics import Metrics, Stats
from fastppo.policies.act import choose_act_device
from fastppo.policies.build import PolicySpec, default_network
from fastppo.policies.flat import FlatParameters
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.rollout import Collector, Handover, Rollout
from fastppo.run_dir import create_run_dir, surroundings, write_json
from fastppo.runtime import accelerate
from fastppo.runtime.accelerate import CompileError, compile_graph, worth_compiling
from fastppo.runtime.clock import Clock
from fastppo.runtime.device import (
    choose_device,
    choose_threads,
    generator,
    keep_freed_memory,
    machine_name,
    seed_stream,
    set_threads,
)
from fastppo.runtime.distributed import join_world, local_processes
from fastppo.runtime.graphs import record
from fastppo.runtime.preflight import free_memory
from fastppo.runtime.signals import on_interrupt
from fastppo.sinks import ConsoleSink, JsonlSink, Sink, TensorBoardSink
from fastppo.update import PPOUpdate


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        mean_return: of the last 100 episodes, raw; NaN if none ended.
        mean_length: of the same episodes.
        episodes: ended in all.
        global_step: real environment steps.
        iterations: run.
        ended: "finished", "target" (target_return was reached) or "interrupted".
        sps_steady: steps per second without the first iteration.
        sps_total: steps per second, setting up included.
        seconds: of training.
        compile_seconds: spent on compiling, within setting up.
        compilations: functions that were compiled, all of them before the first iteration.
        phases: seconds in each phase.
        run_dir: where it lies.
    """

    mean_return: float
    mean_length: float
    episodes: int
    global_step: int
    iterations: int
    ended: Literal["finished", "target", "interrupted"]
    sps_steady: float
    sps_total: float
    seconds: float
    compile_seconds: float
    compilations: int
    phases: dict[str, float]
    run_dir: Path


class Trainer:
    """PPO on one environment: `Trainer(config).run()`, or `for stats in trainer.iterations()`.

    Attributes:
        config: with every field resolved.
        policy: encoder, network, distribution.
        rollout: storage, its tensors the same from first to last.
        run_dir: where everything is written.
        metrics: episode statistics and the step counter.
        values: this iteration's scheduled coefficients.
        memory: what it was planned to take.
        world: the processes that train together.
        n_iterations: planned.
        notes: what was chosen and why, and what the user should know of the environment.
        compile_seconds: spent on compiling.
        result: how it ended; None until then.
    """

    def __init__(
        self,
        config: Config,
        make_env: Maker | None = None,
        policy: nn.Module | None = None,
        console: Console | None = None,
    ) -> None:
        """Make environments (and reset them), policy, storage and run folder.

        Args:
            config: settings; open fields are filled from the environment.
            make_env: makes one gymnasium Env (vectorised here), or returns a VectorEnv; instead of config.env_id.
            policy: your own network, x -> (params [B, P], value [B]); see fastppo.policies.api.
            console: where progress goes; None for silence.

        Raises:
            ConfigError, EnvError, CheckpointError: see their texts.
        """
        if not isinstance(config, Config):
            raise ConfigError(f"Trainer takes a Config, not {type(config).__name__}: Trainer(Config(env_id=...)).")
        self.clock = Clock()
        keep_freed_memory()
        self.device = choose_device(config.device)
        if self.device.type == "cuda":  # kernels and graphs go to the current device
            torch.cuda.set_device(self.device)
        self.world = join_world(self.device)
        found = probe(config.env_id, config.env_kwargs, make_env)
        self.env_name, self._custom_env = found.name, make_env is not None
        self.config: Config
        self.notes: list[str] = []
        self.compile_seconds, self._compiled_before = 0.0, accelerate.compilations
        c = _resolve_all(config, found, self.device, custom_policy=policy is not None)
        if c.vectorization == "auto":
            c = self._choose_vectorization(c, found)
        assert c.vectorization != "auto"
        with contextlib.ExitStack() as undo:
            undo.callback(self.world.close)
            if found.vector is not None:
                undo.callback(found.vector.close)
            self._build_policy(c, found, policy)
            self.memory = self._plan_memory(c, found)
            self.env: VecEnv = make_vec_env(
                found,
                _int(c.n_envs),
                c.vectorization,
                seed=int(seed_stream(c.seed, "envs", self.world.rank).generate_state(1)[0] >> 1),
                n_workers=c.workers,
                half_batches=c.half_batches,
                device=self.device,
            )
            undo.callback(self.env.close)
            self._build_loop(c)
            self.run_dir = self.world.shared(lambda: create_run_dir(c.run_dir, self.env_name, c.name, c.seed))
            self.config = self._compile(self.config, console)
            self._open_run(self.config, console)
            undo.pop_all()

    def _choose_vectorization(self, c: Config, found: Probe) -> Config:
        """What `fastppo bench --save` found on this machine, or else what a short measurement says."""
        key = env_key(found.name, c.env_kwargs)
        saved = None if found.factory is None or found.factory.make else recall(key, machine_name(), _int(c.n_envs))
        if saved is not None:
            self.notes.append(f"vectorization {saved['vectorization']}: {saved['reason']}")
            kept: dict[str, Any] = {name: saved.get(name) for name in ("vectorization", "workers")}
            return dataclasses.replace(c, **kept, half_batches=bool(saved.get("half_batches")))
        vectorization, why = choose_vectorization(found, _int(c.n_envs))
        self.notes.append(why)
        return dataclasses.replace(c, vectorization=vectorization)

    def _build_policy(self, c: Config, found: Probe, network: nn.Module | None) -> None:
        self.spec = PolicySpec(
            obs=found.obs_spec,
            action=found.action_spec,
            network="custom" if network is not None else "cnn" if c.network == "cnn" else "mlp",
            hidden_sizes=c.hidden_sizes,
            activation=c.activation,
            shared_trunk=c.shared_trunk,
            normalize_obs=bool(c.normalize_obs),
            obs_clip=c.obs_clip,
        )
        set_threads(1)  # initial weights must not depend on what ran in this process before
        with torch.random.fork_rng(devices=[]):  # the caller's random state is none of our business
            torch.default_generator.manual_seed(int(seed_stream(c.seed, "weights").generate_state(1)[0]))
            self.policy = self.spec.build(network).to(self.device)
        self.policy.bf16 = c.precision == "bf16"
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision("high")
        self.rewards = RewardNormalizer(_int(c.n_envs), c.reward_clip).to(self.device) if c.normalize_rewards else None
        self.parts: dict[str, nn.Module] = {"policy": self.policy}
        if self.rewards is not None:
            self.parts["rewards"] = self.rewards
        if c.init_from is not None:
            saved, about = read_spec(c.init_from)
            if differing := self.spec.differences(saved):
                name = f"{c.init_from} (trained on {about.get('env')})"
                raise CheckpointError(f"init_from: {name} holds another policy: {'; '.join(differing)}.")
            load_model(c.init_from, self.parts, optional=("rewards",))
        self._parameters = FlatParameters(self.policy.network)
        for tensor in (self._parameters.vector, *self.policy.state_dict().values()):  # frozen parameters too
            self.world.from_main_(tensor)
        for moments in (self.rewards, self.policy.encoder.normalizer):
            if moments is not None:
                moments.pool = self.world.pool
        threads = c.threads or choose_threads(c.minibatch_size * self._parameters.vector.numel())
        self.config = dataclasses.replace(c, threads=threads)
        set_threads(threads)

    def _plan_memory(self, c: Config, found: Probe) -> MemoryPlan:
        def plan(n_envs: int) -> MemoryPlan:
            # a simulator may cut at any step
            max_steps = 1 if isinstance(found.vector, SimulatorEnv) else None
            if c.vectorization == "tensor":
                max_steps = found.max_steps
            shape = Shape(n_envs, found.obs_spec, found.action_spec, max_steps=max_steps)
            return plan_memory(_int(c.n_steps), shape, lambda: self._make_update(c), gae_doubling)

        free = free_memory(self.device)
        if self.device.type == "cpu":  # shared by all processes here
            free //= local_processes()
        try:
            return check_memory(plan, _int(c.n_envs), _int(c.n_steps), free)
        except ConfigError:
            raise
        except Exception as error:  # a network whose forward looks at values, which a plan doesn't have
            self.notes.append(
                f"memory is not planned: the network can't be run on shapes alone ({type(error).__name__})."
            )
            return MemoryPlan(0, 0, 0)

    def _make_update(self, c: Config) -> PPOUpdate:
        return PPOUpdate(
            policy=self.policy,
            parameters=self._parameters,
            generator=generator(c.seed, "shuffle", self.device, self.world.rank),
            update_epochs=_int(c.update_epochs),
            n_minibatches=_int(c.n_minibatches),
            adam_eps=c.adam_eps,
            value_clip=c.value_clip or "off",
            normalize=c.normalize_advantages,
            kl_stop=c.kl_stop,
            world=self.world,
        )

    def _build_loop(self, c: Config) -> None:
        if self.env.obs_spec.shape != self.spec.obs.shape:
            raise EnvError(
                f"vectorization={c.vectorization}: its observations are {self.env.obs_spec.shape}, "
                f"those of one environment {self.spec.obs.shape}; use sync or pool."
            )
        self.rollout = Rollout.allocate(_int(c.n_steps), self.env, self.policy, self.device)
        seeds = env_seeds(seed_stream(c.seed, "envs"), _int(c.n_envs), self.world.rank, self.world.size)
        self.rollout.obs[-1].copy_(self.env.reset(seeds))
        self.update = self._make_update(c)
        n_steps, n_envs = self.rollout.rewards.shape
        self.gae = choose_gae(n_steps, n_envs, self.device)
        self.coefs = Coefficients(*(torch.zeros((), device=self.device) for _ in Coefficients._fields))
        self._schedules = {name: _schedule(c, name) for name in SCHEDULED}
        self.values: dict[str, float] = {}
        acting, here, handover = self.policy, self.rollout, None
        if self.device.type == "cuda" and isinstance(self.env, HostEnv):
            wanted, why = choose_act_device(c.act_device, self.policy, self.env.obs_spec, self.env.n_envs, self.device)
            self.notes.append(f"act_device {wanted}: {why}.")
            self.config = c = dataclasses.replace(self.config, act_device=wanted)
            if wanted == "cpu":
                acting = copy.deepcopy(self.policy).cpu()
                here = Rollout.allocate(_int(c.n_steps), self.env, acting, torch.device("cpu"))
                handover = Handover(acting, here, self.policy, self.rollout)
                here.obs[-1].copy_(self.rollout.obs[-1])
        noise = generator(c.seed, "noise", here.rewards.device, self.world.rank)
        recorded = c.compile == "graph" and self.env.state is not None
        self.collect = Collector(self.env, acting, here, noise, self.clock, recorded=recorded, handover=handover)
        self.learn: Callable[[], Tensor] = self._learn
        # an iteration is one rollout of every process; at least one is run
        self.n_iterations = max(1, _int(c.total_timesteps) // (c.batch_size * self.world.size))
        self.metrics = Metrics(
            self.rollout, self.clock, self.env.action_spec, n_iterations=self.n_iterations, world=self.world
        )
        self.iteration = 0
        self.stop_requested = False
        self.result: Result | None = None

    def _compile(self, c: Config, console: Console | None) -> Config:
        """Compile or record the work, if that was asked for or pays; the config then says what was done."""
        chosen: Any = c.compile
        why = "asked for"
        if chosen == "auto":
            wanted, why = worth_compiling(self.n_iterations * _int(c.update_epochs) * _int(c.n_minibatches))
            chosen = "on" if wanted else "off"
            if self.device.type != "cpu":
                chosen, why = "graph", "on CUDA launches cost more than small kernels do"
        if chosen != "off" and console is not None:
            console.print("compiling the update: 10-20 s, the next time 5", highlight=False)
        begin = time.perf_counter()
        if chosen == "on" or (chosen == "graph" and self.device.type == "cuda"):
            try:
                self._compile_kernels()
            except CompileError as error:
                if chosen == "on":
                    chosen, why = "off", f"it can't be compiled: {error}"
                else:
                    self.notes.append(f"kernels are eager: they can't be compiled: {error}.")
        if chosen == "graph":
            try:
                self._record()
            except CaptureError as error:
                if c.compile == "graph":
                    raise
                chosen, why = "on" if accelerate.compilations > self._compiled_before else "off", str(error)
        if chosen != "off":
            self.compile_seconds = time.perf_counter() - begin
            why = f"{why}; took {self.compile_seconds:.1f} s"
        if c.compile != "off":
            self.notes.append(f"compile {chosen}: {why}.")
        return dataclasses.replace(c, compile=chosen)

    def _compile_kernels(self) -> None:
        gae = self.gae
        if gae is gae_doubling:  # the loop wins where it was chosen, compiled doubling or not
            gae = compile_graph(gae, self._gae_inputs(self.rollout.rewards))
        self.update.compile(self.rollout.batch(), self.coefs)
        if isinstance(self.env, TensorEnv):
            self.env.compile(compile_graph)
        self.gae = gae

    def _record(self) -> None:
        """Replace the rollout, where the environment lives on the device, and everything after it by recordings."""
        if reason := self.policy.uncompilable():
            raise CaptureError(reason)
        if self.world.size > 1 and self.device.type == "cpu":
            raise CaptureError("several processes on the CPU can't be recorded; use compile on or off.")
        shuffles = self.update.generator.get_state()
        self._anneal(0.0)
        self.update.generator.set_state(shuffles)  # permutations must not depend on whether work is recorded
        rewards = [] if self.rewards is None else list(self.rewards.buffers())
        keep = [*self.update.state(), *self.metrics.state(), *rewards]
        learn = record(
            lambda: self._learn(watched=False),
            keep=keep,
            fresh=[*self.coefs, *self.update.inputs()],
            device=self.device,
        )

        if self.env.state is not None:
            roll = record(
                self.collect.roll,
                keep=[*self.env.state.values(), self.rollout.obs[-1]],
                fresh=[self.rollout.noise],
                device=self.device,
            )

            def replay_roll() -> None:
                with self.clock.phase("rollout"):
                    roll()

            self.collect.roll = replay_roll

        def replay_learn() -> Tensor:
            with self.clock.phase("update"):
                return learn()

        self.learn = replay_learn

    def _open_run(self, c: Config, console: Console | None) -> None:
        self.notes += self.env.notes
        self._console, self.sinks = None, list[Sink]()
        if not self.world.is_main:
            return
        write_json(self.run_dir / "config.json", c.to_dict())
        write_json(
            self.run_dir / "run.json",
            surroundings(self.device)
            | {"notes": self.notes, "memory_plan": dataclasses.asdict(self.memory), "processes": self.world.size},
        )
        self.sinks += [TensorBoardSink(self.run_dir, c.to_dict()), JsonlSink(self.run_dir)]
        self._console = console
        if console is not None:
            for note in self.notes:
                console.print(f"note: {note}", highlight=False)
            batch = c.batch_size * self.world.size
            rest = _int(c.total_timesteps) - self.n_iterations * batch
            if rest:
                how = "no whole number of iterations" if rest > 0 else "less than one iteration"
                console.print(
                    f"note: {c.total_timesteps:,} steps are {how} of {batch:,}; "
                    f"{self.n_iterations * batch:,} will be run.",
                    highlight=False,
                )

    def run(self) -> Result:
        """Train to the end of the plan, the target, or the first Ctrl-C, and save the model."""

        def stop() -> None:
            self.request_stop()
            if self._console is not None:
                self._console.print("stopping after this iteration; Ctrl-C again stops at once")

        with on_interrupt(stop):
            for _ in self.iterations():
                pass
        assert self.result is not None
        return self.result

    def request_stop(self) -> None:
        """End after the current iteration."""
        self.stop_requested = True

    def iterations(self) -> Iterator[Stats]:
        """Train, giving the figures of each iteration; leaving the loop early saves and closes as its end does."""
        if self.result is not None:
            raise RuntimeError("this trainer has run already; make another, with init_from to go on from its model")
        c = self.config
        if self._console is not None:
            self.sinks.append(ConsoleSink(self._console, self.n_iterations))
        try:
            self.clock.start()
            while self.iteration < self.n_iterations and not self.world.any(self.stop_requested, self.device):
                self._anneal(self.iteration / self.n_iterations)
                self.collect()
                figures = self.learn()
                with self.clock.phase("update"):
                    found = self.metrics.read(figures)
                    self._update_obs_moments()
                self.iteration += 1
                with self.clock.phase("log"):
                    stats = self.metrics.stats(self.iteration, found, self.values)
                    for sink in self.sinks:
                        sink.write(stats)
                with self.clock.paused():
                    yield stats
                if self.metrics.episodes.reached(_target(c)):
                    break
        finally:
            self._finish()

    def _anneal(self, progress: float) -> None:
        self.values = {name: scheduled(*schedule, progress) for name, schedule in self._schedules.items()}
        for name, tensor in self.coefs._asdict().items():
            tensor.fill_(self.values[name])
        with self.clock.phase("update"):
            self.update.prepare(self.rollout.rewards.numel(), self.values["target_kl"] * self.config.kl_stop_factor)

    def _learn(self, *, watched: bool = True) -> Tensor:
        """Advantages, epochs, and the figures of both, on the device; for `watched` see `PPOUpdate.learn`."""
        with self.clock.phase("advantages"):
            self._set_targets()
        with self.clock.phase("update"):
            watched = watched and self.values["target_kl"] != math.inf
            return self.metrics.measure(self.update.learn(self.rollout.batch(), self.coefs, watched=watched))

    def _set_targets(self) -> None:
        r, rewards = self.rollout, self.rollout.rewards
        if self.rewards is not None:
            self.rewards.update_from_rollout(rewards, r.done, r.valid, self.coefs.gamma)
            rewards = self.rewards(rewards)
        elif self.config.sign_rewards:
            rewards = rewards.sign()
        advantages, returns = self.gae(*self._gae_inputs(rewards))
        r.advantages.copy_(advantages)
        r.returns.copy_(returns)

    def _gae_inputs(self, rewards: Tensor) -> tuple[Tensor, ...]:
        r = self.rollout
        return rewards, r.values, r.next_values, r.terminated, r.done, self.coefs.gamma, self.coefs.gae_lambda

    def _update_obs_moments(self) -> None:
        if (normalizer := self.policy.encoder.normalizer) is not None:
            batch = self.rollout.batch()
            normalizer.update(batch.obs, batch.valid)

    def _finish(self) -> None:
        c, clock = self.config, self.clock
        target = self.metrics.episodes.reached(_target(c))
        self.result = Result(
            mean_return=self.metrics.episodes.mean_return,
            mean_length=self.metrics.episodes.mean_length,
            episodes=self.metrics.episodes.count,
            global_step=self.metrics.global_step,
            iterations=self.iteration,
            ended="target" if target else "finished" if self.iteration == self.n_iterations else "interrupted",
            sps_steady=clock.sps_steady,
            sps_total=clock.sps_total,
            seconds=clock.seconds,
            compile_seconds=self.compile_seconds,
            compilations=accelerate.compilations - self._compiled_before,
            phases=clock.phase_seconds(),
            run_dir=self.run_dir,
        )
        if self.world.is_main:
            self._save()
        # last, for closing is what fails when a worker has died
        with contextlib.ExitStack() as stack:
            stack.callback(self.world.close)
            stack.callback(self.env.close)
            for sink in self.sinks:
                stack.callback(sink.close)

    def _save(self) -> None:
        assert self.result is not None
        about = {"global_step": self.metrics.global_step, "env": self.env_name, "make_env": self._custom_env}
        save_model(self.run_dir, self.spec, self.parts, about)
        values = dataclasses.asdict(self.result) | {"run_dir": str(self.run_dir)}
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
        write_json(self.run_dir / "result.json", finite)


def _resolve_all(config: Config, found: Probe, device: torch.device, *, custom_policy: bool) -> Config:
    """The config with every choice made: from the spaces, and from this machine."""
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
    return dataclasses.replace(resolved, **changes)


def _schedule(c: Config, name: str) -> tuple[str, float, float]:
    value = c.schedule(name)
    return parse_schedule(value, name) if isinstance(value, str) else ("constant", value, value)


def _target(c: Config) -> float | None:
    return c.target_return if isinstance(c.target_return, (int, float)) else None


def _int(value: int | None) -> int:
    assert value is not None, "the config is resolved"
    return value
