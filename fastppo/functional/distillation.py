"""Random network distillation: how far a predictor is from a fixed random network tells how new an observation is.

Source: Burda et al. 2018, "Exploration by random network distillation" (arXiv:1810.12894), with the factors of its code
and of CleanRL's ppo_rnd_envpool.py.
"""

from __future__ import annotations

from torch import Tensor


def novelty(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return half the squared error of each row, 0.5 sum_k (p_k - t_k)^2: the intrinsic reward before its scaling.

    Args:
        predictions: [B, K] p, of the predictor.
        targets: [B, K] t, of the random network.

    Returns:
        [B], at least 0.
    """
    return 0.5 * (predictions - targets).square().sum(-1)


def distillation_loss(predictions: Tensor, targets: Tensor) -> Tensor:
    """Return the predictor's loss, mean_bk (p_bk - t_bk)^2, []; arguments as for `novelty`."""
    return (predictions - targets).square().mean()
