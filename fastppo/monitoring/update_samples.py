"""What plots of ratios and of advantages, and histograms, are drawn from: a look into the update of a few iterations.

A few hundred rows of the rollout are judged by the policy before the first epoch and after each, which changes nothing
that is learned. A recorded update can't be looked into: those iterations run its functions one by one instead.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import Tensor

from fastppo.functional.losses import Coefficients
from fastppo.policies.policy import Policy
from fastppo.ppo.rollout import Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime.seeding import preserve_global_random_state

_Array = np.ndarray[Any, Any]

ROWS = 512  # of a rollout
_STEPS = 2048  # of the trajectory
COEFS = ("clip_coef", "gamma", "gae_lambda")
TRAJECTORY = ("rewards", "values", "next_values", "terminated", "done", "advantages")


@dataclasses.dataclass(frozen=True)
class UpdateSample:
    """One update, looked into; of several processes the first one's rows.

    Attributes:
        iteration: counted from 1.
        coefs: clip_coef, gamma and gae_lambda of this iteration.
        ratios: [E + 1, K] of K rows, before the first epoch and after each of the E that were run.
        advantages: [K], normalised over the rollout where the update normalises.
        trajectory: TRAJECTORY of one environment, [T] each; rewards as they are learned from.
        histograms: values by tag, for TensorBoard; empty unless they were asked for.
    """

    iteration: int
    coefs: dict[str, float]
    ratios: _Array
    advantages: _Array
    trajectory: dict[str, _Array]
    histograms: dict[str, _Array] = dataclasses.field(default_factory=dict)

    @property
    def first_ratio_error(self) -> float:
        """How far from 1 a ratio was before the first step; 0 but for rounding where all is right."""
        return float(np.abs(self.ratios[0] - 1).max(initial=0.0))

    def write(self, folder: Path) -> None:
        """One file in `folder`, whole or not at all; histograms are left out."""
        folder.mkdir(exist_ok=True)
        about = {"iteration": self.iteration, "coefs": self.coefs}
        arrays = {f"trajectory.{name}": x for name, x in self.trajectory.items()}
        arrays |= {"ratios": self.ratios, "advantages": self.advantages}
        path = folder / f"{self.iteration:09d}.safetensors"
        temporary = path.with_suffix(".tmp")
        plain = {name: np.ascontiguousarray(x, np.float32) for name, x in arrays.items()}
        temporary.write_bytes(save(plain, {"sample": json.dumps(about)}))  # save_file would give the owner alone access
        temporary.replace(path)


def read_samples(folder: Path) -> list[UpdateSample]:
    """The samples in `folder`, earliest first; files that are damaged are passed over."""
    found = []
    for path in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(path, "np") as file:
                about = json.loads(file.metadata()["sample"])
                arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
            found.append(
                UpdateSample(
                    iteration=int(about["iteration"]),
                    coefs={name: float(about["coefs"][name]) for name in COEFS},
                    ratios=arrays["ratios"],
                    advantages=arrays["advantages"],
                    trajectory={name: arrays[f"trajectory.{name}"] for name in TRAJECTORY},
                )
            )
        except (SafetensorError, OSError, ValueError, KeyError, TypeError):
            continue
    return found


def forget_samples(folder: Path, after: int) -> None:
    """Remove the samples of iterations after `after`, which a resumed run does again."""
    for path in folder.glob("*.safetensors"):
        if path.stem.isdecimal() and int(path.stem) > after:
            path.unlink()


class UpdateSampler:
    """Looks into the updates of every so many iterations; `look` goes to the learner, `sample` gives what was seen."""

    def __init__(self, rollout: Rollout, update: PPOUpdate, *, every: int, histograms: bool) -> None:
        """Look into `update`, which learns from `rollout`.

        Args:
            rollout: what is learned from.
            update: the epochs.
            every: iterations, the first of which is looked into; 0: none.
            histograms: also of weights, gradients, actions and ratios.
        """
        self._rollout, self._update, self._every, self._histograms = rollout, update, every, histograms
        n = rollout.rewards.numel()
        self._rows = torch.linspace(0, n - 1, min(n, ROWS), device=rollout.rewards.device).long()
        self._seen: list[Tensor] = []

    def due(self, iteration: int) -> bool:
        """Whether to look into `iteration`, counted from 1."""
        return self._every > 0 and (iteration - 1) % self._every == 0

    @torch.no_grad()
    def look(self) -> None:
        """Judge the rows by the policy as it is now."""
        policy, batch, rows = self._update.policy, self._rollout.batch(), self._rows
        with _unchanged(policy):
            params, _ = policy(batch.obs[rows])
        logprobs = policy.distribution.log_prob(params, batch.actions[rows])
        self._seen.append(torch.exp(logprobs - batch.logprobs[rows]))

    def sample(self, iteration: int, coefs: Coefficients, rewards: Tensor) -> UpdateSample:
        """What was seen of the update that has just ended.

        Args:
            iteration: counted from 1.
            coefs: its coefficients.
            rewards: [T, N] as they were learned from.
        """
        r, rows = self._rollout, self._rows
        valid = torch.ones_like(r.done) if r.valid is None else r.valid
        kept = valid.flatten()[rows]
        advantages = r.advantages.flatten()
        if self._update.normalize != "off":
            real = advantages[valid.flatten()]
            advantages = (advantages - real.mean()) / (real.std(correction=0) + 1e-8)
        ratios = torch.stack(self._seen)
        self._seen = []
        trajectory = {name: rewards if name == "rewards" else getattr(r, name) for name in TRAJECTORY}
        return UpdateSample(
            iteration=iteration,
            coefs={name: getattr(coefs, name).item() for name in COEFS},
            ratios=_numpy(ratios[:, kept]),
            advantages=_numpy(advantages[rows][kept]),
            trajectory={name: _numpy(_column(x)[_column(valid)]) for name, x in trajectory.items()},
            histograms=self._measured(ratios[-1][kept], valid, coefs) if self._histograms else {},
        )

    def _measured(self, ratios: Tensor, valid: Tensor, coefs: Coefficients) -> dict[str, _Array]:
        """Weights and gradients by the parameter's name, actions and ratios."""
        update, actions = self._update, self._rollout.actions[valid]
        found = {"actions": actions if actions.dtype != torch.bool else actions.float(), "ratios": ratios}
        with _unchanged(update.policy):
            gradient = update.gradient(self._rollout.batch(), coefs)
        for kind, flat in (("weights", update.parameters.vector), ("gradients", gradient)):
            views = update.parameters.views(flat)
            found |= {f"{kind}/{name}": view for name, view in zip(update.trained, views, strict=True)}
        return {f"histograms/{name}": _numpy(x).reshape(-1) for name, x in found.items()}


def _column(x: Tensor) -> Tensor:
    """The first environment's steps of [T, N], as many as are kept."""
    return x[:_STEPS, 0]


@contextlib.contextmanager
def _unchanged(policy: Policy) -> Iterator[None]:
    """What a user's network draws or counts as it runs is as if it hadn't."""
    buffers = [(buffer, buffer.clone()) for buffer in policy.network.buffers()]
    with preserve_global_random_state():
        yield
    for buffer, before in buffers:
        buffer.copy_(before)


def _numpy(x: Tensor) -> _Array:
    array: _Array = x.detach().numpy(force=True)
    return array
