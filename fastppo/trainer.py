"""The trainer: builds the parts, owns them, runs the loop."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from torch import nn

from fastppo.build import (
    Models,
    build_collector,
    build_envs,
    build_models,
    build_rollout,
    build_update,
    compile_work,
    plan_run,
    resolved,
    schedule_of,
    settle,
    target_of,
)
from fastppo.config import SCHEDULED, Config
from fastppo.envs.registry import Maker, inspect_env
from fastppo.errors import CheckpointError, ConfigError, EnvError, FinishedError
from fastppo.evaluation.periodic import PeriodicEvaluation
from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.sinks.console import ConsoleSink
from fastppo.monitoring.sinks.jsonl import JsonlSink, SampleSink, read_rows
from fastppo.monitoring.sinks.tensorboard import TensorBoardSink
from fastppo.monitoring.sinks.trackers import check_trackers, open_tracker
from fastppo.monitoring.stats import Statistics, Stats
from fastppo.monitoring.update_samples import UpdateSample, UpdateSampler
from fastppo.ppo.learner import Learner
from fastppo.ppo.metrics import NAMES, Metrics
from fastppo.runs.checkpoint import model_files, save_model, snapshot, state_files, tidy
from fastppo.runs.checkpoint_writer import CheckpointWriter
from fastppo.runs.nan_dump import save_nan_dump
from fastppo.runs.restore import Part, Progress, about_run, restore
from fastppo.runs.run_dir import RunLock, appears, create_run_dir, surroundings, versions, write_json
from fastppo.runtime import compile as compiling
from fastppo.runtime.clock import Clock
from fastppo.runtime.device import choose_device, machine_name
from fastppo.runtime.distributed import join_world
from fastppo.runtime.resources import check_disk
from fastppo.runtime.seeding import GlobalRandomState
from fastppo.runtime.signals import StopSignals
from fastppo.runtime.threads import choose_threads, keep_freed_memory, set_threads

_FEWEST_BETWEEN_LOOKS = 30  # iterations: a look takes up to a quarter of one, and should cost less than 1 %


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
        unsaved: why the last save failed; None: everything is saved.
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
    unsaved: str | None = None


class Trainer:
    """PPO on one environment: `Trainer(config).run()`, or `for stats in trainer.iterations()`.

    Attributes:
        config: with every field resolved.
        policy: encoder, network, distribution.
        rollout: storage, its tensors the same from first to last.
        run_dir: where everything is written.
        metrics: episode statistics and the step counter.
        learner: what follows each rollout.
        progress: how far it has come.
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
        resume_from: Path | None = None,
    ) -> None:
        """Make environments (and reset them), policy, storage and run folder.

        Args:
            config: settings; open fields are filled from the environment.
            make_env: makes one gymnasium Env (vectorised here), or returns a VectorEnv; instead of config.env_id.
            policy: your own network, x -> (params [B, P], value [B]); see fastppo.policies.policy.
            console: where progress goes; None for silence.
            resume_from: a verified checkpoint to go on from, in its own run folder; see `fastppo.resume`.

        Raises:
            ConfigError, EnvError, CheckpointError: see their texts.
        """
        if not isinstance(config, Config):
            raise ConfigError(f"Trainer takes a Config, not {type(config).__name__}: Trainer(Config(env_id=...)).")
        check_trackers(config.track)
        self.clock = Clock()
        keep_freed_memory()
        self.device = choose_device(config.device)
        if self.device.type == "cuda":  # kernels and graphs go to the current device
            torch.cuda.set_device(self.device)
        self.world = join_world(self.device)
        found = inspect_env(config.env_id, config.env_kwargs, make_env)
        self.env_name, self._custom_env = found.name, make_env is not None
        self.config: Config
        self._compiled_before = compiling.compilations
        self._signals: StopSignals | None = None
        self._doing = "nothing"
        with contextlib.ExitStack() as undo:
            undo.callback(self.world.close)
            c, self.notes = settle(config, found, self.device, custom_policy=policy is not None)
            self.logger = RunLogger(console if self.world.is_main else None, found.action_spec.dimensions)
            if found.vector is not None:
                undo.callback(found.vector.close)
            models = build_models(c, found, policy, self.device, self.world)
            self.spec, self.policy, self.rewards = models.spec, models.policy, models.rewards
            self.models = models.saved()
            threads = c.threads or choose_threads(c.minibatch_size * models.parameters.vector.numel())
            self.config = c = dataclasses.replace(c, threads=threads)
            set_threads(threads)
            self.memory = plan_run(c, found, models, self.device, self.world, self.notes)
            begun = 0 if resume_from is None else int(resume_from.name.removeprefix("step-")) + 1
            self.env = build_envs(c, found, self.device, self.world, self.notes, times_begun=begun)
            undo.callback(self.env.close)
            self._build_loop(c, models)
            self.periodic = PeriodicEvaluation(
                found,
                self.policy,
                self.device,
                seed=c.seed,
                eval_every=c.eval_every,
                eval_episodes=c.eval_episodes,
                video_every=c.video_every,
                main=self.world.is_main,
                say=self.logger.say,
            )
            undo.callback(self.periodic.close)
            if resume_from is None:
                self.run_dir = self.world.shared(
                    lambda: create_run_dir(c.run_dir, self.env_name, c.name, c.seed, again=c.resume == "auto")
                )
            else:
                self.run_dir = resume_from.parents[1]
            self._lock: RunLock | None = None
            self.world.shared(self._take_lock)
            if not appears(self.run_dir):
                raise ConfigError(
                    f"run_dir={self.run_dir} was made by process 0 and can't be seen by process {self.world.rank}: "
                    "machines that train together need one folder that all of them see."
                )
            undo.callback(self._let_go)
            if resume_from is not None:
                self._restore(resume_from)
            state = sum(x.numel() * x.element_size() for x in (self.update.parameters.vector, *self.update.adam))
            n_kept = c.keep_checkpoints + 2
            self.world.shared(lambda: check_disk(self.run_dir, n_kept * state, f"{n_kept} checkpoints"))
            ahead = self.n_iterations * resolved(c.update_epochs) * resolved(c.n_minibatches)
            mode, self.compile_seconds = compile_work(
                c.compile, ahead, self.learner, self.collect, self.env, self.world, self.notes, self.logger.say
            )
            self.config = dataclasses.replace(self.config, compile=mode)
            self._resumed = resume_from is not None
            self._open_run(self.config, console)
            undo.pop_all()

    def _build_loop(self, c: Config, models: Models) -> None:
        self.rollout = build_rollout(c, self.env, models, self.device, self.world)
        self.update = build_update(c, models, self.device, self.world)
        self.collect, place = build_collector(
            c, self.env, self.policy, self.rollout, self.clock, self.world, self.notes
        )
        self.config = dataclasses.replace(c, act_device=place)
        # an iteration is one rollout of every process; at least one is run
        self.n_iterations = max(1, resolved(c.total_timesteps) // (c.batch_size * self.world.size))
        self.metrics = Metrics(
            self.rollout,
            self.env.action_spec,
            world=self.world,
            obs_bounds=self.env.obs_bounds,
        )
        self._statistics = Statistics(
            self.metrics,
            self.clock,
            n_iterations=self.n_iterations,
            steps_per_iteration=c.batch_size * self.world.size,
            box_actions=self.env.action_spec.kind == "box",
        )
        self.learner = Learner(
            self.rollout,
            self.policy,
            self.update,
            self.metrics,
            self.clock,
            rewards=self.rewards,
            sign_rewards=bool(c.sign_rewards),
            schedules={name: schedule_of(c, name) for name in SCHEDULED},
            kl_stop_factor=c.kl_stop_factor,
        )
        self.progress = Progress()
        self._parts: dict[str, Part] = {
            "update": self.update,
            "progress": self.progress,
            "metrics": self.metrics,
            "collector": self.collect,
            "learner": self.learner,
            "randomness": GlobalRandomState(),
        }
        every = c.record_ratios
        if every is None:
            every = max(_FEWEST_BETWEEN_LOOKS, -(-self.n_iterations // 20))
        self._sampler = UpdateSampler(self.rollout, self.update, every=every, histograms=c.log_histograms)
        self._told_outside = False
        self.stop_requested = False
        self.result: Result | None = None

    def _take_lock(self) -> None:
        self._lock = RunLock(self.run_dir)

    def _let_go(self) -> None:
        if self._lock is not None:
            self._lock.release()

    def _restore(self, path: Path) -> None:
        goes_on, notes = restore(
            path,
            about_run(self.config, self.env, self.world, versions(), machine_name()),
            spec=self.spec,
            models=self.models,
            parts=self._parts,
            env=self.env,
            obs=self.collect.rollout.obs[-1],
            world=self.world,
        )
        self.periodic.seen = self.metrics.global_step
        self.notes += notes
        if self.config.exact_resume and not goes_on:
            raise CheckpointError(f"exact_resume: {notes[0]}")
        steps, target = self.metrics.global_step, target_of(self.config)
        if self.metrics.episodes.reached(target):
            raise FinishedError(f"{self.run_dir} has reached its target of {target} after {steps:,} steps.")
        if self.progress.iteration >= self.n_iterations:
            raise FinishedError(
                f"{self.run_dir} has run all of its {steps:,} steps; to go on, give more: "
                f"fastppo resume {self.run_dir} --total-timesteps {2 * steps}"
            )

    def _open_run(self, c: Config, console: Console | None) -> None:
        self.notes += self.env.notes
        self._writer = CheckpointWriter(
            self.run_dir,
            keep=c.keep_checkpoints,
            every_steps=c.checkpoint_every,
            every_minutes=c.checkpoint_minutes,
            world=self.world,
            device=self.device,
            say=self.logger.say,
        )
        if not self.world.is_main:
            return
        tidy(self.run_dir, self.metrics.global_step if self._resumed else None)
        write_json(self.run_dir / "config.json", c.to_dict())
        write_json(
            self.run_dir / "run.json",
            surroundings(self.device)
            | {"notes": self.notes, "memory_plan": dataclasses.asdict(self.memory), "processes": self.world.size}
            | {"action_size": self.env.action_spec.dimensions},
        )
        if console is not None:
            for note in self.notes:
                console.print(f"note: {note}", highlight=False, markup=False)
            batch = c.batch_size * self.world.size
            rest = resolved(c.total_timesteps) - self.n_iterations * batch
            if rest:
                how = "no whole number of iterations" if rest > 0 else "less than one iteration"
                console.print(
                    f"note: {c.total_timesteps:,} steps are {how} of {batch:,}; "
                    f"{self.n_iterations * batch:,} will be run.",
                    highlight=False,
                )

    def run(self, signals: StopSignals | None = None) -> Result:
        """Train to the end of the plan, the target, or the first Ctrl-C, SIGTERM or SIGUSR1, and save.

        Args:
            signals: open since before this trainer was made; None: they are listened to from now on.
        """
        with contextlib.ExitStack() as stack:
            self._signals = signals or stack.enter_context(StopSignals())
            self._signals.on_first = lambda: self.logger.say("stopping after this iteration; once more stops at once")
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
            raise RuntimeError("this trainer has run already; fastppo.resume makes one that goes on")
        progress = self.progress
        try:
            self._open_logger()
            self.clock.start(progress.seconds, self.metrics.global_step)
            self._writer.start(self.metrics.global_step)
            while progress.iteration < self.n_iterations and not self._asked_to_stop():
                self._doing = "rollout"
                self.learner.anneal(progress.iteration / self.n_iterations)
                self.collect()
                self._doing = "update"
                look = self._sampler.look if self._sampler.due(progress.iteration + 1) else None
                figures = self.learner(look)
                with self.clock.phase("update"):
                    found = self.metrics.read(figures)
                    self._stop_what_skips(found)
                    self.learner.update_obs_moments()
                progress.iteration += 1
                with self.clock.phase("log"):
                    sample = None if look is None else self._sample()
                    named = self.metrics.count(found)
                    stats = self._statistics(progress.iteration, named, self.learner.values, sample)
                    progress.seconds = stats.seconds
                self._doing = "nothing"
                self._look_after_envs(stats)
                best = self._evaluate(stats)
                with self.clock.phase("log"):
                    stats = self.logger.write(stats)
                with self.clock.phase("save"):
                    if best or self._writer.due(stats.global_step):
                        self._save_checkpoint(best)
                with self.clock.paused():
                    yield stats
                if self.metrics.episodes.reached(target_of(self.config)):
                    break
        except KeyboardInterrupt:
            self._doing = "leaving"  # asked twice: what is saved is saved
            raise
        except Exception:
            if self.world.size > 1:  # a checkpoint takes all processes, and the others know of nothing
                self._doing = "failing"
            raise
        finally:
            self._finish()

    def _open_logger(self) -> None:
        if not self.world.is_main:
            return
        again = self._resumed or any(self.run_dir.glob("events.*"))  # or begun before, without a checkpoint
        at, after = (self.metrics.global_step, self.progress.iteration) if again else (None, None)
        jsonl = JsonlSink(self.run_dir, at)
        for row in read_rows(self.run_dir) if again else ():
            figures = {tag: value for tag, value in row.items() if "/" in tag and isinstance(value, (int, float))}
            self.logger.history.add(figures)
        settings = self.config.to_dict()
        self.logger.open(TensorBoardSink(self.run_dir, settings, at), jsonl, SampleSink(self.run_dir, after))
        for name in self.config.track:
            self.logger.open(open_tracker(name, self.run_dir, settings))
        if self.logger.console is not None:
            self.logger.open(ConsoleSink(self.logger.console, self.n_iterations))

    def _sample(self) -> UpdateSample:
        return self._sampler.sample(self.progress.iteration, self.learner.coefs, self.learner.rewards)

    def _asked_to_stop(self) -> bool:
        asked = self.stop_requested or (self._signals is not None and self._signals.received is not None)
        return self.world.any(asked, self.device)

    def _stop_what_skips(self, figures: np.ndarray[Any, Any]) -> None:
        """End a run in which no gradient is finite any longer, and keep what shows why."""
        skipped = int(figures[NAMES.index("skipped_in_a_row")])
        if skipped < self.config.max_skipped:
            return
        folder = self.run_dir / f"capsule-{self.world.rank}-{self.progress.iteration:06d}"
        about = {"iteration": self.progress.iteration + 1, "config": self.config.to_dict()}
        batch, coefs = self.rollout.batch(), self.learner.coefs
        try:
            save_nan_dump(folder, self.spec, self.models, batch, coefs, self.update, about)
            how = f"Where it begins: fastppo replay {folder}"
        except OSError as error:
            how = f"What led there could not be kept ({error.strerror or error})."
        raise EnvError(
            f"{skipped} minibatches in a row had a gradient that is not finite; their steps were left out, but nothing "
            f"is learned any longer. {how}"
        )

    def _look_after_envs(self, stats: Stats) -> None:
        """Say which environments left their space, or failed and were made anew; too many are an error."""
        c = self.config
        if stats.scalars.get("charts/obs_outside_space") and not self._told_outside:
            self._told_outside = True
            where = self.metrics.outside() or "another process's environment left its observation_space"
            if c.strict_obs:
                raise EnvError(f"{where} of its run (--strict-obs).")
            self.logger.say(
                f"warning: {where} of its run; charts/obs_outside_space counts how often, this is said once."
            )
        if c.on_env_error == "fail":
            return
        restarts = self.world.total(self.env.restarts, self.device)
        stats.scalars["charts/env_restarts"] = restarts
        for line in self.env.restart_messages():
            self.logger.say(f"{line} {restarts} of {c.env_restarts} (--env-restarts).")
        if restarts > c.env_restarts:
            raise EnvError(f"environments failed {restarts} times; {c.env_restarts} are allowed (--env-restarts).")

    def _evaluate(self, stats: Stats) -> bool:
        """Play what is due; returns whether an evaluation went better than ever."""
        evaluates = self.periodic.evaluates_at(stats.global_step)
        with self.clock.paused():
            played = self.periodic(stats)
        if not evaluates:
            return False
        better = False
        if played is not None:
            best = self.progress.best
            better = math.isfinite(played.mean) and (best is None or played.mean > best)
            note = ", the best so far" if better else ""
            how = f"return {played.mean:.2f} +- {played.std:.2f}{note}{played.remark}"
            self.logger.say(f"evaluation at {stats.global_step:,} steps: {how}")
            if better:
                self.progress.best = played.mean
        return self.world.any(better, self.device)

    def _save_checkpoint(self, best: bool = False, *, env_lost: bool = False) -> None:
        """Copy the run's state, and have it written."""
        about = about_run(self.config, self.env, self.world, versions(), machine_name())
        if env_lost:
            about["way"] = "restart"
        model, about_model = snapshot(self.models), self._about_model()
        mine = snapshot(self._parts if env_lost else {**self._parts, "env": self.env})
        self._writer.save(
            self.metrics.global_step,
            lambda: model_files(model, self.spec, about_model),
            lambda: state_files(self.world.rank, mine, about),
            self.progress.best if best else None,
        )

    def _about_model(self) -> dict[str, Any]:
        return {"global_step": self.metrics.global_step, "env": self.env_name, "make_env": self._custom_env}

    def _finish(self) -> None:
        # last, for closing is what fails when a worker has died
        with contextlib.ExitStack() as stack:
            stack.callback(self.world.close)
            stack.callback(self._let_go)
            stack.callback(self.env.close)
            stack.callback(self.periodic.close)
            stack.callback(self.logger.close)
            stack.callback(self._writer.close)
            self._save_the_end()

    def _save_the_end(self) -> None:
        """Save what is whole: a checkpoint where an iteration has ended, the model anyway, and how it ended."""
        c, clock = self.config, self.clock
        target = self.metrics.episodes.reached(target_of(c))
        if self._doing in ("nothing", "rollout") and not self._writer.has(self.metrics.global_step):
            # an error in a rollout leaves all that is learned as the last iteration left it
            env_lost = self._doing == "rollout"
            try:
                self._save_checkpoint(env_lost=env_lost)
            except EnvError:  # what is wrong with them will be said, or has been
                if self.world.size == 1:
                    self._save_checkpoint(env_lost=True)
        self._writer.wait()
        self.result = Result(
            mean_return=self.metrics.episodes.mean_return,
            mean_length=self.metrics.episodes.mean_length,
            episodes=self.metrics.episodes.count,
            global_step=self.metrics.global_step,
            iterations=self.progress.iteration,
            ended="target" if target else "finished" if self.progress.iteration == self.n_iterations else "interrupted",
            sps_steady=clock.sps_steady,
            sps_total=clock.sps_total,
            seconds=clock.seconds,
            compile_seconds=self.compile_seconds,
            compilations=compiling.compilations - self._compiled_before,
            phases=clock.phase_seconds(),
            run_dir=self.run_dir,
            unsaved=self._writer.failure,
        )
        if self.world.is_main and self._doing != "leaving":
            try:
                save_model(self.run_dir, self.spec, self.models, self._about_model())
                values = dataclasses.asdict(self.result) | {"run_dir": str(self.run_dir)}
                finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}
                write_json(self.run_dir / "result.json", finite)
            except OSError as error:
                trouble = f"the model could not be saved ({error.strerror or error})"
                self.result = dataclasses.replace(self.result, unsaved=trouble)
                self.logger.say(f"{trouble}.")
