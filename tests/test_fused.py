"""Acting, values, advantages and the update in C against torch."""

import ctypes
import dataclasses
import functools
import itertools
import math
import os
import platform
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import fastppo
from fastppo import Config, Trainer
from fastppo.functional.adam import adam
from fastppo.functional.adaptation import Adaptation, adapted_kl_coef, adapted_learning_rate
from fastppo.functional.bounded_distributions import Beta, SquashedGaussian
from fastppo.functional.distributions import Bernoulli, Categorical, Gaussian, MultiCategorical
from fastppo.functional.gae import Trajectory, gae_loop
from fastppo.functional.losses import Batch, PPOLoss
from fastppo.native import library
from fastppo.native import mlp as native
from fastppo.native.gae import gae
from fastppo.policies.decisions import Decisions
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.native_actor import NativeActor, NativePolicy, can_act_in_c
from fastppo.policies.native_mlp import not_covered
from fastppo.policies.normalizers import ObsNormalizer
from fastppo.policies.numpy_actor import can_act_in_numpy
from fastppo.policies.policy import FORBIDDEN, Policy
from fastppo.ppo import fused_gradient
from fastppo.ppo.fused_gradient import FusedGradient
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.update import PPOUpdate
from fastppo.ppo.update_step import LossGradient
from fastppo.runtime.compile import CompileError
from fastppo.spaces.observations import ObsSpec
from tests import PATIENCE
from tests.test_update import REPORT, coefficients, learn, make_shuffle, named
from tests.worlds import short

SOURCES = Path(native.__file__).parent
pytestmark = pytest.mark.skipif(native.unavailable() is not None, reason="no C compiler")

WIDER = {"free_std": False, "hidden_sizes": (20, 16), "activation": "tanh", "shared_trunk": False}
DISTRIBUTIONS = {
    "categorical": Categorical(3),
    "choices": MultiCategorical((3, 2, 4)),
    "bits": Bernoulli(3),
    "gaussian": Gaussian(3),
    "squashed": SquashedGaussian(2),
}


def make_policy(dist, *, obs=5, widths=(16, 16), activation="tanh", shared=False, free_std=None, seed=0, critic=0):
    torch.manual_seed(seed)
    spec = ObsSpec.from_space(spaces.Box(-np.inf, np.inf, (obs,), np.float32))
    free_std = isinstance(dist, Gaussian) if free_std is None else free_std
    network = MLP(
        obs,
        dist.n_params,
        free_std=free_std,
        hidden_sizes=widths,
        activation=activation,
        shared_trunk=shared,
        n_critic_features=critic,
    )
    policy = Policy(Encoder(spec), network, dist)
    with torch.no_grad():  # the first heads are nearly zero, which would hide errors behind them
        for p in network.parameters():
            p.add_(0.2 * torch.randn_like(p))
    return policy


def make_batch(policy, rows, seed=1, valid=None):
    g, dist = torch.Generator().manual_seed(seed), policy.distribution
    obs = torch.randn(rows, *policy.encoder.spec.shape, generator=g)
    noise = torch.zeros(rows, dist.noise_size)
    dist.fill_noise(noise, g)
    with torch.no_grad():
        params = policy(obs).params + 0.05 * torch.randn(rows, dist.n_params, generator=g)
    actions = dist.sample(params, noise)
    logprobs, more = dist.log_prob(params, actions), torch.randn(3, rows, generator=g)
    return Batch(obs, actions, logprobs, params, *more, valid)


def gradients(policy, batch, loss, threads=1, **coefs):
    """Return the gradient by torch and by C."""
    flat = FlatParameters(policy.network)
    order = torch.randperm(len(batch.logprobs), generator=torch.Generator().manual_seed(3))
    kinds = LossGradient, functools.partial(FusedGradient, threads=threads)
    for kind in kinds:
        gradient = kind(policy, flat, loss, scale_advantages=True)
        minibatch = Minibatch(torch.tensor([0.1, 1.5]), order, gradient.pack(batch))
        yield gradient(flat.vector.clone(), minibatch, coefficients(kl_coef=0.5, **coefs), gradient.constants)


def assert_same(torchs, ours):
    largest = torchs.flat.abs().max()
    torch.testing.assert_close(ours.flat, torchs.flat, atol=float(1e-5 * largest), rtol=0)
    torch.testing.assert_close(ours.diagnostics, torchs.diagnostics, atol=1e-5, rtol=1e-4)
    assert ours.n_rows == torchs.n_rows
    assert largest > 1e-3


