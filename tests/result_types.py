"""What calls give, as type checkers know it: ``python -m tests.type_check`` reads this, and nothing runs it."""

from torch import Tensor, nn
from typing_extensions import assert_type

import fastbf
from fastbf.functional import LossStats, linear_cross_entropy


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
