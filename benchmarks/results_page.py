"""docs/results.md and its figures, made from the figures of a learning campaign.

    python -m benchmarks.results_page

Everything on the page that is a figure of fastppo comes from the newest benchmarks/results/learning_*.json; what was
planned comes from benchmarks/learning.toml, and what others publish from `PUBLISHED`. Mean and interquartile mean over
seeds have 95 % bootstrap intervals as `fastppo train --seeds` prints them (each environment is one stratum); the
difference of two columns has Welch's interval.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import learning
from benchmarks.compat import welch
from fastppo.analysis.seeds import Interval, bootstrap, interquartile_mean, mean

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CURVES, ABLATION = "learning-curves.svg", "learning-ablation.svg"
COLUMNS = {
    "cleanrl": "CleanRL's defaults",
    "no-value-clip": "no value clip",
    "no-value-clip-vf-1": "no value clip, vf_coef 1",
    "stable-baselines3": "stable-baselines3",
    "tuned": "`--profile tuned`",
    "zoo": "settings of rl-baselines3-zoo",
    "memory": "LSTM",
}
_COLORS = {
    "cleanrl": "#4c78a8",
    "no-value-clip": "#f58518",
    "no-value-clip-vf-1": "#54a24b",
    "stable-baselines3": "#79706e",
}

SOURCES = {
    "CleanRL": "3 seeds with the defaults that are used here; mean and standard deviation at the end of training; "
    "MuJoCo v4, 1M steps, CartPole and Acrobot 500k",
    "zoo": "rl-baselines3-zoo, one run each with settings tuned for the environment; mean and standard deviation of "
    "deterministic evaluation episodes; MuJoCo v3, 1M steps, CartPole and Pendulum 100k, MountainCarContinuous 20k, "
    "Acrobot and LunarLander-v2 1M, BipedalWalker 5M",
    "Tianshou": "10 seeds; the best evaluation over training, mean and standard deviation over seeds; MuJoCo "
    "v3, 1M steps",
    "SLM-Lab": "4 sessions with settings by environment; moving average at the end; MuJoCo v5, 10M steps (Hopper, "
    "Swimmer and Reacher 4M), CartPole 200k, Acrobot, Pendulum and LunarLander-v3 300k",
}
# As their authors give them
PUBLISHED: dict[str, dict[str, str]] = {
    "CartPole-v1": {"CleanRL": "490 ± 6", "zoo": "500 ± 0", "SLM-Lab": "498.9"},
    "Acrobot-v1": {"CleanRL": "-86 ± 1", "zoo": "-73.5 ± 18.2", "SLM-Lab": "-81.3"},
    "MountainCarContinuous-v0": {"zoo": "88.3 ± 2.6"},
    "Pendulum-v1": {"zoo": "-172 ± 104", "SLM-Lab": "-174.9"},
    "LunarLander-v3": {"zoo": "242 ± 32", "SLM-Lab": "183.3"},
    "BipedalWalker-v3": {"zoo": "288 ± 2"},
    "HalfCheetah-v5": {"CleanRL": "1,443 ± 46", "zoo": "5,819 ± 664", "Tianshou": "5,784 ± 1,244", "SLM-Lab": "6,241"},
    "Hopper-v5": {"CleanRL": "2,383 ± 272", "zoo": "2,410 ± 10", "Tianshou": "2,609 ± 701", "SLM-Lab": "1,654"},
    "Walker2d-v5": {"CleanRL": "2,288 ± 572", "zoo": "3,479 ± 822", "Tianshou": "3,589 ± 757", "SLM-Lab": "4,379"},
    "Swimmer-v5": {"zoo": "282 ± 10", "SLM-Lab": "282"},
    "InvertedDoublePendulum-v5": {"SLM-Lab": "8,384"},
    "Reacher-v5": {"SLM-Lab": "-5.03"},
    "Ant-v5": {"zoo": "1,327 ± 452", "Tianshou": "3,258 ± 1,079", "SLM-Lab": "2,138"},
    "Humanoid-v5": {"CleanRL": "716 ± 49", "Tianshou": "787 ± 194", "SLM-Lab": "2,661"},
}
# Remarks below the table of results
NOTES = {
    "CartPole-v1, Acrobot-v1": "200k steps are few for these settings. At the 500k steps of CleanRL's own figures, "
    "below, fastppo is at or above them.",
    "MountainCarContinuous-v0": "nine seeds reach the flag; one never did and learned to stand still.",
    "HalfCheetah-v5": "the best of three seeds reaches twice the worst, so the mean is uncertain; none is below "
    "CleanRL's figure.",
    "Swimmer-v5": "gamma 0.99 is too low here; the zoo reaches 282 with 0.9999.",
    "InvertedDoublePendulum-v5": "one seed's most probable actions do far worse than its sampled ones.",
    "LunarLander-v3": "far below the figures of others, who tune their settings for it. With the zoo's settings (16 "
    "environments, 1,024 steps, gamma 0.999), below, fastppo reaches the zoo's return, which points to the settings "
    "(two seeds).",
}

Run = Mapping[str, Any]
_LINE = 128  # characters of a line of the page


@dataclasses.dataclass
class Options:
    """Write docs/results.md and its figures."""

    runs: Path | None = None
    """File that benchmarks.learning wrote; none: the newest in benchmarks/results."""


def newest() -> Path:
    """Return the newest committed file of a campaign."""
    return max((ROOT / "benchmarks" / "results").glob("learning_2core-cpu_*.json"))


def main(options: Options) -> None:
    source = options.runs or newest()
    _, runs = learning.read_runs(source)
    (DOCS / "results.md").write_text(page(runs, source.name))
    draw(panels(runs, "defaults"), DOCS / CURVES)
    draw(panels(runs, "ablation"), DOCS / ABLATION)


def page(runs: Sequence[Run], source: str) -> str:
    """Return docs/results.md."""
    rows = learning.read_table()
    parts = [
        "# Learning results",
        "This page shows what fastppo learns with CleanRL's defaults, over seeds, and what others publish.",
        *_protocol(source),
        "## Curves",
        f"![mean return over environment steps, a panel per environment]({CURVES})",
        "Mean over seeds of the mean return of the last 100 episodes, with the 95 % bootstrap interval of that mean.",
        "## CleanRL's defaults",
        _results(runs, [row for row in rows if row.stage == "defaults"]),
        _wrapped("\n".join(f"- **{env}**: {note}" for env, note in NOTES.items())),
        *_ablation(runs, rows),
        *_peer(runs, rows),
        *_others(runs, rows),
        "## What others publish",
        _published(runs),
        "## Commands",
        _commands(rows),
        "## Missing",
        _missing(runs, rows),
    ]
    return "\n\n".join(parts) + "\n"


def _protocol(source: str) -> list[str]:
    return [
        _wrapped(
            "Every run has one thread on a 2-core CPU. Runs with CleanRL's defaults have no setting chosen by "
            "environment; the tuned presets and the zoo's settings are chosen for theirs. stable-baselines3 trains the "
            "runs named after it, fastppo all others. "
            '"Last 100 episodes" is the mean return of the last 100 training episodes, whose actions are sampled; '
            f'"evaluation" is the mean return of {learning.EVALUATIONS} episodes after training with the most probable '
            "actions. Figures are means over seeds with 95 % bootstrap intervals, and IQM is the interquartile mean "
            "over seeds. Intervals of fewer than five seeds are too narrow: those of two or "
            "three seeds are just their range."
        ),
        _wrapped(
            "The machine was shared with other work, so speeds are left out; [performance](performance.md) has "
            "measured ones. "
            f"`benchmarks/results/{source}` holds the figures, with versions, commit and curve of every run. "
            "`python -m benchmarks.learning` trained them, and `python -m benchmarks.results_page` made this page."
        ),
    ]


def values(runs: Sequence[Run], row: learning.Row, key: str = "mean_return") -> list[float]:
    """Return a figure of each run of a row, by seed."""
    own = (row.stage, row.column, row.env_id, row.steps)
    found = [run for run in runs if (run["stage"], run["column"], run["env_id"], run["total_timesteps"]) == own]
    return [float(run[key]) for run in found if run[key] is not None]


def number(value: float) -> str:
    """Return a return with about three digits."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"


