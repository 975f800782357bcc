import math

import pytest
import torch

from fastppo.functional.diagnostics import (
    action_range,
    approx_kl_k1,
    approx_kl_k3,
    clip_fraction,
    explained_variance,
    masked_mean,
)
from fastppo.functional.losses import clipped_policy_loss, normalize_advantages, value_loss

C = torch.tensor(0.2)


def loss_by_definition(ratios, advantages, c):
    """Return eq. 7 of Schulman et al. 2017, computed in plain floats."""
    terms = [min(r * a, min(max(r, 1 - c), 1 + c) * a) for r, a in zip(ratios, advantages, strict=True)]
    return -sum(terms) / len(terms)


def test_the_clipped_surrogate_equals_its_definition():
    ratios, advantages = [0.5, 0.5, 1.0, 1.5, 1.5, 1.1], [1.0, -2.0, 3.0, 1.0, -1.0, 0.5]
    loss = clipped_policy_loss(torch.tensor(ratios).log(), torch.tensor(advantages), C)
    assert loss.item() == pytest.approx(loss_by_definition(ratios, advantages, 0.2))


@pytest.mark.parametrize(
    ("ratio", "advantage", "flows"),
    [(1.3, 1, False), (1.3, -1, True), (0.7, 1, True), (0.7, -1, False), (1.1, 1, True)],
)
def test_the_gradient_is_0_only_where_a_further_step_would_leave_the_clip_range(ratio, advantage, flows):
    x = torch.tensor([math.log(ratio)], requires_grad=True)
    (grad,) = torch.autograd.grad(clipped_policy_loss(x, torch.tensor([float(advantage)]), C), x)
    assert (grad != 0).item() is flows


def test_at_ratio_1_the_gradient_is_the_policy_gradient():
    x = torch.zeros(4, requires_grad=True)
    advantages = torch.tensor([1.0, -2.0, 0.5, 3.0])
    (grad,) = torch.autograd.grad(clipped_policy_loss(x, advantages, C), x)
    torch.testing.assert_close(grad, -advantages / 4)


def value_by_definition(v, old, r, c, kind):
    clipped = old + min(max(v - old, -c), c)
    plain, other = (v - r) ** 2, (clipped - r) ** 2
    return 0.5 * {"off": plain, "max": max(plain, other), "clipped_only": other}[kind]


@pytest.mark.parametrize("kind", ["off", "max", "clipped_only"])
def test_value_losses_equal_their_definitions(kind):
    rows = [(1.0, 0.5, 2.0), (1.0, 0.9, 2.0), (3.0, 0.0, 0.1), (-1.0, 0.0, 1.0)]
    v, old, r = torch.tensor(rows).unbind(1)
    expected = sum(value_by_definition(*row, 0.2, kind) for row in rows) / len(rows)
    assert value_loss(v, old, r, kind, C).item() == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["max", "clipped_only"])
def test_a_negative_value_clip_range_disables_clipping(kind):
    v, old, r = torch.randn(3, 50, generator=torch.Generator().manual_seed(0)).unbind(0)
    torch.testing.assert_close(value_loss(v, old, r, kind, torch.tensor(-1.0)), value_loss(v, old, r, "off", C))


def test_advantages_are_normalised_by_the_unbiased_standard_deviation():
    x = torch.tensor([1.0, 2.0, 4.0])
    out = normalize_advantages(x)
    assert out.mean().item() == pytest.approx(0, abs=1e-6)
    assert out.std().item() == pytest.approx(1, abs=1e-6)


def test_too_few_or_equal_advantages_stay_finite():
    assert normalize_advantages(torch.tensor([3.0])).item() == 3.0
    assert normalize_advantages(torch.full((4,), 2.0)).tolist() == [0, 0, 0, 0]
    one = torch.tensor([True, False])
    assert normalize_advantages(torch.tensor([3.0, 5.0]), one)[0].item() == 3.0


def test_invalid_rows_are_ignored_even_if_nan():
    g = torch.Generator().manual_seed(0)
    x, a, v, old, r = torch.randn(5, 30, generator=g).unbind(0)
    valid = torch.rand(30, generator=g) < 0.6
    kept = [y[valid] for y in (x, a, v, old, r)]
    spoilt = [torch.where(valid, y, torch.nan) for y in (x, a, v, old, r)]
    figures = []
    for rows, mask in ((spoilt, valid), (kept, None)):
        out = [
            clipped_policy_loss(rows[0], rows[1], C, mask),
            value_loss(*rows[2:], "max", C, mask),
            approx_kl_k1(rows[0], mask),
            approx_kl_k3(rows[0], mask),
            clip_fraction(rows[0], C, mask),
            explained_variance(rows[2], rows[4], mask),
        ]
        normalised = normalize_advantages(rows[1], mask)
        figures.append(torch.cat((torch.stack(out), normalised if mask is None else normalised[mask])))
    torch.testing.assert_close(*figures)


def test_no_valid_row_gives_0():
    assert masked_mean(torch.ones(3), torch.zeros(3, dtype=torch.bool)).item() == 0


def test_k3_is_never_negative_and_both_estimate_the_kl():
    g = torch.Generator().manual_seed(0)
    old, new = torch.randn(2, 6, generator=g, dtype=torch.float64).unbind(0)
    p, q = old.log_softmax(0), new.log_softmax(0)
    exact = (p.exp() * (p - q)).sum()
    x = (q - p)[torch.multinomial(p.exp(), 400_000, replacement=True, generator=g)]
    assert approx_kl_k1(x).item() == pytest.approx(exact.item(), rel=0.02)
    assert approx_kl_k3(x).item() == pytest.approx(exact.item(), rel=0.02)
    tiny = 1e-4 * torch.randn(1000, generator=g)
    assert approx_kl_k3(tiny).item() >= 0
    assert approx_kl_k3(torch.tensor([torch.nan])).isnan()


def test_action_range_is_the_share_of_the_bounds_that_actions_use():
    low, high = torch.tensor([-2.0, 0.0, -math.inf]), torch.tensor([2.0, 10.0, 1.0])
    actions = torch.tensor([[1.0, 5.0, 100.0], [-3.0, 10.0, 100.0]])  # -3 is clipped to -2; the third has no range
    assert action_range(actions, low, high).item() == pytest.approx((0.5 + 0 + 1 + 1) / 4)
    assert action_range(actions, low, high, torch.tensor([True, False])).item() == pytest.approx(0.25)
    assert action_range(actions, -2000 + low * 0, 2000 + high * 0).item() < 0.1
    assert action_range(actions[:, 2:], low[2:], high[2:]).isnan()


def test_explained_variance():
    r = torch.tensor([1.0, 2.0, 3.0])
    assert explained_variance(r, r).item() == 1
    assert explained_variance(torch.zeros(3), r).item() == pytest.approx(0, abs=1e-6)
    assert explained_variance(-r, r).item() == pytest.approx(-3)
    assert explained_variance(r, torch.ones(3)).isnan()
