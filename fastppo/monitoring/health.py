"""The health of a run: the rules, checked as its iterations are added.

A rule fires only if it finds its problem in several checks in a row: one unusual update doesn't trigger it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from fastppo.monitoring.health_rules import RULES, HealthFinding, RunTraits
from fastppo.monitoring.history import History

_CHECK_EVERY = 5  # iterations between two checks, at least
_CHECK_SHARE = 0.05  # of the iterations so far between two checks


@dataclasses.dataclass(frozen=True)
class HealthRecord:
    """When a finding was reported.

    Attributes:
        first: the finding as first reported, with the numbers of then.
        latest: the finding as last seen.
        first_step: global step of `first`.
        latest_step: global step of `latest`.
        lasts: whether the latest check still finds it.
    """

    first: HealthFinding
    latest: HealthFinding
    first_step: int
    latest_step: int
    lasts: bool

    def __str__(self) -> str:
        """Return name, steps, evidence with its step, and remedy in one line."""
        return f"{self.first.name}, {self.description}"

    @property
    def description(self) -> str:
        """Steps, evidence with its step, and remedy."""
        end = "the end" if self.lasts else f"{self.latest_step:,}"
        evidence = f"At step {self.first_step:,}: {self.first.evidence}"
        if self.latest.evidence != self.first.evidence:
            evidence += f" At step {self.latest_step:,}: {self.latest.evidence}"
        return f"from step {self.first_step:,} to {end}. {evidence} {self.latest.remedy}"


class HealthMonitor:
    """Checks a run's health as its iterations are added.

    Checks are at least 5 iterations and 5 % of the run so far apart. They depend on the added rows alone: a run's
    terminal and its report, with a row per iteration, give the same findings.

    Attributes:
        traits: facts about the run.
        history: the run's scalars.
    """

    def __init__(self, traits: RunTraits) -> None:
        """Start with an empty history."""
        self.traits, self.history = traits, History()
        self._records: dict[str, HealthRecord] = {}
        self._in_a_row: dict[str, int] = {}  # checks that found a problem, by rule
        self._next = _CHECK_EVERY

    @property
    def findings(self) -> list[HealthFinding]:
        """Problems that the latest check reports, in the order of the first report."""
        return [record.latest for record in self._records.values() if record.lasts]

    @property
    def records(self) -> list[HealthRecord]:
        """Every finding reported so far, in the order of the first report."""
        return list(self._records.values())

    def add(self, step: int, scalars: Mapping[str, float], times: int = 1) -> None:
        """Add an iteration, or a row of `times`, that ended at global step `step`; check the rules if that is due."""
        self.history.add(scalars, times)
        n = self.history.iterations
        if n >= self._next:
            self._next = n + max(_CHECK_EVERY, math.ceil(_CHECK_SHARE * n))
            self._check(step)

    def _check(self, step: int) -> None:
        found = {finding.name: finding for finding in check_health(self.history, self.traits)}
        self._in_a_row = {name: self._in_a_row.get(name, 0) + 1 for name in found}
        patience = {rule.name: rule.patience for rule in RULES}
        self._records = {name: dataclasses.replace(r, lasts=False) for name, r in self._records.items()}
        for name, finding in found.items():
            if self._in_a_row[name] >= patience[name]:
                record = self._records.get(name, HealthRecord(finding, finding, step, step, True))
                self._records[name] = dataclasses.replace(record, latest=finding, latest_step=step, lasts=True)


def check_health(history: History, traits: RunTraits) -> list[HealthFinding]:
    """Return the problems that RULES find in a run's history, without regard to patience."""
    return [finding for rule in RULES if (finding := rule.check(history, traits)) is not None]
