"""Memory layout of minibatches: gathering B rows of a rollout is one operation."""

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
