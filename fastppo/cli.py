"""The command line. Parsing imports no torch, so that --help and mistakes in flags answer at once."""

from __future__ import annotations

import dataclasses
import math
import os
import shutil
import sys
import traceback
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated, Any, Literal, TypeVar, cast

import tyro

from fastppo.config import Config, EnvKwargs, load_toml
from fastppo.errors import ConfigError, FastPPOError, FinishedError

if TYPE_CHECKING:
    from rich.console import Console

    from fastppo.bench import Point
    from fastppo.doctor import Finding
    from fastppo.trainer import Result, Trainer


@dataclasses.dataclass(frozen=True)
class Train(Config):
    """Train a policy. Settings that are not given come from the environment's kind: see --preset."""

    config: Annotated[Path | None, tyro.conf.arg(metavar="PATH", help_behavior_hint="(default: none)")] = None
    """TOML file of settings, by the names of these flags; the flags win over it."""

    def __post_init__(self) -> None:
        """Nothing: Config checks, once tyro is done, which would draw a box around each message."""

    def settings(self, **changes: Any) -> Config:  # noqa: ANN401 - values of settings
        """The settings with `changes`, checked."""
        given = {field.name: getattr(self, field.name) for field in dataclasses.fields(Config)}
        return Config(**given | changes)


_Sizes = Annotated[tuple[int, ...], tyro.conf.arg(aliases=("--num-envs",), metavar="INT [INT ...]")]
_Vectorizations = Annotated[
    tuple[Literal["sync", "async", "pool", "native", "envpool", "tensor"], ...],
    tyro.conf.arg(metavar="{sync,async,pool,native,envpool,tensor} [...]"),
]


@dataclasses.dataclass(frozen=True)
class Bench(Train):
    """Measure training speed at several n_envs, and what limits it. Takes the settings of train beside its own."""

    n_envs: _Sizes = (1, 8, 64, 512)  # type: ignore[assignment]
    """Numbers of environments, each measured with each vectorisation."""
    vectorization: _Vectorizations = ("sync", "pool", "native")  # type: ignore[assignment]
    """Vectorisations."""
    seconds: float = 5.0
    """Seconds of training that are timed at each point, after warm-up and compilation."""
    save: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Keep the fastest vectorisation for each n_envs, for `train --vectorization auto` on this machine."""
    total_timesteps: Annotated[int | None, tyro.conf.Suppress] = None
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    init_from: Annotated[Path | None, tyro.conf.Suppress] = None
    name: Annotated[str, tyro.conf.Suppress] = "bench"
    checkpoint_every: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_minutes: Annotated[float, tyro.conf.Suppress] = 0.0
    keep_checkpoints: Annotated[int, tyro.conf.Suppress] = Config.keep_checkpoints
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "never"
    exact_resume: Annotated[bool, tyro.conf.Suppress] = False
    eval_every: Annotated[int | None, tyro.conf.Suppress] = None
    eval_episodes: Annotated[int, tyro.conf.Suppress] = Config.eval_episodes

    def points(self) -> list[Config]:
        """The settings of each point, checked."""
        if not 0 < self.seconds < math.inf:
            raise ConfigError(f"seconds={self.seconds} must be more than 0; 5 is enough on a quiet machine.")
        pool = {"workers": self.workers, "half_batches": self.half_batches}
        for name, value in pool.items():
            if value and "pool" not in self.vectorization:
                raise ConfigError(f"{name} is for the pool; add pool to --vectorization, or leave --{name} out.")
        no_pool = {"workers": None, "half_batches": False}

        def _pool(n: int) -> dict[str, Any]:
            return pool | {"half_batches": self.half_batches and n > 1}

        return [
            self.settings(n_envs=n, vectorization=v, name="bench", **(_pool(n) if v == "pool" else no_pool))
            for n in dict.fromkeys(self.n_envs)
            for v in dict.fromkeys(self.vectorization)
        ]


@dataclasses.dataclass(frozen=True)
class Resume:
    """Go on with a run from its newest checkpoint."""

    run: Annotated[Path, tyro.conf.Positional]
    """The run folder."""
    total_timesteps: Annotated[int | None, tyro.conf.arg(metavar="INT", help_behavior_hint="(default: as planned)")] = (
        None
    )
    """Environment steps in all, to go on beyond what was planned."""
    allow_import: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Let the run's env id import its module (ids of the form module:Env-v0)."""


