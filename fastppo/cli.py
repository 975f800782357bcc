"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

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
from fastppo.errors import ConfigError, EnvError, EnvStartError, FastPPOError

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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 for a user's mistake, 130 after Ctrl-C.

    `--debug`, which every command takes, prints the traceback of an error.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    try:
        return parse([argument for argument in given if argument != "--debug"])()
    except FastPPOError as error:
        # an environment's own error after the start, whose place in its code would be lost with the run
        in_training = isinstance(error, EnvError) and not isinstance(error, EnvStartError)
        if debug:
            traceback.print_exception(error)
        elif error.__cause__ is not None and in_training:
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
        description="A vectorised, high-throughput PPO trainer. Every command takes --debug: tracebacks of errors.",
        args=_normalise(arguments),
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
            named, typed = config.env_id, any(a.partition("=")[0] in ("--env-id", "--env_id") for a in arguments)
            if ":" in named and not typed:
                raise ConfigError(f"{path}: env_id {named} imports code; if you trust it, add --env-id {named}")
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
