"""A tensor function in another form: same signature, same results within rounding, another cost."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any, Literal, TypeVar, cast

import torch

Mode = Literal["eager", "compile"]
_F = TypeVar("_F", bound=Callable[..., Any])


def accelerate(fn: _F, mode: Mode) -> _F:
    """`fn` as it is ("eager") or under torch.compile ("compile").

    "compile" asks of fn: tensors only, no host reads. Each call of `accelerate` makes a compiled function of its own:
    torch keeps compiled code by code object and gives up after 8 shapes of one, so whoever needs another shape calls
    this again.
    """
    if mode == "eager":
        return fn
    source = cast("types.FunctionType", fn)
    own = types.FunctionType(source.__code__.replace(), source.__globals__, source.__name__)
    return cast("_F", torch.compile(own, fullgraph=True, dynamic=False))
