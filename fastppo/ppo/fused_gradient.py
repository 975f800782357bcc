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
from fastppo.ppo.packed_rows import PackedRows
from fastppo.ppo.update_step import Gradient, LossGradient, PackedGradient, UpdateState
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
        self._scale_advantages, self._n_diagnostics = scale_advantages, len(loss.diagnostics)
        self._net = describe(policy, parameters.vector)
        self._loss = native.Loss(
            loss.objective != "penalty", loss.penalizes_kl, native.VALUE_CLIPS.index(loss.value_clip)
        )
        self._threads, self._workspace = threads, native.new_workspace(self._net, threads)
        self._packed, self._rows = PackedRows(policy), native.Rows()
        self._unscaled = torch.tensor([0.0, 1.0])

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Write the encoded observations of `batch`, and all else that the loss reads, to one row each."""
        if self._packed.pack(batch):
            begins = {"mask": -1, "valid": -1} | self._packed.begins
            del begins["features"]  # which come first
            packed = self._packed.packed
            self._rows = native.Rows(at=native.address(packed), width=packed.shape[1], **begins)
        return (self._packed.packed,)

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

    def run_epochs(
        self,
        state: UpdateState,
        orders: Tensor,
        scales: Tensor,
        coefs: Coefficients,
        *,
        adam_eps: float,
        epoch_limit: Tensor | None,
        last_kl: Tensor | None,
    ) -> None:
        """Run epochs as `PPOUpdate` does, with Adam.

        Args:
            state: changed in place.
            orders: [E, M, B] the rows of each minibatch, in the packed batch.
            scales: [E, M, 2] mean and divisor of the advantages of each minibatch.
            coefs: the coefficients.
            adam_eps: of Adam.
            epoch_limit: [] mean KL of an epoch that ends the update; None: epochs have no limit.
            last_kl: [] receives the mean exact KL of the last epoch; None: it is not measured.
        """
        adam: AdamState = state.optimizer
        if not self._scale_advantages:
            scales = self._unscaled.expand_as(scales).contiguous()
        pointers = [state.params, *adam, state.sums, state.kl_limit, state.stop_kl, state.skipped]
        pointers += [self._unscaled if x is None else x for x in (epoch_limit, last_kl)]
        native.epochs(
            self._net,
            self._rows,
            self._loss,
            _addresses(coefs),
            native.State(*map(native.address, pointers), last_kl is not None, epoch_limit is not None, adam_eps),
            orders,
            scales,
            self._threads,
            self._workspace,
        )


def _addresses(coefs: Coefficients) -> native.Coefficients:
    used = coefs.learning_rate, coefs.clip_coef, coefs.value_clip_coef, coefs.vf_coef, coefs.ent_coef
    return native.Coefficients(*map(native.address, (*used, coefs.max_grad_norm, coefs.kl_coef)))


def fuse_gradient(
    policy: Policy, parameters: FlatParameters, loss: object, *, scale_advantages: bool, fillers: bool, threads: int
) -> FusedGradient:
    """Return a `FusedGradient` that has been compared with torch's.

    Args:
        policy: the policy.
        parameters: its parameters.
        loss: the loss.
        scale_advantages: see `LossGradient`.
        fillers: whether some rows don't count.
        threads: of the C code.

    Raises:
        CompileError: C can't differentiate this loss of this policy, or its gradient differs.
    """
    if reason := not_fused(policy, loss):
        raise CompileError(reason)
    assert isinstance(loss, PPOLoss), "this is what not_fused checks"
    example = FusedGradient(policy, parameters, loss, scale_advantages=True, threads=threads)
    check_gradient(example, policy, parameters, loss, fillers=fillers, tolerance=1e-4)
    return FusedGradient(policy, parameters, loss, scale_advantages=scale_advantages, threads=threads)


_EXAMPLE_ROWS = 97


@torch.no_grad()
def check_gradient(
    fused: PackedGradient,
    policy: Policy,
    parameters: FlatParameters,
    loss: PPOLoss,
    *,
    fillers: bool,
    tolerance: float,
) -> tuple[Minibatch, Coefficients]:
    """Compare `fused` with `LossGradient` on made-up rows; changes no state and draws from no stream.

    Args:
        fused: differentiates `loss` of `policy`.
        policy: the policy.
        parameters: its parameters.
        loss: the loss.
        fillers: whether some rows don't count.
        tolerance: largest difference, as a share of the largest number of a parameter's gradient.

    Returns:
        The minibatch and the coefficients of the comparison.

    Raises:
        CompileError: the gradients differ.
    """
    device = parameters.vector.device
    n, dist, draws = _EXAMPLE_ROWS, policy.distribution, torch.Generator().manual_seed(0)
    obs, mask = _made_up_obs(policy, n, draws)
    output = policy(obs.to(device))
    params = output.params.cpu() + 0.3 * torch.randn(n, dist.n_params, generator=draws)
    if mask is not None:
        params = torch.where(mask > 0, params, FORBIDDEN)
    noise = torch.zeros(n, dist.noise_size)
    dist.fill_noise(noise, draws)
    actions, valid = dist.sample(params, noise), torch.arange(n) % 5 != 0
    advantages, errors = torch.randn(2, n, generator=draws)
    # within the clip ranges of 0.2 or far beyond, so that rounding takes no row across a limit of the loss
    logratios, value_steps = torch.tensor([-0.5, -0.1, 0.0, 0.1, 0.5])[torch.randint(5, (2, n), generator=draws)]
    logprobs = dist.log_prob(output.params, actions.to(device)) - logratios.to(device)
    values = output.values - value_steps.to(device)
    returns = values + (errors + 2.0 * errors.sign()).to(device)
    fields = obs, actions, logprobs, params, values, advantages, returns, valid if fillers else None
    batch = Batch(*(None if x is None else x.to(device) for x in fields))  # type: ignore[arg-type]
    # learning rate, clip ranges, weights of value and entropy, largest norm, gamma, lambda, weight of the KL
    numbers = (1e-3, 0.2, 0.2, 0.5, 0.01, 0.5, 0.99, 0.95, 0.5)
    coefs = Coefficients(*(torch.tensor(x, device=device) for x in numbers))
    scale, order = torch.tensor([0.1, 1.5], device=device), torch.arange(n, device=device)
    plain = LossGradient(policy, parameters, loss, scale_advantages=True)
    expected = plain(parameters.vector, Minibatch(scale, order, plain.pack(batch)), coefs, plain.constants)
    minibatch = Minibatch(scale, order, fused.pack(batch))
    found = fused(parameters.vector, minibatch, coefs, fused.constants)
    if not torch.equal(found.n_rows, expected.n_rows):
        raise CompileError(f"it counts {float(found.n_rows):g} rows where torch counts {float(expected.n_rows):g}")
    # by parameter, as the actor's gradients are far smaller than the critic's; a sum may be 0 but for rounding
    least = 1e-3 * float(expected.flat.abs().max())
    for x, y in zip(parameters.views(found.flat), parameters.views(expected.flat), strict=True):
        if not torch.allclose(x, y, 0.0, tolerance * max(least, float(y.abs().max()))):
            raise CompileError(f"its gradient differs from torch's by up to {float((x - y).abs().max()):.1g}")
    if not torch.allclose(found.diagnostics, expected.diagnostics, tolerance, 0.1 * tolerance):
        differences = (found.diagnostics - expected.diagnostics).abs()
        raise CompileError(f"its diagnostics differ from torch's by up to {float(differences.max()):.1g}")
    return minibatch, coefs


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