@pytest.mark.parametrize("objective", ["clip", "penalty", "clip_and_penalty"])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_a_gradient_is_autograds(name, objective):
    policy = make_policy(DISTRIBUTIONS[name])
    assert_same(*gradients(policy, make_batch(policy, 203), PPOLoss("max", objective)))


@pytest.mark.parametrize("value_clip", native.VALUE_CLIPS)
@pytest.mark.parametrize("activation", native.ACTIVATIONS)
def test_a_gradient_with_each_activation(activation, value_clip):
    policy = make_policy(Gaussian(2), activation=activation, widths=(33, 20), shared=value_clip == "max")
    valid = torch.arange(150) % 3 != 0
    assert_same(*gradients(policy, make_batch(policy, 150, valid=valid), PPOLoss(value_clip), threads=2))


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    widths=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    obs=st.integers(1, 400),
    n=st.integers(1, 20),
    rows=st.integers(1, 300),
    gaussian=st.booleans(),
    shared=st.booleans(),
    threads=st.integers(1, 3),
)
def test_a_gradient_of_any_shape(widths, obs, n, rows, gaussian, shared, threads):
    policy = make_policy(Gaussian(n) if gaussian else Categorical(n + 1), obs=obs, widths=tuple(widths), shared=shared)
    batch = make_batch(policy, rows)
    torchs, ours = gradients(policy, batch, PPOLoss("off"), threads=threads, clip_coef=10.0)
    torch.testing.assert_close(ours.flat, torchs.flat, atol=float(2e-5 * torchs.flat.abs().max()), rtol=0)
    torch.testing.assert_close(ours.diagnostics, torchs.diagnostics, atol=1e-4, rtol=1e-4)


def test_deviations_that_the_network_computes():
    for dist in (Gaussian(3), SquashedGaussian(2)):
        policy = make_policy(dist, free_std=False)
        assert_same(*gradients(policy, make_batch(policy, 100), PPOLoss("max", "clip_and_penalty")))


def test_features_that_only_the_critic_reads():
    for obs, critic in ((7, 4), (90, 61)):
        policy = make_policy(Categorical(3), obs=obs, critic=critic)
        assert_same(*gradients(policy, make_batch(policy, 100), PPOLoss("max")))


def test_masked_actions(tmp_path):
    trainer = Trainer(short(tmp_path, env_id="Taxi-v4", n_steps=32, compile="off", total_timesteps=64), progress=False)
    trainer.run()
    assert trainer.policy.encoder.spec.has_mask
    batch = trainer.collect.rollout.batch()
    assert (batch.params <= FORBIDDEN).any()
    assert_same(*gradients(trainer.policy, batch, PPOLoss("max")))


OPTIONS = {
    "normalize": ["minibatch", "batch", "off"],
    "kl_stop": ["epoch", "minibatch"],
    "objective": ["clip", "penalty", "clip_and_penalty"],
    "value_clip": ["max", "off", "clipped_only"],
    "distribution": list(DISTRIBUTIONS),
    "fillers": [False, True],
    "limit": [math.inf, 0.01],
    "adaptive_rate": [False, True],
    "adaptive_kl_coef": [False, True],
}


def pairwise(options):
    """Return few combinations in which every pair of values of two options appears."""
    names, wanted = list(options), set()
    for a, b in itertools.combinations(options, 2):
        wanted |= {((a, x), (b, y)) for x in options[a] for y in options[b]}
    rng, cases = np.random.default_rng(0), []
    while wanted:
        best, covered = None, set()
        for _ in range(60):
            (a, x), (b, y) = sorted(wanted, key=str)[int(rng.integers(len(wanted)))]
            case = {name: options[name][int(rng.integers(len(options[name])))] for name in names} | {a: x, b: y}
            pairs = set(itertools.combinations(case.items(), 2)) & wanted
            if len(pairs) > len(covered):
                best, covered = case, pairs
        cases.append(best)
        wanted -= covered
    return cases


