"""README's commands, flags and code are real."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from fastppo.cli import COMMANDS, parse
from fastppo.config import Config, load_toml

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
FLAGS = {f"--{field.name.replace('_', '-')}" for kind in COMMANDS.values() for field in dataclasses.fields(kind)}
FLAGS |= {"--num-envs", "--num-steps", "--num-minibatches", "--no-anneal-lr", "--help"}
TORCHRUN = {
    "--standalone",
    "--nproc-per-node",
    "--nnodes",
    "--node-rank",
    "--master-addr",
    "--master-port",
    "--max-restarts",
}


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.S)


def test_every_flag_in_the_readme_exists_and_every_setting_is_in_the_readme():
    mentioned = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", README)) - {"--logdir"} - TORCHRUN
    assert mentioned <= FLAGS
    missing = {f"--{field.name.replace('_', '-')}" for field in dataclasses.fields(Config)} - mentioned
    assert not missing


def test_every_command_in_the_readme_can_be_parsed():
    commands = [line.split("#")[0] for block in blocks("bash") for line in block.splitlines()]
    seen = 0
    for command in commands:
        words = shlex.split(command)
        if words[:1] == ["torchrun"]:
            words = words[words.index("-m") + 1 :]
        if words[:1] == ["fastppo"]:
            assert parse(words[1:])
            seen += 1
        elif words[:1] and words[0].startswith("scripts/"):
            assert (ROOT / words[0]).stat().st_mode & 0o111
            seen += 1
    assert seen >= 4


def test_the_table_of_settings_gives_the_defaults():
    from fastppo.presets import CLEANRL

    for name in (
        "n_envs",
        "n_steps",
        "n_minibatches",
        "update_epochs",
        "learning_rate",
        "clip_coef",
        "vf_coef",
        "ent_coef",
    ):
        (row,) = [line for line in README.splitlines() if line.startswith(f"| `--{name.replace('_', '-')}`")]
        cells = [cell.strip() for cell in row.split("|")[2:5]]
        assert [float(cell) for cell in cells] == [CLEANRL[kind][name] for kind in ("discrete", "image", "continuous")]


def test_the_table_of_peers_is_that_of_the_committed_measurements():
    from benchmarks.peers import markdown

    latest = max((ROOT / "benchmarks" / "results").glob("peers_2core-cpu_*.json"))
    assert markdown(json.loads(latest.read_text())) in README


def test_files_that_the_readmes_name_exist():
    for folder in (ROOT, ROOT / "benchmarks"):
        text = (folder / "README.md").read_text()
        for name in re.findall(r"(?:benchmarks/)?results/[\w.-]+\.(?:json|svg|png)", text):
            assert (ROOT / "benchmarks" / name.removeprefix("benchmarks/")).exists(), name


def test_the_settings_file_is_valid(tmp_path):
    (text,) = blocks("toml")
    (tmp_path / "run.toml").write_text(text)
    assert Config.from_dict(load_toml(tmp_path / "run.toml")).learning_rate == "linear:1e-3:1e-4"


def examples():
    """README's Python, whole programs each: shorter runs, and the run just made where it names one of its own."""
    first, loop, own, saved, simulator = (re.sub(r"\d+(_000)+", "2_100", block) for block in blocks("python"))
    imports = first.splitlines()[0] + "\n"
    saved = re.sub(r'load_policy\("runs/.*"\)', "load_policy(trainer.run_dir, Network())", saved)
    return {
        "first": first,
        "loop": imports + loop,
        "own": imports + own + textwrap.indent(saved, "    "),
        "simulator": simulator,
    }


@pytest.mark.parametrize("name", ["first", "loop", "own", "simulator"])
def test_the_python_code_runs(tmp_path, name):
    if name == "simulator":
        pytest.importorskip("mujoco_warp")
        from tests.envs.tensor.warp_pendulum import XML

        (tmp_path / "pendulum.xml").write_text(XML)
    (tmp_path / "example.py").write_text(examples()[name])
    done = subprocess.run([sys.executable, "example.py"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
