"""Action masks: no illegal action, exact probabilities over the allowed ones, and the right mask at every step."""

import functools
import itertools
import json

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch.distributions import Categorical, kl_divergence

from fastppo import Trainer, load_policy
from fastppo.envs.make_envs import inspect_env
from fastppo.envs.tensor.tasks import TASKS
from fastppo.errors import EnvError
from fastppo.policies.policy_spec import PolicySpec
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import leaves_of, mask_leaf
from tests.envs.test_trees import HallTask, grid, trained
from tests.envs.trees import Scene, legal_taxi, scene, scenes, taxi
from tests.worlds import short

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
ACTIONS = {"one": spaces.Discrete(7), "several": spaces.MultiDiscrete([3, 1, 4])}


def masked_policy(actions):
    """Return a policy with large weights, so that its choices are far from uniform, and the sizes of its components."""
    action = ActionSpec.from_space(ACTIONS[actions])
    obs = ObsSpec(leaves_of(VECTOR, mask=mask_leaf("info", sum(action.nvec))))
    torch.manual_seed(0)
    policy = PolicySpec(obs, action, "mlp", (8,), "tanh", False, False, 10.0).build()
    with torch.no_grad():
        policy.network.actor.linear.weight.normal_(0, 3)
    return policy, action.nvec


def random_rows(policy, nvec, n, seed=0):
    """Return rows of random observations and masks, each of which allows something, and the masks."""
    rng = torch.Generator().manual_seed(seed)
    parts = []
    for k in nvec:
        mask = torch.rand(n, k, generator=rng) < torch.rand(n, 1, generator=rng)
        mask[torch.arange(n), torch.randint(0, k, (n,), generator=rng)] = True
        parts.append(mask)
    mask = torch.cat(parts, 1)
    return policy.encoder.spec.pack((torch.randn(n, 3, generator=rng) * 3, mask)), mask


def chosen(mask, actions, nvec):
    """Return whether the mask allows each action, [N, components]."""
    starts = torch.tensor([0, *itertools.accumulate(nvec)][:-1])
    return mask.gather(1, actions.reshape(len(mask), -1) + starts)


@pytest.mark.parametrize("actions", ACTIONS)
@pytest.mark.parametrize("sampled", [True, False])
def test_no_action_is_illegal_in_a_million(actions, sampled):
    policy, nvec = masked_policy(actions)
    rng, n = torch.Generator().manual_seed(1), 100_000
    for seed in range(10):
        rows, mask = random_rows(policy, nvec, n, seed)
        step = policy.act(rows, policy.draw_noise(n, rng) if sampled else None)
        assert chosen(mask, step.actions, nvec).all()
        assert step.logprobs.isfinite().all()


@pytest.mark.parametrize("actions", ACTIONS)
def test_figures_are_those_of_a_distribution_over_the_allowed_actions_alone(actions):
    policy, nvec = masked_policy(actions)
    rows, mask = random_rows(policy, nvec, 200)
    dist, n = policy.distribution, len(rows)
    params = policy(rows).params.detach()
    other = torch.where(mask, params + torch.randn(params.shape), params)
    unmasked = policy(policy.encoder.spec.pack((policy.encoder.spec.unpack(rows)[0], torch.ones_like(mask)))).params
    noise = policy.draw_noise(n, torch.Generator().manual_seed(2))
    taken = dist.sample(params, noise)
    found = {"log_prob": dist.log_prob(params, taken), "entropy": dist.entropy(params), "kl": dist.kl(params, other)}
    for i in range(n):
        expected = dict.fromkeys(found, 0.0)
        blocks = zip(*(x[i].double().split(nvec) for x in (unmasked.detach(), other)), mask[i].split(nvec), strict=True)
        for c, (logits, others, allowed) in enumerate(blocks):
            here, there = Categorical(logits=logits[allowed]), Categorical(logits=others[allowed])
            place = allowed[: taken[i].reshape(-1)[c]].sum()
            assert allowed[taken[i].reshape(-1)[c]]
            expected["log_prob"] += here.log_prob(place).item()
            expected["entropy"] += here.entropy().item()
            expected["kl"] += kl_divergence(here, there).item()
        for name, value in expected.items():
            assert found[name][i].item() == pytest.approx(value, rel=1e-4, abs=2e-5), name


