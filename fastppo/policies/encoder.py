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
            The only leaf, encoded by `encode_leaf`.
        """
        (leaf,), (array,) = self.spec.leaves, self.spec.unpack(obs)
        return encode_leaf(leaf, array, self.normalizer)

    def update_moments(self, obs: Tensor, valid: Tensor | None) -> None:
        """Add rows [B, *spec.shape], except where `valid` [B] is False, to the normaliser's moments."""
        if self.normalizer is not None:
            self.normalizer.update(self.spec.unpack(obs)[0], valid)


def encode_leaf(leaf: ObsLeaf, x: Tensor, normalizer: ObsNormalizer | None = None) -> Tensor:
    """Encode one array [B, *leaf.shape] of an observation.

    Returns:
        vector: float32 [B, *leaf.shape], at least [B, 1], normalised or divided by the leaf's divisor.
        image: float32 divided by the leaf's divisor, so within [-1, 1], [B, C, H, W].
        discrete: one-hot float32 [B, sum(nvec)].
    """
    if leaf.kind == "image":
        x = x.permute(0, *(1 + axis for axis in leaf.image_axes))
        return x.reshape(-1, *leaf.image_size).float() / leaf.divisor
    if leaf.kind == "discrete":
        flat = x.reshape(x.shape[0], -1)  # not len(): torch.export would treat the batch size as a constant
        indices = zip(flat.unbind(1), leaf.nvec, leaf.start, strict=True)
        return torch.cat([F.one_hot(index - start, n) for index, n, start in indices], 1).float()
    x = x.unsqueeze(-1) if x.dim() == 1 else x  # an observation of shape () is a vector of one number
    if normalizer is not None:
        normalized: Tensor = normalizer(x)
        return normalized
    return x if leaf.divisor == 1 else x / leaf.divisor
