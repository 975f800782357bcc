"""The learning campaign: its table, what it trains again and what not, its limits."""

import dataclasses
import json
import math
import os
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from benchmarks import learning, results_page
from fastppo.cli import parse
from fastppo.errors import ConfigError
from fastppo.profiles import TUNED

TABLE = """
[columns.plain]
settings = { profile = "cleanrl", n_envs = 2, n_steps = 32, compile = "off" }
[columns.peer]
program = "stable-baselines3"
settings = { profile = "cleanrl", n_envs = 2, n_steps = 32, value_clip = "off" }

[[stages]]
name = "first"
[[stages.rows]]
column = "plain"
envs = ["CartPole-v1", "Acrobot-v1"]
steps = 256
seeds = 2
[[stages]]
name = "second"
[[stages.rows]]
column = "peer"
envs = ["CartPole-v1"]
steps = 256
first_seed = 7
seeds = 1
"""
FIGURES = {"mean_return": 1.0, "evaluation": 2.0, "seconds": 3.0, "sps": 4, "curve": {}, "about": {"git_commit": "a"}}


@pytest.fixture
def table(tmp_path):
    path = tmp_path / "table.toml"
    path.write_text(TABLE)
    return path


@pytest.fixture
def fake(monkeypatch):
    """Training that ends at once; returns the runs that were trained, in their order."""
    trained = []

    def run_each(configs, jobs):
        for config in configs:
            if not learning.ended(config):
                trained.append((config.env_id, config.seed))
                config.run_dir.mkdir(parents=True)
                (config.run_dir / "result.json").write_text('{"ended": "finished"}')
                yield config, None

    def run_task(module, settings):
        trained.append((settings["env_id"], settings["seed"], module))
        return FIGURES

    monkeypatch.setattr(learning, "run_each", run_each)
    monkeypatch.setattr(learning, "run_task", run_task)
    monkeypatch.setattr(learning, "measure", lambda config: FIGURES)
    return trained


def go(tmp_path, table, **more):
    learning.main(learning.Options(table=table, folder=tmp_path / "runs", **more))


def test_the_committed_table_is_valid():
    rows = learning.read_table()
    for row in rows:
        assert row.config.total_timesteps == row.steps
        assert row.program in ("fastppo", "stable-baselines3")
    names = Counter(row.name for row in rows)
    assert names.most_common(1)[0][1] == 1, "two rows would share a folder"
    cleanrl = [row for row in rows if row.column == "cleanrl"]
    assert all(row.settings == {"profile": "cleanrl"} for row in cleanrl), "CleanRL's defaults, untouched"
    tuned = [row for row in rows if row.column == "tuned"]
    assert {row.env_id for row in tuned} == TUNED.keys(), "each preset is trained on seeds that no search saw"
    assert all(row.seeds.start > 100 for row in tuned)


def test_the_first_seed_of_every_row_of_a_stage_comes_first(tmp_path, table, fake):
    go(tmp_path, table)
    first = [("CartPole-v1", 1), ("Acrobot-v1", 1), ("CartPole-v1", 2), ("Acrobot-v1", 2)]
    assert fake == [*first, ("CartPole-v1", 7, "benchmarks.learning")]


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"only": ("Acrobot-v1", "second")}, []),
        ({"only": ("CartPole-v1", "plain"), "seeds": 1}, [("CartPole-v1", 1)]),
        ({"only": ("second",)}, [("CartPole-v1", 7, "benchmarks.learning")]),
        ({"only": ("Acrobot-v1",), "seeds": 1}, [("Acrobot-v1", 1)]),
        ({"hours": 0.0}, []),
    ],
)
def test_a_part_of_the_table_can_be_chosen(tmp_path, table, fake, options, trained):
    go(tmp_path, table, **options)
    assert fake == trained


def test_another_machine_continues_from_a_file_of_runs(tmp_path, table, fake):
    go(tmp_path, table, only=("CartPole-v1",), seeds=1, output=tmp_path / "first.json")
    fake.clear()
    learning.main(
        learning.Options(
            table=table, folder=tmp_path / "other", known=tmp_path / "first.json", output=tmp_path / "all.json"
        )
    )
    assert fake == [("Acrobot-v1", 1), ("CartPole-v1", 2), ("Acrobot-v1", 2)], "only what the file lacks"
    runs = [json.loads((tmp_path / name).read_text())["runs"] for name in ("first.json", "all.json")]
    assert len(runs[1]) == 5
    assert all(run in runs[1] for run in runs[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"jobs": 0}, "--jobs and --seeds must be at least 1"),
        ({"hours": math.nan}, "--hours from 0"),
        ({"seeds": -1}, "--jobs and --seeds must be at least 1"),
        ({"known": Path("missing.json")}, "missing.json is not a file that benchmarks.learning wrote"),
        ({"output": Path("missing") / "x.json"}, "there is no folder missing"),
    ],
)
def test_odd_options_are_one_line(tmp_path, table, fake, options, message):
    with pytest.raises(SystemExit, match=message):
        go(tmp_path, table, **options)
    assert fake == []