@dataclasses.dataclass(frozen=True)
class Replay:
    """Run again, on the CPU, what a capsule holds, and name the first tensor that is not finite."""

    capsule: Annotated[Path, tyro.conf.Positional]
    """The folder that a run left when its gradients were not finite."""


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
    best: Annotated[bool, tyro.conf.FlagCreatePairsOff] = False
    """Take the checkpoint that evaluated best while it trained, not the last model."""


@dataclasses.dataclass(frozen=True)
class VerifyEnv:
    """Step an environment and say what it really does: dtypes, autoreset, seeds, speed, and how it can be resumed."""

    env_id: str = "CartPole-v1"
    """What to look at."""
    env_kwargs: EnvKwargs = dataclasses.field(default_factory=dict)
    """Keyword arguments of the environment, as a JSON object."""
    steps: int = 300
    """How many steps of four environments to compare."""


@dataclasses.dataclass(frozen=True)
class VerifyResume(Train):
    """Train a little with these settings, once in one go and once interrupted and resumed, and compare every bit."""

    iterations: int = 6
    """How many; the interruption comes after half of them."""
    # what the verification itself decides
    total_timesteps: Annotated[int | None, tyro.conf.Suppress] = None
    target_return: Annotated[float | None, tyro.conf.Suppress] = None
    run_dir: Annotated[Path | None, tyro.conf.Suppress] = None
    checkpoint_every: Annotated[int | None, tyro.conf.Suppress] = None
    checkpoint_minutes: Annotated[float, tyro.conf.Suppress] = 0.0
    resume: Annotated[Literal["never", "auto"], tyro.conf.Suppress] = "never"


@dataclasses.dataclass(frozen=True)
class Doctor:
    """Say what this machine has and what auto chooses on it, and try whether training works here."""

    env_id: str = "CartPole-v1"
    """What is trained for some seconds."""
    seconds: float = 5.0
    """For how long."""


_Settings = TypeVar("_Settings", bound=Train)


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
        command = tyro.cli(
            Annotated[Train, tyro.conf.subcommand("train", default=_defaults(Train, given))]
            | Annotated[Bench, tyro.conf.subcommand("bench", default=_defaults(Bench, given))]
            | Annotated[Resume, tyro.conf.subcommand("resume")]
            | Annotated[Eval, tyro.conf.subcommand("eval")]
            | Annotated[Doctor, tyro.conf.subcommand("doctor")]
            | Annotated[VerifyEnv, tyro.conf.subcommand("verify-env")]
            | Annotated[VerifyResume, tyro.conf.subcommand("verify-resume", default=_defaults(VerifyResume, given))]
            | Annotated[Replay, tyro.conf.subcommand("replay")],
            prog="fastppo",
            description="A vectorised, high-throughput PPO trainer.",
            args=_spell_out_switches(given),
        )
        run: Callable[[Any], int] = _COMMANDS[type(command)]
        return run(command)
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
            found = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
            if kind is Bench:  # which measures several of these
                found |= {"n_envs": (config.n_envs,)} if config.n_envs else {"n_envs": Bench.n_envs}
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


def _train(command: Train) -> int:
    config = command.settings()  # before torch is imported: mistakes answer at once
    from fastppo.resuming import continue_run, resumable_run
    from fastppo.trainer import Trainer

    run = resumable_run(config) if config.resume == "auto" else None
    if run is not None:
        return _run(lambda console: continue_run(config, run, console))
    return _run(lambda console: Trainer(config, console=console))


def _resume(command: Resume) -> int:
    if command.total_timesteps is not None and command.total_timesteps < 1:
        raise ConfigError(f"total_timesteps={command.total_timesteps} must be at least 1.")
    from fastppo.resuming import resume

    return _run(
        lambda console: resume(
            command.run,
            total_timesteps=command.total_timesteps,
            console=console,
            allow_import=command.allow_import,
        )
    )


