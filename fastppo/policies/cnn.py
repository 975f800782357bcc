"""The convolutional network of Mnih et al. 2015 (Nature) for images, as in CleanRL's ppo_atari.py."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.policies.mlp import MLP, ActionHead, Body, orthogonal
from fastppo.spaces.leaves import MIN_IMAGE_SIDE, ObsLeaf

IMAGE_FEATURES = 512


def nature_trunk(image_size: tuple[int, int, int]) -> nn.Sequential:
    """Return three convolutions and a layer of 512 features for images (C, H, W).

    Raises:
        ConfigError: the image is smaller than 36 x 36.
    """
    channels, height, width = image_size
    if min(height, width) < MIN_IMAGE_SIDE:
        raise ConfigError(
            f"network=cnn needs images of at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE}, got {height}x{width}; "
            "use network=mlp, or enlarge the images with gymnasium.wrappers.ResizeObservation."
        )
    trunk = nn.Sequential(
        orthogonal(nn.Conv2d(channels, 32, 8, stride=4)),
        nn.ReLU(),
        orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
        nn.ReLU(),
        orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
        nn.ReLU(),
        nn.Flatten(),
    )
    with torch.no_grad():
        flat = trunk(torch.zeros(1, channels, height, width)).shape[1]
    return trunk.extend([orthogonal(nn.Linear(flat, IMAGE_FEATURES)), nn.ReLU()])


class NatureCNN(Body):
    """Three convolutions and a layer of 512 features, shared by policy and value."""

    def __init__(
        self, image_size: tuple[int, int, int], n_params: int, *, free_std: bool, head_width: int | None = None
    ) -> None:
        """Build the network.

        Args:
            image_size: (C, H, W).
            n_params: number of parameters of the action distribution.
            free_std: whether log standard deviations are parameters of their own; see `ActionHead`.
            head_width: features that the heads take; None: 512.

        Raises:
            ConfigError: the image is smaller than 36 x 36.
        """
        super().__init__()
        self.width = IMAGE_FEATURES
        self.trunk = nature_trunk(image_size)
        self.actor = ActionHead(head_width or IMAGE_FEATURES, n_params, free_std)
        self.critic = orthogonal(nn.Linear(head_width or IMAGE_FEATURES, 1), 1.0)

    def features(self, x: Tensor) -> tuple[Tensor, ...]:
        """Return the features [B, 512] for x [B, C, H, W] in [0, 1]."""
        return (self.trunk(x),)


class MultiInputNetwork(Body):
    """Convolutions for each image, whose features join those of the other arrays before fully connected layers.

    Source: stable-baselines3's CombinedExtractor, here with the Nature CNN.
    """

    def __init__(
        self,
        leaves: Sequence[ObsLeaf],
        n_params: int,
        *,
        free_std: bool,
        hidden_sizes: Sequence[int],
        activation: str,
        shared_trunk: bool,
        head_width: int | None = None,
    ) -> None:
        """Build the network for observations of `leaves`, those of the critic alone last; others as for `MLP`."""
        super().__init__()
        self._names = [leaf.name for leaf in leaves]
        # by position: a name may hold characters that no module's name can
        self.images = nn.ModuleDict({str(i): nature_trunk(x.image_size) for i, x in enumerate(leaves) if x.fits_cnn})
        widths = [IMAGE_FEATURES if leaf.fits_cnn else leaf.features for leaf in leaves]
        self.tail = MLP(
            sum(widths),
            n_params,
            free_std=free_std,
            hidden_sizes=hidden_sizes,
            activation=activation,
            shared_trunk=shared_trunk,
            n_critic_features=sum(n for leaf, n in zip(leaves, widths, strict=True) if leaf.critic_only),
            head_width=head_width,
        )
        self.width = self.tail.width

    # not attributes: a module that is registered twice is saved twice
    @property
    def critic(self) -> nn.Module:  # type: ignore[override]
        """The head of the values."""
        return self.tail.critic

    @property
    def actor(self) -> ActionHead:  # type: ignore[override]
        """The head of the policy."""
        return self.tail.actor

    def features(self, x: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the features [B, width] for encoded leaves x [B, ...] by name."""
        parts = [
            x[name].flatten(1) if str(i) not in self.images else self.images[str(i)](x[name])
            for i, name in enumerate(self._names)
        ]
        return self.tail.features(torch.cat(parts, 1))
