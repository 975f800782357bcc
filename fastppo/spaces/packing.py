"""Observations of several arrays, packed into one row where the environment is stepped. Imports no torch.

Everything between the environment and the policy's encoder (workers, shared memory, storage, checkpoints, minibatches)
sees rows of one shape and dtype. A packed environment declares a `PackedSpace`, from which `ObsSpec` reads the arrays.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from gymnasium import spaces

from fastppo.errors import ConfigError, EnvError
from fastppo.spaces.leaves import MaskSource, ObsLeaf

MASK_KEY = "action_mask"
_LARGEST_INDEX = 2**24  # up to which float32 holds every whole number
_Array = np.ndarray[Any, Any]


def leaves_of(
    space: spaces.Space[Any],
    obs_keys: Sequence[str] = (),
    critic_obs_keys: Sequence[str] = (),
    mask: ObsLeaf | None = None,
) -> tuple[ObsLeaf, ...]:
    """Describe the arrays of an observation, in the order of the space; those of the critic alone after the others.

    Args:
        space: a space that is one array, or a Dict or Tuple of such spaces, nested at will.
        obs_keys: keys to read; empty: all but `critic_obs_keys`. A key is a name, an index, or a path such as
            `camera/left`, and stands for everything below it.
        critic_obs_keys: keys that only the critic reads.
        mask: the mask of allowed actions, which comes last and is no observation; None: all actions are allowed.

    Raises:
        ConfigError: an unknown key, keys of an observation that has none, or no key left for the policy.
        EnvError: a space that is not supported, or two keys with one name.
    """
    found = list(_walk(space, ()))
    if (obs_keys or critic_obs_keys) and not isinstance(space, (spaces.Dict, spaces.Tuple)):
        setting = "obs_keys" if obs_keys else "critic_obs_keys"
        raise ConfigError(f"{setting} need observations with keys, but these are one {type(space).__name__}.")
    known = {"/".join(map(str, path[:i])): None for path, _ in found for i in range(1, len(path) + 1)}
    for setting, keys in (("obs_keys", obs_keys), ("critic_obs_keys", critic_obs_keys)):
        for key in keys:
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
                raise ConfigError(f"{setting}: observations have no {key!r}; {hint}")
    if both := set(obs_keys) & set(critic_obs_keys):
        raise ConfigError(f"obs_keys and critic_obs_keys both name {sorted(both)[0]!r}; the critic reads both lists.")
    for mine, other in itertools.product(obs_keys, critic_obs_keys):
        if mine.startswith(f"{other}/"):
            raise ConfigError(
                f"obs_keys name {mine!r}, a part of {other!r}, which critic_obs_keys keep from the policy."
            )
    if mask is not None and mask.name in critic_obs_keys:
        raise ConfigError(f"critic_obs_keys name {mask.name!r}, the mask of allowed actions, which no network reads.")
    actor, critic = [], []
    for path, part in found:
        if mask is not None and mask.path == path and path:
            continue
        if _below(path, critic_obs_keys):
            critic.append(replace(ObsLeaf.from_space(part, path), critic_only=True))
        elif not obs_keys or _below(path, obs_keys):
            actor.append(ObsLeaf.from_space(part, path))
    if not actor and not critic_obs_keys:
        raise EnvError(f"the policy has no observation but the mask {MASK_KEY}; give it at least one array to read.")
    if not actor:
        raise ConfigError(
            f"critic_obs_keys {' '.join(critic_obs_keys)} leave the policy no observation; leave one out."
        )
    leaves = (*actor, *critic, *(() if mask is None else (mask,)))
    if len(leaves) > 1:
        _check_packable(leaves)
    return leaves


def _check_packable(leaves: Sequence[ObsLeaf]) -> None:
    """Refuse arrays that a row can't hold apart.

    Raises:
        EnvError: two have one name, or the values of an index are too large for float32.
    """
    names = [leaf.name for leaf in leaves if leaf.kind != "mask"]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise EnvError(f"two parts of the observations are called {twice[0]!r}; rename the key with the slash in it.")
    for leaf in leaves:
        if any(abs(start) + n > _LARGEST_INDEX for start, n in zip(leaf.start, leaf.nvec, strict=True)):
            raise EnvError(
                f"observation {leaf.name} counts from {leaf.start[0]:,}, too large a number to be stored exactly; "
                "let it count from 0."
            )


def _walk(space: spaces.Space[Any], path: tuple[str | int, ...]) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Yield path and space of each part that is neither Dict nor Tuple."""
    if isinstance(space, (spaces.Dict, spaces.Tuple)):
        parts = space.spaces.items() if isinstance(space, spaces.Dict) else enumerate(space.spaces)
        if not space.spaces and not path:
            raise EnvError("the observation space is empty; it must hold at least one array.")
        for key, part in parts:
            yield from _walk(part, (*path, key))
    else:
        yield path, space


