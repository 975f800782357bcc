"""The contract of `capture`, by the recorder of `tests.cpu_graphs`, and training with graphs against eager code."""

import dataclasses

import numpy as np
import pytest
import torch

from fastppo import Config, Trainer
from fastppo.errors import CaptureError
from fastppo.monitoring.update_samples import read_samples
from fastppo.runtime.graphs import capture
from tests.envs.worlds import Counter
from tests.worlds import short

CPU = torch.device("cpu")


def test_a_replay_repeats_tensor_operations_but_not_python():
    x, total, calls = torch.ones(3), torch.zeros(3), []

    def work():
        calls.append(1)
        total.add_(x * len(calls))
        return total * 2

    replay = capture(work, keep=[total], fresh=[], device=CPU)
    assert total.tolist() == [0, 0, 0], "capturing leaves kept tensors unchanged"
    x.fill_(5.0)
    first = replay()
    assert first.tolist() == [10, 10, 10]
    x.fill_(1.0)
    second = replay()
    assert second is first, "each replay returns the same tensors"
    assert second.tolist() == [12, 12, 12]
    assert len(calls) == 1


def test_a_replay_without_new_inputs_gives_nan_or_fails():
    x, rows, out = torch.ones(2), torch.tensor([1, 0]), torch.zeros(2)
    replay = capture(lambda: out.copy_(x * 2), keep=[], fresh=[x], device=CPU)
    x.fill_(3.0)
    assert replay().tolist() == [6, 6]
    assert replay().isnan().all()
    replay = capture(lambda: out.copy_(torch.ones(2)[rows]), keep=[], fresh=[rows], device=CPU)
    replay()
    with pytest.raises((IndexError, RuntimeError)):
        replay()


@pytest.mark.parametrize(
    "work",
    [
        lambda x: x.mul_(x.sum().item()),
        lambda x: x.mul_(x[0].item()),
        lambda x: x.mul_(2) if (x * 2).sum() > 0 else x,
        lambda x: x[x > 0].sum(),
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x + torch.tensor([1.0, 2.0]),
        lambda x: x.normal_(generator=torch.Generator()),
        lambda x: torch.randperm(2),
    ],
    ids=["item", "item of an input", "if", "mask", "nonzero", "unique", "constant", "normal", "randperm"],
)
def test_work_that_cannot_be_captured_raises_capture_error(work):
    x = torch.ones(2)
    with pytest.raises(CaptureError, match=r"can't be captured as a graph \(.*\); a network must not look at values"):
        capture(lambda: work(x), keep=[x], fresh=[], device=CPU)
    assert x.tolist() == [1, 1]


def train(tmp_path, compile, **changes):
    settings = {"vectorization": "tensor", "env_id": "CartPole-v1", "n_steps": 4, "total_timesteps": 2 * 4 * 6}
    settings |= {"learning_rate": 0.01, "anneal_lr": True, "clip_coef": "linear:0.3:0.1", "record_ratios": 0, **changes}
    trainer = Trainer(short(tmp_path, run_dir=tmp_path / compile, compile=compile, **settings))
    logged = [
        {k: v for k, v in s.scalars.items() if "time/" not in k and "sps" not in k.lower()}
        for s in trainer.iterations()
    ]
    return trainer, logged


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"target_kl": 1e-4, "kl_stop": "epoch", "update_epochs": 3},
        {"target_kl": 1e-4, "kl_stop": "minibatch", "update_epochs": 3},
        {
            "env_id": "Pendulum-v1",
            "env_kwargs": {"max_episode_steps": 3},
            "normalize_obs": True,
            "normalize_rewards": True,
        },
        {"env_id": "fastppo/Catch-v0", "n_steps": 2, "total_timesteps": 2 * 2 * 3},
    ],
    ids=["plain", "stop by epoch", "stop by minibatch", "normalised and truncated", "images"],
)
def test_training_with_graphs_matches_eager_training(tmp_path, changes):
    eager, a = train(tmp_path, "off", **changes)
    graph, b = train(tmp_path, "graph", **changes)
    assert graph.config.compile == "graph"
    assert graph.result.phases["rollout"] > 0
    assert graph.result.phases["env"] == 0
    assert len(a) == len(b) > 2
    for one, two in zip(a, b, strict=True):
        assert one == pytest.approx(two, rel=2e-3, abs=2e-4, nan_ok=True)
        assert one.get("losses/minibatches_run") == two.get("losses/minibatches_run")
    if "target_kl" in changes:
        assert any("losses/stop_kl" in row for row in a), (
            "some update must stop early, so that the comparison covers it"
        )
    torch.testing.assert_close(eager.update.parameters.vector, graph.update.parameters.vector, atol=2e-4, rtol=1e-3)
    if "normalize_obs" in changes:
        assert torch.equal(eager.rollout.truncated, graph.rollout.truncated)
        assert eager.rollout.truncated.any()


def test_training_with_graphs_matches_eager_training_on_host_environments(tmp_path):
    vectors = []
    for compile in ("off", "graph"):
        trainer = Trainer(short(tmp_path, run_dir=tmp_path / compile, compile=compile), make_env=Counter)
        trainer.run()
        vectors.append(trainer.update.parameters.vector)
    torch.testing.assert_close(*vectors, atol=1e-5, rtol=0)


