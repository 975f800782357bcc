"""Compile or capture the parts of a trainer, on request or if it pays."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch

from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.errors import CaptureError
from fastppo.policies.memory import RecurrentNetwork
from fastppo.ppo.collector import Collector
from fastppo.ppo.learner import Learner
from fastppo.runtime import compile as compiling
from fastppo.runtime.compile import CompileError, compile_graph, worth_compiling
from fastppo.runtime.distributed import World
from fastppo.runtime.threads import set_threads

Mode = Literal["off", "fused", "on", "graph"]

# A loop over steps in a user's own module is unrolled by the compiler: from here on that takes a minute and more
UNROLLED_STEPS = 16
_WAIT = "compiling: 10-20 s the first time, 5 s from the cache"


def compile_parts(
    wanted: Literal["auto", "off", "fused", "on", "graph"],
    minibatches: int,
    learner: Learner,
    collector: Collector,
    env: VecEnv,
    world: World,
    *,
    notes: list[str],
    say: Callable[[str], None],
) -> tuple[Mode, float]:
    """Compile or capture rollout and update, and return the resulting mode.

    Args:
        wanted: the requested mode; "auto" updates in C or by kernels where that is possible; else it captures on CUDA,
            and on the CPU compiles if the minibatches ahead repay it.
        minibatches: minibatches left in this run.
        learner: compiled first, since the update is most of the work.
        collector: its actors are compiled second.
        env: compiled last, if it is a `TensorEnv`.
        world: the ranks that train together.
        notes: receives a line per choice.
        say: prints a line before the wait.

    Returns:
        The resulting mode, and the seconds spent on it.

    Raises:
        CaptureError: "graph" was requested and the capture failed, on this rank or another.
        FastPPOError: it failed on some ranks only, after the others had begun collective operations.
    """
    parts = _Parts(learner, collector, env, world, notes, say)
    if wanted == "auto" or wanted == "fused":
        try:
            fuse = _fuse if learner.device.type == "cpu" else _fuse_on_gpu
            return "fused", fuse(parts, minibatches)
        except CompileError as error:
            notes.append(f"not fused: {error}.")
        wanted = "auto"
    required = wanted != "auto"
    mode, why = _choose_mode(wanted, minibatches, learner)
    if mode == "off":
        if not required:
            notes.append(f"compile off: {why}.")
        return mode, 0.0
    say(_WAIT)
    begin, compiled_before = time.perf_counter(), compiling.compilations
    unrolls = _unrolled_steps(learner) > UNROLLED_STEPS and not required
    if (mode == "on" or learner.device.type == "cuda") and not unrolls:
        mode, why = _compile(parts, mode, why)
    if mode == "graph":
        try:
            _capture(parts, required=required)
        except CaptureError as error:
            if required:
                raise
            mode, why = "on" if compiling.compilations > compiled_before else "off", str(error)
    seconds = 0.0
    if mode != "off":
        seconds = time.perf_counter() - begin
        why = f"{why.removesuffix('.')}; took {seconds:.1f} s"
    notes.append(f"compile {mode}: {why.removesuffix('.')}.")
    return mode, seconds


class _Parts(NamedTuple):
    """The parts to compile, and where to report; see `compile_parts`."""

    learner: Learner
    collector: Collector
    env: VecEnv
    world: World
    notes: list[str]
    say: Callable[[str], None]


def _compile(parts: _Parts, mode: Mode, why: str) -> tuple[Mode, str]:
    """Compile update, acting and stepping; return the mode and its reason, which change where the update can't be."""
    try:
        parts.learner.compile()
    except CompileError as error:
        if mode == "on":
            return "off", f"it can't be compiled: {error}"
        parts.notes.append(f"the update is not compiled: {error}.")
        return mode, why
    # if these fail, the update stays compiled
    _compile_each({"acting": parts.collector.compile, "stepping": lambda: _compile_env(parts.env)}, parts.notes)
    return mode, why


def _capture(parts: _Parts, *, required: bool) -> None:
    """Capture the update and, unless it fails and is not `required`, acting.

    Raises:
        CaptureError: a required capture failed, on this rank or another, or that of the update.
    """
    parts.learner.capture()
    parts.world.together(lambda: _capture_acting(parts, required=required), CaptureError)


