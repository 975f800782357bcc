"""Muon: against torch.optim.Muon and a definition in numpy, in an update, and in runs."""

import copy
import dataclasses
import math

import numpy as np
import pytest
import torch

from fastppo import Config, Trainer, resume
from fastppo.errors import CheckpointError, ConfigError
from fastppo.functional.muon import Place, muon, muon_init, orthogonalize
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP, hidden_matrices
from fastppo.runtime.graphs import GraphPool
from tests.reference.ppo import reference_update
from tests.test_update import SETTINGS, coefficients, learn, make_batch, make_policy, make_update, minibatches
from tests.worlds import short

SHAPES = [(8, 8), (5, 12), (12, 5)]


def newton_schulz(matrix):
    """The iteration in float64: on the smaller of X X^T and X^T X, which is the same polynomial of X."""
    x = matrix / np.linalg.norm(matrix)
    for _ in range(5):
        x = 3.4445 * x - 4.7750 * (x @ x.T) @ x + 2.0315 * (x @ x.T) @ (x @ x.T) @ x
    return x


@pytest.mark.parametrize("shape", SHAPES)
def test_orthogonalisation_follows_its_definition_and_makes_singular_values_equal(shape):
    torch.manual_seed(1)
    matrix = torch.randn(shape)
    out = orthogonalize(matrix).numpy()
    np.testing.assert_allclose(out, newton_schulz(matrix.double().numpy()), atol=2e-5)
    before, after = (np.linalg.svd(x, compute_uv=False) for x in (matrix.numpy(), out))
    assert before.max() > 2 * before.min()
    assert 0.68 < after.min() <= after.max() < 1.21
    # the directions stay: U^T out V is diagonal
    u, _, v = np.linalg.svd(matrix.numpy(), full_matrices=False)
    diagonal = u.T @ out @ v.T
    np.testing.assert_allclose(diagonal, np.diag(np.diag(diagonal)), atol=1e-5)


def test_the_scale_of_a_gradient_has_no_effect_and_zeros_stay_zeros():
    torch.manual_seed(2)
    matrix = torch.randn(6, 4)
    torch.testing.assert_close(orthogonalize(1e-3 * matrix), orthogonalize(matrix), atol=1e-5, rtol=0)
    assert torch.equal(orthogonalize(torch.zeros(6, 4)), torch.zeros(6, 4))


def network():
    """Three matrices, between and after other parameters."""
    torch.manual_seed(3)
    module = torch.nn.Module()
    module.bias, module.a = (torch.nn.Parameter(torch.randn(shape)) for shape in ((7,), SHAPES[0]))
    module.b, module.head, module.c = (torch.nn.Parameter(torch.randn(x)) for x in (SHAPES[1], (2, 3), SHAPES[2]))
    return module


def steps(lr, n):
    """Take n steps with ours and with torch's two optimisers; return the parameters after each step."""
    ours, theirs = network(), network()
    flat = FlatParameters(ours)
    optimizer = muon(flat.places([ours.a, ours.b, ours.c]), 1e-5)
    torch_muon = torch.optim.Muon(
        [theirs.a, theirs.b, theirs.c], lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw"
    )
    torch_adam = torch.optim.Adam([theirs.bias, theirs.head], lr=lr, eps=1e-5)
    params, state, pairs = flat.vector.clone(), optimizer.init(flat.vector), []
    generator = torch.Generator().manual_seed(4)
    for _ in range(n):
        for p in theirs.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        gradient = flat.flatten([p.grad for p in theirs.parameters()])
        params, state = optimizer.step(params, gradient, state, torch.tensor(lr))
        torch_muon.step()
        torch_adam.step()
        pairs.append((params, flat.flatten([p.detach() for p in theirs.parameters()])))
    return pairs


