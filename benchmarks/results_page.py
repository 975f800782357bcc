"""docs/results.md and its figures, made from the figures of a learning campaign.

    python -m benchmarks.results_page

Everything on the page that is a figure of fastppo comes from the newest benchmarks/results/learning_*.json; what was
planned comes from benchmarks/learning.toml, and what others publish from `PUBLISHED`. Mean and interquartile mean over
seeds have 95 % bootstrap intervals as `fastppo train --seeds` prints them; the difference of two columns has Welch's
interval. Figures over several environments have the stratified bootstrap's, in which each environment keeps its seeds.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import re
import statistics
import textwrap
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tyro

from benchmarks import learning
from benchmarks.compat import welch
from fastppo.analysis.seeds import Interval, bootstrap, interquartile_mean, mean

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
CURVES, ABLATION, TOGETHER = "learning-curves.svg", "learning-ablation.svg", "learning-together.svg"
COLUMNS = {
    "cleanrl": "CleanRL's defaults",
    "no-value-clip": "no value clip",
    "no-value-clip-vf-1": "no value clip, vf_coef 1",
    "stable-baselines3": "stable-baselines3",
    "tuned": "`--profile tuned`",
    "zoo": "settings of rl-baselines3-zoo",
    "memory": "LSTM",
    "gamma-999": "gamma 0.999",
    "gamma-9999": "gamma 0.9999",
    "long-rollouts": "16 environments, 1,024 steps, minibatches of 64 rows",
}
_COLORS = {
    "cleanrl": "#4c78a8",
    "no-value-clip": "#f58518",
    "no-value-clip-vf-1": "#54a24b",
    "stable-baselines3": "#79706e",
}

# The protocol of published figures, by source
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
EVALUATED = {"zoo", "Tianshou"}  # their figures come from evaluations, not from training
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
    "CartPole-v1": "200k steps are few for these settings; at CleanRL's 500k steps, below, every seed solves it.",
    "Acrobot-v1": "200k steps are few for these settings; at CleanRL's 500k steps, below, fastppo is above CleanRL's "
    "figure. The zoo trains 1M steps with 16 environments and normalised observations.",
    "MountainCarContinuous-v0": "a seed that never reaches the flag learns to stand still, which returns 0.",
    "HalfCheetah-v5": "CleanRL with the same settings is lower, so settings and protocols make the difference: the "
    "zoo's are tuned (learning rate 2e-5, 20 epochs, gamma 0.98, 256x256 ReLU), Tianshou gives the best evaluation "
    "over training with 64 environments, SLM-Lab trains 10M steps. Seeds differ by a factor of two.",
    "Walker2d-v5": "SLM-Lab trains 10M steps.",
    "Ant-v5": "v5 adds contact forces to what is observed, and their cost to the reward; in v3, as it was mostly run, "
    "both were 0. Tianshou gives the best evaluation over training with 64 environments, SLM-Lab trains 10M "
    "steps. Which of these makes the difference was not tested.",
    "Swimmer-v5": "gamma 0.99 is too low here. With 0.9999, the only change that the zoo makes for it, a first "
    "seed, below, returns 274 (zoo 282).",
    "InvertedDoublePendulum-v5": "one seed's most probable actions do far worse than its sampled ones.",
    "LunarLander-v3": "the others tune their settings for it. With the zoo's (16 environments, 1,024 steps, gamma "
    "0.999), below, fastppo reaches the zoo's return. Of these changes, "
    "its longer rollouts alone give 103, its gamma alone -40 (two seeds each).",
    "BipedalWalker-v3": "the zoo trains 5M steps, with 32 environments and gamma 0.999.",
}
# On the runs of stable-baselines3
PEER_NOTE = (
    "HalfCheetah-v5: returns fall into two groups. Of fastppo's ten runs without value clip, with either vf_coef, "
    "seven return 1,370 to 1,598 and three 2,180 to 3,218; two of stable-baselines3's are in the upper group. By "
    "Fisher's exact test this happens by chance with a probability of 0.15, so seeds may be the reason; Welch's "
    "interval supposes one group. stable-baselines3 normalises observations from the first step on, fastppo from the "
    "second rollout on. That alone does not lead to the upper group: with moments from 2,048 random steps, tried by "
    "hand, seeds 1 and 2 return 1,154 and 1,176 after 320k steps; without, seed 2 is in the upper group."
)

Run = Mapping[str, Any]
Array = np.ndarray[Any, np.dtype[np.float64]]
FIGURES = ("mean_return", "evaluation")  # of training and of evaluations
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
    last = "mean return of the last 100 episodes"
    draw(panels(runs, "defaults"), DOCS / CURVES, last)
    draw(panels(runs, "ablation"), DOCS / ABLATION, last)
    draw(together(runs), DOCS / TOGETHER, "return / CleanRL's", level=1.0)


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
        _notes(runs),
        *_together(runs),
        *_ablation(runs, rows),
        *_peer(runs, rows),
        *_hopper(runs, rows),
        *_others(runs, rows),
        *_presets(runs, rows),
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
            "three seeds are just their range. Bands and figures over several environments are of the stratified "
            "bootstrap, which draws each environment's seeds separately."
        ),
        _wrapped(
            "Minutes and steps/s are medians over seeds; the machine was shared with other work, so "
            "[performance](performance.md) has the speeds to compare with others. "
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
    several = len({row.column for row in rows}) > 1
    lines = []
    for row in rows:
        if last := values(runs, row):
            minutes = statistics.median(values(runs, row, "seconds")) / 60
            sps = statistics.median(values(runs, row, "sps"))
            cells = [row.env_id, *([COLUMNS[row.column]] if several else [])]
            cells += [_steps(row.steps), f"{len(last)} of {len(row.seeds)}"]
            cells += [shown(bootstrap(statistic, last)) for statistic in (mean, interquartile_mean)]
            cells += [shown(bootstrap(mean, values(runs, row, "evaluation")))]
            lines.append([*cells, number(minutes), f"{sps:,.0f}"])
    head = ["environment", *(["settings"] if several else []), "steps", "seeds"]
    head += ["last 100 episodes: mean", "IQM", "evaluation: mean", "minutes", "steps/s"]
    return table(head, lines) if lines else "Not run yet."


def longest(runs: Sequence[Run]) -> dict[str, learning.Row]:
    """Return the longest row with CleanRL's defaults that has runs, by environment; without runs the first."""
    own = [row for row in learning.read_table() if row.stage in ("defaults", "500k")]
    return {row.env_id: row for row in own if values(runs, row) or row.stage == "defaults"}


