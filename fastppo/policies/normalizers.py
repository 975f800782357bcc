"""Running normalisation of observations and rewards, saved with the model.

Moments are updated once per iteration, in float64, from valid rows only. A rollout, its final observations and its
update therefore use the same observation moments, and the first ratio of an update is 1 up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastppo.functional.gae import linear_scan
from fastppo.functional.moments import Moments, Pool, merge_moments, moments_of, pool_moments


class RunningMoments(nn.Module):
    """Moments of a stream, as buffers that are part of the state_dict.

    Attributes:
        mean: [*shape] float64.
        var: [*shape] float64, population variance.
        count: [] float64, rows so far.
        pool: sums a tensor over all processes; None for a single one.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Start with mean 0, variance 1 and count 0 for rows of `shape`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.pool: Pool = None

    @property
    def scale(self) -> Tensor:
        """1 / sqrt(var + 1e-8), [*shape] float64."""
        return (self.var + 1e-8).rsqrt()

    def update(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Add rows [B, *shape] of all processes, except where `valid` [B] is False."""
        seen, new = Moments(self.mean, self.var, self.count), moments_of(rows, valid)
        if self.pool is not None:
            new = pool_moments(new, self.pool)
        for buffer, value in zip(seen, merge_moments(seen, new), strict=True):
            buffer.copy_(value)


class ObsNormalizer(RunningMoments):
    """Normalise observations: (obs - mean) / sqrt(var + 1e-8), clipped; before the first update, only clipped."""

    def __init__(self, shape: tuple[int, ...], clip: float) -> None:
        """Normalise observations of `shape`, then clip them to [-clip, clip]."""
        super().__init__(shape)
        self.clip = clip

    def forward(self, obs: Tensor) -> Tensor:
        """Return obs [B, *shape] normalised, float32."""
        # subtract in float64: float32 would lose significant digits if the mean is much larger than the deviation
        scaled = (obs - self.mean) * self.scale
        return scaled.float().clamp(-self.clip, self.clip)


class RewardNormalizer(RunningMoments):
    """Divide rewards by the standard deviation of the running discounted return.

        G_t = r_t + gamma (1 - done_{t-1}) G_{t-1};   r_t / sqrt(Var[G] + 1e-8), clipped

    Source: Engstrom et al. 2020 (arXiv:2005.12729) and Gymnasium's NormalizeReward; here G also restarts at
    truncation.

    Attributes:
        carry: [N] float64, the discounted return of each environment's open episode, times gamma.
    """

    carry: Tensor

    def __init__(self, n_envs: int, clip: float) -> None:
        """Scale the rewards of `n_envs` environments, then clip them to [-clip, clip]."""
        super().__init__(())
        self.clip = clip
        self.register_buffer("carry", torch.zeros(n_envs, dtype=torch.float64), persistent=False)

    def update_from_rollout(self, rewards: Tensor, done: Tensor, valid: Tensor | None, gamma: Tensor) -> None:
        """Update the moments from a rollout.

        Args:
            rewards: [T, N] raw.
            done: [T, N] bool, ends of episodes.
            valid: [T, N] bool or None.
            gamma: [] discount factor.
        """
        decay = torch.where(done, 0.0, gamma.double())
        # the scan runs backwards, so flip the rows to run it forwards; row 0 continues the carried return
        forward_decay = torch.cat((torch.ones_like(decay[:1]), decay[:-1]))
        # filler rows and non-finite rewards must not reach the moments
        usable = rewards.isfinite() if valid is None else rewards.isfinite() & valid
        x = torch.where(usable, rewards.double(), 0.0)
        x = torch.cat((x[:1] + self.carry, x[1:]))
        returns = linear_scan(x.flip(0), forward_decay.flip(0)).flip(0)
        self.update(returns.reshape(-1), None if valid is None else valid.reshape(-1))
        self.carry.copy_(decay[-1] * returns[-1])

    def forward(self, rewards: Tensor) -> Tensor:
        """Return rewards [T, N] scaled, float32."""
        scaled = rewards * self.scale
        return scaled.float().clamp(-self.clip, self.clip)
