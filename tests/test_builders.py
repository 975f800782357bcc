"""Builders of a trainer's parts: compile modes, usable cores, custom networks, notes."""

from types import SimpleNamespace

import pytest
import torch

from fastppo import Config, Trainer
from fastppo.builders.compiling import compile_parts
from fastppo.errors import CaptureError, ConfigError
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.runtime.compile import CompileError
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.distributed import World
from fastppo.runtime.graphs import RECORDERS
from tests.worlds import short


class Parts:
    """A stand-in for learner, collector and environments that compiles and captures, or raises."""

    device = torch.device("cpu")
    acts_in = "torch"

    def __init__(self, compiles=True, records=True, memory_steps=0, fuses=False):
        self.compiles, self.records, self.fuses, self.done, self.curiosity = compiles, records, fuses, [], None
        policy = SimpleNamespace(has_memory=memory_steps > 0, network=torch.nn.Identity())
        self.update = SimpleNamespace(policy=policy, shuffle=SimpleNamespace(segment_length=max(1, memory_steps)))
        self.update.not_fused = lambda: None if self.fuses else "the network is a CNN"

    def compile(self):
        if not self.compiles:
            raise CompileError("there is no C++ compiler")
        self.done.append("compile")

    def fuse(self, parallel):
        if not self.fuses:
            raise CompileError("the network is a CNN")
        if self.device.type == "cuda" and "fuse" not in self.done:  # the learner
            assert parallel == 7
        else:
            assert parallel == torch.get_num_threads()
        self.acts_in = "Triton" if self.device.type == "cuda" else "C"
        self.done.append("fuse")

    def capture(self):
        if not self.records:
            raise CaptureError("forward looks at values")
        self.done.append("capture")


@pytest.mark.parametrize(
    ("wanted", "minibatches", "parts", "device", "mode", "note"),
    [
        ("on", 1, Parts(), "cpu", "on", "compile on: requested; took"),
        ("on", 1, Parts(compiles=False), "cpu", "off", "compile off: it can't be compiled: there is no C++ compiler"),
        ("auto", 100, Parts(), "cpu", "off", "compile off: 100 minibatches ahead: compiling saves about 0 s and costs"),
        ("auto", 10**6, Parts(), "cpu", "on", "compile on: 1,000,000 minibatches ahead: compiling saves about 2,500 s"),
        ("auto", 10**6, Parts(compiles=False), "cpu", "off", "compile off: it can't be compiled"),
        ("auto", 10**6, Parts(memory_steps=32), "cpu", "off", "compile off: the compiler would unroll the 32 steps of"),
        ("auto", 10**6, Parts(memory_steps=8), "cpu", "on", "compile on: 1,000,000 minibatches ahead"),
        ("graph", 1, Parts(), "cpu", "graph", "compile graph: requested"),
        ("auto", 1, Parts(), "cuda", "graph", "compile graph: on CUDA, launches cost more"),
        ("auto", 1, Parts(records=False), "cuda", "off", "compile off: forward looks at values"),
        ("auto", 1, Parts(compiles=False), "cuda", "graph", "the update is not compiled"),
        ("off", 1, Parts(fuses=True), "cpu", "off", None),
        ("auto", 1, Parts(fuses=True), "cpu", "fused", "compile fused: acting and update run in C; took"),
        ("fused", 1, Parts(fuses=True), "cpu", "fused", "compile fused: acting and update run in C; took"),
        ("on", 1, Parts(fuses=True), "cpu", "on", "compile on: requested; took"),
        ("fused", 1, Parts(), "cuda", "graph", "compile graph: on CUDA, launches cost more"),
        ("fused", 1, Parts(fuses=True), "cuda", "fused", "compile fused: rollout and update run in kernels; took"),
        ("auto", 1, Parts(fuses=True), "cuda", "fused", "compile fused: rollout and update run in kernels; took"),
        ("graph", 1, Parts(fuses=True), "cuda", "graph", "compile graph: requested"),
        ("auto", 1, Parts(fuses=True, records=False), "cuda", "fused", "kernels are launched one by one: forward"),
    ],
)
def test_a_note_explains_the_compile_mode(monkeypatch, wanted, minibatches, parts, device, mode, note):
    parts.device, notes, said = torch.device(device), [], []
    processors = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    found, seconds = compile_parts(wanted, minibatches, parts, parts, parts, World(), notes=notes, say=said.append)
    assert found == mode
    if wanted in ("auto", "fused") and not parts.fuses:
        assert notes.pop(0) == "not fused: the network is a CNN."
    assert bool(note) == bool(notes)
    assert note is None or notes[0].startswith(note)
    assert bool(seconds) == (mode != "off")
    waits = ["compiling: 10-20 s the first time, 5 s from the cache"]
    if mode == "fused" and device == "cuda":
        waits = ["compiling kernels: a minute or more the first time, seconds from the cache", *waits]
    assert said == waits[: len(said)]
    assert ("capture" in parts.done) == (mode == "graph" or (device, mode) == ("cuda", "fused")) or not parts.records


