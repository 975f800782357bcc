"""Where the layers of an MLP lie in the vector of parameters, for code that runs it without torch: C and Triton."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any, Literal

import torch
from torch import Tensor, nn

from fastppo.errors import kind_of
from fastppo.functional.bounded_distributions import SquashedGaussian
from fastppo.functional.distributions import Bernoulli, Categorical, Distribution, Gaussian, MultiCategorical
from fastppo.policies.mlp import ACTIVATIONS, MLP
from fastppo.policies.policy import Policy

Kind = Literal["categorical", "bernoulli", "gaussian", "squashed"]
_KINDS: dict[type[Any], Kind] = {
    Categorical: "categorical",
    MultiCategorical: "categorical",
    Bernoulli: "bernoulli",
    Gaussian: "gaussian",
    SquashedGaussian: "squashed",
}


@dataclasses.dataclass(frozen=True)
class Linear:
    """A linear layer: offsets of its weight [n_out, n_in] and its bias [n_out], and their lengths."""

    weight: int
    bias: int
    n_in: int
    n_out: int


@dataclasses.dataclass(frozen=True)
class MLPLayout:
    """An MLP with its distribution.

    Attributes:
        features: of an observation.
        actor_features: how many of them, the first, the actor reads.
        activation: a key of ACTIVATIONS.
        critic: the critic's hidden layers, then its head.
        actor: the actor's; its head alone, if the two share the critic's hidden layers.
        log_std: offset of the log standard deviations that are parameters of their own; None: there are none.
        distribution: of actions.
        nvec: choices of each component of a categorical distribution.
        components: of an action.
        n_params: of the distribution.
    """

    features: int
    actor_features: int
    activation: str
    critic: tuple[Linear, ...]
    actor: tuple[Linear, ...]
    log_std: int | None
    distribution: Kind
    nvec: tuple[int, ...]
    components: int
    n_params: int

    @property
    def shared(self) -> bool:
        """Whether policy and value share the hidden layers."""
        return len(self.actor) == 1


@dataclasses.dataclass(frozen=True)
class Trunk:
    """Hidden layers with the heads that read them.

    Attributes:
        hidden: the hidden layers.
        heads: the actor's, if `acts`: parameters of the distribution; of a Gaussian the means and then, unless they are
            parameters of their own, the log standard deviations. Then the critic's, if `values`.
        features: how many features of an observation the trunk reads, the first.
        acts: whether the actor reads it.
        values: whether the critic reads it.
    """

    hidden: tuple[Linear, ...]
    heads: tuple[Linear, ...]
    features: int
    acts: bool
    values: bool

    @property
    def depth(self) -> int:
        """Number of hidden layers."""
        return len(self.hidden)

    @property
    def layers(self) -> tuple[Linear, ...]:
        """All layers."""
        return self.hidden + self.heads


def trunks(mlp: MLPLayout) -> tuple[Trunk, ...]:
    """Return the trunk that both heads share, or that of the critic and that of the actor."""
    *critic, values = mlp.critic
    *actor, parameters = mlp.actor
    heads: tuple[Linear, ...] = (parameters,)
    if mlp.distribution in ("gaussian", "squashed") and mlp.log_std is None:
        n = parameters.n_out // 2
        means = dataclasses.replace(parameters, n_out=n)
        heads = (means, Linear(parameters.weight + n * parameters.n_in, parameters.bias + n, parameters.n_in, n))
    if mlp.shared:
        return (Trunk(tuple(critic), (*heads, values), mlp.features, acts=True, values=True),)
    return (
        Trunk(tuple(critic), (values,), mlp.features, acts=False, values=True),
        Trunk(tuple(actor), heads, mlp.actor_features, acts=True, values=False),
    )


def not_laid_out(policy: Policy) -> str | None:
    """Return why `layout` can't describe this policy, or None."""
    mlp, distribution = policy.network, policy.distribution
    if policy.has_memory:
        return "the policy has memory"
    if type(mlp) is not MLP:
        return f"the network is {kind_of(mlp)}, not the MLP"
    if policy.bf16:
        return "precision is bf16"
    if type(distribution) not in _KINDS:
        return f"the distribution is {type(distribution).__name__}"
    if is_changed(mlp):
        return "the MLP's layers were changed"
    if not all(p.requires_grad and p.dtype == torch.float32 and p.is_contiguous() for p in mlp.parameters()):
        return "some parameters are frozen"
    return None


def is_changed(mlp: MLP) -> bool:
    """Return whether the layers are not those that `MLP` makes: a user may change them before training."""
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


def layout(policy: Policy, vector: Tensor) -> MLPLayout:
    """Describe a policy for which `not_laid_out` is None; offsets count from the start of `vector` [P]."""
    mlp: Any = policy.network
    distribution = policy.distribution
    start = vector.data_ptr()

    def offset(x: Tensor) -> int:
        return (x.data_ptr() - start) // 4

    def layers(trunk: nn.Module | None, head: nn.Linear) -> tuple[Linear, ...]:
        linears = [x for x in (trunk.children() if trunk is not None else ()) if isinstance(x, nn.Linear)]
        return tuple(Linear(offset(x.weight), offset(x.bias), x.in_features, x.out_features) for x in (*linears, head))

    critic, actor = layers(mlp.critic_trunk, mlp.critic), layers(mlp.actor_trunk, mlp.actor.linear)
    (activation,) = (name for name, kind in ACTIVATIONS.items() if type(mlp.critic_trunk[2]) is kind)
    nvec = _choices(distribution)
    return MLPLayout(
        features=critic[0].n_in,
        actor_features=actor[0].n_in if mlp.actor_trunk is not None else critic[0].n_in,
        activation=activation,
        critic=critic,
        actor=actor,
        log_std=None if mlp.actor.log_std is None else offset(mlp.actor.log_std),
        distribution=_KINDS[type(distribution)],
        nvec=nvec,
        components=max(1, len(nvec) or distribution.action_shape[0]),
        n_params=distribution.n_params,
    )


def _choices(distribution: Distribution) -> tuple[int, ...]:
    if isinstance(distribution, Categorical):
        return (distribution.n,)
    return distribution.nvec if isinstance(distribution, MultiCategorical) else ()
