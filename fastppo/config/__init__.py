"""The settings of a run. `Config` holds them; each field carries its metadata, a `Setting`.

config.py lists the settings, checks.py says which values and combinations are valid, defaults.py fills those that are
not given. Layers 0 to 4 (docs/architecture.md) take plain values, no Config.
"""

from fastppo.config.checks import check_sequences as check_sequences
from fastppo.config.config import ALIASES as ALIASES
from fastppo.config.config import CHANGES_RESULTS as CHANGES_RESULTS
from fastppo.config.config import CHOSEN_AT_START as CHOSEN_AT_START
from fastppo.config.config import DEFAULTS as DEFAULTS
from fastppo.config.config import FIXED as FIXED
from fastppo.config.config import NOTED as NOTED
from fastppo.config.config import SCHEDULED as SCHEDULED
from fastppo.config.config import SETTINGS as SETTINGS
from fastppo.config.config import TYPES as TYPES
from fastppo.config.config import Config as Config
from fastppo.config.defaults import count_iterations as count_iterations
from fastppo.config.defaults import fill_defaults as fill_defaults
from fastppo.config.flag_types import EnvKwargs as EnvKwargs
from fastppo.config.flag_types import TargetReturn as TargetReturn
from fastppo.config.plain_values import as_path as as_path
from fastppo.config.plain_values import load_toml as load_toml
from fastppo.config.schedules import parse_adaptive_rate as parse_adaptive_rate
from fastppo.config.schedules import parse_schedule as parse_schedule
from fastppo.config.setting import SearchValues as SearchValues
from fastppo.config.setting import Section as Section
from fastppo.config.setting import Setting as Setting
from fastppo.config.setting import known as known
from fastppo.config.texts import default_text as default_text
from fastppo.config.texts import differences_from_defaults as differences_from_defaults
from fastppo.config.texts import shown as shown
