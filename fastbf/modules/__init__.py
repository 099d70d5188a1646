"""The modules: the method, its layer, and the classifier that both streams share."""

from fastbf.modules.batchformer import BatchFormer
from fastbf.modules.classifier import SharedClassifier
from fastbf.modules.layer import BatchFormerLayer

__all__ = ["BatchFormer", "BatchFormerLayer", "SharedClassifier"]
