"""One minibatch: gradient of the loss, clip by norm, optimiser step. A function of tensors that reads nothing back.

Every scalar is a tensor and every decision is made on the device, so that the step can be compiled whole, once, for a
run with annealing, and so that all epochs together can be one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.func import functional_call

from fastppo.functional.losses import Coefficients, Loss
from fastppo.functional.optimizer import Optimizer, clip_by_norm
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.policy import Policy, PolicyOutput
from fastppo.ppo.minibatches import BatchLayout, Minibatch


class UpdateState(NamedTuple):
    """Everything that a minibatch changes.

    Attributes:
        params: [P] of the policy, flat.
        optimizer: the optimiser's state, a NamedTuple of tensors.
        sums: [D + 4]: diagnostics and gradient norm over the steps taken; the number of steps taken, of minibatches
            within the KL limit, and the sum of the epoch's KLs.
        kl_limit: [] largest KL that a minibatch may have; inf: any; -inf: the update has stopped.
        stop_kl: [] the KL that stopped the update.
        skipped: [2] minibatches skipped in a row, now and at most in this update.
    """

    params: Tensor
    optimizer: Any
    sums: Tensor
    kl_limit: Tensor
    stop_kl: Tensor
    skipped: Tensor

    def write(self, new: UpdateState, take: Tensor) -> None:
        """Copy `new` into these tensors; parameters and the optimiser's state only where `take` [] is True."""
        learned = (self.params, *self.optimizer), (new.params, *new.optimizer)
        for old, value in zip(*learned, strict=True):
            old.copy_(torch.where(take, value, old))
        self.sums.copy_(new.sums)
        self.skipped.copy_(new.skipped)
        self.stop_kl.copy_(new.stop_kl)
        self.kl_limit.copy_(new.kl_limit)


class Gradient(NamedTuple):
    """The gradient of a minibatch's mean loss.

    Attributes:
        flat: [P].
        diagnostics: [D] of the loss.
        n_rows: [] rows that count, fillers left out.
    """

    flat: Tensor
    diagnostics: Tensor
    n_rows: Tensor


# (params [P], minibatch, coefs, constants) -> Gradient
GradientFn = Callable[[Tensor, Minibatch, Coefficients, tuple[Tensor, ...]], Gradient]


def update_step(
    state: UpdateState,
    minibatch: Minibatch,
    coefs: Coefficients,
    constants: tuple[Tensor, ...],
    *,
    gradient_fn: GradientFn,
    optimizer: Optimizer,
    kl_index: int,
) -> None:
    """Learn from one minibatch, written into `state` at the end.

    The step is skipped where the gradient is not finite, and where the KL has passed its limit, now or before: from
    then on minibatches change nothing.

    Args:
        state: before the step, and after it.
        minibatch: the rows to learn from.
        coefs: scheduled scalars.
        constants: frozen parameters and buffers of the policy, as `LossGradient` takes them.
        gradient_fn: computes the gradient; over several ranks, of the rows of all.
        optimizer: takes the step.
        kl_index: of `approx_kl` among the diagnostics.
    """
    gradient = gradient_fn(state.params, minibatch, coefs, constants)
    clipped, norm = clip_by_norm(gradient.flat, coefs.max_grad_norm)
    kl, limit, finite = gradient.diagnostics[kl_index], state.kl_limit, norm.isfinite()
    within = (kl <= limit) | (limit == math.inf)  # False for a NaN KL, which stops the update too
    take = within & finite
    params, optimizer_state = optimizer.step(state.params, clipped, state.optimizer, coefs.learning_rate)
    figures = torch.cat((gradient.diagnostics, norm.unsqueeze(0)))
    counts = torch.stack((take.to(kl.dtype), within.to(kl.dtype), kl))
    sums = state.sums + torch.cat((torch.where(take, figures, 0.0), counts))
    stopped_before = limit == -math.inf
    in_a_row = torch.where(finite, 0.0, state.skipped[0] + 1)
    in_a_row = torch.where(stopped_before, state.skipped[0], in_a_row)
    skipped = torch.stack((in_a_row, torch.maximum(in_a_row, state.skipped[1])))
    stop_kl = torch.where(within | stopped_before, state.stop_kl, kl)
    kl_limit = torch.where(within, limit, -math.inf)
    state.write(UpdateState(params, optimizer_state, sums, kl_limit, stop_kl, skipped), take)


class LossGradient:
    """Computes the gradient of a loss with respect to the policy's flat parameters.

    Attributes:
        trained: names of the parameters that learn, in the policy.
        constants: the policy's other parameters and its buffers, the normaliser's moments among them.
        layout: of the batch; set before the first call.
    """

    def __init__(self, policy: Policy, parameters: FlatParameters, loss: Loss, *, scale_advantages: bool) -> None:
        """Differentiate `loss` of `policy`; `scale_advantages`: apply each minibatch's `scale` first."""
        self._policy, self._parameters, self._loss, self._scale_advantages = policy, parameters, loss, scale_advantages
        trained = {id(p) for p in parameters.parameters}
        names = {id(p): name for name, p in policy.named_parameters()}
        self.trained = [names[id(p)] for p in parameters.parameters]
        fixed: dict[str, Tensor] = {name: p for name, p in policy.named_parameters() if id(p) not in trained}
        fixed |= dict(policy.named_buffers())
        self._fixed, self.constants = list(fixed), tuple(fixed.values())
        self.layout: BatchLayout

    def __call__(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """Differentiate the mean loss of the minibatch at `params` [P]."""
        batch = self.layout.gather(minibatch)
        if self._scale_advantages:
            mean, divisor = minibatch.scale[0], minibatch.scale[1]
            batch = batch._replace(advantages=(batch.advantages - mean) / divisor)
        with torch.enable_grad():
            leaves = [view.detach().requires_grad_() for view in self._parameters.views(params)]
            by_name = dict(zip([*self.trained, *self._fixed], [*leaves, *constants], strict=True))
            output: PolicyOutput = functional_call(self._policy, by_name, (batch.obs,))
            current = self._policy.evaluate_actions(output, batch.actions, batch.params)
            loss, diagnostics = self._loss(current, batch, coefs)
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        rows = params.new_full((), len(batch.logprobs)) if batch.valid is None else batch.valid.sum().to(params.dtype)
        return Gradient(self._parameters.flatten(gradients), diagnostics, rows)


def to_rank_sum(gradient: Gradient) -> Tensor:
    """Return gradient and diagnostics times the rows that count, then their number, [P + D + 1]: to be summed."""
    n = gradient.n_rows
    return torch.cat((gradient.flat * n, gradient.diagnostics * n, n.unsqueeze(0)))


def from_rank_sum(total: Tensor, n_params: int) -> Gradient:
    """Invert `to_rank_sum` after summing over ranks: means over the rows of all; zeros where all rows are fillers."""
    mean = total[:-1] / total[-1].clamp(min=1)
    return Gradient(mean[:n_params], mean[n_params:], total[-1])
