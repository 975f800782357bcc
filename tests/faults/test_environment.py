"""Failing environments and workers: error messages, time-outs and restarts. Rows E and P of the README."""

import functools
import io
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium as gym
import numpy as np
import psutil
import pytest
from gymnasium import spaces

from fastppo import Trainer, resume
from fastppo.envs.env_group import EnvGroup, fresh_seed
from fastppo.envs.fault_policy import NO_FAULT_POLICY, FaultPolicy
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.step_arrays import layout
from fastppo.envs.sync import SerialVectorEnv
from fastppo.envs.vec_env import env_seeds
from fastppo.errors import ConfigError, EnvError
from fastppo.runtime.seeding import seed_stream
from tests.envs.worlds import Counter
from tests.faults.test_resume import fastppo
from tests.faults.worlds import FaultEnv, Growing, Numbered, makers, odd
from tests.worlds import short

ROOT = Path(__file__).parents[2]


def pool(n=4, workers=2, fault_policy=NO_FAULT_POLICY, groups=1, **changes):
    return PoolVectorEnv(makers(n, **changes), n_workers=workers, n_groups=groups, fault_policy=fault_policy)


def serial(n=4, fault_policy=NO_FAULT_POLICY, **changes):
    return SerialVectorEnv(makers(n, **changes), fault_policy)


def drive(venv, steps):
    """Step by actions 0; every step's copied results."""
    obs, _ = venv.reset(seed=7)
    seen = [(obs.copy(), None, None, None, {})]
    for _ in range(steps):
        obs, *rest, infos = venv.step(np.zeros(venv.num_envs, np.int64))
        seen.append((obs.copy(), *(x.copy() for x in rest), infos))
    return seen


@pytest.mark.parametrize("make", [serial, pool])
def test_e1_an_error_names_environment_step_and_seed(make):
    venv = make(kind="raises", env_index=2, at_step=5)
    with pytest.raises(
        EnvError, match=r"environment 2 \(seed 9\) failed in step 5: ValueError: the ball left"
    ) as caught:
        drive(venv, 10)
    assert caught.value.__cause__ is not None
    venv.close()


def test_e1_the_command_line_shows_the_trace_and_one_line(tmp_path):
    arguments = ["train", "--env-id", "tests.faults.worlds:Fault-v0", "--env-kwargs", '{"kind": "raises"}']
    for vectorization in ("sync", "pool"):
        more = ["--n-envs", "2", "--n-steps", "8", "--compile", "off", "--run-dir", str(tmp_path / vectorization)]
        done = fastppo(*arguments, "--vectorization", vectorization, *more)
        assert done.returncode == 2
        assert "in _break" in done.stderr
        assert done.stderr.splitlines()[-1].startswith("EnvError: environment 0 (seed ")


@pytest.mark.parametrize("make", [serial, pool])
@pytest.mark.parametrize("kind", ["raises", "two arguments"])
def test_e1_a_restart_truncates_the_episode_and_counts(make, kind, tmp_path):
    once = str(tmp_path / "once")
    venv = make(kind=kind, env_index=2, at_step=5, once=once, fault_policy=FaultPolicy(restarts=3))
    seen = drive(venv, 12)
    before, (obs, rewards, terminated, truncated, infos) = seen[4], seen[5]
    assert truncated.tolist() == [False, False, True, False]
    assert not terminated.any()
    assert rewards.tolist() == [1, 1, 0, 1]
    assert np.array_equal(infos["final_obs"][2], before[0][2])
    assert obs[2][0] == 2  # at the start of an episode
    assert obs[1][0] == 51
    assert venv.seeding[1].sum() == 1
    (line,) = venv.restart_messages()
    assert "environment 2 failed" in line
    assert venv.restart_messages() == []
    assert seen[-1][0][2][0] == 72  # 7 steps into the new episode
    venv.close()


