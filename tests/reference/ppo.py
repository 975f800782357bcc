"""PPO's minibatch update with autograd and torch.optim, for categorical policies.

It is independent of fastppo's losses, Adam and flat parameters.
"""

import torch


def reference_update(
    module, batches, *, lr, clip, value_clip, vf_coef, ent_coef, max_grad_norm, normalize, eps=1e-5, optimizers=()
):
    """Update `module` in place, with one step of each optimiser per minibatch.

    Args:
        module: maps observations to (logits, values).
        batches: minibatches of (obs, actions, logprobs, values, advantages, returns).
        value_clip: "max", "clipped_only", or any other value for an unclipped value loss.
        normalize: whether to normalise the advantages of each minibatch.
        optimizers: those of torch that step the parameters together; none: Adam, with `lr` and `eps`.
    """
    optimizers = optimizers or [torch.optim.Adam(module.parameters(), lr=lr, eps=eps)]
    for obs, actions, old_logprobs, old_values, advantages, returns in batches:
        if normalize:
            advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
        logits, values = module(obs)
        dist = torch.distributions.Categorical(logits=logits)
        ratio = torch.exp(dist.log_prob(actions) - old_logprobs)
        surrogate = torch.min(ratio * advantages, torch.clamp(ratio, 1 - clip, 1 + clip) * advantages)
        squares = (values - returns) ** 2
        clipped = (old_values + torch.clamp(values - old_values, -clip, clip) - returns) ** 2
        if value_clip == "max":
            squares = torch.max(squares, clipped)
        elif value_clip == "clipped_only":
            squares = clipped
        loss = -surrogate.mean() + vf_coef * 0.5 * squares.mean() - ent_coef * dist.entropy().mean()
        module.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        for optimizer in optimizers:
            optimizer.step()
