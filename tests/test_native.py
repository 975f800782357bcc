"""C libraries: compiled once, found again, compiled again where damaged, and done without where that fails."""

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from fastppo.native import library, recurrence
from fastppo.native.library import NativeError, cache_folder, clear_cache, kept_libraries, load
from tests import PATIENCE

SOURCES = Path(library.__file__).parent


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache folder, and no library loaded from another."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for cached in (load, recurrence.unavailable):
        cached.cache_clear()
    yield cache_folder()
    for cached in (load, recurrence.unavailable):
        cached.cache_clear()


def count_builds(monkeypatch):
    builds, run = [], subprocess.run

    def counting(*arguments, **options):
        builds.append(arguments)
        return run(*arguments, **options)

    monkeypatch.setattr(library.subprocess, "run", counting)
    return builds


def test_a_library_is_compiled_once(folder, monkeypatch):
    builds = count_builds(monkeypatch)
    load("recurrence")
    load.cache_clear()
    load("recurrence")
    assert len(builds) == 1
    assert [path.parent for path in kept_libraries()] == [folder]
    assert clear_cache() == 1
    assert kept_libraries() == []
    load.cache_clear()
    load("recurrence")
    assert len(builds) == 2


@pytest.mark.parametrize("damage", [b"", b"not a library", None])
def test_a_damaged_library_is_compiled_again(folder, monkeypatch, damage):
    load("recurrence")
    (path,) = kept_libraries()
    content = path.read_bytes()
    path.unlink()  # the loaded file stays as it is
    path.write_bytes(content[: len(content) // 2] if damage is None else damage)
    load.cache_clear()
    builds = count_builds(monkeypatch)
    load("recurrence")
    assert len(builds) == 1
    assert [other.read_bytes() for other in kept_libraries()] == [content]


def test_another_source_is_another_library(folder, monkeypatch, tmp_path):
    load("recurrence")
    changed = tmp_path / "sources"
    changed.mkdir()
    for source in (*SOURCES.glob("*.c"), *SOURCES.glob("*.h")):
        (changed / source.name).write_bytes(source.read_bytes() + b"\n")
    monkeypatch.setattr(library, "_SOURCES", changed)
    load.cache_clear()
    load("recurrence")
    assert len(kept_libraries()) == 2


def test_the_folder_keeps_the_latest_libraries(folder, monkeypatch):
    folder.mkdir(parents=True)
    for i in range(5):
        (folder / f"old-{i}.so").touch()
        os.utime(folder / f"old-{i}.so", (i, i))
    monkeypatch.setattr(library, "_MOST_KEPT", 3)
    load("recurrence")
    assert [path.stem[:5] for path in kept_libraries()] == ["recur", "old-4", "old-3"]


def test_several_processes_compile_at_once(folder):
    code = "from fastppo.native.library import load; load('recurrence').lstm_forward; print('loaded')"
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(4)]
    assert [process.communicate()[0] for process in started] == ["loaded\n"] * 4
    assert not list(folder.glob("*.tmp"))


def test_a_folder_that_can_not_be_written_is_done_without(tmp_path, folder, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    load("recurrence")
    assert kept_libraries() == []


def test_without_a_home_folder_each_start_compiles(folder, monkeypatch):
    def homeless():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(library.Path, "home", homeless)
    load("recurrence")
    assert (cache_folder(), kept_libraries(), clear_cache()) == (None, [], 0)


def test_files_of_a_killed_compiler_are_deleted(folder):
    folder.mkdir(parents=True)
    for name, age in (("killed", 3600), ("working", 30)):
        (folder / f"{name}.tmp").touch()
        os.utime(folder / f"{name}.tmp", (time.time() - age,) * 2)
    load("recurrence")
    assert [path.name for path in folder.glob("*.tmp")] == ["working.tmp"]


def test_a_link_to_nowhere_hides_no_library(folder):
    folder.mkdir(parents=True)
    (folder / "a.so").touch()
    (folder / "b.so").symlink_to("nowhere")
    assert [path.name for path in kept_libraries()] == ["a.so"]


@pytest.mark.parametrize("cc", ["{} -fno-builtin", "{other} {} -fno-builtin", "", " "])
def test_cc_may_have_arguments_or_be_empty(tmp_path, folder, monkeypatch, cc):
    compiler, other = make_compiler(tmp_path, "cc"), make_compiler(tmp_path, "other", 'exec "$@"')
    monkeypatch.setenv("CC", cc.format(compiler, other=other))
    builds = count_builds(monkeypatch)
    load("recurrence")
    command = builds[0][0]
    words = cc.format(compiler, other=other).split() or [shutil.which("cc")]
    assert command[: len(words)] == words
    if cc.strip():  # other arguments, or another compiler behind the first program, are another library
        load.cache_clear()
        monkeypatch.setenv("CC", os.environ["CC"].replace("-fno-builtin", "-g"))
        load("recurrence")
        make_compiler(tmp_path, "cc", 'exec cc "$@"  # newer')
        load.cache_clear()
        load("recurrence")
        assert len(kept_libraries()) == len(builds) == 3


def make_compiler(tmp_path, name, body='exec cc "$@"'):
    compiler = tmp_path / name
    compiler.write_text(f"#!/bin/sh\n{body}\n")
    compiler.chmod(0o755)
    return str(compiler)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (None, r"there is no C compiler \(nowhere\)"),
        ("echo 'x.c:1: error: no such processor' >&2; exit 1", "could not compile recurrence.c: x.c:1: error: no such"),
        ("exec sleep 60", "took over 0 s to compile recurrence.c"),
        ("exit 0", "could not be compiled or loaded"),
    ],
)
def test_without_a_working_compiler_there_is_one_line_why(tmp_path, folder, monkeypatch, body, message):
    monkeypatch.setenv("CC", "nowhere -m64" if body is None else make_compiler(tmp_path, "compiler", body))
    monkeypatch.setattr(library, "_TIME_LIMIT", 0.2)
    with pytest.raises(NativeError, match=message) as caught:
        load("recurrence")
    assert "\n" not in str(caught.value)
    assert not list(folder.glob("*.tmp"))
    assert re.search(message, recurrence.unavailable())
    assert not recurrence.takes(torch.zeros(2, 2, 8))