@pytest.mark.parametrize("actions", ACTIONS)
def test_gradients_are_finite_and_zero_for_forbidden_actions(actions):
    policy, nvec = masked_policy(actions)
    rows, mask = random_rows(policy, nvec, 64)
    logits = []

    def keep(module, given, out):
        out.retain_grad()
        logits.append(out)

    policy.network.actor.linear.register_forward_hook(keep)
    output = policy(rows)
    taken = policy.distribution.mode(output.params)
    evaluated = policy.evaluate_actions(output, taken, output.params.detach())
    kl = policy.distribution.kl(output.params.detach() * 0.5, output.params)
    (evaluated.logprobs.sum() - evaluated.entropy.sum() + kl[kl.isfinite()].sum()).backward()
    assert (logits[0].grad[~mask] == 0).all()
    assert (logits[0].grad[mask] != 0).any()
    for name, p in policy.named_parameters():
        assert p.grad is None or p.grad.isfinite().all(), name


@pytest.mark.parametrize("actions", ACTIONS)
def test_a_single_allowed_action_is_certain(actions):
    policy, nvec = masked_policy(actions)
    rows, mask = random_rows(policy, nvec, 20)
    single = torch.cat(
        [torch.nn.functional.one_hot(part.int().argmax(1), part.shape[1]) for part in mask.split(nvec, 1)], 1
    )
    rows = policy.encoder.spec.pack((policy.encoder.spec.unpack(rows)[0], single))
    step = policy.act(rows, policy.draw_noise(20, torch.Generator().manual_seed(0)))
    dist = policy.distribution
    assert chosen(single, step.actions, nvec).all()
    for figure in (step.logprobs, dist.entropy(step.params), dist.kl(step.params, step.params)):
        assert (figure == 0).all()


def test_all_allowed_changes_nothing():
    policy, _ = masked_policy("one")
    rows, mask = random_rows(policy, (7,), 30)
    everything = policy.encoder.spec.pack((policy.encoder.spec.unpack(rows)[0], torch.ones_like(mask)))
    params, _ = policy.network(policy.encoder.spec.unpack(rows)[0])
    assert torch.equal(policy(everything).params, params)


# ---- masks of environments


def stuck(way):
    """Return make_env and settings of a run in which environment 1, or all, can't act in step 5."""
    if way == "simulator":
        return functools.partial(grid, stuck_at=5), {"n_envs": 3, "n_minibatches": 3}
    if way == "vector":
        return functools.partial(scenes, 2, masks="info", stuck_at=5), {}
    return functools.partial(scene, "info", stuck_at=5), {"vectorization": way} | (
        {"workers": 2} if way == "pool" else {}
    )


@pytest.mark.parametrize("way", ["sync", "pool", "async", "vector"])
@pytest.mark.filterwarnings("ignore:.*ERROR")  # of AsyncVectorEnv
def test_an_environment_that_allows_nothing_is_named_with_its_step(tmp_path, way):
    make_env, settings = stuck(way)
    message = r"^environment [01] .*failed in step 5: its action mask allows no action, but its episode goes on"
    with pytest.raises(EnvError, match=message) as error:
        trained(tmp_path, make_env, **settings)
    assert "\n" not in str(error.value)


def test_a_component_that_allows_nothing_is_named(tmp_path):
    class Half(Scene):
        def _draw_mask(self, n):
            return super()._draw_mask(n) & (n == 3 or self.total < 4)

    with pytest.raises(EnvError, match="allows no action of component 1, but"):
        trained(tmp_path, functools.partial(Half, components=2))


def test_a_simulator_that_allows_nothing_is_named_with_its_step(tmp_path):
    env = grid(stuck_at=5)
    env._simulator.nvec = ()  # it takes illegal actions, as most do
    step = env._simulator.step

    def lenient(actions):
        env._simulator.mask[:] = True
        return step(actions)

    env._simulator.step = lenient
    with pytest.raises(EnvError, match="environment 1 had an action mask that allows no action at step 5 of its run"):
        trained(tmp_path, lambda: env, n_envs=3, n_minibatches=3)


