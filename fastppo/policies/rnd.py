"""The networks of random network distillation (RND), and the moments that scale their input and their reward.

They stand beside the policy and share no parameters with it. So every policy can have them, whatever its network and
its memory, and a saved policy is the same with and without them.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fastppo.policies.cnn import IMAGE_FEATURES, nature_trunk
from fastppo.policies.encoder import Encoder
from fastppo.policies.mlp import orthogonal
from fastppo.policies.normalizers import ObsNormalizer, RewardNormalizer
from fastppo.policies.policy_spec import PolicySpec
from fastppo.spaces.leaves import ObsLeaf

OBS_CLIP = 5.0  # of normalised observations


class RNDOutput(NamedTuple):
    """The outputs of predictor, random network and intrinsic critic.

    Attributes:
        values: [B] discounted sum of the intrinsic rewards to come, estimated at observations.
        predictions: [S, K] of the predictor, for the observations that followed.
        targets: [S, K] of the random network, for the same.
    """

    values: Tensor
    predictions: Tensor
    targets: Tensor


class Trunk(nn.Module):
    """Features [B, width] of flattened observations [B, F]: convolutions for images, then fully connected layers.

    A single image has no fully connected layers but the 512 features of its convolutions.
    """

    def __init__(self, leaves: Sequence[ObsLeaf], hidden_sizes: Sequence[int], *, convolve: bool) -> None:
        """Read the flattened `leaves`, side by side, into layers of `hidden_sizes`.

        Args:
            leaves: the arrays of an observation.
            hidden_sizes: widths of the fully connected layers.
            convolve: read images of at least 36 x 36 by convolutions.
        """
        super().__init__()
        self._sizes = [leaf.features for leaf in leaves]
        self._shapes = {str(i): leaf.image_size for i, leaf in enumerate(leaves) if convolve and leaf.fits_cnn}
        self.images = nn.ModuleDict({name: nature_trunk(shape) for name, shape in self._shapes.items()})
        n = sum(IMAGE_FEATURES if str(i) in self._shapes else size for i, size in enumerate(self._sizes))
        sizes = [n] if len(self._shapes) == len(leaves) == 1 else [n, *hidden_sizes]
        self.width = sizes[-1]
        layers = [(orthogonal(nn.Linear(a, b)), nn.ReLU()) for a, b in itertools.pairwise(sizes)]
        self.layers = nn.Sequential(*itertools.chain.from_iterable(layers))

    def forward(self, x: Tensor) -> Tensor:
        """Return the features [B, width] of x [B, F]."""
        parts = [
            self.images[str(i)](part.view(-1, *self._shapes[str(i)])) if str(i) in self._shapes else part
            for i, part in enumerate(torch.split(x, self._sizes, 1))
        ]
        features: Tensor = self.layers(torch.cat(parts, 1))
        return features


class RandomNetworkDistillation(nn.Module):
    """A fixed random network, a predictor that imitates it, and a critic of the intrinsic rewards.

    All three have trunks of their own, built like the policy's but with ReLU, and read the same input: observations
    normalised by running moments of their own and clipped to +-5. Images are normalised pixel by pixel, and one-hot
    vectors number by number. The predictor has two layers more than the random network, as in the paper.

    Attributes:
        observations: normalises the input.
        rewards: divides the novelty by the standard deviation of its discounted sum; never clips.
        target: the random network; no gradient reaches it.
        predictor: imitates `target`.
        critic: estimates the intrinsic return.

    Source: Burda et al. 2018 (arXiv:1810.12894). There the critic is a head on the policy's trunk, and the random
    network sees the last frame of a stack; here it sees all of the observation.
    """

    def __init__(self, spec: PolicySpec, n_envs: int) -> None:
        """Build the networks for the observations of `spec`, with initial weights from torch's global random state.

        Args:
            spec: of the policy that explores.
            n_envs: N, environments whose discounted sums of novelty are followed.
        """
        super().__init__()
        self._encoder = Encoder(spec.obs, joined=True)
        self.observations = ObsNormalizer((spec.obs.features,), OBS_CLIP)
        self.rewards = RewardNormalizer(n_envs, math.inf)

        def trunk() -> Trunk:
            return Trunk(spec.obs.seen, spec.hidden_sizes, convolve=spec.network != "mlp")

        def layer(trunk: Trunk) -> nn.Module:
            return orthogonal(nn.Linear(trunk.width, trunk.width))

        known, learned, valued = trunk(), trunk(), trunk()
        self.target = nn.Sequential(known, layer(known)).requires_grad_(False)
        more = (layer(learned), nn.ReLU(), layer(learned), nn.ReLU(), layer(learned))
        self.predictor = nn.Sequential(learned, *more)
        self.critic = nn.Sequential(valued, orthogonal(nn.Linear(valued.width, 1), 0.01))

    @property
    def n_features(self) -> int:
        """F, the length of a flattened observation."""
        return self.observations.mean.numel()

    def update_moments(self, obs: Tensor) -> None:
        """Add rows [B, *obs], as stored, to the moments of observations; rows that are not finite don't count."""
        self.observations.update(self._flatten(obs), self._encoder.spec.finite(obs))

    def forward(self, obs: Tensor, following: Tensor) -> RNDOutput:
        """Evaluate the critic on observations, and predictor and random network on those that followed some of them.

        Args:
            obs: [B, *obs] as stored.
            following: [S, *obs] as stored.
        """
        x, after = self.observations(self._flatten(obs)), self.observations(self._flatten(following))
        return RNDOutput(self.critic(x).squeeze(-1), self.predictor(after), self.target(after))

    def _flatten(self, obs: Tensor) -> Tensor:
        encoded = self._encoder(obs)
        assert isinstance(encoded, Tensor), "joined"
        return encoded.flatten(1)
