"""The table of vectorisation backends agrees with the checks in `Config`."""

from typing import get_args

import pytest
import torch

from fastppo import Config
from fastppo.builders.resolve import resolve_config
from fastppo.envs.auto_vectorization import Vectorization
from fastppo.envs.backends import BACKENDS
from fastppo.errors import ConfigError
from fastppo.runs.inspect_env import inspect_configured


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


@pytest.mark.parametrize("saved", [None, {"vectorization": "native", "reason": "saved"}], ids=["measured", "saved"])
@pytest.mark.parametrize(
    ("asked", "measured", "chosen"),
    [
        ({}, ["sync", "native", "pool"], "native"),
        ({"on_env_error": "restart"}, ["sync", "pool"], "pool"),
        ({"env_timeout": 5.0}, [], "pool"),
        ({"env_timeout": 5.0, "n_envs": 1}, [], "pool"),
    ],
)
def test_auto_chooses_among_the_backends_that_can_do_what_is_asked(monkeypatch, saved, asked, measured, chosen):
    seen = []

    def measure(makers, *_):
        seen.extend(makers)
        return {name: {"sync": 1.0, "pool": 2.0, "native": 9.0}[name] for name in makers}, {}

    monkeypatch.setattr("fastppo.envs.make_envs.measure", measure)
    monkeypatch.setattr("fastppo.builders.resolve.recall", lambda *_: saved)
    config = Config(**{"env_id": "CartPole-v1", "n_envs": 8, "vectorization": "auto", **asked})
    resolved, _ = resolve_config(config, inspect_configured(config, None), torch.device("cpu"))
    assert resolved.vectorization == chosen
    assert seen == ([] if saved and not asked else measured)