def test_rollouts_can_be_captured_beside_a_fused_update(monkeypatch):
    processors = SimpleNamespace(multi_processor_count=7)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: processors)
    learner, collector, notes = Parts(fuses=True), Parts(), []
    learner.device = torch.device("cuda")
    mode, _ = compile_parts("auto", 1, learner, collector, Parts(), World(), notes=notes, say=lambda _: None)
    assert mode == "fused"
    assert (learner.done, collector.done) == (["fuse", "capture"], ["compile", "capture"])
    assert notes[0] == "rollouts are not fused: the network is a CNN."
    assert notes[1].startswith("compile fused: the update runs in kernels; took")


def test_the_update_stays_compiled_when_stepping_cannot_be(monkeypatch):
    def fail(env):
        raise CompileError("no such kernel")

    monkeypatch.setattr("fastppo.builders.compiling._compile_env", fail)
    learner, collector, notes = Parts(), Parts(), []
    assert compile_parts("on", 1, learner, collector, Parts(), World(), notes=notes, say=print)[0] == "on"
    assert learner.done == collector.done == ["compile"]
    assert notes[0] == "stepping is eager: it can't be compiled: no such kernel."


def test_the_update_stays_compiled_when_acting_cannot_be():
    learner, notes = Parts(), []
    mode, _ = compile_parts("on", 1, learner, Parts(compiles=False), Parts(), World(), notes=notes, say=print)
    assert (mode, learner.done) == ("on", ["compile"])
    assert notes[0] == "acting is eager: it can't be compiled: there is no C++ compiler."
    assert notes[1].startswith("compile on: requested")


def test_a_requested_graph_that_cannot_be_captured_is_an_error():
    with pytest.raises(CaptureError, match="looks at values"):
        compile_parts("graph", 1, Parts(), Parts(records=False), Parts(), World(), notes=[], say=print)


def test_graphs_on_a_cpu_are_refused_before_a_run_folder_is_made(tmp_path, monkeypatch):
    monkeypatch.delitem(RECORDERS, "cpu")  # which only the tests have
    with pytest.raises(ConfigError, match=r"CUDA graphs, but the device is cpu; use compile=auto, fused, on or off"):
        Trainer(short(tmp_path, run_dir=tmp_path / "run", compile="graph"))
    assert not (tmp_path / "run").exists()


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Fake a machine with 64 cores; return a function that writes one of its control group files."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    def write(path, text):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text(text)

    return write


def test_a_cpu_quota_limits_usable_cores(machine, tmp_path, monkeypatch):
    assert usable_cores(tmp_path) == 64, "no control groups"
    machine("proc/self/cgroup", "0::/pods/mine\n")
    assert usable_cores(tmp_path) == 64
    machine("sys/fs/cgroup/pods/mine/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == 64
    machine("sys/fs/cgroup/pods/cpu.max", "850000 100000\n")
    assert usable_cores(tmp_path) == 8, "the quota of a parent group applies"
    machine("sys/fs/cgroup/pods/mine/cpu.max", "20000 100000\n")
    assert usable_cores(tmp_path) == 1, "at least one core"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    machine("sys/fs/cgroup/pods/mine/cpu.max", "max 100000\n")
    assert usable_cores(tmp_path) == 2, "the ranks of one machine share its cores"


@pytest.mark.parametrize(
    ("mine", "parents", "processes", "cores"),
    [(64, 64, 8, 8), (8, 64, 8, 8), (8, 8, 8, 1), (32, 64, 8, 8), (4, 64, 1, 4), (1, 64, 2, 1)],
    ids=[
        "all of one machine",
        "each bound to its own",
        "a container's cores",
        "half of one machine",
        "taskset",
        "a core each",
    ],
)
def test_ranks_share_cores_unless_each_is_bound_to_its_own(tmp_path, monkeypatch, mine, parents, processes, cores):
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(parents if pid else mine)))
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
    assert usable_cores(tmp_path) == cores


