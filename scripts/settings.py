"""Write docs/settings.md from the metadata in fastppo/config/config.py: .venv/bin/python scripts/settings.py"""

import dataclasses
import textwrap
from pathlib import Path
from typing import get_args

from fastppo.commands.flags import flag, help_texts, placeholder
from fastppo.config import SETTINGS, Config, Section, Setting, default_text, shown

PAGE = Path(__file__).parents[1] / "docs" / "settings.md"
INTRO = """\
# Settings

Written by `scripts/settings.py` from the metadata in `fastppo/config/`; `fastppo train --help` shows the same texts.

Each setting is a flag, a key of a TOML file (`--config`) and an argument of `Config`: `--n-envs`, `n_envs`. Each
description is followed by

* its default. Where this depends on the kind of environment, the first value is for vectors with discrete actions, the
  others for images and for Box actions. `--profile` has other defaults (profiles.md).
* its range. A *schedule* may replace a number: `linear:START:END` or `cosine:START:END` over the run, or
  `constant:VALUE`.
* what it changes. *Results*: what a run learns. *Noise*: only random draws or rounding, so reports treat runs that
  differ in nothing else as seeds of one experiment. *Nothing*: no number of any iteration, given the same resolved
  values of all other settings and no environment failure.
* whether a resume may change it. Settings without this note keep their value.
"""


def page() -> str:
    """Return the text of docs/settings.md."""
    texts, defaults = help_texts(Config), dataclasses.asdict(Config())
    parts = [INTRO]
    for section in get_args(Section):
        parts.append(f"\n## {section.capitalize()}\n\n")
        for name, setting in SETTINGS.items():
            if setting.section == section:
                also = f" Alias: `{flag(setting.alias)}`." if setting.alias else ""
                parts.append(
                    _wrap(f"* **`{f'{flag(name)} {placeholder(name)}'.rstrip()}`** {texts[name]}{also}") + "\\\n"
                )
                parts.append(_wrap(f"  *{'; '.join(_facts(setting, default_text(name, defaults[name])))}.*") + "\n")
    return "".join(parts)


def _facts(setting: Setting, default: str) -> list[str]:
    facts = [f"Default: {default.replace(';', ',')}"]
    if setting.at_most is not None:
        lowest = f"from {shown(setting.at_least)}" if setting.above is None else f"above {shown(setting.above)}, up"
        facts.append(f"{lowest} to {shown(setting.at_most)}")
    elif setting.at_least is not None:
        facts.append(f"at least {shown(setting.at_least)}")
    elif setting.above is not None:
        facts.append(f"above {shown(setting.above)}")
    facts += ["number or schedule"] if setting.scheduled else []
    facts.append(f"changes {setting.changes}")
    facts += [] if setting.fixed else ["a resume may change it"]
    return facts


def _wrap(text: str) -> str:
    return textwrap.fill(text, 120, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)


if __name__ == "__main__":
    PAGE.write_text(page())
