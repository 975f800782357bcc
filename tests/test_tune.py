"""`fastppo tune`: the search, its journal, and its files."""

import ast
import dataclasses
import fcntl
import json
import math
import os
import pathlib
import re
import shlex
import signal
import subprocess
import sys
import tomllib

import pytest
from optuna.trial import TrialState, create_trial

from benchmarks import tuned
from fastppo.analysis import training_processes, tune, tune_report
from fastppo.cli import main, parse
from fastppo.config import SETTINGS, Config, SearchValues, fill_defaults
from fastppo.errors import ConfigError
from fastppo.profiles import TUNED
from fastppo.runs.run_dir import RunLock
from tests import PATIENCE, wait_until

BASE = Config(total_timesteps=4096, n_envs=4, compile="off")
TWO = {"n_minibatches": SearchValues((2,))}
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
    return study, list(tune.run_trials(study, folder, base, space, trials=trials, seeds=seeds, jobs=1))


def test_what_is_searched():
    every = tune.search_space(Config())
    assert {"learning_rate", "gamma", "n_steps", "anneal_lr"} <= set(every)
    assert all(s.choices or s.low < s.high for s in every.values())
    assert "gamma" not in tune.search_space(Config(gamma=0.9))
    assert "anneal_lr" not in tune.search_space(Config(learning_rate="linear:1e-3:0"))
    assert list(tune.search_space(Config(), ["gamma"])) == ["gamma"]
    with pytest.raises(ConfigError, match="env_id can't be searched; there are n_steps, gamma"):
        tune.search_space(Config(), ["env_id"])
    with pytest.raises(ConfigError, match="gamma is given as 0.9; leave out one"):
        tune.search_space(Config(gamma=0.9), ["gamma"])
    given = Config(
        objective="clip_and_penalty",
        **{name: 0.5 if not s.search.choices else s.search.choices[-1] for name, s in SETTINGS.items() if s.search},
    )
    with pytest.raises(ConfigError, match="every setting that could be searched is given"):
        tune.search_space(given)


def test_settings_without_effect_are_not_searched():
    clip, penalty, both = (set(tune.search_space(Config(objective=o))) for o in ("clip", "penalty", "clip_and_penalty"))
    penalties = {"kl_coef", "penalty_kl"}
    assert "clip_coef" in clip
    assert not penalties & clip
    assert penalty == clip - {"clip_coef"} | penalties
    assert both == clip | penalties
    assert penalty - set(tune.search_space(Config(objective="penalty", kl_coef=2.0))) == {"kl_coef"}
    with pytest.raises(ConfigError, match="search: clip_coef has no effect with objective=penalty; leave out one"):
        tune.search_space(Config(objective="penalty"), ["clip_coef"])
    with pytest.raises(ConfigError, match="search: penalty_kl has no effect with objective=clip"):
        tune.search_space(Config(), ["penalty_kl"])


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.search])
def test_every_value_of_a_range_is_a_valid_setting(name):
    search = SETTINGS[name].search
    for value in search.choices or (search.low, search.high):
        assert getattr(Config(**{"objective": "clip_and_penalty", name: value}), name) == value


def test_a_search_finds_the_best_learning_rate(tmp_path, fake_runs):
    study, ended = run(tmp_path, 25)
    assert len(ended) == 25
    best = tune.ranked(study)[0]
    assert abs(math.log10(best.params["learning_rate"]) + 3) < 0.1
    assert best.user_attrs["returns"] == pytest.approx([best.value + 0.005, best.value - 0.005])
    pruned = [trial for trial in ended if trial.state == TrialState.PRUNED]
    assert pruned
    assert tune.describe(pruned[0]) == "pruned: below the median after 1 of 2 seeds"
    assert [config.seed for config in fake_runs[0]].count(2) == 25 - len(pruned)


def test_the_best_trial_becomes_a_preset(tmp_path, fake_runs, monkeypatch, capsys):
    base = dataclasses.replace(BASE, threads=1, gamma=0.9, env_id="Acrobot-v1")
    study, _ = run(tmp_path / "search", 4, base=base)
    tuned.main(tuned.Options(tmp_path / "search", tmp_path / "trials.json"))
    found = json.loads((tmp_path / "trials.json").read_text())
    best = tune.ranked(study)[0]
    rate = float(f"{best.params['learning_rate']:.3g}")
    preset = {"total_timesteps": 4096, "n_envs": 4, "gamma": 0.9, "learning_rate": rate}
    assert found["preset"] == preset
    assert [trial["value"] for trial in found["trials"]] == [t.values[0] for t in study.get_trials()]
    comment, _, entry = capsys.readouterr().out.partition("\n")
    assert comment == f"    # trial {best.number} of 4, seeds 1 to 2: trials.json"
    assert ast.literal_eval(f"{{{entry}}}") == {"Acrobot-v1": preset}
    monkeypatch.setitem(TUNED, "Acrobot-v1", preset)
    filled = fill_defaults(Config(env_id="Acrobot-v1", profile="tuned"), "discrete")
    assert {name: getattr(filled, name) for name in preset} == preset


