"""Mean and variance of a stream, in float64: measured, merged, applied."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Pool = Callable[[Tensor], Tensor] | None  # sums a tensor over processes; None: there is one


class Moments(NamedTuple):
    """Mean, population variance and number of what was seen.

    Attributes:
        mean: [*shape] float64.
        var: [*shape] float64, divided by the count.
        n: [] float64, exact up to 2^53 rows.
    """

    mean: Tensor
    var: Tensor
    n: Tensor


def moments_of(rows: Tensor, valid: Tensor | None = None) -> Moments:
    """Moments of rows [B, *shape] over B, leaving out the rows where `valid` [B] is False."""
    x = rows.double()
    if valid is None:
        mean = x.mean(0)
        n = torch.full((), float(len(x)), dtype=torch.float64, device=x.device)
        return Moments(mean, (x - mean).square().mean(0), n)
    w = valid.double().reshape(-1, *[1] * (x.dim() - 1))
    n = w.sum()
    mean = torch.where(w > 0, x, 0.0).sum(0) / n.clamp(min=1)
    var = torch.where(w > 0, (x - mean).square(), 0.0).sum(0) / n.clamp(min=1)
    return Moments(mean, var, n)


def pool_moments(own: Moments, pool: Callable[[Tensor], Tensor]) -> Moments:
    """Moments of what all processes have seen, each its `own`; `pool` sums a tensor over them, in place."""
    n = pool(own.n.clone())
    mean = pool(own.mean * own.n) / n.clamp(min=1)
    var = pool((own.var + (own.mean - mean).square()) * own.n) / n.clamp(min=1)
    return Moments(mean, var, n)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Moments of two streams seen together.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    n = a.n + b.n
    share = b.n / n.clamp(min=1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    var = a.var * (1 - share) + b.var * share + delta.square() * share * (1 - share)
    return Moments(mean, var, n)
