"""A saved policy acts on trees of arrays, under masks, with its memory, and refuses what doesn't fit in one line."""

import dataclasses
from typing import ClassVar

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer, load_policy
from fastppo.evaluation.saved_policy import SavedPolicy, record_video
from fastppo.policies.policy_spec import PolicySpec
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import PackedSpace, leaves_of, mask_leaf
from tests.worlds import Masked

NESTED = spaces.Dict(
    camera=spaces.Box(0, 255, (36, 36, 3), np.uint8),
    goal=spaces.Discrete(4, start=1),
    pos=spaces.Dict(xy=spaces.Box(-1, 1, (2,), np.float64), joints=spaces.Box(-1, 1, (2, 2), np.float32)),
)
VECTORS = spaces.Dict(own=spaces.Box(-1, 1, (3,), np.float32), cell=spaces.MultiDiscrete([2, 3]))
TUPLE = spaces.Tuple((spaces.Box(-1, 1, (3,), np.float32), VECTORS, spaces.Discrete(3, start=-1)))
FIVE = spaces.Discrete(5, start=-1)


def policy_of(space, action_space=FIVE, *, masks=None, memory="none", critic=(), seed=0):
    """Return an untrained policy whose choices depend strongly on what it sees."""
    action = ActionSpec.from_space(action_space)
    obs = ObsSpec.from_space(PackedSpace(leaves_of(space, (), critic, masks and mask_leaf(masks, sum(action.nvec)))))
    network = "cnn" if any(leaf.fits_cnn for leaf in obs.seen) else "mlp"
    torch.manual_seed(seed)
    spec = PolicySpec(obs, action, network, (16,), "tanh", False, False, 10.0, memory, 8)
    policy = spec.build()
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if "actor.linear.weight" in name:
                parameter.mul_(1000)
    return SavedPolicy(spec, policy, torch.device("cpu"))


def samples(space, n):
    """Return `n` samples, and the same as one tree of arrays [n, ...]."""
    space.seed(0)
    single = [space.sample() for _ in range(n)]
    return single, stacked(single)


def stacked(trees):
    if isinstance(trees[0], dict):
        return {key: stacked([tree[key] for tree in trees]) for key in trees[0]}
    if isinstance(trees[0], tuple):
        return tuple(stacked(list(parts)) for parts in zip(*trees, strict=True))
    return np.stack([np.asarray(tree) for tree in trees])


@pytest.mark.parametrize("space", [NESTED, VECTORS, TUPLE], ids=["nested", "vectors", "tuple"])
def test_a_batch_of_trees_acts_as_its_rows_do(space):
    saved, (single, batch) = policy_of(space), samples(space, 12)
    actions, state = saved.predict(batch)
    assert (actions.shape, actions.dtype, state) == ((12,), np.int64, ())
    assert len(set(actions.tolist())) > 1
    alone = [saved.predict(obs)[0] for obs in single]
    assert [action.shape for action in alone] == [()] * 12
    assert all(FIVE.contains(action) for action in alone)
    assert np.array(alone).tolist() == actions.tolist()
    assert saved.predict(stacked(single[:1]))[0].tolist() == actions[:1].tolist()


def test_every_array_of_a_tree_matters():
    saved, (_, batch) = policy_of(NESTED), samples(NESTED, 40)
    actions, _ = saved.predict(batch)
    for path in (("camera",), ("goal",), ("pos", "xy"), ("pos", "joints")):
        changed = {key: dict(part) if isinstance(part, dict) else part for key, part in batch.items()}
        inner = changed if len(path) == 1 else changed[path[0]]
        inner[path[-1]] = inner[path[-1]][::-1].copy()
        assert (saved.predict(changed)[0] != actions).any(), path


