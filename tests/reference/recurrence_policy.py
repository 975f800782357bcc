"""A policy with memory, and PPO's loss, one environment and one step at a time, in float64."""

import torch
from torch import Tensor


def cell(kind: str, weights: dict[str, Tensor], x: Tensor, state: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
    """Return output and next state of one step for inputs x [F], written as in the papers."""
    gates = weights["input.weight"] @ x + weights["input.bias"]
    if kind == "lstm":
        hidden, memory = state
        i, f, g, o = (gates + weights["recurrent"] @ hidden).chunk(4)
        memory = torch.sigmoid(f) * memory + torch.sigmoid(i) * torch.tanh(g)
        hidden = torch.sigmoid(o) * torch.tanh(memory)
        return hidden, [hidden, memory]
    (hidden,) = state
    if kind == "gru":
        r, z, n = gates.chunk(3)
        from_r, from_z, from_n = (weights["recurrent"] @ hidden).chunk(3)
        r, z = torch.sigmoid(r + from_r), torch.sigmoid(z + from_z)
        n = torch.tanh(n + r * (from_n + weights["bias"]))
        hidden = (1 - z) * n + z * hidden
    else:
        z, candidate = gates.chunk(2)
        z = torch.sigmoid(z)
        hidden = (1 - z) * hidden + z * candidate
    return hidden, [hidden]


class ReferencePolicy:
    """The MLP with memories of `fastppo` with weights `parameters`, by name of the network's parameter."""

    def __init__(self, kind, parameters, *, shared, n_layers=2):
        self.kind, self.shared, self.n_layers = kind, shared, n_layers
        self.parameters = {name: x.detach().double().requires_grad_() for name, x in parameters.items()}
        self.n_states = 2 if kind == "lstm" else 1

    def _part(self, prefix):
        return {n.removeprefix(prefix): x for n, x in self.parameters.items() if n.startswith(prefix)}

    def _trunk(self, name, x):
        for k in range(self.n_layers):  # Flatten is module 0; each layer has an activation after it
            layer = self._part(f"body.{name}.{1 + 2 * k}.")
            x = torch.tanh(layer["weight"] @ x + layer["bias"])
        return x

    def step(self, x, state):
        """Return logits, value and next state for one observation x [D] and state, a list of vectors."""
        trunks = ["critic_trunk"] if self.shared else ["critic_trunk", "actor_trunk"]
        outputs, after = [], []
        for k, name in enumerate(trunks):
            own = state[k * self.n_states : (k + 1) * self.n_states]
            out, new = cell(self.kind, self._part(f"memories.{k}."), self._trunk(name, x), own)
            outputs.append(out)
            after += new
        actor, critic = self._part("body.actor.linear."), self._part("body.critic.")
        logits = actor["weight"] @ outputs[-1] + actor["bias"]
        return logits, (critic["weight"] @ outputs[0] + critic["bias"])[0], after


def loss_of_sequences(policy, rollout, sequences, length, *, clip, vf_coef, ent_coef):
    """Return PPO's mean loss over whole sequences (k, n): steps k * length ... of environment n, without value clip.

    `rollout` holds obs, actions, logprobs, advantages, returns, starts [T, N, ...] and states, lists of [T, N, H].
    The advantages are normalised over all rows of the sequences.
    """
    rows = [(k * length + step, n) for k, n in sequences for step in range(length)]
    raw = torch.stack([rollout["advantages"][t, n] for t, n in rows]).double()
    mean, std = raw.mean(), raw.std() + 1e-8
    total = 0.0
    for k, n in sequences:
        state = [x[k * length, n].double() for x in rollout["states"]]
        for t in range(k * length, (k + 1) * length):
            if rollout["starts"][t, n]:
                state = [torch.zeros_like(x) for x in state]
            logits, value, state = policy.step(rollout["obs"][t, n].double(), state)
            logp = logits - torch.logsumexp(logits, 0)
            advantage = (rollout["advantages"][t, n].double() - mean) / std
            ratio = torch.exp(logp[rollout["actions"][t, n]] - rollout["logprobs"][t, n].double())
            surrogate = torch.min(ratio * advantage, ratio.clamp(1 - clip, 1 + clip) * advantage)
            entropy = -(logp.exp() * logp).sum()
            error = 0.5 * (value - rollout["returns"][t, n].double()) ** 2
            total = total - surrogate + vf_coef * error - ent_coef * entropy
    return total / len(rows)
