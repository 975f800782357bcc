"""fastppo: a vectorised, high-throughput PPO trainer in PyTorch."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fastppo.runtime.sharing import bound_spinning

if TYPE_CHECKING:
    from fastppo.config import Config as Config
    from fastppo.envs.tensor.simulator import SimulatorEnv as SimulatorEnv
    from fastppo.errors import CaptureError as CaptureError
    from fastppo.errors import CheckpointError as CheckpointError
    from fastppo.errors import ConfigError as ConfigError
    from fastppo.errors import EnvError as EnvError
    from fastppo.errors import FastPPOError as FastPPOError
    from fastppo.evaluation.episodes import Evaluation as Evaluation
    from fastppo.evaluation.saved_policy import SavedPolicy as SavedPolicy
    from fastppo.evaluation.saved_policy import evaluate as evaluate
    from fastppo.evaluation.saved_policy import load_policy as load_policy
    from fastppo.monitoring.stats import Stats as Stats
    from fastppo.resume_run import resume as resume
    from fastppo.runs.result import Result as Result
    from fastppo.trainer import Trainer as Trainer

__version__ = "0.1.0"

bound_spinning()  # before anything imports torch

# Imported on first use: torch takes seconds, and `fastppo --help` and worker processes have no use for it
_HOMES = {
    "Config": "config",
    "FastPPOError": "errors",
    "ConfigError": "errors",
    "EnvError": "errors",
    "CheckpointError": "errors",
    "CaptureError": "errors",
    "SimulatorEnv": "envs.tensor.simulator",
    "Trainer": "trainer",
    "Result": "runs.result",
    "Stats": "monitoring.stats",
    "load_policy": "evaluation.saved_policy",
    "evaluate": "evaluation.saved_policy",
    "SavedPolicy": "evaluation.saved_policy",
    "Evaluation": "evaluation.episodes",
    "resume": "resume_run",
}
__all__ = list(_HOMES)


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the name stands for
    if name in _HOMES:
        return getattr(importlib.import_module(f"fastppo.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'fastppo' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
