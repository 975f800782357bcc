"""An environment's state as plain data, to resume a run in the middle of its episodes.

A probe chooses the first of three ways that works:

exact    save the attributes and random streams of every wrapper, and set them in a new environment
replay   save those from before the episode's reset and the episode's actions, and take the actions again
restart  save nothing: the environment starts a new episode with a new seed

Pickling is not enough: many environments pickle only the arguments of their constructor. So an attribute that isn't
plain data rules out `exact`, unless the constructor makes it and a step can't change it (spaces, functions, specs).
The probe takes the same steps in two environments and compares every output.
"""

from __future__ import annotations

import base64
import json
import random
import types
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.errors import EnvError, first_line

_Array = np.ndarray[Any, Any]
Way = Literal["exact", "replay", "restart"]

_BUILT: tuple[Any, ...] = (gym.Space, EnvSpec, gym.Env, VectorEnv, type, types.FunctionType, types.BuiltinFunctionType)
_BUILT += (types.MethodType, types.ModuleType, np.dtype)
# attributes of Gymnasium's wrappers that only describe their construction: arguments and a lazily made spec
_ARGUMENTS = ("_saved_kwargs", "_cached_spec")
_KINDS = "biufcSU"  # of arrays: no objects
_LONGEST = 100_000  # steps of the longest episode that is replayed
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class ResumeSupport(NamedTuple):
    """How environments continue after a resume, and why.

    Attributes:
        way: see the module's docstring.
        why: one line, without a full stop.
    """

    way: Way
    why: str


class NotPlainError(Exception):
    """An attribute that isn't plain data; the text names it."""


def encode(x: Any) -> Any:  # noqa: ANN401 - any plain data
    """Return plain data as JSON-able values: numbers, texts, arrays, containers and random streams.

    Raises:
        NotPlainError: something else.
    """
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, np.generic) and x.dtype.kind in _KINDS:
        return {"scalar": [x.dtype.str, _text(x.tobytes())]}
    if type(x) is np.ndarray and x.dtype.kind in _KINDS:
        return {"array": [x.dtype.str, list(x.shape), _text(x.tobytes())]}
    if isinstance(x, np.random.Generator):
        return {"generator": [type(x.bit_generator).__name__, encode(x.bit_generator.state)]}
    if isinstance(x, np.random.RandomState):
        return {"randomstate": encode(x.get_state(legacy=False))}
    if type(x) is random.Random:
        return {"random": encode(x.getstate())}
    if type(x) is bytes:
        return {"bytes": _text(x)}
    if type(x) is list:
        return [encode(item) for item in x]
    if type(x) in (tuple, set, frozenset):
        return {type(x).__name__: [encode(item) for item in x]}
    if type(x) is dict:
        return {"dict": [[encode(key), encode(value)] for key, value in x.items()]}
    if type(x) is deque:
        return {"deque": [[encode(item) for item in x], x.maxlen]}
    raise NotPlainError(type(x).__name__)


def decode(x: Any) -> Any:  # noqa: ANN401 - any plain data
    """Return the inverse of `encode`; safe on untrusted input, as it runs no code from it.

    Raises:
        ValueError, TypeError, KeyError: not an encoding.
    """
    if isinstance(x, list):
        return [decode(item) for item in x]
    if not isinstance(x, dict):
        return x
    ((kind, value),) = x.items()
    if kind in ("scalar", "array"):
        name, *shape, text = value
        dtype = np.dtype(str(name))
        if dtype.kind not in _KINDS:
            raise ValueError(f"arrays of {dtype} are not plain data")
        flat: _Array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return flat.reshape(shape[0]).copy() if kind == "array" else flat[0]
    if kind == "generator":
        name, state = value
        if name not in _BIT_GENERATORS:
            raise ValueError(f"{name!r} is not a known bit generator")
        bits = getattr(np.random, name)(0)
        bits.state = _within(decode(state))
        return np.random.Generator(bits)
    if kind == "randomstate":
        legacy = np.random.RandomState(0)
        legacy.set_state(_within(decode(value)))
        return legacy
    if kind == "random":
        stream = random.Random(0)
        stream.setstate(decode(value))
        return stream
    if kind == "bytes":
        return base64.b64decode(value, validate=True)
    if kind == "deque":
        items, most = value
        return deque((decode(item) for item in items), most)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value}
    container = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return container(decode(item) for item in value)


