"""Results of `fastppo train --seeds` as a table for the terminal and as seeds.html."""

from __future__ import annotations

from pathlib import Path

from rich.table import Table

from fastppo.analysis.figures import returns_figure
from fastppo.analysis.html import Figures, heading, page, paragraphs, table
from fastppo.analysis.seeds import Summary, in_words
from fastppo.analysis.terminal import narrow_table
from fastppo.runtime.files import write_text

_HEAD = ("seed", "mean return", "episodes", "steps", "seconds", "ended")


def terminal_table(summary: Summary) -> Table:
    """Return a table with a row per seed, and rows of mean and interquartile mean."""
    shown = narrow_table("final mean return of each seed", caption="in brackets: 95 % bootstrap interval")
    for name in _HEAD:
        shown.add_column(name, justify="right")
    rows = _rows(summary)
    for i, row in enumerate(rows):
        shown.add_row(*row, end_section=i == len(rows) - 1)
    shown.add_row("mean", str(summary.mean))
    shown.add_row("IQM", str(summary.iqm))
    return shown


def write_page(folder: Path, env_name: str, summary: Summary) -> Path:
    """Write seeds.html into `folder`; return its path."""
    figures, runs = Figures(), [run for run in summary.runs.values() if len(run)]
    failures = [f"Seed {seed} failed: {text}" for seed, text in summary.failures.items()]
    parts = [paragraphs([in_words(summary), *failures]), table(_HEAD, _rows(summary))]
    if runs:
        parts += [heading("Returns"), figures.draw(returns_figure(runs), "returns")]
        machine = runs[0].about
        where = f"{machine.get('device_name')}, {machine.get('cpu_count')} cores, {machine.get('platform')}"
        parts.append(paragraphs([where]))
    path = folder / "seeds.html"
    write_text(path, page(f"{env_name}: {len(summary.seeds)} seeds", *parts))
    return path


def _rows(summary: Summary) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for seed in summary.seeds:
        if (run := summary.runs.get(seed)) is None:
            rows.append((str(seed), "-", "-", "-", "-", "failed" if seed in summary.failures else "-"))
            continue
        result = run.result
        value = f"{summary.returns[seed]:,.1f}" if seed in summary.returns else "no episode ended"
        counts = f"{result['episodes']:,}", f"{result['global_step']:,}", f"{result['seconds']:,.1f}"
        rows.append((str(seed), value, *counts, str(result["ended"])))
    return rows
