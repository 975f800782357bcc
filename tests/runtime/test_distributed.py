"""Two processes of N environments equal one of 2 N, given the same environments, noise and minibatches."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fastppo.evaluation.periodic import PeriodicEvaluation
from fastppo.ppo.metrics import MEASURED, merge_ranks
from fastppo.runs.checkpoint_writer import CheckpointWriter
from fastppo.runs.run_dir import wait_for_folder
from fastppo.runtime.clock import Clock
from fastppo.runtime.distributed import World
from tests import PATIENCE

# Trains each case in turn: one start of Python, torch and torchrun for all of them
TRAIN = """
import hashlib, json, os, sys
from pathlib import Path
import gymnasium, torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from fastppo import Config, Trainer
from fastppo.functional import bounded_distributions, distributions
from fastppo.ppo.minibatches import sequence_rows
from tests.worlds import Spaces, Turns

for name, actions in {"Choices-v0": spaces.MultiDiscrete([2, 3]), "Bits-v0": spaces.MultiBinary(3)}.items():
    gymnasium.register(name, lambda actions=actions: Spaces(spaces.Box(-1, 1, (3,)), actions))

folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
rank, size, n = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)), 4
N = 2 * n  # of all processes
mine = slice(rank * n, rank * n + n) if size > 1 else slice(0, N)
if size > 1:
    torch.distributed.init_process_group("gloo")

# noise of all environments, of which each process takes its part
everyone = torch.Generator()
for kind in (
    distributions.Categorical,
    distributions.MultiCategorical,
    distributions.Bernoulli,
    distributions.Gaussian,  # and squashed
    bounded_distributions.Beta,
):
    original = kind.fill_noise

    def fill(self, out, generator, original=original):
        if out.dim() < 3:  # not a rollout's
            return original(self, out, generator)
        whole = torch.empty(out.shape[0], N, *out.shape[2:])
        original(self, whole, everyone)
        out.copy_(whole[:, mine])

    kind.fill_noise = fill


