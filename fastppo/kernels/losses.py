"""The loss of a block of rows and its gradient by the network's outputs, as parts of Triton kernels.

The definitions are those of `fastppo.functional.losses`, `distributions` and `bounded_distributions`.
"""

from __future__ import annotations

import triton
import triton.language as tl

from fastppo.kernels.layers import bound_log_std, padded, sigmoid, softplus, tanh

# the figures of `act_loss` among those of a program: policy loss, entropy, the KLs, clip fraction, count
ACTOR_FIGURES = tl.constexpr((0, 2, 3, 4, 5, 6, 7))
N_ACTOR_FIGURES = tl.constexpr(7)
_FORBIDDEN = tl.constexpr(-1e8)  # logit of an action that the mask forbids
_LOWEST_LOG_PROB = tl.constexpr(-1e9)
_LARGEST_BIT_LOGIT = tl.constexpr(1e3)
_NODES = tl.constexpr(64)  # of the squashed Gaussian's quadrature, from -5 to 5 standard deviations


@triton.constexpr_function
def _begin(nvec, component):
    return sum(nvec[:component])


@triton.jit
def is_finite(x):
    """Whether x is neither infinite nor NaN."""
    return tl.abs(x) < float("inf")  # False for NaN


@triton.jit
def _expm1_minus_x(x):
    """Return exp(x) - 1 - x, never negative: by its series near 0, where the difference would lose all digits."""
    series = 1.0 / 40320.0
    series = series * x + 1.0 / 5040.0
    series = series * x + 1.0 / 720.0
    series = series * x + 1.0 / 120.0
    series = series * x + 1.0 / 24.0
    series = series * x + 1.0 / 6.0
    series = (series * x + 0.5) * x * x
    return tl.where(tl.abs(x) < 0.5, series, tl.exp(x) - 1.0 - x)


@triton.jit
def load_columns(at, first, n: tl.constexpr, rows):
    """Return n columns from `first` on of the rows [B] whose addresses are `at`, a padded tile [B, n]."""
    k = tl.arange(0, padded(n))
    return tl.load(at[:, None] + first + k[None, :], mask=rows[:, None] & (k < n)[None, :], other=0.0)


@triton.jit
def _log_softmax(x, choices):
    most = tl.max(tl.where(choices, x, float("-inf")), 1)
    shifted = x - most[:, None]
    return shifted - tl.log(tl.sum(tl.where(choices, tl.exp(shifted), 0.0), 1))[:, None]


@triton.jit
def _at_least(x, low):
    return tl.where(x < low, low, x)  # NaN stays NaN


@triton.jit
def _log_tanh_derivative(u):
    return 2.0 * (0.69314718 - u - softplus(-2.0 * u))


@triton.jit
def _expected_log_tanh_derivative(mean, std):
    """Return the expected log(1 - tanh(u)^2) of u = mean + std z, and its derivatives by mean and std."""
    total, first, second = tl.zeros_like(mean), tl.zeros_like(mean), tl.zeros_like(mean)
    weights = 0.0
    for i in range(_NODES):
        z = -5.0 + i * (10.0 / (_NODES - 1))
        weight = tl.exp(-0.5 * z * z)
        u = mean + std * z
        curve = -2.0 * tanh(u) * weight
        weights += weight
        total += weight * _log_tanh_derivative(u)
        first += curve
        second += curve * z
    return total / weights, first / weights, second / weights


@triton.jit
def _surrogate(logprob, at, rows, mean, divisor, clip, COLUMNS: tl.constexpr, LOSS: tl.constexpr):
    """Return logratio, surrogate, and the gradient of minus the surrogate by the log-probability, [B] each."""
    logratio = logprob - tl.load(at + COLUMNS.logprob, mask=rows, other=0.0)
    ratio = tl.exp(logratio)
    advantage = (tl.load(at + COLUMNS.advantage, mask=rows, other=0.0) - mean) / divisor
    surrogate = ratio * advantage
    by_logprob = -surrogate
    if LOSS.clips:
        low, high = 1.0 - clip, 1.0 + clip
        clipped = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio)) * advantage
        lower = surrogate > clipped  # False for NaN
        surrogate, by_logprob = tl.where(lower, clipped, surrogate), tl.where(lower, 0.0, by_logprob)
    # so that the minibatch is skipped, as by torch
    return logratio, surrogate, tl.where(is_finite(ratio), by_logprob, float("nan"))


