"""The contract with CUDA, on any machine: training, resuming and falling back on a fake GPU (`tests/fake_cuda.py`)."""

import json
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from torch.utils._pytree import tree_map

from fastppo import SimulatorEnv, Trainer
from fastppo.analysis.doctor import _gae
from fastppo.builders.compiling import compile_parts
from fastppo.builders.resolve import resolve_config
from fastppo.envs.make_envs import TASKS, inspect_env
from fastppo.errors import CaptureError, EnvError, FastPPOError, innermost
from fastppo.functional.gae import choose_gae, gae_doubling, gae_loop, triton_failure
from fastppo.monitoring.health import check_health
from fastppo.monitoring.health_rules import RunTraits, rounding_of
from fastppo.monitoring.history import History
from fastppo.resume_run import resume
from fastppo.runtime import compile as compiling
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.distributed import World
from fastppo.runtime.graphs import capture
from tests.envs.test_trees import Grid, HallTask
from tests.envs.trees import Scene
from tests.envs.worlds import Counter
from tests.fake_cuda import GPU
from tests.runtime.test_distributed import torchrun
from tests.test_log_info import Simulator
from tests.worlds import ACTIONS, SumTask, short

CUDA, CPU = torch.device("cuda:0"), torch.device("cpu")


@pytest.fixture
def gpu(monkeypatch):
    """A machine with two fake GPUs, a working Triton kernel, and a compiler that returns what it is given."""
    fake = GPU(count=2)
    fake.install(monkeypatch)
    for name, task in {HALL["env_id"]: HallTask, **dict.fromkeys(ACTIONS, SumTask)}.items():
        monkeypatch.setitem(TASKS, name, task)
    triton(monkeypatch, gae_doubling)
    for module in ("ppo.learner", "ppo.minibatch_step", "ppo.curiosity", "policies.actors", "builders.compiling"):
        monkeypatch.setattr(f"fastppo.{module}.compile_graph", lambda fn, example: fn)
    with fake, torch.autograd.set_multithreading_enabled(False):  # a CPU build of torch has no thread for a GPU
        yield fake
    triton_failure.cache_clear()


def triton(monkeypatch, kernel):
    """Make `kernel` the Triton kernel."""
    monkeypatch.setitem(sys.modules, "fastppo.kernels.gae", types.SimpleNamespace(gae_triton=kernel))
    triton_failure.cache_clear()


HALL = {"env_id": "fastppo-tests/Hall-v0"}  # Dict observations with a mask of allowed actions, in tensors
SCENE = {"vectorization": "sync", "env_id": "Scene"}  # the same on the host
# What a `make_env` gives for a way of stepping that stands for no vectorization
SIMULATORS = {
    "simulator": lambda: SimulatorEnv(OnDevice(Simulator()), Box(-1, 1, (2,), np.float32), Discrete(2)),
    "masked simulator": lambda: SimulatorEnv(OnDevice(Grid("extras")), Grid.space, Discrete(4), mask_key="legal"),
}


class OnDevice:
    """A simulator whose tensors are on the GPU."""

    def __init__(self, inner):
        self.inner, self.num_envs = inner, inner.num_envs

    def reset(self):
        return to_gpu(self.inner.reset())

    def step(self, actions):
        return to_gpu(self.inner.step(actions.cpu()))


def to_gpu(found):
    return tree_map(lambda x: x.to(CUDA) if isinstance(x, torch.Tensor) else x, found)


def make(tmp_path, name="run", **settings):
    defaults = {"vectorization": "tensor", "env_id": "CartPole-v1", "device": "cuda", "n_steps": 4, "record_ratios": 0}
    settings = defaults | {"total_timesteps": 2 * 4 * 3} | settings
    maker = maker_of(settings["vectorization"], settings["env_id"])
    if settings["vectorization"] in SIMULATORS:
        settings |= {"vectorization": "auto", "n_envs": None, "n_minibatches": 1, "total_timesteps": 3 * 4 * 3}
    return Trainer(short(tmp_path, run_dir=tmp_path / name, **settings), make_env=maker)


