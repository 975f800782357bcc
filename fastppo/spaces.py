"""Gymnasium spaces as tensors: one description for observations, one for actions.

Environments and policies don't know each other and both need these. They are plain data, saved as JSON beside a model,
so that a policy can be used without its environment.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor

from fastppo.errors import EnvError
from fastppo.functional.distributions import Bernoulli, Categorical, Distribution, Gaussian, MultiCategorical

ObsKind = Literal["vector", "image", "discrete"]
ActionKind = Literal["discrete", "multidiscrete", "multibinary", "box"]


@dataclasses.dataclass(frozen=True)
class ObsLeaf:
    """One array of an observation.

    Attributes:
        kind: "vector" (float32; any Box that is not an image, MultiBinary), "image" (uint8 [C, H, W], [H, W, C] or
            [H, W]) or "discrete" (int64 indices, one-hot for the network).
        shape: of the array.
        source_dtype: NumPy name of the space's own dtype; float64 and integers are cast to float32 when stored.
        nvec: number of values of each index, for "discrete".
        start: first value of each index, for "discrete".
    """

    kind: ObsKind
    shape: tuple[int, ...]
    source_dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in storage."""
        return {"vector": torch.float32, "image": torch.uint8, "discrete": torch.int64}[self.kind]

    @property
    def features(self) -> int:
        """Length of the array once it is flattened (one-hot where discrete) for an MLP."""
        return sum(self.nvec) if self.kind == "discrete" else math.prod(self.shape)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, wherever its channels are."""
        if len(self.shape) == 2:
            return (1, *self.shape)
        return (self.shape[2], *self.shape[:2]) if self.channels_last else self.shape  # type: ignore[return-value]

    @property
    def channels_last(self) -> bool:
        """Whether an image is [H, W, C]: the smaller of the outer dimensions counts as the channels."""
        return len(self.shape) == 3 and self.shape[2] < self.shape[0]

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ObsLeaf:
        """Describe a space whose elements are single arrays.

        Raises:
            EnvError: the space is neither Box, Discrete, MultiDiscrete nor MultiBinary.
        """
        if isinstance(space, spaces.Box):
            if space.dtype == np.uint8 and len(space.shape) in (2, 3):
                return cls("image", space.shape, "uint8")
            return cls("vector", space.shape, str(space.dtype))
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (), str(space.dtype), (int(space.n),), (int(space.start),))
        if isinstance(space, spaces.MultiDiscrete):
            nvec, start = space.nvec.reshape(-1).tolist(), np.asarray(space.start).reshape(-1).tolist()
            return cls("discrete", space.shape, str(space.dtype), tuple(nvec), tuple(start))
        if isinstance(space, spaces.MultiBinary):
            return cls("vector", space.shape, str(space.dtype))
        raise EnvError(
            f"observation space {type(space).__name__} is not supported (Box, Discrete, MultiDiscrete and MultiBinary "
            "are); wrap the environment in gymnasium.wrappers.FlattenObservation."
        )


@dataclasses.dataclass(frozen=True)
class ObsSpec:
    """An observation: a tree of arrays that is packed into one row where the environment is stepped.

    Storage, rollouts, checkpoints and minibatches see rows of `shape` and `dtype` and nothing of the tree. Only the
    policy's encoder takes rows apart again, by `unpack`. A single array is a tree of one leaf, and is its own row;
    larger trees (Dict, Tuple) are not supported yet.

    Attributes:
        leaves: the arrays, in the order of the space.
    """

    leaves: tuple[ObsLeaf, ...]

    @classmethod
    def single(
        cls,
        kind: ObsKind,
        shape: tuple[int, ...],
        source_dtype: str,
        nvec: tuple[int, ...] = (),
        start: tuple[int, ...] = (),
    ) -> ObsSpec:
        """Describe an observation that is one array; arguments as `ObsLeaf`'s attributes."""
        return cls((ObsLeaf(kind, shape, source_dtype, nvec, start),))

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ObsSpec:
        """Describe `space`.

        Raises:
            EnvError: the space is not supported.
        """
        return cls((ObsLeaf.from_space(space),))

    @property
    def leaf(self) -> ObsLeaf:
        """The only leaf of an observation that is one array."""
        (leaf,) = self.leaves
        return leaf

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one stored row."""
        return self.leaf.shape

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored rows."""
        return self.leaf.dtype

    @property
    def source_dtype(self) -> str:
        """NumPy name of the dtype in which the environment gives rows."""
        return self.leaf.source_dtype

    def blank(self, *rows: int, device: torch.device | None = None) -> Tensor:
        """Return rows [*rows, *shape] that any policy can read: zeros, or the first value of each index."""
        block = torch.zeros((*rows, *self.shape), dtype=self.dtype, device=device)
        if self.leaf.kind == "discrete":
            block += torch.tensor(self.leaf.start, device=device).reshape(self.shape)
        return block

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows [B, *shape] into the leaves' arrays [B, *leaf.shape]."""
        return (rows,)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return dataclasses.asdict(self.leaf)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ObsSpec:
        """Invert `to_dict`."""
        return cls((ObsLeaf(**_tuples(values)),))


