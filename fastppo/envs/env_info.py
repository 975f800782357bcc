"""Properties of an environment, read from one instance before N of them are made."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, Literal

import gymnasium as gym
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.envs import factory as single
from fastppo.envs.env_state import normalizers_of
from fastppo.envs.factory import EnvFactory, close_env
from fastppo.envs.pack_observation import PackObservation, PackVectorObservation, n_choices, packed_space
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.errors import ENV_ERRORS, ConfigError
from fastppo.runtime.seeding import global_states
from fastppo.spaces.actions import ActionSpec, BoxDistributionName
from fastppo.spaces.leaves import read_as_images
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import MASK_KEY

Maker = Callable[[], Any]  # -> a gymnasium Env; or a VectorEnv or SimulatorEnv, which is used as it is


@dataclasses.dataclass(frozen=True)
class Reading:
    """The parts of an environment's observations that a run reads.

    Attributes:
        obs_keys: keys of a Dict or Tuple observation to read; empty: all but `critic_obs_keys`.
        critic_obs_keys: keys that only the critic reads.
        masks: use the environment's masks of allowed actions, if it gives any.
    """

    obs_keys: tuple[str, ...] = ()
    critic_obs_keys: tuple[str, ...] = ()
    masks: bool = True


@dataclasses.dataclass
class EnvInfo:
    """Properties of an environment, read from one instance before N of them are made.

    Attributes:
        obs_spec: of one observation.
        action_spec: of one action.
        atari: whether it is an ALE game.
        reward_threshold: the registered one, or None.
        factory: makes one environment; None if make_env returned a vector environment or simulator.
        vector: that vector environment or simulator.
        name: its registered id (of the first one in a vector environment), or else its class.
        max_steps: the registered time limit, or None.
        normalizers: its wrappers that keep running moments of their own, such as Gymnasium's NormalizeObservation.
        global_streams: modules from whose global random stream it draws: "numpy", "random", "torch".
    """

    obs_spec: ObsSpec
    action_spec: ActionSpec
    name: str
    atari: bool = False
    reward_threshold: float | None = None
    factory: EnvFactory | None = None
    vector: VectorEnv[Any, Any, Any] | SimulatorEnv | None = None
    max_steps: int | None = None
    normalizers: tuple[str, ...] = ()
    global_streams: tuple[str, ...] = ()

    @property
    def from_id(self) -> bool:
        """Whether the environment was made by its id, not by the user's make_env."""
        return self.factory is not None and self.factory.make is None

    @property
    def kind(self) -> Literal["discrete", "image", "continuous"]:
        """The CleanRL script whose defaults fit."""
        if read_as_images(self.obs_spec.leaves):
            return "image"
        return "continuous" if self.action_spec.kind == "box" else "discrete"


EVERYTHING = Reading()


def inspect_env(
    env_id: str,
    env_kwargs: dict[str, Any],
    make_env: Maker | None = None,
    wrappers: tuple[str, ...] = (),
    *,
    rescale_actions: bool = False,
    action_distribution: BoxDistributionName = "gaussian",
    reading: Reading = EVERYTHING,
) -> EnvInfo:
    """Make one environment, read its properties and close it.

    Args:
        env_id: Gymnasium id, unless `make_env` is given.
        env_kwargs: the environment's keyword arguments.
        make_env: the user's own constructor.
        wrappers: "module:name" of wrappers, the innermost first.
        rescale_actions: map actions in [-1, 1] to the bounds of the Box action space.
        action_distribution: of the actions of a Box.
        reading: what to read of its observations.

    Raises:
        ConfigError: its package is missing, its arguments are refused, its observations have no such keys, or its
            actions lack the bounds that `rescale_actions` or `action_distribution` needs.
        EnvStartError: it can't be made, or its first reset or step fails.
        EnvError: its spaces aren't supported.
    """
    env_info = _inspect(env_id, env_kwargs, make_env, wrappers, reading)
    env_info.action_spec = env_info.action_spec.with_distribution(action_distribution)
    if rescale_actions:
        env_info.action_spec = env_info.action_spec.rescaled()
    return env_info


