"""What a GPU would refuse, tested without one: device mistakes on torch's meta device, and the Triton kernels compiled.

A meta tensor has a shape and no contents, so a read on the host fails as it would stall a GPU.
"""

import contextlib
import importlib.util
import itertools
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import fastppo
from fastppo import Config
from fastppo.builders import parts
from fastppo.builders.resolve import resolve_config
from fastppo.envs.make_envs import TASKS, inspect_env
from fastppo.monitoring import update_samples
from fastppo.policies.mlp_layout import Linear, Trunk
from fastppo.policies.policy import Policy
from fastppo.runtime.clock import Clock
from fastppo.runtime.distributed import World
from tests.envs.test_trees import HallTask
from tests.worlds import ACTIONS, SumTask

META, WORLD = torch.device("meta"), World()


class OnlyMeta(TorchDispatchMode):
    """Refuses an operation that takes or returns a tensor on another device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, out)):
            if isinstance(x, torch.Tensor) and x.device != META:
                raise AssertionError(f"{func} on a tensor {list(x.shape)} on {x.device}")
        return out


def build(monkeypatch, **settings):
    """Return collector, learner and sampler of a run on the meta device."""
    # torch has neither generators nor autocast for meta tensors; captured code draws no random numbers
    for name, task in {HALL["env_id"]: HallTask, **dict.fromkeys(ACTIONS, SumTask)}.items():
        monkeypatch.setitem(TASKS, name, task)
    monkeypatch.setattr(parts, "generator", lambda *_: torch.Generator())
    monkeypatch.setattr(Policy, "_precision", lambda *_: contextlib.nullcontext())
    wanted = Config(vectorization="tensor", n_envs=6, n_steps=8, n_minibatches=2, update_epochs=3, **settings)
    info = inspect_env(wanted.env_id, wanted.env_kwargs)
    c, _ = resolve_config(wanted, info, torch.device("cpu"))
    clock, models = Clock(), parts.build_models(c, info, None, META, WORLD)
    env = parts.build_envs(c, info, META, WORLD, [], stream_offset=0)
    rollout = parts.build_rollout(c, env, models, META, WORLD)
    collector, _ = parts.build_collector(c, env, models.policy, rollout, clock, WORLD, notes=[])
    learning = parts.build_learning(c, env, models, rollout, clock, WORLD, n_iterations=1)
    return collector, learning.learner, learning.sampler


def roll(collector):
    """Collect a rollout, without its noise."""
    for actor in collector.actors:
        actor.begin()
    collector.roll()


EVERY_STEP = {"env_kwargs": {"max_episode_steps": 3}}  # several final observations in a rollout
HALL = {"env_id": "fastppo-tests/Hall-v0"}  # Dict observations with a mask of allowed actions
SETTINGS = {
    **{env_id: {"env_id": env_id, "kl_stop": "epoch"} for env_id in TASKS},
    "shared trunk": {"kl_stop": "minibatch", "shared_trunk": True, "sign_rewards": True},
    "normalised and truncated": {
        "env_id": "Pendulum-v1",
        "normalize_obs": True,
        "normalize_rewards": True,
        "normalize_advantages": "batch",
        "value_clip": "off",
        **EVERY_STEP,
    },
    "Dict and masks": HALL,
    "Dict, masks and memory": HALL | {"memory": "lstm", "normalize_obs": True},
    "Dict and critic": HALL | {"obs_keys": ("place",), "critic_obs_keys": ("goal",)},
    "RND": {"rnd": True},
    "RND with Dict": HALL | {"rnd": True, "rnd_proportion": 0.5},
    "RND with images": {"env_id": "fastppo/Catch-v0", "rnd": True},
    "penalty": {"objective": "penalty", "kl_stop": "minibatch"},
    "clip and penalty": {"objective": "clip_and_penalty", "env_id": "Pendulum-v1"},
    "adaptive rate": {"learning_rate": "adaptive:3e-4:1e-5:1e-2"},
    "Muon": {"optimizer": "muon", "hidden_sizes": (16, 16)},
    "squashed": {"env_id": "Pendulum-v1", "action_distribution": "squashed", "state_dependent_std": True},
    "beta": {"env_id": "Pendulum-v1", "action_distribution": "beta", "objective": "penalty"},
    "state-dependent deviations": {"env_id": "Pendulum-v1", "state_dependent_std": True, "shared_trunk": True},
    **{env_id: {"env_id": env_id, "objective": "clip_and_penalty", "memory": "mingru"} for env_id in ACTIONS},
    **{memory: {"memory": memory, "segment_length": 4, **EVERY_STEP} for memory in ("lstm", "gru", "mingru")},
    "everything": HALL
    | {
        "rnd": True,
        "memory": "gru",
        "optimizer": "muon",
        "hidden_sizes": (16, 16),
        "objective": "clip_and_penalty",
        "learning_rate": "adaptive:3e-4:1e-5:1e-2",
        "normalize_rewards": True,
    },
}


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=list(SETTINGS))
def test_a_rollout_and_an_update_read_nothing_and_stay_on_the_device(monkeypatch, settings):
    collector, learner, sampler = build(monkeypatch, **{"env_id": "CartPole-v1", "target_kl": 0.01} | settings)
    monkeypatch.setattr(update_samples, "_unchanged", contextlib.nullcontext)  # saves random states, on the host
    learner.anneal(0.0)
    with OnlyMeta():
        roll(collector)
        measured = learner(watch=False, on_epoch=sampler.measure)
        learner.update_obs_moments()
    assert measured.device == META


def test_an_early_stop_is_the_only_read_of_an_update(monkeypatch):
    collector, learner, _ = build(monkeypatch, env_id="CartPole-v1", target_kl=0.01)
    reads = []
    monkeypatch.setattr(learner.update, "_stopped", lambda: reads.append(1))
    learner.anneal(0.0)
    with OnlyMeta():
        roll(collector)
        learner()
    assert len(reads) == 3, "one after each epoch"


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        (lambda x: x * x.sum().item(), "item"),
        (lambda x: x * 2 if x.sum() > 0 else x, "meta"),
        (lambda x: x.cpu().to(META), "meta"),
        (lambda x: x * torch.tensor(2.0), "on cpu"),
        (lambda x: x[torch.arange(len(x))], "on cpu"),
    ],
    ids=["item", "if", "cpu", "scalar on the CPU", "indices on the CPU"],
)
def test_the_meta_device_finds_reads_and_tensors_on_the_cpu(monkeypatch, mistake, message):
    _, learner, _ = build(monkeypatch, env_id="CartPole-v1")
    encoder = learner.update.policy.encoder
    monkeypatch.setattr(encoder, "encode", lambda arrays: mistake(arrays[0]))
    learner.anneal(0.0)
    with OnlyMeta(), pytest.raises((AssertionError, RuntimeError, NotImplementedError), match=message):
        learner(watch=False)


class Kernel(NamedTuple):
    """A Triton kernel as its caller launches it: types of pointers and numbers, and compile-time constants."""

    id: str
    module: str
    name: str
    types: dict[str, str]
    constants: dict[str, object]
    cases: tuple[str, ...]
    options: dict[str, int]


GAE = Kernel(
    "GAE",
    "fastppo.kernels.gae",
    "_kernel",
    dict.fromkeys(("rewards", "values", "next_values", "gamma_at", "lambda_at", "advantages", "returns"), "*fp32")
    | dict.fromkeys(("terminated", "done"), "*u8")
    | dict.fromkeys(("n_steps", "n_envs"), "i32"),
    {"BLOCK_T": 64, "BLOCK_N": 32},
    ("any", "aligned", "one environment"),
    {},
)


def rollout_kernels():
    """The rollout kernel for networks of 64 x 64 units, and the kernel of its values."""
    if importlib.util.find_spec("triton") is None:
        return []
    from fastppo.kernels.rollout import _BLOCK, _BLOCK_ROWS, _OPTIONS, Actions, Network, Simulation

    def network(n_features, n_outputs, clip=None):
        ends, layers, at = (n_features, 64, 64, n_outputs), [], 0
        for n_in, n_out in itertools.pairwise(ends):
            layers.append(Linear(at, at + n_in * n_out, n_in, n_out))
            at += n_in * n_out + 64
        return Network(tuple(layers), "tanh", "tf32", clip)

    floats = ("parameters", "mean", "scale", "noise", "obs", "dist_params", "rewards", "final_obs", "values")
    longs = ("step", "end_steps", "counts", "seeds", "episodes", "ages")
    types = dict.fromkeys((*floats, *(f"state{i}" for i in range(4))), "*fp32") | dict.fromkeys(longs, "*i64")
    types |= dict.fromkeys(("terminated", "truncated"), "*u8") | dict.fromkeys(("n_steps", "n_envs", "n_rows"), "i32")
    moments = dict.fromkeys(("mean", "scale"), "*fp64")
    number = {"log_std": 8192, "n_params": 2, "low": -2.0, "high": 2.0}
    tasks = [
        (Simulation("CartPole", 0.0, 4, 500, 1), Actions(2, None, 2)),
        (Simulation("Pendulum", 10.0, 3, 200, 1), Actions(0, **number)),
        (Simulation("Acrobot", 0.0, 6, 500, 1), Actions(3, None, 3)),
        (Simulation("MountainCarContinuous", 0.0, 2, 999, 1), Actions(0, **number)),
    ]
    module, aligned = "fastppo.kernels.rollout", ("aligned",)  # torch aligns what it allocates
    found = []
    for name, own, clip in (("values", {}, None), ("values of normalised observations", moments, 10.0)):
        constants = {"NETWORK": network(4, 1, clip), "BLOCK": _BLOCK_ROWS}
        found.append(Kernel(name, module, "_values", types | own, constants, aligned, _OPTIONS))
    normalised = {"CartPole": False, "Pendulum": True, "Acrobot": False, "MountainCarContinuous": True}
    for simulation, actions in tasks:
        normalises = normalised[simulation.task]
        constants = {
            "NETWORK": network(simulation.features, actions.choices or 1, 10.0 if normalises else None),
            "ACTIONS": actions,
            "SIMULATION": simulation,
            "BLOCK": _BLOCK,
        }
        own = types | {"actions": "*i64" if actions.choices else "*fp32"} | (moments if normalises else {})
        found.append(Kernel(simulation.task, module, "_rollout", own, constants, aligned, _OPTIONS))
    return found


def update_kernels():
    """The kernels of an update, for the largest networks that they cover."""
    if importlib.util.find_spec("triton") is None:
        return []
    from fastppo.kernels import update as kernels

    def case(
        name,
        features,
        widths,
        distribution,
        outputs,
        *,
        activation="tanh",
        nvec=(),
        heads=1,
        shared=False,
        precision="tf32",
    ):
        at = 0

        def linear(n_in, n_out):
            nonlocal at
            weight, bias = at, at + -(-n_in * n_out // 16) * 16
            at = bias + -(-n_out // 16) * 16
            return Linear(weight, bias, n_in, n_out)

        def hidden():
            return tuple(linear(a, b) for a, b in itertools.pairwise((features, *widths)))

        critic, value = hidden(), linear(widths[-1], 1)
        of_actor = tuple(linear(widths[-1], outputs) for _ in range(heads))
        if shared:
            trunks = (Trunk(critic, (*of_actor, value), features, True, True),)
        else:
            actor = Trunk(hidden(), of_actor, features, True, False)
            trunks = (Trunk(critic, (value,), features, False, True), actor)
        free = distribution in ("gaussian", "squashed") and heads == 1
        network = kernels.Network(
            trunks, activation, at if free else None, distribution, nvec, outputs, at + 16 * free, precision
        )
        names = ("old", "action", "logprob", "advantage", "target", "old_value")
        wide = 3 * outputs + features
        columns = kernels.Columns(wide + 6, **{column: wide + i for i, column in enumerate(names)}, mask=features)
        constants = {
            "NETWORK": network,
            "COLUMNS": columns,
            "LOSS": kernels.Loss(True, True, "max"),
            "BLOCK": kernels.launch(network)[0],
        }
        return Kernel(
            name, module, "_differentiate", types, constants, aligned, {"num_warps": kernels.launch(network)[1]}
        )

    module, aligned = "fastppo.kernels.update", ("aligned",)
    floats = (
        "parameters",
        "data",
        "scale",
        "clip",
        "value_clip",
        "value",
        "entropy",
        "kl",
        "sums",
        "result",
        "squares",
    )
    floats += ("gradient", "learning_rate", "max_norm", "kl_limit", "stop_kl", "skipped", "decision", "mean", "square")
    types = dict.fromkeys(floats, "*fp32") | dict.fromkeys(("left1", "left2"), "*fp64")
    types |= {"order": "*i64", "eps": "fp32"} | dict.fromkeys(("n", "n_programs", "n_squares"), "i32")
    reduce = {"SIZE": 9936, "BLOCK": kernels._REDUCE_BLOCK, "ROWS": kernels._REDUCE_ROWS}
    decide = {"SIZE": 9936, "SUMS_EXACT_KL": True, "KL": 4, "EXACT_KL": 5, "BLOCK": kernels._REDUCE_BLOCK}
    return [
        case("CartPole", 4, (64, 64), "categorical", 2, nvec=(2,)),
        case("HalfCheetah", 17, (64, 64), "gaussian", 6),
        case("bits", 32, (64, 64), "bernoulli", 16, activation="gelu"),
        case("choices", 32, (64, 64, 64), "categorical", 16, nvec=(2,) * 8, activation="silu"),
        case("squashed", 32, (64, 64, 64), "squashed", 16, activation="elu"),
        case("HalfCheetah in float32", 17, (64, 64), "gaussian", 6, precision="ieee"),
        case("squashed in float32", 32, (64, 64, 64), "squashed", 16, activation="elu", precision="ieee"),
        case("deviations of the network", 32, (64, 64), "squashed", 16, heads=2),
        case("shared", 32, (64, 64), "gaussian", 16, heads=2, shared=True, activation="gelu"),
        Kernel("reduce", module, "_reduce", types, reduce, aligned, {}),
        Kernel("decide", module, "_decide", types, decide, aligned, {}),
        Kernel("adam", module, "_adam", types, {"SIZE": 9936, "BLOCK": kernels._STEP_BLOCK}, aligned, {}),
    ]


KERNELS = [GAE, *rollout_kernels(), *update_kernels()]


def compile_kernel(kernel, capability, case="any", **options):
    """Compile for a GPU that need not be here, as Triton does for the arguments of a launch.

    `case`: "any"; "aligned", where pointers and numbers are divisible by 16; "one environment", a constant to Triton.
    """
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function = getattr(importlib.import_module(kernel.module), kernel.name)
    types, constants = dict(kernel.types), dict(kernel.constants)
    if case == "one environment":
        constants["n_envs"] = 1
    signature = {name: "constexpr" if name in constants else types[name] for name in function.arg_names}
    divisible = [["tt.divisibility", 16]]
    attributes = {
        (i,): divisible
        for i, (name, kind) in enumerate(signature.items())
        if case == "aligned" and kind not in ("constexpr", "fp32")
        if name not in (*(function.do_not_specialize or ()), *(function.do_not_specialize_on_alignment or ()))
    }
    source = ASTSource(function, signature, constants, attributes)
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(compiled, folder):
    """Return the resources of the machine code, listed by cuobjdump: REG, STACK (bytes of spilled registers), ..."""
    from triton import knobs

    file = folder / "kernel.cubin"
    file.write_bytes(compiled.asm["cubin"])
    command = [knobs.nvidia.cuobjdump.path, "-res-usage", str(file)]
    listing = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|SHARED|LOCAL):(\d+)", listing)}


@pytest.fixture
def _triton(tmp_path, monkeypatch):
    triton = pytest.importorskip("triton", reason="Triton has no version for this platform")
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


@pytest.mark.usefixtures("_triton")
@pytest.mark.parametrize(
    ("kernel", "case"), [pytest.param(k, case, id=f"{k.id}, {case}") for k in KERNELS for case in k.cases]
)
@pytest.mark.parametrize("capability", [80, 90])
def test_a_kernel_compiles_without_spilling_registers(tmp_path, kernel, capability, case):
    compiled = compile_kernel(kernel, capability, case, **kernel.options)
    used = resources(compiled, tmp_path)
    assert 0 < used["REG"] <= 255
    if "float32" not in kernel.id:  # those compare with torch at the start alone
        assert used["STACK"] == used["LOCAL"] == 0, "registers are spilled to memory"
    assert compiled.metadata.shared <= 100 * 1024, "two programs would not fit a multiprocessor"


@pytest.mark.usefixtures("_triton")
def test_spilled_registers_are_found(tmp_path):
    assert resources(compile_kernel(GAE, 90, maxnreg=32), tmp_path)["STACK"] > 0


@pytest.mark.usefixtures("_triton")
def test_the_constants_of_a_compiled_kernel_are_those_of_its_launch():
    from fastppo.kernels import gae as gae_triton

    assert GAE.constants == {"BLOCK_T": gae_triton._BLOCK_T, "BLOCK_N": gae_triton._BLOCK_N}


def test_every_triton_kernel_is_compiled_here():
    package = Path(fastppo.__file__).parent
    launched = set()
    for file in package.rglob("*.py"):
        if "@triton.jit" in (text := file.read_text()):
            module = ".".join(("fastppo", *file.relative_to(package).with_suffix("").parts))
            launched |= {(module, name) for name in re.findall(r"^ *(\w+)\[.+\]\($", text, re.MULTILINE)}
    assert launched == {(kernel.module, kernel.name) for kernel in KERNELS}
