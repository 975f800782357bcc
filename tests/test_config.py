"""Settings: metadata, defaults, profiles, files, help, and the message for each mistake."""

import dataclasses
import json
import re
import runpy
import subprocess
import sys
import typing
from pathlib import Path
from typing import get_args

import pytest

import fastppo
from fastppo.cli import COMMANDS, main, parse
from fastppo.commands.flags import flag, help_texts
from fastppo.config import (
    CHANGES_RESULTS,
    CHOSEN_AT_START,
    FIXED,
    NOTED,
    SCHEDULED,
    SETTINGS,
    Config,
    Section,
    differences_from_defaults,
    fill_defaults,
    parse_schedule,
)
from fastppo.errors import ConfigError
from fastppo.profiles import CLEANRL, TUNED, ProfileName
from tests import PATIENCE

# Why each setting that doesn't change results is so; the settings not named here change what a run learns
NOISE = {
    "seed": "another sample of the same experiment",
    "vectorization": "the same environments; native versions draw their own random numbers",
    "half_batches": "action noise is drawn per half",
    "device": "CPU and GPU round differently and have their own random streams",
    "act_device": "as device",
    "threads": "sums are split over threads",
    "compile": "compiled kernels round differently",
}
NOTHING = {
    "name": "a label",
    "run_dir": "a place",
    "profile": "the settings it fills are recorded themselves",
    "workers": "which process steps an environment doesn't matter to it",
    "on_env_error": "what happens at a failure",
    "env_restarts": "what happens at a failure",
    "env_timeout": "what happens at a failure",
    "strict_obs": "ends the run or warns",
    "max_skipped": "when a run that skips all minibatches ends",
    "checkpoint_every": "a checkpoint reads, and writes nothing back",
    "checkpoint_minutes": "as checkpoint_every",
    "keep_checkpoints": "as checkpoint_every",
    "resume": "how a run begins; its numbers go on as they were",
    "exact_resume": "refuses or trains",
    "resume_envs": "what a resume restores",
    "eval_every": "evaluations have their own environments and random streams",
    "eval_episodes": "as eval_every",
    "eval_max_steps": "as eval_every",
    "log_every": "rows only merge",
    "record_ratios": "samples only read",
    "log_histograms": "samples only read",
    "log_info": "infos are only read",
    "video_every": "as eval_every",
    "track": "another sink",
}
# Why a resume may change settings that do change results, without a note
EXTENDS = {
    "total_timesteps": "a run may be extended; schedules stretch over the new plan",
    "target_return": "when the run ends, not how it learns",
    "init_from": "the checkpoint's weights replace it",
}
# Why a resume must keep settings
KEPT = {
    "env_id": "the task",
    "env_kwargs": "the task",
    "wrappers": "the task",
    "sign_rewards": "the scale of what the value network predicts",
    "normalize_rewards": "the scale of what the value network predicts",
    "seed": "the random streams go on",
    "kl_coef": "only a first value; the weight goes on from the checkpoint's",
    "optimizer": "the state in the checkpoint",
    "network": "the network",
    "hidden_sizes": "the network",
    "activation": "the network",
    "shared_trunk": "the network",
    "memory": "the network",
    "memory_size": "the network",
    "action_distribution": "the meaning of the network's outputs",
    "state_dependent_std": "the network",
    "obs_keys": "the input of the network",
    "critic_obs_keys": "the input of the network",
    "action_masks": "the input of the network",
    "normalize_obs": "the input of the network",
    "obs_clip": "the input of the network",
    "rnd": "what the checkpoint holds",
}


def test_what_each_setting_changes():
    assert {name for name, setting in SETTINGS.items() if setting.changes == "noise"} == set(NOISE)
    assert {name for name, setting in SETTINGS.items() if setting.changes == "nothing"} == set(NOTHING)
    assert set(SETTINGS) - set(NOISE) - set(NOTHING) == CHANGES_RESULTS
    assert set(KEPT) == FIXED
    assert set(SETTINGS) - set(NOTHING) - set(EXTENDS) - set(KEPT) == NOTED, "a resume notes what changes any number"


