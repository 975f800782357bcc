"""Export of a policy to one file that needs no fastppo: raw observations in, the environment's actions out.

A file takes and returns tensors in this order, each with a batch of any size B in front:

    inputs   obs                 an observation that is one array [B, *obs], in the dtype in which it is stored;
             or PATH, ...        each array of a Dict or Tuple observation [B, *array] in its space's dtype, under its
                                 path ("camera", "camera/left"), without those that only the critic reads
             action_mask         [B, A] bool, the allowed actions; if the policy was trained with masks
             state_0, ...        [B, ...] each, the memory before this step; if the policy has one
             episode_start       [B] bool, an episode starts at this step: the states count as those of a new episode
    outputs  actions             [B, *action], the most probable ones, as the environment takes them
             params              [B, P] float32, parameters of the distribution; forbidden actions have logits of -1e8
             values              [B] float32; left out if the critic reads arrays of its own, as are its states
             next_state_0, ...   [B, ...] each, the memory after this step

An ONNX file has these names; a path that is also one of the other names gets "obs/" in front. A pt2 file goes by order.
"""

from __future__ import annotations

import io
import logging
import warnings
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn

from fastppo.config import as_path
from fastppo.errors import ConfigError, first_line
from fastppo.evaluation.saved_policy import load_policy
from fastppo.policies.memory import RecurrentNetwork
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.run_dir import check_output
from fastppo.runtime.files import replace_file
from fastppo.spaces.actions import ToEnv
from fastppo.spaces.leaves import ObsLeaf
from fastppo.spaces.observations import blank_array
from fastppo.spaces.packing import MASK_KEY

Format = Literal["onnx", "pt2"]
_OBS, _START = "obs", "episode_start"


class Port(NamedTuple):
    """An input or output of an exported policy.

    Attributes:
        name: in an ONNX file; a pt2 file takes and returns its tensors in order, without names.
        dtype: NumPy name of its dtype.
        shape: without the batch.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]


class Signature(NamedTuple):
    """The inputs and outputs of an exported policy, in order."""

    inputs: tuple[Port, ...]
    outputs: tuple[Port, ...]


class ExportedPolicy(nn.Module):
    """A policy's most probable actions, with observation normaliser and conversion to the action space.

    Attributes:
        signature: what `forward` takes and returns.
    """

    def __init__(self, policy: Policy, spec: PolicySpec) -> None:
        """Wrap `policy`, which `spec` describes."""
        super().__init__()
        self.policy = policy
        self._spec = spec
        self._dtype: torch.dtype = getattr(torch, spec.action.dtype)
        self.to_env = ToEnv(spec.action)
        self._has_values = not any(leaf.critic_only for leaf in spec.obs.leaves)
        # without its inputs, a critic has neither values nor a memory; which states are its own in a network of the
        # user's is unknown
        network, self._n_critic_states = policy.network, 0
        if isinstance(network, RecurrentNetwork) and not self._has_values:
            self._n_critic_states = network.n_critic_states
        self.signature = self._describe()

    def _describe(self) -> Signature:
        action, state = self._spec.action, self.policy.initial_state(1)[self._n_critic_states :]
        states = [
            Port(f"state_{i}", str(x.dtype).removeprefix("torch."), tuple(x.shape[1:])) for i, x in enumerate(state)
        ]
        outputs = [
            Port("actions", action.dtype, action.shape),
            Port("params", "float32", (self.policy.distribution.n_params,)),
            *([Port("values", "float32", ())] if self._has_values else []),
            *(port._replace(name=f"next_{port.name}") for port in states),
        ]
        others = [*states, *([Port(_START, "bool", ())] if self.policy.has_memory else [])]
        taken = {port.name for port in (*others, *outputs)} | {MASK_KEY}
        arrays = [_port(leaf, taken) for leaf in self._spec.obs.leaves if not leaf.critic_only]
        return Signature((*arrays, *others), tuple(outputs))

    def forward(self, obs: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs that `signature` lists for its inputs; `obs` is the observation's first array."""
        given, n = iter((obs, *others)), obs.shape[0]
        for x in others:  # otherwise the trace holds a division of batch sizes, which admits some of them only
            torch._check(x.shape[0] == n)  # type: ignore[no-untyped-call]
        arrays = []
        for leaf in self._spec.obs.leaves:
            x = blank_array(leaf).expand(n, *leaf.shape).to(obs.device) if leaf.critic_only else next(given)
            arrays.append(x.to(getattr(torch, leaf.stored_as)))
        state, starts = list(given), None
        if self.policy.has_memory:
            starts = state.pop()
            unused = self.policy.initial_state(n)[: self._n_critic_states] if self._n_critic_states else ()
            state = [*unused, *state]
        params, values, after = self.policy.read(tuple(arrays), tuple(state), starts)
        actions = self.to_env(self.policy.distribution.mode(params)).reshape(-1, *self._spec.action.shape)
        results = (actions.to(self._dtype), params, *((values,) if self._has_values else ()))
        return *results, *after[self._n_critic_states :]

    def example(self, n: int) -> tuple[Tensor, ...]:
        """Return inputs for `n` observations that any policy can read."""
        leaves = [leaf for leaf in self._spec.obs.leaves if not leaf.critic_only]
        arrays = [blank_array(leaf).expand(n, *leaf.shape) for leaf in leaves]
        rest = [torch.zeros(n, *port.shape) for port in self.signature.inputs[len(leaves) :]]
        ports = zip((*arrays, *rest), self.signature.inputs, strict=True)
        return tuple(x.to(getattr(torch, port.dtype)) for x, port in ports)


