"""Environments as tensors: one protocol, and what turns Gymnasium's vector environments into it."""
