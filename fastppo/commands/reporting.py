"""Look at runs that were made: pages, differences, exported policies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console

_Runs = Annotated[tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]")]
_Output = Annotated[Path, tyro.conf.arg(aliases=("-o",), metavar="PATH")]


@dataclasses.dataclass(frozen=True)
class Report:
    """One page on one or several runs: returns, diagnostics, health, speed, and what happened inside updates."""

    runs: _Runs
    """Run folders; those that differ by their seed alone get a mean and a band."""
    output: _Output = Path("report.html")
    """The page, which needs nothing but a browser."""

    def __call__(self) -> int:
        """Write the page, and print what health finds."""
        from fastppo.analysis.report import report

        console = open_console()
        for record in report(self.runs, self.output):
            for trouble in record.problems():
                console.print(f"{record.label}: {trouble}", highlight=False, markup=False, soft_wrap=True)
            for finding, first, latest in record.findings:
                text = f"{record.label}, {record.step_range(first, latest)}: {finding}"
                console.print(text, highlight=False, markup=False, soft_wrap=True)
        console.print(f"page:    {self.output}", highlight=False, markup=False, soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """Say in what two runs differ, and where their curves part."""

    run_a: Annotated[Path, tyro.conf.Positional]
    """A run folder."""
    run_b: Annotated[Path, tyro.conf.Positional]
    """Another."""

    def __call__(self) -> int:
        """Print tables and two sentences."""
        from rich.table import Table
        from rich.text import Text

        from fastppo.analysis.diff import difference
        from fastppo.analysis.run_data import read_runs

        a, b = read_runs((self.run_a, self.run_b))
        found, console = difference(a, b), open_console()
        for title, rows in (
            ("settings that differ", found.settings),
            ("machine and versions that differ", found.surroundings),
            ("results", found.results),
        ):
            table = Table(title=Text(title, no_wrap=True), title_justify="left")
            for column in ("", a.label, b.label):
                table.add_column(column, overflow="fold")
            for row in rows:
                table.add_row(*row)
            if rows:
                console.print(table, highlight=False, markup=False)
            else:
                console.print(f"{title}: none", highlight=False)
        for record in (a, b):
            for trouble in record.problems():
                console.print(f"{record.label}: {trouble}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"numbers: {found.numbers}", highlight=False, markup=False, soft_wrap=True)
        console.print(f"returns: {found.returns}", highlight=False, markup=False, soft_wrap=True)
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the policy of a run as one file that needs no fastppo: raw observations in, actions out."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder, or one of its checkpoints."""
    format: Literal["onnx", "pt2"] = "onnx"
    """ONNX (extra `export`), or torch.export's."""
    output: Annotated[
        Path | None, tyro.conf.arg(aliases=("-o",), metavar="PATH", help_behavior_hint="(default: RUN/policy.FORMAT)")
    ] = None
    """The file."""

    def __call__(self) -> int:
        """Write the file, and print its name."""
        from fastppo.evaluation.export import export

        path = export(self.run, self.output, self.format)
        open_console().print(f"policy:  {path}", highlight=False, markup=False, soft_wrap=True)
        return 0