def _run(make: Callable[[Console], Trainer]) -> int:
    """Make a trainer and run it, under signals that stop it at the end of an iteration."""
    from fastppo.runtime.distributed import is_main_process
    from fastppo.runtime.signals import StopSignals

    console = _console()
    console.quiet = not is_main_process()
    with StopSignals() as signals:
        try:
            trainer = make(console)
        except FinishedError as error:
            console.print(str(error), highlight=False, markup=False, soft_wrap=True)
            return 0
        settings = "  ".join(f"{key}={value}" for key, value in trainer.config.to_dict().items() if value is not None)
        console.print(f"{settings}\n", highlight=False, markup=False)
        result = trainer.run(signals)
    _print_result(console, result, trainer.config)
    if result.unsaved is not None:
        print(f"error: {result.unsaved}", file=sys.stderr)
        return 1
    return signals.exit_status if result.ended == "interrupted" else 0


def _print_result(console: Console, result: Result, config: Config) -> None:
    from rich.table import Table

    saved = "all is saved" if result.unsaved is None else "not all is saved"
    endings = {"target": f"target of {config.target_return} reached", "interrupted": f"interrupted; {saved}"}
    table = Table(
        title=f"{config.env_id}: {endings.get(result.ended, result.ended)}", title_justify="left", show_header=False
    )
    table.add_row("mean return", f"{result.mean_return:.2f} (last 100 of {result.episodes:,} episodes)")
    table.add_row("steps", f"{result.global_step:,} in {result.seconds:.1f} s, {result.iterations:,} iterations")
    table.add_row("steps per second", f"{result.sps_steady:,.0f} steady, {result.sps_total:,.0f} total")
    whole = sum(result.phases.values()) or 1.0
    shares = sorted(((name, s / whole) for name, s in result.phases.items()), key=lambda item: -item[1])
    table.add_row("time went to", "  ".join(f"{name} {share:.0%}" for name, share in shares if share >= 0.005))
    compiled = (
        f"{result.compilations} functions in {result.compile_seconds:.1f} s" if result.compilations else "nothing"
    )
    table.add_row("threads", f"{config.threads} of torch; compiled {compiled}")
    table.add_row("run folder", str(result.run_dir))
    console.print(table)
    if result.ended == "interrupted":
        console.print(f"go on:   {_program('fastppo')} resume {result.run_dir}", highlight=False, soft_wrap=True)
    console.print(f"curves:  {_program('tensorboard')} --logdir {result.run_dir}", highlight=False, soft_wrap=True)
    console.print(
        f"play:    {_program('fastppo')} eval {result.run_dir} --episodes 20", highlight=False, soft_wrap=True
    )


def _bench(command: Bench) -> int:
    configs = command.points()
    from fastppo import bench, bench_report
    from fastppo.envs.choose import env_key, remember
    from fastppo.envs.registry import probe
    from fastppo.run_dir import create_run_dir, surroundings
    from fastppo.runtime.device import choose_device, machine_name

    env_name = probe(command.env_id, command.env_kwargs).name  # mistakes answer here, not once for each point
    about = surroundings(choose_device(command.device))
    folder = create_run_dir(command.run_dir, env_name, command.name, command.seed)
    console, points = _console(), list[bench.Point]()
    try:
        for point in _measured(configs, command.seconds, console):
            points.append(point)
            # after each, so that Ctrl-C leaves what was measured
            page = bench_report.write_files(folder, env_name, points, about)
    finally:
        if not points:
            folder.rmdir()
    for table in bench_report.tables(points):
        console.print(table)
    for point in points:
        console.print(f"n_envs {point.n_envs}, {point.vectorization}: {bench.verdict(point, points)}", highlight=False)
    best = bench.best_by_n_envs(points)
    if not best:
        return 1
    fastest = max(best.values(), key=lambda p: p.sps)
    console.print(
        f"\nfastest: n_envs {fastest.n_envs}, {fastest.vectorization}: {fastest.sps:,.0f} steps/s. More environments "
        "also mean fewer updates for the same steps: compare returns before you take the largest.",
        highlight=False,
    )
    if command.save:
        for point in best.values():
            saved = remember(env_key(env_name, command.env_kwargs), machine_name(), point.n_envs, point.choice())
        console.print(f"saved:   {saved}, for train --vectorization auto", highlight=False, soft_wrap=True)
    console.print(f"page:    {page}", highlight=False, soft_wrap=True)
    return 0