def maker_of(vectorization, env_id="CartPole-v1"):
    """Return the make_env of a run; None: a tensor environment."""
    host = Scene if env_id == "Scene" else Counter
    return None if vectorization == "tensor" else SIMULATORS.get(vectorization, host)


def vector(trainer):
    return trainer.update.parameters.vector.detach().cpu()


WAYS = {
    "tensor": {},
    "tensor, bf16": {"precision": "bf16"},
    "host, acting on the GPU": {"vectorization": "sync", "act_device": "cuda"},
    "host, acting on the CPU": {"vectorization": "sync", "act_device": "cpu"},
    "host, normalised": {
        "vectorization": "sync",
        "act_device": "auto",
        "normalize_obs": True,
        "normalize_rewards": True,
    },
    "tensor, RND": {"rnd": True},
    "host, RND, acting on the CPU": {"vectorization": "sync", "act_device": "cpu", "rnd": True},
    "tensor, LSTM": {"memory": "lstm", "segment_length": 2},
    "tensor, minGRU": {"memory": "mingru"},
    "host, GRU, acting on the CPU": {"vectorization": "sync", "act_device": "cpu", "memory": "gru"},
    "host, LSTM, acting on the GPU": {"vectorization": "sync", "act_device": "cuda", "memory": "lstm"},
    "tensor, penalty": {"objective": "penalty", "target_kl": 0.01, "kl_stop": "minibatch"},
    "tensor, adaptive rate": {"learning_rate": "adaptive:3e-4:1e-5:1e-2"},
    "tensor, Muon": {"optimizer": "muon", "hidden_sizes": (16, 16)},
    "tensor, squashed": {"env_id": "Pendulum-v1", "action_distribution": "squashed", "state_dependent_std": True},
    "tensor, beta": {"env_id": "Pendulum-v1", "action_distribution": "beta"},
    "tensor, images": {"env_id": "fastppo/Catch-v0"},
    "tensor, Acrobot": {"env_id": "Acrobot-v1"},
    "tensor, MountainCarContinuous": {"env_id": "MountainCarContinuous-v0"},
    "tensor, choices": {"env_id": "fastppo-tests/Choices-v0"},
    "tensor, bits": {"env_id": "fastppo-tests/Bits-v0", "objective": "clip_and_penalty"},
    "tensor, Dict and masks": HALL | {"normalize_obs": True},
    "tensor, Dict, masks, memory and RND": HALL | {"memory": "mingru", "rnd": True},
    "host, Dict and masks, acting on the GPU": SCENE | {"act_device": "cuda"},
    "host, Dict and masks, acting on the CPU": SCENE | {"act_device": "cpu", "memory": "lstm"},
    "host, info, acting on the CPU": {"vectorization": "sync", "act_device": "cpu", "log_info": ("*",)},
    "simulator, info": {"vectorization": "simulator", "log_info": ("success", "terms/*")},
    "simulator, Dict and masks": {"vectorization": "masked simulator", "critic_obs_keys": ("truth",)},
}
LEARNED = {  # what one epoch leaves behind, beside the parameters
    "plain": {},
    "RND": {"rnd": True},
    "adaptive rate and penalty": {"learning_rate": "adaptive:3e-4:1e-5:1e-2", "objective": "penalty"},
    "Muon": {"optimizer": "muon", "hidden_sizes": (16, 16)},
    "normalised": {"normalize_obs": True, "normalize_rewards": True},
    "memory": {"memory": "lstm"},
    "Dict and masks": HALL,
}


@pytest.mark.parametrize(
    ("way", "compile"), [*((way, "auto") for way in WAYS), ("tensor", "off"), ("host, acting on the GPU", "on")]
)
def test_a_run_starts_and_learns_on_a_gpu(gpu, tmp_path, way, compile):
    trainer = make(tmp_path, compile=compile, **WAYS[way])
    assert vector(trainer).dtype == torch.float32
    assert trainer.device == CUDA
    assert gpu.set[-1] == CUDA
    assert trainer.config.device == "cuda", "the config keeps what was typed"
    assert trainer.config.compile == {"auto": "graph"}.get(compile, compile)
    assert not any("memory is not planned" in note or "Triton" in note for note in trainer.notes)
    before = vector(trainer)
    result = trainer.run()
    assert result.global_step == trainer.n_iterations * trainer.rollout.rewards.numel()
    assert bool(gpu.replays) == (compile == "auto")
    assert not torch.equal(vector(trainer), before)
    assert gpu.stream is gpu.main


