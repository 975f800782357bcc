"""Scripts written for stable-baselines3 and stable-baselines run on fastppo with their imports changed.

See docs/compat.md for what each keyword does here.
"""

from fastppo.compat.algorithms import PPO as PPO
from fastppo.compat.algorithms import PPO1 as PPO1
from fastppo.compat.algorithms import PPO2 as PPO2
from fastppo.compat.algorithms import MaskablePPO as MaskablePPO
from fastppo.compat.algorithms import RecurrentPPO as RecurrentPPO
from fastppo.compat.envs import make_vec_env as make_vec_env

# The policies of those programs; their constructors take the name as well
MlpPolicy, CnnPolicy, MultiInputPolicy = "MlpPolicy", "CnnPolicy", "MultiInputPolicy"
MlpLstmPolicy, CnnLstmPolicy, MultiInputLstmPolicy = "MlpLstmPolicy", "CnnLstmPolicy", "MultiInputLstmPolicy"
