"""Wrappers that pack observations of several arrays, and masks of allowed actions, into rows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector import VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space

from fastppo.errors import ENV_ERRORS, EnvError, cause_line
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.packing import MASK_KEY, PackedSpace, find, flat_mask, leaves_of, mask_leaf

_Array = np.ndarray[Any, Any]


def packed_space(
    env: gym.Env[Any, Any] | VectorEnv[Any, Any, Any],
    obs_keys: Sequence[str],
    critic_obs_keys: Sequence[str],
    reset_info: Callable[[], Mapping[str, Any]] | None,
) -> PackedSpace | None:
    """Return the space of an environment's rows; None if its observations are single arrays without masks.

    Args:
        env: one environment, or a vector environment.
        obs_keys: see `leaves_of`.
        critic_obs_keys: see `leaves_of`.
        reset_info: resets the environment and returns its info, which may hold a mask; None: leave masks out.

    Raises:
        ConfigError: see `leaves_of`.
        EnvError: a space that is not supported, or a mask of the wrong size.
    """
    space = env.single_observation_space if isinstance(env, VectorEnv) else env.observation_space
    action_space = env.single_action_space if isinstance(env, VectorEnv) else env.action_space
    n, mask = n_choices(action_space), None
    if n and reset_info is not None:
        if isinstance(space, spaces.Dict) and MASK_KEY in space.spaces:
            mask = mask_under_key(space.spaces[MASK_KEY], n)
        else:
            info = reset_info()
            if isinstance(env, gym.Env) and env.has_wrapper_attr("action_masks"):
                flat_mask(_from_method(env), n)
                mask = mask_leaf("method", n)
            elif MASK_KEY in info:
                for own in _masks_in(info, env.num_envs) if isinstance(env, VectorEnv) else [info[MASK_KEY]]:
                    if own is not None:
                        flat_mask(own, n)
                mask = mask_leaf("info", n)
    if mask is None and not obs_keys and not critic_obs_keys and not isinstance(space, (spaces.Dict, spaces.Tuple)):
        return None
    return PackedSpace(leaves_of(space, obs_keys, critic_obs_keys, mask), space)


def _from_method(env: gym.Env[Any, Any]) -> Any:  # noqa: ANN401 - a mask
    """Return the mask that `action_masks()` gives.

    Raises:
        EnvError: it fails.
    """
    try:
        return env.get_wrapper_attr("action_masks")()
    except ENV_ERRORS as error:
        raise EnvError(f"{type(env.unwrapped).__name__}.action_masks() failed: {cause_line(error)}.") from error


def _masks_in(info: Mapping[str, Any], n_envs: int) -> list[Any]:
    """Return the masks in the info of a vector environment; None for environments that gave none."""
    given = info.get(MASK_KEY)
    if given is None:
        return [None] * n_envs
    has = info.get(f"_{MASK_KEY}", np.ones(n_envs, bool))
    return [own if there else None for own, there in zip(given, has, strict=True)]


def n_choices(space: spaces.Space[Any]) -> int:
    """Return the entries of a mask over the actions of a space; 0: it has no masks."""
    if isinstance(space, spaces.Discrete):
        return int(space.n)
    return int(space.nvec.sum()) if isinstance(space, spaces.MultiDiscrete) else 0


def mask_under_key(part: spaces.Space[Any], n: int) -> ObsLeaf:
    """Describe the mask of `n` actions that an observation holds as `part`.

    Raises:
        EnvError: it has another size.
    """
    if part.shape is None or math.prod(part.shape) != n:
        raise EnvError(
            f"observation key {MASK_KEY} is {part}; the action space needs a mask of {n} entries, one for each action "
            "of each component; leave masks out with --action-masks off."
        )
    return mask_leaf("key", n)


class PackObservation(gym.Wrapper[Any, Any, Any, Any]):
    """Packs the observations of one environment, and its masks of allowed actions, into rows.

    Attributes:
        index: of the environment, for the messages of errors; None: whoever steps it names it.
    """

    def __init__(self, env: gym.Env[Any, Any], space: PackedSpace) -> None:
        """Pack into rows of `space`.

        Raises:
            EnvError: the environment has other observations.
        """
        if space.whole is not None and env.observation_space != space.whole:
            raise EnvError(
                f"its observation space is {env.observation_space}, that of the first environment {space.whole}; all "
                "must have the same."
            )
        super().__init__(env)
        self.observation_space = self._space = space
        self.index: int | None = None
        self._steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[_Array, dict[str, Any]]:
        """Reset, and return the packed observation and info."""
        obs, info = self.env.reset(seed=seed, options=options)
        return self._row(obs, info, "reset", acts=True), info

    def step(self, action: Any) -> tuple[_Array, Any, Any, Any, dict[str, Any]]:  # noqa: ANN401 - an action
        """Step, and pack the observation.

        Raises:
            EnvError: no action is allowed, though the episode goes on.
        """
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        row = self._row(obs, info, f"step {self._steps}", acts=not (terminated or truncated))
        return row, reward, terminated, truncated, info

    def _row(self, obs: Any, info: dict[str, Any], doing: str, *, acts: bool) -> _Array:  # noqa: ANN401 - an observation
        try:
            return self._packed(obs, info, acts=acts)
        except EnvError as error:
            if self.index is None:
                raise
            raise EnvError(f"environment {self.index} failed in {doing}: {error}") from error

    def _packed(self, obs: Any, info: dict[str, Any], *, acts: bool) -> _Array:  # noqa: ANN401 - an observation
        space, mask = self._space, None
        if space.mask is not None and acts:  # nobody acts on a last observation, whatever its mask
            if space.mask.mask_source == "method":
                mask = self.env.get_wrapper_attr("action_masks")()
            elif space.mask.mask_source == "info":
                mask = info.get(MASK_KEY)
        row = space.pack(obs, mask)
        if acts and (allowed := space.allowed(row)) is not None:
            _check_allowed(allowed, self.action_space)
        return row


def _check_allowed(allowed: _Array, action_space: spaces.Space[Any]) -> None:
    """Refuse a mask [A] under which a component has no allowed action.

    Raises:
        EnvError: it has none.
    """
    nvec = action_space.nvec.reshape(-1) if isinstance(action_space, spaces.MultiDiscrete) else [len(allowed)]
    start = 0
    for i, n in enumerate(nvec):
        if not allowed[start : start + n].any():
            which = f" of component {i}" if len(nvec) > 1 else ""
            raise EnvError(
                f"its action mask allows no action{which}, but its episode goes on; allow one, or end the episode."
            )
        start += n


class PackVectorObservation(VectorWrapper):
    """Packs the observations of a vector environment, and its masks of allowed actions, into rows."""

    def __init__(self, env: VectorEnv[Any, Any, Any], space: PackedSpace) -> None:
        """Pack into rows of `space`."""
        super().__init__(env)
        self.single_observation_space = self._space = space
        self.observation_space = batch_space(space, env.num_envs)
        self._masks = None if space.mask is None else np.ones((env.num_envs, space.mask.size), bool)
        self._steps = 0

    def reset(
        self,
        *,
        seed: Any = None,  # noqa: ANN401 - whatever the environment takes
        options: dict[str, Any] | None = None,
    ) -> tuple[_Array, dict[str, Any]]:
        """Reset all environments, or those of `options["reset_mask"]`, and pack the observations.

        Raises:
            EnvError: there are no masks, though a single environment gives them.
        """
        obs, info = self.env.reset(seed=seed, options=options)
        chosen = np.asarray((options or {}).get("reset_mask", np.ones(self.num_envs, bool)))
        mask = self._space.mask
        first = self._steps == 0 and chosen.all()
        if first and mask is not None and mask.mask_source == "info" and MASK_KEY not in info:
            raise EnvError(
                f'the vector version gives no info["{MASK_KEY}"] at a reset, but a single environment does; use '
                "vectorization=sync, pool or async, or --action-masks off."
            )
        return self._rows(obs, info, chosen, acts=np.ones(self.num_envs, bool)), info

    def step(self, actions: _Array) -> tuple[_Array, Any, Any, Any, dict[str, Any]]:
        """Step, and pack the observations, final ones among them.

        Raises:
            EnvError: an environment allows no action, though its episode goes on.
        """
        obs, rewards, terminated, truncated, info = self.env.step(actions)
        self._steps += 1
        if "final_obs" in info:
            info = info | {"final_obs": self._final(info["final_obs"], obs, terminated | truncated)}
            ended = np.zeros(self.num_envs, bool)  # same-step autoreset: every row is the start of an episode or within
        else:
            ended = terminated | truncated
        everyone = np.ones(self.num_envs, bool)
        return self._rows(obs, info, everyone, acts=~ended), rewards, terminated, truncated, info

    def _rows(self, obs: Any, info: dict[str, Any], changed: _Array, *, acts: _Array) -> _Array:  # noqa: ANN401
        space = self._space
        if self._masks is None or space.mask is None or space.mask.mask_source == "key":
            rows = space.pack(obs, n=self.num_envs)
        else:
            given = _masks_in(info, self.num_envs)
            for i in np.flatnonzero(changed):
                self._masks[i] = True if given[i] is None else flat_mask(given[i], self._masks.shape[1])
            rows = space.pack(obs, self._masks, n=self.num_envs)
        if (allowed := space.allowed(rows)) is not None:
            for i in np.flatnonzero(acts & ~allowed.all(1)):
                try:
                    _check_allowed(allowed[i], self.single_action_space)
                except EnvError as error:
                    doing = f"step {self._steps}" if self._steps else "reset"
                    raise EnvError(f"environment {i} failed in {doing}: {error}") from None
        return rows

    def _final(self, final: Any, following: Any, ended: _Array) -> _Array:  # noqa: ANN401 - trees of observations
        """Pack the final observations of ended environments; None elsewhere, whatever the others hold.

        Raises:
            EnvError: they lie in the memory of the `following` observations, and so are overwritten.
        """
        seen = [leaf for leaf in self._space.leaves if leaf.kind != "mask"]
        packed = np.full(self.num_envs, None, object)
        each = final if isinstance(final, np.ndarray) else _unbatched(final, self.num_envs)
        for i in np.flatnonzero(ended):
            if each[i] is None:
                continue
            packed[i] = self._space.pack(each[i])
            if all(np.shares_memory(find(each[i], leaf), find(following, leaf)) for leaf in seen):
                raise EnvError(
                    f"infos['final_obs'][{i}] shares memory with the next observation and is overwritten by it; "
                    "copy it in the vector environment."
                )
        return packed


def _unbatched(obs: Any, n: int) -> list[Any]:  # noqa: ANN401 - a tree of arrays [n, ...]
    if isinstance(obs, dict):
        parts = {key: _unbatched(part, n) for key, part in obs.items()}
        return [{key: part[i] for key, part in parts.items()} for i in range(n)]
    if isinstance(obs, tuple):
        columns = [_unbatched(part, n) for part in obs]
        return [tuple(column[i] for column in columns) for i in range(n)]
    return list(obs)


def sample_action(env: gym.Env[Any, Any], obs: Any = None, info: Mapping[str, Any] | None = None) -> Any:  # noqa: ANN401 - an observation, an action
    """Return a random action that an environment allows.

    Args:
        env: the environment, packed or not.
        obs: its latest observation, which may hold a mask.
        info: of that observation; a mask in it counts if the environment is not packed.
    """
    space, n = env.observation_space, n_choices(env.action_space)
    if isinstance(space, PackedSpace):
        allowed = None if obs is None else space.allowed(obs)
    else:
        try:
            mask = _raw_mask(env, obs, info or {}) if n else None
            allowed = None if mask is None else flat_mask(mask, n)
        except EnvError:  # masks are off, perhaps for that reason
            allowed = None
    if allowed is None:
        return env.action_space.sample()
    return env.action_space.sample(mask=as_sample_mask(allowed, env.action_space))


def _raw_mask(env: gym.Env[Any, Any], obs: Any, info: Mapping[str, Any]) -> Any:  # noqa: ANN401 - trees of arrays
    if isinstance(obs, Mapping) and MASK_KEY in obs:
        return obs[MASK_KEY]
    return _from_method(env) if env.has_wrapper_attr("action_masks") else info.get(MASK_KEY)


def as_sample_mask(allowed: _Array, space: spaces.Space[Any]) -> Any:  # noqa: ANN401 - as the space takes it
    """Return allowed actions [A] in the form that `Space.sample` takes."""
    mask = allowed.astype(np.int8)
    if not isinstance(space, spaces.MultiDiscrete):
        return mask

    def nested(nvec: _Array) -> Any:  # noqa: ANN401 - tuples of masks, as nvec nests them
        nonlocal mask
        if nvec.ndim == 0:
            own, mask = mask[: int(nvec)], mask[int(nvec) :]
            return own
        return tuple(nested(part) for part in nvec)

    return nested(space.nvec)


def sample_actions(venv: VectorEnv[Any, Any, Any], rows: _Array) -> Any:  # noqa: ANN401 - actions
    """Return random actions for a vector environment that the masks in its latest observations `rows` allow."""
    space, action_space = venv.single_observation_space, venv.single_action_space
    allowed = space.allowed(rows) if isinstance(space, PackedSpace) else None
    if allowed is None:
        return venv.action_space.sample()
    allowed[~allowed.any(1)] = True  # of an episode that has ended
    return np.stack([action_space.sample(mask=as_sample_mask(own, action_space)) for own in allowed])
