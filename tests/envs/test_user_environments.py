"""Environments as users write them: shared instances, large tables, own random streams, own normalisers, old Gym."""

import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from fastppo import Config, Trainer, evaluate, resume
from fastppo.analysis.verify_env import verify_env
from fastppo.cli import main
from fastppo.envs import resume_probe
from fastppo.envs.env_state import ConstructedData, set_state, state_of
from fastppo.envs.factory import EnvFactory, WorkerSetup, reuses_observations
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.envs.plain_data import decode
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.resume_probe import probe_resume_support, probe_seeding
from fastppo.envs.sync import SerialVectorEnv
from fastppo.envs.vec_env import env_seeds
from fastppo.errors import ConfigError, EnvError, EnvStartError
from tests import PATIENCE
from tests.envs import test_gymnasium_vector
from tests.envs.worlds import (
    BrokenStep,
    Counter,
    FixedDice,
    FixedMap,
    GlobalDice,
    HelperDice,
    IgnoresSeed,
    LateArray,
    NoSingleSpaces,
    OldReset,
    OldResult,
    OldStep,
    OwnArray,
    Table,
    Unrepeatable,
)
from tests.worlds import short

ROOT = Path(__file__).parents[2]


def seeds(n):
    return env_seeds(test_gymnasium_vector.SEED, n)


def run_script(folder, text, *arguments, stdin=None):
    """Run a Python script in `folder`; its exit status and the lines of its standard error."""
    path = folder / "train.py"
    path.write_text(text)
    command = [sys.executable, *(arguments or [str(path)])]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        cwd=folder,
        env=environ,
        input=text if stdin else None,
    )
    return done.returncode, done.stderr.splitlines()


# One instance behind every make_env call


@pytest.mark.parametrize("wrap", [lambda env: env, NormalizeReward], ids=["bare", "wrapped"])
@pytest.mark.parametrize("settings", [{}, {"resume_envs": "restart"}, {"vectorization": "pool"}], ids=str)
def test_a_make_env_that_returns_one_instance_is_refused(tmp_path, wrap, settings):
    env = Counter()
    with pytest.raises(EnvStartError, match=r"returns the same Counter at every call.*lambda: Counter\(\.\.\.\)"):
        Trainer(short(tmp_path, **settings), make_env=lambda: wrap(env))


def test_vector_environments_of_one_instance_are_refused(tmp_path):
    env = Counter()
    with pytest.raises(EnvStartError, match="the same Counter"):
        SerialVectorEnv([lambda: env] * 2)
    with pytest.raises(EnvStartError, match="the same Counter"):
        Trainer(
            short(tmp_path),
            make_env=lambda: SyncVectorEnv([lambda: env] * 2, autoreset_mode=AutoresetMode.SAME_STEP),
        )


# Environments that hold much data


def test_data_that_the_constructor_rebuilds_is_left_out_of_the_state():
    env, twin = Table(), Table()
    built = ConstructedData(env)
    env.reset(seed=1)
    twin.reset(seed=2)
    env.step(0)
    state = json.loads(json.dumps(state_of(env, built)))
    assert len(json.dumps(state)) < 5000
    set_state(twin, state)
    assert twin.steps == 1
    with pytest.raises(EnvError, match="the constructor of Table now gives another prices"):
        set_state(Table(rows=200_001), state)
    env.prices[3] = -1.0
    changed = state_of(env, built)
    set_state(twin, json.loads(json.dumps(changed)))
    assert twin.prices[3] == -1.0


