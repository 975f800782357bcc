"""An environment's state as plain data, so that a resumed run goes on where the other stopped.

Three ways, the first that a probe finds to hold:

exact    every wrapper's attributes and random streams, written down and set again in a fresh environment
replay   the same as they were before the episode's reset, and its actions since, which are taken again
restart  neither: the environment starts anew, with a seed of its own

That an environment can be pickled says nothing: many pickle the arguments of their constructor. So attributes that are
no plain data rule out `exact` unless the constructor makes them and a step can't change them (spaces, functions,
specs); and the probe takes equal steps in two environments and compares every output.
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

from fastppo.errors import EnvError

_Array = np.ndarray[Any, Any]
Way = Literal["exact", "replay", "restart"]

_BUILT: tuple[Any, ...] = (gym.Space, EnvSpec, gym.Env, VectorEnv, type, types.FunctionType, types.BuiltinFunctionType)
_BUILT += (types.MethodType, types.ModuleType, np.dtype)
# what Gymnasium's wrappers keep of their construction: arguments, and the spec that is made of them when asked for
_ARGUMENTS = ("_saved_kwargs", "_cached_spec")
_KINDS = "biufcSU"  # of arrays: no objects
_LONGEST = 100_000  # steps of an episode that would be played again
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class ResumeSupport(NamedTuple):
    """How environments continue after a resume.

    Attributes:
        way: see the module.
        why: one line.
    """

    way: Way
    why: str


class NotPlainError(Exception):
    """An attribute that is no plain data; the text names it."""


def encode(x: Any) -> Any:  # noqa: ANN401 - any plain data
    """Plain data as JSON holds it: numbers, texts, arrays, containers and random streams.

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
    """What `encode` was given; runs no code, whatever it is given.

    Raises:
        ValueError, TypeError, KeyError: no such thing.
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
            raise ValueError(f"arrays of {dtype} are no plain data")
        flat: _Array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return flat.reshape(shape[0]).copy() if kind == "array" else flat[0]
    if kind == "generator":
        name, state = value
        if name not in _BIT_GENERATORS:
            raise ValueError(f"{name!r} is no bit generator")
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
    """A bit generator's state, its position within its words: numpy doesn't look, and reads what lies there."""
    inner = state["state"]
    if "pos" in inner and not 0 <= int(inner["pos"]) <= len(inner["key"]) == 624:
        raise ValueError("a position outside the state")
    if "buffer_pos" in state and not 0 <= int(state["buffer_pos"]) <= len(state["buffer"]) == 4:
        raise ValueError("a position outside the buffer")
    return state


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _layers(env: Any) -> Iterator[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """The environment's wrappers, outermost first, and itself."""
    while True:
        yield env
        if env is env.unwrapped:
            return
        env = env.env


