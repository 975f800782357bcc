"""README and docs/: commands run, flags exist, Python runs, links resolve, figures match the measurements."""

import argparse
import ast
import json
import os
import re
import runpy
import shlex
import shutil
import statistics
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from fastppo import Trainer
from fastppo.analysis import training_processes, tune
from fastppo.cli import COMMANDS, main, parse
from fastppo.config import ALIASES, Config, load_toml

ROOT = Path(__file__).parents[1]
README = ROOT / "README.md"
PAGES = {page.name: page.read_text() for page in (README, *sorted((ROOT / "docs").glob("*.md")))}
GENERATED = {"settings.md"}  # generated from Config's fields; its own test checks that it is up to date
PEERS = max((ROOT / "benchmarks" / "results").glob("peers_2core-cpu_*.json"))

# Flags that shorten a command (the last value of a flag wins). Commands in PARSED are parsed only: others test them.
TRAIN = ["--total-timesteps", "256", "--n-envs", "4", "--n-steps", "32", "--compile", "off", "--threads", "1"]
SHORT = {
    "train": TRAIN,
    "resume": ["--total-timesteps", "256"],
    "eval": ["--episodes", "1"],
    "report": [],
    "diff": [],
    "export": ["--format", "pt2"],
    "verify-env": ["--steps", "20"],
    "profile": [],
    "verify-resume": [*TRAIN[2:], "--iterations", "2"],
    "tune": [*TRAIN, "--total-timesteps", "2048", "--trials", "1", "--seeds", "1", "--jobs", "1"],
    "study": [*TRAIN, "--seeds", "1", "--jobs", "1", "--target-return", "1"],
}
PARSED = {"bench", "doctor", "replay"}  # tests/test_bench.py, test_doctor.py, faults/test_numbers.py


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGES[page], re.S | re.M)


def commands():
    """Return each distinct command of the pages, with the first page that has it."""
    found = {}
    for page in PAGES:
        for block in blocks(page, "bash"):
            for line in block.splitlines():
                if words := shlex.split(line, comments=True):
                    found.setdefault(tuple(words), page)
    return [pytest.param(list(words), id=f"{page}: {' '.join(words)}") for words, page in found.items()]


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """A small run with an evaluation; stands in for every run that a page names."""
    folder = tmp_path_factory.mktemp("docs") / "run"
    assert main(["train", *TRAIN, "--total-timesteps", "128", "--eval-every", "128", "--run-dir", str(folder)]) == 0
    return folder


def in_this_process(configs, jobs):
    """Run every config that has not ended, as `training_processes.run_each` does."""
    for config in configs:
        if not training_processes.ended(config):
            Trainer(config, progress=False).run()
            yield config, None


@pytest.fixture
def workplace(tmp_path, monkeypatch, finished_run):
    """A working folder; the returned function copies the runs that a command reads into it.

    `study`, `tune` and `train --seeds` train in this process, which saves seconds of importing torch.
    """
    monkeypatch.chdir(tmp_path)
    for module in (training_processes, tune):
        monkeypatch.setattr(module, "run_each", in_this_process)

    def prepare(words):
        for word in words:
            if word.startswith("runs/") and not Path(word).exists():
                shutil.copytree(finished_run, word)

    return prepare


@pytest.mark.parametrize("words", commands())
def test_a_command_runs(words, workplace, capfd):
    program, *rest = words
    if program == "fastppo":
        parse(rest)
        name = rest[0]
        if name in PARSED:
            return
        new = name in ("train", "study", "tune") and "auto" not in rest
        workplace([] if new else rest)
        fewer = [word for flag in ("--workers", "--seeds") if flag in rest for word in (flag, "1")]
        assert main([*rest, *SHORT[name], *fewer]) == 0, capfd.readouterr().err
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch, arguments = rest[: rest.index("-m")], rest[rest.index("-m") + 2 :]
        assert rest[rest.index("-m") + 1] == "fastppo"
        get_args_parser().parse_args([*launch, "script.py"])
        parse(arguments)
    elif program.startswith("scripts/"):
        assert (ROOT / program).stat().st_mode & 0o111
        if program == "scripts/quickstart" and rest:
            parse(["train", *rest])
    elif program == "sbatch":
        assert (ROOT / rest[0]).exists()
        parse(["train", *rest[1:]])
    elif program == "kubectl":
        assert (ROOT / rest[-1]).exists()
    elif program == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        parser = argparse.ArgumentParser()
        parser.add_argument("-e", dest="path", required=True)
        path = parser.parse_args(rest[1:]).path
        assert set(re.findall(r"\w+", path)) <= set(extras)
    elif program == "tensorboard":
        assert (Path(sys.executable).parent / program).exists()
        assert rest == ["--logdir", "runs"]
    else:
        assert words == ["source", ".venv/bin/activate"]


def test_every_flag_in_the_text_exists():
    known = {"--help", "--debug", "--logdir", *(f"--{alias.replace('_', '-')}" for alias in ALIASES)}
    known |= {"--max-restarts", "--standalone", "--nnodes", "--nproc-per-node", "--node-rank"}  # flags of torchrun
    known |= {"--master-addr", "--master-port"}
    known |= {"--quick", "--only", "--task"}  # flags of scripts/bench-gpu and of benchmarks
    for command in COMMANDS.values():
        known |= {f"--{name.replace('_', '-')}" for name in command.__dataclass_fields__}
    for page, text in PAGES.items():
        mentioned = set(re.findall(r"(?<![\w|-])--[a-z][a-z-]*", text))
        assert not {flag for flag in mentioned - known if flag.replace("--no-", "--") not in known}, page


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page, "toml")])
def test_settings_files_are_valid(page, tmp_path):
    for text in blocks(page, "toml"):
        (tmp_path / "run.toml").write_text(text)
        Config.from_dict(load_toml(tmp_path / "run.toml"))


