"""Scripts written for stable-baselines3 and stable-baselines, with their imports changed and fewer steps."""

import runpy
import subprocess
import sys

import pytest

from tests import PATIENCE

# The quick start of stable-baselines3
QUICK_START = """
import gymnasium as gym
from fastppo.compat import PPO

env = gym.make("CartPole-v1", render_mode="rgb_array")
model = PPO("MlpPolicy", env, verbose=1)
model.learn(total_timesteps=4_000)
vec_env = model.get_env()
obs = vec_env.reset()
for i in range(100):
    action, _state = model.predict(obs, deterministic=True)
    obs, reward, done, info = vec_env.step(action)
assert model.num_timesteps == 4_096, model.num_timesteps
"""
# Saving, loading, evaluating, a callback, a schedule, several environments with normalisation
WHOLE = """
import gymnasium as gym
import numpy as np
from stable_baselines3.common.callbacks import BaseCallback, EvalCallback
from stable_baselines3.common.evaluation import evaluate_policy
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.monitor import Monitor
from stable_baselines3.common.vec_env import VecNormalize
from fastppo.compat import PPO


class Count(BaseCallback):
    def __init__(self):
        super().__init__()
        self.count = 0

    def _on_step(self):
        self.count += 1
        self.logger.record("count/steps", self.count)
        return True


env = make_vec_env("CartPole-v1", n_envs=4)
count = Count()
model = PPO(
    "MlpPolicy",
    env,
    n_steps=128,
    batch_size=64,
    learning_rate=lambda remaining: 3e-4 * remaining,
    policy_kwargs=dict(net_arch=dict(pi=[32, 32], vf=[32, 32])),
    tensorboard_log="logs",
    seed=0,
)
model.learn(2_000, callback=[count, EvalCallback(Monitor(gym.make("CartPole-v1")), eval_freq=200, verbose=0)])
assert count.count == 512 and model.num_timesteps == 2_048, (count.count, model.num_timesteps)
mean, std = evaluate_policy(model, Monitor(gym.make("CartPole-v1")), n_eval_episodes=5)
assert mean >= 8
model.save("ppo_cartpole")
del model
model = PPO.load("ppo_cartpole", env=env, custom_objects={"learning_rate": 1e-4})
obs = env.reset()
for _ in range(20):
    action, _states = model.predict(obs)
    obs, rewards, dones, info = env.step(action)
model.learn(512, reset_num_timesteps=False)
assert model.num_timesteps == 2_560

venv = VecNormalize(make_vec_env("Pendulum-v1", n_envs=2))
model = PPO("MlpPolicy", venv, n_steps=64, batch_size=64).learn(256)
model.save("pendulum")
venv.save("normalize.pkl")
venv = VecNormalize.load("normalize.pkl", make_vec_env("Pendulum-v1", n_envs=1))
venv.training = venv.norm_reward = False
evaluate_policy(PPO.load("pendulum"), venv, n_eval_episodes=1)

model = PPO("MlpPolicy", "Pendulum-v1", n_steps=64, normalize_obs=True, normalize_rewards=True).learn(128)
evaluate_policy(model, Monitor(gym.make("Pendulum-v1")), n_eval_episodes=1)
"""
PPO1 = """
from fastppo.compat import PPO1
import gymnasium as gym
import sys

env = gym.make("CartPole-v1")
model = PPO1("MlpPolicy", env, clip_param=0.2, timesteps_per_actorbatch=2048)
model.learn(total_timesteps=4_096)
model.get_env()
assert not [name for name in sys.modules if name.startswith(("stable_baselines3", "sb3_contrib"))]
"""
PPO2 = """
import sys

sys.modules["stable_baselines3"] = sys.modules["sb3_contrib"] = None  # as if they weren't installed
import gymnasium as gym

from fastppo.compat import MlpPolicy
from fastppo.compat import make_vec_env
from fastppo.compat import PPO2

env = make_vec_env('CartPole-v1', n_envs=4)
model = PPO2(MlpPolicy, env, verbose=1)
model.learn(total_timesteps=2_500)
model.save('ppo2_cartpole')
del model
model = PPO2.load('ppo2_cartpole')
obs = env.reset()
for _ in range(20):
    action, _states = model.predict(obs)
    obs, rewards, dones, info = env.step(action)
"""
CONTRIB = """
import numpy as np
from sb3_contrib.common.envs import InvalidActionEnvDiscrete
from sb3_contrib.common.maskable.evaluation import evaluate_policy
from sb3_contrib.common.maskable.utils import get_action_masks
from fastppo.compat import MaskablePPO, RecurrentPPO

env = InvalidActionEnvDiscrete(dim=20, n_invalid_actions=10)
model = MaskablePPO("MlpPolicy", env, gamma=0.4, seed=32, n_steps=128)
model.learn(256)
evaluate_policy(model, env, n_eval_episodes=2, warn=False)
model.save("ppo_mask")
model = MaskablePPO.load("ppo_mask")
obs, _ = env.reset()
for _ in range(20):
    action_masks = get_action_masks(env)
    action, _states = model.predict(obs, action_masks=action_masks)
    assert action_masks[action]
    obs, reward, terminated, truncated, info = env.step(action)

model = RecurrentPPO("MlpLstmPolicy", "CartPole-v1", verbose=1)
model.learn(256)
vec_env = model.get_env()
obs = vec_env.reset()
lstm_states = None
episode_starts = np.ones((1,), dtype=bool)
for _ in range(20):
    action, lstm_states = model.predict(obs, state=lstm_states, episode_start=episode_starts, deterministic=True)
    obs, rewards, dones, info = vec_env.step(action)
    episode_starts = dones
"""
SCRIPTS = {"quick start": QUICK_START, "whole": WHOLE, "PPO1": PPO1, "PPO2": PPO2, "contrib": CONTRIB}


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.filterwarnings("ignore")  # some are stable-baselines3's own
def test_a_script_runs_with_its_imports_changed(name, tmp_path, monkeypatch):
    if name in ("whole", "contrib"):
        pytest.importorskip("stable_baselines3" if name == "whole" else "sb3_contrib")
    (tmp_path / "script.py").write_text(SCRIPTS[name])
    if "sys.modules" not in SCRIPTS[name]:
        monkeypatch.chdir(tmp_path)
        runpy.run_path("script.py", run_name="__main__")
        return
    command = [sys.executable, "-W", "ignore", "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr
