"""Time of one minibatch of the update: gather, forward, loss, gradient, clip, Adam.

    python -m benchmarks.update

Timed: `PPOUpdate.step` on a rollout of at least 16384 rows with CartPole's shapes (4 numbers, 2 actions), two
64x64 tanh networks; median of half a second of calls. `module + Adam` is the same mathematics in plain PyTorch:
nn.Module, loss.backward(), clip_grad_norm_, torch.optim.Adam. `torch.compile` is that with module and loss compiled.
`fused` is an epoch's time by its minibatches; `seconds to fuse` includes the C compiler where its cache is empty.
Each row has a fresh process, because threads and the C library's memory settings are set once per process.
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path
from typing import Any

import tyro

from benchmarks import median_ms, report, run_task


@dataclasses.dataclass
class Options:
    """Time of one minibatch."""

    rows: tuple[int, ...] = (128, 512, 1024, 2048, 16384, 65536)
    """Minibatch sizes."""
    threads: tuple[int, ...] = (1, 2)
    """Numbers of torch threads."""
    hidden: int = 64
    """Width of the hidden layers."""
    output: Path | None = None
    """JSON file for the results."""
    one: str | None = None
    """Internal: measure in this process, [rows, threads, hidden] as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(measure(*json.loads(options.one))))
        return
    rows = []
    for size in options.rows:
        for threads in options.threads:
            rows.append(run_task("benchmarks.update", [size, threads, options.hidden]))
            print(rows[-1], flush=True)
    report(rows, options.output)


def measure(size: int, threads: int, hidden: int) -> dict[str, Any]:
    import torch

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

    torch.manual_seed(0)
    set_threads(threads)
    total = max(16384, size)
    net = MLP(4, 2, free_std=False, hidden_sizes=(hidden, hidden), activation="tanh", shared_trunk=False)
    policy = Policy(Encoder(ObsSpec.single("vector", (4,), "float32")), net, Categorical(2))
    obs, noise = torch.randn(total, 4), torch.empty(total, 2)
    generator = torch.Generator().manual_seed(0)
    policy.distribution.fill_noise(noise, generator)
    acted = policy.act(obs, noise)
    batch = Batch(
        obs, acted.actions, acted.logprobs, acted.params, acted.values, torch.randn(total), torch.randn(total), None
    )
    coefs = Coefficients(*(torch.tensor(x) for x in (2.5e-4, 0.2, 0.2, 0.5, 0.01, 0.5, 0.99, 0.95, 0.0)))
    order = torch.randperm(total)[:size]
    row: dict[str, Any] = {"rows": size, "threads": threads, "hidden": hidden}

    # plain PyTorch first, before keep_freed_memory changes the allocator
    row |= _time_plain_pytorch(policy, batch, coefs, order)

    keep_freed_memory()
    update = PPOUpdate(
        policy,
        FlatParameters(net),
        PPOLoss("off"),
        adam(1e-5),
        Shuffle(generator, obs.device, update_epochs=1, n_minibatches=total // size),
        normalize="minibatch",
        kl_stop="epoch",
    )
    minibatch = Minibatch(torch.tensor([0.0, 1.0], device=order.device), order, update.pack(batch))
    row["ours, eager ms"] = median_ms(lambda: update.step(minibatch, coefs))
    begin = time.perf_counter()
    update.compile(batch, coefs)
    row["seconds to compile"] = time.perf_counter() - begin
    row["ours, compiled ms"] = median_ms(lambda: update.step(minibatch, coefs))
    begin = time.perf_counter()
    update.fuse(batch, threads)
    row["seconds to fuse"] = time.perf_counter() - begin
    update.prepare(total, math.inf)
    update.begin(batch)
    row["ours, fused ms"] = median_ms(lambda: update.run_epochs(coefs, watch=False)) / (total // size)
    return row


def _time_plain_pytorch(policy: Any, batch: Any, coefs: Any, order: Any) -> dict[str, float]:
    """Time a minibatch with nn.Module, autograd and torch.optim.Adam, eager and with torch.compile."""
    import torch

    from fastppo.functional.losses import Batch, PPOLoss, normalize_advantages

    parameters = list(policy.network.parameters())
    adam, ppo_loss = torch.optim.Adam(parameters, 2.5e-4, eps=1e-5), PPOLoss("off")

    def loss_of(part: Batch) -> torch.Tensor:
        part = part._replace(advantages=normalize_advantages(part.advantages))
        current = policy.evaluate_actions(policy(part.obs), part.actions, part.params)
        return ppo_loss(current, part, coefs)[0]

    def step(loss: Any) -> None:
        part = batch.take(order)
        adam.zero_grad()
        loss(part).backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        adam.step()

    compiled_loss = torch.compile(loss_of)
    return {
        "module + Adam ms": median_ms(lambda: step(loss_of)),
        "torch.compile ms": median_ms(lambda: step(compiled_loss)),
    }


if __name__ == "__main__":
    main(tyro.cli(Options))
