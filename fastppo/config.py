"""Every setting of a run: one flat frozen dataclass whose fields are the flags, with all checks and derived sizes.

A field that is None is "not given": `resolve` fills it from the kind of environment (CleanRL's `ppo.py` for vectors and
discrete actions, `ppo_atari.py` for images, `ppo_continuous_action.py` for Box actions) or from a preset. Resolving a
resolved config changes nothing, so what is stored in a run folder is exactly what ran. The object stops at the trainer:
everything below takes plain values.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import tyro

from fastppo.errors import ConfigError
from fastppo.presets import CLEANRL, TUNED, Kind


def _hint(text: str) -> str:
    return "(default: from the environment)" if text == "None" else f"(default: {text})"


def _hint_none(text: str) -> str:
    return "(default: none)" if text == "None" else f"(default: {text})"


def _json(text: str) -> Any:  # noqa: ANN401 - whatever it holds; checked with the other types
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _arg(*aliases: str, metavar: str | None = None) -> Any:  # noqa: ANN401 - tyro's own marker object
    return tyro.conf.arg(aliases=aliases or None, metavar=metavar, help_behavior_hint=_hint)


EnvKwargs = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: _json(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]


def _number_or_text(text: str) -> Any:  # noqa: ANN401 - as `_json`
    try:
        return float(text)
    except ValueError:
        return text


TargetReturn = Annotated[
    float | Literal["threshold"] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|threshold",
        instance_from_str=lambda args: _number_or_text(args[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    ),
    tyro.conf.arg(help_behavior_hint=_hint_none),
]
_Count = Annotated[int | None, _arg(metavar="INT")]
_Switch = Annotated[bool | None, _arg(metavar="[True|False]")]
_Coefficient = Annotated[float | str | None, _arg(metavar="NUMBER|SCHEDULE")]

SCHEDULED = (
    "learning_rate",
    "clip_coef",
    "value_clip_coef",
    "vf_coef",
    "ent_coef",
    "max_grad_norm",
    "target_kl",
    "gamma",
    "gae_lambda",
)


@dataclasses.dataclass(frozen=True)
class Config:
    """The settings of one run. A field left at None is filled from the environment or the preset by `resolve`.

    Coefficients take a number or a schedule over the planned iterations: `linear:2.5e-4:0`, `cosine:2.5e-4:1e-5`.
    """

    env_id: str = "CartPole-v1"
    """Gymnasium environment id, also `ALE/...` and `module:Env-v0`."""
    env_kwargs: EnvKwargs = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, as a JSON object."""
    seed: int = 1
    """Seed of the environments, the initial weights, the action noise and the shuffling."""
    total_timesteps: _Count = None
    """Environment steps to train for, over all environments (rounded down to whole iterations)."""
    preset: Literal["cleanrl", "tuned"] = "cleanrl"
    """`cleanrl`: CleanRL's defaults for this kind of environment; `tuned`: our measured setting, where there is one."""
    target_return: TargetReturn = None
    """Stop when the mean of the last 100 episodes reaches this; `threshold`: the env's own, where it has one."""

    n_envs: Annotated[int | None, _arg("--num-envs", metavar="INT")] = None
    """Environments stepped together (N)."""
    vectorization: Literal["auto", "sync", "async", "pool", "native", "envpool", "tensor"] = "sync"
    """`sync`: one process; `async`: a process per environment; `pool`: several environments to each of a few processes;
    `native`: the environment's own vector version; `envpool`: EnvPool's; `tensor`: ours, written in torch, on the
    training device (CartPole, Acrobot, Pendulum, MountainCarContinuous, fastppo/Catch); `auto`: the fastest of sync,
    pool and native, measured for a second."""
    workers: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: one for each core)")] = (
        None
    )
    """Processes of the pool."""
    half_batches: bool = False
    """Step the pool in two halves, so that the policy acts on one while workers step the other."""
    n_steps: Annotated[int | None, _arg("--num-steps", metavar="INT")] = None
    """Steps per environment and rollout (T); one iteration is n_envs x n_steps steps."""
    gamma: _Coefficient = None
    """Discount factor."""
    gae_lambda: _Coefficient = None
    """Lambda of generalised advantage estimation."""

    n_minibatches: Annotated[int | None, _arg("--num-minibatches", metavar="INT")] = None
    """Minibatches per epoch; must divide n_envs x n_steps."""
    update_epochs: _Count = None
    """Passes over each rollout, shuffled afresh each time."""
    learning_rate: _Coefficient = None
    """Adam's step size."""
    anneal_lr: _Switch = None
    """Short form of `--learning-rate linear:X:0`."""
    adam_eps: float = 1e-5
    """Adam's epsilon."""
    clip_coef: _Coefficient = None
    """Clip range of the probability ratio."""
    anneal_clip: _Switch = None
    """Short form of `--clip-coef linear:X:0`."""
    value_clip: Annotated[Literal["off", "max", "clipped_only"] | None, _arg()] = None
    """Value loss: plain; the larger of plain and clipped; or the clipped one alone (stable-baselines3's)."""
    value_clip_coef: Annotated[
        float | str | None, tyro.conf.arg(metavar="NUMBER|SCHEDULE", help_behavior_hint="(default: clip_coef)")
    ] = None
    """Clip range of the value loss, in units of the return; negative switches it off."""
    vf_coef: _Coefficient = None
    """Weight of the value loss, which is 0.5 x mean squared error."""
    ent_coef: _Coefficient = None
    """Weight of the entropy bonus."""
    max_grad_norm: _Coefficient = None
    """Gradients are scaled down to this global L2 norm."""
    normalize_advantages: Literal["minibatch", "batch", "off"] = "minibatch"
    """Advantages to mean 0 and standard deviation 1: within each minibatch, once per rollout, or not."""
    target_kl: Annotated[
        float | str | None, tyro.conf.arg(metavar="NUMBER|SCHEDULE", help_behavior_hint="(default: no limit)")
    ] = None
    """End an update early when its KL (k3) passes this times kl_stop_factor."""
    kl_stop: Literal["epoch", "minibatch"] = "epoch"
    """Judge the KL by each epoch's mean after it, or by each minibatch before its step is taken."""
    kl_stop_factor: float = 1.0
    """Factor on target_kl; stable-baselines3 uses 1.5."""

    network: Literal["auto", "mlp", "cnn"] = "auto"
    """`cnn`: the Nature CNN, for uint8 images of 36x36 and more; `mlp`: for the rest."""
    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the MLP's hidden layers."""
    activation: Literal["tanh", "relu", "elu", "gelu", "silu"] = "tanh"
    """Activation of the MLP."""
    shared_trunk: bool = False
    """One MLP trunk for policy and value instead of two (the CNN's is always shared)."""

    normalize_obs: _Switch = None
    """Scale vector observations to mean 0 and variance 1 by running moments."""
    normalize_rewards: _Switch = None
    """Divide rewards by the running standard deviation of the discounted return."""
    obs_clip: float = 10.0
    """Clip range of normalised observations."""
    reward_clip: float = 10.0
    """Clip range of normalised rewards."""
    sign_rewards: _Switch = None
    """Train on the sign of rewards (Atari's reward clipping); logged returns stay raw."""

    device: str = "auto"
    """`auto`, `cpu`, `cuda` or `cuda:K`."""
    act_device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the policy acts while it learns on CUDA: `cpu`, to where it is copied before each rollout, `cuda`, or the
    faster one, measured."""
    threads: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: from the work)")] = None
    """CPU threads of torch; part of what makes a run repeatable to the bit. Not given: one where the work is small."""
    compile: Literal["auto", "on", "off", "graph"] = "auto"
    """Compile update and advantages: several times faster after 10-20 s at the start; `auto`: where the run is long."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """`bf16`: networks under bfloat16 autocast, log-probabilities and losses in float32; pays for wide ones on hardware
    made for it. `fp32` multiplies in TF32 on CUDA."""
    checkpoint_every: Annotated[int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: by time)")] = (
        None
    )
    """Save a checkpoint after so many environment steps, at the end of an iteration; beside --checkpoint-minutes."""
    checkpoint_minutes: float = 10.0
    """Save a checkpoint after so many minutes; 0: never. One is saved at the end, and on Ctrl-C or SIGTERM, anyway."""
    keep_checkpoints: int = 3
    """How many checkpoints to keep, the one that evaluated best aside."""
    resume: Literal["never", "auto"] = "never"
    """`auto`: go on from the newest checkpoint in --run-dir (or in the latest runs/<env>/<name>-<seed>-...), if there
    is one; for jobs that are started again."""
    exact_resume: bool = False
    """Refuse to train where a resumed run would not continue bit for bit."""
    eval_every: Annotated[int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: never)")] = None
    """Play whole episodes in environments of their own after so many steps, and keep the best checkpoint."""
    eval_episodes: int = 10
    """How many."""
    on_env_error: Literal["fail", "restart"] = "fail"
    """An environment that raises, or a pool worker that dies or hangs: end the run, or make it anew and cut its
    episode. For sync and pool."""
    env_restarts: int = 10
    """How many times that may happen in a run."""
    env_timeout: Annotated[float | None, tyro.conf.arg(metavar="SECONDS", help_behavior_hint="(default: none)")] = None
    """Seconds that a step or reset of a pool worker's (or all async) environments may take."""
    strict_obs: bool = False
    """End the run when an observation lies outside its observation_space, instead of one warning."""
    max_skipped: int = 20
    """End the run after so many minibatches in a row whose gradient was not finite; what led there is kept for
    `fastppo replay`."""
    record_ratios: Annotated[
        int | None, tyro.conf.arg(metavar="ITERATIONS", help_behavior_hint="(default: up to 20 times in a run)")
    ] = None
    """Look into one update of so many, for the report's plots of ratios; 0: into none."""
    log_histograms: bool = False
    """Log histograms of weights, gradients, actions and ratios of those updates."""
    video_every: Annotated[int | None, tyro.conf.arg(metavar="STEPS", help_behavior_hint="(default: never)")] = None
    """Video an episode after so many steps, for TensorBoard (extra `video`)."""
    track: tuple[Literal["wandb", "mlflow"], ...] = ()
    """Log to these too (extras `wandb`, `mlflow`), set up by their own environment variables."""
    name: str = "ppo"
    """First part of the run folder's name, runs/<env>/<name>-<seed>-<time>/."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/...)")] = None
    """Write the run exactly here instead; the folder must be new or empty."""
    init_from: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """Start from the policy (and normalisers) of this run folder."""

    def __post_init__(self) -> None:
        """Check every field by itself, and the batch where its parts are known."""
        _check_types(self)
        _check_ranges(self)
        _check_combinations(self)

    @property
    def batch_size(self) -> int:
        """Rows of one rollout, n_envs x n_steps."""
        return _known(self.n_envs) * _known(self.n_steps)

    @property
    def minibatch_size(self) -> int:
        """Rows of one minibatch."""
        return self.batch_size // _known(self.n_minibatches)

    @property
    def n_iterations(self) -> int:
        """Planned iterations: total_timesteps // batch_size, at least one."""
        return max(1, _known(self.total_timesteps) // self.batch_size)

    def schedule(self, name: str) -> float | str:
        """The coefficient `name` as a number or a schedule, with the short forms `anneal_lr`, `anneal_clip` applied."""
        value: float | str | None = getattr(self, name)
        if value is None and name == "value_clip_coef":
            return self.schedule("clip_coef")
        if value is None and name == "target_kl":
            return math.inf
        short = {"learning_rate": self.anneal_lr, "clip_coef": self.anneal_clip}.get(name)
        if short and not isinstance(value, str):
            return f"linear:{value!r}:0"
        assert value is not None, f"{name} of a config that isn't resolved"
        return value

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able values, from which `from_dict` makes an equal config."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {
            key: str(value) if isinstance(value, Path) else list(value) if isinstance(value, tuple) else value
            for key, value in values.items()
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str = "config") -> Config:
        """A config from plain values, as TOML and JSON hold them.

        Raises:
            ConfigError: an unknown key (with the nearest known one), or anything the constructor refuses.
        """
        known = [field.name for field in dataclasses.fields(cls)]
        given: dict[str, Any] = {}
        for key, value in values.items():
            name = ALIASES.get(key.replace("-", "_"), key.replace("-", "_"))
            if name not in known:
                near = difflib.get_close_matches(name, [*known, *ALIASES], n=1)
                hint = f"did you mean {near[0]}?" if near else "see `fastppo train --help` for the settings."
                raise ConfigError(f"{source}: unknown setting {key!r}; {hint}")
            if name in given:
                raise ConfigError(f"{source}: {name} is given twice, once by another of its names; keep one.")
            given[name] = value
        for name in ("hidden_sizes", "track"):
            if isinstance(given.get(name), list):
                given[name] = tuple(given[name])
        for name in ("run_dir", "init_from"):
            if isinstance(given.get(name), str):
                given[name] = Path(given[name])
        return cls(**given)