@pytest.mark.parametrize("make", [serial, pool])
def test_e1_the_budget_ends_it(make):
    venv = make(kind="reset raises", env_index=1, at_step=1, fault_policy=FaultPolicy(restarts=2))
    with pytest.raises(EnvError, match="reset went wrong"):
        drive(venv, 100)
    venv.close()


def test_e1_groups_share_the_budget():
    """Workers of a pool each have a group of their own, in the same arrays."""
    shapes = layout(2, FaultEnv.observation_space, FaultEnv.action_space)
    arrays = {name: np.zeros(shape, dtype) for name, (shape, dtype) in shapes.items()}
    make = [functools.partial(FaultEnv, i, "raises", i, 2) for i in range(2)]
    groups = [EnvGroup([m()], [m], arrays, slice(i, i + 1), FaultPolicy(restarts=3)) for i, m in enumerate(make)]
    for group in groups:
        group.reset()
    with pytest.raises(EnvError, match="environment 1 .* the ball left"):
        for _ in range(10):
            for group in groups:
                group.step()
    assert arrays["failures"].tolist() == [2, 1]


def test_e1_a_run_counts_restarts_and_gives_up_after_its_budget(tmp_path):
    changes = {"on_env_error": "restart", "env_restarts": 3, "total_timesteps": 4000}
    trainer = Trainer(short(tmp_path, **changes), make_env=lambda: FaultEnv(kind="raises", at_step=30))
    with pytest.raises(EnvError, match="environments failed 4 times; 3 are allowed|failed in step"):
        for stats in trainer.iterations():
            assert stats.scalars["charts/env_restarts"] <= 3


@pytest.mark.parametrize("kind", ["two arguments", "unpicklable"])
def test_e2_an_unpicklable_error_arrives_as_text(kind):
    venv = pool(kind=kind, env_index=3, at_step=2)
    begin = time.monotonic()
    with pytest.raises(EnvError, match="environment 3"):
        drive(venv, 5)
    assert time.monotonic() - begin < 2 + 3  # starting takes the most of it


def test_e3_a_constructor_that_fails_in_a_worker_only():
    with pytest.raises(EnvError, match="environment 3 failed in its constructor: RuntimeError: no licence"):
        pool(kind="constructor", env_index=3)
    assert not workers()


@pytest.mark.parametrize("kind", ["sleeps", "loops in C"])
def test_e4_a_hung_step_is_found_and_says_where_it_is(kind):
    venv = pool(kind=kind, env_index=3, at_step=3, fault_policy=FaultPolicy(timeout=1.0))
    venv.reset(seed=7)
    begin = time.monotonic()
    with pytest.raises(EnvError, match=r"environments 2-3.*has not answered for \d s") as caught:
        drive(venv, 10)
    assert "in _break" in str(caught.value)
    assert time.monotonic() - begin < 1 + 2 + 1
    assert not workers()


@pytest.mark.parametrize("kind", ["sleeps", "loops in C", "killed", "segfault", "stopped"])
@pytest.mark.parametrize("groups", [1, 2])
def test_e4_p1_p2_a_lost_worker_is_replaced_and_its_episodes_truncated(kind, groups, tmp_path):
    fault_policy = FaultPolicy(timeout=1.0, restarts=2)
    venv = pool(8, 2, fault_policy, groups, kind=kind, env_index=5, at_step=3, once=str(tmp_path / "once"))
    seen = drive(venv, 10)
    shares = [[i for part in w.parts for i in range(part.start, part.stop)] for w in venv._workers]
    (worker,) = (share for share in shares if 5 in share)
    assert venv.seeding[1].sum() == len(worker) == 4
    for i in range(8):
        ends = [t for t, step in enumerate(seen[1:], 1) if step[3][i]]
        if i in worker:
            # those that were not being stepped are cut by their next step
            assert ends in ([3], [4])
            (t,) = ends
            assert seen[t][1][i] == 0
            assert seen[t][4]["final_obs"][i][0] in (10 * (t - 1) + i, 10 * t + i)
            assert seen[t][0][i][0] == i
            assert seen[t + 1][0][i][0] == 10 + i
        else:
            assert not ends
            assert seen[10][0][i][0] == 100 + i
    assert any("Replaced by a new worker" in line for line in venv.restart_messages())
    venv.close()
    assert not workers()