@pytest.mark.parametrize("halves", [False, True], ids=["whole", "in halves"])
def test_acting_in_host_environments_with_a_graph_matches_eager_code(tmp_path, halves):
    """The numpy actor does not support ELU, so the policy acts in torch: eagerly, or with a captured graph."""
    runs = []
    pool = {"vectorization": "pool", "workers": 2, "half_batches": True} if halves else {}
    for compile in ("off", "graph"):
        changes = {"run_dir": tmp_path / compile, "compile": compile, "activation": "elu", "n_envs": 4, **pool}
        trainer = Trainer(short(tmp_path, **changes), make_env=Counter)
        assert all((actor._replay is not None) == (compile == "graph") for actor in trainer.collect.actors)
        trainer.run()
        runs.append(trainer)
    eager, graph = (run.rollout for run in runs)
    assert torch.equal(eager.actions, graph.actions)
    assert torch.equal(eager.obs, graph.obs)
    for name in ("logprobs", "values", "params"):
        torch.testing.assert_close(getattr(eager, name), getattr(graph, name), atol=1e-5, rtol=0)
    torch.testing.assert_close(*(run.update.parameters.vector for run in runs), atol=1e-5, rtol=0)


class BranchOnValues(torch.nn.Module):
    """A network that branches on the values of its activations."""

    def __init__(self):
        super().__init__()
        self.body, self.critic = torch.nn.Linear(4, 2), torch.nn.Linear(4, 1)

    def forward(self, x):
        if self.body(x).max() > 1000:
            x = x / 1000
        return self.body(x), self.critic(x).squeeze(-1)


def test_a_network_that_branches_on_values_raises_capture_error(tmp_path):
    config = dataclasses.replace(short(tmp_path), compile="graph", vectorization="tensor")
    with pytest.raises(CaptureError, match="must not look at values on the host"):
        Trainer(config, policy=BranchOnValues())
    assert isinstance(config, Config)


def captured(tmp_path, **settings):
    """Return a trainer with a captured update, and a list of 1s that grows with each replayed epoch."""
    trainer = Trainer(short(tmp_path, compile="graph", update_epochs=5, **settings), make_env=Counter)
    replays, epoch = [], trainer.update._epoch
    trainer.update._epoch = lambda *arguments: (replays.append(1), epoch(*arguments))
    return trainer, replays


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_a_captured_update_that_stops_in_its_first_epoch_replays_one_epoch(tmp_path, kl_stop):
    limits = {"target_kl": 1e-9, "kl_stop": kl_stop, "learning_rate": 0.01, "record_ratios": 0}
    trainer, replays = captured(tmp_path, **limits)
    for stats in trainer.iterations():
        assert stats.scalars["losses/epochs_run"] == 1
        assert len(replays) == 1
        replays.clear()


def test_a_captured_update_without_a_kl_limit_reads_nothing_between_epochs(tmp_path, monkeypatch):
    trainer, replays = captured(tmp_path, record_ratios=0)
    monkeypatch.setattr(trainer.update, "_stopped", lambda: pytest.fail("read the KL"))
    assert trainer.run().iterations * 5 == len(replays)


@pytest.mark.parametrize("kl_stop", ["epoch", "minibatch"])
def test_leaving_out_the_epochs_after_a_stop_changes_no_number(tmp_path, kl_stop):
    results = []
    for watch in (True, False):
        limits = {"target_kl": 1e-9, "kl_stop": kl_stop, "learning_rate": 0.01}
        trainer, replays = captured(tmp_path, run_dir=tmp_path / str(watch), **limits)
        reports = []
        for _ in range(3):
            trainer.learner.anneal(0.0)
            trainer.collect()
            reports.append(trainer.learner(watch=watch).clone())
        assert len(replays) == (3 if watch else 15)
        results.append([*reports, trainer.update.parameters.vector, *trainer.update.state.optimizer])
        trainer.request_stop()
        trainer.run()
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("changes", [{}, {"target_kl": 1e-9, "kl_stop": "epoch"}], ids=["all epochs", "stopped"])
def test_a_sampled_update_replays_its_epochs_and_gives_the_samples_of_eager_training(tmp_path, changes):
    settings = {"record_ratios": 1, "learning_rate": 0.01, "normalize_rewards": True, "log_histograms": True, **changes}
    graph, replays = captured(tmp_path, run_dir=tmp_path / "graph", **settings)
    result = graph.run()
    assert len(replays) == result.iterations * (1 if changes else 5)
    Trainer(short(tmp_path, run_dir=tmp_path / "off", update_epochs=5, **settings), make_env=Counter).run()
    pairs = zip(*(read_samples(tmp_path / name / "samples") for name in ("graph", "off")), strict=True)
    for ours, eager in list(pairs):
        assert ours.coefs == eager.coefs
        np.testing.assert_allclose(ours.ratios, eager.ratios, atol=1e-4)
        for name, values in ours.trajectory.items():
            np.testing.assert_allclose(values, eager.trajectory[name], atol=1e-4, err_msg=name)
