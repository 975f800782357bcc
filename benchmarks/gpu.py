"""Speed on one GPU, with a roofline: tensor environments, time to solve CartPole, MuJoCo on the host, an update.

    scripts/bench-gpu            # or, without a GPU: python -m benchmarks.gpu --device cpu --quick

Each part runs in a process of its own within its own time, most important first, and rows are written as they come: a
part that crashes or hangs keeps its rows and ends with its reason. Timed, each with a synchronisation at both ends:

- the start of a run with kernels, which compiles them, and of a second one;
- steps per second of whole training iterations (rollout, update, logging) after three warm-up iterations;
- seconds of training until the mean return of 100 episodes reaches 475, without compilation;
- one update (4 epochs, 4 minibatches) by minibatch size and compile mode;
- one call of each GAE kernel, and a copy of the bytes that any kernel must move (22 per cell).

Beside each figure: GFLOP of the matrix products and GB that any implementation must move, per iteration, minibatch or
call (`_roofline.iteration_work`); on known cards the shares of the peaks that this speed reaches; with compile off the
launches of a step and of a minibatch; on CUDA the GPU's operations in an iteration, and its share of the time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import tyro

from benchmarks import machine, median_ms, report, write
from benchmarks._forked import ForkedProcess
from benchmarks._roofline import Card, card_of, iteration_work, launches, minibatch_work, on_the_gpu, roofline
from fastppo import Config, Trainer
from fastppo.errors import first_line
from fastppo.functional.gae import Trajectory, choose_gae, gae_doubling
from fastppo.runtime.compile import compile_graph

Row = dict[str, Any]
MODES = ("off", "on", "graph", "fused")
_LEAST = 5.0  # seconds that a part needs at all


@dataclasses.dataclass
class Options:
    """GPU benchmarks."""

    device: str = "cuda"
    """Device."""
    quick: bool = False
    """Use small sizes and short times, and leave out what Inductor compiles."""
    only: tuple[str, ...] = ()
    """Run the parts whose names contain one of these words."""
    seconds: float = 580.0
    """Time for all parts."""
    output: Path | None = None
    """JSON file for the results."""

    @property
    def modes(self) -> tuple[str, ...]:
        """Compile modes."""
        return ("off", "fused") if self.quick else MODES


class Part(NamedTuple):
    """Rows that one process makes.

    Attributes:
        name: what they are about.
        seconds: after which the process is killed.
        rows: makes them.
    """

    name: str
    seconds: float
    rows: Callable[[Options], Iterator[Row]]


def parts(options: Options) -> list[Part]:
    """Return the parts, most important first."""
    listed = [Part("start", 150, starting)]
    listed += [
        Part(f"tensor CartPole {n}x{t} {how}", 100, functools.partial(tensor_training, n=n, t=t, how=how))
        for n, t in ([(16, 32)] if options.quick else [(4096, 128), (16384, 32)])
        for how in options.modes
    ]
    listed += [Part("CartPole to 475", 100, solving), Part("HalfCheetah 1x2048", 60, leanrl)]
    listed += [
        Part(f"HalfCheetah 64x128 acting on {act}", 60, functools.partial(host_training, act=act))
        for act in ("cpu", *(["cuda"] if options.device.startswith("cuda") else []))
    ]
    listed += [Part(f"update {how}", 60, functools.partial(updates, how=how)) for how in options.modes]
    listed.append(Part("advantages", 60, advantages))
    return [part for part in listed if not options.only or any(word in part.name for word in options.only)]


def main(options: Options) -> None:
    """Run the parts; nothing is written if none can run."""
    if options.seconds < _LEAST:
        sys.exit(f"--seconds {options.seconds:g}: a part needs at least {_LEAST:g}.")
    if not parts(options):
        names = ", ".join(part.name for part in parts(dataclasses.replace(options, only=())))
        sys.exit(f"--only {' '.join(options.only)}: no part is called so; there are {names}.")
    rows, end = list[Row](), time.monotonic() + options.seconds
    more = {"device": options.device, "quick": options.quick}
    with tempfile.TemporaryDirectory() as folder:
        tempfile.tempdir = folder  # of killed processes too
        try:
            (about,) = run(Part("machine", 60, _machine), options, options.seconds)
            if "failed" in about:
                sys.exit(f"--device {options.device} can't be used: {about['failed']}.")
            for part in parts(options):
                for row in run(part, options, end - time.monotonic()):
                    rows.append(row)
                    print(row, flush=True)
                    write(rows, options.output, about, **more)
        finally:
            tempfile.tempdir = None
    empty = {name: "" for row in rows for name in row}
    report([empty | row for row in rows], options.output, about, **more)
    if all("failed" in row for row in rows):
        sys.exit("every part failed.")


def _machine(options: Options) -> Iterator[Row]:
    """Return the machine's row, once the device has held a tensor."""
    try:
        torch.zeros(1, device=options.device)
    except (RuntimeError, AssertionError) as error:
        yield {"failed": first_line(error).removesuffix(".")}
        return
    yield machine()


