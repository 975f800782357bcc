"""Results of `fastppo study` as a table for the terminal and as study.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import plotly.graph_objects as go
from rich.table import Table

from fastppo.analysis.figures import returns_figure
from fastppo.analysis.html import LAYOUT, Figures, heading, page, paragraphs, table
from fastppo.analysis.study import Candidate, Estimate, Plan, format_estimate, recommend
from fastppo.analysis.terminal import narrow_table
from fastppo.runtime.files import write_text

_HEAD = ("n_envs", "reached", "n_steps", "seconds to target", "steps to target", "updates", "steps/s")
_AXES = {"environment steps": "global_step", "updates": "iteration", "seconds": "seconds"}


def terminal_table(candidates: Sequence[Candidate]) -> Table:
    """Return a table with a row per n_envs."""
    shown = narrow_table("cost of the target: mean over the seeds that reached it (95 % interval)")
    for name in _HEAD:
        shown.add_column(name.replace(" to ", " to\n"), justify="right")
    for row in _rows(candidates):
        shown.add_row(*(cell.replace(" (", "\n(") for cell in row))
    return shown


def write_page(folder: Path, env_name: str, plan: Plan, candidates: Sequence[Candidate]) -> Path:
    """Write study.html into `folder`; return its path."""
    figures = Figures()
    runs = [run for s in candidates for run in s.runs if len(run)]
    failures = [
        f"n_envs {s.n_envs}, seed {seed} failed: {text}" for s in candidates for seed, text in s.failures.items()
    ]
    parts = [paragraphs([recommend(candidates, plan.target), *failures]), table(_HEAD, _rows(candidates))]
    if any(s.reached for s in candidates):
        parts.append('<div class="grid">')
        parts.append(figures.draw(_cost_figure(candidates, "seconds", "Seconds to the target"), "seconds"))
        parts.append(figures.draw(_cost_figure(candidates, "steps", "Steps to the target"), "steps"))
        parts.append("</div>")
    if runs:
        parts += [heading("Returns"), figures.draw(returns_figure(runs, _AXES, by="n_envs"), "returns")]
    held = "batch size" if plan.hold == "batch" else "n_steps"
    machine = f"{plan.about['device_name']}, {plan.about['cpu_count']} cores, {plan.about['platform']}"
    parts.append(paragraphs([f"Target return {plan.target:g}; the same {held} for every n_envs.", machine]))
    path = folder / "study.html"
    write_text(path, page(f"{env_name}: n_envs by time to a return of {plan.target:g}", *parts))
    return path


def _rows(candidates: Sequence[Candidate]) -> list[tuple[str, ...]]:
    return [
        (
            f"{s.n_envs:,}",
            f"{s.reached} of {s.tried}" + (f", {len(s.failures)} failed" if s.failures else ""),
            f"{s.n_steps:,}",
            format_estimate(s.seconds, ",.1f"),
            format_estimate(s.steps, ",.0f"),
            format_estimate(s.updates, ",.0f"),
            "-" if math.isnan(s.sps) else f"{s.sps:,.0f}",
        )
        for s in candidates
    ]


def _cost_figure(candidates: Sequence[Candidate], attribute: Literal["seconds", "steps"], title: str) -> go.Figure:
    """Draw a dot per seed, and means with their intervals."""
    figure = go.Figure()
    able = [s for s in candidates if s.reached]
    estimates: list[Estimate] = [getattr(s, attribute) for s in able]
    key = {"seconds": "seconds", "steps": "global_step"}[attribute]
    figure.add_scatter(
        x=[f"{s.n_envs:,}" for s in able for run in s.runs if run.result["ended"] == "target"],
        y=[run.result[key] for s in able for run in s.runs if run.result["ended"] == "target"],
        mode="markers",
        marker={"color": "#bab0ac"},
        name="seeds",
    )
    figure.add_scatter(
        x=[f"{s.n_envs:,}" for s in able],
        y=[e.mean for e in estimates],
        error_y={
            "type": "data",
            "array": [0 if math.isnan(e.high) else e.high - e.mean for e in estimates],
            "arrayminus": [0 if math.isnan(e.low) else e.mean - e.low for e in estimates],
        },
        mode="markers",
        marker={"size": 10, "color": "#4c78a8"},
        name="mean, 95 % interval",
    )
    figure.update_layout(**LAYOUT, title=title, height=340)
    figure.update_xaxes(title="n_envs", type="category")
    figure.update_yaxes(title=attribute, rangemode="tozero")
    return figure
