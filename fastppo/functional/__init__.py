"""The mathematics of PPO as pure functions on tensors; the only dependency is torch."""
