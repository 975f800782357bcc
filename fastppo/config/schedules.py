"""Schedules as users write them: `linear:2.5e-4:0`, `adaptive:3e-4:1e-5:1e-2`."""

from __future__ import annotations

import math

from fastppo.errors import ConfigError


def parse_schedule(text: str, name: str = "schedule") -> tuple[str, float, float]:
    """Parse `linear:A:B`, `cosine:A:B` or `constant:A` into (shape, start, end).

    Raises:
        ConfigError: any other text; `name` names the setting.
    """
    shape, *numbers = text.split(":")
    try:
        values = [float(number) for number in numbers]
    except ValueError:
        values = []
    if shape == "constant" and len(values) == 1:
        return shape, values[0], values[0]
    if shape in ("linear", "cosine") and len(values) == 2:
        return shape, values[0], values[1]
    adaptive = ", or adaptive:3e-4:1e-5:1e-2" if name == "learning_rate" else ""
    raise ConfigError(
        f"{name}={text!r} is neither a number nor a schedule; "
        f"use 2.5e-4, constant:2.5e-4, linear:2.5e-4:0 or cosine:2.5e-4:0{adaptive}."
    )


def parse_adaptive_rate(value: object) -> tuple[float, float, float] | None:
    """Parse `adaptive:START:LOWEST:HIGHEST` into its three learning rates; None for any other value.

    Raises:
        ConfigError: these are not three rates with 0 < LOWEST <= START <= HIGHEST.
    """
    if not isinstance(value, str) or value.partition(":")[0] != "adaptive":
        return None
    try:
        start, lowest, highest = map(float, value.split(":")[1:])
    except ValueError:
        start, lowest, highest = math.nan, math.nan, math.nan
    if not 0 < lowest <= start <= highest < math.inf:
        raise ConfigError(
            f"learning_rate={value!r} must be adaptive:START:LOWEST:HIGHEST with 0 < LOWEST <= START <= HIGHEST, such "
            "as adaptive:3e-4:1e-5:1e-2."
        )
    return start, lowest, highest
