"""Plain lines of text on a rich console."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def progress_console(wanted: bool | None) -> Console | None:
    """Return a console on standard output, or None: where it isn't wanted, or by default where it is no terminal."""
    if wanted or (wanted is None and sys.stdout is not None and sys.stdout.isatty()):
        from rich.console import Console

        return Console()
    return None


def print_line(console: Console | None, text: str) -> None:
    """Print `text` without markup, highlighting or wrapping; nothing where `console` is None."""
    if console is not None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
