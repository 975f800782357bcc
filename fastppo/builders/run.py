"""Build a run: every part that a trainer owns, in order of dependency."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from fastppo.builders.compiling import compile_parts
from fastppo.builders.observers import build_env_monitor, build_evaluation, build_logger, build_saver
from fastppo.builders.parts import (
    Learning,
    Models,
    build_collector,
    build_envs,
    build_learning,
    build_models,
    build_rollout,
    may_update_in_c,
    plan_run,
)
from fastppo.builders.resolve import resolve_config, target_of
from fastppo.config import Config, count_iterations, known
from fastppo.envs.make_envs import EnvInfo, Maker
from fastppo.envs.vec_env import VecEnv
from fastppo.errors import CheckpointError, FinishedError, first_line
from fastppo.evaluation.periodic import PeriodicEvaluation
from fastppo.evaluation.video import choose_renderers
from fastppo.functional.gae import triton_failure
from fastppo.monitoring.env_monitor import EnvMonitor
from fastppo.monitoring.info_monitor import InfoMonitor
from fastppo.monitoring.run_logger import RunLogger
from fastppo.native import library, recurrence
from fastppo.ppo.collector import Collector
from fastppo.ppo.memory_plan import MemoryPlan
from fastppo.ppo.rollout import Rollout
from fastppo.runs.checkpoint import clean_up
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runs.model_files import read_spec
from fastppo.runs.restore import restore
from fastppo.runs.result import recorded_step
from fastppo.runs.run_dir import RunLock, claim_run_dir, create_run_dir
from fastppo.runs.run_saver import RunSaver
from fastppo.runs.run_state import Part, Progress, RunState, run_metadata
from fastppo.runs.system_info import system_info, versions
from fastppo.runtime.clock import Clock
from fastppo.runtime.device import choose_device, machine_name
from fastppo.runtime.distributed import World, join_world
from fastppo.runtime.files import write_json
from fastppo.runtime.main_script import exit_if_reimported
from fastppo.runtime.resources import check_disk
from fastppo.runtime.seeding import GlobalRandomState
from fastppo.runtime.sharing import AT_START, free_cores
from fastppo.runtime.threads import check_threads, choose_threads, keep_freed_memory, set_threads

_SLOW_SECONDS = 1.0  # if making and trying one environment takes longer, a line at the start says so
_PROBE_TEXT = "testing how it resumes makes two or three more (--resume-envs restart: without this test)"


@dataclasses.dataclass
class Run:
    """The parts of a run; see `Trainer` for the public ones.

    Attributes:
        state: what checkpoints hold.
        lock: lock of the run folder, on the main rank; released with the object.
        resumed: whether the run continues a checkpoint.
    """

    config: Config
    notes: list[str]
    env_info: EnvInfo
    clock: Clock
    device: torch.device
    world: World
    logger: RunLogger
    models: Models
    memory: MemoryPlan
    env: VecEnv
    rollout: Rollout
    collect: Collector
    learning: Learning
    n_iterations: int
    progress: Progress
    monitor: EnvMonitor
    info: InfoMonitor
    evaluation: PeriodicEvaluation
    state: RunState
    run_dir: Path
    lock: RunLock | None
    saver: RunSaver
    resumed: bool
    compile_seconds: float


def build_run(
    config: Config, make_env: Maker | None, policy: nn.Module | None, console: Console | None, resume_from: Path | None
) -> Run:
    """Build every part and open the run folder; arguments and errors as for `Trainer`."""
    exit_if_reimported()
    clock, notes, progress = Clock(), list[str](), Progress()
    device, world = _prepare_process(config)
    with contextlib.ExitStack() as undo:
        undo.callback(world.close)
        env_info, seconds = _inspect_env(config, make_env, resume_from)
        if env_info.vector is not None:
            undo.callback(env_info.vector.close)
        resolved, choices = resolve_config(config, env_info, device, policy=policy, world=world)
        notes += choices
        n_iterations = count_iterations(resolved, world.size)
        logger = build_logger(resolved, env_info, device, console if world.is_main else None)
        _explain_wait(resolved, env_info, seconds, logger)
        models = build_models(resolved, env_info, policy, device, world)
        threads = _set_threads(resolved, models, device, world, notes, resumed=resume_from is not None)
        memory = plan_run(resolved, env_info, models, device, world, notes)
        env = build_envs(resolved, env_info, device, world, notes, stream_offset=_stream_offset(resume_from))
        undo.callback(env.close)
        rollout = build_rollout(resolved, env, models, device, world)
        collect, act_device = build_collector(resolved, env, models.policy, rollout, clock, world, notes=notes)
        # with what building chose; at the end, with what compiling did
        chosen = dataclasses.replace(resolved, threads=threads, act_device=act_device)
        learning = build_learning(chosen, env, models, rollout, clock, world, n_iterations=n_iterations)
        notes += _notes_on_gae(learning)
        evaluation = build_evaluation(chosen, env_info, models.policy, device, clock, world, logger.say)
        undo.callback(evaluation.close)
        run_dir, lock = claim_run_dir(lambda: _run_dir(chosen, env_info, resume_from), world)
        if lock is not None:
            undo.callback(lock.release)
        parts = _stateful_parts(learning, collect, logger, progress)
        notes += _notes_on_memory(chosen, device)
        state = RunState(models.spec, models.saved(), parts, env, _metadata(chosen, env, world, device))
        if resume_from is not None:
            notes += _resume(resume_from, state, chosen, collect, world)
            evaluation.last_step = learning.metrics.global_step
            if world.shared(lambda: recorded_step(run_dir)) == learning.metrics.global_step:
                _refuse_finished(run_dir, chosen, learning, progress, n_iterations)
        _check_disk(run_dir, chosen, learning, world)
        minibatches = n_iterations * known(chosen.update_epochs) * known(chosen.n_minibatches)
        mode, compile_seconds = compile_parts(
            chosen.compile, minibatches, learning.learner, collect, env, world, notes=notes, say=logger.say
        )
        final = dataclasses.replace(chosen, compile=mode)
        notes += env.notes
        state = state._replace(metadata=_metadata(final, env, world, device))
        run = Run(
            config=final,
            notes=notes,
            env_info=env_info,
            clock=clock,
            device=device,
            world=world,
            logger=logger,
            models=models,
            memory=memory,
            env=env,
            rollout=rollout,
            collect=collect,
            learning=learning,
            n_iterations=n_iterations,
            progress=progress,
            monitor=build_env_monitor(final, env, learning.metrics, world, device, logger.say),
            info=InfoMonitor(env, final.log_info, world, logger.say),
            evaluation=evaluation,
            state=state,
            run_dir=run_dir,
            lock=lock,
            saver=build_saver(
                final,
                run_dir,
                state,
                world,
                device,
                logger.say,
                env_name=env_info.name,
                custom_env=make_env is not None,
            ),
            resumed=resume_from is not None,
            compile_seconds=compile_seconds,
        )
        if world.is_main:
            _prepare_folder(run)
        undo.pop_all()
    return run


def _prepare_process(config: Config) -> tuple[torch.device, World]:
    """Return the device to train on and the ranks that train together, and set up this process for both."""
    if config.video_every is not None:
        choose_renderers()
    keep_freed_memory()
    device = choose_device(config.device)
    if device.type == "cuda":  # kernels and graphs go to the current device
        torch.cuda.set_device(device)
    return device, join_world(device)


def _inspect_env(config: Config, make_env: Maker | None, resume_from: Path | None) -> tuple[EnvInfo, float]:
    """Return the properties of one environment, and the seconds that making and trying it took."""
    began = time.perf_counter()
    env_info = inspect_configured(config, make_env)
    seconds = time.perf_counter() - began
    if resume_from is not None:  # an earlier version may have read this space in another way
        env_info.obs_spec = env_info.obs_spec.read_as(read_spec(resume_from)[0].obs)
    return env_info, seconds


def _explain_wait(c: Config, env_info: EnvInfo, seconds: float, logger: RunLogger) -> None:
    """Print why the start takes long, if one environment took many `seconds`."""
    if seconds > _SLOW_SECONDS:
        more = "" if c.resume_envs == "restart" else f"; {_PROBE_TEXT}"
        logger.say(f"making one {env_info.name} and two steps took {seconds:.1f} s{more}")


def _set_threads(
    c: Config, models: Models, device: torch.device, world: World, notes: list[str], *, resumed: bool
) -> int:
    """Set torch's threads, and return their number."""
    threads = c.threads
    if threads is None:
        work = c.minibatch_size * models.parameters.size
        # one number for all ranks: with others, sums round differently, and the ranks' parameters would drift apart
        in_c = may_update_in_c(c, models.policy, device)
        threads, choices = world.shared(lambda: _free_threads(work, in_c=in_c))
        notes += choices
    notes += check_threads(threads, resumed=resumed)
    set_threads(threads)
    return threads


