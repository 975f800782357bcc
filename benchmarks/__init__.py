"""What is timed, how, and against whom. Run one with: python -m benchmarks.<name>."""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def median_ms(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Milliseconds of a call: the median over about `seconds` of them, five at least, after one that isn't counted."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def report(rows: Sequence[dict[str, Any]], output: Path | None, **more: Any) -> None:
    """Print rows as a Markdown table and all of it as one line of JSON; write that to `output` too."""
    import torch

    from fastppo.runs.system_info import system_info

    print(table(rows))
    about = system_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    kept = {name: about[name] for name in ("versions", "device_name", "cpu_count", "git_commit", "command")}
    kept["command"] = [Path(word).name if word.startswith("/") else word for word in about["command"]]
    result = {"rows": list(rows), **more, **kept}
    print(json.dumps(result))
    if output is not None:
        output.write_text(json.dumps(result, indent=1) + "\n")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Rows of equal keys as Markdown."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