def test_keys_that_the_policy_does_not_read_are_ignored():
    saved, (_, batch) = policy_of(VECTORS), samples(VECTORS, 5)
    assert saved.predict(batch | {"other": "text"})[0].tolist() == saved.predict(batch)[0].tolist()
    critic, obs = policy_of(NESTED, critic=("camera", "goal"), memory="gru"), samples(NESTED, 5)[1]
    actions, state = critic.predict(obs)
    without, other_state = critic.predict({"pos": obs["pos"], "camera": "of no use", "goal": np.full(5, 99)})
    assert without.tolist() == actions.tolist()
    assert all(map(torch.equal, state, other_state))


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("given", ["argument", "key"])
@pytest.mark.parametrize("action_space", [FIVE, spaces.MultiDiscrete([3, 4], start=[5, -2])], ids=["one", "two"])
def test_no_action_is_forbidden(action_space, given, deterministic):
    parts = np.ravel(getattr(action_space, "nvec", 5))
    first, n = np.cumsum(parts) - parts, 400
    saved = policy_of(VECTORS, action_space, masks="key" if given == "key" else "method")
    masks = np.random.default_rng(0).random((n, parts.sum())) < 0.3
    masks[:, first + 1] |= ~np.stack([part.any(1) for part in np.split(masks, first[1:], 1)], 1)
    _, batch = samples(VECTORS, n)
    argument = masks if given == "argument" else None
    obs = batch if given == "argument" else batch | {"action_mask": masks.astype(np.int8)}
    actions, _ = saved.predict(obs, deterministic=deterministic, action_mask=argument)
    choice = (actions - action_space.start).reshape(n, -1) + first
    assert masks[np.arange(n)[:, None], choice].all()
    assert np.unique(choice).tolist() == list(range(parts.sum()))  # each is chosen somewhere
    single = {key: x[7] for key, x in obs.items()}
    argument = None if argument is None else argument[7]
    action, _ = saved.predict(single, deterministic=deterministic, action_mask=argument)
    assert action_space.contains(action)
    assert masks[7][(action - action_space.start).ravel() + first].all()


def test_all_actions_are_allowed_without_a_mask():
    saved, (_, batch) = policy_of(VECTORS, masks="info"), samples(VECTORS, 50)
    assert saved.predict(batch)[0].tolist() == saved.predict(batch, action_mask=np.ones((50, 5)))[0].tolist()
    assert saved.predict(batch)[0].tolist() == policy_of(VECTORS).predict(batch)[0].tolist()
    by_key, (single, _) = policy_of(VECTORS, masks="key"), samples(VECTORS, 1)
    assert by_key.predict(batch)[0].tolist() == saved.predict(batch)[0].tolist()
    assert by_key.predict(single[0])[0].tolist() == saved.predict(single[0])[0].tolist()


def test_the_mask_of_a_multidiscrete_space_may_come_in_parts():
    saved = policy_of(VECTORS, spaces.MultiDiscrete([3, 4]), masks="info")
    (single, _), parts = samples(VECTORS, 1), (np.array([0, 1, 0]), np.array([0, 0, 0, 1]))
    assert saved.predict(single[0], action_mask=parts)[0].tolist() == [1, 3]


def test_a_mask_of_a_single_array():
    saved = policy_of(spaces.Discrete(500), spaces.Discrete(6), masks="info")
    masks = np.eye(6, dtype=bool)
    assert saved.predict(np.arange(6) * 80, action_mask=masks)[0].tolist() == list(range(6))
    assert saved.predict(479, action_mask=masks[4])[0] == 4


