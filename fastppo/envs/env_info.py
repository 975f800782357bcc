"""Properties of an environment, read from one instance before N of them are made."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Literal

import gymnasium as gym
from gymnasium.vector import VectorEnv

from fastppo.envs import factory as single
from fastppo.envs.factory import EnvFactory
from fastppo.envs.tensor.simulator import SimulatorEnv
from fastppo.errors import ConfigError
from fastppo.spaces import ActionSpec, ObsSpec

Maker = Callable[[], Any]  # -> a gymnasium Env; or a VectorEnv or SimulatorEnv, which is used as it is


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
        name: its registered id, or else its class.
        max_steps: the registered time limit, or None.
    """

    obs_spec: ObsSpec
    action_spec: ActionSpec
    name: str
    atari: bool = False
    reward_threshold: float | None = None
    factory: EnvFactory | None = None
    vector: VectorEnv[Any, Any, Any] | SimulatorEnv | None = None
    max_steps: int | None = None

    @property
    def kind(self) -> Literal["discrete", "image", "continuous"]:
        """The CleanRL script whose defaults fit."""
        if self.obs_spec.leaf.kind == "image":
            return "image"
        return "continuous" if self.action_spec.kind == "box" else "discrete"


def inspect_env(
    env_id: str, env_kwargs: dict[str, Any], make_env: Maker | None = None, wrappers: tuple[str, ...] = ()
) -> EnvInfo:
    """Make one environment, read its properties and close it.

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
    factory = EnvFactory(env_id, env_kwargs, make=make_env, wrappers=wrappers)
    env: Any = single.build(factory)
    if wrappers and isinstance(env, (VectorEnv, SimulatorEnv)):
        env.close()
        raise ConfigError(
            f"wrappers need single environments, but make_env returned {type(env).__name__}; apply them in make_env."
        )
    if isinstance(env, VectorEnv):
        return EnvInfo(
            obs_spec=ObsSpec.from_space(env.single_observation_space),
            action_spec=ActionSpec.from_space(env.single_action_space),
            name=type(env.unwrapped).__name__,
            vector=env,
        )
    if isinstance(env, SimulatorEnv):
        return EnvInfo(obs_spec=env.obs_spec, action_spec=env.action_spec, name=env.name, vector=env)
    if not isinstance(env, gym.Env):
        raise ConfigError(
            f"make_env returned {type(env).__name__}; it must return a gymnasium Env or VectorEnv, or a SimulatorEnv."
        )
    try:
        obs_spec, action_spec = ObsSpec.from_space(env.observation_space), ActionSpec.from_space(env.action_space)
        threshold = env.spec.reward_threshold if env.spec else None
        factory = dataclasses.replace(factory, copy_obs=single.reuses_observations(env), quiet=True)
    finally:
        env.close()
    return EnvInfo(
        obs_spec=obs_spec,
        action_spec=action_spec,
        name=env.spec.id if env.spec else type(env.unwrapped).__name__,
        atari=atari,
        reward_threshold=threshold,
        factory=factory,
        max_steps=env.spec.max_episode_steps if env.spec else None,
    )
