"""`fastppo tune`: search settings with Optuna, by the mean return over seeds.

Every trial has a folder, and every seed of it a run. The trials are in a journal file, so a search that was killed
continues, and several processes can share one: each locks the folder of the trial that it trains.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import shlex
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, Trial, TrialState

from fastppo.analysis.training_processes import claim_folder, ended, env_cores, run_each, turn_file
from fastppo.builders.early_checks import check_early
from fastppo.config import DEFAULTS, SETTINGS, Config, SearchValues
from fastppo.errors import ConfigError
from fastppo.runs.run_dir import RunLock
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.files import exclusive, write_text

_JOURNAL = "journal.log"
_JOURNAL_LOCK = ".journal"
_STARTUP = 5  # first trials, whose settings are drawn at random; as many must be complete before one is pruned
_NOT_OF_THE_BEST = ("run_dir", "resume", "seed", "checkpoint_minutes", "name")  # the search's own, not the trial's


def search_space(base: Config, wanted: Sequence[str] = ()) -> dict[str, SearchValues]:
    """Return the values to try, by setting.

    Args:
        base: settings of all trials.
        wanted: names of settings; empty: all that have values to try, take effect and are not given in `base`.

    Raises:
        ConfigError: a setting can't be searched, has no effect, or is given.
    """
    known = {name: setting.search for name, setting in SETTINGS.items() if setting.search is not None}
    idle = _without_effect(base)
    for name in wanted:
        if name not in known:
            raise ConfigError(f"search: {name} can't be searched; there are {', '.join(known)}.")
        if name in idle:
            raise ConfigError(f"search: {name} has no effect with {idle[name]}; leave out one of the two.")
        if (value := getattr(base, name)) != DEFAULTS[name]:
            raise ConfigError(f"search: {name} is given as {value}; leave out one of the two.")
    names = wanted or [name for name in known if name not in idle and getattr(base, name) == DEFAULTS[name]]
    if not names:
        raise ConfigError("every setting that could be searched is given; leave one out.")
    return {name: known[name] for name in names}


def _without_effect(base: Config) -> dict[str, str]:
    """Return the settings that change nothing, each with the setting that is the reason."""
    idle = {}
    if isinstance(base.learning_rate, str):  # a schedule of its own
        idle["anneal_lr"] = f"learning_rate={base.learning_rate}"
    if base.objective == "penalty":
        idle["clip_coef"] = "objective=penalty"
    if base.objective == "clip":
        idle |= dict.fromkeys(("kl_coef", "penalty_kl"), "objective=clip")
    return idle


def open_search(folder: Path, base: Config, space: Mapping[str, SearchValues], seeds: int) -> optuna.Study:
    """Create the folder and its journal, or continue the search in it.

    Raises:
        ConfigError: the folder holds other files or a search with other settings, or can't be used.
    """
    searched = {name: dataclasses.asdict(values) for name, values in sorted(space.items())}
    begins = claim_folder(folder, "search", base, search=searched, seeds=seeds)
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    journal = folder / _JOURNAL
    try:
        with exclusive(turn_file(folder)):
            with exclusive(folder / _JOURNAL_LOCK):  # a line of another process may be half written
                _drop_torn_line(journal)
            return optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(journal), _JournalLock(folder / _JOURNAL_LOCK))),  # type: ignore[arg-type]
                study_name="fastppo",
                direction="maximize",
                # several settings at once, since they depend on each other; a later process with the same seed would
                # draw the first trials again
                sampler=optuna.samplers.TPESampler(
                    seed=base.seed if begins else None, multivariate=True, n_startup_trials=_STARTUP
                ),
                load_if_exists=True,
            )
    except OSError as error:
        raise ConfigError(f"run_dir={folder} can't be used ({error.strerror}); name another folder.") from None
    except (ValueError, KeyError) as error:
        raise ConfigError(f"{journal} is damaged ({error}); name a new folder by --run-dir.") from None


class _JournalLock:
    """Lock of the journal, as Optuna takes it; Optuna's own outlives a killed process by half a minute."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._held = ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(exclusive(self._path))
        return True

    def release(self) -> None:
        self._held.close()


