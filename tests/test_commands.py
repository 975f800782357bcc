"""Commands on finished runs: their output and their files."""

import io
import os

import numpy as np
import pytest
from PIL import Image

from fastppo.cli import main


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for seed in ("1", "2"):
        sizes = ["--n-envs", "2", "--n-steps", "32", "--total-timesteps", "512", "--compile", "off", "--threads", "1"]
        assert main(["train", *sizes, "--seed", seed, "--run-dir", str(folder / f"seed{seed}")]) == 0
    return folder


def said(capsys, *command):
    """Run a command that succeeds and return its output on one line."""
    assert main([str(word) for word in command]) == 0
    return " ".join(capsys.readouterr().out.split())


def test_eval_plays_and_films(runs, tmp_path, capsys):
    text = said(capsys, "eval", runs / "seed1", "--episodes", 3, "--video", tmp_path / "film.gif")
    assert text.startswith("3 episodes, greedy: return ")
    assert "cut" not in text
    assert f"video: {tmp_path}/film.gif (another episode, return " in text
    film = Image.open(io.BytesIO((tmp_path / "film.gif").read_bytes()))
    assert text.endswith(" frames)")
    assert film.n_frames > 5


def test_a_film_of_what_never_ends_says_so(runs, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("fastppo.evaluation.video._MAX_STEPS", 5)
    text = said(capsys, "eval", runs / "seed1", "--episodes", 1, "--video", tmp_path / "film.gif")
    assert "6 frames, cut before its end)" in text


def test_a_negative_seed_is_one_line(runs, capsys):
    assert main(["eval", str(runs / "seed1"), "--seed", "-1"]) == 2
    assert capsys.readouterr().err == "ConfigError: seed=-1 must be at least 0; nearest valid value: 0.\n"


def test_a_folder_above_runs_is_named(runs, capsys):
    assert main(["report", str(runs)]) == 2
    assert f"name one of its runs, such as {runs}{os.sep}seed" in capsys.readouterr().err


def test_report_and_diff(runs, tmp_path, capsys):
    page = tmp_path / "report.html"
    text = said(capsys, "report", runs / "seed1", runs / "seed2", "-o", page)
    assert str(page) in text
    assert "seed2" in page.read_text()
    text = said(capsys, "diff", runs / "seed1", runs / "seed2")
    assert "seed" in text
    assert "figures differ from iteration 1 on (step 64)" in text


@pytest.mark.parametrize("kind", ["onnx", "pt2"])
def test_export_writes_what_acts_like_the_policy(runs, tmp_path, capsys, kind):
    from fastppo import load_policy

    path = tmp_path / f"policy.{kind}"
    assert str(path) in said(capsys, "export", runs / "seed1", "--format", kind, "-o", path)
    obs = np.random.default_rng(0).normal(size=(7, 4)).astype(np.float32)
    if kind == "onnx":
        import onnxruntime

        session = onnxruntime.InferenceSession(path)
        actions = session.run(None, {session.get_inputs()[0].name: obs})[0]
    else:
        import torch

        actions = torch.export.load(path).module()(torch.as_tensor(obs))[0].numpy()
    assert actions.tolist() == load_policy(runs / "seed1").predict(obs)[0].tolist()
