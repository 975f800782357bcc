"""Settings: defaults, presets, files, and what is said to each mistake."""

import dataclasses
import subprocess
import sys

import pytest

from fastppo.config import SCHEDULED, Config, parse_schedule, resolve
from fastppo.errors import ConfigError
from fastppo.presets import CLEANRL, TUNED


def test_defaults_are_cleanrls():
    c = resolve(Config(), "discrete")
    assert (c.total_timesteps, c.learning_rate, c.n_envs, c.n_steps, c.n_minibatches) == (500_000, 2.5e-4, 4, 128, 4)
    assert (c.gamma, c.gae_lambda, c.update_epochs, c.clip_coef, c.ent_coef) == (0.99, 0.95, 4, 0.2, 0.01)
    assert (c.vf_coef, c.max_grad_norm, c.target_kl, c.value_clip, c.anneal_lr) == (0.5, 0.5, None, "max", True)
    assert (c.normalize_advantages, c.hidden_sizes, c.activation) == ("minibatch", (64, 64), "tanh")
    c = resolve(Config(), "image", atari=True)
    assert (c.n_envs, c.clip_coef, c.total_timesteps, c.sign_rewards) == (8, 0.1, 10_000_000, True)
    c = resolve(Config(), "continuous")
    assert (c.n_envs, c.n_steps, c.n_minibatches, c.update_epochs, c.learning_rate) == (1, 2048, 32, 10, 3e-4)
    assert (c.ent_coef, c.normalize_obs, c.normalize_rewards, c.total_timesteps) == (0.0, True, True, 1_000_000)


@pytest.mark.parametrize("kind", CLEANRL)
@pytest.mark.parametrize("preset", ["cleanrl", "tuned"])
@pytest.mark.parametrize("env_id", [*TUNED, "Acrobot-v1"])
def test_resolving_twice_changes_nothing_and_survives_json(kind, preset, env_id):
    once = resolve(Config(env_id=env_id, preset=preset, target_return="threshold"), kind, reward_threshold=475.0)
    assert resolve(once, kind) == once
    assert Config.from_dict(once.to_dict()) == once
    assert all(isinstance(once.schedule(name), (int, float, str)) for name in SCHEDULED)


def test_what_is_given_wins_over_every_preset():
    c = resolve(Config(preset="tuned", n_envs=16, gamma=0.5, learning_rate="linear:1:0"), "discrete")
    assert (c.n_envs, c.gamma, c.learning_rate, c.anneal_lr, c.n_steps) == (16, 0.5, "linear:1:0", False, 32)
    assert resolve(Config(env_id="Acrobot-v1", preset="tuned"), "discrete").n_steps == 128


def test_short_forms_of_annealing():
    c = resolve(Config(learning_rate=1e-3, clip_coef=0.3, anneal_clip=True), "discrete")
    assert (c.schedule("learning_rate"), c.schedule("clip_coef")) == ("linear:0.001:0", "linear:0.3:0")
    assert c.schedule("value_clip_coef") == "linear:0.3:0"
    c = resolve(Config(anneal_lr=False), "discrete")
    assert c.schedule("learning_rate") == 2.5e-4


