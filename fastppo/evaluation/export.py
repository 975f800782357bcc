"""`fastppo export`: a policy as one file that needs no fastppo: raw observations in, the environment's actions out."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.evaluation.saved_policy import load_policy
from fastppo.policies.policy import Policy
from fastppo.spaces import ActionSpec

Format = Literal["onnx", "pt2"]


class Deployed(nn.Module):
    """A policy's most probable actions, with its normaliser before and the action space after."""

    def __init__(self, policy: Policy, action: ActionSpec) -> None:
        """Wrap `policy`, whose actions belong to `action`."""
        super().__init__()
        self.policy = policy
        self._action = action
        self._dtype: torch.dtype = getattr(torch, action.dtype)
        low, high = action.bounds(torch.device("cpu")) if action.kind == "box" else (torch.zeros(0), torch.zeros(0))
        self.low: Tensor
        self.high: Tensor
        self.start: Tensor
        self.register_buffer("low", low)
        self.register_buffer("high", high)
        self.register_buffer("start", torch.tensor(action.start, dtype=torch.int64))

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """For raw obs [B, *obs]: the environment's actions [B, *action], the distribution's parameters, and values."""
        params, values, _ = self.policy(obs)
        actions = self.policy.distribution.mode(params)
        if self._action.kind == "box":
            actions = torch.minimum(torch.maximum(actions, self.low), self.high)
        elif any(self._action.start):
            actions = actions + (self.start[0] if self._action.kind == "discrete" else self.start)
        return actions.reshape(-1, *self._action.shape).to(self._dtype), params, values


def export(run: Path, output: Path | None, kind: Format, policy: nn.Module | None = None) -> Path:
    """Write the policy of `run` to `output` (RUN/policy.onnx or .pt2); returns where.

    Args:
        run: the run folder, or one of its checkpoints.
        output: the file; None: beside the model.
        kind: ONNX, or torch.export's own.
        policy: your own network, where the run trained one.

    Raises:
        CheckpointError: there is no model.
        ConfigError: it can't be written or exported, or a library is missing.
    """
    saved = load_policy(run, policy)
    module = Deployed(saved.policy, saved.spec.action).eval()
    example = saved.spec.obs.blank(2)
    path = output or run / f"policy.{kind}"
    if not path.parent.is_dir():
        raise ConfigError(f"export: {path} can't be written (there is no folder {path.parent}).")
    batch = torch.export.Dim("batch", min=1)
    if kind == "onnx":
        _check_onnx()
    temporary = path.with_name(f".{path.name}.tmp.{kind}")  # the writers go by the ending
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters' own, about themselves
            program = torch.export.export(module, (example,), dynamic_shapes=({0: batch},))
            if kind == "pt2":
                torch.export.save(program, temporary)
            else:
                names = ["actions", "params", "values"]
                onnx = torch.onnx.export(program, input_names=["obs"], output_names=names, verbose=False)
                assert onnx is not None
                onnx.save(str(temporary))
        temporary.replace(path)
    except OSError as error:
        raise ConfigError(f"export: {path} can't be written ({error.strerror or error}).") from None
    except Exception as error:  # torch has many kinds for what it can't trace
        why = str(error).strip().splitlines()[0]
        raise ConfigError(f"export: this network can't be traced ({type(error).__name__}: {why}).") from None
    finally:
        log.setLevel(level)
        temporary.unlink(missing_ok=True)
    return path


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}: pip install 'fastppo[export]'.") from None
