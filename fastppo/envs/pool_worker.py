"""The worker side of PoolVectorEnv: a process that steps its environments in shared memory.

Imports no torch, so that workers start fast.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import signal
import traceback
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import gymnasium as gym
import numpy as np

from fastppo.envs.env_group import EnvGroup, error_text, make_envs
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.step_arrays import check_spaces, layout
from fastppo.errors import ENV_ERRORS, EnvError, cause_line

_Array = np.ndarray[Any, Any]
# Orders: plain integers, which the ring buffer holds
STEP, RESET, CLOSE, GET_STATE, SET_STATE, SET_MOMENTS, GET_MESSAGES, CALL, SET_ATTR, LOG_INFO, READ_INFO = range(11)
# Orders whose arguments follow through the pipe, pickled
WITH_DATA = (SET_STATE, SET_MOMENTS, CALL, SET_ATTR, LOG_INFO)
MAX_REPORT = 8000  # characters of an error report
STACKS_SIGNAL = getattr(signal, "SIGUSR2", None)  # makes a worker write its stacks; not on Windows


class SharedArrays:
    """Arrays in shared memory, passed to a worker as it starts."""

    def __init__(self, ctx: Any, n: int, obs: gym.Space[Any], action: gym.Space[Any]) -> None:  # noqa: ANN401
        """Allocate the arrays of `layout` in a multiprocessing context."""
        shapes = layout(n, obs, action)
        self._shapes = shapes
        self._raw = {
            name: ctx.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            for name, (shape, dtype) in shapes.items()
        }

    def arrays(self) -> dict[str, _Array]:
        """Return views of the memory by name."""
        return {
            name: np.frombuffer(self._raw[name], dtype, count=int(np.prod(shape))).reshape(shape)
            for name, (shape, dtype) in self._shapes.items()
        }


class Channels(NamedTuple):
    """A worker's ends of what connects it to the trainer.

    Attributes:
        go: semaphore, released for each order.
        ring: array of orders and their groups.
        done: semaphores, one per group, released when an order is done.
        failed: value, 1 once the worker has failed.
        pipe: for answers, states and reports.
        stacks: takes the stacks of a worker that hangs.
        trainer_alive: closes when the trainer dies.
    """

    go: Any
    ring: Any
    done: list[Any]
    failed: Any
    pipe: Connection
    stacks: Connection
    trainer_alive: Connection


def run_worker(
    shared: SharedArrays,
    parts: list[slice],
    pickled: bytes,
    fault_policy: FaultPolicy,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    channels: Channels,
) -> None:
    """Run a worker: make its environments, then execute orders until CLOSE or until the trainer dies."""
    go, ring, done, failed, pipe, stacks, trainer_alive = channels
    # sent to whole process groups and job steps; the trainer alone ends workers
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if STACKS_SIGNAL is not None:
        faulthandler.register(STACKS_SIGNAL, file=stacks.fileno(), all_threads=True)
    _die_with(trainer_alive)
    trainer = multiprocessing.parent_process()  # not getppid: that is the fork server
    envs: dict[int, gym.Env[Any, Any]] = {}
    try:
        groups = _make_groups(pickled, envs, shared.arrays(), parts, fault_policy, spaces)
        for semaphore in done:
            semaphore.release()
        at = 0
        while True:
            while not go.acquire(True, 5.0):
                if trainer is not None and not trainer.is_alive():
                    return
            slot = 2 * (at % (len(ring) // 2))
            order, group, at = ring[slot], ring[slot + 1], at + 1
            if order == CLOSE:
                return
            if order == STEP:
                groups[group].step()
                done[group].release()
            elif order == RESET:
                groups[group].reset()
                done[group].release()
            else:
                pipe.send(_answer(order, groups, group, pipe))
    except ENV_ERRORS as error:
        text, line = "".join(traceback.format_exception(error)), error_text(error)
        if not isinstance(error, EnvError):
            line = f"{type(error).__name__}: {line}"
        failed.value = 1
        pipe.send((line[:MAX_REPORT], text[-MAX_REPORT:]))  # fits into the pipe's buffer while nobody reads
        for semaphore in done:  # wake the trainer, whichever group it waits for
            semaphore.release()
    finally:
        for env in envs.values():
            with contextlib.suppress(*ENV_ERRORS):
                env.close()


def _make_groups(
    pickled: bytes,
    envs: dict[int, gym.Env[Any, Any]],
    arrays: dict[str, _Array],
    parts: list[slice],
    fault_policy: FaultPolicy,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
) -> list[EnvGroup]:
    """Make a worker's environments, into `envs`, and return its share of each group.

    `pickled` is a `WorkerSetup`, the makers by index, and the patterns of `log_info`.
    """
    import cloudpickle

    setup, makers, patterns = cloudpickle.loads(pickled)
    setup.seed_streams()
    for i, env in make_envs({i: functools.partial(setup.make, make) for i, make in makers.items()}, envs).items():
        check_spaces(i, env, *spaces)
    ranges = [range(part.start, part.stop) for part in parts]
    groups = [
        EnvGroup([envs[i] for i in mine], [makers[i] for i in mine], arrays, part, fault_policy)
        for part, mine in zip(parts, ranges, strict=True)
    ]
    if patterns:
        for group in groups:
            group.log_info(patterns)
    return groups


def _answer(order: int, groups: list[EnvGroup], group: int, pipe: Connection) -> Any:  # noqa: ANN401 - JSON-able
    """Return the answer to an order that is neither a step nor a reset.

    Of an order with data it is `(result, None)`, or `(None, (line, traceback))` of an error after which the
    environments can go on.
    """
    if order == GET_STATE:
        return groups[group].state()
    if order == READ_INFO:
        return groups[group].read_info()
    if order in WITH_DATA:
        given = pipe.recv_bytes()
        try:
            return _carry_out(order, groups[group], given), None
        except EnvError as error:
            trace = "".join(traceback.format_exception(error.__cause__ or error))
            return None, (str(error)[:MAX_REPORT], trace[-MAX_REPORT:])
    restart_messages = [line for envs in groups for line in envs.restart_messages]
    for envs in groups:
        envs.restart_messages.clear()
    return restart_messages


def _carry_out(order: int, group: EnvGroup, pickled: bytes) -> bytes | None:
    """Carry out an order with data; return the pickled results of CALL.

    Raises:
        EnvError: the order is at fault.
    """
    import cloudpickle

    try:
        given = cloudpickle.loads(pickled)
    except ENV_ERRORS as error:
        raise EnvError(f"a worker process can't unpickle the arguments: {cause_line(error)}.") from error
    if order == SET_STATE:
        group.load(given)
    elif order == SET_MOMENTS:
        group.load_moments(given)
    elif order == SET_ATTR:
        group.set_attr(*given)
    elif order == LOG_INFO:
        group.log_info(given)
    else:
        results = group.call(*given)
        try:
            pickled_results: bytes = cloudpickle.dumps(results)
        except ENV_ERRORS as error:
            raise EnvError(f"the results of call({given[0]!r}) can't be pickled: {cause_line(error)}.") from error
        return pickled_results
    return None


def _die_with(trainer_alive: Connection) -> None:
    """Have the kernel kill this process, even in a C loop, when the other end of `trainer_alive` closes."""
    try:
        import fcntl

        fcntl.F_SETSIG  # noqa: B018 - raises if it is missing
    except (ImportError, AttributeError):
        return  # not Linux: the worker checks for its trainer between orders
    fcntl.fcntl(trainer_alive, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(trainer_alive, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(trainer_alive, fcntl.F_SETFL, fcntl.fcntl(trainer_alive, fcntl.F_GETFL) | os.O_ASYNC)
