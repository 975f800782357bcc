"""An interrupted and resumed run is bit-identical to an uninterrupted one."""

import contextlib
import dataclasses
import io
import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fastppo import Config, Trainer, resume
from fastppo.analysis.verify_resume import TIMED, run_hashes
from fastppo.builders import parts
from fastppo.cli import main
from fastppo.config import FIXED
from fastppo.errors import CheckpointError, ConfigError, FinishedError
from fastppo.resume_run import continue_run
from fastppo.runs.checkpoint import list_checkpoints, newest_checkpoint
from tests import PATIENCE, wait_until
from tests.worlds import short

LONG = {"n_envs": 4, "n_steps": 16, "total_timesteps": 4 * 16 * 8, "checkpoint_every": 64, "keep_checkpoints": 20}


def rows_of(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(TIMED)} for row in rows]


def interrupted(config, after):
    """Train and leave the loop after `after` iterations."""
    for stats in Trainer(config).iterations():
        if stats.iteration == after:
            break


SMALL = {"n_steps": 4, "total_timesteps": 4 * 4 * 8, "checkpoint_every": 16}  # a graph is recorded step by step
EVERYTHING = {
    "normalize_obs": True,
    "normalize_rewards": True,
    "target_kl": 0.02,
    "anneal_clip": True,
    "eval_every": 128,
    "eval_episodes": 3,
}


@pytest.mark.parametrize(
    "changes",
    [
        {"env_id": "CartPole-v1"},
        {"env_id": "CartPole-v1", "vectorization": "pool", "workers": 2, **EVERYTHING},
        {"env_id": "CartPole-v1", "vectorization": "pool", "workers": 2, "half_batches": True, **EVERYTHING},
        {"env_id": "CartPole-v1", "vectorization": "native", **EVERYTHING},
        {"env_id": "CartPole-v1", "vectorization": "tensor", **EVERYTHING},
        {"env_id": "CartPole-v1", "vectorization": "tensor", "compile": "graph", **SMALL},
        {"env_id": "CartPole-v1", "compile": "on", **EVERYTHING},
        {"env_id": "Pendulum-v1", **EVERYTHING, "kl_stop": "minibatch"},
        {"env_id": "FrozenLake-v1"},
        pytest.param(
            {"env_id": "HalfCheetah-v5", "vectorization": "pool", "workers": 2, **EVERYTHING}, marks=pytest.mark.slow
        ),
    ],
    ids=lambda changes: "-".join(str(v) for k, v in changes.items() if k in ("env_id", "vectorization", "compile")),
)
def test_s2_a_resumed_run_is_bit_identical(tmp_path, changes):
    config = short(tmp_path, **LONG | changes)
    whole, parted = dataclasses.replace(config, run_dir=tmp_path / "whole"), config
    Trainer(whole).run()
    interrupted(parted, 3)
    resumed = resume(parted.run_dir)
    assert any("exact" in note for note in resumed.notes)
    resumed.run()
    assert run_hashes(tmp_path / "whole") == run_hashes(parted.run_dir)
    assert rows_of(tmp_path / "whole") == rows_of(parted.run_dir)


