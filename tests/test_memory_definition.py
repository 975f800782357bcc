"""Whole runs with memory against their definition, in every way of stepping: states, values, ratios, gradients.

`tests/test_memory.py` has the ratios of each mode, and the rest of memory.
"""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode
from torch import nn

from fastppo import Trainer, load_policy, resume
from fastppo.analysis.nan_replay import _minibatch_tensors
from fastppo.analysis.verify_resume import run_hashes
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.envs.tensor.tasks import TASKS
from fastppo.envs.vec_env import env_seeds
from fastppo.errors import CheckpointError
from fastppo.evaluation.episodes import EpisodePlayer
from fastppo.policies.decisions import Decisions
from fastppo.ppo.acting_copy import ActingCopy
from fastppo.ppo.collector import Collector
from fastppo.ppo.minibatches import BatchLayout, Minibatch
from fastppo.ppo.rollout import Rollout
from fastppo.runs.checkpoint import newest_checkpoint
from fastppo.runs.nan_dump import read_nan_dump, save_nan_dump
from tests.envs import walks
from tests.envs.walks import LIMIT, LOW, Seen, Walk
from tests.reference.recurrent_policy import Shadow, ppo_gradient
from tests.worlds import short

CELLS = ("lstm", "gru", "mingru")
STEPS = 16
SMALL = {"n_envs": 4, "n_steps": STEPS, "hidden_sizes": (8,), "memory_size": 6, "total_timesteps": 4 * STEPS * 3}
SMALL |= {"learning_rate": 0.01, "compile": "off", "update_epochs": 1}


class WalkTask:
    """`Walk` on tensors."""

    n_uniforms = 1

    def reset(self, u):
        first = LOW + u[0] * (0.95 - LOW)
        return first, first, torch.zeros_like(first)

    def step(self, state, actions):
        first, place, steps = state
        place, steps = _following(place), steps + 1
        return (first, place, steps), torch.where(actions == 0, place, actions * (1 - first)), place < LOW

    def observe(self, state):
        return torch.stack((state[1], state[2] / LIMIT), 1)


def _following(place):
    x = place.double()
    return (3.9 * x * (1 - x)).to(place.dtype)


def final_obs(obs):
    """Return the observation after a step from `obs`."""
    return torch.stack((_following(obs[0]), ((obs[1] * LIMIT).round() + 1) / LIMIT))


WAYS = {
    "sync": {"vectorization": "sync"},
    "pool": {"vectorization": "pool", "workers": 2},
    "pool half_batches": {"vectorization": "pool", "workers": 2, "half_batches": True},
    "tensor": {"vectorization": "tensor", "env_id": "fastppo-tests/Walk-v0"},
    "vector, next step": {},
    "vector, same step": {},
}
VECTOR = {"vector, next step": AutoresetMode.NEXT_STEP, "vector, same step": AutoresetMode.SAME_STEP}


def make(tmp_path, way="sync", make_env=Walk, name="run", policy=None, **settings):
    """Make a trainer of a short run in which endings of both kinds lie inside the segments.

    The weights of memory and actor are large, so that choices depend on what was seen before.
    """
    if way in VECTOR:
        make_env = functools.partial(walks.walks, mode=VECTOR[way])
    if way == "tensor":
        make_env = None
    config = short(tmp_path, run_dir=tmp_path / name, **SMALL | WAYS[way] | settings)
    trainer = Trainer(config, make_env=make_env, policy=policy)
    if trainer.spec.network != "custom":
        with torch.no_grad():
            trainer.policy.network.body.actor.linear.weight.mul_(300)
            for weight in trainer.policy.network.memories.parameters():
                weight.mul_(3)
    return trainer


@pytest.fixture(autouse=True)
def _task(monkeypatch):
    monkeypatch.setitem(TASKS, "fastppo-tests/Walk-v0", WalkTask)


