"""A policy from plain data, so that one saved in a run folder can be built again without its environment."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any, Literal

from torch import nn

from fastppo.errors import CheckpointError, ConfigError
from fastppo.functional.distributions import Gaussian
from fastppo.policies.cnn import MIN_SIZE, NatureCNN
from fastppo.policies.encoder import Encoder
from fastppo.policies.mlp import MLP
from fastppo.policies.normalizers import ObsNormalizer
from fastppo.policies.policy import Policy
from fastppo.spaces import ActionSpec, ObsSpec

_QUICKLY_BUILT = 4_000_000  # weights


def default_network(obs: ObsSpec) -> Literal["mlp", "cnn"]:
    """The Nature CNN for images that are large enough for it, an MLP for the rest."""
    leaf = obs.leaf
    return "cnn" if leaf.kind == "image" and min(leaf.image_size[1:]) >= MIN_SIZE else "mlp"


def _plain(kind: str, shape: tuple[int, ...], nvec: tuple[int, ...]) -> str:
    return " ".join([kind, *(str(x) for x in (shape, nvec) if x)])


@dataclasses.dataclass(frozen=True)
class PolicySpec:
    """Everything that determines a policy but its weights.

    Attributes:
        obs: observations it reads.
        action: actions it makes.
        network: "mlp" or "cnn"; or "custom", for a module of the user's own.
        hidden_sizes: of the MLP.
        activation: of the MLP.
        shared_trunk: of the MLP.
        normalize_obs: whether observations pass through running moments.
        obs_clip: clip range after that.
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
        """The policy, with fresh weights from torch's global random state.

        Raises:
            ConfigError: the parts don't fit, or a custom network is needed and not given.
        """
        normalizer, leaf = None, self.obs.leaf
        if self.normalize_obs:
            if leaf.kind != "vector":
                raise ConfigError(f"normalize_obs is for vector observations; these are {leaf.kind}: switch it off.")
            normalizer = ObsNormalizer(self.obs.shape, self.obs_clip)
        distribution = self.action.distribution
        gaussian = isinstance(distribution, Gaussian)
        network: nn.Module
        if self.network == "custom":
            if custom is None:
                raise ConfigError("this policy's network is a module of your own: pass it as policy=...")
            network = custom
        elif self.network == "cnn":
            if leaf.kind != "image":
                raise ConfigError("network=cnn is for uint8 images; for this environment use network=mlp.")
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
        """About how many weights a network of this kind has at least, told without building it.

        A layer counts 1,000 more, as it takes so long to build however narrow it is. Of a custom network only its
        inputs are known.
        """
        outputs, inputs = self.action.distribution.n_params, max(self.obs.leaf.features, math.prod(self.obs.shape))
        hidden = {"mlp": self.hidden_sizes, "cnn": (1, 512), "custom": ()}[self.network]
        sizes = (inputs, *hidden, outputs) if self.network != "custom" else (inputs, 1)
        return sum(a * b + 1000 for a, b in itertools.pairwise(sizes))

    def check_size(self, held: int) -> None:
        """Look whether `held` bytes of weights can be this policy's, before anything of its size is built.

        Raises:
            CheckpointError: they are too few, or no network has such layers.
        """
        if any(size < 1 for size in self.hidden_sizes):
            raise CheckpointError(f"it says hidden_sizes {self.hidden_sizes}; layers are at least 1 wide.")
        if self.least_weights() > max(held, _QUICKLY_BUILT):
            raise CheckpointError(
                f"it says observations {self.obs.shape}, {len(self.hidden_sizes)} hidden layers and "
                f"{self.action.distribution.n_params:,} outputs, which {held:,} bytes of weights can't be."
            )

    def differences(self, saved: PolicySpec) -> list[str]:
        """In words, what keeps weights saved under `saved` from meaning the same here."""
        pairs = {
            "observations": (
                _plain(saved.obs.leaf.kind, saved.obs.shape, saved.obs.leaf.nvec),
                _plain(self.obs.leaf.kind, self.obs.shape, self.obs.leaf.nvec),
            ),
            "actions": (
                _plain(saved.action.kind, saved.action.shape, saved.action.nvec),
                _plain(self.action.kind, self.action.shape, self.action.nvec),
            ),
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
        """The inverse of `to_dict`."""
        plain = dict(values, hidden_sizes=tuple(values["hidden_sizes"]))
        return cls(
            **plain | {"obs": ObsSpec.from_dict(values["obs"]), "action": ActionSpec.from_dict(values["action"])}
        )
