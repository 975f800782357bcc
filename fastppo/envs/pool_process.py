"""A worker process of PoolVectorEnv as the trainer sees it: orders, error reports and its end."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import time
from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np

from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.pool_worker import CLOSE, MAX_REPORT, RESET, STACKS_SIGNAL, STEP, Channels, SharedArrays, run_worker
from fastppo.runtime.main_script import importable_main

_Array = np.ndarray[Any, Any]
POLL_SECONDS = 0.5  # seconds between checks that the workers are alive


class WorkerProcess:
    """The trainer's end of one worker process.

    Attributes:
        name: for messages.
        parts: its share of each group.
        pipe: for states, messages and error reports.
        done: one semaphore per group.
        since: time of the last order.
        pending: groups with an unfinished order.
        lost: last observations of the groups whose episodes the previous worker lost.
        ready: whether its environments are made.
        slow_order: whether the time-out of its order applies per environment.
    """

    def __init__(
        self,
        ctx: Any,  # noqa: ANN401 - one of multiprocessing's contexts
        shared: SharedArrays,
        parts: list[slice],
        pickled: bytes,
        fault_policy: FaultPolicy,
        spaces: tuple[gym.Space[Any], gym.Space[Any]],
    ) -> None:
        """Start the process; arguments as of `run_worker`, `pickled` its setup."""
        self.parts, self.done = parts, [ctx.Semaphore(0) for _ in parts]
        self.lost: dict[int, _Array] = {}
        self.ready, self.slow_order = False, True
        self._go = ctx.Semaphore(0)
        # a ring buffer of orders: at most one per group is open, and one to close
        self._ring = ctx.RawArray("i", 2 * (len(parts) + 2))
        self._at = 0
        self.failed = ctx.Value("b", 0, lock=False)
        self.pipe, pipe = ctx.Pipe()
        self._stacks, stacks = ctx.Pipe(duplex=False)
        trainer_alive, self._trainer_alive = ctx.Pipe(duplex=False)  # this end closes when the trainer dies
        channels = Channels(self._go, self._ring, self.done, self.failed, pipe, stacks, trainer_alive=trainer_alive)
        arguments = (shared, parts, pickled, fault_policy, spaces, channels)
        self.process = ctx.Process(target=run_worker, args=arguments, daemon=True)
        with importable_main():
            self.process.start()
        for theirs in (pipe, stacks, trainer_alive):
            theirs.close()
        self.since, self.pending = time.monotonic(), set(range(len(parts)))
        envs = ", ".join(f"{part.start}-{part.stop - 1}" for part in parts)
        self.name = f"the worker process of environments {envs} (pid {self.process.pid})"

    def send_order(self, order: int, group: int) -> None:
        """Queue an order and wake the worker."""
        slot = 2 * (self._at % (len(self._ring) // 2))
        self._ring[slot], self._ring[slot + 1] = order, group
        self._at += 1
        self.ready, self.slow_order = True, order != STEP
        self.since = time.monotonic()
        if order in (STEP, RESET):
            self.pending.add(group)
        self._go.release()

    def report(self) -> tuple[str, str]:
        """Return the error in the worker as one line, and its traceback."""
        with contextlib.suppress(EOFError, OSError):
            if self.pipe.poll(POLL_SECONDS):
                line, remote = self.pipe.recv()
                return line, remote
        return "a worker process failed without an error report.", ""

    def stacks(self) -> str:
        """Return the stacks of its threads."""
        with contextlib.suppress(OSError, TypeError):
            os.kill(self.process.pid or 0, STACKS_SIGNAL)  # type: ignore[arg-type]
            if self._stacks.poll(POLL_SECONDS):
                time.sleep(0.1)
                return os.read(self._stacks.fileno(), MAX_REPORT).decode(errors="replace")
        return "(no answer; the process may be stopped)"

    def end(self) -> None:
        """Kill the process."""
        self.process.kill()
        self.process.join()
        for connection in (self.pipe, self._stacks, self._trainer_alive):
            connection.close()


def stop_workers(workers: list[WorkerProcess]) -> None:
    """Close the environments of `workers` and end their processes."""
    for worker in workers:
        with contextlib.suppress(ValueError, OSError):
            worker.send_order(CLOSE, 0)
    deadline = time.monotonic() + 2.0  # for all workers together
    for worker in workers:
        worker.process.join(max(0.0, deadline - time.monotonic()))
        worker.end()
    workers.clear()


def prepare_fork_server() -> None:
    """Set the modules that the fork server imports: workers start faster, and it survives signals to the group."""
    multiprocessing.set_forkserver_preload(["fastppo.envs.forkserver", "fastppo.envs.factory"])


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Limit processes started within to one thread in numpy's and torch's libraries."""
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
