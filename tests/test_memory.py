"""Memory: the state of every step in rollouts and updates, for each cell, way of stepping and sequence length."""

import itertools
import tracemalloc

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from fastppo import Trainer, load_policy
from fastppo.analysis.nan_replay import replay
from fastppo.analysis.verify_resume import verify_resume
from fastppo.config import Config
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.episodes import EpisodePlayer, begin_episode
from fastppo.evaluation.saved_policy import evaluate
from fastppo.native import recurrence as native
from fastppo.native.library import sources_hash
from fastppo.policies.memory import RecurrentNetwork
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo.collector import Collector
from fastppo.ppo.minibatches import sequence_rows
from fastppo.resume_run import resume
from fastppo.runs.nan_dump import save_nan_dump
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec
from tests.reference.recurrence_policy import ReferencePolicy, loss_of_sequences
from tests.worlds import Endings, short

CELLS = ("lstm", "gru", "mingru")
T = 16
SMALL = {
    "n_envs": 6,
    "n_steps": T,
    "total_timesteps": 6 * T * 3,
    "hidden_sizes": (8, 6),
    "memory_size": 5,
    "compile": "off",
    "threads": 1,
    "record_ratios": 0,
}


def trainer_of(tmp_path, make_env=Endings, policy=None, **changes):
    settings = SMALL | changes
    return Trainer(short(tmp_path, **settings), make_env=make_env, policy=policy, progress=False)


def randomise(trainer, scale=0.5):
    """Give every weight a size that matters: heads start near zero, and so would all ratios near 1."""
    g = torch.Generator().manual_seed(3)
    vector = trainer.update.parameters.vector
    vector.add_(scale * torch.randn(vector.shape, generator=g))


def ratios(trainer):
    """Return the ratios [T, N] of the rollout under the current weights, in the sequences that the update uses."""
    update, rollout = trainer.update, trainer.rollout
    n_steps, n = rollout.rewards.shape
    length = update.shuffle.segment_length
    rows = sequence_rows(torch.arange(n_steps // length * n), n, length)
    batch = rollout.batch().take(rows, length)
    with torch.no_grad():
        output = trainer.policy(batch.obs, batch.states, batch.starts)
        now = trainer.policy.evaluate_actions(output, batch.actions, batch.params)
    found = torch.empty(n_steps * n)
    found[rows] = (now.logprobs - batch.logprobs).exp()
    return found.view(n_steps, n)


def largest_ratio_error(trainer, iterations=3):
    """Return the largest |ratio - 1| before the first step, with both endings within sequences."""
    worst, ends = 0.0, {"terminated": 0, "truncated": 0}
    stepped = trainer.iterations()
    randomise(trainer)
    for _ in range(iterations):
        next(stepped)
        rollout = trainer.rollout
        for name in ends:
            ends[name] += getattr(rollout, name)[:-1].sum().item()
        ended = rollout.done if rollout.valid is None else ~rollout.valid
        assert torch.equal(rollout.starts[1:], ended), "an episode starts after each ending, and nowhere else"
        error = (ratios(trainer) - 1).abs()
        worst = max(worst, (error if rollout.valid is None else error[rollout.valid]).max().item())
    stepped.close()
    assert all(ends.values()), ends
    return worst


# CartPole's tensor version has both endings within a rollout only if its time limit is short
TENSOR = {
    "total_timesteps": 24 * T * 3,
    "env_id": "CartPole-v1",
    "env_kwargs": {"max_episode_steps": 20},
    "vectorization": "tensor",
    "n_envs": 24,
}
WAYS = {
    "sync": {},
    "pool": {"vectorization": "pool", "workers": 2},
    "halves": {"vectorization": "pool", "workers": 2, "half_batches": True},
    "tensor": TENSOR,
}
MATRIX = list(itertools.product(CELLS, ("off", "on", "graph"), WAYS, (1, 8, T)))
# every pair of values of two columns occurs
PAIRS = [
    ("lstm", "off", "sync", 1),
    ("lstm", "on", "pool", 8),
    ("lstm", "graph", "tensor", T),
    ("lstm", "graph", "halves", 8),
    ("gru", "off", "pool", T),
    ("gru", "on", "tensor", 1),
    ("gru", "graph", "sync", 8),
    ("gru", "off", "halves", 1),
    ("mingru", "off", "tensor", 8),
    ("mingru", "on", "sync", T),
    ("mingru", "graph", "pool", 1),
    ("mingru", "on", "halves", T),
]


def check_ratio(tmp_path, kind, compile, way, length):
    settings = {"memory": kind, "compile": compile, "segment_length": length, "learning_rate": 0.0} | WAYS[way]
    make_env = None if way == "tensor" else Endings
    # small graphs where they are compiled, which takes most of the time
    settings |= {"hidden_sizes": (8,)} if compile == "on" else {}
    trainer = trainer_of(tmp_path, make_env, shared_trunk=way in ("sync", "halves"), **settings)
    assert trainer.config.compile == compile, trainer.notes
    assert largest_ratio_error(trainer) < 1e-5


def test_the_pairs_are_all_pairs():
    for a, b in itertools.combinations(range(4), 2):
        wanted = {(case[a], case[b]) for case in MATRIX}
        assert {(case[a], case[b]) for case in PAIRS} == wanted


@pytest.mark.parametrize(("kind", "compile", "way", "length"), PAIRS)
def test_every_ratio_is_1_before_the_first_step(tmp_path, kind, compile, way, length):
    check_ratio(tmp_path, kind, compile, way, length)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "compile", "way", "length"), sorted(set(MATRIX) - set(PAIRS), key=str))
