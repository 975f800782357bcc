"""The mathematics of PPO as pure functions on tensors; for some of them there is also C or Triton code to call."""