@pytest.mark.parametrize(("plain", "way"), [(True, "exact"), (False, "replay")])
@pytest.mark.parametrize("scribbles", [False, True])
def test_environments_with_a_table_resume_as_without_one(plain, way, scribbles):
    def make():
        return Table(20_000, scribbles, plain)

    assert probe_resume_support(make).way == way
    venv, twin = (SerialVectorEnv([make, make], FaultPolicy(way)) for _ in range(2))
    venv.reset(seed=3)
    twin.reset(seed=9)
    for _ in range(40):
        venv.step(np.zeros(2, np.int64))
    states = json.loads(json.dumps(venv.env_states()))
    assert states
    assert (len(json.dumps(states)) < 10_000) is not scribbles
    twin.load_env_states(states)
    for _ in range(12):
        mine, theirs = (x.step(np.zeros(2, np.int64)) for x in (venv, twin))
        assert np.array_equal(mine[1], theirs[1])


def test_a_table_that_changes_late_is_never_restored_wrongly():
    venv = SerialVectorEnv([lambda: Table(20_000, plain=False)], FaultPolicy("replay"))
    venv.reset(seed=3)
    for _ in range(60):
        venv.step(np.zeros(1, np.int64))
    assert venv.env_states()
    venv.envs[0].prices[7] = 5.5
    assert venv.env_states() == [], "a checkpoint compares the table with the constructor's"


def test_a_state_too_large_for_checkpoints_is_not_saved(monkeypatch):
    monkeypatch.setattr(resume_probe, "_MAX_CHECKPOINT_BYTES", 2**20)
    assert probe_resume_support(lambda: Table(20_000, scribbles=True), n_envs=2).way == "exact"
    support = probe_resume_support(lambda: Table(20_000, scribbles=True), n_envs=20)
    assert support.way == "restart"
    assert support.why == "its state takes 4 MiB per checkpoint, more than 1"
    monkeypatch.setattr(resume_probe, "_MAX_RESET_SECONDS", 0.0)
    support = probe_resume_support(lambda: Table(200, plain=False))
    assert (support.way, support.why[:21]) == ("restart", "saving its state take")


def test_the_probe_of_a_slow_environment_takes_few_steps(monkeypatch):
    steps = []
    clock = [0.0]

    class Slow(Counter):
        def step(self, action):
            steps.append(1)
            clock[0] += 0.1
            return super().step(action)

    monkeypatch.setattr(resume_probe.time, "perf_counter", lambda: clock[0])
    assert probe_resume_support(Slow).way == "exact"
    assert len(steps) <= 10


def test_resume_envs_restart_saves_no_environment_state(tmp_path):
    trainer = Trainer(short(tmp_path, resume_envs="restart"), make_env=Counter)
    assert trainer.env.resume_support.way == "restart"
    assert trainer.env.state_dict() == {}
    trainer.run()
    again = resume(tmp_path / "run", total_timesteps=96, make_env=Counter)
    assert any("the environments start new episodes" in note for note in again.notes)
    again.run()
    with pytest.raises(ConfigError, match="exact_resume with resume_envs=restart"):
        Config(exact_resume=True, resume_envs="restart")


# Random streams


@pytest.mark.parametrize(
    ("make", "name"),
    [(FixedDice, "FixedDice.rng"), (HelperDice, "HelperDice.helper.dice"), (IgnoresSeed, "IgnoresSeed._np_random")],
)
def test_a_stream_that_ignores_the_seed_is_named(make, name, tmp_path):
    (note,) = probe_seeding(make)
    assert note.startswith(f"the seed changes nothing in {name}: ")
    assert probe_resume_support(make).notes == (note,)
    found = {result.name: result for result in verify_env("", {}, 20, make_env=make)}
    assert found["seeds"].state == "note"
    assert found["seeds"].value.startswith(f"the seed changes nothing in {name}")
    if make is FixedDice:
        trainer = Trainer(short(tmp_path), make_env=make)
        assert note in trainer.notes


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-v1", "Pendulum-v1", "Taxi-v4"])
def test_seeded_and_deterministic_environments_get_no_note(env_id):
    assert probe_seeding(EnvFactory(env_id, {})) == ()
    assert probe_resume_support(EnvFactory(env_id, {})).notes == ()


def test_a_deterministic_environment_is_legitimate():
    assert probe_seeding(Counter) == ()
    assert probe_seeding(FixedMap) == ()


