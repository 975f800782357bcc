"""VecEnvs around the vector environments that offer more than Gymnasium's interface: time-outs, restarts, groups."""

from __future__ import annotations

import contextlib
import multiprocessing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import wait
from typing import Any

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from torch import Tensor

from fastppo.envs.env_calls import check_callable
from fastppo.envs.env_state import ResumeSupport, moments_in
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.info_sums import InfoTotals
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.sync import SerialVectorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.errors import ENV_ERRORS, EnvError, EnvStartError, FastPPOError, first_line
from fastppo.runtime.main_script import REIMPORTED, REIMPORTED_TEXT

_Array = np.ndarray[Any, Any]


def describe_dead(processes: Sequence[Any]) -> str:
    """Return which of AsyncVectorEnv's workers died, after one of their pipes has closed."""
    wait([p.sentinel for p in processes], timeout=1.0)  # a pipe closes shortly before its process exits
    if any(p.exitcode == REIMPORTED for p in processes):
        raise EnvStartError(REIMPORTED_TEXT)
    dead = [f"{i} (exit code {p.exitcode})" for i, p in enumerate(processes) if not p.is_alive()]
    return f"the worker process of environment {', '.join(dead) or '?'} died"


class AsyncVecEnv(GymnasiumVecEnv):
    """Gymnasium's AsyncVectorEnv, with a time-out per step and errors that name dead workers."""

    def __init__(
        self,
        venv: VectorEnv[Any, Any, Any],
        *,
        timeout: float | None = None,
        resume_support: ResumeSupport = VecEnv.resume_support,
    ) -> None:
        """Wrap `venv`; a step may take `timeout` seconds (None: no limit)."""
        super().__init__(venv, resume_support=resume_support)
        self._timeout, self._broken = timeout, False

    @contextlib.contextmanager
    def _failing_in(self, doing: str) -> Iterator[None]:
        """Raise errors of `call` and `set_attr` as EnvError that names the environment, whose worker then has ended."""
        with warnings.catch_warnings(record=True) as reports:  # in which Gymnasium prints the worker's traceback
            warnings.simplefilter("always")
            try:
                yield
                return
            except multiprocessing.TimeoutError:
                self._broken = True
                raise EnvError(f"{doing} has not answered for {self._timeout:.0f} s (--env-timeout).") from None
            except (EOFError, ConnectionError):
                self._broken = True
                raise EnvError(f"{describe_dead(self._processes)} in {doing}.") from None
            except ENV_ERRORS as error:
                failure = self._failure(doing, error)
        cause = RuntimeError("\n".join(str(report.message) for report in reports)) if reports else None
        raise failure from cause

    def _failure(self, doing: str, error: BaseException) -> EnvError:
        """Return `error` of a worker process, which has ended, as an EnvError that names its environment."""
        pipes = getattr(self.venv.unwrapped, "parent_pipes", [])
        failed = ", ".join(str(i) for i, pipe in enumerate(pipes) if pipe is None)
        self._broken = self._broken or bool(failed)
        which = f"environment {failed}" if failed else "AsyncVectorEnv"
        return EnvError(f"{which} failed in {doing}: {type(error).__name__}: {first_line(error)}.")

    def call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        """See `VecEnv.call`. A method that raises ends its worker process, and with it the run.

        Raises:
            EnvError: there is no such method, it fails, or a worker process died.
        """
        check_callable("call", name)
        self._check_attribute(name)
        self.changed = True
        return self._call(name, *args, **kwargs)

    def set_attr(self, name: str, values: Any) -> None:  # noqa: ANN401 - any values
        """See `VecEnv.set_attr`.

        Raises:
            EnvError: there is no such attribute, it can't be set, or a worker process died.
        """
        check_callable("set_attr", name)
        self._check_attribute(name)
        super().set_attr(name, values)

    def _call(self, name: str, /, *args: Any, **kwargs: Any) -> tuple[Any, ...]:  # noqa: ANN401 - the method's own
        self._check_running()
        with self._failing_in(f"call({name!r})"):
            self.venv.call_async(name, *args, **kwargs)  # type: ignore[attr-defined]
            results: tuple[Any, ...] = self.venv.call_wait(self._timeout)  # type: ignore[attr-defined]
            return results

    def _check_attribute(self, name: str) -> None:
        """Refuse a name that an environment lacks, which would end Gymnasium's worker processes."""
        for i, found in enumerate(self._call("has_wrapper_attr", name)):
            if not found:
                raise EnvError(f"environment {i} has no method or attribute {name!r}; its wrappers have none either.")

    def _check_running(self) -> None:
        if self._broken:
            raise EnvError("a worker process of AsyncVectorEnv failed before; start the run again.")

    def close(self) -> None:
        """Close the vector environment; kill its workers if one no longer answers."""
        if not self._broken:
            super().close()
            return
        # Gymnasium's close waits for the missing answer, even with terminate=True
        for process in self._processes:
            process.kill()
            process.join()
        self.venv.unwrapped.closed = True

    @property
    def _processes(self) -> Sequence[Any]:
        return getattr(self.venv.unwrapped, "processes", [])

    def _begin_step(self, group: int, actions: _Array) -> None:
        self._check_running()
        try:
            if self._timeout is None:
                self._results[group] = self.venv.step(actions)
            else:
                self.venv.step_async(actions)  # type: ignore[attr-defined]
                self._results[group] = self.venv.step_wait(self._timeout)  # type: ignore[attr-defined]
        except multiprocessing.TimeoutError:
            self._broken = True
            raise EnvError(
                f"the environments have not answered for {self._timeout:.0f} s (--env-timeout); "
                "vectorization=pool reports which one hangs, and where."
            ) from None
        except (EOFError, ConnectionError):  # the only trace of a dead worker
            self._broken = True
            raise EnvError(f"{describe_dead(self._processes)} in step {self._steps + 1}.") from None
        except FastPPOError:  # of the worker, which names environment and step
            raise
        except ENV_ERRORS as error:
            raise self._failure(f"step {self._steps + 1}", error) from error


