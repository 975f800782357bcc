"""Export of a policy to one file that needs no fastppo: raw observations in, the environment's actions out."""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError, first_line
from fastppo.evaluation.saved_policy import load_policy
from fastppo.policies.policy import Policy
from fastppo.runtime.files import replace_file
from fastppo.spaces.actions import ActionSpec, ToEnv

Format = Literal["onnx", "pt2"]


class ExportedPolicy(nn.Module):
    """A policy's most probable actions, with observation normaliser and conversion to the action space."""

    def __init__(self, policy: Policy, action: ActionSpec) -> None:
        """Wrap `policy`, whose actions belong to `action`."""
        super().__init__()
        self.policy = policy
        self._action = action
        self._dtype: torch.dtype = getattr(torch, action.dtype)
        self.to_env = ToEnv(action)

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the environment's actions [B, *action], parameters [B, P] and values [B] for raw obs [B, *obs]."""
        params, values, _ = self.policy(obs)
        actions = self.to_env(self.policy.distribution.mode(params))
        return actions.reshape(-1, *self._action.shape).to(self._dtype), params, values


def export(run: Path | str, output: Path | str | None, kind: Format, policy: nn.Module | None = None) -> Path:
    """Write the policy of `run` to one file and return its path.

    Args:
        run: the run folder, or one of its checkpoints.
        output: the file; None: RUN/policy.onnx or RUN/policy.pt2.
        kind: "onnx", or "pt2" for torch.export's format.
        policy: your own network; needed if the run trained one.

    Raises:
        CheckpointError: there is no saved model.
        ConfigError: the network can't be exported, the file can't be written, or a library is missing.
    """
    saved = load_policy(run, policy)
    module = ExportedPolicy(saved.policy, saved.spec.action).eval()
    path = Path(output or Path(run) / f"policy.{kind}")
    if not path.parent.is_dir():
        raise ConfigError(f"export: {path} can't be written (there is no folder {path.parent}).")
    if kind == "onnx":
        _check_onnx()
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own internals
            data = _traced(module, saved.spec.obs.blank(2), kind)
        replace_file(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise ConfigError(f"export: {path} can't be written ({error.strerror or error}).") from None
    except Exception as error:  # torch has many classes for what it can't trace
        raise ConfigError(
            f"export: this network can't be traced ({type(error).__name__}: {first_line(error)})."
        ) from None
    finally:
        log.setLevel(level)
    return path


def _traced(module: nn.Module, example: Tensor, kind: Format) -> bytes:
    """Trace `module` for any batch size; return the content of the file."""
    program = torch.export.export(module, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},))
    if kind == "pt2":
        file = io.BytesIO()
        torch.export.save(program, file)
        return file.getvalue()
    names = ["actions", "params", "values"]
    onnx = torch.onnx.export(program, input_names=["obs"], output_names=names, verbose=False)
    assert onnx is not None
    return bytes(onnx.model_proto.SerializeToString())


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}: pip install 'fastppo[export]'.") from None
