"""Random network distillation against its definition, in every way of running, and on a task without it hopeless."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from safetensors.torch import load_file
from torch import nn

from fastppo import Config, Trainer, load_policy, resume
from fastppo.analysis.verify_resume import run_hashes, verify_resume
from fastppo.errors import CheckpointError, ConfigError, EnvError
from fastppo.functional.distillation import distillation_loss, novelty
from fastppo.resume_run import continue_run
from fastppo.runs.open_run import read_config
from tests.envs.worlds import Counter
from tests.faults.test_resume import interrupted, rows_of
from tests.reference.gae import advantages_by_definition
from tests.worlds import BrightSide, Endings, Lock, Masked, Spaces, short

RND = {"rnd": True, "n_steps": 8, "n_envs": 2, "compile": "off", "threads": 1}


def trainer_of(tmp_path, make_env=Endings, policy=None, **changes):
    return Trainer(short(tmp_path, **RND | changes), make_env=make_env, policy=policy, progress=False)


def test_novelty_and_loss_are_those_of_plain_floats():
    p, t = [[1.0, 2.0, -1.0], [0.5, 0.0, 3.0]], [[0.0, 2.5, 1.0], [0.5, -2.0, 1.0]]
    squares = [[(a - b) ** 2 for a, b in zip(x, y, strict=True)] for x, y in zip(p, t, strict=True)]
    found = novelty(torch.tensor(p), torch.tensor(t))
    assert found.tolist() == pytest.approx([0.5 * sum(row) for row in squares])
    mean = sum(sum(row) for row in squares) / 6
    assert distillation_loss(torch.tensor(p), torch.tensor(t)).item() == pytest.approx(mean)


class ByDefinition:
    """Intrinsic rewards and advantages from the definition, in float64 and plain loops; it sees every rollout."""

    def __init__(self, n_envs):
        self.seen, self.sums, self.carried = [], [], [0.0] * n_envs

    def __call__(self, rnd, obs, gamma, gae_lambda):
        """Return rewards, advantages and returns [T][N] for observations [T + 1, N, D] and the networks `rnd`."""
        steps, n_envs = len(obs) - 1, obs.shape[1]
        self.seen += list(obs[1:].reshape(steps * n_envs, -1).copy())
        mean, std = np.mean(self.seen, 0), np.sqrt(np.var(self.seen, 0) + 1e-8)
        x = torch.tensor(np.clip((obs - mean) / std, -5, 5), dtype=torch.float32)
        with torch.no_grad():
            errors = (rnd.predictor(x.flatten(0, 1)) - rnd.target(x.flatten(0, 1))).view(steps + 1, n_envs, -1)
            values = rnd.critic(x.flatten(0, 1)).view(steps + 1, n_envs).tolist()
        new = [[0.5 * sum(e * e for e in errors[t + 1, n].tolist()) for n in range(n_envs)] for t in range(steps)]
        for t in range(steps):
            for n in range(n_envs):
                self.carried[n] = new[t][n] + gamma * self.carried[n]
                self.sums.append(self.carried[n])
        scale = math.sqrt(np.var(self.sums) + 1e-8)
        rewards = [[x / scale for x in row] for row in new]
        never = [[False] * n_envs for _ in range(steps)]
        case = {"rewards": rewards, "values": values[:-1], "next_values": values[1:], "terminated": never}
        advantages = advantages_by_definition(case | {"done": never, "gamma": gamma, "gae_lambda": gae_lambda})
        returns = [[a + v for a, v in zip(*pair, strict=True)] for pair in zip(advantages, values, strict=False)]
        return rewards, advantages, returns


def test_rewards_and_advantages_are_those_of_the_definition(tmp_path):
    """Episodes end in both ways; the intrinsic return passes over their ends, and that of the rewards doesn't."""
    trainer = trainer_of(tmp_path, n_envs=3, rnd_coef=0.7, rnd_gamma=0.9, total_timesteps=8 * 3 * 3, anneal_lr=False)
    curiosity, r = trainer.learner.curiosity, trainer.rollout
    definition, original, ends = ByDefinition(3), trainer.learner.compute_advantages, []

    def compute():
        before = copy.deepcopy(curiosity.rnd)
        rewards = original()
        ends.append((r.terminated.any(), (r.truncated & ~r.terminated).any()))
        new, intrinsic, returns = definition(before, r.obs.numpy(), 0.9, 0.95)
        for ours, theirs in ((curiosity.rewards, new), (curiosity.returns, returns)):
            torch.testing.assert_close(ours, torch.tensor(theirs), rtol=1e-4, atol=1e-5)
        names = ("rewards", "values", "next_values", "terminated", "done")
        case = {name: getattr(r, name).tolist() for name in names} | {"gamma": 0.99, "gae_lambda": 0.95}
        extrinsic = advantages_by_definition(case)
        total = torch.tensor(extrinsic) + 0.7 * torch.tensor(intrinsic)
        torch.testing.assert_close(r.advantages, total, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(r.returns, torch.tensor(extrinsic) + r.values, rtol=1e-4, atol=1e-4)
        assert torch.tensor(intrinsic).abs().max() > 0.05
        return rewards

    trainer.learner.compute_advantages = compute
    trainer.run()
    assert len(ends) == 3
    assert all(any(kind) for kind in zip(*ends, strict=True)), "both ways of ending must occur"


def by_autograd(rnd, learned, obs, n_envs, returns, orders, proportion, lr, vf_coef, max_norm):
    """Train `learned`, the copies of predictor and critic, with torch's Adam, one minibatch after another."""
    optimizer = torch.optim.Adam(learned.parameters(), lr=lr, eps=1e-5)
    for rows in orders.flatten(0, 1):
        k = round(proportion * len(rows))
        chosen = rows[[i * len(rows) // k for i in range(k)]]
        x, after = (rnd.observations(part) for part in (obs[rows], obs[chosen + n_envs]))
        error = ((learned["predictor"](after) - rnd.target(after).detach()) ** 2).mean()
        loss = error + vf_coef * 0.5 * ((learned["critic"](x)[:, 0] - returns[rows]) ** 2).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learned.parameters(), max_norm)
        optimizer.step()


@pytest.mark.parametrize("how", ["off", "on"])
def test_an_update_is_that_of_autograd_and_torch_adam(tmp_path, how):
    changes = {"vectorization": "tensor", "env_id": "CartPole-v1", "n_envs": 4, "total_timesteps": 4 * 8 * 3}
    changes |= {"learning_rate": 2e-3, "anneal_lr": False, "vf_coef": 0.7, "rnd_proportion": 0.4, "record_ratios": 0}
    trainer = trainer_of(tmp_path, make_env=None, **changes, compile=how)
    curiosity, rnd, learn = trainer.learner.curiosity, trainer.learner.curiosity.rnd, trainer.learner.curiosity.learn
    learned = nn.ModuleDict({"predictor": copy.deepcopy(rnd.predictor), "critic": copy.deepcopy(rnd.critic)})
    fixed, moved = copy.deepcopy(rnd.target.state_dict()), []
    assert trainer.config.compile == how

    def compared(orders, coefs):
        if not moved:
            obs = trainer.rollout.obs.flatten(0, 1).clone()
            before = nn.utils.parameters_to_vector(learned.parameters()).detach().clone()
            by_autograd(rnd, learned, obs, 4, curiosity.returns.flatten(), orders.clone(), 0.4, 2e-3, 0.7, 0.5)
            learn(orders, coefs)
            ours = nn.utils.parameters_to_vector([*rnd.predictor.parameters(), *rnd.critic.parameters()])
            theirs = nn.utils.parameters_to_vector(learned.parameters())
            torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
            moved.append((theirs - before).abs().max().item())
        else:
            learn(orders, coefs)

    curiosity.learn = compared
    trainer.run()
    assert moved[0] > 1e-3, "the update must move the parameters"
    assert all(torch.equal(x, rnd.target.state_dict()[name]) for name, x in fixed.items())


def test_the_policy_learns_the_same_where_the_weight_is_negligible(tmp_path):
    """RND draws from no stream of the policy and leaves its update alone: 1e-30 times an advantage adds nothing."""
    for name, changes in {"with": {"rnd": True, "rnd_coef": 1e-30}, "without": {"rnd": False}}.items():
        trainer_of(tmp_path, run_dir=tmp_path / name, **changes).run()
    found, expected = run_hashes(tmp_path / "with"), run_hashes(tmp_path / "without")
    same = [name for name in expected if name.split(".")[0] in ("policy", "update", "collector")]
    assert len(same) > 10
    assert all(found[name] == expected[name] for name in same)


def dict_world():
    inside = {"image": spaces.Box(0, 255, (36, 36, 1), np.uint8), "place": spaces.Box(-1, 1, (3,), np.float32)}
    return Spaces(spaces.Dict({**inside, "door": spaces.Discrete(3)}), spaces.Discrete(2))


class OwnNetwork(nn.Module):
    """A network of a user's own."""

    def __init__(self):
        super().__init__()
        self.actor, self.critic = nn.Linear(3, 3), nn.Linear(3, 1)

    def forward(self, x):
        return self.actor(x), self.critic(x).squeeze(-1)


CASES = {
    "vectors": {"make_env": Endings},
    "an own network": {"make_env": Endings, "policy": OwnNetwork},
    "one-hot": {"make_env": lambda: Lock(5)},
    "images": {"make_env": BrightSide},
    "images by an MLP": {"make_env": BrightSide, "network": "mlp"},
    "a Dict": {"make_env": dict_world},
    "a Dict, some of it for the critic": {"make_env": dict_world, "critic_obs_keys": ("door",)},
    "masks": {"make_env": lambda: Masked(spaces.Box(-1, 1, (3,), np.float32), spaces.Discrete(4))},
    "memory": {"make_env": Endings, "memory": "gru", "segment_length": 4},
    "Box actions": {"make_env": lambda: Spaces(spaces.Discrete(5), spaces.Box(-1, 1, (2,), np.float32))},
    "pool": {"env_id": "CartPole-v1", "vectorization": "pool", "workers": 2, "half_batches": True},
    "native, next-step autoreset": {"env_id": "CartPole-v1", "vectorization": "native", "n_steps": 64},
    "tensor images": {"env_id": "fastppo/Catch-v0", "vectorization": "tensor"},
}


@pytest.mark.parametrize("name", CASES)
def test_every_kind_of_observation_and_stepping_trains(tmp_path, name):
    case = CASES[name] | {"total_timesteps": 2 * CASES[name].get("n_steps", 8) * 3}
    make_env, network = case.pop("make_env", None), case.pop("policy", None)
    trainer = trainer_of(tmp_path, make_env=make_env, policy=network and network(), **case)
    rnd = trainer.learner.curiosity.rnd
    before = {part: copy.deepcopy(getattr(rnd, part).state_dict()) for part in ("target", "predictor", "critic")}
    convolves = any(isinstance(module, nn.Conv2d) for module in rnd.predictor.modules())
    assert convolves == (name in ("images", "a Dict", "a Dict, some of it for the critic", "tensor images"))
    for stats in trainer.iterations():
        figures = {name: x for name, x in stats.scalars.items() if "rnd" in name or "intrinsic" in name}
        explained = figures.pop("losses/intrinsic_explained_variance")
        assert explained <= 1 or math.isnan(explained)
        assert len(figures) == 3
        assert all(math.isfinite(x) and x > 0 for x in figures.values()), figures
    moved = {part: any(not torch.equal(x, getattr(rnd, part).state_dict()[k]) for k, x in was.items())
             for part, was in before.items()}  # fmt: skip
    assert moved == {"target": False, "predictor": True, "critic": True}
    assert rnd.observations.count == trainer.rollout.rewards.numel() * 3
    if name == "native, next-step autoreset":
        assert not trainer.rollout.valid.all()
    load_policy(tmp_path / "run", network and network())


def test_what_is_seen_again_is_no_longer_new(tmp_path):
    """Of the dials of a lock, those that training never reaches stay new."""
    faster = {"learning_rate": 2e-3, "anneal_lr": False, "n_steps": 64, "total_timesteps": 2 * 64 * 20}
    trainer = trainer_of(tmp_path, make_env=lambda: Lock(30), **faster)
    rnd, dials = trainer.learner.curiosity.rnd, torch.arange(30)
    trained, predictor = [], copy.deepcopy(rnd.predictor.state_dict())
    trainer.run()
    for state in (rnd.predictor.state_dict(), predictor):
        rnd.predictor.load_state_dict(state)
        with torch.no_grad():
            out = rnd(dials, dials)
        trained.append(novelty(out.predictions, out.targets))
    left = trained[0] / trained[1]  # share of the first error
    assert left[0] < 0.1
    assert left[20:].min() > 5 * left[0]
    assert trained[0][20:].min() > 5 * trained[0][0]


LONG = {"n_envs": 4, "n_steps": 8, "total_timesteps": 4 * 8 * 6, "checkpoint_every": 32}


@pytest.mark.parametrize(
    "changes",
    [
        {"env_id": "CartPole-v1", "normalize_rewards": True},
        {"env_id": "CartPole-v1", "vectorization": "pool", "workers": 2, "memory": "lstm", "segment_length": 4},
        {"env_id": "CartPole-v1", "vectorization": "native"},
        {"env_id": "CartPole-v1", "vectorization": "tensor", "compile": "graph", "n_steps": 2, "n_minibatches": 1},
        {"env_id": "CartPole-v1", "vectorization": "tensor", "target_kl": 0.01},
    ],
    ids=lambda changes: changes.get("vectorization", "sync") + "-" + changes.get("compile", "off"),
)
def test_a_resumed_run_is_bit_identical(tmp_path, changes):
    config = short(tmp_path, **RND | LONG | changes)
    Trainer(short(tmp_path, **RND | LONG | changes, run_dir=tmp_path / "whole")).run()
    interrupted(config, 3)
    continued = resume(config.run_dir)
    assert continued.learner.curiosity.rnd.rewards.carry.abs().max() > 0
    continued.run()
    hashes = run_hashes(tmp_path / "whole")
    assert {"curiosity.mean", "learner.intrinsic_carry", "rnd.target.1.weight", "rnd.observations.mean"} <= set(hashes)
    assert hashes == run_hashes(config.run_dir)
    assert rows_of(tmp_path / "whole") == rows_of(config.run_dir)


def test_verify_resume_compares_rnd():
    settings = RND | {"env_id": "CartPole-v1", "n_minibatches": 2, "vectorization": "sync"}
    results = list(verify_resume(Config(**settings), 4))
    assert all(result.state != "bad" for result in results), results
    assert {"rnd", "curiosity"} <= {result.name for result in results}


def continued_with(tmp_path, **changes):
    return continue_run(dataclasses.replace(read_config(tmp_path / "run"), **changes), tmp_path / "run")


def test_a_resume_with_other_environments_keeps_what_rnd_has_learned(tmp_path):
    interrupted(short(tmp_path, **RND | LONG, env_id="CartPole-v1"), 3)
    same = resume(tmp_path / "run").learner.curiosity
    other = continued_with(tmp_path, n_envs=2).learner.curiosity
    for a, b in zip(same.rnd.state_dict().values(), other.rnd.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert torch.equal(same.state.optimizer.mean, other.state.optimizer.mean)
    assert same.state.optimizer.mean.abs().max() > 0
    assert other.rnd.rewards.carry.tolist() == [0, 0]


def test_a_resume_neither_adds_nor_drops_rnd(tmp_path):
    interrupted(short(tmp_path, **RND | LONG, env_id="CartPole-v1"), 2)
    with pytest.raises(CheckpointError, match="rnd was True, is False"):
        continued_with(tmp_path, rnd=False)
    again = continued_with(tmp_path, rnd_coef=0.25)
    assert any("rnd_coef was 0.5, is 0.25" in note for note in again.notes)
    again.env.close()


def test_a_state_of_another_shape_is_refused(tmp_path):
    curiosity = trainer_of(tmp_path).learner.curiosity
    saved = {name: x.clone() for name, x in curiosity.state_dict().items()}
    with pytest.raises(ValueError, match=r"square of RND has shape \(1,\), not \(\d+,\)"):
        curiosity.load_state_dict(saved | {"square": torch.ones(1)})


def test_init_from_takes_what_is_known_where_both_runs_have_rnd(tmp_path):
    trainer_of(tmp_path, run_dir=tmp_path / "with").run()
    trainer_of(tmp_path, run_dir=tmp_path / "without", rnd=False).run()
    saved = load_file(tmp_path / "with" / "model.safetensors")
    again = trainer_of(tmp_path, run_dir=tmp_path / "again", init_from=tmp_path / "with", seed=2)
    assert all(torch.equal(saved[f"rnd.{name}"], x) for name, x in again.learner.curiosity.rnd.state_dict().items())
    plain = trainer_of(tmp_path, run_dir=tmp_path / "plain", init_from=tmp_path / "with", rnd=False)
    assert plain.learner.curiosity is None
    fresh = trainer_of(tmp_path, run_dir=tmp_path / "fresh", init_from=tmp_path / "without")
    assert fresh.learner.curiosity.rnd.observations.count == 0


def test_an_observation_that_is_not_finite_does_not_reach_the_moments(tmp_path):
    class Sick(Counter):
        def step(self, action):
            obs, *rest = super().step(action)
            self.total = getattr(self, "total", 0) + 1
            return (obs * np.nan if self.total == 12 else obs, *rest)

    with pytest.raises(EnvError, match="observation that is not finite"):
        trainer_of(tmp_path, make_env=Sick, total_timesteps=160, resume_envs="restart").run()
    saved = load_file(tmp_path / "run" / "model.safetensors")
    assert "rnd.rewards.mean" in saved
    assert all(x.isfinite().all() for x in saved.values())


def test_the_memory_plan_counts_the_update_of_rnd(tmp_path):
    settings = {"make_env": BrightSide, "n_envs": 64, "n_minibatches": 1}
    without, with_rnd = (
        trainer_of(tmp_path, **settings, rnd=rnd, run_dir=tmp_path / str(rnd)).memory for rnd in (False, True)
    )
    assert with_rnd.storage == without.storage
    assert with_rnd.update > without.update + 8 * 36 * 36 * 64 * 8, "images in float64"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rnd_coef": 0.1}, "rnd_coef=0.1 has no effect without --rnd; add it, or leave rnd_coef out."),
        ({"rnd_gamma": 0.9}, "rnd_gamma=0.9 has no effect without --rnd"),
        ({"rnd": True, "rnd_coef": 0.0}, "rnd_coef=0.0 must be greater than 0"),
        ({"rnd": True, "rnd_proportion": 1.5}, "rnd_proportion=1.5 must be at most 1"),
    ],
)
def test_settings_that_make_no_sense_are_one_clear_line(changes, message):
    with pytest.raises(ConfigError, match=message):
        Config(**changes)


LEARN = {"n_envs": 8, "n_steps": 128, "compile": "off", "threads": 1, "record_ratios": 0}
LEARN |= {"learning_rate": 1e-3, "anneal_lr": False}


def open_lock(folder, dials, steps, seed, **changes):
    config = Config(**LEARN | changes, total_timesteps=steps, seed=seed, run_dir=folder)
    return Trainer(config, make_env=lambda: Lock(dials), progress=False).run().mean_return


@pytest.mark.parametrize("rnd", [True, False])
def test_a_lock_opens_with_rnd_alone(tmp_path, rnd):
    """Random choices open it once in 65,536 attempts."""
    assert open_lock(tmp_path / "run", 16, 20 * 1024, 1, rnd=rnd) == pytest.approx(float(rnd), abs=0.1)


@pytest.mark.slow
def test_a_long_lock_opens_with_rnd_alone_on_5_seeds(tmp_path):
    """Random choices open it once in 16,777,216 attempts."""
    for seed in range(1, 6):
        assert open_lock(tmp_path / f"rnd{seed}", 24, 100_000, seed, rnd=True) > 0.9, seed
        assert open_lock(tmp_path / f"plain{seed}", 24, 100_000, seed) == 0, seed
