"""fastppo bench: measurements in fresh processes, failures as rows, verdicts from the figures."""

import csv
import dataclasses
import json
import subprocess
import sys
import time

import pytest

from fastppo.analysis import bench, bench_report
from fastppo.analysis.bench import PARTS, Point, best_by_n_envs, clear_winners, conclusion, verdict
from fastppo.cli import main
from fastppo.envs import auto_vectorization as choose

SHARES = {"env": 0.2, "act": 0.1, "store": 0.02, "advantages": 0.01, "update": 0.6, "log": 0.02}


def point(n_envs=64, vectorization="sync", sps=1000.0, **changes):
    values = {"sps_low": sps * 0.9, "sps_high": sps * 1.1, "phases": SHARES, "config": {"threads": 1, "n_steps": 8}}
    values |= {"ceilings": {"env": sps / 0.2, "act": sps / 0.1, "update": sps / 0.6}}
    values["config"] |= dict.fromkeys(bench_report._SETTINGS)
    return Point(n_envs, vectorization, sps=sps, **values | changes)


def test_the_gain_follows_amdahls_law():
    p = point()
    assert p.gain("update") == pytest.approx(1 / 0.7 - 1)
    assert p.gain("env") == pytest.approx(1 / 0.9 - 1)


def test_with_overlap_a_faster_environment_saves_only_the_wait():
    # the environments take half an iteration; the trainer waits for 0.1 of it, and faster environments save that wait
    ceilings = {"env": 2000.0, "act": 1e4, "update": 2e3}
    hidden = point(overlapped=True, phases=SHARES | {"env": 0.1}, ceilings=ceilings)
    assert hidden.gain("env") == pytest.approx(1 / 0.9 - 1)
    # nothing is hidden, so the gain is the same as without overlap
    assert point(overlapped=True).gain("env") == pytest.approx(1 / 0.9 - 1)


def test_the_verdict_names_the_bottleneck_and_faster_settings():
    points = [point(64), point(512, sps=1300.0), point(64, "pool", sps=1250.0), Point(8, "native", failure="no such")]
    text = verdict(points[0], points)
    assert text.startswith("update-bound (60% of the time); update twice as fast: +43% steps/s (environments +11%, ")
    assert "n_envs 64 -> 512: +30%" in text
    assert "vectorization pool: +25%" in text
    assert "unreliable" not in text
    assert "fused" not in text
    assert "->" not in verdict(points[1], points)
    assert verdict(points[3], points) == "no such"
    env_bound = point(phases=SHARES | {"env": 0.7, "update": 0.1})
    assert verdict(env_bound, [env_bound]).startswith("env-bound (70% of the time)")
    assert {n: p.vectorization for n, p in best_by_n_envs(points).items()} == {64: "pool", 512: "sync"}


def test_the_verdict_names_a_faster_update():
    slow = point(can_fuse=True, config={"threads": 1, "n_steps": 8, "compile": "off"})
    # 0.6 of the time becomes 0.06: 1 / 0.46 - 1
    assert "; --compile fused would give about +117%" in verdict(slow, [slow])
    fast = dataclasses.replace(slow, config=slow.config | {"compile": "fused"})
    assert "would give" not in verdict(fast, [fast])
    on_gpu = dataclasses.replace(slow, on_gpu=True)
    assert "; --compile fused covers it, by kernels whose gain has not been measured" in verdict(on_gpu, [on_gpu])
    assert "fused" not in verdict(dataclasses.replace(fast, on_gpu=True), [fast])


def test_overlapping_speeds_give_no_verdict():
    sync, pool, large = point(64), point(64, "pool", sps=1150.0), point(512, sps=3000.0)
    assert "vectorization pool: no clear difference" in verdict(sync, [sync, pool, large])
    assert "n_envs 64 -> 512: +200%" in verdict(sync, [sync, pool, large])
    assert conclusion([sync, pool, large]).startswith("fastest: n_envs 512, sync: 3,000 steps/s.")
    assert clear_winners([sync, pool, large]) == {512: large}
    text = conclusion([sync, pool])
    assert text.startswith("no clear winner: the steps/s of n_envs 64, pool (1,035-1,265) overlap")
    assert "n_envs 64, sync (900-1,100)" in text
    assert "fastest" not in text
    # one noisy point overlaps with all
    noisy = point(8, sps=5_000.0, sps_low=1_300.0, sps_high=8_900.0)
    assert conclusion([noisy, large]).startswith("no clear winner")
    assert conclusion([Point(8, "native", failure="no such")]) == ""


def test_parts_that_contradict_the_whole_are_reported():
    good = point()
    assert good.doubts() == []
    # the update takes 60 % of the time, so 753 steps/s of training are 1,255 of the update
    odd = point(sps=753.0, ceilings={"env": 4e3, "act": 8e3, "update": 14_500.0})
    assert "update runs at 14,500 steps/s alone but at 1,255 within training" in " ".join(odd.doubts())
    assert "unreliable: update runs at 14,500" in verdict(odd, [odd])
    slow = point(ceilings={"env": 5e3, "act": 1e4, "update": 500.0})
    assert "update" in " ".join(slow.doubts())
    # with half-batches the trainer waits less than the environments take
    hidden = point(overlapped=True, ceilings={"env": 1_200.0, "act": 1e4, "update": 1_700.0})
    assert hidden.doubts() == []


