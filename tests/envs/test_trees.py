"""Whole runs on Dict observations and masks: equal to plain ones, and equal in every way of stepping environments."""

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode

from fastppo import Config, ConfigError, SimulatorEnv, Trainer, evaluate
from fastppo.analysis.verify_resume import verify_resume
from fastppo.envs.backends import BACKENDS
from fastppo.envs.env_info import EVERYTHING, EnvInfo, Reading
from fastppo.envs.make_envs import inspect_env, make_vec_env
from fastppo.envs.tensor.tasks import TASKS
from fastppo.errors import EnvError
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import ObsSpec
from tests.envs.trees import Scene, cartpole, scene, scenes
from tests.worlds import short, step

SMALL = {"hidden_sizes": (8,), "n_steps": 8, "update_epochs": 1, "compile": "off"}


def trained(tmp_path, make_env, name="run", **settings):
    """Train and return the trainer."""
    trainer = Trainer(short(tmp_path, run_dir=tmp_path / name, **SMALL | settings), make_env=make_env)
    assert trainer.run().ended == "finished"
    return trainer


def weights(trainer):
    return trainer.policy.state_dict()


def by_name(spec, rows):
    return dict(zip((leaf.name for leaf in spec.leaves), spec.unpack(rows), strict=True))


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name, x in a.items():
        assert torch.equal(x, b[name]), name


@pytest.mark.parametrize("normalize_obs", [False, True])
def test_cartpole_in_pieces_trains_to_the_same_bits(tmp_path, normalize_obs):
    settings = {"normalize_obs": normalize_obs, "n_envs": 4, "total_timesteps": 96, "hidden_sizes": (64, 64)}
    whole, pieces = (
        trained(tmp_path, functools.partial(cartpole, sliced), f"run{sliced}", **settings) for sliced in (False, True)
    )
    assert len(pieces.spec.obs.leaves) == 3
    assert torch.equal(whole.rollout.obs, pieces.rollout.obs)
    assert_equal(weights(whole), weights(pieces))


@pytest.fixture(scope="module")
def sync(tmp_path_factory):
    return trained(tmp_path_factory.mktemp("sync"), Scene, n_envs=4, total_timesteps=64)


@pytest.mark.parametrize(
    "way",
    [
        {"vectorization": "async"},
        {"vectorization": "pool", "workers": 2},
    ],
    ids=["async", "pool"],
)
def test_workers_give_the_rollouts_of_one_process(tmp_path, sync, way):
    other = trained(tmp_path, Scene, n_envs=4, total_timesteps=64, **way)
    assert [leaf.kind for leaf in sync.spec.obs.leaves].count("image") == 1
    assert sync.spec.obs.has_mask
    for name, x in sync.rollout.tensors().items():
        if name not in ("noise", "final_obs"):
            assert torch.equal(x, other.rollout.tensors()[name]), name
    assert_equal(weights(sync), weights(other))


def test_halves_of_the_pool_give_the_same_experience(tmp_path, sync):
    """A network rounds otherwise for batches of another size, so that only what the environments give is equal."""
    halves = trained(tmp_path, Scene, n_envs=4, total_timesteps=64, vectorization="pool", workers=2, half_batches=True)
    for name in ("obs", "actions", "rewards", "terminated", "truncated", "done"):
        assert torch.equal(getattr(sync.rollout, name), getattr(halves.rollout, name)), name
    for name, x in weights(sync).items():
        assert torch.allclose(x, weights(halves)[name], atol=1e-4), name