def run(part: Part, options: Options, left: float) -> Iterator[Row]:
    """Return the rows of a part as they come; one that fails, or has no time left, ends with its reason."""
    if left < _LEAST:
        yield {"what": part.name, "failed": "no time was left"}
        return

    def work(send: Callable[[Row], None]) -> None:
        for row in part.rows(options):
            send(row)

    with contextlib.closing(ForkedProcess(work, min(part.seconds, left))) as process:
        ended = False
        while not ended:
            ended = process.poll()
            yield from process.messages()
            time.sleep(0.02)
        if process.failure is not None:
            last = process.printed.splitlines()[-1:]
            yield {"what": part.name, "failed": ": ".join([process.failure, *last])}


def starting(options: Options) -> Iterator[Row]:
    """Start a run of CartPole with kernels twice: the second run, and all later parts, find them in Triton's cache."""
    n, t = (16, 32) if options.quick else (4096, 128)
    for cache in ("perhaps cold", "warm"):
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            trainer = Trainer(_config(options, folder, env_id="CartPole-v1", n_envs=n, n_steps=t, compile="fused"))
            seconds = time.perf_counter() - began
            yield {"what": f"start, cache {cache}", "N": n, "T": t, "how": trainer.config.compile, "seconds": seconds}
            trainer.stop_requested = True
            trainer.run()


def tensor_training(options: Options, *, n: int, t: int, how: str) -> Iterator[Row]:
    row = {"what": "tensor CartPole", "N": n, "T": t, "how": how}
    yield row | _speed(options, env_id="CartPole-v1", n_envs=n, n_steps=t, compile=how)


def leanrl(options: Options) -> Iterator[Row]:
    """Train with the settings of LeanRL's ppo_continuous_action, which are CleanRL's, our defaults."""
    size = {"n_steps": 64, "n_minibatches": 4} if options.quick else {"n_steps": 2048, "n_minibatches": 32}
    settings = size | {"update_epochs": 10, "n_envs": 1, "vectorization": "sync", "compile": _auto(options)}
    row = {"what": "HalfCheetah, LeanRL's settings", "N": 1, "T": size["n_steps"]}
    yield row | _speed(options, env_id="HalfCheetah-v5", **settings)


def host_training(options: Options, *, act: str) -> Iterator[Row]:
    n, t, way = (2, 16, "sync") if options.quick else (64, 128, "pool")
    settings = {"n_envs": n, "n_steps": t, "vectorization": way, "act_device": act, "compile": _auto(options)}
    row = {"what": f"HalfCheetah {way}", "N": n, "T": t, "how": f"acting on {act}"}
    yield row | _speed(options, env_id="HalfCheetah-v5", **settings)


def solving(options: Options) -> Iterator[Row]:
    for seed in (1,) if options.quick else (1, 2, 3):
        with tempfile.TemporaryDirectory() as folder:
            changes = {
                "n_envs": 256,
                "n_steps": 32,
                "n_minibatches": 4,
                "update_epochs": 5,
                "learning_rate": 2e-3,
                "total_timesteps": 20_000 if options.quick else 10_000_000,
                "target_return": 475.0,
                "gae_lambda": 0.8,
                "gamma": 0.98,
                "ent_coef": 0.0,
            }
            trainer = Trainer(_config(options, folder, seed=seed, compile=_auto(options), **changes))
            work, card = iteration_work(trainer), _card(options)
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
            } | roofline(work, result.seconds / result.iterations, card, trainer.config.precision)


def updates(options: Options, *, how: str) -> Iterator[Row]:
    for n in [1] if options.quick else [4, 32, 256, 1024]:  # n_envs; a minibatch has 32 times as many rows
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(_config(options, folder, n_envs=n, n_steps=128, compile=how))
            trainer.collect()
            work = minibatch_work(trainer)

            def once(trainer: Trainer = trainer) -> None:
                trainer.learner.anneal(0.0)
                trainer.learner()
                _wait(trainer.device)

            ms = median_ms(once, 0.2 if options.quick else 1.0) / 16
            row = {"what": "update", "minibatch": n * 32, "how": how, "ran": trainer.config.compile, "ms": ms}
            yield row | roofline(work, ms / 1e3, _card(options), trainer.config.precision)
            trainer.stop_requested = True
            trainer.run()


