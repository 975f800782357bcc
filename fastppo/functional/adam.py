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
        step: [] float64, steps taken.
    """

    mean: Tensor
    square: Tensor
    step: Tensor


def adam_init(params: Tensor) -> AdamState:
    """Adam's memory before the first step, for the flat `params` [P]."""
    step = torch.zeros((), dtype=torch.float64, device=params.device)
    return AdamState(torch.zeros_like(params), torch.zeros_like(params), step)


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
        state: m, s and the steps taken before this one.
        learning_rate: [] lr.
        eps: epsilon, added after the bias correction as torch.optim.Adam does.

    Returns:
        the new parameters and the new state; nothing is changed in place.

    Source: Kingma and Ba 2015, algorithm 1 (arXiv:1412.6980).
    """
    step = state.step + 1
    mean = torch.lerp(state.mean, grad, 1 - BETA1)
    square = BETA2 * state.square + (1 - BETA2) * grad * grad
    step_size = (learning_rate / (1 - BETA1**step)).to(params.dtype)
    root_correction = (1 - BETA2**step).sqrt().to(params.dtype)
    return params - step_size * mean / (square.sqrt() / root_correction + eps), AdamState(mean, square, step)
