"""Networks, encoders, flat parameters and normalisers."""

import pytest
import torch
from gymnasium import spaces
from torch import nn

from fastppo.errors import ConfigError
from fastppo.functional.distributions import Categorical
from fastppo.native import recurrence as native
from fastppo.policies.actors import fill_values_and_logprobs, make_actor
from fastppo.policies.decisions import Decisions
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.normalizers import ObsNormalizer, RewardNormalizer
from fastppo.policies.numpy_actor import NumpyActor
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec, default_network
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec

VECTOR = ObsSpec.from_space(spaces.Box(-1, 1, (3,)))


def spec(obs=None, action=None, **changes):
    obs = ObsSpec.from_space(obs or spaces.Box(-1, 1, (3,)))
    action = ActionSpec.from_space(action or spaces.Discrete(2))
    values = {"network": default_network(obs), "hidden_sizes": (64, 64), "activation": "tanh", "shared_trunk": False}
    return PolicySpec(obs, action, **(values | {"normalize_obs": False, "obs_clip": 10.0} | changes))


def gains(layer):
    """Return the singular values of a layer's weight; with orthogonal initialisation each equals the gain."""
    return torch.linalg.svdvals(layer.weight.detach().flatten(1))


@pytest.mark.parametrize("shared", [False, True])
def test_the_mlp_is_initialised_like_cleanrls_mlp(shared):
    net = spec(shared_trunk=shared).build().network
    trunks = [net.critic_trunk] if shared else [net.critic_trunk, net.actor_trunk]
    for trunk in trunks:
        for layer in (m for m in trunk if isinstance(m, nn.Linear)):
            torch.testing.assert_close(gains(layer), torch.full_like(gains(layer), 2**0.5))
            assert not layer.bias.any()
    torch.testing.assert_close(gains(net.actor.linear), torch.full((2,), 0.01))
    torch.testing.assert_close(gains(net.critic), torch.ones(1))
    assert (net.actor_trunk is None) is shared


def test_the_nature_cnn_has_cleanrls_size_with_channels_first_or_last():
    for shape in ((4, 84, 84), (84, 84, 4)):
        policy = spec(spaces.Box(0, 255, shape, "uint8"), spaces.Discrete(6)).build()
        assert sum(p.numel() for p in policy.network.parameters()) == 1_687_719
        params, values, _ = policy(torch.randint(0, 256, (5, *shape), dtype=torch.uint8))
        assert params.shape == (5, 6)
        assert values.shape == (5,)


def test_the_encoder_scales_images_and_puts_channels_first():
    encoder = Encoder(ObsSpec.from_space(spaces.Box(0, 255, (36, 40, 3), "uint8")))
    obs = torch.randint(0, 256, (2, 36, 40, 3), dtype=torch.uint8)
    out = encoder(obs)
    assert out.shape == (2, 3, 36, 40)
    torch.testing.assert_close(out[1, 2, 5, 7], obs[1, 5, 7, 2] / 255)


@pytest.mark.parametrize("channels", ["stack last", "first", "last"])
def test_the_encoder_folds_a_stack_of_images_into_the_channels(channels):
    x = torch.arange(2 * 3 * 40 * 38).reshape(1, 2, 3, 40, 38) % 251  # [B, S, C, H, W]
    order = {"first": (0, 1, 2, 3, 4), "last": (0, 1, 3, 4, 2), "stack last": (0, 3, 4, 1, 2)}[channels]
    obs = x.permute(order).to(torch.uint8)
    encoded = Encoder(ObsSpec.from_space(spaces.Box(0, 255, obs.shape[1:], "uint8")))(obs)
    assert encoded.shape == (1, 6, 40, 38)
    assert torch.equal(encoded, x.reshape(1, 6, 40, 38).float() / 255)


