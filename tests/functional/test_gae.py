import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastppo.functional.gae import Trajectory, choose_gae, gae_doubling, gae_loop, linear_scan
from fastppo.runtime import compile as compiling
from fastppo.runtime.compile import compile_graph
from tests.functional.cases import PATTERNS, as_tensors, make_case
from tests.reference.gae import advantage_by_definition, advantages_by_definition

KERNELS = [gae_loop, gae_doubling]


def plain(case):
    return {k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in case.items()}


@pytest.mark.parametrize("t", [1, 2, 37, 128, 1000])
@pytest.mark.parametrize("n", [1, 2, 37, 128, 1000])
@pytest.mark.parametrize("kernel", KERNELS)
def test_equals_the_definition(kernel, t, n):
    for pattern in PATTERNS:
        case = make_case(t, n, pattern)
        advantages, returns = kernel(*as_tensors(case))
        # the plain-float definition takes seconds for wide cases, so there a few environments are compared
        columns = range(n) if t * n <= 5000 else np.linspace(0, n - 1, 3, dtype=int)
        narrow = {k: v[:, list(columns)] if isinstance(v, np.ndarray) else v for k, v in case.items()}
        expected = torch.tensor(advantages_by_definition(plain(narrow)), dtype=torch.float64)
        torch.testing.assert_close(advantages[:, list(columns)].double(), expected, atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(returns, advantages + torch.as_tensor(case["values"]))


@pytest.mark.parametrize("kernel", KERNELS)
@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_equals_the_definition_for_any_pattern_of_endings(kernel, data):
    t, n = data.draw(st.integers(1, 12)), data.draw(st.integers(1, 4))
    numbers = st.floats(-1e3, 1e3, width=32)

    def table(values):
        return np.array(data.draw(st.lists(values, min_size=t * n, max_size=t * n))).reshape(t, n)

    case = {"rewards": table(numbers), "values": table(numbers), "next_values": table(numbers)}
    case["terminated"] = table(st.booleans()).astype(bool)
    case["done"] = case["terminated"] | table(st.booleans()).astype(bool)
    case |= {"gamma": data.draw(st.floats(0, 1)), "gae_lambda": data.draw(st.floats(0, 1))}
    advantages, _ = kernel(*as_tensors(case, torch.float64))
    expected = [[advantage_by_definition(plain(case), j, i) for j in range(n)] for i in range(t)]
    torch.testing.assert_close(advantages, torch.tensor(expected, dtype=torch.float64), atol=1e-8, rtol=1e-9)


@pytest.mark.parametrize("shape", [(1, 1), (2, 37), (37, 2), (128, 8)])
def test_compiled_equals_the_definition_and_a_new_gamma_does_not_recompile(shape):
    compiled = compile_graph(gae_doubling, as_tensors(make_case(*shape, "none")))
    before = compiling.compilations
    for gamma, gae_lambda in [(0.99, 0.95), (0.5, 0.0), (1.0, 1.0)]:
        case = make_case(*shape, "both", gamma, gae_lambda)
        expected = torch.tensor(advantages_by_definition(plain(case)), dtype=torch.float64)
        advantages, _ = compiled(*as_tensors(case))
        torch.testing.assert_close(advantages.double(), expected, atol=2e-5, rtol=1e-5)
    assert compiling.compilations == before


@pytest.mark.parametrize("kernel", KERNELS)
def test_lambda_0_is_the_td_error(kernel):
    r, gamma, _ = as_tensors(make_case(37, 5, "both"))
    advantages, _ = kernel(r, gamma, torch.tensor(0.0))
    torch.testing.assert_close(advantages, r.rewards + gamma * r.next_values * ~r.terminated - r.values)


@pytest.mark.parametrize("kernel", KERNELS)
def test_lambda_1_is_the_discounted_return_minus_the_value(kernel):
    # next_values agree with values inside the episode, so the sum of TD errors telescopes
    (rewards, values, *_), gamma, _ = as_tensors(make_case(37, 5, "none"))
    last = torch.randn(1, 5, generator=torch.Generator().manual_seed(1))
    never = torch.zeros(37, 5, dtype=torch.bool)
    trajectory = Trajectory(rewards, values, torch.cat((values[1:], last)), never, never)
    advantages, _ = kernel(trajectory, gamma, torch.tensor(1.0))
    returns = torch.stack(
        [sum(0.99**k * rewards[t + k] for k in range(37 - t)) + 0.99 ** (37 - t) * last[0] for t in range(37)]
    )
    torch.testing.assert_close(advantages, returns - values, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("kernel", KERNELS)
def test_truncation_bootstraps_and_termination_does_not(kernel):
    one = torch.ones(1, 1)
    yes, no = one.bool(), ~one.bool()
    scalars = torch.tensor(0.5), torch.tensor(0.9)
    assert kernel(Trajectory(one, one, 10 * one, no, yes), *scalars)[0].item() == 1 + 0.5 * 10 - 1
    assert kernel(Trajectory(one, one, 10 * one, yes, yes), *scalars)[0].item() == 0


@pytest.mark.parametrize("kernel", KERNELS)
def test_the_next_value_of_a_terminal_row_is_ignored_even_if_nan(kernel):
    x = torch.ones(2, 1)
    terminated = torch.tensor([[True], [False]])
    next_values = torch.tensor([[torch.nan], [1.0]])
    trajectory = Trajectory(x, x, next_values, terminated, terminated)
    advantages, returns = kernel(trajectory, torch.tensor(0.9), torch.tensor(0.9))
    assert advantages.isfinite().all()
    assert returns.isfinite().all()


def test_a_scan_of_ones_counts_the_remaining_rows():
    x = torch.ones(13, 2)
    assert linear_scan(x, x)[:, 0].tolist() == list(range(13, 0, -1))


def test_small_rollouts_use_doubling_and_large_ones_the_loop():
    cpu = torch.device("cpu")
    assert choose_gae(128, 8, cpu) is gae_doubling
    assert choose_gae(128, 4096, cpu) is gae_loop


TRITON = """
import json, sys
import torch
from fastppo.kernels.gae import gae_triton
from tests.functional.cases import PATTERNS, as_tensors, make_case
from tests.functional.test_gae import plain
from tests.reference.gae import advantages_by_definition
worst, cells = 0.0, 0
for t, n in [(1, 1), (2, 37), (37, 2), (64, 32), (65, 33), (129, 3)]:
    for pattern in ("none", "both", "every row"):
        case = make_case(t, n, pattern)
        case["next_values"][case["terminated"]] = float("nan")
        advantages, returns = gae_triton(*as_tensors(case))
        case["next_values"][case["terminated"]] = 0.0
        expected = torch.tensor(advantages_by_definition(plain(case)), dtype=torch.float64)
        error = (advantages.double() - expected).abs() / (1 + expected.abs())
        assert torch.equal(returns, advantages + torch.as_tensor(case["values"]))
        assert error.isfinite().all(), (t, n, pattern)
        worst, cells = max(worst, error.max().item()), cells + t * n
print(json.dumps({"worst": worst, "cells": cells}))
"""


def test_the_triton_kernel_equals_the_definition():
    pytest.importorskip("triton")
    # Triton reads TRITON_INTERPRET at import, and torch may have imported it in this process
    found = subprocess.run(
        [sys.executable, "-c", TRITON], capture_output=True, text=True, env=os.environ | {"TRITON_INTERPRET": "1"}
    )
    assert found.returncode == 0, found.stderr
    result = json.loads(found.stdout.splitlines()[-1])
    assert result["cells"] > 10_000
    assert result["worst"] < 1e-5
