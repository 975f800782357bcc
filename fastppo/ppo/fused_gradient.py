"""The gradient of PPO's loss, and whole epochs, in C: for policies of fully connected layers on a CPU."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from fastppo.functional.adam import AdamState
from fastppo.functional.losses import Batch, Coefficients, PPOLoss
from fastppo.native import mlp as native
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.native_mlp import describe, not_covered
from fastppo.policies.policy import FORBIDDEN, Policy
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.update_step import Gradient, LossGradient, UpdateState
from fastppo.runtime.compile import CompileError


def not_fused(policy: Policy, loss: object) -> str | None:
    """Return why `FusedGradient` can't differentiate this loss of this policy, or None."""
    return not_covered(policy) if type(loss) is PPOLoss else f"the loss is {type(loss).__name__}"


class FusedGradient:
    """What `LossGradient` computes, without torch between gather and gradient.

    Numbers equal those of `LossGradient` up to rounding. With the same libraries, compiler and processor, their bits
    depend on the number of threads alone.

    Attributes:
        constants: none; see `LossGradient`.
    """

    constants: tuple[Tensor, ...] = ()

    def __init__(
        self, policy: Policy, parameters: FlatParameters, loss: PPOLoss, *, scale_advantages: bool, threads: int
    ) -> None:
        """Differentiate `loss` of `policy`, for which `not_fused` is None; see `LossGradient`."""
        self._policy, self._scale_advantages, self._n_diagnostics = policy, scale_advantages, len(loss.diagnostics)
        self._net = describe(policy, parameters.vector)
        self._loss = native.Loss(
            loss.objective != "penalty", loss.penalizes_kl, native.VALUE_CLIPS.index(loss.value_clip)
        )
        self._threads, self._workspace = threads, native.new_workspace(self._net, threads)
        self._packed = torch.zeros(0, 0)
        self._rows = native.Rows()
        self._unscaled = torch.tensor([0.0, 1.0])

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Write the encoded observations of `batch`, and all else that the loss reads, to one row each."""
        columns = self._columns(batch)
        widths = [x[0].numel() for x in columns.values()]
        if len(self._packed) != len(batch.logprobs):
            self._packed = torch.zeros(len(batch.logprobs), sum(widths))
            begins = dict(zip(columns, itertools.accumulate(widths, initial=0), strict=False))
            del begins["features"]  # which come first
            missing = {"mask": -1, "valid": -1}
            self._rows = native.Rows(at=native.address(self._packed), width=sum(widths), **missing | begins)
        for place, x in zip(torch.split(self._packed, widths, 1), columns.values(), strict=True):
            place.copy_(x.reshape(place.shape))
        return (self._packed,)

    def __call__(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """Return the gradient of the mean loss of `minibatch` at `params` [P]."""
        scale = minibatch.scale if self._scale_advantages else self._unscaled
        return Gradient(
            *native.gradient(
                self._net,
                self._rows,
                self._loss,
                _addresses(coefs),
                params,
                minibatch.rows,
                scale,
                self._threads,
                self._workspace,
                self._n_diagnostics,
            )
        )

    def run_epoch(
        self, state: UpdateState, rows: Tensor, scales: Tensor, coefs: Coefficients, *, adam_eps: float, exact_kl: bool
    ) -> None:
        """Call `update_step`, with Adam, for each minibatch: rows [M, B] of the packed batch, scales [M, 2]."""
        adam: AdamState = state.optimizer
        if not self._scale_advantages:
            scales = self._unscaled.expand_as(scales).contiguous()
        pointers = (state.params, *adam, state.sums, state.kl_limit, state.stop_kl, state.skipped)
        native.epoch(
            self._net,
            self._rows,
            self._loss,
            _addresses(coefs),
            native.State(*map(native.address, pointers), exact_kl, adam_eps),
            rows,
            scales,
            self._threads,
            self._workspace,
        )

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        """Return what a row holds, [R, ...] each, under the names of `native.Rows`."""
        spec, x = self._policy.encoder.spec, self._policy.encoder(batch.obs)
        assert isinstance(x, Tensor), "an MLP reads one array"
        columns = {"features": x}
        if spec.has_mask:
            columns["mask"] = spec.unpack(batch.obs)[-1]
        columns |= {
            "old": batch.params,
            "action": batch.actions,
            "logprob": batch.logprobs,
            "advantage": batch.advantages,
            "target": batch.returns,
            "value": batch.values,
        }
        return columns if batch.valid is None else columns | {"valid": batch.valid}


def _addresses(coefs: Coefficients) -> native.Coefficients:
    used = coefs.learning_rate, coefs.clip_coef, coefs.value_clip_coef, coefs.vf_coef, coefs.ent_coef
    return native.Coefficients(*map(native.address, (*used, coefs.max_grad_norm, coefs.kl_coef)))


_EXAMPLE_ROWS, _TOLERANCE = 97, 1e-4


@torch.no_grad()
def check_fused_gradient(
    fused: FusedGradient, policy: Policy, parameters: FlatParameters, loss: PPOLoss, *, fillers: bool
) -> None:
    """Compare `fused` with `LossGradient` on made-up rows; changes no state and draws from no stream.

    Args:
        fused: differentiates `loss` of `policy`.
        policy: the policy.
        parameters: its parameters.
        loss: the loss.
        fillers: whether some rows don't count.

    Raises:
        CompileError: the gradients differ.
    """
    n, dist, draws = _EXAMPLE_ROWS, policy.distribution, torch.Generator().manual_seed(0)
    obs, mask = _made_up_obs(policy, n, draws)
    params = torch.randn(n, dist.n_params, generator=draws)
    if mask is not None:
        params = torch.where(mask > 0, params, FORBIDDEN)
    noise = torch.zeros(n, dist.noise_size)
    dist.fill_noise(noise, draws)
    scalars = torch.randn(4, n, generator=draws)
    actions, valid = dist.sample(params, noise), torch.arange(n) % 5 != 0
    values, advantages, returns = scalars[1:]
    batch = Batch(obs, actions, scalars[0] - 1, params, values, advantages, returns, valid if fillers else None)
    # learning rate, clip ranges, weights of value and entropy, largest norm, gamma, lambda, weight of the KL
    coefs = Coefficients(*(torch.tensor(x) for x in (1e-3, 0.2, 0.2, 0.5, 0.01, 0.5, 0.99, 0.95, 0.5)))
    scale = torch.tensor([0.1, 1.5])
    plain = LossGradient(policy, parameters, loss, scale_advantages=True)
    results = [
        gradient(parameters.vector, Minibatch(scale, torch.arange(n), data), coefs, gradient.constants)
        for gradient in (plain, fused)
        for data in [gradient.pack(batch)]
    ]
    for name, expected, found in zip(Gradient._fields, *results, strict=True):
        if not torch.allclose(found, expected, _TOLERANCE, _TOLERANCE * max(1e-3, float(expected.abs().max()))):
            raise CompileError(f"its {name} differs from torch's by up to {float((found - expected).abs().max()):.1g}")


def _made_up_obs(policy: Policy, n: int, draws: torch.Generator) -> tuple[Tensor, Tensor | None]:
    """Return n random observations, and their mask if they have one, which allows the first of each choice."""
    spec, arrays, mask = policy.encoder.spec, list[Tensor](), None
    for leaf in spec.leaves:
        shape = (n, *leaf.shape)
        if leaf.kind == "discrete":
            nvec, start = (torch.tensor(x).reshape(leaf.shape) for x in (leaf.nvec, leaf.start))
            arrays.append((torch.rand(shape, generator=draws) * nvec).long() + start)
        elif leaf.kind == "mask":
            mask = (torch.rand(shape, generator=draws) < 0.6).float()
            choices = getattr(policy.distribution, "nvec", (leaf.size,))
            mask[:, list(itertools.accumulate(choices, initial=0))[:-1]] = 1.0
            arrays.append(mask)
        elif leaf.stored_as == "uint8":
            arrays.append(torch.randint(0, 256, shape, generator=draws, dtype=torch.uint8))
        else:
            arrays.append(torch.randn(shape, generator=draws))
    return spec.pack(arrays), mask
