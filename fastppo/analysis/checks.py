"""The result of one check, shared by `fastppo doctor`, `verify-env` and `verify-resume`."""

from __future__ import annotations

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class CheckResult:
    """One line of a list of checks.

    Attributes:
        name: subject of the check, a word or two.
        value: observation.
        state: "ok"; "note": works with a limitation, or is missing but optional; "bad": does not work.
        advice: suggested action; "" if none is needed.
        conclusion: conclusion of all checks, if none is bad and this one allows no more than that; "": the usual one.
    """

    name: str
    value: str
    state: Literal["ok", "note", "bad"] = "ok"
    advice: str = ""
    conclusion: str = ""