class SerialVecEnv(GymnasiumVecEnv):
    """SerialVectorEnv: state per environment, and restarts of failed environments."""

    venv: SerialVectorEnv | PoolVectorEnv

    def state_dict(self) -> dict[str, Any]:
        """Return each environment's state and seeds, and which episodes ended in the last step."""
        states = self.venv.env_states()
        if self.resume_support.way == "restart":
            return {"moments": states} if any(states) else {}
        if len(states) < self.n_envs:
            return {}
        seeds, restarts = (torch.from_numpy(x) for x in self.venv.seeding)
        return {"envs": states, "seeds": seeds, "restarts": restarts, "ended": torch.from_numpy(self._ended)}

    def load_state_dict(self, saved: Mapping[str, Any], obs: Tensor) -> None:
        """Restore in place from `state_dict()`, saved when the observations were `obs` [N, *obs].

        Raises:
            EnvError: `saved` is not such a state, or replayed episodes lead to other observations.
        """
        self._ended[:] = saved["ended"].numpy()
        for current, value in zip(self.venv.seeding, (saved["seeds"], saved["restarts"]), strict=True):
            current[:] = value.numpy()
        restored = self.venv.load_env_states(saved["envs"])
        if self.resume_support.way == "replay":
            if not torch.equal(torch.from_numpy(restored).to(obs.dtype), obs.cpu()):
                raise EnvError("replaying the open episodes led to other observations.")
        else:
            restored[:] = obs.cpu().numpy()  # the final observation of an environment that fails in its first step

    def load_moments(self, saved: Mapping[str, Any]) -> None:
        """Restore the running moments of wrappers from any `state_dict()`; call before a reset."""
        if states := saved.get("envs", saved.get("moments")):
            self.venv.load_moments([moments_in(states[i % len(states)]) for i in range(self.n_envs)])

    def log_info(self, patterns: Sequence[str]) -> None:
        """Have the environments sum their infos where they are stepped."""
        self.venv.log_info(patterns)

    def read_info(self) -> InfoTotals:
        """Return the sums since the last call."""
        return self.venv.read_info()

    def restart_messages(self) -> Sequence[str]:
        """Return one line per failed and restarted environment or worker since the last call."""
        return self.venv.restart_messages() if self.venv.fault_policy.restarts else ()

    @property
    def restarts(self) -> int:
        """Failed environments and lost workers that were replaced so far."""
        return self.venv.failures


class PoolVecEnv(SerialVecEnv):
    """PoolVectorEnv: as SerialVecEnv, and stepped in groups."""

    venv: PoolVectorEnv

    def _begin_step(self, group: int, actions: _Array) -> None:
        self.venv.send(group, actions)

    def wait(self, group: int) -> None:
        """Wait for the group's step."""
        self._results[group] = self.venv.wait(group)


def adapt(venv: VectorEnv[Any, Any, Any]) -> VecEnv:
    """Wrap a vector environment that the user made, by its type."""
    if isinstance(venv, PoolVectorEnv):
        return PoolVecEnv(venv)
    if isinstance(venv, SerialVectorEnv):
        return SerialVecEnv(venv)
    if isinstance(venv.unwrapped, AsyncVectorEnv):
        return AsyncVecEnv(venv)
    takes_a_list = isinstance(venv.unwrapped, (SyncVectorEnv, SerialVectorEnv, PoolVectorEnv))
    return GymnasiumVecEnv(venv, seeding="list" if takes_a_list else "unknown")