def test_an_environment_that_allows_one_instance_trains(tmp_path):
    """It holds a port or a lock; the tests at the start may not fail where the run itself would not."""
    made = []

    class Only(Counter):
        def __init__(self):
            if made:
                raise OSError("the port is in use")
            made.append(self)
            super().__init__()

        def close(self):
            made.clear()

    for settings in ({}, {"resume_envs": "restart"}):
        made.clear()
        config = short(tmp_path, n_envs=1, n_steps=16, run_dir=tmp_path / f"run{len(settings)}", **settings)
        assert Trainer(config, make_env=Only).run().global_step == 48


@pytest.mark.parametrize("settings", [{}, {"vectorization": "pool", "workers": 2}, {"vectorization": "async"}], ids=str)
def test_environments_on_global_streams_are_repeatable(tmp_path, settings):
    runs = []
    for k in range(3):
        np.random.seed(k)
        random.seed(k)
        config = short(tmp_path, run_dir=tmp_path / str(k), seed=1 + (k == 2), **settings)
        trainer = Trainer(config, make_env=GlobalDice)
        (note,) = (note for note in trainer.notes if "global random stream" in note)
        assert "numpy's and random's" in note
        trainer.collect()
        runs.append(trainer.rollout.obs.numpy().copy())
        trainer.env.close()
    assert np.array_equal(runs[0], runs[1])
    assert not np.array_equal(runs[0], runs[2]), "another seed gives other numbers"
    first, second = runs[0][0]
    assert not np.array_equal(first, second), "workers have streams of their own"


def test_ordinary_environments_leave_the_global_streams_alone(tmp_path):
    np.random.seed(7)
    random.seed(7)
    expected = np.random.random(), random.random()
    np.random.seed(7)
    random.seed(7)
    Trainer(short(tmp_path, env_id="CartPole-v1")).env.close()
    assert (np.random.random(), random.random()) == expected


# The user's own normalisers


def normalized():
    return NormalizeReward(NormalizeObservation(Counter(((5, False), (9, True)))))


def counts(trainer):
    return [x.count for x in trainer.env.call("obs_rms")]


@pytest.mark.parametrize("inner", [Counter, Unrepeatable])
def test_a_users_running_moments_survive_a_resume(tmp_path, inner):
    def make():
        return NormalizeObservation(inner())

    trainer = Trainer(short(tmp_path), make_env=make)
    assert trainer.env.resume_support.way == ("exact" if inner is Counter else "restart")
    (note,) = (note for note in trainer.notes if "NormalizeObservation" in note)
    assert "Use --normalize-obs instead" in note
    before = []
    for _ in trainer.iterations():
        before = counts(trainer)
    again = resume(tmp_path / "run", total_timesteps=96, make_env=make)
    more = 0 if inner is Counter else 1  # the first observation of the new episode
    assert counts(again) == pytest.approx([count + more for count in before])
    again.run()


def test_moments_of_a_vector_environment_of_the_users_survive_a_resume(tmp_path):
    def make():
        venv = SyncVectorEnv([Counter] * 2, autoreset_mode=AutoresetMode.NEXT_STEP)
        return gym.wrappers.vector.NormalizeObservation(venv)

    trainer = Trainer(short(tmp_path), make_env=make)
    trainer.run()
    count = trainer.env.venv.obs_rms.count
    assert count > 40
    again = resume(tmp_path / "run", total_timesteps=96, make_env=make)
    assert again.env.venv.obs_rms.count == pytest.approx(count + 2)
    again.run()


def test_moments_are_part_of_the_exact_state():
    assert probe_resume_support(normalized).way == "exact"
    env, twin = normalized(), normalized()
    env.reset(seed=0)
    twin.reset(seed=1)
    for _ in range(20):
        env.step(0)
    set_state(twin, json.loads(json.dumps(state_of(env))))
    assert twin.env.obs_rms.count == env.env.obs_rms.count
    assert np.array_equal(twin.env.obs_rms.var, env.env.obs_rms.var)
    assert twin.return_rms.mean == env.return_rms.mean
    with pytest.raises((ValueError, KeyError)):
        decode({"moments": {}})


