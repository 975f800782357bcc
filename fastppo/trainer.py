"""The trainer: builds and owns the parts, and runs the training loop."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from rich.console import Console
from torch import Tensor, nn

from fastppo.builders.resolve import target_of
from fastppo.builders.run import build_run
from fastppo.config import Config, as_path
from fastppo.envs.make_envs import Maker
from fastppo.errors import ConfigError, EnvError, FastPPOError, kind_of
from fastppo.monitoring.open_sinks import open_sinks
from fastppo.monitoring.sinks.trackers import check_trackers
from fastppo.monitoring.stats import Stats
from fastppo.monitoring.update_samples import UpdateSample
from fastppo.runs.checkpoint import is_checkpoint
from fastppo.runs.checkpoint_writer import LONG_ITERATION
from fastppo.runs.nan_dump import save_nan_dump
from fastppo.runs.result import Result
from fastppo.runs.run_dir import is_folder
from fastppo.runtime import compile as compiling
from fastppo.runtime.console import progress_console
from fastppo.runtime.signals import StopSignals


class _Stage(enum.Enum):
    """Where training is, and so what is left to save if it ends there."""

    BETWEEN = enum.auto()  # two iterations: everything is as of the last one
    ROLLOUT = enum.auto()  # what is learned is as of the last iteration, the environments are further
    ABANDONED = enum.auto()  # the same: a stop was wanted, and the rest of the rollout would have taken long
    UPDATE = enum.auto()  # what is learned belongs to no iteration: no checkpoint
    FAILING = enum.auto()  # one of several ranks failed: no checkpoint, which needs all ranks
    LEAVING = enum.auto()  # the second signal, or Ctrl-C in an update: nothing


class Trainer:
    """PPO on one environment: `Trainer(config).run()`, or `for stats in trainer.iterations()`.

    Attributes:
        config: the config with every field resolved.
        env_info: name, spaces and kind of the environment.
        policy: encoder, network, distribution.
        env: the environments.
        rollout: the storage of one iteration; its tensors never move.
        collect: fills the rollout.
        learner: learns from the rollout.
        update: runs the learner's epochs.
        metrics: episode statistics and the step counter.
        progress: iterations, seconds and the best evaluation so far.
        run_dir: the run folder.
        memory: the memory plan.
        world: the ranks that train together.
        n_iterations: planned iterations.
        notes: choices with their reasons, and remarks on the environment.
        compile_seconds: seconds spent on compilation.
        result: outcome of the run; None until it ends.
    """

    def __init__(
        self,
        config: Config,
        make_env: Maker | None = None,
        policy: nn.Module | None = None,
        console: Console | None = None,
        resume_from: Path | None = None,
        progress: bool | None = None,
    ) -> None:
        """Make and reset the environments, build policy and storage, open the run folder, and compile.

        Args:
            config: settings; unset fields are filled in from the environment.
            make_env: makes a gymnasium Env (vectorised here) or a VectorEnv; replaces config.env_id.
            policy: custom network, x -> (params [B, P], value [B]); see fastppo.policies.policy.
            console: shows progress; None: as `progress` says.
            resume_from: a verified checkpoint in its own run folder; see `fastppo.resume`.
            progress: show progress on standard output; None: if it is a terminal.

        Raises:
            ConfigError: settings, network or run folder can't be used.
            EnvError: the environment can't be created or used.
            CheckpointError: the checkpoint can't be used.
        """
        if not isinstance(config, Config):
            raise ConfigError(f"Trainer takes a Config, not {kind_of(config)}: Trainer(Config(env_id=...)).")
        if console is not None and not isinstance(console, Console):
            raise ConfigError(f"console is {kind_of(console)}; give a rich.console.Console, or progress=True.")
        if resume_from is not None and not is_checkpoint(resume_from := as_path(resume_from, "resume_from")):
            raise ConfigError(f"resume_from={resume_from} is no checkpoint of a run; call fastppo.resume(run) instead.")
        check_trackers(config.track)
        self._compiled_before = compiling.compilations
        console = progress_console(progress) if console is None else console
        self._run = run = build_run(config, make_env, policy, console, resume_from)
        self.config, self.notes, self.n_iterations, self.memory = run.config, run.notes, run.n_iterations, run.memory
        self.clock, self.device, self.world, self.logger = run.clock, run.device, run.world, run.logger
        self.spec, self.policy, self.reward_normalizer, *_ = run.models
        self.env_info = run.env_info
        self.env, self.rollout, self.collect, self.progress = run.env, run.rollout, run.collect, run.progress
        self.update, self.metrics, self._statistics, self.learner, self._sampler = run.learning
        self._watch_envs, self._add_info, self._evaluate, self._saver = run.monitor, run.info, run.evaluation, run.saver
        self.run_dir, self.compile_seconds = run.run_dir, run.compile_seconds
        self._signals: StopSignals | None = None
        self._stage = _Stage.BETWEEN
        self._update_seconds = 0.0  # of the last iteration
        self._begun = False
        self.stop_requested = False
        self.result: Result | None = None

    def iterations(self) -> Iterator[Stats]:
        """Train and yield the statistics of each iteration; leaving the loop early also saves and closes.

        Raises:
            FastPPOError: another loop over this trainer's iterations has begun.
            RuntimeError: the trainer has run already.
        """
        if self.result is not None:
            raise RuntimeError("this trainer has run already; call fastppo.resume to continue the run")
        if self._begun:
            raise FastPPOError(
                "a loop over this trainer's iterations has begun already; continue that loop, or end it and call "
                "fastppo.resume."
            )
        self._begun = True
        progress, clock = self.progress, self.clock
        try:
            self._open_sinks()
            clock.start(progress.seconds, self.metrics.global_step, progress.paused_seconds)
            self._saver.start(self.metrics.global_step, saved=self._run.resumed)
            while not self._complete() and not self._must_stop():
                self._stage, began = _Stage.ROLLOUT, time.monotonic()
                self.learner.anneal(progress.iteration / self.n_iterations)
                complete = self.collect(functools.partial(self._abandons, began))
                if self.world.any(not complete, self.device):
                    self._stage = _Stage.ABANDONED
                    self.logger.say("stopped within a rollout, which would take long: its steps are discarded")
                    break
                self._stage, updating = _Stage.UPDATE, time.monotonic()
                sampled = self._sampler.due(progress.iteration + 1)
                measured = self.learner(on_epoch=self._sampler.measure if sampled else None)
                with clock.phase("update"):
                    metrics = self.metrics.read(measured)
                    self._stop_if_stalled(metrics)
                    self.learner.update_obs_moments()
                progress.iteration += 1
                self._update_seconds, iteration_seconds = time.monotonic() - updating, time.monotonic() - began
                with clock.phase("log"):
                    sample = self._sample() if sampled else None
                    self.metrics.count(metrics)
                    stats = self._statistics(progress.iteration, metrics, self.learner.coef_values, sample)
                    progress.seconds = stats.seconds
                self._stage = _Stage.BETWEEN
                self._watch_envs(stats)
                self._add_info(stats)
                with clock.paused():
                    best = self._evaluate(stats, progress)
                progress.paused_seconds = clock.paused_seconds
                stats = dataclasses.replace(stats, paused_seconds=progress.paused_seconds)
                with clock.phase("log"):
                    stats = self.logger.write(stats)
                with clock.phase("save"):
                    if best or self._saver.due(stats.global_step, iteration_seconds):
                        self._saver.checkpoint(stats.global_step, progress.best if best else None)
                with clock.paused():
                    yield stats
        except KeyboardInterrupt:
            # the second signal, or an update that is half done: leave without saving. Otherwise Ctrl-C in the caller's
            # own loop, or an environment raised it: save as after an error
            if self._stage == _Stage.UPDATE or (self._signals is not None and self._signals.received is not None):
                self._stage = _Stage.LEAVING
            elif self.world.size > 1:
                self._stage = _Stage.FAILING
            raise
        except Exception:
            if self.world.size > 1:  # a checkpoint needs all ranks, and the others don't know of this error
                self._stage = _Stage.FAILING
            raise
        finally:
            self._finish()

    def run(self, signals: StopSignals | None = None) -> Result:
        """Train until the planned steps, the target, or the first Ctrl-C, SIGTERM or SIGUSR1; then save.

        Args:
            signals: signal handlers installed before this trainer was made; None: install them now.
        """
        with contextlib.ExitStack() as stack:
            self._signals = signals or stack.enter_context(StopSignals())
            self._signals.on_first = lambda: self.logger.say(
                f"stopping after this iteration, or now if it would take over {LONG_ITERATION:.0f} s; "
                "once more stops without saving"
            )
            for _ in self.iterations():
                pass
        assert self.result is not None
        return self.result

    def request_stop(self) -> None:
        """Stop after the current iteration, or within its rollout if that would take longer than 10 seconds."""
        self.stop_requested = True

    def log(self, tag: str, value: float | Tensor) -> None:
        """Log a figure of your own in the `iterations()` loop, at the step of the iteration that was yielded last.

        It is written to every sink: TensorBoard, metrics.jsonl, trackers.

        Args:
            tag: its name, such as "custom/success".
            value: a number, or a tensor or array of one.

        Raises:
            ValueError: fastppo itself logs `tag`, or `value` is not one number.
            RuntimeError: the loop has yielded no iteration yet, or has ended.
        """
        try:
            number = float(value.detach() if isinstance(value, Tensor) else value)
        except (TypeError, ValueError, RuntimeError):  # the last by a tensor of several numbers
            raise ValueError(f"the value of {tag!r} is {kind_of(value)}; give one number.") from None
        self.logger.log(tag, number)

    def save(self, path: Path | str) -> None:
        """Save the policy as it is now into the folder `path`, for `load_policy`, `evaluate` and `init_from`.

        A policy saved there before is replaced. The checkpoints that a resume needs are saved without this.

        Raises:
            ConfigError: `path` is the folder of a run or a checkpoint, or can't be written.
        """
        folder = as_path(path, "path")
        if is_folder(folder) and any((folder / name).exists() for name in ("run.json", "state-0.json")):
            raise ConfigError(f"save: {folder} holds a run or a checkpoint, whose files would be lost; name another.")
        if self.world.is_main:
            try:
                self._saver.save_policy(folder, self.metrics.global_step, self.config.to_dict())
            except OSError as error:
                raise ConfigError(f"save: {folder} can't be written ({error.strerror or error}).") from None

    def _sample(self) -> UpdateSample:
        return self._sampler.sample(self.progress.iteration, self.learner.coefs, self.learner.rewards)

    def _reached(self) -> bool:
        return self.metrics.episodes.reached(target_of(self.config))

    def _complete(self) -> bool:
        return self._reached() or self.progress.iteration >= self.n_iterations

    def _stop_wanted(self) -> bool:
        return self.stop_requested or (self._signals is not None and self._signals.received is not None)

    def _must_stop(self) -> bool:
        return self.world.any(self._stop_wanted(), self.device)

    def _abandons(self, began: float, share: float) -> bool:
        """Whether to leave a rollout, begun at `began` and done to `share`, as a stop is wanted and would take long.

        Under exact_resume a rollout is only left if the run can resume from its beginning.
        """
        if not self._stop_wanted():
            return False
        left = (time.monotonic() - began) * (1 / share - 1) + self._update_seconds
        if left < LONG_ITERATION:
            return False
        return not self.config.exact_resume or self.progress.iteration == 0 or self._saver.has(self.metrics.global_step)

    def _stop_if_stalled(self, metrics: Mapping[str, float]) -> None:
        """Raise once `max_skipped` minibatches in a row were skipped; saves the batch for `fastppo replay`."""
        skipped = int(metrics["skipped_in_a_row"])
        if skipped >= self.config.max_skipped:
            folder = self.run_dir / f"capsule-{self.world.rank}-{self.progress.iteration:06d}"
            metadata = {"iteration": self.progress.iteration + 1, "config": self.config.to_dict()}
            batch, coefs, models = self.rollout.batch(), self.learner.coefs, self._run.models.saved()
            try:
                save_nan_dump(folder, self.spec, models, batch, coefs, update=self.update, metadata=metadata)
                command = f"fastppo replay {folder}"
                if self.spec.network == "custom":  # which the command line can't give
                    command = f"fastppo.analysis.nan_replay.replay({str(folder)!r}, policy=...) in Python"
                hint = f"To find where it begins: {command}"
            except OSError as error:
                hint = f"The batch could not be kept ({error.strerror or error})."
            raise EnvError(
                f"{skipped} minibatches in a row had a gradient that is not finite; those steps were skipped; training "
                f"has stalled, so the run stops. {hint}"
            )

    def _open_sinks(self) -> None:
        if self.world.is_main:
            # an earlier start of this run may have ended before its first checkpoint
            earlier = self._run.resumed or any(self.run_dir.glob("events.*"))
            resumed_at = (self.metrics.global_step, self.progress.iteration) if earlier else None
            settings, track = self.config.to_dict(), self.config.track
            open_sinks(
                self.logger, self.run_dir, settings, track, n_iterations=self.n_iterations, resumed_at=resumed_at
            )

    def _finish(self) -> None:
        # runs in reverse order: save first; close the environments late, because that fails if a worker has died
        with contextlib.ExitStack() as stack:
            stack.callback(self.world.close)
            if self._run.lock is not None:
                stack.callback(self._run.lock.release)
            stack.callback(self.env.close)
            stack.callback(self._evaluate.close)
            stack.callback(self.logger.close)
            stack.callback(self._saver.close)
            self._save_the_end()

    def _save_the_end(self) -> None:
        """Save a checkpoint if the last iteration is complete; then the model and the result, unless leaving."""
        clock, episodes = self.clock, self.metrics.episodes
        # an error in a rollout leaves the learned state as of the last iteration; before the first, nothing is learned
        learned = self._stage is _Stage.ROLLOUT and self.progress.iteration > 0
        if learned or self._stage in (_Stage.BETWEEN, _Stage.ABANDONED):
            self._saver.last_checkpoint(self.metrics.global_step, env_lost=self._stage is not _Stage.BETWEEN)
        self._saver.wait()
        self.result = Result(
            mean_return=episodes.mean_return,
            mean_length=episodes.mean_length,
            episodes=episodes.count,
            global_step=self.metrics.global_step,
            iterations=self.progress.iteration,
            ended="target" if self._reached() else "finished" if self._complete() else "interrupted",
            sps_steady=clock.sps_steady,
            sps_total=clock.sps_total,
            seconds=clock.seconds,
            wall_seconds=clock.wall_seconds,
            setup_seconds=clock.setup_seconds,
            compile_seconds=self.compile_seconds,
            compilations=compiling.compilations - self._compiled_before,
            phases=clock.phase_seconds(),
            run_dir=self.run_dir,
            unsaved=self._saver.failure,
        )
        if (
            self.world.is_main
            and self._stage is not _Stage.LEAVING
            and (trouble := self._saver.save_result(self.result))
        ):
            self.result = dataclasses.replace(self.result, unsaved=trouble)
            self.logger.say(f"{trouble}.")
