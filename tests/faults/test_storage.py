"""Saving and loading under crashes, full disks and damaged or malicious files. Rows S and X of the README here."""

import ast
import dataclasses
import errno
import hashlib
import io
import json
import multiprocessing
import os
import random
import shutil
import struct
import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import pytest
import torch

from fastppo import Config, Trainer, evaluate, load_policy, resume
from fastppo.analysis.verify_resume import run_hashes
from fastppo.errors import CheckpointError, ConfigError, FastPPOError
from fastppo.resume_run import resumable_run
from fastppo.runs.checkpoint import best_checkpoint, clean_up, list_checkpoints, newest_checkpoint, verify_checkpoint
from fastppo.runs.checkpoint_writer import CheckpointWriter
from fastppo.runs.restore import restore
from fastppo.runs.run_dir import RunLock
from fastppo.runtime import faults
from fastppo.runtime.distributed import World
from tests import PATIENCE
from tests.faults.test_resume import LONG, RUN, fastppo, fastppo_process, interrupted, rows_of
from tests.worlds import short

ROOT = Path(__file__).parents[2]

# Saves two checkpoints in a child that is killed at its k-th file system call, for every k
TRACER = """
import os, pathlib, shutil, signal, sys
sys.path.insert(0, {root!r})
import torch
torch.set_num_threads(1)
from safetensors.torch import save
from fastppo.runs import checkpoint
from fastppo.runs.state_files import write_files
run = pathlib.Path({run!r})

def files(step):
    tensors = save({{"x": torch.full((600_000,), float(step))}})  # more than one chunk
    text = str(step).encode()
    return {{"model.safetensors": tensors, "model.json": text, "state-0.safetensors": tensors, "state-0.json": text}}

def save_one(step):
    folder = checkpoint.begin_checkpoint(run, step)
    write_files(folder, files(step))
    checkpoint.seal_checkpoint(folder)
    checkpoint.prune_checkpoints(run, 2)

def child(k, log):
    calls = []
    def count(name, path=""):
        calls.append(f"{{name}} {{path}}")
        if len(calls) == k:
            os.kill(os.getpid(), signal.SIGKILL)
    names = {{}}
    for name in ("open", "write", "fsync", "close", "mkdir", "rename", "unlink", "rmdir"):
        def patched(*args, _before=getattr(os, name), _name=name, **kwargs):
            about = args[0] if _name != "fsync" else names.get(args[0], "?")
            count(f"before {{_name}}", about)
            out = _before(*args, **kwargs)
            if _name == "open":
                names[out] = args[0]
            if _name in ("rename", "fsync", "write"):
                count(f"after {{_name}}", about)
            return out
        setattr(os, name, patched)
    checkpoint.clean_up(run)
    save_one(30)
    save_one(30)  # replaces itself
    if log:
        pathlib.Path(log).write_text(chr(10).join(calls))
    os._exit(0)

save_one(10)
save_one(20)
start = str(run) + "-start"
shutil.copytree(run, start)
bad, k = [], 0
while True:
    k += 1
    shutil.rmtree(run)
    shutil.copytree(start, run)
    pid = os.fork()
    if pid == 0:
        child(k, {log!r})
    done = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    if done == 0:
        break
    checkpoint.clean_up(run)
    path, problems = checkpoint.newest_checkpoint(run)
    left = [p.name for p in (run / "checkpoints").iterdir() if not p.name.startswith("step-0000")]
    odd = [p.name for p in (run / "checkpoints").iterdir() if p.suffix]
    if problems or path.name not in ("step-000000000020", "step-000000000030") or left or odd:
        bad.append((k, path.name, problems, left, odd))
    x = (path / "state-0.json").read_text()
    if int(path.name[5:]) != int(x):
        bad.append((k, path.name, x))
print(k - 1, "points", bad)
"""


