"""Construction of one environment, the same for every backend. Imports no torch, so that workers start fast."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import functools
import importlib
import itertools
import multiprocessing
import random
import signal
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import VectorEnv

from fastppo.envs.pack_observation import PackObservation, sample_action
from fastppo.errors import ENV_ERRORS, ConfigError, EnvStartError, FastPPOError, cause_line, first_line, kind_of
from fastppo.spaces.packing import PackedSpace

MakeEnv = Callable[[], "gym.Env[Any, Any]"]

# The Atari preprocessing of every backend (Machado et al. 2018); the id decides about sticky actions
ATARI_NOOP_MAX, ATARI_FRAME_SKIP, ATARI_SIZE, ATARI_STACK = 30, 4, 84, 4

gym.register("fastppo/Catch-v0", entry_point="fastppo.envs.tensor.catch_env:CatchEnv", reward_threshold=0.95)


class CopyObservation(gym.ObservationWrapper[Any, Any, Any]):
    """Copies observations of an environment that returns the same array at every step."""

    def observation(self, observation: Any) -> Any:  # noqa: ANN401 - whatever the space holds
        """Return a copy of an array; other observations are immutable."""
        return observation.copy() if isinstance(observation, np.ndarray) else observation


@dataclasses.dataclass(frozen=True)
class EnvFactory:
    """Makes one environment, in this process or in a worker.

    Attributes:
        env_id: Gymnasium id, unless `make` is given.
        env_kwargs: the environment's keyword arguments.
        copy_obs: whether its observations must be copied (see `CopyObservation`).
        make: the user's own constructor.
        wrappers: "module:name" of each wrapper, the innermost first; they come on top of the Atari preprocessing.
        packed: the space of its rows; None: its observations are single arrays.
        quiet: whether to drop warnings of the constructor, which the first environment has shown.
    """

    env_id: str
    env_kwargs: dict[str, Any]
    copy_obs: bool = False
    make: MakeEnv | None = None
    wrappers: tuple[str, ...] = ()
    packed: PackedSpace | None = None
    quiet: bool = False

    def __call__(self) -> gym.Env[Any, Any]:
        """Make the environment, with the Atari preprocessing if it is an ALE game."""
        if multiprocessing.parent_process() is not None:
            # Ctrl-C reaches the whole process group; the trainer alone ends workers
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        with warnings.catch_warnings():
            if self.quiet:
                warnings.simplefilter("ignore")
            env = self._make()
            if isinstance(env, gym.Env):  # `inspect_env` refuses wrappers of anything else
                for name in self.wrappers:
                    env = wrap(env, name)
        if self.packed is not None:  # packing copies
            return PackObservation(env, self.packed)
        return CopyObservation(env) if self.copy_obs else env

    def _make(self) -> gym.Env[Any, Any]:
        env: gym.Env[Any, Any]
        if self.make is not None:
            env = self.make()
        elif is_atari(find_spec(self.env_id)):
            env = gym.make(self.env_id, frameskip=1, **self.env_kwargs)
            env = gym.wrappers.AtariPreprocessing(
                env, noop_max=ATARI_NOOP_MAX, frame_skip=ATARI_FRAME_SKIP, screen_size=ATARI_SIZE
            )
            # zeros before the first frame, as in ALE's own vector environment
            env = gym.wrappers.FrameStackObservation(env, ATARI_STACK, padding_type="zero")
        else:
            env = gym.make(self.env_id, **self.env_kwargs)
        return env


def wrap(env: gym.Env[Any, Any], name: str) -> gym.Env[Any, Any]:
    """Return `env` in the wrapper `name`, "module:attribute".

    Raises:
        ConfigError: it can't be imported, or refuses the environment.
    """
    module, _, attribute = name.partition(":")
    found = _import(module, f"wrappers: {name}")
    wrapper = getattr(found, attribute, None)
    if wrapper is None:
        near = difflib.get_close_matches(attribute, dir(found), n=1)
        hint = f"; did you mean {module}:{near[0]}?" if near else "."
        raise ConfigError(f"wrappers: {module} has no {attribute}{hint}")
    try:
        wrapped = wrapper(env)
    except ENV_ERRORS as error:
        raise ConfigError(
            f"wrappers: {name} refuses the environment ({type(error).__name__}: {first_line(error)}); it is called "
            "with the environment alone: for other arguments name a function of your own that passes them."
        ) from error
    if not isinstance(wrapped, gym.Env):
        raise ConfigError(f"wrappers: {name} returned {type(wrapped).__name__}; it must return a gymnasium Env.")
    return wrapped


def _import(module: str, setting: str) -> types.ModuleType:
    """Import the module that `setting` names.

    Raises:
        ConfigError: there is no such module, or its own code fails.
    """
    try:
        return importlib.import_module(module)
    except ENV_ERRORS as error:
        missing = isinstance(error, ModuleNotFoundError) and error.name == module.partition(".")[0]
        where = "; modules are searched in the working folder, PYTHONPATH and the installed packages" if missing else ""
        why = error if isinstance(error, (ImportError, SyntaxError)) else cause_line(error)
        raise ConfigError(f"{setting}: can't import {module} ({why}){where}.") from error


def is_atari(spec: gym.envs.registration.EnvSpec) -> bool:
    """Return whether the id is an ALE game."""
    return "ale_py" in str(spec.entry_point)


def find_spec(env_id: str) -> gym.envs.registration.EnvSpec:
    """Return Gymnasium's registration of `env_id`, after importing the modules that it needs.

    Raises:
        ConfigError: no such id (names the nearest one), or a missing package.
    """
    if env_id.startswith("ALE/") or "NoFrameskip" in env_id:
        try:
            import ale_py
        except ImportError:
            raise ConfigError(
                f"env_id={env_id!r} needs ale-py; install it with: pip install 'fastppo[atari]'."
            ) from None
        gym.register_envs(ale_py)
    module, _, name = env_id.rpartition(":")
    if module:
        _import(module, f"env_id={env_id!r}")
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        if module:
            raise ConfigError(
                f"env_id={env_id!r}: {module} was imported, but registers no environment {name!r}; "
                "register it there with gymnasium.register, or use make_env from Python."
            ) from None
        near = _nearest_id(name)
        hint = f"did you mean {near}?" if near else "see gymnasium.pprint_registry() for the known ones."
        reason = "is deprecated" if isinstance(error, gym.error.DeprecatedEnv) else "is not a registered environment"
        raise ConfigError(f"env_id={env_id!r} {reason}; {hint}") from None


def _nearest_id(env_id: str) -> str | None:
    """Return the registered id closest to `env_id`: one of its name in another namespace, version or case, if any."""
    parsed = {other: _parse_id(other) for other in gym.registry}
    space, name, version = _parse_id(env_id)

    def closeness(other: str) -> tuple[bool, bool, bool, int]:
        its_space, _, its_version = parsed[other]
        return bool(space) and its_space == space, its_version == version, its_space == space, its_version

    if same := [other for other in gym.registry if parsed[other][1] == name]:
        return max(same, key=closeness)
    within = [other for other in gym.registry if space and parsed[other][0] == space]
    for candidates in (within, list(gym.registry)):
        if near := difflib.get_close_matches(env_id, candidates, n=1, cutoff=0.5):
            return near[0]
    return None


def _parse_id(env_id: str) -> tuple[str, str, int]:
    """Return namespace, name and version of an id in lower case; version -1: it has none."""
    space, _, rest = env_id.lower().rpartition("/")
    name, dash, version = rest.rpartition("-v")
    return (space, name, int(version)) if dash and version.isdecimal() else (space, rest, -1)


def build(factory: EnvFactory) -> gym.Env[Any, Any]:
    """Call `factory` in this process and turn every exception into an error of one line.

    Raises:
        ConfigError: a missing package, or keyword arguments that the environment or gymnasium.make refuses.
        EnvStartError: any other exception of the environment's constructor or of make_env.
    """
    maker = f"env_id={factory.env_id!r}" if factory.make is None else "make_env"
    try:
        return factory()
    except FastPPOError:
        raise
    except (ModuleNotFoundError, gym.error.DependencyNotInstalled) as error:
        raise ConfigError(f"{maker} needs a package that isn't installed: {first_line(error)}") from error
    except ENV_ERRORS as error:
        if factory.make is None and isinstance(error, (TypeError, ValueError, gym.error.Error)):
            raise ConfigError(f"{maker} with env_kwargs={factory.env_kwargs}: {first_line(error)}") from error
        raise EnvStartError(f"{maker} failed: {cause_line(error)}.") from error


_OLD_GYM = "wrap an environment of the old Gym with shimmy, or adapt it to gymnasium.Env"
_RESULTS = {"reset": ("obs", "info"), "step": ("obs", "reward", "terminated", "truncated", "info")}


def reuses_observations(env: gym.Env[Any, Any]) -> bool:
    """Return whether a reset or step of `env` overwrites an observation that it returned before.

    Such observations must be copied, or the last one of an episode is lost.

    Raises:
        EnvStartError: its first resets and steps fail, or don't return what Gymnasium's do.
    """
    kept: list[tuple[Any, list[bytes]]] = []  # observations and their bytes

    def keep(obs: Any) -> None:  # noqa: ANN401 - whatever the space holds
        kept.append((obs, [x.tobytes() for x in _arrays(obs)]))

    obs, info = first_reset(env)
    keep(obs)
    for _ in range(2):
        action = sample_action(env, obs, info)
        obs, _, terminated, truncated, info = _first_call(env, "step", functools.partial(env.step, action))
        keep(obs)
        if np.any(terminated) or np.any(truncated):
            break
    keep(_first_call(env, "reset", env.reset)[0])
    # parts of a Dict or Tuple may well be one array throughout, such as a goal; it matters only if they change
    arrays = [obs for obs, _ in kept if isinstance(obs, np.ndarray)]
    shared = any(np.shares_memory(a, b) for a, b in itertools.combinations(arrays, 2))
    return shared or any([x.tobytes() for x in _arrays(obs)] != before for obs, before in kept)


def _arrays(obs: Any) -> list[np.ndarray[Any, Any]]:  # noqa: ANN401 - whatever the space holds
    """Return the arrays of an observation, or of the parts of a Dict or Tuple."""
    if isinstance(obs, (Mapping, tuple, list)):
        return [x for part in (obs.values() if isinstance(obs, Mapping) else obs) for x in _arrays(part)]
    return [obs] if isinstance(obs, np.ndarray) else []


def first_reset(env: gym.Env[Any, Any]) -> tuple[Any, dict[str, Any]]:
    """Return observation and info of an environment's first reset.

    Raises:
        EnvStartError: it fails, or doesn't return what Gymnasium's do.
    """
    obs, info = _first_call(env, "reset", lambda: env.reset(seed=0))
    return obs, info if isinstance(info, dict) else {}


def _first_call(env: gym.Env[Any, Any], name: str, call: Callable[[], Any]) -> tuple[Any, ...]:
    """Return the result of an environment's first `reset` or `step`, after checking its length."""
    owner = type(env.unwrapped).__name__
    try:
        result = call()
    except ENV_ERRORS as error:
        old = f"; {_OLD_GYM}" if isinstance(error, TypeError) and "'seed'" in str(error) else ""
        raise EnvStartError(f"{owner}.{name} failed: {cause_line(error)}{old}.") from error
    if not isinstance(result, tuple) or len(result) != len(_RESULTS[name]):
        raise EnvStartError(f"{owner}.{wrong_result_text(name, result)}")
    return result


