"""What an update is judged by: approximate KL, clip fraction, explained variance. No gradient flows through any."""

from __future__ import annotations

import torch
from torch import Tensor

from fastppo.functional.moments import Pool


def masked_mean(x: Tensor, valid: Tensor | None) -> Tensor:
    """Mean of x over its rows, leaving out those where `valid` (same shape, bool) is False; 0 where none is left."""
    if valid is None:
        return x.mean()
    return torch.where(valid, x, 0.0).sum() / valid.sum().clamp(min=1)


def approx_kl_k1(logratio: Tensor, valid: Tensor | None = None) -> Tensor:
    """mean(-x) with x = log pi_new - log pi_old, in nats: unbiased for KL(old || new), but may be negative.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html.
    """
    return masked_mean(-logratio, valid)


def approx_kl_k3(logratio: Tensor, valid: Tensor | None = None) -> Tensor:
    """mean(exp(x) - 1 - x) with x = log pi_new - log pi_old, in nats: unbiased for KL(old || new), never negative.

    Source: Schulman 2020, http://joschu.net/blog/kl-approx.html. expm1 keeps it from rounding below 0.
    """
    return masked_mean(torch.expm1(logratio) - logratio, valid)


def clip_fraction(logratio: Tensor, clip_coef: Tensor, valid: Tensor | None = None) -> Tensor:
    """Fraction of rows whose ratio lies further than clip_coef from 1."""
    return masked_mean((torch.expm1(logratio).abs() > clip_coef).float(), valid)


def explained_variance(values: Tensor, returns: Tensor, valid: Tensor | None = None, pool: Pool = None) -> Tensor:
    """1 - Var[returns - values] / Var[returns]; NaN where the returns don't vary.

    1 is a perfect critic, 0 one that is no better than a constant, below 0 worse than that. `pool` sums a tensor over
    the processes whose rows count together.
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
