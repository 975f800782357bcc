"""Check that a redesign changes no numbers: run the same small training runs with two versions of the code.

    python -m benchmarks.identical BASE --output benchmarks/results/identical_2core-cpu_2026-11-25.json

The script checks out the commit BASE into a temporary git worktree. It runs each case of benchmarks/identical_case.py
with the code of BASE and with the code of this working tree, each in a fresh process with one thread, and compares by
SHA-256 everything that the two run folders hold:

* metrics.jsonl: all scalars and episode returns of each iteration;
* the last checkpoint: parameters, Adam moments, normalisers, generators, episodes, environments, of each rank;
* model.safetensors, samples/, best.json, and the counts in result.json.

Times and rates are left out. A value that only BASE has fails the case; values that only this tree has are printed.
A case with compile=on passes with parameters within 1e-6 and finite differences elsewhere, because Inductor may fuse
rearranged code differently; the result then says so. The exit status is 1 if a case differs or fails.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import tyro
from safetensors.torch import load_file
from torch import Tensor

from benchmarks import report
from benchmarks.identical_case import CASES, SETTINGS

ROOT = Path(__file__).parents[1]
TOLERANCE = 1e-6  # on parameters of compiled cases
TIMES = re.compile(r"(time/.*|charts/(SPS|sps_\w+)|(.*[._])?seconds)")
RESULT = ("mean_return", "mean_length", "episodes", "global_step", "iterations", "ended")
SHOWN = 5  # differing values to name in the results


def read_run(run_dir: Path) -> dict[str, Any]:
    """Return the tensors and values of a run folder by "file: name", those of early iterations first."""
    out: dict[str, Any] = {}
    for line in (run_dir / "metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        logged = _leaves({tag: value for tag, value in row.items() if not TIMES.fullmatch(tag)})
        out |= {f"iteration {row['iteration']}: {tag}": value for tag, value in logged}
    files = sorted(run_dir.glob("samples/*.safetensors"))
    last = max((run_dir / "checkpoints").glob("step-*"))
    files += [*sorted(last.glob("*.safetensors")), run_dir / "model.safetensors"]
    for path in files:
        tensors = load_file(path)
        out |= {f"{path.relative_to(run_dir)}: {name}": tensors[name] for name in sorted(tensors)}
    for path in sorted(last.glob("state-*.json")):
        state = _leaves(json.loads(path.read_text())["values"])
        out |= {f"{path.relative_to(run_dir)}: {name}": x for name, x in state if not TIMES.fullmatch(name)}
    best = run_dir / "checkpoints" / "best.json"
    if best.exists():
        out |= {f"best.json: {name}": value for name, value in json.loads(best.read_text()).items()}
    result = json.loads((run_dir / "result.json").read_text())
    return out | {f"result.json: {name}": result[name] for name in RESULT}


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested dictionaries and lists by dotted name; a list of plain values stays whole."""
    items: Any = None
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(x, (dict, list)) for x in value):
        items = enumerate(value)
    if items is None:
        yield name, value
        return
    for key, inner in items:
        yield from _leaves(inner, f"{name}.{key}" if name else str(key))


def sha256(value: Any) -> str:
    """Return the hash of a tensor's dtype, shape and bytes, or of a value as JSON."""
    if not isinstance(value, Tensor):
        return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
    data = value.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return hashlib.sha256(f"{value.dtype} {tuple(value.shape)} ".encode() + data).hexdigest()


def difference(a: Any, b: Any) -> float:
    """Return the largest absolute difference of two tensors, numbers or lists; infinity if they can't be subtracted."""
    try:
        x, y = (torch.as_tensor(v).double() for v in (a, b))
    except (TypeError, ValueError, RuntimeError):
        return float("inf")  # text, or ragged lists
    if x.shape != y.shape:
        return float("inf")
    gap = torch.where((x == y) | (x.isnan() & y.isnan()), 0.0, (x - y).abs())
    return float(gap.nan_to_num(nan=float("inf")).max()) if gap.numel() else 0.0


@dataclasses.dataclass(frozen=True)
class Comparison:
    """Two compared runs of one case.

    Attributes:
        compared: number of values that both have.
        differing: largest absolute difference of each value whose hashes differ, by name, earliest first.
        missing: names that only BASE has.
        extra: names that only this tree has.
        sha256: hash of all hashes of BASE.
    """

    compared: int
    differing: dict[str, float]
    missing: list[str]
    extra: list[str]
    sha256: str

    @property
    def largest(self) -> float:
        """Return the largest absolute difference of any value."""
        return max(self.differing.values(), default=0.0)

    @property
    def of_parameters(self) -> float:
        """Return the largest absolute difference within model.safetensors."""
        return max((x for name, x in self.differing.items() if name.startswith("model.safetensors")), default=0.0)

    def verdict(self, compiled: bool) -> str:
        """Return `equal`, `within 1e-06` (compiled cases only), `missing values` or `differs`."""
        if self.missing:
            return "missing values"
        if not self.differing:
            return "equal"
        close = self.of_parameters <= TOLERANCE and math.isfinite(self.largest)
        return f"within {TOLERANCE:g}" if compiled and close else "differs"


