"""What `fastppo bench` measured: tables for the terminal, and bench.json, bench.csv, bench.html."""

from __future__ import annotations

import csv
import dataclasses
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import plotly.graph_objects as go
from rich.table import Table

from fastppo.bench import PARTS, Point, verdict
from fastppo.run_dir import write_json

_SHOWN = ("n_steps", "update_epochs", "n_minibatches", "network", "hidden_sizes", "compile", "device", "workers")

_COLORS = {
    "env": "#4c78a8",
    "act": "#f58518",
    "store": "#eeca3b",
    "advantages": "#b279a2",
    "update": "#54a24b",
    "log": "#9d755d",
    "other": "#bab0ac",
}


def tables(points: Sequence[Point]) -> list[Table]:
    """Speed with shares of the time, and what each part reaches alone; a failed point is a row with its reason."""
    speed = Table(title="training", title_justify="left", caption="low-high: quartiles over iterations")
    for name in ("n_envs", "how", "steps/s", "low-high", "env", "act", "update", "other", "MB"):
        speed.add_column(name, justify="left" if name == "how" else "right")
    alone = Table(title="each part alone, steps/s; and what came before", title_justify="left")
    for name in ("n_envs", "how", *PARTS, "set-up s", "compile s", "threads"):
        alone.add_column(name, justify="left" if name == "how" else "right")
    for p in points:
        head = (f"{p.n_envs:,}", p.vectorization)
        if p.failure:
            speed.add_row(*head, "failed")
            continue
        shares = [f"{p.phases[part]:.0%}" for part in PARTS]
        rest = f"{1 - sum(p.phases[part] for part in PARTS):.0%}"
        speed.add_row(
            *head, f"{p.sps:,.0f}", f"{_short(p.sps_low)}-{_short(p.sps_high)}", *shares, rest, f"{p.memory_mb:,.0f}"
        )
        ceilings = [_short(p.ceilings[part]) for part in PARTS]
        alone.add_row(*head, *ceilings, f"{p.setup_seconds:.1f}", f"{p.compile_seconds:.1f}", str(p.config["threads"]))
    return [speed, alone] if alone.rows else [speed]


def write_files(folder: Path, env_name: str, points: Sequence[Point], about: dict[str, Any]) -> Path:
    """Write what there is so far; returns the page.

    Args:
        folder: of the bench.
        env_name: what was trained on.
        points: measured so far.
        about: machine and versions, as `surroundings` gives them.
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
    # the library once, inside the page, so that it opens without a network
    drawn = [
        figure.to_html(full_html=False, include_plotlyjs=i == 0, config={"responsive": True, "displaylogo": False})
        for i, figure in enumerate(figures)
    ]
    rows = [_row("th", ("n_envs", "how", "steps/s", *(f"{part} alone" for part in PARTS), "MB"))]
    for p in points:
        alone = (f"{p.ceilings[part]:,.0f}" for part in PARTS) if not p.failure else ("-" for _ in PARTS)
        figures_of = (f"{p.sps:,.0f}", *alone, f"{p.memory_mb:,.0f}") if not p.failure else ("failed", *alone, "-")
        rows.append(_row("td", (f"{p.n_envs:,}", p.vectorization, *figures_of)))
    said = "".join(
        f"<li><b>n_envs {p.n_envs}, {html.escape(p.vectorization)}</b>: {html.escape(verdict(p, points))}</li>"
        for p in points
    )
    lines = "".join(f"<p>{html.escape(line)}</p>" for line in about)
    return _PAGE.format(
        title=html.escape(title), about=lines, figures="".join(drawn), rows="".join(rows), verdicts=said
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
    figure.update_layout(title="Training speed over n_envs", **_LAYOUT)
    figure.update_xaxes(title="n_envs", type="log", tickvals=sizes, ticktext=[f"{n:,}" for n in sizes])
    figure.update_yaxes(title="steps per second", rangemode="tozero", tickformat=",")
    return figure


def _phases(points: Sequence[Point]) -> go.Figure:
    figure = go.Figure()
    labels = [[f"{p.n_envs:,}" for p in points], [p.vectorization for p in points]]
    for phase, color in _COLORS.items():
        share = [p.phases.get(phase, 1 - sum(p.phases.values())) for p in points]
        figure.add_bar(
            x=labels,
            y=[s / p.sps * 1e6 for s, p in zip(share, points, strict=True)],
            customdata=share,
            name=phase,
            marker_color=color,
            hovertemplate="%{y:.2f} us, %{customdata:.0%}",
        )
    figure.update_layout(title="Where an environment step's time goes", barmode="stack", **_LAYOUT)
    figure.update_yaxes(title="microseconds per step")
    return figure


def _row(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"


def _short(rate: float) -> str:
    """123456 as 123k."""
    for size, unit in ((1e6, "M"), (1e3, "k")):
        if rate >= size:
            return f"{rate / size:.3g}{unit}" if rate < 999.5 * size else f"{rate / size:.0f}{unit}"
    return f"{rate:.0f}"


_LAYOUT: dict[str, Any] = {
    "template": "plotly_white",
    "margin": {"l": 60, "r": 15, "t": 50, "b": 50},
    "legend": {"orientation": "h", "y": -0.25},
}
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1000px; margin: 0 auto; padding: 1rem; color: #222 }}
h1 {{ font-size: 1.4rem }} h2 {{ font-size: 1.1rem }} p {{ margin: .3rem 0; color: #555; overflow-wrap: anywhere }}
.table {{ overflow-x: auto }} table {{ border-collapse: collapse; margin: 1rem 0 }}
th, td {{ padding: .35rem .6rem; border-bottom: 1px solid #ddd; text-align: right; vertical-align: top }}
td:nth-child(2), th:nth-child(2) {{ text-align: left }} li {{ margin: .4rem 0 }} ul {{ padding-left: 1.2rem }}
</style></head><body>
<h1>{title}</h1>{about}{figures}<div class="table"><table>{rows}</table></div>
<h2>What limits each</h2><ul>{verdicts}</ul>
</body></html>
"""