@pytest.mark.parametrize(
    "content", ["", "[1]", '{"machines": [], "runs": []}', '{"machines": [], "runs": [{"seed": 1}]}']
)
def test_a_file_of_other_content_is_refused(tmp_path, content):
    path = tmp_path / "runs.json"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"runs\.json"):
        learning.read_runs(path)


def test_a_file_of_runs_is_not_replaced_by_none(tmp_path, table, fake):
    path = tmp_path / "all.json"
    path.write_text("before")
    with pytest.raises(SystemExit, match="holds no run that has ended"):
        go(tmp_path, table, hours=0.0, output=path)
    assert path.read_text() == "before"


def test_an_unknown_choice_is_one_line(tmp_path, table):
    with pytest.raises(SystemExit, match=r"--only Pong: the table has Acrobot-v1, CartPole-v1"):
        go(tmp_path, table, only=("Pong",))


def test_runs_that_have_ended_are_kept_and_the_others_repeated(tmp_path, table, fake):
    go(tmp_path, table)
    output = tmp_path / "all.json"
    go(tmp_path, table, output=output)
    assert len(fake) == 5, "nothing was trained twice"
    found = json.loads(output.read_text())
    assert [(run["column"], run["env_id"], run["seed"]) for run in found["runs"]] == [
        *[("plain", env, seed) for env in ("CartPole-v1", "Acrobot-v1") for seed in (1, 2)],
        ("peer", "CartPole-v1", 7),
    ]
    assert found["machines"] == [{"git_commit": "a"}]
    killed = learning.read_table(table)[1].configs(tmp_path / "runs")[0]
    (killed.run_dir / "result.json").write_text('{"ended": "interrupted"}')
    killed.run_dir.with_suffix(".json").unlink()
    fake.clear()
    with pytest.raises(FileExistsError):  # the fake makes a new folder; the real one resumes
        go(tmp_path, table)
    assert fake == [("Acrobot-v1", 1)]


def test_a_run_that_ended_unmeasured_is_measured_by_the_next_call(tmp_path, table, fake):
    go(tmp_path, table)
    row = learning.read_table(table)[0]
    file = row.configs(tmp_path / "runs")[0].run_dir.with_suffix(".json")
    file.unlink()
    go(tmp_path, table, hours=0.0, output=tmp_path / "all.json")
    assert json.loads(file.read_text())["evaluation"] == 2.0


def test_other_settings_under_an_old_name_are_refused(tmp_path, table, fake):
    go(tmp_path, table)
    table.write_text(TABLE.replace("n_steps = 32, compile", "n_steps = 64, compile"))
    with pytest.raises(ConfigError, match=r"n_steps was 32, is 64"):
        go(tmp_path, table)


