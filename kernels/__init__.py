"""Triton kernels of fastbf, one file an op. Imports torch and triton only."""
