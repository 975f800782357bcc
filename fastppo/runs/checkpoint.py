"""Models and checkpoints on disk: safetensors and JSON, so that loading one never runs code.

RUN/model.safetensors, model.json           network and normalisers as the run left them, and what rebuilds the policy
RUN/checkpoints/step-000000012800/          a run at the end of an iteration
    model.safetensors, model.json           as above, so that a checkpoint can be played
    state-0.safetensors, state-0.json       the rest, of each process that trained
    manifest.json                           size and SHA-256 of each of these files
RUN/checkpoints/best.json                   which of them evaluated best

A checkpoint is written into a folder with another name, flushed to the disk file by file, and renamed when it is whole.
So whatever ends the process, or the machine, a folder with a checkpoint's name is a checkpoint; what was damaged later
is known by its hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from fastppo.errors import CheckpointError
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runtime.faults import fault_point

FORMAT = 1
_NAME = re.compile(r"step-\d{12}")
_LEFTOVER = re.compile(r"step-\d{12}\.(tmp|old|gone)")
_FILE = re.compile(r"(model|state-\d{1,6}|manifest)\.(json|safetensors)")
_LARGEST_MANIFEST = 10 * 2**20
_CHUNK = 2**20


class Stateful(Protocol):
    """A part of a run whose state can be asked for: tensors, and JSON-able values."""

    def state_dict(self) -> Mapping[str, Any]:
        """By name."""


class StateSnapshot(NamedTuple):
    """The state of some parts at one moment, copied to this memory.

    Attributes:
        tensors: by "part.name".
        values: the rest, by part and name.
    """

    tensors: dict[str, Tensor]
    values: dict[str, dict[str, Any]]

    def part(self, name: str) -> dict[str, Any]:
        """What one part gave.

        Raises:
            CheckpointError: it isn't there.
        """
        if not isinstance(self.values.get(name), dict):
            raise CheckpointError(f"the checkpoint holds nothing of {name}.")
        mine = {key.removeprefix(f"{name}."): x for key, x in self.tensors.items() if key.startswith(f"{name}.")}
        return self.values[name] | mine


def snapshot(parts: Mapping[str, Stateful]) -> StateSnapshot:
    """Copy the state of each part."""
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


def model_files(frozen: StateSnapshot, spec: PolicySpec, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of a model, from its frozen parts; `about` goes into model.json."""
    text = json.dumps({"format": FORMAT, "policy": spec.to_dict(), **about}, indent=2)
    return {"model.safetensors": safetensors.torch.save(frozen.tensors), "model.json": text.encode()}


def state_files(rank: int, frozen: StateSnapshot, about: Mapping[str, Any]) -> dict[str, bytes]:
    """The files of one process's state; `about` says of which run."""
    text = json.dumps({"format": FORMAT, "about": dict(about), "values": frozen.values})
    return {f"state-{rank}.safetensors": safetensors.torch.save(frozen.tensors), f"state-{rank}.json": text.encode()}


def save_model(run_dir: Path, spec: PolicySpec, parts: Mapping[str, Stateful], about: Mapping[str, Any]) -> None:
    """Save a model into the run folder; the last save stays whole if this one doesn't finish."""
    run_dir.mkdir(parents=True, exist_ok=True)  # someone may have deleted it
    for name, data in model_files(snapshot(parts), spec, about).items():
        _write(run_dir / f".{name}.tmp", data)
        (run_dir / f".{name}.tmp").replace(run_dir / name)


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """An empty folder to write a checkpoint's files into, until `end_checkpoint` gives it its name."""
    folder = run_dir / "checkpoints" / f"step-{step:012d}.tmp"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    _sync(run_dir)  # that there are checkpoints
    return folder


