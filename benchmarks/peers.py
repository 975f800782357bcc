"""Training speed of fastppo, stable-baselines3 and rlox at one setting, in interleaved fresh processes.

    python -m benchmarks.peers --output benchmarks/results/peers_2core-cpu_2026-11-27.json
    python -m benchmarks.peers --show benchmarks/results/peers_2core-cpu_2026-11-27.json --plot peers.svg

Matched: CartPole-v1, T=128, 4 epochs, 4 minibatches, two 64x64 tanh networks, orthogonal initial weights, float32, Adam
with the same linearly annealed step size, the same coefficients, no value clipping, the same number of updates.

Timed: whole training iterations (rollout, advantages, update, bookkeeping of the program) after the first `WARM_UP`;
speed is real environment steps by their seconds. `total` counts from the start of the process, with imports and
compilation. A round measures each program once, each in a fresh process, in alternating order. A ratio is taken within
a round; the table shows the median over rounds with its range. stable-baselines3 and rlox run with torch's default
number of threads or with one, whichever is faster in a trial before the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from benchmarks import machine, run_task
from benchmarks._stable_baselines3 import iteration_ends

WARM_UP = 2
T, EPOCHS, MINIBATCHES = 128, 4, 4
ITERATIONS = {4: 100, 64: 40, 512: 10}
# vectorization, half-batches, compile
OURS = {
    "native": ("native", False, "fused"),
    "native, torch.compile": ("native", False, "on"),
    "sync": ("sync", False, "fused"),
    "sync, torch.compile": ("sync", False, "on"),
    "pool": ("pool", False, "fused"),
    "pool, halves": ("pool", True, "fused"),
}
# Goals of the project: ratios to stable-baselines3, to rlox, and to the same with torch.compile
TARGETS = {(4, "sync"): (8.0, 6.0, 1.5), (64, "native"): (12.0, 6.0, 1.9), (512, "native"): (10.0, 3.5, 1.6)}


@dataclasses.dataclass
class Options:
    """Training speed of fastppo, stable-baselines3 and rlox."""

    n_envs: Annotated[list[int], tyro.conf.arg(metavar="INT...")] = dataclasses.field(
        default_factory=lambda: [4, 64, 512]
    )
    """Numbers of environments; 4, 64 or 512."""
    rounds: int = 5
    """Measurements per program."""
    ours: tuple[str, ...] = tuple(OURS)
    """Ways of running fastppo; pool only from 64 environments on."""
    output: Path | None = None
    """JSON file for the results."""
    show: Path | None = None
    """Print the table of this file instead of measuring."""
    plot: Path | None = None
    """With --show: draw the plot into this file."""
    one: str | None = None
    """Internal: measure one program in this process; name, n_envs and threads as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(measure_here(**json.loads(options.one))))
    elif options.show is not None:
        result = json.loads(options.show.read_text())
        print(markdown(result))
        if options.plot:
            plot(result, options.plot)
    else:
        result = compare(options.n_envs, options.rounds, options.ours)
        print(markdown(result))
        print(json.dumps(result))
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")


def compare(sizes: Sequence[int], rounds: int, ways: Sequence[str]) -> dict[str, Any]:
    runs: list[dict[str, Any]] = []
    for n in sizes:
        ours = [f"fastppo {name}" for name in ways if n > 4 or not name.startswith("pool")]
        threads = {name: _better_threads(name, n) for name in ("stable-baselines3", "rlox")}
        for name in ours:  # fill the compiler's cache on disk
            _measure(name, n, None)
        for i in range(rounds):
            programs = [*threads, *ours]
            for name in programs if i % 2 == 0 else reversed(programs):
                runs.append({"round": i, **_measure(name, n, threads.get(name))})
                print(f"n_envs {n}  round {i}  {name:22} {runs[-1]['sps']:9,.0f} steps/s", flush=True)
    setting = {"env_id": "CartPole-v1", "n_steps": T, "update_epochs": EPOCHS, "n_minibatches": MINIBATCHES}
    return {"setting": setting, "iterations": ITERATIONS, "warm_up": WARM_UP, "runs": runs, **machine()}


def _better_threads(name: str, n: int) -> int | None:
    trials = {threads: _measure(name, n, threads)["sps"] for threads in (None, 1)}
    print(f"n_envs {n}  {name}: default threads {trials[None]:,.0f}, one thread {trials[1]:,.0f} steps/s", flush=True)
    return 1 if trials[1] > trials[None] else None


def _measure(name: str, n: int, threads: int | None) -> dict[str, Any]:
    task = {"name": name, "n": n, "threads": threads, "started": time.time()}
    return run_task("benchmarks.peers", task)  # type: ignore[no-any-return]


