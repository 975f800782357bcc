"""Encode stored observations as input of a network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fastppo.policies.normalizers import ObsNormalizer
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import ObsSpec

Encoded = Tensor | dict[str, Tensor]


def normalized_leaves(spec: ObsSpec) -> tuple[ObsLeaf, ...]:
    """Return the leaves that running moments normalise: vectors, never images, one-hots or masks."""
    return tuple(leaf for leaf in spec.seen if leaf.kind == "vector")


class Encoder(nn.Module):
    """Unpacks stored rows and encodes each leaf of the observation."""

    def __init__(self, spec: ObsSpec, normalizer: ObsNormalizer | None = None, *, joined: bool = False) -> None:
        """Encode observations of `spec`.

        Args:
            spec: the observations.
            normalizer: normalises vectors; of several, their joined features. None: vectors stay as they are.
            joined: join several leaves to one vector, those of the critic alone last; otherwise give them by name.
        """
        super().__init__()
        self.spec = spec
        self.normalizer = normalizer
        self.joined = joined

    def forward(self, obs: Tensor) -> Encoded:
        """Encode rows [B, *spec.shape].

        Returns:
            The leaf, encoded by `encode_leaf`, if the observation is one array; else float32 [B, spec.features], or a
            dict of the encoded leaves by name.
        """
        return self.encode(self.spec.unpack(obs))

    def encode(self, arrays: tuple[Tensor, ...]) -> Encoded:
        """Encode the leaves' arrays [B, *leaf.shape], in their storage dtypes; returns what `forward` does."""
        if self.spec.is_single:
            return encode_leaf(self.spec.leaf, arrays[0], self.normalizer)
        pieces = iter(tuple[Tensor, ...]())
        if self.normalizer is not None:
            sizes = [leaf.size for leaf in normalized_leaves(self.spec)]
            pieces = iter(self.normalizer(self._vectors(arrays)).split(sizes, 1))
        encoded: dict[str, Tensor] = {}
        for leaf, x in zip(self.spec.leaves, arrays, strict=True):
            if leaf.kind == "vector" and self.normalizer is not None:
                encoded[leaf.name] = next(pieces).reshape(x.shape if x.dim() > 1 else (-1, 1))
            elif leaf.kind != "mask":
                encoded[leaf.name] = encode_leaf(leaf, x)
        if len(encoded) == 1:  # one array, and a mask
            return next(iter(encoded.values()))
        return torch.cat([x.flatten(1) for x in encoded.values()], 1) if self.joined else encoded

    def _vectors(self, arrays: tuple[Tensor, ...]) -> Tensor:
        """Return the vectors among the leaves' arrays, joined to [B, D]."""
        pairs = zip(self.spec.leaves, arrays, strict=True)
        return torch.cat([x.reshape(x.shape[0], leaf.size) for leaf, x in pairs if leaf.kind == "vector"], 1)

    def update_moments(self, obs: Tensor, valid: Tensor | None) -> None:
        """Add rows [B, *spec.shape], except where `valid` [B] is False, to the normaliser's moments."""
        if self.normalizer is not None:
            arrays = self.spec.unpack(obs)
            self.normalizer.update(arrays[0] if self.spec.is_single else self._vectors(arrays), valid)


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
        # not F.one_hot, which reads its input on the host, so that no graph can hold it
        return torch.cat(
            [index.unsqueeze(1) == torch.arange(start, start + n, device=x.device) for index, n, start in indices], 1
        ).float()
    x = x.unsqueeze(-1) if x.dim() == 1 else x  # an observation of shape () is a vector of one number
    if normalizer is not None:
        normalized: Tensor = normalizer(x)
        return normalized
    return x if leaf.divisor == 1 else x / leaf.divisor
