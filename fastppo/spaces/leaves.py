"""The arrays of an observation as plain data, saved as JSON beside a model. Imports no torch: workers need it too."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from gymnasium import spaces

from fastppo.errors import EnvError

ObsKind = Literal["vector", "image", "discrete", "mask"]
MaskSource = Literal["key", "method", "info"]
_Array = np.ndarray[Any, Any]

MIN_IMAGE_SIDE = 36  # smallest height and width for which every convolution of the Nature CNN has an output


@dataclasses.dataclass(frozen=True)
class ObsLeaf:
    """One array of an observation.

    Attributes:
        kind: "vector" (any Box that is not an image, MultiBinary), "image" ([C, H, W], [H, W, C], [H, W], or a stack of
            these; see `reads_as_image`), "discrete" (int64 indices, one-hot for the network) or "mask" (of the actions
            that are allowed, which no network reads).
        shape: of the array.
        source_dtype: NumPy name of the space's own dtype; float64 and integers are cast to float32 when stored.
        nvec: number of values of each index, for "discrete".
        start: first value of each index, for "discrete".
        high: number by which the network's input is divided; None: 255 for images, 1 for vectors.
        path: keys of a Dict and indices of a Tuple that lead to the array; () if the observation is the array.
        critic_only: whether only the critic reads it.
        mask_source: where the environment gives a mask: under its path, by `action_masks()`, or in
            `info["action_mask"]`.
    """

    kind: ObsKind
    shape: tuple[int, ...]
    source_dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    high: float | None = None
    path: tuple[str | int, ...] = ()
    critic_only: bool = False
    mask_source: MaskSource | None = None

    @property
    def name(self) -> str:
        """The path as text, "camera/left"; empty if the observation is the array."""
        return "/".join(map(str, self.path))

    @property
    def stored_as(self) -> str:
        """NumPy name of the dtype in storage, where the array is a row of its own."""
        if self.kind == "image":
            return "float32" if self.source_dtype.startswith("float") else "uint8"
        return "int64" if self.kind == "discrete" else "float32"

    @property
    def size(self) -> int:
        """Numbers in the array."""
        return math.prod(self.shape)

    @property
    def features(self) -> int:
        """Length of the array once it is flattened (one-hot where discrete) for an MLP."""
        return sum(self.nvec) if self.kind == "discrete" else self.size

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
        return self.size // max(1, height * width), height, width

    @property
    def fits_cnn(self) -> bool:
        """Whether it is an image of at least 36 x 36."""
        return self.kind == "image" and min(self.image_size[1:]) >= MIN_IMAGE_SIDE

    @classmethod
    def from_space(cls, space: spaces.Space[Any], path: tuple[str | int, ...] = ()) -> ObsLeaf:
        """Describe a space whose elements are single arrays, at `path` of an observation.

        Raises:
            EnvError: the space is neither Box, Discrete, MultiDiscrete nor MultiBinary, or an image of five or more
                dimensions.
        """
        if isinstance(space, spaces.Box):
            high, dtype = float(space.high.max(initial=0)), str(space.dtype)
            if reads_as_image(space):
                image = cls("image", space.shape, dtype, high=None if high in (0, 255) else high, path=path)
                # beside other arrays, a small image is a vector: minigrid's 7x7x3 numbers are codes, not pixels
                if not path or image.fits_cnn:
                    return image
            scaled = space.dtype == np.uint8 and 1 < high < 255
            return cls("vector", space.shape, dtype, high=high if scaled else None, path=path)
        if isinstance(space, spaces.Discrete):
            return cls("discrete", (), str(space.dtype), (int(space.n),), (int(space.start),), path=path)
        if isinstance(space, spaces.MultiDiscrete):
            nvec, start = space.nvec.reshape(-1).tolist(), np.asarray(space.start).reshape(-1).tolist()
            return cls("discrete", space.shape, str(space.dtype), tuple(nvec), tuple(start), path=path)
        if isinstance(space, spaces.MultiBinary):
            return cls("vector", space.shape, str(space.dtype), path=path)
        if path:
            raise EnvError(
                f"observation key {'/'.join(map(str, path))} is {type(space).__name__}, which is not supported; leave "
                "it out with --obs-keys, which names the others, or replace it with "
                "gymnasium.wrappers.TransformObservation."
            )
        raise EnvError(
            f"observation space {type(space).__name__} is not supported (Box, Discrete, MultiDiscrete, MultiBinary, "
            f"and Dict and Tuple of these are); {_remedy(space)}"
        )

    @property
    def note(self) -> str | None:
        """One line on how integers and images are read; None for spaces that can be read in one way only."""
        where = f" {self.name}" if self.path else ""
        what = f"observations{where}: {self.source_dtype} {self.shape} is read as"
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


def read_as_images(leaves: Sequence[ObsLeaf]) -> bool:
    """Return whether an observation of these arrays counts as images: it is one, or a CNN reads one of them."""
    return leaves[0].kind == "image" or any(leaf.fits_cnn for leaf in leaves)


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
