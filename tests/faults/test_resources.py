"""A run that doesn't fit is refused before the first step, with the numbers. Rows P8 to P10 of the README here."""

import resource
import shutil
from collections import namedtuple
from pathlib import Path

import pytest

from fastppo import Trainer
from fastppo.errors import ConfigError
from fastppo.runtime.resources import check_descriptors, check_disk
from tests.worlds import short


@pytest.fixture
def few_descriptors():
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield lambda n: resource.setrlimit(resource.RLIMIT_NOFILE, (n, before[1]))
    resource.setrlimit(resource.RLIMIT_NOFILE, before)


def test_p8_too_few_descriptors_are_refused_with_the_number_that_fits(few_descriptors, tmp_path):
    already = len(list(Path("/proc/self/fd").iterdir()))
    few_descriptors(already + 240)
    with pytest.raises(ConfigError, match=r"n_envs=200 needs 800 file descriptors, 4 each; \d+ are open and \d+") as e:
        Trainer(short(tmp_path, env_id="CartPole-v1", vectorization="async", n_envs=200))
    fits = int(str(e.value).split("At most n_envs=")[1].split()[0])
    assert 20 < fits < 60
    check_descriptors(4, fits, "n_envs")
    with pytest.raises(ConfigError):
        check_descriptors(4, fits + 1, "n_envs")
    few_descriptors(already + 70)
    with pytest.raises(ConfigError, match="workers=2 needs 16 file descriptors"):
        Trainer(short(tmp_path, env_id="CartPole-v1", vectorization="pool", workers=2))


def test_a_full_disk_is_refused_at_the_start(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 10**9, 1000))
    with pytest.raises(ConfigError, match=r"has 0 MB left; 5 checkpoints need \d+ MB"):
        Trainer(short(tmp_path, env_id="CartPole-v1"))
    check_disk(tmp_path, 999, "x")


def test_p10_a_small_dev_shm_is_not_refused(monkeypatch):
    """multiprocessing uses a file elsewhere if /dev/shm has no room."""
    import multiprocessing.heap

    import numpy as np

    from fastppo.envs.pool import PoolVectorEnv
    from tests.faults.worlds import makers

    monkeypatch.setattr(multiprocessing.heap.Arena, "_dir_candidates", [])
    venv = PoolVectorEnv(makers(4), n_workers=2)
    venv.reset(seed=0)
    assert venv.step(np.zeros(4, np.int64))[0].shape == (4, 2)
    venv.close()
