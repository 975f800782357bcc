"""vectorization=native: the vector version that an environment registers itself (`vector_entry_point`)."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from gymnasium.vector import AutoresetMode, VectorEnv

from fastppo.envs import factory as single
from fastppo.envs.factory import EnvFactory
from fastppo.errors import ConfigError


def has_native(factory: EnvFactory) -> bool:
    """Return whether the environment registers a vector version, and has no wrappers, which could not be applied."""
    return (
        factory.make is None
        and not factory.wrappers
        and single.find_spec(factory.env_id).vector_entry_point is not None
    )


def make_native(factory: EnvFactory, n_envs: int, atari: bool) -> VectorEnv[Any, Any, Any]:
    """Make the environment's own vector version, with the Atari preprocessing of `factory` for ALE games.

    Raises:
        ConfigError: it has none, or refuses the keyword arguments.
    """
    if not has_native(factory):
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
