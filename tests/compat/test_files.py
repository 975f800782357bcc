"""One file per model: save, load, predict and train on."""

import io
import zipfile

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import CheckpointError, ConfigError
from fastppo.compat import PPO, PPO1, PPO2, MaskablePPO, RecurrentPPO, make_vec_env
from tests.compat.test_keywords import FAST, Choosing
from tests.compat.test_training import SMALL, equal, weights

MODELS = {
    "PPO": lambda: PPO("MlpPolicy", "Pendulum-v1", **SMALL, normalize_obs=True, normalize_rewards=True),
    "PPO1": lambda: PPO1("MlpPolicy", "CartPole-v1", **FAST, timesteps_per_actorbatch=32, optim_batchsize=16, seed=1),
    "PPO2": lambda: PPO2("MlpPolicy", make_vec_env("CartPole-v1", 2), **FAST, n_steps=32, seed=1),
    "RecurrentPPO": lambda: RecurrentPPO(
        "MlpLstmPolicy", "CartPole-v1", **SMALL, policy_kwargs={"lstm_hidden_size": 8}
    ),
    "MaskablePPO": lambda: MaskablePPO("MlpPolicy", Choosing(), **SMALL),
}


@pytest.mark.parametrize("name", MODELS)
def test_a_model_comes_back_bit_for_bit_and_trains_on_as_the_original(name, tmp_path):
    model = MODELS[name]().learn(64)
    model.save(tmp_path / "models" / "m")
    assert (tmp_path / "models" / "m.zip").exists()
    loaded = type(model).load(tmp_path / "models" / "m", env=model.get_env())
    assert equal(weights(model), weights(loaded))
    assert (loaded.num_timesteps, loaded.n_envs) == (model.num_timesteps, model.n_envs)
    config, other = model.config.to_dict(), loaded.config.to_dict()
    assert {key for key in config if config[key] != other[key]} <= {"env_id", "device"}
    obs = np.stack([model.observation_space.sample() for _ in range(5)])
    for ours, theirs in zip(
        model.predict(obs, deterministic=True), loaded.predict(obs, deterministic=True), strict=True
    ):
        assert np.array_equal(ours, theirs) or ours is theirs is None
    for each in (model, loaded):
        each.learn(64, reset_num_timesteps=False)
    assert model.num_timesteps == loaded.num_timesteps == 128
    assert equal(weights(model), weights(loaded)), "weights, normalisers and Adam all came back"


def test_a_file_written_in_training_holds_that_moment(tmp_path):
    """Against a training that ends there: two iterations with a constant learning rate are the same either way."""

    def save(locals_, _):
        locals_["self"].save(tmp_path / str(locals_["self"].num_timesteps))

    PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(96, save)
    shorter = PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(64)
    shorter.save(tmp_path / "shorter")
    files = [PPO.load(tmp_path / name, env="CartPole-v1") for name in ("64", "shorter")]
    for name, tensor in files[0]._loaded.part("update").items():
        assert torch.equal(tensor, files[1]._loaded.part("update")[name]), name
    assert equal(*map(weights, files))


def test_an_untrained_model_is_saved_and_loaded(tmp_path):
    model = PPO("MlpPolicy", "CartPole-v1", **SMALL)
    model.save(tmp_path / "m.zip")
    loaded = PPO.load(str(tmp_path / "m"))
    assert equal(weights(model), weights(loaded))
    assert loaded.get_env() is None
    with pytest.raises(ConfigError, match=r"learn needs an environment: call set_env\(env\), or load"):
        loaded.learn(32)
    loaded.set_env(gym.make("CartPole-v1"))
    assert loaded.learn(32).num_timesteps == 32


def test_files_may_be_open_ones():
    model, file = PPO("MlpPolicy", "CartPole-v1", **SMALL), io.BytesIO()
    model.save(file)
    file.seek(0)
    assert equal(weights(model), weights(PPO.load(file)))


def test_the_policy_in_the_file_is_one_for_load_policy(tmp_path):
    from fastppo import load_policy

    model = PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(32)
    model.save(tmp_path / "m")
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        archive.extractall(tmp_path / "folder")
    obs = np.zeros(4)
    assert load_policy(tmp_path / "folder").predict(obs)[0] == model.predict(obs, deterministic=True)[0]


