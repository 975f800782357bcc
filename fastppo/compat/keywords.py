"""The keywords of those constructors as settings; one that can't be honoured raises, with the nearest way."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Collection, Mapping
from typing import Any

from fastppo.config import Config
from fastppo.errors import ConfigError
from fastppo.profiles import Profile

Schedule = Callable[[float], float]  # remaining progress, from 1 to 0 -> value

# Keywords without a setting: the values that mean what happens here anyway, and the nearest way to another
_ACCEPTED: dict[str, tuple[tuple[Any, ...], str]] = {
    "use_sde": ((False,), "state_dependent_std=True makes the noise depend on the state"),
    "sde_sample_freq": ((-1,), "fastppo draws noise at every step"),
    "rollout_buffer_class": ((None,), "fastppo has one storage; write a loop over fastppo.Trainer instead"),
    "rollout_buffer_kwargs": ((None, {}), "fastppo has one storage; write a loop over fastppo.Trainer instead"),
    "stats_window_size": ((100,), "the mean return is that of the last 100 episodes"),
    "_init_setup_model": ((True,), "the constructor always builds the network"),
    "n_cpu_tf_sess": ((None, 1), "give threads=2, the threads of torch"),
}
_OF_THE_RUN = ("policy", "env", "verbose", "tensorboard_log", "policy_kwargs", "seed")

_POLICIES: dict[str, dict[str, Any]] = {
    "MlpPolicy": {"network": "mlp"},
    "CnnPolicy": {"network": "cnn"},
    "MultiInputPolicy": {"network": "auto"},
}
# names of the classes behind stable-baselines3's aliases
_CLASSES = {
    "ActorCriticPolicy": "MlpPolicy",
    "ActorCriticCnnPolicy": "CnnPolicy",
    "MultiInputActorCriticPolicy": "MultiInputPolicy",
    "MaskableActorCriticPolicy": "MlpPolicy",
    "MaskableActorCriticCnnPolicy": "CnnPolicy",
    "MaskableMultiInputActorCriticPolicy": "MultiInputPolicy",
    "RecurrentActorCriticPolicy": "MlpLstmPolicy",
    "RecurrentActorCriticCnnPolicy": "CnnLstmPolicy",
    "RecurrentMultiInputActorCriticPolicy": "MultiInputLstmPolicy",
}
_LSTM_UNITS = 256  # of RecurrentPPO and of PPO2's recurrent policies
_ACTIVATIONS = ("tanh", "relu", "elu", "gelu", "silu")
_OWN_NETWORK = "give fastppo.Trainer your own network"


def translate(profile: Profile, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings for a constructor's keywords; those that follow a function hold the function.

    Args:
        profile: of the program.
        given: every keyword of the constructor, defaults included.

    Raises:
        ConfigError: a keyword has a value that can't be honoured.
    """
    with_setting = {keyword.name for keyword in profile.keywords if keyword.translate is not None}
    for name, value in given.items():
        if name in _ACCEPTED:
            values, way = _ACCEPTED[name]
            if not any(value is x or (value == x and type(value) is type(x)) for x in values):
                raise ConfigError(f"{name}={value!r} can't be honoured: {way}; or leave it out.")
        elif name not in with_setting and name not in _OF_THE_RUN:
            raise ConfigError(f"{name}={value!r} can't be honoured; leave it out.")
    value_clip = given.get("clip_range_vf")
    if isinstance(value_clip, (int, float)) and value_clip <= 0:
        raise ConfigError(f"clip_range_vf={value_clip!r} must be positive; None switches value clipping off.")
    if given.get("schedule", "linear") not in ("linear", "constant"):
        raise ConfigError(f"schedule={given['schedule']!r} must be linear or constant.")
    return profile.translate({name: value for name, value in given.items() if name in with_setting})


def settings_by_keyword(profile: Profile) -> set[str]:
    """Return the settings that a keyword of the program stands for, unlike the facts of its code."""
    return {name for keyword in profile.keywords for name in keyword.settings}


def whole_number(name: str, value: Any) -> int:  # noqa: ANN401 - what a script gives
    """Return a whole number as an int, also numpy's, and a float without a fraction such as 1e6.

    Raises:
        ConfigError: it is something else.
    """
    if isinstance(value, numbers.Real) and (number := float(value)).is_integer():
        return int(number)
    raise ConfigError(f"{name}={value!r} must be a whole number.")


def without_functions(settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Schedule]]:
    """Return settings with the first value of each function in its place, and the functions by setting.

    Raises:
        ConfigError: a function returns no number there.
    """
    schedules = {name: value for name, value in settings.items() if callable(value)}
    plain = {**settings, **{name: _first_value(name, function) for name, function in schedules.items()}}
    if "clip_coef" in schedules and plain.get("value_clip_coef") is None:  # which then is the clip range
        schedules["value_clip_coef"] = schedules["clip_coef"]
    return plain, schedules