def test_every_field_has_metadata_and_a_help_text():
    assert [field.name for field in dataclasses.fields(Config)] == list(SETTINGS)
    assert {setting.section for setting in SETTINGS.values()} == set(get_args(Section))
    assert all(help_texts(Config)[name].endswith(".") for name in SETTINGS)
    for name, setting in SETTINGS.items():
        assert setting.at_least is None or setting.above is None, name
        if getattr(Config(), name) is None:
            assert setting.unset is not None or name in CLEANRL["discrete"], "None means something"
        else:
            assert setting.unset is None, name


def test_only_settings_that_leave_a_choice_are_chosen_at_the_start():
    hints = typing.get_type_hints(Config)
    for name in CHOSEN_AT_START:
        assert "auto" in (*get_args(hints[name]), getattr(Config(), name)) or SETTINGS[name].unset, name


# Settings that other settings need to have an effect
NEEDED = {"vectorization": "pool", "objective": "penalty", "learning_rate": "adaptive:3e-4:1e-5:1e-2", "rnd": True}


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.above is not None])
def test_exclusive_bounds_are_refused_themselves(name):
    with pytest.raises(ConfigError, match=rf"{name}=0\.0 must be greater than 0"):
        Config(**NEEDED | {name: 0.0})
    Config(**NEEDED | {name: 1e-9})


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.at_least is not None])
def test_inclusive_bounds_are_accepted(name):
    setting = SETTINGS[name]
    of = (lambda x: (x,)) if name == "hidden_sizes" else lambda x: x
    Config(**NEEDED | {"memory": "gru", name: of(setting.at_least)})
    with pytest.raises(ConfigError, match=rf"{name}=.*-?\d+.* must be at least {setting.at_least}; nearest valid"):
        Config(**NEEDED | {name: of(setting.at_least - 1)})


def test_settings_page_is_current_and_holds_each_setting_once():
    script = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "settings.py"))
    text = script["PAGE"].read_text()
    assert text == script["page"](), "run scripts/settings.py"
    for name in SETTINGS:
        assert text.count(f"**`{flag(name)}`") + text.count(f"**`{flag(name)} ") == 1, name
    assert max(map(len, text.splitlines())) <= 121


def test_a_run_shows_what_differs_from_the_defaults_of_its_kind():
    given = Config(env_id="Pendulum-v1", device="cpu", threads=2, network="mlp")
    plain = fill_defaults(given, "continuous")
    assert differences_from_defaults(plain, "continuous") == "env_id=Pendulum-v1  seed=1"
    config = fill_defaults(dataclasses.replace(given, n_envs=8, gamma=0.9, total_timesteps=10_000), "continuous")
    text = "env_id=Pendulum-v1  seed=1  total_timesteps=10_000  n_envs=8  gamma=0.9"
    assert differences_from_defaults(config, "continuous") == text
    atari = fill_defaults(Config(env_id="ALE/Pong-v5"), "image", atari=True)
    assert differences_from_defaults(atari, "image", atari=True) == "env_id=ALE/Pong-v5  seed=1"
    tuned = fill_defaults(Config(profile="tuned"), "discrete")
    assert "profile=tuned" in differences_from_defaults(tuned, "discrete")
    assert "n_steps=32" in differences_from_defaults(tuned, "discrete")


