"""Plain lines of text on a rich console."""

from __future__ import annotations

import sys
import textwrap
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console(wanted: bool | None) -> Console | None:
    """Return a console on standard output, or None: where it isn't wanted, or by default where it is no terminal."""
    if wanted or (wanted is None and sys.stdout is not None and sys.stdout.isatty()):
        from rich.console import Console

        return Console()
    return None


def print_line(console: Console | None, text: str, *, wrap: bool = True) -> None:
    """Print `text` without markup or highlighting; nothing where `console` is None.

    A terminal shows it wrapped at words; in a pipe or a file it stays one line. `wrap=False` keeps it whole in a
    terminal too: commands and paths, for copying.
    """
    if console is None:
        return
    if wrap and console.is_terminal:
        text = wrap_words(text, console.width)
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def print_log(console: Console | None, text: str) -> None:
    """Print `text` as one event of a run; outside a terminal with the date and time."""
    if console is not None and not console.is_terminal:
        text = f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}"
    print_line(console, text)


def wrap_words(text: str, width: int, indent: str = "  ") -> str:
    """Wrap each line of `text` to `width` columns at spaces; continuation lines begin with `indent`.

    A longer word, such as a path, stays whole.
    """
    wrapped = (
        textwrap.wrap(
            line,
            width,
            subsequent_indent=indent,
            replace_whitespace=False,
            break_long_words=False,
            break_on_hyphens=False,
        )
        for line in text.split("\n")
    )
    return "\n".join("\n".join(lines) for lines in wrapped)
