"""From settings to a VecEnv: inspect one environment, choose a backend, make N environments."""

from __future__ import annotations

import functools
from typing import Any, Literal

import torch
from gymnasium.vector import VectorEnv

from fastppo.envs.auto_vectorization import Vectorization, choose, measure
from fastppo.envs.backends import BACKENDS, VecEnvOptions, backend_of
from fastppo.envs.env_info import EnvInfo as EnvInfo
from fastppo.envs.env_info import Maker as Maker
from fastppo.envs.env_info import Reading as Reading
from fastppo.envs.env_info import inspect_env as inspect_env
from fastppo.envs.env_state import ResumeSupport
from fastppo.envs.fault_policy import NO_FAULT_POLICY, FaultPolicy
from fastppo.envs.resume_probe import probe_seeding
from fastppo.envs.tensor.tasks import TASKS as TASKS
from fastppo.envs.vec_env import VecEnv
from fastppo.errors import ConfigError

_MEASURE_SECONDS = 1.0  # for all backends that `choose_vectorization` measures


def make_vec_env(
    env_info: EnvInfo,
    n_envs: int,
    vectorization: Vectorization,
    *,
    seed: int = 0,
    n_workers: int | None = None,
    half_batches: bool = False,
    device: torch.device | None = None,
    fault_policy: FaultPolicy = NO_FAULT_POLICY,
    resume_support: ResumeSupport = VecEnv.resume_support,
) -> VecEnv:
    """Make N of the inspected environments.

    Args:
        env_info: from `inspect_env`.
        n_envs: N.
        vectorization: the backend.
        seed: for EnvPool, which takes its seed when it is made.
        n_workers: processes of the pool; None: one per core.
        half_batches: step the pool's environments in two groups.
        device: of tensor environments; None: the CPU.
        fault_policy: handling of failed environments and workers.
        resume_support: how they continue after a resume, from the backend's `probe_resume`.

    Raises:
        ConfigError: the environment has no such version, or make_env's vector environment has another N.
        EnvError: it violates its spaces or its autoreset mode.
    """
    if env_info.vector is not None:
        if env_info.vector.num_envs != n_envs:
            raise ConfigError(
                f"n_envs={n_envs}, but make_env returned a vector environment of {env_info.vector.num_envs}."
            )
        if vectorization != "sync":
            raise ConfigError(
                f"vectorization={vectorization}, but make_env returned a vector environment; leave it out."
            )
    options = VecEnvOptions(
        n_envs=n_envs,
        seed=seed,
        n_workers=n_workers,
        n_groups=2 if half_batches else 1,
        device=device or torch.device("cpu"),
        fault_policy=fault_policy,
        resume_support=resume_support,
    )
    env = backend_of(env_info, vectorization).make(env_info, options)
    # `env_info` decides how the policy reads observations and makes actions; a backend may declare other bounds
    env.obs_spec = env.obs_spec.read_as(env_info.obs_spec)
    env.action_spec = env.action_spec.with_distribution(env_info.action_spec.box_distribution)
    if env_info.action_spec.rescale:
        env.action_spec = env.action_spec.rescaled()
    return env


def probe_resume(
    env_info: EnvInfo, n_envs: int, vectorization: Vectorization, resume_envs: Literal["auto", "restart"]
) -> ResumeSupport:
    """Find how N environments continue after a resume; under "restart", only check their random streams.

    Raises:
        EnvStartError: make_env returns the same environment at every call.
    """
    if resume_envs == "restart":
        notes = () if env_info.factory is None else probe_seeding(env_info.factory)
        return ResumeSupport("restart", "resume_envs=restart", notes)
    return backend_of(env_info, vectorization).probe_resume(env_info, n_envs)


def make_vectorized(env_info: EnvInfo, n_envs: int, vectorization: Vectorization) -> VectorEnv[Any, Any, Any]:
    """Make N of the inspected environments as a Gymnasium vector environment; arguments as in `make_vec_env`.

    Raises:
        ConfigError: the environment has no such version.
    """
    vectorize = BACKENDS[vectorization].vectorize
    if vectorize is None:
        raise ConfigError(f"vectorization={vectorization} makes no Gymnasium vector environment; use sync or pool.")
    return vectorize(env_info, VecEnvOptions(n_envs=n_envs))


def supports(vectorization: Vectorization, *, timeout: bool, restarts: bool) -> bool:
    """Return whether a backend can time out, if asked to, and restart failed environments, if asked to."""
    backend = BACKENDS[vectorization]
    return (backend.has_timeout or not timeout) and (backend.restarts_envs or not restarts)


def choose_vectorization(
    env_info: EnvInfo, n_envs: int, *, timeout: bool = False, restarts: bool = False
) -> tuple[Vectorization, str]:
    """Return the fastest backend for N of the environments and the reason, in about a second plus start-up.

    Args:
        env_info: from `inspect_env`.
        n_envs: N.
        timeout: whether a step must be able to time out.
        restarts: whether failed environments must be restarted.
    """
    if env_info.vector is not None:
        return "sync", "vectorization: make_env's own vector environment"
    if timeout:
        return "pool", "vectorization pool: env_timeout needs worker processes"
    if n_envs == 1:
        return "sync", "vectorization sync: there is one environment"
    candidates = {
        name: backend
        for name, backend in BACKENDS.items()
        if backend.auto_margin is not None
        and backend.available(env_info)
        and supports(name, timeout=timeout, restarts=restarts)
    }
    makers = {name: functools.partial(make_vectorized, env_info, n_envs, name) for name in candidates}
    in_processes = {name for name, backend in candidates.items() if backend.workers is not None}
    speeds, failures = measure(makers, n_envs, _MEASURE_SECONDS, in_processes)
    margins = {name: backend.auto_margin or 1.0 for name, backend in candidates.items()}
    return choose(n_envs, speeds, failures, margins)
