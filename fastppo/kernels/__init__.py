"""Triton kernels for CUDA: tensors in, tensors out. Import them only where they are used: Triton comes with CUDA."""
