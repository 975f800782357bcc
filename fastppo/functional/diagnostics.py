"""Diagnostics of an update: approximate KL, clip fraction, explained variance, range of actions.

Rows have any shape, such as [B] or [T, N]. `valid`, bool of that shape, marks the rows that count, None stands for all;
other rows may hold NaN.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.functional.moments import Pool


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Return the mean of `x` over its valid rows, [], in units of x; 0 if no row is valid."""
    if valid is None:
        return x.mean()
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def approx_kl_k1(logratio: Tensor, valid: Tensor | None = None) -> Tensor:
    """Estimate KL(old || new) as mean(-x) with x = log pi_new - log pi_old; unbiased, but may be negative.

    Args:
        logratio: x at actions of the old policy, in nats.
        valid: bool or None.

    Returns:
        [] in nats.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return masked_mean(-logratio, valid)


def approx_kl_k3(logratio: Tensor, valid: Tensor | None = None) -> Tensor:
    """Estimate KL(old || new) as mean(exp(x) - 1 - x) with x = log pi_new - log pi_old; unbiased, never negative.

    Arguments, result and source as in `approx_kl_k1`.
    """
    # expm1, as exp(x) - 1 could round the mean below 0
    return masked_mean(torch.expm1(logratio) - logratio, valid)


def clip_fraction(logratio: Tensor, clip_coef: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the fraction of rows with |ratio - 1| > clip_coef, ratio = exp(logratio).

    Args:
        logratio: log pi_new - log pi_old, in nats.
        clip_coef: [] >= 0.
        valid: bool or None.

    Returns:
        [] in [0, 1].
    """
    return masked_mean((torch.expm1(logratio).abs() > clip_coef).float(), valid)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor | None = None, pool: Pool = None) -> Tensor:
    """Return 1 - Var[returns - values] / Var[returns], over the rows of all processes.

    Args:
        values: the critic's predictions, in reward units.
        returns: its targets.
        valid: bool or None.
        pool: sums a tensor over all processes; None for a single one.

    Returns:
        [] at most 1: 1 for a perfect critic, 0 for one as good as a constant, negative for a worse one; NaN if the
        returns don't vary.
    """

    def mean(x: Tensor) -> Tensor:
        if pool is None:
            return masked_mean(x, valid)
        counted = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
        sums = pool(torch.stack((torch.where(counted, x, 0.0).sum(), counted.sum().to(x.dtype))))
        return sums[0] / sums[1].clamp(min=1)

    error = returns - values
    noise = mean((error - mean(error)).square())
    spread = mean((returns - mean(returns)).square())
    return torch.where(spread > 0, 1 - noise / spread, torch.nan)


def action_range(actions: Tensor, low: Tensor, high: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the share of their bounds that actions use: mean |a - centre| / half-range, with a clipped to the bounds.

    Args:
        actions: [..., D] of rows [...].
        low: [D] lower bounds; a component without two finite bounds does not count.
        high: [D] upper bounds.
        valid: bool [...] or None.

    Returns:
        [] in [0, 1]; NaN if no component has two finite bounds.
    """
    bounded = (high - low).isfinite() & (high > low)
    low, high = torch.where(bounded, low, -1.0), torch.where(bounded, high, 1.0)
    share = (2 * torch.clamp(actions, low, high) - high - low).abs() / (high - low)
    return masked_mean(torch.where(bounded, share, torch.nan).nanmean(-1), valid)
