"""From settings to a VecEnv: first a look at one environment, then N of them."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import sys
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv

from fastppo.envs import auto_vectorization as choose
from fastppo.envs import factory as single
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.env_state import Resumable, how_resumable, how_resumable_together
from fastppo.envs.factory import EnvFactory
from fastppo.envs.gymnasium_vector import HostEnv
from fastppo.envs.pool import PoolVectorEnv, prepare_fork_server
from fastppo.envs.sync import NO_FAULT_POLICY, FaultPolicy, SerialVectorEnv
from fastppo.envs.tensor.acrobot import Acrobot
from fastppo.envs.tensor.cartpole import CartPole
from fastppo.envs.tensor.catch import Catch
from fastppo.envs.tensor.mountain_car import MountainCarContinuous
from fastppo.envs.tensor.pendulum import Pendulum
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.envs.tensor.task import Task
from fastppo.envs.tensor.tensor_env import TensorEnv
from fastppo.envs.vec_env import VecEnv
from fastppo.errors import ConfigError, EnvError
from fastppo.spaces import ActionSpec, ObsSpec

# What vectorization=tensor knows, by Gymnasium's ids; keyword arguments are the task's fields
TASKS: dict[str, Callable[..., Task]] = {
    "Acrobot-v1": Acrobot,
    "CartPole-v1": CartPole,
    "MountainCarContinuous-v0": MountainCarContinuous,
    "Pendulum-v1": Pendulum,
    "fastppo/Catch-v0": Catch,
}
Maker = Callable[[], Any]  # -> gymnasium Env, or a VectorEnv or SimulatorEnv that is used as it is


@dataclasses.dataclass
class EnvInfo:
    """What one look at an environment tells, before N of them are made.

    Attributes:
        obs_spec: of one observation.
        action_spec: of one action.
        atari: whether it is an ALE game.
        reward_threshold: the registered one, where there is one.
        factory: makes one environment; None where the user's maker returned a vector environment.
        vector: that vector environment, or simulator.
        name: what to call it: its registered id, or its class.
        max_steps: the registered time limit, where there is one.
    """

    obs_spec: ObsSpec
    action_spec: ActionSpec
    atari: bool
    reward_threshold: float | None
    factory: EnvFactory | None
    vector: VectorEnv[Any, Any, Any] | SimulatorEnv | None
    name: str
    max_steps: int | None = None

    @property
    def kind(self) -> Literal["discrete", "image", "continuous"]:
        """Which of CleanRL's scripts fits."""
        if self.obs_spec.leaf.kind == "image":
            return "image"
        return "continuous" if self.action_spec.kind == "box" else "discrete"


def inspect_env(env_id: str, env_kwargs: dict[str, Any], make_env: Maker | None = None) -> EnvInfo:
    """Make one environment, look, and close it.

    Raises:
        ConfigError: it can't be made.
        EnvError: its spaces aren't supported.
    """
    atari = False
    if make_env is None:
        spec = single.find_spec(env_id)
        atari = single.is_atari(spec)
        for name in ("frameskip", "obs_type") if atari else ():
            if name in env_kwargs:
                raise ConfigError(f"env_kwargs: {name} is set by the Atari preprocessing; leave it out.")
    if make_env is not None and not callable(make_env):
        raise ConfigError(
            f"make_env is a {type(make_env).__name__}; it must be a function that makes an environment, "
            "such as lambda: gymnasium.make('CartPole-v1')."
        )
    factory = EnvFactory(env_id, env_kwargs, make=make_env)
    env: Any = single.build(factory)
    if isinstance(env, VectorEnv):
        obs_spec = ObsSpec.from_space(env.single_observation_space)
        name = type(env.unwrapped).__name__
        return EnvInfo(obs_spec, ActionSpec.from_space(env.single_action_space), False, None, None, env, name)
    if isinstance(env, SimulatorEnv):
        return EnvInfo(env.obs_spec, env.action_spec, False, None, None, env, env.name)
    if not isinstance(env, gym.Env):
        raise ConfigError(
            f"make_env returned {type(env).__name__}; it must return a gymnasium Env or VectorEnv, or a SimulatorEnv."
        )
    try:
        obs_spec, action_spec = ObsSpec.from_space(env.observation_space), ActionSpec.from_space(env.action_space)
        threshold = env.spec.reward_threshold if env.spec else None
        factory = dataclasses.replace(factory, copy_obs=single.reuses_observations(env))
    finally:
        env.close()
    name = env.spec.id if env.spec else type(env.unwrapped).__name__
    max_steps = env.spec.max_episode_steps if env.spec else None
    return EnvInfo(obs_spec, action_spec, atari, threshold, factory, None, name, max_steps)