@pytest.mark.parametrize("way", [way for way in WAYS if "simulator" not in way and "bf16" not in way])
def test_graphs_on_a_gpu_train_like_eager_code(gpu, tmp_path, way):
    runs = [make(tmp_path, compile, compile=compile, **WAYS[way]) for compile in ("off", "graph")]
    for trainer in runs:
        trainer.run()
    torch.testing.assert_close(*(vector(trainer) for trainer in runs), atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")
@pytest.mark.parametrize("changes", LEARNED.values(), ids=list(LEARNED))
def test_rollout_and_update_read_nothing_on_the_host(gpu, tmp_path, changes):
    for compile in ("off", "graph"):
        trainer = make(tmp_path, compile, compile=compile, target_kl=0.01, **changes)
        torch.cuda.set_sync_debug_mode("error")
        trainer.learner.anneal(0.0)
        if compile == "graph":
            trainer.collect()
        trainer.learner(watch=False)
        torch.cuda.set_sync_debug_mode("default")
        trainer.run()


@pytest.mark.parametrize(("typed", "vectorization"), [("cuda", "tensor"), ("auto", "sync"), ("cuda:1", "tensor")])
def test_a_run_on_a_gpu_resumes(gpu, tmp_path, typed, vectorization):
    trainer = make(tmp_path, device=typed, vectorization=vectorization, compile="off")
    trainer.run()
    saved = json.loads((trainer.run_dir / "config.json").read_text())
    assert saved["device"] == {"auto": "cuda"}.get(typed, typed)
    again = resume(trainer.run_dir, total_timesteps=48, make_env=Counter if vectorization == "sync" else None)
    assert again.device == torch.device("cuda:1" if typed == "cuda:1" else "cuda:0")
    assert torch.equal(vector(again), vector(trainer))
    assert again.run().global_step == 48


@pytest.mark.parametrize("changes", LEARNED.values(), ids=list(LEARNED))
def test_a_resumed_run_on_a_gpu_repeats_the_bits_of_one_that_never_stopped(gpu, tmp_path, changes):
    whole = make(tmp_path, "whole", compile="graph", total_timesteps=32, **changes)
    whole.run()
    half = make(tmp_path, "half", compile="graph", total_timesteps=32, checkpoint_every=16, **changes)
    for stats in half.iterations():
        if stats.global_step == 16:
            break
    again = resume(half.run_dir)
    assert any("exact" in note for note in again.notes)
    assert again.config.compile == "graph"
    again.run()
    assert torch.equal(vector(again), vector(whole))


RANK = """
import json, sys
from pathlib import Path
import pytest, torch
from fastppo import Config, Trainer
from fastppo.resume_run import resume
from tests.fake_cuda import GPU

patch = pytest.MonkeyPatch()
gpu = GPU(count=2)
gpu.install(patch)
start = torch.distributed.init_process_group

def start_without_nccl(backend, **more):
    assert backend == "cpu:gloo,cuda:nccl"
    start("gloo", **more)

patch.setattr(torch.distributed, "init_process_group", start_without_nccl)
run_dir = Path(sys.argv[1])
settings = dict(n_envs=2, n_steps=4, n_minibatches=2, update_epochs=2, total_timesteps=32, device="cuda")
with gpu, torch.autograd.set_multithreading_enabled(False):
    trainer = Trainer(Config(run_dir=run_dir, compile="off", vectorization="auto", **settings))
    trainer.run()
    again = resume(run_dir, total_timesteps=64)
    found = [str(trainer.device), str(again.device), again.config.device, again.run().global_step, gpu.set[-1].index]
    for name, changes in json.loads(sys.argv[2]).items():
        for compile in ("off", "graph"):
            c = Config(run_dir=run_dir / name / compile, compile=compile, vectorization="tensor", **settings | changes)
            one = Trainer(c)
            one.run()
            found.append(one.update.parameters.vector.double().sum().item())
    assert gpu.replays
    (run_dir / f"found-{trainer.world.rank}.json").write_text(json.dumps(found))
"""


def test_two_ranks_start_resume_and_capture_on_a_gpu_each(tmp_path):
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    features = {
        "plain": {},
        "RND, normalised, penalty": {"rnd": True, "normalize_rewards": True, "objective": "clip_and_penalty"},
        "Muon, adaptive, memory": {
            "optimizer": "muon",
            "hidden_sizes": (16, 16),
            "learning_rate": "adaptive:3e-4:1e-5:1e-2",
            "memory": "gru",
        },
    }
    done = torchrun(str(script), str(tmp_path / "run"), json.dumps(features), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    first, second = (json.loads((tmp_path / "run" / f"found-{k}.json").read_text()) for k in (0, 1))
    assert first[:5] == ["cuda:0", "cuda:0", "cuda", 64, 0]
    assert second[:5] == ["cuda:1", "cuda:1", "cuda", 64, 1]
    assert first[5:] == second[5:], "parameters are bit-identical on every process"
    for eager, captured in zip(first[5::2], first[6::2], strict=True):
        assert eager == pytest.approx(captured, abs=1e-5), "captured all-reduces train like eager ones"


# --- captures that fail


def assert_clean(gpu):
    """A failed capture left nothing behind in torch."""
    assert gpu.stream is gpu.main
    assert gpu.sync_mode == 0
    assert not gpu.recording, "the allocator counts a capture as under way"
    assert not gpu.generator_captures, "the default generator would refuse to draw"


STAGES = ["warm-up", "begin", "inside", "end", "replay"]


@pytest.mark.parametrize(
    ("stage", "error"),
    [(stage, RuntimeError("the cause")) for stage in STAGES]
    + [("inside", subprocess.CalledProcessError(1, ["gcc"])), ("replay", torch.OutOfMemoryError("the cause"))],
    ids=[*STAGES, "no compiler", "no memory"],
)
def test_a_run_goes_on_eagerly_after_a_failed_capture(gpu, tmp_path, stage, error):
    eager = make(tmp_path, "eager", compile="off")
    eager.run()
    gpu.fails[stage] = error
    trainer = make(tmp_path, "graph", compile="auto")
    assert not gpu.fails, "the failure happened"
    assert_clean(gpu)
    assert trainer.config.compile == "off"
    (note,) = (note for note in trainer.notes if note.startswith("compile off: it can't be captured as a graph"))
    assert ("the cause" in note) or ("gcc" in note)
    assert ("must not look at values" in note) == (type(error) is RuntimeError)
    trainer.run()
    assert torch.equal(vector(trainer), vector(eager)), "the attempt changed nothing"


@pytest.mark.parametrize("stage", STAGES)
def test_a_requested_graph_that_fails_names_its_first_cause(gpu, tmp_path, stage):
    gpu.fails[stage] = RuntimeError("the cause")
    with pytest.raises(CaptureError, match=r"can't be captured as a graph \(.*the cause\)"):
        make(tmp_path, compile="graph")
    assert_clean(gpu)


def test_acting_alone_can_be_eager(gpu, tmp_path):
    trainer = make(tmp_path, compile="off", vectorization="sync", act_device="cuda")
    trainer.run()
    failing = make(tmp_path, "failing", compile="off", vectorization="sync", act_device="cuda")
    failing.learner.capture()
    gpu.fails["inside"] = RuntimeError("the cause")
    with pytest.raises(CaptureError, match="the cause"):
        failing.collect.capture()
    failing.run()
    torch.testing.assert_close(vector(failing), vector(trainer), atol=1e-6, rtol=0)


def test_a_host_read_is_found_before_the_capture_begins(gpu, monkeypatch):
    begun = []
    monkeypatch.setattr("tests.fake_cuda.Graph.capture_begin", lambda *_, **__: begun.append(1))
    x = torch.ones(2, device=CUDA)
    with pytest.raises(CaptureError, match=r"before the capture: called a synchronizing .*must not look at values"):
        capture(lambda: x.mul_(x.sum().item()), keep=[x], fresh=[], device=CUDA)
    assert not begun
    assert x.tolist() == [1, 1]


def test_a_capture_warns_of_nothing(gpu, recwarn):
    """torch warns where the debug mode of the warm-up is first set; where warnings are errors, no run would start."""
    x = torch.ones(2, device=CUDA)
    capture(lambda: x.add_(1), keep=[x], fresh=[], device=CUDA)()
    assert gpu._warned
    assert not recwarn.list


def test_each_warm_up_begins_with_the_same_contents(gpu):
    x, seen = torch.zeros(1, device=CUDA), []

    def work():
        if gpu.sync_mode == 0 and gpu.graph is None:
            seen.append(x.item())
        x.add_(1)

    replay = capture(work, keep=[x], fresh=[], device=CUDA)
    assert seen == [0, 0]
    assert x.tolist() == [0]
    replay()
    replay()
    assert x.tolist() == [2]


def test_backward_passes_of_traces_and_captures_run_in_the_calling_thread(gpu, monkeypatch):
    found = []

    def work():
        found.append(torch._C._is_multithreading_enabled())

    with torch.autograd.set_multithreading_enabled(True):
        capture(work, keep=[], fresh=[], device=CUDA)
        assert found == [False] * 4
    monkeypatch.setattr(torch._inductor, "compile", lambda graph, *_, **__: graph)

    def traced(x):
        work()
        return x + 1

    found.clear()
    with torch.autograd.set_multithreading_enabled(True):
        capture(lambda: found.append(torch._C._is_multithreading_enabled()), keep=[], fresh=[], device=CPU)
        compile_graph(traced, [torch.zeros(1)])
    assert found == [False] * 2


@pytest.mark.parametrize("n_steps", [1, 2, 3])
def test_rollouts_of_one_or_two_steps_can_be_captured(gpu, tmp_path, n_steps):
    settings = {"vectorization": "sync", "act_device": "cuda", "n_steps": n_steps, "total_timesteps": 2 * n_steps * 3}
    settings["n_minibatches"] = 1
    runs = [make(tmp_path, compile, compile=compile, **settings) for compile in ("off", "graph")]
    assert runs[1].collect.actors[0]._replay is not None
    for trainer in runs:
        trainer.run()
    torch.testing.assert_close(*(vector(trainer) for trainer in runs), atol=1e-6, rtol=0)


# --- memory


@pytest.mark.parametrize("compile", ["off", "graph"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"env_id": "Pendulum-v1", "normalize_obs": True, "normalize_rewards": True},
        {"rnd": True},
        {"memory": "lstm", "segment_length": 4},
        HALL | {"memory": "mingru"},
        {"optimizer": "muon", "hidden_sizes": (16, 16)},
        {"env_id": "fastppo/Catch-v0", "n_envs": 32, "total_timesteps": 2 * 32 * 8},
    ],
    ids=["plain", "normalised", "RND", "LSTM", "Dict, masks and minGRU", "Muon", "images"],
)
def test_the_memory_plan_covers_live_tensors_and_the_pools_of_graphs(gpu, tmp_path, changes, compile):
    """Against a model of torch's allocator: a graph's pool keeps the most that was alive in it."""
    settings = {"n_envs": 2048, "n_steps": 8, "n_minibatches": 4, "total_timesteps": 2 * 2048 * 8}
    trainer = make(tmp_path, compile=compile, **settings | changes)
    assert bool(gpu.memory.taken) == (compile == "graph")
    trainer.run()
    # neither the environments' own memory is planned, nor that of networks, which exist when it is made
    own = sum(x.inner.nbytes for x in trainer.env.capturable_state.values())
    curiosity = trainer.learner.curiosity
    own += 0 if curiosity is None else sum(x.numel() * x.element_size() for x in curiosity.rnd.state_dict().values())
    # RND's advantages are computed beside those of the environment's rewards, which are small and not planned
    planned = trainer.memory.total * (1 if curiosity is None else 1.05)
    assert 0.4 * planned < gpu.memory.peak - own < planned, (gpu.memory.peak, gpu.memory.taken, own, trainer.memory)


# --- kernels that do not work

BROKEN = {
    "no compiler": (subprocess.CalledProcessError(1, ["gcc", "cuda_utils.c"]), "CalledProcessError: .*gcc"),
    "no headers": (RuntimeError("Python.h: No such file\nmore"), r"RuntimeError: Python.h: No such file\)"),
    "not installed": (ImportError("No module named 'triton'"), "ImportError: No module"),
    "wrong": (None, "ArithmeticError: its results differ from those of doubling"),
}


@pytest.mark.parametrize(("error", "why"), BROKEN.values(), ids=list(BROKEN))
def test_a_triton_kernel_that_does_not_work_is_replaced(gpu, monkeypatch, tmp_path, error, why):
    def kernel(*inputs):
        if error is not None:
            raise error
        return tuple(x + 1e-2 for x in gae_doubling(*inputs))

    triton(monkeypatch, kernel)
    assert choose_gae(8, 2, CUDA) is gae_doubling
    found = _gae(CUDA)
    assert found.state == "note"
    assert re.search(why.removesuffix(r"\)"), found.advice)
    trainer = make(tmp_path, compile="auto")
    (note,) = (note for note in trainer.notes if "Triton" in note)
    assert note.startswith("advantages use gae_doubling: the Triton kernel does not work here (")
    assert re.search(why, note)
    assert trainer.run().global_step == 24


def test_a_triton_kernel_that_works_is_chosen(gpu, monkeypatch):
    calls = []

    def kernel(*inputs):
        (trajectory, *_) = inputs
        calls.append(trajectory.rewards.shape)
        assert all(x.is_contiguous() for x in trajectory)
        assert trajectory.next_values.isnan().any()
        return gae_doubling(*inputs)

    triton(monkeypatch, kernel)
    assert choose_gae(8, 2, CUDA) is kernel
    assert choose_gae(8, 2, CUDA) is kernel
    assert len(calls) == 1, "tried once"
    assert choose_gae(8, 2, CPU) is gae_doubling


def test_a_compiled_function_that_fails_at_its_first_call_is_not_used(gpu, monkeypatch):
    def fails(*tensors):
        raise subprocess.CalledProcessError(1, ["gcc"])

    monkeypatch.setattr(compiling, "make_fx", lambda fn, **_: lambda *x: torch.fx.symbolic_trace(torch.nn.Identity()))
    monkeypatch.setattr(torch._inductor, "compile", lambda *_, **__: fails)
    with pytest.raises(CompileError, match="CalledProcessError: .*gcc"):
        compile_graph(lambda x: x + 1, [torch.zeros(3, device=CUDA)])


def test_acting_is_compiled_on_a_gpu_and_captured_as_compiled(gpu, monkeypatch, tmp_path):
    compiled = []

    def compiler(fn, example):
        compiled.append(fn.__name__)
        return fn

    monkeypatch.setattr("fastppo.policies.actors.compile_graph", compiler)
    trainer = make(tmp_path, compile="graph", vectorization="sync", act_device="cuda")
    assert compiled == ["act"]
    (actor,) = trainer.collect.actors
    assert actor._compiled
    assert actor._replay is not None
    trainer.run()


# --- rounding


@pytest.mark.parametrize(
    ("device", "bf16", "fine", "wrong"),
    [(CPU, False, 0.009, 0.011), (CUDA, False, 0.04, 0.06), (CUDA, True, 0.29, 0.5), (CPU, True, 0.29, 0.5)],
    ids=["float32", "TF32", "bf16 on CUDA", "bf16 on the CPU"],
)
def test_the_tolerance_of_the_first_ratio_follows_the_precision(device, bf16, fine, wrong):
    traits = RunTraits(rounding=rounding_of("bf16" if bf16 else "fp32", device.type))
    for error, expected in ((fine, []), (wrong, ["first ratio not 1"])):
        history = History()
        history.add({"samples/first_ratio_error": error}, times=40)
        assert [finding.name for finding in check_health(history, traits)] == expected


def test_a_run_on_a_gpu_knows_its_rounding(gpu, tmp_path):
    assert make(tmp_path, compile="off").logger.health.traits.rounding == "tf32"


# --- several ranks


@pytest.fixture
def second(monkeypatch):
    """Rank 1 of 2, without a process group; the list is what rank 0 sends next, and None is its vote."""
    sent = []

    def broadcast(outcome, source):
        assert source == 0
        outcome[:] = sent.pop(0)

    def gather(votes, mine):
        votes[:] = [sent.pop(0) if sent else None, mine]

    monkeypatch.setattr(torch.distributed, "broadcast_object_list", broadcast)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gather)
    return World(1, 2), sent