def test_the_encoder_divides_by_the_high_of_the_space_or_normalises():
    board = ObsSpec.from_space(spaces.Box(0, 2, (2, 3), "uint8"))
    x = torch.tensor([[[0.0, 1, 2], [2, 1, 0]]])
    assert torch.equal(Encoder(board)(x), x / 2)
    normalizer = ObsNormalizer((2, 3), 10.0)
    assert torch.equal(Encoder(board, normalizer)(x), normalizer(x)), "its moments are those of raw observations"
    scaled = ObsSpec.from_space(spaces.Box(0, 1, (40, 40), "float32"))
    assert torch.equal(Encoder(scaled)(torch.full((1, 40, 40), 0.5)), torch.full((1, 1, 40, 40), 0.5))


def test_acting_in_numpy_divides_as_the_encoder_does():
    policy = spec(spaces.Box(0, 9, (5,), "uint8"), hidden_sizes=(8,)).build()
    decisions = Decisions(
        torch.arange(2 * 4 * 5).reshape(2, 4, 5).remainder(10).float(),
        torch.zeros(1, 4, policy.distribution.noise_size),
        *(torch.zeros(1, 4, *shape) for shape in ((), (), (policy.distribution.n_params,), ())),
    )._replace(actions=torch.zeros(1, 4, dtype=torch.int64))
    actor = make_actor(policy, decisions)
    assert isinstance(actor, NumpyActor)
    actor.act(0)
    torch.testing.assert_close(decisions.params[0], policy(decisions.obs[0]).params)


@pytest.mark.parametrize("why", [None, "there is no C compiler"])
@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("kind", ["lstm", "gru", "mingru"])
def test_memory_in_numpy_equals_memory_in_torch(kind, shared, why, monkeypatch):
    monkeypatch.setattr(native, "unavailable", lambda: why)
    torch.manual_seed(0)
    action = spaces.Box(-1, 1, (2,)) if shared else spaces.Discrete(3)
    policy = spec(
        spaces.Box(-1, 1, (5,)), action, hidden_sizes=(8, 6), shared_trunk=shared, memory=kind, memory_size=7
    ).build()
    for parameter in policy.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    n_steps, n, dist = 6, 4, policy.distribution
    written = []
    for torch_only in (False, True):
        g = torch.Generator().manual_seed(1)
        states = tuple(torch.randn(n_steps + 1, n, 7, generator=g) for _ in policy.initial_state(n))
        decisions = Decisions(
            obs=torch.randn(n_steps + 1, n, 5, generator=g),
            noise=torch.randn(n_steps, n, dist.noise_size, generator=g),
            actions=torch.zeros(n_steps, n, *dist.action_shape, dtype=dist.action_dtype),
            logprobs=torch.zeros(n_steps, n),
            params=torch.zeros(n_steps, n, dist.n_params),
            values=torch.zeros(n_steps, n),
            states=states,
            starts=torch.rand(n_steps + 1, n, generator=g) < 0.3,
        )
        actor = make_actor(policy, decisions, torch_only=torch_only)
        assert isinstance(actor, NumpyActor) != torch_only
        for t in range(n_steps):
            actor.act(t)
        if not actor.complete:
            fill_values_and_logprobs(policy, decisions)
        written.append(decisions)
    for ours, theirs in zip(written[0].states, written[1].states, strict=True):
        torch.testing.assert_close(ours, theirs)
    for name in ("actions", "params", "logprobs", "values"):
        torch.testing.assert_close(getattr(written[0], name), getattr(written[1], name))


def test_the_encoder_makes_discrete_observations_one_hot():
    encoder = Encoder(ObsSpec.from_space(spaces.Discrete(4, start=10)))
    assert encoder(torch.tensor([10, 13])).tolist() == [[1, 0, 0, 0], [0, 0, 0, 1]]
    encoder = Encoder(ObsSpec.from_space(spaces.MultiDiscrete([2, 3])))
    assert encoder(torch.tensor([[1, 2]])).tolist() == [[0, 1, 0, 0, 1]]


def test_small_images_use_the_mlp_and_the_cnn_refuses_unsuitable_observations():
    assert default_network(ObsSpec.from_space(spaces.Box(0, 255, (20, 20, 1), "uint8"))) == "mlp"
    with pytest.raises(ConfigError, match="at least 36x36, got 20x20; use network=mlp"):
        spec(spaces.Box(0, 255, (20, 20, 1), "uint8"), network="cnn").build()
    with pytest.raises(ConfigError, match="network=cnn needs images, but observations are vector"):
        spec(network="cnn").build()