def test_defaults_are_cleanrls():
    c = fill_defaults(Config(), "discrete")
    assert (c.total_timesteps, c.learning_rate, c.n_envs, c.n_steps, c.n_minibatches) == (500_000, 2.5e-4, 4, 128, 4)
    assert (c.gamma, c.gae_lambda, c.update_epochs, c.clip_coef, c.ent_coef) == (0.99, 0.95, 4, 0.2, 0.01)
    assert (c.vf_coef, c.max_grad_norm, c.target_kl, c.value_clip, c.anneal_lr) == (0.5, 0.5, None, "max", True)
    assert (c.normalize_advantages, c.hidden_sizes, c.activation) == ("minibatch", (64, 64), "tanh")
    c = fill_defaults(Config(), "image", atari=True)
    assert (c.n_envs, c.clip_coef, c.total_timesteps, c.sign_rewards) == (8, 0.1, 10_000_000, True)
    c = fill_defaults(Config(), "continuous")
    assert (c.n_envs, c.n_steps, c.n_minibatches, c.update_epochs, c.learning_rate) == (1, 2048, 32, 10, 3e-4)
    assert (c.ent_coef, c.normalize_obs, c.normalize_rewards, c.total_timesteps) == (0.0, True, True, 1_000_000)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [({}, 1), ({"n_envs": 6}, 6), ({"n_envs": 7, "segment_length": 256}, 28), ({"n_minibatches": 1}, 1)],
)
def test_default_minibatches_divide_the_sequences(settings, expected):
    filled = fill_defaults(Config(memory="lstm", **settings), "continuous")
    assert filled.n_minibatches == expected
    own = fill_defaults(Config(**settings), "continuous", custom_memory=True)
    assert own.n_minibatches == expected


@pytest.mark.parametrize("kind", CLEANRL)
@pytest.mark.parametrize("profile", get_args(ProfileName))
@pytest.mark.parametrize("env_id", [*TUNED, "MountainCar-v0"])
def test_filling_defaults_twice_changes_nothing_and_survives_json(kind, profile, env_id):
    given = Config(env_id=env_id, profile=profile, target_return="threshold")
    once = fill_defaults(given, kind, reward_threshold=475.0)
    assert fill_defaults(once, kind) == once
    assert Config.from_dict(once.to_dict()) == once
    assert all(isinstance(once.schedule(name), (int, float, str)) for name in SCHEDULED)


def test_what_is_given_wins_over_every_profile():
    c = fill_defaults(Config(profile="tuned", n_envs=16, gamma=0.5, learning_rate="linear:1:0"), "discrete")
    assert (c.n_envs, c.gamma, c.learning_rate, c.anneal_lr, c.n_steps) == (16, 0.5, "linear:1:0", False, 32)
    assert fill_defaults(Config(env_id="MountainCar-v0", profile="tuned"), "discrete").n_steps == 128


def test_short_forms_of_annealing():
    c = fill_defaults(Config(learning_rate=1e-3, clip_coef=0.3, anneal_clip=True), "discrete")
    assert (c.schedule("learning_rate"), c.schedule("clip_coef")) == ("linear:0.001:0", "linear:0.3:0")
    assert c.schedule("value_clip_coef") == "linear:0.3:0"
    c = fill_defaults(Config(anneal_lr=False), "discrete")
    assert c.schedule("learning_rate") == 2.5e-4


def test_schedules_are_parsed():
    assert parse_schedule("linear:2.5e-4:0") == ("linear", 2.5e-4, 0.0)
    assert parse_schedule("cosine:1:0.5") == ("cosine", 1.0, 0.5)
    assert parse_schedule("constant:3") == ("constant", 3.0, 3.0)


def test_settings_come_from_a_file_under_the_flags(tmp_path):
    from fastppo.cli import Bench, Train, _defaults

    file = tmp_path / "run.toml"
    file.write_text('env_id = "Acrobot-v1"\nnum-envs = 16\nhidden_sizes = [32]\n[env_kwargs]\nrender_mode = "ansi"\n')
    defaults = _defaults(Train, ["train", "--config", str(file)])
    assert (defaults.env_id, defaults.n_envs, defaults.hidden_sizes) == ("Acrobot-v1", 16, (32,))
    assert defaults.env_kwargs == {"render_mode": "ansi"}
    assert _defaults(Train, ["train", f"--config={file}"]) == defaults
    bench = _defaults(Bench, ["bench", "--config", str(file)])
    assert (bench.n_envs, bench.vectorization, bench.hidden_sizes) == ((16,), ("sync", "pool", "native"), (32,))


