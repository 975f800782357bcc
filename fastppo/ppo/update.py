"""The PPO update: epochs over shuffled minibatches, with KL early stopping.

`PPOUpdate.run_epochs` is the loop; `update_step` takes one minibatch. Every decision, early stopping included, is made
on the device, so an epoch can be one CUDA graph that every epoch replays. The same holds for coefficients that follow
the KL: the learning rate from minibatch to minibatch, the weight of a penalty on the KL from update to update.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Literal

import torch
from torch import Tensor

from fastppo.functional.adaptation import Adaptation
from fastppo.functional.losses import Batch, Coefficients, Loss, advantage_scale, normalize_advantages
from fastppo.functional.optimizer import Optimizer
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.policy import Policy
from fastppo.ppo import fused_gradient, kernel_gradient
from fastppo.ppo.fused_gradient import FusedGradient
from fastppo.ppo.kernel_gradient import KernelGradient
from fastppo.ppo.minibatch_step import MinibatchStep
from fastppo.ppo.minibatches import Minibatch, Shuffle
from fastppo.ppo.update_step import LossGradient, UpdateState, update_step
from fastppo.runtime.compile import CompileError
from fastppo.runtime.distributed import World
from fastppo.runtime.graphs import GraphPool, capture
from fastppo.runtime.seeding import restore_generator

# (rows [M, B], scales [M, 2], coefs, watch) of one epoch
Epoch = Callable[[Tensor, Tensor, Coefficients, bool], None]
# (rows [E, M, B], scales [E, M, 2], coefs) of several epochs, until the KL stops the update
Epochs = Callable[[Tensor, Tensor, Coefficients], None]


class PPOUpdate:
    """Epochs of minibatch steps on one rollout.

    Attributes:
        policy: the policy that learns.
        parameters: its network's parameters, as one vector.
        loss: loss of a minibatch.
        shuffle: cuts each rollout into minibatches.
        normalize: normalise advantages per "minibatch", per "batch", or not ("off").
        kl_stop: "epoch" stops after an epoch whose mean KL exceeds the limit, "minibatch" before the step of a
            minibatch whose KL does.
        world: the ranks that share each minibatch.
        state: the tensors that a minibatch changes.
        adapted: the coefficients that the update adapts, [] each, by their name in `Coefficients`: "learning_rate",
            "kl_coef". The coefficients given to a run must hold these tensors.
        trained: names of the trained parameters in the policy.
        report_names: names of the values that `run` returns: the loss's diagnostics and the gradient norm before
            clipping, averaged over the steps taken; minibatches skipped because their gradient was not finite;
            minibatches and epochs run; whether the KL stopped the update (0 or 1), and that KL; the most minibatches
            skipped in a row, continuing from earlier updates; the adapted coefficients: the learning rate after the
            last minibatch, the KL coefficient of this update.
    """

    def __init__(
        self,
        policy: Policy,
        parameters: FlatParameters,
        loss: Loss,
        optimizer: Optimizer,
        shuffle: Shuffle,
        *,
        normalize: Literal["minibatch", "batch", "off"],
        kl_stop: Literal["epoch", "minibatch"],
        world: World | None = None,
        adaptive_rate: Adaptation | None = None,
        adaptive_kl_coef: Adaptation | None = None,
    ) -> None:
        """Allocate the state and initialise the optimiser.

        Args:
            policy: the policy that learns.
            parameters: its network's parameters.
            loss: loss of a minibatch.
            optimizer: optimiser of the flat parameters.
            shuffle: cuts rollouts into minibatches, on the device of the parameters.
            normalize: see the attribute.
            kl_stop: see the attribute.
            world: None: a single rank.
            adaptive_rate: adapts the learning rate before each step to the exact KL of its minibatch; None: a schedule
                sets it.
            adaptive_kl_coef: adapts the KL coefficient after each update, for a loss that penalises the KL.
        """
        self.policy, self.parameters, self.loss, self.shuffle = policy, parameters, loss, shuffle
        self.normalize, self.kl_stop, self.world = normalize, kl_stop, world or World()
        self._n_figures = len(loss.diagnostics) + 1
        self.report_names = (*loss.diagnostics, "grad_norm", "skipped_minibatches", "minibatches_run", "epochs_run")
        self.report_names += ("stopped", "stop_kl", "skipped_in_a_row")
        vector = parameters.vector
        adaptive = {"learning_rate": adaptive_rate, "kl_coef": adaptive_kl_coef}
        self.adapted = {name: vector.new_full((), a.start) for name, a in adaptive.items() if a is not None}
        self.report_names += tuple(self.adapted)
        self._adaptive_kl_coef = adaptive_kl_coef
        # mean exact KL of the last epoch
        self._last_kl = vector.new_zeros(())
        self.state = UpdateState(
            params=vector,
            optimizer=optimizer.init(vector),
            sums=vector.new_zeros(self._n_figures + (3 if adaptive_kl_coef is None else 5)),
            kl_limit=vector.new_zeros(()),
            stop_kl=vector.new_zeros(()),
            skipped=vector.new_zeros(2),
        )
        # largest mean KL of an epoch
        self._epoch_limit = vector.new_zeros(())
        # mean and divisor of the advantages of each minibatch, and the packed batch; `begin` writes both
        self._scales = vector.new_zeros(shuffle.update_epochs, shuffle.n_minibatches, 2)
        self._data: tuple[Tensor, ...] = ()
        loss_gradient = LossGradient(
            policy, parameters, loss, scale_advantages=normalize == "minibatch", segment_length=shuffle.segment_length
        )
        self.trained = loss_gradient.trained
        self._on_gpu, self._optimizer = vector.device.type == "cuda", optimizer
        update = functools.partial(
            update_step,
            optimizer=optimizer,
            kl_index=loss.diagnostics.index("approx_kl"),
            exact_kl_index=loss.diagnostics.index("exact_kl"),
            adapt_rate=None if adaptive_rate is None else adaptive_rate.rule,
            sum_exact_kl=adaptive_kl_coef is not None,
        )
        # how a minibatch, an epoch and, where one call can, all epochs run: `compile`, `fuse`, `capture` replace these
        self._step = MinibatchStep(loss_gradient, len(loss.diagnostics), self.world, update)
        self._epoch: Epoch = self._run_epoch
        self._all_epochs: Epochs | None = None

    def compile(self, batch: Batch, coefs: Coefficients) -> None:
        """Compile the step for batches with the shapes of `batch`; changes no state.

        Raises:
            CompileError: the step can't be compiled on this rank or another; the update stays eager on all.
        """
        if reason := self.policy.uncompilable():
            raise CompileError(reason)
        n_rows = len(batch.logprobs) // self.shuffle.n_minibatches
        self._step.compile(self.state, self.pack(batch), n_rows, coefs)

    def not_fused(self) -> str | None:
        """Return why `fuse` can't be used, or None."""
        if self._optimizer.adam_eps is None:
            return "the optimiser is not Adam"
        reason = kernel_gradient.not_fused if self._on_gpu else fused_gradient.not_fused
        return reason(self.policy, self.loss)

    def fuse(self, batch: Batch, parallel: int) -> None:
        """Compute gradients in C or by kernels, and whole epochs with Adam on one rank at a scheduled learning rate.

        Changes no state.

        Args:
            batch: has the shapes of all batches.
            parallel: threads of the C code, torch's apart; on a GPU, programs of each kernel.

        Raises:
            CompileError: neither can differentiate this policy or loss on this rank or another, or the gradient is not
                torch's on an example.
        """

        def fused() -> FusedGradient | KernelGradient:
            if reason := self.not_fused():
                raise CompileError(reason)
            scaled, fillers = self.normalize == "minibatch", batch.valid is not None
            parts = self.policy, self.parameters, self.loss
            if self._on_gpu:
                return kernel_gradient.fuse_gradient(
                    *parts, scale_advantages=scaled, fillers=fillers, programs=parallel
                )
            return fused_gradient.fuse_gradient(*parts, scale_advantages=scaled, fillers=fillers, threads=parallel)

        gradient = self.world.together(fused, CompileError)
        self._step.use(gradient)
        adam_eps = self._optimizer.adam_eps
        if self.world.size == 1 and adam_eps is not None and "learning_rate" not in self.adapted:
            self._fuse_epochs(gradient, adam_eps)

    def _fuse_epochs(self, gradient: FusedGradient | KernelGradient, adam_eps: float) -> None:
        """Run whole epochs, with Adam, in C or by kernels."""
        exact_kl = self._adaptive_kl_coef is not None
        if isinstance(gradient, FusedGradient):
            limit, last_kl = self._epoch_limit if self.kl_stop == "epoch" else None, self._last_kl if exact_kl else None
            in_c = functools.partial(
                gradient.run_epochs, self.state, adam_eps=adam_eps, epoch_limit=limit, last_kl=last_kl
            )

            def epoch(rows: Tensor, scales: Tensor, coefs: Coefficients, watch: bool) -> None:
                in_c(rows.unsqueeze(0), scales.unsqueeze(0), coefs)

            self._epoch, self._all_epochs = epoch, in_c
            return

        def launched(rows: Tensor, scales: Tensor, coefs: Coefficients, watch: bool) -> None:
            gradient.run_epoch(self.state, rows, scales, coefs, adam_eps=adam_eps, exact_kl=exact_kl)
            self._end_epoch()

        self._epoch = launched

    def capture(self, coefs: Coefficients, pool: GraphPool) -> None:
        """Capture an epoch over the batch of the last `begin`; every later epoch replays it, with these `coefs`.

        Raises:
            CaptureError: the capture failed.
        """
        rows, scales = self.shuffle.orders[0].clone(), self._scales[0].clone()
        launched = self._epoch
        replay = capture(
            lambda: launched(rows, scales, coefs, False),
            keep=self.kept(),
            fresh=[rows, scales],
            device=rows.device,
            pool=pool,
            world=self.world,
        )

        def epoch(order: Tensor, scale: Tensor, coefs: Coefficients, watch: bool) -> None:
            rows.copy_(order)
            scales.copy_(scale)
            replay()

        self._epoch = epoch

    def prepare(self, n: int, kl_limit: float) -> None:
        """Draw minibatches of the `n` rows for all epochs, and set the KL limit (inf: none)."""
        self.parameters.check()
        self.shuffle.draw(n)
        by_epoch = self.kl_stop == "epoch"
        self._epoch_limit.fill_(kl_limit if by_epoch else math.inf)
        self.state.kl_limit.fill_(math.inf if by_epoch else kl_limit)

    def run(
        self, batch: Batch, coefs: Coefficients, *, watch: bool, on_epoch: Callable[[], None] | None = None
    ) -> Tensor:
        """Run the update that `prepare` set up: `begin`, `run_epochs` and `finish`.

        Args:
            batch: all rows of the rollout.
            coefs: this iteration's coefficients.
            watch: as for `run_epochs`.
            on_epoch: as for `run_epochs`.

        Returns:
            The values of `report_names`, on the device.
        """
        self.begin(batch)
        self.run_epochs(coefs, watch=watch, on_epoch=on_epoch)
        return self.finish()

    def begin(self, batch: Batch) -> None:
        """Lay out `batch`, all rows of the rollout, for the epochs, and reset the figures of the report."""
        self._data, scales = self._lay_out(batch)
        self._scales.copy_(scales)
        self.state.sums.zero_()
        self.state.stop_kl.zero_()
        self.state.skipped[1].zero_()
        self._last_kl.fill_(math.nan)  # until an epoch has measured one

    def run_epochs(self, coefs: Coefficients, *, watch: bool, on_epoch: Callable[[], None] | None = None) -> None:
        """Run the epochs on the batch of the last `begin`.

        Every decision is made on the device: once the KL has stopped the update, further minibatches change nothing.
        With `watch`, the host reads the decision, 4 bytes after each epoch, to leave the loop early; this saves time
        and changes no number.

        Args:
            coefs: this iteration's coefficients.
            watch: leave the loop once the KL has stopped the update.
            on_epoch: called before the first epoch and after each epoch run.
        """
        if on_epoch is None and self._all_epochs is not None:
            self._all_epochs(self.shuffle.orders, self._scales, coefs)
            return
        if on_epoch is not None:
            on_epoch()
        for order, scale in zip(self.shuffle.orders, self._scales, strict=True):
            self._epoch(order, scale, coefs, watch)
            if on_epoch is not None:
                on_epoch()
            if watch and self._stopped():
                break

    def finish(self) -> Tensor:
        """Return the report of the epochs run since `begin`, then adapt the KL coefficient for the next update.

        The coefficient follows the mean exact KL of the last epoch: it covers every row of the rollout once, and costs
        no pass of its own. Each minibatch is measured before its step, so the mean lags half an epoch behind the KL
        after the update that section 4 of the paper takes.
        """
        report = self.report()
        if self._adaptive_kl_coef is not None:
            kl_coef = self.adapted["kl_coef"]
            kl_coef.copy_(self._adaptive_kl_coef.rule(kl_coef, self._last_kl))
        return report

    def report(self) -> Tensor:
        """Return the values of `report_names` for the epochs run since `begin`, on the device."""
        state, n = self.state, self._n_figures
        figures, (taken, within) = state.sums[:n], state.sums[n : n + 2]
        stopped = (state.kl_limit == -math.inf).float()
        begun = within + stopped if self.kl_stop == "minibatch" else within
        # minus a half: CUDA divides by multiplying with a rounded inverse, which may land just above a whole number
        epochs = torch.ceil((begun - 0.5) / self.shuffle.n_minibatches).clamp(min=0)
        rest = (within - taken, within, epochs, stopped, state.stop_kl, state.skipped[1], *self.adapted.values())
        return torch.cat((figures / taken, torch.stack(rest)))

    def gradient(self, batch: Batch, coefs: Coefficients) -> Tensor:
        """Return the gradient [P] of the first minibatch drawn by `prepare`, at the current parameters."""
        data, scales = self._lay_out(batch)
        minibatch = Minibatch(scales[0, 0], self.shuffle.orders[0, 0], data)
        gradient = self._step.gradient
        return gradient(self.state.params, minibatch, coefs, gradient.constants).flat

    def step(self, minibatch: Minibatch, coefs: Coefficients) -> None:
        """Take one step on a minibatch of a packed batch."""
        self._step(self.state, minibatch, coefs)

    def state_dict(self) -> dict[str, Tensor]:
        """Return all that the next update needs, without the parameters.

        Optimiser, adapted coefficients, and the random stream of the shuffle.
        """
        state = self.state
        return {
            **state.optimizer._asdict(),
            **self.adapted,
            "streak": state.skipped,
            "shuffles": self.shuffle.generator.get_state(),
        }

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Restore in place from `state_dict()`."""
        for name, tensor in self.state.optimizer._asdict().items():
            tensor.copy_(saved[name])
        for name, tensor in self.adapted.items():
            if name in saved:  # a run that did not adapt it may be resumed as one that does
                tensor.copy_(saved[name])
        self.state.skipped.copy_(saved["streak"])
        restore_generator(self.shuffle.generator, saved["shuffles"])

    def kept(self) -> list[Tensor]:
        """List the tensors that an update changes and the next one reads."""
        return [self.state.params, *self.state.optimizer, self.state.skipped, *self.adapted.values()]

    def pack(self, batch: Batch) -> tuple[Tensor, ...]:
        """Pack `batch` for minibatches."""
        return self._step.gradient.pack(batch)

    def scales(self, batch: Batch) -> Tensor:
        """Return mean and divisor of the advantages of each minibatch drawn by `prepare`, [E, M, 2]."""
        orders = self.shuffle.orders
        if self.normalize != "minibatch":
            return self.state.sums.new_zeros(*orders.shape[:2], 2)  # not used
        valid = None if batch.valid is None else batch.valid[orders]
        return torch.stack(advantage_scale(batch.advantages[orders], valid, self.world.pool), -1)

    def _lay_out(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """Return the packed batch and the advantage scales of its minibatches."""
        if self.normalize == "batch":
            batch = batch._replace(advantages=normalize_advantages(batch.advantages, batch.valid, self.world.pool))
        return self.pack(batch), self.scales(batch)

    def _run_epoch(self, rows: Tensor, scales: Tensor, coefs: Coefficients, watch: bool) -> None:
        """Take a step on each minibatch: `rows` [M, B], `scales` [M, 2]; `watch` as for `run_epochs`."""
        watch_minibatches = watch and self.kl_stop == "minibatch" and rows.device.type == "cpu"
        for i in range(self.shuffle.n_minibatches):
            self.step(Minibatch(scales[i], rows[i], self._data), coefs)
            if watch_minibatches and self._stopped():
                break
        self._end_epoch()

    def _stopped(self) -> bool:
        self.world.wait(self.state.kl_limit.device)
        return self.state.kl_limit.item() == -math.inf

    def _end_epoch(self) -> None:
        """Compare the epoch's mean KL with its limit, and keep its mean exact KL for an adaptive penalty."""
        state, of_epoch = self.state, self.state.sums[self._n_figures + 2 :]
        if self._adaptive_kl_coef is not None:
            total, number = of_epoch[1:]
            # no minibatch counts in an epoch after the stop
            self._last_kl.copy_(torch.where(number > 0, total / number, self._last_kl))
            of_epoch[1:].zero_()
        if self.kl_stop == "minibatch":
            return
        kl = of_epoch[0] / self.shuffle.n_minibatches
        # "not <=", so that NaN stops too
        ends = ~(kl <= self._epoch_limit) & (self._epoch_limit != math.inf) & (state.kl_limit != -math.inf)
        state.stop_kl.copy_(torch.where(ends, kl, state.stop_kl))
        state.kl_limit.copy_(torch.where(ends, -math.inf, state.kl_limit))
        of_epoch[0].zero_()
