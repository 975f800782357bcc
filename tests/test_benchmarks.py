"""Every benchmark imports; the comparison of two versions finds differences."""

import importlib
import json
from pathlib import Path

import pytest
import torch

from benchmarks import gpu
from benchmarks.identical import compare, run_case
from benchmarks.identical_case import CASES, SETTINGS
from fastppo import Config

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_and_has_a_main(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.parametrize("name", CASES)
def test_the_settings_of_each_case_are_valid(name):
    Config(**SETTINGS | CASES[name].settings)


def test_the_gpu_benchmark_writes_each_row_as_it_comes(tmp_path, monkeypatch):
    output, written = tmp_path / "rows.json", []

    def part(options):
        for k in range(2):
            yield {"what": "part", "k": k}
            written.append(json.loads(output.read_text())["rows"])
        raise RuntimeError("no memory")

    def last(options):
        raise KeyboardInterrupt  # what a time-out does
        yield

    for name in ("updates", "tensor_training", "host_training"):
        monkeypatch.setattr(gpu, name, lambda _: iter(()))
    monkeypatch.setattr(gpu, "advantages", part)
    monkeypatch.setattr(gpu, "solving", last)
    with pytest.raises(KeyboardInterrupt):
        gpu.main(gpu.Options(device="cpu", output=output))
    assert [len(rows) for rows in written] == [1, 2]
    rows = json.loads(output.read_text())["rows"]
    assert [row.get("k") for row in rows] == [0, 1, None]
    assert rows[2] == {"what": "part", "failed": "RuntimeError: no memory"}


WEIGHT, SCALAR = "model.safetensors: weight", "iteration 1: losses/value_loss"
RUN = {SCALAR: 0.5, WEIGHT: torch.ones(3), "result.json: ended": "finished"}


@pytest.mark.parametrize(
    ("changes", "plain", "compiled", "largest"),
    [
        ({}, "equal", "equal", 0),
        ({SCALAR: float("nan")}, "differs", "differs", float("inf")),
        ({SCALAR: 0.75}, "differs", "within 1e-06", 0.25),
        ({WEIGHT: torch.ones(3) + 5e-7}, "differs", "within 1e-06", pytest.approx(5e-7, rel=0.1)),
        ({WEIGHT: torch.ones(3) + 1e-5}, "differs", "differs", pytest.approx(1e-5, rel=0.1)),
        ({WEIGHT: torch.ones(3).double()}, "differs", "within 1e-06", 0),
        ({WEIGHT: torch.ones(1, 3)}, "differs", "differs", float("inf")),
        ({"result.json: ended": "target"}, "differs", "differs", float("inf")),
        ({"new": 1}, "equal", "equal", 0),
    ],
)
def test_two_versions_are_compared(changes, plain, compiled, largest):
    found = compare(RUN, RUN | changes)
    assert (found.verdict(compiled=False), found.verdict(compiled=True)) == (plain, compiled)
    assert found.largest == largest
    assert found.extra == [name for name in changes if name not in RUN]


def test_a_value_that_the_new_version_lacks_is_an_error():
    found = compare(RUN, {SCALAR: 0.5, WEIGHT: RUN[WEIGHT]})
    assert found.missing == ["result.json: ended"]
    assert found.verdict(compiled=True) == "missing values"


def test_a_tree_equals_itself(tmp_path):
    for side in ("base", "here"):
        (tmp_path / side).mkdir()
    row = run_case("sync", {"base": ROOT, "here": ROOT}, tmp_path)
    assert (row["result"], row["missing"], row["extra"]) == ("equal", [], [])
    assert row["values"] > 100
