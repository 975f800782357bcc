"""Rejected layouts of a small update: time of one compiled minibatch in each.

    python -m benchmarks.levers --output benchmarks/results/levers_2core-cpu_2026-11-21.json

`merged`: first layers of actor and critic as one product, second layers as one batched product. `feature-major`:
activations as [features, rows]. `simdlen 256`, `max autotune`, `aggressive fusion`: options of Inductor. Medians of
interleaved rounds, one thread, two 64x64 tanh networks, in milliseconds and relative to the layout in use.
"""

from __future__ import annotations

import contextlib
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from torch import Tensor, nn

from benchmarks import median_ms, report
from fastppo.errors import first_line
from fastppo.functional.adam import adam
from fastppo.functional.distributions import Categorical
from fastppo.functional.losses import Batch, Coefficients, PPOLoss
from fastppo.policies.encoder import Encoder
from fastppo.policies.flat_parameters import FlatParameters
from fastppo.policies.mlp import MLP
from fastppo.policies.policy import Policy
from fastppo.ppo.minibatches import Minibatch, Shuffle
from fastppo.ppo.update import PPOUpdate
from fastppo.runtime.threads import keep_freed_memory, set_threads
from fastppo.spaces.observations import ObsSpec


class Merged(nn.Module):
    """Both trunks in the fewest possible products."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 128)
        self.second, self.bias = nn.Parameter(torch.randn(2, 64, 64) / 8), nn.Parameter(torch.zeros(2, 1, 64))
        self.actor, self.critic = nn.Linear(64, 2), nn.Linear(64, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = self.first(x).tanh().view(-1, 2, 64).transpose(0, 1)
        x = torch.baddbmm(self.bias, x, self.second).tanh()
        return self.actor(x[0]), self.critic(x[1]).squeeze(-1)


class FeatureMajor(nn.Module):
    """Activations as columns, [features, rows]."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [(64, 4), (64, 64), (2, 64), (64, 4), (64, 64), (1, 64)]
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(*size) / size[1] ** 0.5) for size in sizes])
        self.biases = nn.ParameterList([nn.Parameter(torch.zeros(size[0], 1)) for size in sizes])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        outs = []
        for trunk in (0, 3):
            h = x.t()
            for layer in range(trunk, trunk + 3):
                h = torch.addmm(self.biases[layer], self.weights[layer], h)
                h = h.tanh() if layer < trunk + 2 else h
            outs.append(h)
        return outs[0].t(), outs[1].squeeze(0)


def ours() -> nn.Module:
    return MLP(4, 2, free_std=False, hidden_sizes=(64, 64), activation="tanh", shared_trunk=False)


VARIANTS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "as it is": (ours, {}),
    "merged": (Merged, {}),
    "feature-major": (FeatureMajor, {}),
    "simdlen 256": (ours, {"cpp.simdlen": 256}),
    "max autotune": (ours, {"max_autotune": True, "max_autotune_gemm_backends": "CPP,ATEN"}),
    "aggressive fusion": (ours, {"aggressive_fusion": True}),
}


def prepare(network: nn.Module, rows: int, options: dict[str, Any]) -> Callable[[], None]:
    """Return a function that runs one compiled minibatch."""
    total = max(16384, rows)
    policy = Policy(Encoder(ObsSpec.single("vector", (4,), "float32")), network, Categorical(2))
    obs, noise = torch.randn(total, 4), torch.empty(total, 2)
    generator = torch.Generator().manual_seed(0)
    policy.distribution.fill_noise(noise, generator)
    acted = policy.act(obs, noise)
    rest = (acted.actions, acted.logprobs, acted.params, acted.values, torch.randn(total), torch.randn(total), None)
    batch = Batch(obs, *rest)
    coefs = Coefficients(*(torch.tensor(x) for x in (2.5e-4, 0.2, 0.2, 0.5, 0.01, 0.5, 0.99, 0.95, 0.0)))
    update = PPOUpdate(
        policy,
        FlatParameters(network),
        PPOLoss("off"),
        adam(1e-5),
        Shuffle(generator, obs.device, update_epochs=1, n_minibatches=total // rows),
        normalize="minibatch",
        kl_stop="epoch",
    )
    with torch._inductor.config.patch(options) if options else contextlib.nullcontext():
        update.compile(batch, coefs)
    minibatch = Minibatch(torch.tensor([0.0, 1.0]), torch.randperm(total)[:rows], update.pack(batch))
    return lambda: update.step(minibatch, coefs)


def main(rounds: int = 5, output: Path | None = None) -> None:
    """Time every variant at three minibatch sizes."""
    keep_freed_memory()
    set_threads(1)
    results = []
    for rows in (128, 2048, 16384):
        calls = {}
        for name, (make, options) in VARIANTS.items():
            torch.manual_seed(0)
            try:
                calls[name] = prepare(make(), rows, options)
            except Exception as error:
                print(f"{rows} rows, {name}: {type(error).__name__}: {first_line(error)}")
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(median_ms(call, 0.4))
        for name, ms in times.items():
            ratios = [a / b for a, b in zip(ms, times["as it is"], strict=True)]
            row = {"rows": rows, "variant": name, "ms": statistics.median(ms), "ratio": statistics.median(ratios)}
            results.append(row | {"from": min(ratios), "to": max(ratios)})
    report(results, output)


if __name__ == "__main__":
    tyro.cli(main)
