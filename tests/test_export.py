"""Exported policies return what the saved policy returns."""

import dataclasses

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer, load_policy
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.export import export, export_policy
from tests.worlds import Masked, Spaces


class Boxes(gym.Env):
    """Random observations, and a given action space."""

    observation_space = gym.spaces.Box(-1, 1, (3,), np.float32)

    def __init__(self, action_space):
        self.action_space = action_space

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), 1.0, False, False, {}


gym.register("Starts-v0", lambda: Boxes(gym.spaces.MultiDiscrete([3, 4], start=[5, -2])), max_episode_steps=9)
gym.register("Bits-v0", lambda: Boxes(gym.spaces.MultiBinary((2, 2))), max_episode_steps=9)
BASE = Config(n_envs=2, n_steps=32, total_timesteps=256, compile="off", threads=1, record_ratios=0)
RUNS = {
    "discrete": {"env_id": "CartPole-v1", "normalize_obs": True},
    "box": {"env_id": "Pendulum-v1", "normalize_obs": True, "learning_rate": 0.1},
    "rescaled": {"env_id": "Pendulum-v1", "rescale_actions": True, "learning_rate": 0.1},
    "index": {"env_id": "FrozenLake-v1"},
    "starts": {"env_id": "Starts-v0"},
    "bits": {"env_id": "Bits-v0"},
    "image": {"env_id": "fastppo/Catch-v0", "n_steps": 8, "total_timesteps": 32},
}


@pytest.fixture(scope="module", params=RUNS)
def run(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param) / "run"
    Trainer(dataclasses.replace(BASE, run_dir=folder, **RUNS[request.param])).run()
    saved = load_policy(folder)
    env = gym.make(RUNS[request.param]["env_id"])
    env.observation_space.seed(0)
    obs = np.stack([np.asarray(env.observation_space.sample()) for _ in range(64)])
    env.close()
    if obs.dtype.kind == "f":
        obs = np.clip(obs, -50, 50)
    rows = torch.as_tensor(obs).to(saved.spec.obs.dtype)
    with torch.no_grad():
        params, values, _ = saved.policy(rows)
    return folder, rows, saved.predict(obs)[0], params.numpy(), values.numpy()


def agree(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert (ours.shape, ours.dtype) == (theirs.shape, theirs.dtype)
        np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)


