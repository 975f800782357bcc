"""A multi-layer perceptron for vector observations, initialised like CleanRL's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS: dict[str, type[nn.Module]] = {
    "tanh": nn.Tanh,
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "gelu": nn.GELU,
    "silu": nn.SiLU,
}


def orthogonal(layer: nn.Linear | nn.Conv2d, gain: float = math.sqrt(2)) -> nn.Module:
    """Initialise `layer` with orthogonal weights of the given gain and zero bias, and return it."""
    nn.init.orthogonal_(layer.weight, gain)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ActionHead(nn.Module):
    """Map features to distribution parameters, initially close to 0 (gain 0.01): choices start nearly uniform.

    With `free_std`, the log standard deviations of a Gaussian are parameters independent of the state, initially 0,
    appended to the means.
    """

    def __init__(self, width: int, n_params: int, free_std: bool) -> None:
        """Map `width` features to `n_params` outputs; with `free_std`, half of them are log standard deviations."""
        super().__init__()
        self.linear = orthogonal(nn.Linear(width, n_params // 2 if free_std else n_params), 0.01)
        self.log_std = nn.Parameter(torch.zeros(n_params // 2)) if free_std else None

    def forward(self, features: Tensor) -> Tensor:
        """Return parameters [B, n_params] for features [B, width]."""
        out: Tensor = self.linear(features)
        return out if self.log_std is None else torch.cat((out, self.log_std.expand_as(out)), -1)


class Body(nn.Module):
    """A network in two halves: trunks that make features, and heads on them. A memory fits between the halves.

    Attributes:
        width: number of features.
    """

    width: int
    critic: nn.Module
    actor: ActionHead

    def features(self, x: Any) -> tuple[Tensor, ...]:  # noqa: ANN401 - what the encoder gives
        """Return the features [B, width] for the critic and for the actor; one tensor if they share a trunk."""
        raise NotImplementedError

    def heads(self, features: tuple[Tensor, ...]) -> tuple[Tensor, Tensor]:
        """Return distribution parameters [B, n_params] and values [B] for features of the critic and the actor."""
        return self.actor(features[-1]), self.critic(features[0]).squeeze(-1)

    def forward(self, x: Any) -> tuple[Tensor, Tensor]:  # noqa: ANN401 - what the encoder gives
        """Return distribution parameters [B, n_params] and values [B] for encoded observations."""
        return self.heads(self.features(x))


def hidden_matrices(network: nn.Module) -> list[Tensor]:
    """Return the weights of the fully connected hidden layers of fastppo's own networks: what Muon may optimise.

    Left out are, as Muon's authors advise, the first layer of each trunk, which reads the input, and the heads; also
    convolutions, which are no matrices, and memories, whose weights stack the matrices of several gates.

    Source: Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks".
    """
    found: list[Tensor] = []
    for trunk in network.modules():
        if isinstance(trunk, nn.Sequential):
            layers = [layer for layer in trunk if any(True for _ in layer.parameters())]
            found += [layer.weight for layer in layers[1:] if isinstance(layer, nn.Linear)]
    return found


class MLP(Body):
    """Policy and value networks of fully connected layers, with separate trunks or a shared one."""

    def __init__(
        self,
        n_features: int,
        n_params: int,
        *,
        free_std: bool,
        hidden_sizes: Sequence[int],
        activation: str,
        shared_trunk: bool,
        n_critic_features: int = 0,
        head_width: int | None = None,
    ) -> None:
        """Initialise orthogonally, as CleanRL: gain sqrt(2) for hidden layers, 0.01 for the policy head, 1 for values.

        Args:
            n_features: length of a flattened observation.
            n_params: number of parameters of the action distribution.
            free_std: whether log standard deviations are parameters of their own; see `ActionHead`.
            hidden_sizes: widths of the hidden layers.
            activation: a key of ACTIVATIONS.
            shared_trunk: whether policy and value share the hidden layers.
            n_critic_features: how many of the features, the last ones, only the value reads.
            head_width: features that the heads take; None: the last width of `hidden_sizes`.
        """
        super().__init__()
        self.n_actor_features = n_features - n_critic_features
        self.width = hidden_sizes[-1]
        head_width = head_width or self.width

        def trunk(n: int) -> nn.Sequential:
            layers: list[nn.Module] = [nn.Flatten()]
            for a, b in itertools.pairwise([n, *hidden_sizes]):
                layers += [orthogonal(nn.Linear(a, b)), ACTIVATIONS[activation]()]
            return nn.Sequential(*layers)

        self.critic_trunk = trunk(n_features)
        self.critic = orthogonal(nn.Linear(head_width, 1), 1.0)
        self.actor_trunk = None if shared_trunk else trunk(self.n_actor_features)
        self.actor = ActionHead(head_width, n_params, free_std)
        self._splits = n_critic_features > 0

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the features [B, width] for x [B, ...]."""
        if self.actor_trunk is None:
            return (self.critic_trunk(x),)
        mine = x.flatten(1)[:, : self.n_actor_features] if self._splits else x
        return self.critic_trunk(x), self.actor_trunk(mine)

    def value(self, x: Tensor) -> Tensor:
        """Return only the values [B] of `forward`."""
        values: Tensor = self.critic(self.critic_trunk(x)).squeeze(-1)
        return values
