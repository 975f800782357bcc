"""Observations as a policy sees them: rows in storage, taken apart into arrays."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from gymnasium import spaces
from torch import Tensor

from fastppo.errors import EnvError
from fastppo.spaces.leaves import ObsKind, ObsLeaf
from fastppo.spaces.packing import PackedSpace, find, places_of


@dataclasses.dataclass(frozen=True)
class ObsSpec:
    """An observation: a tree of arrays that is packed into one row where the environment is stepped.

    Storage, rollouts, checkpoints and minibatches see rows of `shape` and `dtype` and nothing of the tree. Only the
    policy takes rows apart again, by `unpack`. A single array is its own row.

    Attributes:
        leaves: the arrays: the actor's, those of the critic alone, the mask of allowed actions.
    """

    leaves: tuple[ObsLeaf, ...]

    @classmethod
    def single(cls, kind: ObsKind, shape: tuple[int, ...], source_dtype: str) -> ObsSpec:
        """Describe an observation that is one array; arguments as `ObsLeaf`'s attributes."""
        return cls((ObsLeaf(kind, shape, source_dtype),))

    @classmethod
    def from_space(cls, space: spaces.Space[Any]) -> ObsSpec:
        """Describe `space`: one array, or packed rows.

        Raises:
            EnvError: the space is not supported, or the policy would read no numbers.
        """
        spec = cls(space.leaves if isinstance(space, PackedSpace) else (ObsLeaf.from_space(space),))
        if not any(leaf.features for leaf in spec.seen if not leaf.critic_only):
            whole = space.whole if isinstance(space, PackedSpace) else space
            raise EnvError(
                f"observation space {whole} gives the policy no numbers; give it at least one, such as shape (1,)."
            )
        return spec

    @property
    def is_single(self) -> bool:
        """Whether an observation is one array, and no mask comes with it."""
        return len(self.leaves) == 1

    @property
    def leaf(self) -> ObsLeaf:
        """The only leaf of an observation that is one array."""
        (leaf,) = self.leaves
        return leaf

    @property
    def seen(self) -> tuple[ObsLeaf, ...]:
        """The leaves that a network reads, those of the critic alone last."""
        return tuple(leaf for leaf in self.leaves if leaf.kind != "mask")

    @property
    def is_plain(self) -> bool:
        """Whether a stored row is what an MLP reads, up to normalisation or one divisor."""
        same = all(leaf.divisor == self.leaves[0].divisor for leaf in self.leaves)
        return same and all(leaf.kind == "vector" and not leaf.critic_only for leaf in self.leaves)

    @property
    def has_mask(self) -> bool:
        """Whether a mask of allowed actions comes with each observation."""
        return self.leaves[-1].kind == "mask"

    @property
    def features(self) -> int:
        """Length of all leaves that a network reads, flattened."""
        return sum(leaf.features for leaf in self.seen)

    @property
    def critic_features(self) -> int:
        """Length of the leaves of the critic alone, flattened."""
        return sum(leaf.features for leaf in self.seen if leaf.critic_only)

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one stored row."""
        return self.leaf.shape if self.is_single else (places_of(self.leaves)[1],)

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of stored rows."""
        name = self.leaf.stored_as if self.is_single else places_of(self.leaves)[2]
        dtype: torch.dtype = getattr(torch, name)
        return dtype

    @property
    def source_dtype(self) -> str:
        """NumPy name of the dtype in which the environment gives rows."""
        leaf = self.leaves[0]
        if self.is_single and not leaf.path:
            return leaf.source_dtype
        return leaf.stored_as if self.is_single else places_of(self.leaves)[2]

    @property
    def notes(self) -> list[str]:
        """One line on each leaf that can be read in several ways."""
        return [note for leaf in self.seen if (note := leaf.note) is not None]

    @property
    def space(self) -> PackedSpace:
        """The space of packed rows."""
        return PackedSpace(self.leaves)

    def blank(self, *rows: int, device: torch.device | None = None) -> Tensor:
        """Return rows [*rows, *shape] that any policy can read: zeros, or the first value of each index."""
        if self.is_single:
            block = torch.zeros((*rows, *self.shape), dtype=self.dtype, device=device)
            if self.leaf.kind == "discrete":
                block += torch.tensor(self.leaf.start, device=device).reshape(self.shape)
            return block
        row = self.pack([blank_array(leaf) for leaf in self.leaves])
        return row.to(device).expand(*rows, *self.shape).clone()

    def pack(self, arrays: Sequence[Tensor]) -> Tensor:
        """Join the leaves' arrays [..., *leaf.shape] to rows [..., *shape]."""
        if self.is_single:
            return arrays[0]
        places, length, dtype = places_of(self.leaves)
        parts = []
        for leaf, x in zip(self.leaves, arrays, strict=True):
            flat = x.reshape(*x.shape[: x.dim() - len(leaf.shape)], leaf.size)
            if dtype == "uint8" and leaf.stored_as != "uint8":
                flat = flat.float().contiguous().view(torch.uint8)
            parts.append(flat.to(getattr(torch, dtype)))
        order = sorted(range(len(parts)), key=lambda i: places[i].start)
        joined = [parts[i] for i in order]
        if padding := length - sum(part.shape[-1] for part in parts):
            joined.append(parts[0].new_zeros((*parts[0].shape[:-1], padding)))
        return torch.cat(joined, -1)

    def pack_tree(self, obs: Any, mask: Tensor | None = None) -> Tensor:  # noqa: ANN401 - a tree of tensors
        """Join a tree of tensors [N, ...], as the observation space nests them, and the mask [N, A] to rows.

        Raises:
            EnvError: a part is missing.
        """
        arrays = [find(obs, leaf) for leaf in self.seen]
        if self.has_mask:
            leaf = self.leaves[-1]
            if mask is None:
                mask = find(obs, leaf) if leaf.path else torch.ones(len(arrays[0]), leaf.size, device=arrays[0].device)
            arrays.append(mask)
        return self.pack(arrays)

    def unpack(self, rows: Tensor) -> tuple[Tensor, ...]:
        """Split rows [B, *shape] into the leaves' arrays [B, *leaf.shape], in their storage dtypes."""
        if self.is_single:
            return (rows,)
        return tuple(self.part(rows, i) for i in range(len(self.leaves)))

    def part(self, rows: Tensor, i: int) -> Tensor:
        """Return the array [B, *leaf.shape] of leaf `i` from rows [B, *shape], in its storage dtype."""
        if self.is_single:
            return rows
        leaf, (places, _, dtype) = self.leaves[i], places_of(self.leaves)
        x = rows[..., places[i]]
        if dtype == "uint8" and leaf.stored_as != "uint8":
            x = x.contiguous().view(torch.float32)
        # not with len(): torch.export would treat the batch size as a constant
        return x.reshape((*rows.shape[:-1], *leaf.shape)).to(getattr(torch, leaf.stored_as))

    def allowed(self, rows: Tensor) -> Tensor | None:
        """Return the allowed actions [B, A] bool of rows [B, *shape]; None if no mask comes with them."""
        return self.part(rows, len(self.leaves) - 1) > 0 if self.has_mask else None

    def finite(self, rows: Tensor) -> Tensor:
        """Return whether every number of a row is finite, [...] bool for rows [..., *shape]."""
        lead = rows.shape[: rows.dim() - len(self.shape)]
        floats = [i for i, leaf in enumerate(self.leaves) if leaf.stored_as == "float32"]
        arrays = [self.part(rows, i) for i in floats]
        if not arrays:
            return torch.ones(lead, dtype=torch.bool, device=rows.device)
        return torch.cat([x.reshape(*lead, -1).isfinite() for x in arrays], -1).all(-1)

    def read_as(self, other: ObsSpec) -> ObsSpec:
        """Return the same arrays with kind and divisor as in `other`; unchanged if `other` describes other arrays."""
        if len(self.leaves) != len(other.leaves):
            return self
        pairs = zip(self.leaves, other.leaves, strict=True)
        read = tuple(dataclasses.replace(mine, kind=theirs.kind, high=theirs.high) for mine, theirs in pairs)
        return other if read == other.leaves else self

    def to_dict(self) -> dict[str, Any]:
        """Return JSON-able values."""
        leaves = [dataclasses.asdict(leaf) for leaf in self.leaves]
        return leaves[0] if self.is_single else {"leaves": leaves}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> ObsSpec:
        """Invert `to_dict`."""
        return cls(tuple(_leaf(leaf) for leaf in values.get("leaves", [values])))


def _leaf(values: Mapping[str, Any]) -> ObsLeaf:
    plain: dict[str, Any] = {key: tuple(x) if isinstance(x, list) else x for key, x in values.items()}
    return ObsLeaf(**plain)


def blank_array(leaf: ObsLeaf) -> Tensor:
    """Return an array [*leaf.shape] that any policy can read: zeros, first values of indices, all actions allowed."""
    if leaf.kind == "mask":
        return torch.ones(leaf.shape)
    if leaf.kind == "discrete":
        return torch.tensor(leaf.start).reshape(leaf.shape)
    return torch.zeros(leaf.shape, dtype=getattr(torch, leaf.stored_as))
