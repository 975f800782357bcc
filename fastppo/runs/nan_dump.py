"""Dumps of an update with non-finite gradients, so that `fastppo replay` can compute it again elsewhere.

RUN/capsule-0-000123/               of process 0, after iteration 123
    model.safetensors, model.json   the policy after the update (skipped optimiser steps left it unchanged)
    batch.safetensors               the rollout's rows, the order of rows in each epoch, and the coefficients
    capsule.json                    settings and iteration
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor

from fastppo.errors import CheckpointError
from fastppo.functional.losses import Batch, Coefficients
from fastppo.policies.policy_spec import PolicySpec
from fastppo.ppo.update import PPOUpdate
from fastppo.runs.model_files import model_files
from fastppo.runs.state_files import FORMAT, Stateful, check_format, read_json, read_tensors, snapshot, write_files


class NanDump(NamedTuple):
    """The content of a dump, without the policy.

    Attributes:
        batch: all rows of the rollout.
        orders: [E, M, B] row indices of each minibatch of each epoch.
        coefs: the coefficients of the update.
        metadata: settings of the update, and the iteration.
    """

    batch: Batch
    orders: Tensor
    coefs: Coefficients
    metadata: dict[str, Any]


def save_nan_dump(
    folder: Path,
    spec: PolicySpec,
    models: Mapping[str, Stateful],
    batch: Batch,
    coefs: Coefficients,
    *,
    update: PPOUpdate,
    metadata: Mapping[str, Any],
) -> None:
    """Write a dump into `folder`; `metadata` joins the settings of `update` in capsule.json."""
    folder.mkdir(parents=True, exist_ok=True)
    fields = {name: x for name, x in batch._asdict().items() if isinstance(x, Tensor)}
    fields |= {f"states.{i}": x for i, x in enumerate(batch.states)}
    tensors = {name: x.detach().cpu().contiguous() for name, x in fields.items()}
    tensors["orders"] = update.shuffle.orders.cpu().contiguous()
    tensors |= {f"coefs.{name}": x.cpu().clone() for name, x in coefs._asdict().items()}
    settings = {**vars(update.loss), "normalize": update.normalize, "segment_length": update.shuffle.segment_length}
    text = json.dumps({"format": FORMAT, **settings, **metadata}, indent=2)
    files = model_files(snapshot(models), spec, {})
    files |= {"batch.safetensors": safetensors.torch.save(tensors), "capsule.json": text.encode()}
    write_files(folder, files)


def read_nan_dump(folder: Path) -> NanDump:
    """Read the dump in `folder`.

    Raises:
        CheckpointError: there is none, or it can't be understood.
    """
    metadata = read_json(folder / "capsule.json")
    tensors = read_tensors(folder / "batch.safetensors")
    try:
        check_format(folder, metadata)
        if missing := {"value_clip", "normalize"} - metadata.keys():
            raise KeyError(min(missing))
        states = tuple(tensors[f"states.{i}"] for i in range(sum(name.startswith("states.") for name in tensors)))
        fields = {name: tensors.get(name) for name in Batch._fields if name != "states"}
        batch = Batch(**fields, states=states)  # type: ignore[arg-type]
        tensors.setdefault("coefs.kl_coef", torch.zeros(()))  # dumps of earlier versions have none
        coefs = Coefficients(*(tensors[f"coefs.{name}"] for name in Coefficients._fields))
        return NanDump(batch, tensors["orders"], coefs, dict(metadata))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder} can't be understood ({type(error).__name__}: {error}).") from None
