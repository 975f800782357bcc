"""PPOUpdate against two reference implementations, the KL early stop, and compilation."""

import copy
import math

import numpy as np
import pytest
import torch

from fastppo.functional.adam import adam
from fastppo.functional.distributions import Categorical
from fastppo.functional.losses import Batch, Coefficients, PPOLoss
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.policy import Policy
from fastppo.ppo.minibatches import BatchLayout, Minibatch, Shuffle, sequence_rows
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime import compile as compiling
from fastppo.spaces.observations import ObsSpec
from tests.reference.ppo import reference_update

B, D, A = 256, 4, 3
SETTINGS = {"lr": 1e-3, "clip": 0.2, "vf_coef": 0.7, "ent_coef": 0.01, "max_grad_norm": 0.5}


def coefficients(**changes):
    values = {
        "learning_rate": 1e-3,
        "clip_coef": 0.2,
        "value_clip_coef": 0.2,
        "vf_coef": 0.7,
        "ent_coef": 0.01,
        "max_grad_norm": 0.5,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "kl_coef": 0.0,
    }
    return Coefficients(*(torch.tensor(float(v)) for v in (values | changes).values()))


def make_policy(seed=0):
    torch.manual_seed(seed)
    net = MLP(D, A, free_std=False, hidden_sizes=(64, 64), activation="tanh", shared_trunk=False)
    return Policy(Encoder(ObsSpec.single("vector", (D,), "float32")), net, Categorical(A))


def make_batch(policy, seed=1, rows=B, valid=None):
    g = torch.Generator().manual_seed(seed)
    obs = torch.randn(rows, D, generator=g)
    noise = torch.empty(rows, A)
    policy.distribution.fill_noise(noise, g)
    action = policy.act(obs, noise)
    # perturb the old log-probabilities so that ratios differ from 1 and some rows are clipped
    logprobs = action.logprobs + 0.15 * torch.randn(rows, generator=g)
    advantages, returns = torch.randn(rows, generator=g), 2 * torch.randn(rows, generator=g)
    return Batch(obs, action.actions, logprobs, action.params, action.values, advantages, returns, valid)


def make_shuffle(update_epochs, n_minibatches):
    generator = torch.Generator().manual_seed(5)
    return Shuffle(generator, torch.device("cpu"), update_epochs=update_epochs, n_minibatches=n_minibatches)


def make_update(policy, **changes):
    loss, optimizer = PPOLoss(changes.pop("value_clip", "max")), changes.pop("optimizer", adam(1e-5))
    shuffle = make_shuffle(changes.pop("update_epochs", 2), changes.pop("n_minibatches", 4))
    settings = {"normalize": "minibatch", "kl_stop": "epoch"} | changes
    return PPOUpdate(policy, FlatParameters(policy.network), loss, optimizer, shuffle, **settings)


def learn(update, batch, coefs, kl_limit, watch=True):
    """Run one update and return its report."""
    update.prepare(len(batch.logprobs), kl_limit)
    return update.run(batch, coefs, watch=watch and kl_limit != math.inf)


def logprobs_now(policy, batch):
    """Return the log-probabilities of the batch's actions under the current policy."""
    return policy.evaluate_actions(policy(batch.obs), batch.actions, batch.params).logprobs.detach()


REPORT = (*PPOLoss.diagnostics, "grad_norm", "skipped_minibatches", "minibatches_run", "epochs_run", "stopped")
REPORT += ("stop_kl", "skipped_in_a_row")


def named(report):
    """Return an update's report as a dictionary."""
    return dict(zip(REPORT, report.tolist(), strict=True))


def minibatches(batch, epochs, parts):
    """Yield the minibatches that an update with generator seed 5 draws."""
    g = torch.Generator().manual_seed(5)
    for _ in range(epochs):
        for rows in torch.randperm(len(batch.obs), generator=g).view(parts, -1):
            b = batch
            yield [x[rows] for x in (b.obs, b.actions, b.logprobs, b.values, b.advantages, b.returns)]


