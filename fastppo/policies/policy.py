"""The policy: an encoder, a network and a distribution.

A network is any nn.Module with

    forward(x) -> (params [B, P], value [B])

where P is the distribution's `n_params` and x is the output of `Encoder` for stored observations: float32 [B, *shape]
for vectors (normalised if enabled), float32 [B, C, H, W] in [0, 1] for images, one-hot float32 [B, sum(nvec)] for
discrete observations. It must be deterministic (no dropout) and process each row independently (no batch
normalisation).

For observations of several arrays (Dict, Tuple), x is a dict of encoded arrays by name: "camera", "camera/left".

A network with memory has `initial_state(n) -> state`, a tuple of tensors [n, ...], and

    forward(x, state, episode_start) -> (params [L, S, P], value [L, S], state)

where x is [L, S, ...], S sequences of L steps (one when it acts), state belongs to the first step, and episode_start
[L, S] tells where an episode starts: the state that enters such a step must count as the initial one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError, first_line, kind_of
from fastppo.functional.distributions import Distribution
from fastppo.functional.losses import ActionEvaluation
from fastppo.policies.check_memory import check_memory
from fastppo.policies.encoder import Encoded, Encoder
from fastppo.policies.memory import RecurrentNetwork
from fastppo.policies.mlp import MLP

PolicyState = tuple[Tensor, ...]  # each [N, ...], one row per environment; () without memory
FORBIDDEN = -1e8  # logit of an action that the mask forbids: its probability is exactly 0, and no gradient is NaN


class PolicyOutput(NamedTuple):
    """Output of the network for a batch of observations.

    Attributes:
        params: [B, P] of the action distribution, float32.
        values: [B] V, float32.
        state: policy state before the next step.
    """

    params: Tensor
    values: Tensor
    state: PolicyState


class ActionStep(NamedTuple):
    """The policy's decision for one step of N environments.

    Attributes:
        actions: [N, *action] as the distribution samples them.
        logprobs: [N] in nats.
        params: [N, P] of the distribution.
        values: [N] V.
        state: policy state before the next step.
    """

    actions: Tensor
    logprobs: Tensor
    params: Tensor
    values: Tensor
    state: PolicyState


class Policy(nn.Module):
    """Encodes observations, chooses actions, evaluates stored actions and estimates values.

    Attributes:
        bf16: whether the network runs under bfloat16 autocast, in acting and updates alike. Its outputs are
            converted to float32, so log-probabilities and losses are always float32.
    """

    def __init__(self, encoder: Encoder, network: nn.Module, distribution: Distribution) -> None:
        """Combine the parts and check the network on two rows.

        Raises:
            ConfigError: the network is no module, or its outputs are not (params [B, P], value [B]), hold a NaN or
                differ between identical calls.
        """
        if not isinstance(network, nn.Module):
            raise ConfigError(f"policy is {kind_of(network)}; give an instance of torch.nn.Module.")
        super().__init__()
        self.encoder = encoder
        self.network = network
        self.distribution = distribution
        self.bf16 = False
        self._check()

    @property
    def has_memory(self) -> bool:
        """Whether the network carries a state from step to step."""
        return hasattr(self.network, "initial_state")

    def initial_state(self, n_envs: int) -> PolicyState:
        """Return the state [n_envs, ...] at the start of an episode; `()` without memory."""
        if not self.has_memory:
            return ()
        # a learned one takes its gradient where the network resets, not through the rollout
        return tuple(part.detach() for part in self.network.initial_state(n_envs))  # type: ignore[operator]

    def recurrences(self) -> list[tuple[nn.Parameter, list[nn.Parameter]]]:
        """Return `RecurrentNetwork.recurrences()`; empty for other networks, whose parts are not known."""
        return self.network.recurrences() if isinstance(self.network, RecurrentNetwork) else []

    def forward(self, obs: Tensor, state: PolicyState = (), starts: Tensor | None = None) -> PolicyOutput:
        """Evaluate the network on stored observations.

        Args:
            obs: [B, *obs]. With memory, B = L * S: the rows of S sequences of L steps, all first steps first.
            state: [S, ...] each, before the first step.
            starts: [B] bool: an episode starts at this row; only with memory, None: nowhere.
        """
        return self.read(self.encoder.spec.unpack(obs), state, starts)

    def read(self, arrays: tuple[Tensor, ...], state: PolicyState = (), starts: Tensor | None = None) -> PolicyOutput:
        """Evaluate the network on the arrays [B, *leaf.shape] of observations, in storage dtypes; see `forward`."""
        x = self.encoder.encode(arrays)
        with self._precision(arrays[0].device):
            if self.has_memory:
                params, values, state = self._run_sequences(x, state, starts)
            else:
                params, values = self.network(x)
        params = params.float()
        if self.encoder.spec.has_mask:
            params = torch.where(arrays[-1] > 0, params, FORBIDDEN)
        return PolicyOutput(params, values.float(), state)

    def _run_sequences(
        self, x: Encoded, state: PolicyState, starts: Tensor | None
    ) -> tuple[Tensor, Tensor, PolicyState]:
        n = state[0].shape[0]

        def sequences(rows: Tensor) -> Tensor:
            return rows.reshape(-1, n, *rows.shape[1:])

        given = sequences(x) if isinstance(x, Tensor) else {name: sequences(part) for name, part in x.items()}
        if starts is None:
            example = x if isinstance(x, Tensor) else next(iter(x.values()))
            starts = torch.zeros(example.shape[0], dtype=torch.bool, device=example.device)
        params, values, state = self.network(given, state, sequences(starts))
        return params.flatten(0, 1), values.flatten(0, 1), tuple(state)

    def _precision(self, device: torch.device) -> torch.autocast:
        # no cache of cast weights: a capture would keep the first ones
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16, cache_enabled=False)

    @torch.no_grad()
    def act(
        self, obs: Tensor, noise: Tensor | None, state: PolicyState = (), starts: Tensor | None = None
    ) -> ActionStep:
        """Choose an action for each row of obs [N, *obs].

        Args:
            obs: stored observations.
            noise: [N, noise_size] from `draw_noise`, to sample with; None: the most probable actions.
            state: policy state before this step.
            starts: [N] bool: an episode starts at this step; None: nowhere.
        """
        return self.decide(self(obs, state, starts), noise)

    def decide(self, output: PolicyOutput, noise: Tensor | None) -> ActionStep:
        """Choose an action for each row of the network's output; see `act`."""
        dist = self.distribution
        actions = dist.mode(output.params) if noise is None else dist.sample(output.params, noise)
        logprobs = dist.log_prob(output.params, actions)
        return ActionStep(actions, logprobs, output.params, output.values, output.state)

    def draw_noise(self, n: int, generator: torch.Generator) -> Tensor:
        """Draw the noise [n, noise_size] that `act` samples with, on the generator's device."""
        noise = torch.zeros((n, self.distribution.noise_size), device=generator.device)
        self.distribution.fill_noise(noise, generator)
        return noise

    @torch.no_grad()
    def value(self, obs: Tensor, state: PolicyState = (), starts: Tensor | None = None) -> Tensor:
        """Return V of each row of obs, [B]; arguments as for `forward`."""
        if type(self.network) is MLP:  # computes values without the policy's layers
            x = self.encoder(obs)
            with self._precision(x.device):
                return self.network.value(x).float()
        values: Tensor = self(obs, state, starts).values
        return values

    def evaluate_actions(
        self, output: PolicyOutput, actions: Tensor, old_params: Tensor, *, kl_gradient: bool = False
    ) -> ActionEvaluation:
        """Evaluate stored actions [B, *action], sampled with `old_params` [B, P], under the network's output.

        Gradients flow, into `exact_kl` only with `kl_gradient`.
        """
        dist = self.distribution
        exact_kl = dist.kl(old_params, output.params if kl_gradient else output.params.detach())
        log_prob, entropy = dist.log_prob(output.params, actions), dist.entropy(output.params)
        return ActionEvaluation(log_prob, entropy, output.values, exact_kl)

    def uncompilable(self) -> str | None:
        """Return the reason why the network is not one graph of tensor operations without side effects, or None."""
        for name, module in self.network.named_modules():
            if isinstance(module, nn.RNNBase):
                return f"{type(module).__name__} ({name or 'the network'}) is one opaque operation"
        buffers = list(self.network.named_buffers())
        before = [buffer._version for _, buffer in buffers]
        with torch.no_grad():
            device = next(self.network.parameters()).device
            self(self.encoder.spec.blank(2, device=device), self.initial_state(2))
        for (name, buffer), version in zip(buffers, before, strict=True):
            if buffer._version != version:
                return f"forward changes the buffer {name}"
        return None

    @torch.no_grad()
    def _check(self) -> None:
        expected = self.distribution.n_params
        device = next((p.device for p in self.network.parameters()), torch.device("cpu"))
        blank = self.encoder.to(device)(self.encoder.spec.blank(2, device=device))
        # dropout of zeros would go unnoticed
        x = _map(lambda part: torch.linspace(0, 1, part.numel(), device=device).view_as(part), blank)
        name = type(self.network).__name__
        for at, module in self.network.named_modules():
            if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.training:
                raise ConfigError(
                    f"network {name} has {type(module).__name__} ({at or name}), which mixes the rows of a batch; use "
                    "LayerNorm or GroupNorm, or freeze it with eval()."
                )
        try:
            out, again = self._outputs(x), self._outputs(x)
        except ConfigError:
            raise
        except Exception as error:
            shapes: Any = tuple(x.shape) if isinstance(x, Tensor) else {key: tuple(v.shape) for key, v in x.items()}
            raise ConfigError(f"network {name} fails on observations of shape {shapes}: {first_line(error)}") from error
        parts = out if isinstance(out, tuple) else (out,)
        found = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
        if found != [(2, expected), (2,)]:
            raise ConfigError(
                f"network {name} returned {' and '.join(map(str, found))} for 2 observations; "
                f"it must return distribution parameters (2, {expected}) and values (2,)."
            )
        if any(part.isnan().any() for part in out):
            at = next((at for at, weights in self.network.named_parameters() if weights.isnan().any()), None)
            why = "look for a division by 0 or a logarithm in it" if at is None else f"its parameter {at} holds a NaN"
            raise ConfigError(f"network {name} returns NaN for observations from 0 to 1; {why}.")
        if not all(map(torch.equal, out, again)):
            raise ConfigError(
                f"network {name} gives different outputs for equal observations; remove dropout or noise."
            )
        beside_itself = self._outputs(_map(lambda part: torch.cat((part[:1], part[:1])), x))
        if not all(torch.allclose(a[0], b[0], 1e-3, 1e-5) for a, b in zip(out, beside_itself, strict=True)):
            raise ConfigError(
                f"network {name} mixes the rows of a batch: its output for an observation depends on the others; "
                "process each row independently."
            )
        if self.has_memory and not isinstance(self.network, RecurrentNetwork):
            check_memory(self.network, x)

    def _outputs(self, x: Encoded) -> Any:  # noqa: ANN401 - what a user's network returns
        """Return the network's outputs for encoded rows [2, ...]; with memory, for two sequences of one step."""
        if not self.has_memory:
            return self.network(x)
        name, given = type(self.network).__name__, self.network.initial_state(2)  # type: ignore[operator]
        is_tuple = isinstance(given, tuple) and len(given) > 0
        if not is_tuple or not all(isinstance(part, Tensor) and part.shape[:1] == (2,) for part in given):
            raise ConfigError(f"network {name}.initial_state(2) must return a tuple of tensors with 2 rows each.")
        state = self.initial_state(2)
        starts = torch.zeros(1, 2, dtype=torch.bool, device=state[0].device)
        result = self.network(_map(lambda part: part.unsqueeze(0), x), state, starts)
        if not isinstance(result, tuple) or len(result) != 3:
            raise ConfigError(f"network {name} has memory, so it must return (params, values, state).")
        *outputs, after = result
        if [part.shape for part in after] != [part.shape for part in state]:
            raise ConfigError(
                f"network {name} returned a state of shapes {[tuple(part.shape) for part in after]} after one of "
                f"{[tuple(part.shape) for part in state]}; they must be the same."
            )
        # autocast may return half the precision, which is stored as it was given
        for part, following in zip(state, after, strict=True):
            if part.dtype != following.dtype and not (part.is_floating_point() and following.is_floating_point()):
                raise ConfigError(
                    f"network {name} returned a state of {following.dtype} after one of {part.dtype}; they must be the "
                    "same."
                )
        return tuple(part[0] for part in outputs)


def _map(change: Callable[[Tensor], Tensor], x: Encoded) -> Encoded:
    return change(x) if isinstance(x, Tensor) else {name: change(part) for name, part in x.items()}