@dataclasses.dataclass(frozen=True)
class ActionSpec:
    """Actions, as the distribution makes them (flat, counted from 0) and as the environment takes them.

    Attributes:
        kind: of the action space.
        shape: of one action of the environment.
        dtype: NumPy name of the environment's dtype.
        nvec: number of choices of each component ("discrete", "multidiscrete").
        start: first value of each component ("discrete", "multidiscrete").
        low: lower bounds, flat ("box"); None where infinite.
        high: upper bounds, flat ("box"); None where infinite.
    """

    kind: ActionKind
    shape: tuple[int, ...]
    dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ActionSpec:
        """Describe `space`.

        Raises:
            EnvError: the space is neither Discrete, MultiDiscrete, MultiBinary nor Box.
        """
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (), str(space.dtype), (int(space.n),), (int(space.start),))
        if isinstance(space, spaces.MultiDiscrete):
            nvec, start = space.nvec.reshape(-1).tolist(), np.asarray(space.start).reshape(-1).tolist()
            return cls("multidiscrete", space.shape, str(space.dtype), tuple(nvec), tuple(start))
        if isinstance(space, spaces.MultiBinary):
            return cls("multibinary", space.shape, str(space.dtype))
        if isinstance(space, spaces.Box):
            if not np.issubdtype(space.dtype, np.floating):
                raise EnvError(
                    f"action space Box of {space.dtype} is not supported: a Gaussian acts in floats; "
                    "make it Box of float32, or MultiDiscrete."
                )
            return cls("box", space.shape, str(space.dtype), low=_bounds(space.low), high=_bounds(space.high))
        raise EnvError(
            f"action space {type(space).__name__} is not supported; Discrete, MultiDiscrete, MultiBinary and Box are: "
            "flatten it with a gymnasium.ActionWrapper."
        )

    @property
    def distribution(self) -> Distribution:
        """Return the distribution over this space's actions."""
        if self.kind == "discrete":
            return Categorical(self.nvec[0])
        if self.kind == "multidiscrete":
            return MultiCategorical(self.nvec)
        size = math.prod(self.shape)
        return Bernoulli(size) if self.kind == "multibinary" else Gaussian(size)

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds of a Box action, [D] float32 each, on `device`."""
        low = [-math.inf if x is None else x for x in self.low]
        high = [math.inf if x is None else x for x in self.high]
        return torch.tensor(low, device=device), torch.tensor(high, device=device)

    @functools.cached_property
    def _box(self) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        low = [-np.inf if x is None else x for x in self.low]
        return np.array(low), np.array([np.inf if x is None else x for x in self.high])

    @property
    def dimensions(self) -> int:
        """Components of a continuous action; 0 for discrete actions."""
        return math.prod(self.shape) if self.kind == "box" else 0

    def to_env(self, actions: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Convert the distribution's actions [N, ...] to the environment's [N, *shape]: clip, or shift by start."""
        if self.kind == "box":
            actions = np.clip(actions, *self._box)
        elif any(self.start):
            actions = actions + (self.start[0] if self.kind == "discrete" else np.asarray(self.start))
        return actions.reshape(len(actions), *self.shape).astype(self.dtype, copy=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ActionSpec:
        """Invert `to_dict`."""
        return cls(**_tuples(values))


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _bounds(values: np.ndarray[Any, Any]) -> tuple[float | None, ...]:
    flat: Sequence[float] = np.asarray(values, np.float64).reshape(-1).tolist()
    return tuple(value if math.isfinite(value) else None for value in flat)
