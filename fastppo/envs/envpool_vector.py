"""vectorization=envpool: EnvPool's C++ environments (an optional dependency)."""

from __future__ import annotations

import difflib
from typing import Any

from gymnasium.vector import VectorEnv

from fastppo.envs import factory as single
from fastppo.envs.factory import EnvFactory
from fastppo.errors import ConfigError


def make_envpool(factory: EnvFactory, n_envs: int, atari: bool, seed: int) -> VectorEnv[Any, Any, Any]:
    """Make EnvPool's version of the environment, with the Atari preprocessing of `factory` for ALE games.

    Raises:
        ConfigError: EnvPool isn't installed, has no such environment, or refuses the keyword arguments.
    """
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
