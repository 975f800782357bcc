"""Metadata of a setting: section, range, unit, and effect on a run."""

from __future__ import annotations

import dataclasses
from typing import Literal, TypeVar

T = TypeVar("T")

Section = Literal[
    "environment",
    "run",
    "rollout",
    "optimisation",
    "exploration",
    "policy",
    "normalisation",
    "device and speed",
    "checkpointing",
    "evaluation",
    "logging",
]

Changes = Literal["results", "noise", "nothing"]

OnResume = Literal["keep", "note", "free"]


@dataclasses.dataclass(frozen=True)
class SearchValues:
    """Values of a setting that `fastppo tune` tries: some choices, or a range.

    Attributes:
        choices: the values; empty: a range.
        low: smallest value of a range.
        high: largest value of a range.
        log: draw its logarithm uniformly, not the value itself.
    """

    choices: tuple[float | bool, ...] = ()
    low: float = 0.0
    high: float = 0.0
    log: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class Setting:
    """Metadata of a field of `Config`. Type and default are the field's own; its docstring is the help text.

    Attributes:
        section: heading in `--help` and docs/settings.md.
        at_least: smallest valid number. A range holds for each number of a schedule or a list.
        above: exclusive lower bound.
        at_most: largest valid number.
        unit: placeholder of the value in `--help`; None: by the field's type.
        unset: meaning of None, in words; None: filled by the kind of environment.
        alias: another name, on the command line and in files.
        scheduled: a schedule over the run may be given instead of a number.
        changes: what a run computes differently under another value. "results": what it learns. "noise": only random
            draws or rounding, so that runs that differ in nothing else are samples of one experiment. "nothing": no
            number of any iteration.
        on_resume: another value in a resumed run, if the setting changes numbers. "keep": refused, because it defines
            the task, the network or its inputs. "note": takes effect from there on, with a note, but not under
            exact_resume. "free": takes effect without a note; it changes the end of the run, not its course.
        chosen_at_start: "auto" or None is replaced at the start, by measuring or by inspecting machine and environment.
        search: values that `fastppo tune` tries if the setting is not given; None: it never changes the setting.
    """

    section: Section
    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    unit: str | None = None
    unset: str | None = None
    alias: str | None = None
    scheduled: bool = False
    changes: Changes = "results"
    on_resume: OnResume = "note"
    chosen_at_start: bool = False
    search: SearchValues | None = None

    @property
    def fixed(self) -> bool:
        """Whether a resumed run must keep the value."""
        return self.changes != "nothing" and self.on_resume == "keep"


def known(value: T | None) -> T:
    """Return `value`, a setting that `fill_defaults` or the start of a run has filled in."""
    assert value is not None, "this config has open settings: call fill_defaults first"
    return value
