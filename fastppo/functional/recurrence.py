"""Recurrent layers over a sequence of steps: LSTM, GRU and minGRU, with resets at episode starts.

All tensors are time-major, [L, S, ...] for L steps of S sequences with H hidden units. The caller projects the inputs
of all steps at once and adds every bias but one (`gru_scan`): that is `gates`. Only what depends on the memory is left
for these functions.

The memory that enters step t is set to zero where `starts[t]` is True: an episode starts at that step. No gradient
passes an episode start.

A single step, as in acting and export, consists of plain tensor operations. Longer LSTM and GRU sequences are custom
operators: each is one node of a traced graph, forwards and backwards, however long the sequence is. A compiler would
unroll the loops otherwise. On a CPU they run in C where the machine has a compiler: a third of the time, and the same
up to rounding.

Under autocast, the projections may be in lower precision; the recurrence is computed in that of its memory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, Concatenate, ParamSpec, TypeVar

import torch
from torch import Tensor

from fastppo.functional.gae import linear_scan
from fastppo.native import recurrence as native

aten = torch.ops.aten
P = ParamSpec("P")
R = TypeVar("R")


def _in_full_precision(scan: Callable[Concatenate[Tensor, P], R]) -> Callable[Concatenate[Tensor, P], R]:
    """Leave autocast inside `scan`: rounding errors of the memory would add up over the steps."""

    @functools.wraps(scan)
    def run(gates: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> R:
        device = gates.device.type
        if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
            return scan(gates, *args, **kwargs)
        with torch.autocast(device, enabled=False):
            return scan(gates.to(torch.promote_types(gates.dtype, torch.float32)), *args, **kwargs)

    return run


@_in_full_precision
def lstm_scan(
    gates: Tensor, weight: Tensor, starts: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Run the recurrence of an LSTM over L steps.

        (i, f, g, o)_t = gates_t + h_{t-1} W^T
        c_t = sigmoid(f_t) c_{t-1} + sigmoid(i_t) tanh(g_t)
        h_t = sigmoid(o_t) tanh(c_t)

    with h_{t-1} and c_{t-1} replaced by 0 where an episode starts at step t.

    Args:
        gates: [L, S, 4H] projections of the inputs with all biases, in the order i, f, g, o of torch.nn.LSTM.
        weight: W, [4H, H], the recurrent weight.
        starts: [L, S] bool, an episode starts at this step.
        hidden: h before the first step, [S, H].
        cell: c before the first step, [S, H].

    Returns:
        h_t of all steps [L, S, H], and h and c after the last step, [S, H] each.

    Source: Hochreiter and Schmidhuber 1997; forget gate: Gers et al. 2000.
    """
    if len(gates) == 1:
        hidden, cell = (x.masked_fill(starts[0].unsqueeze(-1), 0.0) for x in (hidden, cell))
        i, f, g, o = (gates[0] + hidden @ weight.t()).chunk(4, -1)
        cell = f.sigmoid() * cell + i.sigmoid() * g.tanh()
        hidden = o.sigmoid() * cell.tanh()
        return hidden.unsqueeze(0), hidden, cell
    outputs, hidden, cell, *_ = _lstm_forward(gates, weight, starts, hidden, cell)
    return outputs, hidden, cell


