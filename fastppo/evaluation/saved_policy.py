"""A saved policy without its trainer: actions, evaluation, videos."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastppo.config import Config, as_path
from fastppo.envs.make_envs import EnvInfo, Maker, make_vec_env
from fastppo.errors import CheckpointError, ConfigError, EnvError, kind_of
from fastppo.evaluation.episodes import EpisodePlayer, Evaluation, begin_episode
from fastppo.evaluation.video import Video, VideoRecorder, check_video_name, choose_renderers
from fastppo.policies.policy import Policy, PolicyState
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.checkpoint import best_checkpoint, verify_checkpoint
from fastppo.runs.inspect_env import inspect_configured
from fastppo.runs.model_files import load_model, read_spec, weights_file
from fastppo.runs.open_run import open_run
from fastppo.runtime.device import choose_device
from fastppo.runtime.seeding import generator, seed_stream
from fastppo.spaces.packing import MASK_KEY, find

_NO_ROWS = "obs is empty; give at least one observation."


class SavedPolicy:
    """A policy from a run folder, observation normaliser included.

    Attributes:
        spec: its observation and action spaces, network and distribution.
        policy: encoder, network, distribution.
        device: device of the policy.
    """

    def __init__(self, spec: PolicySpec, policy: Policy, device: torch.device, seed: int = 0) -> None:
        """Wrap `policy`, which is on `device`; `seed` is for sampled actions."""
        self.spec = spec
        self.policy = policy
        self.device = device
        self._generator = generator(seed, "noise", device)

    def predict(
        self,
        obs: Any,  # noqa: ANN401 - array-like, or a tree of them
        state: PolicyState | None = None,
        episode_start: Any = None,  # noqa: ANN401 - array-like
        deterministic: bool = True,
        *,
        action_mask: Any = None,  # noqa: ANN401 - array-like
    ) -> tuple[np.ndarray[Any, Any], PolicyState]:
        """Return the action for one observation, or the actions for a batch, and the policy's next state.

        Args:
            obs: raw observations as the environment returns them, [*obs] or [B, *obs]; a dict or tuple of arrays where
                the space is, of which those of the critic alone aren't read.
            state: the state that the last call returned; None: that of new episodes. `()` without memory.
            episode_start: whether an episode starts here, a bool or [B]; None: only where `state` is None.
            deterministic: take the most probable action; otherwise sample.
            action_mask: the allowed actions, [A] or [B, A]; None: under the key `action_mask` of obs, or all.

        Returns:
            Actions as the environment takes them (clipped to its bounds), [*action] or [B, *action], and the state.

        Raises:
            ValueError: `obs` lacks a part, has another shape, holds a NaN, an infinity or anything but numbers, a
                discrete one is outside its space, a mask has the wrong size or allows no action, `state` or
                `episode_start` is of another batch or policy, or `state` holds a NaN or, of
                fastppo's own memories, an infinity.
        """
        rows, single = self._rows(obs, action_mask)
        if not self.spec.obs.finite(rows).all():
            raise ValueError("obs holds a NaN or an infinity, for which there is no action; replace such values.")
        self._check_choice(rows)
        n = len(rows)
        starts = self._starts(episode_start, n, new=state is None)
        state = self._checked_state(state, n)
        noise = None if deterministic else self.policy.draw_noise(n, self._generator)
        step = self.policy.act(rows, noise, state, starts)
        out = self.spec.action.to_env(step.actions.numpy(force=True))
        return (out[0] if single else out), step.state

    def _starts(self, episode_start: Any, n: int, *, new: bool) -> Tensor:  # noqa: ANN401 - array-like
        """Return where an episode starts, [B]: where `episode_start` says so, or everywhere if the state is `new`."""
        starts = torch.full((n,), new, device=self.device)
        if episode_start is None:
            return starts
        given = _as_array(episode_start, "episode_start")
        if given.shape not in ((), (n,)):
            raise ValueError(f"episode_start has shape {given.shape}, but obs holds {n}; give a bool or ({n},).")
        if not (valid := np.isin(given, (0, 1))).all():
            raise ValueError(f"episode_start holds {given[~valid][0]}; give True where an episode starts, else False.")
        return starts | torch.as_tensor(given.astype(bool)).to(self.device)

    def _checked_state(self, state: PolicyState | None, n: int) -> PolicyState:
        """Return `state` as tensors like those of this policy for `n` episodes; None: that of new episodes."""
        initial = self.policy.initial_state(n)
        if state is None:
            return initial
        state = _as_state(state, initial)
        if any(part.dim() and len(part) != n for part in state):
            raise ValueError(f"state is of {len(state[0])} episodes, but obs holds {n}; leave it out for new episodes.")
        if [part.shape for part in state] != [part.shape for part in initial]:
            found, wanted = ([tuple(part.shape) for part in parts] for parts in (state, initial))
            raise ValueError(f"state has shapes {found}, that of this policy {wanted}; leave it out for new episodes.")
        if any(part.isnan().any() for part in state):
            raise ValueError("state holds a NaN; leave it out for new episodes.")
        # a network of the user's own may keep an infinity on purpose
        if self.spec.memory != "none" and not all(part.isfinite().all() for part in state):
            raise ValueError("state holds an infinity, which no step returns; leave it out for new episodes.")
        return state

    def _check_choice(self, rows: Tensor) -> None:
        """Check that the masks in stored rows [B, *obs] allow an action.

        Raises:
            ValueError: one allows none.
        """
        allowed = self.spec.obs.allowed(rows)
        if allowed is None:
            return
        for i, part in enumerate(torch.split(allowed, list(self.spec.action.nvec), 1)):
            for row in (~part.any(1)).nonzero().flatten().tolist():
                where = f" of component {i}" if len(self.spec.action.nvec) > 1 else ""
                raise ValueError(f"the action mask in row {row} allows no action{where}; allow one.")

    def _rows(self, obs: Any, mask: Any) -> tuple[Tensor, bool]:  # noqa: ANN401 - trees of arrays
        """Return obs as stored rows [B, *obs], and whether it is a single observation."""
        spec = self.spec.obs
        if mask is not None and not spec.has_mask:
            raise ValueError("this policy was trained without action masks; leave action_mask out.")
        if spec.is_single and not spec.leaf.path:
            array, shape = _as_array(obs, "obs"), spec.shape
            single = array.shape == shape
            if not single and array.shape[1:] != shape:
                raise ValueError(f"obs has shape {array.shape}; this policy takes {shape} or a batch of it.")
            if array.dtype.kind not in "biuf":
                raise ValueError(f"obs is of dtype {array.dtype}; this policy takes real numbers.")
            if not single and not len(array):
                raise ValueError(_NO_ROWS)
            array = array[None] if single else array
            if spec.leaf.kind == "discrete" and (outside := spec.leaf.outside(array)):
                row, value, space = outside
                raise ValueError(f"row {row} of obs is {value}, outside the observation_space {space}.")
            return torch.as_tensor(array).to(self.device, spec.dtype), single
        if isinstance(obs, (list, tuple)) and obs and isinstance(obs[0], Mapping):
            raise ValueError("obs is a list of dicts; give a batch as one dict of arrays [B, ...].")
        try:
            first = _as_array(find(obs, spec.leaves[0]), "obs")
            single = first.ndim <= len(spec.leaves[0].shape)
            n = None if single else len(first)
            if n == 0:
                raise ValueError(_NO_ROWS)
            if mask is None and spec.has_mask and isinstance(obs, Mapping) and MASK_KEY not in obs:
                mask = np.ones((*(() if n is None else (n,)), spec.leaves[-1].size), bool)
            packed = spec.space.pack(obs, mask, n, critic=False)
        except EnvError as error:
            raise ValueError(str(error)) from None
        return torch.from_numpy(packed[None] if single else packed).to(self.device), single


def _as_array(given: Any, name: str) -> np.ndarray[Any, Any]:  # noqa: ANN401 - array-like
    """Return `given` as an array.

    Raises:
        ValueError: its rows differ in length.
    """
    try:
        return np.asarray(given, order="C")
    except ValueError:
        raise ValueError(f"{name} is no array: its rows differ in length or kind.") from None


def _as_state(given: Any, like: PolicyState) -> PolicyState:  # noqa: ANN401 - whatever a caller kept of a state
    """Return a state as tensors of the dtypes and on the device of `like`.

    Raises:
        ValueError: it is no sequence of arrays.
    """
    try:
        parts = [torch.as_tensor(part) for part in given]
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(
            f"state is {kind_of(given)}; give the one that the last call returned, or None for new episodes."
        ) from None
    if len(parts) != len(like):  # of another policy, as its shapes show
        return tuple(parts)
    return tuple(part.to(own.device, own.dtype) for part, own in zip(parts, like, strict=True))


def load_policy(run: Path | str, policy: nn.Module | None = None, device: str = "cpu", seed: int = 0) -> SavedPolicy:
    """Load the policy saved in a run folder or a checkpoint.

    Args:
        run: the folder.
        policy: your own network; needed if the run trained one.
        device: where the policy acts, for example "cpu" or "cuda".
        seed: seed of sampled actions.

    Raises:
        CheckpointError: there is no saved model, or it doesn't fit.
        ConfigError: the run trained your own network and `policy` isn't given, or the other way round.
    """
    folder, torch_device = as_path(run, "run"), choose_device(device)
    spec, _ = read_spec(folder)
    if policy is not None and spec.network != "custom":
        raise ConfigError(f"{folder} holds fastppo's own network, network={spec.network}; leave policy out.")
    size = weights_file(folder).stat().st_size
    try:
        spec.check_size(size)
        built = spec.build(policy).to(torch_device)
    except CheckpointError as error:
        raise CheckpointError(f"{folder}/model.json doesn't fit its weights: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{folder}/model.json can't be understood ({type(error).__name__}: {error}).") from None
    load_model(folder, {"policy": built})
    return SavedPolicy(spec, built, torch_device, seed)


def evaluate(
    run: Path | str,
    episodes: int = 20,
    *,
    deterministic: bool = True,
    seed: int = 0,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
    allow_import: bool = False,
    best: bool = False,
    max_steps: int | None = None,
) -> Evaluation:
    """Play complete episodes of the environment that `run` was trained on.

    Args:
        run: the run folder, or one of its checkpoints.
        episodes: number of episodes; fewer are played if one has no end (see `Evaluation.cut`).
        deterministic: take the most probable actions; otherwise sample.
        seed: of the environments and of sampled actions.
        make_env: makes one environment; needed if the run used a `make_env`.
        policy: your own network; needed if the run trained one.
        allow_import: allow an env id that names a module to import.
        best: use the checkpoint with the best evaluation instead of the last model.
        max_steps: cut an episode after this many steps; None: after the run's `eval_max_steps`.

    Raises:
        ConfigError, EnvError, CheckpointError: see their texts.
    """
    for name, value in (("episodes", episodes), ("max_steps", max_steps)):
        if value is not None and (not isinstance(value, (int, np.integer)) or value < 1):
            raise ConfigError(f"{name}={value!r} must be a whole number, at least 1.")
    saved, env_info, config = _open(as_path(run, "run"), seed, make_env, policy, allow_import, best)
    n = env_info.vector.num_envs if env_info.vector else min(episodes, 8)
    env, stream = make_vec_env(env_info, n, "sync"), seed_stream(seed, "eval")
    player = EpisodePlayer(
        env,
        saved.policy,
        saved.device,
        stream,
        max_steps=max_steps or config.eval_max_steps,
        normalizers=env_info.normalizers,
    )
    try:
        return player(episodes, None if deterministic else saved._generator)
    finally:
        player.close()


def record_video(
    run: Path | str,
    output: Path | str,
    *,
    deterministic: bool = True,
    seed: int = 0,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
    allow_import: bool = False,
    best: bool = False,
) -> tuple[Path, Video]:
    """Record one episode of `run` to `output` (.mp4, .webm or .gif; without ffmpeg always a .gif).

    The other arguments are those of `evaluate`.

    Returns:
        The path that was written, and the video.

    Raises:
        ConfigError, EnvError, CheckpointError: see their texts.
    """
    output = as_path(output, "output")
    check_video_name(output)
    choose_renderers()
    saved, env_info, _ = _open(as_path(run, "run"), seed, make_env, policy, allow_import, best)
    noise = None if deterministic else saved._generator
    specs = saved.spec.obs, saved.spec.action
    recorder = VideoRecorder(env_info, lambda: begin_episode(saved.policy, *specs, saved.device, noise))
    try:
        video = recorder.record_episode(seed)
    finally:
        recorder.close()
    return video.write(output), video


def _open(
    folder: Path, seed: int, make_env: Maker | None, policy: nn.Module | None, allow_import: bool, best: bool
) -> tuple[SavedPolicy, EnvInfo, Config]:
    """Load a run's policy and settings, and inspect the environment that it was trained on."""
    if best:
        best_folder = best_checkpoint(folder)
        if best_folder is None:
            raise CheckpointError(f"{folder} has no best checkpoint; train with --eval-every to have one.")
        verify_checkpoint(best_folder)
        folder = best_folder
    saved = load_policy(folder, policy, seed=seed)
    config = open_run(folder, make_env, allow_import)
    env_info = inspect_configured(config, make_env)
    env_info.obs_spec = env_info.obs_spec.read_as(saved.spec.obs)
    if (env_info.obs_spec, env_info.action_spec) != (saved.spec.obs, saved.spec.action):
        here = dataclasses.replace(saved.spec, obs=env_info.obs_spec, action=env_info.action_spec)
        differing = "; ".join(here.differences(saved.spec)) or "their bounds differ"
        whose = "its make_env" if make_env is None else "the make_env that it was trained with"
        raise ConfigError(f"{env_info.name} has other spaces than the policy in {folder} ({differing}); give {whose}.")
    return saved, env_info, config
