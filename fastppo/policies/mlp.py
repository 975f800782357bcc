"""A multi-layer perceptron for vector observations, initialised like CleanRL's."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

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

    For a Gaussian, the log standard deviations are parameters independent of the state, initially 0, appended to the
    means.
    """

    def __init__(self, width: int, n_params: int, gaussian: bool) -> None:
        """Map `width` features to `n_params` outputs; with `gaussian`, half of them are log standard deviations."""
        super().__init__()
        self.linear = orthogonal(nn.Linear(width, n_params // 2 if gaussian else n_params), 0.01)
        self.log_std = nn.Parameter(torch.zeros(n_params // 2)) if gaussian else None

    def forward(self, features: Tensor) -> Tensor:
        """Return parameters [B, n_params] for features [B, width]."""
        out: Tensor = self.linear(features)
        return out if self.log_std is None else torch.cat((out, self.log_std.expand_as(out)), -1)


class MLP(nn.Module):
    """Policy and value networks of fully connected layers, with separate trunks or a shared one."""

    def __init__(
        self,
        n_features: int,
        n_params: int,
        *,
        gaussian: bool,
        hidden_sizes: Sequence[int],
        activation: str,
        shared_trunk: bool,
    ) -> None:
        """Initialise orthogonally, as CleanRL: gain sqrt(2) for hidden layers, 0.01 for the policy head, 1 for values.

        Args:
            n_features: length of a flattened observation.
            n_params: number of parameters of the action distribution.
            gaussian: whether the distribution is Gaussian.
            hidden_sizes: widths of the hidden layers.
            activation: a key of ACTIVATIONS.
            shared_trunk: whether policy and value share the hidden layers.
        """
        super().__init__()

        def trunk() -> nn.Sequential:
            widths = [n_features, *hidden_sizes]
            layers: list[nn.Module] = [nn.Flatten()]
            for a, b in itertools.pairwise(widths):
                layers += [orthogonal(nn.Linear(a, b)), ACTIVATIONS[activation]()]
            return nn.Sequential(*layers)

        self.critic_trunk = trunk()
        self.critic = orthogonal(nn.Linear(hidden_sizes[-1], 1), 1.0)
        self.actor_trunk = None if shared_trunk else trunk()
        self.actor = ActionHead(hidden_sizes[-1], n_params, gaussian)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return distribution parameters [B, n_params] and values [B] for x [B, ...]."""
        features = self.critic_trunk(x)
        return (
            self.actor(features if self.actor_trunk is None else self.actor_trunk(x)),
            self.critic(features).squeeze(-1),
        )

    def value(self, x: Tensor) -> Tensor:
        """Return only the values [B] of `forward`."""
        values: Tensor = self.critic(self.critic_trunk(x)).squeeze(-1)
        return values