def write_files(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write files and flush each of them to the disk."""
    for name, data in files.items():
        _write(folder / name, data)


def end_checkpoint(folder: Path, processes: int = 1) -> None:
    """Seal the files in `folder`, among them the states of so many processes, with a manifest, and name it."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    _write(
        folder / "manifest.json",
        json.dumps({"format": FORMAT, "processes": processes, "files": entries}, indent=1).encode(),
    )
    _sync(folder)
    path = folder.with_suffix("")
    fault_point("rename")
    if path.exists():  # a resumed run comes by where it was before, or where what it left was damaged
        old = path.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(path)
    _sync(path.parent)
    fault_point("renamed")


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all but the last `keep`, and the best."""
    best = best_checkpoint(run_dir)
    for spare in list_checkpoints(run_dir)[:-keep]:
        if spare != best:
            gone = spare.with_suffix(".gone")
            spare.rename(gone)  # half a folder must not have a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)


def abandon_checkpoint(folder: Path) -> None:
    """Remove what `begin_checkpoint` made and could not be finished."""
    shutil.rmtree(folder, ignore_errors=True)


def tidy(run_dir: Path, resumed_at: int | None = None) -> None:
    """Remove what an earlier process left half done; only for who holds the run's lock.

    Checkpoints after the step `resumed_at` are damaged, or the run would have gone on from them: they are put aside, so
    that they don't count among those that are kept.
    """
    for path in list_checkpoints(run_dir) if resumed_at is not None else ():
        if int(path.name.removeprefix("step-")) > (resumed_at or 0):
            shutil.rmtree(path.with_suffix(".bad"), ignore_errors=True)
            path.rename(path.with_suffix(".bad"))
    for path in _entries(run_dir):
        if _LEFTOVER.fullmatch(path.name):
            if path.suffix == ".old" and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))  # it ended between two renames
            else:
                shutil.rmtree(path, ignore_errors=True)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Folders with a checkpoint's name, earliest first."""
    return sorted(path for path in _entries(run_dir) if _NAME.fullmatch(path.name) and path.is_dir())


def _entries(run_dir: Path) -> Iterable[Path]:
    folder = run_dir / "checkpoints"
    return list(folder.iterdir()) if folder.is_dir() else []


def mark_best(run_dir: Path, step: int, mean_return: float) -> None:
    """Remember which checkpoint evaluated best: it is kept, whatever comes after."""
    path = run_dir / "checkpoints" / "best.json"
    text = json.dumps({"checkpoint": f"step-{step:012d}", "mean_return": mean_return})
    _write(path.with_name(".best.json.tmp"), text.encode())
    path.with_name(".best.json.tmp").replace(path)
    _sync(path.parent)


def best_checkpoint(run_dir: Path) -> Path | None:
    """The checkpoint that evaluated best, if one is marked and there."""
    try:
        name = json.loads((run_dir / "checkpoints" / "best.json").read_text())["checkpoint"]
        path = run_dir / "checkpoints" / name
        return path if _NAME.fullmatch(name) and path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def newest_checkpoint(run_dir: Path) -> tuple[Path, list[str]]:
    """The latest checkpoint that is whole, and what is wrong with any later ones.

    Raises:
        CheckpointError: there is none.
    """
    problems: list[str] = []
    for path in reversed(list_checkpoints(run_dir)):
        try:
            verify_checkpoint(path)
            return path, problems
        except CheckpointError as error:
            problems.append(str(error))
    if problems:
        raise CheckpointError(f"no checkpoint in {run_dir} can be used: {' '.join(problems)}")
    hint = f"; start from its model with train --init-from {run_dir}" if (run_dir / "model.json").exists() else ""
    raise CheckpointError(f"{run_dir} holds no checkpoint{hint}.")