@pytest.mark.parametrize("by", ["hours", "SIGTERM"])
def test_hours_and_sigterm_stop_training_and_close_running_processes(tmp_path, table, monkeypatch, capsys, by):
    closed = []

    def run_each(configs, jobs):
        try:
            if by == "SIGTERM":
                os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
            yield
        finally:
            closed.append(True)

    monkeypatch.setattr(learning, "run_each", run_each)
    numbers = (signal.SIGALRM, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    go(tmp_path, table, hours=0.2 / 3600 if by == "hours" else 1.0)
    assert closed
    assert "stopped" in capsys.readouterr().out
    assert [signal.getsignal(number) for number in numbers] == before
    assert signal.getitimer(signal.ITIMER_REAL) == (0, 0)


def test_a_curve_is_thinned_evenly_and_keeps_both_ends():
    curve = learning.thinned([*range(1, 489)], [math.nan, *range(2, 489)])
    assert len(curve["steps"]) == learning.POINTS
    assert (curve["steps"][0], curve["steps"][-1]) == (1, 488)
    assert curve["returns"][0] is None
    assert curve["returns"][1:] == curve["steps"][1:]
    assert learning.thinned([5], [1.0]) == {"steps": [5], "returns": [1.0]}


def test_a_campaign_trains_measures_and_collects(tmp_path, table):
    output = tmp_path / "all.json"
    go(tmp_path, table, only=("CartPole-v1",), seeds=1, output=output)
    ours, theirs = json.loads(output.read_text())["runs"]
    assert (ours["column"], theirs["column"]) == ("plain", "peer")
    for run in (ours, theirs):
        assert run["steps"] == 256
        assert run["episodes"] > 5
        assert 8 < run["mean_return"] < 100
        assert 8 < run["evaluation"] <= 500
        assert run["curve"]["steps"] == [64, 128, 192, 256]
        assert run["curve"]["returns"][-1] == pytest.approx(run["mean_return"], rel=1e-4)
    assert Path(tmp_path / "runs" / "plain_CartPole-v1_256" / "runs" / "seed1" / "model.safetensors").exists()


def test_a_row_uses_its_columns_settings():
    row = next(row for row in learning.read_table() if row.program == "stable-baselines3")
    other = next(r for r in learning.read_table() if (r.column, r.env_id) == ("no-value-clip-vf-1", row.env_id))
    assert dataclasses.replace(row.config, seed=1) == dataclasses.replace(other.config, seed=1)


def run(stage, column, env_id, steps, seed, mean_return, evaluation=0.0, curve=None):
    curve = curve or {"steps": [100, 200, 300], "returns": [None, mean_return / 2, mean_return]}
    figures = {"mean_return": mean_return, "evaluation": evaluation, "seconds": 60.0, "sps": 1000, "curve": curve}
    return {"stage": stage, "column": column, "env_id": env_id, "total_timesteps": steps, "seed": seed, **figures}


RUNS = [
    *[run("defaults", "cleanrl", "Hopper-v5", 1_000_000, seed, 2000.0 + 100 * seed, 2500.0) for seed in (1, 2, 3)],
    *[run("ablation", "cleanrl", "Hopper-v5", 500_000, seed, 1000.0 + seed) for seed in (1, 2)],
    *[run("ablation", "no-value-clip", "Hopper-v5", 500_000, seed, 1500.0 + seed) for seed in (1, 2)],
    run("presets", "tuned", "CartPole-v1", 200_000, 101, 500.0, 500.0),
]


def test_the_page_shows_means_with_intervals_differences_and_what_is_missing():
    text = results_page.page(RUNS, "learning.json")
    figures = "2,200 (2,100 to 2,300) | 2,200 (2,100 to 2,300) | 2,500 (2,500 to 2,500)"
    assert f"| Hopper-v5 | 1M | 3 of 5 | {figures} | 1.00 | 1,000 |" in text
    # Welch: standard error (0.5 / 2 + 0.5 / 2) ** 0.5 = 0.707 with two degrees of freedom, so 4.303 x 0.707
    assert "| 1,502 (1,501 to 1,502), 2 seeds | 500 (497 to 503) |  |  |" in text
    assert "## stable-baselines3" not in text, "no run of it"
    assert "| CartPole-v1 | 200k | 1 of 5 | 500 | 500 | 500 | 1.00 | 1,000 |" in text, "one seed has no interval"
    missing = text.partition("## Missing")[2].replace("\n  ", " ")
    assert "- defaults, CleanRL's defaults: HalfCheetah-v5 5 of 5, Hopper-v5 2 of 5, " in missing
    assert "- ablation, no value clip: HalfCheetah-v5 5 of 5, Hopper-v5 3 of 5, " in missing
    assert not [line for line in text.splitlines() if len(line) > (230 if line.startswith("|") else 130)]


def complete(returns):
    """Runs of the whole ablation; `returns` gives those of a column in an environment by seed."""
    rows = [row for row in learning.read_table() if row.stage == "ablation"]
    return [
        run(row.stage, row.column, row.env_id, row.steps, seed, returns(row.column, seed))
        for row in rows
        for seed in row.seeds
    ]


@pytest.mark.parametrize(
    ("shift", "chance", "verdict"),
    [
        (10.0, "1.00 (1.00 to 1.00)", 'runs with "no value clip" return more than runs with'),
        (-10.0, "0.00 (0.00 to 0.00)", 'runs with "no value clip" return less than runs with'),
        (0.0, "0.50 (0.", 'runs with "no value clip" and with "no value clip, vf_coef 1" show no difference'),
    ],
)
def test_a_complete_ablation_says_what_a_default_costs(shift, chance, verdict):
    runs = complete(lambda column, seed: seed + shift * (column == "no-value-clip"))
    text = results_page.page(runs, "learning.json").partition("## Value clipping")[2].partition("## ")[0]
    assert f"| probability of a higher return |  |  | {chance}" in text
    assert verdict in text.replace("\n", " ")
    assert "decides nothing" not in text
    assert "decides nothing" in results_page.page(runs[1:], "learning.json")


def test_the_probability_of_improvement_is_the_share_of_better_pairs():
    samples = [[1.0, 2.0], [10.0], [3.0, 2.0, 0.0], [11.0]]  # two environments: x1, x2, y1, y2
    found = results_page.probability_of_improvement(*map(np.array, samples))
    assert found == pytest.approx(((2 + 1.5 + 0) / 6 + 1) / 2)
    several = [np.stack([np.array(x), np.array(x)]) for x in samples]
    assert results_page.probability_of_improvement(*several) == pytest.approx([found, found])


def test_a_note_says_whose_figure_is_higher_and_when_nobody_knows_why(monkeypatch):
    monkeypatch.setattr(results_page, "NOTES", {"HalfCheetah-v5": "tuned settings."})
    runs = [
        run("defaults", "cleanrl", env_id, 1_000_000, seed, training + seed, evaluation + seed)
        for env_id, training, evaluation in (("HalfCheetah-v5", 1400.0, 5815.0), ("Hopper-v5", 2000.0, 2500.0))
        for seed in range(1, 6)
    ]
    text = results_page.page(runs, "learning.json")
    assert "- **HalfCheetah-v5** (below CleanRL, SLM-Lab): tuned settings." in text, "the zoo's is of evaluations"
    assert "- **Hopper-v5** (below CleanRL, Tianshou): the reason is not known yet." in text
    assert "- **Walker2d-v5**" not in text, "no runs"


def test_environments_together_are_relative_to_cleanrls_figures():
    curves = {"HalfCheetah-v5": 1443.0, "Hopper-v5": 2383.0}
    runs = [
        run("defaults", "cleanrl", env_id, 1_000_000, seed, factor * figure)
        for env_id, figure in curves.items()
        for seed, factor in enumerate((1.0, 2.0, 3.0))
    ]
    ((envs, (line,)),) = results_page.together(runs).items()
    assert (envs, line.seeds, line.steps) == ("HalfCheetah-v5, Hopper-v5", "3", [200, 300])
    assert line.mean == pytest.approx([1.0, 2.0], abs=1e-3), "the middle half of 1, 1, 2, 2, 3, 3"
    assert 1.0 < line.low[-1] < 2.0 < line.high[-1] < 3.0
    assert results_page.together(runs[:1]) == {}


COMMANDS = {text: row for row in learning.read_table() if (text := results_page.command(row)).startswith("fastppo")}


@pytest.mark.parametrize("text", COMMANDS)
def test_a_command_of_the_page_gives_the_settings_of_its_row(text):
    row = COMMANDS[text]
    program, *words = text.replace("ENV", row.env_id).split()
    command = parse(words)
    given = {name: getattr(command, name) for name in ("env_id", "seeds", *row.settings, "total_timesteps", "seed")}
    own = {"env_id": row.env_id, "seeds": len(row.seeds), **row.settings}
    own |= {"total_timesteps": row.steps, "seed": row.seeds.start}
    assert (program, json.loads(json.dumps(given))) == ("fastppo", own)


def test_curves_are_averaged_where_every_seed_has_one():
    curves = [{"steps": [100, 200, 300], "returns": r} for r in ([None, 2.0, 4.0], [1.0, 4.0, 8.0])]
    both = [run("defaults", "cleanrl", "Hopper-v5", 1_000_000, k, 1.0, curve=c) for k, c in enumerate(curves)]
    (line,) = results_page.panels(both, "defaults")["Hopper-v5"]
    assert (line.steps, line.mean, line.low, line.high) == ([200, 300], [3.0, 6.0], [2.0, 4.0], [4.0, 8.0])


def test_a_figure_has_a_panel_per_environment_and_says_what_it_was_drawn_from(tmp_path):
    pytest.importorskip("matplotlib")
    content = results_page.panels(RUNS, "ablation")
    results_page.draw(content, tmp_path / "figure.svg", "return", level=1000.0)
    text = (tmp_path / "figure.svg").read_text()
    for part in ("Hopper-v5, 2 seeds", "no value clip", results_page.digest(content)):
        assert part in text
    assert results_page.digest(results_page.panels(RUNS[:-2], "ablation")) not in text


def test_page_and_figures_are_made_of_the_committed_runs():
    runs = json.loads(results_page.newest().read_text())["runs"]
    docs = results_page.DOCS
    assert (docs / "results.md").read_text() == results_page.page(runs, results_page.newest().name)
    contents = {
        results_page.CURVES: results_page.panels(runs, "defaults"),
        results_page.ABLATION: results_page.panels(runs, "ablation"),
        results_page.TOGETHER: results_page.together(runs),
    }
    for name, content in contents.items():
        assert not content or results_page.digest(content) in (docs / name).read_text()


def test_notes_and_published_figures_are_of_environments_of_the_table():
    envs = {row.env_id for row in learning.read_table()}
    assert results_page.NOTES.keys() <= envs
    assert results_page.PUBLISHED.keys() <= envs
    assert {source for figures in results_page.PUBLISHED.values() for source in figures} == results_page.SOURCES.keys()