def _measured(configs: Sequence[Config], seconds: float, console: Console) -> Iterator[Point]:
    """Each point as it is measured, with a line of progress."""
    from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    from fastppo.bench import run_points

    columns = SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn()
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("")
        for i, config in enumerate(configs):
            which = f"{i + 1} of {len(configs)}: n_envs {config.n_envs}, {config.vectorization}"
            progress.update(task, description=f"{which}; about {seconds * 1.5 + 12:.0f} s")
            (point,) = run_points([config], seconds)
            result = f"failed: {point.failure}" if point.failure else f"{point.sps:,.0f} steps/s"
            progress.console.print(f"{which}: {result}", highlight=False, soft_wrap=True)
            yield point


def _doctor(command: Doctor) -> int:
    if not 0 < command.seconds < math.inf:
        raise ConfigError(f"seconds={command.seconds} must be more than 0; 5 is enough.")
    from fastppo.doctor import examine

    return _print_findings(examine(command.env_id, command.seconds), "everything essential works here")


def _print_findings(findings: Iterable[Finding], good: str) -> int:
    """A line for each as it is found; exit status 1 if one is bad."""
    from rich.markup import escape

    console, bad = _console(), 0
    colours = {"ok": "green", "note": "yellow", "bad": "red"}
    for finding in findings:
        bad += finding.state == "bad"
        advice = f"\n{'':22}{finding.advice}" if finding.advice else ""
        text = f"{finding.name:<16} {finding.value}{advice}"
        console.print(
            f"[{colours[finding.state]}]{finding.state:<4}[/] {escape(text)}", highlight=False, soft_wrap=True
        )
    console.print("something is wrong, see above" if bad else good)
    return 1 if bad else 0


def _program(name: str) -> str:
    """How to call a program of this environment from here: by name, if the shell finds it, else by path."""
    path = Path(sys.executable).with_name(name)
    found = shutil.which(name)
    return name if found and Path(found) == path else os.path.relpath(path)


def _replay(command: Replay) -> int:
    from fastppo.replay import replay

    found, console = replay(command.capsule), _console()
    bad = found.first_bad
    if bad is None:
        console.print(
            f"all numbers of all {found.minibatches} minibatches are finite here, on the CPU", highlight=False
        )
        return 0
    where = f"epoch {found.epoch}, minibatch {found.minibatch}"
    console.print(
        f"first not finite: {bad.name} {list(bad.shape)}, {bad.bad} numbers of it, first at {list(bad.first)}; {where}",
        highlight=False,
        markup=False,
        soft_wrap=True,
    )
    for finding in found.findings:
        state = f"{finding.bad} not finite" if finding.bad else "finite"
        text = f"{finding.name:<48} {state:<18} largest {finding.largest:.3g}"
        console.print(text, highlight=False, markup=False, soft_wrap=True)
    return 1


def _verify_env(command: VerifyEnv) -> int:
    if command.steps < 1:
        raise ConfigError(f"steps={command.steps} must be at least 1.")
    from fastppo.verify import verify_env

    return _print_findings(
        verify_env(command.env_id, command.env_kwargs, command.steps), "this environment keeps its promises"
    )


def _verify_resume(command: VerifyResume) -> int:
    if command.iterations < 2:
        raise ConfigError(f"iterations={command.iterations} must be at least 2, to be interrupted between.")
    config = command.settings()
    from fastppo.verify import verify_resume

    return _print_findings(verify_resume(config, command.iterations), "a resumed run is the same run")


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
        best=command.best,
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


_COMMANDS: dict[type, Any] = {
    Train: _train,
    Resume: _resume,
    Bench: _bench,
    Eval: _eval,
    Doctor: _doctor,
    VerifyEnv: _verify_env,
    VerifyResume: _verify_resume,
    Replay: _replay,
}
