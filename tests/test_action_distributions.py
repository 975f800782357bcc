"""Runs with a squashed Gaussian, a Beta, or log standard deviations from the network."""

import copy
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as td
from torch import nn

from fastppo import Trainer, evaluate, load_policy, resume
from fastppo.analysis.report import report
from fastppo.analysis.verify_resume import run_hashes
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.export import export
from fastppo.functional.adam import adam
from fastppo.functional.bounded_distributions import Beta, SquashedGaussian, log_tanh_slope
from fastppo.functional.distributions import Gaussian, bound_log_std
from fastppo.functional.losses import Batch, PPOLoss
from fastppo.native import recurrence as native
from fastppo.policies.actors import make_actor
from fastppo.policies.decisions import Decisions
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.numpy_actor import NumpyActor
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime.graphs import GraphPool
from fastppo.spaces.actions import ActionSpec, ToEnv
from fastppo.spaces.observations import ObsSpec
from tests.faults.test_resume import interrupted, rows_of
from tests.test_custom_envs import FAR, WAYS, far_env
from tests.test_update import coefficients, make_shuffle
from tests.worlds import Spaces, short

B, D, EPOCHS, PARTS = 128, 3, 2, 4
KINDS = {
    "state-dependent": {"state_dependent_std": True},
    "squashed": {"action_distribution": "squashed"},
    "squashed, state-dependent": {"action_distribution": "squashed", "state_dependent_std": True},
    "beta": {"action_distribution": "beta"},
}
BOUNDED = [kind for kind, settings in KINDS.items() if "action_distribution" in settings]
CLASSES = {"gaussian": Gaussian, "squashed": SquashedGaussian, "beta": Beta}


def settings_of(kind):
    return KINDS[kind].get("action_distribution", "gaussian"), KINDS[kind].get("state_dependent_std", False)


def make_policy(kind, seed=0):
    """Return a policy with actions far from the centre; other seeds have other weights."""
    name, state_dependent = settings_of(kind)
    dist = CLASSES[name](2)
    torch.manual_seed(0)
    free_std = name != "beta" and not state_dependent
    net = MLP(D, 4, free_std=free_std, hidden_sizes=(16,), activation="tanh", shared_trunk=False)
    with torch.no_grad():
        net.actor.linear.weight.normal_(0, 0.5)
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return Policy(Encoder(ObsSpec.single("vector", (D,), "float32")), net, dist)


def make_batch(kind, policy):
    """Return rows of an older policy, so that KL and ratios differ from 0 and 1."""
    g = torch.Generator().manual_seed(1)
    obs, old = torch.randn(B, D, generator=g), make_policy(kind, seed=1)
    step = old.act(obs, old.draw_noise(B, g))
    advantages, returns = torch.randn(B, generator=g), torch.randn(B, generator=g)
    return Batch(obs, step.actions, step.logprobs, step.params, step.values, advantages, returns, None)


def make_update(policy, objective="clip"):
    return PPOUpdate(
        policy,
        FlatParameters(policy.network),
        PPOLoss("off", objective),
        adam(1e-5),
        make_shuffle(EPOCHS, PARTS),
        normalize="off",
        kl_stop="epoch",
    )


def learn(update, batch, **coefs):
    update.prepare(len(batch.logprobs), math.inf)
    return update.run(batch, coefficients(**coefs), watch=False)


def log_prob_entropy_kl(dist, old, new, stored):
    """Return these for actions in [-1, 1], [B] float64 each, by torch.distributions and a dense integral."""
    first, second = new.double().chunk(2, -1)
    old_first, old_second = old.double().chunk(2, -1)
    if isinstance(dist, Beta):
        now, before = (
            td.Beta(1 + nn.functional.softplus(a), 1 + nn.functional.softplus(b))
            for a, b in ((first, second), (old_first, old_second))
        )
        log_prob = now.log_prob(torch.sigmoid(stored.double())) - math.log(2)
        return log_prob.sum(-1), (now.entropy() + math.log(2)).sum(-1), td.kl_divergence(before, now).sum(-1)
    now, before = (
        td.Normal(mean, bound_log_std(raw).exp()) for mean, raw in ((first, second), (old_first, old_second))
    )
    kl = td.kl_divergence(before, now).sum(-1)
    if not isinstance(dist, SquashedGaussian):
        return now.log_prob(stored.double()).sum(-1), now.entropy().sum(-1), kl
    log_prob = td.TransformedDistribution(now, [td.TanhTransform()]).log_prob(torch.tanh(stored.double()))
    z = torch.linspace(-8, 8, 4001, dtype=torch.float64)
    weights = td.Normal(0.0, 1.0).log_prob(z).exp() * (z[1] - z[0])
    slopes = log_tanh_slope(now.mean.unsqueeze(-1) + now.stddev.unsqueeze(-1) * z)
    return log_prob.sum(-1), (now.entropy() + (slopes * weights).sum(-1)).sum(-1), kl


