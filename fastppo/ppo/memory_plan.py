"""Plan the memory of a training run before allocating it.

Rollout, advantages and one minibatch run on fake tensors (shapes without contents); the plan is the peak of bytes alive
at once. CUDA graphs hold the memory of their temporary tensors between replays, so eager work beside them adds to it.
Memory of the environments themselves is not included.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastppo.envs.vec_env import FinalObsBuffer
from fastppo.errors import ConfigError
from fastppo.functional.gae import Gae
from fastppo.functional.losses import Coefficients
from fastppo.ppo.curiosity import Curiosity
from fastppo.ppo.minibatches import Minibatch
from fastppo.ppo.rollout import Rollout
from fastppo.ppo.update import PPOUpdate
from fastppo.spaces.actions import ActionSpec
from fastppo.spaces.observations import ObsSpec

# Bytes per row of episode statistics: three float32 on the host, five 8-byte arrays
_STATISTICS = 3 * 4 + 5 * 8
_GIB = 2**30


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """Planned bytes.

    Attributes:
        storage: the rollout, for the whole run.
        staging: buffers that environments write into.
        update: peak of advantages, update or statistics, in addition to storage.
    """

    storage: int
    staging: int
    update: int

    @property
    def total(self) -> int:
        """Bytes at the peak."""
        return self.storage + self.staging + self.update

    def __str__(self) -> str:
        """Return the plan in GiB."""
        parts = ", ".join(f"{name} {getattr(self, name) / _GIB:.2f}" for name in ("storage", "staging", "update"))
        return f"{self.total / _GIB:.2f} GiB ({parts})"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The properties of N environments that determine storage; stands in for a VecEnv before it is made."""

    n_envs: int
    obs_spec: ObsSpec
    action_spec: ActionSpec
    fillers: bool = True
    max_steps: int | None = None  # for environments on the device, which keep the final observations of a whole rollout


def plan_memory(
    n_steps: int,
    env: Shape,
    make_update: Callable[[], PPOUpdate],
    gae: Gae,
    *,
    graphs: bool = False,
    gradients: bool = False,
    fused: bool = False,
    programs: int = 0,
    curiosity: Callable[[Rollout], Curiosity | None] = lambda _: None,
) -> MemoryPlan:
    """Plan the memory of an iteration of `n_steps` steps in `env`.

    Args:
        n_steps: T.
        env: the planned environments.
        make_update: makes the update, on an existing policy and parameters.
        gae: the kernel that computes advantages.
        graphs: the update is captured as CUDA graphs, which share a memory pool.
        gradients: a sampled update also computes the gradient of one minibatch, eagerly.
        fused: C or kernels compute the gradient, from the encoded observations of a whole rollout.
        programs: of each kernel, which have sums of their own; 0: no kernel computes the gradient.
        curiosity: makes what rewards new observations, on existing networks; None: nothing does.
    """
    staging = 3 * env.n_envs * torch.Size(env.obs_spec.shape).numel() * 8
    # in this thread alone: on CUDA, autograd has a thread for each device, which knows no modes
    with torch.autograd.set_multithreading_enabled(False), FakeTensorMode(allow_non_fake_inputs=True), _Live() as live:
        update = make_update()
        device, before = update.parameters.vector.device, live.bytes
        rollout = Rollout.allocate(n_steps, env, update.policy, device)  # type: ignore[arg-type]
        cuts = None
        if env.max_steps is not None:
            cuts = FinalObsBuffer.allocate(n_steps, env.n_envs, env.obs_spec, env.max_steps, device)
        storage = live.bytes - before
        curious = curiosity(rollout)
        coefs = Coefficients(*(torch.zeros((), device=device) for _ in Coefficients._fields))
        r = rollout
        gae(r.trajectory(r.rewards), coefs.gamma, coefs.gae_lambda)
        batch = rollout.batch()
        data = update.pack(batch)
        update.shuffle.allocate(len(batch.logprobs))
        update.scales(batch)
        packed = list[Tensor]()
        if fused:
            encoded = update.policy.encoder(batch.obs)
            packed.append(torch.empty_like(encoded))
            del encoded
        packed.append(torch.empty(programs, update.parameters.size + len(update.loss.diagnostics) + 1, device=device))
        peaks = [live.take_peak()]
        order = torch.zeros(len(batch.logprobs), dtype=torch.int64, device=device)
        length = update.shuffle.segment_length
        rows = order[: max(1, len(order) // length // update.shuffle.n_minibatches) * length]
        update.step(Minibatch(rollout.advantages.new_zeros(2), rows, data), coefs)
        peaks += [live.take_peak()] * (1 + gradients)
        if curious is not None:
            curious.advantages(gae, coefs.gae_lambda)
            peaks.append(live.take_peak())
            curious.step(rows, coefs)
            peaks.append(live.take_peak())
        update.policy.encoder.update_moments(batch.obs, None)  # works on a float64 copy of the observations
        peaks.append(live.take_peak())
        if cuts is not None:
            obs = cuts.obs.flatten(0, 1)  # cuts count as storage, so they live until here
            update.policy.value(obs, update.policy.initial_state(len(obs)))
        rollout_peak, resting = live.take_peak(), live.bytes  # with the packed batch and the optimiser's state
    statistics = n_steps * env.n_envs * _STATISTICS
    if not graphs:
        return MemoryPlan(storage, staging, max(max(*peaks, rollout_peak) - storage, statistics))
    # one part runs eagerly, to warm up or uncaptured, while the pool holds the temporary tensors of another; the graph
    # of a rollout has a pool of its own
    second, first = sorted((*(peak - resting for peak in peaks), statistics))[-2:]
    return MemoryPlan(storage, staging, first + second + rollout_peak - storage)


def check_memory(plan: Callable[[int], MemoryPlan], n_envs: int, n_steps: int, free: int) -> MemoryPlan:
    """Return the plan for `n_envs`, checked against `free` bytes.

    Raises:
        ConfigError: the plan doesn't fit; the message names an n_envs that does.
    """
    wanted = plan(n_envs)
    if wanted.total <= free:
        return wanted
    # memory is nearly linear in n_envs: interpolate, then correct
    least = plan(1)
    fits = int((free - least.total) / (wanted.total - least.total) * (n_envs - 1)) + 1 if free >= least.total else 0
    while fits and plan(fits).total > free:
        fits = int(fits * 0.98)
    way_out = f"n_envs={fits} fits" if fits else "no n_envs fits; use fewer n_steps"
    raise ConfigError(
        f"n_envs={n_envs} with n_steps={n_steps} needs {wanted} of memory beside the environments' own, and "
        f"{free / _GIB:.2f} GiB are free here; {way_out}."
    )


class _Live(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the live bytes of tensors made while the mode is active.

    Attributes:
        bytes: live bytes.
        highest: their peak since the last `take_peak`.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes = self.highest = 0
        self._known: set[int] = set()

    def take_peak(self) -> int:
        """Return the peak and begin to measure the next one."""
        peak, self.highest = self.highest, self.bytes
        return peak

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:  # noqa: ANN401 - what func returns
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                self._hold(x.untyped_storage())
        return out

    def _hold(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known:
            return
        self._known.add(key)
        self.bytes += storage.nbytes()
        self.highest = max(self.highest, self.bytes)
        weakref.finalize(storage, self._drop, key, storage.nbytes())

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.bytes -= size
