"""Plotly figures of runs: returns, diagnostics, speed, time by phase."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import numpy as np
import plotly.graph_objects as go

from fastppo.analysis.html import COLORS, LAYOUT, PHASE_COLORS
from fastppo.analysis.run_data import RunData, downsample
from fastppo.runtime.clock import PHASES

X_AXES = {"environment steps": "global_step", "episodes": "episodes", "seconds": "seconds"}

_T = TypeVar("_T")
_Array = np.ndarray[Any, Any]
_Points = tuple[list[float | None], list[float | None]]
_MAX_EPISODES = 3000  # dots per run
_MAX_RUNS_WITH_EPISODES = 4
_MAX_EVALUATIONS = 200  # error bars per run
_BAND_POINTS = 200  # of a mean over seeds
_DASHES = ("solid", "dot", "dash")


class Diagnostic(NamedTuple):
    """A small figure of logged figures.

    Attributes:
        title: title of the figure.
        lines: tag and name of each line.
        healthy: range of healthy values, drawn as a band.
        y_range: range of the y-axis; None: all values.
        log: whether the y-axis is logarithmic.
        optional: whether the figure is left out if no run has logged any of its lines.
        sampled: whether only sampled iterations have values, which are drawn as dots.
    """

    title: str
    lines: tuple[tuple[str, str], ...]
    healthy: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    log: bool = False
    optional: bool = False
    sampled: bool = False

    @property
    def name(self) -> str:
        """Id of the figure in the page."""
        return self.lines[0][0].rpartition("/")[2]


DIAGNOSTICS = (
    Diagnostic("Reward per step", (("charts/reward_per_step", ""),)),
    Diagnostic("Policy loss", (("losses/policy_loss", ""),)),
    Diagnostic("Value loss", (("losses/value_loss", ""),), log=True),
    Diagnostic("Entropy", (("losses/entropy", ""),)),
    Diagnostic("Standard deviation of the actions", (("charts/action_std", ""),), log=True, optional=True),
    Diagnostic(
        "KL divergence per update",
        (("losses/approx_kl", "k3"), ("losses/old_approx_kl", "k1"), ("charts/kl_limit", "limit")),
    ),
    Diagnostic("Clip fraction (healthy: 0.05-0.3)", (("losses/clipfrac", ""),), healthy=(0.05, 0.3)),
    Diagnostic(
        "Explained variance (healthy: 0.5-1; axis cut at -1)",
        (("losses/explained_variance", ""),),
        healthy=(0.5, 1.0),
        y_range=(-1.05, 1.05),
    ),
    Diagnostic("Learning rate", (("charts/learning_rate", ""),)),
    Diagnostic("Clip range", (("charts/clip_coef", ""),)),
    Diagnostic("Weight of the KL penalty", (("charts/kl_coef", ""),), log=True, optional=True),
    Diagnostic(
        "Gradient norm before clipping", (("losses/grad_norm", "norm"), ("charts/max_grad_norm", "limit")), log=True
    ),
    Diagnostic("Intrinsic reward per step", (("charts/intrinsic_reward", ""),), log=True, optional=True),
    Diagnostic("Loss of RND's predictor", (("losses/rnd_loss", ""),), log=True, optional=True),
    Diagnostic("Epochs per update", (("losses/epochs_run", ""),)),
    Diagnostic(
        "Share of actions that masks forbid", (("charts/masked_actions", ""),), y_range=(-0.02, 1.02), optional=True
    ),
    Diagnostic(
        "Memory's share of the gradient (healthy: above 1e-5)",
        (("memory/gradient_share", ""),),
        log=True,
        optional=True,
        sampled=True,
    ),
    Diagnostic("Root mean square of the memory's state", (("memory/state_norm", ""),), optional=True, sampled=True),
)


def returns_figure(runs: Sequence[RunData], axes: Mapping[str, str] = X_AXES, by: str = "") -> go.Figure:
    """Draw episode returns, their moving average and evaluations, with buttons that choose the x-axis.

    Runs that differ only in their seed also get their mean and a band of one standard deviation.

    Args:
        runs: runs to draw.
        axes: tag of each x-axis by its title.
        by: name of a setting that names groups of seeds, with a thin line per run; "": each run has its own name.
    """
    traces = _SwitchableTraces(axes)
    if not by:
        for run, color in _colored(runs):
            _add_run(traces, run, color, of=len(runs))
    for group, color in _colored(_seed_groups(runs)):
        setting = f"{by} {group[0].config.get(by)}" if by else ""
        name = f"{setting}{', ' if by else ''}mean of {len(group)} seeds +- 1 standard deviation"
        if by:
            for run in group:
                traces.add_mean(
                    run,
                    line={"color": color, "width": 0.7},
                    name=setting if len(group) == 1 else run.label,
                    showlegend=len(group) == 1,
                    legendgroup=name,
                )
        if len(group) > 1 and all(map(len, group)):
            _add_band(traces, group, name, color)
    return traces.draw(title="Episode return", y_title="return")


class _SwitchableTraces:
    """Traces that have points over each of several x-axes."""

    def __init__(self, axes: Mapping[str, str]) -> None:
        """Start without traces; `axes` maps the title of each x-axis to its tag."""
        self.axes = axes
        self._figure = go.Figure()
        self._points: list[list[_Points]] = []  # by trace, then by axis

    def add(self, points: Iterable[_Points], **options: Any) -> None:  # noqa: ANN401 - options of plotly
        """Add a trace with one set of points per axis."""
        by_axis = list(points)
        self._figure.add_scatter(x=by_axis[0][0], y=by_axis[0][1], **options)
        self._points.append(by_axis)

    def add_mean(self, run: RunData, **options: Any) -> None:  # noqa: ANN401 - options of plotly
        """Add the moving average of a run's returns."""
        mean = plain(downsample(run.column("mean_return")))
        self.add([(plain(downsample(run.column(tag))), mean) for tag in self.axes.values()], mode="lines", **options)

    def add_evaluations(self, run: RunData, **options: Any) -> None:  # noqa: ANN401 - options of plotly
        """Add a run's evaluations, if it has any: mean returns with a bar of one standard deviation."""
        at = np.flatnonzero(np.isfinite(run.column("eval/return_mean")))
        at = at[np.linspace(0, len(at) - 1, min(len(at), _MAX_EVALUATIONS)).astype(int)]
        if len(at):
            mean, std = (plain(run.column(f"eval/return_{name}")[at]) for name in ("mean", "std"))
            points = [(plain(run.column(tag)[at]), mean) for tag in self.axes.values()]
            self.add(points, mode="markers", error_y={"type": "data", "array": std, "thickness": 1}, **options)

    def draw(self, title: str, y_title: str) -> go.Figure:
        """Return the figure with a button per axis."""
        buttons = [
            {
                "label": name,
                "method": "update",
                "args": [
                    {"x": [points[i][0] for points in self._points], "y": [points[i][1] for points in self._points]},
                    {"xaxis.title.text": name},
                ],
            }
            for i, name in enumerate(self.axes)
        ]
        position = {"type": "buttons", "direction": "right", "x": 0, "xanchor": "left", "y": 1.02, "yanchor": "bottom"}
        self._figure.update_layout(
            **LAYOUT,
            title=title,
            updatemenus=[{"buttons": buttons, **position}],
            height=450,
        )
        self._figure.update_layout(margin_t=70)  # room for the buttons
        self._figure.update_xaxes(title=next(iter(self.axes)))
        self._figure.update_yaxes(title=y_title)
        return self._figure


