"""The PPO update of an MLP as four Triton kernels: gradient of a block of rows, sum over programs, decision, Adam.

`differentiate` runs a fixed number of programs per trunk. A program takes every so many-th block of the minibatch's
rows from gather to gradient without leaving the chip, and keeps the sum of its gradients in registers. `reduce` adds
these sums in a fixed order, so equal calls give equal bits. `take_step` is `fastppo.ppo.update_step.update_step` with
Adam: one program decides, then every parameter is stepped. Nothing is read on the host.

`losses.py` has the loss of a block of rows; Adam's definition is that of `fastppo.functional.adam`.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Literal, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastppo.kernels.layers import (
    Precision,
    activate,
    dense,
    item,
    load_bias,
    load_weight,
    load_weight_as_stored,
    padded,
    slope,
    weight_places,
)
from fastppo.kernels.losses import ACTOR_FIGURES, N_ACTOR_FIGURES, act_loss, is_finite, load_columns, value_loss

# After the gradient of the parameters, a program's sums hold those of diagnostics and the number of rows that count
N_DIAGNOSTICS, N_FIGURES = 7, 8
_VALUE_LOSS = tl.constexpr(1)
_FIGURES, _COUNT = tl.constexpr(N_FIGURES), tl.constexpr(N_DIAGNOSTICS)
_REDUCE_BLOCK, _REDUCE_ROWS, _STEP_BLOCK = 128, 32, 1024


@dataclasses.dataclass(frozen=True)
class Network:
    """An MLP and its distribution, as constants of a kernel.

    Attributes:
        trunks: `fastppo.policies.mlp_layout.Trunk` each.
        activation: a key of `fastppo.policies.mlp.ACTIVATIONS`.
        log_std: offset of log standard deviations that are parameters of their own; None: there are none.
        distribution: of actions.
        nvec: choices of each component of a categorical distribution.
        components: of an action.
        size: of the vector of parameters.
        precision: of matrix products.
    """

    trunks: tuple[Any, ...]
    activation: str
    log_std: int | None
    distribution: Literal["categorical", "bernoulli", "gaussian", "squashed"]
    nvec: tuple[int, ...]
    components: int
    size: int
    precision: Precision


@dataclasses.dataclass(frozen=True)
class Columns:
    """Where the columns of packed rows begin; features come first, and -1 stands for a column that is missing."""

    width: int
    old: int
    action: int
    logprob: int
    advantage: int
    target: int
    old_value: int
    mask: int = -1
    valid: int = -1


@dataclasses.dataclass(frozen=True)
class Loss:
    """Whether the surrogate is clipped and the KL penalised, and how values are clipped; see `PPOLoss`."""

    clips: bool
    penalizes: bool
    value_clip: Literal["off", "max", "clipped_only"]


class Coefficients(NamedTuple):
    """Coefficients of the loss, [] float32 each."""

    clip: Tensor
    value_clip: Tensor
    value: Tensor
    entropy: Tensor
    kl: Tensor


class State(NamedTuple):
    """The tensors that a step changes; see `fastppo.ppo.update_step.UpdateState` and `AdamState`."""

    params: Tensor
    mean: Tensor
    square: Tensor
    left1: Tensor
    left2: Tensor
    sums: Tensor
    kl_limit: Tensor
    stop_kl: Tensor
    skipped: Tensor


@triton.jit
def _run_trunk(
    parameters,
    data,
    order,
    scale,
    clip_at,
    value_clip_at,
    value_at,
    entropy_at,
    kl_at,
    sums,
    n,
    TRUNK: tl.constexpr,
    NETWORK: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Write to `sums` the sum, over this program's rows, of the gradient of a trunk with its heads and of figures."""
    clip, value_clip = tl.load(clip_at), tl.load(value_clip_at)
    value_coef, ent_coef, kl_coef = tl.load(value_at), tl.load(entropy_at), tl.load(kl_at)
    mean, divisor = tl.load(scale), tl.load(scale + 1)
    depth: tl.constexpr = TRUNK.depth
    n_heads: tl.constexpr = len(TRUNK.heads)
    kind: tl.constexpr = NETWORK.activation
    precision: tl.constexpr = NETWORK.precision
    weights, biases = (), ()
    for i in tl.static_range(depth + n_heads):
        weights = weights + (
            tl.zeros([padded(item(TRUNK.layers, i).n_in), padded(item(TRUNK.layers, i).n_out)], tl.float32),
        )
        biases = biases + (tl.zeros([padded(item(TRUNK.layers, i).n_out)], tl.float32),)
    n_actor_heads: tl.constexpr = n_heads - 1 if TRUNK.values else n_heads
    n_own: tl.constexpr = item(TRUNK.heads, 0).n_out
    log_std_gradient = tl.zeros([padded(n_own)], tl.float32)
    figures = ()
    for i in tl.static_range(N_ACTOR_FIGURES):
        figures = figures + (tl.zeros([BLOCK], tl.float32),)
    value_losses = tl.zeros([BLOCK], tl.float32)

    # weights are read again for each block, from the cache: to keep them would spill registers
    for first in tl.range(tl.program_id(0) * BLOCK, n, tl.num_programs(0) * BLOCK, disable_licm=True, num_stages=1):
        place = first + tl.arange(0, BLOCK)
        rows = place < n
        at = data + tl.load(order + place, mask=rows, other=0) * COLUMNS.width
        if COLUMNS.valid >= 0:
            rows = rows & (tl.load(at + COLUMNS.valid, mask=rows, other=0.0) != 0)
        x = load_columns(at, 0, TRUNK.features, rows)
        inputs, before = (x,), ()
        for i in tl.static_range(depth):
            weight, bias = load_weight(parameters, item(TRUNK.layers, i)), load_bias(parameters, item(TRUNK.layers, i))
            z = dense(x, weight, bias, precision)
            x = activate(z, kind)
            inputs, before = inputs + (x,), before + (z,)
        outs = ()
        for i in tl.static_range(n_heads):
            weight, bias = load_weight(parameters, item(TRUNK.heads, i)), load_bias(parameters, item(TRUNK.heads, i))
            outs = outs + (dense(x, weight, bias, precision),)

        gradients = ()
        if TRUNK.acts:
            by_params, found = act_loss(
                outs, parameters, at, rows, mean, divisor, clip, ent_coef, kl_coef, NETWORK, COLUMNS, LOSS, n_own
            )
            for i in tl.static_range(n_actor_heads):
                gradients = gradients + (tl.where(rows[:, None], by_params[i], 0.0),)
            if NETWORK.log_std is not None:
                log_std_gradient += tl.sum(tl.where(rows[:, None], by_params[1], 0.0), 0)
            more = ()
            for i in tl.static_range(N_ACTOR_FIGURES):
                more = more + (figures[i] + tl.where(rows, found[i], 0.0),)
            figures = more
        if TRUNK.values:
            column = tl.arange(0, padded(1))[None, :] == 0
            v = tl.sum(tl.where(column, outs[n_heads - 1], 0.0), 1)
            old = tl.load(at + COLUMNS.old_value, mask=rows, other=0.0)
            target = tl.load(at + COLUMNS.target, mask=rows, other=0.0)
            loss, by_value = value_loss(v, old, target, value_clip, LOSS)
            value_losses += tl.where(rows, loss, 0.0)
            by_value = tl.where(rows, value_coef * by_value, 0.0)
            gradients = gradients + (tl.where(column, by_value[:, None], 0.0),)

        back = tl.zeros_like(x)
        new_weights, new_biases = (), ()
        for i in tl.static_range(n_heads):
            new_weights = new_weights + (
                tl.dot(tl.trans(x), gradients[i], weights[depth + i], input_precision=precision),
            )
            new_biases = new_biases + (biases[depth + i] + tl.sum(gradients[i], 0),)
            back = tl.dot(
                gradients[i], load_weight_as_stored(parameters, item(TRUNK.heads, i)), back, input_precision=precision
            )
        for i in tl.static_range(depth):
            d = back * slope(before[depth - 1 - i], inputs[depth - i], kind)
            turned = tl.trans(inputs[depth - 1 - i])
            new_weights = (tl.dot(turned, d, weights[depth - 1 - i], input_precision=precision),) + new_weights
            new_biases = (biases[depth - 1 - i] + tl.sum(d, 0),) + new_biases
            if i < depth - 1:
                stored_weight = load_weight_as_stored(parameters, item(TRUNK.layers, depth - 1 - i))
                back = tl.dot(d, stored_weight, input_precision=precision)
        weights, biases = new_weights, new_biases

    to = sums + tl.program_id(0) * (NETWORK.size + _FIGURES)
    for i in tl.static_range(depth + n_heads):
        places, inside = weight_places(item(TRUNK.layers, i))
        tl.store(to + places, weights[i], mask=inside)
        o = tl.arange(0, padded(item(TRUNK.layers, i).n_out))
        tl.store(to + item(TRUNK.layers, i).bias + o, biases[i], mask=o < item(TRUNK.layers, i).n_out)
    if TRUNK.acts:
        if NETWORK.log_std is not None:
            o = tl.arange(0, padded(n_own))
            tl.store(to + NETWORK.log_std + o, log_std_gradient, mask=o < n_own)
        for i in tl.static_range(N_ACTOR_FIGURES):
            tl.store(to + NETWORK.size + ACTOR_FIGURES[i], tl.sum(figures[i], 0))
    if TRUNK.values:
        tl.store(to + NETWORK.size + _VALUE_LOSS, tl.sum(value_losses, 0))


