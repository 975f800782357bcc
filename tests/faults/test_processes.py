"""Multi-process training when one rank dies, hangs or is signalled (faults D of the README); open ports (X6)."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fastppo.analysis.verify_resume import run_hashes
from fastppo.runs.checkpoint import list_checkpoints, newest_checkpoint
from fastppo.runs.state_files import read_state
from tests import PATIENCE, wait_until
from tests.faults.test_resume import RUN, rows_of

ROOT = Path(__file__).parents[2]
TOTAL = 8192
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


def torchrun(run, *, restarts=0, total=200_000_000, patience=60):
    command = [*TORCHRUN, "--max-restarts", str(restarts), "-m", "fastppo", "train", "--env-id", "CartPole-v1"]
    command += ["--n-envs", "4", "--n-steps", "32", "--compile", "off", "--run-dir", str(run), "--resume", "auto"]
    command += ["--checkpoint-every", "256", "--total-timesteps", str(total)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "FASTPPO_PATIENCE": str(patience)}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def ranks(process):
    """Return the training processes, ordered by rank."""
    found = {}
    for child in psutil.Process(process.pid).children():
        with contextlib.suppress(psutil.Error, ProcessLookupError):
            rank = child.environ().get("RANK")
            if rank is not None:
                found[int(rank)] = child
    return [found[rank] for rank in sorted(found)]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The final numbers of a run of two ranks that nothing interrupted."""
    run = tmp_path_factory.mktemp("whole") / "run"
    process = torchrun(run, total=TOTAL)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    return run_hashes(run)


def test_d1_a_killed_rank_ends_the_others_and_torchrun_resumes(tmp_path, whole):
    run = tmp_path / "run"
    process = torchrun(run, restarts=1, total=TOTAL)
    wait_until(lambda: len(list_checkpoints(run)) > 1)
    before = ranks(process)
    os.kill(before[1].pid, signal.SIGKILL)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert "resumed from step-" in " ".join(out.split())
    assert not any(child.is_running() for child in before)
    steps = [row["global_step"] for row in rows_of(run)]
    assert steps == list(range(256, TOTAL + 1, 256))
    path, problems = newest_checkpoint(run)
    assert not problems
    assert path.name == f"step-{TOTAL:012d}"
    assert read_state(path, 1) is not None
    assert run_hashes(run) == whole


def test_d3_a_stopped_rank_ends_the_run_after_a_time_out(tmp_path):
    run = tmp_path / "run"
    process = torchrun(run, patience=3)
    wait_until(lambda: len(list_checkpoints(run)) > 0)
    stopped = ranks(process)[1]
    stopped.suspend()
    begin = time.monotonic()
    wait_until(lambda: len(ranks(process)) < 2 or process.poll() is not None)
    stopped.resume() if stopped.is_running() else None
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode != 0
    assert "process 0 of 2 lost another process" in out
    assert time.monotonic() - begin < 300, "the default is 600 s"


def test_d4_a_signal_to_one_rank_saves_one_complete_checkpoint_and_a_resume_equals_the_whole_run(tmp_path, whole):
    run = tmp_path / "run"
    process = torchrun(run, total=TOTAL)
    wait_until(lambda: len(list_checkpoints(run)) > 1)
    children = ranks(process)
    children[1].send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=PATIENCE)
    assert "lost another process" not in out
    path, problems = newest_checkpoint(run)
    assert not problems
    last = rows_of(run)[-1]["global_step"]
    assert path.name == f"step-{last:012d}"
    assert last < TOTAL
    assert {file.name for file in path.iterdir()} >= {"state-0.json", "state-1.json"}
    process = torchrun(run, total=TOTAL)
    out, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, out
    assert run_hashes(run) == whole


def test_x6_no_port_is_open(tmp_path):
    """Runs in its own process, because imports of other tests may open ports."""
    run = tmp_path / "run"
    process = subprocess.Popen(
        [sys.executable, "-m", "fastppo", *RUN, "--run-dir", str(run)], stdout=subprocess.DEVNULL
    )
    wait_until(lambda: (run / "metrics.jsonl").exists())
    listening = [c for c in psutil.Process(process.pid).net_connections(kind="inet") if c.status == psutil.CONN_LISTEN]
    process.kill()
    process.wait()
    assert listening == []
