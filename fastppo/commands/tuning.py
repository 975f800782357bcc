"""Search for settings."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Literal

import tyro

from fastppo.commands.console import open_console
from fastppo.commands.settings import SettingsCommand, default_folder
from fastppo.errors import ConfigError
from fastppo.runtime.console import print_line


@dataclasses.dataclass(frozen=True)
class Tune(SettingsCommand):
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
    seed: int = 1
    """Seed of the search; those of the runs are 1 to --seeds."""
    name: Annotated[str, tyro.conf.Suppress] = "tune"
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "auto"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False

    def __call__(self) -> int:
        """Run the trials that are left, and write best.toml and a page; return 1 if no trial completed, else 0."""
        from fastppo.builders.early_checks import check_early

        # a target would end a run early, by luck
        base = self.settings(run_dir=None, target_return=None, exact_resume=False)
        for name in ("trials", "seeds", "jobs"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ConfigError(f"{name}={value} must be at least 1; nearest valid value: 1.")
        check_early(base, trains=False)
        try:
            from fastppo.analysis import tune, tune_report
        except ModuleNotFoundError as error:
            raise ConfigError(f"tune needs {error.name}: install fastppo[tune].") from None
        from fastppo.analysis.training_processes import check_single_process, turn_file
        from fastppo.runtime.files import exclusive

        check_single_process("tune")
        space = tune.search_space(base, self.search)
        folder = self.run_dir or default_folder("tune", self.env_id)
        study = tune.open_search(folder, base, space, self.seeds)
        jobs, console = self.jobs or tune.choose_jobs(base, self.seeds), open_console()
        begun = len(study.get_trials(deepcopy=False))
        before = f" ({begun} begun before)" if begun else ""
        print_line(console, f"trials {self.trials}{before}, seeds {self.seeds}, {jobs} at a time, folder {folder}")
        print_line(console, f"search: {', '.join(space)}")
        for trial in tune.run_trials(study, folder, base, space, trials=self.trials, seeds=self.seeds, jobs=jobs):
            with exclusive(turn_file(folder)):  # so that no process overwrites results of a later trial
                best = tune.ranked(study)
                if best:
                    tune.write_best(folder, base, best[0])
                tune_report.write_page(folder, self.env_id, study)
            rank = f"; best {best[0].value:,.1f}, trial {best[0].number}" if best else ""
            print_line(
                console, f"trial {trial.number} ({trial.number + 1} of {self.trials}): {tune.describe(trial)}{rank}"
            )
        with exclusive(turn_file(folder)):
            best = tune.ranked(study)
            command = tune.write_best(folder, base, best[0]) if best else ""
            page = tune_report.write_page(folder, self.env_id, study)
        if others := tune.count_running(study):
            which = f"{others} trial{'s have' if others > 1 else ' has'} not ended"
            print_line(console, f"{which}: other processes train them, or a larger --trials continues them.")
        if not best:
            print_line(console, "no trial completed; see the reasons above and in the page.")
        else:
            console.print(tune_report.terminal_table(study))
            print_line(console, f"train:   {command}", wrap=False)
        print_line(console, f"page:    {page}", wrap=False)
        return 0 if best else 1