def shortened(code):
    """Divide numbers of steps by 40, to at most 4096."""
    return re.sub(r"\b\d+(_\d{3})+\b", lambda number: str(min(int(number[0]) // 40, 4096)), code)


def programs():
    """Yield a page's Python blocks as one program, apart from two kinds: those that need mujoco_warp, and those that
    start processes under `if __name__ == "__main__"`, each of which imports its whole program again."""
    for page in PAGES:
        code = [shortened(block) for block in blocks(page, "python")]
        apart = [block for block in code if "mujoco_warp" in block or "__main__" in block]
        together = "\n".join(block for block in code if block not in apart)
        for program in ([together] if together else []) + apart:
            kind = " mujoco_warp" if "mujoco_warp" in program else " __main__" if program in apart else ""
            yield pytest.param(program, id=page + kind)


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("program", list(programs()))
def test_the_python_code_runs(program, tmp_path, monkeypatch):
    """In this process, which saves seconds of importing torch, unless it starts processes that import it again."""
    if "mujoco_warp" in program:
        pytest.importorskip("mujoco_warp")
        from tests.envs.tensor.warp_pendulum import XML

        (tmp_path / "pendulum.xml").write_text(XML)
    (tmp_path / "program.py").write_text(program)
    if "mujoco_warp" not in program and "__main__" not in program:
        monkeypatch.chdir(tmp_path)
        runpy.run_path("program.py", run_name="__main__")
        return
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # spinning OpenMP threads slow down parallel tests
    command = [sys.executable, "program.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_readme_is_short_and_links_every_page():
    assert len(PAGES["README.md"].splitlines()) < 150
    for page in PAGES.keys() - {"README.md"}:
        assert f"(docs/{page})" in PAGES["README.md"], page


@pytest.mark.parametrize("page", PAGES)
def test_links_resolve(page):
    folder = ROOT if page == "README.md" else ROOT / "docs"
    links = map("".join, re.findall(r"\]\(([^)#]+)\)|src=\"([^\"]+)\"", PAGES[page]))
    assert not [link for link in links if Path(link).name not in GENERATED and not (folder / link).exists()]


@pytest.mark.parametrize("page", sorted(PAGES.keys() - GENERATED))
def test_a_page_starts_with_its_title_and_has_no_wide_lines(page):
    lines = PAGES[page].splitlines()
    assert lines[0].startswith("# ")
    assert page == "README.md" or lines[2].startswith("This page "), "line 3 starts with: This page"
    wide = [line for line in lines if len(line) > (230 if line.startswith("|") else 130)]
    assert not wide


def test_files_named_in_the_text_exist():
    for page, text in PAGES.items():
        for name in re.findall(r"`((?:fastppo|scripts|tests|benchmarks)/[\w./-]+)`", text):
            if name == "fastppo/Catch-v0":  # an environment id, not a file
                continue
            assert (ROOT / name).exists(), f"{page}: {name}"
    for name in re.findall(r"results/[\w.-]+\.(?:json|svg|png)", (ROOT / "benchmarks" / "README.md").read_text()):
        assert (ROOT / "benchmarks" / name).exists(), name


def test_architecture_lists_the_enforced_layers():
    from tests.test_architecture import LAYERS

    rows = re.findall(r"^\| (`.*) \| (\d+)(?:-(\d+))? \|", PAGES["architecture.md"], re.M)
    drawn = {}
    for names, low, high in rows:
        for name in re.findall(r"`([\w./]+)`", names):
            name = name.rstrip("/") if name.endswith("/") else name
            key = name if name in LAYERS else f"{name}.py"
            drawn[key] = range(int(low), int(high or low) + 1)
    assert drawn.keys() == LAYERS.keys()
    assert all(LAYERS[name] in drawn[name] for name in LAYERS)


def test_the_peer_table_matches_the_committed_measurements():
    from benchmarks.peers import markdown

    assert markdown(json.loads(PEERS.read_text())) in PAGES["performance.md"]


def test_the_readme_matches_the_committed_measurements():
    from benchmarks.peers import OURS, speeds

    found = speeds(json.loads(PEERS.read_text()))
    ratios = {
        (n, name): statistics.median(sps[f"fastppo {name}"][i] / x for i, x in sps["stable-baselines3"].items())
        for n, sps in found.items()
        for name in OURS
        if f"fastppo {name}" in sps and "torch.compile" not in name
    }
    low, high = (f"{end(ratios.values()):.1f}" for end in (min, max))
    assert f"{low} to {high} times stable-baselines3's training speed" in PAGES["README.md"].replace("\n", " ")
    assert f"| {ratios[64, 'native']:.1f} native, {ratios[64, 'sync']:.1f} sync | 1 |" in PAGES["README.md"]
    for name in ("fastppo native", "fastppo sync", "stable-baselines3"):
        assert f"{statistics.median(found[64][name].values()):,.0f}" in PAGES["README.md"]


def messages():
    """Yield every string of the package, with {} for interpolated values."""
    for path in (ROOT / "fastppo").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.JoinedStr):
                yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_messages_in_troubleshooting_exist_in_the_source():
    texts = list(messages())
    quoted = re.findall(r"^\| `([^`]+ [^`]+)`", PAGES["troubleshooting.md"], re.M)
    assert len(quoted) > 20
    foreign = {"Expected a torch.device with a specified index"}  # raised by torch
    assert not [text for text in quoted if text not in foreign and not any(text in m for m in texts)]
