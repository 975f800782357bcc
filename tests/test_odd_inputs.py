"""Environments, modules, paths and terminals that fail in unusual ways: one line each, and never in silence."""

import io
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest

import fastppo
from fastppo import Config, ConfigError, Trainer, evaluate, load_policy
from fastppo.cli import main
from fastppo.errors import EnvError, EnvStartError
from tests.envs.worlds import Counter
from tests.worlds import short


class Exits(Counter):
    """Calls sys.exit() where `place` says."""

    def __init__(self, place, at=20):
        super().__init__()
        self.place, self.left = place, at
        if place == "constructor":
            sys.exit(0)

    def reset(self, **kwargs):
        if self.place == "reset":
            sys.exit(0)
        return super().reset(**kwargs)

    def step(self, action):
        self.left -= 1
        if self.place == "step" and self.left < 0:
            sys.exit(0)
        return super().step(action)


class Unclosable(Counter):
    def close(self):
        raise ZeroDivisionError("not today")


@pytest.mark.parametrize(
    ("place", "vectorization"),
    [
        ("constructor", "sync"),
        ("reset", "sync"),
        ("step", "sync"),
        pytest.param("step", "pool", marks=pytest.mark.slow),
    ],
)
def test_an_environment_that_exits_is_an_error_and_not_the_end_of_the_program(tmp_path, place, vectorization):
    error = EnvError if place == "step" else EnvStartError
    with pytest.raises(error, match="SystemExit"):
        Trainer(short(tmp_path, vectorization=vectorization), make_env=lambda: Exits(place)).run()
    if place == "step":
        assert (tmp_path / "run/result.json").exists()


def test_an_environment_that_exits_can_be_restarted(tmp_path):
    config = short(tmp_path, on_env_error="restart")
    result = Trainer(config, make_env=lambda: Exits("step")).run()
    assert result.ended == "finished"


@pytest.mark.parametrize("vectorization", ["sync", pytest.param("pool", marks=pytest.mark.slow)])
def test_a_close_that_fails_is_a_warning_and_costs_no_run(tmp_path, vectorization):
    with pytest.warns(UserWarning, match=r"Unclosable.close failed: ZeroDivisionError: not today \(test_odd_inputs"):
        result = Trainer(short(tmp_path, vectorization=vectorization), make_env=Unclosable).run()
    assert result.ended == "finished"


@pytest.mark.parametrize(
    ("code", "why"),
    [
        ("def f(:", "invalid syntax (unlucky.py, line 1)"),
        ("1 / 0", "ZeroDivisionError: division by zero (unlucky.py, line 1)"),
        ("import sys; sys.exit(0)", "SystemExit: 0 (unlucky.py, line 1)"),
    ],
)
@pytest.mark.parametrize("flags", ["--env-id unlucky:X-v0", "--wrappers unlucky:X"])
def test_a_module_whose_own_code_fails_is_one_line(tmp_path, monkeypatch, capsys, code, why, flags):
    (tmp_path / "unlucky.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "unlucky", raising=False)
    gym.registry.pop("X-v0", None)
    arguments = ["train", *flags.split(), "--n-envs", "2", "--total-timesteps", "256"]
    assert main([*arguments, "--run-dir", str(tmp_path / "run")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("ConfigError: ")
    assert f"can't import unlucky ({why})" in err
    assert err.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    ["train --run-dir", "train --resume auto --run-dir", "train --init-from", "report", "eval", "resume", "export"],
)
def test_a_path_that_is_too_long_is_one_line(tmp_path, capsys, arguments):
    assert main([*arguments.split(), str(tmp_path / (300 * "x"))]) == 2
    err = capsys.readouterr().err
    assert "xxx can't be a folder here (File name too long); name another." in err
    assert err.count("\n") == 1


def test_python_gets_the_same_errors_for_paths(tmp_path):
    for use in (load_policy, evaluate, fastppo.resume):
        with pytest.raises(ConfigError, match="File name too long"):
            use(tmp_path / (300 * "x"))
    for name in ("run_dir", "init_from"):
        with pytest.raises(ConfigError, match=rf"{name}='a\\x00b' holds a null character"):
            Config(**{name: "a\0b"})


def test_a_terminal_that_lacks_the_characters_of_a_path_gets_them_escaped(tmp_path, monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), "ascii")
    monkeypatch.setattr(sys, "stdout", out)
    arguments = "train --n-envs 2 --n-steps 16 --total-timesteps 32 --compile off --run-dir"
    assert main([*arguments.split(), str(tmp_path / "ünï")]) == 0
    out.flush()
    assert b"\\xfcn\\xef" in out.buffer.getvalue()


def test_a_settings_file_may_begin_with_a_byte_order_mark(tmp_path, capsys):
    path = tmp_path / "run.toml"
    path.write_bytes(b"\xef\xbb\xbfn_envs = 0\n")
    assert main(["train", "--config", str(path)]) == 2
    assert "n_envs=0 must be at least 1" in capsys.readouterr().err


def test_numbers_of_numpy_are_settings():
    config = Config(n_envs=np.int64(2), seed=np.uint8(3), gamma=np.float32(0.5), hidden_sizes=(np.int32(8),))
    assert config.to_dict() == Config(n_envs=2, seed=3, gamma=0.5, hidden_sizes=(8,)).to_dict()
    assert type(config.n_envs) is int
    assert type(config.gamma) is float
    with pytest.raises(ConfigError, match="n_envs"):
        Config(n_envs=np.float32(2.5))


def test_observations_without_an_action_are_refused(tmp_path):
    Trainer(short(tmp_path)).run()
    policy = load_policy(tmp_path / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # 1e300 overflows in float32
        for value in (np.nan, np.inf, 1e300):
            with pytest.raises(ValueError, match="holds a NaN or an infinity"):
                policy.predict([value, 0, 0, 0])
    for value in ("0", None, 1j):
        with pytest.raises(ValueError, match="this policy takes real numbers"):
            policy.predict(np.array([value, 0, 0, 0], object if value is None else None))
    for episodes in (1.5, "2", 0):
        with pytest.raises(ConfigError, match=f"episodes={episodes!r} must be a whole number, at least 1"):
            evaluate(tmp_path / "run", episodes=episodes)
