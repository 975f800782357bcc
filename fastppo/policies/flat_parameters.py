"""All trainable parameters of a module in one flat vector; the module's parameters become views of it.

With one vector, gradient clipping, Adam and the reduction of gradients over processes are one operation each. The
module and its state_dict work as before.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError
from fastppo.functional.muon import Place

_ALIGN = 16  # float32 values in 64 bytes; vectorised kernels are much slower on unaligned parameters


class FlatParameters:
    """A flat vector of parameters and the module's views of it.

    Attributes:
        vector: [P] float32; the padding between parameters stays 0.
        parameters: the module's trainable parameters, each a view of `vector`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Move the trainable parameters of `module` into one vector without changing their values.

        Raises:
            ConfigError: no trainable parameters, or one that isn't float32.
        """
        self._module = module
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._names, self.parameters = list(trained), list(trained.values())
        if not self.parameters:
            raise ConfigError(f"network {type(module).__name__} has no trainable parameters.")
        for name, p in trained.items():
            if p.dtype != torch.float32:
                raise ConfigError(f"network parameter {name} is {p.dtype}; parameters must be float32.")
        self._offsets, end = [], 0
        for p in self.parameters:
            self._offsets.append(end)
            end += -(-p.numel() // _ALIGN) * _ALIGN
        self.vector = torch.zeros(end, device=self.parameters[0].device)
        for p, view in zip(self.parameters, self.views(self.vector), strict=True):
            view.copy_(p.detach())
            p.data = view

    @property
    def size(self) -> int:
        """P, alignment gaps included."""
        return self.vector.numel()

    def check(self) -> None:
        """Check that the module's trainable parameters are still the views of `vector`.

        Raises:
            ConfigError: one is not, so updates would not reach it.
        """
        new = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        start, size = self.vector.data_ptr(), self.vector.element_size()
        known = zip(self._names, self.parameters, self._offsets, strict=True)
        lost = [
            name
            for name, p, at in known
            if new.pop(name, None) is not p
            or (p.numel() and p.data_ptr() != start + at * size)  # an empty one has none
        ]
        for name in (*lost, *new):
            raise ConfigError(
                f"network parameter {name} was replaced, moved, frozen or added during training "
                "(load_state_dict(assign=True), .to(), .double(), requires_grad, a new layer?), so updates would not "
                "reach it; copy new values into the existing parameters instead."
            )

    def views(self, vector: Tensor) -> list[Tensor]:
        """Return views of `vector` [P] in the parameters' shapes."""
        return [
            vector[offset : offset + p.numel()].view(p.shape)
            for offset, p in zip(self._offsets, self.parameters, strict=True)
        ]

    def places(self, matrices: Sequence[Tensor]) -> list[Place]:
        """Return where those trainable parameters that are among `matrices` lie, in ascending order."""
        chosen = {id(p) for p in matrices}
        pairs = zip(self._offsets, self.parameters, strict=True)
        return [Place(offset, *p.shape) for offset, p in pairs if id(p) in chosen]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return tensors of the parameters' shapes as one vector [P], with zeros as padding."""
        parts: list[Tensor] = []
        for x in tensors:
            parts.append(x.reshape(-1))
            if gap := -x.numel() % _ALIGN:
                parts.append(x.new_zeros(gap))
        return torch.cat(parts)