@pytest.mark.parametrize("value_clip", ["off", "max", "clipped_only"])
@pytest.mark.parametrize("normalize", ["minibatch", "off"])
def test_an_update_matches_plain_autograd_and_torch_adam(value_clip, normalize):
    policy = make_policy()
    twin = copy.deepcopy(policy.network)
    before = torch.nn.utils.parameters_to_vector(twin.parameters()).detach().clone()
    batch = make_batch(policy)
    stats = named(
        learn(make_update(policy, value_clip=value_clip, normalize=normalize), batch, coefficients(), math.inf)
    )
    split = minibatches(batch, 2, 4)
    reference_update(twin, split, value_clip=value_clip, normalize=normalize == "minibatch", **SETTINGS)
    ours = torch.nn.utils.parameters_to_vector(policy.network.parameters())
    theirs = torch.nn.utils.parameters_to_vector(twin.parameters())
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert (theirs - before).abs().max() > 1e-3, "the reference update must move the parameters"
    assert (stats["minibatches_run"], stats["epochs_run"], stats["stopped"]) == (8, 2, 0)
    assert 0.05 < stats["clipfrac"] < 0.5


def test_an_update_matches_stable_baselines3():
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import configure

    epochs, minibatch = 3, 64
    model = sb3.PPO(
        "MlpPolicy", "CartPole-v1", n_steps=B, batch_size=minibatch, n_epochs=epochs, learning_rate=1e-3,
        clip_range=0.2, clip_range_vf=0.3, ent_coef=0.01, vf_coef=0.35, max_grad_norm=0.5, seed=0, device="cpu",
    )  # fmt: skip
    model.set_logger(configure(None, []))
    torch.manual_seed(0)
    net = MLP(4, 2, free_std=False, hidden_sizes=(64, 64), activation="tanh", shared_trunk=False)
    policy = Policy(Encoder(ObsSpec.single("vector", (4,), "float32")), net, Categorical(2))
    theirs = model.policy
    pairs = [
        (theirs.mlp_extractor.policy_net[0], net.actor_trunk[1]),
        (theirs.mlp_extractor.policy_net[2], net.actor_trunk[3]),
        (theirs.mlp_extractor.value_net[0], net.critic_trunk[1]),
        (theirs.mlp_extractor.value_net[2], net.critic_trunk[3]),
        (theirs.action_net, net.actor.linear),
        (theirs.value_net, net.critic),
    ]
    for a, b in pairs:
        a.load_state_dict(b.state_dict())

    # one rollout for both updates
    g = torch.Generator().manual_seed(3)
    obs, noise = torch.randn(B, 4, generator=g), torch.empty(B, 2)
    policy.distribution.fill_noise(noise, g)
    action = policy.act(obs, noise)
    logprobs = action.logprobs + 0.1 * torch.randn(B, generator=g)
    advantages, returns = torch.randn(B, generator=g), torch.randn(B, generator=g)
    batch = Batch(obs, action.actions, logprobs, action.params, action.values, advantages, returns, None)
    buffer = model.rollout_buffer
    buffer.reset()
    columns = {"observations": obs, "actions": action.actions, "log_probs": logprobs, "values": action.values}
    for name, column in (columns | {"advantages": advantages, "returns": returns}).items():
        array = getattr(buffer, name)
        array[:] = column.numpy().reshape(array.shape)
    buffer.full, buffer.pos = True, B

    # Stable-Baselines3 draws permutations from numpy's global generator: give both updates the same ones
    orders = [np.random.default_rng(i).permutation(B) for i in range(epochs)]
    queue = iter(orders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(np.random, "permutation", lambda n: next(queue))
        model.train()
    update = make_update(policy, update_epochs=epochs, n_minibatches=B // minibatch, value_clip="clipped_only")
    queue = iter(orders)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "randperm", lambda n, **_: torch.as_tensor(next(queue)))
        # PPOLoss halves the squared error and Stable-Baselines3 does not, so vf_coef is twice as large here
        learn(update, batch, coefficients(vf_coef=0.7, value_clip_coef=0.3), math.inf)
    for a, b in pairs:
        torch.testing.assert_close(a.weight, b.weight, atol=1e-5, rtol=0)
        torch.testing.assert_close(a.bias, b.bias, atol=1e-5, rtol=0)


def test_batch_normalisation_scales_advantages_once_per_update():
    policy = make_policy()
    twin = copy.deepcopy(policy.network)
    batch = make_batch(policy)
    learn(make_update(policy, normalize="batch"), batch, coefficients(), math.inf)
    a = batch.advantages
    scaled = batch._replace(advantages=(a - a.mean()) / (a.std() + 1e-8))
    split = minibatches(scaled, 2, 4)
    reference_update(twin, split, value_clip="max", normalize=False, **SETTINGS)
    ours = torch.nn.utils.parameters_to_vector(policy.network.parameters())
    torch.testing.assert_close(ours, torch.nn.utils.parameters_to_vector(twin.parameters()), atol=1e-5, rtol=0)


def test_filler_rows_do_not_affect_the_update():
    g = torch.Generator().manual_seed(0)
    valid = torch.rand(B, generator=g) < 0.7
    results = []
    for spoil in (0.0, 1e3):
        policy = make_policy()
        batch = make_batch(policy, valid=valid)
        noise = torch.where(valid, 0.0, spoil)
        batch = batch._replace(advantages=batch.advantages + noise, returns=batch.returns - noise)
        stats = learn(make_update(policy), batch, coefficients(), math.inf)
        results.append((torch.nn.utils.parameters_to_vector(policy.network.parameters()), stats))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])