def test_rows_hold_what_the_environments_gave():
    info = inspect_env("", {}, Scene)
    env = make_vec_env(info, 2, "sync")
    rows = env.reset(np.array([3, 4]))
    twins = [Scene(), Scene()]
    for own in env.venv.envs:
        assert own.unwrapped.observation_space == twins[0].observation_space, "the space is not changed"
    obs = [twin.reset(seed=3 + i)[0] for i, twin in enumerate(twins)]
    for _ in range(12):
        arrays = by_name(info.obs_spec, rows)
        for i, one in enumerate(obs):
            flat = {"pair/0": one["pair"][0], "pair/1": one["pair"][1]}
            flat |= {name: one[name] for name in ("camera", "direction", "place", "action_mask")}
            for name, x in flat.items():
                assert np.array_equal(arrays[name][i].numpy(), np.asarray(x, arrays[name].numpy().dtype)), name
        actions = arrays["action_mask"].argmax(1)
        rows = step(env, actions).obs
        for i, twin in enumerate(twins):
            obs[i], _, terminated, truncated, _ = twin.step(int(actions[i]) + 2)
            if terminated or truncated:
                obs[i], _ = twin.reset()


# ---- vector environments of the user's own


def same_as_single(venv_info, n=4, steps=24, **settings):
    """Step a vector environment and separate ones with the same legal actions, and compare real rows."""
    single = inspect_env("", {}, functools.partial(scene, **settings))
    assert single.obs_spec == venv_info.obs_spec
    env, other = make_vec_env(venv_info, n, "sync"), make_vec_env(single, n, "sync")
    seeds = np.arange(7, 7 + n)
    rows, expected = env.reset(seeds).clone(), other.reset(seeds).clone()
    truncations = 0
    skip = torch.zeros(n, dtype=torch.bool)  # in next-step autoreset, rows after an end only reset
    for _ in range(steps):
        if not env.fillers:
            assert torch.equal(rows, expected)
            actions = first_allowed(single.obs_spec, rows)
            one, two = step(env, actions), step(other, actions)
            assert torch.equal(one.rewards, two.rewards)
            assert one.with_final_obs == two.with_final_obs
            for i in one.with_final_obs:
                assert torch.equal(
                    visible(single.obs_spec, one.final_obs[i]), visible(single.obs_spec, two.final_obs[i])
                )
                truncations += 1
            rows, expected = one.obs, two.obs
        else:
            actions = first_allowed(single.obs_spec, rows)
            one = step(env, actions)
            assert torch.equal(one.valid, ~skip)
            skip = one.terminated | one.truncated
            rows = one.obs
            truncations += int(one.truncated.sum())
    assert truncations
    env.close()
    other.close()


def visible(spec, row):
    """The arrays of one row that a network sees, joined; of a last observation the mask is nobody's."""
    arrays = spec.unpack(row[None])[: len(spec.seen)]
    return torch.cat([x.flatten().float() for x in arrays])


def first_allowed(spec, rows):
    allowed = spec.allowed(rows)
    return torch.zeros(len(rows), dtype=torch.int64) if allowed is None else allowed.int().argmax(1)


@pytest.mark.parametrize("masks", ["key", "info", "sometimes"])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_vector_environments_in_each_autoreset_mode(tmp_path, mode, masks):
    make = functools.partial(scenes, 4, mode, masks=masks)
    same_as_single(inspect_env("", {}, make), masks=masks)
    trainer = trained(tmp_path, make, n_envs=4, total_timesteps=64)
    assert trainer.spec.obs.has_mask, "an illegal action is an error there"


def test_a_vector_environment_trains_as_single_ones_do(tmp_path, sync):
    vector = trained(tmp_path, scenes, n_envs=4, total_timesteps=64)
    assert_equal(weights(sync), weights(vector))


@pytest.mark.parametrize("masks", ["key", "info"])
def test_an_async_vector_environment(tmp_path, masks):
    def make():
        return AsyncVectorEnv([functools.partial(scene, masks)] * 4, autoreset_mode=AutoresetMode.SAME_STEP)

    same_as_single(inspect_env("", {}, make), masks=masks)


def test_several_components_in_a_vector_environment(tmp_path):
    trained(tmp_path, functools.partial(scenes, 2, masks="info", components=2), total_timesteps=32)


