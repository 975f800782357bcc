"""A pool of worker processes, each with several environments, as a Gymnasium vector environment.

Observations, actions and results lie in shared memory; a step costs each worker one semaphore each way and no pickling.
The environments may be stepped in two groups, so that the trainer acts on one half while the workers step the other.
Nobody spins: who has nothing to do sleeps on a semaphore.

Rollouts equal those of Gymnasium's SyncVectorEnv bit for bit, for any number of workers (same-step autoreset). Infos
other than `final_obs` stay in the workers.

Workers are watched. One that dies or takes too long is ended, and is an error or is replaced, the episodes of its
environments being cut. A replaced worker's late answers reach nobody: its successor has semaphores of its own. When the
trainer dies, by whatever signal, the kernel ends the workers, also those that are stuck in a C loop.
"""

from __future__ import annotations

import contextlib
import faulthandler
import multiprocessing
import os
import signal
import time
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any, NoReturn

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.envs.sync import (
    NO_FAULT_POLICY,
    EnvGroup,
    FaultPolicy,
    StepResult,
    check_spaces,
    copy_actions,
    error_text,
    fresh_seed,
    layout,
    seeds,
    step_result,
    write_truncation,
)
from fastppo.errors import ConfigError, EnvError
from fastppo.runtime.cores import usable_cores

_Array = np.ndarray[Any, Any]
_STEP, _RESET, _CLOSE, _STATE, _LOAD, _COMPLAIN = range(6)
_MOST = 8000  # characters of a report
_START = 60.0  # seconds for a process to start and import
_POLL = 0.5  # seconds between looks at whether the workers live
_STACKS = getattr(signal, "SIGUSR2", None)  # has a worker write down where it is; not on Windows


class _Shared:
    """Arrays in memory that both sides map; passed to a worker as it starts."""

    def __init__(self, ctx: Any, n: int, obs: gym.Space[Any], action: gym.Space[Any]) -> None:  # noqa: ANN401
        shapes = layout(n, obs, action)
        self._shapes = shapes
        self._raw = {
            name: ctx.RawArray("b", max(1, int(np.prod(shape)) * np.dtype(dtype).itemsize))
            for name, (shape, dtype) in shapes.items()
        }

    def arrays(self) -> dict[str, _Array]:
        """Views of the memory by name."""
        return {
            name: np.frombuffer(self._raw[name], dtype, count=int(np.prod(shape))).reshape(shape)
            for name, (shape, dtype) in self._shapes.items()
        }


