"""`fastppo tune`: the search, its journal, and its files."""

import dataclasses
import json
import math
import re
import tomllib

import pytest
from optuna.trial import TrialState

from fastppo.analysis import tune, tune_report
from fastppo.cli import main
from fastppo.config import SETTINGS, Config, Search
from fastppo.errors import ConfigError
from fastppo.runs.run_dir import RunLock

BASE = Config(total_timesteps=4096, n_envs=4, compile="off")
TWO = {"n_minibatches": Search((2,))}
RATE = {"learning_rate": SETTINGS["learning_rate"].search}


def value_of(config):
    """The best learning rate is 1e-3; seed 1 is the best seed."""
    return -abs(math.log10(config.learning_rate) + 3) - config.seed / 100


@pytest.fixture
def fake_runs(monkeypatch):
    """Let a run end at once, with a mean return that a test decides; return the list of runs and the decision."""
    started, decide = [], {"return": value_of}

    def run_each(configs, jobs):
        for config in configs:
            if not tune.ended(config):
                started.append(config)
                config.run_dir.mkdir(parents=True, exist_ok=True)
                found = decide["return"](config)
                if isinstance(found, str):
                    yield config, found
                    continue
                result = {"ended": "finished", "mean_return": found}
                (config.run_dir / "result.json").write_text(json.dumps(result))
                yield config, None

    monkeypatch.setattr(tune, "run_each", run_each)
    return started, decide


def run(folder, trials, seeds=2, base=BASE, space=RATE):
    study = tune.open_search(folder, base, space, seeds)
    return study, list(tune.search(study, folder, base, space, trials=trials, seeds=seeds, jobs=1))


def test_what_is_searched():
    every = tune.searched(Config())
    assert {"learning_rate", "gamma", "n_steps", "anneal_lr"} <= set(every)
    assert all(s.choices or s.low < s.high for s in every.values())
    assert "gamma" not in tune.searched(Config(gamma=0.9))
    assert "anneal_lr" not in tune.searched(Config(learning_rate="linear:1e-3:0"))
    assert list(tune.searched(Config(), ["gamma"])) == ["gamma"]
    with pytest.raises(ConfigError, match="env_id can't be searched; there are n_steps, gamma"):
        tune.searched(Config(), ["env_id"])
    with pytest.raises(ConfigError, match="gamma is given as 0.9; leave out one"):
        tune.searched(Config(gamma=0.9), ["gamma"])
    given = Config(
        **{name: 0.5 if not s.search.choices else s.search.choices[0] for name, s in SETTINGS.items() if s.search}
    )
    with pytest.raises(ConfigError, match="every setting that could be searched is given"):
        tune.searched(given)


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.search])
def test_every_value_of_a_range_is_a_valid_setting(name):
    search = SETTINGS[name].search
    for value in search.choices or (search.low, search.high):
        assert getattr(Config(**{name: value}), name) == value


def test_a_search_finds_the_best_learning_rate(tmp_path, fake_runs):
    study, ended = run(tmp_path, 25)
    assert len(ended) == 25
    best = tune.best_trial(study)
    assert abs(math.log10(best.params["learning_rate"]) + 3) < 0.1
    assert best.user_attrs["returns"] == pytest.approx([best.value + 0.005, best.value - 0.005])
    cut = [trial for trial in ended if trial.state == TrialState.PRUNED]
    assert cut
    assert tune.describe(cut[0]) == "cut: below the median after 1 of 2 seeds"
    assert [config.seed for config in fake_runs[0]].count(2) == 25 - len(cut)


def test_a_search_continues_where_it_was_killed(tmp_path, fake_runs):
    started, decide = fake_runs

    def killed(config):
        if len(started) == 6:  # the second seed of the third trial
            raise KeyboardInterrupt
        return value_of(config)

    decide["return"] = killed
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path, 4)
    interrupted = started[-1]
    decide["return"] = value_of
    study, ended = run(tmp_path, 4)
    assert [trial.number for trial in ended] == [2, 3]
    assert started[6] == interrupted, "the seed that was killed, with the same settings"
    assert len(started) == 9, "no run is repeated"
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 4
    rates = [trial.params["learning_rate"] for trial in study.get_trials()]
    assert len(set(rates)) == 4, "the draws go on"
    assert run(tmp_path, 4)[1] == []
    assert len(run(tmp_path, 5)[1]) == 1


def test_processes_take_different_trials(tmp_path, fake_runs):
    study = tune.open_search(tmp_path, BASE, RATE, 1)
    trial, lock = tune._take(study, tmp_path, 2)
    other, other_lock = tune._take(study, tmp_path, 2)
    assert (trial.number, other.number) == (0, 1)
    assert tune._take(study, tmp_path, 2) is None, "both are taken"
    lock.release()
    assert tune._take(study, tmp_path, 2)[0].number == 0, "its process ended"
    other_lock.release()