def _add_run(traces: _SwitchableTraces, run: RunData, color: str, of: int) -> None:
    """Add the episodes of a run, one of `of` runs, as dots and their moving average as a line."""
    alone = of == 1
    if of <= _MAX_RUNS_WITH_EPISODES:
        shown = np.linspace(0, len(run.returns) - 1, min(len(run.returns), _MAX_EPISODES)).astype(int)
        traces.add(
            [(plain(run.return_axes[tag][shown]), plain(run.returns[shown])) for tag in traces.axes.values()],
            mode="markers",
            marker={"size": 3, "color": color, "opacity": 0.35},
            name="episodes" if alone else f"{run.label}: episodes",
            visible=True if alone else "legendonly",
        )
    traces.add_mean(
        run,
        line={"color": color, "width": 2 if alone else 1.2},
        name="mean of the last 100 episodes" if alone else run.label,
    )
    traces.add_evaluations(
        run,
        marker={"symbol": "diamond", "size": 7, "color": COLORS[1] if alone else color},
        name="evaluation, mean +- standard deviation" if alone else f"{run.label}: evaluation",
    )


def _add_band(traces: _SwitchableTraces, group: Sequence[RunData], name: str, color: str) -> None:
    """Add mean and standard deviation over the runs of a group."""
    bands = [_band(group, tag) for tag in traces.axes.values()]
    traces.add(
        [(_outline(x, x), _outline(mean + std, mean - std)) for x, mean, std in bands],
        fill="toself",
        mode="none",
        fillcolor=_transparent(color),
        hoverinfo="skip",
        showlegend=False,
        legendgroup=name,
    )
    traces.add(
        [(plain(x), plain(mean)) for x, mean, _ in bands],
        mode="lines",
        line={"color": color, "width": 3},
        name=name,
        legendgroup=name,
    )


def _band(group: Sequence[RunData], tag: str) -> tuple[_Array, _Array, _Array]:
    """Return x, mean and standard deviation over runs, [P] each, on the range of `tag` that all runs cover."""
    xs = [run.column(tag) for run in group]
    grid = np.linspace(max(x[0] for x in xs), min(x[-1] for x in xs), _BAND_POINTS)
    lines = np.stack([np.interp(grid, x, run.column("mean_return")) for x, run in zip(xs, group, strict=True)])
    return grid, lines.mean(0), lines.std(0, ddof=1)


def _outline(forward: _Array, back: _Array) -> list[float | None]:
    return plain(np.concatenate((forward, back[::-1])))