def update_of_case(policy, case, *, update_epochs, n_minibatches):
    """Return an update with the options of `case`, one of `pairwise(OPTIONS)`."""
    return PPOUpdate(
        policy,
        FlatParameters(policy.network),
        PPOLoss(case["value_clip"], case["objective"]),
        adam(1e-5),
        make_shuffle(update_epochs, n_minibatches),
        normalize=case["normalize"],
        kl_stop=case["kl_stop"],
        adaptive_rate=Adaptation(1e-3, lambda rate, kl: adapted_learning_rate(rate, kl, 0.01, 1e-5, 1e-2))
        if case["adaptive_rate"]
        else None,
        adaptive_kl_coef=Adaptation(0.5, lambda beta, kl: adapted_kl_coef(beta, kl, 0.01))
        if case["adaptive_kl_coef"] and case["objective"] != "clip"
        else None,
    )


@pytest.mark.parametrize("case", pairwise(OPTIONS), ids=lambda case: "-".join(str(x) for x in case.values()))
def test_an_update_is_the_eager_one(case):
    results = []
    for fused in (False, True):
        policy = make_policy(DISTRIBUTIONS[case["distribution"]])
        valid = torch.arange(256) % 5 != 0 if case["fillers"] else None
        batch = make_batch(policy, 256, valid=valid)
        update = update_of_case(policy, case, update_epochs=3, n_minibatches=4)
        coefs = coefficients(learning_rate=5e-3, kl_coef=0.5)._replace(**update.adapted)
        if fused:
            before = [x.clone() for x in update.kept()]
            update.fuse(batch, 1)
            assert all(map(torch.equal, before, update.kept())), "it changes no state"
        reports = [learn(update, batch, coefs, case["limit"]) for _ in range(2)]
        results.append((update.state.params.clone(), torch.stack(reports), update.state_dict()))
    (params, report, state), (ours, our_report, our_state) = results
    torch.testing.assert_close(ours, params, atol=1e-5, rtol=0)
    torch.testing.assert_close(our_report, report, atol=1e-4, rtol=1e-4, equal_nan=True)
    for name, x in state.items():
        torch.testing.assert_close(our_state[name], x, atol=1e-5, rtol=1e-4)
    if case["limit"] != math.inf and not case["adaptive_rate"]:
        assert report[:, REPORT.index("stopped")].any()


def test_a_gradient_that_is_not_finite_is_skipped():
    policy = make_policy(Categorical(3))
    batch = make_batch(policy, 256)
    batch.returns[17] = math.nan
    update = make_update(policy)
    update.fuse(batch, 1)
    before = update.state.params.clone()
    report = named(learn(update, batch, coefficients(), math.inf))
    assert report["skipped_minibatches"] == 2, "one in each of two epochs"
    assert report["skipped_in_a_row"] == 1
    assert update.state.params.isfinite().all()
    assert not torch.equal(update.state.params, before)


def make_update(policy, **changes):
    shuffle = make_shuffle(changes.pop("update_epochs", 2), changes.pop("n_minibatches", 4))
    options = {"normalize": "minibatch", "kl_stop": "epoch"} | changes
    return PPOUpdate(policy, FlatParameters(policy.network), PPOLoss("max"), adam(1e-5), shuffle, **options)


def test_the_bits_depend_on_the_number_of_threads_alone():
    found = {}
    for threads in (1, 2, 1, 2):
        policy = make_policy(Categorical(3), widths=(64, 64))
        batch, update = make_batch(policy, 2048), make_update(policy)
        update.fuse(batch, threads)
        learn(update, batch, coefficients(), math.inf)
        expected = found.setdefault(threads, update.state.params.clone())
        assert torch.equal(update.state.params, expected)
    torch.testing.assert_close(found[1], found[2], atol=1e-5, rtol=0)


def test_large_networks_are_shared_among_threads():
    """From 32,768 parameters on, packing, summing and Adam are divided too."""
    results = []
    for threads in (0, 1, 3):
        policy = make_policy(Categorical(3), widths=(150, 170))
        batch, update = make_batch(policy, 256), make_update(policy)
        assert update.parameters.size > 32768
        if threads:
            update.fuse(batch, threads)
        learn(update, batch, coefficients(), math.inf)
        results.append(update.state.params.clone())
    for other in results[1:]:
        torch.testing.assert_close(other, results[0], atol=1e-5, rtol=0)


