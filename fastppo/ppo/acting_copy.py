"""Acting on one device and learning on another."""

from __future__ import annotations

import torch

from fastppo.policies.policy import Policy
from fastppo.ppo.rollout import Rollout


class ActingCopy:
    """Act on one device and learn on another: copies the policy before a rollout and the rollout after it.

    A step of a small network on the CPU costs less than a round trip to the GPU.
    """

    # each side has its own
    _NOT_COPIED = ("advantages", "returns", "noise", "final_obs")

    def __init__(self, acting: Policy, here: Rollout, learning: Policy, there: Rollout) -> None:
        """Copy `learning` to `acting` before a rollout, and `here` to `there` after it."""
        self._acting, self._learning = acting, learning
        self._there = {name: x for name, x in there.tensors().items() if name not in self._NOT_COPIED}
        self._here = here.tensors()
        if there.rewards.device.type == "cuda":
            self._here = {name: x.pin_memory() if name in self._there else x for name, x in self._here.items()}
            for name, x in self._here.items():
                if hasattr(here, name):
                    setattr(here, name, x)
            here.states = tuple(self._here[f"states{i}"] for i in range(len(here.states)))

    def fetch_policy(self) -> None:
        """Copy parameters and observation moments to the acting policy."""
        with torch.no_grad():
            pairs = zip(self._acting.state_dict().values(), self._learning.state_dict().values(), strict=True)
            for mine, theirs in pairs:
                mine.copy_(theirs)

    def send_rollout(self) -> None:
        """Copy the rollout to the learning device."""
        for name, there in self._there.items():
            there.copy_(self._here[name], non_blocking=True)