def _within(state: Any) -> Any:  # noqa: ANN401 - a mapping as numpy gives it
    """Return a bit generator's state after checking its position: numpy would read outside the buffer."""
    inner = state["state"]
    if "pos" in inner and not 0 <= int(inner["pos"]) <= len(inner["key"]) == 624:
        raise ValueError("a position outside the state")
    if "buffer_pos" in state and not 0 <= int(state["buffer_pos"]) <= len(state["buffer"]) == 4:
        raise ValueError("a position outside the buffer")
    return state


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _layers(env: Any) -> Iterator[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """Yield the environment's wrappers, outermost first, then the environment."""
    while True:
        yield env
        if env is env.unwrapped:
            return
        env = env.env


def state_of(env: Any, *, all_of_it: bool = True) -> list[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """Return the attributes of every wrapper and of the environment as JSON-able values.

    Args:
        env: a Gymnasium environment, or vector environment.
        all_of_it: whether an attribute that isn't plain data is an error; else it is left out.

    Raises:
        NotPlainError: such an attribute, named.
    """
    found = []
    for layer in _layers(env):
        attributes = {}
        for name, value in vars(layer).items():
            if isinstance(value, _BUILT) or name in _ARGUMENTS:
                continue
            try:
                attributes[name] = encode(value)
            except (NotPlainError, RecursionError) as error:
                if all_of_it:
                    what = type(layer).__name__
                    raise NotPlainError(f"{what}.{name} ({error or 'nested too deeply'}) is not plain data") from None
        found.append({"type": type(layer).__name__, "attributes": attributes})
    return found


def set_state(env: Any, state: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401 - an Env or a VectorEnv
    """Set the attributes that `state_of` returned in `env`, made by the same constructor.

    Raises:
        EnvError: another kind of environment, or not such a state.
    """
    layers = list(_layers(env))
    try:
        if [type(layer).__name__ for layer in layers] != [saved["type"] for saved in state]:
            raise EnvError(
                f"the saved environment is {' > '.join(str(saved['type']) for saved in state)}, this one "
                f"{' > '.join(type(layer).__name__ for layer in layers)}."
            )
        for layer, saved in zip(layers, state, strict=True):
            for name, value in saved["attributes"].items():
                if callable(getattr(type(layer), name, None)) or isinstance(vars(layer).get(name), _BUILT):
                    raise EnvError(f"the saved state of {type(layer).__name__} would replace its {name}.")
                vars(layer)[name] = decode(value)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EnvError(f"the saved state of an environment can't be read ({error}).") from None


class EpisodeLog:
    """The state before, and the actions since, the start of each environment's open episode, for a replay.

    Attributes:
        starts: per environment: attributes before the episode's reset, the reset's seed, the first action's index.
    """

    def __init__(self, n: int) -> None:
        """Start an empty log of `n` environments."""
        self.starts: list[tuple[list[Any], int | None, int]] = [([], None, 0)] * n
        self._actions: list[_Array] = []  # one array of all environments per step
        self._dropped = 0

    def begin(self, i: int, env: gym.Env[Any, Any], seed: int | None) -> None:
        """Start an episode of environment i; call before its reset and after `add` of the last step."""
        self.starts[i] = (state_of(env, all_of_it=False), seed, self._dropped + len(self._actions))

    def add(self, actions: _Array) -> None:
        """Record `actions` [n, ...] of one step of all environments, without a copy."""
        self._actions.append(actions)
        if len(self._actions) % 256:
            return
        # drop actions from before every open episode, or all of them if an episode is too long to replay
        end = self._dropped + len(self._actions)
        first = end if len(self._actions) > _LONGEST else max(self._dropped, min(start for *_, start in self.starts))
        del self._actions[: first - self._dropped]
        self._dropped = first

    @property
    def too_long(self) -> bool:
        """Whether an open episode is too long to replay, so that its actions were dropped."""
        return any(start < self._dropped for *_, start in self.starts)

    def episode(self, i: int) -> dict[str, Any]:
        """Return the open episode of environment i as JSON-able values."""
        before, seed, first = self.starts[i]
        taken = [actions[i] for actions in self._actions[first - self._dropped :]]
        return {"before": before, "seed": seed, "actions": encode(np.array(taken) if taken else np.zeros(0))}

    def load(self, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Restore in place from the `episode(i)` of each environment."""
        actions = [decode(episode["actions"]) for episode in episodes]
        longest = max(actions, key=len)
        # one row per step of the longest episode; shorter ones are aligned at the end
        rows = np.zeros((len(longest), len(actions), *longest.shape[1:]), longest.dtype)
        for i, mine in enumerate(actions):
            if len(mine):
                rows[-len(mine) :, i] = mine
        self._actions, self._dropped = [row.copy() for row in rows], 0
        self.starts = [
            (episode["before"], episode["seed"], len(rows) - len(mine))
            for episode, mine in zip(episodes, actions, strict=True)
        ]


def replay_episode(env: gym.Env[Any, Any], episode: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an observation
    """Replay an `EpisodeLog.episode` in a new `env`; return the last observation.

    Raises:
        EnvError: the replay ended early, or not such an episode.
    """
    set_state(env, episode["before"])
    actions = decode(episode["actions"])
    obs, _ = env.reset(seed=episode["seed"])
    for action in actions:
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            raise EnvError("the replay of an open episode ended early.")
    return obs


def probe_resume_support(make: Callable[[], gym.Env[Any, Any]], steps: int = 48) -> ResumeSupport:
    """Find how environments from `make` continue after a resume, by trying each way."""
    try:
        return _try_out(make, steps)
    except Exception as error:  # from any environment's own code
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")


def _try_out(make: Callable[[], gym.Env[Any, Any]], steps: int) -> ResumeSupport:
    env = make()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(3 * steps)]
    # a seeded episode, then unseeded ones; the state is taken in the middle of one
    log = EpisodeLog(1)
    log.begin(0, env, 7)
    env.reset(seed=7)
    for k, action in enumerate(actions[:steps]):
        over = _step(env, action)[-1]
        log.add(np.array([action]))
        if over or k == steps // 2:  # the replay must cover an episode that began without a seed
            log.begin(0, env, None)
            env.reset()
    episode = json.loads(json.dumps(log.episode(0)))
    why = ""
    state = None
    try:
        state = json.loads(json.dumps(state_of(env)))
    except NotPlainError as error:
        why = str(error)
    after = _outputs(env, actions[steps:])
    env.close()
    if state is not None:
        if _twins_outputs(make, lambda twin: set_state(twin, state), actions[steps:]) == after:
            return ResumeSupport("exact", "environment state can be saved")
        why = "a copy of its attributes behaves differently"
    if _twins_outputs(make, lambda twin: replay_episode(twin, episode), actions[steps:]) == after:
        return ResumeSupport("replay", f"{why}, but replaying an episode's actions restores it")
    return ResumeSupport("restart", f"{why}, and replaying its episode leads to other observations")


def _twins_outputs(
    make: Callable[[], gym.Env[Any, Any]], prepare: Callable[[gym.Env[Any, Any]], Any], actions: Sequence[Any]
) -> list[Any] | None:
    """Return the outputs of `actions` in a new, prepared environment; None if it can't be prepared."""
    twin = make()
    try:
        twin.reset(seed=11)  # creates attributes that only a reset makes
        prepare(twin)
        return _outputs(twin, actions)
    except EnvError:
        return None
    finally:
        twin.close()


def _step(env: gym.Env[Any, Any], action: Any) -> tuple[Any, float, bool]:  # noqa: ANN401 - an action
    obs, reward, terminated, truncated, _ = env.step(action)
    return np.asarray(obs).tobytes(), float(reward), bool(terminated or truncated)


def _outputs(env: gym.Env[Any, Any], actions: Sequence[Any]) -> list[Any]:
    """Return all outputs of `actions`, with a reset after half of them and after each episode end."""
    found: list[Any] = []
    for k, action in enumerate(actions):
        out = _step(env, action)
        found.append(out)
        if out[-1] or k == len(actions) // 2:
            found.append(np.asarray(env.reset()[0]).tobytes())
    return found


def probe_vector_resume_support(make: Callable[[], VectorEnv[Any, Any, Any]], steps: int = 48) -> ResumeSupport:
    """Find how a native vector environment continues after a resume: exact or restart."""
    try:
        venv = make()
        venv.action_space.seed(0)
        actions = [venv.action_space.sample() for _ in range(2 * steps)]
        outs = []
        try:
            venv.reset(seed=7)
            for action in actions[:steps]:
                venv.step(action)
            state = json.loads(json.dumps(state_of(venv)))
            outs.append(_outputs_together(venv, actions[steps:]))
        finally:
            venv.close()
        twin = make()
        try:
            twin.reset(seed=11)
            set_state(twin, state)
            outs.append(_outputs_together(twin, actions[steps:]))
        finally:
            twin.close()
    except NotPlainError as error:
        return ResumeSupport("restart", str(error))
    except Exception as error:
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")
    if outs[0] == outs[1]:
        return ResumeSupport("exact", "environment state can be saved")
    return ResumeSupport("restart", "a copy of its attributes behaves differently")


def _outputs_together(venv: VectorEnv[Any, Any, Any], actions: Sequence[_Array]) -> list[bytes]:
    return [np.asarray(part).tobytes() for action in actions for part in venv.step(action)[:4]]
