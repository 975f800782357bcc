"""What every place that figures go to has in common."""

from __future__ import annotations

from typing import Protocol

from fastppo.monitoring.stats import Stats


class Sink(Protocol):
    """Takes each iteration's figures; one that raises is dropped, and training goes on."""

    def write(self, stats: Stats) -> None:
        """One iteration ended."""

    def close(self) -> None:
        """No more will come."""
