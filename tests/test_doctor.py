"""fastppo doctor: its checks and its exit status."""

import math

import gymnasium
import pytest
import torch

from fastppo.analysis import doctor
from fastppo.cli import main
from fastppo.functional.gae import gae_doubling
from fastppo.native.recurrence import lstm_forward
from fastppo.policies.actors import choose_act_device
from fastppo.runtime.cores import usable_cores
from fastppo.spaces.observations import ObsSpec
from tests.test_update import make_policy


def test_a_working_machine_passes(capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr("fastppo.analysis.doctor.free_cores", lambda since: usable_cores())
    monkeypatch.setattr("fastppo.analysis.doctor.spinning_is_bounded", lambda: True)
    assert main(["doctor", "--seconds", "0.3"]) == 0
    out = capsys.readouterr().out
    for name in (
        "python",
        "torch",
        "gpu",
        "cores",
        "free memory",
        "open files",
        "advantages",
        "compiler",
        "C",
        "training",
        "auto",
    ):
        assert f" {name} " in out, name
    assert "steps/s on CartPole-v1" in out
    assert out.rstrip().endswith("this machine can train")


def test_compiled_libraries_are_shown_and_cleared(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "fastppo" / "native"
    folder.mkdir(parents=True)
    (folder / "recurrence-0-0.so").write_bytes(bytes(4096))
    monkeypatch.setattr(doctor, "unavailable", lambda: None)  # nothing is compiled into this folder
    monkeypatch.setattr(doctor, "_native_error", lambda: 1e-7)
    check = doctor._native()
    assert (check.name, check.state) == ("C", "ok")
    assert f"4 KiB in {folder}" in check.value
    assert main(["doctor", "--clear-cache"]) == 0
    assert capsys.readouterr().out == f"{folder}: 1 compiled libraries deleted\n"
    assert list(folder.iterdir()) == []
    monkeypatch.setattr(doctor, "cache_folder", lambda: None)
    assert doctor._native().value.endswith("compiled at each start, since there is no home folder (set XDG_CACHE_HOME)")
    monkeypatch.setattr(doctor, "unavailable", lambda: "there is no C compiler (cc)")
    check = doctor._native()
    advice = "MLP, LSTM and GRU train at half the speed: there is no C compiler (cc)"
    assert (check.state, check.advice) == ("note", advice)


@pytest.mark.parametrize("wrong", [lambda x: x + 0.1, lambda x: x * math.nan])
def test_c_that_computes_something_else_is_found(monkeypatch, wrong):
    assert doctor._native().state == "ok"
    monkeypatch.setattr(doctor, "lstm_forward", lambda *given: tuple(map(wrong, lstm_forward(*given))))
    check = doctor._native()
    assert (check.state, check.value[:19]) == ("bad", "gives wrong results")


def test_a_busy_machine_and_spinning_threads_are_noted(monkeypatch):
    monkeypatch.setattr("fastppo.analysis.doctor.usable_cores", lambda: 8)
    monkeypatch.setattr("fastppo.analysis.doctor.free_cores", lambda since: 3)
    monkeypatch.setattr("fastppo.analysis.doctor.spinning_is_bounded", lambda: False)
    checks = {check.name: check for check in doctor._machine(torch.device("cpu"))}
    assert (checks["free cores"].value, checks["free cores"].state) == ("3 of 8", "note")
    assert checks["waiting threads"].state == "note"
    assert "import fastppo first" in checks["waiting threads"].advice


def test_failures_are_reported_and_the_status_is_1(capsys, monkeypatch):
    def broken(*inputs):
        return [x + 1 for x in gae_doubling(*inputs)]

    monkeypatch.setattr(doctor, "choose_gae", lambda *_: broken)

    def make():
        raise ValueError("broken by the test")

    monkeypatch.setitem(gymnasium.registry, "Broken-v0", gymnasium.envs.registration.EnvSpec("Broken-v0", make))
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert main(["doctor", "--seconds", "0.1", "--env-id", "Broken-v0"]) == 1
    out = capsys.readouterr().out
    assert "bad  advantages       broken, error 1.0e+00" in out
    assert "note compiler         does not work" in out
    assert "updates run eagerly, several times slower: there is no C++ compiler (no-such-compiler)" in out
    assert "bad  training         failed\n                      env_id='Broken-v0' with env_kwargs={}: broken by" in out
    assert "problems found, see above" in out


def test_the_act_device_is_measured_and_explained():
    policy, spec, cpu = make_policy(), ObsSpec.single("vector", (4,), "float32"), torch.device("cpu")
    assert choose_act_device("cuda", policy, spec, 4, cpu) == ("cuda", "asked for")
    chosen, why = choose_act_device("auto", policy, spec, 4, cpu)
    assert chosen in ("cpu", "cuda")
    assert why.startswith("a step of 4 takes cpu ")
