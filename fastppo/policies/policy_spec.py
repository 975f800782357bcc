"""Policies described by plain data, so that a saved one can be built without its environment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from torch import nn

from fastppo.errors import CheckpointError, ConfigError
from fastppo.functional.distributions import Distribution, Gaussian
from fastppo.policies.cnn import MultiInputNetwork, NatureCNN
from fastppo.policies.encoder import Encoder, normalized_leaves
from fastppo.policies.memory import MEMORIES, RecurrentNetwork
from fastppo.policies.mlp import MLP, Body
from fastppo.policies.normalizers import ObsNormalizer
from fastppo.policies.policy import Policy
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.leaves import MIN_IMAGE_SIDE, ObsLeaf
from fastppo.spaces.observations import ObsSpec

_ALWAYS_BUILT = 4_000_000  # weights; a network of this size is built in an instant, so its size is not checked


def default_network(obs: ObsSpec) -> Literal["mlp", "cnn"]:
    """Return "cnn" for images of at least 36 x 36, else "mlp"."""
    return "cnn" if any(leaf.fits_cnn for leaf in obs.seen) else "mlp"


def _plain(kind: str, shape: tuple[int, ...], nvec: tuple[int, ...]) -> str:
    return " ".join([kind, *(str(x) for x in (shape, nvec) if x)])


def _reading(obs: ObsSpec) -> str:
    return " + ".join(_reading_of_leaf(leaf) for leaf in obs.leaves)


def _reading_of_leaf(leaf: ObsLeaf) -> str:
    name = f"{leaf.name}: " if leaf.path else ""
    scale = "" if leaf.high is None else f" divided by {leaf.high:g}"
    reader = " for the critic" if leaf.critic_only else ""
    return f"{name}{_plain(leaf.kind, leaf.shape, leaf.nvec)}{scale}{reader}"


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Everything that determines a policy except its weights.

    Attributes:
        obs: its observations.
        action: its actions.
        network: "mlp", "cnn", or "custom" for the user's own module.
        hidden_sizes: widths of the MLP's hidden layers.
        activation: of the MLP, a key of ACTIVATIONS.
        shared_trunk: whether the MLP's policy and value share the hidden layers.
        normalize_obs: whether observations are normalised by running moments.
        obs_clip: clip range of normalised observations.
        memory: recurrent layer between trunk and heads; "none" too for a custom network, whose memory is its own.
        memory_size: its units.
        state_dependent_std: whether the network computes the log standard deviations of a Gaussian; else they are
            parameters of their own.
    """

    obs: ObsSpec
    action: ActionSpec
    network: Literal["mlp", "cnn", "custom"]
    hidden_sizes: tuple[int, ...]
    activation: str
    shared_trunk: bool
    normalize_obs: bool
    obs_clip: float
    memory: Literal["none", "lstm", "gru", "mingru"] = "none"
    memory_size: int = 64
    state_dependent_std: bool = False

    def build(self, custom: nn.Module | None = None) -> Policy:
        """Build the policy with initial weights drawn from torch's global random state.

        Args:
            custom: the user's module, for network "custom".

        Raises:
            ConfigError: the parts don't fit together, or the custom network is missing.
        """
        distribution = self.action.distribution
        network: nn.Module
        if self.network == "custom":
            if custom is None:
                raise ConfigError(
                    "this policy's network is your own module: pass it as policy=... from Python, to fastppo.evaluate, "
                    "load_policy or resume, or to fastppo.evaluation.export.export."
                )
            network = custom
        else:
            body, shared = self._body(distribution)
            network = body if self.memory == "none" else self._with_memory(body, shared)
        return Policy(Encoder(self.obs, self._normalizer(), joined=self.network == "mlp"), network, distribution)

    def _normalizer(self) -> ObsNormalizer | None:
        if not self.normalize_obs:
            return None
        if self.obs.is_single and self.obs.leaf.kind == "vector":
            return ObsNormalizer(self.obs.shape, self.obs_clip)
        if n := sum(leaf.size for leaf in normalized_leaves(self.obs)):
            return ObsNormalizer((n,), self.obs_clip)
        raise ConfigError(f"normalize_obs needs vector observations, not {_reading(self.obs)}: switch it off.")

    def _body(self, distribution: Distribution) -> tuple[Body, bool]:
        """Return trunks and heads, and whether policy and value share the trunk."""
        seen, free_std = self.obs.seen, isinstance(distribution, Gaussian) and not self.state_dependent_std
        head_width = None if self.memory == "none" else self.memory_size
        if self.network == "cnn" and not any(leaf.kind == "image" for leaf in seen):
            raise ConfigError(
                f"network=cnn needs images, but observations are {_reading(self.obs)}; use "
                f"network=mlp, or give images of at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} a Box of uint8, or of "
                "floats from 0 to 1, -1 to 1 or 0 to 255."
            )
        if self.network == "cnn" and len(seen) == 1:
            return NatureCNN(seen[0].image_size, distribution.n_params, free_std=free_std, head_width=head_width), True
        layers: dict[str, Any] = {
            "free_std": free_std,
            "hidden_sizes": self.hidden_sizes,
            "activation": self.activation,
            "shared_trunk": self.shared_trunk,
            "head_width": head_width,
        }
        if self.network == "cnn":
            return MultiInputNetwork(seen, distribution.n_params, **layers), self.shared_trunk
        mlp = MLP(self.obs.features, distribution.n_params, n_critic_features=self.obs.critic_features, **layers)
        return mlp, self.shared_trunk

    def _with_memory(self, body: Body, shared: bool) -> RecurrentNetwork:
        assert self.memory != "none", "it has a memory"
        return RecurrentNetwork(body, self.memory, self.memory_size, shared=shared)

    def least_weights(self) -> int:
        """Estimate the minimum number of weights of such a network without building it.

        Each layer counts 1,000 weights more, for the time it takes to build even if narrow. Of a custom network only
        the inputs are known.
        """
        outputs, inputs = self.action.distribution.n_params, max(self.obs.features, math.prod(self.obs.shape))
        hidden = {"mlp": self.hidden_sizes, "cnn": (1, 512), "custom": ()}[self.network]
        if self.network == "custom":
            return inputs + 1000
        layers = sum(a * b + 1000 for a, b in itertools.pairwise((inputs, *hidden, outputs)))
        if self.memory == "none":
            return layers
        return layers + MEMORIES[self.memory].count_weights(min(hidden[-1], self.hidden_sizes[-1]), self.memory_size)

    def check_size(self, held: int) -> None:
        """Check that a file with `held` bytes of weights can hold this policy, before building anything of its size.

        Raises:
            CheckpointError: too few bytes, or impossible layers.
        """
        if any(size < 1 for size in self.hidden_sizes):
            raise CheckpointError(f"hidden_sizes is {self.hidden_sizes}; widths must be at least 1.")
        if self.memory != "none" and self.memory_size < 1:
            raise CheckpointError(f"memory_size is {self.memory_size}; it must be at least 1.")
        if self.least_weights() > max(held, _ALWAYS_BUILT):
            remembers = "" if self.memory == "none" else f", a memory of {self.memory_size:,} units"
            raise CheckpointError(
                f"observations {self.obs.shape}, {len(self.hidden_sizes)} hidden layers{remembers} and "
                f"{self.action.distribution.n_params:,} outputs need more than the {held:,} bytes of weights here."
            )

    def differences(self, saved: PolicySpec) -> list[str]:
        """Describe each difference that makes weights saved under `saved` unusable here."""
        pairs = {
            "observations": (_reading(saved.obs), _reading(self.obs)),
            "actions": (
                _plain(saved.action.kind, saved.action.shape, saved.action.nvec),
                _plain(self.action.kind, self.action.shape, self.action.nvec),
            ),
            "rescale_actions": (saved.action.rescale, self.action.rescale),
            "action_distribution": (saved.action.box_distribution, self.action.box_distribution),
            "state_dependent_std": (saved.state_dependent_std, self.state_dependent_std),
            "network": (saved.network, self.network),
            "normalize_obs": (saved.normalize_obs, self.normalize_obs),
            "memory": (saved.memory, self.memory),
        }
        if saved.memory == self.memory != "none":
            pairs["memory_size"] = (saved.memory_size, self.memory_size)
        if saved.network == self.network == "mlp":
            for name in ("hidden_sizes", "activation", "shared_trunk"):
                pairs[name] = (getattr(saved, name), getattr(self, name))
        return [f"{name} {theirs} there, {ours} here" for name, (theirs, ours) in pairs.items() if theirs != ours]

    def to_dict(self) -> dict[str, Any]:
        """As JSON-able values."""
        return dataclasses.asdict(self) | {"obs": self.obs.to_dict(), "action": self.action.to_dict()}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PolicySpec:
        """Build a spec from the result of `to_dict`."""
        plain = dict(values, hidden_sizes=tuple(values["hidden_sizes"]))
        return cls(
            **plain | {"obs": ObsSpec.from_dict(values["obs"]), "action": ActionSpec.from_dict(values["action"])}
        )
