"""Minibatches: which rows of a rollout each holds, and a memory layout in which gathering them is one operation."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.functional.losses import Batch

_WIDEST_PACKED_OBS = 64  # floats per row; longer observations are gathered separately


class Minibatch(NamedTuple):
    """B rows of a packed batch.

    Attributes:
        scale: [2] mean and divisor of the advantages; see `advantage_scale`.
        rows: [B] int64 indices into `data`.
        data: the whole batch, as returned by `BatchLayout.pack`.
    """

    scale: Tensor
    rows: Tensor
    data: tuple[Tensor, ...]


def sequence_rows(order: Tensor, n_envs: int, length: int) -> Tensor:
    """Return the rows of whole sequences, as indices into T x N rows of a rollout, first steps first.

    Args:
        order: [..., S] int64, sequences of `length` steps: number k * N + n is the k-th of environment n.
        n_envs: N.
        length: L.

    Returns:
        [..., L * S] int64.
    """
    first = torch.div(order, n_envs, rounding_mode="floor") * (length * n_envs) + order % n_envs
    steps = torch.arange(length, device=order.device).unsqueeze(1) * n_envs
    return (first.unsqueeze(-2) + steps).flatten(-2)


class Shuffle:
    """Cuts a rollout into minibatches, in a new random order for each epoch.

    Attributes:
        generator: draws the orders.
        update_epochs: E, passes over the rollout.
        n_minibatches: M, minibatches per epoch; divides the number of sequences.
        segment_length: L, steps of a sequence; the T x N rows of a rollout are cut into sequences of one environment
            each, and a minibatch is whole sequences. 1: single rows.
    """

    def __init__(
        self,
        generator: torch.Generator,
        device: torch.device,
        *,
        update_epochs: int,
        n_minibatches: int,
        segment_length: int = 1,
        n_envs: int = 1,
    ) -> None:
        """Cut rollouts of `n_envs` environments (used only if L > 1); the orders lie on `device`."""
        self.generator, self.update_epochs, self.n_minibatches = generator, update_epochs, n_minibatches
        self.segment_length, self._n_envs = segment_length, n_envs
        self._rows = torch.zeros(0, 0, dtype=torch.int64, device=device)

    @property
    def orders(self) -> Tensor:
        """Rows of each minibatch of each epoch, [E, M, B], as drawn last."""
        return self._rows.view(self.update_epochs, self.n_minibatches, -1)

    def allocate(self, n: int) -> None:
        """Allocate the orders of `n` rows, unless they are allocated."""
        if self._rows.shape != (self.update_epochs, n):
            self._rows = torch.zeros(self.update_epochs, n, dtype=torch.int64, device=self._rows.device)

    def draw(self, n: int) -> None:
        """Draw an order of `n` rows for each epoch."""
        self.allocate(n)
        length = self.segment_length
        for order in self.orders:
            drawn = torch.randperm(n // length, generator=self.generator, device=self.generator.device)
            drawn = drawn.view(self.n_minibatches, -1)
            order.copy_(drawn if length == 1 else sequence_rows(drawn, self._n_envs, length))


class BatchLayout:
    """Packs the fields of a batch into one float32 array, so that a minibatch is a single gather.

    Discrete actions are exact in float32 up to 2^24. Images and long vectors are not packed but gathered separately, as
    are the states of a policy with memory, of which a sequence needs only the first.

    Attributes:
        packed: [R, W], R rows; the columns are Batch's fields in order, with obs last if it is packed.
    """

    def __init__(self, batch: Batch, length: int = 1) -> None:
        """Allocate for batches with the shapes and dtypes of `batch`, in sequences of `length` rows."""
        self._length = length
        self._obs_apart = batch.obs.dtype != torch.float32 or batch.obs[0].numel() > _WIDEST_PACKED_OBS
        self._like = {name: x[:0] for name, x in self._columns(batch).items()}
        self._widths = [math.prod(x.shape[1:]) for x in self._like.values()]
        self.packed = torch.zeros(len(batch.logprobs), sum(self._widths), device=batch.logprobs.device)

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        fields = {name: x for name, x in batch._asdict().items() if isinstance(x, Tensor)}
        obs = fields.pop("obs")
        return fields if self._obs_apart else fields | {"obs": obs}

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Write `batch` into `packed`; return it, followed by obs if that is gathered separately, and the states."""
        fields = self._columns(batch).values()
        for place, x in zip(torch.split(self.packed, self._widths, 1), fields, strict=True):
            place.copy_(x.reshape(place.shape))
        return (self.packed, *([batch.obs] if self._obs_apart else []), *batch.states)

    def gather(self, minibatch: Minibatch) -> Batch:
        """Return the rows [B] of a minibatch, with unscaled advantages."""
        data, rows = minibatch.data, minibatch.rows
        parts = torch.split(data[0].index_select(0, rows), self._widths, 1)
        fields: dict[str, Tensor | None] = {"valid": None}
        for (name, like), part in zip(self._like.items(), parts, strict=True):
            fields[name] = part.reshape(len(rows), *like.shape[1:]).to(like.dtype)
        first, states = rows[: len(rows) // self._length], data[1:]
        if self._obs_apart:
            fields["obs"], states = data[1].index_select(0, rows), data[2:]
        return Batch(**fields, states=tuple(x.index_select(0, first) for x in states))  # type: ignore[arg-type]
