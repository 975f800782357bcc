"""All trainable parameters of a module in one flat vector, of which the module's own parameters become views.

One vector makes gradient clipping, Adam and (over several processes) the reduction of gradients one operation each,
while state_dict and the module itself keep working as they were.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fastppo.errors import ConfigError

_ALIGN = 16  # float32 values in 64 bytes: unaligned parameters cost vectorised kernels dearly


class FlatParameters:
    """The vector, and the views into it.

    Attributes:
        vector: [P] float32; the gaps that align each parameter stay 0.
        parameters: the module's trainable parameters, each a view of `vector`.
    """

    def __init__(self, module: nn.Module) -> None:
        """Move the trainable parameters of `module` into one vector, keeping their values.

        Raises:
            ConfigError: nothing to train, or a parameter that isn't float32.
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
        """Look whether the module's parameters are still the views that they were made.

        Raises:
            ConfigError: one is not, so that what is learned would not reach it.
        """
        new = {name: p for name, p in self._module.named_parameters() if p.requires_grad}
        known = zip(self._names, self.parameters, self.views(self.vector), strict=True)
        lost = [name for name, p, view in known if new.pop(name, None) is not p or p.data_ptr() != view.data_ptr()]
        for name in (*lost, *new):
            raise ConfigError(
                f"network parameter {name} was replaced, moved, frozen or added while it trains "
                "(load_state_dict(assign=True), .to(), .double(), requires_grad, a new layer?), and would not learn; "
                "copy values into the parameters as they were instead."
            )

    def views(self, vector: Tensor) -> list[Tensor]:
        """`vector` [P] cut into the parameters' shapes."""
        return [
            vector[offset : offset + p.numel()].view(p.shape)
            for offset, p in zip(self._offsets, self.parameters, strict=True)
        ]

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """Tensors of the parameters' shapes as one vector [P], the gaps 0."""
        parts: list[Tensor] = []
        for x in tensors:
            parts.append(x.reshape(-1))
            if gap := -x.numel() % _ALIGN:
                parts.append(x.new_zeros(gap))
        return torch.cat(parts)