def compare(base: Mapping[str, Any], here: Mapping[str, Any]) -> Comparison:
    """Compare two runs, as `read_run` returns them."""
    hashes = {name: sha256(value) for name, value in base.items()}
    common = [name for name in base if name in here]
    return Comparison(
        compared=len(common),
        differing={n: difference(base[n], here[n]) for n in common if sha256(here[n]) != hashes[n]},
        missing=[name for name in base if name not in here],
        extra=[name for name in here if name not in base],
        sha256=sha256(sorted(hashes.items())),
    )


def train(name: str, root: Path, folder: Path) -> dict[str, Any]:
    """Run one case with the code in `root`, in a fresh process, and read its folder.

    Raises:
        RuntimeError: the run failed, ran with another compile mode, or didn't log the case's tag.
    """
    run_dir = folder / name
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    # with PYTHONSAFEPATH neither the script's folder nor the current one comes before PYTHONPATH
    env |= {"PYTHONPATH": str(root), "PYTHONSAFEPATH": "1", "PYTHONHASHSEED": "0"}
    env |= {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "CUDA_VISIBLE_DEVICES": ""}
    script = Path(__file__).with_name("identical_case.py")
    command = [sys.executable, str(script), "--name", name, "--run-dir", str(run_dir), "--root", str(root)]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder, timeout=900)
    if done.returncode:
        raise RuntimeError(f"exit status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    wanted = (SETTINGS | CASES[name].settings)["compile"]
    compiled = json.loads((run_dir / "config.json").read_text())["compile"]
    if compiled != wanted:
        raise RuntimeError(f"it ran with compile={compiled}, not {wanted}: see the notes in its run.json")
    values = read_run(run_dir)
    if not any(tag.endswith(f": {CASES[name].logs}") for tag in values):
        raise RuntimeError(f"it logged no {CASES[name].logs}, so it doesn't test what its name says")
    return values


def run_case(name: str, sides: dict[str, Path], folder: Path) -> dict[str, Any]:
    """Run one case with both sides, at the same time, and return its row of results."""
    row: dict[str, Any] = {"case": name, "result": "", "values": 0, "largest difference": "", "of parameters": ""}
    row |= {"first to differ": "", "missing": [], "extra": [], "differing": {}, "sha256": ""}
    found: dict[str, dict[str, Any]] = {}
    with ThreadPoolExecutor(len(sides)) as pool:
        runs = {side: pool.submit(train, name, root, folder / side) for side, root in sides.items()}
    for side, run in runs.items():
        try:
            found[side] = run.result()
        except (RuntimeError, OSError, ValueError, KeyError, subprocess.TimeoutExpired) as error:
            print(f"{name}, {side}: {error}", file=sys.stderr, flush=True)
            return row | {"result": f"fails with {side}"}
    compared = compare(found["base"], found["here"])
    row["result"] = compared.verdict((SETTINGS | CASES[name].settings)["compile"] == "on")
    row["values"], row["sha256"] = compared.compared, compared.sha256
    row["largest difference"], row["of parameters"] = compared.largest, compared.of_parameters
    row["first to differ"] = "; ".join(list(compared.differing)[:2])
    row["differing"] = dict(list(compared.differing.items())[:SHOWN])
    row["missing"], row["extra"] = compared.missing, compared.extra
    return row


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"git {' '.join(arguments)}: {done.stderr.strip()}")
    return done.stdout.strip()


def main(
    base: Annotated[str | None, tyro.conf.Positional] = None,
    only: Annotated[tuple[str, ...], tyro.conf.arg(help="cases to run; default: all")] = (),
    show: Annotated[bool, tyro.conf.arg(name="list", help="print the names of the cases")] = False,
    output: Path | None = None,
) -> int:
    """Compare this working tree with the commit `base`; returns the exit status."""
    if unknown := sorted(set(only) - CASES.keys()):
        print(f"no case named {', '.join(unknown)}; --list prints their names", file=sys.stderr)
        return 2
    if show:
        print("\n".join(CASES))
        return 0
    if base is None:
        print("name the commit to compare with, such as main or HEAD~1", file=sys.stderr)
        return 2
    commit = _git("rev-parse", "--verify", f"{base}^{{commit}}")
    with tempfile.TemporaryDirectory(prefix="fastppo-identical-") as name:
        folder = Path(name)
        sides = {"base": folder / "worktree", "here": ROOT}
        for side in sides:
            (folder / side).mkdir()
        _git("worktree", "add", "--detach", str(sides["base"]), commit)
        try:
            rows = []
            for case in only or tuple(CASES):
                rows.append(run_case(case, sides, folder))
                print(f"{case}: {rows[-1]['result']} {rows[-1]['first to differ']}", file=sys.stderr, flush=True)
        finally:
            _git("worktree", "remove", "--force", str(sides["base"]))
    for row in rows:
        for kind in ("missing", "extra"):
            if row[kind]:
                print(f"{row['case']}, {kind}: {', '.join(row[kind])}")
    passed = [row["result"] in ("equal", f"within {TOLERANCE:g}") for row in rows]
    table = [{k: len(v) if isinstance(v, list) else v for k, v in row.items() if k != "differing"} for row in rows]
    details = {row["case"]: {k: row[k] for k in ("differing", "missing", "extra")} for row in rows}
    dirty = bool(_git("status", "--porcelain"))
    report(table, output, base=commit, dirty=dirty, details=details, passed=all(passed))
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(tyro.cli(main))