# (arguments, what the message must hold)
MISTAKES = {
    "unknown environment": (
        "--env-id CartPol-v1",
        "env_id='CartPol-v1' is not a registered environment; did you mean CartPole-v1?",
    ),
    "old version": ("--env-id CartPole-v9", "did you mean CartPole-v1?"),
    "nonsense environment": ("--env-id qqqq", "pprint_registry"),
    "colons": ("--env-id a:b:c", "can't import a:b"),
    "nothing registered": ("--env-id math:Nope-v0", "math was imported, but registers no environment 'Nope-v0'"),
    "unknown module": ("--env-id no_such_module:Env-v0", "can't import no_such_module"),
    "unknown keys": ("--env-id Blackjack-v1 --obs-keys 0 7", "obs_keys: observations have no '7'; there are 0, 1, 2."),
    "environment's argument": ('--env-id Pendulum-v1 --env-kwargs {"gg":1}', "unexpected keyword argument 'gg'"),
    "kwargs no JSON": ("--env-kwargs {a:1}", "env_kwargs='{a:1}' must be a table of keyword arguments"),
    "kwargs no object": ("--env-kwargs [1]", "env_kwargs=[1] must be a table"),
    "batch": (
        "--n-envs 8 --n-steps 128 --n-minibatches 3",
        "n_minibatches=3 does not divide the batch of 1024 (n_envs=8 x n_steps=128); nearest that do: 2, 4.",
    ),
    "batch with defaults": ("--n-envs 1 --n-steps 5", "n_minibatches=4 does not divide the batch of 5"),
    "too many minibatches": ("--n-envs 1 --n-steps 5 --n-minibatches 9", "nearest that do: 5."),
    "no environments": ("--n-envs 0", "n_envs=0 must be at least 1; nearest valid value: 1."),
    "negative steps": ("--n-steps -3", "n_steps=-3 must be at least 1"),
    "no timesteps": ("--total-timesteps 0", "total_timesteps=0 must be at least 1"),
    "large seed": ("--seed 99999999999999999999", "nearest valid value: 9223372036854775807."),
    "steps without end": ("--total-timesteps 99999999999999999999", "must be at most 1000000000000000"),
    "a network too large": ("--hidden-sizes 1000000000000", "GiB for weights, gradients and Adam;"),
    "gamma": ("--gamma 1.5", "gamma=1.5 must be at most 1; nearest valid value: 1."),
    "lambda": ("--gae-lambda -0.1", "gae_lambda=-0.1 must be at least 0"),
    "nan": ("--learning-rate nan", "learning_rate=nan must be a finite number"),
    "learning rate above float32": (
        "--learning-rate 1e39",
        "learning_rate=1e+39 doesn't fit a float32, which holds up",
    ),
    "coefficient above float32": ("--vf-coef 1e300", "vf_coef=1e+300 doesn't fit a float32"),
    "below float32": (
        "--adam-eps 1e-46",
        "adam_eps=1e-46 is too small for a float32, which holds numbers from 1.2e-38",
    ),
    "negative, above float32": ("--value-clip-coef=-1e39", "value_clip_coef=-1e+39 doesn't fit a float32"),
    "schedule above float32": ("--learning-rate linear:1e39:0", "learning_rate='linear:1e39:0' doesn't fit a float32"),
    "infinite": ("--max-grad-norm inf", "max_grad_norm=inf must be a finite number"),
    "learning rate": ("--learning-rate -1", "learning_rate=-1.0 must be at least 0"),
    "no norm": ("--max-grad-norm 0", "max_grad_norm=0.0 must be greater than 0"),
    "schedule": ("--learning-rate lineal:1:0", "is neither a number nor a schedule; use 2.5e-4"),
    "half a schedule": ("--clip-coef linear:1", "clip_coef='linear:1' is neither"),
    "schedule's end": ("--ent-coef linear:0.1:-1", "ent_coef='linear:0.1:-1' must be at least 0"),
    "adaptive, half": ("--learning-rate adaptive:1e-3", "must be adaptive:START:LOWEST:HIGHEST with 0 < LOWEST <="),
    "adaptive, order": ("--learning-rate adaptive:1e-3:1e-2:1e-4", "such as adaptive:3e-4:1e-5:1e-2"),
    "adaptive clip range": ("--clip-coef adaptive:1:1:1", "clip_coef='adaptive:1:1:1' is neither a number nor"),
    "adaptive and annealed": (
        "--anneal-lr --learning-rate adaptive:3e-4:1e-5:1e-2",
        "anneal_lr and learning_rate='adaptive:3e-4:1e-5:1e-2' both give a schedule; keep one",
    ),
    "adaptive target alone": ("--adaptive-kl 0.02", "adaptive_kl=0.02 has no effect without an adaptive learning rate"),
    "penalty's target alone": ("--penalty-kl 0.02", "penalty_kl=0.02 has no effect without a penalty: --objective"),
    "penalty's weight alone": ("--kl-coef 2", "kl_coef=2.0 has no effect without a penalty: --objective penalty"),
    "penalty's weight": ("--objective penalty --kl-coef 1e5", "kl_coef=100000.0 must be at most 10000.0"),
    "penalty of one step": (
        "--objective penalty --update-epochs 1 --n-minibatches 1",
        "so the KL is always 0; use more epochs or minibatches",
    ),
    "objective": ("--objective penalised", "objective='penalised' must be clip or penalty or clip_and_penalty"),
    "two schedules": ("--anneal-lr --learning-rate linear:1:0", "both give a schedule; keep one"),
    "seed": ("--seed -1", "seed=-1 must be at least 0"),
    "target kl": ("--target-kl 0", "target_kl=0.0 must be greater than 0"),
    "hidden": ("--hidden-sizes 0", "hidden_sizes=[0] must be at least 1"),
    "no hidden": ("--hidden-sizes", "hidden_sizes=[] must name at least one layer"),
    "no gpu": ("--device cuda", "sees no CUDA device; use device=cpu"),
    "device": ("--device tpu", "device='tpu' must be auto, cpu, cuda or cuda:K"),
    "name": ("--name ../up", "must be a plain folder name"),
    "network": ("--network cnn", "network=cnn needs images"),
    "normaliser": ("--env-id FrozenLake-v1 --normalize-obs", "normalize_obs needs vector observations"),
    "two reward scales": ("--sign-rewards --normalize-rewards", "both rescale the rewards"),
    "native": ("--env-id Acrobot-v1 --vectorization native", "has no vector version of its own; use sync or async"),
    "no tensor version": ("--env-id MountainCar-v0 --vectorization tensor", "vectorization=tensor knows Acrobot-v1"),
    "no steps": ('--env-kwargs {"max_episode_steps":0}', "Expect the `max_episode_steps` to be positive"),
    "acting elsewhere": ("--vectorization tensor --act-device cpu", "these environments run on the training device"),
    "run folder in use": ("--run-dir {tmp}", "is not empty and runs are never overwritten"),
    "run folder through a file": ("--run-dir {tmp}/run.toml/x", "is a file or is below one; name a new folder"),
    "no such run": ("--init-from {tmp}/nothing", "is not a run folder (there is no such folder)"),
    "no config file": ("--config {tmp}/nothing.toml", "can't be read (No such file or directory)"),
    "config no TOML": ("--config {tmp}/bad.toml", "not TOML"),
    "unknown key": ("--config {tmp}/run.toml", "unknown setting 'n_env'; did you mean n_envs?"),
    "wrong type": ("--config {tmp}/type.toml", "n_envs='8' must be a whole number"),
    "wrong choice": (
        "--config {tmp}/choice.toml",
        "value_clip='maxi' must be off or max or clipped_only; did you mean max?",
    ),
    "twice": ("--config {tmp}/twice.toml", "n_envs is given twice"),
    "file that imports": (
        "--config {tmp}/import.toml",
        "env_id nowhere:X-v0 imports code; if you trust it, add --env-id",
    ),
    "file whose wrappers import": (
        "--config {tmp}/wrap.toml",
        "if you trust it, add --wrappers gymnasium.wrappers:FlattenObservation own:Mine",
    ),
    "file that imports, by another spelling": ("--config {tmp}/dash.toml", "env_id nowhere:X-v0 imports code;"),
    "file that may import": (
        "--config {tmp}/import.toml --env_id nowhere:X-v0",
        "No module named 'nowhere'",
    ),
    "group of settings": (
        "--config {tmp}/group.toml",
        "group.toml: [train] is a table, but settings have no groups; put",
    ),
    "file with a wrong value": ("--config {tmp}/type.toml", "type.toml: n_envs='8' must be a whole number"),
    "file with an empty path": ("--config {tmp}/path.toml", "path.toml: run_dir='' is an empty path; name a file or"),
    "wrong widths": (
        "--hidden-sizes 64 a",
        "hidden_sizes=(64, 'a') must be a list of whole numbers: [64, 64], or 64 64",
    ),
    "switch": ("--anneal-lr maybe", "anneal_lr='maybe' must be True or False."),
    "switch with equals sign": ("--anneal-lr=maybe", "anneal_lr='maybe' must be True or False."),
    "switch in small letters": ("--anneal-lr=true --gamma 2", "gamma=2.0 must be at most 1"),
    "switch without value": ("--rnd true", "--rnd takes no value, but 'true' follows; give --rnd or --no-rnd."),
    "list of choices": ("--track tensorboard", "track=('tensorboard',) must be a list of wandb or mlflow"),
    "capital letters": ("--network MLP", "must be auto or mlp or cnn; did you mean mlp?"),
    "empty path": ("--run-dir=", "--run-dir has an empty value, as from a variable that is not set"),
    "unknown flag": ("--n-env 3", "Perhaps you meant"),
    "alias": ("--num-envs 0", "n_envs=0 must be at least 1"),
    "alias with equals sign": ("--num-envs=0", "n_envs=0 must be at least 1"),
    "flag's type": ("--n-envs many", "n_envs='many' must be a whole number"),
    "flag's choice": ("--vectorization syn", "pool or native or envpool or tensor; did you mean sync?"),
    "optional flag's choice": ("--value-clip maxi", "must be off or max or clipped_only; did you mean max?"),
}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    """The command line, run in this process (torch takes seconds to import): its exit status and what it said."""
    monkeypatch.chdir(tmp_path)

    def run(arguments):
        try:
            status = main(arguments)
        except SystemExit as error:  # the parser's own mistakes
            status = error.code
        captured = capsys.readouterr()
        assert "Traceback" not in captured.err + captured.out
        return status, captured.err

    return run