def fail(message="measured on the wrong rank"):
    raise AssertionError(message)


def test_rank_0_measures_the_vectorisation_for_all(second, monkeypatch, tmp_path):
    world, sent = second
    monkeypatch.setattr("fastppo.builders.resolve.choose_vectorization", lambda *_, **__: fail())
    sent.append([({"vectorization": "pool"}, "vectorization pool: measured"), None])
    config = short(tmp_path, vectorization="auto")
    c, notes = resolve_config(config, inspect_env("CartPole-v1", {}), CPU, world=world)
    assert c.vectorization == "pool"
    assert notes[-1] == "vectorization pool: measured"


def test_rank_0_measures_the_acting_device_for_all(gpu, second, monkeypatch, tmp_path):
    from fastppo.builders.parts import build_collector

    world, sent = second
    trainer = make(tmp_path, compile="off", vectorization="sync", act_device="cuda")
    monkeypatch.setattr("fastppo.builders.parts.choose_act_device", lambda *_: fail())
    sent.append([("cpu", "measured"), None])
    config, notes = trainer.config, []
    _, place = build_collector(config, trainer.env, trainer.policy, trainer.rollout, trainer.clock, world, notes=notes)
    assert place == "cpu"
    assert notes == ["act_device cpu: measured."]


def test_rank_0_chooses_the_threads_for_all(monkeypatch, tmp_path):
    """With different threads, sums round differently, and the parameters of the ranks drift apart."""

    class Second(World):
        def shared(self, make):
            return (3, ["measured by rank 0"]) if "_free_threads" in make.__code__.co_names else make()

    monkeypatch.setattr("fastppo.builders.run.join_world", lambda _: Second())
    monkeypatch.setattr("fastppo.builders.run._free_threads", lambda *_: fail())
    monkeypatch.setattr("fastppo.builders.run.set_threads", lambda _: None)
    trainer = Trainer(short(tmp_path, compile="off"))
    assert trainer.config.threads == 3
    assert "measured by rank 0" in trainer.notes


