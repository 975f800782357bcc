"""Action distributions as stateless descriptions whose methods are pure functions of parameters.

A distribution is built from the action space. It states the length of the network's output and turns that output and
pre-drawn noise into actions. Noise is additive, so the noise of a whole rollout is drawn at once, outside
of compiled or captured code: Gumbel noise on logits, logistic noise on Bernoulli logits, standard normal noise times
the standard deviation. Inputs are not validated. A logit of -inf forbids an action (+inf forces a binary one): its
probability is 0, and entropy, KL and gradients stay finite.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

LOG_STD_MIN, LOG_STD_MAX = -10.0, 2.0
_SHARPNESS = 16.0  # k in `bound_log_std`
# Stand in for -inf, so that a probability of 0 times its logarithm is 0 and not NaN
_LOWEST_LOG_PROB = -1e9
_LARGEST_BIT_LOGIT = 1e3


def bound_log_std(raw: Tensor) -> Tensor:
    """Bound a log standard deviation smoothly to [-10, 2]; within 1e-6 of the identity on [-5, 1].

        y = x - softplus(k (x - hi)) / k + softplus(k (lo - x)) / k,   k = 16, lo = -10, hi = 2

    Both corrections vanish inside the range, so no precision is lost there. A hard clamp would stop the gradient at
    the bounds, and without bounds the standard deviation can reach 0 or infinity.

    Args:
        raw: x, any shape.

    Returns:
        y, of the same shape.
    """
    over = F.softplus(_SHARPNESS * (raw - LOG_STD_MAX)) / _SHARPNESS
    under = F.softplus(_SHARPNESS * (LOG_STD_MIN - raw)) / _SHARPNESS
    return raw - over + under


class Distribution(Protocol):
    """The interface of an action distribution. B stands for any leading shape; probabilities are in nats.

    Attributes:
        n_params: P, length of the network's output for one observation.
        action_shape: shape of one stored action.
        action_dtype: dtype of stored actions.
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
        """Fill `out` [B, noise_size] with finite noise."""

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return actions [B, *action_shape] from params [B, P] and noise [B, noise_size]."""

    def mode(self, params: Tensor) -> Tensor:
        """Return the most probable actions [B, *action_shape] for params [B, P]."""

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return log pi(actions), [B]; for Gaussian the log density."""

    def entropy(self, params: Tensor) -> Tensor:
        """Return the entropy, [B]; for Gaussian the differential entropy."""

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the exact KL(old || new) between distributions with params [B, P] each, [B]."""


class BoxDistribution(Distribution, Protocol):
    """The interface of a distribution over the actions of a Box.

    Attributes:
        squash: k of the action a = tanh(k u) in [-1, 1] for a stored action u; None: a is u, clipped to the bounds.
    """

    squash: ClassVar[float | None]

    def std(self, params: Tensor) -> Tensor:
        """Return standard deviations [B, n] for params [B, P]."""


def _gumbel(out: Tensor, generator: torch.Generator) -> None:
    # if E is exponential, -log E is Gumbel; the exponential sampler never returns 0
    out.exponential_(generator=generator).log_().neg_()


def _split_blocks(params: Tensor, sizes: tuple[int, ...]) -> tuple[Tensor, ...]:
    return torch.split(params, list(sizes), -1)


def _categorical_entropy(logits: Tensor) -> Tensor:
    logp = logits.log_softmax(-1)
    return -(logp.exp() * logp.clamp(min=_LOWEST_LOG_PROB)).sum(-1)


def _select(table: Tensor, index: Tensor) -> Tensor:
    # table[..., index] by comparison: the gradient of a gather is a scatter, which compilers don't fuse
    choices = torch.arange(table.shape[-1], device=table.device)
    return torch.where(choices == index.unsqueeze(-1), table, 0.0).sum(-1)


def _categorical_kl(old: Tensor, new: Tensor) -> Tensor:
    logp, new_logp = (logits.log_softmax(-1) for logits in (old, new))
    difference = logp.clamp(min=_LOWEST_LOG_PROB) - new_logp.clamp(min=_LOWEST_LOG_PROB)
    return (logp.exp() * difference).sum(-1)


def _bit_logits(logits: Tensor) -> Tensor:
    return logits.clamp(-_LARGEST_BIT_LOGIT, _LARGEST_BIT_LOGIT)


@dataclasses.dataclass(frozen=True)
class Categorical:
    """One choice among n; params are logits [B, n], actions [B] int64 in [0, n)."""

    n: int
    action_shape = ()
    action_dtype = torch.int64

    @property
    def n_params(self) -> int:
        """n, one logit per choice."""
        return self.n

    @property
    def noise_size(self) -> int:
        """n, one Gumbel variate per choice."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` with standard Gumbel noise."""
        _gumbel(out, generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return argmax(logits + Gumbel noise): the Gumbel-max trick."""
        return (params + noise).argmax(-1)

    def mode(self, params: Tensor) -> Tensor:
        """Return argmax(logits)."""
        return params.argmax(-1)

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return log_softmax(params)[actions]."""
        return _select(params.log_softmax(-1), actions)

    def entropy(self, params: Tensor) -> Tensor:
        """Return -sum p log p."""
        return _categorical_entropy(params)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return sum p_old (log p_old - log p_new)."""
        return _categorical_kl(old, new)


@dataclasses.dataclass(frozen=True)
class MultiCategorical:
    """K independent choices; params are K concatenated blocks of logits [B, sum(nvec)], actions [B, K] int64."""

    nvec: tuple[int, ...]
    action_dtype = torch.int64

    @property
    def action_shape(self) -> tuple[int, ...]:
        """(K,), one index per component."""
        return (len(self.nvec),)

    @property
    def n_params(self) -> int:
        """sum(nvec), one logit per choice of each component."""
        return sum(self.nvec)

    @property
    def noise_size(self) -> int:
        """sum(nvec), one Gumbel variate per logit."""
        return self.n_params

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` with standard Gumbel noise."""
        _gumbel(out, generator)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Apply the Gumbel-max trick to each component."""
        return self.mode(params + noise)

    def mode(self, params: Tensor) -> Tensor:
        """Return the argmax of each block of logits."""
        return torch.stack([block.argmax(-1) for block in _split_blocks(params, self.nvec)], -1)

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return the sum of the components' log-probabilities."""
        blocks = zip(_split_blocks(params, self.nvec), actions.unbind(-1), strict=True)
        logps = [_select(logits.log_softmax(-1), action) for logits, action in blocks]
        return torch.stack(logps, -1).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Return the sum of the components' entropies."""
        return torch.stack([_categorical_entropy(block) for block in _split_blocks(params, self.nvec)], -1).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the sum of the components' KL divergences."""
        blocks = zip(_split_blocks(old, self.nvec), _split_blocks(new, self.nvec), strict=True)
        return torch.stack([_categorical_kl(a, b) for a, b in blocks], -1).sum(-1)


@dataclasses.dataclass(frozen=True)
class Bernoulli:
    """n independent binary choices; params are logits [B, n], actions [B, n] int64 in {0, 1}."""

    n: int
    action_dtype = torch.int64

    @property
    def action_shape(self) -> tuple[int, ...]:
        """(n,), one bit per component."""
        return (self.n,)

    @property
    def n_params(self) -> int:
        """n, one logit per component."""
        return self.n

    @property
    def noise_size(self) -> int:
        """n, one logistic variate per component."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` with logistic noise logit(u), the difference of two Gumbel variates; 0 < u < 1."""
        eps = torch.finfo(out.dtype).eps
        out.uniform_(eps, 1 - eps, generator=generator).logit_()

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return 1 where logit + noise > 0."""
        return (params + noise > 0).long()

    def mode(self, params: Tensor) -> Tensor:
        """Return 1 where the logit is positive."""
        return (params > 0).long()

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return the sum over components of log sigmoid(l) for a 1, log sigmoid(-l) for a 0."""
        return F.logsigmoid(torch.where(actions > 0, _bit_logits(params), -_bit_logits(params))).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Return the sum over components of softplus(l) - l sigmoid(l)."""
        logits = _bit_logits(params)
        return (F.softplus(logits) - logits * logits.sigmoid()).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the sum of p_old (l_old - l_new) - softplus(l_old) + softplus(l_new), p_old = sigmoid(l_old)."""
        old, new = _bit_logits(old), _bit_logits(new)
        return (old.sigmoid() * (old - new) - F.softplus(old) + F.softplus(new)).sum(-1)


@dataclasses.dataclass(frozen=True)
class Gaussian:
    """n independent normals; params are n means, then n raw log standard deviations [B, 2n]; actions [B, n] float32.

    The raw log standard deviation passes through `bound_log_std`. Actions are unbounded; the environment gets clipped
    ones, and the rollout stores the unclipped ones.
    """

    n: int
    action_dtype = torch.float32
    squash: ClassVar[float | None] = None

    @property
    def action_shape(self) -> tuple[int, ...]:
        """(n,), one number per component."""
        return (self.n,)

    @property
    def n_params(self) -> int:
        """2n, a mean and a log standard deviation per component."""
        return 2 * self.n

    @property
    def noise_size(self) -> int:
        """n, one standard normal variate per component."""
        return self.n

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill `out` with standard normal noise."""
        out.normal_(generator=generator)

    def _split(self, params: Tensor) -> tuple[Tensor, Tensor]:
        mean, raw = _split_blocks(params, (self.n, self.n))
        return mean, bound_log_std(raw)

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return mean + standard deviation x noise."""
        mean, log_std = self._split(params)
        return mean + log_std.exp() * noise

    def mode(self, params: Tensor) -> Tensor:
        """Return the means."""
        return params[..., : self.n]

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return the sum over components of -z^2/2 - log std - log sqrt(2 pi), z = (action - mean) / std."""
        mean, log_std = self._split(params)
        z = (actions - mean) * (-log_std).exp()
        return (-0.5 * z.square() - log_std - 0.5 * math.log(2 * math.pi)).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Return the sum over components of log std + log sqrt(2 pi e)."""
        return (self._split(params)[1] + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the sum of log(s_new / s_old) + (s_old^2 + (m_old - m_new)^2) / (2 s_new^2) - 1/2."""
        mean, log_std = self._split(old)
        new_mean, new_log_std = self._split(new)
        shift = (mean - new_mean) * (-new_log_std).exp()
        spread = (2 * (log_std - new_log_std)).exp()
        return (new_log_std - log_std + 0.5 * (spread + shift.square() - 1)).sum(-1)

    def std(self, params: Tensor) -> Tensor:
        """Return the standard deviations, [B, n]."""
        return self._split(params)[1].exp()