@triton.jit(do_not_specialize=["n"], do_not_specialize_on_alignment=["order", "scale"])
def _differentiate(
    parameters,
    data,
    order,
    scale,
    clip,
    value_clip,
    value,
    entropy,
    kl,
    sums,
    n,
    NETWORK: tl.constexpr,
    COLUMNS: tl.constexpr,
    LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    for t in tl.static_range(len(NETWORK.trunks)):
        if tl.program_id(1) == t:
            _run_trunk(
                parameters,
                data,
                order,
                scale,
                clip,
                value_clip,
                value,
                entropy,
                kl,
                sums,
                n,
                item(NETWORK.trunks, t),
                NETWORK,
                COLUMNS,
                LOSS,
                BLOCK,
            )


@triton.jit(do_not_specialize=["n_programs"])
def _reduce(sums, result, squares, n_programs, SIZE: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = column < SIZE + _FIGURES
    total, count = tl.zeros([BLOCK], tl.float32), tl.zeros([ROWS], tl.float32)
    for first in range(0, n_programs, ROWS):
        program = first + tl.arange(0, ROWS)
        at = sums + program * (SIZE + _FIGURES)
        total += tl.sum(tl.load(at[:, None] + column, mask=(program < n_programs)[:, None] & inside, other=0.0), 0)
        count += tl.load(at + SIZE + _COUNT, mask=program < n_programs, other=0.0)
    n_rows = tl.maximum(tl.sum(count, 0), 1.0)
    x = tl.where(column == SIZE + _COUNT, total, total / n_rows)
    tl.store(result + column, x, mask=inside)
    tl.store(squares + tl.program_id(0), tl.sum(tl.where(column < SIZE, x * x, 0.0), 0))


@triton.jit
def _decide(
    gradient,
    squares,
    learning_rate,
    max_norm,
    left1,
    left2,
    sums,
    kl_limit,
    stop_kl,
    skipped,
    decision,
    n_squares,
    SIZE: tl.constexpr,
    SUMS_EXACT_KL: tl.constexpr,
    KL: tl.constexpr,
    EXACT_KL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, n_squares, BLOCK):
        k = first + tl.arange(0, BLOCK)
        total += tl.load(squares + k, mask=k < n_squares, other=0.0)
    norm = tl.sqrt(tl.sum(total, 0))
    kl, limit = tl.load(gradient + SIZE + KL), tl.load(kl_limit)
    finite, stopped = is_finite(norm), limit == float("-inf")
    within = (kl <= limit) | (limit == float("inf"))  # False for NaN
    take = within & finite
    scale = tl.minimum(tl.load(max_norm) / (norm + 1e-6), 1.0)
    new1, new2 = 0.9 * tl.load(left1), 0.999 * tl.load(left2)
    step_size = (tl.load(learning_rate).to(tl.float64) / (1.0 - new1)).to(tl.float32)
    correction = (1.0 / tl.sqrt(1.0 - new2)).to(tl.float32)
    tl.store(decision, tl.where(take, 1.0, 0.0))
    tl.store(decision + 1, scale)
    tl.store(decision + 2, step_size)
    tl.store(decision + 3, correction)
    tl.store(left1, new1, mask=take)
    tl.store(left2, new2, mask=take)

    k = tl.arange(0, _FIGURES)
    figures = tl.load(gradient + SIZE + k, mask=k < _COUNT, other=0.0)
    figures = tl.where(k == _COUNT, norm, figures)
    tl.store(sums + k, tl.load(sums + k) + tl.where(take, figures, 0.0))
    counts = sums + _FIGURES
    tl.store(counts, tl.load(counts) + tl.where(take, 1.0, 0.0))
    tl.store(counts + 1, tl.load(counts + 1) + tl.where(within, 1.0, 0.0))
    tl.store(counts + 2, tl.load(counts + 2) + kl)
    if SUMS_EXACT_KL:
        exact_kl = tl.load(gradient + SIZE + EXACT_KL)
        counted = (stopped == 0) & (exact_kl == exact_kl)
        tl.store(counts + 3, tl.load(counts + 3) + tl.where(counted, exact_kl, 0.0))
        tl.store(counts + 4, tl.load(counts + 4) + tl.where(counted, 1.0, 0.0))
    in_a_row = tl.load(skipped)
    in_a_row = tl.where(stopped, in_a_row, tl.where(finite, 0.0, in_a_row + 1.0))
    tl.store(skipped, in_a_row)
    tl.store(skipped + 1, tl.maximum(in_a_row, tl.load(skipped + 1)))
    tl.store(stop_kl, tl.where(within | stopped, tl.load(stop_kl), kl))
    tl.store(kl_limit, tl.where(within, limit, float("-inf")))


@triton.jit
def _adam(parameters, mean, square, gradient, decision, eps, SIZE: tl.constexpr, BLOCK: tl.constexpr):
    k = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    take = k < tl.where(tl.load(decision) > 0, SIZE, 0)
    scale, step_size, correction = tl.load(decision + 1), tl.load(decision + 2), tl.load(decision + 3)
    g = scale * tl.load(gradient + k, mask=take, other=0.0)
    m, s = tl.load(mean + k, mask=take, other=0.0), tl.load(square + k, mask=take, other=0.0)
    m += (1 - 0.9) * (g - m)
    s = 0.999 * s + (1 - 0.999) * g * g
    x = tl.load(parameters + k, mask=take, other=0.0)
    tl.store(mean + k, m, mask=take)
    tl.store(square + k, s, mask=take)
    tl.store(parameters + k, x - step_size * m / (tl.sqrt(s) * correction + eps), mask=take)


def new_sums(network: Network, programs: int, device: torch.device) -> Tensor:
    """Return the memory that `programs` programs per trunk write their sums to, on `device`."""
    return torch.zeros(programs, network.size + N_FIGURES, device=device)  # zeros stay where no parameter lies


def differentiate(
    params: Tensor,
    data: Tensor,
    order: Tensor,
    scale: Tensor,
    coefs: Coefficients,
    sums: Tensor,
    *,
    network: Network,
    columns: Columns,
    loss: Loss,
) -> tuple[Tensor, Tensor]:
    """Return the gradient of a minibatch's mean loss with diagnostics, and partial sums of its squared norm.

    Args:
        params: [P].
        data: [R, W] packed rows.
        order: [B] int64, the rows of the minibatch.
        scale: [2] mean and divisor of the advantages.
        coefs: coefficients of the loss.
        sums: from `new_sums`.
        network: the MLP and its distribution.
        columns: where the columns of a row begin.
        loss: the loss.

    Returns:
        [P + 8]: gradient, diagnostics in the order of `PPOLoss.diagnostics`, number of rows that count; and [K].
    """
    assert data.is_contiguous()
    assert order.is_contiguous()
    block, warps = launch(network)
    programs, n = len(sums), len(order)
    _differentiate[(programs, len(network.trunks))](
        params, data, order, scale, *coefs, sums, n, network, columns, loss, block, num_warps=warps
    )
    parts = triton.cdiv(network.size + N_FIGURES, _REDUCE_BLOCK)
    result, squares = params.new_empty(network.size + N_FIGURES), params.new_empty(parts)
    _reduce[(parts,)](
        sums,
        result,
        squares,
        programs,
        network.size,
        _REDUCE_BLOCK,
        _REDUCE_ROWS,
    )
    return result, squares


def take_step(
    state: State,
    gradient: Tensor,
    squares: Tensor,
    learning_rate: Tensor,
    max_norm: Tensor,
    *,
    adam_eps: float,
    sums_exact_kl: bool,
    kl: int,
    exact_kl: int,
) -> None:
    """Take the step that `update_step` takes with Adam, in place.

    Args:
        state: what changes.
        gradient: [P + 8] from `differentiate`.
        squares: [K], too.
        learning_rate: [].
        max_norm: [] largest norm of the gradient.
        adam_eps: epsilon of Adam.
        sums_exact_kl: whether `state.sums` ends with those of exact KLs.
        kl: index of the KL that has a limit, among the figures.
        exact_kl: index of the exact KL.
    """
    size, decision = state.params.numel(), gradient.new_empty(4)
    _decide[(1,)](
        gradient,
        squares,
        learning_rate,
        max_norm,
        state.left1,
        state.left2,
        state.sums,
        state.kl_limit,
        state.stop_kl,
        state.skipped,
        decision,
        len(squares),
        size,
        sums_exact_kl,
        kl,
        exact_kl,
        _REDUCE_BLOCK,
    )
    _adam[(triton.cdiv(size, _STEP_BLOCK),)](
        state.params, state.mean, state.square, gradient, decision, adam_eps, size, _STEP_BLOCK
    )


def launch(network: Network) -> tuple[int, int]:
    """Return rows of a block, and warps of a program: the most that spill no registers."""
    *_, actor = network.trunks
    plain = len(network.trunks) == 2 and len(actor.heads) == 1 and len(network.nvec) <= 1
    small = actor.depth <= 2 and network.distribution != "squashed" and network.precision == "tf32"
    return (32 if plain and small else 16), 8