@_in_full_precision
def gru_scan(gates: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence of a GRU over L steps.

        (a, b, d)_t = h_{t-1} W^T
        r_t = sigmoid(gates_r + a_t)
        z_t = sigmoid(gates_z + b_t)
        n_t = tanh(gates_n + r_t (d_t + bias))
        h_t = (1 - z_t) n_t + z_t h_{t-1}

    with h_{t-1} replaced by 0 where an episode starts at step t.

    Args:
        gates: [L, S, 3H] projections of the inputs with all other biases, in the order r, z, n of torch.nn.GRU.
        weight: W, [3H, H], the recurrent weight.
        bias: [H], the bias that the reset gate r scales; b_hn in torch.nn.GRU.
        starts: [L, S] bool, an episode starts at this step.
        hidden: h before the first step, [S, H].

    Returns:
        h_t of all steps [L, S, H], and h after the last step [S, H].

    Source: Cho et al. 2014 (arXiv:1406.1078), with the reset gate after the product as in cuDNN.
    """
    if len(gates) == 1:
        hidden = hidden.masked_fill(starts[0].unsqueeze(-1), 0.0)
        gate_r, gate_z, gate_n = gates[0].chunk(3, -1)
        a, b, d = (hidden @ weight.t()).chunk(3, -1)
        z = (gate_z + b).sigmoid()
        n = (gate_n + (gate_r + a).sigmoid() * (d + bias)).tanh()
        hidden = n + z * (hidden - n)
        return hidden.unsqueeze(0), hidden
    outputs, hidden, *_ = _gru_forward(gates, weight, bias, starts, hidden)
    return outputs, hidden


@_in_full_precision
def mingru_scan(gates: Tensor, starts: Tensor, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Run the recurrence of a minGRU over L steps, all steps in ceil(log2 L) rounds.

        h_t = (1 - z_t) h_{t-1} + z_t n_t,   z_t = sigmoid(gates_z)

    with h_{t-1} replaced by 0 where an episode starts at step t.

    Args:
        gates: [L, S, 2H], in the order z, n; the candidate n is used as it is.
        starts: [L, S] bool, an episode starts at this step.
        hidden: h before the first step, [S, H].

    Returns:
        h_t of all steps [L, S, H], and h after the last step [S, H].

    Source: Feng et al. 2024, section 3.1 (arXiv:2410.01201).
    """
    update, candidates = gates.chunk(2, -1)
    z = update.sigmoid()
    inputs, decay = z * candidates, (1 - z).masked_fill(starts.unsqueeze(-1), 0.0)
    hidden = hidden.masked_fill(starts[0].unsqueeze(-1), 0.0)
    first = inputs[:1] + decay[:1] * hidden
    if len(gates) == 1:
        return first, first[0]
    # the scan runs from the last row to the first
    outputs = linear_scan(torch.cat((first, inputs[1:])).flip(0), decay.flip(0)).flip(0)
    return outputs, outputs[-1]


@torch.library.custom_op("fastppo::lstm_forward", mutates_args=())
def _lstm_forward(
    gates: Tensor, weight: Tensor, starts: Tensor, hidden: Tensor, cell: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`lstm_scan`, which also returns what its gradient needs.

    These are the activated gates [L, S, 4H], f being 0 at episode starts, and c_t and tanh(c_t) [L, S, H] of all steps.
    """
    if native.takes(gates, weight, hidden, cell):
        return native.lstm_forward(gates, weight, starts, hidden, cell)
    units = hidden.shape[-1]
    gates, weight = gates.clone(memory_format=torch.contiguous_format), weight.clone()
    outputs, cells, tanh_cells = (gates.new_empty(*gates.shape[:2], units) for _ in range(3))
    i, f, g, o = gates.chunk(4, -1)
    # one sigmoid for all gates: u = sigmoid(-2 g), tanh(g) = 1 - 2 u, i tanh(g) = i - 2 i u
    g.mul_(-2)
    weight[2 * units : 3 * units].mul_(-2)
    transposed, zero = weight.t(), gates.new_zeros(())
    masks, resets = starts.unsqueeze(-1), _steps_with_starts(starts)
    rows = (x.unbind() for x in (gates, i, f, g, o, cells, tanh_cells, outputs))
    for t, (gate, i_t, f_t, u_t, o_t, c_t, tanh_c_t, h_t) in enumerate(zip(*rows, strict=True)):
        if resets[t]:
            hidden, cell = (torch.where(masks[t], zero, x) for x in (hidden, cell))
        gate.addmm_(hidden, transposed).sigmoid_()
        cell = torch.addcmul(i_t, i_t, u_t, value=-2, out=c_t).addcmul_(f_t, cell)
        hidden = torch.mul(o_t, torch.tanh(cell, out=tanh_c_t), out=h_t)
    torch.add(gates.new_ones(()), g, alpha=-2, out=g)
    if any(resets):
        f.mul_(_kept(starts, f))
    return outputs, hidden.clone(), cell.clone(), gates, cells, tanh_cells


@torch.library.custom_op("fastppo::lstm_backward", mutates_args=())
def _lstm_backward(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    hidden: Tensor,
    cell: Tensor,
    outputs: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cells: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to gates, weight, hidden and cell, from those with respect to `lstm_scan`'s results.

    Backwards over the steps, with i, f, g, o activated and f = 0 at episode starts:

        dh_t = grad_outputs_t + d(gates)_{t+1} W,   the product being 0 where an episode starts at t + 1
        dc_t = f_{t+1} dc_{t+1} + dh_t o_t (1 - tanh(c_t)^2)
        d(gates)_t = (dc_t g i (1 - i), dc_t c_{t-1} f (1 - f), dc_t i (1 - g^2), dh_t tanh(c_t) o (1 - o))

    All factors of dc_t and dh_t are computed for all steps at once; the loop multiplies them.
    """
    if native.takes(gates, weight, cell):
        given = grad_outputs, grad_hidden, grad_cell, weight, starts, cell, gates, cells, tanh_cells
        grads, dh, dc = native.lstm_backward(*given)
        return grads, _weight_gradient(grads, _entering(hidden, outputs, starts)), dh, dc
    length, sequences, units = outputs.shape
    cell = cell.masked_fill(starts[0].unsqueeze(-1), 0.0)
    i, f, g, o = gates.chunk(4, -1)
    grads = torch.empty_like(gates)  # first the factors, then the gradients
    factor_i, factor_f, factor_g, factor_o = grads.chunk(4, -1)
    aten.sigmoid_backward.grad_input(g, i, grad_input=factor_i)
    aten.sigmoid_backward.grad_input(cell, f[0], grad_input=factor_f[0])
    aten.sigmoid_backward.grad_input(cells[:-1], f[1:], grad_input=factor_f[1:])
    aten.tanh_backward.grad_input(i, g, grad_input=factor_g)
    aten.sigmoid_backward.grad_input(tanh_cells, o, grad_input=factor_o)
    through_h = aten.tanh_backward(o, tanh_cells)

    with_c = grads[..., : 3 * units].view(length, sequences, 3, units)
    dh, earlier = _gradients_from_outside(grad_outputs, grad_hidden, hidden, length)
    dc = cell.new_zeros(cell.shape) if grad_cell is None else grad_cell.clone(memory_format=torch.contiguous_format)
    each_dc = dc.unsqueeze(1)
    keep, resets = _kept(starts, f), _steps_with_starts(starts)
    rows = (x.unbind()[::-1] for x in (through_h, grads, with_c, factor_o, f))
    steps = range(length - 1, -1, -1)
    for t, outside, through, grad, c_part, o_part, f_t in zip(steps, earlier, *rows, strict=True):
        dc.addcmul_(dh, through)
        c_part.mul_(each_dc)
        o_part.mul_(dh)
        dh = torch.addcmul(outside, keep[t], grad.mm(weight)) if resets[t] else torch.addmm(outside, grad, weight)
        dc.mul_(f_t)
    entering = _entering(hidden, outputs, starts)
    return grads, _weight_gradient(grads, entering), dh, dc


@torch.library.custom_op("fastppo::gru_forward", mutates_args=())
def _gru_forward(
    gates: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`gru_scan`, which also returns what its gradient needs.

    These are r, z and d + bias in one tensor [L, S, 3H], and n [L, S, H].
    """
    if native.takes(gates, weight, bias, hidden):
        return native.gru_forward(gates, weight, bias, starts, hidden)
    units = hidden.shape[-1]
    candidates = gates[..., 2 * units :].clone(memory_format=torch.contiguous_format)
    gates = torch.cat((gates[..., : 2 * units], bias.expand_as(candidates)), -1)
    outputs = torch.empty_like(candidates)
    r, z, d = gates.chunk(3, -1)
    both = gates[..., : 2 * units]
    transposed, zero = weight.t(), gates.new_zeros(())
    masks, resets = starts.unsqueeze(-1), _steps_with_starts(starts)
    rows = (x.unbind() for x in (gates, both, r, z, d, candidates, outputs))
    for t, (gate, both_t, r_t, z_t, d_t, n_t, h_t) in enumerate(zip(*rows, strict=True)):
        if resets[t]:
            hidden = torch.where(masks[t], zero, hidden)
        gate.addmm_(hidden, transposed)
        both_t.sigmoid_()
        n_t.addcmul_(r_t, d_t).tanh_()
        hidden = torch.lerp(n_t, hidden, z_t, out=h_t)
    return outputs, hidden.clone(), gates, candidates


@torch.library.custom_op("fastppo::gru_backward", mutates_args=())
def _gru_backward(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    gates: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients with respect to gates, weight, bias and hidden, from those with respect to `gru_scan`'s results.

    Backwards over the steps, with h = h_{t-1} after the reset and k = (1 - z) (1 - n^2):

        d(a, b, d)_t = dh_t (k (d + bias) r (1 - r), (h - n) z (1 - z), k r)
        dh_{t-1} = grad_outputs_{t-1} + z_t dh_t + d(a, b, d)_t W,   both terms being 0 where an episode starts at t

    All factors of dh_t are computed for all steps at once; the loop multiplies them.
    """
    length, sequences, units = outputs.shape
    entering = _entering(hidden, outputs, starts)
    if native.takes(gates, weight, hidden):
        given = grad_outputs, grad_hidden, weight, starts, hidden, outputs, gates, candidates
        grads, of_candidates, dh = native.gru_backward(*given)
        of_d = grads[..., 2 * units :]
        grad_weight, grad_bias = _weight_gradient(grads, entering), of_d.sum((0, 1))
        of_d.copy_(of_candidates)
        return grads, grad_weight, grad_bias, dh
    r, z, d = gates.chunk(3, -1)
    through_n = aten.tanh_backward(1 - z, candidates)
    grads = torch.empty_like(gates)  # first the factors, then the gradients
    factor_a, factor_b, factor_d = grads.chunk(3, -1)
    aten.sigmoid_backward.grad_input(through_n * d, r, grad_input=factor_a)
    aten.sigmoid_backward.grad_input(entering - candidates, z, grad_input=factor_b)
    torch.mul(through_n, r, out=factor_d)

    dh, earlier = _gradients_from_outside(grad_outputs, grad_hidden, hidden, length)
    each_dh = []  # from the last step to the first
    by_gate = grads.view(length, sequences, 3, units)
    keep, resets = _kept(starts, z), _steps_with_starts(starts)
    rows = (x.unbind()[::-1] for x in (grads, by_gate, z))
    for t, outside, grad, parts, z_t in zip(range(length - 1, -1, -1), earlier, *rows, strict=True):
        each_dh.append(dh)
        parts.mul_(dh.unsqueeze(1))
        if resets[t]:
            dh = torch.addcmul(outside, keep[t], grad.mm(weight).addcmul_(z_t, dh))
        else:
            dh = torch.addcmul(outside, z_t, dh).addmm_(grad, weight)
    grad_weight, grad_bias = _weight_gradient(grads, entering), factor_d.sum((0, 1))
    torch.mul(through_n, torch.stack(each_dh[::-1]), out=factor_d)
    return grads, grad_weight, grad_bias, dh


def _steps_with_starts(starts: Tensor) -> list[bool]:
    """Whether some episode starts, for each step; True at all steps where that would have to be read from a device."""
    some: list[bool] = starts.any(1).tolist() if starts.device.type == "cpu" else [True] * len(starts)
    return some


def _kept(starts: Tensor, like: Tensor) -> Tensor:
    """1 where a memory is kept and 0 where an episode starts, [L, S, 1]."""
    return starts.logical_not().to(like.dtype).unsqueeze(-1)


def _entering(hidden: Tensor, outputs: Tensor, starts: Tensor) -> Tensor:
    """The h that enters each step, after the reset, [L, S, H]."""
    # filled, since a product would keep a NaN
    return torch.cat((hidden.unsqueeze(0), outputs[:-1])).masked_fill_(starts.unsqueeze(-1), 0.0)


def _weight_gradient(grads: Tensor, entering: Tensor) -> Tensor:
    """The sum over all steps and sequences of grads [.., K] times entering [.., H]: [K, H], in one product."""
    return grads.flatten(0, 1).t().mm(entering.flatten(0, 1))


def _gradients_from_outside(
    grad_outputs: Tensor | None, grad_hidden: Tensor | None, hidden: Tensor, length: int
) -> tuple[Tensor, list[Tensor]]:
    """The gradients that do not come through the recurrence.

    Returns:
        that of the last h, and those of the h that enters each step, from the last step to the first.
    """
    zero = hidden.new_zeros(hidden.shape)
    rows = [zero] * length if grad_outputs is None else list(grad_outputs.unbind())
    last = rows[-1] if grad_hidden is None else rows[-1] + grad_hidden
    return last, [zero, *rows[:-1]][::-1]


@_lstm_forward.register_fake
def _(gates: Tensor, weight: Tensor, starts: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, ...]:
    wide = gates.new_empty(gates.shape)
    outputs, cells, tanh_cells = (gates.new_empty(*gates.shape[:2], hidden.shape[-1]) for _ in range(3))
    return outputs, hidden.new_empty(hidden.shape), cell.new_empty(cell.shape), wide, cells, tanh_cells


@_lstm_backward.register_fake
def _(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    grad_cell: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    hidden: Tensor,
    cell: Tensor,
    outputs: Tensor,
    gates: Tensor,
    cells: Tensor,
    tanh_cells: Tensor,
) -> tuple[Tensor, ...]:
    return tuple(x.new_empty(x.shape) for x in (gates, weight, hidden, cell))


@_gru_forward.register_fake
def _(gates: Tensor, weight: Tensor, bias: Tensor, starts: Tensor, hidden: Tensor) -> tuple[Tensor, ...]:
    outputs, candidates = (gates.new_empty(*gates.shape[:2], hidden.shape[-1]) for _ in range(2))
    return outputs, hidden.new_empty(hidden.shape), gates.new_empty(gates.shape), candidates


@_gru_backward.register_fake
def _(
    grad_outputs: Tensor | None,
    grad_hidden: Tensor | None,
    weight: Tensor,
    starts: Tensor,
    hidden: Tensor,
    outputs: Tensor,
    gates: Tensor,
    candidates: Tensor,
) -> tuple[Tensor, ...]:
    grads = (x.new_empty(x.shape) for x in (gates, weight, weight[0], hidden))
    return tuple(grads)


def _save_lstm(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    _, weight, starts, hidden, cell = inputs
    outputs, _, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(weight, starts, hidden, cell, outputs, *saved)


def _differentiate_lstm(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    gates, weight, hidden, cell = _lstm_backward(*grads[:3], *ctx.saved_tensors)
    return gates, weight, None, hidden, cell


def _save_gru(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:  # noqa: ANN401
    _, weight, _, starts, hidden = inputs
    outputs, _, *saved = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.save_for_backward(weight, starts, hidden, outputs, *saved)


def _differentiate_gru(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:  # noqa: ANN401
    gates, weight, bias, hidden = _gru_backward(*grads[:2], *ctx.saved_tensors)
    return gates, weight, bias, None, hidden


_lstm_forward.register_autograd(_differentiate_lstm, setup_context=_save_lstm)
_gru_forward.register_autograd(_differentiate_gru, setup_context=_save_gru)
