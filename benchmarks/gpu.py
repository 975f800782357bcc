"""Speed on one GPU: advantages, updates, training on tensor and host environments, time to solve CartPole.

    scripts/bench-gpu            # or, without a GPU: python -m benchmarks.gpu --device cpu --quick

Timed, each with a synchronisation at its start and end:

- one call of each GAE kernel, and a copy of the bytes that any kernel must move (22 per cell);
- one update (4 epochs, 4 minibatches) by minibatch size: eager, compiled, and as a CUDA graph;
- steps per second of whole training iterations (rollout, update, logging) after three warm-up iterations;
- seconds of training until the mean return of 100 episodes reaches 475, without compilation.

All parts run in one process. A part that fails adds a row with its reason. Each row is printed and written as it comes.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro

from benchmarks import median_ms, report, write
from fastppo import Config, Trainer
from fastppo.analysis.bench import ceilings
from fastppo.errors import first_line
from fastppo.functional.gae import choose_gae, gae_doubling
from fastppo.runtime.compile import compile_graph

Row = dict[str, Any]


@dataclasses.dataclass
class Options:
    """GPU benchmarks."""

    device: str = "cuda"
    """Device."""
    quick: bool = False
    """Use small sizes and short times."""
    output: Path | None = None
    """JSON file for the results."""


def main(options: Options) -> None:
    rows: list[Row] = []
    for row in measured((advantages, updates, tensor_training, host_training, solving), options):
        rows.append(row)
        print(row, flush=True)
        write(rows, options.output, device=options.device, quick=options.quick)
    empty = {name: "" for row in rows for name in row}
    report([empty | row for row in rows], options.output, device=options.device, quick=options.quick)


def measured(parts: Sequence[Callable[[Options], Iterator[Row]]], options: Options) -> Iterator[Row]:
    """Return the rows of all parts as they come; a part that fails keeps its rows and ends with its reason."""
    for part in parts:
        try:
            yield from part(options)
        except Exception as error:
            yield {"what": part.__name__, "failed": f"{type(error).__name__}: {first_line(error)}"}


def advantages(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    shapes = [(128, 64)] if options.quick else [(128, 512), (128, 4096), (32, 16384), (2048, 64), (128, 65536)]
    for t, n in shapes:
        g = torch.Generator(device).manual_seed(0)
        numbers = [torch.randn(t, n, generator=g, device=device) for _ in range(3)]
        done = torch.rand(t, n, generator=g, device=device) < 0.02
        inputs = [*numbers, done, done, *(torch.tensor(x, device=device) for x in (0.99, 0.95))]
        compiled, chosen = compile_graph(gae_doubling, inputs), choose_gae(t, n, device)
        source = torch.zeros(t * n * 11, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        calls: dict[str, Callable[[], Any]] = {
            "copy": lambda target=target, source=source: target.copy_(source),
            chosen.__name__: lambda chosen=chosen, inputs=inputs: chosen(*inputs),
            "doubling compiled": lambda compiled=compiled, inputs=inputs: compiled(*inputs),
        }
        for name, call in calls.items():
            # many calls in a row: the time of one is mostly its launch
            def many(call: Callable[[], Any] = call) -> None:
                for _ in range(20):
                    call()
                _wait(device)

            yield {"what": "advantages", "T": t, "N": n, "how": name, "ms": median_ms(many, 0.3) / 20}


def updates(options: Options) -> Iterator[Row]:
    sizes = [1] if options.quick else [4, 32, 256, 1024]  # n_envs; a minibatch has 32 times as many rows
    for n in sizes:
        for how in ("off", "on", "graph"):
            with tempfile.TemporaryDirectory() as folder:
                trainer = Trainer(_config(options, folder, n_envs=n, n_steps=128, compile=how))
                trainer.collect()

                def once(trainer: Trainer = trainer) -> None:
                    trainer.learner.anneal(0.0)
                    trainer.learner()
                    _wait(trainer.device)

                ms = median_ms(once, 0.2 if options.quick else 1.0)
                yield {"what": "update", "minibatch": n * 32, "how": how, "ms": ms / 16}
                trainer.stop_requested = True
                trainer.run()


def tensor_training(options: Options) -> Iterator[Row]:
    shapes = [(16, 32)] if options.quick else [(512, 128), (4096, 128), (16384, 32)]
    for n, t in shapes:
        for how in ("off", "on", "graph"):
            row = {"what": "tensor CartPole", "N": n, "T": t, "how": how}
            yield row | _speed(options, env_id="CartPole-v1", n_envs=n, n_steps=t, compile=how)


def host_training(options: Options) -> Iterator[Row]:
    for env_id, vectorization in [("CartPole-v1", "sync"), ("CartPole-v1", "pool"), ("HalfCheetah-v5", "pool")]:
        for act in ("cpu", "cuda"):
            row = {"what": f"{env_id} {vectorization}", "N": 64, "T": 128, "how": f"acting on {act}"}
            try:
                changes = {"env_id": env_id, "vectorization": vectorization, "act_device": act, "normalize_obs": False}
                yield row | _speed(options, alone=True, n_envs=64, n_steps=128, compile="auto", **changes)
            except Exception as error:
                yield row | {"failed": first_line(error)}


def solving(options: Options) -> Iterator[Row]:
    for seed in (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            many = {"n_envs": 256, "n_steps": 32, "n_minibatches": 4, "update_epochs": 5, "learning_rate": 2e-3}
            limit = 20_000 if options.quick else 10_000_000
            steps = {
                "total_timesteps": limit,
                "target_return": 475.0,
                "gae_lambda": 0.8,
                "gamma": 0.98,
                "ent_coef": 0.0,
            }
            trainer = Trainer(_config(options, folder, seed=seed, compile="auto", **many | steps))
            result = trainer.run()
            yield {
                "what": "CartPole to 475",
                "how": trainer.config.compile,
                "seed": seed,
                "seconds": result.seconds,
                "steps": result.global_step,
                "mean return": result.mean_return,
                "ended": result.ended,
                "compile seconds": result.compile_seconds,
            }


def _config(options: Options, folder: str, **changes: Any) -> Config:
    settings = {"vectorization": "tensor", "n_minibatches": 4, "update_epochs": 4, "total_timesteps": 10**12}
    return Config(device=options.device, run_dir=Path(folder) / "run", **settings | changes)


def _speed(options: Options, alone: bool = False, **changes: Any) -> Row:
    """Return steps per second of training; `alone`: also those of each part alone."""
    seconds = 0.5 if options.quick else 5.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_config(options, folder, **changes))
        ticks: list[tuple[float, int]] = []
        phases: dict[str, list[float]] = {}
        for stats in trainer.iterations():
            if stats.iteration >= 3:
                ticks.append((stats.seconds, stats.global_step))
                for name, value in stats.scalars.items():
                    if name.startswith("time/"):
                        phases.setdefault(name.removeprefix("time/"), []).append(value)
            if len(ticks) > 5 and ticks[-1][0] - ticks[0][0] > seconds:
                parts = {f"{part} alone": sps for part, sps in ceilings(trainer, seconds / 5).items()} if alone else {}
                break
        sps = (ticks[-1][1] - ticks[0][1]) / (ticks[-1][0] - ticks[0][0])
        spent = {name: round(statistics.median(x) * 1e3, 3) for name, x in phases.items()}
        return {
            "steps/s": sps,
            "phases ms": spent,
            "compile seconds": trainer.compile_seconds,
            "ran": trainer.config.compile,
        } | parts


def _wait(device: torch.device) -> None:
    """Synchronise with the GPU, so that a timer includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Options))
