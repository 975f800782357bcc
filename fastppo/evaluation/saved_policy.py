"""A saved policy, without its trainer: act with it, and play whole episodes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from fastppo.config import Config
from fastppo.envs.registry import EnvInfo, Maker, inspect_env, make_vec_env
from fastppo.errors import CheckpointError, ConfigError
from fastppo.evaluation.episodes import EpisodePlayer, Evaluation
from fastppo.evaluation.video import Video, VideoRecorder, check_video_name
from fastppo.policies.policy import Policy
from fastppo.policies.policy_spec import PolicySpec
from fastppo.runs.checkpoint import best_checkpoint, load_model, read_spec, verify_checkpoint, weights_file
from fastppo.runtime.device import choose_device
from fastppo.runtime.seeding import generator, seed_stream


class SavedPolicy:
    """A policy from a run folder, normaliser included.

    Attributes:
        spec: what it reads and what it makes.
        policy: encoder, network, distribution.
    """

    def __init__(self, spec: PolicySpec, policy: Policy, device: torch.device, seed: int = 0) -> None:
        """Act on `device`; `seed` is for sampled actions."""
        self.spec = spec
        self.policy = policy
        self.device = device
        self._generator = generator(seed, "noise", device)

    def predict(self, obs: Any, deterministic: bool = True) -> np.ndarray[Any, Any]:  # noqa: ANN401 - array-like
        """The environment's action for one observation, or actions for a batch of them.

        Args:
            obs: as the environment gives it, [*obs] or [B, *obs]; raw, the policy normalises by itself.
            deterministic: the most probable action; else sampled.

        Returns:
            Actions as the environment takes them (clipped to its bounds), [*action] or [B, *action].

        Raises:
            ValueError: another shape.
        """
        array, shape = np.asarray(obs, order="C"), self.spec.obs.shape
        single = array.shape == shape
        if not single and array.shape[1:] != shape:
            raise ValueError(f"obs has shape {array.shape}; this policy takes {shape} or a batch of it.")
        rows = torch.as_tensor(array[None] if single else array).to(self.device, self.spec.obs.dtype)
        if deterministic:
            actions = self.policy.mode(rows)
        else:
            noise = torch.empty((len(rows), self.policy.distribution.noise_size), device=self.device)
            self.policy.distribution.fill_noise(noise, self._generator)
            actions = self.policy.act(rows, noise).actions
        out = self.spec.action.to_env(actions.numpy(force=True))
        return out[0] if single else out


def load_policy(run: Path | str, policy: nn.Module | None = None, device: str = "cpu", seed: int = 0) -> SavedPolicy:
    """The policy saved in the folder `run`; `policy` is your own network, if the run trained one.

    Raises:
        CheckpointError: no model there, or one that doesn't fit.
        ConfigError: the run's network was your own and isn't given.
    """
    run_dir, on = Path(run), choose_device(device)
    spec, _ = read_spec(run_dir)
    size = weights_file(run_dir).stat().st_size
    try:
        spec.check_size(size)
        built = spec.build(policy).to(on)
    except CheckpointError as error:
        raise CheckpointError(f"{run_dir}/model.json doesn't fit its weights: {error}") from None
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{run_dir}/model.json can't be understood ({type(error).__name__}: {error}).") from None
    load_model(run_dir, {"policy": built})
    return SavedPolicy(spec, built, on, seed)


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
) -> Evaluation:
    """Play `episodes` whole episodes of the environment that `run` was trained on; fewer where one has no end.

    Args:
        run: the run folder, or one of its checkpoints.
        episodes: how many.
        deterministic: the most probable actions; else sampled ones.
        seed: of the environments and of sampling.
        make_env: makes one environment, where the run's came from Python.
        policy: your own network, where the run trained one.
        allow_import: the run's env id names a module that may be imported.
        best: the checkpoint that evaluated best while it trained, in place of the last model.

    Raises:
        ConfigError, EnvError, CheckpointError: see their texts.
    """
    if episodes < 1:
        raise ConfigError(f"episodes={episodes} must be at least 1.")
    saved, found = _open(Path(run), seed, make_env, policy, allow_import, best)
    n = found.vector.num_envs if found.vector else min(episodes, 8)
    player = EpisodePlayer(make_vec_env(found, n, "sync"), saved.policy, saved.device, seed_stream(seed, "eval"))
    try:
        return player(episodes, None if deterministic else saved._generator)
    finally:
        player.close()


def film(
    run: Path | str,
    output: Path,
    *,
    deterministic: bool = True,
    seed: int = 0,
    make_env: Maker | None = None,
    policy: nn.Module | None = None,
    allow_import: bool = False,
    best: bool = False,
) -> tuple[Path, Video]:
    """Video one episode of `run` into `output` (.mp4, .webm, .gif; a GIF without ffmpeg); arguments as of `evaluate`.

    Returns:
        the file that was written, and the film.

    Raises:
        ConfigError, EnvError, CheckpointError: see their texts.
    """
    check_video_name(output)
    saved, found = _open(Path(run), seed, make_env, policy, allow_import, best)
    camera = VideoRecorder(found, lambda obs: saved.predict(obs, deterministic))
    try:
        shot = camera.episode(seed)
    finally:
        camera.close()
    return shot.write(output), shot


def _open(
    run_dir: Path, seed: int, make_env: Maker | None, policy: nn.Module | None, allow_import: bool, best: bool
) -> tuple[SavedPolicy, EnvInfo]:
    """The policy of a run, and a look at the environment that it was trained on."""
    if best:
        found_best = best_checkpoint(run_dir)
        if found_best is None:
            raise CheckpointError(f"{run_dir} has no best checkpoint; train with --eval-every to have one.")
        verify_checkpoint(found_best)
        run_dir = found_best
    saved = load_policy(run_dir, policy, seed=seed)
    config = _read_config(run_dir)
    if ":" in config.env_id and make_env is None and not allow_import:
        raise ConfigError(f"{run_dir} was trained on {config.env_id}, which imports code; repeat with --allow-import.")
    _, about = read_spec(run_dir)
    if about.get("make_env") and make_env is None:
        raise ConfigError(
            f"{run_dir} was trained on {about.get('env')} from make_env; play it with evaluate(..., make_env=...)."
        )
    found = inspect_env(config.env_id, config.env_kwargs, make_env)
    if (found.obs_spec, found.action_spec) != (saved.spec.obs, saved.spec.action):
        raise ConfigError(f"{config.env_id} has other spaces than the policy in {run_dir}; give its make_env.")
    return saved, found


def _read_config(run_dir: Path) -> Config:
    path = run_dir / "config.json"
    if not path.exists() and run_dir.parent.name == "checkpoints":
        path = run_dir.parents[1] / "config.json"
    try:
        return Config.from_dict(json.loads(path.read_text()), str(path))
    except OSError as error:
        raise CheckpointError(f"{path} can't be read ({error.strerror}).") from None
    except (ValueError, AttributeError) as error:
        if isinstance(error, ConfigError):
            raise
        raise CheckpointError(f"{path} can't be understood ({error}).") from None
