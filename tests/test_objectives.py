"""PPO-Penalty: updates against autograd with torch.distributions, and the weight of the penalty by its definition."""

import copy
import functools
import itertools
import math

import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import distributions as td

from fastppo import Trainer, resume
from fastppo.analysis.verify_resume import run_hashes
from fastppo.functional.adam import adam
from fastppo.functional.adaptation import Adaptation, adapted_kl_coef
from fastppo.functional.distributions import Bernoulli, Categorical, Gaussian, MultiCategorical
from fastppo.functional.losses import Batch, PPOLoss
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.policy import FORBIDDEN, Policy
from fastppo.ppo.update import PPOUpdate
from fastppo.resume_run import continue_run
from fastppo.runtime.graphs import GraphPool
from fastppo.spaces.observations import ObsSpec
from fastppo.spaces.packing import leaves_of, mask_leaf
from tests.faults.test_resume import interrupted, rows_of
from tests.functional.test_distributions import theirs
from tests.test_update import coefficients, logprobs_now, make_shuffle
from tests.worlds import short

B, D, EPOCHS, PARTS = 128, 3, 2, 4
DISTRIBUTIONS = {
    "categorical": Categorical(4),
    "several": MultiCategorical((2, 3)),
    "bits": Bernoulli(3),
    "gaussian": Gaussian(2),
    "masked": Categorical(5),
    "several, masked": MultiCategorical((3, 4)),
}
OBJECTIVES = ("clip", "penalty", "clip_and_penalty")
TARGET, START = 0.01, 0.7


def make_policy(kind, seed=0):
    """Return a policy whose choices are far from uniform; other seeds have other weights."""
    dist = DISTRIBUTIONS[kind]
    leaves = leaves_of(spaces.Box(-9, 9, (D,), np.float32), mask=mask_leaf("info", dist.n_params))
    spec = ObsSpec(leaves) if "masked" in kind else ObsSpec.single("vector", (D,), "float32")
    torch.manual_seed(0)
    net = MLP(D, dist.n_params, free_std=kind == "gaussian", hidden_sizes=(16,), activation="tanh", shared_trunk=False)
    with torch.no_grad():
        net.actor.linear.weight.normal_(0, 0.5)
        for p in net.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(seed)))
    return Policy(Encoder(spec), net, dist)


def make_batch(kind, policy, valid=None):
    """Return rows of an older policy, so that KL and ratios differ from 0 and 1, and the arrays of the observations."""
    g = torch.Generator().manual_seed(1)
    arrays = (torch.randn(B, D, generator=g),)
    if "masked" in kind:
        mask = torch.rand(B, policy.distribution.n_params, generator=g) < 0.6
        mask[:, [0, -1]] = True
        arrays += (mask,)
    obs = policy.encoder.spec.pack(arrays) if "masked" in kind else arrays[0]
    old = make_policy(kind, seed=1)
    action = old.act(obs, old.draw_noise(B, g))
    advantages, returns = torch.randn(B, generator=g), torch.randn(B, generator=g)
    batch = Batch(obs, action.actions, action.logprobs, action.params, action.values, advantages, returns, valid)
    return batch, arrays


def make_update(policy, objective, **changes):
    shuffle = make_shuffle(changes.pop("update_epochs", EPOCHS), changes.pop("n_minibatches", PARTS))
    settings = {"normalize": "off", "kl_stop": "epoch"} | changes
    rule = functools.partial(adapted_kl_coef, target=TARGET)
    adaptive = Adaptation(START, rule) if objective != "clip" else None
    return PPOUpdate(
        policy,
        FlatParameters(policy.network),
        PPOLoss("off", objective),
        adam(1e-5),
        shuffle,
        adaptive_kl_coef=adaptive,
        **settings,
    )


def learn(update, batch, kl_limit=math.inf, watch=False, **coefs):
    update.prepare(len(batch.logprobs), kl_limit)
    return update.run(batch, coefficients(**coefs)._replace(**update.adapted), watch=watch)


def log_prob_and_kl(dist, old, new, actions):
    """Return log pi_new(actions) and KL(old || new), [B] each, by torch.distributions."""
    parts = list(zip(theirs(dist, old), theirs(dist, new), strict=True))
    columns = actions.reshape(len(actions), -1).unbind(1)
    log_prob = sum(q.log_prob(a.to(new.dtype)) for (_, q), a in zip(parts, columns, strict=True))
    return log_prob, sum(td.kl_divergence(p, q) for p, q in parts)