def verify_checkpoint(path: Path) -> None:
    """Compare a checkpoint's files with its manifest.

    Raises:
        CheckpointError: something is missing, cut or altered.
    """
    manifest = read_json(path / "manifest.json", _LARGEST_MANIFEST)
    try:
        if manifest["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {manifest['format']!r}; this version reads format {FORMAT}.")
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        processes = int(manifest["processes"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{path}/manifest.json can't be understood ({type(error).__name__}: {error}).") from None
    if not 1 <= processes <= len(entries):
        raise CheckpointError(f"{path}/manifest.json speaks of {processes} processes, and of {len(entries)} files.")
    needed = {"model.safetensors", "model.json"}
    needed |= {f"state-{rank}.{kind}" for rank in range(processes) for kind in ("safetensors", "json")}
    if missing := sorted(needed - entries.keys()):
        raise CheckpointError(f"{path}/manifest.json names no {', '.join(missing)}.")
    for name, (size, digest) in entries.items():
        file = path / name
        if not _FILE.fullmatch(name) or file.is_symlink():
            raise CheckpointError(f"{path}/manifest.json names {name!r}, which is no file of a checkpoint.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; it was written with {size}.")
        if _hash(file) != digest:
            raise CheckpointError(f"{file} is not what was written: its SHA-256 differs.")


def read_state(path: Path, rank: int) -> tuple[StateSnapshot, dict[str, Any]] | None:
    """One process's state from a checkpoint, and what it says of the run; None: there was no such process.

    Raises:
        CheckpointError: it can't be read.
    """
    if not (path / f"state-{rank}.json").exists():
        return None
    values = read_json(path / f"state-{rank}.json")
    try:
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {values['format']!r}; this version reads format {FORMAT}.")
        about, parts = dict(values["about"]), dict(values["values"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{path}/state-{rank}.json can't be understood ({error}).") from None
    return StateSnapshot(read_tensors(path / f"state-{rank}.safetensors"), parts), about


def read_spec(run_dir: Path) -> tuple[PolicySpec, dict[str, Any]]:
    """What rebuilds the policy saved in `run_dir`, and all that model.json says.

    Raises:
        CheckpointError: there is none, or it can't be read.
    """
    path = run_dir / "model.json"
    if not path.exists():
        why = f"{path.name} is missing" if run_dir.is_dir() else "there is no such folder"
        raise CheckpointError(f"{run_dir} holds no saved model ({why}); name a run folder or one of its checkpoints.")
    values = read_json(path)
    try:
        if values["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {values['format']}; this version reads format {FORMAT}.")
        return PolicySpec.from_dict(values["policy"]), values
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def weights_file(run_dir: Path) -> Path:
    """Where the weights of the model saved in `run_dir` are.

    Raises:
        CheckpointError: there are none.
    """
    path = run_dir / "model.safetensors"
    if not path.exists():
        raise CheckpointError(f"{run_dir} holds no saved model ({path.name} is missing).")
    return path


def load_model(run_dir: Path, parts: dict[str, nn.Module], optional: Sequence[str] = ()) -> None:
    """Copy the saved state of each part into it; a saved part that isn't asked for is left out.

    A part named in `optional` stays as it is where none was saved.

    Raises:
        CheckpointError: nothing to read, or what is there doesn't fit, with the differing names.
    """
    path = weights_file(run_dir)
    tensors = read_tensors(path)
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


def read_json(path: Path, largest: int = 2**31) -> Any:  # noqa: ANN401 - whatever it holds
    """What a JSON file holds.

    Raises:
        CheckpointError: it can't be read, is larger than `largest` bytes, or no JSON.
    """
    try:
        if path.stat().st_size > largest:
            raise CheckpointError(f"{path} has {path.stat().st_size} bytes, more than such a file can have.")
        return json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """What a safetensors file holds.

    Raises:
        CheckpointError: it can't be read.
    """
    try:
        return safetensors.torch.load(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    except (SafetensorError, ValueError, KeyError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{path} can't be read ({error}).") from None


def _write(path: Path, data: bytes) -> None:
    """Write and flush to the disk."""
    file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    try:
        for at in range(0, len(data), _CHUNK):
            fault_point("write")
            rest = memoryview(data)[at : at + _CHUNK]
            while rest:
                rest = rest[os.write(file, rest) :]
        fault_point("fsync")
        os.fsync(file)
    finally:
        os.close(file)


def _sync(folder: Path) -> None:
    """Flush a folder's entries to the disk."""
    if not hasattr(os, "O_DIRECTORY"):
        return  # Windows: there is no such call
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(file)
    finally:
        os.close(file)


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
