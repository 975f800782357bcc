"""An environment's state as plain data, to resume a run in the middle of its episodes.

A probe chooses the first of three ways that works:

exact    save the attributes and random streams of every wrapper, and set them in a new environment
replay   save those from before the episode's reset and the episode's actions, and take the actions again
restart  save nothing: the environment starts a new episode with a new seed

Pickling is not enough: many environments pickle only the arguments of their constructor. So an attribute that isn't
plain data rules out `exact`, unless the constructor makes it and a step can't change it (spaces, functions, specs).
The probe takes the same steps in two environments and compares every output. It spends about a second.

Two kinds of attributes are treated apart. Large ones that the constructor rebuilds unchanged (a table of prices) are
saved as a digest; setting the state checks the digest. Running moments, as Gymnasium's NormalizeObservation and
NormalizeReward keep, are saved in every way, because the policy depends on them.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import random
import time
import types
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.envs.pack_observation import sample_action, sample_actions
from fastppo.errors import ENV_ERRORS, EnvError, EnvStartError, cause_line, first_line

_Array = np.ndarray[Any, Any]
Way = Literal["exact", "replay", "restart"]

_BUILT: tuple[Any, ...] = (gym.Space, EnvSpec, gym.Env, VectorEnv, type, types.FunctionType, types.BuiltinFunctionType)
_BUILT += (types.MethodType, types.ModuleType, np.dtype)
# attributes of Gymnasium's wrappers that only describe their construction: arguments and a lazily made spec
_ARGUMENTS = ("_saved_kwargs", "_cached_spec")
_KINDS = "biufcSU"  # of arrays: no objects
_LONGEST = 100_000  # steps of the longest episode that is replayed
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")
_MOMENTS = {"mean", "var", "count"}  # attributes of Gymnasium's RunningMeanStd, and of CleanRL's and SB3's
_LARGE = 2**16  # bytes from which an attribute may be saved as a digest
_STEPS = 48  # of the probe before it saves a state, if there is time
_PROBE_SECONDS = 1.0
_MAX_CHECKPOINT_BYTES = 2**28  # of all environments
_MAX_CHECKPOINT_SECONDS = 10.0  # to save all environments
_MAX_RESET_SECONDS = 0.02  # to save one environment at a reset, for a replay
_COMPARISONS = 3  # of digests at the first resets of an environment; later, only checkpoints compare


class ResumeSupport(NamedTuple):
    """How environments continue after a resume, and why.

    Attributes:
        way: see the module's docstring.
        why: one line, without a full stop.
        notes: other properties of the environments that the probe found, one sentence each.
    """

    way: Way
    why: str
    notes: tuple[str, ...] = ()


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


class ConstructedData:
    """The large attributes of an environment as its constructor left them, by digest."""

    def __init__(self, env: Any) -> None:  # noqa: ANN401 - an Env or a VectorEnv
        """Read a new environment, before its first reset."""
        self._comparisons = 0
        self._digests = {
            (k, name): digest
            for k, layer in enumerate(_layers(env))
            for name, value in vars(layer).items()
            if _size(value) >= _LARGE and (digest := _digest(value)) is not None
        }

    def unchanged(self, layer: int, name: str, value: Any, *, check: bool = True) -> str | None:  # noqa: ANN401
        """Return the digest of an attribute that still equals the constructor's; None if it has changed.

        Args:
            layer: index of the wrapper, outermost first.
            name: of the attribute.
            value: of the attribute.
            check: whether to compare digests; if not, an attribute that was equal the last time counts as unchanged.
        """
        digest = self._digests.get((layer, name))
        if check and digest is not None and _digest(value) != digest:
            return None
        return digest

    def forget_changed(self, env: Any) -> None:  # noqa: ANN401 - an Env or a VectorEnv
        """Drop the attributes that no longer equal the constructor's; only the first calls compare."""
        self._comparisons += 1
        if self._comparisons > _COMPARISONS:
            return
        for k, layer in enumerate(_layers(env)):
            for name, value in vars(layer).items():
                if (k, name) in self._digests and self.unchanged(k, name, value) is None:
                    del self._digests[k, name]

    def all_unchanged(self, env: Any) -> bool:  # noqa: ANN401 - an Env or a VectorEnv
        """Return whether every attribute that was not dropped still equals the constructor's."""
        layers = list(_layers(env))
        return all(self.unchanged(k, name, vars(layers[k]).get(name)) is not None for k, name in self._digests)


