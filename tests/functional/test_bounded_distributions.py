"""Squashed Gaussian and Beta against torch.distributions, numerical integrals and their definitions."""

import math

import pytest
import torch
from torch import distributions as td

from fastppo.functional.bounded_distributions import Beta, SquashedGaussian, log_tanh_slope
from fastppo.functional.distributions import Gaussian, bound_log_std
from fastppo.runtime.compile import compile_graph

B = 64
DISTRIBUTIONS = [SquashedGaussian(3), Beta(3)]


def ids(dist):
    return type(dist).__name__


def params_of(dist, seed=0, scale=1.5):
    g = torch.Generator().manual_seed(seed)
    return scale * torch.randn(B, dist.n_params, generator=g, dtype=torch.float64)


def noise_of(dist, shape, seed=1, dtype=torch.float64):
    noise = torch.empty((*shape, dist.noise_size), dtype=dtype)
    dist.fill_noise(noise, torch.Generator().manual_seed(seed))
    return noise


def action_of(dist, stored):
    return torch.tanh(dist.squash * stored)


def theirs(dist, params):
    """Return torch's distribution of the actions in [-1, 1]."""
    first, second = params.double().chunk(2, -1)
    if isinstance(dist, SquashedGaussian):
        normal = td.Normal(first, bound_log_std(second).exp())
        return td.TransformedDistribution(normal, [td.TanhTransform()])
    zero = torch.zeros_like(first)
    beta = td.Beta(1 + torch.logaddexp(first, zero), 1 + torch.logaddexp(second, zero))
    return td.TransformedDistribution(beta, [td.AffineTransform(-1, 2)])


def integral(dist, params, value, n=400_001):
    """Return the integral over [-1, 1] of value(log density) x density, for one component and params [2].

    By the trapezoidal rule over the stored action u: da = k / cosh(k u)^2 du.
    """
    u = torch.linspace(-60, 60, n, dtype=torch.float64)
    log_cosh = torch.logaddexp(dist.squash * u, -dist.squash * u) - math.log(2)
    log_slope = math.log(dist.squash) - 2 * log_cosh
    if isinstance(dist, SquashedGaussian):
        log_density = theirs(dist, params).base_dist.log_prob(u) - log_slope
    else:
        y = torch.sigmoid(u).clamp(max=1 - 1e-16)
        log_density = theirs(dist, params).base_dist.log_prob(y) - math.log(2)
    return torch.trapezoid(value(log_density) * (log_density + log_slope).exp(), u)


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_the_log_density_equals_torch_distributions(dist):
    params = params_of(dist, scale=0.5)  # so that no action rounds to a bound
    stored = dist.sample(params, noise_of(dist, (B,)))
    assert stored.shape == (B, *dist.action_shape)
    expected = theirs(dist, params).log_prob(action_of(dist, stored)).sum(-1)
    torch.testing.assert_close(dist.log_prob(params, stored), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dist", [SquashedGaussian(1), Beta(1)], ids=ids)
def test_the_density_of_the_action_integrates_to_1_over_its_range(dist):
    for params in params_of(dist)[:8]:
        assert integral(dist, params, torch.ones_like).item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("dist", [SquashedGaussian(1), Beta(1)], ids=ids)
def test_the_entropy_equals_a_dense_integral(dist):
    for params in params_of(dist)[:16]:
        expected = integral(dist, params, lambda log_density: -log_density)
        assert dist.entropy(params).item() == pytest.approx(expected.item(), abs=1e-4)


def dense_entropy(mean, log_std):
    """Return the entropy of the tanh of a normal variable, by 20,001 nodes."""
    z = torch.linspace(-9, 9, 20_001, dtype=torch.float64)
    density = td.Normal(0.0, 1.0).log_prob(z).exp()
    slope = log_tanh_slope(mean + log_std.exp() * z)
    return log_std + 0.5 * math.log(2 * math.pi * math.e) + torch.trapezoid(density * slope, z)


@pytest.mark.parametrize(("largest", "error"), [(math.log(3), 1e-5), (2.0, 1e-4)])
def test_the_stated_error_of_the_quadrature_holds(largest, error):
    dist = SquashedGaussian(1)
    for mean in (0.0, 0.3, 1.0, 2.5, 30.0):
        for log_std in (-10.0, -3.0, 0.0, largest):
            # beyond the bound, so that it is reached exactly
            raw = 50.0 if log_std == 2 else -50.0 if log_std == -10 else log_std
            params = torch.tensor([mean, raw], dtype=torch.float64)
            exact = bound_log_std(params[1])
            expected = dense_entropy(params[0], exact).item()
            assert dist.entropy(params).item() == pytest.approx(expected, abs=error)


def test_the_gradient_of_the_quadrature_is_that_of_the_entropy():
    params = torch.tensor([0.7, 0.2], dtype=torch.float64, requires_grad=True)
    (found,) = torch.autograd.grad(SquashedGaussian(1).entropy(params), params)
    (expected,) = torch.autograd.grad(dense_entropy(params[0], params[1]), params)
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)


