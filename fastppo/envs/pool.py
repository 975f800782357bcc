"""A pool of worker processes, each with several environments, as a Gymnasium vector environment.

Observations, actions and results are in shared memory; a step costs each worker one semaphore in each direction and no
pickling. The environments may be stepped in two groups, so that the trainer acts on one half while the workers step the
other. Nobody polls in a busy loop: idle processes sleep on a semaphore.

Rollouts are bit-identical to Gymnasium's SyncVectorEnv for any number of workers (same-step autoreset). Infos other
than `final_obs` stay in the workers; `log_info` has them sum chosen numbers, which are read once per iteration.

The trainer monitors its workers. It kills one that dies or exceeds the time-out and raises an error, or replaces it and
truncates the episodes of its environments. A late answer of the old worker is lost: the new one has its own semaphores.
When the trainer dies, by whatever signal, the kernel kills the workers, even one stuck in a C loop.
"""

from __future__ import annotations

import dataclasses
import signal
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import get_context
from typing import Any, NoReturn

import cloudpickle
import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from fastppo.envs.env_calls import check_callable, one_each
from fastppo.envs.env_group import fresh_seed
from fastppo.envs.factory import WorkerSetup, check_maker, close_env
from fastppo.envs.fault_policy import NO_FAULT_POLICY, FaultPolicy
from fastppo.envs.info_sums import InfoTotals, join_totals
from fastppo.envs.pool_process import POLL_SECONDS, WorkerProcess, prepare_fork_server, single_threaded, stop_workers
from fastppo.envs.pool_worker import (
    CALL,
    GET_MESSAGES,
    GET_STATE,
    LOG_INFO,
    READ_INFO,
    RESET,
    SET_ATTR,
    SET_MOMENTS,
    SET_STATE,
    STEP,
    WITH_DATA,
    SharedArrays,
)
from fastppo.envs.step_arrays import StepResult, copy_actions, seeds, step_result, write_truncation
from fastppo.errors import ENV_ERRORS, ConfigError, EnvError, EnvStartError, cause_line
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.main_script import REIMPORTED, REIMPORTED_TEXT, exit_if_reimported

_Array = np.ndarray[Any, Any]
_START_SECONDS = 60.0  # seconds for a process to start and import