def decisions(policy, steps, n, seed=2):
    g, dist = torch.Generator().manual_seed(seed), policy.distribution
    noise = torch.zeros(steps, n, dist.noise_size)
    dist.fill_noise(noise, g)
    obs = torch.randn(steps + 1, n, *policy.encoder.spec.shape, generator=g)
    actions = torch.zeros(steps, n, *dist.action_shape, dtype=dist.action_dtype)
    return Decisions(obs, noise, actions, *(torch.zeros(steps, n, *shape) for shape in ((), (dist.n_params,), ())))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_acting_is_torchs(name, shared):
    policy = make_policy(DISTRIBUTIONS[name], shared=shared)
    if name == "gaussian":
        policy.encoder.normalizer = ObsNormalizer((5,), 2.0)
        policy.encoder.normalizer.update(3 + 2 * torch.randn(50, 5))
    assert can_act_in_c(policy)
    d, in_c = decisions(policy, 3, 70), NativePolicy(policy, 1)
    for group in (slice(0, 31), slice(31, 70)):
        actor = NativeActor(in_c, d.of_group(group))
        for t in range(3):
            actor.act(t)
    for t in range(3):
        step = policy.act(d.obs[t], d.noise[t])
        torch.testing.assert_close(d.params[t], step.params, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(d.actions[t], step.actions, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(in_c.value(d.obs[t]), step.values, atol=1e-5, rtol=1e-5)


def test_new_parameters_are_seen_after_begin():
    policy = make_policy(Categorical(3))
    d, in_c = decisions(policy, 1, 4), NativePolicy(policy, 1)
    with torch.no_grad():
        for p in policy.network.parameters():
            p.mul_(2.0)
    in_c.begin()
    NativeActor(in_c, d).act(0)
    torch.testing.assert_close(d.params[0], policy(d.obs[0]).params, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (7, 3), (32, 65)])
def test_advantages_are_those_of_the_loop(shape):
    g = torch.Generator().manual_seed(0)
    rewards, values, next_values = torch.randn(3, *shape, generator=g)
    terminated = torch.rand(shape, generator=g) < 0.2
    done = terminated | (torch.rand(shape, generator=g) < 0.2)
    next_values[terminated] = math.nan
    trajectory = Trajectory(rewards, values, next_values, terminated, done)
    arguments = trajectory, torch.tensor(0.99), torch.tensor(0.95)
    for ours, theirs in zip(gae(*arguments), gae_loop(*arguments), strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


def config(folder, **changes):
    return Config(env_id="CartPole-v1", n_envs=4, n_steps=32, total_timesteps=640, run_dir=folder, threads=1, **changes)


def notes_of(trainer):
    return [note for note in trainer.notes if "fused" in note]


def test_auto_takes_the_c_code_where_it_applies(tmp_path):
    trainer = Trainer(config(tmp_path / "run"), progress=False)
    assert trainer.config.compile == "fused"
    assert all(isinstance(actor, NativeActor) for actor in trainer.collect.actors)
    assert len(notes_of(trainer)) == 1


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"memory": "lstm"}, "the policy has memory"),
        ({"precision": "bf16"}, "precision is bf16"),
        ({"hidden_sizes": (4,) * 9}, "more than 8 hidden layers"),
        ({"optimizer": "muon"}, "the optimiser is not Adam"),
    ],
)
def test_what_is_not_covered_runs_as_before(tmp_path, changes, why):
    trainer = Trainer(config(tmp_path / "run", compile="fused", **changes), progress=False)
    assert trainer.config.compile == "off", "a short run"
    (note,) = notes_of(trainer)
    assert why in note
    trainer.run()


def test_a_beta_distribution_is_not_covered():
    policy = make_policy(Beta(2))
    assert "the distribution is Beta" in make_update(policy).not_fused()


@pytest.mark.parametrize("compiler", ["/nonexistent/cc", "/bin/false"])
def test_without_a_compiler_training_runs_as_before(tmp_path, monkeypatch, compiler):
    monkeypatch.setenv("CC", compiler)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load.cache_clear()
    native.unavailable.cache_clear()
    try:
        trainer = Trainer(config(tmp_path / "run"), progress=False)
        assert trainer.config.compile == "off"
        assert len(notes_of(trainer)) == 1
        trainer.run()
    finally:
        monkeypatch.undo()
        library.load.cache_clear()
        native.unavailable.cache_clear()


