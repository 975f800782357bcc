"""Checks of `fastppo doctor`: hardware, software, the choices of `auto` on this machine, and a short training run."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import resource
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from fastppo.analysis.checks import CheckResult
from fastppo.config import Config
from fastppo.errors import CaptureError, FastPPOError, first_line
from fastppo.functional.gae import Trajectory, choose_gae, gae_loop, triton_failure
from fastppo.functional.recurrence import lstm_scan
from fastppo.native.library import cache_folder, kept_libraries
from fastppo.native.recurrence import lstm_forward, unavailable
from fastppo.runtime.compile import CompileError, compile_graph
from fastppo.runtime.cores import usable_cores
from fastppo.runtime.device import choose_device, cpu_name
from fastppo.runtime.graphs import capture
from fastppo.runtime.resources import free_memory
from fastppo.runtime.sharing import AT_START, free_cores, spinning_is_bounded
from fastppo.trainer import Trainer

_GIB = 2**30
_OPTIONAL = ("triton", "ale-py", "mujoco", "mujoco-warp", "envpool", "stable-baselines3")


def examine(env_id: str, seconds: float = 5.0) -> Iterator[CheckResult]:
    """Run every check; the self-test trains `env_id` for about `seconds`."""
    device = choose_device("auto")
    yield from _software()
    yield from _gpu(device)
    yield from _machine(device)
    yield _gae(device)
    yield _compiler(device)
    yield _native()
    yield from _training(env_id, seconds)


def _software() -> Iterator[CheckResult]:
    yield CheckResult("python", f"{platform.python_version()} on {platform.platform()}")
    yield CheckResult(
        "torch", f"{torch.__version__}, built for {'CUDA ' + torch.version.cuda if torch.version.cuda else 'CPU'}"
    )
    found = []
    for package in _OPTIONAL:
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    yield CheckResult("packages", ", ".join(found) or "no optional package installed")


def _gpu(device: torch.device) -> Iterator[CheckResult]:
    if device.type != "cuda":
        why = "" if torch.version.cuda is None else "torch is built for CUDA but finds no GPU: check nvidia-smi"
        yield CheckResult("gpu", "none", "note" if why else "ok", why)
        return
    for i in range(torch.cuda.device_count()):
        about = torch.cuda.get_device_properties(i)
        yield CheckResult(
            f"gpu {i}", f"{about.name}, {about.total_memory / _GIB:.0f} GiB, capability {about.major}.{about.minor}"
        )
    yield CheckResult("driver", _driver())
    yield _graph(device)
    triton = importlib.util.find_spec("triton") is not None
    advice = "" if triton else "pip install triton: fused runs, the GAE kernel and compiled updates need it on CUDA"
    yield CheckResult("triton", "installed" if triton else "not installed", "ok" if triton else "note", advice)


def _driver() -> str:
    """Return the driver version that nvidia-smi reports."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.split()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown: nvidia-smi does not report it"


def _graph(device: torch.device) -> CheckResult:
    """Capture a CUDA graph, replay it and compare the result."""
    x = torch.zeros(8, device=device)
    try:
        capture(lambda: x.add_(1), keep=[x], fresh=[], device=device)()
    except CaptureError as error:
        return CheckResult(
            "graphs",
            "capture fails",
            "note",
            f"auto then launches kernels one by one, or falls back to --compile on: {error}",
        )
    good = bool((x == 1).all())
    return CheckResult(
        "graphs", "capture and replay work" if good else "replay gives wrong results", "ok" if good else "bad"
    )


def _machine(device: torch.device) -> Iterator[CheckResult]:
    cores = usable_cores()
    limit = os.environ.get("OMP_NUM_THREADS")
    few = limit is not None and limit.isdecimal() and int(limit) < cores
    yield CheckResult(
        "cores",
        f"{cores} of {cpu_name()}" + (f", OMP_NUM_THREADS={limit}" if limit else ""),
        "note" if few else "ok",
        f"OMP_NUM_THREADS limits torch to {limit} of {cores} cores" if few else "",
    )
    if cores > 1:
        taken = cores - free_cores(AT_START)
        yield CheckResult(
            "free cores",
            f"{cores - taken} of {cores}",
            "note" if taken else "ok",
            "other processes use the rest; a run that starts now takes fewer threads" if taken else "",
        )
        bounded = spinning_is_bounded()
        yield CheckResult(
            "waiting threads",
            "sleep after a bounded spin" if bounded else "spin for a whole time slice",
            "ok" if bounded else "note",
            ""
            if bounded
            else "torch was imported before fastppo: import fastppo first, or export GOMP_SPINCOUNT=10000",
        )
    yield CheckResult("free memory", f"{free_memory(torch.device('cpu')) / _GIB:.1f} GiB")
    if device.type == "cuda":
        yield CheckResult("free GPU memory", f"{free_memory(device) / _GIB:.1f} GiB")
    shared = Path("/dev/shm")
    if shared.is_dir():
        free = shutil.disk_usage(shared).free / _GIB
        small = free < 0.25
        advice = "the pool stores observations there; in a container use docker run --shm-size=1g" if small else ""
        yield CheckResult("/dev/shm", f"{free:.2f} GiB free", "note" if small else "ok", advice)
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    tight = files < 1024
    advice = "vectorization async opens several files per environment: ulimit -n 4096" if tight else ""
    yield CheckResult("open files", f"{files:,} allowed", "note" if tight else "ok", advice)


