"""The torch backend: each public op by what is quickest in PyTorch. ``fastbf/autograd.py`` has the same on kernels."""
