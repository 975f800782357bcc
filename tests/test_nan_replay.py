"""nan_replay: reports on single tensors; tests/faults covers whole dumps."""

import torch

from fastppo.analysis.nan_replay import TensorReport, _inspect


def test_the_first_nan_or_infinity_is_located():
    x = torch.tensor([[1.0, -3.0], [torch.inf, torch.nan]])
    assert _inspect("x", x) == TensorReport("x", (2, 2), bad=2, first=(1, 0), largest=3.0)


def test_integer_and_bool_tensors_are_finite():
    assert _inspect("valid", torch.tensor([True, False])) == TensorReport("valid", (2,), 0, (), 1.0)
    assert _inspect("actions", torch.zeros(0, dtype=torch.int64)) == TensorReport("actions", (0,), 0, (), 0.0)