def _gae(device: torch.device) -> CheckResult:
    """Compare the chosen GAE kernel with the float64 recursion."""
    generator = torch.Generator(device).manual_seed(0)
    x, y, z = (torch.randn(64, 33, generator=generator, device=device) for _ in range(3))
    done = torch.rand(64, 33, generator=generator, device=device) < 0.1
    trajectory = Trajectory(x, y, z, terminated=done & (x > 0), done=done)
    rates = [torch.tensor(x, device=device) for x in (0.99, 0.95)]
    kernel = choose_gae(64, 33, device)
    exact = gae_loop(Trajectory(*(part.double() if part.is_floating_point() else part for part in trajectory)), *rates)[
        0
    ]
    error = (kernel(trajectory, *rates)[0] - exact).abs().max().item()
    good = error < 1e-4
    if device.type == "cuda" and (failure := triton_failure(device)):
        advice = f"the Triton kernel does not work here: {type(failure).__name__}: {first_line(failure)}"
        return CheckResult("advantages", f"{kernel.__name__}, error {error:.1e}", "note" if good else "bad", advice)
    return CheckResult(
        "advantages",
        f"{kernel.__name__}, error {error:.1e}",
        "ok" if good else "bad",
        "" if good else "the GAE kernel is wrong here; please report it",
    )


def _compiler(device: torch.device) -> CheckResult:
    """Compile a small kernel and compare it with the eager result."""
    x = torch.randn(64, device=device)
    begin = time.perf_counter()
    try:
        compiled = compile_graph(lambda x: (x.tanh() * 2).sum(), [x])(x)
    except CompileError as error:
        return CheckResult("compiler", "does not work", "note", f"updates run eagerly, several times slower: {error}")
    if not torch.allclose(compiled, (x.tanh() * 2).sum(), atol=1e-4):
        return CheckResult("compiler", "gives wrong results", "bad", "use --compile off")
    return CheckResult("compiler", f"{time.perf_counter() - begin:.1f} s for a small kernel")


def _native() -> CheckResult:
    """Say whether C compiles here and computes the same as torch, and where its libraries are."""
    if (why := unavailable()) is not None:
        return CheckResult("C", "does not work", "note", f"MLP, LSTM and GRU train at half the speed: {why}")
    error = _native_error()
    if not error < 1e-4:  # NaN too
        return CheckResult(
            "C", f"gives wrong results, error {error:.1e}", "bad", "please report it, and set CC=none until then"
        )
    kept, folder = kept_libraries(), cache_folder()
    size = sum(path.stat().st_size for path in kept) / 2**10
    where = f"{len(kept)} compiled, {size:,.0f} KiB in {folder} (--clear-cache)"
    if folder is None:
        where = "compiled at each start, since there is no home folder (set XDG_CACHE_HOME)"
    return CheckResult("C", f"works, error {error:.1e}; {where}")


def _native_error() -> float:
    """Return the largest difference between an LSTM in C, 3 steps of 5 sequences of 7 units, and its steps in torch."""
    generator = torch.Generator().manual_seed(0)
    gates, weight = (torch.randn(shape, generator=generator) for shape in ((3, 5, 28), (28, 7)))
    hidden, cell = torch.randn(2, 5, 7, generator=generator)
    starts = torch.rand(3, 5, generator=generator) < 0.3
    outputs, steps = lstm_forward(gates, weight, starts, hidden, cell)[0], list[torch.Tensor]()
    for t in range(3):  # a single step is computed in torch
        output, hidden, cell = lstm_scan(gates[t : t + 1], weight, starts[t : t + 1], hidden, cell)
        steps.append(output)
    return (outputs - torch.cat(steps)).abs().max().item()


def _training(env_id: str, seconds: float) -> Iterator[CheckResult]:
    """Train for about `seconds` with the choices of `auto`."""
    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"n_envs": 8, "n_steps": 64, "total_timesteps": 10**9, "vectorization": "auto"}
        try:
            trainer = Trainer(
                Config(env_id=env_id, run_dir=Path(folder) / "run", compile="off", **settings), progress=False
            )
            for stats in trainer.iterations():
                if stats.seconds > seconds:
                    break
        except FastPPOError as error:
            yield CheckResult("training", "failed", "bad", str(error))
            return
        assert trainer.result is not None
        finite = bool(trainer.update.parameters.vector.isfinite().all())
        speed = f"{trainer.result.sps_steady:,.0f} steps/s on {trainer.config.env_id}, not compiled, n_envs 8"
        yield CheckResult("training", speed, "ok" if finite else "bad", "" if finite else "parameters are not finite")
        c = trainer.config
        yield CheckResult(
            "auto", f"device {c.device}, vectorization {c.vectorization}, threads {c.threads} at this size"
        )
        on_gpu, compiled = trainer.device.type == "cuda", "fused"
        try:  # compares gradients with torch's
            trainer.update.fuse(trainer.rollout.batch(), 1)
        except CompileError as error:
            instead = "graph" if on_gpu else "on if the run is long enough to gain from it"
            compiled = f"{instead}; not fused: {error}"
        yield CheckResult("auto", f"compile {compiled}")
