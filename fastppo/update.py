"""The update: epochs over shuffled minibatches, with the KL early stop."""

from __future__ import annotations

import dataclasses
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastppo.functional.adam import AdamState, adam_init, adam_step, clip_by_norm
from fastppo.functional.losses import DIAGNOSTICS, Batch, Coefficients, ValueClip, normalize_advantages, ppo_loss
from fastppo.policies.api import Policy
from fastppo.policies.flat import FlatParameters

FIGURES = (*DIAGNOSTICS, "grad_norm")
_KL = FIGURES.index("approx_kl")


class UpdateStats(NamedTuple):
    """What one update did.

    Attributes:
        diagnostics: [9] FIGURES, the gradient norm being that before clipping: means over the minibatches whose step
            was taken; then the number of steps that were left out because their gradient was not finite.
        minibatches: steps taken or left out.
        epochs: epochs begun.
        stop_kl: the KL that ended the update early, or None. NaN when the KL was NaN.
    """

    diagnostics: Tensor
    minibatches: int
    epochs: int
    stop_kl: float | None


@dataclasses.dataclass
class PPOUpdate:
    """Epochs of clipped policy steps on one rollout.

    Attributes:
        policy: whose network learns.
        parameters: the network's, as one vector.
        generator: for the permutations.
        update_epochs: passes over the rollout.
        n_minibatches: minibatches per pass; divides the rows.
        adam_eps: Adam's epsilon.
        value_clip: see `value_loss`.
        normalize: advantages normalised in each "minibatch", once per "batch", or "off".
        kl_stop: "epoch" ends the update after an epoch whose mean KL passed the limit; "minibatch" before the step of
            a minibatch whose KL did.
    """

    policy: Policy
    parameters: FlatParameters
    generator: torch.Generator
    update_epochs: int
    n_minibatches: int
    adam_eps: float
    value_clip: ValueClip
    normalize: Literal["minibatch", "batch", "off"]
    kl_stop: Literal["epoch", "minibatch"]

    def __post_init__(self) -> None:
        """Start Adam's memory at zero."""
        self.adam: AdamState = adam_init(self.parameters.vector)

    def __call__(self, batch: Batch, coefs: Coefficients, kl_limit: float) -> UpdateStats:
        """Learn from `batch`, stopping early where the KL (k3) is not <= `kl_limit` (inf: never looked at)."""
        if self.normalize == "batch":
            batch = batch._replace(advantages=normalize_advantages(batch.advantages, batch.valid))
        n, watched = len(batch.logprobs), kl_limit != float("inf")
        total = torch.zeros(len(FIGURES) + 1, device=batch.logprobs.device)
        taken, epochs, stop_kl = 0, 0, None
        while epochs < self.update_epochs and stop_kl is None:
            epochs += 1
            order = torch.randperm(n, generator=self.generator, device=self.generator.device)
            epoch_kl = torch.zeros_like(total[0])
            for rows in order.view(self.n_minibatches, -1):
                gradient, diagnostics = self.gradient(batch, rows, coefs)
                if watched and self.kl_stop == "minibatch" and not (kl := diagnostics[_KL].item()) <= kl_limit:
                    stop_kl = kl
                    break
                finite = diagnostics[-1].isfinite()
                self.step(gradient, coefs, finite)
                total[:-1] += torch.where(finite, diagnostics, 0.0)
                total[-1] += finite
                epoch_kl += diagnostics[_KL]
                taken += 1
            # "not <=", so that NaN stops too
            if watched and self.kl_stop == "epoch":
                mean_kl = (epoch_kl / self.n_minibatches).item()
                stop_kl = mean_kl if not mean_kl <= kl_limit else None
        figures = torch.cat((total[:-1] / total[-1], taken - total[-1:]))
        return UpdateStats(figures, taken, epochs, stop_kl)

    def gradient(self, batch: Batch, rows: Tensor, coefs: Coefficients) -> tuple[Tensor, Tensor]:
        """The clipped gradient [P] of the loss on `rows` [B] of `batch`, and the diagnostics with its norm, [8]."""
        mini = Batch(*(None if x is None else x.index_select(0, rows) for x in batch))  # type: ignore[arg-type]
        if self.normalize == "minibatch":
            mini = mini._replace(advantages=normalize_advantages(mini.advantages, mini.valid))
        now = self.policy.evaluate(mini.obs, mini.actions, mini.params)
        loss, diagnostics = ppo_loss(now.logprobs, now.entropy, now.values, now.exact_kl, mini, coefs, self.value_clip)
        gradient, norm = clip_by_norm(self.parameters.gradient(loss), coefs.max_grad_norm)
        return gradient, torch.cat((diagnostics, norm.unsqueeze(0)))

    def step(self, gradient: Tensor, coefs: Coefficients, finite: Tensor) -> None:
        """One step of Adam along `gradient` [P]; nothing changes where `finite` [] is False."""
        before = (self.parameters.vector, *self.adam)
        vector, adam = adam_step(self.parameters.vector, gradient, self.adam, coefs.learning_rate, self.adam_eps)
        for old, new in zip(before, (vector, *adam), strict=True):
            old.copy_(torch.where(finite, new, old))