def test_each_epoch_draws_a_new_permutation():
    policy = make_policy()
    update = make_update(policy, update_epochs=3, n_minibatches=1)
    seen = []
    inner = update._step._take
    update._step._take = lambda state, minibatch, *rest: (
        seen.append(minibatch.rows.tolist()) or inner(state, minibatch, *rest)
    )
    learn(update, make_batch(policy), coefficients(), math.inf)
    assert len({tuple(rows) for rows in seen}) == 3
    assert all(sorted(rows) == list(range(B)) for rows in seen)


@pytest.mark.parametrize("watch", [True, False])
@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_a_large_kl_stops_the_update_and_means_cover_only_its_steps(kl_stop, watch):
    policy = make_policy()
    batch = make_batch(policy)
    batch = batch._replace(logprobs=logprobs_now(policy, batch))
    update = make_update(policy, update_epochs=10, kl_stop=kl_stop)
    steps, ran = [], []
    inner = update._step._take

    def spy(*arguments):
        before = update.parameters.vector.clone()
        inner(*arguments)
        ran.append(1)
        if not torch.equal(before, update.parameters.vector):
            steps.append(update.state.sums[REPORT.index("grad_norm")].item())

    update._step._take = spy
    update.prepare(B, 0.02)
    stats = named(update.run(batch, coefficients(learning_rate=0.1), watch=watch))
    assert stats["epochs_run"] <= 2
    assert stats["stopped"] == 1
    assert stats["stop_kl"] > 0.02
    assert stats["minibatches_run"] == len(steps) < 40
    assert stats["grad_norm"] == pytest.approx(steps[-1] / len(steps), rel=1e-5)
    if not watch:
        assert len(ran) == 40, "without watch every minibatch runs, and those after the stop change nothing"
    elif kl_stop == "minibatch":
        assert len(ran) == len(steps) + 1, "the KL of a minibatch is checked before its step"
    if kl_stop == "epoch":
        assert stats["minibatches_run"] == 4 * stats["epochs_run"], "the KL is checked once per epoch"


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_watch_does_not_change_the_result(kl_stop):
    results = []
    for watch in (True, False):
        policy = make_policy()
        update = make_update(policy, update_epochs=10, kl_stop=kl_stop)
        reports = []
        for i in range(3):
            batch = make_batch(policy, seed=i)
            batch = batch._replace(logprobs=logprobs_now(policy, batch))
            update.prepare(B, (0.02, math.inf, 0.005)[i])
            reports.append(update.run(batch, coefficients(learning_rate=0.1), watch=watch and i != 1))
        results.append([*reports, update.parameters.vector, *update.state.optimizer])
    assert [r[REPORT.index("stopped")] for r in results[0][:3]] == [1, 0, 1]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_a_nan_kl_stops_the_update(kl_stop):
    policy = make_policy()
    batch = make_batch(policy)
    batch = batch._replace(logprobs=torch.full_like(batch.logprobs, torch.nan))
    before = copy.deepcopy(policy.network.state_dict())
    stats = named(learn(make_update(policy, update_epochs=5, kl_stop=kl_stop), batch, coefficients(), 0.02))
    assert (stats["epochs_run"], stats["stopped"]) == (1, 1)
    assert math.isnan(stats["stop_kl"])
    assert stats["minibatches_run"] == (0 if kl_stop == "minibatch" else 4)
    assert all(torch.equal(v, before[k]) for k, v in policy.network.state_dict().items())
    assert math.isnan(stats["policy_loss"]), "no step was taken, so there is no mean"


