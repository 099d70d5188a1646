"""The Triton backend: autograd Functions over the launchers of ``kernels/``. Its modules import triton."""