def test_steps_equal_torchs_in_float32(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch rounds to 8 bits
    for ours, theirs in steps(0.02, 20):
        torch.testing.assert_close(ours, theirs, atol=3e-6, rtol=1e-6)


def test_steps_are_close_to_torchs_in_bfloat16():
    (one, *_, last) = steps(0.02, 5)
    # a step changes an element by about 0.02 * 0.2
    torch.testing.assert_close(*one, atol=0.1 * 0.02 * 0.2, rtol=0)
    torch.testing.assert_close(*last, atol=0.2 * 0.02 * 0.2, rtol=0)


def test_a_step_has_the_root_mean_square_of_adams():
    torch.manual_seed(5)
    params, gradient = torch.zeros(64 * 32), torch.randn(64 * 32)
    optimizer = muon([Place(0, 64, 32)], 1e-5)
    new, _ = optimizer.step(params, gradient, muon_init(params, [Place(0, 64, 32)]), torch.tensor(1.0))
    assert new.square().mean().sqrt() == pytest.approx(0.2, rel=0.25)


def test_muon_gets_the_hidden_layers_alone():
    net = MLP(4, 3, free_std=True, hidden_sizes=(16, 24, 32), activation="tanh", shared_trunk=False)
    shapes = [tuple(p.shape) for p in hidden_matrices(net)]
    assert shapes == [(24, 16), (32, 24)] * 2
    flat = FlatParameters(net)
    for place, p in zip(flat.places(hidden_matrices(net)), hidden_matrices(net), strict=True):
        own = flat.vector[place.offset : place.offset + place.rows * place.columns]
        assert torch.equal(own.view(place.rows, place.columns), p)


def optimizer_of(policy):
    flat = FlatParameters(policy.network)
    return muon(flat.places(hidden_matrices(policy.network)), 1e-5)


def test_an_update_matches_autograd_and_torchs_optimisers(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)  # torch rounds to 8 bits
    policy = make_policy()
    twin, batch = copy.deepcopy(policy.network), make_batch(policy)
    learn(make_update(policy, optimizer=optimizer_of(policy)), batch, coefficients(), math.inf)
    matrices = list(hidden_matrices(twin))
    rest = [p for p in twin.parameters() if all(p is not matrix for matrix in matrices)]
    optimizers = (
        torch.optim.Muon(matrices, lr=SETTINGS["lr"], weight_decay=0.0, adjust_lr_fn="match_rms_adamw"),
        torch.optim.Adam(rest, lr=SETTINGS["lr"], eps=1e-5),
    )
    split = minibatches(batch, 2, 4)
    reference_update(twin, split, value_clip="max", normalize=True, optimizers=optimizers, **SETTINGS)
    found, expected = (torch.nn.utils.parameters_to_vector(net.parameters()) for net in (policy.network, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("how", ["compiled", "captured"])
def test_compiled_and_captured_updates_match_eager_ones(how):
    results = []
    for fast in (False, True):
        policy = make_policy()
        batch = make_batch(policy)
        update = make_update(policy, optimizer=optimizer_of(policy), kl_stop="minibatch")
        coefs = coefficients()
        if fast and how == "compiled":
            update.compile(batch, coefs)
        if fast and how == "captured":
            update.prepare(len(batch.logprobs), math.inf)
            update.begin(batch)
            update.capture(coefs, GraphPool(torch.device("cpu")))
            update.shuffle.generator.manual_seed(5)
        for i in range(3):  # the last update stops
            coefs.learning_rate.fill_(1e-3 / (i + 1))  # in place, since a graph reads the tensors that it captured
            learn(update, batch, coefs, (math.inf, 1.0, 1e-4)[i])
        results.append([update.parameters.vector.clone(), *update.state.optimizer])
    for found, eager in zip(*results, strict=True):
        torch.testing.assert_close(found, eager, atol=1e-5, rtol=0)


def test_runs_resume_bit_for_bit(tmp_path):
    settings = {"optimizer": "muon", "compile": "off", "threads": 1, "env_id": "CartPole-v1", "n_envs": 2}
    found = []
    for name, stop in (("whole", 6), ("cut", 3)):
        trainer = Trainer(short(tmp_path / name, total_timesteps=2 * 8 * 6, **settings))
        for stats in trainer.iterations():
            if stats.iteration == stop:
                break
        if name == "cut":
            trainer = resume(trainer.run_dir)
            trainer.run()
        found.append([trainer.update.parameters.vector, *trainer.update.state.optimizer])
    assert all(map(torch.equal, *found))
    assert found[0][4].abs().max() > 0, "the momentum"


@pytest.mark.parametrize(("before", "now"), [("adam", "muon"), ("muon", "adam")])
def test_a_run_keeps_its_optimiser(tmp_path, before, now):
    trainer = Trainer(short(tmp_path, optimizer=before, compile="off", checkpoint_every=1))
    for _ in trainer.iterations():
        break
    checkpoint = max((trainer.run_dir / "checkpoints").iterdir())
    with pytest.raises(CheckpointError, match=f"other settings: optimizer was {before}, is {now}. A resumed run keeps"):
        Trainer(dataclasses.replace(trainer.config, optimizer=now), resume_from=checkpoint)


def test_networks_without_hidden_matrices_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"hidden_sizes=\[64\]: .*give at least two hidden layers, or use adam"):
        Trainer(Config(optimizer="muon", hidden_sizes=(64,), run_dir=tmp_path / "run"))
    own = torch.nn.Linear(4, 3)
    with pytest.raises(ConfigError, match=r"a network of your own: .*use adam"):
        Trainer(Config(optimizer="muon", run_dir=tmp_path / "run"), policy=Split(own))


class Split(torch.nn.Module):
    def __init__(self, body):
        super().__init__()
        self.body = body

    def forward(self, x):
        out = self.body(x)
        return out[:, :2], out[:, 2]
