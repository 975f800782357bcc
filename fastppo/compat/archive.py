"""One file for an algorithm: a zip of a policy's files and of the state that training continues from."""

from __future__ import annotations

import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from fastppo.errors import CheckpointError, ConfigError

_MODEL = "model.json"
_FILES = (_MODEL, "model.safetensors", "state-0.json", "state-0.safetensors")


def named(path: Any) -> Any:  # noqa: ANN401 - a path or an open file
    """Return the path of the file: `.zip` is added to a name without an ending; an open file as it is.

    Raises:
        ConfigError: it is neither.
    """
    if hasattr(path, "read") or hasattr(path, "write"):
        return path
    if not isinstance(path, (str, Path)) or not Path(path).name:
        raise ConfigError(f"{path!r} names no file; give a path, or a file opened in binary mode.")
    path = Path(path)
    return path if path.suffix else path.with_name(f"{path.name}.zip")


def write_archive(path: str | Path | IO[bytes], files: Mapping[str, bytes]) -> None:
    """Write `files` into a zip, which replaces an earlier one whole.

    Raises:
        OSError: it can't be written.
    """
    target = named(path)
    if not isinstance(target, Path):
        _write(target, files)
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=target.parent, suffix=".tmp", delete=False) as file:
        _write(file, files)
    Path(file.name).replace(target)


def _write(file: Any, files: Mapping[str, bytes]) -> None:  # noqa: ANN401 - an open file
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


@contextmanager
def unpacked(path: str | Path | IO[bytes]) -> Iterator[Path]:
    """Unpack an archive into a temporary folder.

    Raises:
        CheckpointError: there is no such file, it is no archive, or one of stable-baselines3.
    """
    target = named(path)
    if isinstance(target, Path) and not target.exists() and Path(path).exists():  # type: ignore[arg-type]
        target = Path(path)  # type: ignore[arg-type] # an archive that was renamed
    try:
        with zipfile.ZipFile(target) as archive, tempfile.TemporaryDirectory() as folder:
            names = archive.namelist()
            if "policy.pth" in names:
                raise CheckpointError(
                    f"{target} was saved by stable-baselines3, whose files hold pickles; train here and save again."
                )
            if missing := [name for name in _FILES if name not in names]:
                raise CheckpointError(f"{target} was not saved by fastppo.compat ({missing[0]} is missing).")
            archive.extractall(folder, _FILES)
            yield Path(folder)
    except FileNotFoundError:
        raise CheckpointError(f"load: there is no file {target}.") from None
    except (zipfile.BadZipFile, IsADirectoryError) as error:
        raise CheckpointError(f"load: {target} is no archive ({error}).") from None