ALIASES = {"num_envs": "n_envs", "num_steps": "n_steps", "num_minibatches": "n_minibatches"}


def resolve(config: Config, kind: Kind, *, atari: bool = False, reward_threshold: float | None = None) -> Config:
    """Fill every field that was not given.

    Args:
        config: what the user gave.
        kind: of the environment: "image" by its observations, else "continuous" or "discrete" by its actions.
        atari: the environment is an ALE game, whose rewards are trained on by their sign.
        reward_threshold: the environment's own, for `target_return="threshold"`.

    Returns:
        A config without open fields, except those whose None means "none" (target_kl, target_return, ...).

    Raises:
        ConfigError: the batch doesn't divide, or settings contradict each other.
    """
    defaults = dict(CLEANRL[kind])
    defaults["sign_rewards"] = atari
    if config.preset == "tuned":
        defaults |= TUNED.get(config.env_id, {})
    # a schedule spelled out leaves nothing for the short form to do
    defaults.setdefault("anneal_lr", True)
    defaults.setdefault("anneal_clip", False)
    if isinstance(config.learning_rate, str):
        defaults["anneal_lr"] = False
    if isinstance(config.clip_coef, str):
        defaults["anneal_clip"] = False
    if config.normalize_rewards:
        defaults["sign_rewards"] = False
    if config.sign_rewards:
        defaults["normalize_rewards"] = False
    changes = {name: value for name, value in defaults.items() if getattr(config, name) is None}
    if config.target_return == "threshold":
        changes["target_return"] = reward_threshold
    return dataclasses.replace(config, **changes)


