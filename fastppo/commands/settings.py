"""Base of the commands that take the settings of a run."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import tyro

from fastppo.config import Config


@dataclasses.dataclass(frozen=True)
class SettingsCommand(Config):
    """A command whose flags are the settings of a run and its own."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """TOML file of settings, under the names of these flags; flags override it."""

    def __post_init__(self) -> None:
        """Check nothing: `settings` makes a Config, which checks, where tyro draws no box around the message."""

    def settings(self, **changes: Any) -> Config:  # noqa: ANN401 - values of settings
        """Return the checked settings, with `changes`."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**given | changes)


def default_folder(work: str, env_id: str) -> Path:
    """Return the folder of several runs where none is given, such as runs/study-CartPole-v1."""
    return Path("runs") / f"{work}-{env_id.replace('/', '_').replace(':', '_')}"