@pytest.mark.parametrize("activation", ["tanh", "relu", "elu", "gelu", "silu"])
def test_the_mlp_takes_any_width_depth_and_activation(activation):
    policy = spec(hidden_sizes=(8, 16, 4), activation=activation).build()
    assert policy(torch.randn(7, 3))[0].shape == (7, 2)


def test_a_gaussian_policy_starts_with_a_state_independent_deviation_of_1():
    policy = spec(action=spaces.Box(-1, 1, (2,))).build()
    params = policy(torch.randn(9, 3)).params
    assert not params[:, 2:].any()
    assert policy.network.actor.log_std.requires_grad


def test_a_policy_spec_survives_json():
    import json

    one = spec(spaces.MultiDiscrete([2, 3]), spaces.Box(-1, float("inf"), (2,)), hidden_sizes=(5,))
    assert PolicySpec.from_dict(json.loads(json.dumps(one.to_dict(), allow_nan=False))) == one


class TwoHeads(nn.Module):
    def __init__(self, params=2, values=(), dropout=0.0):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(3, 8), nn.Dropout(dropout))
        self.head = nn.Linear(8, params)
        self.values = values

    def forward(self, x):
        x = self.body(x)
        return self.head(x), x.sum(-1).reshape(len(x), *self.values)


def test_a_custom_network_is_checked_when_the_policy_is_built():
    Policy(Encoder(VECTOR), TwoHeads(), Categorical(2))
    with pytest.raises(ConfigError, match=r"must return distribution parameters \(2, 5\) and values \(2,\)"):
        Policy(Encoder(VECTOR), TwoHeads(), Categorical(5))
    with pytest.raises(ConfigError, match=r"returned \(2, 2\) and \(2, 1\)"):
        Policy(Encoder(VECTOR), TwoHeads(values=(1,)), Categorical(2))
    with pytest.raises(ConfigError, match="different outputs for equal observations; remove dropout"):
        Policy(Encoder(VECTOR), TwoHeads(dropout=0.5), Categorical(2))
    with pytest.raises(ConfigError, match=r"Linear returned \(2, 2\) for 2 observations"):
        Policy(Encoder(VECTOR), nn.Linear(3, 2), Categorical(2))
    with pytest.raises(ConfigError, match=r"Linear fails on observations of shape \(2, 3\)"):
        Policy(Encoder(VECTOR), nn.Linear(4, 2), Categorical(2))


class Mixing(TwoHeads):
    """Subtracts the mean of the batch."""

    def forward(self, x):
        return super().forward(x - x.mean(0))


def test_a_network_that_mixes_rows_is_refused_when_the_policy_is_built():
    normed = TwoHeads()
    normed.body.append(nn.BatchNorm1d(8))
    with pytest.raises(ConfigError, match=r"TwoHeads has BatchNorm1d \(body.2\).*LayerNorm"):
        Policy(Encoder(VECTOR), normed, Categorical(2))
    Policy(Encoder(VECTOR), normed.eval(), Categorical(2))
    with pytest.raises(ConfigError, match="Mixing mixes the rows of a batch"):
        Policy(Encoder(VECTOR), Mixing(), Categorical(2))


def test_flat_parameters_share_aligned_memory_with_the_module():
    net = TwoHeads()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    flat = FlatParameters(net)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert all(p.data_ptr() % 64 == 0 for p in flat.parameters)
    x = torch.randn(5, 3)
    loss = net(x)[0].square().mean() + net(x)[1].mean()
    expected = torch.autograd.grad(loss, flat.parameters)
    for view, gradient in zip(flat.views(flat.flatten(expected)), expected, strict=True):
        assert torch.equal(view, gradient)
    flat.vector.fill_(2.0)
    assert all((p == 2).all() for p in net.parameters())
    net.load_state_dict(before)
    assert torch.equal(flat.views(flat.vector)[0], before["body.0.weight"])