def make_vec_env(
    found: EnvInfo,
    n_envs: int,
    vectorization: Vectorization,
    *,
    seed: int = 0,
    n_workers: int | None = None,
    half_batches: bool = False,
    device: torch.device | None = None,
    fault_policy: FaultPolicy = NO_FAULT_POLICY,
    resumable: Resumable | None = None,
) -> VecEnv:
    """N environments of the kind that was probed.

    Args:
        found: what `probe` said.
        n_envs: N.
        vectorization: how they are stepped.
        seed: for EnvPool, which takes its seed when it is made.
        n_workers: processes of the pool; None: one for each core.
        half_batches: step the pool's environments in two groups.
        device: where tensor environments live.
        fault_policy: what is done for environments in this process and in the pool beside stepping.
        resumable: how they go on after a resume, as `resumability` found.

    Raises:
        ConfigError: there is no such vector version, or a given vector environment has another N.
        EnvError: it doesn't keep its promises.
    """
    if found.vector is not None:
        if found.vector.num_envs != n_envs:
            raise ConfigError(
                f"n_envs={n_envs}, but make_env returned a vector environment of {found.vector.num_envs}."
            )
        if vectorization != "sync":
            raise ConfigError(
                f"vectorization={vectorization}, but make_env returned a vector environment; leave it out."
            )
        if isinstance(found.vector, SimulatorEnv):
            return found.vector
        inner = found.vector.unwrapped
        if isinstance(inner, SyncVectorEnv) and any(single.reuses_observations(env) for env in inner.envs):
            raise EnvError(
                "make_env's environments hand out one and the same array, which loses last observations; "
                "return a single environment from make_env, or copy its observations."
            )
        return HostEnv(found.vector)
    if vectorization == "tensor":
        return _tensor(found, n_envs, device or torch.device("cpu"))
    venv = make_vectorized(found, n_envs, vectorization, seed, n_workers, 2 if half_batches else 1, fault_policy)
    how = {} if resumable is None else {"resumable": resumable}
    return HostEnv(venv, seeded=vectorization == "envpool", timeout=fault_policy.timeout, **how)


def resumability(found: EnvInfo, n_envs: int, vectorization: Vectorization) -> Resumable:
    """How N environments of the kind that was probed will go on after a resume: tried out, on some of them."""
    if found.factory is None:
        return Resumable("restart", "make_env's own vector environment keeps its state to itself")
    if vectorization == "tensor":
        return TensorEnv.resumable
    if vectorization in ("async", "envpool"):
        other = "; sync and pool can ask for it" if vectorization == "async" else ""
        return Resumable("restart", f"{vectorization} keeps the environments' state to itself{other}")
    if vectorization == "native":
        factory, atari = found.factory, found.atari
        return how_resumable_together(lambda: _native(factory, min(n_envs, 4), atari))
    return how_resumable(found.factory)


def choose_vectorization(found: EnvInfo, n_envs: int, seconds: float = 1.0) -> tuple[Vectorization, str]:
    """The fastest way to step N of the environments that were probed, and why; takes about `seconds`, plus start-up."""
    if found.vector is not None:
        return "sync", "vectorization: make_env's own vector environment"
    if n_envs == 1:
        return "sync", "vectorization sync: there is one environment"
    spec = None if found.factory is None or found.factory.make else single.find_spec(found.factory.env_id)
    candidates: list[Vectorization] = ["sync", "pool"]
    if spec is not None and spec.vector_entry_point is not None:
        candidates.insert(1, "native")
    makers = {name: functools.partial(make_vectorized, found, n_envs, name, 0, None, 1) for name in candidates}
    speeds, failures = choose.measure(makers, n_envs, seconds)
    return choose.choose(n_envs, speeds, failures)