@pytest.mark.parametrize("kernel", [gae_loop, gae_doubling])
def test_every_rank_votes_on_compiling_whatever_its_kernel(kernel, monkeypatch, tmp_path):
    """Triton may work on some ranks only; a rank that skipped the vote would wait in the next one for ever."""
    votes = []

    class Counting(World):
        def together(self, attempt, error, *, collective=False):
            votes.append(attempt())
            return votes[-1]

    trainer = Trainer(short(tmp_path, compile="off"))
    learner = trainer.learner
    learner.gae = kernel
    monkeypatch.setattr("fastppo.ppo.learner.compile_graph", lambda fn, _: fn)
    monkeypatch.setattr(learner.update, "compile", lambda *_: None)
    monkeypatch.setattr(learner.update, "world", Counting())
    learner.compile()
    assert len(votes) == 1


@pytest.mark.parametrize("error", [EnvError("rank 0 can't"), ValueError("rank 0 can't")], ids=["ours", "another's"])
def test_an_error_of_rank_0_reaches_every_rank(monkeypatch, error):
    sent = []
    monkeypatch.setattr(torch.distributed, "broadcast_object_list", lambda outcome, _: sent.append(list(outcome)))

    def make_it():
        raise error

    with pytest.raises(type(error), match="rank 0 can't"):
        World(0, 2).shared(make_it)
    monkeypatch.setattr(
        torch.distributed, "broadcast_object_list", lambda outcome, _: outcome.__setitem__(slice(None), sent[0])
    )
    with pytest.raises(FastPPOError, match="rank 0 can't"):
        World(1, 2).shared(make_it)


