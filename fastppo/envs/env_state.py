"""An environment's state as plain data, to resume a run in the middle of its episodes.

A probe (resume_probe.py) chooses the first of three ways that works:

exact    save the attributes and random streams of every wrapper, and set them in a new environment
replay   save those from before the episode's reset and the episode's actions, and take the actions again
restart  save nothing: the environment starts a new episode with a new seed

Pickling is not enough: many environments pickle only the arguments of their constructor. So an attribute that isn't
plain data rules out `exact`, unless the constructor makes it and a step can't change it (spaces, functions, specs).

Two kinds of attributes are treated apart. Large ones that the constructor rebuilds unchanged (a table of prices) are
saved as a digest; setting the state checks the digest. Running moments, as Gymnasium's NormalizeObservation and
NormalizeReward keep, are saved in every way, because the policy depends on them.
"""

from __future__ import annotations

import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import VectorEnv

from fastppo.envs.plain_data import NotPlainError, decode, digest_of, encode, size_of
from fastppo.errors import EnvError

_Array = np.ndarray[Any, Any]
Way = Literal["exact", "replay", "restart"]

# Attributes of these types come from the constructor, and no step changes them
BUILT: tuple[Any, ...] = (gym.Space, EnvSpec, gym.Env, VectorEnv, type, types.FunctionType, types.BuiltinFunctionType)
BUILT += (types.MethodType, types.ModuleType, np.dtype)
# attributes of Gymnasium's wrappers that only describe their construction: arguments and a lazily made spec
_ARGUMENTS = ("_saved_kwargs", "_cached_spec")
_LONGEST = 100_000  # steps of the longest episode that is replayed
_MOMENTS = {"mean", "var", "count"}  # attributes of Gymnasium's RunningMeanStd, and of CleanRL's and SB3's
_LARGE = 2**16  # bytes from which an attribute may be saved as a digest
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


def layers_of(env: Any) -> Iterator[Any]:  # noqa: ANN401 - an Env or a VectorEnv
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
            for k, layer in enumerate(layers_of(env))
            for name, value in vars(layer).items()
            if size_of(value) >= _LARGE and (digest := digest_of(value)) is not None
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
        if check and digest is not None and digest_of(value) != digest:
            return None
        return digest

    def forget_changed(self, env: Any) -> None:  # noqa: ANN401 - an Env or a VectorEnv
        """Drop the attributes that no longer equal the constructor's; only the first calls compare."""
        self._comparisons += 1
        if self._comparisons > _COMPARISONS:
            return
        for k, layer in enumerate(layers_of(env)):
            for name, value in vars(layer).items():
                if (k, name) in self._digests and self.unchanged(k, name, value) is None:
                    del self._digests[k, name]

    def all_unchanged(self, env: Any) -> bool:  # noqa: ANN401 - an Env or a VectorEnv
        """Return whether every attribute that was not dropped still equals the constructor's."""
        layers = list(layers_of(env))
        return all(self.unchanged(k, name, vars(layers[k]).get(name)) is not None for k, name in self._digests)


def _is_moments(value: Any) -> bool:  # noqa: ANN401 - any attribute
    """Return whether `value` is an object that holds running moments and nothing else."""
    fields = getattr(value, "__dict__", {})
    return fields.keys() == _MOMENTS and all(
        isinstance(x, (int, float, np.generic, np.ndarray)) for x in fields.values()
    )


def normalizers_of(env: Any) -> list[str]:  # noqa: ANN401 - an Env or a VectorEnv
    """Return the class names of the wrappers that keep running moments, outermost first."""
    return [type(layer).__name__ for layer in layers_of(env) if any(map(_is_moments, vars(layer).values()))]


def moments_of(env: Any) -> list[Any]:  # noqa: ANN401 - an Env or a VectorEnv
    """Return the running moments alone, in the form of `state_of`; empty if there are none."""
    found = []
    for layer in layers_of(env):
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
    for k, layer in enumerate(layers_of(env)):
        attributes = {}
        for name, value in vars(layer).items():
            if isinstance(value, BUILT) or name in _ARGUMENTS:
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
    layers = list(layers_of(env))
    try:
        if [type(layer).__name__ for layer in layers] != [saved["type"] for saved in state]:
            raise EnvError(
                f"the saved environment is {' > '.join(str(saved['type']) for saved in state)}, this one "
                f"{' > '.join(type(layer).__name__ for layer in layers)}."
            )
        for layer, saved in zip(layers, state, strict=True):
            for name, value in saved["attributes"].items():
                if callable(getattr(type(layer), name, None)) or isinstance(vars(layer).get(name), BUILT):
                    raise EnvError(f"the saved state of {type(layer).__name__} would replace its {name}.")
                _set_attribute(layer, name, value)
    except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise EnvError(f"the saved state of an environment can't be read ({error}).") from None


def _set_attribute(layer: Any, name: str, value: Any) -> None:  # noqa: ANN401 - a wrapper, an encoding
    own = vars(layer)
    kind, inner = next(iter(value.items())) if isinstance(value, dict) else ("", {})
    if kind == "built":
        if digest_of(own.get(name)) != inner:
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

    def mark_touched(self, i: int) -> None:
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
