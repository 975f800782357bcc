"""Every keyword of each constructor is honoured or raises; the signatures are those of the other programs."""

import inspect

import gymnasium as gym
import numpy as np
import pytest
import torch

from fastppo import ConfigError
from fastppo.compat import PPO, PPO1, PPO2, MaskablePPO, MlpPolicy, RecurrentPPO, make_vec_env
from fastppo.config import Config, fill_defaults
from fastppo.profiles import PROFILES

FAST = {"compile": "off", "threads": 1}


class Choosing(gym.Env):
    """Two steps per episode; the last of three actions is never allowed."""

    observation_space, action_space = gym.spaces.Box(-1, 1, (2,)), gym.spaces.Discrete(3)
    t = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return self.observation_space.sample() * 0, {}

    def step(self, action):
        assert action != 2
        self.t += 1
        return self.observation_space.sample() * 0, 1.0, self.t == 2, False, {}

    def action_masks(self):
        return [True, True, False]


class Buttons(Choosing):
    """Any of three buttons may be pressed."""

    action_space = gym.spaces.MultiBinary(3)


def made(algorithm, **keywords):
    names = {PPO: "MlpPolicy", PPO1: MlpPolicy, PPO2: "MlpPolicy", MaskablePPO: "MlpPolicy"}
    env = Choosing() if algorithm is MaskablePPO else "CartPole-v1"
    return algorithm(names.get(algorithm, "MlpLstmPolicy"), env, **FAST | keywords)


# keyword: (value, the settings that differ from a model without it), for the constructor of each program
SB3 = {
    "learning_rate": (1e-3, {"learning_rate": 1e-3}),
    "n_steps": (64, {"n_steps": 64, "n_minibatches": 1}),
    "batch_size": (32, {"n_minibatches": 64}),
    "n_epochs": (3, {"update_epochs": 3}),
    "gamma": (0.9, {"gamma": 0.9}),
    "gae_lambda": (0.8, {"gae_lambda": 0.8}),
    "clip_range": (0.1, {"clip_coef": 0.1}),
    "clip_range_vf": (0.3, {"value_clip": "clipped_only", "value_clip_coef": 0.3}),
    "normalize_advantage": (False, {"normalize_advantages": "off"}),
    "ent_coef": (0.1, {"ent_coef": 0.1}),
    "vf_coef": (0.25, {"vf_coef": 0.5}),
    "max_grad_norm": (2.0, {"max_grad_norm": 2.0}),
    "target_kl": (0.02, {"target_kl": 0.02}),
    "policy_kwargs": ({"net_arch": [32]}, {"hidden_sizes": (32,)}),
    "seed": (5, {"seed": 5}),
    "device": (torch.device("cpu"), {"device": "cpu"}),
}
RUN = {"verbose", "tensorboard_log"}  # of a run, not of its settings: tests/compat/test_training.py
RECURRENT = SB3 | {
    "n_steps": (64, {"n_steps": 64}),
    "batch_size": (32, {"n_minibatches": 4, "segment_length": 32}),
    "policy_kwargs": ({"lstm_hidden_size": 16}, {"memory_size": 16}),
}
REFUSED_SB3 = {
    "use_sde": (True, "use_sde=True can't be honoured: state_dependent_std=True"),
    "sde_sample_freq": (4, "sde_sample_freq=4 can't be honoured: fastppo draws noise at every step"),
    "rollout_buffer_class": (dict, "rollout_buffer_class=.* can't be honoured: fastppo has one storage"),
    "rollout_buffer_kwargs": ({"a": 1}, "rollout_buffer_kwargs=.* can't be honoured"),
    "stats_window_size": (10, "stats_window_size=10 can't be honoured: the mean return is that of the last 100"),
    "_init_setup_model": (False, "_init_setup_model=False can't be honoured: the constructor always builds"),
}
STABLE_BASELINES = {
    "gamma": (0.9, {"gamma": 0.9}),
    "lam": (0.8, {"gae_lambda": 0.8}),
    "policy_kwargs": ({"layers": [32]}, {"hidden_sizes": (32,)}),
    "full_tensorboard_log": (True, {"log_histograms": True}),
    "seed": (5, {"seed": 5}),
}
HONOURED = {
    PPO: SB3,
    MaskablePPO: SB3,
    RecurrentPPO: RECURRENT,
    PPO1: STABLE_BASELINES
    | {
        "timesteps_per_actorbatch": (128, {"n_steps": 128, "n_minibatches": 2}),
        "clip_param": (0.1, {"clip_coef": 0.1}),
        "entcoeff": (0.1, {"ent_coef": 0.1}),
        "optim_epochs": (7, {"update_epochs": 7}),
        "optim_stepsize": (3e-4, {"learning_rate": 3e-4}),
        "optim_batchsize": (32, {"n_minibatches": 8}),
        "adam_epsilon": (1e-8, {"adam_eps": 1e-8}),
        "schedule": ("constant", {"anneal_lr": False, "anneal_clip": False}),
    },
    PPO2: STABLE_BASELINES
    | {
        "n_steps": (64, {"n_steps": 64}),
        "ent_coef": (0.1, {"ent_coef": 0.1}),
        "learning_rate": (1e-3, {"learning_rate": 1e-3}),
        "vf_coef": (0.7, {"vf_coef": 0.7}),
        "max_grad_norm": (2.0, {"max_grad_norm": 2.0}),
        "nminibatches": (8, {"n_minibatches": 8}),
        "noptepochs": (7, {"update_epochs": 7}),
        "cliprange": (0.1, {"clip_coef": 0.1}),
        "cliprange_vf": (-1, {"value_clip": "off"}),
    },
}
REFUSED = {
    PPO: REFUSED_SB3,
    MaskablePPO: {name: x for name, x in REFUSED_SB3.items() if "sde" not in name},
    RecurrentPPO: {name: x for name, x in REFUSED_SB3.items() if "buffer" not in name},
    PPO1: {
        "_init_setup_model": REFUSED_SB3["_init_setup_model"],
        "n_cpu_tf_sess": (4, "n_cpu_tf_sess=4 can't be honoured: give threads=2"),
    },
}
REFUSED[PPO2] = REFUSED[PPO1]
CASES = [(a, name, *case) for a, cases in HONOURED.items() for name, case in cases.items()]


