"""Adam on one flat parameter vector."""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.functional.optimizer import Optimizer

BETA1, BETA2 = 0.9, 0.999


class AdamState(NamedTuple):
    """Adam's memory for P parameters.

    Attributes:
        mean: [P] running mean of gradients.
        square: [P] running mean of squared gradients.
        left1: [] float64, b1^n after n steps: the weight of the zero start in `mean`.
        left2: [] float64, b2^n. Kept as running products, since a compiled kernel computes a power per element.
    """

    mean: Tensor
    square: Tensor
    left1: Tensor
    left2: Tensor


def adam(eps: float) -> Optimizer:
    """Adam with the given epsilon."""
    return Optimizer(adam_init, functools.partial(adam_step, eps=eps), adam_eps=eps)


def adam_init(params: Tensor) -> AdamState:
    """Return Adam's state before the first step, for flat params [P]."""
    left1, left2 = (torch.ones((), dtype=torch.float64, device=params.device) for _ in range(2))
    return AdamState(torch.zeros_like(params), torch.zeros_like(params), left1, left2)


def adam_step(
    params: Tensor, gradient: Tensor, state: AdamState, learning_rate: Tensor, eps: float
) -> tuple[Tensor, AdamState]:
    """Take one step of Adam.

        m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) g^2
        x <- x - lr * (m / (1 - b1^n)) / (sqrt(s / (1 - b2^n)) + eps)

    Args:
        params: x, [P].
        gradient: g, [P].
        state: m, s and the powers of b1 and b2 before this step.
        learning_rate: [] lr.
        eps: epsilon, added after the bias correction as in torch.optim.Adam.

    Returns:
        New params and new state; nothing is changed in place.

    Source: Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980).
    """
    left1, left2 = BETA1 * state.left1, BETA2 * state.left2
    mean = torch.lerp(state.mean, gradient, 1 - BETA1)
    square = BETA2 * state.square + (1 - BETA2) * gradient * gradient
    step_size = (learning_rate / (1 - left1)).to(params.dtype)
    correction = (1 - left2).rsqrt().to(params.dtype)
    new = params - step_size * mean / (square.sqrt() * correction + eps)
    return new, AdamState(mean, square, left1, left2)