def reference(network, dist, batch, arrays, orders, objective, beta):
    """Update `network` in place, one Adam step per minibatch, and return the KL of each before its step."""
    optimizer, kls = torch.optim.Adam(network.parameters(), lr=1e-3, eps=1e-5), []
    for rows in orders.flatten(0, 1):
        new, values = network(arrays[0][rows])
        if len(arrays) == 2:
            new = torch.where(arrays[1][rows], new, -1e30)
        old = torch.where(batch.params[rows] == FORBIDDEN, -1e30, batch.params[rows])
        log_prob, kl = log_prob_and_kl(dist, old, new, batch.actions[rows])
        entropy = sum(part.entropy() for part in theirs(dist, new))
        ratio, advantages = (log_prob - batch.logprobs[rows]).exp(), batch.advantages[rows]
        surrogate = ratio * advantages
        if objective != "penalty":
            surrogate = torch.min(surrogate, ratio.clamp(0.8, 1.2) * advantages)
        critic = 0.7 * 0.5 * (values - batch.returns[rows]).square()
        per_row = critic - surrogate - 0.01 * entropy
        if objective != "clip":
            per_row = per_row + beta * kl
        kept = slice(None) if batch.valid is None else batch.valid[rows]
        optimizer.zero_grad()
        per_row[kept].mean().backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 0.5)
        optimizer.step()
        kls.append(kl[kept].mean().item())
    return kls


def vector(network):
    return torch.nn.utils.parameters_to_vector(network.parameters()).detach()


@pytest.mark.parametrize("kind", DISTRIBUTIONS)
@pytest.mark.parametrize("objective", OBJECTIVES)
def test_an_update_matches_plain_autograd(objective, kind):
    policy = make_policy(kind)
    twin, other = copy.deepcopy(policy.network), copy.deepcopy(policy.network)
    batch, arrays = make_batch(kind, policy)
    update = make_update(policy, objective)
    report = dict(zip(update.report_names, learn(update, batch).tolist(), strict=True))
    kls = reference(twin, policy.distribution, batch, arrays, update.shuffle.orders, objective, START)
    torch.testing.assert_close(vector(policy.network), vector(twin), atol=1e-5, rtol=0)
    assert report["exact_kl"] == pytest.approx(np.mean(kls), rel=1e-4)
    assert min(kls) > TARGET, "the KL must matter"
    if objective != "clip":
        reference(other, policy.distribution, batch, arrays, update.shuffle.orders, objective, 1.1 * START)
        assert (vector(other) - vector(twin)).abs().max() > 1e-4, "another weight must give another update"
        assert report["kl_coef"] == pytest.approx(START), "the report has the weight of this update"
        assert update.adapted["kl_coef"].item() == pytest.approx(2 * START)
    else:
        assert update.adapted == {}
        assert "kl_coef" not in report


def test_filler_rows_do_not_count():
    policy, valid = make_policy("gaussian"), torch.arange(B) % 3 > 0
    twin = copy.deepcopy(policy.network)
    batch, arrays = make_batch("gaussian", policy, valid)
    update = make_update(policy, "penalty")
    learn(update, batch)
    reference(twin, policy.distribution, batch, arrays, update.shuffle.orders, "penalty", START)
    torch.testing.assert_close(vector(policy.network), vector(twin), atol=1e-5, rtol=0)


def test_only_a_penalty_takes_the_gradient_of_the_kl():
    for objective in OBJECTIVES:
        policy = make_policy("gaussian")
        batch, _ = make_batch("gaussian", policy)
        output = policy(batch.obs)
        penalized = PPOLoss("off", objective).penalizes_kl
        current = policy.evaluate_actions(output, batch.actions, batch.params, kl_gradient=penalized)
        assert current.exact_kl.requires_grad is penalized is (objective != "clip")


@pytest.mark.parametrize("kind", ["masked", "several, masked"])
def test_a_huge_weight_times_the_kl_of_forbidden_actions_stays_finite(kind):
    policy = make_policy(kind)
    batch, (_, mask) = make_batch(kind, policy)
    assert not mask.all()
    # an old policy that is certain: all other probabilities are 0
    certain = torch.where(mask, 300 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(2)), FORBIDDEN)
    update = make_update(policy, "penalty")
    update.adapted["kl_coef"].fill_(1e4)
    update.prepare(B, math.inf)
    gradient = update.gradient(batch._replace(params=certain), coefficients()._replace(**update.adapted))
    assert gradient.isfinite().all()
    assert gradient.abs().max() > 0
    old = torch.tensor([[0.0, 1.0, -math.inf]])
    new = torch.tensor([[1.0, 0.0, -math.inf]], requires_grad=True)
    kl = 1e4 * Categorical(3).kl(old, new).sum()
    (slope,) = torch.autograd.grad(kl, new)
    assert kl.isfinite()
    assert slope.isfinite().all()
    assert slope[0, 2] == 0


