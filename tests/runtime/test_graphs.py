"""The contract of `capture` on the CPU, and training with captured graphs against training with eager code."""

import dataclasses

import pytest
import torch

from fastppo import Config, Trainer
from fastppo.errors import CaptureError
from fastppo.runtime.graphs import capture
from tests.worlds import Counter, short

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