def test_a_cgroup_v1_quota_limits_usable_cores(machine, tmp_path):
    machine("proc/self/cgroup", "4:cpu,cpuacct:/docker/x\n3:memory:/docker/x\n")
    machine("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "200000\n")  # a container sees its own group as the root
    machine("sys/fs/cgroup/cpu/cpu.cfs_period_us", "100000\n")
    assert usable_cores(tmp_path) == 2
    machine("sys/fs/cgroup/cpu/cpu.cfs_quota_us", "-1\n")
    assert usable_cores(tmp_path) == 64


class Own(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(4, 32), torch.nn.SiLU())
        self.heads = torch.nn.Linear(32, 3)

    def forward(self, x):
        out = self.heads(self.body(x))
        return out[:, :2], out[:, 2]


def test_a_custom_network_acts_the_same_compiled_and_eager(tmp_path):
    how = {"vectorization": "pool", "workers": 2, "half_batches": True}
    runs = {}
    for mode in ("off", "on"):
        torch.manual_seed(0)
        sizes = {"n_envs": 6, "n_steps": 32, "total_timesteps": 192 * 3, "n_minibatches": 2, "threads": 1}
        config = Config(run_dir=tmp_path / mode, compile=mode, normalize_obs=True, **sizes, **how)
        trainer = Trainer(config, policy=Own())
        trainer.run()
        runs[mode] = trainer.rollout.tensors() | {"parameters": trainer.update.parameters.vector}
    assert torch.equal(runs["on"]["actions"], runs["off"]["actions"])
    for name in ("params", "values", "logprobs", "parameters"):
        torch.testing.assert_close(runs["on"][name], runs["off"][name], rtol=1e-4, atol=1e-5)


def test_compiled_acting_is_not_captured(tmp_path):
    """A CUDA run whose policy acts on the CPU requests both; a capture of compiled code would repeat its outputs."""
    sizes = {"n_envs": 2, "n_steps": 8, "total_timesteps": 64}
    config = Config(**sizes, learning_rate=1e-12, compile="off", threads=1, run_dir=tmp_path / "run")
    trainer = Trainer(config, policy=Own())
    trainer.collect.compile()
    trainer.collect.capture()
    trainer.run()
    r = trainer.rollout
    params, values = trainer.policy.network(r.obs[:-1].flatten(0, 1))
    assert len(r.values.unique()) > 8
    torch.testing.assert_close(r.values.flatten(), values, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(r.params.flatten(0, 1), params, rtol=1e-4, atol=1e-5)


def freeze(network):
    network.body.requires_grad_(False)


def remove(network):
    network.heads.bias = None


def add(network):
    network.more = torch.nn.Linear(1, 1)


def assign(network):
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)


@pytest.mark.parametrize(
    ("change", "name"),
    [(freeze, "body.0.weight"), (remove, "heads.bias"), (add, "more.weight"), (assign, "body.0.weight")],
)
def test_check_rejects_parameters_changed_after_flattening(change, name):
    network = Own()
    flat = FlatParameters(network)
    flat.check()
    network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()})  # copies in place
    flat.check()
    change(network)
    with pytest.raises(ConfigError, match=f"network parameter {name} was replaced, moved, frozen or added"):
        flat.check()


def test_a_run_stops_when_its_parameters_are_replaced(tmp_path):
    config = Config(n_envs=2, n_steps=8, total_timesteps=160, compile="off", run_dir=tmp_path / "run")
    trainer = Trainer(config, policy=Own())
    network = trainer.policy.network
    with pytest.raises(Exception, match=r"network parameter body.0.weight was replaced, moved, frozen or added"):
        for stats in trainer.iterations():
            if stats.iteration == 2:
                network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()})  # copies in place
            if stats.iteration == 4:
                network.load_state_dict({k: v.clone() for k, v in network.state_dict().items()}, assign=True)
    assert trainer.progress.iteration == 4


def test_a_note_reports_a_setting_without_a_value_for_the_environment(tmp_path):
    sizes = {"n_envs": 2, "n_steps": 8, "total_timesteps": 16, "compile": "off"}
    given = {"env_id": "Pendulum-v1", "target_return": "threshold", "profile": "cleanrl"}
    trainer = Trainer(Config(**sizes, **given, n_minibatches=1, run_dir=tmp_path / "a"))
    assert "target_return threshold: Pendulum-v1 has none; training runs all steps." in trainer.notes
    trainer.run()
    trainer = Trainer(Config(**sizes, env_id="MountainCar-v0", profile="tuned", run_dir=tmp_path / "b"))
    assert "profile tuned: no measured setting for MountainCar-v0; CleanRL's defaults are used." in trainer.notes
    trainer.run()