def _port(leaf: ObsLeaf, taken: set[str]) -> Port:
    """Describe the input for an array of the observation, under a name that is not `taken`."""
    if leaf.kind == "mask":
        return Port(MASK_KEY, "bool", leaf.shape)
    name = leaf.name or _OBS
    while name in taken:
        name = f"{_OBS}/{name}"
    taken.add(name)
    # a single array is taken as it is stored, as it was before there were others
    return Port(name, leaf.source_dtype if leaf.path else leaf.stored_as, leaf.shape)


def export(run: Path | str, output: Path | str | None, kind: Format, policy: nn.Module | None = None) -> Path:
    """Write the policy of `run` to one file and return its path; arguments and errors as for `export_policy`."""
    return export_policy(run, output, kind, policy)[0]


def export_policy(
    run: Path | str, output: Path | str | None, kind: Format, policy: nn.Module | None = None
) -> tuple[Path, Signature]:
    """Write the policy of `run` to one file, and return its path and the file's inputs and outputs.

    Args:
        run: the run folder, or one of its checkpoints.
        output: the file; None: RUN/policy.onnx or RUN/policy.pt2.
        kind: "onnx", or "pt2" for torch.export's format.
        policy: your own network; needed if the run trained one.

    Raises:
        CheckpointError: there is no saved model.
        ConfigError: the network can't be exported, the file can't be written or holds a run, or a library is missing.
    """
    if kind not in get_args(Format):
        raise ConfigError(f"export: format={kind!r} must be {' or '.join(get_args(Format))}.")
    saved = load_policy(run, policy)
    module = ExportedPolicy(saved.policy, saved.spec).eval()
    path = as_path(run, "run") / f"policy.{kind}" if output is None else as_path(output, "output")
    check_output(path, "export")
    if kind == "onnx":
        _check_onnx()
    log = logging.getLogger("torch.onnx")
    level = log.level
    try:
        log.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the exporters warn about their own internals
            data = _traced(module, kind)
        replace_file(path, lambda temporary: temporary.write_bytes(data))
    except OSError as error:
        raise ConfigError(f"export: {path} can't be written ({error.strerror or error}).") from None
    except Exception as error:  # torch has many classes for what it can't trace
        raise ConfigError(
            f"export: this network can't be traced ({type(error).__name__}: {first_line(error)})."
        ) from None
    finally:
        log.setLevel(level)
    return path, module.signature


def _traced(module: ExportedPolicy, kind: Format) -> bytes:
    """Trace `module` for any batch size; return the content of the file."""
    example, rows = module.example(2), {0: torch.export.Dim("batch", min=1)}
    shapes = (rows, (rows,) * (len(example) - 1)) if len(example) > 1 else (rows,)
    program = torch.export.export(module, example, dynamic_shapes=shapes)
    if kind == "pt2":
        file = io.BytesIO()
        torch.export.save(program, file)
        return file.getvalue()
    inputs, outputs = ([port.name for port in ports] for ports in module.signature)
    onnx = torch.onnx.export(program, input_names=inputs, output_names=outputs, verbose=False)
    assert onnx is not None
    return bytes(onnx.model_proto.SerializeToString())


def _check_onnx() -> None:
    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ConfigError(f"export to ONNX needs {error.name}: pip install 'fastppo[export]'.") from None
