"""Types of settings that the command line parses with their own functions."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

import tyro


def _json(text: str) -> Any:  # noqa: ANN401 - any JSON value; `check_types` checks it
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text


def _number_or_text(text: str) -> Any:  # noqa: ANN401 - as `_json`
    try:
        return float(text)
    except ValueError:
        return text


EnvKwargs = Annotated[
    dict[str, Any],
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="JSON",
        instance_from_str=lambda args: _json(args[0]),
        is_instance=lambda value: isinstance(value, dict),
        str_from_instance=lambda value: [json.dumps(value)],
    ),
]

TargetReturn = Annotated[
    float | Literal["threshold"] | None,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER|threshold",
        instance_from_str=lambda args: _number_or_text(args[0]),
        is_instance=lambda value: True,
        str_from_instance=lambda value: [str(value)],
    ),
]