def test_a_wrong_gradient_is_found_at_the_start(tmp_path, monkeypatch):
    right = native.gradient

    def wrong(*arguments):
        flat, *rest = right(*arguments)
        return (flat * 1.01, *rest)

    monkeypatch.setattr(fused_gradient.native, "gradient", wrong)
    policy = make_policy(Categorical(3))
    with pytest.raises(CompileError, match="its gradient differs from torch's"):
        make_update(policy).fuse(make_batch(policy, 64), 1)
    trainer = Trainer(config(tmp_path / "run"), progress=False)
    assert trainer.config.compile == "off"
    assert "differs from torch's" in notes_of(trainer)[0]
    trainer.run()


def test_a_wrong_gradient_of_a_weight_is_found(monkeypatch):
    """Observations of zeros, such as a new rollout's, would hide it."""
    right, policy = native.gradient, make_policy(Categorical(3))
    weights = [p.numel() for p in policy.network.parameters() if p.dim() == 2]

    def wrong(*arguments):
        flat, *rest = right(*arguments)
        flat[: weights[0]] *= 7  # the first layer's
        return (flat, *rest)

    monkeypatch.setattr(fused_gradient.native, "gradient", wrong)
    batch = make_batch(policy, 64)
    batch.obs.zero_()
    with pytest.raises(CompileError, match="its gradient differs from torch's"):
        make_update(policy).fuse(batch, 1)


@pytest.mark.parametrize("name", ["categorical", "gaussian"])
def test_the_comparison_at_the_start_sees_every_parameter(name):
    """Even where TF32 allows 1 %: the gradients of an actor's hidden layers are far smaller than the critic's."""
    policy, loss = make_policy(DISTRIBUTIONS[name]), PPOLoss("max", "clip")
    parameters = FlatParameters(policy.network)
    right = FusedGradient(policy, parameters, loss, scale_advantages=True, threads=1)
    for i in range(len(parameters.parameters)):

        class Wrong:
            constants, pack = right.constants, right.pack

            def __call__(self, *arguments, i=i):
                gradient = right(*arguments)
                parameters.views(gradient.flat)[i].zero_()
                return gradient

        with pytest.raises(CompileError, match="its gradient differs"):
            fused_gradient.check_gradient(Wrong(), policy, parameters, loss, fillers=False, tolerance=1e-2)


@pytest.mark.parametrize("value_clip", ["off", "max", "clipped_only"])
@pytest.mark.parametrize("obs", [2, 5, 8, 11, 17, 32])
def test_the_comparison_at_the_start_takes_right_gradients_of_every_shape(obs, value_clip):
    """Sums that are 0 but for rounding differ by more than their own size."""
    for distribution in (*map(Gaussian, range(1, 9)), Gaussian(16), *map(Categorical, (2, 3, 7))):
        for fillers in (False, True):
            policy = make_policy(distribution, obs=obs, widths=(8,))
            parameters, loss = FlatParameters(policy.network), PPOLoss(value_clip)
            fused_gradient.fuse_gradient(policy, parameters, loss, scale_advantages=True, fillers=fillers, threads=1)


def changed(change):
    policy = make_policy(Categorical(3))
    change(policy.network)
    return policy


@pytest.mark.parametrize(
    "change",
    [
        lambda net: setattr(net, "critic_trunk", net.critic_trunk[:-1]),
        lambda net: net.actor_trunk.__setitem__(2, torch.nn.ReLU()),
        lambda net: net.critic_trunk.append(torch.nn.LayerNorm(16)),
        lambda net: (
            [net.critic_trunk.__setitem__(i, torch.nn.GELU("tanh")) for i in (2, 4)]
            and [net.actor_trunk.__setitem__(i, torch.nn.GELU("tanh")) for i in (2, 4)]
        ),
        lambda net: setattr(net.critic, "bias", None),
        lambda net: torch.nn.utils.parametrizations.spectral_norm(net.critic_trunk[1]),
        lambda net: net.actor.linear.register_forward_hook(lambda *_: None),
        lambda net: setattr(net, "critic_trunk", MLP(5, 3, **WIDER).critic_trunk),
    ],
    ids=["no activation", "two activations", "normalised", "another GELU", "no bias", "spectral", "hook", "wider"],
)
def test_a_changed_mlp_is_not_covered(change):
    policy, unchanged = changed(change), changed(lambda net: None)
    assert not_covered(policy) in ("the MLP's layers were changed", "some parameters are frozen")
    assert not_covered(unchanged) is None
    assert not can_act_in_numpy(policy)
    assert can_act_in_numpy(unchanged)