def advantages(options: Options) -> Iterator[Row]:
    device = torch.device(options.device)
    shapes = [(128, 64)] if options.quick else [(128, 512), (128, 4096), (32, 16384), (2048, 64), (128, 65536)]
    for t, n in shapes:
        g = torch.Generator(device).manual_seed(0)
        numbers = [torch.randn(t, n, generator=g, device=device) for _ in range(3)]
        done = torch.rand(t, n, generator=g, device=device) < 0.02
        inputs = Trajectory(*numbers, done, done), *(torch.tensor(x, device=device) for x in (0.99, 0.95))
        chosen, source = choose_gae(t, n, device), torch.zeros(t * n * 11, dtype=torch.uint8, device=device)
        target = torch.empty_like(source)
        calls: dict[str, Callable[[], Any]] = {
            "copy": lambda target=target, source=source: target.copy_(source),
            chosen.__name__: lambda chosen=chosen, inputs=inputs: chosen(*inputs),
        }
        if not options.quick:
            compiled = compile_graph(gae_doubling, inputs)
            calls["doubling compiled"] = lambda compiled=compiled, inputs=inputs: compiled(*inputs)
        for name, call in calls.items():
            # many calls in a row: the time of one is mostly its launch
            def many(call: Callable[[], Any] = call) -> None:
                for _ in range(20):
                    call()
                _wait(device)

            ms = median_ms(many, 0.3) / 20
            row = {"what": "advantages", "T": t, "N": n, "how": name, "ms": ms}
            yield row | roofline({"flops": 0, "bytes": 22 * t * n}, ms / 1e3, _card(options), "fp32")


def _auto(options: Options) -> str:
    return "fused" if options.quick else "auto"


def _config(options: Options, folder: str, **changes: Any) -> Config:
    # what pays in a long run is compiled, which takes too long for a quick one
    steps = 100_000 if options.quick else 10**12
    settings = {"vectorization": "tensor", "n_minibatches": 4, "update_epochs": 4, "total_timesteps": steps}
    return Config(device=options.device, run_dir=Path(folder) / "run", **settings | changes)


def _speed(options: Options, **changes: Any) -> Row:
    """Return steps per second of training, and its roofline."""
    seconds = 0.3 if options.quick else 5.0
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(_config(options, folder, **changes))
        ticks: list[tuple[float, int]] = []
        phases: dict[str, list[float]] = {}
        row: Row = {}
        for stats in trainer.iterations():
            if stats.iteration < 3:
                continue
            ticks.append((stats.seconds, stats.global_step))
            for name, value in stats.scalars.items():
                if name.startswith("time/"):
                    phases.setdefault(name.removeprefix("time/"), []).append(value)
            if len(ticks) > 3 and ticks[-1][0] - ticks[0][0] > seconds:
                row = _roofline_and_launches(trainer, (ticks[-1][0] - ticks[0][0]) / (len(ticks) - 1), _card(options))
                break  # within the loop, because its end closes the environments
    return {
        "steps/s": (ticks[-1][1] - ticks[0][1]) / (ticks[-1][0] - ticks[0][0]),
        "ms": (ticks[-1][0] - ticks[0][0]) / (len(ticks) - 1) * 1e3,
        "phases ms": {name: round(statistics.median(x) * 1e3, 3) for name, x in phases.items()},
        "compile seconds": trainer.compile_seconds,
        "ran": trainer.config.compile,
    } | row


def _roofline_and_launches(trainer: Trainer, seconds: float, card: Card | None) -> Row:
    """Return the roofline of an iteration of `seconds`, and what was launched, or why that can't be counted."""
    row = roofline(iteration_work(trainer), seconds, card, trainer.config.precision)
    counts: Sequence[Callable[[Trainer], Row]] = [
        *([on_the_gpu] if trainer.device.type == "cuda" else []),
        *([launches] if trainer.config.compile == "off" else []),
    ]
    for count in counts:
        try:
            row |= count(trainer)
        except Exception as error:  # such as a profiler without rights
            row[count.__name__] = f"{type(error).__name__}: {first_line(error)}"
    return row


def _card(options: Options) -> Card | None:
    return card_of(torch.cuda.get_device_name(options.device)) if options.device.startswith("cuda") else None


def _wait(device: torch.device) -> None:
    """Synchronise with the GPU, so that a timer includes its work."""
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main(tyro.cli(Options))