def test_settings_that_no_profile_fills_are_no_preset(tmp_path, fake_runs):
    run(tmp_path / "search", 1, base=dataclasses.replace(BASE, activation="relu"))
    with pytest.raises(SystemExit, match="was given activation, which a profile doesn't fill"):
        tuned.main(tuned.Options(tmp_path / "search"))
    with pytest.raises(SystemExit, match="is not a folder of fastppo tune"):
        tuned.main(tuned.Options(tmp_path))


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
    trial, lock = tune._claim_trial(study, tmp_path, 2)
    other, other_lock = tune._claim_trial(study, tmp_path, 2)
    assert (trial.number, other.number) == (0, 1)
    assert tune._claim_trial(study, tmp_path, 2) is None, "both are taken"
    lock.release()
    assert tune._claim_trial(study, tmp_path, 2)[0].number == 0, "its process ended"
    other_lock.release()


def test_runs_that_fail_and_settings_that_contradict(tmp_path, fake_runs):
    fake_runs[1]["return"] = lambda config: "out of memory" if config.seed == 2 else 1.0
    _, (failed,) = run(tmp_path / "a", 1)
    assert tune.describe(failed) == "failed: seed 2: out of memory"
    fake_runs[1]["return"] = lambda config: None
    _, (without,) = run(tmp_path / "b", 1)
    assert tune.describe(without) == "failed: seed 1: no episode ended, so there is no mean return; train longer"
    assert without.intermediate_values == {}
    started = len(fake_runs[0])
    _, (pruned,) = run(tmp_path / "c", 1, base=dataclasses.replace(BASE, n_envs=3, n_steps=5), space=TWO)
    assert tune.describe(pruned).startswith("pruned: n_minibatches=2 does not divide the batch of 15")
    assert len(fake_runs[0]) == started, "nothing is trained"


def test_a_folder_holds_one_search(tmp_path, fake_runs):
    run(tmp_path / "a", 1)
    with pytest.raises(ConfigError, match="search with other settings: gamma was none, is 0.9; seeds was 2, is 3"):
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


def test_a_return_of_zero_is_better_than_a_negative_one(tmp_path, fake_runs):
    returns = iter([-5.0, 0.0, -1.0, 0.0])
    fake_runs[1]["return"] = lambda config: next(returns)
    study, _ = run(tmp_path, 4, seeds=1)
    assert [trial.number for trial in tune.ranked(study)] == [1, 3, 2, 0], "of equal trials the earlier is first"
    tune.write_best(tmp_path, BASE, tune.ranked(study)[0])
    assert (tmp_path / "best.toml").read_text().startswith("# trial 1: mean return 0.0")
    rows = tune_report.terminal_table(study).columns
    assert list(rows[0].cells) == ["1", "3", "2", "0"]
    assert [column.header for column in rows][:4] == ["trial", "mean", "lowest", "highest"]


def test_pruning_compares_the_same_seeds(tmp_path, fake_runs):
    """Seed 2 gives 100 times the return of seed 1; the order in which seeds end decides nothing."""
    levels = iter([1, 2, 3, 4, 5, 3, 2.9])
    level = {}

    def scaled(config):
        trial = config.run_dir.parent.name
        if trial not in level:
            level[trial] = next(levels)
        return level[trial] * (100.0 if config.seed == 2 else 1.0)

    fake_runs[1]["return"] = scaled
    study, ended = run(tmp_path, 7, seeds=3)
    assert [trial.state for trial in ended[:5]] == [TrialState.COMPLETE] * 5, "too few to compare with before"
    assert ended[5].state == TrialState.COMPLETE, "equal to the median of 1 to 5"
    assert ended[6].state == TrialState.PRUNED
    assert tune.describe(ended[6]) == "pruned: below the median after 1 of 3 seeds"
    assert ended[6].intermediate_values == {1: 2.9}
    assert ended[4].intermediate_values == {1: 5.0, 2: 252.5, 3: pytest.approx(170)}
    # seed 2 alone says nothing about the mean over the first seeds
    configs = [dataclasses.replace(BASE, seed=seed) for seed in (1, 2, 3)]
    assert tune._first_seeds({2: 1.0, 3: 1.0}, configs) == []
    assert tune._first_seeds({2: 1.0, 1: 3.0}, configs) == [3.0, 1.0]
    assert not tune._below_median(study, [])
    assert tune._below_median(study, [2.9])
    assert not tune._below_median(study, [3.0, 300.0])