def test_runs_that_fail_and_settings_that_contradict(tmp_path, fake_runs):
    fake_runs[1]["return"] = lambda config: "out of memory" if config.seed == 2 else 1.0
    _, (failed,) = run(tmp_path / "a", 1)
    assert tune.describe(failed) == "failed: seed 2: out of memory"
    fake_runs[1]["return"] = lambda config: None
    _, (without,) = run(tmp_path / "b", 1)
    assert tune.describe(without) == "failed: no episode ended; train longer"
    started = len(fake_runs[0])
    _, (cut,) = run(tmp_path / "c", 1, base=dataclasses.replace(BASE, n_envs=3, n_steps=5), space=TWO)
    assert tune.describe(cut).startswith("cut: n_minibatches=2 does not divide the batch of 15")
    assert len(fake_runs[0]) == started, "nothing is trained"


def test_a_folder_holds_one_search(tmp_path, fake_runs):
    run(tmp_path / "a", 1)
    with pytest.raises(ConfigError, match="search with other settings: gamma was None, is 0.9; .*seeds was 2, is 3"):
        run(tmp_path / "a", 1, seeds=3, base=dataclasses.replace(BASE, gamma=0.9))
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "thesis.tex").write_text("mine")
    with pytest.raises(ConfigError, match="is not empty and holds no search"):
        run(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match="is a file, or lies in one"):
        run(tmp_path / "b" / "thesis.tex", 1)
    (tmp_path / "a" / "plan.json").write_text("{")
    with pytest.raises(ConfigError, match="is damaged"):
        run(tmp_path / "a", 1)


def test_best_toml_holds_what_was_given_and_what_was_found(tmp_path, fake_runs):
    own = {"env_kwargs": {"sutton_barto_reward": True}, "hidden_sizes": (32, 16)}
    base = dataclasses.replace(BASE, **own, run_dir=tmp_path / "x", seed=7)
    study, _ = run(tmp_path / "a", 3, base=base)
    best = tune.best_trial(study)
    path = tune.write_best(tmp_path / "a", base, best)
    found = tomllib.loads(path.read_text())
    expected = {
        "env_id": "CartPole-v1",
        "n_envs": 4,
        "total_timesteps": 4096,
        "hidden_sizes": [32, 16],
        "compile": "off",
    }
    assert found == expected | {"env_kwargs": {"sutton_barto_reward": True}} | best.params
    assert Config.from_dict(found).learning_rate == best.params["learning_rate"]


def test_the_page_names_trials_and_settings(tmp_path, fake_runs):
    space = RATE | {"gamma": SETTINGS["gamma"].search, "anneal_lr": SETTINGS["anneal_lr"].search}
    study, _ = run(tmp_path, 20, seeds=1, space=space)
    text = tune_report.write_page(tmp_path, "CartPole-v1", study).read_text()
    assert "20 trials complete, 0 cut, 0 failed." in text
    for name in ("history", "importances", *space):
        assert f'id="{name}"' in text
    assert tune_report.terminal_table(study).row_count == 5


def test_a_search_by_the_command(tmp_path, capsys):
    arguments = ["tune", "--run-dir", str(tmp_path / "a"), "--seeds", "1", "--total-timesteps", "1024", "--n-envs", "4"]
    arguments += ["--search", "learning_rate", "gamma", "--n-steps", "32", "--compile", "off", "--n-minibatches", "2"]
    assert main([*arguments, "--trials", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"trial 0 of 1: mean return [\d.]+ \(", said)
    assert f"fastppo train --config {tmp_path / 'a' / 'best.toml'}" in said
    assert main([*arguments, "--trials", "1", "--gamma", "0.5", "--search", "learning_rate"]) == 2
    assert "search with other settings" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "a" / "best.toml"), "--run-dir", str(tmp_path / "run")]) == 0


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--trials 0", "trials=0 must be at least 1; nearest valid value: 1."),
        ("--seeds 0", "seeds=0 must be at least 1"),
        ("--jobs 0", "jobs=0 must be at least 1"),
        ("--search gama", "search: gama can't be searched; there are n_steps"),
        ("--search gamma --gamma 0.9", "search: gamma is given as 0.9"),
    ],
)
def test_wrong_arguments_are_one_line(tmp_path, monkeypatch, capsys, wrong, message):
    monkeypatch.chdir(tmp_path)
    assert main(["tune", *wrong.split()]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_lock_names_the_process_that_trains(tmp_path):
    first = RunLock(tmp_path)
    with pytest.raises(ConfigError, match="is in use by another trainer"):
        RunLock(tmp_path)
    first.release()