def _stream_offset(resume_from: Path | None) -> int:
    """Return the offset of a resumed run's new random streams; 0 for the original ones, also before iteration 1."""
    saved_step = 0 if resume_from is None else int(resume_from.name.removeprefix("step-"))
    return saved_step + 1 if saved_step else 0


def _notes_on_gae(learning: Learning) -> list[str]:
    """Return a note if the Triton kernel of advantages does not work on this GPU."""
    device = learning.learner.device
    if device.type != "cuda" or (failure := triton_failure(device)) is None:
        return []
    return [
        f"advantages use {learning.learner.gae.__name__}: the Triton kernel does not work here "
        f"({type(failure).__name__}: {first_line(failure)})."
    ]


def _stateful_parts(learning: Learning, collect: Collector, logger: RunLogger, progress: Progress) -> dict[str, Part]:
    """Return the parts whose state checkpoints hold, by their names there."""
    parts: dict[str, Part] = {
        "update": learning.update,
        "progress": progress,
        "metrics": learning.metrics,
        "collector": collect,
        "learner": learning.learner,
        "log": logger.interval,
        "randomness": GlobalRandomState(),
    }
    if learning.learner.curiosity is not None:
        parts["curiosity"] = learning.learner.curiosity
    return parts


def _resume(checkpoint: Path, state: RunState, c: Config, collect: Collector, world: World) -> list[str]:
    """Restore `state` from `checkpoint`; return notes on what is exact.

    Raises:
        CheckpointError: it doesn't fit the run, or exact_resume is set and the environments start new episodes.
    """
    exact, notes = restore(checkpoint, state, collect.rollout.obs[-1], world)
    if c.exact_resume and not exact:
        raise CheckpointError(f"exact_resume: {notes[0]}")
    return notes


