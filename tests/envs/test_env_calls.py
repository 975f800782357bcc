"""Methods and attributes of environments, called and set from the training loop, in every vectorisation."""

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeReward

from fastppo import Trainer, resume
from fastppo.envs.fault_policy import FaultPolicy
from fastppo.envs.gymnasium_vector import GymnasiumVecEnv
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.envs.pool import PoolVectorEnv
from fastppo.envs.sync import SerialVectorEnv
from fastppo.envs.vec_env import env_seeds
from fastppo.errors import EnvError
from tests.envs.worlds import Level
from tests.worlds import short, step

N = 5


def level():
    return NormalizeReward(Level(((3, False),)))


def make(kind):
    """Return five environments, which have the attribute `number`."""
    if kind == "gymnasium":
        env = GymnasiumVecEnv(SyncVectorEnv([level] * N, autoreset_mode=AutoresetMode.SAME_STEP))
    elif kind == "one for all":
        venv = PoolVectorEnv([level] * N, n_workers=2)
        env = make_vec_env(inspect_env("", {}, lambda: venv), N, "sync")
    else:
        halves = kind == "half-batches"
        vectorization = "pool" if halves else kind
        env = make_vec_env(inspect_env("", {}, level), N, vectorization, n_workers=2, half_batches=halves)
    env.reset(env_seeds(np.random.SeedSequence(7), N))
    env.set_attr("number", list(range(N)))
    return env


@pytest.fixture(params=["sync", "pool", "half-batches", "async", "gymnasium", "one for all"])
def env(request):
    env = make(request.param)
    env.kind = request.param
    yield env
    env.close()


def levels(env):
    return step(env, torch.zeros(N, dtype=torch.int64)).obs[:, 2].tolist()


def one_line(error):
    text = str(error.value)
    assert "\n" not in text
    return text


def test_calls_and_attributes_are_gymnasiums(env):
    sync = SyncVectorEnv([level] * N, autoreset_mode=AutoresetMode.SAME_STEP)
    sync.reset(seed=0)
    sync.set_attr("number", tuple(range(N)))
    for name, arguments, options in (
        ("harder", (), {}),
        ("harder", (2,), {}),
        ("harder", (), {"by": 3}),
        ("level", (), {}),
        ("number", (), {}),
        ("fail_in", (9,), {}),
    ):
        found = env.call(name, *arguments, **options)
        assert type(found) is tuple
        assert found == sync.call(name, *arguments, **options), name
    assert env.call("harder", name="number") == sync.get_attr("level"), "a method may have an argument `name`"
    assert env.get_attr("number") == tuple(range(1, N + 1))
    for values in ([4, 5, 6, 7, 8], (1, 2, 3, 4, 5), 7, "hard", None):
        env.set_attr("level", values)
        sync.set_attr("level", values)
        assert env.get_attr("level") == sync.get_attr("level")
    sync.close()


def test_the_next_step_shows_what_was_set(env):
    assert levels(env) == [1] * N
    env.call("harder", by=2)
    assert levels(env) == [3] * N
    env.set_attr("level", list(range(10, 10 + N)))
    assert levels(env) == [10, 11, 12, 13, 14]


def test_wrong_names_and_numbers_are_one_line_and_harm_nothing(env):
    with pytest.raises(EnvError, match=r"environment 0 .*has no method or attribute 'hardr'") as error:
        env.call("hardr")
    assert env.kind == "async" or "(Level) has no method or attribute 'hardr'; did you mean 'harder'?" in one_line(
        error
    )
    with pytest.raises(EnvError, match="environment 0 .*has no method or attribute 'velocity'; its wrappers") as error:
        env.set_attr("velocity", 3)
    one_line(error)
    with pytest.raises(EnvError, match="has no method or attribute 'velocity'"):
        env.get_attr("velocity")
    with pytest.raises(EnvError, match="set_attr got 2 values for 5 environments; give one value, or one for each"):
        env.set_attr("level", [1, 2])
    for name in ("reset", "step", "close"):
        with pytest.raises(EnvError, match=f"call\\('{name}'\\): the trainer itself steps, resets and closes"):
            env.call(name)
        with pytest.raises(EnvError, match=f"set_attr\\('{name}'\\): the trainer itself steps, resets and closes"):
            env.set_attr(name, 3)
    assert levels(env) == [1] * N
    assert env.call("harder") == (2,) * N