def above(runs: Sequence[Run], row: learning.Row) -> list[str]:
    """Return the sources whose published figure is above the 95 % interval of a row's figure of the same kind."""
    found = []
    for source, text in PUBLISHED.get(row.env_id, {}).items():
        here = bootstrap(mean, values(runs, row, "evaluation" if source in EVALUATED else "mean_return"))
        if float(text.partition(" ±")[0].replace(",", "")) > here.high:
            found.append(source)
    return found


def _notes(runs: Sequence[Run]) -> str:
    """Return a remark for each environment that has one, or whose returns are below published ones."""
    lines = []
    for env_id, row in longest(runs).items():
        others, note = above(runs, row), NOTES.get(env_id)
        if values(runs, row) and (others or note):
            below = f" (below {', '.join(others)})" if others else ""
            lines.append(f"- **{env_id}**{below}: {note or 'the reason is not known yet.'}")
    text = "Where a published figure, below, is above our interval of the same kind of figure, the note says so."
    return _wrapped("\n".join([text, "", *lines]))


# of presets whose runs don't all end well
COLLAPSES = {
    "Acrobot-v1": "four of the five seeds return -92.0 to -84.2. Seed 104 returns -83 after 27k steps and -500 from "
    "160k on: the preset's learning rate of 0.0043 isn't annealed. At 100k steps, for which it was searched, all "
    "five end well ([tuning](tuning.md)).",
}
_CHANCE = "probability of a higher return"


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
    chances = [improved(runs, rows, base, column) for column in others]
    if any(len(envs) > 1 for envs, _ in chances):
        cells = [cell for envs, chance in chances for cell in ("", _share(chance) if len(envs) > 1 else "")]
        lines.append([_CHANCE, "", *cells])
    head = ["environment", COLUMNS[base]]
    for column in others:
        head += [COLUMNS[column], "difference"]
    return table(head, lines) if lines else ""


