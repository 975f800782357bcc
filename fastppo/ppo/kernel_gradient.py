"""The gradient of PPO's loss, and whole epochs, in Triton kernels: for policies of fully connected layers on CUDA."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.errors import first_line
from fastppo.functional.adam import AdamState, adam
from fastppo.functional.losses import Batch, Coefficients, PPOLoss
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp_layout import layout, not_laid_out, trunks
from fastppo.policies.policy import Policy
from fastppo.ppo.fused_gradient import check_gradient
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.packed_rows import PackedRows
from fastppo.ppo.update_step import Gradient, UpdateState, update_step
from fastppo.runtime.compile import CompileError, flatten

# more would spill registers, or need more shared memory than two programs have
_MOST_LAYERS_UNDER_SEVERAL_HEADS = 2
_MOST_LAYERS, _MOST_UNITS, _MOST_FEATURES, _MOST_OUTPUTS, _MOST_COMPONENTS = 3, 64, 32, 16, 8


def not_fused(policy: Policy, loss: object) -> str | None:
    """Return why `KernelGradient` can't differentiate this loss of this policy, or None."""
    if type(loss) is not PPOLoss:
        return f"the loss is {type(loss).__name__}"
    if reason := not_laid_out(policy):
        return reason
    mlp = layout(policy, next(policy.network.parameters()))
    *hidden, _ = mlp.critic
    heads = max(len(trunk.heads) for trunk in trunks(mlp))
    most_layers = _MOST_LAYERS if heads == 1 else _MOST_LAYERS_UNDER_SEVERAL_HEADS
    if len(hidden) > most_layers:
        return f"there are more than {most_layers} hidden layers"
    if max(x.n_out for x in hidden) > _MOST_UNITS:
        return f"a hidden layer is wider than {_MOST_UNITS}"
    if mlp.features > _MOST_FEATURES:
        return f"an observation has more than {_MOST_FEATURES} features"
    if max(head.n_out for trunk in trunks(mlp) for head in trunk.heads) > _MOST_OUTPUTS:
        return f"the actor has more than {_MOST_OUTPUTS} outputs"
    if len(mlp.nvec) > _MOST_COMPONENTS:
        return f"an action has more than {_MOST_COMPONENTS} components"
    return None if importlib.util.find_spec("triton") else "Triton is not installed"


class KernelGradient:
    """Computes the gradient of `LossGradient` in two kernel launches, and takes the step of `update_step` in two more.

    Numbers equal those of `LossGradient` up to rounding, in TF32 where torch's matrix products use it. Their bits
    depend on `programs` and the GPU's architecture alone.

    Attributes:
        constants: none; see `LossGradient`.
        precision: of matrix products: "tf32" or "ieee".
    """

    constants: tuple[Tensor, ...] = ()

    def __init__(
        self, policy: Policy, parameters: FlatParameters, loss: PPOLoss, *, scale_advantages: bool, programs: int
    ) -> None:
        """Differentiate `loss` of `policy`, for which `not_fused` is None; see `LossGradient`.

        Args:
            policy: the policy.
            parameters: its parameters.
            loss: the loss.
            scale_advantages: apply each minibatch's `scale` to its advantages.
            programs: programs per trunk; the number of multiprocessors keeps the GPU busy.
        """
        from fastppo.kernels import update as kernels
        from fastppo.kernels.layers import precision

        self._kernels, self._scale_advantages, self._diagnostics = kernels, scale_advantages, loss.diagnostics
        mlp = layout(policy, parameters.vector)
        self._network = kernels.Network(
            trunks(mlp),
            mlp.activation,
            mlp.log_std,
            mlp.distribution,
            mlp.nvec,
            mlp.components,
            parameters.size,
            precision(),
        )
        self.precision = self._network.precision
        self._loss = kernels.Loss(loss.objective != "penalty", loss.penalizes_kl, loss.value_clip)
        device = parameters.vector.device
        self._sums = kernels.new_sums(self._network, programs, device)
        self._unscaled = torch.stack((self._sums.new_zeros(()), self._sums.new_ones(())))
        self._rows = PackedRows(policy)

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Write the encoded observations of `batch`, and all else that the loss reads, to one row each."""
        if self._rows.pack(batch):
            begins = {name: at for name, at in self._rows.begins.items() if name not in ("features", "value")}
            width, old_value = self._rows.packed.shape[1], self._rows.begins["value"]
            self._columns = self._kernels.Columns(width=width, old_value=old_value, **begins)
        return (self._rows.packed,)

    def __call__(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """Return the gradient of the mean loss of `minibatch` at `params` [P]."""
        result, _ = self._differentiate(params, minibatch.rows, minibatch.scale, coefs)
        return Gradient(result[: self._network.size], result[self._network.size : -1], result[-1])

    def run_epoch(
        self, state: UpdateState, rows: Tensor, scales: Tensor, coefs: Coefficients, *, adam_eps: float, exact_kl: bool
    ) -> None:
        """Call `update_step`, with Adam, for each minibatch: rows [M, B] of the packed batch, scales [M, 2]."""
        of_adam: AdamState = state.optimizer
        state_of_adam = of_adam.mean, of_adam.square, of_adam.left1, of_adam.left2
        changed = self._kernels.State(
            state.params, *state_of_adam, state.sums, state.kl_limit, state.stop_kl, state.skipped
        )
        for order, scale in zip(rows.unbind(), scales.unbind(), strict=True):
            gradient, squares = self._differentiate(state.params, order, scale, coefs)
            self._kernels.take_step(
                changed,
                gradient,
                squares,
                coefs.learning_rate,
                coefs.max_grad_norm,
                adam_eps=adam_eps,
                sums_exact_kl=exact_kl,
                kl=self._diagnostics.index("approx_kl"),
                exact_kl=self._diagnostics.index("exact_kl"),
            )

    def _differentiate(
        self, params: Tensor, order: Tensor, scale: Tensor, coefs: Coefficients
    ) -> tuple[Tensor, Tensor]:
        weights = coefs.clip_coef, coefs.value_clip_coef, coefs.vf_coef, coefs.ent_coef, coefs.kl_coef
        return self._kernels.differentiate(
            params,
            self._rows.packed,
            order,
            scale if self._scale_advantages else self._unscaled,
            self._kernels.Coefficients(*weights),
            self._sums,
            network=self._network,
            columns=self._columns,
            loss=self._loss,
        )


# of the comparison with torch, as a share of the largest number. TF32 keeps 10 bits, and torch and Triton may round
# differently: then units change sides, and log-probabilities of unlikely actions differ
_TOLERANCE = {"ieee": 1e-4, "tf32": 0.5}


def in_each_precision(compare: Callable[[], None]) -> None:
    """Call `compare` with torch's matrix products in float32, then in the precision set before, if it is another."""
    before = torch.get_float32_matmul_precision()
    try:
        for precision in dict.fromkeys(("highest", before)):
            torch.set_float32_matmul_precision(precision)
            compare()
    finally:
        torch.set_float32_matmul_precision(before)