@pytest.mark.parametrize("mistake", MISTAKES)
def test_every_mistake_gets_one_clear_line_and_exit_status_2(mistake, said, tmp_path):
    arguments, message = MISTAKES[mistake]
    files = {
        "import": 'env_id = "nowhere:X-v0"',
        "wrap": 'wrappers = ["gymnasium.wrappers:FlattenObservation", "own:Mine"]\n',
        "dash": 'env-id = "nowhere:X-v0"',
        "run": "n_env = 3",
        "bad": "n_envs = ",
        "type": 'n_envs = "8"',
        "choice": 'value_clip = "maxi"',
        "group": "[train]\nn_envs = 3",
        "path": 'run_dir = ""',
    }
    for name, text in (files | {"twice": "n_envs = 3\nnum_envs = 4"}).items():
        (tmp_path / f"{name}.toml").write_text(text)
    status, lines = said(["train", *arguments.replace("{tmp}", str(tmp_path)).split()])
    assert status == 2, lines
    assert message in " ".join(lines.replace("│", " ").split())
    if not mistake.startswith(("unknown flag", "flag's")):
        assert len(lines.splitlines()) == 1
    assert not (tmp_path / "runs").exists(), "a mistake leaves no run folder behind"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["eval", "nowhere"], "nowhere is not a run folder (there is no such folder)"),
        (["resume", "nowhere", "--total-timesteps", "many"], "'many' is not a whole number"),
        (["resume", "nowhere"], "nowhere is not a run folder"),
        (["report", "."], ". is not a run folder (it holds no config.json"),
        (["diff", "nowhere", "."], "nowhere is not a run folder"),
        (["export", "nowhere"], "nowhere is not a run folder"),
        (["replay", "."], "holds no NaN dump (capsule.json is missing)"),
        (["verify-env", "--env-id", "CartPol-v1"], "did you mean CartPole-v1?"),
        (["doctor", "--env-id", "CartPol-v1"], "did you mean CartPole-v1?"),
        (["verify-resume", "--n-minibatches", "3"], "n_minibatches=3 does not divide the batch of 512"),
        (["study", "--n-minibatches", "3"], "n_minibatches=3 does not divide the batch of 512"),
        (["study", "--seeds", "0"], "seeds=0 must be at least 1"),
        (["study", "--n-envs", "4", "0"], "n_envs=0 must be at least 1"),
        *(([command, ""], f"{command}: an argument is empty") for command in ("eval", "resume", "export", "report")),
        (["train", "--run-dir", ""], "--run-dir has an empty value, as from a variable that is not set; give a value"),
        (["export", "run", "-o", ""], "-o has an empty value"),
        (["study", "--n-envs", "4", "a"], "'a' is not a whole number, such as 1000 or 1e6"),
        (["bench", "--seconds", "x"], "'x' is not a number, such as 5 or 0.5"),
        (["study", "--jobs", "many"], "'many' is not a whole number"),
        (["eval", "nowhere", "--episodes", "0"], "episodes=0 must be at least 1"),
        (["eval"], "Missing from fastppo eval"),
        (["bench", "--seconds", "0"], "seconds=0.0 must be finite and greater than 0"),
        (["doctor", "--seconds", "inf"], "seconds=inf must be finite and greater than 0"),
        (["bench", "--half-batches", "--vectorization", "sync"], "or leave --half-batches out"),
        (["bench", "--n-envs", "8", "0"], "n_envs=0 must be at least 1"),
        (["bench", "--workers", "2", "--vectorization", "sync"], "workers needs the pool; add pool to"),
        (["bench", "--env-id", "CartPol-v1"], "did you mean CartPole-v1?"),
        (["bench", "--vectorization", "fast"], "invalid choice 'fast'"),
        (["bench", "--n-envs"], "--n-envs needs at least one value"),
        (["bench", "--vectorization"], "--vectorization needs at least one value"),
        (["study", "--n-envs"], "--n-envs needs at least one value"),
        (["bench", "--n-minibatches", "3"], "does not divide the batch of 128 (n_envs=1 x n_steps=128)"),
        ([], "a command is missing; use one of train, bench"),
        (["trian"], "did you mean train?"),
        (["xyz"], "there is no command 'xyz'; use one of train"),
        (["--n-envs", "3"], "--n-envs stands before the command"),
    ],
)
def test_mistakes_beside_training(arguments, message, said):
    status, lines = said(arguments)
    assert status == 2
    assert message in lines
    assert "None" not in lines


