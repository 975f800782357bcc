"""What an iteration takes at least, beside what a card can do: operations of matrix products, bytes, launches."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fastppo import Trainer
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.update_step import LossGradient

Figures = dict[str, Any]


class Card(NamedTuple):
    """Peaks of a GPU, per second; products of dense matrices."""

    bytes: float
    tf32: float
    bf16: float


# By part of the name that torch gives, the first that fits. Source: NVIDIA's data sheets, "NVIDIA H100 Tensor Core GPU"
# (SXM, NVL; PCIe from its first edition), "NVIDIA H200 Tensor Core GPU", "NVIDIA A100 Tensor Core GPU"; their figures
# for TF32 and BF16 "with sparsity" are halved
CARDS = {
    "H100 PCIe": Card(2.0e12, 378e12, 756e12),
    "H100 NVL": Card(3.9e12, 417e12, 835e12),
    "H100 80GB HBM3": Card(3.35e12, 494e12, 989e12),
    "H200 NVL": Card(4.8e12, 417e12, 835e12),
    "H200": Card(4.8e12, 494e12, 989e12),
    "A100-SXM4-80GB": Card(2.039e12, 156e12, 312e12),
    "A100 80GB PCIe": Card(1.935e12, 156e12, 312e12),
    "A100-SXM4-40GB": Card(1.555e12, 156e12, 312e12),
    "A100-PCIE-40GB": Card(1.555e12, 156e12, 312e12),
}


def card_of(name: str) -> Card | None:
    """Return the peaks of the GPU that torch calls `name`; None: not known."""
    return next((card for part, card in CARDS.items() if part in name), None)


class Count(TorchDispatchMode):
    """Counts what runs eagerly while the mode is active.

    Attributes:
        flops: of matrix products and convolutions; a multiplication and an addition are two.
        launches: operations that compute; views do not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = self.launches = 0

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        if (formula := flop_registry.get(func._overloadpacket)) is not None:
            self.flops += formula(*args, **(kwargs or {}), out_val=out)
        self.launches += not func.is_view
        return out


def counted(call: Callable[[], Any]) -> Count:
    """Return what `call` ran."""
    with Count() as count:
        call()
    return count


def minibatch_work(trainer: Trainer) -> Figures:
    """Return FLOPs of the gradient of a minibatch, and the bytes that any implementation of its step must move.

    The rows are read once; parameters and Adam's two moments are read and written.
    """
    update, batch = trainer.update, trainer.rollout.batch()
    update.prepare(len(batch.logprobs), float("inf"))
    fields = [x for x in batch if isinstance(x, Tensor)]
    rows = sum(x.nbytes for x in (*fields, *batch.states)) / update.shuffle.n_minibatches
    # in torch, whatever the update runs in
    scale, length = update.normalize == "minibatch", update.shuffle.segment_length
    gradient = LossGradient(
        update.policy, update.parameters, update.loss, scale_advantages=scale, segment_length=length
    )
    minibatch = Minibatch(update.scales(batch)[0, 0], update.shuffle.orders[0, 0], gradient.pack(batch))
    params = update.parameters.vector
    flops = counted(lambda: gradient(params, minibatch, trainer.learner.coefs, gradient.constants)).flops
    return {"flops": flops, "bytes": rows + 6 * params.nbytes}


def iteration_work(trainer: Trainer) -> Figures:
    """Return FLOPs of the matrix products of an iteration, and the bytes that any implementation must move.

    Rollout: its tensors are written once, observations and noise read once; each step reads the parameters, and reads
    and writes the state of tensor environments. Advantages: 22 bytes per cell. Update: see `minibatch_work`. What a
    cache keeps from step to step counts as moved.
    """
    r, policy, update = trainer.rollout, trainer.policy, trainer.update
    n_steps, n_envs = r.rewards.shape
    state, starts = tuple(x[0] for x in r.states), None if r.starts is None else r.starts[0]
    act = counted(lambda: policy.act(r.obs[0], r.noise[0], state, starts)).flops
    minibatch, n_minibatches = minibatch_work(trainer), update.shuffle.update_epochs * update.shuffle.n_minibatches
    written = sum(x.nbytes for x in (*r.tensors().values(), r.obs, r.noise))
    env_state = sum(x.nbytes for x in (trainer.env.capturable_state or {}).values())
    rollout = written + n_steps * (update.parameters.vector.nbytes + 2 * env_state)
    return {
        "flops": n_steps * act + n_minibatches * minibatch["flops"],
        "bytes": rollout + 22 * n_steps * n_envs + n_minibatches * minibatch["bytes"],
    }


def roofline(work: Figures, seconds: float, card: Card | None, precision: str) -> Figures:
    """Return `work` done in `seconds` as figures of a row; on a known card with the shares of its peaks."""
    row = {"GFLOP": work["flops"] / 1e9, "GB": work["bytes"] / 1e9}
    if card is not None:
        peak = card.bf16 if precision == "bf16" else card.tf32
        row |= {
            "share of FLOPs": work["flops"] / seconds / peak,
            "share of bytes": work["bytes"] / seconds / card.bytes,
        }
    return row


def launches(trainer: Trainer) -> Figures:
    """Return operations per step of the rollout and per minibatch, run eagerly; for a run with compile off."""
    learner, update = trainer.learner, trainer.update
    learner.anneal(0.0)
    trainer.collect.prepare()
    rollout = counted(trainer.collect.roll).launches
    learned = counted(lambda: update.run(trainer.rollout.batch(), learner.coefs, watch=False)).launches
    steps, minibatches = len(trainer.rollout.rewards), update.shuffle.update_epochs * update.shuffle.n_minibatches
    return {"launches per step": rollout / steps, "launches per minibatch": learned / minibatches}


def on_the_gpu(trainer: Trainer) -> Figures:
    """Return the GPU's operations in an iteration and the share of the time in which one runs, by torch's profiler."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    def iteration() -> float:
        begin = time.perf_counter()
        trainer.learner.anneal(0.0)
        trainer.collect()
        trainer.learner(watch=False)
        torch.cuda.synchronize()
        return time.perf_counter() - begin

    seconds = iteration()  # without the profiler, which slows the host
    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        iteration()
    events = [event for event in profiler.events() if event.device_type == DeviceType.CUDA]
    busy = sum(event.time_range.elapsed_us() for event in events) / 1e6
    return {"GPU operations": len(events), "GPU busy": busy / seconds}
