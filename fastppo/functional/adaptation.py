"""Coefficients that follow the KL divergence between the policies before and during an update, as pure rules."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

LOWEST_KL_COEF, HIGHEST_KL_COEF = 1e-4, 1e4


class Adaptation(NamedTuple):
    """A coefficient that an update adapts.

    Attributes:
        start: value at the start of a run.
        rule: (value [], KL [] in nats) -> next value []; a NaN KL leaves the value unchanged.
    """

    start: float
    rule: Callable[[Tensor, Tensor], Tensor]


def adapted_kl_coef(beta: Tensor, kl: Tensor, target: float) -> Tensor:
    """Return the KL coefficient of the next update.

        beta <- beta / 2  if KL < target / 1.5
        beta <- 2 beta    if KL > 1.5 target,     clamped to [1e-4, 1e4]

    Args:
        beta: [] coefficient of this update.
        kl: [] mean KL(old || new) of this update, in nats.
        target: KL that an update should reach, in nats.

    Source: Schulman et al. 2017, section 4 (arXiv:1707.06347), which has no bounds.
    """
    lowered = torch.where(kl < target / 1.5, beta / 2, beta)
    return torch.where(kl > target * 1.5, beta * 2, lowered).clamp(LOWEST_KL_COEF, HIGHEST_KL_COEF)


def adapted_learning_rate(rate: Tensor, kl: Tensor, target: float, lowest: float, highest: float) -> Tensor:
    """Return the learning rate of the step that follows a KL.

        rate <- rate / 1.5  if KL > 2 target
        rate <- 1.5 rate    if 0 < KL < target / 2,     clamped to [lowest, highest]

    A KL of 0 says nothing about the rate.

    Args:
        rate: [] rate of the step before.
        kl: [] mean KL(old || new) of a minibatch before its step, in nats.
        target: in nats.
        lowest: lower bound.
        highest: upper bound.

    Source: rsl_rl's `schedule="adaptive"` (Rudin et al. 2022, arXiv:2109.11978).
    """
    raised = torch.where((kl > 0) & (kl < target / 2), rate * 1.5, rate)
    return torch.where(kl > target * 2, rate / 1.5, raised).clamp(lowest, highest)
