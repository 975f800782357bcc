"""All that the loss of an MLP reads, packed to one row per transition, for code without torch: C and Triton."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastppo.functional.losses import Batch
from fastppo.policies.policy import Policy


class PackedRows:
    """Packs batches of one shape.

    Attributes:
        packed: [R, W] the rows: encoded observations, mask, then the fields that the loss reads.
        begins: where each column begins, by name: features, mask, old, action, logprob, advantage, target, value,
            valid. Without masks or fillers there is no such column.
    """

    def __init__(self, policy: Policy) -> None:
        """Pack batches of `policy`, an MLP."""
        self._policy = policy
        self.packed = torch.zeros(0, 0)
        self.begins: dict[str, int] = {}
        self._places: tuple[Tensor, ...] = ()  # views of the columns

    def pack(self, batch: Batch) -> bool:
        """Write `batch` into `packed`; returns whether `packed` is a new tensor, which it is for a new R."""
        columns = self._columns(batch)
        is_new = len(self.packed) != len(batch.logprobs)
        if is_new:
            widths = [x[0].numel() for x in columns.values()]
            self.packed = batch.logprobs.new_zeros(len(batch.logprobs), sum(widths))
            self.begins = dict(zip(columns, itertools.accumulate(widths, initial=0), strict=False))
            self._places = torch.split(self.packed, widths, 1)
        for place, x in zip(self._places, columns.values(), strict=True):
            place.copy_(x.reshape(place.shape))
        return is_new

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        """Return the columns, [R, ...] each."""
        spec, x = self._policy.encoder.spec, self._policy.encoder(batch.obs)
        assert isinstance(x, Tensor), "an MLP reads one array"
        columns = {"features": x}
        if spec.has_mask:
            columns["mask"] = spec.unpack(batch.obs)[-1]
        columns |= {
            "old": batch.params,
            "action": batch.actions,
            "logprob": batch.logprobs,
            "advantage": batch.advantages,
            "target": batch.returns,
            "value": batch.values,
        }
        return columns if batch.valid is None else columns | {"valid": batch.valid}
