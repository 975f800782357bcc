"""A pool of worker processes, each with several environments, as a Gymnasium vector environment.

Observations, actions and results lie in shared memory; a step costs each worker one semaphore each way and no pickling.
The environments may be stepped in two groups, so that the trainer acts on one half while the workers step the other.
Nobody spins: who has nothing to do sleeps on a semaphore.

Rollouts equal those of Gymnasium's SyncVectorEnv bit for bit, for any number of workers (same-step autoreset). Infos
other than `final_obs` stay in the workers.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.envs.serial import Outcome, Share, layout, outcome, seeds
from fastppo.errors import ConfigError, EnvError

_Array = np.ndarray[Any, Any]
_STEP, _RESET, _CLOSE = range(3)
_MOST = 8000  # characters of a report
_POLL = 1.0  # seconds between looks at whether the workers live


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
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        *,
        n_workers: int | None = None,
        n_groups: int = 1,
        start_method: str = "forkserver",
    ) -> None:
        """Start the workers and make the environments in them.

        Args:
            env_fns: one maker for each environment; they are pickled (cloudpickle: closures are fine).
            n_workers: processes; None: one for each core this process may run on, at most one for each environment.
            n_groups: groups of environments that are stepped apart; each worker has a share of each.
            start_method: of multiprocessing. Plain fork and a trainer's threads don't go together.

        Raises:
            ConfigError: fewer environments than groups.
            EnvError: an environment can't be made, or its spaces aren't arrays.
        """
        n = len(env_fns)
        if not 1 <= n_groups <= n:
            raise ConfigError(f"n_groups={n_groups} with {n} environments; give each group at least one.")
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        self.n_workers = max(1, min(n_workers or cores, n // n_groups))
        probe = env_fns[0]()
        self.single_observation_space, self.single_action_space = probe.observation_space, probe.action_space
        self.metadata = {**probe.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.spec = probe.spec
        probe.close()
        self.num_envs = n
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.groups = [slice(*_share(n, n_groups, g)) for g in range(n_groups)]
        self.closed = self._broken = False
        ctx: Any = get_context(start_method)
        shared = _Shared(ctx, n, self.single_observation_space, self.single_action_space)
        self._arrays = shared.arrays()
        # one order at a time for each group and worker; the worker says that it is done group by group
        self._done = [ctx.Semaphore(0) for _ in self.groups]
        self._workers: list[_Worker] = []
        self._finalizer = weakref.finalize(self, _stop, self._workers)
        with _single_threaded():
            for w in range(self.n_workers):
                parts = [_part(group, self.n_workers, w) for group in self.groups]
                fns = {i: env_fns[i] for part in parts for i in range(part.start, part.stop)}
                self._workers.append(_Worker(ctx, shared, parts, fns, self._done))
        for g in range(n_groups):
            self._finish(g)

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

    def step(self, actions: _Array) -> Outcome:
        """Step every environment.

        Raises:
            EnvError: an environment failed, or a worker died.
        """
        for g, at in enumerate(self.groups):
            self.send(g, actions[at])
        for g in range(len(self.groups)):
            self._finish(g)
        obs, rewards, terminated, truncated, infos = outcome(self._arrays, slice(0, self.num_envs))
        return obs.copy(), rewards.copy(), terminated.copy(), truncated.copy(), infos

    def send(self, group: int, actions: _Array) -> None:
        """Begin a step of one group."""
        self._arrays["actions"][self.groups[group]] = actions
        self._order(_STEP, group)

    def wait(self, group: int) -> Outcome:
        """End it. The arrays are the shared ones: the group's next step overwrites them.

        Raises:
            EnvError: an environment failed, or a worker died.
        """
        self._finish(group)
        return outcome(self._arrays, self.groups[group])

    def close_extras(self, **_: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """End the workers."""
        self._finalizer()

    def _order(self, what: int, group: int) -> None:
        if not self._workers:
            raise EnvError("the pool is closed, or a worker failed before; make another.")
        for worker in self._workers:
            worker.order(what, group)

    def _finish(self, group: int) -> None:
        for _ in self._workers:
            while not self._done[group].acquire(True, _POLL):
                self._look_for_the_dead()
        for worker in self._workers:
            if worker.failed.value:
                self._broken = True
                self._finalizer()
                line, remote = worker.report()
                raise EnvError(line) from RuntimeError(remote)

    def _look_for_the_dead(self) -> None:
        for w, worker in enumerate(self._workers):
            if not worker.process.is_alive() and not worker.failed.value:
                envs = ", ".join(f"{part.start}-{part.stop - 1}" for part in worker.parts)
                self._broken = True
                code = worker.process.exitcode
                self._finalizer()
                how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
                raise EnvError(f"worker process {w} (environments {envs}) {how}.")


class _Worker:
    """The trainer's end of one worker process."""

    def __init__(
        self,
        ctx: Any,  # noqa: ANN401 - one of multiprocessing's contexts
        shared: _Shared,
        parts: list[slice],
        env_fns: dict[int, Callable[[], gym.Env[Any, Any]]],
        done: list[Any],
    ) -> None:
        from cloudpickle import dumps

        self.parts = parts
        self._go = ctx.Semaphore(0)
        # orders in a ring: at most one for each group is open, and one to close
        self._ring = ctx.RawArray("i", 2 * (len(parts) + 2))
        self._at = 0
        self.failed = ctx.Value("b", 0, lock=False)
        self._reports, theirs = ctx.Pipe(duplex=False)
        arguments = (shared, parts, dumps(env_fns), self._go, self._ring, done, self.failed, theirs)
        self.process = ctx.Process(target=_work, args=arguments, daemon=True)
        self.process.start()
        theirs.close()

    def order(self, what: int, group: int) -> None:
        """Queue an order and wake the worker."""
        slot = 2 * (self._at % (len(self._ring) // 2))
        self._ring[slot], self._ring[slot + 1] = what, group
        self._at += 1
        self._go.release()

    def report(self) -> tuple[str, str]:
        """What went wrong in it: a line, and its traceback."""
        with contextlib.suppress(EOFError, OSError):
            if self._reports.poll(_POLL):
                line, remote = self._reports.recv()
                return line, remote
        return "a worker process failed without saying why.", ""


def _stop(workers: list[_Worker]) -> None:
    for worker in workers:
        with contextlib.suppress(ValueError, OSError):
            worker.order(_CLOSE, 0)
    for worker in workers:
        worker.process.join(1.0)
        if worker.process.is_alive():
            worker.process.kill()
            worker.process.join()
    workers.clear()


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
    go: Any,  # noqa: ANN401 - multiprocessing's semaphore
    ring: Any,  # noqa: ANN401 - multiprocessing's array
    done: list[Any],
    failed: Any,  # noqa: ANN401 - multiprocessing's value
    reports: Connection,
) -> None:
    """A worker's life: make its environments, then follow orders until told to close or left alone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the trainer decides
    trainer = multiprocessing.parent_process()  # not getppid: that is the fork server
    a = shared.arrays()
    envs: dict[int, gym.Env[Any, Any]] = {}
    making, share, doing = -1, None, "its construction"
    try:
        import cloudpickle

        for making, make in cloudpickle.loads(pickled).items():
            envs[making] = make()
        shares = [Share([envs[i] for i in range(part.start, part.stop)], a, part) for part in parts]
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
            share, doing = shares[group], "reset" if what == _RESET else "step"
            share.reset() if what == _RESET else share.step()
            done[group].release()
    except Exception as error:
        failed.value = 1
        which = making if share is None else parts[group].start + share.at
        text = "".join(traceback.format_exception(error))
        line = f"environment {which} failed in {doing}: {type(error).__name__}: {error}"
        reports.send((line[:_MOST], text[-_MOST:]))  # what the pipe holds though nobody reads yet
        for semaphore in done:  # nobody must wait for what will not come
            semaphore.release()
    finally:
        for env in envs.values():
            with contextlib.suppress(Exception):
                env.close()
