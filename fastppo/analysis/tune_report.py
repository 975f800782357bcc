"""Results of `fastppo tune` as a table for the terminal and as tune.html."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import optuna
import plotly.graph_objects as go
from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState
from rich.table import Table

from fastppo.analysis.html import LAYOUT, Figures, heading, page, paragraphs, table
from fastppo.analysis.terminal import narrow_table
from fastppo.analysis.tune import describe, ranked
from fastppo.config import SETTINGS, shown
from fastppo.runtime.files import write_text

_SHOWN, _SHOWN_IN_TERMINAL = 10, 5  # trials in the tables
_NEEDED = 8  # complete trials before importances mean anything


def terminal_table(study: optuna.Study) -> Table:
    """Return a table of the best trials."""
    best = narrow_table("the best trials: final mean return, over seeds")
    for name in ("trial", "mean", "lowest", "highest"):
        best.add_column(name, justify="right")
    best.add_column("settings", overflow="fold")
    for trial in ranked(study)[:_SHOWN_IN_TERMINAL]:
        settings = " ".join(f"{name}={_short(value)}" for name, value in trial.params.items())
        best.add_row(*_figures(trial), settings)
    return best


def _figures(trial: FrozenTrial) -> tuple[str, str, str, str]:
    returns = trial.user_attrs["returns"]
    return str(trial.number), f"{trial.value:,.1f}", f"{min(returns):,.1f}", f"{max(returns):,.1f}"


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else shown(value)


def write_page(folder: Path, env_name: str, study: optuna.Study) -> Path:
    """Write tune.html into `folder`; return its path."""
    figures, best, trials = Figures(), ranked(study), study.get_trials()
    pruned = sum(trial.state == TrialState.PRUNED for trial in trials)
    failed = [f"trial {trial.number} {describe(trial)}" for trial in trials if trial.state == TrialState.FAIL]
    counts = f"{len(best)} trials complete, {pruned} pruned, {len(failed)} failed."
    parts = [paragraphs([counts, *failed[:5]])]
    if best:
        names = list(best[0].params)
        rows = [(*_figures(t), *(_short(t.params[name]) for name in names)) for t in best[:_SHOWN]]
        parts += [heading("The best trials"), table(("trial", "mean return", "lowest", "highest", *names), rows)]
        parts += [heading("The search"), figures.draw(_history(trials), "history")]
        if len(best) >= _NEEDED:
            parts.append(figures.draw(_importances(study), "importances"))
        parts += [heading("Return against each setting"), '<div class="grid">']
        parts += [figures.draw(_slice(best, name), name) for name in names]
        parts.append("</div>")
    path = folder / "tune.html"
    write_text(path, page(f"{env_name}: search of settings", *parts))
    return path


def _history(trials: Sequence[FrozenTrial]) -> go.Figure:
    """Draw the value of each complete trial and the best so far."""
    complete = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    numbers, values = [trial.number for trial in complete], [trial.values[0] for trial in complete]
    best = [max(values[: i + 1]) for i in range(len(values))]
    figure = go.Figure()
    figure.add_scatter(x=numbers, y=values, mode="markers", name="trials")
    figure.add_scatter(x=numbers, y=best, mode="lines", line={"shape": "hv"}, name="best so far")
    figure.update_layout(**LAYOUT, title="Mean return of each trial", height=340)
    figure.update_xaxes(title="trial")
    figure.update_yaxes(title="mean return")
    return figure


def _importances(study: optuna.Study) -> go.Figure:
    """Draw how much each setting decides whether a trial is among the best tenth (PED-ANOVA)."""
    found = get_param_importances(study, evaluator=PedAnovaImportanceEvaluator())
    names = list(found)[::-1]
    figure = go.Figure(go.Bar(x=[found[name] for name in names], y=names, orientation="h"))
    figure.update_layout(**LAYOUT, title="What decides the return: share of the importance", height=340)
    figure.update_xaxes(title="share")
    return figure


def _slice(trials: Sequence[FrozenTrial], name: str) -> go.Figure:
    search = SETTINGS[name].search
    figure = go.Figure()
    values = [trial.params[name] for trial in trials]
    is_range = search is not None and not search.choices
    figure.add_scatter(
        x=values if is_range else [shown(value) for value in values],
        y=[trial.value for trial in trials],
        mode="markers",
        showlegend=False,
    )
    figure.update_layout(**LAYOUT, title=name, height=280)
    if search is not None and search.choices:
        figure.update_xaxes(type="category", categoryorder="array", categoryarray=list(map(shown, search.choices)))
    elif search is not None and search.log:
        figure.update_xaxes(type="log")
    figure.update_yaxes(title="mean return")
    return figure
