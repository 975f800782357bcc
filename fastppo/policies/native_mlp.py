"""Describe a policy of fully connected layers to the C code that updates and runs it."""

from __future__ import annotations

from torch import Tensor

from fastppo.native import mlp as native
from fastppo.policies.mlp_layout import Linear, layout, not_laid_out
from fastppo.policies.policy import Policy

_MOST_PARAMS = 1024  # of a distribution: longer rows of outputs would not stay in a core's cache


def not_covered(policy: Policy) -> str | None:
    """Return why the C code can't run this policy, or None."""
    if reason := not_laid_out(policy):
        return reason
    if (n := policy.distribution.n_params) > _MOST_PARAMS:
        return f"the distribution has {n:,} parameters"
    if len(policy.network.critic_trunk) // 2 > native.MOST_LAYERS:  # type: ignore[arg-type]
        return f"there are more than {native.MOST_LAYERS} hidden layers"
    if any(p.device.type != "cpu" for p in policy.network.parameters()):
        return "the network is not on a CPU"
    return native.unavailable()


def describe(policy: Policy, vector: Tensor) -> native.Network:
    """Describe a covered policy; its parameters are found at their distances from the start of `vector` [P]."""
    mlp = layout(policy, vector)
    *hidden, _ = mlp.critic
    return native.network(
        features=mlp.features,
        actor_features=mlp.actor_features,
        widths=[x.n_out for x in hidden],
        activation=mlp.activation,
        critic=_layers(mlp.critic),
        actor=_layers(mlp.actor),
        outputs=mlp.actor[-1].n_out,
        log_std=mlp.log_std,
        size=vector.numel(),
        distribution=mlp.distribution,
        nvec=mlp.nvec,
        components=mlp.components,
        params=mlp.n_params,
    )


def _layers(linears: tuple[Linear, ...]) -> native.Layers:
    return native.Layers([x.weight for x in linears], [x.bias for x in linears])
