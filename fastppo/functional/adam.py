"""Gradient clipping and Adam on one flat parameter vector: pure functions over explicit state."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

BETA1, BETA2 = 0.9, 0.999


class AdamState(NamedTuple):
    """Adam's memory for P parameters.

    Attributes:
        mean: [P] running mean of gradients.
        square: [P] running mean of squared gradients.
        left1: [] float64, b1^n after n steps, what is left of the zero start in `mean`.
        left2: [] float64, b2^n. Kept as running products: a power inside a compiled kernel is taken for every element.
    """

    mean: Tensor
    square: Tensor
    left1: Tensor
    left2: Tensor


def adam_init(params: Tensor) -> AdamState:
    """Adam's memory before the first step, for the flat `params` [P]."""
    left1, left2 = (torch.ones((), dtype=torch.float64, device=params.device) for _ in range(2))
    return AdamState(torch.zeros_like(params), torch.zeros_like(params), left1, left2)


def clip_by_norm(grad: Tensor, max_norm: Tensor) -> tuple[Tensor, Tensor]:
    """The gradient scaled to an L2 norm of at most `max_norm`, and its norm before.

    As torch.nn.utils.clip_grad_norm_: the factor is min(1, max_norm / (norm + 1e-6)).
    """
    norm = torch.linalg.vector_norm(grad)
    return grad * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm


def adam_step(
    params: Tensor, grad: Tensor, state: AdamState, learning_rate: Tensor, eps: float
) -> tuple[Tensor, AdamState]:
    """One step of Adam.

        m <- b1 m + (1 - b1) g;  s <- b2 s + (1 - b2) g^2
        x <- x - lr * (m / (1 - b1^n)) / (sqrt(s / (1 - b2^n)) + eps)

    Args:
        params: x, [P].
        grad: g, [P].
        state: m, s and the powers of b1 and b2 before this step.
        learning_rate: [] lr.
        eps: epsilon, added after the bias correction as torch.optim.Adam does.

    Returns:
        the new parameters and the new state; nothing is changed in place.

    Source: Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980).
    """
    left1, left2 = BETA1 * state.left1, BETA2 * state.left2
    mean = torch.lerp(state.mean, grad, 1 - BETA1)
    square = BETA2 * state.square + (1 - BETA2) * grad * grad
    step_size = (learning_rate / (1 - left1)).to(params.dtype)
    correction = (1 - left2).rsqrt().to(params.dtype)
    new = params - step_size * mean / (square.sqrt() * correction + eps)
    return new, AdamState(mean, square, left1, left2)