def test_arrays_that_a_vector_environment_overwrites_are_refused(tmp_path):
    with pytest.raises(EnvError, match="overwrite observations that they returned before"):
        Trainer(short(tmp_path), make_env=functools.partial(scenes, 2, shared=True))


def test_a_native_version(tmp_path):
    trainer = trained(tmp_path, None, env_id="fastppo-tests/Scene-v0", vectorization="native")
    assert trainer.spec.obs.has_mask
    sync = trained(tmp_path, None, "sync", env_id="fastppo-tests/Scene-v0")
    assert_equal(weights(trainer), weights(sync))


def test_a_native_version_that_cannot_be_asked_for_masks_is_refused(tmp_path, monkeypatch):
    spec = gym.envs.registration.EnvSpec(
        "fastppo-tests/Asked-v0",
        functools.partial(scene, "method"),
        disable_env_checker=True,
        vector_entry_point=lambda num_envs: Pooled(num_envs),
    )
    monkeypatch.setitem(gym.registry, spec.id, spec)
    with pytest.raises(ConfigError, match=r"the vector version of .*Asked-v0 can't be asked for action_masks\(\)"):
        trained(tmp_path, None, "native", env_id=spec.id, vectorization="native")
    assert not BACKENDS["native"].available(inspect_env(spec.id, {})), "vectorization=auto passes it by"
    assert BACKENDS["native"].available(inspect_env(spec.id, {}, reading=Reading(masks=False)))


class WithoutInfo(gym.vector.VectorWrapper):
    def reset(self, **keywords):
        return super().reset(**keywords)[0], {}


def test_a_native_version_without_the_masks_of_a_single_environment_is_refused(tmp_path, monkeypatch):
    spec = gym.envs.registration.EnvSpec(
        "fastppo-tests/Silent-v0",
        functools.partial(scene, "info"),
        disable_env_checker=True,
        vector_entry_point=lambda num_envs: WithoutInfo(Pooled(num_envs)),
    )
    monkeypatch.setitem(gym.registry, spec.id, spec)
    with pytest.raises(EnvError, match=r"the vector version gives no info\["):
        trained(tmp_path, None, "native", env_id=spec.id, vectorization="native")
    trainer = trained(tmp_path, None, env_id=spec.id, vectorization="auto")
    # sync or pool, whichever is faster here
    assert trainer.config.vectorization != "native"
    assert trainer.spec.obs.has_mask


def test_mask_methods_within_a_vector_environment_are_refused(tmp_path):
    make_env = functools.partial(gym.vector.SyncVectorEnv, [functools.partial(scene, "method")] * 2)
    with pytest.raises(ConfigError, match=r"SyncVectorEnv can't be asked for action_masks\(\)"):
        Trainer(short(tmp_path), make_env=make_env)
    assert not Trainer(short(tmp_path, action_masks="off"), make_env=make_env).spec.obs.has_mask


class OddMask(Scene):
    """Something else under the name of the mask."""

    def _info(self):
        return {"action_mask": np.ones(7)}


def test_a_mask_of_another_meaning_can_be_left_out(tmp_path):
    make_env = functools.partial(OddMask, "none")
    with pytest.raises(EnvError, match=r"an action mask has shape \(7,\)"):
        Trainer(short(tmp_path), make_env=make_env)
    assert not trained(tmp_path, make_env, action_masks="off").spec.obs.has_mask


class FailsOnce(Scene):
    """An environment whose masks fail once, when `armed`."""

    armed = False

    def action_masks(self):
        if FailsOnce.armed and self.total == 5:
            FailsOnce.armed = False
            raise ZeroDivisionError("not today")
        return self.mask


def test_an_environment_whose_masks_fail_is_restarted(tmp_path, monkeypatch):
    settings = SMALL | {"on_env_error": "restart", "total_timesteps": 64}
    trainer = Trainer(short(tmp_path, **settings), make_env=functools.partial(FailsOnce, "method"))
    monkeypatch.setattr(FailsOnce, "armed", True)
    assert trainer.run().ended == "finished"
    assert trainer.env.restarts == 1


