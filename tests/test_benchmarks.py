"""Every benchmark can be imported."""

import importlib
from pathlib import Path

import pytest

NAMES = sorted(path.stem for path in (Path(__file__).parents[1] / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_and_has_a_main(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)