def test_a_method_that_raises_names_its_environment(env):
    with pytest.raises(
        EnvError, match=r"^environment 3 failed in call\('fail_in'\): ValueError: no such level"
    ) as error:
        env.call("fail_in", 3)
    one_line(error)
    assert error.value.__cause__ is not None
    if env.kind == "async":  # Gymnasium ends the worker
        for again in (lambda: env.call("level"), lambda: levels(env)):
            with pytest.raises(EnvError, match="a worker process of AsyncVectorEnv failed before"):
                again()
        return
    assert "worlds.py, line" in str(error.value)
    assert levels(env) == [1] * N, "a failed call leaves the environments able to go on"
    assert env.call("fail_in", 9) == tuple(range(N))
    with pytest.raises(EnvError, match=r"environment 0 failed in call\('leave'\): SystemExit"):
        env.call("leave")
    with pytest.raises(EnvError, match=r"environment 0 failed in set_attr\('fixed'\): AttributeError"):
        env.set_attr("fixed", 3)
    with pytest.raises(EnvError, match=r"environment 0 failed in call\('harder'\): TypeError"):
        env.call("harder", nonsense=3)
    assert [step(env, torch.zeros(N, dtype=torch.int64)).obs[:, 0].tolist() for _ in range(3)] == [
        [2] * N,
        [0] * N,
        [1] * N,
    ], "episodes go on"


@pytest.mark.parametrize("kind", ["sync", "pool", "gymnasium"])
def test_what_a_failed_call_did_before_its_error_stays(kind):
    env = make(kind)
    env.set_attr("level", [1, 1, 1, None, 1])
    with pytest.raises(EnvError, match="environment 3 failed in call"):
        env.call("harder")
    assert env.get_attr("level") == (2, 2, 2, None, 1)
    env.close()


@pytest.mark.parametrize("kind", ["pool", "half-batches"])
def test_what_cannot_travel_to_a_worker_leaves_the_pool_running(kind):
    env = make(kind)

    class Explodes:
        def __reduce__(self):
            return (int, ("no number",))

    try:
        for values, message in (
            ((step for step in range(3)), "the arguments can't be pickled for a worker process: TypeError"),
            (Explodes(), "a worker process can't unpickle the arguments: ValueError: invalid literal"),
        ):
            with pytest.raises(EnvError, match=message) as error:
                env.set_attr("level", values)
            one_line(error)
            assert env.get_attr("number") == tuple(range(N))
        with pytest.raises(EnvError, match=r"results of call\('unpicklable'\) can't be pickled: TypeError") as error:
            env.call("unpicklable")
        one_line(error)
        large = np.arange(10**6)
        env.set_attr("level", [large + i for i in range(N)])
        assert all(np.array_equal(found, large + i) for i, found in enumerate(env.get_attr("level")))
        env.set_attr("level", 4)
        assert levels(env) == [4] * N
    finally:
        env.close()


def test_a_pool_that_steps_is_not_called():
    venv = PoolVectorEnv([level] * 4, n_workers=2, n_groups=2)
    try:
        venv.reset(seed=0)
        venv.send(0, np.zeros(2, np.int64))
        for access in (lambda: venv.call("harder"), lambda: venv.set_attr("level", 3)):
            with pytest.raises(EnvError, match="a step of the environments is under way; do it between iterations"):
                access()
        venv.wait(0)
        assert venv.call("harder") == (2, 2, 2, 2)
        venv.close()
        with pytest.raises(EnvError, match="the pool is closed"):
            venv.call("harder")
    finally:
        venv.close()


def test_a_worker_that_dies_in_a_call_is_replaced_or_ends_the_run():
    policy = FaultPolicy(restarts=2)
    env = make_vec_env(inspect_env("", {}, level), N, "pool", n_workers=2, fault_policy=policy)
    try:
        env.reset(env_seeds(np.random.SeedSequence(7), N))
        env.set_attr("number", list(range(N)))
        with pytest.raises(EnvError, match="a worker process died and was replaced"):
            env.call("exit_in", 4)
        assert any("exited with 3" in line for line in env.restart_messages())
        env.set_attr("level", 4)
        levels(env)
        assert levels(env) == [4] * N
        assert env.restarts == 1
    finally:
        env.close()
    strict = PoolVectorEnv([level] * 2, n_workers=2)
    strict.reset(seed=0)
    with pytest.raises(EnvError, match="exited with 3"):
        strict.call("exit_in", 0)
    strict.close()