def test_flat_parameters_may_be_empty():
    net = nn.Linear(3, 2)
    net.register_parameter("empty", nn.Parameter(torch.zeros(0)))
    flat = FlatParameters(net)
    flat.check()
    net.weight = nn.Parameter(torch.zeros(2, 3))
    with pytest.raises(ConfigError, match="network parameter weight was replaced"):
        flat.check()


def test_flat_parameters_skip_frozen_ones_and_refuse_unusable_ones():
    net = TwoHeads()
    net.body.requires_grad_(False)
    assert len(FlatParameters(net).parameters) == 2
    with pytest.raises(ConfigError, match="no trainable parameters"):
        FlatParameters(nn.Tanh())
    with pytest.raises(ConfigError, match="must be float32"):
        FlatParameters(TwoHeads().double())


def test_normalised_observations_have_mean_0_deviation_1_and_stay_within_the_clip():
    normalizer = ObsNormalizer((2,), clip=3.0)
    rows = torch.tensor([5.0, -1e3]) + torch.tensor([2.0, 40.0]) * torch.randn(50_000, 2)
    assert torch.equal(normalizer(torch.tensor([[2.5, -9.0]])), torch.tensor([[2.5, -3.0]])), (
        "before the first update, the normaliser only clips"
    )
    for block in rows.split(10_000):
        normalizer.update(block)
    out = normalizer(rows)
    assert out.dtype == torch.float32
    assert out.mean(0).abs().max() < 0.01
    assert (out.std(0) - 1).abs().max() < 0.02
    assert out.abs().max() == 3.0


def test_the_normaliser_keeps_its_precision_with_a_large_offset():
    normalizer = ObsNormalizer((1,), clip=10.0)
    rows = 4096.0 + torch.arange(1000.0).reshape(-1, 1) / 1024
    normalizer.update(rows)
    x = rows.double()
    torch.testing.assert_close(normalizer(rows).double(), (x - x.mean()) / x.std(correction=0), atol=1e-5, rtol=1e-5)


def running_returns(rewards, done, valid, gamma):
    """Return g_t = r_t + gamma g_{t-1} of all valid rows, environment by environment; g restarts at 0 per episode."""
    out = []
    for column in range(len(rewards[0])):
        g = 0.0
        for t in range(len(rewards)):
            g = rewards[t][column] + gamma * g
            if valid is None or valid[t][column]:
                out.append(g)
            if done[t][column]:
                g = 0.0
    return torch.tensor(out, dtype=torch.float64)


@pytest.mark.parametrize("with_fillers", [False, True])
def test_reward_scaling_over_several_rollouts_matches_its_step_by_step_definition(with_fillers):
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(60, 3, generator=g)
    done = torch.rand(60, 3, generator=g) < 0.1
    valid = None
    if with_fillers:
        valid = torch.ones(60, 3, dtype=torch.bool)
        valid[1:] = ~done[:-1]
        done &= valid
        valid[1:] = ~done[:-1]
        rewards = torch.where(valid, rewards, 50.0)  # rewards of filler rows must be ignored
    normalizer = RewardNormalizer(3, clip=10.0)
    for rows in torch.arange(60).split(20):
        v = None if valid is None else valid[rows]
        normalizer.update_from_rollout(rewards[rows], done[rows], v, torch.tensor(0.9))
    plain_valid = None if valid is None else valid.tolist()
    real = rewards if valid is None else torch.where(valid, rewards, 0.0)
    expected = running_returns(real.double().tolist(), done.tolist(), plain_valid, 0.9)
    # the tolerance allows for gamma, a float32 scalar like all coefficients
    torch.testing.assert_close(normalizer.var, expected.var(correction=0), rtol=1e-5, atol=0)
    assert normalizer.count == len(expected)
    torch.testing.assert_close(
        normalizer(rewards[:2]), rewards[:2] / expected.std(correction=0).float(), rtol=1e-5, atol=0
    )


def test_constant_rewards_stay_finite():
    normalizer = RewardNormalizer(1, clip=10.0)
    zero = torch.zeros(5, 1)
    normalizer.update_from_rollout(zero, zero.bool(), None, torch.tensor(0.99))
    assert normalizer(zero).tolist() == [[0]] * 5
    assert normalizer(zero + 1).max() <= 10
