"""The section of a report on sampled updates: ratios, clipped objective and advantages, with sliders."""

from __future__ import annotations

import html
import json
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import torch

from fastppo.analysis.figures import plain
from fastppo.analysis.html import COLORS, LAYOUT, Figures, heading, paragraphs
from fastppo.analysis.run_data import RunData
from fastppo.functional.gae import Trajectory, gae_doubling
from fastppo.monitoring.update_samples import ROWS, TRAJECTORY, UpdateSample

_Array = np.ndarray[Any, Any]
_MAX_SAMPLES = 60  # of all runs in a page, but at least 4 of each
_MAX_STEPS = 200  # of a trajectory
_LAMBDAS = (0.0, 0.5, 0.9, 0.95, 1.0)


def update_section(runs: Sequence[RunData], figures: Figures) -> Iterator[str]:
    """Yield the HTML of the section; sliders choose the update and the epoch."""
    yield heading("Sampled updates")
    max_samples = max(4, _MAX_SAMPLES // len(runs))
    data = {run.label: [_sample_data(run, sample) for sample in _spread(run.samples, max_samples)] for run in runs}
    data = {label: samples for label, samples in data.items() if samples}
    if not data:
        yield paragraphs(["No update was sampled: the run used --record-ratios 0, or ended before its first sample."])
        return
    yield paragraphs(
        [
            f"Up to {ROWS} rows of a rollout, evaluated before the first epoch (epoch 0) and after each epoch. "
            "Advantages are normalised over the whole rollout, unless the run trains without normalisation. A row is "
            "clipped, so that its policy gradient is zero, if its ratio is above the clip range and its advantage is "
            "positive, or if its ratio is below the clip range and its advantage is negative. With objective=penalty, "
            "no row is clipped."
        ]
    )
    options = "".join(f'<option value="{i}">{html.escape(label)}</option>' for i, label in enumerate(data))
    yield (
        f'<div class="sliders"><label>run <select id="run">{options}</select></label>'
        '<label><span id="update-text"></span><input id="update" type="range" min="0" value="0"></label>'
        '<label><span id="epoch-text"></span><input id="epoch" type="range" min="0" value="0"></label></div>'
    )
    yield '<div class="grid" id="inside">'
    for name, figure in _empty_figures().items():
        yield figures.draw(figure, name)
    samples = json.dumps(list(data.values())).replace("<", "\\u003c")
    yield f'</div><script type="application/json" id="samples">{samples}</script>'
    yield f"<script>{_SCRIPT}</script>"


def _spread(samples: Sequence[UpdateSample], max_samples: int) -> list[UpdateSample]:
    """Return at most `max_samples` samples, evenly spaced from the first to the last."""
    picked = np.linspace(0, len(samples) - 1, min(len(samples), max_samples)).round().astype(int)
    return [samples[i] for i in picked]


def _sample_data(run: RunData, sample: UpdateSample) -> dict[str, Any]:
    """Return a sample as the JSON that the script reads."""
    at = np.flatnonzero(run.column("iteration") == sample.iteration)
    return {
        "update": sample.iteration,
        "step": int(run.column("global_step")[at[0]]) if len(at) else None,
        "clip": sample.coefs["clip_coef"],
        "clips": run.config.get("objective") != "penalty",
        "ratios": [plain(row) for row in sample.ratios],
        "advantages": plain(sample.advantages),
        "gae": [[name, plain(row)] for name, row in advantages_by_lambda(sample).items()],
    }


def advantages_by_lambda(sample: UpdateSample) -> dict[str, _Array]:
    """Return advantages [T'] of a sample's trajectory for several lambdas, the run's own included.

    T' counts the first steps of the trajectory, 200 at most.
    """
    own = round(sample.coefs["gae_lambda"], 6)
    lambdas = sorted({*_LAMBDAS, own})
    rows = [torch.as_tensor(sample.trajectory[name]).unsqueeze(1).expand(-1, len(lambdas)) for name in TRAJECTORY[:5]]
    rewards, values, next_values, terminated, done = rows
    trajectory = Trajectory(rewards, values, next_values, terminated.bool(), done.bool())
    gamma = torch.tensor(sample.coefs["gamma"])
    # one column per lambda, as gae_doubling broadcasts lambda over environments
    columns, _ = gae_doubling(trajectory, gamma, torch.tensor(lambdas))
    names = [f"lambda {x:g}" + (" (this run)" if x == own else "") for x in lambdas]
    return dict(zip(names, columns[:_MAX_STEPS].T.numpy(), strict=True))


def _empty_figures() -> dict[str, go.Figure]:
    """Return figures without points by id; the script fills them."""
    figures = {
        "ratios": _ratios_figure(),
        "scatter": _scatter_figure(),
        "surrogate": _surrogate_figure(),
        "gae": _gae_figure(),
    }
    for figure in figures.values():
        figure.update_layout(**LAYOUT, height=380)
    return figures


def _ratios_figure() -> go.Figure:
    figure = go.Figure()
    bins = {"start": 0, "end": 3, "size": 0.02}
    figure.add_histogram(x=[], xbins=bins, autobinx=False, marker_color=COLORS[0], name="rows")
    figure.update_layout(title="Probability ratios (dashed: clip range)")
    figure.update_xaxes(title="ratio pi_new / pi_old")
    figure.update_yaxes(title="rows")
    return figure


def _scatter_figure() -> go.Figure:
    figure = go.Figure()
    for name, color in (("not clipped", COLORS[0]), ("clipped", COLORS[4])):
        figure.add_scatter(x=[], y=[], mode="markers", marker={"size": 4, "color": color}, name=name)
    figure.update_layout(title="Ratio by advantage (dashed: clip range)")
    figure.update_xaxes(title="advantage")
    figure.update_yaxes(title="ratio")
    return figure


def _surrogate_figure() -> go.Figure:
    figure = go.Figure()
    for name, color in (("A > 0", COLORS[2]), ("A < 0", COLORS[1])):
        figure.add_scatter(x=[], y=[], mode="lines", line={"color": color}, name=name)
        marker = {"size": 6, "color": color, "opacity": 0.3}
        figure.add_scatter(x=[], y=[], mode="markers", marker=marker, name=f"rows, {name}")
    figure.update_layout(title="Objective by ratio")
    figure.update_xaxes(title="ratio r")
    figure.update_yaxes(title="min(r A, clip(r) A) / |A|")
    return figure


def _gae_figure() -> go.Figure:
    figure = go.Figure()
    for k in range(len(_LAMBDAS) + 1):
        figure.add_scatter(x=[], y=[], mode="lines", line={"color": COLORS[k], "width": 1.5})
    figure.update_layout(title="Advantages of one environment by GAE lambda")
    figure.update_xaxes(title="rollout step")
    figure.update_yaxes(title="advantage")
    return figure


_SCRIPT = """
const samples = JSON.parse(document.getElementById("samples").textContent);
const [run, update, epoch, inside] = ["run", "update", "epoch", "inside"].map(id => document.getElementById(id));
let visible = false;
function current() { return samples[run.value][update.value]; }
function draw() {
  const s = current(), r = s.ratios[epoch.value], a = s.advantages, c = s.clip;
  const step = s.step === null ? "" : `, step ${s.step.toLocaleString("en")}`;
  document.getElementById("update-text").textContent = `update ${s.update}${step}`;
  document.getElementById("epoch-text").textContent = `after epoch ${epoch.value} of ${s.ratios.length - 1}`;
  if (!visible) return;
  const clipped = r.map((x, i) => s.clips && (a[i] >= 0 ? x > 1 + c : x < 1 - c));
  const pick = (xs, keep) => xs.filter((_, i) => keep(i));
  const limits = [1 - c, 1 + c];
  const vertical = limits.map(x => ({type: "line", x0: x, x1: x, y0: 0, y1: 1, yref: "paper", line: {dash: "dash"}}));
  const horizontal = limits.map(y => ({type: "line", y0: y, y1: y, x0: 0, x1: 1, xref: "paper", line: {dash: "dash"}}));
  const reach = Math.max(2 * c, ...r.filter(x => x !== null).map(x => Math.abs(x - 1))) * 1.1;
  const range = [Math.max(0, 1 - reach), 1 + reach];
  const bins = {start: 0, end: 1 + reach, size: (range[1] - range[0]) / 50};
  Plotly.update("ratios", {x: [r], xbins: bins}, {shapes: vertical, "xaxis.range": range});
  Plotly.update("scatter", {x: [pick(a, i => !clipped[i]), pick(a, i => clipped[i])],
    y: [pick(r, i => !clipped[i]), pick(r, i => clipped[i])]}, {shapes: horizontal});
  const grid = Array.from({length: 101}, (_, i) => range[0] + (range[1] - range[0]) * i / 100);
  const clip = x => s.clips ? Math.min(Math.max(x, 1 - c), 1 + c) : x;
  const objective = sign => x => Math.min(x * sign, clip(x) * sign);
  const titles = {"title.text": s.clips ? "Clipped objective by ratio" : "Objective by ratio, without the KL penalty",
    "yaxis.title.text": s.clips ? "min(r A, clip(r) A) / |A|" : "r A / |A|"};
  const up = pick(r, i => a[i] > 0), down = pick(r, i => a[i] < 0);
  Plotly.update("surrogate", {x: [grid, up, grid, down],
    y: [grid.map(objective(1)), up.map(objective(1)), grid.map(objective(-1)), down.map(objective(-1))]},
    {shapes: vertical, "xaxis.range": range, ...titles});
  const all = document.getElementById("gae").data.map((_, i) => s.gae[i] || ["", []]);
  Plotly.restyle("gae", {x: all.map(([, y]) => y.map((_, t) => t)), y: all.map(([, y]) => y),
    name: all.map(([name]) => name), showlegend: all.map(([name]) => name !== "")});
}
function selectUpdate(at) {
  update.max = samples[run.value].length - 1;
  update.value = at;
  resetEpoch();
}
function resetEpoch() {
  epoch.max = current().ratios.length - 1;
  epoch.value = epoch.max;
  draw();
}
run.oninput = () => selectUpdate(samples[run.value].length - 1);
update.oninput = resetEpoch;
epoch.oninput = draw;
run.parentElement.hidden = samples.length < 2;
selectUpdate(Math.floor((samples[run.value].length - 1) / 2));
whenNear(inside, () => {
  visible = true;
  inside.querySelectorAll(".figure").forEach(plot);
  draw();
});
"""