def test_entropy_and_kl_of_a_beta_equal_torch_distributions():
    dist = Beta(3)
    old, new = params_of(dist), params_of(dist, 2)
    one, other = (theirs(dist, params).base_dist for params in (old, new))
    torch.testing.assert_close(dist.entropy(old), (one.entropy() + math.log(2)).sum(-1))
    torch.testing.assert_close(dist.kl(old, new), td.kl_divergence(one, other).sum(-1))


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_the_kl_equals_its_mean_over_samples(dist):
    old, new = params_of(dist)[0], params_of(dist, 2)[0]
    stored = dist.sample(old.expand(400_000, -1), noise_of(dist, (400_000,)))
    logratio = dist.log_prob(old, stored) - dist.log_prob(new, stored)
    error = logratio.std() / math.sqrt(len(stored))
    assert abs(logratio.mean() - dist.kl(old, new)) < 4 * error
    assert dist.kl(old, old).item() == 0
    assert (dist.kl(params_of(dist), params_of(dist, 3)) > 0).all()


def kolmogorov(values, cdf):
    """Return sqrt(n) times the largest distance between the empirical distribution and `cdf`."""
    ordered, n = values.sort().values, len(values)
    steps = torch.arange(n + 1, dtype=torch.float64) / n
    expected = cdf(ordered)
    return math.sqrt(n) * max((expected - steps[:-1]).abs().max(), (expected - steps[1:]).abs().max()).item()


