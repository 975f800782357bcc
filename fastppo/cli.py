"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import traceback
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastppo.commands.checking import Replay, VerifyEnv, VerifyResume
from fastppo.commands.flags import Form, flag, form
from fastppo.commands.measuring import Bench, Doctor, Study
from fastppo.commands.reporting import Diff, Export, Report
from fastppo.commands.training import Eval, Resume, Train
from fastppo.config import ALIASES, TYPES, Config, load_toml
from fastppo.errors import ConfigError, FastPPOError

_Settings = TypeVar("_Settings", bound=Train)

COMMANDS: dict[str, type] = {
    "train": Train,
    "bench": Bench,
    "study": Study,
    "resume": Resume,
    "eval": Eval,
    "report": Report,
    "diff": Diff,
    "export": Export,
    "doctor": Doctor,
    "verify-env": VerifyEnv,
    "verify-resume": VerifyResume,
    "replay": Replay,
}


_REGISTRY = tyro.constructors.ConstructorRegistry()


@_REGISTRY.primitive_rule
def _whole_numbers(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec[Any] | None:
    """Parse every integer of the command line, also from 1e6."""
    if info.type is not int:
        return None
    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="INT",
        instance_from_str=lambda args: _whole_number(args[0]),
        is_instance=lambda value: isinstance(value, int),
        str_from_instance=lambda value: [str(value)],
    )


def _whole_number(text: str) -> int:
    with contextlib.suppress(ValueError):
        return int(text)
    with contextlib.suppress(ValueError):
        if (number := float(text)).is_integer():
            return int(number)
    raise ValueError(f"invalid number {text!r}; give a whole one, such as 1000 or 1e6")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C."""
    folder = os.getcwd()
    if sys.path[0] not in ("", folder):  # as `python -m` does: the environments beside the user are found, and pickled
        sys.path.insert(0, folder)  # paths reach worker processes
    try:
        return parse(list(sys.argv[1:] if arguments is None else arguments))()
    except FastPPOError as error:
        if error.__cause__ is not None:  # an environment's own error, with the place in its code
            cause = error.__cause__
            plain = isinstance(cause, RuntimeError) and cause.__traceback__ is None  # a worker's traceback, as text
            print(cause if plain else "".join(traceback.format_exception(cause)), file=sys.stderr)
        rank = os.environ.get("RANK")
        where = f"process {rank}: " if rank is not None else ""
        print(f"{where}{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def parse(arguments: Sequence[str]) -> Callable[[], int]:
    """Return the command that the arguments ask for, ready to call.

    Raises:
        ConfigError: the file that --config names can't be used.
        SystemExit: the parser refused the arguments, or printed help.
    """
    subcommands: list[Any] = []
    forms: dict[type[Form], type[Train]] = {}
    for name, kind in COMMANDS.items():
        if issubclass(kind, Train):
            default = form(_defaults(kind, arguments))
            forms[type(default)] = kind
            marker = tyro.conf.subcommand(name, default=default, description=kind.__doc__)
            subcommands.append(Annotated[type(default), marker])
        else:
            subcommands.append(Annotated[kind, tyro.conf.subcommand(name)])
    any_of: Any = typing.Union[tuple(subcommands)]  # noqa: UP007 - a union of a list
    parsed: Any = tyro.cli(
        any_of,
        prog="fastppo",
        description="A vectorised, high-throughput PPO trainer.",
        args=_normalise(arguments),
        registry=_REGISTRY,
    )
    command: Callable[[], int] = forms[type(parsed)](**parsed.values()) if isinstance(parsed, Form) else parsed
    return command


def _defaults(kind: type[_Settings], arguments: Sequence[str]) -> _Settings:
    """Return the defaults of the flags: the file that --config names, or the command's own."""
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name == "--config" and (equals or i + 1 < len(arguments)):
            path = Path(value if equals else arguments[i + 1])
            config = Config.from_dict(load_toml(path), str(path))
            typed = {flag(a.partition("=")[0].lstrip("-")) for a in arguments}
            for imported in config.imported:
                option = flag(imported.partition(" ")[0])
                if option not in typed:
                    value = imported.partition(" ")[2]
                    raise ConfigError(f"{path}: {imported} imports code; if you trust it, add {option} {value}")
            found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            if issubclass(kind, (Bench, Study)):  # these take several n_envs
                found["n_envs"] = (config.n_envs,) if config.n_envs else kind.n_envs
            if kind is Bench:
                found["vectorization"] = (
                    Bench.vectorization if config.vectorization in ("auto", "sync") else (config.vectorization,)
                )
            return kind(**found, config=path)
    return kind()


def _normalise(arguments: Sequence[str]) -> list[str]:
    """Replace aliases by the flags they stand for, and give switches a value.

    `--num-envs 4` becomes `--n-envs 4`; `--anneal-lr` and `--no-anneal-lr` become `--anneal-lr True` and
    `--anneal-lr False`, because tyro demands a value for a switch that may also be None.
    """
    aliases = {flag(alias): flag(name) for alias, name in ALIASES.items()}
    switches = {flag(name) for name, hint in TYPES.items() if hint == bool | None}
    out: list[str] = []
    for i, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        plain = name.replace("_", "-")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if plain in aliases:
            out.append(aliases[plain] + equals + value)
        elif argument == name and plain in switches and following.lower() not in ("true", "false"):
            out += [plain, "True"]
        elif argument == name and plain in switches:
            out.append(plain)
        elif argument == name and plain.startswith("--no-") and flag(plain[5:]) in switches:
            out += [flag(plain[5:]), "False"]
        elif out and out[-1] in switches and argument.lower() in ("true", "false"):
            out.append(argument.capitalize())
        else:
            out.append(argument)
    return out