class Pooled(gym.vector.VectorEnv):
    """As EnvPool: nested dicts of arrays, next-step autoreset, one seed, masks in info as one array."""

    metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}  # noqa: RUF012 - Gymnasium's

    def __init__(self, num_envs=2):
        self.num_envs = num_envs
        self.single_observation_space = spaces.Dict(
            x=spaces.Box(-9, 9, (2,), np.float32), inner=spaces.Dict(d=spaces.Discrete(3, start=1))
        )
        self.single_action_space = spaces.Discrete(3)
        self.observation_space = gym.vector.utils.batch_space(self.single_observation_space, num_envs)
        self.action_space = gym.vector.utils.batch_space(self.single_action_space, num_envs)
        self.t, self.mask = 0, None

    def _result(self):
        n = self.num_envs
        self.mask = np.zeros((n, 3), bool)
        self.mask[np.arange(n), (self.t + np.arange(n)) % 3] = True
        obs = {"x": np.full((n, 2), self.t, np.float32), "inner": {"d": 1 + (self.t + np.arange(n)) % 3}}
        return obs, {"action_mask": self.mask, "elapsed_step": np.full(n, self.t)}

    def reset(self, *, seed=None, options=None):
        if not (seed is None or isinstance(seed, int)):
            raise TypeError("one seed")
        self.t = 0
        return self._result()

    def step(self, actions):
        resets = self.t == 4
        assert resets or self.mask[np.arange(self.num_envs), actions].all()
        self.t = 0 if resets else self.t + 1
        over = np.full(self.num_envs, self.t == 4)
        obs, info = self._result()
        if over[0]:
            info["action_mask"][:] = False
        return obs, np.ones(self.num_envs, np.float32), np.zeros_like(over), over, info


def test_an_environment_like_envpools(tmp_path):
    trainer = trained(tmp_path, Pooled)
    assert {leaf.name for leaf in trainer.spec.obs.leaves} == {"inner/d", "x", ""}
    assert not trainer.rollout.valid.all()


class Batched(Pooled):
    """Same-step autoreset, with final observations as one tree of arrays that holds zeros where nothing ended."""

    metadata = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012 - Gymnasium's

    def step(self, actions):
        assert self.mask[np.arange(self.num_envs), actions].all()
        self.t += 1
        obs, info = self._result()
        truncated = np.arange(self.num_envs) == 0 if self.t % 4 == 0 else np.zeros(self.num_envs, bool)
        if truncated.any():
            info["final_obs"] = {"x": obs["x"] * 0.5, "inner": {"d": np.where(truncated, 2, 0)}}
        return obs, np.ones(self.num_envs, np.float32), np.zeros_like(truncated), truncated, info


def test_final_observations_as_a_tree_of_arrays(tmp_path):
    trainer = trained(tmp_path, Batched)
    final = by_name(trainer.spec.obs, trainer.env.final_obs[:1])
    assert (final["inner/d"].item(), final["x"].tolist()) == (2, [[trainer.env.venv.unwrapped.t * 0.5] * 2])


# ---- on the device