def _size(value: Any) -> int:  # noqa: ANN401 - any attribute
    """Return the approximate bytes of plain data."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, (bytes, str)):
        return len(value)
    if type(value) is dict:
        return sum(map(_size, value)) + sum(map(_size, value.values()))
    if type(value) in (list, tuple, set, frozenset, deque):
        return sum(map(_size, value))
    return 8


def _digest(value: Any) -> str | None:  # noqa: ANN401 - any attribute
    """Return a digest of plain data; None if it isn't plain."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(x: Any) -> None:  # noqa: ANN401
        if type(x) is np.ndarray and x.dtype.kind in _KINDS:
            hashed.update(f"{x.dtype.str}{x.shape}".encode())
            hashed.update(np.ascontiguousarray(x).data)
        elif type(x) in (list, tuple, deque):
            hashed.update(f"{type(x).__name__}{len(x)}".encode())
            for item in x:
                add(item)
        elif type(x) is dict:
            hashed.update(f"dict{len(x)}".encode())
            for key, item in x.items():
                add(key)
                add(item)
        else:
            hashed.update(json.dumps(encode(x)).encode())

    try:
        add(value)
    except (NotPlainError, RecursionError):
        return None
    return hashed.hexdigest()


def _is_moments(value: Any) -> bool:  # noqa: ANN401 - any attribute
    """Return whether `value` is an object that holds running moments and nothing else."""
    fields = getattr(value, "__dict__", {})
    return fields.keys() == _MOMENTS and all(
        isinstance(x, (int, float, np.generic, np.ndarray)) for x in fields.values()
    )


def normalizers_of(env: Any) -> list[str]:  # noqa: ANN401 - an Env or a VectorEnv
    """Return the class names of the wrappers that keep running moments, outermost first."""
    return [type(layer).__name__ for layer in _layers(env) if any(map(_is_moments, vars(layer).values()))]


