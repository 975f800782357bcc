"""Sums of numbers in the infos of simulators, on their device (`--log-info`); see `fastppo.envs.info_sums`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from fastppo.envs.info_sums import InfoTotals, Selection, number_of


class TensorInfoSums:
    """Sums the chosen numbers in the extras of N environments, without reading anything back in a step."""

    def __init__(self, patterns: Sequence[str], n_envs: int) -> None:
        """Start without sums; arguments as of `InfoSums`."""
        self._n_envs, self._selection = n_envs, Selection(patterns)
        self._totals: dict[str, Tensor] = {}  # [2, N] float64 each

    def take(self) -> InfoTotals:
        """Return the totals since the last call, over all environments, in one transfer."""
        names, self._totals, tables = list(self._totals), {}, list(self._totals.values())
        sums = torch.stack([table.sum(1, keepdim=True) for table in tables]).numpy(force=True) if names else ()
        return InfoTotals(1, dict(zip(names, sums, strict=True)), *self._selection.take())

    def add(self, extras: Mapping[str, Any], ended: Tensor) -> None:
        """Add the extras of a step: tensors [N], or numbers of the whole step, which count once.

        Where they hold `final_info`, those of ended episodes (`ended` [N] bool) are read there.
        """
        final = extras.get("final_info")
        own = {key: value for key, value in extras.items() if key not in ("final_info", "_final_info")}
        if isinstance(final, Mapping):
            self._add_tree(final, ended, "")
            self._add_tree(own, ~ended, "")
        else:
            self._add_tree(own, torch.ones_like(ended), "")

    def _add_tree(self, extras: Mapping[str, Any], rows: Tensor, prefix: str) -> None:
        for key, value in extras.items():
            name = f"{prefix}{key}"
            if isinstance(value, Mapping):
                self._add_tree(value, rows, f"{name}/")
                continue
            of_another = str(key).startswith("_") and str(key)[1:] in extras and _is_mask(value, rows)
            if not of_another and self._selection.chooses(name):
                has = extras.get(f"_{key}")
                self._add_value(name, value, rows & has if _is_mask(has, rows) else rows)

    def _add_value(self, name: str, value: Any, rows: Tensor) -> None:  # noqa: ANN401 - a tensor or a number
        x = torch.from_numpy(value) if isinstance(value, np.ndarray) and value.dtype.kind in "biuf" else value
        if isinstance(x, Tensor) and x.shape in (rows.shape, ()) and not x.is_complex():
            x = x.detach().to(rows.device, torch.float64)
        elif (number := number_of(value)) is not None:
            x = torch.full((), number, dtype=torch.float64, device=rows.device)
        else:
            self._selection.refuse(name, value)
            return
        if name not in self._totals:
            self._totals[name] = torch.zeros(2, self._n_envs, dtype=torch.float64, device=rows.device)
        total = self._totals[name]
        if x.dim():
            total[0].add_(torch.where(rows, x, 0.0))
            total[1].add_(rows)
        else:
            total[0, 0].add_(x)
            total[1, 0].add_(1.0)


def _is_mask(value: Any, rows: Tensor) -> TypeGuard[Tensor]:  # noqa: ANN401 - any value
    return isinstance(value, Tensor) and value.dtype == torch.bool and value.shape == rows.shape
