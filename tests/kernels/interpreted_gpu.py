"""Whole runs on the fake GPU with its kernels in Triton's interpreter; run with TRITON_INTERPRET=1 and a folder."""

import json
import sys
from pathlib import Path

import pytest
import torch
from torch.utils._pytree import tree_flatten, tree_map

from fastppo.kernels import gae, rollout, update
from fastppo.ppo.kernel_gradient import KernelGradient
from tests.fake_cuda import GPU, OnGPU
from tests.test_gpu_contract import make, vector


class OnFakeGPU:
    """A kernel that takes tensors of the fake GPU, and that a capture notes.

    Attributes:
        launches: names of the kernels launched by Python, in order.
    """

    launches: list[str] = []  # noqa: RUF012

    def __init__(self, module, name):
        self.kernel, self.name = getattr(module, name), name

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            with torch._C._DisableTorchDispatch():
                self.kernel[grid](*args, **kwargs)

        def on_gpu(*args, **kwargs):
            self.launches.append(self.name)
            args, kwargs = tree_map(lambda x: x.inner if isinstance(x, OnGPU) else x, (args, kwargs))
            if (graph := GPU.current.graph) is not None:
                graph.undo += [(x, x.clone()) for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
                graph.operations.append((launch, args, kwargs, None))
            launch(*args, **kwargs)

        return on_gpu


def runs(folder):
    """Train with and without kernels; return what differs."""
    patch = pytest.MonkeyPatch()
    gpu = GPU(count=1)
    gpu.install(patch)
    for module in ("ppo.learner", "ppo.update", "ppo.curiosity", "policies.actors", "builders.compiling"):
        patch.setattr(f"fastppo.{module}.compile_graph", lambda fn, example: fn)
    for module, names in {
        gae: ["_kernel"],
        rollout: ["_rollout", "_values"],
        update: ["_differentiate", "_reduce", "_decide", "_adam"],
    }.items():
        for name in names:
            patch.setattr(module, name, OnFakeGPU(module, name))
    settings = {"hidden_sizes": (16, 16), "learning_rate": 1e-2}
    cases = {
        "tensor": {},
        "a KL limit": {"target_kl": 1e-6},
        "host": {"vectorization": "sync", "act_device": "cuda"},
        "adaptive": {"learning_rate": "adaptive:1e-3:1e-5:1e-2"},
        "not covered": {"memory": "gru"},
    }
    found = {}
    with gpu, torch.autograd.set_multithreading_enabled(False):
        for case, changes in cases.items():
            parameters = []
            for compiled in ("off", "auto"):
                trainer = make(folder, f"{case} {compiled}", compile=compiled, **(settings | changes))
                OnFakeGPU.launches.clear()
                trainer.run()
                parameters.append(vector(trainer))
            found[case] = {
                "compile": trainer.config.compile,
                "kernels": isinstance(trainer.update._gradient, KernelGradient),
                "notes": [note for note in trainer.notes if "fused" in note or "compile" in note],
                "difference": (parameters[0] - parameters[1]).abs().max().item(),
                "launched by Python": sorted(set(OnFakeGPU.launches)),
            }
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    json.dump(runs(Path(sys.argv[1])), sys.stdout)