def test_e5_a_late_reply_of_a_lost_worker_is_ignored(tmp_path):
    """The worker is slow, not stuck: it would answer, after its successor has begun."""
    venv = pool(
        2, 2, FaultPolicy(timeout=0.6, restarts=2), kind="stopped", env_index=1, at_step=3, once=str(tmp_path / "f")
    )
    old = venv._workers[1].process.pid
    seen = drive(venv, 8)
    assert not psutil.pid_exists(old)
    assert [step[0][0][0] for step in seen] == [10.0 * t for t in range(9)]
    assert seen[8][0][1][0] == 10 * 5 + 1
    venv.close()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nan obs", "environment 1 returned an observation that is not finite at step 5"),
        ("nan reward", "environment 1 returned a reward of nan at step 5"),
        ("no reward", r"environment 1 \(seed \d+\) failed in step 5: step returned reward None \(object\)"),
    ],
)
@pytest.mark.parametrize("vectorization", ["sync", "pool"])
def test_e6_nan_and_non_numbers_end_the_run(tmp_path, kind, message, vectorization):
    config = short(tmp_path, vectorization=vectorization, normalize_obs=True, normalize_rewards=True)
    trainer = Trainer(config, make_env=FaultEnv)
    trainer.env.venv.close()
    trainer.env.venv = (pool if vectorization == "pool" else serial)(2, kind=kind, env_index=1, at_step=5)
    trainer.rollout.obs[-1].copy_(trainer.env.reset(env_seeds(seed_stream(1, "envs"), 2)))
    with pytest.raises(EnvError, match=message):
        trainer.run()
    assert trainer.policy.encoder.normalizer.mean.isfinite().all()
    assert trainer.reward_normalizer.var.isfinite()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("one number", r"environment 2 .*observation of shape \(1,\); its space says \(2,\)"),
        ("reward array", r"environment 2 .*reward array\(\[1\.\]\) \(float64 of shape \(1,\)\); it must be a number"),
        ("done as int", r"environment 2 .*terminated 1 \(int64\); it must be a bool"),
        ("old tuple", r"environment 2 .*step 5: step returned a tuple of 4; it must return \(obs, reward, terminated,"),
        ("no result", r"environment 2 .*step 5: step returned NoneType; it must return \(obs, reward, terminated,"),
    ],
)
@pytest.mark.parametrize("make", [serial, pool])
def test_e7_e8_e10_shapes_and_types_are_checked_in_every_step(make, kind, message):
    venv = make(kind=kind, env_index=2, at_step=5)
    with pytest.raises(EnvError, match=message):
        drive(venv, 6)
    venv.close()


class Whole(gym.Env):
    """uint8 observations that are handed out wider."""

    observation_space = spaces.Box(0, 255, (3,), np.uint8)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(3, np.uint8), {}

    def step(self, action):
        return np.full(3, 300, np.uint16), 0.0, False, False, {}


def test_e7_whole_numbers_never_wrap():
    venv = SerialVectorEnv([Whole])
    with pytest.raises(EnvError, match="environment 0 .*value 300 .*uint8"):
        drive(venv, 1)


class WideIntegers(Whole):
    """int64 observations in a uint8 space, whose values fit."""

    def step(self, action):
        return np.array([0, 7, 255]), 0.0, True, False, {}


def test_e7_integers_that_fit_their_space_are_cast():
    venv = SerialVectorEnv([WideIntegers])
    venv.reset(seed=0)
    obs, *_, infos = venv.step(np.zeros(1, np.int64))
    assert (obs.dtype, infos["final_obs"].tolist()) == (np.uint8, [[0, 7, 255]])


def test_e7_wider_floats_are_cast_as_gymnasium_casts_them():
    assert drive(serial(kind="wide obs", at_step=2), 3)[2][0].dtype == np.float32