def test_a_resume_from_any_checkpoint_is_bit_identical(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    Trainer(config).run()
    expected = run_hashes(config.run_dir)
    for path in list_checkpoints(config.run_dir)[:-1]:
        copy = tmp_path / path.name
        shutil.copytree(config.run_dir, copy)
        for later in list_checkpoints(copy):
            if later.name > path.name:
                shutil.rmtree(later)
        resume(copy).run()
        assert run_hashes(copy) == expected


def test_a_run_resumed_twice_is_bit_identical(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    Trainer(dataclasses.replace(config, run_dir=tmp_path / "whole")).run()
    interrupted(config, 2)
    for stats in resume(config.run_dir).iterations():
        if stats.iteration == 5:
            break
    resume(config.run_dir).run()
    assert run_hashes(config.run_dir) == run_hashes(tmp_path / "whole")


def test_async_restarts_its_environments_and_two_resumes_are_equal(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", vectorization="async", **LONG)
    interrupted(config, 3)
    shutil.copytree(config.run_dir, tmp_path / "again")
    ends = []
    for run in (config.run_dir, tmp_path / "again"):
        trainer = resume(run)
        assert any("start new episodes with new seeds" in note for note in trainer.notes)
        trainer.run()
        ends.append(run_hashes(run))
    assert ends[0] == ends[1]


def test_episodes_that_begin_at_a_resume_have_random_streams_of_their_own(tmp_path):
    begun = []
    for iterations in (0, 2, 3):
        config = short(tmp_path / str(iterations), env_id="CartPole-v1", vectorization="async", **LONG)
        if iterations:
            interrupted(config, iterations)
        trainer = resume(config.run_dir) if iterations else Trainer(config)
        state = trainer.collect.state_dict() | trainer.update.state_dict()
        begun.append([state[name].clone() for name in ("obs", "noise", "shuffles")])
        trainer.run()
    for first, second in itertools.combinations(begun, 2):
        for a, b in zip(first, second, strict=True):
            assert not a.equal(b)


def test_exact_resume_is_refused_where_it_is_impossible(tmp_path):
    with pytest.raises(ConfigError, match="exact_resume.*async"):
        Trainer(short(tmp_path, env_id="CartPole-v1", vectorization="async", exact_resume=True))


def test_logs_continue_without_gaps_or_duplicates(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 5)
    for later in list_checkpoints(config.run_dir)[3:]:  # as if killed after iteration 5, with the last checkpoint at 3
        shutil.rmtree(later)
    with (config.run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"iteration": 6, "global_st')  # a truncated line
    resume(config.run_dir).run()
    assert [row["iteration"] for row in rows_of(config.run_dir)] == list(range(1, 9))
    events = EventAccumulator(str(config.run_dir))
    events.Reload()
    points = events.Scalars("losses/value_loss")
    assert [point.step for point in points] == [64 * i for i in range(1, 9)]


def test_steps_per_second_exclude_the_time_before_a_resume(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 4)
    before = json.loads((config.run_dir / "metrics.jsonl").read_text().splitlines()[-1])
    time.sleep(1.0)  # not training time
    trainer = resume(config.run_dir)
    stats = next(iter(trainer.iterations()))
    assert stats.seconds >= before["seconds"]
    assert stats.scalars["charts/SPS"] == pytest.approx(stats.global_step / stats.seconds, rel=1e-6)
    taken = stats.seconds - before["seconds"]
    assert stats.sps == pytest.approx(64 / taken, rel=0.05)
    trainer.request_stop()


def test_a_finished_run_is_resumed_only_with_more_steps(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    Trainer(config).run()
    with pytest.raises(FinishedError, match=r"is complete \(512 steps\).*--total-timesteps 1024"):
        resume(config.run_dir)
    done = fastppo("resume", config.run_dir)
    assert done.returncode == 0, done.stderr
    assert "is complete" in " ".join(done.stdout.split())
    assert resume(config.run_dir, total_timesteps=1024).run().global_step == 1024


@pytest.mark.parametrize("target", [None, 5.0])
def test_a_run_killed_before_its_result_writes_it_and_takes_no_step(tmp_path, target):
    settings = {"n_envs": 4, "n_steps": 64, "total_timesteps": 4 * 64 * 16, "target_return": target}
    config = short(tmp_path, env_id="CartPole-v1", **settings)
    first = Trainer(config).run()
    assert first.ended == ("finished" if target is None else "target")
    assert (first.iterations < 16) == (target is not None)
    hashes = run_hashes(config.run_dir)
    path = config.run_dir / "result.json"
    earlier = json.loads(path.read_text()) | {"global_step": 256, "ended": "interrupted"}  # of a stop before
    for content in (None, json.dumps(earlier), "{"):
        path.unlink() if content is None else path.write_text(content)
        again = resume(config.run_dir).run()
        for name in ("mean_return", "mean_length", "episodes", "global_step", "iterations", "ended"):
            assert getattr(again, name) == getattr(first, name), name
        assert run_hashes(config.run_dir) == hashes
        with pytest.raises(FinishedError):
            resume(config.run_dir)


@pytest.mark.parametrize(("processes", "smallest"), [(1, 64 * 5), (2, 64 * 2 * 3)])
def test_a_total_that_leaves_nothing_to_train_is_refused_with_the_smallest_one(
    tmp_path, monkeypatch, processes, smallest
):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 4)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    for total in (0, 1, smallest - 1):
        expected = f"total_timesteps={total} leaves nothing to .* valid value: {smallest}\\."
        with pytest.raises(ConfigError, match=expected):
            resume(config.run_dir, total_timesteps=total)
    if processes == 1:
        assert resume(config.run_dir, total_timesteps=smallest).run().global_step == smallest
        with pytest.raises(FinishedError, match="is complete"):  # a command that is repeated is no mistake
            resume(config.run_dir, total_timesteps=smallest)


def test_c1_a_checkpoint_of_another_run_is_refused_with_the_differences(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 2)
    path, _ = newest_checkpoint(config.run_dir)
    other = dataclasses.replace(config, seed=9, sign_rewards=True)
    with pytest.raises(CheckpointError, match=r"seed was 1, is 9; sign_rewards was False, is True"):
        Trainer(other, resume_from=path)
    with pytest.raises(CheckpointError, match="another policy.*hidden"):
        Trainer(dataclasses.replace(config, hidden_sizes=(8,)), resume_from=path)
    with pytest.raises(CheckpointError, match="another policy"):
        Trainer(dataclasses.replace(config, env_id="Acrobot-v1"), resume_from=path)


def test_settings_that_change_no_number_may_change_in_a_resume(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", vectorization="pool", workers=2, **LONG)
    Trainer(dataclasses.replace(config, run_dir=tmp_path / "whole")).run()
    interrupted(config, 3)
    changes = {"workers": 3, "strict_obs": True, "env_timeout": 60.0, "keep_checkpoints": 9}
    assert not FIXED & changes.keys()
    continue_run(dataclasses.replace(config, **changes), config.run_dir).run()
    assert run_hashes(config.run_dir) == run_hashes(tmp_path / "whole")


def test_s11_other_versions_are_named(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 2)
    path, _ = newest_checkpoint(config.run_dir)
    rewrite(path, lambda state: state["about"]["versions"].update(torch="1.0"))
    assert any("torch 1.0, now" in note for note in resume(config.run_dir).notes)


def test_d6_another_number_of_processes_keeps_what_is_learned(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    interrupted(config, 2)
    path, _ = newest_checkpoint(config.run_dir)
    rewrite(path, lambda state: state["about"].update(world_size=2))
    trainer = resume(config.run_dir)
    assert any("2 processes trained before, 1 now" in note for note in trainer.notes)
    assert trainer.progress.iteration == 4, "an iteration of two processes is two iterations of one"
    trainer.run()


def test_a_failed_environment_costs_only_its_open_episodes(tmp_path):
    from tests.faults.worlds import FaultEnv

    config = short(tmp_path, **LONG | {"checkpoint_every": None, "total_timesteps": 4 * 16 * 14})
    file = tmp_path / "once"

    def make():
        return FaultEnv(kind="raises", at_step=180, once=str(file))

    with pytest.raises(Exception, match="the ball left the table"):
        Trainer(config, make_env=make).run()
    trainer = resume(config.run_dir, make_env=make)
    assert trainer.progress.iteration == 11
    assert any("start new episodes" in note for note in trainer.notes)
    assert trainer.run().ended == "finished"


def test_evaluation_changes_no_numbers_and_marks_the_best_checkpoint(tmp_path):
    runs = []
    for name, changes in (("with", {"eval_every": 64, "eval_episodes": 4}), ("without", {})):
        config = short(tmp_path, env_id="CartPole-v1", **LONG | changes | {"run_dir": tmp_path / name})
        Trainer(config).run()
        runs.append(rows_of(tmp_path / name))
    evaluated = [row.pop("eval/return_mean") for row in runs[0]]
    for row in runs[0]:
        assert row.pop("eval/return_std") >= 0
        assert row.pop("eval/length_mean") > 0
    assert runs[0] == runs[1]
    best = json.loads((tmp_path / "with" / "checkpoints" / "best.json").read_text())
    assert best["mean_return"] == max(evaluated)
    first_best = evaluated.index(max(evaluated)) + 1
    assert best["checkpoint"] == f"step-{64 * first_best:012d}"
    done = fastppo("eval", tmp_path / "with", "--best", "--episodes", "2")
    assert done.returncode == 0, done.stderr


def test_the_best_checkpoint_is_never_pruned(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG | {"keep_checkpoints": 2, "eval_every": 64})
    trainer = Trainer(config)
    trainer.progress.best = None
    for stats in trainer.iterations():
        if stats.iteration == 1:
            trainer.progress.best = 1e9  # no later evaluation is better
    names = [path.name for path in list_checkpoints(config.run_dir)]
    assert names == [f"step-{64 * i:012d}" for i in (1, 7, 8)]


def test_global_random_states_are_restored(tmp_path):
    config = short(tmp_path, env_id="CartPole-v1", **LONG)
    random.seed(3)
    np.random.seed(4)
    torch.manual_seed(5)
    interrupted(config, 2)
    expected = (random.random(), np.random.rand(), torch.rand(1).item())
    random.seed(0)
    resume(config.run_dir)
    assert (random.random(), np.random.rand(), torch.rand(1).item()) == expected


def fastppo(*arguments):
    """Run the command line in this process, which saves seconds of importing torch."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main([str(word) for word in arguments])
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


def fastppo_process(*arguments, **kwargs):
    """Run the command line in its own process."""
    command = [sys.executable, "-m", "fastppo", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, **kwargs)


def rewrite(path, change):
    """Alter a checkpoint's state file, and update its manifest."""
    import hashlib

    file = path / "state-0.json"
    state = json.loads(file.read_text())
    change(state)
    file.write_text(json.dumps(state))
    manifest = json.loads((path / "manifest.json").read_text())
    data = file.read_bytes()
    manifest["files"]["state-0.json"] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


RUN = ["train", "--env-id", "CartPole-v1", "--n-envs", "4", "--n-steps", "64", "--compile", "off"]


@pytest.fixture
def unhandled():
    """Make a signal that the trainer does not handle an error, since it would end this process."""

    def fail(number, _):
        raise AssertionError(f"nobody handled signal {number}")

    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    before = {number: signal.signal(number, fail) for number in numbers}
    yield fail
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 138)])
def test_p4_p5_a_signal_saves_after_the_iteration(tmp_path, monkeypatch, unhandled, number, status):
    run, before = tmp_path / "run", Trainer._must_stop

    def signalled(trainer):
        if trainer.progress.iteration == 4:
            os.kill(os.getpid(), number)
        return before(trainer)

    monkeypatch.setattr(Trainer, "_must_stop", signalled)
    done = fastppo(*RUN, "--run-dir", run, "--total-timesteps", "100_000_000")
    assert done.returncode == status, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    path, problems = newest_checkpoint(run)
    assert not problems
    assert path.name == f"step-{rows_of(run)[-1]['global_step']:012d}"
    assert signal.getsignal(number) == unhandled, "the handler before the run is back"


def test_p4_a_signal_during_setup_ends_the_run_before_its_first_step(tmp_path, monkeypatch, unhandled):
    run, before = tmp_path / "run", parts.make_vec_env

    def make(*a, **k):
        os.kill(os.getpid(), signal.SIGTERM)
        return before(*a, **k)

    monkeypatch.setattr(parts, "make_vec_env", make)
    done = fastppo(*RUN, "--run-dir", run)
    assert done.returncode == 143, done.stdout + done.stderr
    assert (run / "model.safetensors").exists()
    assert not (run / "metrics.jsonl").exists() or rows_of(run) == []


def test_p4_a_second_signal_exits_at_once(tmp_path):
    run = tmp_path / "run"
    steps = ["--total-timesteps", "100_000_000", "--checkpoint-every", "256", "--n-steps", "4096"]
    command = [sys.executable, "-m", "fastppo", *RUN, "--run-dir", str(run), *steps]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list_checkpoints(run)) > 0)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    begin = time.monotonic()
    process.send_signal(signal.SIGTERM)
    process.wait(timeout=PATIENCE)
    assert process.returncode in (-signal.SIGTERM, 143)
    assert time.monotonic() - begin < 2
    newest_checkpoint(run)


def test_resume_auto_starts_and_then_continues(tmp_path):
    run = tmp_path / "run"
    arguments = [*RUN, "--run-dir", str(run), "--total-timesteps", "2048", "--resume", "auto"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Trainer, "_must_stop", lambda trainer: trainer.progress.iteration == 3)
        first = fastppo(*arguments)
    assert first.returncode == 0, first.stderr
    second = fastppo(*arguments)
    assert second.returncode == 0, second.stderr
    assert "resumed from step-000000000768" in second.stdout
    assert [row["iteration"] for row in rows_of(run)] == list(range(1, 9))
    third = fastppo(*arguments)
    assert third.returncode == 0
    assert "is complete (2,048 steps)" in " ".join(third.stdout.split())
    changed = fastppo(*arguments, "--sign-rewards", "--total-timesteps", "4096")
    assert changed.returncode == 2
    assert "sign_rewards was False, is True" in changed.stderr


def test_resume_auto_starts_again_if_nothing_was_saved(tmp_path):
    run = tmp_path / "run"
    arguments = [*RUN, "--run-dir", str(run), "--total-timesteps", "1024", "--resume", "auto"]
    command = [sys.executable, "-m", "fastppo", *arguments, "--total-timesteps", "100_000_000"]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    wait_until(lambda: (run / "metrics.jsonl").exists() and len(rows_of(run)) > 2)
    process.kill()
    process.wait()
    assert not list_checkpoints(run)
    done = fastppo(*arguments)
    assert done.returncode == 0, done.stderr
    assert [row["iteration"] for row in rows_of(run)] == [1, 2, 3, 4]
    events = EventAccumulator(str(run))
    events.Reload()
    assert [point.step for point in events.Scalars("losses/value_loss")] == [256, 512, 768, 1024]
    (run / "thesis.tex").write_text("mine")
    shutil.rmtree(run / "checkpoints")
    refused = fastppo(*arguments)
    assert refused.returncode == 2
    assert "not empty" in refused.stderr


def test_resume_auto_without_run_dir_takes_the_latest_run_of_that_name_and_seed(tmp_path):
    arguments = [*RUN, "--total-timesteps", "512", "--resume", "auto", "--name", "job"]
    with contextlib.chdir(tmp_path):
        for total in ("512", "1024"):
            done = fastppo(*arguments, "--total-timesteps", total)
            assert done.returncode == 0, done.stderr
    assert len(list((tmp_path / "runs" / "CartPole-v1").iterdir())) == 1


def test_x4_a_resume_imports_code_only_with_allow_import(tmp_path, monkeypatch):
    (tmp_path / "my_envs.py").write_text(
        "import gymnasium\n"
        "where = 'gymnasium.envs.classic_control:CartPoleEnv'\n"
        "gymnasium.register('Imported-v0', entry_point=where, max_episode_steps=50)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{Path(__file__).parents[2]}"}
    train = ["train", "--env-id", "my_envs:Imported-v0", "--n-envs", "2", "--n-steps", "16", "--run-dir", "run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    first = fastppo(*train, "--total-timesteps", "64")
    assert first.returncode == 0, first.stderr
    refused = fastppo("resume", "run", "--total-timesteps", "128")
    assert refused.returncode == 2
    assert "--allow-import" in refused.stderr
    allowed = fastppo_process(
        "resume", "run", "--total-timesteps", "128", "--allow-import", cwd=tmp_path, env=environment
    )
    assert allowed.returncode == 0, allowed.stderr


def test_verify_resume_reports_exactness(tmp_path):
    settings = ["--n-envs", "2", "--n-steps", "16", "--normalize-obs"]
    done = fastppo("verify-resume", "--env-id", "CartPole-v1", *settings)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "a resumed run is the same run" in done.stdout
    assert "exact" in done.stdout
    restarting = fastppo("verify-resume", "--env-id", "CartPole-v1", "--vectorization", "async", *settings)
    assert restarting.returncode == 0, restarting.stdout + restarting.stderr
    assert "start new episodes" in restarting.stdout


def test_lunar_lander_replays_its_open_episodes():
    """In its own process: Box2D conflicts with what other tests import."""
    done = fastppo_process("verify-resume", "--env-id", "LunarLander-v3", "--n-envs", "2", "--n-steps", "32")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "replay: LunarLander.world (b2World) is not plain data" in " ".join(done.stdout.split())


def test_by_default_a_checkpoint_is_saved_at_the_end(tmp_path):
    Trainer(short(tmp_path, env_id="CartPole-v1")).run()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["step-000000000048"]
    assert Config().checkpoint_minutes == 10
