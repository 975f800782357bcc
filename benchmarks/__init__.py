"""Benchmarks; run one with: python -m benchmarks.<name>. Each module's docstring says what it measures."""

from __future__ import annotations

import functools
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any


def median_ms(call: Callable[[], Any], seconds: float = 0.5) -> float:
    """Return the median milliseconds of a call over about `seconds`, at least five calls, after one warm-up call."""
    call()
    times: list[float] = []
    while len(times) < 5 or sum(times) < seconds:
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return statistics.median(times) * 1e3


def run_task(module: str, task: Any, python: str = sys.executable) -> Any:
    """Run `python -m module --one TASK` in a fresh process; return the JSON in the last line of its output.

    Raises:
        RuntimeError: it failed; the text ends with its error output.
    """
    command = [python, "-m", module, "--one", json.dumps(task)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} failed with status {done.returncode}:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


@functools.cache
def machine() -> dict[str, Any]:
    """Return versions, machine and commit for the results of a benchmark."""
    import torch

    from fastppo.runs.system_info import system_info

    about = system_info(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return {name: about[name] for name in ("versions", "device_name", "cpu_count", "git_commit")}


def report(
    rows: Sequence[dict[str, Any]], output: Path | None, about: dict[str, Any] | None = None, **more: Any
) -> None:
    """Print rows as a Markdown table, and rows, `more` and the machine as one line of JSON; write that to `output`.

    Args:
        rows: with equal keys.
        output: None: don't write.
        about: the `machine()` of the process that measured; None: of this one.
    """
    write(rows, output, about, **more)
    print(table(rows))
    print(json.dumps(_result(rows, about, more)))


def write(
    rows: Sequence[dict[str, Any]], output: Path | None, about: dict[str, Any] | None = None, **more: Any
) -> None:
    """Write what `report` prints to `output`; a benchmark that may be cut short calls it after each row."""
    if output is not None:
        output.write_text(json.dumps(_result(rows, about, more), indent=1) + "\n")


def _result(rows: Sequence[dict[str, Any]], about: dict[str, Any] | None, more: dict[str, Any]) -> dict[str, Any]:
    command = [Path(word).name if word.startswith("/") else word for word in sys.argv]
    return {"rows": list(rows), **more, **(machine() if about is None else about), "command": command}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return rows with equal keys as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([_cell(row[name]) for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _cell(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
