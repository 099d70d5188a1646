"""What calls give, as type checkers know it: ``python -m tests.type_check`` reads this, and nothing runs it."""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from torch import Tensor, nn
from typing_extensions import assert_type

import fastbf
from fastbf.functional import LossStats, encoder_layer, linear_cross_entropy


def calls(former: fastbf.BatchFormer, classifier: fastbf.SharedClassifier, x: Tensor, y: Tensor, flag: bool) -> None:
    """One statement a kind of call."""
    assert_type(former(x), Tensor)
    assert_type(former(x, y), tuple[Tensor, Tensor])
    assert_type(former(x, y, [1]), tuple[Tensor, Tensor, list[int]])
    assert_type(former.mix(x), Tensor)
    assert_type(former.attention_map(x), Tensor)
    assert_type(classifier.loss(x, y), Tensor)
    assert_type(classifier.loss(x, y, stats=False), Tensor)
    assert_type(classifier.loss(x, y, stats=True), tuple[Tensor, LossStats])
    assert_type(classifier.loss(x, y, stats=flag), Tensor | tuple[Tensor, LossStats])
    assert_type(linear_cross_entropy(x, x, y), Tensor)
    assert_type(linear_cross_entropy(x, x, y, stats=True)[1].accuracy, Tensor)
    assert_type(fastbf.convert(nn.Linear(1, 1)), int)
    assert_type(fastbf.explain(former, x).backend, str)


def wrong_calls(former: fastbf.BatchFormer, classifier: fastbf.SharedClassifier, x: Tensor, y: Tensor) -> None:
    """Functions that take unknown keywords to say which was meant take none for a type checker."""
    classifier.loss(x, labels=y)  # pyright: ignore[reportCallIssue]
    classifier.loss(x)  # pyright: ignore[reportCallIssue]
    linear_cross_entropy(x, x, targets=y)  # pyright: ignore[reportCallIssue]
    encoder_layer(x, x, x, x, x, x, x, x, x, x, x, x, x, num_heads=4, p=0)  # pyright: ignore[reportArgumentType]
    former.mix(x, y=y)  # pyright: ignore[reportCallIssue]
    fastbf.strip(former, plane=True)  # pyright: ignore[reportCallIssue]
