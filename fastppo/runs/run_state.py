"""The state of a run: what its checkpoints hold and a resume restores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import nn

from fastppo.config import Config
from fastppo.envs.vec_env import VecEnv
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runtime.distributed import World


class Part(Protocol):
    """A part of a trainer whose state is saved and restored."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state by name."""

    def load_state_dict(self, saved: Any) -> Any:  # noqa: ANN401 - a mapping; modules return something
        """Restore in place from `state_dict()`."""


@dataclasses.dataclass
class Progress:
    """The progress of a run.

    Attributes:
        iteration: completed iterations.
        seconds: seconds of training.
        best: best mean return of an evaluation; None before the first.
        paused_seconds: seconds of evaluations, videos and the caller's own code between iterations.
    """

    iteration: int = 0
    seconds: float = 0.0
    best: float | None = None
    paused_seconds: float = 0.0

    def state_dict(self) -> dict[str, Any]:
        """Return the fields by name."""
        return dataclasses.asdict(self)

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Restore in place from `state_dict()`."""
        self.iteration, self.seconds = int(saved["iteration"]), float(saved["seconds"])
        self.best = None if saved["best"] is None else float(saved["best"])
        self.paused_seconds = float(saved.get("paused_seconds", 0.0))  # absent in earlier checkpoints


class RunState(NamedTuple):
    """All that a checkpoint holds of one process of a run.

    Attributes:
        spec: rebuilds the policy.
        models: modules of the model file by name: policy, and normaliser of rewards and RND if there are any.
        parts: all other parts by name, except the environments; "update", "progress", "metrics", "log" and "curiosity"
            are shared by all processes, the rest belongs to one.
        env: the environments.
        metadata: description of the run, as `run_metadata` returns it.
    """

    spec: PolicySpec
    models: Mapping[str, nn.Module]
    parts: Mapping[str, Part]
    env: VecEnv
    metadata: Mapping[str, Any]


def run_metadata(c: Config, env: VecEnv, world: World, versions: Mapping[str, str], machine: str) -> dict[str, Any]:
    """Return the description of a run that checkpoints store and `restore` compares."""
    return {
        "config": c.to_dict(),
        "world_size": world.size,
        "way": env.resume_support.way,
        "versions": dict(versions),
        "machine": machine,
    }