@pytest.mark.parametrize("algorithm", HONOURED)
def test_each_keyword_of_the_signature_is_honoured_or_refused(algorithm):
    names = set(inspect.signature(algorithm).parameters) - {"policy", "env", "settings"}
    assert (
        names - {"normalize_obs", "normalize_rewards"} == HONOURED[algorithm].keys() | REFUSED[algorithm].keys() | RUN
    )


@pytest.mark.parametrize(("algorithm", "name", "value", "expected"), CASES)
def test_a_keyword_changes_its_settings_and_no_other(algorithm, name, value, expected):
    plain, changed = made(algorithm, **{"seed": 1}), made(algorithm, **{"seed": 1} | {name: value})
    before, after = plain.config.to_dict(), changed.config.to_dict()
    different = {key: getattr(changed.config, key) for key in before if before[key] != after[key]}
    assert different == expected


@pytest.mark.parametrize(("algorithm", "name"), [(a, name) for a, cases in REFUSED.items() for name in cases])
def test_what_cannot_be_honoured_raises_and_its_default_does_not(algorithm, name):
    value, message = REFUSED[algorithm][name]
    with pytest.raises(ConfigError, match=message):
        made(algorithm, **{name: value})
    made(algorithm, **{name: inspect.signature(algorithm).parameters[name].default})


@pytest.mark.parametrize(("algorithm", "profile"), [(PPO, "sb3"), (PPO1, "ppo1"), (PPO2, "ppo2")])
def test_the_defaults_are_the_profile(algorithm, profile):
    ours = made(algorithm, seed=1).config
    theirs = fill_defaults(Config(profile=profile, n_envs=1), "discrete")
    for name in PROFILES[profile].settings:
        name = "n_minibatches" if name == "minibatch_size" else name
        assert getattr(ours, name) == getattr(theirs, name), name


def test_the_signatures_are_those_of_stable_baselines3():
    sb3, contrib = pytest.importorskip("stable_baselines3"), pytest.importorskip("sb3_contrib")
    for ours, theirs in ((PPO, sb3.PPO), (RecurrentPPO, contrib.RecurrentPPO), (MaskablePPO, contrib.MaskablePPO)):
        expected = [(p.name, p.default) for p in inspect.signature(theirs).parameters.values()]
        own = ("normalize_obs", "normalize_rewards", "settings")
        found = [(p.name, p.default) for p in inspect.signature(ours).parameters.values() if p.name not in own]
        assert found == expected


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "expected"),
    [
        (PPO, {"net_arch": {"pi": [8, 8], "vf": [8, 8]}}, {"hidden_sizes": (8, 8), "shared_trunk": False}),
        (PPO, {"net_arch": [{"pi": [8], "vf": [8]}]}, {"hidden_sizes": (8,)}),
        (PPO, {"activation_fn": torch.nn.ReLU}, {"activation": "relu"}),
        (PPO, {"optimizer_kwargs": {"eps": 1e-7}}, {"adam_eps": 1e-7}),
        (PPO, {"ortho_init": True, "log_std_init": 0.0, "optimizer_class": torch.optim.Adam}, {}),
        (RecurrentPPO, {}, {"memory": "lstm", "memory_size": 256}),
        (PPO2, {"net_arch": [8, 8]}, {"hidden_sizes": (8, 8), "shared_trunk": True}),
        (PPO2, {"act_fun": torch.relu}, {"activation": "relu"}),
    ],
)
def test_arguments_of_the_policy(algorithm, kwargs, expected):
    config = made(algorithm, policy_kwargs=kwargs).config
    assert {name: getattr(config, name) for name in expected} == expected


