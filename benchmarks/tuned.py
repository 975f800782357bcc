"""A search of `fastppo tune` as a preset: its entry of `TUNED` in fastppo/profiles/measured.py, and its trials as data.

    python -m benchmarks.tuned runs/tune-Acrobot-v1 --output benchmarks/results/tune-acrobot_2core-cpu_2026-11-27.json

The entry holds what was searched, with three digits, and what was given. The best return of a search is partly luck, so
the stage `presets` of benchmarks/learning.toml trains each preset again, with seeds that no search saw.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import machine
from fastppo.config import SETTINGS, Config
from fastppo.runtime.files import write_json


@dataclasses.dataclass
class Options:
    """Turn a search into a preset."""

    folder: tyro.conf.Positional[Path]
    """Folder of the search."""
    output: Annotated[Path | None, tyro.conf.arg(metavar="PATH")] = None
    """JSON file for all trials."""


def main(options: Options) -> None:
    plan, trials = read_search(options.folder)
    complete = [trial for trial in trials if trial["state"] == "complete"]
    if not complete:
        sys.exit(f"{options.folder} holds no complete trial.")
    best = max(complete, key=lambda trial: trial["value"])  # of equal ones the first
    settings = entry(plan, best["settings"])
    if options.output is not None:
        content = {"env_id": plan["env_id"], "seeds": plan["seeds"], "preset": settings, "trials": trials}
        write_json(options.output, {**content, "search": plan["search"], **machine()})
    source = "" if options.output is None else f": {options.output.name}"
    print(f"    # trial {best['number']} of {len(trials)}, seeds 1 to {plan['seeds']}{source}")
    print(as_python(plan["env_id"], settings))


def read_search(folder: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return the plan of a search, and its trials in their order."""
    from optuna import load_study
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    try:
        plan = json.loads((folder / "plan.json").read_text())
        if plan["content"] != "search":
            raise ValueError(f"it holds a {plan['content']}")
    except (OSError, ValueError, KeyError) as error:
        sys.exit(f"{folder} is not a folder of fastppo tune ({type(error).__name__}: {error}).")
    study = load_study(study_name="fastppo", storage=JournalStorage(JournalFileBackend(str(folder / "journal.log"))))
    trials = [
        {
            "number": trial.number,
            "state": trial.state.name.lower(),
            "value": trial.values[0] if trial.values else None,
            "returns": trial.user_attrs.get("returns"),
            "reason": trial.user_attrs.get("reason"),
            "settings": trial.params,
        }
        for trial in study.get_trials(deepcopy=False)
    ]
    return plan, trials


def entry(plan: dict[str, Any], searched: dict[str, Any]) -> dict[str, Any]:
    """Return the preset of a trial: settings that a profile fills where they are not given."""
    defaults = json.loads(json.dumps(Config().to_dict(), default=str))  # as the plan holds them
    given = {
        name: plan[name]
        for name, setting in SETTINGS.items()
        if setting.changes == "results" and name not in ("env_id", "profile") and plan[name] != defaults[name]
    }
    settings = {"total_timesteps": plan["total_timesteps"], **given}
    settings |= {name: float(f"{x:.3g}") if isinstance(x, float) else x for name, x in searched.items()}
    if other := [name for name in settings if defaults[name] is not None]:
        sys.exit(f"the search was given {', '.join(other)}, which a profile doesn't fill; search without.")
    return settings


def as_python(env_id: str, settings: dict[str, Any]) -> str:
    """Return the lines of an entry of `TUNED`."""
    values = {name: f"{x:_}" if type(x) is int else repr(x) for name, x in settings.items()}
    return "\n".join([f'    "{env_id}": {{', *(f'        "{name}": {x},' for name, x in values.items()), "    },"])


if __name__ == "__main__":
    main(tyro.cli(Options))
