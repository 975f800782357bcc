"""`fastppo report`: one page on one or several runs, from what lies in their folders."""

from __future__ import annotations

import html
import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import plotly.graph_objects as go
import torch

from fastppo.analysis.html import LAYOUT, PHASE_COLORS, Figures, heading, items, page, paragraphs, table
from fastppo.analysis.run_data import RunData, read_runs, thin
from fastppo.errors import ConfigError
from fastppo.functional.gae import gae_doubling
from fastppo.monitoring.update_samples import ROWS, TRAJECTORY, UpdateSample
from fastppo.runtime.clock import PHASES

_Array = np.ndarray[Any, Any]

_COLORS = ("#4c78a8", "#f58518", "#54a24b", "#b279a2", "#e45756", "#72b7b2", "#9d755d", "#eeca3b", "#ff9da6", "#bab0ac")
AXES = {"environment steps": "global_step", "episodes": "episodes", "seconds": "seconds"}
_Points = tuple[list[float | None], list[float | None]]
_EPISODES = 3000  # shown for each run
_EPISODES_OF = 4  # runs at most
_BAND = 200  # points of a mean over seeds
_STEPS = 200  # of a trajectory
_SAMPLES = 60  # updates in a page
_LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)


class _Curves(NamedTuple):
    """One small figure: its title, its lines (tag, what to call it), and what it is held against."""

    title: str
    lines: tuple[tuple[str, str], ...]
    band: tuple[float, float] | None = None
    log: bool = False

    @property
    def name(self) -> str:
        """Its id in the page."""
        return self.lines[0][0].rpartition("/")[2]


_DIAGNOSTICS = (
    _Curves("Policy loss", (("losses/policy_loss", ""),)),
    _Curves("Value loss", (("losses/value_loss", ""),), log=True),
    _Curves("Entropy", (("losses/entropy", ""),)),
    _Curves("KL from the rollout's policy", (("losses/approx_kl", "k3"), ("losses/old_approx_kl", "k1"))),
    _Curves("Clip fraction (band: 5 to 30 %)", (("losses/clipfrac", ""),), (0.05, 0.3)),
    _Curves("Explained variance (band: 0.5 to 1; from -1)", (("losses/explained_variance", ""),), (0.5, 1.0)),
    _Curves("Learning rate", (("charts/learning_rate", ""),)),
    _Curves("Clip range", (("charts/clip_coef", ""),)),
    _Curves("Gradient norm before clipping", (("losses/grad_norm", ""), ("charts/max_grad_norm", "limit")), log=True),
    _Curves("Epochs run", (("losses/epochs_run", ""),)),
)


def report(runs: Sequence[Path], output: Path) -> list[RunData]:
    """Write the page on `runs` to `output`; returns what was read.

    Raises:
        CheckpointError: one of them is no run folder.
        ConfigError: none is given, one twice, or the page can't be written.
    """
    if not runs:
        raise ConfigError("report: no run is named; name one run folder or several.")
    for i, run in enumerate(runs):
        if run.resolve() in {other.resolve() for other in runs[:i]}:
            raise ConfigError(f"report: {run} is named twice; name each run once.")
    records = read_runs(runs)
    try:
        output.write_text(report_page(records), encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"report: {output} can't be written ({error.strerror}).") from None
    return records


def report_page(records: Sequence[RunData]) -> str:
    """The page, as HTML."""
    names = list(dict.fromkeys(str(r.config.get("env_id")) for r in records))
    what = f"{len(records)} runs" if len(records) > 1 else records[0].label
    drawing = Figures()
    parts = [
        _summary(records),
        _health(records),
        heading("Returns"),
        _plot(drawing.draw(returns_figure(records), "returns")),
        heading("Diagnostics"),
        f'<div class="grid">{"".join(drawing.draw(_curves(records, c), c.name) for c in _DIAGNOSTICS)}</div>',
        heading("Speed"),
        _plot(drawing.draw(_speed(records), "speed")),
        f'<div class="grid">{"".join(drawing.draw(_phases(r)) for r in records if len(r))}</div>',
        *_update_section(records, drawing),
        heading("Settings and results"),
        f'<div class="settings">{_settings(records)}</div>',
    ]
    return page(f"{', '.join(names)}: {what}", *parts)


def _plot(drawn: str) -> str:
    return f'<div class="plot">{drawn}</div>'