def after_each_rollout(trainer, check):
    """Run the trainer, with `check(rollout)` after every rollout and before its update."""
    collect, checked = trainer.collect, []

    def collect_and_check(abandon=None):
        complete = collect(abandon)
        check(trainer.rollout)
        checked.append(1)
        return complete

    trainer.collect = collect_and_check
    assert trainer.run().ended == "finished"
    assert len(checked) == trainer.n_iterations > 1


class FirstRatios:
    """Checks of rollouts: before the first step of the optimiser, minibatches see what the policy saw when it acted.

    Where episodes start is taken from the endings, not from `rollout.starts`.

    Attributes:
        endings: seen kinds of endings inside segments.
    """

    def __init__(self, trainer, tolerance=1e-5):
        self.trainer, self.tolerance, self.endings = trainer, tolerance, set()
        self._before = torch.ones(trainer.config.n_envs, dtype=torch.bool)

    def _starts(self, r):
        ended = r.terminated | r.truncated if r.valid is None else ~r.valid
        starts = torch.cat((self._before.unsqueeze(0), ended))
        self._before = ended[-1].clone()
        length = self.trainer.update.shuffle.segment_length
        inside = torch.arange(len(ended)) % length != length - 1
        for kind in ("terminated", "truncated"):
            if getattr(r, kind)[inside].any():
                self.endings.add(kind)
        return starts[:-1]

    def __call__(self, r):
        policy, update = self.trainer.policy, self.trainer.update
        batch = r.batch()._replace(starts=self._starts(r).flatten())
        layout = BatchLayout(batch, update.shuffle.segment_length)
        data = layout.pack(batch)
        seen = []
        for rows in update.shuffle.orders[0]:
            part = layout.gather(Minibatch(torch.zeros(2), rows, data))
            with torch.no_grad():
                output = policy(part.obs, part.states, part.starts)
            now = policy.evaluate_actions(output, part.actions, part.params)
            real = slice(None) if part.valid is None else part.valid
            error = ((now.logprobs - part.logprobs).exp() - 1).abs()[real].max()
            assert error < self.tolerance, f"a first ratio differs from 1 by {error:.1e}"
            error = (now.values - part.values).abs()[real].max()
            assert error < self.tolerance, f"a value differs from that of acting by {error:.1e}"
            seen += rows.tolist()
        assert sorted(seen) == list(range(r.rewards.numel()))
        spread = r.params.std((0, 1)).max()
        assert spread > 0.1, "the choices must depend on what was seen"


def assert_first_ratios(trainer, **options):
    check = FirstRatios(trainer, **options)
    after_each_rollout(trainer, check)
    if trainer.update.shuffle.segment_length > 1:
        assert check.endings == {"terminated", "truncated"}


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("way", VECTOR)
def test_the_ratio_is_1_in_vector_environments(tmp_path, way, shared_trunk):
    """Next-step autoreset has filler rows, in which the state stays that of the ended episode."""
    assert_first_ratios(make(tmp_path, way, memory="lstm", segment_length=8, shared_trunk=shared_trunk))


LOOKS = {
    "image": {"memory": "lstm"},
    "tree": {"memory": "gru"},
    "tree shared": {"memory": "gru", "shared_trunk": True},
    "normalised": {"memory": "mingru", "normalize_obs": True},
}


def look(tmp_path, kind, **settings):
    """Make a trainer of walks that are seen as `kind` says."""
    make_env = Walk if kind == "normalised" else functools.partial(Seen, kind.split()[0])
    images = {} if kind == "normalised" else {"n_steps": 8, "total_timesteps": 64}
    return make(tmp_path, make_env=make_env, **LOOKS[kind] | images | settings)


@pytest.mark.parametrize("kind", LOOKS)
def test_the_ratio_is_1_with_images_masks_and_normalised_observations(tmp_path, kind):
    trainer = look(tmp_path, kind, segment_length=4)
    assert trainer.spec.obs.has_mask == kind.startswith("tree")
    assert_first_ratios(trainer, tolerance=1e-4)


# ---- the checks above and below can fail


def marked_late(self, starts, t, group):
    """Mark where step t - 1 starts an episode."""
    r = self.rollout
    starts[t, group] = (r.terminated[t - 2, group] | r.truncated[t - 2, group]) if t > 1 else starts[0, group]


