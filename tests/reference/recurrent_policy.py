"""A policy with memory by its definition: one environment and one step at a time, in float64.

The memory that enters a step is zero where an episode starts, which follows from the endings of the steps before: of
`terminated` and `truncated`, or of filler rows. Neither fastppo's scans nor its record of episode starts is used.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch
from torch.distributions import Categorical

from fastppo.policies.memory import GRU, LSTM
from tests.reference.recurrence import gru_step, lstm_step, mingru_step


def cell_step(memory, features, state):
    """Return the output [H] and the next state of one memory for features [F]."""
    gates = memory.input.weight @ features + memory.input.bias
    if isinstance(memory, LSTM):
        hidden, cell = lstm_step(gates, memory.recurrent, *state)
        return hidden, (hidden, cell)
    hidden = (
        gru_step(gates, memory.recurrent, memory.bias, *state)
        if isinstance(memory, GRU)
        else mingru_step(gates, *state)
    )
    return hidden, (hidden,)


class Unrolled:
    """A float64 copy of a policy with memory, which takes single steps of single environments.

    Attributes:
        network: the copy of the network.
    """

    def __init__(self, policy):
        self.encoder, self.network = policy.encoder, copy.deepcopy(policy.network).double()

    def new_state(self):
        """Return zeros, [H] each."""
        return tuple(
            torch.zeros(memory.size, dtype=torch.float64)
            for memory in self.network.memories
            for _ in range(memory.n_states)
        )

    def step(self, obs, state):
        """Return parameters [P], value [] and the next state for a stored observation [*obs]."""
        row = obs.unsqueeze(0)
        with torch.no_grad():
            x = self.encoder(row)
        x = x.double() if isinstance(x, torch.Tensor) else {name: part.double() for name, part in x.items()}
        outputs, after, at = [], [], 0
        for features, memory in zip(self.network.body.features(x), self.network.memories, strict=True):
            output, own = cell_step(memory, features[0], state[at : at + memory.n_states])
            at += memory.n_states
            outputs.append(output.unsqueeze(0))
            after += own
        params, value = self.network.body.heads(tuple(outputs))
        allowed = self.encoder.spec.allowed(row)
        if allowed is not None:
            params = torch.where(allowed, params, -1e8)
        return params[0], value[0], tuple(after)


class Expected(NamedTuple):
    """What a rollout should hold; NaN where it may hold anything.

    Attributes:
        states: before each step, before any reset, [T + 1, N, H] each.
        starts: whether an episode starts at this step, [T + 1, N].
        params: [T, N, P].
        values: [T, N].
        next_values: V of each row's successor, [T, N]; NaN in terminated rows and fillers.
    """

    states: tuple[torch.Tensor, ...]
    starts: torch.Tensor
    params: torch.Tensor
    values: torch.Tensor
    next_values: torch.Tensor


class Shadow:
    """Repeats a run's rollouts from their observations and endings, one after another, with a state of its own."""

    def __init__(self, n_envs):
        self.states, self.ended = [None] * n_envs, [True] * n_envs

    @torch.no_grad()
    def follow(self, policy, rollout, final_obs=None):
        """Return what `rollout` should hold; `final_obs` maps a truncated row's observation to the final one."""
        r, network = rollout, Unrolled(policy)
        columns = []
        for n in range(r.rewards.shape[1]):
            state = self.states[n] or network.new_state()
            states, starts, params, values, bootstraps = [state], [self.ended[n]], [], [], []
            for t in range(len(r.rewards)):
                entering = network.new_state() if starts[t] else state
                param, value, state = network.step(r.obs[t, n], entering)
                if r.valid is None:
                    starts.append(bool(r.terminated[t, n] or r.truncated[t, n]))
                    cut = bool(r.truncated[t, n] and not r.terminated[t, n])
                else:
                    starts.append(not r.valid[t, n])
                    cut = False
                bootstraps.append(network.step(final_obs(r.obs[t, n]), state)[1] if cut else None)
                states.append(state)
                params.append(param)
                values.append(value)
            entering = network.new_state() if starts[-1] else state
            following = [*values[1:], network.step(r.obs[-1, n], entering)[1]]
            unused = r.terminated[:, n] if r.valid is None else r.terminated[:, n] | ~r.valid[:, n]
            next_values = torch.stack([a if b is None else b for a, b in zip(following, bootstraps, strict=True)])
            next_values[unused] = torch.nan
            self.states[n], self.ended[n] = state, starts[-1]
            each = [torch.stack(parts) for parts in zip(*states, strict=True)]
            columns.append((*each, torch.tensor(starts), torch.stack(params), torch.stack(values), next_values))
        *states, starts, params, values, next_values = (torch.stack(parts, 1) for parts in zip(*columns, strict=True))
        return Expected(tuple(states), starts, params, values, next_values)


def ppo_gradient(policy, rollout, rows, starts, coefs, *, length, value_clip, normalize):
    """Return the gradient of PPO's loss on one minibatch of a categorical policy, by the parameter's name.

    Args:
        policy: the policy.
        rollout: the storage [T, N], with advantages and returns.
        rows: row t * N + n of each of the minibatch's steps, in any order; whole segments.
        starts: [T + 1, N] bool, an episode starts at this step.
        coefs: named coefficients.
        length: steps of a segment, which begins with the state that the rollout stored.
        value_clip: "max" or "off".
        normalize: whether to normalise the advantages of the minibatch.
    """
    r, network = rollout, Unrolled(policy)
    n_envs, chosen = r.rewards.shape[1], set(rows.tolist())
    assert len(chosen) == len(rows)
    taken, logits, values = [], [], []
    for n in range(n_envs):
        for first in range(0, len(r.rewards), length):
            if first * n_envs + n not in chosen:
                continue
            state = tuple(x[first, n].double() for x in r.states)
            for t in range(first, first + length):
                chosen.remove(t * n_envs + n)
                if starts[t, n]:
                    state = network.new_state()
                params, value, state = network.step(r.obs[t, n], state)
                if r.valid is None or r.valid[t, n]:
                    taken.append((t, n))
                    logits.append(params)
                    values.append(value)
    assert not chosen, "a minibatch holds whole segments"
    t, n = torch.tensor(taken).unbind(1)
    old_logprobs, old_values, advantages, returns = (
        x[t, n].double() for x in (r.logprobs, r.values, r.advantages, r.returns)
    )
    if normalize:
        advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    dist, value, clip = Categorical(logits=torch.stack(logits)), torch.stack(values), float(coefs.clip_coef)
    ratio = torch.exp(dist.log_prob(r.actions[t, n]) - old_logprobs)
    surrogate = torch.min(ratio * advantages, ratio.clamp(1 - clip, 1 + clip) * advantages)
    squares = (value - returns) ** 2
    if value_clip == "max":
        limit = float(coefs.value_clip_coef)
        clipped = (old_values + (value - old_values).clamp(-limit, limit) - returns) ** 2
        squares = torch.max(squares, clipped)
    loss = (
        -surrogate.mean() + float(coefs.vf_coef) * 0.5 * squares.mean() - float(coefs.ent_coef) * dist.entropy().mean()
    )
    names, parameters = zip(*network.network.named_parameters(), strict=True)
    return dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
