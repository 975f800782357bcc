import math

import numpy as np
import pytest
import torch

from fastppo.functional.adam import adam_init, adam_step
from fastppo.functional.moments import Moments, merge_moments, moments_of
from fastppo.functional.optimizer import clip_by_norm
from fastppo.functional.schedules import scheduled


def test_schedules_are_exact_at_both_ends_and_constant_past_the_end():
    assert [scheduled("linear", 2e-4, 0.0, p) for p in (0, 0.5, 1, 2)] == [2e-4, 1e-4, 0, 0]
    assert [scheduled("constant", 3.0, 3.0, p) for p in (0, 1)] == [3, 3]
    assert scheduled("cosine", 1.0, 0.5, 0.5) == pytest.approx(0.75)
    assert scheduled("cosine", 1.0, 0.5, 1.0) == 0.5
    assert all(scheduled(shape, 0.1, 0.0, p) >= 0 for shape in ("linear", "cosine") for p in np.linspace(0, 3, 1001))
    with pytest.raises(ValueError, match="sawtooth"):
        scheduled("sawtooth", 1, 0, 0)


def test_merged_moments_are_those_of_all_rows():
    rows = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) * 100 + 1e4
    merged = Moments(torch.zeros(3).double(), torch.ones(3).double(), torch.tensor(0.0).double())
    for block in rows.split([1, 9, 490, 500]):
        merged = merge_moments(merged, moments_of(block))
    x = rows.double().numpy()
    np.testing.assert_allclose(merged.mean, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(merged.var, x.var(0), rtol=1e-10)
    assert merged.n == 1000


def test_moments_ignore_invalid_rows_even_if_nan():
    rows = torch.tensor([[1.0], [torch.nan], [3.0]])
    seen = moments_of(rows, torch.tensor([True, False, True]))
    assert (seen.mean.item(), seen.var.item(), seen.n.item()) == (2, 1, 2)
    none = moments_of(rows, torch.zeros(3, dtype=torch.bool))
    kept = merge_moments(seen, none)
    assert (kept.mean.item(), kept.var.item(), kept.n.item()) == (2, 1, 2)


def test_counts_are_exact_beyond_the_integers_of_float32():
    big = Moments(torch.zeros(1).double(), torch.ones(1).double(), torch.tensor(2.0**30).double())
    assert merge_moments(big, moments_of(torch.ones(1, 1))).n == 2**30 + 1


@pytest.mark.parametrize("eps", [1e-5, 1e-8])
def test_adam_equals_torch_adam(eps):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, generator=g)
    reference = torch.nn.Parameter(x.clone())
    optimizer = torch.optim.Adam([reference], lr=3e-3, eps=eps)
    state = adam_init(x)
    for i in range(100):
        grad = torch.randn(50, generator=g) * 10.0 ** (i % 5 - 4)
        reference.grad = grad.clone()
        optimizer.step()
        x, state = adam_step(x, grad, state, torch.tensor(3e-3), eps)
    torch.testing.assert_close(x, reference.detach(), atol=1e-6, rtol=1e-5)


def test_clipping_equals_torch_clip_grad_norm():
    for scale in (1e-3, 1.0, 1e3):
        grad = scale * torch.arange(1.0, 6.0)
        p = torch.nn.Parameter(torch.zeros(5))
        p.grad = grad.clone()
        norm = torch.nn.utils.clip_grad_norm_([p], 0.5)
        mine, my_norm = clip_by_norm(grad, torch.tensor(0.5))
        torch.testing.assert_close(mine, p.grad)
        torch.testing.assert_close(my_norm, norm)
    assert math.isclose(clip_by_norm(torch.ones(4), torch.tensor(0.5))[0].norm().item(), 0.5, rel_tol=1e-5)