def test_a_failure_of_one_rank_fails_all(second):
    world, sent = second
    assert world.together(lambda: 5, CaptureError) == 5
    sent.append("no memory")
    with pytest.raises(CaptureError, match="process 0: no memory"):
        world.together(lambda: 5, CaptureError)

    def mine():
        raise CaptureError("mine")

    with pytest.raises(CaptureError, match="^mine$"):
        world.together(mine, CaptureError)
    sent.append("theirs too")
    with pytest.raises(CaptureError, match="^mine$"):
        world.together(mine, CaptureError, collective=True)
    for attempt in (mine, lambda: 5):
        sent += ["theirs"] if attempt is not mine else [None]
        with pytest.raises(FastPPOError, match="can't complete any more. Start again with compile off") as caught:
            world.together(attempt, CaptureError, collective=True)
        assert not isinstance(caught.value, CaptureError)


@pytest.mark.parametrize(("wanted", "raises"), [("auto", False), ("graph", True)])
def test_a_requested_capture_of_acting_that_fails_on_one_rank_fails_on_all(gpu, second, tmp_path, wanted, raises):
    """A rank that went on alone would wait for the others in the first collective operation."""
    world, sent = second
    trainer = make(tmp_path, compile="off", vectorization="sync", act_device="cuda")

    def fuse(_):
        raise CompileError("no kernels")

    parts = {"update": trainer.update, "compile": list, "capture": list, "fuse": fuse}
    learner, notes = types.SimpleNamespace(device=CUDA, **parts), []
    arguments = (1, learner, trainer.collect, trainer.env, world)
    sent.append("rank 0 could not")
    with pytest.raises(CaptureError, match="process 0: rank 0 could not"):
        compile_parts("graph", *arguments, notes=notes, say=notes.append)
    sent.append(None)
    gpu.fails["inside"] = RuntimeError("the cause")
    if raises:
        with pytest.raises(CaptureError, match="the cause"):
            compile_parts(wanted, *arguments, notes=notes, say=notes.append)
    else:
        assert compile_parts(wanted, *arguments, notes=notes, say=notes.append)[0] == "graph"
        assert any(note.startswith("acting is eager: it can't be captured") for note in notes)
    trainer.run()