class Grid:
    """A simulator with a policy's view, a critic's, and masks; an illegal action is an error."""

    num_envs, nvec = 3, (4,)
    space = spaces.Dict(
        view=spaces.Box(-9, 9, (2,), np.float32),
        truth=spaces.Box(-9, 9, (3,), np.float32),
        heading=spaces.Discrete(4, start=1),
    )

    def __init__(self, mask_in="obs", stuck_at=None):
        self.mask_in, self.stuck_at = mask_in, stuck_at
        if mask_in == "obs":
            self.space = spaces.Dict({**self.space.spaces, "action_mask": spaces.MultiBinary(4)})

    def _obs(self):
        n = self.num_envs
        self.mask = torch.rand(n, 4) < 0.5
        self.mask[torch.arange(n), torch.randint(0, 4, (n,))] = True
        if self.t == self.stuck_at:
            self.mask[1] = False
        obs = {"view": torch.rand(n, 2), "truth": torch.rand(n, 3), "heading": torch.randint(1, 5, (n,))}
        extras = {"legal": self.mask.float()} if self.mask_in == "extras" else {}
        return (obs | {"action_mask": self.mask} if self.mask_in == "obs" else obs), extras

    def reset(self):
        self.t = 0
        return self._obs()

    def step(self, actions):
        assert self.mask[torch.arange(self.num_envs), actions].all(), "an illegal action"
        self.t += 1
        obs, extras = self._obs()
        last = {key: x.clone() for key, x in obs.items()} | {"view": torch.full((self.num_envs, 2), 5.0)}
        if self.mask_in == "obs":
            last["action_mask"] = torch.zeros(self.num_envs, 4, dtype=torch.bool)
        over = torch.full((self.num_envs,), self.t % 3 == 0)
        return obs, torch.rand(self.num_envs), ~over & over, over, extras | {"last": last}


def grid(mask_in="obs", **settings):
    simulator = Grid(mask_in, **settings)
    return SimulatorEnv(simulator, simulator.space, spaces.Discrete(4), final_obs_key="last", mask_key="legal")


@pytest.mark.parametrize("mask_in", ["obs", "extras"])
def test_a_simulator_with_dicts_and_masks(tmp_path, mask_in):
    make = functools.partial(grid, mask_in)
    settings = {"n_envs": 3, "n_minibatches": 3, "obs_keys": ("view", "heading"), "critic_obs_keys": ("truth",)}
    trainer = trained(tmp_path, make, **settings)
    assert {leaf.name: leaf.critic_only for leaf in trainer.spec.obs.seen} == {
        "heading": False,
        "view": False,
        "truth": True,
    }
    view = by_name(trainer.spec.obs, trainer.env.final_obs_buffer.obs[0])["view"]
    assert (view == 5).all(), "the final observations, not the next ones"
    assert trainer.rollout.truncated.any()


def test_a_simulator_without_its_masks_is_refused():
    env = grid("extras")
    env._mask_key = "illegal"
    with pytest.raises(EnvError, match=r"reset gave extras without masks of \(3, 4\) under 'illegal'"):
        env.reset(np.zeros(3, np.int64))


def test_a_simulator_without_a_key_is_refused():
    simulator = Grid("none")
    space = spaces.Dict({**simulator.space.spaces, "wind": spaces.Box(-1, 1, (2,))})
    env = SimulatorEnv(simulator, space, spaces.Discrete(4))
    with pytest.raises(EnvError, match="no 'wind', which its space declares"):
        env.reset(np.zeros(3, np.int64))


def test_a_simulator_whose_final_observations_are_the_next_ones_is_refused(tmp_path):
    class Same(Grid):
        def step(self, actions):
            obs, *rest, extras = super().step(actions)
            return obs, *rest, extras | {"last": obs}

    simulator = Same()
    env = SimulatorEnv(simulator, simulator.space, spaces.Discrete(4), final_obs_key="last")
    with pytest.raises(EnvError, match="'last' in the memory of the next observations"):
        Trainer(short(tmp_path, n_envs=3, n_minibatches=3), make_env=lambda: env).run()


class Hall(gym.Env):
    """Gymnasium's version of `HallTask`: for its spaces."""

    observation_space = spaces.Dict(place=spaces.Box(-9, 9, (2,), np.float32), goal=spaces.Discrete(3))
    action_space = spaces.Discrete(3)
    stuck = False

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return {"place": np.zeros(2, np.float32), "goal": 0}, {"action_mask": np.array([1, 1, 0])}

    def step(self, action):
        obs, info = self.reset()
        return obs, 0.0, False, False, info


gym.register("fastppo-tests/Hall-v0", Hall, max_episode_steps=5)