def without_starts(self, t):
    return None if self.starts is None else torch.zeros_like(self.starts[t])


def batch_with_later_states(self, original=Rollout.batch):
    states = tuple(x[1:].flatten(0, 1) for x in self.states)
    return original(self)._replace(states=states)


MISTAKES = {
    "reset one step late": (Collector, "_mark_starts", marked_late),
    "never reset": (Collector, "_mark_starts", lambda self, starts, t, group: starts[t, group].fill_(False)),
    "reset in updates alone": (Decisions, "starts_at", without_starts),
    "states one row later": (Rollout, "batch", batch_with_later_states),
}


@pytest.mark.parametrize("mistake", MISTAKES)
@pytest.mark.parametrize(("cell", "length"), [("lstm", 8), ("gru", 1), ("mingru", 8)])
def test_a_mistake_shows_in_the_first_ratio(tmp_path, monkeypatch, cell, length, mistake):
    shared = {"shared_trunk": True, "activation": "elu"}  # so that torch acts, which `Decisions.starts_at` serves
    trainer = make(tmp_path, memory=cell, segment_length=length, **shared)
    monkeypatch.setattr(*MISTAKES[mistake])
    with pytest.raises(AssertionError, match="first ratio differs from 1"):
        assert_first_ratios(trainer)


# ---- states, values at time limits and at the end of a rollout


def assert_follows_the_definition(trainer, final_obs=final_obs, tolerance=1e-5):
    """Run, and compare every rollout with a walk through its observations."""
    shadow, policy, cuts, carried = Shadow(trainer.config.n_envs), trainer.policy, [], []

    def check(r):
        expected = shadow.follow(policy, r, final_obs)
        close = functools.partial(torch.testing.assert_close, atol=tolerance, rtol=tolerance, check_dtype=False)
        assert torch.equal(r.starts, expected.starts)
        for ours, theirs in zip(r.states, expected.states, strict=True):
            close(ours, theirs, msg=lambda text: f"states: {text}")
        close(r.params, expected.params, msg=lambda text: f"parameters: {text}")
        close(r.values, expected.values, msg=lambda text: f"values: {text}")
        used = ~expected.next_values.isnan()
        close(r.next_values[used], expected.next_values[used], msg=lambda text: f"next values: {text}")
        cuts.append((r.truncated & ~r.terminated).sum())
        carried.append(~r.starts[-1])

    after_each_rollout(trainer, check)
    assert sum(cuts) > 3
    assert torch.stack(carried[:-1]).any(), "an episode goes on in the next rollout"


@pytest.mark.parametrize(
    ("cell", "way", "compile"),
    [
        ("lstm", "sync", "off"),
        ("gru", "sync", "graph"),
        ("gru", "pool", "off"),
        ("mingru", "pool half_batches", "off"),
        ("lstm", "tensor", "off"),
        ("lstm", "tensor", "graph"),
        ("gru", "vector, next step", "off"),
        ("mingru", "vector, same step", "off"),
    ],
)
def test_states_and_values_are_those_of_the_definition(tmp_path, cell, way, compile):
    """V at a time limit uses the state before the reset; states go on from rollout to rollout."""
    # a graph is recorded step by step
    steps = {"segment_length": 4, "n_steps": 4, "total_timesteps": 4 * 4 * 9} if compile == "graph" else {}
    assert_follows_the_definition(make(tmp_path, way, memory=cell, compile=compile, **steps))


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_modules_act_as_the_definition_says(tmp_path, cell, shared_trunk):
    trainer = make(tmp_path, memory=cell, shared_trunk=shared_trunk, activation="elu", segment_length=8)
    assert trainer.collect.actors[0].complete, "the actor is torch's"
    assert_follows_the_definition(trainer)


def test_a_mistake_shows_in_states_and_values(tmp_path, monkeypatch):
    trainer = make(tmp_path, memory="gru", segment_length=8)
    add = trainer.collect._final_values.add
    # the state before the last step instead of after it
    monkeypatch.setattr(trainer.collect._final_values, "add", lambda t, *rest: add(max(0, t - 1), *rest))
    with pytest.raises(AssertionError, match="next values"):
        assert_follows_the_definition(trainer)