def test_s1_s12_killed_at_every_point_of_a_save(tmp_path):
    log = tmp_path / "calls"
    script = TRACER.format(root=str(ROOT), run=str(tmp_path / "run"), log=str(log))
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.returncode == 0, done.stderr
    points, _, bad = done.stdout.partition(" points ")
    assert bad.strip() == "[]"
    assert int(points) > 60
    calls = log.read_text().splitlines()
    # power loss: files are flushed before the folder, the folder before its rename, its parent after it
    renamed = next(i for i, call in enumerate(calls) if call.startswith("after rename") and call.endswith("30.tmp"))
    synced = [call.split("/")[-1] for call in calls[:renamed] if call.startswith("after fsync")]
    needed = {"model.safetensors", "model.json", "state-0.safetensors", "state-0.json", "manifest.json"}
    assert synced[0] == "run"
    assert set(synced[1:-1]) == needed
    assert synced[-2:] == ["manifest.json", "step-000000000030.tmp"]
    after = [call.split("/")[-1] for call in calls[renamed:] if call.startswith("after fsync")]
    assert after[0] == "checkpoints"


@pytest.mark.slow  # CI kills at every point of a save, above
def test_s2_killed_at_random_times(tmp_path):
    from benchmarks.soak import kill_and_resume

    figures = kill_and_resume(tmp_path, kills=10, seed=5)
    assert figures["kills"] == 10
    assert figures["unloadable"] == figures["lost past the last checkpoint"] == figures["hash differences"] == 0


def all_figures(*arguments, **keywords):
    from benchmarks.soak import soak

    return list(soak(*arguments, **keywords))


