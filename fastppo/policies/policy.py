"""The policy: observations encoded, one network, one distribution.

A network is any nn.Module with

    forward(x) -> (params [B, P], value [B])

where P is the distribution's `n_params` and x is what `Encoder` makes of raw observations: float32 [B, *shape] for
vectors (normalised if that is on), float32 in [0, 1], [B, C, H, W], for images, one-hot float32 [B, sum(nvec)] for
discrete observations. It must be deterministic (no dropout) and treat its rows apart (no batch normalisation).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.functional.distributions import Distribution
from fastppo.policies.mlp import MLP
from fastppo.policies.normalizers import ObsNormalizer
from fastppo.spaces import ObsSpec


class Action(NamedTuple):
    """One step of N environments, as the policy decided it."""

    actions: Tensor  # [N, *action]
    logprobs: Tensor  # [N] nats
    params: Tensor  # [N, P] of the distribution
    values: Tensor  # [N]


class ActionEvaluation(NamedTuple):
    """What the current policy says of stored actions."""

    logprobs: Tensor  # [B] nats
    entropy: Tensor  # [B] nats
    values: Tensor  # [B]
    exact_kl: Tensor  # [B] nats, KL(old || new)


class Encoder(nn.Module):
    """Raw observations, as stored, to what a network reads."""

    def __init__(self, spec: ObsSpec, normalizer: ObsNormalizer | None = None) -> None:
        """For observations of `spec`, vectors being passed through `normalizer` where there is one."""
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer

    def forward(self, obs: Tensor) -> Tensor:
        """Encode obs [B, *spec.shape]."""
        if self.spec.kind == "image":
            if self.spec.channels_last:
                obs = obs.movedim(-1, 1)
            return obs.reshape(-1, *self.spec.image_size).float() / 255
        if self.spec.kind == "discrete":
            flat = obs.reshape(obs.shape[0], -1)  # not len(): torch.export would take the batch for a constant
            indices = zip(flat.unbind(1), self.spec.nvec, self.spec.start, strict=True)
            return torch.cat([F.one_hot(index - start, n) for index, n, start in indices], 1).float()
        if obs.dim() == 1:  # observations without dimensions of their own
            obs = obs.unsqueeze(-1)
        if self.normalizer is None:
            return obs
        normalized: Tensor = self.normalizer(obs)
        return normalized


class Policy(nn.Module):
    """Encoder, network and distribution: acts, judges stored actions, estimates values.

    Attributes:
        bf16: whether the network runs under bfloat16 autocast, acting and learning alike. Its outputs become float32
            before anything is computed from them: log-probabilities and losses are float32 always.
    """

    def __init__(self, encoder: Encoder, network: nn.Module, distribution: Distribution) -> None:
        """Join the parts and try the network on two rows.

        Raises:
            ConfigError: the network's outputs are not (params [B, P], value [B]), or differ between equal calls.
        """
        super().__init__()
        self.encoder = encoder
        self.network = network
        self.distribution = distribution
        self.bf16 = False
        self._check()

    def forward(self, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Distribution parameters [B, P] and values [B] for raw obs [B, *obs]."""
        x = self.encoder(obs)
        with self._precision(x.device):
            params, values = self.network(x)
        return params.float(), values.float()

    def _precision(self, device: torch.device) -> torch.autocast:
        # no cache of cast weights: a recording would keep the first ones
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    @torch.no_grad()
    def act(self, obs: Tensor, noise: Tensor) -> Action:
        """UpdateSample an action for each row of obs with pre-drawn noise [N, noise_size]."""
        params, values = self(obs)
        actions = self.distribution.sample(params, noise)
        return Action(actions, self.distribution.log_prob(params, actions), params, values)

    @torch.no_grad()
    def mode(self, obs: Tensor) -> Tensor:
        """The most probable action for each row of obs."""
        return self.distribution.mode(self(obs)[0])

    @torch.no_grad()
    def value(self, obs: Tensor) -> Tensor:
        """V of each row of obs, [B]."""
        if type(self.network) is MLP:  # which need not ask its policy
            x = self.encoder(obs)
            with self._precision(x.device):
                return self.network.value(x).float()
        values: Tensor = self(obs)[1]
        return values

    def evaluate(self, obs: Tensor, actions: Tensor, old_params: Tensor) -> ActionEvaluation:
        """Judge stored actions [B, *action] made with `old_params` [B, P]; gradients flow except into exact_kl."""
        params, values = self(obs)
        return self.evaluate_actions(params, values, actions, old_params)

    def evaluate_actions(self, params: Tensor, values: Tensor, actions: Tensor, old_params: Tensor) -> ActionEvaluation:
        """As `evaluate`, from what `forward` gave."""
        dist = self.distribution
        exact_kl = dist.kl(old_params, params.detach())
        return ActionEvaluation(dist.log_prob(params, actions), dist.entropy(params), values, exact_kl)

    def uncompilable(self) -> str | None:
        """What in the network can't be one graph of tensor operations without side effects; None if nothing is seen."""
        for name, module in self.network.named_modules():
            if isinstance(module, nn.RNNBase):
                return f"{type(module).__name__} ({name or 'the network'}) is one opaque operation"
        buffers = list(self.network.named_buffers())
        before = [buffer._version for _, buffer in buffers]
        with torch.no_grad():
            self(self.encoder.spec.blank(2, device=next(self.network.parameters()).device))
        for (name, buffer), version in zip(buffers, before, strict=True):
            if buffer._version != version:
                return f"forward changes the buffer {name}"
        return None

    @torch.no_grad()
    def _check(self) -> None:
        expected = self.distribution.n_params
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        x = self.encoder.to(device)(self.encoder.spec.blank(2, device=device))
        x = torch.linspace(0, 1, x.numel(), device=device).view_as(x)  # dropout of zeros would be none
        name = type(self.network).__name__
        try:
            out, again = self.network(x), self.network(x)
        except Exception as error:
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            shape = tuple(x.shape)
            raise ConfigError(f"network {name} fails on observations of shape {shape}: {reason}") from error
        parts = out if isinstance(out, tuple) else (out,)
        shapes = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if shapes != [(2, expected), (2,)]:
            raise ConfigError(
                f"network {name} returned {' and '.join(map(str, shapes))} for 2 observations; "
                f"it must return distribution parameters (2, {expected}) and values (2,)."
            )
        if not all(map(torch.equal, out, again)):
            raise ConfigError(f"network {name} answers the same observations differently; remove dropout or noise.")
