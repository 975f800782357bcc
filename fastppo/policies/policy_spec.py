"""Policies described by plain data, so that a saved one can be built without its environment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from torch import nn

from fastppo.errors import CheckpointError, ConfigError
from fastppo.functional.distributions import Gaussian
from fastppo.policies.cnn import NatureCNN
from fastppo.policies.encoder import Encoder
from fastppo.policies.mlp import MLP
from fastppo.policies.normalizers import ObsNormalizer
from fastppo.policies.policy import Policy
from fastppo.spaces import MIN_IMAGE_SIDE, ActionSpec, ObsLeaf, ObsSpec

_ALWAYS_BUILT = 4_000_000  # weights; a network of this size is built in an instant, so its size is not checked


def default_network(obs: ObsSpec) -> Literal["mlp", "cnn"]:
    """Return "cnn" for images of at least 36 x 36, else "mlp"."""
    leaf = obs.leaf
    return "cnn" if leaf.kind == "image" and min(leaf.image_size[1:]) >= MIN_IMAGE_SIDE else "mlp"


def _plain(kind: str, shape: tuple[int, ...], nvec: tuple[int, ...]) -> str:
    return " ".join([kind, *(str(x) for x in (shape, nvec) if x)])


def _reading(leaf: ObsLeaf) -> str:
    scale = "" if leaf.high is None else f" divided by {leaf.high:g}"
    return f"{_plain(leaf.kind, leaf.shape, leaf.nvec)}{scale}"


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
    """

    obs: ObsSpec
    action: ActionSpec
    network: Literal["mlp", "cnn", "custom"]
    hidden_sizes: tuple[int, ...]
    activation: str
    shared_trunk: bool
    normalize_obs: bool
    obs_clip: float

    def build(self, custom: nn.Module | None = None) -> Policy:
        """Build the policy with initial weights drawn from torch's global random state.

        Args:
            custom: the user's module, for network "custom".

        Raises:
            ConfigError: the parts don't fit together, or the custom network is missing.
        """
        normalizer, leaf = None, self.obs.leaf
        if self.normalize_obs:
            if leaf.kind != "vector":
                raise ConfigError(f"normalize_obs needs vector observations, not {leaf.kind}: switch it off.")
            normalizer = ObsNormalizer(self.obs.shape, self.obs_clip)
        distribution = self.action.distribution
        gaussian = isinstance(distribution, Gaussian)
        network: nn.Module
        if self.network == "custom":
            if custom is None:
                raise ConfigError(
                    "this policy's network is your own module: pass it as policy=... from Python, to fastppo.evaluate, "
                    "load_policy or resume, or to fastppo.evaluation.export.export."
                )
            network = custom
        elif self.network == "cnn":
            if leaf.kind != "image":
                raise ConfigError(
                    f"network=cnn needs images, but observations are {_plain(leaf.kind, leaf.shape, leaf.nvec)}; use "
                    f"network=mlp, or give images of at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE} a Box of uint8, or of "
                    "floats from 0 to 1, -1 to 1 or 0 to 255."
                )
            network = NatureCNN(leaf.image_size, distribution.n_params, gaussian=gaussian)
        else:
            network = MLP(
                leaf.features,
                distribution.n_params,
                gaussian=gaussian,
                hidden_sizes=self.hidden_sizes,
                activation=self.activation,
                shared_trunk=self.shared_trunk,
            )
        return Policy(Encoder(self.obs, normalizer), network, distribution)

    def least_weights(self) -> int:
        """Estimate the minimum number of weights of such a network without building it.

        Each layer counts 1,000 weights more, for the time it takes to build even if narrow. Of a custom network only
        the inputs are known.
        """
        outputs, inputs = self.action.distribution.n_params, max(self.obs.leaf.features, math.prod(self.obs.shape))
        hidden = {"mlp": self.hidden_sizes, "cnn": (1, 512), "custom": ()}[self.network]
        sizes = (inputs, *hidden, outputs) if self.network != "custom" else (inputs, 1)
        return sum(a * b + 1000 for a, b in itertools.pairwise(sizes))

    def check_size(self, held: int) -> None:
        """Check that a file with `held` bytes of weights can hold this policy, before building anything of its size.

        Raises:
            CheckpointError: too few bytes, or impossible layers.
        """
        if any(size < 1 for size in self.hidden_sizes):
            raise CheckpointError(f"hidden_sizes is {self.hidden_sizes}; widths must be at least 1.")
        if self.least_weights() > max(held, _ALWAYS_BUILT):
            raise CheckpointError(
                f"observations {self.obs.shape}, {len(self.hidden_sizes)} hidden layers and "
                f"{self.action.distribution.n_params:,} outputs need more than the {held:,} bytes of weights here."
            )

    def differences(self, saved: PolicySpec) -> list[str]:
        """Describe each difference that makes weights saved under `saved` unusable here."""
        pairs = {
            "observations": (_reading(saved.obs.leaf), _reading(self.obs.leaf)),
            "actions": (
                _plain(saved.action.kind, saved.action.shape, saved.action.nvec),
                _plain(self.action.kind, self.action.shape, self.action.nvec),
            ),
            "rescale_actions": (saved.action.rescale, self.action.rescale),
            "network": (saved.network, self.network),
            "normalize_obs": (saved.normalize_obs, self.normalize_obs),
        }
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
