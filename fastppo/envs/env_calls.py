"""Methods and attributes of environments, called and set by name."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import gymnasium as gym

from fastppo.errors import ENV_ERRORS, EnvError, cause_line


def look_up(i: int, env: gym.Env[Any, Any], name: str) -> Any:  # noqa: ANN401 - any value
    """Return a method or an attribute of environment i, or of the outermost wrapper that has it.

    Raises:
        EnvError: there is none.
    """
    try:
        if env.has_wrapper_attr(name):
            return env.get_wrapper_attr(name)
    except ENV_ERRORS as error:  # a property's own
        raise EnvError(f"environment {i} failed in its attribute {name!r}: {cause_line(error)}.") from error
    near = difflib.get_close_matches(name, [x for x in dir(env.unwrapped) if not x.startswith("_")], n=1)
    hint = f"; did you mean {near[0]!r}?" if near else "; its wrappers have none either."
    raise EnvError(f"environment {i} ({type(env.unwrapped).__name__}) has no method or attribute {name!r}{hint}")


def call_env(i: int, env: gym.Env[Any, Any], name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:  # noqa: ANN401
    """Return the result of a method of environment i or of a wrapper of it, or the value of an attribute.

    Raises:
        EnvError: there is no such attribute, or the method fails.
    """
    found = look_up(i, env, name)
    try:
        return found(*args, **kwargs) if callable(found) else found
    except ENV_ERRORS as error:
        raise EnvError(f"environment {i} failed in call({name!r}): {cause_line(error)}.") from error


def set_env(i: int, env: gym.Env[Any, Any], name: str, value: Any) -> None:  # noqa: ANN401 - any value
    """Set an attribute of environment i, in the outermost wrapper that has it.

    Raises:
        EnvError: there is no such attribute, or it can't be set.
    """
    look_up(i, env, name)
    try:
        env.set_wrapper_attr(name, value)
    except ENV_ERRORS as error:
        raise EnvError(f"environment {i} failed in set_attr({name!r}): {cause_line(error)}.") from error


def check_callable(access: str, name: str) -> None:
    """Refuse `access`, "call" or "set_attr", to the methods by which the trainer steps environments.

    Raises:
        EnvError: `name` is one of them.
    """
    if name in ("reset", "step", "close"):
        raise EnvError(
            f"{access}({name!r}): the trainer itself steps, resets and closes the environments; name another method or "
            "attribute."
        )


def one_each(values: Any, n: int) -> list[Any]:  # noqa: ANN401 - any values
    """Return the values of `set_attr` for N environments: a list or tuple as it is, anything else N times.

    Raises:
        EnvError: a list of another length.
    """
    each = list(values) if isinstance(values, (list, tuple)) else [values] * n
    if len(each) != n:
        raise EnvError(f"set_attr got {len(each)} values for {n} environments; give one value, or one for each.")
    return each
