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
from torch import Tensor, nn

from fastppo.errors import ConfigError, EnvError
from fastppo.functional.distributions import Bernoulli, Categorical, Distribution, Gaussian, MultiCategorical

ObsKind = Literal["vector", "image", "discrete"]
ActionKind = Literal["discrete", "multidiscrete", "multibinary", "box"]
_Array = np.ndarray[Any, Any]

MIN_IMAGE_SIDE = 36  # smallest height and width for which every convolution of the Nature CNN has an output
_UNBOUNDED = 1e30  # bounds of this size, such as the largest float32, mean that there are none
_FARTHEST_SCALE = 10.0  # of Box actions, from the Gaussian's initial standard deviation of 1


@dataclasses.dataclass(frozen=True)
class ObsLeaf:
    """One array of an observation.

    Attributes:
        kind: "vector" (any Box that is not an image, MultiBinary), "image" ([C, H, W], [H, W, C], [H, W], or a stack of
            these; see `reads_as_image`) or "discrete" (int64 indices, one-hot for the network).
        shape: of the array.
        source_dtype: NumPy name of the space's own dtype; float64 and integers are cast to float32 when stored.
        nvec: number of values of each index, for "discrete".
        start: first value of each index, for "discrete".
        high: number by which the network's input is divided; None: 255 for images, 1 for vectors.
    """

    kind: ObsKind
    shape: tuple[int, ...]
    source_dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    high: float | None = None

    @property
    def dtype(self) -> torch.dtype:
        """Dtype in storage."""
        if self.kind == "image":
            return torch.float32 if self.source_dtype.startswith("float") else torch.uint8
        return torch.float32 if self.kind == "vector" else torch.int64

    @property
    def features(self) -> int:
        """Length of the array once it is flattened (one-hot where discrete) for an MLP."""
        return sum(self.nvec) if self.kind == "discrete" else math.prod(self.shape)

    @property
    def divisor(self) -> float:
        """Number by which stored images and vectors are divided for the network."""
        return self.high or (255.0 if self.kind == "image" else 1.0)

    @property
    def image_axes(self) -> tuple[int, ...]:
        """Axes of an image, its height and width last; all others are channels."""
        sides = _sides(self.shape)
        return (*(axis for axis in range(len(self.shape)) if axis not in sides), *sides)

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W) of an image, wherever its channels are; the channels of a stack are those of all its images."""
        height, width = (self.shape[axis] for axis in self.image_axes[-2:])
        return math.prod(self.shape) // max(1, height * width), height, width

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ObsLeaf:
        """Describe a space whose elements are single arrays.

        Raises:
            EnvError: the space is neither Box, Discrete, MultiDiscrete nor MultiBinary, or an image of five or more
                dimensions.
        """
        if isinstance(space, spaces.Box):
            high = float(space.high.max(initial=0))
            if reads_as_image(space):
                return cls("image", space.shape, str(space.dtype), high=None if high in (0, 255) else high)
            scaled = space.dtype == np.uint8 and 1 < high < 255
            return cls("vector", space.shape, str(space.dtype), high=high if scaled else None)
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (), str(space.dtype), (int(space.n),), (int(space.start),))
        if isinstance(space, spaces.MultiDiscrete):
            nvec, start = space.nvec.reshape(-1).tolist(), np.asarray(space.start).reshape(-1).tolist()
            return cls("discrete", space.shape, str(space.dtype), tuple(nvec), tuple(start))
        if isinstance(space, spaces.MultiBinary):
            return cls("vector", space.shape, str(space.dtype))
        raise EnvError(
            f"observation space {type(space).__name__} is not supported (Box, Discrete, MultiDiscrete and MultiBinary "
            f"are); {_remedy(space)}"
        )

    @property
    def note(self) -> str | None:
        """One line on how integers and images are read; None for spaces that can be read in one way only."""
        what = f"observations: {self.source_dtype} {self.shape} is read as"
        if self.kind == "image":
            channels, height, width = self.image_size
            stack = "a stack of images, folded into" if len(self.shape) == 4 else "an image with"
            plural = "s" if channels > 1 else ""
            text = f"{what} {stack} {channels} channel{plural} of {height}x{width}, divided by {self.divisor:g}"
            if min(height, width) < MIN_IMAGE_SIDE:
                text += "; if its values are codes and not pixels, give the space their largest value as its high"
            return f"{text}."
        if self.kind == "vector" and self.source_dtype == "uint8":
            if self.divisor > 1:
                return f"{what} a vector, divided by {self.divisor:g}, the high of its space."
            return f"{what} a vector, not scaled; for values far above 1 use --normalize-obs."
        return None

    def outside(self, obs: _Array) -> tuple[int, str, str] | None:
        """Return the first row of discrete obs [B, *shape] outside the space, and its value and space as text."""
        obs = np.asarray(obs)
        flat, start = obs.reshape(len(obs), -1), np.asarray(self.start)
        rows = np.flatnonzero(((flat < start) | (flat >= start + np.asarray(self.nvec))).any(1))
        if not len(rows):
            return None
        nvec, start = (np.asarray(x).reshape(self.shape) for x in (self.nvec, self.start))
        space = spaces.MultiDiscrete(nvec, start=start) if self.shape else spaces.Discrete(int(nvec), start=int(start))
        return int(rows[0]), str(obs[rows[0]].tolist()), str(space)


def _sides(shape: tuple[int, ...]) -> tuple[int, int]:
    """Return the axes of height and width in the shape of an image or a stack of images."""
    if len(shape) == 3:  # the smaller of the outer dimensions counts as the channels
        return (0, 1) if shape[2] < shape[0] else (1, 2)
    # [S, C, H, W], [S, H, W, C] or [H, W, C, S]
    return max(((i, i + 1) for i in reversed(range(len(shape) - 1))), key=lambda axes: min(shape[i] for i in axes))


def reads_as_image(space: spaces.Box) -> bool:
    """Return whether a Box is an image, or a stack of images, by dtype, bounds and shape.

    An image has 2 or 3 dimensions, a stack 4, and its values are
        uint8, with 255 as the highest or sides of at least 36;
        any other integer from 0 to 255, with sides of at least 36;
        floats from 0 to 1, -1 to 1 or 0 to 255, with sides of at least 36.

    Raises:
        EnvError: values and sides of an image, but five or more dimensions.
    """
    shape, dtype = space.shape, space.dtype
    if len(shape) < 2 or dtype.kind not in "uif" or not math.prod(shape):
        return False
    bounds = float(space.low.min()), float(space.high.max())
    large = min(shape[axis] for axis in _sides(shape)) >= MIN_IMAGE_SIDE
    if dtype == np.uint8:
        pixels = bounds[1] == 255 or large
    else:
        pixels = large and bounds in (((0, 1), (-1, 1), (0, 255)) if dtype.kind == "f" else ((0, 255),))
    if len(shape) <= 4:
        return pixels
    if pixels and large:
        raise EnvError(
            f"observations of shape {shape} look like images, but an image has 2 or 3 dimensions and a stack of images "
            "4; merge the others with gymnasium.wrappers.ReshapeObservation."
        )
    return False


def _remedy(space: spaces.Space[Any]) -> str:
    """Return the wrapper that turns `space` into a supported one."""
    try:
        flat = spaces.utils.flatten_space(space)
    except NotImplementedError:  # a space of the user's own, or one within
        flat = None
    if isinstance(flat, spaces.Box):
        return "wrap the environment in gymnasium.wrappers.FlattenObservation."
    return (
        "elements of this one have no fixed length, so wrap the environment in "
        "gymnasium.wrappers.TransformObservation with a function that returns an array."
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

    def read_as(self, other: ObsSpec) -> ObsSpec:
        """Return the same arrays with kind and divisor as in `other`; unchanged if `other` describes other arrays."""
        read = dataclasses.replace(self.leaf, kind=other.leaf.kind, high=other.leaf.high)
        return other if read == other.leaf else self

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
        rescale: whether the distribution acts in [-1, 1], which is mapped to [low, high] ("box").
    """

    kind: ActionKind
    shape: tuple[int, ...]
    dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    rescale: bool = False

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

    def rescaled(self) -> ActionSpec:
        """Return the spec of actions in [-1, 1] that are mapped to the bounds of this Box.

        Raises:
            ConfigError: the space is no Box, or has a component without finite bounds.
        """
        if self.kind != "box":
            raise ConfigError(f"rescale_actions needs Box actions, but the action space is {self.kind}; leave it out.")
        for i, bounds in enumerate(zip(self.low, self.high, strict=True)):
            if not _bounded(*bounds):
                low, high = (math.inf * sign if x is None else x for x, sign in zip(bounds, (-1, 1), strict=True))
                raise ConfigError(
                    f"rescale_actions needs finite bounds, but component {i} of the action space has {low:g} to "
                    f"{high:g}; give the space finite bounds, or leave it out."
                )
        return dataclasses.replace(self, rescale=True)

    @property
    def note(self) -> str | None:
        """One line on bounds far from the scale at which a Gaussian starts to act, mean 0 and deviation 1, or None."""
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if self.rescale or low is None or high is None or not _bounded(low, high):
                continue
            half = (high - low) / 2
            if low > 1 or high < -1 or not (half == 0 or 1 / _FARTHEST_SCALE <= half <= _FARTHEST_SCALE):
                return (
                    f"actions: component {i} has bounds {low:g} to {high:g}, but the policy starts with actions around "
                    "0 with deviation 1; use --rescale-actions, or gymnasium.wrappers.RescaleAction."
                )
        return None

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return lower and upper bounds of the distribution's Box actions, [D] float32 each, on `device`."""
        low, high = (np.full(len(self.low), -1.0), np.full(len(self.low), 1.0)) if self.rescale else self._box
        return tuple(torch.tensor(x, dtype=torch.float32, device=device) for x in (low, high))  # type: ignore[return-value]

    @functools.cached_property
    def _box(self) -> tuple[_Array, _Array]:
        """Bounds of the environment's Box actions, [D] float64 each."""
        low = [-np.inf if x is None else x for x in self.low]
        return np.array(low), np.array([np.inf if x is None else x for x in self.high])

    @functools.cached_property
    def _scaling(self) -> tuple[_Array, _Array]:
        """Centre and half the width of the bounds, [D] float64 each."""
        low, high = self._box
        return low / 2 + high / 2, high / 2 - low / 2

    @property
    def dimensions(self) -> int:
        """Components of a continuous action; 0 for discrete actions."""
        return math.prod(self.shape) if self.kind == "box" else 0

    def to_env(self, actions: _Array) -> _Array:
        """Convert the distribution's actions [N, ...] to the environment's [N, *shape].

        Box actions are rescaled, if `rescale`, and clipped; discrete ones are shifted by start.
        """
        if self.kind == "box":
            if self.rescale:
                centre, half_width = self._scaling
                actions = centre + half_width * actions
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


