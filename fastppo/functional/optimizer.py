"""An optimiser of one flat parameter vector, as two pure functions over explicit state."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Optimizer(NamedTuple):
    """An optimiser as `PPOUpdate` uses it; `adam` and `muon` make one.

    Attributes:
        init: params [P] -> state, a NamedTuple of tensors. Field names are the names in checkpoints.
        step: (params [P], gradient [P], state, learning rate []) -> new params and new state; nothing in place.
        adam_eps: epsilon of Adam, for code that takes its steps itself; None: the steps are not Adam's.
    """

    init: Callable[[Tensor], Any]
    step: Callable[[Tensor, Tensor, Any, Tensor], tuple[Tensor, Any]]
    adam_eps: float | None = None


def clip_by_norm(gradient: Tensor, max_norm: Tensor) -> tuple[Tensor, Tensor]:
    """Scale the gradient [P] to an L2 norm of at most `max_norm`; returns it with the norm [] before.

        g <- g min(1, max_norm / (|g| + 1e-6))

    Source: torch.nn.utils.clip_grad_norm_.
    """
    norm = torch.linalg.vector_norm(gradient)
    return gradient * (max_norm / (norm + 1e-6)).clamp(max=1.0), norm