def test_threads_beyond_those_of_the_pool_compute_the_same():
    policy = make_policy(Categorical(3))
    batch = make_batch(policy, 400)
    assert_same(*gradients(policy, batch, PPOLoss("max"), threads=70))


SPECIAL = [math.nan, math.inf, -math.inf, 1e30, -1e30]


@pytest.mark.parametrize("field", ["logprobs", "advantages", "returns", "params", "obs"])
@pytest.mark.parametrize("name", ["categorical", "bits", "gaussian"])
def test_numbers_that_are_not_finite_are_skipped_as_by_torch(name, field):
    for value in SPECIAL:
        skipped = []
        for fused in (False, True):
            policy = make_policy(DISTRIBUTIONS[name])
            batch = make_batch(policy, 64)
            getattr(batch, field).view(64, -1)[17, 0] = value
            update = make_update(policy)
            if fused:
                update.fuse(batch, 1)
            report = named(learn(update, batch, coefficients(), math.inf))
            skipped.append((report["skipped_minibatches"], report["minibatches_run"], report["skipped_in_a_row"]))
        assert skipped[0] == skipped[1], value


@pytest.mark.parametrize("coef", [-1.0, 0.0])
def test_value_clipping_at_its_ends(coef):
    policy = make_policy(Categorical(3))
    batch = make_batch(policy, 100)
    for value_clip in ("max", "clipped_only"):
        assert_same(*gradients(policy, batch, PPOLoss(value_clip), value_clip_coef=coef))


@pytest.mark.parametrize("log_std", [-12.0, 4.0])
def test_deviations_beyond_their_bounds(log_std):
    policy = make_policy(Gaussian(2))
    with torch.no_grad():
        policy.network.actor.log_std.fill_(log_std)
    assert_same(*gradients(policy, make_batch(policy, 100), PPOLoss("max", "clip_and_penalty"), clip_coef=1e6))


def test_bits_beyond_their_bounds_and_saturated_units():
    policy = make_policy(Bernoulli(3))
    with torch.no_grad():
        policy.network.actor.linear.bias[0] = 2000.0
    batch = make_batch(policy, 100)
    torchs, ours = gradients(policy, batch._replace(obs=batch.obs * 1e6), PPOLoss("max", "penalty"))
    torch.testing.assert_close(ours.flat, torchs.flat, atol=float(1e-4 * torchs.flat.abs().max()), rtol=0)


def test_the_first_ratio_of_an_update_is_1():
    """Acting's log-probabilities are computed by the code of the update."""
    for name, dist in DISTRIBUTIONS.items():
        policy = make_policy(dist)
        d, in_c = decisions(policy, 4, 32), NativePolicy(policy, 1)
        actor = NativeActor(in_c, d)
        for t in range(4):
            actor.act(t)
        in_c.fill(d)
        rows = {"obs": d.obs[:4], "actions": d.actions, "logprobs": d.logprobs, "params": d.params, "values": d.values}
        batch = Batch(*(x.flatten(0, 1) for x in rows.values()), *torch.randn(2, 128), None)
        torchs, ours = gradients(policy, batch, PPOLoss("off"))
        approx_kl = PPOLoss.diagnostics.index("approx_kl")
        assert ours.diagnostics[approx_kl] == 0, name
        assert torchs.diagnostics[approx_kl] < 1e-9
        expected = policy.value(batch.obs)
        torch.testing.assert_close(batch.values, expected, atol=1e-5, rtol=1e-5)


def test_a_resume_with_other_c_code_says_so(tmp_path, monkeypatch):
    for _ in Trainer(config(tmp_path / "run"), progress=False).iterations():
        break
    before = library.sources_hash()
    monkeypatch.setattr(library, "sources_hash", lambda: "other")
    again = fastppo.resume(tmp_path / "run", progress=False)
    again.env.close()
    assert any(f"the checkpoint has native code {before}, now other" in note for note in again.notes)


def test_a_resume_of_a_run_that_c_could_not_update_says_nothing_of_c(tmp_path, monkeypatch):
    """`auto` tries C first; what it chose in the end is what a resume compares."""
    monkeypatch.setattr("fastppo.ppo.fused_gradient.not_fused", lambda *_: "not here")
    first = Trainer(dataclasses.replace(config(tmp_path / "run"), compile="auto"), progress=False)
    for _ in first.iterations():
        break
    assert first.config.compile != "fused"
    again = fastppo.resume(tmp_path / "run", progress=False)
    again.env.close()
    assert not any("native code" in note for note in again.notes)