def test_onnx_returns_the_same_for_any_batch_size(run, tmp_path):
    import onnxruntime

    folder, rows, *expected = run
    path = export(folder, tmp_path / "policy.onnx", "onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [x.name for x in session.get_outputs()] == ["actions", "params", "values"]
    for n in (64, 1, 7):
        agree(session.run(None, {"obs": rows[:n].numpy()}), [x[:n] for x in expected])


def test_pt2_returns_the_same_for_any_batch_size(run, tmp_path):
    folder, rows, *expected = run
    path = export(folder, None, "pt2")
    assert path == folder / "policy.pt2"
    module = torch.export.load(path).module()
    for n in (64, 1, 7):
        agree([x.detach().numpy() for x in module(rows[:n])], [x[:n] for x in expected])


def test_box_actions_are_within_bounds(run):
    _, _, actions, params, _ = run
    if params.shape[1] == 2 and actions.dtype == np.float32:  # Pendulum
        assert np.abs(actions).max() <= 2


def test_a_network_that_cant_be_traced_is_refused_and_leaves_no_file(tmp_path):
    class Branches(torch.nn.Linear):
        def forward(self, x):
            out = super().forward(x * 2 if x.sum() > 0 else x)
            return out[:, :2], out[:, 2]

    Trainer(dataclasses.replace(BASE, run_dir=tmp_path / "run"), policy=Branches(4, 3)).run()
    with pytest.raises(ConfigError, match="this network can't be traced"):
        export(tmp_path / "run", None, "pt2", Branches(4, 3))
    assert not list((tmp_path / "run").glob("*policy*"))


def test_a_missing_model_or_folder_is_refused(tmp_path, run):
    with pytest.raises(CheckpointError, match="holds no saved model"):
        export(tmp_path, None, "pt2")
    with pytest.raises(ConfigError, match="can't be written"):
        export(run[0], tmp_path / "no" / "policy.pt2", "pt2")


CAMERA = spaces.Dict(
    camera=spaces.Box(0, 255, (36, 36, 3), np.uint8),
    goal=spaces.Discrete(4, start=1),
    pos=spaces.Dict(xy=spaces.Box(-1, 1, (2,), np.float64), bits=spaces.MultiBinary(3)),
)
PRIVILEGED = spaces.Dict(
    own=spaces.Box(-1, 1, (3,), np.float32), cell=spaces.Discrete(5, start=2), map=spaces.Box(-1, 1, (7,), np.float32)
)
FIVE = spaces.Discrete(5, start=-1)
TREES = {
    # observation space, action space, where masks come from, settings
    "dict": (CAMERA, FIVE, "method", {"normalize_obs": True}),
    "tuple": (spaces.Tuple((spaces.Box(-1, 1, (), np.float32), spaces.MultiDiscrete([2, 3]))), FIVE, None, {}),
    "one of several": (PRIVILEGED, FIVE, None, {"obs_keys": ("own",), "normalize_obs": True}),
    "masked index": (spaces.Discrete(500), spaces.Discrete(6), "info", {}),
    "masked parts": (PRIVILEGED, spaces.MultiDiscrete([3, 4], start=[5, -2]), "key", {}),
    "lstm": (spaces.Box(-1, 1, (3,), np.float32), FIVE, None, {"memory": "lstm", "normalize_obs": True}),
    "gru": (spaces.Box(-1, 1, (3,), np.float32), FIVE, None, {"memory": "gru"}),
    "mingru": (spaces.Discrete(9), FIVE, None, {"memory": "mingru", "shared_trunk": True}),
    "lstm dict": (CAMERA, FIVE, "method", {"memory": "lstm"}),
    "critic": (PRIVILEGED, FIVE, None, {"critic_obs_keys": ("cell", "map"), "normalize_obs": True}),
    "critic lstm": (PRIVILEGED, FIVE, "key", {"critic_obs_keys": ("cell", "map"), "memory": "lstm"}),
    "critic camera": (CAMERA, FIVE, "info", {"critic_obs_keys": ("camera", "goal")}),
}
INPUTS = {
    "dict": "camera:uint8 goal:int64 pos/xy:float64 pos/bits:int8 action_mask:bool",
    "tuple": "0:float32 1:int64",
    "one of several": "own:float32",
    "masked index": "obs:int64 action_mask:bool",
    "masked parts": "cell:int64 map:float32 own:float32 action_mask:bool",
    "lstm": "obs:float32 state_0:float32 state_1:float32 state_2:float32 state_3:float32 episode_start:bool",
    "gru": "obs:float32 state_0:float32 state_1:float32 episode_start:bool",
    "mingru": "obs:int64 state_0:float32 episode_start:bool",
    "lstm dict": (
        "camera:uint8 goal:int64 pos/xy:float64 pos/bits:int8 action_mask:bool "
        "state_0:float32 state_1:float32 state_2:float32 state_3:float32 episode_start:bool"
    ),
    "critic": "own:float32",
    "critic lstm": "own:float32 action_mask:bool state_0:float32 state_1:float32 episode_start:bool",
    "critic camera": "pos/xy:float64 pos/bits:int8 action_mask:bool",
}


def trained(folder, name):
    obs_space, action_space, source, changes = TREES[name]
    settings = {"run_dir": folder, "n_steps": 8, "n_minibatches": 2, "total_timesteps": 32, "memory_size": 8} | changes
    Trainer(dataclasses.replace(BASE, **settings), lambda: Masked(obs_space, action_space, source)).run()
    return load_policy(folder)


def batch(space, n, seed=0):
    """Return `n` samples of a space as a tree of arrays [n, ...]."""
    if isinstance(space, spaces.Dict):
        return {key: batch(part, n, seed + i) for i, (key, part) in enumerate(space.spaces.items())}
    if isinstance(space, spaces.Tuple):
        return tuple(batch(part, n, seed + i) for i, part in enumerate(space.spaces))
    space.seed(seed)
    return np.stack([np.asarray(space.sample()) for _ in range(n)])


def at(tree, name):
    """Return the array of a tree that an exported policy calls `name`."""
    for key in [] if name == "obs" else name.split("/"):
        tree = tree[int(key) if isinstance(tree, tuple) else key]
    return tree


def runner(path, kind):
    """Return a function from named NumPy arrays to the list of outputs, in the signature's order."""
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return lambda inputs: session.run(None, inputs)
    module = torch.export.load(path).module()
    return lambda inputs: [x.detach().numpy() for x in module(*map(torch.as_tensor, inputs.values()))]


@pytest.fixture(scope="module")
def tree(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("trees") / "run"
    return request.param, folder, trained(folder, request.param)


# every feature once, since an ONNX export takes 5 s; the others combine them
QUICK_IN_ONNX = ("dict", "masked parts", "lstm", "mingru", "critic lstm")
CASES = [
    pytest.param(name, kind, marks=[pytest.mark.slow] if kind == "onnx" and name not in QUICK_IN_ONNX else [])
    for name in TREES
    for kind in ("onnx", "pt2")
]


@pytest.mark.parametrize(("tree", "kind"), CASES, indirect=["tree"])
def test_arrays_masks_and_memory_step_like_predict(tree, tmp_path, kind):
    name, folder, saved = tree
    path, signature = export_policy(folder, tmp_path / f"policy.{kind}", kind)
    assert " ".join(f"{port.name}:{port.dtype}" for port in signature.inputs) == INPUTS[name]
    states = [port for port in signature.inputs if port.name.startswith("state_")]
    results = [port.name for port in signature.outputs if not port.name.startswith("next_state_")]
    assert results == ["actions", "params", *([] if name.startswith("critic") else ["values"])]
    run, rng, space = runner(path, kind), np.random.default_rng(1), TREES[name][0]
    width = sum(saved.spec.action.nvec)
    first = np.cumsum(saved.spec.action.nvec) - saved.spec.action.nvec
    for n in (1, 2, 5):
        state, memory = None, [rng.normal(size=(n, *port.shape)).astype(np.float32) for port in states]
        for t in range(6):
            obs = batch(space, n, 10 * t)
            mask = rng.random((n, width)) < 0.4
            mask[:, first] = True
            starts = np.full(n, True) if t == 0 else rng.random(n) < 0.3
            inputs = {}
            for port in signature.inputs:
                if port.name == "action_mask":
                    inputs[port.name] = mask
                elif port.name == "episode_start":
                    inputs[port.name] = starts
                elif port in states:
                    inputs[port.name] = memory[states.index(port)]
                else:
                    inputs[port.name] = at(obs, port.name).astype(port.dtype, casting="no")
            outputs = run(inputs)
            mask_of_run = mask if saved.spec.obs.has_mask else None
            rows, _ = saved._rows(obs, mask_of_run)
            with torch.no_grad():
                whole = saved.policy(rows, state or saved.policy.initial_state(n), torch.as_tensor(starts))
            actions, state = saved.predict(obs, state, starts, action_mask=mask_of_run)
            assert [(x.dtype.name, x.shape) for x in outputs] == [(p.dtype, (n, *p.shape)) for p in signature.outputs]
            np.testing.assert_array_equal(outputs[0], actions)
            for ours, theirs in zip(outputs[1 : len(results)], (whole.params, whole.values), strict=False):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
            memory = outputs[len(results) :]
            for ours, theirs in zip(memory, state[len(state) - len(memory) :], strict=True):
                np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-4, atol=1e-5)
            if saved.spec.obs.has_mask:
                choice = (outputs[0] - np.asarray(saved.spec.action.start)).reshape(n, -1) + first
                assert mask[np.arange(n)[:, None], choice].all()
                assert (outputs[1][~mask] == np.float32(-1e8)).all()


def test_what_the_critic_reads_changes_nothing_that_is_exported(tmp_path):
    trained(tmp_path / "run", "critic lstm")
    saved = load_policy(tmp_path / "run")
    policy, obs = saved.policy, batch(TREES["critic lstm"][0], 5) | {"action_mask": np.ones((5, 5), np.int8)}
    with torch.no_grad():  # actions that depend on the observation
        policy.network.body.actor.linear.weight.mul_(1000)
    actions, _ = saved.predict(obs)
    assert len(set(actions.tolist())) > 1
    without = {key: x for key, x in obs.items() if key not in ("cell", "map")}
    np.testing.assert_array_equal(saved.predict(without)[0], actions)
    rows = torch.from_numpy(saved.spec.obs.space.pack(obs, n=5))  # the critic's arrays too, as in training
    step = policy.act(rows, None, policy.initial_state(5), torch.ones(5, dtype=torch.bool))
    np.testing.assert_array_equal(saved.spec.action.to_env(step.actions.numpy()), actions)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_path_that_is_the_name_of_an_output_gets_another_one(tmp_path, kind):
    space = spaces.Dict(
        actions=spaces.Box(-1, 1, (2,), np.float32),
        obs=spaces.Dict(actions=spaces.Box(-1, 1, (2,), np.float32)),
        state_0=spaces.Box(-1, 1, (2,), np.float32),
    )
    config = dataclasses.replace(BASE, run_dir=tmp_path / "run", memory="gru", memory_size=8, n_minibatches=2)
    Trainer(config, lambda: Spaces(space, FIVE)).run()
    path, signature = export_policy(tmp_path / "run", None, kind)
    names = ["obs/actions", "obs/obs/actions", "obs/state_0", "state_0", "state_1", "episode_start"]
    assert [port.name for port in signature.inputs] == names
    obs = batch(space, 3)
    arrays = [obs["actions"], obs["obs"]["actions"], obs["state_0"], *np.zeros((2, 3, 8), np.float32), np.ones(3, bool)]
    actions = runner(path, kind)(dict(zip(names, arrays, strict=True)))[0]
    np.testing.assert_array_equal(actions, load_policy(tmp_path / "run").predict(obs)[0])


class Own(torch.nn.Module):
    """The user's own network with memory, for observations of several arrays."""

    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Linear(5 + 4, 4)
        self.head = torch.nn.Linear(4, 6)

    def initial_state(self, n):
        return (torch.full((n, 2, 2), 0.5),)

    def forward(self, x, state, episode_start):
        outputs, h = [], state[0]
        for own, cell, starts in zip(x["own"], x["cell"], episode_start, strict=True):
            h = torch.where(starts[:, None, None], 0.5, h)
            h = torch.tanh(self.inner(torch.cat((own, cell[:, :2], h.flatten(1)), 1))).view(-1, 2, 2)
            outputs.append(self.head(h.flatten(1)))
        out = torch.stack(outputs)
        return out[..., :5], out[..., 5], (h,)


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_a_network_of_the_users_own_with_memory_is_exported(tmp_path, kind):
    config = dataclasses.replace(
        BASE, run_dir=tmp_path / "run", n_minibatches=2, n_steps=4, total_timesteps=16, obs_keys=("own", "cell")
    )
    Trainer(config, lambda: Spaces(PRIVILEGED, FIVE), policy=Own()).run()
    path, signature = export_policy(tmp_path / "run", tmp_path / "policy", kind, Own())
    assert [port.name for port in signature.inputs] == ["own", "cell", "state_0", "episode_start"]
    run, saved = runner(path, kind), load_policy(tmp_path / "run", Own())
    state, memory = None, np.zeros((3, 2, 2), np.float32)
    for t in range(4):
        obs, starts = batch(PRIVILEGED, 3, 10 * t), np.array([t == 0, t in (0, 2), t == 0])
        actions, state = saved.predict(obs, state, starts)
        inputs = {"own": obs["own"], "cell": obs["cell"], "state_0": memory, "episode_start": starts}
        ours, _, _, memory = run(inputs)
        np.testing.assert_array_equal(ours, actions)
        np.testing.assert_allclose(memory, state[0].numpy(), rtol=1e-5, atol=1e-5)


def test_the_command_prints_inputs_and_outputs(tmp_path, capsys):
    from fastppo.cli import main

    trained(tmp_path / "run", "critic lstm")
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    first, *rest = capsys.readouterr().out.splitlines()
    assert first == f"policy:  {tmp_path / 'run' / 'policy.pt2'}"
    assert rest == [
        "inputs:  own            float32  [B, 3]",
        "         action_mask    bool     [B, 5]",
        "         state_0        float32  [B, 8]",
        "         state_1        float32  [B, 8]",
        "         episode_start  bool     [B]",
        "outputs: actions        int64    [B]",
        "         params         float32  [B, 5]",
        "         next_state_0   float32  [B, 8]",
        "         next_state_1   float32  [B, 8]",
    ]