def state_of(env: Any, *, all_of_it: bool = True) -> list[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """The attributes of every layer, JSON-able.

    Args:
        env: a Gymnasium environment, or vector environment.
        all_of_it: whether an attribute that is no plain data is an error, or left out.

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
                    raise NotPlainError(f"{what}.{name} ({error or 'nested too deeply'}) is no plain data") from None
        found.append({"type": type(layer).__name__, "attributes": attributes})
    return found


def set_state(env: Any, state: Sequence[Mapping[str, Any]]) -> None:  # noqa: ANN401 - an Env or a VectorEnv
    """Give `env`, made by the same constructor, the attributes that `state_of` found.

    Raises:
        EnvError: another kind of environment, or what is no state.
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
        raise EnvError(f"the saved state of an environment can't be understood ({error}).") from None


class EpisodeLog:
    """What it takes to play the open episodes of some environments again: where they began, and their actions.

    Attributes:
        starts: for each environment its attributes before the episode's reset, the seed of that, and its first action.
    """

    def __init__(self, n: int) -> None:
        """For `n` environments."""
        self.starts: list[tuple[list[Any], int | None, int]] = [([], None, 0)] * n
        self._actions: list[_Array] = []  # of all environments, a row each
        self._dropped = 0

    def begin(self, i: int, env: gym.Env[Any, Any], seed: int | None) -> None:
        """Environment i is about to be reset; the step that ended its episode was added before."""
        self.starts[i] = (state_of(env, all_of_it=False), seed, self._dropped + len(self._actions))

    def add(self, actions: _Array) -> None:
        """A step of all was taken with `actions` [n, ...], which is kept."""
        self._actions.append(actions)
        if len(self._actions) % 256:
            return
        # forget what every episode has left behind, or that nobody would want to play again
        end = self._dropped + len(self._actions)
        first = end if len(self._actions) > _LONGEST else max(self._dropped, min(start for *_, start in self.starts))
        del self._actions[: first - self._dropped]
        self._dropped = first

    @property
    def too_long(self) -> bool:
        """Whether an open episode has gone on for so long that its actions are no longer kept."""
        return any(start < self._dropped for *_, start in self.starts)

    def episode(self, i: int) -> dict[str, Any]:
        """The open episode of environment i, JSON-able."""
        before, seed, first = self.starts[i]
        taken = [actions[i] for actions in self._actions[first - self._dropped :]]
        return {"before": before, "seed": seed, "actions": encode(np.array(taken) if taken else np.zeros(0))}

    def load(self, episodes: Sequence[Mapping[str, Any]]) -> None:
        """Go on from what `episode` gave for each environment."""
        actions = [decode(episode["actions"]) for episode in episodes]
        longest = max(actions, key=len)
        # a row for each step of the longest; shorter episodes end with it
        rows = np.zeros((len(longest), len(actions), *longest.shape[1:]), longest.dtype)
        for i, mine in enumerate(actions):
            if len(mine):
                rows[-len(mine) :, i] = mine
        self._actions, self._dropped = [row.copy() for row in rows], 0
        self.starts = [
            (episode["before"], episode["seed"], len(rows) - len(mine))
            for episode, mine in zip(episodes, actions, strict=True)
        ]


def play_again(env: gym.Env[Any, Any], episode: Mapping[str, Any]) -> Any:  # noqa: ANN401 - an observation
    """Bring a fresh `env` to where `EpisodeLog.episode` left another; returns its observation.

    Raises:
        EnvError: it ended early, or what is no episode.
    """
    set_state(env, episode["before"])
    actions = decode(episode["actions"])
    obs, _ = env.reset(seed=episode["seed"])
    for action in actions:
        obs, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            raise EnvError("its episode, played again, ended before it did.")
    return obs


def probe_resume_support(make: Callable[[], gym.Env[Any, Any]], steps: int = 48) -> ResumeSupport:
    """Try on environments from `make` which way holds."""
    try:
        return _try_out(make, steps)
    except Exception as error:  # whatever an environment does when it is looked at
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _try_out(make: Callable[[], gym.Env[Any, Any]], steps: int) -> ResumeSupport:
    env = make()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(3 * steps)]
    # an episode from a seed, several on its own stream, and on until the state is taken in the middle of one
    log = EpisodeLog(1)
    log.begin(0, env, 7)
    env.reset(seed=7)
    for k, action in enumerate(actions[:steps]):
        over = _step(env, action)[-1]
        log.add(np.array([action]))
        if over or k == steps // 2:  # an episode that began without a seed is what must be played again
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
            return ResumeSupport("exact", "its state is plain data, and a copy took the same steps")
        why = "a copy of its attributes took other steps"
    if _twins_outputs(make, lambda twin: play_again(twin, episode), actions[steps:]) == after:
        return ResumeSupport("replay", f"{why}, but its episodes can be played again from their actions")
    return ResumeSupport("restart", f"{why}, and playing its episode again led elsewhere")


def _twins_outputs(
    make: Callable[[], gym.Env[Any, Any]], prepare: Callable[[gym.Env[Any, Any]], Any], actions: Sequence[Any]
) -> list[Any] | None:
    """What `actions` bring about in another environment that was prepared; None: it can't be."""
    twin = make()
    try:
        twin.reset(seed=11)  # attributes that only a reset makes
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
    """Everything that `actions` bring about, with a reset after half of them and after each end."""
    found: list[Any] = []
    for k, action in enumerate(actions):
        out = _step(env, action)
        found.append(out)
        if out[-1] or k == len(actions) // 2:
            found.append(np.asarray(env.reset()[0]).tobytes())
    return found


def probe_vector_resume_support(make: Callable[[], VectorEnv[Any, Any, Any]], steps: int = 48) -> ResumeSupport:
    """The same for a vector environment that steps its environments itself: exact or restart."""
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
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}")
    if outs[0] == outs[1]:
        return ResumeSupport("exact", "its state is plain data, and a copy took the same steps")
    return ResumeSupport("restart", "a copy of its attributes took other steps")


def _outputs_together(venv: VectorEnv[Any, Any, Any], actions: Sequence[_Array]) -> list[bytes]:
    return [np.asarray(part).tobytes() for action in actions for part in venv.step(action)[:4]]
