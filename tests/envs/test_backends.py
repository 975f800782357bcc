"""The table of vectorisation backends agrees with the checks in `Config`."""

from typing import get_args

import pytest

from fastppo import Config
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.backends import BACKENDS
from fastppo.errors import ConfigError


def accepts(**settings):
    """Return whether `Config` accepts these settings."""
    try:
        Config(**settings)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", BACKENDS)
def test_config_accepts_a_setting_exactly_where_the_backend_supports_it(name):
    backend = BACKENDS[name]
    assert accepts(vectorization=name, env_timeout=1.0) == backend.has_timeout
    assert accepts(vectorization=name, on_env_error="restart") == backend.restarts_envs
    assert accepts(vectorization=name, workers=2) == (backend.workers == "workers")


def test_every_vectorization_has_a_backend():
    assert set(BACKENDS) == set(get_args(Vectorization))