class HallTask:
    """Walk from a random place by the actions that it allows: not the one that the place forbids."""

    n_uniforms = 1

    def __init__(self, stuck=False):
        self.stuck = stuck

    def reset(self, u):
        return ((u[0] * 100).floor(), torch.zeros_like(u[0]))

    def step(self, state, actions):
        at, wrongs = state
        wrongs = wrongs + (actions == self._forbidden(state)).float()
        at = at + actions + 1
        return (at, wrongs), -wrongs, at > 104

    def observe(self, state):
        return {"place": torch.stack((state[0] / 100, state[1]), 1), "goal": (state[0] % 3).long()}

    def action_mask(self, state):
        allowed = self._forbidden(state).unsqueeze(1) != torch.arange(3, device=state[0].device)
        return allowed & (state[0] < 50).unsqueeze(1) if self.stuck else allowed

    def _forbidden(self, state):
        return state[0].long() % 3


@pytest.mark.parametrize("compile", ["off", "graph"])
def test_tensor_environments_with_dicts_and_masks(tmp_path, monkeypatch, compile):
    monkeypatch.setitem(TASKS, "fastppo-tests/Hall-v0", HallTask)
    settings = {"env_id": "fastppo-tests/Hall-v0", "vectorization": "tensor", "n_envs": 4}
    trainer = trained(tmp_path, None, **settings | {"compile": compile, "total_timesteps": 96})
    assert trainer.config.compile == compile
    place, goal, mask = by_name(trainer.spec.obs, trainer.rollout.obs.flatten(0, 1)).values()
    assert (place[:, 1] == 0).all(), "no forbidden action was taken"
    assert torch.equal(mask, (goal.unsqueeze(1) != torch.arange(3)).float())
    assert trainer.rollout.truncated.any()


def test_a_captured_rollout_equals_an_eager_one(tmp_path, monkeypatch):
    monkeypatch.setitem(TASKS, "fastppo-tests/Hall-v0", HallTask)
    settings = {"env_id": "fastppo-tests/Hall-v0", "vectorization": "tensor", "n_envs": 4, "total_timesteps": 32}
    eager, captured = (trained(tmp_path, None, way, **settings | {"compile": way}) for way in ("off", "graph"))
    assert torch.equal(eager.rollout.obs, captured.rollout.obs)
    assert torch.equal(eager.rollout.actions, captured.rollout.actions)


# ---- keys


def test_an_unsupported_key_is_left_out(tmp_path):
    class Told(Scene):
        def __init__(self):
            super().__init__(camera=False)
            self.observation_space = spaces.Dict({**self.observation_space.spaces, "mission": spaces.Text(9)})

        def _obs(self, over=False):
            return super()._obs(over) | {"mission": "go"}

    with pytest.raises(EnvError, match="observation key mission is Text.*--obs-keys"):
        Trainer(short(tmp_path), make_env=Told)
    trainer = trained(tmp_path, Told, obs_keys=("place", "pair/1"))
    assert [leaf.name for leaf in trainer.spec.obs.seen] == ["pair/1", "place"]


def test_a_mask_can_be_switched_off(tmp_path):
    info = inspect_env("", {}, Scene, reading=Reading(masks=False))
    assert not info.obs_spec.has_mask
    with pytest.raises(EnvError, match=r"environment \d .* failed in step \d+: Illegal"):
        trained(tmp_path, functools.partial(scene, "info"), action_masks="off")


