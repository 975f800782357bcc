"""Whole episodes between two iterations of training: evaluations, and films for TensorBoard."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from fastppo.envs.registry import EnvInfo, make_vec_env
from fastppo.evaluation.episodes import EpisodePlayer, Evaluation
from fastppo.evaluation.video import VideoRecorder
from fastppo.monitoring.stats import Stats
from fastppo.policies.policy import Policy
from fastppo.runtime.seeding import preserve_global_random_state, seed_stream
from fastppo.spaces import ActionSpec, ObsSpec

_MOST_ENVS = 8


class PeriodicEvaluation:
    """Plays and films in environments of its own, so that training's are not disturbed, nor its random numbers.

    Attributes:
        seen: the global step up to which what was due has been done.
    """

    def __init__(
        self,
        found: EnvInfo,
        policy: Policy,
        device: torch.device,
        *,
        seed: int,
        eval_every: int | None,
        eval_episodes: int,
        video_every: int | None,
        main: bool,
        say: Callable[[str], None],
    ) -> None:
        """Make the environments, in the main process.

        Args:
            found: what `probe` said.
            policy: the one that learns.
            device: where it lies.
            seed: of the run.
            eval_every: steps between evaluations; None: none.
            eval_episodes: of each.
            video_every: steps between films; None: none.
            main: whether this is the process that plays; others only know when.
            say: takes a line where filming fails.

        Raises:
            ConfigError: it can't be filmed.
        """
        self._eval_every, self._episodes, self._video_every = eval_every, eval_episodes, video_every
        self._seed, self._say, self.seen = seed, say, 0
        self._player: EpisodePlayer | None = None
        self._camera: VideoRecorder | None = None
        with contextlib.ExitStack() as undo:
            if main and eval_every is not None:
                env = make_vec_env(found, min(eval_episodes, _MOST_ENVS), "sync")
                self._player = EpisodePlayer(env, policy, device, seed_stream(seed, "eval"))
                undo.callback(self._player.close)
            if main and video_every is not None:
                self._camera = VideoRecorder(found, _acting(policy, found.obs_spec, found.action_spec, device))
            undo.pop_all()

    def evaluates_at(self, step: int) -> bool:
        """Whether an evaluation is due at `step`; the same answer in every process."""
        return _passes(self._eval_every, self.seen, step)

    def __call__(self, stats: Stats) -> Evaluation | None:
        """Do what is due after an iteration, into its figures; returns the evaluation, if there was one."""
        before, self.seen = self.seen, stats.global_step
        with preserve_global_random_state():
            if self._camera is not None and _passes(self._video_every, before, self.seen):
                try:
                    stats.images["video/episode"] = self._camera.episode(self._seed).gif()
                except Exception as error:  # whatever it is, training is worth more than its film
                    self._say(f"{error} No more is filmed.")
                    camera, self._camera = self._camera, None
                    with contextlib.suppress(Exception):
                        camera.close()
            if self._player is None or not _passes(self._eval_every, before, self.seen):
                return None
            played = self._player(self._episodes)
        lengths = sum(played.lengths) / len(played.lengths)
        stats.scalars.update(
            {"eval/return_mean": played.mean, "eval/return_std": played.std, "eval/length_mean": lengths}
        )
        return played

    def close(self) -> None:
        """Close the environments."""
        with contextlib.ExitStack() as stack:
            for part in (self._player, self._camera):
                if part is not None:
                    stack.callback(part.close)


def _acting(
    policy: Policy, obs_spec: ObsSpec, action_spec: ActionSpec, device: torch.device
) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    """From one observation to the environment's most probable action."""

    def act(obs: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        row = torch.as_tensor(obs[None]).to(device, obs_spec.dtype)
        action: np.ndarray[Any, Any] = action_spec.to_env(policy.mode(row).numpy(force=True))[0]
        return action

    return act


def _passes(every: int | None, before: int, now: int) -> bool:
    """Whether a multiple of `every` steps lies after `before`, and not after `now`."""
    return every is not None and now // every > before // every
