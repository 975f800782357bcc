"""The order of test files, and `--quick`, which skips what compiles, records or starts processes."""

import subprocess
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from fastppo.runtime.graphs import RECORDERS
from tests.cpu_graphs import record

# Files that take half a minute or more, longest first: short files are left when the first worker runs out of work
LONG = (
    "runtime/test_distributed.py",
    "kernels/test_update.py",
    "faults/test_processes.py",
    "test_learning.py",
    "faults/test_resume.py",
    "test_trainer.py",
    "test_docs.py",
    "test_tune.py",
    "test_seeds.py",
    "faults/test_storage.py",
    "test_gpu_contract.py",
    "test_pages.py",
    "kernels/test_rollout.py",
    "kernels/test_launch.py",
    "test_gpu_kernels.py",
    "test_memory.py",
    "faults/test_environment.py",
    "test_update.py",
    "test_learning_campaign.py",
    "test_rnd.py",
    "test_memory_plan.py",
    "test_study.py",
    "test_report.py",
    "runtime/test_graphs.py",
    "test_builders.py",
    "test_benchmarks.py",
    "envs/test_env_calls.py",
    "compat/test_scripts.py",
)

# Whole trainings and every command of the docs, which --quick leaves out
NOT_QUICK = ("test_learning.py", "test_docs.py")


def pytest_addoption(parser):
    parser.addoption("--quick", action="store_true", help="skip tests that compile, record a graph or start processes")


def pytest_collection_modifyitems(config, items):
    if config.getoption("quick"):
        items[:] = [x for x in items if not x.get_closest_marker("browser") and x.path.name not in NOT_QUICK]
    tests = Path(__file__).parent
    order = {tests / name: k for k, name in enumerate(LONG)}
    items.sort(key=lambda item: order.get(item.path, len(order)))


@pytest.fixture(scope="session", autouse=True)
def _graphs_on_the_cpu():
    """Let trainings on the CPU capture their graphs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(RECORDERS, "cpu", record)
        yield


@pytest.fixture(scope="session", autouse=True)
def _quick(request, _graphs_on_the_cpu):
    """Under --quick, skip a test at the moment it compiles or starts a process: no list or marker can be outdated."""
    if not request.config.getoption("quick"):
        yield
        return
    import torch._inductor

    start = subprocess.Popen.__init__

    def popen(self, args, *more, **kwargs):
        if args[0] not in ("git", "uname"):  # which every run starts to describe itself, in milliseconds
            pytest.skip("not in --quick: starts a process")
        start(self, args, *more, **kwargs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess.Popen, "__init__", popen)
        patch.setattr(BaseProcess, "start", lambda _: pytest.skip("not in --quick: starts a process"))
        patch.setattr(torch._inductor, "compile", lambda *_, **__: pytest.skip("not in --quick: compiles"))
        # a recording on the CPU takes seconds, as compiling does
        patch.setitem(RECORDERS, "cpu", lambda *_: pytest.skip("not in --quick: records a graph"))
        yield