def test_an_evaluation_says_that_a_users_normaliser_starts_from_nothing(tmp_path):
    Trainer(short(tmp_path), make_env=normalized).run()
    played = evaluate(tmp_path / "run", 2, make_env=normalized)
    assert played.remark == "; NormalizeReward and NormalizeObservation began with fresh statistics"


# Observations that are overwritten


@pytest.mark.parametrize("make", [OwnArray, LateArray])
def test_final_observations_are_right_under_async(make):
    env = make_vec_env(inspect_env("", {}, make), 2, "async")
    try:
        env.reset(seeds(2))
        steps = [test_gymnasium_vector.step(env, test_gymnasium_vector.zero_actions()) for _ in range(4)]
        assert steps[-1].final_obs[:, 0].tolist() == [4, 4]
    finally:
        env.close()


def test_overwritten_observations_are_found_at_the_start():
    assert reuses_observations(OwnArray())
    assert not reuses_observations(Counter())
    venv = gym.vector.AsyncVectorEnv([OwnArray], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(EnvError, match="overwrite observations"):
        make_vec_env(inspect_env("", {}, lambda: venv), 1, "sync")
    venv.close()


def test_the_environment_tried_at_the_start_is_closed():
    closed = []

    class Closes(Counter):
        def close(self):
            closed.append(self)

    venv = gym.vector.AsyncVectorEnv([Closes], autoreset_mode=AutoresetMode.SAME_STEP)
    closed.clear()  # Gymnasium's own first instance
    make_vec_env(inspect_env("", {}, lambda: venv), 1, "sync").close()
    assert len(closed) == 1


# Mistakes at the start


def no_licence():
    raise OSError("no licence server")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (OldReset, r"OldReset\.reset failed: TypeError: .*keyword argument 'seed' \(.*old Gym"),
        (OldStep, r"OldStep\.step returned a tuple of 4; it must return \(obs, reward, terminated, trunc.*old Gym"),
        (OldResult, r"OldResult\.reset returned ndarray; it must return \(obs, info\)"),
        (BrokenStep, r"BrokenStep\.step failed: KeyError: 'speed' \(worlds\.py, line \d+\)"),
        (no_licence, r"make_env failed: OSError: no licence server \(test_user_environments\.py, line \d+\)"),
    ],
)
def test_an_environment_that_fails_at_the_start_is_one_line(make, message):
    with pytest.raises(EnvStartError, match=message) as caught:
        inspect_env("", {}, make)
    assert "\n" not in str(caught.value)


def test_a_constructor_that_fails_later_is_named():
    made = []

    def make():
        made.append(1)
        if len(made) > 2:
            raise OSError("no port left")
        return Counter()

    with pytest.raises(EnvStartError, match="environment 2 failed in its constructor: OSError: no port left"):
        SerialVectorEnv([make] * 4)


gym.register("Broken-v0", entry_point=BrokenStep)
gym.register("NoPackage-v0", entry_point="a_package_that_is_missing.envs:Env")


