"""The learning rate that follows the KL of each minibatch, against its definition."""

import functools
import itertools
import math

import pytest
import torch

from fastppo import Config, Trainer, resume
from fastppo.analysis.verify_resume import run_hashes
from fastppo.config import fill_defaults, parse_adaptive_rate
from fastppo.errors import ConfigError
from fastppo.functional.adaptation import Adaptation, adapted_learning_rate
from fastppo.functional.losses import PPOLoss
from fastppo.ppo.update_step import Gradient
from fastppo.runtime.graphs import GraphPool
from tests.faults.test_resume import interrupted, rows_of
from tests.test_update import B, coefficients, logprobs_now, make_batch, make_policy, make_update
from tests.worlds import short

START, LOWEST, HIGHEST, TARGET = 3e-4, 1e-4, 1e-3, 0.01
EXACT_KL = PPOLoss.diagnostics.index("exact_kl")


def by_definition(rate, kl, lowest=LOWEST, highest=HIGHEST):
    if kl > 2 * TARGET:
        return max(lowest, rate / 1.5)
    if 0 < kl < TARGET / 2:
        return min(highest, rate * 1.5)
    return rate


def adaptive_update(policy, start=START, lowest=LOWEST, highest=HIGHEST, **changes):
    rule = functools.partial(adapted_learning_rate, target=TARGET, lowest=lowest, highest=highest)
    return make_update(policy, adaptive_rate=Adaptation(start, rule), **changes)


def learn(update, batch, kl_limit=math.inf, watch=False):
    update.prepare(B, kl_limit)
    return update.run(batch, coefficients()._replace(**update.adapted), watch=watch)


def fresh_batch(policy, seed=1):
    """Return a batch of the policy as it is, so that the first KL of an update is 0."""
    batch = make_batch(policy, seed)
    return batch._replace(logprobs=logprobs_now(policy, batch))


def test_the_rate_follows_the_kl_by_its_definition():
    rate, expected = torch.tensor(START), START
    kls = [0.0, 0.0201, 0.0199, 0.0051, 0.0049, 1e-9, -1e-9, math.nan, math.inf, *[0.001] * 9, *[1.0] * 9]
    seen = set()
    for kl in kls:
        expected = by_definition(expected, kl)
        rate = adapted_learning_rate(rate, torch.tensor(kl), TARGET, LOWEST, HIGHEST)
        assert rate.item() == pytest.approx(expected), kl
        seen.add(round(expected, 7))
    assert {LOWEST, HIGHEST, START} <= seen


@pytest.mark.parametrize(("kl_stop", "limit"), [("epoch", math.inf), ("epoch", 0.02), ("minibatch", 0.02)])
def test_each_step_takes_the_rate_that_its_minibatch_gives(kl_stop, limit):
    """Made-up KLs: the first of an update counts as 0; the one that stops it counts, and those after it don't."""
    kls = [0.004, 0.001, 0.015, 0.001, 0.019, 0.03, 0.06, 0.001, 0.002, 0.03, 0.05, 0.001, 0.001, 0.03, 0.001, 0.001]
    found = []
    for watch in (True, False):
        policy = make_policy()
        update = adaptive_update(policy, n_minibatches=4, update_epochs=4, kl_stop=kl_stop)
        given, rates, inner = iter(kls), [], update._step.gradient

        def made_up(*arguments, given=given, inner=inner):
            gradient, kl = inner(*arguments), next(given)
            figures = gradient.diagnostics.clone()
            figures[EXACT_KL] = figures[PPOLoss.diagnostics.index("approx_kl")] = kl
            return Gradient(gradient.flat, figures, gradient.n_rows)

        take = functools.partial(update._step._update, gradient_fn=made_up)

        def step(state, *rest, update=update, take=take, rates=rates):
            ended = state.kl_limit == -math.inf
            take(state, *rest)
            rates.append((update.adapted["learning_rate"].item(), bool(ended)))

        update._step._take = step
        report = dict(zip(update.report_names, learn(update, make_batch(policy), limit, watch).tolist(), strict=True))
        expected, rate = [], START
        for i, ((_, ended), kl) in enumerate(zip(rates, kls, strict=False)):
            rate = rate if i == 0 or ended else by_definition(rate, kl)
            expected.append(rate)
        assert [rate for rate, _ in rates] == pytest.approx(expected)
        assert report["learning_rate"] == pytest.approx(rate)
        assert report["stopped"] == (limit < math.inf)
        assert len(set(expected)) > 3
        found.append((rate, update.parameters.vector))
    assert found[0][0] == found[1][0]
    assert torch.equal(found[0][1], found[1][1])


def test_the_step_after_a_kl_has_the_new_rate():
    """Adam's first step moves every parameter by the rate, so that a step with the old rate would show."""
    policy = make_policy()
    batch = make_batch(policy)  # exact KL 0 in the first minibatch, above 0 in the second
    update = adaptive_update(policy, n_minibatches=2, update_epochs=1)
    moved, inner = [], update._step._take

    def step(*arguments):
        before = update.parameters.vector.clone()
        for tensor in update.state.optimizer[:2]:
            tensor.zero_()
        for tensor in update.state.optimizer[2:]:
            tensor.fill_(1.0)
        inner(*arguments)
        moved.append((update.parameters.vector - before).abs().max().item())

    update._step._take = step
    learn(update, batch)
    assert moved == pytest.approx([START, 1.5 * START], rel=0.02)