def test_a_minibatch_with_a_non_finite_gradient_is_skipped():
    results = []
    for spoil in (False, True):
        policy = make_policy()
        batch = make_batch(policy)
        if spoil:
            batch.returns[torch.randperm(B, generator=torch.Generator().manual_seed(5))[-1]] = torch.inf
        report = learn(make_update(policy, update_epochs=1), batch, coefficients(), math.inf)
        results.append((report, policy.network.state_dict()))
    (whole, _), (partial, weights) = results
    assert (named(whole)["skipped_minibatches"], named(partial)["skipped_minibatches"]) == (0, 1)
    assert partial.isfinite().all()
    assert all(x.isfinite().all() for x in weights.values())


def test_a_high_kl_limit_does_not_stop_the_update():
    policy = make_policy()
    stats = named(
        learn(make_update(policy, update_epochs=3), make_batch(policy), coefficients(learning_rate=1e-4), 10.0)
    )
    assert (stats["epochs_run"], stats["minibatches_run"], stats["stopped"]) == (3, 12, 0)


def test_a_zero_learning_rate_leaves_the_parameters_unchanged():
    policy = make_policy()
    before = copy.deepcopy(policy.network.state_dict())
    learn(make_update(policy), make_batch(policy), coefficients(learning_rate=0.0, clip_coef=0.0), math.inf)
    assert all(torch.equal(v, before[k]) for k, v in policy.network.state_dict().items())


def small_network(kind):
    class Small(torch.nn.Module):
        """A custom network, as a user would write it."""

        def __init__(self):
            super().__init__()
            self.body = torch.nn.LSTM(D, 8) if kind == "lstm" else torch.nn.Linear(D, 8)
            self.head, self.critic = torch.nn.Linear(8, A), torch.nn.Linear(8, 1)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            if kind == "counting":
                self.calls += 1
            x = self.body(x)[0] if kind == "lstm" else self.body(x).relu()
            return self.head(x), self.critic(x).squeeze(-1)

    torch.manual_seed(0)
    return Policy(Encoder(ObsSpec.single("vector", (D,), "float32")), Small(), Categorical(A))


def test_a_compiled_update_matches_eager_and_compiles_once():
    """With a user's own network; MLPs in test_objectives.py, test_adaptive_rate.py and test_rnd.py."""
    results = []
    for compiled in (False, True):
        policy = small_network("own")
        batch = make_batch(policy)
        update = make_update(policy, kl_stop="minibatch")
        before = update.parameters.vector.clone()
        if compiled:
            update.compile(batch, coefficients())
            assert torch.equal(update.parameters.vector, before), "compile() takes no step"
            count = compiling.compilations
        for i in range(3):  # with schedules, and a KL limit that stops the last update
            coefs = coefficients(learning_rate=1e-3 / (i + 1), clip_coef=0.2 / (i + 1))
            stats = learn(update, batch, coefs, (math.inf, 1.0, 1e-4)[i])
        results.append((update.parameters.vector.clone(), stats))
    assert compiling.compilations == count
    (eager, a), (fast, b) = results
    torch.testing.assert_close(fast, eager, atol=1e-5, rtol=0)
    torch.testing.assert_close(b, a, atol=1e-4, rtol=1e-4, equal_nan=True)
    assert named(a)["minibatches_run"] == named(b)["minibatches_run"]
    assert (eager - before).abs().max() > 1e-3


