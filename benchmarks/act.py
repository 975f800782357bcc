"""Time to choose the actions of one step for N environments.

    python -m benchmarks.act

Timed: `Actor.act` into a row of a rollout, observations of 4 numbers, 2 actions, two 64x64 tanh networks, one thread;
median of half a second of calls. The trainer uses `C` for this network, `numpy` with compile=on or off, and `module`
for custom networks: one torch pass that also computes values and log-probabilities. `compiled` is that pass compiled as
a whole. `the rest` is the work that C and numpy defer to the end of the rollout (values and log-probabilities of 128
steps in one pass), per step.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
import tyro

from benchmarks import median_ms, report
from fastppo.functional.distributions import Categorical
from fastppo.policies.actors import ModuleActor, fill_values_and_logprobs
from fastppo.policies.decisions import Decisions
from fastppo.policies.encoder import Encoder
from fastppo.policies.mlp import MLP
from fastppo.policies.native_actor import NativeActor, NativePolicy
from fastppo.policies.numpy_actor import NumpyActor
from fastppo.policies.policy import Policy
from fastppo.runtime.compile import compile_graph
from fastppo.runtime.threads import set_threads
from fastppo.spaces.observations import ObsSpec

T = 128


@dataclasses.dataclass
class Options:
    """Time to choose actions."""

    n_envs: tuple[int, ...] = (1, 8, 64, 512)
    """Numbers of environments."""
    output: Path | None = None
    """JSON file for the results."""


def main(options: Options) -> None:
    set_threads(1)
    torch.manual_seed(0)
    rows = []
    for n in options.n_envs:
        net = MLP(4, 2, free_std=False, hidden_sizes=(64, 64), activation="tanh", shared_trunk=False)
        policy = Policy(Encoder(ObsSpec.single("vector", (4,), "float32")), net, Categorical(2))
        d = Decisions(
            torch.randn(T + 1, n, 4),
            torch.randn(T, n, 2),
            torch.zeros(T, n, dtype=torch.int64),
            torch.zeros(T, n),
            torch.zeros(T, n, 2),
            torch.zeros(T, n),
        )
        numpy, module = NumpyActor(policy, d), ModuleActor(policy, d)
        one = (d.obs[0], d.noise[0])
        compiled, in_c = compile_graph(policy.act, one), NativePolicy(policy, 1)
        native = NativeActor(in_c, d)
        rows.append(
            {
                "n_envs": n,
                "numpy us": median_ms(lambda: numpy.act(0)) * 1e3,  # noqa: B023 - called in this round only
                "the rest us": median_ms(lambda: fill_values_and_logprobs(policy, d)) * 1e3 / T,  # noqa: B023
                "C us": median_ms(lambda: native.act(0)) * 1e3,  # noqa: B023
                "C, the rest us": median_ms(lambda: in_c.fill(d)) * 1e3 / T,  # noqa: B023
                "module us": median_ms(lambda: module.act(0)) * 1e3,  # noqa: B023
                "compiled us": median_ms(lambda: compiled(*one)) * 1e3,  # noqa: B023
            }
        )
    report(rows, options.output)


if __name__ == "__main__":
    main(tyro.cli(Options))