def fuse_gradient(
    policy: Policy, parameters: FlatParameters, loss: object, *, scale_advantages: bool, fillers: bool, programs: int
) -> KernelGradient:
    """Return a `KernelGradient` whose kernels have been compared with torch; changes no state.

    The comparison in float32 is strict; that in TF32 finds only kernels that go wrong in that precision alone.

    Args:
        policy: the policy.
        parameters: its parameters.
        loss: the loss.
        scale_advantages: see `LossGradient`.
        fillers: whether some rows don't count.
        programs: see `KernelGradient`.

    Raises:
        CompileError: no kernel can differentiate this loss of this policy, or one fails or differs.
    """
    if reason := not_fused(policy, loss):
        raise CompileError(reason)
    assert isinstance(loss, PPOLoss), "this is what not_fused checks"

    def compare() -> None:
        example = KernelGradient(policy, parameters, loss, scale_advantages=True, programs=programs)
        tolerance = _TOLERANCE[example.precision]
        minibatch, coefs = check_gradient(example, policy, parameters, loss, fillers=fillers, tolerance=tolerance)
        _check_step(example, parameters, loss, minibatch, coefs)

    try:
        in_each_precision(compare)
    except CompileError:
        raise
    except Exception as error:
        raise CompileError(f"a kernel failed: {type(error).__name__}: {first_line(error).removesuffix('.')}") from error
    return KernelGradient(policy, parameters, loss, scale_advantages=scale_advantages, programs=programs)


def _check_step(
    kernels: KernelGradient, parameters: FlatParameters, loss: PPOLoss, minibatch: Minibatch, coefs: Coefficients
) -> None:
    """Compare a step of `run_epoch` with `update_step` for the same gradient, on copies.

    Raises:
        CompileError: they differ.
    """
    optimizer, names = adam(1e-5), loss.diagnostics
    states = []
    for _ in range(2):
        params = parameters.vector.clone()
        sums, scalars = params.new_zeros(len(names) + 6), params.new_zeros(2, 2)
        limit = torch.full_like(scalars[0, 0], math.inf)
        states.append(UpdateState(params, optimizer.init(params), sums, limit, scalars[0, 0], scalars[1]))
    update_step(
        states[0],
        minibatch,
        coefs,
        (),
        gradient_fn=kernels,
        optimizer=optimizer,
        kl_index=names.index("approx_kl"),
        exact_kl_index=names.index("exact_kl"),
        sum_exact_kl=True,
    )
    rows, scales = minibatch.rows.unsqueeze(0), minibatch.scale.unsqueeze(0)
    kernels.run_epoch(states[1], rows, scales, coefs, adam_eps=1e-5, exact_kl=True)
    for x, y in zip(flatten(states[1:]), flatten(states[:1]), strict=True):
        if not torch.allclose(x, y, 1e-4, 1e-5):
            raise CompileError("a step of its kernels differs from torch's")