def _check_disk(run_dir: Path, c: Config, learning: Learning, world: World) -> None:
    """Check that the disk has room for the checkpoints of the run."""
    curiosity = learning.learner.curiosity
    kept = [*learning.update.kept(), *([] if curiosity is None else curiosity.kept())]
    n_kept, size = c.keep_checkpoints + 2, sum(x.nbytes for x in kept)
    world.shared(lambda: check_disk(run_dir, n_kept * size, f"{n_kept} checkpoints"))


def _metadata(c: Config, env: VecEnv, world: World, device: torch.device) -> dict[str, Any]:
    """Return what a resume compares; also the C code, if it computes update or memory: torch rounds differently."""
    code = {}
    if device.type == "cpu" and (c.memory != "none" or c.compile in ("auto", "fused")):
        code["native code"] = library.sources_hash() if recurrence.unavailable() is None else "absent"
    return run_metadata(c, env, world, versions() | code, machine_name())


def _notes_on_memory(c: Config, device: torch.device) -> list[str]:
    """Return a note if a memory that C could compute is computed in torch."""
    if c.memory not in ("lstm", "gru") or device.type != "cpu" or (why := recurrence.unavailable()) is None:
        return []
    return [f"memory {c.memory} is computed in torch, at half the speed of C: {why}."]


def _free_threads(work: int, *, in_c: bool) -> tuple[int, list[str]]:
    """Return the threads for minibatches of `work` = rows x parameters, and notes; cores in use don't count."""
    wanted = choose_threads(work, in_c=in_c)
    threads = min(wanted, free_cores(AT_START)) if wanted > 1 else wanted
    if threads == wanted:
        return threads, []
    return threads, [
        f"threads {threads}: other processes use the other {wanted - threads} of {wanted} cores; "
        f"--threads {wanted} repeats the bits of a run that has them all"
    ]


def _run_dir(c: Config, env_info: EnvInfo, resume_from: Path | None) -> Path:
    if resume_from is not None:
        return resume_from.parents[1]
    return create_run_dir(c.run_dir, env_info.name, c.name, c.seed, begin_again=c.resume == "auto")


def _refuse_finished(run_dir: Path, c: Config, learning: Learning, progress: Progress, n_iterations: int) -> None:
    """Refuse a run that has ended; one killed before it wrote its result goes on, and writes it.

    Raises:
        FinishedError: it has reached its target or its planned steps.
    """
    steps, target = learning.metrics.global_step, target_of(c)
    if learning.metrics.episodes.reached(target):
        raise FinishedError(f"{run_dir} has reached its target of {target} after {steps:,} steps.")
    if progress.iteration >= n_iterations:
        raise FinishedError(
            f"{run_dir} is complete ({steps:,} steps); to extend it: "
            f"fastppo resume {run_dir} --total-timesteps {2 * steps}{' --allow-import' if c.imported else ''}"
        )


def _prepare_folder(run: Run) -> None:
    """Clean up what a killed process left, write config.json and run.json, and print the notes."""
    clean_up(run.run_dir, run.learning.metrics.global_step if run.resumed else None)
    if not run.resumed:  # a run that ended before its first checkpoint begins again, with the same steps
        for path in run.run_dir.glob("events.out.tfevents.*"):
            path.unlink()
    write_json(run.run_dir / "config.json", run.config.to_dict())
    described = {
        "notes": run.notes,
        "memory_plan": dataclasses.asdict(run.memory),
        "processes": run.world.size,
        "action_size": run.env.action_spec.dimensions,
    }
    write_json(run.run_dir / "run.json", system_info(run.device) | described)
    for note in run.notes:
        run.logger.say(f"note: {note}")
    batch, wanted = run.config.batch_size * run.world.size, known(run.config.total_timesteps)
    if wanted != run.n_iterations * batch:
        run.logger.say(
            f"note: rounding {wanted:,} steps down to {run.n_iterations * batch:,} "
            f"({run.n_iterations:,} iterations of {batch:,})."
        )
