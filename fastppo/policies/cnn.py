"""The convolutional network of Mnih et al. 2015 (Nature) for images, as in CleanRL's ppo_atari.py."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.policies.mlp import ActionHead, orthogonal
from fastppo.spaces import MIN_IMAGE_SIDE


class NatureCNN(nn.Module):
    """Three convolutions and a layer of 512 features, shared by policy and value."""

    def __init__(self, image_size: tuple[int, int, int], n_params: int, *, gaussian: bool) -> None:
        """Build the network.

        Args:
            image_size: (C, H, W).
            n_params: number of parameters of the action distribution.
            gaussian: whether the distribution is Gaussian.

        Raises:
            ConfigError: the image is smaller than 36 x 36.
        """
        super().__init__()
        channels, height, width = image_size
        if min(height, width) < MIN_IMAGE_SIDE:
            raise ConfigError(
                f"network=cnn needs images of at least {MIN_IMAGE_SIDE}x{MIN_IMAGE_SIDE}, got {height}x{width}; "
                "use network=mlp, or enlarge the images with gymnasium.wrappers.ResizeObservation."
            )
        self.trunk = nn.Sequential(
            orthogonal(nn.Conv2d(channels, 32, 8, stride=4)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(32, 64, 4, stride=2)),
            nn.ReLU(),
            orthogonal(nn.Conv2d(64, 64, 3, stride=1)),
            nn.ReLU(),
            nn.Flatten(),
        )
        with torch.no_grad():
            flat = self.trunk(torch.zeros(1, channels, height, width)).shape[1]
        self.trunk.extend([orthogonal(nn.Linear(flat, 512)), nn.ReLU()])
        self.actor = ActionHead(512, n_params, gaussian)
        self.critic = orthogonal(nn.Linear(512, 1), 1.0)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return distribution parameters [B, n_params] and values [B] for x [B, C, H, W] in [0, 1]."""
        features = self.trunk(x)
        return self.actor(features), self.critic(features).squeeze(-1)
