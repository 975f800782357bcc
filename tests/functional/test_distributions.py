import math

import pytest
import torch
from torch import distributions as td

from fastppo.functional.distributions import Bernoulli, Categorical, Gaussian, MultiCategorical, bound_log_std

B = 64
DISTRIBUTIONS = [Categorical(5), MultiCategorical((2, 5, 3)), Bernoulli(4), Gaussian(3)]


def ids(dist):
    return type(dist).__name__


def params_of(dist, seed=0):
    return torch.randn(B, dist.n_params, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def theirs(dist, params):
    """Return the counterparts in torch.distributions, as a list of independent components."""
    if isinstance(dist, Categorical):
        return [td.Categorical(logits=params)]
    if isinstance(dist, MultiCategorical):
        return [td.Categorical(logits=block) for block in params.split(dist.nvec, -1)]
    if isinstance(dist, Bernoulli):
        return [td.Bernoulli(logits=params[:, i]) for i in range(dist.n)]
    std = bound_log_std(params[:, dist.n :]).exp()
    return [td.Normal(params[:, i], std[:, i]) for i in range(dist.n)]


def sample(dist, params, seed=1):
    noise = torch.empty((*params.shape[:-1], dist.noise_size), dtype=params.dtype)
    dist.fill_noise(noise, torch.Generator().manual_seed(seed))
    return dist.sample(params, noise)


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_log_prob_entropy_and_kl_equal_torch_distributions(dist):
    params, other = params_of(dist), params_of(dist, 2)
    actions = sample(dist, params)
    assert actions.shape == (B, *dist.action_shape)
    columns = actions.reshape(B, -1).unbind(1)
    parts, others = theirs(dist, params), theirs(dist, other)
    log_prob = sum(p.log_prob(a.to(params.dtype)) for p, a in zip(parts, columns, strict=True))
    torch.testing.assert_close(dist.log_prob(params, actions), log_prob)
    torch.testing.assert_close(dist.entropy(params), sum(p.entropy() for p in parts))
    kl = sum(td.kl_divergence(p, q) for p, q in zip(parts, others, strict=True))
    torch.testing.assert_close(dist.kl(params, other), kl)
    torch.testing.assert_close(dist.kl(params, params), torch.zeros(B, dtype=params.dtype))


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_samples_follow_the_distribution(dist):
    n = 40_000
    params = params_of(dist)[:1].expand(n, -1).float()
    actions = sample(dist, params).reshape(n, -1).double()
    for component, column in zip(theirs(dist, params[:1]), actions.unbind(1), strict=True):
        if isinstance(component, td.Categorical):
            seen = torch.bincount(column.long(), minlength=component.probs.shape[-1]) / n
            torch.testing.assert_close(seen.double(), component.probs[0].double(), atol=0.015, rtol=0)
        else:
            spread = component.stddev.item()
            assert abs(column.mean().item() - component.mean.item()) < 5 * spread / math.sqrt(n)
            assert abs(column.std().item() / spread - 1) < 0.02


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_the_mode_is_the_most_probable_action(dist):
    params = params_of(dist)
    best = dist.log_prob(params, dist.mode(params))
    for seed in range(20):
        assert (best >= dist.log_prob(params, sample(dist, params, seed)) - 1e-12).all()


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_noise_is_finite_and_reproducible_from_its_seed(dist):
    blocks = []
    for _ in range(2):
        noise = torch.empty(200_000, dist.noise_size)
        dist.fill_noise(noise, torch.Generator().manual_seed(3))
        assert noise.isfinite().all()
        blocks.append(noise)
    assert torch.equal(*blocks)


def test_entropy_of_a_deterministic_choice_is_0():
    logits = torch.tensor([[0.0, 200.0]])
    assert Categorical(2).entropy(logits).item() == 0
    assert Bernoulli(2).entropy(200 * torch.ones(1, 2)).item() == pytest.approx(0, abs=1e-6)


def test_log_std_is_the_identity_in_the_common_range_and_bounded_everywhere():
    inside = torch.linspace(-5, 1, 60_001)
    assert (bound_log_std(inside) - inside).abs().max() <= 1e-6
    wide = torch.linspace(-1e4, 1e4, 200_001, dtype=torch.float64)
    out = bound_log_std(wide)
    assert out.min() >= -10 - 1e-9
    assert out.max() <= 2 + 1e-9
    assert (out.diff() >= -1e-9).all()
    x = torch.tensor([-9.5, 1.5], requires_grad=True)
    assert (torch.autograd.grad(bound_log_std(x).sum(), x)[0] > 0.01).all()
