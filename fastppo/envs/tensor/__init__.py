"""Environments written with torch alone: a step of all N is one function of tensors, on any device.

A task holds the physics as pure functions of columns [N]; `TensorEnv` drives it: seeds, time limits, autoreset.
"""