@pytest.mark.parametrize("vote", range(3))
def test_every_rank_falls_back_at_the_stage_where_another_failed(gpu, second, vote):
    """The votes follow the warm-up, the capture and the first replay; only the second has begun nothing."""
    world, sent = second
    x = torch.ones(2, device=CUDA)
    sent += [None] * vote + ["the cause"]
    expected = CaptureError if vote == 1 else FastPPOError
    with pytest.raises(expected, match="the cause") as caught:
        capture(lambda: x.add_(1), keep=[x], fresh=[], device=CUDA, world=world)
    assert isinstance(caught.value, CaptureError) == (vote == 1)
    assert x.tolist() == [1, 1]
    assert gpu.stream is gpu.main


def test_waiting_for_captured_collectives_ends_after_the_time_out(gpu, monkeypatch):
    World(1, 2).wait(CUDA)
    gpu.hangs = True
    World().wait(CUDA)  # alone there is nobody to wait for
    World(1, 2).wait(CPU)
    monkeypatch.setattr("fastppo.runtime.distributed._TIMEOUT", 0.02)
    with pytest.raises(FastPPOError, match="process 1 of 2 lost another process: .*captured collective operation"):
        World(1, 2).wait(CUDA)


def test_metrics_are_read_under_the_time_out(gpu, monkeypatch, tmp_path):
    trainer = make(tmp_path, compile="graph")
    trainer.learner.anneal(0.0)
    trainer.collect()
    measured = trainer.learner()
    waited = []
    monkeypatch.setattr(trainer.world, "wait", waited.append)
    trainer.metrics.read(measured)
    assert waited == [CUDA]
    trainer.run()


def test_the_innermost_error_is_the_one_that_clean_up_replaced():
    def chain():
        try:
            raise KeyError("first")
        finally:
            raise RuntimeError("clean-up failed")

    with pytest.raises(RuntimeError) as caught:
        chain()
    assert str(innermost(caught.value)) == "'first'"
    try:
        raise ValueError("ours") from None
    except ValueError as error:
        assert innermost(error) is error
