"""Environment state as plain data: round trips, and errors for other data."""

import json
import random
import re
from collections import deque

import gymnasium as gym
import numpy as np
import pytest

from fastppo.envs import env_state
from fastppo.envs.env_state import EpisodeLog, set_state, state_of
from fastppo.envs.factory import EnvFactory
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.plain_data import NotPlainError, decode, encode
from fastppo.envs.resume_probe import probe_resume_support
from fastppo.envs.sync import SerialVectorEnv
from fastppo.errors import EnvError
from tests.envs.worlds import Counter

PLAIN = [
    None,
    True,
    7,
    2**200,
    0.1,
    float("inf"),
    "text",
    b"bytes",
    [1, [2, 3]],
    (1, (2.5, None)),
    {3, 4},
    frozenset({5}),
    {1: "a", "b": (2,), (3, 4): [5]},
    deque([1, 2, 3], maxlen=5),
    np.float32(0.1),
    np.int64(-3),
    np.bool_(True),
    np.array([[1.5, np.nan]], np.float32),
    np.array([b"SF", b"HG"]),
    np.zeros((0, 3), np.uint8),
    np.array(7),
]


@pytest.mark.parametrize("x", PLAIN, ids=lambda x: type(x).__name__)
def test_plain_data_survives_json(x):
    back = decode(json.loads(json.dumps(encode(x))))
    assert type(back) is type(x)
    if isinstance(x, (np.ndarray, np.generic)):
        assert (back.dtype, back.shape) == (x.dtype, x.shape)
        assert back.tobytes() == x.tobytes()
    else:
        assert back == x
    if isinstance(x, deque):
        assert back.maxlen == x.maxlen


@pytest.mark.parametrize(
    "stream",
    [np.random.default_rng(3), np.random.Generator(np.random.MT19937(4)), np.random.RandomState(5), random.Random(6)],
    ids=lambda stream: type(stream).__name__,
)
def test_a_random_stream_continues_after_a_round_trip(stream):
    stream.random()
    twin = decode(json.loads(json.dumps(encode(stream))))
    assert [stream.random() for _ in range(5)] == [twin.random() for _ in range(5)]


@pytest.mark.parametrize("x", [object(), np.array([object()]), lambda: None, {"a": object()}, gym.spaces.Discrete(2)])
def test_data_that_is_not_plain_is_refused(x):
    with pytest.raises(NotPlainError):
        encode(x)


def test_an_invalid_encoding_raises_an_error_and_runs_no_code():
    for x in ({"array": ["O", [1], ""]}, {"generator": ["Generator", {}]}, {"eval": "1"}, {"a": 1, "b": 2}):
        with pytest.raises((ValueError, KeyError, TypeError)):
            decode(x)


@pytest.mark.parametrize("position", [-(10**9), 625, 10**9])
def test_positions_outside_a_random_state_are_refused(position):
    """numpy does not check the position and would read outside its buffer."""
    streams = [np.random.Generator(np.random.MT19937(4)), np.random.RandomState(5)]
    for stream in streams:
        plain = json.loads(json.dumps(encode(stream)))
        text = re.sub(r'\["pos", \d+\]', f'["pos", {position}]', json.dumps(plain))
        assert str(position) in text
        with pytest.raises(ValueError, match="a position outside"):
            decode(json.loads(text))
    philox = json.dumps(encode(np.random.Generator(np.random.Philox(4)))).replace(
        '["buffer_pos", 4]', '["buffer_pos", -9]'
    )
    with pytest.raises(ValueError, match="a position outside"):
        decode(json.loads(philox))


def test_reading_the_spec_does_not_change_the_state():
    used, fresh = EnvFactory("CartPole-v1", {})(), EnvFactory("CartPole-v1", {})()
    used.reset(seed=0)
    fresh.reset(seed=0)
    assert used.spec is not None
    set_state(fresh, state_of(used))
    set_state(used, state_of(fresh))


def test_the_state_of_another_environment_class_is_refused():
    state = state_of(EnvFactory("CartPole-v1", {})())
    with pytest.raises(EnvError, match="the saved environment is .*CartPoleEnv, this one .*AcrobotEnv"):
        set_state(EnvFactory("Acrobot-v1", {})(), state)


class Clock(Counter):
    """An environment whose helper object is not plain data; unless `seeded`, it ignores its seed."""

    def __init__(self, seeded=True):
        super().__init__()
        self.helper, self.seeded = object(), seeded

    def _obs(self):
        stream = self.np_random if self.seeded else np.random.default_rng()
        return np.array([self.steps, stream.random()], np.float32)


def test_the_probe_tells_exact_replay_and_restart_apart():
    assert probe_resume_support(Counter).way == "exact"
    support = probe_resume_support(Clock)
    assert support.way == "replay"
    assert "Clock.helper (object) is not plain data" in support.why
    assert probe_resume_support(lambda: Clock(seeded=False)).way == "restart"

    def broken():
        raise RuntimeError("no display")

    assert probe_resume_support(broken)[:2] == ("restart", "the probe failed: RuntimeError: no display")


def test_unfinished_episodes_are_replayed():
    venv = SerialVectorEnv([Clock, Clock, Clock], FaultPolicy("replay"))
    twin = SerialVectorEnv([Clock, Clock, Clock], FaultPolicy("replay"))
    obs, _ = venv.reset(seed=3)
    twin.reset(seed=99)
    rng = np.random.default_rng(0)
    for steps in (3, 4, 1, 700):
        for _ in range(steps):
            obs = venv.step(rng.integers(0, 2, 3))[0].copy()
        states = json.loads(json.dumps(venv.env_states()))
        assert all(len(decode(state["actions"])) < 5 for state in states)
        assert np.array_equal(twin.load_env_states(states), obs)
        assert json.loads(json.dumps(twin.env_states())) == states
        for _ in range(6):
            actions = rng.integers(0, 2, 3)
            mine, theirs = venv.step(actions)[0].copy(), twin.step(actions)[0].copy()
            assert np.array_equal(mine, theirs)


def test_an_episode_that_never_ends_is_dropped_from_the_log(monkeypatch):
    monkeypatch.setattr(env_state, "_LONGEST", 1000)
    log, env = EpisodeLog(2), Counter()
    env.reset()
    for i in (0, 1):
        log.begin(i, env, None)
    for t in range(3000):
        log.add(np.zeros(2, np.int64))
        if t % 10 == 9:
            log.begin(1, env, None)
        assert len(log._actions) <= 1280
    assert not log.replayable
    log.begin(0, env, None)
    assert log.replayable
    assert len(decode(log.episode(0)["actions"])) == 0


def test_seeding_returns_seeds_and_restart_counts():
    venv = SerialVectorEnv([Counter, Counter], FaultPolicy("exact", restarts=2))
    venv.reset(seed=1)
    seeds, restarts = venv.seeding
    assert seeds.tolist() == [1, 2]
    assert restarts.tolist() == [0, 0]
