"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

import dataclasses
import os
import sys
import traceback
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import tyro

from fastppo.commands.checking import Replay, VerifyEnv, VerifyResume
from fastppo.commands.measuring import Bench, Doctor, Study
from fastppo.commands.reporting import Diff, Export, Report
from fastppo.commands.training import Eval, Resume, Train
from fastppo.config import Config, load_toml
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


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        kinds = []
        for name, kind in COMMANDS.items():
            if issubclass(kind, Train):
                kinds.append(Annotated[kind, tyro.conf.subcommand(name, default=_defaults(kind, given))])
            else:
                kinds.append(Annotated[kind, tyro.conf.subcommand(name)])
        any_of: Any = typing.Union[tuple(kinds)]  # noqa: UP007 - of a list
        command = tyro.cli(
            any_of,
            prog="fastppo",
            description="A vectorised, high-throughput PPO trainer.",
            args=_spell_out_switches(given),
        )
        status: int = command()
        return status
    except FastPPOError as error:
        if error.__cause__ is not None:  # an environment's own error, with the place in its code
            cause = error.__cause__
            plain = isinstance(cause, RuntimeError) and cause.__traceback__ is None  # a worker's, as text
            print(cause if plain else "".join(traceback.format_exception(cause)), file=sys.stderr)
        rank = os.environ.get("RANK")
        where = f"process {rank}: " if rank is not None else ""
        print(f"{where}{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _defaults(kind: type[_Settings], arguments: Sequence[str]) -> _Settings:
    """What the flags lie over: the file named by --config, or nothing."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or i + 1 < len(arguments)):
            path = Path(value if equals else arguments[i + 1])
            config = Config.from_dict(load_toml(path), str(path))
            named, typed = config.env_id, any(a.partition("=")[0] in ("--env-id", "--env_id") for a in arguments)
            if ":" in named and not typed:
                raise ConfigError(f"{path}: env_id {named} imports code; if you trust it, add --env-id {named}")
            found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            if issubclass(kind, (Bench, Study)):  # which take several of these
                found["n_envs"] = (config.n_envs,) if config.n_envs else kind.n_envs
            if kind is Bench:
                found["vectorization"] = (
                    Bench.vectorization if config.vectorization in ("auto", "sync") else (config.vectorization,)
                )
            return kind(**found, config=path)
    return kind()


def _spell_out_switches(arguments: Sequence[str]) -> list[str]:
    """`--anneal-lr` and `--no-anneal-lr` as `--anneal-lr True` and `--anneal-lr False`.

    Switches have a third state, "not given", for which tyro asks a value of every flag.
    """
    hints = typing.get_type_hints(Config)
    switches = {f"--{name.replace('_', '-')}" for name, hint in hints.items() if hint == bool | None}
    out: list[str] = []
    for i, argument in enumerate(arguments):
        plain = argument.replace("_", "-")
        following = arguments[i + 1] if i + 1 < len(arguments) else "--"
        if plain in switches and following.lower() not in ("true", "false"):
            out += [plain, "True"]
        elif plain in switches:
            out.append(plain)
        elif plain.startswith("--no-") and f"--{plain[5:]}" in switches:
            out += [f"--{plain[5:]}", "False"]
        elif out and out[-1] in switches and argument.lower() in ("true", "false"):
            out.append(argument.capitalize())
        else:
            out.append(argument)
    return out
