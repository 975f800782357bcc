"""What `fastppo bench` measured: tables for the terminal, and bench.json, bench.csv, bench.html."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.box import SIMPLE_HEAD
from rich.table import Table

from fastppo.analysis.bench import PARTS, Point, verdict
from fastppo.analysis.html import LAYOUT, PHASE_COLORS, Figures, heading, items, paragraphs, table
from fastppo.analysis.html import page as html_page
from fastppo.runtime.files import write_json

_SHOWN = ("n_steps", "update_epochs", "n_minibatches", "network", "hidden_sizes", "compile", "device", "workers")

_PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log", "other")


def _parts(points: Sequence[Point]) -> list[str]:
    """What is told apart: environments and acting are one where they were recorded as one graph."""
    recorded = any(p.phases.get("rollout", 0.0) > 0 for p in points)
    return [*(["rollout"] if recorded else []), *PARTS]


def tables(points: Sequence[Point]) -> list[Table]:
    """Speed with shares of the time, and what each part reaches alone; a failed point is a row with its reason."""
    narrow: Any = {"title_justify": "left", "box": SIMPLE_HEAD, "show_edge": False, "padding": (0, 1, 0, 0)}
    speed = Table(title="training", caption="low-high: quartiles over iterations", caption_justify="left", **narrow)
    parts = _parts(points)
    for name in ("n_envs", "how", "steps/s", "low-high", *parts, "other", "MB"):
        speed.add_column(name, justify="left" if name == "how" else "right")
    alone = Table(title="each part alone, steps/s; and what came before", **narrow)
    for name in ("n_envs", "how", *parts, "set-up s", "compile s", "threads"):
        alone.add_column(name, justify="left" if name == "how" else "right")
    for p in points:
        head = (f"{p.n_envs:,}", p.vectorization)
        if p.failure:
            speed.add_row(*head, "failed")
            continue
        shares = [f"{p.phases[part]:.0%}" if p.phases.get(part) else "-" for part in parts]
        rest = f"{1 - sum(p.phases.get(part, 0.0) for part in parts):.0%}"
        speed.add_row(
            *head, f"{p.sps:,.0f}", f"{_short(p.sps_low)}-{_short(p.sps_high)}", *shares, rest, f"{p.memory_mb:,.0f}"
        )
        ceilings = [_short(p.ceilings[part]) if part in p.ceilings else "-" for part in parts]
        alone.add_row(*head, *ceilings, f"{p.setup_seconds:.1f}", f"{p.compile_seconds:.1f}", str(p.config["threads"]))
    return [speed, alone] if alone.rows else [speed]


def write_files(folder: Path, env_name: str, points: Sequence[Point], about: dict[str, Any]) -> Path:
    """Write what there is so far; returns the page.

    Args:
        folder: of the bench.
        env_name: what was trained on.
        points: measured so far.
        about: machine and versions, as `system_info` gives them.
    """
    values = [dataclasses.asdict(p) | {"verdict": verdict(p, points)} for p in points]
    write_json(folder / "bench.json", {"env": env_name, "points": values, "about": about})
    _write_csv(folder / "bench.csv", points)
    lines = [f"{about['device_name']}, {about['cpu_count']} cores, {about['platform']}"]
    good = [p for p in points if not p.failure]
    if good:
        setting = {name: good[0].config[name] for name in _SHOWN if good[0].config[name] is not None}
        lines.insert(0, ", ".join(f"{name} {value}" for name, value in setting.items()))
    path = folder / "bench.html"
    path.write_text(page(f"{env_name}: training speed", points, lines), encoding="utf-8")
    return path


def _write_csv(path: Path, points: Sequence[Point]) -> None:
    """One line for each point; nested figures as columns of their own."""
    rows = []
    for p in points:
        row: dict[str, Any] = {"n_envs": p.n_envs, "vectorization": p.vectorization, "failure": p.failure}
        for name in ("sps", "sps_low", "sps_high", "iterations", "iteration_seconds"):
            row[name] = getattr(p, name)
        row |= {f"share_{phase}": share for phase, share in p.phases.items()}
        row |= {f"ceiling_{part}": sps for part, sps in p.ceilings.items()}
        for name in ("setup_seconds", "compile_seconds", "memory_mb", "peak_mb", "planned_mb"):
            row[name] = getattr(p, name)
        rows.append(row | {"threads": p.config.get("threads"), "verdict": verdict(p, points)})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def page(title: str, points: Sequence[Point], about: Sequence[str]) -> str:
    """One self-contained HTML page: speed over n_envs, where the time of a step goes, the verdicts.

    Args:
        title: of the page.
        points: in the order in which they were measured.
        about: lines on settings and machine.
    """
    good = [p for p in points if not p.failure]
    figures = [_speed(good), _phases(good)] if good else []
    drawing = Figures()
    parts = _parts(points)
    head = ("n_envs", "how", "steps/s", *(f"{part} alone" for part in parts), "MB")
    rows = []
    for p in points:
        alone = (f"{p.ceilings[part]:,.0f}" if part in p.ceilings else "-" for part in parts)
        figures_of = (f"{p.sps:,.0f}", *alone, f"{p.memory_mb:,.0f}") if not p.failure else ("failed", *alone, "-")
        rows.append((f"{p.n_envs:,}", p.vectorization, *figures_of))
    return html_page(
        title,
        paragraphs(about),
        *map(drawing.draw, figures),
        table(head, rows),
        heading("What limits each"),
        items((f"n_envs {p.n_envs}, {p.vectorization}", verdict(p, points)) for p in points),
    )


def _speed(points: Sequence[Point]) -> go.Figure:
    figure = go.Figure()
    for name in dict.fromkeys(p.vectorization for p in points):
        line = sorted((p for p in points if p.vectorization == name), key=lambda p: p.n_envs)
        figure.add_scatter(
            x=[p.n_envs for p in line],
            y=[p.sps for p in line],
            error_y={
                "type": "data",
                "array": [p.sps_high - p.sps for p in line],
                "arrayminus": [p.sps - p.sps_low for p in line],
            },
            name=name,
            mode="lines+markers",
            hovertemplate="n_envs %{x}<br>%{y:,.0f} steps/s",
        )
    sizes = sorted({p.n_envs for p in points})
    figure.update_layout(title="Training speed over n_envs", **LAYOUT)
    figure.update_xaxes(title="n_envs", type="log", tickvals=sizes, ticktext=[f"{n:,}" for n in sizes])
    figure.update_yaxes(title="steps per second", rangemode="tozero", tickformat=",")
    return figure


def _phases(points: Sequence[Point]) -> go.Figure:
    figure = go.Figure()
    labels = [[f"{p.n_envs:,}" for p in points], [p.vectorization for p in points]]
    for phase in _PHASES:
        share = [p.phases.get(phase, 1 - sum(p.phases.values())) for p in points]
        figure.add_bar(
            x=labels,
            y=[s / p.sps * 1e6 for s, p in zip(share, points, strict=True)],
            customdata=share,
            name=phase,
            marker_color=PHASE_COLORS[phase],
            hovertemplate="%{y:.2f} us, %{customdata:.0%}",
        )
    figure.update_layout(title="Where an environment step's time goes", barmode="stack", **LAYOUT)
    figure.update_yaxes(title="microseconds per step")
    return figure


def _short(rate: float) -> str:
    """123456 as 123k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{unit}" if rate < 999.5 * size else f"{rate / size:.0f}{unit}"
    return f"{rate:.0f}"
