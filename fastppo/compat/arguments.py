"""The arguments of an algorithm's constructor: its signature, and the settings that they stand for."""

from __future__ import annotations

import dataclasses
import inspect
import secrets
from collections.abc import Mapping
from typing import Any

from fastppo.compat.keywords import (
    check_settings,
    policy_settings,
    settings_by_keyword,
    translate,
    whole_minibatches,
    whole_number,
)
from fastppo.config import Config
from fastppo.errors import ConfigError
from fastppo.profiles import Profile

_NORMALIZE = ("normalize_obs", "normalize_rewards")  # settings of fastppo that every constructor takes


@dataclasses.dataclass(frozen=True)
class Arguments:
    """What a constructor was given.

    Attributes:
        settings: those of fastppo; one that follows a function holds the function.
        functions: keywords whose value is a function.
        env: the environment, as the program takes it.
        verbose: the program's keyword.
        tensorboard_log: the program's keyword.
    """

    settings: dict[str, Any]
    functions: tuple[str, ...]
    env: Any
    verbose: int
    tensorboard_log: Any


def signature_of(profile: Profile) -> inspect.Signature:
    """Return the signature of a constructor with the profile's keywords, and fastppo's own after them."""
    parameter = inspect.Parameter
    theirs = [
        parameter(
            keyword.name,
            parameter.POSITIONAL_OR_KEYWORD,
            default=parameter.empty if keyword.name in ("policy", "env") else keyword.default,
        )
        for keyword in profile.keywords
    ]
    ours = [parameter(name, parameter.KEYWORD_ONLY, default=False) for name in _NORMALIZE]
    return inspect.Signature([*theirs, *ours, parameter("settings", parameter.VAR_KEYWORD)])


def read_arguments(
    profile: Profile, bound: inspect.BoundArguments, *, legacy: bool, recurrent: bool, masks: bool
) -> Arguments:
    """Return what the arguments of a constructor stand for.

    Args:
        profile: whose keywords they are.
        bound: the arguments, bound to the signature of the profile.
        legacy: whether the program is stable-baselines, on TensorFlow.
        recurrent: whether the algorithm's policies must have memory.
        masks: whether it uses masks of allowed actions.

    Raises:
        ConfigError: a value that can't be honoured; the message names the nearest way.
    """
    bound.apply_defaults()
    keywords = dict(bound.arguments)
    own, env = keywords.pop("settings"), keywords.pop("env")
    normalize = {name: keywords.pop(name) for name in _NORMALIZE}
    settings = translate(profile, keywords)
    policy, policy_kwargs = keywords["policy"], keywords["policy_kwargs"]
    chosen = policy_settings(policy, policy_kwargs, legacy=legacy, recurrent=recurrent) | normalize
    check_settings(own, {*settings_by_keyword(profile), *chosen})
    settings |= chosen
    settings |= {"action_masks": "auto" if masks else "off", "resume_envs": "restart"} | own
    seed = keywords["seed"]
    settings["seed"] = secrets.randbits(31) if seed is None else whole_number("seed", seed)
    functions = tuple(name for name, value in keywords.items() if callable(value) and name != "policy")
    return Arguments(settings, functions, env, keywords["verbose"], keywords["tensorboard_log"])


def changed(profile: Profile, settings: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a file with new values of the constructor's keywords.

    Raises:
        ConfigError: a name that is no such keyword, or whose value can't be changed.
    """
    after = dict(settings)
    translations = {keyword.name: keyword.translate for keyword in profile.keywords}
    for name, value in changes.items():
        translation = translations.get(name)
        if translation is None:
            raise ConfigError(f"load: {name}={value!r} can't be changed; give another keyword of the constructor.")
        after |= translation(value)
    return after


def config_of(settings: Mapping[str, Any], n_envs: int, env_id: str | None = None) -> Config:
    """Return the config of a training in `n_envs` environments."""
    whole = whole_minibatches(dict(settings), n_envs) | {"n_envs": n_envs}
    return Config(**whole if env_id is None else whole | {"env_id": env_id})
