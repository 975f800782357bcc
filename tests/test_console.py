"""Output of the commands: in a terminal, in a pipe, in a pipe whose reader has gone, and without standard output."""

import dataclasses
import importlib
import io
import re
import subprocess
import sys
import tomllib
from types import SimpleNamespace

import pytest
from rich.console import Console

from fastppo.analysis.checks import CheckResult
from fastppo.cli import main
from fastppo.commands.console import print_checks
from fastppo.monitoring.health_rules import HealthFinding, RunTraits
from fastppo.monitoring.run_logger import RunLogger
from fastppo.monitoring.sinks.console import ConsoleSink, compact
from fastppo.monitoring.stats import Stats
from fastppo.runtime.console import print_line, wrap_words

FINDING = HealthFinding(
    "explained variance negative",
    "explained variance is -0.35: the value function predicts worse than a constant.",
    "Raise vf_coef or learning_rate, or set normalize_rewards.",
)
STATS = Stats(
    iteration=400,
    n_iterations=1000,
    global_step=105_472,
    total_timesteps=2_999_296,
    mean_return=-1234.5,
    episodes=3,
    seconds=10.0,
    sps=128_333.0,
    kl=0.0123,
    stop="",
    scalars={},
    findings=[FINDING, FINDING],
)
STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d "
TRAIN = ["train", "--n-envs", "2", "--n-steps", "16", "--total-timesteps", "320", "--compile", "off", "--threads", "1"]


def terminal(width):
    return Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)


def pipe():
    return Console(file=io.StringIO(), width=80)


def lines(console):
    """The printed lines without escape sequences, apart from empty ones."""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    return [line.rstrip() for line in re.split("[\r\n]+", text) if line.strip()]


def test_ctrl_c_during_imports_ends_with_one_line(monkeypatch, capsys):
    with open("pyproject.toml", "rb") as file:
        assert tomllib.load(file)["project"]["scripts"]["fastppo"] == "fastppo.__main__:main"

    def interrupt(name, *_):
        if name == "fastppo.cli":
            raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "fastppo.cli")
    monkeypatch.setattr(sys, "meta_path", [SimpleNamespace(find_spec=interrupt), *sys.meta_path])
    assert importlib.import_module("fastppo.__main__").main() == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_the_time_left_holds_evaluations_and_videos():
    """400 of 1000 iterations took 10 s, and evaluations between them 30 s: 600 take 60 s."""
    console = pipe()
    sink = ConsoleSink(console, 1000)
    sink.write(dataclasses.replace(STATS, paused_seconds=30.0))
    assert "ETA 60s" in console.file.getvalue()


def words(text):
    return text.split()


@pytest.mark.parametrize("width", [80, 120])
def test_a_terminal_wraps_between_words_and_a_pipe_never(width):
    text = f"health at 19,456 steps: {FINDING}"
    shown, piped = terminal(width), pipe()
    print_line(shown, text)
    print_line(piped, text)
    assert max(map(len, lines(shown))) <= width
    assert words(" ".join(lines(shown))) == words(text)
    assert lines(piped) == [text]


def test_a_path_and_a_command_stay_whole():
    path = "/".join(["a-folder with a space"] * 6)
    for width, wrap in ((80, False), (40, False)):
        console = terminal(width)
        print_line(console, f"run folder:  {path}", wrap=wrap)
        assert lines(console) == [f"run folder:  {path}"]
    assert wrap_words("see " + 90 * "x" + " there", 20) == "see\n  " + 90 * "x" + "\n  there"


def test_checks_wrap_below_their_value(monkeypatch, capsys):
    console = terminal(80)
    monkeypatch.setattr("fastppo.commands.console.open_console", lambda: console)
    value = "exact for this environment, with a restored copy that takes the same steps as its original"
    assert print_checks([CheckResult("resume", value, "note", "use [brackets] " * 8)], "good") == 0
    first, *more, last = lines(console)
    assert first.startswith("note resume           exact")
    assert all(line.startswith(22 * " ") and len(line) <= 80 for line in more)
    assert last == "good; see the note above"
    assert words(" ".join([first, *more]))[2:] == words(value + " use [brackets]" * 8)


def test_a_narrow_progress_line_cuts_no_number():
    for width in (60, 80, 120):
        console = terminal(width)
        sink = ConsoleSink(console, 1000)
        sink.write(STATS)
        sink.close()
        shown = lines(console)
        assert max(map(len, shown)) <= width
        text = " ".join(re.sub("[━╸╺]", "", " ".join(shown)).split())
        assert "105k/3.0M 128k steps/s ETA 15s return -1234.5 KL 0.012 ! explained variance negative +1" in text


@pytest.mark.parametrize(
    ("number", "text"),
    [
        *((0, "0"), (999, "999"), (1000, "1.0k"), (99_949, "99.9k"), (99_951, "100k"), (105_472, "105k")),
        *((999_501, "1.0M"), (2_999_296, "3.0M"), (12_800_000, "12.8M"), (10**9, "1.0G"), (10**15, "1.0P")),
    ],
)
def test_compact_numbers(number, text):
    assert compact(number) == text


def test_lines_of_a_run_have_time_stamps_in_a_pipe_and_none_in_a_terminal():
    piped, shown = pipe(), terminal(200)
    for console in (piped, shown):
        RunLogger(console, RunTraits()).say("note: one")
    sink = ConsoleSink(piped, 1000)
    sink.write(STATS)
    sink.close()
    note, progress = lines(piped)
    assert re.fullmatch(STAMP + "note: one", note)
    assert re.match(STAMP + r"105,472/2,999,296 steps  128,333 steps/s  ETA 15s", progress)
    assert lines(shown) == ["note: one"]


def test_a_run_prints_its_folder_first_and_nothing_wrapped(tmp_path, capsys):
    folder = tmp_path / "a folder whose name is so long that it takes more than eighty columns in a terminal" / "run"
    assert main([*TRAIN, "--run-dir", str(folder)]) == 0
    text = capsys.readouterr().out
    start = text[: text.index(" steps/s")]
    assert f"\nrun folder:  {folder}\n" in start
    assert re.search(rf"\ntensorboard: \S*tensorboard --logdir '{re.escape(str(folder))}'\n", start)
    assert re.search(rf"^{STAMP}320/320 steps", text, re.M)
    assert main(["resume", str(folder), "--total-timesteps", "640"]) == 0
    resumed = capsys.readouterr().out
    assert f"\nrun folder:  {folder}\n" in resumed[: resumed.index(" steps/s")]


@pytest.mark.parametrize("arguments", ["--help", "train --help", "study --help", "eval --help"])
def test_help_into_a_closed_pipe_ends_quietly(arguments):
    command = [sys.executable, "-m", "fastppo", *arguments.split()]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    with process.stderr:
        assert process.stderr.read() == ""
    assert process.wait() == 141


def test_a_training_goes_on_without_a_reader_or_without_standard_output(tmp_path):
    command = [sys.executable, "-m", "fastppo", *TRAIN]
    quoted = " ".join(command)
    for name, script in {
        "unread": f"set -o pipefail; {quoted} --run-dir unread 2>&1 | true",
        "closed": f"{quoted} --run-dir closed >&- 2>&- <&-",
    }.items():
        done = subprocess.run(["bash", "-c", script], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, ""), name
        assert '"global_step": 320' in (tmp_path / name / "result.json").read_text()
