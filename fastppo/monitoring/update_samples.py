"""Samples of single updates, for plots of ratios and advantages, and for histograms.

In a sampled iteration, the policy evaluates a few hundred rows of the rollout before the first epoch and after each
one, which doesn't affect training. Each epoch is a graph of its own, so captured updates are sampled between replays.
For a policy with recurrent weights, the gradient of one more minibatch shows whether they learn.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fastppo.ppo.minibatches import sequence_rows
from fastppo.runtime.files import replace_file
from fastppo.runtime.seeding import preserve_global_random_state

if TYPE_CHECKING:  # as in sinks/jsonl.py
    from fastppo.functional.losses import Coefficients
    from fastppo.policies.policy import Policy
    from fastppo.ppo.rollout import Rollout
    from fastppo.ppo.update import PPOUpdate

_Array = np.ndarray[Any, Any]

ROWS = 512  # rows of a rollout in a sample, at most
_STEPS = 2048  # steps of the trajectory in a sample, at most
COEFS = ("clip_coef", "gamma", "gae_lambda")
TRAJECTORY = ("rewards", "values", "next_values", "terminated", "done", "advantages")


@dataclasses.dataclass(frozen=True)
class UpdateSample:
    """A sample of one update; with several processes, of rank 0's rows.

    Attributes:
        iteration: counted from 1.
        coefs: clip_coef, gamma and gae_lambda of this iteration.
        ratios: [E + 1, K] ratios of K rows, before the first epoch and after each of the E epochs.
        advantages: [K], normalised over the rollout if the update normalises.
        trajectory: the tensors TRAJECTORY of one environment, [T] each; rewards as the update uses them.
        memory: figures of a policy with memory by TensorBoard tag; empty without memory. They are logged, not written.
        histograms: values by TensorBoard tag; empty unless histograms are on.
    """

    iteration: int
    coefs: dict[str, float]
    ratios: _Array
    advantages: _Array
    trajectory: dict[str, _Array]
    memory: dict[str, float] = dataclasses.field(default_factory=dict)
    histograms: dict[str, _Array] = dataclasses.field(default_factory=dict)

    @property
    def first_ratio_error(self) -> float:
        """Largest |ratio - 1| before the first optimiser step; 0 up to rounding in a correct update."""
        return float(np.abs(self.ratios[0] - 1).max(initial=0.0))

    def write(self, folder: Path) -> None:
        """Write the sample, without memory and histograms, to one file in `folder`."""
        folder.mkdir(exist_ok=True)
        metadata = {"sample": json.dumps({"iteration": self.iteration, "coefs": self.coefs})}
        arrays = {f"trajectory.{name}": x for name, x in self.trajectory.items()}
        arrays |= {"ratios": self.ratios, "advantages": self.advantages}
        plain = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
        data = save(plain, metadata)  # not save_file, which makes files that only their owner can read
        replace_file(folder / f"{self.iteration:09d}.safetensors", lambda temporary: temporary.write_bytes(data))


def read_samples(folder: Path) -> list[UpdateSample]:
    """Return the samples in `folder`, earliest first; damaged files are skipped."""
    samples = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                metadata = json.loads(file.metadata()["sample"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
            samples.append(
                UpdateSample(
                    iteration=int(metadata["iteration"]),
                    coefs={name: float(metadata["coefs"][name]) for name in COEFS},
                    ratios=arrays["ratios"],
                    advantages=arrays["advantages"],
                    trajectory={name: arrays[f"trajectory.{name}"] for name in TRAJECTORY},
                )
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue
    return samples


def remove_samples(folder: Path, after: int) -> None:
    """Remove the samples of iterations after `after`, which a resumed run repeats."""
    for path in folder.glob("*.safetensors"):
        if path.stem.isdecimal() and int(path.stem) > after:
            path.unlink()


def spread_rows(n: int, k: int, device: torch.device) -> Tensor:
    """Return min(n, k) evenly spaced row indices from 0 to n - 1, int64."""
    k = min(n, k)
    # in integers: a float32 linspace exceeds n - 1 above 2^24 rows
    return torch.arange(k, device=device) * (n - 1) // max(1, k - 1)


class UpdateSampler:
    """Samples the update of every N-th iteration.

    The learner calls `measure` before the first epoch and after each; `sample` then returns the result.
    """

    def __init__(self, rollout: Rollout, update: PPOUpdate, *, every: int, histograms: bool) -> None:
        """Sample `update`.

        Args:
            rollout: the data of the update.
            update: the epochs of an iteration.
            every: iterations between samples, starting with the first; 0 disables sampling.
            histograms: also collect histograms of weights, gradients, actions and ratios.
        """
        self._rollout, self._update, self._every, self._histograms = rollout, update, every, histograms
        n, length, device = rollout.rewards.numel(), update.shuffle.segment_length, rollout.rewards.device
        sequences = spread_rows(n // length, max(1, ROWS // length), device)
        self._rows = sequences if length == 1 else sequence_rows(sequences, rollout.rewards.shape[1], length)
        self._ratios: list[Tensor] = []
        trained = {id(p) for p in update.parameters.parameters}
        self._recurrences = [
            (weight, [p for p in parts if id(p) in trained])
            for weight, parts in update.policy.recurrences()
            if id(weight) in trained
        ]

    def due(self, iteration: int) -> bool:
        """Return whether to sample `iteration`, counted from 1."""
        return self._every > 0 and (iteration - 1) % self._every == 0

    @torch.no_grad()
    def measure(self) -> None:
        """Compute the ratios of the sampled rows under the current policy."""
        policy, batch = self._update.policy, self._rollout.batch().take(self._rows, self._update.shuffle.segment_length)
        with _unchanged(policy):
            params = policy(batch.obs, batch.states, batch.starts).params
        logprobs = policy.distribution.log_prob(params, batch.actions)
        self._ratios.append(torch.exp(logprobs - batch.logprobs))

    def sample(self, iteration: int, coefs: Coefficients, rewards: Tensor) -> UpdateSample:
        """Return the sample of the update that has just ended.

        Args:
            iteration: counted from 1.
            coefs: coefficients of the update.
            rewards: [T, N] rewards as the update used them.
        """
        r, rows = self._rollout, self._rows
        valid = torch.ones_like(r.done) if r.valid is None else r.valid
        kept = valid.flatten()[rows]
        advantages = r.advantages.flatten()
        if self._update.normalize != "off":
            real = advantages[valid.flatten()]
            advantages = (advantages - real.mean()) / (real.std(correction=0) + 1e-8)
        ratios = torch.stack(self._ratios)
        self._ratios = []
        trajectory = {name: rewards if name == "rewards" else getattr(r, name) for name in TRAJECTORY}
        gradient = self._first_gradient(coefs) if self._histograms or self._recurrences else None
        histograms = {}
        if self._histograms and gradient is not None:
            histograms = self._collect_histograms(ratios[-1][kept], valid, gradient)
        return UpdateSample(
            iteration=iteration,
            coefs={name: getattr(coefs, name).item() for name in COEFS},
            ratios=_numpy(ratios[:, kept]),
            advantages=_numpy(advantages[rows][kept]),
            trajectory={name: _numpy(_first_env(x)[_first_env(valid)]) for name, x in trajectory.items()},
            memory=self._measure_memory(gradient),
            histograms=histograms,
        )

    def _first_gradient(self, coefs: Coefficients) -> Tensor:
        """Return the gradient [P] of the update's first minibatch, at the parameters after the update."""
        with _unchanged(self._update.policy):
            return self._update.gradient(self._rollout.batch(), coefs)

    def _measure_memory(self, gradient: Tensor | None) -> dict[str, float]:
        """Return the root mean square of the stored states, and how much of `gradient` [P] reaches the recurrence.

        The share is |gradient of the recurrent weights| / |gradient of memory and heads|, the smaller one of actor and
        critic. It is 0 if no state passes from step to step, and falls where gates or states saturate: then the heads
        alone learn. A gradient of 0, as with a clipped value loss, has no share.
        """
        states = self._rollout.states
        if not states:
            return {}
        squares = torch.stack([x[:-1].float().square().mean() for x in states])
        figures = {"memory/state_norm": squares.mean().sqrt().item()}
        if gradient is not None:
            learned = self._update.parameters
            norms = {id(p): x.norm() for p, x in zip(learned.parameters, learned.views(gradient), strict=True)}
            shares = [
                (norms[id(weight)] / torch.stack([norms[id(p)] for p in parts]).norm()).item()
                for weight, parts in self._recurrences
            ]
            if finite := [share for share in shares if math.isfinite(share)]:
                figures["memory/gradient_share"] = min(finite)
        return figures

    def _collect_histograms(self, ratios: Tensor, valid: Tensor, gradient: Tensor) -> dict[str, _Array]:
        """Return weights and gradients by the parameter's name, actions and ratios, flat, by TensorBoard tag."""
        update, actions = self._update, self._rollout.actions[valid]
        values = {"actions": actions if actions.dtype != torch.bool else actions.float(), "ratios": ratios}
        for kind, flat in (("weights", update.parameters.vector), ("gradients", gradient)):
            views = update.parameters.views(flat)
            values |= {f"{kind}/{name}": view for name, view in zip(update.trained, views, strict=True)}
        return {f"histograms/{name}": _numpy(x).reshape(-1) for name, x in values.items()}


def _first_env(x: Tensor) -> Tensor:
    """Return the first environment's column of [T, N], at most _STEPS long."""
    return x[:_STEPS, 0]


@contextlib.contextmanager
def _unchanged(policy: Policy) -> Iterator[None]:
    """Restore random states and the network's buffers on exit; a custom network's forward pass may change both."""
    buffers = [(buffer, buffer.clone()) for buffer in policy.network.buffers()]
    with preserve_global_random_state():
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _numpy(x: Tensor) -> _Array:
    array: _Array = x.detach().numpy(force=True)
    return array
