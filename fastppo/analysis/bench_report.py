"""Results of `fastppo bench` as tables for the terminal and as bench.json, bench.csv and bench.html."""

from __future__ import annotations

import csv
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from fastppo.analysis.bench import PARTS, Point, conclusion, verdict
from fastppo.analysis.html import LAYOUT, PHASE_COLORS, Figures, heading, items, paragraphs, table
from fastppo.analysis.html import page as html_page
from fastppo.analysis.terminal import narrow_table
from fastppo.config import shown
from fastppo.runtime.files import write_json

_SETTINGS = ("n_steps", "update_epochs", "n_minibatches", "network", "hidden_sizes", "compile", "device", "workers")
_MEMORY = ("memory", "memory_size", "segment_length")
_PHASES = ("env", "act", "store", "rollout", "advantages", "update", "log", "other")


def tables(points: Sequence[Point]) -> list[Table]:
    """Return a table of speed and shares of the time, and one of the parts alone if any point was measured."""
    speed = narrow_table("training", caption="low-high: quartiles over iterations")
    alone = narrow_table("steps/s of each part alone, and start-up")
    parts = _parts(points)
    for rows, columns in (
        (speed, ("steps/s", "low-high", *parts, "other", "MB")),
        (alone, (*parts, "set-up s", "compile s", "threads")),
    ):
        rows.add_column("n_envs", justify="right")
        rows.add_column("vectorization")
        for name in columns:
            rows.add_column(name, justify="right")
    for p in points:
        head = (f"{p.n_envs:,}", p.vectorization)
        if p.failure:
            speed.add_row(*head, "failed")
            continue
        quartiles = f"{_short(p.sps_low)}-{_short(p.sps_high)}"
        shares = [f"{p.phases[part]:.0%}" if p.phases.get(part) else "-" for part in parts]
        other = f"{1 - sum(p.phases.get(part, 0.0) for part in parts):.0%}"
        speed.add_row(*head, f"{p.sps:,.0f}", quartiles, *shares, other, f"{p.memory_mb:,.0f}")
        ceilings = [_short(p.ceilings[part]) if part in p.ceilings else "-" for part in parts]
        alone.add_row(*head, *ceilings, f"{p.setup_seconds:.1f}", f"{p.compile_seconds:.1f}", str(p.config["threads"]))
    return [speed, alone] if alone.rows else [speed]


def _parts(points: Sequence[Point]) -> list[str]:
    """Return the parts that have a column; "rollout" is environments and acting in one CUDA graph."""
    graph = any(p.phases.get("rollout", 0.0) > 0 for p in points)
    return ["rollout", *PARTS] if graph else list(PARTS)


def write_files(folder: Path, env_name: str, points: Sequence[Point], about: dict[str, Any]) -> Path:
    """Write bench.json, bench.csv and bench.html; return the path of the page.

    Args:
        folder: folder of the bench.
        env_name: environment of the bench.
        points: points measured so far.
        about: machine and versions, from `system_info`.
    """
    values = [dataclasses.asdict(p) | {"verdict": verdict(p, points)} for p in points]
    write_json(folder / "bench.json", {"env": env_name, "points": values, "about": about})
    _write_csv(folder / "bench.csv", points)
    lines = [f"{about['device_name']}, {about['cpu_count']} cores, {about['platform']}"]
    measured = [p for p in points if not p.failure]
    if measured:
        config = measured[0].config
        names = (*_SETTINGS, *(_MEMORY if config.get("memory", "none") != "none" else ()))
        lines.insert(0, ", ".join(f"{name} {shown(config[name])}" for name in names if config[name] is not None))
    path = folder / "bench.html"
    path.write_text(page(f"{env_name}: training speed", points, lines), encoding="utf-8")
    return path


def _write_csv(path: Path, points: Sequence[Point]) -> None:
    """Write a row per point, with a column for each share and ceiling."""
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
    """Return a self-contained HTML page with speed, time by phase and verdicts.

    Args:
        title: title of the page.
        points: points in the order of measurement.
        about: lines on settings and machine.
    """
    measured = [p for p in points if not p.failure]
    figures = Figures()
    drawn = [figures.draw(figure) for figure in (_speed(measured), _phases(measured))] if measured else []
    parts = _parts(points)
    rows = []
    for p in points:
        alone = (f"{p.ceilings[part]:,.0f}" if part in p.ceilings else "-" for part in parts)
        speed, memory = ("failed", "-") if p.failure else (f"{p.sps:,.0f}", f"{p.memory_mb:,.0f}")
        rows.append((f"{p.n_envs:,}", p.vectorization, speed, *alone, memory))
    return html_page(
        title,
        paragraphs(about),
        *drawn,
        table(("n_envs", "vectorization", "steps/s", *(f"{part} alone" for part in parts), "MB"), rows),
        paragraphs([conclusion(points)] if measured else []),
        heading("Bottlenecks"),
        items((f"n_envs {p.n_envs}, {p.vectorization}", verdict(p, points)) for p in points),
    )


def _speed(points: Sequence[Point]) -> go.Figure:
    """Draw steps per second over n_envs, with quartiles, a line per vectorization."""
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
    figure.update_layout(title="Training speed by n_envs", **LAYOUT)
    figure.update_xaxes(title="n_envs", type="log", tickvals=sizes, ticktext=[f"{n:,}" for n in sizes])
    figure.update_yaxes(title="steps/s", rangemode="tozero")
    return figure


def _phases(points: Sequence[Point]) -> go.Figure:
    """Draw microseconds per environment step by phase, a bar per point."""
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
            hovertemplate="%{y:.2f} us per step, %{customdata:.0%}",
        )
    figure.update_layout(title="Time per environment step by phase", barmode="stack", **LAYOUT)
    figure.update_yaxes(title="us per step")
    return figure


def _short(rate: float) -> str:
    """Return a rate with a unit: 123456 as 123k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{unit}" if rate < 999.5 * size else f"{rate / size:.0f}{unit}"
    return f"{rate:.0f}"
