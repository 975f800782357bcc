"""Plain data as JSON-able values: numbers, texts, arrays, containers and random streams; and digests of it."""

from __future__ import annotations

import base64
import hashlib
import json
import random
from collections import deque
from typing import Any

import numpy as np

_Array = np.ndarray[Any, Any]

_KINDS = "biufcSU"  # of arrays: no objects
_BIT_GENERATORS = ("PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64")


class NotPlainError(Exception):
    """An attribute that isn't plain data; the text names it."""


def encode(x: Any) -> Any:  # noqa: ANN401 - any plain data
    """Return plain data as JSON-able values: numbers, texts, arrays, containers and random streams.

    Raises:
        NotPlainError: something else.
    """
    if x is None or type(x) in (bool, int, float, str):
        return x
    if isinstance(x, np.generic) and x.dtype.kind in _KINDS:
        return {"scalar": [x.dtype.str, _text(x.tobytes())]}
    if type(x) is np.ndarray and x.dtype.kind in _KINDS:
        return {"array": [x.dtype.str, list(x.shape), _text(x.tobytes())]}
    if isinstance(x, np.random.Generator):
        return {"generator": [type(x.bit_generator).__name__, encode(x.bit_generator.state)]}
    if isinstance(x, np.random.RandomState):
        return {"randomstate": encode(x.get_state(legacy=False))}
    if type(x) is random.Random:
        return {"random": encode(x.getstate())}
    if type(x) is bytes:
        return {"bytes": _text(x)}
    if type(x) is list:
        return [encode(item) for item in x]
    if type(x) in (tuple, set, frozenset):
        return {type(x).__name__: [encode(item) for item in x]}
    if type(x) is dict:
        return {"dict": [[encode(key), encode(value)] for key, value in x.items()]}
    if type(x) is deque:
        return {"deque": [[encode(item) for item in x], x.maxlen]}
    raise NotPlainError(type(x).__name__)


def decode(x: Any) -> Any:  # noqa: ANN401 - any plain data
    """Return the inverse of `encode`; safe on untrusted input, as it runs no code from it.

    Raises:
        ValueError, TypeError, KeyError: not an encoding.
    """
    if isinstance(x, list):
        return [decode(item) for item in x]
    if not isinstance(x, dict):
        return x
    ((kind, value),) = x.items()
    if kind in ("scalar", "array"):
        name, *shape, text = value
        dtype = np.dtype(str(name))
        if dtype.kind not in _KINDS:
            raise ValueError(f"arrays of {dtype} are not plain data")
        flat: _Array = np.frombuffer(base64.b64decode(text, validate=True), dtype)
        return flat.reshape(shape[0]).copy() if kind == "array" else flat[0]
    if kind == "generator":
        name, state = value
        if name not in _BIT_GENERATORS:
            raise ValueError(f"{name!r} is not a known bit generator")
        bits = getattr(np.random, name)(0)
        bits.state = _within(decode(state))
        return np.random.Generator(bits)
    if kind == "randomstate":
        legacy = np.random.RandomState(0)
        legacy.set_state(_within(decode(value)))
        return legacy
    if kind == "random":
        stream = random.Random(0)
        stream.setstate(decode(value))
        return stream
    if kind == "bytes":
        return base64.b64decode(value, validate=True)
    if kind == "deque":
        items, most = value
        return deque((decode(item) for item in items), most)
    if kind == "dict":
        return {decode(key): decode(item) for key, item in value}
    container = {"tuple": tuple, "set": set, "frozenset": frozenset}[kind]
    return container(decode(item) for item in value)


def _within(state: Any) -> Any:  # noqa: ANN401 - a mapping as numpy gives it
    """Return a bit generator's state after checking its position: numpy would read outside the buffer."""
    inner = state["state"]
    if "pos" in inner and not 0 <= int(inner["pos"]) <= len(inner["key"]) == 624:
        raise ValueError("a position outside the state")
    if "buffer_pos" in state and not 0 <= int(state["buffer_pos"]) <= len(state["buffer"]) == 4:
        raise ValueError("a position outside the buffer")
    return state


def _text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def size_of(value: Any) -> int:  # noqa: ANN401 - any attribute
    """Return the approximate bytes of plain data."""
    if isinstance(value, np.ndarray):
        return value.nbytes
    if isinstance(value, (bytes, str)):
        return len(value)
    if type(value) is dict:
        return sum(map(size_of, value)) + sum(map(size_of, value.values()))
    if type(value) in (list, tuple, set, frozenset, deque):
        return sum(map(size_of, value))
    return 8


def digest_of(value: Any) -> str | None:  # noqa: ANN401 - any attribute
    """Return a digest of plain data; None if it isn't plain."""
    hashed = hashlib.blake2b(digest_size=16)

    def add(x: Any) -> None:  # noqa: ANN401
        if type(x) is np.ndarray and x.dtype.kind in _KINDS:
            hashed.update(f"{x.dtype.str}{x.shape}".encode())
            hashed.update(np.ascontiguousarray(x).data)
        elif type(x) in (list, tuple, deque):
            hashed.update(f"{type(x).__name__}{len(x)}".encode())
            for item in x:
                add(item)
        elif type(x) is dict:
            hashed.update(f"dict{len(x)}".encode())
            for key, item in x.items():
                add(key)
                add(item)
        else:
            hashed.update(json.dumps(encode(x)).encode())

    try:
        add(value)
    except (NotPlainError, RecursionError):
        return None
    return hashed.hexdigest()
