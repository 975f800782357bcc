"""The memory plan: planned sizes match real ones, and the error for an oversized run names the n_envs that fits."""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from gymnasium import spaces

from fastppo import Config, Trainer
from fastppo.builders import parts
from fastppo.builders.parts import Models, build_update, plan_run
from fastppo.errors import ConfigError
from fastppo.functional.gae import gae_doubling
from fastppo.ppo.memory_plan import MemoryPlan, Shape, check_memory, plan_memory
from fastppo.runtime.distributed import World
from fastppo.runtime.resources import free_memory
from tests.envs.worlds import Counter
from tests.worlds import Spaces, short

CPU = torch.device("cpu")


def test_planned_storage_is_exact_to_the_byte(tmp_path):
    trainer = Trainer(short(tmp_path, n_envs=6, n_steps=10, n_minibatches=1), make_env=Counter)
    taken = sum(x.numel() * x.element_size() for x in trainer.rollout.tensors().values())
    # the plan does not know yet whether there are filler rows, so it counts a flag for every row
    assert trainer.memory.storage == taken + 60
    assert trainer.memory.update > 0
    run = json.loads((trainer.run_dir / "run.json").read_text())
    assert run["memory_plan"]["storage"] == trainer.memory.storage
    trainer.run()


def test_planning_does_not_change_training(tmp_path):
    results = []
    for i in range(2):
        trainer = Trainer(short(tmp_path, run_dir=tmp_path / str(i)), make_env=Counter)
        if i:
            c, world = trainer.config, trainer.world
            models = Models(trainer.spec, trainer.policy, trainer.reward_normalizer, trainer.update.parameters)
            plan_run(c, _probe(), models, trainer.device, world, [])
        trainer.run()
        results.append(trainer.update.parameters.vector.clone())
    assert torch.equal(*results)


def _probe():
    from fastppo.envs.make_envs import inspect_env

    return inspect_env("", {}, Counter)