def _summary(records: Sequence[RunData]) -> str:
    head = ("run", "ended", "mean return", "episodes", "steps", "steps/s", "seconds")
    rows, troubles = [], []
    for r in records:
        last = {name: row[-1] if len(row) else math.nan for name, row in r.columns.items()}
        rows.append(
            (
                r.label,
                str(r.result.get("ended", "-")),
                _figure(last.get("mean_return", math.nan), ".2f"),
                _figure(last.get("episodes", math.nan), ",.0f"),
                _figure(last.get("global_step", math.nan), ",.0f"),
                _figure(last.get("charts/sps_steady", math.nan), ",.0f"),
                _figure(last.get("seconds", math.nan), ".1f"),
            )
        )
        troubles += [f"{r.label}: {text}" for text in r.troubles()]
    return table(head, rows) + paragraphs(troubles)


def _figure(value: float, form: str) -> str:
    return format(value, form) if math.isfinite(value) else "-"


def _health(records: Sequence[RunData]) -> str:
    parts = [heading("Health")]
    for r in records:
        if not len(r):
            continue
        lines = []
        for finding, first, latest in r.findings:
            name = f"{r.label}, {finding.name}" if len(records) > 1 else finding.name
            lines.append((name, f"{r.lasted(first, latest)}: {finding.evidence} {finding.remedy}"))
        parts.append(items(lines) if lines else paragraphs([f"{r.label}: no rule fired."]))
    return "".join(parts)


def _groups(records: Sequence[RunData]) -> list[list[RunData]]:
    """Runs that differ by their seed alone, together."""
    by_setting: dict[str, list[RunData]] = {}
    for r in records:
        by_setting.setdefault(r.setting, []).append(r)
    return list(by_setting.values())


def returns_figure(records: Sequence[RunData], axes: Mapping[str, str] = AXES, by: str = "") -> go.Figure:
    """Returns of episodes with their moving average.

    Args:
        records: the runs; those that differ by their seed alone get a mean and a band.
        axes: what buttons choose x from: what to call it, and its tag.
        by: a setting that groups of seeds are named by, each run a thin line of its group; empty: runs have names.
    """
    figure, alone = go.Figure(), len(records) == 1
    views: list[list[_Points]] = []  # of each trace, its points over each of the axes

    def add(points: list[_Points], **options: Any) -> None:  # noqa: ANN401 - plotly's own
        figure.add_scatter(x=points[0][0], y=points[0][1], **options)
        views.append(points)

    for r, color in zip(records, itertools.cycle(_COLORS), strict=False) if not by else ():
        picked = np.linspace(0, len(r.returns) - 1, min(len(r.returns), _EPISODES)).astype(int)
        if len(records) <= _EPISODES_OF:
            add(
                [(_plain(r.return_places[tag][picked]), _plain(r.returns[picked])) for tag in axes.values()],
                mode="markers",
                marker={"size": 3, "color": color, "opacity": 0.35},
                name="episodes" if alone else f"{r.label}: episodes",
                visible=True if alone else "legendonly",
            )
        mean = _plain(thin(r.column("mean_return")))
        add(
            [(_plain(thin(r.column(tag))), mean) for tag in axes.values()],
            mode="lines",
            line={"color": color, "width": 2 if alone else 1.2},
            name="mean of the last 100" if alone else r.label,
        )
    for group, color in zip(_groups(records), itertools.cycle(_COLORS), strict=False):
        named = f"{by} {group[0].config.get(by)}, " if by else ""
        name = f"{named}mean of {len(group)} seeds, +- 1 standard deviation"
        for r in group if by else ():
            mean = _plain(thin(r.column("mean_return")))
            add(
                [(_plain(thin(r.column(tag))), mean) for tag in axes.values()],
                mode="lines",
                line={"color": color, "width": 0.7},
                name=f"{by} {r.config.get(by)}" if len(group) == 1 else r.label,
                showlegend=len(group) == 1,
                legendgroup=name,
            )
        if len(group) > 1 and all(map(len, group)):
            bands = [_band(group, tag) for tag in axes.values()]
            add(
                [(_around(x, x), _around(y + d, y - d)) for x, y, d in bands],
                fill="toself",
                mode="none",
                fillcolor=_faint(color),
                hoverinfo="skip",
                showlegend=False,
                legendgroup=name,
            )
            add(
                [(_plain(x), _plain(y)) for x, y, _ in bands],
                mode="lines",
                line={"color": color, "width": 3},
                name=name,
                legendgroup=name,
            )
    buttons = [
        {
            "label": name,
            "method": "update",
            "args": [{"x": [v[i][0] for v in views], "y": [v[i][1] for v in views]}, {"xaxis.title.text": name}],
        }
        for i, name in enumerate(axes)
    ]
    place = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
    figure.update_layout(**LAYOUT, title="Reward per episode", updatemenus=[{"buttons": buttons, **place}])
    entries = sum(trace.showlegend is not False for trace in figure.data)
    figure.update_layout(margin_t=90, height=450 + 20 * max(0, entries // 2 - 3))  # a long legend takes from the plot
    figure.update_xaxes(title=next(iter(axes)))
    figure.update_yaxes(title="return")
    return figure


def _band(group: Sequence[RunData], tag: str) -> tuple[_Array, _Array, _Array]:
    """Over the range of `tag` that all runs have: places, mean over runs, standard deviation over runs."""
    xs = [r.column(tag) for r in group]
    grid = np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), _BAND)
    lines = np.stack([np.interp(grid, x, r.column("mean_return")) for x, r in zip(xs, group, strict=True)])
    return grid, lines.mean(0), lines.std(0, ddof=1)