@pytest.mark.parametrize("memory", ["none", "gru"])
@pytest.mark.parametrize("camera", [False, True])
def test_only_the_critic_reads_its_keys(tmp_path, camera, memory):
    make = functools.partial(scene, "info", camera=camera)
    keys = ("camera", "pair/0") if camera else ("pair/0",)
    config = short(tmp_path, critic_obs_keys=keys, memory=memory, normalize_obs=True, **SMALL)
    policy, spec = Trainer(config, make_env=make).policy, inspect_env("", {}, make, reading=Reading((), keys)).obs_spec
    assert [leaf.name for leaf in spec.seen if leaf.critic_only] == list(keys)
    rng = torch.Generator().manual_seed(0)

    def rows(change):
        arrays = []
        for leaf, x in zip(spec.leaves, spec.unpack(spec.blank(5)), strict=True):
            fresh = torch.rand(x.shape, generator=rng)
            arrays.append(change(leaf, x, fresh))
        return spec.pack(arrays)

    def fill(leaf, x, fresh):
        return (fresh * 255).to(x.dtype) if leaf.kind == "image" else fresh if leaf.kind == "vector" else x

    first = rows(fill)
    before = by_name(spec, first)
    state = policy.initial_state(5)
    out = policy(first, state)
    for key in keys:
        changed = rows(lambda leaf, x, fresh, key=key: fill(leaf, x, fresh) if leaf.name == key else before[leaf.name])
        other = policy(changed, state)
        assert torch.equal(out.params, other.params)
        assert (out.values != other.values).all()
    # gradients: the loss of the policy reaches nothing that the critic alone has
    critic = {name for name, p in policy.network.named_parameters() if "critic" in name or "memories.0" in name}
    for loss, trains_critic in ((out.params.square().sum(), False), (out.values.square().sum(), True)):
        grads = torch.autograd.grad(loss, list(policy.network.parameters()), allow_unused=True, retain_graph=True)
        reached = {
            name
            for (name, _), grad in zip(policy.network.named_parameters(), grads, strict=True)
            if grad is not None and grad.any()
        }
        assert reached
        assert not reached & critic or trains_critic
        assert any("actor" in name for name in reached) != trains_critic


def test_a_critic_only_image_does_not_train_with_the_policy_loss(tmp_path):
    config = short(tmp_path, critic_obs_keys=("camera",), **SMALL)
    policy = Trainer(config, make_env=Scene).policy
    trunk = next(iter(policy.network.images.values())).parameters()
    grads = torch.autograd.grad(policy(policy.encoder.spec.blank(2)).params.sum(), list(trunk), allow_unused=True)
    assert not any(grad is not None and grad.any() for grad in grads)


def test_a_shared_trunk_has_no_keys_of_the_critic():
    with pytest.raises(ConfigError, match="critic_obs_keys with shared_trunk"):
        Config(critic_obs_keys=("x",), shared_trunk=True)


def test_keys_leave_the_rest_of_the_info_alone():
    info = inspect_env("", {}, Scene, reading=EVERYTHING)
    assert isinstance(info, EnvInfo)
    assert info.kind == "image"
    assert inspect_env("", {}, Scene, reading=Reading(("place",))).kind == "discrete"
    assert isinstance(ObsSpec.from_space(spaces.Discrete(2)).leaf, ObsLeaf)


@pytest.mark.parametrize(
    "way", [{"vectorization": "sync"}, {"vectorization": "pool", "workers": 2}], ids=["sync", "pool"]
)
@pytest.mark.parametrize("memory", ["none", "lstm"])
def test_a_resume_is_exact(way, memory):
    config = Config(
        env_id="tests.envs.trees:fastppo-tests/Scene-v0",
        env_kwargs={"masks": "info"},
        n_envs=2,
        n_minibatches=2,
        memory=memory,
        normalize_obs=True,
        **SMALL,
        **way,
    )
    results = list(verify_resume(config, 2))
    assert [result.value for result in results if result.name == "resume"] == ["exact: environment state can be saved"]
    assert all(result.state != "bad" for result in results), results


def test_a_run_is_evaluated_with_its_masks(tmp_path):
    trained(tmp_path, Scene, eval_every=16, eval_episodes=2, obs_keys=("place", "camera"))
    played = evaluate(tmp_path / "run", 3, make_env=Scene, deterministic=False)
    assert len(played.returns) == 3
