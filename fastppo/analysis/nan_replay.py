"""Replay of a NaN dump on the CPU: find the first tensor of the loss and its gradient that is not finite."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.errors import CheckpointError
from fastppo.evaluation.saved_policy import load_policy
from fastppo.functional.losses import Batch, PPOLoss, advantage_scale, normalize_advantages
from fastppo.policies.policy import Policy
from fastppo.runs.nan_dump import NanDump, read_nan_dump

_Named = tuple[str, Tensor]


class TensorReport(NamedTuple):
    """One tensor of a minibatch's forward or backward pass.

    Attributes:
        name: description of the tensor.
        shape: its shape.
        bad: count of its NaNs and infinities.
        first: index of the first NaN or infinity; () if there is none.
        largest: largest magnitude of its finite values.
    """

    name: str
    shape: tuple[int, ...]
    bad: int
    first: tuple[int, ...]
    largest: float


class Replay(NamedTuple):
    """Result of a replay.

    Attributes:
        minibatches: count of replayed minibatches.
        epoch: epoch of the first minibatch with a NaN or infinity, counted from 1; 0 if there is none.
        minibatch: its number in that epoch, counted from 1; 0 if there is none.
        tensors: its tensors in order of computation; empty if all minibatches are finite on this machine.
    """

    minibatches: int
    epoch: int
    minibatch: int
    tensors: list[TensorReport]

    @property
    def first_bad(self) -> TensorReport | None:
        """The first tensor that is not finite."""
        return next((tensor for tensor in self.tensors if tensor.bad), None)


def replay(capsule: Path | str, policy: nn.Module | None = None) -> Replay:
    """Compute loss and gradient of each minibatch of a dump, up to the first with a NaN or infinity.

    Args:
        capsule: folder of the dump.
        policy: network of the run, if the run used a custom one.

    Raises:
        CheckpointError: the folder is not a dump, or can't be replayed.
    """
    folder = Path(capsule)
    dump = read_nan_dump(folder)
    loaded = load_policy(folder, policy).policy
    replayed = 0
    try:
        for epoch, order in enumerate(dump.orders):
            for i, rows in enumerate(order):
                replayed += 1
                tensors = [_inspect(name, x) for name, x in _minibatch_tensors(loaded, dump, rows)]
                if any(tensor.bad for tensor in tensors):
                    return Replay(replayed, epoch + 1, i + 1, tensors)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be replayed ({type(error).__name__}: {error}).") from None
    return Replay(replayed, 0, 0, [])


def _minibatch_tensors(policy: Policy, dump: NanDump, rows: Tensor) -> Iterator[_Named]:
    """Yield every tensor of a minibatch's loss and gradient, in order of computation."""
    batch = dump.batch.take(rows, dump.metadata.get("segment_length", 1))
    for name, x in batch._asdict().items():
        if isinstance(x, Tensor):
            yield f"batch: {name}", x
    for i, x in enumerate(batch.states):
        yield f"batch: state {i}", x
    for name, parameter in policy.named_parameters():
        yield f"parameter: {name}", parameter.detach()
    batch = batch._replace(advantages=_normalized_advantages(batch, dump, rows))
    yield "normalised advantages", batch.advantages
    layers: list[_Named] = []
    with torch.enable_grad(), _layer_outputs(policy, layers):
        output = policy(batch.obs, batch.states, batch.starts)
        yield from layers
        yield "distribution parameters", output.params.detach()
        yield "values", output.values.detach()
        objective = PPOLoss(dump.metadata["value_clip"], dump.metadata.get("objective", "clip"))
        now = policy.evaluate_actions(output, batch.actions, batch.params, kl_gradient=objective.penalizes_kl)
        yield "log-probabilities", now.logprobs.detach()
        yield "ratios", (now.logprobs.detach() - batch.logprobs).exp()
        yield "entropy", now.entropy.detach()
        if objective.penalizes_kl:
            yield "KL", now.exact_kl.detach()
        loss, _ = objective(now, batch, dump.coefs)
        yield "loss", loss.detach()
        trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
        gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    for name, gradient in zip(trained, gradients, strict=True):
        yield f"gradient: {name}", gradient
    yield "gradient norm", torch.stack([g.norm() for g in gradients]).norm()


def _normalized_advantages(batch: Batch, dump: NanDump, rows: Tensor) -> Tensor:
    """Return the minibatch's advantages as the update of the run normalised them."""
    if dump.metadata["normalize"] == "minibatch":
        mean, divisor = advantage_scale(batch.advantages, batch.valid, None)
        return (batch.advantages - mean) / divisor
    if dump.metadata["normalize"] == "batch":
        return normalize_advantages(dump.batch.advantages, dump.batch.valid, None)[rows]
    return batch.advantages


@contextlib.contextmanager
def _layer_outputs(policy: nn.Module, outputs: list[_Named]) -> Iterator[None]:
    """Append the output of every module that runs within the context to `outputs`."""

    def append(name: str, module: nn.Module, inputs: object, output: object) -> None:
        for k, x in enumerate(output if isinstance(output, tuple) else (output,)):
            if isinstance(x, Tensor):
                outputs.append((f"layer: {name}{f'[{k}]' if isinstance(output, tuple) else ''}", x.detach()))

    hooks = [
        module.register_forward_hook(functools.partial(append, name)) for name, module in policy.named_modules() if name
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _inspect(name: str, x: Tensor) -> TensorReport:
    """Count the NaNs and infinities of a tensor."""
    bad = ~x.isfinite()
    first = tuple(bad.nonzero()[0].tolist()) if bad.any() else ()
    finite = x[~bad].double()  # a mask has no magnitude
    largest = float(finite.abs().max()) if finite.numel() else 0.0
    return TensorReport(name, tuple(x.shape), int(bad.sum()), first, largest)
