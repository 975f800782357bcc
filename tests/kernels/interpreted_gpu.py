"""Whole runs on the fake GPU with its kernels in Triton's interpreter; run with TRITON_INTERPRET=1 and a folder."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from fastppo.functional.gae import triton_failure
from fastppo.kernels import gae, rollout, update
from fastppo.ppo import fused_gradient, kernel_rollout
from fastppo.ppo.kernel_gradient import KernelGradient
from tests.fake_cuda import GPU, OnGPU
from tests.test_gpu_contract import make, vector


class OnFakeGPU:
    """A kernel that takes tensors of the fake GPU, and that a capture notes.

    Attributes:
        launches: names of the kernels launched by Python, in order.
        known: module and name of every kernel that was launched.
        broken: name of the kernel that fails.
    """

    launches: list[str] = []  # noqa: RUF012
    known: set[tuple[str, str]] = set()  # noqa: RUF012
    broken = ""

    def __init__(self, module, name):
        self.kernel, self.name, self.module = getattr(module, name), name, module.__name__

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with torch._C._DisableTorchDispatch():
                self.kernel[grid](*args, **kwargs)

        def on_gpu(*args, **kwargs):
            if self.name == self.broken:
                raise subprocess.CalledProcessError(1, ["ptxas", self.name])
            self.launches.append(self.name)
            self.known.add((self.module, self.name))
            args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
            if (graph := GPU.current.graph) is not None:
                graph.undo += [(x, x.clone()) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
                graph.operations.append((launch, args, kwargs, None))
            launch(*args, **kwargs)

        return on_gpu


KERNELS = {
    gae: ["_kernel"],
    rollout: ["_rollout", "_values"],
    update: ["_differentiate", "_reduce", "_decide", "_adam"],
}
SMALL = {"hidden_sizes": (16, 16), "learning_rate": 1e-2}
CASES = {
    "tensor": {},
    "a KL limit": {"target_kl": 1e-6},
    "host": {"vectorization": "sync", "act_device": "cuda"},
    "adaptive": {"learning_rate": "adaptive:1e-3:1e-5:1e-2"},
    "not covered": {"memory": "gru"},
}


def train(folder, name, **settings):
    """Return a trainer after its run, the kernels that Python launched in it, and its notes on them."""
    trainer = make(folder, name, **(SMALL | settings))
    OnFakeGPU.launches.clear()
    trainer.run()
    return trainer, {
        "compile": trainer.config.compile,
        "kernels": isinstance(trainer.update._step.gradient, KernelGradient),
        "notes": [note for note in trainer.notes if "fused" in note or "compile" in note or "kernel" in note],
        "launched by Python": sorted(set(OnFakeGPU.launches)),
    }


def runs(folder):
    """Train with and without kernels, and with one of each part broken; return what differs."""
    patch = pytest.MonkeyPatch()
    gpu = GPU(count=1)
    gpu.install(patch)
    for module in ("ppo.learner", "ppo.minibatch_step", "ppo.curiosity", "policies.actors", "builders.compiling"):
        patch.setattr(f"fastppo.{module}.compile_graph", lambda fn, example: fn)
    for module, names in KERNELS.items():
        for name in names:
            patch.setattr(module, name, OnFakeGPU(module, name))
    # of the comparisons at the start: the interpreter is slow
    patch.setattr(fused_gradient, "_EXAMPLE_ROWS", 33)
    patch.setattr(kernel_rollout, "_EXAMPLE_STEPS", 4)
    found = {"cases": {}, "broken": {}}
    with gpu, torch.autograd.set_multithreading_enabled(False):
        for case, changes in CASES.items():
            eager, _ = train(folder, f"{case} off", compile="off", **changes)
            trainer, about = train(folder, f"{case} auto", compile="auto", **changes)
            difference = (vector(eager) - vector(trainer)).abs().max().item()
            found["cases"][case] = about | {"difference": difference}
            # only the first case compares in both precisions: they are one in the interpreter, which is slow
            for module in ("kernel_gradient", "kernel_rollout"):
                patch.setattr(f"fastppo.ppo.{module}.in_each_precision", lambda compare: compare())
        eager, _ = train(folder, "eager", compile="off")
        for name in ("_kernel", "_rollout", "_differentiate", "_adam"):
            OnFakeGPU.broken = name
            triton_failure.cache_clear()
            trainer, about = train(folder, f"without {name}", compile="auto")
            found["broken"][name] = about | {"difference": (vector(eager) - vector(trainer)).abs().max().item()}
        found["known"] = sorted(OnFakeGPU.known)
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(runs(Path(sys.argv[1])), sys.stdout)