def _inspect(
    env_id: str, env_kwargs: dict[str, Any], make_env: Maker | None, wrappers: tuple[str, ...], reading: Reading
) -> EnvInfo:
    atari = make_env is None and single.is_atari(single.find_spec(env_id))
    for name in ("frameskip", "obs_type") if atari else ():
        if name in env_kwargs:
            raise ConfigError(f"env_kwargs: {name} is set by the Atari preprocessing; leave it out.")
    if make_env is not None:
        single.check_maker("make_env", make_env)
    factory = EnvFactory(env_id, env_kwargs, make=make_env, wrappers=wrappers)
    env: Any = single.build(factory)
    if wrappers and isinstance(env, (VectorEnv, SimulatorEnv)):
        env.close()
        raise ConfigError(
            f"wrappers need single environments, but make_env returned {type(env).__name__}; apply them in make_env."
        )
    if isinstance(env, VectorEnv):
        return _inspect_vector(env, reading)
    if isinstance(env, SimulatorEnv):
        env.read(reading.obs_keys, reading.critic_obs_keys, masks=reading.masks)
        return EnvInfo(obs_spec=env.obs_spec, action_spec=env.action_spec, name=env.name, vector=env)
    if not isinstance(env, gym.Env):
        raise ConfigError(
            f"make_env returned {type(env).__name__}; it must return a gymnasium Env or VectorEnv, or a SimulatorEnv."
        )
    return dataclasses.replace(_inspect_single(env, factory, reading), atari=atari)


def _inspect_vector(venv: VectorEnv[Any, Any, Any], reading: Reading) -> EnvInfo:
    """Read the properties of the user's vector environment, which the run then steps."""
    _check_vector(venv)
    if reading.masks:
        _refuse_mask_methods(venv)
    masks = (lambda: _vector_info(venv)) if reading.masks else None
    packed = packed_space(venv, reading.obs_keys, reading.critic_obs_keys, masks)
    env = venv if packed is None else PackVectorObservation(venv, packed)
    return EnvInfo(
        obs_spec=ObsSpec.from_space(env.single_observation_space),
        action_spec=ActionSpec.from_space(env.single_action_space),
        name=_vector_name(env),
        vector=env,
        normalizers=tuple(normalizers_of(env)),
    )


def _inspect_single(plain: gym.Env[Any, Any], factory: EnvFactory, reading: Reading) -> EnvInfo:
    """Read the properties of an environment from `factory`, and close it."""
    env = plain
    try:
        action_spec = ActionSpec.from_space(env.action_space)
        before = global_states()
        masks = (lambda: single.first_reset(plain)[1]) if reading.masks else None
        packed = packed_space(plain, reading.obs_keys, reading.critic_obs_keys, masks)
        if packed is not None:
            env = PackObservation(plain, packed)
        obs_spec = ObsSpec.from_space(env.observation_space)
        factory = dataclasses.replace(factory, copy_obs=single.reuses_observations(env), packed=packed, quiet=True)
        drawn = tuple(name for name, state in global_states().items() if before.get(name, state) != state)
        normalizers = tuple(normalizers_of(env))
    finally:
        close_env(env)
    return EnvInfo(
        obs_spec=obs_spec,
        action_spec=action_spec,
        name=env.spec.id if env.spec else type(env.unwrapped).__name__,
        reward_threshold=env.spec.reward_threshold if env.spec else None,
        factory=factory,
        max_steps=env.spec.max_episode_steps if env.spec else None,
        normalizers=normalizers,
        global_streams=drawn,
    )


def _refuse_mask_methods(venv: VectorEnv[Any, Any, Any]) -> None:
    """Refuse environments with `action_masks()` within a vector environment, which is not asked for them.

    Raises:
        ConfigError: there are such.
    """
    envs = getattr(venv.unwrapped, "envs", None) or [None]
    has = getattr(envs[0], "has_wrapper_attr", None)
    if n_choices(venv.single_action_space) and has is not None and has("action_masks"):
        raise ConfigError(
            f"make_env's {type(venv.unwrapped).__name__} can't be asked for action_masks(); return a single "
            f'environment from make_env, give the masks in info["{MASK_KEY}"], or --action-masks off.'
        )


def _vector_info(venv: VectorEnv[Any, Any, Any]) -> Mapping[str, Any]:
    """Return the info of a reset, without a seed if it takes none of this form; empty if that fails too."""
    for seed in (0, None):
        with contextlib.suppress(*ENV_ERRORS):
            info: Mapping[str, Any] = venv.reset(seed=seed)[1]
            return info
    return {}


def _vector_name(venv: VectorEnv[Any, Any, Any]) -> str:
    """Return the registered id of a vector environment or of its first environment, or else the class of that."""
    inner: Any = getattr(venv.unwrapped, "envs", None) or [venv]
    for env in (venv, inner[0]):
        if isinstance(env.spec, EnvSpec):
            return env.spec.id
    return type(inner[0].unwrapped).__name__


def _check_vector(env: VectorEnv[Any, Any, Any]) -> None:
    """Refuse a vector environment that lacks a part of Gymnasium's interface.

    Raises:
        ConfigError: it does.
    """
    names = ("num_envs", "single_observation_space", "single_action_space")
    missing = [name for name in names if getattr(env, name, None) is None]
    if missing:
        raise ConfigError(
            f"make_env returned {type(env.unwrapped).__name__}, a VectorEnv without {', '.join(missing)} (SuperSuit's "
            "are of this kind); wrap it in a VectorEnv that has them: docs/environments.md has the adapter."
        )
