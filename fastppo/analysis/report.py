"""`fastppo report`: one self-contained HTML page on one or several runs."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from fastppo.analysis.figures import (
    diagnostic_figure,
    diagnostics_of,
    info_diagnostics,
    phases_figure,
    returns_figure,
    speed_figure,
)
from fastppo.analysis.html import Figures, heading, items, page, paragraphs, table
from fastppo.analysis.run_data import RunData, read_runs
from fastppo.analysis.update_section import update_section
from fastppo.config import as_path, shown
from fastppo.errors import ConfigError
from fastppo.runs.run_dir import check_output

_SUMMARY = (  # column title, tag, format
    ("mean return", "mean_return", ".2f"),
    ("episodes", "episodes", ",.0f"),
    ("steps", "global_step", ",.0f"),
    ("steps/s", "charts/sps_steady", ",.0f"),
    ("seconds", "seconds", ".1f"),
)


def report(run_dirs: Sequence[Path | str], output: Path | str) -> list[RunData]:
    """Write the page on the runs to `output`; return the runs.

    Raises:
        CheckpointError: one of the folders is not a run folder.
        ConfigError: there is no folder, one is listed twice, or the page can't be written.
    """
    if not run_dirs:
        raise ConfigError("report got no run; pass one or several run folders.")
    folders, output = [as_path(run_dir, "run_dirs") for run_dir in run_dirs], as_path(output, "output")
    check_output(output, "report")
    for i, folder in enumerate(folders):
        if folder.resolve() in {other.resolve() for other in folders[:i]}:
            raise ConfigError(f"report got {folder} twice; pass each run once.")
    runs = read_runs(folders)
    try:
        output.write_text(report_page(runs), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"report can't write {output} ({error.strerror}).") from None
    return runs


def report_page(runs: Sequence[RunData]) -> str:
    """Return the page as HTML."""
    env_ids = list(dict.fromkeys(str(run.config.get("env_id")) for run in runs))
    subject = f"{len(runs)} runs" if len(runs) > 1 else runs[0].label
    figures = Figures()
    diagnostics = (figures.draw(diagnostic_figure(runs, d), d.name) for d in diagnostics_of(runs))
    parts = [
        _summary(runs),
        _health(runs),
        heading("Returns"),
        paragraphs([f"These returns are of different environments and can't be compared: {', '.join(env_ids)}."])
        if len(env_ids) > 1
        else "",
        _full_width(figures.draw(returns_figure(runs), "returns")),
        _info(runs, figures),
        heading("Diagnostics"),
        _grid(*diagnostics),
        heading("Speed"),
        _full_width(figures.draw(speed_figure(runs), "speed")),
        _grid(*(figures.draw(phases_figure(run)) for run in runs if len(run))),
        *update_section(runs, figures),
        heading("Settings and results"),
        f'<div class="settings">{_settings(runs)}</div>',
    ]
    return page(f"{', '.join(env_ids)}: {subject}", *parts)


def _full_width(drawn: str) -> str:
    return f'<div class="plot">{drawn}</div>'


def _grid(*drawn: str) -> str:
    return f'<div class="grid">{"".join(drawn)}</div>'


def _summary(runs: Sequence[RunData]) -> str:
    """Return a table of final figures, and the problems of each run."""
    rows = []
    evaluations = [_evaluation(run) for run in runs]
    for run, evaluation in zip(runs, evaluations, strict=True):
        finals = ((run.last(tag), form) for _, tag, form in _SUMMARY)
        figures = [format(value, form) if math.isfinite(value) else "-" for value, form in finals]
        figures += [evaluation] if any(evaluations) else []
        rows.append((run.label, str(run.result.get("ended", "-")), *(figure or "-" for figure in figures)))
    problems = [f"{run.label}: {line}" for run in runs for line in (*run.problems(), run.thinning) if line]
    head = ("run", "ended", *(title for title, _, _ in _SUMMARY), *(["last evaluation"] if any(evaluations) else []))
    return table(head, rows) + paragraphs(problems)


def _evaluation(run: RunData) -> str:
    """Return the mean and standard deviation of the last evaluation; "" if there is none."""
    means, stds = run.column("eval/return_mean"), run.column("eval/return_std")
    at = np.flatnonzero(np.isfinite(means))
    return f"{means[at[-1]]:.2f} +- {stds[at[-1]]:.2f}" if len(at) else ""


def _health(runs: Sequence[RunData]) -> str:
    """Return the findings of the health rules."""
    parts = [heading("Health")]
    for run in runs:
        if not len(run):
            continue
        lines = []
        for record in run.findings:
            name = f"{run.label}, {record.first.name}" if len(runs) > 1 else record.first.name
            lines.append((name, record.description))
        parts.append(items(lines) if lines else paragraphs([f"{run.label}: no problems detected."]))
    return "".join(parts)


def _info(runs: Sequence[RunData], figures: Figures) -> str:
    """Return the figures of `--log-info`; "" if there are none."""
    drawn = [figures.draw(diagnostic_figure(runs, d)) for d in info_diagnostics(runs)]
    return heading("Figures from info") + _grid(*drawn) if drawn else ""


def _settings(runs: Sequence[RunData]) -> str:
    """Return a table of every setting and result, those that differ first."""
    rows: dict[str, list[str]] = {}
    for i, run in enumerate(runs):
        for name, value in _facts(run).items():
            rows.setdefault(name, ["-"] * len(runs))[i] = shown(value)
    ordered = sorted(rows.items(), key=lambda item: len(set(item[1])) == 1)
    return table(("setting", *(run.label for run in runs)), ([name, *values] for name, values in ordered))


def _facts(run: RunData) -> dict[str, object]:
    """Return settings, results, machine and notes of a run by name."""
    versions, notes = run.about.get("versions"), run.about.get("notes")
    device, cores = run.about.get("device_name"), run.about.get("cpu_count")
    return {
        **run.config,
        **{f"result: {name}": _rounded(value) for name, value in run.result.items() if name != "run_dir"},
        "machine": None if device is None else f"{device}, {shown(cores)} cores",
        "versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else "",
        "commit": run.about.get("git_commit"),
        "started": run.about.get("started"),
        "notes": " ".join(map(str, notes)) if isinstance(notes, list) else "",
    }


def _rounded(value: object) -> object:
    """Return floats with six significant digits, and a dict as one line of text."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_rounded(v)}" for k, v in value.items())
    return float(f"{value:.6g}") if isinstance(value, float) else value