def test_a_function_must_be_given_again(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", **SMALL, learning_rate=lambda left: 1e-3 * left).save(tmp_path / "m")
    loaded = PPO.load(tmp_path / "m", env="CartPole-v1")
    loaded.predict(np.zeros(4))
    with pytest.raises(ConfigError, match="learning_rate followed a function, which a file can't hold: give it again"):
        loaded.learn(32)
    for again in (lambda left: 1e-3 * left, 1e-3):
        PPO.load(tmp_path / "m", env="CartPole-v1", custom_objects={"learning_rate": again}).learn(32)


def test_the_value_clip_of_ppo2_follows_a_function_given_again(tmp_path):
    small = FAST | {"n_steps": 32, "noptepochs": 1, "seed": 1}
    PPO2("MlpPolicy", "CartPole-v1", **small, cliprange=lambda left: 0.2 * left).save(tmp_path / "m")
    model = PPO2.load(tmp_path / "m", env="CartPole-v1")
    with pytest.raises(ConfigError, match=r"cliprange followed a function, .* load\(path, env=env, cliprange=...\)"):
        model.learn(32)
    model = PPO2.load(tmp_path / "m", env="CartPole-v1", cliprange=lambda left: 0.3 * left)
    for _ in range(2):  # the second time from a file of its own
        model.learn(64)
        values = model.trainer.learner.coef_values
        assert values["clip_coef"] == values["value_clip_coef"] == pytest.approx(0.15)
        model.save(tmp_path / "again")
        model = PPO2.load(tmp_path / "again", env="CartPole-v1", cliprange=lambda left: 0.3 * left)


def test_keywords_may_change_on_loading(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "m")
    loaded = PPO.load(tmp_path / "m", env=make_vec_env("CartPole-v1", 4), n_epochs=1, vf_coef=0.25)
    assert (loaded.config.update_epochs, loaded.config.vf_coef, loaded.config.n_minibatches) == (1, 0.5, 8)
    with pytest.raises(ConfigError, match="load: nonsense=1 can't be changed"):
        PPO.load(tmp_path / "m", nonsense=1)
    for name, value in (("print_system_info", True), ("force_reset", False)):
        with pytest.raises(ConfigError, match=f"load: {name}={value} can't be honoured"):
            PPO.load(tmp_path / "m", **{name: value})


def test_other_files_are_refused(tmp_path):
    PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "m")
    with pytest.raises(CheckpointError, match="holds a PPO, not a PPO2"):
        PPO2.load(tmp_path / "m")
    with pytest.raises(CheckpointError, match="there is no file .*none.zip"):
        PPO.load(tmp_path / "none")
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(CheckpointError, match="text.zip is no archive"):
        PPO.load(tmp_path / "text")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("a", "b")
    with pytest.raises(CheckpointError, match="was not saved by fastppo.compat"):
        PPO.load(tmp_path / "other")
    with zipfile.ZipFile(tmp_path / "m.zip") as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(tmp_path / "changed.zip", "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data.replace(b'"trainings"', b'"nothing"'))
    with pytest.raises(CheckpointError, match="changed can't be understood .KeyError: 'trainings'"):
        PPO.load(tmp_path / "changed")
    with pytest.raises(ConfigError, match="save: exclude and include can't be honoured"):
        PPO("MlpPolicy", "CartPole-v1", **SMALL).save(tmp_path / "x", exclude=["policy"])


def test_a_file_of_stable_baselines3_is_named_as_such(tmp_path):
    sb3 = pytest.importorskip("stable_baselines3")
    sb3.PPO("MlpPolicy", "CartPole-v1", device="cpu").save(tmp_path / "theirs")
    with pytest.raises(CheckpointError, match="was saved by stable-baselines3, whose files hold pickles"):
        PPO.load(tmp_path / "theirs")


def test_a_model_draws_no_random_numbers_of_the_script():
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    PPO("MlpPolicy", "CartPole-v1", **SMALL).learn(32)
    assert torch.equal(before, torch.random.get_rng_state())