def wrong_result_text(name: str, result: object) -> str:
    """Return the message about a `reset` or `step` whose result is not Gymnasium's tuple."""
    given = f"a tuple of {len(result)}" if isinstance(result, tuple) else type(result).__name__
    return f"{name} returned {given}; it must return ({', '.join(_RESULTS[name])}): {_OLD_GYM}."


def close_env(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> None:
    """Close an environment; its own failure to close costs no result, so it is a warning."""
    try:
        env.close()
    except ENV_ERRORS as error:
        warnings.warn(
            f"{type(env.unwrapped).__name__}.close failed: {cause_line(error)}.", stacklevel=1
        )  # once per class


def check_maker(name: str, make: object) -> None:
    """Refuse `make`, given as `name`, if it can't be called.

    Raises:
        ConfigError: it can't.
    """
    if not callable(make):
        raise ConfigError(
            f"{name} is {kind_of(make)}; it must be a function that makes an environment, "
            "such as lambda: gymnasium.make('CartPole-v1')."
        )


def shared_env_text(env: gym.Env[Any, Any]) -> str:
    """Return the message about a maker that returns `env` at every call."""
    name = type(env.unwrapped).__name__
    return (
        f"make_env returns the same {name} at every call, so that one environment would be stepped several times; "
        f"it must make a new one: make_env=lambda: {name}(...), not lambda: env."
    )


@dataclasses.dataclass(frozen=True)
class WorkerSetup:
    """Everything a worker process needs before it makes environments.

    Attributes:
        specs: registrations of environments, which a fresh process may lack; pickled by the parent process.
        seed: of numpy's, Python's and torch's global random streams; forked workers would share one state.
    """

    specs: tuple[bytes, ...]
    seed: int

    @classmethod
    def collect(cls, seed: int = 0) -> WorkerSetup:
        """Return the setup with this process's registrations, apart from Gymnasium's own."""
        import cloudpickle

        specs = []
        for spec in gym.registry.values():
            if str(spec.entry_point).startswith("gymnasium."):
                continue
            with contextlib.suppress(Exception):  # one that can't be pickled must not stop the others
                specs.append(cloudpickle.dumps(spec))
        return cls(tuple(specs), seed)

    def make(self, factory: Callable[[], gym.Env[Any, Any]]) -> gym.Env[Any, Any]:
        """Make an environment; if its id is not registered here, register those of the parent process first."""
        try:
            return factory()
        except (gym.error.UnregisteredEnv, ConfigError):
            # not before, since unpickling a class imports its module, which takes seconds if that imports torch
            self._register()
            self.seed_streams()
            return factory()

    def seed_streams(self) -> None:
        """Seed this process's global random streams."""
        seed_global_streams(self.seed)

    def _register(self) -> None:
        import cloudpickle

        for pickled in self.specs:
            with contextlib.suppress(Exception):  # the module of an environment that isn't used here
                spec = cloudpickle.loads(pickled)
                gym.registry.setdefault(spec.id, spec)


@dataclasses.dataclass(frozen=True)
class InWorker:
    """Applies a `WorkerSetup` before it makes environment `index`, for workers that aren't fastppo's own."""

    setup: WorkerSetup
    factory: EnvFactory
    index: int

    def __call__(self) -> gym.Env[Any, Any]:
        """Make the environment."""
        if multiprocessing.parent_process() is None:
            return self.factory()
        self.setup.seed_streams()
        env = self.setup.make(self.factory)
        if isinstance(env, PackObservation):
            env.index = self.index
        return env


def seed_global_streams(seed: int) -> None:
    """Seed the global random streams of numpy, Python and, where it is imported, torch."""
    np.random.seed(seed % 2**32)  # noqa: NPY002 - the global stream is meant
    random.seed(seed)
    if "torch" in sys.modules:
        sys.modules["torch"].manual_seed(seed)
