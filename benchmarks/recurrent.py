"""Training speed with an LSTM: fastppo against its own MLP and against sb3-contrib's RecurrentPPO, interleaved.

    python -m benchmarks.recurrent --output benchmarks/results/recurrent_2core-cpu_2026-11-27.json
    python -m benchmarks.recurrent --show benchmarks/results/recurrent_2core-cpu_2026-11-27.json

Matched: CartPole-v1, N=64, T=128, 4 epochs, 4 minibatches of 2,048 steps, one LSTM of 64 units that policy and value
share, float32, Adam with the same linearly annealed step size, the same coefficients, no value clipping, the same
number of updates. Not the same: fastppo's LSTM reads a shared 64x64 tanh trunk and feeds linear heads; RecurrentPPO's
(`shared_lstm`, the closest it has) reads the observation and feeds a 64x64 tanh network for the policy and one for
the value. fastppo trains on sequences of T steps; RecurrentPPO cuts them at the ends of episodes and of minibatches.
`MLP, shared trunk` is fastppo without the LSTM and otherwise unchanged; `MLP` is its default, two networks.

Timed as in benchmarks.peers: whole training iterations after the first `WARM_UP`, each measurement in a fresh process,
rounds in alternating order. A ratio is taken within a round; the table shows the median over rounds with its range.
RecurrentPPO runs with torch's default number of threads or with one, whichever is faster in a trial before the rounds.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tyro

from benchmarks import machine, run_task, table
from benchmarks._stable_baselines3 import iteration_ends

WARM_UP = 2
N, T, EPOCHS, MINIBATCHES, UNITS = 64, 128, 4, 4, 64
PEER = "sb3-contrib RecurrentPPO"
_SHARED = {"shared_trunk": True}
NETWORKS: dict[str, dict[str, Any]] = {
    "MLP": {},
    "MLP, shared trunk": _SHARED,
    "LSTM": _SHARED | {"memory": "lstm", "memory_size": UNITS},
    "GRU": _SHARED | {"memory": "gru", "memory_size": UNITS},
    "minGRU": _SHARED | {"memory": "mingru", "memory_size": UNITS},
}


@dataclasses.dataclass
class Options:
    """Training speed with an LSTM, with an MLP and with sb3-contrib's RecurrentPPO."""

    rounds: int = 5
    """Measurements per program."""
    iterations: int = 20
    """Iterations per measurement; the first two are not timed."""
    vectorization: tuple[str, ...] = ("sync", "native")
    """Vectorizations of fastppo; RecurrentPPO's is stable-baselines3's DummyVecEnv, one process as sync."""
    networks: tuple[str, ...] = tuple(NETWORKS)
    """Networks of fastppo."""
    output: Path | None = None
    """JSON file for the results."""
    show: Path | None = None
    """Print the table of this file instead of measuring."""
    one: str | None = None
    """Internal: measure one program in this process; its arguments as JSON."""


def main(options: Options) -> None:
    if options.one is not None:
        print(json.dumps(measure_here(**json.loads(options.one))))
    elif options.show is not None:
        print(table(rows(json.loads(options.show.read_text()))))
    else:
        result = compare(options)
        if options.output:
            options.output.write_text(json.dumps(result, indent=1) + "\n")
        print(table(rows(result)))
        print(json.dumps(result))


def compare(options: Options) -> dict[str, Any]:
    """Measure all programs in turns; return the result."""
    ours = [f"{network}, {how}" for how in options.vectorization for network in options.networks]
    trials = {threads: _measure(PEER, 2 + WARM_UP, threads)["sps"] for threads in (None, 1)}
    print(f"{PEER}: default threads {trials[None]:,.0f}, one thread {trials[1]:,.0f} steps/s", flush=True)
    threads = {PEER: 1 if trials[1] > trials[None] else None}
    for name in ours:  # fill the compiler's cache on disk
        _measure(name, 1 + WARM_UP, None)
    runs: list[dict[str, Any]] = []
    for i in range(options.rounds):
        programs = [PEER, *ours]
        for name in programs if i % 2 == 0 else reversed(programs):
            runs.append({"round": i, **_measure(name, options.iterations, threads.get(name))})
            print(f"round {i}  {name:30} {runs[-1]['sps']:9,.0f} steps/s", flush=True)
    setting = {
        "env_id": "CartPole-v1",
        "n_envs": N,
        "n_steps": T,
        "update_epochs": EPOCHS,
        "n_minibatches": MINIBATCHES,
    }
    return {"setting": setting, "iterations": options.iterations, "warm_up": WARM_UP, "runs": runs, **machine()}


def _measure(name: str, iterations: int, threads: int | None) -> dict[str, Any]:
    return run_task("benchmarks.recurrent", {"name": name, "iterations": iterations, "threads": threads})  # type: ignore[no-any-return]


def measure_here(name: str, iterations: int, threads: int | None) -> dict[str, Any]:
    import torch

    if threads is not None:
        torch.set_num_threads(threads)
    ticks = _recurrent_ppo(iterations) if name == PEER else _fastppo(name, iterations)
    sps = N * T * (iterations - WARM_UP) / (ticks[-1] - ticks[WARM_UP - 1])
    return {"name": name, "threads": torch.get_num_threads(), "sps": sps}


def _fastppo(name: str, iterations: int) -> list[float]:
    from fastppo import Config, Trainer

    network, vectorization = name.rsplit(", ", 1)
    with tempfile.TemporaryDirectory() as folder:
        config = Config(
            n_envs=N,
            n_steps=T,
            update_epochs=EPOCHS,
            n_minibatches=MINIBATCHES,
            total_timesteps=N * T * iterations,
            value_clip="off",
            vectorization=vectorization,  # type: ignore[arg-type]
            compile="on",
            run_dir=Path(folder) / "run",
            **NETWORKS[network],
        )
        return [time.time() for _ in Trainer(config).iterations()]


def _recurrent_ppo(iterations: int) -> list[float]:
    from sb3_contrib import RecurrentPPO

    sizes = {"n_envs": N, "n_steps": T, "epochs": EPOCHS, "minibatches": MINIBATCHES}
    memory = {"lstm_hidden_size": UNITS, "shared_lstm": True, "enable_critic_lstm": False}
    return iteration_ends(RecurrentPPO, "MlpLstmPolicy", **sizes, iterations=iterations, policy_kwargs=memory)


def rows(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table: each program's speed, and its ratios to RecurrentPPO and to the MLPs of its vectorization."""
    sps: dict[str, dict[int, float]] = {}
    for run in result["runs"]:
        sps.setdefault(run["name"], {})[run["round"]] = run["sps"]
    found = []
    for name, by_round in sps.items():
        how = name.rsplit(", ", 1)[-1]
        others = {
            "vs RecurrentPPO": PEER,
            "vs MLP": f"MLP, {how}",
            "vs MLP, shared trunk": f"MLP, shared trunk, {how}",
        }
        row = {"program": name, "steps/s": f"{statistics.median(by_round.values()):,.0f}"}
        for title, other in others.items():
            ratios = sorted(x / sps[other][i] for i, x in by_round.items()) if other in sps and other != name else []
            row[title] = f"{statistics.median(ratios):.2f} ({ratios[0]:.2f}-{ratios[-1]:.2f})" if ratios else ""
        found.append(row)
    return found


if __name__ == "__main__":
    main(tyro.cli(Options))
