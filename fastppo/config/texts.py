"""Settings as text, for the terminal, reports and documentation."""

from __future__ import annotations

import json

from fastppo.config.config import CHOSEN_AT_START, SETTINGS, Config
from fastppo.config.defaults import fill_defaults
from fastppo.profiles import CLEANRL, Kind


def differences_from_defaults(config: Config, kind: Kind, *, atari: bool = False) -> str:
    """Return the settings of a filled config that differ from CleanRL's for this kind of environment, on one line.

    Environment and seed come first, always. Left out are the run folder, and choices that the default leaves to the
    machine (device, threads, ...).
    """
    defaults = fill_defaults(Config(), kind, atari=atari)
    left_open = {name for name in CHOSEN_AT_START if getattr(defaults, name) in (None, "auto")}
    names = [name for name in SETTINGS if name not in left_open | {"env_id", "seed", "run_dir"}]
    differing = [name for name in names if getattr(config, name) != getattr(defaults, name)]
    return "  ".join(f"{name}={shown(getattr(config, name))}" for name in ("env_id", "seed", *differing))


def shown(value: object) -> str:
    """Return the value of a setting as a user types it; None and empty values as "none"."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, dict) and value:
        return json.dumps(value)
    if isinstance(value, (tuple, list)) and value:
        return " ".join(map(str, value))
    if isinstance(value, int):
        return f"{value:_}" if value >= 10_000 else str(value)
    if isinstance(value, float):
        return f"{value:.10g}"
    return str(value) if value else "none"


def default_text(name: str, value: object) -> str:
    """Return the default `value` of a setting in words; where it is None, by the kind of environment."""
    if value is not None:
        return shown(value)
    if (unset := SETTINGS[name].unset) is not None:
        return unset
    text, *others = (shown(CLEANRL[kind][name]) for kind in ("discrete", "image", "continuous"))
    names = zip(("images", "Box"), others, strict=True)
    return "; ".join([text, *(f"{kind}: {other}" for kind, other in names if other != text)])