@pytest.mark.slow
def test_hours_of_events_leak_no_resources(tmp_path):
    """A fortieth of a day's events; `scripts/soak --hours-of-events 24` runs all of them."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:  # no other test's memory
        (figures,) = pool.submit(all_figures, 0.6, tmp_path, turns=3).result()
    summary, samples = figures["summary"], figures["samples"]
    assert summary["iterations"] == 5_000 + 3 * 100  # and three turns of the comparison
    assert summary["episodes"] > 25_000
    assert len(figures["turns"]["0.6 hours"]) == 3
    assert summary["memory_mib per 10k iterations"] < 8  # one allocation shows in so short a run; 1 in a long one
    for name in ("descriptors", "threads", "children", "shared_memory_files"):
        # the minimum of each half, since a checkpoint may be open while we count
        middle = len(samples) // 2
        assert min(s[name] for s in samples[middle:]) <= min(s[name] for s in samples[middle // 2 : middle]), name
    assert summary["most checkpoint folders"] <= 4


def test_s3_a_full_disk_is_reported_and_training_continues(tmp_path):
    run = tmp_path / "run"
    arguments = [*RUN, "--run-dir", run, "--total-timesteps", "2560", "--checkpoint-every", "256"]
    environment = os.environ | {"FASTPPO_FAULT": "write:8:enospc"}  # in the second of ten
    done = fastppo_process(*arguments, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "could not be written (No space left on device); training continues" in " ".join(done.stdout.split())
    assert not list((run / "checkpoints").glob("*.tmp"))
    assert [p.name for p in list_checkpoints(run)] == [f"step-{256 * i:012d}" for i in (8, 9, 10)]


def test_s3_a_failed_last_save_is_an_error(tmp_path):
    run = tmp_path / "run"
    arguments = [*RUN, "--run-dir", run, "--total-timesteps", "512"]
    for point in ("write:1:enospc", "fsync:2:enospc"):
        with pytest.MonkeyPatch.context() as patch:  # as FASTPPO_FAULT=point does in a new process
            patch.setattr(faults, "_requested", point.split(":"))
            patch.setattr(faults, "_passed", 0)
            done = fastppo(*arguments)
        assert done.returncode == 1, done.stdout + done.stderr
        assert "could not be" in done.stderr
        assert not list((run / "checkpoints").glob("*"))
        shutil.rmtree(run)


def test_s3_a_file_size_limit_is_reported_without_a_traceback(tmp_path):
    run = tmp_path / "run"
    limit = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    limit += "resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))\nfrom fastppo.cli import main\n"
    arguments = [*RUN, "--run-dir", str(run), "--total-timesteps", "512"]
    done = subprocess.run(
        [sys.executable, "-c", f"{limit}sys.exit(main({arguments!r}))"],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 1, done.stderr
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four iterations with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("trained")
    config = short(folder, env_id="CartPole-v1", **LONG)
    interrupted(config, 4)
    return config.run_dir


DAMAGES = {
    "cut": lambda data: data[: len(data) // 2],
    "flipped": lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
    "zeroed": lambda data: bytes(len(data)),
    "longer": lambda data: data + b"x",
    "empty": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["model.safetensors", "state-0.safetensors", "state-0.json", "manifest.json"])
def test_s5_a_damaged_checkpoint_is_skipped(trained, tmp_path, damage, name):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = list_checkpoints(run)[-1]
    (newest / name).write_bytes(DAMAGES[damage]((newest / name).read_bytes()))
    path, problems = newest_checkpoint(run)
    assert path.name == "step-000000000192"
    assert len(problems) == 1


def test_s5_resume_uses_the_checkpoint_before_a_damaged_one_and_writes_that_again(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    newest = list_checkpoints(run)[-1]
    (newest / "state-0.json").unlink()
    done = fastppo("resume", run)
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert "state-0.json is missing. Resuming from step-000000000192" in text
    verify_checkpoint(newest)
    whole = tmp_path / "whole"
    shutil.copytree(trained, whole)
    resume(whole).run()
    assert run_hashes(whole) == run_hashes(run)


def test_s6_if_all_checkpoints_are_damaged_no_run_starts(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in list_checkpoints(run):
        (path / "model.safetensors").write_bytes(b"")
    for command in (["resume", run], [*RUN, "--run-dir", run, "--resume", "auto"]):
        done = fastppo(*command)
        assert done.returncode == 2
        assert "no checkpoint in" in done.stderr
        assert "Traceback" not in done.stderr
    assert len(rows_of(run)) == 4


def test_s7_leftovers_are_removed_and_foreign_files_stay(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    folder = run / "checkpoints"
    (folder / "step-000000000999.tmp").mkdir()
    (folder / "step-000000000064.gone").mkdir()
    (folder / "notes.txt").write_text("mine")
    (folder / "step-12").mkdir()
    (folder / "step-000000000256").rename(folder / "step-000000000256.old")  # killed between two renames
    partly_written = [run / ".model.json.12.tmp", run / ".metrics.jsonl.12.tmp", folder / ".best.json.12.tmp"]
    exported = run / ".policy.onnx.12.tmp"  # perhaps by a process that still runs
    for file in (*partly_written, exported):
        file.write_text("{")
    assert newest_checkpoint(run)[0].name == "step-000000000192"
    clean_up(run)
    assert newest_checkpoint(run)[0].name == "step-000000000256"
    names = {path.name for path in folder.iterdir()}
    assert {"notes.txt", "step-12"} <= names
    assert not any(name.endswith((".tmp", ".gone", ".old")) for name in names)
    assert not any(file.exists() for file in partly_written)
    assert exported.exists()


def test_s1_a_run_killed_between_two_renames_can_be_resumed(trained, tmp_path, monkeypatch):
    """Its only checkpoint has the name *.old at that moment."""
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in list_checkpoints(run)[:-1]:
        shutil.rmtree(path)
    (only,) = list_checkpoints(run)
    only.rename(only.with_suffix(".old"))
    assert resumable_run(Config(run_dir=run)) == run
    named = tmp_path / "runs" / "CartPole-v1" / "ppo-1-20261122-000000"
    shutil.copytree(run, named)
    only = list_checkpoints(named)[0]
    only.rename(only.with_suffix(".old"))
    monkeypatch.chdir(tmp_path)
    assert resumable_run(Config()).resolve() == named, "found by env, name and seed"
    only = list_checkpoints(run)[0]
    only.rename(only.with_suffix(".old"))
    lock = RunLock(run)
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        resume(run)  # the trainer that holds the lock may be about to rename it
    lock.release()
    trainer = resume(run)
    assert trainer.metrics.global_step == int(only.name.removeprefix("step-"))
    trainer.run()


def test_x2_a_model_that_claims_to_be_huge_is_refused_at_once(trained, tmp_path):
    claims = {
        "one layer": {"hidden_sizes": [10**12]},
        "two layers": {"hidden_sizes": [20_000, 20_000]},
        "many layers": {"hidden_sizes": [2000] * 100_000},
        "many narrow ones": {"hidden_sizes": [1] * 100_000},
        "observations": {"obs": {"shape": [10**9]}},
        "observations, network": {"obs": {"shape": [10**12]}, "network": "custom"},
        "actions": {"action": {"nvec": [2 * 10**9]}},
    }
    for name, claim in claims.items():
        run = tmp_path / name
        shutil.copytree(trained, run)
        about = json.loads((run / "model.json").read_text())
        for key, value in claim.items():
            about["policy"][key] = about["policy"][key] | value if isinstance(value, dict) else value
        (run / "model.json").write_text(json.dumps(about))
        begin = time.monotonic()
        with pytest.raises(CheckpointError, match="need more than the .* bytes of weights here"):
            load_policy(run)
        assert time.monotonic() - begin < 5, name
        about["policy"]["hidden_sizes"] = [-1]
        (run / "model.json").write_text(json.dumps(about))
        with pytest.raises(CheckpointError, match="widths must be at least 1"):
            load_policy(run)
        (run / "model.safetensors").unlink()
        with pytest.raises(CheckpointError, match=r"holds no saved model \(model.safetensors is missing"):
            load_policy(run)


def test_s5_damaged_checkpoints_dont_count_as_kept(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    for path in list_checkpoints(run)[2:]:
        (path / "model.json").write_text("{}")
    trainer = resume(run)
    trainer.config = dataclasses.replace(trainer.config, keep_checkpoints=2)
    trainer._saver._writer._keep = 2
    for stats in trainer.iterations():
        if stats.iteration == 3:
            break
    assert [path.name for path in list_checkpoints(run)] == ["step-000000000128", "step-000000000192"]
    verify_checkpoint(list_checkpoints(run)[-1])


def test_a_checkpoint_without_the_state_of_one_process_is_refused(trained, tmp_path):
    path = tmp_path / "step"
    shutil.copytree(list_checkpoints(trained)[-1], path)
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"processes": 2}))
    with pytest.raises(CheckpointError, match=r"doesn't list state-1\.json, state-1\.safetensors"):
        verify_checkpoint(path)


def test_the_best_checkpoint_is_verified_before_evaluation(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG | {"eval_every": 64})
    Trainer(config).run()
    best = best_checkpoint(config.run_dir)
    data = (best / "model.safetensors").read_bytes()
    (best / "model.safetensors").write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="was altered"):
        evaluate(config.run_dir, 2, best=True)


def test_a_damaged_line_of_metrics_does_not_prevent_a_resume(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(b'\xff\xfe{"global_step": 1e999}\n')
    assert resume(run).run().ended == "finished"
    assert [row["iteration"] for row in rows_of(run)] == list(range(1, 9))


def test_s8_two_trainers_on_one_folder(tmp_path):
    run = tmp_path / "run"
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    trainer = Trainer(config)
    with pytest.raises(ConfigError, match=rf"in use by another trainer \(pid {os.getpid()} on .+\)"):
        RunLock(run)
    steps = iter(trainer.iterations())
    next(steps)
    next(steps)
    done = fastppo_process("resume", run)
    assert done.returncode == 2
    assert f"in use by another trainer (pid {os.getpid()}" in done.stderr
    steps.close()
    RunLock(run).release()


def test_s9_a_run_is_never_overwritten(trained):
    with pytest.raises(ConfigError, match="not empty and runs are never overwritten"):
        Trainer(Config(env_id="CartPole-v1", run_dir=trained, vectorization="sync"))


def test_s10_training_continues_if_its_folder_is_deleted(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    trainer = Trainer(config)
    for stats in trainer.iterations():
        while stats.iteration == 3 and config.run_dir.exists():  # again, where a save adds files meanwhile
            shutil.rmtree(config.run_dir, ignore_errors=True)
    assert trainer.result.ended == "finished"
    assert trainer.result.unsaved is None
    assert newest_checkpoint(config.run_dir)[0].name == "step-000000000512"


def test_s10_a_log_that_cant_be_written_is_one_warning(tmp_path, monkeypatch):
    from rich.console import Console

    console = Console(record=True, width=200, file=io.StringIO())
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", **LONG), console=console)
    for stats in trainer.iterations():
        if stats.iteration == 2:
            jsonl = trainer.logger.sinks[1]
            jsonl._file.close()
            jsonl._file = open("/dev/full", "w", buffering=1)
    assert console.export_text().count("JsonlSink can't write (No space left on device)") == 1
    assert trainer.result.ended == "finished"


def test_x1_nothing_is_unpickled_from_files():
    for path in sorted((ROOT / "fastppo").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            assert not {n.split(".")[0] for n in names} & {"pickle", "shelve", "marshal", "dill", "yaml"}, path
            if isinstance(node, ast.Attribute) and node.attr == "load" and isinstance(node.value, ast.Name):
                assert node.value.id not in ("torch", "np", "numpy"), path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in ("eval", "exec"), path


class Canary:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_x1_pickled_code_in_place_of_a_file_never_runs(trained, tmp_path):
    import pickle

    run, canary = tmp_path / "run", tmp_path / "canary"
    for name in ("model.safetensors", "model.json", "state-0.safetensors", "state-0.json"):
        shutil.copytree(trained, run)
        for path in list_checkpoints(run):
            torch.save({"x": Canary(str(canary))}, path / name)
            seal(path)
        with pytest.raises(FastPPOError):
            resume(run)
        (list_checkpoints(run)[0] / name).write_bytes(pickle.dumps(Canary(str(canary))))
        with pytest.raises(FastPPOError):
            load_policy(list_checkpoints(run)[0]) if name.startswith("model") else verify_checkpoint(
                list_checkpoints(run)[0]
            )
        shutil.rmtree(run)
    assert not canary.exists()


def seal(path):
    """Write a manifest that matches the altered files."""
    names = [file.name for file in path.iterdir() if file.name != "manifest.json"]
    entries = {
        name: {"bytes": (path / name).stat().st_size, "sha256": hashlib.sha256((path / name).read_bytes()).hexdigest()}
        for name in names
    }
    (path / "manifest.json").write_text(json.dumps({"format": 1, "processes": 1, "files": entries}))


def bombs(rng, data):
    """A safetensors file with a wrong header."""
    length = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + length])
    names = [name for name in header if name != "__metadata__"]
    entry = header[rng.choice(names)]
    match rng.randrange(8):
        case 0:
            return struct.pack("<Q", 2**62) + data[8:]
        case 1:
            entry["shape"] = [2**31, 2**31]
        case 2:
            entry["data_offsets"] = [0, 2**50]
        case 3:
            entry["data_offsets"] = list(header[rng.choice(names)]["data_offsets"])
        case 4:
            entry["dtype"] = rng.choice(["F99", "F8_E4M3", "BOOL", "I64", 7, None])
        case 5:
            entry["shape"] = rng.choice([[-1], [1.5], "many", None, [0], [[1]]])
        case 6:
            header[rng.choice(["policy.extra", "__metadata__", ""])] = rng.choice([{}, [], "x", {"format": 3}])
        case 7:
            del header[rng.choice(names)]
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data[8 + length :]


ODD = [None, True, -1, 0, 10**400, 1e308, float("nan"), "", "x", "../../etc/passwd", [], {}, [[]], {"a": {}}]
ODD += [{"array": ["O", [1], ""]}, {"generator": ["__class__", {}]}, {"array": ["<f8", [10**12], ""]}, "\ud800"]


def odd_json(rng, data):
    """JSON with one value replaced or removed, or text that is not JSON."""
    if rng.random() < 0.15:
        return rng.choice([b"[" * 200_000, b'{"format": 1', b"\xff\xfe", b"", b"9" * 100_000, b"NaN", b'{"a":1}' * 9])
    value = json.loads(data)
    holder, key = value, None
    while True:
        keys = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
        if not keys:
            break
        key = rng.choice(keys)
        if rng.random() < 0.4 or not isinstance(holder[key], (dict, list)) or not holder[key]:
            break
        holder = holder[key]
    if key is not None:
        if rng.random() < 0.2:
            del holder[key]
        else:
            holder[key] = rng.choice(ODD)
    return json.dumps(value).encode()


def test_x2_500_malformed_checkpoints_are_refused_with_a_message(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    source = list_checkpoints(run)[-1]
    trainer = Trainer(short(tmp_path, env_id="CartPole-v1", **LONG | {"run_dir": tmp_path / "other"}))
    rng, refused, slowest = random.Random(11), 0, 0.0
    originals = {file.name: file.read_bytes() for file in source.iterdir()}
    for case in range(500):
        name = rng.choice(sorted(originals))
        alter = bombs if name.endswith("safetensors") else odd_json
        for file, data in originals.items():
            (source / file).write_bytes(data)
        (source / name).write_bytes(alter(rng, originals[name]))
        if name != "manifest.json":
            seal(source)
        begin = time.monotonic()
        try:
            verify_checkpoint(source)
            restore(source, trainer._run.state, trainer.rollout.obs[-1], trainer.world)
        except FastPPOError as error:
            assert str(error), case
            refused += 1
        slowest = max(slowest, time.monotonic() - begin)
    assert refused > 300
    assert slowest < 5


def test_x2_200_malformed_settings_are_refused_with_a_message():
    rng, refused = random.Random(7), 0
    names = list(Config().to_dict())
    for _ in range(200):
        values = {
            rng.choice([*names, "lerning_rate", "", "__class__"]): rng.choice(ODD) for _ in range(rng.randrange(1, 3))
        }
        begin = time.monotonic()
        try:
            Config.from_dict(values)
        except ConfigError as error:
            refused += 1
            assert "\n" not in str(error)
        assert time.monotonic() - begin < 5
    assert refused > 100


def test_x5_names_with_path_parts_are_refused():
    for name in ("..", "a/b", "/tmp", "a\0b", "", ".hidden"):
        with pytest.raises(ConfigError, match="name="):
            Config(name=name)


def test_x5_a_manifest_with_a_path_or_symlink_is_refused(trained, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    path = list_checkpoints(run)[-1]
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["files"]["../../../x"] = {"bytes": 1, "sha256": ""}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="which is not a checkpoint file"):
        verify_checkpoint(path)
    seal(path)
    data = (path / "model.json").read_bytes()
    (tmp_path / "elsewhere").write_bytes(data)
    (path / "model.json").unlink()
    (path / "model.json").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="which is not a checkpoint file"):
        verify_checkpoint(path)


def test_x8_tokens_in_the_environment_are_never_written(tmp_path):
    run = tmp_path / "run"
    secret = "hunter2-is-not-a-good-one"
    done = fastppo_process(
        *RUN, "--run-dir", run, "--total-timesteps", "512", env=os.environ | {"WANDB_API_KEY": secret}
    )
    assert done.returncode == 0
    for file in run.rglob("*"):
        if file.is_file():
            assert secret.encode() not in file.read_bytes(), file


def test_a_saved_state_cant_replace_methods_of_an_environment(trained, tmp_path):
    from fastppo.envs.env_state import set_state, state_of
    from fastppo.envs.factory import EnvFactory
    from fastppo.errors import EnvError

    env = EnvFactory("CartPole-v1", {})()
    env.reset(seed=0)
    state = state_of(env)
    state[-1]["attributes"]["step"] = "no function"
    with pytest.raises(EnvError, match="would replace its step"):
        set_state(env, state)
    state = state_of(env)
    state[-1]["attributes"]["action_space"] = 3
    with pytest.raises(EnvError, match="would replace its action_space"):
        set_state(env, state)


def test_a_best_checkpoint_that_could_not_be_written_is_written_with_the_next(tmp_path):
    said = []
    writer = CheckpointWriter(
        tmp_path,
        keep=1,
        every_steps=None,
        every_minutes=0,
        world=World(),
        device=torch.device("cpu"),
        say=said.append,
    )

    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    answers = iter([full, lambda: {"shared": b"of step 8"}])
    writer.save(8, lambda: next(answers)(), lambda: {"own": b"of step 8"}, best=5.0)
    writer.wait()
    assert "step 8 could not be written" in said[0]
    assert best_checkpoint(tmp_path) is None
    for step in (16, 24):
        files = {"shared": b"of a later step"}
        writer.save(step, lambda files=files: files, dict)
    writer.close()
    assert [path.name[-2:] for path in list_checkpoints(tmp_path)] == ["08", "24"]
    best = best_checkpoint(tmp_path)
    assert best.name.endswith("08")
    assert (best / "shared").read_bytes() == (best / "own").read_bytes() == b"of step 8"
    assert writer.failure is None