def moments_of(env: Any) -> list[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """Return the running moments alone, in the form of `state_of`; empty if there are none."""
    found = []
    for layer in _layers(env):
        moments = {name: _encode_moments(value) for name, value in vars(layer).items() if _is_moments(value)}
        found.append({"type": type(layer).__name__, "attributes": moments})
    return found if any(layer["attributes"] for layer in found) else []


def moments_in(state: Any) -> list[Any]:  # noqa: ANN401 - JSON-able
    """Return the running moments in a saved environment: a state, an `EpisodeLog.episode`, or moments."""
    layers = state["before"] if isinstance(state, dict) else state
    return [
        {"type": layer["type"], "attributes": {k: x for k, x in layer["attributes"].items() if _encodes_moments(x)}}
        for layer in layers
    ]


def _encodes_moments(x: Any) -> bool:  # noqa: ANN401 - JSON-able
    return isinstance(x, dict) and x.keys() == {"moments"}


def _encode_moments(value: Any) -> dict[str, Any]:  # noqa: ANN401 - running moments
    return {"moments": {name: encode(x) for name, x in vars(value).items()}}


def state_of(
    env: Any,  # noqa: ANN401 - an Env or a VectorEnv
    built: ConstructedData | None = None,
    *,
    all_of_it: bool = True,
    check: bool = True,
) -> list[Any]:
    """Return the attributes of every wrapper and of the environment as JSON-able values.

    Args:
        env: a Gymnasium environment, or vector environment.
        built: large attributes as the constructor left them; those that haven't changed are saved as digests.
        all_of_it: whether an attribute that isn't plain data is an error; else it is left out.
        check: see `ConstructedData.unchanged`.

    Raises:
        NotPlainError: such an attribute, named.
    """
    found = []
    for k, layer in enumerate(_layers(env)):
        attributes = {}
        for name, value in vars(layer).items():
            if isinstance(value, _BUILT) or name in _ARGUMENTS:
                continue
            if built is not None and (digest := built.unchanged(k, name, value, check=check)) is not None:
                attributes[name] = {"built": digest}
                continue
            try:
                attributes[name] = _encode_moments(value) if _is_moments(value) else encode(value)
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
                _set_attribute(layer, name, value)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EnvError(f"the saved state of an environment can't be read ({error}).") from None


def _set_attribute(layer: Any, name: str, value: Any) -> None:  # noqa: ANN401 - a wrapper, an encoding
    own = vars(layer)
    kind, inner = next(iter(value.items())) if isinstance(value, dict) else ("", {})
    if kind == "built":
        if _digest(own.get(name)) != inner:
            raise EnvError(f"the constructor of {type(layer).__name__} now gives another {name} than in the saved run.")
    elif kind == "moments":
        if not _is_moments(own.get(name)) or inner.keys() != _MOMENTS:
            raise EnvError(f"the saved state of {type(layer).__name__} has running moments in {name}.")
        vars(own[name]).update({field: decode(x) for field, x in inner.items()})
    else:
        own[name] = decode(value)


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
        self._touched: set[int] = set()

    def begin(self, i: int, env: gym.Env[Any, Any], seed: int | None, built: ConstructedData | None = None) -> None:
        """Start an episode of environment i; call before its reset and after `add` of the last step.

        Args:
            i: index of the environment.
            env: the environment.
            seed: of its reset.
            built: its large attributes as the constructor left them.
        """
        self._touched.discard(i)
        if built is not None:
            built.forget_changed(env)
        before = state_of(env, built, all_of_it=False, check=False)
        self.starts[i] = (before, seed, self._dropped + len(self._actions))

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

    def forget(self, i: int) -> None:
        """Record that the open episode of environment i can't be replayed: something besides actions changes it."""
        self._touched.add(i)

    @property
    def replayable(self) -> bool:
        """Whether every open episode can be replayed: its actions alone made it, and none of them were dropped."""
        return not self._touched and all(start >= self._dropped for *_, start in self.starts)

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
        self._touched.clear()
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


def probe_resume_support(make: Callable[[], gym.Env[Any, Any]], n_envs: int = 1) -> ResumeSupport:
    """Find how `n_envs` environments from `make` continue after a resume, by trying each way for about a second.

    Raises:
        EnvStartError: `make` returns the same environment twice.
    """
    try:
        return _try_out(make, n_envs)
    except EnvStartError:
        raise
    except ENV_ERRORS as error:  # from any environment's own code
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")


def close_env(env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any]) -> None:
    """Close an environment; its own failure to close costs no result, so it is a warning."""
    try:
        env.close()
    except ENV_ERRORS as error:
        warnings.warn(
            f"{type(env.unwrapped).__name__}.close failed: {cause_line(error)}.", stacklevel=1
        )  # once per class


def probe_seeding(make: Callable[[], gym.Env[Any, Any]]) -> tuple[str, ...]:
    """Return notes on random streams that ignore the seed, from two environments and a few steps.

    Raises:
        EnvStartError: `make` returns the same environment twice.
    """
    with contextlib.ExitStack() as undo:
        try:
            env = make()
            undo.callback(close_env, env)
            twin = make()
            undo.callback(close_env, twin)
            _check_distinct(env, twin)
            before = _streams(env)
            obs, _ = env.reset(seed=7)
            twin.reset(seed=11)
            after, other = _streams(env), _streams(twin)
            env.action_space.seed(0)
            for _ in range(2):
                obs, _, terminated, truncated, _ = env.step(sample_action(env, obs))
                if terminated or truncated:
                    break
            return _notes_on_streams(env, before, after, other)
        except EnvStartError:
            raise
        except ENV_ERRORS:  # from any environment's own code, which may allow one instance only; the run will report it
            return ()


