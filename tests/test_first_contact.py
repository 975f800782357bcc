"""Settings, environments and names as new users type them."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

import fastppo
from fastppo import Config, ConfigError, Trainer, resume
from fastppo.analysis.diff import difference
from fastppo.analysis.run_data import read_run, read_runs
from fastppo.analysis.study import recommend
from fastppo.cli import main, parse
from fastppo.commands.training import _print_result, _time_spent
from fastppo.envs.env_info import inspect_env
from fastppo.envs.factory import find_spec
from fastppo.envs.make_envs import make_vec_env
from fastppo.errors import CheckpointError
from fastppo.evaluation import video
from fastppo.resume_run import continue_run
from fastppo.runs.checkpoint import newest_checkpoint
from fastppo.runtime import threads
from fastppo.runtime.console import progress_console
from tests.envs.worlds import Counter
from tests.test_study import candidate
from tests.worlds import short

MODULE = """
import gymnasium as gym
from gymnasium.envs.classic_control import CartPoleEnv
gym.register("Mine-v0", entry_point=CartPoleEnv, max_episode_steps=50)
class Halve(gym.ObservationWrapper):
    def observation(self, obs):
        return obs / 2
def limit(env):
    return gym.wrappers.TimeLimit(env, 7)
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A working folder with a module of the user's own."""
    (tmp_path / "beside.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "beside", raising=False)
    yield tmp_path
    gym.registry.pop("Mine-v0", None)


# numbers, paths and aliases


@pytest.mark.parametrize("given", [{"run_dir": "runs/x"}, {"init_from": "runs/x"}])
def test_paths_may_be_text(given):
    assert Config(**given) == Config(**{name: Path(path) for name, path in given.items()})


@pytest.mark.parametrize("name", ["total_timesteps", "eval_every", "checkpoint_every", "n_envs"])
def test_whole_numbers_may_be_written_as_floats_in_python_toml_and_flags(name, tmp_path):
    (tmp_path / "run.toml").write_text(f"{name} = 1e6")
    flag = f"--{name.replace('_', '-')}"
    for config in (
        Config(**{name: 1e6}),
        parse(["train", "--config", str(tmp_path / "run.toml")]).settings(),
        parse(["train", flag, "1e6"]).settings(),
        parse(["train", flag, "1_000_000"]).settings(),
    ):
        value = getattr(config, name)
        assert value == 1_000_000
        assert type(value) is int
    with pytest.raises(ConfigError, match=rf"{name}=1\.5 must be a whole number"):
        Config(**{name: 1.5})
    assert parse(["resume", "run", "--total-timesteps", "2e6"]).total_timesteps == 2_000_000


def test_aliases_work_in_python_too():
    assert Config(num_envs=4, num_steps=8, num_minibatches=2) == Config(n_envs=4, n_steps=8, n_minibatches=2)
    with pytest.raises(ConfigError, match="n_envs is given twice, once under an alias"):
        Config(n_envs=4, num_envs=4)


def test_less_than_one_iteration_is_refused_with_the_numbers(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", n_envs=1000, total_timesteps=2048)
    with pytest.raises(ConfigError, match=r"=2,048 is less than one iteration of 8,000 steps .*1,000 x n_steps=8"):
        Trainer(config)
    assert not config.run_dir.exists()


def test_a_study_refuses_less_than_one_iteration_before_its_first_run(tmp_path, capfd):
    arguments = ["--n-envs", "4", "16", "--hold", "n_steps", "--total-timesteps", "1000", "--run-dir", str(tmp_path)]
    assert main(["study", *arguments]) == 2
    assert "less than one iteration of 2,048 steps (n_envs=16 x n_steps=128)" in capfd.readouterr().err
    assert not list(tmp_path.iterdir())


# environments and wrappers


@pytest.mark.parametrize(
    ("given", "near"),
    [
        ("ALE/Pong-v4", "ALE/Pong-v5"),
        ("cartpole-v1", "CartPole-v1"),
        ("CartPole-v7", "CartPole-v1"),
        ("Pong-v5", "ALE/Pong-v5"),
        ("Catch-v0", "fastppo/Catch-v0"),
        ("LunarLandr-v3", "LunarLander-v3"),
    ],
)
def test_the_nearest_id_has_the_same_name(given, near):
    if near.startswith("ALE/"):
        gym.register_envs(pytest.importorskip("ale_py"))
    with pytest.raises(ConfigError, match=f"did you mean {near}"):
        find_spec(given)


def test_an_environment_beside_the_user_is_found_also_by_workers(module, capsys):
    arguments = (
        "train --env-id beside:Mine-v0 --wrappers beside:Halve beside:limit --n-envs 4 --n-steps 8 --compile off"
    )
    arguments += " --total-timesteps 64 --run-dir run --vectorization pool"
    command = [sys.executable, "-c", "import sys; from fastppo.cli import main; sys.path.remove(''); sys.exit(main())"]
    done = subprocess.run([*command, *arguments.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "fastppo eval run --episodes 20 --allow-import" in done.stdout, "the printed command works"
    assert main(["eval", "run", "--episodes", "2"]) == 2
    assert "beside:Mine-v0 and wrappers beside:Halve beside:limit, which imports code" in capsys.readouterr().err
    assert main(["eval", "run", "--episodes", "2", "--allow-import"]) == 0
    assert "length 7.0" in capsys.readouterr().out, "an evaluation applies the wrappers"
    assert main(["resume", "run", "--total-timesteps", "96"]) == 2
    assert main(["resume", "run", "--total-timesteps", "96", "--allow-import"]) == 0
    (module / "x.toml").write_text('wrappers = ["beside:Halve"]')
    assert main(["train", "--config", "x.toml"]) == 2
    assert "add --wrappers beside:Halve" in capsys.readouterr().err
    assert main(["verify-env", "--wrappers", "beside:Halve", "--steps", "3"]) == 0


@pytest.mark.parametrize("vectorization", ["sync", "async", "pool"])
def test_wrappers_are_applied_from_the_inside_out_in_each_vectorization(module, vectorization):
    info = inspect_env("CartPole-v1", {}, wrappers=("gymnasium.wrappers:FlattenObservation", "beside:Halve"))
    plain = inspect_env("CartPole-v1", {})
    wrapped, bare = (make_vec_env(x, 2, vectorization) for x in (info, plain))
    seeds = np.array([1, 2])
    try:
        assert (2 * wrapped.reset(seeds) == bare.reset(seeds)).all()
    finally:
        wrapped.close()
        bare.close()


def test_auto_vectorization_leaves_out_what_takes_no_wrappers(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    wrappers = ("gymnasium.wrappers:FlattenObservation",)
    settings = {"env_id": "CartPole-v1", "n_envs": 64, "n_steps": 2, "vectorization": "auto", "compile": "off"}
    trainer = Trainer(short(tmp_path, **settings, wrappers=wrappers))
    assert "native" not in trainer.notes[0]
    trainer.run()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wrappers": ["nonsense"]}, "'nonsense' must be MODULE:NAME"),
        ({"wrappers": ("gymnasium.wrappers:TimeLimit",), "vectorization": "native"}, "need Gymnasium environments"),
        ({"wrappers": ("gymnasium.wrappers:TimeLimit",), "vectorization": "envpool"}, "need Gymnasium environments"),
        ({"wrappers": ("gymnasium.wrappers:TimeLimit",), "vectorization": "tensor"}, "need Gymnasium environments"),
        ({"wrappers": ("gymnasium.wrappers:TimeLimit",)}, "refuses the environment .*max_episode_steps"),
        ({"wrappers": ("gymnasium.wrappers:FlattenObservations",)}, "did you mean .*:FlattenObservation"),
        ({"wrappers": ("nowhere_at_all:X",)}, "can't import nowhere_at_all .*working folder"),
        ({"wrappers": ("builtins:id",)}, "returned int; it must return a gymnasium Env"),
    ],
)
def test_wrappers_that_cannot_be_applied_are_refused_with_one_line(tmp_path, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        Trainer(short(tmp_path, env_id="CartPole-v1", **settings))
    assert "\n" not in str(error.value)


def test_wrappers_apply_to_environments_but_not_to_vector_environments_of_make_env(tmp_path):
    config = short(tmp_path, wrappers=("gymnasium.wrappers:FlattenObservation",))
    assert "FlattenObservation" in str(inspect_env("", {}, Counter, config.wrappers).factory())
    with pytest.raises(ConfigError, match="make_env returned SyncVectorEnv; apply them in make_env"):
        Trainer(config, make_env=lambda: gym.vector.SyncVectorEnv([Counter, Counter]))


def test_a_warning_of_the_constructor_is_shown_once(recwarn):
    class Old(Counter):
        def __init__(self):
            super().__init__()
            gym.logger.deprecation("Old is out of date")

    make_vec_env(inspect_env("", {}, Old), 4, "sync").close()
    assert sum("out of date" in str(warning.message) for warning in recwarn) == 1


# resume with other settings


def test_resume_auto_takes_other_n_envs_and_learning_rate_with_a_note(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", compile="off", total_timesteps=160)
    for stats in Trainer(config).iterations():
        if stats.iteration == 4:
            break
    policy = fastppo.load_policy(config.run_dir).policy.state_dict()
    trainer = continue_run(dataclasses.replace(config, n_envs=4, learning_rate=1e-3), config.run_dir)
    assert (trainer.progress.iteration, trainer.n_iterations, trainer.metrics.global_step) == (2, 5, 64)
    assert all((x == policy[name]).all() for name, x in trainer.policy.state_dict().items())
    notes = " ".join(trainer.notes)
    assert "n_envs was 2, is 4" in notes
    assert "learning_rate was 0.00025, is 0.001" in notes
    assert trainer.run().global_step == 160


def test_a_learning_rate_alone_keeps_the_environments_where_they_are(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", compile="off")
    next(loop := Trainer(config).iterations())
    loop.close()
    trainer = continue_run(dataclasses.replace(config, ent_coef=0.1), config.run_dir)
    assert "exact" in trainer.notes[-2]
    assert "ent_coef was 0.01, is 0.1" in trainer.notes[-1]
    trainer.run()


def test_settings_without_a_meaning_in_a_resume_name_init_from(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", compile="off")
    next(loop := Trainer(config).iterations())
    loop.close()
    with pytest.raises(CheckpointError, match=r"sign_rewards was False, is True.*--init-from .*run"):
        continue_run(dataclasses.replace(config, sign_rewards=True), config.run_dir)
    with pytest.raises(CheckpointError, match="exact_resume: .*gamma was 0.99, is 0.9"):
        continue_run(dataclasses.replace(config, gamma=0.9, exact_resume=True), config.run_dir)


# the loop in Python


def test_own_figures_reach_every_sink_and_the_run_data(tmp_path):
    trainer = Trainer(short(tmp_path, compile="off"), make_env=Counter)
    with pytest.raises(RuntimeError, match="works in the loop"):
        trainer.log("custom/x", 1.0)
    for stats in trainer.iterations():
        trainer.log("custom/success", torch.tensor(10.0 * stats.iteration, requires_grad=True))  # without a warning
        for tag in ("success", "losses/own"):
            with pytest.raises(ValueError, match="must be GROUP/NAME"):
                trainer.log(tag, 1.0)
    lines = [json.loads(line) for line in (trainer.run_dir / "metrics.jsonl").read_text().splitlines()]
    own = [(row["global_step"], row["custom/success"]) for row in lines if "custom/success" in row]
    assert own == [(16, 10), (32, 20), (48, 30)]
    run = read_run(trainer.run_dir)
    assert len(run) == 3
    assert run.column("custom/success").tolist() == [10, 20, 30]
    assert not run.damaged
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(trainer.run_dir)).Reload()
    assert [(e.step, e.value) for e in events.Scalars("custom/success")] == own


def test_a_policy_saved_in_the_loop_can_be_loaded_evaluated_and_started_from(tmp_path):
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", compile="off"))
    for stats in trainer.iterations():
        if stats.iteration == 2:
            trainer.save(str(tmp_path / "second"))
    assert len(fastppo.evaluate(tmp_path / "second", 2).returns) == 2
    Trainer(short(tmp_path, env_id="CartPole-v1", run_dir=tmp_path / "b", init_from=tmp_path / "second")).run()
    for folder in (trainer.run_dir, newest_checkpoint(trainer.run_dir)[0]):
        with pytest.raises(ConfigError, match="holds a run or a checkpoint"):
            trainer.save(folder)
    assert newest_checkpoint(trainer.run_dir)[1] == []


def test_progress_is_shown_in_a_terminal_or_on_request(tmp_path, capsys, monkeypatch):
    assert progress_console(None) is None
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    assert progress_console(None) is not None
    assert progress_console(False) is None
    monkeypatch.undo()
    Trainer(short(tmp_path, compile="off"), make_env=Counter, progress=True).run()
    assert "48/48 steps" in capsys.readouterr().out
    run = resume(tmp_path / "run", make_env=Counter, total_timesteps=1e2, progress=True)
    run.run()
    assert "96/96 steps" in capsys.readouterr().out


# conclusions


def test_a_study_without_a_comparison_recommends_nothing():
    text = recommend([candidate(4, 1, 1, 1, 1000)], 475)
    assert "Use" not in text
    assert "One seed proves nothing" in text
    assert "proves nothing" not in recommend([candidate(4, 5, 5, 1, 1000)], 475)
    text = recommend([candidate(4, 1, 1, 1, 1000), candidate(8, 1, 1, 2, 1000)], 475)
    assert "Use" not in text
    assert "cannot rank them" in text


def test_diff_does_not_compare_returns_of_different_environments(tmp_path):
    for env_id in ("CartPole-v1", "Pendulum-v1"):
        Trainer(short(tmp_path, env_id=env_id, run_dir=tmp_path / env_id, compile="off")).run()
    found = difference(*read_runs([tmp_path / "CartPole-v1", tmp_path / "Pendulum-v1"]))
    assert found.returns == found.numbers == "not compared: CartPole-v1 and Pendulum-v1 are different environments"


def test_far_more_threads_than_cores_are_refused(monkeypatch):
    monkeypatch.setattr(threads, "usable_cores", lambda: 2)
    assert threads.check_threads(2, resumed=False) == []
    assert "more than the 2 usable cores" in threads.check_threads(16, resumed=False)[0]
    with pytest.raises(ConfigError, match="threads=1000, but this process may use 2 cores; give at most 2"):
        threads.check_threads(1000, resumed=False)
    assert threads.check_threads(1000, resumed=True)


def test_the_result_says_how_many_episodes_its_mean_is_of(tmp_path, capsys):
    from rich.console import Console

    trainer = Trainer(short(tmp_path, compile="off"), make_env=Counter)
    result = trainer.run()
    _print_result(Console(), result, trainer.config)
    assert f"({result.episodes} episodes)" in capsys.readouterr().out
    _print_result(Console(), dataclasses.replace(result, episodes=101), trainer.config)
    assert "(last 100 of 101 episodes)" in capsys.readouterr().out


def test_time_spent_names_all_of_the_wall_time(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", compile="off", eval_every=16, eval_episodes=1)
    result = Trainer(config).run()
    phases = dict.fromkeys(result.phases, 0.0) | {"env": 2.0, "evaluation": 4.0, "video": 1.0}
    shown = _time_spent(dataclasses.replace(result, wall_seconds=10.0, setup_seconds=2.5, phases=phases))
    assert shown == "10.0 s after imports: evaluation 40%  set-up 25%  env 20%  video 10%  other 5%"


def test_verify_resume_does_not_call_restarted_environments_the_same_run(capsys):
    arguments = "verify-resume --vectorization async --n-envs 2 --n-steps 8 --iterations 2 --compile off"
    assert main(arguments.split()) == 0
    last = capsys.readouterr().out.splitlines()[-1]
    assert "a resumed run is the same run" not in last
    assert "start new episodes" in last


def test_names_of_the_package_can_be_listed():
    assert {"Trainer", "Config", "evaluate", "__version__"} <= set(dir(fastppo))


def test_rendering_needs_no_display(monkeypatch):
    for name in ("DISPLAY", "WAYLAND_DISPLAY", "MUJOCO_GL"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(video.ctypes.util, "find_library", lambda name: name == "OSMesa" or None)
    video.choose_renderers()
    assert video.os.environ.get("MUJOCO_GL") == ("osmesa" if sys.platform == "linux" else None)
    monkeypatch.setenv("MUJOCO_GL", "egl")
    video.choose_renderers()
    assert video.os.environ["MUJOCO_GL"] == "egl", "the user's choice wins"


def test_a_video_that_cannot_be_rendered_fails_before_episodes_are_played(tmp_path, monkeypatch, capsys):
    pytest.importorskip("imageio")
    Trainer(short(tmp_path, env_id="CartPole-v1", compile="off")).run()
    monkeypatch.setattr("fastppo.evaluation.saved_policy.evaluate", lambda *_, **__: pytest.fail("played first"))
    monkeypatch.setattr(gym.envs.classic_control.CartPoleEnv, "render", lambda _: 1 / 0)
    assert main(["eval", str(tmp_path / "run"), "--video", str(tmp_path / "a.gif")]) == 2
    assert "can't be rendered: division by zero" in capsys.readouterr().err


def test_the_dump_of_an_own_network_names_the_python_call(tmp_path):
    import torch

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(2, 3)

        def forward(self, x):
            out = self.layer(x)
            return out[:, :2], out[:, 2]

    trainer = Trainer(short(tmp_path, compile="off", max_skipped=1), make_env=Counter, policy=Network())
    trainer.update.parameters.vector.fill_(float("nan"))
    with pytest.raises(fastppo.FastPPOError, match=r"nan_replay\.replay\('.*capsule-.*', policy=\.\.\.\)"):
        trainer.run()
