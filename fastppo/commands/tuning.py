"""Search for settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console
from fastppo.commands.training import Train
from fastppo.errors import ConfigError
from fastppo.runtime.console import print_line


@dataclasses.dataclass(frozen=True)
class Tune(Train):
    """Search for the settings with the highest return, over seeds."""

    trials: int = 50
    """Trials in all; the same command continues a search, and several processes may share it."""
    seeds: int = 3
    """Seeds of each trial: 1 to this number."""
    search: Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME [NAME ...]")] = ()
    """Settings to search; by default all with a known range that are not given."""
    jobs: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: by cores)")] = None
    """Concurrent runs of a trial."""
    run_dir: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: runs/tune-<env>)")] = (
        None
    )
    """Folder of the search; the same command continues it."""
    checkpoint_minutes: Annotated[float, tyro.conf.arg(metavar="MINUTES")] = 1.0
    """Minutes between checkpoints of each run, from which a killed search continues."""
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    name: Annotated[str, tyro.conf.Suppress] = "tune"
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "auto"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False

    def __call__(self) -> int:
        """Run the trials that are left, and write best.toml and a page; return 1 if no trial completed, else 0."""
        from fastppo.builders.early_checks import check_early

        base = self.settings(run_dir=None)
        for name in ("trials", "seeds", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; nearest valid value: 1.")
        check_early(base, trains=False)
        try:
            from fastppo.analysis import tune, tune_report
        except ModuleNotFoundError as error:
            raise ConfigError(f"tune needs {error.name}: install fastppo[tune].") from None
        from fastppo.runtime.cores import usable_cores

        space = tune.searched(base, self.search)
        folder = self.run_dir or Path("runs") / f"tune-{self.env_id.replace('/', '_').replace(':', '_')}"
        study = tune.open_search(folder, base, space, self.seeds)
        jobs, console = self.jobs or min(self.seeds, usable_cores()), open_console()
        before = len(study.get_trials())
        again = f", {before} of them begun before" if before else ""
        print_line(console, f"{self.trials} trials{again}, {self.seeds} seeds each, {jobs} at a time; folder {folder}")
        print_line(console, f"search: {', '.join(space)}")
        for trial in tune.search(study, folder, base, space, trials=self.trials, seeds=self.seeds, jobs=jobs):
            best = tune.best_trial(study)
            rank = f"; best {best.value:,.1f}, trial {best.number}" if best is not None else ""
            print_line(console, f"trial {trial.number} of {self.trials}: {tune.describe(trial)}{rank}")
            if best is not None and best.number == trial.number:
                tune.write_best(folder, base, best)
            tune_report.write_page(folder, self.env_id, study)
        best = tune.best_trial(study)
        page = tune_report.write_page(folder, self.env_id, study)
        if best is None:
            print_line(console, "no trial completed; see the reasons above.")
            return 1
        console.print(tune_report.terminal_table(study))
        path = tune.write_best(folder, base, best)
        print_line(console, f"train:   fastppo train --config {path}", wrap=False)
        print_line(console, f"page:    {page}", wrap=False)
        return 0