def _first_value(name: str, function: Schedule) -> float:
    try:
        return float(function(1.0))
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{name}: the function must return a number for the remaining progress, from 1 to 0 "
            f"({type(error).__name__}: {error})."
        ) from None


def whole_minibatches(settings: dict[str, Any], n_envs: int) -> dict[str, Any]:
    """Replace `minibatch_size` by n_minibatches, and by a segment length for a policy with memory.

    Raises:
        ConfigError: it doesn't divide the rollout.
    """
    if "minibatch_size" not in settings:
        return settings
    rest = {name: value for name, value in settings.items() if name != "minibatch_size"}
    rows, n_steps = settings["minibatch_size"], whole_number("n_steps", rest["n_steps"])
    rows = None if rows is None else whole_number("a minibatch's rows", rows)
    rest["n_steps"], batch = n_steps, n_steps * n_envs
    if rows is None or rows >= batch:
        return rest | {"n_minibatches": 1}
    if rows < 1 or batch % rows:
        below = max(d for d in range(1, min(max(rows, 1), batch) + 1) if batch % d == 0)
        above = next(d for d in range(max(rows, 1), batch + 1) if batch % d == 0)
        near = ", ".join(str(d) for d in dict.fromkeys((below, above)))
        raise ConfigError(
            f"minibatches of {rows} rows don't divide the rollout of {batch} (n_steps={n_steps} x {n_envs} "
            f"environments); nearest that do: {near}."
        )
    more = {"segment_length": math.gcd(n_steps, rows)} if rest.get("memory", "none") != "none" else {}
    return rest | {"n_minibatches": batch // rows} | more


def policy_settings(policy: Any, kwargs: Mapping[str, Any] | None, *, legacy: bool, recurrent: bool) -> dict[str, Any]:  # noqa: ANN401
    """Return the settings for a policy and its arguments.

    Args:
        policy: its name, or the class of stable-baselines3.
        kwargs: `policy_kwargs`.
        legacy: whether they are stable-baselines': `layers`, `act_fun`, and a plain `net_arch` shares its layers.
        recurrent: whether the algorithm needs a policy with memory.

    Raises:
        ConfigError: another policy, or an argument that can't be honoured.
    """
    name = policy if isinstance(policy, str) else getattr(policy, "__name__", type(policy).__name__)
    name = _CLASSES.get(name, name)
    plain = name.replace("LstmPolicy", "Policy")
    has_memory = plain != name
    names = [p.replace("Policy", "LstmPolicy") for p in _POLICIES] if recurrent else [*_POLICIES]
    if legacy:
        names = ["MlpPolicy", "CnnPolicy", "MlpLstmPolicy", "CnnLstmPolicy"]
    if name not in names:
        raise ConfigError(f"policy={name!r} must be {' or '.join(names)}; for a network of your own, {_OWN_NETWORK}.")
    if kwargs is not None and not isinstance(kwargs, Mapping):
        raise ConfigError(f"policy_kwargs={kwargs!r} must be a dict, such as dict(net_arch=[64, 64]).")
    settings = dict(_POLICIES[plain])
    if has_memory:
        settings |= {"memory": "lstm", "memory_size": _LSTM_UNITS}
    for key, value in (kwargs or {}).items():
        settings |= _policy_keyword(key, value, legacy=legacy, has_memory=has_memory, network=settings["network"])
    return settings


def _policy_keyword(name: str, value: Any, *, legacy: bool, has_memory: bool, network: str) -> dict[str, Any]:  # noqa: ANN401
    if name == ("act_fun" if legacy else "activation_fn"):
        return {"activation": _activation(name, value)}
    if name == "net_arch" or (legacy and name == "layers"):
        return _net_arch(name, value, legacy=legacy and name == "net_arch", network=network)
    if name == "optimizer_kwargs" and not legacy:
        return _optimizer(value)
    if has_memory and name == ("n_lstm" if legacy else "lstm_hidden_size"):
        return {"memory_size": value}
    default, way = (_LEGACY_POLICY if legacy else _POLICY).get(name, (None, ""))
    if not way:
        raise ConfigError(f"policy_kwargs: there is no {name!r} here; {_OWN_NETWORK}.")
    if not _is(value, default):
        raise ConfigError(f"policy_kwargs: {name}={_name(value)} can't be honoured: {way}; or leave it out.")
    return {}


_ORTHOGONAL = "fastppo's initial weights are orthogonal; " + _OWN_NETWORK
_POLICY: dict[str, tuple[Any, str]] = {
    "ortho_init": (True, _ORTHOGONAL),
    "use_sde": (False, "state_dependent_std=True makes the noise depend on the state"),
    "log_std_init": (0.0, "the standard deviation starts at 1; " + _OWN_NETWORK),
    "full_std": (True, "it belongs to use_sde"),
    "use_expln": (False, "it belongs to use_sde"),
    "squash_output": (False, 'action_distribution="squashed" takes the tanh of a Gaussian'),
    "features_extractor_class": (("FlattenExtractor", "NatureCNN", "CombinedExtractor"), _OWN_NETWORK),
    "features_extractor_kwargs": ((None, {}), _OWN_NETWORK),
    "share_features_extractor": (True, "the CNN is shared; " + _OWN_NETWORK),
    "normalize_images": (True, "images are divided by 255"),
    "optimizer_class": (("Adam",), "fastppo steps by Adam"),
    "n_lstm_layers": (1, "fastppo's memory is one layer; " + _OWN_NETWORK),
    "shared_lstm": (False, "shared_trunk=True shares trunk and memory"),
    "enable_critic_lstm": (True, "policy and value have a memory each; " + _OWN_NETWORK),
    "lstm_kwargs": ((None, {}), _OWN_NETWORK),
}
_LEGACY_POLICY: dict[str, tuple[Any, str]] = {
    "feature_extraction": (("mlp", "cnn"), "the policy's name decides it"),
    "layer_norm": (False, _OWN_NETWORK),
    "cnn_extractor": (("nature_cnn",), _OWN_NETWORK),
}


def _is(value: Any, accepted: Any) -> bool:  # noqa: ANN401 - any values
    """Whether `value` is an accepted one; classes and functions by their name."""
    values = accepted if isinstance(accepted, tuple) else (accepted,)
    return any(value is x or value == x or getattr(value, "__name__", None) == x for x in values)


def _name(value: Any) -> str:  # noqa: ANN401 - any value
    return str(getattr(value, "__name__", repr(value)))


def _activation(name: str, value: Any) -> str:  # noqa: ANN401 - a class, a function or a name
    found = _name(value).strip("'").lower()
    if found not in _ACTIVATIONS:
        raise ConfigError(f"policy_kwargs: {name}={_name(value)} must be one of {', '.join(_ACTIVATIONS)}.")
    return found


def _net_arch(name: str, value: Any, *, legacy: bool, network: str) -> dict[str, Any]:  # noqa: ANN401 - nested lists
    """Return the hidden layers; those of policy and value must be equal.

    In stable-baselines the numbers before the dict are shared layers, and there may be no dict.
    """
    if network == "cnn":
        if value in (None, []):
            return {}
        raise ConfigError(f"policy_kwargs: {name}={value!r} can't be honoured: layers after the CNN are fixed.")
    if value is None:
        return {}
    branches = value
    if isinstance(value, (list, tuple)) and len(value) == 1 and isinstance(value[0], Mapping):
        branches = value[0]
    if isinstance(branches, Mapping):
        pi, vf = (_units(branches.get(branch, [])) for branch in ("pi", "vf"))
        if pi != vf:
            raise ConfigError(
                f"policy_kwargs: {name} has other layers for the policy ({pi}) than for the value ({vf}); make them "
                f"equal, or {_OWN_NETWORK}."
            )
        sizes, shared = pi, False
    else:
        sizes, shared = _units(branches), legacy
    if not sizes or not all(isinstance(size, numbers.Integral) and not isinstance(size, bool) for size in sizes):
        raise ConfigError(
            f"policy_kwargs: {name}={value!r} must name the units of at least one hidden layer, such as [64, 64]; or "
            f"{_OWN_NETWORK}."
        )
    return {"hidden_sizes": tuple(int(size) for size in sizes), "shared_trunk": shared}


def _units(value: Any) -> list[Any]:  # noqa: ANN401 - what a script gives
    return list(value) if isinstance(value, (list, tuple)) else [value]


def _optimizer(value: Any) -> dict[str, Any]:  # noqa: ANN401 - what a script gives
    if value is not None and not isinstance(value, Mapping):
        raise ConfigError(f"policy_kwargs: optimizer_kwargs={value!r} must be a dict, such as dict(eps=1e-5).")
    for name, number in (value or {}).items():
        if name != "eps":
            raise ConfigError(f"policy_kwargs: optimizer_kwargs {name}={number!r} can't be honoured: only eps can.")
    return {"adam_eps": value["eps"]} if value else {}


# Settings that policy, env, seed, tensorboard_log and learn's arguments decide
_BY_KEYWORD = (
    "env_id",
    "n_envs",
    "n_minibatches",
    "seed",
    "run_dir",
    "total_timesteps",
    "log_every",
    "profile",
    "resume",
)


def check_settings(settings: Mapping[str, Any], by_keyword: Collection[str]) -> None:
    """Check the settings of fastppo that were given beside the keywords.

    Raises:
        ConfigError: there is no such setting, or a keyword stands for it.
    """
    if Config.from_dict(settings, "keywords").rnd:
        raise ConfigError(
            "rnd=True can't be honoured: each learn would begin with new RND networks; use fastppo.Trainer."
        )
    for name in settings:
        if name in by_keyword or name in _BY_KEYWORD:
            raise ConfigError(f"{name}={settings[name]!r}: another keyword stands for this setting; use that one.")