def test_trials_without_a_return_fail_and_the_search_goes_on(tmp_path, fake_runs):
    returns = iter([None, 1.0, None, 2.0])
    fake_runs[1]["return"] = lambda config: next(returns)
    study, ended = run(tmp_path, 4, seeds=1)
    states = [trial.state for trial in ended]
    assert states == [TrialState.FAIL, TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert tune.ranked(study)[0].number == 3


def test_an_interrupted_trial_of_which_only_the_journal_knows_continues(tmp_path, fake_runs):
    """As kill -9 leaves it inside `ask`, before the trial has a folder."""
    study = tune.open_search(tmp_path, BASE, RATE, 1)
    study.ask()
    study, ended = run(tmp_path, 2, seeds=1)
    assert [trial.number for trial in ended] == [0, 1]
    assert [trial.state for trial in study.get_trials()] == [TrialState.COMPLETE] * 2


def test_a_trial_that_ends_while_it_is_claimed_is_not_trained_again(tmp_path, fake_runs, monkeypatch):
    study = tune.open_search(tmp_path, BASE, RATE, 1)
    trial = study.ask()
    lock = tune._lock

    def ends_before_it_is_locked(folder, number):
        if number == trial.number:
            study.tell(trial, 1.0)
        return lock(folder, number)

    monkeypatch.setattr(tune, "_lock", ends_before_it_is_locked)
    assert tune._claim_trial(study, tmp_path, 1) is None
    claimed, _ = tune._claim_trial(study, tmp_path, 2)
    assert claimed.number == 1


def test_fewer_trials_than_there_are_run_nothing(tmp_path, fake_runs):
    run(tmp_path, 3, seeds=1)
    study = tune.open_search(tmp_path, BASE, RATE, 1)
    study.ask()  # trial 3, interrupted
    assert run(tmp_path, 2, seeds=1)[1] == []
    assert [trial.number for trial in run(tmp_path, 4, seeds=1)[1]] == [3]


def test_a_line_that_a_power_loss_tore_is_dropped(tmp_path, fake_runs):
    run(tmp_path, 2, seeds=1)
    journal = tmp_path / "journal.log"
    whole = journal.read_bytes()
    journal.write_bytes(whole + b'{"op_code":4,"work')
    _, ended = run(tmp_path, 3, seeds=1)
    assert [trial.number for trial in ended] == [2]
    assert journal.read_bytes().startswith(whole)
    journal.write_bytes(b"nonsense\n" + whole)
    with pytest.raises(ConfigError, match="journal.log is damaged"):
        run(tmp_path, 3, seeds=1)


def test_a_torn_line_is_dropped_under_the_lock_of_the_journal(tmp_path, fake_runs, monkeypatch):
    run(tmp_path, 1, seeds=1)
    drop, dropped = tune._drop_torn_line, []

    def checking(journal):
        with (tmp_path / ".journal").open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        dropped.append(journal)
        drop(journal)

    monkeypatch.setattr(tune, "_drop_torn_line", checking)
    run(tmp_path, 2, seeds=1)
    assert dropped == [tmp_path / "journal.log"]


def test_settings_that_change_no_number_may_differ(tmp_path, fake_runs):
    run(tmp_path, 1)
    other = dataclasses.replace(BASE, checkpoint_minutes=3.0, log_every=5, keep_checkpoints=7)
    assert len(run(tmp_path, 2, base=other)[1]) == 1
    for changes in ({"profile": "tuned"}, {"seed": 2}, {"objective": "clip_and_penalty"}):
        with pytest.raises(ConfigError, match=f"{next(iter(changes))} was "):
            run(tmp_path, 2, base=dataclasses.replace(BASE, **changes))
    with pytest.raises(ConfigError, match="search was .* Name a new folder"):
        run(tmp_path, 2, space={"learning_rate": SearchValues(low=1e-5, high=1e-3, log=True)})


def test_as_many_seeds_at_a_time_as_have_cores_for_their_environments(monkeypatch):
    monkeypatch.setattr(tune, "usable_cores", lambda: 8)
    monkeypatch.setattr(training_processes, "usable_cores", lambda: 8)
    monkeypatch.setattr("fastppo.envs.pool.usable_cores", lambda: 8)
    assert tune.choose_jobs(BASE, 3) == 3
    assert tune.choose_jobs(BASE, 20) == 8
    pool = dataclasses.replace(BASE, vectorization="pool")
    assert tune.choose_jobs(pool, 3) == 2  # a pool has a worker for each of four environments, and no more
    assert tune.choose_jobs(dataclasses.replace(pool, workers=16), 3) == 2
    assert tune.choose_jobs(dataclasses.replace(pool, workers=2), 3) == 3
    assert tune.choose_jobs(dataclasses.replace(pool, n_envs=16), 3) == 1


def test_best_toml_holds_what_was_given_and_what_was_found(tmp_path, fake_runs):
    own = {"env_kwargs": {"sutton_barto_reward": True}, "hidden_sizes": (32, 16)}
    base = dataclasses.replace(BASE, **own, run_dir=tmp_path / "x", seed=7)
    study, _ = run(tmp_path / "a", 3, base=base)
    best = tune.ranked(study)[0]
    command = tune.write_best(tmp_path / "a", base, best)
    path = tmp_path / "a" / "best.toml"
    assert command == f"fastppo train --config {path}"
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
    assert [path.name for path in (tmp_path / "a").glob(".*.tmp")] == []


def test_a_write_that_fails_leaves_the_earlier_results(tmp_path, fake_runs, monkeypatch):
    study, _ = run(tmp_path, 1)
    tune.write_best(tmp_path, BASE, tune.ranked(study)[0])
    tune_report.write_page(tmp_path, "CartPole-v1", study)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"best.toml", "tune.html"} <= set(before)
    whole = pathlib.Path.write_text

    def half(path, text, **options):
        whole(path, text[: len(text) // 2], **options)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(pathlib.Path, "write_text", half)
    with pytest.raises(OSError, match="No space"):
        tune.write_best(tmp_path, BASE, tune.ranked(study)[0])
    with pytest.raises(OSError, match="No space"):
        tune_report.write_page(tmp_path, "CartPole-v1", study)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


def test_best_toml_holds_nested_values_and_any_text(tmp_path):
    trial = create_trial(params={}, value=0.0, user_attrs={"returns": [0.0]})
    kwargs = {"größe": {"a": [1, 2.5, True, {"b": []}], "": '\x7f\t\n"\\ \x00 ☃'}, "x": -math.inf, "y": 1e-07}
    base = dataclasses.replace(BASE, env_kwargs=kwargs)
    tune.write_best(tmp_path, base, trial)
    text = (tmp_path / "best.toml").read_text("utf-8")
    assert tomllib.loads(text)["env_kwargs"] == kwargs
    assert "größe" in text
    command = parse(["train", "--config", str(tmp_path / "best.toml")])
    assert command.settings() == base


def test_the_printed_command_carries_what_a_file_cannot_hold(tmp_path):
    trial = create_trial(params={}, value=0.0, user_attrs={"returns": [0.0]})
    for kwargs, why in (({"a": {"b": None}}, "TOML has no null"), ({"a": "\ud800"}, "TOML holds Unicode alone")):
        base = dataclasses.replace(
            BASE,
            env_kwargs=kwargs,
            env_id="own world:Env-v0",
            wrappers=("gymnasium.wrappers:FlattenObservation", "own:Wrapper"),
        )
        command = tune.write_best(tmp_path, base, trial)
        assert f"# env_kwargs is left out, because {why}; give it as a flag" in (tmp_path / "best.toml").read_text()
        program, *rest = shlex.split(command)
        assert program == "fastppo"
        assert parse(rest).settings() == base


def test_the_page_names_trials_and_settings(tmp_path, fake_runs):
    space = RATE | {"gamma": SETTINGS["gamma"].search, "anneal_lr": SETTINGS["anneal_lr"].search}
    study, _ = run(tmp_path, 20, seeds=1, space=space)
    text = tune_report.write_page(tmp_path, "CartPole-v1", study).read_text()
    assert "20 trials complete, 0 pruned, 0 failed." in text
    for name in ("history", "importances", *space):
        assert f'id="{name}"' in text
    assert tune_report.terminal_table(study).row_count == 5


def test_a_search_by_the_command(tmp_path, capsys):
    arguments = ["tune", "--run-dir", str(tmp_path / "a"), "--seeds", "1", "--total-timesteps", "1024", "--n-envs", "4"]
    arguments += ["--search", "learning_rate", "gamma", "--n-steps", "32", "--compile", "off", "--n-minibatches", "2"]
    assert main([*arguments, "--trials", "1"]) == 0
    said = capsys.readouterr().out
    assert re.search(r"trial 0 \(1 of 1\): mean return [\d.]+ \(", said)
    assert f"fastppo train --config {tmp_path / 'a' / 'best.toml'}" in said
    assert main([*arguments, "--trials", "1", "--gamma", "0.5", "--search", "learning_rate"]) == 2
    assert "search with other settings" in capsys.readouterr().err
    assert main(["train", "--config", str(tmp_path / "a" / "best.toml"), "--run-dir", str(tmp_path / "run")]) == 0


def test_a_file_gives_the_runs_no_target_and_no_exact_resume(tmp_path, monkeypatch):
    (tmp_path / "given.toml").write_text('target_return = 20.0\nexact_resume = true\nn_envs = 4\nrun_dir = "mine"\n')
    seen = []
    monkeypatch.setattr(
        tune, "run_trials", lambda study, folder, base, *a, **k: seen.append((folder, base)) or iter(())
    )
    monkeypatch.chdir(tmp_path)
    assert main(["tune", "--config", "given.toml", "--seed", "3"]) == 1
    ((folder, base),) = seen
    assert (base.run_dir, base.target_return, base.exact_resume, base.n_envs) == (None, None, False, 4)
    assert str(folder) == "mine"


def test_the_seed_is_the_searchs(capsys):
    with pytest.raises(SystemExit):
        main(["tune", "--help"])
    assert "Seed of the search" in " ".join(capsys.readouterr().out.split())


TINY = ["--n-envs", "4", "--n-steps", "32", "--total-timesteps", "1024", "--compile", "off", "--threads", "1"]
TINY += ["--search", "learning_rate", "gamma", "--n-minibatches", "2", "--record-ratios", "0", "--jobs", "1"]


def start(folder, *more):
    command = [sys.executable, "-m", "fastppo", "tune", "--run-dir", str(folder), *TINY, *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, process_group=0)


def test_two_processes_share_a_search_and_one_is_killed(tmp_path):
    """Each trial is trained once, also that of the killed process, and with the settings that it had."""
    folder = tmp_path / "search"
    arguments = ["--trials", "4", "--seeds", "2", "--total-timesteps", "4096"]
    first, second = start(folder, *arguments), start(folder, *arguments)
    try:
        trials = folder / "trials"
        wait_until(lambda: (trials / "0000" / "seed1" / "metrics.jsonl").exists())
        wait_until(lambda: (trials / "0001" / ".lock").exists())
        holder = int((trials / "0000" / ".lock").read_text().split()[1])
        killed, other = (first, second) if holder == first.pid else (second, first)
        assert killed.pid == holder
        os.kill(killed.pid, signal.SIGKILL)
        said, _ = other.communicate(timeout=PATIENCE)
        assert other.returncode == 0, said
        third = start(folder, *arguments)
        said, _ = third.communicate(timeout=PATIENCE)
        assert third.returncode == 0, said
    finally:
        for process in (first, second):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
    base = parse(["tune", *TINY, *arguments]).settings(run_dir=None)
    study = tune.open_search(folder, base, tune.search_space(base, ["learning_rate", "gamma"]), 2)
    states = [trial.state for trial in study.get_trials()]
    assert states == [TrialState.COMPLETE] * 4, [tune.describe(trial) for trial in study.get_trials()]
    for trial in study.get_trials():
        for seed in (1, 2):
            run_dir = trials / f"{trial.number:04d}" / f"seed{seed}"
            config = json.loads((run_dir / "config.json").read_text())
            assert {name: config[name] for name in trial.params} == trial.params
            steps = [json.loads(line)["global_step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            assert steps == sorted(set(steps)), "trained by one process at a time"
            assert steps[-1] == 4096
    assert len(list(trials.iterdir())) == 4


def test_fewer_trials_and_torchrun_by_the_command(tmp_path, capsys, monkeypatch):
    arguments = ["tune", "--run-dir", str(tmp_path / "a"), *TINY, "--seeds", "1"]
    assert main([*arguments, "--trials", "2"]) == 0
    capsys.readouterr()
    assert main([*arguments, "--trials", "1"]) == 0
    said = capsys.readouterr().out
    assert "trials 1 (2 begun before), seeds 1, 1 at a time" in said
    assert "train:   fastppo train --config" in said
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*arguments, "--trials", "3"]) == 2
    assert "tune starts processes of its own, one for each run; start it without torchrun." in capsys.readouterr().err


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--trials 0", "trials=0 must be at least 1; nearest valid value: 1."),
        ("--seeds 0", "seeds=0 must be at least 1"),
        ("--jobs 0", "jobs=0 must be at least 1"),
        ("--env-id CartPol-v1", "did you mean CartPole-v1?"),
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