def load_toml(path: Path) -> dict[str, Any]:
    """The settings in a TOML file.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except OSError as error:
        raise ConfigError(f"--config {path}: can't be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error}).") from None


def parse_schedule(text: str, name: str = "schedule") -> tuple[str, float, float]:
    """`linear:A:B`, `cosine:A:B` or `constant:A` as (shape, start, end).

    Raises:
        ConfigError: any other text.
    """
    shape, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if shape == "constant" and len(values) == 1:
        return shape, values[0], values[0]
    if shape in ("linear", "cosine") and len(values) == 2:
        return shape, values[0], values[1]
    raise ConfigError(
        f"{name}={text!r} is neither a number nor a schedule; "
        "use 2.5e-4, constant:2.5e-4, linear:2.5e-4:0 or cosine:2.5e-4:0."
    )


_T = TypeVar("_T")


def _known(value: _T | None) -> _T:
    assert value is not None, "asked of a config that isn't resolved"
    return value


def _accepts(value: object, hint: object) -> bool:
    """Whether a plain value fits one of the annotations that Config uses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _accepts(value, args[0])
    if origin in (types.UnionType, typing.Union):
        return any(_accepts(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(_accepts(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.cast("type", hint))


def _choices(hint: object) -> list[str]:
    """Every text that an annotation's Literals allow."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(args)
    return [choice for arg in args for choice in _choices(arg)]


def _describe(hint: object) -> str:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return _describe(args[0])
    if origin in (types.UnionType, typing.Union):
        return " or ".join(_describe(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {_describe(args[0])}"
    if origin is dict:
        return 'a table of keyword arguments, as JSON: {"gravity": 9.81}'
    return "a path" if hint is Path else "text" if hint is str else str(getattr(hint, "__name__", hint))


def _check_types(config: Config) -> None:
    try:
        json.dumps(config.env_kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"env_kwargs={config.env_kwargs!r} can't be stored as JSON ({error}); use plain values."
        ) from None
    hints = typing.get_type_hints(Config, include_extras=True)
    for name, hint in hints.items():
        value = getattr(config, name)
        if not _accepts(value, hint):
            near = ""
            if isinstance(value, str):
                match = difflib.get_close_matches(value, _choices(hint), n=1)
                near = f"; did you mean {match[0]}?" if match else ""
            raise ConfigError(f"{name}={value!r} must be {_describe(hint)}{near or '.'}")


# name: (lowest, highest); an open end is a value that is itself not allowed
_RANGES: dict[str, tuple[float, float]] = {
    "seed": (0, 2**63 - 1),
    "total_timesteps": (1, 10**15),
    "n_envs": (1, math.inf),
    "n_steps": (1, math.inf),
    "n_minibatches": (1, math.inf),
    "update_epochs": (1, math.inf),
    "threads": (1, 1024),
    "workers": (1, 1024),
    "learning_rate": (0, math.inf),
    "gamma": (0, 1),
    "gae_lambda": (0, 1),
    "clip_coef": (0, math.inf),
    "value_clip_coef": (-math.inf, math.inf),
    "vf_coef": (0, math.inf),
    "ent_coef": (0, math.inf),
    "max_grad_norm": (0, math.inf),
    "target_kl": (0, math.inf),
    "kl_stop_factor": (0, math.inf),
    "adam_eps": (0, math.inf),
    "obs_clip": (0, math.inf),
    "reward_clip": (0, math.inf),
    "target_return": (-math.inf, math.inf),
    "checkpoint_every": (1, math.inf),
    "checkpoint_minutes": (0, math.inf),
    "keep_checkpoints": (2, math.inf),
    "eval_every": (1, math.inf),
    "eval_episodes": (1, math.inf),
    "env_restarts": (1, math.inf),
    "env_timeout": (0, math.inf),
    "max_skipped": (1, math.inf),
    "record_ratios": (0, math.inf),
    "video_every": (1, math.inf),
}
_POSITIVE: tuple[str, ...] = ("max_grad_norm", "target_kl", "kl_stop_factor", "adam_eps", "obs_clip", "reward_clip")
_POSITIVE += ("env_timeout",)


def _check_number(name: str, given: object, number: float) -> None:
    low, high = _RANGES[name]
    if isinstance(number, int) and abs(number) >= 2**1000:  # no float can hold it
        raise ConfigError(f"{name} has {len(str(number)):,} digits; it must be a number that means something.")
    if math.isnan(number) or math.isinf(number):
        raise ConfigError(f"{name}={given!r} must be a finite number.")
    if name in _POSITIVE and number <= 0:
        raise ConfigError(f"{name}={given!r} must be greater than 0.")
    if number < low:
        raise ConfigError(f"{name}={given!r} must be at least {_typed(low)}; nearest valid value: {_typed(low)}.")
    if number > high:
        raise ConfigError(f"{name}={given!r} must be at most {_typed(high)}; nearest valid value: {_typed(high)}.")


def _typed(bound: float) -> str:
    """A bound as it may be typed."""
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _check_ranges(config: Config) -> None:
    for name in _RANGES:
        value = getattr(config, name)
        if value is None or value == "threshold":
            continue
        for number in parse_schedule(value, name)[1:] if isinstance(value, str) else (value,):
            _check_number(name, value, number)
    for size in config.hidden_sizes:
        if size < 1:
            raise ConfigError(f"hidden_sizes={list(config.hidden_sizes)} must be widths of at least 1.")
    if not config.hidden_sizes:
        raise ConfigError("hidden_sizes=[] must name at least one layer, such as 64 64.")
    if config.name != Path(config.name).name or config.name.startswith(".") or "\0" in config.name or not config.name:
        raise ConfigError(f"name={config.name!r} must be a plain folder name, without '/', '..' or a leading dot.")
    device = config.device.split(":")
    if (
        device[0] not in ("auto", "cpu", "cuda")
        or len(device) > 2
        or (len(device) == 2 and not (device[0] == "cuda" and device[1].isdecimal()))
    ):
        raise ConfigError(f"device={config.device!r} must be auto, cpu, cuda or cuda:K.")


def _check_combinations(config: Config) -> None:
    if config.anneal_lr and isinstance(config.learning_rate, str):
        raise ConfigError(f"anneal_lr and learning_rate={config.learning_rate!r} both give a schedule; keep one.")
    if config.anneal_clip and isinstance(config.clip_coef, str):
        raise ConfigError(f"anneal_clip and clip_coef={config.clip_coef!r} both give a schedule; keep one.")
    if config.sign_rewards and config.normalize_rewards:
        raise ConfigError("sign_rewards and normalize_rewards both rescale the rewards; switch one off.")
    if config.vectorization != "pool" and (config.workers or config.half_batches):
        name = "workers" if config.workers else "half_batches"
        raise ConfigError(
            f"{name} is for vectorization=pool, not {config.vectorization}; leave it out or use the pool."
        )
    if config.on_env_error == "restart" and config.vectorization not in ("auto", "sync", "pool"):
        raise ConfigError(
            f"on_env_error=restart is for vectorization=sync and pool, not {config.vectorization}; leave it out."
        )
    if config.env_timeout is not None and config.vectorization not in ("auto", "pool", "async"):
        raise ConfigError(
            f"env_timeout is for worker processes, not vectorization={config.vectorization}; "
            "use the pool, or leave it out."
        )
    if config.act_device == "cpu" and config.vectorization == "tensor":
        raise ConfigError("act_device=cpu with vectorization=tensor: those environments live where the policy learns.")
    if config.half_batches and config.n_envs == 1:
        raise ConfigError("half_batches=True with n_envs=1: one environment has no halves; leave it out.")
    if None in (config.n_envs, config.n_steps, config.n_minibatches):
        return
    batch, parts = config.batch_size, _known(config.n_minibatches)
    if batch % parts:
        below = max(d for d in range(1, min(parts, batch) + 1) if batch % d == 0)
        above = next((d for d in range(parts, batch + 1) if batch % d == 0), None)
        near = f"{below}, {above}" if above else f"{below}"
        raise ConfigError(
            f"n_minibatches={parts} does not divide the batch of {batch} "
            f"(n_envs={config.n_envs} x n_steps={config.n_steps}); nearest that do: {near}."
        )
