"""Mean and variance of a stream in float64: of one batch, merged over time and over processes."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

# Sums a tensor over all training processes, in place; None for a single process
Pool = Callable[[Tensor], Tensor] | None


class Moments(NamedTuple):
    """Mean, population variance and number of rows.

    Attributes:
        mean: [*shape] float64.
        var: [*shape] float64, the mean squared deviation (divided by n, not n - 1).
        n: [] float64, number of rows; exact up to 2^53.
    """

    mean: Tensor
    var: Tensor
    n: Tensor


def moments_of(rows: Tensor, valid: Tensor | None = None) -> Moments:
    """Return the moments of `rows` over the first dimension, computed in float64.

    Args:
        rows: [B, *shape], B >= 1.
        valid: [B] bool, the rows that count, or None for all. Invalid rows may hold NaN. If no row is valid, mean,
            variance and n are 0.
    """
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
    """Return the moments of the rows of all processes together.

        n = sum n_i;   mean = sum(n_i mean_i) / n;   var = sum(n_i (var_i + (mean_i - mean)^2)) / n

    Args:
        own: moments of this process's rows.
        pool: sums a tensor over all processes, in place.
    """
    n = pool(own.n.clone())
    mean = pool(own.mean * own.n) / n.clamp(min=1)
    var = pool((own.var + (own.mean - mean).square()) * own.n) / n.clamp(min=1)
    return Moments(mean, var, n)


def merge_moments(a: Moments, b: Moments) -> Moments:
    """Return the moments of the rows of `a` and `b` together.

        n = n_a + n_b;   mean = mean_a + d w;   var = (1 - w) var_a + w var_b + w (1 - w) d^2

    with d = mean_b - mean_a and w = n_b / n.

    Source: Chan, Golub and LeVeque 1979, "Updating formulae and a pairwise algorithm for computing sample variances".
    """
    n = a.n + b.n
    share = b.n / n.clamp(min=1)
    delta = b.mean - a.mean
    mean = a.mean + delta * share
    var = a.var * (1 - share) + b.var * share + delta.square() * share * (1 - share)
    return Moments(mean, var, n)
