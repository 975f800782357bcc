"""Time of the kernels of generalised advantage estimation over [T, N].

    python -m benchmarks.gae_kernel

Timed: one call on random float32 rewards and values, 2 % of the steps end an episode, the call allocates its results;
median of half a second of calls, on the GPU with a synchronisation in each. `copy` moves the bytes that any kernel must
read and write (22 bytes per cell), so no kernel can be faster. `seconds to compile` is not part of the times. `error`
is the largest difference between the doubling kernel and the recursion in float64.
"""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path

import torch
import tyro

from benchmarks import median_ms, report
from fastppo.functional.gae import Trajectory, gae_doubling, gae_loop
from fastppo.runtime.compile import compile_graph


@dataclasses.dataclass
class Options:
    """GAE kernels."""

    output: Path | None = None
    """JSON file for the results."""
    threads: int | None = None
    """torch threads; None: the default of torch."""


def main(options: Options) -> None:
    if options.threads:
        torch.set_num_threads(options.threads)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = []
    for t, n in [(128, 4), (128, 64), (128, 512), (128, 4096), (2048, 1), (32, 16384)]:
        g = torch.Generator(device).manual_seed(0)

        def draw() -> torch.Tensor:
            return torch.randn(t, n, generator=g, device=device)  # noqa: B023 - called in this iteration only

        done = torch.rand(t, n, generator=g, device=device) < 0.02
        terminated = done & (torch.rand(t, n, generator=g, device=device) < 0.5)
        trajectory = Trajectory(draw(), draw(), draw(), terminated, done)
        rates = [torch.tensor(x, device=device) for x in (0.99, 0.95)]
        inputs = trajectory, *rates
        begin = time.perf_counter()
        compiled = compile_graph(gae_doubling, inputs)
        seconds = time.perf_counter() - begin
        source = torch.zeros(t * n * 11, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)

        def wait() -> None:
            if device.type == "cuda":
                torch.cuda.synchronize()

        exact = gae_loop(Trajectory(*(x.double() if x.is_floating_point() else x for x in trajectory)), *rates)[0]
        row = {"T": t, "N": n}
        calls = {"loop": lambda: gae_loop(*inputs), "doubling": lambda: gae_doubling(*inputs)}  # noqa: B023
        calls |= {"compiled": lambda: compiled(*inputs), "copy": lambda: target.copy_(source)}  # noqa: B023
        for name, call in calls.items():
            row[f"{name} ms"] = median_ms(lambda: (call(), wait()))  # noqa: B023
        row |= {"seconds to compile": seconds, "error": (compiled(*inputs)[0] - exact).abs().max().item()}
        rows.append(row)
    report(rows, options.output, threads=torch.get_num_threads())


if __name__ == "__main__":
    main(tyro.cli(Options))
