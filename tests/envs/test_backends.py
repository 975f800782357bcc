"""The table of vectorisation backends agrees with the checks of settings."""

from typing import get_args

import pytest

from fastppo import Config
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.backends import BACKENDS
from fastppo.errors import ConfigError


def accepts(**settings):
    try:
        Config(**settings)
    except ConfigError:
        return False
    return True


@pytest.mark.parametrize("name", BACKENDS)
def test_settings_are_accepted_where_the_backend_supports_them(name):
    backend = BACKENDS[name]
    assert accepts(vectorization=name, env_timeout=1.0) == backend.has_timeout
    assert accepts(vectorization=name, on_env_error="restart") == backend.restarts_envs
    assert accepts(vectorization=name, workers=2) == (backend.workers == "workers")


def test_every_vectorization_has_a_row():
    assert set(BACKENDS) == set(get_args(Vectorization))
