"""What the file of an algorithm holds: its models, the optimiser's state, and plain facts about it."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Self

import torch
from torch import nn

from fastppo.compat.archive import unpacked, write_archive
from fastppo.errors import CheckpointError, ConfigError, with_article
from fastppo.evaluation.saved_policy import load_policy
from fastppo.policies.normalizers import RewardNormalizer
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.model_files import load_model, model_files
from fastppo.runs.state_files import Stateful, StateSnapshot, read_state, snapshot, state_files

# the policy and, if rewards are normalised, their normaliser: "policy", "rewards"
Models = dict[str, nn.Module]


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a file says of an algorithm, in the types of JSON.

    Attributes:
        algorithm: name of its class.
        settings: of fastppo.
        n_envs: environments.
        functions: keywords that followed a function, which the file doesn't hold.
        num_timesteps: environment steps so far.
        trainings: trainings so far.
        verbose: the constructor's keyword.
        tensorboard_log: the constructor's keyword.
    """

    algorithm: str
    settings: dict[str, Any]
    n_envs: int
    functions: tuple[str, ...]
    num_timesteps: int
    trainings: int
    verbose: int
    tensorboard_log: str | None

    @classmethod
    def read(cls, about: Mapping[str, Any]) -> Self:
        """Return the facts of a file from its JSON.

        Raises:
            KeyError, TypeError: one is missing, or something else.
        """
        return cls(
            algorithm=about["algorithm"],
            settings=dict(about["settings"]),
            n_envs=int(about["n_envs"]),
            functions=tuple(about["functions"]),
            num_timesteps=int(about["num_timesteps"]),
            trainings=int(about["trainings"]),
            verbose=about["verbose"],
            tensorboard_log=about["tensorboard_log"],
        )


def write_model(
    path: str | Path | IO[bytes],
    facts: Facts,
    spec: PolicySpec,
    models: Models,
    optimizer: StateSnapshot | None,
) -> None:
    """Write a file, which replaces an earlier one whole.

    Raises:
        ConfigError: it can't be written.
    """
    modules: dict[str, Stateful] = dict(models)
    files = model_files(snapshot(modules), spec, {"global_step": facts.num_timesteps})
    files |= state_files(0, optimizer or StateSnapshot({}, {}), dataclasses.asdict(facts))
    try:
        write_archive(path, files)
    except OSError as error:
        raise ConfigError(f"save: {path} can't be written ({error.strerror or error}).") from None


@contextlib.contextmanager
def opened(path: str | Path | IO[bytes], algorithm: str) -> Iterator[tuple[Path, dict[str, Any], StateSnapshot | None]]:
    """Give what a file of `algorithm` holds: a folder with the models, the facts as JSON, and the optimiser's state.

    Raises:
        CheckpointError: there is no such file, or it holds something else.
    """
    with unpacked(path) as folder:
        state, about = read_state(folder, 0) or (None, {})
        if about.get("algorithm") != algorithm or state is None:
            held = with_article(str(about["algorithm"])) if "algorithm" in about else "no model of fastppo.compat"
            raise CheckpointError(f"{path} holds {held}, not {with_article(algorithm)}.")
        yield folder, about, state if state.values else None


def read_models(folder: Path, device: torch.device, rewards: RewardNormalizer | None) -> tuple[PolicySpec, Models]:
    """Return the spec of the policy and the modules of an unpacked file.

    Args:
        folder: the unpacked file.
        device: of the policy.
        rewards: takes the state of the rewards' normaliser; None: rewards are not normalised.

    Raises:
        CheckpointError: the models can't be read.
    """
    saved = load_policy(folder, device=str(device))
    models: Models = {"policy": saved.policy}
    if rewards is not None:
        load_model(folder, {"rewards": rewards})
        models["rewards"] = rewards
    return saved.spec, models