@triton.jit
def value_loss(v, old, target, limit, LOSS: tl.constexpr):
    """Return the loss of the values v [B], and its derivative."""
    error = v - target
    loss, gradient = 0.5 * error * error, error
    if LOSS.value_clip != "off":
        limit = tl.where(limit < 0, float("inf"), limit)
        step = v - old
        kept = tl.where(step > limit, limit, tl.where(step < -limit, -limit, step))
        clipped_error = old + kept - target
        clipped = 0.5 * clipped_error * clipped_error
        clipped_gradient = tl.where((step > limit) | (step < -limit), 0.0, clipped_error)
        if LOSS.value_clip == "max":
            # equal losses share the gradient, as torch.maximum divides it
            both = tl.where(clipped == loss, 0.5 * (error + clipped_gradient), gradient)
            larger = clipped > loss  # False for NaN
            loss, gradient = tl.where(larger, clipped, loss), tl.where(larger, clipped_gradient, both)
        else:
            loss, gradient = clipped, clipped_gradient
    return loss, gradient


@triton.jit
def act_loss(
    outs,
    parameters,
    at,
    rows,
    mean,
    divisor,
    clip,
    ent_coef,
    kl_coef,
    NETWORK: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOSS: tl.constexpr,
    N: tl.constexpr,
):
    """Evaluate the distribution and the policy's loss of a block of rows.

    Returns:
        The gradients by the heads' outputs [B, N], of a Gaussian by means and log standard deviations; the figures of
        each row, [B] each, in the order of ACTOR_FIGURES.
    """
    k = tl.arange(0, padded(N))
    real = (k < N)[None, :]
    x = outs[0]
    old = load_columns(at, COLUMNS.old, N, rows)
    if NETWORK.distribution == "categorical":
        allowed = real
        if COLUMNS.mask >= 0:
            allowed = real & (load_columns(at, COLUMNS.mask, N, rows) > 0)
            x = tl.where(allowed, x, _FORBIDDEN)
        logp, old_logp, entropies = tl.zeros_like(x), tl.zeros_like(x), tl.zeros_like(x)
        entropy = tl.zeros_like(mean + tl.sum(x, 1))
        chosen = k[None, :] < tl.zeros_like(x)
        for c in tl.static_range(len(NETWORK.nvec)):
            place = k - _begin(NETWORK.nvec, c)
            choices = ((place >= 0) & (place < NETWORK.nvec[c]))[None, :]
            logp = tl.where(choices, _log_softmax(x, choices), logp)
            old_logp = tl.where(choices, _log_softmax(old, choices), old_logp)
            terms = tl.where(choices, tl.exp(logp) * _at_least(logp, _LOWEST_LOG_PROB), 0.0)
            own = -tl.sum(terms, 1)
            entropy += own
            entropies = tl.where(choices, own[:, None], entropies)
            action = tl.load(at + COLUMNS.action + c, mask=rows, other=0.0).to(tl.int32)
            chosen = chosen | (choices & (place[None, :] == action[:, None]))
        p, old_p = tl.where(real, tl.exp(logp), 0.0), tl.where(real, tl.exp(old_logp), 0.0)
        logprob = tl.sum(tl.where(chosen, logp, 0.0), 1)
        logp, old_logp = _at_least(logp, _LOWEST_LOG_PROB), _at_least(old_logp, _LOWEST_LOG_PROB)
        kl = tl.sum(old_p * (old_logp - logp), 1)
        logratio, surrogate, by_logprob = _surrogate(logprob, at, rows, mean, divisor, clip, COLUMNS, LOSS)
        d = by_logprob[:, None] * (tl.where(chosen, 1.0, 0.0) - p) + ent_coef * p * (logp + entropies)
        if LOSS.penalizes:
            d += kl_coef * (p - old_p)
        gradients = (tl.where(allowed, d, 0.0),)
    elif NETWORK.distribution == "bernoulli":
        edge: tl.constexpr = _LARGEST_BIT_LOGIT
        inside = real & ((x > edge) | (x < -edge) == 0)
        x = tl.where(x > edge, edge, _at_least(x, -edge))
        old = tl.where(old > edge, edge, _at_least(old, -edge))
        p, old_p = sigmoid(x), sigmoid(old)
        bit = load_columns(at, COLUMNS.action, N, rows) > 0
        soft = softplus(x)
        logprob = tl.sum(tl.where(real, -tl.where(bit, softplus(-x), soft), 0.0), 1)
        entropy = tl.sum(tl.where(real, soft - x * p, 0.0), 1)
        kl = tl.sum(tl.where(real, old_p * (old - x) - softplus(old) + soft, 0.0), 1)
        logratio, surrogate, by_logprob = _surrogate(logprob, at, rows, mean, divisor, clip, COLUMNS, LOSS)
        d = by_logprob[:, None] * (tl.where(bit, 1.0, 0.0) - p) + ent_coef * x * p * (1.0 - p)
        if LOSS.penalizes:
            d += kl_coef * (p - old_p)
        gradients = (tl.where(inside, d, 0.0),)
    else:
        if NETWORK.log_std is None:
            raw = outs[1]
        else:
            raw = tl.load(parameters + NETWORK.log_std + k, mask=k < N, other=0.0)[None, :]
        log_std, by_raw = bound_log_std(raw)
        old_log_std, _ = bound_log_std(load_columns(at, COLUMNS.old + N, N, rows))
        inverse = tl.exp(-log_std)
        action = load_columns(at, COLUMNS.action, N, rows)
        z, shift = (action - x) * inverse, (old - x) * inverse
        spread = tl.exp(2.0 * (old_log_std - log_std))
        logprobs = -0.5 * z * z - log_std - 0.91893853
        entropies = tl.zeros_like(x) + log_std + 1.41893853
        entropy_by_mean, entropy_by_log_std = tl.zeros_like(x), tl.zeros_like(x) + 1.0
        if NETWORK.distribution == "squashed":
            logprobs -= _log_tanh_derivative(action)
            std = tl.exp(log_std)
            part, entropy_by_mean, by_std = _expected_log_tanh_derivative(x, std + tl.zeros_like(x))
            entropies += part
            entropy_by_log_std += by_std * std
        logprob = tl.sum(tl.where(real, logprobs, 0.0), 1)
        entropy = tl.sum(tl.where(real, entropies, 0.0), 1)
        kl = tl.sum(tl.where(real, log_std - old_log_std + 0.5 * (spread + shift * shift - 1.0), 0.0), 1)
        logratio, surrogate, by_logprob = _surrogate(logprob, at, rows, mean, divisor, clip, COLUMNS, LOSS)
        d_mean = by_logprob[:, None] * z * inverse - ent_coef * entropy_by_mean
        d_log_std = by_logprob[:, None] * (z * z - 1.0) - ent_coef * entropy_by_log_std
        if LOSS.penalizes:
            d_mean -= kl_coef * shift * inverse
            d_log_std += kl_coef * (1.0 - spread - shift * shift)
        gradients = (tl.where(real, d_mean, 0.0), tl.where(real, d_log_std * by_raw, 0.0))
    beyond = _expm1_minus_x(logratio)
    is_clipped = tl.where(tl.abs(beyond + logratio) > clip, 1.0, 0.0)
    return gradients, (-surrogate, entropy, -logratio, beyond, kl, is_clipped, tl.zeros_like(kl) + 1.0)
