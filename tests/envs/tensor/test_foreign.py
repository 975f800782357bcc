"""Simulators that return tensors: a toy one with known results, and mujoco_warp on the CPU."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, SimulatorEnv, Trainer
from fastppo.errors import ConfigError, EnvError
from tests.worlds import short

BOX, TWO = spaces.Box(-np.inf, np.inf, (2,), np.float32), spaces.Discrete(2, start=1)


class Counting:
    """The observation is (steps of the episode, 10 * number of the environment).

    An episode ends after `limit + number` steps: by termination in environment 1, by time limit in the others.
    """

    def __init__(self, n=3, limit=4, final=True, mapping=False):
        self.num_envs, self.limit, self.final, self.mapping, self.closed = n, limit, final, mapping, False
        self.number = torch.arange(n)

    def _obs(self, steps):
        obs = torch.stack((steps, 10 * self.number), 1).float()
        return {"policy": obs, "critic": obs * 0} if self.mapping else obs

    def reset(self):
        self.steps = torch.zeros(self.num_envs, dtype=torch.int64)
        return (self._obs(self.steps), {}) if self.mapping else self._obs(self.steps)

    def step(self, actions):
        assert set(actions.tolist()) <= {1, 2}, "actions must lie in Discrete(2, start=1)"
        actions.mul_(0)  # in place: the simulator must get its own copy
        self.steps = self.steps + 1
        last, over = self._obs(self.steps), self.steps >= self.limit + self.number
        real = over & (self.number == 1)  # environment 1 terminates, the others are truncated
        self.steps = torch.where(over, 0, self.steps)
        extras = {"final_obs": last} if self.final else {}
        return self._obs(self.steps), torch.full((self.num_envs,), 0.5), real, over, extras

    def close(self):
        self.closed = True


class SumValue(torch.nn.Module):
    """V is the sum of the observation, so that a value identifies its observation."""

    def __init__(self):
        super().__init__()
        self.body = torch.nn.Linear(2, 2)

    def forward(self, x):
        return self.body(x), x.sum(-1) + 0 * self.body(x).sum(-1)


@pytest.mark.parametrize("final", [True, False])
@pytest.mark.parametrize("mapping", [True, False])
def test_truncated_episodes_bootstrap_from_their_final_observation(tmp_path, final, mapping):
    simulator = Counting(final=final, mapping=mapping)
    env = SimulatorEnv(simulator, BOX, TWO, final_obs_key="final_obs" if final else None)
    settings = short(tmp_path, n_envs=None, n_steps=12, n_minibatches=1, total_timesteps=36)
    trainer = Trainer(settings, make_env=lambda: env, policy=SumValue())
    assert trainer.config.n_envs == 3
    assert any("approximate" in note for note in trainer.notes) == (not final)
    trainer.collect()
    r = trainer.rollout
    for n in range(3):
        length = 4 + n
        for t in range(12):
            steps = t % length
            cut = steps == length - 1
            assert r.obs[t, n].tolist() == [steps, 10 * n]
            assert (bool(r.truncated[t, n]), bool(r.terminated[t, n])) == (cut, cut and n == 1)
            if not r.terminated[t, n]:
                last = steps + 1 if not cut or final else steps
                assert r.next_values[t, n] == last + 10 * n
    trainer.run()
    assert simulator.closed


def test_a_faulty_simulator_is_refused(tmp_path):
    def train(**changes):
        simulator, kwargs = Counting(), {"final_obs_key": "final_obs"}
        for name, value in changes.items():
            if name in ("obs_key", "final_obs_key"):
                kwargs[name] = value
            else:
                setattr(simulator, name, value)
        settings = short(tmp_path, n_envs=None, n_minibatches=1, run_dir=tmp_path / str(len(list(tmp_path.iterdir()))))
        Trainer(settings, make_env=lambda: SimulatorEnv(simulator, BOX, TWO, **kwargs)).run()

    with pytest.raises(EnvError, match=r"step's extras hold no 'last', but 'final_obs'"):
        train(final_obs_key="last")
    with pytest.raises(EnvError, match=r"observations of reset are 'policy', 'critic'; name one with obs_key"):
        train(mapping=True, obs_key="state")
    shared, flags = torch.zeros(3, 2), [torch.zeros(3).bool()] * 2
    with pytest.raises(EnvError, match=r"give 'final_obs' in the memory of the next observations"):
        train(step=lambda actions: (shared, torch.zeros(3), *flags, {"final_obs": shared}))
    with pytest.raises(
        EnvError, match=r"reset gave observations of shape \(3, 1\); its space says a tensor of \(3, 2\)"
    ):
        train(_obs=lambda steps: torch.zeros(3, 1))
    with pytest.raises(EnvError, match=r"step returned rewards of shape \(3, 1\); it must be a tensor of \(3,\)"):
        train(step=lambda actions: (torch.zeros(3, 2), torch.zeros(3, 1), *[torch.zeros(3).bool()] * 2, {}))
    with pytest.raises(ConfigError, match="n_envs=5, but make_env returned a vector environment of 3"):
        Trainer(short(tmp_path, n_envs=5), make_env=lambda: SimulatorEnv(Counting(), BOX, TWO))
    with pytest.raises(ConfigError, match="it must return a gymnasium Env or VectorEnv, or a SimulatorEnv"):
        Trainer(short(tmp_path), make_env=Counting)


def test_a_policy_trains_on_mujoco_warp(tmp_path):
    pytest.importorskip("mujoco_warp")
    from tests.envs.tensor.warp_pendulum import Pendulum

    simulator = Pendulum(16)
    env = SimulatorEnv(simulator, Pendulum.observation_space, Pendulum.action_space, final_obs_key="final_obs")
    settings = {"n_steps": 30, "n_minibatches": 4, "update_epochs": 2, "total_timesteps": 16 * 30 * 4}
    trainer = Trainer(Config(run_dir=tmp_path / "run", compile="off", **settings), make_env=lambda: env)
    before = trainer.update.parameters.vector.clone()
    result = trainer.run()
    assert result.global_step == 16 * 30 * 4
    assert result.episodes == 16 * (30 * 4 // 25)
    assert not torch.equal(before, trainer.update.parameters.vector)
    # semi-implicit Euler: the change of the angle over a step is the new speed times the time step
    r, whole = trainer.rollout, ~trainer.rollout.done
    angle = torch.atan2(r.obs[..., 1], r.obs[..., 0])
    moved = torch.remainder(angle[1:] - angle[:-1] + torch.pi, 2 * torch.pi) - torch.pi
    torch.testing.assert_close(moved[whole], r.obs[1:, :, 2][whole] * 0.02, atol=1e-4, rtol=1e-3)
