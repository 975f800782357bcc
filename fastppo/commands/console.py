"""Terminal output of the commands."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, cast

from fastppo.runtime.console import print_line, wrap_words

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.analysis.checks import CheckResult

_UNWRAPPED = 10_000  # columns, more than any table has


class _Stdout:
    """Standard output that discards text once its reader has gone or its disk is full, so that training continues."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - isatty, encoding, fileno: any attribute
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError:
            return self._silence(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._silence("")

    def _silence(self, text: str) -> int:
        discard_stdout()
        return len(text)


def discard_stdout() -> None:
    """Discard further standard output."""
    # redirect the descriptor itself, so that Python's flush at exit doesn't fail either
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), sys.stdout.fileno())


def open_console() -> Console:
    """Return a console on standard output, which may close before the program ends; in a pipe or file nothing wraps."""
    from rich.console import Console

    file = cast("IO[str]", _Stdout())
    console = Console(file=file)
    return console if console.is_terminal else Console(file=file, width=_UNWRAPPED)


def print_checks(findings: Iterable[CheckResult], good: str) -> int:
    """Print each check once it is known, then a summary (`good` if all passed); return 1 if one failed, else 0."""
    from rich.text import Text

    console, bad, noted = open_console(), 0, 0
    colours, indent = {"ok": "green", "note": "yellow", "bad": "red"}, " " * 22
    for finding in findings:
        bad += finding.state == "bad"
        noted += finding.state == "note"
        good = finding.conclusion or good
        advice = f"\n{indent}{finding.advice}" if finding.advice else ""
        lines = f"{finding.state:<4} {finding.name:<16} {finding.value}{advice}"
        text = Text(wrap_words(lines, console.width, indent) if console.is_terminal else lines)
        text.stylize(colours[finding.state], 0, len(finding.state))
        console.print(text, soft_wrap=True)
    notes = f"; see the {noted} notes above" if noted > 1 else "; see the note above" if noted else ""
    print_line(console, "problems found, see above" if bad else good + notes)
    return 1 if bad else 0


def program(name: str) -> str:
    """Return how to call a program of this Python environment: by name if the shell finds it, else by path."""
    path = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return name if found and Path(found) == path else os.path.relpath(path)
