"""Checks of settings against their environment that need no torch, whose import takes seconds."""

from __future__ import annotations

from typing import Any

from gymnasium import Env, spaces

from fastppo.config import Config, count_iterations, fill_defaults
from fastppo.envs.factory import EnvFactory, build, close_env, find_spec, first_reset, is_atari
from fastppo.envs.pack_observation import packed_space
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, Kind
from fastppo.runs.run_dir import check_new_folder, check_run_folder
from fastppo.runtime.cores import processes
from fastppo.spaces.leaves import ObsLeaf, read_as_images


def check_early(config: Config, *, trains: bool = True) -> None:
    """Raise the errors that the start of a run would raise, as far as they can be found without torch.

    An environment is made only if the answer depends on it: its own arguments or keys of its observations are given, or
    the defaults of some kind of environment don't fit the settings.

    Args:
        config: settings as the user gave them.
        trains: total_timesteps will be used as given, and must hold an iteration.

    Raises:
        ConfigError: no such environment, arguments that it refuses, keys that its observations lack, settings that
            don't fit its defaults, or a run folder that can't be used.
        EnvError: its observations aren't supported, or its masks have the wrong size.
        CheckpointError: `init_from` is no run folder.
    """
    atari = is_atari(find_spec(config.env_id))
    if config.run_dir is not None and config.resume == "never":
        check_new_folder(config.run_dir)
    if config.init_from is not None:
        check_run_folder(config.init_from)
    refused = {kind: error for kind in CLEANRL if (error := _refusal(config, kind, atari, trains)) is not None}
    if not (refused or config.env_kwargs or config.obs_keys or config.critic_obs_keys):
        return
    env = build(EnvFactory(config.env_id, config.env_kwargs, wrappers=config.wrappers))
    try:
        error = refused.get(_kind(env, config))
    finally:
        close_env(env)
    if error is not None:
        raise error


def _refusal(config: Config, kind: Kind, atari: bool, trains: bool) -> ConfigError | None:
    try:
        filled = fill_defaults(config, kind, atari=atari)
        if trains:
            count_iterations(filled, processes())
    except ConfigError as error:
        return error
    return None


def _kind(env: Env[Any, Any], config: Config) -> Kind:
    """Return the kind of an environment, as `EnvInfo.kind` does."""
    masks = (lambda: first_reset(env)[1]) if config.action_masks == "auto" else None
    packed = packed_space(env, config.obs_keys, config.critic_obs_keys, masks)
    leaves = (ObsLeaf.from_space(env.observation_space),) if packed is None else packed.leaves
    if read_as_images(leaves):
        return "image"
    return "continuous" if isinstance(env.action_space, spaces.Box) else "discrete"