@pytest.mark.parametrize("vectorization", ["native", "tensor"])
def test_environments_without_python_objects_say_so(vectorization):
    env = make_vec_env(inspect_env("CartPole-v1", {}), 2, vectorization)
    for access in (lambda: env.call("harder"), lambda: env.get_attr("level"), lambda: env.set_attr("level", 1)):
        with pytest.raises(
            EnvError, match="gives no access to single environments; use vectorization sync, pool or"
        ) as e:
            access()
        one_line(e)
    env.close()


@pytest.mark.parametrize("changes", [{}, {"vectorization": "pool", "workers": 2, "half_batches": True}])
def test_a_curriculum_in_the_training_loop(tmp_path, changes):
    """The observations of a rollout show the level that was set before it, and no other."""
    config = short(tmp_path, n_envs=4, n_steps=6, total_timesteps=4 * 6 * 4, n_minibatches=1, **changes)
    trainer, seen = Trainer(config, lambda: Level(((3, False),))), []
    for stats in trainer.iterations():
        seen.append(trainer.rollout.transitions().obs[1:, :, 2].unique().tolist())
        assert trainer.env.call("harder") == (stats.iteration + 1,) * 4
    assert seen == [[1], [2], [3], [4]]


class NotPlain(Level):
    """Its helper rules out an exact resume, so that episodes are replayed."""

    def __init__(self):
        super().__init__(((4, False),))
        self.helper = object()


def test_an_episode_in_which_a_level_was_set_is_not_replayed():
    makers, policy = [NotPlain, NotPlain], FaultPolicy("replay")
    venv, actions = SerialVectorEnv(makers, policy), np.zeros(2, np.int64)
    venv.reset(seed=0)
    venv.step(actions)
    venv.call("level")
    assert venv.env_states(), "reading changes nothing"
    venv.set_attr("level", [1, 5])
    assert not venv.env_states()
    for _ in range(3):
        venv.step(actions)
    states = venv.env_states()
    assert states, "the open episodes began after it"
    twin = SerialVectorEnv(makers, policy)
    twin.reset(seed=0)
    assert np.array_equal(twin.load_env_states(states), venv.step(actions)[0] - [[1, 0, 0]])
    assert twin.call("level") == (1, 5)
    venv.call("harder")
    assert not venv.env_states()


def test_a_level_survives_an_exact_resume(tmp_path):
    config = short(tmp_path, n_envs=2, n_steps=5, total_timesteps=40, n_minibatches=1)
    trainer = Trainer(config, lambda: Level(((3, False),)))
    assert trainer.env.resume_support.way == "exact"
    for _ in trainer.iterations():
        trainer.env.set_attr("level", [3, 5])
        break
    again = resume(tmp_path / "run", make_env=lambda: Level(((3, False),)))
    for _ in again.iterations():
        assert again.env.get_attr("level") == (3, 5)
        break


@pytest.mark.parametrize("stop", ["break", "request_stop"])
@pytest.mark.parametrize("access", ["set_attr", "call"])
def test_the_last_change_survives_a_stop_at_a_step_that_was_saved(tmp_path, stop, access):
    """Each iteration's checkpoint is written before the body of the loop, which then changes the environments."""
    config = short(tmp_path, n_envs=2, n_steps=5, total_timesteps=60, n_minibatches=1, checkpoint_every=10)
    trainer = Trainer(config, lambda: Level(((3, False),)))
    for stats in trainer.iterations():
        if stats.iteration == 2:
            if access == "call":
                trainer.env.call("harder", by=6)
            else:
                trainer.env.set_attr("level", 7)
            trainer.request_stop()
            if stop == "break":
                break
    again = resume(tmp_path / "run", make_env=lambda: Level(((3, False),)))
    assert again.env.get_attr("level") == (7, 7)
    again.env.close()


def test_a_checkpoint_is_kept_if_a_failed_call_has_ended_the_environments(tmp_path):
    changes = {"vectorization": "pool", "workers": 1, "checkpoint_every": 10}
    config = short(tmp_path, n_envs=2, n_steps=5, total_timesteps=60, n_minibatches=1, **changes)
    trainer = Trainer(config, lambda: Level(((3, False),)))
    with pytest.raises(EnvError, match="exited with 3"):
        for _ in trainer.iterations():
            trainer.env.set_attr("level", 7)
            trainer.env.call("exit_in", 0)
    again = resume(tmp_path / "run", make_env=lambda: Level(((3, False),)))
    assert any("continues its episodes" in note or "exact" in note for note in again.notes)
    assert again.env.get_attr("level") == (1, 1)
    again.env.close()