def improved(runs: Sequence[Run], rows: Sequence[learning.Row], base: str, column: str) -> tuple[list[str], Interval]:
    """Return the environments in which both columns have two seeds and more, and the probability of improvement there.

    It is the probability that a run of `column` returns more than one of `base`, mean over environments, with its
    stratified bootstrap interval (Agarwal et al. 2021, section 4.3). It needs no scale that environments share.
    """
    found = {(row.column, row.env_id): values(runs, row) for row in rows}
    envs = [
        env_id
        for env_id in dict.fromkeys(row.env_id for row in rows)
        if all(len(found.get((name, env_id), [])) > 1 for name in (base, column))
    ]
    samples = [found[name, env_id] for name in (base, column) for env_id in envs]
    return envs, bootstrap(probability_of_improvement, *samples) if envs else Interval(math.nan, math.nan, math.nan)


def probability_of_improvement(*samples: Array) -> Array:
    """Return the mean share of pairs in which y is above x, of samples x1, x2, ..., y1, y2, ...; half for equal ones.

    Args:
        samples: [..., n] each.

    Returns:
        [...] in [0, 1].
    """
    half = len(samples) // 2
    shares = []
    for x, y in zip(samples[:half], samples[half:], strict=True):
        left, right = x[..., :, None], y[..., None, :]
        shares.append(((right > left) + 0.5 * (right == left)).mean((-2, -1)))
    mean_share: Array = np.mean(shares, 0)
    return mean_share


def _share(interval: Interval) -> str:
    return f"{interval.value:.2f} ({interval.low:.2f} to {interval.high:.2f})"


def _with_seeds(returns: Sequence[float]) -> str:
    if not returns:
        return ""
    return f"{shown(bootstrap(mean, returns))}, {len(returns)} seed{'s' if len(returns) > 1 else ''}"


def _together(runs: Sequence[Run]) -> list[str]:
    found = together(runs)
    if not found:
        return []
    ((envs, (line,)),) = found.items()
    text = (
        f"Interquartile mean of the runs of {envs}, each return divided by the one that CleanRL publishes for these "
        f"settings: {line.mean[-1]:.2f} ({line.low[-1]:.2f} to {line.high[-1]:.2f}) at the end of training. CleanRL's "
        "figures are of MuJoCo v4; v5 changed the friction of a foot of Walker2d, and no longer rewards Hopper and "
        "Walker2d for the step in which they fall."
    )
    return ["## MuJoCo together", _wrapped(text), f"![interquartile mean over environment steps]({TOGETHER})"]


