"""A pendulum in mujoco_warp, like the simulator example in docs/environments.md."""

import mujoco
import mujoco_warp
import numpy as np
import torch
import warp
from gymnasium import spaces

XML = """<mujoco><option timestep="0.02"/><worldbody><body><joint name="hinge" axis="0 1 0"/>
<geom type="capsule" size="0.02" fromto="0 0 0 0 0 0.5" mass="0.2" contype="0" conaffinity="0"/></body></worldbody>
<actuator><motor joint="hinge" ctrlrange="-1 1"/></actuator></mujoco>"""


class Pendulum:
    observation_space = spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,), np.float32)

    def __init__(self, num_envs, time_limit=25):
        self.num_envs, self.time_limit = num_envs, time_limit
        model = mujoco.MjModel.from_xml_string(XML)
        self.model, self.data = mujoco_warp.put_model(model), mujoco_warp.make_data(model, nworld=num_envs)
        self.angle, self.speed, self.torque = (
            warp.to_torch(x)[:, 0] for x in (self.data.qpos, self.data.qvel, self.data.ctrl)
        )
        self.steps = torch.zeros(num_envs, dtype=torch.int64, device=self.angle.device)

    def observe(self):
        return torch.stack((self.angle.cos(), self.angle.sin(), self.speed), 1)

    def restart(self, which):
        self.angle[which] = torch.rand_like(self.angle)[which] * 6.28
        self.speed[which], self.steps[which] = 0.0, 0

    def reset(self):
        self.restart(torch.ones_like(self.steps, dtype=torch.bool))
        return self.observe()

    def step(self, actions):
        self.torque.copy_(actions[:, 0])
        mujoco_warp.step(self.model, self.data)
        self.steps += 1
        last, reward, over = self.observe(), self.angle.cos(), self.steps >= self.time_limit
        self.restart(over)
        return self.observe(), reward, torch.zeros_like(over), over, {"final_obs": last}
