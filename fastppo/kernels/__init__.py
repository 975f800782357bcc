"""Triton kernels for CUDA: tensors in, tensors out. Import them where they are used: Triton comes with CUDA builds.

No argument of a launched kernel may be called `params`, `options`, `backend` or `specialize_impl`: the code that Triton
generates for a launch uses these names. The interpreter runs no such code; tests/kernels/test_launch.py does.
"""