def test_e9_observations_outside_their_space_are_counted_and_said_once(tmp_path):
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    make = Numbered(kind="outside", env_index=1, at_step=5)
    trainer = Trainer(short(tmp_path, total_timesteps=96), make_env=make, console=console)
    counts = [stats.scalars["charts/obs_outside_space"] for stats in trainer.iterations()]
    assert counts == [1, 0, 0, 0, 0, 0]
    text = console.export_text()
    assert text.count("outside its observation_space") == 1
    assert "environment 1" in text


def test_e9_strictly_they_end_the_run(tmp_path):
    make = Numbered(kind="outside", env_index=1, at_step=5)
    trainer = Trainer(short(tmp_path, strict_obs=True), make_env=make)
    with pytest.raises(EnvError, match="environment 1 .*outside its observation_space at step 5"):
        trainer.run()


class BesideAnImage(gym.ObservationWrapper):
    """The observations of an environment beside an image, so that rows are bytes, or another vector."""

    def __init__(self, env, image):
        super().__init__(env)
        self.other = np.zeros((36, 36, 3), np.uint8) if image else np.full(2, 1e6, np.float32)
        other = spaces.Box(0, 255, (36, 36, 3), np.uint8) if image else spaces.Box(-np.inf, np.inf, (2,))
        self.observation_space = spaces.Dict(other=other, speed=env.observation_space)

    def observation(self, observation):
        return {"other": self.other, "speed": observation}


@pytest.mark.parametrize("image", [True, False], ids=["image", "vector"])
def test_e9_every_array_of_an_observation_is_compared_with_its_own_bounds(tmp_path, image):
    make = Numbered(kind="outside", env_index=1, at_step=5)
    trainer = Trainer(short(tmp_path, strict_obs=True), make_env=lambda: BesideAnImage(make(), image))
    with pytest.raises(EnvError, match="environment 1 .*outside its observation_space at step 5"):
        trainer.run()


def test_e12_a_wrong_number_of_actions_is_refused():
    for venv in (serial(), pool()):
        venv.reset(seed=0)
        with pytest.raises((ValueError, EnvError)):
            venv.step(np.zeros(3, np.int64))
        venv.close()


@pytest.mark.parametrize("make", [SerialVectorEnv, PoolVectorEnv])
def test_e13_spaces_that_differ_between_environments_are_refused(make):
    with pytest.raises(EnvError, match=r"environment 1.*Box.*\(3,\).*\(2,\)"):
        make([odd(2), odd(3)])


def test_e14_no_two_environments_ranks_or_restarts_share_a_seed():
    seeds = [env_seeds(seed_stream(1, "envs"), 64, rank, 4) for rank in range(4)]
    seeds += [env_seeds(seed_stream(1, "envs", 0, k), 64, rank, 4) for k in range(1, 4) for rank in range(4)]
    every = np.concatenate(seeds)
    again = [fresh_seed(int(seed), k) for seed in every[:64] for k in (1, 2, 3)]
    every = [*every.tolist(), *again]
    assert len(set(every)) == len(every)
    assert fresh_seed(-1, 2) == -1


def test_e15_infos_that_grow_cost_no_memory():
    venv = PoolVectorEnv([Growing] * 2, n_workers=1)
    venv.reset(seed=0)
    worker = psutil.Process(venv._workers[0].process.pid)
    sizes = []
    for k in range(3000):
        venv.step(np.zeros(2, np.int64))
        if k % 1000 == 999:
            sizes.append(worker.memory_info().rss)
    venv.close()
    assert sizes[-1] - sizes[0] < 2**20


@pytest.mark.parametrize(("kind", "name"), [("killed", "SIGKILL"), ("segfault", "SIGSEGV")])
def test_p1_a_dead_worker_is_named_within_a_second(kind, name):
    venv = pool(kind=kind, env_index=3, at_step=4)
    venv.reset(seed=0)
    for _ in range(3):
        venv.step(np.zeros(4, np.int64))
    begin = time.monotonic()
    with pytest.raises(EnvError, match=f"environments 2-3.*was killed by {name}") as caught:
        venv.step(np.zeros(4, np.int64))
    assert time.monotonic() - begin < 1 + 0.5
    assert ("dmesg" in str(caught.value)) == (name == "SIGKILL")


