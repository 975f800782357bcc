"""Triton kernels for CUDA: tensors in, tensors out. Import them where they are used: Triton comes with CUDA builds.

No argument of a launched kernel may be called `params`: the code that Triton generates for a launch has a variable of
that name. The interpreter runs no such code, so tests/kernels/test_launch.py launches.
"""
