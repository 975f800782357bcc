"""What `fastppo study` found: a table for the terminal, and study.html."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastppo.analysis.html import LAYOUT, Figures, heading, page, paragraphs, table
from fastppo.analysis.report import returns_figure
from fastppo.analysis.study import Estimate, Plan, Setting, recommend

_HEAD = ("n_envs", "reached", "n_steps", "seconds to target", "steps to target", "updates", "steps/s")
_AXES = {"environment steps": "global_step", "updates": "iteration", "seconds": "seconds"}


def terminal_table(settings: Sequence[Setting]) -> Table:
    """One row for each n_envs, with 95 % intervals."""
    shown = Table(
        title="to the target; mean over seeds that reached it (95 % interval)",
        title_justify="left",
        box=SIMPLE_HEAD,  # narrow, so that no interval is cut at 80 columns
        show_edge=False,
        padding=(0, 1, 0, 0),
    )
    for name in _HEAD:
        shown.add_column(name.replace(" to ", " to\n"), justify="right")
    for row in _rows(settings):
        shown.add_row(*(cell.replace(" (", "\n(") for cell in row))
    return shown


def write_page(folder: Path, env_name: str, plan: Plan, settings: Sequence[Setting]) -> Path:
    """Write study.html into `folder`; returns it."""
    drawing = Figures()
    records = [r for s in settings for r in s.runs if len(r)]
    shared = "the batch" if plan.hold == "batch" else "n_steps"
    failures = [f"n_envs {s.n_envs}, seed {seed} failed: {text}" for s in settings for seed, text in s.failures.items()]
    parts = [paragraphs([recommend(settings, plan.target), *failures]), table(_HEAD, _rows(settings))]
    if any(s.reached for s in settings):
        parts.append('<div class="grid">')
        parts.append(drawing.draw(_bars(settings, "seconds", "Seconds to the target"), "seconds"))
        parts.append(drawing.draw(_bars(settings, "steps", "Steps to the target"), "steps"))
        parts.append("</div>")
    if records:
        parts += [heading("Returns"), drawing.draw(returns_figure(records, _AXES, by="n_envs"), "returns")]
    machine = f"{plan.about['device_name']}, {plan.about['cpu_count']} cores, {plan.about['platform']}"
    parts.append(paragraphs([f"Target {plan.target:g}; {shared} held fixed.", machine]))
    path = folder / "study.html"
    path.write_text(page(f"{env_name}: which n_envs reaches {plan.target:g} soonest", *parts), encoding="utf-8")
    return path


def _rows(settings: Sequence[Setting]) -> list[tuple[str, ...]]:
    return [
        (
            f"{s.n_envs:,}",
            f"{s.reached} of {s.tried}" + (f", {len(s.failures)} failed" if s.failures else ""),
            f"{s.n_steps:,}",
            _text(s.seconds, ",.1f"),
            _text(s.steps, ",.0f"),
            _text(s.updates, ",.0f"),
            "-" if math.isnan(s.sps) else f"{s.sps:,.0f}",
        )
        for s in settings
    ]


def _text(estimate: Estimate, form: str) -> str:
    if math.isnan(estimate.mean):
        return "-"
    mean = format(estimate.mean, form)
    return mean if math.isnan(estimate.low) else f"{mean} ({format(estimate.low, form)}-{format(estimate.high, form)})"


def _bars(settings: Sequence[Setting], what: str, title: str) -> go.Figure:
    """Each seed as a point, means with their intervals."""
    figure = go.Figure()
    able = [s for s in settings if s.reached]
    estimates: list[Estimate] = [getattr(s, what) for s in able]
    key = {"seconds": "seconds", "steps": "global_step"}[what]
    figure.add_scatter(
        x=[f"{s.n_envs:,}" for s in able for r in s.runs if r.result["ended"] == "target"],
        y=[r.result[key] for s in able for r in s.runs if r.result["ended"] == "target"],
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
    figure.update_yaxes(rangemode="tozero")
    return figure
