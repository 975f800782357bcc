"""Figures of the user's own, from the infos of the environments (`--log-info`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from fastppo.envs.info_sums import MOST_SEEN, join_totals, place_among
from fastppo.envs.vec_env import VecEnv
from fastppo.monitoring.stats import Stats
from fastppo.runtime.distributed import World

_PATIENCE = 10  # iterations without the end of an episode, after which a missing key is reported


class InfoMonitor:
    """Adds the means of chosen keys to the statistics, as `info/KEY`; see `fastppo.envs.info_sums`."""

    def __init__(self, env: VecEnv, patterns: Sequence[str], world: World, say: Callable[[str], None]) -> None:
        """Read the infos of `env`, pooled over the ranks of `world`; without patterns, do nothing."""
        self._env, self._patterns, self._world, self._say = env, patterns, world, say
        self._missing, self._refused = list(patterns), set[str]()
        self._seen: dict[str, None] = {}
        self._iterations = 0

    def __call__(self, stats: Stats) -> None:
        """Add the figures of the iteration, in the order of their patterns; a key that no step had gives none."""
        if not self._patterns:
            return
        infos = join_totals(self._world.gather_objects(self._env.read_info()))
        names = [name for name in infos.totals if infos.totals[name][1].any()]
        for name in sorted(names, key=lambda name: (place_among(self._patterns, name), name)):
            total, count = infos.totals[name].sum(1).tolist()
            stats.scalars[f"info/{name}"] = total / count
        for name in sorted(infos.refused.keys() - self._refused):
            self._refused.add(name)
            self._say(f"note: --log-info {name}: info holds {infos.refused[name]}, not a number; it is left out.")
        if self._missing:
            self._report_missing(stats, [*names, *infos.refused], infos.seen)

    def _report_missing(self, stats: Stats, found: Sequence[str], seen: Sequence[str]) -> None:
        """Name the patterns without a key, once an episode has ended."""
        self._missing = [p for p in self._missing if all(place_among([p], name) for name in found)]
        for name in seen:
            if len(self._seen) < MOST_SEEN:
                self._seen[name] = None
        self._iterations += 1
        if self._missing and (stats.episodes or self._iterations >= _PATIENCE):
            held = f"it held {', '.join(self._seen)}" if self._seen else "it held nothing at all"
            self._say(
                f"note: --log-info {' '.join(self._missing)}: no such key in info in {stats.global_step:,} steps and "
                f"{stats.episodes:,} episodes; {held}."
            )
            self._missing = []