def test_mistakes_are_answered_without_torch(tmp_path):
    """Its import takes seconds."""
    script = """
import json, sys
from fastppo.cli import main
for arguments in json.load(sys.stdin):
    try:
        status = main(arguments)
    except SystemExit as error:
        status = error.code
    assert status == 2, arguments
    assert "torch" not in sys.modules, arguments
"""
    mistakes = [
        ["train", "--env-id", "CartPol-v1"],
        ["train", "--env-id", "no_such_module:Env-v0"],
        ["train", "--n-minibatches", "3"],
        ["train", "--env-id", "Pendulum-v1", "--n-steps", "1000"],  # fits the defaults of other kinds
        ["train", "--gamma", "2"],
        ["train", "--total-timesteps", "100"],
        ["train", "--env-kwargs", '{"no_such_argument": 1}'],
        ["train", "--run-dir", str(tmp_path.parent)],
        ["train", "--init-from", "x"],
        *([command, "--env-id", "X-v0"] for command in ("doctor", "verify-env", "bench", "study", "verify-resume")),
        *([command, "x"] for command in ("eval", "resume", "report", "export", "replay")),
        ["diff", "x", "y"],
    ]
    text = json.dumps(mistakes)
    done = subprocess.run(
        [sys.executable, "-c", script], input=text, capture_output=True, text=True, cwd=tmp_path, check=False
    )
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.glob("runs"))


