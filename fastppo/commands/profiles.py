"""Print the defaults of other programs beside the settings that they stand for."""

from __future__ import annotations

import dataclasses
from typing import Annotated

import tyro

from fastppo.commands.console import open_console
from fastppo.commands.flags import flag
from fastppo.config import SETTINGS, default_text, shown
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, PROFILES, TUNED, Keyword, Profile
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
        known = (*PROFILES, "tuned")
        if self.name and self.name not in known:
            raise ConfigError(f"there is no profile {self.name!r}; use one of {', '.join(known)}.")
        if not self.name:
            _list()
        elif self.name == "tuned":
            _print_tuned()
        else:
            _print(PROFILES[self.name])
        return 0


def _list() -> None:
    console = open_console()
    for name, profile in PROFILES.items():
        print_line(console, f"{name:<8} {profile.program}")
    print_line(console, f"{'tuned':<8} measured for {', '.join(TUNED)}; CleanRL's defaults elsewhere")
    print_line(console, "fastppo profile NAME prints one; fastppo train --profile NAME trains with it.")


def _print_tuned() -> None:
    console = open_console()
    for env_id, settings in TUNED.items():
        values = "  ".join(f"{flag(name)} {shown(value)}" for name, value in settings.items())
        print_line(console, f"{env_id}: {values}")


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