@pytest.mark.parametrize(("kind", "reason"), [("lstm", "LSTM .body. is one opaque"), ("counting", "the buffer calls")])
def test_a_compile_error_names_the_unsupported_part(kind, reason):
    policy = small_network(kind)
    with pytest.raises(compiling.CompileError, match=reason):
        make_update(policy).compile(make_batch(policy), coefficients())


def test_a_compile_error_names_the_missing_compiler(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    policy = make_policy()
    with pytest.raises(compiling.CompileError, match=r"there is no C\+\+ compiler \(no-such-compiler\)"):
        make_update(policy).compile(make_batch(policy), coefficients())


def test_compiled_tanh_stays_within_its_error_bound():
    x = torch.linspace(-12, 12, 200_001)
    fast = compiling.compile_graph(torch.tanh, [x])(x)
    assert (fast - x.tanh()).abs().max() < 4e-7
    assert fast.abs().max() <= 1


def test_loading_weights_writes_to_the_parameter_vector():
    policy, other = make_policy(), make_policy(seed=3)
    update = make_update(policy)
    policy.load_state_dict(other.state_dict())
    for view, theirs in zip(update.parameters.views(update.parameters.vector), other.network.parameters(), strict=True):
        assert torch.equal(view, theirs)


def test_gather_returns_the_same_rows_of_every_column():
    g = torch.Generator().manual_seed(0)
    for shape, dtype in [((65,), torch.float32), ((3, 4), torch.uint8), ((5,), torch.float32), ((), torch.int64)]:
        obs = torch.randint(0, 9, (10, *shape), generator=g).to(dtype)
        columns = [torch.randn(10, generator=g) for _ in range(4)]
        actions = torch.randint(0, 2**24, (10, 2), generator=g)
        valid = torch.rand(10, generator=g) < 0.5
        params = torch.randn(10, 3, generator=g)
        batch = Batch(obs, actions, columns[0], params, columns[1], columns[2], columns[3], valid)
        layout = BatchLayout(batch)
        index = torch.tensor([7, 0, 3])
        taken = layout.gather(Minibatch(torch.zeros(2), index, layout.pack(batch)))
        for name in ("obs", "actions", "logprobs", "params", "values", "advantages", "returns", "valid"):
            ours, whole = getattr(taken, name), getattr(batch, name)
            assert torch.equal(ours, whole[index]), name
            assert ours.dtype == whole.dtype, name
        assert taken.starts is None
        assert taken.states == ()


def test_gather_takes_the_state_before_each_sequence():
    n_envs, length, sequences = 3, 4, torch.tensor([4, 0])  # the second of environment 1, the first of environment 0
    rows = sequence_rows(sequences, n_envs, length)
    assert rows.tolist() == [13, 0, 16, 3, 19, 6, 22, 9]
    column = torch.arange(24.0)
    states = torch.arange(48.0).view(24, 2), torch.arange(24.0).view(24, 1)
    starts = torch.arange(24) % 5 == 0
    batch = Batch(column.unsqueeze(1), *[column] * 6, None, starts, states)
    layout = BatchLayout(batch, length)
    taken = layout.gather(Minibatch(torch.zeros(2), rows, layout.pack(batch)))
    assert taken.obs.flatten().tolist() == rows.tolist()
    assert torch.equal(taken.starts, starts[rows])
    assert [x.tolist() for x in taken.states] == [[[26.0, 27.0], [0.0, 1.0]], [[13.0], [0.0]]]
    for ours, direct in zip(taken.states, batch.take(rows, length).states, strict=True):
        assert torch.equal(ours, direct)
