"""The saved model: safetensors and JSON, so that loading one never runs code.

RUN/model.safetensors   network and normalisers
RUN/model.json          what rebuilds the policy around them
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fastppo.errors import CheckpointError
from fastppo.policies.build import PolicySpec
from fastppo.run_dir import write_json

FORMAT = 1


def save_model(run_dir: Path, spec: PolicySpec, parts: dict[str, nn.Module], about: dict[str, Any]) -> None:
    """Save the state of each part under its name; the last save stays whole if this one doesn't finish."""
    tensors = {
        f"{name}.{key}": value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, part in parts.items()
        for key, value in part.state_dict().items()
    }
    temporary = run_dir / ".model.safetensors.tmp"
    save_file(tensors, temporary)
    temporary.replace(run_dir / "model.safetensors")
    write_json(run_dir / "model.json", {"format": FORMAT, "policy": spec.to_dict(), **about})


def read_spec(run_dir: Path) -> tuple[PolicySpec, dict[str, Any]]:
    """What rebuilds the policy saved in `run_dir`, and all that model.json says.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    path = run_dir / "model.json"
    try:
        values = json.loads(path.read_text())
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {values['format']}; this version reads format {FORMAT}.")
        return PolicySpec.from_dict(values["policy"]), values
    except OSError as error:
        raise CheckpointError(f"{run_dir} holds no saved model ({path.name}: {error.strerror}).") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def load_model(run_dir: Path, parts: dict[str, nn.Module], optional: Sequence[str] = ()) -> None:
    """Copy the saved state of each part into it; a saved part that isn't asked for is left out.

    A part named in `optional` stays as it is where none was saved.

    Raises:
        CheckpointError: nothing to read, or what is there doesn't fit, with the differing names.
    """
    path = run_dir / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{run_dir} holds no saved model ({path.name} is missing).")
    try:
        tensors = load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} can't be read ({error}).") from None
    for name, part in parts.items():
        saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if not saved and name in optional:
            continue
        own = part.state_dict()
        differing = [f"{key} only in the {where}" for key, where in _one_sided(saved, own)]
        differing += [
            f"{key} {tuple(saved[key].shape)} against {tuple(own[key].shape)}"
            for key in saved.keys() & own.keys()
            if saved[key].shape != own[key].shape
        ]
        if differing:
            raise CheckpointError(f"{path} doesn't fit this {name}: {'; '.join(sorted(differing)[:4])}.")
        with torch.no_grad():
            for key, value in saved.items():
                own[key].copy_(value)


def _one_sided(saved: dict[str, Tensor], own: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key, "file") for key in saved.keys() - own.keys()] + [(key, "run") for key in own.keys() - saved.keys()]