def _around(there: _Array, back: _Array) -> list[float | None]:
    return _plain(np.concatenate((there, back[::-1])))


def _curves(records: Sequence[RunData], what: _Curves) -> go.Figure:
    figure, alone = go.Figure(), len(records) == 1
    if what.band is not None:
        figure.add_hrect(y0=what.band[0], y1=what.band[1], fillcolor="#54a24b", opacity=0.12, line_width=0)
    lines = (*what.lines, ("charts/kl_limit", "limit")) if what.title.startswith("KL") else what.lines
    for r, color in zip(records, itertools.cycle(_COLORS), strict=False):
        steps = _plain(thin(r.column("global_step")))
        for k, (tag, name) in enumerate(lines):
            if np.isfinite(r.column(tag)).any():
                figure.add_scatter(
                    x=steps,
                    y=_plain(thin(r.column(tag))),
                    mode="lines" if len(r) > 1 else "markers",
                    line={"color": _COLORS[k] if alone else color, "dash": ("solid", "dot", "dash")[k], "width": 1.5},
                    name=" ".join(word for word in ("" if alone else r.label, name) if word),
                )
    figure.update_layout(**LAYOUT, title=what.title, height=300, showlegend=len(figure.data) > 1)
    figure.update_xaxes(title="environment steps")
    if what.name == "explained_variance":
        figure.update_yaxes(range=[-1.05, 1.05])  # what lies below says no more, and would hide the rest
    if what.log:
        figure.update_yaxes(type="log")
    return figure


def _speed(records: Sequence[RunData]) -> go.Figure:
    figure = go.Figure()
    for r, color in zip(records, itertools.cycle(_COLORS), strict=False):
        figure.add_scatter(
            x=_plain(thin(r.column("global_step"))),
            y=_plain(thin(r.column("charts/sps_window"))),
            mode="lines",
            line={"color": color},
            name=r.label,
        )
    figure.update_layout(**LAYOUT, title="Steps per second, of the last 10 iterations", showlegend=len(records) > 1)
    figure.update_xaxes(title="environment steps")
    figure.update_yaxes(title="steps/s", rangemode="tozero", tickformat=",")
    return figure


def _phases(r: RunData) -> go.Figure:
    """Stacked milliseconds of each phase of an iteration."""
    figure = go.Figure()
    steps = _plain(thin(r.column("global_step")))
    for phase in PHASES:
        row = r.column(f"time/{phase}")
        if np.nansum(row) > 0:
            figure.add_scatter(
                x=steps,
                y=_plain(thin(row) * 1e3),
                mode="lines",
                line={"width": 0.5, "color": PHASE_COLORS.get(phase)},
                stackgroup="phases",
                name=phase,
            )
    figure.update_layout(**LAYOUT, title=f"{r.label}: where an iteration's time goes", height=340)
    figure.update_xaxes(title="environment steps")
    figure.update_yaxes(title="ms")
    return figure


def _settings(records: Sequence[RunData]) -> str:
    """Every setting and result; of several runs, first those in which they differ."""
    rows: dict[str, list[str]] = {}
    for i, r in enumerate(records):
        facts = r.config | {f"result: {k}": _brief(v) for k, v in r.result.items() if k != "run_dir"}
        facts |= {"machine": f"{r.about.get('device_name')}, {r.about.get('cpu_count')} cores"}
        versions = r.about.get("versions")
        facts |= {"versions": ", ".join(f"{k} {v}" for k, v in versions.items()) if isinstance(versions, dict) else ""}
        facts |= {"commit": r.about.get("git_commit"), "started": r.about.get("started")}
        notes = r.about.get("notes")
        facts |= {"notes": " ".join(map(str, notes)) if isinstance(notes, list) else ""}
        for name, value in facts.items():
            text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
            rows.setdefault(name, [""] * len(records))[i] = text
    ordered = sorted(rows.items(), key=lambda item: len(set(item[1])) == 1)
    return table(("setting", *(r.label for r in records)), ([name, *values] for name, values in ordered))


