"""The update: epochs over shuffled minibatches, with the KL early stop.

One minibatch is one function of tensors that changes its state in place: gather, evaluate, loss, gradient, clip, Adam,
sums of the diagnostics. It reads nothing back to the host and takes every scalar as a tensor, so that it can be
compiled whole, once, for a run with annealing. The early stop is a tensor too, so that all epochs together can be one
CUDA graph.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor

from fastppo.functional.adam import AdamState, adam_init, adam_step, clip_by_norm
from fastppo.functional.losses import (
    DIAGNOSTICS,
    Batch,
    Coefficients,
    ValueClip,
    advantage_scale,
    normalize_advantages,
    ppo_loss,
)
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.policy import Policy
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.distributed import World

FIGURES = (*DIAGNOSTICS, "grad_norm")
# What an update tells of itself: means of FIGURES (the gradient norm before clipping) over the steps that were taken;
# minibatches left out because their gradient was not finite; minibatches and epochs run; whether the KL ended it (0
# or 1), and that KL; the most minibatches that were left out one after the other, updates before included
REPORT = (*FIGURES, "skipped_minibatches", "minibatches_run", "epochs_run", "stopped", "stop_kl", "skipped_in_a_row")
_KL = FIGURES.index("approx_kl")
_STATE = 9  # tensors that a minibatch changes, the first of its arguments
_WIDEST = 64  # numbers of an observation that are still packed with the rest of their row


class Rows:
    """The rows of a batch side by side in one float32 array, so that a minibatch is a single gather.

    Actions that are indices are exact as float32 up to 2^24. Images and long vectors stay where they are, and are
    gathered by themselves.

    Attributes:
        packed: [R, W], R rows; its columns are Batch's fields one after the other, obs last where it is packed.
    """

    def __init__(self, batch: Batch) -> None:
        """Lay out and allocate for batches like `batch`."""
        self._wide = batch.obs.dtype != torch.float32 or batch.obs[0].numel() > _WIDEST
        self._like = {name: x[:0] for name, x in self._columns(batch).items()}
        self._widths = [math.prod(x.shape[1:]) for x in self._like.values()]
        self.packed = torch.zeros(len(batch.logprobs), sum(self._widths), device=batch.logprobs.device)

    def _columns(self, batch: Batch) -> dict[str, Tensor]:
        fields = {name: x for name, x in batch._asdict().items() if x is not None}
        obs = fields.pop("obs")
        return fields if self._wide else fields | {"obs": obs}

    def fill(self, batch: Batch) -> tuple[Tensor, ...]:
        """Write `batch`; returns what `take` reads: the packed rows, and obs where they are not among them."""
        fields = self._columns(batch).values()
        for place, x in zip(torch.split(self.packed, self._widths, 1), fields, strict=True):
            place.copy_(x.reshape(place.shape))
        return (self.packed, batch.obs) if self._wide else (self.packed,)

    def take(self, data: Sequence[Tensor], rows: Tensor) -> Batch:
        """The rows [B] of `data` as `fill` gave it."""
        parts = torch.split(data[0].index_select(0, rows), self._widths, 1)
        fields: dict[str, Tensor | None] = {"valid": None}
        for (name, like), part in zip(self._like.items(), parts, strict=True):
            fields[name] = part.reshape(len(rows), *like.shape[1:]).to(like.dtype)
        if self._wide:
            fields["obs"] = data[1].index_select(0, rows)
        return Batch(**fields)  # type: ignore[arg-type]


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
        world: the processes whose rows make a minibatch together.
        trained: names of the parameters that learn, in the policy.
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
    world: World = dataclasses.field(default_factory=World)

    def __post_init__(self) -> None:
        """Start Adam's memory at zero."""
        vector = self.parameters.vector

        def scalar() -> Tensor:
            return torch.zeros((), device=vector.device)

        self.adam: AdamState = adam_init(vector)
        # FIGURES summed over the steps taken, their number, that of minibatches within the limit, and an epoch's KLs
        self._sums = torch.zeros(len(FIGURES) + 3, device=vector.device)
        # the KL that a minibatch may have (inf: any; -inf: the update is over), that an epoch's mean may have, and that
        # ended the update
        self._limit, self._epoch_limit, self._stop_kl = scalar(), scalar(), scalar()
        # minibatches that were left out one after the other: until now, and the most of this update
        self._streak = torch.zeros(2, device=vector.device)
        self._orders = torch.zeros(0, 0, dtype=torch.int64, device=vector.device)
        self._rows: Rows | None = None
        trained = {id(p) for p in self.parameters.parameters}
        names = {id(p): name for name, p in self.policy.named_parameters()}
        self.trained = [names[id(p)] for p in self.parameters.parameters]
        self._fixed: dict[str, Tensor] = {n: p for n, p in self.policy.named_parameters() if id(p) not in trained}
        self._fixed |= dict(self.policy.named_buffers())  # the normaliser's moments among them
        self._begin()

    def _begin(self) -> None:
        """Eager functions, to be replaced by compiled ones."""
        self._minibatch: Callable[..., None] = self._minibatch_eagerly
        self._differentiate: Callable[..., Tensor] = self._differentiate_eagerly
        self._step: Callable[..., None] = self._step_eagerly

    def compile(self, batch: Batch, coefs: Coefficients) -> None:
        """Compile the minibatch for batches like `batch`; nothing is changed.

        Raises:
            CompileError: it can't be; the update stays as it was.
        """
        if reason := self.policy.uncompilable():
            raise CompileError(reason)
        data = self.fill(batch)
        rows = torch.arange(len(batch.logprobs) // self.n_minibatches, device=self._sums.device)
        example = self._arguments(data, rows, coefs, self._sums.new_zeros(2))
        if self.world.size == 1:
            self._minibatch = compile_graph(self._minibatch_eagerly, example)
        else:
            learned = self._sums.new_zeros(self.parameters.vector.numel() + len(DIAGNOSTICS) + 1)
            differentiate = compile_graph(self._differentiate_eagerly, example)
            self._step = compile_graph(self._step_eagerly, [*example[:_STATE], *coefs, learned])
            self._differentiate = differentiate

    def __call__(self, batch: Batch, coefs: Coefficients, kl_limit: float) -> Tensor:
        """Learn from `batch`, stopping early where the KL (k3) is not <= `kl_limit` (inf: never).

        Returns:
            the values of REPORT, on the device.
        """
        self.prepare(len(batch.logprobs), kl_limit)
        return self.learn(batch, coefs, watched=kl_limit != math.inf)

    def prepare(self, n: int, kl_limit: float) -> None:
        """Set the limit, and draw the permutation of the `n` rows for every epoch, run or not."""
        self.parameters.check()
        self.allocate(n)
        for order in self._orders:
            order.copy_(torch.randperm(n, generator=self.generator, device=self.generator.device))
        by_epoch = self.kl_stop == "epoch"
        self._epoch_limit.fill_(kl_limit if by_epoch else math.inf)
        self._limit.fill_(math.inf if by_epoch else kl_limit)

    def allocate(self, n: int) -> None:
        """Room for the permutations of `n` rows, once."""
        if self._orders.shape != (self.update_epochs, n):
            self._orders = torch.zeros(self.update_epochs, n, dtype=torch.int64, device=self._sums.device)

    def learn(
        self, batch: Batch, coefs: Coefficients, *, watched: bool, look: Callable[[], None] | None = None
    ) -> Tensor:
        """Every epoch, as `prepare` set it up.

        What is decided is decided on the device: once the KL has ended the update, further minibatches change nothing.
        So `watched`, to look from the host and leave the loop, saves time and changes no number. `look` is called
        before the first epoch and after each that was run.
        """
        data, scales = self._lay_out(batch)
        orders = self.orders
        if look is not None:
            look()
        self._sums.zero_()
        self._stop_kl.zero_()
        self._streak[1].zero_()
        each_minibatch = watched and self.kl_stop == "minibatch" and self._limit.device.type == "cpu"
        for order, scale in zip(orders, scales, strict=True):
            for i in range(self.n_minibatches):
                self.minibatch(data, order[i], coefs, scale[i])
                if each_minibatch and self._over():
                    break
            self._end_epoch()
            if look is not None:
                look()
            if watched and self._over():
                break
        return self._report()

    def gradient(self, batch: Batch, coefs: Coefficients) -> Tensor:
        """Gradient [P] by the first of the minibatches that `prepare` drew, where the parameters are now."""
        data, scales = self._lay_out(batch)
        return self._loss_gradient(*self._arguments(data, self.orders[0, 0], coefs, scales[0, 0]))[0]

    def _lay_out(self, batch: Batch) -> tuple[tuple[Tensor, ...], Tensor]:
        """What minibatches read: rows, and the scales of their advantages."""
        if self.normalize == "batch":
            batch = batch._replace(advantages=normalize_advantages(batch.advantages, batch.valid, self.world.pool))
        return self.fill(batch), self.scales(batch)

    def state(self) -> list[Tensor]:
        """What an update changes and the next one needs."""
        return [self.parameters.vector, *self.adam, self._streak]

    def state_dict(self) -> dict[str, Tensor]:
        """Adam's memory, and the random stream of the permutations; parameters are the policy's."""
        return {**self.adam._asdict(), "streak": self._streak, "shuffles": self.generator.get_state()}

    def load_state_dict(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from there, in the tensors that are there."""
        for name, tensor in self.adam._asdict().items():
            tensor.copy_(saved[name])
        self._streak.copy_(saved["streak"])
        self.generator.set_state(saved["shuffles"].cpu())

    @property
    def orders(self) -> Tensor:
        """[E, M, B] rows of each minibatch of each epoch, as `prepare` drew them."""
        return self._orders.view(self.update_epochs, self.n_minibatches, -1)

    def inputs(self) -> list[Tensor]:
        """What `prepare` writes before each update."""
        return [self._orders, self._limit, self._epoch_limit]

    def minibatch(self, data: Sequence[Tensor], rows: Tensor, coefs: Coefficients, scale: Tensor) -> None:
        """One step on the rows [B] of `data`, whose advantages have the mean and divisor `scale` [2].

        With several processes, on the rows of all of them: gradient and diagnostics are summed in one go.
        """
        arguments = self._arguments(data, rows, coefs, scale)
        if self.world.size == 1:
            self._minibatch(*arguments)
        else:
            self._step(*arguments[:_STATE], *coefs, self.world.sum_(self._differentiate(*arguments)))

    def fill(self, batch: Batch) -> tuple[Tensor, ...]:
        """Lay `batch` out for `minibatch`."""
        if self._rows is None:
            self._rows = Rows(batch)
        return self._rows.fill(batch)

    def scales(self, batch: Batch) -> Tensor:
        """Mean and divisor of the advantages of each minibatch that `prepare` drew, [E, M, 2]."""
        orders = self.orders
        if self.normalize != "minibatch":
            return self._sums.new_zeros(*orders.shape[:2], 2)  # not used
        valid = None if batch.valid is None else batch.valid[orders]
        return torch.stack(advantage_scale(batch.advantages[orders], valid, self.world.pool), -1)

    def _over(self) -> bool:
        return self._limit.item() == -math.inf

    def _end_epoch(self) -> None:
        """Judge the epoch by the mean KL of its minibatches."""
        if self.kl_stop == "minibatch":
            return
        kl = self._sums[-1] / self.n_minibatches
        # "not <=", so that NaN stops too
        ends = ~(kl <= self._epoch_limit) & (self._epoch_limit != math.inf) & (self._limit != -math.inf)
        self._stop_kl.copy_(torch.where(ends, kl, self._stop_kl))
        self._limit.copy_(torch.where(ends, -math.inf, self._limit))
        self._sums[-1].zero_()

    def _report(self) -> Tensor:
        figures, (taken, within, _) = self._sums[: len(FIGURES)], self._sums[len(FIGURES) :]
        stopped = (self._limit == -math.inf).float()
        begun = within + stopped if self.kl_stop == "minibatch" else within
        # less a half: on CUDA a division is a product with the rounded inverse, and may end above a whole number
        epochs = torch.ceil((begun - 0.5) / self.n_minibatches).clamp(min=0)
        rest = torch.stack((within - taken, within, epochs, stopped, self._stop_kl, self._streak[1]))
        return torch.cat((figures / taken, rest))

    def _arguments(self, data: Sequence[Tensor], rows: Tensor, coefs: Coefficients, scale: Tensor) -> list[Tensor]:
        state = (self.parameters.vector, *self.adam, self._sums, self._limit, self._stop_kl, self._streak)
        return [*state, scale, rows, *coefs, *self._fixed.values(), *data]

    def _minibatch_eagerly(self, *tensors: Tensor) -> None:
        """One minibatch as a function of `_arguments`, which writes into the first nine of them."""
        gradient, diagnostics, _ = self._loss_gradient(*tensors)
        self._take_step(tensors[:_STATE], self._coefs(tensors), gradient, diagnostics)

    def _differentiate_eagerly(self, *tensors: Tensor) -> Tensor:
        """Gradient and diagnostics of `_arguments`, times the rows that count, and then their number: to be summed."""
        gradient, diagnostics, rows = self._loss_gradient(*tensors)
        return torch.cat((gradient * rows, diagnostics * rows, rows.unsqueeze(0)))

    def _step_eagerly(self, *tensors: Tensor) -> None:
        """The step that follows from the state, the coefficients and the sum of what `_differentiate` gave."""
        learned = tensors[-1]
        mean = learned[:-1] / learned[-1].clamp(min=1)  # 0 rows: all of them fillers
        gradient, diagnostics = torch.split(mean, [self.parameters.vector.numel(), len(DIAGNOSTICS)])
        self._take_step(tensors[:_STATE], Coefficients(*tensors[_STATE:-1]), gradient, diagnostics)

    def _coefs(self, tensors: Sequence[Tensor]) -> Coefficients:
        first = _STATE + 2
        return Coefficients(*tensors[first : first + len(Coefficients._fields)])

    def _loss_gradient(self, *tensors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradient [P], DIAGNOSTICS, and the number of rows that count, of `_arguments`."""
        assert self._rows is not None
        vector, (scale, rows) = tensors[0], tensors[_STATE : _STATE + 2]
        coefs, rest = self._coefs(tensors), tensors[_STATE + 2 + len(Coefficients._fields) :]
        fixed, data = rest[: len(self._fixed)], rest[len(self._fixed) :]
        batch = self._rows.take(data, rows)
        if self.normalize == "minibatch":
            batch = batch._replace(advantages=(batch.advantages - scale[0]) / scale[1])
        with torch.enable_grad():
            leaves = [view.detach().requires_grad_() for view in self.parameters.views(vector)]
            tensors_by_name = dict(zip(self.trained, leaves, strict=True)) | dict(zip(self._fixed, fixed, strict=True))
            params, values = torch.func.functional_call(self.policy, tensors_by_name, (batch.obs,))
            now = self.policy.evaluate_actions(params, values, batch.actions, batch.params)
            loss, diagnostics = ppo_loss(
                now.logprobs, now.entropy, now.values, now.exact_kl, batch, coefs, self.value_clip
            )
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        counted = vector.new_full((), len(rows)) if batch.valid is None else batch.valid.sum().to(vector.dtype)
        return self.parameters.flatten(gradients), diagnostics, counted

    def _take_step(self, state: Sequence[Tensor], coefs: Coefficients, gradient: Tensor, diagnostics: Tensor) -> None:
        """Clip, and move by Adam; left out where the gradient is not finite, or once the KL has passed its limit."""
        vector, mean, square, left1, left2, sums, limit, stop_kl, streak = state
        gradient, norm = clip_by_norm(gradient, coefs.max_grad_norm)
        figures = torch.cat((diagnostics, norm.unsqueeze(0)))
        kl = diagnostics[_KL]
        within = (kl <= limit) | (limit == math.inf)
        take = within & norm.isfinite()
        new, adam = adam_step(
            vector, gradient, AdamState(mean, square, left1, left2), coefs.learning_rate, self.adam_eps
        )
        for old, value in zip((vector, mean, square, left1, left2), (new, *adam), strict=True):
            old.copy_(torch.where(take, value, old))
        counts = torch.stack((take.to(kl.dtype), within.to(kl.dtype), kl))
        sums.add_(torch.cat((torch.where(take, figures, 0.0), counts)))
        in_a_row = torch.where(norm.isfinite(), 0.0, streak[0] + 1)
        in_a_row = torch.where(limit == -math.inf, streak[0], in_a_row)  # the update was over before
        streak.copy_(torch.stack((in_a_row, torch.maximum(in_a_row, streak[1]))))
        stop_kl.copy_(torch.where(within | (limit == -math.inf), stop_kl, kl))
        limit.copy_(torch.where(within, limit, -math.inf))
