"""The state of a run's parts, and the safetensors and JSON files that hold it; reading them never runs code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from fastppo.errors import CheckpointError
from fastppo.runtime.files import write_synced

FORMAT = 1


class Stateful(Protocol):
    """A part of a run with a state of tensors and JSON values."""

    def state_dict(self) -> Mapping[str, Any]:
        """Return the state by name."""


class StateSnapshot(NamedTuple):
    """A copy of the state of several parts, in host memory.

    Attributes:
        tensors: tensors by "part.name".
        values: all other values, by part and name.
    """

    tensors: dict[str, Tensor]
    values: dict[str, dict[str, Any]]

    def part(self, name: str) -> dict[str, Any]:
        """Return the state of the part `name`.

        Raises:
            CheckpointError: the snapshot has no such part.
        """
        if not isinstance(self.values.get(name), dict):
            raise CheckpointError(f"the checkpoint has no state of {name}.")
        own = {key.removeprefix(f"{name}."): x for key, x in self.tensors.items() if key.startswith(f"{name}.")}
        return self.values[name] | own


def snapshot(parts: Mapping[str, Stateful]) -> StateSnapshot:
    """Copy the state of each part to host memory."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for part, owner in parts.items():
        values[part] = {}
        for key, value in owner.state_dict().items():
            if isinstance(value, Tensor):
                tensors[f"{part}.{key}"] = value.detach().cpu().clone(memory_format=torch.contiguous_format)
            else:
                values[part][key] = value
    return StateSnapshot(tensors, values)


def state_files(rank: int, state: StateSnapshot, metadata: Mapping[str, Any]) -> dict[str, bytes]:
    """Return the files of one process's state by name; `metadata` describes the run."""
    text = json.dumps({"format": FORMAT, "about": dict(metadata), "values": state.values})
    return {f"state-{rank}.safetensors": safetensors.torch.save(state.tensors), f"state-{rank}.json": text.encode()}


def read_state(checkpoint: Path, rank: int) -> tuple[StateSnapshot, dict[str, Any]] | None:
    """Return one process's state and the metadata of its run; None if no process of that rank was saved.

    Raises:
        CheckpointError: a file can't be read.
    """
    path = checkpoint / f"state-{rank}.json"
    if not path.exists():
        return None
    values = read_json(path)
    try:
        check_format(checkpoint, values)
        metadata, parts = dict(values["about"]), dict(values["values"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path} can't be understood ({error}).") from None
    return StateSnapshot(read_tensors(checkpoint / f"state-{rank}.safetensors"), parts), metadata


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files by name and flush each of them to the disk."""
    for name, data in files.items():
        write_synced(folder / name, data)


def check_format(path: Path, values: Mapping[str, Any]) -> None:
    """Refuse a file of another format.

    Raises:
        CheckpointError: "format" has another value.
        KeyError, TypeError: `values` has no "format".
    """
    if values["format"] != FORMAT:
        raise CheckpointError(f"{path} has format {values['format']!r}; this version reads format {FORMAT}.")


def read_json(path: Path, max_bytes: int = 2**31) -> Any:  # noqa: ANN401 - any JSON value
    """Return the content of a JSON file.

    Raises:
        CheckpointError: the file can't be read, is larger than `max_bytes`, or is not JSON.
    """
    try:
        if path.stat().st_size > max_bytes:
            raise CheckpointError(f"{path} has {path.stat().st_size:,} bytes; at most {max_bytes:,} are expected.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    Raises:
        CheckpointError: the file can't be read.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}).") from None
