"""Tensors in, tensors out: the mathematics of PPO, importing torch alone."""
