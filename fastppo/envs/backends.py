"""The vectorisation backends: one record per way of stepping N environments.

Everything that differs between backends is a field of its record. A new backend is a module with its maker and a row
of `BACKENDS` (and its name in `Vectorization`).
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.env_info import EnvInfo
from fastppo.envs.env_state import ResumeSupport
from fastppo.envs.envpool_vector import make_envpool
from fastppo.envs.factory import EnvFactory, InWorker, WorkerSetup, close_env, reuses_observations, shared_env_text
from fastppo.envs.fault_policy import NO_FAULT_POLICY, FaultPolicy
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.native import has_native, make_native
from fastppo.envs.pack_observation import PackVectorObservation
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.pool_process import prepare_fork_server
from fastppo.envs.resume_probe import probe_resume_support, probe_seeding, probe_vector_resume_support
from fastppo.envs.sync import SerialVectorEnv
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.envs.tensor.tasks import make_tensor_env
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.envs.vector_adapters import AsyncVecEnv, PoolVecEnv, SerialVecEnv, adapt, describe_dead
from fastppo.errors import ConfigError, EnvError, EnvStartError
from fastppo.runtime.main_script import exit_if_reimported, importable_main

_CPU = torch.device("cpu")
_PROBE_ENVS = 4  # environments of a native vector version that the resume probe makes


@dataclasses.dataclass(frozen=True)
class VecEnvOptions:
    """Settings of N environments; a backend reads those that apply to it.

    Attributes:
        n_envs: N.
        seed: for backends that take a seed when they are made.
        n_workers: worker processes; None: one per core.
        n_groups: groups that are stepped separately.
        device: of tensor environments.
        fault_policy: handling of failed environments and workers.
        resume_support: how the environments continue after a resume.
    """

    n_envs: int
    seed: int = 0
    n_workers: int | None = None
    n_groups: int = 1
    device: torch.device = _CPU
    fault_policy: FaultPolicy = NO_FAULT_POLICY
    resume_support: ResumeSupport = VecEnv.resume_support


Vectorize = Callable[[EnvInfo, VecEnvOptions], VectorEnv[Any, Any, Any]]
Wrap = Callable[[VectorEnv[Any, Any, Any], VecEnvOptions], VecEnv]


@dataclasses.dataclass(frozen=True)
class Backend:
    """One way to step N environments.

    Attributes:
        make: makes the VecEnv; raises ConfigError if the environment has no such version.
        probe_resume: finds how N environments continue after a resume.
        vectorize: makes a Gymnasium vector environment, to measure and compare backends; None: it has none.
        available: whether the environment has this version at all.
        workers: the setting that gives the number of worker processes; None: no workers.
        descriptors: file descriptors per worker.
        has_timeout: whether a step may time out (env_timeout).
        restarts_envs: whether failed environments can be restarted (on_env_error=restart).
        resumes_moments: whether a resume restores the running moments of the user's own wrappers.
        auto_margin: speed over `sync` that vectorization=auto demands of it; None: never chosen automatically. A native
            version is another implementation with other random streams; processes cost memory and start-up time.
    """

    make: Callable[[EnvInfo, VecEnvOptions], VecEnv]
    probe_resume: Callable[[EnvInfo, int], ResumeSupport]
    vectorize: Vectorize | None = None
    available: Callable[[EnvInfo], bool] = lambda env_info: True
    workers: Literal["n_envs", "workers"] | None = None
    descriptors: int = 0
    has_timeout: bool = False
    restarts_envs: bool = False
    resumes_moments: bool = True
    auto_margin: float | None = None


def _gymnasium(vectorize: Vectorize, wrap: Wrap, **fields: Any) -> Backend:  # noqa: ANN401 - fields of Backend
    """Return the record of a backend that wraps a Gymnasium vector environment."""
    return Backend(make=lambda info, options: wrap(vectorize(info, options), options), vectorize=vectorize, **fields)


def _factory(env_info: EnvInfo) -> EnvFactory:
    assert env_info.factory is not None, "make_env returned a vector environment"
    return env_info.factory


def _start_method() -> str:
    """Return a start method other than fork: torch has threads, and a forked lock stays locked."""
    if sys.platform == "win32":
        return "spawn"
    prepare_fork_server()
    return "forkserver"


def _sync(info: EnvInfo, options: VecEnvOptions) -> SerialVectorEnv:
    return SerialVectorEnv([_factory(info)] * options.n_envs, options.fault_policy)


def _pool(info: EnvInfo, options: VecEnvOptions) -> PoolVectorEnv:
    return PoolVectorEnv(
        [_factory(info)] * options.n_envs,
        n_workers=options.n_workers,
        n_groups=options.n_groups,
        start_method=_start_method(),
        fault_policy=options.fault_policy,
        seed=options.seed,
    )


class _AsyncVectorEnv(AsyncVectorEnv):
    """AsyncVectorEnv, with an error that says why a worker ended while it started."""

    def _check_spaces(self) -> None:
        try:
            super()._check_spaces()  # type: ignore[no-untyped-call]
        except (EOFError, ConnectionError) as error:
            raise EnvStartError(f"async: {describe_dead(self.processes)} as it started.") from error


def _async(info: EnvInfo, options: VecEnvOptions) -> AsyncVectorEnv:
    exit_if_reimported()
    # Gymnasium's worker sends a final observation after the reset that may overwrite it
    factory = dataclasses.replace(_factory(info), copy_obs=True)
    setup = WorkerSetup.collect()
    seeds = np.random.SeedSequence(options.seed).generate_state(options.n_envs)
    factories = [InWorker(dataclasses.replace(setup, seed=int(seed)), factory, i) for i, seed in enumerate(seeds)]
    with importable_main():
        return _AsyncVectorEnv(factories, copy=False, context=_start_method(), autoreset_mode=AutoresetMode.SAME_STEP)


def _native(info: EnvInfo, n_envs: int) -> VectorEnv[Any, Any, Any]:
    return _packed(info, make_native(_factory(info), n_envs, info.atari))


def _envpool(info: EnvInfo, options: VecEnvOptions) -> VectorEnv[Any, Any, Any]:
    return _packed(info, make_envpool(_factory(info), options.n_envs, info.atari, options.seed))


def _packed(info: EnvInfo, venv: VectorEnv[Any, Any, Any]) -> VectorEnv[Any, Any, Any]:
    """Return a vector environment whose observations are packed as those of a single environment are.

    Raises:
        ConfigError: the single environment is asked for its masks, which a vector environment can't be.
    """
    if _has_mask_method(info):
        close_env(venv)
        raise ConfigError(
            f"the vector version of {info.name} can't be asked for action_masks(); use vectorization=sync, pool or "
            "async, or --action-masks off."
        )
    space = _factory(info).packed
    return venv if space is None else PackVectorObservation(venv, space)


def _has_mask_method(info: EnvInfo) -> bool:
    return info.obs_spec.leaves[-1].mask_source == "method"


def _own(info: EnvInfo, options: VecEnvOptions) -> VecEnv:
    """Return the vector environment or simulator that make_env made."""
    venv = info.vector
    if isinstance(venv, SimulatorEnv):
        return venv
    assert venv is not None
    inner = venv.unwrapped
    overwrites = False
    if isinstance(inner, SyncVectorEnv):
        if len({id(env.unwrapped) for env in inner.envs}) < len(inner.envs):
            raise EnvStartError(shared_env_text(inner.envs[0]))
        overwrites = any(map(reuses_observations, inner.envs))
    elif isinstance(inner, AsyncVectorEnv):
        env = inner.env_fns[0]()
        try:
            overwrites = reuses_observations(env)
        finally:
            close_env(env)
    if overwrites:
        raise EnvError(
            "make_env's environments overwrite observations that they returned before, which loses final observations; "
            "return a single environment from make_env, or copy its observations."
        )
    return adapt(venv)


def _no_resume(info: EnvInfo, why: str) -> ResumeSupport:
    """Return that environments restart, after a look at their random streams."""
    return ResumeSupport("restart", why, () if info.factory is None else probe_seeding(info.factory))


def _restart(why: str) -> Callable[[EnvInfo, int], ResumeSupport]:
    return lambda env_info, n_envs: ResumeSupport("restart", why)


# In the order in which vectorization=auto measures them
BACKENDS: dict[Vectorization, Backend] = {
    "sync": _gymnasium(
        _sync,
        lambda venv, options: SerialVecEnv(venv, resume_support=options.resume_support),
        probe_resume=lambda info, n_envs: probe_resume_support(_factory(info), n_envs),
        restarts_envs=True,
        auto_margin=1.0,
    ),
    "native": _gymnasium(
        lambda info, options: _native(info, options.n_envs),
        lambda venv, options: GymnasiumVecEnv(venv, seeding="unknown", resume_support=options.resume_support),
        probe_resume=lambda info, n_envs: probe_vector_resume_support(lambda: _native(info, min(n_envs, _PROBE_ENVS))),
        available=lambda info: has_native(_factory(info)) and not _has_mask_method(info),
        auto_margin=1.5,
    ),
    "pool": _gymnasium(
        _pool,
        lambda venv, options: PoolVecEnv(venv, resume_support=options.resume_support),
        probe_resume=lambda info, n_envs: probe_resume_support(_factory(info), n_envs),
        workers="workers",
        descriptors=8,
        has_timeout=True,
        restarts_envs=True,
        auto_margin=1.2,
    ),
    "async": _gymnasium(
        _async,
        lambda venv, options: AsyncVecEnv(
            venv, timeout=options.fault_policy.timeout, resume_support=options.resume_support
        ),
        probe_resume=lambda info, n_envs: _no_resume(
            info, "async gives no access to the environments' state; sync and pool do"
        ),
        workers="n_envs",
        resumes_moments=False,
        descriptors=4,
        has_timeout=True,
    ),
    "envpool": _gymnasium(
        _envpool,
        lambda venv, options: GymnasiumVecEnv(venv, seeding="constructor", resume_support=options.resume_support),
        probe_resume=_restart("envpool gives no access to the environments' state"),
    ),
    "tensor": Backend(
        make=lambda info, options: make_tensor_env(info, options.n_envs, options.device),
        probe_resume=lambda info, n_envs: TensorEnv.resume_support,
    ),
}
# A vector environment or simulator that make_env returned
OWN = Backend(make=_own, probe_resume=_restart("make_env's own vector environment gives no access to its state"))


def backend_of(env_info: EnvInfo, vectorization: Vectorization) -> Backend:
    """Return the record of `vectorization`, or of the vector environment that make_env returned."""
    return BACKENDS[vectorization] if env_info.vector is None else OWN