def reference(network, dist, batch, orders, objective, beta):
    """Update `network` in place, one Adam step per minibatch; return KLs and gradients before clipping."""
    optimizer, kls, gradients = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5), [], []
    for rows in orders.flatten(0, 1):
        new, values = network(batch.obs[rows])
        log_prob, entropy, kl = log_prob_entropy_kl(dist, batch.params[rows], new, batch.actions[rows])
        ratio, advantages = (log_prob - batch.logprobs[rows]).exp(), batch.advantages[rows]
        surrogate = ratio * advantages
        if objective != "penalty":
            surrogate = torch.min(surrogate, ratio.clamp(0.8, 1.2) * advantages)
        critic = 0.7 * 0.5 * (values - batch.returns[rows]).square()
        loss = critic - surrogate - 0.05 * entropy
        if objective != "clip":
            loss = loss + beta * kl
        optimizer.zero_grad()
        loss.mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters()])
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        kls.append(kl.mean().item())
    return kls, gradients


@pytest.mark.parametrize("objective", ["clip", "clip_and_penalty"])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_matches_plain_autograd(objective, kind):
    policy = make_policy(kind)
    twin = copy.deepcopy(policy.network)
    batch = make_batch(kind, policy)
    assert batch.actions.abs().max() > 1.5
    update = make_update(policy, objective)
    coefs = {"ent_coef": 0.05, "kl_coef": 0.3}
    update.prepare(B, math.inf)
    first = update.gradient(batch, coefficients(**coefs))
    update.shuffle.generator.manual_seed(5)
    report = dict(zip(update.report_names, learn(update, batch, **coefs).tolist(), strict=True))
    kls, gradients = reference(twin, policy.distribution, batch, update.shuffle.orders, objective, 0.3)
    torch.testing.assert_close(update.parameters.views(first), gradients[0], atol=1e-5, rtol=0)
    found, expected = (nn.utils.parameters_to_vector(net.parameters()) for net in (policy.network, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert report["exact_kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert min(kls) > 0.001, "the KL must matter"


def three_updates(how, kind):
    """Return the reports of three updates, then the parameters."""
    policy = make_policy(kind)
    batch, update = make_batch(kind, policy), make_update(policy, "clip_and_penalty")
    coefs = coefficients(kl_coef=0.3)
    if how == "compiled":
        update.compile(batch, coefs)
    if how == "captured":
        update.prepare(B, math.inf)
        update.begin(batch)
        update.capture(coefs, GraphPool(torch.device("cpu")))
        update.shuffle.generator.manual_seed(5)
    return [*(learn(update, batch, kl_coef=0.3) for _ in range(3)), update.parameters.vector.clone()]


@pytest.mark.parametrize("how", ["captured", pytest.param("compiled", marks=pytest.mark.slow)])
@pytest.mark.parametrize("kind", KINDS)
def test_captured_and_compiled_updates_match_eager_ones(kind, how):
    torch.testing.assert_close(three_updates(how, kind), three_updates("eager", kind), atol=1e-5, rtol=1e-4)


def spec_of(kind, action=FAR, **changes):
    name, state_dependent = settings_of(kind)
    values = {"network": "mlp", "hidden_sizes": (8, 6), "activation": "tanh", "shared_trunk": False}
    values |= {"normalize_obs": False, "obs_clip": 10.0, "state_dependent_std": state_dependent}
    action_spec = ActionSpec.from_space(action).with_distribution(name)
    return PolicySpec(ObsSpec.single("vector", (D,), "float32"), action_spec, **values | changes)


@pytest.mark.parametrize(
    ("memory", "why"), [("none", None), ("gru", None), ("gru", "there is no C compiler")], ids=["none", "gru", "no C"]
)
@pytest.mark.parametrize("kind", KINDS)
def test_acting_in_numpy_equals_acting_in_torch(kind, memory, why, monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: why)
    torch.manual_seed(0)
    policy = spec_of(kind, memory=memory, memory_size=7).build()
    for parameter in policy.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    n_steps, n, dist, written = 6, 5, policy.distribution, []
    for torch_only in (False, True):
        g = torch.Generator().manual_seed(1)
        noise = torch.empty(n_steps, n, dist.noise_size)
        dist.fill_noise(noise, g)
        states = tuple(torch.randn(n_steps + 1, n, 7, generator=g) for _ in policy.initial_state(n))
        decisions = Decisions(
            obs=torch.randn(n_steps + 1, n, D, generator=g),
            noise=noise,
            actions=torch.zeros(n_steps, n, *dist.action_shape, dtype=dist.action_dtype),
            logprobs=torch.zeros(n_steps, n),
            params=torch.zeros(n_steps, n, dist.n_params),
            values=torch.zeros(n_steps, n),
            states=states,
            starts=torch.rand(n_steps + 1, n, generator=g) < 0.3 if states else None,
        )
        actor = make_actor(policy, decisions, torch_only=torch_only)
        assert isinstance(actor, NumpyActor) is not torch_only
        actor.begin()
        for t in range(n_steps):
            actor.act(t)
        written.append([decisions.actions, decisions.params, *decisions.states])
    torch.testing.assert_close(*written, atol=1e-5, rtol=1e-5)
    assert written[0][0].std() > 0.1


def test_log_standard_deviations_are_outputs_or_parameters():
    free, dependent = (spec_of(kind).build() for kind in ("squashed", "squashed, state-dependent"))
    assert free.network.actor.log_std is not None
    assert dependent.network.actor.log_std is None
    obs = torch.randn(50, D)
    with torch.no_grad():
        dependent.network.actor.linear.weight.normal_()
        assert (dependent(obs).params[:, 2:].std(0) > 0.1).all()
        assert (free(obs).params[:, 2:].std(0) == 0).all()


@pytest.mark.parametrize("kind", BOUNDED)
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_no_action_leaves_the_bounds(kind, dtype):
    low, high = [-2000, 5, -0.1, -3e-30, 0.3, -1e29], [2000, 6, 0.1, 1e-30, 0.7, 1e29]
    space = spaces.Box(np.array(low, dtype), np.array(high, dtype), dtype=dtype)
    spec = ActionSpec.from_space(space).with_distribution(KINDS[kind]["action_distribution"])
    dist = spec.distribution
    g = torch.Generator().manual_seed(0)
    noise = torch.empty(2000, dist.noise_size)
    dist.fill_noise(noise, g)
    params = 5 * torch.randn(2000, dist.n_params, generator=g)
    for actions in (dist.sample(params, noise), dist.mode(params), torch.full((3, 6), 60.0), torch.full((3, 6), -60.0)):
        out = spec.to_env(actions.numpy())
        assert all(space.contains(action) for action in out)
        half = (space.high - space.low) / 2
        np.testing.assert_allclose(ToEnv(spec)(actions).numpy() / half, out / half, rtol=1e-5, atol=1e-5)
        assert len(actions) == 3 or ((out / half).std(0) > 0.3).all()


@pytest.mark.parametrize("kind", BOUNDED)
def test_the_map_to_the_bounds_is_tanh_or_the_logistic_function(kind):
    name = KINDS[kind]["action_distribution"]
    spec = ActionSpec.from_space(FAR).with_distribution(name)
    assert ActionSpec.from_dict(json.loads(json.dumps(spec.to_dict()))) == spec
    for u in (-3.0, -0.4, 0.0, 1.7):
        share = math.tanh(u) if name == "squashed" else 2 / (1 + math.exp(-u)) - 1
        found = spec.to_env(np.full((1, 2), u, np.float32))[0]
        np.testing.assert_allclose(found, [2000 * share, 5.5 + 0.5 * share], rtol=1e-5)
    low, high = spec.bounds(torch.device("cpu"))
    assert (low.tolist(), high.tolist()) == ([-1, -1], [1, 1])
    assert spec.note is None
    assert ActionSpec.from_space(FAR).note is not None


@pytest.mark.parametrize(("name", "way"), [*(("squashed", way) for way in WAYS), ("beta", "sync"), ("beta", "native")])
def test_every_backend_gets_actions_within_its_bounds(tmp_path, name, way):
    """The environments are errors for actions outside the bounds; their reward is the sum of the action."""
    (env_id, _, *make), vectorization = WAYS[way]
    settings = {"vectorization": vectorization, "workers": 1 if vectorization == "pool" else None}
    if not make:
        settings["env_id"] = env_id
    config = short(tmp_path, action_distribution=name, total_timesteps=16, **settings)
    trainer = Trainer(config, make_env=make[0] if make else None)
    trainer.run()
    r = trainer.rollout
    k = {"squashed": 1.0, "beta": 0.5}[name]
    if way != "simulator":
        scaled = np.array([0, 5.5]) + np.array([2000, 0.5]) * np.tanh(k * r.actions.numpy())
        np.testing.assert_allclose(r.rewards.numpy(), scaled.sum(-1), rtol=1e-4, atol=0.05)


def wide_env():
    return Spaces(spaces.Box(-1, 1, (3,), np.float32), FAR)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_is_logged_evaluated_exported_and_continued(tmp_path, kind):
    config = short(tmp_path, eval_every=16, eval_episodes=2, log_histograms=True, record_ratios=1, **KINDS[kind])
    trainer = Trainer(config, make_env=wide_env)
    assert any("component 0 has bounds" in note for note in trainer.notes) is (kind not in BOUNDED)
    for stats in trainer.iterations():
        scalars = stats.scalars
        if kind in BOUNDED:
            assert scalars["charts/clipped_actions"] == 0
            assert 0.2 < scalars["charts/action_range"] < 0.7
        expected = {"beta": 0.477}.get(kind, 1.0)  # 1 / sqrt(2 alpha + 1) for alpha = beta = 1 + log 2
        assert scalars["charts/action_std"] == pytest.approx(expected, abs=0.02)
    folder = tmp_path / "run"
    assert "charts/action_std" in (folder / "metrics.jsonl").read_text()
    report([folder], tmp_path / "page.html")
    assert "Standard deviation of the actions" in (tmp_path / "page.html").read_text()
    saved = load_policy(folder)
    assert saved.spec.action.box_distribution == config.action_distribution
    obs = np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    for deterministic in (True, False):
        actions, _ = saved.predict(obs, deterministic=deterministic)
        assert all(FAR.contains(action) for action in actions)
        assert deterministic or actions.std(0)[0] > 0.3
    assert len(evaluate(folder, 2, make_env=wide_env).returns) == 2
    again = resume(folder, total_timesteps=64, make_env=wide_env)
    assert again.run().ended == "finished"
    other = short(tmp_path, run_dir=tmp_path / "other", init_from=folder, **KINDS[kind])
    started = Trainer(other, make_env=wide_env)
    weights = load_policy(folder).policy.state_dict()
    assert all(torch.equal(x, weights[name]) for name, x in started.policy.state_dict().items())
    started.env.close()


@pytest.mark.parametrize("kind", KINDS)
def test_exports_return_what_predict_returns(tmp_path, kind):
    import onnxruntime

    Trainer(short(tmp_path, learning_rate=0.1, **KINDS[kind]), make_env=wide_env).run()
    saved = load_policy(tmp_path / "run")
    obs = 2 * np.random.default_rng(0).normal(size=(40, 3)).astype(np.float32)
    expected, _ = saved.predict(obs)
    path = export(tmp_path / "run", None, "pt2")
    found = torch.export.load(path).module()(torch.from_numpy(obs))[0].detach().numpy()
    session = onnxruntime.InferenceSession(
        str(export(tmp_path / "run", None, "onnx")), providers=["CPUExecutionProvider"]
    )
    for actions in (found, session.run(None, {"obs": obs})[0]):
        np.testing.assert_allclose(actions, expected, rtol=1e-5, atol=2e-2)  # of 2000
        np.testing.assert_allclose(actions[:, 1], expected[:, 1], rtol=1e-5)
    assert expected.std(0)[0] > 1


RUN = {"env_id": "Pendulum-v1", "n_envs": 4, "n_steps": 16, "total_timesteps": 4 * 16 * 8, "learning_rate": 0.01}
RUN |= {"update_epochs": 3, "threads": 1}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumes_bit_for_bit(tmp_path, kind):
    settings = RUN | KINDS[kind] | {"normalize_obs": True}
    Trainer(short(tmp_path, **settings, run_dir=tmp_path / "whole")).run()
    interrupted(short(tmp_path, **settings, run_dir=tmp_path / "parted"), 4)
    resume(tmp_path / "parted").run()
    assert run_hashes(tmp_path / "whole") == run_hashes(tmp_path / "parted")
    assert rows_of(tmp_path / "parted") == rows_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", KINDS)
def test_the_ratio_is_1_before_the_first_step(tmp_path, kind):
    trainer = Trainer(short(tmp_path, record_ratios=1, **RUN | KINDS[kind]))
    for stats in trainer.iterations():
        assert stats.scalars["samples/first_ratio_error"] < 1e-5


@pytest.mark.parametrize("kind", BOUNDED)
def test_captured_training_on_tensor_environments_matches_eager_training(tmp_path, kind):
    logged = {}
    for how in ("off", "graph"):
        settings = RUN | KINDS[kind]
        settings |= {"vectorization": "tensor", "n_steps": 4, "total_timesteps": 4 * 4 * 4, "compile": how}
        trainer = Trainer(short(tmp_path, **settings, run_dir=tmp_path / how))
        rows = [stats.scalars for stats in trainer.iterations()]
        logged[how] = [row[name] for row in rows for name in ("losses/entropy", "charts/reward_per_step")]
        logged[how].append(trainer.update.parameters.vector.norm().item())
    assert logged["graph"] == pytest.approx(logged["off"], rel=1e-4)
    assert len(set(logged["off"])) > 4


def test_a_network_of_ones_own_gives_the_parameters(tmp_path):
    class Own(nn.Linear):
        def forward(self, x):
            out = super().forward(x)
            return out[:, :4], out[:, 4]

    for name in ("squashed", "beta"):
        config = short(tmp_path, action_distribution=name, run_dir=tmp_path / name)
        assert Trainer(config, make_env=far_env, policy=Own(3, 5)).run().ended == "finished"
    with pytest.raises(ConfigError, match="state_dependent_std and a policy module are both given"):
        Trainer(short(tmp_path, state_dependent_std=True), make_env=far_env, policy=Own(3, 5))


def test_policies_of_another_distribution_are_refused(tmp_path):
    Trainer(short(tmp_path, action_distribution="beta"), make_env=far_env).run()
    for changes, message in (
        ({}, "action_distribution beta there, gaussian here"),
        ({"action_distribution": "squashed"}, "action_distribution beta there, squashed here"),
        ({"state_dependent_std": True}, "state_dependent_std False there, True here"),
    ):
        config = short(tmp_path, run_dir=tmp_path / "new", init_from=tmp_path / "run", **changes)
        with pytest.raises(CheckpointError, match=message):
            Trainer(config, make_env=far_env)


@pytest.mark.parametrize(
    ("space", "message"),
    [
        (spaces.Discrete(3), "action_distribution=beta needs Box actions, but the action space is discrete"),
        (
            spaces.Box(np.array([-1, 0], np.float32), np.array([1, np.inf], np.float32)),
            "action_distribution=beta needs finite bounds, but component 1 of the action space has 0 to inf",
        ),
    ],
)
def test_spaces_without_bounds_are_refused(tmp_path, space, message):
    with pytest.raises(ConfigError, match=message):
        Trainer(short(tmp_path, action_distribution="beta"), make_env=lambda: Spaces(FAR, space))
    assert not (tmp_path / "run").exists()


def test_policies_saved_before_there_was_a_choice_are_gaussian():
    spec = spec_of("state-dependent", state_dependent_std=False)
    values = json.loads(json.dumps(spec.to_dict()))
    assert values["action"].pop("box_distribution") == "gaussian"
    assert values.pop("state_dependent_std") is False
    assert PolicySpec.from_dict(values) == spec
    assert dataclasses.replace(spec, state_dependent_std=True).differences(spec) == [
        "state_dependent_std False there, True here"
    ]
