"""Profiles: other programs' defaults as settings, what each of their keywords changes, and the command that prints."""

import dataclasses
import inspect
from typing import get_args

import pytest

from fastppo.cli import main, parse
from fastppo.config import DEFAULTS, SETTINGS, Config, fill_defaults
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, PROFILES, ProfileName

# The constructors of PPO1 and PPO2, as their documentation prints them
PPO1 = {
    "gamma": 0.99,
    "timesteps_per_actorbatch": 256,
    "clip_param": 0.2,
    "entcoeff": 0.01,
    "optim_epochs": 4,
    "optim_stepsize": 1e-3,
    "optim_batchsize": 64,
    "lam": 0.95,
    "adam_epsilon": 1e-5,
    "schedule": "linear",
    "verbose": 0,
    "tensorboard_log": None,
    "_init_setup_model": True,
    "policy_kwargs": None,
    "full_tensorboard_log": False,
    "seed": None,
    "n_cpu_tf_sess": 1,
}
PPO2 = {
    "gamma": 0.99,
    "n_steps": 128,
    "ent_coef": 0.01,
    "learning_rate": 2.5e-4,
    "vf_coef": 0.5,
    "max_grad_norm": 0.5,
    "lam": 0.95,
    "nminibatches": 4,
    "noptepochs": 4,
    "cliprange": 0.2,
    "cliprange_vf": None,
    "verbose": 0,
    "tensorboard_log": None,
    "_init_setup_model": True,
    "policy_kwargs": None,
    "full_tensorboard_log": False,
    "seed": None,
    "n_cpu_tf_sess": None,
}
# (profile, keyword, value) -> what is then different, and nothing else
CHANGES = [
    ("ppo1", "gamma", 0.9, {"gamma": 0.9}),
    ("ppo1", "timesteps_per_actorbatch", 512, {"n_steps": 512}),
    ("ppo1", "clip_param", 0.1, {"clip_coef": 0.1}),
    ("ppo1", "entcoeff", 0.1, {"ent_coef": 0.1}),
    ("ppo1", "optim_epochs", 7, {"update_epochs": 7}),
    ("ppo1", "optim_stepsize", 3e-4, {"learning_rate": 3e-4}),
    ("ppo1", "optim_batchsize", 32, {"minibatch_size": 32}),
    ("ppo1", "lam", 0.8, {"gae_lambda": 0.8}),
    ("ppo1", "adam_epsilon", 1e-8, {"adam_eps": 1e-8}),
    ("ppo1", "schedule", "constant", {"anneal_lr": False, "anneal_clip": False}),
    ("ppo1", "full_tensorboard_log", True, {"log_histograms": True}),
    ("ppo2", "gamma", 0.9, {"gamma": 0.9}),
    ("ppo2", "n_steps", 64, {"n_steps": 64}),
    ("ppo2", "ent_coef", 0.1, {"ent_coef": 0.1}),
    ("ppo2", "learning_rate", 1e-3, {"learning_rate": 1e-3}),
    ("ppo2", "vf_coef", 0.7, {"vf_coef": 0.7}),
    ("ppo2", "max_grad_norm", 2.0, {"max_grad_norm": 2.0}),
    ("ppo2", "lam", 0.8, {"gae_lambda": 0.8}),
    ("ppo2", "nminibatches", 8, {"n_minibatches": 8}),
    ("ppo2", "noptepochs", 7, {"update_epochs": 7}),
    ("ppo2", "cliprange", 0.1, {"clip_coef": 0.1}),
    ("ppo2", "cliprange_vf", -1, {"value_clip": "off"}),
    ("ppo2", "cliprange_vf", 0.3, {"value_clip_coef": 0.3}),
    ("ppo2", "full_tensorboard_log", True, {"log_histograms": True}),
    ("sb3", "vf_coef", 0.25, {"vf_coef": 0.5}),
    ("sb3", "clip_range_vf", 0.3, {"value_clip": "clipped_only", "value_clip_coef": 0.3}),
    ("sb3", "normalize_advantage", False, {"normalize_advantages": "off"}),
    ("rsl_rl", "use_clipped_value_loss", False, {"value_clip": "off"}),
    ("rsl_rl", "normalize_advantage_per_mini_batch", True, {"normalize_advantages": "minibatch"}),
    ("cleanrl", "clip_vloss", False, {"value_clip": "off"}),
]
NO_SETTING = {"verbose", "tensorboard_log", "_init_setup_model", "policy_kwargs", "seed", "n_cpu_tf_sess"}


