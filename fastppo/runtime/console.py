"""Plain lines of text on a rich console."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console


def print_line(console: Console | None, text: str) -> None:
    """Print `text` without markup, highlighting or wrapping; nothing where `console` is None."""
    if console is not None:
        console.print(text, highlight=False, markup=False, soft_wrap=True)
