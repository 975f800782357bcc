"""What led to gradients that are not finite, kept so that it can be run again elsewhere.

RUN/capsule-0-000123/     of process 0, after iteration 123
    model.safetensors, model.json   the policy after the update; steps that were left out have changed nothing
    batch.safetensors               the rollout's rows, and the order of each epoch
    capsule.json                    coefficients, settings, iteration
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
from torch import Tensor

from fastppo.errors import CheckpointError
from fastppo.functional.losses import Batch, Coefficients
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo.update import PPOUpdate
from fastppo.runs.checkpoint import FORMAT, Stateful, model_files, read_json, read_tensors, snapshot, write_files


class NanDump(NamedTuple):
    """What a capsule holds beside the policy.

    Attributes:
        batch: all rows.
        orders: [E, M, B] which of them each minibatch of each epoch took.
        coefs: as they were.
        about: settings of the update, and the iteration.
    """

    batch: Batch
    orders: Tensor
    coefs: Coefficients
    about: dict[str, Any]


def save_nan_dump(
    folder: Path,
    spec: PolicySpec,
    models: Mapping[str, Stateful],
    batch: Batch,
    coefs: Coefficients,
    update: PPOUpdate,
    about: Mapping[str, Any],
) -> None:
    """Write a capsule; `about` goes into capsule.json beside the settings of `update`."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {name: x.detach().cpu().contiguous() for name, x in batch._asdict().items() if x is not None}
    tensors["orders"] = update.orders.cpu().contiguous()
    tensors |= {f"coefs.{name}": x.cpu().clone() for name, x in coefs._asdict().items()}
    settings = {**vars(update.loss), "normalize": update.normalize}
    text = json.dumps({"format": FORMAT, **settings, **about}, indent=2)
    files = model_files(snapshot(models), spec, {})
    files |= {"batch.safetensors": safetensors.torch.save(tensors), "capsule.json": text.encode()}
    write_files(folder, files)


def read_nan_dump(folder: Path) -> NanDump:
    """Read one.

    Raises:
        CheckpointError: there is none, or it can't be understood.
    """
    about = read_json(folder / "capsule.json")
    tensors = read_tensors(folder / "batch.safetensors")
    try:
        if about["format"] != FORMAT:
            raise CheckpointError(f"{folder} has format {about['format']!r}; this version reads format {FORMAT}.")
        about["value_clip"], about["normalize"]
        coefs = Coefficients(*(tensors[f"coefs.{name}"] for name in Coefficients._fields))
        orders = tensors["orders"]
        return NanDump(Batch(**{name: tensors.get(name) for name in Batch._fields}), orders, coefs, dict(about))  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be understood ({type(error).__name__}: {error}).") from None