def test_a_resumed_run_is_the_uninterrupted_one(tmp_path):
    whole = Trainer(config(tmp_path / "whole"), progress=False)
    whole.run()
    for stats in Trainer(config(tmp_path / "part"), progress=False).iterations():
        if stats.iteration == 2:
            break
    again = fastppo.resume(tmp_path / "part", progress=False)
    again.run()
    assert again.config.compile == "fused"
    assert torch.equal(again.update.parameters.vector, whole.update.parameters.vector)


@pytest.fixture(params=["-mno-avx512f", "-mno-avx"])
def narrower(request, tmp_path, monkeypatch):
    """C code for an x86 processor with AVX2 alone, or with SSE: vectors of 8 and 4 numbers, the latter as on ARM."""
    if platform.machine() != "x86_64":
        pytest.skip("flags of x86")
    compiler = os.environ.get("CC", "cc")
    preprocess = [compiler, request.param, *library._FLAGS, f"-I{SOURCES}", "-E", "-P", "-"]
    source = '#include "products.h"\nWIDTH'
    done = subprocess.run(preprocess, input=source, capture_output=True, text=True, check=True)
    width = int(done.stdout.split()[-1])
    assert width == (4 if request.param == "-mno-avx" else min(width, 8))
    monkeypatch.setenv("CC", f"{compiler} {request.param}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    library.load.cache_clear()
    yield
    monkeypatch.undo()
    library.load.cache_clear()


def test_narrower_vectors_compute_the_same(narrower):
    for name, activation in (("categorical", "tanh"), ("choices", "gelu"), ("gaussian", "silu"), ("squashed", "elu")):
        policy = make_policy(DISTRIBUTIONS[name], activation=activation, widths=(33, 20))
        valid = torch.arange(150) % 3 != 0
        assert_same(*gradients(policy, make_batch(policy, 150, valid=valid), PPOLoss("max"), threads=2))
    case = {name: values[0] for name, values in OPTIONS.items()} | {"distribution": "categorical"}
    results = []
    for fused in (False, True):
        policy = make_policy(Categorical(3))
        batch, update = make_batch(policy, 256), update_of_case(policy, case, update_epochs=3, n_minibatches=4)
        if fused:
            update.fuse(batch, 1)
        learn(update, batch, coefficients(learning_rate=5e-3), math.inf)
        results.append(update.state.params.clone())
    torch.testing.assert_close(*results, atol=1e-5, rtol=0)


def test_the_structures_are_those_of_the_source(tmp_path):
    """A field that Python and C place differently would be read as another."""
    names = {"Network": native.Network, "Rows": native.Rows, "Loss": native.Loss, "State": native.State}
    names |= {"Coefficients": native.Coefficients, "Input": native.Input, "Group": native.Group}
    lines = ['#include "mlp.c"', "#include <stddef.h>", "#include <stdio.h>", "int main(void) {"]
    expected = []
    for name, structure in names.items():
        for field, *_ in structure._fields_:
            lines.append(f'  printf("%zu\\n", offsetof({name}, {field}));')
            expected.append(getattr(structure, field).offset)
        lines.append(f'  printf("%zu\\n", sizeof({name}));')
        expected.append(ctypes.sizeof(structure))
    (tmp_path / "offsets.c").write_text("\n".join([*lines, "}"]))
    command = [os.environ.get("CC", "cc"), "-std=gnu11", "-march=native", f"-I{SOURCES}", str(tmp_path / "offsets.c")]
    subprocess.run([*command, "-o", str(tmp_path / "offsets"), "-lpthread", "-lm"], check=True)
    printed = subprocess.run([str(tmp_path / "offsets")], capture_output=True, text=True, check=True).stdout
    assert [int(x) for x in printed.split()] == expected


def test_the_update_runs_under_sanitisers(tmp_path):
    program = tmp_path / "program"
    flags = ["-g", "-O1", "-std=gnu11", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).parent / "native_mlp_program.c"
    command = [os.environ.get("CC", "cc"), *flags, f"-I{SOURCES}", "-o", str(program), str(source), "-lpthread", "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