def test_a_typo_suggests_flags_of_its_own_command(said):
    for command in ("train", "bench", "study"):
        status, lines = said([command, "--n-evns", "3"])
        assert status == 2
        assert lines.count("--n-envs INT") == 1, lines
        assert "in fastppo" not in lines


def test_version_and_overview(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["--version"], ["--help"], ["-h"]):
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code == 0
        text = capsys.readouterr().out
        assert max(map(len, text.splitlines())) <= 80
        if arguments == ["--version"]:
            assert text == f"fastppo {fastppo.__version__}\n"
        else:
            assert all(re.search(rf"^  {name} +\w", text, re.M) for name in COMMANDS)


def test_a_mistake_is_one_line_from_the_shell_too(tmp_path):
    command = [sys.executable, "-m", "fastppo", "train", "--env-id", "CartPol-v1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1), done.stderr


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom fastppo.cli import main\ntry:\n    main(['train', '--help'])\nexcept SystemExit:\n    pass\n"
    )
    code += "assert not {'torch', 'gymnasium', 'tensorboard', 'plotly'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    for field in dataclasses.fields(Config):
        assert f"--{field.name.replace('_', '-')}" in done.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_help_fits_80_columns_and_groups_the_settings(command, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit):
        parse([command, "--help"])
    text = capsys.readouterr().out
    assert max(map(len, text.splitlines())) <= 80
    assert not re.search(r"\bNone\b|default: \)|''", text)
    if issubclass(COMMANDS[command], Config):
        titles = {section: text.find(f"{section} options") for section in get_args(Section)}
        shown = [place for place in titles.values() if place >= 0]
        assert shown == sorted(shown)
        own = {field.name for field in dataclasses.fields(COMMANDS[command])} - set(SETTINGS)
        assert all(0 < text.index(flag(name)) < shown[0] for name in own), "a command's own flags come first"
    if command == "train":
        for name, setting in SETTINGS.items():
            place = re.search(rf"^\W*{flag(name)}[ ,]", text, re.M).end()
            assert [section for section in titles if titles[section] < place][-1] == setting.section


def test_python_gets_the_same_errors_as_exceptions():
    with pytest.raises(ConfigError, match="n_envs='8' must be a whole number"):
        Config(n_envs="8")
    with pytest.raises(ConfigError, match="n_envs=True must be a whole number"):
        Config(n_envs=True)
    with pytest.raises(ValueError, match="at most 1"):
        Config(gamma=2)


@pytest.mark.parametrize(
    ("wrapper", "imported"),
    [("gymnasium.wrappers:FlattenObservation", False), ("gymnasium.wrappers.common:TimeLimit", False)]
    + [(name, True) for name in ("mine:Wrapper", "gymnasium.wrappers_of_mine:Wrapper", "gymnasium:make")],
)
def test_only_gymnasiums_own_wrappers_need_no_permission_to_import(wrapper, imported):
    assert bool(Config(wrappers=(wrapper,)).imported) == imported
