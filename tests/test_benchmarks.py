"""Every benchmark imports; the comparison of two versions finds differences."""

import ast
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import compat, distributions, gpu, memory_and_masks, recurrent
from benchmarks._roofline import card_of, iteration_work, minibatch_work, roofline
from benchmarks.identical import compare, run_case
from benchmarks.identical_case import CASES, SETTINGS
from fastppo import Config, Trainer
from tests.worlds import short

ROOT = Path(__file__).parents[1]
NAMES = sorted(path.stem for path in (ROOT / "benchmarks").glob("[a-z]*.py"))


@pytest.mark.parametrize("name", NAMES)
def test_a_benchmark_imports_and_has_a_main(name):
    assert callable(importlib.import_module(f"benchmarks.{name}").main)


@pytest.mark.parametrize("name", NAMES)
def test_what_a_benchmark_imports_of_fastppo_exists(name):
    """Within functions too, where an import only runs with its benchmark."""
    tree = ast.parse((ROOT / "benchmarks" / f"{name}.py").read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "fastppo":
            module = importlib.import_module(node.module)
            for alias in node.names:
                assert hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")


@pytest.mark.parametrize("distribution", distributions.DISTRIBUTIONS)
@pytest.mark.parametrize("env_id", distributions.SETTINGS)
def test_the_settings_of_each_distribution_are_valid(env_id, distribution):
    config = Config(**distributions.settings_of(env_id, distribution, 2.0))
    assert config.learning_rate == 2 * distributions.SETTINGS[env_id]["learning_rate"]


def test_the_interval_of_a_difference_is_welchs():
    assert compat.welch([1, 2, 3, 4, 5], [2, 3, 4, 5, 6]) == pytest.approx(2.306 * 1, abs=1e-3), "equal variances 2.5"
    assert compat.welch([1, 1], [2, 2]) == 0
    row = compat.compare([{"program": p, "return": x} for p, x in (("fastppo", 3.0), ("stable-baselines3", 1.0))])
    assert row == {"fastppo": 3.0, "stable-baselines3": 1.0, "difference": 2.0}


@pytest.mark.parametrize("name", CASES)
def test_the_settings_of_each_case_are_valid(name):
    Config(**SETTINGS | CASES[name].settings)


def test_the_gpu_benchmark_writes_each_row_as_it_comes_and_survives_each_part(tmp_path, monkeypatch):
    output = tmp_path / "rows.json"

    def fails(options):
        for k in range(2):
            yield {"what": "part", "k": k}
        raise RuntimeError("no memory")

    def dies(options):
        yield {"what": "part", "k": 2}
        os.kill(os.getpid(), signal.SIGKILL)

    def hangs(options):
        time.sleep(60)
        yield

    def reads(options):
        yield {"what": "rows so far", "k": len(json.loads(output.read_text())["rows"])}

    made = [gpu.Part(work.__name__, 1.0, work) for work in (fails, dies, hangs, reads)]
    monkeypatch.setattr(gpu, "parts", lambda _: made)
    gpu.main(gpu.Options(device="cpu", output=output))
    found = json.loads(output.read_text())
    assert [(row["what"], row["k"], row["failed"]) for row in found["rows"]] == [
        ("part", 0, ""),
        ("part", 1, ""),
        ("fails", "", "ended with status 1: RuntimeError: no memory"),
        ("part", 2, ""),
        ("dies", "", "died by SIGKILL"),
        ("hangs", "", "killed after 1 s"),
        ("rows so far", 6, ""),
    ]
    assert "torch" in found["versions"]
    assert list(gpu.run(made[3], gpu.Options(), 1.0)) == [{"what": "reads", "failed": "no time was left"}]


def test_the_gpu_benchmark_runs_without_a_gpu(tmp_path):
    """The script, with small sizes: each part works, and has its roofline."""
    environment = os.environ | {"OUT": str(tmp_path), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = [ROOT / "scripts" / "bench-gpu", "--device", "cpu", "--quick", "--only", "tensor", "update"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "bench-gpu.json").read_text())["rows"]
    assert not [row for row in rows if row.get("failed")], rows
    assert [row["what"] for row in rows if row["how"] == "off"] == ["tensor CartPole", "update"]
    assert all(row["GB"] > 0 for row in rows)
    assert not any("share of bytes" in row for row in rows), "nobody knows the peaks of this card"
    first = rows[0]
    assert (first["N"], first["T"], first["ran"]) == (16, 32, "off")
    assert first["steps/s"] == pytest.approx(16 * 32 / first["ms"] * 1e3)
    assert 100 < first["launches per minibatch"] < 400
    assert 20 < first["launches per step"] < 200


def test_work_is_counted_by_its_definition(tmp_path):
    settings = {"n_envs": 4, "n_steps": 8, "n_minibatches": 2, "update_epochs": 3, "hidden_sizes": (16,)}
    trainer = Trainer(short(tmp_path, vectorization="tensor", env_id="CartPole-v1", compile="off", **settings))
    # actor and critic of one layer: 4 x 16 weights and a head each
    forward = 2 * (4 * 16 + 16 * 2 + 4 * 16 + 16 * 1)
    backward = forward + 2 * (16 * 2 + 16 * 1)  # no gradient of the observations
    minibatch = minibatch_work(trainer)
    assert minibatch["flops"] == 16 * (forward + backward)
    vector = 4 * trainer.update.parameters.size
    # a row: observation, action (int64), log-probability, two parameters, value, advantage, return
    assert minibatch["bytes"] == 16 * (4 * 4 + 8 + 4 * 6) + 6 * vector
    work = iteration_work(trainer)
    assert work["flops"] == 8 * 4 * forward + 6 * minibatch["flops"]
    state = 4 * (3 * 8 + 4 * 4)  # seed, episode and steps; four numbers
    r = trainer.rollout
    written = sum(x.nbytes for x in r.tensors().values()) + r.obs.nbytes + r.noise.nbytes
    assert work["bytes"] == written + 8 * (vector + 2 * state) + 22 * 32 + 6 * minibatch["bytes"]
    trainer.run()


def test_a_roofline_is_a_share_of_the_peaks_of_a_known_card():
    h100 = card_of("NVIDIA H100 80GB HBM3")
    assert (h100.bytes, h100.tf32) == (3.35e12, 494e12)
    assert card_of("NVIDIA H100 PCIe").bytes < h100.bytes < card_of("NVIDIA H200").bytes
    assert card_of("NVIDIA A100-SXM4-80GB").bf16 == 312e12
    assert card_of("Fake GPU") is None
    work = {"flops": 49.4e9, "bytes": 3.35e9}
    row = roofline(work, 1e-2, h100, "fp32")
    assert row == {
        "GFLOP": 49.4,
        "GB": 3.35,
        "share of FLOPs": pytest.approx(0.01),
        "share of bytes": pytest.approx(0.1),
    }
    assert roofline(work, 1e-2, h100, "bf16")["share of FLOPs"] == pytest.approx(49.4 / 9890)
    assert roofline(work, 1e-2, None, "fp32") == {"GFLOP": 49.4, "GB": 3.35}


WITHOUT_CUDA = """
import importlib.machinery, sys

blocked = set(sys.argv[1].split())


class Block:
    def find_spec(self, name, *_):
        return importlib.machinery.ModuleSpec(name, self) if name.partition(".")[0] in blocked else None

    def create_module(self, spec):
        raise ImportError(f"{spec.name} is not among the packages of the script")

    def exec_module(self, module):
        pass


sys.meta_path.insert(0, Block())
import torch


def touched(*_, **__):
    raise AssertionError("CUDA was touched before the fork")


for name in ("is_available", "device_count", "current_device", "_lazy_init", "init"):
    setattr(torch.cuda, name, touched)
import benchmarks.gpu
import pytest

arguments = ["-q", "--collect-only", "-m", "gpu", "tests/test_gpu.py", "-p", "no:cacheprovider", "-p", "no:xdist"]
sys.exit(pytest.main([*arguments, "-W", "default", "-p", "no:hypothesispytest"]))
"""


EXTRAS = "ale_py cv2 envpool hypothesis mujoco onnx optuna playwright sb3_contrib stable_baselines3 xdist"


def test_the_gpu_scripts_need_no_extras_and_touch_no_cuda_before_a_fork():
    """A child could not use the GPU otherwise."""
    command = [sys.executable, "-c", WITHOUT_CUDA, EXTRAS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert "tests/test_gpu.py: " in done.stdout


WEIGHT, SCALAR = "model.safetensors: weight", "iteration 1: losses/value_loss"
RUN = {SCALAR: 0.5, WEIGHT: torch.ones(3), "result.json: ended": "finished"}


@pytest.mark.parametrize(
    ("changes", "plain", "compiled", "largest"),
    [
        ({}, "equal", "equal", 0),
        ({SCALAR: float("nan")}, "differs", "differs", float("inf")),
        ({SCALAR: 0.75}, "differs", "within 1e-06", 0.25),
        ({WEIGHT: torch.ones(3) + 5e-7}, "differs", "within 1e-06", pytest.approx(5e-7, rel=0.1)),
        ({WEIGHT: torch.ones(3) + 1e-5}, "differs", "differs", pytest.approx(1e-5, rel=0.1)),
        ({WEIGHT: torch.ones(3).double()}, "differs", "within 1e-06", 0),
        ({WEIGHT: torch.ones(1, 3)}, "differs", "differs", float("inf")),
        ({"result.json: ended": "target"}, "differs", "differs", float("inf")),
        ({"new": 1}, "equal", "equal", 0),
    ],
)
def test_two_versions_are_compared(changes, plain, compiled, largest):
    found = compare(RUN, RUN | changes)
    assert (found.verdict(compiled=False), found.verdict(compiled=True)) == (plain, compiled)
    assert found.largest == largest
    assert found.extra == [name for name in changes if name not in RUN]


def test_a_value_that_the_new_version_lacks_is_an_error():
    found = compare(RUN, {SCALAR: 0.5, WEIGHT: RUN[WEIGHT]})
    assert found.missing == ["result.json: ended"]
    assert found.verdict(compiled=True) == "missing values"


def test_a_tree_equals_itself(tmp_path):
    for side in ("base", "here"):
        (tmp_path / side).mkdir()
    row = run_case("sync", {"base": ROOT, "here": ROOT}, tmp_path)
    assert (row["result"], row["missing"], row["extra"]) == ("equal", [], [])
    assert row["values"] > 100


def play(env, actions):
    """Return the observations, rewards and endings of an episode of these actions."""
    rows = [(env.reset(seed=1)[0], 0.0, False, False)]
    rows += [env.step(action)[:4] for action in actions]
    return [np.array(column) for column in zip(*rows, strict=True)]


def test_the_sign_of_the_t_maze_shows_in_its_first_cell_only_and_tells_the_turn():
    env = memory_and_masks.TMaze(length=3)
    obs, rewards, terminated, _ = play(env, [0, 0, 0])
    sign = obs[0, 0]
    assert sign in (-1, 1)
    assert obs[1:, 0].tolist() == [0, 0, 0]
    assert obs[:, 1].tolist() == [0, 0, 0, 1], "the junction shows"
    assert not rewards.any()
    assert not terminated.any()
    right = 1 if sign < 0 else 2
    assert env.step(right)[1:4] == (1.0, True, False)
    play(env, [0, 0, 0])
    assert env.step(3 - right)[1:4] == (0.0, True, False)


def test_an_episode_of_the_t_maze_is_cut_and_turns_in_its_corridor_stay_in_place():
    obs, rewards, terminated, truncated = play(memory_and_masks.TMaze(length=3), [1, 2] * 6)
    assert (obs[:, 0] == obs[0, 0]).all()
    assert not rewards.any()
    assert not terminated.any()
    assert np.flatnonzero(truncated).tolist() == [12]


def test_cartpole_without_velocities_shows_position_and_angle():
    env = memory_and_masks.cartpole_without_velocities()
    obs, _ = env.reset(seed=3)
    assert obs.tolist() == env.unwrapped.state[[0, 2]].astype(np.float32).tolist()
    assert env.observation_space.contains(obs)


@pytest.mark.parametrize(
    ("task", "variant"), [(task, v) for task, t in memory_and_masks.TASKS.items() for v in t.variants]
)
def test_the_settings_of_each_task_are_valid(task, variant):
    settings = memory_and_masks.settings_of(task, variant)
    config = Config(**settings)
    assert ("target_return" in settings) == (config.target_return is not None)


def test_a_campaign_over_tasks_trains_only_what_is_missing_or_has_other_settings(tmp_path, monkeypatch):
    trained = []

    def run_task(module, job, python):
        trained.append(job)
        task, variant, seed = job
        settings = memory_and_masks.settings_of(task, variant)
        return {"task": task, "variant": variant, "seed": seed, "settings": json.loads(json.dumps(settings))}

    monkeypatch.setattr(memory_and_masks, "run_task", run_task)
    jobs = [("t-maze", "lstm", 1), ("taxi", "no masks", 2)]
    first = [memory_and_masks.run_once(tmp_path, *job) for job in jobs]
    assert [memory_and_masks.run_once(tmp_path, *job) for job in jobs] == first
    assert trained == jobs
    monkeypatch.setitem(memory_and_masks._FIXED, "threads", 2)
    memory_and_masks.run_once(tmp_path, *jobs[0])
    assert trained == [*jobs, jobs[0]]


def test_a_run_of_a_task_is_as_expected_by_the_goal_of_its_variant():
    def expected(task, variant, **figures):
        return memory_and_masks.as_expected({"task": task, "variant": variant, **figures})

    assert expected("t-maze", "lstm", mean_return=0.96, best_mean_return=0.96)
    assert not expected("t-maze", "lstm", mean_return=0.94, best_mean_return=0.99)
    assert expected("t-maze", "mlp", mean_return=0.5, best_mean_return=0.6)
    assert not expected("t-maze", "mlp", mean_return=0.5, best_mean_return=0.8), "the best mean counts"
    assert expected("fetch-reach", "mlp", mean_return=-2.0, best_mean_return=-1.0, success_rate=0.9)


def test_a_ratio_of_recurrent_speeds_is_taken_within_its_round():
    speeds = {"LSTM, sync": (10, 30), "MLP, sync": (20, 90), recurrent.PEER: (5, 10)}
    runs = [
        {"name": name, "round": i, "sps": sps} for name, by_round in speeds.items() for i, sps in enumerate(by_round)
    ]
    row = recurrent.rows({"runs": runs})[0]
    assert row["vs MLP"] == "0.42 (0.33-0.50)"
    assert row["vs RecurrentPPO"] == "2.50 (2.00-3.00)"
    assert row["vs MLP, shared trunk"] == "", "not measured"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"only": ("nonsense",)}, "--only nonsense: no part is called so; there are start, tensor CartPole"),
        ({"seconds": -1.0}, "--seconds -1: a part needs at least 5"),
        ({"device": "tpu", "only": ("advantages",)}, "--device tpu can't be used: Expected one of cpu, cuda"),
    ],
)
def test_a_gpu_benchmark_that_cannot_run_leaves_earlier_results(tmp_path, options, message):
    path, folder = tmp_path / "bench-gpu.json", tempfile.gettempdir()
    path.write_text("before")
    with pytest.raises(SystemExit, match=message):
        gpu.main(gpu.Options(**{"device": "cpu", "quick": True, "output": path} | options))
    assert path.read_text() == "before"
    assert tempfile.gettempdir() == folder