def _below(path: tuple[str | int, ...], keys: Sequence[str]) -> bool:
    return any("/".join(map(str, path[:i])) in keys for i in range(1, len(path) + 1))


def mask_leaf(source: MaskSource, n: int) -> ObsLeaf:
    """Describe the mask of `n` actions that an environment gives by `source`."""
    return ObsLeaf("mask", (n,), "bool", path=(MASK_KEY,) if source == "key" else (), mask_source=source)


def places_of(leaves: Sequence[ObsLeaf]) -> tuple[tuple[slice, ...], int, str]:
    """Return the place of each array in a packed row, the row's length and the NumPy name of its dtype.

    Rows are float32, which holds every index of a one-hot exactly. With uint8 images they are bytes, a quarter of the
    size: float32 numbers by their four bytes, images after them, then zeros up to a multiple of four, so that the
    numbers of every row are aligned: torch views no others as float32.
    """
    as_bytes = any(leaf.kind == "image" and leaf.stored_as == "uint8" for leaf in leaves)
    sizes = [leaf.size * (4 if as_bytes and leaf.stored_as != "uint8" else 1) for leaf in leaves]
    order = sorted(range(len(leaves)), key=lambda i: as_bytes and leaves[i].stored_as == "uint8")
    starts, end = dict[int, int](), 0
    for i in order:
        starts[i], end = end, end + sizes[i]
    places = tuple(slice(starts[i], starts[i] + size) for i, size in enumerate(sizes))
    return places, end + -end % 4 if as_bytes else end, "uint8" if as_bytes else "float32"


class PackedSpace(spaces.Box):
    """The space of packed rows.

    Attributes:
        leaves: the arrays that a row holds.
        whole: the space of the observations that are packed; None if not known.
        bounds: lowest and highest values of each leaf; None for a leaf without finite bounds. Empty if not known.
    """

    def __init__(self, leaves: Sequence[ObsLeaf], whole: spaces.Space[Any] | None = None) -> None:
        """Pack `leaves`, which are arrays of an observation in `whole`; a single one is a row as it is."""
        self.leaves, self.whole = tuple(leaves), whole
        seen = [] if whole is None else [None if leaf.kind == "mask" else find(whole, leaf) for leaf in leaves]
        self.bounds = tuple(finite_bounds(space) for space in seen)
        if len(leaves) == 1:
            shape, dtype = leaves[0].shape, leaves[0].stored_as
        else:
            self._places, length, dtype = places_of(leaves)
            shape = (length,)
        low, high = (-np.inf, np.inf) if dtype == "float32" else (np.iinfo(dtype).min, np.iinfo(dtype).max)
        super().__init__(low, high, shape, np.dtype(dtype).type)

    @property
    def mask(self) -> ObsLeaf | None:
        """The mask of allowed actions, if the rows hold one."""
        return self.leaves[-1] if self.leaves[-1].kind == "mask" else None

    def pack(
        self,
        obs: Any,  # noqa: ANN401 - a tree of arrays
        masks: Any = None,  # noqa: ANN401 - an array, or one per component
        n: int | None = None,
        *,
        critic: bool = True,
    ) -> _Array:
        """Pack an observation, or with `n` a batch of `n`, into a new row [*shape], or rows [n, *shape].

        Args:
            obs: a tree of arrays, as the space says.
            masks: the allowed actions, [A] or [n, A]; None: under the mask's path in `obs`, or all are allowed.
            n: rows of a batch.
            critic: whether to read what only the critic reads; otherwise it is zeros, or the first value of an index.

        Raises:
            EnvError: an array is missing, has another shape, or an index lies outside its space.
        """
        lead = () if n is None else (n,)
        if len(self.leaves) == 1:
            single: _Array = self._read(self.leaves[0], obs, lead).astype(self.dtype)
            return single
        row = np.zeros((*lead, *self.shape), self.dtype)
        for leaf, place in zip(self.leaves, self._places, strict=True):
            if leaf.critic_only and not critic:
                x = np.broadcast_to(np.asarray(leaf.start or 0).reshape(-1), (*lead, leaf.size))
            elif leaf.kind != "mask":
                x = self._read(leaf, obs, lead)
            elif masks is None and not leaf.path:
                x = np.ones((*lead, leaf.size), bool)
            else:
                x = flat_mask(find(obs, leaf) if masks is None else masks, leaf.size, n)
            part = row[..., place]
            if self.dtype == np.uint8 and leaf.stored_as != "uint8":
                part = part.view(np.float32)
            part[...] = x.reshape(*lead, leaf.size)
        return row

    def allowed(self, rows: _Array) -> _Array | None:
        """Return the allowed actions [..., A] bool of packed rows [..., *shape]; None if all are."""
        if self.mask is None:
            return None
        part = rows[..., self._places[-1]]
        return (part.view(np.float32) if self.dtype == np.uint8 else part) > 0

    def _read(self, leaf: ObsLeaf, obs: Any, lead: tuple[int, ...]) -> _Array:  # noqa: ANN401 - a tree of arrays
        """Return one array of an observation, checked."""
        found = find(obs, leaf)
        x = np.asarray(found)
        what = f"observation {leaf.name}" if leaf.path else "an observation"
        if x.shape != (*lead, *leaf.shape) or x.dtype.kind not in "biuf":
            given = f"shape {x.shape}" if x.dtype.kind in "biuf" else f"dtype {x.dtype}"
            raise EnvError(f"{what} has {given}; its space says {leaf.source_dtype} {leaf.shape}.")
        if leaf.stored_as in ("uint8", "int64") and x.dtype != leaf.source_dtype:
            if x.dtype.kind == "f":
                raise EnvError(f"{what} has dtype {x.dtype}; its space says {leaf.source_dtype}.")
            if leaf.stored_as == "uint8" and x.size and not 0 <= x.min() <= x.max() <= 255:
                raise EnvError(f"{what} has values from {x.min()} to {x.max()}; its space is of {leaf.source_dtype}.")
        if leaf.kind == "discrete" and (bad := leaf.outside(x if lead else x[None])):
            row, value, space = bad
            raise EnvError(f"{what}{f' of environment {row}' if lead else ''} is {value}, outside its space {space}.")
        return x


