"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

import contextlib
import difflib
import inspect
import io
import itertools
import os
import shutil
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import tyro

import fastppo
from fastppo.commands.checking import Replay, VerifyEnv, VerifyResume
from fastppo.commands.console import discard_stdout
from fastppo.commands.flags import Form, flag, form
from fastppo.commands.measuring import Bench, Doctor, Study
from fastppo.commands.profiles import ShowProfile
from fastppo.commands.reporting import Diff, Export, Report
from fastppo.commands.settings import SettingsCommand
from fastppo.commands.training import Eval, Resume, Train
from fastppo.commands.tuning import Tune
from fastppo.config import ALIASES, DEFAULTS, TYPES, Config, load_toml, shown
from fastppo.errors import ConfigError, EnvError, EnvStartError, FastPPOError
from fastppo.runtime.console import wrap_words

_Settings = TypeVar("_Settings", bound=SettingsCommand)

_HELP_UNREAD = 141  # as shells report a process that SIGPIPE ended

COMMANDS: dict[str, type] = {
    "train": Train,
    "bench": Bench,
    "study": Study,
    "tune": Tune,
    "resume": Resume,
    "eval": Eval,
    "report": Report,
    "diff": Diff,
    "export": Export,
    "profile": ShowProfile,
    "doctor": Doctor,
    "verify-env": VerifyEnv,
    "verify-resume": VerifyResume,
    "replay": Replay,
}


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _whole_numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Parse every integer of the command line, also from 1e6; one that may be None too, without naming None."""
    if info.type not in (int, int | None):
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda arguments: _whole_number(arguments[0]),
        is_instance=lambda value: value is None or isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


@_REGISTRY.primitive_rule
def _lists_of_whole_numbers(
    info: tyro.constructors.PrimitiveTypeInfo,
) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Parse a command's own lists of integers, such as the n_envs of a study."""
    if info.type != tuple[int, ...]:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[INT ...]",
        instance_from_str=lambda arguments: tuple(map(_whole_number, arguments)),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: list(map(str, value)),
    )


@_REGISTRY.primitive_rule
def _numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    if info.type is not float:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="NUMBER",
        instance_from_str=lambda arguments: _number(arguments[0]),
        is_instance=lambda value: isinstance(value, (int, float)),
        str_from_instance=lambda value: [str(value)],
    )


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number, such as 5 or 0.5") from None


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise ValueError(f"{text!r} is not a whole number, such as 1000 or 1e6")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status.

    0; 2 for a user's mistake; 130 after Ctrl-C; 141 if the reader of the help text has gone, as in `--help | head`. A
    command that is running ignores such a reader: its work continues without output. `--debug`, which every command
    takes, prints the traceback of an error.
    """
    _prepare_streams()
    folder = os.getcwd()
    if sys.path[0] not in ("", folder):  # as `python -m` does: the environments beside the user are found, and pickled
        sys.path.insert(0, folder)  # paths reach worker processes
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        command = _parse_and_flush([argument for argument in given if argument != "--debug"])
        return _HELP_UNREAD if command is None else command()
    except FastPPOError as error:
        # an environment's own error after the start, whose place in its code would be lost with the run
        in_training = isinstance(error, EnvError) and not isinstance(error, EnvStartError)
        if debug:
            traceback.print_exception(error)
        elif in_training and (cause := error.__cause__) is not None and not isinstance(cause, FastPPOError):
            plain = isinstance(cause, RuntimeError) and cause.__traceback__ is None  # a worker's traceback, as text
            print(cause if plain else "".join(traceback.format_exception(cause)), file=sys.stderr)
        rank = os.environ.get("RANK")
        where = f"process {rank}: " if rank is not None else ""
        message = f"{where}{type(error).__name__}: {error}"
        if sys.stderr.isatty():
            message = wrap_words(message, shutil.get_terminal_size().columns)
        print(message, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _prepare_streams() -> None:
    """Replace closed standard streams, whose descriptors the next opened files would get, and their output with it.

    Characters outside the encoding of the output, as in a path, are escaped.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115 - for the life of the process
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as Python sets it for stderr


def _parse_and_flush(arguments: Sequence[str]) -> Callable[[], int] | None:
    """Return `parse(arguments)`; None if nobody reads the help that it prints."""
    try:
        try:
            return parse(arguments)
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        discard_stdout()
        return None


def parse(arguments: Sequence[str]) -> Callable[[], int]:
    """Return the command that the arguments ask for, ready to call.

    Raises:
        ConfigError: no such command, an empty argument, or the file that --config names can't be used.
        SystemExit: the parser refused the arguments, or printed help.
    """
    name, *rest = arguments or ("",)
    if name in ("-h", "--help", "--version"):
        print(f"fastppo {fastppo.__version__}" if name == "--version" else _overview())
        raise SystemExit(0)
    if name not in COMMANDS:
        raise ConfigError(_no_command(name))
    kind = COMMANDS[name]
    _check_filled(name, rest)
    # the parser sees the flags of this command alone, so that a typo suggests no other command's
    default = form(_defaults(kind, rest)) if issubclass(kind, SettingsCommand) else None
    parsed: Any = tyro.cli(
        kind if default is None else type(default),
        default=tyro.MISSING_NONPROP if default is None else default,
        prog=f"fastppo {name}",
        description=inspect.cleandoc(kind.__doc__ or ""),
        args=_normalise(rest),
        registry=_REGISTRY,
    )
    command: Callable[[], int] = kind(**parsed.values()) if isinstance(parsed, Form) else parsed
    return command