class ToEnv(nn.Module):
    """`ActionSpec.to_env` for tensors on a device, without the change of shape and dtype; can be captured."""

    start: Tensor | None
    low: Tensor | None
    high: Tensor | None
    centre: Tensor | None
    half_width: Tensor | None

    def __init__(self, spec: ActionSpec) -> None:
        """Convert actions of `spec`."""
        super().__init__()
        constants = {"start": np.asarray(spec.start, np.int64)} if any(spec.start) else {}
        if spec.kind == "box":
            constants |= dict(zip(("low", "high"), spec._box, strict=True))
        if spec.rescale:
            constants |= dict(zip(("centre", "half_width"), spec._scaling, strict=True))
        for name in ("start", "low", "high", "centre", "half_width"):
            value = constants.get(name)
            tensor = None if value is None else torch.from_numpy(value)
            self.register_buffer(name, tensor.float() if tensor is not None and name != "start" else tensor)

    def forward(self, actions: Tensor) -> Tensor:
        """Convert the distribution's actions [N, ...]: rescale and clip, or shift by start."""
        if self.centre is not None and self.half_width is not None:
            actions = self.centre + self.half_width * actions
        if self.low is not None:
            actions = actions.clamp(self.low, self.high)
        return actions if self.start is None else actions + self.start


def _bounded(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and max(abs(low), abs(high)) < _UNBOUNDED


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _bounds(values: np.ndarray[Any, Any]) -> tuple[float | None, ...]:
    flat: Sequence[float] = np.asarray(values, np.float64).reshape(-1).tolist()
    return tuple(value if math.isfinite(value) else None for value in flat)