def test_an_oversized_run_is_rejected_with_the_n_envs_that_fits(tmp_path):
    with pytest.raises(ConfigError, match=r"n_envs=2000000000 with n_steps=128 needs [\d.]+ GiB .*; n_envs=\d+ fits"):
        Trainer(Config(n_envs=2_000_000_000, total_timesteps=10**12, vectorization="native", run_dir=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_check_memory_finds_the_largest_n_envs_that_fits():
    def plan(n):
        return MemoryPlan(storage=100 * n, staging=10 * n, update=50 * n + 1000)

    assert check_memory(plan, 50, 8, free=10_000) == plan(50)
    with pytest.raises(ConfigError, match=r"n_envs=1000 with n_steps=8 .*; n_envs=56 fits"):
        check_memory(plan, 1000, 8, free=10_000)
    with pytest.raises(ConfigError, match="no n_envs fits; use fewer n_steps"):
        check_memory(plan, 1000, 8, free=500)


def test_the_plan_includes_normalisation_of_wide_observations(tmp_path):
    plans = []
    for i in range(2):
        config = short(tmp_path, run_dir=tmp_path / str(i), n_envs=64, n_minibatches=64, normalize_obs=bool(i))
        trainer = Trainer(config, make_env=lambda: Spaces(spaces.Box(-1, 1, (3000,), np.float32), spaces.Discrete(2)))
        plans.append(trainer.memory)
        trainer.run()
    batch = 64 * 8 * 3000
    assert plans[1].update > 2 * 8 * batch > plans[0].update  # two float64 copies at once


@pytest.mark.parametrize(
    ("line", "folder", "files"),
    [
        ("0::/job/me", "job", {"memory.max": "1000", "memory.current": "700"}),
        ("0::/", "", {"memory.max": "1000", "memory.current": "700"}),
        ("4:cpu,memory:/me", "memory/me", {"memory.limit_in_bytes": "1000", "memory.usage_in_bytes": "700"}),
    ],
)
def test_control_groups_limit_free_memory(tmp_path, line, folder, files):
    device = torch.device("cpu")
    assert free_memory(device, tmp_path) > 10_000, "without control groups"
    group = tmp_path / "sys/fs/cgroup" / folder
    group.mkdir(parents=True)
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"2:cpuset:/\n{line}\n")
    for name, value in files.items():
        (group / name).write_text(f"{value}\n")
    cache = "inactive_file" if line.startswith("0") else "total_inactive_file"
    (group / "memory.stat").write_text(f"anon 500\n{cache} 150\n")
    assert free_memory(device, tmp_path) == 1000 - 700 + 150
    if "memory.max" in files:
        (group / "memory.max").write_text("max\n")
        assert free_memory(device, tmp_path) > 10_000


MEASURE = """
import json, sys
from pathlib import Path
import psutil, torch
from fastppo import Config, Trainer
from fastppo.runtime.resources import peak_memory
torch.ones(8).sum()
before = psutil.Process().memory_info().rss
n, t, compiled, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], Path(sys.argv[4])
config = Config(n_envs=n, n_steps=t, vectorization="native", compile=compiled, total_timesteps=n * t,
                update_epochs=1, run_dir=folder)
trainer = Trainer(config)
ready = psutil.Process().memory_info().rss
trainer.run()
peak = peak_memory()
plan = trainer.memory
print(json.dumps({"before": before, "ready": ready, "peak": peak, "storage": plan.storage, "update": plan.update,
                  "total": plan.total}))
"""


@pytest.mark.parametrize("compiled", ["off", pytest.param("on", marks=pytest.mark.slow)])
def test_peak_memory_is_within_15_percent_of_the_plan(tmp_path, compiled):
    command = [sys.executable, "-c", MEASURE, "32768", "32", compiled, str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    m = json.loads(done.stdout.splitlines()[-1])
    planned = m["before"] + m["total"]
    assert m["total"] > 5e8, "the plan must be large compared with Python itself"
    assert m["peak"] == pytest.approx(planned, rel=0.15), {k: v / 2**20 for k, v in m.items()}


class Looking(torch.nn.Module):
    """A network whose control flow depends on the values of its input."""

    def __init__(self):
        super().__init__()
        self.body, self.critic = torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)

    def forward(self, x):
        if x.abs().max() > 1000:
            x = x / 1000
        return self.body(x), self.critic(x).squeeze(-1)


def test_a_network_with_data_dependent_control_flow_trains_without_a_plan(tmp_path):
    trainer = Trainer(short(tmp_path), make_env=Counter, policy=Looking())
    assert "memory is not planned" in trainer.notes[0]
    assert trainer.run().iterations == 3


def plan_of(trainer, max_steps=None, **options):
    """Plan the trainer's run with the `options` of plan_memory, and environments with a time limit of `max_steps`."""
    c, info = trainer.config, _probe()
    models = Models(trainer.spec, trainer.policy, trainer.reward_normalizer, trainer.update.parameters)
    shape = Shape(c.n_envs, info.obs_spec, info.action_spec, max_steps=max_steps)
    return plan_memory(c.n_steps, shape, lambda: build_update(c, models, CPU, trainer.world), gae_doubling, **options)


def test_the_plan_adds_eager_work_to_the_memory_that_graphs_hold(tmp_path):
    trainer = Trainer(short(tmp_path, n_envs=512, n_minibatches=1, update_epochs=1), make_env=Counter)
    eager, graphs = plan_of(trainer), plan_of(trainer, graphs=True)
    assert graphs.storage == eager.storage
    assert eager.update < graphs.update < 2 * eager.update
    # the gradient of a histogram takes nearly the memory of a captured minibatch
    histograms = plan_of(trainer, graphs=True, gradients=True)
    assert graphs.update < histograms.update < 2 * eager.update
    assert plan_of(trainer, gradients=True) == eager
    # a captured rollout evaluates the final observations of all its rows, and keeps the memory
    assert plan_of(trainer, max_steps=1, graphs=True).update > graphs.update
    assert plan_of(trainer, max_steps=1).update == eager.update
    trainer.run()


@pytest.mark.parametrize(
    ("device", "compile", "graphs"),
    [("cuda", "auto", True), ("cuda", "graph", True), ("cuda", "off", False), ("cpu", "graph", False)],
)
def test_the_plan_expects_graphs_where_a_run_captures_them_on_cuda(monkeypatch, device, compile, graphs):
    asked = []
    monkeypatch.setattr(parts, "free_memory", lambda device: 1)
    monkeypatch.setattr(parts, "plan_memory", lambda *_, **options: (asked.append(options), MemoryPlan(0, 0, 0))[1])
    monkeypatch.setattr(parts.kernel_gradient, "not_fused", lambda *_: "the network is a CNN")
    config = Config(n_envs=1, n_steps=1, compile=compile, log_histograms=True)
    plan_run(config, _probe(), Models(None, None, None, None), torch.device(device), World(), [])
    assert [(options["graphs"], options["gradients"]) for options in asked] == [(graphs, True)]


def test_the_plan_counts_the_sums_of_kernels(tmp_path):
    trainer = Trainer(short(tmp_path, n_envs=512, n_minibatches=1, update_epochs=1), make_env=Counter)
    without, update = plan_of(trainer, fused=True), trainer.update
    row = update.parameters.size + len(update.loss.diagnostics) + 1
    assert plan_of(trainer, fused=True, programs=132).update == without.update + 4 * 132 * row