def test_every_ratio_is_1_in_every_combination(tmp_path, kind, compile, way, length):
    check_ratio(tmp_path, kind, compile, way, length)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_every_ratio_is_1_in_each_autoreset_mode(tmp_path, mode):
    trainer = trainer_of(
        tmp_path,
        lambda: SyncVectorEnv([Endings] * 6, autoreset_mode=mode),
        memory="lstm",
        segment_length=8,
        learning_rate=0.0,
    )
    assert largest_ratio_error(trainer) < 1e-5
    # a filler row holds the last observation; the row after it is reset
    assert (trainer.rollout.valid is not None) == (mode == AutoresetMode.NEXT_STEP)


class Scene(Endings):
    """Endings with an image and a mask."""

    observation_space = spaces.Dict(
        camera=spaces.Box(0, 255, (36, 36, 1), np.uint8),
        at=spaces.Box(-np.inf, np.inf, (3,), np.float32),
        action_mask=spaces.MultiBinary(3),
    )

    def _obs(self):
        allowed = self.np_random.integers(0, 2, 3).astype(np.int8)
        allowed[self.np_random.integers(3)] = 1
        camera = self.np_random.integers(0, 256, (36, 36, 1)).astype(np.uint8)
        return {"camera": camera, "at": super()._obs(), "action_mask": allowed}


class Picture(Endings):
    observation_space = spaces.Box(0, 255, (36, 36, 1), np.uint8)

    def _obs(self):
        return self.np_random.integers(0, 256, (36, 36, 1)).astype(np.uint8)


@pytest.mark.parametrize(("make_env", "kind"), [(Picture, "lstm"), (Scene, "gru")])
def test_every_ratio_is_1_behind_convolutions_and_masks(tmp_path, make_env, kind):
    trainer = trainer_of(tmp_path, make_env, memory=kind, segment_length=8, learning_rate=0.0, n_minibatches=2)
    trainer.update.parameters.vector.mul_(1.5)
    stepped = trainer.iterations()
    for _ in range(2):
        next(stepped)
        assert (ratios(trainer) - 1).abs().max() < 1e-5
    stepped.close()


def marked_late(self, starts, t, group):
    """Mark where step t - 1 starts an episode."""
    rollout = self.rollout
    starts[t, group] = rollout.terminated[t - 2, group] | rollout.truncated[t - 2, group] if t > 1 else False


def moved_in_sequences(steps, forward=RecurrentNetwork.forward):
    """Move the resets of sequences by `steps`; acting has sequences of one step, which stay as they are."""
    return lambda self, x, state, starts: forward(self, x, state, starts.roll(steps, 0))


MOVED = {
    "late where it is marked": (Collector, "_mark_starts", marked_late),
    "late in sequences": (RecurrentNetwork, "forward", moved_in_sequences(1)),
    "early in sequences": (RecurrentNetwork, "forward", moved_in_sequences(-1)),
}


@pytest.mark.parametrize(
    ("moved", "way"),
    [
        *(("late where it is marked", way) for way in WAYS),
        ("late in sequences", "sync"),
        ("early in sequences", "tensor"),
    ],
)
def test_the_check_of_the_ratios_fails_when_the_reset_is_moved_by_one_step(tmp_path, monkeypatch, moved, way):
    monkeypatch.setattr(*MOVED[moved])
    with pytest.raises(AssertionError, match="an episode starts after each ending|< 1e-05"):
        check_ratio(tmp_path, "lstm", "off", way, 8)