ORPHANS = """
import sys, time
sys.path.insert(0, {root!r})
import numpy as np
from fastppo.envs.pool import PoolVectorEnv
from tests.faults.worlds import makers
if __name__ == "__main__":
    venv = PoolVectorEnv(makers(2, kind={kind!r}, env_index=1, at_step=2), n_workers=2)
    venv.reset(seed=0)
    print(*(w.process.pid for w in venv._workers), flush=True)
    while True:
        venv.step(np.zeros(2, np.int64))
"""


@pytest.mark.parametrize("kind", ["none", "sleeps", "loops in C", "stopped"])
def test_p3_no_worker_outlives_a_killed_trainer(kind, tmp_path):
    script = tmp_path / "trainer.py"
    script.write_text(ORPHANS.format(root=str(ROOT), kind=kind))
    process = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    with process.stdout:
        pids = [int(pid) for pid in process.stdout.readline().split()]
    time.sleep(0.5)
    process.kill()
    process.wait()
    end = time.monotonic() + 2
    while time.monotonic() < end and any(map(alive, pids)):
        time.sleep(0.05)
    assert not any(map(alive, pids))


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_p4_signals_to_all_processes_of_a_job_leave_the_fork_server_alive(number):
    venv = pool(fault_policy=FaultPolicy(restarts=1))
    venv.reset(seed=0)
    server = psutil.Process(venv._workers[0].process.pid).parent()
    server.send_signal(number)
    time.sleep(0.2)
    assert server.is_running()
    assert venv._problem(venv._workers[0]) is None
    venv.close()


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_p1_p2_a_worker_that_is_lost_between_two_rollouts(tmp_path, how):
    """It is found when it is asked for restart_messages, or for the state of its environments."""
    config = short(
        tmp_path,
        vectorization="pool",
        workers=2,
        on_env_error="restart",
        env_timeout=1.0,
        checkpoint_every=16,
        n_envs=4,
        total_timesteps=320,
    )
    trainer = Trainer(config, make_env=FaultEnv)
    for stats in trainer.iterations():
        if stats.iteration == 3:
            os.kill(trainer.env.venv._workers[1].process.pid, how)
    assert trainer.result.ended == "finished"
    assert stats.scalars["charts/env_restarts"] == 1
    assert trainer.env.venv.seeding[1].sum() == 2


@pytest.mark.parametrize("own_loop", [False, True])
def test_a_keyboard_interrupt_of_an_environment_saves_all_whole_iterations(tmp_path, own_loop):
    class Closed(Counter):
        taken = -(10**6)  # the probes before the training take steps too

        def step(self, action):
            Closed.taken += 1
            if Closed.taken == 3 * 16 + 5:
                raise KeyboardInterrupt
            return super().step(action)

    trainer = Trainer(short(tmp_path, total_timesteps=16 * 8), make_env=Closed)
    Closed.taken = 0
    with pytest.raises(KeyboardInterrupt):
        list(trainer.iterations()) if own_loop else trainer.run()
    assert (trainer.result.ended, trainer.result.iterations) == ("interrupted", 3)
    resumed = resume(tmp_path / "run", make_env=Closed)
    assert resumed.progress.iteration == 3
    assert resumed.run().ended == "finished"


def test_p1_without_restarts_everything_learned_is_saved(tmp_path):
    config = short(tmp_path, vectorization="pool", workers=2, checkpoint_every=16, total_timesteps=320)
    trainer = Trainer(config, make_env=FaultEnv)
    with pytest.raises(EnvError, match="was killed by SIGKILL"):
        for stats in trainer.iterations():
            if stats.iteration == 3:
                os.kill(trainer.env.venv._workers[1].process.pid, signal.SIGKILL)
    assert (tmp_path / "run" / "result.json").exists()
    resumed = resume(tmp_path / "run", make_env=FaultEnv)
    assert resumed.progress.iteration == 3
    assert resumed.run().ended == "finished"


