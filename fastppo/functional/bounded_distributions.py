"""Distributions over actions that never leave their bounds: a squashed Gaussian, and a Beta.

Both store an unbounded number u for each component of an action. The action is a = tanh(k u) in [-1, 1], where k is the
distribution's `squash`; the environment gets a scaled to its bounds. Log-probability, ratio and KL read u, so nothing
inverts tanh, which rounds to 1 from u = 9 on. Densities and entropies are those of a in [-1, 1]: a box of half widths h
adds sum(log h) to an entropy and subtracts it from a log density.
"""

from __future__ import annotations

import dataclasses
import math
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from fastppo.functional.distributions import Gaussian

# Quadrature of `SquashedGaussian.entropy`
_NODES, _FARTHEST_NODE = 64, 5.0
# Of `Beta.sample`
_TRIES = 7
# tanh(u / 2) rounds to 1 long before; a sample lies beyond with a probability below 1e-25
_LARGEST_LOGIT = 60.0


def log_tanh_slope(u: Tensor) -> Tensor:
    """Return log(1 - tanh(u)^2), the log derivative of tanh at u, of the same shape; finite for every finite u.

        log(1 - tanh(u)^2) = 2 (log 2 - u - softplus(-2u))

    Source: TensorFlow Probability's Tanh bijector.
    """
    return 2 * (math.log(2) - u - F.softplus(-2 * u))


@dataclasses.dataclass(frozen=True)
class SquashedGaussian(Gaussian):
    """n independent variables tanh(u), where u is Gaussian; params as for `Gaussian`, actions are u [B, n] float32.

    `sample` and `kl` are the Gaussian's: a KL is the same before and after a bijection, so it is exact. `mode` returns
    the means of u; tanh of these are the medians of the action. Its density has no mode in closed form, and two of them
    for large standard deviations. `std` is that of u.

    Source: Haarnoja et al. 2018 (arXiv:1801.01290), appendix C.
    """

    squash: ClassVar[float | None] = 1.0

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return the log density of tanh(actions) in [-1, 1]: the Gaussian's of u minus sum log(1 - tanh(u)^2)."""
        return super().log_prob(params, actions) - log_tanh_slope(actions).sum(-1)

    def entropy(self, params: Tensor) -> Tensor:
        """Return the entropy of tanh(u): the Gaussian's plus the expected sum of log(1 - tanh(u)^2).

        The expectation has no closed form. It is computed by the trapezoidal rule on 64 nodes from -5 to 5 standard
        deviations, with weights proportional to the normal density: deterministic and differentiable. The error per
        component is below 1e-5 for standard deviations up to 3, and below 1e-4 up to the largest one, e^2.

        Source: Trefethen and Weideman 2014, "The exponentially convergent trapezoidal rule".
        """
        mean, log_std = self._split(params)
        z = torch.linspace(-_FARTHEST_NODE, _FARTHEST_NODE, _NODES, dtype=params.dtype, device=params.device)
        weights = (-0.5 * z.square()).softmax(0)
        u = mean.unsqueeze(-1) + log_std.exp().unsqueeze(-1) * z
        return super().entropy(params) + (weights * log_tanh_slope(u)).sum((-2, -1))


def _log_gamma_sample(shape: Tensor, normal: Tensor, log_uniform: Tensor) -> Tensor:
    """Return logarithms of variates of Gamma(shape, 1), [...], for shapes of at least 1.

    With d = shape - 1/3 and v = (1 + x / sqrt(9 d))^3 for a standard normal x, d v is such a variate if it is accepted:
    v > 0 and log(uniform) < x^2 / 2 + d (1 - v + log v). The first accepted try counts. If all 7 are rejected, v is 1.
    A try is rejected with a probability of at most 4.9 %, for shape 1, so this happens less than once in 10^9 variates.

    Args:
        shape: [...].
        normal: x [..., tries].
        log_uniform: [..., tries].

    Source: Marsaglia and Tsang 2000, "A simple method for generating gamma variables".
    """
    d = (shape - 1 / 3).unsqueeze(-1)
    v = (1 + normal / (9 * d).sqrt()) ** 3
    log_v = v.log()  # NaN or -inf where v <= 0, which is not accepted
    accepted = log_uniform < 0.5 * normal.square() + d * (1 - v + log_v)
    first = accepted & (accepted.cumsum(-1) == 1)
    return d.squeeze(-1).log() + torch.where(first, log_v, 0.0).sum(-1)


def _log_beta(alpha: Tensor, beta: Tensor) -> Tensor:
    """Return log B(alpha, beta), the logarithm of the Beta function."""
    return alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()


