"""The step of an update on one minibatch, over the rows of all ranks: eager or compiled, with one of the gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from fastppo.functional.losses import Coefficients
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.update_step import Gradient, PackedGradient, UpdateState, from_rank_sum, to_rank_sum
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.distributed import World


class MinibatchStep:
    """Takes the step of `update_step` on a minibatch.

    Attributes:
        gradient: differentiates the loss on this rank's rows.
    """

    def __init__(self, gradient: PackedGradient, n_diagnostics: int, world: World, update: Callable[..., None]) -> None:
        """Step eagerly.

        Args:
            gradient: differentiates the loss on this rank's rows.
            n_diagnostics: diagnostics of the loss.
            world: the ranks that share each minibatch.
            update: `update_step` with all of its settings but `gradient_fn`.
        """
        self._n_diagnostics, self._world, self._update = n_diagnostics, world, update
        self.use(gradient)

    def use(self, gradient: PackedGradient) -> None:
        """Step by another gradient from now on, eagerly."""
        self.gradient = gradient
        self._take: Callable[[UpdateState, Minibatch, Coefficients, tuple[Tensor, ...]], None] = functools.partial(
            self._update, gradient_fn=gradient if self._world.size == 1 else self._summed
        )

    def __call__(self, state: UpdateState, minibatch: Minibatch, coefs: Coefficients) -> None:
        """Take the step: change `state` in place."""
        self._take(state, minibatch, coefs, self.gradient.constants)

    def compile(self, state: UpdateState, data: tuple[Tensor, ...], n_rows: int, coefs: Coefficients) -> None:
        """Compile the step for minibatches of `n_rows` rows of the packed batch `data`; changes no state.

        Raises:
            CompileError: the step can't be compiled on this rank or another; it stays eager on all.
        """
        rows = torch.arange(n_rows, device=state.sums.device)
        minibatch, constants = Minibatch(state.sums.new_zeros(2), rows, data), self.gradient.constants
        if self._world.size == 1:
            self._take = compile_graph(self._take, (state, minibatch, coefs, constants))
            return
        # compiled and eager code round differently: with both, the ranks' parameters would drift apart
        before, after = self._world.together(lambda: self._halves(state, minibatch, coefs), CompileError)

        def take(state: UpdateState, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]) -> None:
            after(state, self._world.sum_(before(state.params, minibatch, coefs, constants)), coefs)

        self._take = take

    def _halves(
        self, state: UpdateState, minibatch: Minibatch, coefs: Coefficients
    ) -> tuple[Callable[..., Tensor], Callable[..., None]]:
        """Compile what lies before the sum over ranks and what lies after it."""
        before = compile_graph(
            lambda *arguments: to_rank_sum(self.gradient(*arguments)),
            (state.params, minibatch, coefs, self.gradient.constants),
        )
        n_params = state.params.numel()
        after = compile_graph(
            lambda state, total, coefs: self._update(
                state, total, coefs, (), gradient_fn=lambda *_: from_rank_sum(total, n_params)
            ),
            (state, state.sums.new_zeros(n_params + self._n_diagnostics + 1), coefs),
        )
        return before, after

    def _summed(
        self, params: Tensor, minibatch: Minibatch, coefs: Coefficients, constants: tuple[Tensor, ...]
    ) -> Gradient:
        """The gradient over the rows of all ranks: gradient and diagnostics are summed in one go."""
        total = self._world.sum_(to_rank_sum(self.gradient(params, minibatch, coefs, constants)))
        return from_rank_sum(total, params.numel())