class PoolVectorEnv(VectorEnv[_Array, _Array, _Array]):
    """Environments in worker processes, several to each.

    `step` and `reset` are Gymnasium's. `send(group, actions)` and `wait(group)` step one group at a time, and several
    groups may be under way at once.

    Attributes:
        groups: slices of 0..num_envs-1.
        n_workers: processes.
        fault_policy: what is done for environments beside stepping.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        *,
        n_workers: int | None = None,
        n_groups: int = 1,
        start_method: str = "forkserver",
        fault_policy: FaultPolicy = NO_FAULT_POLICY,
    ) -> None:
        """Start the workers and make the environments in them.

        Args:
            env_fns: one maker for each environment; they are pickled (cloudpickle: closures are fine).
            n_workers: processes; None: one for each core this process may run on, at most one for each environment.
            n_groups: groups of environments that are stepped apart; each worker has a share of each.
            start_method: of multiprocessing. Plain fork and a trainer's threads don't go together.
            fault_policy: what to do beside stepping.

        Raises:
            ConfigError: fewer environments than groups.
            EnvError: an environment can't be made, or its spaces aren't arrays.
        """
        n = len(env_fns)
        if not 1 <= n_groups <= n:
            raise ConfigError(f"n_groups={n_groups} with {n} environments; give each group at least one.")
        self.n_workers = max(1, min(n_workers or usable_cores(), n // n_groups))
        probe = env_fns[0]()
        self.single_observation_space, self.single_action_space = probe.observation_space, probe.action_space
        self.metadata = {**probe.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.spec = probe.spec
        probe.close()
        self.num_envs, self.fault_policy = n, fault_policy
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.groups = [slice(*_share(n, n_groups, g)) for g in range(n_groups)]
        self.closed = False
        self._env_fns = env_fns
        if start_method == "forkserver":
            prepare_fork_server()
        self._ctx: Any = get_context(start_method)
        self._shared = _Shared(self._ctx, n, self.single_observation_space, self.single_action_space)
        self._arrays = self._shared.arrays()
        self._complaints: list[str] = []
        self._lost_workers = 0
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        for w in range(self.n_workers):
            self._workers.append(self._start(w))
        for g in range(n_groups):
            self._finish(g)

    def _start(self, w: int) -> _Worker:
        parts = [_part(group, self.n_workers, w) for group in self.groups]
        makers = {i: self._env_fns[i] for part in parts for i in range(part.start, part.stop)}
        with _single_threaded():
            spaces = self.single_observation_space, self.single_action_space
            return _Worker(self._ctx, self._shared, parts, makers, self.fault_policy, spaces)

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Array, dict[str, Any]]:
        """Reset every environment; one seed s means s, s + 1, ... as in Gymnasium.

        Raises:
            EnvError: an environment failed.
        """
        self._arrays["seeds"][:] = seeds(seed, self.num_envs, options)
        for g in range(len(self.groups)):
            self._order(_RESET, g)
        for g in range(len(self.groups)):
            self._finish(g)
        return self._arrays["obs"].copy(), {}

    def step(self, actions: _Array) -> StepResult:
        """Step every environment.

        Raises:
            EnvError: an environment failed, a worker died, or `actions` are not one for each environment.
        """
        copy_actions(self._arrays["actions"], actions)
        for g in range(len(self.groups)):
            self._order(_STEP, g)
        for g in range(len(self.groups)):
            self._finish(g)
        obs, rewards, terminated, truncated, infos = step_result(self._arrays, slice(0, self.num_envs))
        return obs.copy(), rewards.copy(), terminated.copy(), truncated.copy(), infos

    def send(self, group: int, actions: _Array) -> None:
        """Begin a step of one group.

        Raises:
            EnvError: `actions` are not one for each of its environments.
        """
        copy_actions(self._arrays["actions"][self.groups[group]], actions)
        self._order(_STEP, group)

    def wait(self, group: int) -> StepResult:
        """End it. The arrays are the shared ones: the group's next step overwrites them.

        Raises:
            EnvError: an environment failed, or a worker died.
        """
        self._finish(group)
        return step_result(self._arrays, self.groups[group])

    def env_states(self) -> list[Any]:
        """What each environment needs to go on elsewhere, JSON-able; empty where there is no way just now."""
        states: dict[int, Any] = {}
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                found = self._ask(w, _STATE, g)
                if found is None or self._workers[w].lost:
                    return []
                states.update(zip(range(part.start, part.stop), found, strict=False))
        return [states[i] for i in sorted(states)]

    def load_env_states(self, states: Sequence[Any]) -> _Array:
        """Bring each environment to where `env_states` found it; returns the observations.

        Raises:
            EnvError: what is no such state.
        """
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                if (trouble := self._ask(w, _LOAD, g, list(states[part]))) is not None:
                    raise EnvError(trouble)
        return self._arrays["obs"]

    def restart_messages(self) -> list[str]:
        """Lines about environments that were made anew since the last call."""
        asked = [self._ask(w, _COMPLAIN, 0) for w in range(self.n_workers)]
        found, self._complaints = self._complaints, []
        return [*found, *(line for lines in asked for line in lines or ())]

    @property
    def failures(self) -> int:
        """How many times an environment failed and was made anew, or a worker was lost and replaced."""
        return self._lost_workers + int(self._arrays["failures"].sum())

    @property
    def seeding(self) -> tuple[_Array, _Array]:
        """Seeds [N] that environments began with, and how many times each was made anew [N]; not copies."""
        return self._arrays["seeds"], self._arrays["restarts"]

    def close_extras(self, **_: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """End the workers."""
        self._finalizer()

    def _ask(self, w: int, what: int, group: int, given: Any = None) -> Any:  # noqa: ANN401 - JSON-able
        """Have a worker that has nothing to do answer through its pipe; None: it was lost, and replaced."""
        if not self._workers:
            raise EnvError("the pool is closed, or a worker failed before; make another.")
        worker = self._workers[w]
        try:
            worker.order(what, group)
            if what == _LOAD:
                worker.talk.send(given)
            while not worker.talk.poll(_POLL):
                if trouble := self._trouble(worker):
                    break
            else:
                answer = worker.talk.recv()
                if worker.failed.value:
                    self._fail(*answer)
                return answer
        except (EOFError, OSError):  # its end of the pipe is closed
            trouble = self._obituary(worker)
        self._replace(w, trouble)
        return None

    def _order(self, what: int, group: int) -> None:
        if not self._workers:
            raise EnvError("the pool is closed, or a worker failed before; make another.")
        for worker in self._workers:
            if group in worker.lost:
                self._start_anew(worker, group)
            else:
                worker.order(what, group)

    def _finish(self, group: int) -> None:
        for w in range(self.n_workers):
            while not self._workers[w].done[group].acquire(True, _POLL):
                if trouble := self._trouble(self._workers[w]):
                    self._replace(w, trouble)
            worker = self._workers[w]
            if worker.failed.value:
                self._report(worker)
            worker.under_way.discard(group)
            if group in worker.lost:
                part = worker.parts[group]
                last = worker.lost.pop(group)
                obs = self._arrays["obs"][part].copy()
                self._arrays["obs"][part] = last
                write_truncation(self._arrays, part)
                self._arrays["obs"][part] = obs

    def _trouble(self, worker: _Worker) -> str | None:
        """What is wrong with a worker that hasn't finished: it is dead, or too slow; None: nothing."""
        if worker.failed.value and worker.talk.poll():
            return None  # it has something to say
        if not worker.process.is_alive():
            return self._obituary(worker)
        slow = time.monotonic() - worker.since
        # environments are made and reset one after the other, the first after Python has started
        patience = (self.fault_policy.timeout or 0.0) * (self.num_envs // self.n_workers + 1 if worker.patiently else 1)
        patience += 0.0 if worker.ready else _START
        if self.fault_policy.timeout is None or slow < patience:
            return None
        return f"{worker.name} has not answered for {slow:.0f} s (--env-timeout). Where it is:\n{worker.stacks()}"

    def _obituary(self, worker: _Worker) -> str:
        worker.process.join(0.1)
        code = worker.process.exitcode
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        hint = " (the kernel kills what takes too much memory: see dmesg)" if code == -signal.SIGKILL else ""
        return f"{worker.name} {how}{hint}."

    def _replace(self, w: int, trouble: str) -> None:
        """Put a new worker in the place of one that is in trouble, or raise."""
        old, restarts = self._workers[w], self._arrays["restarts"]
        mine = [i for part in old.parts for i in range(part.start, part.stop)]
        if not old.ready or self.failures >= self.fault_policy.restarts:
            self._fail(trouble)
        self._lost_workers += 1
        old.end()
        self._complaints.append(f"{trouble} Started anew, the episodes of its environments cut.")
        restarts[mine] += 1
        new = self._workers[w] = self._start(w)
        for g in range(len(self.groups)):
            while not new.done[g].acquire(True, _POLL):
                if worse := self._trouble(new):
                    self._fail(worse)
            if new.failed.value:
                self._report(new)
            new.under_way.discard(g)
            new.lost[g] = old.lost.get(g, self._arrays["obs"][new.parts[g]].copy())
            if g in old.under_way:
                self._start_anew(new, g)

    def _start_anew(self, worker: _Worker, group: int) -> None:
        """Reset the environments of a new worker's share, in the place of a step."""
        part, seeds, restarts = worker.parts[group], self._arrays["seeds"], self._arrays["restarts"]
        for i in range(part.start, part.stop):
            seeds[i] = fresh_seed(int(seeds[i]), int(restarts[i]))
        worker.order(_RESET, group)

    def _report(self, worker: _Worker) -> NoReturn:
        """Raise what a worker says that went wrong in it."""
        line, remote = worker.report()
        self._fail(line, remote)

    def _fail(self, line: str, remote: str = "") -> NoReturn:
        self._finalizer()
        raise EnvError(line) from (RuntimeError(remote) if remote else None)


class _Worker:
    """The trainer's end of one worker process.

    Attributes:
        name: what to call it.
        parts: its share of each group.
        talk: for what is too long for shared memory.
        done: a semaphore for each group.
        since: when the last order was given.
        under_way: groups with an order that isn't done.
        lost: groups whose episodes ended with the worker before, and where they last stood.
        ready: whether its environments are made.
        patiently: whether its order takes a while for each of its environments.
    """

    def __init__(
        self,
        ctx: Any,  # noqa: ANN401 - one of multiprocessing's contexts
        shared: _Shared,
        parts: list[slice],
        env_fns: dict[int, Callable[[], gym.Env[Any, Any]]],
        fault_policy: FaultPolicy,
        spaces: tuple[gym.Space[Any], gym.Space[Any]],
    ) -> None:
        from cloudpickle import dumps

        self.parts, self.done = parts, [ctx.Semaphore(0) for _ in parts]
        self.lost: dict[int, _Array] = {}
        self.ready, self.patiently = False, True
        self._go = ctx.Semaphore(0)
        # orders in a ring: at most one for each group is open, and one to close
        self._ring = ctx.RawArray("i", 2 * (len(parts) + 2))
        self._at = 0
        self.failed = ctx.Value("b", 0, lock=False)
        self.talk, talk = ctx.Pipe()
        self._stacks, stacks = ctx.Pipe(duplex=False)
        lifeline, self._lifeline = ctx.Pipe(duplex=False)  # this end closes when the trainer is gone
        arguments = (shared, parts, dumps(env_fns), fault_policy, spaces, self._go, self._ring, self.done, self.failed)
        self.process = ctx.Process(target=_work, args=(*arguments, talk, stacks, lifeline), daemon=True)
        self.process.start()
        for theirs in (talk, stacks, lifeline):
            theirs.close()
        self.since, self.under_way = time.monotonic(), set(range(len(parts)))
        envs = ", ".join(f"{part.start}-{part.stop - 1}" for part in parts)
        self.name = f"the worker process of environments {envs} (pid {self.process.pid})"

    def order(self, what: int, group: int) -> None:
        """Queue an order and wake the worker."""
        slot = 2 * (self._at % (len(self._ring) // 2))
        self._ring[slot], self._ring[slot + 1] = what, group
        self._at += 1
        self.ready, self.patiently = True, what != _STEP
        self.since = time.monotonic()
        if what in (_STEP, _RESET):
            self.under_way.add(group)
        self._go.release()

    def report(self) -> tuple[str, str]:
        """What went wrong in it: a line, and its traceback."""
        with contextlib.suppress(EOFError, OSError):
            if self.talk.poll(_POLL):
                line, remote = self.talk.recv()
                return line, remote
        return "a worker process failed without saying why.", ""

    def stacks(self) -> str:
        """Where its threads are."""
        with contextlib.suppress(OSError, TypeError):
            os.kill(self.process.pid or 0, _STACKS)  # type: ignore[arg-type]
            if self._stacks.poll(_POLL):
                time.sleep(0.1)
                return os.read(self._stacks.fileno(), _MOST).decode(errors="replace")
        return "(it does not say; it may be stopped)"

    def end(self) -> None:
        """End the process, whatever it is doing."""
        self.process.kill()
        self.process.join()
        for connection in (self.talk, self._stacks, self._lifeline):
            connection.close()


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        with contextlib.suppress(ValueError, OSError):
            worker.order(_CLOSE, 0)
    deadline = time.monotonic() + 2.0  # for all of them together
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.end()
    workers.clear()


def prepare_fork_server() -> None:
    """Have the fork server, once it starts, import what workers need, and outlive signals to the whole group."""
    multiprocessing.set_forkserver_preload(["fastppo.envs.forkserver", "fastppo.envs.factory"])


def _share(n: int, parts: int, i: int) -> tuple[int, int]:
    return n * i // parts, n * (i + 1) // parts


def _part(group: slice, workers: int, w: int) -> slice:
    begin, end = _share(group.stop - group.start, workers, w)
    return slice(group.start + begin, group.start + end)


@contextlib.contextmanager
def _single_threaded() -> Iterator[None]:
    """Processes started within have one thread each in numpy's and torch's libraries."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _work(
    shared: _Shared,
    parts: list[slice],
    pickled: bytes,
    fault_policy: FaultPolicy,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
    go: Any,  # noqa: ANN401 - multiprocessing's semaphore
    ring: Any,  # noqa: ANN401 - multiprocessing's array
    done: list[Any],
    failed: Any,  # noqa: ANN401 - multiprocessing's value
    talk: Connection,
    stacks: Connection,
    lifeline: Connection,
) -> None:
    """A worker's life: make its environments, then follow orders until told to close or left alone."""
    # sent to whole process groups and job steps; the trainer decides when a worker ends
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if _STACKS is not None:
        faulthandler.register(_STACKS, file=stacks.fileno(), all_threads=True)
    _die_with(lifeline)
    trainer = multiprocessing.parent_process()  # not getppid: that is the fork server
    envs: dict[int, gym.Env[Any, Any]] = {}
    try:
        shares = _make_shares(pickled, envs, shared.arrays(), parts, fault_policy, spaces)
        for semaphore in done:
            semaphore.release()
        at = 0
        while True:
            while not go.acquire(True, 5.0):
                if trainer is not None and not trainer.is_alive():
                    return
            slot = 2 * (at % (len(ring) // 2))
            what, group, at = ring[slot], ring[slot + 1], at + 1
            if what == _CLOSE:
                return
            if what == _STEP:
                shares[group].step()
                done[group].release()
            elif what == _RESET:
                shares[group].reset()
                done[group].release()
            else:
                talk.send(_answer(what, shares, group, talk))
    except Exception as error:
        text, line = "".join(traceback.format_exception(error)), error_text(error)
        if not isinstance(error, EnvError):
            line = f"{type(error).__name__}: {line}"
        failed.value = 1
        talk.send((line[:_MOST], text[-_MOST:]))  # what the pipe holds though nobody reads yet
        for semaphore in done:  # nobody must wait for what will not come
            semaphore.release()
    finally:
        for env in envs.values():
            with contextlib.suppress(Exception):
                env.close()


def _make_shares(
    pickled: bytes,
    envs: dict[int, gym.Env[Any, Any]],
    arrays: dict[str, _Array],
    parts: list[slice],
    fault_policy: FaultPolicy,
    spaces: tuple[gym.Space[Any], gym.Space[Any]],
) -> list[EnvGroup]:
    """Make a worker's environments, into `envs`, and its share of each group."""
    import cloudpickle

    makers = cloudpickle.loads(pickled)
    for i, make in makers.items():
        try:
            envs[i] = make()
        except Exception as error:
            kind = type(error).__name__
            raise EnvError(f"environment {i} failed in its construction: {kind}: {error_text(error)}") from error
        check_spaces(i, envs[i], *spaces)
    ranges = [range(part.start, part.stop) for part in parts]
    return [
        EnvGroup([envs[i] for i in mine], [makers[i] for i in mine], arrays, part, fault_policy)
        for part, mine in zip(parts, ranges, strict=True)
    ]


def _answer(what: int, shares: list[EnvGroup], group: int, talk: Connection) -> Any:  # noqa: ANN401 - JSON-able
    """What a worker says to an order that is no step."""
    if what == _STATE:
        return shares[group].state()
    if what == _LOAD:
        try:
            shares[group].load(talk.recv())
        except EnvError as error:  # what was saved is at fault, not the environments
            return str(error)
        return None
    restart_messages = [line for share in shares for line in share.restart_messages]
    for share in shares:
        share.restart_messages.clear()
    return restart_messages


def _die_with(lifeline: Connection) -> None:
    """Have the kernel kill this process when the other end of `lifeline` closes: no loop in C can prevent that."""
    try:
        import fcntl

        fcntl.F_SETSIG  # noqa: B018 - looks whether it is there
    except (ImportError, AttributeError):
        return  # not Linux: the worker looks for its trainer between orders
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
