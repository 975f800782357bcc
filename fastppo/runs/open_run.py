"""Opening a saved run: its settings, and whether its environment can be made here."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fastppo.config import Config
from fastppo.envs.make_envs import Maker
from fastppo.errors import CheckpointError, ConfigError
from fastppo.runs.model_files import read_spec
from fastppo.runs.state_files import read_json


def open_run(folder: Path, make_env: Maker | None, allow_import: bool) -> Config:
    """Return the settings of the run in `folder`, a run folder or a checkpoint, to make its environment with.

    Args:
        folder: the run folder, or one of its checkpoints.
        make_env: makes one environment; needed if the run used a `make_env`.
        allow_import: allow settings that name code to import (env_id, wrappers).

    Raises:
        CheckpointError: a file is missing or can't be read.
        ConfigError: the environment imports code without `allow_import`, or needs `make_env`.
    """
    _, metadata = read_spec(folder)
    config = read_config(folder)
    imported = " and ".join(x for x in config.imported if make_env is None or x.startswith("wrappers"))
    if imported and not allow_import:
        raise ConfigError(
            f"{folder} was trained with {imported}, which imports code; repeat with --allow-import "
            "(from Python: allow_import=True)."
        )
    if metadata.get("make_env") and make_env is None:
        raise ConfigError(
            f"{folder} was trained on {metadata.get('env')} from make_env; call resume or evaluate with make_env=... "
            "from Python: fastppo.evaluate(run, make_env=...)"
        )
    return config


def read_config(folder: Path) -> Config:
    """Return the settings that a run folder or a checkpoint was written with.

    Raises:
        CheckpointError: they can't be read or understood.
        ConfigError: a setting has a value that this version refuses.
    """
    state = folder / "state-0.json"
    path = state if state.exists() else folder / "config.json"
    values = read_json(path)
    try:
        return saved_config(values["about"]["config"] if path == state else values, str(path))
    except (KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} can't be understood ({type(error).__name__}: {error}).") from None


def saved_config(values: Mapping[str, Any], source: str = "config") -> Config:
    """Return saved settings, with defaults for those that the saving version didn't know.

    Masks are off if it didn't know them: the run was trained without them, even if its environment gives some. Errors
    are those of `Config.from_dict`.
    """
    return Config.from_dict({"action_masks": "off"} | dict(values), source)