def finite_bounds(space: spaces.Space[Any] | None) -> tuple[_Array, _Array] | None:
    """Return the lowest and highest values, float32, of a floating-point Box with a finite bound; else None."""
    if (
        not isinstance(space, spaces.Box)
        or space.dtype.kind != "f"
        or not (np.isfinite(space.low).any() or np.isfinite(space.high).any())
    ):
        return None
    return space.low.astype(np.float32), space.high.astype(np.float32)


def find(obs: Any, leaf: ObsLeaf) -> Any:  # noqa: ANN401 - trees of arrays
    """Return the array at the leaf's path, or of a space the part there.

    Raises:
        EnvError: the observation has no such part.
    """
    for key in leaf.path:
        try:
            obs = obs[key]
        except (LookupError, TypeError, ValueError):
            raise EnvError(
                f"an observation ({type(obs).__name__}) has no {leaf.name!r}, which its space declares."
            ) from None
    return obs


def flat_mask(mask: Any, size: int, n: int | None = None) -> _Array:  # noqa: ANN401 - arrays, or sequences of them
    """Return a mask as bool [size], or `n` of them as [n, size]; the components of a MultiDiscrete mask are joined.

    Raises:
        EnvError: it has another size.
    """
    if n is not None and isinstance(mask, (tuple, list)) and len(mask) == n:
        return np.stack([flat_mask(row, size) for row in mask])
    x = np.asarray(_joined(mask))
    lead = () if n is None else (n,)
    if x.dtype.kind not in "biuf" or x.size != math.prod((*lead, size)) or x.shape[: len(lead)] != lead:
        needed = " x ".join(map(str, (*lead, size)))
        raise EnvError(
            f"an action mask has shape {x.shape} and dtype {x.dtype}; the action space needs {needed} numbers or "
            "bools, one for each action of each component."
        )
    return x.reshape(*lead, size) > 0


def _joined(mask: Any) -> Any:  # noqa: ANN401 - an array, or nested sequences of them
    """Return the components of a mask, nested sequences of any length, as one sequence; arrays as they are."""
    if isinstance(mask, (tuple, list)) and any(isinstance(part, (tuple, list)) or np.ndim(part) for part in mask):
        return np.concatenate([np.reshape(_joined(part), -1) for part in mask])
    return mask
