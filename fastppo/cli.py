"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

import dataclasses
import os
import shutil
import sys
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, cast

import tyro

from fastppo.config import Config, load_toml
from fastppo.errors import ConfigError, FastPPOError

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.trainer import Result


@dataclasses.dataclass(frozen=True)
class Train(Config):
    """Train a policy. Settings that are not given come from the environment's kind: see --preset."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """TOML file of settings, by the names of these flags; the flags win over it."""

    def __post_init__(self) -> None:
        """Nothing: Config checks, once tyro is done, which would draw a box around each message."""

    def settings(self) -> Config:
        """The settings, checked."""
        return Config(**{field.name: getattr(self, field.name) for field in dataclasses.fields(Config)})


@dataclasses.dataclass(frozen=True)
class Eval:
    """Play whole episodes with the policy of a run folder."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    episodes: int = 20
    """How many episodes."""
    sampled: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Sample actions instead of taking the most probable ones."""
    seed: int = 0
    """Seed of the environments and of sampling."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the run's env id import its module (ids of the form module:Env-v0)."""


class _Stdout:
    """Standard output that falls silent when nobody reads it any longer or its disk is full: training goes on."""

    def __init__(self) -> None:
        self._file = sys.stdout

    def __getattr__(self, name: str) -> Any:  # noqa: ANN401 - isatty, encoding, fileno: whatever rich asks for
        return getattr(self._file, name)

    def write(self, text: str) -> int:
        try:
            return self._file.write(text)
        except OSError:
            return self._silence(text)

    def flush(self) -> None:
        try:
            self._file.flush()
        except OSError:
            self._silence("")

    def _silence(self, text: str) -> int:
        # onto the same descriptor, so that Python's own flush at exit finds nothing wrong either
        with open(os.devnull, "w") as nowhere:
            os.dup2(nowhere.fileno(), self._file.fileno())
        return len(text)


def _console() -> Console:
    from rich.console import Console

    return Console(file=cast("IO[str]", _Stdout()))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status: 0, 2 for a mistake, 130 after Ctrl-C."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        defaults = _train_defaults(given)
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train", default=defaults)]
            | Annotated[Eval, tyro.conf.subcommand("eval")],
            prog="fastppo",
            description="A vectorised, high-throughput PPO trainer.",
            args=_spell_out_switches(given),
        )
        return _train(command) if isinstance(command, Train) else _eval(command)
    except FastPPOError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _train_defaults(arguments: Sequence[str]) -> Train:
    """What the flags lie over: the file named by --config, or nothing."""
    for i, argument in enumerate(arguments):
        flag, equals, value = argument.partition("=")
        if flag == "--config" and (equals or i + 1 < len(arguments)):
            path = Path(value if equals else arguments[i + 1])
            config = Config.from_dict(load_toml(path), str(path))
            return Train(**{f.name: getattr(config, f.name) for f in dataclasses.fields(config)}, config=path)
    return Train()


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


def _train(command: Train) -> int:
    config = command.settings()  # before torch is imported: mistakes answer at once
    from fastppo.trainer import Trainer

    console = _console()
    trainer = Trainer(config, console=console)
    settings = "  ".join(f"{key}={value}" for key, value in trainer.config.to_dict().items() if value is not None)
    console.print(f"{settings}\n", highlight=False, markup=False)
    result = trainer.run()
    _print_result(console, result, trainer.config)
    return 130 if result.ended == "interrupted" else 0


def _print_result(console: Console, result: Result, config: Config) -> None:
    from rich.table import Table

    endings = {"target": f"target of {config.target_return} reached", "interrupted": "interrupted; the model is saved"}
    table = Table(
        title=f"{config.env_id}: {endings.get(result.ended, result.ended)}", title_justify="left", show_header=False
    )
    table.add_row("mean return", f"{result.mean_return:.2f} (last 100 of {result.episodes:,} episodes)")
    table.add_row("steps", f"{result.global_step:,} in {result.seconds:.1f} s, {result.iterations:,} iterations")
    table.add_row("steps per second", f"{result.sps_steady:,.0f} steady, {result.sps_total:,.0f} total")
    whole = sum(result.phases.values()) or 1.0
    shares = sorted(result.phases.items(), key=lambda item: -item[1])
    table.add_row("time went to", "  ".join(f"{name} {seconds / whole:.0%}" for name, seconds in shares))
    table.add_row("run folder", str(result.run_dir))
    console.print(table)
    console.print(f"curves:  {_program('tensorboard')} --logdir {result.run_dir}", highlight=False, soft_wrap=True)
    console.print(
        f"play:    {_program('fastppo')} eval {result.run_dir} --episodes 20", highlight=False, soft_wrap=True
    )


def _program(name: str) -> str:
    """How to call a program of this environment from here: by name, if the shell finds it, else by path."""
    path = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return name if found and Path(found) == path else os.path.relpath(path)


def _eval(command: Eval) -> int:
    if command.episodes < 1:
        raise ConfigError(f"episodes={command.episodes} must be at least 1.")
    from fastppo.evaluation import evaluate

    played = evaluate(
        command.run,
        command.episodes,
        deterministic=not command.sampled,
        seed=command.seed,
        allow_import=command.allow_import,
    )
    how = "sampled" if command.sampled else "greedy"
    lengths = played.lengths
    _console().print(
        f"{len(lengths)} episodes, {how}: return {played.mean:.2f} +- {played.std:.2f} "
        f"(min {min(played.returns):.2f}, max {max(played.returns):.2f}), "
        f"length {sum(lengths) / len(lengths):.1f} (min {min(lengths)}, max {max(lengths)})",
        highlight=False,
        soft_wrap=True,
    )
    return 0