def test_a_reset_moved_while_acting_leaks_memory_into_the_next_episode(tmp_path, monkeypatch):
    """Moved for acting and update alike, the ratios stay 1, but memory depends on the episode before."""
    original = Collector._mark_starts

    def late(self, starts, t, group):
        original(self, starts, t, group)
        starts[t, group] = starts[t - 1, group] if t > 1 else False

    def first_states(mutated):
        if mutated:
            monkeypatch.setattr(Collector, "_mark_starts", late)
        trainer = trainer_of(tmp_path, run_dir=tmp_path / str(mutated), memory="lstm", learning_rate=0.0)
        stepped = trainer.iterations()
        randomise(trainer)
        next(stepped)
        stepped.close()
        return trainer

    for mutated in (False, True):
        trainer = first_states(mutated)
        error = max(
            (a - b).abs().max().item() for a, b in zip(trainer.rollout.states, expected_states(trainer), strict=True)
        )
        assert (error > 1e-3) is mutated


def reference_of(trainer):
    parameters = dict(trainer.policy.network.named_parameters())
    return ReferencePolicy(trainer.config.memory, parameters, shared=trainer.config.shared_trunk)


def expected_states(trainer):
    """Return the states [T + 1, N, H] by definition: a loop over environments and steps, from their endings alone."""
    policy, rollout = reference_of(trainer), trainer.rollout
    n_steps, n = rollout.rewards.shape
    expected = [x.clone() for x in rollout.states]
    for i in range(n):
        state = [x[0, i].double() for x in rollout.states]
        for t in range(n_steps):
            over = t > 0 and (rollout.terminated[t - 1, i] or rollout.truncated[t - 1, i])
            if over or (t == 0 and rollout.starts[0, i]):
                state = [torch.zeros_like(x) for x in state]
            with torch.no_grad():
                *_, state = policy.step(rollout.obs[t, i].double(), state)
            for x, new in zip(expected, state, strict=True):
                x[t + 1, i] = new.float()
    return expected


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_stored_states_and_values_are_those_of_the_definition(tmp_path, kind, shared):
    trainer = trainer_of(tmp_path, memory=kind, shared_trunk=shared, learning_rate=0.0)
    stepped = trainer.iterations()
    randomise(trainer)
    for iteration in range(2):
        before = [x[-1].clone() for x in trainer.rollout.states]
        next(stepped)
        rollout, policy = trainer.rollout, reference_of(trainer)
        for x, old in zip(rollout.states, before, strict=True):
            assert torch.equal(x[0], old), "memory goes on from rollout to rollout"
        assert rollout.starts[0].all() == (iteration == 0)
        for ours, theirs in zip(rollout.states, expected_states(trainer), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for t, i in itertools.product(range(T), range(6)):
            state = [x[t, i].double() * (not rollout.starts[t, i]) for x in rollout.states]
            logits, value, _ = policy.step(rollout.obs[t, i].double(), state)
            torch.testing.assert_close(rollout.values[t, i].double(), value.detach(), rtol=1e-4, atol=1e-5)
            logprob = torch.log_softmax(logits, 0)[rollout.actions[t, i]].detach()
            torch.testing.assert_close(rollout.logprobs[t, i].double(), logprob, rtol=1e-4, atol=1e-5)
    stepped.close()


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", CELLS)
def test_acting_allocates_no_array(tmp_path, kind, shared):
    n, size = 512, 64
    many = {"n_envs": n, "n_steps": 8, "total_timesteps": 8 * n, "memory_size": size}
    trainer = trainer_of(tmp_path, memory=kind, shared_trunk=shared, **many)
    trainer.collect()
    (actor,), starts = trainer.collect.actors, trainer.rollout.starts
    assert starts[:-1].any(1).all(), "every step resets some state"
    actor.act(0)
    tracemalloc.start()  # numpy reports its arrays to it, and the buffers of a masked copy, which are of one size
    for t in range(8):
        actor.act(t)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < n * size * 4 / 2, "half of one state of one memory"


class Remembered(Endings):
    """Endings that keeps its last observation of each episode for the test."""

    def __init__(self):
        self.finals = []

    def step(self, action):
        obs, *rest = super().step(action)
        if rest[1] or rest[2]:
            self.finals.append(obs)
        return obs, *rest


@pytest.mark.parametrize("kind", CELLS)
def test_the_value_at_a_time_limit_sees_the_state_after_the_last_step(tmp_path, kind):
    made = []

    def make():
        made.append(Remembered())
        return made[-1]

    trainer = trainer_of(tmp_path, make, memory=kind, learning_rate=0.0)
    stepped = trainer.iterations()
    randomise(trainer)
    envs = [env.unwrapped for env in trainer.env.venv.envs]
    for env in envs:
        env.finals.clear()
    next(stepped)
    rollout, policy = trainer.rollout, reference_of(trainer)
    checked = 0
    for i, env in enumerate(envs):
        ends = rollout.done[:, i].nonzero().flatten().tolist()
        for t, final in zip(ends, env.finals, strict=True):
            if rollout.terminated[t, i]:
                continue
            live = [x[t + 1, i].double() for x in rollout.states]  # after step t, before the reset
            _, value, _ = policy.step(torch.from_numpy(final).double(), live)
            torch.testing.assert_close(rollout.next_values[t, i].double(), value.detach(), rtol=1e-4, atol=1e-5)
            checked += 1
        last = [x[T, i].double() * (not rollout.starts[T, i]) for x in rollout.states]
        _, value, _ = policy.step(rollout.obs[T, i].double(), last)
        if not rollout.done[-1, i]:
            torch.testing.assert_close(rollout.next_values[-1, i].double(), value.detach(), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 10
    stepped.close()


@pytest.mark.parametrize("compile", ["off", "graph"])
def test_the_value_at_a_time_limit_on_the_device(tmp_path, compile):
    within_a_rollout = TENSOR | {"env_kwargs": {"max_episode_steps": 8}}
    trainer = trainer_of(tmp_path, None, memory="lstm", compile=compile, learning_rate=0.0, **within_a_rollout)
    stepped = trainer.iterations()
    randomise(trainer)
    next(stepped)
    rollout, policy = trainer.rollout, reference_of(trainer)
    final, checked = trainer.env.final_obs_buffer, 0
    for k, i in itertools.product(range(len(final.end_steps)), range(24)):
        t = int(final.end_steps[k, i])
        if t < T:
            live = [x[t + 1, i].double() for x in rollout.states]
            _, value, _ = policy.step(final.obs[k, i].double(), live)
            torch.testing.assert_close(rollout.next_values[t, i].double(), value.detach(), rtol=1e-4, atol=1e-5)
            checked += 1
    assert checked > 10
    stepped.close()


@pytest.mark.parametrize("length", [8, T])
@pytest.mark.parametrize("kind", CELLS)
def test_the_gradient_is_that_of_a_plain_loop(tmp_path, kind, length):
    trainer = trainer_of(
        tmp_path, memory=kind, segment_length=length, learning_rate=0.0, value_clip="off", ent_coef=0.01
    )
    stepped = trainer.iterations()
    randomise(trainer)
    next(stepped)
    stepped.close()
    rollout, update = trainer.rollout, trainer.update
    rollout.logprobs.add_(0.1 * torch.randn(rollout.logprobs.shape, generator=torch.Generator().manual_seed(0)))
    update.prepare(rollout.rewards.numel(), float("inf"))
    gradient = update.gradient(rollout.batch(), trainer.learner.coefs)
    # the rows of the first minibatch, as pairs of sequence and environment
    first = update.shuffle.orders[0, 0][: update.shuffle.orders.shape[2] // length]
    sequences = [(int(row) // 6 // length, int(row) % 6) for row in first]
    inside = [rollout.starts[k * length + 1 : (k + 1) * length, n].any() for k, n in sequences]
    assert any(inside), "an episode starts within a sequence"
    policy, coefs = reference_of(trainer), trainer.learner.coefs
    loss = loss_of_sequences(
        policy,
        vars(rollout),
        sequences,
        length,
        clip=coefs.clip_coef.item(),
        vf_coef=coefs.vf_coef.item(),
        ent_coef=coefs.ent_coef.item(),
    )
    names = [name.removeprefix("network.") for name in update.trained]
    expected = torch.autograd.grad(loss, [policy.parameters[name] for name in names])
    flat = torch.cat([x.flatten() for x in expected]).float()
    ours = torch.cat([x.flatten() for x in update.parameters.views(gradient)])
    assert (ours - flat).norm() < 1e-5 * max(1.0, flat.norm())


class GatedLayer(nn.Module):
    """A memory that starts from zero, written as a feed-forward layer: there is nothing to forget."""

    def __init__(self, network):
        super().__init__()
        self.body, (self.memory,) = network.body, network.memories

    def forward(self, x):
        gates = self.memory.input(self.body.features(x)[0]).chunk(self.memory.n_gates, -1)
        return self.body.heads((getattr(self, type(self.memory).__name__.lower())(*gates),))

    def lstm(self, i, f, g, o):
        return torch.sigmoid(o) * torch.tanh(torch.sigmoid(i) * torch.tanh(g))

    def gru(self, r, z, n):
        return (1 - torch.sigmoid(z)) * torch.tanh(n + torch.sigmoid(r) * self.memory.bias)

    def mingru(self, z, n):
        return torch.sigmoid(z) * n


class Forgetful(nn.Module):
    """A network with memory whose every step is an episode start."""

    def __init__(self, network):
        super().__init__()
        self.inner = network

    def initial_state(self, n):
        return self.inner.initial_state(n)

    def forward(self, x, state, episode_start):
        return self.inner(x, state, torch.ones_like(episode_start))


@pytest.mark.parametrize("kind", CELLS)
def test_sequences_of_one_step_without_recurrence_are_a_feed_forward_layer(tmp_path, kind):
    trained = []
    for wrap in (GatedLayer, Forgetful):
        base = trainer_of(tmp_path, run_dir=tmp_path / f"{wrap.__name__}-base", memory=kind, shared_trunk=True)
        network = base.policy.network
        base.env.close()
        if network.memories[0].is_recurrent:
            network.memories[0].recurrent.data.zero_()
            network.memories[0].recurrent.requires_grad_(False)
        segment = {} if wrap is GatedLayer else {"segment_length": 1}
        trainer = trainer_of(tmp_path, policy=wrap(network), run_dir=tmp_path / wrap.__name__, **segment)
        trainer.run()
        trained.append(trainer.update.parameters.vector)
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("kind", "changes"), [("lstm", {}), ("gru", {"segment_length": 4}), ("mingru", {})])
def test_a_resumed_run_is_the_uninterrupted_one(kind, changes):
    settings = SMALL | {"env_id": "CartPole-v1", "memory": kind, "n_minibatches": 2, "vectorization": "sync"} | changes
    results = list(verify_resume(Config(**settings), 4))
    assert all(result.state != "bad" for result in results), results
    assert any(result.name == "resume" and "exact" in str(result) for result in results)


@pytest.mark.parametrize(("kind", "noted"), [("lstm", True), ("gru", True), ("mingru", False), ("none", False)])
def test_a_memory_without_c_is_noted_at_the_start_and_after_a_resume(tmp_path, monkeypatch, kind, noted):
    def notes_on(trainer, word):
        return [note for note in trainer.notes if word in note]

    trainer = trainer_of(tmp_path, memory=kind, total_timesteps=6 * T)
    assert not notes_on(trainer, "computed in torch")
    trainer.run()
    monkeypatch.setattr(native, "unavailable", lambda: "there is no C compiler (cc)")
    again = resume(tmp_path / "run", make_env=Endings, progress=False, total_timesteps=6 * T * 2)
    message = f"memory {kind} is computed in torch, at half the speed of C: there is no C compiler (cc)."
    assert notes_on(again, "computed in torch") == [message] * noted
    lost = notes_on(again, f"the checkpoint has native code {sources_hash()}, now absent")
    assert bool(lost) is (kind != "none")
    again.run()
    third = resume(tmp_path / "run", make_env=Endings, progress=False, total_timesteps=6 * T * 3)
    assert not notes_on(third, "native code")
    third.env.close()


def test_new_episodes_after_a_resume_begin_without_memory(tmp_path):
    trainer = trainer_of(tmp_path, memory="lstm", resume_envs="restart")
    stepped = trainer.iterations()
    next(stepped)
    stepped.close()
    continued = resume(tmp_path / "run", make_env=Endings, progress=False)
    assert continued.rollout.starts[-1].all()
    next(continued.iterations())
    assert continued.rollout.starts[0].all()


def test_memory_of_another_kind_is_refused(tmp_path):
    trainer_of(tmp_path, memory="lstm").run()
    for name, changes in {"gru": {"memory": "gru"}, "none": {}, "size": {"memory": "lstm", "memory_size": 6}}.items():
        with pytest.raises(CheckpointError, match=r"init_from: .*another policy: memory(_size)? (lstm|5) there, "):
            trainer_of(tmp_path, run_dir=tmp_path / name, init_from=tmp_path / "run", **changes)
    again = trainer_of(tmp_path, run_dir=tmp_path / "again", init_from=tmp_path / "run", memory="lstm")
    saved = load_policy(tmp_path / "run").policy.state_dict()
    assert all(torch.equal(saved[name], x) for name, x in again.policy.state_dict().items())
    again.env.close()


@pytest.mark.parametrize("kind", CELLS)
def test_predict_repeats_the_decisions_of_training(tmp_path, kind):
    trainer = trainer_of(tmp_path, memory=kind, total_timesteps=6 * T)
    trainer.run()
    saved = load_policy(tmp_path / "run")
    obs = np.random.default_rng(0).normal(size=(7, 2, 3)).astype(np.float32)
    starts = np.array([[1, 1], [0, 0], [0, 1], [0, 0], [1, 0], [0, 0], [0, 0]], bool)
    state, theirs = None, trainer.policy.initial_state(2)
    for x, start in zip(obs, starts, strict=True):
        actions, state = saved.predict(x, state, start)
        step = trainer.policy.act(torch.from_numpy(x), None, theirs, torch.from_numpy(start))
        theirs = step.state
        assert actions.tolist() == step.actions.tolist()
        for a, b in zip(state, theirs, strict=True):
            torch.testing.assert_close(a, b)
    fresh = saved.predict(obs[0])[1]
    assert all(torch.equal(a, b) for a, b in zip(fresh, saved.predict(obs[0], state, True)[1], strict=True))
    with pytest.raises(ValueError, match="state is of 2 episodes, but obs holds 1"):
        saved.predict(obs[0, 0], state)


class Recall(gym.Env):
    """The first observation shows which action is right at the third and last step: 1 if it is remembered."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps, self.right = 0, int(self.np_random.integers(2))
        return np.array([2 * self.right - 1, 0], np.float32), {}

    def step(self, action):
        self.steps += 1
        over = self.steps == 3
        obs = np.array([0, self.steps == 2], np.float32)
        return obs, float(over and action == self.right), over, False, {}


@pytest.mark.parametrize(("kind", "least", "most"), [("none", 0.3, 0.7), ("gru", 0.99, 1.0)])
def test_a_task_of_recall_needs_memory_in_training_and_evaluation(tmp_path, kind, least, most):
    settings = {"n_envs": 16, "n_steps": 12, "n_minibatches": 4, "total_timesteps": 16 * 12 * 60, "learning_rate": 0.01}
    trainer = trainer_of(tmp_path, Recall, memory=kind, memory_size=16, **settings)
    trainer.run()
    played = evaluate(tmp_path / "run", 40, make_env=Recall)
    assert least <= played.mean <= most


class Counted(Endings):
    """Endings that keeps whether each step ended an episode."""

    def __init__(self):
        self.ended = []

    def step(self, action):
        result = super().step(action)
        self.ended.append(result[2] or result[3])
        return result


def recorded(policy):
    """Keep what `policy.act` is given and returns: a list of (state, starts, next state), one for each step."""
    seen = []

    def act(obs, noise, state, starts, original=policy.act):
        step = original(obs, noise, state, starts)
        seen.append((tuple(x.clone() for x in state), starts.clone(), tuple(x.clone() for x in step.state)))
        return step

    policy.act = act
    return seen


def assert_carried(seen):
    for (_, _, after), (before, _, _) in itertools.pairwise(seen):
        assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))


def test_evaluation_carries_memory_and_resets_it(tmp_path):
    """Each step of the player is that of `act` from the state of its own episode alone."""
    trainer = trainer_of(tmp_path, memory="lstm")
    randomise(trainer)
    policy, seen = trainer.policy, recorded(trainer.policy)
    env = make_vec_env(inspect_env("", {}, Counted), 2, "sync")
    EpisodePlayer(env, policy, torch.device("cpu"), np.random.SeedSequence(0), max_steps=50)(6)
    for i, own in enumerate(env.venv.envs):
        assert [starts[i].item() for _, starts, _ in seen] == [True, *own.unwrapped.ended[:-1]]
    assert sum(starts.sum().item() for _, starts, _ in seen) >= 6
    assert_carried(seen)
    env.close()
    trainer.env.close()


def test_the_episode_of_a_video_carries_memory(tmp_path):
    trainer = trainer_of(tmp_path, memory="lstm")
    spec, seen = trainer.spec, recorded(trainer.policy)
    act = begin_episode(trainer.policy, spec.obs, spec.action, torch.device("cpu"), None)
    for _ in range(4):
        act(np.ones(3, np.float32))
    assert [starts.item() for _, starts, _ in seen] == [True, False, False, False]
    assert_carried(seen)
    trainer.env.close()


def test_bf16_keeps_the_memory_in_float32(tmp_path):
    trainer = trainer_of(tmp_path, memory="lstm", precision="bf16", learning_rate=0.0)
    stepped = trainer.iterations()
    next(stepped)
    assert all(x.dtype == torch.float32 for x in trainer.rollout.states)
    assert (ratios(trainer) - 1).abs().max() < 1e-2
    stepped.close()


def test_a_dump_of_sequences_is_replayed(tmp_path):
    trainer = trainer_of(tmp_path, memory="gru", segment_length=8)
    stepped = trainer.iterations()
    next(stepped)
    stepped.close()
    folder, update = tmp_path / "capsule-1", trainer.update
    saved = {"policy": trainer.policy}

    def dump(folder):
        save_nan_dump(
            folder,
            trainer.spec,
            saved,
            trainer.rollout.batch(),
            trainer.learner.coefs,
            update=update,
            metadata={"iteration": 1},
        )
        return replay(folder)

    assert dump(folder).first_bad is None
    trainer.rollout.states[0][8, 2] = torch.nan  # the state before the second sequence of environment 2
    trainer.rollout.starts[8, 2] = False
    found = dump(tmp_path / "capsule-2")
    assert found.first_bad.name == "batch: state 0"


def test_the_plan_counts_the_states(tmp_path):
    plans = {}
    for kind in ("none", "lstm"):
        trainer = trainer_of(
            tmp_path, run_dir=tmp_path / kind, memory=kind, memory_size=64, n_steps=64, total_timesteps=384
        )
        plans[kind] = trainer.memory.storage
        trainer.env.close()
    states = 4 * (64 + 1) * 6 * 64 * 4  # two memories of two tensors, float32
    assert plans["lstm"] - plans["none"] == pytest.approx(states + (64 + 1) * 6, rel=0.01)


class CellNetwork(nn.Module):
    """A user's network: a loop around torch's own cell."""

    def __init__(self, broken=""):
        super().__init__()
        self.cell, self.actor, self.critic = nn.GRUCell(3, 6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.broken = broken

    def initial_state(self, n):
        return torch.zeros(n, 6) if self.broken == "no tuple" else (torch.zeros(n, 6),)

    def forward(self, x, state, episode_start):
        (hidden,), outs = state, []
        if self.broken == "all rows":
            episode_start = episode_start.any(1, keepdim=True).expand_as(episode_start)
        if self.broken == "one late":
            episode_start = torch.cat((torch.zeros_like(episode_start[:1]), episode_start[:-1]))
        for row, start in zip(x, episode_start, strict=True):
            began = hidden
            hidden = self.cell(row, torch.where(start.unsqueeze(-1), 0.0, hidden))
            if self.broken == "in place":
                hidden = began.copy_(hidden)
            if self.broken == "first step" and len(outs):
                hidden = began
            outs.append(hidden.clone())
        out = torch.stack(outs)
        params, values = self.actor(out), self.critic(out).squeeze(-1)
        if self.broken == "no state":
            return params, values
        if self.broken == "another shape":
            return params, values, (hidden[:, :2],)
        return (params[..., :2] if self.broken == "params" else params), values, (hidden,)


def test_a_network_of_ones_own_may_have_memory(tmp_path):
    torch.manual_seed(0)
    network = CellNetwork()
    trainer = trainer_of(tmp_path, policy=network, segment_length=8, learning_rate=0.0)
    assert largest_ratio_error(trainer) < 1e-5
    twin = CellNetwork()
    total = 6 * T * 6
    continued = resume(tmp_path / "run", make_env=Endings, policy=twin, progress=False, total_timesteps=total)
    assert not continued.rollout.starts[-1].all(), "its memory goes on"
    continued.run()
    action, state = load_policy(tmp_path / "run", twin).predict(np.zeros(3, np.float32))
    assert action.shape == ()
    assert state[0].shape == (1, 6)


def test_memory_for_a_network_that_has_none_is_refused(tmp_path):
    network = nn.Sequential(nn.Flatten(), nn.Linear(3, 4))
    for settings, message in (
        ({"memory": "lstm"}, r"memory=lstm and a policy module are both given; give the module an initial_state"),
        ({"segment_length": 8}, r"segment_length needs a memory"),
    ):
        with pytest.raises(ConfigError, match=message) as error:
            trainer_of(tmp_path, policy=network, **settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ConfigError, match="memory=gru and a policy module are both given"):
        trainer_of(tmp_path, policy=CellNetwork(), memory="gru")


class LearnedStart(CellNetwork):
    """A network that learns its first state, and counts steps in whole numbers."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.ones(6))

    def initial_state(self, n):
        return self.first.expand(n, 6), torch.zeros(n, dtype=torch.int64)

    def forward(self, x, state, episode_start):
        (hidden, steps), outs = state, []
        for row, start in zip(x, episode_start, strict=True):
            hidden = self.cell(row, torch.where(start.unsqueeze(-1), self.first, hidden))
            steps = torch.where(start, 0, steps) + 1
            outs.append(hidden)
        out = torch.stack(outs)
        return self.actor(out), self.critic(out).squeeze(-1), (hidden, steps)


def test_a_first_state_may_be_learned_and_a_state_may_be_whole_numbers(tmp_path):
    torch.manual_seed(0)
    network = LearnedStart()
    trainer = trainer_of(tmp_path, policy=network, segment_length=8, record_ratios=2)
    trainer.run()
    assert not any(x.requires_grad for x in trainer.rollout.states)
    assert trainer.rollout.states[1].max() > 1, "it counts"
    assert (network.first != 1).all(), "it learns"


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("no tuple", r"initial_state\(2\) must return a tuple of tensors with 2 rows each"),
        ("no state", r"has memory, so it must return \(params, values, state\)"),
        ("another shape", r"returned a state of shapes \[\(2, 2\)\] after one of \[\(2, 6\)\]"),
        ("params", r"returned \(2, 2\) and \(2,\) for 2 observations"),
        ("in place", "CellNetwork changes the state that it is given"),
        ("first step", "computes 3 steps at once differently from one step after the other"),
        ("one late", "does not reset its state where an episode starts"),
        ("all rows", "resets its state where no episode starts"),
    ],
)
def test_a_broken_memory_is_one_clear_line(tmp_path, broken, message):
    with pytest.raises(ConfigError, match=message):
        trainer_of(tmp_path, policy=CellNetwork(broken))


@pytest.mark.parametrize("broken", ["first step", "one late", "all rows"])
def test_a_broken_memory_shows_through_heads_that_are_zero(tmp_path, broken):
    network = CellNetwork(broken)
    heads = [*network.actor.parameters(), *network.critic.parameters()]
    for x in heads:
        nn.init.zeros_(x)
    with pytest.raises(ConfigError, match="computes 3 steps|its state where"):
        trainer_of(tmp_path, policy=network)
    assert not any(x.any() for x in heads)
    network.broken = ""
    trainer_of(tmp_path, policy=network)
    assert not any(x.any() for x in heads)


class ReadsStarts(CellNetwork):
    """A network that reads whether an episode starts, beside the observation."""

    def __init__(self):
        super().__init__()
        self.cell = nn.GRUCell(4, 6)

    def forward(self, x, state, episode_start):
        return super().forward(torch.cat((x, episode_start.unsqueeze(-1).to(x.dtype)), -1), state, episode_start)


def test_a_network_may_read_episode_start_beside_the_observation(tmp_path):
    torch.manual_seed(0)
    trainer = trainer_of(tmp_path, policy=ReadsStarts(), segment_length=8, learning_rate=0.0)
    assert largest_ratio_error(trainer) < 1e-5


def test_sequence_rows_are_those_of_a_loop():
    n, length, n_steps = 5, 4, 12
    order = torch.randperm(n_steps // length * n, generator=torch.Generator().manual_seed(0)).view(3, -1)
    rows = sequence_rows(order, n, length)
    for i, minibatch in enumerate(order.tolist()):
        expected = [((s // n) * length + step) * n + s % n for step in range(length) for s in minibatch]
        assert rows[i].tolist() == expected


def test_whole_sequences_stay_together_and_every_row_is_used_once_per_epoch(tmp_path):
    trainer = trainer_of(tmp_path, memory="lstm", segment_length=4, n_minibatches=3)
    trainer.update.prepare(6 * T, float("inf"))
    for epoch in trainer.update.shuffle.orders:
        assert epoch.flatten().sort().values.tolist() == list(range(6 * T))
        for rows in epoch.view(3, 4, -1):
            assert torch.equal(rows[1:], rows[:-1] + 6)
    assert not torch.equal(trainer.update.shuffle.orders[0], trainer.update.shuffle.orders[1])
    trainer.env.close()


def test_an_enormous_memory_is_refused_before_it_is_built(tmp_path):
    with pytest.raises(ConfigError, match=r"hidden_sizes=.* and memory_size=10,000,000 on observations"):
        trainer_of(tmp_path, memory="lstm", memory_size=10_000_000)


@pytest.mark.parametrize("memory", CELLS)
def test_the_estimate_of_weights_counts_the_memory(memory):
    obs, action = ObsSpec.from_space(spaces.Box(-1, 1, (3,))), ActionSpec.from_space(spaces.Discrete(3))
    specs = [PolicySpec(obs, action, "mlp", (16,), "tanh", True, False, 10.0, kind, 64) for kind in ("none", memory)]
    counted = specs[1].least_weights() - specs[0].least_weights()
    matrices = [p for p in specs[1].build().network.memories.parameters() if p.dim() == 2]
    assert counted == sum(p.numel() for p in matrices)


def test_a_single_minibatch_by_default_is_noted(tmp_path):
    notes = trainer_of(tmp_path, memory="gru", n_envs=1, n_minibatches=None).notes
    assert any("n_minibatches 1: a minibatch holds whole sequences" in note for note in notes)
    notes = trainer_of(tmp_path, memory="gru", n_envs=1, n_minibatches=1, run_dir=tmp_path / "b").notes
    assert not any("a minibatch holds whole sequences" in note for note in notes)
