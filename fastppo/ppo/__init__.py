"""The algorithm: rollout, advantages, update, metrics and the memory plan."""
