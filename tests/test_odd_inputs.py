"""Environments, modules, paths and terminals that fail in unusual ways: one line each, and never in silence."""

import dataclasses
import inspect
import io
import re
import sys
import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch

import fastppo
from fastppo import Config, ConfigError, Trainer, evaluate, load_policy
from fastppo.analysis.report import report
from fastppo.cli import main
from fastppo.errors import EnvError, EnvStartError
from fastppo.evaluation.export import export
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


class Network(torch.nn.Module):
    """A policy of the user's own for CartPole."""

    def __init__(self, weight=0.1):
        super().__init__()
        self.layer = torch.nn.Linear(4, 3)
        torch.nn.init.constant_(self.layer.weight, weight)

    def forward(self, x):
        out = self.layer(x)
        return out[:, :2], out[:, 2]


class Logarithm(Network):
    def forward(self, x):
        params, value = super().forward(x)
        return params, (value - 1e3).log()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The folder of a run on CartPole."""
    folder = tmp_path_factory.mktemp("odd")
    Trainer(short(folder, env_id="CartPole-v1", compile="off")).run()
    return folder / "run"


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("", "='' is an empty path; name a file or folder"),
        (None, " is None; give a path"),
        (3, " is an int; give a path, as text or pathlib.Path."),
        (b"x", " is a bytes; give a path"),
        (Config(), " is a Config; give a path, as text or pathlib.Path, such as its run_dir."),
    ],
)
def test_what_is_no_path_is_one_line(run, path, why):
    for use in (load_policy, evaluate, fastppo.resume):
        with pytest.raises(ConfigError, match=re.escape("run" + why)):
            use(path)
    if path is not None:  # by default beside the run
        with pytest.raises(ConfigError, match=re.escape("output" + why)):
            export(run, path, "pt2")
        with pytest.raises(ConfigError, match=re.escape("run_dir" + why)):
            Config(run_dir=path)
    with pytest.raises(ConfigError, match=re.escape("output" + why)):
        report([run], path)


def test_a_saved_policy_in_place_of_its_folder_is_one_line(run):
    with pytest.raises(ConfigError, match="run is a SavedPolicy; give a path"):
        evaluate(load_policy(run))


def test_an_output_that_is_a_folder_or_a_file_of_the_run_is_refused(run, capsys):
    before = {path: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for arguments in ("export --format pt2", "report"):
        work = arguments.split()[0]
        for output, why in (
            (run, "is a folder; name a file in it."),
            (run / "nowhere" / "x", f"can't be written (there is no folder {run / 'nowhere'})."),
            (run / "model.json", "is a file that runs keep, which would be lost; name another."),
            (run / "metrics.jsonl", "is a file that runs keep"),
        ):
            assert main([*arguments.split(), str(run), "-o", str(output)]) == 2
            err = capsys.readouterr().err
            assert f"{work}: {output} {why}" in err
            assert err.count("\n") == 1
    assert before == {path: path.read_bytes() for path in run.iterdir() if path.is_file()}


def test_an_unknown_format_is_refused(run):
    with pytest.raises(ConfigError, match="export: format='pt3' must be onnx or pt2"):
        export(run, "x", "pt3")


@pytest.mark.parametrize(("policy", "kind"), [(Network, "the class Network"), ("mlp", "a str"), (len, "a builtin")])
def test_a_policy_that_is_no_module_is_one_line(tmp_path, policy, kind):
    with pytest.raises(ConfigError, match=f"policy is {kind}.*; give an instance of torch.nn.Module"):
        Trainer(short(tmp_path, env_id="CartPole-v1"), policy=policy)


def test_a_network_that_returns_nan_is_not_said_to_have_dropout(tmp_path):
    for network, why in (
        (Network(float("nan")), "Network returns NaN .*; its parameter layer.weight holds a NaN"),
        (Logarithm(), "Logarithm returns NaN .*; look for a division by 0 or a logarithm"),
    ):
        with pytest.raises(ConfigError, match=why):
            Trainer(short(tmp_path, env_id="CartPole-v1"), policy=network)


def test_an_environment_that_does_not_fit_the_policy_is_named(run):
    with pytest.raises(ConfigError, match=r"Acrobot-v1 has other spaces .*vector \(4,\) there, vector \(6,\) here"):
        evaluate(run, 1, make_env=lambda: gym.make("Acrobot-v1"))


def test_unknown_settings_and_files_are_named(tmp_path):
    for make in (lambda: Config(gama=1), lambda: dataclasses.replace(Config(), gama=1)):
        with pytest.raises(ConfigError, match="unknown setting 'gama'; did you mean gamma"):
            make()
    with pytest.raises(ConfigError, match="unknown setting 'nunenvs'; did you mean num_envs"):
        Config(nunenvs=1)
    with pytest.raises(ConfigError, match=r"^a\.toml: gamma=2 must be at most 1"):
        Config.from_dict({"gamma": 2}, "a.toml")
    assert inspect.signature(Config).parameters["n_envs"].default is None


def test_other_objects_in_place_of_arguments_are_one_line(tmp_path, run):
    config = short(tmp_path, env_id="CartPole-v1")
    for make, why in (
        (lambda: Trainer(config, make_env=3), "make_env is an int; it must be a function"),
        (lambda: Trainer(config, console=True), "console is a bool; give a rich.console.Console, or progress=True"),
        (lambda: Trainer(config, resume_from=run), "is no checkpoint of a run; call fastppo.resume"),
        (lambda: Trainer("CartPole-v1"), "Trainer takes a Config, not a str"),
        (lambda: load_policy(run, device="tpu"), "device='tpu' must be auto, cpu, cuda or cuda:K"),
        (lambda: load_policy(run, seed=1.5), "seed is a float; give a whole number"),
        (lambda: evaluate(run, 1, seed="a"), "seed is a str; give a whole number"),
    ):
        with pytest.raises(ConfigError, match=why) as error:
            make()
        assert "\n" not in str(error.value)


def test_figures_that_are_no_number_are_one_line(tmp_path):
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", compile="off"))
    for value, kind in (("high", "a str"), (torch.zeros(2), "a Tensor"), (None, "None")):
        with pytest.raises(ValueError, match=f"the value of 'custom/x' is {kind}; give one number"):
            trainer.log("custom/x", value)
    trainer.run()