@pytest.mark.parametrize(
    ("algorithm", "kwargs", "message"),
    [
        (PPO, {"net_arch": {"pi": [8], "vf": [4]}}, "other layers for the policy .* make them equal"),
        (PPO, {"net_arch": {"pi": 8, "vf": 4}}, "other layers for the policy .* make them equal"),
        (PPO, {"net_arch": [True]}, "must name the units of at least one hidden layer"),
        (PPO, {"optimizer_kwargs": ["eps"]}, "optimizer_kwargs=.* must be a dict"),
        (PPO, {"net_arch": []}, "must name the units of at least one hidden layer"),
        (PPO, {"net_arch": [8, {"pi": [8], "vf": [8]}]}, "must name the units of at least one hidden layer"),
        (PPO, {"activation_fn": torch.nn.Hardtanh}, "activation_fn=Hardtanh must be one of tanh, relu"),
        (PPO, {"ortho_init": False}, "ortho_init=False can't be honoured: fastppo's initial weights are orthogonal"),
        (PPO, {"log_std_init": -1.0}, "the standard deviation starts at 1"),
        (PPO, {"squash_output": True}, 'action_distribution="squashed"'),
        (PPO, {"optimizer_class": torch.optim.SGD}, "optimizer_class=SGD can't be honoured: fastppo steps by Adam"),
        (PPO, {"optimizer_kwargs": {"weight_decay": 0.1}}, "optimizer_kwargs weight_decay=0.1 can't be honoured"),
        (PPO, {"features_extractor_class": dict}, "give fastppo.Trainer your own network"),
        (PPO, {"nonsense": 1}, "there is no 'nonsense' here"),
        (RecurrentPPO, {"n_lstm_layers": 2}, "fastppo's memory is one layer"),
        (RecurrentPPO, {"enable_critic_lstm": False}, "policy and value have a memory each"),
        (PPO2, {"layer_norm": True}, "layer_norm=True can't be honoured"),
    ],
)
def test_arguments_of_the_policy_that_cannot_be_honoured(algorithm, kwargs, message):
    with pytest.raises(ConfigError, match=message):
        made(algorithm, policy_kwargs=kwargs)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PPO("MlpLstmPolicy", "CartPole-v1"), "policy='MlpLstmPolicy' must be MlpPolicy or CnnPolicy or Multi"),
        (lambda: RecurrentPPO("MlpPolicy", "CartPole-v1"), "policy='MlpPolicy' must be MlpLstmPolicy or"),
        (
            lambda: PPO(torch.nn.Linear, "CartPole-v1"),
            "policy='Linear' must be .*; for a network of your own, give fast",
        ),
        (lambda: PPO("MlpPolicy", 3), "env is an int; give an id, a Gymnasium environment or a VecEnv"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", n_steps=100), "rows don't divide the rollout of 100 .*: 50, 100"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", clip_coef=0.1), "clip_coef=0.1: another keyword stands for this"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", n_envs=4), "n_envs=4: another keyword stands for this"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", batch=4), "keywords: unknown setting 'batch'"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", learning_rate=lambda left: None), "function must return a number"),
        (lambda: PPO1("MlpPolicy", "CartPole-v1", schedule="cosine"), "schedule='cosine' must be linear or constant"),
        (lambda: MaskablePPO("MlpPolicy", "CartPole-v1"), "needs masks of allowed actions, but CartPole-v1 gives none"),
        (
            lambda: MaskablePPO("MlpPolicy", Buttons()),
            "masks .*, which multibinary actions don.t have here",
        ),
        (lambda: PPO("MlpPolicy", "CartPole-v1", clip_range_vf=-1), "clip_range_vf=-1 must be positive; None switches"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", gamma=1.5), "gamma=1.5 must be at most 1"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", seed="a"), "seed='a' must be a whole number"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", n_steps="64"), "n_steps='64' must be a whole number"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=0), "nearest that do: 1[.]$"),
        (lambda: PPO("MlpPolicy", "CartPole-v1", policy_kwargs=[64]), r"policy_kwargs=\[64\] must be a dict"),
        (lambda: made(PPO).learn("many"), "total_timesteps='many' must be a whole number"),
        (lambda: made(PPO).learn(64, log_interval=None), "log_interval=None must be a whole number"),
        (lambda: made(PPO).learn(64, callback="eval"), "callback is a str; give a function"),
        (
            lambda: made(PPO).learn(64, callback=Choosing),
            "is the class Choosing; give an object of it",
        ),
        (lambda: make_vec_env("CartPole-v1", 0), "n_envs=0 must be at least 1"),
        (lambda: make_vec_env("CartPole-v1", "4"), "n_envs='4' must be a whole number"),
    ],
)
def test_mistakes_get_one_line_with_a_way_out(make, message):
    with pytest.raises(ConfigError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_missing_arguments_are_a_type_error():
    with pytest.raises(TypeError, match="missing a required argument: 'env'"):
        PPO("MlpPolicy")


def test_policies_may_be_the_classes_of_stable_baselines3():
    policies = pytest.importorskip("stable_baselines3.common.policies")
    assert PPO(policies.ActorCriticPolicy, "CartPole-v1", **FAST).config.network == "mlp"


def test_settings_of_fastppo_and_normalisation():
    config = PPO("MlpPolicy", "Pendulum-v1", normalize_obs=True, normalize_rewards=True, obs_clip=5.0, **FAST).config
    assert (config.normalize_obs, config.normalize_rewards, config.obs_clip, config.threads) == (True, True, 5.0, 1)
    assert PPO("MlpPolicy", "Pendulum-v1", **FAST).config.normalize_obs is False


@pytest.mark.parametrize(
    "setting", [{"action_distribution": "squashed"}, {"state_dependent_std": True}, {"kl_stop_factor": 2.0}]
)
def test_settings_that_no_keyword_stands_for_may_be_given(setting):
    config = PPO("MlpPolicy", "Pendulum-v1", **setting, **FAST).config
    assert {name: getattr(config, name) for name in setting} == setting


def test_exploration_by_rnd_is_refused():
    with pytest.raises(ConfigError, match="rnd=True can't be honoured"):
        PPO("MlpPolicy", "Pendulum-v1", rnd=True, **FAST)


def test_whole_numbers_may_be_numpys_or_floats():
    config = made(PPO, n_steps=np.int64(64), batch_size=32.0, policy_kwargs={"net_arch": [np.int64(16)]}).config
    assert (config.n_steps, config.n_minibatches, config.hidden_sizes) == (64, 2, (16,))
    assert type(config.n_steps) is int


def test_without_a_seed_each_model_has_its_own():
    assert made(PPO).config.seed != made(PPO).config.seed


@pytest.mark.parametrize(
    ("use", "message"),
    [
        (lambda model: model.learn(-5), "total_timesteps=-5 must be at least 1"),
        (lambda model: model.save(None), "None names no file"),
        (lambda model: model.save(""), "'' names no file"),
        (lambda model: setattr(model, "gamma", 0.5), "PPO.gamma can't be set: give gamma=... to the constructor"),
        (lambda model: model.learn(64, lambda found, _: found["dones"]), r"a callback reads locals\['dones'\]"),
        (lambda model: model.learn(64, lambda found, _: "infos" in found), r"a callback reads locals\['infos'\]"),
    ],
)
def test_what_a_model_cannot_do_is_one_line(use, message):
    model = PPO("MlpPolicy", "CartPole-v1", n_steps=64, batch_size=32)
    before = model.config
    with pytest.raises(ConfigError, match=message):
        use(model)
    assert model.config == before


def test_attributes_of_the_other_program_are_explained():
    model = PPO("MlpPolicy", "CartPole-v1")
    with pytest.raises(AttributeError, match="no attribute gamma here; its config attribute holds the settings"):
        model.gamma  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute set_random_seed here; give seed=... to the constructor"):
        model.set_random_seed(1)
    with pytest.raises(AttributeError, match=r"no attribute get_parameters here; policy.state_dict\(\) returns the"):
        model.get_parameters()
    with pytest.raises(AttributeError, match="no attribute nonsense here[.]$"):
        model.nonsense  # noqa: B018
    assert not hasattr(model, "rollout_buffer")
