"""Checkpoint folders: written, sealed with a manifest, verified, pruned.

RUN/checkpoints/step-000000012800/          a run at the end of an iteration
    model.safetensors, model.json           a saved model, so that a checkpoint can be evaluated
    state-0.safetensors, state-0.json       everything else, one pair of files per process
    manifest.json                           size and SHA-256 of each of these files
RUN/checkpoints/best.json                   the checkpoint with the best evaluation

A checkpoint is written into a folder with a temporary name, flushed to the disk file by file, and renamed when it is
complete. A folder with a checkpoint's name is therefore complete, however the process or the machine stopped; its
hashes reveal later damage.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path

from fastppo.errors import CheckpointError
from fastppo.runs.state_files import FORMAT, check_format, read_json
from fastppo.runtime.faults import fault_point
from fastppo.runtime.files import replace_file, sync_folder, write_synced

_NAME = re.compile(r"step-\d{12}")
_LEFTOVER_FOLDER = re.compile(r"step-\d{12}\.(tmp|old|gone)")
_LEFTOVER_FILE = re.compile(r"\.(config|run|result|model|best|metrics|\d{9})\.(json|jsonl|safetensors)\.\d+\.tmp")
_FILE = re.compile(r"(model|state-\d{1,6}|manifest)\.(json|safetensors)")
_MAX_MANIFEST_BYTES = 10 * 2**20


def temporary_folder(run_dir: Path, step: int) -> Path:
    """Return the folder that the checkpoint at `step` is written into."""
    return run_dir / "checkpoints" / f"step-{step:012d}.tmp"


def begin_checkpoint(run_dir: Path, step: int) -> Path:
    """Make an empty temporary folder for a checkpoint's files; `seal_checkpoint` gives it its final name."""
    folder = temporary_folder(run_dir, step)
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    sync_folder(run_dir)  # the entry of `checkpoints`
    return folder


def seal_checkpoint(folder: Path, processes: int = 1) -> None:
    """Add a manifest to the files in `folder`, which hold the states of `processes`, and give it its final name."""
    entries = {}
    for path in sorted(folder.iterdir()):
        entries[path.name] = {"bytes": path.stat().st_size, "sha256": _sha256(path)}
    manifest = {"format": FORMAT, "processes": processes, "files": entries}
    write_synced(folder / "manifest.json", json.dumps(manifest, indent=1).encode())
    sync_folder(folder)
    path = folder.with_suffix("")
    fault_point("rename")
    if path.exists():  # a resumed run reaches a step again whose checkpoint it had saved
        old = path.with_suffix(".old")
        shutil.rmtree(old, ignore_errors=True)
        path.rename(old)
        folder.rename(path)
        shutil.rmtree(old, ignore_errors=True)
    else:
        folder.rename(path)
    sync_folder(path.parent)
    fault_point("renamed")


def discard_checkpoint(folder: Path) -> None:
    """Remove a temporary folder that could not be completed."""
    shutil.rmtree(folder, ignore_errors=True)


def prune_checkpoints(run_dir: Path, keep: int) -> None:
    """Remove all checkpoints but the last `keep` and the best."""
    best = best_checkpoint(run_dir)
    for path in list_checkpoints(run_dir)[:-keep]:
        if path != best:
            gone = path.with_suffix(".gone")
            path.rename(gone)  # a partly deleted folder must not have a checkpoint's name
            shutil.rmtree(gone, ignore_errors=True)


def clean_up(run_dir: Path, resumed_at: int | None = None) -> None:
    """Remove partly written and partly deleted files of a killed process. Requires the run's lock.

    Checkpoints after the global step `resumed_at` are damaged: the run would have resumed from them otherwise. They are
    renamed to *.bad, so that `prune_checkpoints` doesn't count them.
    """
    if resumed_at is not None:
        for path in list_checkpoints(run_dir):
            if int(path.name.removeprefix("step-")) > resumed_at:
                shutil.rmtree(path.with_suffix(".bad"), ignore_errors=True)
                path.rename(path.with_suffix(".bad"))
    for path in _entries(run_dir / "checkpoints"):
        if _LEFTOVER_FOLDER.fullmatch(path.name):
            if path.suffix == ".old" and not path.with_suffix("").exists():
                path.rename(path.with_suffix(""))  # the process was killed between two renames
            else:
                shutil.rmtree(path, ignore_errors=True)
    for folder in (run_dir, run_dir / "checkpoints", run_dir / "samples"):
        for path in _entries(folder):
            if _LEFTOVER_FILE.fullmatch(path.name):
                path.unlink(missing_ok=True)


def list_checkpoints(run_dir: Path) -> list[Path]:
    """Return the run's checkpoint folders, earliest first."""
    return sorted(filter(is_checkpoint, _entries(run_dir / "checkpoints")))


def is_checkpoint(path: Path) -> bool:
    """Return whether `path` is the folder of a checkpoint, by its name."""
    return _NAME.fullmatch(path.name) is not None and path.is_dir()


def _entries(folder: Path) -> list[Path]:
    return list(folder.iterdir()) if folder.is_dir() else []


def mark_best(run_dir: Path, step: int, mean_return: float) -> None:
    """Record the checkpoint at `step` as the best; `prune_checkpoints` keeps it."""
    path = run_dir / "checkpoints" / "best.json"
    data = json.dumps({"checkpoint": f"step-{step:012d}", "mean_return": mean_return}).encode()
    replace_file(path, lambda temporary: write_synced(temporary, data))
    sync_folder(path.parent)


def best_checkpoint(run_dir: Path) -> Path | None:
    """Return the checkpoint with the best evaluation; None if none is marked, or the marked one is gone."""
    try:
        name = json.loads((run_dir / "checkpoints" / "best.json").read_text())["checkpoint"]
        path = run_dir / "checkpoints" / name
        return path if _NAME.fullmatch(name) and path.is_dir() else None
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def newest_checkpoint(run_dir: Path) -> tuple[Path, list[str]]:
    """Return the latest intact checkpoint, and a description of the damage of each later one.

    Raises:
        CheckpointError: there is no intact checkpoint.
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
        CheckpointError: a file is missing, truncated or altered.
    """
    manifest_path = path / "manifest.json"
    manifest = read_json(manifest_path, _MAX_MANIFEST_BYTES)
    try:
        check_format(path, manifest)
        entries = {str(name): (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
        processes = int(manifest["processes"])
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise CheckpointError(f"{manifest_path} can't be understood ({type(error).__name__}: {error}).") from None
    if not 1 <= processes <= len(entries):
        raise CheckpointError(f"{manifest_path} lists {processes} processes but {len(entries)} files.")
    needed = {"model.safetensors", "model.json"}
    needed |= {f"state-{rank}.{kind}" for rank in range(processes) for kind in ("safetensors", "json")}
    if missing := sorted(needed - entries.keys()):
        raise CheckpointError(f"{manifest_path} doesn't list {', '.join(missing)}.")
    for name, (size, digest) in entries.items():
        file = path / name
        if not _FILE.fullmatch(name) or file.is_symlink():
            raise CheckpointError(f"{manifest_path} lists {name!r}, which is not a checkpoint file.")
        if not file.is_file():
            raise CheckpointError(f"{file} is missing.")
        if file.stat().st_size != size:
            raise CheckpointError(f"{file} has {file.stat().st_size} bytes; it was written with {size}.")
        if _sha256(file) != digest:
            raise CheckpointError(f"{file} was altered: its SHA-256 differs from the manifest.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