def _fuse(parts: _Parts, minibatches: int) -> float:
    """Let acting and update run in C; the steps of a `TensorEnv` and of RND's networks are left for the compiler."""
    learner, env = parts.learner, parts.env
    begin = time.perf_counter()
    threads = torch.get_num_threads()
    learner.fuse(threads)
    parts.collector.fuse(threads)
    set_threads(1)  # torch's waiting threads would hold the cores that those of the C code need
    parts.notes.append(f"compile fused: acting and update run in C; took {time.perf_counter() - begin:.1f} s.")
    left = {"stepping": lambda: _compile_env(env)} if isinstance(env, TensorEnv) else {}
    if learner.curiosity is not None:
        left["RND"] = learner.compile_curiosity
    if left and worth_compiling(minibatches)[0]:
        parts.say(_WAIT)
        _compile_each(left, parts.notes)
    return time.perf_counter() - begin


def _fuse_on_gpu(parts: _Parts, minibatches: int) -> float:
    """Run the update in kernels, and rollouts too where they are covered; compile the rest and capture both.

    A GPU compiles for any number of `minibatches`.
    """
    learner, collector, notes = parts.learner, parts.collector, parts.notes
    begin = time.perf_counter()
    if learner.update.not_fused() is None:
        parts.say("compiling kernels: a minute or more the first time, seconds from the cache")
    learner.fuse(torch.cuda.get_device_properties(learner.device).multi_processor_count)
    left = {} if learner.curiosity is None else {"RND": learner.compile_curiosity}
    try:
        collector.fuse(torch.get_num_threads())
    except CompileError as error:
        notes.append(f"rollouts are not fused: {error}.")
    if collector.acts_in == "torch":
        left |= {"acting": collector.compile, "stepping": lambda: _compile_env(parts.env)}
    _compile_each(left, notes)
    try:
        _capture(parts, required=False)
    except CaptureError as error:
        notes.append(f"kernels are launched one by one: {error}")
    seconds = time.perf_counter() - begin
    kernels = {"Triton": "rollout and update run in kernels", "C": "the update runs in kernels, acting in C"}
    what = kernels.get(collector.acts_in, "the update runs in kernels")
    notes.append(f"compile fused: {what}; took {seconds:.1f} s.")
    return seconds


def _compile_each(parts: dict[str, Callable[[], None]], notes: list[str]) -> None:
    """Compile each part, or add a note that it stays eager."""
    for name, compile_part in parts.items():
        try:
            compile_part()
        except CompileError as error:
            notes.append(f"{name} is eager: it can't be compiled: {error}.")


def _capture_acting(parts: _Parts, *, required: bool) -> None:
    """Capture acting, or add a note that it stays eager: no rank waits for another in a rollout, so ranks may differ.

    Raises:
        CaptureError: the capture failed and is required.
    """
    try:
        parts.collector.capture()
    except CaptureError as error:
        if required:
            raise
        parts.notes.append(f"acting is eager: {error}")


def _choose_mode(wanted: Literal["auto", "off", "on", "graph"], minibatches: int, learner: Learner) -> tuple[Mode, str]:
    if wanted != "auto":
        return wanted, "requested"
    if learner.device.type != "cpu":
        return "graph", "on CUDA, launches cost more than small kernels"
    if (steps := _unrolled_steps(learner)) > UNROLLED_STEPS:
        return "off", f"the compiler would unroll the {steps} steps of this module's memory; with --compile on it does"
    pays, why = worth_compiling(minibatches)
    return ("on" if pays else "off"), why


def _unrolled_steps(learner: Learner) -> int:
    """Return the steps of a loop in the user's own module that the compiler would unroll; 0: there is none."""
    policy = learner.update.policy
    own = policy.has_memory and not isinstance(policy.network, RecurrentNetwork)
    return learner.update.shuffle.segment_length if own else 0


def _compile_env(env: VecEnv) -> None:
    if isinstance(env, TensorEnv):
        env.compile(compile_graph)
