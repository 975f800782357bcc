"""Checks of settings against their environment that need no torch, whose import takes seconds."""

from __future__ import annotations

from typing import Any

from gymnasium import Env, Space, spaces

from fastppo.config import Config, count_iterations, fill_defaults
from fastppo.envs.env_state import close_env
from fastppo.envs.factory import EnvFactory, build, find_spec, is_atari
from fastppo.errors import ConfigError
from fastppo.presets import CLEANRL, Kind
from fastppo.runs.run_dir import check_new_folder, check_run_folder
from fastppo.runtime.cores import processes


def check_early(config: Config, *, trains: bool = True) -> None:
    """Raise the errors that the start of a run would raise, as far as they can be found without torch.

    An environment is made only if the answer depends on it: its own arguments are given, or the defaults of some kind
    of environment don't fit the settings.

    Args:
        config: settings as the user gave them.
        trains: total_timesteps will be used as given, and must hold an iteration.

    Raises:
        ConfigError: no such environment, arguments that it refuses, settings that don't fit its defaults, or a run
            folder that can't be used.
        CheckpointError: `init_from` is no run folder.
    """
    atari = is_atari(find_spec(config.env_id))
    if config.run_dir is not None and config.resume == "never":
        check_new_folder(config.run_dir)
    if config.init_from is not None:
        check_run_folder(config.init_from)
    refused = {kind: error for kind in CLEANRL if (error := _refusal(config, kind, atari, trains)) is not None}
    if not refused and not config.env_kwargs:
        return
    env = build(EnvFactory(config.env_id, config.env_kwargs, wrappers=config.wrappers))
    try:
        errors = [refused.get(kind) for kind in _possible_kinds(env)]
    finally:
        close_env(env)
    if errors[0] is not None and None not in errors:
        raise errors[0]


def _refusal(config: Config, kind: Kind, atari: bool, trains: bool) -> ConfigError | None:
    try:
        filled = fill_defaults(config, kind, atari=atari)
        if trains:
            count_iterations(filled, processes())
    except ConfigError as error:
        return error
    return None


def _possible_kinds(env: Env[Any, Any]) -> list[Kind]:
    """Return the kinds that an environment may turn out to be; `EnvInfo.kind` decides."""
    kind: Kind = "continuous" if isinstance(env.action_space, spaces.Box) else "discrete"
    return ["image", kind] if _may_be_image(env.observation_space) else [kind]


def _may_be_image(space: Space[Any]) -> bool:
    return space.shape is None or len(space.shape) >= 2
