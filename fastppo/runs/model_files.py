"""A saved model: model.safetensors holds network and normalisers, model.json what rebuilds the policy."""

from __future__ import annotations

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import nn

from fastppo.errors import CheckpointError
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.run_dir import is_folder
from fastppo.runs.state_files import FORMAT, Stateful, StateSnapshot, check_format, read_json, read_tensors, snapshot
from fastppo.runtime.files import replace_file, write_synced


def model_files(state: StateSnapshot, spec: PolicySpec, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of a model by name; `metadata` is added to model.json."""
    text = json.dumps({"format": FORMAT, "policy": spec.to_dict(), **metadata}, indent=2)
    return {"model.safetensors": safetensors.torch.save(state.tensors), "model.json": text.encode()}


def save_model(run_dir: Path, spec: PolicySpec, parts: Mapping[str, Stateful], metadata: Mapping[str, Any]) -> None:
    """Save a model into the run folder; a failed save leaves the files of the last one as they are."""
    run_dir.mkdir(parents=True, exist_ok=True)  # someone may have deleted it
    for name, data in model_files(snapshot(parts), spec, metadata).items():
        replace_file(run_dir / name, functools.partial(write_synced, data=data))


def read_spec(folder: Path) -> tuple[PolicySpec, dict[str, Any]]:
    """Return the spec of the policy saved in `folder`, and the whole content of model.json.

    Raises:
        CheckpointError: there is no model.json, or it can't be read.
        ConfigError: `folder` can't be a folder.
    """
    path = folder / "model.json"
    found = is_folder(folder)
    if not found or not path.exists():
        why = f"{path.name} is missing" if found else "there is no such folder"
        raise CheckpointError(f"{folder} holds no saved model ({why}); name a run folder or one of its checkpoints.")
    values = read_json(path)
    try:
        check_format(path, values)
        return PolicySpec.from_dict(values["policy"]), values
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def weights_file(folder: Path) -> Path:
    """Return the path of the weights saved in `folder`.

    Raises:
        CheckpointError: there are none.
    """
    path = folder / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{folder} holds no saved model ({path.name} is missing).")
    return path


def load_model(folder: Path, parts: Mapping[str, nn.Module], optional: Sequence[str] = ()) -> None:
    """Copy the saved state of each part into it; saved parts that `parts` doesn't name are ignored.

    A part named in `optional` keeps its state if none was saved.

    Raises:
        CheckpointError: the weights can't be read or don't fit; names the tensors that differ.
    """
    path = weights_file(folder)
    tensors = read_tensors(path)
    for name, part in parts.items():
        saved = {key.removeprefix(f"{name}."): value for key, value in tensors.items() if key.startswith(f"{name}.")}
        if not saved and name in optional:
            continue
        own = part.state_dict()
        differing = [f"{key} only in the file" for key in saved.keys() - own.keys()]
        differing += [f"{key} only in the run" for key in own.keys() - saved.keys()]
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
