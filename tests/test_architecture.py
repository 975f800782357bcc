"""Each file imports from lower floors or its own folder, nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fastppo"
FLOORS = {
    "errors.py": 0,
    "cores.py": 0,
    "presets.py": 0,
    "health.py": 0,
    "config.py": 0,
    "spaces.py": 0,
    "functional": 0,
    "envs": 1,
    "policies": 1,
    "runtime": 1,
    "rollout.py": 2,
    "update.py": 2,
    "memory.py": 2,
    "metrics.py": 2,
    "sinks": 2,
    "samples.py": 2,
    "logbook.py": 2,
    "film.py": 2,
    "intermission.py": 2,
    "run_dir.py": 2,
    "checkpoint.py": 2,
    "capsule.py": 2,
    "learn.py": 2,
    "play.py": 2,
    "saver.py": 2,
    "choices.py": 3,
    "restore.py": 3,
    "assembly.py": 3,
    "trainer.py": 3,
    "evaluation.py": 4,
    "bench.py": 4,
    "bench_report.py": 4,
    "doctor.py": 4,
    "replay.py": 4,
    "resuming.py": 4,
    "verify.py": 4,
    "page.py": 2,
    "records.py": 3,
    "report.py": 4,
    "diff.py": 4,
    "study.py": 4,
    "study_report.py": 4,
    "export.py": 4,
    "commands": 4,
    "cli.py": 4,
    "__init__.py": 4,
    "__main__.py": 4,
}
# Within floors 0 and 2 single files stand beside each other; what may lean on what is said here
BESIDE = {
    ("config.py", "errors.py"),
    ("config.py", "presets.py"),
    ("spaces.py", "errors.py"),
    ("spaces.py", "functional"),
    ("metrics.py", "rollout.py"),
    ("memory.py", "rollout.py"),
    ("memory.py", "update.py"),
}
BESIDE |= {("metrics.py", "update.py"), ("sinks", "metrics.py"), ("checkpoint.py", "run_dir.py")}
BESIDE |= {("bench_report.py", "bench.py"), ("export.py", "evaluation.py"), ("study.py", "resuming.py")}
BESIDE |= {("study_report.py", "study.py"), ("study_report.py", "report.py")}
BESIDE |= {("learn.py", "metrics.py"), ("learn.py", "rollout.py"), ("learn.py", "update.py")}
BESIDE |= {("intermission.py", "film.py"), ("intermission.py", "metrics.py"), ("intermission.py", "play.py")}
BESIDE |= {("samples.py", "rollout.py"), ("samples.py", "update.py"), ("metrics.py", "samples.py")}
BESIDE |= {("sinks", "samples.py"), ("logbook.py", "metrics.py"), ("logbook.py", "sinks")}
BESIDE |= {("capsule.py", "checkpoint.py"), ("capsule.py", "update.py"), ("saver.py", "checkpoint.py")}
BESIDE |= {("trainer.py", "choices.py"), ("trainer.py", "restore.py"), ("trainer.py", "assembly.py")}
BESIDE |= {
    ("replay.py", "evaluation.py"),
    ("resuming.py", "evaluation.py"),
    ("verify.py", "resuming.py"),
    ("verify.py", "doctor.py"),
}
# every command may ask any of what they are made for
BESIDE |= {("commands", name) for name, floor in FLOORS.items() if floor == 4 and name.endswith(".py")} - {
    ("commands", "cli.py")
}
BESIDE |= {
    ("__init__.py", "evaluation.py"),
    ("__init__.py", "resuming.py"),
    ("__main__.py", "cli.py"),
    ("cli.py", "commands"),
}
FILES = sorted(path.relative_to(ROOT) for path in ROOT.rglob("*.py"))


def imports(path):
    """Every module that a file imports, anywhere in it."""
    for node in ast.walk(ast.parse((ROOT / path).read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "fastppo":
            yield from (f"fastppo.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def room(parts):
    """The folder or single file that a module lies in."""
    return parts[0] if (ROOT / parts[0]).is_dir() else f"{parts[0]}.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_imports_obey_the_floors(path):
    here = path.parts[0]
    assert here in FLOORS, f"{here} has no floor"
    for module in imports(path):
        if not module.startswith("fastppo."):
            continue
        there = room(module.split(".")[1:])
        allowed = FLOORS[there] < FLOORS[here] or there == here or (here, there) in BESIDE
        assert allowed, f"{path} (floor {FLOORS[here]}) imports {module} (floor {FLOORS[there]})"


def test_functional_imports_torch_alone():
    for path in FILES:
        if path.parts[0] == "functional":
            outside = {m.split(".")[0] for m in imports(path)} - {"torch", "fastppo", "__future__", "math", "typing"}
            kernel = {"triton"} if path.name == "gae_triton.py" else set()
            assert outside <= {"collections", "dataclasses", "importlib"} | kernel, path


def test_the_config_object_stops_at_the_trainer():
    for path in FILES:
        if FLOORS[path.parts[0]] < 3:
            assert "fastppo.config" not in set(imports(path)), path


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils.py", "helpers.py", "common"} & {part for path in FILES for part in path.parts}
