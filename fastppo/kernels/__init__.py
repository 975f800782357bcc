"""Triton kernels for CUDA: tensors in, tensors out. Import them where they are used: Triton comes with CUDA builds."""