def shown(interval: Interval) -> str:
    """Return "value (low to high)"; without bounds the value alone."""
    if math.isnan(interval.low):
        return number(interval.value)
    return f"{number(interval.value)} ({number(interval.low)} to {number(interval.high)})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _steps(steps: int) -> str:
    return f"{steps // 1_000_000}M" if steps >= 1_000_000 else f"{steps // 1000}k"


def _results(runs: Sequence[Run], rows: Sequence[learning.Row]) -> str:
    lines = []
    for row in rows:
        if last := values(runs, row):
            evaluations = values(runs, row, "evaluation")
            cells = [shown(bootstrap(last, mean)), shown(bootstrap(last, interquartile_mean))]
            cells += [shown(bootstrap(evaluations, mean))]
            lines.append([row.env_id, _steps(row.steps), f"{len(last)} of {len(row.seeds)}", *cells])
    head = ["environment", "steps", "seeds", "last 100 episodes: mean", "IQM", "evaluation: mean"]
    return table(head, lines) if lines else "Not run yet."


def compared(runs: Sequence[Run], rows: Sequence[learning.Row], base: str, others: Sequence[str]) -> str:
    """Return a table of columns at equal steps, each with its difference to the column `base`; "" without runs."""
    found = {(row.column, row.env_id): values(runs, row) for row in rows}
    lines = []
    for env_id in dict.fromkeys(row.env_id for row in rows):
        ours, cells = found.get((base, env_id), []), []
        for column in others:
            theirs = found.get((column, env_id), [])
            cells += [_with_seeds(theirs), difference(theirs, ours)]
        if ours and any(cells):
            lines.append([env_id, _with_seeds(ours), *cells])
    head = ["environment", COLUMNS[base]]
    for column in others:
        head += [COLUMNS[column], "difference"]
    return table(head, lines) if lines else ""


