"""The update: epochs over shuffled minibatches, with the KL early stop.

One minibatch is one function of tensors that changes its state in place: gather, evaluate, loss, gradient, clip, Adam,
sums of the diagnostics. It reads nothing back to the host and takes every scalar as a tensor, so that it can be
compiled whole, once, for a run with annealing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fastppo.functional.adam import AdamState, adam_init, adam_step, clip_by_norm
from fastppo.functional.losses import DIAGNOSTICS, Batch, Coefficients, ValueClip, normalize_advantages, ppo_loss
from fastppo.policies.api import Policy
from fastppo.policies.flat import FlatParameters
from fastppo.runtime.accelerate import CompileError, compile_graph

FIGURES = (*DIAGNOSTICS, "grad_norm")
_KL = FIGURES.index("approx_kl")
_WIDEST = 64  # numbers of an observation that are still packed with the rest of their row


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
        vector = self.parameters.vector
        self.adam: AdamState = adam_init(vector)
        # FIGURES summed over the steps taken, their number, and the KL of all minibatches of an epoch
        self._sums = torch.zeros(len(FIGURES) + 2, device=vector.device)
        self._last = torch.zeros(len(FIGURES), device=vector.device)  # FIGURES of the last minibatch
        self._limit = torch.zeros((), device=vector.device)
        self._rows: Rows | None = None
        trained = {id(p) for p in self.parameters.parameters}
        names = {id(p): name for name, p in self.policy.named_parameters()}
        self._trained = [names[id(p)] for p in self.parameters.parameters]
        self._fixed: dict[str, Tensor] = {n: p for n, p in self.policy.named_parameters() if id(p) not in trained}
        self._fixed |= dict(self.policy.named_buffers())  # the normaliser's moments among them
        self._minibatch = self._minibatch_eagerly

    def compile(self, batch: Batch, coefs: Coefficients) -> None:
        """Compile the minibatch for batches like `batch`; nothing is changed.

        Raises:
            CompileError: it can't be; the update stays as it was.
        """
        if reason := self.policy.uncompilable():
            raise CompileError(reason)
        data = self.fill(batch)
        rows = torch.arange(len(batch.logprobs) // self.n_minibatches, device=self._sums.device)
        self._minibatch = compile_graph(self._minibatch_eagerly, self._arguments(data, rows, coefs))

    def __call__(self, batch: Batch, coefs: Coefficients, kl_limit: float) -> UpdateStats:
        """Learn from `batch`, stopping early where the KL (k3) is not <= `kl_limit` (inf: never looked at)."""
        if self.normalize == "batch":
            batch = batch._replace(advantages=normalize_advantages(batch.advantages, batch.valid))
        data, n, watched = self.fill(batch), len(batch.logprobs), kl_limit != math.inf
        self._sums.zero_()
        self._limit.fill_(kl_limit if self.kl_stop == "minibatch" else math.inf)
        taken, epochs, stop_kl = 0, 0, None
        while epochs < self.update_epochs and stop_kl is None:
            epochs += 1
            order = torch.randperm(n, generator=self.generator, device=self.generator.device)
            self._sums[-1] = 0.0
            for rows in order.view(self.n_minibatches, -1):
                self.minibatch(data, rows, coefs)
                # "not <=", so that NaN stops too
                if watched and self.kl_stop == "minibatch" and not (kl := self._last[_KL].item()) <= kl_limit:
                    stop_kl = kl
                    break
                taken += 1
            if watched and self.kl_stop == "epoch":
                mean_kl = (self._sums[-1] / self.n_minibatches).item()
                stop_kl = mean_kl if not mean_kl <= kl_limit else None
        figures, stepped = self._sums[: len(FIGURES)], self._sums[-2:-1]
        return UpdateStats(torch.cat((figures / stepped, taken - stepped)), taken, epochs, stop_kl)

    def minibatch(self, data: Sequence[Tensor], rows: Tensor, coefs: Coefficients) -> None:
        """One step on the rows [B] of `data`."""
        self._minibatch(*self._arguments(data, rows, coefs))

    def fill(self, batch: Batch) -> tuple[Tensor, ...]:
        """Lay `batch` out for `minibatch`."""
        if self._rows is None:
            self._rows = Rows(batch)
        return self._rows.fill(batch)

    def _arguments(self, data: Sequence[Tensor], rows: Tensor, coefs: Coefficients) -> list[Tensor]:
        state = (self.parameters.vector, *self.adam, self._sums, self._last)
        return [*state, self._limit, rows, *coefs, *self._fixed.values(), *data]

    def _minibatch_eagerly(self, *tensors: Tensor) -> None:
        """One minibatch as a function of `_arguments`, which writes into the first seven of them.

        The step is left out where the gradient is not finite, and where the KL is not within its limit.
        """
        assert self._rows is not None
        vector, mean, square, left1, left2, sums, last, limit, rows, *rest = tensors
        n = len(Coefficients._fields)
        coefs, fixed, data = Coefficients(*rest[:n]), rest[n : n + len(self._fixed)], rest[n + len(self._fixed) :]
        batch = self._rows.take(data, rows)
        if self.normalize == "minibatch":
            batch = batch._replace(advantages=normalize_advantages(batch.advantages, batch.valid))
        with torch.enable_grad():
            leaves = [view.detach().requires_grad_() for view in self.parameters.views(vector)]
            tensors_by_name = dict(zip(self._trained, leaves, strict=True)) | dict(zip(self._fixed, fixed, strict=True))
            params, values = torch.func.functional_call(self.policy, tensors_by_name, (batch.obs,))
            now = self.policy.judge(params, values, batch.actions, batch.params)
            loss, diagnostics = ppo_loss(
                now.logprobs, now.entropy, now.values, now.exact_kl, batch, coefs, self.value_clip
            )
            gradients = torch.autograd.grad(loss, leaves, materialize_grads=True)
        gradient, norm = clip_by_norm(self.parameters.flatten(gradients), coefs.max_grad_norm)
        figures = torch.cat((diagnostics, norm.unsqueeze(0)))
        kl = diagnostics[_KL]
        take = norm.isfinite() & ((kl <= limit) | (limit == math.inf))
        new, adam = adam_step(
            vector, gradient, AdamState(mean, square, left1, left2), coefs.learning_rate, self.adam_eps
        )
        for old, value in zip((vector, mean, square, left1, left2), (new, *adam), strict=True):
            old.copy_(torch.where(take, value, old))
        counted = torch.cat((torch.where(take, figures, 0.0), take.to(kl.dtype).unsqueeze(0), kl.unsqueeze(0)))
        sums.add_(counted)
        last.copy_(figures)