def test_a_skipped_first_minibatch_does_not_raise_the_rate():
    policy = make_policy()
    batch = fresh_batch(policy)
    batch = batch._replace(params=batch.params + 1e-4 * torch.randn(batch.params.shape))  # stands for rounding
    update = adaptive_update(policy, n_minibatches=2, update_epochs=1)
    update.prepare(B, math.inf)
    batch.returns[update.shuffle.orders[0, 0, 0]] = torch.inf
    update.run(batch, coefficients()._replace(**update.adapted), watch=False)
    assert update.adapted["learning_rate"].item() == pytest.approx(START), "no step was taken: the KL is rounding"


def test_compiled_and_captured_updates_match_eager_ones():
    results = {}
    for how in ("eager", "captured", "compiled"):
        policy = make_policy()
        batch = fresh_batch(policy)
        update = adaptive_update(policy, start=0.02, highest=0.05)
        coefs = coefficients()._replace(**update.adapted)
        if how == "compiled":
            update.compile(batch, coefs)
        if how == "captured":
            update.prepare(B, math.inf)
            update.begin(batch)
            update.capture(coefs, GraphPool(torch.device("cpu")))
            update.shuffle.generator.manual_seed(5)
        assert coefs.learning_rate.item() == pytest.approx(0.02), "neither changes the rate"
        results[how] = [learn(update, batch)[update.report_names.index("learning_rate")].item() for _ in range(3)]
        results[how].append(update.parameters.vector.norm().item())
    assert len(set(results["eager"][:3])) > 1
    for how in results:
        assert results[how] == pytest.approx(results["eager"], rel=1e-4)


RUN = {"env_id": "CartPole-v1", "n_envs": 4, "n_steps": 16, "total_timesteps": 4 * 16 * 8, "update_epochs": 3}
RUN |= {"learning_rate": "adaptive:1e-3:1e-4:1e-1", "adaptive_kl": 0.005, "threads": 1}


def test_a_run_logs_its_rate_and_resumes_it_bit_for_bit(tmp_path):
    Trainer(short(tmp_path, **RUN, run_dir=tmp_path / "whole")).run()
    rows = rows_of(tmp_path / "whole")
    rates = [row["charts/learning_rate"] for row in rows]
    assert len(set(rates)) > 2
    assert "charts/kl_coef" not in rows[0]
    powers = [math.log(b / a) / math.log(1.5) for a, b in itertools.pairwise([1e-3, *rates])]
    assert all(abs(x - round(x)) < 1e-3 for x in powers), "no bound is reached"
    interrupted(short(tmp_path, **RUN, run_dir=tmp_path / "parted"), 4)
    resumed = resume(tmp_path / "parted")
    rule = resumed.update._step._update.keywords["adapt_rate"]
    assert rule(torch.tensor(0.01), torch.tensor(0.004)).item() == pytest.approx(0.01), (
        "between half of 0.005 and twice"
    )
    assert rule(torch.tensor(0.01), torch.tensor(0.0101)).item() == pytest.approx(0.01 / 1.5)
    assert resumed.update.adapted["learning_rate"].item() == rates[3]
    resumed.run()
    assert run_hashes(tmp_path / "whole") == run_hashes(tmp_path / "parted")
    assert rows_of(tmp_path / "parted") == rows


def test_captured_training_matches_eager_training(tmp_path):
    logged = {}
    for how in ("off", "graph"):
        settings = RUN | {"vectorization": "tensor", "n_steps": 4, "total_timesteps": 4 * 4 * 6, "compile": how}
        trainer = Trainer(short(tmp_path, **settings, run_dir=tmp_path / how))
        logged[how] = [stats.scalars["charts/learning_rate"] for stats in trainer.iterations()]
        logged[how].append(trainer.update.parameters.vector.norm().item())
    assert logged["graph"] == pytest.approx(logged["off"], rel=1e-4)
    assert len(set(logged["off"])) > 2


def test_settings():
    assert parse_adaptive_rate("adaptive:3e-4:1e-5:1e-2") == (3e-4, 1e-5, 1e-2)
    assert parse_adaptive_rate("linear:1:0") is parse_adaptive_rate(1e-3) is parse_adaptive_rate(None) is None
    filled = fill_defaults(Config(learning_rate="adaptive:3e-4:1e-5:1e-2"), "discrete")
    assert filled.anneal_lr is False
    assert fill_defaults(filled, "discrete") == filled
    for wrong in (
        "adaptive",
        "adaptive:1:2",
        "adaptive:1:2:3:4",
        "adaptive:x:1:2",
        "adaptive:1e-3:0:1",
        "adaptive:nan:1:2",
    ):
        with pytest.raises(ConfigError, match="must be adaptive:START:LOWEST:HIGHEST"):
            Config(learning_rate=wrong)
    with pytest.raises(ConfigError, match="the KL is always 0"):
        Config(learning_rate="adaptive:3e-4:1e-5:1e-2", update_epochs=1, n_minibatches=1)