@pytest.mark.parametrize(("name", "signature"), [("ppo1", PPO1), ("ppo2", PPO2)])
def test_the_keywords_are_those_of_the_constructor(name, signature):
    keywords = {keyword.name: keyword.default for keyword in PROFILES[name].keywords}
    assert keywords.pop("policy") == keywords.pop("env") == "required"
    assert keywords == signature
    without = {keyword.name for keyword in PROFILES[name].keywords if keyword.translate is None}
    assert without - {"policy", "env"} == NO_SETTING
    assert set(signature) - NO_SETTING == {keyword for profile, keyword, *_ in CHANGES if profile == name}


@pytest.mark.parametrize(("name", "keyword", "value", "expected"), CHANGES)
def test_a_keyword_changes_its_settings_and_no_other(name, keyword, value, expected):
    before, after = PROFILES[name].settings, PROFILES[name].translate({keyword: value})
    assert {key: x for key, x in after.items() if x != before[key]} == expected


def test_the_defaults_of_stable_baselines3_are_those_of_its_constructor():
    algorithm = pytest.importorskip("stable_baselines3").PPO
    parameters = inspect.signature(algorithm.__init__).parameters
    theirs = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    ours = {k.name: k.default for k in PROFILES["sb3"].keywords if k.default != "required"}
    assert ours == theirs


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_has_sources_and_sets_known_settings(name):
    profile = PROFILES[name]
    assert profile.program
    assert profile.source.partition(".py")[1]
    assert profile.facts_source.partition(".py")[1]
    assert set(profile.settings) <= {*SETTINGS, "minibatch_size"}
    for entry in (*profile.keywords, *profile.facts):
        assert entry.text.endswith("."), entry.name
        assert len(entry.text) <= 110, entry.name
    # nothing that changes results is left to CleanRL, except the length of a run and what the environment decides
    open_ones = {name for name in CLEANRL["discrete"] if name not in ("total_timesteps", "sign_rewards")}
    given = {"n_minibatches" if key == "minibatch_size" else key for key in profile.settings}
    assert open_ones <= given


@pytest.mark.parametrize("kind", CLEANRL)
@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_fills_every_setting_of_any_kind(name, kind):
    c, profile = fill_defaults(Config(profile=name), kind), PROFILES[name].settings
    rows = profile.pop("minibatch_size", None)
    if rows is not None:
        assert c.minibatch_size == rows
    expected = profile if name != "cleanrl" else profile | CLEANRL[kind]
    assert {key: getattr(c, key) for key in expected} == expected


def test_meanings():
    c = fill_defaults(Config(profile="sb3"), "discrete")
    assert (c.n_steps, c.n_minibatches, c.vf_coef, c.kl_stop, c.kl_stop_factor) == (2048, 32, 1.0, "minibatch", 1.5)
    assert (c.value_clip, c.anneal_lr, c.learning_rate, c.normalize_obs) == ("off", False, 3e-4, False)
    c = fill_defaults(Config(profile="ppo1"), "continuous")
    assert (c.schedule("learning_rate"), c.schedule("clip_coef")) == ("linear:0.001:0", "linear:0.2:0")
    assert (c.vf_coef, c.normalize_advantages, c.n_minibatches) == (2.0, "batch", 4)
    c = fill_defaults(Config(profile="ppo2"), "discrete")
    assert (c.value_clip, c.schedule("value_clip_coef"), c.batch_size, c.minibatch_size) == ("max", 0.2, 512, 128)
    c = fill_defaults(Config(profile="rsl_rl"), "continuous")
    assert c.schedule("learning_rate") == "adaptive:1e-3:1e-5:1e-2"
    assert (c.hidden_sizes, c.activation, c.adam_eps, c.vf_coef) == ((256, 256, 256), "elu", 1e-8, 2.0)