def measure_here(name: str, n: int, threads: int | None, started: float) -> dict[str, Any]:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    iterations = ITERATIONS[n]
    train = {"stable-baselines3": _stable_baselines3, "rlox": _rlox}.get(name, _fastppo)
    ticks = train(name, n, iterations)
    steps = T * n
    seconds = ticks[-1] - ticks[WARM_UP - 1]
    return {
        "name": name,
        "n_envs": n,
        "threads": torch.get_num_threads(),
        "sps": steps * (iterations - WARM_UP) / seconds,
        "sps_total": steps * iterations / (ticks[-1] - started),
    }


def _fastppo(name: str, n: int, iterations: int) -> list[float]:
    from fastppo import Config, Trainer

    vectorization, halves, compiled = OURS[name.removeprefix("fastppo ")]
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            n_envs=n,
            n_steps=T,
            update_epochs=EPOCHS,
            n_minibatches=MINIBATCHES,
            total_timesteps=n * T * iterations,
            value_clip="off",
            vectorization=vectorization,  # type: ignore[arg-type]
            half_batches=halves,
            compile=compiled,  # type: ignore[arg-type]
            run_dir=Path(folder) / "run",
        )
        return [time.time() for _ in Trainer(config).iterations()]


def _stable_baselines3(_: str, n: int, iterations: int) -> list[float]:
    from stable_baselines3 import PPO

    sizes = {"n_envs": n, "n_steps": T, "epochs": EPOCHS, "minibatches": MINIBATCHES}
    return iteration_ends(PPO, "MlpPolicy", **sizes, iterations=iterations)


def _rlox(_: str, n: int, iterations: int) -> list[float]:
    from rlox.algorithms.ppo import PPO
    from rlox.callbacks import Callback

    ticks: list[float] = []

    class Ticks(Callback):
        def on_step(self, **_: Any) -> bool:
            ticks.append(time.time())
            return True

    setting = {"n_steps": T, "n_epochs": EPOCHS, "batch_size": n * T // MINIBATCHES, "clip_vloss": False}
    PPO("CartPole-v1", n_envs=n, seed=1, callbacks=[Ticks()], **setting).train(n * T * iterations)
    return ticks


def speeds(result: dict[str, Any]) -> dict[int, dict[str, dict[int, float]]]:
    """Return steps per second by n_envs, program and round."""
    by_n_envs: dict[int, dict[str, dict[int, float]]] = {}
    for run in sorted(result["runs"], key=lambda run: run["n_envs"]):
        by_n_envs.setdefault(run["n_envs"], {}).setdefault(run["name"], {})[run["round"]] = run["sps"]
    return by_n_envs


def markdown(result: dict[str, Any]) -> str:
    """Return the table in docs/performance.md."""
    lines = [
        "| n_envs | program | steps/s | vs stable-baselines3 | vs rlox | vs torch.compile |",
        "|---|---|---|---|---|---|",
    ]
    for n, sps in speeds(result).items():
        for name, by_round in sps.items():
            cells = [str(n), name, f"{statistics.median(by_round.values()):,.0f}"]
            targets = TARGETS.get((n, name.removeprefix("fastppo ")), (None, None, None))
            others = ("stable-baselines3", "rlox", f"{name}, torch.compile")
            for other, target in zip(others, targets, strict=True):
                if other not in sps or not name.startswith("fastppo"):
                    cells.append("")
                    continue
                ratios = sorted(x / sps[other][i] for i, x in by_round.items())
                cell = f"{statistics.median(ratios):.1f} ({ratios[0]:.1f}-{ratios[-1]:.1f})"
                cells.append(f"{cell}, aim {target:g}" if target else cell)
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot(result: dict[str, Any], path: Path) -> None:
    """Draw bars of steps per second with the range over rounds; matplotlib comes with stable-baselines3."""
    import matplotlib.pyplot as plt

    by_n_envs = speeds(result)
    figure, axes = plt.subplots(1, len(by_n_envs), figsize=(9, 3.2), layout="constrained")
    colors = {"stable-baselines3": "#9d9da1", "rlox": "#c7a76c"}
    for axis, (n, sps) in zip(axes, by_n_envs.items(), strict=True):
        names = list(sps)
        middle = [statistics.median(sps[name].values()) / 1e3 for name in names]
        low = [m - min(sps[name].values()) / 1e3 for m, name in zip(middle, names, strict=True)]
        high = [max(sps[name].values()) / 1e3 - m for m, name in zip(middle, names, strict=True)]
        axis.barh(names, middle, xerr=[low, high], color=[colors.get(name, "#4c78a8") for name in names])
        axis.invert_yaxis()
        axis.set_title(f"n_envs {n}", fontsize=10)
        axis.set_xlabel("thousand steps per second")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main(tyro.cli(Options))
