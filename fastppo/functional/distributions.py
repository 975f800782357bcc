"""Action distributions as plain descriptions with pure methods: no per-step objects, no validation, no hidden state.

Each says how long the network's output is, and how that output and a block of pre-drawn noise make an action. Noise is
always additive, so that the noise of a whole rollout is drawn at once, outside whatever is compiled or captured:
Gumbel noise on logits, logistic noise on Bernoulli logits, standard normal noise scaled by the standard deviation.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
_SHARPNESS = 16.0


def bound_log_std(raw: Tensor) -> Tensor:
    """A log standard deviation kept smoothly within [-10, 2]; within 1e-6 of the identity on [-5, 1].

        y = x - softplus(k (x - hi)) / k + softplus(k (lo - x)) / k

    Written as the identity and two corrections that vanish inside, so that nothing is lost to rounding there. Hard
    clamping would stop the gradient at the bounds; no bound at all ends in a standard deviation of 0 or inf.
    """
    over = F.softplus(_SHARPNESS * (raw - LOG_STD_MAX)) / _SHARPNESS
    under = F.softplus(_SHARPNESS * (LOG_STD_MIN - raw)) / _SHARPNESS
    return raw - over + under


class Distribution(Protocol):
    """What the policy asks of an action distribution. B stands for any leading shape.

    Attributes:
        n_params: P, length of the network's output for one observation.
        action_shape: shape of one action as stored.
        action_dtype: dtype of actions as stored.
        noise_size: length of the noise for one action.
    """

    @property
    def n_params(self) -> int: ...  # noqa: D102
    @property
    def action_shape(self) -> tuple[int, ...]: ...  # noqa: D102
    @property
    def action_dtype(self) -> torch.dtype: ...  # noqa: D102
    @property
    def noise_size(self) -> int: ...  # noqa: D102

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` [B, noise_size] with this distribution's noise."""

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Actions [B, *action_shape] from params [B, P] and noise [B, noise_size]."""

    def mode(self, params: Tensor) -> Tensor:
        """The most probable actions [B, *action_shape]."""

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Log-probability (density for Box) of actions, [B] in nats."""

    def entropy(self, params: Tensor) -> Tensor:
        """Entropy (differential for Box), [B] in nats."""

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Exact KL(old || new) of two parameter blocks [B, P], [B] in nats."""


def _gumbel(out: Tensor, generator: torch.Generator) -> None:
    # -log of an exponential variate is Gumbel; the exponential sampler never returns 0
    out.exponential_(generator=generator).log_().neg_()


def _blocks(params: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.split(params, list(sizes), -1)


def _categorical_entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp).sum(-1)


def _chosen(table: Tensor, index: Tensor) -> Tensor:
    # table[..., index]: a comparison, not a gather, whose gradient is a scatter that a compiler can't fuse
    choices = torch.arange(table.shape[-1], device=table.device)
    return torch.where(choices == index.unsqueeze(-1), table, 0.0).sum(-1)


def _categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    logp = old.log_softmax(-1)
    return (logp.exp() * (logp - new.log_softmax(-1))).sum(-1)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One choice among n; params are logits [B, n], actions [B] int64."""

    n: int
    action_shape = ()
    action_dtype = torch.int64

    @property
    def n_params(self) -> int:
        """One logit for each choice."""
        return self.n

    @property
    def noise_size(self) -> int:
        """One Gumbel variate for each choice."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Gumbel noise."""
        _gumbel(out, generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """The Gumbel-max trick."""
        return (params + noise).argmax(-1)

    def mode(self, params: Tensor) -> Tensor:
        """The largest logit."""
        return params.argmax(-1)

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Log softmax(params)[actions]."""
        return _chosen(params.log_softmax(-1), actions)

    def entropy(self, params: Tensor) -> Tensor:
        """-sum p log p."""
        return _categorical_entropy(params)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum of p_old (log p_old - log p_new)."""
        return _categorical_kl(old, new)


@dataclasses.dataclass(frozen=True)
class MultiCategorical:
    """K independent choices; params are the K blocks of logits side by side, actions [B, K] int64."""

    nvec: tuple[int, ...]
    action_dtype = torch.int64

    @property
    def action_shape(self) -> tuple[int, ...]:
        """One index for each component."""
        return (len(self.nvec),)

    @property
    def n_params(self) -> int:
        """One logit for each choice of each component."""
        return sum(self.nvec)

    @property
    def noise_size(self) -> int:
        """One Gumbel variate for each logit."""
        return self.n_params

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Gumbel noise."""
        _gumbel(out, generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """The Gumbel-max trick in each component."""
        return self.mode(params + noise)

    def mode(self, params: Tensor) -> Tensor:
        """The largest logit of each component."""
        return torch.stack([block.argmax(-1) for block in _blocks(params, self.nvec)], -1)

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Sum over components."""
        blocks = zip(_blocks(params, self.nvec), actions.unbind(-1), strict=True)
        logps = [_chosen(logits.log_softmax(-1), action) for logits, action in blocks]
        return torch.stack(logps, -1).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum over components."""
        return torch.stack([_categorical_entropy(block) for block in _blocks(params, self.nvec)], -1).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum over components."""
        blocks = zip(_blocks(old, self.nvec), _blocks(new, self.nvec), strict=True)
        return torch.stack([_categorical_kl(a, b) for a, b in blocks], -1).sum(-1)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """n independent yes-or-no choices; params are logits [B, n], actions [B, n] int64 of 0 and 1."""

    n: int
    action_dtype = torch.int64

    @property
    def action_shape(self) -> tuple[int, ...]:
        """One bit for each component."""
        return (self.n,)

    @property
    def n_params(self) -> int:
        """One logit for each component."""
        return self.n

    @property
    def noise_size(self) -> int:
        """One logistic variate for each component."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Logistic noise, the difference of two Gumbel variates; logit(u), with u kept off 0 and 1."""
        eps = torch.finfo(out.dtype).eps
        out.uniform_(eps, 1 - eps, generator=generator).logit_()

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """1 where logit + noise > 0."""
        return (params + noise > 0).long()

    def mode(self, params: Tensor) -> Tensor:
        """1 where the logit is positive."""
        return (params > 0).long()

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Sum over components of log sigmoid(+-logit)."""
        return F.logsigmoid(torch.where(actions > 0, params, -params)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum over components: softplus(l) - l sigmoid(l)."""
        return (F.softplus(params) - params * params.sigmoid()).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum over components: p (l_old - l_new) - softplus(l_old) + softplus(l_new)."""
        return (old.sigmoid() * (old - new) - F.softplus(old) + F.softplus(new)).sum(-1)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """n independent normals; params are means and raw log standard deviations side by side [B, 2n], actions [B, n].

    The raw log standard deviation passes through `bound_log_std`. Actions are unbounded: what the environment is given
    is clipped, what is stored is not.
    """

    n: int
    action_dtype = torch.float32

    @property
    def action_shape(self) -> tuple[int, ...]:
        """One number for each component."""
        return (self.n,)

    @property
    def n_params(self) -> int:
        """A mean and a log standard deviation for each component."""
        return 2 * self.n

    @property
    def noise_size(self) -> int:
        """One standard normal variate for each component."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Standard normal noise."""
        out.normal_(generator=generator)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = _blocks(params, (self.n, self.n))
        return mean, bound_log_std(raw)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Mean + standard deviation x noise."""
        mean, log_std = self._split(params)
        return mean + log_std.exp() * noise

    def mode(self, params: Tensor) -> Tensor:
        """The mean."""
        return params[..., : self.n]

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Sum over components of -z^2/2 - log std - log sqrt(2 pi)."""
        mean, log_std = self._split(params)
        z = (actions - mean) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Sum over components of log std + log sqrt(2 pi e)."""
        return (self._split(params)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Sum over components of log(s_new/s_old) + (s_old^2 + (m_old - m_new)^2) / (2 s_new^2) - 1/2."""
        mean, log_std = self._split(old)
        new_mean, new_log_std = self._split(new)
        shift = (mean - new_mean) * (-new_log_std).exp()
        spread = (2 * (log_std - new_log_std)).exp()
        return (new_log_std - log_std + 0.5 * (spread + shift.square() - 1)).sum(-1)
