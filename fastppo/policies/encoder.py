"""Encode stored observations as input of a network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastppo.policies.normalizers import ObsNormalizer
from fastppo.spaces import ObsLeaf, ObsSpec


class Encoder(nn.Module):
    """Unpacks stored rows and encodes each leaf of the observation."""

    def __init__(self, spec: ObsSpec, normalizer: ObsNormalizer | None = None) -> None:
        """Encode observations of `spec`; vectors pass through `normalizer` if there is one."""
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer

    def forward(self, obs: Tensor) -> Tensor:
        """Encode rows [B, *spec.shape].

        Returns:
            The only leaf, encoded by `encode_leaf` and, if it is a vector, normalised.
        """
        (leaf,), (array,) = self.spec.leaves, self.spec.unpack(obs)
        encoded = encode_leaf(leaf, array)
        if self.normalizer is None or leaf.kind != "vector":
            return encoded
        normalized: Tensor = self.normalizer(encoded)
        return normalized

    def update_moments(self, obs: Tensor, valid: Tensor | None) -> None:
        """Add rows [B, *spec.shape], except where `valid` [B] is False, to the normaliser's moments."""
        if self.normalizer is not None:
            self.normalizer.update(self.spec.unpack(obs)[0], valid)


def encode_leaf(leaf: ObsLeaf, x: Tensor) -> Tensor:
    """Encode one array [B, *leaf.shape] of an observation, without normalisation.

    Returns:
        vector: float32 [B, *leaf.shape], at least [B, 1].
        image: float32 in [0, 1], [B, C, H, W].
        discrete: one-hot float32 [B, sum(nvec)].
    """
    if leaf.kind == "image":
        if leaf.channels_last:
            x = x.movedim(-1, 1)
        return x.reshape(-1, *leaf.image_size).float() / 255
    if leaf.kind == "discrete":
        flat = x.reshape(x.shape[0], -1)  # not len(): torch.export would treat the batch size as a constant
        indices = zip(flat.unbind(1), leaf.nvec, leaf.start, strict=True)
        return torch.cat([F.one_hot(index - start, n) for index, n, start in indices], 1).float()
    return x.unsqueeze(-1) if x.dim() == 1 else x  # an observation of shape () is a vector of one number