def _drop_torn_line(journal: Path) -> None:
    """Cut off a last line that a power loss or a full disk left incomplete: the next line would be appended to it."""
    if journal.exists() and (data := journal.read_bytes()) and not data.endswith(b"\n"):
        os.truncate(journal, data.rfind(b"\n") + 1)


def choose_jobs(base: Config, seeds: int) -> int:
    """Return the number of seeds of a trial to train at a time, so that their environments don't compete for cores."""
    return max(1, min(seeds, usable_cores() // env_cores(base)))


def run_trials(
    study: optuna.Study,
    folder: Path,
    base: Config,
    space: Mapping[str, SearchValues],
    *,
    trials: int,
    seeds: int,
    jobs: int,
) -> Iterator[FrozenTrial]:
    """Run trials until there are `trials` in all, those of other processes included; yield each that ends here."""
    while (claimed := _claim_trial(study, folder, trials)) is not None:
        trial, lock = claimed
        try:
            _run_trial(study, trial, folder, base, space, seeds, jobs)
        finally:
            lock.release()
        yield _read(study, trial)


def _claim_trial(study: optuna.Study, folder: Path, trials: int) -> tuple[Trial, RunLock] | None:
    """Return one of the first `trials` trials that nobody trains, with its lock: an interrupted or a new one.

    None: all of them have ended or are trained by others.
    """
    with exclusive(turn_file(folder)):
        for left in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
            if left.number >= trials:
                continue
            try:
                lock = _lock(folder, left.number)
            except ConfigError:  # another process trains it
                continue
            # its process may have ended it before it released the lock
            if study.get_trials(deepcopy=False)[left.number].state == TrialState.RUNNING:
                return Trial(study, left._trial_id), lock
            lock.release()
        if len(study.get_trials(deepcopy=False)) >= trials:
            return None
        trial = study.ask()
        return trial, _lock(folder, trial.number)


def _lock(folder: Path, number: int) -> RunLock:
    own = _folder(folder, number)
    own.mkdir(parents=True, exist_ok=True)  # a process may have been killed before it made the folder
    return RunLock(own)


def _folder(folder: Path, number: int) -> Path:
    return folder / "trials" / f"{number:04d}"


def _read(study: optuna.Study, trial: Trial) -> FrozenTrial:
    return study.get_trials(deepcopy=False)[trial.number]


def _run_trial(
    study: optuna.Study,
    trial: Trial,
    folder: Path,
    base: Config,
    space: Mapping[str, SearchValues],
    seeds: int,
    jobs: int,
) -> None:
    """Train the seeds of a trial and tell the study its state and its value, the mean over seeds of the mean return.

    A trial is pruned if its settings contradict each other, such as minibatches that don't divide the batch.
    """
    own = _folder(folder, trial.number)
    reason: str | None
    chosen: dict[str, Any] = {name: _suggest(trial, name, values) for name, values in space.items()}
    try:
        configs = [
            dataclasses.replace(base, **chosen, seed=seed, resume="auto", run_dir=own / f"seed{seed}")
            for seed in range(1, seeds + 1)
        ]
        check_early(configs[0])
    except ConfigError as error:
        state, reason = TrialState.PRUNED, str(error)
    else:
        state, reason = _train_seeds(study, trial, configs, jobs)
    if reason:
        trial.set_user_attr("reason", reason)
    value = statistics.fmean(trial.user_attrs["returns"]) if state == TrialState.COMPLETE else None
    study.tell(trial, value, state=state)


def _train_seeds(
    study: optuna.Study, trial: Trial, configs: Sequence[Config], jobs: int
) -> tuple[TrialState, str | None]:
    """Train the seeds that are left; return the state of the trial and its reason."""
    returns = {config.seed: _final_return(config) for config in configs if ended(config)}
    runs = run_each(configs, jobs)
    try:
        while True:
            if bad := [seed for seed, value in returns.items() if math.isnan(value)]:
                return TrialState.FAIL, f"seed {bad[0]}: no episode ended, so there is no mean return; train longer"
            first = _first_seeds(returns, configs)
            if first and len(first) not in _read(study, trial).intermediate_values:
                trial.report(statistics.fmean(first), len(first))
            if len(first) == len(configs):
                trial.set_user_attr("returns", first)
                return TrialState.COMPLETE, None
            if _below_median(study, first):
                return TrialState.PRUNED, f"below the median after {len(first)} of {len(configs)} seeds"
            config, trouble = next(runs)
            if trouble is not None:
                return TrialState.FAIL, f"seed {config.seed}: {trouble}"
            returns[config.seed] = _final_return(config)
    finally:
        runs.close()


def _first_seeds(returns: Mapping[int, float], configs: Sequence[Config]) -> list[float]:
    """Return the returns of the first k seeds, where seed k + 1 is the first that is not complete."""
    first = []
    for config in configs:
        if config.seed not in returns:
            break
        first.append(returns[config.seed])
    return first


def _below_median(study: optuna.Study, first: Sequence[float]) -> bool:
    """Return whether the mean over the first k seeds is below the median of complete trials' mean over the same seeds.

    False if fewer than five trials are complete.
    """
    others = [statistics.fmean(trial.user_attrs["returns"][: len(first)]) for trial in ranked(study)] if first else []
    return len(others) >= _STARTUP and statistics.fmean(first) < statistics.median(others)


def _suggest(trial: Trial, name: str, values: SearchValues) -> float | bool:
    if values.choices:
        choice: float | bool = trial.suggest_categorical(name, values.choices)
        return choice
    return trial.suggest_float(name, values.low, values.high, log=values.log)


def _final_return(config: Config) -> float:
    assert config.run_dir is not None
    found = json.loads((config.run_dir / "result.json").read_text())["mean_return"]
    return math.nan if found is None else float(found)


def ranked(study: optuna.Study) -> list[FrozenTrial]:
    """Return the complete trials, the best first; of equal ones the earlier."""
    complete = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
    return sorted(complete, key=lambda trial: -trial.values[0])


def count_running(study: optuna.Study) -> int:
    """Return the number of trials that have not ended."""
    return len(study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)))