def _brief(value: object) -> object:
    """Numbers as people read them."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_brief(v)}" for k, v in value.items())
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _update_section(records: Sequence[RunData], drawing: Figures) -> Iterator[str]:
    """Ratios, the surrogate and advantages of single updates, chosen by two sliders."""
    yield heading("Inside the update")
    data = [[_sample_data(r, s) for s in _spread(r.samples, max(4, _SAMPLES // len(records)))] for r in records]
    labels = [r.label for r, samples in zip(records, data, strict=True) if samples]
    data = [samples for samples in data if samples]
    if not data:
        yield paragraphs(["No update was looked into (--record-ratios 0), or the run ended before one."])
        return
    yield paragraphs(
        [
            f"Up to {ROWS} rows of a rollout, judged before the first epoch (0) and after each. Advantages are as "
            "the update sees them, normalised over the whole rollout. A row is clipped where its gradient is: ratio "
            "over the range with a positive advantage, under it with a negative one."
        ]
    )
    options = "".join(f'<option value="{i}">{html.escape(label)}</option>' for i, label in enumerate(labels))
    yield (
        f'<div class="sliders"><label>run <select id="run">{options}</select></label>'
        '<label><span id="update-text"></span><input id="update" type="range" min="0" value="0"></label>'
        '<label><span id="epoch-text"></span><input id="epoch" type="range" min="0" value="0"></label></div>'
    )
    yield '<div class="grid" id="inside">'
    for name, figure in _update_figures().items():
        yield drawing.draw(figure, name)
    samples = json.dumps(data).replace("<", "\\u003c")
    yield f'</div><script type="application/json" id="samples">{samples}</script>'
    yield f"<script>{_SLIDERS}</script>"


def _spread(samples: Sequence[UpdateSample], most: int) -> list[UpdateSample]:
    """At most so many of them, from first to last."""
    picked = np.linspace(0, len(samples) - 1, min(len(samples), most)).round().astype(int)
    return [samples[i] for i in picked]


def _sample_data(r: RunData, sample: UpdateSample) -> dict[str, Any]:
    at = np.flatnonzero(r.column("iteration") == sample.iteration)
    return {
        "update": sample.iteration,
        "step": int(r.column("global_step")[at[0]]) if len(at) else None,
        "clip": sample.coefs["clip_coef"],
        "ratios": [_plain(row) for row in sample.ratios],
        "advantages": _plain(sample.advantages),
        "gae": [[name, _plain(row)] for name, row in advantages_by_lambda(sample).items()],
    }


def advantages_by_lambda(sample: UpdateSample) -> dict[str, _Array]:
    """Advantages [T'] of the trajectory for several lambdas, the run's own marked; T' of its first steps at most."""
    own = sample.coefs["gae_lambda"]
    lambdas = sorted({*_LAMBDAS, round(own, 6)})
    rows = [torch.as_tensor(sample.trajectory[name]).unsqueeze(1).expand(-1, len(lambdas)) for name in TRAJECTORY[:5]]
    rewards, values, next_values, terminated, done = rows
    gamma = torch.tensor(sample.coefs["gamma"])
    found, _ = gae_doubling(rewards, values, next_values, terminated.bool(), done.bool(), gamma, torch.tensor(lambdas))
    names = [f"lambda {x:g}" + (" (the run's)" if x == round(own, 6) else "") for x in lambdas]
    return dict(zip(names, found[:_STEPS].T.numpy(), strict=True))


def _update_figures() -> dict[str, go.Figure]:
    """Empty figures by id; the script fills them."""
    figures = {name: go.Figure() for name in ("ratios", "scatter", "surrogate", "gae")}
    bins = {"start": 0, "end": 3, "size": 0.02}
    figures["ratios"].add_histogram(x=[], xbins=bins, autobinx=False, marker_color=_COLORS[0], name="ratio")
    figures["ratios"].update_layout(title="Ratio pi_new / pi_old, and 1 +- clip")
    figures["ratios"].update_xaxes(title="ratio")
    for name, color in (("inside", _COLORS[0]), ("clipped", _COLORS[4])):
        figures["scatter"].add_scatter(x=[], y=[], mode="markers", marker={"size": 4, "color": color}, name=name)
    figures["scatter"].update_layout(title="Ratio against advantage")
    figures["scatter"].update_xaxes(title="advantage")
    figures["scatter"].update_yaxes(title="ratio")
    for name, color in (("A > 0", _COLORS[2]), ("A < 0", _COLORS[1])):
        figures["surrogate"].add_scatter(x=[], y=[], mode="lines", line={"color": color}, name=name)
        marker = {"size": 6, "color": color, "opacity": 0.3}
        figures["surrogate"].add_scatter(x=[], y=[], mode="markers", marker=marker, name=f"rows with {name}")
    figures["surrogate"].update_layout(title="The objective of a row, per |A|")
    figures["surrogate"].update_xaxes(title="ratio")
    figures["surrogate"].update_yaxes(title="min(r A, clip(r) A) / |A|")
    for k in range(len(_LAMBDAS) + 1):
        figures["gae"].add_scatter(x=[], y=[], mode="lines", line={"color": _COLORS[k], "width": 1.5})
    figures["gae"].update_layout(title="Advantages of one environment's steps, by lambda")
    figures["gae"].update_xaxes(title="step of the rollout")
    for figure in figures.values():
        figure.update_layout(**LAYOUT, height=380)
    return figures


def _plain(values: _Array) -> list[float | None]:
    """Numbers of five digits, as short as JSON can have them."""
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values.tolist()]


