"""Recurrent layers by their equations: one sequence and one step at a time, in float64.

`parts` are [H] slices; gradients are those of autograd. Sources: the equations in the documentation of torch.nn.LSTM
and torch.nn.GRU; Feng et al. 2024, section 3.1 (arXiv:2410.01201).
"""

import torch


def lstm_step(gates, weight, hidden, cell):
    """Return h_t and c_t [H] of one sequence."""
    i, f, g, o = (gates + weight @ hidden).chunk(4)
    cell = torch.sigmoid(f) * cell + torch.sigmoid(i) * torch.tanh(g)
    return torch.sigmoid(o) * torch.tanh(cell), cell


def gru_step(gates, weight, bias, hidden):
    """Return h_t [H] of one sequence."""
    gate_r, gate_z, gate_n = gates.chunk(3)
    weight_r, weight_z, weight_n = weight.chunk(3)
    r = torch.sigmoid(gate_r + weight_r @ hidden)
    z = torch.sigmoid(gate_z + weight_z @ hidden)
    n = torch.tanh(gate_n + r * (weight_n @ hidden + bias))
    return (1 - z) * n + z * hidden


def mingru_step(gates, hidden):
    """Return h_t [H] of one sequence."""
    update, candidate = gates.chunk(2)
    z = torch.sigmoid(update)
    return (1 - z) * hidden + z * candidate


def run_steps(step, gates, starts, memory):
    """Run `step(gates [..], *memory) -> memory` over all steps of all sequences; memory is zero at episode starts.

    Args:
        step: one step of one sequence; takes and returns a tuple of [H] tensors, h first.
        gates: [L, S, ...].
        starts: [L][S] bools.
        memory: tensors [S, H] before the first step, h first.

    Returns:
        h of all steps [L, S, H], and the last memory as tensors [S, H].
    """
    length, sequences = gates.shape[:2]
    outputs = [[None] * sequences for _ in range(length)]
    last = []
    for s in range(sequences):
        state = tuple(part[s] for part in memory)
        for t in range(length):
            if starts[t][s]:
                state = tuple(torch.zeros_like(part) for part in state)
            state = step(gates[t, s], *state)
            outputs[t][s] = state[0]
        last.append(state)
    stacked = torch.stack([torch.stack(row) for row in outputs])
    return stacked, *(torch.stack(parts) for parts in zip(*last, strict=True))


def lstm_by_definition(gates, weight, starts, hidden, cell):
    """Return h of all steps, the last h and the last c."""
    return run_steps(lambda x, h, c: lstm_step(x, weight, h, c), gates, starts.tolist(), (hidden, cell))


def gru_by_definition(gates, weight, bias, starts, hidden):
    """Return h of all steps and the last h."""
    return run_steps(lambda x, h: (gru_step(x, weight, bias, h),), gates, starts.tolist(), (hidden,))


def mingru_by_definition(gates, starts, hidden):
    """Return h of all steps and the last h."""
    return run_steps(lambda x, h: (mingru_step(x, h),), gates, starts.tolist(), (hidden,))
