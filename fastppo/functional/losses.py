"""PPO's losses, as quantities to minimise. Rows where `valid` is False (filler of next-step autoreset) don't count."""

from __future__ import annotations

import dataclasses
from typing import ClassVar, Literal, NamedTuple, Protocol

import torch
from torch import Tensor

from fastppo.functional.diagnostics import approx_kl_k1, approx_kl_k3, clip_fraction, masked_mean
from fastppo.functional.moments import Pool

ValueClip = Literal["off", "max", "clipped_only"]
Objective = Literal["clip", "penalty", "clip_and_penalty"]


class Batch(NamedTuple):
    """B rows of a rollout that an update learns from.

    Attributes:
        obs: [B, *obs] raw, as stored.
        actions: [B, *action] as the distribution made them.
        logprobs: [B] under the policy that acted, in nats.
        params: [B, P] parameters of the distribution that acted.
        values: [B] the critic's estimates during the rollout.
        advantages: [B].
        returns: [B] the critic's targets.
        valid: [B] bool, or None where every row is a real transition.
        starts: [B] bool: an episode starts at this row; None: the policy has no memory.
        states: the policy's state before each row, [B, ...] each; in a minibatch of sequences, before the first row
            of each.
    """

    obs: Tensor
    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor
    advantages: Tensor
    returns: Tensor
    valid: Tensor | None
    starts: Tensor | None = None
    states: tuple[Tensor, ...] = ()

    def take(self, rows: Tensor, length: int = 1) -> Batch:
        """Return the chosen rows [B]; with memory, whole sequences of `length` rows, all first rows first."""
        chosen = {name: x[rows] for name, x in self._asdict().items() if isinstance(x, Tensor)}
        return self._replace(**chosen, states=tuple(x[rows[: len(rows) // length]] for x in self.states))


class Coefficients(NamedTuple):
    """Scalars that change in a run, each a 0-d tensor on the training device, so that a change recompiles nothing.

    A schedule sets them, apart from those that the update adapts: `PPOUpdate.adapted`.
    """

    learning_rate: Tensor
    clip_coef: Tensor
    value_clip_coef: Tensor
    vf_coef: Tensor
    ent_coef: Tensor
    max_grad_norm: Tensor
    gamma: Tensor
    gae_lambda: Tensor
    kl_coef: Tensor


class ActionEvaluation(NamedTuple):
    """Stored actions under the current policy.

    Attributes:
        logprobs: [B] in nats.
        entropy: [B] of the current policy's distribution, in nats.
        values: [B] V of the current critic.
        exact_kl: [B] KL(old || current) in nats; a gradient flows here only for a loss that penalises it.
    """

    logprobs: Tensor
    entropy: Tensor
    values: Tensor
    exact_kl: Tensor


class Loss(Protocol):
    """A loss of one minibatch.

    Attributes:
        diagnostics: names of what a call reports beside the loss; `approx_kl` among them, which the early stop reads,
            and `exact_kl`, which adapted coefficients follow.
        penalizes_kl: whether the gradient of `ActionEvaluation.exact_kl` is needed.
    """

    @property
    def diagnostics(self) -> tuple[str, ...]:
        """Names, in the order of the values."""

    @property
    def penalizes_kl(self) -> bool:
        """Whether the loss contains the KL."""

    def __call__(self, current: ActionEvaluation, batch: Batch, coefs: Coefficients) -> tuple[Tensor, Tensor]:
        """Compute the loss [] to minimise, and the diagnostics [D], detached."""


def clipped_policy_loss(logratio: Tensor, advantages: Tensor, clip_coef: Tensor, valid: Tensor | None = None) -> Tensor:
    """PPO's clipped surrogate.

        L = -mean(min(r A, clamp(r, 1 - c, 1 + c) A)),   r = exp(logratio)

    Args:
        logratio: [B] log pi_new(a|s) - log pi_old(a|s), in nats.
        advantages: [B] in reward units, or unit-free once normalised.
        clip_coef: [] c >= 0.
        valid: [B] bool or None.

    Source: Schulman et al. 2017, eq. 7 (arXiv:1707.06347), with the sign turned.
    """
    ratio = logratio.exp()
    clipped = torch.clamp(ratio, 1 - clip_coef, 1 + clip_coef)
    return -masked_mean(torch.minimum(ratio * advantages, clipped * advantages), valid)


def unclipped_policy_loss(logratio: Tensor, advantages: Tensor, valid: Tensor | None = None) -> Tensor:
    """The surrogate of conservative policy iteration, for use with a penalty on the KL.

        L = -mean(r A),   r = exp(logratio)

    Arguments as for `clipped_policy_loss`.

    Source: Schulman et al. 2017, eq. 6 (arXiv:1707.06347), with the sign turned.
    """
    return -masked_mean(logratio.exp() * advantages, valid)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    value_clip: ValueClip,
    value_clip_coef: Tensor,
    valid: Tensor | None = None,
) -> Tensor:
    """Half the mean squared error of the critic, optionally with the step away from the old values clipped.

        off:           0.5 mean((v - R)^2)
        clipped_only:  0.5 mean((v_old + clamp(v - v_old, -c, c) - R)^2)
        max:           0.5 mean(max of the two squares)

    Args:
        values: [B] v.
        old_values: [B] v_old, from the rollout.
        returns: [B] R, in units of the (scaled) return.
        value_clip: one of the three.
        value_clip_coef: [] c, in units of the return; negative: no clipping, as in PPO2's cliprange_vf.
        valid: [B] bool or None.

    The factor of one half is CleanRL's: stable-baselines3's vf_coef of 0.5 is 1.0 here.
    """
    plain = (values - returns).square()
    if value_clip == "off":
        return 0.5 * masked_mean(plain, valid)
    limit = torch.where(value_clip_coef < 0, torch.inf, value_clip_coef)
    clipped = (old_values + torch.clamp(values - old_values, -limit, limit) - returns).square()
    return 0.5 * masked_mean(torch.maximum(plain, clipped) if value_clip == "max" else clipped, valid)


def advantage_scale(advantages: Tensor, valid: Tensor | None = None, pool: Pool = None) -> tuple[Tensor, Tensor]:
    """Mean and divisor that normalise advantages to mean 0 and unbiased standard deviation 1 over the last dimension.

    Args:
        advantages: [..., B].
        valid: [..., B] bool or None.
        pool: sums a tensor over the ranks whose rows count together; None: one rank.

    Returns:
        Mean, and standard deviation plus 1e-8, [...] each; 0 and 1 where fewer than two rows count.
    """
    if valid is None and pool is None:
        if advantages.shape[-1] < 2:
            return torch.zeros_like(advantages[..., 0]), torch.ones_like(advantages[..., 0])
        std, mean = torch.std_mean(advantages, -1)
        return mean, std + 1e-8
    counted = torch.ones_like(advantages, dtype=torch.bool) if valid is None else valid

    def total(x: Tensor) -> Tensor:
        summed = torch.where(counted, x, 0.0).sum(-1)
        return summed if pool is None else pool(summed)

    rows = total(torch.ones_like(advantages))
    mean = total(advantages) / rows.clamp(min=1)
    std = (total((advantages - mean.unsqueeze(-1)).square()) / (rows - 1).clamp(min=1)).sqrt()
    few = rows < 2
    return torch.where(few, 0.0, mean), torch.where(few, 1.0, std + 1e-8)


def normalize_advantages(advantages: Tensor, valid: Tensor | None = None, pool: Pool = None) -> Tensor:
    """Normalise advantages to mean 0 and unbiased standard deviation 1; unchanged where fewer than two rows count.

    Arguments as for `advantage_scale`.
    """
    mean, scale = advantage_scale(advantages, valid, pool)
    return (advantages - mean) / scale


@dataclasses.dataclass(frozen=True)
class PPOLoss:
    """PPO's loss of one minibatch.

        L = L_policy + vf_coef L_value - ent_coef mean(entropy)

        clip:              L_policy = L_clip
        penalty:           L_policy = -mean(r A) + kl_coef mean(KL(old || new))
        clip_and_penalty:  L_policy = L_clip     + kl_coef mean(KL(old || new))

    The KL is the distribution's closed form, not an estimate from the sampled actions. A loss is any callable with this
    signature, `diagnostics` and `penalizes_kl`; `PPOUpdate` takes one.

    Attributes:
        value_clip: see `value_loss`.
        objective: one of the three above.
        diagnostics: names of the values that a call reports beside the loss; `policy_loss` is without the penalty.

    Source: Schulman et al. 2017, eqs. 8 and 9 (arXiv:1707.06347), with the sign turned.
    """

    value_clip: ValueClip
    objective: Objective = "clip"
    diagnostics: ClassVar[tuple[str, ...]] = (
        "policy_loss",
        "value_loss",
        "entropy",
        "old_approx_kl",
        "approx_kl",
        "exact_kl",
        "clipfrac",
    )

    @property
    def penalizes_kl(self) -> bool:
        """Whether the loss contains the KL."""
        return self.objective != "clip"

    def __call__(self, current: ActionEvaluation, batch: Batch, coefs: Coefficients) -> tuple[Tensor, Tensor]:
        """Compute the loss [], and the values of `diagnostics` [7], detached; entropy is reported positive.

        Args:
            current: batch.actions under the current policy.
            batch: the rows, with advantages normalised already if they should be.
            coefs: scalars of this iteration.
        """
        valid = batch.valid
        logratio = current.logprobs - batch.logprobs
        if self.objective == "penalty":
            policy = unclipped_policy_loss(logratio, batch.advantages, valid)
        else:
            policy = clipped_policy_loss(logratio, batch.advantages, coefs.clip_coef, valid)
        critic = value_loss(current.values, batch.values, batch.returns, self.value_clip, coefs.value_clip_coef, valid)
        entropy = masked_mean(current.entropy, valid)
        loss = policy + coefs.vf_coef * critic - coefs.ent_coef * entropy
        if self.penalizes_kl:
            loss = loss + coefs.kl_coef * masked_mean(current.exact_kl, valid)
        with torch.no_grad():
            x = logratio.detach()
            diagnostics = torch.stack(
                (
                    policy.detach(),
                    critic.detach(),
                    entropy.detach(),
                    approx_kl_k1(x, valid),
                    approx_kl_k3(x, valid),
                    masked_mean(current.exact_kl.detach(), valid),
                    clip_fraction(x, coefs.clip_coef, valid),
                )
            )
        return loss, diagnostics
