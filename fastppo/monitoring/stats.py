"""The statistics of an iteration, under CleanRL's TensorBoard tags."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from fastppo.monitoring.health_rules import HealthFinding
from fastppo.monitoring.update_samples import UpdateSample
from fastppo.ppo.metrics import MASKED, Metrics
from fastppo.runtime.clock import PHASES, Clock

MAX_RETURNS = 32  # episode returns logged per row


@dataclasses.dataclass(frozen=True)
class Stats:
    """The statistics of one iteration.

    Attributes:
        iteration: counted from 1.
        n_iterations: planned number of iterations.
        global_step: environment steps so far, over all environments.
        total_timesteps: planned environment steps.
        mean_return: mean return of the last 100 episodes (fewer at first); NaN before the first ends.
        episodes: episodes completed so far.
        seconds: seconds of training so far.
        paused_seconds: seconds of evaluations, videos and the caller's own code between iterations so far.
        sps: steps per second over the last iterations.
        kl: mean approximate KL divergence (k3) of this update.
        stop: why the update stopped early, or "".
        scalars: all scalars by their TensorBoard tag.
        returns: returns of the episodes that ended in this iteration, latest last, at most 32.
        sample: the update sample, if one was taken in this iteration.
        findings: findings of the latest health check.
        images: animated GIFs by tag.
    """

    iteration: int
    n_iterations: int
    global_step: int
    total_timesteps: int
    mean_return: float
    episodes: int
    seconds: float
    sps: float
    kl: float
    stop: str
    scalars: dict[str, float]
    returns: list[float] = dataclasses.field(default_factory=list)
    sample: UpdateSample | None = None
    findings: list[HealthFinding] = dataclasses.field(default_factory=list)
    images: dict[str, bytes] = dataclasses.field(default_factory=dict)
    paused_seconds: float = 0.0


class Statistics:
    """Builds the `Stats` of each iteration."""

    def __init__(
        self,
        metrics: Metrics,
        clock: Clock,
        *,
        n_iterations: int,
        steps_per_iteration: int,
        box_actions: bool,
    ) -> None:
        """Read counters from `metrics` and times from `clock`.

        Args:
            metrics: the run's metrics.
            clock: the run's clock.
            n_iterations: planned number of iterations.
            steps_per_iteration: environment steps per iteration, over all ranks.
            box_actions: whether actions are continuous and clipped to bounds.
        """
        self._metrics, self._clock = metrics, clock
        self._n_iterations, self._steps_per_iteration = n_iterations, steps_per_iteration
        self._box_actions = box_actions
        self._seconds = clock.phase_seconds()

    def __call__(
        self, iteration: int, named: Mapping[str, float], coefs: Mapping[str, float], sample: UpdateSample | None = None
    ) -> Stats:
        """Return the statistics of the iteration that has just ended, and tick the clock.

        Args:
            iteration: counted from 1.
            named: the metrics by name, from `Metrics.read` and already counted by `Metrics.count`.
            coefs: values of the scheduled coefficients, and `kl_limit`; adapted ones are measured.
            sample: the sample of this update, if one was taken.
        """
        clock, metrics, measured = self._clock, self._metrics, dict(named)
        clock.tick(metrics.global_step)
        previous, self._seconds = self._seconds, clock.phase_seconds()
        elapsed = {phase: total - previous[phase] for phase, total in self._seconds.items()}
        episodes, outside = int(measured.pop("episodes")), int(measured.pop("outside"))
        clipped, action_range, action_std = map(measured.pop, ("clipped_actions", "action_range", "action_std"))
        masked = measured.pop(MASKED, None)
        returns, lengths = measured.pop("returns"), measured.pop("lengths")
        stopped, stop_kl = measured.pop("stopped"), measured.pop("stop_kl")
        reward_per_step = measured.pop("rewards") / max(1.0, measured.pop("steps"))
        shown = {name: coefs[name] for name in ("learning_rate", "clip_coef", "max_grad_norm") if name in coefs}
        charts = ("learning_rate", "kl_coef", "intrinsic_reward")
        shown |= {name: measured.pop(name) for name in charts if name in measured}
        for name in ("broken", "skipped_in_a_row"):
            del measured[name]
        scalars = {f"losses/{name}": value for name, value in measured.items()}
        scalars |= {
            "charts/SPS": clock.sps_cumulative,
            "charts/sps_window": clock.sps_window,
            "charts/sps_steady": clock.sps_steady,
            "charts/reward_per_step": reward_per_step,
            **{f"charts/{name}": value for name, value in shown.items()},
            **{f"time/{phase}": elapsed[phase] for phase in PHASES},
        }
        if self._box_actions:
            scalars["charts/clipped_actions"] = clipped
            scalars["charts/action_std"] = action_std
            if math.isfinite(action_range):  # NaN where actions are unbounded
                scalars["charts/action_range"] = action_range
        if masked is not None:
            scalars["charts/masked_actions"] = masked
        if metrics.checks_bounds:
            scalars["charts/obs_outside_space"] = outside
        if math.isfinite(coefs["kl_limit"]):
            scalars["charts/kl_limit"] = coefs["kl_limit"]
        if sample is not None:
            scalars["samples/first_ratio_error"] = sample.first_ratio_error
            scalars |= sample.memory
        if episodes:
            scalars["charts/episodic_return"] = returns / episodes
            scalars["charts/episodic_length"] = lengths / episodes
        if metrics.episodes.count:
            scalars["charts/mean_return"] = metrics.episodes.mean_return
        stop = ""
        if stopped:
            scalars["losses/stop_kl"] = stop_kl
            stop = f"KL {stop_kl:.3g} ended epoch {measured['epochs_run']:.0f}"
        return Stats(
            iteration=iteration,
            n_iterations=self._n_iterations,
            global_step=metrics.global_step,
            total_timesteps=self._n_iterations * self._steps_per_iteration,
            mean_return=metrics.episodes.mean_return,
            episodes=metrics.episodes.count,
            seconds=clock.seconds,
            sps=clock.sps_window,
            kl=measured["approx_kl"],
            stop=stop,
            scalars=scalars,
            returns=metrics.episodes.latest(min(episodes, MAX_RETURNS)),
            sample=sample,
        )
