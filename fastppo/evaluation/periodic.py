"""Periodic evaluation and video recording between the iterations of training."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch

from fastppo.envs.make_envs import EnvInfo, make_vec_env
from fastppo.errors import ENV_ERRORS
from fastppo.evaluation.episodes import EpisodePlayer, Evaluation, begin_episode
from fastppo.evaluation.video import VideoRecorder
from fastppo.monitoring.stats import Stats
from fastppo.policies.policy import Policy
from fastppo.runs.run_state import Progress
from fastppo.runtime.clock import Clock
from fastppo.runtime.distributed import World
from fastppo.runtime.seeding import preserve_global_random_state, seed_stream

_MAX_ENVS = 8

_Array = np.ndarray[Any, Any]


class PeriodicEvaluation:
    """Evaluates the policy and records videos, in environments of its own and without touching random states.

    Attributes:
        last_step: global step of the last call; what was due until then is done.
    """

    def __init__(
        self,
        env_info: EnvInfo,
        policy: Policy,
        device: torch.device,
        *,
        seed: int,
        eval_every: int | None,
        eval_episodes: int,
        eval_max_steps: int,
        video_every: int | None,
        clock: Clock,
        world: World,
        say: Callable[[str], None],
    ) -> None:
        """Make the environments, in the main process only.

        Args:
            env_info: of the training environment.
            policy: the policy in training.
            device: device of the policy.
            seed: of the run.
            eval_every: environment steps between evaluations; None disables them.
            eval_episodes: episodes per evaluation.
            eval_max_steps: maximum steps of each of them.
            video_every: environment steps between videos; None disables them.
            clock: times evaluations and videos.
            world: the ranks that train together; the main one evaluates.
            say: prints a line about each evaluation, and when recording fails.

        Raises:
            ConfigError: the environment can't be recorded.
        """
        self._eval_every, self._episodes, self._video_every = eval_every, eval_episodes, video_every
        self._seed, self._world, self._device, self._say, self.last_step = seed, world, device, say, 0
        self._clock = clock
        self._player: EpisodePlayer | None = None
        self._recorder: VideoRecorder | None = None
        with contextlib.ExitStack() as undo:
            if world.is_main and eval_every is not None:
                env = make_vec_env(env_info, min(eval_episodes, _MAX_ENVS), "sync")
                self._player = EpisodePlayer(
                    env,
                    policy,
                    device,
                    seed_stream(seed, "eval"),
                    max_steps=eval_max_steps,
                    normalizers=env_info.normalizers,
                )
                undo.callback(self._player.close)
            if world.is_main and video_every is not None:
                specs = env_info.obs_spec, env_info.action_spec
                self._recorder = VideoRecorder(env_info, lambda: begin_episode(policy, *specs, device, None))
            undo.pop_all()

    def __call__(self, stats: Stats, progress: Progress) -> bool:
        """Evaluate and record what is due after an iteration, into `stats`.

        Returns:
            Whether an evaluation was the best so far; then `progress.best` is its mean return. The same on every rank.
        """
        evaluates = _due(self._eval_every, self.last_step, stats.global_step)
        played = self._play(stats)
        if not evaluates:
            return False
        best = progress.best
        if played is not None:
            better = math.isfinite(played.mean) and (best is None or played.mean > best)
            note = ", the best so far" if better else ""
            self._say(
                f"evaluation at {stats.global_step:,} steps: return {played.mean:.2f} +- {played.std:.2f}"
                f"{note}{played.remark}"
            )
            if better:
                best = played.mean
        # every rank's writer must know of the best: if it can't be written, all write it again together
        best = self._world.shared(lambda: best)
        better, progress.best = best != progress.best, best
        return better

    def _play(self, stats: Stats) -> Evaluation | None:
        previous, self.last_step = self.last_step, stats.global_step
        with preserve_global_random_state():
            if self._recorder is not None and _due(self._video_every, previous, self.last_step):
                try:
                    with self._timed("video", stats):
                        stats.images["video/episode"] = self._recorder.record_episode(self._seed).gif()
                except ENV_ERRORS as error:  # whatever it is, it must not stop the training
                    self._say(f"{str(error).rstrip('.')}. Video recording is off from here on.")
                    recorder, self._recorder = self._recorder, None
                    with contextlib.suppress(Exception):
                        recorder.close()
            if self._player is None or not _due(self._eval_every, previous, self.last_step):
                return None
            with self._timed("evaluation", stats):
                played = self._player(self._episodes)
        mean_length = sum(played.lengths) / len(played.lengths)
        stats.scalars.update(
            {"eval/return_mean": played.mean, "eval/return_std": played.std, "eval/length_mean": mean_length}
        )
        return played

    @contextlib.contextmanager
    def _timed(self, name: str, stats: Stats) -> Iterator[None]:
        """Count the body in the phase `name`, and log its seconds in the row of this iteration."""
        before = self._clock.phase_seconds()[name]
        with self._clock.phase(name):
            yield
        stats.scalars[f"time/{name}"] = self._clock.phase_seconds()[name] - before

    def close(self) -> None:
        """Close the environments."""
        with contextlib.ExitStack() as stack:
            for part in (self._player, self._recorder):
                if part is not None:
                    stack.callback(part.close)


def _due(every: int | None, previous: int, now: int) -> bool:
    """Return whether a multiple of `every` steps is in (previous, now]."""
    return every is not None and now // every > previous // every