def test_the_weight_follows_the_kl_by_its_definition():
    beta, expected = torch.tensor(1.0), 1.0
    kls = [0.0, 0.0066, 0.0067, 0.0149, 0.0151, 0.5, math.inf, math.nan, 0.01, *[0.0] * 30, *[1.0] * 40]
    for kl in kls:
        if kl < TARGET / 1.5:
            expected /= 2
        elif kl > 1.5 * TARGET:
            expected *= 2
        expected = min(max(expected, 1e-4), 1e4)
        beta = adapted_kl_coef(beta, torch.tensor(kl), TARGET)
        assert beta.item() == pytest.approx(expected), kl
    assert beta.item() == 1e4


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
@pytest.mark.parametrize("limit", [math.inf, 0.02])
def test_the_weight_follows_the_mean_kl_of_the_last_epoch_up_to_the_stop(kl_stop, limit):
    """With and without leaving the loop early: the KL that stopped the update counts, what follows doesn't."""
    found = []
    for watch in (True, False):
        policy = make_policy("gaussian")
        batch, _ = make_batch("gaussian", policy)
        batch = batch._replace(params=policy(batch.obs).params.detach(), logprobs=logprobs_now(policy, batch))
        update = make_update(policy, "penalty", update_epochs=6, kl_stop=kl_stop)
        kls, inner = [], update._step.gradient.__call__

        def spy(*arguments, kls=kls, inner=inner, update=update):
            gradient = inner(*arguments)
            if update.state.kl_limit != -math.inf:
                kls.append(gradient.diagnostics[PPOLoss.diagnostics.index("exact_kl")].item())
            return gradient

        update._step._take = functools.partial(update._step._update, gradient_fn=spy)
        report = dict(zip(update.report_names, learn(update, batch, limit, watch, learning_rate=0.02), strict=True))
        expected = np.mean(kls[(len(kls) - 1) // PARTS * PARTS :])
        assert report["stopped"] == (limit < math.inf)
        assert update._last_kl.item() == pytest.approx(expected, rel=1e-4)
        assert expected > 1.5 * TARGET
        assert update.adapted["kl_coef"].item() == pytest.approx(2 * START)
        found.append([update.parameters.vector, update._last_kl, *update.adapted.values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def three_updates(how, objective, kind):
    """Return the reports of three updates, then the parameters and the weight of the penalty."""
    policy = make_policy(kind)
    batch, _ = make_batch(kind, policy)
    update = make_update(policy, objective)
    coefs = coefficients()._replace(**update.adapted)
    if how == "compiled":
        update.compile(batch, coefs)
    if how == "captured":
        update.prepare(B, math.inf)
        update.begin(batch)
        update.capture(coefs, GraphPool(torch.device("cpu")))
        update.shuffle.generator.manual_seed(5)
    weights = [weight.item() for weight in update.adapted.values()]
    assert weights == ([] if objective == "clip" else [pytest.approx(START)]), "neither changes the weight"
    reports = [learn(update, batch) for _ in range(3)]
    return [*reports, update.parameters.vector.clone(), *(weight.clone() for weight in update.adapted.values())]


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("kind", DISTRIBUTIONS)
def test_captured_updates_match_eager_ones(kind, objective):
    found, expected = (three_updates(how, objective, kind) for how in ("captured", "eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert objective == "clip" or expected[-1].item() == pytest.approx(8 * START)


@pytest.mark.parametrize(
    ("kind", "objective"),
    [
        pytest.param(kind, objective, marks=() if kind == "several, masked" else pytest.mark.slow)
        for kind, objective in zip(DISTRIBUTIONS, itertools.cycle(OBJECTIVES))
    ],
)
def test_compiled_updates_match_eager_ones(kind, objective):
    found, expected = (three_updates(how, objective, kind) for how in ("compiled", "eager"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


RUN = {"env_id": "CartPole-v1", "n_envs": 4, "n_steps": 16, "total_timesteps": 4 * 16 * 8, "learning_rate": 0.01}
RUN |= {"objective": "penalty", "penalty_kl": 0.005, "update_epochs": 3, "threads": 1}


def test_a_run_logs_its_weight_and_resumes_it_bit_for_bit(tmp_path):
    whole = short(tmp_path, **RUN, run_dir=tmp_path / "whole")
    Trainer(whole).run()
    rows = rows_of(tmp_path / "whole")
    weights = [row["charts/kl_coef"] for row in rows]
    assert weights[0] == 1
    assert len(set(weights)) > 2
    assert all(b / a in (0.5, 1, 2) for a, b in itertools.pairwise(weights))
    config = short(tmp_path, **RUN, run_dir=tmp_path / "parted")
    interrupted(config, 4)
    resumed = resume(tmp_path / "parted")
    assert resumed.update.adapted["kl_coef"].item() == weights[4] != 1
    resumed.run()
    assert run_hashes(tmp_path / "whole") == run_hashes(tmp_path / "parted")
    assert rows_of(tmp_path / "parted") == rows


def test_settings_of_the_penalty(tmp_path):
    changes = {"kl_coef": 3.0, "penalty_kl": 0.2, "learning_rate": "adaptive:1e-3:1e-4:1e-2", "adaptive_kl": 0.4}
    update = Trainer(short(tmp_path, **RUN | changes)).update
    assert update.adapted["kl_coef"].item() == 3
    kls = {0.13: 0.5, 0.14: 1.0, 0.29: 1.0, 0.31: 2.0}
    assert {kl: update._adaptive_kl_coef.rule(torch.tensor(1.0), torch.tensor(kl)).item() for kl in kls} == kls


@pytest.mark.parametrize("before", ["clip", "penalty"])
def test_the_weight_outlives_its_environments_and_starts_where_there_was_none(tmp_path, before):
    interrupted(short(tmp_path, **RUN | ({} if before == "penalty" else {"objective": "clip", "penalty_kl": 0.01})), 4)
    changed = short(tmp_path, **RUN | {"n_envs": 2, "resume": "auto"})
    trainer = continue_run(changed, changed.run_dir)
    assert any("start new episodes" in note for note in trainer.notes)
    weight = trainer.update.adapted["kl_coef"].item()
    assert weight == 1 if before == "clip" else weight not in (0, 1)
    trainer.run()


def test_a_resumed_run_may_leave_the_penalty(tmp_path):
    interrupted(short(tmp_path, **RUN | {"kl_coef": 3.0}), 4)
    changed = short(tmp_path, **RUN | {"objective": "clip", "penalty_kl": 0.01, "resume": "auto"})
    trainer = continue_run(changed, changed.run_dir)
    assert any("objective was penalty, is clip" in note for note in trainer.notes)
    trainer.run()


def test_a_kl_that_is_not_a_number_does_not_count():
    policy = make_policy("gaussian")
    batch, _ = make_batch("gaussian", policy)
    batch = batch._replace(params=policy(batch.obs).params.detach(), logprobs=logprobs_now(policy, batch))
    update = make_update(policy, "penalty", update_epochs=1)
    index, inner = PPOLoss.diagnostics.index("exact_kl"), update._step.gradient.__call__
    kls = [math.nan, 0.25, 0.5, 0.75]
    assert len(kls) == PARTS
    left = iter(kls)

    def made_up(*arguments):
        gradient = inner(*arguments)
        return gradient._replace(diagnostics=gradient.diagnostics.index_fill(0, torch.tensor(index), next(left)))

    update._step._take = functools.partial(update._step._update, gradient_fn=made_up)
    learn(update, batch)
    assert update._last_kl.item() == pytest.approx(0.5)
    assert update.adapted["kl_coef"].item() == pytest.approx(2 * START)
    left = iter([math.nan] * PARTS)  # an update that measures no KL changes nothing, whatever the one before measured
    learn(update, batch)
    assert update.adapted["kl_coef"].item() == pytest.approx(2 * START)


def test_captured_training_matches_eager_training(tmp_path):
    logged = {}
    for how in ("off", "graph"):
        settings = RUN | {"vectorization": "tensor", "n_steps": 4, "total_timesteps": 4 * 4 * 6, "compile": how}
        trainer = Trainer(short(tmp_path, **settings, run_dir=tmp_path / how))
        logged[how] = [stats.scalars["charts/kl_coef"] for stats in trainer.iterations()]
        logged[how].append(trainer.update.parameters.vector.norm().item())
    assert logged["graph"] == pytest.approx(logged["off"], rel=1e-4)
    assert len(set(logged["off"])) > 2
