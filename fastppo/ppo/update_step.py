"""One minibatch: gradient of the loss, clipping by norm, optimiser step; without host reads.

Every scalar is a tensor and every decision is made on the device. So a run with annealing compiles the step once, and
an epoch can be one CUDA graph.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.func import functional_call

from fastppo.functional.losses import Batch, Coefficients, Loss
from fastppo.functional.optimizer import Optimizer, clip_by_norm
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.policy import Policy, PolicyOutput
from fastppo.ppo.minibatches import BatchLayout, Minibatch


class UpdateState(NamedTuple):
    """The tensors that a minibatch changes.

    Attributes:
        params: [P] the policy's parameters, flat.
        optimizer: the optimiser's state, a NamedTuple of tensors.
        sums: [D + 4]: sums of diagnostics and gradient norm over the steps taken; numbers of steps taken and of
            minibatches within the KL limit; sum of the epoch's KLs. With a penalty on the KL [D + 6]: then sum and
            number of the epoch's exact KLs, NaNs left out, up to that of the minibatch that stopped the update.
        kl_limit: [] largest KL of a minibatch; inf: no limit; -inf: the update has stopped.
        stop_kl: [] the KL that stopped the update.
        skipped: [2] minibatches skipped in a row: current count, and this update's maximum.
    """

    params: Tensor
    optimizer: Any
    sums: Tensor
    kl_limit: Tensor
    stop_kl: Tensor
    skipped: Tensor

    def write(self, new: UpdateState, take: Tensor) -> None:
        """Copy `new` into these tensors; parameters and the optimiser's state only if `take` [] is True."""
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
        flat: [P] the gradient.
        diagnostics: [D] diagnostics of the loss.
        n_rows: [] number of valid rows.
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
    exact_kl_index: int,
    adapt_rate: Callable[[Tensor, Tensor], Tensor] | None = None,
    sum_exact_kl: bool = False,
) -> None:
    """Take one step on a minibatch and write the result into `state`.

    A minibatch whose gradient is not finite is skipped. Once a KL exceeds its limit, this and all later minibatches
    of the update leave parameters and optimiser unchanged. The KL that exceeds the limit still adapts the learning rate
    and the KL coefficient, which would see small KLs only otherwise; those of later minibatches don't.

    Args:
        state: updated in place.
        minibatch: the rows to learn from.
        coefs: this iteration's coefficients; an adapted learning rate is written here.
        constants: frozen parameters and buffers of the policy; see `LossGradient`.
        gradient_fn: computes the gradient, over the rows of all ranks.
        optimizer: takes the step.
        kl_index: index of `approx_kl` among the diagnostics.
        exact_kl_index: index of `exact_kl`.
        adapt_rate: rule of an adaptive learning rate: (rate [], exact KL []) -> rate of this step [].
        sum_exact_kl: sum the exact KLs; see `UpdateState.sums`.
    """
    gradient = gradient_fn(state.params, minibatch, coefs, constants)
    clipped, norm = clip_by_norm(gradient.flat, coefs.max_grad_norm)
    kl, limit, finite = gradient.diagnostics[kl_index], state.kl_limit, norm.isfinite()
    within = (kl <= limit) | (limit == math.inf)  # False for NaN, so a NaN KL stops the update too
    take = within & finite
    figures = torch.cat((gradient.diagnostics, norm.unsqueeze(0)))
    stopped_before, exact_kl = limit == -math.inf, gradient.diagnostics[exact_kl_index]
    if adapt_rate is not None:
        # before the first step the KL is 0 up to rounding, whose sign must not decide
        adapts = (state.sums[len(figures)] > 0) & ~stopped_before
        rate = torch.where(adapts, adapt_rate(coefs.learning_rate, exact_kl), coefs.learning_rate)
        coefs.learning_rate.copy_(rate)
    params, optimizer_state = optimizer.step(state.params, clipped, state.optimizer, coefs.learning_rate)
    counts = [take.to(kl.dtype), within.to(kl.dtype), kl]
    if sum_exact_kl:
        counted = ~stopped_before & ~exact_kl.isnan()
        counts += [torch.where(counted, exact_kl, 0.0), counted.to(kl.dtype)]
    sums = state.sums + torch.cat((torch.where(take, figures, 0.0), torch.stack(counts)))
    in_a_row = torch.where(finite, 0.0, state.skipped[0] + 1)
    in_a_row = torch.where(stopped_before, state.skipped[0], in_a_row)
    skipped = torch.stack((in_a_row, torch.maximum(in_a_row, state.skipped[1])))
    stop_kl = torch.where(within | stopped_before, state.stop_kl, kl)
    kl_limit = torch.where(within, limit, -math.inf)
    state.write(UpdateState(params, optimizer_state, sums, kl_limit, stop_kl, skipped), take)


class PackedGradient(Protocol):
    """Packs a batch and differentiates the loss of a minibatch: `LossGradient`, or what stands in for it.

    Attributes:
        constants: frozen parameters and buffers that the gradient reads; a compiled gradient takes them as arguments.
    """

    @property
    def constants(self) -> tuple[Tensor, ...]:
        """See above."""

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pack `batch` for minibatches."""

    def __call__(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """Return the gradient of the mean loss of `minibatch` at `params` [P]."""


class LossGradient:
    """Computes the gradient of a loss with respect to the policy's flat parameters.

    Attributes:
        trained: names of the trained parameters in the policy.
        constants: the policy's frozen parameters and its buffers, including the normaliser's moments.
    """

    def __init__(
        self, policy: Policy, parameters: FlatParameters, loss: Loss, *, scale_advantages: bool, segment_length: int = 1
    ) -> None:
        """Differentiate `loss` of `policy` over sequences of `segment_length` rows.

        With `scale_advantages`, each minibatch's `scale` is applied to its advantages first.
        """
        self._policy, self._parameters, self._loss, self._scale_advantages = policy, parameters, loss, scale_advantages
        self._segment_length = segment_length
        self._layout: BatchLayout | None = None
        trained = {id(p) for p in parameters.parameters}
        names = {id(p): name for name, p in policy.named_parameters()}
        self.trained = [names[id(p)] for p in parameters.parameters]
        fixed: dict[str, Tensor] = {name: p for name, p in policy.named_parameters() if id(p) not in trained}
        fixed |= dict(policy.named_buffers())
        self._fixed, self.constants = list(fixed), tuple(fixed.values())

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pack `batch` for minibatches; every batch must have the shapes of the first."""
        if self._layout is None:
            self._layout = BatchLayout(batch, self._segment_length)
        return self._layout.pack(batch)

    def __call__(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """Return the gradient of the mean loss of `minibatch` at `params` [P]."""
        assert self._layout is not None, "pack comes first"
        batch = self._layout.gather(minibatch)
        if self._scale_advantages:
            mean, divisor = minibatch.scale[0], minibatch.scale[1]
            batch = batch._replace(advantages=(batch.advantages - mean) / divisor)
        with torch.enable_grad():
            leaves = [view.detach().requires_grad_() for view in self._parameters.views(params)]
            by_name = dict(zip([*self.trained, *self._fixed], [*leaves, *constants], strict=True))
            output: PolicyOutput = functional_call(self._policy, by_name, (batch.obs, batch.states, batch.starts))
            penalized = self._loss.penalizes_kl
            current = self._policy.evaluate_actions(output, batch.actions, batch.params, kl_gradient=penalized)
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