ONE, BATCH = samples(NESTED, 1)[0][0], samples(NESTED, 3)[1]
WRONG = {
    "no tree": (np.zeros(3), {}, r"an observation \(ndarray\) has no 'camera', which its space"),
    "missing": ({k: x for k, x in ONE.items() if k != "goal"}, {}, "has no 'goal'"),
    "missing within": (ONE | {"pos": {"xy": np.zeros(2)}}, {}, "has no 'pos/joints'"),
    "not nested": (ONE | {"pos": np.zeros(2)}, {}, "has no 'pos/"),
    "shape": (
        ONE | {"camera": np.zeros((36, 35, 3), np.uint8)},
        {},
        r"has shape \(36, 35, 3\); .* \(36, 36, 3\)",
    ),
    "flat": (ONE | {"camera": 3}, {}, r"camera has shape \(\)"),
    "lengths": (BATCH | {"goal": np.ones(2, int)}, {}, r"goal has shape \(2,\)"),
    "text": (ONE | {"pos": ONE["pos"] | {"xy": ["a", "b"]}}, {}, "pos/xy has dtype <U1"),
    "outside": (ONE | {"goal": 5}, {}, r"goal is 5, outside its space Discrete\(4, start=1\)"),
    "outside in a batch": (BATCH | {"goal": np.array([1, 0, 1])}, {}, "goal of environment 1 is 0"),
    "nan beside pixels": (ONE | {"pos": ONE["pos"] | {"xy": np.array([0, np.nan])}}, {}, "a NaN or an infinity"),
    "mask size": (ONE, {"action_mask": np.ones(6)}, r"mask has shape \(6,\) .*; the action space needs 5"),
    "one mask for three": (BATCH, {"action_mask": np.ones(5)}, r"mask has shape \(5,\) .* needs 3 x 5 numbers"),
    "mask of text": (ONE, {"action_mask": ["a"] * 5}, r"mask has shape \(5,\) and dtype <U1"),
    "nothing allowed": (BATCH, {"action_mask": np.eye(3, 5) * [1, 0, 1, 1, 1]}, "row 1 allows no action; allow one"),
    "starts": (BATCH, {"episode_start": [True, False]}, r"episode_start has shape \(2,\), but obs holds 3"),
    "starts of text": (BATCH, {"episode_start": ["a", "b", "c"]}, "episode_start holds a; give True where an episode"),
    "starts above 1": (BATCH, {"episode_start": [0, 1, 2]}, "episode_start holds 2; give True where"),
    "starts of two lengths": (BATCH, {"episode_start": [[0], [1, 2], 0]}, "episode_start is no array: its rows differ"),
    "list of dicts": ([ONE, ONE], {}, r"obs is a list of dicts; give a batch as one dict of arrays \[B, ...\]"),
    "no rows": (BATCH | {"camera": BATCH["camera"][:0]}, {}, "obs is empty"),
    "ragged": (ONE | {"camera": [[1, 2], [3]]}, {}, "obs is no array: its rows differ in length"),
    "state of inf": (BATCH, {"state": (torch.full((3, 8), torch.inf),) * 4}, "state holds an infinity, which no step"),
    "state of nan": (BATCH, {"state": (torch.full((3, 8), torch.nan),) * 4}, "state holds a NaN; leave it out"),
    "state of another batch": (BATCH, {"state": (torch.zeros(2, 8),) * 4}, "state is of 2 episodes, but obs holds 3"),
    "state of another policy": (BATCH, {"state": (torch.zeros(3, 8),) * 2}, "state has shapes .* leave it out"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_does_not_fit_is_refused_in_one_line(name):
    obs, arguments, message = WRONG[name]
    with pytest.raises(ValueError, match=message) as caught:
        policy_of(NESTED, masks="info", memory="lstm").predict(obs, **arguments)
    assert "\n" not in str(caught.value)


def test_a_mask_without_masks_or_of_an_empty_component_is_refused():
    single, _ = samples(VECTORS, 1)
    with pytest.raises(ValueError, match="trained without action masks; leave action_mask out"):
        policy_of(VECTORS).predict(single[0], action_mask=np.ones(5))
    with pytest.raises(ValueError, match="row 0 allows no action of component 1"):
        policy_of(VECTORS, spaces.MultiDiscrete([3, 4]), masks="info").predict(
            single[0], action_mask=[1, 1, 1, 0, 0, 0, 0]
        )


@pytest.mark.parametrize("memory", ["lstm", "gru", "mingru"])
def test_the_memory_is_reset_where_an_episode_starts(memory):
    saved, (single, batch) = policy_of(VECTORS, memory=memory), samples(VECTORS, 6)
    _, state = saved.predict(batch)
    starts = np.arange(6) % 2 == 0
    _, mixed = saved.predict(batch, state, starts)
    _, on = saved.predict(batch, state)
    _, anew = saved.predict(batch)
    for part, kept, reset in zip(mixed, on, anew, strict=True):
        torch.testing.assert_close(part, torch.where(torch.as_tensor(starts)[:, None], reset, kept))
        assert not torch.allclose(kept, reset)
    _, alone = saved.predict(single[2], tuple(x[2:3] for x in state), True)
    for part, one in zip(anew, alone, strict=True):
        torch.testing.assert_close(part[2:3], one)


class Film(Masked):
    """Draws a frame for each step, brighter from step to step."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 20}
    render_mode = "rgb_array"

    def render(self):
        return np.full((32, 48, 3), 30 * self.steps, np.uint8)


@pytest.mark.parametrize("space", [NESTED, TUPLE], ids=["dict", "tuple"])
def test_a_video_of_a_run_with_trees_masks_and_memory(tmp_path, space):
    base = Config(n_envs=2, n_steps=8, n_minibatches=2, total_timesteps=32, compile="off", threads=1, memory="lstm")

    def make():
        return Film(space, FIVE, "info")

    Trainer(dataclasses.replace(base, memory_size=8, run_dir=tmp_path / "run"), make).run()
    path, video = record_video(tmp_path / "run", tmp_path / "a.gif", make_env=make, seed=3)
    assert path.stat().st_size > 0
    assert (video.whole, len(video.frames), video.fps) == (True, 7, 20)
    assert [int(frame.max()) for frame in video.frames] == [30 * t for t in range(7)]
    # the episode of predict, with the state carried along
    env, saved, state, total = make(), load_policy(tmp_path / "run"), None, 0.0
    (obs, info), ended = env.reset(seed=3), False
    while not ended:
        action, state = saved.predict(obs, state, action_mask=info["action_mask"])
        obs, reward, _, ended, info = env.step(action)
        total += reward
    assert video.episode_return == total
