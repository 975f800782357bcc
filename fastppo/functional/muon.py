"""Muon on the matrices of hidden layers, and Adam on all other parameters, of one flat parameter vector."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fastppo.functional.adam import AdamState, adam_init, adam_step
from fastppo.functional.optimizer import Optimizer

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of the quintic polynomial, steepest at 0
_ITERATIONS = 5
_LEAST_NORM = 1e-7


class Place(NamedTuple):
    """Where a matrix lies in the flat vector: from `offset` on, row by row."""

    offset: int
    rows: int
    columns: int


class MuonState(NamedTuple):
    """Memory for P parameters, of which Q are in matrices.

    Attributes:
        mean: [P - Q] Adam's running mean of gradients.
        square: [P - Q] Adam's running mean of squared gradients.
        left1: [] float64, as in `AdamState`.
        left2: [] float64, as in `AdamState`.
        momentum: [Q] running mean of the gradients of the matrices, one after another.
    """

    mean: Tensor
    square: Tensor
    left1: Tensor
    left2: Tensor
    momentum: Tensor


def muon(places: Sequence[Place], eps: float) -> Optimizer:
    """Muon for the matrices at `places`, in ascending order; Adam with epsilon `eps` for the rest."""
    layout = tuple(places)
    return Optimizer(functools.partial(muon_init, places=layout), functools.partial(muon_step, places=layout, eps=eps))


def muon_init(params: Tensor, places: Sequence[Place]) -> MuonState:
    """Return the state before the first step, for flat params [P]."""
    rest, matrices = _split(params, places)
    return MuonState(*adam_init(torch.cat(rest)), torch.cat([torch.zeros_like(x) for x in matrices]))


def muon_step(
    params: Tensor, gradient: Tensor, state: MuonState, learning_rate: Tensor, *, places: Sequence[Place], eps: float
) -> tuple[Tensor, MuonState]:
    """Take one step of Muon with Nesterov's momentum, and one of Adam.

        m <- b m + (1 - b) g;  O = orthogonalize((1 - b) g + b m)
        x <- x - lr 0.2 sqrt(max(rows, columns)) O

    The factor gives a step a root mean square of about 0.2 lr, as Adam's typically has, so that both share one lr.

    Args:
        params: x, [P].
        gradient: g, [P].
        state: before this step.
        learning_rate: [] lr.
        places: of the matrices.
        eps: Adam's epsilon.

    Returns:
        New params and new state; nothing is changed in place.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks"; the factor: Liu et al. 2025,
    "Muon is scalable for LLM training" (arXiv:2502.16982). As torch.optim.Muon(adjust_lr_fn="match_rms_adamw",
    weight_decay=0), in float32 instead of bfloat16.
    """
    rest, matrices = _split(params, places)
    rest_gradients, gradients = _split(gradient, places)
    new_rest, adam_state = adam_step(
        torch.cat(rest), torch.cat(rest_gradients), AdamState(*state[:4]), learning_rate, eps
    )
    flat = torch.cat(gradients)
    momentum = torch.lerp(state.momentum, flat, 1 - MOMENTUM)
    ahead = torch.lerp(flat, momentum, MOMENTUM)
    sizes = [place.rows * place.columns for place in places]
    new_matrices = []
    for place, matrix, own in zip(places, matrices, torch.split(ahead, sizes), strict=True):
        scale = 0.2 * math.sqrt(max(place.rows, place.columns))
        step = orthogonalize(own.view(place.rows, place.columns))
        new_matrices.append(matrix - learning_rate * scale * step.reshape(-1))
    first, *others = torch.split(new_rest, [len(x) for x in rest])
    pairs = zip(new_matrices, others, strict=True)
    new = torch.cat([first, *(piece for pair in pairs for piece in pair)])
    return new, MuonState(*adam_state, momentum)


def orthogonalize(matrix: Tensor) -> Tensor:
    """Return about U V^T for a matrix U S V^T [R, C].

    Singular values of at least 0.3 % of the Frobenius norm end between 0.68 and 1.21, those of 0 stay 0. Five
    Newton-Schulz iterations on the matrix divided by that norm, transposed if R > C:

        A = X X^T;  X <- a X + (b A + c A^2) X
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x: Tensor = matrix.T if tall else matrix
    x = x / torch.linalg.vector_norm(x).clamp(min=_LEAST_NORM)
    for _ in range(_ITERATIONS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def _split(vector: Tensor, places: Sequence[Place]) -> tuple[list[Tensor], list[Tensor]]:
    """Return the pieces of a vector [P] before, between and after the matrices, and the matrices, flat."""
    sizes, end = list[int](), 0
    for offset, rows, columns in places:
        sizes += [offset - end, rows * columns]
        end = offset + rows * columns
    pieces = torch.split(vector, [*sizes, len(vector) - end])
    return list(pieces[0::2]), list(pieces[1::2])