def _overview() -> str:
    """Return the help text of `fastppo` itself: the commands, each with the first line of its docstring."""
    width, column = shutil.get_terminal_size().columns, max(map(len, COMMANDS)) + 4
    lines = [f"  {name:<{column - 2}}{(kind.__doc__ or '').splitlines()[0]}" for name, kind in COMMANDS.items()]
    return "\n".join(
        [
            "usage: fastppo COMMAND [FLAGS]",
            "",
            "A vectorised, high-throughput PPO trainer.",
            "",
            "commands:",
            wrap_words("\n".join(lines), width, " " * column),
            "",
            "fastppo COMMAND --help explains its flags; fastppo --version prints the version.",
            "Every command takes --debug: it prints the traceback of an error.",
        ]
    )


def _no_command(name: str) -> str:
    """Return the message for arguments that begin with `name` instead of a command."""
    names = ", ".join(COMMANDS)
    if not name:
        return f"a command is missing; use one of {names}."
    if name.startswith("-"):
        return f"{name} stands before the command; begin with one of {names}, as in `fastppo train {name}`."
    near = difflib.get_close_matches(name, COMMANDS, n=1)
    return f"there is no command {name!r}; " + (f"did you mean {near[0]}?" if near else f"use one of {names}.")


def _check_filled(command: str, arguments: Sequence[str]) -> None:
    """Refuse empty arguments, as unset variables of a shell are; an empty path would be the working folder.

    Raises:
        ConfigError: an argument is empty.
    """
    for before, argument in itertools.pairwise([command, *arguments]):
        name, equals, value = argument.partition("=")
        if not argument or (name.startswith("--") and equals and not value):
            flagged = name or (before if before.startswith("-") and "=" not in before else "")
            what = f"{flagged} has an empty value" if flagged else f"{command}: an argument is empty"
            raise ConfigError(f"{what}, as from a variable that is not set; give a value, or leave it out.")


def _defaults(kind: type[_Settings], arguments: Sequence[str]) -> _Settings:
    """Return the defaults of the flags: the file that --config names over the profile, or the command's own."""
    file, profile = _given(arguments, "--config"), _given(arguments, "--profile", "--preset")
    if file is None and profile is None:
        return kind()
    path = None if file is None else Path(file)
    values = {} if path is None else load_toml(path)
    if profile is not None:
        values = {name: value for name, value in values.items() if name not in ("profile", "preset")}
        values["profile"] = profile
    config = Config.from_dict(values, "--profile" if path is None else str(path))
    typed = {flag(a.partition("=")[0].lstrip("-")) for a in arguments}
    for imported in config.imported:
        name = imported.partition(" ")[0]
        if flag(name) not in typed:
            value = shown(getattr(config, name))  # all wrappers, not only those that import code
            raise ConfigError(f"{path}: {imported} imports code; if you trust it, add {flag(name)} {value}")
    in_file = {name.replace("-", "_") for name in values}
    named = {ALIASES.get(name, name) for name in in_file}
    # a command's own defaults, such as a study's target, stay where neither file nor profile says otherwise
    changed = {
        name: getattr(config, name) for name in DEFAULTS if name in named or getattr(config, name) != DEFAULTS[name]
    }
    if "n_envs" in changed and issubclass(kind, (Bench, Study)):  # these take several n_envs
        changed["n_envs"] = (config.n_envs,)
    if "vectorization" in changed and kind is Bench:
        changed["vectorization"] = Bench.vectorization if config.vectorization == "auto" else (config.vectorization,)
    return kind(**changed, config=path)


def _given(arguments: Sequence[str], *names: str) -> str | None:
    """Return the value of the last of the flags `names`; None if none is given."""
    found = None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        name, equals, value = argument.partition("=")
        if name in names and (equals or following is not None):
            found = value if equals else following
    return found


def _normalise(arguments: Sequence[str]) -> list[str]:
    """Replace aliases by the flags they stand for, and give switches a value.

    `--num-envs 4` becomes `--n-envs 4`; `--anneal-lr` and `--no-anneal-lr` become `--anneal-lr True` and
    `--anneal-lr False`, because tyro demands a value for a switch that may also be None.

    Raises:
        ConfigError: a value follows a switch that takes none.
    """
    aliases = {flag(alias): flag(name) for alias, name in ALIASES.items()}
    switches = {flag(name) for name, hint in TYPES.items() if hint == bool | None}
    bare = {flag(name) for name, hint in TYPES.items() if hint is bool}
    out: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        plain = name.replace("_", "-")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if plain in aliases:
            out.append(aliases[plain] + equals + value)
        elif argument == name and plain in switches and following.startswith("-"):
            out += [plain, "True"]
        elif plain in bare and (equals or not following.startswith("-")):
            given = value if equals else following
            raise ConfigError(f"{plain} takes no value, but {given!r} follows; give {plain} or --no-{plain[2:]}.")
        elif argument == name and plain.startswith("--no-") and flag(plain[5:]) in switches:
            out += [flag(plain[5:]), "False"]
        else:
            out.append(argument)
    return out