def make_vectorized(
    found: EnvInfo,
    n_envs: int,
    vectorization: Vectorization,
    seed: int = 0,
    n_workers: int | None = None,
    n_groups: int = 1,
    fault_policy: FaultPolicy = NO_FAULT_POLICY,
) -> VectorEnv[Any, Any, Any]:
    """N of the environments that were probed, as a Gymnasium vector environment; arguments as in `make_vec_env`.

    Raises:
        ConfigError: there is no such vector version.
    """
    assert found.factory is not None
    if vectorization == "native":
        return _native(found.factory, n_envs, found.atari)
    if vectorization == "envpool":
        return _envpool(found.factory, n_envs, found.atari, seed)
    factories = [found.factory] * n_envs
    if vectorization == "sync":
        return SerialVectorEnv(factories, fault_policy)
    if vectorization == "pool":
        method = _start_method()
        return PoolVectorEnv(
            factories, n_workers=n_workers, n_groups=n_groups, start_method=method, fault_policy=fault_policy
        )
    return AsyncVectorEnv(factories, copy=False, context=_start_method(), autoreset_mode=AutoresetMode.SAME_STEP)


def _tensor(found: EnvInfo, n_envs: int, device: torch.device) -> TensorEnv:
    assert found.factory is not None
    factory = found.factory
    if factory.make is not None or factory.env_id not in TASKS:
        name = found.name if factory.make is not None else factory.env_id
        raise ConfigError(f"vectorization=tensor knows {', '.join(TASKS)}, not {name}; use native, sync or pool.")
    # settings of gymnasium.make itself, which the probe has taken account of
    kwargs = {k: v for k, v in factory.env_kwargs.items() if k not in ("max_episode_steps", "render_mode")}
    try:
        task = TASKS[factory.env_id](**kwargs)
    except TypeError:
        raise ConfigError(f"vectorization=tensor: {factory.env_id} refuses {factory.env_kwargs}.") from None
    return TensorEnv(task, n_envs, found.obs_spec, found.action_spec, max_steps=found.max_steps, device=device)


def _start_method() -> str:
    """Never plain fork: torch has threads, and a forked lock stays locked."""
    if sys.platform == "win32":
        return "spawn"
    prepare_fork_server()
    return "forkserver"


def _native(factory: EnvFactory, n_envs: int, atari: bool) -> VectorEnv[Any, Any, Any]:
    spec = None if factory.make else single.find_spec(factory.env_id)
    if spec is None or spec.vector_entry_point is None:
        raise ConfigError(
            f"vectorization=native: {factory.env_id} has no vector version of its own; use sync or async."
        )
    kwargs = dict(factory.env_kwargs)
    if atari:
        kwargs |= {
            "noop_max": single.ATARI_NOOP_MAX,
            "frameskip": single.ATARI_FRAME_SKIP,
            "img_height": single.ATARI_SIZE,
            "img_width": single.ATARI_SIZE,
            "stack_num": single.ATARI_STACK,
            "use_fire_reset": False,
            "reward_clipping": False,
            "autoreset_mode": AutoresetMode.SAME_STEP,
        }
    try:
        return gym.make_vec(factory.env_id, n_envs, vectorization_mode="vector_entry_point", **kwargs)
    except TypeError as error:
        raise ConfigError(f"vectorization=native: {factory.env_id} refuses {factory.env_kwargs}: {error}") from None


def _envpool(factory: EnvFactory, n_envs: int, atari: bool, seed: int) -> VectorEnv[Any, Any, Any]:
    if factory.make is not None:
        raise ConfigError("vectorization=envpool: EnvPool has its own environments, by id; leave make_env out.")
    try:
        import envpool
    except ImportError:
        raise ConfigError(
            "vectorization=envpool needs EnvPool; install it with: pip install 'fastppo[envpool]' (Python 3.11)."
        ) from None
    # EnvPool's name of ALE/Pong-v5 is Pong-v5
    name = factory.env_id.removeprefix("ALE/")
    if name not in envpool.list_all_envs():
        near = difflib.get_close_matches(name, envpool.list_all_envs(), n=1)
        hint = f"its nearest is {near[0]}" if near else "use sync or pool"
        raise ConfigError(f"vectorization=envpool: EnvPool has no {name}; {hint}.")
    kwargs: dict[str, Any] = dict(factory.env_kwargs)
    if atari:
        kwargs |= {
            "noop_max": single.ATARI_NOOP_MAX,
            "frame_skip": single.ATARI_FRAME_SKIP,
            "img_height": single.ATARI_SIZE,
            "img_width": single.ATARI_SIZE,
            "stack_num": single.ATARI_STACK,
            "use_fire_reset": False,
            "episodic_life": False,
            "reward_clip": False,
            "repeat_action_probability": 0.25 if name.endswith("-v5") else 0.0,
        }
    try:
        return envpool.make_gymnasium(name, num_envs=n_envs, seed=seed, **kwargs)  # type: ignore[no-any-return]
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"vectorization=envpool: {name} refuses {factory.env_kwargs}: {error}") from None
