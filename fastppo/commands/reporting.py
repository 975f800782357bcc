"""Use finished runs: reports, differences, exported policies."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console
from fastppo.commands.training import RunFolder
from fastppo.runs.run_dir import check_run_folder
from fastppo.runtime.console import print_line

_Runs = Annotated[
    tuple[Path, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RUN [RUN ...]", help_behavior_hint="(one or more)")
]
_Output = Annotated[Path, tyro.conf.arg(aliases=("-o",), metavar="PATH")]


@dataclasses.dataclass(frozen=True)
class Report:
    """Write a page on one or more runs: returns, diagnostics, health, speed."""

    runs: _Runs
    """Run folders; runs of the same settings but different seeds are drawn as mean and band."""
    output: _Output = Path("report.html")
    """HTML file to write; it needs no network."""

    def __call__(self) -> int:
        """Write the page and print its health findings."""
        for run_dir in self.runs:
            check_run_folder(run_dir)
        from fastppo.analysis.report import report

        console = open_console()
        for run in report(self.runs, self.output):
            for problem in run.problems():
                print_line(console, f"{run.label}: {problem}")
            for record in run.findings:
                print_line(console, f"{run.label}, {record}")
        print_line(console, f"page:    {self.output}", wrap=False)
        return 0


@dataclasses.dataclass(frozen=True)
class Diff:
    """Show how two runs differ and where their curves diverge."""

    run_a: RunFolder
    """Run folder."""
    run_b: RunFolder
    """Run folder to compare it with."""

    def __call__(self) -> int:
        """Print tables of differences, and where figures and returns diverge."""
        for run_dir in (self.run_a, self.run_b):
            check_run_folder(run_dir)
        from rich.table import Table
        from rich.text import Text

        from fastppo.analysis.diff import difference
        from fastppo.analysis.run_data import read_runs

        a, b = read_runs((self.run_a, self.run_b), max_rows=None)
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
                print_line(console, f"{title}: none")
        for run in (a, b):
            for problem in run.problems():
                print_line(console, f"{run.label}: {problem}")
        print_line(console, f"numbers: {found.numbers}")
        print_line(console, f"returns: {found.returns}")
        return 0


@dataclasses.dataclass(frozen=True)
class Export:
    """Write the policy of a run to one file; prints its inputs and outputs."""

    run: RunFolder
    """Run folder, or one of its checkpoints."""
    format: Literal["onnx", "pt2"] = "onnx"
    """File format: ONNX (extra `export`) or torch.export."""
    output: Annotated[
        Path | None, tyro.conf.arg(aliases=("-o",), metavar="PATH", help_behavior_hint="(default: RUN/policy.FORMAT)")
    ] = None
    """File to write."""

    def __call__(self) -> int:
        """Write the file; print its path, its inputs and its outputs."""
        check_run_folder(self.run)
        from fastppo.evaluation.export import export_policy

        path, signature = export_policy(self.run, self.output, self.format)
        console = open_console()
        print_line(console, f"policy:  {path}", wrap=False)
        width = max(len(port.name) for ports in signature for port in ports)
        for title, ports in signature._asdict().items():
            for i, port in enumerate(ports):
                shape = ", ".join(("B", *map(str, port.shape)))
                line = f"{'' if i else f'{title}:':<8} {port.name:<{width}}  {port.dtype:<7}  [{shape}]"
                print_line(console, line, wrap=False)
        return 0