def _faint(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"


_SLIDERS = """
const samples = JSON.parse(document.getElementById("samples").textContent);
const [run, update, epoch, inside] = ["run", "update", "epoch", "inside"].map(id => document.getElementById(id));
let seen = false;
function chosen() { return samples[run.value][update.value]; }
function draw() {
  const s = chosen(), r = s.ratios[epoch.value], a = s.advantages, c = s.clip;
  const step = s.step === null ? "" : `, at ${s.step.toLocaleString("en")} steps`;
  document.getElementById("update-text").textContent = `update ${s.update}${step}`;
  document.getElementById("epoch-text").textContent = `after epoch ${epoch.value} of ${s.ratios.length - 1}`;
  if (!seen) return;
  const clipped = r.map((x, i) => a[i] >= 0 ? x > 1 + c : x < 1 - c);
  const pick = (xs, keep) => xs.filter((_, i) => keep(i));
  const limits = [1 - c, 1 + c];
  const across = limits.map(x => ({type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: {dash: "dash"}}));
  const along = limits.map(y => ({type: "line", y0: y, y1: y, x0: 0, x1: 1, xref: "paper", line: {dash: "dash"}}));
  const reach = Math.max(2 * c, ...r.filter(x => x !== null).map(x => Math.abs(x - 1))) * 1.1;
  const range = [Math.max(0, 1 - reach), 1 + reach];
  const bins = {start: 0, end: 1 + reach, size: (range[1] - range[0]) / 50};
  Plotly.update("ratios", {x: [r], xbins: bins}, {shapes: across, "xaxis.range": range});
  Plotly.update("scatter", {x: [pick(a, i => !clipped[i]), pick(a, i => clipped[i])],
    y: [pick(r, i => !clipped[i]), pick(r, i => clipped[i])]}, {shapes: along});
  const grid = Array.from({length: 101}, (_, i) => range[0] + (range[1] - range[0]) * i / 100);
  const objective = sign => x => Math.min(x * sign, Math.min(Math.max(x, 1 - c), 1 + c) * sign);
  const up = pick(r, i => a[i] > 0), down = pick(r, i => a[i] < 0);
  Plotly.update("surrogate", {x: [grid, up, grid, down],
    y: [grid.map(objective(1)), up.map(objective(1)), grid.map(objective(-1)), down.map(objective(-1))]},
    {shapes: across, "xaxis.range": range});
  const all = document.getElementById("gae").data.map((_, i) => s.gae[i] || ["", []]);
  Plotly.restyle("gae", {x: all.map(([, y]) => y.map((_, t) => t)), y: all.map(([, y]) => y),
    name: all.map(([name]) => name), showlegend: all.map(([name]) => name !== "")});
}
function choose(at) {
  update.max = samples[run.value].length - 1;
  update.value = at;
  follow();
}
function follow() {
  epoch.max = chosen().ratios.length - 1;
  epoch.value = epoch.max;
  draw();
}
run.oninput = () => choose(samples[run.value].length - 1);
update.oninput = follow;
epoch.oninput = draw;
run.parentElement.hidden = samples.length < 2;
choose(Math.floor((samples[run.value].length - 1) / 2));
whenSeen(inside, () => {
  seen = true;
  inside.querySelectorAll(".figure").forEach(plot);
  draw();
});
"""