class PoolVectorEnv(VectorEnv[_Array, _Array, _Array]):
    """Environments in worker processes, several per process.

    `step` and `reset` are Gymnasium's. `send(group, actions)` and `wait(group)` step one group; steps of several groups
    may overlap.

    Attributes:
        groups: slices of 0..num_envs-1.
        n_workers: processes.
        fault_policy: handling of failed environments and workers.
    """

    def __init__(
        self,
        env_fns: Sequence[Callable[[], gym.Env[Any, Any]]],
        *,
        n_workers: int | None = None,
        n_groups: int = 1,
        start_method: str = "forkserver",
        fault_policy: FaultPolicy = NO_FAULT_POLICY,
        seed: int = 0,
    ) -> None:
        """Start the workers and make the environments in them.

        Args:
            env_fns: one maker per environment, pickled with cloudpickle, so that closures work.
            n_workers: processes; None: one per core that this process may use, at most one per environment.
            n_groups: groups of environments that are stepped separately; each worker has a share of each.
            start_method: of multiprocessing; fork is unsafe in a trainer with threads.
            fault_policy: handling of failed environments and workers.
            seed: of the global random streams of the workers.

        Raises:
            ConfigError: fewer environments than groups, no workers, or a maker that is no function.
            EnvError: an environment can't be made, or its spaces aren't arrays.
        """
        exit_if_reimported()
        n = len(env_fns)
        if not 1 <= n_groups <= n:
            raise ConfigError(f"n_groups={n_groups} with {n} environments; give each group at least one.")
        if n_workers is not None and n_workers < 1:
            raise ConfigError(f"n_workers={n_workers} must be at least 1; None is one per core.")
        for i, make in enumerate(env_fns):
            check_maker(f"env_fns[{i}]", make)
        self.n_workers = count_workers(n, n_workers, n_groups)
        probe = env_fns[0]()
        self.single_observation_space, self.single_action_space = probe.observation_space, probe.action_space
        self.metadata = {**probe.metadata, "autoreset_mode": AutoresetMode.SAME_STEP}
        self.spec = probe.spec
        close_env(probe)
        self.num_envs, self.fault_policy = n, fault_policy
        self.observation_space = batch_space(self.single_observation_space, n)
        self.action_space = batch_space(self.single_action_space, n)
        self.groups = [slice(*_share(n, n_groups, g)) for g in range(n_groups)]
        self.closed = False
        self._env_fns, self._seed, self._base_setup = env_fns, seed, WorkerSetup.collect()
        if start_method == "forkserver":
            prepare_fork_server()
        self._ctx: Any = get_context(start_method)
        self._shared = SharedArrays(self._ctx, n, self.single_observation_space, self.single_action_space)
        self._arrays = self._shared.arrays()
        self._messages: list[str] = []
        self._info_patterns: Sequence[str] = ()
        self._workers: list[WorkerProcess] = []
        self._finalizer = weakref.finalize(self, stop_workers, self._workers)
        for w in range(self.n_workers):
            self._workers.append(self._start(w))
        for g in range(n_groups):
            self._finish(g)

    def _start(self, w: int) -> WorkerProcess:
        parts = [_part(group, self.n_workers, w) for group in self.groups]
        makers = {i: self._env_fns[i] for part in parts for i in range(part.start, part.stop)}
        with single_threaded():
            spaces = self.single_observation_space, self.single_action_space
            pickled = cloudpickle.dumps((self._setup(min(makers)), makers, self._info_patterns))
            return WorkerProcess(self._ctx, self._shared, parts, pickled, self.fault_policy, spaces)

    def _setup(self, first: int) -> WorkerSetup:
        """Return the setup of the worker whose first environment is `first`; each start has another random stream."""
        key = (self._seed, first, int(self._arrays["restarts"][first]))
        return dataclasses.replace(self._base_setup, seed=int(np.random.SeedSequence(key).generate_state(1)[0]))

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[_Array, dict[str, Any]]:
        """Reset every environment; one seed s means s, s + 1, ... as in Gymnasium.

        Raises:
            EnvError: an environment failed.
        """
        self._arrays["seeds"][:] = seeds(seed, self.num_envs, options)
        for g in range(len(self.groups)):
            self._send_orders(RESET, g)
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
            self._send_orders(STEP, g)
        for g in range(len(self.groups)):
            self._finish(g)
        obs, rewards, terminated, truncated, infos = step_result(self._arrays, slice(0, self.num_envs))
        return obs.copy(), rewards.copy(), terminated.copy(), truncated.copy(), infos

    def send(self, group: int, actions: _Array) -> None:
        """Start a step of one group.

        Raises:
            EnvError: `actions` are not one for each of its environments.
        """
        copy_actions(self._arrays["actions"][self.groups[group]], actions)
        self._send_orders(STEP, group)

    def wait(self, group: int) -> StepResult:
        """Wait for the group's step; return views of shared memory, which its next step overwrites.

        Raises:
            EnvError: an environment failed, a worker died, or no step was sent.
        """
        self._check_running()
        if group not in self._workers[0].pending:
            raise EnvError(f"wait({group}): group {group} has no step under way; call send({group}, actions) first.")
        self._finish(group)
        return step_result(self._arrays, self.groups[group])

    def env_states(self) -> list[Any]:
        """Return each environment's state as JSON-able values; empty if it can't be saved now.

        Raises:
            EnvError: the pool is closed.
        """
        self._check_running()
        states: dict[int, Any] = {}
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                found = self._ask(w, GET_STATE, g)
                if found is None or self._workers[w].lost:
                    return []
                states.update(zip(range(part.start, part.stop), found, strict=False))
        return [states[i] for i in sorted(states)]

    def load_env_states(self, states: Sequence[Any]) -> _Array:
        """Restore each environment from `env_states()`; return the observations.

        Raises:
            EnvError: not such a state.
        """
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                self._order(w, SET_STATE, g, list(states[part]))
        return self._arrays["obs"]

    def load_moments(self, moments: Sequence[Any]) -> None:
        """Restore each environment's running moments; call before a reset.

        Raises:
            EnvError: they are of another environment.
        """
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                self._order(w, SET_MOMENTS, g, list(moments[part]))

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        """Return the results of a method of each environment or wrapper, or the values of an attribute.

        Call it between steps. Arguments and results travel by cloudpickle.

        Raises:
            EnvError: there is no such attribute, the method fails, or a step is under way.
        """
        check_callable("call", name)
        results: dict[int, Any] = {}
        for w, g, part in self._idle_parts(f"call({name!r})"):
            answer = self._order(w, CALL, g, (name, args, kwargs))
            try:
                found = cloudpickle.loads(answer)
            except ENV_ERRORS as error:
                text = f"the results of call({name!r}) can't be unpickled: {cause_line(error)}."
                raise EnvError(text) from error
            results.update(zip(range(part.start, part.stop), found, strict=True))
        return tuple(results[i] for i in sorted(results))

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401 - any values
        """Set an attribute to one value for all environments, or to a list or tuple of one for each.

        Raises:
            EnvError: it can't be set, or a step is under way.
        """
        check_callable("set_attr", name)
        each = one_each(values, self.num_envs)
        for w, g, part in self._idle_parts(f"set_attr({name!r})"):
            self._order(w, SET_ATTR, g, (name, each[part]))

    def log_info(self, patterns: Sequence[str]) -> None:
        """See `VecEnv.log_info`.

        Raises:
            EnvError: a step is under way.
        """
        for w, g, _ in self._idle_parts("log_info"):
            self._order(w, LOG_INFO, g, tuple(patterns))
        self._info_patterns = tuple(patterns)  # for workers that replace lost ones

    def read_info(self) -> InfoTotals:
        """See `VecEnv.read_info`; what a lost worker has summed is lost."""
        parts = {(g, w): self._ask(w, READ_INFO, g) for w, g, _ in self._idle_parts("read_info")}
        return join_totals([parts[key] for key in sorted(parts) if parts[key] is not None])

    def _idle_parts(self, doing: str) -> Iterator[tuple[int, int, slice]]:
        """Yield worker, group and environments of each share.

        Raises:
            EnvError: a step is under way, whose answer would be taken for another.
        """
        self._check_running()
        if any(worker.pending for worker in self._workers):
            raise EnvError(f"{doing}: a step of the environments is under way; do it between iterations.")
        for w in range(self.n_workers):
            for g, part in enumerate(self._workers[w].parts):
                yield w, g, part

    def _check_running(self) -> None:
        if not self._workers:
            raise EnvError("the pool is closed, or a worker failed before; make another.")

    def restart_messages(self) -> list[str]:
        """Return one line per restarted environment and replaced worker since the last call."""
        asked = [self._ask(w, GET_MESSAGES, 0) for w in range(self.n_workers)]
        found, self._messages = self._messages, []
        return [*found, *(line for lines in asked for line in lines or ())]

    @property
    def failures(self) -> int:
        """Environment restarts and replaced workers so far."""
        return int(self._arrays["failures"].sum())

    @property
    def seeding(self) -> tuple[_Array, _Array]:
        """Initial seeds [N] and restarts [N] of each environment, as views."""
        return self._arrays["seeds"], self._arrays["restarts"]

    def close_extras(self, **_: Any) -> None:  # noqa: ANN401 - Gymnasium's signature
        """End the workers."""
        self._finalizer()

    def _ask(self, w: int, order: int, group: int, given: Any = None) -> Any:  # noqa: ANN401 - JSON-able
        """Return an idle worker's answer through its pipe; None if it was lost and replaced."""
        self._check_running()
        worker = self._workers[w]
        try:
            # before the order, after which the worker waits for it
            pickled = cloudpickle.dumps(given) if order in WITH_DATA else None
        except ENV_ERRORS as error:
            raise EnvError(f"the arguments can't be pickled for a worker process: {cause_line(error)}.") from error
        try:
            worker.send_order(order, group)
            if pickled is not None:
                worker.pipe.send_bytes(pickled)
            while not worker.pipe.poll(POLL_SECONDS):
                if problem := self._problem(worker):
                    break
            else:
                answer = worker.pipe.recv()
                if worker.failed.value:
                    self._fail(*answer)
                return answer
        except (EOFError, OSError):  # the worker closed its end of the pipe
            problem = self._describe_death(worker)
        self._replace(w, problem)
        return None

    def _order(self, w: int, order: int, group: int, given: Any) -> Any:  # noqa: ANN401 - JSON-able or bytes
        """Give an order with data to an idle worker and return its answer.

        Raises:
            EnvError: the order can't be carried out, or the worker was lost; a new one has other episodes.
        """
        result, problem = self._ask(w, order, group, given) or (None, ("a worker process died and was replaced.", ""))
        if problem is not None:
            line, remote = problem
            raise EnvError(line) from (RuntimeError(remote) if remote else None)
        return result

    def _send_orders(self, order: int, group: int) -> None:
        self._check_running()
        for worker in self._workers:
            if group in worker.lost:
                self._restart_envs(worker, group)
            else:
                worker.send_order(order, group)

    def _finish(self, group: int) -> None:
        for w in range(self.n_workers):
            while not self._workers[w].done[group].acquire(True, POLL_SECONDS):
                if problem := self._problem(self._workers[w]):
                    self._replace(w, problem)
            worker = self._workers[w]
            if worker.failed.value:
                self._report(worker)
            worker.pending.discard(group)
            if group in worker.lost:
                part = worker.parts[group]
                last = worker.lost.pop(group)
                obs = self._arrays["obs"][part].copy()
                self._arrays["obs"][part] = last
                write_truncation(self._arrays, part)
                self._arrays["obs"][part] = obs

    def _problem(self, worker: WorkerProcess) -> str | None:
        """Return why an unfinished worker is lost (dead, or over its time-out); None if it isn't."""
        if worker.failed.value and worker.pipe.poll():
            return None  # its error report is waiting in the pipe
        if not worker.process.is_alive():
            return self._describe_death(worker)
        slow = time.monotonic() - worker.since
        # a worker makes and resets its environments in sequence, the first after Python has started
        patience = (self.fault_policy.timeout or 0.0) * (
            self.num_envs // self.n_workers + 1 if worker.slow_order else 1
        )
        patience += 0.0 if worker.ready else _START_SECONDS
        if self.fault_policy.timeout is None or slow < patience:
            return None
        return f"{worker.name} has not answered for {slow:.0f} s (--env-timeout). Its stacks:\n{worker.stacks()}"

    def _describe_death(self, worker: WorkerProcess) -> str:
        worker.process.join(0.1)
        code = worker.process.exitcode
        if code == REIMPORTED:
            return REIMPORTED_TEXT
        how = f"was killed by {signal.Signals(-code).name}" if code and code < 0 else f"exited with {code}"
        hint = " (the kernel does so when memory runs out: see dmesg)" if code == -signal.SIGKILL else ""
        return f"{worker.name} {how}{hint}."

    def _replace(self, w: int, problem: str) -> None:
        """Replace a lost worker, or raise EnvError if the restart budget is used up."""
        old, restarts = self._workers[w], self._arrays["restarts"]
        mine = [i for part in old.parts for i in range(part.start, part.stop)]
        if not old.ready or self.failures >= self.fault_policy.restarts:
            self._fail(problem)
        self._arrays["failures"][mine[0]] += 1
        old.end()
        self._messages.append(f"{problem} Replaced by a new worker; the episodes of its environments are truncated.")
        restarts[mine] += 1
        new = self._workers[w] = self._start(w)
        for g in range(len(self.groups)):
            while not new.done[g].acquire(True, POLL_SECONDS):
                if worse := self._problem(new):
                    self._fail(worse)
            if new.failed.value:
                self._report(new)
            new.pending.discard(g)
            new.lost[g] = old.lost.get(g, self._arrays["obs"][new.parts[g]].copy())
            if g in old.pending:
                self._restart_envs(new, g)

    def _restart_envs(self, worker: WorkerProcess, group: int) -> None:
        """Reset a new worker's environments instead of stepping them."""
        part, seeds, restarts = worker.parts[group], self._arrays["seeds"], self._arrays["restarts"]
        for i in range(part.start, part.stop):
            seeds[i] = fresh_seed(int(seeds[i]), int(restarts[i]))
        worker.send_order(RESET, group)

    def _report(self, worker: WorkerProcess) -> NoReturn:
        """Raise the error that a worker reports."""
        line, remote = worker.report()
        self._fail(line, remote, EnvError if worker.ready else EnvStartError)

    def _fail(self, line: str, remote: str = "", kind: type[EnvError] = EnvError) -> NoReturn:
        self._finalizer()
        raise kind(line) from (RuntimeError(remote) if remote else None)


def count_workers(n_envs: int, n_workers: int | None, n_groups: int) -> int:
    """Return the processes of a pool: `n_workers`, or one per core, and at most one for each environment of a group."""
    return max(1, min(n_workers or usable_cores(), n_envs // n_groups))


def _share(n: int, parts: int, i: int) -> tuple[int, int]:
    return n * i // parts, n * (i + 1) // parts


def _part(group: slice, workers: int, w: int) -> slice:
    begin, end = _share(group.stop - group.start, workers, w)
    return slice(group.start + begin, group.start + end)
