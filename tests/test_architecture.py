"""The floor plan: each file imports from lower layers or its own folder, nothing else."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1] / "fastppo"
# docs/architecture.md draws this table; a file may import every layer below its own
LAYERS = {
    "errors.py": 0,
    "profiles": 0,
    "native": 0,
    "kernels": 0,
    "functional": 1,
    "runtime": 2,
    "spaces": 2,
    "config": 2,
    "policies": 3,
    "envs": 3,
    "ppo": 4,
    "monitoring": 5,
    "runs": 5,
    "evaluation": 6,
    "builders": 7,
    "trainer.py": 8,
    "resume_run.py": 9,
    "analysis": 10,
    "commands": 11,
    "compat": 11,
    "__init__.py": 11,
    "cli.py": 12,
    "__main__.py": 13,
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


def entry(module):
    """The entry of LAYERS that a module belongs to: a top-level folder or file."""
    name = module.split(".")[1] if "." in module else "__init__"
    return name if (ROOT / name).is_dir() else f"{name}.py"


@pytest.mark.parametrize("path", FILES, ids=str)
def test_a_file_imports_lower_layers_or_its_own_folder(path):
    here = path.parts[0]
    for module in imports(path):
        if module == "fastppo" or module.startswith("fastppo."):
            there = entry(module)
            allowed = LAYERS[there] < LAYERS[here] or there == here
            assert allowed, f"{path} (layer {LAYERS[here]}) imports {module} (layer {LAYERS[there]})"


def test_the_table_lists_what_is_at_the_top():
    assert {path.parts[0] for path in FILES} == set(LAYERS)


def test_functional_imports_torch_alone():
    for path in FILES:
        if path.parts[0] == "functional":
            outside = {m.split(".")[0] for m in imports(path)} - {"torch", "fastppo", "__future__", "math", "typing"}
            assert outside <= {"collections", "dataclasses", "functools", "importlib"}, path


def test_layers_0_to_4_take_no_config():
    for path in FILES:
        if LAYERS[path.parts[0]] <= 4 and path.parts[0] != "config":
            assert not any(module.startswith("fastppo.config") for module in imports(path)), path


def test_there_is_no_drawer_for_odds_and_ends():
    assert not {"utils.py", "helpers.py", "common"} & {part for path in FILES for part in path.parts}
