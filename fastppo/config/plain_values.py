"""Settings as TOML, JSON and Python hold them: reading, conversion, and what an annotation accepts."""

from __future__ import annotations

import numbers
import os
import tomllib
import types
import typing
from pathlib import Path
from typing import Any, Literal

from fastppo.errors import ConfigError, kind_of

_NOUNS = {int: "a whole number", float: "a number", bool: "True or False", str: "text", Path: "a path"}


def load_toml(path: Path) -> dict[str, Any]:
    """Return the settings in a TOML file.

    Raises:
        ConfigError: no such file, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text("utf-8-sig"))  # some editors begin a file with a byte order mark
    except OSError as error:
        raise ConfigError(f"--config {path}: can't be read ({error.strerror}).") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"--config {path}: not TOML ({error}).") from None


def as_path(given: object, name: str) -> Path:
    """Return a path that the user gave as `name`, as text or a path.

    Raises:
        ConfigError: it is another object, empty text, which would silently be the working folder, or text that no path
            can be.
    """
    try:
        text = os.fspath(given)  # type: ignore[call-overload]
    except TypeError:
        text = None
    if not isinstance(text, str):
        example = ", such as its run_dir" if hasattr(given, "run_dir") else ""
        raise ConfigError(f"{name} is {kind_of(given)}; give a path, as text or pathlib.Path{example}.")
    if not text:
        raise ConfigError(f"{name}='' is an empty path; name a file or folder ('.' is the working folder).")
    if "\0" in text:
        raise ConfigError(f"{name}={text!r} holds a null character, which no path can; leave it out.")
    return Path(text)


def from_plain(name: str, value: object, hint: object) -> object:
    """Return a value of TOML, JSON or Python for the setting `name` as the type that Config uses.

    Raises:
        ConfigError: as `as_path`.
    """
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if isinstance(value, list) and origin is tuple:
        value = tuple(value)
    if isinstance(value, tuple) and origin is tuple:
        return tuple(from_plain(name, item, args[0]) for item in value)
    if Path in args and value is not None:
        return as_path(value, name)
    if int in (hint, *args) and isinstance(value, float) and value.is_integer():  # 1e6 is a float in TOML and Python
        return int(value)
    if isinstance(value, (bool, int, float)):
        return value
    if int in (hint, *args) and isinstance(value, numbers.Integral):  # numpy's, as a sweep draws them
        return int(value)
    if float in (hint, *args) and isinstance(value, numbers.Real):
        return float(value)
    return value


def accepts(value: object, hint: object) -> bool:
    """Return whether a plain value fits one of the annotations that Config uses."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return any(accepts(value, arg) for arg in args)
    if origin is Literal:
        return isinstance(value, str) and value in args
    if origin is tuple:
        return isinstance(value, tuple) and all(accepts(item, args[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(isinstance(key, str) for key in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    return isinstance(value, typing.cast("type", hint))


def choices(hint: object) -> list[str]:
    """Return every text that an annotation's Literals allow."""
    args = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return list(args)
    return [choice for arg in args for choice in choices(arg)]


def describe(hint: object) -> str:
    """Return an annotation in words."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return " or ".join(describe(arg) for arg in args if arg is not type(None))
    if origin is Literal:
        return " or ".join(map(str, args))
    if origin is tuple:
        return f"a list of {'whole numbers: [64, 64], or 64 64 as a flag' if args[0] is int else describe(args[0])}"
    if origin is dict:
        return 'a table of keyword arguments, as JSON: {"gravity": 9.81}'
    return _NOUNS[typing.cast("type", hint)]
