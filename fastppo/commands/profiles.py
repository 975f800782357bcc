"""Print the defaults of other programs beside the settings that they stand for."""

from __future__ import annotations

import dataclasses
import difflib
from typing import Annotated, Any

import tyro

from fastppo.commands.console import open_console
from fastppo.commands.flags import flag
from fastppo.config import SETTINGS, default_text, shown
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, MEASURED, PROFILES, Keyword, Profile
from fastppo.runtime.console import print_line


@dataclasses.dataclass(frozen=True)
class ShowProfile:
    """Print another program's keywords and the settings that they stand for."""

    name: Annotated[
        str, tyro.conf.Positional, tyro.conf.arg(metavar="[NAME]", help_behavior_hint="(default: list them)")
    ] = ""
    """Name of a profile, as for --profile."""

    def __call__(self) -> int:
        """Print the profile, or a list of profiles; return 0."""
        known = (*PROFILES, *MEASURED)
        if self.name and self.name not in known:
            near = difflib.get_close_matches(self.name.lower(), known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"use one of {', '.join(known)}."
            raise ConfigError(f"there is no profile {self.name!r}; {hint}")
        if not self.name:
            _list()
        elif self.name in MEASURED:
            _print_measured(self.name)
        else:
            _print({str(name): profile for name, profile in PROFILES.items()}[self.name])
        return 0


def _list() -> None:
    console = open_console()
    for name, profile in PROFILES.items():
        print_line(console, f"{name:<14}{profile.program}")
    for measured_name, measured in MEASURED.items():
        values = f"; {_flags(measured.always)}" if measured.always else ""
        environments = ", ".join(measured.by_env)
        print_line(console, f"{measured_name:<14}measured for {environments}; CleanRL's defaults elsewhere{values}")
    print_line(console, "fastppo profile NAME prints one; fastppo train --profile NAME trains with it.")


def _print_measured(name: str) -> None:
    console = open_console()
    profile = MEASURED[name]
    for env_id, settings in profile.by_env.items():
        print_line(console, f"{env_id}: {_flags(settings | profile.always)}")


def _flags(settings: dict[str, Any]) -> str:
    def given(name: str, value: Any) -> str:  # noqa: ANN401 - any setting's
        if isinstance(value, bool):
            return flag(name) if value else flag(name).replace("--", "--no-", 1)
        return f"{flag(name)} {shown(value)}"

    return "  ".join(given(name, value) for name, value in settings.items())


def _print(profile: Profile) -> None:
    from rich.table import Table

    console = open_console()
    for title, source, entries in (
        (profile.program, profile.source, profile.keywords),
        ("without a keyword", profile.facts_source, profile.facts),
    ):
        table = Table(title=f"{title} ({source})", title_justify="left")
        for column in ("there", "default", "setting", "value", "meaning"):
            table.add_column(column, overflow="fold")
        for entry in entries:
            for i, (setting, value) in enumerate(_rows(entry, profile)):
                first = (entry.name, str(entry.default)) if i == 0 else ("", "")
                table.add_row(*first, setting, value, entry.text if i == 0 else "")
        console.print(table, highlight=False, markup=False)
    for line in profile.differs:
        print_line(console, f"differs: {line}")


def _rows(entry: Keyword, profile: Profile) -> list[tuple[str, str]]:
    """Return the settings of an entry and their values, in words; CleanRL's by kind of environment."""
    rows = []
    for name, value in entry.settings.items():
        if name not in SETTINGS:
            rows.append(("n_minibatches", f"n_envs x n_steps / {value}"))
        elif profile is PROFILES["cleanrl"] and name in CLEANRL["discrete"]:
            rows.append((name, default_text(name, None)))
        else:
            rows.append((name, shown(value)))
    return rows or [("-", "")]