def test_load_of_other_programs_is_reported():
    busy = point(cores=2, own_cores=1.0, other_cores=0.9)
    assert busy.doubts() == ["other programs used 0.9 of 2 cores meanwhile, so the speeds are too low"]
    assert point(cores=64, own_cores=1.0, other_cores=4.0).doubts() == []  # cores are left
    assert point(cores=2, own_cores=2.0, other_cores=0.05).doubts() == []


def test_load_is_measured_beside_the_own_processes():
    loop = "import time\nend = time.perf_counter() + 20\nwhile time.perf_counter() < end: pass"
    before = bench._cpu_seconds()
    with subprocess.Popen([sys.executable, "-c", loop]) as child:  # its own children count as its own
        while child.poll() is None and bench._cpu_seconds()[1] - before[1] < 0.2:
            time.sleep(0.01)
        used = bench._cpu_seconds()[1] - before[1]
        child.kill()
    assert used >= 0.2


def test_a_long_call_is_timed_once():
    calls = []
    assert bench._median_seconds(lambda: calls.append(time.sleep(0.05)), None, 0.01) >= 0.05
    assert len(calls) == 1


def test_the_files_hold_every_point_and_the_page_works_offline(tmp_path):
    points = [point(), Point(8, "native", failure="killed by signal 9 (out of memory?)")]
    about = {"device_name": "a machine", "cpu_count": 2, "platform": "here"}
    page = bench_report.write_files(tmp_path, "Env<b>-v0", points, about).read_text()
    assert "Env&lt;b&gt;-v0" in page
    assert "out of memory?" in page
    assert 'src="http' not in page
    assert 'class="figure"' in page
    rows = list(csv.DictReader((tmp_path / "bench.csv").read_text().splitlines()))
    assert [row["failure"] for row in rows] == ["", "killed by signal 9 (out of memory?)"]
    assert float(rows[0]["share_update"]) == 0.6
    assert json.loads((tmp_path / "bench.json").read_text())["points"][0]["sps"] == 1000.0
    # a bench with nothing but failures has a page too
    assert "out of memory?" in bench_report.write_files(tmp_path, "Env-v0", points[1:], about).read_text()


def test_save_stores_the_choice_for_auto(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    arguments = ["bench", "--env-id", "Acrobot-v1", "--n-envs", "2", "--vectorization", "sync", "native", "--n-steps"]
    arguments += ["16", "--seconds", "0.2", "--compile", "off", "--save", "--run-dir", str(tmp_path / "out")]
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "failed: vectorization=native: Acrobot-v1 has no vector version" in said
    assert "fastest: n_envs 2, sync" in said
    good, failed = json.loads((tmp_path / "out" / "bench.json").read_text())["points"]
    assert failed["failure"]
    assert good["iterations"] >= 3
    assert good["cores"] >= 1
    assert 0 < good["own_cores"] < good["cores"] + 1
    assert good["sps_low"] <= good["sps"] <= good["sps_high"]
    assert 0.8 < sum(good["phases"].values()) <= 1.0
    assert all(good["ceilings"][part] > 0 for part in PARTS)
    assert good["config"]["n_envs"] == 2
    assert good["memory_mb"] > 50
    train = ["train", "--env-id", "Acrobot-v1", "--n-envs", "2", "--vectorization", "auto", "--n-steps", "8"]
    assert main([*train, "--total-timesteps", "16", "--n-minibatches", "1", "--run-dir", str(tmp_path / "run")]) == 0
    notes = json.loads((tmp_path / "run" / "run.json").read_text())["notes"]
    assert notes[0].startswith("vectorization sync: fastest by fastppo bench on ")


def test_a_killed_process_becomes_a_failed_row(tmp_path):
    (tmp_path / "deadly.py").write_text(
        "import os, signal, gymnasium\n"
        "class Deadly(gymnasium.Env):\n"
        "    observation_space = gymnasium.spaces.Box(-1, 1, (2,))\n"
        "    action_space = gymnasium.spaces.Discrete(2)\n"
        "    steps = 0\n"
        "    def reset(self, seed=None, options=None): return self.observation_space.sample(), {}\n"
        "    def step(self, action):\n"
        "        self.steps += 1\n"
        "        if self.steps > 5: os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return self.observation_space.sample(), 0.0, False, False, {}\n"
        "gymnasium.register('Deadly-v0', entry_point=Deadly)\n"
    )
    command = [sys.executable, "-m", "fastppo", "bench", "--env-id", "deadly:Deadly-v0", "--n-envs", "1"]
    command += ["--vectorization", "sync", "--compile", "off", "--run-dir", str(tmp_path / "out")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert "failed: killed by signal 9" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_damaged_choices_file_is_ignored(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert choose.recall("Env-v0", "here", 8) is None
    path = choose.remember("Env-v0", "here", 8, {"vectorization": "pool", "reason": "why"})
    choose.remember("Env-v0", "there", 8, {"vectorization": "native", "reason": "why"})
    assert choose.recall("Env-v0", "here", 8)["vectorization"] == "pool"
    assert choose.recall("Env-v0", "here", 9) is None
    path.write_text("{")
    assert choose.recall("Env-v0", "here", 8) is None
    path.write_text('{"Env-v0": {"here": {"8": {"vectorization": "teleport"}}}}')
    assert choose.recall("Env-v0", "here", 8) is None