def _with_seeds(returns: Sequence[float]) -> str:
    if not returns:
        return ""
    return f"{shown(bootstrap(returns, mean))}, {len(returns)} seed{'s' if len(returns) > 1 else ''}"


def _ablation(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    own = [row for row in rows if row.stage == "ablation"]
    clip, without, weighted = dict.fromkeys(row.column for row in own)
    found = compared(runs, own, clip, [without, weighted])
    if not found:
        return []
    text = (
        "At 500k steps, mean return of the last 100 episodes. Each difference is the column's mean minus the first "
        "column's, with Welch's 95 % interval, from two seeds of each on."
    )
    if any(len(values(runs, row)) < len(row.seeds) for row in own):
        text += " Seeds are missing, so this decides nothing about a default yet."
    return ["## Value clipping", _wrapped(text), found, f"![the curves of these runs]({ABLATION})"]


def _peer(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    base, peer = "no-value-clip-vf-1", "stable-baselines3"
    found = compared(runs, [row for row in rows if row.column in (base, peer)], base, [peer])
    text = (
        "At equal settings and 500k steps, mean return of the last 100 episodes. The difference is stable-baselines3 "
        "minus fastppo."
    )
    return ["## stable-baselines3", _wrapped(text), found] if found else []


def difference(theirs: Sequence[float], ours: Sequence[float]) -> str:
    """Return the difference of two means with Welch's 95 % interval; "" if one of them has fewer than two values."""
    if min(len(theirs), len(ours)) < 2:
        return ""
    middle, half = statistics.fmean(theirs) - statistics.fmean(ours), welch(list(theirs), list(ours))
    return shown(Interval(middle, middle - half, middle + half))


def _others(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    """Return a section for each further stage that has runs."""
    titles = {
        "500k": "CartPole and Acrobot at CleanRL's 500k steps",
        "zoo": "LunarLander with the settings of rl-baselines3-zoo",
        "presets": "Tuned presets",
        "minigrid": "MiniGrid with memory",
        "atari": "Atari",
    }
    parts = []
    for stage, title in titles.items():
        own = [row for row in rows if row.stage == stage]
        if any(values(runs, row) for row in own):
            parts += [f"## {title}", _results(runs, own)]
    return parts


def _published(runs: Sequence[Run]) -> str:
    # the longest runs with CleanRL's defaults
    own = [row for row in learning.read_table() if row.stage in ("defaults", "500k")]
    rows = {row.env_id: row for row in own if values(runs, row) or row.stage == "defaults"}
    lines = []
    for env_id, figures in PUBLISHED.items():
        here = values(runs, rows[env_id])
        ours = f"{shown(bootstrap(here, mean))}, {_steps(rows[env_id].steps)}" if here else "-"
        lines.append([env_id, ours, *(figures.get(source, "-") for source in SOURCES)])
    protocols = "\n".join(f"- {name}: {text}." for name, text in SOURCES.items())
    head = ["environment", "here, last 100 episodes", *SOURCES]
    text = "As their authors give them. Environments' versions, steps and protocols differ, so a row is no ranking:"
    return f"{text}\n\n{_wrapped(protocols)}\n\n{table(head, lines)}"


def _wrapped(text: str, width: int = _LINE) -> str:
    """Return paragraphs and list items with lines of at most `width` characters; code stays on one line."""
    kept = re.sub(r"`[^`]+`", lambda code: code[0].replace(" ", "\0"), text)
    lines = (
        textwrap.fill(item, width, subsequent_indent="  " if item.startswith("- ") else "", break_on_hyphens=False)
        for item in kept.splitlines()
    )
    return "\n".join(lines).replace("\0", " ")


def command(row: learning.Row) -> str:
    """Return the command that trains the seeds of a row, for an environment ENV; the campaign's own if it is long."""
    settings = {"env_id": "ENV", **row.settings, "total_timesteps": row.steps, "threads": 1}
    if row.seeds.start != 1:
        settings["seed"] = row.seeds.start
    settings["seeds"] = len(row.seeds)
    words = (f"--{k.replace('_', '-')} {' '.join(v) if isinstance(v, list) else v}" for k, v in settings.items())
    text = f"fastppo train {' '.join(words)}"
    ours = row.program == "fastppo" and len(text) <= _LINE
    return text if ours else f"python -m benchmarks.learning --only {row.stage}"


def _commands(rows: Sequence[learning.Row]) -> str:
    groups: dict[str, list[str]] = {}
    for row in rows:
        groups.setdefault(command(row), []).append(row.env_id)
    return _wrapped("\n".join(f"- {', '.join(envs)}: `{text}`" for text, envs in groups.items()))


def _missing(runs: Sequence[Run], rows: Sequence[learning.Row]) -> str:
    lacks: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        done, planned = len(values(runs, row)), len(row.seeds)
        if done < planned:
            lacks.setdefault((row.stage, row.column), []).append(f"{row.env_id} {planned - done} of {planned}")
    if not lacks:
        return "Nothing of what was planned."
    lines = (f"- {stage}, {COLUMNS[column]}: {', '.join(envs)}." for (stage, column), envs in lacks.items())
    return "Seeds that were planned and not trained:\n\n" + _wrapped("\n".join(lines))


@dataclasses.dataclass(frozen=True)
class Line:
    """A curve with its band.

    Attributes:
        label: of the legend.
        seeds: their number.
        color: of line and band.
        steps: [P] environment steps.
        mean: [P] mean over seeds.
        low: [P] lower end of its 95 % bootstrap interval.
        high: [P] upper end.
    """

    label: str
    seeds: int
    color: str
    steps: list[float]
    mean: list[float]
    low: list[float]
    high: list[float]


def panels(runs: Sequence[Run], stage: str) -> dict[str, list[Line]]:
    """Return the curves of a stage by environment."""
    found: dict[str, list[Line]] = {}
    for row in learning.read_table():
        key = (row.stage, row.column, row.env_id)
        own = [run["curve"] for run in runs if (run["stage"], run["column"], run["env_id"]) == key]
        if row.stage == stage and own:
            found.setdefault(row.env_id, []).append(_line(row.column, own))
    return found


def _line(column: str, curves: Sequence[Mapping[str, Any]]) -> Line:
    steps = curves[0]["steps"]
    returns = np.array([np.interp(steps, c["steps"], np.array(c["returns"], float)) for c in curves])  # [seeds, P]
    kept = np.isfinite(returns).all(0)
    bands = [bootstrap(point, mean) for point in returns[:, kept].T.tolist()]
    # one seed has no interval, and no band
    ends = [(band.value, band.value) if math.isnan(band.low) else (band.low, band.high) for band in bands]
    middle, low, high = (
        [float(f"{value:.4g}") for value in points]
        for points in ([band.value for band in bands], [low for low, _ in ends], [high for _, high in ends])
    )
    color = _COLORS.get(column, "#b279a2")
    return Line(COLUMNS[column], len(curves), color, np.array(steps)[kept].tolist(), middle, low, high)


def digest(content: Mapping[str, Sequence[Line]]) -> str:
    """Return a hash of what a figure shows, which its file holds: so a test sees whether it is up to date."""
    plain = {env: [dataclasses.astuple(line) for line in lines] for env, lines in content.items()}
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def draw(content: Mapping[str, Sequence[Line]], path: Path) -> None:
    """Draw a panel per environment as SVG; matplotlib comes with stable-baselines3."""
    if not content:
        return
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    across = min(4 if len(content) > 6 else 3, len(content))
    down = math.ceil(len(content) / across)
    with plt.rc_context({"svg.hashsalt": "fastppo", "svg.fonttype": "none", "font.size": 8}):
        size = (2.7 * across, 2.0 * down + 0.3)
        figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[len(content) :]:
            axis.set_axis_off()
        alone = all(len(lines) == 1 for lines in content.values())
        for axis, (env_id, lines) in zip(axes.flat, content.items(), strict=False):
            for line in lines:
                thousands = [step / 1e3 for step in line.steps]
                axis.plot(thousands, line.mean, color=line.color, linewidth=1.2, label=line.label)
                axis.fill_between(thousands, line.low, line.high, color=line.color, alpha=0.2, linewidth=0)
            seeds = "/".join(str(n) for n in dict.fromkeys(line.seeds for line in lines))
            axis.set_title(f"{env_id}, {seeds} seed{'' if seeds == '1' else 's'}", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.set_xlim(left=0)
        if not alone:
            drawn = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=3, frameon=False)
        figure.supxlabel("thousand environment steps", fontsize=8)
        figure.supylabel("mean return of the last 100 episodes", fontsize=8)
        figure.savefig(path, metadata={"Date": None, "Source": digest(content)})
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options))