@pytest.mark.parametrize("raws", [(-30.0, -30.0), (0.0, 0.0), (-3.0, 2.0), (8.0, 1.0), (300.0, 200.0), (4e4, 1e4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_samples_of_a_beta_follow_it(raws, dtype):
    """By the first two moments, and by the distance of Kolmogorov and Smirnov to an integral of the density."""
    dist, n = Beta(1), 100_000
    params = torch.tensor(raws, dtype=dtype)
    stored = dist.sample(params.expand(n, -1), noise_of(dist, (n,), dtype=dtype)).double().squeeze(-1)
    beta = theirs(dist, params).base_dist
    y = torch.sigmoid(stored)
    spread = beta.stddev.item()
    assert abs(y.mean().item() - beta.mean.item()) < 4 * spread / math.sqrt(n)
    assert y.std().item() / spread == pytest.approx(1, abs=0.015)
    low, high = stored.min().item() - 5, stored.max().item() + 5
    x = torch.linspace(low, high, 200_001, dtype=torch.float64)
    # the density of the logit: that of y, times y (1 - y)
    a, b = beta.concentration1, beta.concentration0
    log_y, log_rest = torch.nn.functional.logsigmoid(x), torch.nn.functional.logsigmoid(-x)
    density = (a * log_y + b * log_rest - (a.lgamma() + b.lgamma() - (a + b).lgamma())).exp()
    cumulative = torch.cumulative_trapezoid(density, x)
    assert cumulative[-1].item() == pytest.approx(1, abs=1e-6)

    def cdf(values):
        return cumulative[torch.searchsorted(x, values.contiguous()).clamp(max=len(cumulative) - 1)]

    # above 1.95 with a probability of 0.1 %
    assert kolmogorov(stored, cdf) < 1.95


def test_samples_of_a_squashed_gaussian_follow_it():
    dist, n = SquashedGaussian(1), 100_000
    params = torch.tensor([0.8, -0.4], dtype=torch.float64)
    stored = dist.sample(params.expand(n, -1), noise_of(dist, (n,))).squeeze(-1)
    assert kolmogorov(action_of(dist, stored), theirs(dist, params).cdf) < 1.95


def test_of_several_tries_the_first_accepted_one_counts_and_none_gives_a_number():
    dist = Beta(1)
    params = torch.zeros(3, 2)
    noise = torch.zeros(3, dist.noise_size)
    normal, log_uniform = noise.view(3, 2, 2, 7).unbind(1)
    # x = -4 gives v < 0 for shapes below 2.1, which is rejected whatever the uniform variate
    log_uniform.fill_(-1e-9)
    normal[0] = torch.tensor([-4, -4, 0.5, 3.0, 3.0, 3.0, 3.0])
    log_uniform[0] = -5
    normal[1] = torch.tensor([0.5, 3.0, 3.0, 3.0, 3.0, 3.0, 3.0])
    log_uniform[1] = -5
    normal[2] = -4
    normal[:, 1] = 0.0  # v = 1 for the second Gamma variate
    log_uniform[:, 1] = -5
    first, second, none = dist.sample(params, noise).squeeze(-1).tolist()
    d = 1 + math.log(2) - 1 / 3
    assert first == second == pytest.approx(3 * math.log(1 + 0.5 / math.sqrt(9 * d)), rel=1e-5)
    assert none == 0, "v = 1 stands in"


def test_a_try_is_rejected_as_seldom_as_stated():
    """For shape 1, the worst: the acceptance probability as an integral over x."""
    x = torch.linspace(-12, 12, 2_000_001, dtype=torch.float64)
    for shape, below in ((1.0, 0.049), (1.5, 0.049), (3.0, 0.049)):
        d = torch.tensor(shape - 1 / 3, dtype=torch.float64)
        v = (1 + x / (9 * d).sqrt()) ** 3
        log_accept = torch.where(v > 0, 0.5 * x.square() + d * (1 - v + v.clamp(min=1e-300).log()), -math.inf)
        density = (-0.5 * x.square()).exp() / math.sqrt(2 * math.pi)
        rejected = 1 - torch.trapezoid(log_accept.exp().clamp(max=1) * density, x).item()
        assert rejected < below
        assert rejected**7 < 1e-9
    assert log_accept.max() <= 1e-9, "the squeeze is a probability"


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_noise_is_finite_and_reproducible_from_its_seed(dist):
    blocks = [noise_of(dist, (20_000,), seed=3, dtype=torch.float32) for _ in range(2)]
    assert blocks[0].isfinite().all()
    assert torch.equal(*blocks)


def test_the_mode_of_a_beta_is_its_peak():
    dist = Beta(3)
    params = params_of(dist)
    alpha, beta = (theirs(dist, params).base_dist.concentration1, theirs(dist, params).base_dist.concentration0)
    y = (alpha - 1) / (alpha + beta - 2)
    torch.testing.assert_close(action_of(dist, dist.mode(params)), 2 * y - 1)
    assert dist.mode(torch.full((1, 6), -200.0)).tolist() == [[0, 0, 0]], "uniform: the centre"


def test_the_mode_of_a_squashed_gaussian_is_the_median():
    dist = SquashedGaussian(1)
    params = torch.tensor([[0.6, 0.9]])
    stored = dist.sample(params.expand(100_000, -1), noise_of(dist, (100_000,), dtype=torch.float32))
    assert (stored < dist.mode(params)).float().mean().item() == pytest.approx(0.5, abs=0.006)
    assert torch.equal(dist.mode(params), Gaussian(1).mode(params))


@pytest.mark.parametrize("dist", DISTRIBUTIONS, ids=ids)
def test_the_standard_deviation_is_that_of_samples(dist):
    params = params_of(dist, scale=0.7)[0]
    stored = dist.sample(params.expand(200_000, -1), noise_of(dist, (200_000,)))
    seen = stored if isinstance(dist, SquashedGaussian) else action_of(dist, stored)
    torch.testing.assert_close(seen.std(0), dist.std(params), rtol=0.01, atol=0)


EXTREMES = torch.tensor([-1e4, -90.0, -20.0, -1.0, 0.0, 1.0, 20.0, 90.0, 1e4, 1e8])


@pytest.mark.parametrize("dist", [SquashedGaussian(1), Beta(1)], ids=ids)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_values_and_gradients_are_finite_at_extremes(dist, dtype):
    """Raw parameters from -1e4 to 1e8; a mean of that size is 1e12 of the smallest standard deviations away."""
    params = torch.cartesian_prod(EXTREMES, EXTREMES).to(dtype)
    if isinstance(dist, SquashedGaussian):
        params = params[params[:, 0].abs() <= 1e4]
    params.requires_grad_()
    with torch.no_grad():
        stored = dist.sample(params, noise_of(dist, (len(params),), dtype=dtype))
        actions = {"sample": stored, "mode": dist.mode(params), "low": -stored.abs().clamp(min=9, max=60)}
    assert actions["sample"].isfinite().all()
    assert actions["mode"].isfinite().all()
    old = params.detach().flip(0) if isinstance(dist, Beta) else params.detach() + 0.1
    values = {name: dist.log_prob(params, action) for name, action in actions.items()}
    values |= {"entropy": dist.entropy(params), "kl": dist.kl(old, params), "std": dist.std(params).squeeze(-1)}
    for name, value in values.items():
        (gradient,) = torch.autograd.grad(value.sum(), params, retain_graph=True)
        assert value.isfinite().all(), name
        assert gradient.isfinite().all(), name


@pytest.mark.parametrize("dist", [SquashedGaussian(2), Beta(2)], ids=ids)
def test_float32_is_close_to_float64(dist):
    """Ratios near 1 need log-probabilities of small errors, also where a Beta is narrow."""
    for scale in (1.0, 300.0 if isinstance(dist, Beta) else 1.0):
        params = params_of(dist, scale=scale).float()
        noise = noise_of(dist, (B,), dtype=torch.float32)
        stored = dist.sample(params, noise)
        exact = dist.log_prob(params.double(), stored.double())
        torch.testing.assert_close(dist.log_prob(params, stored).double(), exact, rtol=3e-6, atol=3e-6)
        torch.testing.assert_close(dist.entropy(params).double(), dist.entropy(params.double()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dist", [SquashedGaussian(2), Beta(2)], ids=ids)
def test_compiled_values_and_gradients_equal_eager_ones(dist):
    old, new = params_of(dist).float(), params_of(dist, 2).float()
    noise = noise_of(dist, (B,), dtype=torch.float32)

    def everything(old, new, noise):
        with torch.enable_grad():
            stored, x = dist.sample(old, noise), new.detach().requires_grad_()
            parts = (dist.log_prob(x, stored), dist.entropy(x), dist.kl(old, x), dist.std(x).sum(-1))
            (gradient,) = torch.autograd.grad(sum(part.sum() for part in parts), x)
        return (stored, dist.mode(old), *(part.detach() for part in parts), gradient)

    compiled = compile_graph(everything, (old, new, noise))
    torch.testing.assert_close(compiled(old, new, noise), everything(old, new, noise), rtol=1e-5, atol=1e-5)