def describe(trial: FrozenTrial) -> str:
    """Return the outcome of a trial in words."""
    if trial.state == TrialState.COMPLETE:
        returns = trial.user_attrs["returns"]
        return f"mean return {trial.value:,.1f} ({min(returns):,.1f} to {max(returns):,.1f})"
    verb = "pruned" if trial.state == TrialState.PRUNED else "failed"
    return f"{verb}: {trial.user_attrs.get('reason', 'unknown')}"


def write_best(folder: Path, base: Config, trial: FrozenTrial) -> str:
    """Write the settings of the best trial as best.toml, for `train --config`; return the command that trains with it.

    The command has flags for settings that TOML can't hold, and for code to import, which a file alone may not name.
    """
    defaults, given = Config(profile=base.profile).to_dict(), base.to_dict()
    values = {name: v for name, v in given.items() if v != defaults[name] and name not in _NOT_OF_THE_BEST}
    if base.profile != Config.profile:
        values = {"profile": base.profile} | values
    path = folder / "best.toml"
    lines, flags = [f"# trial {trial.number}: {describe(trial)}"], []
    for name, value in (values | {"env_id": base.env_id} | trial.params).items():
        try:
            lines.append(f"{name} = {toml_value(value)}")
        except ValueError as error:
            lines.append(f"# {name} is left out, because {error}; give it as a flag")
            flags += _flag(name, value)
    if base.imported:
        flags += _flag("env_id", base.env_id) + _flag("wrappers", given["wrappers"])
    write_text(path, "\n".join(lines) + "\n")
    return shlex.join(["fastppo", "train", "--config", str(path), *flags])


def _flag(name: str, value: object) -> list[str]:
    """Return a setting as the command line takes it; nothing for an empty list."""
    values = value if isinstance(value, list) else [value]
    texts = [item if isinstance(item, str) else json.dumps(item) for item in values]
    return [f"--{name.replace('_', '-')}", *texts] if texts else []


def toml_value(value: object) -> str:
    """Return a plain value as TOML on one line.

    Raises:
        ValueError: TOML has no such value.
    """
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (int, float)):
        return json.dumps(value) if math.isfinite(value) else str(float(value))
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise ValueError("TOML holds Unicode alone") from None
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, Mapping):
        pairs = [f"{toml_value(str(key))} = {toml_value(item)}" for key, item in value.items()]
        return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
    raise ValueError("TOML has no null" if value is None else f"TOML has no {type(value).__name__}")