def diagnostics_of(runs: Sequence[RunData]) -> list[Diagnostic]:
    """Return DIAGNOSTICS without the optional ones that no run has logged."""

    def logged(diagnostic: Diagnostic) -> bool:
        return any(np.isfinite(run.column(tag)).any() for run in runs for tag, _ in diagnostic.lines)

    return [d for d in DIAGNOSTICS if not d.optional or logged(d)]


def info_diagnostics(runs: Sequence[RunData]) -> list[Diagnostic]:
    """Return a figure of each key of `--log-info`; of a single run, keys of one nested dict share a figure."""
    columns = {tag: run.columns[tag] for run in runs for tag in run.columns if tag.startswith("info/")}
    panels: dict[str, list[tuple[str, str]]] = {}
    for tag in sorted(columns):
        folder, _, key = tag.rpartition("/")
        shared = len(runs) == 1 and folder != "info"
        panels.setdefault(folder if shared else tag, []).append((tag, key if shared else ""))
    return [
        # the end of an episode gives some keys, so that not every row has them
        Diagnostic(title, tuple(lines), sampled=any(np.isnan(columns[tag]).any() for tag, _ in lines))
        for title, lines in panels.items()
    ]


def diagnostic_figure(runs: Sequence[RunData], diagnostic: Diagnostic) -> go.Figure:
    """Draw the lines of a diagnostic for each run; lines that were never logged are left out."""
    figure, alone = go.Figure(), len(runs) == 1
    if diagnostic.healthy is not None:
        low, high = diagnostic.healthy
        figure.add_hrect(y0=low, y1=high, fillcolor="#54a24b", opacity=0.12, line_width=0)
    for run, color in _colored(runs):
        steps = plain(downsample(run.column("global_step")))
        for k, (tag, name) in enumerate(diagnostic.lines):
            if np.isfinite(run.column(tag)).any():
                dash = _DASHES[k % len(_DASHES)]
                figure.add_scatter(
                    x=steps,
                    y=plain(downsample(run.column(tag))),
                    mode="lines+markers" if diagnostic.sampled else "lines" if len(run) > 1 else "markers",
                    connectgaps=diagnostic.sampled,
                    line={"color": COLORS[k % len(COLORS)] if alone else color, "dash": dash, "width": 1.5},
                    name=" ".join(word for word in ("" if alone else run.label, name) if word),
                )
    figure.update_layout(**LAYOUT, title=diagnostic.title, height=300, showlegend=len(figure.data) > 1)
    figure.update_xaxes(title="environment steps")
    if diagnostic.y_range is not None:
        figure.update_yaxes(range=diagnostic.y_range)
    if diagnostic.log:
        figure.update_yaxes(type="log")
    return figure


def speed_figure(runs: Sequence[RunData]) -> go.Figure:
    """Draw steps per second of each run."""
    figure = go.Figure()
    for run, color in _colored(runs):
        figure.add_scatter(
            x=plain(downsample(run.column("global_step"))),
            y=plain(downsample(run.column("charts/sps_window"))),
            mode="lines",
            line={"color": color},
            name=run.label,
        )
    title = "Training speed (average over the last 10 iterations)"
    figure.update_layout(**LAYOUT, title=title, showlegend=len(runs) > 1)
    figure.update_xaxes(title="environment steps")
    figure.update_yaxes(title="steps/s", rangemode="tozero")
    return figure


def phases_figure(run: RunData) -> go.Figure:
    """Draw the milliseconds of each phase of an iteration, stacked."""
    figure = go.Figure()
    steps = plain(downsample(run.column("global_step")))
    for phase in PHASES:
        seconds = run.column(f"time/{phase}")
        if np.nansum(seconds) > 0:
            figure.add_scatter(
                x=steps,
                y=plain(downsample(seconds) * 1e3),
                mode="lines",
                line={"width": 0.5, "color": PHASE_COLORS.get(phase)},
                stackgroup="phases",
                name=phase,
            )
    figure.update_layout(**LAYOUT, title=f"{run.label}: time per iteration by phase", height=340)
    figure.update_xaxes(title="environment steps")
    figure.update_yaxes(title="ms")
    return figure


def plain(values: _Array) -> list[float | None]:
    """Return values as JSON numbers of five significant digits, None for NaN and infinity."""
    return [float(f"{x:.5g}") if math.isfinite(x) else None for x in values.tolist()]


def _seed_groups(runs: Sequence[RunData]) -> list[list[RunData]]:
    """Return runs grouped by their settings except the seed."""
    groups: dict[str, list[RunData]] = {}
    for run in runs:
        groups.setdefault(run.group_key, []).append(run)
    return list(groups.values())


def _colored(items: Iterable[_T]) -> Iterator[tuple[_T, str]]:
    """Yield each item with a colour; colours repeat."""
    return zip(items, itertools.cycle(COLORS), strict=False)


def _transparent(color: str) -> str:
    red, green, blue = (int(color[i : i + 2], 16) for i in (1, 3, 5))
    return f"rgba({red},{green},{blue},0.2)"