def test_iterations_are_whole_and_at_least_one():
    assert resolve(Config(total_timesteps=1300), "discrete").n_iterations == 2
    assert resolve(Config(total_timesteps=3), "discrete").n_iterations == 1


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
    "unsupported observations": ("--env-id Blackjack-v1", "observation space Tuple is not supported"),
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
    "infinite": ("--max-grad-norm inf", "max_grad_norm=inf must be a finite number"),
    "learning rate": ("--learning-rate -1", "learning_rate=-1.0 must be at least 0"),
    "no norm": ("--max-grad-norm 0", "max_grad_norm=0.0 must be greater than 0"),
    "schedule": ("--learning-rate lineal:1:0", "is neither a number nor a schedule; use 2.5e-4"),
    "half a schedule": ("--clip-coef linear:1", "clip_coef='linear:1' is neither"),
    "schedule's end": ("--ent-coef linear:0.1:-1", "ent_coef='linear:0.1:-1' must be at least 0"),
    "two schedules": ("--anneal-lr --learning-rate linear:1:0", "both give a schedule; keep one"),
    "seed": ("--seed -1", "seed=-1 must be at least 0"),
    "target kl": ("--target-kl 0", "target_kl=0.0 must be greater than 0"),
    "hidden": ("--hidden-sizes 0", "hidden_sizes=[0] must be widths of at least 1"),
    "no hidden": ("--hidden-sizes", "hidden_sizes=[] must name at least one layer"),
    "no gpu": ("--device cuda", "sees no CUDA device; use device=cpu"),
    "device": ("--device tpu", "device='tpu' must be auto, cpu, cuda or cuda:K"),
    "name": ("--name ../up", "must be a plain folder name"),
    "network": ("--network cnn", "network=cnn needs uint8 images"),
    "normaliser": ("--env-id FrozenLake-v1 --normalize-obs", "normalize_obs needs vector observations"),
    "two reward scales": ("--sign-rewards --normalize-rewards", "both rescale the rewards"),
    "native": ("--env-id Acrobot-v1 --vectorization native", "has no vector version of its own; use sync or async"),
    "no tensor version": ("--env-id MountainCar-v0 --vectorization tensor", "vectorization=tensor knows Acrobot-v1"),
    "no steps": ('--env-kwargs {"max_episode_steps":0}', "Expect the `max_episode_steps` to be positive"),
    "acting elsewhere": ("--vectorization tensor --act-device cpu", "those environments live where the policy learns"),
    "run folder in use": ("--run-dir {tmp}", "is not empty and runs are never overwritten"),
    "run folder through a file": ("--run-dir {tmp}/run.toml/x", "is, or lies in, a file; name a new folder"),
    "no such run": ("--init-from {tmp}/nothing", "holds no saved model"),
    "no config file": ("--config {tmp}/nothing.toml", "can't be read (No such file or directory)"),
    "config no TOML": ("--config {tmp}/bad.toml", "not TOML"),
    "unknown key": ("--config {tmp}/run.toml", "unknown setting 'n_env'; did you mean n_envs?"),
    "wrong type": ("--config {tmp}/type.toml", "n_envs='8' must be int"),
    "wrong choice": (
        "--config {tmp}/choice.toml",
        "value_clip='maxi' must be off or max or clipped_only; did you mean max?",
    ),
    "twice": ("--config {tmp}/twice.toml", "n_envs is given twice"),
    "file that imports": (
        "--config {tmp}/import.toml",
        "env_id nowhere:X-v0 imports code; if you trust it, add --env-id",
    ),
    "file that imports, by another spelling": ("--config {tmp}/dash.toml", "env_id nowhere:X-v0 imports code;"),
    "file that may import": (
        "--config {tmp}/import.toml --env_id nowhere:X-v0",
        "No module named 'nowhere'",
    ),
    "unknown flag": ("--n-env 3", "Perhaps you meant"),
    "flag's type": ("--n-envs many", "invalid"),
    "flag's choice": ("--vectorization fast", "invalid choice 'fast'"),
}


@pytest.fixture
def said(capsys, monkeypatch, tmp_path):
    """The command line, run in this process (torch takes seconds to import): its exit status and what it said."""
    from fastppo.cli import main

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
        "dash": 'env-id = "nowhere:X-v0"',
        "run": "n_env = 3",
        "bad": "n_envs = ",
        "type": 'n_envs = "8"',
        "choice": 'value_clip = "maxi"',
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
        (["eval", "nowhere"], "nowhere holds no saved model"),
        (["eval", "nowhere", "--episodes", "0"], "episodes=0 must be at least 1"),
        (["eval"], "Missing from fastppo eval"),
        (["bench", "--seconds", "0"], "seconds=0.0 must be more than 0"),
        (["bench", "--n-envs", "8", "0"], "n_envs=0 must be at least 1"),
        (["bench", "--workers", "2", "--vectorization", "sync"], "workers is for the pool; add pool to"),
        (["bench", "--env-id", "CartPol-v1"], "did you mean CartPole-v1?"),
        (["bench", "--vectorization", "fast"], "invalid choice 'fast'"),
        ([], "Expected one of {train, bench, st"),
        (["trian"], "trian"),
    ],
)
def test_mistakes_beside_training(arguments, message, said):
    status, lines = said(arguments)
    assert status == 2
    assert message in lines


def test_a_mistake_is_one_line_from_the_shell_too(tmp_path):
    command = [sys.executable, "-m", "fastppo", "train", "--env-id", "CartPol-v1"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60, check=False)
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


def test_python_gets_the_same_errors_as_exceptions():
    with pytest.raises(ConfigError, match="n_envs='8' must be int"):
        Config(n_envs="8")
    with pytest.raises(ConfigError, match="n_envs=True must be int"):
        Config(n_envs=True)
    with pytest.raises(ValueError, match="at most 1"):
        Config(gamma=2)