def test_cc_that_can_not_be_read_is_named(folder, monkeypatch):
    monkeypatch.setenv("CC", "gcc 'x")
    with pytest.raises(NativeError, match="CC=gcc 'x can't be read .*; name a compiler, such as gcc"):
        load("recurrence")


def test_threads_of_a_program_call_at_once():
    """Whoever finds the pool taken computes alone: the same numbers, and no deadlock."""
    code = """
import threading, torch
from fastppo.native.recurrence import lstm_forward
g = torch.Generator().manual_seed(0)
gates, weight = torch.randn(5, 40, 80, generator=g), torch.randn(80, 20, generator=g)
hidden, cell = torch.randn(2, 40, 20, generator=g)
starts = torch.rand(5, 40, generator=g) < 0.2
torch.set_num_threads(1)
alone, calls = lstm_forward(gates, weight, starts, hidden, cell), []
together = threading.Barrier(3)
def call(threads):
    torch.set_num_threads(threads)
    for _ in range(30):
        together.wait()
        found = lstm_forward(gates, weight, starts, hidden, cell)
        calls.append((threads, all(map(torch.equal, found, alone))))
started = [threading.Thread(target=call, args=(n,)) for n in (1, 2, 3)]
for thread in started: thread.start()
for thread in started: thread.join()
assert sorted(calls) == [(n, True) for n in (1, 2, 3) for _ in range(30)], calls
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_a_forked_process_has_threads_of_its_own():
    code = """
import os, torch
from fastppo.functional.recurrence import lstm_scan
torch.set_num_threads(2)
def scan():
    g = torch.Generator().manual_seed(0)
    memory = torch.zeros(8, 16)
    gates, weight = torch.randn(5, 8, 64, generator=g), torch.randn(64, 16, generator=g)
    return lstm_scan(gates, weight, torch.zeros(5, 8, dtype=torch.bool), memory, memory)[0].sum().item()
here = scan()
child = os.fork()
if child == 0:
    os._exit(0 if scan() == here and scan() == here else 1)
assert scan() == here
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=PATIENCE)


def test_the_sources_run_under_sanitisers(tmp_path):
    program = tmp_path / "program"
    flags = ["-g", "-O1", "-std=gnu11", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    source = Path(__file__).parent / "native_program.c"
    command = [os.environ.get("CC", "cc"), *flags, f"-I{SOURCES}", "-o", str(program), str(source), "-lpthread", "-lm"]
    subprocess.run(command, check=True)
    done = subprocess.run([str(program)], capture_output=True, text=True, timeout=PATIENCE, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "done\n"