@dataclasses.dataclass(frozen=True)
class Beta:
    """n independent variables 2y - 1, where y has a Beta distribution on [0, 1].

    Params are n raw alphas, then n raw betas [B, 2n]: alpha = 1 + softplus(raw), so that the density is finite and has
    one peak. Actions are logits x = log(y / (1 - y)), [B, n] float32; 2y - 1 = tanh(x / 2). Sums of large terms that
    nearly cancel are computed in float64.

    Source: Chou et al. 2017, "Improving stochastic policy gradients in continuous control using the Beta distribution".
    """

    n: int
    action_dtype = torch.float32
    squash: ClassVar[float | None] = 0.5

    @property
    def action_shape(self) -> tuple[int, ...]:
        """(n,), one number per component."""
        return (self.n,)

    @property
    def n_params(self) -> int:
        """2n, an alpha and a beta per component."""
        return 2 * self.n

    @property
    def noise_size(self) -> int:
        """28n: per component, 7 tries of two numbers for each of two Gamma variates."""
        return 2 * 2 * self.n * _TRIES

    def fill_noise(self, out: Tensor, generator: torch.Generator) -> None:
        """Fill the first half of `out` with standard normal noise, the second with logarithms of uniform noise."""
        normal, log_uniform = out.chunk(2, -1)
        normal.normal_(generator=generator)
        # if u is uniform, -log u is exponential; the exponential sampler never returns 0
        log_uniform.exponential_(generator=generator).neg_()

    def _concentrations(self, params: Tensor) -> tuple[Tensor, Tensor]:
        """Return alpha and beta, [B, n] float64."""
        alpha, beta = (1 + F.softplus(params.double())).chunk(2, -1)
        return alpha, beta

    def sample(self, params: Tensor, noise: Tensor) -> Tensor:
        """Return log g1 - log g2, where g1 is a variate of Gamma(alpha, 1) and g2 of Gamma(beta, 1)."""
        shapes = torch.stack(self._concentrations(params), -2)
        normal, log_uniform = noise.double().view(*noise.shape[:-1], 2, 2, self.n, _TRIES).unbind(-4)
        first, second = _log_gamma_sample(shapes, normal, log_uniform).unbind(-2)
        return (first - second).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT).to(params.dtype)

    def mode(self, params: Tensor) -> Tensor:
        """Return the logits of (alpha - 1) / (alpha + beta - 2), the peak of the density of y."""
        alpha, beta = F.softplus(params).clamp(min=torch.finfo(params.dtype).tiny).log().chunk(2, -1)
        return (alpha - beta).clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT)

    def log_prob(self, params: Tensor, actions: Tensor) -> Tensor:
        """Return the sum over components of (alpha - 1) log y + (beta - 1) log(1 - y) - log B(alpha, beta) - log 2."""
        (alpha, beta), x = self._concentrations(params), actions.double()
        powers = -(alpha - 1) * F.softplus(-x) - (beta - 1) * F.softplus(x)
        return (powers - _log_beta(alpha, beta) - math.log(2)).sum(-1).to(params.dtype)

    def entropy(self, params: Tensor) -> Tensor:
        """Return the sum over components of the entropy of y plus log 2.

        log B(a, b) - (a - 1) psi(a) - (b - 1) psi(b) + (a + b - 2) psi(a + b) + log 2, with a = alpha, b = beta
        """
        alpha, beta = self._concentrations(params)
        slopes = (alpha - 1) * alpha.digamma() + (beta - 1) * beta.digamma()
        total = alpha + beta
        entropy = _log_beta(alpha, beta) - slopes + (total - 2) * total.digamma() + math.log(2)
        return entropy.sum(-1).to(params.dtype)

    def kl(self, old: Tensor, new: Tensor) -> Tensor:
        """Return the sum over components of the KL, with a, b for the old and a', b' for the new distribution.

        log B(a', b') - log B(a, b) + (a - a') psi(a) + (b - b') psi(b) + (a' - a + b' - b) psi(a + b)
        """
        (alpha, beta), (new_alpha, new_beta) = self._concentrations(old), self._concentrations(new)
        more_alpha, more_beta = new_alpha - alpha, new_beta - beta
        slopes = (more_alpha + more_beta) * (alpha + beta).digamma()
        slopes = slopes - more_alpha * alpha.digamma() - more_beta * beta.digamma()
        return (_log_beta(new_alpha, new_beta) - _log_beta(alpha, beta) + slopes).sum(-1).to(new.dtype)

    def std(self, params: Tensor) -> Tensor:
        """Return the standard deviations of 2y - 1, [B, n]: 2 sqrt(a b / (a + b + 1)) / (a + b), a and b as above."""
        alpha, beta = (1 + F.softplus(params)).chunk(2, -1)
        total = alpha + beta
        # one factor at a time: alpha x beta may overflow
        return 2 * (alpha / total * (beta / total) / (total + 1)).sqrt()