def _ablation(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    own = [row for row in rows if row.stage == "ablation"]
    base, *others = dict.fromkeys(row.column for row in own)
    found = compared(runs, own, base, others)
    if not found:
        return []
    text = (
        "At 500k steps, mean return of the last 100 episodes. Each difference is the column's mean minus the first "
        "column's, with Welch's 95 % interval, from two seeds of each on. "
    )
    if _CHANCE in found:
        text += (
            "The last row is the probability that a run with the column's settings returns more than one with the "
            "first column's, mean over environments. "
        )
    if any(len(values(runs, row)) < len(row.seeds) for row in own):
        text += "Seeds are missing, so this decides nothing about a default yet."
    else:
        text += _verdict({column: improved(runs, own, base, column)[1] for column in others})
    return ["## Value clipping", _wrapped(text), found, f"![the curves of these runs]({ABLATION})"]


def _verdict(chances: Mapping[str, Interval]) -> str:
    """Return what each column's probability of improvement over CleanRL's defaults says about a default."""
    found: dict[str, list[str]] = {}
    for column, chance in chances.items():
        effect = (
            "return more than"
            if chance.low > 0.5
            else "return less than"
            if chance.high < 0.5
            else "show no difference from"
        )
        found.setdefault(effect, []).append(f'"{COLUMNS[column]}"')
    return " ".join(
        f"Over all environments, runs with {' and with '.join(names)} {effect} runs with CleanRL's defaults."
        for effect, names in found.items()
    )


def _peer(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    base, peer = "no-value-clip-vf-1", "stable-baselines3"
    own = [row for row in rows if row.stage in ("ablation", peer) and row.column in (base, peer)]
    found = compared(runs, own, base, [peer])
    text = (
        "At equal settings and 500k steps, mean return of the last 100 episodes. The difference is stable-baselines3 "
        "minus fastppo."
    )
    return ["## stable-baselines3", _wrapped(text), found, _wrapped(PEER_NOTE)] if found else []


def _hopper(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    own = [row for row in rows if row.stage == "hopper"]
    found = compared(runs, own, "no-value-clip-vf-1", ["stable-baselines3", "cleanrl"])
    text = (
        "Before the campaign, six seeds of fastppo with CleanRL's defaults had returned 1,310 (standard error 100) and "
        "with the settings of the first column 1,574 (180), and five seeds of stable-baselines3 with equal settings "
        "1,771 (122). Trained again; each difference is the column minus the first."
    )
    return ["## Hopper-v5 at 300k steps", _wrapped(text), found] if found else []


def _presets(runs: Sequence[Run], rows: Sequence[learning.Row]) -> list[str]:
    own = [row for row in rows if row.stage == "presets"]
    if not any(values(runs, row) for row in own):
        return []
    trained = {(row.env_id, row.steps) for row in own}
    both = [row for row in rows if row.stage in ("defaults", "presets") and (row.env_id, row.steps) in trained]
    text = "The searches for these settings never saw the seeds. At equal steps:"
    against = compared(runs, both, "cleanrl", ["tuned"])
    notes = [f"{row.env_id}: {COLLAPSES[row.env_id]}" for row in own if row.env_id in COLLAPSES]
    return ["## Tuned presets", _results(runs, own), *map(_wrapped, notes), *([text, against] if against else [])]


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
        "reasons": "CleanRL's defaults with one change",
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
    rows, lines = longest(runs), []
    for env_id, figures in PUBLISHED.items():
        row = rows[env_id]
        ours = [shown(bootstrap(mean, found)) for key in FIGURES if (found := values(runs, row, key))] or ["-", "-"]
        lines.append([env_id, _steps(row.steps), *ours, *(figures.get(source, "-") for source in SOURCES)])
    protocols = "\n".join(f"- {name}: {text}." for name, text in SOURCES.items())
    head = ["environment", "our steps", "last 100 episodes", "evaluation", *SOURCES]
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
        seeds: their number, in words: "5", or "3/5" where it differs between environments.
        color: of line and band.
        steps: [P] environment steps.
        mean: [P] mean over seeds.
        low: [P] lower end of its 95 % bootstrap interval.
        high: [P] upper end.
    """

    label: str
    seeds: str
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
    found = _band(steps, [_interpolated(curves, steps)], mean)
    return Line(COLUMNS[column], str(len(curves)), _COLORS.get(column, "#b279a2"), *found)


def _interpolated(curves: Sequence[Mapping[str, Any]], steps: Sequence[int]) -> Array:
    """Return the returns of several curves at some steps, [seeds, P]; NaN where a curve has none."""
    return np.array([np.interp(steps, c["steps"], np.array(c["returns"], float)) for c in curves])


def _band(
    steps: Sequence[int], samples: Sequence[Array], statistic: Callable[..., Array]
) -> tuple[list[float], list[float], list[float], list[float]]:
    """Return steps, a statistic of samples [seeds, P], and the ends of its interval, where no sample has a NaN."""
    kept = np.all([np.isfinite(returns).all(0) for returns in samples], 0)
    bands = [bootstrap(statistic, *(r[:, k].tolist() for r in samples)) for k in np.flatnonzero(kept)]
    # one seed has no interval, and no band
    ends = [(band.value, band.value) if math.isnan(band.low) else (band.low, band.high) for band in bands]
    middle, low, high = (
        [float(f"{value:.4g}") for value in points]
        for points in ([band.value for band in bands], [low for low, _ in ends], [high for _, high in ends])
    )
    return np.array(steps)[kept].tolist(), middle, low, high


def together(runs: Sequence[Run]) -> dict[str, list[Line]]:
    """Return the curve of the interquartile mean over MuJoCo, of returns divided by those that CleanRL publishes.

    Of the environments with CleanRL's defaults at CleanRL's steps that have two seeds and more; empty without them.
    """
    envs, samples, steps = list[str](), list[Array](), list[int]()
    for row in learning.read_table():
        figure = PUBLISHED.get(row.env_id, {}).get("CleanRL")
        own = [run["curve"] for run in runs if (run["stage"], run["env_id"]) == (row.stage, row.env_id)]
        if row.stage == "defaults" and row.env_id.endswith("-v5") and figure is not None and len(own) > 1:
            envs, steps = [*envs, row.env_id], steps or own[0]["steps"]
            samples.append(_interpolated(own, steps) / float(figure.partition(" ±")[0].replace(",", "")))
    if not envs:
        return {}

    def iqm(*scores: Array) -> Array:
        return interquartile_mean(np.concatenate(scores, -1))

    seeds = "/".join(str(n) for n in dict.fromkeys(len(returns) for returns in samples))
    line = Line(COLUMNS["cleanrl"], seeds, _COLORS["cleanrl"], *_band(steps, samples, iqm))
    return {", ".join(envs): [line]}


def digest(content: Mapping[str, Sequence[Line]]) -> str:
    """Return a hash of what a figure shows, which its file holds: so a test sees whether it is up to date."""
    plain = {env: [dataclasses.astuple(line) for line in lines] for env, lines in content.items()}
    return hashlib.sha256(json.dumps(plain).encode()).hexdigest()[:16]


def draw(content: Mapping[str, Sequence[Line]], path: Path, y_title: str, level: float | None = None) -> None:
    """Draw a panel per environment as SVG, with a dashed line at `level`; matplotlib comes with stable-baselines3."""
    if not content:
        return
    import matplotlib as mpl

    mpl.use("svg")
    import matplotlib.pyplot as plt

    across = min(4 if len(content) > 6 else 3, len(content))
    down = math.ceil(len(content) / across)
    with plt.rc_context({"svg.hashsalt": "fastppo", "svg.fonttype": "none", "font.size": 8}):
        size = (2.7 * across, 2.0 * down + 0.3) if len(content) > 1 else (5.0, 2.4)
        figure, axes = plt.subplots(down, across, figsize=size, layout="constrained", squeeze=False)
        for axis in axes.flat[len(content) :]:
            axis.set_axis_off()
        alone = all(len(lines) == 1 for lines in content.values())
        for axis, (env_id, lines) in zip(axes.flat, content.items(), strict=False):
            for line in lines:
                thousands = [step / 1e3 for step in line.steps]
                axis.plot(thousands, line.mean, color=line.color, linewidth=1.2, label=line.label)
                axis.fill_between(thousands, line.low, line.high, color=line.color, alpha=0.2, linewidth=0)
            if level is not None:
                axis.axhline(level, color="#79706e", linewidth=1, linestyle="--")
            seeds = "/".join(dict.fromkeys(line.seeds for line in lines))
            axis.set_title(f"{env_id}, {seeds} seed{'' if seeds == '1' else 's'}", fontsize=8)
            axis.spines[["top", "right"]].set_visible(False)
            axis.tick_params(labelsize=7)
            axis.grid(alpha=0.25, linewidth=0.5)
            axis.set_xlim(left=0)
        if not alone:
            drawn = {line.get_label(): line for axis in axes.flat for line in axis.get_lines()}
            figure.legend(drawn.values(), drawn.keys(), loc="outside upper center", ncols=3, frameon=False)
        figure.supxlabel("thousand environment steps", fontsize=8)
        figure.supylabel(y_title, fontsize=8)
        figure.savefig(path, metadata={"Date": None, "Source": digest(content)})
        plt.close(figure)


if __name__ == "__main__":
    main(tyro.cli(Options))
