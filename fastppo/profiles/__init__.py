"""Default settings: per kind of environment, per environment id, and those of other programs. Data only.

A profile lists the keywords of another program with their defaults, and what a value of each means in fastppo's
settings: where two programs mean different things by one name, the translation says so, not the code that trains.
"""

from __future__ import annotations

from typing import Any

from fastppo.profiles import cleanrl, rsl_rl, stable_baselines, stable_baselines3
from fastppo.profiles.cleanrl import CLEANRL as CLEANRL
from fastppo.profiles.measured import MEASURED as MEASURED
from fastppo.profiles.measured import TUNED as TUNED
from fastppo.profiles.measured import MeasuredProfile as MeasuredProfile
from fastppo.profiles.profile import Keyword as Keyword
from fastppo.profiles.profile import Kind as Kind
from fastppo.profiles.profile import Profile as Profile
from fastppo.profiles.profile import ProfileName as ProfileName

PROFILES: dict[ProfileName, Profile] = {
    "cleanrl": cleanrl.PROFILE,
    "sb3": stable_baselines3.PPO,
    "ppo1": stable_baselines.PPO1,
    "ppo2": stable_baselines.PPO2,
    "rsl_rl": rsl_rl.PROFILE,
}


def profile_settings(name: object) -> dict[str, Any]:
    """Return the settings of a profile that don't depend on the environment; none for a name that is no profile."""
    if not isinstance(name, str):  # refused later, with the setting's name
        return {}
    others: dict[str, dict[str, Any]] = {key: profile.settings for key, profile in PROFILES.items()}
    return (others | {key: profile.always for key, profile in MEASURED.items()}).get(name, {})