def _try_out(make: Callable[[], gym.Env[Any, Any]], n_envs: int) -> ResumeSupport:
    env = make()
    env.action_space.seed(0)
    # a seeded episode, then unseeded ones; the state is taken in the middle of one
    log, built = EpisodeLog(1), ConstructedData(env)
    fresh = _streams(env)
    log.begin(0, env, 7, built)
    started = time.perf_counter()
    obs, _ = env.reset(seed=7)
    seeded, steps = _streams(env), 0
    while steps < 2 or (steps < _STEPS and time.perf_counter() - started < _PROBE_SECONDS / 10):
        action = sample_action(env, obs)
        obs, _, terminated, truncated, _ = env.step(action)
        log.add(np.array([action]))
        steps += 1
        if terminated or truncated or steps == 1:  # the replay must cover an episode that began without a seed
            log.begin(0, env, None, built)
            obs, _ = env.reset()
    episode = json.loads(json.dumps(log.episode(0)))
    state, why, excess = None, "a copy of its attributes behaves differently", ""
    started = time.thread_time()  # not the clock: a busy machine must not decide about a resume
    try:
        text = json.dumps(state_of(env, built))
        excess = _excess(len(text), time.thread_time() - started, n_envs)
        state = json.loads(text)
    except NotPlainError as error:
        why = str(error)
        started = time.thread_time()
        size = len(json.dumps(state_of(env, built, all_of_it=False, check=False)))
        excess = _excess(size, 0.0, n_envs, time.thread_time() - started)
    drawn = _streams(env)
    actions, after = _sampled_outputs(env, obs, 2 * steps)
    close_env(env)
    twin = make()
    try:
        _check_distinct(env, twin)
        twin.reset(seed=11)  # creates attributes that only a reset makes
        notes = _notes_on_streams(env, fresh, seeded, _streams(twin), drawn)
        if excess:
            return ResumeSupport("restart", excess, notes)
        if state is not None and _prepared_outputs(twin, lambda: set_state(twin, state), actions) == after:
            return ResumeSupport("exact", "environment state can be saved", notes)
    finally:
        close_env(twin)
    twin = make()
    try:
        twin.reset(seed=11)
        replayed = _prepared_outputs(twin, lambda: replay_episode(twin, episode), actions)
    finally:
        close_env(twin)
    if replayed == after:
        return ResumeSupport("replay", f"{why}, but replaying an episode's actions restores it", notes)
    return ResumeSupport("restart", f"{why}, and replaying its episode leads to other observations", notes)


def _excess(size: int, seconds: float, n_envs: int, reset_seconds: float = 0.0) -> str:
    """Return why the state of one environment is too much to save; "" if it isn't.

    Args:
        size: in bytes.
        seconds: to save it in a checkpoint.
        n_envs: environments in a checkpoint.
        reset_seconds: to save it at each reset.
    """
    if reset_seconds > _MAX_RESET_SECONDS:
        return f"saving its state takes {reset_seconds * 1e3:,.0f} ms at each reset"
    if size * n_envs > _MAX_CHECKPOINT_BYTES:
        total, most = (x / 2**20 for x in (size * n_envs, _MAX_CHECKPOINT_BYTES))
        return f"its state takes {total:,.0f} MiB per checkpoint, more than {most:,.0f}"
    if seconds * n_envs > _MAX_CHECKPOINT_SECONDS:
        return f"saving its state takes {seconds * n_envs:,.0f} s per checkpoint"
    return ""


def _check_distinct(env: gym.Env[Any, Any], twin: gym.Env[Any, Any]) -> None:
    """Refuse environments that share one instance under their wrappers.

    Raises:
        EnvStartError: they do.
    """
    if env.unwrapped is twin.unwrapped:
        raise EnvStartError(same_instance(env))


def same_instance(env: gym.Env[Any, Any]) -> str:
    """Return the message about a maker that returns `env` at every call."""
    name = type(env.unwrapped).__name__
    return (
        f"make_env returns the same {name} at every call, so that one environment would be stepped several times; "
        f"it must make a new one: make_env=lambda: {name}(...), not lambda: env."
    )


def _streams(env: Any) -> dict[str, str]:  # noqa: ANN401 - an Env
    """Return the state of every random stream that the environment or an object of it holds, by name."""
    found: dict[str, str] = {}

    def search(owner: Any, prefix: str, depth: int) -> None:  # noqa: ANN401 - any object
        for name, value in getattr(owner, "__dict__", {}).items():
            if isinstance(value, (np.random.Generator, np.random.RandomState, random.Random)):
                with contextlib.suppress(NotPlainError):
                    found[f"{prefix}.{name}"] = json.dumps(encode(value))
            elif depth and not isinstance(value, _BUILT):
                search(value, f"{prefix}.{name}", depth - 1)

    for layer in _layers(env):
        search(layer, type(layer).__name__, 2)
    return found


