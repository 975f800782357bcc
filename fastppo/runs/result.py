"""How a run ended."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any, Literal


@dataclasses.dataclass(frozen=True)
class Result:
    """How a run ended.

    Attributes:
        mean_return: over the last 100 episodes, raw; NaN if none ended.
        mean_length: over the same episodes.
        episodes: episodes that ended.
        global_step: real environment steps.
        iterations: iterations run.
        ended: "finished", "target" (target_return was reached) or "interrupted".
        sps_steady: steps per second without the first iteration.
        sps_total: steps per second, setup included.
        seconds: of training, also before a resume; without set-up, evaluations and videos.
        wall_seconds: from the start of set-up to the end, with evaluations, videos and the caller's own code; of a
            resumed run since the resume.
        setup_seconds: the part of wall_seconds before the first iteration.
        compile_seconds: of compiling, a part of set-up.
        compilations: functions that were compiled, all before the first iteration.
        phases: seconds in each phase of the iterations, in evaluations and in videos; of a resumed run since the
            resume.
        run_dir: the run folder.
        unsaved: why the last save failed; None: everything is saved.
    """

    mean_return: float
    mean_length: float
    episodes: int
    global_step: int
    iterations: int
    ended: Literal["finished", "target", "interrupted"]
    sps_steady: float
    sps_total: float
    seconds: float
    wall_seconds: float
    setup_seconds: float
    compile_seconds: float
    compilations: int
    phases: dict[str, float]
    run_dir: Path
    unsaved: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values; NaN and infinities become None."""
        values = dataclasses.asdict(self) | {"run_dir": str(self.run_dir)}
        return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def recorded_step(run_dir: Path) -> int | None:
    """Return the environment steps of the result in a run folder; None if there is no result."""
    try:
        return int(json.loads((run_dir / "result.json").read_text())["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
