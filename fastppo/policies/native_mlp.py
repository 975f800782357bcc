"""Describe a policy of fully connected layers to the C code that updates and runs it."""

from __future__ import annotations

import itertools
from typing import Any

import torch
from torch import Tensor, nn

from fastppo.functional.bounded_distributions import SquashedGaussian
from fastppo.functional.distributions import Bernoulli, Categorical, Distribution, Gaussian, MultiCategorical
from fastppo.native import mlp as native
from fastppo.policies.mlp import ACTIVATIONS, MLP
from fastppo.policies.policy import Policy

_KINDS: dict[type[Any], Any] = {
    Categorical: "categorical",
    MultiCategorical: "categorical",
    Bernoulli: "bernoulli",
    Gaussian: "gaussian",
    SquashedGaussian: "squashed",
}
_MOST_PARAMS = 1024  # of a distribution: longer rows of outputs would not stay in a core's cache


def not_covered(policy: Policy) -> str | None:
    """Return why the C code can't run this policy, or None."""
    mlp, distribution = policy.network, policy.distribution
    if type(mlp) is not MLP:
        return f"the network is a {type(mlp).__name__}, not the MLP"
    if policy.bf16:
        return "precision is bf16"
    if type(distribution) not in _KINDS:
        return f"the distribution is {type(distribution).__name__}"
    if distribution.n_params > _MOST_PARAMS:
        return f"the distribution has {distribution.n_params:,} parameters"
    if _is_changed(mlp):
        return "the MLP's layers were changed"
    if len(_linears(mlp.critic_trunk)) > native.MOST_LAYERS:
        return f"there are more than {native.MOST_LAYERS} hidden layers"
    if not all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in mlp.parameters()):
        return "some parameters are frozen"
    if any(p.device.type != "cpu" for p in mlp.parameters()):
        return "the network is not on a CPU"
    return native.unavailable()


def _is_changed(mlp: MLP) -> bool:
    """Whether the layers are not those that `MLP` makes: a user may change them before training."""
    trunks = [list(trunk.children()) for trunk in (mlp.critic_trunk, mlp.actor_trunk) if trunk is not None]
    linears = [[x for x in trunk if type(x) is nn.Linear] for trunk in trunks]
    known = {repr(kind()) for kind in ACTIVATIONS.values()}
    activations = {repr(x) for trunk in trunks for x in trunk[2::2]}  # with their arguments
    plain = all(
        repr(trunk[0]) == repr(nn.Flatten()) and trunk[1::2] == mine and len(trunk) == 1 + 2 * len(mine)
        for trunk, mine in zip(trunks, linears, strict=True)
    )
    widths = [[x.out_features for x in mine] for mine in linears]
    heads = [mlp.critic, mlp.actor.linear]
    biased = all(type(x) is nn.Linear and x.bias is not None for x in itertools.chain(heads, *linears))
    hooked = any(
        x._forward_hooks or x._forward_pre_hooks or x._backward_hooks or hasattr(x, "parametrizations")
        for x in mlp.modules()
    )
    same = widths.count(widths[0]) == len(widths) and len(widths[0]) > 0
    return not (plain and biased and same and len(activations) == 1 and activations <= known) or hooked


def describe(policy: Policy, vector: Tensor) -> native.Network:
    """Describe a covered policy; its parameters are found at their distances from the start of `vector` [P]."""
    mlp: Any = policy.network
    distribution = policy.distribution
    start = vector.data_ptr()

    def layers(*linears: nn.Linear) -> native.Layers:
        return native.Layers(
            [(x.weight.data_ptr() - start) // 4 for x in linears], [(x.bias.data_ptr() - start) // 4 for x in linears]
        )

    hidden, log_std = _linears(mlp.critic_trunk), mlp.actor.log_std
    own = [] if mlp.actor_trunk is None else _linears(mlp.actor_trunk)
    (name,) = (name for name, kind in ACTIVATIONS.items() if type(mlp.critic_trunk[2]) is kind)
    return native.network(
        features=hidden[0].in_features,
        actor_features=own[0].in_features if own else hidden[0].in_features,
        widths=[x.out_features for x in hidden],
        activation=name,
        critic=layers(*hidden, mlp.critic),
        actor=layers(*own, mlp.actor.linear),
        outputs=mlp.actor.linear.out_features,
        log_std=None if log_std is None else (log_std.data_ptr() - start) // 4,
        size=vector.numel(),
        distribution=_KINDS[type(distribution)],
        nvec=_choices(distribution),
        components=max(1, len(_choices(distribution)) or distribution.action_shape[0]),
        params=distribution.n_params,
    )


def _choices(distribution: Distribution) -> tuple[int, ...]:
    if isinstance(distribution, Categorical):
        return (distribution.n,)
    return distribution.nvec if isinstance(distribution, MultiCategorical) else ()


def _linears(trunk: nn.Module) -> list[nn.Linear]:
    return [x for x in trunk.children() if isinstance(x, nn.Linear)]
