"""One iteration's statistics under the tags that dashboards know (CleanRL's)."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping

from fastppo.monitoring.health import HealthFinding
from fastppo.monitoring.update_samples import UpdateSample
from fastppo.ppo.metrics import Metrics
from fastppo.runtime.clock import Clock

_RETURNS = 32  # episode returns logged with an iteration, at most


@dataclasses.dataclass(frozen=True)
class Stats:
    """One iteration, as it is logged.

    Attributes:
        iteration: counted from 1.
        n_iterations: planned.
        global_step: real environment steps so far, over all environments.
        total_timesteps: planned.
        mean_return: of the last 100 episodes (fewer at first); NaN before the first.
        episodes: ended so far.
        seconds: of training so far.
        sps: steps per second over the last iterations.
        kl: mean k3 of this update.
        stop: why the update ended early, or "".
        scalars: every figure by its TensorBoard tag.
        returns: of the episodes that ended in it, the latest last, 32 at most.
        sample: a look into its update, if this iteration was chosen for one.
        findings: what health last found wrong with the run.
        images: animations (GIF) by tag.
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


class Statistics:
    """Turns the figures of each iteration into `Stats`."""

    def __init__(
        self, metrics: Metrics, clock: Clock, *, n_iterations: int, steps_per_iteration: int, box_actions: bool
    ) -> None:
        """Read counters from `metrics` and times from `clock`.

        Args:
            metrics: of the run.
            clock: of the run.
            n_iterations: planned.
            steps_per_iteration: environment steps of one iteration, over all ranks.
            box_actions: whether actions have bounds to be clipped to.
        """
        self._metrics, self._clock = metrics, clock
        self._n_iterations, self._steps_per_iteration = n_iterations, steps_per_iteration
        self._box_actions = box_actions
        self._seconds = clock.phase_seconds()

    def __call__(
        self, iteration: int, named: Mapping[str, float], coefs: Mapping[str, float], sample: UpdateSample | None = None
    ) -> Stats:
        """Return the statistics of the iteration that has just been updated from; ticks the clock.

        Args:
            iteration: counted from 1.
            named: the figures, as `Metrics.count` returned them.
            coefs: scheduled coefficients, with `kl_limit`.
            sample: of this update, if one was taken.
        """
        clock, metrics, figures = self._clock, self._metrics, dict(named)
        clock.tick(metrics.global_step)
        before, self._seconds = self._seconds, clock.phase_seconds()
        spent = {name: total - before[name] for name, total in self._seconds.items()}
        episodes, outside = int(figures.pop("episodes")), int(figures.pop("outside"))
        clipped, returns, lengths = (figures.pop(name) for name in ("clipped_actions", "returns", "lengths"))
        stopped, stop_kl = figures.pop("stopped"), figures.pop("stop_kl")
        for name in ("steps", "broken", "skipped_in_a_row"):
            del figures[name]
        scalars = {f"losses/{name}": value for name, value in figures.items()}
        scalars |= {
            "charts/SPS": clock.sps_cumulative,
            "charts/sps_window": clock.sps_window,
            "charts/sps_steady": clock.sps_steady,
            "charts/learning_rate": coefs["learning_rate"],
            "charts/clip_coef": coefs["clip_coef"],
            "charts/max_grad_norm": coefs["max_grad_norm"],
            **{f"time/{name}": seconds for name, seconds in spent.items()},
        }
        if self._box_actions:
            scalars["charts/clipped_actions"] = clipped
        if metrics.checks_bounds:
            scalars["charts/obs_outside_space"] = outside
        if math.isfinite(coefs["kl_limit"]):
            scalars["charts/kl_limit"] = coefs["kl_limit"]
        if sample is not None:
            scalars["samples/first_ratio_error"] = sample.first_ratio_error
        if episodes:
            scalars["charts/episodic_return"] = returns / episodes
            scalars["charts/episodic_length"] = lengths / episodes
        stop = ""
        if stopped:
            scalars["losses/stop_kl"] = stop_kl
            stop = f"KL {stop_kl:.3g} ended epoch {figures['epochs_run']:.0f}"
        return Stats(
            iteration=iteration,
            n_iterations=self._n_iterations,
            global_step=metrics.global_step,
            total_timesteps=self._n_iterations * self._steps_per_iteration,
            mean_return=metrics.episodes.mean_return,
            episodes=metrics.episodes.count,
            seconds=clock.seconds,
            sps=clock.sps_window,
            kl=figures["approx_kl"],
            stop=stop,
            scalars=scalars,
            returns=metrics.episodes.latest(min(episodes, _RETURNS)),
            sample=sample,
        )