def train(name, settings):
    everyone.manual_seed(11)
    n_envs = n if size > 1 else N
    make_env = None
    if settings.pop("fillers", False):
        make_env = lambda: SyncVectorEnv([Turns] * n_envs, autoreset_mode=AutoresetMode.NEXT_STEP)
    config = Config(n_envs=n_envs, run_dir=folder / name / f"run{size}", threads=1, **settings)
    trainer = Trainer(config, make_env=make_env)
    assert (trainer.rollout.valid is not None) == (make_env is not None)
    T, E, M = trainer.config.n_steps, trainer.config.update_epochs, trainer.config.n_minibatches
    L, shuffles = trainer.update.shuffle.segment_length, torch.Generator().manual_seed(12)
    prepare = trainer.update.prepare

    def same_minibatches(rows, limit):
        prepare(rows, limit)
        for e in range(E):
            parts = [torch.randperm(T // L * n, generator=shuffles).view(M, -1) for _ in range(2)]
            if size > 1:
                trainer.update.shuffle.orders[e] = sequence_rows(parts[rank], n, L)
            else:
                whole = [(p // n) * N + r * n + p % n for r, p in enumerate(parts)]
                trainer.update.shuffle.orders[e] = sequence_rows(torch.cat(whole, 1), N, L)

    trainer.update.prepare = same_minibatches
    logged, hashes, first = [], [], []
    for stats in trainer.iterations():
        keep = {k: v for k, v in stats.scalars.items() if not k.startswith("time/") and "sps" not in k.lower()}
        logged.append(keep | {"steps": stats.global_step, "mean": stats.mean_return, "episodes": stats.episodes})
        vector = trainer.update.parameters.vector
        if trainer.learner.curiosity is not None:
            vector = torch.cat((vector, trainer.learner.curiosity.parameters.vector))
        first = first or vector.tolist()
        hashes.append(hashlib.sha256(vector.numpy().tobytes()).hexdigest())
    normalizers = [m for m in (trainer.policy.encoder.normalizer, trainer.reward_normalizer) if m is not None]
    moments = [x.tolist() for m in normalizers for x in (m.mean, m.var, m.count)]
    out = {"logged": logged, "hashes": hashes, "one_update": first, "vector": vector.tolist(), "moments": moments}
    out["result"] = trainer.result.global_step
    (folder / name / f"{size}-{rank}.json").write_text(json.dumps(out))


for name, settings in cases.items():
    train(name, settings)
if size > 1:
    torch.distributed.destroy_process_group()
"""


def torchrun(*command, folder, processes=2):
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return subprocess.run([*run, *command], capture_output=True, text=True, timeout=PATIENCE, env=outside(), cwd=folder)


def outside():
    """Return the variables of a process that is no rank; its script may import from the tests."""
    env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE")}
    return env | {"PYTHONPATH": str(Path(__file__).parents[2])}


SETTINGS = {"n_steps": 32, "total_timesteps": 8 * 32 * 5, "n_minibatches": 4, "update_epochs": 3, "compile": "off"}
SETTINGS["record_ratios"] = 0  # each process samples its own rows


CASES = {
    "sync": {
        "env_id": "CartPole-v1",
        "wrappers": ["gymnasium.wrappers:RecordEpisodeStatistics"],
        "log_info": ["episode/r", "episode/l"],
        "vectorization": "sync",
        "learning_rate": 1e-3,
    },
    "stop by minibatch": {
        "env_id": "CartPole-v1",
        "vectorization": "tensor",
        "target_kl": 2e-3,
        "kl_stop": "minibatch",
        "compile": "off",
        "learning_rate": 0.01,
    },
    "fused, stop by minibatch": {
        "env_id": "Acrobot-v1",
        "vectorization": "tensor",
        "target_kl": 2e-3,
        "kl_stop": "minibatch",
        "objective": "clip_and_penalty",
        "compile": "fused",
        "learning_rate": 0.01,
    },
    "compiled, RND, stop by epoch": {
        "env_id": "CartPole-v1",
        "vectorization": "sync",
        "rnd": True,
        "target_kl": 2e-3,
        "compile": "on",
        "learning_rate": 0.01,
    },
    "normalisers": {
        "env_id": "Pendulum-v1",
        "env_kwargs": {"max_episode_steps": 20},
        "vectorization": "tensor",
        "normalize_obs": True,
        "normalize_rewards": True,
        "normalize_advantages": "batch",
    },
    "compiled, penalty and adaptive rate": {
        "env_id": "CartPole-v1",
        "vectorization": "tensor",
        "objective": "penalty",
        "learning_rate": "adaptive:1e-3:1e-5:1e-2",
        "compile": "on",
    },
    "muon": {"env_id": "CartPole-v1", "vectorization": "tensor", "optimizer": "muon", "learning_rate": 1e-3},
    "squashed, fused": {
        "env_id": "Pendulum-v1",
        "vectorization": "tensor",
        "action_distribution": "squashed",
        "compile": "fused",
    },
    "beta": {
        "env_id": "Pendulum-v1",
        "vectorization": "tensor",
        "action_distribution": "beta",
        "objective": "clip_and_penalty",
    },
    "choices": {"env_id": "Choices-v0", "vectorization": "sync", "objective": "penalty"},
    "bits": {"env_id": "Bits-v0", "vectorization": "sync", "objective": "clip_and_penalty"},
    "masked": {"env_id": "Taxi-v4", "vectorization": "sync", "learning_rate": 1e-3},
    "fillers and normalisers": {
        "fillers": True,
        "normalize_obs": True,
        "normalize_rewards": True,
        "learning_rate": 1e-3,
        "compile": "fused",
    },
    "memory": {
        "env_id": "CartPole-v1",
        "env_kwargs": {"max_episode_steps": 20},
        "vectorization": "sync",
        "learning_rate": 1e-3,
        "memory": "lstm",
        "memory_size": 16,
        "segment_length": 8,
    },
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """All cases by two processes, and by one."""
    folder = tmp_path_factory.mktemp("runs")
    script = folder / "train.py"
    script.write_text(TRAIN)
    arguments = [str(script), str(folder), json.dumps({name: SETTINGS | case for name, case in CASES.items()})]
    done = torchrun(*arguments, folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=PATIENCE, env=outside())
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.mark.parametrize("name", CASES)
def test_two_processes_of_n_are_one_of_2n(runs, name):
    found = ("2-0.json", "2-1.json", "1-0.json")
    first, second, alone = (json.loads((runs / name / file).read_text()) for file in found)
    assert first["hashes"] == second["hashes"], "parameters are bit-identical on every process after every iteration"
    assert len(set(first["hashes"])) == len(alone["logged"]) == 5
    for two, other, one in zip(first["logged"], second["logged"], alone["logged"], strict=True):
        assert two == pytest.approx(other, nan_ok=True), "every process reports the figures of all"
        assert two == pytest.approx(one, rel=2e-3, abs=2e-4, nan_ok=True)
    assert torch.tensor(first["one_update"]) == pytest.approx(torch.tensor(alone["one_update"]), abs=1e-5)
    assert torch.tensor(first["vector"]) == pytest.approx(torch.tensor(alone["vector"]), abs=1e-4)
    for a, b, c in zip(first["moments"], second["moments"], alone["moments"], strict=True):
        assert a == b
        assert a == pytest.approx(c, rel=1e-5, abs=1e-6)
    assert first["result"] == alone["result"]
    rows = 8 * 32 * 5
    assert alone["result"] < rows if "fillers" in CASES[name] else alone["result"] == rows
    if "target_kl" in CASES[name]:
        assert any("losses/stop_kl" in row for row in alone["logged"]), "no update was stopped"
    if "log_info" in CASES[name]:
        assert all("info/episode/r" in row for row in alone["logged"]), "no figure was compared"


def test_the_command_line_under_torchrun(tmp_path):
    settings = ["--n-envs", "2", "--n-steps", "16", "--total-timesteps", "320", "--vectorization", "tensor"]
    done = torchrun("-m", "fastppo", "train", *settings, "--run-dir", str(tmp_path / "run"), folder=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("steps per second") == 1, "only the main process prints"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run"]
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["global_step"], result["iterations"]) == (320, 5)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["processes"] == 2


def test_missing_torchrun_variables_are_one_line(tmp_path):
    env = os.environ | {"WORLD_SIZE": "2"}
    command = [
        sys.executable,
        "-m",
        "fastppo",
        "train",
        "--total-timesteps",
        "2048",
        "--run-dir",
        str(tmp_path / "run"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE)
    assert done.returncode == 2
    assert (
        "WORLD_SIZE is set, but not RANK, MASTER_ADDR, MASTER_PORT: start several processes with torchrun"
        in done.stderr
    )


NAMES = ("policy_loss", *MEASURED)


def test_figures_of_processes_are_merged():
    at = NAMES.index
    rows = np.zeros((2, len(NAMES) + 6))
    rows[:, at("steps")], rows[:, at("clipped_actions")] = (10, 30), (0.5, 0.1)
    rows[:, at("episodes")], rows[:, at("returns")], rows[:, at("broken")] = (2, 1), (3.0, 9.0), (0, 1)
    rows[0, len(NAMES) :] = [1, 2, 10, 20, 7, 3]  # returns, lengths, steps at which they ended: latest first
    rows[1, len(NAMES) :] = [9, np.nan, 90, np.nan, 5, np.nan]
    merged = merge_ranks(rows, NAMES)
    assert [merged[at(n)] for n in ("steps", "clipped_actions", "episodes", "returns", "broken")] == [40, 0.2, 3, 12, 1]
    assert merged[len(NAMES) :].tolist() == [1, 9, 2, 10, 90, 20, 7, 5, 3], "all episodes, latest first"


def test_the_latest_episodes_include_every_process():
    latest = [np.stack((np.full(100, 10.0 * rank), np.ones(100), np.repeat([7.0, 6.0], 50))) for rank in (1, 2)]
    rows = np.stack([np.concatenate((np.ones(len(NAMES)), x.reshape(-1))) for x in latest])
    returns, _, steps = merge_ranks(rows, NAMES)[len(NAMES) :].reshape(3, -1)
    assert sorted(set(returns)) == [10, 20]
    assert set(steps) == {7}
    assert len(returns) == 100


def test_a_shared_folder_may_appear_late(tmp_path, monkeypatch):
    """File servers may cache for a while that the folder does not exist."""
    folder, waits = tmp_path / "run", []

    def sleep(seconds):
        waits.append(seconds)
        if len(waits) == 3:
            folder.mkdir()

    monkeypatch.setattr("time.sleep", sleep)
    assert not wait_for_folder(folder, timeout=0)
    waits.clear()
    assert wait_for_folder(folder)
    assert len(waits) == 3


def test_every_process_knows_the_best_evaluation(monkeypatch):
    """Otherwise only the main one writes a lost best checkpoint again, and waits for the others."""
    sent = iter([7.0, 7.0])
    monkeypatch.setattr(World, "shared", lambda self, make: next(sent))
    evaluation = PeriodicEvaluation(
        None,
        None,
        torch.device("cpu"),
        eval_every=10,
        eval_episodes=1,
        eval_max_steps=1,
        video_every=None,
        seed=1,
        clock=Clock(),
        world=World(rank=1, size=2),
        say=print,
    )
    progress = SimpleNamespace(best=None)
    assert [evaluation(SimpleNamespace(global_step=step), progress) for step in (10, 15, 20)] == [True, False, False]
    assert progress.best == 7.0
    assert list(sent) == []


def test_after_a_failed_save_and_a_good_one_every_process_knows_the_checkpoint(tmp_path, monkeypatch):
    """Otherwise the main process ends the run while the others start another save, and wait for it."""
    failures = iter([True, False, False, False])  # stage 0 fails in the main process; then all three succeed
    monkeypatch.setattr(World, "any", lambda self, flag, device: flag or next(failures))
    (tmp_path / "checkpoints" / "step-000000000256.tmp").mkdir(parents=True)  # as the main process makes it
    said = []
    writer = CheckpointWriter(
        tmp_path,
        keep=2,
        every_steps=None,
        every_minutes=0,
        world=World(rank=1, size=2),
        device=torch.device("cpu"),
        say=said.append,
    )
    writer.save(128, dict, dict)
    assert len(said) == 1
    assert not writer.has(128)
    writer.save(256, dict, dict)
    assert writer.has(256)
    assert writer.failure is None