def test_rows_of_a_minibatch_follow_the_batch():
    assert fill_defaults(Config(profile="sb3", n_envs=8), "discrete").n_minibatches == 256
    assert fill_defaults(Config(profile="sb3", n_steps=32), "discrete").n_minibatches == 1
    c = fill_defaults(Config(profile="sb3", n_steps=100), "discrete")
    assert c.n_minibatches == 1, "64 rows don't divide 100; the nearest minibatch that does is larger"
    assert fill_defaults(Config(profile="sb3", n_minibatches=2), "discrete").n_minibatches == 2


def test_flags_win_over_files_and_files_over_profiles(tmp_path):
    file = tmp_path / "a.toml"
    file.write_text('profile = "rsl_rl"\nactivation = "tanh"\ngamma = 0.9\nadaptive_kl = 0.02\n')

    def filled(*arguments):
        return fill_defaults(parse(["train", *arguments]).settings(), "continuous")

    c = filled("--config", str(file))
    assert (c.profile, c.activation, c.gamma, c.adaptive_kl, c.max_grad_norm) == ("rsl_rl", "tanh", 0.9, 0.02, 1.0)
    assert c.hidden_sizes == (256, 256, 256)
    c = filled(
        "--config", str(file), "--hidden-sizes", "64", "64", "--gamma", "0.8", "--learning-rate", "adaptive:1:1:1"
    )
    assert (c.activation, c.gamma, c.hidden_sizes, c.learning_rate) == ("tanh", 0.8, (64, 64), "adaptive:1:1:1")
    c = filled("--preset=sb3", "--n-envs", "2")
    assert (c.profile, c.n_envs, c.n_minibatches, c.kl_stop_factor) == ("sb3", 2, 64, 1.5)
    c = filled("--profile", "ppo1", "--learning-rate", "constant:1e-3")
    assert (c.schedule("learning_rate"), c.schedule("clip_coef")) == ("constant:1e-3", "linear:0.2:0")


def test_python_takes_profiles_too_and_stores_what_they_set():
    c = Config(profile="rsl_rl", activation="tanh")
    assert (c.activation, c.hidden_sizes, c.gamma) == ("tanh", (256, 256, 256), None)
    assert Config.from_dict(c.to_dict()) == c
    assert dataclasses.replace(c, hidden_sizes=(64, 64)).hidden_sizes == DEFAULTS["hidden_sizes"]
    assert Config(preset="sb3").profile == "sb3"
    with pytest.raises(ConfigError, match="profile='sb4' must be cleanrl or tuned or .* or sb3 .*; did you mean sb3"):
        Config(profile="sb4")


@pytest.mark.parametrize("command", ["bench", "study", "tune", "verify-resume"])
def test_every_command_with_settings_takes_a_profile(command):
    parsed = parse([command, "--profile", "sb3"])
    base = parsed.points()[0] if command == "bench" else parsed.settings(**{"n_envs": 1} if command == "study" else {})
    assert (base.profile, base.kl_stop_factor) == ("sb3", 1.5)
    assert fill_defaults(base, "discrete").n_steps == 2048 or command == "verify-resume"


@pytest.mark.parametrize("name", ["", *get_args(ProfileName)])
def test_the_command_prints_each_profile(name, capsys):
    assert main(["profile", *([name] if name else [])]) == 0
    text = capsys.readouterr().out
    if name in PROFILES:
        profile = PROFILES[name]
        assert profile.source in text
        assert all(entry.name in text and entry.text in text for entry in (*profile.keywords, *profile.facts))
        assert all(line in text for line in profile.differs)
    else:
        assert "CartPole-v1" in text


def test_the_command_names_the_profiles(capsys):
    for name, hint in (
        ("SB3", "did you mean sb3?"),
        ("nothing", "use one of cleanrl, sb3, ppo1, ppo2, rsl_rl, tuned, tuned_penalty."),
    ):
        assert main(["profile", name]) == 2
        assert f"there is no profile {name!r}; {hint}" in capsys.readouterr().err
