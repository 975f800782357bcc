"""What the interpreter doesn't see: Triton's JIT and its launcher, with a CUDA driver that launches nothing."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import PATIENCE
from tests.test_gpu_kernels import KERNELS

pytest.importorskip("triton", reason="Triton has no version for this platform")


@pytest.fixture(scope="module")
def launched(tmp_path_factory):
    """The kernels that were compiled, with the types of their arguments, and lines of launches."""
    import triton.backends.nvidia

    folder = tmp_path_factory.mktemp("driver")
    library, source = folder / "libcuda.so.1", Path(__file__).with_name("fake_libcuda.c")
    include = Path(triton.backends.nvidia.__path__[0]) / "include"
    compiler = os.environ.get("CC", "cc")
    subprocess.run([compiler, "-shared", "-fPIC", f"-I{include}", "-o", str(library), str(source)], check=True)
    own = {"TRITON_LIBCUDA_PATH": str(folder), "TRITON_CACHE_DIR": str(folder)}
    own["LD_LIBRARY_PATH"] = os.pathsep.join(filter(None, (str(folder), os.environ.get("LD_LIBRARY_PATH"))))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "tests.kernels.launched"],
        capture_output=True,
        text=True,
        env=os.environ | own | {"FAKE_CUDA_LAUNCHES": str(folder / "launches"), "TRITON_INTERPRET": "0"},
        timeout=PATIENCE,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = (folder / "launches").read_text().splitlines()
    return json.loads(run.stdout.splitlines()[-1]), [line.split() for line in lines]


def test_every_kernel_is_launched(launched):
    _, launches = launched
    assert {name for name, *_ in launches} == {kernel.name for kernel in KERNELS}
    grids = {tuple(map(int, sizes)) for name, *sizes in launches if name == "_differentiate"}
    assert grids == {(3, 2, 256)}, "programs, trunks, threads"


def test_the_types_of_the_kernels_compiled_for_every_gpu_are_those_of_their_launches(launched):
    """Those of `test_gpu_kernels` are written by hand."""
    known = {(kernel.module, kernel.name): [] for kernel in KERNELS}
    for kernel in KERNELS:
        known[kernel.module, kernel.name].append(kernel.types)
    for kernel in launched[0]:
        types = {name: kind for name, kind in kernel["types"].items() if kind != "constexpr"}
        assert any(types.items() <= listed.items() for listed in known[kernel["module"], kernel["name"]]), kernel


def test_no_argument_has_a_name_that_tritons_code_for_a_launch_uses():
    for kernel in KERNELS:
        function = getattr(importlib.import_module(kernel.module), kernel.name)
        assert not {"params", "options", "backend", "specialize_impl"} & set(function.arg_names), kernel.id
