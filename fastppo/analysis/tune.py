"""`fastppo tune`: search settings with Optuna, by the mean return over seeds.

Every trial has a folder, and every seed of it a run. The trials are in a journal file, so a search that was killed
continues, and several processes can share one: each takes a lock on the trial that it trains.
"""

from __future__ import annotations

import dataclasses
import fcntl
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from fastppo.analysis.training_processes import ended, run_each
from fastppo.builders.early_checks import check_early
from fastppo.config import SETTINGS, Config, Search
from fastppo.errors import ConfigError
from fastppo.runs.run_dir import RunLock
from fastppo.runtime.files import write_json

_PLAN = "plan.json"  # written first, so that a continued search notices other settings
_JOURNAL = "journal.log"
_STARTUP = 5  # trials that are never cut, and whose settings are drawn at random


def searched(base: Config, wanted: Sequence[str] = ()) -> dict[str, Search]:
    """Return what to try for each setting.

    Args:
        base: settings of all trials.
        wanted: names of settings; empty: all that have a range and are not given in `base`.

    Raises:
        ConfigError: a setting can't be searched, or is given.
    """
    known = {name: setting.search for name, setting in SETTINGS.items() if setting.search is not None}
    if isinstance(base.learning_rate, str):  # a schedule of its own
        del known["anneal_lr"]
    for name in wanted:
        if name not in known:
            raise ConfigError(f"search: {name} can't be searched; there are {', '.join(known)}.")
        if (value := getattr(base, name)) is not None:
            raise ConfigError(f"search: {name} is given as {value}; leave out one of the two.")
    found = {name: known[name] for name in wanted or known if getattr(base, name) is None}
    if not found:
        raise ConfigError("every setting that could be searched is given; leave one out.")
    return found


def open_search(folder: Path, base: Config, space: Mapping[str, Search], seeds: int) -> optuna.Study:
    """Create the folder and its journal, or continue the search in it.

    Raises:
        ConfigError: the folder holds other files or a search with other settings, or can't be created.
    """
    # through JSON, as the file holds it: tuples become lists
    settings = json.loads(json.dumps(base.to_dict() | {"search": sorted(space), "seeds": seeds}, default=str))
    path = folder / _PLAN
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if begins := not path.exists():
            if any(folder.iterdir()):
                raise ConfigError(f"run_dir={folder} is not empty and holds no search; name a new folder.")
            write_json(path, settings)
        before = json.loads(path.read_text())
    except (FileExistsError, NotADirectoryError):
        raise ConfigError(f"run_dir={folder} is a file, or lies in one; name a new folder.") from None
    except OSError as error:
        raise ConfigError(f"run_dir={folder} can't be used ({error.strerror}); name another folder.") from None
    except ValueError as error:
        raise ConfigError(f"{path} is damaged ({error}); name a new folder by --run-dir.") from None
    if differing := [f"{k} was {before.get(k)}, is {v}" for k, v in settings.items() if before.get(k) != v]:
        raise ConfigError(
            f"{folder} holds a search with other settings: {'; '.join(differing)}. Name a new folder by --run-dir."
        )
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    # a later process with the same seed would draw the first trials again
    seed = base.seed if begins else None
    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(folder / _JOURNAL))),
        study_name="fastppo",
        direction="maximize",
        # several settings at once, since they depend on each other
        sampler=optuna.samplers.TPESampler(seed=seed, multivariate=True, n_startup_trials=_STARTUP),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=_STARTUP),
        load_if_exists=True,
    )


def search(
    study: optuna.Study, folder: Path, base: Config, space: Mapping[str, Search], *, trials: int, seeds: int, jobs: int
) -> Iterator[FrozenTrial]:
    """Run trials until there are `trials` in all, those of other processes included; yield each that ends here."""
    while (taken := _take(study, folder, trials)) is not None:
        trial, lock = taken
        try:
            _run_trial(study, trial, folder, base, space, seeds, jobs)
        finally:
            lock.release()
        yield study.get_trials()[trial.number]


def _take(study: optuna.Study, folder: Path, trials: int) -> tuple[Trial, RunLock] | None:
    """Return a trial that nobody trains: one that was interrupted, or a new one. None: there are enough."""
    with _turn(folder):
        for left in study.get_trials(states=(TrialState.RUNNING,)):
            try:
                return Trial(study, left._trial_id), RunLock(_folder(folder, left.number))
            except ConfigError:  # another process trains it
                continue
        if len(study.get_trials()) >= trials:
            return None
        trial = study.ask()
        own = _folder(folder, trial.number)
        own.mkdir(parents=True, exist_ok=True)
        return trial, RunLock(own)


@contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Let one process at a time choose its trial."""
    with (folder / ".turn").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _run_trial(
    study: optuna.Study, trial: Trial, folder: Path, base: Config, space: Mapping[str, Search], seeds: int, jobs: int
) -> None:
    """Train the seeds of a trial and tell the study its value: the mean over seeds of the final mean return.

    After each seed the mean so far is compared with the median of earlier trials after as many seeds; a trial below it
    is cut. So is one whose settings contradict each other, such as minibatches that don't divide the batch.
    """
    own = _folder(folder, trial.number)
    chosen: dict[str, Any] = {name: _suggest(trial, name, values) for name, values in space.items()}
    try:
        configs = [
            dataclasses.replace(base, **chosen, seed=seed, resume="auto", run_dir=own / f"seed{seed}")
            for seed in range(1, seeds + 1)
        ]
        for config in configs:
            check_early(config)
    except ConfigError as error:
        trial.set_user_attr("reason", str(error))
        study.tell(trial, state=TrialState.PRUNED)
        return
    returns = {config.seed: _final_return(config) for config in configs if ended(config)}
    reported = set(study.get_trials()[trial.number].intermediate_values)
    runs = run_each(configs, jobs)
    try:
        for config, trouble in runs:
            if trouble is not None:
                trial.set_user_attr("reason", f"seed {config.seed}: {trouble}")
                study.tell(trial, state=TrialState.FAIL)
                return
            returns[config.seed] = _final_return(config)
            if len(returns) not in reported:
                trial.report(statistics.fmean(returns.values()), len(returns))
            if len(returns) < seeds and trial.should_prune():
                trial.set_user_attr("reason", f"below the median after {len(returns)} of {seeds} seeds")
                study.tell(trial, state=TrialState.PRUNED)
                return
    finally:
        runs.close()
    if any(map(math.isnan, returns.values())):
        trial.set_user_attr("reason", "no episode ended; train longer")
        study.tell(trial, state=TrialState.FAIL)
        return
    trial.set_user_attr("returns", [returns[seed] for seed in sorted(returns)])
    study.tell(trial, statistics.fmean(returns.values()))


def _suggest(trial: Trial, name: str, values: Search) -> float | bool:
    if values.choices:
        choice: float | bool = trial.suggest_categorical(name, values.choices)
        return choice
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _final_return(config: Config) -> float:
    assert config.run_dir is not None
    found = json.loads((config.run_dir / "result.json").read_text())["mean_return"]
    return math.nan if found is None else float(found)


def best_trial(study: optuna.Study) -> FrozenTrial | None:
    """Return the complete trial with the highest value, or None."""
    complete = study.get_trials(states=(TrialState.COMPLETE,))
    return max(complete, key=lambda trial: trial.value or -math.inf, default=None) if complete else None


def describe(trial: FrozenTrial) -> str:
    """Return the outcome of a trial in words."""
    if trial.state == TrialState.COMPLETE:
        returns = trial.user_attrs["returns"]
        return f"mean return {trial.value:,.1f} ({min(returns):,.1f} to {max(returns):,.1f})"
    verb = "cut" if trial.state == TrialState.PRUNED else "failed"
    return f"{verb}: {trial.user_attrs.get('reason', 'unknown')}"


def write_best(folder: Path, base: Config, trial: FrozenTrial) -> Path:
    """Write the settings of the best trial as best.toml, for `fastppo train --config`; return its path."""
    defaults, given = Config(), base.to_dict()
    values = {name: value for name, value in given.items() if getattr(base, name) != getattr(defaults, name)}
    for name in ("run_dir", "resume", "seed", "checkpoint_minutes", "name"):
        values.pop(name, None)
    values |= {"env_id": base.env_id} | trial.params
    path = folder / "best.toml"
    lines = [f"# trial {trial.number}: {describe(trial)}"]
    lines += [f"{name} = {json.dumps(value)}" for name, value in values.items() if not isinstance(value, dict)]
    for name, table in values.items():
        if isinstance(table, dict):
            lines += ["", f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items())]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