def _notes_on_streams(
    env: gym.Env[Any, Any],
    fresh: Mapping[str, str],
    seeded: Mapping[str, str],
    other: Mapping[str, str],
    drawn: Mapping[str, str] | None = None,
) -> tuple[str, ...]:
    """Return a note on the random streams that draw the same numbers under every seed.

    Args:
        env: the environment.
        fresh: its random streams after construction.
        seeded: after its first reset.
        other: those of another environment after a reset with another seed.
        drawn: of `env` after some steps; None: now.
    """
    now = _streams(env) if drawn is None else drawn
    fixed = [
        name
        for name, state in seeded.items()
        # a stream that nobody draws from, or only the constructor, matters to nobody
        if other.get(name) == state and (fresh.get(name) != state or now.get(name) != state)
    ]
    if not fixed:
        return ()
    return (
        f"the seed changes nothing in {', '.join(fixed)}: every environment draws the same random numbers from it. "
        "Draw from self.np_random, after super().reset(seed=seed), or the N environments may be copies.",
    )


def _prepared_outputs(twin: gym.Env[Any, Any], prepare: Callable[[], Any], actions: Sequence[Any]) -> list[Any] | None:
    """Return the outputs of `actions` after `prepare`; None if that fails."""
    try:
        prepare()
        return _outputs(twin, actions)
    except EnvError:
        return None


def _outputs(env: gym.Env[Any, Any], actions: Sequence[Any]) -> list[Any]:
    """Return all outputs of `actions`, with a reset after half of them and after each episode end."""
    return _play(env, lambda k, obs: actions[k], len(actions), None)


def _sampled_outputs(env: gym.Env[Any, Any], obs: Any, n: int) -> tuple[list[Any], list[Any]]:  # noqa: ANN401
    """Return `n` random actions, the first taken after observation `obs`, and their outputs as `_outputs` does."""
    actions: list[Any] = []

    def sample(k: int, obs: Any) -> Any:  # noqa: ANN401 - an observation, an action
        actions.append(sample_action(env, obs))
        return actions[k]

    return actions, _play(env, sample, n, obs)


def _play(env: gym.Env[Any, Any], choose: Callable[[int, Any], Any], n: int, obs: Any) -> list[Any]:  # noqa: ANN401
    found: list[Any] = []
    for k in range(n):
        obs, reward, terminated, truncated, _ = env.step(choose(k, obs))
        over = bool(terminated or truncated)
        found.append((np.asarray(obs).tobytes(), float(reward), over))
        if over or k == n // 2:
            obs, _ = env.reset()
            found.append(np.asarray(obs).tobytes())
    return found


def probe_vector_resume_support(make: Callable[[], VectorEnv[Any, Any, Any]], steps: int = _STEPS) -> ResumeSupport:
    """Find how a native vector environment continues after a resume: exact or restart."""
    try:
        venv = make()
        venv.action_space.seed(0)
        venv.single_action_space.seed(0)
        outs, actions = [], []
        try:
            obs, _ = venv.reset(seed=7)
            for _ in range(steps):
                obs = venv.step(sample_actions(venv, obs))[0]
            state, out = json.loads(json.dumps(state_of(venv))), list[bytes]()
            for _ in range(steps):
                actions.append(sample_actions(venv, obs))
                obs, *rest = venv.step(actions[-1])[:4]
                out += [np.asarray(part).tobytes() for part in (obs, *rest)]
            outs.append(out)
        finally:
            close_env(venv)
        twin = make()
        try:
            twin.reset(seed=11)
            set_state(twin, state)
            results = [twin.step(action)[:4] for action in actions]
            outs.append([np.asarray(part).tobytes() for result in results for part in result])
        finally:
            close_env(twin)
    except NotPlainError as error:
        return ResumeSupport("restart", str(error))
    except ENV_ERRORS as error:
        return ResumeSupport("restart", f"the probe failed: {type(error).__name__}: {first_line(error)}")
    if outs[0] == outs[1]:
        return ResumeSupport("exact", "environment state can be saved")
    return ResumeSupport("restart", "a copy of its attributes behaves differently")