def test_a_tensor_environment_that_allows_nothing_is_named_with_its_step(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "fastppo-tests/Hall-v0", functools.partial(HallTask, stuck=True))
    settings = {"env_id": "fastppo-tests/Hall-v0", "vectorization": "tensor", "n_envs": 4}
    with pytest.raises(
        EnvError, match=r"environment \d had an action mask that allows no action at step \d+ of its run"
    ):
        trained(tmp_path, None, **settings)


class Written(gym.Env):
    """Masks of a fixed table, the third that of last observations; records the actions. Episodes have two steps."""

    observation_space, action_space = spaces.Box(0, 9, (1,), np.float32), spaces.Discrete(3)
    table = ((1, 0, 0), (0, 1, 0), (0, 0, 0))
    played: list = []  # noqa: RUF012 - of all instances

    def _result(self):
        return np.array([self.at], np.float32), {"action_mask": np.array(self.table[self.at])}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return self._result()

    def step(self, action):
        Written.played.append((self.at, int(action)))
        self.at += 1
        obs, info = self._result()
        return obs, 1.0, False, self.at == 2, info


@pytest.mark.parametrize("make", ["single", *gym.vector.AutoresetMode])
def test_the_mask_of_a_reset_holds_for_the_first_step_of_its_episode(tmp_path, make):
    several = functools.partial(gym.vector.SyncVectorEnv, [Written] * 2, autoreset_mode=make)
    trainer = Trainer(short(tmp_path, compile="off"), make_env=Written if make == "single" else several)
    Written.played.clear()
    trainer.run()
    assert set(Written.played) == {(0, 0), (1, 1)}


class Reticent(Written):
    """Tells a mask at resets only."""

    def step(self, action):
        *result, _ = super().step(action)
        return *result, {}


def test_no_mask_means_that_everything_is_allowed(tmp_path):
    trainer = Trainer(short(tmp_path, compile="off"), make_env=Reticent)
    Written.played.clear()
    trainer.run()
    assert {action for at, action in Written.played if at == 0} == {0}
    assert {action for at, action in Written.played if at == 1} == {0, 1, 2}


def test_continuous_actions_have_no_masks():
    class Continuous(Written):
        action_space = spaces.Box(-1, 1, (), np.float32)

    assert not inspect_env("", {}, Continuous).obs_spec.has_mask


@pytest.mark.parametrize(
    ("memory", "compile"),
    [("lstm", "off"), ("mingru", "off"), pytest.param("mingru", "on", marks=pytest.mark.slow)],
)
def test_masks_and_memory_together(tmp_path, memory, compile):
    settings = {"memory": memory, "memory_size": 8, "segment_length": 4, "compile": compile, "log_every": 1}
    trainer = trained(tmp_path, functools.partial(scene, "method", camera=False), **settings)
    assert trainer.config.compile == compile
    assert trainer.policy.has_memory
    _, mask = trainer.spec.obs.unpack(trainer.rollout.obs[:-1].flatten(0, 1))[-2:]
    assert chosen(mask > 0, trainer.rollout.actions.flatten(0, 1), (4,)).all()
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert len(lines) == trainer.n_iterations
    assert all(np.isfinite(line["losses/entropy"]) for line in lines)


@pytest.mark.parametrize("way", ["sync", "pool", "async"])
def test_taxi_is_trained_without_an_illegal_move(tmp_path, way):
    settings = {"vectorization": way, "n_steps": 32, "total_timesteps": 192} | ({"workers": 2} if way == "pool" else {})
    trainer = trained(tmp_path, legal_taxi, **settings)
    assert trainer.spec.obs.leaves[-1].mask_source == "info"
    assert any("action masks: from info" in note for note in trainer.notes)


def test_a_saved_policy_takes_masks(tmp_path):
    trained(tmp_path, taxi)
    policy = load_policy(tmp_path / "run")
    for allowed in range(6):
        action, _ = policy.predict(np.array(17), action_mask=np.arange(6) == allowed)
        assert action == allowed
    assert policy.predict(np.array([17, 18]), action_mask=np.eye(6, dtype=bool)[[3, 5]])[0].tolist() == [3, 5]
