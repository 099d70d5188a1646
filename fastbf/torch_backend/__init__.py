"""The torch backend: each public op by PyTorch's operators. ``fastbf/triton_backend`` has the same on kernels."""