def test_a_lost_worker_counts_once(tmp_path):
    venv = pool(16, 2, FaultPolicy(restarts=2), kind="killed", env_index=3, at_step=3, once=str(tmp_path / "once"))
    drive(venv, 8)
    assert venv.failures == 1
    assert venv.seeding[1].sum() == 8
    venv.close()


def test_lost_workers_and_failed_environments_share_the_number_of_restarts():
    venv = pool(4, 2, FaultPolicy(restarts=1), kind="raises", env_index=3)
    os.kill(venv._workers[0].process.pid, signal.SIGKILL)
    with pytest.raises(EnvError, match="environment 3 .* failed in step"):
        drive(venv, 8)
    assert venv.failures == 1


def test_e2_an_error_that_has_no_text():
    venv = pool(kind="no text", env_index=3, at_step=2)
    with pytest.raises(EnvError, match="environment 3"):
        drive(venv, 5)


@pytest.mark.parametrize("vectorization", ["sync", "pool"])
def test_a_state_that_cant_be_taken_back_restarts_the_environments(tmp_path, vectorization):
    from fastppo.runs.checkpoint import list_checkpoints
    from tests.faults.test_resume import rewrite

    config = short(tmp_path, env_id="CartPole-v1", vectorization=vectorization, total_timesteps=320)
    trainer = Trainer(config)
    for stats in trainer.iterations():
        if stats.iteration == 3:
            break
    (path,) = list_checkpoints(config.run_dir)
    rewrite(path, lambda state: state["values"]["env"]["envs"][1][0].update(type="Other"))
    resumed = resume(config.run_dir)
    assert any("start new episodes with new seeds (the saved environment is Other" in note for note in resumed.notes)
    assert resumed.run().ended == "finished"


def test_p5_workers_ignore_what_is_sent_to_the_whole_group():
    venv = pool()
    venv.reset(seed=0)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        for worker in venv._workers:
            os.kill(worker.process.pid, number)
    venv.step(np.zeros(4, np.int64))
    venv.close()


@pytest.mark.parametrize("kind", ["sleeps", "loops in C", "stopped"])
def test_p11_close_with_a_stuck_worker(kind):
    venv = pool(kind=kind, env_index=0, at_step=1)
    venv.reset(seed=0)
    venv.send(0, np.zeros(4, np.int64))
    time.sleep(0.2)
    begin = time.monotonic()
    venv.close()
    assert time.monotonic() - begin < 5
    assert not workers()
    assert all(child.status() != psutil.STATUS_ZOMBIE for child in psutil.Process().children())


def workers():
    """Worker processes that still live: children of the fork server."""
    return [
        grandchild
        for child in psutil.Process().children()
        for grandchild in child.children()
        if "forkserver" in " ".join(child.cmdline()) and grandchild.status() != psutil.STATUS_ZOMBIE
    ]


def test_p7_workers_are_never_forked_from_the_trainer():
    venv = pool()
    parents = {psutil.Process(worker.process.pid).ppid() for worker in venv._workers}
    assert os.getpid() not in parents
    venv.close()


def test_settings_of_supervision_are_refused_where_nothing_watches(tmp_path):
    with pytest.raises(ConfigError, match="on_env_error=restart needs vectorization=sync or pool"):
        short(tmp_path, vectorization="native", on_env_error="restart")
    with pytest.raises(ConfigError, match="env_timeout needs worker processes"):
        short(tmp_path, env_timeout=3.0)


def test_async_times_out_as_a_whole(tmp_path):
    config = short(tmp_path, vectorization="async", env_timeout=1.0)
    trainer = Trainer(config, make_env=lambda: FaultEnv(kind="sleeps", at_step=10))
    with pytest.raises(EnvError, match="have not answered for 1 s"):
        trainer.run()
