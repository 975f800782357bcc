"""Actions as a distribution makes them and as an environment takes them."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from gymnasium import spaces
from torch import Tensor, nn

from fastppo.errors import ConfigError, EnvError
from fastppo.functional.bounded_distributions import Beta, SquashedGaussian
from fastppo.functional.distributions import (
    Bernoulli,
    BoxDistribution,
    Categorical,
    Distribution,
    Gaussian,
    MultiCategorical,
)

ActionKind = Literal["discrete", "multidiscrete", "multibinary", "box"]
BoxDistributionName = Literal["gaussian", "squashed", "beta"]
_Array = np.ndarray[Any, Any]

_UNBOUNDED = 1e30  # bounds of this size, such as the largest float32, mean that there are none
_BOX_DISTRIBUTIONS: dict[BoxDistributionName, Callable[[int], BoxDistribution]] = {
    "gaussian": Gaussian,
    "squashed": SquashedGaussian,
    "beta": Beta,
}
_FARTHEST_SCALE = 10.0  # of Box actions, from the Gaussian's initial standard deviation of 1


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
        box_distribution: "gaussian", clipped to the bounds, or one within them ("box"): "squashed" or "beta".
    """

    kind: ActionKind
    shape: tuple[int, ...]
    dtype: str
    nvec: tuple[int, ...] = ()
    start: tuple[int, ...] = ()
    low: tuple[float | None, ...] = ()
    high: tuple[float | None, ...] = ()
    rescale: bool = False
    box_distribution: BoxDistributionName = "gaussian"

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ActionSpec:
        """Describe `space`.

        Raises:
            EnvError: the space is neither Discrete, MultiDiscrete, MultiBinary nor Box, or holds no numbers.
        """
        if space.shape is not None and not math.prod(space.shape):
            raise EnvError(f"action space {space} holds no numbers; give it at least one, such as shape (1,).")
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
        return self.box if self.kind == "box" else Bernoulli(math.prod(self.shape))

    @property
    def box(self) -> BoxDistribution:
        """Return the distribution over the actions of a Box."""
        assert self.kind == "box", self.kind
        return _BOX_DISTRIBUTIONS[self.box_distribution](math.prod(self.shape))

    @functools.cached_property  # read at every step
    def squash(self) -> float | None:
        """Factor k of the map tanh(k u) from the distribution's actions u to [-1, 1]; None: they are not squashed."""
        return self.box.squash if self.kind == "box" else None

    def rescaled(self) -> ActionSpec:
        """Return the spec of actions in [-1, 1] that are mapped to the bounds of this Box.

        Raises:
            ConfigError: the space is no Box, or has a component without finite bounds.
        """
        self._check_bounded("rescale_actions")
        return dataclasses.replace(self, rescale=True)

    def with_distribution(self, name: BoxDistributionName) -> ActionSpec:
        """Return the spec of actions from the Box distribution `name`; "gaussian" fits other spaces too.

        Raises:
            ConfigError: it has bounds, and the space is no Box, or has a component without finite bounds.
        """
        if name != "gaussian":
            self._check_bounded(f"action_distribution={name}")
        return dataclasses.replace(self, box_distribution=name)

    def _check_bounded(self, setting: str) -> None:
        if self.kind != "box":
            raise ConfigError(f"{setting} needs Box actions, but the action space is {self.kind}; leave it out.")
        for i, bounds in enumerate(zip(self.low, self.high, strict=True)):
            if not _bounded(*bounds):
                low, high = (math.inf * sign if x is None else x for x, sign in zip(bounds, (-1, 1), strict=True))
                raise ConfigError(
                    f"{setting} needs finite bounds, but component {i} of the action space has {low:g} to "
                    f"{high:g}; give the space finite bounds, or leave it out."
                )

    @property
    def note(self) -> str | None:
        """One line on bounds far from the scale at which a Gaussian starts to act, mean 0 and deviation 1, or None."""
        for i, (low, high) in enumerate(zip(self.low, self.high, strict=True)):
            if self._unit or low is None or high is None or not _bounded(low, high):
                continue
            half = (high - low) / 2
            if low > 1 or high < -1 or not (half == 0 or 1 / _FARTHEST_SCALE <= half <= _FARTHEST_SCALE):
                return (
                    f"actions: component {i} has bounds {low:g} to {high:g}, but the policy starts with actions around "
                    "0 with deviation 1; use --rescale-actions, or gymnasium.wrappers.RescaleAction."
                )
        return None

    @functools.cached_property
    def _unit(self) -> bool:
        """Whether [-1, 1] is mapped to the bounds."""
        return self.rescale or self.squash is not None

    def bounds(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return bounds of the distribution's Box actions, after `squash`, [D] float32 each, on `device`."""
        low, high = (np.full(len(self.low), -1.0), np.full(len(self.low), 1.0)) if self._unit else self._box
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

    @functools.cached_property
    def _as_they_are(self) -> bool:
        """Whether the environment takes the distribution's actions."""
        same = self.distribution.action_shape == self.shape and self.dtype == "int64"
        return same and self.kind in ("discrete", "multidiscrete") and not any(self.start)

    def to_env(self, actions: _Array) -> _Array:
        """Convert the distribution's actions [N, ...] to the environment's [N, *shape].

        Box actions are squashed, scaled from [-1, 1] to the bounds, if `rescale` or squashed, and clipped; discrete
        ones are shifted by start.
        """
        if self._as_they_are:
            return actions
        if self.kind == "box":
            if self.squash is not None:
                actions = np.tanh(self.squash * actions)
            if self._unit:
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
        plain: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
        return cls(**plain)


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
        self.squash = spec.squash
        constants = {"start": np.asarray(spec.start, np.int64)} if any(spec.start) else {}
        if spec.kind == "box":
            constants |= dict(zip(("low", "high"), spec._box, strict=True))
        if spec._unit:
            constants |= dict(zip(("centre", "half_width"), spec._scaling, strict=True))
        for name in ("start", "low", "high", "centre", "half_width"):
            value = constants.get(name)
            tensor = None if value is None else torch.from_numpy(value)
            self.register_buffer(name, tensor.float() if tensor is not None and name != "start" else tensor)

    def forward(self, actions: Tensor) -> Tensor:
        """Convert the distribution's actions [N, ...]: squash, rescale and clip, or shift by start."""
        if self.squash is not None:
            actions = torch.tanh(self.squash * actions)
        if self.centre is not None and self.half_width is not None:
            actions = self.centre + self.half_width * actions
        if self.low is not None:
            actions = actions.clamp(self.low, self.high)
        return actions if self.start is None else actions + self.start


def _bounded(low: float | None, high: float | None) -> bool:
    return low is not None and high is not None and max(abs(low), abs(high)) < _UNBOUNDED


def _bounds(values: np.ndarray[Any, Any]) -> tuple[float | None, ...]:
    flat: Sequence[float] = np.asarray(values, np.float64).reshape(-1).tolist()
    return tuple(value if math.isfinite(value) else None for value in flat)