def test_a_forgotten_state_between_rollouts_shows(tmp_path):
    trainer = make(tmp_path, memory="gru", segment_length=8)
    prepare = trainer.collect.prepare

    def forget():
        prepare()
        for x in trainer.rollout.states:
            x[-1].zero_()

    trainer.collect.prepare = forget
    with pytest.raises(AssertionError, match="states"):
        assert_follows_the_definition(trainer)


# ---- gradients


@pytest.mark.parametrize("shared_trunk", [False, True])
@pytest.mark.parametrize("length", [8, STEPS])
@pytest.mark.parametrize("cell", CELLS)
def test_gradients_equal_those_of_a_loop_over_environments_and_steps(tmp_path, cell, length, shared_trunk):
    settings = {"memory": cell, "segment_length": length, "ent_coef": 0.01, "value_clip": "max", "value_clip_coef": 0.2}
    trainer = make(tmp_path, way="vector, next step" if shared_trunk else "sync", shared_trunk=shared_trunk, **settings)
    update, noise = trainer.update, torch.Generator().manual_seed(0)
    begin, compared = update.begin, []

    def compare(batch):
        begin(batch)
        if not compared:
            r = trainer.rollout
            # ratios other than 1, some of which are clipped, and values that are clipped
            r.logprobs += 0.3 * torch.randn(r.logprobs.shape, generator=noise)
            r.values += 0.3 * torch.randn(r.values.shape, generator=noise)
            ended = r.terminated | r.truncated if r.valid is None else ~r.valid
            starts = torch.cat((torch.ones_like(ended[:1]), ended))
            inside = starts[:-1].view(-1, length, 4)[:, 1:]
            assert inside.any(), "an episode starts within a segment"
            coefs = trainer.learner.coefs
            found = dict(zip(update.trained, update.parameters.views(update.gradient(batch, coefs)), strict=True))
            rows = update.shuffle.orders[0, 0]
            expected = ppo_gradient(
                trainer.policy, r, rows, starts, coefs, length=length, value_clip="max", normalize=True
            )
            assert {f"network.{name}" for name in expected} == set(found)
            for name, x in expected.items():
                error = (found[f"network.{name}"].double() - x).norm() / x.norm()
                assert error < 1e-5, f"{name}: {error:.1e}"
            compared.append(1)

    update.begin = compare
    trainer.run()
    assert compared


