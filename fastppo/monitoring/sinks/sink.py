"""The protocol of a sink."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

from fastppo.monitoring.stats import Stats


class Sink(Protocol):
    """A destination of a run's statistics. A sink that raises is removed, and training continues."""

    def write(self, stats: Stats) -> None:
        """Write the statistics of one iteration."""

    def log(self, iteration: int, step: int, values: Mapping[str, float]) -> None:
        """Write the user's own figures, measured after that iteration, at its global step."""

    def close(self) -> None:
        """Flush and close; no more iterations follow."""
