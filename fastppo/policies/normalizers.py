"""Running normalisation of observations and rewards, owned by the trainer and saved with the model.

Moments change once per iteration, in float64 and from valid rows only. So a rollout, its final observations and its
update see the same observation moments, and the first ratio of an update is 1 up to rounding.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastppo.functional.gae import linear_scan
from fastppo.functional.moments import Moments, Pool, merge_moments, moments_of, pool_moments


class RunningMoments(nn.Module):
    """Moments of a stream as buffers, so that they are part of a state_dict."""

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        """Nothing seen yet: mean 0, variance 1, count 0, for rows of `shape`."""
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))
        self.pool: Pool = None  # set where several processes train together

    def update(self, rows: Tensor, valid: Tensor | None = None) -> None:
        """Take in rows [B, *shape], but those where `valid` [B] is False."""
        seen, new = Moments(self.mean, self.var, self.count), moments_of(rows, valid)
        if self.pool is not None:
            new = pool_moments(new, self.pool)
        for buffer, value in zip(seen, merge_moments(seen, new), strict=True):
            buffer.copy_(value)


class ObsNormalizer(RunningMoments):
    """(obs - mean) / sqrt(var + 1e-8), clipped. Before anything was seen, the identity, clipped."""

    def __init__(self, shape: tuple[int, ...], clip: float) -> None:
        """For observations of `shape`, clipped to [-clip, clip] once normalised."""
        super().__init__(shape)
        self.clip = clip

    def forward(self, obs: Tensor) -> Tensor:
        """Normalise obs [B, *shape], float32."""
        # the difference in float64: a mean that is large against its deviation must not cost the digits that matter
        scaled = (obs - self.mean) * (self.var + 1e-8).rsqrt()
        return scaled.float().clamp(-self.clip, self.clip)


class RewardNormalizer(RunningMoments):
    """Rewards over the standard deviation of each environment's running discounted return.

        G_t = r_t + gamma (1 - done_{t-1}) G_{t-1};   r_t / sqrt(Var[G] + 1e-8), clipped

    Source: Engstrom et al. 2020 (arXiv:2005.12729), Gymnasium's NormalizeReward; unlike the latter, G starts afresh
    after either kind of ending.
    """

    carry: Tensor

    def __init__(self, n_envs: int, clip: float) -> None:
        """For `n_envs` environments, clipped to [-clip, clip] once scaled."""
        super().__init__(())
        self.clip = clip
        # gamma-discounted return so far of each environment's open episode
        self.register_buffer("carry", torch.zeros(n_envs, dtype=torch.float64), persistent=False)

    def update_from_rollout(self, rewards: Tensor, done: Tensor, valid: Tensor | None, gamma: Tensor) -> None:
        """Take in a rollout's raw rewards and endings, [T, N] each."""
        decay = torch.where(done, 0.0, gamma.double())
        # forward in time is a backward scan of the flipped rows; row 0 continues the carried return
        forward_decay = torch.cat((torch.ones_like(decay[:1]), decay[:-1]))
        # neither a filler row nor a reward that is no number may reach the moments
        usable = rewards.isfinite() if valid is None else rewards.isfinite() & valid
        x = torch.where(usable, rewards.double(), 0.0)
        x = torch.cat((x[:1] + self.carry, x[1:]))
        returns = linear_scan(x.flip(0), forward_decay.flip(0)).flip(0)
        self.update(returns.reshape(-1), None if valid is None else valid.reshape(-1))
        self.carry.copy_(decay[-1] * returns[-1])

    def forward(self, rewards: Tensor) -> Tensor:
        """Scale rewards [T, N], float32."""
        scaled = rewards * (self.var + 1e-8).rsqrt()
        return scaled.float().clamp(-self.clip, self.clip)
