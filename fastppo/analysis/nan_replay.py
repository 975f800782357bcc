"""Runs what a capsule holds again, on the CPU, and says where the first number that is none appears."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastppo.errors import CheckpointError
from fastppo.evaluation.saved_policy import load_policy
from fastppo.functional.losses import PPOLoss, advantage_scale, normalize_advantages
from fastppo.runs.nan_dump import read_nan_dump


class TensorReport(NamedTuple):
    """One tensor on the way from rows to gradients.

    Attributes:
        name: what it is.
        shape: of it.
        bad: how many of its numbers are not finite.
        first: index of the first of them.
        largest: magnitude of its largest finite number.
    """

    name: str
    shape: tuple[int, ...]
    bad: int
    first: tuple[int, ...]
    largest: float


class Replay(NamedTuple):
    """What was found.

    Attributes:
        minibatches: looked at.
        epoch: of the first minibatch with a bad tensor, counted from 1.
        minibatch: its number in that epoch, counted from 1.
        findings: its tensors, in the order in which they are computed; empty: all numbers of all minibatches are
            finite here.
    """

    minibatches: int
    epoch: int
    minibatch: int
    findings: list[TensorReport]

    @property
    def first_bad(self) -> TensorReport | None:
        """The first tensor that is not finite."""
        return next((finding for finding in self.findings if finding.bad), None)


def replay(capsule: Path | str, policy: nn.Module | None = None) -> Replay:
    """Compute loss and gradient of each minibatch of a capsule, up to the first with a number that is not finite.

    Args:
        capsule: the folder.
        policy: your own network, if the run trained one.

    Raises:
        CheckpointError: no capsule, or one that can't be understood.
    """
    folder = Path(capsule)
    held = read_nan_dump(folder)
    judge = load_policy(folder, policy).policy
    looked = 0
    try:
        for epoch, order in enumerate(held.orders):
            for i, rows in enumerate(order):
                looked += 1
                findings = [_look(name, x) for name, x in _computed(judge, held, rows)]
                if any(finding.bad for finding in findings):
                    return Replay(looked, epoch + 1, i + 1, findings)
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be replayed ({type(error).__name__}: {error}).") from None
    return Replay(looked, 0, 0, [])


def _computed(policy: Any, held: Any, rows: Tensor) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401 - a Policy, a NanDump
    """Every tensor of a minibatch's loss and gradient, in order."""
    batch = type(held.batch)(*(None if x is None else x[rows] for x in held.batch))
    for name, x in batch._asdict().items():
        if x is not None:
            yield f"batch: {name}", x
    for name, parameter in policy.named_parameters():
        yield f"parameter: {name}", parameter.detach()
    if held.metadata["normalize"] == "minibatch":
        mean, divisor = advantage_scale(batch.advantages, batch.valid, None)
        batch = batch._replace(advantages=(batch.advantages - mean) / divisor)
    elif held.metadata["normalize"] == "batch":
        whole = normalize_advantages(held.batch.advantages, held.batch.valid, None)
        batch = batch._replace(advantages=whole[rows])
    yield "normalised advantages", batch.advantages
    seen: list[tuple[str, Tensor]] = []

    def note(name: str, module: nn.Module, inputs: object, output: object) -> None:
        for k, x in enumerate(output if isinstance(output, tuple) else (output,)):
            if isinstance(x, Tensor):
                seen.append((f"layer: {name}{f'[{k}]' if isinstance(output, tuple) else ''}", x.detach()))

    hooks = [
        module.register_forward_hook(functools.partial(note, name)) for name, module in policy.named_modules() if name
    ]
    try:
        with torch.enable_grad():
            output = policy(batch.obs)
            yield from seen
            yield "distribution parameters", output.params.detach()
            yield "values", output.values.detach()
            now = policy.evaluate_actions(output, batch.actions, batch.params)
            yield "log-probabilities", now.logprobs.detach()
            yield "ratios", (now.logprobs.detach() - batch.logprobs).exp()
            yield "entropy", now.entropy.detach()
            loss, _ = PPOLoss(held.metadata["value_clip"])(now, batch, held.coefs)
            yield "loss", loss.detach()
            trained = {name: p for name, p in policy.named_parameters() if p.requires_grad}
            gradients = torch.autograd.grad(loss, list(trained.values()), materialize_grads=True)
    finally:
        for hook in hooks:
            hook.remove()
    for name, gradient in zip(trained, gradients, strict=True):
        yield f"gradient: {name}", gradient
    yield "gradient norm", torch.stack([g.norm() for g in gradients]).norm()


def _look(name: str, x: Tensor) -> TensorReport:
    if not x.is_floating_point():
        return TensorReport(name, tuple(x.shape), 0, (), float(x.abs().max()) if x.numel() else 0.0)
    bad = ~x.isfinite()
    first = tuple(bad.nonzero()[0].tolist()) if bad.any() else ()
    finite = x[~bad]
    return TensorReport(
        name, tuple(x.shape), int(bad.sum()), first, float(finite.abs().max()) if finite.numel() else 0.0
    )