@pytest.mark.parametrize("cell", CELLS)
def test_a_replayed_minibatch_has_the_gradient_of_the_update(tmp_path, cell):
    trainer = make(tmp_path, memory=cell, segment_length=8)
    trainer.run()
    batch, coefs, update = trainer.rollout.batch(), trainer.learner.coefs, trainer.update
    saved = {"policy": trainer.policy}
    save_nan_dump(tmp_path / "dump", trainer.spec, saved, batch, coefs, update=update, metadata={})
    dump, policy = read_nan_dump(tmp_path / "dump"), load_policy(tmp_path / "dump").policy
    found = dict(_minibatch_tensors(policy, dump, dump.orders[0, 0]))
    for name, x in zip(update.trained, update.parameters.views(update.gradient(batch, coefs)), strict=True):
        torch.testing.assert_close(found[f"gradient: {name}"], x, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("cell", CELLS)
def test_the_plan_runs_on_shapes_alone_and_counts_every_byte(tmp_path, cell):
    trainer = make(tmp_path, memory=cell, segment_length=8)
    assert not any("memory is not planned" in note for note in trainer.notes)
    held = sum(x.numel() * x.element_size() for x in trainer.rollout.tensors().values())
    # the plan does not know yet whether there are filler rows, so it counts a flag for every row
    assert trainer.memory.storage == held + trainer.rollout.rewards.numel()
    assert trainer.memory.update > 0
    trainer.run()


# ---- copies of a run: resumed, on another device, in a network of one's own


@pytest.mark.parametrize(
    ("cell", "way", "changes"),
    [
        ("lstm", "pool half_batches", {"segment_length": 4}),
        ("gru", "tensor", {"segment_length": 8, "normalize_obs": True}),
        ("mingru", "sync", {"segment_length": 1, "shared_trunk": True}),
        pytest.param(
            "lstm",
            "tensor",
            {"compile": "graph", "n_steps": 4, "total_timesteps": 4 * 4 * 4},
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_resumed_run_is_bit_identical_in_every_way(tmp_path, cell, way, changes):
    settings = {"memory": cell, "total_timesteps": 4 * STEPS * 4} | changes
    make(tmp_path, way, name="whole", **settings).run()
    stepped = make(tmp_path, way, name="parted", **settings).iterations()
    next(stepped)
    stepped.close()
    continued = resume(tmp_path / "parted", make_env=None if way == "tensor" else Walk, progress=False)
    assert any("exact" in note for note in continued.notes)
    assert not continued.rollout.starts[-1].all(), "memory goes on in some episode"
    continued.run()
    assert run_hashes(tmp_path / "parted") == run_hashes(tmp_path / "whole")


def test_a_resume_refuses_another_memory(tmp_path):
    trainer = make(tmp_path, memory="lstm", segment_length=8)
    trainer.run()
    path, _ = newest_checkpoint(tmp_path / "run")
    for changes, message in (
        ({"memory": "gru"}, "memory lstm there, gru here"),
        ({"memory": "none", "segment_length": None}, "memory lstm there, none here"),
        ({"memory_size": 7}, "memory_size 6 there, 7 here"),
    ):
        with pytest.raises(CheckpointError, match=f"another policy.*{message}") as error:
            Trainer(dataclasses.replace(trainer.config, **changes), make_env=Walk, resume_from=path)
        assert "\n" not in str(error.value)


def copied(trainer):
    """Act with a second policy and storage, as a trainer does that learns on a GPU and acts on the CPU."""
    acting, learning = copy.deepcopy(trainer.policy), trainer.rollout
    with torch.no_grad():
        for parameter in acting.parameters():
            parameter.fill_(torch.nan)  # to be overwritten with the trainer's parameters
    here = Rollout.allocate(STEPS, trainer.env, acting, torch.device("cpu"))
    here.obs[-1].copy_(learning.obs[-1])
    for x in (learning.obs, *learning.states):
        x.fill_(torch.nan)
    learning.starts.fill_(False)
    trainer.collect = Collector(
        trainer.env,
        acting,
        here,
        trainer.collect._generator,
        trainer.clock,
        acting_copy=ActingCopy(acting, here, trainer.policy, learning),
    )


COPIED = [("lstm", "sync"), ("gru", "pool half_batches"), ("gru", "vector, next step")]


@pytest.mark.parametrize(("cell", "way"), COPIED)
def test_acting_on_another_device_copies_states_and_starts(tmp_path, cell, way):
    plain, other = (make(tmp_path, way, name=name, memory=cell, segment_length=4) for name in ("plain", "other"))
    copied(other)
    plain.run()
    assert_follows_the_definition(other)
    assert torch.equal(plain.update.parameters.vector, other.update.parameters.vector)


class Cells(nn.Module):
    """A user's network around a cell of torch, or around a layer that is called step by step, as it can't be reset."""

    def __init__(self, kind=nn.LSTMCell):
        super().__init__()
        self.cell, self.actor, self.critic = kind(2, 6), nn.Linear(6, 3), nn.Linear(6, 1)
        self.n_states, self.is_layer = 2 if kind in (nn.LSTMCell, nn.LSTM) else 1, kind is nn.LSTM

    def initial_state(self, n):
        return tuple(self.actor.weight.new_full((n, 6), 0.5) for _ in range(self.n_states))

    def forward(self, x, state, episode_start):
        outputs = []
        for row, start in zip(x, episode_start, strict=True):
            kept = tuple(torch.where(start.unsqueeze(-1), 0.5, part) for part in state)
            if self.is_layer:
                _, after = self.cell(row.unsqueeze(0), tuple(part.unsqueeze(0) for part in kept))
                after = tuple(part[0] for part in after)
            else:
                after = self.cell(row, kept if self.n_states == 2 else kept[0])
            state = after if self.n_states == 2 else (after,)
            outputs.append(state[0])
        out = torch.stack(outputs)
        return 20 * self.actor(out), self.critic(out).squeeze(-1), state


@pytest.mark.parametrize(
    ("kind", "compile"),
    [(nn.LSTMCell, "off"), (nn.GRUCell, "off"), pytest.param(nn.LSTMCell, "on", marks=pytest.mark.slow)],
)
def test_cells_of_torch_train_compiled_or_not(tmp_path, kind, compile):
    """Their initial state need not be zero."""
    torch.manual_seed(0)
    trainer = make(tmp_path, policy=Cells(kind), segment_length=4, compile=compile)
    assert trainer.config.compile == compile, trainer.notes
    assert not any("memory is not planned" in note for note in trainer.notes)
    assert torch.equal(trainer.rollout.states[0], torch.full_like(trainer.rollout.states[0], 0.5))
    assert_first_ratios(trainer)


def test_layers_of_torch_stay_eager_and_its_cells_do_not(tmp_path):
    trainer = make(tmp_path, policy=Cells(nn.LSTM), segment_length=4)
    assert trainer.policy.uncompilable() == "LSTM (cell) is one opaque operation"
    trainer.run()
    assert make(tmp_path, policy=Cells(nn.LSTMCell), name="cells").policy.uncompilable() is None


def test_a_resumed_network_of_ones_own_is_bit_identical(tmp_path):
    torch.manual_seed(0)
    first = Cells(nn.GRUCell)
    make(tmp_path, name="whole", policy=copy.deepcopy(first), segment_length=4).run()
    stepped = make(tmp_path, name="parted", policy=copy.deepcopy(first), segment_length=4).iterations()
    next(stepped)
    stepped.close()
    resume(tmp_path / "parted", make_env=Walk, policy=Cells(nn.GRUCell), progress=False).run()
    assert run_hashes(tmp_path / "parted") == run_hashes(tmp_path / "whole")


# ---- evaluation and prediction


def returns_by_predict(run, episodes, late=False):
    """Play episodes of one environment, sampled; `late`: with each reset of the memory one step too late."""
    saved, walk, state, returns, starts = load_policy(run), Walk(), None, [], [False, True]
    # one environment plays all episodes from one seed, and so does the player
    obs, _ = walk.reset(seed=int(env_seeds(np.random.SeedSequence(5), 1)[0]))
    total = 0.0
    while len(returns) < episodes:
        action, state = saved.predict(obs, state, starts[-2 if late else -1], deterministic=False)
        obs, reward, terminated, truncated, _ = walk.step(action)
        total += reward
        starts.append(terminated or truncated)
        if starts[-1]:
            returns.append(total)
            total = 0.0
            obs, _ = walk.reset()
    return returns


@pytest.mark.parametrize("cell", CELLS)
def test_predict_repeats_the_episodes_of_evaluation(tmp_path, cell):
    make(tmp_path, memory=cell, learning_rate=0.0).run()
    saved = load_policy(tmp_path / "run")
    env = make_vec_env(inspect_env("", {}, Walk), 1, "sync")
    player = EpisodePlayer(env, saved.policy, saved.device, np.random.SeedSequence(5), max_steps=50)
    played = player(200, saved._generator).returns
    assert returns_by_predict(tmp_path / "run", 200) == pytest.approx(played)
    assert returns_by_predict(tmp_path / "run", 200, late=True) != pytest.approx(played), "a moved reset shows"
    obs, state = np.full(2, 0.5, np.float32), saved.predict(np.zeros(2, np.float32))[1]
    for fresh in (saved.predict(obs, None), saved.predict(obs, state, True)):
        assert fresh[0] == saved.predict(obs)[0]
        assert all(map(torch.equal, fresh[1], saved.predict(obs)[1]))