@pytest.mark.parametrize(
    ("env_id", "line"),
    [
        ("Broken-v0", "EnvStartError: BrokenStep.step failed: KeyError: 'speed' (worlds.py, line "),
        ("NoPackage-v0", "ConfigError: env_id='NoPackage-v0' needs a package that isn't installed: No module named"),
    ],
)
def test_the_command_line_shows_one_line_and_the_trace_with_debug(env_id, line, capsys):
    assert main(["train", "--env-id", env_id]) == 2
    (only,) = capsys.readouterr().err.splitlines()
    assert only.startswith(line)
    assert main(["train", "--debug", "--env-id", env_id]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("Traceback")
    assert lines[-1] == only


def test_a_vector_environment_without_single_spaces_is_one_line():
    with pytest.raises(ConfigError, match="NoSingleSpaces, a VectorEnv without single_observation_space, single_act"):
        inspect_env("", {}, NoSingleSpaces)


class SuperSuitLike:
    """The interface of SuperSuit's vector environments, around Gymnasium's."""

    num_envs, observation_space, action_space = 2, Counter.observation_space, Counter.action_space

    def __init__(self):
        makers = [lambda: Counter(((4, True),))] * 2
        self.inner = SyncVectorEnv(makers, autoreset_mode=AutoresetMode.SAME_STEP)

    def reset(self, seed=None, options=None):
        assert seed is None or isinstance(seed, int)
        return self.inner.reset(seed=seed)[0], [{}, {}]

    def step(self, actions):
        obs, rewards, terminated, truncated, infos = self.inner.step(actions)
        final = infos.get("final_obs", [None, None])
        infos = [{} if x is None else {"terminal_observation": x} for x in final]
        return obs, rewards, terminated.astype(np.uint8), truncated.astype(np.uint8), infos

    def close(self):
        self.inner.close()


def test_the_documented_adapter_trains_on_a_vector_environment_of_supersuit(tmp_path):
    page = (ROOT / "docs" / "environments.md").read_text()
    (block,) = (text for text in re.findall(r"```python\n(.*?)```", page, re.DOTALL) if "class FromSuperSuit" in text)
    names = {}
    exec(block, names)
    trainer = Trainer(short(tmp_path), make_env=lambda: names["FromSuperSuit"](SuperSuitLike()))
    trainer.run()
    assert trainer.result.mean_length == 4
    assert trainer.env.final_obs[:, 0].tolist() == [4, 4]


# Scripts and worker processes

UNGUARDED = """
import gymnasium
from fastppo import Config, Trainer
config = Config(n_envs=2, n_steps=8, n_minibatches=2, total_timesteps=32, vectorization="{}", compile="off")
Trainer(config, make_env=lambda: gymnasium.make("CartPole-v1")).run()
"""


@pytest.mark.parametrize("vectorization", ["pool", "async"])
def test_a_script_without_a_main_guard_is_one_line(tmp_path, vectorization):
    code, lines = run_script(tmp_path, UNGUARDED.format(vectorization))
    assert code == 1
    assert lines[-1].startswith("fastppo.errors.Env")
    assert "put that part under `if __name__ == '__main__':`" in lines[-1]
    assert not any("bootstrapping phase" in line for line in lines)


def test_a_script_from_standard_input_trains_with_the_pool(tmp_path):
    code, lines = run_script(tmp_path, UNGUARDED.format("pool"), "-", stdin=True)
    assert code == 0, lines


REGISTERS = """
import gymnasium
from gymnasium.envs.classic_control import CartPoleEnv


class Mine(CartPoleEnv):
    pass


if __name__ == "__main__":  # imports included, so that workers start fast
    import numpy
    from fastppo.envs.make_envs import inspect_env, make_vec_env

    gymnasium.register("Mine-v0", entry_point=Mine, max_episode_steps=30)
    for vectorization in ("pool", "async"):
        env = make_vec_env(inspect_env("Mine-v0", {}), 2, vectorization, n_workers=1)
        env.reset(numpy.arange(2))
        env.close()
"""


def test_workers_know_the_ids_that_only_the_main_script_registers(tmp_path):
    code, lines = run_script(tmp_path, REGISTERS)
    assert code == 0, lines


def test_a_registration_that_cannot_be_pickled_stops_no_worker():
    gym.register("Unpicklable-v0", entry_point=Counter, kwargs={"stream": sys.stdout.buffer})
    try:
        pool = PoolVectorEnv([Counter], n_workers=1)
        pool.reset(seed=0)
        pool.close()
        assert WorkerSetup.collect().specs
    finally:
        del gym.registry["Unpicklable-v0"]
